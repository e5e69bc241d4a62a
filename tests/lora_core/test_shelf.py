"""LoRAs on the shelf: read once, the least recently used out first, the next one read on a thread."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from lora_core import shelf as shelf_module
from lora_core.adapter import Adapter
from lora_core.deltas.low_rank import LowRank
from lora_core.errors import FileRefused, NotFinite
from lora_core.formats import read_adapter, write_adapter
from lora_core.shelf import Shelf
from tests.lora_core.adapters_on_disk import assert_same

LIMIT_S = 30  # how long a test waits for what must happen
LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


class Reader:
    """`read_adapter`, counted. A read of a path in `held` says so and waits until it is released."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.held: dict[str, threading.Event] = {}
        self.began = threading.Semaphore(0)

    def __call__(self, path: Path) -> Adapter:
        self.names.append(path.name)
        hold = self.held.get(path.name)
        if hold is not None:
            self.began.release()
            assert hold.wait(LIMIT_S)
        return read_adapter(path)

    def hold(self, path: Path) -> threading.Event:
        return self.held.setdefault(path.name, threading.Event())


class Noted(threading.Event):
    """An event that tells when somebody waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = threading.Semaphore(0)

    def wait(self, timeout: float | None = None) -> bool:
        self.waiting.release()
        return super().wait(timeout)


class Asking(threading.Thread):
    """`get` on a thread of its own -> `outcome`: the adapter or the error."""

    def __init__(self, shelf: Shelf, path: Path) -> None:
        super().__init__(daemon=True)
        self.shelf, self.path, self.outcome = shelf, path, None
        self.start()

    def run(self) -> None:
        try:
            self.outcome: Any = self.shelf.get(self.path)
        except Exception as problem:
            self.outcome = problem

    def answer(self) -> Any:
        self.join(LIMIT_S)
        assert not self.is_alive()
        return self.outcome


def lora(path: Path, value: float = 1.0, *, rank: int = 4) -> Path:
    """A small kohya file whose every factor is `value`; 64 · rank bytes of tensors."""
    factors = LowRank(torch.full((rank, 8), float(value)), torch.full((8, rank), float(value)), 1.0)
    return write_adapter(Adapter({LAYER: factors}, family="sd15"), path)


def value_of(found: Adapter) -> float:
    return float(found.deltas[LAYER].tensors()["down"][0, 0])


def worked_off(shelf: Shelf) -> None:
    """All that was to be read ahead has been: the thread has ended."""
    worker = shelf._worker
    if worker is not None:
        worker.join(LIMIT_S)
        assert not worker.is_alive()


def noted(shelf: Shelf) -> Noted:
    """Replaces the event of the one read under way."""
    (reading,) = shelf._readings.values()
    reading.over = Noted()
    return reading.over


@pytest.fixture(autouse=True)
def _ends_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf_module, "IDLE_S", 0.01)


@pytest.fixture
def reader() -> Reader:
    return Reader()


@pytest.fixture
def shelf(reader: Reader) -> Shelf:
    return Shelf(10_000, reader)


@pytest.fixture
def abc(tmp_path: Path) -> list[Path]:
    return [lora(tmp_path / f"{name}.safetensors", i) for i, name in enumerate("abc")]


# ---------------------------------------------------------------- what is kept


def test_a_file_is_read_once_however_its_path_is_written(
    shelf: Shelf, reader: Reader, abc: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(abc[0].parent)
    first = shelf.get(abc[0])
    assert_same(first, read_adapter(abc[0]))
    for again in (str(abc[0]), "a.safetensors", abc[0].parent / ".." / abc[0].parent.name / "a.safetensors"):
        assert shelf.get(again) is first
    assert reader.names == ["a.safetensors"]
    assert (shelf.paths, shelf.size_bytes) == ((abc[0],), first.size_bytes())


def test_the_least_recently_used_leaves_and_the_limit_holds(reader: Reader, abc: list[Path]) -> None:
    a, b, c = abc
    one = read_adapter(a).size_bytes()
    shelf = Shelf(2 * one, reader)
    shelf.get(a), shelf.get(b), shelf.get(a), shelf.get(c)
    assert (shelf.paths, shelf.size_bytes) == ((a, c), 2 * one)
    shelf.get(b)
    assert (shelf.paths, shelf.size_bytes) == ((c, b), 2 * one)
    assert [name[0] for name in reader.names] == ["a", "b", "c", "b"]


def test_one_that_is_larger_than_the_limit_is_handed_out_and_pushes_nothing_out(
    reader: Reader, abc: list[Path], tmp_path: Path
) -> None:
    large = lora(tmp_path / "large.safetensors", 5.0, rank=8)
    one = read_adapter(abc[0]).size_bytes()
    shelf = Shelf(one, reader)
    kept = shelf.get(abc[0])
    assert [value_of(shelf.get(large)) for _ in range(2)] == [5, 5]
    assert reader.names.count("large.safetensors") == 2
    assert shelf.paths == (abc[0],)
    assert shelf.get(abc[0]) is kept


def test_the_default_limit_is_an_eighth_of_the_memory_and_four_gib_at_most() -> None:
    assert Shelf().limit_bytes == min(psutil.virtual_memory().total // 8, 4 * 2**30)


def test_a_changed_file_is_read_again(shelf: Shelf, reader: Reader, abc: list[Path]) -> None:
    before = shelf.get(abc[0])
    lora(abc[0], 7)
    assert value_of(shelf.get(abc[0])) == 7
    assert value_of(before) == 0
    stat = abc[0].stat()
    os.utime(abc[0], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))  # the same bytes, a later time
    shelf.get(abc[0])
    assert len(reader.names) == 3
    assert shelf.size_bytes == before.size_bytes()


def test_a_file_overwritten_in_place_changes_no_adapter_that_was_read(shelf: Shelf, abc: list[Path]) -> None:
    """A mapped file would show the new bytes, and kill the process where it is shorter."""
    found = shelf.get(abc[1])
    with open(abc[1], "r+b") as file:
        file.write(b"\xff" * abc[1].stat().st_size)
    assert value_of(found) == 1
    os.truncate(abc[1], 0)
    assert all(bool((t == 1).all()) for t in found.deltas[LAYER].tensors().values())


def test_a_deleted_file_raises_what_the_reader_says_and_is_forgotten(shelf: Shelf, abc: list[Path]) -> None:
    shelf.get(abc[0])
    abc[0].unlink()
    with pytest.raises(FileRefused, match=r"a\.safetensors cannot be opened"):
        shelf.get(abc[0])
    assert (shelf.paths, shelf.size_bytes) == ((), 0)


def test_a_failure_is_not_remembered_and_takes_nothing_from_the_shelf(
    reader: Reader, abc: list[Path]
) -> None:
    a, b, _ = abc
    shelf = Shelf(read_adapter(a).size_bytes(), reader)
    kept, good = shelf.get(a), b.read_bytes()
    b.write_bytes(good[:-8])
    with pytest.raises(FileRefused, match="cut short"):
        shelf.get(b)
    assert (shelf.paths, shelf._readings) == ((a,), {})
    assert shelf.get(a) is kept
    b.write_bytes(good)
    assert value_of(shelf.get(b)) == 1


def test_a_failure_holds_on_to_no_tensors(abc: list[Path]) -> None:
    class Large:
        gone = threading.Event()

        def __del__(self) -> None:
            self.gone.set()

    def read(path: Path) -> Adapter:
        half = Large()
        raise NotFinite(f"{path.name} {type(half).__name__}")

    with pytest.raises(NotFinite) as caught:
        Shelf(10_000, read).get(abc[0])
    assert Large.gone.is_set()  # though the error, and with it its traceback, is still here
    assert [entry.name for entry in caught.traceback][-1] == "read"


def test_pefts_folder_is_read_again_when_only_its_alphas_change(
    shelf: Shelf, reader: Reader, abc: list[Path], tmp_path: Path
) -> None:
    folder = write_adapter(read_adapter(abc[1]), tmp_path / "peft", spelling="peft")
    found = shelf.get(folder)
    assert shelf.get(folder) is found
    config = folder / "unet" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 1', '"lora_alpha": 16'))
    assert shelf.get(folder).deltas[LAYER].alpha != found.deltas[LAYER].alpha  # type: ignore[attr-defined]
    assert reader.names == ["peft", "peft"]


def test_a_link_gives_the_name_and_its_target_the_contents(shelf: Shelf, abc: list[Path]) -> None:
    link = abc[0].with_name("link.safetensors")
    try:
        link.symlink_to(abc[0])
    except OSError:
        pytest.skip("this system lets nobody make links")
    assert (shelf.get(link).name, value_of(shelf.get(link))) == ("link", 0)
    link.unlink()
    link.symlink_to(abc[1])
    assert value_of(shelf.get(link)) == 1


def test_clear_empties_the_shelf(shelf: Shelf, reader: Reader, abc: list[Path]) -> None:
    for path in abc:
        shelf.get(path)
    shelf.clear()
    assert (shelf.paths, shelf.size_bytes) == ((), 0)
    shelf.get(abc[0])
    assert len(reader.names) == 4


# ---------------------------------------------------------------- several threads


def test_two_who_ask_for_the_same_read_it_once(shelf: Shelf, reader: Reader, abc: list[Path]) -> None:
    go = reader.hold(abc[0])
    first = Asking(shelf, abc[0])
    assert reader.began.acquire(timeout=LIMIT_S)
    over = noted(shelf)
    others = [Asking(shelf, abc[0]) for _ in range(3)]
    for _ in others:
        assert over.waiting.acquire(timeout=LIMIT_S)
    go.set()
    assert {id(asking.answer()) for asking in [first, *others]} == {id(shelf.get(abc[0]))}
    assert len(reader.names) == 1


def test_those_who_wait_get_the_error_of_the_one_who_reads(
    shelf: Shelf, reader: Reader, abc: list[Path]
) -> None:
    go = reader.hold(abc[0])
    first = Asking(shelf, abc[0])
    assert reader.began.acquire(timeout=LIMIT_S)
    over, second = noted(shelf), Asking(shelf, abc[0])
    assert over.waiting.acquire(timeout=LIMIT_S)
    abc[0].write_bytes(b"")
    go.set()
    assert second.answer() is first.answer()
    assert isinstance(first.outcome, FileRefused)


def test_who_asks_after_a_change_does_not_get_the_read_begun_before_it(
    shelf: Shelf, reader: Reader, abc: list[Path]
) -> None:
    go = reader.hold(abc[0])
    shelf.prefetch(abc[0])
    assert reader.began.acquire(timeout=LIMIT_S)
    over = noted(shelf)
    lora(abc[0], 7)
    asking = Asking(shelf, abc[0])
    assert over.waiting.acquire(timeout=LIMIT_S)
    go.set()
    assert value_of(asking.answer()) == 7
    assert len(reader.names) == 2


def test_an_interrupted_read_answers_nobody(abc: list[Path]) -> None:
    began, go, calls = threading.Semaphore(0), threading.Event(), list[int]()

    def read(path: Path) -> Adapter:
        calls.append(1)
        if len(calls) == 1:
            began.release()
            assert go.wait(LIMIT_S)
            raise KeyboardInterrupt
        return read_adapter(path)

    shelf, interrupted = Shelf(10_000, read), threading.Event()

    def first() -> None:
        try:
            shelf.get(abc[1])
        except KeyboardInterrupt:
            interrupted.set()

    threading.Thread(target=first, daemon=True).start()
    assert began.acquire(timeout=LIMIT_S)
    over, second = noted(shelf), Asking(shelf, abc[1])
    assert over.waiting.acquire(timeout=LIMIT_S)
    go.set()
    assert value_of(second.answer()) == 1
    assert interrupted.wait(LIMIT_S)


def test_many_threads_and_a_small_shelf(tmp_path: Path) -> None:
    paths = [lora(tmp_path / f"{i}.safetensors", i) for i in range(6)]
    one = read_adapter(paths[0]).size_bytes()
    shelf, wrong = Shelf(3 * one), list[object]()

    def work(start: int) -> None:
        try:
            for i in range(60):
                number = (start * 7 + i * (start + 1)) % 6
                shelf.prefetch(paths[(number + 1) % 6])
                if value_of(shelf.get(paths[number])) != number or shelf.size_bytes > 3 * one:
                    wrong.append(number)
        except Exception as problem:
            wrong.append(problem)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
        assert not thread.is_alive()
    assert not wrong
    worked_off(shelf)


# ---------------------------------------------------------------- the next one, read ahead


def test_prefetch_reads_beside_what_else_is_going_on(shelf: Shelf, reader: Reader, abc: list[Path]) -> None:
    a, b, _ = abc
    go = reader.hold(a)
    shelf.prefetch(a)  # returns while its reader is held
    assert reader.began.acquire(timeout=LIMIT_S)
    assert value_of(shelf.get(b)) == 1  # another file waits for nothing
    over, asking = noted(shelf), Asking(shelf, a)
    assert over.waiting.acquire(timeout=LIMIT_S)
    assert asking.is_alive()
    go.set()
    assert asking.answer() is shelf.get(a)
    assert [name[0] for name in reader.names] == ["a", "b"]


def test_the_newest_call_goes_first_and_its_first_path_before_its_others(
    shelf: Shelf, reader: Reader, abc: list[Path]
) -> None:
    a, b, c = abc
    d, e = lora(a.with_name("d.safetensors")), lora(a.with_name("e.safetensors"), rank=200)
    assert read_adapter(e).size_bytes() > shelf.limit_bytes  # so that only its place in the queue can tell
    go = reader.hold(a)
    shelf.prefetch(a)
    assert reader.began.acquire(timeout=LIMIT_S)
    shelf.prefetch(b, c, e)
    shelf.prefetch(d, c)
    shelf.get(e)  # read here: the thread need not do it any more
    go.set()
    worked_off(shelf)
    assert [name[0] for name in reader.names] == ["a", "e", "d", "c", "b"]


def test_what_is_there_is_touched_and_not_read(reader: Reader, abc: list[Path]) -> None:
    a, b, c = abc
    shelf = Shelf(2 * read_adapter(a).size_bytes(), reader)
    shelf.get(a), shelf.get(b)
    shelf.prefetch(a)
    assert shelf.paths == (b, a)
    shelf.prefetch(c)
    worked_off(shelf)
    assert shelf.paths == (a, c)
    assert [name[0] for name in reader.names] == ["a", "b", "c"]


def test_an_error_of_the_thread_is_raised_by_get_and_for_that_path_only(
    shelf: Shelf, reader: Reader, abc: list[Path]
) -> None:
    a, b, c = abc
    good = b.read_bytes()
    b.write_bytes(good[:-8])
    go = reader.hold(b)
    shelf.prefetch(b, c)
    assert reader.began.acquire(timeout=LIMIT_S)
    over, asking = noted(shelf), Asking(shelf, b)
    assert over.waiting.acquire(timeout=LIMIT_S)
    go.set()
    assert isinstance(asking.answer(), FileRefused)
    assert "cut short" in str(asking.outcome)
    assert reader.names.count(b.name) == 1  # the error is the thread's own
    worked_off(shelf)
    assert c in shelf.paths  # the thread went on
    assert [value_of(shelf.get(path)) for path in (a, c)] == [0, 2]
    with pytest.raises(FileRefused, match="cut short"):  # also when nobody was waiting
        shelf.get(b)
    b.write_bytes(good)
    assert value_of(shelf.get(b)) == 1


def test_clear_forgets_what_is_queued_and_does_not_keep_what_is_being_read(
    shelf: Shelf, reader: Reader, abc: list[Path]
) -> None:
    a, b, _ = abc
    go = reader.hold(a)
    shelf.prefetch(a, b)
    assert reader.began.acquire(timeout=LIMIT_S)
    over, asking = noted(shelf), Asking(shelf, a)
    assert over.waiting.acquire(timeout=LIMIT_S)
    shelf.clear()
    go.set()
    assert value_of(asking.answer()) == 0
    worked_off(shelf)
    assert shelf.paths == ()
    assert reader.names == [a.name]


def test_the_thread_ends_when_idle_and_a_new_one_begins_when_there_is_work(
    shelf: Shelf, reader: Reader, abc: list[Path]
) -> None:
    assert shelf._worker is None  # none before the first use
    for path in abc[:2]:
        go = reader.hold(path)
        shelf.prefetch(path)
        worker = shelf._worker
        assert worker is not None
        assert worker.daemon
        go.set()
        worker.join(LIMIT_S)
        assert not worker.is_alive()
        assert shelf._worker is None
        assert path in shelf.paths


def test_prefetch_of_nothing_starts_no_thread(shelf: Shelf) -> None:
    shelf.prefetch()
    assert shelf._worker is None
