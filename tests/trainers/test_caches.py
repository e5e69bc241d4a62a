"""Cached latents are the VAE's own, bit for bit; whatever happens to a file is found."""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lora_core.errors import ConfigError, NotFinite
from lora_core.safe_files import read_header, save_tensors
from tests.small_models import small_pipeline
from trainers.batches import Feeder
from trainers.buckets import View
from trainers.caches import LatentCache, draw_latents, encoding, posterior, view_key
from trainers.config_data import DataSettings
from trainers.dataset import Bytes, Dataset, Example, layers, pixels, read
from trainers.kept_tensors import KeptTensors, weights_identity
from trainers.scan import scan


def photos(folder: Path, count: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 255, (12, 16, 3), np.uint8)
        Image.fromarray(noise).resize((96, 72)).save(folder / f"{i}.png")
    return folder


def dataset_of(folder: Path, **changes: Any) -> Dataset:
    return scan(DataSettings.model_validate({"images": folder, "prompt": "x", **changes}), 64)


def all_keys(cache: LatentCache, dataset: Dataset) -> list[str]:
    return [cache.key(e, view) for e in dataset.examples for view in e.views()]


def everything(cache: LatentCache, dataset: Dataset) -> list[Any]:
    return [cache.encoded(e, view) for e in dataset.examples for view in e.views()]


def mean_std(cache: LatentCache, dataset: Dataset) -> tuple[Tensor, Tensor]:
    found = everything(cache, dataset)
    return torch.stack([e.mean for e in found]), torch.stack([e.std for e in found])


def sampled(cache: LatentCache, dataset: Dataset, generator: torch.Generator | None = None) -> Tensor:
    return draw_latents(cache.vae, *mean_std(cache, dataset), generator)


def picture(example: Example, view: View) -> Tensor:
    return pixels(layers(example, read(example))[0], view)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_cached_equals_uncached(tmp_path: Path, family: str) -> None:
    vae = small_pipeline(family).vae
    dataset = dataset_of(photos(tmp_path / "photos"), flip=True)
    built = LatentCache(tmp_path / "cache", vae)
    assert built.fill(dataset).built == 4
    from_disk = LatentCache(tmp_path / "cache", vae)
    report = from_disk.fill(dataset)
    assert (report.found, report.built, report.rebuilt, report.unsaved) == (4, 0, [], {})
    for example in dataset.examples:
        for view in example.views():
            with torch.no_grad():
                found = vae.encode(picture(example, view)[None]).latent_dist
            for cache in (built, from_disk):
                kept = cache.encoded(example, view)
                assert torch.equal(kept.mean[None], found.mean)
                assert torch.equal(kept.std[None], found.std)
                assert kept.mask is None
    assert len(set(all_keys(built, dataset))) == 4


def test_a_sample_is_that_of_diffusers(tmp_path: Path) -> None:
    """Same noise, same latents: `latent_dist.sample` draws eps as one tensor from the same generator."""
    vae = small_pipeline("sd1").vae
    dataset = dataset_of(photos(tmp_path / "photos"))
    cache = LatentCache(tmp_path / "cache", vae)
    cache.fill(dataset)
    z = sampled(cache, dataset, torch.Generator().manual_seed(4))
    images = torch.stack([picture(e, e.views()[0]) for e in dataset.examples])
    with torch.no_grad():
        expected = vae.encode(images).latent_dist.sample(torch.Generator().manual_seed(4)) * 0.18215
        mean, std = posterior(vae, images)
        uncached = draw_latents(vae, mean, std, torch.Generator().manual_seed(4))
    torch.testing.assert_close(z, expected, rtol=1e-4, atol=1e-5)  # one picture at a time against a batch
    torch.testing.assert_close(uncached, expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(z, sampled(cache, dataset, torch.Generator().manual_seed(5)))


def test_another_picture_crop_or_vae_is_another_latent(tmp_path: Path) -> None:
    folder, vae = photos(tmp_path / "photos", 1), small_pipeline("sd1").vae
    LatentCache(tmp_path / "cache", vae).fill(dataset_of(folder))
    assert LatentCache(tmp_path / "cache", vae).fill(dataset_of(folder)).found == 1
    assert LatentCache(tmp_path / "cache", vae).fill(dataset_of(folder, flip=True)).built == 1
    larger = scan(DataSettings(images=folder, prompt="x"), 72)
    assert LatentCache(tmp_path / "cache", vae).fill(larger).built == 1
    Image.open(folder / "0.png").rotate(180).save(folder / "0.png")
    assert LatentCache(tmp_path / "cache", vae).fill(dataset_of(folder)).built == 1
    with torch.no_grad():
        vae.encoder.conv_in.bias[0] += 1e-3
    assert LatentCache(tmp_path / "cache", vae).fill(dataset_of(folder)).built == 1


def test_whatever_decides_a_latent_makes_another_key_alone(tmp_path: Path) -> None:
    (example,) = dataset_of(photos(tmp_path / "photos", 1)).examples
    (view,), data, vae = example.views(), read(example), small_pipeline("sd1").vae
    plan, settings = view.plan, example.source.settings
    left, top, right, bottom = plan.box

    def key(example: Example = example, view: View = view, data: Bytes = data, vae: Any = vae) -> str:
        return view_key(example, view, data, weights_identity(vae))

    masked = replace(example, masked=True)
    on_blue = replace(example.source, settings=settings.model_copy(update={"background": "#0000ff"}))
    moved, wider = replace(plan, box=(left + 1, top, right + 1, bottom)), replace(plan, resized=(96, 73))
    found = {
        "as it is": key(),
        "bytes": key(data=Bytes(data.picture + b" ", None)),
        "place": key(view=View(moved)),
        "size": key(view=View(wider)),
        "mirrored": key(view=View(plan, flip=True)),
        "opacity as mask": key(masked),
        "a mask": key(masked, data=Bytes(data.picture, b"1")),
        "another mask": key(masked, data=Bytes(data.picture, b"2")),
        "background": key(replace(example, source=on_blue)),
        "another vae": key(vae=small_pipeline("sd1", seed=1).vae),
        "another precision": key(vae=small_pipeline("sd1", dtype=torch.bfloat16).vae),
    }
    assert len(set(found.values())) == len(found)
    assert key() == found["as it is"]


def test_every_turn_draws_anew_from_what_is_kept(tmp_path: Path) -> None:
    """z of two turns of one picture, taken back to the noise: the generator's own, and another each time."""
    vae = small_pipeline("sd1").vae
    dataset = dataset_of(photos(tmp_path / "photos", 1))
    cache = LatentCache(tmp_path / "cache", vae)
    cache.fill(dataset)
    feeder = Feeder(dataset, vae, cache, batch_size=1, seed=0)
    (one,), (other,) = feeder.next(torch.Generator().manual_seed(4), 1000, 2)
    kept, generator = cache.encoded(dataset.examples[0], dataset.examples[0].views()[0]), torch.Generator()
    generator.manual_seed(4)
    for batch in (one, other):
        noise = (batch.z / vae.config.scaling_factor - kept.mean) / kept.std
        torch.testing.assert_close(noise, torch.randn(noise.shape, generator=generator), rtol=1e-3, atol=1e-3)
        assert torch.equal(batch.eps, torch.randn(batch.eps.shape, generator=generator))
        assert torch.equal(batch.t, torch.randint(1000, (1,), generator=generator))
    assert not torch.equal(one.z, other.z)


def test_a_renamed_picture_is_the_same_latent_and_twins_share_one(tmp_path: Path) -> None:
    folder, vae = photos(tmp_path / "photos", 1), small_pipeline("sd1").vae
    LatentCache(tmp_path / "cache", vae).fill(dataset_of(folder))
    (folder / "twin.png").write_bytes((folder / "0.png").read_bytes())
    (folder / "0.png").rename(folder / "renamed.png")
    dataset = dataset_of(folder)
    cache = LatentCache(tmp_path / "cache", vae)
    assert cache.fill(dataset).built == 0
    assert len(set(all_keys(cache, dataset))) == 1


def test_damaged_files_are_built_again_and_named(tmp_path: Path) -> None:
    dataset, vae = dataset_of(photos(tmp_path / "photos", 4)), small_pipeline("sd1").vae
    cache = LatentCache(tmp_path / "cache", vae)
    cache.fill(dataset)
    whole = mean_std(cache, dataset)
    files = [tmp_path / "cache" / f"{key}.safetensors" for key in all_keys(cache, dataset)]
    data = bytearray(files[0].read_bytes())
    data[-5] ^= 4
    files[0].write_bytes(bytes(data))
    files[1].write_bytes(files[1].read_bytes()[:-8])
    files[2].write_bytes(files[3].read_bytes())  # a whole file, but another picture's
    again = LatentCache(tmp_path / "cache", vae)
    report = again.fill(dataset)
    assert (report.rebuilt, report.built, report.found) == (["0.png", "1.png", "2.png"], 3, 1)
    assert all(torch.equal(a, b) for a, b in zip(whole, mean_std(again, dataset), strict=True))
    assert LatentCache(tmp_path / "cache", vae).fill(dataset).found == 4


def test_every_one_of_1000_flipped_bits_is_found(tmp_path: Path) -> None:
    dataset, vae = dataset_of(photos(tmp_path / "photos", 1)), small_pipeline("sd1").vae
    cache = LatentCache(tmp_path / "cache", vae)
    cache.fill(dataset)
    (key,) = all_keys(cache, dataset)
    files = KeptTensors(tmp_path / "cache")
    path = files.path(key)
    data, rng = path.read_bytes(), random.Random(0)
    assert files.load(key) is not None
    header = 8 + int.from_bytes(data[:8], "little")
    # every second one in the header, which is small and full of meaning
    bits = [rng.randrange(8 * (header if i % 2 else len(data))) for i in range(1000)]
    missed = []
    for bit in bits:
        hurt = bytearray(data)
        hurt[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(hurt))
        if files.load(key) is not None:
            missed.append(bit)
    assert missed == []


def test_the_same_bytes_in_another_shape_or_type_are_not_the_same(tmp_path: Path) -> None:
    files, kept = KeptTensors(tmp_path), {"mean": torch.randn(4, 8, 6), "std": torch.rand(4, 8, 6)}
    files.save("key", kept)
    assert files.load("key") is not None
    shutil.copyfile(files.path("key"), files.path("other"))
    assert files.load("other") is None
    sums = read_header(files.path("key")).metadata
    for changed in (kept["mean"].reshape(4, 6, 8), kept["mean"].view(torch.int32)):
        save_tensors(files.path("key"), {**kept, "mean": changed}, sums)
        assert files.load("key") is None


def test_sdxl_in_half_precision_encodes_in_fp32_and_is_half_again(tmp_path: Path) -> None:
    vae = small_pipeline("sdxl", dtype=torch.float16).vae
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    dataset = dataset_of(photos(tmp_path / "photos", 1))
    cache = LatentCache(tmp_path / "cache", vae)
    cache.fill(dataset)
    after = vae.state_dict()
    assert all(
        after[name].dtype == torch.float16 and torch.equal(after[name], t) for name, t in before.items()
    )
    wide = small_pipeline("sdxl").vae.to(torch.float16).to(torch.float32)
    (example,) = dataset.examples
    with torch.no_grad():
        expected = wide.encode(picture(example, example.views()[0])[None]).latent_dist
    mean, std = mean_std(cache, dataset)
    assert torch.equal(mean, expected.mean)
    assert torch.equal(std, expected.std)


def test_the_dtype_comes_back_after_an_error() -> None:
    vae = small_pipeline("sdxl", dtype=torch.float16).vae.train()
    inside = []

    def encode_five_channels() -> None:
        with encoding(vae):
            inside.append((vae.dtype, vae.training))
            posterior(vae, torch.zeros(1, 5, 64, 64))

    with pytest.raises(RuntimeError, match="channels"):
        encode_five_channels()
    assert inside == [(torch.float32, False)]
    assert vae.dtype == torch.float16
    assert vae.training


def test_identity_tells_precisions_and_weights_apart() -> None:
    vae = small_pipeline("sd1").vae
    assert weights_identity(vae) == weights_identity(small_pipeline("sd1").vae)
    assert weights_identity(vae) != weights_identity(small_pipeline("sd1", seed=1).vae)
    assert weights_identity(vae) != weights_identity(small_pipeline("sd1", dtype=torch.bfloat16).vae)


def test_a_folder_that_cannot_be_written_costs_only_the_next_run(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file stands where the folder should be", encoding="utf-8")
    dataset, vae = dataset_of(photos(tmp_path / "photos")), small_pipeline("sd1").vae
    cache = LatentCache(tmp_path / "cache", vae)
    report = cache.fill(dataset)
    assert list(report.unsaved) == ["0.png", "1.png"]
    assert "could not be saved" in report.unsaved["0.png"]
    assert sampled(cache, dataset).shape == (2, 4, 7, 9)  # 72 x 56: the bucket of 96 x 72


def test_an_overflowing_vae_is_named_with_the_remedy(tmp_path: Path) -> None:
    vae = small_pipeline("sd1").vae
    with torch.no_grad():
        vae.quant_conv.bias[0] = float("inf")
    cache = LatentCache(tmp_path / "cache", vae)
    with pytest.raises(NotFinite, match=r'NaN or Inf of 0.png .* train.base_dtype = "fp32"'):
        cache.fill(dataset_of(photos(tmp_path / "photos")))
    assert list((tmp_path / "cache").iterdir()) == []


def test_refusals(tmp_path: Path) -> None:
    vae = small_pipeline("sd1").vae
    folder = photos(tmp_path / "photos")
    cache = LatentCache(tmp_path / "cache", vae)
    with pytest.raises(ConfigError, match=r"train\.cache_latents = false"):
        cache.fill(dataset_of(folder, crop="random"))
    dataset = dataset_of(folder)
    with pytest.raises(ValueError, match="was not cached"):
        cache.key(dataset.examples[0], dataset.examples[0].views()[0])
    Image.new("RGB", (80, 64)).save(folder / "0.png")
    with pytest.raises(ConfigError, match=r"0.png is another picture"):
        cache.fill(dataset)
    vae.register_to_config(shift_factor=0.1)
    with pytest.raises(ConfigError, match="shift_factor"):
        LatentCache(tmp_path / "cache", vae)


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    dataset = dataset_of(photos(tmp_path / "photos", 3))
    LatentCache(tmp_path / "cache", small_pipeline("sd1").vae).fill(dataset, lambda *at: told.append(at))
    assert told == [(1, 3), (2, 3), (3, 3)]
