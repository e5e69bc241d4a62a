"""The one session of the one user: which base is open, which LoRAs are worn and how strongly, what is being made.

The page is a window onto this; it may be closed, reloaded or opened twice. What the user wants (`base`, `rows`,
`form`) changes at once and is kept in one small file; what costs time (opening, loading, drawing) is a job that
brings the pipeline to what is wanted when its turn comes.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from app import making, mixing, wearing
from app.checking import Check
from app.jobs import Job, Worker
from app.library import Library
from app.memory import Row, Wanted, read_wanted, write_wanted
from app.mixes import Mixes
from app.pictures import Pictures
from app.runs import Runs
from app.training import Training
from lora_core.errors import LoraError, NotLoaded, PredictionUnclear
from lora_core.generation import GenerationRequest
from lora_core.mix import AdapterWeight, Mix, WeightValue, known_blocks
from lora_core.pipeline import LivePipeline
from lora_core.preview import LatentPreview


class Session:
    """`models` holds Lora and Stable-diffusion, `outputs` the pictures, `runs` the trainings."""

    def __init__(self, models: Path, outputs: Path, runs: Path, *, open_now: bool = True) -> None:
        self.library, self.pictures, self.training = Library(models), Pictures(outputs), Training(runs)
        self.worker, self.check, self.runs = Worker(), Check(), Runs(runs.absolute())
        self.pipe: LivePipeline | None = None
        self.blocks: list[str] = []  # of its UNet, by name
        self.seal = ""  # the last proof, in words; empty while LoRAs are fused or nothing is open
        self.last_request: GenerationRequest | None = None
        self.said: tuple[int, str] = (0, "")  # a refusal that belongs to no job; the page shows each once
        self.said_at: dict[str, str] = {}  # place on the page -> what could not be done there, until it can
        self.unclear = ""  # a base that does not say what its UNet predicts: the page asks
        self.mixes = Mixes(models / "Mixes")
        self.put: Mix = {}  # what a whole mix made sound: as long as it does, nothing was set by hand
        self.before: Mix = {}  # what sounded before it
        self._memory = models / "session.json"
        self.lock = threading.RLock()  # guards `wanted`
        self.wanted: Wanted = read_wanted(self._memory)
        if open_now:
            self.worker.submit("Opening the model", lambda job: self.ready(job).base_name + " is open.")

    # --- what is wanted: at once, from any thread -----------------------------------------------------------

    @property
    def rows(self) -> dict[str, Row]:
        return self.wanted.rows

    def set_row(self, name: str, **changes: Any) -> None:
        """weight, text or on of one row. It acts at once, in a running generation from the next step on; a fused mix
        is live again, because fused weights cannot follow."""
        with self.lock:
            if name not in self.rows:
                return
            self.rows[name] = self.rows[name].changed(**changes)
            self.wanted.fused = False
        self.mix_now()
        self.changed()

    def play_alone(self, name: str) -> None:
        """Every other LoRA is silent, its weight remembered; the same name again, and all sound."""
        with self.lock:
            self.wanted.solo = "" if self.wanted.solo == name or name not in self.rows else name
            self.wanted.fused = False
        self.mix_now()
        self.changed()

    def mix_now(self) -> None:
        """From the page's thread: waits for the step that runs, not for the picture. What is being opened or loaded
        comes to what is wanted by itself."""
        pipe = self.pipe
        if pipe is not None:
            with suppress(NotLoaded):  # taken off meanwhile
                pipe.set_weights(self.weights(pipe))

    def weights(self, pipe: LivePipeline) -> dict[str, WeightValue]:
        with self.lock:
            solo = self.wanted.solo
            return {
                name: row.value if solo in ("", name) else 0.0
                for name, row in self.rows.items()
                if name in pipe.loaded
            }

    def remember(self, **fields: Any) -> None:
        """Fields of the Generate form, as the page last had them."""
        with self.lock:
            self.wanted.form = self.wanted.form.changed(**fields)
        self.save()

    def say(self, problem: Exception) -> None:
        self.said = (self.said[0] + 1, str(problem))

    def save(self) -> None:
        with self.lock:
            write_wanted(self._memory, self.wanted)

    def close(self) -> None:
        """Keep what is wanted, stop the job at hand. A training is another process and goes on."""
        self.worker.close()
        self.check.stop()
        self.save()

    def changed(self) -> None:
        self.save()
        self.worker.changed()

    # --- jobs -----------------------------------------------------------------------------------------------

    def choose_base(self, source: str) -> Job:
        return self.worker.submit(f"Opening {Path(source).name}", lambda job: self._choose(source, job))

    def tell_prediction(self, source: str, prediction: str) -> Job:
        """What the UNet of a base predicts, said by the user, for good; and the base is opened."""
        with self.lock:
            self.wanted.predictions[source] = prediction
        return self.choose_base(source)

    def wear(self, names: Sequence[str]) -> Job:
        """LoRAs of the library into the mixer, at weight 1."""
        return self.worker.submit(f"Loading {', '.join(names)}", lambda job: wearing.wear(self, names, job))

    def drop(self, files: Sequence[tuple[Path, str]]) -> Job:
        """Uploaded files (where they lie, what they are called): the good ones are worn, the bad ones named."""
        return self.worker.submit(f"Checking {len(files)} files", lambda job: wearing.drop(self, files, job))

    def use(self, file: Path) -> Job:
        """A training's LoRA, finished or of any step: a copy goes into the library and is worn."""
        return self.worker.submit(f"Loading {file.stem}", lambda job: wearing.use(self, file, job))

    def use_trained(self, step: int | None = None) -> Job:
        """The LoRA of the training on show: the newest there is, or the one saved at `step`."""
        view = self.training.view()
        found = None if view is None else view.lora if step is None else dict(view.saved).get(step)
        if found is None:
            raise LoraError("There is no such LoRA yet. Start a training, or save the running one.")
        return self.use(found)

    def remove(self, name: str) -> Job:
        return self.worker.submit(f"Removing {name}", lambda job: self._remove([name]))

    def unload(self) -> Job:
        return self.worker.submit("Taking all LoRAs off", lambda job: self._remove(list(self.rows)))

    def fuse(self) -> Job:
        return self.worker.submit("Fusing", self._fuse)

    def unfuse(self) -> Job:
        return self.worker.submit("Unfusing", self._unfuse)

    def measure(self) -> Job:
        return self.worker.submit("Measuring the mix", lambda job: making.measure(self, job))

    def normalise(self) -> Job:
        return self.worker.submit("Bringing the mix down", lambda job: making.normalise(self, job))

    def load_rows(self, names: Sequence[str]) -> Job:
        """Rows that are wanted and not loaded yet."""
        return self.worker.submit(
            f"Loading {', '.join(names)}", lambda job: mixing.load(self, list(names), job)
        )

    def set_auto(self, on: bool) -> None:
        """Whether the mix is fused by itself once it has stood still, and live again when touched."""
        self.wanted.auto = on
        if self.pipe is not None:
            self.pipe.mode = "auto" if on else "live"
        self.changed()

    def generate(self, request: GenerationRequest) -> Job:
        return self.worker.submit("Making pictures", lambda job: making.generate(self, request, job))

    def contact_sheet(self, request: GenerationRequest, kind: str, weights: Sequence[float]) -> Job:
        """`kind` "loras": a row per LoRA of the mixer, alone; "seeds": three seeds, the whole mix times a factor."""
        return self.worker.submit(
            "Making a contact sheet", lambda job: making.contact_sheet(self, request, kind, weights, job)
        )

    # --- on the worker's thread -----------------------------------------------------------------------------

    def ready(self, job: Job) -> LivePipeline:
        """The pipeline, opened if it is not, with the LoRAs that are wanted."""
        if self.pipe is None:
            self._open(self.wanted.base, job)
        assert self.pipe is not None
        return self.pipe

    def _choose(self, source: str, job: Job) -> str:
        """The page may ask for what the library offers, and for no other path."""
        if source not in [offered for _, offered in self.library.bases()]:
            raise LoraError(
                f"{source} is not among the base models. Put its file or folder into {self.library.base_folder}."
            )
        return self._open(source, job)

    def _open(self, source: str, job: Job) -> str:
        before, self.pipe = self.pipe, None
        if before is not None:
            before.unload()
            before.pipeline.to("cpu")  # two may not fit on the card; if the new one is refused, this is back
        try:
            pipe = LivePipeline.open(source, prediction=self.wanted.predictions.get(source))
        except LoraError as problem:
            self.unclear = source if isinstance(problem, PredictionUnclear) else ""
            if before is not None:
                before.pipeline.to(_device())
                self.pipe = before
                wearing.load_rows(self, before)
            elif source != "demo":
                self.wanted.base = "demo"
                self._open("demo", job)
            raise
        self.pipe, self.wanted.base, self.wanted.fused, self.unclear = pipe, source, False, ""
        with self.lock:
            self.wanted.plan = self.wanted.plan.on_base(source, pipe.family.key)
        pipe.mode = "auto" if self.wanted.auto else "live"
        self.blocks = known_blocks(pipe.unet_paths)
        self.look = LatentPreview(pipe.pipeline.vae)
        wearing.load_rows(self, pipe)
        self._prove(pipe)
        self.changed()
        aside = [row.name for row in self.rows.values() if row.aside]
        said = " ".join(["", *(pipe.opened.notes if pipe.opened else ())])
        return f"{pipe.base_name} ({pipe.family.title}) is open.{said}" + (
            f" Set aside, because they do not fit it: {', '.join(aside)}." if aside else ""
        )

    def _remove(self, names: Sequence[str]) -> str:
        with self.lock:
            if self.wanted.solo in names:
                self.wanted.solo = ""
            for name in names:
                self.rows.pop(name, None)
                if self.pipe is not None and name in self.pipe.loaded:
                    self.pipe.delete(name)
            self.wanted.fused = False
        if self.pipe is not None:
            self._prove(self.pipe)
        self.changed()
        return f"Taken off: {', '.join(names)}. {self.seal}." if names else "There was no LoRA to take off."

    def apply(self, pipe: LivePipeline) -> None:
        """The weights of the mixer onto the pipeline, if they differ: setting them makes a fused mix live."""
        with self.lock:
            fused = self.wanted.fused
        wanted = self.weights(pipe)
        if pipe.weights != {n: AdapterWeight.parse(n, v).plain for n, v in wanted.items()}:
            pipe.set_weights(wanted)
        if fused and not pipe.fused:
            pipe.fuse()
        elif pipe.fused and not fused and pipe.mode != "auto":
            pipe.unfuse()

    def _fuse(self, job: Job) -> str:
        pipe = self.ready(job)
        if not pipe.loaded:
            raise LoraError("There is no LoRA to fuse. Drop one onto the page, or load one from the library.")
        self.wanted.fused, self.seal = True, ""
        try:
            self.apply(pipe)
        except LoraError:
            self.wanted.fused = False
            raise
        self.changed()
        return "Fused into the base weights; unfusing brings them back, bit for bit."

    def _unfuse(self, job: Job) -> str:
        pipe = self.ready(job)
        self.wanted.fused = False
        self.apply(pipe)
        self._prove(pipe)
        self.changed()
        return f"Live again. {self.seal}."

    def _prove(self, pipe: LivePipeline) -> None:
        self.seal = str(pipe.verify_base())


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
