"""Gemma as π0 uses it: several experts, each with its own width, norms and MLP, that attend
jointly.

Expert 0 is PaliGemma's language model, expert 1 the action expert; the modules of expert i > 0
carry the suffix `_i`. b batch, t query tokens, s key tokens, d width, n heads, g query heads per
key/value head, k key/value heads, h head dimension, l layers, m a modulation's three numbers per
width. The layer axis is scanned and stands first in every parameter under `layers`.
Sources: Gemma (arXiv:2403.08295), PaliGemma (arXiv:2407.07726), π0 (arXiv:2410.24164), adaptive
RMSNorm after DiT's adaLN (arXiv:2212.09748).
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from policymix import nf4
from policymix.models import lora as lora_lib
from policymix.models.attention import Attention
from policymix.models.lora import Lora
from policymix.models.variants import Size, suffix


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + scale); if `adaptive`, scale, shift and residual gate depend on `cond`."""

    adaptive: bool = False

    @nn.compact
    def __call__(self, x, cond=None, modulation=None):
        """[b, t, d] → normed [b, t, d], gate [b, 1, d] or None.

        Args:
          cond: [b, d] if adaptive; or `modulation` [b, m], what `modulate` made of it.
        """
        wide = x.astype(jnp.float32)
        normed = x * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
        if not self.adaptive:
            scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
            return (normed * (1 + scale[None, None, :])).astype(x.dtype), None
        if modulation is None:
            # Zero-initialised: gates start at 0, so a fresh adaptive layer is the identity.
            dense = nn.Dense(
                3 * x.shape[-1], kernel_init=nn.initializers.zeros, dtype=x.dtype, name="Dense_0"
            )
            modulation = dense(cond)
        scale, shift, gate = jnp.split(modulation[:, None, :], 3, axis=-1)
        return (normed * (1 + scale) + shift).astype(x.dtype), gate


def modulate(norm: Mapping[str, Any], conds, dtype):
    """What an adaptive norm, or a stack of them, makes of conditions.

    Args:
      norm: its parameters; [l, …] for a stack.
      conds: [s, d], of s flow steps.

    Returns:
      [s, 1, m], or [s, l, 1, m] for a stack: they are the same for all of a batch.
    """
    kernel, bias = (norm["Dense_0"][name].astype(dtype) for name in ("kernel", "bias"))
    made = jnp.einsum("sd,...dm->s...m", conds.astype(dtype), kernel) + bias[None]
    return made[..., None, :]


class FeedForward(nn.Module):
    """GeGLU: (gelu(x W_0) * (x W_1)) W_linear."""

    mlp_dim: int
    lora: Lora | None = None

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=(0,))
        gating = self._matrices("gating_einsum", init, (2, x.shape[-1], self.mlp_dim))
        init = nn.initializers.lecun_normal(in_axis=-2, out_axis=-1)
        linear = self._matrices("linear", init, (self.mlp_dim, x.shape[-1]))
        gate, up = (_dot(x, [None if w is None else w[i] for w in gating]) for i in range(2))
        return _dot(nn.gelu(gate, approximate=True) * up, linear)

    def _matrices(self, name: str, init, shape):
        """A weight and its low-rank factors, or None and None."""
        w = self.param(name, init, shape)
        a, b = lora_lib.factors(self, f"{name}_", shape, self.lora) if self.lora else (None, None)
        return w, a, b


def _dot(x, matrices):
    """x W, and x A B if there are low-rank factors: not scaled, as in OpenPI."""
    w, a, b = (None if m is None else m.astype(x.dtype) for m in matrices)
    return x @ w if a is None else x @ w + (x @ a) @ b


class Block(nn.Module):
    """One layer of all experts: joint attention, then each expert's feed-forward.

    Attributes:
      asking: per expert, whether its outputs are wanted, or only its keys and values.
    """

    sizes: tuple[Size, ...]
    adaptive: tuple[bool, ...]
    rope_bases: tuple[float, ...]
    softcap: float | None = None
    asking: tuple[bool, ...] = (True, True)

    @nn.compact
    def __call__(self, xs, cache, modulations, positions, mask, conds):
        """Returns (xs, those of experts that do not ask unchanged; (k, v) of these tokens).

        Args:
          modulations: {norm's name: [b, m]}, or None where adaptive norms are given `conds`.
        """
        norm = functools.partial(self._norm, conds=conds, modulations=modulations)
        ys, gates = norm("pre_attention_norm", xs)
        attention = Attention(self.sizes, self.rope_bases, self.softcap, name="attn")
        ys, kv = attention(ys, positions, mask, cache, self.asking)
        after = _add(xs, ys, gates)
        ys, gates = norm(
            "pre_ffw_norm",
            [x if asks else None for x, asks in zip(after, self.asking, strict=True)],
        )
        ys = [None if y is None else self._feed_forward(i, y) for i, y in enumerate(ys)]
        return _add(after, ys, gates), kv

    def _norm(self, name: str, xs, conds, modulations):
        """(normed like xs, gates of adaptive norms)."""
        ys, gates = [], []
        for i, x in enumerate(xs):
            y = gate = None
            if x is not None:
                path = name + suffix(i)
                known = (modulations or {}).get(path)
                y, gate = RMSNorm(self.adaptive[i], name=path)(x, conds[i], known)
            ys.append(y)
            gates.append(gate)
        return ys, gates

    def _feed_forward(self, i: int, x):
        size = self.sizes[i]
        return FeedForward(size.mlp_dim, size.lora, name=f"mlp{suffix(i)}")(x)


def _add(xs, ys, gates):
    """Residual connections; an adaptive norm gates what is added, None adds nothing."""
    return [
        x if y is None else x + (y if gate is None else y * gate)
        for x, y, gate in zip(xs, ys, gates, strict=True)
    ]


class Embedder(nn.Module):
    """The vocabulary: token → row * sqrt(width), and back to logits."""

    vocab_size: int
    width: int

    def setup(self):
        self.input_embedding = self.param(
            "input_embedding", nn.initializers.normal(), (self.vocab_size, self.width)
        )

    def __call__(self, tokens):
        return self.input_embedding[tokens] * jnp.sqrt(self.width).astype(
            self.input_embedding.dtype
        )

    def logits(self, x):
        """[b, t, d] → float32 [b, t, vocabulary]."""
        table = self.input_embedding.astype(x.dtype)
        return jnp.einsum("btd,vd->btv", x, table, preferred_element_type=jnp.float32)


class Gemma(nn.Module):
    """The layers of all experts: scanned and rematerialised if `remat`, else unrolled."""

    sizes: tuple[Size, ...]
    adaptive: tuple[bool, ...]
    vocab_size: int
    dtype: jnp.dtype
    remat: bool = True
    rope_bases: tuple[float, ...] = (10_000.0, 10_000.0)
    softcap: float | None = None

    def setup(self):
        self.embedder = Embedder(self.vocab_size, self.sizes[0].width)
        self.layers = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, *[nn.broadcast] * 3),
            length=self.sizes[0].depth,
        )(self.sizes, self.adaptive, self.rope_bases, self.softcap)
        for i, adaptive in enumerate(self.adaptive):
            setattr(self, f"final_norm{suffix(i)}", RMSNorm(adaptive))

    def embed(self, tokens):
        """int [b, s] → [b, s, d] in the compute dtype."""
        return self.embedder(tokens).astype(self.dtype)

    def logits(self, x):
        """Outputs of expert 0 [b, t, d] → float32 [b, t, vocabulary]."""
        return self.embedder.logits(x)

    def modulations(self, expert: int, conds):
        """What all adaptive norms of an expert make of conditions [s, d], one per flow step.

        Returns:
          ({norm's name: [s, l, 1, m]} of the layers, [s, 1, m] of the final norm).
        """
        layers = self.layers.variables["params"]
        names = [f"{name}{suffix(expert)}" for name in ("pre_attention_norm", "pre_ffw_norm")]
        final = getattr(self, f"final_norm{suffix(expert)}").variables["params"]
        return (
            {name: modulate(layers[name], conds, self.dtype) for name in names},
            modulate(final, conds, self.dtype),
        )

    def __call__(self, xs, positions, mask, conds, cache=None, modulations=None, wanted=None):
        """Runs the layers.

        Args:
          xs: per expert [b, t_i, d_i] or None (that expert has no tokens in this pass).
          positions: int [b, t] of the concatenated tokens.
          mask: bool [b, t, s], True where query t may see key s; s counts cached keys first.
          conds: per expert [b, d_i] for adaptive norms, else None.
          cache: (k, v), each [l, b', s', k, h], of tokens seen in an earlier pass; b = b' n where
            n samples share one.
          modulations: one step's of `modulations`, ({name: [l, b, m]}, [b, m]), in place of
            conds; b may be 1.
          wanted: per expert, whether its outputs are; None: all. The last layer gives only keys
            and values of the others, whose outputs are None.

        Returns:
          (outputs like xs, after the final norm; the keys and values of these tokens).
        """
        there = tuple(x is not None for x in xs)
        wanted = there if wanted is None else tuple(map(all, zip(there, wanted, strict=True)))
        xs = [None if x is None else x.astype(self.dtype) for x in xs]
        conds = [None if c is None else c.astype(self.dtype) for c in conds]
        inner, final = (None, None) if modulations is None else modulations
        if self.is_initializing():
            xs, kv = self.layers(xs, cache, inner, positions, mask, conds)
        else:
            shared = (positions, mask, conds)
            xs, kv = self._run(xs, cache, inner, shared, there, wanted)
        outputs = []
        for i, x in enumerate(xs):
            norm = getattr(self, f"final_norm{suffix(i)}")
            known = final if self.adaptive[i] else None
            normed = norm(x, conds[i], known)[0] if wanted[i] or self.is_initializing() else None
            outputs.append(normed)
        return outputs, kv

    def _run(self, xs, cache, modulations, shared, there, wanted):
        """The layers as a function of their stacked parameters, in a scan of our own: the last may
        stand after it and do less than the others.

        The loop takes layers out of the stacks by number: handed to it without the last one, they
        would be copied.
        """
        attributes = (self.sizes, self.adaptive, self.rope_bases, self.softcap)
        depth = self.sizes[0].depth
        stacked = jax.tree.map(  # numpy's arrays take no traced number
            jnp.asarray, (self.layers.variables["params"], cache, modulations)
        )

        def layer(asking, xs, number):
            params, cache, modulations = jax.tree.map(lambda leaf: leaf[number], stacked)
            block = Block(*attributes, asking, parent=None)
            # Here, so that one layer at a time is wide, and none is kept for the backward pass.
            params = nf4.dequantized(params)
            return block.apply({"params": params}, xs, cache, modulations, *shared)

        inner = functools.partial(layer, there)
        if self.remat:
            policy = jax.checkpoint_policies.nothing_saveable
            inner = jax.checkpoint(inner, prevent_cse=False, policy=policy)
        count = depth if wanted == there else depth - 1
        # A loop copies what the backward pass needs into stacks; unrolled, nothing is copied.
        xs, kv = jax.lax.scan(inner, xs, jnp.arange(count), unroll=not self.remat)
        if count < depth:
            xs, last = layer(wanted, xs, count)
            kv = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), kv, last)
        return xs, kv
