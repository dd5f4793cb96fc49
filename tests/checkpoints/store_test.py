"""Orbax checkpoints in every form that OpenPI and its users leave, and what we write ourselves."""

import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from policymix import trees
from policymix.checkpoints import assets, items, series, store
from policymix.transforms import normalize
from tests import oracle


def small_tree(seed=0, dtype=np.float32):
    """With a module that is itself called `value`, as in SigLIP's attention."""
    rng = np.random.default_rng(seed)
    shapes = {"attn/value/kernel": (2, 3), "attn/value/bias": (3,), "w": (5,), "scalar": ()}
    flat = {path: np.asarray(rng.standard_normal(s), dtype) for path, s in shapes.items()}
    return trees.unflatten(flat)


def assert_same(found, expected):
    found, expected = trees.flatten(found), trees.flatten(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert isinstance(found[path], np.ndarray)
        assert found[path].dtype == leaf.dtype, path
        assert found[path].tobytes() == leaf.tobytes(), path
        assert found[path].shape == leaf.shape, path


def write(step: pathlib.Path, item, **options) -> pathlib.Path:
    """Writes STEP/params as Orbax does with these options; nothing else."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(step / "params", item)
    return step


# Reading


@pytest.mark.parametrize("model", oracle.MODELS)
def test_openpis_own_checkpoint_reads_as_its_step_or_its_params(model):
    expected = json.loads((oracle.OPENPI / model / "meta.json").read_text())["leaves"]
    for path in (oracle.step(model, "base"), oracle.step(model, "base") / "params"):
        found = trees.flatten(store.load_params(str(path)))
        assert {key: [list(x.shape), str(x.dtype)] for key, x in found.items()} == expected
    assert_same(store.load_params(path), oracle.params(model))


def test_a_checkpoint_that_openpi_wrote_on_top_of_others_reads_as_its_own_values():
    assert_same(store.load_params(oracle.step("pi0", "var1")), oracle.params("pi0", "var1"))


@pytest.mark.parametrize("value_suffix", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_ocdbt": False}, {"use_zarr3": True}, {"use_ocdbt": False, "use_zarr3": True}],
    ids=["ocdbt", "files", "ocdbt-zarr3", "files-zarr3"],
)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_every_layout_of_orbax_reads_bit_for_bit(tmp_path, value_suffix, options, dtype):
    tree = small_tree(dtype=dtype)
    item = series.to_item(tree) if value_suffix else {"params": tree}
    step = write(tmp_path / "7", item, **options)
    assert not (step / "_CHECKPOINT_METADATA").exists()
    for path in (step, step / "params", tmp_path):  # tmp_path is a run with a single step
        assert_same(store.load_params(path), tree)


def test_params_are_read_and_never_the_raw_ones_of_train_state(tmp_path):
    step = write(tmp_path / "7", {"params": small_tree(0)})
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(step / "train_state", {"params": small_tree(1), "step": np.int32(7)})
    assert_same(store.load_params(step), small_tree(0))


def test_a_tree_that_ends_in_value_only_here_and_there_keeps_it(tmp_path):
    tree = {"a": {"value": np.ones(2, np.float32)}, "b": {"c": np.zeros(1, np.float32)}}
    assert_same(store.load_params(write(tmp_path / "7", {"params": tree})), tree)


def test_headers_tell_shapes_and_dtypes_without_the_data(tmp_path):
    step = write(tmp_path / "7", {"params": small_tree(dtype=jnp.bfloat16)})
    for file in sorted((step / "params").rglob("d/*"), key=lambda f: f.stat().st_size)[-1:]:
        file.write_bytes(b"")  # the data: opening is not to need it
    opened = trees.flatten(store.open_params(step))
    assert opened["attn/value/kernel"].shape == (2, 3)
    assert opened["attn/value/kernel"].dtype == jnp.bfloat16
    assert opened["scalar"].shape == ()


@pytest.mark.parametrize("use_zarr3", [False, True])
def test_a_chunk_that_is_gone_is_not_read_as_zeros(tmp_path, use_zarr3):
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=use_zarr3)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "7" / "params", {"params": small_tree()})
    assert_same(store.load_params(tmp_path / "7"), small_tree())
    chunks = [p for p in (tmp_path / "7/params").rglob("*") if p.parent.name.startswith("params.")]
    for chunk in (tmp_path / "7/params").glob("params.w/*"):
        if not chunk.name.startswith((".", "zarr")):
            shutil.rmtree(chunk) if chunk.is_dir() else chunk.unlink()
    assert chunks
    with pytest.raises(ValueError, match="cannot read 'w'"):
        store.load_params(tmp_path / "7")


def test_metadata_of_another_kind_is_named(tmp_path):
    step = write(tmp_path / "7", {"params": small_tree()})
    (step / "params" / "_METADATA").write_text('{"tree": 1}')
    with pytest.raises(ValueError, match="_METADATA does not describe an Orbax PyTree"):
        store.load_params(step)


def test_reading_casts_floating_point_leaves_on_request(tmp_path):
    tree = small_tree() | {"count": np.arange(3, dtype=np.int32)}
    found = store.load_params(write(tmp_path / "7", {"params": tree}), dtype=jnp.bfloat16)
    assert found["count"].dtype == np.int32
    np.testing.assert_array_equal(found["w"], tree["w"].astype(jnp.bfloat16))


# Writing


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
def test_what_is_saved_loads_bit_for_bit(tmp_path, dtype):
    store.save_params(small_tree(dtype=dtype), tmp_path / "out")
    assert_same(store.load_params(tmp_path / "out"), small_tree(dtype=dtype))


def test_what_is_saved_is_one_params_item_as_openpi_writes_it(tmp_path):
    tree = small_tree()
    store.save_params(tree, tmp_path / "out")
    kinds = json.loads((tmp_path / "out" / "_CHECKPOINT_METADATA").read_text())["item_handlers"]
    assert list(kinds) == ["params"]
    keys = json.loads((tmp_path / "out/params/_METADATA").read_text())["tree_metadata"]
    expected = {("params", *path.split("/"), "value") for path in trees.flatten(tree)}
    assert {tuple(k["key"] for k in entry["key_metadata"]) for entry in keys.values()} == expected
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "out" / "params")
    for path, leaf in trees.flatten(series.from_item(restored)).items():
        np.testing.assert_array_equal(leaf, trees.flatten(tree)[path])


def test_large_arrays_are_written_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(items, "_CHUNK", 4096)
    tree = {"w": np.arange(66 * 66, dtype=np.float32).reshape(66, 66)}
    store.save_params(tree, tmp_path / "out")
    assert_same(store.load_params(tmp_path / "out"), tree)
    leaf = store.open_params(tmp_path / "out")["w"]
    assert np.prod(leaf._array.chunk_layout.read_chunk.shape) * 4 <= 4096


def test_norm_stats_are_saved_beside_the_parameters(tmp_path):
    stats = {"state": normalize.NormStats(np.zeros(2), np.ones(2))}
    store.save_params(small_tree(), tmp_path / "out", stats, "org/robot")
    assert (tmp_path / "out/assets/org/robot/norm_stats.json").is_file()
    assert assets.norm_stats_of(tmp_path / "out")[0] == "org/robot"
    with pytest.raises(ValueError, match="norm_stats and asset_id go together"):
        store.save_params(small_tree(), tmp_path / "other", stats)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]  # nothing half-written stays


def test_an_existing_path_is_refused_and_left_as_it_was(tmp_path):
    store.save_params(small_tree(0), tmp_path / "out")
    with pytest.raises(FileExistsError, match="out exists"):
        store.save_params(small_tree(1), tmp_path / "out")
    assert_same(store.load_params(tmp_path / "out"), small_tree(0))


# What is wrong has a name


def _truncate(path: pathlib.Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_truncated_data_file_names_the_checkpoint_and_the_array(tmp_path):
    step = tmp_path / "1000"
    shutil.copytree(oracle.step("pi0", "base"), step)
    data = [p for p in (step / "params").rglob("*") if p.is_file() and p.parent.name == "d"]
    _truncate(max(data, key=lambda p: p.stat().st_size))
    with pytest.raises(ValueError, match=rf"{step}/params: cannot read '.*/.*'; .* damaged"):
        store.load_params(step)


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
def test_truncated_metadata_names_the_checkpoint(tmp_path, name):
    step = write(tmp_path / "7", {"params": small_tree()})
    _truncate(step / "params" / name)
    with pytest.raises(ValueError, match=str(step)) as caught:
        store.open_params(step)
    assert "\n" not in str(caught.value)


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        store.load_params(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=f"{tmp_path} is not a checkpoint: expected a step"):
        store.load_params(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="expected a safetensors header"):
        store.load_params(tmp_path)


def test_a_run_with_several_steps_needs_one_to_be_named(tmp_path):
    for step in (9, 10):
        write(tmp_path / str(step), {"params": small_tree(step)})
    with pytest.raises(ValueError, match=rf"holds the steps 9, 10; say which.*{tmp_path}/10"):
        store.load_params(tmp_path)


def test_an_item_without_the_key_params_is_refused(tmp_path):
    step = write(tmp_path / "7", {"weights": small_tree()})
    with pytest.raises(ValueError, match=r"under the key 'params', found the keys \['weights'\]"):
        store.load_params(step)
