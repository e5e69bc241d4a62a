"""The dataset look as one HTML file: no network, no script, every word of the user's escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

from PIL import Image

THUMB = 224  # pixels, the longer side
SHADE = (24, 26, 30)  # what the mask leaves out is mixed with

HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; padding: 0 1rem; max-width: 76rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
table {{ border-collapse: collapse; }} th, td {{ text-align: left; padding: .2rem .9rem .2rem 0; }}
th {{ font-weight: 600; }} td {{ vertical-align: top; font-variant-numeric: tabular-nums; }}
.odd {{ border-left: .25rem solid #c9721b; padding: .1rem 0 .1rem .7rem; margin: .35rem 0; }}
.pictures {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1.5rem; }}
figure {{ margin: 0; }} figure img {{ max-width: 100%; border-radius: .3rem; }}
figcaption p {{ margin: .25rem 0; overflow-wrap: anywhere; }}
.facts {{ opacity: .75; font-size: .85em; }} .prompt {{ font-size: .92em; }}
.unread {{ background: #c9721b44; text-decoration: line-through; }} .empty {{ font-style: italic; opacity: .75; }}
</style></head><body>
"""


def thumbnail(cut: Image.Image, mask: Image.Image | None) -> str:
    """The crop as a data URI; what its mask leaves out is darkened."""
    if mask is not None:
        cut = Image.composite(cut, Image.blend(cut, Image.new("RGB", cut.size, SHADE), 0.7), mask)
    small = cut.copy()
    small.thumbnail((THUMB, THUMB), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def page(facts: dict[str, Any], thumbnails: Sequence[str]) -> str:
    """`thumbnails` are data URIs, one for each of the facts' pictures."""
    title = f"{facts['name']}: what will be learnt from"
    parts = [HEAD.format(title=escape(title)), f"<h1>{escape(title)}</h1>", _summary(facts)]
    parts.append(f"<h2>Worth a look ({len(facts['warnings'])})</h2>")
    parts += [f'<p class="odd">{escape(line)}</p>' for line in facts["warnings"]] or ["<p>Nothing.</p>"]
    parts += ["<h2>Buckets</h2>", _buckets(facts), "<h2>Folders</h2>"]
    for folder in facts["folders"]:
        lines = "".join(f"<li>{escape(line)}</li>" for line in folder["notes"])
        parts.append(f"<h3>{escape(folder['folder'])}</h3><ul>{lines}</ul>")
    parts.append('<h2>Every picture, as it is cut and told</h2><div class="pictures">')
    parts += [_picture(p, uri) for p, uri in zip(facts["pictures"], thumbnails, strict=True)]
    parts += ["</div><h2>The first batches</h2><ol>", *map(_batch, facts["first_batches"]), "</ol>"]
    return "\n".join([*parts, "</body></html>\n"])


def _summary(facts: dict[str, Any]) -> str:
    mine = [p for p in facts["pictures"] if p["kind"] == "instance"]
    said = f"{len(mine)} pictures to learn, {len(facts['pictures']) - len(mine)} of the class"
    line = f"{said}; base {facts['base']}, {facts['resolution']} pixels, batches of {facts['batch_size']}."
    return "".join(f"<p>{escape(text)}</p>" for text in [line, *facts["notes"]])


def _buckets(facts: dict[str, Any]) -> str:
    head = "<tr><th>Width x height</th><th>Pictures</th><th>Times an epoch</th><th>Of the class</th></tr>"
    rows = [
        "<tr><td>{} x {}</td><td>{}</td><td>{}</td><td>{}</td></tr>".format(
            *b["bucket"], b["pictures"], b["turns"], b["class_pictures"]
        )
        for b in facts["buckets"]
    ]
    return f"<table>{head}{''.join(rows)}</table>"


def _picture(p: dict[str, Any], uri: str) -> str:
    name = escape(f"{p['folder']}/{p['file']}")
    crop = "cut anywhere" if p["crop"] == "random" else "cut at {}, {}".format(*p["crop"][:2])
    facts = [
        "{} x {}".format(*p["size"]) + " scaled to {} x {}".format(*p["resized"]),
        "{} x {}".format(*p["bucket"]) + f", {crop}, {p['cut_off']:.0%} cut off",
        f"sharpness {p['sharpness']:.0f}",
    ]
    facts += ["also mirrored"] if p["flip"] else []
    facts += [f"{p['repeats']} times"] if p["repeats"] != 1 else []
    facts += [f"weight {p['weight']:g}"] if p["weight"] != 1 else []
    facts += [f"mask: {p['mask']}"] if p["mask"] else []
    odd = "".join(f'<p class="odd">{escape(text)}</p>' for text in p["odd"])
    prompts = "".join(_prompt(f) for f in p["prompts"])
    shown = f'<p class="facts">{escape("; ".join(facts))}</p>'
    image = f'<img src="{uri}" alt="{name}" loading="lazy">'
    return f"<figure>{image}<figcaption><p><strong>{name}</strong></p>{shown}{odd}{prompts}</figcaption></figure>"


def _prompt(f: dict[str, Any]) -> str:
    """What is read, and struck through what is not."""
    if not f["text"]:
        return '<p class="prompt empty">no words at all</p>'
    unread = f["unread"]
    read = f["text"].rstrip().removesuffix(unread)  # with nothing unread, all of it
    cut = f'<span class="unread">{escape(unread)}</span>' if unread else ""
    return f'<p class="prompt">{escape(read)}{cut} <span class="facts">{f["tokens"]} tokens</span></p>'


def _batch(rows: list[dict[str, str]]) -> str:
    shown = "; ".join(f"{row['file']}: “{row['prompt']}”" for row in rows)
    return f"<li>{escape(shown)}</li>"
