"""Adam as OpenPI sets it up: warm-up, cosine, global clip; and what may be set beside that: parts
of the tree frozen or at rates of their own, a pull to the start, moments in 8 bits.
"""

import dataclasses
import difflib
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from policymix import trees
from policymix.structs import PyTree
from policymix.training import eight_bit

NAMES = ("adamw", "adam", "adamw_8bit", "adam_8bit")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What makes an optimizer; hashable. Fields are named as in config.train.

    Attributes:
      name: one of NAMES; adam is without decay.
      clip_norm: of all gradients together; 0: no clip.
      learning_rates: (path regex, factor on the learning rate); the first match wins, else 1.
      pull: λ of a penalty λ/2 |θ - θ_0|² on the distance from the initial parameters, whose
        gradient joins the others behind the clip.
      freeze: path regexes of parameters that stay as they are.
    """

    name: str = "adamw"
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 1e-10
    clip_norm: float = 1.0
    learning_rates: tuple[tuple[str, float], ...] = ()
    pull: float = 0.0
    freeze: tuple[str, ...] = ()


def check(settings: Settings, shapes: PyTree) -> None:
    """ValueError, naming the field of config.train, for settings that cannot be.

    Args:
      shapes: the parameters, or anything with their paths.
    """
    if settings.name not in NAMES:
        near = difflib.get_close_matches(settings.name, NAMES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"config.train.optimizer is {settings.name!r}; there are {', '.join(NAMES)}{hint}"
        )
    for name in ("b1", "b2"):
        if not 0 <= getattr(settings, name) < 1:
            raise ValueError(
                f"config.train.{name} is {getattr(settings, name)}; expected 0 to below 1"
            )
    for name in ("weight_decay", "pull", "clip_norm", "eps"):
        if not 0 <= getattr(settings, name) < math.inf:
            raise ValueError(
                f"config.train.{name} is {getattr(settings, name)}; expected a number of at least 0"
            )
    frozen = set(frozen_paths(shapes, settings.freeze))
    paths = list(trees.flatten(shapes))
    trained = [path for path in paths if path not in frozen]
    for pattern, factor in settings.learning_rates:
        if not 0 <= factor < math.inf:
            raise ValueError(
                f"config.train.learning_rates gives {pattern!r} the factor {factor}; expected a "
                "number of at least 0"
            )
    try:
        _factors(settings.learning_rates, trained)
    except ValueError:
        _factors(settings.learning_rates, paths)  # another error, if it is none of freezing
        raise ValueError(
            "config.train.learning_rates has a rule whose parameters are all frozen, by "
            f"config.train.freeze or beside low-rank updates: the rules are "
            f"{[pattern for pattern, _ in settings.learning_rates]}; drop that one"
        ) from None


def make(settings: Settings) -> optax.GradientTransformation:
    """The optimizer, for the tree of trained parameters alone: clip, pull, Adam (Kingma and Ba
    2015, arXiv:1412.6980), decay (AdamW: Loshchilov and Hutter 2019, arXiv:1711.05101), factors.

    Its updates are to be multiplied by the learning rate, which `state.update` does: the rate is
    then an argument of the compiled step, and runs that differ in it share one program.
    """
    moments = {"b1": settings.b1, "b2": settings.b2, "eps": settings.eps}
    parts = [_pull(settings.pull)] if settings.pull else []
    narrow, clips = settings.name.endswith("_8bit"), settings.clip_norm > 0
    inside = settings.clip_norm if narrow and clips and not parts else None
    if clips and inside is None:
        parts.insert(0, _clip(settings.clip_norm))
    if narrow:
        parts += [eight_bit.scale_by_adam_8bit(**moments, max_norm=inside)]
    else:
        parts += [optax.scale_by_adam(**moments)]
    if settings.name.startswith("adamw"):
        parts += [optax.add_decayed_weights(settings.weight_decay)]
    if settings.learning_rates:
        parts += [_scale_by_path(settings.learning_rates)]
    return optax.chain(*parts, optax.scale(-1.0))


def frozen_paths(params: PyTree, freeze: Sequence[str]) -> list[str]:
    """The paths that one of the regexes matches whole.

    Raises:
      ValueError: a regex matches nothing, or nothing is left to train.
    """
    paths = list(trees.flatten(params))
    rules = [(pattern, True) for pattern in freeze]
    flags = trees.match(rules, paths, what="config.train.freeze", default=False)
    found = [path for path, frozen in flags.items() if frozen]
    if paths and len(found) == len(paths):
        raise ValueError(
            f"config.train.freeze {list(freeze)} matches all {len(paths)} parameters, so nothing "
            "is left to train: name fewer"
        )
    return found


def schedule(
    *, learning_rate: float, final_learning_rate: float, warmup_steps: int, decay_steps: int
) -> optax.Schedule:
    """Linear from learning_rate / (warmup_steps + 1) to the peak, then a cosine to the final."""
    if decay_steps <= warmup_steps:
        raise ValueError(
            f"config.train.decay_steps {decay_steps} counts from the start and must exceed "
            f"config.train.warmup_steps {warmup_steps}"
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


def _factors(rules: Sequence[tuple[str, float]], paths: Sequence[str]) -> dict[str, float]:
    return trees.match(rules, paths, what="config.train.learning_rates", default=1.0)


def _clip(max_norm: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` by one factor, which compilers fuse with what follows: that one
    writes a second tree of gradients.
    """

    def update(grads, params):
        del params
        factor = eight_bit.clip_factor(grads, max_norm)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)

    return optax.stateless(update)


def _scale_by_path(rules: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    def update(updates, params):
        del params
        factors = _factors(rules, list(trees.flatten(updates)))
        return trees.map_with_path(lambda path, leaf: factors[path] * leaf, updates)

    return optax.stateless(update)


def _pull(strength: float) -> optax.GradientTransformation:
    """Adds strength * (θ - θ_0) to gradients; θ_0 is the state."""

    def init(params):
        return {"initial": jax.tree.map(jnp.copy, params)}

    def update(grads, state, params=None):
        pulled = jax.tree.map(
            lambda g, theta, start: g + strength * (theta - start), grads, params, state["initial"]
        )
        return pulled, state

    return optax.GradientTransformation(init, update)
