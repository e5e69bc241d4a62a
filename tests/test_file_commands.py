"""launch.py's commands on files: what they write is what the library makes, and what they say of it is measured here
anew, by dense arithmetic on what they wrote."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import launch
from lora_core import (
    Adapter,
    LivePipeline,
    LoraConfig,
    attach,
    bake,
    collect,
    combine,
    detach,
    extract,
    layers_of,
    open_base,
    read_adapter,
    resize,
    write_adapter,
)
from lora_core.baking import FROM as BAKED_FROM
from lora_core.combination import FROM, METHODS
from lora_core.deltas.bias import WithBias
from lora_core.deltas.full import Full
from lora_core.deltas.low_rank import LowRank
from lora_core.looking import look
from lora_core.lower_rank import LEFT_OUT
from lora_core.mix import AdapterWeight
from lora_core.named_mixes import save_mix
from tests.lora_core.kinds_by_hand import KINDS, adapter_of, wearers
from tests.lora_core.opening import assert_same_weights
from tests.lora_core.test_pipeline import random_adapter
from tests.small_models import save_folder, save_ldm_single_file, small_pipeline


class Place(NamedTuple):
    base: Path
    single: Path  # in one file, with a vocabulary that needs no file
    loras: Path
    layers: dict[str, nn.Module]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A base and LoRAs of every kind for it."""
    folder = tmp_path_factory.mktemp("files")
    pipe = small_pipeline("sd1")
    live = LivePipeline(pipe)
    made = {kind.replace(" ", "_"): some(adapter_of(live, kind, 1)) for kind in KINDS if kind != "low rank"}
    made |= {
        "ink": random_adapter(live, 1, targets=("attn2.to_k", "conv1")),
        "cat": random_adapter(live, 2, targets=("attn2.to_k", "attn1.to_q")),
        "dora": random_adapter(live, 3, targets=("attn2.to_k", "attn1.to_q"), variant="dora"),
        "biased": some(adapter_of(live, "low rank", 6, biases="beside")),
    }
    for kind in ("loha", "lokr"):
        made[kind] = collected(live.models["unet"], kind)
    for name, adapter in made.items():
        write_adapter(adapter, folder / f"{name}.safetensors")
    return Place(
        save_folder(pipe, folder / "base"),
        save_ldm_single_file(small_pipeline("sd1", clip_vocabulary=True), folder / "base.safetensors"),
        folder,
        wearers(live),
    )


def some(adapter: Adapter) -> Adapter:
    """Every fifth layer, and the embeddings: convolutions, linear layers and norms of UNet and text encoder."""
    kept = {p: d for i, (p, d) in enumerate(adapter.deltas.items()) if i % 5 == 0 or "_embedding" in p}
    return Adapter(kept)


def collected(unet: nn.Module, kind: str) -> Adapter:
    config = LoraConfig(kind=kind, rank=2, alpha=3, init="random", targets=("to_k", "conv2"))
    form = attach(unet, config, generator=torch.Generator().manual_seed(4))
    try:
        return collect(form)
    finally:
        detach(form)


def run(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> tuple[str, str]:
    """-> stdout, stderr."""
    capsys.readouterr()
    found = launch.main([str(word) for word in words])
    said = capsys.readouterr()
    assert found == code, said.err
    return said.out, said.err


def told(said: str) -> float:
    """The error that a command reported."""
    return float(re.findall(r"error \|dW - dW'\| / \|dW\| = ([\d.e+-]+)", said)[-1])


def dense(adapter: Adapter, path: str, layer: Any) -> torch.Tensor:
    delta = adapter.deltas.get(path)
    change = delta.inner if isinstance(delta, WithBias) else delta
    weight = layer.weight.detach()
    return torch.zeros_like(weight, dtype=torch.float64) if change is None else change.delta(weight).double()


def error(before: list[tuple[Adapter, float]], after: Adapter, place: Place) -> float:
    gone = whole = 0.0
    for path, layer in place.layers.items():
        old = torch.stack([w * dense(a, path, layer) for a, w in before]).sum(0)
        gone += float((old - dense(after, path, layer)).square().sum())
        whole += float(old.square().sum())
    return (gone / whole) ** 0.5


# --- convert -------------------------------------------------------------------------------------------------


def test_through_all_spellings_and_back_are_the_same_tensors(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = place.loras / "ink.safetensors"
    steps = [
        (source, "a.safetensors", "diffusers"),
        ("a.safetensors", "b", "peft"),
        ("b", "c.safetensors", "kohya"),
    ]
    for before, after, spelling in steps:
        said, _ = run(capsys, "--convert", tmp_path / before, tmp_path / after, "--to", spelling)
        assert told(said) == 0
    first, last = load_file(source), load_file(tmp_path / "c.safetensors")
    assert first.keys() == last.keys()
    assert all(torch.equal(t, last[key]) for key, t in first.items())
    assert look(tmp_path / "b").spelling == "peft"


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ["ink", "dora", "lokr", "turning"])
def test_another_dtype_and_what_it_loses(
    name: str, dtype: str, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = place.loras / f"{name}.safetensors", tmp_path / "x.safetensors"
    said, _ = run(capsys, "--convert", source, out, "--to", "kohya", "--dtype", dtype, "--base", place.base)
    before, after = read_adapter(source), read_adapter(out)
    assert told(said) == pytest.approx(error([(before, 1.0)], after, place), rel=0.02)
    assert 1e-5 < told(said) < (0.002 if dtype == "fp16" else 0.02)
    wide = {str(t.dtype) for t in load_file(out).values() if t.dim()}
    assert wide == {"torch.float16" if dtype == "fp16" else "torch.bfloat16"}


BAKED = ["dora", "loha", "lokr", "whole", "scaling", "generalized", "turning", "butterfly"]


@pytest.mark.parametrize("name", BAKED)
def test_every_kind_becomes_a_plain_lora_that_is_the_nearest(
    name: str, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = place.loras / f"{name}.safetensors", tmp_path / "x.safetensors"
    if name != "dora":
        _, err = run(capsys, "--convert", source, out, "--to", "diffusers", code=2)
        assert "--bake" in err
        assert not out.exists()
    words = ["--to", "peft", "--bake", "--base", place.base, "--rank", 3]
    said, _ = run(capsys, "--convert", source, tmp_path / "x", *words)
    before, after = read_adapter(source), read_adapter(tmp_path / "x")
    gone = whole = 0.0
    for path in before.deltas:
        change = dense(before, path, place.layers[path])
        values = torch.linalg.svdvals(change.flatten(1)) if change.dim() > 1 else change
        whole += float(change.square().sum())
        gone += float(values[3:].square().sum()) if change.dim() > 1 else float(change.square().sum())
        assert change.dim() == 1 or isinstance(after.deltas[path], LowRank)
    assert told(said) == pytest.approx((gone / whole) ** 0.5, rel=1e-3)
    assert told(said) == pytest.approx(error([(before, 1.0)], after, place), rel=1e-3)


def test_without_a_rank_64_is_taken_and_the_plain_layers_are_left_alone(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = read_adapter(place.loras / "ink.safetensors")
    first, second, *_ = mixed.deltas
    g = torch.Generator().manual_seed(0)
    mixed.deltas[first] = Full(torch.randn(place.layers[first].weight.shape, generator=g))
    source = write_adapter(mixed, tmp_path / "mixed.safetensors")
    said, _ = run(capsys, "--convert", source, tmp_path / "x", "--to", "kohya", "--bake")
    assert told(said) < 1e-5  # every layer here has a side of 64 at most
    after = read_adapter(tmp_path / "x.safetensors")
    assert set(after.deltas) == set(mixed.deltas)
    assert all(isinstance(delta, LowRank) for delta in after.deltas.values())
    for name, tensor in mixed.deltas[second].tensors().items():
        assert torch.equal(tensor, after.deltas[second].tensors()[name])
    less, _ = run(capsys, "--convert", source, tmp_path / "y", "--to", "kohya", "--bake", "--energy", 0.5)
    assert told(less) > 0.1


@pytest.mark.parametrize("spelling", ["peft", "diffusers"])
def test_what_a_spelling_has_no_words_for_is_left_out_and_named(
    spelling: str, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = read_adapter(place.loras / "biased.safetensors")
    adapter.embeddings["<fox>"] = {"text_encoder": torch.ones(2, 32)}
    source, out = write_adapter(adapter, tmp_path / "in"), tmp_path / "out"
    _, err = run(capsys, "--convert", source, out, "--to", spelling, code=2)
    assert "--bake" in err
    assert [p.name for p in tmp_path.iterdir()] == ["in.safetensors"]
    said, _ = run(capsys, "--convert", source, out, "--to", spelling, "--bake")
    biases = [f"{path}.bias" for path, delta in adapter.deltas.items() if isinstance(delta, WithBias)]
    words = 'the word "<fox>"'
    tables = [p for p, layer in place.layers.items() if isinstance(layer, nn.Embedding)]
    lost = (
        [words, *biases] if spelling == "peft" else [words, *biases, *(f"{path}.weight" for path in tables)]
    )
    assert f"not carried, {len(lost)} changes that {spelling} has no words for: {words}, " in said
    written = out / "unet/adapter_model.safetensors" if spelling == "peft" else tmp_path / "out.safetensors"
    assert sorted(json.loads(look(written).metadata[LEFT_OUT])) == sorted(lost)
    assert not biases or not any(
        isinstance(d, WithBias) for d in read_adapter(look(written).path).deltas.values()
    )
    kept, _ = run(capsys, "--convert", source, tmp_path / "kept", "--to", "kohya", "--bake")
    assert "not carried" not in kept
    assert "<fox>" in read_adapter(tmp_path / "kept.safetensors").embeddings


def test_keys_that_say_nothing_are_named(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(place.loras / "ink.safetensors") | {"who\x1b[2J": torch.ones(2)}
    save_file(tensors, tmp_path / "in.safetensors")
    for command in (
        ["--convert", "IN", "OUT", "--to", "kohya"],
        ["--resize", "IN", "--rank", "2", "--out", "OUT"],
    ):
        words = [
            {"IN": tmp_path / "in.safetensors", "OUT": tmp_path / "x"}.get(word, word) for word in command
        ]
        said, _ = run(capsys, *words, "--overwrite")
        assert "not carried, 1 keys that are no part of a LoRA: who" in said
        assert "\x1b" not in said


# --- combine, resize, extract --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_combination_is_the_library_s_and_names_its_parents(
    method: Any, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [place.loras / f"{name}.safetensors" for name in ("ink", "cat")]
    options: dict[str, Any] = {} if method in ("cat", "linear", "svd") else {"density": 0.6}
    options |= {"rank": 3, "clamp": 0.99} if method.endswith("svd") else {}
    options |= {"majority": "frequency", "signed_election": True} if "ties" in method else {}
    words = [
        w for key, v in options.items() for w in (f"--{key.replace('_', '-')}", *([] if v is True else [v]))
    ]
    out = tmp_path / "both.safetensors"
    command = ["--combine", f"{files[0]}:0.7", f"{files[1]}:-0.3", "--method", method, *words, "--out", out]
    said, _ = run(capsys, *command)
    pairs = [(read_adapter(files[0]), 0.7), (read_adapter(files[1]), -0.3)]
    torch.manual_seed(0)
    expected, found = combine(pairs, method, **options), read_adapter(out)
    for path, delta in expected.deltas.items():
        for name, tensor in delta.tensors().items():
            assert torch.equal(tensor, found.deltas[path].tensors()[name]), (path, name)
    assert told(said) == pytest.approx(error(pairs, found, place), rel=1e-3, abs=1e-6)
    recipe = json.loads(found.metadata[FROM])
    hashes = [
        hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
        for raw in map(Path.read_bytes, files)
    ]
    assert recipe == {
        "method": method,
        **options,
        "of": [
            {"name": "ink", "weight": 0.7, "sshs_model_hash": hashes[0]},
            {"name": "cat", "weight": -0.3, "sshs_model_hash": hashes[1]},
        ],
    }
    again = tmp_path / "again.safetensors"
    run(capsys, *command[:-1], again)  # random methods too
    assert {k: t.tolist() for k, t in load_file(again).items()} == {
        k: t.tolist() for k, t in load_file(out).items()
    }


def test_kinds_that_need_the_base_combine_and_resize_with_it(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dora, ink = place.loras / "dora.safetensors", place.loras / "ink.safetensors"
    combining = ["--combine", f"{dora}:0.5", ink, "--method", "svd", "--rank", 64, "--out", tmp_path / "a"]
    resizing = ["--resize", dora, "--energy", 0.8, "--out", tmp_path / "b"]
    for words in (combining, resizing):
        assert "--base" in run(capsys, *words, code=2)[1]
    said, _ = run(capsys, *combining, "--base", place.base)
    pairs = [(read_adapter(dora), 0.5), (read_adapter(ink), 1.0)]
    found = read_adapter(tmp_path / "a.safetensors")
    assert told(said) == pytest.approx(error(pairs, found, place), abs=1e-5)
    assert told(said) < 1e-4
    said, _ = run(capsys, *resizing, "--base", place.base)
    found = read_adapter(tmp_path / "b.safetensors")
    direct = resize(read_adapter(dora), energy=0.8, layers=layers_of(place.base))
    assert told(said) == pytest.approx(error([(read_adapter(dora), 1.0)], found, place), rel=1e-3)
    assert 0.1 < told(said) <= 0.2**0.5
    for path, delta in direct.deltas.items():
        torch.testing.assert_close(delta.tensors()["up"], found.deltas[path].tensors()["up"])


def test_resized_clamped_and_rounded_as_the_library_does(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = place.loras / "ink.safetensors"
    words = ["--rank", 2, "--clamp", 0.9, "--dtype", "fp16", "--out", tmp_path / "x"]
    said, _ = run(capsys, "--resize", source, *words)
    before, found = read_adapter(source), read_adapter(tmp_path / "x.safetensors")
    assert told(said) == pytest.approx(error([(before, 1.0)], found, place), rel=1e-3)
    direct = resize(before, rank=2, clamp=0.9)
    assert told(said) > error([(before, 1.0)], resize(before, rank=2), place) + 0.01
    for path, delta in direct.deltas.items():
        assert torch.equal(delta.tensors()["down"].half(), found.deltas[path].tensors()["down"])
    assert "rank 2, float16" in said


def test_an_extraction_is_the_library_s(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = tmp_path / "tuned"
    bake(
        place.base, [(place.loras / "ink.safetensors", 0.7), (place.loras / "biased.safetensors", 1.0)], tuned
    )
    words = ["--rank", 2, "--targets", "attention", "proj_in", "--exclude", "attn2.to_v", "--clamp", 0.95]
    said, _ = run(capsys, "--extract", place.base, tuned, *words, "--out", tmp_path / "x", "--dtype", "bf16")
    direct = extract(
        place.base, tuned, rank=2, targets=("attention", "proj_in"), exclude=("attn2.to_v",), clamp=0.95
    )
    found = read_adapter(tmp_path / "x.safetensors")
    assert set(found.deltas) == set(direct.deltas)
    for path, delta in direct.deltas.items():
        assert torch.equal(delta.tensors()["up"].bfloat16(), found.deltas[path].tensors()["up"])
    lost = float(re.findall(r"lost to the rank: \S+ - \S+ / \S+ = (\S+) ", said)[0])
    assert lost == pytest.approx(float(direct.metadata["lora_loom.lost"]), rel=0.01)
    assert told(said) == pytest.approx(error([(direct, 1.0)], found, place), rel=0.02)
    assert f"not carried, {len(json.loads(direct.metadata[LEFT_OUT]))} parameters" in said
    run(
        capsys,
        "--extract",
        place.base,
        tuned,
        "--energy",
        0.9,
        "--others",
        "store",
        "--out",
        tmp_path / "all",
    )
    assert any(isinstance(d, WithBias) for d in read_adapter(tmp_path / "all.safetensors").deltas.values())


# --- bake ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spelled", "form"),
    [("words", "file"), ("mix", "folder"), ("mix of the app", "folder"), ("recipe", "file")],
)
def test_a_mix_is_baked_however_it_is_spelled(
    spelled: str, form: str, place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ink, dora = (shutil.copy(place.loras / f"{name}.safetensors", tmp_path) for name in ("ink", "dora"))
    weights: dict[str, Any] = {"ink": {"unet": 0.4, "text_encoder": 0.2, "blocks": {"mid": 0.1}}, "dora": 0.6}
    if spelled == "words":
        weights["ink"] = 0.4
        mix: list[object] = [f"{ink}:0.4", f"{dora}:0.6"]
    elif spelled == "recipe":
        recipe = tmp_path / "recipe.toml"
        recipe.write_text('prompt = "a cat"\n[loras]\n"ink.safetensors" = 0.8\n"dora.safetensors" = 1.2\n')
        mix, weights["ink"] = [f"{recipe}:0.5"], 0.4
    else:
        file = tmp_path / ("models/Mixes/soft ink.toml" if spelled == "mix of the app" else "soft ink.toml")
        file.parent.mkdir(parents=True, exist_ok=True)
        folder = tmp_path
        if spelled == "mix of the app":
            folder = tmp_path / "models/Lora"
            folder.mkdir()
            for lora in (ink, dora):
                shutil.move(lora, folder)
        parsed = {name: AdapterWeight.parse(name, weight) for name, weight in weights.items()}
        save_mix(file, parsed, files={name: f"{name}.safetensors" for name in weights})
        mix = [file]
    base, out = (
        (place.base, tmp_path / "new") if form == "folder" else (place.single, tmp_path / "new.safetensors")
    )
    said, _ = run(capsys, "--bake", *mix, "--base", base, "--out", out)
    live = LivePipeline.open(base, device="cpu", dtype=torch.float32)
    for name, weight in weights.items():
        live.load(place.loras / f"{name}.safetensors", name, weight)
    live.fuse()
    assert_same_weights(open_base(out, device="cpu", dtype=torch.float32).pipeline, live.pipeline)
    changed = {path for a in live.loaded.values() for path in a.deltas}
    assert f"{len(changed)} layers changed" in said
    header = look(out / "unet/diffusion_pytorch_model.safetensors" if form == "folder" else out)
    parents = json.loads(header.metadata[BAKED_FROM])
    assert [(one["name"], one["weight"]) for one in parents] == list(live.weights.items())
    assert all(len(one["sshs_model_hash"]) == 64 for one in parents)


def test_rounding_takes_from_the_change_and_how_much_is_said(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--bake", f"{place.loras / 'ink.safetensors'}:0.05", "--base", place.base, "--dtype", "bf16"]
    said, _ = run(capsys, *words, "--out", tmp_path / "new")
    worn = read_adapter(place.loras / "ink.safetensors").deltas
    whole = gone = 0.0
    for path, delta in worn.items():
        weight = place.layers[path].weight.detach()
        exact = weight.double() + 0.05 * delta.delta(weight).double()
        whole += float((exact - weight).square().sum())
        gone += float((exact - exact.float().bfloat16()).square().sum())
    assert told(said) == pytest.approx((gone / whole) ** 0.5, rel=1e-3)
    assert told(said) > 0.01
