"""The run's curves and previews for TensorBoard, in the run folder's `tensorboard`; the extra "tensorboard"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lora_core.errors import ConfigError
from trainers.events import Failed, Finished, Interrupted, Measured, Preview, Saved, Started, Step, TrainEvent


def check_installed() -> None:
    """Raises ConfigError, before anything is trained."""
    _writer_class()


class TensorBoard:
    """A listener. What a killed run had written of later steps is taken back when it goes on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    def __call__(self, event: TrainEvent) -> None:
        match event:
            case Started():
                purge = event.first_step if event.first_step > 1 else None
                self._writer = _writer_class()(str(self.folder), purge_step=purge)
                self._writer.add_text("run", str(event), 0)
            case Step():
                self._writer.add_scalar("loss", event.loss, event.step)
                self._writer.add_scalar("learning_rate", event.learning_rate, event.step)
            case Measured():
                for name in ("validation", "drift"):
                    if (value := getattr(event, name)) is not None:
                        self._writer.add_scalar(name, value, event.step)
            case Preview():
                for prompt, path in zip(event.prompts, event.paths, strict=True):
                    pixels = np.asarray(Image.open(path).convert("RGB"))
                    self._writer.add_image(prompt, pixels, event.step, dataformats="HWC")
            case Saved():
                self._writer.flush()
            case Finished() | Interrupted() | Failed() if self._writer is not None:
                self._writer.close()


def _writer_class() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - optional, and seconds to load
    except ImportError as problem:
        raise ConfigError(
            "report.tensorboard = true needs the package tensorboard, which is not installed. Install it with "
            '`pip install "lora-loom[tensorboard]"`, or set it to false: report.html shows the same curves.'
        ) from problem
    return SummaryWriter
