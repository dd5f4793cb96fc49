r"""Computes the normalisation statistics of a dataset's training episodes: norm_stats.json.

  python experiments/norm_stats.py --config=configs/pi0_state.py --output=assets/reach \
    --config.data.path=datasets/reach

Training computes them by itself; a file of their own is for several runs that are to be mixed and
so must normalise alike (--config.data.norm_stats=FILE).
"""

import pathlib

from absl import flags

from policymix import app

_CONFIG = app.define_config(__file__)
_OUTPUT = flags.DEFINE_string(
    "output", None, "FILE.json, or a directory for norm_stats.json.", required=True
)


def main() -> None:
    from policymix.runs import norm_stats

    norm_stats.write(
        _CONFIG.value,
        pathlib.Path(_OUTPUT.value),
        overwrite=flags.FLAGS.overwrite,
        dry_run=flags.FLAGS.dry_run,
    )


if __name__ == "__main__":
    app.run(main)
