"""Normalisation and its inverse, and statistics that are pooled, averaged and compared."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policymix.checkpoints import assets
from policymix.transforms import normalize
from policymix.transforms.normalize import NormStats
from tests import oracle

laws = settings(deadline=None, max_examples=50)
seeds = st.integers(0, 2**32 - 1)


def random_stats(rng, d=4):
    low = rng.uniform(-5, 5, d)
    return NormStats(rng.uniform(-5, 5, d), rng.uniform(0, 3, d), low, low + rng.uniform(0, 4, d))


@laws
@given(seeds, st.booleans(), st.integers(1, 4))
def test_unnormalise_undoes_normalise(seed, quantiles, d):
    rng = np.random.default_rng(seed)
    stats, x = random_stats(rng), rng.uniform(-9, 9, (3, 2, d))
    normed = normalize.normalize(x, stats, use_quantiles=quantiles)
    back = normalize.unnormalize(normed, stats, use_quantiles=quantiles)
    np.testing.assert_allclose(back, x, rtol=1e-9, atol=1e-9)


@laws
@given(seeds, st.booleans())
def test_padded_dimensions_pass_through_unnormalise(seed, quantiles):
    rng = np.random.default_rng(seed)
    stats, x = random_stats(rng), rng.uniform(-1, 1, (5, 7))
    out = normalize.unnormalize(x, stats, use_quantiles=quantiles)
    np.testing.assert_array_equal(out[:, 4:], x[:, 4:])
    head = normalize.unnormalize(x[:, :4], stats, use_quantiles=quantiles)
    np.testing.assert_array_equal(out[:, :4], head)


def test_the_formulas_are_openpis():
    stats = NormStats(np.array([1.0]), np.array([2.0]), np.array([-1.0]), np.array([3.0]))
    x = np.array([[5.0]])
    z = normalize.normalize(x, stats, use_quantiles=False)
    q = normalize.normalize(x, stats, use_quantiles=True)
    np.testing.assert_allclose(z, (5 - 1) / (2 + 1e-6), rtol=1e-12)
    np.testing.assert_allclose(q, (5 + 1) / (4 + 1e-6) * 2 - 1, rtol=1e-12)


def test_what_the_statistics_lack_is_said():
    stats = NormStats(np.zeros(2), np.ones(2))
    with pytest.raises(ValueError, match="have 2 dimensions, the data 3"):
        normalize.normalize(np.zeros(3), stats, use_quantiles=False)
    for function in (normalize.normalize, normalize.unnormalize):
        with pytest.raises(ValueError, match="needs q01 and q99"):
            function(np.zeros(2), stats, use_quantiles=True)
    with pytest.raises(ValueError, match=r"mean \(2,\) and std \(3,\)"):
        NormStats(np.zeros(2), np.ones(3))
    with pytest.raises(ValueError, match=r"q01 has shape \(1,\)"):
        NormStats(np.zeros(2), np.ones(2), np.zeros(1), np.zeros(2))


def test_computed_statistics_are_numpys_over_all_leading_axes():
    values = np.random.default_rng(0).normal(3, 2, (50, 4, 3)).astype(np.float32)
    stats, flat = normalize.compute(values), values.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(stats.mean, flat.mean(0))
    np.testing.assert_allclose(stats.std, flat.std(0))
    np.testing.assert_allclose([stats.q01, stats.q99], np.quantile(flat, [0.01, 0.99], axis=0))
    with pytest.raises(ValueError, match="no data"):
        normalize.compute(np.zeros((0, 3)))


@laws
@given(seeds, st.integers(1, 4))
def test_pooled_moments_are_those_of_all_samples_together(seed, n):
    rng = np.random.default_rng(seed)
    samples = [rng.normal(rng.uniform(-3, 3), rng.uniform(0.1, 2), (40, 3)) for _ in range(n)]
    parts = [normalize.compute(s) for s in samples]
    pooled = normalize.pool(parts, np.full(n, 1 / n))
    together = normalize.compute(np.concatenate(samples))
    np.testing.assert_allclose(pooled.mean, together.mean, atol=1e-9)
    np.testing.assert_allclose(pooled.std, together.std, rtol=1e-6)
    np.testing.assert_array_equal(pooled.q01, np.min([part.q01 for part in parts], axis=0))
    np.testing.assert_array_equal(pooled.q99, np.max([part.q99 for part in parts], axis=0))


def test_pooled_quantiles_are_absent_where_one_input_has_none():
    rng = np.random.default_rng(0)
    bare = NormStats(np.zeros(4), np.ones(4))
    pooled = normalize.pool([random_stats(rng), bare], np.array([0.5, 0.5]))
    assert pooled.q01 is None
    assert pooled.q99 is None
    assert normalize.average([random_stats(rng), bare], np.array([0.5, 0.5])).q01 is None


@pytest.mark.parametrize("model", oracle.MODELS)
@pytest.mark.parametrize("method", ["average", "manual_532", "inverse_loss"])
def test_average_is_kai0s_mixed_norm_stats(model, method):
    expected = oracle.kai0(model)["methods"][method]
    inputs = [assets.norm_stats_of(oracle.step(model, w))[1] for w in oracle.VARIANTS]
    for key, fields in expected["mixed_norm_stats"].items():
        found = normalize.average([stats[key] for stats in inputs], expected["weights"])
        for field, values in fields.items():
            np.testing.assert_allclose(getattr(found, field), values, rtol=1e-6)


def test_difference_names_the_first_dimension_that_differs():
    one, two = ({"state": random_stats(np.random.default_rng(0))} for _ in range(2))
    assert normalize.difference(one, two) is None
    two["state"].std[2] += 0.5
    std = one["state"].std[2]
    assert normalize.difference(one, two) == f"state/std[2] is {std:.6g} and {std + 0.5:.6g}"


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({}, "keys ['state'] and []"),
        ({"state": NormStats(np.zeros(2), np.ones(2))}, "state/q01 is given in one and absent"),
        ({"state": NormStats(np.zeros(3), np.ones(3))}, "state/mean has 2 and 3 dimensions"),
    ],
)
def test_difference_tells_what_one_of_them_lacks(other, words):
    one = {"state": NormStats(np.zeros(2), np.ones(2), np.zeros(2), np.ones(2))}
    assert words in normalize.difference(one, other)
