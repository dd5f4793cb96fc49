"""Batches of chunks, against what was written to the dataset frame by frame."""

import dataclasses
import pathlib
import pickle

import jax
import ml_collections
import numpy as np
import pytest

from configs import common
from policymix.checkpoints import assets
from policymix.data import writer
from policymix.rl.config import LearnerConfig
from policymix.runs import edit_dataset, pipeline, transitions

STATE, ACTION, HORIZON, DISCOUNT = 3, 2, 4, 0.9
LENGTHS = (7, 3, 9, 12, 5, 8)
TASKS = ("push the block", "open the door")
WON = (0, 2, 3)  # episodes that succeed, in their last frame
RLDS = pathlib.Path(__file__).parents[1] / "testdata" / "rlds"
SIDE = 12


def episode(number, *, pictures=False, action=1.0):
    """States tell the episode and the frame; so do pictures."""
    length, rng = LENGTHS[number], np.random.default_rng(number)
    frames = np.arange(length)
    won = (frames == length - 1) & (number in WON)
    found = {
        "observation.state": np.stack([frames, 0 * frames + number, rng.normal(size=length)], 1),
        "action": action * rng.uniform(-1, 1, size=(length, ACTION)),
        "next.reward": won + 0.25 * (frames == 1),
        "next.success": won,
        "info.near": frames >= 2,
        "speed": rng.normal(size=length),
    }
    found = {k: v if v.dtype == bool else v.astype(np.float32) for k, v in found.items()}
    if pictures:
        shade = (20 * number + frames).astype(np.uint8)
        found["observation.image"] = np.broadcast_to(
            shade[:, None, None, None], (length, SIDE, SIDE, 3)
        ).copy()
    return found


def write(path, *, without=(), numbers=range(6), change=None, **options):
    values = [episode(number, **options) for number in numbers]
    for number, value in enumerate(values):
        value.update(change(number, value) if change else {})
    kinds = {"observation.image": {"dtype": "image", "shape": [SIDE, SIDE, 3]}}
    features = {
        name: kinds.get(
            name, {"dtype": v.dtype.name, "shape": list(v.shape[1:]) or [1], "names": None}
        )
        for name, v in values[0].items()
        if name not in without
    }
    if "observation.image" in features:
        features["observation.image"]["names"] = ["height", "width", "channels"]
    with writer.Writer(path, fps=10, features=features, robot_type="test") as dataset:
        for number, value in zip(numbers, values, strict=True):
            kept = {name: v for name, v in value.items() if name in features}
            dataset.add_episode(kept, TASKS[number % 2])
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write(tmp_path_factory.mktemp("plain") / "reach")


@pytest.fixture(scope="module")
def pictured(tmp_path_factory):
    return write(tmp_path_factory.mktemp("pictured") / "reach", pictures=True)


def configured(path, **options):
    config = common.get_config()
    config.data.update({"path": str(path), "held_out": 0.0, "tokenizer": "words"})
    config.offline_rl.update({"action_horizon": HORIZON, "discount": DISCOUNT} | options)
    return config


def settings(**options):
    sizes = {"action_dim": ACTION, "proprio_dim": STATE, "action_horizon": HORIZON}
    return LearnerConfig(**(sizes | {"max_token_len": 6, "image_resolution": (8, 8)} | options))


def opened(path, *, learner=None, data=None, **options):
    config = configured(path, **options)
    config.data.update(data or {})
    learner = learner or settings(algorithm=config.offline_rl.algorithm)
    return transitions.Transitions(config, learner)


def everything(found):
    """All chunks of an epoch, in the order of their frames."""
    batch = found.batch(0, found.num_chunks)
    raw = whose(found, batch.observation)
    order = np.lexsort(raw[:, ::-1].T)
    return raw[order], jax.tree.map(lambda x: x[order], batch)


def whose(found, observation):
    """(episode, frame) of normalised states: [b, 2]."""
    stats = found.encoder.norm_stats["state"]
    state = observation.proprio[:, :STATE] * (stats.std + 1e-6) + stats.mean
    return np.rint(state[:, [1, 0]]).astype(int)


def frames_of(numbers, horizon=HORIZON):
    """What is expected of every chunk: (episode, frame, length, next frame, ended, goes on)."""
    for number in numbers:
        length = LENGTHS[number]
        for frame in range(length):
            left = length - frame
            if number in WON and left <= horizon:
                yield number, frame, left, length - 1, True, True
            else:
                played = min(horizon, left - 1)
                yield number, frame, max(played, 1), frame + played, False, played > 0


def test_every_chunk_of_an_epoch(plain):
    found = opened(plain)
    raw, batch = everything(found)
    expected = list(frames_of(range(len(LENGTHS))))
    assert found.num_chunks == len(expected) == sum(LENGTHS)
    np.testing.assert_array_equal(raw, [(e, t) for e, t, *_ in expected])
    np.testing.assert_array_equal(
        whose(found, batch.next_observation), [(e, after) for e, _, _, after, *_ in expected]
    )
    np.testing.assert_array_equal((~batch.action_is_pad).sum(1), [n for _, _, n, *_ in expected])
    np.testing.assert_array_equal(batch.has_next, [known for *_, known in expected])
    values = [episode(number) for number in range(len(LENGTHS))]
    for row, (e, t, n, _, ended, known) in enumerate(expected):
        rewards = values[e]["next.reward"][t : t + n]
        np.testing.assert_allclose(
            batch.rewards[row], (DISCOUNT ** np.arange(n) * rewards).sum(), rtol=1e-6
        )
        np.testing.assert_allclose(
            batch.discounts[row], 0 if ended or not known else DISCOUNT**n, rtol=1e-6
        )
        raw_actions = values[e]["action"][np.minimum(t + np.arange(HORIZON), t + n - 1)]
        actions = found.encoder.actions(
            batch.actions[row : row + 1], values[e]["observation.state"][:1]
        )
        np.testing.assert_allclose(actions[0], raw_actions, atol=1e-5)
    assert batch.candidates is None
    for field in ("actions", "rewards", "discounts"):
        assert getattr(batch, field).dtype == np.float32


def test_a_batch_depends_on_seed_and_step_alone(plain):
    found, again = opened(plain), opened(plain)
    for step in (3, 0):
        jax.tree.map(np.testing.assert_array_equal, found.batch(step, 8), again.batch(step, 8))
    other = opened(plain, seed=1).batch(0, 8)
    assert not np.array_equal(other.actions, found.batch(0, 8).actions)
    whole = found.batch(5, 8)
    for rows in (slice(0, 4), slice(4, 8)):
        part = found.batch(5, 8, rows)
        jax.tree.map(lambda a, b, r=rows: np.testing.assert_array_equal(a, b[r]), part, whole)
    made = list(found.batches(4, 7, 8, shard=(1, 2)))
    assert len(made) == 3
    part = found.batch(6, 8, slice(4, 8))
    jax.tree.map(np.testing.assert_array_equal, made[2], part)
    jax.tree.map(
        np.testing.assert_array_equal,
        pickle.loads(pickle.dumps(found)).batch(6, 8),
        found.batch(6, 8),
    )
    # The seed is the run's own, whatever that of imitation is.
    config = configured(plain)
    config.train.seed = 7
    jax.tree.map(
        np.testing.assert_array_equal,
        transitions.Transitions(config, settings()).batch(0, 8),
        found.batch(0, 8),
    )
    assert config.train.seed == 7


def test_epochs(plain):
    found = opened(plain)
    assert found.steps_per_epoch(8) == 6  # of 44
    assert found.steps_per_epoch(44) == 1
    raw = np.concatenate([whose(found, found.batch(step, 11).observation) for step in range(4)])
    assert len(np.unique(raw, axis=0)) == 44


def test_what_imitation_sees_is_the_same(plain):
    """Whole chunks are those of `Pipeline`, prompts and numbers alike."""
    found = opened(plain, learner=settings(action_dim=4, proprio_dim=5))
    source = found.sources[0]
    raw = source.get(source.train, np.arange(3))
    expected, (_, mine) = found.encoder.batch(raw), everything(found)
    np.testing.assert_array_equal(mine.actions[:3], expected.actions)
    for name in ("proprio", "prompt_tokens", "prompt_mask"):
        theirs = getattr(expected.observation, name)
        np.testing.assert_array_equal(getattr(mine.observation, name)[:3], theirs)
    assert mine.actions.shape[2] == 4
    assert mine.observation.proprio.shape[1] == 5


def test_actions_relative_to_where_a_chunk_begins(tmp_path):
    def moving(number, value):
        return {"action": value["observation.state"][:, :ACTION] + value["action"]}

    path = write(tmp_path / "moving", change=moving)
    found = opened(path, data={"delta_actions": (1, -1)})
    raw, batch = everything(found)
    source = found.sources[0]
    whole = np.flatnonzero(~batch.action_is_pad.any(1))
    expected = found.encoder.batch(source.get(source.train, whole))
    np.testing.assert_allclose(batch.actions[whole], expected.actions, atol=1e-6)
    # Over a chunk the first action moves away with the state, and the second does not.
    values = episode(3)
    actions = found.encoder.actions(batch.actions[[19]], values["observation.state"][[raw[19][1]]])
    np.testing.assert_array_equal(raw[19], [3, 0])
    np.testing.assert_allclose(
        actions[0, :, 0], (np.arange(4) + values["action"][:4, 0]), atol=1e-5
    )


def test_prompts(plain):
    found = opened(plain)
    raw, batch = everything(found)
    tokens = batch.observation.prompt_tokens
    assert len({tuple(row) for row in tokens.tolist()}) == 2
    odd = raw[:, 0] % 2 == 1
    assert len({tuple(row) for row in tokens[odd].tolist()}) == 1
    np.testing.assert_array_equal(tokens, batch.next_observation.prompt_tokens)
    said = opened(plain, data={"default_prompt": TASKS[1]})
    np.testing.assert_array_equal(everything(said)[1].observation.prompt_tokens[0], tokens[odd][0])
    silent = opened(plain, learner=settings(max_token_len=0)).batch(0, 4).observation
    assert silent.prompt_tokens is None
    assert silent.prompt_mask is None


@pytest.mark.parametrize("cache_mb", [0, 1000])
def test_pictures_of_now_and_then(pictured, cache_mb):
    learner = settings(image_keys=("front",))
    data = {"cameras": ml_collections.ConfigDict({"front": "observation.image"})}
    found = opened(pictured, learner=learner, data=data | {"cache_mb": cache_mb})
    batch = next(iter(found.batches(0, 1, 20)))
    for observation in (batch.observation, batch.next_observation):
        pictures = observation.images["front"]
        assert pictures.shape == (20, 8, 8, 3)
        assert pictures.dtype == np.uint8
        raw = whose(found, observation)
        np.testing.assert_array_equal(pictures[:, 3, 3, 1], 20 * raw[:, 0] + raw[:, 1])
        assert observation.image_masks["front"].all()


def test_cameras_that_are_not_looked_at(pictured):
    data = {"cameras": ml_collections.ConfigDict({"front": "observation.image"})}
    assert opened(pictured, data=data).batch(0, 4).observation.images == {}


def test_held_out(plain):
    found = opened(plain, data={"held_out": 0.34})
    held_out = found.sources[0].held_out_episodes
    assert len(held_out) == 2
    assert found.num_chunks == sum(n for e, n in enumerate(LENGTHS) if e not in held_out)
    raw, _ = everything(found)
    assert not set(raw[:, 0]) & set(held_out)
    batch = found.held_out_batch(1000)
    assert set(whose(found, batch.observation)[:, 0]) == set(held_out)
    assert len(batch.rewards) == sum(LENGTHS[e] for e in held_out)
    few = found.held_out_batch(5)
    assert few.actions.shape == (5, HORIZON, ACTION)
    jax.tree.map(np.testing.assert_array_equal, few, found.held_out_batch(5))
    assert opened(plain).held_out_batch(5) is None


def test_several_datasets_of_one_robot(plain, tmp_path):
    other = write(tmp_path / "more", numbers=[4, 5])
    found = opened(f"{plain},{other}", data={"held_out": 0.2})
    assert len(found.parts) == 2
    assert found.num_chunks == sum(len(part.train) for part in found.parts)
    raw = np.concatenate(
        [whose(found, found.batch(n, 8).observation) for n in range(found.num_chunks // 8)]
    )
    counts = [len(part.train) for part in found.parts]
    of_other = np.isin(raw[:, 0], [4, 5]).sum()
    assert of_other >= counts[1] - 8
    batch = found.held_out_batch(100)
    assert len(batch.rewards) == sum(len(part.held_out) for part in found.parts)
    assert len(found.describe()) == 4
    assert [t["path"] for t in found.trainings()] == [str(plain), str(other)]
    shares = opened(f"{plain},{other}", data={"fractions": (1, 3)}).batch(0, 8)
    assert np.isin(whose(found, shares.observation)[:, 0], [4, 5]).sum() >= 6


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {(2, 1): 0.25, (2, 6): 0.9**2}),
        ({"reward_scale": 2.0, "reward_shift": -1.0}, {(2, 8): 1.0, (2, 6): -1.9 + 0.81}),
        ({"chunk_reward": "max"}, {(2, 1): 0.25, (2, 5): 1.0, (2, 4): 0.0}),
        ({"chunk_reward": "any"}, {(2, 1): 1.0, (2, 5): 1.0, (2, 4): 0.0}),
        ({"chunk_reward": "any", "reward_shift": -1.0}, {(2, 1): 0.0, (2, 4): -1.0}),
        ({"reward_key": "info.near"}, {(2, 0): 0.81 + 0.729, (2, 8): 1.0}),
        ({"reward_key": "next.success"}, {(2, 1): 0.0, (2, 8): 1.0}),
    ],
)
def test_rewards(plain, options, expected):
    raw, batch = everything(opened(plain, **options))
    found = dict(zip(map(tuple, raw.tolist()), batch.rewards.tolist(), strict=True))
    for place, reward in expected.items():
        assert found[place] == pytest.approx(reward, abs=1e-6)


@pytest.mark.parametrize(
    ("terminals", "ended"),
    [("auto", WON), ("success", WON), ("reward", WON), ("always", range(6)), ("never", ())],
)
def test_how_episodes_end(plain, terminals, ended):
    found = opened(plain, terminals=terminals)
    raw, batch = everything(found)
    over = (batch.discounts == 0) & batch.has_next
    assert set(raw[over][:, 0]) == set(ended)
    assert f"in {len(ended)} episodes the task ended" in found.describe()[1]
    # The last frame of an episode that stopped can be imitated, no more.
    assert (~batch.has_next).sum() == len(LENGTHS) - len(ended)
    assert not batch.action_is_pad[~batch.has_next][:, 0].any()


def test_rlvlas_rule(plain):
    found = opened(plain, terminals="rlvla", chunk_reward="max")
    raw, batch = everything(found)
    expected = [(e, t) for e, n in enumerate(LENGTHS) for t in range(n - HORIZON + 1)]
    np.testing.assert_array_equal(raw, expected)
    done = [t + HORIZON >= LENGTHS[e] - 1 for e, t in expected]
    np.testing.assert_array_equal(batch.discounts == 0, done)
    np.testing.assert_allclose(batch.discounts[~np.array(done)], DISCOUNT**HORIZON, rtol=1e-6)
    assert not batch.action_is_pad.any()
    assert "in 6 episodes the task ended (with every last frame), 0" in found.describe()[1]


def test_whole_chunks_alone(plain):
    raw, _ = everything(opened(plain, tails="drop"))
    assert raw.tolist() == [[e, t] for e, n in enumerate(LENGTHS) for t in range(n - HORIZON + 1)]


def test_frames_that_begin_no_chunk(tmp_path):
    def marked(number, value):
        return {"is_kept": np.arange(len(value["action"])) % 2 == 0}

    found = opened(write(tmp_path / "marked", change=marked))
    raw, batch = everything(found)
    assert (raw[:, 1] % 2 == 0).all()
    assert len(raw) == sum(-(-n // 2) for n in LENGTHS)
    following = whose(found, batch.next_observation)
    assert (following[:, 1] % 2 == 1).any()


class Fake:
    """Proposals that tell the frame that they are for."""

    def __init__(self, count):
        self.count = count

    def get(self, frames):
        shape = (len(frames), self.count, HORIZON, ACTION)
        return np.broadcast_to(frames[:, None, None, None], shape).astype(np.float64)


def test_proposals(plain, capsys):
    found = opened(plain, data={"held_out": 0.34})
    before = found.batch(0, 8)
    found.propose([Fake(3)])
    batch = found.batch(0, 8)
    assert batch.candidates.shape == (8, 3, HORIZON, ACTION)
    assert batch.candidates.dtype == np.float32
    raw = whose(found, batch.observation)
    numbers = (np.cumsum(LENGTHS) - LENGTHS)[raw[:, 0]] + raw[:, 1]
    np.testing.assert_array_equal(batch.candidates[:, 2, 1, 0], numbers)
    np.testing.assert_array_equal(batch.actions, before.actions)
    assert found.held_out_batch(4).candidates.shape == (4, 3, HORIZON, ACTION)
    assert "WARNING" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="proposals for each of the 1 datasets, got 2"):
        found.propose([Fake(1), Fake(1)])


def test_a_policys_chunks_in_place_of_the_datasets(plain, capsys):
    found, demonstrated = opened(plain, chunk_source="policy"), opened(plain).batch(0, 8)
    with pytest.raises(ValueError, match="no policy proposes chunks: name its checkpoint"):
        found.batch(0, 8)
    found.propose([Fake(2)])
    told = capsys.readouterr().out
    assert "WARNING: chunks are a policy's" in told
    assert "is that of the demonstrated ones" in told
    batch = found.batch(0, 8)
    raw = whose(found, batch.observation)
    numbers = (np.cumsum(LENGTHS) - LENGTHS)[raw[:, 0]] + raw[:, 1]
    np.testing.assert_array_equal(batch.actions[:, 0, 0], numbers)
    assert not batch.action_is_pad.any()
    assert batch.candidates is None
    np.testing.assert_array_equal(batch.rewards, demonstrated.rewards)


def test_sub_goals_that_were_labelled(plain, tmp_path):
    request = edit_dataset.Request(reward="info.near>=1,next.success>=1", feature="subgoal")
    edit_dataset.run("label_rewards", [plain], tmp_path / "goals", request)
    found = opened(tmp_path / "goals", reward_key="subgoal", chunk_reward="any", tails="drop")
    raw, batch = everything(found)
    earned = [
        t <= 2 < t + HORIZON or (e in WON and t + HORIZON == LENGTHS[e]) for e, t in raw.tolist()
    ]
    np.testing.assert_array_equal(batch.rewards, earned)
    assert found.parts[0].where.endswith("'subgoal'")


def test_cloning_needs_no_rewards(tmp_path):
    path = write(tmp_path / "bare", without=("next.reward", "next.success"))
    found = opened(path, algorithm="cloning")
    assert found.num_chunks == sum(LENGTHS)
    assert not found.batch(0, 8).rewards.any()


def test_ogbench(tmp_path):
    """One file of single-task rewards; the last frame of an episode is only seen."""
    lengths, rng = (6, 8), np.random.default_rng(0)
    rows = sum(n + 1 for n in lengths)
    frame = np.concatenate([np.arange(n + 1) for n in lengths])
    number = np.repeat([0, 1], [n + 1 for n in lengths])
    won = (number == 1) & (frame == 5)
    arrays = {
        "observations": np.stack([frame, number, rng.normal(size=rows)], 1).astype(np.float32),
        "actions": rng.uniform(-1, 1, (rows, ACTION)).astype(np.float32),
        "terminals": np.isin(np.arange(rows), np.cumsum(np.array(lengths) + 1) - 1),
        "rewards": won - 1.0,
        "masks": 1.0 - won,
    }
    np.savez_compressed(tmp_path / "cube.npz", **arrays)
    opened(tmp_path / "cube.npz", data={"normalization": "bounds"}, algorithm="qc_fql")
    found = opened(tmp_path / "cube.npz")
    raw, batch = everything(found)
    assert raw.tolist() == [[e, t] for e, n in enumerate(lengths) for t in range(n)]
    assert batch.has_next.all()
    np.testing.assert_array_equal(np.flatnonzero(batch.discounts == 0), 6 + np.arange(2, 6))
    row = 6 + 6  # after the task had ended, and before the episode did
    assert batch.discounts[row] == pytest.approx(DISCOUNT**2)
    assert whose(found, batch.next_observation)[row].tolist() == [1, 8]
    assert "in 1 episodes the task ended (as 'masks' says), 1 stopped" in found.describe()[1]
    for name in ("rewards", "masks"):
        del arrays[name]
    np.savez_compressed(tmp_path / "play.npz", **arrays)
    with pytest.raises(ValueError, match=r"play.npz has no rewards.* the package ogbench, whose"):
        opened(tmp_path / "play.npz")


def test_rlds():
    path = RLDS / "bridge_tiny"
    learner = settings(proprio_dim=7, action_dim=7)
    found = opened(path, learner=learner, data={"fps": 5})
    assert found.parts[0].where.endswith("'reward'")
    assert "as 'is_terminal' says" in found.describe()[1]
    batch = found.batch(0, found.num_chunks)
    dataset = found.sources[0].dataset
    assert found.num_chunks == dataset.num_frames
    ended = dataset.column("is_terminal")
    assert (batch.discounts == 0).any() == ended.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"terminals": "done"},
            r"config.offline_rl.terminals is 'done'; expected one of \['auto', 'succ",
        ),
        ({"tails": "cut"}, r"config.offline_rl.tails is 'cut'; expected one of"),
        ({"chunk_reward": "mean"}, r"config.offline_rl.chunk_reward is 'mean'; expected one of"),
        ({"chunk_source": "pi0"}, r"config.offline_rl.chunk_source is 'pi0'; expected one of"),
        ({"discount": 2.0}, "config.offline_rl.discount is 2.0; expected 0 to 1"),
        (
            {"reward_scale": np.inf},
            "config.offline_rl.reward_scale is inf; expected a finite number",
        ),
        ({"seed": -1}, "config.offline_rl.seed is -1"),
        ({"reward_key": "reward"}, "has no 'reward'"),
        (
            {"reward_key": "action"},
            r"'action' is float32 \[2\]; one number a frame is needed, as a",
        ),
        ({"reward_scale": 0.0}, "every reward of the training episodes is 0, .*label_rewards"),
    ],
)
def test_what_cannot_be(plain, options, message):
    with pytest.raises(ValueError, match=message) as told:
        opened(plain, **options)
    assert "\n" not in str(told.value)


def test_no_rewards(tmp_path):
    path = write(tmp_path / "bare", without=("next.reward", "next.success"))
    with pytest.raises(ValueError, match=r"reward_key, of \['info.near', 'speed'.*label_rewards"):
        opened(path)


def test_a_reward_that_is_no_number(plain, tmp_path, monkeypatch):
    true = transitions.label_rewards.recorded

    def damaged(*args):
        name, values = true(*args)
        values = values.copy()
        values[LENGTHS[0] + 2] = np.nan
        return name, values

    monkeypatch.setattr(transitions.label_rewards, "recorded", damaged)
    message = "'next.reward' is not finite in the 4 frames from frame [02] of episode 1 on"
    with pytest.raises(ValueError, match=message):
        opened(plain, terminals="always")


def test_chunks_longer_than_every_episode(plain, capsys):
    long = settings(action_horizon=13)
    for options in ({"tails": "drop"}, {"terminals": "rlvla"}):
        with pytest.raises(
            ValueError, match="no training episode has 13 frames.*the longest 12.*, and wh"
        ):
            opened(plain, learner=long, **options)
    assert opened(plain, learner=long).num_chunks == sum(LENGTHS)
    told = capsys.readouterr().out
    assert (
        "reach: no training episode has 13 frames, as a chunk has actions (the longest 12)" in told
    )
    assert "WARNING: " in told


@pytest.mark.parametrize("algorithm", ["qc", "qc_fql"])
def test_actions_that_a_flow_cannot_reach(plain, algorithm):
    message = f"reach: normalised actions .*{algorithm} clips .* config.data.normalization=bounds"
    with pytest.raises(ValueError, match=message):
        opened(plain, algorithm=algorithm)
    opened(plain, algorithm=algorithm, data={"normalization": "bounds"})


def test_nothing_to_train_on(plain, tmp_path):
    stats = opened(plain).norm_stats["reach"]
    assets.write_norm_stats(tmp_path / "norm_stats.json", stats)
    data = {"held_out": 1.0, "norm_stats": str(tmp_path / "norm_stats.json")}
    with pytest.raises(ValueError, match="config.data.held_out is 1, which keeps every episode"):
        opened(plain, data=data)


def test_data_that_changed_are_told_without_the_fields_of_imitation(plain, tmp_path):
    found, other = opened(plain), write(tmp_path / "other", numbers=range(3))
    ((asset_id, stats),) = found.norm_stats.items()
    step = tmp_path / "run" / "4"
    (step / "params").mkdir(parents=True)
    (step / "params" / "_METADATA").write_text("{}")
    assets.write_norm_stats(step / "assets" / asset_id / assets.NORM_STATS, stats)
    assets.write_episodes(step / "assets" / asset_id / assets.EPISODES, found.trainings())
    config = configured(other)
    config.data.asset_id = asset_id
    with pytest.raises(ValueError, match="content changed.*checkpoint \\(init_from\\)") as told:
        transitions.Transitions(config, settings(), resumed=step)
    assert "config.train" not in str(told.value)


def test_a_mixture_is_of_several_robots(plain):
    with pytest.raises(ValueError, match="mixture is 'bridge', of several robots"):
        opened(plain, data={"mixture": "bridge"})


def test_a_robot_with_more_numbers_than_the_policy(plain):
    message = "'state' of .* has 3 dimensions, the model's proprio_dim is 2"
    with pytest.raises(ValueError, match=message):
        opened(plain, learner=dataclasses.replace(settings(), proprio_dim=2))


def test_norm_stats_of_where_imitation_starts_are_not_those(plain):
    config = configured(plain)
    config.train.init_from = "gs://nowhere/params"
    found = transitions.Transitions(config, settings())
    assert found.norm_stats_from == pipeline._OWN
    assert list(found.norm_stats) == [plain.name]
    assert config.train.init_from == "gs://nowhere/params"
