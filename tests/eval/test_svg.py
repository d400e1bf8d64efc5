"""Charts are well-formed, put values where they belong and escape every label."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looper_eval.svg import (
    Bars,
    Interval,
    Series,
    histogram,
    interval_chart,
    line_chart,
    signed_points,
    ticks,
)


def of_class(svg: str, name: str) -> list[ET.Element]:
    return [one for one in ET.fromstring(svg).iter() if name in (one.get("class") or "").split()]


@given(low=st.floats(-1e6, 1e6), width=st.floats(1e-3, 1e6))
def test_ticks_are_even_and_lie_inside_the_range(low: float, width: float) -> None:
    found = ticks(low, low + width)
    assert 2 <= len(found) <= 11
    slack = 1e-6 * (abs(low) + width)
    assert low - slack <= found[0]
    assert found[-1] <= low + width + slack
    steps = [b - a for a, b in pairwise(found)]
    assert max(steps) - min(steps) <= slack


def test_a_line_rises_where_its_values_rise() -> None:
    svg = line_chart([Series("reward", [0, 1, 2], [0.0, 4.0, 1.0])], label="Reward", x_label="step")
    (line,) = of_class(svg, "line")
    points = [tuple(map(float, point.split(","))) for point in (line.get("points") or "").split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x0 < x1 < x2
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    # y grows downwards; the first step rises by 4, the second falls by 3.
    assert (y0 - y1) / (y2 - y1) == pytest.approx(4 / 3, rel=0.01)


def test_intervals_span_their_ends_and_zero_has_its_place() -> None:
    svg = interval_chart([Interval("b - a", 0.02, -0.01, 0.05)], label="d", show=signed_points, zero=True)
    (line,), (dot,), (zero,) = of_class(svg, "line"), of_class(svg, "mark"), of_class(svg, "zero")
    left, right, middle = float(line.get("x1") or 0), float(line.get("x2") or 0), float(dot.get("cx") or 0)
    assert middle == pytest.approx((left + right) / 2, abs=0.11)
    assert float(zero.get("x1") or 0) == pytest.approx(left + (right - left) / 6, abs=0.11)
    assert "+2 [-1, +5]" in svg


def test_bars_stand_on_each_other_with_heights_in_proportion() -> None:
    svg = histogram([0, 10, 20], Bars("a", counts=[4, 0], cut=[2, 6]), label="l", x_label="tokens")
    heights = [float(one.get("height") or 0) for one in of_class(svg, "bar")]
    assert heights == [
        pytest.approx(2 * heights[1], abs=0.2),
        heights[1],
        pytest.approx(3 * heights[1], abs=0.2),
    ]
    whole, cut, _ = of_class(svg, "bar")
    assert float(cut.get("y") or 0) + heights[1] == pytest.approx(float(whole.get("y") or 0), abs=0.11)


def test_labels_are_text_and_never_markup() -> None:
    evil = '"><script>alert(1)</script>'
    for svg in (
        line_chart([Series(evil, [0, 1], [1.0, 2.0], markers=True)], label=evil, x_label=evil),
        interval_chart([Interval(evil, 0.5, 0.4, 0.6)], label=evil),
        histogram([0, 1], Bars(evil, [1], [0]), label=evil, x_label=evil),
    ):
        assert "<script" not in svg
        assert ET.fromstring(svg).get("aria-label") == evil


def test_a_constant_or_a_single_point_is_drawn() -> None:
    for xs, ys in (([3], [0.0]), ([0, 1], [2.0, 2.0])):
        ET.fromstring(line_chart([Series("flat", xs, ys)], label="l", x_label="step"))
    assert line_chart([], label="l", x_label="step") == ""
