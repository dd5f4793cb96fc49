r"""Rolls out any number of checkpoints on the same starts: a success table with its intervals.

  python experiments/evaluate.py --config=configs/pi0_metaworld.py --checkpoints=a,b,mixed \
    --env=metaworld/push-v3 --output=evaluations/push

nearest:DATASET, in place of a checkpoint, replays of each start the nearest demonstration: what a
policy beats that has learned more than its demonstrations.
  python experiments/evaluate.py --config=configs/pi0_metaworld.py --output=evaluations/reach \
    --checkpoints=runs/mine/2000,nearest:demos --env=metaworld/reach-v3
"""

import pathlib

from absl import flags

from policymix import app

_CONFIG = app.define_config(__file__)
_CHECKPOINTS = flags.DEFINE_list(
    "checkpoints",
    [],
    "Step or params directories, outputs of a mix, or patterns: 'runs/*/5000'; or nearest:DATASET.",
)
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write.", required=True)
_ENV = flags.DEFINE_string(
    "env", "", "SIMULATOR/TASK,TASK; TASK@LOW:HIGH starts in that part. Default config.evaluate.env"
)
_NAMES = flags.DEFINE_list("names", [], "What the report calls each checkpoint; default: its path.")
_VALIDATION = flags.DEFINE_string(
    "validation", "", "Validation batches (.npz) to report losses on as well."
)


def main() -> None:
    from policymix.runs import evaluate

    evaluate.evaluate(
        _CONFIG.value,
        evaluate.Request(
            checkpoints=tuple(_CHECKPOINTS.value),
            output=pathlib.Path(_OUTPUT.value),
            env=_ENV.value,
            names=tuple(_NAMES.value),
            validation=_VALIDATION.value,
            overwrite=flags.FLAGS.overwrite,
            dry_run=flags.FLAGS.dry_run,
        ),
    )


if __name__ == "__main__":
    app.run(main)
