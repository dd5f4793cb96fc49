r"""π0 on PushT: the 3 B one on LeRobot's demonstrations; `:small` is one that a laptop trains.

Train π0 on lerobot/pusht, 206 demonstrations by people, as a script of LeRobot's users does: 10,000
steps of 4, Adam with a constant 1e-4, no clip. By arithmetic, not by measurement: 3.2 B parameters,
Adam's states and gradients are 52 GB; `--config.train.optimizer=adam_8bit` saves 19 of them. No
success rate is known.
  python experiments/train.py --config=configs/pi0_pusht.py --workdir=runs/pusht
  python experiments/evaluate.py --config=configs/pi0_pusht.py --checkpoints=runs/pusht/10000 \
    --output=evaluations/pusht

Model: action_dim 32 of which two are the robot's, horizon 50, 48 prompt tokens, one camera of 96
pixels brought to 224; the other two are absent, and not computed. Base:
gs://openpi-assets/checkpoints/pi0_base/params; LeRobot's own, converted to PyTorch, is
`--config.train.init_from=hf://lerobot/pi0`.

`:small` is 1.1 M parameters, chunks of 16 target positions, no prompt, pictures brought to 48
pixels and seen in nine patches. Its demonstrations are an expert's, which plans with the simulator
and sees the block's pose; the second half is made under noise, which shows how to recover:
  python experiments/collect_demos.py --env=pusht/PushT-v0 --num_episodes=300 --output=demos/clean
  python experiments/collect_demos.py --env=pusht/PushT-v0 --num_episodes=250 --seed=3000 \
    --noise=0.02 --output=demos/noisy
  python experiments/edit_dataset.py --operation=merge --source=demos/clean,demos/noisy \
    --output=demos/both
  python experiments/train.py --config=configs/pi0_pusht.py:small --config.data.path=demos/both \
    --workdir=runs/small
  python experiments/evaluate.py --config=configs/pi0_pusht.py:small --output=evaluations/small \
    --checkpoints=runs/small/10000,nearest:demos/clean

Measured on an AMD EPYC: the demonstrations take 11 minutes of one core, the training 20. On 100
starts the policy has the mean best score 0.46, 95 % interval [0.38, 0.53], and succeeds in 15; the
nearest of the 300 demonstrations has 0.24 [0.20, 0.30] and succeeds in 1; a disc that stands still
has 0.06. One training seed. `make quickstart SIM=pusht` trains the same network for less.
`:debug` takes four steps of a small network, of half of `:small`'s depth with it. PushT needs a
library of the system, on Debian libgl1: `python experiments/doctor.py` says so.
"""

import ml_collections

from configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    words = common.words(arg, "small")
    config = _small() if "small" in words else _full()
    config.evaluate.env = "pusht/PushT-v0"
    if "debug" in words:
        _shrink(config) if "small" in words else common.shrink(config)
        config.evaluate.update({"num_episodes": 2, "max_steps": 32})
    return config


def _full() -> ml_collections.ConfigDict:
    config = common.openpi_config("pi0_base", pi05=False)
    config.data.update({"repo_id": "lerobot/pusht", "asset_id": "lerobot/pusht", "robot": "pusht"})
    config.data.update({"held_out": 0.0, "augment": False})  # actions are places in the picture
    config.train.update({"batch_size": 4, "num_steps": 10_000, "warmup_steps": 0})
    config.train.update({"optimizer": "adam", "b2": 0.999, "decay_steps": 10_000})
    config.train.update({"learning_rate": 1e-4, "final_learning_rate": 1e-4, "ema_decay": 0.0})
    config.train.clip_norm = 0.0
    config.data.default_prompt = "Push the block to the target position"
    config.evaluate.replan_steps = 50
    return config


def _small() -> ml_collections.ConfigDict:
    config = common.get_config()
    heads = {"depth": 3, "num_heads": 4, "num_kv_heads": 1, "head_dim": 32}
    config.model = ml_collections.ConfigDict(
        {
            "paligemma_variant": {"width": 64, "mlp_dim": 128} | heads,
            "action_expert_variant": {"width": 128, "mlp_dim": 256} | heads,
            "siglip_variant": {
                "width": 128, "depth": 3, "mlp_dim": 256, "num_heads": 4, "patch": 16,
            },
            "vocab_size": 8,
            "pi05": False,
            "action_dim": 2,
            "action_horizon": 16,
            "max_token_len": 0,
            "image_keys": ("base_0_rgb",),
            "image_resolution": (48, 48),
            "dtype": "float32",
            "remat": False,
        }
    )  # fmt: skip
    config.data.cameras = {"base_0_rgb": "observation.image"}
    config.data.held_out = 0.03
    config.train.update(
        {"batch_size": 64, "num_steps": 10_000, "warmup_steps": 200, "decay_steps": 10_000}
    )
    config.train.update({"learning_rate": 1e-3, "final_learning_rate": 1e-5, "ema_decay": 0.0})
    # Pictures are white almost everywhere, which is 1 in all 768 numbers of a patch: Adam moves all
    # of these alike, and at the others' rate what they add up to drowns the block and the disc.
    config.train.learning_rates = ("PaliGemma/img/embedding/kernel=0.03",)
    config.train.update({"log_every": 250, "save_every": 1000, "keep_period": 0})
    config.evaluate.update({"num_episodes": 100, "num_flow_steps": 5})
    config.quickstart = _quickstart()
    return config


def _shrink(config: ml_collections.ConfigDict) -> None:
    config.model.paligemma_variant.depth = config.model.action_expert_variant.depth = 2
    config.model.siglip_variant.depth = 1
    config.train.update({"batch_size": 8, "num_steps": 4, "warmup_steps": 2, "decay_steps": 4})
    config.train.update({"log_every": 1, "save_every": 2, "eval_every": 0})
    common.shrink_quickstart(config.quickstart)


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
