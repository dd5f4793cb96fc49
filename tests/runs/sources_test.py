"""One dataset or several: shares of a batch, the order of examples, pictures, what is recorded."""

import json
import pathlib
import types

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from configs import pi0_state
from policymix.checkpoints import assets
from policymix.data import lerobot, writer
from policymix.runs import pipeline, policies, sources, train

IMAGE = {"dtype": "image", "shape": [28, 28, 3], "names": ["height", "width", "channels"]}


def vector(size):
    return {"dtype": "float32", "shape": [size], "names": None}


def write(path, number, lengths, *, state=2, action=2, image=None) -> str:
    """A dataset whose frames say where they are from: state [number, frame, 0…]; so do pictures."""
    features = {"observation.state": vector(state), "action": vector(action)}
    if image:
        features["top"] = IMAGE | {"shape": [*image, 3]}
    first = 0
    with writer.Writer(path, fps=10, features=features) as opened:
        for length in lengths:
            frames = np.arange(first, first + length)
            arrays = {"observation.state": np.zeros((length, state), np.float32)}
            arrays["observation.state"][:, :2] = np.stack([np.full(length, number), frames], axis=1)
            arrays["action"] = np.tile(frames[:, None], action).astype(np.float32)
            if image:
                arrays["top"] = picture(number, frames, image)
            opened.add_episode(arrays, f"task {number}")
            first += length
    return str(path)


def picture(number, frames, image=(28, 28)):
    """uint8 [t, hh, ww, 3]: a gradient that depends on the dataset and the frame."""
    pixels = np.arange(image[0] * image[1] * 3).reshape(*image, 3)
    return ((pixels[None] + 17 * np.asarray(frames)[:, None, None, None] + number) % 251).astype(
        np.uint8
    )


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    return write(root / "a", 1, (7, 5)), write(root / "b", 2, (9, 9, 6))


def config_of(*chosen, **data):
    config = pi0_state.get_config("debug")
    config.data.update({"path": ",".join(chosen), "held_out": 0.0} | data)
    return config


def pipeline_of(config, resumed=None):
    return pipeline.Pipeline(config, policies.model_config(config, why="the test"), resumed)


def open_sources(*chosen):
    data = config_of(*chosen).data
    return [sources.Source(path, data, 4, {}) for path in chosen]


# Shares of a batch


def counted(*sizes):
    """As many sources as there are sizes, of which only the number of frames is known."""
    return [
        types.SimpleNamespace(train=range(n), dataset=types.SimpleNamespace(path=f"d{k}"))
        for k, n in enumerate(sizes)
    ]


@hypothesis.given(
    st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.integers(1, 300), st.booleans()
)
def test_shares_sum_to_the_batch_and_lie_within_one_of_the_fractions(weights, batch, by_frames):
    frames = [max(1, round(w)) for w in weights]
    fractions = () if by_frames else weights
    exact = np.array(frames if by_frames else weights)
    exact = exact / exact.sum() * batch
    try:
        found = sources.shares(counted(*frames), fractions, batch)
    except ValueError:
        assert exact.min() < 1.5
        return
    assert sum(found) == batch
    assert min(found) >= 1
    assert np.abs(np.array(found) - exact).max() <= 1 + 1e-9


def test_known_shares():
    assert sources.shares(counted(5, 5, 5), (1, 1, 2), 64) == [16, 16, 32]
    assert sources.shares(counted(30, 10), (), 8) == [6, 2]
    assert sources.shares(counted(30, 10), (0.5, 0.5), 8) == [4, 4]
    assert sources.shares(counted(1), (), 8) == [8]


@pytest.mark.parametrize(
    ("fractions", "batch", "message"),
    [
        ((0.5,), 8, "expected a positive number for each of the 2 datasets"),
        ((0.5, 0.3, 0.2), 8, "expected a positive number for each of the 2 datasets"),
        ((1.0, 0.0), 8, r"fractions is \(1.0, 0.0\); expected a positive"),
        ((1.0, -1.0), 8, "expected a positive"),
        ((0.99, 0.01), 8, r"of a batch of 8, the datasets \['d0', 'd1'\] get \[8, 0\] examples"),
        ((), 1, r"get \[1, 0\] examples: raise config.train.batch_size"),
    ],
)
def test_shares_that_cannot_be_are_refused(fractions, batch, message):
    with pytest.raises(ValueError, match=message):
        sources.shares(counted(30, 20), fractions, batch)


def test_training_refuses_such_shares_before_it_starts(paths, tmp_path):
    config = config_of(*paths, fractions=(0.95, 0.05))
    with pytest.raises(ValueError, match=r"get \[4, 0\] examples"):
        train.train(config, tmp_path / "run", devices=jax.devices()[:1], dry_run=True)


# The order of examples


def origins(raw):
    """[(dataset, frame)] of a drawn batch."""
    return [(int(n), int(frame)) for n, frame in raw["state"][:, :2]]


def test_a_batch_has_the_counts_asked_for_and_is_whole(paths):
    both = open_sources(*paths)
    raw = sources.draw(both, [3, 5], seed=7, step=2)
    assert [n for n, _ in origins(raw)] == [1, 1, 1, 2, 2, 2, 2, 2]
    assert raw["prompt"] == ["task 1"] * 3 + ["task 2"] * 5
    assert raw["actions"].shape == (8, 4, 2)
    np.testing.assert_array_equal(raw["actions"][:, 0, 0], raw["state"][:, 1])


def test_a_batch_is_a_function_of_seed_and_step(paths):
    both = open_sources(*paths)
    drawn = {
        (seed, step): origins(sources.draw(both, [3, 5], seed, step))
        for seed in (0, 1)
        for step in range(4)
    }
    again = {key: origins(sources.draw(open_sources(*paths), [3, 5], *key)) for key in drawn}
    assert drawn == again
    assert len(set(map(tuple, drawn.values()))) == 8


def test_the_first_datasets_order_does_not_depend_on_a_second(paths):
    both, first = open_sources(*paths), open_sources(paths[0])
    for step in range(9):
        mixed = origins(sources.draw(both, [3, 5], 4, step))
        assert mixed[:3] == origins(sources.draw(first, [3], 4, step))


def test_every_frame_of_each_comes_once_in_an_epoch_of_its_own(paths):
    both = open_sources(*paths)
    drawn = [origins(sources.draw(both, [3, 4], 0, step)) for step in range(6)]
    ones = [o for batch in drawn[:4] for o in batch[:3]]
    twos = [o for batch in drawn for o in batch[3:]]
    assert sorted(ones) == [(1, frame) for frame in range(12)]
    assert sorted(twos) == [(2, frame) for frame in range(24)]


def test_equal_datasets_are_not_drawn_in_step(paths):
    twins = open_sources(paths[0], paths[0])
    drawn = origins(sources.draw(twins, [12, 12], 0, 0))
    assert sorted(drawn[:12]) == sorted(drawn[12:])
    assert drawn[:12] != drawn[12:]


def test_batches_of_the_pipeline_follow_the_fractions(paths, tmp_path):
    stats = {"mean": [0, 0], "std": [1, 1]}
    path = tmp_path / "norm_stats.json"
    path.write_text(json.dumps({"norm_stats": {"state": stats, "actions": stats}}))
    config = config_of(*paths, fractions=(1, 3), norm_stats=str(path))
    made = pipeline_of(config)
    batch = made.batch(3, 8)
    proprio = np.rint(batch.observation.proprio[:, :2])
    assert proprio[:, 0].tolist() == [1, 1, 2, 2, 2, 2, 2, 2]
    expected = sources.draw(made.sources, [2, 6], config.train.seed, 3)
    np.testing.assert_array_equal(proprio, expected["state"])
    assert len(set(map(tuple, batch.observation.prompt_tokens.tolist()))) == 2


def test_statistics_are_of_all_datasets_together(paths):
    made = pipeline_of(config_of(*paths))
    states = np.concatenate([source.train.all_states for source in made.sources])
    np.testing.assert_allclose(made.norm_stats["state"].mean, states.mean(axis=0), rtol=1e-6)
    assert made.asset_id == "a"
    assert made.norm_stats_from == "the training episodes"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"state": 3}, r"'state' has the shape \[2\] in .*/a and \[3\] in .*/c: .*one robot"),
        ({"action": 1}, r"'actions' has the shape \[4, 2\] in .*/a and \[4, 1\] in .*/c"),
    ],
)
def test_datasets_of_different_robots_are_refused(paths, tmp_path, other, message):
    config = config_of(paths[0], write(tmp_path / "c", 3, (4,), **other))
    config.model.action_horizon = 4
    with pytest.raises(ValueError, match=message):
        pipeline_of(config)


# What is recorded, and resuming


@pytest.fixture
def mixture(tmp_path):
    """A run of one step on two datasets of its own: (config, its directory, the second dataset)."""
    chosen = [write(tmp_path / name, k, (7, 5)) for k, name in enumerate("ab")]
    config = config_of(*chosen, fractions=(0.5, 0.5))
    config.train.update({"num_steps": 1, "ema_decay": 0.0})
    train.train(config, tmp_path / "run", devices=jax.devices()[:1])
    return config, tmp_path / "run", pathlib.Path(chosen[1])


def test_a_mixture_is_recorded_and_a_change_of_either_part_is_refused(mixture):
    config, workdir, second = mixture
    known = assets.trainings_of(workdir / "1")
    assert [entry["path"] for entry in known] == config.data.path.split(",")
    assert [entry["episodes"] for entry in known] == [[0, 1], [0, 1]]
    assert [entry["fingerprint"] for entry in known] == [
        lerobot.open_dataset(path).fingerprint() for path in config.data.path.split(",")
    ]
    info = second / "meta" / "info.json"
    whole = info.read_text()
    info.write_text(json.dumps(json.loads(whole) | {"robot_type": "another"}))
    config.train.num_steps = 2
    with pytest.raises(ValueError, match=r"/b is not what .*/run/1 was trained on .*changed"):
        train.train(config, workdir, devices=jax.devices()[:1])
    info.write_text(whole)
    state = train.train(config, workdir, devices=jax.devices()[:1])
    assert int(state.step) == 2


def test_no_part_of_a_mixture_is_written_into(paths):
    inside = pathlib.Path(paths[1]) / "run"
    with pytest.raises(ValueError, match="/run overlaps the input .*/b"):
        train.train(config_of(*paths), inside, devices=jax.devices()[:1], dry_run=True)


# Everything held out


def test_everything_held_out_is_for_validation_and_not_to_train_on(paths, tmp_path):
    stats = tmp_path / "norm_stats.json"
    entry = {"mean": [0, 0], "std": [1, 1]}
    stats.write_text(json.dumps({"norm_stats": {"state": entry, "actions": entry}}))
    config = config_of(paths[1], held_out=1, norm_stats=str(stats))
    made = pipeline_of(config)
    assert made.sources[0].held_out_episodes == [0, 1, 2]
    assert made.sources[0].train_episodes == []
    selection, report = made.validation(batch_size=3, num_batches=50, held_out=0.34)
    frames = [np.rint(b.observation.proprio[:, 1]).tolist() for b in (*selection, *report)]
    assert sorted(np.concatenate(frames).tolist()) == list(range(24))
    assert {f for part in frames[: len(selection)] for f in part} == set(range(18))
    with pytest.raises(ValueError, match="held_out is 1, .*nothing is left to train on"):
        made.check_trains(4)
    with pytest.raises(ValueError, match="nothing is left to train on"):
        train.train(config, tmp_path / "run", devices=jax.devices()[:1])


def test_statistics_need_something_to_train_on(paths):
    with pytest.raises(ValueError, match="no training episodes to take statistics from: name them"):
        pipeline_of(config_of(paths[0], held_out=1))


# Pictures


def pictured(*chosen, image=(28, 28)):
    config = config_of(*chosen, cameras={"base": "top"})
    config.model.update({"image_keys": ("base",), "image_resolution": image})
    return config


def test_pictures_are_those_of_the_frames_drawn(tmp_path):
    chosen = [write(tmp_path / n, k, (6, 5), image=(28, 28)) for k, n in enumerate("ab")]
    made = pipeline_of(pictured(*chosen))
    for step in range(3):
        images = made.batch(step, 4).observation.images
        counts = sources.shares(made.sources, (), 4)
        origin = origins(sources.draw(made.sources, counts, 42, step))
        expected = [picture(number, [frame])[0] for number, frame in origin]
        np.testing.assert_array_equal(images["base"], expected)
        assert len({frame for _, frame in origin}) > 1


def test_pictures_of_held_out_frames_are_theirs_too(tmp_path):
    config = pictured(write(tmp_path / "a", 1, (6, 5, 4), image=(28, 28)))
    config.data.held_out = 0.5
    made = pipeline_of(config)
    ((batch,), _) = made.validation(batch_size=4, num_batches=1, held_out=0.0)
    stats = made.norm_stats["state"]
    frames = np.rint(batch.observation.proprio[:, 1] * (stats.std[1] + 1e-6) + stats.mean[1])
    np.testing.assert_array_equal(batch.observation.images["base"], picture(1, frames.astype(int)))


def test_pictures_of_two_sizes_are_no_mixture(tmp_path):
    chosen = [write(tmp_path / f"{n}", n, (4,), image=(n, n)) for n in (28, 30)]
    with pytest.raises(ValueError, match=r"'base' has the shape \[28, 28, 3\] .* \[30, 30, 3\]"):
        pipeline_of(pictured(*chosen))


def test_a_camera_that_the_dataset_lacks_is_named(paths):
    with pytest.raises(ValueError, match=r"/a has no 'top'"):
        pipeline_of(pictured(paths[0]))
