"""What the network takes, made from what a dataset or a robot has, and its actions made back."""

import jax
import numpy as np
import pytest

from configs import common
from policymix.data import tokenizer
from policymix.models import pi0
from policymix.runs import encoding
from policymix.transforms import compose, images, normalize, prompts, robots

STATE, ACTION = 3, 2


def model(**fields) -> pi0.Pi0Config:
    given = {
        "paligemma_variant": "dummy",
        "action_expert_variant": "dummy",
        "siglip_variant": "mu/28",
        "vocab_size": 300,
        "action_dim": 4,
        "proprio_dim": 5,
        "action_horizon": 6,
        "max_token_len": 12,
        "image_keys": (),
        "image_resolution": (28, 56),
    }
    return pi0.Pi0Config(**given | fields)


def data(**settings):
    section = common.get_config().data
    section.update(settings)
    return section


@pytest.fixture
def stats():
    rng = np.random.default_rng(0)
    return {
        "state": normalize.compute(rng.normal(5, 3, (200, STATE))),
        "actions": normalize.compute(rng.normal(-2, 0.5, (200, ACTION))),
    }


def raw(batch_size=4, horizon=6, **more):
    rng = np.random.default_rng(1)
    return {
        "state": rng.normal(5, 3, (batch_size, STATE)).astype(np.float32),
        "actions": rng.normal(-2, 0.5, (batch_size, horizon, ACTION)).astype(np.float32),
        "prompt": [f"push {k % 2}" for k in range(batch_size)],
    } | more


@pytest.mark.parametrize("steps", [False, True])
@pytest.mark.parametrize("dims", [False, True])
def test_what_does_not_count_in_the_loss_is_masked_where_that_is_asked_for(stats, steps, dims):
    encoder = encoding.Encoder(
        model(), data(), stats, mask_padded_steps=steps, mask_padded_dims=dims
    )
    is_pad = np.zeros((4, 6), bool)
    is_pad[1, 4:] = is_pad[3, 1:] = True
    batch = encoder.batch(raw(action_is_pad=is_pad))
    if not steps and not dims:
        assert batch.action_mask is None
        return
    expected = np.ones(batch.actions.shape, bool)
    expected[is_pad] &= not steps
    expected[..., ACTION:] &= not dims
    np.testing.assert_array_equal(batch.action_mask, expected)
    both = jax.tree.map(lambda *parts: np.concatenate(parts), batch, batch)  # as of a mixture
    np.testing.assert_array_equal(both.action_mask[4:], expected)


@pytest.mark.parametrize(
    "settings", [{}, {"normalization": "quantiles"}, {"delta_actions": (1, -1)}]
)
def test_decoding_undoes_encoding(stats, settings):
    encoder, example = encoding.Encoder(model(), data(**settings), stats), raw()
    actions = encoder.batch(example).actions
    assert (actions.shape, actions.dtype) == ((4, 6, 4), np.float32)
    assert not actions[..., ACTION:].any()
    assert abs(actions[..., :ACTION]).max() < (50 if "delta_actions" in settings else 5)
    decoded = encoder.actions(actions, example["state"])
    np.testing.assert_allclose(decoded, example["actions"], rtol=1e-5)
    assert decoded.dtype == np.float32


def test_relative_actions_are_normalised_as_differences_from_the_state(stats):
    example = raw()
    encoder = encoding.Encoder(model(), data(delta_actions=(1, -1)), stats)
    found = encoder.batch(example).actions[..., :ACTION]
    moved = example["actions"] - np.pad(example["state"][:, None, :1], [(0, 0), (0, 0), (0, 1)])
    expected = normalize.normalize(moved, stats["actions"], scheme="mean_std")
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_robots_table_fills_in_what_the_config_leaves_open():
    bridge = encoding.wiring(data(robot="bridge"))
    assert (bridge.state_keys, bridge.action_keys) == (("observation.state",), ("action",))
    assert bridge.scheme == "bounds"
    assert bridge.masks == {"actions": (True,) * 6 + (False,)}
    droid = encoding.wiring(data(robot="droid", cameras={"base_0_rgb": "mine", "other": ""}))
    assert droid.state_keys == ("joint_position", "gripper_position")
    assert droid.cameras["base_0_rgb"] == "mine"
    assert droid.cameras["left_wrist_0_rgb"] == "wrist_image_left"
    assert droid.cameras["other"] == encoding.ABSENT
    said = encoding.wiring(data(robot="libero", state_key="a, b", normalization="quantiles"))
    assert (said.state_keys, said.scheme) == (("a", "b"), "quantiles")
    aloha = encoding.wiring(data(robot="aloha"))
    assert aloha.relative
    assert not encoding.wiring(data(robot="aloha", delta_actions=())).relative
    plain = encoding.wiring(data())
    assert (plain.state_keys, plain.scheme) == (("observation.state",), "mean_std")
    assert not plain.adapt.transforms


def test_a_robots_numbers_are_adapted_as_its_table_or_the_config_says(stats):
    kinds = {
        ("aloha_sim", None): [robots.Aloha],
        ("aloha_sim", False): [],
        ("aloha", None): [robots.Aloha, compose.DeltaActions],
        ("bridge", None): [],
        ("bridge", True): [robots.SimplerBridge],
        ("libero", False): [],
    }
    for (robot, adapt), wanted in kinds.items():
        found = encoding.wiring(data(robot=robot, adapt=adapt)).adapt
        assert [type(one) for one in found.transforms] == wanted
    for robot in ("libero", ""):
        with pytest.raises(ValueError, match="no adapter .*config.data.adapt"):
            encoding.wiring(data(robot=robot, adapt=True))


def test_grippers_of_bridge_are_not_normalised():
    rng = np.random.default_rng(0)
    stats = {key: normalize.compute(rng.normal(0, 0.1, (500, 7))) for key in ("state", "actions")}
    example = {"state": rng.normal(0, 0.05, (4, 7)).astype(np.float32), "prompt": ["go"] * 4}
    example["actions"] = rng.normal(0, 0.05, (4, 6, 7)).astype(np.float32)
    example["actions"][..., 6] = rng.integers(0, 2, (4, 6))
    bridge = encoding.Encoder(model(action_dim=8, proprio_dim=7), data(robot="bridge"), stats)
    batch = bridge.batch(example)
    np.testing.assert_array_equal(batch.actions[..., 6], example["actions"][..., 6])
    decoded = bridge.actions(batch.actions, example["state"])
    np.testing.assert_allclose(decoded, example["actions"], atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"robot": "brigde"}, "no robot is called 'brigde'.*did you mean 'bridge'"),
        ({"delta_actions": (0.5,)}, r"delta_actions is \(0.5,\); expected OpenPI's way"),
        ({"normalization": "quantile"}, "did you mean 'quantiles'"),
    ],
)
def test_wiring_that_cannot_be_is_refused(stats, settings, message):
    with pytest.raises(ValueError, match=message):
        encoding.Encoder(model(), data(**settings), stats)


def test_what_the_network_says_beyond_the_robots_actions_is_dropped(stats):
    encoder = encoding.Encoder(model(), data(), stats)
    sampled = np.random.default_rng(2).normal(size=(1, 6, 4)).astype(np.float32)
    other = sampled.copy()
    other[..., ACTION:] = 99
    state = raw(1)["state"]
    np.testing.assert_array_equal(encoder.actions(sampled, state), encoder.actions(other, state))


def test_the_state_is_normalised_and_padded_to_proprio_dim(stats):
    example = raw()
    proprio = encoding.Encoder(model(), data(), stats).observation(example).proprio
    assert (proprio.shape, proprio.dtype) == ((4, 5), np.float32)
    expected = (example["state"] - stats["state"].mean) / (stats["state"].std + 1e-6)
    np.testing.assert_allclose(proprio[:, :STATE], expected, rtol=1e-5, atol=1e-6)
    assert not proprio[:, STATE:].any()


def test_prompts_met_before_are_those_met_for_the_first_time(stats):
    encoder = encoding.Encoder(model(), data(), stats)
    texts = ["push it", "reach", "push it", "pull_it\n"]
    expected = tokenizer.ByteTokenizer(12).encode([prompts.pi0(text) for text in texts])
    for _ in range(2):
        found = encoder.observation(raw(prompt=texts))
        np.testing.assert_array_equal(found.prompt_tokens, expected[0])
        np.testing.assert_array_equal(found.prompt_mask, expected[1])


def test_pi05_reads_the_state_in_the_prompt(stats):
    encoder = encoding.Encoder(model(pi05=True, max_token_len=80), data(), stats)
    example = raw(prompt=["push"] * 4)
    found = encoder.observation(example)
    normalised = normalize.normalize(example["state"], stats["state"], scheme="mean_std")
    texts = [prompts.pi05("push", row) for row in normalised]
    assert len(set(texts)) == 4
    expected, _ = tokenizer.ByteTokenizer(80).encode(texts)
    np.testing.assert_array_equal(found.prompt_tokens, expected)


def test_a_model_without_prompts_gets_none(stats):
    found = encoding.Encoder(model(max_token_len=0), data(), stats).observation(raw())
    assert found.prompt_tokens is None
    assert found.prompt_mask is None


def test_words_are_tokens_of_the_models_vocabulary(stats):
    encoder = encoding.Encoder(model(vocab_size=50), data(tokenizer="words"), stats)
    found = encoder.observation(raw(prompt=["push", "push", "window open", "open"]))
    assert found.prompt_mask.sum(axis=1).tolist() == [1, 1, 2, 1]
    assert found.prompt_tokens.max() < 50
    assert found.prompt_tokens[2, 1] == found.prompt_tokens[3, 0]


@pytest.mark.parametrize(
    ("fields", "name", "message"),
    [
        ({"vocab_size": 258}, "bytes", "vocab_size is 258; the tokenizer 'bytes' needs 259"),
        ({}, "word", "^tokenizer is 'word'; expected paligemma"),
        ({"vocab_size": 3}, "words", "vocab_size is 3; words need more than 3"),
    ],
)
def test_a_tokenizer_that_does_not_serve_is_refused(stats, fields, name, message):
    with pytest.raises(ValueError, match=message) as told:
        encoding.Encoder(model(**fields), data(tokenizer=name), stats)
    assert "config.model" not in str(told.value)  # which chunk-level learners do not have


CAMERAS = ("base_0_rgb", "left_wrist_0_rgb")
NAMED = {"base_0_rgb": "top", "left_wrist_0_rgb": "wrist"}


def pictures(**shapes):
    rng = np.random.default_rng(3)
    return {
        camera: rng.integers(0, 256, (4, *shapes.get(camera, (28, 56)), 3), np.uint8)
        for camera in CAMERAS
    }


def test_cameras_show_the_pictures_that_are_named_theirs(stats):
    encoder = encoding.Encoder(model(image_keys=CAMERAS), data(cameras=NAMED), stats)
    assert encoder.cameras == NAMED
    images = pictures()
    found = encoder.observation(raw(images=images))
    assert list(found.images) == list(CAMERAS)
    for camera in CAMERAS:
        np.testing.assert_array_equal(found.images[camera], images[camera])
        assert found.image_masks[camera].all()


def test_absent_cameras_need_no_pictures_and_are_not_computed(stats):
    config, images = model(image_keys=CAMERAS), pictures()
    encoder = encoding.Encoder(config, data(cameras=NAMED | {"base_0_rgb": "absent"}), stats)
    assert encoder.cameras == {"left_wrist_0_rgb": "wrist"}
    assert encoder.seen == model(image_keys=("left_wrist_0_rgb",))
    found = encoder.observation(raw(images={"left_wrist_0_rgb": images["left_wrist_0_rgb"]}))
    assert list(found.images) == ["left_wrist_0_rgb"]
    pi0.check_observation(encoder.seen, found)
    whole = encoding.masked(config, found)
    pi0.check_observation(config, whole)
    assert not whole.image_masks["base_0_rgb"].any()
    assert whole.image_masks["left_wrist_0_rgb"].all()
    assert list(whole.images) == list(CAMERAS)


def test_a_state_that_is_no_number_is_named(stats):
    example = raw()
    example["state"][2, 1] = np.nan
    with pytest.raises(ValueError, match="'state' .* nan in dimension 1 of example 2"):
        encoding.Encoder(model(), data(), stats).observation(example)


def test_pictures_that_are_no_bytes_are_refused(stats):
    encoder = encoding.Encoder(model(image_keys=CAMERAS), data(cameras=NAMED), stats)
    images = {camera: picture / 255 for camera, picture in pictures().items()}
    with pytest.raises(ValueError, match="pictures of 'top' have dtype float64; expected uint8"):
        encoder.observation(raw(images=images))


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (
            {},
            r"cameras \['base_0_rgb', 'left_wrist_0_rgb'\], .*base_0_rgb=FEATURE, or say =absent",
        ),
        ({"left_wrist_0_rgb": "wrist"}, r"names the cameras \['base_0_rgb'\]"),
        (NAMED | {"base_rgb": "side"}, "names 'base_rgb'.*did you mean 'base_0_rgb'"),
    ],
)
def test_cameras_without_a_picture_and_pictures_without_a_camera_are_named(stats, named, message):
    with pytest.raises(ValueError, match=message) as told:
        encoding.Encoder(model(image_keys=CAMERAS), data(cameras=named), stats)
    assert "the model's image_keys" in str(told.value)


def test_pictures_of_another_size_are_resized_with_their_aspect_kept(stats):
    encoder = encoding.Encoder(model(image_keys=CAMERAS), data(cameras=NAMED), stats)
    seen = pictures(left_wrist_0_rgb=(96, 96))
    found = encoder.observation(raw(images=seen)).images["left_wrist_0_rgb"]
    expected = images.resize_with_pad(seen["left_wrist_0_rgb"], 28, 56)
    np.testing.assert_array_equal(found, expected)
    assert not found[:, :, :14].any()
    assert found[:, :, 14:42].any()


def test_pictures_are_bytes(stats):
    encoder = encoding.Encoder(model(image_keys=CAMERAS), data(cameras=NAMED), stats)
    seen = {camera: image.astype(np.float32) for camera, image in pictures().items()}
    with pytest.raises(ValueError, match="'top' have dtype float32; expected uint8"):
        encoder.observation(raw(images=seen))
