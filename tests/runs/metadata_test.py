"""What datasets say where the config leaves it open."""

import pathlib

import jax
import numpy as np
import pytest

from configs import common, pi0_small
from policymix import files
from policymix.data import writer
from policymix.runs import encoding, metadata, pipeline, policies, train

PUSHT = pathlib.Path(__file__).parents[1] / "testdata" / "lerobot" / "pusht_v30_video"


def vector(size):
    return {"dtype": "float32", "shape": [size], "names": None}


def image(height, width):
    return {"dtype": "image", "shape": [height, width, 3], "names": ["height", "width", "channel"]}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two cameras of two sizes, five numbers of state in two features, three of actions."""
    path = tmp_path_factory.mktemp("metadata") / "d"
    features = {"joints": vector(4), "gripper": vector(1), "action": vector(3)}
    cameras = {"observation.images.top": image(20, 40), "observation.images.wrist": image(30, 30)}
    rng = np.random.default_rng(0)
    with writer.Writer(path, fps=20, features=features | cameras) as opened:
        for length in (6, 5):
            arrays = {k: rng.normal(size=(length, *f["shape"])) for k, f in features.items()}
            arrays |= {
                k: rng.integers(0, 256, (length, *f["shape"]), np.uint8) for k, f in cameras.items()
            }
            opened.add_episode(arrays, "tidy up")
    return path


def config_of(path, **data):
    config = pi0_small.get_config("debug")
    config.data.update({"path": str(path), "held_out": 0.0} | data)
    config.model.image_resolution = (32, 32)
    return config


def test_sizes_and_cameras_come_from_the_dataset(dataset, capsys):
    given = config_of(dataset, state_key="joints,gripper")
    config = metadata.complete(given)
    model = policies.model_config(config, why="the test")
    assert (model.action_dim, model.proprio_dim) == (3, 5)
    assert model.image_keys == ("top", "wrist")
    assert encoding.cameras(model, config.data) == {
        "top": "observation.images.top",
        "wrist": "observation.images.wrist",
    }
    assert given.model.action_dim is None
    assert "20 frames per second" in capsys.readouterr().out
    batch = pipeline.Pipeline(config, model).batch(0, 4)
    assert batch.actions.shape == (4, 16, 3)
    assert {c: x.shape for c, x in batch.observation.images.items()} == {
        "top": (4, 32, 32, 3),
        "wrist": (4, 32, 32, 3),
    }


def test_videos_fill_it_in_too():
    config = metadata.complete(config_of(PUSHT))
    model = policies.model_config(config, why="the test")
    assert (model.action_dim, model.proprio_dim, model.image_keys) == (2, 2, ("image",))


def test_what_the_config_says_stays(dataset):
    config = config_of(dataset, state_key="joints")
    config.model.update({"action_dim": 8, "proprio_dim": 6, "image_keys": ()})
    assert metadata.complete(config) is config
    assert metadata.complete(config, rate=True).data.fps == 20
    config.data.fps = 20
    assert metadata.complete(config, rate=True) is config
    config.model.image_keys = None
    assert metadata.complete(config).model.action_dim == 8


def test_a_prompt_of_the_config_overrides_the_datasets(dataset):
    for prompt, expected in (("", "tidy up"), ("fold it", "fold it")):
        config = metadata.complete(config_of(dataset, state_key="joints", default_prompt=prompt))
        made = pipeline.Pipeline(config, policies.model_config(config, why="the test"))
        (raw,) = [made.sources[0].get(made.sources[0].train, np.arange(3))]
        assert raw["prompt"] == [expected] * 3


def test_without_a_dataset_there_is_nothing_to_fill_in():
    with pytest.raises(ValueError, match="leaves action_dim and image_keys to the dataset: name"):
        metadata.complete(config_of(""))
    with pytest.raises(ValueError, match="needs config.model.action_dim, which the config leaves"):
        policies.model_config(config_of(""), why="serving")


def test_a_run_remembers_what_its_dataset_said(dataset, tmp_path):
    config = config_of(dataset, state_key="joints,gripper", num_threads=1)
    config.train.update({"num_steps": 2, "batch_size": 2})
    train.train(config, tmp_path / "run", devices=jax.devices()[:1])
    recorded = files.read_json(tmp_path / "run" / "config.json")
    assert recorded["data"]["fps"] == 20
    for checkpoint in ("run/2", "run/2/params"):
        bare = config_of("")
        config = metadata.complete(bare, checkpoints=("/no/such/mix", str(tmp_path / checkpoint)))
        model = policies.model_config(config, why="the test")
        assert (model.action_dim, model.proprio_dim) == (3, 5)
        assert encoding.cameras(model, config.data) == {
            "top": "observation.images.top",
            "wrist": "observation.images.wrist",
        }


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"type": "pi0"},
        {"model": None, "data": {}},
        {"model": {"action_dim": 7, "proprio_dim": 8}, "data": {"cameras": {}}},
        {"model": {"action_dim": 7, "proprio_dim": 8, "image_keys": ["a"]}, "data": {}},
    ],
)
def test_another_config_beside_a_checkpoint_says_nothing(tmp_path, content):
    files.write_json(tmp_path / "config.json", content)
    (tmp_path / "5" / "params").mkdir(parents=True)
    with pytest.raises(ValueError, match="leaves action_dim and image_keys to the dataset"):
        metadata.complete(config_of(""), checkpoints=(str(tmp_path / "5"),))


def test_speed_is_no_other_run(dataset, tmp_path):
    config = config_of(dataset, state_key="joints,gripper", num_threads=1)
    config.train.update({"num_steps": 1, "batch_size": 2})
    train.train(config, tmp_path / "run", devices=jax.devices()[:1])
    config.data.update({"num_threads": 2, "cache_mb": 0})
    config.train.num_steps = 2
    state = train.train(config, tmp_path / "run", devices=jax.devices()[:1])
    assert int(state.step) == 2


def test_cameras_are_called_by_what_tells_them_apart():
    names = metadata.camera_names(["observation.images.left.rgb", "observation.images.right.rgb"])
    assert list(names) == ["left_rgb", "right_rgb"]
    assert metadata.camera_names(["top", "observation.images.wrist"]) == {
        "top": "top",
        "wrist": "observation.images.wrist",
    }
    assert metadata.camera_names([]) == {}
    with pytest.raises(ValueError, match="cannot be told apart"):
        metadata.camera_names(["a_b", "a.b"] * 2)


def test_datasets_are_named_in_one_way_only():
    data = common.get_config().data
    with pytest.raises(ValueError, match=r"config.data.path is empty: .*config.data.repo_id=ORG"):
        metadata.parts(data)
    data.update({"path": "a,b", "repo_id": "lerobot/pusht"})
    assert [part.name for part in metadata.parts(data)] == [
        "a",
        "b",
        "hf://datasets/lerobot/pusht",
    ]
    data.mixture = "oxe_simple"
    with pytest.raises(ValueError, match="config.data.path is then the one folder that holds"):
        metadata.parts(data)
    data.update({"path": "/data/oxe", "repo_id": ""})
    assert [(part.name, part.data.robot) for part in metadata.parts(data)] == [
        ("/data/oxe/fractal20220817_data", "fractal"),
        ("/data/oxe/bridge_dataset", "bridge"),
    ]
    data.mixture = "oxe"
    with pytest.raises(ValueError, match="no mixture is called 'oxe'"):
        metadata.parts(data)
    data.mixture = "oxe_simple"
    np.testing.assert_allclose(metadata.fractions(data, [30, 10]), [0.75, 0.25])
