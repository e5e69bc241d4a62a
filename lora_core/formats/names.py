"""How a key begins: which layer of which model it is about, in every spelling that has names for layers.

lora_unet_down_blocks_0_…  lora_te_…  lora_te1_…  lora_te2_…  oft_unet_…     kohya; A1111 takes all of them
lora_unet.down_blocks.0.…  lora_te1.text_model.…                            OneTrainer, between two conversions
unet.input_blocks.1.1.…  clip_l.text_model.…  clip_g.text_model.…           OneTrainer in the open initiative's names
unet.down_blocks.0.…  text_encoder.…  text_encoder_2.…                      diffusers
diffusion_model.input_blocks.1.1.…  text_encoders.clip_l.transformer.…      ComfyUI; clip_h is SD 2's encoder
lycoris_down_blocks_0_…  lycoris_text_model_…                               LyCORIS' own wrapper, SimpleTuner
down_blocks.0.…  text_model.encoder.…                                       a module saved alone
base_model.model.…  module.…  _orig_mod.…  model.…                          what wraps any of them: PEFT, DDP, compile

Behind it stands a layer in diffusers' names or in sgm's, with its dots or flattened (keys).
"""

from __future__ import annotations

import re
from functools import lru_cache

from lora_core.formats.keys import adapter_path

_WRAPPERS = re.compile(r"(?:base_model\.model\.|module\.|_orig_mod\.|model\.)*")
_CLIPS = [f"{above}clip_{{}}{below}" for above in ("", "text_encoders.") for below in ("", ".transformer")]
BEGINNINGS = {
    "unet": ("lora_unet", "oft_unet", "lycoris_unet", "unet", "diffusion_model"),
    "text_encoder": (
        *("lora_te", "lora_te1", "lycoris_te", "lycoris_te1", "text_encoder", "text_encoder_1"),
        *(clip.format(which) for clip in _CLIPS for which in "lh"),
    ),
    "text_encoder_2": (
        *("lora_te2", "lycoris_te2", "text_encoder_2"),
        *(clip.format("g") for clip in _CLIPS),
    ),
}
_COMPONENTS = {beginning: component for component, own in BEGINNINGS.items() for beginning in own}
_BEGINNING = re.compile(f"({'|'.join(sorted(map(re.escape, _COMPONENTS), key=len, reverse=True))})[._]")
_ANYONES = "lycoris_"  # of whatever model the wrapper was put around


@lru_cache(maxsize=2**14)  # of a thousand files most have the same keys
def path_of(name: str) -> str | None:
    """A layer's name in a file -> its adapter path; None if no Stable Diffusion model has such a layer.

    >>> path_of("clip_g.text_model.encoder.layers.0.mlp.fc1")
    'text_encoder_2.text_model.encoder.layers.0.mlp.fc1'
    """
    name = _WRAPPERS.sub("", name, count=1)
    if found := _BEGINNING.match(name):
        return adapter_path(_COMPONENTS[found[1]], name[found.end() :])
    name = name.removeprefix(_ANYONES)
    return adapter_path("unet", name) or adapter_path("text_encoder", name)
