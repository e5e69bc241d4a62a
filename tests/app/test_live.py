"""What the page asks and says: only what is new is sent, and what is no change is refused in a sentence."""

from __future__ import annotations

import json
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
from app.memory import Fade, Row
from app.session import Session
from lora_core.mix import AdapterWeight
from trainers import presets
from trainers.run_folder import RunFolder


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


def test_the_finer_weights_of_a_row_arrive_and_are_seen(app: App) -> None:
    def row() -> dict[str, Any]:
        shown: dict[str, Any] = app.client.post("/loom/news", json={}).json()["rows"][1][0]
        return shown

    for change in ({"block": ["down.1", 0.3]}, {"block": ["mid", 0]}, {"curve": "0:1; 0.5 : 0.2,"}):
        assert app.client.post("/loom/row", json={"name": "ink", **change}).json() == {}
    app.client.post("/loom/row", json={"name": "ink", "half": "conditional"})
    app.client.post("/loom/row", json={"name": "ink", "text": 0.5})
    assert app.session.rows["ink"].worn == AdapterWeight(
        1.0, 0.5, 0.5, (("down.1", 0.3), ("mid", 0.0)), ((0.0, 1.0), (0.5, 0.2)), "conditional"
    )
    shown = row()
    assert shown["set"] == ["text 0.5", "down.1 0.3", "mid 0", "curve 0:1, 0.5:0.2", "prompt alone"]
    assert (shown["curve"], shown["points"]) == ("0:1, 0.5:0.2", [[0, 1], [0.5, 0.2]])
    lines = {line["name"]: (line["weight"], line["own"]) for line in shown["blocks"]}
    assert lines == {"down": (1, False), "mid": (0, True), "up": (1, False), "down.1": (0.3, True)}
    app.client.post("/loom/row", json={"name": "ink", "block": ["down.1", None]})
    assert dict(app.session.rows["ink"].blocks) == {"mid": 0}
    app.client.post("/loom/row", json={"name": "ink", "plainly": True})
    assert app.session.rows["ink"].worn == AdapterWeight()
    assert row()["set"] == []


def test_blocks_stand_in_the_order_of_the_model(app: App) -> None:
    app.session.blocks = ["down", "down.0", "down.1", "down.10", "mid", "up"]
    for key in (r"attn2\.to_k", "down.10", "up.res", "down.1.attn"):
        app.client.post("/loom/row", json={"name": "ink", "block": [key, 0.5]})
    (row,) = rows_data(app.session)
    order = ["down", "down.1.attn", "down.10", "mid", "up", "up.res", r"attn2\.to_k"]
    assert [line["name"] for line in row["blocks"]] == order
    assert [line["group"] for line in row["blocks"]] == [line in ("down", "mid", "up") for line in order]


def test_what_is_done_to_mixes_arrives(app: App) -> None:
    def post(**said: Any) -> str:
        answer = app.client.post("/loom/mix", json=said).json()
        return str(answer.get("problem", ""))

    assert post(name="soft", save=True) == ""
    app.client.post("/loom/row", json={"name": "ink", "weight": 0.5})
    assert post(name="", save=True) == ""  # named for its LoRA
    assert [saved.name for saved in app.session.mixes.all()] == ["ink", "soft"]
    assert post(name="soft", wear=True) == ""
    assert app.session.rows["ink"].weight == 1
    assert post(name="soft", fade=["ink", 0.25]) == ""
    assert app.session.rows["ink"].weight == 0.875
    assert app.session.wanted.fade == Fade("soft", "ink", 0.25)
    assert post(name="ink", choose=["soft", 0.25]) == ""
    assert app.session.rows["ink"].weight == 0.875
    assert post(name="soft", remove=True) == ""
    assert "Did you mean" not in post(name="soft", wear=True)
    assert post(name="", restore=True) == ""
    assert post(name="soft", wear=True) == ""
    for said, words in (
        ({"name": "soft", "fade": ["ink", 1.5]}, "from 0, the first mix, to 1"),
        ({"name": "soft", "fade": ["ink", "half"]}, "from 0, the first mix, to 1"),
        ({"name": "soft", "fade": "ink"}, "The other mix and a place"),
        ({"name": "sofd", "fade": ["ink", 0.5]}, 'Did you mean "soft"'),
        ({"name": "soft", "burn": True}, "one of save, wear, before, remove, restore, fade, choose"),
    ):
        assert words in post(**said)
    assert app.session.rows["ink"].weight == 1


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"name": "ink", "weight": "heavy"}, "'heavy' is no weight"),
        ({"name": "ink", "weight": True}, "no weight"),
        ({"name": "ink", "weight": None}, "no weight"),
        ({"name": "ink", "weight": 10.5}, "outside -10 to 10"),
        (
            {"name": "ink", "file": "/etc/passwd"},
            "one of on, weight, text, block, curve, half, plainly, solo, remove",
        ),
        ({"name": "ink", "block": "down.1"}, "is no block"),
        ({"name": "ink", "block": [" ", 1]}, "is no block"),
        ({"name": "ink", "block": ["down.1", "much"]}, "'much' is no weight"),
        ({"name": "ink", "block": ["down.1", 11]}, "outside -10 to 10"),
        ({"name": "ink", "block": ["(", 1]}, "neither a block name nor a regular expression"),
        ({"name": "ink", "curve": "0-1"}, "“0-1” is no point of a curve: it has no colon"),
        ({"name": "ink", "curve": "0:1, 0.5:much"}, "“0.5:much” is no point"),
        ({"name": "ink", "curve": "0.5:1, 0.2:1"}, "must increase"),
        ({"name": "ink", "curve": "0:1, 2:1"}, "1 is the last"),
        ({"name": "ink", "curve": "0:nan"}, "not a finite number"),
        ({"name": "ink", "half": "left"}, "both, conditional"),
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


def test_reports_of_runs_are_pages_and_nothing_else_of_them_is(app: App, tmp_path: Path) -> None:
    output = json.dumps(str(tmp_path / "runs"))
    folder = RunFolder.create(presets.load("demo", ["name=fox", f"output={output}"]))
    assert app.client.get("/loom/report/fox").status_code == 404
    folder.page.write_text("<h1>fox</h1>")
    answer = app.client.get("/loom/report/fox")
    assert (answer.text, answer.headers["content-type"]) == ("<h1>fox</h1>", "text/html; charset=utf-8")
    for name in ("cat", "..", "fox%2Fpreset.toml", "..%2Fruns%2Ffox"):
        assert app.client.get(f"/loom/report/{name}").status_code == 404
    folder.page.unlink()
    folder.page.symlink_to(folder.preset)
    assert app.client.get("/loom/report/fox").status_code == 404
    assert app.client.get("/loom/look").status_code == 404
    assert app.client.post("/loom/run", json={"name": "fox", "show": True}).json() == {}
    assert (
        "There is no run"
        in app.client.post("/loom/run", json={"name": "cat", "show": True}).json()["problem"]
    )
    assert app.client.post("/loom/run", json={"name": "fox", "remove": True}).status_code == 400
