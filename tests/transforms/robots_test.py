"""Robots' tables and adapters: undone by their inverses, and the originals' numbers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policymix.transforms import compose, robots
from tests.transforms import openpi_golden as golden

laws = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 2**32 - 1)
leads = st.sampled_from([(), (3,), (2, 3)])


def recorded(robot, seed, lead=(), dtype=np.float64):
    """What a dataset of the robot holds."""
    rng = np.random.default_rng(seed)
    example = {f: rng.uniform(0, 1, (*lead, d)).astype(dtype) for f, d in robot.state.items()}
    example[robot.action] = rng.uniform(0, 1, (*lead, 5, robot.action_dim)).astype(dtype)
    pictures = rng.integers(0, 256, (*lead, 4, 4, 3), dtype=np.uint8)
    return example | dict.fromkeys(robot.cameras.values(), pictures) | {"task": "push"}


@laws
@given(seeds, st.sampled_from(list(robots.ROBOTS)), leads)
def test_what_a_robot_recorded_comes_back(seed, name, lead):
    robot = robots.find(name)
    chain, given_ = robots.transforms(robot), recorded(robot, seed, lead)
    made = chain.apply(given_)
    assert made["state"].shape == (*lead, robot.proprio_dim)
    assert made["actions"].shape == (*lead, 5, robot.action_dim)
    assert made.get("images", {}).keys() == robot.cameras.keys()
    assert made["prompt"] == "push"
    back = chain.invert(made)
    assert back.keys() == given_.keys()
    for key in given_.keys() - {"task"}:
        np.testing.assert_allclose(back[key], given_[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", robots.ROBOTS)
def test_tables_agree_with_themselves(name):
    robot = robots.find(name)
    assert len(robot.positions) <= min(robot.proprio_dim, robot.action_dim)
    assert not robot.relative or any(robot.positions)
    for key, mask in robot.normalized.items():
        sizes = {"state": robot.proprio_dim, "actions": robot.action_dim}
        assert len(mask) == sizes[key]
    features = [*robot.state, robot.action, *robot.cameras.values()]
    assert len(set(features)) == len(features)


def test_an_unknown_robot_is_asked_after():
    with pytest.raises(ValueError, match=r"no robot is called 'alhoa'.*did you mean 'aloha'\?"):
        robots.find("alhoa")
    with pytest.raises(ValueError, match="no positions"):
        robots.transforms(robots.find("metaworld"), relative=True)


def test_policies_trained_otherwise_say_so():
    """As OpenPI's π0 of LIBERO, and its pi0_aloha_sim."""
    libero = robots.find("libero")
    given_ = recorded(libero, 0)
    plain, relative = (robots.transforms(libero, relative=r).apply(given_) for r in (None, True))
    np.testing.assert_array_equal(plain["actions"], given_["actions"])
    expected = given_["actions"] - np.append(given_["state"][:6], 0)
    np.testing.assert_array_equal(relative["actions"], expected)
    sim = robots.transforms(robots.find("aloha_sim"), prompt="words")
    assert [type(t) for t in sim.transforms] == [compose.Repack, robots.Aloha]
    assert sim.transforms[0].structure["prompt"] == "words"
    plain = robots.transforms(robots.find("aloha_sim"), adapted=False)
    assert [type(t) for t in plain.transforms] == [compose.Repack]
    with pytest.raises(ValueError, match="no adapter between .* there is one for aloha, "):
        robots.transforms(libero, adapted=True)


def test_alohas_conversions_are_openpis():
    """Golden numbers: `tests/transforms/openpi_golden.py` says how to renew them."""
    given_, adapter = golden.joints(), robots.Aloha()
    made = adapter.apply(given_)
    with np.load(golden.PATH) as expected:
        np.testing.assert_allclose(made["state"], expected["aloha/state"], rtol=1e-12)
        np.testing.assert_allclose(made["actions"], expected["aloha/actions"], rtol=1e-12)
        commands = adapter.invert({"actions": given_["actions"]})["actions"]
        np.testing.assert_allclose(commands, expected["aloha/commands"], rtol=1e-12)


def test_alohas_conversions_are_lerobots():
    """adapt_to_pi_aloha: a gripper's action is between 0.4 and 1.5 rad, as its state."""
    adapter, x = robots.LEROBOT_ALOHA, np.zeros(14)
    x[[6, 13]] = 0.25, 0.75
    angle = x[[6, 13]] * (1.4910 + 0.6213) - 0.6213
    made = adapter.apply({"state": x, "actions": x[None]})
    np.testing.assert_allclose(made["actions"][0, [6, 13]], (angle - 0.4) / (1.5 - 0.4))
    metres = x[[6, 13]] * (0.058 - 0.01844) + 0.01844
    radians = made["state"][[6, 13]] * (1.5 - 0.4) + 0.4
    # The arm reaches from the end of the horn, at this angle, to the finger's slide.
    horn = 0.022 * np.array([np.cos(radians), np.sin(radians)])
    np.testing.assert_allclose(np.hypot(horn[0], metres - horn[1]), 0.036, rtol=1e-12)


def test_adapters_keep_what_they_are_given_and_its_precision():
    given_ = recorded(robots.find("aloha"), 1, (2,), np.float32)
    example = {"state": given_["observation.state"], "actions": given_["action"]}
    before = {key: value.copy() for key, value in example.items()}
    made = robots.Aloha().apply(example)
    assert {key: value.dtype for key, value in made.items()} == dict.fromkeys(made, np.float32)
    for key in before:
        np.testing.assert_array_equal(example[key], before[key])
    with pytest.raises(ValueError, match=r"'state' has shape \(7,\); Aloha expects 14"):
        robots.Aloha().apply({"state": np.zeros(7)})


def poses(rng, lead):
    """Away from the two pitches where roll and yaw are one."""
    turn = rng.normal(size=(*lead, 4))
    turn *= np.where(turn[..., :1] < 0, -1, 1) / np.linalg.norm(turn, axis=-1, keepdims=True)
    place, openness = rng.uniform(-1, 1, (*lead, 3)), rng.uniform(0, 1, (*lead, 1))
    return np.concatenate([place, turn, openness], axis=-1)


@laws
@given(seeds, leads, st.sampled_from([robots.SimplerBridge(), robots.SimplerFractal()]))
def test_simplers_states_and_moves_come_back(seed, lead, adapter):
    rng = np.random.default_rng(seed)
    axis = rng.normal(size=(*lead, 5, 3))
    turn = axis / np.linalg.norm(axis, axis=-1, keepdims=True) * rng.uniform(0, 1.5)
    gripper = rng.choice([-1.0, 1.0], (*lead, 5, 1))
    moves = np.concatenate([rng.uniform(-1, 1, (*lead, 5, 3)), turn, gripper], axis=-1)
    example = {"state": poses(rng, lead), "actions": moves}
    back = adapter.invert(adapter.apply(example))
    np.testing.assert_allclose(back["state"], example["state"], atol=1e-6)
    np.testing.assert_allclose(back["actions"], moves, atol=1e-6)


def test_simplers_conversions_are_open_pi_zeros():
    """Golden numbers: of preprocess_proprio and postprocess in src/agent/env_adapter/simpler.py,
    commit c3df7fb, called on these with bounds of -1 and 1.
    """
    turn = np.array([0.9, 0.1, -0.3, 0.2]) / np.sqrt(0.95)
    state = np.array([0.1, 0.2, 0.3, *turn, 0.7])
    move = np.array([[0.01, 0.02, 0.03, 0.1, -0.2, 0.3, 0.8], [0, 0, 0, 0, 0, 0, 0.3]])
    bridge, fractal = robots.SimplerBridge(), robots.SimplerFractal()
    found = bridge.apply({"state": state})["state"]
    np.testing.assert_allclose(
        found,
        [0.1, 0.2, 0.3, 3.038511045067093, -0.9099510309719299, -2.601173153319209, 0.7],
        rtol=1e-9,
    )
    np.testing.assert_allclose(
        bridge.invert({"actions": move})["actions"],
        [
            [
                0.010000000000000009,
                0.020000000000000018,
                0.030000000000000027,
                0.12892336372590393,
                -0.1834257950093784,
                0.3087481636170299,
                1.0,
            ],
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0],
        ],
        rtol=1e-9,
    )
    found = fractal.apply({"state": state})["state"]
    np.testing.assert_allclose(
        found,
        [
            0.1,
            0.2,
            0.3,
            0.10259783520851543,
            -0.30779350562554625,
            0.20519567041703085,
            0.9233805168766388,
            0.30000000000000004,
        ],
        rtol=1e-9,
    )
    np.testing.assert_allclose(
        fractal.invert({"actions": move})["actions"],
        [
            [
                0.010000000000000009,
                0.020000000000000018,
                0.030000000000000027,
                0.12892336372590393,
                -0.1834257950093784,
                0.3087481636170299,
                -0.6000000000000001,
            ],
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.4],
        ],
        rtol=1e-9,
    )
