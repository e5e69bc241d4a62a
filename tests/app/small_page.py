"""A page of three components, served for real: what the tests of the host knock at."""

from __future__ import annotations

import http.client
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.host import Host, Page, serve
from app.uploads import QUOTA

CALLS: list[str] = []


def small_page() -> Page:
    import gradio as gr  # noqa: PLC0415 - as the page does it: after the environment is set

    def shout(text: str) -> str:
        CALLS.append(text)
        return text.upper()

    with gr.Blocks(title="small") as blocks:
        text = gr.Textbox(label="text", elem_id="text")
        button = gr.Button("shout", elem_id="shout")
        upload = gr.UploadButton("upload", elem_id="upload")
        picture = gr.Image(label="picture", elem_id="picture", type="filepath", interactive=False)
        button.click(shout, text, text, api_name="shout")
        upload.upload(lambda file: Path(file).name, upload, text, api_name="taken")
        text.submit(lambda path: path, text, picture, api_name="show")
    return Page(blocks, css="#text { margin: 0 }", head="<script>window.ours = true</script>")


def hosted(tmp_path: Path, **changes: Any) -> Host:
    settings: dict[str, Any] = {"port": 0, "token": "", "quota": QUOTA, "host": "127.0.0.1", **changes}
    (tmp_path / "outputs").mkdir(exist_ok=True)
    return Host(
        small_page, outputs=tmp_path / "outputs", temporary=tmp_path / "models" / ".uploads", **settings
    )


def ask(
    port: int, method: str, path: str, body: bytes = b"", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """One request with exactly these headers (`_` for `-`) and this path: clients would tidy both up."""
    line = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    sent = {"Host": f"127.0.0.1:{port}", **{k.replace("_", "-"): v for k, v in headers.items()}}
    try:
        line.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in sent.items():
            line.putheader(name, value)
        if method == "POST" and not {"Content-Length", "Transfer-Encoding"} & set(sent):
            line.putheader("Content-Length", str(len(body)))
        line.endheaders(body or None)
        answer = line.getresponse()
        # An answer that never ends (events, heartbeats) is judged by its head
        endless = answer.getheader("content-type", "").startswith("text/event-stream")
        return (
            answer.status,
            {k.lower(): v for k, v in answer.getheaders()},
            b"" if endless else answer.read(),
        )
    finally:
        line.close()


def multipart(name: str, content: bytes) -> tuple[bytes, str]:
    """-> body and content type of an upload of one file."""
    head = f'--edge\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    return head + content + b"\r\n--edge--\r\n", "multipart/form-data; boundary=edge"


def main(folder: Path, on_stop: Callable[[], None]) -> int:
    return serve(
        small_page,
        port=0,
        open_browser=False,
        outputs=folder / "outputs",
        temporary=folder / "up",
        on_stop=on_stop,
    )


if __name__ == "__main__":  # the child that the tests of signals stop
    home, slow = Path(sys.argv[1]), sys.argv[2:] == ["slow"]

    def stopped() -> None:
        (home / "stopping").touch()
        if slow:
            time.sleep(60)
        (home / "saved").touch()

    sys.exit(main(home, stopped))
