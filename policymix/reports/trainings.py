"""What people look at while a policy trains and after: curves, how fast it goes, its settings."""

import contextlib
import datetime
import importlib.metadata
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import matplotlib.ticker
import numpy as np

from policymix import files, metrics, trees
from policymix.reports import pages

_TRAIN, _HELD_OUT, _PLAIN, _FAINT = "#2f4b7c", "#d1495b", "#2a8f72", "#b7c4d8"
_SHADES = ("#142d55", "#255f9e", "#3a8fc4", "#2f9e8f", "#7a9a2e")  # strict to lenient
_LEGEND = {"edgecolor": "none", "framealpha": 0.85}  # lines pass behind it
_SMOOTHED = 60  # points from which on a running mean is easier to read
_DATE = "%Y-%m-%d %H:%M %Z"
_HELD = "held_out/"
_SUCCESS, _SCORE = "rollout/success", "rollout/score"
_TIMED = ("samples_per_second", "steps_per_second", "data_wait")

Curve = tuple[np.ndarray, np.ndarray]  # steps [n], values [n]


def write_page(workdir: pathlib.Path, path: pathlib.Path | None = None) -> None:
    """report.html of a run, from its metrics.jsonl and config.json, as far as it has come.

    Args:
      path: of the page; WORKDIR/report.html unless given.

    Raises:
      OSError: there is no metrics.jsonl, or a disk is full.
    """
    rows = list(metrics.read(workdir / metrics.FILE))
    settings, wrong = _settings(workdir)
    curves = _curves(rows)
    result = [pages.paragraph(text) for text in _headline(curves, settings)]
    result.append(pages.paragraph(_circumstances(workdir, rows), dim=True))
    if figure := _figure(curves):
        result.append(pages.picture(pages.png(figure), "Curves of what was measured, by step"))
    sections = [("", result)]
    if rows:
        sections.append(("In numbers", _numbers(rows, curves)))
    if settings or wrong:
        told = _settings_table(settings) if settings else pages.paragraph(wrong)
        sections.append(("Settings", [told]))
    page = pages.page(f"Training {workdir.name}", sections)
    files.write_whole(path or workdir / "report.html", page.encode("utf-8", "replace"))


def _settings(workdir: pathlib.Path) -> tuple[dict[str, Any], str]:
    """{"train.seed": 42} of the run's config.json, {} if there is none; what is wrong with it."""
    path = workdir / "config.json"
    try:
        record = files.read_json(path)
    except (OSError, ValueError) as error:
        return {}, "" if isinstance(error, FileNotFoundError) else str(error)
    if not isinstance(record, Mapping):
        return {}, f"{path} holds no settings."
    return {path.replace("/", "."): value for path, value in trees.flatten(record).items()}, ""


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """What was measured, by name; null, which is no number, is left out, and so is the first speed
    after each start, which has compiling in it.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    first = set(_TIMED)
    for row in rows:
        if "resumed" in row:
            first = set(_TIMED)
        for name in row.keys() - {"step"}:
            if name in first:
                first.remove(name)
            elif isinstance(row[name], int | float):
                found.setdefault(name, []).append((row["step"], row[name]))
    if found.get("memory_bytes") == found.get("host_memory_bytes"):
        found.pop("memory_bytes", None)  # devices without a memory of their own are told the host's
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
    total = total if type(total) is int else None  # people edit the file
    done = f"Step {last:,}" + (f" of {total:,}" if total else "")
    if "loss" in curves:
        done += f", loss {_number(curves['loss'][1][-1])}"
    if "learning_rate" in curves:
        done += f", learning rate {curves['learning_rate'][1][-1]:.3g}"
    if total and last < total and "eta_seconds" in curves:
        done += f". {metrics.span(curves['eta_seconds'][1][-1])} were left when this was written"
    told.append(f"{done}.")
    told.append(_best(curves, f"{_HELD}loss", "The lowest held-out loss", np.argmin))
    told.append(_success(curves))
    return list(filter(None, told))


def _circumstances(workdir: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """When, by the times of the run's files; how long; by which version."""
    told, paths = [], [workdir / "config.json", workdir / metrics.FILE]
    times = [path.stat().st_mtime if path.exists() else math.inf for path in paths]
    # Every start writes config.json; one that is newer than all metrics was edited or copied since.
    if times[0] <= times[1]:
        begun, written = (datetime.datetime.fromtimestamp(when).astimezone() for when in times)
        told.append(f"Last begun {begun:{_DATE}}, last written {written:{_DATE}}.")
    seconds = step = 0
    for row in rows:
        step = max(step, row.get("resumed", 0))
        if speed := row.get("steps_per_second"):
            seconds, step = seconds + (row["step"] - step) / speed, row["step"]
    if seconds:
        told.append(f"The steps took {metrics.span(seconds)}, saving and evaluating aside.")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # run from its source
        told.append(f"Drawn by policymix {importlib.metadata.version('policymix')}.")
    return " ".join(told)


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
            level = name in (*_TIMED, "grad_norm")  # the middle of a trend says nothing
            usual = _number(np.median(curves[name][1]) / unit) if level else ""
            running.append([what, _number(curves[name][1][-1] / unit), usual])
    for name, what in _judged(curves).items():
        steps, values = curves[name]
        best = int(np.argmin(values) if name.endswith(("loss", "l1")) else np.argmax(values))
        cells = [_judgement(curves, name, place) for place in (-1, best)]
        judged.append([what, *cells, f"{int(steps[best]):,}"])
    if running:
        parts.append(pages.table(running, ["", "last", "usual"]))
    if judged:
        parts.append(pages.table(judged, ["", "last", "best", "at step"]))
    if "resumed" in curves:
        steps = ", ".join(f"{int(step):,}" for step in curves["resumed"][1])
        told = f"The run was taken up again after step {steps}: the dotted lines."
        parts.append(pages.paragraph(told, dim=True))
    return parts


def _judged(curves: Mapping[str, Curve]) -> dict[str, str]:
    """What says how good the policy is, and what it is called."""
    below = "held-out actions with all errors below"
    called = {
        f"{_HELD}loss": "held-out loss",
        f"{_HELD}l1": "held-out error of a number, mean",
        **{name: f"{below} {_threshold(name):g}, %" for name in _accuracies(curves)},
        _SUCCESS: "success in the simulator, %",
        _SCORE: "mean score in the simulator, %",
    }
    return {name: what for name, what in called.items() if name in curves}


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
    found = {(row["step"], name) for row in rows for name, value in row.items() if value is None}
    if not found:
        return ""
    step, name = min(found)
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
    lists = {name: ", ".join(map(str, v)) for name, v in said.items() if isinstance(v, list)}
    return pages.table([[name, str((said | lists)[name])] for name in names], ["", ""])


# --- picture


def _figure(curves: Mapping[str, Curve]) -> matplotlib.figure.Figure | None:
    """A panel for each thing that was measured, two in a row; the first is wide if they are odd."""
    panels = [(draw, names) for draw, names in _PANELS if any(map(curves.__contains__, names))]
    if accuracies := _accuracies(curves):
        panels.insert(1, (_draw_accuracies, accuracies))
    if not panels:
        return None
    wide = len(panels) % 2
    lines = (len(panels) + wide) // 2
    figure = matplotlib.figure.Figure(figsize=(12, 3.1 * lines), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    grid = figure.add_gridspec(lines, 2)
    last = max(steps[-1] for steps, _ in curves.values())
    for place, (draw, names) in enumerate(panels, start=wide):
        axis = figure.add_subplot(grid[0, :] if place == wide == 1 else grid[divmod(place, 2)])
        axis.set_title(draw(axis, curves, names), fontsize=11, loc="left")
        axis.set_xlim(0, max(last, 1) * 1.02)
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.set_xlabel("step", fontsize=9)
        axis.grid(color="#e3e7eb")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        for step in curves.get("resumed", ((), ()))[1]:
            axis.axvline(step, color="#76808b", linewidth=1, linestyle=":", zorder=1)
    return figure


def _accuracies(curves: Mapping[str, Curve]) -> list[str]:
    return sorted((n for n in curves if n.startswith(f"{_HELD}accuracy_")), key=_threshold)


def _draw_loss(axis, curves: Mapping[str, Curve], names: Sequence[str]) -> str:
    train, held_out = names
    if train in curves:
        _draw_smoothed(axis, curves[train], _TRAIN, label="training")
    if held_out in curves:
        steps, values = curves[held_out]
        axis.plot(steps, values, "o-", color=_HELD_OUT, markersize=4, label="held out", zorder=3)
    _scale(axis, [curves[name][1] for name in names if name in curves])
    axis.legend(**_LEGEND)
    return "flow-matching loss"


def _draw_gradient(axis, curves: Mapping[str, Curve], names: Sequence[str]) -> str:
    curve = curves[names[0]]
    # Smoothed as it is shown, so that a spike stays one.
    scale = (np.log, np.exp) if (curve[1] > 0).all() else None
    _draw_smoothed(axis, curve, _PLAIN, scale=scale)
    _scale(axis, [curve[1]])
    return "gradient norm, before clipping"


def _draw_rate(axis, curves: Mapping[str, Curve], names: Sequence[str]) -> str:
    steps, values = curves[names[0]]
    power = math.floor(math.log10(values.max() or 1))
    power = power if power < -2 else 0
    style = "o-" if len(steps) < _SMOOTHED else "-"
    axis.plot(steps, values / 10.0**power, style, color=_PLAIN, markersize=3)
    axis.set_ylim(0, max(1.08 * values.max() / 10.0**power, 1e-9))
    return f"learning rate, in $10^{{{power}}}$" if power else "learning rate"


def _draw_speed(axis, curves: Mapping[str, Curve], names: Sequence[str]) -> str:
    what, unit = _FACTS[names[0]]
    steps, values = curves[names[0]]
    _draw_smoothed(axis, (steps, values / unit), _PLAIN)
    axis.set_ylim(0, max(1.08 * values.max() / unit, 5 if "data_wait" in names else 1e-9))
    return what


def _draw_accuracies(axis, curves: Mapping[str, Curve], names: Sequence[str]) -> str:
    for name, color in zip(names, _SHADES * len(names), strict=False):
        steps, values = curves[name]
        label = f"{_threshold(name):g}"
        axis.plot(steps, 100 * values, "o-", color=color, markersize=4, label=label)
    # Room for the legend; less than a fifth, so that no tick stands above 100 %.
    axis.set_ylim(0, max(118 * max(curves[name][1].max() for name in names), 1))
    axis.legend(fontsize=8, loc="upper left", ncols=len(names), handlelength=1.2, **_LEGEND)
    return "held-out actions with all errors below a threshold, %"


def _draw_success(axis, curves: Mapping[str, Curve], names: Sequence[str]) -> str:
    told = {_SUCCESS: ("success", _TRAIN), _SCORE: ("mean score", _HELD_OUT)}
    aside = 0.004 * max(steps[-1] for steps, _ in curves.values())  # whiskers side by side
    for number, name in enumerate(filter(curves.__contains__, names)):
        steps, values = curves[name]
        steps, (label, color) = steps - aside * number, told[name]
        interval = _interval(curves, name)
        whiskers = None if interval is None else 100 * np.abs(interval - values)
        label += "" if interval is None else ", 95 % intervals"
        axis.errorbar(steps, 100 * values, whiskers, fmt="o-", color=color, capsize=3, label=label)
    axis.set_ylim(-3, 103)
    axis.legend(**_LEGEND)
    return "roll-outs in the simulator, %"


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
    # The fewest digits that label four places.
    decades = 10.0 ** np.arange(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7)):
        ticks = np.outer(decades, digits)
        if np.sum((low <= ticks) & (ticks <= high)) >= 4:
            break
    axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=digits))
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def _threshold(name: str) -> float:
    return float(name.rpartition("_")[2])
