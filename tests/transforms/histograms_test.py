"""OpenPI's streaming statistics, against OpenPI's own and against exact ones."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policymix.transforms import histograms, normalize
from tests.transforms import openpi_golden as golden

laws = settings(deadline=None, max_examples=20)
STREAMS = golden.streams()


def of_stream(batches):
    return histograms.finish(functools.reduce(histograms.update, batches, None))


@pytest.mark.parametrize("name", STREAMS)
def test_statistics_are_openpis_to_the_last_bit(name):
    """Golden numbers: `tests/transforms/openpi_golden.py` says how to renew them."""
    found = of_stream(STREAMS[name])
    with np.load(golden.PATH) as expected:
        for field in normalize.FIELDS:
            theirs = expected[f"{name}/{field}"]
            assert getattr(found, field).dtype == theirs.dtype
            np.testing.assert_array_equal(getattr(found, field), theirs)


@laws
@given(st.integers(0, 2**32 - 1), st.integers(2, 400), st.integers(1, 4))
def test_one_batch_is_right_to_a_bin(seed, n, d):
    """A quantile is the left edge of the bin that holds it."""
    x = np.random.default_rng(seed).normal(3, 2, (n, d))
    found, exact = of_stream([x]), normalize.compute(x)
    np.testing.assert_allclose(found.mean, exact.mean)
    np.testing.assert_allclose(found.std, exact.std, rtol=1e-6, atol=1e-9)
    width = np.ptp(x, axis=0) / histograms.BINS + 1e-9
    for q, edge in zip(normalize.QUANTILES, (found.q01, found.q99), strict=True):
        # numpy's "inverted_cdf": the first value of which q n values are no larger.
        held = np.quantile(x, q, axis=0, method="inverted_cdf")
        assert np.all(edge <= held + 1e-9)
        assert np.all(held <= edge + width)


@laws
@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_batches_inside_the_first_ones_extremes_change_nothing_but_counts(seed, batches):
    rng = np.random.default_rng(seed)
    first = np.array([[-1.0, -2.0], [1.0, 2.0]])
    rest = [rng.uniform(-1, 1, (20, 2)) for _ in range(batches)]
    together, apart = of_stream([np.concatenate([first, *rest])]), of_stream([first, *rest])
    np.testing.assert_array_equal(apart.q01, together.q01)
    np.testing.assert_array_equal(apart.q99, together.q99)
    np.testing.assert_allclose(apart.mean, together.mean, atol=1e-12)
    np.testing.assert_allclose(apart.std, together.std, atol=1e-9)


def test_a_state_is_not_changed_by_what_follows():
    batches = STREAMS["growing"]
    state = histograms.update(None, batches[0])
    before = [np.copy(getattr(state, f)) for f in ("mean", "low", "edges", "counts")]
    histograms.update(state, batches[1])
    for old, field in zip(before, ("mean", "low", "edges", "counts"), strict=True):
        np.testing.assert_array_equal(getattr(state, field), old)


def test_what_cannot_be_counted_is_said():
    state = histograms.update(None, np.zeros((1, 3)))
    for few in (None, state):
        with pytest.raises(ValueError, match=r"norm stats of [01] vectors"):
            histograms.finish(few)
    with pytest.raises(ValueError, match="2 dimensions after 3"):
        histograms.update(state, np.zeros((4, 2)))
    with pytest.raises(ValueError, match="empty batch"):
        histograms.update(state, np.zeros((0, 3)))
    with pytest.raises(ValueError, match="dimension 1 of vector 2 is nan"):
        histograms.update(state, np.array([[0, 0, 0], [0, 0, 0], [0, np.nan, 0]]))
