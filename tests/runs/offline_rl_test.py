"""Chunk-level training: exact resume, what lies beside a checkpoint, who takes it, refusals."""

import json
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import pi0_state
from policymix import metrics, trees
from policymix.checkpoints import assets, store
from policymix.models import pi0
from policymix.rl import learner as learner_lib
from policymix.rl.config import LearnerConfig
from policymix.runs import chunk_policies, offline_rl, policies, requests
from policymix.runs import mix as mix_lib
from policymix.transforms import normalize
from tests import commands
from tests.runs import rl_support

ROOT = pathlib.Path(__file__).parents[2]


def run(config, workdir, **options):
    return offline_rl.train(config, workdir, devices=jax.devices()[:1], **options)


def assert_identical(a, b):
    jax.tree.map(np.testing.assert_array_equal, dict(a), dict(b))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return rl_support.write_dataset(tmp_path_factory.mktemp("rl") / "data")


@pytest.fixture(scope="module")
def straight(dataset, tmp_path_factory):
    """Four steps without a stop."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    run(rl_support.debug_config(dataset), workdir)
    return workdir


def train_state(path: pathlib.Path) -> dict:
    import orbax.checkpoint as ocp

    return ocp.PyTreeCheckpointer().restore(path / "train_state")


def test_two_steps_and_two_more_equal_four(dataset, straight, tmp_path, capsys):
    workdir = tmp_path / "run"
    run(rl_support.debug_config(dataset, num_steps=2), workdir)
    assert not (workdir / "4").exists()
    run(rl_support.debug_config(dataset), workdir)
    assert "resumed from step 2" in capsys.readouterr().out
    assert_identical(store.load_params(workdir / "4"), store.load_params(straight / "4"))
    assert_identical(train_state(workdir / "4"), train_state(straight / "4"))


def test_updates_of_one_call_are_the_same_updates(dataset, straight, tmp_path):
    config = rl_support.debug_config(dataset, updates_per_call=3, log_every=4)
    run(config, tmp_path / "run")
    ours, theirs = (trees.flatten(store.load_params(w / "4")) for w in (tmp_path / "run", straight))
    for path, array in theirs.items():
        np.testing.assert_allclose(ours[path], array, atol=1e-5, err_msg=path)


def test_metrics_say_what_is_watched(straight):
    rows = list(metrics.read(straight / "metrics.jsonl"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for name in ("critic/q_mean", "critic/loss", "value/loss", "policy/loss", "epoch"):
        assert np.isfinite(rows[-1][name]), name
    assert 0 < rows[-1]["policy/effective_batch"] <= 1


def test_what_it_was_trained_on_lies_beside(dataset, straight):
    _, stats = assets.norm_stats_of(straight / "4")
    assert len(stats["actions"].mean) == rl_support.ACTION
    (training,) = assets.trainings_of(straight / "4")
    assert training["episodes"] == list(range(6))


def test_a_checkpoint_acts_in_the_robots_units(dataset, straight):
    policy = chunk_policies.ChunkPolicy(rl_support.debug_config(dataset), str(straight / "4"))
    raw = {"state": np.zeros((3, rl_support.STATE), np.float32), "prompt": ["push the block"] * 3}
    chunks = policy.act(raw | {"images": {}}, seeds=[1, 2, 3], call=0)
    assert chunks.shape == (3, 4, rl_support.ACTION)
    observation = policy.encoder.observation(raw | {"images": {}})
    normalised = learner_lib.act(policy.model, policy.load(), observation, jax.random.key(0))
    expected = policy.encoder.actions(np.asarray(normalised), raw["state"])
    np.testing.assert_allclose(chunks, expected, atol=1e-5)


def test_language_reaches_the_policy(dataset, straight):
    policy = chunk_policies.ChunkPolicy(rl_support.debug_config(dataset), str(straight / "4"))
    raw = {"state": np.zeros((2, rl_support.STATE), np.float32), "images": {}}
    one, other = policy.act(raw | {"prompt": list(rl_support.TASKS)}, seeds=[1, 1], call=0)
    assert np.abs(one - other).max() > 1e-6


def test_its_checkpoints_mix_and_the_mix_acts(dataset, straight, tmp_path):
    run(rl_support.debug_config(dataset, seed=1), tmp_path / "other")
    inputs = [str(straight / "4"), str(tmp_path / "other" / "4")]
    config = rl_support.debug_config(dataset)
    request = requests.Request(checkpoints=tuple(inputs), output=tmp_path / "mixed")
    mix_lib.mix(config, request)
    mixed = trees.flatten(store.load_params(tmp_path / "mixed"))
    parts = [trees.flatten(store.load_params(path)) for path in inputs]
    for path, array in mixed.items():
        expected = (parts[0][path] + parts[1][path]) / 2
        np.testing.assert_allclose(array, expected, atol=1e-6, err_msg=path)
    config.data.cameras = {}
    policy = chunk_policies.ChunkPolicy(config, str(tmp_path / "mixed"))
    raw = {"state": np.zeros((1, rl_support.STATE), np.float32), "prompt": ["push"], "images": {}}
    assert np.isfinite(policy.act(raw, seeds=[0], call=0)).all()


@pytest.mark.parametrize(
    ("algorithm", "policy"),
    [("chunk_soft", "gaussian"), ("cloning", "gaussian"), ("chunk_iql", "flow"), ("qc", "flow"),
     ("qc_fql", "flow")],
)  # fmt: skip
def test_every_algorithm_runs(dataset, tmp_path, algorithm, policy):
    config = rl_support.debug_config(dataset, algorithm=algorithm, policy=policy, num_steps=2)
    config.data.normalization = "bounds"
    run(config, tmp_path / "run")
    (row, *_) = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert np.isfinite(row["loss"])
    chunk_policies.ChunkPolicy(config, str(tmp_path / "run" / "2"))


def test_epochs_count_passes_over_the_chunks(dataset, tmp_path):
    config = rl_support.debug_config(dataset, num_epochs=2, save_every=1, log_every=100)
    run(config, tmp_path / "run")
    frames = sum(14 + n % 3 for n in range(6))
    per_epoch = -(-frames // 8)
    assert {p.name for p in (tmp_path / "run").iterdir() if p.name.isdigit()} == {
        str(per_epoch), str(2 * per_epoch)
    }  # fmt: skip


def test_a_settings_file_of_rlvla_is_read(dataset, tmp_path):
    told = {
        "hyperparameters": {
            "action_horizon": 5, "action_dim": 7, "gamma": 0.9, "beta": 2.0, "lambda_v": 0.5,
            "lambda_pi": 1.0, "lr": 1e-3, "batch_size": 4,
        },
        "network_architecture": {
            "image_size": 64, "state_dim": 8, "hidden_dim": 24, "feature_dim": 12,
        },
        "training": {"num_epochs": 1, "log_interval": 7, "save_interval": 1},
        "description": {"gamma": "of the future"},
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(told))
    config = rl_support.debug_config(dataset, settings=str(path))
    run(config, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    learner = LearnerConfig(**record["learner"])
    assert (learner.action_horizon, learner.action_dim) == (5, rl_support.ACTION)
    assert (learner.temperature, learner.lambda_v, learner.hidden_dim) == (0.5, 0.5, 24)
    options = record["offline_rl"]
    assert (options["discount"], options["learning_rate"], options["log_every"]) == (0.9, 1e-3, 7)
    assert config.offline_rl.discount == 0.99  # the caller's config stays as it is


def test_a_run_starts_from_a_checkpoint(dataset, straight, tmp_path):
    config = rl_support.debug_config(dataset, init_from=str(straight / "4"), learning_rate=1e-12)
    run(config, tmp_path / "run")
    ours, theirs = (trees.flatten(store.load_params(w / "4")) for w in (tmp_path / "run", straight))
    for path, array in theirs.items():
        np.testing.assert_allclose(ours[path], array, atol=1e-6, err_msg=path)


def test_another_config_does_not_resume(dataset, straight):
    with pytest.raises(ValueError, match=r"offline_rl\.discount: 0\.99 then, 0\.9 now"):
        run(rl_support.debug_config(dataset, discount=0.9), straight)


def test_a_diverged_run_stops_and_keeps_the_last_checkpoint(dataset, tmp_path):
    workdir = tmp_path / "run"
    run(rl_support.debug_config(dataset, num_steps=2), workdir)
    config = rl_support.debug_config(dataset, num_steps=2, seed=1, reward_scale=3e38)
    with pytest.raises(FloatingPointError, match="not finite at step"):
        run(config, tmp_path / "diverged")
    assert (workdir / "2" / "params").is_dir()
    assert not (tmp_path / "diverged" / "2").exists()


def test_a_small_effective_batch_is_told(dataset, tmp_path, capsys):
    config = rl_support.debug_config(
        dataset, temperature=1e-6, max_weight=0.0, normalize_weights=True, batch_size=16
    )
    run(config, tmp_path / "run")
    assert "of its batch (policy/effective_batch)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"config\.offline_rl\.batch_size is 0"),
        ({"algorithm": "ppo"}, r"offline_rl\.algorithm is 'ppo'"),
        ({"algorithm": "chunk_soft", "policy": "flow"}, "no log-probability in closed form"),
        ({"expectile": 1.0}, r"offline_rl\.expectile is 1\.0"),
        ({"temperature": 0.0}, r"offline_rl\.temperature is 0\.0"),
        ({"init_from": "nowhere"}, "nowhere"),
        ({"settings": "nowhere.json"}, "nowhere"),
        ({"rollout_every": 1}, "SIMULATOR/TASK"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(dataset, tmp_path, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(rl_support.debug_config(dataset, **options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_critic_for_other_actions_is_refused(dataset, straight, tmp_path):
    config = rl_support.debug_config(dataset, action_horizon=3, init_from=str(straight / "4"))
    with pytest.raises(ValueError, match="chunks of 3 actions of 2 numbers"):
        run(config, tmp_path / "run")


def test_a_setting_that_is_none_is_named(dataset, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"gama": 0.9}))
    config = rl_support.debug_config(dataset, settings=str(path))
    with pytest.raises(ValueError, match="'gama' is no setting.*did you mean 'gamma'"):
        run(config, tmp_path / "run")


def test_a_dry_run_writes_nothing(dataset, tmp_path, capsys):
    run(rl_support.debug_config(dataset), tmp_path / "run", dry_run=True)
    assert not (tmp_path / "run").exists()
    assert "nothing was written" in capsys.readouterr().out


@pytest.mark.slow
def test_kill_9_and_the_same_command_again(dataset, straight, tmp_path):
    """On one device, in the compiled program's own process: the same bytes as without a stop."""
    options = rl_support.debug_config(dataset)
    told = ("action_horizon", "hidden_dim", "feature_dim", "num_layers", "batch_size", "num_steps",
            "log_every", "save_every", "max_to_keep", "max_token_len")  # fmt: skip
    command = [
        sys.executable,
        str(ROOT / "experiments/offline_rl.py"),
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.path={dataset}",
        "--config.data.held_out=0",
        *(f"--config.offline_rl.{name}={options.offline_rl[name]}" for name in told),
    ]
    env = commands.ONE_DEVICE | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 2"):
                break
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "4").exists()
    subprocess.run(command, env=env, check=True, capture_output=True)
    ours, theirs = (store.load_params(w / "4") for w in (tmp_path / "run", straight))
    assert_identical(ours, theirs)


def with_proposals(dataset, tmp_path, **options):
    """A config of a small π0 whose checkpoint, of random parameters, proposes chunks."""
    config = pi0_state.get_config("debug")
    model = policies.model_config(config, why="the test")
    stats = {
        key: normalize.NormStats(np.zeros(d), np.ones(d))
        for key, d in (("state", rl_support.STATE), ("actions", rl_support.ACTION))
    }
    checkpoint = tmp_path / "policy"
    store.save_params(jax.device_get(pi0.init(model, jax.random.key(0))), checkpoint, stats, "test")
    small = rl_support.debug_config(dataset, proposals=str(checkpoint), num_proposals=2, **options)
    config.offline_rl = small.offline_rl
    config.data.update({"path": str(dataset), "held_out": 0.0})
    config.evaluate.num_flow_steps = 2
    return config


def test_proposals_are_candidates_of_the_policy_alone(dataset, tmp_path):
    config = with_proposals(dataset, tmp_path, language=False)  # no encoder is shared
    run(config, tmp_path / "with")
    assert (tmp_path / "with" / "proposals" / "0" / "proposals.json").is_file()
    run(rl_support.debug_config(dataset, language=False), tmp_path / "without")
    ours, theirs = (
        trees.flatten(store.load_params(tmp_path / run / "4")) for run in ("with", "without")
    )
    changed = {path.split("/")[0] for path in theirs if not np.allclose(ours[path], theirs[path])}
    assert changed == {"policy"}  # critics and values do not learn from what was not played


def test_chunks_of_the_policy_alone_are_warned_of(dataset, tmp_path, capsys):
    config = with_proposals(dataset, tmp_path, chunk_source="policy", num_steps=2)
    run(config, tmp_path / "run")
    assert "WARNING: chunks are a policy's (offline_rl" in capsys.readouterr().out


def test_a_policy_that_fails_stops_the_job(dataset, tmp_path):
    config = with_proposals(dataset, tmp_path)
    checkpoint = tmp_path / "broken"
    params = store.load_params(tmp_path / "policy")
    params["action_out_proj"]["bias"][:] = np.nan
    _, stats = assets.norm_stats_of(tmp_path / "policy")
    store.save_params(params, checkpoint, stats, "test")
    config.offline_rl.proposals = str(checkpoint)
    with pytest.raises(FloatingPointError, match="episode"):
        run(config, tmp_path / "run")
    assert not list((tmp_path / "run").glob("[0-9]*"))


def test_the_policys_own_chunks_need_a_policy(dataset, tmp_path):
    config = rl_support.debug_config(dataset, chunk_source="policy")
    with pytest.raises(ValueError, match=r"name it with config\.offline_rl\.proposals"):
        run(config, tmp_path / "run")
