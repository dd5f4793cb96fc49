"""The loss over the mixes of two or three checkpoints, as a curve or a coloured triangle."""

import pathlib
from collections.abc import Sequence

import matplotlib.figure
import matplotlib.tri
import numpy as np

from policymix import files
from policymix.reports import pages

_CORNERS = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(0.75)]])
_MIX = "#d1495b"


def draw(
    coefficients: np.ndarray,
    losses: np.ndarray,
    names: Sequence[str],
    chosen: Sequence[np.ndarray],
    path: pathlib.Path,
) -> None:
    """Writes the picture of [m, n] coefficients on a simplex and their [m] losses, n = 2 or 3,
    with a mark at each [n] of `chosen`.
    """
    shown = [c for c in chosen if (np.asarray(c) >= 0).all()]
    figure = matplotlib.figure.Figure(figsize=(7, 5), layout="constrained")
    axis = figure.subplots()
    if coefficients.shape[1] == 2:
        _segment(axis, coefficients, losses, names, shown)
    else:
        _triangle(axis, coefficients, losses, names, shown)
    if not shown:
        axis.set_title("the mix that was written does not lie in this picture")
    files.write_whole(path, pages.png(figure))


def _segment(axis, coefficients, losses, names, chosen) -> None:
    order = np.argsort(coefficients[:, 1])
    axis.plot(coefficients[order, 1], losses[order], marker=".", color="#2f4b7c")
    best = int(np.argmin(losses))
    axis.plot(coefficients[best, 1], losses[best], "o", color="black", label="lowest here")
    for place in chosen:
        label = "the mix" if len(chosen) == 1 else f"the mix at {place[1]:.3g}"
        axis.axvline(place[1], color=_MIX, label=label, alpha=0.5 + 0.5 * place[1])
    axis.set_xlabel(f"coefficient of {names[1]} (0: {names[0]} alone)")
    axis.set_ylabel("loss on the selection batches")
    axis.legend()


def _triangle(axis, coefficients, losses, names, chosen) -> None:
    x, y = (coefficients @ _CORNERS).T
    mesh = matplotlib.tri.Triangulation(x, y)
    filled = axis.tricontourf(mesh, losses, levels=14, cmap="viridis")
    axis.tricontour(mesh, losses, levels=14, colors="white", linewidths=0.4)
    axis.figure.colorbar(filled, ax=axis, label="loss on the selection batches", shrink=0.8)
    best = int(np.argmin(losses))
    ring = {"color": "none", "markeredgecolor": "#ff9f1c", "markeredgewidth": 2, "markersize": 16}
    axis.plot(x[best], y[best], "o", label="lowest here", clip_on=False, zorder=4, **ring)
    for number, mix in enumerate(chosen):
        label = None if number else "the mix"
        style = {"color": _MIX, "markeredgecolor": "white", "markersize": 12, "label": label}
        style |= {"clip_on": False, "zorder": 3}
        axis.plot(*(mix @ _CORNERS), "X", **style)
    for corner, name, where in zip(_CORNERS, names, ("right", "left", "center"), strict=True):
        up = corner[1] > 0
        axis.annotate(
            name,
            corner,
            textcoords="offset points",
            xytext=(0, 8 if up else -16),
            ha="center" if up else where,
        )
    axis.set_aspect("equal")
    axis.margins(0.1)
    axis.set_axis_off()
    axis.legend(loc="upper left")
