"""Chunks that a checkpoint proposes: the numbers, and the cache that no kill or damage spoils."""

import json
import multiprocessing
import os
import pickle
import shutil
import threading

import jax
import numpy as np
import pytest

from configs import pi0_pusht
from policymix import files
from policymix.checkpoints import store
from policymix.data import writer
from policymix.models import pi0
from policymix.runs import encoding, learners, policies, proposals, sources, transitions
from policymix.transforms import normalize

LENGTHS = (9, 6, 8)
IMAGE = {"dtype": "image", "shape": [32, 32, 3], "names": ["height", "width", "channels"]}
NUMBERS = {"dtype": "float32", "names": None}
H, N, SEED = 3, 4, 7


def write_dataset(path, *, kept=None, seed=0):
    """Three episodes of two tasks, pictures and states of noise."""
    rng = np.random.default_rng(seed)
    features = {"top": IMAGE, "observation.state": NUMBERS | {"shape": [3]}}
    features |= {"action": NUMBERS | {"shape": [2]}}
    if kept is not None:
        features["is_kept"] = {"dtype": "bool", "shape": [1], "names": None}
    with writer.Writer(path, fps=10, features=features) as opened:
        for number, length in enumerate(LENGTHS):
            arrays = {"top": rng.integers(0, 256, (length, 32, 32, 3), np.uint8)}
            arrays["observation.state"] = rng.normal(size=(length, 3)).astype(np.float32)
            arrays["action"] = rng.normal(size=(length, 2)).astype(np.float32)
            if kept is not None:
                arrays["is_kept"] = np.arange(length) % kept == 0
            opened.add_episode(arrays, f"task {number % 2}")
    return path


def config_of(dataset, **data):
    config = pi0_pusht.get_config("small,debug")
    config.model.update({"image_resolution": (32, 32), "max_token_len": 3, "vocab_size": 64})
    config.model.update({"action_dim": 4, "action_horizon": 5})  # more than the robot has
    config.model.paligemma_variant.depth = config.model.action_expert_variant.depth = 1
    config.data.update({"path": str(dataset), "tokenizer": "words", "held_out": 0.4})
    config.data.update({"delta_actions": (1, -1), "num_threads": 2} | data)
    config.data.cameras.base_0_rgb = "top"
    config.evaluate.num_flow_steps = 2
    return config


def write_policy(path, config, seed=0, *, broken=False, actions=2):
    model = policies.model_config(config, why="the test")
    params = jax.device_get(pi0.init(model, jax.random.key(seed)))
    if broken:
        params["action_out_proj"]["bias"] = np.full_like(params["action_out_proj"]["bias"], np.nan)
    stats = {"state": normalize.NormStats(np.full(3, 0.1), np.full(3, 2.0))}
    stats["actions"] = normalize.NormStats(np.full(actions, -0.3), np.full(actions, 0.7))
    store.save_params(params, path, stats, "mine")
    return str(path)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "mine")


@pytest.fixture(scope="module")
def checkpoint(dataset, tmp_path_factory):
    return write_policy(tmp_path_factory.mktemp("policy") / "10", config_of(dataset))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(proposals, "_BLOCK", 5)


@pytest.fixture
def asked(monkeypatch):
    """The frames of every call of the policy."""
    calls, sample = [], proposals._sample

    def counting(model, params, observation, frames, *rest):
        calls.append(frames.tolist())
        return sample(model, params, observation, frames, *rest)

    monkeypatch.setattr(proposals, "_sample", counting)
    return calls


def source_of(config):
    model = policies.model_config(config, why="the test")
    return sources.Source(config.data.path, config.data, 2, encoding.cameras(model, config.data))


def propose(config, checkpoint, directory, **options):
    model = policies.model_config(config, why="the test")
    options = {"horizon": H, "num_proposals": N, "batch_size": 2, "seed": SEED} | options
    source = options.pop("source", None) or source_of(config)
    return proposals.propose(config, model, checkpoint, source, directory=directory, **options)


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.f32"))}


# The numbers


def test_the_chunks_are_what_the_policy_says_when_it_is_asked_at_each_frame(
    dataset, checkpoint, tmp_path
):
    config = config_of(dataset)
    found = propose(config, checkpoint, tmp_path / "made")
    policy = policies.Policy(config, policies.model_config(config, why="the test"), checkpoint)
    source = source_of(config)
    chunks = source.chunks(range(len(LENGTHS)))
    assert len(found) == len(chunks) == sum(LENGTHS)
    for frame in (0, 8, 9, 22):
        raw, root = source.get(chunks, np.array([frame])), jax.random.key(0)
        of_frame = jax.random.fold_in(jax.random.fold_in(root, np.uint32(SEED)), frame)
        for k in range(N):
            noise = jax.random.normal(jax.random.fold_in(of_frame, k), (1, 5, 4))
            observation, params = policy.encoder.observation(raw), policy.load()
            sampled = pi0.sample_actions(
                policy.encoder.seen, params, observation, noise=noise, num_flow_steps=2
            )
            expected = policy.encoder.actions(np.asarray(sampled), raw["state"])[0, :H]
            one = found.get(np.array([frame]))[0, k]
            np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-5)


def test_noise_differs_between_chunks_frames_and_seeds(dataset, checkpoint, tmp_path):
    config = config_of(dataset)
    found = propose(config, checkpoint, tmp_path / "made").get(np.arange(sum(LENGTHS)))
    other = propose(config, checkpoint, tmp_path / "other", seed=8).get(np.arange(sum(LENGTHS)))
    assert found.shape == (sum(LENGTHS), N, H, 2)
    assert found.dtype == np.float32
    first = np.concatenate([found, other], axis=1)[..., 0, 1]  # not relative to the state
    assert len(np.unique(first)) == first.size


def test_frames_are_found_in_any_order_and_others_are_refused(dataset, checkpoint, tmp_path):
    found = propose(config_of(dataset), checkpoint, tmp_path / "made")
    everything = found.get(np.arange(sum(LENGTHS)))
    wanted = np.array([22, 0, 5, 5, 13])
    np.testing.assert_array_equal(found.get(wanted), everything[wanted])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(found)).get(wanted), everything[wanted])
    assert len(pickle.dumps(found)) < 10_000
    for frame in (-1, 23):
        with pytest.raises(IndexError, match=f"made has nothing at frame {frame}, but at 23"):
            found.get(np.array([3, frame]))


def test_few_blocks_stay_mapped(dataset, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(proposals, "_KEPT", 2)
    found = propose(config_of(dataset), checkpoint, tmp_path / "made")
    first = found.get(np.arange(sum(LENGTHS)))
    assert len(found._mapped) <= 2
    np.testing.assert_array_equal(found.get(np.arange(sum(LENGTHS))), first)


def test_only_frames_that_may_begin_a_chunk_are_asked_at(checkpoint, tmp_path, asked):
    config = config_of(write_dataset(tmp_path / "thin", kept=3))
    found = propose(config, checkpoint, tmp_path / "made")
    assert found.frames.tolist() == [0, 3, 6, 9, 12, 15, 18, 21]
    assert {frame for call in asked for frame in call} == {*found.frames.tolist()}


def test_normalised_they_are_as_the_encoder_makes_actions_of_the_dataset(
    dataset, checkpoint, tmp_path
):
    """Chunk by chunk, with the learner's own statistics and relative to the frame's state."""
    config, frames = config_of(dataset), np.array([17, 2, 9])
    made = propose(config, checkpoint, tmp_path / "made")
    stats = {"state": normalize.NormStats(np.zeros(3), np.ones(3))}
    stats["actions"] = normalize.NormStats(np.array([0.5, -0.5]), np.array([2.0, 4.0]))
    encoder = encoding.Encoder(policies.model_config(config, why="a test"), config.data, stats)
    source = source_of(config)
    states = source.dataset.column("observation.state")[frames]
    found = made.normalized(encoder, frames, states)
    assert found.shape == (3, N, H, 4)
    assert found.dtype == np.float32
    raw = made.get(frames)
    for k in range(N):
        one = encoder.normalized({"state": states, "actions": raw[:, k]})["actions"]
        np.testing.assert_allclose(found[:, k, :, :2], one, rtol=1e-6, atol=1e-6)
    by_hand = (raw[..., 0] - states[:, None, None, 0] - 0.5) / 2
    np.testing.assert_allclose(found[..., 0], by_hand, rtol=1e-4, atol=1e-4)
    assert not found[..., 2:].any()
    adapter = proposals.Normalized(made, encoder, source)
    np.testing.assert_array_equal(adapter.get(frames), found)


@pytest.mark.parametrize("batch_size", [1, 64])
def test_the_batch_size_changes_nothing(dataset, checkpoint, tmp_path, batch_size):
    config, frames = config_of(dataset), np.arange(sum(LENGTHS))
    one = propose(config, checkpoint, tmp_path / "two").get(frames)
    other = propose(config, checkpoint, tmp_path / "other", batch_size=batch_size).get(frames)
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_the_prompt_and_pictures_of_a_frame_are_encoded_once(
    dataset, checkpoint, tmp_path, monkeypatch
):
    seen, sample = [], pi0.sample_actions

    def spy(model, params, observation, *, noise, num_flow_steps):
        seen.append((observation.proprio.shape[0], noise.shape))
        return sample(model, params, observation, noise=noise, num_flow_steps=num_flow_steps)

    monkeypatch.setattr(pi0, "sample_actions", spy)
    propose(config_of(dataset), checkpoint, tmp_path / "made", num_proposals=6, batch_size=4)
    assert seen == [(4, (4, 6, 5, 4))]  # traced once: all batches are of one size


# The cache


def test_a_second_call_asks_nothing_and_the_split_does_not_matter(
    dataset, checkpoint, tmp_path, asked
):
    first = propose(config_of(dataset), checkpoint, tmp_path / "made")
    calls = len(asked)
    assert calls == 5 * 3 - 1  # blocks of 5, 5, 5, 5, 3 frames, two at a time
    again = propose(config_of(dataset, held_out=0.0), checkpoint, tmp_path / "made", batch_size=5)
    assert len(asked) == calls
    frames = np.arange(sum(LENGTHS))
    np.testing.assert_array_equal(again.get(frames), first.get(frames))


def test_what_was_interrupted_goes_on_and_the_bytes_are_the_same(
    dataset, checkpoint, tmp_path, asked, monkeypatch
):
    propose(config_of(dataset), checkpoint, tmp_path / "whole")
    whole, write = contents(tmp_path / "whole"), proposals._write
    asked.clear()

    def failing(path, chunks):
        if path.name == "chunks-000002.f32":
            raise KeyboardInterrupt
        write(path, chunks)

    monkeypatch.setattr(proposals, "_write", failing)
    with pytest.raises(KeyboardInterrupt):
        propose(config_of(dataset), checkpoint, tmp_path / "part")
    assert list(contents(tmp_path / "part")) == ["chunks-000000.f32", "chunks-000001.f32"]
    monkeypatch.setattr(proposals, "_write", write)
    asked.clear()
    propose(config_of(dataset), checkpoint, tmp_path / "part")
    assert {frame for call in asked for frame in call} == {*range(10, 23)}
    assert contents(tmp_path / "part") == whole


def _killed_in_the_middle_of_a_write(config, checkpoint, directory):
    """What a process does that is killed by the kernel: nothing any more."""
    proposals._BLOCK = 5
    write, number = files.write_whole, []

    def dying(path, content):
        if path.suffix == ".f32":
            number.append(path)
        if len(number) == 3:
            path.with_name(f".{path.name}.partial-{os.getpid()}").write_bytes(content[:7])
            os.kill(os.getpid(), 9)
        write(path, content)

    files.write_whole = dying
    propose(config, checkpoint, directory)


@pytest.mark.slow
def test_kill_9_leaves_what_the_next_run_goes_on_with(dataset, checkpoint, tmp_path, asked):
    propose(config_of(dataset), checkpoint, tmp_path / "whole")
    arguments = config_of(dataset), checkpoint, tmp_path / "part"
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=_killed_in_the_middle_of_a_write, args=arguments)
    child.start()
    child.join(300)
    assert child.exitcode == -9
    assert len(contents(tmp_path / "part")) == 2
    assert len([*(tmp_path / "part").glob(".*.partial-*")]) == 1
    asked.clear()
    propose(*arguments)
    assert {frame for call in asked for frame in call} == {*range(10, 23)}
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")
    assert not [*(tmp_path / "part").glob(".*.partial-*")]


def _cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def _empty(path):
    path.write_bytes(b"")


def _flip(path):
    content = bytearray(path.read_bytes())
    content[41] ^= 1
    path.write_bytes(content)


def _lengthen(path):
    path.write_bytes(path.read_bytes() + b"1234")


@pytest.mark.parametrize("damage", [_cut, _empty, _flip, _lengthen, os.remove])
def test_a_damaged_block_is_made_again_and_it_alone(
    dataset, checkpoint, tmp_path, asked, capfd, damage
):
    propose(config_of(dataset), checkpoint, tmp_path / "made")
    whole = contents(tmp_path / "made")
    damage(tmp_path / "made" / "chunks-000001.f32")
    asked.clear()
    capfd.readouterr()
    propose(config_of(dataset), checkpoint, tmp_path / "made")
    assert {frame for call in asked for frame in call} == {*range(5, 10)}
    assert contents(tmp_path / "made") == whole
    told = "chunks-000001.f32 is not as it was written: it is made again"
    assert (told in capfd.readouterr().err) == (damage is not os.remove)


@pytest.fixture(scope="module")
def made(dataset, checkpoint, tmp_path_factory):
    directory = tmp_path_factory.mktemp("cache") / "made"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proposals, "_BLOCK", 5)
        propose(config_of(dataset), checkpoint, directory)
    return directory


def refused(made, config, checkpoint, words, **options):
    before = contents(made)
    with pytest.raises(ValueError, match=words) as caught:
        propose(config, checkpoint, made, **options)
    assert "\n" not in str(caught.value)
    assert contents(made) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 8}, "another seed is asked for: 8, not 7; delete the directory, or choose"),
        ({"horizon": 2}, "another horizon is asked for: 2, not 3"),
        ({"num_proposals": 3}, "another num_proposals is asked for: 3, not 4"),
        ({"num_flow_steps": 3}, "another num_flow_steps is asked for: 3, not 2"),
    ],
)
def test_other_settings_are_refused(made, dataset, checkpoint, asked, options, words):
    refused(made, config_of(dataset), checkpoint, f"{checkpoint} at {dataset}.*{words}", **options)
    assert not asked


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"default_prompt": "go"}, "another instructions is asked for"),
        ({"delta_actions": ()}, r"another config.data.delta_actions is asked for: \[\], not \[1"),
        ({"normalization": "mean_std"}, "another config.data.normalization is asked for"),
    ],
)
def test_another_meaning_of_the_numbers_is_refused(made, dataset, checkpoint, data, words):
    refused(made, config_of(dataset, **data), checkpoint, words)


def test_another_checkpoint_or_dataset_is_refused(made, dataset, checkpoint, tmp_path, asked):
    other = write_policy(tmp_path / "20", config_of(dataset), seed=1)
    words = f"holds what {checkpoint} at {dataset} proposes, and now another checkpoint is asked"
    refused(made, config_of(dataset), other, words)
    config = config_of(write_dataset(tmp_path / "new", seed=1))
    refused(made, config, checkpoint, "another dataset is asked for")
    config = config_of(write_dataset(tmp_path / "thin", kept=3))
    refused(made, config, checkpoint, "another dataset is asked for")
    assert not asked


def test_another_normalisation_beside_the_same_parameters_is_refused(
    made, dataset, checkpoint, tmp_path
):
    shutil.copytree(checkpoint, tmp_path / "10")
    (path,) = (tmp_path / "10").rglob("norm_stats.json")
    content = json.loads(path.read_text())
    content["norm_stats"]["actions"]["std"][0] *= 2
    path.write_text(json.dumps(content))
    refused(made, config_of(dataset), str(tmp_path / "10"), "another normalisation is asked for")


def test_a_checkpoint_that_moved_is_the_same(made, dataset, checkpoint, tmp_path, asked):
    shutil.copytree(checkpoint, tmp_path / "10")
    propose(config_of(dataset), str(tmp_path / "10"), made)
    assert not asked


def test_a_directory_of_something_else_is_refused(dataset, checkpoint, tmp_path, asked):
    (tmp_path / "chunks-000000.f32").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"holds chunks and no proposals\.json; delete"):
        propose(config_of(dataset), checkpoint, tmp_path)
    for content in ("{", "[]", '{"made_for": {}}', '{"made_for": 3, "of": {}}', "null"):
        (tmp_path / "proposals.json").write_text(content)
        with pytest.raises(ValueError, match=r"proposals\.json is damaged, or another's; delete"):
            propose(config_of(dataset), checkpoint, tmp_path)
    assert (tmp_path / "chunks-000000.f32").read_bytes() == b"mine"
    assert not asked


def test_of_two_at_once_one_asks_and_the_other_waits(dataset, checkpoint, tmp_path, asked, capfd):
    results, config = [], config_of(dataset)

    def work():
        results.append(propose(config, checkpoint, tmp_path / "made"))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 14
    assert "waiting for another process to fill" in capfd.readouterr().err
    one, other = (result.get(np.arange(sum(LENGTHS))) for result in results)
    np.testing.assert_array_equal(one, other)


def test_no_room_is_told_before_any_work(dataset, checkpoint, tmp_path, asked, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 100))
    with pytest.raises(OSError, match=r"made needs up to .* MB, and its disk has 0\.0 MB free"):
        propose(config_of(dataset), checkpoint, tmp_path / "made")
    assert not asked


def test_the_policy_is_forgotten_at_the_end(dataset, checkpoint, tmp_path):
    def held():
        return sum(array.nbytes for array in jax.live_arrays())

    propose(config_of(dataset), checkpoint, tmp_path / "first")
    before = held()
    propose(config_of(dataset), checkpoint, tmp_path / "second")
    assert held() == before


def test_they_become_the_candidates_of_transitions(dataset, checkpoint, tmp_path):
    config = config_of(dataset)
    config.offline_rl.update({"algorithm": "cloning", "action_horizon": H, "pictures": False})
    made = propose(config, checkpoint, tmp_path / "made")
    data = transitions.Transitions(config, learners.settings(learners.complete(config)))
    adapter = proposals.Normalized(made, data.encoder, data.sources[0])
    data.propose([adapter])
    (part,) = data.parts
    assert len(part.train) + len(part.held_out) == len(made)
    for chunks in (part.train, part.held_out):
        batch = part.get(chunks, np.arange(len(chunks)))
        assert batch.candidates.shape == (len(chunks), N, H, 2)
        np.testing.assert_array_equal(batch.candidates, adapter.get(chunks.starts))
        assert batch.actions.shape == batch.candidates[:, 0].shape


# What fails is told, and nothing takes its place


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"horizon": 6}, "action_horizon is 6, and .*10 proposes chunks of 5 actions"),
        ({"horizon": 0}, "horizon of proposals is 0; at least 1"),
        ({"num_proposals": 0}, "num_proposals of proposals is 0"),
        ({"batch_size": 0}, "batch_size of proposals is 0"),
        ({"num_flow_steps": 0}, "num_flow_steps of proposals is 0"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_opened(
    dataset, checkpoint, tmp_path, monkeypatch, options, words
):
    monkeypatch.setattr(policies, "Policy", None)
    with pytest.raises(ValueError, match=words):
        propose(config_of(dataset), checkpoint, tmp_path / "made", **options)
    assert not (tmp_path / "made").exists()


def test_a_policy_of_another_robot_is_told_before_its_parameters_are_read(
    dataset, tmp_path, monkeypatch
):
    config = config_of(dataset)
    checkpoint = write_policy(tmp_path / "10", config, actions=3)
    monkeypatch.setattr(policies, "read_params", None)
    with pytest.raises(ValueError, match=r"10 proposes actions of 3 numbers, those of .* have 2"):
        propose(config, checkpoint, tmp_path / "made")


def test_a_policy_that_is_not_finite_names_the_frame(dataset, tmp_path):
    config = config_of(dataset)
    checkpoint = write_policy(tmp_path / "10", config, broken=True)
    with pytest.raises(FloatingPointError, match="not finite at frame 0 of episode 0 of"):
        propose(config, checkpoint, tmp_path / "made")
    assert not contents(tmp_path / "made")


def test_chunks_that_are_not_finite_name_the_first_frame_of_them(
    dataset, checkpoint, tmp_path, monkeypatch
):
    sample = proposals._sample

    def poisoned(model, params, observation, frames, *rest):
        found = np.array(sample(model, params, observation, frames, *rest))
        found[frames == 12, 2] = np.inf
        return found

    monkeypatch.setattr(proposals, "_sample", poisoned)
    with pytest.raises(FloatingPointError, match="not finite at frame 3 of episode 1 of"):
        propose(config_of(dataset), checkpoint, tmp_path / "made")
    assert len(contents(tmp_path / "made")) == 2  # of frames 0 to 9; never a block with a hole


def test_a_frame_that_cannot_be_read_is_named(dataset, checkpoint, tmp_path):
    config = config_of(dataset)
    source = source_of(config)
    pictures = source.dataset.frames("top")
    get = pictures.get

    def torn(numbers):
        if 13 in numbers:
            raise OSError("a torn picture")
        return get(numbers)

    pictures.get = torn
    with pytest.raises(OSError, match="nothing at frame 4 of episode 1 of .*mine: a torn picture"):
        propose(config, checkpoint, tmp_path / "made", source=source)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (MemoryError("of the device"), RuntimeError, "MemoryError: of the device"),
        (ValueError("no"), ValueError, "no"),
        (OSError(5, "disk"), OSError, "disk"),
    ],
)
def test_an_error_of_the_policy_names_the_frame(
    dataset, checkpoint, tmp_path, monkeypatch, error, kind, words
):
    def failing(*_):
        raise error

    monkeypatch.setattr(proposals, "_sample", failing)
    told = f"10 proposes nothing at frame 0 of episode 0 of .*, in a batch of 2 frames: .*{words}"
    with pytest.raises(kind, match=told):
        propose(config_of(dataset), checkpoint, tmp_path / "made")
