r"""Chunk-level offline RL on LIBERO with every setting of rlvla: to compare with, not to use.

  python experiments/offline_rl.py --config=configs/rlvla.py \
    --config.data.path=datasets/libero_spatial --workdir=runs/rlvla

Its loss of the value carries the log-probability of 70 numbers at temperature 1, and its weights
are not clipped: values grow by hundreds where returns are at most 1, and on a toy problem rlvla's
own losses became NaN on 3 of 3 seeds, in 1,900 to 3,100 steps. Weights do not overflow here; where
a loss is not finite the run ends with an error, and the checkpoint before it is whole.
configs/rl_libero.py is the same job with settings that are stable. State and actions are not
normalised, language is not read, and the last chunk of an episode ends a frame early, all of it as
there.

With the chunks of a policy in place of the demonstrated ones, as rlvla recommends, after
download.py --name=pi05_libero:
  python experiments/offline_rl.py --config=configs/rlvla.py \
    --config.data.path=datasets/libero_spatial --workdir=runs/rlvla_pi05 \
    --config.offline_rl.proposals=checkpoints/pi0/pi05_libero \
    --config.offline_rl.num_proposals=1 --config.offline_rl.chunk_source=policy

20 million parameters; with their moments 0.24 GB, by arithmetic. Not run on LIBERO here: no figure
of success is known, and rlvla gives none. `:debug` is four steps of a small network on PushT.
"""

import ml_collections

from configs import common, rl_libero


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = rl_libero.get_config()
    config.data.update({"normalization": "none", "held_out": 0.0})
    r = config.offline_rl
    r.update({"algorithm": "chunk_soft", "policy": "gaussian", "action_horizon": 10})
    r.update({"chunk_reward": "max", "terminals": "rlvla", "tails": "drop", "language": False})
    r.update({"discount": 0.99, "temperature": 1.0, "max_weight": 0.0, "normalize_weights": True})
    r.update({"entropy_temperature": 1.0, "num_samples": 5, "num_critics": 1, "ema_decay": 0.0})
    r.update({"network": "fused", "hidden_dim": 512, "feature_dim": 512, "min_std": 1e-6})
    r.update({"batch_size": 32, "num_epochs": 100, "learning_rate": 3e-4, "clip_norm": 0.0})
    r.update({"log_every": 100, "save_every": 10, "keep_period": 10})
    if common.parse_arg(arg):
        common.shrink(config)
        common.shrink_offline_rl(config)
    return config
