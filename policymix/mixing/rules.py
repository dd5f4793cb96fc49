"""Closed-form rules for mixing coefficients: numbers in, coefficients [n] that sum to one out."""

import numpy as np
from jaxtyping import Float

from policymix.structs import typechecked


@typechecked
def uniform(n: int) -> Float[np.ndarray, " n"]:
    """1/n for each of n checkpoints: a model soup (Wortsman et al. 2022, arXiv:2203.05482)."""
    if n < 1:
        raise ValueError("there is nothing to mix: no checkpoints were given")
    return np.full(n, 1.0 / n)


def inverse_loss(losses, power: float = 2.0) -> Float[np.ndarray, " n"]:
    """c_k ∝ 1 / (loss_k + 1e-8)^power, normalised: lower loss, larger coefficient.

    Args:
      losses: [n] validation losses of the single checkpoints, finite and not negative.
    """
    losses = np.asarray(losses, np.float64)
    if losses.ndim != 1 or not np.all(np.isfinite(losses)) or np.any(losses < 0):
        raise ValueError(
            f"inverse_loss needs n losses that are finite and not negative, got {losses}"
        )
    # Scaled by the smallest loss, so that no power of a tiny loss can overflow.
    inverse = ((losses + 1e-8) / (losses.min() + 1e-8)) ** -float(power)
    return inverse / inverse.sum()


def normalize(coefficients) -> Float[np.ndarray, " n"]:
    """c / Σ c. Negative coefficients are allowed (they subtract a model); a sum of zero is not.

    Raises:
      ValueError: coefficients are not finite, not one-dimensional, or cancel.
    """
    coefficients = np.asarray(coefficients, np.float64)
    if coefficients.ndim != 1 or not np.all(np.isfinite(coefficients)):
        raise ValueError(f"coefficients must be n finite numbers, got {coefficients.tolist()}")
    total = coefficients.sum()
    if abs(total) <= 1e-12 * np.abs(coefficients).sum():
        raise ValueError(
            f"the coefficients {coefficients.tolist()} sum to zero, so they cannot be normalised; "
            "give at least one that is not cancelled"
        )
    return coefficients / total
