import json

import numpy as np
import pytest

from configs import pi0_state
from policymix.checkpoints import assets
from policymix.data import lerobot, loader, writer
from policymix.runs import norm_stats
from policymix.transforms import normalize

VECTOR = {"dtype": "float32", "shape": [3], "names": None}


@pytest.fixture
def config(tmp_path):
    """Ten episodes of one number that changes, one that does not, and one that hardly does."""
    path, rng = tmp_path / "dataset", np.random.default_rng(0)
    with writer.Writer(
        path, fps=10, features={"observation.state": VECTOR, "action": VECTOR}
    ) as opened:
        for _ in range(10):
            values = np.stack([rng.normal(size=20), np.full(20, 0.3), np.full(20, 7)], axis=1)
            values[3, 2] += 1e-6
            opened.add_episode({"observation.state": values, "action": 2 * values}, "push")
    config = pi0_state.get_config("debug")
    config.data.path = str(path)
    return config


def _expected(config):
    dataset = lerobot.open_dataset(config.data.path)
    chosen, _ = loader.split_episodes(dataset.num_episodes, config.data.held_out, config.data.seed)
    chunks = loader.ActionChunks(dataset, config.model.action_horizon, chosen)
    everything = chunks.get(np.arange(len(chunks)))
    return {key: normalize.compute(everything[key]) for key in ("state", "actions")}


def test_statistics_of_the_training_episodes(config, tmp_path, capsys):
    stats = norm_stats.write(config, tmp_path / "assets" / "robot")
    path = tmp_path / "assets" / "robot" / "norm_stats.json"
    assert normalize.difference(assets.read_norm_stats(path), _expected(config)) is None
    assert normalize.difference(stats, _expected(config)) is None
    assert json.loads(path.read_text())["norm_stats"].keys() == {"state", "actions"}
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("actions[0]"))
    assert float(row.split()[2]) == pytest.approx(stats["actions"].std[0], rel=1e-5)
    assert out.splitlines()[0].split() == ["mean", "std", "q01", "q99"]
    config.data.held_out = 0.5
    other = norm_stats.write(config, tmp_path / "other.json")
    assert normalize.difference(stats, other) is not None
    assert (tmp_path / "other.json").is_file()


def test_dimensions_that_never_change_are_named(config, tmp_path, capsys):
    norm_stats.write(config, tmp_path / "n.json")
    (warning,) = [s for s in capsys.readouterr().out.splitlines() if "WARNING" in s]
    # Nearly constant is not constant: 7 and the next float32.
    assert warning.startswith("WARNING: state[1], actions[1] never change")


def test_no_warning_where_everything_changes():
    stats = normalize.compute(np.random.default_rng(0).normal(size=(50, 2)))
    assert "WARNING" not in norm_stats.describe({"state": stats})


def test_statistics_from_elsewhere_are_passed_over(config, tmp_path):
    wrong = {key: normalize.compute(np.ones((4, 3))) for key in ("state", "actions")}
    assets.write_norm_stats(tmp_path / "wrong.json", wrong)
    config.data.norm_stats = str(tmp_path / "wrong.json")
    config.train.init_from = str(tmp_path / "no checkpoint")
    stats = norm_stats.write(config, tmp_path / "n.json")
    assert normalize.difference(stats, _expected(config)) is None
    assert config.data.norm_stats == str(tmp_path / "wrong.json")  # the caller's is untouched


def test_a_dry_run_touches_nothing(config, tmp_path, capsys):
    norm_stats.write(config, tmp_path / "out", dry_run=True)
    assert "state[0]" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["dataset"]


def test_only_norm_stats_are_replaced(config, tmp_path):
    path = tmp_path / "n.json"
    norm_stats.write(config, path)
    with pytest.raises(FileExistsError, match="--overwrite"):
        norm_stats.write(config, path)
    norm_stats.write(config, path, overwrite=True)
    path.write_text('{"homework": 1}')
    with pytest.raises(FileExistsError, match="not written by this command"):
        norm_stats.write(config, path, overwrite=True)
    assert path.read_text() == '{"homework": 1}'


def test_statistics_of_no_episodes_are_refused(tmp_path):
    config = pi0_state.get_config("debug")
    config.data.held_out = 1.0
    with pytest.raises(ValueError, match="held_out is 1, which leaves no training episodes"):
        norm_stats.write(config, tmp_path / "out")
