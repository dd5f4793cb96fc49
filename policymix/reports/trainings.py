"""What people look at while a policy trains and after: curves, how fast it goes, its settings."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import matplotlib.ticker
import numpy as np

from policymix import files, metrics, trees
from policymix.reports import pages

_TRAIN, _HELD_OUT, _PLAIN = "#2f4b7c", "#d1495b", "#2a8f72"
_FAINT = "#b7c4d8"
_SHADES = ("#123b6d", "#2c6ca8", "#5a9bd0", "#93c0e4", "#c3dcf0")  # strict to lenient
_SMOOTHED = 60  # points from which on a running mean is easier to read
_HELD = "held_out/"
_SUCCESS, _SCORE = "rollout/success", "rollout/score"

Curve = tuple[np.ndarray, np.ndarray]  # steps [n], values [n]


def write_page(workdir: pathlib.Path, path: pathlib.Path | None = None) -> None:
    """report.html of a run, from its metrics.jsonl and config.json, as far as it has come.

    Args:
      path: of the page; WORKDIR/report.html unless given.

    Raises:
      OSError: there is no metrics.jsonl, or a disk is full.
    """
    rows = list(metrics.read(workdir / metrics.FILE))
    settings = _settings(workdir)
    curves = _curves(rows)
    result = [pages.paragraph(text) for text in _headline(curves, settings)]
    if figure := _figure(curves):
        told = "Curves of the run: losses, gradients, speed, and what else was measured"
        result.append(pages.picture(pages.png(figure), told))
    sections = [("", result)]
    if rows:
        sections.append(("In numbers", _numbers(rows, curves)))
    if settings:
        sections.append(("Settings", [_settings_table(settings)]))
    page = pages.page(f"Training {workdir.name}", sections)
    files.write_whole(path or workdir / "report.html", page.encode("utf-8"))


def _settings(workdir: pathlib.Path) -> dict[str, Any]:
    """{"train.seed": 42} of the run's config.json; {} where there is none."""
    try:
        record = files.read_json(workdir / "config.json")
    except OSError:
        return {}
    return {path.replace("/", "."): value for path, value in trees.flatten(record).items()}


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """What was measured, by name; null, which is no number, is left out."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                found.setdefault(name, []).append((row["step"], value))
    return {name: tuple(np.array(pairs, np.float64).T) for name, pairs in found.items()}


# --- words


def _headline(curves: Mapping[str, Curve], settings: Mapping[str, Any]) -> list[str]:
    """Sentences: what trains, from what, how far it is, and how good."""
    start, data = settings.get("train.init_from"), settings.get("data.path")
    model = "π0.5" if settings.get("model.pi05") else "π0"
    begun = f"{model} from {start}" if start else f"A fresh {model}"
    on = settings.get("data.mixture") or data
    told = [f"{begun}{f', on {on}' if on else ''}." if settings else ""]
    if not curves:
        return [*filter(None, told), "No step has been written down yet."]
    last = max(int(steps[-1]) for steps, _ in curves.values())
    total = settings.get("train.num_steps")
    done = f"Step {last:,}" + (f" of {total:,}" if total else "")
    if "loss" in curves:
        done += f", loss {_number(curves['loss'][1][-1])}"
    if "learning_rate" in curves:
        done += f", learning rate {curves['learning_rate'][1][-1]:.3g}"
    told.append(f"{done}.{_left(curves, last, total)}")
    told.append(_best(curves, f"{_HELD}loss", "The lowest held-out loss", np.argmin))
    told.append(_success(curves))
    return list(filter(None, told))


def _left(curves: Mapping[str, Curve], last: int, total: int | None) -> str:
    if not total or last >= total or "eta_seconds" not in curves:
        return ""
    return f" {metrics.span(curves['eta_seconds'][1][-1])} were left when this was written."


def _best(curves: Mapping[str, Curve], name: str, what: str, choose) -> str:
    if name not in curves:
        return ""
    steps, values = curves[name]
    best = int(choose(values))
    told = f"{what} is {_number(values[best])}, at step {int(steps[best]):,}"
    if best < len(steps) - 1:
        told += f"; the last is {_number(values[-1])}, at step {int(steps[-1]):,}"
    return f"{told}."


def _success(curves: Mapping[str, Curve]) -> str:
    if _SUCCESS not in curves:
        return _best(curves, _SCORE, "The highest mean score of the roll-outs", np.argmax)
    steps, values = curves[_SUCCESS]
    told = f"In the simulator {100 * values[-1]:.0f} % of the episodes succeed"
    interval = _interval(curves, _SUCCESS)
    if interval is not None:
        low, high = interval[:, -1]
        told += f" [{100 * low:.0f}, {100 * high:.0f}]"
    told += f" at step {int(steps[-1]):,}"
    if _SCORE in curves:
        told += f", with a mean score of {100 * curves[_SCORE][1][-1]:.1f} %"
    return f"{told}."


def _interval(curves: Mapping[str, Curve], name: str) -> np.ndarray | None:
    """Both ends [2, n], where each value of a roll-out has them."""
    prefix = "rollout/" if name == _SUCCESS else f"{_SCORE}_"
    ends = [curves.get(f"{prefix}{end}") for end in ("low", "high")]
    if any(end is None or len(end[0]) != len(curves[name][0]) for end in ends):
        return None
    return np.stack([end[1] for end in ends])


def _numbers(rows: Sequence[Mapping[str, Any]], curves: Mapping[str, Curve]) -> list[str]:
    """The last of what was measured, and the usual or the best; how often the run was begun."""
    parts, running, judged = [], [], []
    if broken := _not_finite(rows):
        parts.append(pages.paragraph(broken))
    for name, (what, unit) in _FACTS.items():
        if name in curves:
            values = curves[name][1] / unit
            usual = np.median(values[1:] if len(values) > 1 else values)  # the first compiles
            running.append([what, _number(values[-1]), _number(usual)])
    for name in _judged(curves):
        steps, values = curves[name]
        best = int(np.argmin(values) if name.endswith(("loss", "l1")) else np.argmax(values))
        cells = [_judgement(curves, name, place) for place in (-1, best)]
        judged.append([_called(name), *cells, f"{int(steps[best]):,}"])
    if running:
        parts.append(pages.table(running, ["", "last", "median"]))
    if judged:
        parts.append(pages.table(judged, ["", "last", "best", "at step"]))
    if "resumed" in curves:
        steps = ", ".join(f"{int(step):,}" for step in curves["resumed"][1])
        parts.append(pages.paragraph(f"The run was taken up again after step {steps}.", dim=True))
    return parts


def _judged(curves: Mapping[str, Curve]) -> list[str]:
    """What says how good the policy is."""
    held_out = [name for name in (f"{_HELD}loss", f"{_HELD}l1") if name in curves]
    rolled_out = [name for name in (_SUCCESS, _SCORE) if name in curves]
    return [*held_out, *_accuracies(curves), *rolled_out]


def _called(name: str) -> str:
    known = {
        f"{_HELD}loss": "held-out loss",
        f"{_HELD}l1": "held-out error of a number, mean",
        _SUCCESS: "success in the simulator, %",
        _SCORE: "mean score in the simulator, %",
    }
    return known.get(name) or f"held-out actions with all errors below {_threshold(name):g}, %"


def _judgement(curves: Mapping[str, Curve], name: str, place: int) -> str:
    value = curves[name][1][place]
    if name.endswith(("loss", "l1")):
        return _number(value)
    interval = _interval(curves, name) if name.startswith("rollout/") else None
    if interval is None:
        return f"{100 * value:.1f}"
    low, high = 100 * interval[:, place]
    return f"{100 * value:.1f} [{low:.0f}, {high:.0f}]"


def _not_finite(rows: Sequence[Mapping[str, Any]]) -> str:
    found = {(name, row["step"]) for row in rows for name, value in row.items() if value is None}
    if not found:
        return ""
    name, step = min(found, key=lambda pair: pair[1])
    return f"Not a finite number: {name} at step {step:,}, the first of {len(found)}."


def _number(value: float) -> str:
    return f"{value:.4g}"


_FACTS = {  # what it is called, and its unit
    "loss": ("loss", 1),
    "grad_norm": ("gradient norm", 1),
    "param_norm": ("parameter norm", 1),
    "samples_per_second": ("samples per second", 1),
    "steps_per_second": ("steps per second", 1),
    "data_wait": ("time that waits for data, %", 0.01),
    "memory_bytes": ("peak memory of a device, GB", 1e9),
    "host_memory_bytes": ("peak memory of the process, GB", 1e9),
}


def _settings_table(settings: Mapping[str, Any]) -> str:
    said = {name: value for name, value in settings.items() if value not in ("", None, [], {})}
    order = {"train": 0, "data": 1, "model": 2}
    names = sorted(said, key=lambda name: order.get(name.split(".")[0], 3))
    return pages.table([[name, _said(said[name])] for name in names], ["", ""])


def _said(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


# --- picture


def _figure(curves: Mapping[str, Curve]) -> matplotlib.figure.Figure | None:
    """A panel for each thing that was measured, two in a row."""
    panels = [(draw, names) for draw, names in _PANELS if any(map(curves.__contains__, names))]
    if accuracies := _accuracies(curves):
        panels.insert(1, (_draw_accuracies, accuracies))
    if not panels:
        return None
    lines = math.ceil(len(panels) / 2)
    figure = matplotlib.figure.Figure(figsize=(12, 3.1 * lines), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    axes = figure.subplots(lines, 2, squeeze=False).flatten()
    last = max(steps[-1] for steps, _ in curves.values())
    for axis, (draw, names) in zip(axes, panels, strict=False):
        draw(axis, curves, names)
        _plain(axis, last)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return figure


def _accuracies(curves: Mapping[str, Curve]) -> list[str]:
    return sorted((n for n in curves if n.startswith(f"{_HELD}accuracy_")), key=_threshold)


def _draw_loss(axis, curves: Mapping[str, Curve], names: Sequence[str]) -> None:
    train, held_out = names
    if train in curves:
        _draw_smoothed(axis, curves[train], _TRAIN, label="training")
    if held_out in curves:
        steps, values = curves[held_out]
        axis.plot(steps, values, "o-", color=_HELD_OUT, markersize=4, label="held out", zorder=3)
    _scale(axis, [curves[name][1] for name in names if name in curves])
    axis.legend(frameon=False)
    _title(axis, "flow-matching loss")


def _draw_gradient(axis, curves: Mapping[str, Curve], names: Sequence[str]) -> None:
    (name,) = names
    steps, values = curves[name]
    if (values > 0).all():  # smoothed as it is shown, so that a spike stays one
        _draw_smoothed(axis, (steps, values), _PLAIN, scale=(np.log, np.exp))
        _scale(axis, [values])
    else:
        _draw_smoothed(axis, (steps, values), _PLAIN)
    _title(axis, "gradient norm, before clipping")


def _draw_rate(axis, curves: Mapping[str, Curve], names: Sequence[str]) -> None:
    (name,) = names
    axis.plot(*curves[name], color=_PLAIN)
    axis.yaxis.set_major_formatter("{x:.2g}")
    axis.set_ylim(bottom=0)
    _title(axis, "learning rate")


def _draw_speed(axis, curves: Mapping[str, Curve], names: Sequence[str]) -> None:
    (name,) = names
    what, unit = _FACTS[name]
    steps, values = curves[name]
    _draw_smoothed(axis, (steps, values / unit), _PLAIN)
    axis.set_ylim(0, max(1.08 * values.max() / unit, 5 if name == "data_wait" else 1e-9))
    _title(axis, what)


def _draw_accuracies(axis, curves: Mapping[str, Curve], names: Sequence[str]) -> None:
    for name, color in zip(names, _SHADES * len(names), strict=False):
        steps, values = curves[name]
        label = f"{_threshold(name):g}"
        axis.plot(steps, 100 * values, "o-", color=color, markersize=4, label=label)
    axis.set_ylim(0, 100)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5),
                reverse=True)  # fmt: skip
    _title(axis, "held-out actions with all errors below a threshold, %")


def _draw_success(axis, curves: Mapping[str, Curve], names: Sequence[str]) -> None:
    told = {_SUCCESS: ("success", _TRAIN), _SCORE: ("mean score", _HELD_OUT)}
    aside = 0.004 * max(steps[-1] for steps, _ in curves.values())  # whiskers side by side
    for number, name in enumerate(filter(curves.__contains__, names)):
        steps, values = curves[name]
        steps, (label, color) = steps - aside * number, told[name]
        interval = _interval(curves, name)
        if interval is None:
            axis.plot(steps, 100 * values, "o-", color=color, label=label)
            continue
        whiskers = 100 * np.abs(interval - values)
        axis.errorbar(steps, 100 * values, yerr=whiskers, fmt="o-", color=color, capsize=3,
                      label=f"{label}, 95 % intervals")  # fmt: skip
    axis.set_ylim(-3, 103)
    axis.legend(frameon=False)
    _title(axis, "roll-outs in the simulator, %")


_PANELS = (
    (_draw_loss, ("loss", f"{_HELD}loss")),
    (_draw_success, (_SUCCESS, _SCORE)),
    (_draw_gradient, ("grad_norm",)),
    (_draw_rate, ("learning_rate",)),
    (_draw_speed, ("samples_per_second",)),
    (_draw_speed, ("data_wait",)),
)


def _draw_smoothed(axis, curve: Curve, color: str, *, label: str = "", scale=None) -> None:
    """A line; of many points their mean around each step, and the points faint behind it."""
    steps, values = curve
    if len(steps) < _SMOOTHED:
        axis.plot(steps, values, "o-", color=color, markersize=3, label=label)
        return
    axis.plot(steps, values, color=_FAINT, linewidth=0.8)
    there, back = scale or (lambda x: x, lambda x: x)
    axis.plot(steps, back(_smooth(there(values))), color=color, linewidth=1.8, label=label)


def _smooth(values: np.ndarray) -> np.ndarray:
    """The mean of values [n] around each: of a hundredth of all before it and as many after."""
    n, sums = len(values), np.cumsum(np.insert(values, 0, 0.0))
    places, half = np.arange(n), max(3, n // 100)
    first, end = np.maximum(places - half, 0), np.minimum(places + half + 1, n)
    return (sums[end] - sums[first]) / (end - first)


def _scale(axis, values: Sequence[np.ndarray]) -> None:
    """Logarithmic where the values reach over more than a factor of five."""
    low, high = (end(map(end, values)) for end in (min, max))
    if not 0 < 5 * low < high:
        return
    axis.set_yscale("log")
    few = high < 50 * low
    axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5) if few else (1,)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def _threshold(name: str) -> float:
    return float(name.rpartition("_")[2])


def _plain(axis, last: float) -> None:
    axis.set_xlim(0, max(last, 1) * 1.02)
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_xlabel("step", fontsize=9)
    axis.grid(color="#e3e7eb")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _title(axis, text: str) -> None:
    axis.set_title(text, fontsize=11, loc="left")
