"""Kill trainings at random moments, with SIGKILL, and see that each goes on and ends as if nothing had happened.

    python -m tests.kill_runs --times 50 [--seed 0] [--keep FOLDER]

A small model with every layer of SD 1.5's trains with settings of all kinds (tests.trainers.matrix), other ones in each
run, and saves every third step. Every process is killed at a moment drawn evenly from most of the time it would need,
and the run is resumed, until it has finished; then the next run begins. Each time this must hold:
    the run is taken up at a whole checkpoint, and nothing that was said to be saved is lost
    no half-written file is left, and no process is refused for the lock of a dead one
    the finished LoRA is bit for bit that of a run that nobody killed
Processes are forked from this one, which spares each of them the seconds that torch needs to load.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch

import launch
from lora_core.safe_files import tensors_sha256
from tests.trainers.matrix import TOGETHER, Tables, make_place, matrix_config
from trainers import (
    checkpoints,
    dreambooth,  # noqa: F401 - loaded here, so that no forked process has to
    presets,
)

STEPS, EVERY = 20, 3
PLAIN: Tables = {
    "lora": {"dropout": 0.1},
    "data": {"flip": True},
    "train": {"gradient_accumulation": 2, "ema_decay": 0.9, "schedule": "cosine", "warmup_steps": 2},
    "preview": {"every": 5, "prompts": ["a zxq cat"], "steps": 1},
}
KINDS = {"plain": PLAIN, **TOGETHER}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.kill_runs", description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=50, help="processes to kill (50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for the runs, which then stay there")
    args = parser.parse_args(argv)
    folder = args.keep or Path(tempfile.mkdtemp(prefix="kill_runs-"))
    try:
        return Killing(folder, random.Random(args.seed)).run(args.times)
    finally:
        if args.keep is None:
            shutil.rmtree(folder, ignore_errors=True)


class Killing:
    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        folder.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(1)
        make_place(folder)
        for kind, tables in KINDS.items():
            saving = {**tables, "save": {"every": EVERY, "keep": 2}}
            settings = matrix_config(folder, folder, saving, steps=STEPS)
            self.preset(kind).write_text(presets.dump(settings), encoding="utf-8")
        self.undisturbed: dict[str, tuple[str, float]] = {}  # of each kind: the LoRA's digest, and seconds

    def preset(self, kind: str) -> Path:
        return self.folder / f"{kind}.toml"

    def wanted(self, kind: str) -> tuple[str, float]:
        """What nobody kills, trained when it is first asked for."""
        if kind not in self.undisturbed:
            name = f"undisturbed-{kind}"
            code, usual_s = self.process(name, kind, None)
            assert code == 0, f"the run that nobody kills failed: {self.log(name)}"
            found = tensors_sha256(self.folder / name / "small" / "small.safetensors")
            print(f"{name}: {STEPS} steps in {usual_s:.1f} s, {found[:12]}", flush=True)
            self.undisturbed[kind] = found, usual_s
        return self.undisturbed[kind]

    def run(self, times: int) -> int:
        began = time.monotonic()
        killed, runs, at_step = 0, 0, []
        while killed < times:
            kind = list(KINDS)[runs % len(KINDS)]
            wanted, usual_s = self.wanted(kind)
            runs += 1
            name = f"run-{runs}-{kind}"
            while True:
                last = killed >= times
                code, _ = self.process(name, kind, None if last else self.rng.uniform(0, 0.8 * usual_s))
                if code == 0:
                    break
                if code != -signal.SIGKILL:
                    print(f"{name} ended with {code} after {killed} kills: {self.log(name)}", file=sys.stderr)
                    return 1
                killed += 1
                at_step.append(self.check(name))
            found = tensors_sha256(self.folder / name / "small" / "small.safetensors")
            print(f"{name}: finished, {killed} killed so far, {found[:12]}", flush=True)
            if found != wanted:
                print(f"{name} is another LoRA than undisturbed-{kind}.", file=sys.stderr)
                return 1
        spread = ", ".join(str(step) for step in sorted(at_step))
        print(
            f"{killed} processes killed (last step each had said: {spread}); {runs} runs, all bit-equal, ",
            end="",
        )
        print(f"in {time.monotonic() - began:.0f} s")
        return 0

    def process(self, name: str, kind: str, kill_after_s: float | None) -> tuple[int, float]:
        """Start or resume a run, and kill it -> how it ended as subprocess has it, and how long it took."""
        run = self.folder / name / "small"
        words = ["--train", "--resume", str(run)]
        if not (run / "preset.toml").exists():  # killed before the run had a place
            shutil.rmtree(run, ignore_errors=True)
            words = ["--train", str(self.preset(kind)), "--set", f"output={self.folder / name}"]
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            self.become(words, name)
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status), time.monotonic() - began
            if kill_after_s is not None and time.monotonic() - began > kill_after_s:
                os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
                return os.waitstatus_to_exitcode(status), time.monotonic() - began
            time.sleep(0.005)

    def become(self, words: list[str], name: str) -> NoReturn:
        """The forked child: its words into a file, then nothing but the command. Does not return."""
        code = 1
        try:
            log = os.open(self.folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            code = launch.main(words)
        finally:
            sys.stdout.flush()
            os._exit(code)

    def check(self, name: str) -> int:
        """What a killed process has left -> the last step it had said. Raises AssertionError."""
        run = self.folder / name / "small"
        if not (run / "events.jsonl").exists():
            return 0
        events = whole_events(run)
        saved = [e["step"] for e in events if e["event"] == "Saved"]
        if saved:
            path, _ = checkpoints.newest_whole(run / "checkpoints")
            step = int(path.stem.removeprefix("step-"))
            assert step >= max(saved), (
                f"{name}: step {max(saved)} was saved, and {path.name} is the newest whole"
            )
        was = 0  # the newest step that was said to be saved before each start
        for event in events:
            if event["event"] == "Started":
                assert event["first_step"] > was, (
                    f"{name}: began at {event['first_step']}, and {was} was saved"
                )
            if event["event"] == "Saved":
                was = max(was, event["step"])
        assert not [p for p in run.rglob(".*.partial") if older(p, events)], (
            f"{name}: half-written files stayed"
        )
        return max((e["step"] for e in events if e["event"] == "Step"), default=0)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")[-2000:]


def older(file: Path, events: list[dict[str, Any]]) -> bool:
    """Whether a process that began since has left the half-written file of an earlier one."""
    begun = [event["time"] for event in events if event["event"] == "TakenUp"]
    return bool(begun) and file.stat().st_mtime < begun[-1] - 1


def whole_events(run: Path) -> list[dict[str, Any]]:
    """A line that the kill has cut short is none, wherever a later process has gone on behind it."""
    found = []
    for line in (run / "events.jsonl").read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


if __name__ == "__main__":
    sys.exit(main())
