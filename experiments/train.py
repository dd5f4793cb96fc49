r"""Fine-tunes a policy, and resumes where an earlier run of the same --workdir stopped.

  python experiments/train.py --config=configs/pi0_state.py --workdir=runs/reach \
    --config.data.path=datasets/reach --config.train.init_from=runs/base/30000
"""

import pathlib

from absl import flags

from policymix import app

_CONFIG = app.define_config(__file__)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)


def main() -> None:
    from policymix.runs import train

    train.train(
        _CONFIG.value,
        pathlib.Path(_WORKDIR.value),
        overwrite=flags.FLAGS.overwrite,
        dry_run=flags.FLAGS.dry_run,
    )


if __name__ == "__main__":
    app.run(main)
