"""The row of `make bench` that learns from pictures: an update of `chunk_soft`, and the same update
as an eager program makes it, which encodes an observation whenever it asks a network about it.

Pictures cost about everything. With F the passes through an encoder, of two cameras, and backward
passes for twice as much again: a straightforward update encodes the next observation once for the
critic's target; the current one three times for each of five samples (drawn, its density, its Q),
and for the three losses once forward and backward each, and for the policy's weights twice: 18 F
and three of 3 F, 27 in all. Ours: the next one once, the current one for the three losses, and
once more for the critic and the value as they then are: 3 F and three of 3 F, 12 in all. So 2.2
times is what to expect, and the first layer has no gradient in its input, which makes it 2.3;
the rest is `layers.convolve`, beside XLA's convolution as it stands.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

from policymix.rl import chunk_soft, networks
from policymix.rl import state as states
from policymix.rl.config import LearnerConfig
from policymix.runs.measurements import Row, here, interleaved
from policymix.structs import ChunkBatch, Observation, Params

_TOLERANCE = 1e-4  # of losses after steps of Adam, where rounding decides the least gradients
_OF_MEMBERS = ("chunk", "head")  # of a critic; these have an axis of the ensemble, here of one


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the update is.

    Attributes:
      batch_size: transitions. pixels: height and width of both cameras' pictures.
      hidden_dim: of the networks. num_samples: chunks of the policy for each soft value.
    """

    batch_size: int = 32
    pixels: int = 256
    hidden_dim: int = 512
    num_samples: int = 5


SIZES = {"soft": Sizes()}


def soft_row(sizes: Sizes) -> list[Row]:
    """One update of critic, value and policy, each with its encoder of two cameras.

    Raises:
      ValueError: the losses of the two differ.
    """
    config = _config(sizes)
    batch, noise = _example(config, sizes.batch_size)
    state = states.init_state(config, networks.init(config, jax.random.key(0)))
    ours = jax.jit(functools.partial(chunk_soft.update_given, config))
    theirs = Straightforward(config)
    moments = {name: theirs.adam.init(tree) for name, tree in state.params.items()}
    found = require_same(
        ours(state, batch, noise)[1], theirs.update(state.params, moments, batch, noise)[2]
    )
    row = Row(
        f"offline RL from {sizes.pixels}-px pictures",
        *interleaved(
            here(lambda: ours(state, batch, noise)),
            here(lambda: theirs.update(state.params, moments, batch, noise)),
        ),
    )
    used = row.theirs.cpu / row.ours.cpu
    return [row._replace(note=f"{used:.2f} times less CPU; losses equal to {found:.1e}")]


def require_same(ours: Mapping, theirs: Mapping) -> float:
    """The largest relative difference of losses, each by itself.

    Args:
      theirs: {name: loss}; ours: at least the same names.

    Raises:
      ValueError: it is no rounding.
    """
    found = max(abs(float(ours[name]) / float(loss) - 1) for name, loss in theirs.items())
    if not found <= _TOLERANCE:
        raise ValueError(
            f"the losses of ours and of the straightforward update differ by {found:.1e}; "
            f"{_TOLERANCE:.0e} would be rounding"
        )
    return found


class Straightforward:
    """The update one question at a time, as an eager program asks: every call of a network reads
    its observation anew. Each call is compiled by itself.
    """

    def __init__(self, config: LearnerConfig):
        self.config, self.adam = config, optax.adam(config.learning_rate)
        for name in ("q", "v", "sample", "log_prob"):
            setattr(self, f"ask_{name}", jax.jit(getattr(self, name)))
        self.improve = {
            "critic": jax.jit(self._improving("critic", self.critic_loss)),
            "value": jax.jit(self._improving("value", self.value_loss)),
            "policy": jax.jit(self._improving("policy", self.policy_loss)),
        }

    def q(self, params: Params, observation: Observation, actions: jax.Array) -> jax.Array:
        params = {**params, **jax.tree.map(lambda x: x[0], {k: params[k] for k in _OF_MEMBERS})}
        chunk = mlp(params["chunk"], actions.reshape(len(actions), -1))
        both = jnp.concatenate([encode(self.config, params["encoder"], observation), chunk], -1)
        return mlp(params["head"], both)[:, 0]

    def v(self, params: Params, observation: Observation) -> jax.Array:
        return mlp(params["head"], encode(self.config, params["encoder"], observation))[:, 0]

    def _gaussian(self, params: Params, observation: Observation):
        read = encode(self.config, params["encoder"], observation)
        shape = (-1, self.config.action_horizon, self.config.action_dim)
        std = jax.nn.softplus(mlp(params["std"], read)) + self.config.min_std
        return mlp(params["mean"], read).reshape(shape), std.reshape(shape)

    def sample(self, params: Params, observation: Observation, noise: jax.Array) -> jax.Array:
        mean, std = self._gaussian(params, observation)
        return mean + std * noise

    def log_prob(self, params: Params, observation: Observation, actions: jax.Array) -> jax.Array:
        mean, std = self._gaussian(params, observation)
        return jnp.sum(jax.scipy.stats.norm.logpdf(actions, mean, std), axis=(-1, -2))

    def critic_loss(self, params, observation, actions, target):
        return jnp.mean(jnp.square(self.q(params, observation, actions) - target))

    def value_loss(self, params, observation, target):
        return jnp.mean(jnp.square(self.v(params, observation) - target))

    def policy_loss(self, params, observation, actions, weights):
        return -jnp.mean(weights * self.log_prob(params, observation, actions))

    def _improving(self, name: str, loss_of: Callable) -> Callable:
        def improve(params, moments, *inputs):
            loss, gradient = jax.value_and_grad(loss_of)(params, *inputs)
            updates, moments = self.adam.update(gradient, moments)
            return optax.apply_updates(params, updates), moments, {f"{name}/loss": loss}

        return improve

    def update(
        self, params: Params, moments: Mapping, batch: ChunkBatch, noise: jax.Array
    ) -> tuple[Params, Mapping, dict[str, jax.Array]]:
        """`chunk_soft.update_given` without target networks, ensembles and candidates."""
        now, actions = batch.observation, batch.actions
        params, moments, losses = dict(params), dict(moments), {}

        def improve(name, *inputs):
            params[name], moments[name], loss = self.improve[name](
                params[name], moments[name], now, *inputs
            )
            losses.update(loss)

        after = self.ask_v(params["value"], batch.next_observation)
        improve("critic", actions, batch.rewards + batch.discounts * after)
        soft = []
        for k in range(noise.shape[1]):
            chunk = self.ask_sample(params["policy"], now, noise[:, k])
            log_prob = self.ask_log_prob(params["policy"], now, chunk)
            q = self.ask_q(params["critic"], now, chunk)
            soft.append(q - self.config.entropy_temperature * log_prob)
        improve("value", sum(soft) / len(soft))
        q, v = self.ask_q(params["critic"], now, actions), self.ask_v(params["value"], now)
        weights = jnp.exp((q - v) / self.config.temperature)
        improve("policy", actions, weights / (jnp.mean(weights) + 1e-8))
        return params, moments, losses


def encode(config: LearnerConfig, params: Params, observation: Observation) -> jax.Array:
    """A "fused" encoder of pictures and proprio as it is written down, [b, d]."""
    parts = []
    for name in config.image_keys:
        x = jnp.asarray(observation.images[name], jnp.float32) / 255
        for i in range(4):
            layer = params["pictures"][f"conv_{i}"]
            stride = len(layer["kernel"]) // 2
            padding, numbers = [(stride // 2, stride // 2)] * 2, ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(
                x, layer["kernel"], (stride, stride), padding, dimension_numbers=numbers
            )
            x = jax.nn.relu(x + layer["bias"].reshape(1, 1, 1, -1))
        parts.append(_dense(params["pictures"]["dense"], x.reshape(len(x), -1)))
    proprio = mlp(params["proprio"], observation.proprio)
    parts += [proprio, jnp.zeros_like(proprio)]  # no language
    return mlp(params["fusion"], jnp.concatenate(parts, axis=-1))


def mlp(params: Params, x: jax.Array) -> jax.Array:
    """Dense layers with ReLU between them."""
    for i in range(len(params)):
        x = _dense(params[f"dense_{i}"], jax.nn.relu(x) if i else x)
    return x


def _dense(params: Params, x: jax.Array) -> jax.Array:
    return x @ params["kernel"] + params["bias"][None]


def _config(sizes: Sizes) -> LearnerConfig:
    """The settings of the program that these losses are from."""
    return LearnerConfig(
        algorithm="chunk_soft",
        entropy_temperature=1.0,
        max_weight=0,
        ema_decay=0,
        num_critics=1,
        min_std=1e-6,
        image_keys=("image", "wrist_image"),
        image_resolution=(sizes.pixels, sizes.pixels),
        num_samples=sizes.num_samples,
        hidden_dim=sizes.hidden_dim,
        feature_dim=sizes.hidden_dim,
    )


def _example(config: LearnerConfig, batch_size: int) -> tuple[ChunkBatch, jax.Array]:
    """A random batch on the device, and the noise of the policy's samples."""
    rng, chunk = np.random.default_rng(0), (config.action_horizon, config.action_dim)

    def observation() -> Observation:
        shape = (batch_size, *config.image_resolution, 3)
        return Observation(
            images={name: rng.integers(0, 256, shape, np.uint8) for name in config.image_keys},
            image_masks={name: np.ones(batch_size, bool) for name in config.image_keys},
            proprio=rng.standard_normal((batch_size, config.proprio_dim), np.float32),
        )

    batch = ChunkBatch(
        observation=observation(),
        actions=rng.standard_normal((batch_size, *chunk), np.float32),
        action_is_pad=np.zeros((batch_size, config.action_horizon), bool),
        rewards=rng.integers(0, 2, batch_size).astype(np.float32),
        discounts=np.full(batch_size, 0.99**config.action_horizon, np.float32),
        next_observation=observation(),
        has_next=np.ones(batch_size, bool),
    )
    noise = rng.standard_normal((batch_size, config.num_samples, *chunk), np.float32)
    return jax.device_put((batch, noise))
