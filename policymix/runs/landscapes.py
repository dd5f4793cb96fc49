"""The loss over all mixes of two or three checkpoints: a segment, or a triangle."""

import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from policymix import metrics
from policymix.mixing.objective import Objective
from policymix.reports import landscapes

_POINTS = {2: 21, 3: 10}  # on the segment; on each side of the triangle


def check(n: int) -> None:
    """ValueError if there is no picture of so many inputs."""
    if n not in _POINTS:
        raise ValueError(
            f"--landscape shows the mixes of 2 or 3 checkpoints; {n} are mixed: leave some out"
        )


def points(n: int) -> np.ndarray:
    """[m, n] coefficients: a regular grid over the simplex, corners and edges included."""
    steps = _POINTS[n] - 1
    grid = [c for c in itertools.product(range(steps + 1), repeat=n) if sum(c) == steps]
    return np.array(grid, np.float64) / steps


def draw(
    objective: Objective, names: list[str], chosen: Sequence[np.ndarray], path: pathlib.Path
) -> dict[str, Any]:
    """Evaluates the grid on all selection batches, and draws it to `path`.

    Args:
      names: of the n checkpoints. chosen: [n] each, the mixes that were written, without groups.

    Returns:
      For mix.json: coefficients [m][n] and loss [m].
    """
    grid = points(len(names))
    losses = [float(objective.value(c)) for c in metrics.progress(list(grid), "landscape")]
    landscapes.draw(grid, np.array(losses), names, chosen, path)
    return {"coefficients": grid.tolist(), "loss": losses}
