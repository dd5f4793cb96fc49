"""Damaged checkpoints, three hundred of them: each is refused in one line that names it, or is
mixed as the other readers of its format read the same bytes.

A format has a checksum or it has none: a flipped bit in plain numbers is a number. So the bar is
the `safetensors` library and tensorstore, which are asked about every mix that succeeds.
"""

import contextlib
import faulthandler
import json
import pathlib
import re
import shutil
import struct
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import tensorstore
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs import common
from policymix import memory, trees
from policymix.checkpoints import items, store, zarr
from policymix.reports import mixes
from policymix.runs import mix

SECONDS, BYTES = 5, 2**28  # what refusing or mixing a few kilobytes may take
JSON = ("_METADATA", ".zarray", "zarr.json", "process_0", "_CHECKPOINT_METADATA", "config.json")
INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def _few_words(monkeypatch):
    """The picture takes half a second, and a thread that hangs is to be seen."""
    monkeypatch.setattr(mixes, "draw", lambda *_: None)
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


# Valid checkpoints, small


def arrays(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    half = normal(6, 40).astype(ml_dtypes.bfloat16)
    found = {"a/w": normal(6, 20, 8), "a/b": normal(20), "half/w": half}
    return found | {"scalar": np.array(seed + 1, np.float32), "ids": np.arange(7, dtype=np.int32)}


def tensors(seed: int) -> dict[str, np.ndarray]:
    found = {name.replace("/", "."): array for name, array in arrays(seed).items()}
    found |= {"flag": np.array([True, False]), "empty": np.zeros((0, 4), np.float32)}
    return found | {"f16": np.full(3, seed, np.float16)}


def single(path: pathlib.Path, seed: int) -> None:
    safetensors.numpy.save_file(tensors(seed), path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text('{"type": "some"}')


def shards(path: pathlib.Path, seed: int) -> None:
    content, names = tensors(seed), list(tensors(seed))
    places = {}
    for k, part in enumerate((names[:3], names[3:]), 1):
        file = f"model-0000{k}-of-00002.safetensors"
        safetensors.numpy.save_file({n: content[n] for n in part}, path / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


def orbax(*, split: bool = False, **options):
    """As orbax-checkpoint writes it; with `split`, each matrix in four chunks, as of four hosts."""

    def write(path: pathlib.Path, seed: int) -> None:
        flat = arrays(seed)
        mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
        for name, array in flat.items() if split else ():
            if array.ndim > 1:
                spec = PartitionSpec(*[None] * (array.ndim - 2), "b", "a")
                flat[name] = jax.device_put(array, NamedSharding(mesh, spec))
        tree = trees.unflatten({f"{name}/value": array for name, array in flat.items()})
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
            checkpointer.save(path / "params", {"params": tree})

    return write


def own(path: pathlib.Path, seed: int) -> None:
    flat = arrays(seed)
    writer = items.ItemWriter(path / "params", {n: (x.shape, x.dtype) for n, x in flat.items()})
    for name, array in flat.items():
        writer.write(name, 0, array.reshape(-1))
    writer.finish_step(path)


KINDS = {
    "single": single,
    "shards": shards,
    "ocdbt": orbax(),
    "files": orbax(use_ocdbt=False),
    "split": orbax(split=True),
    "files-split": orbax(split=True, use_ocdbt=False),
    "zarr3": orbax(use_zarr3=True),
    "files-zarr3": orbax(use_ocdbt=False, use_zarr3=True),
    "own": own,
}
TORCH = ("single", "shards")


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """kind → a directory with two checkpoints, 0 and 1."""
    made = {}

    def make(kind: str) -> pathlib.Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            for seed in (0, 1):
                (made[kind] / str(seed)).mkdir()
                KINDS[kind](made[kind] / str(seed), seed)
        return made[kind]

    return make


# Damage


NASTY = [
    None, -1, 0, 1, 2**31, 2**40, 2**62, 2**63, 2**70, 10**400, 1.5, 1e308, float("nan"), "", "x",
    "../x", "/etc/passwd", "\ud800", "a\nb", "\0", [], {}, True, False, [[]], ["x"], {"x": 1},
    "<f2", "<f8", "<i4", ">f4", "|b1", "bfloat16", "<c8", "|S4", "<M8[ns]", "F64", "I32", "F8_E4M3",
    "int4", "float8_e4m3fn", "uint8", "zstd", "blosc", "gzip", [1], [2**40], [2**40] * 3, [1] * 70,
    [0, 0], "x" * 300, "lora_a", "None", "jax.Array",
]  # fmt: skip
HOPELESS = [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 6000, b"null", b"\0" * 100, b"[1e999]"]


def one_of(rng, things):
    return things[int(rng.integers(len(things)))]


def files_in(path: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p for p in path.rglob("*") if p.is_file())


def is_json(file: pathlib.Path) -> bool:
    return file.name in JSON or file.name == INDEX


def some_file(path, rng) -> pathlib.Path:
    """What describes and what holds arrays more often than what lies beside it."""
    found = files_in(path)
    telling = [p for p in found if is_json(p) or "." in p.name or p.parent.name in ("d", "0")]
    return one_of(rng, telling if telling and rng.integers(4) else found)


def truncated(path, sibling, rng):
    file = some_file(path, rng)
    file.write_bytes(file.read_bytes()[: int(rng.integers(file.stat().st_size + 1))])


def flipped(path, sibling, rng):
    file = some_file(path, rng)
    content = bytearray(file.read_bytes())
    end = len(content)
    if file.suffix == ".safetensors" and rng.integers(2):  # the header alone
        end = min(end, 8 + int.from_bytes(content[:8], "little"))
    for _ in range(one_of(rng, [1, 1, 2, 8]) if end else 0):
        content[int(rng.integers(end))] = int(rng.integers(256))
    file.write_bytes(content)


def removed(path, sibling, rng):
    some_file(path, rng).unlink()


def emptied(path, sibling, rng):
    some_file(path, rng).write_bytes(b"")


def swapped(path, sibling, rng):
    a, b = some_file(path, rng), some_file(path, rng)
    of_a, of_b = a.read_bytes(), b.read_bytes()
    a.write_bytes(of_b)
    b.write_bytes(of_a)


def copied_over(path, sibling, rng):
    some_file(path, rng).write_bytes(some_file(path, rng).read_bytes())


def mixed_up(path, sibling, rng):
    """A file of another checkpoint lies where one of this should."""
    file = some_file(path, rng)
    other = sibling / file.relative_to(path)
    if other.is_file():
        file.write_bytes(other.read_bytes())


def inserted(path, sibling, rng):
    file, garbage = some_file(path, rng), rng.bytes(int(rng.integers(1, 50)))
    content = file.read_bytes()
    at = int(rng.integers(len(content) + 1))
    file.write_bytes(content[:at] + garbage + content[at:])


def appended(path, sibling, rng):
    file = some_file(path, rng)
    file.write_bytes(file.read_bytes() + rng.bytes(int(rng.integers(1, 50))))


def no_file(path, sibling, rng):
    """A directory, or a link that leads nowhere, to itself, or out of the file's own directory."""
    file = some_file(path, rng)
    file.unlink()
    target = one_of(rng, [None, "nowhere", file.name, path])
    file.mkdir() if target is None else file.symlink_to(target)


def hopeless(path, sibling, rng):
    """JSON too deep, numbers too long, and other texts."""
    file, content = some_file(path, rng), one_of(rng, HOPELESS)
    if file.suffix == ".safetensors":
        content = struct.pack("<Q", len(content)) + content
    file.write_bytes(content)


def edited(value, rng):
    """JSON with one thing in it changed."""
    places = []

    def visit(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                visit(node[key])

    if isinstance(value, dict | list):
        visit(value)
    if not places or not rng.integers(30):
        return one_of(rng, NASTY)
    node, key = one_of(rng, places)
    old, what = node[key], int(rng.integers(8))
    if what == 0:
        del node[key]
    elif what == 1 and type(old) is int:
        node[key] = old + one_of(rng, [-1, 1, 8, -8, 100])
    elif what == 2 and type(old) is int:
        node[key] = old * 2 ** int(rng.integers(1, 60))
    elif what == 3 and isinstance(node, dict):
        node[one_of(rng, ["x", "", f"{key}x", f"../{key}", "__metadata__", "shape"])] = old
        del node[key]
    elif what == 4 and isinstance(node, dict):
        other = one_of(rng, list(node))
        node[key], node[other] = node[other], old
    elif what == 5 and isinstance(node, list):
        node.insert(int(rng.integers(len(node) + 1)), one_of(rng, NASTY))
    elif what == 6 and isinstance(old, list):
        old.extend(old[::-1])
        del old[: len(old) // 2 * int(rng.integers(2))]
    else:
        node[key] = one_of(rng, NASTY)
    return value


def edited_json(content: bytes, rng) -> bytes:
    return json.dumps(edited(json.loads(content), rng)).encode("utf-8", "surrogatepass")


def field(path, sibling, rng):
    """A field of JSON: in the header of a tensor file, in metadata, in the index."""
    found = [p for p in files_in(path) if is_json(p) or p.suffix == ".safetensors"]
    file = one_of(rng, found)
    content, head = file.read_bytes(), b""
    with contextlib.suppress(ValueError, RecursionError):  # it is damaged already
        if file.suffix == ".safetensors":
            end = 8 + int.from_bytes(content[:8], "little")
            head = edited_json(content[8:end], rng)
            file.write_bytes(struct.pack("<Q", len(head)) + head + content[end:])
        else:
            file.write_bytes(edited_json(content, rng))


def header_length(path, sibling, rng):
    file = one_of(rng, [p for p in files_in(path) if p.suffix == ".safetensors"])
    content, size = file.read_bytes(), file.stat().st_size
    length = int.from_bytes(content[:8], "little")
    told = [0, 1, length - 1, length + 1, size, size - 8, 2**32, 10**8, 2**40, 2**63, 2**64 - 1]
    file.write_bytes(struct.pack("<Q", one_of(rng, told)) + content[8:])


def database(path, sibling, rng):
    """What OCDBT holds under one of its keys, behind checksums that are right."""
    opened = tensorstore.KvStore.open(
        {"driver": "ocdbt", "base": {"driver": "file", "path": f"{path / 'params'}/"}}
    ).result()
    keys = opened.list().result()
    described = [key for key in keys if key.endswith((b".zarray", b"zarr.json"))]
    key = one_of(rng, described if rng.integers(2) else keys)
    content = bytearray(opened.read(key).result().value)
    if key in described:
        content, what = edited_json(bytes(content), rng), 4
    elif (what := int(rng.integers(6))) == 0:
        del content[int(rng.integers(len(content))) :]
    elif what == 1:
        content[int(rng.integers(len(content)))] ^= 1 << int(rng.integers(8))
    elif what == 2:
        content += rng.bytes(int(rng.integers(1, 99)))
    elif what == 3:
        content *= 2
    elif what == 4:
        content = opened.read(one_of(rng, keys)).result().value
    if what == 5:
        opened.delete_range(tensorstore.KvStore.KeyRange(key, key + b"\0")).result()
    else:
        opened.write(key, bytes(content)).result()


ANY = (
    flipped, field, truncated, inserted, field, removed, emptied, swapped, flipped, copied_over,
    mixed_up, appended, field, no_file, hopeless, flipped,
)  # fmt: skip


def damage(kind: str, seed: int, path: pathlib.Path, sibling: pathlib.Path, rng) -> str:
    ways = ANY
    if kind in TORCH:
        ways = (header_length, field, *ANY)
    elif (path / "params/manifest.ocdbt").exists():
        ways = (database, field, database, *ANY)
    way = ways[(seed + list(KINDS).index(kind)) % len(ways)]
    way(path, sibling, rng)
    return way.__name__


# What others read


def _read_shard(path: pathlib.Path) -> dict[str, np.ndarray]:
    if not (path / INDEX).exists():
        return safetensors.numpy.load_file(path / "model.safetensors")
    places = json.loads((path / INDEX).read_text())["weight_map"]
    files = {name: safetensors.numpy.load_file(path / name) for name in set(places.values())}
    return {tensor: files[name][tensor] for tensor, name in places.items()}


def _read_item(item: pathlib.Path, *, zarr3: bool) -> dict[str, np.ndarray]:
    found = {}
    for name in arrays(0):
        key, base = f"params.{name.replace('/', '.')}.value/", {"driver": "file"}
        kvstore = base | {"path": f"{item}/{key}"}
        if (item / "manifest.ocdbt").exists():
            base |= {"path": f"{item}/"}
            kvstore = {"driver": "ocdbt", "base": base, "path": key}
        spec = {"driver": "zarr3" if zarr3 else "zarr", "kvstore": kvstore}
        spec["fill_missing_data_reads"] = False
        found[name] = tensorstore.open(spec, read=True, open=True).result().read().result()
    return found


def by_others(kind: str, path: pathlib.Path) -> dict[str, np.ndarray]:
    if kind in TORCH:
        return _read_shard(path)
    return _read_item(path / "params", zarr3=kind.endswith("zarr3"))


def average(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if not (jnp.issubdtype(a.dtype, np.floating) and jnp.issubdtype(b.dtype, np.floating)):
        np.testing.assert_array_equal(a, b)
        return a
    dtype = np.dtype(jnp.promote_types(a.dtype, b.dtype))
    wide = np.promote_types(np.float32, dtype if dtype.itemsize == 8 else np.float32).type
    with np.errstate(all="ignore"):
        return (a.astype(wide) * wide(0.5) + b.astype(wide) * wide(0.5)).astype(dtype)


# The law


def state(path: pathlib.Path) -> dict:
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files_in(path)}


def check(kind: str, seed: int, original: pathlib.Path, root: pathlib.Path, monkeypatch) -> bool:
    """Damages a copy and mixes it with its sibling; returns whether that succeeded."""
    rng = np.random.default_rng([seed, list(KINDS).index(kind)])
    sibling, damaged = original / "0", root / f"damaged-{seed}"
    shutil.copytree(original / "1", damaged)
    how = f"{kind} {seed}, {damage(kind, seed, damaged, sibling, rng)}"
    monkeypatch.setattr(zarr, "_HELD", one_of(rng, [0, 2**25]))
    monkeypatch.setattr(zarr, "_PIECE", one_of(rng, [64, 2**20]))
    inputs, out = [str(damaged), str(sibling)], root / f"out-{seed}"
    before, began = (state(sibling), state(damaged)), time.monotonic()
    memory.reset_peak()
    held, error = memory.peak_bytes(), None
    try:
        mix.mix(common.get_config(), mix.Request(tuple(inputs[:: one_of(rng, [1, -1])]), out))
    except Exception as caught:
        error = caught
    assert time.monotonic() - began < SECONDS, how
    assert memory.peak_bytes() - held < BYTES, how
    assert (state(sibling), state(damaged)) == before, how
    assert not list(root.glob(".*")), how
    if error is None:
        expected, intact = by_others(kind, damaged), by_others(kind, sibling)
        found = by_others(kind if kind in TORCH else "own", out if kind in TORCH else out / "0")
        assert found.keys() == expected.keys() == intact.keys(), how
        for name, array in found.items():
            correct = average(expected[name], intact[name])
            assert (array.dtype, array.shape) == (correct.dtype, correct.shape), (how, name)
            assert array.tobytes() == correct.tobytes(), (how, name)
        return True
    assert not out.exists(), how
    assert type(error) is ValueError or isinstance(error, OSError), (how, repr(error))
    assert str(damaged) in str(error), (how, str(error))
    assert "\n" not in str(error), (how, str(error))
    assert len(str(error)) < 2000, (how, str(error))
    assert "tensorstore_spec" not in str(error), (how, str(error))
    return False


FAST, ALL = 7, 34  # of each of nine kinds


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_checkpoints_are_refused_or_read_as_others_read_them(
    kind, originals, tmp_path, monkeypatch
):
    for seed in range(FAST):
        check(kind, seed, originals(kind), tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_three_hundred_damaged_checkpoints_are_refused_or_read_as_others_read_them(
    kind, originals, tmp_path, monkeypatch
):
    mixed = [check(kind, k, originals(kind), tmp_path, monkeypatch) for k in range(FAST, ALL)]
    assert any(mixed)
    assert not all(mixed)


# What the mutations found first


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
