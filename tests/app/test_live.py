"""What the page asks and says: only what is new is sent, and what is no change of a row is refused with a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from app.draft import Draft
from app.live import Part, pictures_data, routes, rows_data
from app.memory import Row
from app.session import Session


@dataclass
class App:
    session: Session
    draft: Draft
    client: TestClient
    said: list[str]


@pytest.fixture
def app(tmp_path: Path) -> Iterator[App]:
    session = Session(tmp_path / "models", tmp_path / "outputs", tmp_path / "runs", open_now=False)
    session.wanted.rows["ink"] = Row("ink", "ink.safetensors", facts="8 of 8 layers", triggers=("zxq",))
    draft, said = Draft(tmp_path / "datasets"), ["first"]
    parts = {
        "rows": Part(lambda: rows_data(session)),
        "words": Part(lambda: f"<b>{said[-1]}</b>", lambda: said[-1]),
        "gallery": Part(mark=lambda: len(said)),
    }
    server = FastAPI()
    server.include_router(routes(session, draft, parts))
    with TestClient(server) as client:
        yield App(session, draft, client, said)
    session.close()


def test_only_what_is_new_is_sent(app: App) -> None:
    first = app.client.post("/loom/news", json={}).json()
    assert first["words"] == ["first", "<b>first</b>"]
    assert first["gallery"] == ["1", None]
    seen = {name: mark for name, (mark, _) in first.items()}
    assert app.client.post("/loom/news", json=seen).json() == {}
    app.said.append("second")
    again = app.client.post("/loom/news", json=seen).json()
    assert again == {"words": ["second", "<b>second</b>"], "gallery": ["2", None]}


def test_another_server_is_told_apart(app: App) -> None:
    other = FastAPI()
    other.include_router(routes(app.session, app.draft, {}))
    mine = app.client.post("/loom/news", json={}).json()["server"][0]
    with TestClient(other) as client:
        assert client.post("/loom/news", json={"server": mine}).json()["server"][0] != mine


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"weight": 0.4}, "weight", 0.4),
        ({"weight": -10}, "weight", -10.0),
        ({"text": 1.5}, "text", 1.5),
        ({"on": False}, "on", False),
    ],
)
def test_a_change_of_a_row_arrives_and_is_seen(
    app: App, change: dict[str, Any], field: str, value: Any
) -> None:
    assert app.client.post("/loom/row", json={"name": "ink", **change}).json() == {}
    assert getattr(app.session.rows["ink"], field) == value
    assert app.client.post("/loom/news", json={}).json()["rows"][1][0][field] == value
    app.client.post("/loom/row", json={"name": "ink", "text": None})
    assert app.session.rows["ink"].text is None


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"name": "ink", "weight": "heavy"}, "'heavy' is no weight"),
        ({"name": "ink", "weight": True}, "no weight"),
        ({"name": "ink", "weight": None}, "no weight"),
        ({"name": "ink", "weight": 10.5}, "outside -10 to 10"),
        ({"name": "ink", "file": "/etc/passwd"}, "one of on, weight, text, solo, remove"),
        ({"name": "ink", "weight": 1, "on": True}, "one of"),
        ({"weight": 1}, "A name"),
        ({"name": ["ink"], "weight": 1}, "A name"),
    ],
)
def test_what_is_no_change_is_refused_and_changes_nothing(app: App, said: dict[str, Any], words: str) -> None:
    before = app.session.rows["ink"]
    answer = app.client.post("/loom/row", json=said)
    assert answer.status_code == 400
    assert words in answer.json()["problem"]
    assert app.session.rows == {"ink": before}


def test_weights_that_json_cannot_say_are_refused(app: App) -> None:
    answer = app.client.post(
        "/loom/row", content='{"name": "ink", "weight": NaN}', headers={"content-type": "application/json"}
    )
    assert answer.status_code in (400, 422)
    assert app.session.rows["ink"].weight == 1.0


def test_a_row_that_has_gone_is_no_fault(app: App) -> None:
    assert app.client.post("/loom/row", json={"name": "gone", "weight": 0.5}).status_code == 200
    assert set(app.session.rows) == {"ink"}


def test_pictures_are_shown_said_and_taken_out(app: App, tmp_path: Path) -> None:
    name = "a ü#1.png"
    Image.new("RGB", (300, 200), "red").save(tmp_path / name)
    app.draft.add([(tmp_path / name, name)])
    (entry,) = pictures_data(app.draft)
    assert (entry["name"], entry["caption"]) == (name, "")
    small = app.client.get(f"/loom/thumb/{quote(name)}?v={entry['version']}")
    assert small.headers["content-type"] == "image/jpeg"
    assert len(small.content) < 10_000
    assert app.client.get("/loom/thumb/other.png").status_code == 404
    assert app.client.get("/loom/thumb/..%2Fsession.json").status_code == 404
    app.client.post("/loom/picture", json={"name": name, "caption": "a red  field"})
    assert pictures_data(app.draft)[0]["caption"] == "a red field"
    app.client.post("/loom/picture", json={"name": name, "remove": True})
    assert pictures_data(app.draft) == []
    app.client.post("/loom/picture", json={"name": name, "caption": "late"})
    assert not list(app.draft.folder.iterdir())
    assert app.client.post("/loom/picture", json={"name": name, "weight": 1}).status_code == 400
