r"""Collects demonstrations of a simulator's experts as a LeRobot dataset; successful ones only.

With --skills it collects attempts for offline reinforcement learning instead: good and bad ones,
the actions that were executed, and what the simulator said of each.

python experiments/collect_demos.py --env=metaworld/push-v3 --num_episodes=40 --output=demos/push
python experiments/collect_demos.py --env=metaworld/plate-slide-v3@0:0.2 --output=demos/narrow
python experiments/collect_demos.py --env=pusht/PushT-v0 --output=demos/pusht
python experiments/collect_demos.py --env=aloha_fast/AlohaTransferCube-v0 --output=demos/transfer
python experiments/collect_demos.py --env=metaworld/push-v3 --num_episodes=200 --output=attempts \
  --skills=expert,slow,biased,noisy,wandering
"""

import pathlib

from absl import flags

from policymix import app

_CONFIG = app.define_config(__file__)
_ENV = flags.DEFINE_string(
    "env", "", "SIMULATOR/TASK,TASK; TASK@LOW:HIGH starts in that part. Default config.evaluate.env"
)
_OUTPUT = flags.DEFINE_string("output", None, "Directory of the dataset to write.", required=True)
_NUM_EPISODES = flags.DEFINE_integer(
    "num_episodes", 50, "Of each task: successful ones, or with --skills any."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the first episode's start; the next ones count on.")
_MAX_STEPS = flags.DEFINE_integer(
    "max_steps",
    0,
    "After how many an attempt has failed; 0: 150 in Meta-World, 300 in PushT, 400 in ALOHA.",
)
_NOISE = flags.DEFINE_float("noise", 0.0, "On executed actions, in halves of the action's range.")
_SKILLS = flags.DEFINE_list(
    "skills", [], "expert,slow,biased,noisy,wandering or some of these, which take turns."
)


def main() -> None:
    from policymix.runs import collect_demos

    collect_demos.collect(
        _ENV.value or _CONFIG.value.evaluate.env,
        pathlib.Path(_OUTPUT.value),
        num_episodes=_NUM_EPISODES.value,
        seed=_SEED.value,
        max_steps=_MAX_STEPS.value,
        noise=_NOISE.value,
        skills=_SKILLS.value,
        num_workers=_CONFIG.value.evaluate.num_workers,
        overwrite=flags.FLAGS.overwrite,
        dry_run=flags.FLAGS.dry_run,
    )


if __name__ == "__main__":
    app.run(main)
