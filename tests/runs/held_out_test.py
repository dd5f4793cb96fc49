"""Held-out episodes: what is counted, the same each time and on any number of devices."""

import functools
import shutil
import types

import jax
import numpy as np
import pytest

from configs import common, pi0_state
from policymix import sharding
from policymix.models import pi0
from policymix.runs import held_out, policies
from policymix.runs import pipeline as pipeline_lib
from policymix.structs import Observation


def debug_config(**settings):
    config = pi0_state.get_config("debug")
    config.train.update({"batch_size": 8, "eval_batches": 2} | settings)
    config.evaluate.num_flow_steps = 3
    return config


def made(config, mesh=None):
    model = policies.model_config(config, why="the test")
    pipeline = pipeline_lib.Pipeline(config, model)
    mesh = mesh or sharding.mesh(devices=jax.devices()[:1])
    return held_out.HeldOut(config, pipeline.encoder.seen, pipeline, mesh)


@functools.cache
def params():
    return pi0.init(policies.model_config(debug_config(), why="the test"), jax.random.key(0))


def test_accuracies_are_what_a_loop_counts():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(3, 4, 5)).astype(np.float32)
    actions = truth + rng.uniform(-0.6, 0.6, truth.shape).astype(np.float32)
    actions[:, :, :2] = truth[:, :, :2] + 0.07  # small errors do happen
    mask = np.ones(truth.shape, bool)
    mask[:, :, 4] = False  # the robot lacks it
    mask[1, 2:] = False  # beyond the episode's end
    actions[0, 0, :4] = truth[0, 0, :4] + 0.01
    actions[~mask] = 1e3
    near, steps, l1, numbers = dict.fromkeys(held_out.THRESHOLDS, 0), 0, 0.0, 0
    for b in range(3):
        for h in range(4):
            errors = [abs(actions[b, h, a] - truth[b, h, a]) for a in range(5) if mask[b, h, a]]
            if errors:
                steps, l1, numbers = steps + 1, l1 + sum(errors), numbers + len(errors)
                for threshold in near:
                    near[threshold] += max(errors) < threshold
    found = {k: float(v) for k, v in held_out.accuracies(actions, truth, mask).items()}
    assert {t: found.pop(f"accuracy_{t:g}") for t in near} == near
    assert 0 < near[0.05] < near[0.5] < steps == 10
    assert found == {"steps": 10, "numbers": 40, "l1": pytest.approx(l1, rel=1e-5)}


def test_a_policy_is_measured_and_the_same_twice():
    evaluate = made(debug_config())
    assert evaluate
    first, second = evaluate(params()), made(debug_config(seed=7))(params())
    assert first == second
    names = {"loss", "l1", *(f"accuracy_{t:g}" for t in held_out.THRESHOLDS)}
    assert first.keys() == {f"held_out/{name}" for name in names}
    assert np.isfinite(list(first.values())).all()
    shares = [first[f"held_out/accuracy_{t:g}"] for t in held_out.THRESHOLDS]
    assert shares == sorted(shares)
    assert shares[0] >= 0
    assert shares[-1] <= 1
    assert first["held_out/l1"] > 0


def test_the_loss_is_that_of_training_on_these_batches():
    evaluate = made(debug_config())
    config = debug_config()
    model = policies.model_config(config, why="the test")
    loss_fn = jax.jit(policies.loss_fn(model))
    losses = []
    for number, (batch, _) in enumerate(evaluate._batches):
        key = jax.random.fold_in(jax.random.key(config.data.seed), number)
        losses.append(float(loss_fn(params(), batch, jax.random.split(key)[0])[0]))
    assert evaluate(params())["held_out/loss"] == pytest.approx(np.mean(losses), rel=1e-6)


def test_eight_devices_measure_what_one_does():
    one, eight = made(debug_config()), made(debug_config(), sharding.mesh(fsdp_devices=2))
    found = eight(params())
    for name, value in one(params()).items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6)


def test_a_perfect_policy_is_always_near(monkeypatch):
    def recorded(model, params, observation: Observation, *, noise, num_flow_steps):
        return params + 0 * noise

    held_out._compiled.cache_clear()
    evaluate = made(debug_config(eval_batches=1))
    ((batch, mask),) = evaluate._batches
    assert mask.any()
    assert not mask[..., 2:].any()  # PushT has two dimensions
    monkeypatch.setattr(pi0, "sample_actions", recorded)
    monkeypatch.setattr(policies, "loss_fn", lambda model: lambda params, batch, key: (1.0, {}))
    perfect = evaluate(batch.actions)
    wrong = evaluate(np.where(mask, batch.actions + 0.25, -1e6))
    held_out._compiled.cache_clear()
    assert {k: v for k, v in perfect.items() if "acc" in k} == {
        f"held_out/accuracy_{t:g}": 1.0 for t in held_out.THRESHOLDS
    }
    assert perfect["held_out/l1"] == 0
    assert [wrong[f"held_out/accuracy_{t:g}"] for t in held_out.THRESHOLDS] == [0, 0, 0, 1, 1]
    assert wrong["held_out/l1"] == pytest.approx(0.25, rel=1e-5)


def test_processes_bring_their_rows_of_the_same_batches():
    evaluate = made(debug_config())
    whole, mask = evaluate._batch(1, slice(None))
    parts = [evaluate._batch(1, slice(k, k + 2)) for k in range(0, 8, 2)]
    np.testing.assert_array_equal(np.concatenate([p[1] for p in parts]), mask)
    joined = jax.tree.map(lambda *rows: np.concatenate(rows), *(p[0] for p in parts))
    jax.tree.map(np.testing.assert_array_equal, joined, whole)


def test_datasets_have_the_shares_of_training(tmp_path):
    config = debug_config(batch_size=8, eval_batches=3)
    for name in "ab":
        shutil.copytree(common.PUSHT, tmp_path / name)
    config.data.path = f"{tmp_path / 'a'},{tmp_path / 'b'}"
    config.data.fractions = (3, 1)
    evaluate = made(config)
    seen = []
    evaluate._encoded = lambda which, positions: seen.append((which, len(positions))) or np.ones(1)
    for number in range(3):
        evaluate._batch(number, slice(None))
    assert seen == [(0, 6), (1, 2)] * 3


@pytest.mark.parametrize(
    ("batch_size", "eval_batches", "devices"), [(10_000, 4, 1), (10_000, 4, 8), (8, 10_000, 8)]
)
def test_few_frames_make_smaller_or_fewer_batches(batch_size, eval_batches, devices):
    mesh = sharding.mesh(devices=jax.devices()[:devices])
    evaluate = made(debug_config(batch_size=batch_size, eval_batches=eval_batches), mesh)
    frames = sum(len(chunks) for chunks in evaluate._chunks)
    assert evaluate.batch_size == min(batch_size, frames // devices * devices)
    assert evaluate.num_batches == frames // evaluate.batch_size


def test_fewer_frames_than_devices_are_no_evaluation_and_it_says_so(capsys):
    evaluate = made(debug_config(), types.SimpleNamespace(size=10_000))
    assert not evaluate
    assert evaluate(params()) == {}
    assert "fewer than the 10000 devices" in capsys.readouterr().out


def test_nothing_held_out_is_no_evaluation_and_it_says_so(capsys):
    config = debug_config()
    config.data.held_out = 0.0
    assert not made(config)
    assert "there are none (config.data.held_out is 0.0)" in capsys.readouterr().out
