"""The networks: what is shared between chunks and between networks changes no number."""

import dataclasses
import functools

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policymix.rl import networks
from policymix.rl.config import LearnerConfig
from policymix.structs import Observation

SMALL = {
    "action_dim": 2, "action_horizon": 3, "proprio_dim": 4, "hidden_dim": 16, "feature_dim": 8,
    "num_layers": 2,
}  # fmt: skip
SEEING = {
    "image_keys": ("left", "right"), "image_resolution": (33, 46), "max_token_len": 5,
    "vocab_size": 11,
}  # fmt: skip


init = jax.jit(networks.init, static_argnums=0)
features = jax.jit(networks.features, static_argnums=(0, 2))
critic = jax.jit(networks.critic, static_argnums=0)
velocity = jax.jit(networks.velocity, static_argnums=0)


@functools.cache
def _params(config: LearnerConfig):
    return init(config, jax.random.key(0))


def _observation(config: LearnerConfig, size: int = 3) -> Observation:
    rng = np.random.default_rng(0)
    shape = (size, *config.image_resolution, 3)
    return Observation(
        images={name: rng.integers(0, 256, shape, np.uint8) for name in config.image_keys},
        image_masks={},
        proprio=rng.standard_normal((size, config.proprio_dim), np.float32),
        prompt_tokens=rng.integers(0, config.vocab_size, (size, 5), np.int32),
        prompt_mask=np.arange(5)[None].repeat(size, 0) < 3,
    )


def _chunks(*lead: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((*lead, 3, 2), np.float32)


def _close(a, b, **tolerances):
    np.testing.assert_allclose(a, b, **({"rtol": 1e-4, "atol": 1e-5} | tolerances))


@pytest.mark.parametrize("network", ["plain", "fused"])
def test_chunks_of_one_observation_get_what_each_gets_alone(network):
    config = LearnerConfig(algorithm="chunk_iql", policy="flow", network=network, **SMALL)
    params, observation, chunks = _params(config), _observation(config), _chunks(3, 4)
    read = features(config, params, "critic", observation)
    q = critic(config, params, read, chunks)
    assert q.shape == (2, 3, 4)
    assert not np.allclose(q[0], q[1])  # members of an ensemble start apart
    t = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    read = features(config, params, "policy", observation)
    v_t = velocity(config, params, read, chunks, t)
    for k in range(4):
        one = chunks[:, k]
        again = features(config, params, "critic", observation)
        _close(q[:, :, k], critic(config, params, again, one))
        _close(v_t[:, k], velocity(config, params, read, one, t[:, k]))
    assert not np.allclose(v_t, velocity(config, params, read, chunks, t * 0))


def test_a_layer_of_parts_is_the_layer_of_them_side_by_side():
    parts = [
        np.random.default_rng(k).standard_normal((3, n, 4), np.float32) for k, n in ((0, 1), (1, 5))
    ]
    layer = networks.Dense(6, jnp.dtype("float32"))
    params = {"kernel": _chunks(8).reshape(8, 6), "bias": np.arange(6, dtype=np.float32)}
    whole = np.concatenate([parts[0].repeat(5, 1), parts[1]], axis=-1)
    expected = whole @ params["kernel"] + params["bias"][None, None]
    _close(layer.apply({"params": params}, *parts), expected)


def test_plain_networks_read_the_same_and_fused_ones_their_own():
    plain = LearnerConfig(algorithm="chunk_iql", network="plain", **SMALL, **SEEING)
    observation = _observation(plain)
    read = [features(plain, _params(plain), n, observation) for n in ("critic", "policy")]
    np.testing.assert_array_equal(*read)
    assert read[0].shape == (3, 2 * 8 + 4 + 128)
    fused = dataclasses.replace(plain, network="fused")
    assert "encoder" not in _params(fused)
    one = jax.tree.map(jnp.copy, _params(fused))
    one["critic"]["encoder"] = jax.tree.map(jnp.zeros_like, one["critic"]["encoder"])
    kept = features(fused, one, "value", observation)
    np.testing.assert_array_equal(kept, features(fused, _params(fused), "value", observation))
    assert kept.shape == (3, 8)


@pytest.mark.parametrize("network", ["plain", "fused"])
def test_padding_of_a_prompt_is_not_read_and_its_words_are(network):
    config = LearnerConfig(algorithm="cloning", network=network, **SMALL, **SEEING).seeing(())
    params = _params(config)
    observation = _observation(config)
    read = features(config, params, "policy", observation)

    def changed(column: int) -> Observation:
        tokens = observation.prompt_tokens.copy()
        tokens[:, column] = (tokens[:, column] + 1) % config.vocab_size
        return observation.replace(prompt_tokens=tokens)

    np.testing.assert_array_equal(read, features(config, params, "policy", changed(4)))
    assert not np.allclose(read, features(config, params, "policy", changed(0)))
    empty = observation.replace(prompt_mask=np.zeros((3, 5), bool))
    assert np.isfinite(features(config, params, "policy", empty)).all()


def test_pictures_are_the_same_as_bytes_and_as_numbers_and_bfloat16_is_near():
    config = LearnerConfig(algorithm="cloning", network="fused", **SMALL, **SEEING)
    params, observation = _params(config), _observation(config)
    read = features(config, params, "policy", observation)
    images = {k: x.astype(np.float32) / 127.5 - 1 for k, x in observation.images.items()}
    floats = features(config, params, "policy", observation.replace(images=images))
    _close(read, floats)
    half = dataclasses.replace(config, dtype="bfloat16")
    rounded = features(half, params, "policy", observation)
    assert rounded.dtype == jnp.float32
    _close(rounded, read, atol=0.05, rtol=0.1)
    assert not np.array_equal(rounded, read)


def test_deviations_are_above_the_least_there_may_be():
    config = LearnerConfig(algorithm="cloning", min_std=0.25, **SMALL)
    params, read = _params(config), jnp.full((2, 4), -100.0)
    mean, std = networks.gaussian(config, params, read)
    assert mean.shape == std.shape == (2, 3, 2)
    assert float(std.min()) == 0.25


@pytest.mark.parametrize("network", ["plain", "fused"])
def test_initial_parameters_are_spread_as_promised(network):
    config = LearnerConfig(
        algorithm="chunk_iql", network=network, **SMALL | SEEING | {"hidden_dim": 64}
    )
    flat = flax.traverse_util.flatten_dict(_params(config), sep="/")
    other = flax.traverse_util.flatten_dict(init(config, jax.random.key(1)), sep="/")
    assert {x.dtype for x in flat.values()} == {jnp.dtype("float32")}
    for path, x in flat.items():
        if not path.endswith("kernel") or x.size < 500:
            continue
        assert not np.array_equal(x, other[path])
        fan_in = np.prod(x.shape[-4:-1] if "conv" in path else x.shape[-2:-1])
        fan_out = np.prod(x.shape[:2]) * x.shape[-1] if "conv" in path else x.shape[-1]
        bound = fan_in**-0.5 if network == "fused" else (6 / (fan_in + fan_out)) ** 0.5
        assert 0.98 * bound < float(jnp.abs(x).max()) <= bound
        assert abs(float(x.std()) / bound - 3**-0.5) < 0.05
        bias = flat[path.replace("kernel", "bias")]
        assert bool(jnp.any(bias != 0)) == (network == "fused")


def test_wrong_observations_are_refused_in_one_line():
    config = LearnerConfig(algorithm="cloning", **SMALL, **SEEING)
    params, good = _params(config), _observation(config)
    for wrong, told in (
        (good.replace(proprio=np.zeros((3, 5), np.float32)), "proprio has 5 numbers.* for 4"),
        (good.replace(images={"left": good.images["left"]}), "camera 'right' is missing"),
        (
            good.replace(images={k: x[:, 1:] for k, x in good.images.items()}),
            "'left' has 32 × 46 pixels.* 33 × 46",
        ),
        (good.replace(prompt_tokens=None), "no prompt; tokenize one"),
    ):
        with pytest.raises(ValueError, match=told):
            networks.features(config, params, "policy", wrong)
    small = dataclasses.replace(config, image_resolution=(31, 64))
    with pytest.raises(ValueError, match="at least 32 pixels"):
        networks.init(small, jax.random.key(0))


def test_plain_critics_put_layer_norm_after_gelu():
    config = LearnerConfig(algorithm="qc", num_critics=1, **SMALL)
    params, chunks = _params(config), _chunks(3)
    own = jax.tree.map(lambda x: x[0], params["critic"]["head"])
    x = np.concatenate([np.ones((3, 4), np.float32), chunks.reshape(3, -1)], axis=-1)
    for i in range(2):
        x = nn.gelu(nn.Dense(16).apply({"params": own[f"dense_{i}"]}, x))
        x = nn.LayerNorm().apply({"params": own[f"norm_{i}"]}, x)
    expected = nn.Dense(1).apply({"params": own["dense_2"]}, x)[:, 0]
    _close(critic(config, params, jnp.ones((3, 4)), chunks)[0], expected)
