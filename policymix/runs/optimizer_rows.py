"""The rows of `make bench` about optimizers: Adam with moments of 8 bits, beside float32 Adam; and
that, beside optax's.

A step here is the optimizer's alone: the global clip, the moments, and the parameters that move.
The floor is what it moves through memory: of float32 Adam a parameter, its gradient and two
moments, three of them there and back, 28 bytes for each parameter; with moments of 8 bits 16.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from policymix import memory, trees
from policymix.models import pi0
from policymix.runs.measurements import Row, here, interleaved
from policymix.structs import Batch, PyTree
from policymix.training import optimizers
from policymix.training import state as training

_REPEATS = 9  # of sides that are close to each other
_OURS, _WIDE = "adam_8bit", "adam"


def _model(width: int, depth: int, **fields) -> pi0.Pi0Config:
    heads = {"depth": depth, "num_heads": 4, "num_kv_heads": 1, "head_dim": width // 4}
    return pi0.Pi0Config(
        paligemma_variant={"width": width, "mlp_dim": 4 * width, **heads},
        action_expert_variant={"width": width // 2, "mlp_dim": 2 * width, **heads},
        siglip_variant="mu/28",
        image_keys=(),
        dtype="float32",
        remat=False,
        **fields,
    )


_MOVED = _model(512, 6, vocab_size=2048)  # 31 M parameters
_LEARNING = _model(
    *(128, 4), vocab_size=64, action_dim=4, proprio_dim=39, action_horizon=8, max_token_len=0
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is optimized.

    Attributes:
      moved: the network whose parameters are stepped; steps: in one measurement.
      learning: the network that learns, from batches of batch_size, for num_updates.
    """

    moved: pi0.Pi0Config = _MOVED
    steps: int = 10
    learning: pi0.Pi0Config = _LEARNING
    num_updates: int = 200
    batch_size: int = 64


SIZES = {"optimizer": Sizes()}


def adam_8bit_row(sizes: Sizes) -> list[Row]:
    """Steps of both on the same gradients; bytes of their states, and what both have learned."""
    memory.keep_freed()
    shapes = pi0.shapes(sizes.moved)
    count = trees.num_params(shapes)
    optax_adam = optax.chain(
        optax.clip_by_global_norm(1.0), optax.scale_by_adam(0.9, 0.95), optax.scale(-1.0)
    )
    sides = [
        _steps(optimizer, shapes, sizes.steps)
        for optimizer in (_optimizer(_OURS), _optimizer(_WIDE), optax_adam)
    ]
    taken = " / ".join(f"{size / count:.2f}" for _, size in sides[:2])
    losses = [learned(name, sizes) for name in (_OURS, _WIDE)]
    note = (
        f"{count / 1e6:.0f} M parameters; states of {taken} bytes each; loss after "
        f"{sizes.num_updates} steps {losses[0]:.4f} / {losses[1]:.4f}, "
        f"{losses[0] / losses[1] - 1:+.1%}; medians of {_REPEATS}"
    )
    ours, wide, theirs = interleaved(*(here(run) for run, _ in sides), repeats=_REPEATS)
    return [
        Row("steps of Adam with 8-bit moments, beside float32's", ours, wide, note),
        Row("steps of float32 Adam, beside optax's", wide, theirs),
    ]


def _optimizer(name: str, **settings) -> optax.GradientTransformation:
    return optimizers.make(optimizers.Settings(name=name, **settings))


def _steps(
    optimizer: optax.GradientTransformation, shapes: PyTree, steps: int
) -> tuple[Callable[[], Any], int]:
    """A function that goes a few steps on, and the bytes of the optimizer's state."""
    rng = np.random.default_rng(0)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, grads, learning_rate):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        updates = optax.tree.scale(learning_rate, updates)
        return optax.apply_updates(params, updates), opt_state

    grads = jax.tree.map(
        lambda s: jnp.asarray(rng.standard_normal(s.shape, np.float32) / s.shape[-1]), shapes
    )
    params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    carried = [params, optimizer.init(params)]
    size = trees.nbytes(carried[1])

    def run():
        for _ in range(steps):
            carried[:] = step(*carried, grads, np.float32(1e-3))
        return carried

    return run, size


def learned(name: str, sizes: Sizes, seed: int = 0, **settings) -> float:
    """The loss of a policy after a few updates, on batches that it was not trained on.

    Its chunks are a smooth function of proprio, another for each seed. Settings: of the optimizer.
    """
    config, optimizer = sizes.learning, _optimizer(name, **settings)
    loss_fn = functools.partial(pi0.loss, config)
    step = jax.jit(
        functools.partial(training.update, loss_fn=loss_fn, optimizer=optimizer), donate_argnums=0
    )
    draw = _task(config, sizes.batch_size, seed)
    state = training.init(pi0.init(config, jax.random.key(seed)), optimizer, ema=False)
    schedule = optimizers.schedule(
        learning_rate=1e-3,
        final_learning_rate=1e-5,
        warmup_steps=min(20, sizes.num_updates - 1),
        decay_steps=sizes.num_updates,
    )
    rates = optimizers.learning_rates(schedule, sizes.num_updates)
    root_key = jax.random.fold_in(jax.random.key(seed), 1)
    for k, rate in enumerate(rates):
        state, _ = step(state, draw(k), root_key, rate)
    losses = [jax.jit(loss_fn)(state.params, draw(-1 - k), jax.random.key(k))[0] for k in range(8)]
    return float(np.mean(losses))


def _task(config: pi0.Pi0Config, batch_size: int, seed: int) -> Callable[[int], Batch]:
    """Batch number k of what there is to learn."""
    chunk = config.action_horizon, config.action_dim
    rng = np.random.default_rng([seed, 0])
    inner = rng.standard_normal((config.proprio_dim, 32)) / np.sqrt(config.proprio_dim)
    outer = rng.standard_normal((32, *chunk)) / np.sqrt(32)

    def draw(number: int) -> Batch:
        rng = np.random.default_rng([seed, 1, number % 2**32])
        proprio = rng.standard_normal((batch_size, config.proprio_dim))
        actions = np.tensordot(np.tanh(2 * proprio @ inner), outer, axes=1)
        observation = pi0.example_observation(config, batch_size)
        return Batch(
            observation.replace(proprio=proprio.astype(np.float32)), actions.astype(np.float32)
        )

    return draw
