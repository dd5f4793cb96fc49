r"""Chunk-level offline RL on LIBERO: implicit Q-learning over chunks of ten actions, two cameras.

  python experiments/offline_rl.py --config=configs/rl_libero.py \
    --config.data.path=datasets/libero_spatial --workdir=runs/rl_libero

The dataset is made of LIBERO's HDF5 files by edit_dataset.py --operation=import_hdf5, which keeps
their rewards; where there are none, --operation=label_rewards makes them. Demonstrations that all
succeed hold little to prefer: there the policy comes to imitation, and what it gains is to be
looked for in data with failures.

With chunks of π0.5 as candidates beside the demonstrated ones, each weighted by its own advantage,
after download.py --name=pi05_libero:
  python experiments/offline_rl.py --config=configs/rl_libero.py \
    --config.data.path=datasets/libero_spatial --workdir=runs/rl_libero_pi05 \
    --config.offline_rl.proposals=checkpoints/pi0/pi05_libero

Proposals are made once, at every frame, and kept in the run's folder; π0.5 needs a GPU for them (7
GB of parameters in bfloat16, by arithmetic). The model is that of configs/pi05_libero.py. Training
itself: pictures of 256 pixels, 64 chunks a step, about 100,000 steps for LIBERO-Spatial's 62,250
frames. Not run on LIBERO here, so that neither hours nor success are known; LIBERO's simulator is
not among those of evaluate.py. `:debug` is four steps of a small network on PushT: compilation,
most of it.
"""

import ml_collections

from configs import common, pi05_libero


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = pi05_libero.get_config()
    # The learner has the two cameras that the robot has; π0.5, which proposes, has a third.
    config.data.cameras.update(
        {"base_0_rgb": "image", "left_wrist_0_rgb": "wrist_image", "right_wrist_0_rgb": "absent"}
    )
    config.data.augment = False
    r = config.offline_rl
    r.update({"algorithm": "chunk_iql", "action_horizon": 10, "batch_size": 64})
    r.update({"num_epochs": 100, "log_every": 100, "save_every": 10, "keep_period": 50})
    config.evaluate.replan_steps = 0
    if common.parse_arg(arg):
        common.shrink(config)
        common.shrink_offline_rl(config)
    return config
