"""The nouns that every floor shares, and one decorator that checks the shapes in a signature.

Dimension letters, here and everywhere: b batch, h action horizon, a action, p proprio, n
checkpoints, s tokens, d width, k heads, e ensemble; `hh ww` are picture height and width.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import beartype
import flax.struct
import jax
import jaxtyping
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

Array = jax.Array | np.ndarray
PyTree = Any
Params = Mapping[str, Any]  # nested dict of arrays; its paths are written "a/b/c"
Metrics = Mapping[str, Any]  # flat, keys with slashes: "critic/q_mean"
LossFn = Callable[
    [Params, Any, jax.Array], tuple[jax.Array, Metrics]
]  # loss_fn(params, batch, key)

_F = TypeVar("_F", bound=Callable)


def typechecked(function: _F) -> _F:
    """Checks the shapes in the signature at each call; under `jax.jit` only when it is traced."""
    return jaxtyping.jaxtyped(function, typechecker=beartype.beartype)


@flax.struct.dataclass
class Observation:
    """What the policy sees. Pictures are float in [-1, 1] or uint8 in 0..255 (x / 255 * 2 - 1)."""

    images: Mapping[str, Float[Array, "b hh ww 3"] | UInt8[Array, "b hh ww 3"]]
    image_masks: Mapping[
        str, Bool[Array, " b"]
    ]  # False: the camera is absent and attends to nothing
    proprio: Float[Array, "b p"]  # normalised; zero-padded to the action dimension for π0
    prompt_tokens: Int[Array, "b s"] | None = None
    prompt_mask: Bool[Array, "b s"] | None = None


@flax.struct.dataclass
class Batch:
    """A training or validation batch: observations and the action chunks that follow them."""

    observation: Observation
    actions: Float[Array, "b h a"]  # normalised, zero-padded to the model's action dimension
    action_mask: Bool[Array, "b h a"] | None = None  # True: counts in the loss; None: all do


@flax.struct.dataclass
class ChunkBatch:
    """Transitions of chunk-level reinforcement learning: what was seen, the chunk that was played,
    what it earned, and what was seen after it. Beyond the end of an episode a chunk repeats its
    last action.
    """

    observation: Observation
    actions: Float[Array, "b h a"]  # normalised
    # True: does not count: beyond the episode's end, or what it led to was not recorded.
    action_is_pad: Bool[Array, "b h"]
    rewards: Float[Array, " b"]  # of the chunk
    discounts: Float[Array, " b"]  # of the value after it: γ^steps, 0 where the task had ended
    next_observation: Observation
    has_next: Bool[Array, " b"]  # False: what comes after is not known; critics leave it out
    candidates: Float[Array, "b n h a"] | None = None  # chunks that another policy proposed here
