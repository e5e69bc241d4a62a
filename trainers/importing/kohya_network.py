"""kohya's network_module, network_dim, network_alpha and network_args: the kind of the LoRA, its layers, its ranks.

networks.lora    linear layers and 1x1 convolutions of the transformers; with conv_dim the resnets' too, the 3x3 ones
                 with that rank
lycoris.kohya    algo=locon (or lora), loha, lokr on preset=full, attn-mlp, ...; conv_dim is network_dim if not said
"""

from __future__ import annotations

from typing import Any

from trainers.importing import kohya_blocks
from trainers.importing.carrying import Carrying, finite, is_yes
from trainers.importing.kohya_blocks import Blocks, Shape

# every linear layer and 1x1 convolution of a Transformer2DModel
TRANSFORMERS = ["attention", "feed-forward", "projection"]
RESNETS = ["conv", "time_emb_proj"]
OUTSIDE = ["conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"]
KXK = r"conv1|conv2|.*samplers\.0\.conv|conv_in|conv_out"  # the convolutions that conv_dim is for

LYCORIS_PRESETS = {  # -> UNet's layers, the text encoders', whether k x k convolutions are among them
    "full": ([*TRANSFORMERS, *RESNETS, *OUTSIDE], True, True),
    "full-lin": ([*TRANSFORMERS, "conv_shortcut", *RESNETS[1:], *OUTSIDE[2:]], True, False),
    "attn-mlp": (TRANSFORMERS, True, False),
    "attn-only": (["attention"], True, False),
    "unet-only": ([*TRANSFORMERS, *RESNETS, *OUTSIDE], False, True),
    "unet-transformer-only": (TRANSFORMERS, False, False),
    "unet-convblock-only": ([*RESNETS, *OUTSIDE[:2]], False, True),
}
KINDS = {"lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr"}
DEFAULTS = {  # of network_args, which many files spell out
    "algo": ("lora", "locon"),
    "use_tucker": (False,),
    "use_cp": (False,),
    "use_conv_cp": (False,),
    "disable_conv_cp": (True,),
    "use_scalar": (False,),
    "rank_dropout_scale": (False,),
    "bypass_mode": (False, None),
    "train_norm": (False,),
    "wd_on_output": (True,),
    "wd_on_out": (True,),
    "full_matrix": (False,),
    "rescaled": (False,),
    "constraint": (0,),
    "constrain": (0,),
    "block_size": (4,),
    "unit": (1, 4),
    "unbalanced_factorization": (False,),
    "verbose": (False, True),
    "train_on_input": (False,),
}
LEFT = {
    "rank_dropout": "lora.dropout drops what a layer is given",
    "module_dropout": "lora.dropout drops what a layer is given",
    "use_tucker": "3x3 convolutions have two factors",
    "use_scalar": "the up factor begins at 0 without it",
    "train_norm": 'set lora.modules_to_save, such as ["norm1", "norm2", "norm3"]',
}


def carry(c: Carrying, *, sdxl: bool) -> Blocks | None:
    """-> what is told by block, for its rates."""
    module = str(c.take("network_module", default="networks.lora"))
    given = network_args(c.given.pop("network_args", None))
    rank = c.whole("network_dim") or 4
    alpha = c.number("network_alpha", 1.0) or float(rank)
    dropout = c.number("network_dropout") or 0.0
    blocks = None
    c.set("lora.rank", rank)
    c.set("lora.alpha", alpha)
    if module.startswith("lycoris"):
        convolutions = _lycoris(c, given)
        # there as here: what is not said, or 0, is as the linear layers have it
        conv_rank = int(_number(given.pop("conv_dim", 0))) or rank
        conv_alpha = _number(given.pop("conv_alpha", 0)) or alpha
        dropout = dropout or _number(given.pop("dropout", 0))
    else:
        convolutions = _plain(c, module, given)
        conv_rank = int(_number(given.pop("conv_dim", 0)))
        conv_alpha = _number(given.pop("conv_alpha", None)) or 1.0
        blocks = kohya_blocks.carry(c, given, Shape(rank, alpha, conv_rank, conv_alpha), sdxl=sdxl)
    if (
        "rank_pattern" not in c.preset["lora"]
        and convolutions
        and conv_rank
        and (conv_rank, conv_alpha) != (rank, alpha)
    ):
        c.set("lora.rank_pattern", {KXK: conv_rank})
        c.set("lora.alpha_pattern", {KXK: conv_alpha})
    if dropout:
        c.set("lora.dropout", dropout)
        c.change(
            "network_dropout", dropout, "there what the down factor makes is dropped, here what it is given"
        )
    _loraplus(c, given)
    for name, value in given.items():
        if not _harmless(name, value):
            c.leave(f"network_args {name}", value, LEFT.get(name, ""))
    return blocks


def network_args(given: Any) -> dict[str, str]:
    """["conv_dim=4", "algo=loha"], or all in one text, or a table -> by name. block_dims=2, 4 is a list too"""
    if isinstance(given, dict):
        lists = {k: ",".join(map(str, v)) for k, v in given.items() if isinstance(v, list)}
        return {str(name): str(value) for name, value in {**given, **lists}.items()}
    parts = given if isinstance(given, list) else [given if isinstance(given, str) else ""]
    found: dict[str, str] = {}
    name = ""
    for word in (word for part in parts for word in str(part).split()):
        start, equals, value = word.partition("=")
        name = start if equals else name
        if name:
            found[name] = (value if equals else found[name] + word).strip("\"'[]")
    return found


def _plain(c: Carrying, module: str, given: dict[str, str]) -> bool:
    """-> whether k x k convolutions are trained."""
    if module not in ("networks.lora", "networks.dylora", "networks.lora_fa"):
        c.leave("network_module", module, "a plain LoRA is trained")
    elif module != "networks.lora":
        c.change("network_module", module, "a plain LoRA here, of the same rank and layers")
    convolutions = bool(_number(given.get("conv_dim", 0))) or kohya_blocks.has_convolutions(given)
    c.set("lora.init", "kaiming")
    c.set("lora.targets", [*TRANSFORMERS, *(RESNETS if convolutions else [])])
    c.set("lora.text_encoder_targets", ["attention", "feed-forward"])
    return convolutions


def _lycoris(c: Carrying, given: dict[str, str]) -> bool:
    algo = given.pop("algo", "lora").lower()
    if algo in KINDS:
        c.set("lora.kind", KINDS[algo])
    else:
        c.leave("network_args algo", algo, "a plain LoRA is trained")
    if KINDS.get(algo, "lora") == "lora":
        c.set("lora.init", "kaiming")
    if is_yes(given.pop("dora_wd", False)):
        c.set("lora.variant", "dora")
    if is_yes(given.pop("rs_lora", False)):
        c.set("lora.rank_stabilized", True)
    if algo == "lokr":
        if (factor := int(_number(given.pop("factor", -1)))) > 0:
            c.set("lora.factor", factor)
        if is_yes(given.pop("decompose_both", False)):
            c.set("lora.decompose_both", True)
    else:  # about LoKr alone, and written by the GUI for all
        given.pop("factor", None)
        given.pop("decompose_both", None)
    preset = given.pop("preset", "full") or "full"
    if preset not in LYCORIS_PRESETS:
        c.leave("network_args preset", preset, 'the layers of "full" are trained')
        preset = "full"
    targets, text_encoders, convolutions = LYCORIS_PRESETS[preset]
    c.set("lora.targets", targets)
    words = ["attention"] if preset == "attn-only" else ["attention", "feed-forward"]
    if text_encoders:
        c.set("lora.text_encoder_targets", words)
    else:
        c.given["network_train_unet_only"] = True
    return convolutions


def _loraplus(c: Carrying, given: dict[str, str]) -> None:
    common = given.pop("loraplus_lr_ratio", None)
    parts = {name: given.pop(f"loraplus_{name}_lr_ratio", None) for name in ("unet", "text_encoder")}
    ratio = _number(common or parts["unet"] or parts["text_encoder"])
    if not ratio:
        return
    c.set("train.lora_plus_ratio", ratio)
    if any(value is not None and _number(value) != ratio for value in parts.values()) or (
        common is None and None in parts.values()
    ):
        c.change("loraplus ratios", parts, f"{ratio} for every part here")


def _harmless(name: str, value: str) -> bool:
    said: Any = {"true": True, "false": False, "": None, "none": None}.get(value.lower(), value)
    if isinstance(said, str) and said.replace(".", "", 1).isdigit():
        said = float(said)
    return said in (None, 0, False) or said in DEFAULTS.get(name, ())


def _number(value: Any) -> float:
    try:
        return finite(value)
    except (TypeError, ValueError):
        return 0.0
