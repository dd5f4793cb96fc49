"""PaliGemma alone: text from a picture and a prompt.

Picture and prompt see each other both ways; what is generated sees them and itself so far.
Source: PaliGemma (arXiv:2407.07726). b batch, s prefix tokens, n generated tokens, v vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from policymix.models import pi0, recognize
from policymix.models.config import Pi0Config
from policymix.models.network import Pi0, attention_mask
from policymix.structs import Array, Observation, Params, typechecked

EOS_ID = 1  # PaliGemma's


@typechecked
def generate(
    config: Pi0Config,
    params: Params,
    observation: Observation,
    *,
    max_new_tokens: int,
    temperature: float | jax.Array = 0.0,
    key: jax.Array | None = None,
    eos_id: int = EOS_ID,
) -> tuple[Int[Array, "b n"], Bool[Array, "b n"]]:
    """Goes on from the prompt until the end-of-sequence token, or `max_new_tokens`.

    Each token is computed once: keys and values of what came before are kept.

    Args:
      params: a π0's, or a PaliGemma's without action expert.
      observation: pictures and prompt; its proprio is not looked at.
      temperature: of the softmax that is sampled from, with `key`; 0 takes the likeliest token.

    Returns:
      (tokens, 0 from the end on; whether each stands before the end).
    """
    pi0.check_prefix(config, observation)
    recognize.check(recognize.paligemma(pi0.shapes(config)), params, "params", whole=False)
    key = jax.random.key(0) if key is None else key
    return _generate(config, params, observation, temperature, key, max_new_tokens, eos_id)


@functools.partial(jax.jit, static_argnames=("config", "max_new_tokens", "eos_id"))
def _generate(
    config: Pi0Config, params, observation, temperature, key, max_new_tokens: int, eos_id: int
):
    def run(*args, **kwargs):
        return Pi0(config).apply({"params": params}, *args, **kwargs)

    tokens, valid = run(observation, method=Pi0.embed_prefix)
    b, s = valid.shape
    mask = attention_mask(valid, jnp.zeros(s, bool))
    out, cache = run(tokens, jnp.cumsum(valid, axis=1) - 1, mask, method=Pi0.language)
    last = s - 1 - jnp.argmax(valid[:, ::-1], axis=1)
    out = jnp.take_along_axis(out, last[:, None, None], axis=1)
    room = [(0, 0), (0, 0), (0, max_new_tokens), (0, 0), (0, 0)]
    cache = jax.tree.map(lambda x: jnp.pad(x, room), cache)
    seen = jnp.pad(valid, [(0, 0), (0, max_new_tokens)])

    def choose(out, i):
        logits = run(out, method=Pi0.logits)[:, 0]
        drawn = jax.random.categorical(
            jax.random.fold_in(key, i), logits / jnp.maximum(temperature, 1e-6)
        )
        return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1))

    def more(carry):
        i, _, done, *_ = carry
        return (i < max_new_tokens) & ~done.all()

    def step(carry):
        i, out, done, text, kept, cache, seen = carry
        token = choose(out, i)
        done = done | (token == eos_id)
        text = text.at[:, i].set(jnp.where(done, 0, token))
        kept = kept.at[:, i].set(~done)
        x = run(token[:, None], method=Pi0.embed_text)
        position = jnp.sum(seen, axis=1, keepdims=True)
        own = jnp.ones((b, 1), bool)
        mask = jnp.concatenate([seen, own], axis=1)[:, None, :]
        out, kv = run(x, position, mask, cache, method=Pi0.language)
        cache = jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, s + i, axis=2), cache, kv
        )
        return i + 1, out, done, text, kept, cache, seen.at[:, s + i].set(True)

    text, kept = jnp.zeros((b, max_new_tokens), jnp.int32), jnp.zeros((b, max_new_tokens), bool)
    start = (0, out, jnp.zeros(b, bool), text, kept, cache, seen)
    _, _, _, text, kept, *_ = jax.lax.while_loop(more, step, start)
    return text, kept
