"""The coefficients of a mix, by whichever method was asked for."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from policymix import metrics
from policymix.mixing import rules, search
from policymix.runs import requests
from policymix.runs.inputs import Inputs


def with_base(coefficients: Any, inputs: Inputs) -> Any:
    """Coefficients of the checkpoints → those of all inputs: 0 for a base that is not mixed."""
    skipped = np.zeros(len(inputs.names) - len(inputs.mixed))
    if isinstance(coefficients, Mapping):
        return {regex: np.concatenate([skipped, c]) for regex, c in coefficients.items()}
    return np.concatenate([skipped, coefficients])


def search_for(task, losses: Sequence[Mapping[str, float] | None]) -> search.SearchResult:
    """The coefficients of all inputs: [n], or {regex: [n]} with groups.

    Args:
      task: `mix.Task`. losses: of the inputs, where there is a judge.
    """
    request, groups = task.request, task.groups
    if task.repeat:
        return search.SearchResult(task.repeat.coefficients, math.nan, [])
    if task.method == "interpolate":
        num_finetuned = len(task.inputs.names) - 1
        c = requests.interpolated(request.ratios[0], num_finetuned, groups)
        return search.SearchResult(c, math.nan, [])
    mixed = task.inputs.mixed
    if task.method == "average":
        found = search.SearchResult(rules.uniform(len(mixed)), math.nan, [])
    elif task.method == "manual":
        found = search.SearchResult(requests.manual(request, groups), math.nan, [])
    else:
        selection = np.array([losses[row]["selection"] for row in mixed])
        found = _by_loss(task, selection)
    return found._replace(coefficients=with_base(found.coefficients, task.inputs))


def _by_loss(task, selection: np.ndarray) -> search.SearchResult:
    """`selection`: [n], the single checkpoints' losses."""
    settings, n = task.config.mix, len(selection)
    if task.method == "inverse_loss":
        c = rules.inverse_loss(selection, settings.power)
        return search.SearchResult(c, math.nan, [])
    objective = task.judge.objective(task.inputs, settings)
    groups = tuple(task.groups.values())
    if task.method == "greedy":

        def show(row):
            print(f"greedy: {row['chosen']} has loss {row['loss']:.5f}")

        return search.greedy(objective, n, losses=selection, observe=show, clock=time.monotonic)
    if task.method in requests.SECOND_ORDER:

        def told(row):
            print(f"{task.method}: step {row['step']} has loss {row['loss']:.5f}")

        function = getattr(search, task.method)
        return function(objective, n, groups=groups, observe=told, clock=time.monotonic)
    with metrics.Progress(task.method, settings.num_iterations) as shown:
        return search.gradient_descent(
            objective,
            n,
            learning_rate=settings.learning_rate,
            num_iterations=settings.num_iterations,
            adaptive=task.method == "adaptive_gradient_descent",
            groups=groups,
            observe=lambda row: row["batch"] is None or shown.step(),
            clock=time.monotonic,
        )
