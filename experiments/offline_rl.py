r"""Chunk-level offline RL: a critic, a value and a policy of action chunks, from data with rewards.

  python experiments/offline_rl.py --config=configs/rl_metaworld.py --config.data.path=DATASET \
    --workdir=runs/rl
  python experiments/evaluate.py --config=configs/rl_metaworld.py --checkpoints=runs/rl/5000 \
    --output=evaluations/rl

Any dataset that train.py reads will do, or an OGBench .npz, if it has rewards: add them with
edit_dataset.py --operation=label_rewards. What each setting does: docs/hyperparameters.md. Resumes
where an earlier run of the same --workdir stopped.
"""

import pathlib

from absl import flags

from policymix import app

_CONFIG = app.define_config(__file__)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.", required=True)


def main() -> None:
    from policymix.runs import offline_rl

    offline_rl.train(
        _CONFIG.value,
        pathlib.Path(_WORKDIR.value),
        overwrite=flags.FLAGS.overwrite,
        dry_run=flags.FLAGS.dry_run,
    )


if __name__ == "__main__":
    app.run(main)
