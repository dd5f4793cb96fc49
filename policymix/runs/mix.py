"""Mixing, from checkpoints on disk to one checkpoint on disk.

Everything that can be known from headers is checked before any array is read, and the output
appears whole or not at all.
"""

import dataclasses
import importlib.metadata
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from policymix import files, hub, memory, metrics, trees
from policymix.checkpoints import assets, blocks, layout, provenance, store, streaming
from policymix.data import validation as validation_lib
from policymix.models import pi0, recognize
from policymix.reports import mixes, tables
from policymix.runs import advice, landscapes, metadata, policies, repeats, requests, searches
from policymix.runs import inputs as inputs_lib
from policymix.runs import judge as judge_lib
from policymix.runs.policy_files import PolicyFiles
from policymix.runs.requests import Request
from policymix.transforms import normalize


def mix(config: ml_collections.ConfigDict, request: Request) -> dict[str, Any]:
    """Mixes checkpoints into `request.output` and returns what its mix.json says.

    Raises:
      ValueError, OSError, FloatingPointError: bad input; one clear message, and no output.
    """
    started = time.monotonic()
    blocks.run_inline()
    request = dataclasses.replace(request, checkpoints=layout.expand(request.checkpoints))
    repeat = None
    if request.repeat:
        config, request, repeat = repeats.read(config, request)
    _check_has_loss(config, request)
    config = metadata.complete(config, checkpoints=request.checkpoints)
    method = repeat.method if repeat else requests.method_of(config, request)
    base = _base(config, request, method)
    _check_output(config, request, base)
    inputs = inputs_lib.open_inputs(
        request.checkpoints,
        base=base,
        base_is_mixed=method == "interpolate",
        wanted=request.format,
        model=policies.optional_model(config),
    )
    task = Task(config, request, method, inputs, _judge(config, request, inputs), repeat)
    task.check()
    _print_plan(task)
    if request.dry_run:
        print("dry run: nothing was computed, nothing was written")
        return {}

    if inputs.output.format != "orbax":  # blocks of one size come and go
        memory.keep_freed()
    num_mixes = len(request.ratios) if method == "interpolate" and not repeat else 1
    files.check_space(request.output, num_mixes * inputs.nbytes)
    told = _describe(task)
    with files.whole_directory(request.output, overwrite=request.overwrite) as partial:
        if num_mixes > 1:
            report = _write_sweep(task, told, partial)
        else:
            found = searches.search_for(task, [entry["loss"] for entry in told["inputs"]])
            told["history"] = [_jsonable(row, task.groups) for row in found.history]
            if method == "interpolate" and not repeat:
                told["merge_ratio"] = request.ratios[0]
            report = _write(task, found.coefficients, told, partial)
        if request.landscape:
            report["landscape"] = _landscape(task, report, partial / "landscape.png")
        inputs.check_unchanged()
        report["seconds"] = time.monotonic() - started
        report["peak_memory_bytes"] = memory.peak_bytes()
        files.write_json(partial / "mix.json", report)
    print(mixes.table(report))
    print(f"written to {request.output}")
    return report


@dataclasses.dataclass(frozen=True)
class Task:
    """A mix that was asked for, and what it is made of.

    Attributes:
      method: one of `requests.METHODS`; judge: what measures losses, where there is data for it.
      repeat: the mix that is made again, if that was asked.
    """

    config: ml_collections.ConfigDict
    request: Request
    method: str
    inputs: inputs_lib.Inputs
    judge: judge_lib.Judge | None
    repeat: repeats.Repeat | None = None

    @property
    def groups(self) -> dict[str, str]:
        """{name: path regex} of the groups that have coefficients of their own."""
        return requests.groups(self.config)

    def check(self) -> None:
        """What differs, a misspelt dtype, and groups that match nothing are told before the work.

        The coefficients are taken as far as they are known before the search.
        """
        n = len(self.inputs.names)
        given: Any = np.full(n, 1 / n)
        if self.repeat:
            given = self.repeat.coefficients
        elif self.method == "manual":
            given = searches.with_base(requests.manual(self.request, self.groups), self.inputs)
        elif self.method == "interpolate":
            num_finetuned = n - 1
            given = requests.interpolated(self.request.ratios[0], num_finetuned, self.groups)
        elif self.groups:
            given = dict.fromkeys(self.groups.values(), given)
        stats, dtypes = self.norm_stats(given), self.dtypes()
        beside = self.beside(stats[1] if stats else None, dtypes)
        if beside.needed and beside.model is not None:
            shapes = pi0.shapes(beside.model.without_lora())
            recognize.check(shapes, self.inputs.tree(0), self.inputs.names[0])
        beside.check()
        if self.request.landscape and self.judge is None:
            raise ValueError("--landscape needs validation batches: pass --validation=FILE.npz")
        if self.request.landscape:
            landscapes.check(len(self.inputs.mixed))

    def dtypes(self) -> dict[str, np.dtype]:
        """The mix's dtype, by path."""
        of_base = self.method == "interpolate"
        return self.inputs.dtypes(self.config.mix.dtype, of_base=of_base)

    def beside(self, stats: normalize.Stats | None, dtypes: Mapping[str, np.dtype]) -> PolicyFiles:
        """The small files beside the mix."""
        config, kinds = self.config, {str(dtype) for dtype in dtypes.values()}
        model = policies.optional_model(config)
        return PolicyFiles(self.inputs.output, model, config.data, stats, kinds)

    def norm_stats(self, coefficients) -> tuple[str, Any] | None:
        """(asset id, the mix's normalisation); None where the inputs have none."""
        paths = list(self.inputs.leaves[0])
        by_path = trees.coefficients_by_path(coefficients, paths, len(self.inputs.names))
        return self.inputs.norm_stats(
            self.config.mix.norm_stats,
            self.inputs.mean_coefficients(by_path),
            self.config.data.asset_id,
        )


def _base(config: ml_collections.ConfigDict, request: Request, method: str) -> str:
    """The base's path; "" where there is none."""
    base = request.base or (config.train.init_from if method == "interpolate" else "")
    if method == "interpolate" and not base:
        raise ValueError(
            "interpolate needs a base: pass --base, or a --config whose train.init_from names it"
        )
    return base


def _check_has_loss(config: ml_collections.ConfigDict, request: Request) -> None:
    """ValueError where chunk-level learners are to be judged by a loss."""
    by_loss = (request.method or config.mix.method) in requests.BY_LOSS
    if not (by_loss or request.validation or request.landscape) or not request.checkpoints:
        return
    first = request.checkpoints[0]
    if hub.is_remote(first) or not files.local(first).exists():  # flags are checked first
        return
    if recognize.is_chunk_level(store.open_checkpoint(first).leaves):
        raise ValueError(
            f"{first} is a chunk-level learner, which has no validation loss here: mix with "
            "average, manual or interpolate, without --validation, and judge mixes by evaluate.py"
        )


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
    if not (path / "mix.json").is_file():
        return False
    told = files.read_json(path / "mix.json")
    return isinstance(told, dict) and "policymix" in told


def _judge(
    config: ml_collections.ConfigDict, request: Request, inputs: inputs_lib.Inputs
) -> judge_lib.Judge | None:
    """What measures losses, where there is validation data."""
    if not request.validation:
        return None
    model = policies.model_config(config, why=f"a loss on {request.validation}").without_lora()
    path = pathlib.Path(request.validation)
    held_out = config.mix.held_out
    if not 0 <= held_out < 1:
        raise ValueError(
            f"config.mix.held_out is {held_out}; expected a fraction of at least 0 and below 1"
        )
    validation = validation_lib.load(path, held_out)
    m = config.mix
    judge = judge_lib.Judge(model, path, validation, m.seed, m.fsdp_devices)
    judge.check(inputs.names[0], inputs.tree(0))
    judge.warnings += provenance.leaks(inputs.names, judge.validation.meta)
    judge.warnings += judge.normalised_otherwise([inputs.names[k] for k in inputs.mixed])
    return judge


def _describe(task: Task) -> dict[str, Any]:
    """What mix.json says whatever comes of the search; measures the inputs' losses."""
    inputs, judge = task.inputs, task.judge
    losses = judge.each(inputs) if judge else [None] * len(inputs.names)
    entries = zip(inputs.checkpoints, inputs.fingerprints, losses, strict=True)
    return {
        "version": 1,
        "policymix": importlib.metadata.version("policymix"),
        "jax": jax.__version__,
        "method": task.method,
        "settings": _settings(task.config, task.method),
        "groups": task.groups or None,
        "inputs": [
            {
                "path": one.name if hub.is_remote(one.name) else str(files.local(one.name)),
                "fingerprint": fingerprint,
                "format": one.format,
                "loss": loss,
            }
            for one, fingerprint, loss in entries
        ],
        "base": inputs.base,
        "format": inputs.output.format,
        "validation": judge.describe() if judge else None,
        "warnings": judge.warnings if judge else [],
        "history": [],
    }


def _write(
    task: Task, coefficients: Any, told: Mapping[str, Any], directory: pathlib.Path
) -> dict[str, Any]:
    """Mixes into a directory in the making; returns `told` and what only the mix can tell."""
    inputs, output = task.inputs, task.inputs.output
    dtypes = task.dtypes()
    shapes = {path: (leaf.shape, dtypes[path]) for path, leaf in inputs.leaves[0].items()}
    stats = task.norm_stats(coefficients)
    directory.mkdir(exist_ok=True)
    with output.sink(directory, shapes) as sink:
        total = sum(leaf.size for leaf in inputs.leaves[0].values())
        with metrics.Progress("mixing", total, lines=5) as shown:
            geometry = streaming.mix(
                inputs.leaves, coefficients, inputs.names, sink, dtypes, progress=shown.step
            )
        output.finish(directory, sink, list(shapes), stats)
    task.beside(stats[1] if stats else None, dtypes).write(directory)
    _write_trainings(task, output.assets(directory), stats[0] if stats else "mixed")
    report = dict(told) | {
        "coefficients": requests.named_coefficients(coefficients, task.groups),
        "loss": None,
        "norm_stats": task.config.mix.norm_stats if stats else None,
        "dtypes": _count([str(dtype) for _, dtype in shapes.values()]),
        "num_params": total,
        "geometry": provenance.geometry(geometry.gram, geometry.square_norm, base=inputs.base),
    }
    if task.judge:
        written = store.open_params(output.params(directory), inputs.siglip_heads)
        report["loss"] = task.judge.losses("the mix", written)
    report["advice"] = advice.of(report, _examples(task))
    mixes.draw(report, directory / "mix.png")
    return report


def _examples(task: Task) -> dict[str, np.ndarray] | None:
    """The held-out loss of each example, by input and for the mix; None without a judge."""
    if task.judge is None:
        return None
    names = [*map(str, range(len(task.inputs.names))), "the mix"]
    keys = (*task.inputs.names, "the mix")
    return {n: task.judge.examples[key, "held_out"] for n, key in zip(names, keys, strict=True)}


def _landscape(task: Task, report: dict[str, Any], path: pathlib.Path) -> dict[str, Any]:
    rows = list(task.inputs.mixed)
    names = tables.labels([task.inputs.names[row] for row in rows])
    written = [one["coefficients"] for one in report.get("sweep", [report])]
    chosen = [np.asarray(c)[rows] for c in written if not isinstance(c, Mapping)]
    objective = task.judge.objective(task.inputs, task.config.mix)
    return landscapes.draw(objective, names, chosen, path)


def _write_trainings(task: Task, folder: pathlib.Path, asset_id: str) -> None:
    """The mix inherits what its inputs were trained on."""
    names = [task.inputs.names[k] for k in task.inputs.mixed]
    if trainings := [t for name in names for t in assets.trainings_of(name)]:
        assets.write_episodes(folder / asset_id / assets.EPISODES, trainings)


def _write_sweep(task: Task, told: Mapping[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """One mix per merge ratio, each a directory like any other mix; returns the account of all."""
    sweep, num_finetuned = [], len(task.inputs.names) - 1
    for ratio in task.request.ratios:
        name = f"merge_ratio={ratio:g}"
        coefficients = requests.interpolated(ratio, num_finetuned, task.groups)
        one = _write(task, coefficients, told | {"merge_ratio": ratio}, directory / name)
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
    settings = {name: config.mix[name] for name in names}
    if settings["norm_stats"] not in inputs_lib.NORM_STATS:
        settings["norm_stats"] = str(files.local(settings["norm_stats"]))
    return settings | {"asset_id": config.data.asset_id or ""}


def _print_plan(task: Task) -> None:
    devices = jax.devices()
    print(f"method {task.method} on {len(devices)} × {devices[0].device_kind}", end=" ")
    print(f"({devices[0].platform})")
    for line in task.inputs.summary():
        print(f"  {line}")
    if task.groups:
        rules = [(regex, name) for name, regex in task.groups.items()]
        named = list(trees.match(rules, list(task.inputs.leaves[0]), what="groups").values())
        counts = ", ".join(f"{name} {named.count(name)}" for name in task.groups)
        print(f"  arrays in groups: {counts}")
    if task.judge:
        print(f"  {task.judge.summary()}")
        for warning in task.judge.warnings:
            print(f"  WARNING: {warning}")
    output = task.inputs.output
    print(f"  output {task.request.output} ({output.format})")
    if lacking := task.beside(None, task.dtypes()).note():
        print(f"  {lacking}")


def _count(names: Sequence[str]) -> dict[str, int]:
    return {name: names.count(name) for name in sorted(set(names))}


def _jsonable(row: Mapping[str, Any], groups: Mapping[str, str]) -> dict[str, Any]:
    """A row of a search's history in JSON's words."""

    def plain(value):
        return np.asarray(value).tolist() if isinstance(value, np.ndarray | jax.Array) else value

    c = {"coefficients": requests.named_coefficients(row["coefficients"], groups)}
    return {key: plain(value) for key, value in row.items()} | c
