"""Configs: what OpenPI's say, field by field, and what all of them promise."""

import functools
import importlib
import inspect
import re

import jax
import numpy as np
import pytest

from configs import common
from policymix import files, trees
from policymix.checkpoints import keymaps
from policymix.data import writer
from policymix.models import pi0
from policymix.rl import config as config_lib
from policymix.rl import networks
from policymix.runs import learners, metadata, policies
from policymix.transforms import normalize, robots
from tests import commands, oracle
from tests.runs import workspace_support

NAMES = sorted(p.stem for p in (commands.ROOT / "configs").glob("pi*.py"))
# OpenPI's train configs: π0.5, horizon, proprio in the prompt; base; batch, steps, EMA; warm-up and
# both ends of the learning rate. The last two as kai0's `pi05_hang_cloth_normal` and the OpenPI
# fork of RETAIN's script have them.
OPENPI = {
    "pi0_libero": (False, 50, False, "pi0_base", 32, 30_000, 0.99, 1000, 2.5e-5, 2.5e-6),
    "pi05_libero": (True, 10, False, "pi05_base", 256, 30_000, 0.999, 10_000, 5e-5, 5e-5),
    "pi05_droid_finetune": (True, 16, True, "pi05_droid", 32, 20_000, 0.99, 1000, 2.5e-5, 2.5e-6),
    "pi0_aloha_sim": (False, 50, False, "pi0_base", 32, 20_000, 0.99, 1000, 2.5e-5, 2.5e-6),
    "pi05_hang_cloth": (True, 50, True, "pi05_base", 256, 100_000, 0.99, 1000, 2.5e-5, 2.5e-6),
    "pi05_bin_pack_coffee_capsules": (
        True, 50, True, "pi05_base", 36, 30_000, 0.999, 10_000, 5e-5, 5e-5,
    ),
}  # fmt: skip


# open-pi-zero's: size of proprio, and actions that are executed of a chunk.
OPEN_PI_ZERO = {"pi0_bridge": (7, 4), "pi0_fractal": (8, 2)}


def get(name: str, arg: str = ""):
    return importlib.import_module(f"configs.{name}").get_config(arg)


def test_every_config_is_known_here():
    assert set(NAMES) == {
        *OPENPI,
        *OPEN_PI_ZERO,
        "pi0_metaworld",
        "pi0_pusht",
        "pi0_small",
        "pi0_state",
    }


@pytest.mark.parametrize("name", OPENPI)
def test_the_values_are_openpis(name):
    config = get(name)
    pi05, horizon, discrete, base, batch, steps, ema, warmup, peak, last = OPENPI[name]
    expected = pi0.Pi0Config(pi05=pi05, action_horizon=horizon, discrete_state_input=discrete)
    assert policies.model_config(config, why="a test") == expected
    assert set(config.model) == set(pi0.Pi0Config.__dataclass_fields__)
    t = config.train
    assert t.init_from == f"gs://openpi-assets/checkpoints/{base}/params"
    assert (t.batch_size, t.num_steps, t.ema_decay) == (batch, steps, ema)
    assert (t.warmup_steps, t.learning_rate, t.final_learning_rate) == (warmup, peak, last)
    assert config.data.normalization == ("quantiles" if pi05 else "mean_std")
    assert config.data.augment
    assert set(config.data.cameras) == set(pi0.OPENPI_CAMERAS)


@pytest.mark.parametrize("name", OPEN_PI_ZERO)
def test_the_sizes_are_open_pi_zeros(name):
    """Its published figures, in billions: action expert with its projections .315, vocabulary .527,
    the rest of PaliGemma 2.4, of which it trains 2.291.
    """
    config, (proprio, executed) = get(name), OPEN_PI_ZERO[name]
    model = policies.model_config(config, why="a test")
    assert set(config.model) == set(pi0.Pi0Config.__dataclass_fields__)
    assert (model.proprio_dim, config.evaluate.replan_steps) == (proprio, executed)
    sizes = {path: leaf.size for path, leaf in trees.flatten(pi0.shapes(model)).items()}
    expert = sum(
        n for p, n in sizes.items() if any(re.fullmatch(r, p) for r in keymaps.NOT_PALIGEMMA)
    )
    embedding = sizes["PaliGemma/llm/embedder/input_embedding"]
    billions = [n / 1e9 for n in (expert, embedding, sum(sizes.values()) - expert - embedding)]
    assert [round(n, 3) for n in billions] == [0.315, 0.527, 2.397]


def test_droids_statistics_are_those_of_its_base():
    config = get("pi05_droid_finetune")
    assert config.data.asset_id == "droid"
    assert not config.data.norm_stats


@pytest.mark.parametrize("name", OPENPI)
def test_debug_is_the_architecture_of_the_test_data(name):
    config = get(name, "debug")
    model = policies.model_config(config, why="a test")
    expected = oracle.config("pi05" if model.pi05 else "pi0")
    changed = {"action_horizon", "discrete_state_input"}
    for field in set(pi0.Pi0Config.__dataclass_fields__) - changed:
        assert getattr(model, field) == getattr(expected, field), field
    assert model.action_horizon == expected.action_horizon
    assert config.data.path == str(common.PUSHT)
    assert not config.train.init_from  # no download


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("arg", ["", "debug"])
def test_every_config_has_a_model_and_the_sections_of_all(name, arg):
    config = get(name, arg)
    if name == "pi0_small":  # its sizes are its dataset's
        config.data.path = str(common.PUSHT)
    policies.model_config(metadata.complete(config), why="a test")
    assert {*common.get_config()} - {*config} == set()
    with pytest.raises(ValueError, match="'debgu': expected nothing or .*':debug'"):
        get(name, "debgu")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """For each model three step directories, a base, and validation batches."""
    root = tmp_path_factory.mktemp("checkpoints")
    for model in oracle.MODELS:
        for which in ("base", *oracle.VARIANTS)[model == "pi0" :]:  # π0's are only searched
            workspace_support.orbax(root / model / which, which, model)
        workspace_support.batches(root / model / "val.npz", model)
    return root


@pytest.mark.parametrize("name", sorted({*NAMES} - {"pi0_metaworld"}))
def test_the_training_commands_of_the_docstring(name, tmp_path, monkeypatch, capsys):
    """Their plans, of the small version of each, whose data is there."""
    monkeypatch.chdir(tmp_path)
    docstring = inspect.getdoc(importlib.import_module(f"configs.{name}"))
    for words in commands.of_docstring(docstring):
        if "train.py" not in words[1]:
            continue
        if any(":small" in word for word in words):  # of recipes, which are run elsewhere
            continue
        kept = [word for word in words if not word.startswith("--config.data.")]
        data = f"--config.data.path={common.PUSHT}"
        commands.run(kept, data, "--config.train.batch_size=64", "--dry_run")
        assert "dry run: nothing was computed" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted({*OPENPI} - {"pi0_aloha_sim"}))
def test_the_command_of_the_docstring(name, checkpoints, tmp_path, monkeypatch, capsys):
    """Its plan, without the work: names of flags and fields, paths, and that it all fits."""
    monkeypatch.chdir(tmp_path)
    docstring = inspect.getdoc(importlib.import_module(f"configs.{name}"))
    (words,) = (words for words in commands.of_docstring(docstring) if "mix.py" in words[1])
    assert f"--config=configs/{name}.py" in words
    model = "pi05" if get(name).model.pi05 else "pi0"
    more = [f"--config.train.init_from={checkpoints / model / 'base'}", "--dry_run"]
    for word in words:
        flag, _, value = word.partition("=")
        if flag == "--checkpoints":
            for path, which in zip(value.split(","), oracle.VARIANTS, strict=False):
                (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / path).symlink_to(checkpoints / model / which)
        if flag == "--validation":
            (tmp_path / value).symlink_to(checkpoints / model / "val.npz")
    commands.run(words, *more)
    assert "dry run: nothing was computed" in capsys.readouterr().out


# Configs of chunk-level offline RL on LIBERO; rlvla's settings by the names it gives them.
LEARNERS = ("rl_libero", "rlvla")
RLVLA = {
    "action_horizon": 10, "gamma": 0.99, "beta": 1.0, "lambda_v": 1.0, "lambda_pi": 1.0,
    "lr": 3e-4, "batch_size": 32, "num_epochs": 100, "hidden_dim": 512, "image_size": 256,
    "log_interval": 100, "save_interval": 10,
}  # fmt: skip


def test_rlvlas_settings_are_its_own(tmp_path):
    """Its config.json, read over them, changes nothing; and what that does not say."""
    files.write_json(tmp_path / "config.json", RLVLA)
    config = get("rlvla")
    before = config.to_dict()
    config.offline_rl.settings = str(tmp_path / "config.json")
    assert learners.complete(config).to_dict()["offline_rl"] == before["offline_rl"]
    r = config.offline_rl
    assert (r.algorithm, r.policy, r.network) == ("chunk_soft", "gaussian", "fused")
    assert (r.chunk_reward, r.terminals, r.tails) == ("max", "rlvla", "drop")
    assert (r.entropy_temperature, r.num_samples, r.min_std) == (1.0, 5, 1e-6)
    assert (r.max_weight, r.normalize_weights, r.num_critics, r.ema_decay) == (0.0, True, 1, 0.0)
    assert not r.language
    assert not config.data.held_out


def test_rlvla_normalises_nothing():
    config = get("rlvla")
    rng = np.random.default_rng(0)
    raw = {"state": rng.normal(size=(3, 8)), "actions": rng.normal(size=(3, 10, 7))}
    sizes = {"state": 8, "actions": 7}
    stats = {key: normalize.NormStats(np.full(d, 3.0), np.full(d, 2.0)) for key, d in sizes.items()}
    found = normalize.Normalize(stats, config.data.normalization).apply(raw)
    for key, values in raw.items():
        np.testing.assert_array_equal(found[key], values)


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("arg", ["", "debug"])
def test_learners_have_the_fields_of_all_and_the_policy_that_proposes(name, arg):
    config, base = get(name, arg), get("pi05_libero", arg)
    assert config.model.to_dict() == base.model.to_dict()
    assert set(config.offline_rl) == set(common.get_config().offline_rl)
    assert config.offline_rl.action_horizon <= config.model.action_horizon
    robot = robots.find("libero")
    cameras = {c: f for c, f in config.data.cameras.items() if f != "absent"}
    if not arg:
        assert cameras == robot.cameras
        assert config.data.tokenizer == base.data.tokenizer
    with pytest.raises(ValueError, match="expected nothing or ':debug'"):
        get(name, "debgu")


@pytest.mark.parametrize("name", LEARNERS)
def test_a_debug_learner_is_small_and_of_pusht(name):
    config = learners.complete(get(name, "debug"))
    assert config.data.path == str(common.PUSHT)
    assert (config.offline_rl.num_steps, config.offline_rl.num_epochs) == (4, 0)
    model = learners.settings(config)
    assert (model.action_dim, model.proprio_dim, model.image_keys) == (2, 2, ("base_0_rgb",))
    params = jax.eval_shape(functools.partial(networks.init, model), jax.random.key(0))
    assert trees.num_params(params) < 3_000_000


@pytest.mark.parametrize("arg", ["", "debug"])
def test_the_learner_of_meta_world_sees_states_and_its_commands_run(arg, tmp_path, capsys):
    """The docstring's commands, but for the work: their flags and fields, and that all fits."""
    config = get("rl_metaworld", arg)
    assert set(config.offline_rl) == set(common.get_config().offline_rl)
    assert not config.model
    width = {"observation.state": 39, "action": 4, "next.success": 1, "subgoal": 1}
    features = {
        name: {"dtype": "float32", "shape": [n], "names": None} for name, n in width.items()
    }
    with writer.Writer(tmp_path / "labelled", fps=80, features=features) as dataset:
        dataset.add_episode({name: np.ones((9, n)) for name, n in width.items()}, "plate slide")
    config.data.path = str(tmp_path / "labelled")
    model = learners.settings(learners.complete(config))
    assert (model.action_dim, model.proprio_dim, model.image_keys) == (4, 39, ())
    assert model.max_token_len
    docstring = inspect.getdoc(importlib.import_module("configs.rl_metaworld"))
    collect, _, train, _ = commands.of_docstring(docstring)
    commands.run(collect, f"--output={tmp_path / 'attempts'}", "--dry_run")
    more = f"--config.data.path={config.data.path}", f"--workdir={tmp_path / 'run'}"
    commands.run(train, *more, "--dry_run")
    printed = capsys.readouterr().out
    assert "attempts (expert, slow, biased, noisy, wandering) of each of" in printed
    assert "dry run: nothing was computed" in printed


def test_the_sizes_of_rlvla_are_its_networks():
    """As its own program counts them, without the layer for language that it never calls."""
    model = config_lib.LearnerConfig(
        **{
            name: get("rlvla").offline_rl[name]
            for name in ("algorithm", "network", "num_critics", "hidden_dim", "feature_dim")
        },
        image_keys=("base_0_rgb", "left_wrist_0_rgb"),
    )
    params = jax.eval_shape(functools.partial(networks.init, model), jax.random.key(0))
    unused = 128 * 256 + 256
    assert {name: trees.num_params(p) for name, p in params.items()} == {
        "critic": 7_294_433 - unused, "value": 6_172_129 - unused, "policy": 6_601_836 - unused,
    }  # fmt: skip
