"""What people look at after an evaluation: who succeeded how often, and how sure that is."""

import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import numpy as np

from policymix import files, intervals
from policymix.reports import pages, rates, tables

_DOT, _BEST = "#2f4b7c", "#fdf1dc"


def line(policy: Mapping[str, Any]) -> str:
    """One line for the terminal, as soon as a policy has finished."""
    return (
        f"{policy['name']}: {policy['successes']} of {policy['episodes']} episodes succeeded, "
        f"{rates.rate(policy)}, {policy['seconds']:.1f} s"
    )


def table(report: Mapping[str, Any]) -> str:
    """Every policy with its losses and successes; with several tasks, each task; the verdict."""
    parts = [tables.table(*_overall(report))]
    if len(report["tasks"]) > 1:
        parts += ["", _by_task_title(report), tables.table(*_by_task(report))]
    return "\n".join([*parts, "", textwrap.fill(verdict(report), 100, break_on_hyphens=False)])


def verdict(report: Mapping[str, Any]) -> str:
    """Sentences: which policy has the most successes, and whether that is more than chance."""
    ranked = sorted(report["policies"], key=lambda p: p["successes"], reverse=True)
    first, n = ranked[0], ranked[0]["episodes"]
    if len(ranked) == 1:
        return "There is one policy, so there is nothing to compare it with."
    if not first["successes"]:
        return _verdict_by_score(report)
    second = ranked[1]
    test = rates.p_text(intervals.mcnemar(first["outcomes"], second["outcomes"]))
    level = [p for p in ranked if p["successes"] == first["successes"]]
    if len(level) > 1:
        names = _listed([p["name"] for p in level])
        return (
            f"{names} have the most successes: {first['successes']} of {n} each, "
            f"{rates.rate(first)}, so this evaluation prefers none of them (McNemar {test} between "
            "the first two)."
        )
    told = (
        f"“{first['name']}” has the most successes: {first['successes']} of {n}, "
        f"{rates.rate(first)}. The runner-up, “{second['name']}”, has {second['successes']}, "
        f"{rates.rate(second)}: {rates.overlap(first, second)}. The exact McNemar test of the two, "
        f"on the same starts, gives {test}."
    )
    if len(ranked) > 2:
        told += f" {_verdict_on_the_others(first, ranked[1:])}"
    return f"{told} {_on_scores(report['policies'])}" if _shows_scores(report) else told


def _shows_scores(report: Mapping[str, Any]) -> bool:
    """Whether scores are shown beside successes: where they say more, and of PushT always, whose
    policies are compared by the coverage that they reach.
    """
    return report["simulator"]["name"] == "pusht" or rates.scores_tell(report["policies"])


def _on_scores(policies: Sequence[Mapping[str, Any]]) -> str:
    """A sentence on the two best mean scores, of which the first is not zero."""
    a, b = sorted(policies, key=lambda p: p["mean_score"], reverse=True)[:2]
    # On the starts where the two differ, McNemar's coin is the sign test.
    pairs = list(zip(a["scores"], b["scores"], strict=True))
    test = rates.p_text(intervals.mcnemar([x > y for x, y in pairs], [y > x for x, y in pairs]))
    return (
        f"“{a['name']}” has the highest mean score, {rates.score(a)}, before “{b['name']}” with "
        f"{rates.score(b)}: {rates.scores_overlap(a, b)}; the sign test of the two, on the same "
        f"starts, gives {test}."
    )


def _verdict_on_the_others(first: Mapping, others: Sequence[Mapping]) -> str:
    apart = sum("separate" in rates.overlap(first, other) for other in others)
    return (
        f"Its interval is separate from {apart} of the {len(others)} others. The best of "
        f"{len(others) + 1}, picked on the same episodes that judge it, looks a little better than "
        "it is."
    )


def _verdict_by_score(report: Mapping[str, Any]) -> str:
    """The same where nothing succeeded: by the best score of each episode, start by start."""
    policies = report["policies"]
    told = f"No policy succeeded in any of {policies[0]['episodes']} episodes, so success does not "
    if not any(policy["mean_score"] for policy in policies):
        return told + "tell them apart; neither do the scores, which are all zero."
    return f"{told}tell them apart. {_on_scores(policies)}"


def _listed(names: Sequence[str]) -> str:
    quoted = [f"“{name}”" for name in names]
    return ", ".join(quoted[:-1]) + f" and {quoted[-1]}"


def _overall(report: Mapping[str, Any]) -> tuple[list[list[str]], list[str]]:
    policies = report["policies"]
    scores = _shows_scores(report)
    rows = []
    for policy in policies:
        loss, (low, high) = policy["loss"] or {}, policy["interval"]
        rows.append(
            [
                policy["name"],
                _loss(loss.get("selection")),
                _loss(loss.get("held_out")),
                rates.short(rates.percent(policy)),
                f"[{100 * low:.0f}, {100 * high:.0f}]",
                str(policy["episodes"]),
                rates.score(policy) if scores else "",
            ]
        )
    header = ["", "selection loss", "held-out loss", "success %", "95 % interval", "n"]
    return rows, [*header, "mean best score"]


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"


def _by_task(report: Mapping[str, Any]) -> tuple[list[list[str]], list[str]]:
    policies = report["policies"]
    rows = [
        [task, *(rates.short(rates.percent(policy["by_task"][task])) for policy in policies)]
        for task in report["tasks"]
    ]
    return rows, ["", *(policy["name"] for policy in policies)]


def _by_task_title(report: Mapping[str, Any]) -> str:
    counts = [c for policy in report["policies"] for c in policy["by_task"].values()]
    widest = max(100 * (c["interval"][1] - c["interval"][0]) for c in counts)
    return (
        f"success % of each task, {counts[0]['episodes']} episodes each; the 95 % intervals are up "
        f"to {rates.points(round(widest))} wide"
    )


def draw(report: Mapping[str, Any], path: pathlib.Path) -> None:
    """report.png: successes with their intervals, beside them those of each task."""
    files.write_whole(path, pages.png(_figure(report)))


def _figure(report: Mapping[str, Any]) -> matplotlib.figure.Figure:
    policies, tasks = report["policies"], report["tasks"]
    several = len(tasks) > 1
    wide = min(18.0, 1.6 + 0.55 * len(tasks)) if several else 0.0
    height = 1.9 + 0.4 * len(policies) + (0.9 if several else 0.0)
    figure = matplotlib.figure.Figure(figsize=(9 + wide, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1)
    if not several:
        _draw_rates(figure.subplots(), policies, _shows_scores(report))
    else:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=[6.5, wide])
        _draw_rates(left, policies, _shows_scores(report))
        _draw_tasks(right, policies, tasks)
    simulator, n = report["simulator"]["name"], policies[0]["episodes"]
    told = rates.shown(tasks[0], 60) if not several else f"{len(tasks)} tasks"
    figure.suptitle(f"{simulator}, {told}: {n} episodes of each policy, same starts", fontsize=12)
    return figure


def _draw_rates(axis, policies: Sequence[Mapping[str, Any]], scores: bool) -> None:
    places = np.arange(len(policies))
    percents = np.array([rates.percent(p) for p in policies])
    low, high = 100 * np.array([p["interval"] for p in policies]).T
    best = int(np.argmax(percents))
    label = "success % with 95 % intervals (Wilson)"
    if len(policies) > 1 and percents[best]:
        label += "; shaded: that of the highest"
        axis.axvspan(low[best], high[best], color=_BEST, zorder=0)
    whiskers = (np.maximum(percents - low, 0), np.maximum(high - percents, 0))
    axis.errorbar(
        percents, places, xerr=whiskers, fmt="o", color=_DOT, capsize=4, linewidth=1.6, markersize=7
    )
    for place, policy in zip(places, policies, strict=True):
        told = (
            f"{rates.short(rates.percent(policy))} %  ({policy['successes']}/{policy['episodes']})"
        )
        told += f"\nmean score {rates.score(policy)}" if scores else ""
        axis.text(103, place, told, va="center", fontsize=9)
    axis.set_xlim(-2, 128)
    axis.set_xticks(range(0, 101, 20))
    axis.set_yticks(places, [rates.shown(p["name"]) for p in policies])
    axis.set_ylim(len(policies) - 0.4, -0.6)  # as given, from the top
    axis.grid(axis="x", color="#e3e7eb")
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel(label)


def _draw_tasks(axis, policies: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> None:
    values = np.array([[rates.percent(p["by_task"][task]) for task in tasks] for p in policies])
    axis.imshow(values, cmap="Blues", vmin=0, vmax=115, aspect="auto")
    if len(tasks) <= 24:
        for (i, j), value in np.ndenumerate(values):
            axis.text(
                j, i, f"{value:.0f}", ha="center", va="center", fontsize=8,
                color="white" if value > 65 else "black",
            )  # fmt: skip
    axis.set_xticks(range(len(tasks)), [rates.shown(t, 26) for t in tasks], rotation=60, ha="right",
                    rotation_mode="anchor", fontsize=8 if len(tasks) <= 24 else 7)  # fmt: skip
    axis.tick_params(length=0, labelleft=False)
    axis.spines[:].set_visible(False)
    each = policies[0]["by_task"][tasks[0]]["episodes"]
    axis.set_title(f"success % of each task, n = {each}", fontsize=10)


def write_page(report: Mapping[str, Any], path: pathlib.Path) -> None:
    """report.html: the verdict, the tables, the picture, and how it was measured."""
    rows, header = _overall(report)
    most = max(p["successes"] for p in report["policies"])
    best = [most > 0 and p["successes"] == most for p in report["policies"]]
    result = [
        pages.paragraph(verdict(report)),
        pages.table(rows, header, ["mark" if b and len(rows) > 1 else "" for b in best]),
        pages.picture(
            pages.png(_figure(report)), "Success rates of the policies with 95 % intervals, as in "
            "the table",
        ),
    ]  # fmt: skip
    sections = [("", result)]
    if len(report["tasks"]) > 1:
        parts = [pages.paragraph(_by_task_title(report)), pages.table(*_by_task(report))]
        sections.append(("Task by task", parts))
    sections += [("How it was measured", _measured(report)), ("Checkpoints", _origins(report))]
    title = f"Evaluation in {report['simulator']['name']}"
    files.write_whole(path, pages.page(title, sections).encode("utf-8"))


def _measured(report: Mapping[str, Any]) -> list[str]:
    first, memory = report["policies"][0], report["peak_memory_bytes"]
    seeds = sorted(set(first["seeds"]))
    facts = {
        "tasks": ", ".join(report["tasks"]),
        "episodes of each policy (n)": str(first["episodes"]),
        "seeds": f"{seeds[0]} to {seeds[-1]}, the same for every policy and task",
        **{name: str(version) for name, version in report["simulator"]["versions"].items()},
        "policymix": report["policymix"],
        "jax": report["jax"],
        "seconds": f"{report['seconds']:.1f}",
        "peak memory, policies": f"{memory['policy'] / 1e6:,.0f} MB",
        "peak memory, one process of environments": f"{memory['environments'] / 1e6:,.0f} MB",
        **{f"evaluate.{name}": str(value) for name, value in report["settings"].items()},
    }
    if report["validation"]:
        facts["losses on"] = str(report["validation"]["path"])
    told = (
        "Every policy met the same starts with the same noise in its actions. Intervals are "
        "Wilson's, at 95 %; those of mean scores are Student's with a score of 0 and one of 1 "
        "added (Agresti and Caffo's), so that scores which are all alike do not look certain. They "
        "cover the choice of starts, not that of the training seed."
    )
    return [pages.paragraph(told), pages.table([[*pair] for pair in facts.items()], ["", ""])]


def _origins(report: Mapping[str, Any]) -> list[str]:
    rows = [
        [p["name"], p["path"], p["fingerprint"][:16], f"{p['seconds']:.1f}"]
        for p in report["policies"]
    ]
    return [pages.table(rows, ["", "checkpoint", "fingerprint begins", "seconds"])]
