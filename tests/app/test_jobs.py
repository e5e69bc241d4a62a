"""The worker: one job at a time, stoppable, and alive after anything a job may do."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from app.jobs import Job, Worker
from lora_core.errors import LoraError


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


def finished(job: Job) -> Job:
    assert job.done.wait(10)
    return job


def test_jobs_run_one_at_a_time_in_their_order(worker: Worker) -> None:
    running, most, order = 0, 0, []
    lock = threading.Lock()

    def work(number: int) -> str:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        order.append(number)
        with lock:
            running -= 1
        return f"made {number}"

    jobs = [worker.submit("numbers", lambda _, n=n: work(n)) for n in range(8)]
    assert [finished(job).view.message for job in jobs] == [f"made {n}" for n in range(8)]
    assert (most, order) == (1, list(range(8)))


def test_the_page_is_told_only_what_is_new(worker: Worker) -> None:
    before = worker.revision
    job = worker.submit("steps", lambda job: f"{job.step(1, 3)} {job.step(2, 3)}")
    finished(job)
    time.sleep(0.05)
    after = worker.revision
    assert after > before
    assert (worker.view.state, worker.view.message, worker.view.step) == ("done", "True True", 2)
    time.sleep(0.1)
    assert worker.revision == after


def test_stop_reaches_the_running_job_and_those_behind_it(worker: Worker) -> None:
    started = threading.Event()

    def endless(job: Job) -> str:
        started.set()
        step = 0
        while job.step(step := step + 1, 10**9):
            time.sleep(0.001)
        job.check()
        return "never"

    first, second = worker.submit("endless", endless), worker.submit("behind", lambda _: "never")
    assert started.wait(5)
    worker.stop()
    assert [finished(j).view.state for j in (first, second)] == ["stopped", "stopped"]
    assert finished(worker.submit("next", lambda _: "made")).view.message == "made"


def test_every_failure_is_a_sentence_and_the_worker_goes_on(worker: Worker) -> None:
    def fails(problem: Exception) -> Job:
        def work(_: Job) -> str:
            raise problem

        return finished(worker.submit("bad", work))

    assert (
        fails(LoraError("This is no LoRA. Choose another.")).view.message
        == "This is no LoRA. Choose another."
    )
    memory = fails(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")).view
    assert memory.state == "failed"
    assert "not enough memory" in memory.message
    odd = fails(KeyError("what")).view.message
    assert "KeyError" in odd
    assert "\n" not in odd
    assert finished(worker.submit("next", lambda _: "made")).view.state == "done"


def test_closing_ends_the_thread(worker: Worker) -> None:
    worker.close()
    assert not worker._thread.is_alive()
