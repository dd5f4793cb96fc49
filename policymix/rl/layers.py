"""Layers whose backward pass is written out, since autodiff's is slow on CPUs: GELU followed by
LayerNorm, and convolutions. In return they cannot be differentiated forwards (`jax.jvp`).
"""

import math

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

_EPSILON = 1e-6
_SLOPE, _CUBE = math.sqrt(2 / math.pi), 0.044715


class GeluNorm(nn.Module):
    """[..., d]: scale * normalised(gelu(x)) + bias, as flax's gelu and LayerNorm have it."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        wide = jnp.promote_types(self.dtype, jnp.float32)  # as sums of squares need
        return gelu_norm(x.astype(wide), scale, bias).astype(self.dtype)


@jax.custom_vjp
def gelu_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """(y - mean) / sqrt(variance + 1e-6) * scale + bias, with y = gelu(x), over the last axis.

    gelu(x) = x (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2 (Hendrycks and Gimpel 2016,
    arXiv:1606.08415); LayerNorm: Ba et al. 2016, arXiv:1607.06450. Left to autodiff the pair takes
    a third of a small network's time on a CPU: it walks over what it has, [rows, width], some
    twenty times a layer. Written out it is a mean and a mean of products a row.

    Args:
      x: [..., d]; scale, bias: [d].
    """
    return _norm_forward(x, scale, bias)[0]


def _norm_forward(x, scale, bias):
    curve = jnp.tanh(_SLOPE * (x + _CUBE * x * x * x))
    y = 0.5 * x * (1 + curve)
    centred = y - jnp.mean(y, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + _EPSILON)
    normal = centred * inverse
    return normal * _along(scale, x) + _along(bias, x), (x, curve, normal, inverse, scale, bias)


def _norm_backward(kept, gradient):
    x, curve, normal, inverse, scale, bias = kept
    rows = tuple(range(x.ndim - 1))
    of_normal = gradient * _along(scale, x)
    mean = jnp.mean(of_normal, axis=-1, keepdims=True)
    product = jnp.mean(of_normal * normal, axis=-1, keepdims=True)
    of_y = inverse * (of_normal - mean - normal * product)
    steepness = (1 - curve * curve) * _SLOPE * (1 + 3 * _CUBE * x * x)
    of_x = of_y * 0.5 * (1 + curve + x * steepness)
    of_scale, of_bias = jnp.sum(gradient * normal, axis=rows), jnp.sum(gradient, axis=rows)
    return of_x.astype(x.dtype), of_scale.astype(scale.dtype), of_bias.astype(bias.dtype)


gelu_norm.defvjp(_norm_forward, _norm_backward)


def _along(vector: jax.Array, x: jax.Array) -> jax.Array:
    """[d] as [1, …, 1, d], of x's rank."""
    return vector.reshape(*[1] * (x.ndim - 1), -1)


class Convolution(nn.Module):
    """A convolution of [b, hh, ww, c]: kernel twice its stride, padding half of it."""

    width: int
    stride: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (2 * self.stride, 2 * self.stride, x.shape[-1], self.width)
        kernel = self.param("kernel", nn.initializers.zeros, shape).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.width,)).astype(self.dtype)
        return convolve(x, kernel) + bias.reshape(1, 1, 1, -1)


@jax.custom_vjp
def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [b, hh, ww, c] by kernel [2 s, 2 s, c, d], strides s, padding s / 2.

    Three forms of one function, each where XLA is fastest on CPUs: forward on few channels, s
    pixels of a row become channels (4 times as fast on pictures); the gradient in x has s × s
    pixels become channels (3 times); else as it stands. There are no forward-mode derivatives.
    """
    return _folded(x, kernel, 1) if x.shape[-1] < 16 else _ordinary(x, kernel)


def _convolve_backward(inputs: tuple[jax.Array, jax.Array], gradient: jax.Array):
    x, kernel = inputs
    of_x = jax.linear_transpose(lambda x: _folded(x, kernel, len(kernel) // 2), x)
    of_kernel = jax.linear_transpose(lambda kernel: _ordinary(x, kernel), kernel)
    return *of_x(gradient), *of_kernel(gradient)


convolve.defvjp(lambda *inputs: (convolve(*inputs), inputs), _convolve_backward)


def _ordinary(x: jax.Array, kernel: jax.Array) -> jax.Array:
    s = len(kernel) // 2
    return _convolve(x, kernel, (s, s), [(s // 2, s // 2)] * 2)


def _folded(x: jax.Array, kernel: jax.Array, rows: int) -> jax.Array:
    """With `rows` × s pixels made channels; of one row, its convolution pads the height, faster."""
    s = len(kernel) // 2
    height, width = ((n // s + 1) * s for n in x.shape[1:3])
    above = s // 2 if rows == 1 else 0
    x = jnp.pad(x, ((0, 0), (s // 2 - above,) * 2, (s // 2,) * 2, (0, 0)))[:, :height, :width]
    x = einops.rearrange(x, "b (y r) (x s) c -> b y x (r s c)", r=rows, s=s)
    kernel = einops.rearrange(kernel, "(y r) (x s) c d -> y x (r s c) d", r=rows, s=s)
    return _convolve(x, kernel, (s // rows, 1), [(above, above), (0, 0)])


def _convolve(x, kernel, strides: tuple[int, int], padding) -> jax.Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers)
