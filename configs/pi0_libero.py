r"""π0 on LIBERO, as OpenPI's config of the same name; `:lora` is its low-memory version.

Train: 30,000 steps of 32. OpenPI asks for 70 GB of GPU memory, and for 22.5 GB with `:lora`; its
README has no hours, and none were measured here.
  python experiments/train.py --config=configs/pi0_libero.py --workdir=runs/libero \
    --config.data.repo_id=physical-intelligence/libero
  python experiments/train.py --config=configs/pi0_libero.py:lora --workdir=runs/libero_lora \
    --config.data.repo_id=physical-intelligence/libero --config.train.frozen_dtype=nf4

Mix three fine-tunes with learned coefficients. By arithmetic, not by measurement: three trees in
float32, their mix and its gradients are 65 GB of device memory.
  python experiments/mix.py --config=configs/pi0_libero.py --method=gradient_descent \
    --checkpoints=run0/30000,run1/30000,run2/30000 --validation=libero_val.npz --output=mixed

Model: action_dim 32, horizon 50, 48 prompt tokens, three cameras. Base:
gs://openpi-assets/checkpoints/pi0_base/params. `:debug` is the same program on a network of half a
million parameters; seconds on a laptop.
"""

import ml_collections

from configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = common.openpi_config("pi0_base", pi05=False)
    config.data.update({"asset_id": "physical-intelligence/libero", "robot": "libero"})
    config.data.delta_actions = (6, -1)  # as OpenPI trained its π0; not its π0.5
    words = common.words(arg, "lora")
    if "lora" in words:
        common.lora(config)
    if "debug" in words:
        common.shrink(config)
    return config
