r"""Writes fixed validation batches, from episodes that training held out, for mixing.

  python experiments/dump_validation.py --config=configs/pi0_state.py --output=val.npz \
    --config.data.path=datasets/reach
"""

import pathlib

from absl import flags

from policymix import app

_CONFIG = app.define_config(__file__)
_OUTPUT = flags.DEFINE_string("output", None, "File to write (.npz).", required=True)
_NUM_BATCHES = flags.DEFINE_integer("num_batches", 50, "How many batches, at most.")


def main() -> None:
    from policymix.runs import dump_validation

    dump_validation.dump(
        _CONFIG.value,
        pathlib.Path(_OUTPUT.value),
        num_batches=_NUM_BATCHES.value,
        overwrite=flags.FLAGS.overwrite,
        dry_run=flags.FLAGS.dry_run,
    )


if __name__ == "__main__":
    app.run(main)
