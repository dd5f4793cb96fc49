"""The small files beside model.safetensors from which LeRobot 0.4.4, or OpenPI in PyTorch, builds a
policy and its normalisation: written anew, of a model's configuration and statistics.

What robots' own transforms do, such as actions relative to the proprio, neither program keeps here.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from policymix import files
from policymix.checkpoints import safetensors
from policymix.models import variants
from policymix.models.config import Pi0Config
from policymix.transforms.normalize import FIELDS, Stats

CONFIG = "config.json"

_PRECISIONS = ("bfloat16", "float32")  # that both programs know
_STATE, _ACTION = "observation.state", "action"
_DEVICE = "cpu"  # there is one everywhere; --policy.device chooses another
_EPSILON = 1e-6  # that of `transforms.normalize`; LeRobot's own is 1e-8
# What LeRobot writes of every policy, and no configuration of ours says.
_DEFAULTS = {
    "n_obs_steps": 1,
    "device": _DEVICE,
    "use_amp": False,
    "use_peft": False,
    "push_to_hub": True,
    "repo_id": None,
    "private": None,
    "tags": None,
    "license": None,
    "pretrained_path": None,
    "num_inference_steps": 10,
    "time_sampling_scale": 0.999,
    "time_sampling_offset": 0.001,
    "min_period": 0.004,
    "rtc_config": None,
    "empty_cameras": 0,
    "gradient_checkpointing": False,
    "compile_model": False,
    "compile_mode": "max-autotune",
    "freeze_vision_encoder": False,
    "train_expert_only": False,
    "optimizer_lr": 2.5e-05,
    "optimizer_betas": [0.9, 0.95],
    "optimizer_eps": 1e-08,
    "optimizer_weight_decay": 0.01,
    "optimizer_grad_clip_norm": 1.0,
    "scheduler_warmup_steps": 1000,
    "scheduler_decay_steps": 30_000,
    "scheduler_decay_lr": 2.5e-06,
}


def write_lerobot(
    directory: pathlib.Path,
    model: Pi0Config,
    stats: Stats | None,
    *,
    cameras: Mapping[str, str],
    dtype: str,
    quantiles: bool | None = None,
) -> None:
    """Writes LeRobot's config.json, and its processors with their statistics.

    Mean and deviation normalise as ours do: (x - mean) / (std + 1e-6); the inverse there is
    y std + mean, without the 1e-6. With quantiles LeRobot divides by q99 - q01 where that is not 0,
    we by 1e-6 more, so that y + 1 is larger there by the factor 1 + 1e-6 / (q99 - q01). Statistics
    are float32 there.

    Without `stats` the processors normalise nothing, as LeRobot writes them of a policy that has
    seen no data; it takes the dataset's when it fine-tunes. LeRobot itself builds only policies of
    gemma_2b and gemma_300m, So400m/14 and 257,152 tokens; other sizes are written by their numbers.

    Args:
      directory: one that is still being made; its model.safetensors is somebody else's to write.
      cameras: {camera of the model: picture feature of the dataset}; without one, or with "", it is
        observation.images.CAMERA. LeRobot hands its policies what begins with "observation." only,
        so that others are written as observation.images.FEATURE.
      dtype: what LeRobot is to compute in.
      quantiles: whether quantiles normalise, instead of mean and deviation (None: model.pi05).

    Raises:
      ValueError: what LeRobot cannot express, statistics that are not the model's or lack a field,
        cameras that the model does not have, or two with one feature.
    """
    _check(model, dtype, "LeRobot", variant="openpi", expert_rope_base=10_000.0)
    mode = "QUANTILES" if (model.pi05 if quantiles is None else quantiles) else "MEAN_STD"
    arrays = {} if stats is None else _tensors(stats, model, mode)
    inputs = {name: _picture(model) for name in _pictures(model, cameras)}
    inputs[_STATE] = _vector("STATE", arrays, _STATE, model.proprio_dim)
    outputs = {_ACTION: _vector("ACTION", arrays, _ACTION, model.action_dim)}
    modes = {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}
    config = _config(model, dtype) | {
        "input_features": inputs,
        "output_features": outputs,
        "normalization_mapping": modes,
    }
    files.write_json(directory / CONFIG, config)
    before = {"eps": _EPSILON, "features": inputs | outputs, "norm_map": modes}
    after = {"eps": _EPSILON, "features": outputs, "norm_map": modes}
    _write_steps(directory, "policy_preprocessor", _before(model, before), arrays)
    _write_steps(
        directory,
        "policy_postprocessor",
        {"unnormalizer_processor": after, **_device()},
        arrays,
    )


def write_openpi(directory: pathlib.Path, model: Pi0Config, dtype: str) -> None:
    """Writes the config.json that OpenPI's converter to PyTorch leaves; `dtype`: of the tensors.

    Sizes that have no name there are written by their numbers, which OpenPI itself does not build.
    ValueError for what OpenPI cannot express.
    """
    fixed = {"variant": "openpi", "expert_rope_base": 10_000.0, "time_max_period": 4.0}
    _check(model, dtype, "OpenPI", **fixed)
    config = {"action_dim": model.action_dim, "action_horizon": model.action_horizon}
    files.write_json(directory / CONFIG, config | _experts(model) | {"precision": dtype})


def _check(model: Pi0Config, dtype: str, program: str, **fixed: Any) -> None:
    """ValueError for a precision, or fields of the model, that a program has no word for."""
    if dtype not in _PRECISIONS:
        raise ValueError(
            f"{program} knows the precisions {' and '.join(_PRECISIONS)}, not {dtype!r}; write the "
            "parameters in one of them"
        )
    for name, value in fixed.items():
        if (found := getattr(model, name)) != value:
            raise ValueError(
                f"{program} has no policy with {name}={found!r}, only with {value!r}, and would "
                "compute something else from these parameters; keep them as Orbax"
            )


def _experts(model: Pi0Config) -> dict[str, Any]:
    """Names of the experts' sizes, or their numbers; low-rank updates are merged by now."""
    found = {}
    for name in ("paligemma_variant", "action_expert_variant"):
        size = variants.named(dataclasses.replace(getattr(model, name), lora=None))
        if not isinstance(size, str):
            size = {k: v for k, v in dataclasses.asdict(size).items() if k != "lora"}
        found[name] = size
    return found


def _config(model: Pi0Config, dtype: str) -> dict[str, Any]:
    alpha = 1.0 if model.time_sampling == "uniform" else 1.5  # Beta(1, 1) is uniform
    return (
        {"type": "pi05" if model.pi05 else "pi0"}
        | _DEFAULTS
        | _experts(model)
        | {
            "dtype": dtype,
            "chunk_size": model.action_horizon,
            "n_action_steps": model.action_horizon,
            "max_state_dim": model.proprio_dim,
            "max_action_dim": model.action_dim,
            "time_sampling_beta_alpha": alpha,
            "time_sampling_beta_beta": 1.0,
            "max_period": model.time_max_period,
            "image_resolution": list(model.image_resolution),
            "tokenizer_max_length": model.max_token_len,
        }
    )


def _pictures(model: Pi0Config, cameras: Mapping[str, str]) -> list[str]:
    """LeRobot's names of the pictures, in the order in which the model sees them."""
    if unknown := sorted(c for c, name in cameras.items() if name and c not in model.image_keys):
        raise ValueError(
            f"cameras names {unknown[0]!r}, the model's are {', '.join(model.image_keys) or 'none'}"
        )
    found: dict[str, str] = {}
    for camera in model.image_keys:
        name = cameras.get(camera) or camera
        name = name if name.startswith("observation.") else f"observation.images.{name}"
        if name in found:
            raise ValueError(
                f"the cameras {found[name]!r} and {camera!r} both have the picture feature "
                f"{name!r}; LeRobot shows a policy each feature once"
            )
        found[name] = camera
    return list(found)


def _picture(model: Pi0Config) -> dict[str, Any]:
    # LeRobot writes the dataset's size, and pads pictures of any to image_resolution.
    return {"type": "VISUAL", "shape": [3, *model.image_resolution]}


def _vector(kind: str, arrays: Mapping[str, np.ndarray], name: str, padded: int) -> dict[str, Any]:
    """A feature as long as its statistics; as the model pads it where there are none."""
    size = arrays[f"{name}.mean"].size if arrays else padded
    return {"type": kind, "shape": [size]}


def _tensors(stats: Stats, model: Pi0Config, mode: str) -> dict[str, np.ndarray]:
    """What a state file holds. ValueError for statistics that do not serve this model."""
    needed = ("q01", "q99") if mode == "QUANTILES" else ("mean", "std")
    found = {}
    for name, key, dim in (
        (_ACTION, "actions", model.action_dim),
        (_STATE, "state", model.proprio_dim),
    ):
        if key not in stats:
            raise ValueError(f"the norm stats have no {key!r}, only {sorted(stats)}")
        values = {field: getattr(stats[key], field) for field in sorted(FIELDS)}
        if lacking := [field for field in needed if values[field] is None]:
            raise ValueError(
                f"the norm stats of {key!r} have no {' and no '.join(lacking)}, with which LeRobot "
                f"normalises a {'π0.5' if model.pi05 else 'π0'} by quantiles; recompute the "
                "statistics"
            )
        if (size := len(stats[key].mean)) > dim:
            raise ValueError(
                f"the norm stats of {key!r} have {size} dimensions, the model has {dim}; they are "
                "another model's"
            )
        for field, value in values.items():
            if value is not None:
                found[f"{name}.{field}"] = np.asarray(value, np.float32)
    return found


def _before(model: Pi0Config, normalizer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The steps from a robot's observation to the policy's input, by name, in their order."""
    start = {"rename_observations_processor": {"rename_map": {}}, "to_batch_processor": {}}
    tokenizer = {
        "max_length": model.max_token_len,
        "task_key": "task",
        "padding_side": "right",
        "padding": "max_length",
        "truncation": True,
        "tokenizer_name": "google/paligemma-3b-pt-224",
    }
    steps = {"tokenizer_processor": tokenizer, **_device()}
    normalize = {"normalizer_processor": normalizer}
    if model.discrete_state_input:
        # OpenPI writes proprio into the prompt as it is. LeRobot pads it with zeros to 32 numbers
        # unless it is told a size, which it forgets where it writes these files again.
        (size,) = normalizer["features"][_STATE]["shape"]
        words = {"pi05_prepare_state_tokenizer_processor_step": {"max_state_dim": size}}
        return start | normalize | words | steps
    # Also of a π0.5, whose prompt is then worded as π0's: LeRobot takes the steps that are named,
    # whatever the policy. Underscores and line breaks of an instruction it keeps; we do not.
    return start | {"pi0_new_line_processor": {}} | steps | normalize


def _device() -> dict[str, dict[str, Any]]:
    return {"device_processor": {"device": _DEVICE, "float_dtype": None}}


def _write_steps(
    directory: pathlib.Path,
    name: str,
    steps: Mapping[str, dict[str, Any]],
    arrays: Mapping[str, np.ndarray],
) -> None:
    """Writes a pipeline, and the statistics of its step that normalises."""
    entries = []
    for place, (step, config) in enumerate(steps.items()):
        entry = {"registry_name": step, "config": config}
        if arrays and step.endswith("normalizer_processor"):
            file = f"{name}_step_{place}_{step}.safetensors"
            layout = safetensors.Layout(((file, tuple(arrays)),), {}, index=False)
            safetensors.write(directory, arrays, layout)
            entry["state_file"] = file
        entries.append(entry)
    files.write_json(directory / f"{name}.json", {"name": name, "steps": entries})
