"""Low-rank updates of weight matrices, under OpenPI's parameter names.

A weight w [..., i, o] has beside it A [..., i, r] (`lora_a`) and B [..., r, o] (`lora_b`), and acts
as w + scale * A B, scale = alpha / r. Attention is scaled so; OpenPI's feed-forward layers are not
scaled at all, and neither are ours.
Source: Hu et al. 2021 (arXiv:2106.09685); names, scaling and initial values are OpenPI's.
"""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp

PARAMETERS = ".*lora.*"  # the regex of what is trained


@dataclasses.dataclass(frozen=True)
class Lora:
    """A rank, and alpha (None: the rank, as in OpenPI's variants, so that the scale is 1)."""

    rank: int
    alpha: float | None = None

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"Lora.rank is {self.rank}; at least 1 is needed")

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


def factors(module: nn.Module, prefix: str, shape: tuple[int, ...], lora: Lora):
    """Declares `prefix`lora_a and `prefix`lora_b of a weight of this shape. Both start at random,
    as OpenPI's do, so that a fresh update is small and not zero.
    """
    init = nn.initializers.normal(0.01)
    a = module.param(f"{prefix}lora_a", init, (*shape[:-1], lora.rank))
    b = module.param(f"{prefix}lora_b", init, (*shape[:-2], lora.rank, shape[-1]))
    return a, b


def einsum(equation: str, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """What A B adds to einsum(equation, x, w), computed in x's dtype.

    An axis of the weight that `equation` sums over besides the second to last is summed over in A
    and in B apart, as in OpenPI: "btnh,nhd->btd" adds (Σ_n x_n A_n) (Σ_n B_n).
    """
    inputs, weight, output = re.fullmatch(r"(.*),(.*)->(.*)", equation).groups()
    *_, i, o = weight
    hidden = output.replace(o, "r")
    low = jnp.einsum(f"{inputs},{weight.replace(o, 'r')}->{hidden}", x, a.astype(x.dtype))
    return jnp.einsum(f"{hidden},{weight.replace(i, 'r')}->{output}", low, b.astype(x.dtype))


def freeze(language_model: Lora | None, action_expert: Lora | None) -> tuple[str, ...]:
    """Regexes of what OpenPI keeps fixed when these two have low-rank updates.

    Whatever has updates keeps its own weights; vision tower and projections are trained. Without
    any update nothing is kept.
    """
    plain = r"(?!.*lora)"
    if language_model is not None and action_expert is not None:
        return (plain + ".*llm.*",)
    if language_model is not None:
        return (plain + r"(?!.*llm.*_1).*llm.*",)
    if action_expert is not None:
        return (plain + ".*llm.*_1.*",)
    return ()
