"""RLDS datasets for tests: those in tests/testdata/rlds, and what they were made with.

`python -m tests.data.rlds_support FOLDER` with tensorflow-datasets (4.9.10 and tensorflow 2.21 made
the committed ones) writes the datasets and what tfds reads from them, the golden arrays.
"""

import json
import pathlib
import shutil
import sys

import numpy as np

from policymix.data import examples, tfds, tfrecord

TESTDATA = pathlib.Path(__file__).parents[1] / "testdata" / "rlds"
SIDE = 20
LENGTHS = (5, 4, 6, 2, 5)
TEXTS = ("put the spoon in the pot", "", "öffne die Schublade", "close the drawer")
TEXTS = (*TEXTS, TEXTS[0])


def pack(path, arrays):
    """Arrays of numbers → one small .npz: a manifest, and all bytes."""
    manifest, blob = {}, b""
    for key, values in arrays.items():
        manifest[key] = [values.dtype.str, list(values.shape), len(blob)]
        blob += np.ascontiguousarray(values).tobytes()
    text = np.frombuffer(json.dumps(manifest).encode(), np.uint8)
    np.savez_compressed(path, manifest=text, data=np.frombuffer(blob, np.uint8))


def unpack(path):
    """{key: array} as `pack` was given them."""
    with np.load(path) as stored:
        manifest, blob = json.loads(stored["manifest"].tobytes()), stored["data"].tobytes()
    return {
        key: np.frombuffer(blob, dtype, int(np.prod(shape)), at).reshape(shape)
        for key, (dtype, shape, at) in manifest.items()
    }


def flattened(tree, prefix=""):
    """The leaves of nested dicts, as ("a/b", value)."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def plain(key, value):
    """A value as arrays of numbers: bytes, and rows of different lengths, become two."""
    value = np.asarray(value, object) if isinstance(value, bytes) else np.asarray(value)
    if value.dtype == object and value.size and isinstance(value.flat[0], bytes):
        lengths = np.array([len(item) for item in value.flat]).reshape(value.shape)
        return {
            f"{key}@bytes": np.frombuffer(b"".join(value.flat), np.uint8),
            f"{key}@lengths": lengths,
        }
    if value.dtype == object:
        rows = np.array([len(row) for row in value])
        return {f"{key}@flat": np.concatenate(list(value)), f"{key}@rows": rows}
    return {key: value}


def copied(name, folder):
    """A copy of a committed dataset, NAME/VERSION, that may be damaged."""
    return pathlib.Path(shutil.copytree(TESTDATA / name, folder / name)) / "1.0.0"


def shard(path, number=0, split="train"):
    """The path of a shard."""
    return sorted(path.glob(f"*-{split}.tfrecord-*"))[number]


def edit_json(path, change):
    """Applies `change` to what a JSON file holds."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def declared(tree):
    """Features as features.json has them: dicts, "text", "image", a class's name, or (dtype,
    *shape); "steps" are a nested dataset.
    """
    if isinstance(tree, dict):
        inside = {key: declared(value) for key, value in tree.items()}
        if "steps" in inside:
            feature = {"feature": inside["steps"]}
            inside["steps"] = {"pythonClassName": "x.Dataset", "sequence": feature}
        return {"pythonClassName": "x.FeaturesDict", "featuresDict": {"features": inside}}
    if isinstance(tree, tuple):
        dtype, *shape = tree
        tensor = {"dtype": dtype, "shape": {"dimensions": [str(n) for n in shape]}}
        return {"pythonClassName": "x.Tensor", "tensor": tensor}
    if tree == "image":
        shape = {"dimensions": ["-1", "-1", "3"]}
        return {"pythonClassName": "x.Image", "image": {"shape": shape}}
    return {"pythonClassName": f"x.{tree.title()}", tree: {}}


def written(folder, tree, episodes, name="made"):
    """A dataset of one shard whose records are `episodes`, {key: list of bytes, or an array}."""
    folder.mkdir(parents=True)
    (folder / tfds.FEATURES).write_text(json.dumps(declared(tree)))
    split = {"name": "train", "shardLengths": [str(len(episodes))]}
    (folder / tfds.INFO).write_text(json.dumps({"name": name, "splits": [split]}))
    with tfrecord.writing(folder / f"{name}-train.tfrecord-00000-of-00001") as writer:
        for episode in episodes:
            writer.write(examples.serialize(episode))
    return folder


def _scene(t, side, shift):
    y, x = np.mgrid[0:side, 0:side]
    image = np.stack([(x * 2 + shift) % 256, (y * 2 + 40) % 256, (x + y) % 256], -1)
    radius, place = side // 8, int(side * (0.2 + 0.05 * t)) % side
    rows = slice(side // 2 - radius, side // 2 + radius)
    image[rows, max(0, place - radius) : place + radius] = (200, 30, 30)
    return image.astype(np.uint8)


def build(folder, name, features, splits, num_shards):
    """Writes a dataset with tfds; returns its builder."""
    import tensorflow_datasets as tfds

    class Made(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features, description=name)

        def _split_generators(self, _):
            return {split: self._generate_examples(rows) for split, rows in splits.items()}

        def _generate_examples(self, rows):
            yield from enumerate(rows)

    Made.name = name
    made = Made(data_dir=str(folder))
    config = tfds.download.DownloadConfig(num_shards=num_shards)
    made.download_and_prepare(download_config=config)
    return made


def bridge_like(folder, side=SIDE, num_shards=2):
    """Nested episodes as in BridgeData V2: JPEG and PNG, two shards a split."""
    import tensorflow_datasets as tfds

    f = tfds.features
    flag, number = f.Scalar(dtype=np.bool_), f.Scalar(dtype=np.float32)
    steps = {
        "observation": {
            "image_0": f.Image(shape=(side, side, 3), encoding_format="jpeg"),
            "image_1": f.Image(shape=(side - 4, side, 3), encoding_format="png"),
            "state": f.Tensor(shape=(7,), dtype=np.float32),
        },
        "action": f.Tensor(shape=(7,), dtype=np.float32),
        "discount": number,
        "reward": number,
        "is_first": flag,
        "is_last": flag,
        "is_terminal": flag,
        "language_instruction": f.Text(),
        "language_embedding": f.Tensor(shape=(8,), dtype=np.float32),
    }
    metadata = {"file_path": f.Text(), "episode_id": f.Scalar(np.int32), "has_language": flag}
    features = f.FeaturesDict({"steps": f.Dataset(steps), "episode_metadata": metadata})
    rng = np.random.default_rng(0)

    def episode(n, length, text):
        state = np.cumsum(rng.normal(0, 0.02, (length, 7)), 0).astype(np.float32)
        state[:, 6] = rng.uniform(0, 1, length)
        action = rng.normal(0, 0.05, (length, 7)).astype(np.float32)
        action[:, 6] = rng.choice([0.0, 0.5, 1.0], length)
        rows = [
            {
                "observation": {
                    "image_0": _scene(t, side, 17 * n),
                    "image_1": _scene(t, side, 5 * n)[: side - 4],
                    "state": state[t],
                },
                "action": action[t],
                "discount": 1.0,
                "reward": float(t == length - 1),
                "is_first": t == 0,
                "is_last": t == length - 1,
                "is_terminal": t == length - 1,
                "language_instruction": text,
                "language_embedding": rng.normal(size=8).astype(np.float32),
            }
            for t in range(length)
        ]
        about = {"file_path": f"/raw/{n}/out.npy", "episode_id": n, "has_language": bool(text)}
        return {"steps": rows, "episode_metadata": about}

    train = [episode(n, *row) for n, row in enumerate(zip(LENGTHS, TEXTS, strict=True))]
    val = [episode(9, 3, "stack the blocks"), episode(10, 1, "stack the blocks")]
    return build(folder, "bridge_tiny", features, {"train": train, "val": val}, num_shards)


def flat(folder):
    """Episodes without a nested dataset, of everything that tfds stores in unusual ways."""
    import tensorflow_datasets as tfds

    f = tfds.features

    def pictures(shape, dtype, form):
        return f.Sequence(f.Image(shape=shape, dtype=dtype, encoding_format=form))

    def numbers(dtype, *shape):
        return f.Tensor(shape=(None, *shape), dtype=dtype)

    features = f.FeaturesDict(
        {
            "observation": {
                "image": pictures((12, 16, 3), np.uint8, "png"),
                "depth": pictures((12, 16, 1), np.uint16, "png"),
                "far": pictures((6, 8, 1), np.float32, "png"),
                "gray": pictures((12, 16, 1), np.uint8, "jpeg"),
                "state": numbers(np.float32, 3),
            },
            "action": numbers(np.float64, 2),
            "count": numbers(np.int64),
            "big": numbers(np.uint64),
            "small": numbers(np.int8),
            "done": numbers(np.bool_),
            "words": f.Sequence(f.Text()),
            "points": f.Sequence(f.Sequence(f.Tensor(shape=(2,), dtype=np.float32))),
            "packed": f.Sequence(f.Tensor(shape=(2, 3), dtype=np.float32, encoding="zlib")),
            "raw": f.Tensor(shape=(4,), dtype=np.int32, encoding="bytes"),
            "dynamic": f.Tensor(shape=(None, None), dtype=np.float32, encoding="zlib"),
            "label": f.ClassLabel(names=["a", "b"]),
            "language_instruction": f.Text(),
        }
    )
    rng = np.random.default_rng(1)

    def episode(n, length):
        depth = (np.arange(192).reshape(12, 16, 1) * 80).astype(np.uint16)
        far = [np.linspace(0.1, 2 + t, 48, dtype=np.float32) for t in range(length)]
        count = [-1, 0, 2**62, -(2**63), 2**63 - 1, 300, 127, 128]
        big = [0, 1, 2**63 + 5, 2**64 - 1, 7, 8, 9, 10]
        words = [b"", "wörd".encode(), b"\xff\x00", b"four", b"x", b"x", b"x", b"x"]
        return {
            "observation": {
                "image": [_scene(t, 16, 9 * n)[:12] for t in range(length)],
                "depth": [depth] * length,
                "far": [values.reshape(6, 8, 1) for values in far],
                "gray": [_scene(t, 16, 3 * n)[:12, :, :1] for t in range(length)],
                "state": rng.normal(size=(length, 3)).astype(np.float32),
            },
            "action": rng.normal(size=(length, 2)),
            "count": np.array(count[:length], np.int64),
            "big": np.array(big[:length], np.uint64),
            "small": np.array([-128, 127, -1, 0, 5, 6, 7, 8][:length], np.int8),
            "done": np.arange(length) == length - 1,
            "words": words[:length],
            "points": [rng.normal(size=(k % 3, 2)).astype(np.float32) for k in range(length)],
            "packed": [rng.normal(size=(2, 3)).astype(np.float32) for _ in range(length)],
            "raw": np.array([1, -2, 3, 2**31 - 1], np.int32),
            "dynamic": rng.normal(size=(length, n + 1)).astype(np.float32),
            "label": n % 2,
            "language_instruction": ["push it", "pull it"][n % 2],
        }

    rows = [episode(0, 5), episode(1, 1), episode(2, 8)]
    return build(folder, "flat_tiny", features, {"train": rows}, 1)


def read_by_tfds(builder, split):
    """Episodes of a split, {"a/b": value}, as tfds reads them; steps have a leading axis."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    for episode in builder.as_dataset(split=split, shuffle_files=False):
        found, rest = {}, dict(episode)
        if "steps" in rest:
            rows = [dict(flattened(tfds.as_numpy(step))) for step in rest.pop("steps")]
            for key, first in rows[0].items():
                values = [row[key] for row in rows]
                dtype = object if isinstance(first, bytes) else None
                found[f"steps/{key}"] = np.array(values, dtype)
        for key, value in flattened(rest):
            if isinstance(value, tf.RaggedTensor):
                found[key] = np.empty(value.shape[0], object)
                for number, row in enumerate(value):
                    found[key][number] = row.numpy()
            else:
                found[key] = value.numpy()
        yield found


def main(folder):
    folder.mkdir(parents=True)
    for builder in (bridge_like(folder), flat(folder)):
        arrays = {}
        for number, episode in enumerate(read_by_tfds(builder, "train")):
            for key, value in episode.items():
                if number and builder.name == "bridge_tiny" and "image" in key:
                    continue  # pictures are large
                for name, array in plain(f"{number}/{key}", value).items():
                    arrays[name] = array
        pack(folder / f"golden_{builder.name}_train.npz", arrays)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
