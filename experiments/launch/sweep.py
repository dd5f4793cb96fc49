r"""One training for each point of a grid of config fields: prints the commands, runs them one after
another with --run, or hands them to Slurm with --slurm.

  python experiments/launch/sweep.py --config=configs/pi0_state.py --workdir=runs/sweep \
    --config.data.path=datasets/reach \
    --sweep=train.learning_rate=1e-4,5e-5 --sweep=train.seed=0,1

Each point has a workdir of its own, runs/sweep/learning_rate=1e-4_seed=0 and so on; what is there
already is resumed. Commas in brackets or quotes stay: --sweep="train.freeze=(),('a(b|c)','d')".
"""

import itertools
import os
import pathlib
import re
import shlex
import subprocess
import sys

from absl import flags
from ml_collections import config_flags

from policymix import app

_BRACKETS = {"(": ")", "[": "]", "{": "}"}
_HERE = pathlib.Path(os.path.relpath(__file__)).parent
app.define_config(str(_HERE.parent / "train.py"))
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the points' workdirs.", required=True)
_SWEEP = flags.DEFINE_multi_string("sweep", None, "FIELD=VALUE,VALUE; several.", required=True)
_RUN = flags.DEFINE_bool("run", False, "Run the points one after another.")
_SLURM = flags.DEFINE_string("slurm", None, "Submit them, with these options of sbatch, or ''.")


def main() -> None:
    config = flags.FLAGS["config"]
    given = {f"config.{k}": v for k, v in config_flags.get_override_values(config).items()}
    shared = [f"--{name}" for name in ("overwrite", "verbose") if flags.FLAGS[name].value]
    if "--overwrite" in shared and _SLURM.value is not None:
        raise ValueError(
            "--overwrite would begin a run anew each time Slurm queues it again: remove what is in "
            f"{_WORKDIR.value} first"
        )
    axes = {}
    for text in _SWEEP.value:
        field, told, values = text.partition("=")
        found = _split(values)
        if not told or len(set(found)) < len(found) or f"config.{field}" in axes | given:
            raise ValueError(f"--sweep={text}: expected a new FIELD=VALUE,VALUE, each value once")
        axes[f"config.{field}"] = found
    points = {}
    for values in itertools.product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        told = "_".join(f"{field.split('.')[-1]}={value}" for field, value in point.items())
        if (name := re.sub(r"[^-\w.+=]+", "-", told)) in points:
            raise ValueError(f"--sweep names two points {name}: their workdirs would be one")
        fields = {"config": config_flags.get_config_filename(config), **given, **point}
        points[name] = [f"--{field}={value}" for field, value in fields.items()]
        _check(points[name])
        points[name] += shared
    if failed := [name for name, arguments in points.items() if not _do(name, arguments)]:
        raise ValueError(f"{len(failed)} of {len(points)} points failed: {', '.join(failed)}")


def _split(text: str) -> list[str]:
    """What lies between the commas that are in no brackets and no quotes."""
    values, ends = [""], []
    for piece in re.findall(r"""'[^']*'|"[^"]*"|.""", text, re.DOTALL):
        if piece in _BRACKETS:
            ends.append(_BRACKETS[piece])
        elif piece in ("'", '"') or (piece in ")]}" and (not ends or ends.pop() != piece)):
            raise ValueError(f"--sweep, {text}: {piece} has no counterpart")
        if piece == "," and not ends:
            values.append("")
        else:
            values[-1] += piece
    if ends:
        raise ValueError(f"--sweep, {text}: a {ends[-1]} is missing")
    return values


def _check(arguments: list[str]) -> None:
    """ValueError for a field or a value that the config does not take."""
    values, argv = flags.FlagValues(), ["train.py", *arguments]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except Exception as error:
        raise ValueError(f"--sweep, {argv[-1]}: {error}") from error


def _do(name: str, arguments: list[str]) -> bool:
    """Prints the command of a point and, where asked to, runs it; False if it failed."""
    command = ["python", str(_HERE.parent / "train.py")]
    if _SLURM.value is not None:
        options = [f"--job-name={name}", *shlex.split(_SLURM.value)]
        command = ["sbatch", *options, str(_HERE / "slurm.sbatch")]
    command += [*arguments, f"--workdir={pathlib.Path(_WORKDIR.value) / name}"]
    print(shlex.join(command), flush=True)
    wanted = (_RUN.value or _SLURM.value is not None) and not flags.FLAGS.dry_run
    program = sys.executable if _SLURM.value is None else "sbatch"
    return not wanted or subprocess.run([program, *command[1:]]).returncode == 0


if __name__ == "__main__":
    app.run(main)
