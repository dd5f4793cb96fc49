"""Normalisation of proprio and actions, its inverse, and its statistics. OpenPI's formulas and its
schema.

d is the raw (unpadded) dimension of the statistics; arrays may be padded beyond it.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

FIELDS = ("mean", "std", "q01", "q99")
_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class NormStats:
    """Mean, population standard deviation, 1 % and 99 % quantiles (or None), each [d]."""

    mean: np.ndarray
    std: np.ndarray
    q01: np.ndarray | None = None
    q99: np.ndarray | None = None

    def __post_init__(self):
        if self.mean.ndim != 1 or self.mean.shape != self.std.shape:
            raise ValueError(
                f"norm stats: mean {self.mean.shape} and std {self.std.shape} must both be [d]"
            )
        for name in ("q01", "q99"):
            values = getattr(self, name)
            if values is not None and values.shape != self.mean.shape:
                raise ValueError(
                    f"norm stats: {name} has shape {values.shape}, mean {self.mean.shape}"
                )


Stats = dict[str, NormStats]  # "state" and "actions"


def normalize(x, stats: NormStats, *, use_quantiles: bool):
    """[..., d'] → normalised, d' ≤ d: (x - mean) / (std + 1e-6), or 2 (x - q01) / (q99 - q01 +
    1e-6) - 1.
    """
    d = x.shape[-1]
    if d > len(stats.mean):
        raise ValueError(f"norm stats have {len(stats.mean)} dimensions, the data {d}")
    if use_quantiles:
        q01, q99 = (values[:d] for values in _quantiles(stats))
        return (x - q01) / (q99 - q01 + _EPSILON) * 2.0 - 1.0
    return (x - stats.mean[:d]) / (stats.std[:d] + _EPSILON)


def unnormalize(x, stats: NormStats, *, use_quantiles: bool):
    """The inverse of `normalize`; dimensions beyond the statistics pass through unchanged."""
    d = min(x.shape[-1], len(stats.mean))
    head, tail = x[..., :d], x[..., d:]
    if use_quantiles:
        q01, q99 = (values[:d] for values in _quantiles(stats))
        head = (head + 1.0) / 2.0 * (q99 - q01 + _EPSILON) + q01
    else:
        head = head * (stats.std[:d] + _EPSILON) + stats.mean[:d]
    return np.concatenate([head, tail], axis=-1)


def _quantiles(stats: NormStats) -> tuple[np.ndarray, np.ndarray]:
    if stats.q01 is None or stats.q99 is None:
        raise ValueError(
            "quantile normalisation needs q01 and q99, which these norm stats lack; recompute "
            "the statistics"
        )
    return stats.q01, stats.q99


def compute(values: np.ndarray) -> NormStats:
    """Statistics of [..., d] over all leading axes, in float64, quantiles exact."""
    flat = np.asarray(values, np.float64).reshape(-1, np.shape(values)[-1])
    if not len(flat):
        raise ValueError("norm stats of no data: the dataset or the choice of episodes is empty")
    q01, q99 = np.quantile(flat, [0.01, 0.99], axis=0)
    return NormStats(flat.mean(0), flat.std(0), q01, q99)


def average(stats: Sequence[NormStats], coefficients: np.ndarray) -> NormStats:
    """Σ_k c_k of every number, standard deviations too: kai0's rule, kept for comparison."""
    return NormStats(*(_weighted(stats, coefficients, name) for name in FIELDS))


def pool(stats: Sequence[NormStats], coefficients: np.ndarray) -> NormStats:
    """Statistics of the mixture Σ_k c_k p_k of the inputs' data; mean and deviation are exact.

    mean = Σ c_k mean_k;  std² = Σ c_k (std_k² + mean_k²) - mean². The quantiles of a mixture lie
    between those of its parts; the outer ones are taken, so that nothing any input knew falls
    outside [-1, 1].
    """
    if np.any(np.asarray(coefficients) < 0):
        raise ValueError(
            "statistics cannot be pooled with the negative coefficients "
            f"{[float(c) for c in coefficients]}: a mixture of data has no negative parts; choose "
            "average, or the path of the ones to use"
        )
    counted = [s for c, s in zip(coefficients, stats, strict=True) if c > 0]
    mean = _weighted(stats, coefficients, "mean")
    second = sum(c * (s.std**2 + s.mean**2) for c, s in zip(coefficients, stats, strict=True))
    std = np.sqrt(np.maximum(second - mean**2, 0.0))
    if any(s.q01 is None or s.q99 is None for s in counted):
        return NormStats(mean, std)
    return NormStats(
        mean,
        std,
        np.min([s.q01 for s in counted], axis=0),
        np.max([s.q99 for s in counted], axis=0),
    )


def _weighted(stats: Sequence[NormStats], coefficients: np.ndarray, name: str) -> np.ndarray | None:
    arrays = [getattr(s, name) for s in stats]
    if any(array is None for array in arrays):
        return None
    return sum(c * array for c, array in zip(coefficients, arrays, strict=True))


def comparable(a: Stats, b: Stats) -> bool:
    """Whether two sets of statistics describe the same keys in the same dimensions."""
    return a.keys() == b.keys() and all(a[key].mean.shape == b[key].mean.shape for key in a)


def difference(a: Stats, b: Stats) -> str | None:
    """The first difference of two sets of statistics, in words; None if they are equal to 1e-6."""
    if a.keys() != b.keys():
        return f"keys {sorted(a)} and {sorted(b)}"
    for key in a:
        for field in FIELDS:
            mine, other = getattr(a[key], field), getattr(b[key], field)
            if mine is None and other is None:
                continue
            if mine is None or other is None:
                return f"{key}/{field} is given in one and absent in the other"
            if mine.shape != other.shape:
                return f"{key}/{field} has {len(mine)} and {len(other)} dimensions"
            close = np.isclose(mine, other, rtol=1e-6, atol=1e-9)
            if not close.all():
                d = int(np.argmin(close))
                return f"{key}/{field}[{d}] is {mine[d]:.6g} and {other[d]:.6g}"
    return None
