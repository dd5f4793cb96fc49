"""Orbax arrays read from front to back: in slabs, as one stream, as several side by side."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from policymix.checkpoints import items, zarr
from tests import oracle


@pytest.fixture
def streamed(monkeypatch):
    """Every slab counts as large."""
    monkeypatch.setattr(zarr, "_HELD", 0)
    monkeypatch.setattr(zarr, "_PIECE", 64)


def content(shape=(6, 50, 8), dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def save(path: pathlib.Path, array, **options) -> zarr.ZarrLeaf:
    """Writes one array as Orbax does; returns its leaf."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(path, {"params": {"w": {"value": array}, "x": {"value": np.ones(3)}}})
    return items.open_item(path)["w"]


def sharded(array, *spec):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))


def read_in_blocks(leaf, size):
    out = np.empty(leaf.size, leaf.dtype)
    with leaf.opened() as reader:
        for start in range(0, leaf.size, size):
            reader.read(start, out[start : start + size])
    return out.reshape(leaf.shape)


@pytest.mark.parametrize("ocdbt", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [7, 1000])
def test_one_chunk_is_decoded_as_a_stream(tmp_path, streamed, ocdbt, dtype, size):
    leaf = save(tmp_path / "params", content(dtype=dtype), use_ocdbt=ocdbt)
    assert isinstance(leaf.reader(), zarr._Streams)
    assert (leaf.block, leaf.stretch) == (1, leaf.size)
    np.testing.assert_array_equal(read_in_blocks(leaf, size), content(dtype=dtype))


SPECS = [
    (None, None, "a"), (None, None, ("a", "b")), (None, "a"), (None, "b", "a"), ("a", None, "b"),
    ("a",), (("a", "b"),), (),
]  # fmt: skip


@pytest.mark.parametrize("piece", [64, 4096])  # rows are longer, and shorter, than a piece
@pytest.mark.parametrize("spec", SPECS)
def test_what_fsdp_split_is_read_however_it_was_split(tmp_path, streamed, monkeypatch, spec, piece):
    monkeypatch.setattr(zarr, "_PIECE", piece)
    array = content((8, 12, 68))
    leaf = save(tmp_path / "params", sharded(array, *spec))
    split = np.array(leaf.shape) > leaf._chunk
    assert split.any()
    # Along the first axis alone the chunks are slabs.
    assert isinstance(leaf.reader(), zarr._Streams) == bool(split[1:].any() and not split[0])
    for size in (300, 10_000):
        np.testing.assert_array_equal(read_in_blocks(leaf, size), array)


def test_streams_that_do_not_divide_the_array_are_read(tmp_path, streamed, monkeypatch):
    array = content((5, 70, 30))
    for axis, spec in enumerate([(5, 33, 30), (5, 70, 13), (5, 14, 13)]):
        item = tmp_path / str(axis)
        monkeypatch.setattr(items, "chunk_shape", lambda shape, itemsize, spec=spec: spec)
        writer = items.ItemWriter(item, {"w": (array.shape, array.dtype)})
        writer._arrays["w"].write(array).result()
        writer.finish()
        leaf = items.open_item(item)["w"]
        assert isinstance(leaf.reader(), zarr._Streams)
        for piece in (64, 4096):
            monkeypatch.setattr(zarr, "_PIECE", piece)
            np.testing.assert_array_equal(read_in_blocks(leaf, 1000), array)


def test_chunks_that_do_not_divide_the_array_are_read(tmp_path, monkeypatch):
    array = content((7, 11, 3))
    for chunk in (12, 40, 150):  # a row, some rows, more than one matrix
        monkeypatch.setattr(items, "_CHUNK", chunk * 4)
        writer = items.ItemWriter(tmp_path / str(chunk), {"w": (array.shape, array.dtype)})
        writer.write("w", 0, array.reshape(-1))
        writer.finish()
        leaf = items.open_item(tmp_path / str(chunk))["w"]
        assert leaf.block * 4 <= max(chunk * 4, 12)
        for size in (1, 17, 1000):
            np.testing.assert_array_equal(read_in_blocks(leaf, size), array)


@pytest.mark.parametrize("shape", [(10, 6), (3, 11, 2), (2, 3, 7, 5), (2, 3, 23)])
def test_blocks_may_be_written_in_any_order(tmp_path, monkeypatch, shape):
    monkeypatch.setattr(items, "_CHUNK", 64)
    array = content(shape)
    writer = items.ItemWriter(tmp_path / "item", {"w": (array.shape, array.dtype)})
    block = writer.block("w")
    for start in reversed(range(0, array.size, block)):
        writer.write("w", start, array.reshape(-1)[start : start + block])
    writer.finish()
    np.testing.assert_array_equal(items.open_item(tmp_path / "item")["w"].read(), array)


@pytest.mark.parametrize(
    ("shape", "itemsize", "expected"),
    [
        ((), 4, ()),
        ((3, 5), 4, (3, 5)),
        ((257_152, 2048), 4, (896, 2048)),  # a divisor
        ((18, 2, 2048, 16_384), 4, (1, 1, 128, 16_384)),
        ((18, 16_384, 2048), 2, (1, 2048, 2048)),
        ((3, 10_000_019), 4, (1, 2_097_152)),  # a prime is cut with a rest
        ((1, 256, 1152), 4, (1, 256, 1152)),
        ((0, 4), 4, (1, 4)),
    ],
)
def test_chunks_are_ranges_of_at_most_eight_mebibytes(shape, itemsize, expected):
    assert items.chunk_shape(shape, itemsize) == expected


def test_going_back_begins_again(tmp_path, streamed):
    leaf, array = save(tmp_path / "params", content()), content().reshape(-1)
    out = np.empty(4, np.float32)
    with leaf.opened() as reader:
        for start in (200, 8, 100):
            reader.read(start, out)
            np.testing.assert_array_equal(out, array[start : start + 4])


@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_a_stream_that_is_cut_names_the_item_and_the_key(tmp_path, streamed, keep):
    leaf = save(tmp_path / "params", content((40, 40, 10)))
    (span,) = leaf._grid.spans.values()
    with span.file.open("r+b") as file:
        file.truncate(span.offset + int(span.length * keep))
    with pytest.raises(ValueError, match=f"{tmp_path}/params: cannot read 'w'.*damaged"):
        leaf.read()


def test_a_stream_of_wrong_bytes_names_the_item_and_the_key(tmp_path, streamed):
    leaf = save(tmp_path / "params", content((40, 40, 10)))
    (span,) = leaf._grid.spans.values()
    with span.file.open("r+b") as file:
        file.seek(span.offset)
        file.write(b"\0" * 16)
    with pytest.raises(ValueError, match=f"{tmp_path}/params: cannot read 'w'"):
        leaf.read()


def test_openpis_own_checkpoint_streams(streamed):
    expected = oracle.params("pi0")["PaliGemma"]["llm"]["layers"]["mlp"]["gating_einsum"]
    path = "PaliGemma/llm/layers/mlp/gating_einsum"
    leaf = items.open_item(oracle.step("pi0", "base") / "params")[path]
    assert isinstance(leaf.reader(), zarr._Streams)
    np.testing.assert_array_equal(read_in_blocks(leaf, 10_000), expected)
