"""What a mix means for those who want to use it: the gain it brings, and what to do next."""

from collections.abc import Mapping
from typing import Any

import numpy as np

_DRAWS = 2000
_FEW = 20  # fewer held-out examples give no interval worth the name


def of(report: Mapping[str, Any], examples: Mapping[str, np.ndarray] | None) -> dict[str, Any]:
    """For mix.json: gain over the best single input on held-out batches, and a recommendation.

    Args:
      report: what mix.json says so far.
      examples: the held-out loss of each example, by the input's number ("0") and for "the mix";
        None without validation data.

    Returns:
      best: the input with the lowest selection loss. gain: by how much the mix's held-out loss is
        below its, as a fraction; interval: 95 %, by a paired bootstrap over the `examples`
        that are held out; None where they are few or none. recommendation: in words.
    """
    if examples is None:
        return _advice(
            "no validation data was given, so nothing is known of whether the mix is better: pass "
            "--validation, or play it in a simulator with evaluate.py",
        )
    row = int(np.argmin([entry["loss"]["selection"] for entry in report["inputs"]]))
    best, count = report["inputs"][row]["path"], len(examples["the mix"])
    if not count:
        return _advice(
            "no batches were held out, so the gain is not known: raise config.mix.held_out, or "
            "dump more",
            best,
        )
    gain, interval = paired_gain(examples[str(row)], examples["the mix"])
    interval = interval if count >= _FEW else None
    words = _recommendation(report, best, gain, interval, count)
    return _advice(words, best, gain, interval, count)


def _advice(recommendation: str, best=None, gain=None, interval=None, count=0) -> dict[str, Any]:
    return {
        "best": best,
        "gain": gain,
        "interval": interval,
        "examples": count,
        "recommendation": recommendation,
    }


def paired_gain(single: np.ndarray, mix: np.ndarray) -> tuple[float, list[float]]:
    """(1 - mean mix / mean single, its 95 % interval) of the losses of the same examples, [m].

    A percentile bootstrap over examples (Efron 1979), which takes them as independent: frames of
    one episode are not, so the truth is wider.
    """
    rng = np.random.default_rng(0)
    rows = rng.integers(len(single), size=(_DRAWS, len(single)))
    gains = 1 - mix[rows].mean(1) / single[rows].mean(1)
    gain = float(1 - mix.mean() / single.mean())
    return gain, [float(x) for x in np.quantile(gains, [0.025, 0.975])]


def _recommendation(report, best: str, gain: float, interval, count: int) -> str:
    told = f"{gain:+.2%}"
    if interval:
        told += f" [{interval[0]:+.2%}, {interval[1]:+.2%}] on {count} examples"
    c = report["coefficients"]
    whole = [c] if not isinstance(c, Mapping) else list(c.values())
    used = {k for one in whole for k, x in enumerate(one) if abs(x) > 1e-6}
    losses = {entry["path"]: entry["loss"]["held_out"] for entry in report["inputs"]}
    lowest = min(losses, key=losses.__getitem__)
    if len(used) == 1:
        alone = report["inputs"][used.pop()]["path"]
        words = f"the mix is {alone} alone: use that one, there is nothing to mix"
    elif interval is None:
        words = (
            f"held out, the mix's gain over {best} is {told}, and {count} examples are too few to "
            f"tell: dump {_FEW} or more, or play both with evaluate.py"
        )
    elif interval[0] > 0 and losses[lowest] < report["loss"]["held_out"]:
        words = (
            f"play the mix and {lowest} with evaluate.py: the mix's held-out loss is lower than "
            f"that of {best}, which is best on the selection batches ({told}), and higher than "
            "that of the other"
        )
    elif interval[0] > 0:
        words = f"use the mix: its held-out loss is lower than that of every input ({told})"
    elif interval[1] < 0:
        words = (
            f"keep {best}: the mix's held-out loss is higher ({told}); a merge can still be more "
            "robust, which a loss does not show: play both with evaluate.py"
        )
    else:
        words = (
            f"held out, the mix is level with {best}, the best single input on the selection "
            f"batches ({told}): play both with evaluate.py before choosing"
        )
    if report["warnings"]:
        words += "; mind the warnings above, the losses are not honest"
    return words
