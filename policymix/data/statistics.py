"""Statistics of a dataset's features as LeRobot stores them: min, max, mean, deviation, quantiles.

Quantiles are exact (linear between neighbours), where LeRobot estimates them by histograms. Those
of pictures are of sampled frames, channel by channel, in [0, 1].
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
MOMENTS = ("min", "max", "mean", "std", "count")
NAMES = (*MOMENTS, *_QUANTILES)
_BYTE = 255  # what a byte holds, and what it is divided by
_LARGE, _TARGET = 300, 150  # sides in pixels: from _LARGE on pictures are thinned towards _TARGET


def of_numbers(values: np.ndarray) -> dict[str, np.ndarray]:
    """[T, …, n] → {name: [n]} over all other axes, as LeRobot; of scalars [T] → [1].

    "count" is [1], the number of frames.
    """
    frames = len(values)
    values = values.reshape(-1, 1 if values.ndim == 1 else values.shape[-1])
    exact = values.astype(np.float64)
    moments = {
        "min": values.min(0),
        "max": values.max(0),
        "mean": exact.mean(0),
        "std": exact.std(0),
        "count": np.array([frames]),
    }
    quantiles = np.quantile(exact, list(_QUANTILES.values()), axis=0)
    return moments | dict(zip(_QUANTILES, quantiles, strict=True))


def sampled(num_frames: int) -> np.ndarray:
    """The frames of an episode whose pictures are counted: num_frames^0.75, evenly spaced."""
    count = max(min(100, num_frames), min(int(num_frames**0.75), 10_000))
    return np.round(np.linspace(0, num_frames - 1, count)).astype(np.int64)


def histogram(image: np.ndarray) -> np.ndarray:
    """How often each value occurs: uint8 [hh, ww, 3] → int64 [3, 256]; large pictures thinned."""
    height, width = image.shape[:2]
    stride = 1 if max(height, width) < _LARGE else max(1, max(height, width) // _TARGET)
    channels = np.moveaxis(image[::stride, ::stride], -1, 0)
    return np.stack([np.bincount(channel.ravel(), minlength=256) for channel in channels])


def of_histogram(counts: np.ndarray, num_images: int) -> dict[str, np.ndarray]:
    """[3, 256] of `num_images` pictures → {name: [3, 1, 1]} in [0, 1]; "count" is [1]."""
    levels, total = np.arange(256) / 255, counts.sum(1, keepdims=True)
    mean = (counts * levels).sum(1, keepdims=True) / total
    variance = (counts * (levels - mean) ** 2).sum(1, keepdims=True) / total
    below = np.cumsum(counts, axis=1)

    def quantile(q: float) -> np.ndarray:
        places = q * (total[:, 0] - 1)
        low, high = (
            np.array([np.searchsorted(b, p, side="right") for b, p in zip(below, ps, strict=True)])
            for ps in (np.floor(places), np.ceil(places))
        )
        return (levels[low] + (places % 1) * (levels[high] - levels[low]))[:, None]

    found = {"min": quantile(0), "max": quantile(1), "mean": mean, "std": np.sqrt(variance)}
    found |= {name: quantile(q) for name, q in _QUANTILES.items()}
    return {name: values[..., None] for name, values in found.items()} | {
        "count": np.array([num_images])
    }


def of_pictures(stats: Mapping[str, Any], where: str) -> dict[str, np.ndarray] | None:
    """Stored statistics of a feature of pictures: {name: [3, 1, 1]}, "count" [1]; quantiles only if
    all are there. None where they are worth nothing: some are missing, or the deviation is zero
    between different values, or may be what LeRobot 0.4 made of it. That squared pictures in bytes,
    so that what it took for the mean of x² is at most 255: deviations with s² + m² <= 255 / 255²
    are believed only where no value is above 15, whose squares fit into a byte. They may be right,
    of dark pictures.

    Raises:
      ValueError: says `where` they have another shape, or are not finite.
    """
    if not stats or any(stats.get(name) is None for name in MOMENTS):
        return None
    names = NAMES if all(stats.get(name) is not None for name in _QUANTILES) else MOMENTS
    found = {name: np.asarray(stats[name]) for name in names}
    for name, values in found.items():
        shape = (1,) if name == "count" else (3, 1, 1)
        if values.shape != shape or values.dtype.kind not in "iuf" or not np.isfinite(values).all():
            raise ValueError(
                f"{where}: statistic {name!r} is {values.tolist()}, expected finite numbers of "
                f"shape {list(shape)}"
            )
    if ((found["std"] == 0) & (found["min"] != found["max"])).any() or found["count"][0] < 1:
        return None
    squares = found["std"] ** 2.0 + found["mean"] ** 2.0
    overflows = found["max"] * _BYTE > 15.5
    if (overflows & (squares <= (1 + 1e-6) / _BYTE) & (found["min"] != found["max"])).any():
        return None
    return found


def aggregate(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Statistics of several sets of frames → of all of them, the "count" of each being its share.

    With n_i frames of mean m_i and deviation s_i:
    m = Σ n_i m_i / Σ n_i, s² = Σ n_i (s_i² + (m_i - m)²) / Σ n_i: exact, as minimum and maximum.
    Quantiles cannot be, they lie between the parts'. Given is the outer end, the least up to the
    median and the greatest above (LeRobot 0.6); none where a part has none.
    """
    counts = np.array([int(part["count"][0]) for part in parts])
    shares = counts / counts.sum()
    mean, deviation = (
        np.stack([np.asarray(part[name], np.float64) for part in parts]) for name in ("mean", "std")
    )
    total = np.tensordot(shares, mean, 1)
    found = {
        "min": np.min([part["min"] for part in parts], axis=0),
        "max": np.max([part["max"] for part in parts], axis=0),
        "mean": total,
        "std": np.sqrt(np.tensordot(shares, deviation**2 + (mean - total) ** 2, 1)),
        "count": np.array([counts.sum()]),
    }
    for name, q in _QUANTILES.items():
        if all(name in part for part in parts):
            values = [part[name] for part in parts]
            found[name] = np.min(values, axis=0) if q <= 0.5 else np.max(values, axis=0)
    return found


class Pictures:
    """What is known of an episode's pictures: how often each value occurs in the sampled ones,
    int64 [3, 256], and their number; or only the statistics.
    """

    def __init__(self, counts=None, num_images: int = 0, known: dict | None = None):
        self.counts, self.num_images, self._known = counts, num_images, known

    def stats(self) -> dict[str, np.ndarray]:
        if self._known is not None:
            return self._known
        return of_histogram(self.counts, self.num_images)


class Total:
    """What is known of all episodes' pictures, as sums: those that were counted, exactly, and
    those of which only statistics were given.
    """

    def __init__(self):
        self._parts: list[Pictures | None] = [None, None]  # counted, given

    def add(self, one: Pictures) -> None:
        given = one.counts is None
        if (before := self._parts[given]) is None:
            self._parts[given] = one
        elif given:
            self._parts[given] = Pictures(known=aggregate([before.stats(), one.stats()]))
        else:
            total = before.num_images + one.num_images
            self._parts[given] = Pictures(before.counts + one.counts, total)

    def stats(self) -> dict[str, np.ndarray]:
        parts = [part.stats() for part in self._parts if part is not None]
        return aggregate(parts) if self._parts[1] is not None else parts[0]
