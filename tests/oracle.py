"""Numbers computed by OpenPI and kai0 themselves, and the checkpoints they belong to.

`testdata/openpi/{pi0,pi05}` holds a tiny base checkpoint as OpenPI wrote it. The three variants
that the mixing oracles were computed on are the base plus Gaussian noise from a seeded generator;
they are made again here, bit for bit, and checked against the SHA-256 of the originals.
"""

import functools
import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from policymix import trees
from policymix.checkpoints import assets, store
from policymix.models import pi0
from policymix.structs import Batch, Observation

TESTDATA = pathlib.Path(__file__).parent / "testdata"
OPENPI = TESTDATA / "openpi"
MODELS = ("pi0", "pi05")
VARIANTS = ("var1", "var2", "var3")
_NOISE = {"var1": (0.10, 201), "var2": (0.15, 202), "var3": (0.25, 203)}  # relative deviation, seed


def config(model: str) -> pi0.Pi0Config:
    """The architecture of the fixtures; the same as the `:debug` configs."""
    return pi0.Pi0Config(
        paligemma_variant="dummy",
        action_expert_variant="dummy",
        siglip_variant="mu/28",
        siglip_depth=2,
        vocab_size=512,
        pi05=model == "pi05",
        action_dim=8,
        action_horizon=6,
        max_token_len=24 if model == "pi05" else 16,
        dtype="float32",
    )


@functools.cache
def params(model: str, which: str = "base") -> dict:
    """Parameters of "base", "var1", "var2" or "var3", exactly as OpenPI saved them."""
    recipe = json.loads((OPENPI / "variants.json").read_text())[model]
    flat = trees.flatten(store.load_params(OPENPI / model / "base" / "1000"))
    if which != "base":
        scale, seed = _NOISE[which]
        rng = np.random.default_rng(seed)
        for path in sorted(flat):
            # A float32 deviation depends on the order of its sum; where ours differs, the original
            # is on record.
            std = recipe["std"].get(path, float(flat[path].std()))
            noise = rng.standard_normal(flat[path].shape) * (scale * (std + 1e-3))
            flat[path] = (flat[path] + noise).astype(np.float32)
    digest = hashlib.sha256(b"".join(flat[path].tobytes() for path in sorted(flat)))
    if digest.hexdigest() != recipe["sha256"][which]:
        raise AssertionError(f"{model}/{which} was not rebuilt bit for bit")
    return trees.unflatten(flat)


def write(
    model: str, which: str, root: pathlib.Path, *, norm_stats_of: str | None = None
) -> pathlib.Path:
    """Writes a variant's step directory under `root`, with its own or another's norm stats."""
    path = root / f"{model}_{which}" / "2000"
    asset_id, stats = assets.norm_stats_of(step(model, norm_stats_of or which))
    store.save_params(params(model, which), path, stats, asset_id)
    return path


def step(model: str, which: str) -> pathlib.Path:
    """The step directory in testdata: whole for the bases and pi0's var1.

    The others hold norm stats only.
    """
    return OPENPI / model / which / ("1000" if which == "base" else "2000")


@functools.cache
def forward(model: str, which: str = "base") -> dict[str, np.ndarray]:
    """OpenPI's float32 inputs ("in/…") and outputs ("out/…").

    Variants have only loss, v_t and sample_actions.
    """
    name = "oracle_float32" if which == "base" else f"oracle_float32_{which}"
    return dict(np.load(OPENPI / model / f"{name}.npz"))


@functools.cache
def loss_fn(model: str):
    """(params, batch, key) → (loss, metrics); one object per model, so that it compiles once."""
    return functools.partial(pi0.loss, config(model))


def keys(count: int) -> jax.Array:
    """kai0 evaluates every batch with this one key."""
    return jax.vmap(jax.random.key)(jnp.zeros(count, int))


def observation(model: str) -> Observation:
    """The inputs of `forward`."""
    return _observation(forward(model), "in")


def _observation(arrays, prefix: str) -> Observation:
    cameras = pi0.OPENPI_CAMERAS
    return Observation(
        images={c: arrays[f"{prefix}/image/{c}"] for c in cameras},
        image_masks={c: arrays[f"{prefix}/image_mask/{c}"] for c in cameras},
        proprio=arrays[f"{prefix}/state"],
        prompt_tokens=arrays[f"{prefix}/tokenized_prompt"],
        prompt_mask=arrays[f"{prefix}/tokenized_prompt_mask"],
    )


@functools.cache
def batches(model: str, name: str = "val_batches") -> list[Batch]:
    """The validation batches that kai0 mixed on."""
    arrays = dict(np.load(OPENPI / model / f"{name}.npz"))
    count = len({key.split("/")[0] for key in arrays})
    return [Batch(_observation(arrays, str(i)), arrays[f"{i}/actions"]) for i in range(count)]


@functools.cache
def kai0(model: str) -> dict:
    """What kai0's own program gave, by method."""
    return json.loads((OPENPI / model / "kai0_oracle_float32.json").read_text())


def greedy_b(model: str) -> dict:
    """kai0's greedy search on val_batches_b."""
    return json.loads((OPENPI / model / "kai0_extra_greedy_b.json").read_text())
