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
from policymix.checkpoints import assets, blocks, outputs, provenance, store, streaming
from policymix.checkpoints.leaves import Leaf
from policymix.models import pi0, recognize
from policymix.runs import policies
from policymix.transforms import normalize

NORM_STATS = "equal", "pool", "average"  # else a path


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Checkpoints of one architecture, by their headers.

    Attributes:
      names: n paths as given. Where there is a base it is the first of them.
      checkpoints: n opened checkpoints.
      leaves: n dicts of leaves by path, as they are to be mixed: of equal paths and shapes.
      output: the format that the mix takes.
      base: 0 where there is a base, else None.
      mixed: rows that take part in the mix; a base that only measures task vectors does not.
      fingerprints: n.
    """

    names: tuple[str, ...]
    checkpoints: tuple[store.Checkpoint, ...]
    leaves: tuple[Mapping[str, Leaf], ...]
    output: outputs.Output
    base: int | None
    mixed: tuple[int, ...]
    fingerprints: tuple[str, ...]
    siglip_heads: int | None = None

    def check_unchanged(self) -> None:
        """ValueError if an input was replaced since its headers were read."""
        for name, expected in zip(self.names, self.fingerprints, strict=True):
            if provenance.fingerprint(name) != expected:
                raise ValueError(f"{name} changed while it was mixed: mix it again")

    def tree(self, row: int) -> dict[str, Any]:
        """A checkpoint's leaves as a tree of our own, whatever its format."""
        return trees.unflatten(self.checkpoints[row].tree(self.siglip_heads))

    def norm_stats(
        self, rule: str, shares: np.ndarray, asset_id: str
    ) -> tuple[str, normalize.Stats] | None:
        """(asset id, the mix's normalisation); None where the inputs have none.

        Args:
          rule: "equal" (refuse if they differ), "pool", "average", or the path of the ones to use.
          shares: [n], the weight of each input's statistics.
          asset_id: which statistics to take where a checkpoint has several; "" takes those that the
            last input has, so that a base with many follows the fine-tune.
        """
        if rule not in NORM_STATS:
            return asset_id or self._only_asset_id() or "mixed", _stats_at(rule)
        asset_id = asset_id or self._only_asset_id()
        rows = self._with_stats_of(asset_id)
        found = {self.names[k]: assets.norm_stats_of(self.names[k], asset_id) for k in rows}
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
        stats = [found[self.names[k]][1] for k in rows]
        chosen = np.asarray(shares)[rows]
        chosen = chosen / chosen.sum() if chosen.sum() else np.full(len(rows), 1 / len(rows))
        return first_id, {key: merge([s[key] for s in stats], chosen) for key in first}

    def _with_stats_of(self, asset_id: str) -> list[int]:
        """The rows whose statistics count: all that are mixed, but for a base that has none, or
        knows other robots only, as OpenPI's bases do for whoever has a robot of his own.
        """
        rows = list(self.mixed)
        if self.base in rows:
            base = self.names[self.base]
            known = assets.find(base, assets.NORM_STATS)
            others = asset_id and any(known) and asset_id not in known
            if others or (not known and not assets.norm_stats_of(base)):
                rows.remove(self.base)
        return rows

    def _only_asset_id(self) -> str:
        """The one asset id of the last input; "" where it has none or several."""
        found = list(assets.find(self.names[-1], assets.NORM_STATS))
        return found[0] if len(found) == 1 else ""

    def checked_tree(self, row: int) -> dict[str, Any]:
        """`tree`, whose leaves refuse NaN and infinity when they are read. ValueError then."""
        return jax.tree.map(lambda leaf: _Checked(leaf, self.names[row]), self.tree(row))

    def dtypes(self, chosen: str, *, of_base: bool) -> dict[str, np.dtype]:
        """The output's dtype by path: the one chosen, else the base's, else the widest of those
        that are mixed. What is not floating-point keeps its own.
        """
        if chosen not in ("", "float32", "bfloat16", "float16", "float64"):
            raise ValueError(
                f"config.mix.dtype is {chosen!r}; expected float32, bfloat16, float16 or float64, "
                "or nothing for that of the inputs"
            )
        flats = self.leaves[:1] if of_base else [self.leaves[k] for k in self.mixed]
        found = {path: streaming.widest([flat[path] for flat in flats]) for path in flats[0]}
        if chosen:
            wanted = np.dtype(jnp.dtype(chosen))
            found = {p: wanted if jnp.issubdtype(d, np.floating) else d for p, d in found.items()}
        return found

    def mean_coefficients(self, by_path: Mapping[str, np.ndarray]) -> np.ndarray:
        """[n]: over all parameters, how much of each input is in the mix."""
        sizes = {path: leaf.size for path, leaf in self.leaves[0].items()}
        total = sum(sizes.values())
        return sum(np.asarray(by_path[path]) * (size / total) for path, size in sizes.items())

    @property
    def nbytes(self) -> int:
        """Bytes of the largest input: what a mix of them can take."""
        return max(sum(leaf.nbytes for leaf in flat.values()) for flat in self.leaves)

    def summary(self) -> list[str]:
        """A line for each input."""
        lines = []
        for k, (one, flat) in enumerate(zip(self.checkpoints, self.leaves, strict=True)):
            kinds = ", ".join(sorted({str(leaf.dtype) for leaf in flat.values()}))
            size = sum(leaf.nbytes for leaf in flat.values()) / 1e6
            role = "base " if k == self.base else "input"
            lora = f", {one.lora} low-rank updates merged" if one.lora else ""
            lines.append(
                f"{role} {one.name}: {one.format}, {len(flat)} arrays, "
                f"{sum(math.prod(leaf.shape) for leaf in flat.values()):,} parameters, {kinds}, "
                f"{size:,.1f} MB{lora}"
            )
        return lines


class _Checked(Leaf):
    """A leaf that refuses what is not finite."""

    def __init__(self, leaf: Leaf, name: str):
        self.leaf, self.name = leaf, name
        self.shape, self.dtype, self.path, self.where = (
            leaf.shape, leaf.dtype, leaf.path, leaf.where,
        )  # fmt: skip

    def reader(self):
        return self.leaf.reader()

    def read(self) -> np.ndarray:
        array = super().read()
        if not blocks.finite(array.reshape(-1)):
            raise ValueError(
                f"{self.name}: {self.path!r} holds NaN or infinity, so it cannot be mixed"
            )
        return array


def open_inputs(
    checkpoints: Sequence[str],
    *,
    base: str = "",
    base_is_mixed: bool = False,
    wanted: str = "",
    model: pi0.Pi0Config | None = None,
) -> Inputs:
    """Reads all headers and compares them; no array is read.

    Args:
      wanted: the format of the mix; "" is that of the first of `checkpoints`.
      model: the config's, for what checkpoints do not tell: the vision tower's heads in PyTorch,
        and the scale of low-rank updates.

    Raises:
      FileNotFoundError, ValueError: one is missing, damaged, of another architecture, or given
        twice.
    """
    names = (base, *checkpoints) if base else tuple(checkpoints)
    opened = tuple(policies.open_checkpoint(name, model, merge_lora=True) for name in names)
    siglip_heads = model.siglip_heads if model else None
    output = outputs.choose(opened, 1 if base else 0, wanted)
    flats = tuple(output.select(one, siglip_heads) for one in opened)
    for name, flat in zip(names[1:], flats[1:], strict=True):
        if differs := trees.difference(flats[0], flat, names=(names[0], name)):
            cause = _likely_cause(flats[0], flat)
            raise ValueError(
                f"{names[0]} and {name} are not the same architecture{cause}: {differs}"
            )
    flats = tuple({path: flat[path] for path in flats[0]} for flat in flats)
    prints = tuple(provenance.fingerprint(name) for name in names)
    for k, (name, one) in enumerate(zip(names, prints, strict=True)):
        if (first := prints.index(one)) < k:
            same = opened[k].place.params.resolve() == opened[first].place.params.resolve()
            raise ValueError(
                f"{name} is given twice; name it once, with a larger coefficient if it is to count "
                "more"
                if same
                else f"{names[first]} and {name} are copies of one checkpoint; name it once"
            )
    first = 1 if base and not base_is_mixed else 0
    mixed = tuple(range(first, len(names)))
    return Inputs(names, opened, flats, output, 0 if base else None, mixed, prints, siglip_heads)


def _likely_cause(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """What most often lies behind such a difference, in brackets; "" where it is nothing known."""
    if recognize.is_chunk_level(a) != recognize.is_chunk_level(b):
        return " (one is a chunk-level learner, the other is not)"
    apart = a.keys() ^ b.keys()
    if any("lora" in path for path in apart):
        return " (one has LoRA parameters: merge them into it first)"
    if any("state_proj" in p for p in apart) and any("time_mlp_in" in p for p in apart):
        return " (one is a π0, the other a π0.5)"
    for path in a.keys() & b.keys():
        ours, theirs = a[path].shape, b[path].shape
        if ours == theirs:
            continue
        if "action_in_proj" in path or "action_out_proj" in path:
            return " (their action_dim differs)"
    if any("action_in_proj" in path for path in apart):
        return " (one has no action expert: a π0-FAST, or a language model alone)"
    if any("embed_tokens" in p or "input_embedding" in p for p in apart):
        return " (one lacks the vocabulary)"
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
