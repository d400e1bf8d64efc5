"""Three kinds of chart as inline SVG, on axes from 0 to 1; colours are CSS variables of the page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 420.0, 260.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 44.0, 10.0, 10.0, 40.0


class Line(NamedTuple):
    """A line through points of the unit square; `low` and `high` are whiskers. `colour` is a CSS variable."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: str
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dashed: bool = False


def line_chart(lines: Sequence[Line], *, title: str, x: str, y: str, top: float = 1.0) -> str:
    """`lines` over axes named `x` and `y`; the y axis ends at `top`."""
    parts = [_axes(x, y, top)]
    for one in lines:
        points = " ".join(f"{_x(a):.1f},{_y(b / top):.1f}" for a, b in zip(one.xs, one.ys, strict=True))
        dashes = ' stroke-dasharray="4 4"' if one.dashed else ""
        parts.append(f'<polyline points="{points}" fill="none" stroke="var({one.colour})"{dashes}/>')
        if one.low is not None and one.high is not None:
            for a, b, low, high in zip(one.xs, one.ys, one.low, one.high, strict=True):
                parts.append(
                    f'<line x1="{_x(a):.1f}" x2="{_x(a):.1f}" y1="{_y(low / top):.1f}" '
                    f'y2="{_y(high / top):.1f}" stroke="var({one.colour})"/>'
                    f'<circle cx="{_x(a):.1f}" cy="{_y(b / top):.1f}" r="3" fill="var({one.colour})">'
                    f"<title>{a:.3f}: {b:.3f} [{low:.3f}, {high:.3f}]</title></circle>"
                )
    return _figure(parts, title, [(one.name, one.colour) for one in lines])


def histogram(edges: Sequence[float], groups: Sequence[tuple[str, Sequence[int], str]], *, title: str) -> str:
    """The shares of each group's counts between consecutive `edges`, side by side; a group is name, counts
    and colour."""
    shares = [[count / max(1, sum(counts)) for count in counts] for _, counts, _ in groups]
    top = max([share for row in shares for share in row] + [1e-9])
    parts = [_axes("score", "share of the arms", top)]
    for place, ((name, counts, colour), row) in enumerate(zip(groups, shares, strict=True)):
        for i, share in enumerate(row):
            width = (_x(edges[i + 1]) - _x(edges[i])) / len(groups)
            parts.append(
                f'<rect x="{_x(edges[i]) + place * width:.1f}" y="{_y(share / top):.1f}" '
                f'width="{width:.1f}" height="{_y(0) - _y(share / top):.1f}" fill="var({colour})">'
                f"<title>{escape(name)}, {edges[i]:.2f} to {edges[i + 1]:.2f}: {counts[i]}</title></rect>"
            )
    return _figure(parts, title, [(f"{name} ({sum(counts)})", colour) for name, counts, colour in groups])


def interval_chart(rows: Sequence[tuple[str, float, float, float]], *, title: str, x: str) -> str:
    """One row a value: its name, the value, and the ends of its interval, on an axis from 0 to 1."""
    height = _TOP + _BOTTOM + 34.0 * len(rows)
    foot = height - _BOTTOM
    parts = [
        f'<line x1="{_x(tick):.1f}" x2="{_x(tick):.1f}" y1="{_TOP}" y2="{foot}" class="rule"/>'
        f'<text x="{_x(tick):.1f}" y="{foot + 14}" text-anchor="middle">{tick:g}</text>'
        for tick in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    for i, (name, value, low, high) in enumerate(rows):
        y = _TOP + 34.0 * i + 24
        parts.append(
            f'<text x="{_LEFT}" y="{y - 9}" class="ink">{escape(name)}: '
            f"{value:.3f} [{low:.3f}, {high:.3f}]</text>"
            f'<line x1="{_x(low):.1f}" x2="{_x(high):.1f}" y1="{y}" y2="{y}" stroke="var(--a)"/>'
            f'<circle cx="{_x(value):.1f}" cy="{y}" r="4" fill="var(--a)"/>'
        )
    parts.append(
        f'<text x="{(_x(0) + _x(1)) / 2:.1f}" y="{height - 6}" text-anchor="middle">{escape(x)}</text>'
    )
    return _figure(parts, title, [], height)


def _x(share: float) -> float:
    return _LEFT + share * (WIDTH - _LEFT - _RIGHT)


def _y(share: float) -> float:
    return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)


def _axes(x: str, y: str, top: float) -> str:
    parts = [
        f'<line x1="{_x(0)}" x2="{_x(1)}" y1="{_y(tick):.1f}" y2="{_y(tick):.1f}" class="rule"/>'
        f'<text x="{_LEFT - 5}" y="{_y(tick) + 4:.1f}" text-anchor="end">{tick * top:.2g}</text>'
        f'<text x="{_x(tick):.1f}" y="{_y(0) + 14:.1f}" text-anchor="middle">{tick:g}</text>'
        for tick in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    middle = (_y(0) + _y(1)) / 2
    parts.append(
        f'<text x="{(_x(0) + _x(1)) / 2:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>'
        f'<text x="10" y="{middle:.1f}" text-anchor="middle" transform="rotate(-90 10 {middle:.1f})">'
        f"{escape(y)}</text>"
    )
    return "".join(parts)


def _figure(parts: Sequence[str], title: str, keys: Sequence[tuple[str, str]], height: float = HEIGHT) -> str:
    legend = "".join(
        f'<span><i style="background:var({colour})"></i>{escape(name)}</span> ' for name, colour in keys
    )
    return (
        f'<figure><svg viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">'
        + "".join(parts)
        + f"</svg><figcaption>{escape(title)}<br>{legend}</figcaption></figure>"
    )
