"""Checkpoints of open-pi-zero: a pickled PyTorch state dict, read without running what is in it.

Its networks are π0's under other names, but for the order in which action and time enter the first
time layer; `config.model.variant = "open_pi_zero"` computes with them as it does.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from policymix.checkpoints import leaves

_NAMES = (  # theirs, and OpenPI's PyTorch names
    ("embed_tokens.", "paligemma_with_expert.paligemma.model.language_model.embed_tokens."),
    ("vision_tower.", "paligemma_with_expert.paligemma.model.vision_tower."),
    ("multi_modal_projector.", "paligemma_with_expert.paligemma.model.multi_modal_projector."),
    ("joint_model.mixtures.vlm.", "paligemma_with_expert.paligemma.model.language_model."),
    ("joint_model.mixtures.action.", "paligemma_with_expert.gemma_expert.model."),
    ("action_encoder.linear_1.", "action_in_proj."),
    ("action_encoder.linear_2.", "action_time_mlp_in."),
    ("action_encoder.linear_3.", "action_time_mlp_out."),
    ("proprio_encoder.", "state_proj."),
    ("action_decoder.", "action_out_proj."),
)
_PROPRIO, _ACTION = "joint_model.mixtures.proprio.", "joint_model.mixtures.action."
_NORM = "paligemma_with_expert.paligemma.model.language_model.norm.weight"


@dataclasses.dataclass(frozen=True, eq=False)
class Held(leaves.Leaf):
    """An array that is in memory, or mapped into it."""

    array: np.ndarray
    path: str
    where: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def reader(self) -> leaves.Reader:
        return _Reader(self.array)


class _Reader(leaves.Reader):
    def __init__(self, array: np.ndarray):
        self._flat = array.reshape(-1)

    def read(self, start: int, out: np.ndarray) -> None:
        out[...] = self._flat[start : start + len(out)]


def open_tensors(file: pathlib.Path) -> dict[str, leaves.Leaf]:
    """The tensors of a file, as `tensors` tells. Needs the extra `torch`.

    Raises:
      ValueError: no such checkpoint, or damaged.
    """
    return tensors(_state_dict(file), str(file))


def tensors(state: Mapping[str, np.ndarray], file: str) -> dict[str, leaves.Leaf]:
    """A state dict's tensors under OpenPI's PyTorch names.

    Raises:
      ValueError: it is another model's, or has low-rank parameters.
    """
    # torch.compile and DistributedDataParallel put their names in front.
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): x for name, x in state.items()}
    if lowrank := next((n for n in state if "lora" in n.lower()), None):
        raise ValueError(f"{file} holds the low-rank parameter {lowrank!r}; merge it first")
    _check_tied(state, file)
    found: dict[str, leaves.Leaf] = {}
    for name, array in state.items():
        for theirs, ours in _NAMES:
            if name.startswith(theirs):
                target = ours + name.removeprefix(theirs)
                if name == "action_encoder.linear_2.weight":  # [time, action] there
                    array = np.concatenate(np.split(array, 2, axis=1)[::-1], axis=1)
                found[target] = Held(array, target, file)
    if not any(name.startswith("state_proj") for name in found):
        raise ValueError(
            f"{file} is not a checkpoint of open-pi-zero: no proprio_encoder among its "
            f"{len(state)} tensors, such as {next(iter(state), 'none')!r}"
        )
    if _NORM not in found:  # the end of a stream that nothing reads
        width = found[_NORM.replace("norm.weight", "embed_tokens.weight")].shape[-1]
        found[_NORM] = Held(np.zeros(width, np.float32), _NORM, file)
    return found


def _check_tied(state: Mapping[str, np.ndarray], file: str) -> None:
    """ValueError where proprio and actions have networks of their own."""
    for name, array in state.items():
        twin = _ACTION + name.removeprefix(_PROPRIO)
        if name.startswith(_PROPRIO) and not np.array_equal(array, state.get(twin)):
            raise ValueError(
                f"{file}: {name!r} is not {twin!r}; only checkpoints whose proprio and action "
                "experts are one can be read"
            )


def _state_dict(file: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise ValueError(
            f"{file} is a PyTorch file, and torch is not installed: make venv EXTRAS=torch"
        ) from error
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # pickle's, zip's and torch's own, by version
        first = str(error).partition("\n")[0]
        raise ValueError(
            f"{file} cannot be read as tensors alone ({first}); it is damaged, or holds objects, "
            "which are never loaded"
        ) from error
    state = content.get("model", content) if isinstance(content, Mapping) else {}
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{file} holds no state dict under 'model'")
    return {name: _to_numpy(torch, tensor) for name, tensor in state.items()}


def _to_numpy(torch, tensor) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # numpy has none
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
