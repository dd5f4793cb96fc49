"""An index of an RLDS split, made in one pass over its shards: the numbers of all steps as arrays,
and where in the shards the bytes of every picture lie.

With it any step can be read at once, so that training shuffles the whole set, and needs no buffer
of decoded steps. The pass checks every checksum.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from policymix import files, metrics
from policymix.data import features, oxe, tfds, tfrecord
from policymix.data import shards as shards_lib

FORMAT = 2  # of the index, and of what oxe makes of trajectories
INDEX = "index.json"
_LARGEST = 256  # numbers a step: features with more are left out
_PLACES = ("language_instruction", "natural_language_instruction", "instruction")
UNLABELED, DAMAGED, EMPTY = "without an instruction", "damaged", "without a step"
_MADE = ("timestamp", "frame_index", "episode_index", "index", "task_index", oxe.INSTRUCTION)


@dataclasses.dataclass(frozen=True)
class Options:
    """What an index is made of.

    Attributes:
      path: the folder of the dataset. split: of it.
      standardize: a name in oxe.DATASETS, or "" for the features as they are.
      skip_unlabeled: whether episodes are left out none of whose steps has an instruction.
      skip_bad: whether damaged records are left out, rather than an error.
    """

    path: pathlib.Path
    split: str
    standardize: str
    skip_unlabeled: bool
    skip_bad: bool


@dataclasses.dataclass
class Part:
    """The index of a shard (n steps, e episodes).

    Attributes:
      columns: {feature: [n, ...]}.
      pictures: {camera: int64 [n, 2]}, where each begins in the shard's file, and its length.
      lengths: int64 [e], steps of each episode; numbers: int64 [e], its number in the split.
      instructions: sentences; instruction: int64 [n], which one a step has.
      left_out: {reason: numbers of episodes}.
      digest: of all records' lengths and checksums.
    """

    columns: dict[str, np.ndarray]
    pictures: dict[str, np.ndarray]
    lengths: np.ndarray
    numbers: np.ndarray
    instructions: list[str]
    instruction: np.ndarray
    left_out: dict[str, list[int]]
    digest: str


def index_shard(task: tuple[Options, features.Tree, tfds.Shard]) -> Part:
    """The index of a shard. ValueError, OSError: it is damaged; names the episode."""
    options, tree, shard = task
    tree = _needed(tree, bool(options.standardize))
    bad: list[tfrecord.DamagedRecord] = []
    digest, rows, sentences = hashlib.sha256(), [], {}
    left_out: dict[str, list[int]] = {}
    for record in tfds.records(shard, bad if options.skip_bad else None):
        digest.update(
            record.checksum.to_bytes(4, "little") + len(record.data).to_bytes(8, "little")
        )
        episode = shard.first + record.number
        steps, why = _steps(tree, record, shard, options)
        del record  # so that two never lie in memory
        if why:
            left_out.setdefault(why, []).append(episode)
            continue
        words = [bytes(word).decode("utf-8", "replace") for word in steps.pop(oxe.INSTRUCTION)]
        codes = [sentences.setdefault(word, len(sentences)) for word in words]
        rows.append((episode, len(codes), np.array(codes, np.int64), steps))
    lost = [shard.first + error.number for error in bad if error.go_on]
    if bad and not bad[-1].go_on:
        lost += range(shard.first + bad[-1].number, shard.first + shard.num_episodes)
    if lost:
        left_out.setdefault(DAMAGED, []).extend(lost)
    columns, pictures = _joined([row[3] for row in rows])
    return Part(
        columns,
        pictures,
        np.array([row[1] for row in rows], np.int64),
        np.array([row[0] for row in rows], np.int64),
        list(sentences),
        np.concatenate([row[2] for row in rows]) if rows else np.empty(0, np.int64),
        left_out,
        digest.hexdigest(),
    )


def _joined(rows: list[dict[str, np.ndarray]]) -> tuple[dict, dict]:
    """Episodes, one after another: (columns, pictures)."""
    joined = {key: np.concatenate([row[key] for row in rows]) for key in (rows[0] if rows else ())}
    pictures = {key: joined.pop(key) for key in list(joined) if key.startswith(oxe.IMAGES)}
    return joined, pictures


def _steps(
    tree: features.Tree, record: tfrecord.Record, shard: tfds.Shard, options: Options
) -> tuple[dict[str, np.ndarray], str]:
    """An episode as {feature: [T, ...]}, pictures as ranges of the shard's bytes, instructions as
    bytes, nothing of it a view of the record; or {} and why it is left out.
    """
    where = f"{shard.path}, episode {shard.first + record.number}"
    kept, _ = declared(tree)
    try:
        episode = tfds.decode_record(tree, record, shard, "ranges")
        steps = tfds.nested(episode)
        stored = {name: tfds.at(steps, path) for name, path in kept.items()}
        length = _common_length(stored, where)
    except ValueError:
        if not options.skip_bad:
            raise
        return {}, DAMAGED
    try:  # what is wrong from here on is not the record's damage
        if options.standardize:
            metadata = episode.get("episode_metadata", {})
            if why := oxe.find(options.standardize).refuses(steps, metadata):
                return {}, why
            found = oxe.standardize(options.standardize, steps, metadata)
        else:
            found = stored | {oxe.INSTRUCTION: _instructions(steps, episode, length)}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    length = _common_length(found, where)
    if options.skip_unlabeled and oxe.is_unlabeled(found[oxe.INSTRUCTION]):
        return {}, UNLABELED if length else EMPTY
    shift = np.array([record.offset, 0])
    return {
        key: values + shift if key.startswith(oxe.IMAGES) else np.array(values)
        for key, values in found.items()
    }, ""


def _common_length(found: dict[str, np.ndarray], where: str) -> int:
    lengths = {key: len(values) for key, values in found.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{where}: features have different numbers of steps: {lengths}")
    return next(iter(lengths.values()), 0)


def _needed(tree: features.Tree, standardized: bool) -> features.Tree:
    """The features that an index is made of: others need not be decoded."""
    leaves, (kept, _) = tfds.per_step(tree), declared(tree)
    keys = {leaves[path].key for path in kept.values()}

    def pruned(part: features.Tree) -> features.Tree:
        found = {
            name: pruned(value) if isinstance(value, dict) else value
            for name, value in part.items()
            if isinstance(value, dict)
            or value.key in keys
            or name in _PLACES
            or (standardized and value.is_text)
        }
        return {name: value for name, value in found.items() if value != {}}

    return pruned(tree)


def declared(tree: features.Tree) -> tuple[dict[str, str], dict[str, str]]:
    """What an index without standardisation has, by the leaves' paths: ({feature: path},
    {feature: why it is left out}).
    """
    kept, left = {}, {}
    for path, leaf in tfds.per_step(tree).items():
        name = path.replace("/", ".")
        if leaf.kind == "image":
            short = oxe.IMAGES + name.removeprefix("observation.")
            name = oxe.IMAGES + name if short in kept else short
        if leaf.is_text and path.rpartition("/")[2] in _PLACES:
            continue
        if why := _unfit(leaf):
            left[name] = why
        elif name in _MADE or "@" in name:
            left[name] = "its name is that of a column which is made here"
        elif leaf.kind != "image" and name.startswith(oxe.IMAGES):
            left[name] = "its name is that of pictures, and it is none"
        elif name in kept:
            left[path] = f"{kept[name]!r} has that name already"
        else:
            kept[name] = path
    return kept, left


def _unfit(leaf: features.Leaf) -> str:
    """Why a feature of steps cannot be in an index; "" for most."""
    shape = leaf.shape if leaf.lengths else leaf.shape[1:]
    if leaf.kind not in features.KINDS:
        return f"it is of the kind {leaf.kind}, which is not read"
    if leaf.is_text:
        return "it is text"
    if len(leaf.lengths) > 1:
        return "a step has a sequence of it"
    if leaf.kind == "image":
        return "" if leaf.dtype == np.uint8 else f"it is a picture of {leaf.dtype}"
    if None in shape:
        return "its shape varies"
    size = int(np.prod(shape))
    return f"a step has {size} numbers of it, more than {_LARGEST}" if size > _LARGEST else ""


def _instructions(steps: dict, episode: dict, length: int) -> np.ndarray:
    """Of each step, b"" where there is none; a number is none, whatever it is called."""
    odd = ""
    for place in (steps, steps.get("observation"), episode, episode.get("episode_metadata")):
        for name in _PLACES:
            value = place.get(name) if isinstance(place, dict) else None
            value = features.objects([value] * length) if isinstance(value, bytes) else value
            if not isinstance(value, np.ndarray) or value.dtype.kind != "O":
                continue
            if len(value) == length and all(isinstance(one, bytes) for one in value):
                return value
            odd = odd or f"{name!r} has {len(value)} entries for {length} steps"
    if odd:
        raise ValueError(f"{odd}; expected one text for the episode, or one for each step")
    return features.objects([b""] * length)


def signature(builder: tfds.Builder, options: Options) -> dict[str, Any]:
    """What an index depends on: while this is the same, it can be used again."""
    shards = [(shard.path.name, shard.path.stat()) for shard in builder.shards(options.split)]
    described = (builder.path / tfds.FEATURES).read_bytes()
    return {
        "format": FORMAT,
        "options": dataclasses.asdict(options) | {"path": str(options.path)},
        "features": hashlib.sha256(described).hexdigest(),
        "shards": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in shards],
        "episodes": [shard.num_episodes for shard in builder.shards(options.split)],
    }


def folder(builder: tfds.Builder, options: Options) -> pathlib.Path:
    """Where indices lie, beside the copies of remote files: named after the options, and behind
    that after the signature, so that whoever has an index open never reads that of other shards.
    """
    cache = files.local(os.environ.get("POLICYMIX_CACHE") or "~/.cache/policymix")
    named = json.dumps(dataclasses.asdict(options) | {"path": str(options.path)}, sort_keys=True)
    digest = hashlib.sha256(named.encode()).hexdigest()[:16]
    return cache / "rlds" / f"{builder.name}-{options.split}-{digest}"


def make(builder: tfds.Builder, options: Options, num_workers: int = 0) -> pathlib.Path:
    """The folder of an index, made now unless it is there and its shards have not changed.

    Raises:
      FileNotFoundError, ValueError: a shard is missing or damaged.
      OSError: the cache cannot be written, or has no room.
    """
    if not options.standardize and not declared(builder.features)[0]:
        raise ValueError(
            f"{builder.path / tfds.FEATURES}: no feature of steps that can be read, found "
            f"{[leaf.key for leaf in features.leaves(builder.features)][:20]}"
        )
    base = folder(builder, options)
    with _locked(base.with_name(f"{base.name}.lock")):  # another process may be making it now
        wanted = signature(builder, options)
        said = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
        place = base.with_name(f"{base.name}-{said}")
        if not _is_made(place, wanted):
            with files.whole_directory(place, overwrite=True) as partial:
                _write(partial, builder, options, wanted, num_workers)
            cut_off = base.parent.glob(f".{base.name}-*.partial-*")
            names = {path.name[1:].rpartition(".partial-")[0] for path in cut_off}
            names |= {path.name for path in base.parent.glob(f"{base.name}-*")}
            for name in names - {place.name}:
                files.remove(base.with_name(name))
    return place


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("a")
    except OSError as error:
        raise type(error)(
            f"{path.parent}: the index of a dataset cannot be written there "
            f"({files.reason(error)}); set POLICYMIX_CACHE to a folder where it can"
        ) from error
    with lock:  # the kernel lets go of it
        with contextlib.suppress(OSError):  # a disk without locks: the index is whole or absent
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_made(place: pathlib.Path, wanted: dict[str, Any]) -> bool:
    try:
        index = files.read_json(place / INDEX)
        sizes = {name: (place / name).stat().st_size for name in index["sizes"]}
        return index["signature"] == wanted and index["sizes"] == sizes
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write(
    partial: pathlib.Path,
    builder: tfds.Builder,
    options: Options,
    wanted: dict[str, Any],
    num_workers: int,
) -> None:
    shards = builder.shards(options.split)
    size = sum(row[1] for row in wanted["shards"])
    tasks = [(options, builder.features, shard) for shard in shards]
    names: dict[str, str] = {}
    steps_of, left_out, tasks_of = [], {}, {}
    digest = hashlib.sha256()
    what = f"indexing {builder.path} ({options.split})"
    with contextlib.ExitStack() as stack:
        shown = stack.enter_context(metrics.Progress(what, builder.num_episodes(options.split)))
        out: dict[str, _Column] = {}
        for number, part in enumerate(shards_lib.over(index_shard, tasks, num_workers, size)):
            digest.update(part.digest.encode())
            known = [tasks_of.setdefault(words, len(tasks_of)) for words in part.instructions]
            columns = part.columns | {"task_index": np.array(known, np.int64)[part.instruction]}
            for camera, ranges in part.pictures.items():
                columns[f"{camera}@offset"] = ranges[:, 0]
                columns[f"{camera}@length"] = ranges[:, 1].astype(np.int32)
            columns |= {"@length": part.lengths, "@number": part.numbers}
            for name, values in columns.items():
                if name not in out and len(part.lengths):
                    names[name] = f"{len(names):04d}.npy"
                    out[name] = stack.enter_context(_Column(partial / names[name], name, values))
                if len(part.lengths):
                    out[name].append(values, shards[number].path)
            steps_of.append(int(part.lengths.sum()))
            for why, episodes in part.left_out.items():
                left_out.setdefault(why, []).extend(sorted(episodes))
            shown.step(shards[number].num_episodes)
    content = {
        "signature": wanted,
        "columns": names,
        "sizes": {name: (partial / name).stat().st_size for name in names.values()},
        "steps": steps_of,
        "tasks": list(tasks_of),
        "left_out": left_out,
        "digest": digest.hexdigest(),
    }
    (partial / INDEX).write_text(json.dumps(content), encoding="utf-8")


class _Column:
    """An .npy file that grows; its header is written anew at the end."""

    def __init__(self, path: pathlib.Path, name: str, first: np.ndarray):
        self._name, self._dtype, self._shape = name, first.dtype, first.shape[1:]
        self._rows, self._file = 0, path.open("w+b")
        _header(self._file, self._dtype, (0, *self._shape))

    def append(self, values: np.ndarray, where: pathlib.Path) -> None:
        if values.dtype != self._dtype or values.shape[1:] != self._shape:
            raise ValueError(
                f"{where}: {self._name!r} is {values.dtype} {list(values.shape[1:])} a step, in "
                f"shards before it {self._dtype} {list(self._shape)}"
            )
        self._file.write(np.ascontiguousarray(values).data.cast("B") if values.size else b"")
        self._rows += len(values)

    def __enter__(self) -> "_Column":
        return self

    def __exit__(self, *_) -> None:
        self._file.seek(0)
        _header(self._file, self._dtype, (self._rows, *self._shape))
        self._file.close()


def _header(file: BinaryIO, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Numpy leaves room in a header for the first axis to grow."""
    description = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(
        file, {"descr": description, "fortran_order": False, "shape": shape}
    )
