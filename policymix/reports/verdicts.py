"""What the quickstart showed, in sentences that are as plain when the answer is no."""

from collections.abc import Mapping, Sequence
from typing import Any

from policymix import intervals
from policymix.reports import rates

_RATIO = 0.5  # RETAIN's default, fixed before anything is measured


def chosen(soup: Mapping[str, Any]) -> Mapping[str, Any]:
    """The mix with the lowest selection loss: what a user without roll-outs would take."""
    return min(_of(soup, "mix"), key=lambda row: row["loss"]["selection"])


def soup_sentence(soup: Mapping[str, Any]) -> str:
    """Whether the mix beats the best single checkpoint, and whether a control makes it needless."""
    mix, single = chosen(soup), _best(_of(soup, "input"))
    controls = _of(soup, "control")
    count = len(_of(soup, "mix"))
    told = [
        f"Of {count} mixes, “{mix['name']}” has the lowest selection loss and was chosen by that "
        "alone, not by its successes."
        if count > 1
        else f"There is one mix, “{mix['name']}”."
    ]
    if not any(row["successes"] for row in soup["rows"]):
        told.append(_soup_by_score(mix, single, controls))
        return " ".join(told)
    told.append(
        f"It succeeds in {mix['successes']} of {mix['episodes']} episodes, "
        f"{rates.rate(mix)}; the best single checkpoint, “{single['name']}”, in "
        f"{single['successes']}, {rates.rate(single)}. That one was picked by its "
        "successes in these very episodes, which makes it the hardest to beat."
    )
    told.append(_against_single(mix, single))
    if controls:
        told.append(_against_control(mix, _best(controls)))
    return " ".join(told)


def _against_single(mix: Mapping, single: Mapping) -> str:
    gap = rates.percent(mix) - rates.percent(single)
    p = intervals.mcnemar(mix["outcomes"], single["outcomes"])
    test = f"McNemar's exact test on the same starts gives {rates.p_text(p)}"
    apart = rates.overlap(mix, single)
    if not gap:
        return "So the mix does exactly as well: nothing is gained and nothing lost."
    if gap < 0:
        size = rates.points(gap)
        return f"So the mix is {size} worse, and mixing did not help here: {apart}, and {test}."
    told = f"So the mix is {rates.points(gap)} better: {apart}"
    if "separate" in apart:
        return f"{told}, and {test}."
    if p < 0.05:
        return f"{told}, yet {test}, which chance alone seldom does."
    return f"{told}, and {test}, so this may be chance."


def _against_control(mix: Mapping, control: Mapping) -> str:
    gap = rates.percent(control) - rates.percent(mix)
    name, rate = f"“{control['name']}”", rates.rate(control)
    p = rates.p_text(intervals.mcnemar(control["outcomes"], mix["outcomes"]))
    told = f"{rates.overlap(control, mix)}, {p}"
    size = rates.points(gap)
    if gap > 0:
        return f"A control without mixing does better: {name}, {rate}, {size} more ({told})."
    if gap == 0:
        return f"A control without mixing does exactly as well: {name}, {rate}."
    return f"No control does as well: the best, {name}, has {rate}, {size} less ({told})."


def _soup_by_score(mix: Mapping, single: Mapping, controls: Sequence[Mapping]) -> str:
    """The same where nothing succeeded."""
    a, b = mix["mean_score"], single["mean_score"]
    told = (
        f"No policy succeeded in any of {mix['episodes']} episodes, so success says nothing here. "
        f"By mean best score the mix {_score_word(a, b)} the best single checkpoint, "
        f"“{single['name']}”: {a:.3f} against {b:.3f}"
    )
    if controls:
        control = _best(controls)
        c = control["mean_score"]
        told += f"; it {_score_word(a, c)} the best control, “{control['name']}”, which has {c:.3f}"
    return told + ". These means have no intervals, so small differences may be chance."


def _score_word(a: float, b: float) -> str:
    if f"{a:.3f}" == f"{b:.3f}":
        return "is level with"
    return "is above" if a > b else "is below"


def retain_sentence(retain: Mapping[str, Any]) -> str:
    """What fine-tuning forgot, what a merge at 0.5 gets back, and whether a control does too."""
    rows, suites = retain["rows"], retain["suites"]
    base, tuned = (next(r for r in rows if r["kind"] == kind) for kind in ("base", "finetuned"))
    merges = [row for row in rows if row["kind"] == "merged"]
    merged = min(merges, key=lambda row: abs(row["merge_ratio"] - _RATIO))
    fixed = "the default, fixed beforehand and not picked on these results"
    ratio = f"{merged['merge_ratio']:g}"
    if merged["merge_ratio"] != _RATIO:
        fixed = f"the nearest to the default {_RATIO:g}, not picked on these results"
    if not any(row["results"][suite]["successes"] for row in rows for suite in suites):
        return _retain_by_score(base, tuned, merged, suites)
    moved = [
        f"from {rates.short(rates.percent(base['results'][suite]))} to "
        f"{rates.rate(tuned['results'][suite])} {_where(suite)}"
        for suite in suites
    ]
    reached = [f"{rates.rate(merged['results'][suite])} {_where(suite)}" for suite in suites]
    told = [
        f"Fine-tuning takes success {_listed(moved)}.",
        f"Merged with the base at ratio {ratio}, {fixed}, it has {_listed(reached)}.",
        _recovery(base, tuned, merged, suites[-1]),
        f"Against the fine-tune it is {_against(merged, tuned, suites[:-1])}.",
    ]
    controls = [row for row in rows if row["kind"] == "control"]
    if controls:
        told.append(_retain_controls(controls, merged, suites))
    return " ".join(told)


def _recovery(base: Mapping, tuned: Mapping, merged: Mapping, suite: str) -> str:
    """How much of what was forgotten a merge brings back, in points."""
    before, after, now = (rates.percent(row["results"][suite]) for row in (base, tuned, merged))
    forgotten, recovered = before - after, now - after
    where = _where(suite)
    if forgotten <= 0:
        return f"Fine-tuning forgot nothing {where}, so there is nothing to recover."
    size = rates.points(forgotten)
    doubt = ""
    if "overlap" in rates.overlap(base["results"][suite], tuned["results"][suite]):
        doubt = " Base and fine-tune overlap there, so the loss itself may be chance."
    if recovered <= 0:
        return f"Of the {size} that fine-tuning forgot {where} the merge recovers none.{doubt}"
    if recovered >= forgotten:
        return f"The merge recovers all of the {size} that fine-tuning forgot {where}.{doubt}"
    return (
        f"The merge recovers {rates.short(recovered)} of the {size} that fine-tuning "
        f"forgot {where} ({100 * recovered / forgotten:.0f} %).{doubt}"
    )


def _retain_controls(controls: Sequence[Mapping], merged: Mapping, suites: Sequence[str]) -> str:
    def gaps(row):
        return [
            rates.percent(row["results"][suite]) - rates.percent(merged["results"][suite])
            for suite in suites
        ]

    control = max(controls, key=lambda row: (min(gaps(row)), sum(gaps(row))))
    told = f"{_against(control, merged, suites)}"
    name = f"“{control['name']}”"
    if min(gaps(control)) >= 0:
        return f"A plain control does at least as well on all three: {name} is {told}."
    text = f"No plain control does as well on all three; {name} comes closest: it is {told}."
    short = [suite for suite, gap in zip(suites, gaps(control), strict=True) if gap < 0]
    if all("overlap" in rates.overlap(control["results"][s], merged["results"][s])
           for s in short):  # fmt: skip
        text += " Where it falls short, these episodes cannot tell the two apart."
    return text


def _against(ours: Mapping, theirs: Mapping, suites: Sequence[str]) -> str:
    """3 points higher in distribution (the intervals overlap), level … and 2 points lower …"""
    told = []
    for suite in suites:
        a, b = ours["results"][suite], theirs["results"][suite]
        gap = rates.percent(a) - rates.percent(b)
        if gap:
            word = f"{rates.points(gap)} {'higher' if gap > 0 else 'lower'}"
            told.append(f"{word} {_where(suite)} ({rates.overlap(a, b)})")
        else:
            told.append(f"level {_where(suite)}")
    return _listed(told)


def _retain_by_score(base: Mapping, tuned: Mapping, merged: Mapping, suites: Sequence[str]) -> str:
    """The same where nothing succeeded."""
    told = []
    for suite in suites:
        scores = [row["results"][suite]["mean_score"] for row in (base, tuned, merged)]
        told.append(f"{' / '.join(f'{score:.3f}' for score in scores)} {_where(suite)}")
    return (
        "No policy succeeded in any episode, so success says nothing about merging here. The mean "
        f"best scores of base, fine-tune and the merge at ratio {merged['merge_ratio']:g} are "
        f"{_listed(told)}; they have no intervals, so small differences may be chance."
    )


def _of(soup: Mapping[str, Any], kind: str) -> list[Mapping[str, Any]]:
    return [row for row in soup["rows"] if row["kind"] == kind]


def _best(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return max(rows, key=lambda row: (row["successes"], row["mean_score"]))


def _where(suite: str) -> str:
    return suite if suite.startswith(("in ", "out ")) else f"on the {suite}"


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
