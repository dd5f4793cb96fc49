r"""A small π0 for any LeRobot dataset: its cameras, its state and its actions, as info.json says.

  python experiments/train.py --config=configs/pi0_small.py --workdir=runs/mine \
    --config.data.path=DIRECTORY_OF_A_LEROBOT_DATASET
  python experiments/train.py --config=configs/pi0_small.py --workdir=runs/pusht \
    --config.data.repo_id=lerobot/pusht

Model: 1.0 M parameters, a little more for larger states and actions, the same code as the 3 B one;
pictures or videos of any size, brought to 112 × 112 with their aspect kept; prompts of at most 64
bytes; chunks of 16 actions. No success rate was measured. `:debug` takes four steps on the PushT
episodes that the tests use, in their videos.
"""

import ml_collections

from configs import common

_SIZE = {"depth": 4, "num_heads": 4, "num_kv_heads": 1, "head_dim": 32}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = common.get_config()
    config.model = ml_collections.ConfigDict(
        {
            "paligemma_variant": {"width": 64, "mlp_dim": 256} | _SIZE,
            "action_expert_variant": {"width": 128, "mlp_dim": 256} | _SIZE,
            "siglip_variant": "mu/16",
            "siglip_depth": 4,
            "vocab_size": 259,
            "pi05": False,
            "action_dim": ml_collections.config_dict.placeholder(int),
            "proprio_dim": ml_collections.config_dict.placeholder(int),
            "action_horizon": 16,
            "max_token_len": 64,
            "image_keys": ml_collections.config_dict.placeholder(tuple),
            "image_resolution": (112, 112),
            "dtype": "float32",
            "remat": False,
        }
    )
    config.data.augment = True
    config.train.update(
        {"batch_size": 64, "num_steps": 10_000, "warmup_steps": 500, "decay_steps": 10_000}
    )
    config.train.update({"learning_rate": 1e-3, "final_learning_rate": 1e-5})
    # Where most of a picture is one colour, hundreds of its numbers pull together: at the full rate
    # the patch embedding would learn nothing but that colour.
    config.train.learning_rates = ("PaliGemma/img/embedding/.*=0.03",)
    if common.parse_arg(arg):
        config.data.path = str(common.PUSHT)
        config.model.siglip_depth = 1
        config.train.update({"batch_size": 4, "num_steps": 4, "warmup_steps": 2, "decay_steps": 4})
        config.train.update({"log_every": 1, "save_every": 2, "keep_period": 2})
        config.train.eval_every = 0
    return config
