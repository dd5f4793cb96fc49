"""Cameras that are absent: dropped, they change nothing; and pictures that no camera gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from policymix.models import pi0, text
from tests.models.pi0_test import noisy_params, random_inputs, small_config

PRESENT = [("left_wrist_0_rgb",), ("base_0_rgb", "right_wrist_0_rgb"), ()]


def masked(observation, present):
    masks = {c: m & (c in present) for c, m in observation.image_masks.items()}
    return observation.replace(image_masks=masks)


@pytest.mark.parametrize(
    ("pi05", "present"), zip([True, False, True], PRESENT, strict=True), ids=["one", "two", "none"]
)
def test_dropping_absent_cameras_is_masking_them(pi05, present):
    config = small_config(pi05=pi05)
    params, (observation, x_t, t) = noisy_params(config), random_inputs(config)
    seen = config.seeing(present)
    assert seen.image_keys == present
    there = observation.replace(
        images={c: observation.images[c] for c in present},
        image_masks={c: observation.image_masks[c] for c in present},
    )
    close = {"rtol": 0, "atol": 2e-6}
    whole = masked(observation, present)
    velocity = jax.jit(pi0.velocity, static_argnums=0)
    np.testing.assert_allclose(
        velocity(seen, params, there, x_t, t), velocity(config, params, whole, x_t, t), **close
    )
    np.testing.assert_allclose(
        pi0.sample_actions(seen, params, there, noise=x_t),
        pi0.sample_actions(config, params, whole, noise=x_t),
        **close,
    )


def test_gradients_do_not_tell_the_difference():
    config = small_config(pi05=True)
    params, (observation, actions, t) = noisy_params(config), random_inputs(config)
    observation = masked(observation, ("base_0_rgb",))
    noise = jax.random.normal(jax.random.key(0), actions.shape)

    def grads(model):
        def loss(params):
            return jnp.mean(pi0.flow_loss(model, params, observation, actions, noise=noise, t=t))

        return jax.jit(jax.grad(loss))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6),
        grads(config.seeing(("base_0_rgb",))),
        grads(config),
    )


# What is refused


def test_open_pi_zero_keeps_absent_cameras_to_mask_them():
    """Its positions count them."""
    config = small_config(variant="open_pi_zero")
    assert config.seeing(()) is config


@pytest.mark.parametrize("names", [["base_0_rbg"], "base_0_rgb"])
def test_cameras_that_the_policy_does_not_have_are_named(names):
    with pytest.raises(ValueError, match="is not among"):
        small_config().seeing(names)


def changed(observation, name, change):
    images = dict(observation.images)
    images[name] = change(images[name])
    return observation.replace(images=images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: x[0],
            r"image 'base_0_rgb' is \(56, 28, 3\), .*: a batch of one is image\[None\]",
        ),
        (lambda x: np.moveaxis(x, -1, 1), r"is \(2, 3, 56, 28\), .*: channels come last"),
        (lambda x: x[:, :28], r"is \(2, 28, 28, 3\), the model expects \(2, 56, 28, 3\)"),
        (lambda x: x.astype(np.int32), "has dtype int32; expected uint8 in 0..255, or floats"),
        (lambda x: x > 3, "has dtype bool"),
        (lambda x: x.astype(np.float32), r"reaches 255; floats lie in \[-1, 1\]"),
        (lambda x: np.full(x.shape, np.nan, np.float32), "reaches nan"),
    ],
)
def test_pictures_that_cannot_be_are_named(change, message):
    config = small_config()
    observation, x_t, _ = random_inputs(config)
    broken = changed(observation, "base_0_rgb", change)
    for use in (sample, say):
        with pytest.raises(ValueError, match=message):
            use(config, broken, x_t)


def sample(config, observation, x_t):
    return pi0.sample_actions(config, noisy_params(config), observation, noise=x_t)


def say(config, observation, _):
    return text.generate(config, noisy_params(config), observation, max_new_tokens=2)


def test_a_missing_camera_says_how_to_leave_it_out():
    config = small_config()
    observation, x_t, _ = random_inputs(config)
    images = {c: x for c, x in observation.images.items() if c != "left_wrist_0_rgb"}
    with pytest.raises(ValueError, match=r"camera 'left_wrist_0_rgb' .* missing.*config.seeing"):
        sample(config, observation.replace(images=images), x_t)


def test_proprio_that_is_no_number_is_named():
    config = small_config()
    observation, x_t, _ = random_inputs(config)
    proprio = observation.proprio.copy()
    proprio[1, 2] = np.nan
    with pytest.raises(ValueError, match="proprio 2 of example 1 is nan"):
        sample(config, observation.replace(proprio=proprio), x_t)


def test_tokens_of_another_tokenizer_are_told():
    config = small_config()
    observation, x_t, _ = random_inputs(config)
    tokens = observation.prompt_tokens + config.vocab_size
    with pytest.raises(ValueError, match="the vocabulary has 32: they are another tokenizer's"):
        sample(config, observation.replace(prompt_tokens=tokens), x_t)


def test_pictures_of_either_dtype_are_the_same():
    config = small_config()
    observation, x_t, _ = random_inputs(config)
    floats = {c: (x / 127.5 - 1).astype(np.float32) for c, x in observation.images.items()}
    np.testing.assert_allclose(
        sample(config, observation, x_t),
        sample(config, observation.replace(images=floats), x_t),
        atol=1e-5,
    )


def test_merged_low_rank_updates_leave_a_plain_model():
    config = pi0.Pi0Config(
        paligemma_variant="gemma_2b_lora", action_expert_variant="gemma_300m_lora"
    )
    assert config.without_lora() == pi0.Pi0Config()
    assert dataclasses.replace(config.without_lora(), pi05=True).max_token_len == 48
