"""What PEFT's methods save, loaded and fused, computes what PEFT computes: its own models are the oracle."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_core import LivePipeline, combine, write_adapter
from lora_core.adapter import resolve, weight_of
from lora_core.deltas.absolute import Absolute
from lora_core.deltas.bias import WithBias
from lora_core.deltas.oft import Rotation
from lora_core.errors import ConfigError, FileRefused, NotFinite, WrongFamily
from lora_core.formats import describe_adapter, read_adapter
from lora_core.safe_files import read_tensors, save_tensors
from tests.small_models import small_pipeline

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore:.*LoRA tensor.s. have invalid shape"
    ),  # of lora_bias, which are vectors
]


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT would look for a CUDA compiler to make its BOFT faster."""
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)


LINEAR = ["to_q", "to_k", "to_out.0", "ff.net.2"]  # with biases and without
CONVS = ["conv1", "conv_shortcut", "proj_in"]
EVERY = LINEAR + CONVS
WITH_BIAS = ["to_out.0", "ff.net.2", *CONVS]
# on a whole UNet: kinds, and what is given whole
UNETS: dict[str, tuple[str, dict[str, Any]]] = {
    "loha": ("LoHa", {"r": 3, "alpha": 5, "target_modules": EVERY, "use_effective_conv2d": True}),
    "lokr": ("LoKr", {"r": 2, "alpha": 5, "target_modules": EVERY}),
    "ia3": ("IA3", {"target_modules": EVERY, "feedforward_modules": ["ff.net.2", "conv1"]}),
    "oft": ("OFT", {"oft_block_size": 8, "target_modules": [*LINEAR, "proj_in"]}),
    "boft": ("BOFT", {"boft_block_size": 4, "target_modules": EVERY}),
    "every bias": ("Lora", {"r": 3, "lora_alpha": 5, "target_modules": LINEAR, "bias": "all"}),
    "factors' biases": ("Lora", {"r": 3, "lora_alpha": 5, "target_modules": WITH_BIAS, "lora_bias": True}),
    "modules": (
        "Lora",
        {
            "r": 3,
            "lora_alpha": 5,
            "target_modules": LINEAR,
            "modules_to_save": ["conv_in", "time_embedding", "norm2", "proj_out"],
        },
    ),
}
# on two layers: options
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "loha": ("LoHa", {"r": 3, "alpha": 5, "alpha_pattern": {"linear_1": 1.5}}),
    "loha, cores": ("LoHa", {"r": 3, "alpha": 5, "use_effective_conv2d": True}),
    "lokr": ("LoKr", {"r": 2, "alpha": 5}),
    "lokr, both split": ("LoKr", {"r": 1, "alpha": 5, "decompose_both": True}),
    "lokr, cores": ("LoKr", {"r": 1, "alpha": 5, "use_effective_conv2d": True, "decompose_both": True}),
    # both factors whole: there PEFT scales by alpha/r where LyCORIS does not
    "lokr, whole": (
        "LoKr",
        {"r": 64, "alpha": 40, "rank_pattern": {"linear_1": 50}, "alpha_pattern": {"conv1": 9}},
    ),
    "ia3": ("IA3", {"feedforward_modules": ["conv1"]}),
    "ia3 the other way": ("IA3", {"feedforward_modules": ["linear_1"]}),
    "oft": ("OFT", {"oft_block_size": 8, "target_modules": ["linear_1"]}),
    "oft, exact": ("OFT", {"oft_block_size": 4, "target_modules": ["linear_1"], "use_cayley_neumann": False}),
    "oft, held": ("OFT", {"oft_block_size": 4, "target_modules": ["linear_1"], "coft": True, "eps": 0.3}),
    **{
        f"oft, {n} terms": (
            "OFT",
            {"oft_block_size": 4, "target_modules": ["linear_1"], "num_cayley_neumann_terms": n},
        )
        for n in (1, 2, 3, 4, 8)
    },
    "boft": ("BOFT", {"boft_block_size": 4}),
}


def trained(method: str, options: dict[str, Any], model: nn.Module) -> Any:
    """PEFT's model around `model`, every parameter it trains moved."""
    wrapped = peft.get_peft_model(model, getattr(peft, f"{method}Config")(**options))
    g = torch.Generator().manual_seed(len(method))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                size = 0.1 if method.startswith("Lo") else 0.2
                parameter += size * torch.randn(parameter.shape, generator=g)
    return wrapped.eval()


class Tiny(nn.Module):
    """Two layers under the names they have in a UNet."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(32, 48)})
        self.mid_block = nn.ModuleDict(
            {"resnets": nn.ModuleList([nn.ModuleDict({"conv1": nn.Conv2d(32, 48, 3)})])}
        )

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("case", TINY)
def test_each_option_changes_weights_and_biases_as_peft_does(case: str, tmp_path: Path) -> None:
    method, options = TINY[case]
    torch.manual_seed(0)
    tiny = Tiny()
    theirs = trained(method, {"target_modules": ["linear_1", "conv1"]} | options, copy.deepcopy(tiny))
    theirs.save_pretrained(tmp_path / "unet")
    merged = theirs.merge_and_unload()
    read, described = read_adapter(tmp_path), describe_adapter(tmp_path)
    assert read.unused == ()
    assert set(read.deltas) == {f"unet.{name}" for name in WHERE[: len(read.deltas)]}
    for path, layer in resolve(read.deltas, {"unet": tiny}).items():
        delta, expected = read.deltas[path], merged.get_submodule(path.removeprefix("unet."))
        assert described.deltas[path].shape() == delta.shape()
        assert delta.fits(tuple(weight_of(layer).shape))
        w0, bias = weight_of(layer).detach(), layer.bias.detach()
        changed = float((expected.weight - w0).norm()) > 1e-3 * float(w0.norm())
        assert changed != (case == "oft, 1 terms")  # of which PEFT makes no turn at all
        torch.testing.assert_close(w0 + delta.delta(w0), expected.weight.detach(), atol=1e-5, rtol=1e-4)
        moved = delta.bias_change(bias) if isinstance(delta, WithBias) else None
        torch.testing.assert_close(bias if moved is None else bias + moved, expected.bias.detach())


WHERE = ("time_embedding.linear_1", "mid_block.resnets.0.conv1")


def asked(unet: nn.Module) -> Tensor:
    g = torch.Generator().manual_seed(1)
    sample, text = torch.randn(2, 4, 16, 16, generator=g), torch.randn(2, 5, 32, generator=g)
    with torch.no_grad():
        found: Tensor = unet(sample, 10, text, return_dict=False)[0]
    return found


@pytest.mark.parametrize("case", UNETS)
def test_what_peft_saves_computes_what_peft_computes(case: str, tmp_path: Path) -> None:
    """Live, fused and, bit for bit, gone."""
    pipe = small_pipeline("sd1")
    base = asked(pipe.unet)
    theirs = trained(*UNETS[case], copy.deepcopy(pipe.unet))
    theirs.save_pretrained(tmp_path / "unet")
    expected = asked(theirs)
    live = LivePipeline(pipe)
    coverage = live.load(tmp_path, name="x")
    assert (coverage.unused, coverage.matched) == ((), coverage.total)
    far = float((expected - base).norm())
    assert far > 0.05 * float(base.norm())
    assert float((asked(pipe.unet) - expected).norm()) < 1e-4 * far
    live.fuse()
    assert float((asked(pipe.unet) - expected).norm()) < 1e-4 * far
    live.unload()
    assert torch.equal(asked(pipe.unet), base)
    assert live.verify_base()


def test_a_table_of_words_with_a_lora_is_saved_whole(tmp_path: Path) -> None:
    """PEFT saves the embedding beside its LoRA: the value first, then what the LoRA changes of it."""
    pipe = small_pipeline("sd1")
    text = copy.deepcopy(pipe.text_encoder)
    with torch.no_grad():
        text.get_input_embeddings().weight += 0.3  # as if trained further, or with more words
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["token_embedding", "q_proj"], use_dora=False)
    wrapped = peft.get_peft_model(text, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path / "text_encoder", save_embedding_layers=True)
    ids = torch.randint(0, 100, (2, 7))
    with torch.no_grad():
        expected = wrapped(ids).last_hidden_state
    live = LivePipeline(pipe)
    assert live.load(tmp_path, name="x").unused == ()
    embedding = live.loaded["x"].deltas["text_encoder.text_model.embeddings.token_embedding"]
    assert isinstance(embedding, Absolute)
    assert embedding.inner is not None
    with torch.no_grad():
        torch.testing.assert_close(pipe.text_encoder(ids).last_hidden_state, expected, atol=1e-4, rtol=1e-4)


def test_a_butterfly_of_several_stages_is_its_product(tmp_path: Path) -> None:
    """PEFT makes them on a GPU only; its permutations and its formula are here, its product is said naively."""
    boft = pytest.importorskip("peft.tuners.boft.layer").BOFTLayer
    torch.manual_seed(3)
    block, n, stages = 4, 32, 3
    data, scale, weight = (
        0.3 * torch.randn(stages, n // block, block, block),
        torch.rand(48, 1) + 0.5,
        torch.randn(48, n),
    )
    made = boft.__new__(boft)
    whole = torch.eye(n)
    for i in range(stages):
        order = made.block_butterfly_perm(n, n // block // 2**i, block // 2, stages - 1)
        p = made.perm2mat(order)
        turns = made.cayley_batch(data[i])
        whole = p @ torch.block_diag(*turns) @ p.T @ whole
    expected = (whole @ weight.T).T * scale
    key = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    folder(tmp_path, {f"{key}.boft_R": data, f"{key}.boft_s": scale}, peft_type="BOFT")
    (delta,) = read_adapter(tmp_path).deltas.values()
    assert isinstance(delta, Rotation)
    assert delta.blocks.shape == (2, 16, 16)
    assert delta.fits((48, n))
    assert not delta.fits((47, n))
    torch.testing.assert_close(weight + delta.delta(weight), expected, atol=1e-4, rtol=1e-4)


def folder(path: Path, tensors: dict[str, Tensor], **config: Any) -> None:
    save_tensors(path / "adapter_model.safetensors", tensors)
    (path / "adapter_config.json").write_text(json.dumps(config))


# ---------------------------------------------------------------- whole values elsewhere


def whole_adapter(tmp_path: Path, pipe: Any) -> Any:
    trained(*UNETS["modules"], copy.deepcopy(pipe.unet)).save_pretrained(tmp_path / "unet")
    return read_adapter(tmp_path)


def test_whole_values_become_changes_beside_the_base(tmp_path: Path) -> None:
    """A merge by svd of enough rank is what was merged; without the base it is refused, and so is writing it."""
    pipe = small_pipeline("sd1")
    adapter = whole_adapter(tmp_path, pipe)
    assert any(isinstance(delta, WithBias) and delta.of == "value" for delta in adapter.deltas.values())
    with pytest.raises(ConfigError, match="that is given whole, whose change only the base model tells"):
        combine([(adapter, 1.0)], method="svd", rank=64)
    with pytest.raises(ConfigError, match="has its bias as a value, for which kohya's spelling has no key"):
        write_adapter(adapter, tmp_path / "kohya")
    layers = resolve(adapter.deltas, {"unet": pipe.unet})
    merged = combine([(adapter, 1.0)], method="svd", rank=256, layers=layers)
    read = read_adapter(write_adapter(merged, tmp_path / "kohya"))
    assert set(read.deltas) == set(adapter.deltas)
    for path, layer in layers.items():
        w0 = weight_of(layer).detach()
        torch.testing.assert_close(
            read.deltas[path].delta(w0), adapter.deltas[path].delta(w0), atol=1e-4, rtol=1e-4
        )
        theirs, ours = adapter.deltas[path], read.deltas[path]
        if isinstance(theirs, WithBias):
            assert isinstance(ours, WithBias)
            change = theirs.bias_change(layer.bias.detach())
            assert change is not None
            torch.testing.assert_close(ours.bias, change)


def test_comfyuis_whole_weight_is_read_and_written(tmp_path: Path) -> None:
    key = "lora_unet_conv_in.set_weight"
    value = torch.randn(32, 4, 3, 3)
    save_tensors(tmp_path / "x.safetensors", {key: value})
    adapter = read_adapter(tmp_path / "x.safetensors")
    assert isinstance(adapter.deltas["unet.conv_in"], Absolute)
    w0 = torch.randn(32, 4, 3, 3)
    torch.testing.assert_close(w0 + adapter.deltas["unet.conv_in"].delta(w0), value)
    again = read_tensors(write_adapter(adapter, tmp_path / "again"))
    assert list(again) == [key]
    assert torch.equal(again[key], value)


# ---------------------------------------------------------------- refusals

Q = "base_model.model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "base_model.model.mid_block.resnets.0.conv1"
PAIR = {f"{Q}.lora_A.weight": torch.ones(2, 64), f"{Q}.lora_B.weight": torch.ones(64, 2)}
OFT = {f"{Q}.oft_R.weight": torch.ones(16, 6)}
BOFT = {f"{Q}.boft_R": torch.ones(2, 16, 4, 4), f"{Q}.boft_s": torch.ones(64, 1)}
REFUSED: dict[str, tuple[dict[str, Tensor], dict[str, Any], str]] = {
    "vera": (
        PAIR,
        {"peft_type": "VERA"},
        "says VERA: not supported .* LORA, LOHA, LOKR, IA3, OFT, BOFT adapters",
    ),
    "adalora": (PAIR, {"peft_type": "ADALORA"}, "says ADALORA"),
    "pissa": (
        PAIR,
        {"init_lora_weights": "pissa_niter_4"},
        "init_lora_weights = pissa: .* path_initial_model",
    ),
    "loftq": (PAIR, {"init_lora_weights": "loftq"}, "for the base as that changed it"),
    "alora": (
        PAIR,
        {"alora_invocation_tokens": [1]},
        "alora_invocation_tokens: its layers compute something else",
    ),
    "replication": (PAIR, {"layer_replication": [[0, 2], [1, 3]]}, "which layers it means is not known"),
    "old neumann": (
        OFT,
        {"peft_type": "OFT", "use_cayley_neumann": True, "peft_version": "0.17.1"},
        "before 0.18",
    ),
    "shared": (OFT, {"peft_type": "OFT", "block_share": True}, "block_share: one block for all"),
    "oft shape": (
        {f"{Q}.oft_R.weight": torch.ones(16, 7)},
        {"peft_type": "OFT"},
        r"\(16, 7\) was found .* \(k, b",
    ),
    "oft of one number": (
        {f"{Q}.oft_R.weight": torch.tensor(1.0)},
        {"peft_type": "OFT"},
        r"shape \(\) was found",
    ),
    "oft of huge blocks": (
        {f"{Q}.oft_R.weight": torch.ones(1, 5121 * 2560, dtype=torch.float16)},
        {"peft_type": "OFT"},
        "blocks of 5,121 were found",
    ),
    # 400 kB that would be a dense matrix of 64 MB, and half a minute
    "boft of many stages": (
        {f"{Q}.boft_R": torch.ones(12, 2048, 2, 2), f"{Q}.boft_s": torch.ones(4096, 1)},
        {"peft_type": "BOFT"},
        "blocks of 4,096 were found where at most 512",
    ),
    "oft kernel": (
        {f"{CONV}.oft_R.weight": torch.ones(16, 6)},
        {"peft_type": "OFT"},
        "OFT of a 3x3 convolution",
    ),
    "boft half": ({f"{Q}.boft_R": BOFT[f"{Q}.boft_R"]}, {"peft_type": "BOFT"}, "without its boft_s factor"),
    "boft shape": (
        {**BOFT, f"{Q}.boft_R": torch.ones(3, 15, 4, 4)},
        {"peft_type": "BOFT"},
        r"\(3, 15, 4, 4\)",
    ),
    "boft odd": ({**BOFT, f"{Q}.boft_R": torch.ones(2, 16, 3, 3)}, {"peft_type": "BOFT"}, "blocks of 3"),
    "ia3 shape": ({f"{Q}.ia3_l": torch.ones(1, 2, 3, 1)}, {"peft_type": "IA3"}, r"\(1, 2, 3, 1\)"),
    "ia3 pattern": (
        {f"{Q}.ia3_l": torch.ones(64, 1)},
        {"peft_type": "IA3", "feedforward_modules": "(a+)+$"},
        "a regular",
    ),
    "eps": (OFT, {"peft_type": "OFT", "coft": True, "eps": "much"}, "eps is 'much'"),
    "lora_bias in dora": (
        {**PAIR, f"{Q}.lora_B.bias": torch.ones(64), f"{Q}.lora_magnitude_vector": torch.ones(64)},
        {},
        "a factor's bias was found beside .*lora_magnitude_vector",
    ),
    "two biases": (
        {**PAIR, f"{Q}.diff_b": torch.ones(64), f"{Q}.bias": torch.ones(64)},
        {},
        "diff_b was found beside it, where one was expected",
    ),
    "another method": (
        OFT,
        {"peft_type": "IA3"},
        "holds no IA3 layer, which adapter_config.json .* says it does",
    ),
    "whole shape": ({f"{Q}.weight": torch.ones(2, 2, 2)}, {}, r"\(2, 2, 2\) was found where a weight"),
}


def test_a_turn_beyond_what_fp32_can_tell_is_not_finite(tmp_path: Path) -> None:
    """Beside 2^100 a 1 is lost: what is left of I + Q has no inverse."""
    q = 2.0**101 * torch.ones(3, 3).triu(1)[None, None]
    folder(tmp_path, {f"{Q}.boft_R": q, f"{Q}.boft_s": torch.ones(3, 1)}, peft_type="BOFT")
    with pytest.raises(NotFinite):
        read_adapter(tmp_path)


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_read_is_refused_in_a_sentence(what: str, tmp_path: Path) -> None:
    tensors, config, why = REFUSED[what]
    folder(tmp_path, tensors, **config)
    for look in (read_adapter, describe_adapter):
        with pytest.raises(FileRefused, match=why):
            look(tmp_path)


def test_a_bias_where_the_model_has_none_is_refused(tmp_path: Path) -> None:
    folder(tmp_path, {**PAIR, f"{Q}.base_layer.bias": torch.ones(64)})
    with pytest.raises(
        WrongFamily, match=r"attn1.to_q of this LoRA has a bias, and in this model it has none"
    ):
        LivePipeline(small_pipeline("sd1")).load(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_is_named_in_every_method(bad: float, tmp_path: Path) -> None:
    """Whatever is computed while reading: a turn of NaN is none, and a solver would raise."""
    files: dict[str, dict[str, Tensor]] = {
        "LORA": {
            **PAIR,
            f"{Q}.lora_magnitude_vector": torch.ones(64),
            f"{CONV}.weight": torch.ones(8, 8, 3, 3),
        },
        "LOKR": {f"{Q}.lokr_w1": torch.ones(8, 8), f"{Q}.lokr_w2": torch.ones(8, 8)},
        "IA3": {f"{Q}.ia3_l": torch.ones(64, 1)},
        "OFT": OFT,
        "BOFT": BOFT,
    }
    for method, tensors in files.items():
        for key in tensors:
            spoiled = {k: t.clone() for k, t in tensors.items()}
            spoiled[key].view(-1)[1] = bad
            folder(tmp_path, spoiled, peft_type=method)
            with pytest.raises(NotFinite, match=r"attn1\.to_q|conv1"):
                read_adapter(tmp_path)
