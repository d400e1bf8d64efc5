"""Small charts as inline SVG: lines, intervals, histograms. No script, no font, no network.

Colours are CSS classes (`s0`...`s5` for series, `ink`, `muted`, `rule`): the page decides light or dark.
Drawings are 400 units wide: at that width on a phone their 11-unit text is still read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 400.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 12.0, 34.0
COLOURS = 6

CHART_CSS = """
svg.chart{width:100%;max-width:560px;height:auto;display:block;font:11px system-ui,sans-serif}
svg.chart text{fill:var(--muted)} svg.chart .ink{fill:var(--ink)}
svg.chart .rule{stroke:var(--rule);stroke-width:1}
svg.chart .zero{stroke:var(--muted);stroke-width:1;stroke-dasharray:3 3}
svg.chart .line{fill:none;stroke-width:2;stroke-linejoin:round} svg.chart .band{stroke:none;opacity:.16}
svg.chart .bar{opacity:.85} svg.chart .cut{opacity:.45}
""" + "\n".join(
    f"svg.chart .line.s{i},svg.chart .mark.s{i}{{stroke:var(--s{i})}}"
    f"svg.chart .mark.s{i},svg.chart .bar.s{i},svg.chart .band.s{i}{{fill:var(--s{i})}}"
    f".key.s{i}{{background:var(--s{i})}}"
    for i in range(COLOURS)
)
LIGHT_COLOURS = "--s0:#64748b;--s1:#c2410c;--s2:#1d4ed8;--s3:#15803d;--s4:#a21caf;--s5:#854d0e"
DARK_COLOURS = "--s0:#94a3b8;--s1:#fb923c;--s2:#60a5fa;--s3:#4ade80;--s4:#e879f9;--s5:#facc15"


@dataclass(frozen=True)
class Series:
    """A named line. `low` and `high` are its interval at each point: whiskers with markers, else a band."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    colour: int = 0
    markers: bool = False


@dataclass(frozen=True)
class Interval:
    """One row of an interval chart."""

    label: str
    value: float
    low: float
    high: float
    colour: int = 0


@dataclass(frozen=True)
class Bars:
    """Counts of one histogram; `cut` counts are stacked on top in a paler tone."""

    name: str
    counts: Sequence[int]
    cut: Sequence[int]
    colour: int = 0


def percent(value: float) -> str:
    """0.123 -> 12.3%, without a decimal that says nothing."""
    return f"{100 * value:.1f}".removesuffix(".0") + "%"


def signed_points(value: float) -> str:
    """0.123 -> +12.3: a difference of shares in percentage points."""
    return f"{100 * value:+.1f}".removesuffix(".0") if round(value, 3) else "0"


def number(value: float) -> str:
    """A short number for an axis."""
    return f"{value:.3g}" if abs(value) < 1e4 else f"{value:,.0f}"


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """About `wanted` round numbers that lie in [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str,
    show: Callable[[float], str] = number,
    zero: bool = False,
    height: float = 210.0,
) -> str:
    """Lines over a shared x axis.

    Args:
        label: what a screen reader says.
        show: writes a y value.
        zero: include 0 on the y axis.
    """
    xs = [x for one in series for x in one.xs]
    if not xs:
        return ""
    ys = [y for one in series for values in (one.ys, one.low or (), one.high or ()) for y in values]
    frame = _Frame(min(xs), max(xs), *_padded(min([*ys, 0.0] if zero else ys), max(ys)), height)
    parts = [frame.grid(show, x_label, whole_x=True)]
    for one in series:
        points = list(zip(one.xs, one.ys, strict=True))
        if one.low is not None and one.high is not None:
            spans = list(zip(one.xs, one.low, one.high, strict=True))
            parts.append(
                _whiskers(frame, spans, one.colour) if one.markers else _band(frame, spans, one.colour)
            )
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="line s{one.colour}" points="{path}"/>')
        if one.markers or len(points) == 1:
            parts += [
                f'<circle class="mark s{one.colour}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3">'
                f"<title>{escape(one.name)}: {escape(show(y))} at {number(x)}</title></circle>"
                for x, y in points
            ]
    return _chart(parts, height, label)


def interval_chart(
    rows: Sequence[Interval], *, label: str, show: Callable[[float], str] = percent, zero: bool = False
) -> str:
    """One row for each value with its interval as a horizontal line; `zero` draws the line of no effect."""
    if not rows:
        return ""
    height = TOP + BOTTOM + 38.0 * len(rows)
    values = [value for row in rows for value in (row.low, row.high)] + ([0.0] if zero else [])
    frame = _Frame(*_padded(min(values), max(values)), 0.0, 1.0, height, left=RIGHT)
    parts = [frame.vertical_rules(show)]
    for index, row in enumerate(rows):
        y = TOP + 38.0 * index + 27
        colour = row.colour % COLOURS
        if zero:
            parts.append(
                f'<line class="zero" x1="{frame.x(0):.1f}" x2="{frame.x(0):.1f}" y1="{y - 7}" y2="{y + 7}"/>'
            )
        text = f"{show(row.value)} [{show(row.low)}, {show(row.high)}]"
        parts.append(
            f'<text class="ink" x="{RIGHT}" y="{y - 10:.1f}">{escape(row.label)}</text>'
            f'<text x="{WIDTH - RIGHT}" y="{y - 10:.1f}" text-anchor="end">{escape(text)}</text>'
            f'<line class="line s{colour}" x1="{frame.x(row.low):.1f}" x2="{frame.x(row.high):.1f}" '
            f'y1="{y}" y2="{y}"/>'
            f'<circle class="mark s{colour}" cx="{frame.x(row.value):.1f}" cy="{y}" r="4"/>'
        )
    return _chart(parts, height, label)


def histogram(edges: Sequence[float], bars: Bars, *, label: str, x_label: str, top: int | None = None) -> str:
    """Counts between consecutive `edges` (one more edge than counts); `top` fixes the y axis."""
    height = 130.0
    tallest = max([a + b for a, b in zip(bars.counts, bars.cut, strict=True)], default=0)
    frame = _Frame(edges[0], edges[-1], 0.0, float(max(top or tallest, 1)), height)
    parts = [frame.grid(number, x_label, wanted=3)]
    for index, (whole, cut) in enumerate(zip(bars.counts, bars.cut, strict=True)):
        left, right = frame.x(edges[index]) + 0.5, frame.x(edges[index + 1]) - 0.5
        span = f"{number(edges[index])} to {number(edges[index + 1])}"
        for count, below, style in ((whole, 0, "bar"), (cut, whole, "bar cut")):
            if count:
                y, foot = frame.y(below + count), frame.y(below)
                what = "truncated" if style != "bar" else "ended"
                parts.append(
                    f'<rect class="{style} s{bars.colour}" x="{left:.1f}" y="{y:.1f}" '
                    f'width="{max(right - left, 0.5):.1f}" height="{foot - y:.1f}">'
                    f"<title>{span}: {count} {what}</title></rect>"
                )
    return _chart(parts, height, label)


@dataclass(frozen=True)
class _Frame:
    """Maps data to drawing units."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    height: float
    left: float = LEFT

    def x(self, value: float) -> float:
        share = (value - self.x_low) / (self.x_high - self.x_low) if self.x_high > self.x_low else 0.5
        return self.left + share * (WIDTH - self.left - RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low) if self.y_high > self.y_low else 0.5
        return self.height - BOTTOM - share * (self.height - TOP - BOTTOM)

    def grid(
        self, show: Callable[[float], str], x_label: str, *, wanted: int = 5, whole_x: bool = False
    ) -> str:
        parts = []
        for value in ticks(self.y_low, self.y_high, wanted):
            y = self.y(value)
            parts.append(
                f'<line class="rule" x1="{self.left}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            parts.append(
                f'<text x="{self.left - 5}" y="{y + 4:.1f}" text-anchor="end">{escape(show(value))}</text>'
            )
        for value in ticks(self.x_low, self.x_high, 6):
            if whole_x and value != int(value):
                continue
            parts.append(
                f'<text x="{self.x(value):.1f}" y="{self.height - 20:.1f}" text-anchor="middle">'
                f"{number(value)}</text>"
            )
        middle = (self.left + WIDTH - RIGHT) / 2
        parts.append(
            f'<text x="{middle:.1f}" y="{self.height - 5:.1f}" text-anchor="middle">{escape(x_label)}</text>'
        )
        return "".join(parts)

    def vertical_rules(self, show: Callable[[float], str]) -> str:
        foot = self.height - BOTTOM
        return "".join(
            f'<line class="rule" x1="{self.x(v):.1f}" x2="{self.x(v):.1f}" y1="{TOP}" y2="{foot:.1f}"/>'
            f'<text x="{self.x(v):.1f}" y="{foot + 15:.1f}" text-anchor="middle">{escape(show(v))}</text>'
            for v in ticks(self.x_low, self.x_high)
        )


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin if low != 0 else low, high + margin


def _band(frame: _Frame, spans: Sequence[tuple[float, float, float]], colour: int) -> str:
    up = [f"{frame.x(x):.1f},{frame.y(high):.1f}" for x, _, high in spans]
    down = [f"{frame.x(x):.1f},{frame.y(low):.1f}" for x, low, _ in reversed(spans)]
    return f'<polygon class="band s{colour}" points="{" ".join(up + down)}"/>'


def _whiskers(frame: _Frame, spans: Sequence[tuple[float, float, float]], colour: int) -> str:
    return "".join(
        f'<line class="line s{colour}" style="stroke-width:1" x1="{frame.x(x):.1f}" x2="{frame.x(x):.1f}" '
        f'y1="{frame.y(low):.1f}" y2="{frame.y(high):.1f}"/>'
        for x, low, high in spans
    )


def _chart(parts: Sequence[str], height: float, label: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )
