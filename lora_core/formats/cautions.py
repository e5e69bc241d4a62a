"""Which programs read a LoRA otherwise than it is meant, once it is written. The facts are those that
tests/lora_core/readers_of_others.py and key_maps_of_others.py state from each program's source, and that diffusers
itself shows; what is not named here, they read as it is meant.

    2 layers are DoRA along inputs: another change is read by diffusers. Bake it to a plain LoRA for these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lora_core.adapter import Adapter
from lora_core.deltas.absolute import Absolute
from lora_core.deltas.full import Full
from lora_core.deltas.glora import Generalized
from lora_core.deltas.ia3 import Scaling
from lora_core.deltas.low_rank import LowRank
from lora_core.deltas.oft import Rotation
from lora_core.formats.writing import Unwrapped, unwrapped

REFUSES, SKIPS, OTHER, NO_BIAS = (
    "the file is refused",
    "they are left out",
    "another change is read",
    "the bias is left out",
)
BAKE = "Bake it to a plain LoRA for these."


@dataclass(frozen=True)
class Caution:
    """`what` is written; `effects`: program -> what it does with that."""

    what: str
    effects: Mapping[str, str]
    remedy: str = BAKE

    def __str__(self) -> str:
        programs: dict[str, list[str]] = {}
        for program, effect in self.effects.items():
            programs.setdefault(effect, []).append(program)
        done = "; ".join(f"{effect} by {_listed(names)}" for effect, names in programs.items())
        return f"{self.what}: {done}. {self.remedy}"


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


@dataclass(frozen=True)
class _Rule:
    """Of layers, by what their change is made of."""

    what: str
    effects: Mapping[str, str]
    applies: Callable[[str, Unwrapped], bool]


def _by_outputs(parts: Unwrapped) -> bool:
    magnitude = parts.magnitude
    return magnitude is not None and not (magnitude.shape[0] == 1 and magnitude.numel() > 1)


def _turn(parts: Unwrapped) -> Rotation | None:
    return parts.change if isinstance(parts.change, Rotation) else None


def _turns_by_blocks_and_more(path: str, parts: Unwrapped) -> bool:
    turn = _turn(parts)
    if turn is None or not turn.skew:
        return False
    return turn.limit > 0 or (turn.rescale is not None and turn.blocks.dim() == 3)


_RULES = (
    _Rule(
        "DoRA along outputs, the paper's axis",
        dict.fromkeys(("A1111", "ComfyUI", "InvokeAI", "diffusers"), OTHER),
        lambda path, parts: _by_outputs(parts) and isinstance(parts.change, LowRank),
    ),
    _Rule(
        "DoRA along inputs",
        {"diffusers": OTHER},
        lambda path, parts: (
            parts.magnitude is not None and not _by_outputs(parts) and isinstance(parts.change, LowRank)
        ),
    ),
    _Rule(
        "DoRA along outputs around another kind",
        {"A1111": OTHER, "ComfyUI": OTHER, "InvokeAI": REFUSES, "diffusers": REFUSES},
        lambda path, parts: _by_outputs(parts) and not isinstance(parts.change, LowRank),
    ),
    _Rule(
        "DoRA along inputs around another kind",
        {"InvokeAI": REFUSES, "diffusers": REFUSES},
        lambda path, parts: (
            parts.magnitude is not None and not _by_outputs(parts) and not isinstance(parts.change, LowRank)
        ),
    ),
    _Rule(
        "with a change of the bias",
        {"A1111": NO_BIAS, "InvokeAI": NO_BIAS, "diffusers": REFUSES},
        lambda path, parts: parts.bias is not None and not isinstance(parts.change, Full | None),
    ),
    _Rule(
        "a change of the bias alone",
        {"A1111": REFUSES, "InvokeAI": REFUSES, "diffusers": REFUSES},
        lambda path, parts: parts.change is None,
    ),
    _Rule(
        "GLoRA",
        {"A1111": SKIPS, "InvokeAI": REFUSES, "diffusers": REFUSES},
        lambda path, parts: isinstance(parts.change, Generalized),
    ),
    _Rule(
        "(IA)³",
        {"ComfyUI": SKIPS, "diffusers": REFUSES},
        lambda path, parts: isinstance(parts.change, Scaling),
    ),
    _Rule(
        "(IA)³ of a convolution's outputs",
        {"A1111": SKIPS, "InvokeAI": REFUSES},
        lambda path, parts: (
            isinstance(parts.change, Scaling) and not parts.change.on_input and len(parts.change.shape()) == 4
        ),
    ),
    _Rule(
        "a whole weight in place of its change",
        dict.fromkeys(("A1111", "InvokeAI", "diffusers"), REFUSES),
        lambda path, parts: isinstance(parts.change, Absolute),
    ),
    _Rule(
        "OFT",
        {"InvokeAI": REFUSES, "diffusers": REFUSES},
        lambda path, parts: _turn(parts) is not None,
    ),
    _Rule("OFT with a limit or a rescale", {"ComfyUI": OTHER}, _turns_by_blocks_and_more),
    _Rule(
        "OFT stored as turns",
        {"ComfyUI": SKIPS},
        lambda path, parts: (turn := _turn(parts)) is not None and not turn.skew,
    ),
    _Rule(
        "LoHa, LoKr or a whole difference",
        {"diffusers": REFUSES},
        lambda path, parts: (
            parts.change is not None
            and parts.magnitude is None
            and not isinstance(parts.change, LowRank | Generalized | Scaling | Rotation | Absolute)
        ),
    ),
    _Rule(
        "norms or embeddings of a text encoder",
        {"A1111": "some of them are left out", "ComfyUI": SKIPS},
        lambda path, parts: path.startswith("text_encoder") and ("norm" in path or "embedding" in path),
    ),
)


def cautions(adapter: Adapter, spelling: str = "kohya") -> tuple[Caution, ...]:
    """What to say of `adapter` in this spelling; () where all programs read it as it is meant."""
    if spelling != "kohya":
        effects = {
            "A1111": "nothing is found",
            "ComfyUI": "the UNet's attention is missed",
            "InvokeAI": REFUSES,
        }
        said = Caution(
            f"The {spelling} spelling is for diffusers and PEFT", effects, "Write kohya's for these."
        )
        return (said,)
    parts = {path: unwrapped(delta) for path, delta in adapter.deltas.items()}
    found = []
    for rule in _RULES:
        count = sum(rule.applies(path, part) for path, part in parts.items())
        if count:
            layers = "1 layer is" if count == 1 else f"{count} layers are"
            found.append(Caution(f"{layers} {rule.what}", rule.effects))
    if adapter.embeddings:
        effects = {"ComfyUI": SKIPS, "InvokeAI": SKIPS, "diffusers": REFUSES}
        remedy = "For diffusers, leave out the keys that begin with bundle_emb."
        found.append(Caution(f"New words ({', '.join(adapter.embeddings)}) are in it", effects, remedy))
    if _alphas_differ(parts):
        remedy = "Write diffusers' spelling for it."
        found.append(Caution("Alphas of the UNet's layers differ", {"diffusers": OTHER}, remedy))
    if lost := _attention_without_output(adapter):
        remedy = "Write diffusers' spelling for it, or train the whole attention."
        found.append(
            Caution(f"{lost} is changed in its attention without out_proj", {"diffusers": REFUSES}, remedy)
        )
    return tuple(found)


def _attention_without_output(adapter: Adapter) -> str | None:
    """diffusers tells the spelling of a text encoder's keys by out_proj, and if there is none, by its mlp."""
    for component in adapter.components():
        layers = [
            path for path in adapter.deltas if path.startswith(f"{component}.") and ".self_attn." in path
        ]
        if component != "unet" and layers and not any(path.endswith(".out_proj") for path in layers):
            return component
    return None


def _alphas_differ(parts: Mapping[str, Unwrapped]) -> bool:
    """diffusers looks its attention layers' own alphas up under old names, and gives them all the commonest one."""
    alphas = {
        path: part.change.alpha
        for path, part in parts.items()
        if path.startswith("unet.") and isinstance(part.change, LowRank)
    }
    return len(set(alphas.values())) > 1 and any(".to_" in path for path in alphas)
