"""Replay of the nearest demonstration: which one it chooses, what it plays, and what it refuses."""

import dataclasses
import json
import types

import ml_collections
import numpy as np
import pytest

from configs import pi0_metaworld
from policymix.data import writer
from policymix.runs import evaluate, replays, rollouts
from policymix.sim import envs, workers
from tests.runs.sim_support import debug_config

REACH, PUSH = (envs.parse("metaworld", f"{name}-v3") for name in ("reach", "push"))
NUMBERS = {"dtype": "float32", "names": None}
LENGTHS = 5, 12, 7


ROOM = {
    "observation.state": NUMBERS | {"shape": (3,)},
    "observation.image": {
        "dtype": "image",
        "shape": (8, 8, 3),
        "names": ["height", "width", "channels"],
    },
    "action": NUMBERS | {"shape": (2,)},
}


def write(path, starts, pictures=None, prompts=("go", "go", "go"), lengths=LENGTHS, speed=0.5):
    """Demonstrations whose actions count up from 100 n; `pictures` [n] are their grey levels."""
    features = {key: f for key, f in ROOM.items() if pictures is not None or "image" not in key}
    with writer.Writer(path, fps=10, features=features, robot_type="room") as dataset:
        for n, (start, prompt, length) in enumerate(zip(starts, prompts, lengths, strict=True)):
            rise = np.arange(length, dtype=np.float32)[:, None]
            (a,) = features["action"]["shape"]
            episode = {
                "observation.state": np.asarray(start, np.float32) + speed * rise,
                "action": np.repeat(100 * n + rise, a, axis=1),
            }
            if pictures is not None:
                episode["observation.image"] = np.full((length, 8, 8, 3), pictures[n], np.uint8)
            dataset.add_episode(episode, prompt)
    return f"nearest:{path}"


def config(cameras=(), **evaluated):
    made = pi0_metaworld.get_config("debug")
    made.model.update({"action_dim": 2, "proprio_dim": 3, "action_horizon": 4})
    made.model.update({"image_keys": cameras, "image_resolution": (8, 8)})
    made.model.siglip_variant = "mu/8"
    made.data.cameras = ml_collections.ConfigDict(dict.fromkeys(cameras, "observation.image"))
    made.evaluate.update({"replan_steps": 3} | evaluated)
    return made


def act(policy, states, call=0, seeds=None, prompts=None, pictures=None):
    states = np.asarray(states, np.float32)
    raw = {
        "state": states,
        "prompt": list(prompts or ["go"] * len(states)),
        "images": {
            camera: np.broadcast_to(
                np.asarray(pictures, np.uint8)[:, None, None, None], (len(states), 8, 8, 3)
            )
            for camera in policy.encoder.cameras
        },
    }
    seeds = range(len(states)) if seeds is None else seeds
    return policy.act(raw, seeds=seeds, call=call, num_flow_steps=1)


STARTS = (0, 0, 0), (10, 10, 10), (20, 20, 20)


def test_plays_the_nearest_demonstration_whoever_is_left(tmp_path):
    policy = replays.Replay(config(), write(tmp_path / "demos", STARTS))
    first = act(policy, [[19, 21, 20], [1, 0, 0], [11, 9, 9]])
    assert first.dtype == np.float32
    assert first[:, :, 0].tolist() == [[200, 201, 202, 203], [0, 1, 2, 3], [100, 101, 102, 103]]
    # Episode 0 is over, the last row is repeated, and observations are those of somewhere else.
    later = act(policy, [[20, 20, 20]] * 3, call=1, seeds=[1, 2, 2])
    assert later[:, :, 1].tolist() == [[3, 4, 4, 4], [103, 104, 105, 106], [103, 104, 105, 106]]
    assert act(policy, [[0, 0, 0]], call=40, seeds=[2])[0, :, 0].tolist() == [111] * 4


def test_numbers_count_by_their_deviation_in_the_dataset(tmp_path):
    starts = (0, 0, 0), (1000, 0, 0), (0, 1, 0)
    policy = replays.Replay(config(), write(tmp_path / "demos", starts, speed=0.1))
    # 400 of 1000 is less than 0.9 of 1.
    assert act(policy, [[400, 0, 0], [0, 0.9, 0], [400, 0.9, 0]])[:, 0, 0].tolist() == [0, 200, 200]


@pytest.mark.parametrize("speed", [0.0, 0.5, 300.0])
def test_pictures_count_as_much_as_states(tmp_path, speed):
    """However far states go after the first, which alone are compared."""
    levels = np.array([0, 20, 200])
    path = write(tmp_path / "demos", STARTS, pictures=levels, speed=speed)
    policy = replays.Replay(config(("base",)), path)
    states = np.full((3, 3), 10)
    assert act(policy, states, pictures=[10, 90, 250])[:, 0, 0].tolist() == [100, 100, 200]
    for level in (60, 90, 115, 150):
        for place in (2, 8, 19):
            near = np.square(np.subtract(STARTS, place)).mean(axis=1) / np.var(STARTS, axis=0)[0]
            near = near + np.square(levels - level) / np.var(levels)
            chosen = act(policy, [[place] * 3], pictures=[level])[0, 0, 0]
            assert chosen == 100 * near.argmin()


def test_what_is_alike_in_all_starts_says_nothing(tmp_path):
    starts = [(0.1, 0.7, 1 / 3)] * 3  # whose mean is rounded
    policy = replays.Replay(config(("base",)), write(tmp_path / "a", starts, (0, 20, 200)))
    found = act(policy, np.array(starts) + 1e-6, pictures=[190, 30, 1])
    assert found[:, 0, 0].tolist() == [200, 100, 0]
    policy = replays.Replay(config(("base",)), write(tmp_path / "b", STARTS, (77, 77, 77)))
    found = act(policy, [[9, 9, 9], [20, 20, 20], [1, 1, 1]], pictures=[78, 70, 255])
    assert found[:, 0, 0].tolist() == [100, 200, 0]


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_demonstrations_collected_with_noise_are_told_not_to_repeat(tmp_path, capsys, noise):
    name = write(tmp_path / "demos", STARTS)
    (tmp_path / "demos" / "collected.json").write_text(json.dumps({"noise": noise}))
    replays.Replay(config(), name)
    told = capsys.readouterr().out
    assert (f"WARNING: {name} was collected with noise=0.2: it holds what the" in told) == (
        noise > 0
    )


def test_only_demonstrations_of_the_same_prompt_are_chosen(tmp_path):
    prompts = "reach", "push", "push"
    policy = replays.Replay(config(), write(tmp_path / "demos", STARTS, prompts=prompts))
    chosen = act(policy, [[0, 0, 0]] * 2, seeds=[7, 7], prompts=["push", "reach"])
    assert chosen[:, 0, 0].tolist() == [100, 0]
    later = act(policy, [[0, 0, 0]] * 2, call=1, seeds=[7, 7], prompts=["reach", "push"])
    assert later[:, 0, 0].tolist() == [3, 103]
    alone = replays.Replay(config(), write(tmp_path / "alone", STARTS, prompts=("go",) * 3))
    assert act(alone, [[20, 20, 20]], prompts=["whatever"])[0, 0, 0] == 200


def test_what_cannot_be_replayed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="names no dataset: write nearest:DATASET"):
        replays.Replay(config(), "nearest:")
    with pytest.raises((ValueError, OSError), match="nowhere"):
        replays.Replay(config(), f"nearest:{tmp_path / 'nowhere'}")
    policy = replays.Replay(
        config(), write(tmp_path / "demos", STARTS, prompts=("reach", "push", "push"))
    )
    room = types.SimpleNamespace(features=ROOM)
    policy.check(room, {REACH: "reach", PUSH: "push"})
    with pytest.raises(ValueError, match=r"demonstrates \['push', 'reach'\], and .* 'open'"):
        policy.check(room, {REACH: "open"})
    with pytest.raises(ValueError, match="reach-v3, push-v3 share a prompt: evaluate them one"):
        policy.check(room, {REACH: "push", PUSH: "push"})
    with pytest.raises(ValueError, match="states of 3 numbers and actions of 2; .* 39 and 4"):
        policy.check(envs.make(REACH), {REACH: "reach"})
    empty = config()
    empty.model = {}
    with pytest.raises(ValueError, match="needs a model"):
        replays.Replay(empty, policy.name)


def test_is_evaluated_as_checkpoints_are(tmp_path, capsys):
    pytest.importorskip("metaworld")
    env = envs.make(REACH)
    start = env.reset(1001)["observation.state"]
    with writer.Writer(tmp_path / "demos", fps=80, features=env.features, robot_type="m") as demos:
        for n, (offset, length) in enumerate(((3.0, 4), (0.0, 6))):
            actions = np.full((length, 4), 0.1 * n, np.float32)
            states = np.tile(start + np.float32(offset), (length, 1))
            demos.add_episode({"observation.state": states, "action": actions}, env.prompt)
    name, played = f"nearest:{tmp_path / 'demos'}", debug_config(num_episodes=2, max_steps=12)
    request = evaluate.Request((name,), tmp_path / "out", env="metaworld/reach-v3")
    with workers.Pool(1) as pool:
        told = evaluate.evaluate(played, request, pool)["policies"][0]
        replay = replays.Replay(played, name)
        episodes = [(REACH, 1000), (REACH, 1001)]
        again = rollouts.roll_out(replay, pool, episodes, played, {REACH: env.prompt})
    assert [result.steps for result in again] == told["steps"]
    assert (told["path"], told["demonstrations"], told["loss"]) == (name, 2, None)
    assert len(told["fingerprint"]) == 64
    low, high = told["score_interval"]
    assert 0 <= low <= told["mean_score"] <= high <= 1
    assert "nearest:" in (tmp_path / "out" / "report.html").read_text()
    inside = dataclasses.replace(request, output=tmp_path / "demos" / "out")
    with pytest.raises(ValueError, match="overlaps the input"):
        evaluate.evaluate(played, inside)
    judged = dataclasses.replace(request, output=tmp_path / "new", validation="losses.npz")
    with pytest.raises(ValueError, match="validation is of checkpoints' losses"):
        evaluate.evaluate(played, judged)
    assert "episodes succeeded" in capsys.readouterr().out
