"""SigLIP vision tower: pictures to tokens, with big_vision's parameter names.

b batch, s patches, d width. The layer axis is scanned and stands first in every `encoderblock`
parameter.
Sources: Zhai et al. 2023 (arXiv:2303.15343); sizes from Zhai et al. 2022 (arXiv:2106.04560) and
Alabdulmohsin et al. 2023 (arXiv:2305.13035).
"""

import dataclasses
from collections.abc import Mapping

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from policymix import nf4


@dataclasses.dataclass(frozen=True)
class Size:
    """Width, depth and heads of a vision tower; `patch` is the side of a square patch in pixels."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch: int

    def __post_init__(self):
        if self.width % self.num_heads:
            raise ValueError(
                f"SigLIP width {self.width} is not divisible by num_heads {self.num_heads}"
            )


_SIZES = {  # width, depth, mlp_dim, heads
    "mu": (32, 1, 128, 2),
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "M": (512, 12, 2048, 8),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "So400m": (1152, 27, 4304, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),
    "G": (1664, 48, 8192, 16),
}


def size(variant: str | Size | Mapping[str, int], depth: int | None = None) -> Size:
    """The size named "So400m/14" (letter / patch side), or one given by its numbers.

    `depth` replaces its number of layers.
    """
    if isinstance(variant, Mapping):
        variant = Size(**variant)
    if isinstance(variant, Size):
        return variant if depth is None else dataclasses.replace(variant, depth=depth)
    letter, _, patch = variant.partition("/")
    if letter not in _SIZES or not patch.isdigit() or int(patch) == 0:
        raise ValueError(
            f"siglip_variant {variant!r}: expected SIZE/PATCH, such as 'So400m/14', SIZE one of "
            f"{list(_SIZES)}"
        )
    width, layers, mlp_dim, num_heads = _SIZES[letter]
    return Size(width, layers if depth is None else depth, mlp_dim, num_heads, int(patch))


def named(size: Size) -> tuple[str | Size, int | None]:
    """What `size` takes for these numbers: a variant and, where it is not its own, the depth."""
    numbers = dataclasses.astuple(size)
    for letter, (width, depth, *rest) in _SIZES.items():
        if (width, *rest) == (numbers[0], *numbers[2:4]):
            return f"{letter}/{size.patch}", None if depth == size.depth else size.depth
    return size, None


class MlpBlock(nn.Module):
    """Dense, tanh-approximated GELU, Dense."""

    mlp_dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        init = {
            "kernel_init": nn.initializers.xavier_uniform(),
            "bias_init": nn.initializers.normal(1e-6),
        }
        hidden = nn.gelu(
            nn.Dense(self.mlp_dim, dtype=self.dtype, name="Dense_0", **init)(x), approximate=True
        )
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="Dense_1", **init)(hidden)


class EncoderBlock(nn.Module):
    """One pre-LayerNorm transformer layer."""

    size: Size
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm(dtype=self.dtype, name="LayerNorm_0")(x)
        x = x + nn.MultiHeadDotProductAttention(
            num_heads=self.size.num_heads,
            kernel_init=nn.initializers.xavier_uniform(),
            deterministic=True,
            dtype=self.dtype,
            name="MultiHeadDotProductAttention_0",
        )(y, y)
        y = nn.LayerNorm(dtype=self.dtype, name="LayerNorm_1")(x)
        return x + MlpBlock(self.size.mlp_dim, self.dtype, name="MlpBlock_0")(y), None


class Encoder(nn.Module):
    """The scanned, rematerialised stack of layers and its final LayerNorm."""

    size: Size
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        block = EncoderBlock
        if not self.is_initializing():  # then parameters may be given in 4 bits, each layer's
            block = nn.map_variables(block, "params", nf4.dequantized)
        block = nn.remat(block, prevent_cse=False, policy=jax.checkpoint_policies.nothing_saveable)
        stack = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.size.depth,
        )
        x, _ = stack(self.size, self.dtype, name="encoderblock")(x, None)
        return nn.LayerNorm(dtype=self.dtype, name="encoder_norm")(x)


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its kernel's side, as the matrix product that it is."""

    width: int
    patch: int

    @nn.compact
    def __call__(self, images):
        """[b, hh, ww, 3] → float32 [b, hh // patch, ww // patch, width]; what is over is cut."""
        side = self.patch
        shape = (side, side, images.shape[-1], self.width)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        rows, columns = images.shape[1] // side, images.shape[2] // side
        patches = einops.rearrange(
            images[:, : rows * side, : columns * side].astype(jnp.float32),
            "b (i p) (j q) c -> b i j (p q c)",
            p=side,
            q=side,
        )
        kernel = einops.rearrange(kernel, "p q c d -> (p q c) d")
        return patches @ kernel.astype(jnp.float32) + bias[None, None, None, :]


class SigLIP(nn.Module):
    """Pictures → one token per patch, at the language model's width.

    Patches and positions are computed in float32, the rest in `dtype`. The head starts at zero
    (PaliGemma's choice), so a freshly initialised tower says nothing.
    """

    size: Size
    out_dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images):
        """float [b, hh, ww, 3] in [-1, 1] → [b, s, out_dim], s = (hh // patch) * (ww // patch)."""
        x = PatchEmbedding(self.size.width, self.size.patch, name="embedding")(images)
        x = einops.rearrange(x, "b hh ww d -> b (hh ww) d")
        scale = nn.initializers.normal(stddev=self.size.width**-0.5)
        x = x + self.param("pos_embedding", scale, (1, x.shape[1], self.size.width))
        x = Encoder(self.size, self.dtype, name="Transformer")(x.astype(self.dtype))
        return nn.Dense(
            self.out_dim, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="head"
        )(x)
