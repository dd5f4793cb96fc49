"""Evaluation: what it writes of whom, that it adds up, and what it refuses before the work."""

import json
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from configs import pi0_libero
from policymix import intervals
from policymix.checkpoints import assets, provenance, store
from policymix.runs import collect_demos, dump_validation, evaluate, mix, rollouts
from policymix.sim import workers
from tests import commands, oracle
from tests.runs.sim_support import CONFIG, ROOT, debug_config, write_policy

pytest.importorskip("metaworld")

ENV = "metaworld/handle-press-v3,reach-v3"


@pytest.fixture(scope="module")
def pool():
    with workers.Pool(2) as shared:
        yield shared


@pytest.fixture(scope="module")
def made(pool, tmp_path_factory):
    """Two checkpoints, validation batches, and the mix of the two that these chose: paths."""
    root = tmp_path_factory.mktemp("made")
    one, two = (write_policy(root / "runs" / str(seed) / "20", seed) for seed in (0, 1))
    collect_demos.collect("metaworld/reach-v3", root / "demos", num_episodes=4, pool=pool)
    config = debug_config()
    config.data.update({"path": str(root / "demos"), "held_out": 1, "norm_stats": one})
    dump_validation.dump(config, root / "val.npz", num_batches=4)
    request = mix.Request(
        (one, two), root / "mix", method="inverse_loss", validation=str(root / "val.npz")
    )
    mix.mix(debug_config(), request)
    return {"one": one, "two": two, "mix": str(root / "mix"), "val": str(root / "val.npz")}


def run(pool, output, *checkpoints, config=None, **fields):
    request = evaluate.Request(checkpoints, output, **{"env": ENV} | fields)
    return evaluate.evaluate(config or debug_config(num_episodes=3), request, pool)


@pytest.fixture(scope="module")
def report(made, pool, tmp_path_factory):
    """Of all three, as evaluation.json has it."""
    output = tmp_path_factory.mktemp("reports") / "all"
    told = run(pool, output, made["one"], made["two"], made["mix"], validation=made["val"])
    assert json.loads((output / "evaluation.json").read_text()) == told
    return told


def test_leaves_a_table_a_picture_and_a_page(made, pool, tmp_path, capsys):
    run(pool, tmp_path / "out", made["one"], made["two"], names=("first", "second"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "evaluation.json",
        "report.html",
        "report.png",
    ]
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "second" in (tmp_path / "out" / "report.html").read_text()
    out = capsys.readouterr().out
    assert "first: " in out
    assert "of 6 episodes succeeded" in out
    assert "written to" in out


def test_what_is_counted_adds_up(report):
    assert report["tasks"] == ["handle-press-v3", "reach-v3"]
    for policy in report["policies"]:
        outcomes = policy["outcomes"]
        assert policy["episodes"] == len(outcomes) == 6
        assert policy["successes"] == sum(outcomes)
        assert policy["interval"] == list(intervals.wilson(sum(outcomes), 6))
        assert policy["seeds"] == [1000, 1001, 1002] * 2
        assert policy["mean_score"] == pytest.approx(np.mean(policy["scores"]), abs=1e-4)
        for part, task in enumerate(report["tasks"]):
            mine, told = outcomes[3 * part : 3 * part + 3], policy["by_task"][task]
            assert (told["episodes"], told["successes"]) == (3, sum(mine))
            assert told["interval"] == list(intervals.wilson(sum(mine), 3))
        for success, steps in zip(outcomes, policy["steps"], strict=True):
            assert 1 <= steps <= 36
            assert success or steps == 36
    assert 0 < report["policies"][0]["successes"] < 6  # else much of this says nothing


def test_settings_versions_and_costs_are_told(report):
    assert report["settings"]["env"] == ENV
    assert report["settings"]["max_steps"] == 36
    assert report["simulator"]["name"] == "metaworld"
    assert report["simulator"]["versions"].keys() == {"metaworld", "mujoco", "gymnasium"}
    assert report["peak_memory_bytes"]["policy"] > 50e6
    assert report["peak_memory_bytes"]["environments"] > 50e6
    assert 0 < sum(policy["seconds"] for policy in report["policies"]) <= report["seconds"]


def test_checkpoints_are_named_by_what_sets_their_paths_apart(report, made):
    assert [policy["name"] for policy in report["policies"]] == ["runs/0/20", "runs/1/20", "mix"]
    for policy, path in zip(
        report["policies"], (made["one"], made["two"], made["mix"]), strict=True
    ):
        assert policy["path"] == path
        assert policy["fingerprint"] == provenance.fingerprint(path)


def test_losses_are_those_that_the_mix_reports(report, made):
    told = json.loads((pathlib.Path(made["mix"]) / "mix.json").read_text())
    losses = [policy["loss"] for policy in report["policies"]]
    assert losses[:2] == [entry["loss"] for entry in told["inputs"]]
    assert losses[2] == pytest.approx(told["loss"], rel=1e-6)
    assert losses[0] != losses[1]
    assert report["validation"]["path"] == made["val"]
    assert report["validation"]["batches"] == told["validation"]["batches"]


def test_a_policys_results_do_not_depend_on_the_others(report, made, pool, tmp_path):
    alone = run(pool, tmp_path / "alone", made["two"])["policies"][0]
    among = report["policies"][1]
    for key in ("outcomes", "steps", "scores", "seeds", "successes"):
        assert alone[key] == among[key]
    assert alone["loss"] is None
    assert among["steps"] != report["policies"][0]["steps"]


def test_an_evaluation_is_replaced_only_if_told_and_nothing_else_ever(made, pool, tmp_path):
    output, config = tmp_path / "out", debug_config(num_episodes=1, max_steps=8)
    run(pool, output, made["one"], config=config)
    with pytest.raises(FileExistsError, match="pass --overwrite"):
        run(pool, output, made["two"], config=config)
    told = run(pool, output, made["two"], config=config, overwrite=True)
    assert json.loads((output / "evaluation.json").read_text()) == told
    thesis = tmp_path / "mine"
    thesis.mkdir()
    (thesis / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="not written by this command"):
        run(pool, thesis, made["one"], config=config, overwrite=True)
    assert (thesis / "thesis.tex").read_text() == "precious"


def test_an_error_in_the_middle_leaves_nothing(made, pool, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("a simulator process was killed")

    monkeypatch.setattr(rollouts, "roll_out", fail)
    with pytest.raises(OSError, match="was killed"):
        run(pool, tmp_path / "out", made["one"])
    assert not list(tmp_path.iterdir())


def test_dry_run_starts_no_process_and_writes_nothing(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workers, "Pool", None)
    run(None, tmp_path / "out", made["one"], made["two"], dry_run=True)
    assert "2 policies, 6 episodes each: 3 of handle-press-v3, reach-v3" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


# What is refused


def refused(output, *checkpoints, config=None, **fields):
    """Before any process starts: there is no pool."""
    run(None, output, *checkpoints, config=config, **fields)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replan_steps": 9}, r"replan_steps is 9, but a chunk of .* has 8 actions"),
        ({"replan_steps": -1}, "replan_steps is -1; at least 0"),
        ({"num_episodes": 0}, "num_episodes is 0; at least 1"),
        ({"seed": 2**32 - 1}, "seed is 4294967295; seeds end at 4294967295"),
        ({"num_flow_steps": 0}, "num_flow_steps is 0; at least 1"),
        ({"seed": -1}, "seed is -1; at least 0"),
        ({"max_steps": 501}, "max_steps is 501; metaworld ends its episodes after 500"),
        ({"num_workers": -1}, "num_workers is -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(made, tmp_path, monkeypatch, settings, message):
    monkeypatch.setattr(workers, "Pool", None)
    with pytest.raises(ValueError, match=message):
        refused(tmp_path / "out", made["one"], config=debug_config(**settings))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"env": "metaworld/reech-v3"}, "no task 'reech-v3'.*did you mean reach-v3"),
        ({"env": "mujoco/reach-v3"}, "unknown simulator 'mujoco'"),
        ({"env": "reach-v3"}, "expected SIMULATOR/TASK"),
        ({"env": "metaworld/window-close-v3@0:0.2"}, "every start .* the same x"),
        ({"names": ("a",)}, "1 names for 2 checkpoints"),
        ({"names": ("a", "a")}, "checkpoints are named twice"),
        ({"validation": "nowhere.npz"}, "nowhere.npz does not exist"),
        ({"validation": str(oracle.OPENPI / "pi0" / "val_batches.npz")}, "actions of batch 0"),
    ],
)
def test_requests_that_cannot_be_are_refused(made, tmp_path, monkeypatch, fields, message):
    monkeypatch.setattr(workers, "Pool", None)
    with pytest.raises((ValueError, OSError), match=message):
        refused(tmp_path / "out", made["one"], made["two"], **fields)
    assert not list(tmp_path.iterdir())


def test_checkpoints_that_do_not_act_are_refused(made, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "Pool", None)
    out, params = tmp_path / "out", store.load_params(made["one"])
    store.save_params(params, tmp_path / "bare")
    stats = assets.norm_stats_of(made["one"])[1]
    state, actions = stats["state"], stats["actions"]
    other = tmp_path / "long", tmp_path / "short"
    store.save_params(params, other[0], {"state": state, "actions": state}, "arm")
    store.save_params(params, other[1], {"state": actions, "actions": actions}, "arm")
    for checkpoint, message in (
        (str(tmp_path / "bare"), "/bare has no norm stats beside it"),
        (
            str(other[0]),
            "/long has norm stats for 39 numbers of 'actions' and room for 4; .* have 4",
        ),
        (str(other[1]), "/short has norm stats for 4 numbers of 'state' .* environments have 39"),
        (str(tmp_path / "nowhere"), "/nowhere does not exist"),
        (str(oracle.step("pi0", "base")), "config.model and .*/base/1000"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            refused(out, made["one"], checkpoint)
    with pytest.raises(ValueError, match="--checkpoints is empty"):
        refused(out)
    with pytest.raises(ValueError, match="matches no checkpoint"):
        refused(out, str(out / "*"))
    with pytest.raises(ValueError, match="overlaps the input"):
        refused(pathlib.Path(made["one"]) / "evaluation", made["one"])
    assert not out.exists()


@pytest.mark.parametrize(
    ("data", "model", "message"),
    [
        ({"state_key": "observation.stat"}, {}, "state_key is 'observation.stat'; .* observe obs"),
        ({"cameras": {"base": "top"}}, {"image_keys": ("base",)}, "config.model and"),
        ({}, {"action_horizon": 4}, "replan_steps is 8, but a chunk of .* has 4"),
        ({"tokenizer": "letters"}, {}, "tokenizer is 'letters'"),
    ],
)
def test_configs_of_another_robot_are_refused(made, tmp_path, monkeypatch, data, model, message):
    monkeypatch.setattr(workers, "Pool", None)
    config = debug_config()
    config.data.update(data)
    config.model.update(model)
    with pytest.raises(ValueError, match=message):
        refused(tmp_path / "out", made["one"], config=config)
    assert not list(tmp_path.iterdir())


def test_cameras_that_the_environment_lacks_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "Pool", None)
    config = pi0_libero.get_config("debug")
    named = dict.fromkeys(config.model.image_keys, "observation.image")
    config.data.cameras = named
    config.evaluate.replan_steps = 6
    message = r"cameras.base_0_rgb is 'observation.image'; .* observe observation.state \[39\]"
    with pytest.raises(ValueError, match=message):
        refused(tmp_path / "out", str(oracle.step("pi0", "base")), config=config)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_kill_9_in_the_middle_leaves_nothing_that_looks_like_an_evaluation(made, tmp_path):
    command = [
        sys.executable,
        str(ROOT / "experiments/evaluate.py"),
        CONFIG,
        f"--checkpoints={made['one']},{made['two']},{made['mix']}",
        f"--env={ENV}",
        f"--output={tmp_path / 'out'}",
        "--config.evaluate.num_episodes=12",
        "--config.evaluate.max_steps=60",
    ]
    env = commands.ONE_DEVICE | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if "episodes succeeded" in line:  # the first policy has finished
                break
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    subprocess.run(command, env=env, check=True, timeout=300, capture_output=True)
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [policy["episodes"] for policy in told["policies"]] == [24] * 3
