"""AdamW as OpenPI sets it up: warm-up, cosine, global clip; parts of the tree may be frozen."""

from collections.abc import Sequence

import jax
import numpy as np
import optax

from policymix import trees
from policymix.structs import PyTree


def schedule(
    *, learning_rate: float, final_learning_rate: float, warmup_steps: int, decay_steps: int
) -> optax.Schedule:
    """Linear from learning_rate / (warmup_steps + 1) to the peak, then a cosine to the final."""
    if decay_steps <= warmup_steps:
        raise ValueError(
            f"decay_steps {decay_steps} counts from the start and must exceed warmup_steps "
            f"{warmup_steps}"
        )
    return optax.warmup_cosine_decay_schedule(
        init_value=learning_rate / (warmup_steps + 1),
        peak_value=learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=decay_steps,
        end_value=final_learning_rate,
    )


def learning_rates(schedule: optax.Schedule, num_steps: int) -> np.ndarray:
    """float32 [num_steps], the learning rate of every step."""
    return np.asarray(jax.vmap(schedule)(np.arange(num_steps)), np.float32)


def adamw(*, weight_decay: float = 1e-10, clip_norm: float = 1.0) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), b1 .9, b2 .95, after a global clip.

    Its updates are to be multiplied by the learning rate, which `state.update` does: the rate is
    then an argument of the compiled step, and runs that differ in it share one program.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-8),
        optax.add_decayed_weights(weight_decay),
        optax.scale(-1.0),
    )


def frozen_paths(params: PyTree, freeze: Sequence[str]) -> list[str]:
    """The paths that one of the regexes matches whole. ValueError where a regex matches nothing."""
    rules = [(pattern, True) for pattern in freeze]
    flags = trees.match(rules, list(trees.flatten(params)), what="freeze", default=False)
    return [path for path, frozen in flags.items() if frozen]


def freeze(
    optimizer: optax.GradientTransformation, params: PyTree, patterns: Sequence[str]
) -> optax.GradientTransformation:
    """The optimizer on what is not frozen; the frozen get no update and no optimizer state."""
    frozen = set(frozen_paths(params, patterns))
    if not frozen:
        return optimizer
    labels = trees.map_with_path(lambda path, _: "frozen" if path in frozen else "trained", params)
    return optax.multi_transform({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)
