"""Statistics against statsmodels, scipy, enumeration and hand-worked numbers."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from looper_eval.statistics import (
    PairedTable,
    clustered_mean,
    holm,
    mcnemar_exact,
    minimum_detectable_difference,
    normal_p_value,
    paired_difference,
    paired_table,
    pass_at_k,
    wilson_interval,
    z_value,
)

proportion = pytest.importorskip("statsmodels.stats.proportion")
contingency = pytest.importorskip("statsmodels.stats.contingency_tables")
multitest = pytest.importorskip("statsmodels.stats.multitest")
regression = pytest.importorskip("statsmodels.api")
power = pytest.importorskip("statsmodels.stats.power")
np = pytest.importorskip("numpy")

TABLES = st.builds(PairedTable, *[st.integers(0, 300)] * 4)


def test_wilson_reproduces_a_worked_example() -> None:
    # 81 of 263 at 95%: 0.2553 to 0.3662 (Newcombe 1998, table I, method 3).
    interval = wilson_interval(81, 263)
    assert interval.low == pytest.approx(0.2553, abs=5e-5)
    assert interval.high == pytest.approx(0.3662, abs=5e-5)
    assert interval.estimate == 81 / 263


@pytest.mark.parametrize(
    ("successes", "total", "low", "high"), [(0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]
)
def test_wilson_reproduces_worked_examples_at_the_edge(
    successes: int, total: int, low: float, high: float
) -> None:
    # Newcombe 1998, table I, method 3.
    interval = wilson_interval(successes, total)
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


@given(st.integers(1, 2000), st.data(), st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_wilson_agrees_with_statsmodels(total: int, data: st.DataObject, confidence: float) -> None:
    successes = data.draw(st.integers(0, total))
    low, high = proportion.proportion_confint(successes, total, alpha=1 - confidence, method="wilson")
    interval = wilson_interval(successes, total, confidence)
    assert interval.low == pytest.approx(low, abs=1e-12)
    assert interval.high == pytest.approx(high, abs=1e-12)
    assert 0 <= interval.low <= interval.estimate <= interval.high <= 1


@pytest.mark.parametrize("arguments", [(0, 0), (-1, 5), (6, 5), (1, 2, 0.0), (1, 2, 1.0), (1, 2, math.nan)])
def test_wilson_refuses_impossible_counts_and_levels(arguments: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"need|confidence"):
        wilson_interval(*arguments)  # type: ignore[arg-type]


def test_z_values_are_the_tables() -> None:
    assert z_value(0.95) == pytest.approx(1.959964, abs=1e-6)
    assert z_value(0.99) == pytest.approx(2.575829, abs=1e-6)
    assert normal_p_value(1.959964) == pytest.approx(0.05, abs=1e-6)
    assert normal_p_value(-1.959964) == pytest.approx(0.05, abs=1e-6)


def test_the_paired_table_counts_by_hand() -> None:
    first = [True, True, False, False, True, False]
    second = [True, False, True, False, True, True]
    assert paired_table(first, second) == PairedTable(both=2, only_first=1, only_second=2, neither=1)
    assert paired_table(second, first) == PairedTable(both=2, only_first=2, only_second=1, neither=1)
    with pytest.raises(ValueError, match="zip"):
        paired_table(first, second[:-1])


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=80))
def test_the_paired_difference_is_the_mean_of_differences(pairs: list[tuple[bool, bool]]) -> None:
    differences = np.array([second - first for first, second in np.array(pairs, dtype=int)])
    table = paired_table(*zip(*pairs, strict=True))
    result = paired_difference(table)
    assert table.total == len(pairs)
    assert result.difference == pytest.approx(differences.mean())
    if table.only_first + table.only_second:
        expected = differences.std(ddof=1) / math.sqrt(len(pairs))
        assert result.standard_error == pytest.approx(expected, abs=1e-12)
    assert -1 <= result.low <= result.difference <= result.high <= 1


def test_the_paired_difference_worked_by_hand() -> None:
    # 10 questions, 4 gained, 1 lost: 0.3; variance (5 - 10 * 0.09) / (10 * 9) = 0.045556; SE 0.213437.
    result = paired_difference(PairedTable(both=3, only_first=1, only_second=4, neither=2))
    assert result.difference == pytest.approx(0.3)
    assert result.standard_error == pytest.approx(0.213437, abs=1e-6)
    assert result.low == pytest.approx(0.3 - 1.959964 * 0.213437, abs=1e-5)
    assert result.high == pytest.approx(0.3 + 1.959964 * 0.213437, abs=1e-5)


def test_pairing_1209_questions_with_8_percent_discordant_gives_the_known_error() -> None:
    # sqrt(.08 / 1209) = .0081, against .0156 for two independent samples at 82%.
    table = PairedTable(both=900, only_first=49, only_second=48, neither=212)
    assert paired_difference(table).standard_error == pytest.approx(0.0081, abs=1e-4)


def test_no_discordant_pair_is_no_proof_of_equality() -> None:
    result = paired_difference(PairedTable(both=50, only_first=0, only_second=0, neither=50))
    assert result.difference == 0
    assert result.low < 0 < result.high
    assert result.high < 0.03


@given(TABLES.filter(lambda table: table.total >= 2))
def test_swapping_the_models_swaps_the_sign(table: PairedTable) -> None:
    swapped = table._replace(only_first=table.only_second, only_second=table.only_first)
    one, other = paired_difference(table), paired_difference(swapped)
    assert one.difference == -other.difference
    assert one.low == pytest.approx(-other.high)
    assert mcnemar_exact(table) == mcnemar_exact(swapped)


def test_a_paired_difference_needs_two_questions() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        paired_difference(PairedTable(1, 0, 0, 0))


@given(TABLES)
@settings(max_examples=60)
def test_mcnemar_agrees_with_statsmodels(table: PairedTable) -> None:
    grid = [[table.both, table.only_first], [table.only_second, table.neither]]
    expected = 1.0
    if table.only_first + table.only_second:
        expected = contingency.mcnemar(grid, exact=True).pvalue
    assert mcnemar_exact(table) == pytest.approx(expected, abs=1e-12)


def test_mcnemar_worked_by_hand() -> None:
    # 1 against 9: 2 * (1 + 10) / 2**10.
    assert mcnemar_exact(PairedTable(5, 1, 9, 5)) == pytest.approx(22 / 1024)
    assert mcnemar_exact(PairedTable(5, 9, 1, 5)) == pytest.approx(22 / 1024)
    assert mcnemar_exact(PairedTable(5, 3, 3, 5)) == 1.0
    assert mcnemar_exact(PairedTable(5, 0, 0, 5)) == 1.0


def test_the_minimum_detectable_difference_worked_by_hand() -> None:
    # (1.959964 + 0.841621) * sqrt(0.08 / 1209) = 0.022790.
    assert minimum_detectable_difference(1209, 0.08) == pytest.approx(0.022790, abs=1e-6)
    assert minimum_detectable_difference(10, 0.08) == 0.08


def test_the_minimum_detectable_difference_has_the_power_of_statsmodels() -> None:
    effect = minimum_detectable_difference(1209, 0.2) / math.sqrt(0.2)
    assert power.normal_power(effect, 1209, 0.05) == pytest.approx(0.8, abs=1e-4)


def test_a_simulated_difference_of_that_size_is_found_four_times_in_five() -> None:
    generator = np.random.default_rng(7)
    n, discordant = 1209, 0.2
    effect = minimum_detectable_difference(n, discordant)
    gained, lost = (discordant + effect) / 2, (discordant - effect) / 2
    found = 0
    for lost_count, gained_count, _ in generator.multinomial(n, [lost, gained, 1 - discordant], size=2000):
        found += mcnemar_exact(PairedTable(n - lost_count - gained_count, lost_count, gained_count, 0)) < 0.05
    assert found / 2000 == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize(
    ("total", "share", "target"), [(0, 0.1, 0.8), (9, 0.0, 0.8), (9, 1.1, 0.8), (9, 0.1, 1.0)]
)
def test_the_minimum_detectable_difference_refuses_nonsense(total: int, share: float, target: float) -> None:
    with pytest.raises(ValueError, match="need"):
        minimum_detectable_difference(total, share, power=target)


def test_holm_worked_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.6, 0.9]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_agrees_with_statsmodels(p_values: list[float]) -> None:
    assert holm(p_values) == pytest.approx(list(multitest.multipletests(p_values, method="holm")[1]))


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan])
def test_holm_refuses_what_is_no_p_value(bad: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([0.5, bad])


@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(samples: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, samples))
    k = data.draw(st.integers(1, samples))
    subsets = list(itertools.combinations([True] * correct + [False] * (samples - correct), k))
    assert pass_at_k(samples, correct, k) == pytest.approx(
        float(Fraction(sum(map(any, subsets)), len(subsets)))
    )


def test_pass_at_k_is_exact_for_many_samples() -> None:
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01, rel=1e-12)
    assert pass_at_k(200, 200, 1) == 1.0
    assert pass_at_k(200, 0, 200) == 0.0


def test_pass_at_k_is_unbiased() -> None:
    generator = random.Random(3)
    share, samples, k = 0.3, 10, 4
    estimates = [
        pass_at_k(samples, sum(generator.random() < share for _ in range(samples)), k) for _ in range(20_000)
    ]
    assert sum(estimates) / len(estimates) == pytest.approx(1 - 0.7**4, abs=0.005)


@pytest.mark.parametrize(
    ("samples", "correct", "k"), [(4, 1, 5), (4, 5, 1), (4, -1, 1), (4, 1, 0), (0, 0, 0)]
)
def test_pass_at_k_refuses_impossible_counts(samples: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match="need 1 <= k"):
        pass_at_k(samples, correct, k)


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 6)), min_size=3, max_size=60))
def test_the_clustered_error_agrees_with_statsmodels(rows: list[tuple[float, int]]) -> None:
    values = [value for value, _ in rows]
    clusters = [cluster for _, cluster in rows]
    groups = len(set(clusters))
    if groups < 2:
        with pytest.raises(ValueError, match="at least 2 groups"):
            clustered_mean(values, clusters)
        return
    fitted = regression.OLS(np.array(values), np.ones(len(values))).fit(
        cov_type="cluster", cov_kwds={"groups": np.array(clusters), "use_correction": False}
    )
    # Its own correction also has (n - 1) / (n - p); G / (G - 1) is the one that we state.
    expected = fitted.bse[0] * math.sqrt(groups / (groups - 1))
    result = clustered_mean(values, clusters)
    assert result.mean == pytest.approx(fitted.params[0], abs=1e-9)
    assert result.standard_error == pytest.approx(expected, abs=1e-7)
    assert result.clusters == groups


def test_groups_of_one_give_the_ordinary_error_and_copies_add_nothing() -> None:
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    single = clustered_mean(values, range(5))
    assert single.standard_error == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))
    copied = clustered_mean(values * 3, list(range(5)) * 3)
    assert copied.standard_error == pytest.approx(single.standard_error)


def test_a_clustered_mean_refuses_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="2 values but 1 cluster"):
        clustered_mean([1.0, 2.0], ["a"])
