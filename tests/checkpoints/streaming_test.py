"""Mixing from disk: float64's number rounded once, kai0's sums, and the geometry of the inputs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policymix import trees
from policymix.checkpoints import jobs, provenance, safetensors, store, streaming
from policymix.mixing.objective import in_memory
from tests import oracle

NAMES = ("one", "two", "three")


@pytest.fixture
def written(tmp_path):
    """tree → its `store.open_params`, on disk."""

    def write(tree):
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        store.save_params(tree, path)
        return store.open_params(path)

    return write


def _trees(dtype, n=3, size=70_000):  # more than a block
    rng = np.random.default_rng(0)
    return [
        {"a": {"w": rng.standard_normal(size).astype(dtype)}, "b": np.asarray(k + 1, dtype)}
        for k in range(n)
    ]


def _exact(c, leaves):
    return sum(k * leaf.astype(np.float64) for k, leaf in zip(c, leaves, strict=True))


COEFFICIENTS = [0.5, 0.3, 0.2]


def test_float32_is_the_float64_sum_to_a_rounding(written):
    many = _trees(np.float32)
    mixed = streaming.combine([written(t) for t in many], COEFFICIENTS, NAMES).params
    exact = _exact(COEFFICIENTS, [t["a"]["w"] for t in many])
    size = _exact(COEFFICIENTS, [abs(t["a"]["w"]) for t in many])
    assert mixed["a"]["w"].dtype == np.float32
    assert np.all(np.abs(mixed["a"]["w"] - exact) <= 4 * np.finfo(np.float32).eps * size)
    np.testing.assert_allclose(mixed["b"], 1.7, rtol=1e-6)
    assert mixed["b"].shape == ()


def test_bfloat16_is_correctly_rounded_but_for_ties(written):
    many = _trees(jnp.bfloat16)
    opened, leaves = [written(t) for t in many], [t["a"]["w"] for t in many]
    for c in (COEFFICIENTS, [0.517, 0.291, 0.192]):  # sums of the former often lie half way
        mixed = streaming.combine(opened, c, NAMES).params["a"]["w"]
        exact = _exact(c, leaves)
        rounded = exact.astype(jnp.bfloat16)
        assert mixed.dtype == jnp.bfloat16
        slack = 4 * np.finfo(np.float32).eps * _exact(c, [abs(leaf) for leaf in leaves])
        assert np.all(abs(mixed - exact) <= abs(rounded - exact) + slack)
    assert np.mean(mixed == rounded) >= 0.997


def _tensors(directory, arrays):
    """Writes a safetensors file; returns its leaves."""
    directory.mkdir()
    safetensors.write(directory, arrays)
    return safetensors.open_tensors(directory / "model.safetensors")[0]


def _sink(directory, like):
    """A file in the making with the tensors of another, in their order."""
    directory.mkdir()
    shapes = {name: (leaf.shape, leaf.dtype) for name, leaf in like.items()}
    layout = safetensors.Layout((("model.safetensors", tuple(shapes)),), {}, index=False)
    return safetensors.TensorWriter(directory, shapes, layout)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_large_blocks_are_summed_as_small_ones(tmp_path, dtype):
    size = jobs.step(2, np.dtype(dtype)) + 5  # one call, and the rest of the next
    opened, rows, c = [], [], np.array([0.517, 0.483], np.float32)
    for k in range(2):
        rows.append(np.random.default_rng(k).standard_normal(size).astype(dtype))
        opened.append(_tensors(tmp_path / str(k), {"w": rows[k], "x": rows[k][:9]}))
    mixed = streaming.combine(opened, c, NAMES[:2]).params
    wide = [row.astype(np.float32) for row in rows]
    expected = (c[0] * wide[0] + c[1] * wide[1]).astype(dtype)
    assert mixed["x"].tobytes() == expected[:9].tobytes()
    # The compiled sum may round a product and its addition at once.
    assert np.mean(mixed["w"] == expected) > (0.5 if dtype == np.float32 else 0.999)
    exact = np.float64(c) @ np.stack(rows).astype(np.float64)
    rounding = np.finfo(np.float32).eps * np.abs(c[:, None] * np.stack(wide)).sum(0)
    if dtype == np.float32:
        assert np.all(np.abs(mixed["w"] - exact) <= 2 * rounding)


def test_distances_are_those_of_all_arrays_that_are_read_as_one(tmp_path):
    """A frozen tower in front, and a head that was trained."""
    rng, opened = np.random.default_rng(0), []
    for k in range(2):
        arrays = {"encoder": np.ones(2**20, np.float32), "head": rng.standard_normal(2**20)}
        opened.append(
            _tensors(tmp_path / str(k), {n: a.astype(np.float32) for n, a in arrays.items()})
        )
    dtypes = {name: leaf.dtype for name, leaf in opened[0].items()}
    with _sink(tmp_path / "mix", opened[0]) as sink:
        geometry = streaming.mix(opened, [0.5, 0.5], NAMES[:2], sink, dtypes)
    np.testing.assert_allclose(geometry.gram[1, 1], 2 * 2**20, rtol=0.1)
    np.testing.assert_allclose(geometry.square_norm, 2 * 2**20, rtol=0.1)


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [100, 200_000])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_arrays_that_are_read_as_one_are_named(tmp_path, dtype, size, bad):
    opened = []
    for k in range(2):
        arrays = {name: np.ones(size, dtype) for name in "abcd"}
        arrays["c"][[-1, 7]] = bad if k else 1.0
        arrays["d"][0] = bad if k else 1.0
        opened.append(_tensors(tmp_path / str(k), arrays))
    dtypes = {name: leaf.dtype for name, leaf in opened[0].items()}
    with _sink(tmp_path / "mix", opened[0]) as sink:
        (span,) = jobs.spans(dict.fromkeys("abcd", np.ones(2)), opened, dtypes, sink)
        assert [name for _, name in span.starts] == list("abcd")
        with pytest.raises(ValueError, match=r"two: 'c' holds [12] values that are NaN or inf"):
            streaming.mix(opened, [0.5, 0.5], NAMES[:2], sink, dtypes)


def test_arrays_are_read_as_one_only_where_they_are_mixed_alike(tmp_path):
    opened = []
    for name, kinds in (("one", "ffff"), ("two", "ffef")):
        arrays = {key: np.full(3, 2.0, kind) for key, kind in zip("abcd", kinds, strict=True)}
        opened.append(_tensors(tmp_path / name, arrays))
    dtypes = {name: leaf.dtype for name, leaf in opened[0].items()}
    groups = {"a": [0.5, 0.5], ".*": [1.0, 2.0]}
    with _sink(tmp_path / "mix", opened[0]) as sink:
        by_path = trees.coefficients_by_path(groups, list("abcd"), 2)
        spans = list(jobs.spans(by_path, opened, dtypes, sink))
        assert [span.path for span in spans] == list("abcd")
        streaming.mix(opened, groups, NAMES[:2], sink, dtypes)
        sink.finish()
    mixed, _ = safetensors.open_tensors(tmp_path / "mix" / "model.safetensors")
    assert [leaf.read().tolist() for leaf in mixed.values()] == [[2.0] * 3] + [[6.0] * 3] * 3


def test_streaming_and_trees_give_the_same_mix_also_by_groups(written):
    many = _trees(np.float32, size=100)
    groups = {"a/.*": [0.1, 0.2, 0.7], ".*": [1.0, -1.0, 1.0]}
    mixed = streaming.combine([written(t) for t in many], groups, NAMES).params
    for path, leaf in trees.flatten(trees.combine(groups, many)).items():
        np.testing.assert_allclose(trees.flatten(mixed)[path], leaf, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, {"a/w": "float32", "b": "float32"}),
        (np.dtype("float16"), {"a/w": "float16", "b": "float16"}),
        ({"a/w": jnp.bfloat16, "b": np.float32}, {"a/w": "bfloat16", "b": "float32"}),
    ],
)
def test_the_output_dtype_is_the_widest_or_the_one_asked_for(written, dtype, expected):
    opened = [written(_trees(kind, 1, 9)[0]) for kind in (jnp.bfloat16, np.float32)]
    mixed = streaming.combine(opened, [0.5, 0.5], NAMES, dtype=dtype).params
    assert {path: str(x.dtype) for path, x in trees.flatten(mixed).items()} == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_names_the_checkpoint_and_the_key(written, bad):
    many = _trees(np.float32, size=9)
    many[1]["a"]["w"][3] = bad
    opened = [written(t) for t in many]
    with pytest.raises(ValueError, match="two: 'a/w' holds 1 values that are NaN or infinite"):
        streaming.combine(opened, [1.0, 0.0, 0.0], NAMES)


def test_what_overflows_the_output_dtype_is_refused(written):
    opened = [written({"w": np.full(3, 1e30, np.float32)})]
    with pytest.raises(ValueError, match="the mix of 'w' does not fit into float16"):
        streaming.combine(opened, [1.0], NAMES[:1], dtype=np.dtype("float16"))


def test_the_number_of_coefficients_is_the_number_of_inputs(written):
    with pytest.raises(ValueError, match="1 checkpoints need 1 coefficients"):
        streaming.combine([written({"w": np.ones(1, np.float32)})], [0.5, 0.5], NAMES[:1])


def test_geometry_is_numpys_norms_and_cosines(written):
    rng = np.random.default_rng(1)
    base = {"a": rng.standard_normal(700), "b": rng.standard_normal((30, 10))}
    many = [base] + [
        {path: leaf + scale * rng.standard_normal(leaf.shape) for path, leaf in base.items()}
        for scale in (0.1, 0.3)
    ]
    many = [{path: leaf.astype(np.float32) for path, leaf in tree.items()} for tree in many]
    mixed = streaming.combine([written(t) for t in many], [0.2, 0.3, 0.5], NAMES)
    flat = np.stack([np.concatenate([x.ravel() for x in t.values()]).astype(float) for t in many])
    distance = np.linalg.norm(flat[:, None] - flat[None], axis=-1)
    found = provenance.geometry(mixed.gram, mixed.square_norm, base=0)
    np.testing.assert_allclose(found["distance"], distance, rtol=1e-5, atol=1e-3)
    relative = distance / np.linalg.norm(flat[0])
    np.testing.assert_allclose(found["relative_distance"], relative, rtol=1e-5, atol=1e-4)
    vectors = flat[1:] - flat[0]
    lengths = np.linalg.norm(vectors, axis=1)
    cosine = vectors @ vectors.T / np.outer(lengths, lengths)
    np.testing.assert_allclose(found["cosine"], cosine, atol=1e-4)


@functools.cache
def _opened(model, root):
    return [
        store.open_params(oracle.write(model, which, root / model)) for which in oracle.VARIANTS
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("variants")


@pytest.mark.parametrize("model", oracle.MODELS)
@pytest.mark.parametrize("method", ["average", "manual_532"])
def test_the_mix_is_kai0s_leaf_by_leaf(model, method, root):
    expected = oracle.kai0(model)["methods"][method]
    mixed = streaming.combine(_opened(model, root), expected["weights"], NAMES).params
    flat = trees.flatten(mixed)
    assert flat.keys() == expected["mixed_param_sums"].keys()
    for path, (total, size, dtype) in expected["mixed_param_sums"].items():
        leaf = flat[path].astype(np.float64)
        np.testing.assert_allclose(leaf.sum(), total, rtol=0, atol=1e-5 * size, err_msg=path)
        np.testing.assert_allclose(np.abs(leaf).sum(), size, rtol=1e-5, err_msg=path)
        assert str(flat[path].dtype) == dtype


def test_a_damaged_input_names_itself(tmp_path):
    store.save_params({"w": np.arange(50_000, dtype=np.float32)}, tmp_path / "broken")
    opened = store.open_params(tmp_path / "broken")
    for file in (tmp_path / "broken").rglob("d/*"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "broken"))):
        streaming.combine([opened], [1.0], ["broken"])


def test_one_input_with_coefficient_one_is_itself_bit_for_bit(written):
    tree = _trees(np.float32, 1)[0]
    mixed = streaming.combine([written(tree)], [1.0], NAMES[:1]).params
    assert jax.tree.all(jax.tree.map(np.array_equal, mixed, tree))


@pytest.mark.parametrize("groups", [None, ("a/.*", ".*")])
def test_an_objective_on_disk_is_that_in_memory(written, groups):
    rng = np.random.default_rng(0)
    many = [
        {"a": {"w": rng.standard_normal((30, 4)).astype(kind)}, "b": np.asarray(k, np.float32)}
        for k, kind in enumerate((np.float32, jnp.bfloat16, np.float32))
    ]
    goals = [rng.standard_normal((30, 4)).astype(np.float32) for _ in range(2)]

    def residual(params, batch, key):
        del key
        return jnp.sin(params["a"]["w"].astype(jnp.float32)) * (1 + params["b"]) - batch

    def loss(params, batch, key):
        return jnp.mean(residual(params, batch, key) ** 2), {}

    key = jax.random.key(0)
    held = in_memory(loss, many, goals, key, residual)
    flats = [trees.flatten(written(tree)) for tree in many]
    streamed = streaming.objective(loss, flats, goals, key, residual, names=NAMES)
    c = np.float32([0.2, 0.5, 0.3])
    c = c if groups is None else {group: c * (1 + i) for i, group in enumerate(groups)}
    for batch in (None, 1):
        np.testing.assert_allclose(held.value(c, batch), streamed.value(c, batch), rtol=1e-5)
        for one, other in zip(
            jax.tree.leaves(held.value_and_grad(c, batch)),
            jax.tree.leaves(streamed.value_and_grad(c, batch)),
            strict=True,
        ):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
        for one, other in zip(
            held.gauss_newton(c, batch), streamed.gauss_newton(c, batch), strict=True
        ):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)
