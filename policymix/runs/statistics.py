"""Normalisation statistics of what training sees: the states of all frames, all elements of all
chunks.
"""

import concurrent.futures
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from policymix import processes
from policymix.data import loader
from policymix.transforms import compose, histograms, normalize

RULES = ("exact", "openpi")


def of_chunks(
    chosen: Sequence[loader.ActionChunks], adapt: compose.Chain, rule: str = "exact"
) -> normalize.Stats:
    """Statistics of "state" and "actions", the datasets taken together.

    Every element of every chunk counts, repeated ones too, as in OpenPI: late actions of an episode
    count more than early ones.

    Args:
      adapt: the robot's numbers → those that are normalised.
      rule: of the quantiles: "exact", or "openpi", its histograms of a stream.

    Raises:
      ValueError: another rule, or values that are not finite.
    """
    if rule not in RULES:
        raise ValueError(
            f"config.data.quantile_rule is {rule!r}; expected one of {', '.join(RULES)}"
        )
    if rule == "openpi":
        states: dict[str, histograms.State | None] = dict.fromkeys(compose.NUMERIC)
        for block in _chunk_blocks(chosen, adapt):
            states = {key: histograms.update(states[key], block[key]) for key in states}
        return {key: histograms.finish(state) for key, state in states.items()}
    # An action means the same in every chunk that holds it, unless it is relative to the state.
    relative = any(isinstance(t, compose.DeltaActions) for t in adapt.transforms)
    whole = all(chunks.whole for chunks in chosen)
    blocks = _frame_blocks if whole and not relative else _chunk_blocks
    count = processes.num_cores()
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return {
            key: normalize.compute_blocks(
                [
                    functools.partial(_share, blocks, chosen, adapt, key, k, count)
                    for k in range(count)
                ],
                pool.map,
            )
            for key in compose.NUMERIC
        }


def _share(blocks: Callable, chosen, adapt: compose.Chain, key: str, index: int, count: int):
    """Every `count`-th block of one key, from `index` on."""
    return (block[key] for block in blocks(chosen, adapt, index, count))


def _chunk_blocks(
    chosen: Sequence[loader.ActionChunks], adapt: compose.Chain, index: int = 0, count: int = 1
) -> Iterator[dict]:
    """Adapted examples, some at a time: {"state": [b, p], "actions": [b, h, a]}."""
    for chunks in chosen:
        for block in chunks.blocks(index=index, count=count):
            yield adapt.apply(block)


def _frame_blocks(
    chosen: Sequence[loader.ActionChunks], adapt: compose.Chain, index: int = 0, count: int = 1
) -> Iterator[dict]:
    """Adapted states of frames [n, p], and actions [n, a] with how often chunks hold each."""
    for chunks in chosen:
        counts = [normalize.chunk_counts(n, chunks.horizon) for n in chunks.lengths()]
        values = chunks.frame_values() | {"counts": np.concatenate(counts)}
        part = {key: array[index::count] for key, array in values.items()}
        adapted = adapt.apply({"state": part["state"], "actions": part["actions"][:, None]})
        yield {
            "state": adapted["state"],
            "actions": (adapted["actions"][:, 0], part["counts"]),
        }
