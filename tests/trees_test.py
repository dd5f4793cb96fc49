"""The laws of parameter trees: paths, regexes, linear combinations, and readable differences."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policymix import trees

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)
laws = settings(deadline=None, max_examples=30)

names = st.text("abcXYZ_0129.", min_size=1, max_size=5)
flat_trees = st.lists(
    st.lists(names, min_size=1, max_size=3).map(tuple), min_size=1, max_size=6, unique=True
).filter(lambda paths: not any(p != q and q[: len(p)] == p for p in paths for q in paths))


@st.composite
def families(draw, dtypes=DTYPES, max_n=4):
    """n trees of one structure, leaf by leaf in dtypes of their own, and n coefficients."""
    paths = ["/".join(p) for p in draw(flat_trees)]
    n = draw(st.integers(1, max_n))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shapes = [tuple(rng.integers(0, 4, size=rng.integers(0, 3))) for _ in paths]
    flats = [
        {
            path: rng.standard_normal(shape).astype(dtypes[rng.integers(len(dtypes))])
            for path, shape in zip(paths, shapes, strict=True)
        }
        for _ in range(n)
    ]
    return [trees.unflatten(flat) for flat in flats], rng.uniform(-2, 2, n)


def exact(coefficients, leaves):
    """Σ c_k leaf_k in float64, and the size of what was summed."""
    terms = [c * leaf.astype(np.float64) for c, leaf in zip(coefficients, leaves, strict=True)]
    return sum(terms), sum(np.abs(term) for term in terms)


def assert_rounds_to(result, expected, size):
    """`result` is `expected` up to float32 sums and one rounding to its own dtype."""
    eps = float(ml_dtypes.finfo(result.dtype).eps)
    tiny = float(ml_dtypes.finfo(result.dtype).smallest_subnormal)
    error = np.abs(np.asarray(result, np.float64) - expected)
    assert np.all(error <= 0.51 * eps * np.abs(expected) + 1e-6 * size + tiny)


@laws
@given(families())
def test_combine_is_numpys_float64_sum(family):
    many, coefficients = family
    mixed = trees.flatten(trees.combine(coefficients, many))
    flats = [trees.flatten(tree) for tree in many]
    assert list(mixed) == list(flats[0])
    for path, leaf in mixed.items():
        leaves = [flat[path] for flat in flats]
        widest = jnp.result_type(*(x.dtype for x in leaves))
        assert leaf.dtype == widest
        assert leaf.shape == leaves[0].shape
        assert_rounds_to(leaf, *exact(coefficients, leaves))


@laws
@given(families(dtypes=(np.float32,)), st.floats(-3, 3), st.integers(0, 2**32 - 1))
def test_combine_is_linear_in_the_coefficients(family, scale, seed):
    many, c = family
    d = np.random.default_rng(seed).uniform(-2, 2, len(c))
    whole = trees.flatten(trees.combine(c + scale * d, many))
    parts = trees.flatten(trees.combine(c, many)), trees.flatten(trees.combine(d, many))
    for path in whole:
        expected = parts[0][path] + scale * parts[1][path]
        np.testing.assert_allclose(whole[path], expected, rtol=1e-5, atol=3e-5)


@laws
@given(families(max_n=3), st.integers(0, 2))
def test_a_corner_of_the_simplex_gives_that_tree_bit_for_bit(family, k):
    many, _ = family
    k %= len(many)
    mixed = trees.flatten(trees.combine(np.eye(len(many))[k], many))
    for path, leaf in trees.flatten(many[k]).items():
        np.testing.assert_array_equal(np.asarray(mixed[path]), leaf.astype(mixed[path].dtype))


def _two_modules(n=3, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"img/head/kernel": (4, 3), "img/head/bias": (3,), "llm/w": (2, 5), "out/w": (3,)}
    return [
        trees.unflatten({p: rng.standard_normal(s).astype(np.float32) for p, s in shapes.items()})
        for _ in range(n)
    ]


def test_combine_by_groups_is_numpy_per_group_and_the_first_match_wins():
    many = _two_modules()
    groups = {"img/head/bias": [1.0, 0, 0], "img/.*": [0.2, 0.3, 0.5], ".*": [-1.0, 1.0, 1.0]}
    mixed = trees.flatten(trees.combine(groups, many))
    of_path = {
        "img/head/bias": "img/head/bias",
        "img/head/kernel": "img/.*",
        "llm/w": ".*",
        "out/w": ".*",
    }
    for path, group in of_path.items():
        leaves = [trees.flatten(tree)[path] for tree in many]
        assert_rounds_to(mixed[path], *exact(groups[group], leaves))


@pytest.mark.parametrize("jit", [False, True])
def test_the_gradient_of_a_quadratic_through_combine_is_exact(jit):
    many, target = _two_modules(), _two_modules(1, seed=9)[0]

    def loss(c):
        apart = jax.tree.map(jnp.subtract, trees.combine(c, many), target)
        return 0.5 * trees.dot(apart, apart)

    c = np.array([0.5, -0.25, 1.5])
    grad = (jax.jit(jax.grad(loss)) if jit else jax.grad(loss))(jnp.asarray(c, jnp.float32))
    vectors = [
        np.concatenate([x.ravel().astype(np.float64) for x in jax.tree.leaves(t)]) for t in many
    ]
    goal = np.concatenate([x.ravel() for x in jax.tree.leaves(target)])
    apart = sum(k * v for k, v in zip(c, vectors, strict=True)) - goal
    np.testing.assert_allclose(grad, [apart @ v for v in vectors], rtol=1e-5)


def test_combine_refuses_other_numbers_of_coefficients_and_other_trees():
    many = _two_modules()
    with pytest.raises(ValueError, match=r"3 checkpoints need 3 coefficients, got shape \(2,\)"):
        trees.combine([0.5, 0.5], many)
    with pytest.raises(ValueError, match=r"3 coefficients for 'llm/\.\*'"):
        trees.combine({"llm/.*": [1.0], ".*": [1.0, 0, 0]}, many)
    with pytest.raises(ValueError, match=r"trees\[2\].*llm/w: \(2, 5\) in .*, \(7,\) in"):
        trees.combine([1, 0, 0], [*many[:2], many[2] | {"llm": {"w": np.zeros(7, np.float32)}}])


@laws
@given(families())
def test_interpolate_gives_each_end_bit_for_bit_in_the_dtype_of_the_base(family):
    many, _ = family
    base, tuned = many[0], many[-1]
    at_base = trees.flatten(trees.interpolate(base, tuned, 1.0))
    at_tuned = trees.flatten(trees.interpolate(base, tuned, 0.0))
    for path, leaf in trees.flatten(base).items():
        assert at_base[path].dtype == at_tuned[path].dtype == leaf.dtype
        np.testing.assert_array_equal(np.asarray(at_base[path]), leaf)
        ours = trees.flatten(tuned)[path].astype(np.float32).astype(leaf.dtype)
        np.testing.assert_array_equal(np.asarray(at_tuned[path]), ours)


@laws
@given(families(), st.floats(-0.5, 1.5))
def test_interpolate_weighs_the_base_by_the_merge_ratio(family, ratio):
    many, _ = family
    base, tuned = (trees.flatten(many[k]) for k in (0, -1))
    mixed = trees.flatten(trees.interpolate(many[0], many[-1], ratio))
    for path in base:
        assert_rounds_to(mixed[path], *exact((ratio, 1 - ratio), (base[path], tuned[path])))


def test_interpolate_at_three_tenths_is_numpys_number_and_takes_ratios_by_regex():
    base, tuned = _two_modules(2)
    for path, leaf in trees.flatten(trees.interpolate(base, tuned, 0.3)).items():
        start, end = (trees.flatten(t)[path].astype(np.float64) for t in (base, tuned))
        np.testing.assert_allclose(leaf, 0.3 * start + 0.7 * end, rtol=1e-6, atol=1e-7)
    mixed = trees.interpolate(base, tuned, {"llm/.*": 1.0, ".*": 0.0})
    np.testing.assert_array_equal(mixed["llm"]["w"], base["llm"]["w"])
    np.testing.assert_array_equal(mixed["out"]["w"], tuned["out"]["w"])


@laws
@given(families())
def test_base_plus_task_vector_is_the_finetuned(family):
    many, _ = family
    base, tuned = (trees.flatten(many[k]) for k in (0, -1))
    for path, vector in trees.flatten(trees.task_vector(many[0], many[-1])).items():
        assert vector.dtype == jnp.float32
        expected = tuned[path].astype(np.float32) - base[path].astype(np.float32)
        np.testing.assert_array_equal(np.asarray(vector), expected)


def test_dot_sums_bfloat16_in_float32():
    ones = {"a": jnp.ones(4096, jnp.bfloat16), "b": {"c": jnp.full((8,), 0.5, jnp.bfloat16)}}
    assert float(trees.dot(ones, ones)) == 4098.0  # a bfloat16 sum would stop at 256
    assert trees.num_params(ones) == 4104
    assert trees.nbytes(ones) == 2 * 4104
    shapes = {"a": jax.ShapeDtypeStruct((3, 2), jnp.float32), "b": np.zeros((), np.int8)}
    assert trees.nbytes(shapes) == 25


@laws
@given(flat_trees)
def test_flatten_and_unflatten_are_inverses(paths):
    flat = {"/".join(path): np.full(i, i) for i, path in enumerate(paths)}
    tree = trees.unflatten(flat)
    again = trees.flatten(tree)
    assert again.keys() == flat.keys()
    assert all(again[path] is flat[path] for path in flat)
    assert trees.unflatten(again) == tree


@pytest.mark.parametrize("order", [1, -1])
def test_a_path_is_not_a_leaf_and_a_branch_at_once(order):
    with pytest.raises(ValueError, match=r"'a/b(/c)?'"):
        trees.unflatten(dict([("a/b", 1), ("a/b/c", 2)][::order]))


def test_map_with_path_sees_paths_and_the_leaves_of_all_trees():
    a, b = {"x": {"y": 1}, "z": 2}, {"z": 20, "x": {"y": 10}}
    mapped = trees.map_with_path(lambda path, *leaves: (path, *leaves), a, b)
    assert mapped == {"x": {"y": ("x/y", 1, 10)}, "z": ("z", 2, 20)}


PATHS = ("img/head/kernel", "img/head/bias", "llm/w")


def test_the_first_rule_that_matches_a_whole_path_wins():
    rules = [(".*/bias", "b"), ("img/.*", "i"), (".*", "rest")]
    assert trees.match(rules, PATHS, what="test") == dict(
        zip(PATHS, ("i", "b", "rest"), strict=True)
    )
    only = trees.match([("llm/.*", 1)], PATHS, what="test", default=None)
    assert list(only.values()) == [None, None, 1]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("img/.*", 1)], r"freeze: no rule matches 'llm/w'"),
        ([("llm", 1), (".*", 2)], r"'llm' matches no parameter; the nearest path is 'llm/w'"),
        ([(".*", 1), ("llm/w", 2)], r"earlier rules take every parameter that 'llm/w' matches"),
    ],
)
def test_a_path_without_a_rule_and_a_rule_without_a_path_are_errors(rules, message):
    with pytest.raises(ValueError, match=message):
        trees.match(rules, PATHS, what="freeze")


def test_difference_names_keys_and_both_shapes_and_ignores_dtypes():
    a = {"x": np.zeros((2, 3)), "only_a": np.zeros(1), "same": np.zeros(4)}
    b = {"x": jax.ShapeDtypeStruct((3, 2), jnp.bfloat16), "only_b": np.zeros(()), "same": a["same"]}
    text = trees.difference(a, b, names=("left", "right"))
    assert text == (
        "only in left: only_a (1,); only in right: only_b (); x: (2, 3) in left, (3, 2) in right"
    )
    assert trees.difference(a, a) is None
    assert trees.difference(a, trees.cast(a, np.float16)) is None
    with pytest.raises(ValueError, match=re.escape(text)):
        trees.check_same(a, b, names=("left", "right"))


def test_difference_of_many_keys_says_how_many_more():
    a = {str(i): np.zeros(1) for i in range(9)}
    text = trees.difference(a, {}, names=("left", "right"))
    assert text.startswith("only in left: 0 (1,), 1 (1,)")
    more = int(re.search(r"and (\d+) more$", text)[1])
    assert text.count("(1,)") + more == 9


def test_cast_changes_floating_point_leaves_only():
    tree = {"w": np.ones(2, np.float32), "step": np.int32(3)}
    cast = trees.cast(tree, jnp.bfloat16)
    assert cast["w"].dtype == jnp.bfloat16
    assert cast["step"].dtype == np.int32


def test_fill_reports_what_was_loaded_left_fresh_and_ignored():
    initial = {
        "w": np.zeros(2, np.float32),
        "lora": {"a": np.full(1, 7.0, np.float32)},
        "b": np.zeros(3, np.float32),
    }
    loaded = {"b": np.arange(3, dtype=np.float16), "w": np.ones(2, np.float32), "old": np.ones(1)}
    filled = trees.fill(initial, loaded, may_miss=["lora/.*"])
    assert (sorted(filled.loaded), filled.fresh, filled.ignored) == (
        ["b", "w"],
        ["lora/a"],
        ["old"],
    )
    assert list(trees.flatten(filled.tree)) == ["w", "lora/a", "b"]
    np.testing.assert_array_equal(filled.tree["b"], [0, 1, 2])
    assert filled.tree["b"].dtype == np.float16  # its own
    assert filled.tree["lora"]["a"][0] == 7.0


def test_fill_refuses_what_is_missing_and_what_has_another_shape():
    initial = {"w": np.zeros(2), "lora": {"a": np.zeros(1)}}
    with pytest.raises(ValueError, match="lacks lora/a"):
        trees.fill(initial, {"w": np.ones(2)}, may_miss=["lora"])  # a whole path is to match
    with pytest.raises(ValueError, match=r"w: \(2,\) in the model, \(3,\) in the checkpoint"):
        trees.fill(initial, {"w": np.ones(3)}, may_miss=["lora/a"])
