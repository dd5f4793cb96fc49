"""π0 and π0.5: pictures, prompt and proprio in, a chunk of actions out, by flow matching.

The parameter tree equals OpenPI's, key for key. The sequence is [camera 0]…[camera n][prompt]
(prefix, PaliGemma) followed by the suffix (action expert): π0 has [proprio][actions], π0.5
[actions] with the time fed to adaptive norms. t = 1 is noise and t = 0 is data, as in OpenPI; the
paper runs the other way. b batch, h action horizon, a action, s tokens, d width.
Sources: π0 (arXiv:2410.24164), π0.5 (arXiv:2504.16054), and OpenPI's code for what they leave open.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from policymix import structs
from policymix.models import flow, gemma, siglip
from policymix.structs import Array, Observation, Params, typechecked

OPENPI_CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


@dataclasses.dataclass(frozen=True)
class Pi0Config:
    """Everything that decides the parameter tree and the computation. The defaults are OpenPI's π0.

    Attributes:
      paligemma_variant, action_expert_variant: a name ("gemma_2b") or the fields of `gemma.Size`.
      proprio_dim: length of the proprio vector (None: action_dim, as in OpenPI, whose states are
        padded to it).
      remat: scan the layers and compute their activations again in the backward pass. Without it
        they are unrolled and kept, which needs the memory of all layers: for small networks.
      siglip_variant: SIZE/PATCH ("So400m/14"); siglip_depth replaces its number of layers.
      pi05: adaptive norms, no proprio token. discrete_state_input: proprio is written into the
      prompt (None: pi05).
      max_token_len: prompt length (None: 48, or 200 for π0.5); 0 leaves the prompt out.
      image_keys: the cameras, in order; () leaves the vision tower out.
      image_resolution: height and width in pixels. dtype: of the computation; parameters stay as
        they are stored.
    """

    paligemma_variant: str | gemma.Size | Mapping[str, int] = "gemma_2b"
    action_expert_variant: str | gemma.Size | Mapping[str, int] = "gemma_300m"
    siglip_variant: str = "So400m/14"
    siglip_depth: int | None = None
    vocab_size: int = 257_152
    pi05: bool = False
    discrete_state_input: bool | None = None
    action_dim: int = 32
    action_horizon: int = 50
    max_token_len: int | None = None
    image_keys: tuple[str, ...] = OPENPI_CAMERAS
    image_resolution: tuple[int, int] = (224, 224)
    dtype: str = "bfloat16"
    proprio_dim: int | None = None
    remat: bool = True

    def __post_init__(self):
        def put(name, value):
            object.__setattr__(self, name, value)

        put("paligemma_variant", gemma.size(self.paligemma_variant))
        put("action_expert_variant", gemma.size(self.action_expert_variant))
        gemma.check_joint((self.paligemma_variant, self.action_expert_variant))
        put("image_keys", tuple(self.image_keys))
        put("image_resolution", tuple(self.image_resolution))
        if self.discrete_state_input is None:
            put("discrete_state_input", self.pi05)
        if self.max_token_len is None:
            put("max_token_len", 200 if self.pi05 else 48)
        if self.proprio_dim is None:
            put("proprio_dim", self.action_dim)
        for name in ("vocab_size", "action_dim", "action_horizon", "proprio_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"Pi0Config.{name} is {getattr(self, name)}; at least 1 is needed")
        patch = siglip.size(self.siglip_variant).patch
        if self.image_keys and min(self.image_resolution) < patch:
            raise ValueError(
                f"image_resolution {self.image_resolution} is smaller than one patch ({patch} "
                "pixels)"
            )
        if self.dtype not in ("bfloat16", "float32", "float16"):
            raise ValueError(
                f"Pi0Config.dtype is {self.dtype!r}; expected bfloat16, float32 or float16"
            )


class PaliGemma(nn.Module):
    """The vision tower `img` and the language model with its action expert `llm`."""

    config: Pi0Config

    def setup(self):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        sizes = (config.paligemma_variant, config.action_expert_variant)
        self.llm = gemma.Gemma(sizes, (False, config.pi05), config.vocab_size, dtype, config.remat)
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

    def embed_suffix(self, observation: Observation, x_t, t):
        """→ tokens [b, s, d], valid bool [b, s], blocks bool [s] (True starts a new block), cond
        [b, d] or None.
        """
        horizon = x_t.shape[1]
        actions = self.action_in_proj(x_t)
        time = flow.embed_time(t, self.config.action_expert_variant.width)
        if self.config.pi05:
            cond = nn.swish(self.time_mlp_out(nn.swish(self.time_mlp_in(time))))
            tokens, starts = actions, [True]
        else:
            cond = None
            time = einops.repeat(time, "b d -> b h d", h=horizon)
            mixed = self.action_time_mlp_in(jnp.concatenate([actions, time], axis=-1))
            actions = self.action_time_mlp_out(nn.swish(mixed))
            tokens = jnp.concatenate(
                [self.state_proj(observation.proprio)[:, None, :], actions], axis=1
            )
            starts = [True, True]
        blocks = jnp.array(starts + [False] * (horizon - 1))
        return tokens, jnp.ones(tokens.shape[:2], bool), blocks, cond

    def encode_prefix(self, observation: Observation):
        """Runs the prefix once: → (cache of keys and values, valid [b, s])."""
        tokens, valid = self.embed_prefix(observation)
        mask = attention_mask(valid, jnp.zeros(valid.shape[1], bool))
        _, cache = self.PaliGemma.llm(
            [tokens, None], jnp.cumsum(valid, axis=1) - 1, mask, [None, None]
        )
        return cache, valid

    def cached_velocity(self, cache, prefix_valid, observation: Observation, x_t, t):
        """v_t [b, h, a] from the suffix alone, given the prefix's keys and values."""
        tokens, valid, blocks, cond = self.embed_suffix(observation, x_t, t)
        mask = attention_mask(valid, blocks)
        seen = einops.repeat(prefix_valid, "b s -> b t s", t=valid.shape[1])
        positions = jnp.sum(prefix_valid, axis=1, keepdims=True) + jnp.cumsum(valid, axis=1) - 1
        (_, out), _ = self.PaliGemma.llm(
            [None, tokens], positions, jnp.concatenate([seen, mask], axis=-1), [None, cond], cache
        )
        return self.action_out_proj(out[:, -x_t.shape[1] :])

    def __call__(self, observation: Observation, x_t, t):
        """v_t [b, h, a] from one pass over prefix and suffix together."""
        prefix, prefix_valid = self.embed_prefix(observation)
        suffix, suffix_valid, blocks, cond = self.embed_suffix(observation, x_t, t)
        valid = jnp.concatenate([prefix_valid, suffix_valid], axis=1)
        blocks = jnp.concatenate([jnp.zeros(prefix.shape[1], bool), blocks])
        (_, out), _ = self.PaliGemma.llm(
            [prefix, suffix],
            jnp.cumsum(valid, axis=1) - 1,
            attention_mask(valid, blocks),
            [None, cond],
        )
        return self.action_out_proj(out[:, -x_t.shape[1] :])


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


def example_observation(config: Pi0Config, batch_size: int = 1) -> Observation:
    """An observation of zeros with every camera present: the shapes that the network expects."""
    length = config.max_token_len
    return Observation(
        images={
            name: jnp.zeros((batch_size, *config.image_resolution, 3), jnp.float32)
            for name in config.image_keys
        },
        image_masks={name: jnp.ones((batch_size,), bool) for name in config.image_keys},
        proprio=jnp.zeros((batch_size, config.proprio_dim), jnp.float32),
        prompt_tokens=jnp.zeros((batch_size, length), jnp.int32) if length else None,
        prompt_mask=jnp.ones((batch_size, length), bool) if length else None,
    )


def check_observation(config: Pi0Config, observation: Observation) -> None:
    """ValueError naming what the network expects and what it was given. Looks at shapes only."""
    batch_size = observation.proprio.shape[0]

    def require(what, found, expected):
        if found != expected:
            raise ValueError(f"observation: {what} is {found}, the model expects {expected}")

    require(
        "the shape of proprio", tuple(observation.proprio.shape), (batch_size, config.proprio_dim)
    )
    for name in config.image_keys:
        if name not in observation.images or name not in observation.image_masks:
            raise ValueError(
                f"observation: camera {name!r} or its mask is missing; there are "
                f"{list(observation.images)}"
            )
        expected = (batch_size, *config.image_resolution, 3)
        require(f"the shape of image {name!r}", tuple(observation.images[name].shape), expected)
        mask = tuple(observation.image_masks[name].shape)
        require(f"the shape of the mask of image {name!r}", mask, (batch_size,))
    for name in ("prompt_tokens", "prompt_mask") if config.max_token_len else ():
        if getattr(observation, name) is None:
            raise ValueError(f"observation: {name} is missing (max_token_len 0 leaves prompts out)")
        found = tuple(getattr(observation, name).shape)
        require(f"the shape of {name}", found, (batch_size, config.max_token_len))


@functools.partial(jax.jit, static_argnums=0)
def init(config: Pi0Config, key: jax.Array) -> dict[str, Any]:
    """Fresh float32 parameters, OpenPI's tree. Under `jax.eval_shape` nothing is allocated."""
    x_t = jnp.zeros((1, config.action_horizon, config.action_dim), jnp.float32)
    return Pi0(config).init(key, example_observation(config), x_t, jnp.zeros((1,), jnp.float32))[
        "params"
    ]


def shapes(config: Pi0Config) -> dict[str, Any]:
    """The parameter tree as `jax.ShapeDtypeStruct`s."""
    return jax.eval_shape(functools.partial(init, config), jax.random.key(0))


def _apply(config: Pi0Config, params: Params, *args, method=None):
    return Pi0(config).apply({"params": params}, *args, method=method)


@typechecked
def velocity(
    config: Pi0Config,
    params: Params,
    observation: Observation,
    x_t: Float[Array, "b h a"],
    t: Float[Array, " b"],
) -> Float[Array, "b h a"]:
    """The velocity v_t at x_t: the direction from data to noise (noise is t = 1)."""
    check_observation(config, observation)
    return _apply(config, params, observation, x_t, t)


@typechecked
def flow_loss(
    config: Pi0Config,
    params: Params,
    observation: Observation,
    actions: Float[Array, "b h a"],
    *,
    noise: Float[Array, "b h a"],
    t: Float[Array, " b"],
) -> Float[Array, "b h"]:
    """Flow-matching loss: mean over action dimensions of (v(x_t, t) - (noise - actions))^2, x_t on
    the straight path.
    """
    x_t, u_t = flow.path(actions, noise, t)
    return flow.squared_error(velocity(config, params, observation, x_t, t), u_t)


def loss(
    config: Pi0Config, params: Params, batch: structs.Batch, key: jax.Array
) -> tuple[jax.Array, structs.Metrics]:
    """Mean flow-matching loss of a batch; `key` gives the noise and times that OpenPI draws."""
    noise, t = _noise_and_times(batch, key)
    value = jnp.mean(flow_loss(config, params, batch.observation, batch.actions, noise=noise, t=t))
    return value, {"loss": value}


def residual(
    config: Pi0Config, params: Params, batch: structs.Batch, key: jax.Array
) -> Float[Array, "b h a"]:
    """v(x_t, t) - (noise - actions), whose mean square is `loss` with the same key."""
    noise, t = _noise_and_times(batch, key)
    x_t, u_t = flow.path(batch.actions, noise, t)
    return velocity(config, params, batch.observation, x_t, t) - u_t


def _noise_and_times(batch: structs.Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The noise [b, h, a] and times [b] that OpenPI draws from a key in training."""
    _, noise_key, time_key = jax.random.split(
        key, 3
    )  # the first is OpenPI's key for picture augmentation
    noise = jax.random.normal(noise_key, batch.actions.shape)
    return noise, flow.sample_time(time_key, batch.actions.shape[0])


@typechecked
def sample_actions(
    config: Pi0Config,
    params: Params,
    observation: Observation,
    *,
    noise: Float[Array, "b h a"],
    num_flow_steps: int = 10,
) -> Float[Array, "b h a"]:
    """Actions by Euler integration from `noise`, with the prefix's keys and values computed once.

    Under `jax.jit`, `config` and `num_flow_steps` are static arguments.
    """
    check_observation(config, observation)
    cache, valid = _apply(config, params, observation, method=Pi0.encode_prefix)

    def step(x_t, t):
        return _apply(config, params, cache, valid, observation, x_t, t, method=Pi0.cached_velocity)

    return flow.integrate(step, noise, num_flow_steps)


def embed_prefix(config: Pi0Config, params: Params, observation: Observation):
    """Picture and prompt tokens [b, s, d] and their validity [b, s]: what PaliGemma sees."""
    return _apply(config, params, observation, method=Pi0.embed_prefix)


def embed_suffix(
    config: Pi0Config, params: Params, observation: Observation, x_t: jax.Array, t: jax.Array
):
    """Suffix tokens [b, s, d], validity [b, s], block starts [s], π0.5's condition or None."""
    return _apply(config, params, observation, x_t, t, method=Pi0.embed_suffix)
