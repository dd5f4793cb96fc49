"""Training on RLDS: one dataset, and a mixture of two robots, each with its own normalisation."""

import jax
import numpy as np
import pytest
import simplejpeg

from configs import pi0_bridge
from policymix import files
from policymix.checkpoints import assets
from policymix.data import examples, oxe, rlds, tfrecord
from policymix.runs import pipeline, policies, train
from policymix.transforms import images, normalize

LENGTHS = (9, 7, 12)


def declared(tree):
    """{name: dims, "text" or "image", or the same again} → features.json of a nested dataset."""

    def feature(name, kind, content):
        return {"pythonClassName": f"tensorflow_datasets.{name}", kind: content}

    def inner(value):
        if isinstance(value, dict):
            entries = {key: inner(one) for key, one in value.items()}
            return feature("FeaturesDict", "featuresDict", {"features": entries})
        if value == "text":
            return feature("Text", "text", {})
        if value == "image":
            shape = {"dimensions": ["16", "24", "3"]}
            return feature("Image", "image", {"shape": shape, "encodingFormat": "jpeg"})
        shape = {"dimensions": [str(value)]}
        return feature("Tensor", "tensor", {"dtype": "float32", "shape": shape})

    steps = feature("Dataset", "sequence", {"feature": inner(tree)})
    return feature("FeaturesDict", "featuresDict", {"features": {"steps": steps}})


def write(root, name, tree, seed, unlabeled=(), lengths=LENGTHS):
    """A dataset of three episodes with random numbers and pictures."""
    folder, rng = root / name / "1.0.0", np.random.default_rng(seed)
    folder.mkdir(parents=True)
    files.write_json(folder / "features.json", declared(tree))
    split = {"name": "train", "shardLengths": ["3"]}
    info = {"name": name, "version": "1.0.0", "splits": [split]}
    files.write_json(folder / "dataset_info.json", info)

    def values(tree, length, episode, prefix):
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from values(value, length, episode, f"{prefix}/{key}")
            elif value == "text":
                words = b"" if episode in unlabeled else b"put %d away" % episode
                yield f"{prefix}/{key}", [words] * length
            elif value == "image":
                pixels = rng.integers(0, 256, (length, 16, 24, 3), np.uint8)
                yield f"{prefix}/{key}", [simplejpeg.encode_jpeg(x) for x in pixels]
            else:
                yield f"{prefix}/{key}", seed + rng.normal(size=length * value)

    with tfrecord.writing(folder / f"{name}-train.tfrecord-00000-of-00001") as opened:
        for episode, length in enumerate(lengths):
            opened.write(examples.serialize(dict(values(tree, length, episode, "steps"))))
    return folder.parent


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with the datasets of oxe_simple, made of noise."""
    root = tmp_path_factory.mktemp("oxe")
    bridge = {
        "observation": {"state": 7, "image_0": "image", "image_1": "image"},
        "action": 7,
        "language_instruction": "text",
    }
    write(root, "bridge_dataset", bridge, 1, unlabeled=(1,))
    fractal = {
        "observation": {
            "base_pose_tool_reached": 7,
            "gripper_closed": 1,
            "natural_language_instruction": "text",
            "image": "image",
        },
        "action": {"world_vector": 3, "rotation_delta": 3, "gripper_closedness_action": 1},
    }
    write(root, "fractal20220817_data", fractal, 2)
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POLICYMIX_CACHE", str(tmp_path / "cache"))


def config_of(path, **data):
    config = pi0_bridge.get_config("debug")
    config.model.update({"image_resolution": (28, 28), "image_keys": ("base_0_rgb",)})
    config.model.proprio_dim = 8
    config.data.cameras.base_0_rgb = "observation.images.primary"
    config.data.update({"path": str(path), "held_out": 0.0} | data)
    config.train.update({"batch_size": 8, "num_steps": 2, "save_every": 2})
    return config


def made(config):
    return pipeline.Pipeline(config, policies.model_config(config, why="the test"))


def test_frames_of_an_rlds_dataset_are_drawn_as_its_robot_is_standardised(root):
    config = config_of(root / "bridge_dataset", robot="bridge", skip_unlabeled=True)
    found = made(config)
    (source,), ((_, stats),) = found.sources, found.norm_stats.items()
    assert source.dataset.num_frames == sum(LENGTHS) - LENGTHS[1] - 2
    batch = found.batch(0, 16)
    whole = rlds.open_dataset(root / "bridge_dataset", skip_unlabeled=True)
    order = pipeline.loader.batch_indices(whole.num_frames, 16, config.train.seed, 0)
    actions = whole.column("action")[order]
    expected = normalize.normalize(
        actions, stats["actions"], scheme="bounds", mask=(True,) * 6 + (False,)
    )
    np.testing.assert_allclose(batch.actions[:, 0, :7], expected, atol=1e-6)
    assert abs(batch.actions).max() <= 1
    pictures = whole.frames("observation.images.primary").get(order)
    seen = images.resize_with_pad(pictures, 28, 28)
    np.testing.assert_array_equal(batch.observation.images["base_0_rgb"], seen)


def test_each_robot_of_a_mixture_keeps_its_own_normalisation(root, tmp_path):
    config = config_of(root, mixture="oxe_simple", robot="", skip_unlabeled=True)
    found = made(config)
    assert list(found.norm_stats) == ["fractal20220817_data", "bridge_dataset"]
    sizes = {name: len(stats["state"].mean) for name, stats in found.norm_stats.items()}
    assert sizes == {"fractal20220817_data": 8, "bridge_dataset": 7}
    for stats, source in zip(found.norm_stats.values(), found.sources, strict=True):
        states = source.dataset.column(oxe.STATE).astype(np.float64)
        np.testing.assert_allclose(stats["state"].mean, states.mean(axis=0), rtol=1e-5)
    batches = [found.batch(step, 8) for step in range(20)]
    bridge = np.concatenate([batch.observation.proprio[:, 7] == 0 for batch in batches])
    frames = [source.dataset.num_frames for source in found.sources]
    assert bridge.mean() == pytest.approx(frames[1] / sum(frames), abs=0.02)
    train.train(config, tmp_path / "run", devices=jax.devices()[:1])
    step = tmp_path / "run" / "2"
    for name, stats in found.norm_stats.items():
        assert normalize.difference(assets.norm_stats_of(step, name)[1], stats) is None
    assert len(assets.trainings_of(step)) == 2
    config.train.num_steps = 3
    assert int(train.train(config, tmp_path / "run", devices=jax.devices()[:1]).step) == 3


def test_a_mixture_does_not_take_the_statistics_of_another_robot(root, tmp_path):
    single = config_of(root / "bridge_dataset", robot="bridge")
    train.train(single, tmp_path / "base", devices=jax.devices()[:1])
    config = config_of(root, mixture="oxe_simple", robot="")
    config.train.init_from = str(tmp_path / "base" / "2")
    found = made(config)
    base = assets.norm_stats_of(tmp_path / "base" / "2")[1]
    assert normalize.difference(found.norm_stats["bridge_dataset"], base) is None
    assert normalize.difference(found.norm_stats["fractal20220817_data"], base) is not None


def test_droids_frames_begin_where_the_arm_moves(tmp_path):
    names = ("exterior_image_1_left", "exterior_image_2_left", "wrist_image_left")
    pose = {"joint_position": 7, "gripper_position": 1}
    tree = {
        "observation": dict.fromkeys(names, "image") | pose,
        "action_dict": pose | {"joint_velocity": 7},
        "language_instruction": "text",
    }
    path = write(tmp_path, "droid", tree, 3, lengths=(40, 12, 30))
    config = config_of(path, robot="droid_rlds")
    config.model.image_keys = ("base_0_rgb", "left_wrist_0_rgb")
    config.data.cameras = {"base_0_rgb": "", "left_wrist_0_rgb": ""}
    source = made(config).sources[0]
    # The last ten steps of what is kept are left out, and episodes of fewer than 16.
    assert source.train.lengths() == [30, 20]
    found = source.get(source.train, np.arange(len(source.train)))
    assert set(found["episode_index"].tolist()) == {0, 2}
    assert found["frame_index"].max() == 29
    assert found["actions"].shape == (50, config.model.action_horizon, 8)
