"""report.html in the run folder: one file that shows a run, and opens anywhere.

No script, no request: the curves are SVG made here, the pictures are inside, and its own policy forbids the rest. It is
written at each save, so it is there while the run goes on. Folders of the user's disk are cut to their last part.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from lora_core.errors import SaveFailed
from lora_core.safe_writes import write_atomic
from trainers import presets
from trainers.config import TrainConfig
from trainers.curves import Curve, chart
from trainers.events import (
    Continued,
    Emit,
    Failed,
    Finished,
    Interrupted,
    Note,
    Paused,
    Preview,
    Reported,
    Saved,
    Started,
    TrainEvent,
    duration,
    size,
)
from trainers.run_folder import RunFolder
from trainers.story import Story

WHEN = (Started, Saved, Preview, Paused, Continued, Finished, Reported, Interrupted, Failed)
MOST_PREVIEWS = 16  # of one prompt, spread evenly over the run
PREVIEW_SIDE = 256
SHEET_SIDE = 2400
STYLE = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STATES = {
    "starting": "getting ready",
    "running": "running",
    "paused": "paused",
    "finished": "finished",
    "stopped": "stopped, and can be resumed",
    "failed": "failed",
}


class ReportPage:
    """A listener that keeps the page up to date. What cannot be written is said once, and the training goes on."""

    def __init__(self, folder: RunFolder, config: TrainConfig, say: Emit) -> None:
        self.folder, self.config, self._say = folder, config, say
        self._story = Story(folder, steps=config.train.steps)
        self._pictures: dict[tuple[Path, int], str] = {}
        self._broken = False

    def __call__(self, event: TrainEvent) -> None:
        if not isinstance(event, WHEN):
            return
        self._story.read_on()
        text = page(self._story, self.config, self._picture)
        try:
            write_atomic(self.folder.page, lambda partial: _write_text(partial, text))
        except SaveFailed as problem:
            if not self._broken:
                self._broken = True
                self._say(Note(text=f"The report is not kept up to date; the training goes on. {problem}"))

    def _picture(self, path: Path, side: int) -> str:
        """As a data URI, empty where there is none (any longer). Made once."""
        if (path, side) not in self._pictures:
            found = data_uri(path, side)
            if not found or path.name == "sheet.png":  # not there yet, or made anew by a run that is resumed
                return found
            self._pictures[path, side] = found
        return self._pictures[path, side]


def data_uri(path: Path, side: int) -> str:
    """The picture inside the page, at most `side` pixels long."""
    try:
        with Image.open(path) as picture:
            small = picture.convert("RGB")
    except (OSError, ValueError):
        return ""
    small.thumbnail((side, side))
    packed = io.BytesIO()
    small.save(packed, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(packed.getvalue()).decode()}"


def page(story: Story, config: TrainConfig, picture: Callable[[Path, int], str]) -> str:
    """The whole page. Every word that is not ours is escaped."""
    name = escape(story.folder.root.name)
    parts = [
        _head(story, config),
        _error(story),
        _tiles(story),
        _curves(story),
        _sheet(story, picture),
        _previews(story, picture),
        _figures(story),
        _settings(story, config),
        _notes(story),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{name} – LoRA Loom</title>\n<style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(filter(None, parts))
        + "\n</main></body></html>\n"
    )


def _head(story: Story, config: TrainConfig) -> str:
    facts = story.started
    if facts:
        words = [base_name(facts["base"]), facts["family"], facts["device"], f"base in {facts['dtype']}"]
    else:
        words = [base_name(config.base)]
    said = datetime.fromtimestamp(story.last_said, UTC).astimezone() if story.last_said else None
    when = f"<p class=when>As of {said:%Y-%m-%d %H:%M}</p>" if said else ""
    state = f'<span class="state {story.state}">{escape(STATES[story.state])}</span>'
    return (
        f"<header><h1>{escape(story.folder.root.name)} {state}</h1>"
        f"<p>{' · '.join(map(escape, words))}</p>{when}</header>"
    )


def _error(story: Story) -> str:
    return (
        f'<section class="error"><p>{escape(_shared(story, story.error))}</p></section>'
        if story.error
        else ""
    )


def _tiles(story: Story) -> str:
    facts = story.started
    tiles = [("step", f"{story.step:,} of {story.steps:,}")]
    if story.losses:
        tiles.append(("loss, smoothed", f"{story.losses[-1][2]:.4f}"))
    if story.seconds:
        tiles.append(("time", duration(story.seconds)))
    if story.state == "running" and story.eta_s:
        tiles.append(("left", duration(story.eta_s)))
    if facts:
        tiles += [
            ("trained", f"{facts['trainable']:,} weights"),
            ("layers", f"{facts['layers']:,}"),
            ("pictures", _count(facts)),
        ]
    if story.preflight:
        tiles.append(("memory at its height", size(story.preflight["memory"])))
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in tiles)
    return f"<dl class=tiles>{cells}</dl>"


def _count(facts: Mapping[str, Any]) -> str:
    of_class = f" and {facts['class_images']} of the class" if facts["class_images"] else ""
    return f"{facts['images']}{of_class}"


def _curves(story: Story) -> str:
    raw = [(float(step), loss) for step, loss, _ in story.losses]
    smooth = [(float(step), mean) for step, _, mean in story.losses]
    rates = [(float(step), rate) for step, rate in story.rates]
    end = float(story.steps)
    drawn = [
        chart("Loss", [Curve("each step", raw, "raw"), Curve("smoothed", smooth, "main")], end=end),
        chart("Loss on held-out pictures", [Curve("mean squared error", story.validation, "main")], end=end),
        chart("Drift of what should stay", [Curve("with the LoRA − without", story.drift, "other")], end=end),
        chart("Learning rate", [Curve("of the UNet", rates, "main")], end=end),
    ]
    return _section("Curves", f'<div class="charts">{"".join(drawn)}</div>' if any(drawn) else "")


def _sheet(story: Story, picture: Callable[[Path, int], str]) -> str:
    uri = picture(story.sheet, SHEET_SIDE) if story.sheet else ""
    shown = (
        f'<img class="sheet" alt="The same prompts and seeds without and with the LoRA" src="{uri}">'
        if uri
        else ""
    )
    return _section("Before and after", shown)


def _previews(story: Story, picture: Callable[[Path, int], str]) -> str:
    by_prompt: dict[str, list[tuple[int, Path]]] = {}
    for step, prompt, path in story.previews:
        by_prompt.setdefault(prompt, []).append((step, path))
    rows = []
    for prompt, made in by_prompt.items():
        cells = "".join(
            f'<figure><img alt="{escape(prompt)}, step {step}" src="{uri}">'
            f"<figcaption>step {step:,}</figcaption></figure>"
            for step, path in _spread(made, MOST_PREVIEWS)
            if (uri := picture(path, PREVIEW_SIDE))
        )
        if cells:
            rows.append(f'<h3 dir="auto">{escape(prompt)}</h3><div class="strip" tabindex="0">{cells}</div>')
    return _section("Previews over time", "".join(rows))


def _spread(made: Sequence[tuple[int, Path]], most: int) -> Sequence[tuple[int, Path]]:
    """`most` of them, evenly taken, the first and the last among them."""
    if len(made) <= most:
        return made
    return [made[round(i * (len(made) - 1) / (most - 1))] for i in range(most)]


def _figures(story: Story) -> str:
    plain = {k: v for k, v in story.figures.items() if not isinstance(v, list | dict)}
    return _section(
        "Figures of before and after", _table({k.replace("_", " "): str(v) for k, v in plain.items()})
    )


def _settings(story: Story, config: TrainConfig) -> str:
    lora, train = config.lora, config.train
    alpha = lora.rank if lora.alpha is None else lora.alpha
    batch = f"{train.batch_size}" + (
        f" × {train.gradient_accumulation}" if train.gradient_accumulation > 1 else ""
    )
    short = {
        "kind": f"{lora.kind}{' with DoRA' if lora.variant == 'dora' else ''}, rank {lora.rank}, alpha {alpha:g}",
        "layers": ", ".join(lora.targets),
        "learning rate": f"{train.learning_rate:g}, {train.schedule}, {train.warmup_steps} steps of warm-up",
        "text encoders": f"{train.rate_of('text_encoder'):g}" if train.trains_text_encoder else "not trained",
        "batch": batch,
        "seed": str(config.seed),
    }
    preset = escape(presets.dump(without_folders(config)))
    whole = f"<details><summary>The whole preset</summary><pre>{preset}</pre></details>"
    made = f"<h3>Made with</h3>{_table(story.versions)}" if story.versions else ""
    return _section("Settings", _table(short) + whole + made)


def _notes(story: Story) -> str:
    lines = "".join(f"<li>{escape(_shared(story, note))}</li>" for note in story.notes)
    return _section("Notes", f"<ul>{lines}</ul>" if lines else "")


def _table(rows: Mapping[str, str]) -> str:
    cells = "".join(f"<tr><th scope=row>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in rows.items())
    return f"<table>{cells}</table>" if cells else ""


def _section(title: str, inside: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{inside}</section>" if inside else ""


def _shared(story: Story, text: str) -> str:
    """Without the folder the run lies in: the page may be given to others."""
    return text.replace(str(story.folder.root.parent) + "/", "").replace(str(Path.home()), "~")


def base_name(base: str) -> str:
    """A hub's id as it is, a path by its last part."""
    return base if base.count("/") == 1 and not base.startswith((".", "/", "~")) else Path(base).name


def without_folders(config: TrainConfig) -> TrainConfig:
    """The preset with every path cut to its last part."""

    def cut(table: Any) -> Any:
        names = {k: Path(v.name) for k, v in table if isinstance(v, Path)}
        names |= {k: cut(v) for k, v in table if hasattr(v, "model_copy")}
        names |= {k: tuple(map(cut, v)) for k, v in table if k == "dataset"}
        return table.model_copy(update=names)

    shorter: TrainConfig = cut(config)
    return shorter.model_copy(update={"base": base_name(shorter.base)})


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files may be no Unicode
