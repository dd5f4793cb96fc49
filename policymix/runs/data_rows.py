"""The rows of `make bench` that read data: ours, beside the least that any reader has to do.

Datasets are written on the spot: episodes of 14 numbers of state and of actions, one camera.
"""

import concurrent.futures
import dataclasses
import io
import pathlib
import tempfile
import tracemalloc
from collections.abc import Iterator

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from PIL import Image

from policymix import files, memory
from policymix.data import examples, lerobot, loader, tfrecord, writer
from policymix.runs.measurements import Row, apart, here, interleaved
from policymix.transforms import images

DIM, _HORIZON, _FPS = 14, 50, 30
_THREADS = 2


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much data a row reads.

    Attributes:
      episodes, frames: of the datasets with pictures, frames for each episode; of the RLDS one,
        four times as many episodes.
      pictures: read in one measurement. numbers: frames without pictures.
      large: frames of the dataset that is opened. batches: of 32.
    """

    episodes: int = 4
    frames: int = 120
    pictures: int = 480
    numbers: int = 200_000
    large: int = 1_000_000
    batches: int = 12


SIZES = {"data": Sizes()}


def items_row(sizes: Sizes) -> list[Row]:
    """States and chunks of 50 actions, without pictures, beside copying as many numbers."""
    with Temporary() as folder:
        path = _numbers(folder / "numbers", sizes.numbers, length=1000)
        chunks = loader.ActionChunks(lerobot.open_dataset(path), _HORIZON)
        order = np.random.default_rng(0).permutation(len(chunks)).reshape(-1, 250)
        actions = np.asarray(lerobot.open_dataset(path).column("action"))
        last = len(actions) - _HORIZON

        def ours():
            for batch in order:
                chunks.get(batch)

        def floor():
            for batch in order:
                np.stack([actions[i : i + _HORIZON] for i in np.minimum(batch, last)])

        row = Row("items with chunks of 50", *interleaved(here(ours), here(floor)))
    return [_rated(row, sizes.numbers, "frames")]


def picture_row(sizes: Sizes) -> list[Row]:
    """The same with a 96-pixel PNG each, beside decoding alone."""
    with Temporary() as folder:
        dataset = lerobot.open_dataset(pictured(folder / "pictures", sizes, (96, 96), "image"))
        chunks, frames = loader.ActionChunks(dataset, _HORIZON), dataset.frames("camera")
        order = _order(sizes, len(chunks))
        encoded = _stored(dataset)

        def ours():
            for batch in order:
                chunks.get(batch)
                frames.get(batch)

        def floor():
            for batch in order:
                for i in batch:
                    np.asarray(Image.open(io.BytesIO(encoded[i])))

        row = Row("items with a 96-px PNG", *interleaved(here(ours), here(floor)))
    return [_rated(row, order.size, "frames")]


def video_row(sizes: Sizes) -> list[Row]:
    """Frames of AV1 in random order, and runs of 32 frames, beside bare PyAV on the same file."""
    memory.keep_freed()  # as in training: a run of frames is 29 MB
    return [
        *_video_rows("96-px", (96, 96), sizes),
        *_video_rows("640 × 480", (480, 640), sizes),
    ]


def _video_rows(name: str, shape: tuple[int, int], sizes: Sizes) -> Iterator[Row]:
    with Temporary() as folder:
        dataset = lerobot.open_dataset(pictured(folder / "video", sizes, shape, "video"))
        frames, path = dataset.frames("camera"), dataset.clip("camera", 0)[0]
        order = np.random.default_rng(0).permutation(frames.num_frames)[: sizes.pictures // 2]
        runs = np.arange(frames.num_frames // 32 * 32).reshape(-1, 32)
        with av.open(str(path)) as container:
            container.streams.video[0].thread_count = 1
            random = (
                here(lambda: [frames.get([i]) for i in order]),
                here(lambda: _seek_each(container, order)),
            )
            yield Row(f"{name} video, random", *interleaved(*random))
        sequential = (
            here(lambda: [frames.get(run) for run in runs]),
            here(lambda: _decode_all(path, runs.size)),
        )
        yield Row(f"{name} video, in runs of 32", *interleaved(*sequential))


def batches_row(sizes: Sizes) -> list[Row]:
    """Batches of 32 × (a picture at 224, a chunk) by two threads, beside decoding and resizing."""
    with Temporary() as folder:
        dataset = lerobot.open_dataset(pictured(folder / "pictures", sizes, (256, 256), "image"))
        chunks, frames = loader.ActionChunks(dataset, _HORIZON), dataset.frames("camera")
        encoded = _stored(dataset)

        def order(step: int) -> np.ndarray:
            return loader.batch_indices(len(chunks), 32, 0, step)

        def batch(step: int):
            raw = chunks.get(order(step))
            return raw | {"images": images.resize_with_pad(frames.get(order(step)), 224, 224)}

        def alone(index: int) -> np.ndarray:
            picture = np.asarray(Image.open(io.BytesIO(encoded[index])))
            return images.resize_with_pad(picture, 224, 224)

        def ours():
            for _ in loader.ahead(batch, 0, sizes.batches, num_threads=_THREADS):
                pass

        def floor():
            with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
                for step in range(sizes.batches):
                    list(pool.map(alone, order(step).tolist(), chunksize=16))

        row = Row("batches of 32, two threads", *interleaved(here(ours), here(floor)))
    return [_rated(row, 32 * sizes.batches, "examples")]


def rlds_row(sizes: Sizes) -> list[Row]:
    """Episodes of JPEG at 224 pixels out of TFRecord, beside the decoder alone; in processes of
    their own, whose memory is then theirs.
    """
    with Temporary() as folder:
        path = _rlds(folder / "made" / "1.0.0", sizes)
        sides = (
            apart("policymix.runs.rlds_sides:read", str(path)),
            apart("policymix.runs.rlds_sides:decode", str(path)),
        )
        row = Row("RLDS episodes of JPEG", *interleaved(*sides))
    return [_rated(row, 4 * sizes.episodes * sizes.frames, "steps")]


def open_row(sizes: Sizes) -> list[Row]:
    """Opening a dataset of a million frames, beside reading its tables; what is then held."""
    with Temporary() as folder:
        path = _numbers(folder / "large", sizes.large, length=200)

        def floor():
            for name in ("meta/info.json", "meta/episodes/chunk-000/file-000.parquet"):
                if name.endswith("json"):
                    files.read_json(path / name)
                else:
                    pq.read_table(path / name, columns=["episode_index", "length"])

        row = Row(
            "opening a million frames",
            *interleaved(here(lambda: lerobot.open_dataset(path)), here(floor)),
        )
        tracemalloc.start()
        try:
            dataset = lerobot.open_dataset(path)
            held = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes()
        finally:
            tracemalloc.stop()
        note = f"{dataset.num_frames:,} frames in {dataset.num_episodes:,} episodes; "
    return [row._replace(note=f"{note}{held / 1e6:.1f} MB are held")]


def _rated(row: Row, count: int, what: str) -> Row:
    """With a note of how many per CPU second."""
    return row._replace(note=f"{count / row.ours.cpu:,.0f} {what} per CPU second")


def _order(sizes: Sizes, length: int) -> np.ndarray:
    """Positions in 0..length-1, [n, 32]."""
    positions = loader.drawn(length, 0, max(1, sizes.pictures // 32) * 32, 0)
    return positions.reshape(-1, 32)


def _seek_each(container, order: np.ndarray) -> None:
    """A frame at a time: back to the keyframe before it, and on to the frame."""
    stream = container.streams.video[0]
    ticks = 1 / (stream.time_base * stream.average_rate)
    for number in order.tolist():
        wanted = round(number * ticks)
        container.seek(wanted, stream=stream, backward=True)
        for frame in container.decode(stream):
            if frame.pts >= wanted:
                frame.to_ndarray(format="rgb24")
                break


def _decode_all(path: pathlib.Path, count: int) -> None:
    with av.open(str(path)) as container:
        container.streams.video[0].thread_count = 1
        for frame, _ in zip(container.decode(video=0), range(count), strict=False):
            frame.to_ndarray(format="rgb24")


class Temporary(tempfile.TemporaryDirectory):
    """A temporary directory as a path."""

    def __enter__(self) -> pathlib.Path:
        return pathlib.Path(super().__enter__())


def _vectors() -> dict[str, dict]:
    entry = {"dtype": "float32", "shape": [DIM], "names": None}
    return {"observation.state": entry, "action": entry}


def _numbers(path: pathlib.Path, num_frames: int, length: int) -> pathlib.Path:
    """A dataset without pictures; one data file, its episodes copies of one."""
    rng = np.random.default_rng(0)
    with writer.Writer(path, fps=_FPS, features=_vectors()) as opened:
        arrays = {k: rng.standard_normal((length, DIM), np.float32) for k in _vectors()}
        for _ in range(num_frames // length):
            opened.add_episode(arrays, "push")
    return path


def pictured(path: pathlib.Path, sizes: Sizes, shape: tuple[int, int], dtype: str):
    """A dataset with a camera that sees blocks move over a plane of colour."""
    rng = np.random.default_rng(0)
    camera = {"dtype": dtype, "shape": [*shape, 3], "names": ["height", "width", "channel"]}
    with writer.Writer(path, fps=_FPS, features=_vectors() | {"camera": camera}) as opened:
        for _ in range(sizes.episodes):
            arrays = {k: rng.standard_normal((sizes.frames, DIM), np.float32) for k in _vectors()}
            arrays["camera"] = np.stack(list(_scenes(rng, shape, sizes.frames)))
            opened.add_episode(arrays, "push")
    return path


def _scenes(rng, shape: tuple[int, int], count: int) -> Iterator[np.ndarray]:
    height, width = shape
    rows, columns = np.mgrid[:height, :width]
    plane = np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) % 256], -1)
    plane = plane.astype(np.uint8)
    places, colours = rng.integers(0, 2**16, (6, 2)), rng.integers(0, 256, (6, 3), np.uint8)
    for frame in range(count):
        scene = plane.copy()
        for place, colour in zip(places, colours, strict=True):
            y, x = (place + frame * 2) % (height - height // 6, width - width // 6)
            scene[y : y + height // 6, x : x + width // 6] = colour
        yield scene


def _stored(dataset: lerobot.Dataset) -> list[bytes]:
    """The encoded pictures of all frames."""
    columns = (pq.read_table(file, columns=["camera"])["camera"] for file in dataset.data_files)
    return [row["bytes"] for column in columns for row in column.to_pylist()]


def _rlds(path: pathlib.Path, sizes: Sizes) -> pathlib.Path:
    """A dataset as tfds writes it: an episode a record, its pictures JPEG of 224 pixels."""
    path.mkdir(parents=True)
    rng, shape = np.random.default_rng(0), (224, 224)
    with tfrecord.writing(path / "made-train.tfrecord-00000-of-00001") as opened:
        for _ in range(4 * sizes.episodes):
            pixels = _scenes(rng, shape, sizes.frames)
            action = rng.standard_normal(sizes.frames * DIM).astype(np.float32)
            example = {
                "steps/observation/image": [simplejpeg.encode_jpeg(x, 95) for x in pixels],
                "steps/action": action,
            }
            opened.write(examples.serialize(example))
    split = {"name": "train", "shardLengths": [str(4 * sizes.episodes)], "numBytes": "0"}
    split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    info = {"name": "made", "version": "1.0.0", "fileFormat": "tfrecord", "splits": [split]}
    files.write_json(path / "dataset_info.json", info)
    image = {"dtype": "uint8", "encodingFormat": "jpeg", "shape": _dimensions(*shape, 3)}
    tensor = {"dtype": "float32", "encoding": "none", "shape": _dimensions(DIM)}
    steps = _dictionary(
        observation=_dictionary(image=_feature("image_feature.Image", "image", image)),
        action=_feature("tensor_feature.Tensor", "tensor", tensor),
    )
    sequence = {"feature": steps, "length": "-1"}
    episode = _dictionary(steps=_feature("dataset_feature.Dataset", "sequence", sequence))
    files.write_json(path / "features.json", episode)
    return path


def _feature(name: str, kind: str, content: dict) -> dict:
    return {"pythonClassName": f"tensorflow_datasets.core.features.{name}", kind: content}


def _dictionary(**entries: dict) -> dict:
    return _feature("features_dict.FeaturesDict", "featuresDict", {"features": entries})


def _dimensions(*sizes: int) -> dict:
    return {"dimensions": [str(size) for size in sizes]}
