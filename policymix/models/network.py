"""π0's network: pictures, prompt, proprio and noisy actions in, velocities out.

The parameter tree equals OpenPI's, key for key. The sequence is [camera 0]…[camera n][prompt]
(prefix, PaliGemma) followed by the suffix (action expert): π0 has [proprio][actions], π0.5
[actions] with the time fed to adaptive norms. b batch, h action horizon, a action, s tokens, d
width.
"""

import math

import einops
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Bool

from policymix.models import flow, gemma, siglip
from policymix.models.config import Pi0Config
from policymix.structs import Array, Observation, typechecked

_SOFTCAP = 50.0  # open-pi-zero's, of attention logits


class PaliGemma(nn.Module):
    """The vision tower `img` and the language model with its action expert `llm`."""

    config: Pi0Config

    def setup(self):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        sizes = (config.paligemma_variant, config.action_expert_variant)
        self.llm = gemma.Gemma(
            sizes,
            (False, config.pi05),
            config.vocab_size,
            dtype,
            config.remat,
            (10_000.0, config.expert_rope_base),
            _SOFTCAP if config.open_pi_zero else None,
        )
        if config.image_keys:
            tower = siglip.size(config.siglip_variant, config.siglip_depth)
            self.img = siglip.SigLIP(tower, sizes[0].width, dtype)


class Pi0(nn.Module):
    """The network; its methods are reached through the functions of this file."""

    config: Pi0Config

    def setup(self):
        config, width = self.config, self.config.action_expert_variant.width
        self.PaliGemma = PaliGemma(config)
        self.action_in_proj = nn.Dense(width)
        self.action_out_proj = nn.Dense(config.action_dim)
        if config.pi05:
            self.time_mlp_in = nn.Dense(width)
            self.time_mlp_out = nn.Dense(width)
        else:
            self.state_proj = nn.Dense(width)
            self.action_time_mlp_in = nn.Dense(width)
            self.action_time_mlp_out = nn.Dense(width)

    def embed_prefix(self, observation: Observation):
        """→ tokens [b, s, d], valid bool [b, s]. Prefix tokens all see each other."""
        batch_size = observation.proprio.shape[0]
        tokens, valid = [], []
        for name in self.config.image_keys:
            image = self.PaliGemma.img(_to_unit_range(observation.images[name]))
            tokens.append(image)
            valid.append(einops.repeat(observation.image_masks[name], "b -> b s", s=image.shape[1]))
        if self.config.max_token_len:
            tokens.append(self.PaliGemma.llm.embed(observation.prompt_tokens))
            valid.append(observation.prompt_mask)
        if not tokens:
            empty = (batch_size, 0)
            return jnp.zeros((*empty, self.config.paligemma_variant.width)), jnp.zeros(empty, bool)
        return jnp.concatenate(tokens, axis=1), jnp.concatenate(valid, axis=1)

    def embed_text(self, tokens):
        """int [b, s] → [b, s, d]."""
        return self.PaliGemma.llm.embed(tokens)

    def language(self, tokens, positions, mask, cache=None):
        """The language model alone: → (outputs [b, s, d], keys and values of these tokens)."""
        (out, _), kv = self.PaliGemma.llm([tokens, None], positions, mask, [None, None], cache)
        return out, kv

    def logits(self, out):
        """Outputs of the language model [b, s, d] → float32 [b, s, vocabulary]."""
        return self.PaliGemma.llm.logits(out)

    def embed_suffix(self, observation: Observation, x_t, t):
        """→ tokens [b, s, d], valid bool [b, s], blocks bool [s] (True starts a new block), cond
        [b, d] or None.
        """
        horizon = x_t.shape[1]
        actions = self.action_in_proj(x_t)
        time = self.embed_time(t)
        if self.config.pi05:
            cond = self.condition(time)
            tokens, starts = actions, [True]
        else:
            cond = None
            time = einops.repeat(time, "b d -> b h d", h=horizon)
            mixed = self.action_time_mlp_in(jnp.concatenate([actions, time], axis=-1))
            actions = self.action_time_mlp_out(nn.swish(mixed))
            proprio = self.state_proj(observation.proprio)[:, None, :]
            tokens = jnp.concatenate([proprio, actions], axis=1)
            starts = [True, True]
        if self.config.open_pi_zero:
            tokens = tokens * math.sqrt(tokens.shape[-1])
        blocks = jnp.array(starts + [False] * (horizon - 1))
        return tokens, jnp.ones(tokens.shape[:2], bool), blocks, cond

    def embed_time(self, t):
        """[b] → [b, d]."""
        config, width = self.config, self.config.action_expert_variant.width
        if config.open_pi_zero:
            return flow.embed_time_by_position(1 - t, width, config.time_max_period)
        return flow.embed_time(t, width, max_period=config.time_max_period)

    def condition(self, time):
        """π0.5's condition of adaptive norms [b, d] from embedded times."""
        return nn.swish(self.time_mlp_out(nn.swish(self.time_mlp_in(time))))

    def modulations(self, t):
        """What the adaptive norms are given at times [s], each the same for a whole batch; None for
        a π0.
        """
        if not self.config.pi05:
            return None
        return self.PaliGemma.llm.modulations(1, self.condition(self.embed_time(t)))

    def positions(self, prefix_valid, suffix_valid):
        """Of the suffix [b, s]. OpenPI counts on from the last valid token of the prefix;
        open-pi-zero starts again at 1.
        """
        before = jnp.sum(prefix_valid, axis=1, keepdims=True)
        if self.config.open_pi_zero:
            before = jnp.ones_like(before)
        return before + jnp.cumsum(suffix_valid, axis=1) - 1

    def prefix_positions(self, valid):
        """Of the prefix [b, s]."""
        if self.config.open_pi_zero:
            return jnp.cumsum(jnp.ones_like(valid, int), axis=1)
        return jnp.cumsum(valid, axis=1) - 1

    def encode_prefix(self, observation: Observation):
        """Runs the prefix once: → (cache of keys and values, valid [b, s])."""
        tokens, valid = self.embed_prefix(observation)
        mask = attention_mask(valid, jnp.zeros(valid.shape[1], bool))
        _, cache = self.PaliGemma.llm(
            [tokens, None], self.prefix_positions(valid), mask, [None, None], wanted=(False, False)
        )
        return cache, valid

    def cached_velocity(
        self, cache, prefix_valid, observation: Observation, x_t, t, modulations=None
    ):
        """v_t [b, h, a] from the suffix alone, given the prefix's keys and values; n samples of one
        prefix stand together in b.
        """
        tokens, valid, blocks, cond = self.embed_suffix(observation, x_t, t)
        prefix_valid = jnp.repeat(prefix_valid, x_t.shape[0] // prefix_valid.shape[0], axis=0)
        seen = einops.repeat(prefix_valid, "b s -> b t s", t=valid.shape[1])
        mask = jnp.concatenate([seen, attention_mask(valid, blocks)], axis=-1)
        positions = self.positions(prefix_valid, valid)
        (_, out), _ = self.PaliGemma.llm(
            [None, tokens], positions, mask, [None, cond], cache, modulations
        )
        return self._velocity(out, x_t)

    def __call__(self, observation: Observation, x_t, t):
        """v_t [b, h, a] from one pass over prefix and suffix together."""
        prefix, prefix_valid = self.embed_prefix(observation)
        suffix, suffix_valid, blocks, cond = self.embed_suffix(observation, x_t, t)
        valid = jnp.concatenate([prefix_valid, suffix_valid], axis=1)
        blocks = jnp.concatenate([jnp.zeros(prefix.shape[1], bool), blocks])
        positions = [
            self.prefix_positions(prefix_valid),
            self.positions(prefix_valid, suffix_valid),
        ]
        (_, out), _ = self.PaliGemma.llm(
            [prefix, suffix],
            jnp.concatenate(positions, axis=1),
            attention_mask(valid, blocks),
            [None, cond],
            wanted=(False, True),
        )
        return self._velocity(out, x_t)

    def _velocity(self, out, x_t):
        v_t = self.action_out_proj(out[:, -x_t.shape[1] :])
        return -v_t if self.config.open_pi_zero else v_t  # whose times run from noise to data


@typechecked
def attention_mask(valid: Bool[Array, "b s"], blocks: Bool[Array, " s"]) -> Bool[Array, "b s s"]:
    """True where a token may see another: in its own block or an earlier one, and both valid.

    Args:
      valid: False for padding and absent cameras.
      blocks: True where a token starts a new block; tokens of one block see each other both ways.
    """
    block = jnp.cumsum(blocks)
    causal = block[None, :] <= block[:, None]
    return causal[None] & valid[:, None, :] & valid[:, :, None]


def _to_unit_range(image):
    """uint8 0..255 → float32 [-1, 1]; floats are taken to be there already."""
    if image.dtype == jnp.uint8:
        return image.astype(jnp.float32) / 255.0 * 2.0 - 1.0
    return image
