"""The rows that run the network: the straightforward versions give the numbers of ours, and a row
whose two sides disagree is refused.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policymix import structs, trees
from policymix.models import pi0
from policymix.runs import measurements, model_rows

GEMMA = {"mlp_dim": 24, "depth": 3, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
CONFIG = pi0.Pi0Config(
    paligemma_variant={"width": 16, **GEMMA},
    action_expert_variant={"width": 8, **GEMMA},
    siglip_variant="mu/28",
    siglip_depth=1,
    vocab_size=32,
    pi05=True,
    action_dim=3,
    action_horizon=4,
    max_token_len=10,
    image_keys=("a", "b", "c"),
    image_resolution=(56, 28),
    dtype="float32",
)


@pytest.fixture(autouse=True)
def once(monkeypatch):
    monkeypatch.setattr(measurements, "REPEATS", 1)
    monkeypatch.setattr(model_rows, "_REPEATS", 1)
    monkeypatch.setattr(model_rows, "_SAMPLES", 2)


@pytest.fixture(scope="module")
def inputs():
    """(parameters, observation, noise)."""
    shape = (1, CONFIG.action_horizon, CONFIG.action_dim)
    noise = jax.random.normal(jax.random.key(5), shape)
    return model_rows.noisy_params(CONFIG), model_rows.observation_of_one(CONFIG), noise


def test_parameters_and_observation_leave_nothing_zero_or_unseen(inputs):
    params, observation, _ = inputs
    assert all(np.all(leaf != 0) for leaf in jax.tree.leaves(params))
    assert np.sum(observation.prompt_mask) == 9
    assert all(np.all(mask) for mask in observation.image_masks.values())


def test_plain_sampling_is_ours(inputs):
    params, observation, noise = inputs
    plain = model_rows.sample_plainly(CONFIG, *inputs)
    ours = pi0.sample_actions(CONFIG, params, observation, noise=noise)
    np.testing.assert_allclose(plain, ours, rtol=0, atol=1e-5)
    assert np.abs(plain - noise).max() > 1e-2  # else there was nothing to integrate


def test_the_loss_of_whole_layers_is_ours_and_so_is_its_gradient(inputs):
    params, observation, noise = inputs
    batch = structs.Batch(observation, noise)

    def both(loss):
        key = jax.random.key(6)
        return jax.jit(jax.value_and_grad(lambda p: loss(CONFIG, p, batch, key)[0]))(params)

    (plain, plain_grads), (ours, grads) = map(both, (model_rows.whole_loss, pi0.loss))
    np.testing.assert_allclose(plain, ours, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), plain_grads, grads
    )
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads)) > 1e-2


def test_the_straightforward_versions_run_all_layers_where_ours_leave_the_last_out(inputs):
    params, observation, noise = inputs
    batch, key = structs.Batch(observation, noise), jax.random.key(7)

    def loops(function):
        return set(map(int, re.findall(r"length=(\d+)", str(jax.make_jaxpr(function)(params)))))

    depth = CONFIG.paligemma_variant.depth
    for ours, plain in (
        (
            lambda p: pi0.sample_actions(CONFIG, p, observation, noise=noise),
            lambda p: model_rows.sample_plainly(CONFIG, p, observation, noise),
        ),
        (
            lambda p: pi0.loss(CONFIG, p, batch, key),
            lambda p: model_rows.whole_loss(CONFIG, p, batch, key),
        ),
    ):
        assert depth - 1 in loops(ours)
        assert depth - 1 not in loops(plain)
        assert depth in loops(plain)


ROWS = {
    model_rows.cameras_row: "sampling, one camera of 3",
    model_rows.all_cameras_row: "sampling, all cameras, 3 layers",
    model_rows.samples_row: "2 samples of one observation",
    model_rows.step_row: "training step, 3 layers",
}


@pytest.mark.parametrize(
    "measure",
    [pytest.param(m, marks=pytest.mark.slow) if m is model_rows.step_row else m for m in ROWS],
)
def test_a_row_measures_both_sides(measure):
    (row,) = measure(CONFIG)
    assert row.name == ROWS[measure]
    assert min(row.ours.wall, row.theirs.wall) > 0
    assert "equal to" in row.note
    peaks = row.ours.peak, row.theirs.peak
    if measure is not model_rows.step_row:
        assert peaks == (None, None)
    else:  # parameters, and AdamW's two moments of each
        assert min(peaks) > 3 * 4 * trees.num_params(pi0.shapes(CONFIG))


@pytest.mark.parametrize(
    "measure",
    [model_rows.all_cameras_row, pytest.param(model_rows.step_row, marks=pytest.mark.slow)],
)
def test_a_row_whose_sides_disagree_is_refused(measure, monkeypatch):
    plainly, loss = model_rows.sample_plainly, model_rows.whole_loss
    monkeypatch.setattr(model_rows, "sample_plainly", lambda *args: plainly(*args) * 1.001)
    monkeypatch.setattr(
        model_rows, "whole_loss", lambda *args: jax.tree.map(lambda x: x * 1.001, loss(*args))
    )
    with pytest.raises(ValueError, match="of ours and of the straightforward version differ by"):
        measure(CONFIG)


def test_what_differs_by_more_than_rounding_or_is_no_number_is_named():
    exact = {"actions": np.array([1.0, -4.0]), "rest": [np.zeros(2)]}
    assert model_rows.require_same("a row", exact, exact) == 0
    near = exact | {"actions": np.array([1.0 + 2e-5, -4.0])}
    assert model_rows.require_same("a row", near, exact) == pytest.approx(5e-6)
    for wrong in (np.array([1.0 + 1e-4, -4.0]), np.array([np.nan, -4.0])):
        with pytest.raises(ValueError, match="a row: actions of ours .* differ by"):
            model_rows.require_same("a row", exact | {"actions": wrong}, exact)
