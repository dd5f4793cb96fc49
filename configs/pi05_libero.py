r"""π0.5 on LIBERO, as OpenPI's config of the same name.

Train: 30,000 steps of 256, of which 8 GPUs of 80 GB hold 32 each. Not measured here; OpenPI
publishes 98.8, 98.2, 98.0 and 92.4 % on LIBERO's four suites (Spatial, Object, Goal, 10).
  python experiments/train.py --config=configs/pi05_libero.py --workdir=runs/libero \
    --config.data.repo_id=physical-intelligence/libero --config.train.fsdp_devices=8

Mix three fine-tunes with learned coefficients. By arithmetic, not by measurement: three trees in
float32, their mix and its gradients are 67 GB of device memory.
  python experiments/mix.py --config=configs/pi05_libero.py --method=gradient_descent \
    --checkpoints=run0/30000,run1/30000,run2/30000 --validation=libero_val.npz --output=mixed

Model: action_dim 32, horizon 10, 200 prompt tokens, three cameras, proprio not in the prompt. Base:
gs://openpi-assets/checkpoints/pi05_base/params. `:debug` is the same program on a network of 0.6
million parameters; seconds on a laptop.
"""

import ml_collections

from configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = common.openpi_config(
        "pi05_base", pi05=True, action_horizon=10, discrete_state_input=False
    )
    config.data.update({"asset_id": "physical-intelligence/libero", "robot": "libero"})
    config.train.update({"batch_size": 256, "warmup_steps": 10_000, "ema_decay": 0.999})
    config.train.learning_rate = config.train.final_learning_rate = 5e-5
    if common.parse_arg(arg):
        common.shrink(config)
    return config
