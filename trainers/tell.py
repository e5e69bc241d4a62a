"""`launch.py --tell RUN ORDER...`: the words of a terminal, told to the training in a run folder.

pause  continue  save  stop  steps=1200  sample="a prompt"  sample="a prompt@0.8" (the weight of the LoRA)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_core.errors import ConfigError, LoraError, did_you_mean
from trainers.control import Commands, Sample, check_steps
from trainers.run_folder import RunFolder

_WEIGHT = re.compile(r"(.*)@(-?\d*\.?\d+)", re.DOTALL)
Order = tuple[Callable[[Commands], None], str]  # and the sentence that says it was passed on


def tell(run: Path, words: Sequence[str]) -> list[str]:
    """Pass the orders on, all of them or, where one cannot be understood, none -> a sentence for each.

    Raises ConfigError for such a word, LoraError if no training is at work in `run`.
    """
    if not words:
        raise ConfigError(f"Say what {run.name} is to do: {', '.join(_KNOWN)}.")
    orders = [understood(word) for word in words]
    if not RunFolder(run, run.name).busy():  # the folder of orders outlives a process that was killed
        raise LoraError(
            f"No training is at work in {run}: it is over, or has not begun. Resume it, or name another."
        )
    commands = Commands(run.absolute())
    for act, _ in orders:
        act(commands)
    return [sentence for _, sentence in orders]


def understood(word: str) -> Order:
    name, equals, value = word.partition("=")
    if not equals and name in _PLAIN:
        return _PLAIN[name]
    if equals and name == "steps":
        if not re.fullmatch(r"\s*\d{1,20}\s*", value):
            raise ConfigError(f"steps={value[:40]} must be a number, such as steps=1200.")
        wanted = int(value)
        check_steps(wanted)
        return (lambda c: c.steps(wanted)), f"It is to have {wanted:,} steps."
    if equals and name == "sample":
        match = _WEIGHT.fullmatch(value)
        prompt, weight = (match[1].strip(), float(match[2])) if match else (value, 1.0)
        Sample(prompt, weight)  # is refused here, before any other order is given
        return (
            lambda c: c.sample(prompt, weight=weight)
        ), f"A picture is made at weight {weight:g}: {prompt}"
    if name in ("steps", "sample"):
        raise ConfigError(f"{name} needs a value: {next(k for k in _KNOWN if k.startswith(name))}.")
    raise ConfigError(f'"{word}" is nothing that a training can be told.{did_you_mean(name, _KNOWN)}')


_PLAIN: dict[str, Order] = {
    "pause": (Commands.pause, "It pauses after the step it is at."),
    "continue": (Commands.unpause, "It goes on."),
    "save": (Commands.save, "It saves after the step it is at."),
    "stop": (Commands.stop, "It saves and stops after the step it is at."),
}
_KNOWN = (*_PLAIN, "steps=1200", 'sample="a prompt@0.8"')
