"""A small picture inside a LoRA's file, as modelspec 1.0.1 has it: `modelspec.thumbnail`, a data URI."""

from __future__ import annotations

import base64
import io
from dataclasses import replace

from PIL import Image

from lora_core.adapter import Adapter

KEY = "modelspec.thumbnail"
SIDE = 256  # pixels, the specification's own advice
QUALITY = 80  # a 256 x 256 photo takes 15 to 25 kB


def data_uri(image: Image.Image) -> str:
    """`image` as a JPEG of at most 256 pixels a side; what is transparent becomes white."""
    small = image.convert("RGBA")
    small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    page = Image.new("RGB", small.size, "white")
    page.paste(small, mask=small.getchannel("A"))
    data = io.BytesIO()
    page.save(
        data, "JPEG", quality=QUALITY, optimize=True
    )  # a fresh picture: without what the first one carried
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def with_thumbnail(adapter: Adapter, image: Image.Image) -> Adapter:
    """What `write_adapter` makes of this has the picture inside."""
    return replace(adapter, metadata={**adapter.metadata, KEY: data_uri(image)})
