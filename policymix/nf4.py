"""Matrices of layers in 4 bits: NormalFloat, one absolute maximum for every 64 numbers.

A number is the nearest of 16 levels, quantiles of a normal distribution, times its block's scale:
4.25 bits each, with the scales in bfloat16. What is kept so is read and never trained; the levels
cost about a tenth of a normal matrix's deviation.
Source: QLoRA (Dettmers et al. 2023, arXiv:2305.14314), §3 and appendix E. Its double quantisation
of the scales, which would save another 0.12 bits, is left out: so a matrix comes out of 4 bits and
goes back into them without any change.
"""

import functools
import math
import re
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from policymix.structs import PyTree

BLOCK = 64
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# Of layers: attention and feed-forward of the language model's, and of the vision tower's.
_MATRICES = re.compile(r"(?!.*lora)(.*/)?(layers/(attn|mlp(_\d+)?)/.*|encoderblock/.*/kernel)")
_MIN_ELEMENTS = 4096  # of a layer; smaller ones are not worth a scale for every block
_TINY = 1e-30  # a block without larger numbers is zero: its levels would leave float32's range


@flax.struct.dataclass
class Nf4:
    """A stack of matrices in 4 bits; [number] of every array is the Nf4 of that layer.

    Attributes:
      codes: uint8 [..., 32 blocks]: two numbers in each, of which the first has the upper half.
      scales: bfloat16 [..., blocks], each the largest magnitude of 64 numbers that follow one
        another in the flattened matrix, whose end is filled up with zeros.
      matrix: shape of what lies behind the leading axes.
    """

    codes: Any
    scales: Any
    matrix: tuple[int, ...] = flax.struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that this stands for."""
        return (*self.codes.shape[:-1], *self.matrix)

    @property
    def dtype(self) -> np.dtype:
        """Of the array that this stands for, whatever it was made from."""
        return jnp.dtype(jnp.bfloat16)


def suits(path: str, leaf: Any) -> bool:
    """Whether a parameter is a stack of matrices that 4 bits are meant for: weights of attention
    and feed-forward layers, not their low-rank updates, norms, biases or embeddings.
    """
    matrix = leaf.shape[1:]
    return (
        _MATRICES.fullmatch(path) is not None
        and len(matrix) >= 2
        and math.prod(matrix) >= _MIN_ELEMENTS
        and matrix[-1] % 2 == 0
    )


def quantize(leaf: Any, leading: int = 1) -> Nf4:
    """[leading axes, matrix] → Nf4; of shapes for a `jax.ShapeDtypeStruct`.

    A layer is gone through at a time, so that nothing wide is larger than one.
    """
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.eval_shape(functools.partial(_quantize, leading=leading), leaf)
    return _quantize(leaf, leading)


def by_layers(array: np.ndarray) -> Nf4:
    """[layers, matrix] of the host → Nf4 of the host, the same as `quantize` makes it: a device
    sees a layer at a time, so that it needs not the room for all.
    """
    parts = [jax.device_get(quantize(layer, leading=0)) for layer in array]
    return jax.tree.map(lambda *layers: np.stack(layers), *parts)


def dequantize(leaf: Any) -> Any:
    """Nf4 → bfloat16 [leading axes, matrix]; any other leaf as it is.

    An Nf4 of `jax.ShapeDtypeStruct`s gives one, without a place.
    """
    if not isinstance(leaf, Nf4):
        return leaf
    if isinstance(leaf.codes, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return _dequantize(leaf)


# Compiled, nothing that is made on the way is stored; inline, a model that does it is as if it were
# written there.
@functools.partial(jax.jit, inline=True)
def _dequantize(leaf: Nf4) -> jax.Array:
    pairs = jnp.stack([leaf.codes >> 4, leaf.codes & 15], axis=-1)
    blocks = pairs.reshape(*leaf.scales.shape, BLOCK)
    numbers = _table()[blocks] * leaf.scales[..., None].astype(jnp.float32)
    flat = numbers.astype(leaf.dtype).reshape(*leaf.scales.shape[:-1], -1)
    return flat[..., : math.prod(leaf.matrix)].reshape(leaf.shape)


def _table() -> jax.Array:
    """The levels, float32 [16], from scalars: an array that a compiled program refers to would be
    one more of its inputs, for every matrix.
    """
    return jnp.concatenate([jnp.full((1,), level, jnp.float32) for level in LEVELS])


def dequantized(tree: PyTree) -> PyTree:
    """The tree with every Nf4 in it as the array that it stands for."""
    return jax.tree.map(dequantize, tree, is_leaf=lambda leaf: isinstance(leaf, Nf4))


@functools.partial(jax.jit, static_argnames="leading")
def _quantize(leaf: jax.Array, leading: int) -> Nf4:
    stack, matrix = leaf.shape[:leading], leaf.shape[leading:]
    codes, scales = jax.lax.map(_quantize_flat, leaf.reshape(math.prod(stack), -1))
    return Nf4(codes.reshape(*stack, -1), scales.reshape(*stack, -1), matrix)


def _quantize_flat(numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[elements] → uint8 [32 blocks], bfloat16 [blocks]."""
    blocks = jnp.pad(numbers, (0, -len(numbers) % BLOCK)).reshape(-1, BLOCK).astype(jnp.float32)
    largest = jnp.max(jnp.abs(blocks), axis=1)
    # Rounded, it is off by 2^-9 of it at most, and its level is still ±1: the block that this
    # stands for has the same scale again.
    scales = largest.astype(jnp.bfloat16)
    scales = jnp.where(scales < _TINY, jnp.zeros_like(scales), scales)
    divisors = jnp.where(scales == 0, 1, scales).astype(jnp.float32)
    ratios = jnp.where(scales[:, None] == 0, 0.0, blocks / divisors[:, None])
    levels = np.asarray(LEVELS, np.float32)
    codes = sum((ratios > between).astype(jnp.uint8) for between in (levels[1:] + levels[:-1]) / 2)
    pairs = codes.reshape(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1], scales
