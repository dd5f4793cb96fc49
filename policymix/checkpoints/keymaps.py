"""Three namings of PyTorch π0 and π0.5 state dicts, and how their tensors lie in our tree.

A declared table and what follows from it: names and shapes in, names and index arithmetic out. A
leaf of ours holds all layers of a stack, and some hold two linear maps; a PyTorch tensor is one
part of it, transposed: a Linear's weight is (out, in), a flax kernel (in, out).

L Gemma layers, K SigLIP layers, v vocabulary, d and m width and mlp_dim of PaliGemma's Gemma, e and
f those of the action expert, n heads, h head_dim, w and r SigLIP's width and mlp_dim, s its heads,
c their dim, t patches, p side of a patch, a action dim, b proprio dim; g is 3 e, y is 2 e.
"""

import collections
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from policymix.models import siglip

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Leaves = dict[str, "Made"]

NAMINGS = ("openpi", "lerobot", "lerobot_first")  # LeRobot >= 0.4; <= 0.3 as first published
PALIGEMMA = "paligemma"  # Hugging Face's for PaliGemma alone: read, never written
_PALIGEMMA, _EXPERT = "paligemma_with_expert.paligemma.", "paligemma_with_expert.gemma_expert."
_VISION, _LANGUAGE = _PALIGEMMA + "model.vision_tower.", _PALIGEMMA + "model.language_model."
_PROJECTOR = _PALIGEMMA + "model.multi_modal_projector."
EMBEDDER, _EMBEDDING = "PaliGemma/llm/embedder/input_embedding", _LANGUAGE + "embed_tokens.weight"
_HEAD, _EXPERT_HEAD = _PALIGEMMA + "lm_head.weight", _EXPERT + "lm_head.weight"

# One array under two names. OpenPI's files hold only the second. LeRobot's (>= 0.4) hold both, no
# longer tied: training changes the first alone.
TIED = {_EMBEDDING: _HEAD}
# In PyTorch files but in no leaf of ours: the tied twin, the action expert's head over words, which
# π0 never asks, and the normalisation statistics that LeRobot <= 0.3 kept among the parameters.
_UNUSED = re.compile(rf"{_HEAD}|{_EXPERT_HEAD}|(un)?normalize_(inputs|targets|outputs)\..*")
# Regexes that match our paths and the tensor names of all three namings whole; the first wins.
GROUPS = {
    "vision": r"PaliGemma/img/.*|.*\.(vision_tower|multi_modal_projector)\..*",
    "action_expert": r"PaliGemma/llm/.*_1/.*|.*\.gemma_expert\..*",
    "language": r"PaliGemma/llm/.*|.*\.(language_model|lm_head)\..*",
    "projections": r"(model\.)?(state_proj|action_(in|out)_proj|(action_)?time_mlp_(in|out))[./].*",
}
_NETWORK = re.compile(rf"paligemma_with_expert\..*|{GROUPS['projections']}")
_FIRST = (  # OpenPI's prefixes, and those of LeRobot <= 0.3 for the same
    (_VISION, _PALIGEMMA + "vision_tower."),
    (_PROJECTOR, _PALIGEMMA + "multi_modal_projector."),
    (_LANGUAGE, _PALIGEMMA + "language_model.model."),
    (_HEAD, _PALIGEMMA + "language_model.lm_head.weight"),
)
# OpenPI's prefixes, and those of PaliGemma by itself: as published, and as saved since.
_VISION_MODEL = "vision_tower.vision_model."
_ALONE = (
    (_VISION + "vision_model.", (_VISION_MODEL, "model." + _VISION_MODEL, "vision_tower.")),
    (_PROJECTOR, ("multi_modal_projector.", "model.multi_modal_projector.")),
    (_LANGUAGE, ("language_model.model.", "model.language_model.")),
    (_HEAD, ("language_model.lm_head.weight", "lm_head.weight")),
)
# What a PaliGemma alone lacks of a π0.
NOT_PALIGEMMA = (GROUPS["action_expert"], GROUPS["projections"])

# The table: our path, tensor name, dims of the leaf, dims of the tensor as einops writes them (e'
# is another axis of length e). * is the layer, the leaf's first dim. [a,b] in path and name are two
# leaves; in the name alone, two tensors in one leaf, whose next dim is their index. A line without
# a tensor's dims is a kernel and a bias; a line of one word says which models have what follows.
_V, _E = _VISION + "vision_model.", _EXPERT + "model."
_VL, _TL, _EL = _V + "encoder.layers.*.", _LANGUAGE + "layers.*.", _E + "layers.*."
_BLOCK, _L = "PaliGemma/img/Transformer/encoderblock/", "PaliGemma/llm/layers/"
_MHA = _BLOCK + "MultiHeadDotProductAttention_0/"
_TABLE = f"""
pictures
PaliGemma/img/embedding/kernel | {_V}embeddings.patch_embedding.weight    | p p' 3 w | w 3 p p'
PaliGemma/img/embedding/bias   | {_V}embeddings.patch_embedding.bias      | w        | w
PaliGemma/img/pos_embedding    | {_V}embeddings.position_embedding.weight | 1 t w    | t w
{_BLOCK}LayerNorm_[0,1]/scale  | {_VL}layer_norm[1,2].weight              | K w      | w
{_BLOCK}LayerNorm_[0,1]/bias   | {_VL}layer_norm[1,2].bias                | K w      | w
{_MHA}[query,key,value]/kernel | {_VL}self_attn.[q,k,v]_proj.weight       | K w s c  | (s c) w
{_MHA}[query,key,value]/bias   | {_VL}self_attn.[q,k,v]_proj.bias         | K s c    | (s c)
{_MHA}out/kernel               | {_VL}self_attn.out_proj.weight           | K s c w  | w (s c)
{_MHA}out/bias                 | {_VL}self_attn.out_proj.bias             | K w      | w
{_BLOCK}MlpBlock_0/Dense_0     | {_VL}mlp.fc1                             | K w r
{_BLOCK}MlpBlock_0/Dense_1     | {_VL}mlp.fc2                             | K r w
PaliGemma/img/head             | {_PROJECTOR}linear                       | w d
PaliGemma/img/Transformer/encoder_norm/[scale,bias] | {_V}post_layernorm.[weight,bias] | w | w
prompts
{EMBEDDER} | {_EMBEDDING} | v d | v d
all
{_L}attn/kv_einsum/w         | {_TL}self_attn.[k,v]_proj.weight | L 2 1 d h | h d
{_L}attn/q_einsum/w          | {_TL}self_attn.q_proj.weight     | L n d h   | (n h) d
{_L}attn/attn_vec_einsum/w   | {_TL}self_attn.o_proj.weight     | L n h d   | d (n h)
{_L}mlp/gating_einsum        | {_TL}mlp.[gate,up]_proj.weight   | L 2 d m   | m d
{_L}mlp/linear               | {_TL}mlp.down_proj.weight        | L m d     | d m
{_L}[pre_attention,pre_ffw]_norm/scale | {_TL}[input,post_attention]_layernorm.weight | L d | d
PaliGemma/llm/final_norm/scale | {_LANGUAGE}norm.weight | d | d
actions
{_L}attn/kv_einsum_1/w       | {_EL}self_attn.[k,v]_proj.weight | L 2 1 e h | h e
{_L}attn/q_einsum_1/w        | {_EL}self_attn.q_proj.weight     | L n e h   | (n h) e
{_L}attn/attn_vec_einsum_1/w | {_EL}self_attn.o_proj.weight     | L n h e   | e (n h)
{_L}mlp_1/gating_einsum      | {_EL}mlp.[gate,up]_proj.weight   | L 2 e f   | f e
{_L}mlp_1/linear             | {_EL}mlp.down_proj.weight        | L f e     | e f
action_in_proj  | action_in_proj  | a e
action_out_proj | action_out_proj | e a
pi0
{_L}[pre_attention,pre_ffw]_norm_1/scale | {_EL}[input,post_attention]_layernorm.weight | L e | e
PaliGemma/llm/final_norm_1/scale | {_E}norm.weight | e | e
state_proj          | state_proj          | b e
action_time_mlp_in  | action_time_mlp_in  | y e
action_time_mlp_out | action_time_mlp_out | e e'
pi05
{_L}[pre_attention,pre_ffw]_norm_1/Dense_0 | {_EL}[input,post_attention]_layernorm.dense | L e g
PaliGemma/llm/final_norm_1/Dense_0 | {_E}norm.dense | e g
time_mlp_[in,out] | time_mlp_[in,out] | e e'
"""


def naming(names: Iterable[str]) -> str | None:
    """Which of `NAMINGS` these tensor names have, or PALIGEMMA; None if they are neither."""
    text = "\n" + "\n".join(names)
    if _EXPERT not in text:
        parts = [["\n" + name for name in names] for _, names in _ALONE[:3]]
        alone = all(any(name in text for name in names) for names in parts)
        return PALIGEMMA if alone else None
    if any(first in text for _, first in _FIRST):
        return "lerobot_first"
    return "openpi" if "\n" + _EXPERT in text else "lerobot"


def rename(name: str, source: str, target: str) -> str:
    """A tensor's name in another naming. What is not of π0's network keeps its name."""
    if source == PALIGEMMA and target == "openpi":
        for openpi, old_and_new in _ALONE:
            for prefix in old_and_new:
                if name.startswith(prefix):
                    return openpi + name.removeprefix(prefix)
        return name
    if unknown := {source, target} - set(NAMINGS):
        raise ValueError(f"naming {unknown.pop()!r}: expected one of {list(NAMINGS)}")
    plain = name if source == "openpi" else name.removeprefix("model.")
    if not _NETWORK.fullmatch(plain):
        return name
    for openpi, first in _FIRST:
        if source == "lerobot_first" and plain.startswith(first):
            plain = openpi + plain.removeprefix(first)
        if target == "lerobot_first" and plain.startswith(openpi):
            plain = first + plain.removeprefix(openpi)
    return plain if target == "openpi" else "model." + plain


class Piece(NamedTuple):
    """One foreign tensor, by its name in OpenPI's naming, and the part leaf[index] that it is.

    part = tensor.reshape(split).transpose(axes).reshape(part), where `tensor`, `part` are shapes.
    """

    name: str
    index: tuple[int, ...]
    tensor: Shape
    part: Shape
    split: Shape
    axes: tuple[int, ...]

    def to_part(self, tensor: np.ndarray) -> np.ndarray:
        """The part of the leaf, in any dtype; a view where numpy can give one."""
        _check({self.name: tensor.shape}, {self.name: self.tensor})
        return tensor.reshape(self.split).transpose(self.axes).reshape(self.part)

    def to_tensor(self, part: np.ndarray) -> np.ndarray:
        """The exact inverse of `to_part`."""
        _check({f"the part for {self.name}": part.shape}, {f"the part for {self.name}": self.part})
        split = part.reshape([self.split[axis] for axis in self.axes])
        return split.transpose(np.argsort(self.axes)).reshape(self.tensor)


class Made(NamedTuple):
    """A leaf's shape, and the pieces that fill it exactly, in C order of their index."""

    shape: Shape
    pieces: tuple[Piece, ...]


class _Rule(NamedTuple):
    """A leaf, and the tensors `names` that it is made of, with a * in every layer of a stack."""

    path: str
    names: list[str]
    leaf: list[str]
    tensor: list[list[str]]
    models: str

    def made(self, sizes: Mapping[str, int]) -> Made:
        """How the leaf is put together in a model of these sizes."""
        pair = len(self.names) > 1
        outer = ("*" in self.names[0]) + pair  # that many dims tell the pieces apart
        axes = [axis for group in self.tensor for axis in group]
        order = tuple(axes.index(axis) for axis in self.leaf[outer:] if axis != "1")
        split = tuple(sizes[axis[0]] for axis in axes)
        tensor = tuple(math.prod(sizes[axis[0]] for axis in group) for group in self.tensor)
        leaf = tuple(sizes[axis[0]] for axis in self.leaf)
        pieces = []
        for index in np.ndindex(leaf[:outer]):
            name = self.names[pair and index[-1]].replace("*", str(*index[:1]))
            pieces.append(Piece(name, index, tensor, leaf[outer:], split, order))
        return Made(leaf, tuple(pieces))


def _rules(table: str) -> Iterator[_Rule]:
    for line in table.strip().splitlines():
        path, *cells = (cell.strip() for cell in line.split("|"))
        if not cells:
            models = path
            continue
        rows = [(path, *cells)]
        if len(cells) == 2:
            (name, leaf), (i, o) = cells, cells[1].split()[-2:]
            rows = [(f"{path}/kernel", f"{name}.weight", leaf, f"{o} {i}")]
            rows += [(f"{path}/bias", f"{name}.bias", leaf.replace(f"{i} ", ""), o)]
        for path, name, leaf, tensor in rows:
            paths, names = _choices(path), _choices(name)
            groups = [group.strip("()").split() for group in re.findall(r"\(.*?\)|\S+", tensor)]
            for one, its in zip(paths, [names] if len(paths) == 1 else zip(names), strict=True):
                yield _Rule(one, list(its), leaf.split(), groups, models)


def _choices(text: str) -> list[str]:
    """The text with each of the words of its [a,b]; the text alone if it has none."""
    start, *rest = re.split(r"[\[\]]", text)
    return [start + one + rest[1] for one in rest[0].split(",")] if rest else [start]


_RULES = tuple(_rules(_TABLE))
_SIZES = [siglip.size(f"{x}/14") for x in ("mu", "Ti", "S", "M", "B", "L", "So400m", "H", "g", "G")]
_SIGLIP_HEADS = {size.width: size.num_heads for size in _SIZES}


def _active(has: Callable[[_Rule], bool]) -> list[_Rule]:
    """The rules of π0 or π0.5, whichever has more, or of neither; of vision tower and vocabulary if
    there are.
    """
    hits = collections.Counter(rule.models for rule in _RULES if has(rule))
    absent = {part for part in ("pictures", "prompts") if not hits[part]}
    if not hits["actions"] and not hits["pi0"] and not hits["pi05"]:
        absent |= {"actions", "pi0", "pi05"}  # a PaliGemma alone
    absent.add("pi0" if hits["pi05"] > hits["pi0"] else "pi05")
    return [rule for rule in _RULES if rule.models not in absent]


def _fit(rules, seen, sizes) -> Leaves:
    """The leaves; what `sizes` lacks is solved from `seen`, pairs of dims and shape."""
    sizes = {"1": 1, "2": 2, "3": 3, **sizes}
    for _ in range(2):  # (n h) is decided when h is
        # By votes: it is the odd shape that is refused later, and not all the others.
        votes = collections.defaultdict(collections.Counter)
        for dims, shape in seen:
            for group, length in zip(dims, shape, strict=False):
                new = {axis[0] for axis in group} - sizes.keys()
                rest = math.prod(sizes.get(axis[0], 1) for axis in group)
                if len(new) == 1 and rest:
                    votes[new.pop()][length // rest] += 1
        sizes = {x: counter.most_common(1)[0][0] for x, counter in votes.items()} | sizes
        sizes |= {"g": 3 * sizes.get("e", 0), "y": 2 * sizes.get("e", 0)}
        if "s" not in sizes and (width := sizes.get("w")):
            if width not in _SIGLIP_HEADS:
                raise ValueError(f"no SigLIP is {width} wide: pass the config, for its heads")
            sizes["s"] = _SIGLIP_HEADS[width]
    return {rule.path: rule.made(collections.defaultdict(int, sizes)) for rule in rules}


def _check(found: Shapes, expected: Shapes) -> None:
    """ValueError that names what is missing, what is unknown, and both shapes where they differ."""
    if lora := [name for name in found if "lora_" in name]:
        raise ValueError(f"{lora[0]} belongs to a LoRA adapter: merge it into its model first")
    faults = [f"{name} is missing" for name in expected if name not in found]
    for name, shape in found.items():
        if name not in expected:
            faults.append(f"{name} {shape} is unknown")
        elif shape != expected[name]:
            faults.append(f"{name} has shape {shape}, expected {expected[name]}")
    if faults:
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise ValueError(f"not the parameters of a π0: {', '.join(faults[:4])}{more}")


def leaves(tensors: Shapes, *, siglip_heads: int | None = None) -> tuple[Leaves, list[str]]:
    """Our leaves from shapes of PyTorch tensors in OpenPI's naming; and the tensors not used.

    The vision tower may be absent, and so may the vocabulary with its heads. `siglip_heads` None:
    as SigLIP's variants of this width. ValueError where a tensor is missing, unknown, or of a shape
    that does not fit the others.
    """
    embedding = _HEAD if _HEAD in tensors and _EMBEDDING not in tensors else _EMBEDDING
    unused = [name for name in tensors if _UNUSED.fullmatch(name) and name != embedding]
    used = {name: tuple(tensors[name]) for name in tensors if name not in unused}
    # A head over words means that there is a vocabulary, so its embedding must be there.
    present = used.keys() | ({_EMBEDDING} if {_HEAD, _EXPERT_HEAD} & tensors.keys() else set())
    rules = _active(lambda rule: any(n.replace("*", "0") in present for n in rule.names))
    rules = [r._replace(names=[embedding]) if r.path == EMBEDDER else r for r in rules]
    stacks = {"K": r".*encoder\.layers\.(\d+)\.", "L": r".*model\.layers\.(\d+)\."}
    layers = {x: {m[1] for name in used if (m := re.match(stacks[x], name))} for x in stacks}
    sizes = {x: len(indices) or 1 for x, indices in layers.items()}
    sizes |= {"s": siglip_heads} if siglip_heads else {}
    unsized = _fit(rules, [], sizes)  # so far only the names in it are right
    dims = {piece.name: rule.tensor for rule in rules for piece in unsized[rule.path].pieces}
    made = _fit(rules, [(dims[name], used[name]) for name in dims if name in used], sizes)
    _check(used, {piece.name: piece.tensor for one in made.values() for piece in one.pieces})
    return made, unused


def tensors(shapes: Shapes) -> Leaves:
    """From shapes of our leaves, by path: what `leaves` gives for that model, with its errors."""
    rules = _active(lambda rule: rule.path in shapes)
    dims = {rule.path: [[axis] for axis in rule.leaf] for rule in rules}
    made = _fit(rules, [(dims[path], shapes[path]) for path in dims if path in shapes], {})
    _check(shapes, {path: one.shape for path, one in made.items()})
    return made


def extra_tensors(shapes: Shapes) -> dict[str, tuple[str, Shape]]:
    """What a whole PyTorch file has beside `tensors`: name → ("tied" or "zeros", shape)."""
    tied, width = shapes.get(EMBEDDER, ()), shapes["action_in_proj/bias"]
    heads = {_HEAD: ("tied", tied), _EXPERT_HEAD: ("zeros", (*tied[:1], *width))}
    return heads if tied else {}
