"""From a simulator's demonstrations to a mixed policy, and whether it is better: two acts from one
base, each a row of calls that the mains make too.

*Soup*: demonstrations of a new task, split by episode; a fine-tune per split; every method of
mixing; roll-outs of each, beside models trained on all the demonstrations at once.
*RETAIN* (arXiv:2512.08333): a fine-tune on a task's narrow range of starts, interpolated with the
base; roll-outs inside that range, outside it, and on the base's own tasks, beside co-fine-tuning
and smaller learning rates.
"""

import functools
import os
import pathlib
import platform
import signal
from typing import Any

import jax
import ml_collections

from policymix import files, metrics, processes
from policymix.reports import quickstart as quickstart_reports
from policymix.runs import (
    collect_demos,
    dump_validation,
    evaluate,
    mix,
    split_dataset,
    stages,
    train,
)
from policymix.runs.stages import Stage
from policymix.sim import workers

_SEEDS = {"pretraining": 0, "soup": 100_000, "validation": 200_000, "narrow": 300_000}
_KINDS = ("base", "input", "mix", "control")
_METHODS = ("average", "inverse_loss", "gradient_descent", "adaptive_gradient_descent", "greedy")


class Quickstart:
    """The stages in order; `run` makes what is missing and returns the report.

    Args:
      config: a policy's, with a section `quickstart` that sizes the two acts.
      output: the directory for everything.
    """

    def __init__(self, config: ml_collections.ConfigDict, output: pathlib.Path):
        if "quickstart" not in config:
            raise ValueError(
                "this config has no section quickstart: use --config=configs/pi0_metaworld.py or "
                "configs/pi0_pusht.py:small"
            )
        self.config, self.q = config, config.quickstart
        self.output = files.local(output)
        self.splits = [f"split_{k}" for k in range(self.q.num_splits)]
        self.ratios = tuple(r for r in self.q.merge_ratios if 0 < r < 1)
        self._rates = {f"finetuned_{rate:g}": rate for rate in self.q.small_learning_rates}
        self._steps = {
            "base": self.q.pretraining_steps,
            **dict.fromkeys((*self.splits, "joint"), self.q.soup_steps),
            "joint_long": self.q.soup_steps * self.q.num_splits,
            **dict.fromkeys(("finetuned", "co_finetuned", *self._rates), self.q.narrow_steps),
        }
        self._pool: workers.Pool | None = None

    def run(self, *, fresh: bool = False) -> dict[str, Any]:
        """Makes every stage that is not there yet, or all of them if `fresh`, then the report."""
        done = stages.Stages(self.output, fresh=fresh)
        if not jax.config.jax_compilation_cache_dir:  # one process compiles what the others run
            jax.config.update("jax_compilation_cache_dir", str(self.output / "compiled"))
        try:
            done.run(self._plan())
        finally:
            if self._pool is not None:
                self._pool.close()
        report = self._report(done.told)
        files.write_json(self.output / "report.json", report)
        quickstart_reports.draw(report, self.output / "report.png")
        quickstart_reports.write_page(report, self.output / "report.html")
        print(f"\n{quickstart_reports.summary(report)}")
        print(f"\nreport: {self.output / 'report.html'} and report.png")
        return report

    def describe(self) -> str:
        """The plan, a line per stage."""
        return "\n".join(stage.name for stage in self._plan())

    def _plan(self) -> list[Stage]:
        """Every stage, in order."""
        q = self.q
        return [
            self._collect("pretraining", q.pretraining_env, q.pretraining_episodes),
            self._train("base", "pretraining"),
            self._collect("soup", q.soup_env, q.soup_episodes),
            self._collect("validation", q.soup_env, q.validation_episodes),
            self._collect("narrow", q.narrow_env, q.narrow_episodes),
            Stage("split", {"sort_by": q.sort_by, "num_splits": q.num_splits}, self._split),
            Stage("validation_batches", {"held_out": q.held_out}, self._dump),
            # The longest first, so that no lane has one left when the others are done.
            self._train("joint_long", "soup"),
            self._train("finetuned", "narrow"),
            self._train("co_finetuned", "narrow", "pretraining"),
            *(self._train(name, "narrow") for name in self._rates),
            *(self._train(name, name) for name in self.splits),
            self._train("joint", "soup"),
            *(self._mix(method) for method in (*_METHODS, "manual")),
            Stage("interpolate", {"merge_ratios": self.ratios}, self._interpolate),
            self._evaluate("soup", q.soup_env, self._soup_policies(), q.soup_rollouts),
            *(
                self._evaluate(suite.replace(" ", "_"), env, self._retain_policies(), n)
                for suite, env, n in self._suites()
            ),
        ]

    def _suites(self) -> list[tuple[str, str, int]]:
        """What act two measures: (name, env, episodes of each task)."""
        q = self.q
        return [
            ("in distribution", q.narrow_env, q.narrow_rollouts),
            ("out of distribution", q.shifted_env, q.shifted_rollouts),
            ("pretraining tasks", q.pretraining_env, q.pretraining_rollouts),
        ]

    # What the stages make, and where.

    def _demos(self, name: str) -> pathlib.Path:
        if name in self.splits:
            return self.output / "splits" / name
        return self.output / "demos" / name

    def _workdir(self, name: str) -> pathlib.Path:
        return self.output / "runs" / name

    def _checkpoint(self, name: str) -> str:
        return str(self._workdir(name) / str(self._steps[name]))

    def _mixed(self, method: str) -> str:
        return str(self.output / "mixes" / method)

    def _merged(self, ratio: float) -> str:
        folder = self.output / "mixes" / "interpolate"
        return str(folder if len(self.ratios) == 1 else folder / f"merge_ratio={ratio:g}")

    def _soup_policies(self) -> dict[str, str]:
        """{name in the report: its checkpoint}."""
        singles = ("base", *self.splits, "joint", "joint_long")
        mixes = {method: self._mixed(method) for method in (*_METHODS, "manual")}
        return {name: self._checkpoint(name) for name in singles} | mixes

    def _retain_policies(self) -> dict[str, str]:
        singles = ("base", "finetuned", "co_finetuned", *self._rates)
        merges = {f"merged_{ratio:g}": self._merged(ratio) for ratio in self.ratios}
        return {name: self._checkpoint(name) for name in singles} | merges

    # The stages.

    def _pool_of_environments(self) -> workers.Pool:
        if self._pool is None:
            count = self.config.evaluate.num_workers or processes.num_cores()
            self._pool = workers.Pool(count)
        return self._pool

    def _collect(self, name: str, env: str, num_episodes: int) -> Stage:
        settings = {"env": env, "num_episodes": num_episodes, "seed": _SEEDS[name]}
        settings["noise"] = self.q.noise

        def make():
            collect_demos.collect(
                output=self._demos(name),
                pool=self._pool_of_environments(),
                overwrite=True,
                **settings,
            )

        return Stage(f"demonstrations_{name}", settings, make)

    def _train(self, name: str, *demos: str) -> Stage:
        """The base, or one of those that start from it, which do not need each other."""
        config = self.config.copy_and_resolve_references()
        d, t = config.data, config.train
        d.held_out = 0.0
        if len(demos) > 1:
            d.fractions = tuple(1 / len(demos) for _ in demos)
        steps = self._steps[name]
        t.update({"num_steps": steps, "decay_steps": steps})
        t.save_every, t.warmup_steps = min(t.save_every, steps), min(t.warmup_steps, steps // 4)
        if rate := self._rates.get(name):
            t.update({"learning_rate": rate, "final_learning_rate": rate / 100})
        settings = {part: config[part].to_dict() for part in ("model", "data", "train")}
        settings["data"]["path"] = demos  # by name: the directory may be moved
        d.path = ",".join(str(self._demos(demo)) for demo in demos)
        if name != "base":
            t.init_from = self._checkpoint("base")
        make = functools.partial(_train, config, self._workdir(name))
        return Stage(f"train_{name}", settings, make, apart=name != "base")

    def _split(self):
        split_dataset.split(
            self._demos("soup"),
            self.output / "splits",
            num_splits=self.q.num_splits,
            sort_by=self.q.sort_by,
            overwrite=True,
        )

    def _dump(self):
        config = self.config.copy_and_resolve_references()
        config.data.path = str(self._demos("validation"))
        config.data.norm_stats = self._checkpoint("base")
        config.data.held_out, config.mix.held_out = 1.0, self.q.held_out
        dump_validation.dump(config, self.output / "validation.npz", overwrite=True)

    def _mix(self, method: str) -> Stage:
        def make():
            request = {"checkpoints": tuple(self._checkpoint(name) for name in self.splits)}
            if method == "manual":  # by the number of frames, as federated averaging would
                frames = [
                    files.read_json(self._demos(name) / "meta" / "info.json")["total_frames"]
                    for name in self.splits
                ]
                request["coefficients"] = tuple(frames)
            mix.mix(
                self.config,
                mix.Request(
                    output=pathlib.Path(self._mixed(method)),
                    method=method,
                    base=self._checkpoint("base"),
                    validation=str(self.output / "validation.npz"),
                    overwrite=True,
                    **request,
                ),
            )

        return Stage(f"mix_{method}", self.config.mix.to_dict(), make)

    def _interpolate(self):
        mix.mix(
            self.config,
            mix.Request(
                checkpoints=(self._checkpoint("finetuned"),),
                base=self._checkpoint("base"),
                merge_ratios=self.ratios,
                output=self.output / "mixes" / "interpolate",
                overwrite=True,
            ),
        )

    def _evaluate(self, name: str, env: str, policies: dict[str, str], num_episodes: int) -> Stage:
        settings = self.config.evaluate.to_dict() | {"env": env, "num_episodes": num_episodes}
        settings["policies"] = list(policies)

        def make():
            config = self.config.copy_and_resolve_references()
            config.evaluate.num_episodes = num_episodes
            request = evaluate.Request(
                checkpoints=tuple(policies.values()),
                names=tuple(policies),
                output=self.output / "evaluations" / name,
                env=env,
                validation=str(self.output / "validation.npz") if name == "soup" else "",
                overwrite=True,
            )
            evaluate.evaluate(config, request, self._pool_of_environments())

        return Stage(f"evaluate_{name}", settings, make)

    # The report.

    def _report(self, told: list[dict[str, Any]]) -> dict[str, Any]:
        played = files.read_json(self.output / "evaluations" / "soup" / evaluate.RESULT)
        return {
            "simulator": played["simulator"]
            | {"peak_memory_bytes": played["peak_memory_bytes"]["environments"]},
            "machine": {
                "cores": processes.num_cores(),
                "python": platform.python_version(),
                "jax": played["jax"],
                "platform": jax.default_backend(),
                "cpu": os.uname().machine,
            },
            "training_seed": self.config.train.seed,
            "soup": self._soup(),
            "retain": self._retain(),
            "stages": told,
            "seconds": metrics.wall_seconds(told),
        }

    def _soup(self) -> dict[str, Any]:
        evaluation = self._evaluation("soup")
        mixes = {m: files.read_json(pathlib.Path(self._mixed(m)) / "mix.json") for m in
                 (*_METHODS, "manual")}  # fmt: skip
        rows = []
        for name, found in evaluation.items():
            kind = "control"
            if name == "base" or name in self.splits:
                kind = "base" if name == "base" else "input"
            coefficients = None
            if name in mixes:
                kind = "mix"
                coefficients = mixes[name]["coefficients"][-self.q.num_splits :]
            rows.append({"name": self._label(name), "kind": kind, "coefficients": coefficients})
            rows[-1] |= _kept(found, "loss", "episodes", "successes", "interval", "mean_score")
            rows[-1]["outcomes"] = found["outcomes"]
        return {
            "task": self.q.soup_env,
            "note": f"{self.q.soup_episodes} demonstrations in {self.q.num_splits} disjoint "
            f"splits, {f'sorted by {self.q.sort_by}' if self.q.sort_by else 'shuffled'}; losses on "
            f"{self.q.validation_episodes} others",
            "inputs": [self._label(name) for name in self.splits],
            "rows": sorted(rows, key=lambda row: _KINDS.index(row["kind"])),
            "geometry": mixes["average"]["geometry"],
        }

    def _retain(self) -> dict[str, Any]:
        found = {suite: self._evaluation(suite.replace(" ", "_")) for suite, _, _ in self._suites()}
        rows = []
        for name in self._retain_policies():
            kind, ratio = "control", None
            if name in ("base", "finetuned"):
                kind, ratio = name, float(name == "base")
            elif name.startswith("merged_"):
                kind, ratio = "merged", float(name.removeprefix("merged_"))
            results = {
                suite: _kept(
                    policies[name], "episodes", "successes", "interval", "mean_score", "outcomes"
                )
                for suite, policies in found.items()
            }
            rows.append({"name": self._label(name), "kind": kind, "merge_ratio": ratio})
            rows[-1]["results"] = results
        return {
            "task": self.q.narrow_env,
            "note": f"{self.q.narrow_episodes} demonstrations of {self.q.narrow_env}; out of "
            f"distribution {self.q.shifted_env}; pretraining tasks {self.q.pretraining_env}",
            "suites": list(found),
            "rows": sorted(rows, key=lambda row: (row["merge_ratio"] is None, row["merge_ratio"])),
        }

    def _evaluation(self, name: str) -> dict[str, Any]:
        report = files.read_json(self.output / "evaluations" / name / evaluate.RESULT)
        return {policy["name"]: policy for policy in report["policies"]}

    def _label(self, name: str) -> str:
        """What the report calls a policy."""
        q = self.q
        told = {
            "joint": f"all demonstrations, {q.soup_steps} steps",
            "joint_long": f"all demonstrations, {q.soup_steps * q.num_splits} steps",
            "finetuned": "fine-tuned",
            "co_finetuned": "co-fine-tuned",
        }
        if name.startswith("finetuned_"):
            return f"learning rate {name.removeprefix('finetuned_')}"
        if name.startswith("merged_"):
            return f"merged {name.removeprefix('merged_')}"
        return told.get(name, name.replace("split_", "split ").replace("_", " "))


def _kept(found: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: found[key] for key in keys}


def _train(config: ml_collections.ConfigDict, workdir: pathlib.Path) -> None:
    """A whole training: one that SIGTERM ended, which is saved, ends the quickstart too."""
    state = train.train(config, workdir)
    if int(state.step) < config.train.num_steps:
        raise SystemExit(128 + signal.SIGTERM)
