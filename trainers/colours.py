"""Colour profiles: a picture's numbers -> sRGB's, which every Stable Diffusion was trained on.

Phones save Display P3, cameras Adobe RGB, programs for print CMYK. Read as if they were sRGB's, the numbers of the
first two are paler colours, and those of the third are colours that no paper has.
"""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

SAME = 2  # levels of 255: sRGB in another program's words differs by rounding alone, and its pictures keep their bits
_GREY = ("1", "L", "LA", "I", "I;16", "I;16B")
_SPACES = {"CMYK": "CMYK", "LAB": "Lab", **dict.fromkeys(_GREY, "GRAY")}  # of a mode; else RGB
_MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK", "Lab": "LAB"}  # in which a space's numbers are given
_SRGB = ImageCms.createProfile("sRGB")


def to_srgb(image: Image.Image) -> Image.Image:
    """By the profile that the picture carries, transparency as it was -> RGB or RGBA; the picture itself where there is
    no profile, sRGB's own, or an unusable one (`problem`)."""
    try:
        space, transform = _of(image)
    except ValueError:
        return image
    if transform is None:
        return image
    if not image.has_transparency_data:
        return _applied(transform, image.convert(_MODES[space]))
    rgba = image.convert("RGBA")  # of grey and of palettes too, which name one colour as transparent
    found = _applied(transform, rgba.convert("RGB").convert(_MODES[space]))
    found.putalpha(rgba.getchannel("A"))
    return found


def problem(image: Image.Image) -> str:
    """Why the profile that the picture carries is not used; empty: it is, or there is none."""
    try:
        _of(image)
    except ValueError as reason:
        return str(reason)
    return ""


def _of(image: Image.Image) -> tuple[str, Any]:
    """-> the space of the picture's numbers and the way from there to sRGB, None where they are the same. Raises
    ValueError for a profile that is damaged, or another kind of picture's."""
    profile, own = image.info.get("icc_profile") or b"", _SPACES.get(image.mode, "RGB")
    if not profile:
        return own, _transform(b"", own) if own == "Lab" else None
    try:
        space = _space(profile)
        if own != space and (own, space) != ("GRAY", "RGB"):  # a grey picture is an RGB one too
            raise ValueError(f"it is for {space}, and the picture is {own}")
        return space, _transform(profile, space)
    except (ImageCms.PyCMSError, OSError) as reason:
        raise ValueError(f"it is damaged ({reason})") from reason


def _space(profile: bytes) -> str:
    return ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip()


@lru_cache(maxsize=4)  # a folder's pictures come from few devices
def _transform(profile: bytes, space: str) -> Any:
    """Relative colorimetric with black point compensation, as picture editors do it. For several threads at once."""
    given = ImageCms.ImageCmsProfile(io.BytesIO(profile)) if profile else ImageCms.createProfile("LAB")
    found = ImageCms.buildTransform(
        given,
        _SRGB,
        _MODES[space],
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.HIGHRESPRECALC | ImageCms.Flags.NOCACHE,
    )
    return None if space == "RGB" and _changes_nothing(found) else found


def _changes_nothing(transform: Any) -> bool:
    """To a grid of 17 x 17 x 17 colours."""
    levels = np.linspace(0, 255, 17).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(17, -1, 3)
    found = np.asarray(_applied(transform, Image.fromarray(grid)))
    return int(np.abs(found.astype(int) - grid).max()) <= SAME


def _applied(transform: Any, image: Image.Image) -> Image.Image:
    found = ImageCms.applyTransform(image, transform)
    assert found is not None  # it is None where the picture itself is changed
    return found
