"""LoRA Loom's door: parse the command line, hand over.

Imports live inside functions, so that --help is instant: neither torch nor gradio is loaded for it.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

DONE, FAILED, USAGE, BUSY, INTERRUPTED = 0, 1, 2, 3, 130

EPILOG = """\
examples:
  python launch.py                                        the app, in the browser
  python launch.py --train presets/demo.toml
  python launch.py --train presets/sd15_subject.toml --set data.images=photos --set train.steps=1200
  python launch.py --preflight presets/sdxl_subject.toml --set data.images=photos
  python launch.py --import-preset kohya.toml --out fox.toml
  python launch.py --train --resume runs/fox
  python launch.py --tell runs/fox pause
  python launch.py --tell runs/fox steps=1200 sample="a fox on the moon@0.8"
  python launch.py --look presets/sd15_subject.toml --set data.images=photos       what it would learn from, as a page
  python launch.py --generate --prompt "a zxq animal on a blue background" --lora runs/demo/demo.safetensors:0.8
  python launch.py --generate --prompt "..." --lora cat.safetensors --weights 0 0.5 1      one picture per weight
  python launch.py --generate --prompt "..." --lora cat.safetensors --lora ink.safetensors --sheet loras

exit codes: 0 done, 1 failed (the reason is on stderr), 2 wrong usage or refused to start,
            3 another process holds this run, 130 interrupted and saved
"""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="launch.py",
        description="Train Stable Diffusion LoRAs, and wear them at any weight, in the browser or from here.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = p.add_argument_group("what to do (nothing: the app)")
    what.add_argument(
        "--train", nargs="?", const="", metavar="PRESET", help="train the LoRA a preset describes"
    )
    what.add_argument(
        "--look",
        metavar="PRESET",
        help="show what a preset's training would be fed, and what is odd about it",
    )
    what.add_argument(
        "--generate",
        nargs="?",
        const="",
        metavar="RECIPE",
        help="make pictures from a recipe or the flags below",
    )
    what.add_argument("--list-presets", action="store_true", help="the presets that come with LoRA Loom")
    page = p.add_argument_group("the app")
    page.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this computer alone)"
    )
    page.add_argument("--port", type=int, default=7860, help="port to listen on, or the next free one (7860)")
    page.add_argument("--token", default="", help="a word to be asked for, needed with another --host")
    page.add_argument(
        "--models", type=Path, default=Path("models"), help="folder of LoRAs and base models (models)"
    )
    page.add_argument("--no-browser", action="store_true", help="do not open the browser")
    train = p.add_argument_group("training")
    train.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the preset"
    )
    train.add_argument(
        "--resume", type=Path, metavar="RUN", help="go on with the run in this folder, exactly where it was"
    )
    train.add_argument(
        "--json",
        action="store_true",
        help="progress as one JSON event per line on stdout, as in events.jsonl; with --look: all of it, as one object",
    )
    what.add_argument(
        "--preflight",
        metavar="PRESET",
        help="what the training would need: memory, time and disk, from two steps of the largest batch; what speaks "
        "against it; done before every training too",
    )
    what.add_argument(
        "--import-preset",
        type=Path,
        metavar="FILE",
        help="a preset out of kohya's TOML or JSON, or a text file with the command that starts sd-scripts or "
        "diffusers' DreamBooth scripts; what cannot be carried over is named",
    )
    what.add_argument(
        "--tell",
        nargs="+",
        metavar="RUN ORDER",
        help='tell the training in the folder RUN to pause, continue, save or stop, or steps=1200, or sample="a cat", '
        'or sample="a cat@0.8" for the LoRA at that weight',
    )
    make = p.add_argument_group("pictures (each overrides the recipe)")
    make.add_argument(
        "--base", help='base model: "demo" (the default), a folder, a .safetensors file or a hub id'
    )
    make.add_argument(
        "--prediction",
        choices=("epsilon", "v_prediction"),
        help="what the base model predicts, where it is not what its file says or is found to be",
    )
    make.add_argument("--prompt")
    make.add_argument("--negative", dest="negative_prompt", metavar="PROMPT")
    make.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:WEIGHT]", help="may be given several times"
    )
    make.add_argument(
        "--weights",
        nargs="+",
        type=float,
        metavar="W",
        help="one picture per factor on all LoRAs, side by side",
    )
    make.add_argument(
        "--sheet",
        metavar="loras|seeds",
        help="a contact sheet, a column per weight: a row per LoRA, worn alone, or a row per seed, with all LoRAs",
    )
    make.add_argument(
        "--sheet-weights",
        nargs="+",
        type=float,
        metavar="W",
        help="the sheet's columns: weights of the LoRA, or factors on all weights with seeds (0 0.5 1)",
    )
    make.add_argument(
        "--sheet-seeds",
        nargs="+",
        type=int,
        metavar="SEED",
        help="the rows of --sheet seeds (three from --seed on)",
    )
    make.add_argument("--seed", type=int)
    make.add_argument("--steps", type=int)
    make.add_argument("--guidance", type=float)
    make.add_argument("--count", type=int)
    make.add_argument("--sampler", help="DDIM, Euler, DPM++ 2M ...; left out: the model's own")
    make.add_argument("--width", type=int)
    make.add_argument("--height", type=int)
    make.add_argument(
        "--fuse",
        action="store_true",
        default=None,
        help="fold the LoRAs into the base weights for the pictures",
    )
    make.add_argument(
        "--out",
        type=Path,
        help="folder for the pictures (outputs); with --import-preset: the preset's file, else it is printed",
    )
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    chosen = [
        args.train is not None,
        args.generate is not None,
        args.list_presets,
        bool(args.tell),
        bool(args.look),
        args.preflight is not None,
        args.import_preset is not None,
    ]
    if sum(chosen) > 1:
        return _say(
            "Choose one of --train, --preflight, --look, --tell, --import-preset, --generate and --list-presets.",
            USAGE,
        )
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault(
        "TRANSFORMERS_VERBOSITY", "error"
    )  # else it asks for torchvision, which nothing needs
    if args.list_presets:
        return list_presets()
    if args.tell:
        return tell(args)
    if args.import_preset is not None:
        return import_preset(args)
    if args.train is not None or args.preflight is not None:
        return train(args)
    if args.look:
        return look(args)
    if args.generate is not None:
        return generate(args)
    return app(args)


def app(args: argparse.Namespace) -> int:
    from app.host import check_reach
    from lora_core.errors import ConfigError, LoraError

    try:
        check_reach(args.host, args.token)  # before torch is loaded for nothing
        from app.main import run

        return run(
            args.models, host=args.host, port=args.port, token=args.token, open_browser=not args.no_browser
        )
    except ConfigError as problem:
        return _say(str(problem), USAGE)
    except LoraError as problem:
        return _say(str(problem), FAILED)


def list_presets() -> int:
    from trainers import presets

    for name, path, description in presets.list_presets():
        print(f"{name:16} {description}\n{'':16} {path}")
    return DONE


def train(args: argparse.Namespace) -> int:
    from lora_core.errors import ConfigError, LoraError, Stopped
    from trainers import presets
    from trainers.run_folder import RunBusy, RunFolder

    try:
        if args.resume:
            config = RunFolder.reopen(args.resume, args.set)[1]
        elif args.train or args.preflight:
            config = presets.load(args.train or args.preflight, args.set)
        else:
            return _say("Name a preset, such as --train presets/demo.toml; --list-presets shows them.", USAGE)
    except LoraError as problem:
        return _say(str(problem), USAGE)
    from trainers.dreambooth import rehearse
    from trainers.dreambooth import train as run
    from trainers.events import Console, json_lines

    listeners = [json_lines if args.json else Console()]
    try:
        if args.preflight is not None:
            rehearse(config, listeners=listeners)
        else:
            run(config, resume=args.resume, listeners=listeners, preflight=True)
    except Stopped:
        return INTERRUPTED  # the console has said where it was saved and how to go on
    except RunBusy as problem:
        return _say(str(problem), BUSY)
    except ConfigError as problem:
        return _say(str(problem), USAGE)
    except LoraError as problem:
        return _say(str(problem), FAILED)
    return DONE


def import_preset(args: argparse.Namespace) -> int:
    from lora_core.errors import ConfigError, LoraError
    from trainers import importing

    try:
        for line in importing.run(args.import_preset, args.out):
            print(line)
    except ConfigError as problem:
        return _say(str(problem), USAGE)
    except LoraError as problem:
        return _say(str(problem), FAILED)
    return DONE


def tell(args: argparse.Namespace) -> int:
    from lora_core.errors import ConfigError, LoraError
    from trainers.tell import tell as pass_on

    run, *words = args.tell
    try:
        print("\n".join(pass_on(Path(run), words)))
    except ConfigError as problem:
        return _say(str(problem), USAGE)
    except LoraError as problem:
        return _say(str(problem), FAILED)
    return DONE


def look(args: argparse.Namespace) -> int:
    from lora_core.errors import ConfigError, LoraError
    from trainers import presets
    from trainers.look import look, told

    try:
        config = presets.load(args.look, args.set)
        for line in told(look(config, config.output / "look"), as_json=args.json):
            print(line)
    except ConfigError as problem:
        return _say(str(problem), USAGE)
    except LoraError as problem:
        return _say(str(problem), FAILED)
    return DONE


def generate(args: argparse.Namespace) -> int:
    from lora_core.errors import ConfigError, LoraError
    from lora_core.recipe import Recipe, make

    try:
        recipe = Recipe.read(Path(args.generate)) if args.generate else Recipe()
        recipe = recipe.with_flags(vars(args))
    except ConfigError as problem:
        return _say(str(problem), USAGE)
    try:
        for line in make(recipe):
            print(line)
    except ConfigError as problem:
        return _say(str(problem), USAGE)
    except LoraError as problem:
        return _say(str(problem), FAILED)
    return DONE


def _say(text: str, code: int) -> int:
    print(text, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
