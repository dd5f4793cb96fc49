"""Closed-form rules: coefficients sum to one, and what cannot be normalised is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policymix.mixing import rules
from tests import oracle

laws = settings(deadline=None, max_examples=50)
losses = st.lists(st.floats(0, 1e6), min_size=1, max_size=8)


@pytest.mark.parametrize("n", [1, 3, 10])
def test_uniform_is_one_over_n(n):
    np.testing.assert_array_equal(rules.uniform(n), np.full(n, 1 / n))


def test_nothing_to_mix_is_an_error():
    with pytest.raises(ValueError, match="no checkpoints"):
        rules.uniform(0)


@laws
@given(losses, st.floats(0, 8))
def test_inverse_loss_is_a_distribution_that_prefers_the_smaller_loss(values, power):
    c = rules.inverse_loss(values, power)
    np.testing.assert_allclose(c.sum(), 1)
    assert np.all(c >= 0)
    order = np.argsort(values, kind="stable")
    assert np.all(np.diff(c[order]) <= 1e-15)


@laws
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), st.floats(0, 4))
def test_inverse_loss_is_its_formula(values, power):
    inverse = 1 / (np.array(values) + 1e-8) ** power
    np.testing.assert_allclose(rules.inverse_loss(values, power), inverse / inverse.sum())


@pytest.mark.parametrize("model", oracle.MODELS)
def test_inverse_loss_gives_kai0s_weights(model):
    method = oracle.kai0(model)["methods"]["inverse_loss"]
    c = rules.inverse_loss(method["per_checkpoint_loss"])
    np.testing.assert_allclose(c, method["weights"], rtol=0, atol=1e-5)


def test_a_loss_of_zero_takes_all_and_overflows_nothing():
    np.testing.assert_allclose(rules.inverse_loss([0.0, 1.0], power=60.0), [1, 0], atol=1e-12)


@pytest.mark.parametrize("values", [[1.0, np.nan], [np.inf, 1.0], [-0.1, 1.0], [[1.0]], 1.0])
def test_inverse_loss_refuses_what_is_no_loss(values):
    with pytest.raises(ValueError, match="losses that are finite and not negative"):
        rules.inverse_loss(values)


@laws
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=8).filter(lambda c: abs(sum(c)) > 1e-3))
def test_normalised_coefficients_sum_to_one_in_the_same_proportions(values):
    c = rules.normalize(values)
    np.testing.assert_allclose(c.sum(), 1, atol=1e-9 * np.abs(c).sum())
    np.testing.assert_allclose(c * np.sum(values), values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0, -1.0], [0.1, 0.2, -0.3]])
def test_coefficients_that_cancel_are_refused(values):
    with pytest.raises(ValueError, match="sum to zero"):
        rules.normalize(values)


@pytest.mark.parametrize("values", [[np.nan, 1.0], [np.inf, 1.0], [[1.0]]])
def test_coefficients_that_are_not_finite_numbers_are_refused(values):
    with pytest.raises(ValueError, match="must be n finite numbers"):
        rules.normalize(values)
