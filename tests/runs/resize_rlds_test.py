import hashlib
import json
import pathlib
import resource
import subprocess
import sys

import numpy as np
import pytest

from policymix.data import examples, features, rlds, shards, tfds, tfrecord
from policymix.runs import resize_rlds
from tests.data import rlds_support as support

IMAGES = ("steps/observation/image_0", "steps/observation/image_1")


@pytest.fixture
def bridge(tmp_path):
    return support.copied("bridge_tiny", tmp_path)


def _examples(path, split="train"):
    for shard in tfds.Builder(path).shards(split):
        for record in tfrecord.read(shard.path):
            yield examples.parse(record.data)


def _plain(values):
    return values.tolist() if isinstance(values, examples.BytesList) else values.tobytes()


def test_pictures_are_resized_and_all_else_is_kept(bridge, tmp_path):
    target = resize_rlds.run(bridge, tmp_path / "out", size=16)
    assert target == tmp_path / "out" / "bridge_tiny" / "1.0.0"
    old, new = tfds.Builder(bridge), tfds.Builder(tmp_path / "out")
    for split in ("train", "val"):
        assert new.num_episodes(split) == old.num_episodes(split)
        for before, after in zip(_examples(bridge, split), _examples(target, split), strict=True):
            assert list(before) == list(after)
            for key in before.keys() - set(IMAGES):
                assert _plain(before[key]) == _plain(after[key]), key
        pairs = zip(old.episodes(split), new.episodes(split), strict=True)
        for before, after in pairs:
            for name in ("image_0", "image_1"):
                large = before["steps"]["observation"][name]
                small = after["steps"]["observation"][name]
                assert small.shape == (len(large), 16, 16, 3)
                wanted = np.stack([resize_rlds.resize(image, 16) for image in large])
                assert np.abs(small.astype(int) - wanted).mean() < 6  # JPEG of tiny pictures
    for leaf in (new.features["steps"]["observation"][n] for n in ("image_0", "image_1")):
        assert (leaf.shape, leaf.encoding) == ((16, 16, 3), "jpeg")
    for split in new.info["splits"]:
        stored = sum(len(r.data) for s in new.shards(split["name"]) for r in tfrecord.read(s.path))
        assert split["numBytes"] == str(stored)
    assert {p.name for p in target.iterdir()} == {
        *(p.name for p in bridge.iterdir()),
        resize_rlds.RESIZED,
    }


def test_only_the_pictures_declaration_changes(bridge, tmp_path):
    target = resize_rlds.run(bridge, tmp_path / "out", size=16)
    before = json.loads((bridge / tfds.FEATURES).read_text())
    after = json.loads((target / tfds.FEATURES).read_text())
    sizes = {IMAGES[0]: ([20, 20, 3], "jpeg"), IMAGES[1]: ([16, 20, 3], "png")}
    back = {key: {"shape": shape, "encoding": form} for key, (shape, form) in sizes.items()}
    assert features.redeclared(after, back) == before


def test_depth_is_left_and_grey_is_not(tmp_path, capsys):
    flat = support.copied("flat_tiny", tmp_path)
    target = resize_rlds.run(flat, tmp_path / "out", size=24)
    said = capsys.readouterr().out
    assert "observation/depth: left as it is" in said
    assert "observation/far: left as it is" in said
    pairs = zip(tfds.Builder(flat).episodes(), tfds.Builder(target).episodes(), strict=True)
    for before, after in pairs:
        length = len(before["action"])
        assert after["observation"]["image"].shape == (length, 24, 24, 3)
        assert after["observation"]["gray"].shape == (length, 24, 24, 1)
        for name in ("depth", "far", "state"):
            np.testing.assert_array_equal(after["observation"][name], before["observation"][name])
    assert (target / "label.labels.txt").read_text() == (flat / "label.labels.txt").read_text()


def test_masks_are_left(tmp_path, capsys):
    flat = support.copied("flat_tiny", tmp_path)
    content = json.loads((flat / tfds.FEATURES).read_text())
    change = {"observation/gray": {"shape": [12, 16, 1], "encoding": "png"}}
    (flat / tfds.FEATURES).write_text(json.dumps(features.redeclared(content, change)))
    target = resize_rlds.run(flat, tmp_path / "out", size=24)
    assert "observation/gray: left as it is (one channel that is not JPEG" in (
        capsys.readouterr().out
    )
    for before, after in zip(_examples(flat), _examples(target), strict=True):
        assert before["observation/gray"].tolist() == after["observation/gray"].tolist()


def test_configurations_do_not_replace_each_other(bridge, tmp_path):
    for name in ("one", "two"):
        support.edit_json(bridge / tfds.INFO, lambda c, name=name: c.update(configName=name))
        target = resize_rlds.run(bridge, tmp_path / "out", size=16)
        assert target == tmp_path / "out" / "bridge_tiny" / name / "1.0.0"
        assert tfds.Builder(target).num_episodes() == 5


# SHA-256 of the pixels that tf.io.decode_jpeg finds in what tf.io.encode_jpeg writes (2.21) of
# default_rng(quality).integers(0, 256, shape, uint8).
TENSORFLOWS = {
    (90, (37, 50, 3)): "e1d2302ed2eb5465",
    (95, (37, 50, 3)): "006cacf2e5fdf99b",
    (95, (64, 64, 1)): "abe369a25ba99fae",
    (100, (16, 16, 3)): "0d095514c80d95e3",
}


@pytest.mark.parametrize(("quality", "shape"), TENSORFLOWS)
def test_jpeg_is_tensorflows(quality, shape):
    image = np.random.default_rng(quality).integers(0, 256, shape, dtype=np.uint8)
    data = resize_rlds.encode(image, quality)
    found = features.picture(data, shape, np.dtype(np.uint8))
    said = hashlib.sha256(found.tobytes()).hexdigest()
    assert said.startswith(TENSORFLOWS[quality, shape])


def test_pictures_of_that_size_are_not_touched(bridge, tmp_path, capsys):
    target = resize_rlds.run(bridge, tmp_path / "out", size=20)
    assert f"{IMAGES[0]}: left as it is (of that size as JPEG already)" in capsys.readouterr().out
    for before, after in zip(_examples(bridge), _examples(target), strict=True):
        assert before[IMAGES[0]].tolist() == after[IMAGES[0]].tolist()
        assert before[IMAGES[1]].tolist() != after[IMAGES[1]].tolist()
    with pytest.raises(ValueError, match="no pictures to resize; .*of that size"):
        resize_rlds.run(target, tmp_path / "again", size=20)


def test_filter_is_lanczos_over_the_whole_support():
    """Against the definition: sinc(x) sinc(x / 3), as wide as the scale, normalised."""
    image = np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8)

    def weights(old, new):
        scale = old / new
        centres = (np.arange(new) + 0.5) * scale - 0.5
        x = (np.arange(old) - centres[:, None]) / max(scale, 1)
        found = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
        return found / found.sum(1, keepdims=True)

    for size in (16, 64):
        rows, columns = weights(37, size), weights(50, size)
        exact = np.einsum("ih,hwc,jw->ijc", rows, image.astype(float), columns)
        found = resize_rlds.resize(image, size)
        assert np.abs(found - np.clip(exact, 0, 255)).max() <= 0.51


@pytest.mark.parametrize("num_workers", [1, 2])
def test_any_number_of_workers_writes_the_same(bridge, tmp_path, monkeypatch, num_workers):
    monkeypatch.setattr(shards, "_SMALL", 0)
    one = resize_rlds.run(bridge, tmp_path / "one", size=16, num_workers=1)
    other = resize_rlds.run(bridge, tmp_path / "other", size=16, num_workers=num_workers)
    for path in one.iterdir():
        if path.name != resize_rlds.RESIZED:
            assert path.read_bytes() == (other / path.name).read_bytes(), path.name


def test_dry_run_writes_nothing(bridge, tmp_path, capsys):
    resize_rlds.run(bridge, tmp_path / "out", size=16, dry_run=True)
    assert not (tmp_path / "out").exists()
    said = capsys.readouterr().out
    assert "train: 5 episodes in 2 shards" in said
    assert "[16, 20, 3] png -> [16, 16, 3] jpeg, quality 95" in said


def test_one_split_alone(bridge, tmp_path):
    target = resize_rlds.run(bridge, tmp_path / "out", size=16, splits=["val"])
    assert tfds.Builder(target).splits.keys() == {"val"}
    with pytest.raises(ValueError, match="no split 'test'"):
        resize_rlds.run(bridge, tmp_path / "other", splits=["test"])


def test_existing_output_is_replaced_only_when_asked_and_ours(bridge, tmp_path):
    target = resize_rlds.run(bridge, tmp_path / "out", size=16)
    with pytest.raises(FileExistsError, match="pass --overwrite"):
        resize_rlds.run(bridge, tmp_path / "out", size=12)
    resize_rlds.run(bridge, tmp_path / "out", size=12, overwrite=True)
    assert json.loads((target / resize_rlds.RESIZED).read_text())["size"] == 12
    (target / resize_rlds.RESIZED).unlink()
    with pytest.raises(FileExistsError, match="not written by this command"):
        resize_rlds.run(bridge, tmp_path / "out", size=16, overwrite=True)
    with pytest.raises(ValueError, match="overlaps the input"):
        resize_rlds.run(bridge, bridge.parents[1], size=16, overwrite=True)


@pytest.mark.parametrize("options", [{"size": 0}, {"size": 5000}, {"quality": 0}, {"quality": 101}])
def test_wrong_sizes_are_refused(bridge, tmp_path, options):
    with pytest.raises(ValueError, match="size of 1..4096 pixels and a quality of 1..100"):
        resize_rlds.run(bridge, tmp_path / "out", **options)


def test_damaged_input_leaves_nothing(bridge, tmp_path):
    file = support.shard(bridge, 1)
    data = bytearray(file.read_bytes())
    data[500] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="00001-of-00002, record 0 .*checksum"):
        resize_rlds.run(bridge, tmp_path / "out", size=16)
    assert not list((tmp_path / "out").rglob("*.json"))
    assert list((tmp_path / "out" / "bridge_tiny").iterdir()) == []


def test_damaged_picture_names_episode_and_feature(bridge, tmp_path):
    file = support.shard(bridge)
    records = [record.data for record in tfrecord.read(file)]
    with tfrecord.writing(file) as writer:
        writer.write(records[0])
        length = len(examples.parse(records[1])[IMAGES[1]])
        writer.write(examples.replace(records[1], {IMAGES[1]: [b"\x89PNG"] * length}))
    with pytest.raises(ValueError, match="00000-of-00002, episode 1: feature '.*image_1'.*no pic"):
        resize_rlds.run(bridge, tmp_path / "out", size=16)


def test_full_disk_names_the_output(bridge, tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
        with pytest.raises(OSError, match="cannot write .*bridge_tiny"):
            resize_rlds.run(bridge, tmp_path / "out", size=64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert list((tmp_path / "out" / "bridge_tiny").iterdir()) == []


def test_a_killed_run_leaves_nothing_that_is_read(bridge, tmp_path):
    program = (
        "import os, signal, sys\n"
        "from policymix.runs import resize_rlds\n"
        "whole = resize_rlds.resize_shard\n"
        "def half(task):\n"
        "    if '00001' in task.target.name: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return whole(task)\n"
        "resize_rlds.resize_shard = half\n"
        "resize_rlds.run(sys.argv[1], sys.argv[2], size=16)\n"
    )
    command = [sys.executable, "-c", program, str(bridge), str(tmp_path / "out")]
    assert subprocess.run(command, capture_output=True).returncode == -9
    assert not rlds.is_dataset(tmp_path / "out" / "bridge_tiny" / "1.0.0")
    target = resize_rlds.run(bridge, tmp_path / "out", size=16)
    assert [path.name for path in target.parent.iterdir()] == ["1.0.0"]


def test_memory_is_that_of_few_copies_of_an_episode(bridge, tmp_path):
    image = examples.parse(next(tfrecord.read(support.shard(bridge))).data)[IMAGES[0]][0]
    tree = {"steps": {"image": "image", "text": "text"}}
    episode = {"steps/image": [bytes(image)] * 2, "steps/text": [bytes(20_000_000)] * 2}
    path = support.written(tmp_path / "made", tree, [episode] * 3)
    program = (
        "import sys; from policymix import memory; from policymix.runs import resize_rlds\n"
        "before = memory.peak_bytes()\n"
        "resize_rlds.run(sys.argv[1], sys.argv[2], size=8, num_workers=1)\n"
        "print(memory.peak_bytes() - before)"
    )
    command = [sys.executable, "-c", program, str(path), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[-1]) < 120e6  # three times an episode


@pytest.mark.slow
def test_tfds_opens_it_and_tensorflow_resizes_alike(bridge, tmp_path):
    reason = "needs the extra rlds"
    tf = pytest.importorskip("tensorflow", reason=reason)
    pytest.importorskip("tensorflow_datasets", reason=reason)
    import tensorflow_datasets

    resize_rlds.run(bridge, tmp_path / "out", size=16)
    opened = tensorflow_datasets.builder("bridge_tiny", data_dir=str(tmp_path / "out"))
    ours = tfds.Builder(tmp_path / "out").episodes()
    for mine, other in zip(ours, support.read_by_tfds(opened, "train"), strict=True):
        for key, wanted in other.items():
            found = dict(support.flattened(mine))[key]
            np.testing.assert_array_equal(found, wanted, err_msg=key)
    rng = np.random.default_rng(0)
    for shape in ((64, 64, 3), (480, 640, 3), (180, 320, 1)):
        image = rng.integers(0, 256, shape, dtype=np.uint8)
        theirs = tf.image.resize(image, (224, 224), method="lanczos3", antialias=True)
        theirs = tf.clip_by_value(tf.round(theirs), 0, 255).numpy().astype(int)
        off = np.abs(theirs - resize_rlds.resize(image, 224))
        assert off.max() <= 1
        assert off.mean() < 0.001
        for quality in (1, 75, 95, 100):
            wanted = tf.io.decode_jpeg(tf.io.encode_jpeg(image, quality=quality)).numpy()
            found = tf.io.decode_jpeg(resize_rlds.encode(image, quality)).numpy()
            np.testing.assert_array_equal(found, wanted)
    assert pathlib.Path(opened.data_dir) == tmp_path / "out" / "bridge_tiny" / "1.0.0"
