"""What a LoRA's file says of itself, changed in the file: its tensors stay where they are, and its hashes with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lora_core.errors import ConfigError
from lora_core.formats.files import headers_of
from lora_core.formats.metadata import OF_THE_FILE, check_text, without_paths
from lora_core.safe_files import save_metadata


def retell(path: Path | str, facts: Mapping[str, str | None]) -> None:
    """Set entries of the metadata of a LoRA's file, or of all files of PEFT's folder; None takes one out.

    Absolute paths in values are cut to names. Atomic, read back and compared. Raises ConfigError for values that are
    no text and for entries that say how the tensors are stored, FileRefused, SaveFailed.
    """
    for key in facts:
        if key in OF_THE_FILE:
            raise ConfigError(f"{key} tells of the file's tensors and is not to be set. Leave it out.")
    stated = {key: value for key, value in facts.items() if value is not None}
    check_text(stated)
    for header in headers_of(path):
        kept = {key: value for key, value in header.metadata.items() if key not in facts}
        save_metadata(header.path, kept | {key: without_paths(value) for key, value in stated.items()})
