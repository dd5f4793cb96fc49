"""Validation files: a round trip, kai0's layout, what is held out, and files that are refused."""

import json
import pickle

import jax
import numpy as np
import pytest

from policymix.data import validation
from policymix.structs import Batch, Observation
from tests import oracle


def batches(count):
    rng = np.random.default_rng(0)
    return [
        Batch(
            Observation(
                images={"base": rng.integers(0, 256, (2, 4, 4, 3), np.uint8)},
                image_masks={"base": np.array([True, False])},
                proprio=rng.standard_normal((2, 3), np.float32),
                prompt_tokens=rng.integers(0, 9, (2, 5), np.int32),
                prompt_mask=np.ones((2, 5), bool),
            ),
            rng.standard_normal((2, 6, 3), np.float32),
        )
        for _ in range(count)
    ]


def entries(count=4):
    """The arrays of a file, in kai0's layout, without `meta`."""
    arrays = {}
    for i, batch in enumerate(batches(count)):
        observation = batch.observation
        arrays |= {
            f"{i}/image/base": observation.images["base"],
            f"{i}/image_mask/base": observation.image_masks["base"],
            f"{i}/state": observation.proprio,
            f"{i}/tokenized_prompt": observation.prompt_tokens,
            f"{i}/tokenized_prompt_mask": observation.prompt_mask,
            f"{i}/actions": batch.actions,
        }
    return arrays


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def file(tmp_path):
    """arrays → a validation file."""

    def write(arrays):
        np.savez(tmp_path / "val.npz", **arrays)
        return tmp_path / "val.npz"

    return write


def test_what_is_saved_loads_with_its_split_and_its_meta(tmp_path):
    path, many = tmp_path / "val.npz", batches(5)
    validation.save(path, many[:2], many[2:], {"fingerprint": "f", "episodes": [3, 4]})
    found = validation.load(path, held_out=0)  # the file knows better
    assert_same(found.selection, many[:2])
    assert_same(found.held_out, many[2:])
    assert found.meta["fingerprint"] == "f"
    assert found.meta["episodes"] == [3, 4]
    assert (found.meta["selection"], found.meta["held_out"]) == ([0, 1], [2, 3, 4])


@pytest.mark.parametrize("model", oracle.MODELS)
def test_kai0s_files_load_and_hold_out_the_last(model):
    found = validation.load(oracle.OPENPI / model / "val_batches.npz")
    assert_same(found.selection, oracle.batches(model)[:3])
    assert_same(found.held_out, oracle.batches(model)[3:])
    assert found.meta == {}


@pytest.mark.parametrize(
    ("count", "fraction", "held"),
    [(4, 0.2, [3]), (4, 0.0, []), (4, 0.5, [2, 3]), (10, 0.2, [8, 9]), (12, 0.01, [11])],
)
def test_the_last_batches_are_held_out_at_least_one_unless_none_is_asked_for(
    file, count, fraction, held
):
    found = validation.load(file(entries(count)), held_out=fraction)
    assert_same(found.held_out, [batches(count)[i] for i in held])
    assert_same(found.selection, batches(count)[: count - len(held)])


def test_meta_chooses_which_batches_are_held_out(file):
    meta = np.array(json.dumps({"selection": [3, 1], "held_out": [0]}))
    found = validation.load(file(entries() | {"meta": meta}))
    assert_same(found.selection, [batches(4)[3], batches(4)[1]])
    assert_same(found.held_out, [batches(4)[0]])


def test_one_batch_cannot_be_both(file):
    path = file(entries(1))
    with pytest.raises(ValueError, match=r"val\.npz.* leaves none .*held_out=0 to select on all"):
        validation.load(path)
    assert len(validation.load(path, held_out=0).selection) == 1


def test_masks_and_prompts_may_be_absent(file):
    arrays = {k: v for k, v in entries(1).items() if "mask" not in k and "prompt" not in k}
    (batch,) = validation.load(file(arrays), held_out=0).selection
    np.testing.assert_array_equal(batch.observation.image_masks["base"], [True, True])
    assert batch.observation.prompt_tokens is None


def _without(name):
    return {key: value for key, value in entries().items() if key != name}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (_without("1/actions"), "batch 1 lacks 'actions'"),
        (_without("2/state"), "batch 2 lacks 'state'"),
        (_without("2/tokenized_prompt_mask"), "batch 2 lacks 'tokenized_prompt_mask'"),
        ({k: v for k, v in entries().items() if k[0] != "1"}, r"found the batches \[0, 2, 3\]"),
        ({}, "found the batches"),
        (entries() | {"0/actions": np.full((2, 6, 3), np.nan)}, "'actions' of batch 0 holds NaN"),
        (entries() | {"3/state": np.full((2, 3), np.inf)}, "'state' of batch 3 holds NaN"),
        (entries() | {"0/state": np.array([None, {}])}, "damaged or holds Python objects"),
        (entries() | {"meta": np.array("{not json")}, "meta"),
        (entries() | {"meta": np.array("[1]")}, "meta"),
        (entries() | {"meta": np.array('{"selection": [0, 7]}')}, "meta"),
        (entries() | {"meta": np.array('{"selection": [0], "held_out": [0]}')}, "meta"),
    ],
)
def test_a_file_with_something_wrong_inside_says_what_and_where(file, arrays, message):
    path = file(arrays)
    with pytest.raises(ValueError, match=message) as caught:
        validation.load(path)
    assert str(path) in str(caught.value)


def test_a_pickle_is_refused_and_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was loaded",))

    path = tmp_path / "val.npz"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"val\.npz is a pickle, which is never loaded"):
        validation.load(path)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_file_is_refused(file, keep):
    path = file(entries())
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"val\.npz is (not an \.npz archive|damaged)"):
        validation.load(path)


def test_a_flipped_byte_is_found(file):
    path = file(entries())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"val\.npz is damaged"):
        validation.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz does not exist"):
        validation.load(tmp_path / "nowhere.npz")


def test_saving_leaves_no_other_file(tmp_path):
    validation.save(tmp_path / "val.npz", batches(1), [], {})
    assert [path.name for path in tmp_path.iterdir()] == ["val.npz"]
