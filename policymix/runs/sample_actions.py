"""A policy tried on random inputs: actions out, how long that takes, and what it is bounded by."""

import dataclasses
import functools
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from policymix import memory, trees
from policymix.checkpoints import keymaps, layout, store
from policymix.models import pi0, recognize
from policymix.runs import encoding, metadata, policies
from policymix.structs import Observation

_COPIED = 2**28  # bytes, of which the bandwidth is measured


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asks for. `checkpoint`: "" takes random parameters."""

    checkpoint: str = ""
    batch_size: int = 1
    num_samples: int = 1
    num_calls: int = 10
    seed: int = 0
    dry_run: bool = False


def sample(config: ml_collections.ConfigDict, request: Request) -> dict[str, Any]:
    """Samples action chunks for random pictures, prompts and proprio; returns what it prints.

    Raises:
      ValueError, OSError: no model, no checkpoint, or one that is not the model's.
    """
    for name in ("batch_size", "num_samples", "num_calls"):
        if getattr(request, name) < 1:
            raise ValueError(f"--{name} is {getattr(request, name)}; at least 1 is needed")
    config = metadata.complete(config, checkpoints=(request.checkpoint,))
    model, header = _open(config, request)
    steps = config.evaluate.num_flow_steps
    shapes = pi0.shapes(model)
    print(f"{recognize.describe(shapes)}: {trees.num_params(shapes):,} parameters in {model.dtype}")
    if request.dry_run:
        print("dry run: nothing was computed")
        return {}
    params = _params(model, header, request.seed)
    model = model.seeing(encoding.present(model, config.data))
    rng = np.random.default_rng(request.seed)
    observation = random_observation(model, request.batch_size, rng)
    shape = (request.batch_size, request.num_samples, model.action_horizon, model.action_dim)
    call = functools.partial(pi0.sample_actions, model, params, observation, num_flow_steps=steps)
    seconds = []
    for _ in range(1 + request.num_calls):
        noise = rng.standard_normal(shape, np.float32)
        started = time.perf_counter()
        actions = np.asarray(call(noise=noise))
        seconds.append(time.perf_counter() - started)
    if not np.isfinite(actions).all():
        raise FloatingPointError("the actions are not finite: the parameters hold NaN or infinity")
    return _report(params, actions, seconds, steps)


def _open(config: ml_collections.ConfigDict, request: Request) -> tuple[pi0.Pi0Config, Any]:
    """The model, and the leaves of its checkpoint; None without one."""
    model = policies.optional_model(config)
    if not request.checkpoint:
        return model or policies.model_config(config, why="a policy"), None
    header = store.open_params(request.checkpoint, model.siglip_heads if model else None)
    foreign = layout.find(request.checkpoint).kind == "pt"
    if foreign and not (model and model.open_pi_zero):
        raise ValueError(
            f"{request.checkpoint} is an open-pi-zero, whose conventions no array tells: pass "
            "--config=configs/pi0_bridge.py or pi0_fractal.py"
        )
    model = model or recognize.model(header)
    recognize.check(pi0.shapes(model), header, request.checkpoint)
    return model, header


def random_observation(
    model: pi0.Pi0Config, batch_size: int, rng: np.random.Generator
) -> Observation:
    """Pictures, a prompt of full length, and normalised proprio, all of them random."""
    shape, length = (batch_size, *model.image_resolution, 3), model.max_token_len
    tokens = rng.integers(0, model.vocab_size, (batch_size, length), np.int32)
    return Observation(
        images={name: rng.integers(0, 256, shape, np.uint8) for name in model.image_keys},
        image_masks={name: np.ones(batch_size, bool) for name in model.image_keys},
        proprio=rng.standard_normal((batch_size, model.proprio_dim), np.float32),
        prompt_tokens=tokens if length else None,
        prompt_mask=np.ones((batch_size, length), bool) if length else None,
    )


def _params(model: pi0.Pi0Config, header: Any, seed: int) -> Any:
    """In the dtype of the computation, as OpenPI serves its policies; random ones array by array,
    so that a large policy needs no more than its own memory.
    """
    if header is not None:
        return policies.read_params(header, model.dtype)
    flat, key = trees.flatten(pi0.shapes(model)), jax.random.key(seed)
    return trees.unflatten(
        {
            path: _draw(jax.random.fold_in(key, number), leaf.shape, model.dtype)
            for number, (path, leaf) in enumerate(flat.items())
        }
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return 0.02 * jax.random.normal(key, shape, dtype)


def _report(params, actions: np.ndarray, seconds: list[float], num_flow_steps: int) -> dict:
    device = jax.devices()[0]
    first, *rest = seconds
    p50, p99 = np.percentile(rest, [50, 99])
    # Before the bandwidth is measured, which takes memory too.
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use", memory.peak_bytes())
    floor = bytes_read(params, num_flow_steps) / copy_bandwidth()
    told = {
        "device": f"{device.device_kind} ({device.platform})",
        "first_call_s": first,
        "p50_ms": 1e3 * float(p50),
        "p99_ms": 1e3 * float(p99),
        "floor_ms": 1e3 * floor,
        "peak_bytes": peak,
    }
    print(f"actions {actions.shape}, mean {actions.mean():.3g}, deviation {actions.std():.3g}")
    print(
        f"{told['device']}: first call {first:.1f} s, then {told['p50_ms']:.1f} ms (p50), "
        f"{told['p99_ms']:.1f} ms (p99) of {len(rest)}; peak memory "
        f"{told['peak_bytes'] / 1e9:.2f} GB"
    )
    print(
        f"reading the parameters from memory alone would take about {told['floor_ms']:.1f} ms, at "
        "the bandwidth that copying has here"
    )
    return told


def bytes_read(params: Any, num_flow_steps: int) -> int:
    """About the bytes of parameters that one call reads: the action expert and its projections at
    every flow step; PaliGemma, and what depends on the flow's times alone, once; of the vocabulary
    next to nothing.
    """
    total = 0
    for path, leaf in trees.flatten(params).items():
        again = any(re.fullmatch(regex, path) for regex in keymaps.NOT_PALIGEMMA)
        of_time = re.fullmatch(r".*_1/Dense_0/.*|time_mlp_(in|out)/.*", path)
        if path != keymaps.EMBEDDER:
            total += leaf.nbytes * (num_flow_steps if again and not of_time else 1)
    return total


def copy_bandwidth() -> float:
    """Bytes per second that the device reads and writes while it copies, the best of five."""
    source = jnp.zeros(_COPIED // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    jax.block_until_ready(copy(source))
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        jax.block_until_ready(copy(source))
        seconds.append(time.perf_counter() - started)
    return 2 * _COPIED / min(seconds)
