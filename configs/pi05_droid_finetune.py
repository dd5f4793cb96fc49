r"""π0.5-DROID fine-tuned on a DROID robot of one's own, as OpenPI's config of the same name.

Train: 20,000 steps of 32 on one GPU of 80 GB (OpenPI asks for 70 GB), on a dataset as OpenPI's
conversion to LeRobot writes it. No hours and no success rate are known.
  python experiments/train.py --config=configs/pi05_droid_finetune.py --workdir=runs/droid \
    --config.data.path=datasets/my_droid

Merge the fine-tune with the base that it began at (`config.train.init_from`) at several ratios;
streamed, so no accelerator is needed. Ratio 0 is the fine-tune, 1 the base:
  python experiments/mix.py --config=configs/pi05_droid_finetune.py --merge_ratio=0.3,0.5,0.7 \
    --checkpoints=checkpoints/pi05_droid_finetune/mine/20000 --output=checkpoints/droid_merged

Model: action_dim 32, horizon 16, 200 prompt tokens with proprio among them. Base:
gs://openpi-assets/checkpoints/pi05_droid/params, with its statistics, whose asset id is "droid":
OpenPI asks to keep them in fine-tuning, and so does this program unless told otherwise. Actions are
seven joint velocities and the gripper.

To set, for training or validation batches: `config.data.path`, a dataset as OpenPI's conversion to
LeRobot writes it. There is no third camera, and none is computed. No success rate was measured.
`:debug` is the same program on a network of 0.6 million parameters; seconds on a laptop.
"""

import ml_collections

from configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = common.openpi_config("pi05_droid", pi05=True, action_horizon=16)
    config.data.update({"asset_id": "droid", "robot": "droid"})
    config.train.num_steps = 20_000
    if common.parse_arg(arg):
        common.shrink(config)
    return config
