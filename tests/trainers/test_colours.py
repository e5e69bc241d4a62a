"""Pictures with colour profiles, against the formulas of the ICC, IEC 61966-2-1 and CIE written out."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainers import presets
from trainers.config_data import DataSettings
from trainers.images import BadImage, decode_mask, open_image
from trainers.look import look
from trainers.scan import scan

D50, D65 = np.array([0.9642, 1.0, 0.8249]), np.array([0.95047, 1.0, 1.08883])
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
SRGB = [(0.64, 0.33), (0.30, 0.60), (0.15, 0.06)]
P3 = [(0.680, 0.320), (0.265, 0.690), (0.150, 0.060)]
ADOBE = [(0.64, 0.33), (0.21, 0.71), (0.15, 0.06)]


def to_xyz(primaries: list[tuple[float, float]]) -> np.ndarray:
    """-> 3 x 3 from linear RGB with a white of D65 to XYZ with one of D50."""
    columns = np.array([(x / y, 1.0, (1 - x - y) / y) for x, y in primaries]).T
    columns = columns * np.linalg.solve(columns, D65)
    cones = np.diag((BRADFORD @ D50) / (BRADFORD @ D65))
    return np.linalg.inv(BRADFORD) @ cones @ BRADFORD @ columns


def linear(encoded: np.ndarray) -> np.ndarray:
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def encoded(light: np.ndarray) -> np.ndarray:
    light = light.clip(0, 1)
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def as_srgb(xyz: np.ndarray) -> np.ndarray:
    """XYZ with a white of D50 -> 0 to 255."""
    return 255 * encoded(xyz @ np.linalg.inv(to_xyz(SRGB)).T)


def lab_to_xyz(lab: np.ndarray) -> np.ndarray:
    y = (lab[..., 0] + 16) / 116
    f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], -1)
    return np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * D50


def profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of version 2, byte by byte."""
    count = struct.pack(">I", len(tags))
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += b"\0" * (-len(data) % 4)
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    size = start + len(body)
    header = struct.pack(">I4xI", size, 0x02400000) + kind + space + connection + b"\0" * 12 + b"acsp"
    header += b"\0" * 28 + struct.pack(">3i", *(round(v * 65536) for v in D50))
    return header.ljust(128, b"\0") + count + table + body


def numbers(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(f">{len(values)}i", *(round(v * 65536) for v in values))


def gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))


def curve() -> bytes:
    """sRGB's, as a table."""
    table = np.rint(65535 * linear(np.linspace(0, 1, 1024))).astype(">u2")
    return b"curv\0\0\0\0" + struct.pack(">I", len(table)) + table.tobytes()


def of_rgb(primaries: list[tuple[float, float]], trc: bytes) -> bytes:
    columns = {
        name: numbers(*column)
        for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), to_xyz(primaries).T, strict=True)
    }
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), trc)
    return profile(b"mntr", b"RGB ", b"XYZ ", {b"wtpt": numbers(*D50), **columns, **curves})


def of_grey(value: float) -> bytes:
    return profile(b"mntr", b"GRAY", b"XYZ ", {b"wtpt": numbers(*D50), b"kTRC": gamma(value)})


def ink(corner: np.ndarray) -> np.ndarray:
    """Full or no C, M, Y, K -> Lab of a press that exists nowhere."""
    c, m, y, k = np.moveaxis(corner, -1, 0)
    light = (1 - k) * (100 - 40 * c - 45 * m - 10 * y).clip(0)
    chroma = (1 - k) * np.stack([-30 * c + 60 * m, -40 * c + 80 * y], 0)
    return np.concatenate([light[..., None], np.moveaxis(chroma, 0, -1)], -1)


def of_cmyk() -> bytes:
    """A table of the sixteen corners (mft1), linear in between."""
    corners = np.array([[i >> 3 & 1, i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(16)], float)
    table = np.rint(ink(corners) * [2.55, 1, 1] + [0, 128, 128]).astype(np.uint8)
    straight = bytes(range(256))
    head = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + numbers(1, 0, 0, 0, 1, 0, 0, 0, 1)[8:]
    return profile(
        b"prtr",
        b"CMYK",
        b"Lab ",
        {b"wtpt": numbers(*D50), b"A2B0": head + straight * 4 + table.tobytes() + straight * 3},
    )


def colours(channels: int = 3) -> np.ndarray:
    """-> (32, 32, channels) uint8."""
    return np.random.default_rng(5).integers(0, 256, (32, 32, channels), np.uint8)


def apart(picture: Image.Image, expected: np.ndarray) -> float:
    assert picture.mode == "RGB"
    return float(np.abs(np.asarray(picture, float) - expected).max())


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif"])
def test_a_phone_and_a_camera(tmp_path: Path, kind: str) -> None:
    shown = np.repeat(np.repeat(colours()[::4, ::4], 8, 0), 8, 1)  # JPEG keeps even squares of eight
    options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(kind, {})
    for primaries, trc, light in (
        (P3, curve(), linear(shown / 255)),
        (ADOBE, gamma(563 / 256), (shown / 255) ** (563 / 256)),
    ):
        path = tmp_path / f"photo.{kind}"
        Image.fromarray(shown).save(path, icc_profile=of_rgb(primaries, trc), **options)
        expected = as_srgb(light @ to_xyz(primaries).T)
        assert np.abs(expected - shown).max() > 30
        assert apart(open_image(path), expected) <= (12 if kind == "jpg" else 3)


def test_srgb_in_other_words_keeps_every_bit(tmp_path: Path) -> None:
    for trc in (
        curve(),
        b"para\0\0\0\0"
        + struct.pack(
            ">HH5i", 3, 0, *(round(v * 65536) for v in (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045))
        ),
    ):
        Image.fromarray(colours()).save(tmp_path / "a.png", icc_profile=of_rgb(SRGB, trc))
        assert apart(open_image(tmp_path / "a.png"), colours()) == 0


def test_grey(tmp_path: Path) -> None:
    """Of 8 and of 16 bits, with a grey profile, and with that of a screen, which has greys too."""
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = 255 * encoded((ramp / 255.0) ** 1.8)[..., None].repeat(3, -1)
    for stored in (ramp, ramp.astype(np.uint16) * 257):
        for made in (of_grey(1.8), of_rgb(P3, gamma(1.8))):
            Image.fromarray(stored).save(tmp_path / "grey.png", icc_profile=made)
            assert apart(open_image(tmp_path / "grey.png"), expected) <= 2


@pytest.mark.parametrize("kind", ["jpg", "tif"])
def test_print(tmp_path: Path, kind: str) -> None:
    corners = np.array([[i >> 3 & 1, i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(16)], float)
    shown = (255 * corners.reshape(4, 4, 4)).astype(np.uint8).repeat(16, 0).repeat(16, 1)
    options = {"quality": 100, "subsampling": 0} if kind == "jpg" else {}
    Image.fromarray(shown, "CMYK").save(tmp_path / f"a.{kind}", icc_profile=of_cmyk(), **options)
    expected = as_srgb(lab_to_xyz(ink(shown / 255)))
    assert apart(open_image(tmp_path / f"a.{kind}"), expected) <= 4
    Image.fromarray(shown, "CMYK").save(tmp_path / f"a.{kind}", **options)
    assert apart(open_image(tmp_path / f"a.{kind}"), expected) > 60


def test_lab_needs_no_profile(tmp_path: Path) -> None:
    lab = np.stack(np.meshgrid([60, 128, 200], [-12, 0, 12], [-12, 0, 12]), -1).reshape(3, 9, 3)
    Image.fromarray(lab.astype(np.int8).view(np.uint8), "LAB").save(tmp_path / "a.tif")
    expected = as_srgb(lab_to_xyz(lab * [100 / 255, 1, 1]))
    assert apart(open_image(tmp_path / "a.tif"), expected) <= 3


def test_transparency_stays(tmp_path: Path) -> None:
    """Of pixels, and of the one colour of a palette; the paper is white, not what white is in the profile."""
    opacity = np.full((32, 32, 1), 255, np.uint8)
    opacity[:, 16:] = 0
    rgba = np.concatenate([colours(), opacity], -1)
    Image.fromarray(rgba).save(tmp_path / "a.png", icc_profile=of_rgb(P3, curve()))
    expected = as_srgb(linear(colours() / 255) @ to_xyz(P3).T)
    expected[:, 16:] = 255
    assert apart(open_image(tmp_path / "a.png"), expected) <= 3

    palette = Image.fromarray((np.arange(64) % 2).astype(np.uint8).reshape(8, 8), "P")
    palette.putpalette([0, 0, 0, 200, 40, 40])
    palette.save(tmp_path / "b.png", transparency=0, icc_profile=of_rgb(P3, curve()))
    red = as_srgb(linear(np.array([200, 40, 40]) / 255) @ to_xyz(P3).T)
    expected = np.where(np.asarray(palette)[..., None] == 0, 255, red)
    assert apart(open_image(tmp_path / "b.png"), expected) <= 3


def test_a_mask_has_numbers_and_no_colours(tmp_path: Path) -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "mask.png", icc_profile=of_grey(1.0))
    found = decode_mask((tmp_path / "mask.png").read_bytes(), tmp_path / "mask.png")
    assert np.array_equal(np.asarray(found), ramp)


def test_what_cannot_be_used_is_said(tmp_path: Path) -> None:
    """Another kind of picture's, and a damaged one: the picture is used as it is; report and look name it."""
    folder = tmp_path / "photos"
    folder.mkdir()
    shown = Image.fromarray(colours()).resize((64, 64))
    for name, made in (
        ("fine", of_rgb(P3, curve())),
        ("print", of_cmyk()),
        ("torn", of_rgb(P3, curve())[:200]),
    ):
        shown.save(folder / f"{name}.png", icc_profile=made)
    (report,) = scan(DataSettings(images=folder, prompt="a photo of sks dog"), 64).reports
    assert report.used == ["fine.png", "print.png", "torn.png"]
    assert list(report.colours) == ["print.png", "torn.png"]
    odd = [line for line in report.lines() if "profile" in line]
    assert odd[0] == (
        "The colour profile of print.png is not used, its colours are read as sRGB: it is for CMYK, and the picture "
        "is RGB. If they look wrong, save the picture as sRGB."
    )
    assert "torn.png is not used, its colours are read as sRGB: it is damaged (" in odd[1]
    for name in ("print", "torn"):
        assert apart(open_image(folder / f"{name}.png"), np.asarray(shown)) == 0
    wanted = [f"data.images={json.dumps(str(folder))}", "data.prompt=a photo of sks dog"]
    facts = look(presets.load("demo", wanted), tmp_path / "look")
    assert [line.replace("photos/", "") for line in facts["warnings"] if "profile" in line] == odd


def test_damage_anywhere_is_no_other_error(tmp_path: Path) -> None:
    rng, path = random.Random(3), tmp_path / "a.png"
    for made in (of_rgb(P3, curve())[:3000], of_rgb(P3, gamma(2.2)), of_grey(1.8), of_cmyk()):
        mode = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}[made[16:20]]
        for _ in range(60):
            spoilt = bytearray(made)
            for _ in range(rng.randint(1, 8)):
                spoilt[rng.randrange(len(spoilt))] = rng.randrange(256)
            target = path.with_suffix(".tif") if mode == "CMYK" else path
            Image.new(mode, (4, 4)).save(target, icc_profile=bytes(spoilt))
            try:
                assert open_image(target).mode == "RGB"
            except BadImage as problem:
                pytest.fail(str(problem))
