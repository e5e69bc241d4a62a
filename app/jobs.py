"""One worker for everything that touches the model: one job at a time, in the order asked for.

A Gradio handler may die with its page, and cancelling one leaves its thread running beside the next. So the page
never works itself: it submits a job here, and looks at `snapshot` twice a second.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from lora_core.errors import LoraError, Stopped

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobView:
    """What the page shows of the job at hand, or of the last one."""

    title: str = ""
    state: str = "idle"  # idle, waiting, running, done, stopped, failed
    step: int = 0
    steps: int = 0
    preview: str = ""  # a data URI made here
    message: str = ""  # what was done, or what went wrong and what to do

    @property
    def busy(self) -> bool:
        return self.state in ("waiting", "running")


@dataclass(eq=False)
class Job:
    """One piece of work. `work(job)` returns the sentence to show when it is done."""

    title: str
    work: Callable[[Job], str]
    worker: Worker
    stopping: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)
    view: JobView = field(default_factory=JobView)

    def show(self, **changes: object) -> None:
        """Change what the page sees of this job."""
        self.view = replace(self.view, **changes)  # type: ignore[arg-type]
        self.worker.changed()

    def step(self, step: int, steps: int) -> bool:
        """`LivePipeline.generate`'s on_step: False once the user has asked to stop."""
        self.show(step=step, steps=steps)
        return not self.stopping.is_set()

    def check(self) -> None:
        """Raise Stopped if the user has asked to stop."""
        if self.stopping.is_set():
            raise Stopped("Stopped.")


class Worker:
    """The thread and its queue. `revision` grows with every change, so that a page that has seen it is sent nothing."""

    def __init__(self) -> None:
        self.revision = 0
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._waiting: list[Job] = []
        self._last = JobView()
        self._current: Job | None = None
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)
        self._thread.start()

    def submit(self, title: str, work: Callable[[Job], str]) -> Job:
        job = Job(title, work, self, view=JobView(title, "waiting"))
        with self._lock:
            self._waiting.append(job)
        self._queue.put(job)
        self.changed()
        return job

    def changed(self) -> None:
        with self._lock:
            self.revision += 1

    @property
    def view(self) -> JobView:
        """The running job, else the next one waiting, else how the last one ended."""
        with self._lock:
            job = self._current or (self._waiting[0] if self._waiting else None)
            return job.view if job else self._last

    @property
    def waiting(self) -> int:
        with self._lock:
            return len(self._waiting)

    def stop(self) -> None:
        """Ask the running job to stop, and drop those that wait."""
        with self._lock:
            for job in self._waiting if self._current is None else [self._current, *self._waiting]:
                job.stopping.set()
        self.changed()

    def close(self, timeout_s: float = 10.0) -> None:
        """Stop everything and wait for the thread."""
        self.stop()
        self._queue.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            with self._lock:
                self._waiting.remove(job)
                self._current = job
            try:
                job.check()
                job.show(state="running")
                job.show(state="done", message=job.work(job), preview="")
            except Stopped as problem:
                job.show(state="stopped", message=str(problem), preview="")
            except LoraError as problem:
                job.show(state="failed", message=str(problem), preview="")
            except Exception as problem:  # the worker outlives every job; the page says what happened
                log.exception("%s failed", job.title)
                job.show(state="failed", message=unexpected(problem), preview="")
            with self._lock:
                self._last, self._current = job.view, None
            job.done.set()
            self.changed()


def unexpected(problem: Exception) -> str:
    """A sentence for what no one foresaw; memory is the one everybody meets."""
    if "out of memory" in str(problem).lower() or isinstance(problem, MemoryError):
        return (
            "There is not enough memory for this. Make fewer or smaller pictures at a time, stop a running training, "
            "or close other programs that use the card."
        )
    reason = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
    return f"This failed in a way that was not foreseen ({type(problem).__name__}: {reason[:200]}). The log has more."
