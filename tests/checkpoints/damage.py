"""What may befall a checkpoint: files cut, flipped, swapped, and fields that say what cannot be."""

import contextlib
import json
import pathlib
import struct

import tensorstore

from tests.checkpoints.samples import INDEX, KINDS, TORCH, files_in

JSON = ("_METADATA", ".zarray", "zarr.json", "process_0", "_CHECKPOINT_METADATA", "config.json")
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
