"""Real-time chunking: a new chunk that goes on from the one the robot is still executing.

While a chunk is computed the robot moves on; a chunk sampled without regard to the old one may then
jump. Here sampling is guided towards what both chunks say of the same steps: fully for the steps
that will have been executed before the new chunk arrives, less and less after them.
Source: Black, Galliker, Levine 2025 (arXiv:2506.07339), after pseudo-inverse guidance (Song et al.
2023, Pokle et al. 2023, arXiv:2310.04432). b batch, h action horizon, a action.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from policymix.models import flow, pi0
from policymix.models.config import Pi0Config
from policymix.structs import Array, Observation, Params, typechecked


@typechecked
def weights(
    horizon: int, delay: int | Int[Array, ""], replan_steps: int | Int[Array, ""]
) -> Float[Array, " h"]:
    """How much step i of the new chunk is held to the old one.

    1 for i < d, 0 for i ≥ h - s, and c (e^c - 1) / (e - 1) between, with
    c = (h - s - i) / (h - s - d + 1), d = `delay` and s = `replan_steps`.
    """
    i, end = jnp.arange(horizon), horizon - replan_steps
    c = jnp.clip((end - i) / jnp.maximum(end - delay + 1, 1), 0.0, 1.0)
    return jnp.where(i < delay, 1.0, c * jnp.expm1(c) / jnp.expm1(1.0))


@typechecked
def continue_actions(
    config: Pi0Config,
    params: Params,
    observation: Observation,
    *,
    noise: Float[Array, "b h a"],
    previous: Float[Array, "b h a"],
    delay: int | Int[Array, ""],
    replan_steps: int | Int[Array, ""],
    num_flow_steps: int = 10,
    max_guidance: float | Float[Array, ""] = 5.0,
) -> Float[Array, "b h a"]:
    """Samples a chunk whose beginning agrees with the end of the previous one.

    Each Euler step moves along v - min(β, (t² + (1 - t)²) / (t (1 - t))) · W (y - x̂) ∂x̂/∂x, where
    x̂ = x_t - t v is what the network expects at t = 0, y is `previous` and W are `weights`.

    Args:
      previous: the old chunk from the step on at which the new one begins, as the model gave it;
        whatever stands in its last `replan_steps` rows is not looked at.
      delay: d, steps that are executed before the new chunk arrives: they are returned as they are
        in `previous`.
      replan_steps: s, executed of a chunk before the next one begins.
      max_guidance: β.
    """
    pi0.check_observation(config, observation)
    numbers = delay, replan_steps, max_guidance
    return _continue(config, params, observation, noise, previous, numbers, num_flow_steps)


@functools.partial(jax.jit, static_argnames=("config", "num_flow_steps"))
def _continue(
    config: Pi0Config, params, observation, noise, previous, numbers, num_flow_steps: int
):
    delay, replan_steps, max_guidance = numbers
    held = weights(noise.shape[1], delay, replan_steps)[None, :, None]
    velocity, constants = pi0.cached_velocity(
        config, params, observation, len(noise), num_flow_steps
    )

    def guided(x_t, t, modulations):
        at = t[:, None, None]

        def expected(x):
            v_t = velocity(x, t, modulations)
            return x - at * v_t, v_t

        clean, pull, v_t = jax.vjp(expected, x_t, has_aux=True)
        (direction,) = pull(held * (previous - clean))
        strength = (at**2 + (1 - at) ** 2) / jnp.maximum(at * (1 - at), 1e-6)
        return v_t - jnp.minimum(max_guidance, strength) * direction

    actions = pi0.finished(config, flow.integrate(guided, noise, num_flow_steps, constants))
    started = jnp.arange(noise.shape[1])[None, :, None] < delay
    return jnp.where(started, previous, actions)
