"""The page lets no one in: real requests to a real server. Oracle: what a browser or an attacker would send."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from PIL import Image

from app import host as host_module
from app.gate import Reach
from app.host import Host, calm_environment, serve
from app.listening import check_reach, is_local
from app.uploads import SPARED_S, Uploads
from lora_core.errors import ConfigError
from tests.app import small_page
from tests.app.small_page import ask, hosted, multipart

ROOT = Path(__file__).resolve().parents[2]
ROUTES = [  # every kind of route Gradio has, and none
    ("GET", "/"),
    ("HEAD", "/"),
    ("GET", "/config"),
    ("GET", "/theme.css"),
    ("GET", "/static/img/logo.svg"),
    ("GET", "/assets/nothing.js"),
    ("GET", "/favicon.ico"),
    ("GET", "/manifest.json"),
    ("GET", "/robots.txt"),
    ("GET", "/gradio_api/info"),
    ("GET", "/gradio_api/app_id"),
    ("GET", "/gradio_api/startup-events"),
    ("GET", "/gradio_api/file=/etc/passwd"),
    ("GET", "/gradio_api/upload_progress?upload_id=1"),
    ("POST", "/gradio_api/upload"),
    ("POST", "/gradio_api/queue/join"),
    ("GET", "/gradio_api/queue/data?session_hash=x"),
    ("POST", "/gradio_api/run/shout"),
    ("POST", "/gradio_api/api/shout"),
    ("POST", "/gradio_api/call/shout"),
    ("POST", "/gradio_api/cancel"),
    ("POST", "/gradio_api/reset"),
    ("POST", "/gradio_api/component_server"),
    ("OPTIONS", "/gradio_api/run/shout"),
    ("GET", "/monitoring"),
    ("GET", "/nothing"),
    ("DELETE", "/"),
]
# Routes of Gradio's that the page does without: they fetch addresses, edit code, record, or administer.
UNUSED = [
    ("GET", "/gradio_api/proxy=http://127.0.0.1:1/x"),
    ("POST", "/gradio_api/vibe-edit"),
    ("GET", "/gradio_api/vibe-code"),
    ("POST", "/gradio_api/process_recording"),
    ("GET", "/gradio_api/dev/reload"),
    ("GET", "/gradio_api/deep_link?session_hash=x"),
    ("GET", "/gradio_api/mcp/sse"),
    ("GET", "/gradio_api/openapi.json"),
    ("GET", "/gradio_api/runs"),
    ("GET", "/gradio_api/custom_component/a/client/component/index.js"),
    ("GET", "/monitoring/summary"),
    ("POST", "/login"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "//"),
    ("GET", "http://127.0.0.1/"),
]
SIMPLE = [
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=edge",
    "",
    "application/json",
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with hosted(tmp_path_factory.mktemp("page")) as host:
        yield host


def uploaded(host: Host) -> list[Path]:
    return [p for p in host.uploads.folder.rglob("*") if p.is_file()]


def call(port: int, text: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    body = json.dumps({"data": [text]}).encode()
    return ask(port, "POST", "/gradio_api/run/shout", body, Content_Type="application/json", **headers)


# ---------------------------------------------------------------- it works for its own page


def test_own_page_opens_calls_and_uploads(page: Host) -> None:
    origin = page.url.rstrip("/")
    assert ask(page.port, "GET", "/")[0] == 200
    status, _, body = call(page.port, "hello", Origin=origin, Sec_Fetch_Site="same-origin")
    assert (status, json.loads(body)["data"]) == (200, ["HELLO"])
    content, kind = multipart("cat.safetensors", b"12345678")
    status, _, body = ask(page.port, "POST", "/gradio_api/upload", content, Content_Type=kind, Origin=origin)
    assert status == 200
    path = Path(json.loads(body)[0])
    assert path.is_relative_to(page.uploads.folder)
    assert path.read_bytes() == b"12345678"
    assert ask(page.port, "GET", f"/gradio_api/file={path}")[0] == 200
    with httpx.Client(base_url=f"http://localhost:{page.port}") as client:
        assert client.get("/config").json()["version"].startswith("6.")


# ---------------------------------------------------------------- hosts


@pytest.mark.parametrize(("method", "path"), ROUTES + UNUSED)
def test_foreign_host_is_400_everywhere(page: Host, method: str, path: str) -> None:
    for name in ("evil.example", f"evil.example:{page.port}"):
        status, headers, body = ask(page.port, method, path, b"{}", Host=name)
        assert status == 400
        assert headers["x-content-type-options"] == "nosniff"
        assert b"small" not in body


@pytest.mark.parametrize(
    "name",
    [
        "",
        "127.0.0.1",
        "localhost",
        "127.0.0.1:1",
        "127.0.0.1:{port}.evil.example",
        "localhost.:{port}",
        "127.1:{port}",
        "[::1]:{port}",
        "0.0.0.0:{port}",
        "evil@127.0.0.1:{port}",
        "127.0.0.1:{port}/",
        "2130706433:{port}",
    ],
)
def test_host_is_exact(page: Host, name: str) -> None:
    assert ask(page.port, "GET", "/config", Host=name.format(port=page.port))[0] == 400


def test_two_hosts_or_none_are_400(page: Host) -> None:
    for lines in (f"Host: 127.0.0.1:{page.port}\r\nHost: evil.example", "Accept: */*"):
        with socket.create_connection(("127.0.0.1", page.port), timeout=10) as wire:
            wire.sendall(f"GET /config HTTP/1.1\r\n{lines}\r\nConnection: close\r\n\r\n".encode())
            assert wire.recv(100).startswith(b"HTTP/1.1 400")


def test_upgrade_to_a_web_socket_is_not_there(page: Host) -> None:
    answer = ask(
        page.port, "GET", "/gradio_api/queue/join", Connection="Upgrade", Upgrade="websocket",
        Sec_WebSocket_Key="dGhlIHNhbXBsZSBub25jZQ==", Sec_WebSocket_Version="13",
    )  # fmt: skip
    assert answer[0] in (404, 405)


# ---------------------------------------------------------------- other sites


@pytest.mark.parametrize("kind", SIMPLE)
@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "http://evil.example",
        "http://localhost:9999",
        "https://127.0.0.1:{port}",
        "",
        "http://localhost:{port}",
    ],
)
def test_foreign_origin_is_403_and_leaves_nothing(page: Host, origin: str, kind: str) -> None:
    before, calls = uploaded(page), list(small_page.CALLS)
    body, _ = multipart("evil.safetensors", b"evil")
    origin = origin.format(port=page.port)
    for method, path in ROUTES:
        sent = body if path.endswith("upload") else b'{"data": ["evil"]}'
        assert ask(page.port, method, path, sent, Origin=origin, Content_Type=kind)[0] == 403
    assert uploaded(page) == before
    assert calls == small_page.CALLS


@pytest.mark.parametrize("site", ["cross-site", "same-site", "nonsense"])
def test_cross_site_fetch_is_403_but_a_link_opens_the_page(page: Host, site: str) -> None:
    for method, path in ROUTES:
        assert ask(page.port, method, path, b"{}", Sec_Fetch_Site=site)[0] == 403
    link = {"Sec_Fetch_Site": site, "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}
    assert ask(page.port, "GET", "/", **link)[0] == 200
    assert ask(page.port, "GET", "/?__theme=dark", **link)[0] == 200
    assert ask(page.port, "GET", "/", **{**link, "Sec_Fetch_Dest": "iframe"})[0] == 403
    assert ask(page.port, "GET", "/", **{**link, "Sec_Fetch_Mode": "no-cors"})[0] == 403
    assert ask(page.port, "GET", "/config", **link)[0] == 403
    assert ask(page.port, "POST", "/", b"", **link)[0] == 403


@pytest.mark.parametrize(("method", "path"), UNUSED)
def test_routes_the_page_does_without_are_404(page: Host, method: str, path: str) -> None:
    assert ask(page.port, method, path, b"{}")[0] == 404


def test_lies_about_the_address_are_not_believed(page: Host) -> None:
    lies = {
        "X_Forwarded_Host": "evil.example",
        "X_Forwarded_Proto": "https",
        "X_Gradio_Server": "http://evil.example",
    }
    assert b"evil.example" not in ask(page.port, "GET", "/config", **lies)[2]


# ---------------------------------------------------------------- headers


@pytest.mark.parametrize(("method", "path"), ROUTES + UNUSED)
def test_every_answer_says_how_it_may_be_used(page: Host, method: str, path: str) -> None:
    for origin in ({}, {"Origin": page.url.rstrip("/")}, {"Origin": "null"}):
        if path.startswith("/gradio_api/queue/data") and origin != {"Origin": "null"}:
            continue  # it waits for events
        _, headers, _ = ask(page.port, method, path, b"{}", Content_Type="application/json", **origin)
        policy = headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert not [name for name in headers if name.startswith("access-control-")]
        assert "server" not in headers


# ---------------------------------------------------------------- files


def secrets_around(tmp_path: Path) -> dict[str, Path]:
    """Files that must not be had, around and inside the folder whose files may."""
    outputs = tmp_path / "outputs"
    (tmp_path / "secret.png").write_bytes(b"SECRET")
    (tmp_path / "outputs2").mkdir()
    (tmp_path / "outputs2" / "a.png").write_bytes(b"SECRET")
    (outputs / ".hidden").mkdir()
    (outputs / ".hidden" / "a.png").write_bytes(b"SECRET")
    (outputs / ".env").write_bytes(b"SECRET")
    (outputs / "out.png").symlink_to(tmp_path / "secret.png")
    (outputs / "out").symlink_to(tmp_path)
    (outputs / "loop").symlink_to(outputs / "loop")
    os.mkfifo(outputs / "pipe.png")
    return {"tmp": tmp_path, "o": outputs}


PAYLOADS = [
    "{tmp}/secret.png", "{o}/../secret.png", "{o}/x/../../secret.png", "{o}/./../secret.png", "{o}//../secret.png",
    "{o}/%2e%2e/secret.png", "{o}/..%2fsecret.png", "{o}%2f..%2fsecret.png", "{o}/%252e%252e/secret.png",
    "{o}/..%5csecret.png", "{o}/..\\secret.png", "{o}\\..\\secret.png", "{o}/%c0%ae%c0%ae/secret.png",
    "{o}/..;/secret.png", "{o}/..%00/secret.png", "{o}/a.png%00.txt", "{o}/out.png", "{o}/out/secret.png",
    "{o}/loop", "{o}/.env", "{o}/.hidden/a.png", "{o}", "{o}/", "{o}/.", "{o}2/a.png", "{o}/pipe.png",
    "{o}/a.png:stream", "{o}/a.png::$DATA", "{o}/nothing.png", "{o}/" + "a" * 5000, "/etc/passwd", "//etc/passwd",
    "/proc/self/environ", "/dev/zero", "outputs/a.png", "../outputs/a.png", "./launch.py", "launch.py", "~/.bashrc",
    "C:/Windows/win.ini", "C:\\Windows\\win.ini", "\\\\host\\share\\x", "//host/share/x", "%5c%5chost%5cshare",
    "\\\\?\\C:\\x", "file:///etc/passwd", "file://{o}/../secret.png", "http://169.254.169.254/x", "https://evil.example/x",
    "ftp://evil.example/x", "data:text/plain,x", "", "/", ".gradio/cached_examples/x",
]  # fmt: skip


def test_no_path_leads_out_of_the_outputs(tmp_path: Path) -> None:
    with hosted(tmp_path) as host:
        places = secrets_around(tmp_path)
        Image.new("RGB", (2, 2)).save(places["o"] / "a.png")
        for start in ("/gradio_api/file=", "/gradio_api/file/"):
            assert ask(host.port, "GET", f"{start}{places['o']}/a.png")[0] == 200
            assert ask(host.port, "HEAD", f"{start}{places['o']}/a.png")[0] in (200, 405)
            for payload in PAYLOADS:
                path = payload.format(**{name: str(place) for name, place in places.items()})
                path = path if "%" in path else quote(path, safe="/:;\\?=&")
                status, _, body = ask(host.port, "GET", start + path)
                assert status in (403, 404), payload
                assert b"SECRET" not in body
                assert b"root:" not in body


def test_only_pictures_are_shown(tmp_path: Path) -> None:
    evil = b"<script>alert(1)</script>"
    names = [
        "a.html",
        "a.svg",
        "a.xhtml",
        "a.js",
        "a.css",
        "a.pdf",
        "a.txt",
        "a.json",
        "a.xml",
        "a.mht",
        "a",
        "a.png.html",
    ]
    with hosted(tmp_path) as host:
        for name in names:
            (host.outputs / name).write_bytes(evil)
            for more in ({}, {"Range": "bytes=0-5"}):
                status, headers, _ = ask(host.port, "GET", f"/gradio_api/file={host.outputs / name}", **more)
                assert status == 200
                assert headers["content-type"] == "application/octet-stream", name
                assert headers["content-disposition"] == "attachment"
                assert "sandbox" in headers["content-security-policy"]
        (host.outputs / "a.webp").write_bytes(evil)
        _, headers, _ = ask(host.port, "GET", f"/gradio_api/file={host.outputs / 'a.webp'}")
        assert (headers["content-type"], headers["content-disposition"]) == ("image/webp", "inline")


# ---------------------------------------------------------------- floods


def send(host: Host, size: int, **headers: str) -> int:
    body, kind = multipart("x.bin", os.urandom(size))
    return ask(host.port, "POST", "/gradio_api/upload", body, Content_Type=kind, **headers)[0]


def test_uploads_stay_under_the_quota_and_old_ones_make_room(tmp_path: Path) -> None:
    with hosted(tmp_path, quota=100_000) as host:
        answers = [send(host, 30_000) for _ in range(10)]
        assert answers == [200] * 3 + [413] * 7
        assert host.uploads.used() <= 100_000
        old = time.time() - SPARED_S - 10
        for path in uploaded(host):
            os.utime(path, (old, old))
        assert send(host, 30_000) == 200
        assert send(host, 100_001) == 413
        assert host.uploads.used() <= 100_000
        assert len(list(host.uploads.folder.iterdir())) <= 3  # emptied folders go with their files


def test_calls_without_or_with_a_monstrous_length_are_refused(page: Host) -> None:
    assert (
        ask(page.port, "POST", "/gradio_api/run/shout", b"0\r\n\r\n", Transfer_Encoding="chunked")[0] == 411
    )
    body = ask(page.port, "POST", "/gradio_api/run/shout", Content_Length=str(2**40))
    assert body[0] == 413


def test_repeated_uploads_leave_no_empty_files_for_long(tmp_path: Path) -> None:
    with hosted(tmp_path) as host:
        body, kind = multipart("x.bin", b"the same")
        for _ in range(5):
            assert ask(host.port, "POST", "/gradio_api/upload", body, Content_Type=kind)[0] == 200
        for path in uploaded(host):
            os.utime(path, (time.time() - 100,) * 2)
        host.uploads.tidy()
        assert [p.name for p in uploaded(host)] == ["x.bin"]


def test_folders_of_the_dead_are_swept_and_nothing_else(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead, alive, other = (tmp_path / n for n in (f"{gone.pid}-0123abcd", f"{os.getpid()}-0123abcd", "photos"))
    for folder in (dead, alive, other):
        folder.mkdir()
        (folder / "x").touch()
    uploads = Uploads(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([alive, other, uploads.folder])
    uploads.remove()
    assert not uploads.folder.exists()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be used"):
        Uploads(tmp_path / "file")


# ---------------------------------------------------------------- the token


def test_without_a_token_it_does_not_listen_to_the_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("0.0.0.0", "::", "192.168.1.5", "my-computer", "", "127.0.0.1.evil.example"):
        assert not is_local(name)
        folders: dict[str, Any] = {"outputs": tmp_path / "o", "temporary": tmp_path / "t"}
        for blank in ("", "  "):
            code = serve(small_page.small_page, host=name, token=blank, **folders, on_stop=lambda: None)
            assert code == 2
            assert "--token" in capsys.readouterr().err
    for name in ("127.0.0.1", "localhost", "::1", "127.0.0.2"):
        check_reach(name, "")
    assert list(tmp_path.iterdir()) == []


def test_token_opens_and_nothing_else_does(tmp_path: Path) -> None:
    with hosted(tmp_path, host="0.0.0.0", token="a long word of ours") as host:
        for method, path in ROUTES:
            assert ask(host.port, method, path, b"{}")[0] == 401
        assert ask(host.port, "GET", "/?token=a+long+word")[0] == 401
        assert ask(host.port, "GET", "/config?token=a+long+word+of+ours")[0] == 401
        assert ask(host.port, "GET", "/", Cookie=f"lora_loom_{host.port}=a long word of ours")[0] == 401
        status, headers, body = ask(host.port, "GET", "/?token=a+long+word+of+ours")
        cookie, *marks = headers["set-cookie"].split("; ")
        assert (status, marks) == (200, ["HttpOnly", "SameSite=Strict", "Path=/"])
        assert b"long word" not in body
        assert "long" not in cookie
        assert ask(host.port, "GET", "/", Cookie=f"other=1; {cookie}")[0] == 200
        assert call(host.port, "x", Cookie=cookie)[0] == 200
        assert call(host.port, "x", Cookie=cookie, Origin="null")[0] == 403
        assert ask(host.port, "GET", "/config", Cookie=cookie, Host="evil.example")[0] == 400
        assert ask(host.port, "GET", "/config", Cookie=cookie, Host=f"192.168.1.5:{host.port}")[0] == 200


def test_an_open_host_answers_to_addresses_and_its_own_name_alone() -> None:
    reach = Reach(frozenset({"tower:80", "tower"}), 80, any_address=True)
    assert all(
        reach.knows(name) for name in ("tower", "10.0.0.1", "10.0.0.1:80", "[fe80::1]:80", "[fe80::1]")
    )
    assert not any(
        reach.knows(name) for name in ("evil", "10.0.0.1:81", "10.0.0.1.nip.io", "1.2.3:80", "", "[::1"[:1])
    )


# ---------------------------------------------------------------- starting and stopping


def test_taken_port_is_said_and_another_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with hosted(tmp_path, port=port) as host:
            assert host.moved
            assert ask(host.port, "GET", "/")[0] == 200
            host_module._announce(host, port, "")
            assert f"Port {port} is taken by another program; {host.port} is used" in capsys.readouterr().out


def test_bad_addresses_are_sentences(tmp_path: Path) -> None:
    for changes in (
        {"port": 70_000},
        {"host": "203.0.113.1", "token": "x" * 20},
        {"host": "no such", "token": "x" * 20},
    ):
        with pytest.raises(ConfigError, match=r"--host|--port"):
            hosted(tmp_path, **changes)


def test_environment_opens_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (
        "SHARE",
        "ALLOWED_PATHS",
        "MCP_SERVER",
        "VIBE_MODE",
        "SSR_MODE",
        "LOCAL_DEV_MODE",
        "PROFILING",
    ):
        monkeypatch.setenv(f"GRADIO_{name}", "True")
    monkeypatch.setenv("SPACE_ID", "x/y")
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    calm_environment(tmp_path)
    left = {name: value for name, value in os.environ.items() if name.startswith(("GRADIO_", "SPACE_"))}
    assert left == {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(tmp_path),
        "GRADIO_EXAMPLES_CACHE": str(tmp_path / "examples"),
    }
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


def test_import_is_cheap() -> None:
    code = "import sys, app.host; assert not {'gradio', 'torch', 'uvicorn', 'fastapi'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def child(folder: Path, *more: str) -> tuple[subprocess.Popen[str], int]:
    """-> a serving process, when it serves, and its port."""
    command = [sys.executable, "-m", "tests.app.small_page", str(folder), *more]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "LoRA Loom is at http://127.0.0.1:" in line:
            return process, int(line.split("127.0.0.1:")[1].split("/")[0])
    raise AssertionError("".join(lines))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_then_stops_with_a_page_open(tmp_path: Path, number: signal.Signals) -> None:
    process, port = child(tmp_path)
    try:
        with httpx.Client(timeout=30) as client:
            beat = client.stream("GET", f"http://127.0.0.1:{port}/gradio_api/heartbeat/abc")
            with beat as open_page:
                assert open_page.status_code == 200
                began = time.monotonic()
                process.send_signal(number)
                assert process.wait(30) == 0
                assert time.monotonic() - began < 6
        assert (tmp_path / "saved").exists()
        assert list((tmp_path / "up").iterdir()) == []
    finally:
        process.kill()
        process.communicate()


def test_second_signal_leaves_at_once(tmp_path: Path) -> None:
    process, _ = child(tmp_path, "slow")
    try:
        process.send_signal(signal.SIGINT)
        until = time.monotonic() + 20
        while not (tmp_path / "stopping").exists() and time.monotonic() < until:
            time.sleep(0.02)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert time.monotonic() - began < 2
        assert not (tmp_path / "saved").exists()
    finally:
        process.kill()
        process.communicate()
