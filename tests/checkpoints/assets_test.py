"""Norm stats and episodes beside a checkpoint: where they are found, and their schema."""

import json

import numpy as np
import pytest

from policymix.checkpoints import assets
from policymix.transforms import normalize
from tests import oracle


def stats(value=0.1, quantiles=True):
    q = (np.array([-1.0, -2.0]), np.array([1.0, 2.0])) if quantiles else (None, None)
    entry = normalize.NormStats(np.array([value, 1 / 3]), np.array([1.0, 2.0]), *q)
    return {"state": entry, "actions": entry}


def step_with(tmp_path, *asset_ids):
    step = tmp_path / "run" / "100"
    (step / "params").mkdir(parents=True)
    for i, asset_id in enumerate(asset_ids):
        assets.write_norm_stats(step / "assets" / asset_id / assets.NORM_STATS, stats(float(i)))
    return step


@pytest.mark.parametrize("quantiles", [True, False])
def test_norm_stats_keep_all_their_digits(tmp_path, quantiles):
    path = tmp_path / "norm_stats.json"
    assets.write_norm_stats(path, stats(np.nextafter(0.1, 1), quantiles))
    found = assets.read_norm_stats(path)
    for key, expected in stats(np.nextafter(0.1, 1), quantiles).items():
        for field in ("mean", "std", "q01", "q99"):
            np.testing.assert_array_equal(getattr(found[key], field), getattr(expected, field))


def test_the_file_has_openpis_schema(tmp_path):
    assets.write_norm_stats(tmp_path / "norm_stats.json", stats(quantiles=False))
    content = json.loads((tmp_path / "norm_stats.json").read_text())
    expected = {"mean": [0.1, 1 / 3], "std": [1.0, 2.0], "q01": None, "q99": None}
    assert content == {"norm_stats": {"state": expected, "actions": expected}}


@pytest.mark.parametrize("model", oracle.MODELS)
def test_openpis_own_norm_stats_are_read_with_float64_digits(model):
    step = oracle.step(model, "base")
    asset_id, found = assets.norm_stats_of(step)
    content = json.loads((step / "assets/fake_robot/norm_stats.json").read_text())["norm_stats"]
    assert asset_id == "fake_robot"
    assert {key: list(content[key]) for key in content} == {
        key: ["mean", "std", "q01", "q99"] for key in found
    }
    for key, entry in content.items():
        for field, values in entry.items():
            assert getattr(found[key], field).tolist() == values


@pytest.mark.parametrize("asset_id", ["robot", "org/robot", "a/b/c"])
def test_an_asset_id_may_contain_slashes(tmp_path, asset_id):
    step = step_with(tmp_path, asset_id)
    for path in (step, step / "params", step.parent):
        assert assets.norm_stats_of(path)[0] == asset_id
    assert list(assets.find(step, assets.NORM_STATS)) == [asset_id]


def test_several_asset_ids_need_a_choice(tmp_path):
    step = step_with(tmp_path, "a/one", "two")
    with pytest.raises(ValueError, match="a/one, two; choose one with --config.data.asset_id"):
        assets.norm_stats_of(step)
    assert assets.norm_stats_of(step, "two")[1]["state"].mean[0] == 1.0
    with pytest.raises(ValueError, match="choose one"):
        assets.norm_stats_of(step, "three")


def test_kai0s_place_beside_the_step_is_the_second_choice(tmp_path):
    step = step_with(tmp_path)
    assert assets.norm_stats_of(step) is None
    assets.write_norm_stats(step.parent / assets.NORM_STATS, stats(5.0))
    assert assets.norm_stats_of(step)[0] == "mixed"
    assert assets.norm_stats_of(step, "robot")[0] == "robot"
    assets.write_norm_stats(step / "assets/robot" / assets.NORM_STATS, stats(6.0))
    assert assets.norm_stats_of(step)[1]["state"].mean[0] == 6.0


@pytest.mark.parametrize(
    "content",
    [
        '{"norm_stats": {"state": {"mean": [0',
        "[]",
        '{"state": {}}',
        '{"norm_stats": {"state": {"mean": [0.0]}}}',
        '{"norm_stats": {"state": {"mean": [0.0], "std": [1.0, 2.0]}}}',
        '{"norm_stats": {"state": {"mean": ["x"], "std": [1.0]}}}',
        '{"norm_stats": [1]}',
    ],
)
def test_damaged_norm_stats_name_their_file(tmp_path, content):
    path = tmp_path / "norm_stats.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=str(path)):
        assets.read_norm_stats(path)


def test_missing_norm_stats_name_their_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="do not exist"):
        assets.read_norm_stats(tmp_path / "nowhere.json")


def test_trainings_are_one_entry_per_dataset(tmp_path):
    step = step_with(tmp_path, "robot")
    assert assets.trainings_of(step) == []  # a checkpoint from elsewhere
    own = {"path": "here", "fingerprint": "f", "episodes": [3, 1]}
    inherited = [
        {"path": "there", "fingerprint": "f", "episodes": [2, 1]},
        own | {"fingerprint": "g"},
    ]
    assets.write_episodes(step / "assets/robot" / assets.EPISODES, [own, *inherited])
    assert assets.trainings_of(step) == [
        own | {"episodes": [1, 2, 3]},
        own | {"fingerprint": "g", "episodes": [1, 3]},
    ]
