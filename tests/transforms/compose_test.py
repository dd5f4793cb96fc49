"""Transforms and their inverses: each law is invert(apply(x)) == x."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policymix.transforms import compose, normalize
from policymix.transforms.compose import ConcatState, DeltaActions, Pad, Repack

laws = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 2**32 - 1)
leads = st.sampled_from([(), (3,), (2, 3), (0,)])
RENAMED = Repack(
    {
        "state": "observation.state",
        "actions": "action",
        "images": {"base_0_rgb": "observation.images.top", "wrist": "observation.images.wrist"},
        "prompt": "task",
    }
)


def example(seed, lead=(), state=8, action=7, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return {
        "state": rng.uniform(-3, 3, (*lead, state)).astype(dtype),
        "actions": rng.uniform(-3, 3, (*lead, 5, action)).astype(dtype),
        "images": {"base_0_rgb": rng.integers(0, 256, (*lead, 4, 6, 3), dtype=np.uint8)},
        "prompt": "push",
    }


def dataset_example(seed, lead=()):
    ours = example(seed, lead)
    picture = ours["images"]["base_0_rgb"]
    return {
        "observation.state": ours["state"],
        "action": ours["actions"],
        "observation.images.top": picture,
        "observation.images.wrist": 255 - picture,
        "task": "push",
    }


def same(a, b, atol=1e-9):
    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], dict):
            same(a[key], b[key])
        elif isinstance(a[key], np.ndarray):
            assert a[key].dtype == b[key].dtype
            np.testing.assert_allclose(a[key], b[key], rtol=1e-9, atol=atol)
        else:
            assert a[key] == b[key]


def stats_of(seed, d):
    rng = np.random.default_rng(seed)
    low = rng.uniform(-5, 0, d)
    return normalize.NormStats(rng.uniform(-1, 1, d), rng.uniform(1, 2, d), low, low + 9)


@laws
@given(seeds, leads)
def test_repacking_is_undone(seed, lead):
    given_, ours = dataset_example(seed, lead), RENAMED.apply(dataset_example(seed, lead))
    assert ours.keys() == {"state", "actions", "images", "prompt"}
    assert ours["images"].keys() == {"base_0_rgb", "wrist"}
    assert ours["state"] is not None
    same(RENAMED.invert(ours), given_)


def test_repacking_drops_the_rest_and_needs_no_actions():
    observed = dataset_example(0) | {"frame_index": np.array(3)}
    del observed["action"], observed["task"]
    assert RENAMED.apply(observed).keys() == {"state", "images"}
    assert RENAMED.invert({"actions": 1}).keys() == {"action"}
    del observed["observation.images.wrist"]
    with pytest.raises(ValueError, match=r"no 'observation.images.wrist'.*'images/wrist'"):
        RENAMED.apply(observed)
    with pytest.raises(ValueError, match="'a' is named twice"):
        Repack({"state": "a", "images": {"base_0_rgb": "a"}})


@laws
@given(seeds, leads)
def test_states_laid_side_by_side_are_taken_apart(seed, lead):
    rng = np.random.default_rng(seed)
    parts = {"joints": rng.normal(size=(*lead, 7)), "gripper": rng.normal(size=(*lead, 1))}
    whole = ConcatState({"joints": 7, "gripper": 1})
    made = whole.apply(parts | {"other": 3})
    assert made.keys() == {"state", "other"}
    np.testing.assert_array_equal(made["state"][..., :7], parts["joints"])
    same(whole.invert(made), {"other": 3} | parts)
    assert whole.invert({"actions": 1}) == {"actions": 1}


def test_states_of_the_wrong_size_are_named():
    whole = ConcatState({"joints": 7, "gripper": 1})
    with pytest.raises(ValueError, match="no 'gripper', a part of 'state'"):
        whole.apply({"joints": np.zeros(7)})
    with pytest.raises(ValueError, match=r"'gripper' has shape \(\); expected 1 numbers"):
        whole.apply({"joints": np.zeros(7), "gripper": np.float32(0)})


def test_masks_are_written_as_openpi_writes_them():
    assert compose.bool_mask(2, -2, 2) == (True, True, False, False, True, True)
    assert compose.bool_mask(2, 0, 2) == (True,) * 4
    assert compose.bool_mask(6, -1, 6, -1) == ((True,) * 6 + (False,)) * 2


@laws
@given(seeds, leads, st.lists(st.booleans(), max_size=7))
def test_actions_relative_to_the_state(seed, lead, mask):
    given_, transform = example(seed, lead), DeltaActions(tuple(mask))
    before = given_["actions"].copy()
    made = transform.apply(given_)
    np.testing.assert_array_equal(given_["actions"], before)  # left as it was
    for d in range(7):
        moved = given_["state"][..., None, d] if d < len(mask) and mask[d] else 0
        np.testing.assert_array_equal(made["actions"][..., d], before[..., d] - moved)
    same(transform.invert(made), given_)


def test_relative_actions_need_a_state_that_is_large_enough():
    transform = DeltaActions(compose.bool_mask(6, -1))
    assert transform.apply({"state": np.zeros(8)}).keys() == {"state"}
    with pytest.raises(ValueError, match="need the 'state'"):
        transform.invert({"actions": np.zeros((5, 7))})
    with pytest.raises(ValueError, match=r"has 7 dimensions, 'state' is \(6,\)"):
        transform.apply(example(0, state=6))


@laws
@given(seeds, leads)
def test_padding_is_zeros_and_is_cut_off(seed, lead):
    given_, transform = example(seed, lead), Pad({"state": (8, 32), "actions": (7, 32)})
    made = transform.apply(given_)
    assert made["actions"].shape == (*lead, 5, 32)
    assert not made["state"][..., 8:].any()
    same(transform.invert(made), given_)


def test_padding_refuses_what_it_could_not_undo():
    with pytest.raises(ValueError, match="'actions' has 8 dimensions, the model takes 7"):
        Pad({"actions": (8, 7)})
    with pytest.raises(ValueError, match=r"'state' has shape \(9,\); expected 8"):
        Pad({"state": (8, 32)}).apply(example(0, state=9))
    with pytest.raises(ValueError, match="3 dimensions cannot be padded to 2"):
        compose.pad(np.zeros(3), 2)


@laws
@given(seeds, leads, st.sampled_from(normalize.SCHEMES), st.permutations(range(3)))
def test_chains_are_undone_in_reverse_order(seed, lead, scheme, order):
    """Whatever the order, since each transform knows how to undo what it did."""
    stats = {"state": stats_of(seed, 8), "actions": stats_of(seed + 1, 7)}
    middle = [
        DeltaActions(compose.bool_mask(6, -1)),
        normalize.Normalize(
            {
                k: normalize.NormStats(s.mean, s.std, s.q01 - 50, s.q99 + 50)
                for k, s in stats.items()
            },
            scheme,
            {"actions": compose.bool_mask(6, -1)},
        ),
        DeltaActions(compose.bool_mask(-1, 4)),
    ]
    padding = Pad({"state": (8, 9), "actions": (7, 9)})
    whole = compose.chain([RENAMED, compose.chain([middle[i] for i in order]), padding])
    assert len(whole.transforms) == 5
    given_ = dataset_example(seed, lead)
    same(whole.invert(whole.apply(given_)), given_, atol=1e-6)


def test_a_chain_serves_a_robot_that_has_no_actions_yet():
    stats = {"state": stats_of(0, 8), "actions": stats_of(1, 7)}
    whole = compose.chain(
        [
            RENAMED,
            DeltaActions(compose.bool_mask(6, -1)),
            normalize.Normalize(stats, "quantiles"),
            Pad({"state": (8, 32), "actions": (7, 32)}),
        ]
    )
    trained = dataset_example(3)
    observed = {key: value for key, value in trained.items() if key != "action"}
    made, sampled = whole.apply(observed), whole.apply(trained)["actions"]
    assert "actions" not in made
    answer = whole.invert({"state": made["state"], "actions": sampled})
    np.testing.assert_allclose(answer["action"], trained["action"], atol=1e-9)
    assert compose.chain([]).apply(trained) == trained
