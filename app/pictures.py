"""The pictures made: files in the outputs folder, newest first, each with its settings inside."""

from __future__ import annotations

import base64
import io
import threading
from functools import lru_cache
from pathlib import Path

from PIL import Image

from lora_core.errors import LoraError
from lora_core.generation import GeneratedImage, free_name, read_png_parameters, save_png
from trainers.images import open_image

SHOWN = 60


class Pictures:
    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        found = sorted(self.folder.glob("*.png"), key=lambda p: p.stat().st_mtime, reverse=True)
        self._newest = found[:SHOWN]

    def keep(self, picture: GeneratedImage) -> Path:
        path = free_name(self.folder, picture)
        save_png(picture, path)
        with self._lock:
            self._newest = [path, *self._newest][:SHOWN]
        return path

    def newest(self) -> list[Path]:
        with self._lock:
            return [path for path in self._newest if path.exists()]

    def settings(self, index: int) -> str:
        """The text inside the picture at this place of the gallery, or why there is none."""
        shown = self.newest()
        if not 0 <= index < len(shown):
            return ""
        try:
            return read_png_parameters(shown[index])
        except LoraError as problem:
            return str(problem)


def data_uri(image: Image.Image, most: int = 512) -> str:
    """For previews, which leave no file: at most `most` pixels a side, and the browser scales them up smoothly."""
    buffer = io.BytesIO()
    image.thumbnail((most, most))
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@lru_cache(maxsize=1024)
def thumbnail(path: Path, mtime_ns: int) -> bytes:
    """A photograph as a JPEG of at most 144 pixels; decoded once for each state of the file (`mtime_ns`)."""
    buffer = io.BytesIO()
    image = open_image(path)
    image.thumbnail((144, 144))
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
