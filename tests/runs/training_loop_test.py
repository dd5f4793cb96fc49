"""The steps of a run: resumed with every way to keep a state, stopped, watched, and ended by what
is not finite.
"""

import dataclasses
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from configs import pi0_state
from policymix import files, metrics, nf4, trees
from policymix.checkpoints import store
from policymix.data import lerobot
from policymix.reports import trainings
from policymix.runs import rollouts, train, train_settings, training_loop
from tests.runs.train_test import assert_identical, train_state

# Ways to keep a state and to make a step.
WAYS = {
    "everything_else": {
        "optimizer": "adamw_8bit",
        "offload": True,
        "accumulate": 2,
        "pull": 0.1,
        "learning_rates": ("PaliGemma/llm/.*=0.5",),
        "mask_padded_steps": True,
        "mask_padded_dims": True,
    },
    "four_bits": {
        "freeze": ("PaliGemma/llm/layers/.*",),
        "frozen_dtype": "nf4",
        "optimizer": "adam_8bit",
        "ema_decay": 0.9,
    },
}


def debug_config(**settings):
    config = pi0_state.get_config("debug")
    config.train.update({"eval_every": 0, "tensorboard": False} | settings)
    return config


def run(config, workdir, **options):
    return train.train(config, workdir, devices=jax.devices()[:1], **options)


@pytest.mark.parametrize("way", WAYS)
def test_two_steps_and_two_more_equal_four_however_the_state_is_kept(way, tmp_path):
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    run(debug_config(**WAYS[way]), straight)
    run(debug_config(**WAYS[way], num_steps=2), halves)
    run(debug_config(**WAYS[way]), halves)
    assert_identical(store.load_params(halves / "4"), store.load_params(straight / "4"))
    assert_identical(train_state(halves / "4"), train_state(straight / "4"))


def test_what_is_frozen_is_small_and_comes_out_as_it_went_in(tmp_path):
    settings = WAYS["four_bits"] | {"keep_period": 1, "save_every": 1}
    state = run(debug_config(**settings, num_steps=2), tmp_path / "run")
    kept = trees.flatten(state.params)
    frozen = [path for path in kept if path.startswith("PaliGemma/llm/layers/")]
    assert any(isinstance(kept[path], nf4.Nf4) for path in frozen)
    assert {str(kept[path].dtype) for path in frozen} == {"bfloat16"}
    first, later = (trees.flatten(store.load_params(tmp_path / "run" / k)) for k in ("1", "2"))
    moved = {path for path in kept if not np.array_equal(first[path], later[path])}
    assert moved
    assert moved.isdisjoint(frozen)


def test_sigterm_saves_the_step_at_hand_and_the_run_goes_on(tmp_path, capsys, monkeypatch):
    """A signal to this very process, after the second step."""
    calls = []

    def stepping(*args, real=train_settings.compiled, **kwargs):
        step_fn = real(*args, **kwargs)

        def one(*args):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return step_fn(*args)

        return one

    monkeypatch.setattr(train_settings, "compiled", stepping)
    state = run(debug_config(num_steps=40, save_every=40, decay_steps=40), tmp_path / "run")
    assert int(state.step) == len(calls) == 2
    assert "stopped after step 2 of 40" in capsys.readouterr().out
    assert (tmp_path / "run" / "2" / "params").is_dir()
    run(debug_config(num_steps=4, save_every=40, decay_steps=40), tmp_path / "run")
    assert "resumed from step 2" in capsys.readouterr().out


DIVERGING = {"num_steps": 12, "learning_rate": 1e30, "final_learning_rate": 1e30}


def test_what_is_not_finite_is_told_with_its_episodes_and_never_saved(tmp_path):
    config = debug_config(**DIVERGING, save_every=1, keep_period=0)
    with pytest.raises(FloatingPointError, match=r"Steps \d+ to \d+ are suspect.*pusht") as told:
        run(config, tmp_path / "run")
    dataset = lerobot.open_dataset(config.data.path)
    numbers = str(told.value).split(f"{dataset.path}: ")[1].split(". ")[0]
    assert {int(n) for n in numbers.split(", ")} <= set(range(dataset.num_episodes))
    for step in (p for p in (tmp_path / "run").iterdir() if p.name.isdigit()):
        saved = trees.flatten(store.load_params(step))
        assert all(np.isfinite(leaf).all() and abs(leaf).max() < 1e6 for leaf in saved.values())


def test_a_page_that_cannot_be_drawn_decides_nothing(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError("no room")

    monkeypatch.setattr(trainings, "write_page", fail)
    assert int(run(debug_config(num_steps=1), tmp_path / "run").step) == 1
    assert "report.html was not drawn: no room" in capsys.readouterr().out


def test_roll_outs_come_every_so_many_steps_and_at_the_last(tmp_path, monkeypatch):
    """The simulator is another's; here is who plays when, and what is kept before."""
    kept = []

    def play(policy, config):
        kept.append(sorted(p.name for p in (tmp_path / "run").iterdir() if p.name.isdigit()))
        raw = {"state": np.zeros((1, 2)), "prompt": ["push"], "images": {}}
        chunk = policy.act(raw, seeds=[0], call=0, num_flow_steps=2)
        return {"rollout/success": float(np.isfinite(chunk).all())}

    monkeypatch.setattr(rollouts, "play", play)
    monkeypatch.setattr(rollouts, "check_playable", lambda config, policy: None)
    run(debug_config(num_steps=3, rollout_every=2, save_every=50, keep_period=1), tmp_path / "run")
    rows = list(metrics.read(tmp_path / "run/metrics.jsonl"))
    assert [r["step"] for r in rows if r.get("rollout/success") == 1] == [2, 3]
    assert len(kept) == 2


def test_losses_and_accuracies_on_held_out_episodes_and_a_page(tmp_path):
    run(debug_config(eval_every=2, eval_batches=1, num_steps=2, tensorboard=True), tmp_path / "run")
    (row,) = [r for r in metrics.read(tmp_path / "run/metrics.jsonl") if "held_out/loss" in r]
    assert row["step"] == 2
    assert 0 <= row["held_out/accuracy_0.05"] <= row["held_out/accuracy_0.5"] <= 1
    assert "held_out" in (tmp_path / "run" / training_loop.REPORT).read_text()
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_every_line_has_speed_memory_and_time_left(tmp_path):
    run(debug_config(num_steps=2), tmp_path / "run")
    rows = list(metrics.read(tmp_path / "run/metrics.jsonl"))
    assert [row["step"] for row in rows] == [1, 2]
    names = ("loss", "grad_norm", "learning_rate", "samples_per_second", "data_wait")
    for row in rows:
        assert all(np.isfinite(row[name]) for name in (*names, "memory_bytes"))


def test_a_metric_line_of_a_resumed_run_is_not_there_twice(tmp_path):
    run(debug_config(num_steps=2, save_every=1, keep_period=1), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "2")
    run(debug_config(num_steps=2, save_every=1, keep_period=1), tmp_path / "run")
    rows = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]


def test_two_runs_do_not_share_a_directory(tmp_path):
    workdir = tmp_path / "run"
    run(debug_config(num_steps=1), workdir)
    with files.holding(workdir):
        for overwrite in (False, True):
            with pytest.raises(FileExistsError, match="is being written by another process"):
                run(debug_config(num_steps=2), workdir, overwrite=overwrite)
    assert int(run(debug_config(num_steps=2), workdir).step) == 2


@pytest.mark.parametrize(
    ("settings", "there", "soon", "in_all"),
    [
        ({"num_steps": 9}, (), 2, 2),  # one, and the one that is being written
        ({"num_steps": 1}, (), 1, 1),
        ({"num_steps": 9, "max_to_keep": 3}, (), 4, 4),
        ({"num_steps": 9}, (4,), 1, 1),
        ({"num_steps": 9, "keep_period": 3}, (), 2, 5),  # 3, 6 and 9 for good
        ({"num_steps": 9, "keep_period": 3}, (3, 4), 1, 3),
        ({"num_steps": 9, "keep_period": 3}, (3,), 2, 4),
        ({"num_steps": 9, "save_every": 0, "rollout_every": 3}, (), 2, 2),
    ],
)
def test_room_is_asked_for_checkpoints_that_lie_together(
    settings, there, soon, in_all, tmp_path, monkeypatch, capsys
):
    config, asked = debug_config(save_every=1, keep_period=0), []
    plan = train.planned(config, tmp_path / "run", devices=jax.devices()[:1])
    config.train.update(settings)
    for step in there:
        (tmp_path / "run" / str(step) / "params").mkdir(parents=True)
    latest = tmp_path / "run" / str(there[-1]) if there else None
    plan = dataclasses.replace(plan, config=config, resumed=latest)

    def check_space(path, needed):
        asked.append(needed)
        if len(asked) == 2:
            raise OSError("no room")

    monkeypatch.setattr(files, "check_space", check_space)
    train._check_space(plan, overwrite=False)
    size = trees.nbytes(plan.like.policy_params) + trees.nbytes(plan.like.rest())
    assert asked == [soon * size, in_all * size]
    assert "config.train.keep_period keeps for good, no room" in capsys.readouterr().out


def test_the_room_asked_for_is_that_of_what_is_written(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(files, "check_space", lambda path, needed: asked.append(needed))
    run(debug_config(num_steps=1), tmp_path / "run")
    on_disk = files.size(tmp_path / "run" / "1")
    assert on_disk < 1.1 * asked[0]
    run(debug_config(num_steps=1), tmp_path / "run", overwrite=True)
    assert asked[2] < asked[0] - on_disk  # the old run makes room


def test_a_run_that_went_further_meanwhile_is_not_gone_on_with(tmp_path):
    """It ended between the look at the workdir and the taking of it."""
    run(debug_config(num_steps=1), tmp_path / "run")
    plan = train.planned(debug_config(), tmp_path / "run", devices=jax.devices()[:1])
    plan.check_current()
    plan.resumed.rename(tmp_path / "run" / "3")
    with pytest.raises(FileExistsError, match="was at step 1 and is at 3 now: another run"):
        plan.check_current()
