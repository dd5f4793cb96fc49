"""The main job on a laptop, without a download: two checkpoints of a tiny π0, mixed by every
method.

  make quickstart            (a second run reuses what is there; FRESH=1 starts over)

The checkpoints are OpenPI's own output, half a million random-ish parameters each: enough to run
every part of the program, not enough to drive a robot.
"""

import pathlib

from absl import flags

from policymix import app

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_CONFIG = app.define_config(__file__, "pi0_libero.py:debug")
_OUTPUT = flags.DEFINE_string("output", "outputs/quickstart", "Directory for the mixes.")
_FRESH = flags.DEFINE_bool("fresh", False, "Start over.")
_TESTDATA = _ROOT / "tests" / "testdata" / "openpi" / "pi0"


def main() -> None:
    from policymix import files, reports
    from policymix.runs import mix

    output, config = pathlib.Path(_OUTPUT.value), _CONFIG.value
    config.mix.norm_stats = "pool"  # the two were trained with different statistics
    singles = tuple(str(_TESTDATA / name / "2000") for name in ("var1", "var2"))
    validation = str(_TESTDATA / "val_batches_b.npz")
    fresh = flags.FLAGS.overwrite or _FRESH.value
    done = {}
    for method in mix.METHODS:
        directory = output / method
        if fresh or not (directory / "mix.json").is_file():
            print(f"\n== {method}")
            request = {"checkpoints": singles, "method": method, "validation": validation}
            if method == "manual":
                request["coefficients"] = (0.7, 0.3)
            if method == "interpolate":
                request |= {"checkpoints": singles[:1], "base": singles[1], "merge_ratios": (0.25,)}
            request |= {"overwrite": fresh, "dry_run": flags.FLAGS.dry_run}
            mix.mix(config, mix.Request(output=directory, **request))
        if not flags.FLAGS.dry_run:
            done[method] = files.read_json(directory / "mix.json")
    if done:
        print(f"\n{reports.methods_table(done)}")
        print(f"mixes and pictures (mix.png) in {output}")


if __name__ == "__main__":
    app.run(main)
