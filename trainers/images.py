"""Pictures from strangers: opened as upright RGB, or refused by name with the reason.

A picture of 20 kB can ask for gigabytes when decoded, so its size is checked before a pixel is read. Only the
formats below are ever tried: Pillow knows some forty more, and one of them starts another program.
"""

from __future__ import annotations

import io
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lora_core.errors import FileRefused
from trainers import colours

EXTENSIONS = (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
UNREAD = (
    ".heic",
    ".heif",
    ".jxl",
    ".jp2",
    ".psd",
    ".svg",
    ".tga",
    ".dng",
    ".cr2",
    ".cr3",
    ".nef",
    ".arw",
)  # pictures too
MAX_PIXELS = 64_000_000
MAX_BYTES = 64_000_000

Image.init()
FORMATS: list[str] = [
    f for f in ("AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP") if f in Image.OPEN
]
# Pictures inside pictures (thumbnails, frames) meet Pillow's own limit, which knows no per-call setting.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.simplefilter("error", Image.DecompressionBombWarning)


class BadImage(FileRefused):
    """A file that is no picture we can use. `path` and `reason` tell the two halves of the message apart."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path.name} cannot be used: {reason}.")
        self.path, self.reason = path, reason


MASK_ENDINGS = (".mask", "-masklabel")  # of a name without its ending: ours, and OneTrainer's


def is_mask(path: Path) -> bool:
    """Whether the name says that this is another picture's mask, and so nothing to learn."""
    return path.suffix.lower() in EXTENSIONS and path.stem.lower().endswith(MASK_ENDINGS)


def open_image(path: Path | str) -> Image.Image:
    """-> sRGB, upright as EXIF says, transparency on white, 16 bits as 8, the first frame. Raises BadImage."""
    path = Path(path)
    return decode_layers(read_bytes(path), path)[0]


def read_bytes(path: Path) -> bytes:
    """The whole file, if it is an ordinary one of at most MAX_BYTES. Raises BadImage."""
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):  # reading a named pipe would wait for ever
            raise BadImage(path, "it is not an ordinary file")
        if facts.st_size == 0:
            raise BadImage(path, "the file is empty")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as problem:
        raise BadImage(path, f"it cannot be read ({problem.strerror})") from problem
    if len(data) > MAX_BYTES:
        raise BadImage(path, f"it is larger than {MAX_BYTES // 10**6} MB; save it smaller")
    return data


def decode_mask(data: bytes, path: Path) -> Image.Image:
    """A file's bytes -> mode L, transparency on black; by its numbers, which are weights and no colours. `path` is for
    the message."""
    return decode_layers(data, path, "black", managed=False)[0].convert("L")


def decode_layers(
    data: bytes, path: Path, background: str = "white", *, managed: bool = True
) -> tuple[Image.Image, Image.Image | None]:
    """A file's bytes -> the picture as `open_image` has it, on a background, and its opacity (mode L) if it has one.
    Not `managed`: its numbers whatever its colour profile says, in half the time. `path` is for the message."""
    with _opened(data, path) as image:
        image.load()
        return _layers(ImageOps.exif_transpose(image), path, background, managed=managed)


def is_animated(data: bytes, path: Path) -> bool:
    """Whether the file has more frames than the one we use."""
    with _opened(data, path) as image:
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))


def colour_problem(data: bytes, path: Path) -> str:
    """Why its colour profile is not used, and its numbers are taken for sRGB's; empty: nothing is wrong."""
    with _opened(data, path) as image:
        return colours.problem(image)


@contextmanager
def _opened(data: bytes, path: Path) -> Iterator[Image.Image]:
    """The header, and BadImage for whatever is raised on the way from there to pixels."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadImage(path, _too_large(f"{width} x {height} pixels"))
            yield image
    except BadImage:
        raise
    except (
        Exception
    ) as problem:  # decoders raise anything at all on damaged data; it is passed on as the reason
        raise BadImage(path, _reason(problem)) from problem


def _layers(
    image: Image.Image, path: Path, background: str, *, managed: bool
) -> tuple[Image.Image, Image.Image | None]:
    clear = image.info.get(
        "transparency"
    )  # the one colour that a PNG calls transparent, in its own number of bits
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips it to white
        seen = None if clear is None else Image.fromarray(np.asarray(image) != clear).convert("L")
        profile = image.info.get("icc_profile")
        image = _eight_bits(image, path)
        image.info["icc_profile"] = profile
        if seen is not None:
            image.putalpha(seen)
    elif isinstance(clear, tuple) and max(clear) > 255:  # Pillow has kept the upper eight bits of its pixels
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    if image.mode == "F":
        finite = bool(np.isfinite(np.asarray(image)).all())
        found = "floating-point numbers of unknown range" if finite else "NaN or infinite in places"
        raise BadImage(path, f"its pixels are {found}; save it as PNG or JPEG")
    if managed:
        image = colours.to_srgb(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        paper = Image.new("RGBA", rgba.size, background)
        paper.alpha_composite(rgba)
        return paper.convert("RGB"), rgba.getchannel("A")
    # A fresh picture: without the file's metadata, which nothing after this may take for the truth.
    rgb = image.convert("RGB")
    rgb.info = {}
    return rgb, None


def _eight_bits(image: Image.Image, path: Path) -> Image.Image:
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
        raise BadImage(path, "its grey values need more than 16 bits; save it as PNG or JPEG")
    return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))


def _reason(problem: Exception) -> str:
    if isinstance(problem, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return _too_large("it")
    if isinstance(problem, UnidentifiedImageError):
        return f"it is damaged, or none of {', '.join(FORMATS)}"
    if isinstance(problem, MemoryError):
        return "there is not enough memory for it"
    return f"it is damaged ({str(problem).rstrip('.') or type(problem).__name__})"


def _too_large(what: str) -> str:
    return f"{what} is over the limit of {MAX_PIXELS // 10**6} million pixels; save it smaller"
