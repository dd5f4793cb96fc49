"""Processes of environments: as many as there are, and whatever dies, the results are the same."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from policymix.sim import envs, experts, workers

pytest.importorskip("metaworld")
pytest.importorskip("gym_pusht")

REACH, PUSH = (envs.parse("metaworld", f"{name}-v3") for name in ("reach", "push"))
PUSHT = envs.parse("pusht", "PushT-v0")
EPISODES = [(REACH, 0), (PUSH, 1), (REACH, 2), (PUSHT, 0), (PUSH, 3)]


@pytest.fixture(scope="module")
def pool():
    with workers.Pool(2) as shared:
        yield shared


def _chunks(live, step):
    """Actions that depend on the episode and on how far it is."""
    chunks = {}
    for k in live:
        rng = np.random.default_rng([k, step])
        task = EPISODES[k][0]
        chunks[k] = rng.uniform(0, 512, (4, 2)) if task is PUSHT else rng.uniform(-1, 1, (4, 4))
    return chunks


def _roll(pool, steps=4, between=lambda step: None):
    """First observations and all outcomes of EPISODES."""
    first, told = pool.reset(EPISODES), []
    for step in range(steps):
        between(step)
        told.append(pool.step(_chunks(range(len(EPISODES)), step)))
    return first, told


def _same(left, right):
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[k], right[k]) for k in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    return np.array_equal(left, right)


@pytest.fixture(scope="module")
def undisturbed():
    with workers.Pool(1) as single:
        yield _roll(single)


def _kill(pool, w=0):
    pid = pool.pids[w]
    os.kill(pid, signal.SIGKILL)


def test_outcomes_are_those_of_the_environments_themselves(undisturbed):
    first, told = undisturbed
    for k, (task, seed) in enumerate(EPISODES):
        env = envs.make(task)
        assert _same(env.reset(seed), first[k])
        for step, outcomes in enumerate(told):
            moves = [env.step(np.float32(a)) for a in _chunks([k], step)[k]]
            assert _same(outcomes[k].observation, moves[-1][0])
            assert outcomes[k].score == max(score for _, score, _ in moves)
            assert (outcomes[k].steps, outcomes[k].success) == (4, False)


def test_the_number_of_processes_does_not_matter(undisturbed):
    with workers.Pool(3) as three:
        assert _same(_roll(three), undisturbed)


def test_an_episode_is_over_at_its_first_success(pool):
    episode = experts.demonstrate(REACH, 0, 150)
    chunk = np.vstack([episode["action"], np.zeros((5, 4))])
    pool.reset([(REACH, 0), (REACH, 1)])
    outcome = pool.step({0: chunk})[0]
    assert outcome.success
    assert outcome.steps == len(episode["action"])
    assert outcome.observation is None
    with pytest.raises(ValueError, match="episode 0 is not live.*live are 1"):
        pool.step({0: chunk})


@pytest.mark.parametrize("w", [0, 1])
def test_a_process_killed_between_steps_changes_nothing(pool, undisturbed, capfd, w):
    assert _same(_roll(pool, between=lambda step: step == 2 and _kill(pool, w)), undisturbed)
    again = ("0, 2, 4", "1, 3")[w]
    assert capfd.readouterr().err == (
        "a simulator process was killed by SIGKILL (out of memory?); a new one runs episodes "
        f"{again} again\n"
    )


def test_a_process_killed_while_it_steps_changes_nothing(pool):
    long = np.tile(np.float32([[0.1, 0.2, -0.1, 0]]), (300, 1))
    pool.reset([(PUSH, 0), (PUSH, 1)])
    want = pool.step({0: long, 1: long}), pool.step({0: long[:9], 1: long[:9]})
    pool.reset([(PUSH, 0), (PUSH, 1)])
    before = pool.pids
    killer = threading.Timer(0.05, _kill, [pool])
    killer.start()
    found = pool.step({0: long, 1: long}), pool.step({0: long[:9], 1: long[:9]})
    killer.join()
    assert _same(found, want)
    assert pool.pids[0] != before[0]
    assert pool.pids[1] == before[1]


def test_a_process_killed_while_it_demonstrates_changes_nothing(pool, capfd):
    jobs = [(REACH, seed) for seed in range(24)]  # more than are done before the signal comes
    want = list(pool.map_demonstrations(jobs, 150))
    found = []
    for k, episode in enumerate(pool.map_demonstrations(jobs, 150)):
        found.append(episode)
        if k == 0:
            _kill(pool)
    assert _same(found, want)
    assert "demonstrations" in capfd.readouterr().err


def _kill_for_good(pool, monkeypatch):
    """Kills the pool's processes, and each that is to take their place."""
    start = workers._Process.start

    def doomed(process):
        start(process)
        process._process.kill()

    monkeypatch.setattr(workers._Process, "start", doomed)
    _kill(pool)


def test_a_process_that_dies_again_and_again_is_an_error(monkeypatch, capfd):
    with workers.Pool(1) as pool:
        pool.reset([(REACH, 0)])
        _kill_for_good(pool, monkeypatch)
        with pytest.raises(OSError, match=r"was killed by SIGKILL .*, 3 times in a row over epis"):
            pool.step({0: np.zeros((1, 4))})
    assert len(capfd.readouterr().err.splitlines()) == 2


def test_so_it_is_among_demonstrations_and_the_pool_is_closed(monkeypatch, capfd):
    with workers.Pool(1) as pool:
        _kill_for_good(pool, monkeypatch)
        with pytest.raises(OSError, match="3 times in a row over demonstrations 0, 1"):
            list(pool.map_demonstrations([(REACH, 0), (REACH, 1)], 150))
        with pytest.raises(ValueError, match="closed"):
            pool.reset([(REACH, 0)])
    assert len(capfd.readouterr().err.splitlines()) == 2


def test_demonstrations_come_in_order_from_however_many_processes(pool):
    jobs = [(PUSH, 0), (REACH, 1), (REACH, 2), (PUSH, 3), (REACH, 4)]
    found = list(pool.map_demonstrations(jobs, 60))
    for (task, seed), episode in zip(jobs, found, strict=True):
        want = experts.demonstrate(task, seed, 60)
        assert (episode is None) == (want is None)
        assert want is None or _same(episode, want)


def test_attempts_come_in_order_from_however_many_processes(pool):
    jobs = [(PUSH, 0, "slow"), (REACH, 1, "expert"), (REACH, 2, "noisy"), (PUSHT, 0, "biased")]
    found = list(pool.map_attempts(jobs, 40))
    for (task, seed, skill), episode in zip(jobs, found, strict=True):
        assert _same(episode, experts.attempt(task, seed, 40, skill))


def test_demonstrations_may_be_left_early_and_leave_live_episodes_alone(pool, undisturbed):
    pool.reset(EPISODES)
    first = pool.step(_chunks(range(5), 0))
    endless = ((REACH, seed) for seed in range(10**9))
    for k, _ in enumerate(pool.map_demonstrations(endless, 150)):
        if k == 2:
            break
    assert _same([first, pool.step(_chunks(range(5), 1))], undisturbed[1][:2])


def test_a_pool_is_busy_while_it_demonstrates(pool):
    running = pool.map_demonstrations([(REACH, 0), (REACH, 1)], 150)
    next(running)
    with pytest.raises(ValueError, match="busy with demonstrations"):
        pool.reset([(REACH, 0)])
    running.close()
    pool.reset([(REACH, 0)])


def test_an_error_of_an_environment_is_told_and_the_pool_goes_on(pool, undisturbed):
    pool.reset(EPISODES)
    with pytest.raises(ValueError, match=r"episode 1 \(push-v3, seed 1\): .*found .* \[2, 3\]"):
        pool.step({0: np.zeros((2, 4)), 1: np.zeros((2, 3))})
    with pytest.raises(ValueError, match="episode 0 is not live.*live are none"):
        pool.step({0: np.zeros((2, 4))})
    jobs = [(envs.parse("metaworld", "window-close-v3@0:0.2"), 3), (REACH, 0)]
    with pytest.raises(ValueError, match="window-close-v3@0:0.2, seed 3: .*the same x"):
        list(pool.map_demonstrations(jobs, 9))
    assert _same(_roll(pool), undisturbed)


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (np.zeros(4), r"episode 0: a chunk of actions .* found shape \[4\]"),
        (np.zeros((0, 4)), r"found shape \[0, 4\]"),
        (np.full((1, 4), np.nan), r"episode 0 \(reach-v3\): an action is not finite"),
    ],
)
def test_a_wrong_chunk_is_refused_and_ends_nothing(pool, chunk, message):
    pool.reset([(REACH, 0)])
    with pytest.raises(ValueError, match=message):
        pool.step({0: chunk})
    pool.step({0: np.zeros((1, 4))})


def test_a_closed_pool_says_so():
    with workers.Pool(1) as pool:
        pid = pool.pids[0]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(ValueError, match="closed"):
        pool.reset([])
    with pytest.raises(ValueError, match="num_workers is 0"):
        workers.Pool(0)


def _gone(pid, seconds=10.0):
    """Whether a process ends in time. Nobody may have waited for an orphan: a zombie is gone."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_processes_end_with_their_parent_and_not_by_ctrl_c():
    program = (
        "import sys\nfrom policymix.sim import workers\n"
        "pool = workers.Pool(2)\nprint(*pool.pids, flush=True)\nsys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with parent:
        pids = [int(word) for word in parent.stdout.readline().split()]
        time.sleep(1.0)  # for the processes to have started
        assert all(os.getpgid(pid) != os.getpgid(parent.pid) for pid in pids)
        for pid in pids:
            os.kill(pid, signal.SIGINT)
        assert not _gone(pids[0], 0.3)
        parent.kill()
    assert len(pids) == 2
    assert all(map(_gone, pids))


def test_memory_is_that_of_the_processes(pool):
    pool.reset([(REACH, 0)])
    assert 50e6 < pool.peak_memory_bytes() < 2e9
