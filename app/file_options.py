"""Options of the commands on files, as their parsers take them; destinations are names of the fields they fill."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.command_options import Parser, one_of, prediction


def inspect(p: Parser) -> None:
    p.add_argument(
        "--inspect", dest="files", nargs="+", type=Path, metavar="FILE", help="files, or folders of them"
    )
    p.add_argument("--json", action="store_true", help="one array, an object for each file (docs/files.md)")
    p.add_argument(
        "--hash", action="store_true", help="read all of it: hashes (AutoV2, AutoV3), and NaN and Inf"
    )
    _progress(p)


def convert(p: Parser) -> None:
    p.add_argument(
        "--convert", nargs=2, action=_InOut, type=Path, metavar=("IN", "OUT"), help="file, or PEFT's folder"
    )
    p.add_argument(
        "--to",
        dest="spelling",
        required=True,
        type=one_of("kohya", "diffusers", "peft"),
        metavar="kohya|diffusers|peft",
        help="spelling: kohya's is what A1111, ComfyUI and InvokeAI read; PEFT's is a folder",
    )
    p.add_argument(
        "--bake",
        action="store_true",
        help="make a plain LoRA of every other kind (DoRA, LoHa, OFT ...), leave out what the spelling has no words "
        "for, and say what that loses",
    )
    _base(p)
    _rank(p, "with --bake: rank of the layers that were no plain LoRA (64)")
    _written(p)


def combine(p: Parser) -> None:
    p.add_argument(
        "--combine",
        dest="loras",
        nargs="+",
        metavar="FILE[:WEIGHT]",
        help="weights may be negative; 1 where none is given",
    )
    p.add_argument(
        "--method",
        metavar="NAME",
        help="cat (the sum, exactly; the default), linear, svd, ties, dare_linear, dare_ties, magnitude_prune, "
        "ties_svd, dare_linear_svd, dare_ties_svd, magnitude_prune_svd",
    )
    p.add_argument(
        "--density", type=float, metavar="SHARE", help="of the entries that pruning keeps, such as 0.5"
    )
    p.add_argument(
        "--rank", type=int, metavar="N", help="with svd methods: of the result (the largest there is)"
    )
    _clamp(p, "with svd methods: ")
    p.add_argument(
        "--majority",
        metavar="total|frequency",
        help="with ties: the sign with the larger sum wins (total), or the more frequent one",
    )
    p.add_argument(
        "--signed-election", action="store_true", help="with ties: elect with the signs of the weights"
    )
    _base(p)
    _out(p)


def resize(p: Parser) -> None:
    p.add_argument("--resize", dest="source", type=Path, metavar="IN", help="file, or PEFT's folder")
    _rank(p, "of each layer")
    _clamp(p)
    _base(p)
    _out(p)


def extract(p: Parser) -> None:
    p.add_argument(
        "--extract",
        dest="models",
        nargs=2,
        metavar=("BASE", "TUNED"),
        help="folder, .safetensors file or hub id",
    )
    prediction(p, "the tuned model")
    _rank(p, "of each layer")
    _clamp(p)
    p.add_argument(
        "--targets",
        nargs="+",
        metavar="NAME",
        help="which layers: attention, feed-forward, projection, conv, all-linear, all-linear+conv (the default), ends "
        "of module paths, or one regular expression",
    )
    p.add_argument("--exclude", nargs="+", metavar="NAME", help="layers left out of these, named likewise")
    p.add_argument(
        "--others",
        type=one_of("name", "store"),
        metavar="name|store",
        help="norms, biases and embeddings that differ: name them (the default), or store them whole",
    )
    _out(p)


def bake(p: Parser) -> None:
    p.add_argument(
        "--bake",
        dest="loras",
        nargs="+",
        metavar="MIX",
        help="FILE[:WEIGHT], several of them, or the .toml of a saved mix or of a recipe",
    )
    p.add_argument("--base", required=True, help='"demo", a folder, a .safetensors file or a hub id')
    prediction(p, "the base model")
    p.add_argument(
        "--out",
        dest="path",
        type=Path,
        required=True,
        help="NAME.safetensors: one file, as A1111 and ComfyUI open; any other name: a diffusers folder",
    )
    _written(p)


def _base(p: Parser) -> None:
    p.add_argument(
        "--base",
        metavar="MODEL",
        help="the model the LoRAs are for, where their change depends on it (DoRA, (IA)³, OFT, GLoRA)",
    )


def _rank(p: Parser, what: str) -> None:
    p.add_argument("--rank", type=int, metavar="N", help=what)
    p.add_argument(
        "--energy",
        type=float,
        metavar="SHARE",
        help="or: the smallest that holds this share of |dW|², 0 to 1",
    )


def _clamp(p: Parser, when: str = "") -> None:
    p.add_argument(
        "--clamp", type=float, metavar="Q", help=f"{when}hold entries within this quantile, such as 0.99"
    )


def _out(p: Parser) -> None:
    p.add_argument(
        "--out",
        dest="path",
        type=Path,
        required=True,
        metavar="FILE",
        help="the LoRA to write, in kohya's spelling",
    )
    _written(p)


def _written(p: Parser) -> None:
    p.add_argument(
        "--dtype",
        type=one_of("fp16", "bf16", "fp32"),
        metavar="fp16|bf16|fp32",
        help="of what is written (as it was)",
    )
    p.add_argument("--overwrite", action="store_true", help="replace a file of that name")
    _progress(p)


def _progress(p: Parser) -> None:
    p.add_argument("--progress", action="store_true", help="show progress, be stderr a terminal or not")


class _InOut(argparse.Action):
    def __call__(
        self,
        parser: Parser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option: str | None = None,
    ) -> None:
        assert isinstance(values, list)
        namespace.source, namespace.path = values
