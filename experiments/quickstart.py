"""The main job on two CPU cores, without a download: demonstrations, training, mixing, roll-outs.

  make quickstart              (goes on where it was; FRESH=1 starts over)
  make quickstart SIM=pusht    (pictures; needs Debian's libgl1)

Every stage is a call that another main makes too: collect_demos, split_dataset, train,
dump_validation, mix, evaluate.
"""

import pathlib

from absl import flags

from policymix import app

_CONFIG = app.define_config(__file__, "pi0_metaworld.py")
_OUTPUT = flags.DEFINE_string("output", "outputs/quickstart", "Directory for everything.")
_FRESH = flags.DEFINE_bool("fresh", False, "Start over.")


def main() -> None:
    from policymix.runs import quickstart

    job = quickstart.Quickstart(_CONFIG.value, pathlib.Path(_OUTPUT.value))
    if flags.FLAGS.dry_run:
        print(job.describe())
    else:
        job.run(fresh=_FRESH.value or flags.FLAGS.overwrite)


if __name__ == "__main__":
    app.run(main)
