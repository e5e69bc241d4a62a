"""What the libraries below say at every start that is no news to anybody: these sentences alone, and no level."""

from __future__ import annotations

import logging
from functools import partial

HUSHED = {  # logger -> a part of the sentence
    # a kernel for 4 bits on a CPU, which bitsandbytes does without
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit",
    # of classes that diffusers imports and nothing here uses
    "transformers.utils.import_utils": "requires torchvision",
    # diffusers measures a long prompt before it cuts it, and then says itself what is cut
    "transformers.tokenization_utils_base": "Token indices sequence length is longer",
}


def hush() -> None:
    """Before the libraries are imported. Other sentences of theirs are heard as ever."""
    for logger, part in HUSHED.items():
        logging.getLogger(logger).addFilter(partial(_is_news, part))


def _is_news(part: str, record: logging.LogRecord) -> bool:
    return part not in str(record.msg)
