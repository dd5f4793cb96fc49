r"""open-pi-zero's policy of a WidowX arm, trained on BridgeData V2: one camera, chunks of 4
actions.

Train, from PaliGemma, with 8-bit AdamW and frozen text embeddings, on BridgeData V2 in RLDS (the
folder that holds `bridge_dataset/`); `accumulate` divides the 1,024 examples of a step into parts
that fit. That program's authors tell 1.5 to 2 days on 8 L40, 8 to 12 hours on 8 H100, at most 40 GB
a GPU with 16 examples; not measured here. Pictures are augmented as OpenPI's, less than there.
  python experiments/train.py --config=configs/pi0_bridge.py --workdir=runs/bridge \
    --config.data.path=resize_224 --config.data.mixture=bridge --config.train.accumulate=8

Random pictures through a published checkpoint, which needs `make venv EXTRAS=torch,hub` (or a copy
in Orbax, which needs nothing):
  python experiments/sample_actions.py --config=configs/pi0_bridge.py \
    --checkpoint=hf://allenzren/open-pi-zero/bridge_beta_step19296_2024-12-26_22-30_42.pt
  python experiments/convert.py --config=configs/pi0_bridge.py --format=orbax --output=bridge \
    --checkpoint=hf://allenzren/open-pi-zero/bridge_beta_step19296_2024-12-26_22-30_42.pt

Model: π0 with that program's conventions (`variant`), 3.2 B parameters; 7 numbers of proprio and 7
of actions, 20 prompt tokens, one picture of 224 × 224. `bridge_uniform_…` is of the same sizes.
Actions come out normalised to [-1, 1] by the 1 % and 99 % quantiles of its dataset. Published, not
measured here: 47.9 to 85.4 % on four SIMPLER tasks. `:debug` is the same program on a network of
half a million parameters; seconds on a laptop.
"""

import ml_collections

from configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = common.open_pi_zero_config(proprio_dim=7)
    config.data.robot = "bridge"
    config.train.update({"num_steps": 19_296, "decay_steps": 19_296})
    if common.parse_arg(arg):
        common.shrink(config)
    return config
