"""What counts as an equation, what it is worth, and what hostile text costs."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regime_w.arithmetic import evaluate
from regime_w.arms import COUNTERFACTUAL_CLOSE, COUNTERFACTUAL_OPEN
from regime_w.equations import equations, intermediate_results

READ = {
    "4*6=24": "24",
    "<<48/2=24>>": "24",
    "$3 x 4 = $12": "12",
    "3x4=12": "12",
    "3 X 4 = 12": "12",
    "1,200 * 1,000 = 1,200,000": "1200000",
    "12 × 4 = 48": "48",
    "48 ÷ 4 = 12": "12",
    "10 − 3 = 7": "7",
    "10 – 3 = 7": "7",
    "2 · 3 = 6": "6",
    "4 * 6 = **24**": "24",
    "2**3 = 8": "8",
    "2^3 = 8": "8",
    "5² = 25": "25",
    "7 / 2 = 7/2": "7/2",
    "7 / 2 = 3 1/2": "7/2",
    "7 / 2 = 3½": "7/2",
    "½ * 10 = 5": "5",
    "0.5 * 3 = 1.50": "3/2",
    "20% of 50 = 10": "10",
    "1/2 of 48 = 24": "24",
    "10 / 40 = 25%": "1/4",
    "2 - 5 = -3": "-3",
    "3(4 + 5) = 27": "27",
    "(2 + 3) * 4 = 20": "20",
    "[(2 + 3) * 4] = 20": "20",
    "10/3 ≈ 3.33": "333/100",
    r"\frac{48}{2} = 24": "24",
    r"\(3 \times 4 = 12\)": "12",
    r"\[ 5 \text{ apples} + 3 \text{ apples} = 8 \text{ apples} \]": "8",
    r"$57{,}500 \cdot 2 = 115{,}000$": "115000",
    r"\$3 \times 4 = \$12": "12",
    "7 fish + 17 fish = 24 fish": "24",
    "12 racquets * 14 minutes/racquet = 168 minutes": "168",
    "He has 5 apples and buys 3 + 4 = 7 more.": "7",
    "So (as she said: 4 * 6 = 24) it is.": "24",
    "Wages = $4 * 6 = $24.": "24",
    "- 4 * 6 = 24": "24",
    "4 * 6\n= 24": "24",
    "３ ＋ ４ ＝ ７": "7",
    "80,000*.5=$<<80000*.5=40000.0>>40,000": "40000",
    "4 * 6 = 25": "25",
    "4 * 6 == 24": "24",
}


@pytest.mark.parametrize("text", READ)
def test_an_equation_has_the_value_that_it_states(text: str) -> None:
    assert intermediate_results(text) == {Fraction(READ[text])}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x = 5",
        "5 = 5",
        "4 * 6",
        "4 * 6 =",
        "= 24",
        "5x + 3 = 18",
        "4 * 6 => 24",
        "4 * 6 <= 24",
        "4 * 6 != 24",
        "1 / 0 = 0",
        "4 * 6 is 24",
        "4 *\n6 = 24",
        "3 out of 5 = 60%",
        "<<4*6>>",
        "2^99999999 = 1",
        "0 ^ -1 = 3",
        "Solution:",
        ":",
        "I agree with the other solution in every step.",
    ],
)
def test_what_calculates_nothing_is_no_equation(text: str) -> None:
    assert intermediate_results(text) == frozenset()


def test_chained_sides_each_count() -> None:
    assert intermediate_results("3*4 + 2 = 12 + 2 = 14") == {Fraction(14)}
    assert intermediate_results("2 + 3 = 5 = 20 / 2") == {Fraction(5), Fraction(10)}


def test_several_equations_on_one_line() -> None:
    text = "First 4*6=24, then 24/2 = 12 and 12 - 2 = 10. So 10+1=11"
    assert intermediate_results(text) == {Fraction(n) for n in (24, 12, 10, 11)}


def test_the_final_answer_is_no_intermediate_result() -> None:
    assert intermediate_results("4*6=24 and 24/2=12.0", Fraction(12)) == {Fraction(24)}


def test_numbers_inside_a_counterfactual_block_are_ignored() -> None:
    text = (
        f"4*6=24\n{COUNTERFACTUAL_OPEN}\nwith 5: 5*6=30\n{COUNTERFACTUAL_CLOSE}\n24/2=12"
        f"{COUNTERFACTUAL_OPEN} 9*9=81"
    )
    assert intermediate_results(text) == {Fraction(24), Fraction(12)}


def test_an_equation_read_across_words_must_hold() -> None:
    assert [e.values for e in equations("10 miles / 3 hours = 3.33 mph")] == [(Fraction("3.33"),)]
    assert not list(equations("On day 3 - 4 eggs = 4"))


def test_equations_know_whether_they_hold() -> None:
    assert [e.holds for e in equations("4 * 6 = 24; 4 * 6 = 25")] == [True, False]


sides = st.recursive(
    st.integers(0, 999).map(str),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        inner.map(lambda t: f"(-{t})"),
    ),
    max_leaves=8,
)


def tokens(text: str) -> list[str]:
    return text.replace("(", " ( ").replace(")", " ) ").replace("-", " - ").split()


@settings(max_examples=500)
@given(sides)
def test_evaluation_agrees_with_python(side: str) -> None:
    try:
        # Python as the oracle: every literal an exact fraction.
        expected = eval("".join(f"F({t})" if t.isdigit() else t for t in tokens(side)), {"F": Fraction})
    except ZeroDivisionError:
        expected = None
    assert evaluate(tokens(side)) == expected


@settings(max_examples=300)
@given(sides, sides)
def test_a_written_equation_is_found_again(left: str, right: str) -> None:
    value = evaluate(tokens(right))
    operators = any(t in "+-*/" for side in (left, right) for t in tokens(side)[1:])
    if value is None or evaluate(tokens(left)) is None or not operators:
        return
    assert value in intermediate_results(f"Now we see that\n{left} = {right}\nas was to be shown.")


@settings(max_examples=200)
@given(st.text(max_size=400))
def test_any_text_is_read_without_an_error(text: str) -> None:
    assert intermediate_results(text) == intermediate_results(text)


@settings(max_examples=500)
@given(st.text(alphabet="0123456789+-*/^%=()<>$,. x\n\\{}of½²frac", max_size=200))
def test_any_arithmetic_looking_text_is_read_without_an_error(text: str) -> None:
    for equation in equations(text):
        assert equation.values
        assert all(value.denominator > 0 for value in equation.values)


HOSTILE = {
    "spaces": " ",
    "newlines": "\n",
    "spaces and newlines": " \n",
    "digits": "9",
    "groups": "1,",
    "thousands": ",111",
    "points": "1.",
    "opening": "(",
    "nested": "((1+",
    "closing": ")",
    "minus": "-",
    "bullets": "- ",
    "equals": "=",
    "chain": "1+1=",
    "powers": "9^9^",
    "products": "999999*",
    "annotations": "<<",
    "annotation": "<<1+1=2>>",
    "fractions": "\\frac{",
    "full fractions": "\\frac{1}{2}",
    "text": "\\text{",
    "backslashes": "\\",
    "blocks": COUNTERFACTUAL_OPEN,
    "words": "5 words ",
    "of": "5% of ",
    "mixed": "1 1/2 ",
    "vulgar": "½",
    "equation": "4*6=24\n",
    "wide": "ﷺ",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_costs_linear_time(name: str) -> None:
    def seconds(length: int) -> float:
        text = (HOSTILE[name] * length)[:length] + " 4*6=24"
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            intermediate_results(text)
            best = min(best, time.process_time() - start)
        return best

    # Four times the text: four times the time where it is linear, sixteen times where it is quadratic.
    assert seconds(100_000) < 9 * seconds(25_000) + 0.05
