"""What the open page and the server tell each other: what is new, and what the user does to a row or a picture.

Routes of our own beside Gradio's, behind the same gate (same origin, token). They answer in under a millisecond and
change numbers only; what lasts is the worker's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from secrets import token_hex
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from app.draft import Draft
from app.memory import Row
from app.pictures import thumbnail
from app.session import Session
from lora_core.errors import ConfigError, LoraError

WIDEST = 10.0  # of a weight; the slider goes from -1 to 2, the field beside it so far


@dataclass(frozen=True)
class Part:
    """A part of the page that changes by itself.

    content   what assets/live.js draws; None where Gradio does
    mark      anything whose text differs when the part should look different; None: the content tells
    """

    content: Callable[[], Any] | None = None
    mark: Callable[[], Any] | None = None

    def news(self, seen: object) -> list[Any] | None:
        """[mark, content] for a page that has drawn it by the mark `seen`; None if that is still so."""
        if self.mark is not None:
            mark = str(self.mark())
            return None if mark == seen else [mark, self.content() if self.content else None]
        content = self.content() if self.content else None
        mark = hashlib.blake2b(repr(content).encode("utf-8", "replace"), digest_size=8).hexdigest()
        return None if mark == seen else [mark, content]


def routes(session: Session, draft: Draft, parts: Mapping[str, Part]) -> APIRouter:
    """`POST /loom/news` {part: the mark it was drawn by} -> {part: [new mark, content]} of those that differ.
    `POST /loom/row` {name, and one of on, weight, text, solo, remove}; `POST /loom/picture` {name, and caption or
    remove}; both -> {} or {problem}. `GET /loom/thumb/NAME` a picture of the draft, small."""
    api = APIRouter(prefix="/loom")
    server = token_hex(8)  # a page that another server has made loads itself anew

    @api.post("/news")
    def news(seen: dict[str, Any]) -> JSONResponse:
        new: dict[str, Any] = {} if seen.get("server") == server else {"server": [server, None]}
        found = {name: part.news(seen.get(name)) for name, part in parts.items()}
        return JSONResponse(new | {name: news for name, news in found.items() if news is not None})

    @api.post("/row")
    def row(said: dict[str, Any]) -> JSONResponse:
        return _answer(lambda: change_row(session, said))

    @api.post("/picture")
    def picture(said: dict[str, Any]) -> JSONResponse:
        return _answer(lambda: change_picture(draft, said))

    @api.get("/thumb/{name}")
    def thumb(name: str) -> Response:
        path = draft.find(name)
        if path is None:
            return Response(status_code=404)
        body = thumbnail(path, path.stat().st_mtime_ns)
        return Response(body, media_type="image/jpeg", headers={"cache-control": "private, max-age=86400"})

    return api


def _answer(act: Callable[[], None]) -> JSONResponse:
    try:
        act()
    except LoraError as problem:
        return JSONResponse({"problem": str(problem)}, status_code=400)
    return JSONResponse({})


def change_row(session: Session, said: dict[str, Any]) -> None:
    """Raises ConfigError for what is no change of a row. A row that has gone meanwhile is no fault."""
    name, (what, value) = _change(said, ("on", "weight", "text", "solo", "remove"))
    if what == "remove":
        session.remove(name)
    elif what == "solo":
        session.play_alone(name)
    elif what == "on":
        session.set_row(name, on=bool(value))
    else:
        session.set_row(name, **{what: None if value is None and what == "text" else _weight(name, value)})


def change_picture(draft: Draft, said: dict[str, Any]) -> None:
    name, (what, value) = _change(said, ("caption", "remove"))
    if what == "remove":
        draft.remove(name)
    else:
        draft.caption(name, str(value))


def rows_data(session: Session) -> list[dict[str, Any]]:
    return [_row_data(row, session.wanted.solo) for row in list(session.rows.values())]


def _row_data(row: Row, solo: str) -> dict[str, Any]:
    return {
        "name": row.name,
        "on": row.on,
        "weight": row.weight,
        "text": row.text,
        "solo": row.name == solo,
        "silent": not row.on or solo not in ("", row.name),
        "aside": row.aside,
        "facts": row.facts,
        "words": list(row.triggers),
    }


def pictures_data(draft: Draft) -> list[dict[str, Any]]:
    return [
        {"name": e.path.name, "version": str(e.path.stat().st_mtime_ns), "caption": e.caption}
        for e in draft.entries()
    ]


def _change(said: dict[str, Any], known: tuple[str, ...]) -> tuple[str, tuple[str, Any]]:
    rest = {key: value for key, value in said.items() if key != "name"}
    if not isinstance(said.get("name"), str) or len(rest) != 1 or next(iter(rest)) not in known:
        raise ConfigError(f"A name and one of {', '.join(known)} were expected, {sorted(said)} came.")
    return said["name"], next(iter(rest.items()))


def _weight(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{name}: {value!r} is no weight. Give a number, such as 0.8.")
    if abs(value) > WIDEST:
        raise ConfigError(f"{name}: {value:g} is outside -{WIDEST:g} to {WIDEST:g}.")
    return float(value)
