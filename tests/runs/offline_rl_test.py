"""Chunk-level training: exact resume, what lies beside a checkpoint, who takes it, refusals."""

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from configs import common, pi0_state
from policymix import metrics, trees
from policymix.checkpoints import assets, store
from policymix.models import pi0
from policymix.rl import learner as learner_lib
from policymix.rl.config import LearnerConfig
from policymix.runs import chunk_policies, evaluate, offline_rl, policies, requests, rollouts
from policymix.runs import mix as mix_lib
from policymix.sim import envs
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


def test_updates_of_one_call_are_the_same_updates(dataset, straight, tmp_path, monkeypatch):
    config = rl_support.debug_config(dataset, updates_per_call=3, log_every=4, save_every=4)
    asked, many = [], learner_lib.update_many

    def watched(learner, state, batches, root_key):
        asked.append(len(batches.actions))
        return many(learner, state, batches, root_key)

    monkeypatch.setattr(learner_lib, "update_many", watched)
    monkeypatch.setattr(offline_rl, "_compiled", offline_rl._compiled.__wrapped__)
    run(config, tmp_path / "run")
    assert asked == [3, 1]
    ours, theirs = (trees.flatten(store.load_params(w / "4")) for w in (tmp_path / "run", straight))
    for path, array in theirs.items():
        np.testing.assert_allclose(ours[path], array, atol=1e-5, err_msg=path)


def test_two_devices_compute_what_one_does(dataset, straight, tmp_path):
    config = rl_support.debug_config(dataset, save_every=4)
    offline_rl.train(config, tmp_path / "run", devices=jax.devices()[:2])
    ours, theirs = (trees.flatten(store.load_params(w / "4")) for w in (tmp_path / "run", straight))
    for path, array in theirs.items():
        np.testing.assert_allclose(ours[path], array, atol=1e-6, err_msg=path)


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


@pytest.fixture(scope="module")
def mixed(dataset, straight, tmp_path_factory):
    """The mean of two runs, and its inputs."""
    root = tmp_path_factory.mktemp("mixed")
    run(rl_support.debug_config(dataset, seed=1), root / "other")
    inputs = [str(straight / "4"), str(root / "other" / "4")]
    request = requests.Request(checkpoints=tuple(inputs), output=root / "mixed")
    mix_lib.mix(rl_support.debug_config(dataset), request)
    return root / "mixed", inputs


def seen(config, checkpoint):
    """Tokens of an instruction, and the policy that reads it; it acts."""
    policy = chunk_policies.ChunkPolicy(config, str(checkpoint))
    raw = {"state": np.zeros((1, rl_support.STATE), np.float32), "prompt": ["push the block"]}
    assert np.isfinite(policy.act(raw | {"images": {}}, seeds=[0], call=0)).all()
    return policy.encoder.observation(raw | {"images": {}}).prompt_tokens, policy


def test_its_checkpoints_mix(mixed):
    output, inputs = mixed
    parts = [trees.flatten(store.load_params(path)) for path in inputs]
    for path, array in trees.flatten(store.load_params(output)).items():
        expected = (parts[0][path] + parts[1][path]) / 2
        np.testing.assert_allclose(array, expected, atol=1e-6, err_msg=path)


def test_a_mix_reads_what_its_inputs_read(mixed):
    """Whatever the command says that evaluates it: the run of its first input is asked."""
    output, inputs = mixed
    config = common.get_config()
    assert config.data.tokenizer != config.offline_rl.tokenizer
    expected, policy = seen(config, inputs[0])
    for path in (output, output / "0", output / "0" / "params"):
        tokens, mixed_policy = seen(config, path)
        np.testing.assert_array_equal(tokens, expected)
        assert mixed_policy.model == policy.model
    config.data.cameras = {"top": "observation.image"}
    np.testing.assert_array_equal(seen(config, output)[0], expected)


def test_a_mix_of_mixes_and_one_whose_first_input_is_gone(mixed, dataset, tmp_path):
    output, inputs = mixed
    request = requests.Request(checkpoints=(str(output), inputs[1]), output=tmp_path / "again")
    mix_lib.mix(rl_support.debug_config(dataset), request)
    expected, _ = seen(common.get_config(), inputs[0])
    np.testing.assert_array_equal(seen(common.get_config(), tmp_path / "again")[0], expected)
    told = json.loads((tmp_path / "again" / "mix.json").read_text())
    told["inputs"][0]["path"] = str(tmp_path / "again")  # which leads in circles
    (tmp_path / "again" / "mix.json").write_text(json.dumps(told))
    np.testing.assert_array_equal(seen(common.get_config(), tmp_path / "again")[0], expected)


def test_a_step_without_its_run_is_read_as_the_config_says(straight, tmp_path):
    shutil.copytree(straight / "4", tmp_path / "copied" / "4")
    config = rl_support.debug_config("", hidden_dim=512, pictures=False)
    config.data.cameras = {"top": "observation.image"}
    path = tmp_path / "settings.json"
    path.write_text('{"hidden_dim": 16}')
    config.offline_rl.settings = str(path)
    expected, _ = seen(config, straight / "4")
    tokens, policy = seen(config, tmp_path / "copied" / "4")
    np.testing.assert_array_equal(tokens, expected)
    assert policy.model.image_keys == ()
    assert config.data.tokenizer == "bytes"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda told: told["learner"].update(novel=1), "'learner' has 'novel', which are no"),
        (lambda told: told["data"].update(novel=1), "'data' has 'novel', which are no settings"),
        (lambda told: told.update(learner=[1]), "an object 'learner' of settings, found list"),
        (lambda told: told.pop("learner"), "an object 'learner' of settings, found nothing"),
        (lambda told: told.pop("data"), "an object 'data' of settings, found nothing"),
        (lambda told: told["learner"].update(hidden_dim="a"), "hidden_dim is 'a'; expected a whol"),
        (lambda told: told["learner"].update(image_keys=3), "image_keys is 3; expected texts"),
        (lambda told: told["data"].update(fps=[1]), "is not as a run writes it"),
    ],
)
def test_a_record_that_is_not_understood_is_named(straight, tmp_path, change, message):
    shutil.copytree(straight / "4", tmp_path / "run" / "4")
    told = json.loads((straight / "config.json").read_text())
    change(told)
    (tmp_path / "run" / "config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=message) as caught:
        chunk_policies.ChunkPolicy(common.get_config(), str(tmp_path / "run" / "4"))
    assert str(tmp_path / "run" / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


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


def test_its_norm_stats_are_those_of_where_it_starts(dataset, straight, tmp_path, capsys):
    other = rl_support.write_dataset(tmp_path / "other", seed=1, length=9)
    run(rl_support.debug_config(other, init_from=str(straight / "4")), tmp_path / "run")
    assert f"norm stats from {straight / '4'}" in capsys.readouterr().out
    (_, ours), (_, theirs) = (assets.norm_stats_of(w / "4") for w in (tmp_path / "run", straight))
    for key in ("state", "actions"):
        np.testing.assert_array_equal(ours[key].mean, theirs[key].mean)
        np.testing.assert_array_equal(ours[key].std, theirs[key].std)
    run(rl_support.debug_config(other), tmp_path / "own", dry_run=True)
    assert "norm stats from the training episodes" in capsys.readouterr().out


def test_another_config_does_not_resume(dataset, straight):
    with pytest.raises(ValueError, match=r"offline_rl\.discount: 0\.99 then, 0\.9 now"):
        run(rl_support.debug_config(dataset, discount=0.9), straight)


def diverge(monkeypatch):
    """From now on every update ends in what is not a number."""
    many = learner_lib.update_many

    def diverging(*args):
        state, values = many(*args)
        broken = jax.tree.map(lambda x: x * np.float32(np.nan), state.params)
        return state.replace(params=broken), values | {"loss": values["loss"] * np.nan}

    monkeypatch.setattr(learner_lib, "update_many", diverging)
    monkeypatch.setattr(offline_rl, "_compiled", offline_rl._compiled.__wrapped__)


@pytest.mark.parametrize("updates_per_call", [1, 2])  # told at step 3, or as 4 is to be saved
def test_a_diverged_run_stops_and_keeps_the_last_checkpoint(
    dataset, straight, tmp_path, monkeypatch, updates_per_call
):
    options = {"max_to_keep": 1, "log_every": 100}
    workdir = tmp_path / "run"
    run(rl_support.debug_config(dataset, num_steps=2, **options), workdir)
    before = store.load_params(workdir / "2")
    config = rl_support.debug_config(dataset, updates_per_call=updates_per_call, **options)
    with monkeypatch.context() as patch:
        diverge(patch)
        with pytest.raises(FloatingPointError, match=r"loss not finite at step [34] .*is intact"):
            run(config, workdir)
    assert [p.name for p in workdir.iterdir() if p.name.isdigit()] == ["2"]
    assert_identical(store.load_params(workdir / "2"), before)
    run(rl_support.debug_config(dataset, **options), workdir)
    assert_identical(store.load_params(workdir / "4"), store.load_params(straight / "4"))


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
        ({"seed": 2**32}, r"offline_rl\.seed is 4294967296; seeds end at 4294967295"),
        ({"learning_rate": np.inf}, r"offline_rl\.learning_rate is inf; expected a finite number"),
        ({"reward_shift": np.nan}, r"offline_rl\.reward_shift is nan; expected a finite number"),
        ({"batch_size": None}, r"offline_rl\.batch_size is None; expected a whole number"),
        ({"num_epochs": True}, r"offline_rl\.num_epochs is True; expected a whole number"),
        ({"proposals": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(dataset, tmp_path, options, message):
    config = rl_support.debug_config(dataset, **options)
    config.model = pi0_state.get_config("debug").model
    for told in ({}, {"dry_run": True}):
        with pytest.raises((ValueError, OSError), match=message) as caught:
            run(config, tmp_path / "run", **told)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [{"proposals": "nowhere"}, {"init_from": "nowhere"}, {"clip_norm": np.inf},
     {"rollout_every": 1}],
)  # fmt: skip
def test_what_is_refused_does_not_take_the_place_of_a_run(dataset, tmp_path, options):
    workdir = tmp_path / "run"
    run(rl_support.debug_config(dataset, num_steps=2), workdir)
    before = sorted(workdir.rglob("*"))
    config = rl_support.debug_config(dataset, **options)
    config.model = pi0_state.get_config("debug").model
    with pytest.raises((ValueError, OSError)):
        run(config, workdir, overwrite=True)
    assert sorted(workdir.rglob("*")) == before
    assert store.load_params(workdir / "2")


def test_a_config_that_its_record_cannot_keep_is_refused(dataset, straight, tmp_path):
    config = rl_support.debug_config(dataset)
    config.data.fractions = (np.inf,)
    with pytest.raises(ValueError, match=r"data\.fractions is \(inf,\), which config\.json"):
        run(config, tmp_path / "run")


def test_a_critic_for_other_actions_is_refused(dataset, straight, tmp_path):
    config = rl_support.debug_config(dataset, action_horizon=3, init_from=str(straight / "4"))
    message = (
        r"chunks of 3 actions of 2 numbers, proprio of 3 and cameras \[\]: critic/.* is "
        r"\([\d, ]+\) there and \([\d, ]+\) here$"
    )
    with pytest.raises(ValueError, match=message):
        run(config, tmp_path / "run")


def test_another_algorithms_learner_or_a_pi0_is_named_first(dataset, straight, tmp_path):
    config = rl_support.debug_config(dataset, algorithm="cloning", init_from=str(straight / "4"))
    message = (
        r"holds the networks critic, encoder, policy, value, and cloning as the config has it the "
        r"networks encoder, policy: another algorithm's"
    )
    with pytest.raises(ValueError, match=message) as caught:
        run(config, tmp_path / "run")
    assert len(str(caught.value)) - len(str(straight)) < 250
    header = {"PaliGemma": {}, "action_in_proj": {"kernel": np.zeros((2, 2))}}
    model = chunk_policies.ChunkPolicy(config, str(straight / "4")).model
    with pytest.raises(ValueError, match="a/b holds no π0 that is known, and a chunk-level"):
        chunk_policies.check(model, header, "a/b")


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


# Roll-outs and what is held out


def pretend(monkeypatch, played):
    """Environments of the dataset's robot; `played` is what comes of every roll-out."""
    features = {"observation.state": (rl_support.STATE,), "action": (rl_support.ACTION,)}
    told = {name: {"dtype": "float32", "shape": shape} for name, shape in features.items()}
    env = types.SimpleNamespace(features=told, prompt="push the block")
    monkeypatch.setattr(envs, "make", lambda task: env)
    monkeypatch.setattr(rollouts, "play", played)
    return env


def rolling(dataset, options=(), **evaluating):
    config = rl_support.debug_config(dataset, rollout_every=2, **dict(options))
    config.evaluate.update({"env": "metaworld/reach-v3", "num_episodes": 2, "replan_steps": 0})
    config.evaluate.update(evaluating)
    return config


def test_metrics_of_a_step_come_in_order(dataset, tmp_path, monkeypatch):
    pretend(monkeypatch, lambda policy, config: {"rollout/success": 0.5})
    config = rolling(dataset, {"log_every": 1, "updates_per_call": 2})
    config.data.held_out = 0.5
    run(config, tmp_path / "run")
    rows = list(metrics.read(tmp_path / "run" / "metrics.jsonl"))
    kinds = [next(k for k in ("held_out", "rollout", "loss") if k in str(row)) for row in rows]
    steps = [row["step"] for row in rows]
    assert list(zip(steps, kinds, strict=True)) == [
        (1, "loss"), (2, "loss"), (2, "held_out"), (2, "rollout"),
        (3, "loss"), (4, "loss"), (4, "held_out"), (4, "rollout"),
    ]  # fmt: skip
    assert (rows[3]["rollout/success"], rows[1]["steps_per_second"] > 0) == (0.5, True)
    assert "critic/grad_norm" in rows[1]
    assert "held_out/critic/loss" in rows[2]
    assert not [name for row in rows for name in row if name.startswith("held") and "grad" in name]


def test_a_roll_out_that_fails_loses_neither_metrics_nor_the_checkpoint(
    dataset, tmp_path, monkeypatch
):
    def fail(policy, config):
        raise OSError("a simulator process was killed")

    pretend(monkeypatch, fail)
    with pytest.raises(OSError, match="was killed"):
        run(rolling(dataset), tmp_path / "run")
    assert [row["step"] for row in metrics.read(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    assert store.load_params(tmp_path / "run" / "2")


@pytest.mark.parametrize(
    ("evaluating", "message"),
    [
        ({"num_episodes": 0}, "num_episodes is 0; at least 1"),
        ({"seed": 2**32 - 1}, "seed is 4294967295; seeds end"),
        ({"max_steps": 501}, "max_steps is 501"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"replan_steps": -1}, "replan_steps is -1; at least 0"),
        ({"replan_steps": 5}, "replan_steps is 5, but a chunk of .*/run has 4 actions"),
    ],
)
def test_roll_outs_that_cannot_be_are_refused_before_training(
    dataset, tmp_path, monkeypatch, evaluating, message
):
    pretend(monkeypatch, lambda policy, config: {"rollout/success": 0.5})
    with pytest.raises(ValueError, match=message):
        run(rolling(dataset, **evaluating), tmp_path / "run", dry_run=True)
    with pytest.raises(ValueError, match=message):
        run(rolling(dataset, **evaluating), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_environments_of_another_robot_are_refused_before_training(dataset, tmp_path, monkeypatch):
    env = pretend(monkeypatch, lambda policy, config: {"rollout/success": 0.5})
    env.features["action"]["shape"] = (7,)
    with pytest.raises(ValueError, match="/run has norm stats for 2 numbers of 'actions'"):
        run(rolling(dataset), tmp_path / "run")
    env.features = {"observation.image": {"shape": (8, 8, 3)}}
    with pytest.raises(ValueError, match=r"state_key is 'observation.state'; the environments obs"):
        run(rolling(dataset), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_learner_has_no_validation_loss(straight, tmp_path, monkeypatch):
    request = evaluate.Request(
        (str(straight / "4"),), tmp_path / "out", env="metaworld/reach-v3", validation="v.npz"
    )
    with pytest.raises(ValueError, match="/4 is a chunk-level learner, which has no validation"):
        evaluate.evaluate(common.get_config(), request)
    assert not (tmp_path / "out").exists()


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


def test_a_dry_run_looks_at_proposals_and_makes_none(dataset, tmp_path, capsys, monkeypatch):
    config = with_proposals(dataset, tmp_path, chunk_source="policy")
    monkeypatch.setattr(policies, "read_params", None)
    run(config, tmp_path / "run", dry_run=True)
    assert "nothing was written" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_policy_that_cannot_propose_is_refused_first(dataset, tmp_path):
    config, workdir = with_proposals(dataset, tmp_path), tmp_path / "run"
    run(rl_support.debug_config(dataset, num_steps=2), workdir)
    before = sorted(workdir.rglob("*"))
    wide = {key: normalize.NormStats(np.zeros(9), np.ones(9)) for key in ("state", "actions")}
    store.save_params(store.load_params(tmp_path / "policy"), tmp_path / "wide", wide, "test")
    store.save_params(store.load_params(tmp_path / "policy"), tmp_path / "bare")
    shutil.copytree(workdir / "2", tmp_path / "learner")
    model = config.model.to_dict()
    for options, of_policy, message in (
        ({"proposals": str(tmp_path / "wide")}, model, "belongs to another robot"),
        ({"proposals": str(tmp_path / "bare")}, model, "has no norm stats beside it"),
        ({"proposals": str(tmp_path / "learner")}, model, r"config\.model and .*/learner"),
        ({"action_horizon": 99}, model, r"action_horizon is 99, and .*/policy proposes chunks of"),
        ({}, {}, r"config\.offline_rl\.proposals needs a model"),
    ):
        refused = config.copy_and_resolve_references()
        refused.offline_rl.update(options)
        refused.model = of_policy
        with pytest.raises(ValueError, match=message):
            run(refused, tmp_path / "new", dry_run=True)
        with pytest.raises(ValueError, match=message):
            run(refused, workdir, overwrite=True)
    assert not (tmp_path / "new").exists()
    assert sorted(workdir.rglob("*")) == before


def test_chunks_of_the_policy_alone_are_warned_of(dataset, tmp_path, capsys):
    config = with_proposals(dataset, tmp_path, chunk_source="policy", num_steps=2)
    run(config, tmp_path / "run")
    assert "WARNING: chunks are a policy's (config.offline_rl" in capsys.readouterr().out


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
