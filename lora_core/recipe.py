"""A recipe: everything one call for pictures needs, as TOML or as flags, and the making of it.

base = "demo"
prompt = "a zxq animal on a blue background"
seed = 3
weights = [0, 0.5, 1]          # one picture per factor, side by side; leave out for `count` pictures

[loras]
"runs/demo/demo.safetensors" = 0.8

Or a contact sheet, in place of `weights` and `count`:

sheet = "loras"                # a row per LoRA, worn alone; or "seeds": a row per seed, with all LoRAs
sheet_weights = [0, 0.5, 1]    # a column each: the LoRA's weight; or, with "seeds", the factor on all weights
sheet_seeds = [1, 2, 3]        # the rows of "seeds"; left out, three that begin with `seed`
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from PIL import Image

from lora_core.contact_sheet import Cell, cells_of_loras, cells_of_seeds, checked, rendered, sheet
from lora_core.errors import ConfigError, LoraError, did_you_mean
from lora_core.generation import GenerationRequest, free_name, save_png, settled
from lora_core.mix import AdapterWeight, WeightValue, split_weight
from lora_core.pipeline import LivePipeline
from lora_core.prompt_tags import split_tags
from lora_core.safe_files import write_atomic

SHEETS = ("loras", "seeds")
SHEET_WEIGHTS = (0.0, 0.5, 1.0)
_LISTS = ("weights", "sheet_weights", "sheet_seeds")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    base: str = "demo"
    quantize: str | None = None  # "nf4", "int8" or "fp8": the base in fewer bits
    prediction: str | None = (
        None  # "epsilon" or "v_prediction": what the base's UNet predicts, if it says otherwise
    )
    prompt: str = ""
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 25
    guidance: float = 7.5
    count: int = 1
    sampler: str | None = None
    width: int | None = None
    height: int | None = None
    loras: dict[str, WeightValue] = field(default_factory=dict)
    weights: tuple[float, ...] = ()
    sheet: str | None = None
    sheet_weights: tuple[float, ...] = ()
    sheet_seeds: tuple[int, ...] = ()
    fuse: bool = False
    out: Path = Path("outputs")

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """From TOML; LoRA paths are relative to the recipe's own folder. Unknown keys are a ConfigError."""
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as problem:
            raise ConfigError(
                f"The recipe {path} cannot be read: {problem.strerror}. Check the path."
            ) from problem
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
            raise ConfigError(f"The recipe {path} is not TOML: {problem}.") from problem
        known = [f.name for f in fields(cls)]
        for key in table:
            if key not in known:
                raise ConfigError(f'{path.name}: "{key}" is no part of a recipe.{did_you_mean(key, known)}')
        loras = table.get("loras", {})
        if not isinstance(loras, dict):
            raise ConfigError(f'{path.name}: [loras] must be a table, such as "cat.safetensors" = 0.8.')
        table["loras"] = {str(path.parent / name): weight for name, weight in loras.items()}
        for name in _LISTS:
            if not isinstance(table.setdefault(name, []), list):
                raise ConfigError(f"{path.name}: {name} must be a list, such as {name} = [0, 1, 2].")
            table[name] = tuple(table[name])
        if "out" in table:
            table["out"] = Path(table["out"])
        return cls(**table)

    def with_flags(self, flags: Mapping[str, Any]) -> Recipe:
        """The recipe with every flag that was given; --lora adds to its LoRAs."""
        given = {
            f.name: flags[f.name] for f in fields(self) if flags.get(f.name) is not None and f.name != "loras"
        }
        given |= {name: tuple(given[name]) for name in _LISTS if name in given}
        loras = {**self.loras, **dict(split_weight(text) for text in flags.get("lora") or ())}
        return replace(self, **given, loras=loras)

    def request(self, mixes: list[Mapping[str, WeightValue]] | None) -> GenerationRequest:
        if not self.prompt.strip():
            raise ConfigError('There is no prompt. Give one, such as --prompt "a cat on a red background".')
        return GenerationRequest(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            seed=self.seed,
            steps=self.steps,
            guidance=self.guidance,
            width=self.width,
            height=self.height,
            count=1 if mixes else self.count,
            sampler=self.sampler,
            mixes=mixes,
        )

    def cells(self) -> list[Cell]:
        """Of its contact sheet; none for a recipe without one. Raises ConfigError."""
        if self.sheet is None:
            for name in ("sheet_weights", "sheet_seeds"):
                if getattr(self, name):
                    raise ConfigError(
                        f'{name} needs a contact sheet: give sheet as well, "loras" or "seeds".'
                    )
            return []
        if self.sheet not in SHEETS:
            raise ConfigError(f"sheet = {self.sheet!r} is unknown.{did_you_mean(str(self.sheet), SHEETS)}")
        for name, given in (("weights", self.weights), ("count", self.count != 1), ("fuse", self.fuse)):
            if given:
                raise ConfigError(
                    f"{name} does not go with sheet, whose pictures have a weight each. Leave one of them out."
                )
        if not self.loras:
            raise ConfigError("A contact sheet needs a LoRA to weigh: give --lora FILE.")
        names = {Path(file).stem: weight for file, weight in self.loras.items()}
        weights = self.sheet_weights or SHEET_WEIGHTS
        seed = settled(self.seed)
        if self.sheet == "seeds":
            return cells_of_seeds(self.sheet_seeds or range(seed, seed + 3), names, weights)
        if self.sheet_seeds:
            raise ConfigError('sheet_seeds are the rows of sheet = "seeds"; with "loras", give the one seed.')
        return cells_of_loras(list(names), weights, seed)


def make(recipe: Recipe) -> Iterator[str]:
    """Open the base, wear the LoRAs, make and save the pictures, take the LoRAs off again and prove it.

    Yields one line for each thing done.
    """
    request = recipe.request(None)  # a missing prompt is said before minutes of loading
    names_given = [Path(file).stem for file in recipe.loras]
    for tagged in split_tags(recipe.prompt)[1]:  # likewise
        if tagged not in names_given:
            raise ConfigError(
                f'The prompt names the LoRA "{tagged}". Give its file as well: --lora {tagged}.safetensors'
            )
    cells = recipe.cells()
    if cells:
        checked(request, cells)
    pipe = LivePipeline.open(recipe.base, quantize=recipe.quantize, prediction=recipe.prediction)
    yield f"{pipe.base_name}: {pipe.family.title}"
    yield from pipe.opened.notes if pipe.opened else ()
    names: dict[str, WeightValue] = {}
    for file, weight in recipe.loras.items():
        name = Path(file).stem
        if name in names:
            raise LoraError(f'Two LoRAs are called "{name}": rename one of the files.')
        coverage = pipe.load(file, name=name, weight=weight)
        names[name] = weight
        yield f"{name} at {weight}: {coverage}"
    if recipe.weights:
        if not names:
            raise ConfigError("weights need a LoRA to weigh: give --lora FILE.")
        full = {name: AdapterWeight.parse(name, weight) for name, weight in names.items()}
        request = recipe.request(
            [{n: w.scaled(factor).plain for n, w in full.items()} for factor in recipe.weights]
        )
    elif recipe.fuse:
        pipe.fuse()
        yield "fused into the base weights"
    folder = recipe.out
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for picture in rendered(pipe, request, cells) if cells else pipe.generate(request):
        path = free_name(folder, picture)
        save_png(picture, path)
        pictures.append(picture)
        yield f"{path} (seed {picture.seed}{f', {picture.weights}' if picture.weights else ''})"
    if cells or len(pictures) > 1:
        columns = len(recipe.sheet_weights or SHEET_WEIGHTS)
        page = sheet(pictures, cells, columns) if cells else _strip([p.image for p in pictures])
        path = free_name(folder, pictures[0], "sheet" if cells else "strip")
        write_atomic(path, lambda target: page.save(target, "PNG"))
        yield f"{path} ({'contact sheet' if cells else 'side by side'})"
    if names:
        pipe.unload()
        yield f"unloaded; {pipe.verify_base()}"


def _strip(images: list[Image.Image]) -> Image.Image:
    page = Image.new("RGB", (sum(i.width + 4 for i in images) - 4, images[0].height), "white")
    for position, image in enumerate(images):
        page.paste(image, (position * (images[0].width + 4), 0))
    return page
