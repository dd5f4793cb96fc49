"""What metadata claims is not taken on trust: what damaged checkpoints have taught."""

import json
import pathlib
import re
import shutil
import struct

import numpy as np
import pytest
import tensorstore

from configs import common
from policymix import memory
from policymix.checkpoints import store, zarr
from policymix.runs import mix
from tests.checkpoints.damage import HOPELESS
from tests.checkpoints.samples import INDEX, arrays, average

pytestmark = pytest.mark.usefixtures("few_words")


def edit(file: pathlib.Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def refused(path: pathlib.Path) -> str:
    """What reading a checkpoint says, which takes no memory to speak of."""
    memory.reset_peak()
    held = memory.peak_bytes()
    with pytest.raises(ValueError, match=str(path)) as caught:
        store.load_params(path)
    assert memory.peak_bytes() - held < 2**26
    return str(caught.value)


@pytest.mark.parametrize("held", [0, 2**25])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunks": [6, 2**36, 8]}, "chunks of .* for an array of"),  # would end the process
        ({"chunks": [6, 2**26, 8]}, "chunks of .* for an array of"),
        ({"shape": [6, 2**40, 8]}, "said to be float32 .* bytes, and all files together have"),
        ({"shape": [6, 2**26, 8]}, "said to be float32 .* bytes, and all files together have"),
        ({"shape": [6, 2**27, 8], "chunks": [6, 2**27, 8]}, "and all files together have"),
        ({"dtype": "<f2"}, "cannot read 'a/w'"),  # half of what is stored
        ({"dtype": "<f8"}, "cannot read 'a/w'"),
        ({"dtype": "<c8"}, "has dtype complex64"),
        ({"shape": [6, 20, 4], "chunks": [6, 20, 4]}, "cannot read 'a/w'"),
        ({"shape": [6, 10, 8]}, None),  # less of the chunk is asked for, and right
        ({"shape": [6, 20, 4]}, None),
    ],
)
def test_what_metadata_claims_is_not_taken_on_trust(
    fields, message, held, originals, tmp_path, monkeypatch
):
    monkeypatch.setattr(zarr, "_HELD", held)
    shutil.copytree(originals("files") / "1", tmp_path / "step")
    edit(tmp_path / "step/params/params.a.w.value/.zarray", **fields)
    if message is None:
        shape = tuple(slice(n) for n in fields["shape"])
        found = store.load_params(tmp_path / "step")["a"]["w"]
        np.testing.assert_array_equal(found, arrays(1)["a/w"][shape])
    else:
        assert re.search(message, refused(tmp_path / "step"))


def test_a_file_of_holes_is_not_held(tmp_path):
    """Its header and its length agree about a terabyte."""
    path, out = tmp_path / "in", tmp_path / "out"
    path.mkdir()
    entry = {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}
    head = json.dumps({"w": entry}).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + 2**40)
    with pytest.raises(ValueError, match=f"{path}.*'w' is said to be .* cannot be held"):
        store.open_checkpoint(path).leaves["w"].read()
    with pytest.raises(OSError, match=f"{out} needs up to 1,099,511.6 MB"):
        mix.mix(common.get_config(), mix.Request((str(path),), out))


@pytest.mark.parametrize(
    ("shape", "chunks"),
    [((6, 20, 8), (6, 32, 8)), ((6, 20, 8), (6, 20, 9)), ((6, 4, 8), (4, 3, 9))],
)
def test_chunks_larger_than_the_array_are_read(shape, chunks, originals, tmp_path, monkeypatch):
    """Other writers pad: what lies beyond the array is not part of it."""
    monkeypatch.setattr(zarr, "_HELD", 0)
    shutil.copytree(originals("files") / "1", tmp_path / "step")
    folder = tmp_path / "step/params/params.a.w.value"
    shutil.rmtree(folder)
    content = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    metadata = {"shape": shape, "chunks": chunks, "dtype": "<f4"}
    metadata["compressor"] = {"id": "zstd", "level": 1}
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder}/"}}
    tensorstore.open(spec | {"metadata": metadata, "create": True}).result().write(content).result()
    np.testing.assert_array_equal(store.load_params(tmp_path / "step")["a"]["w"], content)


@pytest.mark.parametrize("size", [1, 100])
def test_what_follows_a_chunk_is_not_read_as_its_end(size, originals, tmp_path, monkeypatch):
    """In OCDBT the next value lies behind it, and zstd takes frames that follow each other."""
    monkeypatch.setattr(zarr, "_HELD", 0)
    shutil.copytree(originals("own") / "1", tmp_path / "step")
    leaf = store.open_checkpoint(tmp_path / "step").leaves["a/w"]
    ((index, span),) = leaf._grid.spans.items()
    leaf._grid.spans[index] = span._replace(length=span.length - size)
    with pytest.raises(ValueError, match=f"{tmp_path}/step/params: cannot read 'a/w'"):
        leaf.read()


@pytest.mark.parametrize("name", ["an é", "100% #1?x=%41", "a:b;c"])
def test_a_path_of_any_letters_is_read_and_written(name, originals, tmp_path, monkeypatch):
    monkeypatch.setattr(zarr, "_HELD", 0)
    for seed in "01":
        shutil.copytree(originals("own") / seed, tmp_path / name / seed)
    inputs = tuple(str(tmp_path / name / seed) for seed in "01")
    mix.mix(common.get_config(), mix.Request(inputs, tmp_path / name / "out"))
    expected = average(arrays(0)["a/w"], arrays(1)["a/w"])
    np.testing.assert_array_equal(store.load_params(tmp_path / name / "out")["a"]["w"], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda keys: keys[0].update(key="\ud800"), "_METADATA does not describe"),
        (lambda keys: keys[1].update(key="ids"), "names 'params/ids/value' twice"),
        (lambda keys: keys[1].update(key=["a"]), "cannot read"),
        (lambda keys: keys.clear(), "expected one tree under the key 'params'"),
    ],
)
def test_keys_that_cannot_be_are_named(change, message, originals, tmp_path):
    shutil.copytree(originals("ocdbt") / "1", tmp_path / "step")
    file = tmp_path / "step/params/_METADATA"
    told = json.loads(file.read_text())
    change(told["tree_metadata"]["('params', 'scalar', 'value')"]["key_metadata"])
    file.write_text(json.dumps(told))
    assert message in refused(tmp_path / "step")


@pytest.mark.parametrize("content", HOPELESS)
@pytest.mark.parametrize("kind", ["ocdbt", "shards"])
def test_json_that_cannot_be_is_named(kind, content, originals, tmp_path):
    shutil.copytree(originals(kind) / "1", tmp_path / "step")
    file = tmp_path / "step" / (INDEX if kind == "shards" else "params/_METADATA")
    file.write_bytes(content)
    assert file.name in refused(tmp_path / "step")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"__metadata__": {"format": ["pt"]}}, "'__metadata__' is not what it should be"),
        ({"__metadata__": {"format": "\ud800"}}, "the safetensors header is not readable"),
        ({"\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, "is not readable"),
        ({"a": {"dtype": "\n\0", "shape": [0], "data_offsets": [0, 0]}}, "has dtype �"),
        ({"a": {"dtype": "F32", "shape": ["x" * 5000], "data_offsets": [0, 0]}}, "…"),
    ],
)
def test_headers_that_other_readers_refuse_are_refused(header, message, tmp_path):
    head = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head)
    assert message in refused(tmp_path)


@pytest.mark.parametrize("name", ["", "..", "mix.json", "x" * 300 + ".safetensors", "\ud800", "\0"])
def test_shards_have_names_of_tensor_files(name, originals, tmp_path):
    shutil.copytree(originals("shards") / "1", tmp_path / "step")
    edit(tmp_path / "step" / INDEX, weight_map={"a": f"{name}"})
    assert "'a' is said to lie in" in refused(tmp_path / "step")
