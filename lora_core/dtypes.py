"""The dtypes that LoRAs and models are kept in, by the names that presets and commands have for them."""

from __future__ import annotations

import torch

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
