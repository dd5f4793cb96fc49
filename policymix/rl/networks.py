"""The networks of chunk-level reinforcement learning: critics, values and policies over chunks.

b batch, n chunks of one observation, h action horizon, a action, d width, e ensemble, s tokens.

"fused" gives each network an encoder of its own: of pictures, proprio and language, whose outputs
an MLP fuses; then heads. "plain" is what Q-chunking and FQL have: MLPs of GELU and, in critics and
values, LayerNorm. There each network has an encoder of pictures of its own; here they share one,
and targets read it too, so that pictures are encoded once.
Sources: Li et al. 2025 (arXiv:2507.07969); Park et al. 2025 (arXiv:2502.02538).

An observation is encoded once (`features`), and its features are projected once, however many
chunks a critic or a policy sees of it: a layer of [features | chunk] is the sum of two products.
"""

import math

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from policymix.rl.config import LearnerConfig
from policymix.rl.layers import Convolution, GeluNorm
from policymix.structs import Array, Observation, Params

_CONVOLUTIONS = ((32, 4), (64, 2), (128, 2), (256, 2))  # width, stride
_LEAST_PIXELS = 32
_EMBEDDING_DIM = 128
NAMES = {  # what networks each algorithm has
    "chunk_iql": ("critic", "value", "policy"),
    "chunk_soft": ("critic", "value", "policy"),
    "cloning": ("policy",),
    "qc": ("critic", "policy"),
    "qc_fql": ("critic", "policy", "actor"),
}


def init(config: LearnerConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters of every network that the algorithm has, by its name.

    "plain" networks share what pictures and language are read by: "encoder", if there are any.

    Raises:
      ValueError: pictures are too small for the convolutions.
    """
    if config.image_keys and min(config.image_resolution) < _LEAST_PIXELS:
        raise ValueError(
            f"config.offline_rl.image_resolution is {config.image_resolution}; at least "
            f"{_LEAST_PIXELS} pixels a side are needed"
        )
    shapes = jax.eval_shape(lambda: _structure(config))
    return flax.traverse_util.unflatten_dict(_drawn(config, shapes, key))


def features(
    config: LearnerConfig, params: Params, name: str, observation: Observation
) -> jax.Array:
    """What network `name` reads of an observation, [b, d]; of "plain" networks the same for all.

    Args:
      name: "critic", "value", "policy" or "actor".

    Raises:
      ValueError: a camera, the prompt or the proprio is not as the configuration has it.
    """
    _check(config, observation)
    own = (params[name] if config.network == "fused" else params).get("encoder", {})
    return _wide(Encoder(config).apply({"params": own}, observation))


def critic(config: LearnerConfig, params: Params, features: Array, actions: Array) -> jax.Array:
    """Q of a chunk [b, h, a], as [e, b], or of each of several [b, n, h, a], as [e, b, n]."""
    q = _apply(config, params, "critic", features[:, None], _flat(actions))[..., 0]
    return q if actions.ndim == 4 else q[..., 0]


def value(config: LearnerConfig, params: Params, features: Array) -> jax.Array:
    """V of an observation, [b]."""
    return _apply(config, params, "value", features[:, None])[:, 0, 0]


def gaussian(config: LearnerConfig, params: Params, features: Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of the chunk, each [b, h, a].

    The deviation is softplus(·) + min_std.
    """
    out = _apply(config, params, "policy", features[:, None])
    out = out.reshape(len(out), 2, config.action_horizon, config.action_dim)
    return out[:, 0], jax.nn.softplus(out[:, 1]) + config.min_std


def velocity(
    config: LearnerConfig, params: Params, features: Array, x_t: Array, t: Array
) -> jax.Array:
    """The flow's velocity at x_t [b, h, a] and t [b], or at several [b, n, h, a] and [b, n]."""
    times = t.reshape(len(t), -1, 1)
    out = _apply(config, params, "policy", features[:, None], _flat(x_t), times)
    return out.reshape(x_t.shape)


def one_step(config: LearnerConfig, params: Params, features: Array, noise: Array) -> jax.Array:
    """The chunk that the one-step actor makes of noise, both [b, h, a]."""
    out = _apply(config, params, "actor", features[:, None], _flat(noise))
    return out.reshape(noise.shape)


class Dense(nn.Module):
    """A layer of several inputs side by side, each [..., d], added up where they broadcast."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, *parts: jax.Array) -> jax.Array:
        fan_in = sum(part.shape[-1] for part in parts)
        kernel = self.param("kernel", nn.initializers.zeros, (fan_in, self.width))
        bias = self.param("bias", nn.initializers.zeros, (self.width,))
        out, row = bias.astype(self.dtype), 0
        out = out.reshape(*[1] * (parts[0].ndim - 1), -1)
        for part in parts:
            rows = kernel[row : row + part.shape[-1]]
            out = part.astype(self.dtype) @ rows.astype(self.dtype) + out
            row += part.shape[-1]
        return out


class MLP(nn.Module):
    """Dense layers; a nonlinearity after each but the last, and LayerNorm after GELU if wanted."""

    widths: tuple[int, ...]
    relu: bool  # else GELU
    layer_norm: bool  # then GELU too
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, *parts: jax.Array) -> jax.Array:
        for i, width in enumerate(self.widths):
            x = Dense(width, self.dtype, name=f"dense_{i}")(*parts)
            if i + 1 < len(self.widths):
                if self.layer_norm:
                    x = GeluNorm(self.dtype, name=f"norm_{i}")(x)
                else:
                    x = nn.relu(x) if self.relu else nn.gelu(x)
            parts = (x,)
        return x


class Pictures(nn.Module):
    """A convolutional network of one picture: [b, hh, ww, 3] in 0..1 to [b, d]."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i, (width, stride) in enumerate(_CONVOLUTIONS):
            x = nn.relu(Convolution(width, stride, self.dtype, name=f"conv_{i}")(x))
        return Dense(self.width, self.dtype, name="dense")(x.reshape(len(x), -1))


class Prompt(nn.Module):
    """The mean embedding of a prompt's tokens: [b, s] to [b, d]."""

    vocab_size: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        shape = (self.vocab_size, _EMBEDDING_DIM)
        table = self.param("embedding", nn.initializers.zeros, shape)
        counted = mask.astype(self.dtype)[..., None]
        total = jnp.sum(table.astype(self.dtype)[tokens] * counted, axis=1)
        return total / jnp.maximum(jnp.sum(counted, axis=1), 1)


class Encoder(nn.Module):
    """Pictures, proprio and language side by side; if "fused", each through its own layers, and
    then all through an MLP.
    """

    config: LearnerConfig

    @nn.compact
    def __call__(self, observation: Observation) -> jax.Array:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        hidden, half = config.hidden_dim, config.hidden_dim // 2
        fused, parts = config.network == "fused", []

        def mlp(name: str, *widths: int) -> MLP:
            return MLP(widths, True, False, dtype, name=name)

        if config.image_keys:
            width = config.feature_dim // 2 if fused else config.feature_dim
            seen = _per_camera(config, Pictures(width, dtype, name="pictures"), observation)
            if not fused:  # so that pictures weigh as much as numbers of the order of one do
                seen = jnp.tanh(nn.LayerNorm(dtype=dtype, name="norm")(seen))
            parts.append(seen)
        proprio = observation.proprio.astype(dtype)
        parts.append(mlp("proprio", half, half)(proprio) if fused else proprio)
        if config.max_token_len:
            prompt = Prompt(config.vocab_size, dtype, name="prompt")
            mean = prompt(observation.prompt_tokens, observation.prompt_mask)
            parts.append(Dense(half, dtype, name="language")(mean) if fused else mean)
        elif fused:  # language's seat stays, as in the program that this architecture is from
            parts.append(jnp.zeros((len(proprio), half), dtype))
        joined = jnp.concatenate(parts, axis=-1)
        return mlp("fusion", hidden, config.feature_dim)(joined) if fused else joined


class Head(nn.Module):
    """What comes after an encoder: features [b, 1, d] and whatever else, [b, n, ·], to [b, n, ·],
    by an MLP for each of `widths`; a "fused" one that `encodes` has layers for the chunk first.
    """

    config: LearnerConfig
    widths: tuple[tuple[str, int], ...]
    layer_norm: bool = False
    encodes: bool = False

    @nn.compact
    def __call__(self, *parts: jax.Array) -> jax.Array:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        hidden, fused = config.hidden_dim, config.network == "fused"
        if self.encodes and fused:
            chunk = MLP((2 * hidden, hidden, hidden), True, False, dtype, name="chunk")
            parts = (parts[0], chunk(parts[1]))
        out = []
        for name, width in self.widths:
            if fused:
                mlp = MLP((hidden, hidden // 2, width), True, False, dtype, name=name)
            else:
                widths = (*[hidden] * config.num_layers, width)
                mlp = MLP(widths, False, self.layer_norm, dtype, name=name)
            out.append(mlp(*parts))
        return jnp.concatenate(out, axis=-1)


def _head(config: LearnerConfig, name: str) -> nn.Module:
    width = config.chunk_dim
    if name == "critic":
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": None}
        ensemble = nn.vmap(Head, axis_size=config.num_critics, **axes)
        return ensemble(config, (("head", 1),), config.layer_norm, True)
    if name == "value":
        return Head(config, (("head", 1),), config.layer_norm)
    if name == "actor" or config.policy == "flow":
        return Head(config, (("head", width),))
    if config.network == "plain":
        return Head(config, (("head", 2 * width),))
    return Head(config, (("mean", width), ("std", width)))


def _structure(config: LearnerConfig) -> Params:
    """The tree of parameters, all 0 or 1."""
    key, fused, params = jax.random.key(0), config.network == "fused", {}
    x, variables = Encoder(config).init_with_output(key, _example(config))
    encoder = variables.get("params", {})
    if encoder and not fused:
        params["encoder"] = encoder
    inputs = (x[:, None], jnp.zeros((1, 1, config.chunk_dim)), jnp.zeros((1, 1, 1)))
    for name in NAMES[config.algorithm]:
        of_policy = 1 if config.policy == "gaussian" else 3
        count = {"value": 1, "policy": of_policy}.get(name, 2)
        params[name] = dict(_head(config, name).init(key, *inputs[:count])["params"])
        if fused:
            params[name]["encoder"] = encoder
    return params


def _drawn(config: LearnerConfig, shapes: Params, key: jax.Array) -> dict:
    """Initial values by path: "fused" as PyTorch has them, uniform in ±1/√fan_in for kernels and
    biases; "plain" with variance scaling, uniform in ±√(6 / (fan_in + fan_out)), biases 0.
    """
    leaves = flax.traverse_util.flatten_dict(shapes)
    # One draw for all: a program that draws each leaf takes ten times as long to compile.
    numbers = jax.random.uniform(key, (sum(x.size for x in leaves.values()),), jnp.float32, -1.0)
    values, start = {}, 0
    for path, leaf in sorted(leaves.items()):
        drawn = numbers[start : start + leaf.size].reshape(leaf.shape)
        start += leaf.size
        if path[-1] == "embedding":
            values[path] = drawn * (3 / leaf.shape[-1]) ** 0.5  # of length 1, as a number is
        elif (kernel := leaves.get((*path[:-1], "kernel"))) is None:  # LayerNorm's
            # With a type, or else Adam's first step changes it, and the update compiles twice.
            values[path] = jnp.full(leaf.shape, path[-1] == "scale", jnp.float32)
        else:
            # The leading axis of an ensemble counts for nothing, those of a convolution do.
            receptive = math.prod(kernel.shape[:2]) if kernel.ndim == 4 else 1
            fan_in, fan_out = (receptive * n for n in kernel.shape[-2:])
            scaled = (6 / (fan_in + fan_out)) ** 0.5 if path[-1] == "kernel" else 0.0
            values[path] = drawn * (fan_in**-0.5 if config.network == "fused" else scaled)
    return values


def _apply(config: LearnerConfig, params: Params, name: str, *inputs: jax.Array) -> jax.Array:
    own = {k: v for k, v in params[name].items() if k != "encoder"}
    alone = all(x.shape[1] == 1 for x in inputs)
    if alone:  # an axis of one makes XLA transpose what it need not: an eighth of an update on CPUs
        inputs = tuple(x[:, 0] for x in inputs)
    out = _wide(_head(config, name).apply({"params": own}, *inputs))
    return jnp.expand_dims(out, -2) if alone else out


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _per_camera(config: LearnerConfig, pictures: Pictures, observation: Observation) -> jax.Array:
    """One network's view of every camera, side by side: [b, cameras * d]."""
    seen = []  # one after the other: all at once would leave the CPU's caches
    for x in (observation.images[name] for name in config.image_keys):
        unit = x.astype(pictures.dtype)
        seen.append(pictures(unit / 255 if x.dtype == jnp.uint8 else (unit + 1) / 2))
    return jnp.concatenate(seen, axis=-1)


def _flat(actions: Array) -> Array:
    """[b, h, a] or [b, n, h, a] to [b, n, h * a]."""
    return actions.reshape(len(actions), -1, actions.shape[-2] * actions.shape[-1])


def _example(config: LearnerConfig) -> Observation:
    picture = jnp.zeros((1, *config.image_resolution, 3), jnp.uint8)
    tokens = jnp.zeros((1, config.max_token_len), jnp.int32)
    pictures = dict.fromkeys(config.image_keys, picture)
    return Observation(pictures, {}, jnp.zeros((1, config.proprio_dim)), tokens, tokens == 0)


def _check(config: LearnerConfig, observation: Observation) -> None:
    if observation.proprio.shape[-1] != config.proprio_dim:
        raise ValueError(
            f"proprio has {observation.proprio.shape[-1]} numbers; the networks were made for "
            f"{config.proprio_dim}"
        )
    for name in config.image_keys:
        found = observation.images[name].shape[1:3] if name in observation.images else None
        if found != config.image_resolution:
            told = "is missing" if found is None else f"has {found[0]} × {found[1]} pixels"
            made = " × ".join(map(str, config.image_resolution))
            raise ValueError(f"the picture of camera {name!r} {told}; the networks need {made}")
    if config.max_token_len and observation.prompt_tokens is None:
        raise ValueError(
            "the observation has no prompt; tokenize one, or set config.offline_rl.language=False"
        )
