"""LoHa and LoKr in files: back as they came, side by side with others, and refused where they make no sense."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from lora_core.adapter import Adapter
from lora_core.deltas import Delta
from lora_core.deltas.hadamard import Hadamard
from lora_core.deltas.kronecker import Kronecker
from lora_core.deltas.low_rank import LowRank
from lora_core.deltas.magnitude import WithMagnitude
from lora_core.errors import ConfigError, FileRefused, NotFinite
from lora_core.formats import describe_adapter, read_adapter, write_adapter
from lora_core.safe_files import read_header
from tests.lora_core.adapters_on_disk import (
    LYCORIS_CASES,
    LYCORIS_LAYERS,
    PAIR,
    Q,
    assert_same,
    read_one,
    saved,
    theirs,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("which", LYCORIS_LAYERS)
@pytest.mark.parametrize("case", LYCORIS_CASES)
def test_a_file_is_written_back_as_it_was(case: str, which: str, dtype: torch.dtype, tmp_path: Path) -> None:
    _, _, state = theirs(case, which, weight_decompose=True)
    before = {key: value.to(dtype) for key, value in state.items()}
    first = saved(before, tmp_path)
    read = read_adapter(first)
    again = write_adapter(read, tmp_path / "again")
    after = safetensors.torch.load_file(again)
    assert set(after) == set(before)
    for key, value in before.items():
        assert torch.equal(after[key], value), key
        assert after[key].shape == value.shape, key
        assert after[key].dtype == dtype or key.endswith("alpha"), key
    assert_same(read, read_adapter(again))
    described = describe_adapter(first)
    assert {p: (type(d), d.shape()) for p, d in described.deltas.items()} == {
        p: (type(d), d.shape()) for p, d in read.deltas.items()
    }
    said = read_header(again).metadata
    algo = LYCORIS_CASES[case][0]
    assert said["ss_network_module"] == "lycoris.kohya"
    assert f'"algo": "{algo}"' in said["ss_network_args"]


def test_kinds_stand_side_by_side_in_a_file(tmp_path: Path) -> None:
    _, _, loha = theirs("loha", "conv")
    read = read_adapter(saved({**PAIR, **loha}, tmp_path))
    assert {type(delta) for delta in read.deltas.values()} == {LowRank, Hadamard}
    again = read_adapter(write_adapter(read, tmp_path / "again"))
    assert_same(read, again)
    assert '"algo"' not in again.metadata["ss_network_args"]


def test_missing_alpha_is_the_rank(tmp_path: Path) -> None:
    for case in ("loha", "lokr w2 split"):
        _, _, state = theirs(case, "linear", alpha=0.5)
        del state[f"{Q}.alpha"]
        delta = read_one(saved(state, tmp_path), "linear")
        assert isinstance(delta, Hadamard | Kronecker)
        assert (delta.alpha, delta.scale) == (delta.rank, 1.0)


@pytest.mark.parametrize("spelling", ["diffusers", "peft"])
def test_other_spellings_refuse_before_they_write(spelling: str, tmp_path: Path) -> None:
    path = LYCORIS_LAYERS["linear"][1]
    mixed: dict[str, Delta] = {
        path: LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0),
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": WithMagnitude(
            Kronecker((torch.ones(4, 3),), (torch.ones(5, 7),), 3.0), torch.ones(20, 1)
        ),
    }
    with pytest.raises(ConfigError, match=r"mlp\.fc1 is of the kind LoKr; .* Write it in the kohya spelling"):
        write_adapter(Adapter(mixed), tmp_path / "x", spelling=spelling)
    assert list(tmp_path.iterdir()) == []


def test_not_finite_and_too_large_are_refused(tmp_path: Path) -> None:
    _, _, state = theirs("loha", "linear")
    state[f"{Q}.hada_w2_b"][0, 0] = float("nan")
    with pytest.raises(NotFinite, match="w2_b"):
        read_adapter(saved(state, tmp_path))
    large = Adapter(
        {LYCORIS_LAYERS["linear"][1]: Kronecker((torch.full((2, 2), 7e4),), (torch.ones(2, 2),), 1.0)}
    )
    with pytest.raises(NotFinite, match="bfloat16"):
        write_adapter(large, tmp_path / "y", dtype=torch.float16)


CONV = LYCORIS_LAYERS["conv"][0]
HADA = {
    f"hada_{n}": torch.ones(*s)
    for n, s in (("w1_a", (6, 2)), ("w1_b", (2, 9)), ("w2_a", (6, 2)), ("w2_b", (2, 9)))
}
TUCKER = {
    **{name: torch.ones(2, 6) if name.endswith("_a") else t for name, t in HADA.items()},
    **{name: torch.ones(2, 2, 3, 3) for name in ("hada_t1", "hada_t2")},
}
KRON = {"lokr_w1": torch.ones(2, 3), "lokr_w2_a": torch.ones(4, 2), "lokr_w2_b": torch.ones(2, 9)}
TUCKER_KRON = {**KRON, "lokr_w2_a": torch.ones(2, 4), "lokr_t2": torch.ones(2, 2, 3, 3)}
LOST = "download or copy it again"
REFUSED: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "loha incomplete": (
        {**HADA, "hada_w2_a": None},
        "without its hada_w2_a factor: the file is incomplete. Download",
    ),
    "one core": ({**TUCKER, "hada_t2": None}, "without its hada_t2 factor"),
    "loha ranks": (
        {**HADA, "hada_w1_b": torch.ones(3, 9)},
        rf"\(6, 2\) and \(3, 1, 3, 3\) were found where .* expected.*{LOST}",
    ),
    "halves": (
        {**HADA, "hada_w2_a": torch.ones(5, 2)},
        rf"\(6, 1, 3, 3\) and \(5, 1, 3, 3\) were found .*{LOST}",
    ),
    "kernel": (
        {**HADA, "hada_w1_b": torch.ones(2, 10)},
        rf"10 columns were found where a multiple of 9 .*{LOST}",
    ),
    "bomb": ({**TUCKER, "hada_t1": torch.ones(2, 2, 64, 64)}, rf"\(2, 2, k, k\) was expected.*{LOST}"),
    "core of other rank": (
        {**TUCKER, "hada_t2": torch.ones(3, 3, 3, 3)},
        r"\(2, 2, k, k\) was expected",
    ),
    "numbers": ({**HADA, "hada_w1_b": torch.tensor(1.0)}, rf"\(6, 2\) and \(\) were found .*{LOST}"),
    "loha integers": ({**HADA, "hada_w2_a": torch.ones(6, 2).int()}, "int32 were found where floating point"),
    "loha alphas": ({**HADA, "alpha": torch.ones(2)}, "2 values were found where alpha is one"),
    "loha magnitude": ({**HADA, "dora_scale": torch.ones(4, 1)}, "neither the 6 outputs nor the 1 inputs"),
    "lokr without w2": (
        {"lokr_w1": KRON["lokr_w1"]},
        "without lokr_w2 or lokr_w2_a and lokr_w2_b: the file is incomplete",
    ),
    "lokr half a pair": ({**KRON, "lokr_w2_b": None}, "lokr_w2_a without its lokr_w2_b factor"),
    "lokr both": (
        {**KRON, "lokr_w2": torch.ones(4, 9)},
        rf"lokr_w2_a was found beside it, where one of the two.*{LOST}",
    ),
    "lokr core alone": (
        {"lokr_w1": KRON["lokr_w1"], "lokr_w2": torch.ones(4, 1, 3, 3), "lokr_t2": torch.ones(2, 2, 3, 3)},
        rf"a core was found beside .*lokr_w2, where it belongs to a pair.*{LOST}",
    ),
    "lokr bomb": ({**TUCKER_KRON, "lokr_t2": torch.ones(2, 2, 64, 64)}, r"\(2, 2, k, k\) was expected"),
    "lokr ranks": (
        {**KRON, "lokr_w1": None, "lokr_w1_a": torch.ones(2, 3), "lokr_w1_b": torch.ones(3, 3)},
        rf"ranks \[2, 3\] were found where one was expected.*{LOST}",
    ),
    "lokr shape": (
        {**KRON, "lokr_w1": torch.ones(2, 3, 1)},
        rf"\(2, 3, 1\) was found where 2 dimensions .*{LOST}",
    ),
    "lokr factors": (
        {**KRON, "lokr_w2_a": torch.ones(4, 5)},
        rf"\(4, 5\) and \(2, 1, 3, 3\) were found .*{LOST}",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_go_together_is_refused(what: str, tmp_path: Path) -> None:
    parts, why = REFUSED[what]
    tensors = {f"{CONV}.{name}": tensor for name, tensor in parts.items() if tensor is not None}
    path = saved(tensors, tmp_path)
    for read in (read_adapter, describe_adapter):
        with pytest.raises(FileRefused, match=why) as refusal:
            read(path)
        assert str(refusal.value).startswith(f"lora.safetensors, {CONV}") or "lora.safetensors has" in str(
            refusal.value
        )


def test_the_whole_of_what_is_refused_is_read(tmp_path: Path) -> None:
    """The files above are refused for what is wrong in them, and not for something else."""
    for parts in (HADA, TUCKER, KRON, TUCKER_KRON):
        assert len(read_adapter(saved({f"{CONV}.{n}": t for n, t in parts.items()}, tmp_path)).deltas) == 1


def test_keys_that_belong_to_no_kind_are_named(tmp_path: Path) -> None:
    odd = {
        f"{CONV}.lokr_w1": torch.ones(2, 2),
        f"{CONV}.lora_mid.weight": torch.ones(2, 2, 3, 3),
        "lora_unet_mid_block_resnets_1_conv1.hada_t1": torch.ones(2, 2, 3, 3),
        "lora_unet_mid_block_resnets_1_conv1.alpha": torch.tensor(1.0),
    }
    read = read_adapter(saved({**{f"{CONV}.{n}": t for n, t in HADA.items()}, **odd}, tmp_path))
    assert list(read.deltas) == [LYCORIS_LAYERS["conv"][1]]
    assert len(read.unused) == len(odd)
    for key in odd:
        assert sum(note.startswith(key) for note in read.unused) == 1
    assert sum("the layer has a LoHa" in note for note in read.unused) == 2
