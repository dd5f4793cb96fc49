"""Intervals of success rates and the test of two policies, against printed values and by laws."""

import hypothesis
import pytest
from hypothesis import strategies as st

from policymix import intervals

counts = st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
outcomes = st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60)


# 81/263, 15/148, 0/20 and 1/29: R. G. Newcombe 1998, Statistics in Medicine 17:857, table I.
@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (1, 1, 0.2065, 1.0),
    ],
)
def test_wilson_gives_the_printed_values(successes, trials, low, high):
    assert intervals.wilson(successes, trials) == pytest.approx((low, high), abs=5.1e-5)


@hypothesis.given(counts)
def test_wilson_of_failures_is_the_mirror_of_successes(count):
    successes, trials = count
    low, high = intervals.wilson(successes, trials)
    assert intervals.wilson(trials - successes, trials) == pytest.approx((1 - high, 1 - low))


@hypothesis.given(counts)
def test_wilson_holds_the_rate_inside_zero_and_one(count):
    low, high = intervals.wilson(*count)
    assert 0 <= low <= count[0] / count[1] + 1e-12
    assert count[0] / count[1] - 1e-12 <= high <= 1


@hypothesis.given(counts, st.integers(2, 20))
def test_more_trials_of_the_same_rate_say_more(count, times):
    few, many = (intervals.wilson(k * count[0], k * count[1]) for k in (1, times))
    assert many[1] - many[0] < few[1] - few[0]


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 3), (4, 3)])
def test_wilson_refuses_counts_that_cannot_be(successes, trials):
    with pytest.raises(ValueError, match=f"{successes} successes in {trials} trials"):
        intervals.wilson(successes, trials)


def test_intervals_that_touch_are_not_separate():
    assert intervals.separate((0.1, 0.2), (0.3, 0.4))
    assert intervals.separate((0.3, 0.4), (0.1, 0.2))
    assert not intervals.separate((0.1, 0.3), (0.3, 0.4))
    assert not intervals.separate((0.1, 0.9), (0.3, 0.4))


def discordant(only_a, only_b, both=3):
    """Outcomes of two policies with so many starts that just one of them solved."""
    a = [True] * only_a + [False] * only_b + [True] * both
    return a, [False] * only_a + [True] * only_b + [True] * both


# Two-sided binomial tails by hand: 2 · Σ C(n, k) / 2ⁿ.
@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),
        (5, 0, 2 / 32),
        (0, 6, 2 / 64),
        (8, 1, 2 * 10 / 512),
        (7, 3, 2 * 176 / 1024),
        (4, 4, 1.0),
    ],
)
def test_mcnemar_is_the_exact_binomial_test(only_a, only_b, p):
    assert intervals.mcnemar(*discordant(only_a, only_b)) == pytest.approx(p, rel=1e-12)


@hypothesis.given(outcomes)
def test_mcnemar_knows_no_order(pairs):
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    p = intervals.mcnemar(a, b)
    assert 0 < p <= 1
    assert intervals.mcnemar(b, a) == p
    assert intervals.mcnemar(a[::-1], b[::-1]) == p
    assert intervals.mcnemar(a, a) == 1.0


@hypothesis.given(outcomes, st.integers(0, 50))
def test_mcnemar_ignores_starts_on_which_both_do_the_same(pairs, more):
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    same = [k % 2 == 0 for k in range(more)]
    assert intervals.mcnemar(a + same, b + same) == intervals.mcnemar(a, b)


def test_mcnemar_refuses_lists_of_different_lengths():
    with pytest.raises(ValueError, match="zip"):
        intervals.mcnemar([True], [True, False])


def test_the_interval_of_a_mean_is_students():
    # Sleep gained with drug 2 in Student 1908, of ten patients: mean 2.33, deviation 2.002 (n - 1).
    gained = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    low, high = intervals.mean(gained, (-10.0, 10.0))
    assert (low, high) == pytest.approx((0.8977, 3.7623), abs=1e-4)
    assert intervals.mean(gained, (0.9, 2.0)) == (0.9, 2.0)
    assert intervals.mean([0.3], (0.0, 1.0)) == (0.0, 1.0)
    assert intervals.mean([0.5] * 4, (0.0, 1.0)) == (0.5, 0.5)
    with pytest.raises(ValueError, match="no values"):
        intervals.mean([], (0.0, 1.0))
