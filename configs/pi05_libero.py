r"""π0.5 on LIBERO, as OpenPI's config of the same name.

Mix three fine-tunes with learned coefficients. By arithmetic, not by measurement: three trees in
float32, their mix and its gradients are about 65 GB of device memory.
  python experiments/mix.py --config=configs/pi05_libero.py --method=gradient_descent \
    --checkpoints=run0/29999,run1/29999,run2/29999 --validation=libero_val.npz --output=mixed

Model: action_dim 32, horizon 10, 200 prompt tokens, three cameras, proprio not in the prompt. Base:
gs://openpi-assets/checkpoints/pi05_base/params. `:debug` is the same program on a network of half a
million parameters; seconds on a laptop.
"""

import ml_collections

from configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = common.get_config()
    config.model = ml_collections.ConfigDict(
        {
            "paligemma_variant": "gemma_2b",
            "action_expert_variant": "gemma_300m",
            "siglip_variant": "So400m/14",
            "siglip_depth": ml_collections.config_dict.placeholder(int),
            "vocab_size": 257_152,
            "pi05": True,
            "discrete_state_input": False,
            "action_dim": 32,
            "action_horizon": 10,
            "max_token_len": 200,
            "image_keys": ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"),
            "image_resolution": (224, 224),
            "dtype": "bfloat16",
        }
    )
    config.data.cameras = dict.fromkeys(config.model.image_keys, "")
    config.data.quantiles = True
    config.train.batch_size = 256
    config.train.warmup_steps = 10_000
    config.train.learning_rate = config.train.final_learning_rate = 5e-5
    config.train.ema_decay = 0.999
    config.data.asset_id = "physical-intelligence/libero"
    config.train.init_from = "gs://openpi-assets/checkpoints/pi05_base/params"
    if common.parse_arg(arg):
        common.shrink(config)
    return config
