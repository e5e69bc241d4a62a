"""Options of the app, of training and of pictures, as their parsers take them; those of files: file_options."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from lora_core.errors import did_you_mean

Parser = argparse.ArgumentParser


def app(p: Parser) -> None:
    p.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this computer alone)"
    )
    p.add_argument("--port", type=int, default=7860, help="port to listen on, or the next free one (7860)")
    p.add_argument("--token", default="", help="a word to be asked for, needed with another --host")
    p.add_argument(
        "--models", type=Path, default=Path("models"), help="folder of LoRAs and base models (models)"
    )
    p.add_argument("--no-browser", action="store_true", help="do not open the browser")


def doctor(p: Parser) -> None:
    p.add_argument("--doctor", action="store_true", help="packages, devices, folders, port")
    p.add_argument("--models", type=Path, default=Path("models"), help="as for the app (models)")
    p.add_argument("--host", default="127.0.0.1", help="as for the app (127.0.0.1)")
    p.add_argument("--port", type=int, default=7860, help="as for the app (7860)")
    p.add_argument("--json", action="store_true", help="all of it, as one object")


def train(p: Parser) -> None:
    p.add_argument(
        "--train", dest="preset", nargs="?", const="", metavar="PRESET", help="a preset's file, or its name"
    )
    p.add_argument(
        "--resume", type=Path, metavar="RUN", help="go on with the run in this folder, where it was"
    )
    p.set_defaults(rehearsed=False)
    _set(p)
    _events(p)


def preflight(p: Parser) -> None:
    p.add_argument("--preflight", dest="preset", metavar="PRESET", help="a preset's file, or its name")
    p.set_defaults(rehearsed=True, resume=None)
    _set(p)
    _events(p)


def look(p: Parser) -> None:
    p.add_argument("--look", metavar="PRESET", help="a preset's file, or its name")
    _set(p)
    p.add_argument("--json", action="store_true", help="all of it, as one object")


def _set(p: Parser) -> None:
    p.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting of the preset"
    )


def _events(p: Parser) -> None:
    p.add_argument(
        "--json", action="store_true", help="one JSON event per line on stdout, as in the run's events.jsonl"
    )


def tell(p: Parser) -> None:
    p.add_argument(
        "--tell",
        nargs="+",
        metavar="RUN ORDER",
        help='pause, continue, save or stop, or steps=1200, or sample="a cat", or sample="a cat@0.8" for the LoRA at '
        "that weight",
    )


def import_preset(p: Parser) -> None:
    p.add_argument(
        "--import-preset",
        type=Path,
        metavar="FILE",
        help="kohya's TOML or JSON, or a text file with the command that starts sd-scripts or diffusers' DreamBooth "
        "scripts",
    )
    p.add_argument("--out", type=Path, metavar="FILE", help="the preset's file; without it, it is printed")


def list_presets(p: Parser) -> None:
    p.add_argument("--list-presets", action="store_true", help="by name")


def list_settings(p: Parser) -> None:
    p.add_argument(
        "--list-settings",
        nargs="?",
        const="",
        metavar="TABLE",
        help="of one table, such as train; without it, of all",
    )


def generate(p: Parser) -> None:
    p.add_argument(
        "--generate", nargs="?", const="", metavar="RECIPE", help="a TOML file; each flag overrides it"
    )
    p.add_argument(
        "--base", help='base model: "demo" (the default), a folder, a .safetensors file or a hub id'
    )
    prediction(p, "the base model")
    p.add_argument("--prompt")
    p.add_argument("--negative", dest="negative_prompt", metavar="PROMPT")
    p.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:WEIGHT]", help="may be given several times"
    )
    p.add_argument(
        "--weights",
        nargs="+",
        type=float,
        metavar="W",
        help="one picture per factor on all LoRAs, side by side",
    )
    p.add_argument(
        "--sheet",
        metavar="loras|seeds",
        help="a contact sheet, a column per weight: a row per LoRA, worn alone, or a row per seed, with all LoRAs",
    )
    p.add_argument(
        "--sheet-weights",
        nargs="+",
        type=float,
        metavar="W",
        help="the sheet's columns: weights of the LoRA, or factors on all weights with seeds (0 0.5 1)",
    )
    p.add_argument(
        "--sheet-seeds",
        nargs="+",
        type=int,
        metavar="SEED",
        help="the rows of --sheet seeds (three from --seed on)",
    )
    p.add_argument("--seed", type=int)
    p.add_argument("--steps", type=int)
    p.add_argument("--guidance", type=float)
    p.add_argument("--count", type=int)
    p.add_argument("--sampler", help="DDIM, Euler, DPM++ 2M ...; left out: the model's own")
    p.add_argument("--width", type=int)
    p.add_argument("--height", type=int)
    p.add_argument(
        "--fuse",
        action="store_true",
        default=None,
        help="fold the LoRAs into the base weights for the pictures",
    )
    p.add_argument("--out", type=Path, help="folder for the pictures (outputs)")


def prediction(p: Parser, model: str) -> None:
    p.add_argument(
        "--prediction",
        type=one_of("epsilon", "v_prediction"),
        metavar="epsilon|v_prediction",
        help=f"what {model} predicts, where it is not what its file says or is found to be",
    )


def one_of(*known: str) -> Callable[[str], str]:
    def checked(word: str) -> str:
        if word not in known:
            raise argparse.ArgumentTypeError(f'"{word}" is unknown.{did_you_mean(word, known)}'.rstrip("."))
        return word

    return checked
