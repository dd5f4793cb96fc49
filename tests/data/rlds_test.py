import concurrent.futures
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from policymix.data import examples, frames, opening, oxe, rlds, rlds_index, shards, tfds, tfrecord
from tests.data import rlds_support as support

PRIMARY = "observation.images.primary"
LENGTHS = dict(enumerate(support.LENGTHS))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("POLICYMIX_CACHE", str(folder))
    return folder / "rlds"


@pytest.fixture
def bridge(tmp_path):
    return support.copied("bridge_tiny", tmp_path)


def _made(cache):
    return [path for path in cache.iterdir() if path.suffix != ".lock"]


def _whole(path=support.TESTDATA / "bridge_tiny", split="train"):
    """All steps of a split as the builder reads them, {feature: [N, ...]}."""
    found = {}
    for episode in tfds.Builder(path).episodes(split):
        for key, value in support.flattened(episode["steps"]):
            found.setdefault(key, []).append(value)
    return {key: np.concatenate(values) for key, values in found.items()}


def _change(path, change, number=0):
    """Rewrites the examples of a shard, with right checksums: change(episode number, features)."""
    file = support.shard(path, number)
    every = []
    for record in tfrecord.read(file):
        found = examples.parse(record.data)
        found = {k: v if isinstance(v, np.ndarray) else v.tolist() for k, v in found.items()}
        change(record.number, found)
        every.append(examples.serialize(found))
    with tfrecord.writing(file) as writer:
        for data in every:
            writer.write(data)


def _flip(path, number=0, byte=500):
    file = support.shard(path, number)
    data = bytearray(file.read_bytes())
    data[byte] ^= 1
    file.write_bytes(data)


def test_every_step_is_at_hand_as_it_is_stored():
    dataset = rlds.open_dataset(support.TESTDATA / "bridge_tiny")
    whole = _whole()
    assert (dataset.num_frames, dataset.num_episodes) == (22, 5)
    lengths = dataset.episode_to - dataset.episode_from
    assert sorted(lengths) == sorted(support.LENGTHS)
    names = {"observation.state": "observation/state", "action": "action", "reward": "reward"}
    names |= {"is_last": "is_last", "language_embedding": "language_embedding"}
    for name, key in names.items():
        np.testing.assert_array_equal(dataset.column(name), whole[key])
        feature = dataset.features[name]
        assert feature["dtype"] == whole[key].dtype.name
        assert feature["shape"] == (list(whole[key].shape[1:]) or [1])
    said = [dataset.tasks[n].encode() for n in dataset.column("task_index")]
    assert said == whole["language_instruction"].tolist()
    assert dataset.camera_keys == ["observation.images.image_0", "observation.images.image_1"]
    order = np.random.default_rng(0).permutation(22)
    for number in range(2):
        pictures = dataset.frames(f"observation.images.image_{number}")
        wanted = whole[f"observation/image_{number}"]
        np.testing.assert_array_equal(pictures.get(order), wanted[order])
        np.testing.assert_array_equal(pictures.all(), wanted)
        assert pictures.shape == wanted.shape[1:3]
        assert pictures.num_frames == 22


def test_columns_of_order_follow_from_the_episodes():
    dataset = rlds.open_dataset(support.TESTDATA / "bridge_tiny", fps=4)
    lengths = dataset.episode_to - dataset.episode_from
    np.testing.assert_array_equal(dataset.column("index"), np.arange(22))
    episodes = dataset.column("episode_index")
    np.testing.assert_array_equal(np.bincount(episodes), lengths)
    frame = np.concatenate([np.arange(n) for n in lengths])
    np.testing.assert_array_equal(dataset.column("frame_index"), frame)
    np.testing.assert_array_equal(dataset.column("timestamp"), (frame / 4).astype(np.float32))
    ends = np.flatnonzero(dataset.column("is_last"))
    np.testing.assert_array_equal(ends, dataset.episode_to - 1)
    frames.check_is_image(dataset, dataset.camera_keys[0])


def test_standardised_columns_are_those_of_oxe():
    dataset = rlds.open_dataset(support.TESTDATA / "bridge_tiny", "bridge_dataset")
    assert (dataset.fps, dataset.robot_type) == (5, "widowx")
    assert dataset.normalized == (True,) * 6 + (False,)
    found = [
        oxe.standardize("bridge_dataset", episode["steps"])
        for episode in tfds.Builder(support.TESTDATA / "bridge_tiny").episodes()
    ]
    for key in (oxe.STATE, oxe.ACTION):
        wanted = np.concatenate([one[key] for one in found])
        np.testing.assert_array_equal(dataset.column(key), wanted)
    for key in dataset.camera_keys:
        wanted = np.concatenate([one[key] for one in found])
        np.testing.assert_array_equal(dataset.frames(key).all(), wanted)
    assert dataset.num_frames == sum(support.LENGTHS) - 5
    assert dataset.camera_keys == [PRIMARY, "observation.images.secondary"]


def test_the_name_of_a_dataset_chooses_its_standardisation(bridge):
    support.edit_json(bridge / tfds.INFO, lambda c: c.update(name="bridge_dataset"))
    for path in list(bridge.glob("bridge_tiny-*")):
        path.rename(bridge / path.name.replace("tiny", "dataset"))
    dataset = opening.open_dataset(str(bridge))
    assert dataset.standardize == "bridge_dataset"
    assert dataset.fps == 5
    plain = rlds.open_dataset(bridge, None)
    assert plain.standardize == ""
    assert plain.fps == 0
    with pytest.raises(ValueError, match="how many steps it has in a second: give fps"):
        plain.column("timestamp")
    assert plain.fingerprint() != dataset.fingerprint()


def test_flat_episodes():
    dataset = rlds.open_dataset(support.TESTDATA / "flat_tiny")
    assert sorted(dataset.episode_to - dataset.episode_from) == [1, 5, 8]
    episodes = list(tfds.Builder(support.TESTDATA / "flat_tiny").episodes())
    for name in ("action", "count", "big", "small", "done", "packed"):
        wanted = np.concatenate([episode[name] for episode in episodes])
        np.testing.assert_array_equal(dataset.column(name), wanted)
    image = np.concatenate([episode["observation"]["image"] for episode in episodes])
    np.testing.assert_array_equal(dataset.frames("observation.images.image").all(), image)
    gray = np.concatenate([episode["observation"]["gray"] for episode in episodes])
    found = dataset.frames("observation.images.gray").all()
    np.testing.assert_array_equal(found, np.repeat(gray, 3, axis=-1))
    said = [dataset.tasks[n].encode() for n in dataset.column("task_index")]
    lengths = [len(episode["action"]) for episode in episodes]
    wanted = [
        e["language_instruction"] for e, n in zip(episodes, lengths, strict=True) for _ in range(n)
    ]
    assert said == wanted
    for name, why in (("points", "a sequence of it"), ("observation.images.far", "of float32")):
        with pytest.raises(ValueError, match=f"'{name}' is not in the index, since.*{why}"):
            dataset.column(name)


def test_unknown_names_are_explained():
    dataset = rlds.open_dataset(support.TESTDATA / "bridge_tiny")
    with pytest.raises(ValueError, match="no 'actions'; did you mean 'action'"):
        dataset.column("actions")
    with pytest.raises(ValueError, match="is pictures; the numbers"):
        dataset.column("observation.images.image_0")
    with pytest.raises(ValueError, match="no camera 'front'"):
        dataset.frames("front")
    with pytest.raises(ValueError, match="no standardisation is called 'bridg'"):
        rlds.open_dataset(support.TESTDATA / "bridge_tiny", "bridg")
    with pytest.raises(ValueError, match="no split 'test'"):
        rlds.open_dataset(support.TESTDATA / "bridge_tiny", split="test")
    with pytest.raises(
        ValueError, match="episode 0: the standardisation 'fractal20220817_data' does not fit"
    ):
        rlds.open_dataset(support.TESTDATA / "bridge_tiny", "fractal20220817_data")
    pictures = dataset.frames("observation.images.image_0")
    for index in (-1, 22):
        with pytest.raises(IndexError, match="frames 0..21"):
            pictures.get([index])


def test_folders_of_tfds_are_told_from_others(bridge, tmp_path):
    assert rlds.is_dataset(bridge)
    assert rlds.is_dataset(bridge.parent)
    assert not rlds.is_dataset(tmp_path / "absent")
    assert not rlds.is_dataset(support.TESTDATA.parent / "lerobot" / "pusht_v30_video")


def test_the_index_is_made_once_and_again_when_shards_change(bridge, cache, capfd):
    first = rlds.open_dataset(bridge)
    assert "indexing" in capfd.readouterr().err
    (folder,) = _made(cache)
    made = (folder / rlds_index.INDEX).stat().st_mtime_ns
    again = rlds.open_dataset(bridge)
    assert "indexing" not in capfd.readouterr().err
    assert (folder / rlds_index.INDEX).stat().st_mtime_ns == made
    assert first.fingerprint() == again.fingerprint()

    def louder(_, found):
        found["steps/reward"] = found["steps/reward"] + 7

    _change(bridge, louder)
    changed = rlds.open_dataset(bridge)
    assert changed.column("reward")[0] == 7
    assert changed.fingerprint() != first.fingerprint()
    (other,) = _made(cache)
    assert other != folder
    with pytest.raises(FileNotFoundError, match="indexed anew.*open the dataset again"):
        first.column("discount")  # not that of the other shards


def test_an_index_that_lost_a_part_is_made_again(bridge, cache):
    wanted = np.array(rlds.open_dataset(bridge).column("reward"))
    (folder,) = _made(cache)
    (folder / "0001.npy").unlink()
    np.testing.assert_array_equal(rlds.open_dataset(bridge).column("reward"), wanted)
    for path in folder.glob("*.npy"):
        path.write_bytes(path.read_bytes()[:-8])
    np.testing.assert_array_equal(rlds.open_dataset(bridge).column("reward"), wanted)


def test_a_cache_that_cannot_be_written_says_which_variable_to_set(bridge, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POLICYMIX_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="file/rlds: .*cannot be written.*set POLICYMIX_CACHE"):
        rlds.open_dataset(bridge)


def test_indexing_holds_one_episode_in_memory(tmp_path):
    tree = {"steps": {"image": "image", "state": ("float32", 7), "language_instruction": "text"}}
    blob = bytes(2_000_000)
    episode = {"steps/image": [blob] * 2, "steps/state": np.ones((2, 7))}
    episode["steps/language_instruction"] = [b"go"] * 2
    path = support.written(tmp_path / "made", tree, [episode] * 20)
    program = (
        "import sys; from policymix import memory; from policymix.data import rlds_index, tfds\n"
        "builder = tfds.Builder(sys.argv[1])\n"
        "options = rlds_index.Options(builder.path, 'train', '', False, False)\n"
        "(shard,), before = builder.shards('train'), memory.peak_bytes()\n"
        "part = rlds_index.index_shard((options, builder.features, shard))\n"
        "print(part.lengths.sum(), memory.peak_bytes() - before)"
    )
    command = [sys.executable, "-c", program, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    steps, grown = map(int, done.stdout.split())
    assert steps == 40
    assert grown < 30e6  # of 80 MB


def test_what_is_not_kept_is_not_decoded(tmp_path):
    flat = support.copied("flat_tiny", tmp_path)

    def spoil(_, found):
        found["dynamic/value"] = [b"no zlib"]
        found["observation/state"] = np.asarray(found["observation/state"])

    _change(flat, spoil)
    with pytest.raises(ValueError, match="feature 'dynamic'"):
        list(tfds.Builder(flat).episodes())
    assert rlds.open_dataset(flat).num_frames == 14


def test_a_standardisation_that_does_not_fit_is_no_damage(bridge):
    with pytest.raises(ValueError, match="'fractal20220817_data' does not fit"):
        rlds.open_dataset(bridge, "fractal20220817_data", skip_bad=True)


STEPS = {"action": ("float32", 2), "language_instruction": "text"}


def _steps(length=3, **more):
    steps = {"action": np.ones((length, 2)), "language_instruction": [b"go"] * length} | more
    return {f"steps/{key}": values for key, values in steps.items()}


def test_features_of_one_name_are_both_kept_or_told(tmp_path, capfd):
    tree = {"image": "image", "observation": {"image": "image", "index": ("int64",)}}
    tree["observation"]["images"] = {"raw": ("int64", 2)}
    tree |= {"timestamp": ("float32",), "a.b": ("int64",), "a": {"b": ("int64",)}, "x": "audio"}
    pictures = [b"one", b"two"], [b"three", b"4"]
    more = {"image": pictures[0], "observation/image": pictures[1], "a.b": np.arange(2)}
    more["observation/images/raw"] = np.arange(4)
    more |= {"observation/index": np.arange(2), "timestamp": np.ones(2), "a/b": np.arange(2)}
    path = support.written(tmp_path / "made", {"steps": STEPS | tree}, [_steps(2, **more)])
    file = support.shard(path).read_bytes()
    index = rlds_index.index_shard(
        (
            rlds_index.Options(path, "train", "", False, False),
            tfds.Builder(path).features,
            tfds.Builder(path).shards("train")[0],
        )
    )
    for name, wanted in zip(("image", "observation.image"), pictures, strict=True):
        ranges = index.pictures[f"observation.images.{name}"]
        assert [file[start : start + length] for start, length in ranges] == wanted
    assert index.columns.keys() == {"action", "a.b", "observation.index"}
    _, left = rlds_index.declared(tfds.Builder(path).features)
    assert "made here" in left["timestamp"]
    assert "name is that of pictures" in left["observation.images.raw"]
    assert left["a/b"] == "'a.b' has that name already"
    assert left["x"] == "it is of the kind Audio, which is not read"
    with pytest.raises(ValueError, match="no picture"):
        rlds.open_dataset(path)
    whole = {"steps": STEPS | {"timestamp": ("float32",)}}
    made = support.written(tmp_path / "other", whole, [_steps(2, timestamp=np.ones(2))])
    dataset = rlds.open_dataset(made, fps=10)
    assert dataset.left_features.keys() == {"timestamp"}
    assert "features are left out, timestamp: its name" in capfd.readouterr().err
    assert dataset.column("timestamp")[1] == np.float32(0.1)


def test_numbers_are_no_instruction_and_texts_are_counted(tmp_path):
    tree = {"steps": {"action": ("float32", 2)}, "episode_metadata": {"instruction": ("int64",)}}
    episode = {"steps/action": np.ones((3, 2)), "episode_metadata/instruction": np.array([7])}
    path = support.written(tmp_path / "number", tree, [episode])
    assert rlds.open_dataset(path).tasks == [""]
    several = {"pythonClassName": "x.Sequence", "sequence": {"feature": support.declared("text")}}
    tree = support.declared(tree)
    about = tree["featuresDict"]["features"]["episode_metadata"]["featuresDict"]["features"]
    about["instruction"] = several
    (path / tfds.FEATURES).write_text(json.dumps(tree))
    _change(path, lambda _, found: found.update({"episode_metadata/instruction": [b"a", b"b"]}))
    for skip_bad in (False, True):
        with pytest.raises(ValueError, match="episode 0: 'instruction' has 2 entries for 3 steps"):
            rlds.open_dataset(path, skip_bad=skip_bad)


def test_empty_episodes_are_told_as_such(tmp_path):
    episodes = [_steps(), _steps(0), _steps(2, language_instruction=[b""] * 2)]
    path = support.written(tmp_path / "made", {"steps": STEPS}, episodes)
    dataset = rlds.open_dataset(path, skip_unlabeled=True)
    assert dataset.left_out == {"without a step": [1], "without an instruction": [2]}


def test_odd_declarations_are_explained_or_read(tmp_path):
    path = support.written(tmp_path / "empty", {"steps": STEPS | {"image": "image"}}, [_steps(0)])
    with pytest.raises(ValueError, match="no episode of 'train' has a step"):
        rlds.open_dataset(path)
    path = support.written(tmp_path / "text", {"steps": {"word": "text"}}, [])
    with pytest.raises(ValueError, match=r"features.json: no feature of steps.*'steps/word'"):
        rlds.open_dataset(path)
    path = support.written(
        tmp_path / "scalars", {"steps": ("float32",)}, [{"steps": np.arange(3.0)}]
    )
    assert rlds.open_dataset(path).column("steps").tolist() == [0, 1, 2]


def test_fingerprint_is_of_the_content(bridge, tmp_path):
    first = rlds.open_dataset(bridge).fingerprint()
    other = support.copied("bridge_tiny", tmp_path / "elsewhere")
    os.utime(support.shard(other))
    assert rlds.open_dataset(other).fingerprint() == first
    assert rlds.open_dataset(other, "bridge_dataset").fingerprint() != first
    assert rlds.open_dataset(other, split="val").fingerprint() != first


def test_a_killed_pass_leaves_nothing_that_is_used(bridge, cache):
    program = (
        "import os, signal, sys\n"
        "from policymix.data import rlds, rlds_index\n"
        "whole = rlds_index.index_shard\n"
        "def half(task):\n"
        "    if '00001' in task[2].path.name: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return whole(task)\n"
        "rlds_index.index_shard = half\n"
        "rlds.open_dataset(sys.argv[1])\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(bridge)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    (leftover,) = _made(cache)
    assert ".partial-" in leftover.name
    dataset = rlds.open_dataset(bridge)
    assert dataset.num_frames == 22
    (folder,) = _made(cache)
    assert ".partial-" not in folder.name


def test_an_index_is_made_by_one_process_while_others_wait(bridge, cache):
    program = (
        "import sys, time\n"
        "from policymix.data import rlds, rlds_index\n"
        "whole = rlds_index.index_shard\n"
        "def slow(task):\n"
        "    time.sleep(0.5)\n"
        "    return whole(task)\n"
        "rlds_index.index_shard = slow\n"
        "print(rlds.open_dataset(sys.argv[1]).num_frames)\n"
    )
    command = [sys.executable, "-c", program, str(bridge)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, **pipes) for _ in range(2)]
    said = [process.communicate() for process in running]
    assert [out for out, _ in said] == ["22\n"] * 2
    assert sum("indexing" in err for _, err in said) == 1
    assert len(_made(cache)) == 1


def test_a_torn_index_is_made_again(bridge, cache):
    rlds.open_dataset(bridge)
    (folder,) = _made(cache)
    (folder / rlds_index.INDEX).write_text("{")
    assert rlds.open_dataset(bridge).num_frames == 22


def test_damaged_episodes_are_errors_or_left_out_and_counted(bridge, capfd):
    _flip(bridge)
    with pytest.raises(ValueError, match=r"00000-of-00002, record 0 .*checksum"):
        rlds.open_dataset(bridge)
    dataset = rlds.open_dataset(bridge, skip_bad=True)
    assert dataset.left_out == {"damaged": [0]}
    assert dataset.episode_numbers.tolist() == [1, 2, 3, 4]
    assert "1 of 5 episodes of 'train' are left out, damaged: 0" in capfd.readouterr().err
    rest = np.concatenate(
        [
            e["steps"]["observation"]["image_0"]
            for e in tfds.Builder(support.TESTDATA / "bridge_tiny").episodes(start=1)
        ]
    )
    np.testing.assert_array_equal(dataset.frames("observation.images.image_0").all(), rest)


def test_cut_off_shards_lose_their_rest_when_asked(bridge):
    file = support.shard(bridge, 1)
    records = list(tfrecord.read(file))
    file.write_bytes(file.read_bytes()[: records[1].offset + 100])
    with pytest.raises(ValueError, match=r"00001-of-00002, record 1 .*cut off"):
        rlds.open_dataset(bridge)
    dataset = rlds.open_dataset(bridge, skip_bad=True)
    assert dataset.left_out == {"damaged": [3, 4]}
    assert dataset.episode_numbers.tolist() == [0, 1, 2]


def test_contents_that_cannot_be_decoded_are_errors_or_left_out(bridge):
    def spoil(number, found):
        if number == 1:
            found["steps/action"] = found["steps/action"][:-1]

    _change(bridge, spoil)
    with pytest.raises(ValueError, match=r"00000-of-00002, episode 1: feature 'steps/action'"):
        rlds.open_dataset(bridge)
    assert rlds.open_dataset(bridge, skip_bad=True).left_out == {"damaged": [1]}


def test_features_of_different_lengths_are_found(bridge):
    def spoil(number, found):
        found["steps/reward"] = found["steps/reward"][:-1]

    _change(bridge, spoil)
    with pytest.raises(ValueError, match="episode 0: features have different numbers of steps"):
        rlds.open_dataset(bridge)


def test_episodes_without_an_instruction_are_left_out_when_asked(capfd):
    path = support.TESTDATA / "bridge_tiny"
    everything = rlds.open_dataset(path)
    assert "" in everything.tasks
    assert everything.left_out == {}
    labelled = rlds.open_dataset(path, skip_unlabeled=True)
    ((why, numbers),) = labelled.left_out.items()
    assert why == "without an instruction"
    assert len(numbers) == 1
    assert "" not in labelled.tasks
    assert labelled.num_frames == everything.num_frames - LENGTHS[1]
    assert f"without an instruction: {numbers[0]}" in capfd.readouterr().err


def test_bad_numbers_and_empty_episodes_are_named(bridge):
    def spoil(number, found):
        if number == 1:
            found["steps/action"] = found["steps/action"].copy()
            found["steps/action"][7:15] = np.nan
        else:
            for key in [key for key in found if key.startswith("steps/")]:
                found[key] = found[key][:0]

    _change(bridge, spoil)
    dataset = rlds.open_dataset(bridge)
    found = dataset.check_episodes(["action", "observation.state", "is_last"])
    assert found == {
        0: "it has no frames",
        1: "'action' is not finite in 2 frames, the first is frame 1",
    }
    assert rlds.open_dataset(support.TESTDATA / "bridge_tiny").check_episodes(["action"]) == {}


def test_a_split_without_a_usable_step_is_refused(bridge):
    def spoil(number, found):
        found["steps/language_instruction"] = [b""] * len(found["steps/language_instruction"])

    for number in range(2):
        _change(bridge, spoil, number)
    with pytest.raises(ValueError, match="no episode of 'train' has a step"):
        rlds.open_dataset(bridge, skip_unlabeled=True)


def test_a_picture_that_changed_after_indexing_is_named(bridge):
    dataset = rlds.open_dataset(bridge)
    pictures = dataset.frames("observation.images.image_0")
    file = support.shard(bridge)
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(ValueError, match=r"'observation.images.image_0', frame 3, in .*00000-of"):
        pictures.get([3])
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="expected [0-9]+ bytes from byte"):
        pictures.get([3])
    file.unlink()
    with pytest.raises(FileNotFoundError, match="frame|image_0"):
        dataset.frames("observation.images.image_0").get([3])


def test_pictures_serve_threads_and_pickle():
    dataset = pickle.loads(pickle.dumps(rlds.open_dataset(support.TESTDATA / "bridge_tiny")))
    assert len(pickle.dumps(dataset)) < 20_000
    pictures = dataset.frames("observation.images.image_0")
    wanted, again = pictures.all(), pickle.loads(pickle.dumps(pictures))
    rng = np.random.default_rng(0)
    asked = [rng.integers(0, 22, 7) for _ in range(50)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for indices, found in zip(asked, pool.map(again.get, asked), strict=True):
            np.testing.assert_array_equal(found, wanted[indices])


def test_few_files_stay_open(monkeypatch):
    monkeypatch.setattr(rlds, "_OPEN_FILES", 1)
    dataset = rlds.open_dataset(support.TESTDATA / "bridge_tiny")
    pictures = dataset.frames("observation.images.image_0")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        pictures.get([0, 21, 1, 20])
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_pictures_without_a_declared_size(bridge):
    def forget(content):
        step = content["featuresDict"]["features"]["steps"]["sequence"]["feature"]
        images = step["featuresDict"]["features"]["observation"]["featuresDict"]["features"]
        images["image_0"]["image"]["shape"] = {"dimensions": ["-1", "-1", "3"]}

    support.edit_json(bridge / tfds.FEATURES, forget)
    dataset = rlds.open_dataset(bridge)
    assert dataset.features["observation.images.image_0"]["shape"] == [20, 20, 3]
    pictures = dataset.frames("observation.images.image_0").all()
    np.testing.assert_array_equal(pictures, _whole()["observation/image_0"])


def test_droid_is_read_with_its_choices(tmp_path):
    """A dataset with DROID's names; its episodes are as `oxe` standardises them."""
    length, rng = 30, np.random.default_rng(0)
    tree = {"steps": {}, "episode_metadata": {"file_path": "Text"}}
    sizes = {"joint_position": 7, "joint_velocity": 7, "gripper_position": 1}
    names = ("exterior_image_1_left", "exterior_image_2_left", "wrist_image_left")
    dims = {name: sizes[name] for name in ("joint_position", "gripper_position")}
    tree["steps"] = {
        "observation": dict.fromkeys(names, "Image") | dims,
        "action_dict": sizes,
        "language_instruction": "Text",
        "language_instruction_2": "Text",
        "language_instruction_3": "Text",
    }

    def declared(value):
        if isinstance(value, dict):
            inside = {key: declared(one) for key, one in value.items()}
            found = {"pythonClassName": "x.FeaturesDict", "featuresDict": {"features": inside}}
            if "action_dict" in value:
                return {"pythonClassName": "x.Dataset", "sequence": {"feature": found}}
            return found
        if value == "Text":
            return {"pythonClassName": "x.Text", "text": {}}
        if value == "Image":
            return {
                "pythonClassName": "x.Image",
                "image": {"shape": {"dimensions": ["8", "8", "3"]}},
            }
        tensor = {"dtype": "float32", "shape": {"dimensions": [str(value)]}}
        return {"pythonClassName": "x.Tensor", "tensor": tensor}

    import simplejpeg

    folder = tmp_path / "droid" / "1.0.1"
    folder.mkdir(parents=True)
    (folder / tfds.FEATURES).write_text(json.dumps(declared(tree)))
    info = {"name": "droid", "version": "1.0.1"}
    info["splits"] = [{"name": "train", "shardLengths": ["3"]}]
    (folder / tfds.INFO).write_text(json.dumps(info))
    with tfrecord.writing(folder / "droid-train.tfrecord-00000-of-00001") as writer:
        for path in (b"/a/success/1", b"/a/failure/2", b"/a/success/3"):
            values = {
                f"steps/observation/{name}": rng.normal(size=(length, n))
                for name, n in dims.items()
            }
            values |= {
                f"steps/action_dict/{name}": rng.normal(size=(length, n))
                for name, n in sizes.items()
            }
            for name in names:
                image = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
                values[f"steps/observation/{name}"] = [simplejpeg.encode_jpeg(image)] * length
            for number, end in enumerate(("", "_2", "_3")):
                values[f"steps/language_instruction{end}"] = [b"%d" % number] * length
            writer.write(examples.serialize({**values, "episode_metadata/file_path": [path]}))
    dataset = rlds.open_dataset(tmp_path / "droid")
    assert dataset.left_out == {"the attempt failed": [1]}
    assert (dataset.fps, dataset.num_episodes, dataset.robot_type) == (15, 2, "franka")
    episodes = list(tfds.Builder(folder).episodes())
    wanted = [
        oxe.standardize("droid", episodes[n]["steps"], episodes[n]["episode_metadata"])
        for n in (0, 2)
    ]
    for key in (oxe.STATE, oxe.ACTION, oxe.IS_KEPT):
        np.testing.assert_array_equal(dataset.column(key), np.concatenate([w[key] for w in wanted]))
    for key in dataset.camera_keys:
        pictures = np.concatenate([w[key] for w in wanted])
        np.testing.assert_array_equal(dataset.frames(key).all(), pictures)
    said = [dataset.tasks[n].encode() for n in dataset.column("task_index")]
    assert said == np.concatenate([w[oxe.INSTRUCTION] for w in wanted]).tolist()


def square(number):
    if number == 7:
        raise ValueError("seven")
    if number == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.01 * (number % 3))
    return number**2


@pytest.mark.parametrize("num_bytes", [0, 1 << 40])
def test_work_for_shards_comes_back_in_order(num_bytes):
    tasks = [5, 2, 1, 0, 3, 4]
    assert list(shards.over(square, tasks, 2, num_bytes)) == [n**2 for n in tasks]
    assert list(shards.over(square, [], 2, num_bytes)) == []


def unpicklable(number):
    return lambda: number


def ended(number):
    os._exit(number)


def test_answers_that_cannot_be_sent_and_ends_without_one_are_told(capfd):
    with pytest.raises(RuntimeError, match="pickle"):
        list(shards.over(unpicklable, [1, 2], 2, 1 << 40))
    with pytest.raises(OSError, match="ended with exit code 3$"):
        list(shards.over(ended, [3, 3], 2, 1 << 40))
    assert "Traceback" not in capfd.readouterr().err


def test_errors_of_other_processes_come_back_in_order():
    found = shards.over(square, [1, 7, 2], 2, 1 << 40)
    assert next(found) == 1
    with pytest.raises(ValueError, match="seven"):
        next(found)
    with pytest.raises(OSError, match="was killed by SIGKILL.*fewer workers"):
        list(shards.over(square, [1, 9, 2], 2, 1 << 40))


def test_processes_make_the_same_index(bridge, cache, monkeypatch):
    alone = rlds.open_dataset(bridge)
    columns = {
        name: np.array(alone.column(name)) for name in alone.numeric_keys if name != "timestamp"
    }
    print_alone = alone.fingerprint()
    monkeypatch.setenv("POLICYMIX_CACHE", str(cache.parent / "other"))
    monkeypatch.setattr(shards, "_SMALL", 0)
    both = rlds.open_dataset(bridge, num_workers=2)
    assert both.fingerprint() == print_alone
    for name, values in columns.items():
        np.testing.assert_array_equal(both.column(name), values)
    _flip(bridge, 1)
    with pytest.raises(ValueError, match=r"00001-of-00002, record 0 .*checksum"):
        rlds.open_dataset(bridge, num_workers=2)
