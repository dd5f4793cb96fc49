"""Flow matching: the path from noise to data, its velocity, the times of training, and Euler
integration.

Convention: t = 1 is noise and t = 0 is data, as in OpenPI. The π0 paper (arXiv:2410.24164) runs the
other way.
Method: Lipman et al. 2023 (arXiv:2210.02747), Liu et al. 2023 (arXiv:2209.03003).
b batch, h action horizon, a action.
"""

from collections.abc import Callable
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from policymix.structs import Array, typechecked


@typechecked
def path(
    actions: Float[Array, "b h a"],
    noise: Float[Array, "b h a"],
    t: Float[Array, " b"],
    sigma_min: float = 0.0,
) -> tuple[Float[Array, "b h a"], Float[Array, "b h a"]]:
    """The point x_t = t * noise + (1 - t) * actions, and its velocity u_t = noise - actions.

    With `sigma_min` s that much noise is left at t = 0 (Lipman et al.): the noise of x_t is
    multiplied by s + (1 - s) t, and that of u_t by 1 - s.
    """
    t, kept = einops.rearrange(t, "b -> b 1 1"), 1 - sigma_min
    return (sigma_min + kept * t) * noise + (1 - t) * actions, kept * noise - actions


@typechecked
def squared_error(v_t: Float[Array, "b h a"], u_t: Float[Array, "b h a"]) -> Float[Array, "b h"]:
    """Mean over action dimensions of (v_t - u_t)^2; padded dimensions count, as in OpenPI."""
    return jnp.mean(jnp.square(v_t - u_t), axis=-1)


def sample_time(key: jax.Array, batch_size: int, distribution: str = "beta") -> jax.Array:
    """Training times [b] in (0.001, 1].

    Args:
      distribution: "beta", Beta(1.5, 1), more of them near the noise (OpenPI's); or "uniform", one
        in each of b equal parts (as open-pi-zero draws them).
    """
    if distribution == "uniform":
        start = jax.random.uniform(key) + jnp.arange(batch_size) / batch_size
        drawn = start % 1
    else:
        drawn = jax.random.beta(key, 1.5, 1.0, (batch_size,))
    return drawn * 0.999 + 0.001


def times(num_flow_steps: int) -> np.ndarray:
    """The times [s] at which Euler integration asks for a velocity: 1, 1 - 1/s, … 1/s.

    They are summed up in float32 as OpenPI does: embedded times tell the difference.
    """
    if num_flow_steps < 1:
        raise ValueError(f"num_flow_steps is {num_flow_steps}; at least 1 is needed")
    steps = np.full(num_flow_steps, -1.0 / num_flow_steps, np.float32)
    steps[0] = 1.0
    return np.cumsum(steps, dtype=np.float32)


def integrate(
    velocity: Callable[..., jax.Array],
    noise: jax.Array,
    num_flow_steps: int,
    constants: tuple[Any, ...] = (),
) -> jax.Array:
    """Euler steps from x_1 = noise to x_0: x ← x - v(x, t) / s at all `times`, one compiled loop.

    Args:
      velocity: (x_t [b, h, a], t [b], *constants of the step) → v_t [b, h, a].
      constants: trees of what differs from step to step and from nothing else, [s, …].
    """

    def step(x_t, inputs):
        t, *rest = inputs
        v_t = velocity(x_t, jnp.full(x_t.shape[:1], t), *rest)
        return x_t - v_t / num_flow_steps, None

    return jax.lax.scan(step, noise, (jnp.asarray(times(num_flow_steps)), *constants))[0]


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


@typechecked
def embed_time_by_position(
    t: Float[Array, " b"], width: int, max_period: float = 10_000.0
) -> Float[Array, "b d"]:
    """Sines, then cosines, of t / period, with periods geometric from 1 to `max_period`: a
    position's embedding (arXiv:1706.03762), as open-pi-zero embeds times.
    """
    if width < 4 or width % 2:
        raise ValueError(f"a time embedding has as many sines as cosines, 2 at least; got {width}")
    periods = max_period ** jnp.linspace(0.0, 1.0, width // 2)
    angles = t[:, None] / periods[None, :]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
