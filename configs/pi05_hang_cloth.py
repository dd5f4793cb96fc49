r"""π0.5 on two ARX arms that hang clothes: Task C of kai0, whose model arithmetic calls it by this
name.

Mix three fine-tunes with learned coefficients. By arithmetic, not by measurement: three trees in
float32, their mix and its gradients are 67 GB of device memory.
  python experiments/mix.py --config=configs/pi05_hang_cloth.py --method=gradient_descent \
    --checkpoints=run1/90000,run2/90000,run3/90000 --validation=hang_cloth_val.npz --output=mixed

Known, from kai0's published `pi05_hang_cloth_normal`: OpenPI's π0.5 unchanged (action_dim 32,
horizon 50, 200 prompt tokens with proprio among them), 14 numbers of state and absolute joint
targets, three cameras, one prompt, 100,000 steps of batches of 256. Not published: the asset id of
the statistics (its path on their disk), and which base was used; π0.5's is assumed.

To set: `config.train.init_from` if you began at another base, and `config.data.asset_id` if a
checkpoint has several. kai0's pickles of validation batches can be converted
(docs/troubleshooting.md). No success rate was measured. `:debug` is the same program on a network
of 0.6 million parameters; seconds on a laptop.
"""

import ml_collections

from configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = common.openpi_config("pi05_base", pi05=True)
    config.data.default_prompt = "Fetch and hang the cloth."
    config.data.cameras = {
        "base_0_rgb": "observation.images.top_head",
        "left_wrist_0_rgb": "observation.images.hand_left",
        "right_wrist_0_rgb": "observation.images.hand_right",
    }
    config.train.update({"batch_size": 256, "num_steps": 100_000})
    if common.parse_arg(arg):
        common.shrink(config)
    return config
