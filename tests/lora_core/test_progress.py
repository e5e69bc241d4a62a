"""Who listens hears how far long work is, and can end it; who does not, costs nothing."""

from __future__ import annotations

import threading

import pytest

from lora_core import combine, resize
from lora_core.errors import Stopped
from lora_core.progress import steps, watched
from tests.lora_core.adapters_on_disk import LAYERS, adapter

EVERY = [(done, len(LAYERS), "layers") for done in range(len(LAYERS) + 1)]


def test_each_layer_is_told() -> None:
    heard: list[tuple[int, int, str]] = []
    with watched(lambda *told: heard.append(told)):
        resize(adapter(), rank=2)
        assert heard == EVERY
        combine([(adapter(), 1.0), (adapter(), 0.5)], "svd")
    assert heard == EVERY * 2
    resize(adapter(), rank=2)
    assert heard == EVERY * 2


def test_the_listener_ends_the_work_and_the_one_before_hears_again() -> None:
    heard: list[int] = []

    def stopping(done: int, total: int, what: str) -> None:
        if done == 3:
            raise Stopped("enough")

    with watched(lambda done, total, what: heard.append(done)):
        with pytest.raises(Stopped), watched(stopping):
            resize(adapter(), rank=2)
        assert heard == []
        assert list(steps(["a", "b"], "letters")) == ["a", "b"]
    assert heard == [0, 1, 2]


def test_another_thread_is_another_work() -> None:
    heard: list[int] = []
    with watched(lambda done, total, what: heard.append(done)):
        other = threading.Thread(target=resize, args=(adapter(),), kwargs={"rank": 2})
        other.start()
        other.join()
    assert heard == []
