"""What the open page and the server tell each other: what is new, and what the user does to a row, mix or picture.

Routes of our own beside Gradio's, behind the same gate (same origin, token). They answer in under a millisecond and
change numbers only; what lasts is the worker's.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import FileResponse, JSONResponse

from app import mixing
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
    `POST /loom/row` {name, and one of ROW}; `POST /loom/mix` {name, and one of MIX}; `POST /loom/picture` {name, and
    caption or remove}; `POST /loom/run` {name, and show}; each -> {} or {problem}. `GET /loom/thumb/NAME` a picture of
    the draft, small; `GET /loom/look` and `GET /loom/report/RUN` pages without scripts, of the last check and of a run.
    """
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

    @api.post("/mix")
    def mix(said: dict[str, Any]) -> JSONResponse:
        return _answer(lambda: change_mix(session, said))

    @api.post("/picture")
    def picture(said: dict[str, Any]) -> JSONResponse:
        return _answer(lambda: change_picture(draft, said))

    @api.post("/run")
    def run(said: dict[str, Any]) -> JSONResponse:
        return _answer(lambda: session.training.show(_change(said, ("show",))[0]))

    @api.get("/look")
    def look() -> Response:
        return _page(session.check.view.look.get("page"))

    @api.get("/report/{name}")
    def report(name: str) -> Response:
        try:
            return _page(session.training.folder_of(name).page)
        except LoraError:
            return _page(None)

    @api.get("/thumb/{name}")
    def thumb(name: str) -> Response:
        path = draft.find(name)
        if path is None:
            return Response(status_code=404)
        body = thumbnail(path, path.stat().st_mtime_ns)
        return Response(body, media_type="image/jpeg", headers={"cache-control": "private, max-age=86400"})

    return api


def _page(path: str | Path | None) -> Response:
    if path is None or not Path(path).is_file() or Path(path).is_symlink():  # which may lead anywhere
        return Response("There is no such page (any longer).", status_code=404, media_type="text/plain")
    return FileResponse(path, media_type="text/html", headers={"cache-control": "no-store"})


def _answer(act: Callable[[], None]) -> JSONResponse:
    try:
        act()
    except LoraError as problem:
        return JSONResponse({"problem": str(problem)}, status_code=400)
    return JSONResponse({})


ROW = ("on", "weight", "text", "block", "curve", "half", "plainly", "solo", "remove")
MIX = ("save", "wear", "before", "remove", "restore", "fade", "choose")


def change_row(session: Session, said: dict[str, Any]) -> None:
    """`block` is [key, weight or null], `curve` as `mixing.parse_curve` takes it. Raises ConfigError for what is no
    change of a row. A row that has gone meanwhile is no fault."""
    name, (what, value) = _change(said, ROW)
    match what:
        case "remove":
            session.remove(name)
        case "solo":
            session.play_alone(name)
        case "on":
            session.set_row(name, on=bool(value))
        case "weight":
            session.set_row(name, weight=_weight(name, value))
        case "text":
            weight = None if value is None else _weight(name, value)
            mixing.change(session, name, lambda row: mixing.with_text(row, weight))
        case "block":
            key, own = _block(name, value)
            mixing.change(session, name, lambda row: mixing.with_block(row, key, own))
        case "curve":
            curve = mixing.parse_curve(str(value))
            mixing.change(session, name, lambda row: row.changed(curve=curve))
        case "half":
            mixing.change(session, name, lambda row: row.changed(half=value))
        case "plainly":
            mixing.change(session, name, mixing.plainly)


def change_mix(session: Session, said: dict[str, Any]) -> None:
    """Saved mixes by name; `fade` and `choose` have [name of the other one, 0 to 1]. Raises LoraError."""
    name, (what, value) = _change(said, MIX)
    match what:
        case "save":
            mixing.save(session, name)
        case "wear":
            mixing.wear(session, name)
        case "before":
            mixing.wear_before(session)
        case "remove":
            session.mixes.delete(name)
        case "restore":
            session.mixes.restore()
        case "fade":
            other, at = _other(value)
            mixing.fade(session, name, other, at)
        case "choose":
            mixing.choose_fade(session, name, _other(value)[0])


def change_picture(draft: Draft, said: dict[str, Any]) -> None:
    name, (what, value) = _change(said, ("caption", "remove"))
    if what == "remove":
        draft.remove(name)
    else:
        draft.caption(name, str(value))


def rows_data(session: Session) -> list[dict[str, Any]]:
    return [_row_data(row, session.wanted.solo, session.blocks) for row in list(session.rows.values())]


def _row_data(row: Row, solo: str, known: list[str]) -> dict[str, Any]:
    return {
        "name": row.name,
        "on": row.on,
        "weight": row.weight,
        "text": row.text,
        "blocks": _block_lines(row, known),
        "known": known,
        "curve": mixing.curve_text(row.curve),
        "points": row.curve,
        "half": row.half,
        "set": mixing.details(row.worn),
        "solo": row.name == solo,
        "silent": not row.on or solo not in ("", row.name),
        "aside": row.aside,
        "facts": row.facts,
        "words": list(row.triggers),
    }


def _block_lines(row: Row, known: Sequence[str]) -> list[dict[str, Any]]:
    """The model's groups and what else has a weight of its own, in the order of the model; expressions at the end."""
    own, place = dict(row.blocks), {block: i for i, block in enumerate(known)}
    groups = [block for block in known if "." not in block] or ["down", "mid", "up"]

    def order(key: str) -> tuple[int, str]:
        return place.get(re.sub(r"\.(attn|res)$", "", key), len(place)), key

    keys = sorted({*groups, *own}, key=order) if known else [*groups, *(k for k in own if k not in groups)]
    return [
        {"name": k, "weight": own.get(k, row.weight), "own": k in own, "group": k in groups} for k in keys
    ]


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


def _block(name: str, value: Any) -> tuple[str, float | None]:
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not isinstance(value[0], str)
        or not value[0].strip()
    ):
        raise ConfigError(
            f"{name}: {value!r} is no block. Give its name and its weight, such as down.1 and 0.5."
        )
    return value[0].strip(), None if value[1] is None else _weight(f"{name}, {value[0]}", value[1])


def _other(value: Any) -> tuple[str, Any]:
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[0], str):
        raise ConfigError(
            f"The other mix and a place between the two, 0 to 1, were expected; {value!r} came."
        )
    return value[0], value[1]


def _weight(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{name}: {value!r} is no weight. Give a number, such as 0.8.")
    if abs(value) > WIDEST:
        raise ConfigError(f"{name}: {value:g} is outside -{WIDEST:g} to {WIDEST:g}.")
    return float(value)
