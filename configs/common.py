"""The sections that every policy shares, and what their fields mean.

Used alone it has no model, which is enough for mixing without data:
  python experiments/mix.py --checkpoints=a,b,c --output=mixed
"""

import pathlib

import ml_collections

# Eight episodes that LeRobot wrote; `:debug` trains on their numbers, and learns nothing of use:
# the state lacks the block.
PUSHT = pathlib.Path(__file__).resolve().parents[1] / "tests/testdata/lerobot/pusht_v30_video"
OPENPI = "gs://openpi-assets/checkpoints"  # where OpenPI keeps what it released


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """`arg` is what follows the colon of --config=FILE:ARG; here it changes nothing."""
    parse_arg(arg)
    return ml_collections.ConfigDict(
        {
            "model": {},  # the fields of policymix.models.pi0.Pi0Config
            "data": {
                "path": "",  # a LeRobot or RLDS dataset, or several to train on together: a,b
                "repo_id": "",  # the same on the Hugging Face hub: lerobot/pusht
                # RLDS datasets of several robots: bridge, fractal, oxe_simple or droid; `path` is
                # then the folder that holds them.
                "mixture": "",
                "fractions": (),  # of a batch, one per dataset; (): by their frames
                # What its statistics are called beside the checkpoint; "": the dataset's folder.
                "asset_id": "",
                # A norm_stats.json or a checkpoint; "": those of train.init_from, else computed.
                "norm_stats": "",
                "quantile_rule": "exact",  # of computed ones; openpi: by its histograms
                # aloha, aloha_sim, libero, droid, droid_rlds, bridge, fractal, pusht, metaworld:
                # what the next six leave open is then as its table says.
                "robot": "",
                "state_key": "",  # features, a,b; "": the robot's, or observation.state
                "action_key": "",  # the same; "": the robot's, or action
                # {camera of the model: picture feature of the dataset, or "absent" where the robot
                # has no such camera}; "" is neither yet.
                "cameras": {},
                # Actions relative to the state, OpenPI's way: (6, -1) is six dimensions that are
                # and one that is not; (): none.
                "delta_actions": ml_collections.config_dict.placeholder(tuple),
                # Whether numbers pass through the robot's adapter; None: as its table says.
                "adapt": ml_collections.config_dict.placeholder(bool),
                # mean_std; quantiles, π0.5's: 1 % and 99 % become ± 1; bounds, open-pi-zero's: the
                # same, clipped, grippers left alone; none.
                "normalization": "",
                "fps": 0,  # what the datasets must have; of RLDS that does not say it, what it is
                "skip_bad_episodes": False,  # train without episodes that cannot be used
                "skip_unlabeled": False,  # and without RLDS episodes that have no instruction
                "augment": False,  # pictures in training, as OpenPI
                "cache_mb": 1000,  # pictures of a feature are kept decoded if they need no more
                "num_threads": 0,  # that make batches; 0: one per core
                "num_processes": 0,  # the same apart from training's own, each with its threads
                # paligemma, or the path of its SentencePiece .model; for small models bytes, or
                # words: a token each.
                "tokenizer": "bytes",
                "default_prompt": "",  # overrides the dataset's instructions
                # Fraction of the episodes that training never sees; 1: data kept for validation.
                "held_out": 0.1,
                "seed": 0,  # of that choice
            },
            "train": {
                "init_from": "",  # a checkpoint to start from; "": fresh parameters
                "init_missing": (),  # regexes of parameters that init_from may lack
                "freeze": (),  # regexes of parameters that stay as they are
                # How those are kept: float32, bfloat16, or nf4: matrices of layers in 4 bits, the
                # rest in bfloat16 (QLoRA).
                "frozen_dtype": "float32",
                "seed": 42,
                "batch_size": 32,
                "accumulate": 1,  # parts of a batch that are gone through one after another
                "num_steps": 30_000,
                # adamw, adam (without decay), adamw_8bit, adam_8bit (states in 8 bits, block-wise)
                "optimizer": "adamw",
                "learning_rate": 2.5e-5,  # the peak
                "final_learning_rate": 2.5e-6,
                "learning_rates": (),  # "PATH REGEX=FACTOR" on it; the first match wins
                "warmup_steps": 1000,
                "decay_steps": 30_000,
                "b1": 0.9,
                "b2": 0.95,
                "weight_decay": 1e-10,
                "pull": 0.0,  # to the initial parameters θ_0: gradients gain pull * (θ - θ_0)
                "clip_norm": 1.0,  # of all gradients together; 0: no clip
                "ema_decay": 0.99,  # 0: no average; the params item then holds the raw parameters
                # Of the loss: leave out actions beyond an episode's end; dimensions that the robot
                # lacks. OpenPI counts both.
                "mask_padded_steps": False,
                "mask_padded_dims": False,
                "fsdp_devices": 1,  # devices over which each parameter is split
                # "PATH REGEX=AXIS" that is split over them, or "PATH REGEX=none"; what no rule
                # matches is split as OpenPI does.
                "shard": (),
                "offload": False,  # the optimizer's states to the host's memory, between steps
                "log_every": 100,
                "save_every": 1000,
                "keep_period": 5000,  # checkpoints at its multiples are kept for good
                "max_to_keep": 1,  # of the others
                "eval_every": 1000,  # loss and accuracies on held-out episodes; 0: never
                "eval_batches": 4,
                "rollout_every": 0,  # roll-outs of `evaluate`; 0: never
                "tensorboard": True,  # event files beside metrics.jsonl
                "wandb": "",  # a Weights & Biases project, which needs the extra `wandb`
            },
            "mix": {
                # "": manual with --coefficients, interpolate with --base, else average.
                "method": "",
                "learning_rate": 0.05,
                "num_iterations": 50,
                "power": 2.0,  # inverse_loss: c ∝ 1 / loss^power
                "held_out": 0.2,  # fraction of the validation batches to report on, never select on
                # What to do when the inputs' statistics differ: equal (refuse), pool, average, or a
                # path.
                "norm_stats": "equal",
                "dtype": "",  # of the output; "": the inputs' (interpolate: the base's)
                "seed": 0,  # of the noise in the validation loss
                # Groups of parameters with coefficients of their own: vision, action_expert,
                # language, projections, or "NAME=PATH REGEX"; the first match wins.
                "groups": (),
                # Where a search keeps its checkpoints: memory, disk, or auto: memory if they fit.
                "search_in": "auto",
                "fsdp_devices": 1,  # devices over which parameters are split in a search
            },
            "offline_rl": _offline_rl(),
            "evaluate": {
                # SIMULATOR/TASK,TASK; TASK@LOW:HIGH starts in that part of the simulator's range.
                "env": "",
                "num_episodes": 100,  # for each task
                "seed": 1000,  # of the first episode's start and noise; the next ones count on
                "max_steps": 0,  # of an episode; 0: as many as the simulator is known for
                "replan_steps": 8,  # actions of a chunk that are played before the next; 0: all
                "num_flow_steps": 10,
                "num_workers": 0,  # processes with environments; 0: one per core
            },
            "serve": {},
        }
    )


def _offline_rl() -> dict:
    """docs/hyperparameters.md says of each field what it does. None: as the algorithm has it, see
    policymix.rl.config.DEFAULTS.
    """
    unsaid = ml_collections.config_dict.placeholder
    return {
        "settings": "",  # a JSON file of settings, as chunk-level programs before this one have
        "algorithm": "chunk_iql",  # or chunk_soft, cloning, qc, qc_fql
        "policy": "gaussian",  # or flow
        "action_horizon": 10,  # actions of a chunk
        # What of the data: `data` says which dataset, features and normalisation.
        # "": the first there is of reward, next.reward, subgoal, next.success and success.
        "reward_key": "",
        "chunk_reward": "sum",  # discounted; max; any: 1 where one of its rewards is above 0
        "reward_scale": 1.0,  # rewards are scale * reward + shift
        "reward_shift": 0.0,
        # Which episodes end because the task ended: auto, success, reward, always, never, or rlvla.
        "terminals": "auto",
        "tails": "pad",  # chunks that reach beyond their episode; drop: there are none
        "pictures": True,  # whether cameras are looked at
        "image_resolution": (256, 256),
        "language": True,  # whether the instruction is read
        "tokenizer": "words",  # as data.tokenizer, which is a proposing policy's
        "max_token_len": 16,
        "vocab_size": 1024,
        # Chunks that a policy's checkpoint proposes: candidates beside the dataset's own, or, with
        # chunk_source="policy", in their place.
        "proposals": "",
        "num_proposals": 8,
        "chunk_source": "dataset",
        # Losses.
        "discount": 0.99,
        "temperature": unsaid(float),  # T in exp(advantage / T)
        "max_weight": unsaid(float),  # at which these are clipped; 0: nowhere
        "normalize_weights": unsaid(bool),
        "expectile": 0.7,
        "entropy_temperature": 1e-3,
        "num_samples": 5,
        "num_critics": unsaid(int),
        "ema_decay": unsaid(float),  # of target networks; 0: none
        "distill_scale": 100.0,
        "lambda_v": 1.0,
        "lambda_pi": 1.0,
        # Networks.
        "network": unsaid(str),  # plain or fused
        "hidden_dim": 512,
        "feature_dim": 512,
        "num_layers": 4,
        "layer_norm": True,
        "min_std": 1e-3,
        "num_flow_steps": 10,
        "num_candidates": unsaid(int),  # of a flow policy, among which the critic chooses
        "dtype": "float32",  # of the computation; bfloat16
        # The run.
        "init_from": "",  # a learner's checkpoint to start from; "": fresh parameters
        "seed": 0,
        "batch_size": 256,
        "num_steps": 20_000,
        # Passes over the chunks, in place of num_steps; the last three below are then epochs.
        "num_epochs": 0,
        "learning_rate": 3e-4,
        "clip_norm": 0.0,
        "updates_per_call": 1,  # of the compiled program, which then need not wait for Python
        "log_every": 500,  # steps
        "max_to_keep": 1,
        "keep_period": 0,
        "save_every": 5000,
        "rollout_every": 0,  # roll-outs are of `evaluate`; 0: none
    }


def openpi_config(base: str, *, pi05: bool, **model) -> ml_collections.ConfigDict:
    """A policy of OpenPI's sizes, to be fine-tuned from a checkpoint that OpenPI released.

    Args:
      base: its name there, such as "pi05_base".
      model: fields of Pi0Config that differ from OpenPI's defaults for π0 (`pi05`: for π0.5).
    """
    config = get_config()
    config.model = ml_collections.ConfigDict(
        {
            "paligemma_variant": "gemma_2b",
            "action_expert_variant": "gemma_300m",
            "siglip_variant": "So400m/14",
            "siglip_depth": ml_collections.config_dict.placeholder(int),
            "vocab_size": 257_152,
            "pi05": pi05,
            "discrete_state_input": pi05,  # proprio is written into the prompt
            "action_dim": 32,
            "action_horizon": 50,
            "max_token_len": 200 if pi05 else 48,
            "image_keys": ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"),
            "image_resolution": (224, 224),
            "dtype": "bfloat16",
            "proprio_dim": ml_collections.config_dict.placeholder(int),  # action_dim
            "remat": True,
            "variant": "openpi",
            "expert_rope_base": 10_000.0,
            "time_max_period": ml_collections.config_dict.placeholder(float),  # OpenPI's
            "time_sampling": "beta",
        }
    )
    config.model.update(model)
    config.data.cameras = dict.fromkeys(config.model.image_keys, "")
    config.data.normalization = "quantiles" if pi05 else "mean_std"
    config.data.augment = True
    config.data.tokenizer = "paligemma"
    config.train.init_from = f"{OPENPI}/{base}/params"
    return config


def open_pi_zero_config(*, proprio_dim: int) -> ml_collections.ConfigDict:
    """A policy of open-pi-zero's sizes and conventions, to be trained from PaliGemma."""
    config = openpi_config(
        "",
        pi05=False,
        vocab_size=257_216,  # PaliGemma's, with Hugging Face's padding
        action_dim=7,
        action_horizon=4,
        max_token_len=20,
        image_keys=("base_0_rgb",),
        variant="open_pi_zero",
    )
    config.model.proprio_dim = proprio_dim
    config.data.cameras = {"base_0_rgb": ""}
    config.data.update({"normalization": "bounds", "skip_unlabeled": True})
    config.train.init_from = "hf://google/paligemma-3b-pt-224"
    config.train.update({"freeze": ("PaliGemma/llm/embedder/.*",), "optimizer": "adamw_8bit"})
    config.train.update({"b2": 0.999, "frozen_dtype": "bfloat16"})
    config.train.update({"batch_size": 1024, "learning_rate": 5e-5, "final_learning_rate": 5e-5})
    config.train.update({"warmup_steps": 200, "weight_decay": 0.0, "ema_decay": 0.0})
    config.evaluate.replan_steps = 4
    return config


def words(arg: str, *allowed: str) -> set[str]:
    """The words of what follows the colon of --config=FILE:WORD,WORD; `debug` is always one that
    may stand there. ValueError for any that is not `allowed`.
    """
    given = set(filter(None, arg.split(",")))
    known = (*allowed, "debug")
    if unknown := sorted(given - set(known)):
        choices = ", ".join(f"':{word}'" for word in known)
        raise ValueError(f"config argument {unknown[0]!r}: expected nothing or {choices}")
    return given


def parse_arg(arg: str) -> bool:
    """True for "debug", False for "". ValueError for anything else."""
    return "debug" in words(arg)


def lora(config: ml_collections.ConfigDict) -> None:
    """Turns a policy's config into OpenPI's low-memory version: low-rank updates of both experts,
    all else of the language model kept in bfloat16, no average.
    """
    config.model.paligemma_variant += "_lora"
    config.model.action_expert_variant += "_lora"
    config.train.update({"frozen_dtype": "bfloat16", "ema_decay": 0.0})


def shrink(config: ml_collections.ConfigDict) -> None:
    """Turns a policy's config into its `:debug` version: a network of half a million parameters, a
    few steps.
    """
    config.model.update(
        {
            "paligemma_variant": "dummy",
            "action_expert_variant": "dummy",
            "siglip_variant": "mu/28",
            "siglip_depth": 2,
            "vocab_size": 512,
            "action_dim": 8,
            "action_horizon": 6,
            "max_token_len": 24 if config.model.pi05 else 16,
            "dtype": "float32",
        }
    )
    config.train.update({"batch_size": 4, "num_steps": 4, "warmup_steps": 2, "decay_steps": 4})
    config.train.update({"log_every": 1, "save_every": 2, "keep_period": 2, "eval_every": 0})
    config.mix.num_iterations = 20
    config.data.update({"asset_id": "", "path": str(PUSHT), "robot": "", "mixture": ""})
    config.data.repo_id = ""
    config.data.cameras = dict.fromkeys(config.model.image_keys, "absent")
    config.data.update({"state_key": "", "action_key": "", "delta_actions": (), "fps": 0})
    config.data.adapt = None
    config.data.tokenizer = "words"  # prompts of so few tokens
    config.data.default_prompt = config.train.init_from = ""


def shrink_quickstart(sizes: ml_collections.ConfigDict) -> None:
    """Every stage of the quickstart in seconds; nothing is learned."""
    sizes.update({"pretraining_episodes": 4, "soup_episodes": 6, "validation_episodes": 4})
    sizes.update({"pretraining_steps": 4, "soup_steps": 4, "narrow_steps": 4, "narrow_episodes": 4})
    sizes.update({"soup_rollouts": 4, "narrow_rollouts": 4, "shifted_rollouts": 4})
    sizes.update({"pretraining_rollouts": 2})
    sizes.update({"small_learning_rates": (3e-4,), "merge_ratios": (0.0, 0.4, 0.5, 1.0)})


def shrink_offline_rl(config: ml_collections.ConfigDict) -> None:
    """Turns a learner's config into its `:debug` version, after `shrink`: small networks, four
    steps on PushT, whose camera is looked at in little.
    """
    r = config.offline_rl
    r.update({"hidden_dim": 32, "feature_dim": 32, "num_layers": 2, "image_resolution": (32, 32)})
    r.update({"max_token_len": 16, "vocab_size": 64, "action_horizon": 4, "reward_key": ""})
    r.update({"num_samples": 2, "num_flow_steps": 2, "num_proposals": 2, "proposals": ""})
    r.update({"batch_size": 8, "num_steps": 4, "num_epochs": 0, "updates_per_call": 1})
    r.update({"log_every": 1, "save_every": 2, "keep_period": 0, "rollout_every": 0})
    config.evaluate.replan_steps = 0
    if config.data.cameras:
        config.data.cameras[next(iter(config.data.cameras))] = "observation.image"
