r"""open-pi-zero's policy of Google's Everyday Robot, trained on RT-1's fractal data: one camera,
chunks of 4 actions.

Train as `pi0_bridge`, on fractal in RLDS:
  python experiments/train.py --config=configs/pi0_fractal.py --workdir=runs/fractal \
    --config.data.path=resize_224 --config.data.mixture=fractal --config.train.accumulate=8

Random pictures through a published checkpoint, which needs `make venv EXTRAS=torch,hub`:
  python experiments/sample_actions.py --config=configs/pi0_fractal.py \
    --checkpoint=hf://allenzren/open-pi-zero/fractal_beta_step29576_2024-12-29_13-10_42.pt

Model: as `pi0_bridge`, with 8 numbers of proprio. `fractal_uniform_…` is of the same sizes.
Published, not measured here: 97.9 % picking up a coke can in SIMPLER, 46.6 to 78.7 % on four other
tasks, with 2 of the 4 actions executed. `:debug` is the same program on a network of half a million
parameters; seconds on a laptop.
"""

import ml_collections

from configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = common.open_pi_zero_config(proprio_dim=8)
    config.data.robot = "fractal"
    config.train.update({"num_steps": 29_576, "decay_steps": 29_576})
    config.evaluate.replan_steps = 2
    if common.parse_arg(arg):
        common.shrink(config)
    return config
