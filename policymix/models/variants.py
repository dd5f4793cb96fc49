"""Sizes of Gemma's experts, by name or by their numbers.

Source: Gemma (arXiv:2403.08295); the names are OpenPI's.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from policymix.models.lora import Lora


@dataclasses.dataclass(frozen=True)
class Size:
    """Size of one expert. Experts that attend jointly share all but width, mlp_dim and `lora`."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    lora: Lora | None = None

    def __post_init__(self):
        if isinstance(self.lora, Mapping):
            object.__setattr__(self, "lora", Lora(**self.lora))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embeddings turn pairs")


_SIZES = {
    "dummy": Size(width=64, depth=4, mlp_dim=128, num_heads=8, num_kv_heads=1, head_dim=16),
    "gemma_300m": Size(
        width=1024, depth=18, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256
    ),
    "gemma_2b": Size(
        width=2048, depth=18, mlp_dim=16_384, num_heads=8, num_kv_heads=1, head_dim=256
    ),
}
_SIZES |= {
    f"{name}_lora": dataclasses.replace(_SIZES[name], lora=Lora(rank))
    for name, rank in (("gemma_300m", 32), ("gemma_2b", 16))
}


def size(variant: str | Size | Mapping[str, Any]) -> Size:
    """The size of a named variant, or one given by its numbers, {"width": 128, …}."""
    if isinstance(variant, Size):
        return variant
    if isinstance(variant, str):
        if variant not in _SIZES:
            raise ValueError(
                f"Gemma variant {variant!r}: expected one of {list(_SIZES)}, or the fields of "
                "variants.Size"
            )
        return _SIZES[variant]
    fields = [field.name for field in dataclasses.fields(Size)]
    if sorted({*variant, "lora"}) != sorted(fields):
        raise ValueError(f"a Gemma size has the fields {fields}, got {sorted(variant)}")
    return Size(**variant)


def named(size: Size) -> str | Size:
    """The name of the variant of these numbers, or the numbers."""
    return next((name for name, known in _SIZES.items() if known == size), size)


def check_joint(sizes: Sequence[Size]) -> None:
    """ValueError if these experts cannot attend jointly."""
    shared = [(s.depth, s.num_heads, s.num_kv_heads, s.head_dim) for s in sizes]
    if len(set(shared)) > 1:
        raise ValueError(
            "experts attend jointly, so they must share depth, num_heads, num_kv_heads and "
            f"head_dim; got {' and '.join(map(str, shared))}"
        )


def suffix(expert: int) -> str:
    """What expert `expert` appends to its modules' names."""
    return f"_{expert}" if expert else ""
