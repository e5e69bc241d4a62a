"""Where a base model lies: the demo, a folder, a file, or the Hugging Face hub, from which it is fetched once."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download

from lora_core.errors import FileRefused

DEMO = Path(__file__).resolve().parent.parent / "presets" / "demo" / "base"
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["model_index.json", "scheduler/*.json", "tokenizer*/*", "*/config.json"]


def find_source(source: str | Path) -> tuple[str, Path]:
    """-> display name and a path that exists; downloads where the source is a hub id. Raises FileRefused."""
    if source == "demo":
        if not DEMO.is_dir():
            raise FileRefused(
                "The demo base is not in this installation (presets/demo/base is missing). Make it with "
                "`python -m trainers.demo_base`, or open another model."
            )
        return "demo", DEMO
    path = Path(source).expanduser()
    if path.suffix.lower() in PICKLES and not path.is_dir():
        raise FileRefused(
            f"{path.name} is a pickle file ({path.suffix}), which can run code when opened; only "
            ".safetensors is read. Get its .safetensors version, or convert it with a tool you trust, "
            "such as the merger of A1111's web UI."
        )
    if path.is_dir():
        return path.resolve().name, path
    if path.exists():
        return path.stem, path
    if isinstance(source, str) and _HUB_ID.fullmatch(source) and path.suffix != ".safetensors":
        return source.split("/")[1], _download(source)
    raise FileRefused(
        f'"{source}" does not exist; a folder, a .safetensors file or owner/name of the hub was expected.'
    )


def _download(hub_id: str) -> Path:
    """-> the snapshot's folder: configurations and safetensors alone, fp16 ones where there are no others."""
    wanted = [*_HUB_FILES, *(f"{component}/*.safetensors*" for component in PARTS)]
    try:
        for unwanted in (["*.fp16.*", "*.non_ema.*"], ["*.non_ema.*"]):
            folder = Path(snapshot_download(hub_id, allow_patterns=wanted, ignore_patterns=unwanted))
            if list(folder.glob("unet/*.safetensors")):
                break
    except (OSError, ValueError, RuntimeError) as problem:  # the hub's errors are of these kinds
        reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        raise FileRefused(
            f'"{hub_id}" is no folder here, and could not be fetched from the Hugging Face hub ({reason}). '
            "Check the name and the connection, or give the path of a model on this computer."
        ) from problem
    return folder
