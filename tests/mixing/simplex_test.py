"""The quadratic programme: optimality conditions, brute force, and what units must not change."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policymix.mixing import simplex

laws = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 2**32 - 1)


def programme(seed, n, num_groups=1, rank=None, corner=False):
    """(H, g, s) of a least-squares problem whose columns differ in size by up to 10^3."""
    rng = np.random.default_rng(seed)
    total = n * num_groups
    a = rng.standard_normal((total if rank is None else rank, total))
    a = a * 10 ** rng.uniform(-2, 1, total)
    g = rng.standard_normal(total) * 10 ** rng.uniform(-3, 1)
    start = rng.dirichlet(np.ones(n), num_groups)
    if corner:
        start = np.eye(n)[rng.integers(0, n, num_groups)]
    return a.T @ a, g, start.ravel()


def value(programme, c):
    curvature, gradient, start = programme
    return gradient @ (c - start) + 0.5 * (c - start) @ curvature @ (c - start)


def duality_gap(programme, c, num_groups=1):
    """Σ over groups of (Σ c_k q_k - min q), q the slope at c: zero at a minimum only."""
    curvature, gradient, start = programme
    slope = gradient + curvature @ (c - start)
    rows = slope.reshape(num_groups, -1)
    size = np.abs(curvature).max() + np.abs(gradient).max()
    return (slope @ c - rows.min(axis=1).sum()) / size


@laws
@given(seeds, st.integers(1, 8), st.integers(1, 4), st.booleans(), st.data())
def test_the_answer_is_optimal_also_where_the_curvature_is_singular(
    seed, n, num_groups, corner, data
):
    rank = data.draw(st.integers(0, n * num_groups))
    problem = programme(seed, n, num_groups, rank, corner)
    c = simplex.minimize(*problem, sizes=(n,) * num_groups)
    assert np.all(c >= 0)
    np.testing.assert_allclose(c.reshape(num_groups, n).sum(axis=1), 1, rtol=1e-15)
    assert abs(duality_gap(problem, c, num_groups)) < 1e-12


@laws
@given(seeds, st.integers(1, 4), st.integers(1, 2))
def test_no_support_does_better(seed, n, num_groups):
    problem = programme(seed, n, num_groups)
    curvature, gradient, start = problem
    subsets = [s for k in range(1, n + 1) for s in itertools.combinations(range(n), k)]
    best = np.inf
    for supports in itertools.product(subsets, repeat=num_groups):
        chosen = [group * n + k for group, support in enumerate(supports) for k in support]
        sums = np.array([[k // n == group for k in chosen] for group in range(num_groups)], float)
        system = np.block(
            [
                [curvature[np.ix_(chosen, chosen)], sums.T],
                [sums, np.zeros((num_groups, num_groups))],
            ]
        )
        right = np.concatenate([(curvature @ start - gradient)[chosen], np.ones(num_groups)])
        c = np.zeros(n * num_groups)
        c[chosen] = np.linalg.solve(system, right)[: len(chosen)]
        if np.all(c >= 0):
            best = min(best, value(problem, c))
    size = np.abs(curvature).max() + np.abs(gradient).max()
    found = value(problem, simplex.minimize(*problem, sizes=(n,) * num_groups))
    np.testing.assert_allclose(found, best, rtol=0, atol=1e-12 * size)


@laws
@given(seeds, st.integers(2, 6), st.floats(1e-6, 1e6), st.floats(-10, 10))
def test_units_and_what_no_mix_can_feel_change_nothing(seed, n, unit, constant):
    curvature, gradient, start = programme(seed, n)
    c = simplex.minimize(curvature, gradient, start)
    np.testing.assert_allclose(
        simplex.minimize(unit * curvature, unit * gradient, start), c, atol=1e-9
    )
    # A slope common to all coefficients, and curvature along it, are the same for every mix.
    along = np.random.default_rng(seed).standard_normal(n)
    common = curvature + along[:, None] + along[None, :]
    np.testing.assert_allclose(simplex.minimize(common, gradient + constant, start), c, atol=1e-6)


@laws
@given(seeds, st.integers(2, 6))
def test_the_order_of_the_coefficients_does_not_matter(seed, n):
    curvature, gradient, start = programme(seed, n)
    order = np.random.default_rng(seed).permutation(n)
    c = simplex.minimize(curvature, gradient, start)
    found = simplex.minimize(curvature[np.ix_(order, order)], gradient[order], start[order])
    np.testing.assert_allclose(found, c[order], atol=1e-9)


@laws
@given(seeds, st.integers(1, 10))
def test_with_unit_curvature_it_is_the_projection_onto_the_simplex(seed, n):
    point = np.random.default_rng(seed).standard_normal(n)  # need not lie on the simplex
    c = simplex.minimize(np.eye(n), np.zeros(n), point)
    ordered = np.sort(point)[::-1]
    levels = (np.cumsum(ordered) - 1) / np.arange(1, n + 1)
    level = levels[np.flatnonzero(ordered > levels)[-1]]
    np.testing.assert_allclose(c, np.maximum(point - level, 0), atol=1e-12)


def test_without_curvature_it_is_the_lowest_corner_exactly():
    c = simplex.minimize(
        np.zeros((5, 5)), [3.0, 1.0, 2.0, -1.0, 5.0], [0.2, 0.3, 0.5, 0.5, 0.5], sizes=(3, 2)
    )
    np.testing.assert_array_equal(c, [0, 1, 0, 1, 0])


def test_checkpoints_that_are_the_same_share_and_stay_where_they_started():
    column = np.array([[1.0, 1.0, -1.0]])
    c = simplex.minimize(column.T @ column, [-0.5, -0.5, 0.5], [0.25, 0.25, 0.5])
    np.testing.assert_allclose(c[0], c[1])
    np.testing.assert_allclose(c.sum(), 1)


def test_eighty_coefficients_are_no_burden():
    problem = programme(0, 10, num_groups=8, rank=60)
    c = simplex.minimize(*problem, sizes=(10,) * 8)
    assert abs(duality_gap(problem, c, 8)) < 1e-12
    assert 8 < np.count_nonzero(c) < 80


@pytest.mark.parametrize("sizes", [(1,), (4,), (2, 1, 3)])
def test_the_tangent_basis_is_orthonormal_and_keeps_sums(sizes):
    basis = simplex.tangent(sizes)
    assert basis.shape == (sum(sizes), sum(sizes) - len(sizes))
    np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-15)
    firsts = np.cumsum([0, *sizes[:-1]])
    np.testing.assert_allclose(np.add.reduceat(basis, firsts, axis=0), 0, atol=1e-15)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((np.eye(2), np.zeros(3), np.ones(3) / 3), r"got \(2, 2\), \(3,\), \(3,\)"),
        ((np.eye(2), np.zeros(2), np.ones(2) / 2, (1, 2)), r"groups of \(1, 2\)"),
        ((np.eye(2), np.zeros(2), np.ones(2) / 2, (2, 0)), "at least one coefficient"),
        ((np.eye(2), np.array([np.nan, 0]), np.ones(2) / 2), "finite numbers"),
    ],
)
def test_what_is_no_programme_is_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        simplex.minimize(*inputs)


def test_a_space_lays_groups_one_after_another():
    space = simplex.Space.of(2, ("b", "a"))
    np.testing.assert_array_equal(space.start(), [0.5] * 4)
    flat = space.start({"a": [0.2, 0.8], "b": [1, 0]})
    np.testing.assert_array_equal(flat, [1, 0, 0.2, 0.8])
    assert {g: list(c) for g, c in space.split(flat).items()} == {"b": [1, 0], "a": [0.2, 0.8]}
    np.testing.assert_array_equal(simplex.Space.of(3).split(np.arange(3)), [0, 1, 2])
    step, promised = space.step(flat, np.array([0.0, -1.0, 0.0, 0.0]), np.eye(4))
    np.testing.assert_allclose(step, [-0.5, 0.5, 0, 0])
    np.testing.assert_allclose(promised, 0.25)


@pytest.mark.parametrize(
    "start", [[0.5, 0.6], [1.5, -0.5], [1.0], [np.nan, 1.0], [0.5, 0.25, 0.25]]
)
def test_a_start_off_the_simplex_is_refused(start):
    with pytest.raises(ValueError, match="not negative and with a sum of one"):
        simplex.Space.of(2).start(start)
