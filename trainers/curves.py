"""Curves as inline SVG: no script, no library, colours from the page's own style sheet (light and dark)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 240
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 12, 30
MOST_POINTS = 600  # about one for each pixel; more are only a larger file
Point = tuple[float, float]
_Place = Callable[[float, float], Point]


@dataclass(frozen=True)
class Curve:
    """`style` is the class of its line in the style sheet."""

    name: str
    points: Sequence[Point]
    style: str


def chart(title: str, curves: Sequence[Curve], *, end: float | None = None) -> str:
    """The curves over one another; `end`: how far the x axis goes. Empty if there is nothing to draw."""
    drawn = [(c, [p for p in c.points if math.isfinite(p[1])]) for c in curves]
    drawn = [(curve, points) for curve, points in drawn if points]
    if not drawn:
        return ""
    every = [point for _, points in drawn for point in points]
    left = min(x for x, _ in every)
    right = max(end or 0.0, max(x for x, _ in every), left + 1)
    low, high = _room(min(y for _, y in every), max(y for _, y in every))

    def place(x: float, y: float) -> Point:
        across = LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)
        return across, TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)

    marks = [*_grid(ticks(low, high, 5), ticks(left, right, 7), place), *_lines(drawn, place)]
    last = "; ".join(
        f"{curve.name} {_number(points[-1][1])} at {points[-1][0]:.0f}" for curve, points in drawn
    )
    keys = "".join(f'<span class="key {c.style}">{escape(c.name)}</span>' for c, _ in drawn)
    return (
        f'<figure><figcaption>{escape(title)} <span class="keys">{keys}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}: {last}")}">'
        f"{''.join(marks)}</svg></figure>"
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers between the two: 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most`, the lowest and the highest of each stretch kept: no spike is lost."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 2))
    kept: list[Point] = []
    for a in range(0, len(points), size):
        stretch = points[a : a + size]
        ends = {stretch.index(min(stretch, key=_height)), stretch.index(max(stretch, key=_height))}
        kept += [stretch[i] for i in sorted(ends)]
    return kept


def _height(point: Point) -> float:
    return point[1]


def _room(low: float, high: float) -> Point:
    """A little above and below, so that no line runs along the edge; 0 is the floor of what is never negative."""
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (0.0 if 0 <= low < 3 * margin else low - margin), high + margin


def _grid(ys: Sequence[float], xs: Sequence[float], place: _Place) -> Iterator[str]:
    for y in ys:
        _, down = place(xs[0], y)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down:.1f}" y2="{down:.1f}"/>'
        yield f'<text x="{LEFT - 8}" y="{down + 4:.1f}" text-anchor="end">{_number(y)}</text>'
    for x in xs:
        across, _ = place(x, ys[0])
        yield f'<text x="{across:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{_number(x)}</text>'


def _lines(drawn: Sequence[tuple[Curve, list[Point]]], place: _Place) -> Iterator[str]:
    for curve, points in drawn:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in thinned(points)))
        if len(points) == 1:
            x, y = place(*points[0])
            yield f'<circle class="line {curve.style}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
        else:
            yield f'<polyline class="line {curve.style}" points="{path}"/>'


def _number(value: float) -> str:
    """0.0625, 1e-04, 1,200"""
    if value and abs(value) < 0.001:
        return f"{value:.2g}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
