"""One dataset or several: shares of a batch, the order of examples, pictures, what is recorded."""

import json
import math
import pathlib
import shutil

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs import pi0_state
from policymix.checkpoints import assets
from policymix.data import lerobot, writer
from policymix.runs import metadata, pipeline, policies, sources, train
from policymix.transforms import images

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


def counts(fractions, batch_size, step):
    before, after = (sources.drawn_before(fractions, batch_size, step + k) for k in (0, 1))
    return (after - before).tolist()


@hypothesis.given(
    st.lists(st.floats(0.01, 100), min_size=1, max_size=5),
    st.integers(1, 300),
    st.integers(0, 10**6),
)
def test_counts_sum_to_the_batch_and_come_out_right_over_the_steps(weights, batch, step):
    fractions = np.array(weights) / np.sum(weights)
    exact = fractions * batch
    found = np.array(counts(fractions, batch, step))
    assert found.sum() == batch
    assert (found >= 0).all()
    assert np.abs(found - exact).max() < 1 + 1e-6
    drawn = sources.drawn_before(fractions, batch, step)
    assert drawn.sum() == step * batch
    assert np.abs(drawn - step * exact).max() < 2 + math.log2(step + 1) + 1e-6 * step


@hypothesis.given(st.floats(0, 1), st.integers(0, 300))
def test_points_are_counted(x, count):
    points = [int(f"{k:b}"[::-1], 2) / (1 << k.bit_length()) for k in range(count)]
    assert sources._points_below(x, count) == sum(point < x for point in points)


def test_known_counts():
    def three(fractions, batch_size):
        return [counts(np.array(fractions), batch_size, k) for k in range(3)]

    assert three([0.25, 0.25, 0.5], 64) == [[16, 16, 32]] * 3
    assert three([0.75, 0.25], 8) == [[6, 2]] * 3
    assert three([1], 8) == [[8]] * 3
    assert three([0.5, 0.5], 1) == [[0, 1], [1, 0], [0, 1]]


def test_a_small_share_still_goes_through_its_dataset_epoch_by_epoch(paths):
    opened, fractions = open_sources(*paths), np.array([0.9, 0.1])
    drawn = [sources.draw(opened, fractions, 4, 7, step) for step in range(120)]
    frames = [int(f) for batch in drawn if 1 in batch for f in batch[1]["state"][:, 1]]
    assert len(frames) == pytest.approx(48, abs=2)
    assert sorted(frames[:24]) == list(range(24))


def test_fractions_are_normalised_and_go_by_frames_where_none_are_given():
    def fractions(given, frames):
        return metadata.fractions(config_of("a", fractions=given).data, frames).tolist()

    assert fractions((1, 1, 2), [5, 5, 5]) == [0.25, 0.25, 0.5]
    assert fractions((), [30, 10]) == [0.75, 0.25]


@pytest.mark.parametrize(
    "given", [(0.5,), (0.5, 0.3, 0.2), (1.0, 0.0), (1.0, -1.0), (math.inf, 1.0)]
)
def test_fractions_that_cannot_be_are_refused(given, paths, tmp_path):
    message = "expected a positive number for each of the 2 datasets"
    with pytest.raises(ValueError, match=message):
        metadata.fractions(config_of("a", fractions=given).data, [30, 20])
    config = config_of(*paths, fractions=given)
    with pytest.raises(ValueError, match=message):
        train.train(config, tmp_path / "run", devices=jax.devices()[:1], dry_run=True)


# The order of examples


def drawn_from(opened, counts, seed, step, rows=slice(None)):
    """A drawn batch, of which so many are from each dataset."""
    fractions = np.array(counts) / np.sum(counts)
    return sources.draw(opened, fractions, sum(counts), seed, step, rows)


def origins(drawn):
    """[(dataset, frame)] of a drawn batch."""
    return [(int(n), int(f)) for raw in drawn.values() for n, f in raw["state"][:, :2]]


def test_a_batch_has_the_counts_asked_for_and_is_whole(paths):
    both = open_sources(*paths)
    drawn = drawn_from(both, [3, 5], seed=7, step=2)
    assert [n for n, _ in origins(drawn)] == [1, 1, 1, 2, 2, 2, 2, 2]
    assert [raw["prompt"] for raw in drawn.values()] == [["task 1"] * 3, ["task 2"] * 5]
    assert [raw["actions"].shape for raw in drawn.values()] == [(3, 4, 2), (5, 4, 2)]
    for raw in drawn.values():
        np.testing.assert_array_equal(raw["actions"][:, 0, 0], raw["state"][:, 1])


@pytest.mark.parametrize("count", [2, 4])
def test_rows_of_all_processes_are_the_batch(paths, count):
    both = open_sources(*paths)
    whole = origins(drawn_from(both, [3, 5], 7, 2))
    size = 8 // count
    rows = [slice(k * size, (k + 1) * size) for k in range(count)]
    assert [o for part in rows for o in origins(drawn_from(both, [3, 5], 7, 2, part))] == whole


def test_a_pipelines_shards_are_its_batches_made_ahead(paths):
    made = pipeline_of(config_of(*paths))
    whole = [made.batch(step, 8) for step in range(2, 7)]
    shards = [list(made.batches(2, 7, 8, (index, 2))) for index in range(2)]
    for k, batch in enumerate(whole):
        joined = jax.tree.map(lambda *x: np.concatenate(x), *(shard[k] for shard in shards))
        jax.tree.map(np.testing.assert_array_equal, joined, batch)
    with pytest.raises(ValueError, match="a batch of 8 cannot be shared equally by 3 processes"):
        made.batches(2, 7, 8, (0, 3))


@pytest.mark.slow
def test_processes_make_the_batches_that_threads_make(paths):
    config = config_of(*paths, num_processes=2)
    made, plain = pipeline_of(config), pipeline_of(config_of(*paths))
    for k, batch in enumerate(made.batches(0, 6, 8)):
        jax.tree.map(np.testing.assert_array_equal, batch, plain.batch(k, 8))


def test_a_batch_is_a_function_of_seed_and_step(paths):
    both = open_sources(*paths)
    drawn = {
        (seed, step): origins(drawn_from(both, [3, 5], seed, step))
        for seed in (0, 1)
        for step in range(4)
    }
    again = {key: origins(drawn_from(open_sources(*paths), [3, 5], *key)) for key in drawn}
    assert drawn == again
    assert len(set(map(tuple, drawn.values()))) == 8


def test_the_first_datasets_order_does_not_depend_on_a_second(paths):
    both, first = open_sources(*paths), open_sources(paths[0])
    for step in range(9):
        mixed = origins(drawn_from(both, [3, 5], 4, step))
        assert mixed[:3] == origins(drawn_from(first, [3], 4, step))


def test_every_frame_of_each_comes_once_in_an_epoch_of_its_own(paths):
    both = open_sources(*paths)
    drawn = [origins(drawn_from(both, [3, 4], 0, step)) for step in range(6)]
    ones = [o for batch in drawn[:4] for o in batch[:3]]
    twos = [o for batch in drawn for o in batch[3:]]
    assert sorted(ones) == [(1, frame) for frame in range(12)]
    assert sorted(twos) == [(2, frame) for frame in range(24)]


def test_equal_datasets_are_not_drawn_in_step(paths):
    twins = open_sources(paths[0], paths[0])
    drawn = origins(drawn_from(twins, [12, 12], 0, 0))
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
    expected = drawn_from(made.sources, [2, 6], config.train.seed, 3)
    assert list(map(tuple, proprio.tolist())) == origins(expected)
    assert len(set(map(tuple, batch.observation.prompt_tokens.tolist()))) == 2


def test_statistics_are_of_all_datasets_together(paths):
    made = pipeline_of(config_of(*paths))
    states = np.concatenate([source.train.frame_values()["state"] for source in made.sources])
    ((name, stats),) = made.norm_stats.items()
    np.testing.assert_allclose(stats["state"].mean, states.mean(axis=0), rtol=1e-6)
    assert name == "a"
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
        made.check_trains()
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
        found = made.batch(step, 4).observation.images
        origin = origins(sources.draw(made.sources, np.full(2, 0.5), 4, 42, step))
        expected = [picture(number, [frame])[0] for number, frame in origin]
        np.testing.assert_array_equal(found["base"], expected)
        assert len({frame for _, frame in origin}) > 1


def test_pictures_of_held_out_frames_are_theirs_too(tmp_path):
    config = pictured(write(tmp_path / "a", 1, (6, 5, 4), image=(28, 28)))
    config.data.held_out = 0.5
    made = pipeline_of(config)
    ((batch,), _) = made.validation(batch_size=4, num_batches=1, held_out=0.0)
    stats = made.norm_stats["a"]["state"]
    frames = np.rint(batch.observation.proprio[:, 1] * (stats.std[1] + 1e-6) + stats.mean[1])
    np.testing.assert_array_equal(batch.observation.images["base"], picture(1, frames.astype(int)))


def test_pictures_of_two_sizes_are_one_mixture(tmp_path):
    """All are brought to the model's size, kept decoded or not."""
    chosen = [write(tmp_path / f"{n}", n, (4,), image=(n, n)) for n in (28, 30)]
    for cache_mb in (0, 100):
        config = pictured(*chosen)
        config.data.cache_mb = cache_mb
        made = pipeline_of(config)
        found = next(made.batches(0, 1, 4)).observation.images["base"]
        assert [bool(source._kept) for source in made.sources] == [cache_mb > 0] * 2
        drawn = sources.draw(made.sources, np.full(2, 0.5), 4, 42, 0)
        for row, (number, frame) in zip(found, origins(drawn), strict=True):
            raw = picture(number, [frame], (number, number))[0]
            np.testing.assert_array_equal(row, images.resize_with_pad(raw, 28, 28))


def test_a_camera_that_the_dataset_lacks_is_named(paths):
    with pytest.raises(ValueError, match=r"/a has no 'top'"):
        pipeline_of(pictured(paths[0]))


# Episodes that cannot be used


@pytest.fixture
def damaged(paths, tmp_path):
    """A dataset whose second episode of three has a state that is no number."""
    path = tmp_path / "damaged"
    shutil.copytree(paths[1], path)
    file = path / "data/chunk-000/file-000.parquet"
    table = pq.read_table(file)
    states = np.array(table["observation.state"].to_pylist(), np.float32)
    states[12, 1] = np.nan
    column = pa.FixedSizeListArray.from_arrays(pa.array(states.ravel()), 2)
    names = table.column_names
    pq.write_table(
        table.set_column(names.index("observation.state"), "observation.state", column), file
    )
    return str(path)


def test_bad_episodes_are_named_and_counted(damaged):
    message = r"/damaged: 1 of 3 episodes cannot be used; episode 1: .*--config.data.skip_bad_ep"
    with pytest.raises(ValueError, match=message):
        pipeline_of(config_of(damaged))


def test_bad_episodes_are_left_out_when_asked_and_no_other_moves(damaged, paths, capsys):
    made = pipeline_of(config_of(damaged, skip_bad_episodes=True, held_out=0.3))
    assert "/damaged: episode 1 is left out: " in capsys.readouterr().out
    whole = pipeline_of(config_of(paths[1], held_out=0.3))
    (source,), (other,) = made.sources, whole.sources
    assert list(source.left_out) == [1]
    assert source.train_episodes == [n for n in other.train_episodes if n != 1]
    assert source.held_out_episodes == [n for n in other.held_out_episodes if n != 1]
    assert np.isfinite(made.batch(0, 8).observation.proprio).all()
    assert source.training()["episodes"] == source.train_episodes


def test_rates_that_differ_are_refused(paths):
    with pytest.raises(ValueError, match="/a has 10 frames per second, expected 20"):
        pipeline_of(config_of(paths[0], fps=20))


def test_training_selection_and_report_share_no_episode(tmp_path):
    config = config_of(write(tmp_path / "a", 1, (4,) * 10), held_out=0.4, seed=3)
    made = pipeline_of(config)
    (source,) = made.sources
    selection, report = made.validation(batch_size=2, num_batches=8, held_out=0.5)
    stats = made.norm_stats["a"]["state"]

    def episodes(batches):
        frames = [
            b.observation.proprio[:, 1] * (stats.std[1] + 1e-6) + stats.mean[1] for b in batches
        ]
        return {round(f) // 4 for f in np.concatenate(frames).tolist()}

    parts = [set(source.train_episodes), episodes(selection), episodes(report)]
    assert set.union(*parts) == set(range(10))
    assert sum(map(len, parts)) == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_threads": -1}, "config.data.num_threads is -1; it may not be negative"),
        ({"num_processes": -1}, "config.data.num_processes is -1"),
        ({"cache_mb": -1}, "config.data.cache_mb is -1"),
        ({"seed": -1}, "config.data.seed is -1"),
        ({"held_out": 1.5}, "config.data.held_out is 1.5; expected a fraction, 0 to 1"),
    ],
)
def test_numbers_that_no_run_can_have(paths, settings, message):
    with pytest.raises(ValueError, match=message):
        pipeline_of(config_of(paths[0], **settings))


@pytest.mark.parametrize("held_out", [-0.1, 1.0])
def test_validation_refuses_what_cannot_be_held_out(paths, held_out):
    made = pipeline_of(config_of(paths[1], held_out=0.5))
    with pytest.raises(ValueError, match="config.mix.held_out is"):
        made.validation(2, 4, held_out)


def test_a_report_leaves_something_to_select_on(tmp_path):
    made = pipeline_of(config_of(write(tmp_path / "a", 1, (4,) * 6), held_out=0.5))
    selection, report = made.validation(2, 8, 0.9)
    assert selection
    assert report


def test_a_base_that_knows_other_robots_only_gets_new_statistics(paths, tmp_path, capsys):
    config = config_of(paths[0])
    config.train.update({"num_steps": 1, "ema_decay": 0.0})
    train.train(config, tmp_path / "base", devices=jax.devices()[:1])
    base = tmp_path / "base" / "1"
    (base / "assets" / "a").rename(base / "assets" / "droid")
    shutil.copytree(base / "assets" / "droid", base / "assets" / "trossen")
    config = config_of(paths[1], asset_id="mine")
    config.train.init_from = str(base)
    made = pipeline_of(config)
    assert made.norm_stats_from == "the training episodes"
    assert "has norm stats of droid, trossen, none of mine: new ones" in capsys.readouterr().out
    config.data.asset_id = "droid"
    assert pipeline_of(config).norm_stats_from == str(base)
    config.data.asset_id = ""
    with pytest.raises(ValueError, match="choose one with --config.data.asset_id"):
        pipeline_of(config)


def test_statistics_of_another_meaning_are_warned_of(paths, tmp_path, capsys):
    entry = {"mean": [0, 0], "std": [0.1, 1]}
    path = tmp_path / "norm_stats.json"
    path.write_text(json.dumps({"norm_stats": {"state": entry, "actions": entry}}))
    pipeline_of(config_of(paths[1], norm_stats=str(path)))
    warnings = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert len(warnings) == 1
    assert f"with the norm stats of {path}, actions[0] of {paths[1]} are " in warnings[0]
    pipeline_of(config_of(paths[1], norm_stats=str(path), held_out=1))
    assert "WARNING: with the norm stats of" in capsys.readouterr().out


def test_a_runs_own_statistics_are_not_warned_of(tmp_path, capsys):
    """Also of a dimension whose middle 98 % are one value, so that quantiles give it no scale."""
    vectors = {"observation.state": vector(2), "action": vector(2)}
    with writer.Writer(tmp_path / "d", fps=10, features=vectors) as opened:
        values = np.zeros((300, 2), np.float32)
        values[7] = 5
        values[:, 0] = np.arange(300)
        opened.add_episode({"observation.state": values, "action": values}, "push")
    pipeline_of(config_of(str(tmp_path / "d"), normalization="quantiles"))
    assert "WARNING" not in capsys.readouterr().out
