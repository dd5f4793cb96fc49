"""The rows of `make bench` that run the network: sampling actions, and a step of training. Ours,
and a straightforward version of the same function that must give the same numbers.

The straightforward versions use the library's layers, scanned and rematerialised as ours are, and
leave out what ours do about them.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from policymix import memory, structs
from policymix.models import flow, pi0
from policymix.models.network import Pi0, attention_mask
from policymix.runs.measurements import Row, here, interleaved
from policymix.structs import LossFn, Observation, Params, PyTree
from policymix.training import optimizers
from policymix.training import state as training

_SAMPLES, _FLOW_STEPS = 8, 10
_REPEATS = 9  # of rows whose sides are close to each other
_TOLERANCE = 1e-5  # of the largest number: float32 in another order


def _model(width: int, vocab_size: int, siglip_variant: str) -> pi0.Pi0Config:
    """π0.5 as on LIBERO (three cameras, 200 prompt tokens, 10 actions), with the real one's depth
    of 18 layers, its number of heads, and its proportions of language model, expert and tower.
    """
    gemma = {"depth": 18, "num_heads": 8, "num_kv_heads": 1, "head_dim": width // 8}
    return pi0.Pi0Config(
        paligemma_variant={"width": width, "mlp_dim": 8 * width, **gemma},
        action_expert_variant={"width": width // 2, "mlp_dim": 2 * width, **gemma},
        siglip_variant=siglip_variant,
        siglip_depth=8,
        vocab_size=vocab_size,
        pi05=True,
        action_horizon=10,
        dtype="float32",
    )


# Of 108 M parameters, and of 37 M.
MODELS = {"sampled": _model(400, 4_000, "S/14"), "trained": _model(240, 2_000, "Ti/14")}


def noisy_params(config: pi0.Pi0Config) -> Params:
    """Fresh parameters and some noise: a fresh vision head and fresh adaptive norms are zero, and
    whatever they get comes out the same.
    """
    rng, fresh = np.random.default_rng(0), pi0.init(config, jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.02 * rng.standard_normal(x.shape, np.float32), fresh)


def observation_of_one(config: pi0.Pi0Config) -> Observation:
    """A random one with every camera there, and a tenth of the prompt padded."""
    rng, length = np.random.default_rng(1), config.max_token_len
    picture = (1, *config.image_resolution, 3)
    found = Observation(
        images={name: rng.uniform(-1, 1, picture).astype("f4") for name in config.image_keys},
        image_masks={name: np.ones(1, bool) for name in config.image_keys},
        proprio=rng.standard_normal((1, config.proprio_dim), np.float32),
        prompt_tokens=rng.integers(0, config.vocab_size, (1, length), np.int32),
        prompt_mask=np.arange(length)[None] < length - length // 10,
    )
    return jax.device_put(found)


def _noise(config: pi0.Pi0Config, *samples: int) -> jax.Array:
    shape = (1, *samples, config.action_horizon, config.action_dim)
    return jax.random.normal(jax.random.key(2), shape)


def require_same(what: str, ours: Mapping[str, PyTree], theirs: Mapping[str, PyTree]) -> float:
    """The largest difference of two named results, in units of the largest number of each.

    Raises:
      ValueError: it is no rounding.
    """

    def largest(tree):
        return max(float(np.abs(np.asarray(leaf)).max()) for leaf in jax.tree.leaves(tree))

    found = 0.0
    for name, expected in theirs.items():
        difference = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), ours[name], expected)
        relative = largest(difference) / (largest(expected) or 1.0)
        if not relative <= _TOLERANCE:
            raise ValueError(
                f"{what}: {name} of ours and of the straightforward version differ by "
                f"{relative:.1e} of the largest; {_TOLERANCE:.0e} would be rounding"
            )
        found = max(found, relative)
    return found


def _pair(
    name: str, ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int = 0
) -> list[Row]:
    """A row of two samplers."""
    found = require_same(name, {"actions": ours()}, {"actions": theirs()})
    note = f"actions equal to {found:.1e}"
    note += f", medians of {repeats}" if repeats else ""
    return [Row(name, *interleaved(here(ours), here(theirs), repeats=repeats), note)]


# Straightforward versions


def encode_whole_prefix(net: Pi0, observation: Observation):
    """Keys and values of the prefix, each layer run to its end, the last one too."""
    tokens, valid = net.embed_prefix(observation)
    mask = attention_mask(valid, jnp.zeros(valid.shape[1], bool))
    _, cache = net.PaliGemma.llm(
        [tokens, None], net.prefix_positions(valid), mask, [None, None], wanted=None
    )
    return cache, valid


@functools.partial(jax.jit, static_argnums=0)
def sample_plainly(config: pi0.Pi0Config, params: Params, observation: Observation, noise):
    """As OpenPI samples: one loop that embeds its time, and modulates every layer, at each step."""

    def apply(*args, method):
        return Pi0(config).apply({"params": params}, *args, method=method)

    cache, valid = apply(observation, method=encode_whole_prefix)
    step = 1.0 / _FLOW_STEPS

    def body(state):
        x_t, t = state
        times = jnp.full(x_t.shape[:1], t)
        v_t = apply(cache, valid, observation, x_t, times, method=Pi0.cached_velocity)
        return x_t - step * v_t, t - step

    return jax.lax.while_loop(lambda state: state[1] >= step / 2, body, (noise, 1.0))[0]


def whole_velocity(net: Pi0, observation: Observation, x_t, t):
    """The velocity from one pass over prefix and suffix, both run to the end of all layers."""
    prefix, prefix_valid = net.embed_prefix(observation)
    suffix, suffix_valid, blocks, cond = net.embed_suffix(observation, x_t, t)
    valid = jnp.concatenate([prefix_valid, suffix_valid], axis=1)
    blocks = jnp.concatenate([jnp.zeros(prefix.shape[1], bool), blocks])
    positions = jnp.cumsum(valid, axis=1) - 1
    mask = attention_mask(valid, blocks)
    (_, out), _ = net.PaliGemma.llm([prefix, suffix], positions, mask, [None, cond], wanted=None)
    return net.action_out_proj(out[:, -x_t.shape[1] :])


def whole_loss(config: pi0.Pi0Config, params: Params, batch: structs.Batch, key: jax.Array):
    """`pi0.loss` by `whole_velocity`."""
    _, noise_key, time_key = jax.random.split(key, 3)
    noise = jax.random.normal(noise_key, batch.actions.shape)
    t = flow.sample_time(time_key, len(batch.actions))
    x_t, u_t = flow.path(batch.actions, noise, t)
    inputs = batch.observation, x_t, t
    v_t = Pi0(config).apply({"params": params}, *inputs, method=whole_velocity)
    value = jnp.mean(flow.squared_error(v_t, u_t))
    return value, {"loss": value}


# Rows


def cameras_row(config: pi0.Pi0Config) -> list[Row]:
    """Sampling for a robot with the first of the cameras only: the others dropped, and masked."""
    params, observation = noisy_params(config), observation_of_one(config)
    noise, real = _noise(config), config.image_keys[:1]
    masks = {name: jnp.full(1, name in real) for name in config.image_keys}
    masked, seeing = observation.replace(image_masks=masks), config.seeing(real)
    return _pair(
        f"sampling, one camera of {len(config.image_keys)}",
        lambda: pi0.sample_actions(seeing, params, observation, noise=noise),
        lambda: pi0.sample_actions(config, params, masked, noise=noise),
    )


def all_cameras_row(config: pi0.Pi0Config) -> list[Row]:
    """Sampling with all cameras: ours leaves the unused half of the prefix's last layer out, which
    is most of 1/18 of the prefix, and modulates all flow steps at once.
    """
    params, observation, noise = noisy_params(config), observation_of_one(config), _noise(config)
    return _pair(
        f"sampling, all cameras, {_depth(config)}",
        lambda: pi0.sample_actions(config, params, observation, noise=noise),
        lambda: sample_plainly(config, params, observation, noise),
        repeats=_REPEATS,
    )


def samples_row(config: pi0.Pi0Config) -> list[Row]:
    """Samples of one observation: in one call, whose prefix they share, and in as many calls."""
    params, observation = noisy_params(config), observation_of_one(config)
    noise = _noise(config, _SAMPLES)
    parts = [noise[:, k] for k in range(_SAMPLES)]

    def apart():
        each = [pi0.sample_actions(config, params, observation, noise=part) for part in parts]
        return jnp.stack(each, axis=1)

    return _pair(
        f"{_SAMPLES} samples of one observation",
        lambda: pi0.sample_actions(config, params, observation, noise=noise),
        apart,
    )


def step_row(config: pi0.Pi0Config) -> list[Row]:
    """A step of training whose prefix leaves the unused half of its last layer out, and one that
    runs all of it. Peaks are those of the compiled steps: a process's own is the compiler's.
    """
    memory.keep_freed()
    name = f"training step, {_depth(config)}"
    (ours, ours_peak), (theirs, theirs_peak) = (
        compiled_step(config, loss) for loss in (pi0.loss, whole_loss)
    )
    found = require_same(name, ours(), theirs())
    times = interleaved(here(ours), here(theirs), repeats=_REPEATS)
    sides = (m._replace(peak=p) for m, p in zip(times, (ours_peak, theirs_peak), strict=True))
    return [Row(name, *sides, f"loss and gradients equal to {found:.1e}, medians of {_REPEATS}")]


def _depth(config: pi0.Pi0Config) -> str:
    return f"{config.paligemma_variant.depth} layers"


def compiled_step(config: pi0.Pi0Config, loss: LossFn) -> tuple[Callable[[], dict[str, Any]], int]:
    """A function that does the next step of AdamW on a batch of one, and the bytes that it takes:
    state, batch and temporaries.

    The function returns the loss and the first moments, which after one step are the gradients.
    Parameters would compare badly: Adam moves them as far for a gradient that is rounding.
    """
    optimizer = optimizers.make(optimizers.Settings())
    state = training.init(noisy_params(config), optimizer, ema=False)
    batch = structs.Batch(observation_of_one(config), _noise(config))
    update = functools.partial(
        training.update, loss_fn=functools.partial(loss, config), optimizer=optimizer
    )
    rest = batch, jax.random.key(3), np.float32(1e-3)
    compiled = jax.jit(update, donate_argnums=0).lower(state, *rest).compile()
    taken = compiled.memory_analysis()

    def step():
        nonlocal state
        state, metrics = compiled(state, *rest)
        return {"loss": metrics["loss"], "gradients": state.opt_state[1].mu}

    return step, taken.argument_size_in_bytes + taken.temp_size_in_bytes
