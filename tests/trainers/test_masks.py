"""Masked loss: whose mask it is, how the latents see it, and that the loss looks where it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trainers.batches import weigh
from trainers.buckets import View, plan_crop
from trainers.caches import Encoded
from trainers.config_data import DataSettings
from trainers.dataset import Dataset, coverage, layers, read
from trainers.losses import dreambooth
from trainers.scan import scan

SIZE = (64, 64)


def scanned(folder: Path, **changes: Any) -> Dataset:
    table = {"images": folder, "prompt": "x", "masked_loss": True, **changes}
    return scan(DataSettings.model_validate(table), 64)


def picture(path: Path, mode: str = "RGB", size: tuple[int, int] = SIZE) -> Path:
    path.parent.mkdir(exist_ok=True)
    image = Image.new(mode, size, "red")
    if mode == "RGBA":
        image.putalpha(Image.new("L", size, 255).point(lambda v: v).crop((0, 0, *size)))
        image.paste((0, 0, 0, 0), (0, 0, size[0] // 2, size[1]))  # the left half is transparent
    image.save(path)
    return path


def mask(path: Path, size: tuple[int, int] = SIZE, box: tuple[int, int, int, int] = (0, 0, 32, 32)) -> Path:
    path.parent.mkdir(exist_ok=True)
    image = Image.new("L", size, 0)
    image.paste(255, box)
    image.save(path)
    return path


def test_where_a_mask_comes_from_and_which_comes_first(tmp_path: Path) -> None:
    folder, masks = tmp_path / "p", tmp_path / "masks"
    for name in ("a.jpg", "b.png", "c.png", "e.png"):
        picture(folder / name)
    picture(folder / "d.png", "RGBA")
    mask(folder / "a.mask.png")
    mask(masks / "a.png")
    mask(folder / "b-masklabel.png")
    mask(masks / "c.png")
    mask(folder / "stray.mask.png")
    dataset = scanned(folder, masks=masks)
    found = {e.path.name: (e.masked, e.mask and e.mask.relative_to(tmp_path)) for e in dataset.instances}
    assert found == {
        "a.jpg": (True, Path("p/a.mask.png")),
        "b.png": (True, Path("p/b-masklabel.png")),
        "c.png": (True, Path("masks/c.png")),
        "d.png": (True, None),  # its own transparency
        "e.png": (False, None),
    }
    (report,) = dataset.reports
    assert report.unmasked == ["e.png"]
    assert report.masks == ["stray.mask.png"]
    assert "Without a mask, so learnt whole: e.png." in str(report)


def test_masks_are_never_learnt_as_pictures(tmp_path: Path) -> None:
    picture(tmp_path / "p" / "a.png")
    mask(tmp_path / "p" / "a.mask.png")
    dataset = scanned(tmp_path / "p", masked_loss=False)
    assert [e.path.name for e in dataset.instances] == ["a.png"]
    assert not dataset.instances[0].masked
    assert "Masks that are not used: a.mask.png." in str(dataset.reports[0])


def test_masks_that_do_not_fit_are_named(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png", "ok1.png", "ok2.png", "ok3.png"):
        picture(tmp_path / "p" / name)
    mask(tmp_path / "p" / "a.mask.png", (64, 32))
    mask(tmp_path / "p" / "b.mask.png", box=(0, 0, 0, 0))
    (tmp_path / "p" / "c.mask.png").write_bytes(b"no picture")
    mask(tmp_path / "p" / "ok1.mask.png", (128, 128))  # larger, of the same shape
    (report,) = scanned(tmp_path / "p").reports
    assert "a.mask.png has another shape (64 x 32) than the picture (64 x 64)" in report.bad["a.png"]
    assert "black everywhere" in report.bad["b.png"]
    assert report.bad["c.png"].startswith("it is damaged")
    assert report.used == ["ok1.png", "ok2.png", "ok3.png"]


@pytest.mark.parametrize("flip", [False, True])
def test_the_latents_see_the_mean_of_their_pixels(flip: bool) -> None:
    """A mask cut and mirrored with its picture; against a loop."""
    values = np.random.default_rng(0).integers(0, 256, (64, 96), np.uint8)
    view = View(plan_crop((96, 64), (64, 64)), flip)
    found = coverage(Image.fromarray(values), view, (16, 8))
    cut = values[:, 16:80]
    cut = cut[:, ::-1] if flip else cut
    for row in range(16):
        for column in range(8):
            mean = cut[4 * row : 4 * row + 4, 8 * column : 8 * column + 8].mean() / 255
            assert float(found[0, row, column]) == pytest.approx(mean, abs=1e-6)


def test_transparency_is_a_mask_and_has_the_background_behind_it(tmp_path: Path) -> None:
    picture(tmp_path / "p" / "a.png", "RGBA")
    (example,) = scanned(tmp_path / "p", background="#0000ff").instances
    image, opacity = layers(example, read(example))
    assert image.getpixel((5, 5)) == (0, 0, 255)
    assert image.getpixel((60, 5)) == (255, 0, 0)
    assert opacity is not None
    seen = coverage(opacity, example.views()[0], (8, 8))[0]
    assert seen[:, :4].max() == 0
    assert seen[:, 4:].min() == 1
    (plain,) = scanned(tmp_path / "p", masked_loss=False).instances
    assert layers(plain, read(plain))[1] is None


def test_weights_are_the_floor_outside_and_one_on_average() -> None:
    half = torch.zeros(1, 4, 4)
    half[..., 2:] = 1
    latents = torch.zeros(4, 4, 4)
    weight = weigh([Encoded(latents, latents, half), Encoded(latents, latents)], 0.1)
    assert torch.allclose(weight[0, 0, :, 0], torch.full((4,), 0.1 / 0.55))
    assert torch.allclose(weight[0, 0, :, 3], torch.full((4,), 1 / 0.55))
    assert torch.equal(weight[1], torch.ones(1, 4, 4))
    nothing = weigh([Encoded(latents, latents, torch.zeros(1, 4, 4))], 0.0)
    assert torch.equal(nothing, torch.zeros(1, 1, 4, 4))


def test_the_loss_is_the_weighted_mean_of_each_picture() -> None:
    g = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn(3, 4, 5, 6, generator=g) for _ in range(2))
    mask_of, weight = torch.rand(3, 1, 5, 6, generator=g), torch.tensor([1.0, 0.5, 2.0])
    mask_of = mask_of / mask_of.mean((2, 3), keepdim=True)
    each = []
    for i in range(3):
        total, area = 0.0, 0.0
        for row in range(5):
            for column in range(6):
                m = float(mask_of[i, 0, row, column])
                error = (prediction[i, :, row, column] - target[i, :, row, column]).square().mean()
                total, area = total + m * float(error), area + m
        each.append(total / area * float(weight[i]))
    found = dreambooth(prediction, target, weight, mask_of)
    assert float(found) == pytest.approx(sum(each), rel=1e-5)
    plain = (prediction - target).square().mean((1, 2, 3)) @ weight
    assert torch.equal(plain, dreambooth(prediction, target, weight, torch.ones(3, 1, 5, 6)))
