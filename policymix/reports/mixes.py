"""What people look at after a mix: coefficients, losses, the search, distances."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import numpy as np

from policymix import files
from policymix.reports import pages, tables

_LINES = ("-", "--", ":", "-.")
_MANY = 8  # bars, or rows of a matrix, that have room for a number each
_SELECTION, _HELD_OUT, _MIX = "#7a9cc6", "#2f4b7c", "#d1495b"


def _number(value: float | None, form: str = ".5f") -> str:
    return "" if value is None else format(value, form)


def table(report: Mapping[str, Any]) -> str:
    """The inputs with their coefficients and losses, and the mix; what the distances mean, and
    what to do.
    """
    names = tables.labels([entry["path"] for entry in report["inputs"]])
    losses = [entry["loss"] or {} for entry in report["inputs"]]
    groups = _by_group(report.get("coefficients", [None] * len(names)))
    rows = [
        [
            name,
            *(_number(c[k], ".4f") for c in groups.values()),
            *(_number(loss.get(which)) for which in ("selection", "held_out")),
        ]
        for k, (name, loss) in enumerate(zip(names, losses, strict=True))
    ]
    mixes = report.get("sweep") or [
        {"merge_ratio": report.get("merge_ratio"), "loss": report["loss"]}
    ]
    for mix in mixes:
        ratio = mix["merge_ratio"]
        name = f"merge_ratio {ratio:g}" if isinstance(ratio, float) else "mix"
        loss = mix["loss"] or {}
        shown = [_number(loss.get("selection")), _number(loss.get("held_out"))]
        rows.append([name, *("" for _ in groups), *shown])
    columns = [name or "coefficient" for name in groups]
    text = tables.table(rows, ["", *columns, "selection loss", "held-out loss"])
    advice = report.get("advice", {}).get("recommendation")
    told = [
        _verdict(losses, mixes),
        report.get("geometry", {}).get("meaning"),
        advice and f"advice: {advice}",
    ]
    return "\n".join([text, *filter(None, told)])


def _by_group(coefficients: Any) -> dict[str, Sequence]:
    """Coefficients by the name of their group; "" where there are no groups."""
    return coefficients if isinstance(coefficients, dict) else {"": coefficients}


def _verdict(losses: Sequence[Mapping], mixes: Sequence[Mapping]) -> str | None:
    """Whether the mix beats the best input, both chosen by selection loss, on batches that chose
    nothing; None where there are none.
    """
    if any(not loss or loss["held_out"] is None for loss in (*losses, *(m["loss"] for m in mixes))):
        return None
    single = min(losses, key=lambda loss: loss["selection"])["held_out"]
    chosen = min(mixes, key=lambda mix: mix["loss"]["selection"])
    mix, name = chosen["loss"]["held_out"], "the mix"
    if len(mixes) > 1:
        name = f"merge_ratio {chosen['merge_ratio']:g}, the best on the selection batches,"
    apart = mix / single - 1
    word = (
        "level with"
        if abs(apart) < 5e-5
        else f"{abs(apart):.2%} {'below' if apart < 0 else 'above'}"
    )
    told = (
        f"held out, {name} is {word} the input that is best on the selection batches "
        f"({mix:.5f} against {single:.5f})"
    )
    lowest = min(loss["held_out"] for loss in losses)
    return told + (
        f"; another input does better there ({lowest:.5f})" if lowest < min(mix, single) else ""
    )


def draw(report: Mapping[str, Any], path: pathlib.Path) -> None:
    """mix.png: coefficients, losses, the search's history, and the distances between inputs."""
    names = tables.labels([entry["path"] for entry in report["inputs"]])
    panels = [_draw_coefficients]
    if report["loss"]:
        panels.append(_draw_losses)
    if report["history"]:
        panels.append(_draw_history)
    if len(names) > 1:
        panels.append(_draw_distances)
    columns, width = 2 if len(panels) > 1 else 1, max(6, 0.5 * len(names))
    rows = -(-len(panels) // columns)
    # No pyplot: a notebook's own backend and figures are not ours to change.
    figure = matplotlib.figure.Figure(
        figsize=(width * columns, 0.63 * width * rows), layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        panel(axis, report, names)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    n = len(names) - (report["base"] is not None and report["method"] != "interpolate")
    figure.suptitle(
        f"{report['method']}: {n} checkpoint{'s' * (n > 1)}, {report['num_params']:,} parameters"
    )
    files.write_whole(path, pages.png(figure))


def _name(axis, names: Sequence[str]) -> None:
    """Writes names under places 0, 1, 2, ..., upright where they would touch."""
    upright = {"rotation": 90} if len(names) * max(map(len, names)) > 48 else {}
    axis.set_xticks(range(len(names)), names, **upright)


def _draw_coefficients(axis, report, names) -> None:
    groups = _by_group(report["coefficients"])
    places, width = np.arange(len(names)), 0.8 / len(groups)
    for i, (name, c) in enumerate(groups.items()):
        offset = (i - (len(groups) - 1) / 2) * width
        color = f"C{i}" if name else _SELECTION
        bars = axis.bar(places + offset, c, width, color=color, label=name or None)
        small = {"fontsize": 7, "rotation": 90} if len(groups) > 1 else {}
        written = [f"{x:.2f}" if small else f"{x:.3f}" for x in c]
        written = [
            "" if small and abs(x) < 5e-3 else text for x, text in zip(c, written, strict=True)
        ]
        if small or len(names) <= _MANY:
            axis.bar_label(bars, written, padding=2, **small)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.margins(y=0.4 if len(groups) > 1 else 0.15)
    _name(axis, names)
    axis.set_title("coefficients")
    if len(groups) > 1:
        axis.legend(loc="upper center", ncols=2, fontsize=8)


def _draw_losses(axis, report, names) -> None:
    entries = [*(entry["loss"] for entry in report["inputs"]), report["loss"]]
    places = np.arange(len(entries))
    series = [("selection", _SELECTION), ("held_out", _HELD_OUT)]
    series = [(which, color) for which, color in series if entries[-1][which] is not None]
    width = 0.8 / len(series)
    for i, (which, color) in enumerate(series):
        values = [entry[which] for entry in entries]
        bars = axis.bar(
            places + (i - (len(series) - 1) / 2) * width,
            values,
            width,
            color=color,
            label=which.replace("_", " "),
        )
        if len(entries) <= _MANY:
            axis.bar_label(bars, fmt="%.3f", padding=2, fontsize=8)
        bars[-1].set_edgecolor(_MIX)
        bars[-1].set_linewidth(2)
    _name(axis, [*names, "mix"])
    axis.margins(y=0.25)  # room for the legend above the bars
    axis.set_title("validation loss (lower is better)")
    axis.legend(loc="upper center", ncols=2)


def _draw_history(axis, report, names) -> None:
    rows = [row for row in report["history"] if row.get("batch", 0) is not None]
    rows = rows or report["history"]  # a search on all batches has no others
    steps = [row["step"] for row in rows]
    lowest, highest = 0.0, 0.0
    for i, group in enumerate(_by_group(rows[0]["coefficients"])):
        values = np.array([_by_group(row["coefficients"])[group] for row in rows])
        lowest, highest = min(lowest, values.min()), max(highest, values.max())
        for k in range(values.shape[1]):
            axis.plot(
                steps,
                values[:, k],
                _LINES[i % len(_LINES)],
                marker=".",
                color=f"C{k}",
                # A colour for each input, a line for each group.
                label=names[len(names) - values.shape[1] + k] if i == 0 else None,
            )
        if group:
            axis.plot([], [], _LINES[i % len(_LINES)], color="black", label=group)
    axis.set_ylim(lowest, highest * 1.1)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("step")
    axis.set_title("coefficients during the search")
    axis.legend(fontsize=8)


def _draw_distances(axis, report, names) -> None:
    values = np.array(report["geometry"]["relative_distance"])
    image = axis.imshow(values, cmap="Blues", vmin=0)
    for (i, j), value in np.ndenumerate(values) if len(names) <= _MANY else ():
        axis.text(
            j,
            i,
            f"{value:.3g}",
            ha="center",
            va="center",
            color="white" if value > values.max() / 2 else "black",
        )
    _name(axis, names)
    axis.set_yticks(range(len(names)), names)
    axis.set_title("distance between inputs / length of the first")
    axis.figure.colorbar(image, ax=axis, shrink=0.8)


def draw_sweep(report: Mapping[str, Any], path: pathlib.Path) -> None:
    """mix.png of several merge ratios: the loss on the way from the fine-tune to the base."""
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    ratios = [mix["merge_ratio"] for mix in report["sweep"]]
    if report["sweep"][0]["loss"]:
        base, *_, last = report["inputs"]  # at ratio 0 of several the last one is the mix
        ends = [(0.0, last["loss"]), (1.0, base["loss"])]
        between = [(mix["merge_ratio"], mix["loss"]) for mix in report["sweep"]]
        points = sorted([*ends, *between], key=lambda point: point[0])
        for which, color in (("selection", _SELECTION), ("held_out", _HELD_OUT)):
            if points[0][1][which] is not None:
                axis.plot(
                    [r for r, _ in points],
                    [loss[which] for _, loss in points],
                    marker="o",
                    markerfacecolor="white",  # the ends were not written
                    markevery=[0, len(points) - 1],
                    color=color,
                    label=which.replace("_", " "),
                )
                written = [mix["loss"][which] for mix in report["sweep"]]
                axis.plot(ratios, written, "o", color=color)
        axis.set_ylabel("validation loss")
        axis.legend()
    else:
        axis.vlines(ratios, 0, 1, color=_SELECTION)
        axis.set_yticks([])
        axis.set_title("no validation data was given; these ratios were written")
    axis.set_xlabel("merge ratio (0: fine-tuned, 1: base)")
    files.write_whole(path, pages.png(figure))
