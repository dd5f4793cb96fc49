"""What the shapes of a parameter tree say of the policy that it belongs to: its sizes, and whether
it is a π0 or a π0.5. How a checkpoint's path is spelt says nothing.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from policymix import trees
from policymix.models import siglip, variants
from policymix.models.config import OPENPI_CAMERAS, Pi0Config
from policymix.models.lora import Lora
from policymix.structs import Params

_LLM, _IMG = "PaliGemma/llm/", "PaliGemma/img/"
_EXPERT = "PaliGemma/llm/.*_1/.*"
_BLOCK = _IMG + "Transformer/encoderblock/"


def fields(params: Params) -> dict[str, Any]:
    """The fields of Pi0Config that decide a tree, as this one has them.

    A PaliGemma alone has none of the action expert's; a tree that is no π0's has fewer still.

    Args:
      params: arrays, leaves or `jax.ShapeDtypeStruct`s: shapes alone are looked at.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in trees.flatten(params).items()}
    found: dict[str, Any] = {}
    for name, expert in (("paligemma_variant", 0), ("action_expert_variant", 1)):
        if (size := _told(_size, shapes, variants.suffix(expert))) is not None:
            found[name] = variants.named(size)
    found |= _told(_tower, shapes) or {}
    if embedding := shapes.get(_LLM + "embedder/input_embedding"):
        found["vocab_size"] = embedding[0]
    if "action_expert_variant" in found:
        found["pi05"] = _LLM + "final_norm_1/Dense_0/kernel" in shapes
    for name, path in (("action_dim", "action_in_proj"), ("proprio_dim", "state_proj")):
        if kernel := shapes.get(f"{path}/kernel"):
            found[name] = kernel[0]
    return found


def _told(reader: Callable[..., Any], *args: Any) -> Any:
    """What shapes say; None where they are of no π0: of another rank, or sizes that cannot be."""
    try:
        return reader(*args)
    except (ValueError, IndexError):
        return None


def _size(shapes: Mapping[str, tuple[int, ...]], end: str) -> variants.Size | None:
    """Of one expert, whose modules end so; None where the tree has no such expert."""
    layers = _LLM + "layers/"
    query, together = (shapes.get(f"{layers}attn/{n}{end}/w") for n in ("q_einsum", "qkv_einsum"))
    pair, gate = shapes.get(f"{layers}attn/kv_einsum{end}/w"), f"{layers}mlp{end}/gating_einsum"
    if gate not in shapes or (together is None and None in (query, pair)):
        return None
    depth, num_heads, width, head_dim = together[:1] + together[2:] if together else query
    rank = shapes.get(f"{gate}_lora_a", (0,))[-1]
    return variants.Size(
        width=width,
        depth=depth,
        mlp_dim=shapes[gate][-1],
        num_heads=num_heads,
        num_kv_heads=num_heads if together else pair[2],
        head_dim=head_dim,
        lora=Lora(rank) if rank else None,
    )


def _tower(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """Fields of the vision tower. As many patches as a square has are taken to be one."""
    query = shapes.get(_BLOCK + "MultiHeadDotProductAttention_0/query/kernel")
    names = (
        _IMG + "embedding/kernel",
        _BLOCK + "MlpBlock_0/Dense_0/kernel",
        _IMG + "pos_embedding",
    )
    if query is None or not shapes.keys() >= {*names}:
        return None
    patch, mlp, positions = (shapes[name] for name in names)
    depth, width, num_heads, _ = query
    size = siglip.Size(width, depth, mlp[-1], num_heads, patch[0])
    variant, changed_depth = siglip.named(size)
    told = {"siglip_variant": variant, "siglip_depth": changed_depth}
    side = math.isqrt(positions[1])
    return told if side**2 != positions[1] else told | {"image_resolution": (side * patch[0],) * 2}


def model(params: Params, **others: Any) -> Pi0Config:
    """The configuration that a tree belongs to, with OpenPI's defaults for what no tree tells.

    Args:
      others: fields that take the place of defaults, or of what the tree says.

    Raises:
      ValueError: the tree has no language model, so that it is no π0's, nor a PaliGemma's.
    """
    found = fields(params)
    if "paligemma_variant" not in found:
        raise ValueError(
            "the checkpoint has no language model, so it is neither a π0 nor a PaliGemma"
        )
    # Any expert that may attend jointly serves for a PaliGemma alone: nothing is asked of it.
    found.setdefault("action_expert_variant", found["paligemma_variant"])
    found.setdefault("image_keys", OPENPI_CAMERAS if "siglip_variant" in found else ())
    if "vocab_size" not in found:
        found["max_token_len"] = 0
    return Pi0Config(**found | others)


def paligemma(params: Params) -> dict[str, Any]:
    """The vision tower and the language model of a tree, without the action expert."""
    flat = trees.flatten(params)
    kept = [p for p in flat if p.startswith("PaliGemma/") and not re.fullmatch(_EXPERT, p)]
    return trees.unflatten({path: flat[path] for path in kept})


def check(expected: Params, found: Params, name: str, *, whole: bool = True) -> None:
    """ValueError where a tree is not that of the model: what policy it is, which fields of the
    config would say so, and which arrays differ.

    Args:
      expected: the shapes of the model's tree. name: what to call `found`.
      whole: whether `found` may have no more than `expected`.
    """
    flat, needed = trees.flatten(found), trees.flatten(expected)
    looked_at = flat if whole else {path: leaf for path, leaf in flat.items() if path in needed}
    differs = trees.difference(needed, looked_at, ("config.model", name))
    if differs is None:
        return
    ours, theirs = fields(expected), fields(found)
    apart = [n for n in dict.fromkeys([*ours, *theirs]) if ours.get(n) != theirs.get(n)]
    both = [[_plain(fields_.get(n, "absent")) for fields_ in (theirs, ours)] for n in apart]
    told = [f"{n} is {a} there, {b} here" for n, (a, b) in zip(apart, both, strict=True)]
    raise ValueError(
        f"config.model and {name} are not the same architecture; {name} holds {describe(found)}"
        f"{': ' if told else ''}{'; '.join(told)}. {differs}"
    )


def describe(params: Params) -> str:
    """What kind of policy a tree is, in words."""
    found = fields(params)
    sizes = [found[n] for n in ("paligemma_variant", "action_expert_variant") if n in found]
    if not sizes:
        return "a chunk-level learner" if is_chunk_level(params) else "no π0 that is known"
    kind = "π0.5" if found.get("pi05") else "π0"
    kind = kind if len(sizes) > 1 else "PaliGemma without action expert"
    names = [s if isinstance(s, str) else f"{s.width}-wide" for s in sizes]
    return f"a {kind} of {' and '.join(names)}"


def is_chunk_level(params: Params) -> bool:
    """Whether a tree is that of a chunk-level learner (`rl.networks`): a policy that is no π0."""
    parts = {path.split("/")[0] for path in trees.flatten(params)}
    return "policy" in parts and "PaliGemma" not in parts


def _plain(value: Any) -> str:
    """A value as a config takes it."""
    if dataclasses.is_dataclass(value):
        value = {k: v for k, v in dataclasses.asdict(value).items() if v is not None}
    return str(value)
