"""The server is stopped by a signal while a training runs and its page is open: nothing is lost, all is found again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import expect

from app.training import Training
from tests.app.page import browser, wait

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def launched(home: Path, port: int = 7860) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`python launch.py` as a user starts it, with its folders in `home` -> the process and its address."""
    command = [sys.executable, str(ROOT / "launch.py"), "--no-browser", "--models", str(home / "models")]
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        cwd=home,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.search(r"LoRA Loom is at (http://\S+)", line):
                yield process, found[1]
                return
        raise AssertionError(f"launch.py ended with {process.wait()} before it served")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_while_training(tmp_path: Path, number: signal.Signals) -> None:
    watched = Training(tmp_path / "runs")
    with browser(tmp_path / "chrome") as chrome:
        page = chrome.new_page()
        try:
            with launched(tmp_path) as (server, url):
                page.goto(url)
                expect(page.locator("#generate")).to_be_visible(timeout=60_000)
                page.locator("#prompt textarea").fill("a frog on a red background")
                page.get_by_role("tab", name="Train").click()
                page.locator("#train-example").click()
                expect(page.locator(".thumb")).to_have_count(5, timeout=30_000)
                page.locator("#train-class input").uncheck()
                page.locator("#train-steps input[type=number]").fill("5000")
                page.locator("#train-steps input[type=number]").press("Enter")
                page.locator("#train-start").click()
                wait(lambda: (view := watched.view()) and view.step > 5, "the first steps", 120)
                server.send_signal(number)
                said = server.communicate(timeout=60)[0]
                if number is signal.SIGTERM:
                    assert server.returncode == 0
                    assert "goes on in a process of its own and was asked to save" in said
                    wait(lambda: (view := watched.view()) and view.saved, "the save", 60)
            before = watched.view()
            assert before is not None
            assert before.state == "running"
            with launched(tmp_path, port=int(url.rstrip("/").rpartition(":")[2])) as (_, again):
                assert again == url
                page.goto(again)
                expect(page.locator("#prompt textarea")).to_have_value(
                    "a frog on a red background", timeout=60_000
                )
                expect(page.locator("#status")).to_contain_text("Training my-first-lora", timeout=30_000)
                page.get_by_role("tab", name="Train").click()
                page.locator("#train-stop").click()
                wait(lambda: watched.current() is None, "the training to stop", 60)
            view = watched.view()
            assert view is not None
            assert view.state == "stopped"
            assert view.step >= before.step
            assert list((view.run / "checkpoints").glob("step-*.safetensors"))
        finally:
            if watched.current() is not None:
                watched.commands().stop()
                wait(lambda: watched.current() is None, "the training to end", 60)
