"""Folders of tensorflow-datasets: episodes of RLDS in TFRecord files, read without TensorFlow.

A folder NAME/VERSION holds dataset_info.json (splits, how many episodes each shard has, what shards
are called), features.json, and the shards NAME-SPLIT.tfrecord-00000-of-00008.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from policymix import files
from policymix.data import examples, features, tfrecord

INFO, FEATURES = "dataset_info.json", "features.json"
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
_AGAIN = "copy or download the dataset again"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of a split: its path, the number of its first episode, and how many it has."""

    path: pathlib.Path
    first: int
    num_episodes: int


def find(path: str | os.PathLike) -> pathlib.Path | None:
    """The folder with dataset_info.json at `path`, or the only one below it; None if there is none.

    Raises:
      ValueError: there are several versions.
    """
    path = files.local(path)
    if (path / INFO).is_file():
        return path
    found = sorted(path.glob(f"*/{INFO}")) or sorted(path.glob(f"*/*/{INFO}"))
    if len(found) > 1:
        inside = [str(info.parent.relative_to(path)) for info in found]
        raise ValueError(f"{path} holds several datasets: {inside[:8]}; give the folder of one")
    return found[0].parent if found else None


class Builder:
    """A dataset of tfds.

    Args:
      path: its folder, or one that has only it below.

    Attributes:
      path: the folder with dataset_info.json; name, config, version: as it says, "" where it does
        not.
      features: {name: Leaf or the same again}, as features.json declares.
      splits: {split: its shards}.

    Raises:
      FileNotFoundError: there is none, or features.json is missing.
      ValueError: its description is not understood; names the file.
    """

    def __init__(self, path: str | os.PathLike):
        folder = find(path)
        if folder is None:
            where = files.local(path)
            inside = sorted(p.name for p in where.iterdir())[:8] if where.is_dir() else "nothing"
            raise FileNotFoundError(
                f"{where}: no {INFO} there, nor in a folder of it (found {inside}); give the "
                "folder of a dataset as tfds writes it, NAME/VERSION"
            )
        self.path = folder
        self.info = _read_info(folder / INFO)
        self.name, self.version = self.info["name"], str(self.info.get("version") or "")
        self.config = self.info.get("configName") or ""
        self.features = features.read_features(folder / FEATURES)
        self.splits = {split["name"]: _shards(self, split) for split in self.info["splits"]}

    def shards(self, split: str) -> list[Shard]:
        """The shards of a split, all there. ValueError for an unknown split, FileNotFoundError."""
        if split not in self.splits:
            raise ValueError(f"{self.path} has no split {split!r}; it has {sorted(self.splits)}")
        missing = [shard.path for shard in self.splits[split] if not shard.path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{missing[0]}: no such file ({len(missing)} of {len(self.splits[split])} shards "
                f"of {split!r} are missing); {_AGAIN}"
            )
        return self.splits[split]

    def num_episodes(self, split: str = "train") -> int:
        """How many episodes dataset_info.json counts."""
        return sum(shard.num_episodes for shard in self.shards(split))

    def episodes(
        self, split: str = "train", *, decode: bool = True, start: int = 0, stop: int | None = None
    ) -> Iterator[dict[str, Any]]:
        """Episodes `start`..`stop` of a split, shard after shard, one at a time in memory.

        Args:
          decode: whether pictures become pixels; else they are bytes.

        Yields:
          Nested dicts as tfds' `as_numpy` gives them: {"steps": {"observation": {…}, "action":
          [T, …], …}, "episode_metadata": {…}} of the declared dtypes, text as bytes, where the
          steps of a nested dataset are arrays with a leading axis [T]. Features of kinds that
          are not read are left out.

        Raises:
          FileNotFoundError, ValueError: a shard is missing, damaged, or has another number of
            episodes than dataset_info.json says; names file and episode.
        """
        end = self.num_episodes(split) if stop is None else stop
        pictures = "pixels" if decode else "bytes"
        for shard in self.shards(split):
            if shard.first + shard.num_episodes <= start or shard.first >= end:
                continue
            for record in records(shard):
                if start <= shard.first + record.number < end:
                    yield decode_record(self.features, record, shard, pictures)
                del record


def decode_record(
    tree: features.Tree, record: tfrecord.Record, shard: Shard, pictures: str = "pixels"
) -> dict[str, Any]:
    """An episode as `Builder.episodes` yields it, of features in `tree` alone; `pictures` as for
    features.decode. ValueError names file and episode.
    """
    try:
        keys = {leaf.key for leaf in features.leaves(tree)}
        return _decode(tree, examples.parse(record.data, keys), pictures)
    except ValueError as error:
        raise ValueError(f"{shard.path}, episode {shard.first + record.number}: {error}") from error


def _decode(tree: features.Tree, example: dict, pictures: str) -> dict[str, Any]:
    return {
        name: _decode(value, example, pictures)
        if isinstance(value, dict)
        else features.decode(value, example, pictures=pictures)
        for name, value in tree.items()
        if isinstance(value, dict) or value.kind in features.KINDS
    }


def nested(tree: dict[str, Any]) -> dict[str, Any]:
    """What each step has: the nested dataset "steps", or a flat episode itself."""
    return tree["steps"] if isinstance(tree.get("steps"), dict) else tree


def per_step(tree: features.Tree) -> dict[str, features.Leaf]:
    """{path in `nested`: leaf} of what every step has: of a flat episode, the sequences and the
    arrays whose first axis varies.
    """
    if nested(tree) is not tree:
        return {leaf.key.removeprefix("steps/"): leaf for leaf in features.leaves(tree["steps"])}
    return {
        leaf.key: leaf
        for leaf in features.leaves(tree)
        if leaf.lengths or (leaf.kind == "tensor" and leaf.shape[:1] == (None,))
    }


def at(tree: dict[str, Any], path: str) -> Any:
    """What is at a path; names may have "/" in them."""
    if path in tree:
        return tree[path]
    for name, value in tree.items():
        if isinstance(value, dict) and path.startswith(f"{name}/"):
            return at(value, path.removeprefix(f"{name}/"))
    raise KeyError(path)


def records(
    shard: Shard, bad: list[tfrecord.DamagedRecord] | None = None
) -> Iterator[tfrecord.Record]:
    """The records of a shard, checked, also their number.

    Args:
      bad: where damaged ones go; without it they are errors.

    Raises:
      ValueError: a damaged record, or another number of them than dataset_info.json says.
    """
    number = 0
    read = tfrecord.read(shard.path) if bad is None else tfrecord.read_on(shard.path, bad)
    for record in read:
        number = record.number + 1
        if number > shard.num_episodes:
            break
        yield record
        del record
    if bad:
        number = max(number, *(damaged.number + 1 for damaged in bad))
        if not bad[-1].go_on:  # the rest of the file is lost
            return
    if number != shard.num_episodes:
        more = "more" if number > shard.num_episodes else number
        raise ValueError(
            f"{shard.path} has {more} episodes, {INFO} says {shard.num_episodes}; {_AGAIN}"
        )


def _read_info(path: pathlib.Path) -> dict[str, Any]:
    info = files.read_json(path)
    splits = info.get("splits") if isinstance(info, dict) else None
    named = isinstance(splits, list) and all(isinstance(one, dict) for one in splits)
    if not named or not splits:
        raise ValueError(f"{path}: expected name and splits, found {str(info)[:200]}; {_AGAIN}")
    optional = [info[key] for key in ("version", "configName") if info.get(key)]
    for name in (info.get("name"), *(split.get("name") for split in splits), *optional):
        # They are parts of paths.
        if not (isinstance(name, str) and re.fullmatch(r"[\w.-]+", name) and name.strip(".")):
            raise ValueError(
                f"{path}: {name!r} is no name of a dataset, configuration, version or split: "
                f"expected letters, digits, '_', '-' and '.'; {_AGAIN}"
            )
    form = info.get("fileFormat") or "tfrecord"
    if form != "tfrecord":
        raise ValueError(
            f"{path}: fileFormat is {form}, and only tfrecord is read here; write the dataset "
            "again with tfds as tfrecord"
        )
    return info


def _shards(builder: Builder, split: dict[str, Any]) -> list[Shard]:
    where = f"{builder.path / INFO}, split {split.get('name')!r}"
    try:
        lengths = [int(n) for n in split["shardLengths"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: expected shardLengths, the episodes of each shard, found "
            f"{split.get('shardLengths')!r}; {_AGAIN}"
        ) from error
    template = split.get("filepathTemplate") or _TEMPLATE
    shards, first = [], 0
    for index, length in enumerate(lengths):
        name = _file_name(template, builder, split["name"], index, len(lengths), where)
        shards.append(Shard(builder.path / name, first, length))
        first += length
    return shards


def _file_name(
    template: str, builder: Builder, split: str, index: int, count: int, where: str
) -> str:
    digits = max(5, len(str(count)))
    values = {
        "DATASET": builder.name,
        "SPLIT": split,
        "FILEFORMAT": "tfrecord",
        "SHARD_INDEX": f"{index:0{digits}d}",
        "NUM_SHARDS": f"{count:0{digits}d}",
        "SHARD_X_OF_Y": f"{index:0{digits}d}-of-{count:0{digits}d}",
    }
    try:
        name = re.sub(r"\$?\{(\w+)\}", lambda match: values[match[1]], template)
    except KeyError as error:
        raise ValueError(f"{where}: filepathTemplate {template!r} has an unknown {error}") from None
    if pathlib.PurePath(name).is_absolute() or ".." in pathlib.PurePath(name).parts:
        raise ValueError(f"{where}: {name!r} leads out of the dataset's folder; it is refused")
    return name
