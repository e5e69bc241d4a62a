"""What the mixer does with whole mixes and with the finer weights of a row. From the page's threads: at once, in a
picture that is being made from the next step on. Only what is not loaded yet waits for the worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.jobs import Job
from app.memory import Fade, Row
from app.wearing import load_rows
from lora_core.errors import ConfigError, FileRefused, LoraError
from lora_core.mix import AdapterWeight, Curve, Mix, check_blocks, crossfade
from lora_core.plain_text import plain

if TYPE_CHECKING:
    from app.session import Session

LONGEST_NAME = 40  # characters of a name that is proposed


# --- one row ------------------------------------------------------------------------------------------------


def change(session: Session, name: str, changed: Callable[[Row], Row]) -> None:
    """Text weight, blocks, curve or half of one row. Raises ConfigError for what the model that is open cannot wear;
    nothing is changed then. A row that has gone meanwhile is no fault."""
    with session.lock:
        row = session.rows.get(name)
        if row is None:
            return
        row = changed(row)
        _check(session, row.name, row.worn)
        session.rows[name] = row
        session.wanted.fused = False
    session.mix_now()
    session.changed()
    if row.aside:  # it may have been this setting that kept it out
        session.load_rows([name])


def with_block(row: Row, key: str, weight: float | None) -> Row:
    """`weight` None: the block follows the main weight again."""
    own = {k: v for k, v in row.blocks if k != key or weight is not None}
    return row.changed(blocks=tuple((own | ({} if weight is None else {key: weight})).items()))


def with_text(row: Row, weight: float | None) -> Row:
    """One slider for both of SDXL's text encoders."""
    return row.changed(text=weight, text_2=None)


def plainly(row: Row) -> Row:
    """With its main weight alone."""
    return row.changed(text=None, text_2=None, blocks=(), curve=(), half="both")


def parse_curve(text: str) -> Curve:
    """ "0:1, 0.6:1, 1:0" -> its points; "" is none. Raises ConfigError; `AdapterWeight` checks the numbers."""
    points = []
    for part in filter(None, (part.strip() for part in text.replace(";", ",").split(","))):
        progress, found, factor = part.partition(":")
        try:
            points.append((float(progress), float(factor)))
        except ValueError as problem:
            raise ConfigError(
                f"“{plain(part)}” is no point of a curve{'' if found else ': it has no colon'}. Write how far the "
                "picture is and the factor there, as 0:1, 0.6:1, 1:0 (full until 0.6 of the way, then fading out)."
            ) from problem
    return tuple(points)


def curve_text(curve: Curve) -> str:
    return ", ".join(f"{progress:.4g}:{factor:.4g}" for progress, factor in curve)


def details(weight: AdapterWeight) -> list[str]:
    """What is set besides the main weight, in words."""
    texts = [f"{weight.text_encoder:.3g}"]
    if weight.text_encoder_2 != weight.text_encoder:
        texts.append(f"{weight.text_encoder_2:.3g}")
    text = [] if weight.text_encoder == weight.text_encoder_2 == weight.unet else [f"text {'/'.join(texts)}"]
    blocks = [f"{plain(key, 24)} {value:.3g}" for key, value in weight.blocks]
    if len(blocks) > 3:
        blocks = [*blocks[:2], f"{len(blocks) - 2} more blocks"]
    curve = [f"curve {curve_text(weight.curve)}"] if weight.curve else []
    return [*text, *blocks, *curve, *(["prompt alone"] if weight.half == "conditional" else [])]


def in_words(mix: Mix) -> str:
    """ink 0.8 (down.1 0.3), glow 1"""
    parts = []
    for name, weight in mix.items():
        more = "; ".join(details(weight))
        parts.append(f"{plain(name)} {weight.unet:.3g}" + (f" ({more})" if more else ""))
    return ", ".join(parts)


# --- whole mixes --------------------------------------------------------------------------------------------


def heard(session: Session) -> Mix:
    """What sounds: the rows that are on, and only the one that is played alone."""
    with session.lock:
        solo = session.wanted.solo
        return {n: row.worn for n, row in session.rows.items() if row.on and solo in ("", n)}


def proposed_name(session: Session) -> str:
    """The LoRAs' names, and a number if there is such a mix already."""
    words = plain(" + ".join(name.rpartition("/")[2] for name in heard(session)), LONGEST_NAME)
    taken = {saved.name.casefold() for saved in session.mixes.all()}
    number, name = 1, words
    while name.casefold() in taken:
        number += 1
        name = f"{words} {number}"
    return name


def save(session: Session, name: str) -> None:
    """What sounds, under this name; an empty one is made of the LoRAs' names."""
    mix = heard(session)
    if not mix:
        raise LoraError("There is no LoRA in this mix to save. Drop one onto the page, or turn one on.")
    files = {n: _below(session, session.rows[n].file) for n in mix}
    session.mixes.save(
        name if name.strip() else proposed_name(session), mix, {n: f for n, f in files.items() if f}
    )
    session.changed()


def wear(session: Session, name: str) -> None:
    """The saved mix and nothing else: other LoRAs stay in the mixer, off. What is not loaded is loaded from the
    library. Raises LoraError that names what is missing, and why; the rest is worn."""
    saved = session.mixes.find(name)
    _said(put_on(session, saved.mix, saved.files), f'Not all of "{saved.name}" can be worn.')


def wear_before(session: Session) -> None:
    """What sounded before another mix took its place."""
    _said(put_on(session, session.before), "Not all of it can be worn.")


def fade(session: Session, a: str, b: str, at: float) -> None:
    """`at` of the way from mix `a` to mix `b`. Raises LoraError for mixes that cannot be faded; that LoRAs are missing
    is said when it begins, and not again at every point of the way."""
    first, second = session.mixes.find(a), session.mixes.find(b)
    mixed = crossfade(first.mix, second.mix, at)
    begins = (session.wanted.fade.a, session.wanted.fade.b) != (a, b) or session.put != heard(session)
    session.wanted.fade = Fade(a, b, float(at))
    problems = put_on(session, mixed, {**second.files, **first.files})
    if begins:
        _said(problems, "Not all of these mixes can be worn.")


def choose_fade(session: Session, a: str, b: str) -> None:
    """Nothing is heard of it until the slider is moved."""
    session.wanted.fade = Fade(a, b, session.wanted.fade.at)
    session.changed()


def keep_before(session: Session) -> None:
    """Whatever takes the place of weights set by hand remembers them."""
    now = heard(session)
    if now and now != session.put:
        session.before = now


def put_on(session: Session, mix: Mix, files: Mapping[str, str] | None = None) -> list[str]:
    """Make `mix` what sounds -> why some of it does not, in sentences. Other rows are turned off."""
    problems: list[str] = []
    with session.lock:
        keep_before(session)
        worn: dict[str, Row] = {}
        for name, weight in mix.items():
            try:
                row = _row(session, name, (files or {}).get(name, ""))
                _check(session, row.name, weight)
            except LoraError as problem:
                problems.append(str(problem))
                continue
            worn[row.name] = row.wearing(weight)
            if row.aside:
                problems.append(f"{row.name} is set aside: {row.aside}")
        new = [name for name in worn if name not in session.rows]
        for name, row in session.rows.items():
            session.rows[name] = worn.pop(name, row.changed(on=False))
        session.rows.update(worn)
        session.wanted.solo, session.wanted.fused = "", False
        session.put = heard(session)
    session.mix_now()
    session.changed()
    if new:
        session.load_rows(new)
    return problems


def load(session: Session, names: list[str], job: Job) -> str:
    """The rows of these names onto the model, with the weights they have by then."""
    said, problems = load_rows(session, session.ready(job), names)
    session.changed()
    if problems:
        raise LoraError("\n".join([*problems, *said]))
    return "\n".join(said) or f"Worn: {', '.join(names)}."


# --- what the page shows ------------------------------------------------------------------------------------


def mixes_data(session: Session) -> dict[str, Any]:
    now, before = heard(session), session.before
    saved = session.mixes.all()
    names = [found.name for found in saved if not found.problem]
    fade = session.wanted.fade
    a = fade.a if fade.a in names else next((n for n in names if n != fade.b), "")
    b = fade.b if fade.b in names else next((n for n in names if n != a), "")
    return {
        "sounds": bool(now),
        "proposed": proposed_name(session),
        "saved": [
            {
                "name": found.name,
                "what": in_words(found.mix),
                "problem": found.problem,
                "worn": bool(now) and now == found.mix,
            }
            for found in saved
        ],
        "before": in_words(before) if before != now else "",
        "deleted": session.mixes.deleted,
        "fade": {"names": names, "a": a, "b": b, "at": fade.at},
    }


# --- helpers ------------------------------------------------------------------------------------------------


def _row(session: Session, name: str, file: str) -> Row:
    """The row of a saved mix's LoRA: by its file, which may have another name by now, else by its name; from the
    library if it is not in the mixer. Raises LoraError."""
    path = session.library.lora_folder / file
    for row in session.rows.values():
        if row.name == name or (file and Path(row.file) == path):
            return row
    found = next((lora for lora in session.library.loras() if file and lora.path == path), None)
    found = found or session.library.find(name)
    if found.problem:
        raise FileRefused(f"{found.name}: {found.problem}")
    return Row(name=found.name, file=str(found.path), triggers=found.triggers)


def _below(session: Session, file: str) -> str:
    """A LoRA's file as a path below the library's folder: the folder may be moved, with everything in it."""
    path = Path(file)
    folder = session.library.lora_folder
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else ""


def _check(session: Session, name: str, weight: AdapterWeight) -> None:
    pipe = session.pipe
    if pipe is not None:
        check_blocks(name, weight, pipe.unet_paths)


def _said(problems: list[str], what: str) -> None:
    if problems:
        raise LoraError(" ".join([what, *problems]))
