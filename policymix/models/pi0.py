"""π0 and π0.5: pictures, prompt and proprio in, a chunk of actions out, by flow matching.

Pure functions of a configuration, parameters and data. t = 1 is noise and t = 0 is data, as in
OpenPI; the paper runs the other way. b batch, h action horizon, a action, s tokens, d width, n
samples.
Sources: π0 (arXiv:2410.24164), π0.5 (arXiv:2504.16054), and OpenPI's code for what they leave open.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from policymix import structs, trees
from policymix.models import flow, lora, recognize
from policymix.models.config import OPENPI_CAMERAS, Pi0Config
from policymix.models.network import Pi0, attention_mask
from policymix.structs import Array, Observation, Params, typechecked

__all__ = ["OPENPI_CAMERAS", "Pi0Config", "attention_mask"]  # part of what callers take from here


def example_observation(config: Pi0Config, batch_size: int = 1) -> Observation:
    """An observation of zeros with every camera present: the shapes that the network expects."""
    length = config.max_token_len
    return Observation(
        images={
            name: jnp.zeros((batch_size, *config.image_resolution, 3), jnp.float32)
            for name in config.image_keys
        },
        image_masks={name: jnp.ones((batch_size,), bool) for name in config.image_keys},
        proprio=jnp.zeros((batch_size, config.proprio_dim), jnp.float32),
        prompt_tokens=jnp.zeros((batch_size, length), jnp.int32) if length else None,
        prompt_mask=jnp.ones((batch_size, length), bool) if length else None,
    )


def check_observation(config: Pi0Config, observation: Observation) -> None:
    """ValueError naming what the network expects and what it was given.

    Shapes and dtypes are always looked at; values only where they are numpy's, since looking at a
    device's would wait for it.
    """
    proprio = observation.proprio
    batch_size = proprio.shape[0]
    _require("the shape of proprio", tuple(proprio.shape), (batch_size, config.proprio_dim))
    if isinstance(proprio, np.ndarray) and not np.isfinite(proprio).all():
        row, dim = np.argwhere(~np.isfinite(proprio))[0]
        raise ValueError(
            f"observation: proprio {dim} of example {row} is {proprio[row, dim]}: a sensor that "
            "gave no number, or a normalisation that divides by nothing"
        )
    check_prefix(config, observation)


def check_prefix(config: Pi0Config, observation: Observation) -> None:
    """The same of pictures and prompt alone."""
    batch_size = observation.proprio.shape[0]
    for name in config.image_keys:
        if name not in observation.images or name not in observation.image_masks:
            raise ValueError(
                f"observation: camera {name!r} or its mask is missing; there are "
                f"{list(observation.images)}. Of a robot without that camera the model is "
                "config.seeing(its cameras)"
            )
        _check_picture(name, observation.images[name], (batch_size, *config.image_resolution, 3))
        mask = tuple(observation.image_masks[name].shape)
        _require(f"the shape of the mask of image {name!r}", mask, (batch_size,))
    for name in ("prompt_tokens", "prompt_mask") if config.max_token_len else ():
        if getattr(observation, name) is None:
            raise ValueError(f"observation: {name} is missing (max_token_len 0 leaves prompts out)")
        found = tuple(getattr(observation, name).shape)
        _require(f"the shape of {name}", found, (batch_size, config.max_token_len))
    tokens = observation.prompt_tokens
    if not config.max_token_len or not isinstance(tokens, np.ndarray):
        return
    lowest, highest = tokens.min(initial=0), tokens.max(initial=0)
    if lowest < 0 or highest >= config.vocab_size:
        raise ValueError(
            f"observation: prompt_tokens reach from {lowest} to {highest}, the vocabulary has "
            f"{config.vocab_size}: they are another tokenizer's"
        )


def _require(what: str, found, expected, hint: str = "") -> None:
    if found != expected:
        raise ValueError(f"observation: {what} is {found}, the model expects {expected}{hint}")


def _check_picture(name: str, image, expected: tuple[int, ...]) -> None:
    _require(f"the shape of image {name!r}", tuple(image.shape), expected, _hint(image.shape))
    if image.dtype == np.uint8:
        return
    if not jnp.issubdtype(image.dtype, np.floating):
        raise ValueError(
            f"observation: image {name!r} has dtype {image.dtype}; expected uint8 in 0..255, or "
            "floats in [-1, 1]"
        )
    if isinstance(image, np.ndarray) and not np.abs(image).max(initial=0) <= 1.01:
        raise ValueError(
            f"observation: image {name!r} reaches {np.abs(image).max():.4g}; floats lie in "
            "[-1, 1]: give uint8, or x / 127.5 - 1"
        )


def _hint(shape: tuple[int, ...]) -> str:
    """What most often lies behind a picture of this shape."""
    if len(shape) == 3:
        return ": a batch of one is image[None]"
    return ": channels come last" if len(shape) == 4 and shape[1] == 3 != shape[3] else ""


@functools.partial(jax.jit, static_argnums=0)
def init(config: Pi0Config, key: jax.Array) -> dict[str, Any]:
    """Fresh float32 parameters, OpenPI's tree. Under `jax.eval_shape` nothing is allocated."""
    x_t = jnp.zeros((1, config.action_horizon, config.action_dim), jnp.float32)
    return Pi0(config).init(key, example_observation(config), x_t, jnp.zeros((1,), jnp.float32))[
        "params"
    ]


def shapes(config: Pi0Config) -> dict[str, Any]:
    """The parameter tree as `jax.ShapeDtypeStruct`s."""
    return trees.unflatten(_flat_shapes(config))


@functools.cache
def _flat_shapes(config: Pi0Config) -> dict[str, jax.ShapeDtypeStruct]:
    return trees.flatten(jax.eval_shape(functools.partial(init, config), jax.random.key(0)))


def freeze(config: Pi0Config) -> tuple[str, ...]:
    """Regexes of the parameters that OpenPI keeps fixed beside low-rank updates; () without any."""
    sizes = config.paligemma_variant, config.action_expert_variant
    return lora.freeze(*(size.lora for size in sizes))


def check_params(config: Pi0Config, params: Params, name: str = "params") -> None:
    """ValueError where parameters lack what the model needs; the message says whose they are."""
    recognize.check(shapes(config), params, name, whole=False)


def _apply(config: Pi0Config, params: Params, *args, method=None):
    return Pi0(config).apply({"params": params}, *args, method=method)


@typechecked
def velocity(
    config: Pi0Config,
    params: Params,
    observation: Observation,
    x_t: Float[Array, "b h a"],
    t: Float[Array, " b"],
) -> Float[Array, "b h a"]:
    """The velocity v_t at x_t: the direction from data to noise (noise is t = 1)."""
    check_observation(config, observation)
    check_params(config, params)
    return _apply(config, params, observation, x_t, t)


@typechecked
def flow_loss(
    config: Pi0Config,
    params: Params,
    observation: Observation,
    actions: Float[Array, "b h a"],
    *,
    noise: Float[Array, "b h a"],
    t: Float[Array, " b"],
) -> Float[Array, "b h"]:
    """Flow-matching loss: mean over action dimensions of (v(x_t, t) - u_t)^2, with x_t and u_t on
    the straight path of `flow.path`.
    """
    x_t, u_t = flow.path(actions, noise, t, config.sigma_min)
    return flow.squared_error(velocity(config, params, observation, x_t, t), u_t)


def loss(
    config: Pi0Config, params: Params, batch: structs.Batch, key: jax.Array
) -> tuple[jax.Array, structs.Metrics]:
    """Mean flow-matching loss of a batch; `key` gives the noise and times that OpenPI draws.

    Of a batch with an action mask, the mean over what that lets through, of all examples together.
    """
    if batch.action_mask is not None:
        value = jnp.mean(jnp.square(residual(config, params, batch, key)))
        return value, {"loss": value}
    noise, t = _noise_and_times(config, batch, key)
    value = jnp.mean(flow_loss(config, params, batch.observation, batch.actions, noise=noise, t=t))
    return value, {"loss": value}


def residual(
    config: Pi0Config, params: Params, batch: structs.Batch, key: jax.Array
) -> Float[Array, "b h a"]:
    """v(x_t, t) - u_t, whose mean square is `loss` with the same key.

    With an action mask, what that leaves out is 0 and the rest times √(all / let through).
    """
    noise, t = _noise_and_times(config, batch, key)
    x_t, u_t = flow.path(batch.actions, noise, t, config.sigma_min)
    difference = velocity(config, params, batch.observation, x_t, t) - u_t
    mask = batch.action_mask
    if mask is None:
        return difference
    counted = jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)
    return jnp.where(mask, difference * jnp.sqrt(mask.size / counted), 0.0)


def _noise_and_times(
    config: Pi0Config, batch: structs.Batch, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The noise [b, h, a] and times [b] that OpenPI draws from a key in training."""
    _, noise_key, time_key = jax.random.split(
        key, 3
    )  # the first is OpenPI's key for picture augmentation
    noise = jax.random.normal(noise_key, batch.actions.shape)
    return noise, flow.sample_time(time_key, batch.actions.shape[0], config.time_sampling)


@typechecked
def sample_actions(
    config: Pi0Config,
    params: Params,
    observation: Observation,
    *,
    noise: Float[Array, "b *n h a"],
    num_flow_steps: int = 10,
) -> Float[Array, "b *n h a"]:
    """Actions by Euler integration from `noise`, compiled as one program.

    The prefix is encoded once, its last layer no further than its keys and values; what depends on
    the time alone is computed for all steps at once.

    Args:
      noise: [b, h, a], or [b, n, h, a] for n samples of each observation.
    """
    check_observation(config, observation)
    return _sample(config, params, observation, noise, num_flow_steps)


@functools.partial(jax.jit, static_argnames=("config", "num_flow_steps"))
def _sample(
    config: Pi0Config, params: Params, observation: Observation, noise, num_flow_steps: int
):
    x_1 = noise.reshape(-1, *noise.shape[-2:])
    velocity, constants = cached_velocity(config, params, observation, len(x_1), num_flow_steps)
    actions = flow.integrate(velocity, x_1, num_flow_steps, constants)
    return finished(config, actions).reshape(noise.shape)


def cached_velocity(
    config: Pi0Config, params: Params, observation: Observation, b: int, num_flow_steps: int
):
    """What a sampler integrates: → (velocity, constants) as `flow.integrate` takes them.

    Encodes the prefix of each observation once, for b / b_observations samples of it.
    """
    check_params(config, params)
    cache, valid = _apply(config, params, observation, method=Pi0.encode_prefix)
    proprio = jnp.repeat(observation.proprio, b // len(observation.proprio), axis=0)
    repeated = observation.replace(proprio=proprio)

    def velocity(x_t, t, modulations):
        inputs = cache, valid, repeated, x_t, t, modulations
        return _apply(config, params, *inputs, method=Pi0.cached_velocity)

    times = jnp.asarray(flow.times(num_flow_steps))
    return velocity, (_apply(config, params, times, method=Pi0.modulations),)


def finished(config: Pi0Config, actions: jax.Array) -> jax.Array:
    """What was sampled, as it is given out."""
    return jnp.clip(actions, -1, 1) if config.open_pi_zero else actions


def embed_prefix(config: Pi0Config, params: Params, observation: Observation):
    """Picture and prompt tokens [b, s, d] and their validity [b, s]: what PaliGemma sees."""
    return _apply(config, params, observation, method=Pi0.embed_prefix)


def embed_suffix(
    config: Pi0Config, params: Params, observation: Observation, x_t: jax.Array, t: jax.Array
):
    """Suffix tokens [b, s, d], validity [b, s], block starts [s], π0.5's condition or None."""
    return _apply(config, params, observation, x_t, t, method=Pi0.embed_suffix)
