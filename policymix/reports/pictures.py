"""The quickstart's picture: both acts, and what each stage cost."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import matplotlib.lines
import matplotlib.patches
import matplotlib.ticker
import numpy as np

from policymix import metrics
from policymix.reports import rates, verdicts

KINDS = {"base": "#9aa5b1", "input": "#7a9cc6", "mix": "#d1495b", "control": "#edae49"}
_SUITES = (("#2f4b7c", "o"), ("#d1495b", "s"), ("#2a8f72", "^"))
_LOSSES = (("selection", "#8fa6c4", "o"), ("held_out", "#2f4b7c", "D"))


def figure(report: Mapping[str, Any]) -> matplotlib.figure.Figure:
    """Successes and losses of the soup; success along the merge ratio; seconds of the stages."""
    soup, retain = report["soup"], report["retain"]
    controls = [row for row in retain["rows"] if row["kind"] == "control"]
    drawn = matplotlib.figure.Figure(
        figsize=(16, 1.2 + 0.4 * max(8, len(soup["rows"])) + 5.2), layout="constrained"
    )
    drawn.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    upper, lower = drawn.subfigures(2, 1, height_ratios=[0.4 * max(8, len(soup["rows"])), 5.2])
    successes, losses = upper.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    _draw_soup(successes, soup)
    _draw_losses(losses, soup)
    curve, beside, stages = lower.subplots(
        1, 3, width_ratios=[4, max(1.0, 1.0 * len(controls)), 3.2]
    )
    every = [counts for row in retain["rows"] for counts in row["results"].values()]
    scores = not any(counts["successes"] for counts in every)
    _draw_retain(curve, retain, scores)
    if controls:
        _draw_controls(beside, retain, controls, scores)
    else:
        beside.set_axis_off()
    lower.legend(*curve.get_legend_handles_labels(), loc="outside lower left", ncols=3,
                 frameon=False)  # fmt: skip
    _draw_stages(stages, report)
    machine = report["machine"]
    drawn.suptitle(
        f"quickstart in {report['simulator']['name']}: {report['seconds']:.0f} s on "
        f"{machine['cores']} cores ({machine['platform']}), training seed "
        f"{report['training_seed']}",
        fontsize=13,
    )
    return drawn


def grouped(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Stages of one verb together: seconds that at least one took, the largest peak, how many were
    reused.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    for stage in stages:
        found.setdefault(stage["name"].split("_")[0], []).append(stage)
    return [
        {
            "name": same[0]["name"].replace("_", " ") if len(same) == 1 else verb,
            "count": len(same),
            "seconds": metrics.wall_seconds(same),
            "peak_memory_bytes": max(stage["peak_memory_bytes"] for stage in same),
            "reused": sum(stage["reused"] for stage in same),
        }
        for verb, same in found.items()
    ]


def _draw_soup(axis, soup: Mapping[str, Any]) -> None:
    rows, places = soup["rows"], np.arange(len(soup["rows"]))
    scores = not any(row["successes"] for row in rows)  # success would be a column of zeros
    values, low, high = np.array([_height(row, scores) for row in rows]).T
    axis.barh(places, values, height=0.62, color=[KINDS[row["kind"]] for row in rows])
    if not scores:
        axis.errorbar(
            values, places, xerr=(values - low, high - values), fmt="none", ecolor="#22282e",
            capsize=3, linewidth=1.3,
        )  # fmt: skip
    for place, row, value, end in zip(places, rows, values, high, strict=True):
        told = rates.short(value) if scores else rates.cell(row)
        axis.text(end + 1.5, place, told, va="center", fontsize=9)
    axis.set_xlim(0, 120)
    axis.set_xticks(range(0, 101, 20))
    star = verdicts.chosen(soup)
    names = [rates.shown(r["name"]) + (" *" if r is star else "") for r in rows]
    axis.set_yticks(places, names)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    _plain(axis, "x")
    axis.tick_params(axis="y", length=0)
    n = rows[0]["episodes"]
    what = "mean best score × 100 (no policy succeeded)" if scores else "success %, 95 % intervals"
    _title(axis, f"soup on {soup['task']}: {what}, n = {n}")
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]
    handles = [matplotlib.patches.Patch(color=KINDS[kind], label=kind) for kind in kinds]
    # An empty line in the legend explains the star.
    handles.append(
        matplotlib.lines.Line2D([], [], linestyle="", label="* mix chosen by selection loss")
    )
    axis.legend(
        handles=handles,
        ncols=len(handles),
        handlelength=1.4,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.07),
        frameon=False,
    )


def _draw_losses(axis, soup: Mapping[str, Any]) -> None:
    rows, places = soup["rows"], np.arange(len(soup["rows"]))
    told = [{k: v for k, v in (row["loss"] or {}).items() if v is not None} for row in rows]
    for place, loss in zip(places, told, strict=True):
        axis.hlines(place, *_ends(loss.values()), color="#d5dbe1", linewidth=2, zorder=1)
    for which, color, marker in _LOSSES:
        found = [(loss[which], place) for loss, place in zip(told, places, strict=True)
                 if which in loss]  # fmt: skip
        if found:
            axis.plot(
                *zip(*found, strict=True), marker, color=color, markersize=7,
                label=which.replace("_", "-") if which == "held_out" else which,
            )  # fmt: skip
    values = [value for loss in told for value in loss.values()]
    if values and min(values) > 0 and max(values) > 5 * min(values):
        # A base that never saw the task would flatten the rest.
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        _title(axis, "flow-matching loss, logarithmic (left is better)")
    else:
        _title(axis, "flow-matching loss (left is better)")
    _plain(axis, "x")
    axis.tick_params(axis="y", length=0, labelleft=False)
    if values:
        axis.legend(
            ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.07), frameon=False,
        )  # fmt: skip


def _ends(values) -> tuple[float, float]:
    values = list(values)
    return (min(values), max(values)) if values else (np.nan, np.nan)


def _draw_retain(axis, retain: Mapping[str, Any], scores: bool) -> None:
    """Fine-tuned at 0, base at 1, merged between."""
    ends = {"finetuned": 0.0, "base": 1.0}
    points = [
        (ends.get(row["kind"], row["merge_ratio"]), row["results"])
        for row in retain["rows"]
        if row["kind"] != "control"
    ]
    points.sort(key=lambda point: point[0])
    ratios = [ratio for ratio, _ in points]
    for suite, (color, marker) in zip(retain["suites"], _SUITES, strict=True):
        counts = [results[suite] for _, results in points]
        values, low, high = np.array([_height(c, scores) for c in counts]).T
        axis.fill_between(ratios, low, high, color=color, alpha=0.13, linewidth=0)
        label = f"{suite}, n = {counts[0]['episodes']}"
        axis.plot(ratios, values, marker=marker, color=color, linewidth=2, markersize=7,
                  label=label)  # fmt: skip
    axis.axvline(0.5, color="#9aa5b1", linestyle=":", linewidth=1.2, zorder=0)
    names = ["0\nfine-tuned", "0.25", "0.5\ndefault", "0.75", "1\nbase"]
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1], names)
    axis.set_xlabel("merge ratio (weight of the base)")
    axis.set_ylim(-3, 105)
    _plain(axis, "y")
    what = "mean best score × 100" if scores else "success %, 95 % bands"
    _title(axis, f"RETAIN on {retain['task']}: {what}")


def _draw_controls(axis, retain: Mapping, controls: Sequence[Mapping], scores: bool) -> None:
    """The same three successes of what was not merged, beside the curves."""
    for number, (suite, (color, marker)) in enumerate(zip(retain["suites"], _SUITES, strict=True)):
        for place, row in enumerate(controls):
            value, low, high = _height(row["results"][suite], scores)
            axis.errorbar(
                place + 0.17 * (number - 1), value, yerr=[[value - low], [high - value]],
                fmt=marker, color=color, capsize=3, linewidth=1.4, markersize=7,
            )  # fmt: skip
    names = ["\n".join(textwrap.wrap(row["name"], 13)) for row in controls]
    axis.set_xticks(range(len(controls)), names)
    axis.set_xlim(-0.6, max(len(controls), 1) - 0.4)
    axis.set_ylim(-3, 105)
    _plain(axis, "y")
    axis.tick_params(axis="y", labelleft=False, length=0)
    axis.spines["left"].set_visible(False)
    _title(axis, "controls, not merged")


def _height(counts: Mapping[str, Any], scores: bool) -> tuple[float, float, float]:
    """Percent with both ends of its interval; scores have none."""
    if scores:
        return (100 * counts["mean_score"],) * 3
    value = rates.percent(counts)
    low, high = (100 * end for end in counts["interval"])
    return value, min(low, value), max(high, value)  # rounding may put an end past the value


def _draw_stages(axis, report: Mapping[str, Any]) -> None:
    stages = grouped(report["stages"])
    seconds = [stage["seconds"] for stage in stages]
    bars = axis.barh(range(len(stages)), seconds, height=0.62, color="#7a9cc6")
    axis.bar_label(bars, [f"{s:.0f} s" if s >= 1 else f"{s:.1f} s" for s in seconds], padding=3,
                   fontsize=9)  # fmt: skip
    names = [s["name"] + (f" ({s['count']})" if s["count"] > 1 else "") for s in stages]
    axis.set_yticks(range(len(stages)), names)
    axis.set_ylim(len(stages) - 0.4, -0.6)
    axis.set_xlim(0, max([*seconds, 1e-3]) * 1.18)
    _plain(axis, "x")
    axis.tick_params(axis="y", length=0)
    _title(axis, "time of the stages")


def _plain(axis, grid: str) -> None:
    axis.grid(axis=grid, color="#e3e7eb")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _title(axis, text: str) -> None:
    axis.set_title(text, fontsize=11, loc="left")
