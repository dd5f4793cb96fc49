r"""A small π0 without cameras: prompt and proprio in, action chunks out. Runs on a laptop.

  python experiments/train.py --config=configs/pi0_state.py --workdir=runs/mine \
    --config.data.path=DIRECTORY_OF_A_LEROBOT_DATASET

Trains on the numeric columns of any LeRobot dataset whose state and actions have at most 8
dimensions. 1.2 M parameters, the same code as the 3 B one. `:debug` takes four steps on the PushT
episodes that the tests use; PushT's state lacks the block, so nothing is learned there.
"""

import ml_collections

from configs import common

_EXPERT = {
    "width": 128,
    "depth": 4,
    "mlp_dim": 256,
    "num_heads": 4,
    "num_kv_heads": 1,
    "head_dim": 32,
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = common.get_config()
    config.model = ml_collections.ConfigDict(
        {
            "paligemma_variant": dict(_EXPERT),
            "action_expert_variant": dict(_EXPERT),
            "siglip_variant": "mu/28",
            "vocab_size": 259,
            "pi05": False,
            "action_dim": 8,
            "action_horizon": 8,
            "max_token_len": 64,
            "image_keys": (),
            "dtype": "float32",
        }
    )
    config.train.update(
        {"batch_size": 64, "num_steps": 2000, "warmup_steps": 100, "decay_steps": 2000}
    )
    config.train.update({"learning_rate": 1e-3, "final_learning_rate": 1e-4, "save_every": 500})
    if common.parse_arg(arg):
        config.data.path = str(common.PUSHT)
        config.train.update({"batch_size": 4, "num_steps": 4, "warmup_steps": 2, "decay_steps": 4})
        config.train.update({"log_every": 1, "save_every": 2, "keep_period": 2})
        config.train.eval_every = 0
    return config
