"""Quadratic programmes over simplices: the small problem inside every second-order search.

Coefficients of n checkpoints lie on a simplex: c ≥ 0, Σ c = 1. With groups of parameters they lie
on a product of simplices, one after another in a flat vector.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from policymix.mixing import rules

_EPS = float(np.finfo(np.float64).eps)


def minimize(
    curvature: np.ndarray,
    gradient: np.ndarray,
    start: np.ndarray,
    sizes: Sequence[int] | None = None,
) -> np.ndarray:
    """argmin of ½ (c - s)ᵀ H (c - s) + gᵀ (c - s) over c ≥ 0 with Σ c = 1 in every group: [n].

    A primal active-set method (Nocedal & Wright 2006, algorithm 16.3): minimise on the support as
    if there were no bounds, stop at the first bound in the way, release the coefficient that most
    wants to grow. The value falls from one support to the next, so that none comes twice and the
    method ends; the answer is exact to rounding, and zeros are zeros.

    Args:
      curvature: H [n, n], symmetric positive semi-definite. What it says of directions that leave
        the simplices has no effect.
      gradient: g [n]. start: s [n], the point that the model is built around.
      sizes: length of each group, in order (None: all are one group).

    Raises:
      ValueError: shapes do not fit, or a number is not finite.
    """
    programme = _Programme.around(*_checked(curvature, gradient, start, sizes))
    c = programme.origin
    free, seen = c > 0, set()
    while True:
        c, free = programme.descend(c, free)
        # By rounding alone could a support come back, and then there is nothing left to gain.
        if free.tobytes() in seen or (wanted := programme.release(c, free)) is None:
            return c / programme.per_group(c)
        seen.add(free.tobytes())
        free = free.copy()
        free[wanted] = True


def tangent(sizes: Sequence[int]) -> np.ndarray:
    """An orthonormal basis [n, n - G] of the directions in which the sum of each of G groups stays
    what it is. Helmert's: column j of a group sets its first j coefficients against the next.
    """
    basis = np.zeros((sum(sizes), sum(sizes) - len(sizes)))
    for group, size in enumerate(sizes):
        first = sum(sizes[:group])
        for j in range(1, size):
            column = basis[first : first + size, first - group + j - 1]
            column[:j], column[j] = 1, -j
            column /= np.sqrt(j * (j + 1))
    return basis


class Space(NamedTuple):
    """The simplex of a set of coefficients, or of one set for each group of paths.

    Attributes:
      groups: the path regexes; () where one set serves the whole tree.
      sizes: n for each group.
      along: the projector [n G, n G] onto directions that keep the sum of every group.
    """

    groups: tuple[str, ...]
    sizes: tuple[int, ...]
    along: np.ndarray

    @classmethod
    def of(cls, n: int, groups: Sequence[str] = ()) -> "Space":
        sizes = (n,) * max(len(groups), 1)
        basis = tangent(sizes)
        return cls(tuple(groups), sizes, basis @ basis.T)

    def split(self, flat: np.ndarray) -> Any:
        """[n G] → [n], or {regex: [n]}."""
        rows = flat.reshape(len(self.sizes), -1)
        return dict(zip(self.groups, rows, strict=True)) if self.groups else rows[0]

    def join(self, c: Any) -> np.ndarray:
        """[n], or {regex: [n]} → [n G], float64."""
        rows = [c[group] for group in self.groups] if self.groups else [c]
        return np.concatenate([np.asarray(row, np.float64) for row in rows])

    def start(self, c: Any = None) -> np.ndarray:
        """Coefficients to start from, flat; 1/n each by default. ValueError off the simplex."""
        if c is None:
            return np.concatenate([rules.uniform(n) for n in self.sizes])
        n, rows = self.sizes[0], [c[group] for group in self.groups] if self.groups else [c]
        for row in map(np.asarray, rows):
            if row.shape != (n,) or not (np.all(row >= 0) and abs(row.sum() - 1) < 1e-6):
                raise ValueError(
                    f"a search starts from {n} coefficients in each of {len(self.sizes)} group(s), "
                    f"not negative and with a sum of one; got {c}"
                )
        return self.join(c)

    def step(self, c: np.ndarray, gradient: np.ndarray, curvature: np.ndarray):
        """The best step from c by a quadratic model, and the gain that it promises."""
        step = minimize(curvature, gradient, c, self.sizes) - c
        return step, -(gradient @ step + 0.5 * step @ curvature @ step)


class _Programme(NamedTuple):
    """½ δᵀ H δ + gᵀ δ of δ = c - origin, with what no δ can see taken out of H and g."""

    curvature: np.ndarray
    gradient: np.ndarray
    origin: np.ndarray
    group: np.ndarray  # [n] number of the group of each coefficient
    tolerance: float  # what rounding may leave of a slope that is zero

    @classmethod
    def around(cls, curvature, gradient, start, sizes) -> "_Programme":
        group = np.repeat(np.arange(len(sizes)), sizes)
        inside = np.maximum(start, 0)
        sums = np.bincount(group, inside)[group]
        even = 1 / np.asarray(sizes)[group]
        origin = np.divide(inside, sums, out=even, where=sums > 0)
        basis = tangent(sizes)
        along = basis @ basis.T
        gradient = along @ (gradient + curvature @ (origin - start))
        curvature = along @ ((curvature + curvature.T) / 2) @ along
        size = np.abs(gradient).max(initial=0) + np.abs(curvature).max(initial=0)
        return cls(curvature, gradient, origin, group, 8 * len(start) * _EPS * size)

    def per_group(self, values: np.ndarray) -> np.ndarray:
        """[n]: for each coefficient the sum over its group."""
        return np.bincount(self.group, values)[self.group]

    def slope(self, c: np.ndarray) -> np.ndarray:
        return self.gradient + self.curvature @ (c - self.origin)

    def descend(self, c: np.ndarray, free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The minimum over the free coefficients, fewer where a bound is in the way."""
        while True:
            step, bounded = self._step(c, free)
            falling = step < 0
            room = np.full(len(c), np.inf)
            room[falling] = c[falling] / -step[falling]
            reach = room.min(initial=np.inf)
            if bounded and reach >= 1:
                return np.maximum(c + step, 0), free
            if not np.isfinite(reach):  # no step at all
                return c, free
            stopped = room <= reach
            c = np.where(stopped, 0, np.maximum(c + reach * step, 0))
            free = free & ~stopped

    def _step(self, c: np.ndarray, free: np.ndarray) -> tuple[np.ndarray, bool]:
        """The step to the minimum over the free coefficients; or, with False, a direction in which
        the value falls for ever, because there is a slope and no curvature.
        """
        step = np.zeros(len(c))
        basis = tangent(np.bincount(self.group[free]))
        if not basis.size:
            return step, True
        values, vectors = np.linalg.eigh(basis.T @ self.curvature[np.ix_(free, free)] @ basis)
        vectors = basis @ vectors
        slopes = vectors.T @ self.slope(c)[free]
        flat = values <= 8 * len(c) * _EPS * max(values[-1], 0)
        if np.abs(slopes[flat]).max(initial=0) > self.tolerance:
            step[free] = -vectors[:, flat] @ slopes[flat]
            return step, False
        step[free] = -vectors[:, ~flat] @ (slopes[~flat] / values[~flat])
        return step, True

    def release(self, c: np.ndarray, free: np.ndarray) -> int | None:
        """The bounded coefficient whose growth would lower the value most, if any would."""
        slope = self.slope(c)
        level = self.per_group(np.where(free, slope, 0)) / self.per_group(free)
        excess = np.where(free, 0, slope - level)
        wanted = int(np.argmin(excess))
        return wanted if excess[wanted] < -4 * self.tolerance else None


def _checked(curvature, gradient, start, sizes):
    """The inputs as float64 arrays. ValueError where they do not fit together."""
    curvature, gradient, start = (np.asarray(x, np.float64) for x in (curvature, gradient, start))
    n = len(gradient) if gradient.ndim == 1 else 0
    sizes = (n,) if sizes is None else tuple(sizes)
    if not n or curvature.shape != (n, n) or start.shape != (n,) or sum(sizes) != n:
        raise ValueError(
            f"a programme of n coefficients needs H [n, n], g [n] and s [n], and groups of n in "
            f"all; got {curvature.shape}, {gradient.shape}, {start.shape} and groups of {sizes}"
        )
    if min(sizes) < 1:
        raise ValueError(f"every group needs at least one coefficient, got groups of {sizes}")
    if not all(np.all(np.isfinite(x)) for x in (curvature, gradient, start)):
        raise ValueError(
            "a programme needs finite numbers: the curvature, gradient or start has NaN"
        )
    return curvature, gradient, start, sizes
