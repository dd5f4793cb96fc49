"""Normalisation and its inverse, and statistics that are pooled, averaged and compared."""

import concurrent.futures
import functools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policymix.checkpoints import assets
from policymix.transforms import normalize, selection
from policymix.transforms.normalize import NormStats
from tests import oracle

laws = settings(deadline=None, max_examples=50)
seeds = st.integers(0, 2**32 - 1)
schemes = st.sampled_from(normalize.SCHEMES)
masks = st.none() | st.tuples(*[st.booleans()] * 4)


def random_stats(rng, d=4):
    low = rng.uniform(-5, 5, d)
    return NormStats(rng.uniform(-5, 5, d), rng.uniform(0, 3, d), low, low + rng.uniform(0, 4, d))


@laws
@given(seeds, schemes, masks, st.integers(1, 4))
def test_unnormalise_undoes_normalise(seed, scheme, mask, d):
    rng = np.random.default_rng(seed)
    stats = random_stats(rng)
    low, high = (stats.q01[:d], stats.q99[:d]) if scheme == "bounds" else (-9, 9)  # it clips
    x = rng.uniform(low, high, (3, 2, d))
    normed = normalize.normalize(x, stats, scheme=scheme, mask=mask)
    back = normalize.unnormalize(normed, stats, scheme=scheme, mask=mask)
    np.testing.assert_allclose(back, x, rtol=1e-9, atol=1e-9)


@laws
@given(seeds, schemes, masks)
def test_padded_dimensions_pass_through_unnormalise(seed, scheme, mask):
    rng = np.random.default_rng(seed)
    stats, x = random_stats(rng), rng.uniform(-1, 1, (5, 7))
    out = normalize.unnormalize(x, stats, scheme=scheme, mask=mask)
    np.testing.assert_array_equal(out[:, 4:], x[:, 4:])
    head = normalize.unnormalize(x[:, :4], stats, scheme=scheme, mask=mask)
    np.testing.assert_array_equal(out[:, :4], head)


@laws
@given(seeds, schemes)
def test_masked_dimensions_pass_through(seed, scheme):
    rng = np.random.default_rng(seed)
    stats, x, mask = random_stats(rng), rng.uniform(-9, 9, (5, 4)), (True, False, True, False)
    for function in (normalize.normalize, normalize.unnormalize):
        out = function(x, stats, scheme=scheme, mask=mask)
        np.testing.assert_array_equal(out[:, 1::2], x[:, 1::2])
        np.testing.assert_array_equal(out[:, ::2], function(x, stats, scheme=scheme)[:, ::2])


def test_the_formulas_are_openpis_and_open_pi_zeros():
    stats = NormStats(np.array([1.0]), np.array([2.0]), np.array([-1.0]), np.array([3.0]))
    x = np.array([[2.0], [5.0], [-7.0]])
    z = normalize.normalize(x, stats, scheme="mean_std")
    q = normalize.normalize(x, stats, scheme="quantiles")
    b = normalize.normalize(x, stats, scheme="bounds")
    np.testing.assert_allclose(z, (x - 1) / (2 + 1e-6), rtol=1e-12)
    np.testing.assert_allclose(q, (x + 1) / (4 + 1e-6) * 2 - 1, rtol=1e-12)
    np.testing.assert_allclose(b, [[2 * 3 / (4 + 1e-8) - 1], [1], [-1]], rtol=1e-12)


def test_what_the_statistics_lack_is_said():
    stats = NormStats(np.zeros(2), np.ones(2))
    with pytest.raises(ValueError, match="have 2 dimensions, the data 3"):
        normalize.normalize(np.zeros(3), stats, scheme="mean_std")
    for function in (normalize.normalize, normalize.unnormalize):
        for scheme in ("quantiles", "bounds"):
            with pytest.raises(ValueError, match="needs q01 and q99"):
                function(np.zeros(2), stats, scheme=scheme)
        with pytest.raises(ValueError, match="'quantile': expected.*did you mean 'quantiles'"):
            function(np.zeros(2), stats, scheme="quantile")
        for mask in ((True,), (1, 0)):
            with pytest.raises(ValueError, match=r"expected bool \(2,\)"):
                function(np.zeros(2), stats, scheme="mean_std", mask=mask)
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
    values[7, 2, 1] = np.inf
    with pytest.raises(ValueError, match="too large to be squared, in dimension 1"):
        normalize.compute(np.array([[1, 1e300], [2, -1e300], [3, 1e300]]))
    with pytest.raises(ValueError, match=r"without a number in them, \(5, 0\)"):
        normalize.compute(np.zeros((5, 0)))
    with pytest.raises(ValueError, match="not finite, in dimension 1"):
        normalize.compute(values)


def values_of(rng, n, d, dtype):
    """With ties, both signs, both zeros, and a dimension that stands still."""
    values = (rng.normal(0, 10.0 ** rng.integers(-3, 4), (n, d)) + rng.normal()).astype(dtype)
    values[:, 0] = np.round(values[:, 0])
    values[:, -1] = rng.choice([-0.0, 0.0, 7.25])
    return values


def assert_statistics(stats, values):
    wide = np.asarray(values, np.float64)
    np.testing.assert_array_equal([stats.q01, stats.q99], np.quantile(wide, [0.01, 0.99], axis=0))
    np.testing.assert_allclose(stats.mean, wide.mean(0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(stats.std, wide.std(0), rtol=1e-7, atol=1e-9)


@laws
@given(seeds, st.integers(1, 300), st.sampled_from([np.float32, np.float64, np.int64]))
def test_quantiles_are_numpys_to_the_last_bit(seed, n, dtype):
    values = values_of(np.random.default_rng(seed), n, 3, dtype)
    assert_statistics(normalize.compute(values), values)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_quantiles_of_many_values_are_numpys_to_the_last_bit(dtype):
    values = values_of(np.random.default_rng(0), 300_000, 3, dtype)
    assert_statistics(normalize.compute(values), values)


@laws
@given(seeds, st.integers(1, 100))
def test_counted_rows_are_repeated_rows(seed, n):
    rng = np.random.default_rng(seed)
    values, counts = values_of(rng, n, 3, np.float32), rng.integers(0, 6, n)
    counts[rng.integers(n)] += 1
    assert_statistics(normalize.compute(values, counts), np.repeat(values, counts, axis=0))


@pytest.mark.parametrize("counts", [np.ones(3, int), np.array([1, -1]), np.ones((2, 2), int)])
def test_counts_that_do_not_fit_are_refused(counts):
    with pytest.raises(ValueError, match="must be one for each row of values"):
        normalize.compute(np.zeros((2, 2)), counts)


@laws
@given(seeds, st.lists(st.integers(0, 60), min_size=1, max_size=5), st.booleans())
def test_statistics_of_blocks_are_those_of_everything(seed, sizes, wide):
    """Whatever the blocks, also of two dtypes."""
    rng = np.random.default_rng(seed)
    sizes = [*sizes, 1]
    dtypes = [np.float64 if wide and i % 2 else np.float32 for i in range(len(sizes))]
    blocks = [values_of(rng, n, 3, t) for n, t in zip(sizes, dtypes, strict=True)]
    stats = normalize.compute_blocks([lambda: iter(blocks)])
    assert_statistics(stats, np.concatenate(blocks))
    shares = [functools.partial(blocks.__getitem__, slice(k, None, 3)) for k in range(3)]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        assert_statistics(normalize.compute_blocks(shares, pool.map), np.concatenate(blocks))
    counts = [rng.integers(1, 4, n) for n in sizes]
    stats = normalize.compute_blocks([lambda: zip(blocks, counts, strict=True)])
    repeated = [np.repeat(b, c, axis=0) for b, c in zip(blocks, counts, strict=True)]
    assert_statistics(stats, np.concatenate(repeated))


def test_values_beyond_one_piece_are_counted_once(monkeypatch):
    values = values_of(np.random.default_rng(4), 1000, 3, np.float32)
    monkeypatch.setattr(selection, "ROWS", 64)
    assert_statistics(normalize.compute(values.reshape(10, 100, 3)), values)


def test_memory_does_not_grow_with_the_data():
    """Blocks of a megabyte: what is held is one of them, its copies, and the tallies."""
    block = np.random.default_rng(0).normal(size=(1 << 18, 1)).astype(np.float32)
    peaks = []
    for n in (2, 24):
        tracemalloc.start()
        normalize.compute_blocks([lambda n=n: (block + np.float32(i) for i in range(n))])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 2e6 < 24 * block.nbytes


@laws
@given(seeds, st.lists(st.integers(0, 30), min_size=1, max_size=6))
def test_moments_merge_in_any_order(seed, sizes):
    rng = np.random.default_rng(seed)
    parts = [rng.normal(rng.uniform(-9, 9), 1, (n, 2)) for n in [*sizes, 3]]
    merged = normalize.Moments.of(np.zeros((0, 2)))
    for i in rng.permutation(len(parts)):
        merged = merged.merge(normalize.Moments.of(parts[i]))
    together = np.concatenate(parts)
    assert merged.count == len(together)
    np.testing.assert_allclose(merged.mean, together.mean(0))
    np.testing.assert_allclose(merged.squares / merged.count, together.var(0))


@laws
@given(st.integers(0, 40), st.integers(1, 60))
def test_chunk_counts_are_how_often_frames_occur_in_chunks(length, horizon):
    starts, offsets = np.arange(length)[:, None], np.arange(horizon)
    frames = np.minimum(starts + offsets, length - 1)
    expected = np.bincount(frames.reshape(-1), minlength=length)
    np.testing.assert_array_equal(normalize.chunk_counts(length, horizon), expected)


def test_statistics_of_chunks_need_no_chunks():
    episodes = [values_of(np.random.default_rng(n), n, 3, np.float32) for n in (1, 9, 40)]
    chunks = [
        e[np.minimum(np.arange(len(e))[:, None] + np.arange(10), len(e) - 1)] for e in episodes
    ]
    counts = np.concatenate([normalize.chunk_counts(len(e), 10) for e in episodes])
    stats = normalize.compute(np.concatenate(episodes), counts)
    assert_statistics(stats, np.concatenate(chunks).reshape(-1, 3))


def test_dimensions_that_never_change_are_told():
    rng = np.random.default_rng(0)
    values = rng.normal(5, 1e-3, (1000, 5)).astype(np.float32)
    values[:, 1] = 0.1  # not exact in binary, nor its mean
    values[:, 2] = 0
    values[:, 3] = rng.random(1000) < 0.002  # rarely
    stats = normalize.compute(values)
    assert normalize.constant_dims(stats) == [1, 2]
    assert normalize.constant_dims(stats, "quantiles") == [1, 2, 3]
    assert normalize.constant_dims(stats, "bounds") == [1, 2, 3]


def test_the_transform_normalises_what_has_statistics():
    stats = {"state": NormStats(np.ones(2), np.ones(2)), "actions": NormStats(*np.ones((2, 3)))}
    transform = normalize.Normalize(stats, masks={"actions": (True, True, False)})
    example = {"state": np.array([3.0, 1.0]), "prompt": "push", "actions": np.full((4, 3), 2.0)}
    made = transform.apply(example)
    np.testing.assert_allclose(made["state"], [2, 0], atol=1e-5)
    np.testing.assert_allclose(made["actions"], [[1, 1, 2]] * 4, atol=1e-5)
    assert made["prompt"] == "push"
    back = transform.invert(made)
    np.testing.assert_allclose(back["actions"], example["actions"])
    with pytest.raises(ValueError, match="needs q01 and q99"):
        normalize.Normalize(stats, "quantiles")
    with pytest.raises(ValueError, match=r"is bool \(2,\); expected bool \(3,\)"):
        normalize.Normalize(stats, masks={"actions": (True, True)})


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
