"""Charts of the atlas as SVG that stands in a page: no script, no colour that is the only carrier.

Colours are classes, which the page's style sheet defines for light and for dark: `s0` … `s5` of
lines and marks, `p0`, `p1` of phases, `ink` of what is written. The page shows every chart's
numbers as a table, too.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup, escape

_DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 2", "10 4 1 4", "4 1")
_MARKS = (
    "M-3,0A3,3 0 1 0 3,0A3,3 0 1 0 -3,0Z",
    "M-3,-3H3V3H-3Z",
    "M0,-4L4,3H-4Z",
    "M0,-4L4,0L0,4L-4,0Z",
    "M-4,-3H4L0,4Z",
    "M-1,-4H1V-1H4V1H1V4H-1V1H-4V-1H-1Z",
    "M-4,-1H4V1H-4Z",
)
_WIDTH, _LEFT, _TOP, _BOTTOM = 430, 62, 24, 176  # of a line chart and its frame
_LOW, _HIGH = np.array([247, 251, 255]), np.array([8, 48, 107])  # of the matrix: light is near


def number(value: float | None) -> str:
    """Return a number of a table in three digits; `–` where there is none."""
    if value is None:
        return "–"
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def percent(share: float | None) -> str:
    """Return a share as a table shows it."""
    return "–" if share is None else f"{100 * share:.0f} %"


def _svg(width: float, height: float, label: str, *parts: str) -> Markup:
    """Return a picture that a screen reader reads as its label."""
    return Markup(
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, content: object, anchor: str = "middle") -> str:
    """Return text at a place."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def matrix_chart(distance: Sequence[Sequence[float]], cuts: Sequence[int], label: str) -> Markup:
    """Draw a matrix (L, L): darker is farther; lines after the layers `cuts`, a scale below."""
    values, left, top = np.array(distance, dtype=float), 26, 6
    layers, largest = len(values), float(np.max(distance)) or 1.0
    side = max(6, min(20, 280 // layers))
    size, parts = side * layers, []
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            red, green, blue = (
                (_LOW + (_HIGH - _LOW) * max(0.0, value) / largest).round().astype(int)
            )
            x, y = left + side * column, top + side * row
            parts.append(
                f'<rect x="{x}" y="{y}" width="{side}" height="{side}" '
                f'fill="#{red:02x}{green:02x}{blue:02x}"/>'
            )
    for cut in cuts:
        at = side * cut
        path = f"M{left},{top + at}h{size}M{left + at},{top}v{size}"
        parts += [f'<path class="halo" d="{path}"/>', f'<path class="cut" d="{path}"/>']
    for layer in range(0, layers, max(1, -(-layers // 12))):
        middle = side * (layer + 0.5)
        parts.append(_text(left - 4, top + middle + 4, layer + 1, "end"))
        parts.append(_text(left + middle, top + size + 14, layer + 1))
    steps = np.linspace(0, 1, 11)
    for step, share in enumerate(steps):
        red, green, blue = (_LOW + (_HIGH - _LOW) * share).round().astype(int)
        parts.append(
            f'<rect x="{left + size * step / 11:.1f}" y="{top + size + 22}" '
            f'width="{size / 11:.1f}" height="10" fill="#{red:02x}{green:02x}{blue:02x}"/>'
        )
    parts += [
        _text(left, top + size + 44, 0, "start"),
        _text(left + size, top + size + 44, number(largest), "end"),
    ]
    return _svg(left + size + 8, top + size + 50, label, *parts)


def line_chart(
    lines: Sequence[tuple[str, Sequence[float], Sequence[float | None]]],
    label: str,
    *,
    x_title: str,
    y_title: str,
    logarithmic: bool = False,
) -> Markup:
    """Draw lines (name, x, y) with marks and dashes of their own, from 0 up, and their names.

    Args:
        logarithmic: show powers of ten, from the smallest y up; what is not above 0 is left out.
    """
    height = 210
    drawn = []
    for name, xs, ys in lines:
        known = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None]
        if logarithmic:
            known = [(x, math.log10(y)) for x, y in known if y > 0]
        drawn.append((name, known))
    frame = _Frame.of([point for _, points in drawn for point in points], from_zero=not logarithmic)
    parts = [_text(4, 12, y_title, "start"), _text(_WIDTH - 12, height - 4, x_title, "end")]
    parts.append(frame.axes(logarithmic))
    for index, (name, points) in enumerate(drawn):
        y = height + 14 + 18 * index
        parts.append(_line(index, [frame.place(*point) for point in points]))
        parts.append(_line(index, [(_LEFT + 20 * n, y - 4) for n in range(3)]))
        parts.append(_text(_LEFT + 48, y, name, "start"))
    return _svg(_WIDTH, height + 8 + 18 * len(lines), label, *parts)


class _Frame(NamedTuple):
    """Where numbers lie in a line chart."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]], *, from_zero: bool) -> "_Frame":
        """Return the frame that holds all points."""
        xs, ys = zip(*(points or [(0, 0)]), strict=True)
        x_low = 0.0 if max(xs) <= 1 else min(xs)  # shares begin at none
        bounds = [0.0, *ys] if from_zero else ys
        return cls(x_low, max(xs), min(bounds), max(bounds))

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Return where a point is drawn."""
        across = (x - self.x_low) / ((self.x_high - self.x_low) or 1)
        up = (y - self.y_low) / ((self.y_high - self.y_low) or 1)
        return _LEFT + across * (_WIDTH - _LEFT - 12), _BOTTOM - up * (_BOTTOM - _TOP)

    def axes(self, logarithmic: bool) -> str:
        """Return the line at 0, or below all, and numbers at both sides."""
        base = self.y_low if logarithmic else 0
        (left, at), (right, _) = self.place(self.x_low, base), self.place(self.x_high, base)
        parts = [f'<path class="axis" d="M{left:.1f},{at:.1f}H{right:.1f}"/>']
        for value in sorted({self.y_low, (self.y_low + self.y_high) / 2, self.y_high}):
            shown = number(10**value if logarithmic else value)
            parts.append(_text(_LEFT - 6, self.place(self.x_low, value)[1] + 4, shown, "end"))
        for value in np.linspace(self.x_low, self.x_high, 5):
            shown = round(value) if self.x_high - self.x_low > 4 else value
            parts.append(_text(self.place(shown, 0)[0], _BOTTOM + 14, number(shown)))
        return "".join(parts)


def _line(index: int, points: Sequence[tuple[float, float]]) -> str:
    """Return a line of a chart with its marks; nothing where there is no point."""
    if not points:
        return ""
    path = "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
    mark = _MARKS[index % len(_MARKS)]
    marks = "".join(f'<path transform="translate({x:.1f} {y:.1f})" d="{mark}"/>' for x, y in points)
    dash = _DASHES[index % len(_DASHES)]
    line = f'<path class="line" stroke-dasharray="{dash}" d="M{path}"/>'
    return f'<g class="s{index % 6}">{line}{marks}</g>'


def phase_chart(
    rows: Sequence[tuple[str, int, Sequence[int] | None, Sequence[float]]], label: str
) -> Markup:
    """Draw partitions as bars that are as long as their phases, a row each.

    Above a bar, how often resamples are cut at a place: a full column is always.

    Args:
        rows: name, number of layers, lengths of phases (None: there are none), and the share of
            resamples with a cut after layer 1 … L − 1.
    """
    left, width, height, column = 8, 430, 52, 14
    inner, parts = width - 2 * left, []
    for index, (name, layers, phases, shares) in enumerate(rows):
        top = height * index + 16
        parts.append(_text(left, top - 3, name, "start"))
        for cut, share in enumerate(shares, 1):
            if share:
                x = left + inner * cut / layers
                parts.append(
                    f'<rect class="share" x="{x - 2:.1f}" y="{top + column * (1 - share):.1f}" '
                    f'width="4" height="{column * share:.1f}"/>'
                )
        start = 0
        for number_of, length in enumerate(phases or []):
            x, wide = left + inner * start / layers, inner * length / layers
            parts.append(
                f'<rect class="p{number_of % 2}" x="{x:.1f}" y="{top + column}" '
                f'width="{wide:.1f}" height="16"/>'
            )
            parts.append(_text(x + wide / 2, top + column + 12, length))
            start += length
        if not phases:
            parts.append(_text(left, top + column + 12, "no partition", "start"))
    return _svg(width, height * len(rows) + 2, label, *parts)
