"""One attention over the tokens of several experts, with rotary positions and a cache.

b batch, t query tokens, s key tokens, d width, n heads, g query heads per key/value head, k
key/value heads, h head dimension. The modules of expert i > 0 carry the suffix `_i`.
Sources: Gemma (arXiv:2403.08295), π0 (arXiv:2410.24164), rotary positions (arXiv:2104.09864).
"""

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

    Args:
      pairs: (k, v) [b', s, k, h] each; b' divides b, whose rows share them in turn.
      mask: bool [b, t, s], s of all pairs together.

    Returns:
      [b, t, n, h], n = k g.
    """
    logits = [_per_sample("btkgh,bskh->bkgts", q, keys) for keys, _ in pairs]
    logits = logits[0] if len(logits) == 1 else jnp.concatenate(logits, axis=-1)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(mask[:, None, None, :, :], logits, MASKED_LOGIT)
    # [b, t, k, g, s], so that the samples of one cache stand together.
    weights = jnp.moveaxis(jax.nn.softmax(logits, axis=-1).astype(q.dtype), 3, 1)
    total, start = None, 0
    for _, values in pairs:
        part = weights[..., start : start + values.shape[1]]
        encoded = _per_sample("btkgs,bskh->btkgh", part, values)
        total = encoded if total is None else total + encoded
        start += values.shape[1]
    return einops.rearrange(total.astype(q.dtype), "b t k g h -> b t (k g) h")


def _per_sample(equation: str, x, shared):
    """einsum(equation, x, shared) in float32, where n rows of x [b n, t, …] share one of `shared`
    [b, …]: their tokens are laid one after another, so that it is one product and no copy.
    """
    n = x.shape[0] // shared.shape[0]
    if n == 1:
        return jnp.einsum(equation, x, shared, preferred_element_type=jnp.float32)
    x = einops.rearrange(x, "(b n) t ... -> b (n t) ...", n=n)
    y = jnp.einsum(equation, x, shared, preferred_element_type=jnp.float32)
    if equation.endswith("ts"):
        return einops.rearrange(y, "b k g (n t) s -> (b n) k g t s", n=n)
    return einops.rearrange(y, "b (n t) ... -> (b n) t ...", n=n)
