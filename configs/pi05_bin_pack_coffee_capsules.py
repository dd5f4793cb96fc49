r"""π0.5 that packs coffee capsules into a bin: the first example of RETAIN's merge script.

Merge a fine-tune with the base that it began at (`config.train.init_from`); streamed, so no
accelerator is needed. Ratio 0 is the fine-tune, 1 the base:
  python experiments/mix.py --config=configs/pi05_bin_pack_coffee_capsules.py --merge_ratio=0.5 \
    --checkpoints=checkpoints/pi05_bin_pack/exp1/20000/params --output=checkpoints/merged

Known, from the config of that name in the OpenPI fork that the script belongs to: OpenPI's π0.5
unchanged (action_dim 32, horizon 50, 200 prompt tokens with proprio among them), from pi05_base,
30,000 steps of batches of 36, learning rate 5e-5. State and actions are 17 numbers: seven joint
positions, and the pose of the gripper with its rotation as six.

To set, for training or validation batches: `config.data.path`; a dataset that has state and action
as one feature each (there they are two, joined on the fly); pictures of 224 × 224 stored as images;
and, there being no third camera, --config.model.image_keys="('base_0_rgb','left_wrist_0_rgb')". No
success rate was measured. `:debug` is the same program on a network of 0.6 million parameters;
seconds on a laptop.
"""

import ml_collections

from configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = common.openpi_config("pi05_base", pi05=True)
    config.data.cameras = {
        "base_0_rgb": "observation.images.front",
        "left_wrist_0_rgb": "observation.images.wrist",
        "right_wrist_0_rgb": "",
    }
    config.train.update({"batch_size": 36, "warmup_steps": 10_000, "ema_decay": 0.999})
    config.train.learning_rate = config.train.final_learning_rate = 5e-5
    if common.parse_arg(arg):
        common.shrink(config)
    return config
