r"""Splits a LeRobot dataset into several that share no episode: one for each policy to be mixed.

  python experiments/split_dataset.py --source=datasets/reach --output=datasets/reach_splits
  python experiments/split_dataset.py --source=datasets/reach --output=datasets/reach_parts \
    --fractions=train=0.8,val=0.2
  python experiments/split_dataset.py --source=datasets/reach --output=datasets/reach_lists \
    --episodes=train=0:40 --episodes=val=40,41,45:50

Writes OUTPUT/split_0, split_1, …, each a complete dataset with videos and record.csv files, and
OUTPUT/splits.json, which says where every episode went. With --sort_by=observation.state[4] every
split holds another region of that number instead of a random share; --sort_by=episode_index keeps
the source's order.
"""

from absl import flags

from policymix import app

_CONFIG = app.define_config(__file__)
_SOURCE = flags.DEFINE_string("source", None, "Folder of a LeRobot dataset.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the splits.", required=True)
_NUM_SPLITS = flags.DEFINE_integer("num_splits", None, "How many datasets to make; 4 if not said.")
_FRACTIONS = flags.DEFINE_multi_string(
    "fractions", [], "Shares of the episodes, 0.8,0.2 or train=0.8,val=0.2, instead of num_splits."
)
_EPISODES = flags.DEFINE_multi_string(
    "episodes", [], "NAME=0:40,45: a split of just these episodes; once for each split."
)
_SEED = flags.DEFINE_integer("seed", 42, "Of the order in which episodes are dealt out.")
_SORT_BY = flags.DEFINE_string(
    "sort_by", "", "FEATURE or FEATURE[DIMENSION] to order the episodes by, instead of shuffling."
)
_VERSION = flags.DEFINE_string("version", "", "v3.0 or v2.1; as the source where empty.")
_WORKERS = flags.DEFINE_integer("num_workers", 0, "Threads that read ahead; 0: one per core.")


def main() -> None:
    from policymix.runs import split_dataset

    split_dataset.split(
        _SOURCE.value,
        _OUTPUT.value,
        num_splits=_NUM_SPLITS.value,
        fractions=[p.strip() for text in _FRACTIONS.value for p in text.split(",") if p.strip()],
        lists=_EPISODES.value,
        seed=_SEED.value,
        sort_by=_SORT_BY.value,
        version=_VERSION.value,
        num_workers=_WORKERS.value,
        overwrite=flags.FLAGS.overwrite,
        dry_run=flags.FLAGS.dry_run,
    )


if __name__ == "__main__":
    app.run(main)
