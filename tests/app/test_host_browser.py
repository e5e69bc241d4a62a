"""The page lets no one in, in a real browser: what another site's page can do from the next tab is nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import BrowserContext, Page, expect, sync_playwright

from app.host import Host
from tests.app import small_page
from tests.app.small_page import hosted

pytestmark = pytest.mark.browser
CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    "--no-sandbox",
    "--headless=new",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--host-resolver-rules=MAP evil.example 127.0.0.1",
]
# Everything a page can try against another: readable and blind, with forms, frames, pictures and scripts.
ATTACK = """
async target => {
  const got = [], tell = (what, text) => got.push(`${what}: ${String(text).slice(0, 200)}`);
  const body = () => { const f = new FormData(); f.append('files', new File(['evil'], 'evil.safetensors')); return f };
  const call = JSON.stringify({data: ['evil'], fn_index: 0, session_hash: 'evil', event_data: null});
  for (const mode of ['cors', 'no-cors']) for (const credentials of ['include', 'omit']) {
    const ask = (path, more) => fetch(target + path, {mode, credentials, ...more})
      .then(async r => { const text = await r.text(); if (r.type !== 'opaque' && r.ok) tell(path, text) })
      .catch(() => 0);
    await ask('/gradio_api/upload', {method: 'POST', body: body()});
    for (const type of ['text/plain', 'application/x-www-form-urlencoded', 'application/json']) {
      await ask('/gradio_api/run/shout', {method: 'POST', body: call, headers: {'Content-Type': type}});
      await ask('/gradio_api/queue/join', {method: 'POST', body: call, headers: {'Content-Type': type}});
    }
    for (const path of ['/', '/config', '/gradio_api/info', '/theme.css']) await ask(path);
  }
  navigator.sendBeacon(target + '/gradio_api/upload', body());
  const loads = (tag, attribute, path) => new Promise(done => {
    const element = document.createElement(tag);
    element.onload = () => { tell(tag, path); done() };
    element.onerror = done;
    if (tag === 'link') element.rel = 'stylesheet';
    element[attribute] = target + path;
    document.body.append(element);
    setTimeout(done, 3000);
  });
  await loads('img', 'src', '/static/img/logo.svg');
  await loads('img', 'src', '/favicon.ico');
  await loads('script', 'src', '/config');
  await loads('link', 'href', '/theme.css');
  const frame = document.createElement('iframe');
  frame.name = 'frame';
  document.body.append(frame);
  const form = document.createElement('form');
  Object.assign(form, {method: 'POST', action: target + '/gradio_api/upload', target: 'frame'});
  form.enctype = 'multipart/form-data';
  const input = document.createElement('input');
  Object.assign(input, {type: 'file', name: 'files'});
  const data = new DataTransfer();
  data.items.add(new File(['evil'], 'evil.safetensors'));
  input.files = data.files;
  form.append(input);
  document.body.append(form);
  form.submit();
  await new Promise(done => setTimeout(done, 1500));
  frame.src = target + '/';
  await new Promise(done => setTimeout(done, 1500));
  return got;
}
"""


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrowserContext]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"), executable_path=CHROMIUM, args=FLAGS
        )
        yield opened
        opened.close()


@pytest.fixture
def tab(context: BrowserContext) -> Iterator[Page]:
    page = context.new_page()
    yield page
    page.close()


@contextmanager
def other_site(html: str) -> Iterator[int]:
    """-> the port of a site that shows `html` at every path."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(html.encode())

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()


def uploads(host: Host) -> int:
    return sum(1 for path in host.uploads.folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("site", ["127.0.0.1", "localhost", "evil.example"])
def test_a_page_of_another_site_uploads_nothing_calls_nothing_reads_nothing(
    tab: Page, tmp_path: Path, site: str
) -> None:
    before = list(small_page.CALLS)
    with hosted(tmp_path) as host, other_site("<title>evil</title><body></body>") as port:
        tab.goto(f"http://{site}:{port}/")
        for name in ("127.0.0.1", "localhost"):
            assert tab.evaluate(ATTACK, f"http://{name}:{host.port}") == []
        assert uploads(host) == 0
        assert before == small_page.CALLS


def test_the_attack_is_one(tab: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same page against Gradio without the gate: else the test above would prove nothing."""
    before = len(small_page.CALLS)
    gateless: Callable[..., Any] = lambda app, **_: app  # noqa: E731
    monkeypatch.setattr("app.host.Gate", gateless)
    with hosted(tmp_path) as host, other_site("<title>evil</title><body></body>") as port:
        tab.goto(f"http://localhost:{port}/")
        got = tab.evaluate(ATTACK, f"http://127.0.0.1:{host.port}")
        assert uploads(host) > 0
        assert len(small_page.CALLS) > before
        assert any(line.startswith("/config") for line in got)


def test_a_rebound_name_reads_nothing(tab: Page, tmp_path: Path) -> None:
    """evil.example showed its own page first, then its name was pointed to this computer: same origin, our port."""
    before = list(small_page.CALLS)
    with hosted(tmp_path) as host:
        evil = f"http://evil.example:{host.port}"
        answer = tab.goto(f"{evil}/config")
        assert answer is not None
        assert answer.status == 400
        assert "small" not in tab.content()
        tab.route(
            f"{evil}/start", lambda route: route.fulfill(body="<body></body>", content_type="text/html")
        )
        tab.goto(f"{evil}/start")
        assert tab.evaluate(ATTACK, evil) == []
        assert uploads(host) == 0
        assert before == small_page.CALLS


def test_a_link_from_another_site_opens_the_page(tab: Page, tmp_path: Path) -> None:
    with hosted(tmp_path) as host, other_site(f'<a href="{host.url}">open</a>') as port:
        tab.goto(f"http://evil.example:{port}/")
        tab.get_by_text("open").click()
        expect(tab.locator("#text textarea")).to_be_visible(timeout=30_000)
        assert tab.title() == "small"


def test_a_link_with_the_token_opens_the_page_and_one_without_does_not(tab: Page, tmp_path: Path) -> None:
    links = '<a id="a" href="{0}">a</a><a id="b" href="{0}?token=a+long+word+of+ours">b</a>'
    text = tab.locator("#text textarea")
    with (
        hosted(tmp_path, host="0.0.0.0", token="a long word of ours") as host,
        other_site(links.format(host.url)) as port,
    ):
        tab.goto(f"http://evil.example:{port}/")
        tab.locator("#a").click()
        expect(tab.get_by_text("needs its token")).to_be_visible()
        tab.goto(f"http://evil.example:{port}/")
        tab.locator("#b").click()
        expect(text).to_be_visible(timeout=30_000)
        tab.goto(f"http://evil.example:{port}/")
        tab.locator("#a").click()  # the strict cookie stays behind; going on from our own page brings it
        tab.get_by_text("go on").click()
        expect(text).to_be_visible(timeout=30_000)
        assert "token" not in tab.url
        assert "lora_loom" not in tab.evaluate("document.cookie")


def test_the_page_works_and_asks_no_one_else(tab: Page, tmp_path: Path) -> None:
    asked: list[str] = []
    wrong: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    with hosted(tmp_path) as host:
        Image.new("RGB", (8, 8), "red").save(host.outputs / "red.png")
        (tmp_path / "cat.safetensors").write_bytes(b"12345678")
        tab.goto(host.url)
        text = tab.locator("#text textarea")
        text.fill("hello")
        tab.locator("#shout").click()
        expect(text).to_have_value("HELLO")
        tab.locator("input[type=file]").first.set_input_files(tmp_path / "cat.safetensors")
        expect(text).to_have_value("cat.safetensors")
        text.fill(str(host.outputs / "red.png"))
        text.press("Enter")
        picture = tab.locator("#picture img")
        expect(picture).to_be_visible()
        tab.wait_for_function("document.querySelector('#picture img').naturalWidth === 8")
        assert tab.evaluate("getComputedStyle(document.querySelector('#text')).margin") == "0px"
        assert tab.evaluate("window.ours") is True
        tab.reload()
        expect(text).to_be_visible(timeout=30_000)
        foreign = [url for url in asked if not url.startswith((host.url, "data:", "blob:"))]
        assert foreign == []
        assert wrong == []
