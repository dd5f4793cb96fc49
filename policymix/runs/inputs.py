"""The checkpoints of a mix: their headers, what sets them apart, and the one normalisation that
they share.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from policymix import trees
from policymix.checkpoints import assets, store, streaming
from policymix.structs import Params
from policymix.transforms import normalize


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Checkpoints of one architecture, by their headers.

    Attributes:
      names: n paths. Where there is a base it is the first of them.
      headers: n trees of `store.Leaf`.
      base: 0 where there is a base, else None.
      mixed: rows that take part in the mix; a base that only measures task vectors does not.
    """

    names: tuple[str, ...]
    headers: tuple[Mapping[str, Any], ...]
    base: int | None
    mixed: tuple[int, ...]

    def norm_stats(
        self, rule: str, coefficients: np.ndarray, asset_id: str
    ) -> tuple[str, normalize.Stats] | None:
        """(asset id, the mix's normalisation); None where the inputs have none.

        Args:
          rule: "equal" (refuse if they differ), "pool", "average", or the path of the ones to use.
          coefficients: [n].
          asset_id: which statistics to take where a checkpoint has several; "" takes those that the
            last input has, so that a base with many follows the fine-tune.
        """
        if rule not in ("equal", "pool", "average"):
            return asset_id or self._only_asset_id() or "mixed", _stats_at(rule)
        asset_id = asset_id or self._only_asset_id()
        found = {self.names[k]: assets.norm_stats_of(self.names[k], asset_id) for k in self.mixed}
        known = [(name, *stats) for name, stats in found.items() if stats]
        if not known:
            return None
        if without := [name for name, stats in found.items() if not stats]:
            raise ValueError(
                f"{without[0]} has no norm stats, {known[0][0]} has; name the ones to use with "
                "--config.mix.norm_stats=PATH"
            )
        first_name, first_id, first = known[0]
        for name, _, stats in known[1:]:
            differs = normalize.difference(first, stats)
            if differs and (rule == "equal" or not normalize.comparable(first, stats)):
                raise ValueError(
                    f"norm stats of {first_name} and {name} differ: {differs}. One mix has one "
                    "normalisation: choose it with --config.mix.norm_stats=pool (of all inputs' "
                    "data), =average (kai0's rule), or =PATH"
                )
        if rule == "equal":
            return first_id, first
        merge = normalize.pool if rule == "pool" else normalize.average
        stats = [assets.norm_stats_of(self.names[k], asset_id)[1] for k in self.mixed]
        shares = np.asarray(coefficients)[list(self.mixed)]
        return first_id, {key: merge([s[key] for s in stats], shares) for key in first}

    def _only_asset_id(self) -> str:
        """The one asset id of the last input; "" where it has none or several."""
        found = list(assets.find(self.names[-1], assets.NORM_STATS))
        return found[0] if len(found) == 1 else ""

    def load(self, row: int) -> Params:
        """A checkpoint on the device. ValueError if it holds NaN or infinity."""

        def read(leaf):
            array = leaf.read()
            if not np.isfinite(array).all():
                raise ValueError(
                    f"{self.names[row]}: {leaf.path!r} holds NaN or infinity, so it cannot be mixed"
                )
            return jnp.asarray(array)

        return jax.tree.map(read, dict(self.headers[row]))

    def dtypes(self, chosen: str, *, of_base: bool) -> dict[str, np.dtype]:
        """The output's dtype by path: the one chosen, else the base's, else the widest of those
        that are mixed.
        """
        flats = [trees.flatten(self.headers[0])] if of_base else [
            trees.flatten(self.headers[k]) for k in self.mixed
        ]  # fmt: skip
        if chosen not in ("", "float32", "bfloat16", "float16", "float64"):
            raise ValueError(
                f"config.mix.dtype is {chosen!r}; expected float32, bfloat16, float16 or float64, "
                "or nothing for that of the inputs"
            )
        if chosen:
            return dict.fromkeys(flats[0], np.dtype(jnp.dtype(chosen)))
        return {path: streaming.widest([flat[path] for flat in flats]) for path in flats[0]}

    @property
    def nbytes(self) -> int:
        """Bytes of the largest input: what a mix of them can take."""
        return max(sum(leaf.nbytes for leaf in jax.tree.leaves(h)) for h in self.headers)

    def summary(self) -> list[str]:
        """A line for each input."""
        lines = []
        for k, (name, header) in enumerate(zip(self.names, self.headers, strict=True)):
            leaves = jax.tree.leaves(header)
            kinds = ", ".join(sorted({str(leaf.dtype) for leaf in leaves}))
            size = sum(leaf.nbytes for leaf in leaves) / 1e6
            role = "base " if k == self.base else "input"
            lines.append(
                f"{role} {name}: {len(leaves)} arrays, "
                f"{sum(math.prod(leaf.shape) for leaf in leaves):,} parameters, {kinds}, "
                f"{size:,.1f} MB"
            )
        return lines


def open_inputs(
    checkpoints: Sequence[str], *, base: str = "", base_is_mixed: bool = False
) -> Inputs:
    """Reads all headers and compares them; no array is read.

    Raises:
      FileNotFoundError, ValueError: one is missing, damaged, or of another architecture.
    """
    names = (base, *checkpoints) if base else tuple(checkpoints)
    headers = tuple(store.open_params(name) for name in names)
    for name, header in zip(names[1:], headers[1:], strict=True):
        if differs := trees.difference(headers[0], header, names=(names[0], name)):
            cause = _likely_cause(headers[0], header)
            raise ValueError(
                f"{names[0]} and {name} are not the same architecture{cause}: {differs}"
            )
    first = 1 if base and not base_is_mixed else 0
    return Inputs(names, headers, 0 if base else None, tuple(range(first, len(names))))


def _likely_cause(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """What most often lies behind such a difference, in brackets; "" where it is nothing known."""
    flats = trees.flatten(a), trees.flatten(b)
    apart = flats[0].keys() ^ flats[1].keys()
    if any("lora" in path for path in apart):
        return " (one has LoRA parameters: merge them into it first)"
    if {"state_proj/kernel", "time_mlp_in/kernel"} <= apart:
        return " (one is a π0, the other a π0.5)"
    projections = [flat.get("action_in_proj/kernel") for flat in flats]
    if all(projections) and projections[0].shape != projections[1].shape:
        return " (their action_dim differs)"
    return ""


def _stats_at(rule: str) -> normalize.Stats:
    path = pathlib.Path(rule)
    path = path / assets.NORM_STATS if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"config.mix.norm_stats is {rule!r}: expected equal, pool, average, or the path of a "
            "norm_stats.json; there is no such file"
        )
    return assets.read_norm_stats(path)
