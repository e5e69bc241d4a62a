"""How the page is served: Gradio inside an app of our own, behind the gate, in a thread that can be stopped.

`gradio`'s own launch() answers under any host name, dies on SIGTERM with nothing saved, and does what GRADIO_*
variables tell it behind everyone's back. Here uvicorn runs in a thread and the main thread waits for signals:
first everything is saved, then the server stops. Importing this module is cheap; gradio comes with the page.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
import time
import webbrowser
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.gate import Gate
from app.listening import check_reach, is_local, listen, reach
from app.uploads import QUOTA, Uploads
from lora_core.errors import ConfigError, LoraError

__all__ = ["Host", "Page", "calm_environment", "check_reach", "serve"]

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
LARGEST_UPLOAD = 4 * 2**30  # bytes a file
START_S, STOP_S, TIDY_S = 300.0, 5.0, 600.0  # a first start compiles gradio: minutes on a small machine
SHORT_TOKEN = 16  # characters; guessing a shorter one may be worth a stranger's while


@dataclass(frozen=True)
class Page:
    """What is served. Gradio 6 takes a page's looks where it is mounted, not where it is made."""

    blocks: Any
    theme: Any = None
    css: str = ""
    head: str = ""
    routes: Any = None  # a fastapi.APIRouter beside Gradio's own routes


MakePage = Callable[[], Page]


def calm_environment(uploads: Path | None = None) -> None:
    """Nothing in the environment may open, share, profile or report this page. Before gradio is imported."""
    for name in [n for n in os.environ if n.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ.pop("SPACE_ID", None)  # gradio would take this computer for one of Hugging Face's
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if uploads is not None:
        os.environ["GRADIO_TEMP_DIR"] = str(uploads)
        os.environ["GRADIO_EXAMPLES_CACHE"] = str(uploads / "examples")


class Host:
    """One served page. `start` returns when it answers, `stop` when it does no longer; also a context."""

    def __init__(
        self,
        make_page: MakePage,
        *,
        host: str = "127.0.0.1",
        port: int = 7860,
        token: str = "",
        outputs: Path,
        temporary: Path,
        quota: int = QUOTA,
    ) -> None:
        """`port` 0 is any free one. `outputs` are the only files served but for uploads, which go to
        `temporary`. Raises ConfigError for an address that cannot be listened on, or not without a token."""
        check_reach(host, token)
        self._make_page, self._token = make_page, token.strip()
        self.host = "127.0.0.1" if host == "localhost" else host
        self.outputs = outputs
        self._socket = listen(self.host, port)
        self.port = int(self._socket.getsockname()[1])
        self.moved = port not in (0, self.port)
        self.uploads = Uploads(temporary, quota=quota)
        self._server: Any = None
        self._thread = threading.Thread(target=self._run, name="page", daemon=True)
        self._over = threading.Event()
        self._problem: BaseException | None = None

    @property
    def url(self) -> str:
        """For a browser on this computer, without the token."""
        anywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
        host = anywhere.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/"

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        """Raises LoraError if the page does not come up."""
        self._thread.start()
        until = time.monotonic() + START_S
        while not (self._server is not None and self._server.started):
            if not self.running or time.monotonic() > until:
                self.stop()
                raise LoraError(
                    f"The page did not start ({self._problem or f'no answer within {START_S:.0f} s'}). Start it "
                    "again; if it stays so, report it with this message."
                ) from self._problem
            time.sleep(0.02)
        threading.Thread(target=self._tidy, name="tidy", daemon=True).start()

    def stop(self) -> None:
        """Open pages are cut off after a second; they reconnect by themselves when the server is back."""
        self._over.set()
        if self._server is not None:
            self._server.should_exit = True
        if self.running:
            self._thread.join(STOP_S)
        self._socket.close()
        self.uploads.remove()

    def __enter__(self) -> Host:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except (Exception, SystemExit) as problem:  # whatever keeps a page from coming up: start() says it
            self._problem = problem

    async def _serve(self) -> None:
        """The page is made inside the loop: outside of one gradio makes loops of its own and never closes them."""
        app = self._app()
        import uvicorn  # noqa: PLC0415 - it and gradio cost seconds, which no other command should pay

        config = uvicorn.Config(
            app,
            log_level="error",
            access_log=False,
            lifespan="on",
            ws="none",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        if not self._over.is_set():  # stopped while the page was being made
            await self._server.serve(sockets=[self._socket])
            # an open page asks again at any moment: what came in while the server was closing
            for connection in list(self._server.server_state.connections):
                connection.transport.abort()
            await asyncio.sleep(0.05)

    def _app(self) -> Gate:
        calm_environment(self.uploads.folder)
        import gradio  # noqa: PLC0415
        from fastapi import FastAPI  # noqa: PLC0415

        page = self._make_page()
        self.outputs.mkdir(parents=True, exist_ok=True)
        ours = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        if page.routes is not None:
            ours.include_router(page.routes)
        app = gradio.mount_gradio_app(
            ours,
            page.blocks,
            path="/",
            server_name=self.host,
            server_port=self.port,
            footer_links=[],
            run_history=False,
            allowed_paths=[str(self.outputs.resolve())],
            show_error=False,
            max_file_size=min(LARGEST_UPLOAD, self.uploads.quota),
            ssr_mode=False,
            enable_monitoring=False,
            pwa=False,
            mcp_server=False,
            theme=page.theme,
            css=page.css,
            head=page.head,
        )
        folders = (self.outputs, self.uploads.folder)
        return Gate(
            app, reach=reach(self.host, self.port), token=self._token, folders=folders, uploads=self.uploads
        )

    def _tidy(self) -> None:
        while not self._over.wait(TIDY_S):
            self.uploads.tidy()


def serve(
    make_page: MakePage,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    token: str = "",
    open_browser: bool = True,
    outputs: Path,
    temporary: Path,
    on_stop: Callable[[], None],
) -> int:
    """Serve until SIGINT or SIGTERM, then save by `on_stop`, then stop -> the exit code. Main thread only.

    A second signal leaves at once. `make_page` is called once, in the server's thread; it is the place to
    import gradio. `temporary` should lie on the disk of the models.
    """
    try:
        page = Host(make_page, host=host, port=port, token=token, outputs=outputs, temporary=temporary)
    except ConfigError as problem:
        print(problem, file=sys.stderr)
        return USAGE
    with _signals() as came:
        try:
            page.start()
        except LoraError as problem:
            print(problem, file=sys.stderr)
            return FAILED
        _announce(page, port, token.strip())
        if open_browser and not came:
            _open_browser(page.url + (f"?token={token.strip()}" if token.strip() else ""))
        while not came and page.running:
            time.sleep(0.05)
        return _leave(page, on_stop)


def _leave(page: Host, on_stop: Callable[[], None]) -> int:
    died, code = not page.running, DONE
    try:
        on_stop()
    except LoraError as problem:
        print(problem, file=sys.stderr)
        code = FAILED
    finally:
        page.stop()
    if died:
        print("The server of the page ended by itself. Start LoRA Loom again.", file=sys.stderr)
    return FAILED if died else code


def _announce(page: Host, port: int, token: str) -> None:
    if page.moved:
        print(f"Port {port} is taken by another program; {page.port} is used instead.")
    rest = "?token=..." if token else ""
    print(f"LoRA Loom is at {page.url}{rest}  (Ctrl+C saves and stops)", flush=True)
    if not is_local(page.host):
        print(f"Other computers reach it at http://{socket.gethostname()}:{page.port}/{rest}", flush=True)
        if len(token) < SHORT_TOKEN:
            print(f"The token is short: {SHORT_TOKEN} characters or more cannot be guessed.", flush=True)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that came, in a list that fills up. A list and not an Event: its lock may be held by the very
    thread that the handler interrupts."""
    came: list[int] = []

    def handler(number: int, _: object) -> None:
        came.append(number)
        if len(came) > 1:
            os._exit(INTERRUPTED)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _open_browser(url: str) -> None:
    """Where there is a desktop: in a terminal Python would start a text browser and take the keyboard."""
    if sys.platform in ("win32", "darwin") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
