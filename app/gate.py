"""The gate in front of every route: who may ask, for what, and what every answer must say.

A page on 127.0.0.1 is within reach of every web page open in the same browser. Without a gate any of them can
send files to it (a multipart POST needs no permission) and, once its own name points to 127.0.0.1 (DNS
rebinding), read its answers and call its functions. So, in this order:

    Host            not a name of ours, with our port: 400. A rebound page still sends its own name
    Origin          not exactly ours: 403. `null` and the other ports of localhost are foreign
    Sec-Fetch-Site  cross-site or same-site: 403, but for a link that opens the page itself
    token           asked for and neither in the address nor in the cookie: 401
    path            none the page uses: 404. Gradio also has routes that fetch addresses, record, edit, administer
    file            not a plain file in one of our folders: 403
    size            more than the temporary folder has room for: 413

Plain ASGI around everything, so that nothing inside can answer first. Imports nothing but the standard library.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs

from app.uploads import Uploads

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Header = tuple[bytes, bytes]

API = "/gradio_api/"
UPLOAD = f"{API}upload"
FILES = (f"{API}file=", f"{API}file/")
MAX_BODY = 32 * 2**20  # bytes of a call; files come by UPLOAD
_CALLS = (
    r"upload|upload_progress|queue/(?:join|data)|(?:run|api)/[^/]+|info|config|theme\.css|startup-events|app_id"
    r"|component_server|cancel|reset|heartbeat/[^/]+|stream/.*"
)
_OURS = r"loom/(?:news|row|mix|picture|run|thumb/[^/]+|look|report/[^/]+)"
PATHS = re.compile(
    rf"/(?:{_OURS}|config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|(?:assets|static|svelte)/.*"
    rf"|gradio_api/(?:{_CALLS}))?/?"
)
# What a browser may show; anything else is a download, whatever its name says.
SHOWN = frozenset({"image/png", "image/jpeg", "image/webp", "image/gif", "image/avif"})
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "connect-src 'self'; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
# Whole pages that others may have made: a run's folder can come from anywhere.
PAGES = ("/loom/look", "/loom/report/")
PAGE_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; sandbox; frame-ancestors 'none'"
FILE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; sandbox; frame-ancestors 'none'"
SAID: dict[bytes, str] = {
    b"content-security-policy": POLICY,
    b"x-content-type-options": "nosniff",
    b"x-frame-options": "DENY",
    b"referrer-policy": "no-referrer",
    b"cross-origin-resource-policy": "same-origin",
    b"cross-origin-opener-policy": "same-origin",
}
# Gradio takes its own address from these; only a proxy of ours could send them, and there is none.
_LIES = (b"x-forwarded-", b"forwarded", b"x-original-", b"x-gradio-server")
WELCOME = (
    '<!doctype html><title>LoRA Loom</title><meta http-equiv="refresh" content="0;url=/"><a href="/">Open</a>'
)
CLOSED = (
    "<!doctype html><title>LoRA Loom</title><p>This page needs its token: open the address with "
    '?token=... at its end, as it was given at the start. If you have done that before: <a href="/">go on</a>.'
)


class Answer(NamedTuple):
    """What the gate says itself, instead of the page."""

    status: int
    text: str
    headers: tuple[Header, ...] = ()
    html: bool = False


class Reach(NamedTuple):
    """Under which addresses the page is asked for: exact `names` with port; with `any_address` every IP address
    too, since a rebound page is always reached by a name."""

    names: frozenset[str]
    port: int
    any_address: bool = False

    def knows(self, host: str) -> bool:
        if host in self.names:
            return True
        found = re.fullmatch(r"\[?([0-9a-f.:]+?)\]?(?::(\d{1,5}))?", host)
        if not self.any_address or found is None or int(found[2] or 80) != self.port:
            return False
        try:
            ipaddress.ip_address(found[1])
        except ValueError:
            return False
        return True


class Gate:
    """An ASGI app around another. `folders` are those whose files may be read; `token` empty asks for none."""

    def __init__(
        self, app: App, *, reach: Reach, token: str = "", folders: Sequence[Path] = (), uploads: Uploads
    ) -> None:
        self._app, self._reach, self._token, self._uploads = app, reach, token, uploads
        # both spellings: Gradio may name a file by either, and only a lexical test touches no foreign disk
        self._folders = tuple(
            dict.fromkeys(f for folder in folders for f in (folder.absolute(), folder.resolve()))
        )
        self._cookie = f"lora_loom_{reach.port}"  # cookies know no ports: two instances, two names
        self._proof = hmac.new(token.encode(), b"lora loom cookie", hashlib.sha256).hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":  # the page uses no web sockets
            return await send({"type": "websocket.close", "code": 1008})
        path = str(scope["path"])
        answer = self._answer(scope, path)
        send = _saying(send, path if answer is None else "")
        if answer is not None:
            return await _reply(send, answer)
        scope["headers"] = [h for h in scope["headers"] if not h[0].startswith(_LIES)]
        if path.startswith(FILES):  # Gradio answers a range with the request's own headers sent back
            scope["headers"] = [h for h in scope["headers"] if h[0] != b"range"]
        if path.rstrip("/") != UPLOAD or scope["method"] != "POST":
            return await self._app(scope, receive, send)
        with self._uploads.room_for(int(_all(scope, b"content-length")[0])) as problem:
            if problem:
                return await _reply(send, Answer(413, problem))
            await self._app(scope, receive, send)
        return None

    def _answer(self, scope: Scope, path: str) -> Answer | None:
        hosts = _all(scope, b"host")
        if len(hosts) != 1 or not self._reach.knows(hosts[0].lower()):
            return Answer(
                400, f"This is not the address of this page. Open it by {sorted(self._reach.names)[0]}."
            )
        if any(origin != f"http://{hosts[0]}" for origin in _all(scope, b"origin")):
            return Answer(
                403, "Another site asked for this, not the page itself. Open the page and do it there."
            )
        if not _from_here(scope) and not _opens_the_page(scope, path):
            return Answer(
                403, "Another site asked for this. Only a link to the page itself may come from elsewhere."
            )
        return self._without_token(scope, path) or self._not_served(scope, path)

    def _without_token(self, scope: Scope, path: str) -> Answer | None:
        """A page instead of a redirect: after a redirect from elsewhere a browser keeps a strict cookie back."""
        if not self._token:
            return None
        given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [])
        if path == "/" and any(hmac.compare_digest(g.encode(), self._token.encode()) for g in given):
            cookie = f"{self._cookie}={self._proof}; HttpOnly; SameSite=Strict; Path=/"
            return Answer(200, WELCOME, ((b"set-cookie", cookie.encode()),), html=True)
        held = [c.strip() for line in _all(scope, b"cookie") for c in line.split(";")]
        expected = f"{self._cookie}={self._proof}".encode()
        if any(hmac.compare_digest(c.encode(), expected) for c in held):
            return None
        return Answer(401, CLOSED, html=True)

    def _not_served(self, scope: Scope, path: str) -> Answer | None:
        file = next((path.removeprefix(start) for start in FILES if path.startswith(start)), None)
        if file is not None:
            return None if self._is_ours(file) else Answer(403, "This file is not served.")
        if not PATHS.fullmatch(path):
            return Answer(404, "There is nothing here. The page is at /.")
        if scope["method"] != "POST":
            return None
        lengths = _all(scope, b"content-length")
        if len(lengths) != 1 or not re.fullmatch(r"\d{1,15}", lengths[0]):
            return Answer(411, "Content-Length is missing: how much is coming must be said first.")
        if path.rstrip("/") != UPLOAD and int(lengths[0]) > MAX_BODY:
            return Answer(413, f"A call may have {MAX_BODY:,} bytes. Upload files by the page.")
        return None

    def _is_ours(self, text: str) -> bool:
        """A plain file below one of our folders. Settled by the letters first: merely looking for a path on
        another machine (\\\\host\\share) would send the user's password hash there."""
        if any(ord(c) < 32 for c in text) or not os.path.isabs(text) or text.startswith(("//", "\\\\")):
            return False
        path = Path(text)
        folder = next((f for f in self._folders if path.is_relative_to(f)), None)
        inside = path.relative_to(folder).parts if folder else ()
        if not inside or any(part.startswith(".") or ":" in part or "\\" in part for part in inside):
            return False
        try:
            real = path.resolve(strict=True)  # a link may lead out again
            return real.is_file() and any(real.is_relative_to(f) for f in self._folders)
        except (OSError, ValueError, RuntimeError):
            return False


def _all(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def _from_here(scope: Scope) -> bool:
    """Programs other than browsers send no such header, and no page can keep a browser from sending it."""
    return all(site in ("same-origin", "none") for site in _all(scope, b"sec-fetch-site"))


def _opens_the_page(scope: Scope, path: str) -> bool:
    return (
        path == "/"
        and scope["method"] == "GET"
        and _all(scope, b"sec-fetch-mode") == ["navigate"]
        and _all(scope, b"sec-fetch-dest") == ["document"]
    )


def _saying(send: Send, path: str) -> Send:
    """`send`, with our headers in the place of what the page says about these things."""
    is_file = path.startswith(FILES)
    policy = FILE_POLICY if is_file else PAGE_POLICY if path.startswith(PAGES) else POLICY

    async def sealed(message: Message) -> None:
        if message["type"] == "http.response.start":
            dropped = (*SAID, b"server")
            headers = [
                (key.lower(), value)
                for key, value in message.get("headers", ())
                if key.lower() not in dropped and not key.lower().startswith(b"access-control-")
            ]
            said = {**SAID, b"content-security-policy": policy}
            headers += [(name, value.encode()) for name, value in said.items()]
            message["headers"] = _as_file(headers) if is_file else headers
        await send(message)

    return sealed


def _as_file(headers: list[Header]) -> list[Header]:
    """A picture is shown, anything else is bytes to keep: a page among the outputs must not run as ours."""
    kind = next((value.decode("latin-1") for key, value in headers if key == b"content-type"), "")
    kind = kind.partition(";")[0].strip().lower()
    rest = [(k, v) for k, v in headers if k not in (b"content-type", b"content-disposition")]
    shown = kind in SHOWN
    return [
        *rest,
        (b"content-type", kind.encode() if shown else b"application/octet-stream"),
        (b"content-disposition", b"inline" if shown else b"attachment"),
    ]


async def _reply(send: Send, answer: Answer) -> None:
    body = answer.text.encode()
    kind = "text/html" if answer.html else "text/plain"
    headers = [
        (b"content-type", f"{kind}; charset=utf-8".encode()),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
        *answer.headers,
    ]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
