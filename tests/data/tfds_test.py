import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from policymix.data import examples, features, tfds, tfrecord
from tests.data import rlds_support as support

NAMES = ("bridge_tiny", "flat_tiny")
IMAGE = "steps/observation/image_0"


@pytest.fixture
def bridge(tmp_path):
    return support.copied("bridge_tiny", tmp_path)


def _episodes(path, split="train", **options):
    return list(tfds.Builder(path).episodes(split, **options))


@pytest.mark.parametrize("name", NAMES)
def test_episodes_equal_tfds(name):
    """The golden arrays were read by tensorflow-datasets; rlds_support says how to renew them."""
    golden = support.unpack(support.TESTDATA / f"golden_{name}_train.npz")
    found = {}
    for number, episode in enumerate(_episodes(support.TESTDATA / name)):
        for key, value in support.flattened(episode):
            found |= support.plain(f"{number}/{key}", value)
    pictures = {key for key in found if "/image_" in key and not key.startswith("0/")}
    assert found.keys() - pictures == golden.keys()
    for key, wanted in golden.items():
        assert found[key].dtype == wanted.dtype, key
        np.testing.assert_array_equal(found[key], wanted, err_msg=key)


def test_lengths_texts_and_order_are_those_written():
    episodes = _episodes(support.TESTDATA / "bridge_tiny")
    ids = [int(episode["episode_metadata"]["episode_id"]) for episode in episodes]
    assert sorted(ids) == list(range(5))  # tfds shuffles as it writes
    for episode, number in zip(episodes, ids, strict=True):
        steps, about = episode["steps"], episode["episode_metadata"]
        assert len(steps["action"]) == support.LENGTHS[number]
        assert steps["language_instruction"][0].decode() == support.TEXTS[number]
        assert about["file_path"] == b"/raw/%d/out.npy" % number
        assert about["has_language"].dtype == bool


def test_pictures_stay_bytes_when_asked():
    whole = _episodes(support.TESTDATA / "bridge_tiny")
    plain = _episodes(support.TESTDATA / "bridge_tiny", decode=False)
    for decoded, stored in zip(whole, plain, strict=True):
        image = stored["steps"]["observation"]["image_0"]
        assert all(isinstance(item, bytes) for item in image)
        again = [features.picture(item, (20, 20, 3), np.dtype(np.uint8)) for item in image]
        np.testing.assert_array_equal(again, decoded["steps"]["observation"]["image_0"])
        assert stored["steps"]["observation"]["image_1"][0][1:4] == b"PNG"


def test_any_range_of_episodes():
    builder = tfds.Builder(support.TESTDATA / "bridge_tiny")
    assert builder.num_episodes() == 5
    assert builder.num_episodes("val") == 2
    ids = [int(e["episode_metadata"]["episode_id"]) for e in builder.episodes()]
    for start, stop in ((0, 2), (1, 4), (3, None), (5, None), (2, 2)):
        found = builder.episodes(start=start, stop=stop, decode=False)
        wanted = ids[start:stop]
        assert [int(e["episode_metadata"]["episode_id"]) for e in found] == wanted


def test_parents_will_do_where_one_version_is_there(bridge):
    for path in (bridge, bridge.parent, bridge.parent.parent):
        assert tfds.Builder(path).path == bridge
    (bridge.parent / "2.0.0").mkdir()
    (bridge.parent / "2.0.0" / tfds.INFO).write_text("{}")
    with pytest.raises(ValueError, match="several datasets.*'1.0.0', '2.0.0'"):
        tfds.Builder(bridge.parent)
    with pytest.raises(FileNotFoundError, match="no dataset_info.json there"):
        tfds.Builder(bridge / "nowhere")


def test_features_in_the_older_form(bridge):
    """tfds wrote {"type", "content"} until 4.6; content may be JSON in a string."""
    core = "tensorflow_datasets.core.features."
    scalar = {"type": f"{core}tensor_feature.Tensor", "content": {"shape": [], "dtype": "float32"}}
    image = {
        "type": f"{core}image_feature.Image",
        "content": {"shape": [20, 20, 3], "dtype": "uint8", "encoding_format": "jpeg"},
    }
    inside = {"observation": {"image_0": image}, "reward": scalar}
    inside["observation"] = {
        "type": f"{core}features_dict.FeaturesDict",
        "content": inside["observation"],
    }
    steps = {
        "feature": {"type": f"{core}features_dict.FeaturesDict", "content": inside},
        "length": None,
    }
    old = {
        "type": f"{core}features_dict.FeaturesDict",
        "content": json.dumps(
            {"steps": {"type": f"{core}dataset_feature.Dataset", "content": steps}}
        ),
    }
    wanted = _episodes(bridge)
    (bridge / tfds.FEATURES).write_text(json.dumps(old))
    for episode, whole in zip(_episodes(bridge), wanted, strict=True):
        assert episode["steps"].keys() == {"observation", "reward"}
        image = episode["steps"]["observation"]["image_0"]
        np.testing.assert_array_equal(image, whole["steps"]["observation"]["image_0"])
        np.testing.assert_array_equal(episode["steps"]["reward"], whole["steps"]["reward"])
    changed = features.redeclared(old, {IMAGE: {"shape": [8, 8, 3], "encoding": "png"}})
    (bridge / tfds.FEATURES).write_text(json.dumps(changed))
    leaf = features.read_features(bridge / tfds.FEATURES)["steps"]["observation"]["image_0"]
    assert (leaf.shape, leaf.encoding, leaf.lengths) == ((8, 8, 3), "png", (None,))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("featuresDict"), "expected a FeaturesDict"),
        (lambda c: c["featuresDict"]["features"].update(x=3), "as tfds writes them"),
        (
            lambda c: c["featuresDict"]["features"].update(
                x={"pythonClassName": "a.Tensor", "tensor": {"dtype": "complex1"}}
            ),
            "dtype 'complex1', which numpy lacks",
        ),
    ],
)
def test_odd_features_are_explained(bridge, change, said):
    support.edit_json(bridge / tfds.FEATURES, change)
    with pytest.raises(ValueError, match=said) as error:
        tfds.Builder(bridge)
    assert str(bridge / tfds.FEATURES) in str(error.value)


def test_features_of_other_kinds_are_left_out(bridge):
    def add(content):
        content["featuresDict"]["features"]["x"] = {"pythonClassName": "a.Audio", "audio": {}}

    wanted = _episodes(bridge, decode=False)
    support.edit_json(bridge / tfds.FEATURES, add)
    for episode, other in zip(_episodes(bridge, decode=False), wanted, strict=True):
        assert episode.keys() == other.keys()
    (leaf,) = (leaf for leaf in features.leaves(tfds.Builder(bridge).features) if leaf.key == "x")
    with pytest.raises(ValueError, match="'x': it is of the kind Audio"):
        features.decode(leaf, {})


def test_missing_and_torn_descriptions_are_named(bridge):
    (bridge / tfds.FEATURES).write_text("{")
    with pytest.raises(ValueError, match="features.json is not readable JSON"):
        tfds.Builder(bridge)
    (bridge / tfds.FEATURES).unlink()
    with pytest.raises(FileNotFoundError, match="features.json: no such file"):
        tfds.Builder(bridge)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("splits"), "expected name and splits"),
        (lambda c: c.update(splits={"train": 5}), "expected name and splits"),
        (lambda c: c["splits"][0].pop("name"), "None is no name of a dataset"),
        (lambda c: c.update(name="../../x"), "'../../x' is no name"),
        (lambda c: c.update(name=".."), "'..' is no name"),
        (lambda c: c.update(version="/tmp"), "'/tmp' is no name"),
        (lambda c: c.update(configName="a/b"), "'a/b' is no name"),
        (lambda c: c["splits"][0].update(name="../train"), "'../train' is no name"),
        (lambda c: c.update(fileFormat="array_record"), "fileFormat is array_record"),
        (lambda c: c["splits"][0].update(shardLengths=["2", "x"]), "expected shardLengths"),
        (lambda c: c["splits"][0].update(filepathTemplate="../{SPLIT}"), "leads out of"),
        (lambda c: c["splits"][0].update(filepathTemplate="/tmp/{SPLIT}"), "leads out of"),
        (lambda c: c["splits"][0].update(filepathTemplate="{WHAT}"), "has an unknown 'WHAT'"),
    ],
)
def test_odd_dataset_infos_are_explained(bridge, change, said):
    support.edit_json(bridge / tfds.INFO, change)
    with pytest.raises(ValueError, match=said) as error:
        tfds.Builder(bridge)
    assert str(bridge / tfds.INFO) in str(error.value)


@pytest.mark.parametrize(
    "template", ["{SPLIT}/part.${SHARD_INDEX}", "{DATASET}-{SHARD_X_OF_Y}", ""]
)
def test_file_names_of_other_templates(bridge, template):
    wanted = _episodes(bridge, decode=False)
    for number in range(2):
        digits = f"{number:05d}"
        name = {"{S": f"train/part.{digits}", "{D": f"bridge_tiny-{digits}-of-00002"}
        if template:
            target = bridge / name[template[:2]]
            target.parent.mkdir(exist_ok=True)
            (bridge / f"bridge_tiny-train.tfrecord-{digits}-of-00002").rename(target)
    support.edit_json(
        bridge / tfds.INFO, lambda c: c["splits"][0].update(filepathTemplate=template)
    )
    found = _episodes(bridge, decode=False)
    assert [e["episode_metadata"] for e in found] == [e["episode_metadata"] for e in wanted]


@pytest.mark.parametrize(
    ("lengths", "said"),
    [((3, 3), "has 2 episodes, dataset_info.json says 3"), ((1, 3), "has more episodes")],
)
def test_wrong_shard_lengths_are_found(bridge, lengths, said):
    change = [str(n) for n in lengths]
    support.edit_json(bridge / tfds.INFO, lambda c: c["splits"][0].update(shardLengths=change))
    with pytest.raises(ValueError, match=said) as error:
        _episodes(bridge)
    assert "train.tfrecord-00000-of-00002" in str(error.value)


def test_missing_shards_and_splits_are_named(bridge):
    support.shard(bridge, 1).unlink()
    with pytest.raises(FileNotFoundError, match="00001-of-00002: no such file .1 of 2 shards"):
        _episodes(bridge)
    assert len(_episodes(bridge, "val")) == 2
    with pytest.raises(ValueError, match=r"no split 'test'; it has \['train', 'val'\]"):
        _episodes(bridge, "test")


def test_damaged_record_names_file_record_and_byte(bridge):
    path = support.shard(bridge, 1)
    data = bytearray(path.read_bytes())
    data[200] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"00001-of-00002, record 0 \(from byte 0 on\).*checksum"):
        _episodes(bridge)


def _rewrite(path, change):
    """Puts changed examples, with right checksums, into a shard."""
    every = [change(record.data) for record in tfrecord.read(path)]
    with tfrecord.writing(path) as writer:
        for data in every:
            writer.write(data)


def _with(key, values):
    def change(data):
        found = {
            k: v if isinstance(v, np.ndarray) else v.tolist()
            for k, v in examples.parse(data).items()
        }
        return examples.serialize(
            {**found, key: values}
            if values is not None
            else {k: v for k, v in found.items() if k != key}
        )

    return change


@pytest.mark.parametrize(
    ("key", "values", "said"),
    [
        (IMAGE, [b"\xff\xd8\xffno picture"] * 5, "'steps/observation/image_0': .*no picture"),
        (IMAGE, np.zeros(5, np.float32), "expected bytes, found 5 values of float32"),
        (
            "steps/action",
            np.zeros(8, np.float32),
            r"'steps/action': expected the shape \[None, 7\]",
        ),
        (
            "steps/action",
            np.zeros(7, np.int64),
            "expected numbers for float32, found 7 values of int64",
        ),
        ("episode_metadata/episode_id", None, "'episode_metadata/episode_id': it is missing"),
        ("episode_metadata/episode_id", np.arange(2), r"expected the shape \[\], found 2 values"),
    ],
)
def test_contents_that_contradict_the_declaration(bridge, key, values, said):
    _rewrite(support.shard(bridge), _with(key, values))
    with pytest.raises(ValueError, match=said) as error:
        _episodes(bridge)
    assert f"{support.shard(bridge)}, episode 0" in str(error.value)


def test_pictures_of_another_size_are_found(bridge):
    change = {IMAGE: {"shape": [24, 20, 3], "encoding": "jpeg"}}
    content = features.redeclared(json.loads((bridge / tfds.FEATURES).read_text()), change)
    (bridge / tfds.FEATURES).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"expected a picture \[24, 20, 3\], found \[20, 20, 3\]"):
        _episodes(bridge)


def test_missing_sequences_are_empty(bridge):
    _rewrite(support.shard(bridge), _with("steps/reward", None))
    first = _episodes(bridge)[0]
    assert first["steps"]["reward"].shape == (0,)
    assert first["steps"]["reward"].dtype == np.float32


def test_a_missing_optional_number_is_the_least_there_is(recwarn):
    shape, dtype = (2,), np.dtype(np.float64)
    leaf = features.Leaf("x", "tensor", shape, dtype, optional=True)
    np.testing.assert_array_equal(features.decode(leaf, {}), [-np.inf] * 2)
    assert not recwarn.list


def test_memory_stays_small(tmp_path):
    """200 MB is the bound; 40 episodes of 50 pictures of 224 x 224 are 300 MB of pixels."""
    import simplejpeg

    bridge = support.copied("bridge_tiny", tmp_path)
    image = np.random.default_rng(0).integers(0, 255, (224, 224, 3), dtype=np.uint8)
    data = examples.serialize(
        {IMAGE: [simplejpeg.encode_jpeg(image)] * 50, "steps/reward": np.zeros(50)}
    )
    content = {
        "pythonClassName": "x.FeaturesDict",
        "featuresDict": {
            "features": {
                "steps": {
                    "pythonClassName": "x.Dataset",
                    "sequence": {
                        "feature": {
                            "pythonClassName": "x.FeaturesDict",
                            "featuresDict": {
                                "features": {
                                    "observation": {
                                        "pythonClassName": "x.FeaturesDict",
                                        "featuresDict": {
                                            "features": {
                                                "image_0": {
                                                    "pythonClassName": "x.Image",
                                                    "image": {
                                                        "shape": {"dimensions": ["224", "224", "3"]}
                                                    },
                                                }
                                            }
                                        },
                                    }
                                }
                            },
                        }
                    },
                }
            }
        },
    }
    (bridge / tfds.FEATURES).write_text(json.dumps(content))
    support.edit_json(bridge / tfds.INFO, lambda c: c["splits"][0].update(shardLengths=["40"]))
    with tfrecord.writing(bridge / "bridge_tiny-train.tfrecord-00000-of-00001") as writer:
        for _ in range(40):
            writer.write(data)
    program = (
        "import sys; from policymix import memory; from policymix.data import tfds\n"
        "episodes = tfds.Builder(sys.argv[1]).episodes()\n"
        "print(sum(len(e['steps']['observation']['image_0']) for e in episodes))\n"
        "print(memory.peak_bytes())"
    )
    root = str(pathlib.Path(__file__).parents[2])
    command = [sys.executable, "-c", program, str(bridge)]
    env = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    frames, peak = map(int, done.stdout.split())
    assert frames == 2000
    assert peak < 200e6


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_episodes_equal_those_of_tfds_itself(name, tmp_path):
    pytest.importorskip("tensorflow_datasets", reason="needs the extra rlds")
    pytest.importorskip("tensorflow", reason="needs the extra rlds")
    if name == "bridge_tiny":
        builder = support.bridge_like(tmp_path, side=52, num_shards=2)
    else:
        builder = support.flat(tmp_path)
    for split in builder.info.splits:
        ours = _episodes(pathlib.Path(builder.data_dir), split)
        theirs = list(support.read_by_tfds(builder, split))
        assert len(ours) == len(theirs) > 0
        for mine, other in zip(ours, theirs, strict=True):
            flat = dict(support.flattened(mine))
            assert flat.keys() == other.keys()
            for key, wanted in other.items():
                first, second = support.plain(key, flat[key]), support.plain(key, wanted)
                assert first.keys() == second.keys()
                for part, values in second.items():
                    assert first[part].dtype == values.dtype
                    np.testing.assert_array_equal(first[part], values, err_msg=part)
