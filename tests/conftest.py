"""Every test runs offline: a connection that leaves the machine is an error, not a slow pass."""

from __future__ import annotations

import os
import signal
import socket
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # before torch is imported: processes that each take every core wait for one another most of the time
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // int(workers)))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # a shell ignores it in what it starts in the background, children inherit that, and Ctrl-C is tested
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):  # and nohup ignores the end of a terminal, which is tested too
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else "local"
        assert host in {"127.0.0.1", "::1", "localhost", "local"}, f"a test tried to reach {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    return
