import json
import pathlib

import numpy as np
import pytest

from policymix.rl import chunks

TESTDATA = pathlib.Path(__file__).parents[1] / "testdata" / "rl"
DISCOUNT = 0.9


def bounds(*lengths):
    ends = np.cumsum(lengths)
    return ends - lengths, ends


def plain(rewards, terminated, begin, end, horizon, discount, rule="sum", tails="pad"):
    """The same, frame by frame: (start, length, next frame, reward, discount, has_next)."""
    found = []
    for first, stop in zip(begin.tolist(), end.tolist(), strict=True):
        for t in range(first, stop):
            if tails == "drop" and t + horizon > stop:
                continue
            inside = range(t, min(t + horizon, stop))
            ended = next((k for k in inside if terminated[k]), None)
            played = min(horizon, stop - 1 - t) if ended is None else ended - t + 1
            here = [float(rewards[t + i]) for i in range(max(played, 1))]
            earned = {
                "sum": sum(discount**i * r for i, r in enumerate(here)),
                "max": max(here),
                "any": float(max(here) > 0),
            }[rule]
            goes_on = ended is None and played > 0
            after = discount**played if goes_on else 0.0
            following = min(t + played, stop - 1)
            found.append((t, max(played, 1), following, earned, after, played > 0))
    return found


def rows(found):
    fields = (
        *(found.starts, found.lengths, found.next_frames),
        *(found.rewards, found.discounts, found.has_next),
    )
    return list(zip(*(field.tolist() for field in fields), strict=True))


def check_same(found, expected):
    assert len(found) == len(expected)
    np.testing.assert_allclose(np.array(rows(found), float), np.array(expected, float), rtol=1e-6)


@pytest.mark.parametrize("rule", chunks.CHUNK_REWARDS)
@pytest.mark.parametrize("tails", chunks.TAILS)
@pytest.mark.parametrize("horizon", [1, 3, 10])
def test_against_a_loop_over_frames(rule, tails, horizon):
    rng = np.random.default_rng(horizon)
    begin, end = bounds(7, 1, 12, 3, 2, 10, 4)
    rewards = rng.normal(size=end[-1])
    for rate in (0.0, 0.1, 0.5):
        terminated = rng.random(end[-1]) < rate
        found = chunks.cut(
            rewards, terminated, begin, end, horizon, DISCOUNT, chunk_reward=rule, tails=tails
        )
        check_same(found, plain(rewards, terminated, begin, end, horizon, DISCOUNT, rule, tails))


def test_an_episode_that_ends_with_its_task():
    begin, end = bounds(5)
    found = chunks.cut(np.arange(5), np.arange(5) == 4, begin, end, 3, DISCOUNT)
    np.testing.assert_array_equal(found.lengths, [3, 3, 3, 2, 1])
    np.testing.assert_array_equal(found.discounts[2:], 0)
    np.testing.assert_allclose(found.discounts[:2], DISCOUNT**3)
    np.testing.assert_array_equal(found.next_frames, [3, 4, 4, 4, 4])
    np.testing.assert_allclose(found.rewards[2], 2 + DISCOUNT * 3 + DISCOUNT**2 * 4)
    assert found.has_next.all()


def test_an_episode_that_stops_before():
    begin, end = bounds(5)
    found = chunks.cut(np.arange(5), np.zeros(5, bool), begin, end, 3, DISCOUNT)
    np.testing.assert_array_equal(found.lengths, [3, 3, 2, 1, 1])
    np.testing.assert_array_equal(found.next_frames, [3, 4, 4, 4, 4])
    np.testing.assert_allclose(found.discounts[:4], DISCOUNT ** np.array([3, 3, 2, 1]))
    np.testing.assert_allclose(
        found.rewards[2], 2 + DISCOUNT * 3
    )  # the last frame's does not count
    np.testing.assert_array_equal(found.has_next, [True] * 4 + [False])


def test_padding_repeats_the_last_action_that_counts():
    begin, end = bounds(5, 4)
    ended = np.isin(np.arange(9), [2, 8])
    found = chunks.cut(np.zeros(9), ended, begin, end, 3, DISCOUNT)
    np.testing.assert_array_equal(found.frames()[1], [1, 2, 2])
    np.testing.assert_array_equal(found.is_pad()[1], [False, False, True])
    np.testing.assert_array_equal(found.frames()[4], [4, 4, 4])
    np.testing.assert_array_equal(found.is_pad()[4], [False, True, True])  # it was taken, once
    np.testing.assert_array_equal(found.frames()[8], [8, 8, 8])
    np.testing.assert_array_equal(found.frames()[6], [6, 7, 8])
    chosen = found.take(np.array([6, 1]))
    np.testing.assert_array_equal(chosen.starts, [6, 1])
    np.testing.assert_array_equal(chosen.frames(), [[6, 7, 8], [1, 2, 2]])


def test_an_end_is_of_its_own_episode():
    begin, end = bounds(3, 3)
    ended = np.arange(6) == 3  # the first frame of the second
    found = chunks.cut(np.zeros(6), ended, begin, end, 4, DISCOUNT)
    np.testing.assert_array_equal(found.lengths, [2, 1, 1, 1, 1, 1])
    np.testing.assert_allclose(found.discounts[:3], [DISCOUNT**2, DISCOUNT, 0])
    np.testing.assert_array_equal(found.has_next, [True, True, False, True, True, False])


def test_episodes_may_be_some_of_all():
    begin, end = bounds(3, 4, 5)
    found = chunks.cut(np.arange(12), np.zeros(12, bool), begin[1:], end[1:], 2, DISCOUNT)
    np.testing.assert_array_equal(found.starts, np.arange(3, 12))
    none = chunks.cut(np.arange(12), np.zeros(12, bool), begin[:0], end[:0], 2, DISCOUNT)
    assert len(none) == 0


def test_rlvla():
    """Its dataset class on the same episodes: two terminal chunks each, the first too early."""
    oracle = np.load(TESTDATA / "rlvla_chunkdataset.npz")
    told = json.loads(str(oracle["meta"]))
    begin, end = bounds(*told["lens"])
    rewards = np.concatenate([oracle[f"ep{n}/reward"] for n in range(len(begin))])
    found = chunks.cut_rlvla(rewards, begin, end, told["H"], 0.99)
    episodes = np.searchsorted(end, found.starts, side="right")
    table = np.stack(
        [
            *(episodes, found.starts - begin[episodes], found.next_frames - begin[episodes]),
            *(found.rewards, found.discounts == 0),
        ],
        axis=1,
    )
    np.testing.assert_array_equal(table, oracle["table_ep_t_next_r_done"])
    actions = np.concatenate([oracle[f"ep{n}/actions"] for n in range(len(begin))])
    np.testing.assert_array_equal(actions[found.frames()], oracle["A"])
    np.testing.assert_allclose(found.discounts[found.discounts > 0], 0.99 ** told["H"])
    assert found.has_next.all()
    assert not found.is_pad().any()
    # The same episodes, cut as they were: their second to last chunk goes on.
    ended = np.isin(np.arange(end[-1]), end - 1)
    right = chunks.cut(
        rewards, ended, begin, end, told["H"], 0.99, chunk_reward="max", tails="drop"
    )
    np.testing.assert_array_equal(right.starts, found.starts)
    np.testing.assert_array_equal(right.rewards, found.rewards)
    early = (found.discounts == 0) & (right.discounts > 0)
    np.testing.assert_array_equal(found.starts[early] + told["H"], end[:2] - 1)


def test_the_sampler_of_q_chunking():
    oracle = np.load(TESTDATA / "qc_sample_sequence.npz")
    names, discount, horizon = ("rewards", "masks", "terminals"), 0.9, 3
    found = chunks.sample_sequence(
        *(oracle[f"data/{name}"] for name in names), oracle["idx"], horizon, discount
    )
    for name in (*names, "valid"):
        np.testing.assert_allclose(getattr(found, name), oracle[f"seq/{name}"], rtol=1e-6)
    np.testing.assert_array_equal(found.kept(), oracle["seq/valid"][:, -1] == 1)
    # What it keeps is what `cut` makes of episodes whose frames all hold a transition.
    terminals = oracle["data/terminals"]
    ends = np.flatnonzero(terminals) + 1
    begin = np.concatenate([[0], ends[:-1]])
    mine = chunks.cut(
        oracle["data/rewards"], oracle["data/masks"] == 0, begin, ends, horizon, discount
    )
    starts = oracle["idx"][found.kept()]
    here = mine.take(starts)
    whole = here.lengths == horizon
    np.testing.assert_allclose(here.rewards[whole], found.rewards[found.kept()][whole, -1])
    bootstrap = discount**horizon * found.masks[found.kept()][whole, -1]
    np.testing.assert_allclose(here.discounts[whole], bootstrap, rtol=1e-6)
    # It alone keeps the window that ends where an episode stopped, with what was seen after that.
    np.testing.assert_array_equal(starts[~whole], [7])


def test_windows_beyond_the_last_frame():
    with pytest.raises(IndexError, match=r"windows of 3 of 5 frames begin at 0..2, got 0..3"):
        chunks.sample_sequence(np.zeros(5), np.ones(5), np.zeros(5), np.array([0, 3]), 3, 0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_reward": "mean"}, r"chunk_reward is 'mean'; expected one of \['sum', 'max'"),
        ({"tails": "cut"}, r"tails is 'cut'; expected one of \['pad', 'drop'\]"),
        ({"horizon": 0}, "action_horizon is 0; at least 1"),
        ({"discount": 1.5}, "discount is 1.5; expected 0 to 1"),
    ],
)
def test_wrong_options(options, message):
    options = {"horizon": 2, "discount": DISCOUNT} | options
    with pytest.raises(ValueError, match=message):
        chunks.cut(np.zeros(3), np.zeros(3, bool), *bounds(3), **options)
