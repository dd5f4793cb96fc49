"""Intervals of success rates and the test of two policies, against printed values and by laws."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import stats

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


def test_the_interval_of_a_mean_is_students_of_two_values_more():
    values = [0.3, 0.7, 0.45, 0.9, 0.55, 0.2]
    more = np.array([*values, 0, 1])
    wanted = stats.t.interval(0.95, 7, more.mean(), stats.sem(more))
    assert intervals.mean(values) == pytest.approx(wanted, abs=1e-12)
    assert intervals.mean([0.3]) == (0.0, 1.0)
    for wrong in ([], [0.5, 1.5], [float("nan")]):
        with pytest.raises(ValueError, match=r"numbers in \[0, 1\]; found \["):
            intervals.mean(wrong)


@hypothesis.given(st.lists(st.floats(0, 1), min_size=1, max_size=80))
def test_the_interval_of_a_mean_holds_it_and_has_a_width(values):
    low, high = intervals.mean(values)
    assert 0 <= low <= np.mean(values) <= high <= 1
    assert high - low > 1.5 / (len(values) + 2)


@pytest.mark.parametrize("n", [10, 20, 100])
def test_values_that_are_all_alike_do_not_say_more_than_as_many_successes(n):
    (low, high), (least, _) = intervals.mean([1.0] * n), intervals.wilson(n, n)
    assert high == 1
    assert low < least + 0.03
    assert intervals.mean([0.0] * n) == pytest.approx((1 - high, 1 - low))


# Scores of many policies: some that nearly always succeed or fail, for which n values say little.
SCORES = {
    "mostly 1": lambda rng, size: np.where(rng.random(size) < 0.95, 1, rng.random(size)),
    "near 1": lambda rng, size: rng.beta(8, 0.4, size),
    "near 0": lambda rng, size: rng.beta(0.1, 2, size),
    "mostly 0": lambda rng, size: np.where(rng.random(size) < 0.9, 0, rng.random(size)),
    "between": lambda rng, size: rng.beta(2, 5, size),
}


@pytest.mark.parametrize("n", [20, 50])
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_means_lie_in_their_interval_as_often_as_it_says(scores, n):
    rng = np.random.default_rng(0)
    truth = scores(rng, 10**6).mean()
    found = np.array([intervals.mean(row) for row in scores(rng, (1000, n)).tolist()])
    assert np.mean((found[:, 0] <= truth) & (truth <= found[:, 1])) > 0.94


@pytest.mark.parametrize("n", [10, 20, 50, 100])
def test_so_do_those_of_zeros_and_ones_wherever_they_lie(n):
    counts = np.arange(n + 1)
    low, high = np.array([intervals.mean([1.0] * k + [0.0] * (n - k)) for k in counts]).T
    for p in np.linspace(0.005, 0.995, 199):
        held = (low <= p) & (p <= high)
        assert stats.binom.pmf(counts[held], n, p).sum() > 0.93
