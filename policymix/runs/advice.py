"""What a mix means for those who want to use it: the gain it brings, and what to do next."""

from collections.abc import Mapping
from typing import Any

import numpy as np

_DRAWS = 2000


def of(report: Mapping[str, Any], examples: Mapping[str, np.ndarray] | None) -> dict[str, Any]:
    """For mix.json: gain over the best single input on held-out batches, and a recommendation.

    Args:
      report: what mix.json says so far.
      examples: the held-out loss of each example, by the input's number ("0") and for "the mix";
        None without validation data.

    Returns:
      best: the input with the lowest selection loss. gain: by how much the mix's held-out loss is
        below its, as a fraction; interval: 95 %, by a paired bootstrap over examples; None where
        nothing is held out. recommendation: in words.
    """
    paths = [entry["path"] for entry in report["inputs"]]
    if examples is None:
        return _advice(
            None,
            None,
            None,
            "no validation data was given, so nothing is known of whether the mix is better: pass "
            "--validation, or play it in a simulator with evaluate.py",
        )
    selection = [entry["loss"]["selection"] for entry in report["inputs"]]
    row = int(np.argmin(selection))
    best = paths[row]
    if not len(examples["the mix"]):
        return _advice(
            best, None, None, "no batches were held out, so the gain is not known: dump more"
        )
    gain, interval = paired_gain(examples[str(row)], examples["the mix"])
    return _advice(best, gain, interval, _recommendation(report, best, gain, interval))


def _advice(best, gain, interval, recommendation: str) -> dict[str, Any]:
    return {"best": best, "gain": gain, "interval": interval, "recommendation": recommendation}


def paired_gain(single: np.ndarray, mix: np.ndarray) -> tuple[float, list[float]]:
    """(1 - mean mix / mean single, its 95 % interval) of the losses of the same examples, [m].

    A percentile bootstrap over examples (Efron 1979), which takes them as independent: frames of
    one episode are not quite, so the truth is a little wider.
    """
    rng = np.random.default_rng(0)
    rows = rng.integers(len(single), size=(_DRAWS, len(single)))
    gains = 1 - mix[rows].mean(1) / single[rows].mean(1)
    gain = float(1 - mix.mean() / single.mean())
    return gain, [float(x) for x in np.quantile(gains, [0.025, 0.975])]


def _recommendation(report, best: str, gain: float, interval) -> str:
    told = f"{gain:+.2%} [{interval[0]:+.2%}, {interval[1]:+.2%}]"
    c = report["coefficients"]
    whole = [c] if not isinstance(c, Mapping) else list(c.values())
    if all(sum(abs(x) > 1e-6 for x in one) == 1 for one in whole):
        words = "the search keeps one checkpoint alone: use that one, there is nothing to mix"
    elif interval[0] > 0:
        words = f"use the mix: its held-out loss is lower than the best single input's ({told})"
    elif interval[1] < 0:
        words = (
            f"keep {best}: the mix's held-out loss is higher ({told}); a merge can still be more "
            "robust, which a loss does not show: play both with evaluate.py"
        )
    else:
        words = (
            f"held out, the mix is level with the best single input ({told}): play both with "
            "evaluate.py before choosing"
        )
    if report["warnings"]:
        words += "; mind the warnings above, the losses are not honest"
    return words
