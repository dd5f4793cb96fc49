"""Normalisation of proprio and actions, its inverse, and its statistics. OpenPI's formulas and its
schema; open-pi-zero's bounds.

d is the raw (unpadded) dimension of the statistics; arrays may be padded beyond it.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from policymix.transforms import compose, selection

FIELDS = ("mean", "std", "q01", "q99")
SCHEMES = ("mean_std", "quantiles", "bounds", "none")
_OF_QUANTILES = ("quantiles", "bounds")
QUANTILES = (0.01, 0.99)
_EPSILON = {"mean_std": 1e-6, "quantiles": 1e-6, "bounds": 1e-8}


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


def normalize(x, stats: NormStats, *, scheme: str, mask: Sequence[bool] | None = None):
    """Raw [..., d'] → normalised, d' ≤ d.

    Args:
      scheme: "mean_std": (x - mean) / (std + 1e-6); "quantiles": 2 (x - q01) / (q99 - q01 + 1e-6)
        - 1, both OpenPI's; "bounds": clip(2 (x - q01) / (q99 - q01 + 1e-8) - 1, -1, 1),
        open-pi-zero's; "none": x, as in rlvla and for actions that are within ±1 already.
      mask: [d]; where it is False, dimensions pass through, as commands to a gripper may.
    """
    d = x.shape[-1]
    if d > len(stats.mean):
        raise ValueError(f"norm stats have {len(stats.mean)} dimensions, the data {d}")
    low, width = (values[:d] for values in _affine(stats, scheme))
    if scheme not in _OF_QUANTILES:
        normed = (x - low) / width
    elif scheme == "quantiles":
        normed = (x - low) / width * 2.0 - 1.0
    else:
        normed = np.clip(2.0 * (x - low) / width - 1.0, -1.0, 1.0)
    return normed if mask is None else np.where(_checked(mask, stats)[:d], normed, x)


def unnormalize(x, stats: NormStats, *, scheme: str, mask: Sequence[bool] | None = None):
    """The inverse of `normalize`, of "bounds" within them; dimensions beyond the statistics pass
    through unchanged.
    """
    d = min(x.shape[-1], len(stats.mean))
    head, tail = x[..., :d], x[..., d:]
    low, width = (values[:d] for values in _affine(stats, scheme))
    unit = (head + 1.0) / 2.0 if scheme in _OF_QUANTILES else head
    raw = unit * width + low
    if mask is not None:
        raw = np.where(_checked(mask, stats)[:d], raw, head)
    return np.concatenate([raw, tail], axis=-1)


def _affine(stats: NormStats, scheme: str) -> tuple[np.ndarray, np.ndarray]:
    """What is subtracted, and by what is divided, each [d]."""
    if scheme not in SCHEMES:
        near = difflib.get_close_matches(str(scheme), SCHEMES, n=1)
        raise ValueError(
            f"normalisation {scheme!r}: expected one of {', '.join(SCHEMES)}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    if scheme == "none":
        return np.zeros_like(stats.mean), np.ones_like(stats.mean)
    if scheme == "mean_std":
        return stats.mean, stats.std + _EPSILON[scheme]
    if stats.q01 is None or stats.q99 is None:
        raise ValueError(
            "quantile normalisation needs q01 and q99, which these norm stats lack; recompute "
            "the statistics"
        )
    return stats.q01, stats.q99 - stats.q01 + _EPSILON[scheme]


def _checked(mask: Sequence[bool], stats: NormStats) -> np.ndarray:
    mask = np.asarray(mask)
    if mask.dtype != bool or mask.shape != stats.mean.shape:
        raise ValueError(
            f"the mask of normalised dimensions is {mask.dtype} {mask.shape}; expected bool "
            f"{stats.mean.shape}, one for each dimension of the norm stats"
        )
    return mask


@dataclasses.dataclass(frozen=True)
class Normalize(compose.Transform):
    """`normalize` of every key that has statistics.

    Attributes:
      stats: {"state", "actions"}; masks: {key: [d]}, dimensions to be normalised.
    """

    stats: Stats
    scheme: str = "mean_std"
    masks: Mapping[str, tuple[bool, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for key, entry in self.stats.items():
            _affine(entry, self.scheme)
            if self.masks.get(key) is not None:
                _checked(self.masks[key], entry)

    def apply(self, example: compose.Example) -> dict[str, Any]:
        return self._each(example, normalize)

    def invert(self, example: compose.Example) -> dict[str, Any]:
        return self._each(example, unnormalize)

    def _each(self, example: compose.Example, function: Callable) -> dict[str, Any]:
        changed = {
            key: function(
                np.asarray(example[key]), entry, scheme=self.scheme, mask=self.masks.get(key)
            )
            for key, entry in self.stats.items()
            if key in example
        }
        return {**example, **changed}


def constant_dims(stats: NormStats, scheme: str = "mean_std") -> list[int]:
    """Dimensions without a scale: those that never change and, where quantiles make the scale,
    those whose middle 98 % are one value. Normalised, they are noise or out of bounds.
    """
    # Beyond float64's rounding of a mean, and far below any sensor's.
    flat = stats.std <= 1e-9 * np.maximum(np.abs(stats.mean), 1.0)
    if scheme in _OF_QUANTILES:
        low, width = _affine(stats, scheme)
        flat = flat | (width - _EPSILON[scheme] <= 1e-9 * np.maximum(np.abs(low), 1.0))
    return [int(d) for d in np.flatnonzero(flat)]


def chunk_counts(length: int, horizon: int) -> np.ndarray:
    """How often each frame of an episode occurs in its chunks of actions, int64 [length].

    Chunk i holds the frames i, …, i + horizon - 1, the last frame standing for those beyond the
    end. Frame j < length - 1 occurs min(j + 1, horizon) times, and the last one in what remains of
    length · horizon.
    """
    counts = np.minimum(np.arange(1, length + 1), horizon)
    if length:
        counts[-1] = length * horizon - counts[:-1].sum()
    return counts


def compute(values: np.ndarray, counts: np.ndarray | None = None) -> NormStats:
    """Statistics of [..., d] over all leading axes, in float64, quantiles exact.

    Args:
      counts: int [...], how often each vector occurs. The result is that of the vectors repeated
        so often, without repeating them.
    """
    block = values if counts is None else (values, counts)
    return compute_blocks([lambda: [block]])


def compute_blocks(shares: Sequence[selection.Share], parallel: Callable = map) -> NormStats:
    """Statistics of data that need not fit into memory; quantiles exact.

    Moments are merged, then `selection.quantiles` passes over the data two to four times.

    Args:
      shares: of the data, each a function that begins a pass over the same blocks: values [..., d],
        or (values [..., d], how often each occurs, int [...]).
      parallel: what maps the counting over shares, as a pool of threads does.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        parts, dtypes = zip(*parallel(_moments, shares), strict=True)
        moments = functools.reduce(Moments.merge, parts)
    if not moments.count:
        raise ValueError("norm stats of no data: the dataset or the choice of episodes is empty")
    if not np.isfinite(moments.squares).all():
        dim = int(np.argmin(np.isfinite(moments.squares)))
        if np.isfinite(moments.mean[dim]):
            raise ValueError(
                f"norm stats of values too large to be squared, in dimension {dim}, whose mean is "
                f"{moments.mean[dim]:.3g}: were they recorded, and in the right unit?"
            )
        raise ValueError(
            f"norm stats of values that are not finite, in dimension {dim}: a sensor that gave no "
            "number, or data that was not recorded; leave such episodes out"
        )
    found = selection.quantiles(
        shares,
        QUANTILES,
        moments.count,
        len(moments.mean),
        functools.reduce(np.promote_types, dtypes),
        parallel,
    )
    return NormStats(moments.mean, np.sqrt(moments.squares / moments.count), *found)


def _moments(share: selection.Share) -> tuple["Moments", np.dtype]:
    moments, dtype = Moments.of(np.zeros((0, 0))), np.dtype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):  # of this thread
        for values, counts in selection.pieces(share()):
            moments = moments.merge(Moments.of(values, counts))
            dtype = np.promote_types(dtype, values.dtype)
    return moments, dtype


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Number of values, their mean [d], and their summed squared distances from it [d]."""

    count: int
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, counts: np.ndarray | None = None) -> "Moments":
        """Those of [n, d], row i occurring counts[i] times."""
        values = np.asarray(values, np.float64)
        each = np.ones(len(values)) if counts is None else counts.astype(np.float64)
        total = int(each.sum())
        mean = each @ values / max(total, 1)
        return cls(total, mean, each @ (values - mean) ** 2)

    def merge(self, other: "Moments") -> "Moments":
        """Those of both together. Source: Chan, Golub and LeVeque, 1983, "Algorithms for computing
        the sample variance".
        """
        if not self.count or not other.count:
            return self if self.count else other
        count, apart = self.count + other.count, other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        between = apart**2 * (self.count * other.count / count)
        return Moments(count, mean, self.squares + other.squares + between)


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
