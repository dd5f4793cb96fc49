r"""Chunk-level offline RL on Meta-World's states, from attempts of mixed quality. Runs on a laptop.

Collect attempts, good and bad; mark the first frame in which the hand is at the object, holds it,
and has solved the task; learn; and measure:
  python experiments/collect_demos.py --config=configs/rl_metaworld.py --num_episodes=200 \
    --skills=expert,slow,biased,noisy,wandering --output=attempts
  python experiments/edit_dataset.py --operation=label_rewards --source=attempts --output=labelled \
    --reward='info.near_object>=1,info.grasp_success>=1,next.success>=1' --feature=subgoal
  python experiments/offline_rl.py --config=configs/rl_metaworld.py --config.data.path=labelled \
    --workdir=runs/rl
  python experiments/evaluate.py --config=configs/rl_metaworld.py --checkpoints=runs/rl/5000 \
    --output=evaluations/rl

One policy learns three tasks, and is told which by its prompt. What is compared:
--config.offline_rl.algorithm=cloning (of all attempts alike), chunk_soft and chunk_iql, at
--config.offline_rl.action_horizon=1, 5 and 10, from --config.offline_rl.seed=0, 1 and 2.

Of the 600 attempts 282 succeed: 120 of 120 of the expert, 79 of noisy, 50 of slow, 28 of wandering
and 5 of biased. A learner of 0.9 M parameters takes 23 ms of a core a step, 35 for chunk_soft, 5
for cloning.

The settings below were chosen with seed 100, at horizon 5 and 4000 steps, by 150 roll-outs (50 a
task, seeds from 500000). chunk_iql: 40 % [33, 48] at learning rate 3e-4 and temperature 0.1; at
1e-3 59 % [51, 66], with temperature 0.05 69 % [62, 76], with 0.02 66 % [58, 73]. Then, with smaller
embeddings of the prompt, which stayed, 71 % [64, 78], and of expectiles 0.7, this one, 0.5 and 0.9:
69 % [61, 76] and 41 % [34, 49] for the latter two; rewards for success alone: 55 % [47, 63].
chunk_soft at 1e-3 and 0.1: 46 % [38, 54]. Cloning of all at 1e-3: 46 % [38, 54]. But cloning of the
282 successes alone, a control that takes edit_dataset.py --operation=delete: 96 % [92, 98]. Where
successes are many and known as such, keep them and clone. README has the table of three seeds.

`:debug` takes four steps of a small network, on any reward that the attempts have.
"""

import ml_collections

from configs import common

TASKS = ("push-v3", "plate-slide-v3", "pick-place-v3")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    config = common.get_config()
    config.data.held_out = 0.0  # roll-outs are the judges
    r = config.offline_rl
    r.update({"action_horizon": 5, "reward_key": "subgoal", "max_token_len": 3})
    r.update({"pictures": False, "network": "plain", "hidden_dim": 256, "num_layers": 3})
    r.update({"learning_rate": 1e-3, "temperature": 0.05})
    r.update({"batch_size": 256, "num_steps": 5000, "updates_per_call": 50})
    r.update({"log_every": 500, "save_every": 5000})
    config.evaluate.env = "metaworld/" + ",".join(TASKS)
    config.evaluate.replan_steps = 0  # a chunk is played to its end
    if common.parse_arg(arg):
        r.update({"hidden_dim": 32, "num_layers": 2, "reward_key": "", "batch_size": 8})
        r.update({"num_steps": 4, "updates_per_call": 2, "log_every": 2, "save_every": 2})
        config.evaluate.update({"env": "metaworld/reach-v3", "num_episodes": 2, "max_steps": 20})
    return config
