"""RLDS datasets with smaller pictures: every picture square, as JPEG, all else bit for bit."""

import concurrent.futures
import dataclasses
import functools
import io
import math
import pathlib
import shutil
from collections.abc import Sequence

import numpy as np
from PIL import Image

from policymix import files, metrics, processes
from policymix.data import examples, features, shards, tfds, tfrecord

RESIZED = "resized.json"
_THREADS_EACH = 4  # of a process: more do not find enough pictures of an episode at once


@dataclasses.dataclass(frozen=True)
class _Task:
    """A shard to be written: where from, where to, and how."""

    shard: tfds.Shard
    target: pathlib.Path
    leaves: tuple[features.Leaf, ...]
    size: int
    quality: int
    num_threads: int


def run(
    source: str | pathlib.Path,
    output: str | pathlib.Path,
    *,
    size: int = 224,
    quality: int = 95,
    splits: Sequence[str] = (),
    num_workers: int = 0,
    overwrite: bool = False,
    dry_run: bool = False,
) -> pathlib.Path:
    """Writes a dataset again, its pictures `size` x `size`.

    Pictures are stretched to a square, whatever their shape, with Lanczos' filter widened by the
    scale (so that nothing aliases), rounded, and stored as JPEG with halved colour: what
    rlds_dataset_mod's resize_and_jpeg_encode does for Octo, OpenVLA and open-pi-zero, whose
    policies expect it. Colour pictures of 8 bits are resized, and grey ones that are JPEG already;
    depth, and one channel that is not JPEG, which may be a mask, are left as they are, and so are
    pictures that have that size as JPEG already. The result is read by tfds as well:
    tfds.builder(NAME, data_dir=OUTPUT).

    Args:
      source: the folder of the dataset.
      output: the dataset is written to OUTPUT/NAME/VERSION, or OUTPUT/NAME/CONFIG/VERSION where it
        has a configuration; whole or not at all.
      size: side in pixels. quality: of the JPEG, 1..100; tfds writes 95.
      splits: those that are written; () for all.
      num_workers: processes; 0 for one per core. Each holds an episode as it is stored, and up to
        three times as it will be.

    Returns:
      The folder that was written.

    Raises:
      ValueError, OSError: bad arguments, damaged input, output that exists, or no room.
    """
    if not 1 <= size <= 4096 or not 1 <= quality <= 100:
        raise ValueError(
            f"expected a size of 1..4096 pixels and a quality of 1..100, got {size=}, {quality=}"
        )
    builder = tfds.Builder(files.local(source))
    chosen = list(splits) or list(builder.splits)
    parts = {split: builder.shards(split) for split in chosen}
    leaves, left = _chosen(builder, size)
    target = files.local(output) / builder.name / builder.config / builder.version
    files.check_apart(target, [builder.path])
    files.check_output(target, overwrite=overwrite, ours=lambda path: (path / RESIZED).is_file())
    stored = sum(shard.path.stat().st_size for part in parts.values() for shard in part)
    files.check_space(target, math.ceil(stored * _growth(leaves, size)))
    _say(builder, parts, leaves, left, size, quality, target)
    if dry_run:
        print("dry run: nothing was written")
        return target
    with files.whole_directory(target, overwrite=overwrite) as folder:
        num_bytes = _write(builder, parts, leaves, folder, size, quality, num_workers, stored)
        _describe(builder, leaves, num_bytes, folder, size, quality)
    print(f"written to {target}")
    return target


def _chosen(builder: tfds.Builder, size: int) -> tuple[tuple[features.Leaf, ...], dict[str, str]]:
    """Which features are resized; {key: why not} of other pictures. ValueError if there is none."""
    chosen, left = [], {}
    for leaf in features.leaves(builder.features):
        if leaf.kind != "image":
            continue
        grey = leaf.shape[-1] == 1
        if leaf.dtype != np.uint8 or leaf.shape[-1] not in (1, 3):
            left[leaf.key] = f"{leaf.shape[-1]} channels of {leaf.dtype}, which JPEG has not"
        elif grey and "depth" in leaf.key:
            left[leaf.key] = "depth, which JPEG would blur"
        elif grey and leaf.encoding.lower() != "jpeg":
            left[leaf.key] = "one channel that is not JPEG, perhaps a mask"
        elif leaf.shape[:2] == (size, size) and leaf.encoding == "jpeg":
            left[leaf.key] = "of that size as JPEG already"
        else:
            chosen.append(leaf)
    if not chosen:
        raise ValueError(
            f"{builder.path} has no pictures to resize"
            + "".join(f"; {key} is {why}" for key, why in left.items())
        )
    return tuple(chosen), left


def _growth(leaves: Sequence[features.Leaf], size: int) -> float:
    """How much larger the dataset may become, at most."""
    known = [math.prod(leaf.shape[:2]) for leaf in leaves if None not in leaf.shape]
    return max([size * size / area for area in known] or [1.0])


def _say(builder, parts, leaves, left, size: int, quality: int, target: pathlib.Path) -> None:
    for split, part in parts.items():
        print(f"{split}: {sum(s.num_episodes for s in part):,} episodes in {len(part)} shards")
    for leaf in leaves:
        old = f"{list(leaf.shape)} {leaf.encoding}".strip()
        print(f"  {leaf.key}: {old} -> {[size, size, leaf.shape[-1]]} jpeg, quality {quality}")
    for key, why in left.items():
        print(f"  {key}: left as it is ({why})")
    print(f"{builder.path} -> {target}")


def _write(
    builder: tfds.Builder,
    parts: dict[str, list[tfds.Shard]],
    leaves: tuple[features.Leaf, ...],
    folder: pathlib.Path,
    size: int,
    quality: int,
    num_workers: int,
    stored: int,
) -> dict[str, int]:
    """All shards. Returns {split: bytes of its records}."""
    every = [(split, shard) for split, part in parts.items() for shard in part]
    workers = min(num_workers or processes.num_cores(), len(every))
    threads = max(1, min(_THREADS_EACH, processes.num_cores() // workers))
    tasks = [
        _Task(shard, folder / shard.path.relative_to(builder.path), leaves, size, quality, threads)
        for _, shard in every
    ]
    num_bytes = dict.fromkeys(parts, 0)
    total = sum(shard.num_episodes for _, shard in every)
    with metrics.Progress(f"resizing {builder.path}", total) as shown:
        written = shards.over(resize_shard, tasks, num_workers, stored)
        for (split, shard), size_in_bytes in zip(every, written, strict=True):
            num_bytes[split] += size_in_bytes
            shown.step(shard.num_episodes)
    return num_bytes


def resize_shard(task: _Task) -> int:
    """Writes a shard; returns the bytes of its records."""
    with (
        concurrent.futures.ThreadPoolExecutor(task.num_threads) as pool,
        tfrecord.writing(task.target) as writer,
    ):
        for record in tfds.records(task.shard):
            try:
                writer.write(_resized(record.data, task, pool))
            except ValueError as error:
                episode = task.shard.first + record.number
                raise ValueError(f"{task.shard.path}, episode {episode}: {error}") from error
            del record  # so that two never lie in memory
        return writer.num_bytes


def _resized(data: bytes, task: _Task, pool: concurrent.futures.Executor) -> bytes:
    """An episode's record with its pictures made anew."""
    values, new = examples.parse(data, {leaf.key for leaf in task.leaves}), {}
    for leaf in task.leaves:
        key = f"{leaf.key}/ragged_flat_values" if len(leaf.lengths) > 1 else leaf.key
        if key not in values and leaf.optional:
            continue
        if not isinstance(values.get(key), examples.BytesList):
            raise ValueError(f"feature {leaf.key!r} holds no pictures; copy the dataset again")
        one = functools.partial(_one, leaf, task.size, task.quality)
        new[key] = list(pool.map(one, values[key]))
    return examples.replace(data, new)


def _one(leaf: features.Leaf, size: int, quality: int, data: memoryview) -> bytes:
    try:
        image = features.picture(data, leaf.shape, leaf.dtype)
    except ValueError as error:
        raise ValueError(f"feature {leaf.key!r}: {error}") from error
    return encode(resize(image, size), quality)


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [hh, ww, c] → uint8 [size, size, c], stretched, Lanczos (a = 3) with antialiasing.

    In floating point: Pillow's own way for colours cuts off what overshoots between its two
    passes, which moves hard edges by tens of grey levels. So it is within one of
    tf.image.resize(method="lanczos3", antialias=True), rounded.
    """
    if image.shape[:2] == (size, size):
        return image
    channels = [
        np.asarray(
            Image.fromarray(image[..., channel].astype(np.float32)).resize(
                (size, size), Image.Resampling.LANCZOS
            )
        )
        for channel in range(image.shape[-1])
    ]
    return np.clip(np.rint(np.stack(channels, axis=-1)), 0, 255).astype(np.uint8)


def encode(image: np.ndarray, quality: int) -> bytes:
    """uint8 [hh, ww, 1 or 3] → JPEG, colour at half the resolution, the pixels that TensorFlow's
    are decoded to.
    """
    # simplejpeg is faster, but takes the less exact transform for qualities below 96.
    grey, buffer = image.shape[-1] == 1, io.BytesIO()
    made = Image.fromarray(image[..., 0] if grey else image)
    made.save(buffer, "JPEG", quality=quality, subsampling=-1 if grey else 2)
    return buffer.getvalue()


def _describe(
    builder: tfds.Builder,
    leaves: Sequence[features.Leaf],
    num_bytes: dict[str, int],
    folder: pathlib.Path,
    size: int,
    quality: int,
) -> None:
    """Everything beside the shards: dataset_info.json and features.json as they are now."""
    every = {shard.path for part in builder.splits.values() for shard in part}
    for path in builder.path.iterdir():
        if path.is_file() and path not in every and ".tfrecord" not in path.name:
            shutil.copyfile(path, folder / path.name)
    splits = [
        {**split, "numBytes": str(num_bytes[split["name"]])}
        for split in builder.info["splits"]
        if split["name"] in num_bytes
    ]
    files.write_json(folder / tfds.INFO, {**builder.info, "splits": splits})
    changes = {
        leaf.key: {"shape": [size, size, leaf.shape[-1]], "encoding": "jpeg"} for leaf in leaves
    }
    declared = features.redeclared(files.read_json(builder.path / tfds.FEATURES), changes)
    files.write_json(folder / tfds.FEATURES, declared)
    files.write_json(
        folder / RESIZED, {"source": str(builder.path), "size": size, "quality": quality}
    )
