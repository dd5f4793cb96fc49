"""Gemma as π0 uses it: several experts, each with its own width, norms and MLP, that attend
jointly.

Expert 0 is PaliGemma's language model, expert 1 the action expert; the modules of expert i > 0
carry the suffix `_i`. b batch, t query tokens, s key tokens, d width, n heads, g query heads per
key/value head, k key/value heads, h head dimension. The layer axis is scanned and stands first in
every parameter under `layers`.
Sources: Gemma (arXiv:2403.08295), PaliGemma (arXiv:2407.07726), π0 (arXiv:2410.24164), adaptive
RMSNorm after DiT's adaLN (arXiv:2212.09748).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

# Gemma's choice: finite, so that a row with nothing to attend to is uniform, not NaN.
MASKED_LOGIT = -2.3819763e38


@dataclasses.dataclass(frozen=True)
class Size:
    """Size of one expert. Experts that attend jointly share all but width and mlp_dim."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self):
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


def size(variant: str | Size | Mapping[str, int]) -> Size:
    """The size of a named variant, or one given by its six numbers, {"width": 128, …}."""
    if isinstance(variant, Size):
        return variant
    if isinstance(variant, str):
        if variant not in _SIZES:
            raise ValueError(
                f"Gemma variant {variant!r}: expected one of {list(_SIZES)}, or the fields of "
                "gemma.Size"
            )
        return _SIZES[variant]
    fields = [field.name for field in dataclasses.fields(Size)]
    if sorted(variant) != sorted(fields):
        raise ValueError(f"a Gemma size has the fields {fields}, got {sorted(variant)}")
    return Size(**variant)


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


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + scale); if `adaptive`, scale, shift and residual gate depend on `cond`."""

    adaptive: bool = False

    @nn.compact
    def __call__(self, x, cond=None):
        """[b, t, d], cond [b, d] or None → normed [b, t, d], gate [b, 1, d] or None."""
        wide = x.astype(jnp.float32)
        normed = x * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
        if not self.adaptive:
            scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
            return (normed * (1 + scale[None, None, :])).astype(x.dtype), None
        # Zero-initialised: gates start at 0, so a fresh adaptive layer is the identity.
        dense = nn.Dense(
            3 * x.shape[-1], kernel_init=nn.initializers.zeros, dtype=x.dtype, name="Dense_0"
        )
        scale, shift, gate = jnp.split(dense(cond)[:, None, :], 3, axis=-1)
        return (normed * (1 + scale) + shift).astype(x.dtype), gate


class Einsum(nn.Module):
    """An einsum with one parameter `w`, cast to the input's dtype."""

    shape: tuple[int, ...]
    init: Any

    @nn.compact
    def __call__(self, equation: str, x):
        w = self.param("w", self.init, self.shape)
        return jnp.einsum(equation, x, w.astype(x.dtype))


class FeedForward(nn.Module):
    """GeGLU: (gelu(x W_0) * (x W_1)) W_linear."""

    mlp_dim: int

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=(0,))
        gating = self.param("gating_einsum", init, (2, x.shape[-1], self.mlp_dim)).astype(x.dtype)
        init = nn.initializers.lecun_normal(in_axis=-2, out_axis=-1)
        linear = self.param("linear", init, (self.mlp_dim, x.shape[-1])).astype(x.dtype)
        return (nn.gelu(x @ gating[0], approximate=True) * (x @ gating[1])) @ linear


def rotate(x, positions, max_wavelength: float = 10_000.0):
    """Rotary position embedding (arXiv:2104.09864), halves form: [x1 cos - x2 sin, x2 cos + x1
    sin]; [b, t, n, h].
    """
    exponents = jnp.arange(x.shape[-1] // 2, dtype=jnp.float32) * (2.0 / x.shape[-1])
    angles = positions[..., None].astype(jnp.float32) / max_wavelength ** exponents[None, None, :]
    sin, cos = jnp.sin(angles)[..., None, :], jnp.cos(angles)[..., None, :]
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


class Attention(nn.Module):
    """One attention over the tokens of all experts; queries, keys, values and outputs have each
    expert's own maps.
    """

    sizes: tuple[Size, ...]

    @nn.compact
    def __call__(self, xs: Sequence[jax.Array | None], positions, mask, cache=None):
        """xs[i] [b, t_i, d_i] or None; mask bool [b, t, s]; cache (k, v) [b, s', k, h] of earlier
        tokens.

        Returns (outputs like xs, (k, v) of all tokens, earlier ones first).
        """
        parts = [self._project(i, x) for i, x in enumerate(xs) if x is not None]
        q, k, v = (jnp.concatenate(part, axis=1) for part in zip(*parts, strict=True))
        head_dim = self.sizes[0].head_dim
        q = rotate(q, positions) * head_dim**-0.5
        k = rotate(k, positions)
        if cache is not None:
            k, v = (
                jnp.concatenate([old, new], axis=1) for old, new in zip(cache, (k, v), strict=True)
            )

        q = einops.rearrange(q, "b t (k g) h -> b t k g h", k=self.sizes[0].num_kv_heads)
        logits = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
        logits = jnp.where(mask[:, None, None, :, :], logits, MASKED_LOGIT)
        encoded = jnp.einsum(
            "bkgts,bskh->btkgh", jax.nn.softmax(logits, axis=-1).astype(v.dtype), v
        )
        encoded = einops.rearrange(encoded, "b t k g h -> b t (k g) h")

        outputs, start = [], 0
        for i, x in enumerate(xs):
            if x is None:
                outputs.append(None)
                continue
            expert, stop = self.sizes[i], start + x.shape[1]
            init = nn.initializers.lecun_normal(in_axis=(-3, -2), out_axis=-1)
            shape = (expert.num_heads, expert.head_dim, expert.width)
            out = Einsum(shape, init, name=f"attn_vec_einsum{suffix(i)}")
            outputs.append(out("btnh,nhd->btd", encoded[:, start:stop]))
            start = stop
        return outputs, (k, v)

    def _project(self, i: int, x):
        """Expert i's queries [b, t, n, h], keys and values [b, t, k, h]."""
        size, end = self.sizes[i], suffix(i)

        def init(*batch_axis):
            return nn.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=batch_axis)

        if size.num_kv_heads == size.num_heads:  # OpenPI keeps the three in one array then
            shape = (3, size.num_heads, size.width, size.head_dim)
            return tuple(Einsum(shape, init(0, 1), name=f"qkv_einsum{end}")("btd,indh->ibtnh", x))
        q = Einsum((size.num_heads, size.width, size.head_dim), init(0), name=f"q_einsum{end}")
        kv = Einsum(
            (2, size.num_kv_heads, size.width, size.head_dim), init(0, 1), name=f"kv_einsum{end}"
        )
        k, v = kv("btd,ikdh->ibtkh", x)
        return q("btd,ndh->btnh", x), k, v


def _add(x, y, gate):
    """Residual connection; an adaptive norm gates what is added."""
    return x + y if gate is None else x + y * gate


class Block(nn.Module):
    """One layer of all experts: joint attention, then each expert's feed-forward."""

    sizes: tuple[Size, ...]
    adaptive: tuple[bool, ...]

    @nn.compact
    def __call__(self, xs, cache, positions, mask, conds):
        outputs, kv = self._sublayer(
            xs,
            conds,
            "pre_attention_norm",
            lambda ys: Attention(self.sizes, name="attn")(ys, positions, mask, cache),
        )
        outputs, _ = self._sublayer(outputs, conds, "pre_ffw_norm", self._feed_forward)
        return outputs, kv

    def _sublayer(self, xs, conds, norm: str, function):
        """x + gate * function(norm(x)) for every expert that has tokens."""
        pairs = [
            (None, None) if x is None else RMSNorm(adaptive, name=f"{norm}{suffix(i)}")(x, cond)
            for i, (x, adaptive, cond) in enumerate(zip(xs, self.adaptive, conds, strict=True))
        ]
        ys, rest = function([normed for normed, _ in pairs])
        gates = [gate for _, gate in pairs]
        return [
            None if x is None else _add(x, y, gate)
            for x, y, gate in zip(xs, ys, gates, strict=True)
        ], rest

    def _feed_forward(self, xs):
        mlps = [
            None if x is None else FeedForward(self.sizes[i].mlp_dim, name=f"mlp{suffix(i)}")
            for i, x in enumerate(xs)
        ]
        return [None if x is None else mlp(x) for x, mlp in zip(xs, mlps, strict=True)], None


class Embedder(nn.Module):
    """The vocabulary: token → row * sqrt(width)."""

    vocab_size: int
    width: int

    @nn.compact
    def __call__(self, tokens):
        table = self.param(
            "input_embedding", nn.initializers.normal(), (self.vocab_size, self.width)
        )
        return table[tokens] * jnp.sqrt(self.width).astype(table.dtype)


class Gemma(nn.Module):
    """The layers of all experts: scanned and rematerialised if `remat`, else unrolled."""

    sizes: tuple[Size, ...]
    adaptive: tuple[bool, ...]
    vocab_size: int
    dtype: jnp.dtype
    remat: bool = True

    def setup(self):
        self.embedder = Embedder(self.vocab_size, self.sizes[0].width)
        block, depth = Block, self.sizes[0].depth
        if self.remat:
            policy = jax.checkpoint_policies.nothing_saveable
            block = nn.remat(Block, prevent_cse=False, policy=policy)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=depth,
            # A loop copies what the backward pass needs into stacks; unrolled, nothing is copied.
            unroll=1 if self.remat else depth,
        )(self.sizes, self.adaptive)
        for i, adaptive in enumerate(self.adaptive):
            setattr(self, f"final_norm{suffix(i)}", RMSNorm(adaptive))

    def embed(self, tokens):
        """int [b, s] → [b, s, d] in the compute dtype."""
        return self.embedder(tokens).astype(self.dtype)

    def __call__(self, xs, positions, mask, conds, cache=None):
        """Runs the layers.

        Args:
          xs: per expert [b, t_i, d_i] or None (that expert has no tokens in this pass).
          positions: int [b, t] of the concatenated tokens.
          mask: bool [b, t, s], True where query t may see key s; s counts cached keys first.
          conds: per expert [b, d_i] for adaptive norms, else None.
          cache: (k, v), each [layers, b, s', k, h], of tokens seen in an earlier pass.

        Returns:
          (outputs like xs, after the final norm; the cache of all tokens).
        """
        xs = [None if x is None else x.astype(self.dtype) for x in xs]
        conds = [None if c is None else c.astype(self.dtype) for c in conds]
        xs, cache = self.layers(xs, cache, positions, mask, conds)
        norms = [getattr(self, f"final_norm{suffix(i)}") for i in range(len(xs))]
        outputs = [
            None if x is None else norm(x, cond)[0]
            for x, norm, cond in zip(xs, norms, conds, strict=True)
        ]
        return outputs, cache
