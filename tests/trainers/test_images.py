"""Pictures as phones, scanners, programs and enemies make them."""

from __future__ import annotations

import io
import os
import random
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainers.buckets import CropPlan, View, apply, plan_crop
from trainers.captions import read_caption, sidecar
from trainers.images import MAX_BYTES, BadImage, decode_layers, open_image

ORIENTATION = 0x0112


def squares(side: int = 16) -> np.ndarray:
    """-> (2 * side, 3 * side, 3) uint8: six coloured squares, no two alike, so that every turn shows."""
    colours = [[(255, 0, 0), (0, 255, 0), (0, 0, 255)], [(255, 255, 0), (0, 255, 255), (255, 255, 255)]]
    return np.repeat(np.repeat(np.array(colours, np.uint8), side, 0), side, 1)


def upright(stored: np.ndarray, orientation: int) -> np.ndarray:
    """EXIF's own definition, pixel by pixel: on which side of the scene the stored row 0 and column 0 lie."""
    height, width = stored.shape[:2]
    shape = (height, width, 3) if orientation < 5 else (width, height, 3)
    shown = np.zeros(shape, np.uint8)
    for r in range(height):
        for c in range(width):
            row, column = {
                1: (r, c),  # row 0 at the top, column 0 at the left
                2: (r, width - 1 - c),  # top, right
                3: (height - 1 - r, width - 1 - c),  # bottom, right
                4: (height - 1 - r, c),  # bottom, left
                5: (c, r),  # left, top
                6: (c, height - 1 - r),  # right, top
                7: (width - 1 - c, height - 1 - r),  # right, bottom
                8: (width - 1 - c, r),  # left, bottom
            }[orientation]
            shown[row, column] = stored[r, c]
    return shown


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpg", "webp"])
def test_exif_orientation(tmp_path: Path, orientation: int, kind: str) -> None:
    stored, path, exif = squares(), tmp_path / f"photo.{kind}", Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"png": {}, "jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}[kind]
    Image.fromarray(stored).save(path, exif=exif, **options)
    found, expected = np.asarray(open_image(path)), upright(stored, orientation)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= (8 if kind == "jpg" else 0)


def test_cmyk(tmp_path: Path) -> None:
    for name in ("red.jpg", "red.tif"):
        Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / name)
        red, green, blue = open_image(tmp_path / name).getpixel((4, 4))
        assert red > 240 > 20 > max(green, blue)


@pytest.mark.parametrize("name", ["grey.png", "grey.tif", "big_endian.tif"])
def test_sixteen_bits_keep_their_greys(tmp_path: Path, name: str) -> None:
    ramp = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(ramp.astype(">u2") if name.startswith("big") else ramp).save(tmp_path / name)
    grey = np.asarray(open_image(tmp_path / name))[..., 0]
    assert np.abs(grey - ramp / 257).max() <= 0.51
    assert len(np.unique(grey)) == 256


def test_floats_are_refused(tmp_path: Path) -> None:
    Image.new("F", (8, 8), 0.5).save(tmp_path / "depth.tif")
    with pytest.raises(BadImage, match=r"depth.tif cannot be used: .*floating-point"):
        open_image(tmp_path / "depth.tif")


def test_transparency_goes_onto_white(tmp_path: Path) -> None:
    clear_red = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    half_black = Image.new("LA", (8, 8), (0, 128))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    clear_red.save(tmp_path / "clear.png")
    half_black.save(tmp_path / "half.png")
    palette.save(tmp_path / "hole.png", transparency=1)
    palette.save(tmp_path / "solid.png")
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "colour_key.png", transparency=(9, 9, 9))
    assert open_image(tmp_path / "clear.png").getpixel((3, 3)) == (255, 255, 255)
    assert open_image(tmp_path / "half.png").getpixel((3, 3)) == (127, 127, 127)
    assert open_image(tmp_path / "hole.png").getpixel((3, 3)) == (255, 255, 255)
    assert open_image(tmp_path / "solid.png").getpixel((3, 3)) == (200, 0, 0)
    assert open_image(tmp_path / "colour_key.png").getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("colour_type", "samples", "clear"),
    [
        (0, [0x8012, 0x8013], [0x8012]),
        (2, [0x80FF, 0x0101, 0xFFFF, 0x1234, 0x0080, 0x7FFF], [0x80FF, 0x0101, 0xFFFF]),
    ],
)
def test_the_transparent_colour_of_sixteen_bits(
    tmp_path: Path, colour_type: int, samples: list[int], clear: list[int]
) -> None:
    """A PNG of two pixels by hand; the first has the colour that tRNS calls transparent."""
    row = b"\0" + struct.pack(f">{len(samples)}H", *samples)
    body = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, colour_type, 0, 0, 0))
    body += chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear))
    body += chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    path = tmp_path / "key.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    image, opacity = decode_layers(path.read_bytes(), path, "blue")
    assert opacity is not None
    assert [opacity.getpixel((x, 0)) for x in (0, 1)] == [0, 255]
    assert image.getpixel((0, 0)) == (0, 0, 255)
    assert image.getpixel((1, 0)) == ((128, 128, 128) if colour_type == 0 else (0x12, 0x00, 0x7F))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif"])
def test_the_first_frame_of_an_animation(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if name.endswith("webp") else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
    assert open_image(tmp_path / name).getpixel((3, 3)) == (255, 0, 0)


def test_every_mode_becomes_plain_rgb(tmp_path: Path) -> None:
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"):
        path = tmp_path / f"{mode}.tif"
        # Pillow 12.3 cannot read back the uncompressed YCbCr it writes; such files are JPEG inside in the wild
        Image.new(mode, (8, 6)).save(path, compression="jpeg" if mode == "YCbCr" else None)
        image = open_image(path)
        assert (image.mode, image.size, image.info) == ("RGB", (8, 6), {})


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG of that size as its header says; the pixels are whatever `data` holds."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


def jpeg(size: tuple[int, int] = (64, 64)) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


BAD = {
    "bomb.png": (png(13_000, 13_000), "over the limit of 64 million pixels"),
    "warned.png": (png(9_000, 9_000), "over the limit of 64 million pixels"),
    "just_over.png": (png(8_001, 8_000), "over the limit of 64 million pixels"),
    "hollow.png": (png(4_000, 4_000), "damaged"),
    "cut.jpg": (jpeg()[:1500], "damaged"),
    "header_only.jpg": (jpeg()[:20], "damaged"),
    "flat.webp": (b"RIFF\x04\0\0\0WEBP", "damaged"),
    "text.png": (b"not a picture at all", "damaged, or none of"),
    "script.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "damaged, or none of"),
    "empty.jpg": (b"", "the file is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named_with_the_reason(tmp_path: Path, name: str) -> None:
    data, reason = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadImage) as problem:
        open_image(tmp_path / name)
    assert str(problem.value).startswith(f"{name} cannot be used: ")
    assert reason in problem.value.reason
    assert str(tmp_path) not in str(problem.value)


def test_the_limit_holds_where_somebody_silenced_warnings(tmp_path: Path) -> None:
    (tmp_path / "over.png").write_bytes(BAD["just_over.png"][0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(BadImage, match="8001 x 8000 pixels is over the limit"):
            open_image(tmp_path / "over.png")


def test_files_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match=r"missing.jpg cannot be used: it cannot be read \(No such file"):
        open_image(tmp_path / "missing.jpg")
    with pytest.raises(BadImage, match="not an ordinary file"):
        open_image(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.jpg")
        with pytest.raises(BadImage, match="not an ordinary file"):
            open_image(tmp_path / "pipe.jpg")


def test_files_over_the_limit_are_refused(tmp_path: Path) -> None:
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.write(jpeg())
        file.truncate(MAX_BYTES + 1)  # sparse: takes no room
    with pytest.raises(BadImage, match="larger than 64 MB"):
        open_image(tmp_path / "huge.jpg")


def test_damage_anywhere_never_leaks_another_exception(tmp_path: Path) -> None:
    rng, path = random.Random(0), tmp_path / "hurt"
    originals = []
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        buffer = io.BytesIO()
        Image.fromarray(squares(4)).save(buffer, kind)
        originals.append(buffer.getvalue())
    refused = 0
    for round_ in range(600):
        data = bytearray(originals[round_ % len(originals)])
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(bytes(data[: rng.randint(len(data) // 2, len(data))] if round_ % 3 == 0 else data))
        try:
            assert open_image(path).mode == "RGB"
        except BadImage:
            refused += 1
    assert refused > 100


# --- crops --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("original", "resolution", "expected"),
    [
        ((600, 400), 200, CropPlan((300, 200), (50, 0, 250, 200))),
        ((400, 600), 200, CropPlan((200, 300), (0, 50, 200, 250))),
        ((100, 100), 200, CropPlan((200, 200), (0, 0, 200, 200))),
        ((3, 20_000), 512, CropPlan((512, 3_413_333), (0, 1_706_410, 512, 1_706_922))),
    ],
)
def test_centre_crop(original: tuple[int, int], resolution: int, expected: CropPlan) -> None:
    assert plan_crop(original, (resolution, resolution)) == expected


def test_random_crops_stay_inside_reach_both_ends_and_repeat() -> None:
    plans = [plan_crop((70, 64), (64, 64), random.Random(seed)) for seed in range(200)]
    assert {plan.box[0] for plan in plans} == set(range(7))
    assert all(plan.box[2] - plan.box[0] == plan.box[3] - plan.box[1] == 64 for plan in plans)
    assert plans == [plan_crop((70, 64), (64, 64), random.Random(seed)) for seed in range(200)]


def test_one_step_equals_scaling_then_cutting() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (90, 160, 3), np.uint8)
    image = Image.fromarray(noise)
    plan = plan_crop(image.size, (48, 48))
    slow = np.asarray(image.resize(plan.resized, Image.Resampling.LANCZOS).crop(plan.box)).astype(int)
    fast = np.asarray(apply(image, View(plan))).astype(int)
    assert np.abs(slow - fast)[:, 4:-4].max() <= 3  # at the cut the filter sees no further than the box
    mirrored = np.asarray(apply(image, View(plan, flip=True)))
    assert np.array_equal(mirrored, fast[:, ::-1])


def test_a_ribbon_needs_no_gigabytes() -> None:
    ribbon = Image.new("RGB", (40_000, 4))  # scaled whole to 1024 high it would be 10 million pixels wide
    assert apply(ribbon, View(plan_crop(ribbon.size, (1024, 1024)))).size == (1024, 1024)


def test_time_ids_are_height_first_and_follow_the_mirror() -> None:
    plan = CropPlan((300, 200), (30, 0, 230, 200))
    assert View(plan).time_ids((600, 400)) == (400, 600, 0, 30, 200, 200)
    assert View(plan, flip=True).time_ids((600, 400)) == (400, 600, 0, 70, 200, 200)
    tall = CropPlan((200, 300), (0, 30, 200, 230))
    assert View(tall).time_ids((400, 600)) == (600, 400, 30, 0, 200, 200)


# --- captions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "lines", "note"),
    [
        (b"a red dog\n", "a red dog", ""),
        (b"\xef\xbb\xbf  a red dog \r\n", "a red dog", ""),
        ("ein süßer Hund 🐶".encode(), "ein süßer Hund 🐶", ""),
        (b"\n\n a dog \n\n", "a dog", ""),
        (b"a dog\n\n a second line\n", "a dog\na second line", ""),
        (b"", None, "photo.txt is empty"),
        (b" \n\t\n", None, "photo.txt is empty"),
        ("süß".encode("latin-1"), None, "not UTF-8 text (byte 1)"),
        (b"a\0b", None, "is not text"),
        (b"x" * 70_000, None, "larger than 64 kB"),
    ],
)
def test_captions(tmp_path: Path, data: bytes, lines: str | None, note: str) -> None:
    path = sidecar(tmp_path / "photo.jpg")
    assert path.name == "photo.txt"
    path.write_bytes(data)
    caption = read_caption(path)
    assert caption.lines == tuple((lines or "").splitlines())
    assert caption.text == (caption.lines[0] if lines else None)
    assert caption.unreadable == (lines is None and "empty" not in note)
    assert note in caption.note
    assert bool(note) == bool(caption.note)
