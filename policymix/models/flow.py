"""Flow matching: the path from noise to data, its velocity, the times of training, and Euler
integration.

Convention: t = 1 is noise and t = 0 is data, as in OpenPI. The π0 paper (arXiv:2410.24164) runs the
other way.
Method: Lipman et al. 2023 (arXiv:2210.02747), Liu et al. 2023 (arXiv:2209.03003).
b batch, h action horizon, a action.
"""

from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp
from jaxtyping import Float

from policymix.structs import Array, typechecked


@typechecked
def path(
    actions: Float[Array, "b h a"], noise: Float[Array, "b h a"], t: Float[Array, " b"]
) -> tuple[Float[Array, "b h a"], Float[Array, "b h a"]]:
    """The point x_t = t * noise + (1 - t) * actions, and its velocity u_t = noise - actions."""
    t = einops.rearrange(t, "b -> b 1 1")
    return t * noise + (1 - t) * actions, noise - actions


@typechecked
def squared_error(v_t: Float[Array, "b h a"], u_t: Float[Array, "b h a"]) -> Float[Array, "b h"]:
    """Mean over action dimensions of (v_t - u_t)^2; padded dimensions count, as in OpenPI."""
    return jnp.mean(jnp.square(v_t - u_t), axis=-1)


def sample_time(key: jax.Array, batch_size: int) -> jax.Array:
    """Training times [b]: Beta(1.5, 1) * 0.999 + 0.001, more of them near the noise."""
    return jax.random.beta(key, 1.5, 1.0, (batch_size,)) * 0.999 + 0.001


def integrate(
    velocity: Callable[[jax.Array, jax.Array], jax.Array], noise: jax.Array, num_flow_steps: int
) -> jax.Array:
    """Euler steps from x_1 = noise to x_0: x ← x - v(x, t) / n at t = 1, 1 - 1/n, … 1/n.

    Args:
      velocity: (x_t [b, h, a], t [b]) → v_t [b, h, a].
      num_flow_steps: n ≥ 1.
    """
    if num_flow_steps < 1:
        raise ValueError(f"num_flow_steps is {num_flow_steps}; at least 1 is needed")
    dt = -1.0 / num_flow_steps

    def step(i, carry):
        del i
        x_t, t = carry
        return x_t + dt * velocity(x_t, jnp.full(x_t.shape[:1], t)), t + dt

    x_0, _ = jax.lax.fori_loop(0, num_flow_steps, step, (noise, jnp.asarray(1.0, noise.dtype)))
    return x_0


@typechecked
def embed_time(
    t: Float[Array, " b"], width: int, min_period: float = 4e-3, max_period: float = 4.0
) -> Float[Array, "b d"]:
    """Sines, then cosines, of 2π t / period, with periods geometric between the two ends."""
    if width % 2:
        raise ValueError(f"a time embedding has as many sines as cosines; width {width} is odd")
    fraction = jnp.linspace(0.0, 1.0, width // 2)
    period = min_period * (max_period / min_period) ** fraction
    # Angles reach 1,500 radians, where one rounding of the frequency moves them by 1e-4: the order
    # of these operations is OpenPI's.
    frequency = 1.0 / period * 2 * jnp.pi
    angles = jnp.einsum("i,j->ij", t, frequency, precision=jax.lax.Precision.HIGHEST)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
