"""Mixing, from checkpoints on disk to one checkpoint on disk.

Everything that can be known from headers is checked before any array is read, and the output
appears whole or not at all.
"""

import dataclasses
import importlib.metadata
import math
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from policymix import files, memory, metrics, trees
from policymix.checkpoints import assets, provenance, store, streaming
from policymix.data import validation as validation_lib
from policymix.mixing import rules, search
from policymix.reports import mixes
from policymix.runs import inputs as inputs_lib
from policymix.runs import judge as judge_lib
from policymix.runs import policies

CLOSED_FORM = ("average", "manual", "interpolate")
BY_LOSS = ("inverse_loss", "greedy", "gradient_descent", "adaptive_gradient_descent")
METHODS = CLOSED_FORM + BY_LOSS


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asks for; empty fields fall back to the config."""

    checkpoints: tuple[str, ...]
    output: pathlib.Path
    method: str = ""
    coefficients: tuple[float, ...] = ()
    base: str = ""
    merge_ratios: tuple[float, ...] = ()
    validation: str = ""
    overwrite: bool = False
    dry_run: bool = False


def mix(config: ml_collections.ConfigDict, request: Request) -> dict[str, Any]:
    """Mixes checkpoints into `request.output` and returns what its mix.json says.

    Raises:
      ValueError, OSError, FloatingPointError: bad input; one clear message, and no output.
    """
    started = time.monotonic()
    method = _method(config, request)
    base = _base(config, request, method)
    _check_output(config, request, base)
    inputs = inputs_lib.open_inputs(
        request.checkpoints, base=base, base_is_mixed=method == "interpolate"
    )
    # What differs, and a misspelt dtype, are told before the work.
    _norm_stats(config, inputs, _given(request, method, len(inputs.names)))
    inputs.dtypes(config.mix.dtype, of_base=False)
    judge = _judge(config, request, inputs)
    _print_plan(request, method, inputs, judge)
    if request.dry_run:
        print("dry run: nothing was computed, nothing was written")
        return {}

    files.check_space(request.output, max(len(request.merge_ratios), 1) * inputs.nbytes)
    losses = judge.each(inputs.names) if judge else [None] * len(inputs.names)
    found = _search(config, request, method, inputs, judge, losses)
    told = _describe(config, method, inputs, judge, losses)
    with files.whole_directory(request.output, overwrite=request.overwrite) as partial:
        if len(request.merge_ratios) > 1:
            report = _write_sweep(config, request, inputs, judge, told, partial)
        else:
            told["history"] = [_jsonable(row) for row in found.history]
            if method == "interpolate":
                told["merge_ratio"] = float(found.coefficients[0])
            report = _write(config, inputs, found.coefficients, judge, told, partial)
        report["seconds"] = time.monotonic() - started
        report["peak_memory_bytes"] = memory.peak_bytes()
        files.write_json(partial / "mix.json", report)
    print(mixes.table(report))
    print(f"written to {request.output}")
    return report


def _check_output(config: ml_collections.ConfigDict, request: Request, base: str) -> None:
    """The output may be written, replaces nothing but another mix, and touches no input."""
    rule = config.mix.norm_stats
    named = (*request.checkpoints, base, request.validation, rule)
    files.check_apart(
        request.output, [p for p in named if p and "://" not in p and pathlib.Path(p).exists()]
    )
    files.check_output(request.output, overwrite=request.overwrite, ours=_is_mix)


def _is_mix(path: pathlib.Path) -> bool:
    """Whether a mix wrote this directory; an empty one is as good."""
    if not path.is_dir() or not any(path.iterdir()):
        return path.is_dir()
    told = path / "mix.json"
    return told.is_file() and "policymix" in files.read_json(told)


def _given(request: Request, method: str, n: int) -> np.ndarray:
    """The coefficients as far as they are known before the search."""
    if method == "manual":
        c = rules.normalize(request.coefficients)
        return np.concatenate([np.zeros(n - len(c)), c])
    if method == "interpolate" and request.merge_ratios:
        return np.array([request.merge_ratios[0], 1 - request.merge_ratios[0]])
    return rules.uniform(n)


def _describe(config, method: str, inputs: inputs_lib.Inputs, judge, losses) -> dict[str, Any]:
    """What mix.json says whatever comes of the search."""
    return {
        "version": 1,
        "policymix": importlib.metadata.version("policymix"),
        "jax": jax.__version__,
        "method": method,
        "settings": _settings(config, method),
        "inputs": [
            provenance.describe(name) | {"loss": loss}
            for name, loss in zip(inputs.names, losses, strict=True)
        ],
        "base": inputs.base,
        "validation": judge.describe() if judge else None,
        "warnings": judge.warnings if judge else [],
        "history": [],
    }


def _method(config: ml_collections.ConfigDict, request: Request) -> str:
    """The method asked for, checked against the other flags."""
    method = request.method or config.mix.method
    if not method:
        method = "manual" if request.coefficients else "interpolate" if request.base else "average"
        if request.merge_ratios:
            method = "interpolate"
    n = len(request.checkpoints)
    if method not in METHODS:
        raise ValueError(f"--method {method!r}: expected one of {', '.join(METHODS)}")
    if not n:
        raise ValueError(
            "--checkpoints is empty: give the checkpoints to mix, as --checkpoints=a,b,c"
        )
    if (method == "manual") != bool(request.coefficients):
        raise ValueError(
            f"--coefficients goes with --method=manual, and manual needs it; the method is {method}"
        )
    if method == "manual":
        if len(request.coefficients) != n:
            raise ValueError(
                f"{n} checkpoints need {n} coefficients, --coefficients has "
                f"{len(request.coefficients)}"
            )
        rules.normalize(request.coefficients)
    if method == "interpolate":
        if n != 1:
            raise ValueError(
                f"interpolate takes one fine-tuned checkpoint and a base; --checkpoints has {n}"
            )
        if not all(math.isfinite(ratio) for ratio in request.merge_ratios):
            raise ValueError(f"--merge_ratio must be finite, got {list(request.merge_ratios)}")
        if len(set(request.merge_ratios)) < len(request.merge_ratios):
            raise ValueError(f"--merge_ratio names a ratio twice: {list(request.merge_ratios)}")
    elif request.merge_ratios:
        raise ValueError(f"--merge_ratio goes with --method=interpolate; the method is {method}")
    m = config.mix
    if m.num_iterations < 1 or not m.learning_rate > 0 or not math.isfinite(m.power):
        raise ValueError(
            "config.mix: num_iterations must be at least 1, learning_rate positive and power "
            f"finite, got {m.num_iterations}, {m.learning_rate} and {m.power}"
        )
    if method in BY_LOSS and not request.validation:
        raise ValueError(f"{method} needs validation batches: pass --validation=FILE.npz")
    return method


def _base(config: ml_collections.ConfigDict, request: Request, method: str) -> str:
    """The base's path; "" where there is none."""
    base = request.base or (config.train.init_from if method == "interpolate" else "")
    if method == "interpolate" and not base:
        raise ValueError(
            "interpolate needs a base: pass --base, or a --config whose train.init_from names it"
        )
    return base


def _norm_stats(config: ml_collections.ConfigDict, inputs: inputs_lib.Inputs, coefficients):
    return inputs.norm_stats(config.mix.norm_stats, coefficients, config.data.asset_id)


def _judge(
    config: ml_collections.ConfigDict, request: Request, inputs: inputs_lib.Inputs
) -> judge_lib.Judge | None:
    """What measures losses, where there is validation data."""
    if not request.validation:
        return None
    model = policies.model_config(config, why=f"a loss on {request.validation}")
    path = pathlib.Path(request.validation)
    held_out = config.mix.held_out
    if not 0 <= held_out < 1:
        raise ValueError(
            f"config.mix.held_out is {held_out}; expected a fraction of at least 0 and below 1"
        )
    judge = judge_lib.Judge(model, path, validation_lib.load(path, held_out), config.mix.seed)
    judge.check(inputs.names[0], inputs.headers[0])
    judge.warnings += provenance.leaks(inputs.names, judge.validation.meta)
    judge.warnings += judge.normalised_otherwise([inputs.names[k] for k in inputs.mixed])
    return judge


def _search(config, request, method, inputs, judge, losses) -> search.SearchResult:
    """The coefficients in the order of `inputs`; 0 for a base that is not mixed."""
    n = len(request.checkpoints)
    if method == "interpolate":
        ratio = request.merge_ratios[0] if request.merge_ratios else 0.5
        return search.SearchResult(np.array([ratio, 1 - ratio]), math.nan, [])
    skipped = len(inputs.names) - n
    selection = np.array([loss["selection"] for loss in losses[skipped:]]) if judge else None
    if method == "average":
        found = search.SearchResult(rules.uniform(n), math.nan, [])
    elif method == "manual":
        found = search.SearchResult(rules.normalize(request.coefficients), math.nan, [])
    elif method == "inverse_loss":
        found = search.SearchResult(rules.inverse_loss(selection, config.mix.power), math.nan, [])
    else:
        params = [inputs.load(row) for row in inputs.mixed]
        objective = judge.objective(params)
        if method == "greedy":

            def show(row):
                print(f"greedy: {row['chosen']} has loss {row['loss']:.5f}")

            found = search.greedy(
                objective, n, losses=selection, observe=show, clock=time.monotonic
            )
        else:
            with metrics.Progress(method, config.mix.num_iterations) as shown:
                found = search.gradient_descent(
                    objective,
                    n,
                    learning_rate=config.mix.learning_rate,
                    num_iterations=config.mix.num_iterations,
                    adaptive=method == "adaptive_gradient_descent",
                    observe=lambda row: row["batch"] is None or shown.step(),
                    clock=time.monotonic,
                )
    return found._replace(coefficients=np.concatenate([np.zeros(skipped), found.coefficients]))


def _write(
    config: ml_collections.ConfigDict,
    inputs: inputs_lib.Inputs,
    coefficients: np.ndarray,
    judge: judge_lib.Judge | None,
    told: Mapping[str, Any],
    directory: pathlib.Path,
) -> dict[str, Any]:
    """Mixes into a directory in the making; returns `told` and what only the mix can tell."""
    mixed = streaming.combine(
        inputs.headers,
        coefficients,
        inputs.names,
        dtype=inputs.dtypes(config.mix.dtype, of_base=told["method"] == "interpolate"),
        progress=lambda paths: metrics.progress(paths, "mixing"),
    )
    asset_id, norm_stats = _norm_stats(config, inputs, coefficients) or (None, None)
    store.write_step(mixed.params, directory / "0", norm_stats, asset_id)
    if norm_stats is not None:
        assets.write_norm_stats(directory / assets.NORM_STATS, norm_stats)
    trainings = [t for k in inputs.mixed for t in assets.trainings_of(inputs.names[k])]
    if trainings:
        folder = directory / "0" / "assets" / (asset_id or "mixed")
        assets.write_episodes(folder / assets.EPISODES, trainings)
    report = dict(told) | {
        "coefficients": np.asarray(coefficients).tolist(),
        "loss": judge.losses("the mix", mixed.params) if judge else None,
        "norm_stats": config.mix.norm_stats if norm_stats is not None else None,
        "dtypes": _count([str(leaf.dtype) for leaf in jax.tree.leaves(mixed.params)]),
        "num_params": trees.num_params(mixed.params),
        "geometry": provenance.geometry(mixed.gram, mixed.square_norm, base=inputs.base),
    }
    mixes.draw(report, directory / "mix.png")
    return report


def _write_sweep(config, request, inputs, judge, told, directory: pathlib.Path) -> dict[str, Any]:
    """One mix per merge ratio, each a directory like any other mix; returns the account of all."""
    sweep = []
    for ratio in request.merge_ratios:
        name = f"merge_ratio={ratio:g}"
        one = told | {"merge_ratio": ratio}
        one = _write(config, inputs, np.array([ratio, 1 - ratio]), judge, one, directory / name)
        files.write_json(directory / name / "mix.json", one)
        sweep.append({"merge_ratio": ratio, "output": name, "coefficients": one["coefficients"]})
        sweep[-1]["loss"] = one["loss"]
    common = {key: one[key] for key in ("norm_stats", "dtypes", "num_params", "geometry")}
    report = dict(told) | common | {"sweep": sweep}
    mixes.draw_sweep(report, directory / "mix.png")
    return report


def _settings(config: ml_collections.ConfigDict, method: str) -> dict[str, Any]:
    """The fields of config.mix that this method reads."""
    used = {
        "inverse_loss": ("power",),
        "gradient_descent": ("learning_rate", "num_iterations"),
        "adaptive_gradient_descent": ("learning_rate", "num_iterations"),
    }
    names = (*used.get(method, ()), "held_out", "seed", "norm_stats", "dtype")
    return {name: config.mix[name] for name in names}


def _print_plan(
    request: Request, method: str, inputs: inputs_lib.Inputs, judge: judge_lib.Judge | None
) -> None:
    devices = jax.devices()
    print(f"method {method} on {len(devices)} × {devices[0].device_kind} ({devices[0].platform})")
    for line in inputs.summary():
        print(f"  {line}")
    if judge:
        print(f"  {judge.summary()}")
        for warning in judge.warnings:
            print(f"  WARNING: {warning}")
    print(f"  output {request.output}")


def _count(names: Sequence[str]) -> dict[str, int]:
    return {name: names.count(name) for name in sorted(set(names))}


def _jsonable(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a search's history in JSON's words."""
    return {
        key: np.asarray(v).tolist() if isinstance(v, np.ndarray | jax.Array) else v
        for key, v in row.items()
    }
