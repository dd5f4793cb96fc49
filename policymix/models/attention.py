"""One attention over the tokens of several experts, with rotary positions and a cache.

b batch, t query tokens, s key tokens, d width, n heads, g query heads per key/value head, k
key/value heads, h head dimension. The modules of expert i > 0 carry the suffix `_i`.
Sources: Gemma (arXiv:2403.08295), π0 (arXiv:2410.24164), rotary positions (arXiv:2104.09864).
"""

import functools
from collections.abc import Sequence
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from policymix.models import lora as lora_lib
from policymix.models.lora import Lora
from policymix.models.variants import Size, suffix

# Gemma's choice: finite, so that a row with nothing to attend to is uniform, not NaN.
MASKED_LOGIT = -2.3819763e38


class Einsum(nn.Module):
    """An einsum with one parameter `w`, cast to the input's dtype, and its low-rank update."""

    shape: tuple[int, ...]
    init: Any
    lora: Lora | None = None

    @nn.compact
    def __call__(self, equation: str, x):
        w = self.param("w", self.init, self.shape)
        y = jnp.einsum(equation, x, w.astype(x.dtype))
        if self.lora is None:
            return y
        a, b = lora_lib.factors(self, "", self.shape, self.lora)
        return y + lora_lib.einsum(equation, x, a, b) * self.lora.scale


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

    Attributes:
      rope_bases: the longest wavelength of the rotary embedding, per expert.
      softcap: logits become softcap * tanh(logits / softcap); None: they stay.
    """

    sizes: tuple[Size, ...]
    rope_bases: tuple[float, ...]
    softcap: float | None = None

    @nn.compact
    def __call__(self, xs: Sequence[jax.Array | None], positions, mask, cache, asking):
        """Experts that do not ask are only attended to: they give keys and values.

        Args:
          xs: per expert [b, t_i, d_i] or None. mask: bool [b, t, s] over keys of the cache and then
            of these tokens.
          cache: (k, v) [b', s', k, h] of earlier tokens, or None; b = b' n where n samples share
            one.
          asking: per expert, whether it asks; it has outputs only then.

        Returns:
          (outputs like xs, or None; (k, v) [b, t, k, h] of these tokens).
        """
        queries, keys, values, rows, start = [], [], [], [], 0
        for i, x in enumerate(xs):
            if x is None:
                continue
            here = slice(start, start + x.shape[1])
            q, k, v = self._project(i, x, positions[:, here], asking[i])
            keys.append(k)
            values.append(v)
            if asking[i]:
                queries.append(q)
                rows.append(mask[:, here])
            start = here.stop
        own = jnp.concatenate(keys, axis=1), jnp.concatenate(values, axis=1)
        outputs: list[Any] = [None] * len(xs)
        if not queries:
            return outputs, own
        encoded = _attend(
            jnp.concatenate(queries, axis=1),
            [own] if cache is None else [cache, own],
            jnp.concatenate(rows, axis=1),
            self.softcap,
        )
        start = 0
        for i, x in enumerate(xs):
            if x is None or not asking[i]:
                continue
            expert, stop = self.sizes[i], start + x.shape[1]
            init = nn.initializers.lecun_normal(in_axis=(-3, -2), out_axis=-1)
            shape = (expert.num_heads, expert.head_dim, expert.width)
            out = Einsum(shape, init, expert.lora, name=f"attn_vec_einsum{suffix(i)}")
            outputs[i] = out("btnh,nhd->btd", encoded[:, start:stop])
            start = stop
        return outputs, own

    def _project(self, i: int, x, positions, asks: bool):
        """Expert i's queries [b, t, k, g, h] (None if it does not ask), keys and values
        [b, t, k, h].
        """
        size, end, base = self.sizes[i], suffix(i), self.rope_bases[i]

        def init(*batch_axis):
            return nn.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=batch_axis)

        if size.num_kv_heads == size.num_heads:  # OpenPI keeps the three in one array then
            shape = (3, size.num_heads, size.width, size.head_dim)
            name = f"qkv_einsum{end}"
            q, k, v = Einsum(shape, init(0, 1), size.lora, name=name)("btd,indh->ibtnh", x)
        else:
            shape = (2, size.num_kv_heads, size.width, size.head_dim)
            k, v = Einsum(shape, init(0, 1), size.lora, name=f"kv_einsum{end}")(
                "btd,ikdh->ibtkh", x
            )
            q = None
            if asks:
                shape = (size.num_heads, size.width, size.head_dim)
                q = Einsum(shape, init(0), size.lora, name=f"q_einsum{end}")("btd,ndh->btnh", x)
        if asks:
            q = rotate(q, positions, base) * size.head_dim**-0.5
            q = einops.rearrange(q, "b t (k g) h -> b t k g h", k=size.num_kv_heads)
        return q, rotate(k, positions, base), v


def _attend(q, pairs, mask, softcap):
    """Attention of q [b, t, k, g, h] over keys and values that lie in several arrays.

    What is as large as t s has one order of axes, b k t g s, and is never laid out again, joined or
    divided: the softmax's denominator divides the outputs.

    Args:
      pairs: (k, v) [b', s, k, h] each; b' divides b, whose rows share them in turn.
      mask: bool [b, t, s], s of all pairs together.

    Returns:
      [b, t, n, h], n = k g.
    """
    logits, start = [], 0
    for keys, _ in pairs:
        part, stop = _dots(q, keys), start + keys.shape[1]
        if softcap is not None:
            part = softcap * jnp.tanh(part / softcap)
        logits.append(jnp.where(mask[:, None, :, None, start:stop], part, MASKED_LOGIT))
        start = stop
    largest = functools.reduce(jnp.maximum, map(_largest, logits))
    weights = [jnp.exp(part - largest) for part in logits]
    total = sum(jnp.sum(part, axis=-1, keepdims=True) for part in weights)
    encoded = sum(
        _weigh(part.astype(q.dtype), values)
        for part, (_, values) in zip(weights, pairs, strict=True)
    )
    return einops.rearrange((encoded / total).astype(q.dtype), "b k t g h -> b t (k g) h")


def _largest(logits):
    """Of each row [b, k, t, g, s], which may be empty; it cancels, so no gradient goes through."""
    fixed = jax.lax.stop_gradient(logits)
    return jnp.max(fixed, axis=-1, keepdims=True, initial=MASKED_LOGIT)


# n rows of [b n, …] may share one of [b, …]. Their tokens are then laid one after another, so that
# it is one product and no copy.


def _dots(q, keys):
    """q [b n, t, k, g, h] and keys [b, s, k, h] → float32 [b n, k, t, g, s]."""
    n = q.shape[0] // keys.shape[0]
    q = einops.rearrange(q, "(b n) t k g h -> b (n t) k g h", n=n)
    y = jnp.einsum("btkgh,bskh->bktgs", q, keys, preferred_element_type=jnp.float32)
    return einops.rearrange(y, "b k (n t) g s -> (b n) k t g s", n=n)


def _weigh(weights, values):
    """weights [b n, k, t, g, s] and values [b, s, k, h] → float32 [b n, k, t, g, h]."""
    n = weights.shape[0] // values.shape[0]
    weights = einops.rearrange(weights, "(b n) k t g s -> b k (n t) g s", n=n)
    y = jnp.einsum("bktgs,bskh->bktgh", weights, values, preferred_element_type=jnp.float32)
    return einops.rearrange(y, "b k (n t) g h -> (b n) k t g h", n=n)
