r"""Fine-tunes a policy, and resumes where an earlier run of the same --workdir stopped.

  python experiments/train.py --config=configs/pi0_state.py --workdir=runs/reach \
    --config.data.path=datasets/reach --config.train.init_from=runs/base/30000

SIGTERM ends it after the step at hand, which is saved. Several processes train one policy if each
is told which one it is, and all see the same --workdir; experiments/launch/ starts them on a TPU
pod or with Slurm.
"""

import pathlib

from absl import flags

from policymix import app

_CONFIG = app.define_config(__file__)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)
_DISTRIBUTED = flags.DEFINE_string(
    "distributed",
    "",
    "HOST:PORT,INDEX/COUNT: where process 0 listens, which one this is, how many there are; auto: "
    "as Slurm or the TPU pod says.",
)


def main() -> None:
    from policymix import distributed

    distributed.initialize(_DISTRIBUTED.value)
    distributed.quiet_others()
    with distributed.failing_at_once():
        from policymix.runs import train

        train.train(
            _CONFIG.value,
            pathlib.Path(_WORKDIR.value),
            overwrite=flags.FLAGS.overwrite,
            dry_run=flags.FLAGS.dry_run,
        )


if __name__ == "__main__":
    app.run(main)
