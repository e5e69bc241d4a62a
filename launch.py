"""LoRA Loom's door: read the command line, hand over.

Imports live inside functions, so that --help is instant: neither torch nor gradio is loaded for it.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from contextlib import suppress
from pathlib import Path

from app import command_line
from lora_core.errors import ConfigError, LoraError

DONE, FAILED, USAGE, BUSY, INTERRUPTED = 0, 1, 2, 3, 130


def main(argv: list[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a pipe on Windows has no word for every name of a file
            stream.reconfigure(errors="backslashreplace")
    try:
        command, args = command_line.parse(sys.argv[1:] if argv is None else argv)
    except ConfigError as problem:
        return _say(str(problem), USAGE)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    own = {
        "": app,
        "--train": train,
        "--preflight": train,
        "--doctor": doctor,
        "--look": look,
        "--tell": tell,
        "--import-preset": import_preset,
        "--list-presets": list_presets,
        "--list-settings": list_settings,
        "--generate": generate,
    }
    try:
        return on_files(command, args) if command.home else own[command.flag](args)
    except ConfigError as problem:
        return _say(str(problem), USAGE)
    except LoraError as problem:
        return _say(str(problem), FAILED)
    except ImportError as problem:
        if (problem.name or "").partition(".")[0] in ("app", "lora_core", "trainers"):
            raise
        return _say(f"{problem}. `python launch.py --doctor` tells what is missing or broken.", FAILED)
    except BrokenPipeError:  # whoever read it has enough
        return FAILED
    except KeyboardInterrupt:
        return _say("Interrupted. No file was left half-written.", INTERRUPTED)
    finally:
        _let_go()


def on_files(command: command_line.Command, args: argparse.Namespace) -> int:
    from app.progress_bar import progress_bar
    from lora_core.commands import Command, built

    module, _, name = command.home.partition(":")
    work: Command = built(getattr(importlib.import_module(module), name), vars(args))
    with progress_bar(shown=getattr(args, "progress", False) or sys.stderr.isatty()):
        for line in work.run():
            print(line, flush=True)
    return DONE


def app(args: argparse.Namespace) -> int:
    from app.host import check_reach

    check_reach(args.host, args.token)  # before torch is loaded for nothing
    from app.main import run

    return run(
        args.models, host=args.host, port=args.port, token=args.token, open_browser=not args.no_browser
    )


def doctor(args: argparse.Namespace) -> int:
    from app.doctor import as_json, examine, told, usable

    found = list(examine(args.models, host=args.host, port=args.port))
    print(as_json(found) if args.json else "\n".join(told(found)))
    return DONE if usable(found) else FAILED


def list_presets(args: argparse.Namespace) -> int:
    from trainers import presets

    for name, path, description in presets.list_presets():
        print(f"{name:16} {description}\n{'':16} {path}")
    return DONE


def list_settings(args: argparse.Namespace) -> int:
    from trainers.settings_list import listed

    print("\n".join(listed(args.list_settings)))
    return DONE


def train(args: argparse.Namespace) -> int:
    from lora_core.errors import Stopped
    from trainers import presets
    from trainers.run_folder import RunBusy, RunFolder

    try:
        if args.resume:
            config = RunFolder.reopen(args.resume, args.set)[1]
        elif args.preset:
            config = presets.load(args.preset, args.set)
        else:
            return _say("Name a preset, such as --train presets/demo.toml; --list-presets shows them.", USAGE)
    except LoraError as problem:
        return _say(str(problem), USAGE)
    from trainers.dreambooth import rehearse
    from trainers.dreambooth import train as run
    from trainers.events import Console, json_lines

    listeners = [json_lines if args.json else Console()]
    try:
        if args.rehearsed:
            rehearse(config, listeners=listeners)
        else:
            run(config, resume=args.resume, listeners=listeners, preflight=True)
    except Stopped:
        return INTERRUPTED  # the console has said where it was saved and how to go on
    except RunBusy as problem:
        return _say(str(problem), BUSY)
    return DONE


def look(args: argparse.Namespace) -> int:
    from trainers import presets
    from trainers.look import look, told

    config = presets.load(args.look, args.set)
    for line in told(look(config, config.output / "look"), as_json=args.json):
        print(line)
    return DONE


def tell(args: argparse.Namespace) -> int:
    from trainers.tell import tell as pass_on

    run, *words = args.tell
    print("\n".join(pass_on(Path(run), words)))
    return DONE


def import_preset(args: argparse.Namespace) -> int:
    from trainers import importing

    for line in importing.run(args.import_preset, args.out):
        print(line)
    return DONE


def generate(args: argparse.Namespace) -> int:
    from lora_core.recipe import Recipe, make

    recipe = Recipe.read(Path(args.generate)) if args.generate else Recipe()
    for line in make(recipe.with_flags(vars(args))):
        print(line)
    return DONE


def _say(text: str, code: int) -> int:
    with suppress(OSError):  # of a terminal that is closed
        print(text, file=sys.stderr)
    return code


def _let_go() -> None:
    """What nobody reads any more would raise again when Python ends, and make an exit code of its own."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
