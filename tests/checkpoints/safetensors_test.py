"""Safetensors: what the reference implementation writes we read, what we write it reads, and what
is damaged is named.
"""

import json
import pathlib
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from policymix import trees
from policymix.checkpoints import leaves, store
from policymix.checkpoints import safetensors as ours
from tests import oracle

KINDS = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    found = {f"{k}.{s}": (rng.standard_normal((3, s)) * 9).astype(v) for k, v in KINDS.items()
             for s in (1, 7)}  # fmt: skip
    return found | {"scalar": np.array(3.5, np.float32), "empty": np.zeros((0, 4), np.float32)}


def read(path):
    tensors, layout = ours.open_tensors(path)
    return {name: leaf.read() for name, leaf in tensors.items()}, layout


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def test_what_the_reference_implementation_writes_is_read_bit_for_bit(tmp_path):
    safetensors.numpy.save_file(arrays(), tmp_path / "m.safetensors", {"format": "np"})
    found, layout = read(tmp_path / "m.safetensors")
    assert_same(found, arrays())
    assert layout.metadata == {"format": "np"}


def test_what_is_written_the_reference_implementation_reads(tmp_path):
    ours.write(tmp_path, arrays())
    found = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert_same(found, arrays())
    header = (tmp_path / "model.safetensors").read_bytes()
    assert struct.unpack("<Q", header[:8])[0] % 8 == 0  # so that arrays are aligned


def test_shards_keep_their_names_order_and_index(tmp_path):
    content, names = arrays(), list(arrays())
    layout = ours.Layout(
        (("model-00001-of-00002.safetensors", tuple(names[:5])),
         ("model-00002-of-00002.safetensors", tuple(names[5:]))), {"format": "pt"}, index=True,
    )  # fmt: skip
    ours.write(tmp_path, content, layout)
    index = tmp_path / "model.safetensors.index.json"
    found, again = read(index)
    assert_same(found, content)
    assert again.index
    assert [set(tensors) for _, tensors in again.shards] == [set(names[:5]), set(names[5:])]
    total = json.loads(index.read_text())["metadata"]["total_size"]
    assert total == sum(array.nbytes for array in content.values())
    assert ours.files_of(index) == [tmp_path / name for name, _ in layout.shards]


def test_a_range_is_read_in_place(tmp_path):
    ours.write(tmp_path, {"a": np.arange(100, dtype=np.int64), "b": np.ones(3)})
    leaf = ours.open_tensors(tmp_path / "model.safetensors")[0]["a"]
    out = np.empty(5, np.int64)
    with leaf.opened() as reader:
        for start in (95, 3):  # in any order
            reader.read(start, out)
            np.testing.assert_array_equal(out, np.arange(start, start + 5))


def _file(path: pathlib.Path, header: object, content: bytes = b"") -> pathlib.Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + content)
    return path


def _entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "content", "message"),
    [
        (b"{", b"", "header is not readable"),
        (b"[1]", b"", "not a JSON object"),
        (b"\xff\xfe", b"", "header is not readable"),
        (b"[" * 9000, b"", "header is not readable"),
        (b'{"a": 1, "a": 2}', b"", "a name occurs twice"),
        ({"a": 1}, b"", "entry of 'a' is not a tensor's"),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"", "entry of 'a'"),
        ({"a": _entry(shape=(-2,))}, b"", "entry of 'a'"),
        ({"a": _entry(shape=(True,))}, b"", "entry of 'a'"),
        ({"a": _entry(shape=(2.0,))}, b"", "entry of 'a'"),
        ({"a": _entry("F8_E4M3", (8,))}, b"x" * 8, "'a' has dtype F8_E4M3"),
        ({"a": _entry(shape=(3,))}, b"x" * 8, r"'a' is F32 \(3,\), 12 bytes, but has 8"),
        ({"a": _entry(shape=(2**61, 4))}, b"x" * 8, "but has 8"),
        ({"a": _entry()}, b"x" * 7, "has .* bytes, its header describes"),
        ({"a": _entry()}, b"x" * 9, "truncated or damaged"),
        ({"a": _entry(offsets=(4, 12))}, b"x" * 12, "'a' begins at byte 4"),
        ({"a": _entry(), "b": _entry(offsets=(4, 12))}, b"x" * 12, "'b' begins at byte 4"),
        ({"__metadata__": [1], "a": _entry()}, b"x" * 8, "'__metadata__' is"),
    ],
)
def test_a_damaged_header_is_named(tmp_path, header, content, message):
    path = _file(tmp_path / "m.safetensors", header, content)
    with pytest.raises(ValueError, match=message) as caught:
        ours.open_tensors(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x01", b"\xff" * 8, struct.pack("<Q", 99) + b"{}"])
def test_what_is_no_safetensors_file_is_told(tmp_path, content):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="expected a safetensors header.*truncated, damaged"):
        ours.open_tensors(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not readable JSON"),
        ("[]", "has no 'weight_map'"),
        ('{"weight_map": {}}', "has no 'weight_map'"),
        ('{"weight_map": {"a": "../m.safetensors"}}', "shards must be files beside"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "shards must be files beside"),
        ('{"weight_map": {"a": "..\\\\m.safetensors"}}', "shards must be files beside"),
        ('{"weight_map": {"a": 3}}', "shards must be files beside"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "names 1 shards that are not there"),
        ('{"weight_map": {"b": "model.safetensors"}}', "disagree about 2 tensors"),
    ],
)
def test_a_wrong_index_is_named(tmp_path, index, message):
    ours.write(tmp_path, {"a": np.ones(3)})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises((ValueError, OSError), match=message):
        store.open_checkpoint(tmp_path)


def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path):
    ours.write(tmp_path, {"a": np.ones(1000)})
    leaf = ours.open_tensors(tmp_path / "model.safetensors")[0]["a"]
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(400)
    with pytest.raises(ValueError, match="'a' ends early"):
        leaf.read()


def test_what_was_not_finished_is_not_overwritten(tmp_path):
    ours.write(tmp_path, {"a": np.ones(3)})
    with pytest.raises(FileExistsError):
        ours.write(tmp_path, {"a": np.ones(3)})


# π0 under PyTorch's names


@pytest.mark.parametrize("model", oracle.MODELS)
@pytest.mark.parametrize("naming", ["openpi", "lerobot", "lerobot_first"])
def test_a_policy_goes_to_pytorch_and_back_bit_for_bit(tmp_path, model, naming):
    ours.save_params(oracle.params(model), tmp_path / "out", naming)
    expected = trees.flatten(oracle.params(model))
    for found in (
        ours.load_params(tmp_path / "out", oracle.config(model)),
        store.load_params(tmp_path / "out"),
    ):
        assert_same(trees.flatten(found), expected)
    opened = store.open_checkpoint(tmp_path / "out")
    assert opened.format == naming


def test_another_model_is_refused_with_both_shapes(tmp_path):
    ours.save_params(oracle.params("pi0"), tmp_path / "out")
    with pytest.raises(ValueError, match="config.model and .*out are not the same architecture"):
        ours.load_params(tmp_path / "out", oracle.config("pi05"))
    with pytest.raises(ValueError, match="is an Orbax checkpoint"):
        ours.load_params(oracle.step("pi0", "base"), oracle.config("pi0"))


def test_unknown_architectures_have_names_and_no_tree(tmp_path):
    ours.write(tmp_path, {"conv.weight": np.ones((2, 3), np.float32)})
    opened = store.open_checkpoint(tmp_path)
    assert opened.format == "safetensors"
    assert list(opened.leaves) == ["conv.weight"]
    with pytest.raises(ValueError, match="not named as those of a π0"):
        store.load_params(tmp_path)


def test_a_sink_in_memory_takes_blocks(tmp_path):
    sink = leaves.Memory({"a": ((2, 3), np.dtype(np.float32))})
    with sink:
        sink.write("a", 3, np.ones(3, np.float32))
        sink.write("a", 0, np.zeros(3, np.float32))
    np.testing.assert_array_equal(sink.arrays["a"], [[0, 0, 0], [1, 1, 1]])
    assert jax.tree.leaves(sink.arrays)[0].dtype == np.float32
