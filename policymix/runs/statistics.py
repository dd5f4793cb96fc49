"""Normalisation statistics of what training sees: the states of all frames, all elements of all
chunks.
"""

import concurrent.futures
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
    jobs = {}
    with concurrent.futures.ThreadPoolExecutor(processes.num_cores()) as pool:
        for key in compose.NUMERIC:
            jobs[key] = pool.submit(normalize.compute_blocks, _of(blocks, chosen, adapt, key))
        return {key: job.result() for key, job in jobs.items()}


def _of(blocks: Callable, chosen, adapt: compose.Chain, key: str) -> Callable[[], Iterator]:
    return lambda: (block[key] for block in blocks(chosen, adapt))


def _chunk_blocks(chosen: Sequence[loader.ActionChunks], adapt: compose.Chain) -> Iterator[dict]:
    """Adapted examples, some at a time: {"state": [b, p], "actions": [b, h, a]}."""
    for chunks in chosen:
        for block in chunks.blocks():
            yield adapt.apply(block)


def _frame_blocks(chosen: Sequence[loader.ActionChunks], adapt: compose.Chain) -> Iterator[dict]:
    """Adapted states of all frames [N, p], and actions [N, a] with how often chunks hold each."""
    for chunks in chosen:
        values = chunks.frame_values()
        adapted = adapt.apply(values | {"actions": values["actions"][:, None]})
        counts = [normalize.chunk_counts(n, chunks.horizon) for n in chunks.lengths()]
        yield {
            "state": adapted["state"],
            "actions": (adapted["actions"][:, 0], np.concatenate(counts)),
        }
