"""Adam whose two moments take 8 bits each, in blocks: a quarter of Adam's memory.

Moments are floating-point numbers of 3 bits of mantissa. The second one has 31 octaves below a
bound of its block and one above. The first has a sign and 16 octaves relative to the root of the
second, which it exceeds by little, as updates of Adam are of order 1. That has the properties of
the dynamic tree of "8-bit Optimizers via Block-wise Quantization" (Dettmers et al. 2021,
arXiv:2110.02861), a wide range and a relative error that is small everywhere, and is made by
integer arithmetic on float32's own bits, where a tree takes a search among 256 levels. And as such
numbers need no tight scale, the bound of a block is no maximum of its moments, which would take a
pass of its own over them, but what they exceed by rounding alone: the same moving average, of the
largest square of the block's gradients.

Levels are far apart beside what an average moves at a step, 0.1 % at b2 0.999: rounded to the
nearest, it would stand still. So both moments go up or down, as often as keeps their mean whatever
the gradients are: none, all the same, or rare. That takes a number as good as random, for which
neither moments nor gradients are good enough, as they may repeat; the number of the step is, mixed.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from policymix.structs import PyTree

BLOCK = 2048  # numbers that share a bound, at most (the paper's choice)
MIN_ELEMENTS = 4096  # smaller leaves keep float32 moments, as in bitsandbytes
_MIN_BLOCK = 32  # of a last axis that has no larger divisor, blocks run across rows
_SMALLEST_BOUND = np.float32(2.0**-90)  # so that 31 octaves below it there is still a float32
_STEP = 20  # bits of a float32's mantissa that are dropped, of 23
_DROPPED = (1 << _STEP) - 1
_SIGN = np.int32(-(2**31))
# Levels of a second moment up to its bound; the others are above, as it strays when it is rounded.
_LEVELS = 247
_GOLDEN = np.uint32(0x9E3779B9)  # 2^32 / 1.618: its multiples are spread evenly, modulo 2^32
# Octaves by which a first moment may exceed the root of the second: Cauchy and Schwarz allow 0.2 at
# b1 0.9 and b2 0.95, and 2.9 at b2 0.999.
_HEADROOM = 4


class Moments(NamedTuple):
    """Both moments of one parameter.

    Attributes:
      codes: int16, in the shape of the parameter, so that it is split over devices as that is: the
        first moment's sign (1 bit) and magnitude (7, 0 is zero), then the second moment (8).
      bounds: float32, of the second moments of a block: [...] where the last axis is one, [...,
        blocks] where it is several, [blocks of the flattened parameter] where it does not divide.
    """

    codes: jax.Array
    bounds: jax.Array


class WideMoments(NamedTuple):
    """Both moments of a small parameter, float32 in its shape."""

    mu: jax.Array
    nu: jax.Array


class EightBitState(NamedTuple):
    """State of `scale_by_adam_8bit`: updates done, and Moments or WideMoments by parameter."""

    count: jax.Array
    moments: PyTree


def quantize(mu: jax.Array, nu: jax.Array, bounds: jax.Array, count: jax.Array) -> jax.Array:
    """Both moments [..., n], the second within bounds [..., 1], at step `count` → int16 [..., n].

    Both go to a level next to them, within 1/8, the nearer the more likely: so that over many steps
    the mean is kept. First moments below 2^-12 of the root of the second become zero. Second ones
    below 2^-30.9 of their bound become that and never zero, so that no update can blow up.
    """
    bits, lowest, drawn = _bits(mu), _lowest(bounds), _drawn(count, mu.shape)
    up = jax.lax.shift_right_logical(drawn, 32 - _STEP)
    squares = jnp.clip((_bits(nu) + up - lowest) >> _STEP, 0, 255)
    smallest = _smallest(lowest + (squares << _STEP))
    up = drawn & _DROPPED  # not the bits that decide about the second
    magnitude = jnp.clip(((bits & ~_SIGN) + up - smallest) >> _STEP, 0, 127)
    return ((bits >> 16) & -(2**15) | magnitude << 8 | squares).astype(jnp.int16)


def dequantize(codes: jax.Array, bounds: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int16 codes [..., n] of bounds [..., 1] → both moments, float32 [..., n]."""
    codes = codes.astype(jnp.int32)  # the sign with them
    nu = _lowest(bounds) + ((codes & 0xFF) << _STEP)
    magnitude = codes & 0x7F00
    level = _smallest(nu) + (magnitude << (_STEP - 8))
    mu = jnp.where(magnitude != 0, level, 0) | codes & _SIGN
    return _floats(mu), _floats(nu)


def _lowest(bounds: jax.Array) -> jax.Array:
    """The bits of a second moment of code 0, from those of its bound, rounded up."""
    return ((_bits(bounds) + _DROPPED) & -(1 << _STEP)) - (_LEVELS << _STEP)


def _smallest(nu: jax.Array) -> jax.Array:
    """The bits of a first moment of code 0, which stands for zero, from the bits of the second.

    Half of a float's bits are nearly those of its root: they are a logarithm, in pieces.
    """
    root = (nu >> 1) + ((127 << 22) + (_HEADROOM << 23))
    return (root & -(1 << _STEP)) - (127 << _STEP)


def _drawn(count: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """int32, along the last axis evenly spread, and at one place as good as random over steps.

    Evenly over steps too, as multiples of the count are, it would fall in with gradients that come
    at regular intervals. The mixing is MurmurHash3's last (Appleby 2011).
    """
    x = jnp.asarray(count).astype(jnp.uint32) * _GOLDEN
    x = (x ^ x >> 16) * np.uint32(0x85EBCA6B)
    x = (x ^ x >> 13) * np.uint32(0xC2B2AE35)
    x = x ^ x >> 16
    places = jax.lax.broadcasted_iota(jnp.uint32, shape, len(shape) - 1)
    return (x + places * _GOLDEN).astype(jnp.int32)


def scale_by_adam_8bit(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, max_norm: float | None = None
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with moments in 2 bytes and a bit per parameter, in place of 8.

    μ ← b1 μ + (1 - b1) g, ν ← b2 ν + (1 - b2) g², update μ̂ / (√ν̂ + eps); what is rounded is what
    is kept, not what the update is made of.

    Args:
      max_norm: of all gradients together, to which they are clipped first. Done apart, XLA writes
        the clipped ones out for the sake of the blocks' maxima, which takes as long as the rest.
    """

    def init(params):
        def start(leaf):
            zeros = jnp.zeros(leaf.shape, jnp.float32)
            if not is_quantized(leaf):
                return WideMoments(zeros, jnp.zeros_like(zeros))
            blocked = jax.eval_shape(_blocked, zeros).shape[:-1]
            bounds = jnp.full(blocked, _SMALLEST_BOUND)
            return Moments(jnp.zeros(leaf.shape, jnp.int16), bounds)

        return EightBitState(jnp.zeros((), jnp.int32), jax.tree.map(start, params))

    def update(grads, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        debias = [1 / (1 - b ** count.astype(jnp.float32)) for b in (b1, b2)]
        factor = jnp.ones(()) if max_norm is None else clip_factor(grads, max_norm)

        def step(g, moments):
            move = _step_wide if isinstance(moments, WideMoments) else _step
            return move(g, factor, moments, b1, b2, eps, debias, count)

        flat, structure = jax.tree.flatten(grads)
        old = structure.flatten_up_to(state.moments)
        pairs = [step(g, moments) for g, moments in zip(flat, old, strict=True)]
        updates, moments = ([pair[i] for pair in pairs] for i in range(2))
        return structure.unflatten(updates), EightBitState(count, structure.unflatten(moments))

    return optax.GradientTransformation(init, update)


def is_quantized(leaf: Any) -> bool:
    """Whether a parameter of this shape is large enough for moments of 8 bits."""
    return math.prod(leaf.shape) >= MIN_ELEMENTS


def clip_factor(grads: PyTree, max_norm: float) -> jax.Array:
    """What gradients are to be multiplied by so that their global norm is `max_norm` at most."""
    norm = optax.tree.norm(grads)
    return jnp.where(norm < max_norm, 1.0, max_norm / norm)


def _step(g: jax.Array, factor, moments: Moments, b1, b2, eps, debias, count):
    blocks, codes = _blocked(g), _blocked(moments.codes)
    largest = factor * jnp.max(jnp.abs(blocks), axis=-1).astype(jnp.float32)
    bounds = b2 * moments.bounds + (1 - b2) * largest * largest
    bounds = jnp.maximum(bounds, _SMALLEST_BOUND)
    mu, nu = dequantize(codes, moments.bounds[..., None])
    blocks = factor * blocks.astype(jnp.float32)
    mu, nu, update = _adam(blocks, mu, nu, b1, b2, eps, debias)
    codes = _unblocked(quantize(mu, nu, bounds[..., None], count), g.shape)
    return _unblocked(update, g.shape).astype(g.dtype), Moments(codes, bounds)


def _step_wide(g: jax.Array, factor, moments: WideMoments, b1, b2, eps, debias, count):
    del count
    wide = factor * g.astype(jnp.float32)
    mu, nu, update = _adam(wide, moments.mu, moments.nu, b1, b2, eps, debias)
    return update.astype(g.dtype), WideMoments(mu, nu)


def _adam(g, mu, nu, b1, b2, eps, debias):
    mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g * g
    return mu, nu, mu * debias[0] / (jnp.sqrt(nu) * jnp.sqrt(debias[1]) + eps)


def _blocked(x: jax.Array) -> jax.Array:
    """[..., n] → [..., n] if that is a block, else [..., blocks, block]; flattened and filled up
    where n has no good divisor.
    """
    n = x.shape[-1] if x.ndim else 1
    block = next((d for d in range(min(n, BLOCK), _MIN_BLOCK - 1, -1) if n % d == 0), None)
    if block == n:
        return x
    if block:
        return x.reshape(*x.shape[:-1], n // block, block)
    return jnp.pad(x.reshape(-1), (0, -x.size % BLOCK)).reshape(-1, BLOCK)


def _unblocked(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if blocks.size == math.prod(shape):
        return blocks.reshape(shape)
    return blocks.reshape(-1)[: math.prod(shape)].reshape(shape)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _floats(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
