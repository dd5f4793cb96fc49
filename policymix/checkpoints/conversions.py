"""Leaves that are made of others as they are read, and sinks that take them apart as they are
written: stacks of PyTorch tensors, and low-rank updates.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from policymix.checkpoints import keymaps, leaves
from policymix.checkpoints.leaves import Leaf

LORA = ("lora_a", "lora_b")
_SUMMED_HEADS = re.compile(r"attn_vec_einsum(_\d+)?/w$")


@dataclasses.dataclass(frozen=True, eq=False)
class PiecedLeaf(Leaf):
    """A leaf of our tree whose parts are PyTorch tensors, transposed as they are read."""

    shape: tuple[int, ...]
    path: str
    pieces: tuple[keymaps.Piece, ...]
    tensors: Mapping[str, Leaf]  # by name in OpenPI's naming

    @property
    def where(self) -> str:
        return self.tensors[self.pieces[0].name].where

    @functools.cached_property
    def dtype(self) -> np.dtype:
        dtypes = [self.tensors[piece.name].dtype for piece in self.pieces]
        return np.dtype(functools.reduce(jnp.promote_types, dtypes))

    @functools.cached_property
    def block(self) -> int:
        if all(_in_order(piece) for piece in self.pieces):
            return 1
        return math.prod(self.pieces[0].part)

    @property
    def stretch(self) -> int:
        return self.block

    def reader(self) -> leaves.Reader:
        return _Joined(self) if self.block == 1 else _Pieces(self)


def _in_order(piece: keymaps.Piece) -> bool:
    """Whether the elements of a tensor lie in the order of ours."""
    moved = [axis for axis in piece.axes if piece.split[axis] != 1]
    return moved == sorted(moved)


class _Pieces(leaves.Slabs):
    def slab(self, position: int) -> tuple[int, np.ndarray]:
        leaf = self._leaf
        size = math.prod(leaf.pieces[0].part)
        piece = leaf.pieces[position // size]
        part = piece.to_part(leaf.tensors[piece.name].read())
        part = np.ascontiguousarray(part, leaf.dtype).reshape(-1)
        return position // size * size, part


class _Joined(leaves.Reader):
    """Reads pieces that need no transposition one after another."""

    def __init__(self, leaf: PiecedLeaf):
        self._leaf, self._open = leaf, (None, None)

    def read(self, start: int, out: np.ndarray) -> None:
        leaf, done = self._leaf, 0
        size = math.prod(leaf.pieces[0].part)
        while done < len(out):
            number, inside = divmod(start + done, size)
            count = min(len(out) - done, size - inside)
            tensor, target = leaf.tensors[leaf.pieces[number].name], out[done : done + count]
            if self._open[0] != number:
                self.close()
                self._open = number, tensor.reader()
            if tensor.dtype == leaf.dtype:
                self._open[1].read(inside, target)
            else:
                raw = np.empty(count, tensor.dtype)
                self._open[1].read(inside, raw)
                target[...] = raw
            done += count

    def close(self) -> None:
        if self._open[1] is not None:
            self._open[1].close()
        self._open = None, None


class PiecedSink(leaves.Sink):
    """Takes leaves of our tree, and writes the tensors that they are made of."""

    def __init__(
        self,
        inner: leaves.Sink,
        made: Mapping[str, keymaps.Made],
        names: Mapping[str, Sequence[str]],
    ):
        """`names`: where each tensor goes, by its name in OpenPI's naming: tied twins are two."""
        self.inner, self._made, self._names = inner, made, names

    def block(self, path: str) -> int:
        pieces = self._made[path].pieces
        return 1 if all(map(_in_order, pieces)) else max(math.prod(pieces[0].part), 1)

    def write(self, path: str, start: int, values: np.ndarray) -> None:
        pieces, done = self._made[path].pieces, 0
        size = math.prod(pieces[0].part)
        while done < len(values):
            number, inside = divmod(start + done, size)
            count = min(len(values) - done, size - inside)
            piece, part = pieces[number], values[done : done + count]
            if not _in_order(piece):
                part = np.ascontiguousarray(piece.to_tensor(part.reshape(piece.part))).reshape(-1)
            for name in self._names.get(piece.name, ()):
                self.inner.write(name, inside, part)
            done += count

    def finish(self) -> None:
        self.inner.finish()

    def close(self) -> None:
        self.inner.close()


def tree_of(
    tensors: Mapping[str, Leaf], naming: str, where: str, siglip_heads: int | None = None
) -> dict[str, Leaf]:
    """The leaves of our tree, by path, from a π0's tensors.

    Raises:
      ValueError: some are missing, unknown, or of shapes that do not fit; the message says `where`.
    """
    named = {keymaps.rename(name, naming, "openpi"): leaf for name, leaf in tensors.items()}
    shapes = {name: leaf.shape for name, leaf in named.items()}
    try:
        made, _ = keymaps.leaves(shapes, siglip_heads=siglip_heads)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return {path: PiecedLeaf(one.shape, path, one.pieces, named) for path, one in made.items()}


def renamed(
    tensors: Mapping[str, Leaf], source: str, target: str, wanted: Sequence[str]
) -> dict[str, Leaf]:
    """The tensors under the names that another naming has for them.

    Of the embedding and its tied head one may be missing, or be wanted under a name that is not
    there: the embedding serves both, since training changes it alone.
    """
    named = {keymaps.rename(name, source, target): leaf for name, leaf in tensors.items()}
    for embedding, head in keymaps.TIED.items():
        pair = [keymaps.rename(name, "openpi", target) for name in (embedding, head)]
        value = named.get(pair[0], named.get(pair[1]))
        if value is not None:
            named |= {name: value for name in pair if name in wanted}
            named = {n: leaf for n, leaf in named.items() if n not in pair or n in wanted}
    return named


@dataclasses.dataclass(frozen=True, eq=False)
class LoraLeaf(Leaf):
    """w + scale * A B over the last two axes, summed in float32 or wider as it is read, and rounded
    to the widest dtype of the three.

    The heads of `attn_vec_einsum` [l, n, h, d] share one update: OpenPI multiplies x_n A_n and sums
    over the heads n before it multiplies by B_n and sums again, so that the weight of head n
    becomes w_n + A_n Σ_m B_m.
    """

    weight: Leaf
    a: Leaf
    b: Leaf
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def path(self) -> str:
        return self.weight.path

    @property
    def where(self) -> str:
        return self.weight.where

    @property
    def dtype(self) -> np.dtype:
        dtypes = (self.weight.dtype, self.a.dtype, self.b.dtype)
        return np.dtype(functools.reduce(jnp.promote_types, dtypes))

    @property
    def block(self) -> int:
        return math.prod(self.shape[-2:])

    @property
    def stretch(self) -> int:
        return max(self.block, self.weight.stretch)

    def reader(self) -> leaves.Reader:
        return _Merging(self)


class _Merging(leaves.Slabs):
    """Reads one matrix after another."""

    def __init__(self, leaf: LoraLeaf):
        super().__init__(leaf)
        self._weight = leaf.weight.reader()
        wide = np.dtype(jnp.promote_types(leaf.dtype, np.float32))
        a, b = leaf.a.read().astype(wide), leaf.b.read().astype(wide) * wide.type(leaf.scale)
        if _SUMMED_HEADS.search(leaf.path):
            b = np.broadcast_to(b.sum(axis=-3, keepdims=True), b.shape)
        self._a, self._b = (x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:]) for x in (a, b))

    def slab(self, position: int) -> tuple[int, np.ndarray]:
        leaf = self._leaf
        number = position // leaf.block
        weight = np.empty(leaf.block, leaf.weight.dtype)
        self._weight.read(number * leaf.block, weight)
        total = self._a[number] @ self._b[number]
        total += weight.reshape(total.shape).astype(total.dtype)
        return number * leaf.block, total.reshape(-1).astype(leaf.dtype, copy=False)

    def close(self) -> None:
        self._weight.close()


def merge_lora(
    found: Mapping[str, Leaf], where: str, scale: Callable[[str], float] = lambda path: 1.0
) -> tuple[dict[str, Leaf], int]:
    """(leaves with low-rank updates added to what they update, how many there were).

    Args:
      scale: alpha / rank of an attention weight, by its path. OpenPI does not scale feed-forward
        layers, and its variants have alpha = rank, so that all is 1.

    Raises:
      ValueError: a factor lacks its partner or its weight, or shapes do not fit.
    """
    plain = {path: leaf for path, leaf in found.items() if not path.endswith(LORA)}
    firsts = [path for path in found if path.endswith(LORA[0])]
    seconds = {path for path in found if path.endswith(LORA[1])}
    for path in firsts:
        other = path.removesuffix(LORA[0]) + LORA[1]
        # attn/q_einsum/lora_a beside attn/q_einsum/w, mlp/linear_lora_a beside mlp/linear
        stem = path.removesuffix(LORA[0])
        target = stem + "w" if stem.endswith("/") else stem.removesuffix("_")
        if other not in seconds or target not in plain:
            raise ValueError(
                f"{where}: {path!r} is half of a low-rank update, and "
                f"{other if other not in seconds else target!r} is missing"
            )
        weight, a, b = plain[target], found[path], found[other]
        rank = a.shape[-1:]
        expected = (*weight.shape[:-1], *rank), (*weight.shape[:-2], *rank, *weight.shape[-1:])
        if len(weight.shape) < 2 or (a.shape, b.shape) != expected:
            raise ValueError(
                f"{where}: {path!r} {a.shape} and {other!r} {b.shape} do not fit {target!r} "
                f"{weight.shape}"
            )
        seconds.discard(other)
        plain[target] = LoraLeaf(weight, a, b, scale(target) if "/attn/" in target else 1.0)
    if seconds:
        raise ValueError(f"{where}: {min(seconds)!r} is half of a low-rank update")
    return plain, len(firsts)
