"""π0 and π0.5 against OpenPI: numbers, parameter trees, and what any configuration obeys."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from policymix import trees
from policymix.checkpoints import store
from policymix.models import flow, pi0
from policymix.structs import Batch, Observation
from tests import oracle

MODELS = pytest.mark.parametrize("model", oracle.MODELS)
TOLERANCE = {"rtol": 0, "atol": 1e-5}

# Compiled once per configuration and shared by all tests of this file.
velocity = jax.jit(pi0.velocity, static_argnums=0)
flow_loss = jax.jit(pi0.flow_loss, static_argnums=0)
sample_actions = jax.jit(pi0.sample_actions, static_argnums=0, static_argnames="num_flow_steps")

SMALL = {"width": 16, "mlp_dim": 24, "depth": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}


def small_config(**fields) -> pi0.Pi0Config:
    """The smallest useful network."""
    return pi0.Pi0Config(
        **{
            "paligemma_variant": SMALL,
            "action_expert_variant": SMALL | {"width": 8},
            "siglip_variant": "mu/28",
            "siglip_depth": 1,
            "image_resolution": (56, 28),
            "vocab_size": 32,
            "action_dim": 3,
            "action_horizon": 4,
            "max_token_len": 5,
            "dtype": "float32",
        }
        | fields
    )


@functools.cache
def noisy_params(config: pi0.Pi0Config) -> dict:
    """Parameters without zeros: a fresh vision head and fresh adaptive norms say nothing."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: (0.1 * rng.standard_normal(leaf.shape)).astype(leaf.dtype), pi0.shapes(config)
    )


def random_inputs(config: pi0.Pi0Config, batch_size: int = 2):
    """(observation, x_t, t)."""
    rng = np.random.default_rng(1)
    length = config.max_token_len
    observation = Observation(
        images={
            name: rng.integers(0, 256, (batch_size, *config.image_resolution, 3), np.uint8)
            for name in config.image_keys
        },
        image_masks={name: np.ones(batch_size, bool) for name in config.image_keys},
        proprio=rng.standard_normal((batch_size, config.proprio_dim), np.float32),
        prompt_tokens=rng.integers(0, config.vocab_size, (batch_size, length), np.int32),
        prompt_mask=np.arange(length)[None] < np.full((batch_size, 1), max(length - 2, 0)),
    )
    x_t = rng.standard_normal(
        (batch_size, config.action_horizon, config.action_dim), dtype=np.float32
    )
    return observation, x_t, rng.uniform(0.1, 0.9, batch_size).astype(np.float32)


# OpenPI's numbers


@MODELS
@pytest.mark.parametrize("which", ["base", *oracle.VARIANTS])
def test_loss_velocity_and_samples_are_openpis(model, which):
    config, params = oracle.config(model), oracle.params(model, which)
    observation, given = oracle.observation(model), oracle.forward(model)
    expected = oracle.forward(model, which)
    actions, noise, t = given["in/actions"], given["in/noise"], given["in/time"]
    loss = flow_loss(config, params, observation, actions, noise=noise, t=t)
    np.testing.assert_allclose(loss, expected["out/loss"], **TOLERANCE)
    v_t = velocity(config, params, observation, given["out/x_t"], t)
    np.testing.assert_allclose(v_t, expected["out/v_t"], **TOLERANCE)
    samples = sample_actions(config, params, observation, noise=noise)
    np.testing.assert_allclose(samples, expected["out/sample_actions"], **TOLERANCE)


@MODELS
def test_prefix_and_suffix_are_openpis(model):
    config, params, given = oracle.config(model), oracle.params(model), oracle.forward(model)
    tokens, valid = pi0.embed_prefix(config, params, oracle.observation(model))
    np.testing.assert_allclose(tokens, given["out/prefix_tokens"], **TOLERANCE)
    np.testing.assert_array_equal(valid, given["out/prefix_mask"])
    tokens, valid, blocks, cond = pi0.embed_suffix(
        config, params, oracle.observation(model), given["out/x_t"], given["in/time"]
    )
    np.testing.assert_allclose(tokens, given["out/suffix_tokens"], **TOLERANCE)
    np.testing.assert_array_equal(valid, given["out/suffix_mask"])
    np.testing.assert_array_equal(blocks, given["out/suffix_ar_mask"])
    if model == "pi05":
        np.testing.assert_allclose(cond, given["out/adarms_cond"], **TOLERANCE)
    else:
        assert cond is None


@MODELS
def test_the_path_is_openpis(model):
    given = oracle.forward(model)
    x_t, u_t = flow.path(given["in/actions"], given["in/noise"], given["in/time"])
    np.testing.assert_allclose(x_t, given["out/x_t"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(u_t, given["out/u_t"], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def loss_and_grads():
    """Per model: (loss, gradient) with OpenPI's key."""

    @functools.cache
    def compute(model):
        batch = Batch(oracle.observation(model), oracle.forward(model)["in/actions"])
        function = functools.partial(pi0.loss, oracle.config(model))
        (value, metrics), grads = jax.jit(jax.value_and_grad(function, has_aux=True))(
            oracle.params(model), batch, jax.random.key(42)
        )
        assert float(metrics["loss"]) == float(value)
        return float(value), trees.flatten(grads)

    return compute


@MODELS
def test_loss_draws_noise_and_times_as_openpi_does(model, loss_and_grads):
    value, _ = loss_and_grads(model)
    np.testing.assert_allclose(value, oracle.forward(model)["out/loss"].mean(), rtol=0, atol=1e-5)


def test_the_loss_is_the_mean_square_of_the_residual():
    config = small_config(image_keys=())
    observation, actions, _ = random_inputs(config)
    batch, params = Batch(observation, actions), noisy_params(config)

    @jax.jit
    def both(params, key):
        loss, _ = pi0.loss(config, params, batch, key)
        return loss, pi0.residual(config, params, batch, jax.random.clone(key))

    loss, residual = both(params, jax.random.key(1))
    assert residual.shape == actions.shape
    np.testing.assert_allclose(jnp.mean(jnp.square(residual)), loss, rtol=1e-6)


def test_a_masked_loss_is_the_mean_over_what_counts():
    config = small_config(image_keys=())
    observation, actions, _ = random_inputs(config)
    params, key = noisy_params(config), jax.random.key(1)
    mask = np.random.default_rng(2).random(actions.shape) < 0.4

    @jax.jit
    def both(params, key, mask):
        batch = Batch(observation, actions, mask)
        loss, metrics = pi0.loss(config, params, batch, key)
        return loss, metrics["loss"], pi0.residual(config, params, batch, jax.random.clone(key))

    _, _, plain = both(params, key, np.ones_like(mask))
    unmasked, _ = pi0.loss(config, params, Batch(observation, actions), jax.random.clone(key))
    np.testing.assert_allclose(np.mean(np.square(plain)), unmasked, rtol=1e-5)
    loss, told, residual = both(params, jax.random.clone(key), mask)
    assert float(loss) == float(told)
    np.testing.assert_allclose(loss, np.mean(np.square(np.asarray(plain)[mask])), rtol=1e-5)
    np.testing.assert_allclose(np.mean(np.square(residual)), loss, rtol=1e-5)
    assert not np.any(np.asarray(residual)[~mask])
    assert float(both(params, jax.random.clone(key), np.zeros_like(mask))[0]) == 0


@MODELS
def test_every_parameter_has_a_gradient_but_those_whose_output_is_unused(model, loss_and_grads):
    _, grads = loss_and_grads(model)
    dead = {path for path, grad in grads.items() if not np.any(np.asarray(grad))}
    assert dead == {"PaliGemma/llm/final_norm/scale"}
    assert all(np.all(np.isfinite(grad)) for grad in grads.values())
    # The last layer of the prefix serves only with its keys and values.
    unused = (
        "attn/q_einsum/w",
        "attn/attn_vec_einsum/w",
        "mlp/gating_einsum",
        "mlp/linear",
        "pre_ffw_norm/scale",
    )
    layers = {path: grad for path, grad in grads.items() if "/llm/layers/" in path}
    for path, grad in layers.items():
        alive = [bool(np.any(np.asarray(layer))) for layer in grad]
        last = path.removeprefix("PaliGemma/llm/layers/") not in unused
        assert alive == [True] * (len(alive) - 1) + [last], path


# OpenPI's trees


@pytest.mark.parametrize(
    ("model", "leaves", "params"), [("pi0", 50, 3_238_048_528), ("pi05", 51, 3_353_433_872)]
)
def test_the_full_size_tree_is_openpis(model, leaves, params):
    """Keys, shapes and dtypes as `jax.eval_shape` of OpenPI's model gave them."""
    listed = json.loads((oracle.TESTDATA / "keys" / f"{model}.json").read_text())
    shapes = pi0.shapes(pi0.Pi0Config(pi05=model == "pi05"))
    found = {path: [list(x.shape), str(x.dtype)] for path, x in trees.flatten(shapes).items()}
    assert found == listed
    assert len(found) == leaves
    assert trees.num_params(shapes) == params


@pytest.mark.parametrize(
    ("model", "leaves", "params", "frozen"),
    [("pi0", 70, 3_288_036_112, 2_819_996_672), ("pi05", 71, 3_403_421_456, 2_936_464_384)],
)
def test_the_full_size_tree_with_low_rank_updates_is_openpis(model, leaves, params, frozen):
    """And so is what is kept fixed: 17 arrays of π0, 20 of π0.5."""
    listed = json.loads((oracle.TESTDATA / "keys" / f"{model}_lora.json").read_text())
    variants = {
        "paligemma_variant": "gemma_2b_lora",
        "action_expert_variant": "gemma_300m_lora",
    }
    config = pi0.Pi0Config(pi05=model == "pi05", **variants)
    flat = trees.flatten(pi0.shapes(config))
    assert {path: [list(x.shape), str(x.dtype)] for path, x in flat.items()} == listed["leaves"]
    assert len(flat) == leaves
    assert sum(x.size for x in flat.values()) == params
    kept = [p for p in flat if any(re.fullmatch(r, p) for r in pi0.freeze(config))]
    assert sorted(kept) == listed["frozen"]
    assert sum(flat[path].size for path in kept) == frozen


@MODELS
def test_the_tiny_tree_is_that_of_openpis_checkpoint(model):
    listed = json.loads((oracle.OPENPI / model / "meta.json").read_text())["leaves"]
    shapes = trees.flatten(pi0.shapes(oracle.config(model)))
    assert {path: [list(x.shape), str(x.dtype)] for path, x in shapes.items()} == listed
    assert trees.difference(oracle.params(model), pi0.shapes(oracle.config(model))) is None


@pytest.mark.parametrize("cameras", [(), ("a",)])
def test_init_fills_the_tree_with_finite_numbers_that_depend_on_the_key(cameras):
    config = small_config(image_keys=cameras)
    one, two = (pi0.init(config, jax.random.key(seed)) for seed in (0, 1))
    assert trees.difference(one, pi0.shapes(config)) is None
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(one))
    kernels = one["action_in_proj"]["kernel"], two["action_in_proj"]["kernel"]
    assert not np.array_equal(*kernels)


# Any number of cameras, any prompt, any size


@pytest.mark.parametrize(
    ("model", "cameras", "length"),
    [("pi0", (), 5), ("pi0", ("a",), 5), ("pi0", ("a",), 0), ("pi05", (), 0)],
)
def test_any_cameras_and_prompts_run(model, cameras, length):
    config = small_config(pi05=model == "pi05", image_keys=cameras, max_token_len=length)
    params = pi0.shapes(config)
    assert ("img" in params["PaliGemma"]) == bool(cameras)
    observation, noise, t = random_inputs(config)
    actions = np.zeros_like(noise)
    loss = flow_loss(config, noisy_params(config), observation, actions, noise=noise, t=t)
    samples = sample_actions(config, noisy_params(config), observation, noise=noise)
    assert loss.shape == (2, 4)
    assert samples.shape == noise.shape
    assert np.all(np.isfinite(loss))
    assert np.all(np.isfinite(samples))
    assert np.asarray(loss).std() > 0


@MODELS
def test_the_cached_sampler_is_euler_integration_of_velocity(model):
    pi05 = model == "pi05"  # its layers are scanned, those of π0 unrolled
    config, steps = small_config(pi05=pi05, remat=pi05, image_keys=("a", "b")), 4
    observation, noise, _ = random_inputs(config)
    observation = dataclasses.replace(
        observation, image_masks=observation.image_masks | {"b": np.array([True, False])}
    )
    x = noise
    for i in range(steps):
        t = np.full(2, 1 - i / steps, np.float32)
        x = x - velocity(config, noisy_params(config), observation, x, t) / steps
    samples = sample_actions(
        config, noisy_params(config), observation, noise=noise, num_flow_steps=steps
    )
    np.testing.assert_allclose(samples, x, **TOLERANCE)


@MODELS
def test_a_masked_camera_is_a_camera_left_out(model):
    full = small_config(pi05=model == "pi05", image_keys=("a", "b"))
    part = dataclasses.replace(full, image_keys=("a",))
    observation, x_t, t = random_inputs(full)
    masked = dataclasses.replace(
        observation, image_masks=observation.image_masks | {"b": np.zeros(2, bool)}
    )
    without = velocity(part, noisy_params(full), observation, x_t, t)
    np.testing.assert_allclose(
        velocity(full, noisy_params(full), masked, x_t, t), without, **TOLERANCE
    )
    seen = velocity(full, noisy_params(full), observation, x_t, t)
    assert np.max(np.abs(seen - without)) > 1e-3  # else the cameras say nothing anyway


@MODELS
@pytest.mark.parametrize("remat", [False, True])
def test_samples_of_one_observation_are_what_each_is_alone(model, remat):
    config = small_config(pi05=model == "pi05", remat=remat)
    params, (observation, *_) = noisy_params(config), random_inputs(config)
    noise = jax.random.normal(jax.random.key(3), (2, 3, config.action_horizon, config.action_dim))
    together = pi0.sample_actions(config, params, observation, noise=noise)
    assert together.shape == noise.shape
    for sample in range(3):
        alone = pi0.sample_actions(config, params, observation, noise=noise[:, sample])
        np.testing.assert_allclose(together[:, sample], alone, atol=1e-5)


def test_padding_tokens_and_masked_pictures_are_never_seen():
    config = small_config(image_keys=("a",))
    observation, x_t, t = random_inputs(config)
    observation = dataclasses.replace(observation, image_masks={"a": np.array([True, False])})
    tokens = np.where(observation.prompt_mask, observation.prompt_tokens, 7)
    images = observation.images["a"].copy()
    images[1] = 255 - images[1]
    other = dataclasses.replace(
        observation, prompt_tokens=tokens.astype(np.int32), images={"a": images}
    )
    a, b = (velocity(config, noisy_params(config), o, x_t, t) for o in (observation, other))
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_uint8_and_float_pictures_are_the_same_pictures():
    config = small_config(image_keys=("a",))
    observation, x_t, t = random_inputs(config)
    floats = {"a": observation.images["a"] / np.float32(255) * 2 - 1}
    other = dataclasses.replace(observation, images=floats)
    a, b = (velocity(config, noisy_params(config), o, x_t, t) for o in (observation, other))
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_computing_in_bfloat16_stays_near_float32_and_keeps_the_parameters():
    config = small_config(image_keys=("a",))
    half = dataclasses.replace(config, dtype="bfloat16")
    assert trees.flatten(pi0.shapes(half)) == trees.flatten(pi0.shapes(config))
    inputs = random_inputs(config)
    rough, exact = (velocity(c, noisy_params(config), *inputs) for c in (half, config))
    assert rough.dtype == jnp.float32
    assert 1e-5 < np.abs(rough - exact).max() < 0.02 * np.abs(exact).max()


@MODELS
def test_low_rank_updates_compute_what_their_merged_weights_do(model, tmp_path):
    """Velocities and samples of a LoRA model, and of the plain checkpoint it is merged into."""
    lowrank = {**SMALL, "lora": {"rank": 2}}
    config = small_config(
        pi05=model == "pi05",
        paligemma_variant=lowrank,
        action_expert_variant=lowrank | {"width": 8},
    )
    params, (observation, x_t, t) = noisy_params(config), random_inputs(config)
    store.save_params(params, tmp_path / "lora")
    opened = store.open_checkpoint(tmp_path / "lora", merge_lora=True)
    assert opened.lora == 10
    plain = small_config(pi05=model == "pi05")
    merged = jax.tree.map(lambda leaf: leaf.read(), trees.unflatten(opened.tree()))
    trees.check_same(pi0.shapes(plain), merged, names=("the plain model", "the merged one"))
    found = velocity(plain, merged, observation, x_t, t)
    np.testing.assert_allclose(found, velocity(config, params, observation, x_t, t), atol=1e-5)
    kept, added = (
        pi0.sample_actions(c, p, observation, noise=x_t)
        for c, p in ((plain, merged), (config, params))
    )
    np.testing.assert_allclose(kept, added, atol=1e-5)


@MODELS
def test_layers_unrolled_and_kept_compute_what_scanned_ones_do(model):
    scanned = small_config(pi05=model == "pi05", image_keys=())
    unrolled = dataclasses.replace(scanned, remat=False)
    assert trees.difference(pi0.shapes(scanned), pi0.shapes(unrolled)) is None
    observation, x_t, t = random_inputs(scanned)

    @functools.partial(jax.jit, static_argnums=0)
    def everything(config, params):
        def loss(params):
            v_t = pi0.velocity(config, params, observation, x_t, t)
            return jnp.mean(flow.squared_error(v_t, x_t)), v_t

        return jax.value_and_grad(loss, has_aux=True)(params)

    found = [everything(config, noisy_params(scanned)) for config in (scanned, unrolled)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), *found)
    assert float(optax.tree.norm(found[0][1])) > 0.1


def test_proprio_of_its_own_length_changes_one_array():
    """state_proj's kernel, and the numbers that come of it."""
    config = small_config(image_keys=())
    longer = dataclasses.replace(config, proprio_dim=11)
    ours, theirs = (trees.flatten(pi0.shapes(c)) for c in (config, longer))
    assert ours.keys() == theirs.keys()
    assert [path for path in ours if ours[path].shape != theirs[path].shape] == [
        "state_proj/kernel"
    ]
    assert theirs["state_proj/kernel"].shape == (11, 8)
    params = noisy_params(longer)
    observation, x_t, t = random_inputs(longer)
    seen = velocity(longer, params, observation, x_t, t)
    other = dataclasses.replace(observation, proprio=observation.proprio * ([1] * 10 + [2]))
    assert np.abs(seen - velocity(longer, params, other, x_t, t)).max() > 1e-5
    with pytest.raises(ValueError, match=r"shape of proprio is \(2, 3\), the model expects .2, 11"):
        pi0.velocity(longer, params, random_inputs(config)[0], x_t, t)


def test_experts_of_different_depth_are_refused():
    with pytest.raises(ValueError, match=r"share depth, num_heads.*\(2, 2, 1, 8\) and \(3, 2"):
        small_config(action_expert_variant=SMALL | {"depth": 3})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"action_dim": 0}, "action_dim is 0"),
        ({"proprio_dim": 0}, "proprio_dim is 0"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"image_resolution": (56, 14)}, "smaller than one patch"),
        ({"paligemma_variant": {"width": 4}}, "a Gemma size has the fields"),
        ({"siglip_variant": "huge"}, "siglip_variant 'huge'"),
    ],
)
def test_a_configuration_that_cannot_be_built_says_so(fields, message):
    with pytest.raises(ValueError, match=message):
        small_config(**fields)


def test_defaults_follow_from_pi05():
    base, later = pi0.Pi0Config(), pi0.Pi0Config(pi05=True)
    assert (base.max_token_len, base.discrete_state_input) == (48, False)
    assert (later.max_token_len, later.discrete_state_input) == (200, True)
    assert not pi0.Pi0Config(pi05=True, discrete_state_input=False).discrete_state_input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images": {"a": np.zeros((2, 28, 28, 3), np.uint8)}}, "image 'a' is .2, 28, 28, 3."),
        ({"images": {}}, "camera 'a' or its mask is missing"),
        ({"image_masks": {}}, "camera 'a' or its mask is missing"),
        ({"image_masks": {"a": np.ones(3, bool)}}, "mask of image 'a' is .3,."),
        ({"proprio": np.zeros((2, 9), np.float32)}, "proprio is .2, 9."),
        ({"prompt_tokens": np.zeros((2, 6), np.int32)}, "prompt_tokens is .2, 6."),
        ({"prompt_mask": np.ones((2, 4), bool)}, "prompt_mask is .2, 4."),
        ({"prompt_mask": None}, "prompt_mask is missing"),
    ],
)
def test_an_observation_of_the_wrong_shape_names_the_field(fields, message):
    config = small_config(image_keys=("a",))
    observation, x_t, t = random_inputs(config)
    params = noisy_params(config)
    wrong = dataclasses.replace(observation, **fields)
    with pytest.raises(ValueError, match=message):
        pi0.velocity(config, params, wrong, x_t, t)
    with pytest.raises(ValueError, match=message):
        pi0.sample_actions(config, params, wrong, noise=x_t)


@pytest.mark.parametrize("jit", [False, True])
def test_attention_goes_to_valid_tokens_of_the_same_or_an_earlier_block(jit):
    function = jax.jit(pi0.attention_mask) if jit else pi0.attention_mask
    valid = np.array([[1, 1, 0, 1, 1, 1]], bool)  # the third is padding
    blocks = np.array([0, 0, 0, 1, 1, 0], bool)  # three of prefix, proprio, two actions
    expected = [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 1],
        [1, 1, 0, 1, 1, 1],
    ]
    np.testing.assert_array_equal(function(valid, blocks)[0], np.array(expected, bool))
