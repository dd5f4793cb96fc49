r"""Splits a LeRobot dataset into several that share no episode: one for each policy to be mixed.

  python experiments/split_dataset.py --source=datasets/reach --output=datasets/reach_splits

Writes OUTPUT/split_0, split_1, …, each a complete dataset, and OUTPUT/splits.json, which says
where every episode went. With --sort_by=observation.state[4] every split holds another region of
that number instead of a random share.
"""

from absl import flags

from policymix import app

_CONFIG = app.define_config(__file__)
_SOURCE = flags.DEFINE_string("source", None, "Folder of a LeRobot dataset.", required=True)
_OUTPUT = flags.DEFINE_string("output", None, "Folder for the splits.", required=True)
_NUM_SPLITS = flags.DEFINE_integer("num_splits", 4, "How many datasets to make.")
_SEED = flags.DEFINE_integer("seed", 42, "Of the order in which episodes are dealt out.")
_SORT_BY = flags.DEFINE_string(
    "sort_by", "", "FEATURE or FEATURE[DIMENSION] to order the episodes by, instead of shuffling."
)


def main() -> None:
    from policymix.runs import split_dataset

    split_dataset.split(
        _SOURCE.value,
        _OUTPUT.value,
        num_splits=_NUM_SPLITS.value,
        seed=_SEED.value,
        sort_by=_SORT_BY.value,
        overwrite=flags.FLAGS.overwrite,
        dry_run=flags.FLAGS.dry_run,
    )


if __name__ == "__main__":
    app.run(main)
