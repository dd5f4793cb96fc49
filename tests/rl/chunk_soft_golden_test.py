"""The three losses one after the other against the numbers of the program they are from.

testdata/rl/soft_tiny.npz holds, computed by PyTorch in float32 at small sizes: inputs (`in/`, its
pictures are enlarged sixteenfold), outputs, losses, gradients and gradient norms at the initial
parameters, and losses and outputs of three steps of training (`seq/`). `exact/` are those steps in
float64, not by that program but by the same networks and losses built anew in PyTorch. The initial
parameters are not stored: `_weights` makes them. To renew: build the three networks in PyTorch
(encoder of two cameras and proprio, the language's seat zero, then the heads; its `Linear` and
`Conv2d`, in the order of LAYERS, each weight before its bias), load `_weights`, make the steps in
the order critic, value, policy with Adam at 3e-4, and save under these names.
"""

import dataclasses
import functools
import hashlib
import pathlib

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policymix.rl import chunk_soft, losses, networks
from policymix.rl import config as rl_config
from policymix.rl import state as states
from policymix.rl.config import LearnerConfig
from policymix.structs import ChunkBatch, Observation

GOLDEN = pathlib.Path(__file__).parents[1] / "testdata/rl/soft_tiny.npz"
# The settings of the program that the losses are from.
FAITHFUL = {
    "algorithm": "chunk_soft", "entropy_temperature": 1.0, "max_weight": 0, "ema_decay": 0,
    "num_critics": 1, "min_std": 1e-6, "max_token_len": 0,
}  # fmt: skip
CAMERAS = ("image", "wrist_image")
TINY = LearnerConfig(
    **FAITHFUL, action_dim=3, action_horizon=4, proprio_dim=5, image_keys=CAMERAS, hidden_dim=16,
    feature_dim=16,
)  # fmt: skip
# Our path of each layer, and the shape of PyTorch's weight; None: what we do not have.
ENCODER = {
    "pictures/conv_0": (32, 3, 8, 8), "pictures/conv_1": (64, 32, 4, 4),
    "pictures/conv_2": (128, 64, 4, 4), "pictures/conv_3": (256, 128, 4, 4),
    "pictures/dense": (8, 256 * 8 * 8), "proprio/dense_0": (8, 5), "proprio/dense_1": (8, 8),
    "language": (8, 128), "fusion/dense_0": (16, 32), "fusion/dense_1": (16, 16),
}  # fmt: skip


def _mlp(name: str, *widths: int) -> dict[str, tuple[int, int]]:
    pairs = zip(widths[1:], widths[:-1], strict=True)
    return {f"{name}/dense_{i}": pair for i, pair in enumerate(pairs)}


LAYERS = {
    "critic": _mlp("chunk", 12, 32, 16, 16) | _mlp("head", 32, 16, 8, 1),
    "value": _mlp("head", 16, 16, 8, 1),
    "policy": _mlp("mean", 16, 16, 8, 12) | _mlp("std", 16, 16, 8, 12),
}


@functools.cache
def _golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


@functools.cache
def _weights() -> tuple[dict, str]:
    """The initial parameters as our tree, and the SHA-256 of PyTorch's, as float16, in order.

    Element i of the j-th tensor of network k is, rounded to float16, its scale times
    sin(0.1 (k + 1) + 1.3 j + 0.37 i + 1.13e-5 (i mod 9973)²).
    """
    tree, digest = {}, hashlib.sha256()
    for k, (network, heads) in enumerate(LAYERS.items()):
        layers = {f"encoder/{path}": shape for path, shape in ENCODER.items()} | heads
        for j, (path, shape) in enumerate(layers.items()):
            for of, (part, dims) in enumerate((("kernel", shape), ("bias", shape[:1]))):
                i = np.arange(np.prod(dims), dtype=float)
                phase = 0.1 * (k + 1) + 1.3 * (2 * j + of) + 0.37 * i + 1.13e-5 * (i % 9973) ** 2
                scale = np.sqrt(2 / np.prod(shape[1:])) if part == "kernel" else 0.02
                tensor = (scale * np.sin(phase)).astype(np.float16).reshape(dims)
                digest.update(tensor.tobytes())
                if "language" not in path:
                    tree[(network, *path.split("/"), part)] = _ours(network, path, tensor)
    return flax.traverse_util.unflatten_dict(tree), digest.hexdigest()


def _ours(network: str, path: str, tensor: np.ndarray) -> np.ndarray:
    """A tensor of PyTorch, (out, in) or OIHW, as ours; its pictures are flattened as CHW."""
    tensor = tensor.astype(np.float32)
    if path.endswith("pictures/dense") and tensor.ndim == 2:
        tensor = tensor.reshape(-1, 256, 8, 8).transpose(0, 2, 3, 1).reshape(len(tensor), -1)
    if tensor.ndim == 4:
        tensor = tensor.transpose(2, 3, 1, 0)
    tensor = tensor.T if tensor.ndim == 2 else tensor
    member = network == "critic" and not path.startswith("encoder")
    return tensor[None] if member else tensor


def _observation(prefix: str, dtype) -> Observation:
    golden = _golden()
    pictures = {name: golden[f"in/{prefix}{name}_lowres"] for name in CAMERAS}
    return Observation(
        images={name: x.repeat(16, 1).repeat(16, 2) for name, x in pictures.items()},
        image_masks={name: np.ones(4, bool) for name in CAMERAS},
        proprio=golden[f"in/{prefix}state"].astype(dtype),
    )


def _batch(dtype) -> ChunkBatch:
    golden = _golden()
    return ChunkBatch(
        observation=_observation("", dtype),
        actions=golden["in/actions"].astype(dtype),
        action_is_pad=np.zeros((4, 4), bool),
        rewards=golden["in/reward"].astype(dtype),
        discounts=(0.99**4 * (1 - golden["in/done"])).astype(dtype),
        next_observation=_observation("next_", dtype),
        has_next=np.ones(4, bool),
    )


def _losses(metrics) -> list[float]:
    return [float(metrics[f"{name}/loss"]) for name in LAYERS]


@functools.cache
def _steps(exact: bool, moving: bool):
    """Three updates: states and metrics, first and last. Without `moving`, one that moves nothing,
    so that value and policy meet the networks as they were.
    """
    dtype = np.float64 if exact else np.float32
    config = dataclasses.replace(TINY, dtype=np.dtype(dtype).name)
    config = config if moving else dataclasses.replace(config, learning_rate=1e-30)
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), _weights()[0])
    state = states.init_state(config, params)
    noise = _golden()["in/eps"].transpose(0, 2, 1, 3, 4).astype(dtype)
    step = jax.jit(functools.partial(chunk_soft.update_given, config))
    found = []
    for eps in noise if moving else noise[:1]:
        state, metrics = step(state, _batch(dtype), eps)
        found.append((state, metrics))
    return config, found


@pytest.fixture
def exactly(monkeypatch):
    """float64 throughout: what differs is the method, not the rounding."""
    monkeypatch.setattr(rl_config, "DTYPES", (*rl_config.DTYPES, "float64"))
    hurried = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)  # its convolutions take minutes
    with jax.enable_x64(True):
        yield
    jax.config.update("jax_disable_most_optimizations", hurried)


def test_the_initial_parameters_are_those_of_the_golden_numbers():
    params, digest = _weights()
    assert digest == str(_golden()["weights_sha256"])
    expected = jax.eval_shape(lambda: networks.init(TINY, jax.random.key(0)))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, expected)


def test_losses_and_gradients_are_those_of_pytorch():
    golden, (_, [(state, metrics)]) = _golden(), _steps(False, False)
    np.testing.assert_allclose(_losses(metrics), [golden[f"loss/{n}"] for n in LAYERS], rtol=1e-5)
    for name in LAYERS:
        np.testing.assert_allclose(
            metrics[f"{name}/grad_norm"], golden[f"gradnorm/{name}"], rtol=1e-4
        )
    np.testing.assert_allclose(metrics["policy/weight_max"], golden["out/w_norm"].max(), rtol=1e-5)
    np.testing.assert_allclose(
        metrics["policy/log_prob"], golden["out/logp_data"].mean(), rtol=1e-5
    )
    for network in LAYERS:
        found, expected = _norms(state, network)
        np.testing.assert_allclose(found, expected, rtol=2e-3)  # far in the first layer


def _norms(state: states.State, network: str) -> tuple[list[float], list[float]]:
    """Of every tensor's gradient, in PyTorch's order; and what they should be."""
    golden = _golden()
    norms = zip(golden["norm_names"].tolist(), golden["norms"].tolist(), strict=True)
    expected = [norm for name, norm in norms if name.startswith(network)]
    # Adam's first moment after one step is a tenth of the gradient.
    moment = flax.traverse_util.flatten_dict(state.opt_state[network][0].mu, sep="/")
    paths = _in_order(network)
    assert set(paths) == moment.keys()
    return [10 * np.linalg.norm(np.asarray(moment[path])) for path in paths], expected


def _in_order(network: str) -> list[str]:
    """Our paths in PyTorch's order."""
    layers = [f"encoder/{path}" for path in ENCODER if path != "language"] + list(LAYERS[network])
    return [f"{path}/{part}" for path in layers for part in ("kernel", "bias")]


@pytest.mark.slow
def test_three_steps_of_training_are_those_of_pytorch(exactly):
    golden, (config, found) = _golden(), _steps(True, True)
    losses_found = np.array([_losses(metrics) for _, metrics in found])
    np.testing.assert_allclose(losses_found[:, :2], golden["exact/loss"][:, :2], rtol=1e-7)
    # There weights are divided by their mean + 1e-8, here by their mean.
    np.testing.assert_allclose(losses_found[:, 2], golden["exact/loss"][:, 2], rtol=2e-6)
    found_norms, expected = _norms(found[0][0], "critic")
    np.testing.assert_allclose(found_norms, expected, rtol=1e-4)
    # Its float32 is as far from its float64: Adam's first steps are the signs of gradients, and
    # where these are rounding, so are the signs.
    np.testing.assert_allclose(losses_found, golden["seq/losses"], rtol=1e-3)
    params, batch = found[-1][0].params, _batch(np.float64)
    read = {n: networks.features(config, params, n, batch.observation) for n in LAYERS}
    mean, std = networks.gaussian(config, params, read["policy"])
    for name, value in {
        "q": networks.critic(config, params, read["critic"], batch.actions)[0],
        "v": networks.value(config, params, read["value"]),
        "mean": mean,
        "std": std,
    }.items():
        np.testing.assert_allclose(value, golden[f"exact/{name}"], rtol=1e-6, atol=1e-7)


@jax.jit
def _activations(params, batch):
    read = {n: networks.features(TINY, params, n, batch.observation) for n in LAYERS}
    mean, std = networks.gaussian(TINY, params, read["policy"])
    return {
        "critic_obs_feat": read["critic"],
        "q": networks.critic(TINY, params, read["critic"], batch.actions).T,
        "v": networks.value(TINY, params, read["value"])[:, None],
        "mean": mean,
        "std": std,
        "logp_data": losses.gaussian_log_prob(mean, std, batch.actions),
    }


def test_activations_are_those_of_pytorch_in_float32_too():
    for name, value in _activations(_weights()[0], _batch(np.float32)).items():
        np.testing.assert_allclose(value, _golden()[f"out/{name}"], rtol=1e-4, atol=1e-5)
