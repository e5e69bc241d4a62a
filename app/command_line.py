"""What may be said on the command line: one command, and the options that belong to it.

Each command has a parser of its own, so that `launch.py --resize --help` shows its options and no others, and an option
of another command is refused and not ignored. Nothing here loads torch or gradio: --help is instant.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from app import command_options as options
from app import file_options
from lora_core.errors import ConfigError, did_you_mean

EXIT_CODES = """\
exit codes: 0 done, 1 failed (the reason is on stderr), 2 wrong usage or refused to start,
            3 another process holds this run, 130 interrupted (a training: and saved)
"""


@dataclass(frozen=True)
class Command:
    """`home`: of a command on files, its class in lora_core; the others are functions of launch.py."""

    flag: str
    words: str
    does: str
    add: Callable[[argparse.ArgumentParser], None]
    examples: tuple[str, ...] = ()
    home: str = ""

    @property
    def name(self) -> str:
        return self.flag or "the app"


APP = Command(
    "",
    "",
    "Train Stable Diffusion LoRAs, and wear them at any weight, in the browser or from here.",
    options.app,
)
GROUPS: dict[str, tuple[Command, ...]] = {
    "training": (
        Command(
            "--train",
            "PRESET",
            "train the LoRA a preset describes",
            options.train,
            (
                "--train presets/demo.toml",
                "--train presets/sd15_subject.toml --set data.images=photos --set train.steps=1200",
                "--train --resume runs/fox",
            ),
        ),
        Command(
            "--preflight",
            "PRESET",
            "what a training would need: memory, time and disk, and what speaks against it; done before each too",
            options.preflight,
            ("--preflight presets/sdxl_subject.toml --set data.images=photos",),
        ),
        Command(
            "--look",
            "PRESET",
            "show what a preset's training would be fed, and what is odd about it, as a page",
            options.look,
            ("--look presets/sd15_subject.toml --set data.images=photos",),
        ),
        Command(
            "--tell",
            "RUN ORDER ...",
            "tell a training in its folder to pause, continue, save, sample or stop",
            options.tell,
            ("--tell runs/fox pause", '--tell runs/fox steps=1200 sample="a fox on the moon@0.8"'),
        ),
        Command(
            "--import-preset",
            "FILE",
            "a preset out of another trainer's settings; what cannot be carried over is named",
            options.import_preset,
            ("--import-preset kohya.toml --out fox.toml",),
        ),
        Command("--list-presets", "", "the presets that come with LoRA Loom", options.list_presets),
        Command(
            "--list-settings",
            "[TABLE]",
            "every setting of a preset, with its default and its meaning",
            options.list_settings,
            ("--list-settings train",),
        ),
    ),
    "pictures": (
        Command(
            "--generate",
            "[RECIPE]",
            "make pictures from a recipe or from flags",
            options.generate,
            (
                '--generate --prompt "a zxq animal on a blue background" --lora runs/demo/demo.safetensors:0.8',
                '--generate --prompt "..." --lora cat.safetensors --weights 0 0.5 1',
                '--generate --prompt "..." --lora cat.safetensors --lora ink.safetensors --sheet loras',
            ),
        ),
    ),
    "files": (
        Command(
            "--inspect",
            "FILE ...",
            "what lies in files and folders: family, layers, ranks, words, duplicates",
            file_options.inspect,
            (
                "--inspect ink.safetensors",
                "--inspect models/Lora --json --hash",
            ),
            "lora_core.commands.looked:Inspect",
        ),
        Command(
            "--convert",
            "IN OUT",
            "another spelling of a LoRA, another dtype, or every kind as a plain LoRA",
            file_options.convert,
            (
                "--convert ink.safetensors ink_peft --to peft",
                "--convert dora.safetensors plain.safetensors --to kohya --bake --base sd15.safetensors --dtype fp16",
            ),
            "lora_core.commands.loras:Convert",
        ),
        Command(
            "--combine",
            "FILE[:WEIGHT] ...",
            "several LoRAs into one",
            file_options.combine,
            (
                "--combine ink.safetensors:0.7 cat.safetensors:-0.3 --out both.safetensors",
                "--combine ink.safetensors cat.safetensors --method ties_svd --density 0.5 --out both.safetensors",
            ),
            "lora_core.commands.loras:Combine",
        ),
        Command(
            "--resize",
            "IN",
            "a LoRA of another rank",
            file_options.resize,
            (
                "--resize ink.safetensors --rank 16 --out small.safetensors",
                "--resize dora.safetensors --energy 0.95 --base sd15.safetensors --out small.safetensors",
            ),
            "lora_core.commands.loras:Resize",
        ),
        Command(
            "--extract",
            "BASE TUNED",
            "a LoRA out of a fine-tuned model and the one it was made from",
            file_options.extract,
            (
                "--extract sd15.safetensors my-dreambooth --rank 32 --out dreambooth.safetensors",
                "--extract sd15.safetensors tuned.safetensors --energy 0.9 --targets attention --out some.safetensors",
            ),
            "lora_core.commands.models:Extract",
        ),
        Command(
            "--bake",
            "MIX ...",
            "a model of its own with LoRAs in it",
            file_options.bake,
            (
                "--bake ink.safetensors:0.8 cat.safetensors:0.4 --base sd15.safetensors --out sd15-ink.safetensors",
                '--bake "models/Mixes/soft ink.toml" --base sd15.safetensors --dtype fp16 --out soft-ink',
            ),
            "lora_core.commands.models:Bake",
        ),
    ),
    "help": (
        Command(
            "--doctor",
            "",
            "what is installed, and what is wrong with it; say this where you ask for help",
            options.doctor,
            ("--doctor", "--doctor --json"),
        ),
    ),
}
COMMANDS = tuple(command for group in GROUPS.values() for command in group)


def parse(words: Sequence[str]) -> tuple[Command, argparse.Namespace]:
    """The command that is named, the app where none is, and its options. ConfigError for words that make no sense;
    --help prints and leaves."""
    before = list(words[: words.index("--")] if "--" in words else words)
    named = {word.partition("=")[0] for word in before}
    commands = [command for command in COMMANDS if command.flag in named]
    # --convert has an option --bake
    inner = {option for command in commands for option in _options_of(command) if option != command.flag}
    chosen = [command for command in commands if command.flag not in inner]
    if len(chosen) > 1:
        raise ConfigError(f"Choose one of {' and '.join(command.flag for command in chosen)}.")
    command = chosen[0] if chosen else APP
    parser = parser_of(command)
    if named & {"-h", "--help"}:  # before what it stands behind asks for its value
        parser.print_help()
        raise SystemExit(0)
    own = _options_of(command)
    strange = [word for word in before if word.startswith("--") and word.partition("=")[0] not in own]
    if not strange:  # argparse would rather complain of what a misspelt word leaves missing
        args, strange = parser.parse_known_args(words)
    if strange:
        raise ConfigError(_refused(command, strange))
    return command, args


def parser_of(command: Command) -> argparse.ArgumentParser:
    parser = _Parser(
        command,
        prog=f"python launch.py {command.flag}".strip(),
        usage=None if command is APP else argparse.SUPPRESS,
        description=command.does if command is APP else _begin(command),
        epilog=_overview() if command is APP else _examples(command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        # what is not given is not there, and the command's own default holds
        argument_default=argparse.SUPPRESS if command.home else None,
    )
    command.add(parser)
    return parser


class _Parser(argparse.ArgumentParser):
    def __init__(self, command: Command, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.command = command

    def error(self, message: str) -> NoReturn:
        end = "" if message.endswith((".", "?")) else "."
        raise ConfigError(
            f"{self.command.name}: {message}{end} `{self.prog} --help` shows how it is written."
        )


def _begin(command: Command) -> str:
    return f"python launch.py {command.flag} {command.words}\n\n{command.does[0].upper()}{command.does[1:]}."


def _examples(command: Command) -> str:
    lines = [f"  python launch.py {example}" for example in command.examples]
    return "\n".join([*(["examples:", *lines, ""] if lines else []), EXIT_CODES])


def _overview() -> str:
    lines = ["commands (python launch.py COMMAND --help shows its options; none: the app):"]
    for group, commands in GROUPS.items():
        lines += ["", f"  {group}"]
        lines += [f"    {f'{c.flag} {c.words}':28} {c.does}" for c in commands]
    lines += ["", "examples:", "  python launch.py"]
    lines += [f"  python launch.py {command.examples[0]}" for command in COMMANDS if command.examples]
    return "\n".join([*lines, "", EXIT_CODES])


def _refused(command: Command, strange: Sequence[str]) -> str:
    """A sentence on the first word that nothing asked for."""
    word = next((word for word in strange if word.startswith("-")), strange[0])
    option = word.partition("=")[0]
    owners = [other.name for other in (APP, *COMMANDS) if option in _options_of(other)]
    if owners:
        end = "Name the command too." if command is APP else "Leave it out."
        return f"{option} is no option of {command.name}, but of {', '.join(owners)}. {end}"
    if option.startswith("-"):
        known = {*_options_of(command), *(other.flag for other in COMMANDS)}
        return f"{option} is no option of {command.name}.{did_you_mean(option, known)}"
    return f'"{word}" is a word too many for {command.name}. A name with spaces stands in quotes.'


def _options_of(command: Command) -> set[str]:
    return {option for action in parser_of(command)._actions for option in action.option_strings}
