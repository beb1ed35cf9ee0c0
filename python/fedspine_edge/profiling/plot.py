"""The trade of quality against latency as a picture: one bubble a model, its area the memory.

Comes in: points. Goes out: one SVG document without scripts or outside references. Models that no other beats in both
are filled and joined by a line.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 80, 40, 56, 64
LARGEST_RADIUS = 26.0
SMALLEST_RADIUS = 4.0
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#222}.small{font-size:11px;fill:#555}"
    ".axis{stroke:#999}.grid{stroke:#e4e4e4}.front{fill:none;stroke:#0b6e4f;stroke-dasharray:4 3}"
    ".best{fill:#0b6e4f;fill-opacity:.55;stroke:#0b6e4f}.beaten{fill:#fff;fill-opacity:.5;stroke:#888}"
)


@dataclass(frozen=True)
class Point:
    """One model.

    Attributes:
        name: What to call it.
        latency_ms: Smaller is better.
        loss: Perplexity or share of wrong answers; smaller is better.
        memory_bytes: Area of the bubble; None draws the smallest.
    """

    name: str
    latency_ms: float
    loss: float
    memory_bytes: int | None


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Returns the points that no other beats: none is at least as good in both and better in one; by latency."""
    front = [
        point
        for point in points
        if not any(
            other.latency_ms <= point.latency_ms
            and other.loss <= point.loss
            and (other.latency_ms, other.loss) != (point.latency_ms, point.loss)
            for other in points
        )
    ]
    return sorted(front, key=lambda point: (point.latency_ms, point.loss))


def pareto_svg(points: Sequence[Point], *, latency_name: str, loss_name: str) -> str:
    """Returns the picture of at least one point, axes from below the lowest to above the highest value."""
    x_ticks = _ticks([point.latency_ms for point in points])
    y_ticks = _ticks([point.loss for point in points])

    def x(value: float) -> float:
        return LEFT + (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - TOP - BOTTOM)

    front = pareto_front(points)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{html.escape(loss_name)} against {html.escape(latency_name)}</title><style>{_STYLE}</style>",
        f'<text x="{LEFT}" y="24">Lower left is better. Area of a bubble: memory.</text>',
        *_axes([(x(value), value) for value in x_ticks], [(y(value), value) for value in y_ticks]),
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 16}" text-anchor="middle">'
        f"{html.escape(latency_name)}</text>",
        f'<text transform="translate(18 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(loss_name)}</text>",
    ]
    if len(front) > 1:
        line = " ".join(f"{x(point.latency_ms):.1f},{y(point.loss):.1f}" for point in front)
        parts.append(f'<polyline class="front" points="{line}"/>')
    largest = max((point.memory_bytes or 0 for point in points), default=0)
    for point in sorted(points, key=lambda point: -(point.memory_bytes or 0)):
        parts += _bubble(point, (x(point.latency_ms), y(point.loss)), best=point in front, largest=largest)
    return "\n".join([*parts, "</svg>\n"])


def _bubble(point: Point, at: tuple[float, float], *, best: bool, largest: int) -> list[str]:
    share = (point.memory_bytes or 0) / largest if largest else 0.0
    radius = max(SMALLEST_RADIUS, LARGEST_RADIUS * math.sqrt(share))
    memory = "n/a" if point.memory_bytes is None else f"{point.memory_bytes / 2**20:.0f} MiB"
    left = at[0] > WIDTH / 2
    x = at[0] - radius - 5 if left else at[0] + radius + 5
    name = html.escape(point.name)
    return [
        f'<circle class="{"best" if best else "beaten"}" cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{radius:.1f}">'
        f"<title>{name}: {point.latency_ms:.2f} ms, {point.loss:.2f}, {memory}</title></circle>",
        f'<text class="small" x="{x:.1f}" y="{at[1] - 3:.1f}" text-anchor="{"end" if left else "start"}">{name}'
        f'<tspan x="{x:.1f}" dy="14">{point.latency_ms:.2f} ms, {point.loss:.2f}, {memory}</tspan></text>',
    ]


def _axes(x_places: Sequence[tuple[float, float]], y_places: Sequence[tuple[float, float]]) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    lines = []
    for place, value in x_places:
        lines.append(f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" y2="{bottom}"/>')
        lines.append(f'<text class="small" x="{place:.1f}" y="{bottom + 18}" text-anchor="middle">{value:g}</text>')
    for place, value in y_places:
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{place:.1f}" y2="{place:.1f}"/>')
        lines.append(f'<text class="small" x="{LEFT - 8}" y="{place + 4:.1f}" text-anchor="end">{value:g}</text>')
    lines.append(f'<path class="axis" fill="none" d="M{LEFT} {TOP}V{bottom}H{right}"/>')
    return lines


def _ticks(values: Sequence[float], count: int = 5) -> list[float]:
    """Returns round values that lie around all of `values` with some room, in steps of 1, 2 or 5 tens."""
    low, high = min(values), max(values)
    room = 0.15 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - room, high + room
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(power * factor for factor in (1, 2, 5, 10) if (high - low) / (power * factor) <= count)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 10) for index in range(first, last + 1)]
