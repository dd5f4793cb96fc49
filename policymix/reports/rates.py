"""Success rates in words and in cells, as all reports of roll-outs have them.

`counts` is any dict with episodes, successes and interval.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from policymix import intervals

_LONGEST = 34  # characters of a name beside a picture


def percent(counts: Mapping[str, Any]) -> float:
    """Success in percent."""
    return 100 * counts["successes"] / counts["episodes"]


def short(value: float) -> str:
    """A percentage with the one decimal it may need."""
    return f"{value:.1f}".removesuffix(".0")


def cell(counts: Mapping[str, Any]) -> str:
    """Success and its 95 % interval as a table has it: 88 [80, 93]."""
    low, high = counts["interval"]
    return f"{short(percent(counts))} [{100 * low:.0f}, {100 * high:.0f}]"


def rate(counts: Mapping[str, Any]) -> str:
    """The same in a sentence: 88 % [80, 93]."""
    return cell(counts).replace(" ", " % ", 1)


def score(counts: Mapping[str, Any]) -> str:
    """The mean best score, with its 95 % interval (`intervals.mean`) where that is known:
    0.412 [0.35, 0.47].
    """
    told = f"{counts['mean_score']:.3f}"
    if not counts.get("score_interval"):
        return told
    low, high = counts["score_interval"]
    return f"{told} [{low:.2f}, {high:.2f}]"


def scores_overlap(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """Whether the intervals of two mean scores have a point in common, in words."""
    known = [c["score_interval"] for c in (a, b) if c.get("score_interval")]
    if len(known) < 2:
        return "without intervals"
    apart = intervals.separate(*map(tuple, known))
    return "the intervals are separate" if apart else "the intervals overlap"


def points(gap: float) -> str:
    """A difference of two percentages, without its sign."""
    text = short(abs(gap))
    return f"{text} point" if text == "1" else f"{text} points"


def overlap(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """Whether the two intervals have a point in common, in words."""
    apart = intervals.separate(tuple(a["interval"]), tuple(b["interval"]))
    return "the intervals are separate" if apart else "the intervals overlap"


def p_text(p: float) -> str:
    """p = 0.012, or p < 0.001."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def scores_tell(counts: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the mean scores say what success cannot: little succeeds, and they differ from it."""
    rates = [c["successes"] / c["episodes"] for c in counts]
    differ = any(abs(c["mean_score"] - r) > 1e-6 for c, r in zip(counts, rates, strict=True))
    return differ and max(rates) < 0.2


def shown(name: str, longest: int = _LONGEST) -> str:
    """A name as a picture can show it: its end, where it is long, and no formula."""
    name = name if len(name) <= longest else "…" + name[1 - longest :]
    return name.replace("$", r"\$")
