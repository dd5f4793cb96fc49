r"""A small π0 on PushT's 96-pixel pictures: what `make quickstart SIM=pusht` trains.

  python experiments/collect_demos.py --env=pusht/PushT-v0 --num_episodes=60 --output=demos
  python experiments/train.py --config=configs/pi0_pusht.py --config.data.path=demos \
    --workdir=runs/mine
  python experiments/evaluate.py --config=configs/pi0_pusht.py --checkpoints=runs/mine/1000 \
    --output=evaluations/mine

Model: 0.5 M parameters, one camera in 36 patches, the agent's position, chunks of 8 target
positions; no prompt, there being one task. Experts plan with the simulator and see the block's
pose; the policy sees pictures. No success rate has been measured for it yet.
PushT needs a library of the system, on Debian libgl1: `python experiments/doctor.py` says so.
`:debug` takes four steps of a network half as deep.
"""

import ml_collections

from configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = common.get_config()
    heads = {"depth": 4, "num_heads": 2, "num_kv_heads": 1, "head_dim": 32}
    config.model = ml_collections.ConfigDict(
        {
            "paligemma_variant": {"width": 64, "mlp_dim": 128} | heads,
            "action_expert_variant": {"width": 128, "mlp_dim": 128} | heads,
            "siglip_variant": "mu/16",
            "siglip_depth": 2,
            "vocab_size": 8,
            "pi05": False,
            "action_dim": 2,
            "action_horizon": 8,
            "max_token_len": 0,
            "image_keys": ("base_0_rgb",),
            "image_resolution": (96, 96),
            "dtype": "float32",
            "remat": False,
        }
    )
    config.data.cameras = {"base_0_rgb": "observation.image"}
    config.data.held_out = 0.0
    config.train.update(
        {"batch_size": 64, "num_steps": 1000, "warmup_steps": 50, "decay_steps": 1000}
    )
    config.train.update({"learning_rate": 1e-3, "final_learning_rate": 1e-5, "ema_decay": 0.0})
    config.train.update({"log_every": 250, "save_every": 500, "keep_period": 0})
    config.evaluate.env = "pusht/PushT-v0"
    config.evaluate.update({"num_episodes": 50, "num_flow_steps": 5})
    config.quickstart = _quickstart()
    if common.parse_arg(arg):
        config.model.paligemma_variant.depth = config.model.action_expert_variant.depth = 2
        config.model.siglip_depth = 1
        config.train.update({"batch_size": 8, "num_steps": 4, "warmup_steps": 2, "decay_steps": 4})
        config.train.update({"log_every": 1, "save_every": 2})
        config.evaluate.update({"num_episodes": 2, "max_steps": 32})
        common.shrink_quickstart(config.quickstart)
    return config


def _quickstart() -> ml_collections.ConfigDict:
    """What `make quickstart SIM=pusht` collects, trains, mixes and measures: one task, whose starts
    are divided by where the block lies.
    """
    return ml_collections.ConfigDict(
        {
            "pretraining_env": "pusht/PushT-v0@0:0.5",
            "pretraining_episodes": 60,
            "pretraining_steps": 1000,
            "soup_env": "pusht/PushT-v0@0.5:1",
            "soup_episodes": 24,
            "num_splits": 3,
            "sort_by": "",
            "soup_steps": 200,
            "validation_episodes": 8,
            "held_out": 0.5,
            "soup_rollouts": 50,
            "narrow_env": "pusht/PushT-v0@0.5:0.6",
            "shifted_env": "pusht/PushT-v0@0.7:1",
            "narrow_episodes": 10,
            "narrow_steps": 200,
            "small_learning_rates": (1e-4,),
            "merge_ratios": (0.0, 0.25, 0.4, 0.5, 0.6, 0.75, 1.0),
            "narrow_rollouts": 50,
            "shifted_rollouts": 50,
            "pretraining_rollouts": 50,
            "noise": 0.0,
        }
    )
