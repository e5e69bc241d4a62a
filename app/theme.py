"""How the page looks: the theme, and where its style sheet and its script are.

System fonts only: no request leaves the machine. Contrasts are WCAG AA in light and dark, measured by axe.
"""

from __future__ import annotations

from pathlib import Path

import gradio as gr

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("page.js", "parts.js", "mixer.js", "mixes.js", "runs.js", "live.js")  # in this order
CSS = (ASSETS / "page.css").read_text(encoding="utf-8")
HEAD = "".join(f"<script>{(ASSETS / name).read_text(encoding='utf-8')}</script>" for name in SCRIPTS)
VEIL = (
    '<div id="veil" aria-hidden="true">Drop LoRA files (.safetensors) to wear them, or a picture to have its settings '
    "back</div>"
)

FONT = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
MONO = ["ui-monospace", "Menlo", "Consolas", "monospace"]

THEME = gr.themes.Base(
    primary_hue=gr.themes.colors.teal,
    neutral_hue=gr.themes.colors.slate,
    radius_size=gr.themes.sizes.radius_md,
    font=FONT,
    font_mono=MONO,
).set(
    body_background_fill="*neutral_50",
    body_background_fill_dark="*neutral_950",
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    block_background_fill="white",
    block_background_fill_dark="*neutral_900",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_300",
    block_label_text_color="*neutral_700",
    block_label_text_color_dark="*neutral_200",
    block_title_text_color="*neutral_700",
    block_title_text_color_dark="*neutral_200",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_hover_dark="*primary_600",
    button_primary_text_color="white",
    button_primary_text_color_dark="white",
    button_secondary_background_fill="*neutral_200",
    button_secondary_background_fill_dark="*neutral_700",
    button_secondary_text_color="*neutral_900",
    button_secondary_text_color_dark="*neutral_50",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
    slider_color="*primary_600",
    slider_color_dark="*primary_400",
)
