"""The arithmetic of chunk-level offline reinforcement learning: arrays in, numbers out.

b batch, n chunks of one state, e members of the critic's ensemble, h action horizon, a action. A
mean over a batch is a mean over its rows; what is padded is masked before it is summed.

Flow matching: t = 1 is noise and t = 0 is data, as in `models.flow`. The papers of flow Q-learning
(arXiv:2502.02538) and Q-chunking (arXiv:2507.07969) run the other way: their time is 1 - t, and
their velocity is the negative of ours; the losses are the same numbers.
"""

import math
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from policymix.structs import Array

# exp of more than this, squared or times a loss and summed over a batch, leaves float32.
_LARGEST_EXPONENT = 40.0


def critic_loss(q: Array, target: Array, mask: Array) -> jax.Array:
    """Mean over members and over the rows that count: 1/(e Σ_i m_i) Σ_j Σ_i m_i (Q_ji - y_i)².

    As in Q-chunking (arXiv:2507.07969), there with the rows left out in the denominator. With one
    member it is the usual squared error.

    Args:
      q: [e, b]; target: y [b], taken as constant; mask: [b], False: what came after is not known.
    """
    chex.assert_rank([q, target, mask], [2, 1, 1])
    chex.assert_equal_shape([q[0], target, mask])
    error = jnp.square(q - jax.lax.stop_gradient(target)[None])
    mask = mask.astype(q.dtype)
    return jnp.sum(jnp.mean(error, axis=0) * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def value_loss(value: Array, q: Array, expectile: float) -> jax.Array:
    """Expectile regression, mean of |expectile - 1[u < 0]| u² with u = q - value.

    The implicit maximum of implicit Q-learning (Kostrikov et al. 2021, arXiv:2110.06169): 0.5 is
    half the squared error, towards 1 the value goes to the best chunk of the data.

    Args:
      value: [b]; q: [b], taken as constant.
    """
    chex.assert_rank([value, q], 1)
    chex.assert_equal_shape([value, q])
    difference = jax.lax.stop_gradient(q) - value
    weight = jnp.where(difference < 0, 1 - expectile, expectile)
    return jnp.mean(weight * jnp.square(difference))


def soft_value_target(q: Array, log_prob: Array, entropy_temperature: float) -> jax.Array:
    """[b], mean over n chunks of the policy of q - entropy_temperature * log_prob.

    The soft value of maximum-entropy learning (Haarnoja et al. 2018, arXiv:1801.01290). A chunk's
    log-probability is a sum over h * a numbers, so temperatures are small.

    Args:
      q, log_prob: [n, b].
    """
    chex.assert_rank([q, log_prob], 2)
    chex.assert_equal_shape([q, log_prob])
    return jnp.mean(q - entropy_temperature * log_prob, axis=0)


def squared_value_loss(value: Array, target: Array) -> jax.Array:
    """Mean of (value - target)²; both [b], the target taken as constant."""
    chex.assert_rank([value, target], 1)
    chex.assert_equal_shape([value, target])
    return jnp.mean(jnp.square(value - jax.lax.stop_gradient(target)))


def advantage_weights(
    advantage: Array, temperature: float, max_weight: float, normalize: bool
) -> jax.Array:
    """w = min(exp(advantage / temperature), max_weight), constants in the policy's loss.

    Advantage-weighted regression (Peng et al. 2019, arXiv:1910.00177), clipped as in implicit
    Q-learning. Normalised, w / mean of w. The clip is one of the exponent, so that nothing
    overflows whatever the advantage: unclipped weights (max_weight 0) end at e^40, or, normalised,
    nowhere.

    Args:
      advantage: [b] or [b, n]; the mean is over all of it.
    """
    chex.assert_rank(advantage, {1, 2})
    largest = min(math.log(max_weight), _LARGEST_EXPONENT) if max_weight else _LARGEST_EXPONENT
    exponent = jax.lax.stop_gradient(advantage) / temperature
    if not normalize:
        return jnp.exp(jnp.minimum(exponent, largest))
    if max_weight:
        exponent = jnp.minimum(exponent, largest)
    # The quotient does not change when all exponents are shifted; the highest is then e^0, so that
    # the mean of n weights is at least 1 / n.
    weights = jnp.exp(exponent - jnp.max(exponent))
    return weights / jnp.mean(weights)


def policy_loss(log_prob: Array, weights: Array) -> jax.Array:
    """-mean of weights * log_prob, advantage-weighted regression (arXiv:1910.00177).

    Args:
      log_prob: [b] or [b, n], of the data's chunks; a flow policy's is the negative of its
        `flow_error`. weights: of the same shape, constants.
    """
    chex.assert_rank(log_prob, {1, 2})
    chex.assert_equal_shape([log_prob, weights])
    return -jnp.mean(jax.lax.stop_gradient(weights) * log_prob)


def effective_batch(weights: Array) -> jax.Array:
    """(Σ w)² / (n Σ w²), Kish's effective sample size as a fraction: 1 where all count alike.

    Args:
      weights: of any shape with n numbers, none negative.
    """
    chex.assert_type(weights, float)
    weights = weights / jnp.maximum(jnp.max(weights), jnp.finfo(weights.dtype).tiny)
    total = jnp.sum(weights)
    return jnp.square(total) / jnp.maximum(weights.size * jnp.sum(jnp.square(weights)), 1e-8)


def gaussian_log_prob(
    mean: Array, std: Array, actions: Array, action_is_pad: Array | None = None
) -> jax.Array:
    """Log-density [...] of chunks under a diagonal Normal, Σ over steps not padded and over a.

    log N(x; m, s) = -((x - m) / s)² / 2 - log s - log(2π) / 2.

    Args:
      mean, std, actions: [..., h, a], of one rank and with axes that are equal or 1.
      action_is_pad: [..., h]; None: nothing is.
    """
    chex.assert_equal_rank([mean, std, actions])
    standard = (actions - mean) / std
    log_prob = -0.5 * jnp.square(standard) - jnp.log(std) - 0.5 * math.log(2 * math.pi)
    return jnp.sum(_played(jnp.sum(log_prob, axis=-1), action_is_pad), axis=-1)


def flow_path(actions: Array, noise: Array, t: Array) -> tuple[jax.Array, jax.Array]:
    """The point x_t = t * noise + (1 - t) * actions, and its velocity u_t = noise - actions.

    Flow matching on straight paths (Lipman et al. 2023, arXiv:2210.02747).

    Args:
      actions, noise: [..., h, a]; t: [...].
    """
    chex.assert_equal_shape([actions, noise])
    chex.assert_rank(t, actions.ndim - 2)
    t = t[..., None, None]
    return t * noise + (1 - t) * actions, noise - actions


def flow_error(v_t: Array, u_t: Array, action_is_pad: Array | None = None) -> jax.Array:
    """[...], Σ over steps not padded of the mean over a of (v_t - u_t)², divided by h.

    By h, and not by the steps that were played, so that all of them count alike.

    Args:
      v_t, u_t: [..., h, a]; action_is_pad: [..., h]; None: nothing is.
    """
    chex.assert_equal_shape([v_t, u_t])
    error = jnp.mean(jnp.square(v_t - u_t), axis=-1)
    return jnp.mean(_played(error, action_is_pad), axis=-1)


def integrate(
    velocity: Callable[[Array, Array], Array], noise: Array, num_flow_steps: int
) -> jax.Array:
    """Euler steps from x_1 = noise to x_0: x ← x - v(x, t) / s at t = 1, 1 - 1/s, … 1/s.

    Args:
      velocity: (x_t [..., h, a], t [...]) → v_t; noise: [..., h, a].
    """
    chex.assert_rank(noise, {3, 4})

    def step(x_t, t):
        return x_t - velocity(x_t, jnp.full(x_t.shape[:-2], t)) / num_flow_steps, None

    times = 1 - jnp.arange(num_flow_steps, dtype=noise.dtype) / num_flow_steps
    return jax.lax.scan(step, noise, times)[0]


def _played(per_step: Array, action_is_pad: Array | None) -> Array:
    """[..., h] with zeros where a step is padded."""
    return per_step if action_is_pad is None else jnp.where(action_is_pad, 0.0, per_step)
