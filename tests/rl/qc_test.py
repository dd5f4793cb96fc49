"""Q-chunking: the numbers of the published program, what its parts are made of, and that it learns.

Fixture: tests/testdata/rl/qc_qcfql.npz holds what the program of arXiv:2507.07969 (QC-FQL) has for
small random networks: parameters, a batch, all noises, losses, the gradient norm of every tensor,
next actions, and the critic's loss in three updates. Renew it by running that program.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policymix.rl import learner, networks, qc
from policymix.rl import state as states
from policymix.rl.config import LearnerConfig
from policymix.structs import ChunkBatch, Observation

FIXTURE = pathlib.Path(__file__).parents[1] / "testdata/rl/qc_qcfql.npz"
_NETWORKS = {
    "critic": "modules_critic/value_net",
    "policy": "modules_actor_bc_flow/mlp",
    "actor": "modules_actor_onestep_flow/mlp",
}


@pytest.fixture(scope="module")
def published():
    with np.load(FIXTURE, allow_pickle=True) as opened:
        return dict(opened)


def config_of(published, **changes) -> LearnerConfig:
    meta = json.loads(str(published["meta"]))
    settings = {
        "algorithm": "qc_fql",
        "action_dim": meta["action_dim"],
        "proprio_dim": 6,
        "action_horizon": meta["horizon_length"],
        "distill_scale": meta["alpha"],
        "num_flow_steps": meta["flow_steps"],
        "num_critics": meta["num_qs"],
        "ema_decay": 1 - meta["tau"],
        "learning_rate": meta["lr"],
        "hidden_dim": 16,
        "num_layers": 2,
        "layer_norm": meta["layer_norm"],
    }
    return LearnerConfig(**settings | changes)


def theirs(published, name):
    """{layer/tensor: array} of one network in the published program's names."""
    prefix = f"w/{name}/"
    return {
        k.removeprefix(prefix): jnp.asarray(v) for k, v in published.items() if k.startswith(prefix)
    }


def ours(tensors, *, reversed_time=False):
    """A network's tensors in our tree. A flow of time 1 - t, whose velocity is the negative of
    ours, is the same function when the row of time and the last layer change sign.
    """
    head = {}
    for path, tensor in tensors.items():
        layer, leaf = path.split("/")
        name = layer.replace("Dense", "dense").replace("LayerNorm", "norm")
        head.setdefault(name, {})[leaf] = tensor
    if reversed_time:
        first, last = head["dense_0"], head[f"dense_{len(head) - 1}"]
        first["bias"] = first["bias"] + first["kernel"][-1]
        first["kernel"] = first["kernel"].at[-1].multiply(-1)
        last.update({name: -tensor for name, tensor in last.items()})
    return {"head": head}


def params_of(tensors):
    return {
        name: ours(of_network, reversed_time=name == "policy")
        for name, of_network in tensors.items()
    }


def batch_of(published) -> ChunkBatch:
    meta = json.loads(str(published["meta"]))

    def seen(proprio):
        return Observation(images={}, image_masks={}, proprio=jnp.asarray(proprio))

    valid = published["in/valid"] > 0
    after = meta["discount"] ** meta["horizon_length"] * published["in/masks"][:, -1]
    return ChunkBatch(
        observation=seen(published["in/observations"]),
        actions=jnp.asarray(published["in/actions"]),
        action_is_pad=jnp.asarray(~valid),
        rewards=jnp.asarray(published["in/rewards"][:, -1], jnp.float32),
        discounts=jnp.asarray(after, jnp.float32),
        next_observation=seen(published["in/next_observations"][:, -1]),
        has_next=jnp.asarray(valid[:, -1]),
    )


def noises_of(published) -> qc.Noises:
    def chunk(name):
        return jnp.asarray(published[f"noise/{name}"]).reshape(8, 3, 2)

    return qc.Noises(
        following=chunk("next_noise"),
        flow=chunk("x0"),
        t=1 - jnp.asarray(published["noise/t"][:, 0]),  # their time
        distilled=chunk("distill_noise"),
    )


def counted(published) -> float:
    """The published critic's mean has the rows that are left out in its denominator."""
    return float(published["in/valid"][:, -1].mean())


def published_start(published):
    """Parameters by our names, and the whole tree with their target network."""
    tensors = {name: theirs(published, path) for name, path in _NETWORKS.items()}
    params = params_of(tensors)
    return params, params | {"critic": ours(theirs(published, "modules_target_critic/value_net"))}


@jax.jit
def drawn_by_them(root) -> qc.Noises:
    """What the published program draws from a key of an update."""
    _, of_actor, of_critic = jax.random.split(root, 3)
    _, following = jax.random.split(of_critic)
    rest, flow, t = jax.random.split(of_actor, 3)
    _, distilled = jax.random.split(rest)
    chunks = [
        jax.random.normal(key, (8, 6)).reshape(8, 3, 2) for key in (following, flow, distilled)
    ]
    return qc.Noises(chunks[0], chunks[1], 1 - jax.random.uniform(t, (8, 1))[:, 0], chunks[2])


total_loss = jax.jit(qc.total_loss, static_argnums=0)


def test_losses_are_the_published_ones(published):
    config, batch = config_of(published), batch_of(published)
    params, target_params = published_start(published)
    noises = noises_of(published)
    loss, metrics = total_loss(config, params, target_params, batch, noises)
    found = {
        "actor/bc_flow_loss": metrics["policy/flow_loss"],
        "actor/distill_loss": metrics["policy/distill_loss"],
        "actor/actor_loss": metrics["policy/loss"],
        "critic/critic_loss": metrics["critic/loss"] * counted(published),
        "critic/q_mean": metrics["critic/q_mean"],
        "critic/q_min": metrics["critic/q_min"],
        "critic/q_max": metrics["critic/q_max"],
    }
    for name, value in found.items():
        expected = published[f"info/{name}"]
        np.testing.assert_allclose(value, expected, rtol=2e-6, err_msg=name)
    assert loss == metrics["critic/loss"] + metrics["policy/loss"]
    again = drawn_by_them(jax.random.key(5, impl="threefry2x32"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again, noises)


def test_next_chunks_are_the_published_ones(published):
    config, batch = config_of(published), batch_of(published)
    params, _ = published_start(published)
    read = {"actor": batch.next_observation.proprio}
    ask = jax.jit(qc.next_chunks, static_argnums=0)
    found = ask(config, params, read, noises_of(published).following)
    expected = published["out/next_actions"].reshape(8, 3, 2)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert np.any(np.abs(expected) == 1)  # some are clipped


def test_gradients_are_the_published_ones(published):
    """Each tensor's norm, through the map of their tensors to ours; theirs of targets are 0."""
    config, batch = config_of(published), batch_of(published)
    tensors = {name: theirs(published, path) for name, path in _NETWORKS.items()}
    target = {"critic": ours(theirs(published, "modules_target_critic/value_net"))}

    @jax.jit
    @jax.value_and_grad
    def measured(tensors):
        params = params_of(tensors)
        _, metrics = qc.total_loss(config, params, params | target, batch, noises_of(published))
        return metrics["critic/loss"] * counted(published) + metrics["policy/loss"]

    loss, grads = measured(tensors)
    np.testing.assert_allclose(loss, published["out/loss"], rtol=2e-6)
    for name, path in _NETWORKS.items():
        for tensor, gradient in grads[name].items():
            expected = published[f"gnorm/{path}/{tensor}"]
            found = np.linalg.norm(gradient)
            np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=f"{path}/{tensor}")


def test_three_updates_are_the_published_ones_save_that_their_targets_lag(published):
    """Their target network follows the critic as it was before the update; ours as it is after."""
    config, batch = config_of(published), batch_of(published)
    params, target_params = published_start(published)
    start = states.init_state(config, params).replace(targets={"critic": target_params["critic"]})
    update = jax.jit(functools.partial(qc.update_given, config))

    def sequence(lagging):
        state, found = start, []
        chain, _ = jax.random.split(jax.random.key(3, impl="threefry2x32"))
        for _ in range(3):
            chain, key = jax.random.split(chain)
            before = state
            state, metrics = update(state, batch, drawn_by_them(key))
            if lagging:
                moved = states.polyak(before.targets, before.params, config.ema_decay)
                state = state.replace(targets=moved)
            found.append(metrics["critic/loss"] * counted(published))
        return np.array(found)

    expected = published["seq/critic_loss"]
    np.testing.assert_allclose(sequence(lagging=True), expected, rtol=2e-6)
    assert np.abs(sequence(lagging=False) - expected)[1:].max() > 1e-5


def test_qc_bootstraps_on_the_targets_mean_of_the_chunk_that_the_critic_prefers():
    config = LearnerConfig(
        algorithm="qc", action_dim=2, proprio_dim=3, action_horizon=2, hidden_dim=8, num_layers=1,
        num_flow_steps=2, num_candidates=8,
    )  # fmt: skip
    init = jax.jit(learner.init, static_argnums=0)
    state, other = init(config, jax.random.key(0)), init(config, jax.random.key(1)).params
    state = state.replace(targets={"critic": other["critic"]})
    rng = np.random.default_rng(0)

    def seen():
        return Observation({}, {}, proprio=rng.standard_normal((16, 3), np.float32))

    batch = ChunkBatch(
        observation=seen(),
        actions=rng.uniform(-1, 1, (16, 2, 2)).astype(np.float32),
        action_is_pad=np.zeros((16, 2), bool),
        rewards=rng.standard_normal(16, np.float32),
        discounts=rng.choice([0.5, 0.9], 16).astype(np.float32),
        next_observation=seen(),
        has_next=np.ones(16, bool),
    )

    @jax.jit
    def found_and_expected(state):
        noises = qc.draw(config, jax.random.key(2), 16)
        after = batch.next_observation.proprio
        read = dict.fromkeys(("critic", "policy"), after)
        best = qc.best_of(config, state.params, read, noises.following)
        q = networks.critic(config, state.target_params, after, best)
        online = networks.critic(config, state.params, after, best)
        _, metrics = qc.update_given(config, state, batch, noises)
        return metrics["critic/target_mean"], [
            jnp.mean(batch.rewards + batch.discounts * x)
            for x in (jnp.mean(q, axis=0), jnp.min(q, axis=0), jnp.mean(online, axis=0))
        ]

    found, (expected, *others) = found_and_expected(state)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert min(abs(other - found) for other in others) > 1e-2
