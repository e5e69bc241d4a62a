"""(IA)³, GLoRA, OFT, BOFT, whole differences, norms and biases in files: against LyCORIS, whose forward is the truth,
back as they came, and refused where they make no sense."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lora_core.adapter import Adapter
from lora_core.deltas import Delta
from lora_core.deltas.bias import WithBias
from lora_core.deltas.full import Full
from lora_core.deltas.glora import Generalized
from lora_core.deltas.ia3 import Scaling
from lora_core.deltas.low_rank import LowRank
from lora_core.deltas.oft import Rotation
from lora_core.errors import ConfigError, FileRefused, NotFinite
from lora_core.formats import describe_adapter, read_adapter, write_adapter
from lora_core.safe_files import read_header
from lora_core.terms import Dense
from lora_core.worn import wear
from tests.lora_core.adapters_on_disk import PAIR, QPATH, Q, assert_same, saved
from tests.lora_core.lycoris_modules import NAMES, PAIRS, input_of, layer_of, theirs


def read_one(path: Path, which: str) -> Delta:
    read = read_adapter(path)
    assert (list(read.deltas), read.unused) == ([NAMES[which][1]], ())
    return read.deltas[NAMES[which][1]]


def answer_with(layer: Any, x: Tensor, delta: Delta) -> Tensor:
    """The layer with W + ΔW and b + Δb."""
    changed = {"weight": layer.weight + delta.delta(layer.weight)}
    if isinstance(delta, WithBias):
        changed["bias"] = layer.bias + delta.bias
    answer: Tensor = functional_call(layer, changed, x)
    return answer


# ---------------------------------------------------------------- against LyCORIS


@pytest.mark.parametrize(("case", "which"), PAIRS)
def test_what_lycoris_saves_is_what_it_computes(case: str, which: str, tmp_path: Path) -> None:
    layer, x, plain, expected, state = theirs(case, which)
    delta = read_one(saved(state, tmp_path), which)
    torch.testing.assert_close(answer_with(layer, x, delta), expected, atol=1e-5, rtol=1e-5)
    assert (expected - plain).abs().max() > 0.01
    assert delta.fits(tuple(layer.weight.shape))
    assert delta.needs_original is not isinstance(delta, WithBias | Full)
    # the terms that are worn, without any rack around them, at half the weight
    worn = wear("a", delta, layer, "unet.x")
    half = plain.clone()
    for extra in worn.extras:
        half += 0.5 * extra.term(layer, x, plain)
    if worn.rank:
        assert not worn.extras
        half += 0.5 * Dense((worn.up @ worn.down.flatten(1)).reshape(layer.weight.shape)).term(
            layer, x, plain
        )
    if worn.bias is not None:
        half += 0.5 * worn.bias.reshape(-1, *[1] * (x.dim() - 2 if x.dim() == 4 else 0))
    torch.testing.assert_close(half, plain + 0.5 * (expected - plain), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("case", "which"), PAIRS)
def test_a_file_is_written_back_as_it_was(case: str, which: str, dtype: torch.dtype, tmp_path: Path) -> None:
    *_, state = theirs(case, which)
    before = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    first = saved(before, tmp_path)
    read = read_adapter(first)
    again = write_adapter(read, tmp_path / "again")
    after = safetensors.torch.load_file(again)
    assert set(after) == set(before)
    for key, value in before.items():
        if key.endswith("alpha"):
            assert float(after[key]) == float(value)
        else:
            assert torch.equal(after[key], value), key
            assert (after[key].shape, after[key].dtype) == (value.shape, value.dtype), key
    assert_same(read, read_adapter(again))
    described = describe_adapter(first)
    assert {p: (type(d), d.shape()) for p, d in described.deltas.items()} == {
        p: (type(d), d.shape()) for p, d in read.deltas.items()
    }
    said = read_header(again).metadata
    assert said["ss_network_module"] == "lycoris.kohya"
    algo = {"norm": "full", "oft": "diag-oft"}.get(case.split()[0], case.split()[0])
    assert f'"algo": "{algo}"' in said["ss_network_args"]
    assert ("ss_network_dim" in said) is case.startswith("glora")


def test_a_limit_holds_and_none_is_none(tmp_path: Path) -> None:
    """LyCORIS' and kohya's alpha of an OFT: |Q| is at most alpha times the outputs; 0 says nothing."""
    blocks = torch.randn(10, 4, 4)
    skew = blocks - blocks.transpose(1, 2)
    for alpha, held in ((0, skew), (0.01, skew * (0.4 / skew.norm())), (100.0, skew)):
        state = {"oft_blocks": blocks, "alpha": torch.tensor(alpha)}
        path = saved({f"oft_unet_mid_block_attentions_0_proj_in.{k}": v for k, v in state.items()}, tmp_path)
        delta = read_adapter(path).deltas["unet.mid_block.attentions.0.proj_in"]
        weight = torch.randn(40, 3, dtype=torch.float64)
        expected = weight.clone()
        for k in range(10):  # block by block, in fp64, as the papers write it
            q, eye = held[k].double(), torch.eye(4, dtype=torch.float64)
            turn = (eye + q) @ torch.linalg.inv(eye - q)
            assert torch.allclose(turn @ turn.T, eye)
            expected[4 * k : 4 * k + 4] = turn.T @ weight[4 * k : 4 * k + 4]
        torch.testing.assert_close(
            delta.delta(weight.float()), (expected - weight).float(), atol=1e-5, rtol=1e-4
        )


def test_boft_is_a_product_of_matrices_and_keeps_lengths() -> None:
    """The butterfly as whole matrices in fp64, from its definition: stage i pairs rows 2^i b/2 apart."""
    blocks = 0.3 * torch.randn(3, 4, 4, 4)
    delta, weight = Rotation(blocks), torch.randn(16, 5)
    whole = torch.eye(16, dtype=torch.float64)
    for i, stage in enumerate(blocks.double()):
        reach, turn = 2 * 2**i, torch.zeros(16, 16, dtype=torch.float64)
        groups = [start + j for start in range(0, 16, 2 * reach) for j in range(reach)]
        order = [row + half * reach for row in groups for half in (0, 1)]
        for k in range(4):
            q, eye, rows = stage[k] - stage[k].T, torch.eye(4, dtype=torch.float64), order[4 * k : 4 * k + 4]
            turn[torch.tensor(rows)[:, None], torch.tensor(rows)] = (eye + q) @ torch.linalg.inv(eye - q)
        whole = turn @ whole
    expected = whole @ weight.double()
    torch.testing.assert_close(weight + delta.delta(weight), expected.float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(expected.norm(dim=0).float(), weight.norm(dim=0))


def test_a_small_turn_keeps_its_digits() -> None:
    """R W - W computed as such has six digits; R W in fp32 less W would have two."""
    blocks, weight = 1e-5 * torch.randn(10, 4, 4), torch.randn(40, 30)
    q = (blocks - blocks.transpose(1, 2)).double()
    eye = torch.eye(4, dtype=torch.float64)
    turn = torch.block_diag(*((eye + q) @ torch.linalg.inv(eye - q))).T
    expected = turn @ weight.double() - weight.double()
    error = (Rotation(blocks).delta(weight) - expected).norm() / expected.norm()
    assert error < 1e-5


# ---------------------------------------------------------------- older and rarer spellings


def test_older_names_of_glora_and_its_core(tmp_path: Path) -> None:
    torch.manual_seed(0)
    a1, a2, b1, b2 = torch.randn(8, 2), torch.randn(2, 8), torch.randn(6, 2), torch.randn(2, 8)
    weight = torch.randn(6, 8)
    expected = 0.5 / 2 * (weight @ a1 @ a2 + b1 @ b2)
    for names in ((a1, a2, b1, b2), (a2, a1, b2, b1)):  # today's, and those of 2023
        state = {f"{Q}.{k}.weight": t for k, t in zip(("a1", "a2", "b1", "b2"), names, strict=True)}
        read = read_adapter(saved({**state, f"{Q}.alpha": torch.tensor(0.5)}, tmp_path))
        torch.testing.assert_close(read.deltas[QPATH].delta(weight), expected)
    general = pytest.importorskip("lycoris.modules.glora")
    weight, core = torch.randn(6, 8, 3, 3), torch.randn(2, 2, 3, 3)
    four = [t[:, :, None, None] for t in (a1, a2, b1, b2)]
    name = NAMES["conv"][0]
    state = {
        f"{name}.{k}.weight": t for k, t in zip(("a1", "a2", "b1", "b2", "bm"), (*four, core), strict=True)
    }
    delta = read_one(saved({**state, f"{name}.alpha": torch.tensor(0.5)}, tmp_path), "conv")
    torch.testing.assert_close(delta.delta(weight), general._glora_weight(weight, *four, core, 0.25))


def test_turns_stored_as_they_are(tmp_path: Path) -> None:
    """LyCORIS of 2023: `oft_diag` is R itself, and its alpha means nothing."""
    turn = torch.linalg.qr(torch.randn(10, 4, 4)).Q
    name = NAMES["linear"][0]
    state = {f"{name}.oft_diag": turn, f"{name}.alpha": torch.tensor(0.001)}
    delta = read_one(saved(state, tmp_path), "linear")
    weight = torch.randn(40, 24)
    torch.testing.assert_close(weight + delta.delta(weight), torch.block_diag(*turn).T @ weight)
    again = safetensors.torch.load_file(
        write_adapter(read_adapter(tmp_path / "lora.safetensors"), tmp_path / "x")
    )
    assert set(again) == {f"{name}.oft_diag"}
    assert torch.equal(again[f"{name}.oft_diag"], turn)


def test_a_bias_stands_beside_any_kind_and_alone(tmp_path: Path) -> None:
    out = NAMES["conv"][0]
    state = {
        **PAIR,
        f"{Q}.alpha": torch.tensor(3.0),
        f"{Q}.dora_scale": torch.rand(8, 1) + 0.5,
        f"{Q}.diff_b": torch.randn(8),
        f"{out}.diff_b": torch.randn(40),
        f"{NAMES['group norm'][0]}.b_norm": torch.randn(40),
    }
    read = read_adapter(saved(state, tmp_path))
    assert read.unused == ()
    delta, alone = read.deltas[QPATH], read.deltas[NAMES["conv"][1]]
    assert isinstance(delta, WithBias)
    assert isinstance(alone, WithBias)
    assert alone.inner is None
    assert torch.equal(alone.bias, state[f"{out}.diff_b"])
    again = safetensors.torch.load_file(write_adapter(read, tmp_path / "again"))
    renamed = {k.replace("b_norm", "diff_b"): v for k, v in state.items()}  # no reader looks for it alone
    assert set(again) == set(renamed)
    assert all(torch.equal(again[k], v) for k, v in renamed.items())


WHOLE = {
    "unet.conv_in": (8, 4, 3, 3),
    "unet.conv_norm_out": (8,),
    "unet.down_blocks.0.resnets.0.norm2": (8,),
    "unet.mid_block.attentions.0.norm": (8,),
    "unet.up_blocks.1.attentions.2.transformer_blocks.0.norm3": (8,),
    "unet.up_blocks.1.upsamplers.0.conv": (8, 8, 3, 3),
    "unet.add_embedding.linear_1": (8, 5),
    "text_encoder.text_model.embeddings.token_embedding": (30, 8),
    "text_encoder.text_model.embeddings.position_embedding": (7, 8),
    "text_encoder.text_model.encoder.layers.11.layer_norm1": (8,),
    "text_encoder_2.text_model.final_layer_norm": (8,),
    "text_encoder_2.text_projection": (8, 8),
}


@pytest.mark.parametrize("family", ["sdxl", "sd1"])
def test_every_layer_that_can_change_has_a_name_in_both_spellings(family: str, tmp_path: Path) -> None:
    """SDXL's in sgm's names, others in diffusers'."""
    only_sdxl = ("text_encoder_2", "unet.add_embedding")
    deltas: dict[str, Delta] = {
        path: Full(torch.randn(shape))
        for path, shape in WHOLE.items()
        if family == "sdxl" or not path.startswith(only_sdxl)
    }
    deltas["unet.conv_out"] = WithBias(Full(torch.randn(4, 8, 3, 3)), torch.randn(4))
    path = write_adapter(Adapter(deltas, family=family), tmp_path / "x")
    names = {key.partition(".")[0] for key in read_header(path).tensors}
    assert ("lora_unet_out_0" in names, "lora_unet_conv_norm_out" in names) == (
        family == "sdxl",
        family == "sd1",
    )
    read = read_adapter(path)
    assert read.unused == ()
    assert_same(Adapter(deltas), read)


# ---------------------------------------------------------------- embeddings, as PEFT has them


def test_peft_and_we_read_each_others_loras_of_embeddings(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embeddings = nn.ModuleDict({"token_embedding": nn.Embedding(30, 8)})

        def forward(self, ids: Tensor) -> Tensor:
            found: Tensor = self.embeddings["token_embedding"](ids)
            return found

    torch.manual_seed(3)
    text, ids = Text(), torch.randint(0, 30, (2, 5))
    base = text.embeddings["token_embedding"].weight.detach().clone()
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["token_embedding"])
    model = peft.get_peft_model(text, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
        expected = model(ids)
    model.save_pretrained(tmp_path / "theirs")
    path = "text_encoder.text_model.embeddings.token_embedding"
    read = read_adapter(tmp_path / "theirs")
    assert (list(read.deltas), read.unused) == ([path], ())
    delta = read.deltas[path]
    assert isinstance(delta, LowRank)
    assert (delta.rank, delta.alpha, delta.shape()) == (3, 5.0, (30, 8))
    torch.testing.assert_close((base + delta.delta(base))[ids], expected)
    # and through the kohya spelling, and back to PEFT
    kohya = read_adapter(write_adapter(read, tmp_path / "kohya"))
    assert_same(read, kohya)
    kohya.deltas[path] = replace(delta, alpha=1.25)
    write_adapter(kohya, tmp_path / "ours", spelling="peft")
    fresh = Text()
    fresh.embeddings["token_embedding"].weight.data.copy_(base)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours" / "text_encoder")
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids), base[ids] + (expected - base[ids]) / 4)


def test_ia3_is_what_peft_computes() -> None:
    """PEFT stores l = 1 + v. It scales the layer's bias along with its outputs, LyCORIS and we do not: no bias here."""
    peft = pytest.importorskip("peft")
    for on_input in (False, True):
        torch.manual_seed(1)
        block = nn.Sequential(nn.Linear(6, 9, bias=False))
        weight, x = block[0].weight.detach().clone(), torch.randn(4, 6)
        config = peft.IA3Config(target_modules=["0"], feedforward_modules=["0"] if on_input else [])
        model = peft.get_peft_model(block, config)
        scale = next(p for n, p in model.named_parameters() if "ia3_l" in n)
        with torch.no_grad():
            scale.copy_(1 + 0.3 * torch.randn_like(scale))
            expected = model(x)
        ours = Scaling(scale.detach().reshape(-1) - 1, on_input=on_input)
        torch.testing.assert_close(x @ (weight + ours.delta(weight)).T, expected)


# ---------------------------------------------------------------- refusals

CONV, NORM = NAMES["conv"][0], NAMES["group norm"][0]
IA3 = {"weight": torch.ones(1, 6, 1, 1), "on_input": torch.tensor(0)}
GLORA = {
    f"{n}.weight": torch.ones(*s) for n, s in (("a1", (8, 2)), ("a2", (2, 8)), ("b1", (6, 2)), ("b2", (2, 8)))
}
OFT = {"oft_blocks": torch.zeros(3, 4, 4), "rescale": torch.ones(12, 1), "alpha": torch.tensor(0.0)}
LOST = "download or copy it again"
REFUSED: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "ia3 side": ({**IA3, "on_input": None}, "weight without its on_input factor: the file is incomplete"),
    "ia3 vector": ({**IA3, "weight": None}, "on_input without its vector factor"),
    "ia3 sides": ({**IA3, "on_input": torch.tensor([0, 1])}, f"2 values were found where one .*{LOST}"),
    "ia3 shape": ({**IA3, "weight": torch.ones(2, 3)}, rf"\(2, 3\) was found where \(n,\) .*{LOST}"),
    "ia3 integers": ({**IA3, "weight": torch.ones(6).int()}, "int32 were found where floating point"),
    "glora incomplete": ({**GLORA, "b1.weight": None}, "a1.weight without its b1 factor"),
    "glora shape": ({**GLORA, "a1.weight": torch.ones(7, 2)}, rf"\(7, 2\), \(2, 8\), .*expected.*{LOST}"),
    "glora core": ({**GLORA, "bm.weight": torch.ones(2, 2, 64, 64)}, r"\(2, 2, k, k\) was expected"),
    "glora core of a matrix": ({**GLORA, "bm.weight": torch.ones(2, 2, 3, 3)}, "where a core expects"),
    "oft incomplete": ({**OFT, "oft_blocks": None}, "without its oft_blocks factor: the file is incomplete"),
    "oft twice": ({**OFT, "oft_diag": torch.ones(3, 4, 4)}, f"oft_blocks was found beside it.*{LOST}"),
    "oft shape": ({**OFT, "oft_blocks": torch.ones(3, 4, 5)}, rf"\(3, 4, 5\) were found .*{LOST}"),
    "oft rescale": ({**OFT, "rescale": torch.ones(11, 1)}, rf"\(11, 1\) was found .* 12 outputs .*{LOST}"),
    "boft odd": ({**OFT, "oft_blocks": torch.ones(2, 4, 3, 3)}, "no butterfly over 12 outputs"),
    "boft stages": ({**OFT, "oft_blocks": torch.ones(3, 3, 4, 4)}, "no butterfly over 12 outputs"),
    "oft limits": ({**OFT, "alpha": torch.ones(2)}, "2 values were found where alpha is one"),
    "diff shape": ({"diff": torch.ones(2, 2, 2)}, rf"\(2, 2, 2\) was found .*{LOST}"),
    "norm shape": ({"w_norm": torch.ones(2, 2)}, rf"\(2, 2\) was found where that of a norm .*{LOST}"),
    "two differences": (
        {"w_norm": torch.ones(2), "diff": torch.ones(2)},
        f"w_norm was found beside it.*{LOST}",
    ),
    "bias shape": ({"diff": torch.ones(6, 2), "diff_b": torch.ones(5)}, f"5 numbers .* 6 outputs.*{LOST}"),
    "bias matrix": (
        {"diff_b": torch.ones(5, 1)},
        rf"\(5, 1\) was found where one number per output .*{LOST}",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_go_together_is_refused(what: str, tmp_path: Path) -> None:
    parts, why = REFUSED[what]
    path = saved({f"{CONV}.{name}": tensor for name, tensor in parts.items() if tensor is not None}, tmp_path)
    for read in (read_adapter, describe_adapter):
        with pytest.raises(FileRefused, match=why) as refusal:
            read(path)
        assert str(refusal.value).startswith(("lora.safetensors, ", "lora.safetensors has "))


def test_the_whole_of_what_is_refused_is_read(tmp_path: Path) -> None:
    for parts in (IA3, GLORA, OFT):
        assert len(read_adapter(saved({f"{CONV}.{n}": t for n, t in parts.items()}, tmp_path)).deltas) == 1


def test_keys_that_say_nothing_to_a_kind_are_named(tmp_path: Path) -> None:
    odd = {
        f"{CONV}.alpha": torch.tensor(2.0),
        f"{CONV}.dora_scale": torch.ones(6, 1, 1, 1),
        f"{NORM}.alpha": torch.tensor(2.0),
        f"{NORM}.lora_mid.weight": torch.ones(2, 2, 3, 3),
    }
    state = {**{f"{CONV}.{n}": t for n, t in IA3.items()}, f"{NORM}.diff_b": torch.ones(8), **odd}
    read = read_adapter(saved(state, tmp_path))
    assert {type(d) for d in read.deltas.values()} == {Scaling, WithBias}
    assert len(read.unused) == len(odd)
    for key in odd:
        assert sum(note.startswith(key) for note in read.unused) == 1
    assert sum("the layer has a (IA)³" in note for note in read.unused) == 2


@pytest.mark.parametrize("key", [f"{CONV}.weight", f"{CONV}.diff_b"])
def test_not_finite_is_refused(key: str, tmp_path: Path) -> None:
    state = {**{f"{CONV}.{n}": t.clone() for n, t in IA3.items()}, f"{CONV}.diff_b": torch.ones(6)}
    state[key].view(-1)[2] = float("nan")
    with pytest.raises(NotFinite, match="NaN"):
        read_adapter(saved(state, tmp_path))


LOW = LowRank(torch.ones(1, 2), torch.ones(2, 1), 2.0)
CANNOT: dict[str, tuple[Delta, str]] = {
    "(IA)³": (Scaling(torch.ones(2), False), r"is of the kind \(IA\)³"),
    "GLoRA": (Generalized(*(torch.ones(2, 2) for _ in range(4)), alpha=1.0), "is of the kind GLoRA"),  # type: ignore[misc]
    "OFT": (Rotation(torch.zeros(1, 2, 2)), "is of the kind OFT"),
    "full": (Full(torch.ones(2, 2)), "is of the kind full difference"),
    "bias": (WithBias(LOW, torch.ones(2)), "has a change of its bias"),
    "bias alone": (WithBias(None, torch.ones(2)), "has a change of its bias"),
}


@pytest.mark.parametrize("spelling", ["diffusers", "peft"])
@pytest.mark.parametrize("what", CANNOT)
def test_other_spellings_refuse_before_they_write(what: str, spelling: str, tmp_path: Path) -> None:
    delta, why = CANNOT[what]
    mixed: dict[str, Delta] = {"text_encoder.text_model.encoder.layers.0.mlp.fc1": LOW, QPATH: delta}
    with pytest.raises(ConfigError, match=f"{QPATH} {why}.*Write it in the kohya spelling"):
        write_adapter(Adapter(mixed), tmp_path / "x", spelling=spelling)
    assert list(tmp_path.iterdir()) == []


def test_diffusers_takes_no_lora_of_an_embedding(tmp_path: Path) -> None:
    deltas: dict[str, Delta] = {"text_encoder.text_model.embeddings.token_embedding": LOW}
    with pytest.raises(ConfigError, match=r"token_embedding is an embedding, .* kohya or the peft spelling"):
        write_adapter(Adapter(deltas), tmp_path / "x", spelling="diffusers")


def test_tensors_and_back_and_dtype() -> None:
    made = [
        Scaling(torch.randn(1, 6, 1, 1), True),
        Generalized(torch.randn(6, 2), torch.randn(2, 6), torch.randn(8, 2), torch.randn(2, 6), alpha=1.5),
        Rotation(torch.randn(2, 4, 4), 0.1, torch.rand(8, 1)),
        Rotation(torch.randn(2, 2, 4, 4)),
    ]
    weight = torch.randn(8, 6)
    for delta in made:
        assert isinstance(delta, Delta)
        assert delta.low_rank_form() is None
        again = type(delta).from_tensors(delta.tensors())  # type: ignore[attr-defined]
        assert torch.equal(again.delta(weight), delta.delta(weight))
        half = delta.to(dtype=torch.float16)
        assert half.delta(weight).dtype == torch.float32
        torch.testing.assert_close(half.delta(weight), delta.delta(weight), atol=0.03, rtol=0.02)
    assert input_of("linear").shape[-1] == layer_of("linear").weight.shape[1]
