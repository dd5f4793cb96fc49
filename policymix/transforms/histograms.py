"""OpenPI's statistics of a stream, number for number: running moments, and quantiles read off
histograms that are laid out anew whenever a value falls outside.

For comparison, and for those who continue OpenPI's own statistics; `normalize.compute` is exact.
What its rule does to quantiles is kept, not mended: a quantile is the left edge of a bin; laying
out anew moves each bin's count to where its left edge falls, and loses what lies outside by
rounding. Source: openpi/shared/normalize.py, RunningStats, with the numpy that OpenPI pins (1.26),
which makes edges in float64 whatever the data.
"""

import dataclasses

import numpy as np

from policymix.transforms.normalize import QUANTILES, NormStats

BINS = 5000
_MARGIN = 1e-10  # beyond the extremes of the first batch


@dataclasses.dataclass(frozen=True, eq=False)
class State:
    """What is known so far.

    Attributes:
      count: number of vectors; mean, mean_of_squares, low, high: [d], in the data's dtype.
      edges: float64 [d, BINS + 1]; counts: float64 [d, BINS].
    """

    count: int
    mean: np.ndarray
    mean_of_squares: np.ndarray
    low: np.ndarray
    high: np.ndarray
    edges: np.ndarray
    counts: np.ndarray


def update(state: State | None, batch: np.ndarray) -> State:
    """The state after a batch [..., d] more; None before the first."""
    batch = _vectors(state, batch)
    mean, squares = np.mean(batch, axis=0), np.mean(batch**2, axis=0)
    low, high = np.min(batch, axis=0), np.max(batch, axis=0)
    if state is None:
        edges = _edges(np.float64(low) - _MARGIN, np.float64(high) + _MARGIN)
        return State(len(batch), mean, squares, low, high, edges, _histograms(batch, edges))
    edges, counts = state.edges, state.counts
    outside = np.any(low < state.low) or np.any(high > state.high)
    low, high = np.minimum(state.low, low), np.maximum(state.high, high)
    if outside:  # of one dimension: all are laid out anew
        edges = _edges(low, high)
        counts = np.stack(
            [
                np.histogram(old[:-1], bins=new, weights=held)[0]
                for old, new, held in zip(state.edges, edges, counts, strict=True)
            ]
        )
    count = state.count + len(batch)
    part = len(batch) / count
    return State(
        count,
        state.mean + (mean - state.mean) * part,
        state.mean_of_squares + (squares - state.mean_of_squares) * part,
        low,
        high,
        edges,
        counts + _histograms(batch, edges),
    )


def finish(state: State | None) -> NormStats:
    """The statistics so far. ValueError for fewer than two vectors."""
    if state is None or state.count < 2:
        raise ValueError(
            f"norm stats of {state.count if state else 0} vectors: histograms need two or more"
        )
    variance = np.maximum(state.mean_of_squares - state.mean**2, 0)
    quantiles = []
    for q in QUANTILES:
        found = [np.searchsorted(np.cumsum(held), q * state.count) for held in state.counts]
        quantiles.append(state.edges[np.arange(len(found)), found])
    return NormStats(state.mean, np.sqrt(variance), *quantiles)


def _vectors(state: State | None, batch: np.ndarray) -> np.ndarray:
    """[..., d] → [n, d]. ValueError where nothing can be counted."""
    batch = np.asarray(batch)
    batch = batch.reshape(-1, batch.shape[-1])
    if not np.issubdtype(batch.dtype, np.floating):
        batch = batch.astype(np.float64)
    if not len(batch):
        raise ValueError("norm stats: an empty batch")
    if state is not None and batch.shape[1] != len(state.mean):
        raise ValueError(
            f"norm stats: a batch of {batch.shape[1]} dimensions after {len(state.mean)}"
        )
    if not np.isfinite(batch).all():
        row, dim = (int(i) for i in np.argwhere(~np.isfinite(batch))[0])
        raise ValueError(
            f"norm stats: dimension {dim} of vector {row} is {batch[row, dim]}: a sensor that gave "
            "no number, or data that was not recorded"
        )
    return batch


def _edges(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """[d, BINS + 1]."""
    pairs = zip(np.float64(low), np.float64(high), strict=True)
    return np.stack([np.linspace(a, b, BINS + 1) for a, b in pairs])


def _histograms(batch: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Float64 [d, BINS]."""
    columns = zip(batch.T, edges, strict=True)
    return np.stack([np.histogram(x, bins=e)[0].astype(np.float64) for x, e in columns])
