"""How a LoRA is spelled in files. Foreign names stop here."""

from __future__ import annotations

from lora_core.formats.files import describe_adapter, read_adapter, write_adapter
from lora_core.formats.retelling import retell

__all__ = ["describe_adapter", "read_adapter", "retell", "write_adapter"]
