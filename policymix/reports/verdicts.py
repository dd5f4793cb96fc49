"""What the quickstart showed, in sentences that are as plain when the answer is no."""

from collections.abc import Mapping, Sequence
from typing import Any

from policymix import intervals
from policymix.reports import rates

_RATIO = 0.5  # RETAIN's default, fixed before anything is measured


_CHANCE = 0.05  # p-values from here on tell no difference


def chosen(soup: Mapping[str, Any]) -> Mapping[str, Any]:
    """The mix with the lowest selection loss, what a user without roll-outs would take, of those
    that mix: a search may end at one input alone.
    """
    mixes = _of(soup, "mix")
    return min(_mixing(mixes) or mixes, key=lambda row: row["loss"]["selection"])


def soup_sentence(soup: Mapping[str, Any]) -> str:
    """Whether the mix beats the best single checkpoint, and whether a control makes it needless."""
    mix, single, controls = chosen(soup), _best(_of(soup, "input")), _of(soup, "control")
    told = [_choice(soup, mix)]
    compared = [mix, single, *([_best(controls)] if controls else [])]
    if not any(row["successes"] for row in compared):
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
        told.append(_against_control(mix, controls))
    return " ".join(told)


def _choice(soup: Mapping, mix: Mapping) -> str:
    """How the mix was chosen, and whether any input has a lower selection loss."""
    mixes, mixing = _of(soup, "mix"), _mixing(_of(soup, "mix"))
    alone = [row for row in mixes if row not in mixing]
    if len(mixes) == 1:
        told = f"There is one mix, “{mix['name']}”."
    elif not alone:
        told = (
            f"Of {len(mixes)} mixes, “{mix['name']}” has the lowest selection loss and was chosen"
        )
        told += " by that alone, not by its successes."
    elif not mixing:
        return f"Each of the {len(mixes)} mixes keeps one checkpoint alone: nothing was mixed."
    else:
        names = _listed([f"“{row['name']}”" for row in alone])
        told = f"Of {len(mixes)} mixes, {names} {'keep' if len(alone) > 1 else 'keeps'} one "
        told += f"checkpoint alone, so nothing is mixed; of the others, “{mix['name']}” has the "
        told += "lowest selection loss and was chosen by that alone, not by its successes."
    best = min(_of(soup, "input"), key=lambda row: row["loss"]["selection"])
    if best["loss"]["selection"] <= mix["loss"]["selection"]:
        told += (
            f" By selection loss it is not better than “{best['name']}” by itself: "
            f"{mix['loss']['selection']:.3f} against {best['loss']['selection']:.3f}."
        )
    return told


def _mixing(mixes: Sequence[Mapping]) -> list[Mapping]:
    """Those that give more than one input a share."""
    return [row for row in mixes if max(row["coefficients"] or [0]) < 0.999]


def _against_single(mix: Mapping, single: Mapping) -> str:
    gap = rates.percent(mix) - rates.percent(single)
    p = intervals.mcnemar(mix["outcomes"], single["outcomes"])
    test = f"McNemar's exact test on the same starts gives {rates.p_text(p)}"
    apart = rates.overlap(mix, single)
    if not gap:
        return f"So the mix is level with it: nothing is gained ({rates.p_text(p)})."
    if gap < 0:
        size = rates.points(gap)
        return f"So the mix is {size} worse, and mixing did not help here: {apart}, and {test}."
    told = f"So the mix is {rates.points(gap)} better: {apart}"
    if p >= _CHANCE:
        return f"{told}, and {test}, so this may be chance."
    if "separate" in apart:
        return f"{told}, and {test}."
    return f"{told}, yet {test}, which chance alone seldom does."


def _against_control(mix: Mapping, controls: Sequence[Mapping]) -> str:
    control = _best(controls)
    gap = rates.percent(control) - rates.percent(mix)
    p = intervals.mcnemar(control["outcomes"], mix["outcomes"])
    of = f", the best of {len(controls)} on these episodes" if len(controls) > 1 else ""
    who = f"“{control['name']}”{of}, has {rates.rate(control)}"
    size = f"{rates.points(gap)} {'more' if gap > 0 else 'less'}"
    told = (
        f"{who}, {size if gap else 'as many'} ({rates.overlap(control, mix)}, {rates.p_text(p)})."
    )
    if p >= _CHANCE:
        return f"A control without mixing cannot be told from it: {told}"
    verdict = "A control without mixing does better" if gap > 0 else "No control does as well"
    return f"{verdict}: {told}"


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
    compared = [row["results"][suite] for row in (base, tuned, merged) for suite in suites]
    if not any(counts["successes"] for counts in compared):
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
    p = _p(base, tuned, suite)
    if p >= _CHANCE:
        doubt = f" That loss itself may be chance ({rates.p_text(p)})."
    if recovered <= 0:
        return f"Of the {size} that fine-tuning forgot {where} the merge recovers none.{doubt}"
    if recovered >= forgotten:
        return f"The merge recovers all of the {size} that fine-tuning forgot {where}.{doubt}"
    return (
        f"The merge recovers {rates.short(recovered)} of the {size} that fine-tuning "
        f"forgot {where} ({100 * recovered / forgotten:.0f} %).{doubt}"
    )


def _retain_controls(controls: Sequence[Mapping], merged: Mapping, suites: Sequence[str]) -> str:
    """Each control against the merge: where it is better, where worse, as far as chance allows."""
    told, enough = [], []
    for control in controls:
        found = {"better": [], "worse": []}
        for suite in suites:
            ours, theirs = control["results"][suite], merged["results"][suite]
            if (p := _p(control, merged, suite)) < _CHANCE:
                word = "better" if ours["successes"] > theirs["successes"] else "worse"
                gap = f"{_figure(ours)} against {_figure(theirs)} %, {rates.p_text(p)}"
                found[word].append(f"{_where(suite)} ({gap})")
        parts = [f"{word} {_listed(where)}" for word, where in found.items() if where]
        told.append(
            f"“{control['name']}” {'is ' + ' and '.join(parts) if parts else 'differs nowhere'}"
        )
        if not found["worse"]:
            enough.append(f"“{control['name']}”")
    end = "Every plain control is worse than the merge somewhere."
    if enough:
        verb = "do" if len(enough) > 1 else "does"
        end = f"So {_listed(enough)} {verb} as well without merging, as far as these episodes tell."
    return f"Plain controls against the merge, beyond chance: {'; '.join(told)}. {end}"


def _figure(counts: Mapping) -> str:
    return rates.short(rates.percent(counts))


def _p(a: Mapping, b: Mapping, suite: str) -> float:
    return intervals.mcnemar(a["results"][suite]["outcomes"], b["results"][suite]["outcomes"])


def _against(ours: Mapping, theirs: Mapping, suites: Sequence[str]) -> str:
    """3 points higher in distribution (the intervals overlap, p = 0.2), level … and 2 points …"""
    told = []
    for suite in suites:
        a, b = ours["results"][suite], theirs["results"][suite]
        gap, p = rates.percent(a) - rates.percent(b), rates.p_text(_p(ours, theirs, suite))
        if gap:
            word = f"{rates.points(gap)} {'higher' if gap > 0 else 'lower'}"
            told.append(f"{word} {_where(suite)} ({rates.overlap(a, b)}, {p})")
        else:
            told.append(f"level {_where(suite)} ({p})")
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
