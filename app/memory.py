"""What the user wants, and the small file it is kept in: a reload, a second tab and a restart find it again."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from app.plan import Plan
from lora_core.errors import ConfigError, LoraError
from lora_core.generation import GenerationRequest
from lora_core.mix import AdapterWeight, Curve, WeightValue
from lora_core.safe_files import write_atomic
from trainers.presets import list_presets


@dataclass(frozen=True)
class Row:
    """One LoRA of the mixer.

    text, text_2         the text encoders' own weights; None where the first follows `weight`, the second the first
    blocks, curve, half  as `AdapterWeight` has them
    aside                why the base that is open cannot wear it, empty if it does
    """

    name: str
    file: str
    weight: float = 1.0
    text: float | None = None
    text_2: float | None = None
    blocks: tuple[tuple[str, float], ...] = ()
    curve: Curve = ()
    half: Literal["both", "conditional"] = "both"
    on: bool = True
    aside: str = ""
    facts: str = ""
    triggers: tuple[str, ...] = ()

    def changed(self, **changes: Any) -> Row:
        return replace(self, **changes)

    @property
    def worn(self) -> AdapterWeight:
        """Its weights while it is on. Raises ConfigError, whose sentence names the setting."""
        text = self.weight if self.text is None else self.text
        said = {
            "unet": self.weight,
            "text_encoder": text,
            "text_encoder_2": text if self.text_2 is None else self.text_2,
            "blocks": dict(self.blocks),
            "curve": self.curve,
            "half": self.half,
        }
        return AdapterWeight.parse(self.name, said)

    @property
    def value(self) -> WeightValue:
        """As `LivePipeline.set_weights` takes it: whole, so that a block taken away here is taken away there."""
        return self.worn if self.on else 0.0

    def wearing(self, weight: AdapterWeight) -> Row:
        """The row as it is with these weights, and on."""
        text, text_2 = weight.text_encoder, weight.text_encoder_2
        return self.changed(
            weight=weight.unet,
            text=None if text == text_2 == weight.unet else text,
            text_2=None if text_2 == text else text_2,
            blocks=weight.blocks,
            curve=weight.curve,
            half=weight.half,
            on=True,
        )


@dataclass(frozen=True)
class Form:
    """The fields of the Generate tab."""

    prompt: str = "a cat on a blue background"
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 25
    guidance: float = 7.5
    width: int = 0  # 0: the model's own
    height: int = 0
    count: int = 1
    sampler: str = ""  # empty: the model's own

    def changed(self, **changes: Any) -> Form:
        return replace(self, **changes)

    def request(self) -> GenerationRequest:
        """Raises ConfigError, whose sentence names the field."""
        if not self.prompt.strip():
            raise ConfigError("The prompt is empty. Describe a picture, such as: a cat on a red background.")
        return GenerationRequest(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            seed=self.seed,
            steps=self.steps,
            guidance=self.guidance,
            width=self.width or None,
            height=self.height or None,
            count=self.count,
            sampler=self.sampler or None,
        )


@dataclass(frozen=True)
class Fade:
    """The crossfade on the page: two saved mixes by name, and where between them it stands, 0 to 1."""

    a: str = ""
    b: str = ""
    at: float = 0.0


@dataclass
class Wanted:
    base: str = "demo"
    rows: dict[str, Row] = field(default_factory=dict)
    form: Form = field(default_factory=Form)
    fused: bool = False
    auto: bool = False  # fused by itself once the mix has stood still
    solo: str = ""  # the one LoRA that sounds; empty: all do
    fade: Fade = field(default_factory=Fade)
    plan: Plan = field(default_factory=Plan)
    predictions: dict[str, str] = field(default_factory=dict)  # of bases that do not say it: source -> which

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        rows = [_row(row) for row in data.get("rows", [])]
        wanted = cls(
            str(data.get("base", "demo")), {r.name: r for r in rows}, _known(Form, data.get("form", {}))
        )
        wanted.auto = data.get("auto") is True
        wanted.fade = _known(Fade, data.get("fade", {}))
        wanted.plan = _plan(data.get("plan", {}))
        wanted.predictions = {str(k): str(v) for k, v in data.get("predictions", {}).items()}
        return wanted


def _row(data: dict[str, Any]) -> Row:
    """JSON has lists for tuples. What `Row.worn` refuses is refused here: before a model is opened with it."""
    row = _known(Row, data)
    row = row.changed(
        triggers=tuple(row.triggers),
        blocks=tuple((key, weight) for key, weight in row.blocks),
        curve=tuple((progress, factor) for progress, factor in row.curve),
    )
    _ = row.worn
    return row


def _plan(data: dict[str, Any]) -> Plan:
    """A fresh one where its preset is gone: for that nobody's mixer is to be forgotten."""
    plan = _known(Plan, data)
    return plan if plan.preset in {name for name, _, _ in list_presets()} else Plan()


T = TypeVar("T")


def _known(kind: type[T], data: dict[str, Any]) -> T:
    """A later version's file may have fields that this one does not know."""
    names = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{k: v for k, v in data.items() if k in names})


def read_wanted(path: Path) -> Wanted:
    """The last session, or a fresh one; a file that cannot be read is put aside, not written over."""
    try:
        return Wanted.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return Wanted()
    except (OSError, ValueError, TypeError, AttributeError, LoraError):
        if path.exists():
            path.replace(path.with_name(f"{path.stem}-unreadable.json"))
        return Wanted()


def write_wanted(path: Path, wanted: Wanted) -> None:
    text = json.dumps(
        {
            "base": wanted.base,
            "rows": [dataclasses.asdict(row) for row in wanted.rows.values()],
            "form": dataclasses.asdict(wanted.form),
            "auto": wanted.auto,
            "fade": dataclasses.asdict(wanted.fade),
            "plan": dataclasses.asdict(wanted.plan),
            "predictions": wanted.predictions,
        },
        indent=1,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda target: _write(target, text))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
