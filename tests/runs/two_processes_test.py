"""Two real processes that train one policy, of one CPU device each: the same losses and checkpoints
as one process, which end together and go on after being killed.
"""

import contextlib
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from policymix import metrics, trees
from policymix.checkpoints import assets, series, store
from tests import commands

pytestmark = pytest.mark.slow

MAIN = commands.ROOT / "experiments/train.py"
STATE = f"--config={commands.ROOT / 'configs/pi0_state.py'}:debug"
STEPS, EVERY = 24, 4
SETTINGS = (
    f"--config.train.num_steps={STEPS}", f"--config.train.decay_steps={STEPS}",
    f"--config.train.save_every={EVERY}", f"--config.train.keep_period={EVERY}",
)  # fmt: skip
MINUTES = 5  # until a test gives up on its processes


class Processes:
    """`count` processes of one run, whose words lie in files beside its workdir. `second` are flags
    that the first is not given.
    """

    def __init__(self, workdir: pathlib.Path, *arguments: str, count: int = 2, second=()):
        self.workdir, self._started = workdir, []
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{found.getsockname()[1]}"
        for index in range(count):
            words = [sys.executable, "-u", MAIN, STATE, f"--workdir={workdir}", *arguments]
            words += second if index else ()
            words += [f"--distributed={address},{index}/{count}"] * (count > 1)
            out, err = (self._file(index, kind).open("w") for kind in ("out", "err"))
            env = commands.ONE_DEVICE
            self._started.append(subprocess.Popen(words, stdout=out, stderr=err, env=env))

    def _file(self, index: int, kind: str) -> pathlib.Path:
        return self.workdir.with_name(f"{self.workdir.name}-{index}.{kind}")

    def printed(self, index: int, kind: str = "out") -> str:
        return self._file(index, kind).read_text()

    def send(self, number: int, *indices: int) -> None:
        for index in indices:
            self._started[index].send_signal(number)

    def wait(self, *indices: int) -> list[int]:
        """Exit codes, of all unless some are named."""
        end = time.monotonic() + 60 * MINUTES
        waited = [self._started[i] for i in indices] or self._started
        return [process.wait(max(1, end - time.monotonic())) for process in waited]

    def wait_for_step(self, step: int) -> None:
        """Until the run has written the metrics of `step`."""
        for _ in range(60 * MINUTES * 20):
            if steps_of(self.workdir)[-1:] >= [step]:
                return
            assert all(process.poll() is None for process in self._started), self.printed(0, "err")
            time.sleep(0.05)
        raise TimeoutError(f"step {step}")

    def close(self) -> None:
        for process in self._started:
            process.kill()


@contextlib.contextmanager
def running(workdir, *arguments, **options):
    processes = Processes(workdir, *SETTINGS, *arguments, **options)
    try:
        yield processes
    finally:
        processes.close()


def train(workdir, *arguments, **options) -> Processes:
    with running(workdir, *arguments, **options) as processes:
        codes = processes.wait()
        assert not any(codes), [processes.printed(index, "err") for index in range(len(codes))]
    return processes


def rows(workdir) -> list[dict]:
    path = workdir / "metrics.jsonl"
    return [row for row in metrics.read(path) if "loss" in row] if path.exists() else []


def steps_of(workdir) -> list[int]:
    return [row["step"] for row in rows(workdir)]


def losses(workdir) -> list[float]:
    return [row["loss"] for row in rows(workdir)]


def train_state(step: pathlib.Path) -> dict:
    """What lies there, as numpy arrays, whichever devices wrote it."""
    item = step / "train_state"
    with ocp.PyTreeCheckpointer() as reader:
        tree = reader.metadata(item).item_metadata.tree
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return reader.restore(item, restore_args=args)


def compare(a: pathlib.Path, b: pathlib.Path, check) -> None:
    """All of two checkpoints: the average, the raw parameters, the optimizer's state."""
    for read in (store.load_params, train_state):
        jax.tree.map(check, read(a), read(b))


def identical(a, b) -> None:
    np.testing.assert_array_equal(a, b)


def near(a, b) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run of one process."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    train(workdir, count=1)
    return workdir


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The same run of two."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    processes = train(workdir)
    assert "2 × cpu as {'data': 2, 'fsdp': 1}" in processes.printed(0)
    others = processes.printed(1).splitlines()
    assert not [line for line in others if "[Gloo]" not in line]  # XLA's own
    return workdir


def test_two_processes_find_the_losses_of_one(one, two):
    assert steps_of(two) == steps_of(one) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)


def test_their_checkpoint_is_whole(one, two):
    assert series.latest_step(two) == STEPS
    last = two / str(STEPS)
    assert (
        trees.flatten(store.load_params(last)).keys()
        == trees.flatten(store.load_params(one / str(STEPS))).keys()
    )
    compare(last, one / str(STEPS), near)
    assert assets.trainings_of(last) == assets.trainings_of(one / str(STEPS))
    names = {path.name for path in two.iterdir()}
    assert names == {path.name for path in one.iterdir()}  # nothing half-written, nothing twice


def test_split_parameters_find_them_too(one, tmp_path):
    """`fsdp_devices`: each process holds, and writes, half of every matrix."""
    train(
        tmp_path / "run", "--config.train.fsdp_devices=2",
        "--config.train.shard=('.*/kernel=-1',)",
    )  # fmt: skip
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(one), rtol=1e-5)
    compare(tmp_path / "run" / str(STEPS), one / str(STEPS), near)


def test_what_is_in_four_bits_is_written_and_read_by_both(tmp_path):
    """Each holds half of it; they stop half way, and end as one process does."""
    frozen = (
        "--config.train.freeze=('PaliGemma/llm/layers/.*',)", "--config.train.frozen_dtype=nf4",
    )  # fmt: skip
    split = ("--config.train.fsdp_devices=2", "--config.train.shard=('.*/layers/.*=-1',)")
    train(tmp_path / "one", *frozen, count=1)
    for steps in (STEPS // 2, STEPS):
        train(tmp_path / "two", *frozen, *split, f"--config.train.num_steps={steps}")
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)
    compare(tmp_path / "two" / str(STEPS), tmp_path / "one" / str(STEPS), near)


def until(workdir: pathlib.Path, step: int, to: pathlib.Path) -> pathlib.Path:
    """A copy of a run as it was after `step`."""
    shutil.copytree(workdir, to)
    for path in to.iterdir():
        if path.name.isdigit() and int(path.name) > step:
            shutil.rmtree(path)
    return to


@pytest.mark.parametrize("counts", [(2, 1), (1, 2)], ids=lambda c: f"{c[0]} then {c[1]}")
def test_another_number_of_processes_goes_on(counts, one, two, tmp_path):
    before, now = counts
    workdir = until({1: one, 2: two}[before], STEPS - EVERY, tmp_path / "run")
    processes = train(workdir, count=now)
    assert f"resumed from step {STEPS - EVERY}" in processes.printed(0)
    assert steps_of(workdir) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(losses(workdir), losses(one), rtol=1e-5)
    compare(workdir / str(STEPS), one / str(STEPS), near)


def test_killed_at_any_step_they_go_on_as_if_nothing_had_been(two, tmp_path):
    workdir = tmp_path / "run"
    step = random.randint(1, STEPS // 2)
    with running(workdir) as processes:
        processes.wait_for_step(step)
        processes.send(signal.SIGKILL, 0, 1)
        assert processes.wait() == [-signal.SIGKILL] * 2
    print(f"killed after step {step}; steps on disk: {sorted(p.name for p in workdir.iterdir())}")
    train(workdir)
    assert losses(workdir) == losses(two)
    compare(workdir / str(STEPS), two / str(STEPS), identical)


@pytest.mark.parametrize("told", [(1,), (0, 1)], ids=str)
def test_sigterm_to_any_of_them_saves_and_ends_all(told, two, tmp_path):
    workdir = tmp_path / "run"
    with running(workdir, "--config.train.num_steps=100000") as processes:
        processes.wait_for_step(3)
        processes.send(signal.SIGTERM, *told)
        assert processes.wait() == [0, 0], processes.printed(0, "err")
    end = series.latest_step(workdir)
    assert end == steps_of(workdir)[-1] > 3
    assert f"stopped after step {end} of 100000" in processes.printed(0)
    if end < STEPS:  # it goes on from there, as if nothing had been
        train(workdir)
        compare(workdir / str(STEPS), two / str(STEPS), identical)


def test_sigterm_before_the_first_step_is_not_lost(two, tmp_path):
    """JAX counts from step 0; a run that is resumed does not."""
    workdir = until(two, 2 * EVERY, tmp_path / "run")
    with running(workdir, "--config.train.num_steps=100000") as processes:
        for _ in range(60 * MINUTES * 20):
            if "resumed from" in processes.printed(0):
                break
            time.sleep(0.05)
        processes.send(signal.SIGTERM, 1)
        assert processes.wait() == [0, 0], processes.printed(0, "err")
    assert 2 * EVERY < series.latest_step(workdir) < 100_000


def test_an_error_in_one_of_them_ends_it_at_once(tmp_path):
    """The other hears of it by JAX's heartbeats, in a hundred seconds: too long for a test."""
    with running(tmp_path / "run", second=("--config.data.path=nowhere",)) as processes:
        assert processes.wait(1) == [1]
        (line,) = processes.printed(1, "err").splitlines()
        assert line.startswith("error: ")
        assert "nowhere" in line


@pytest.mark.parametrize("begun", [True, False], ids=["resumed", "new"])
def test_two_that_see_other_disks_end_at_once(begun, two, tmp_path):
    """As they do where --workdir is on none that is shared, or one of them has a stale mount."""
    workdir = tmp_path / "run"
    if begun:
        until(two, EVERY, workdir)
    with running(workdir, second=(f"--workdir={tmp_path / 'other'}",)) as processes:
        assert processes.wait() == [1, 1]
        errors = [processes.printed(index, "err").splitlines() for index in (0, 1)]
    assert len(errors[0]) == len(errors[1]) == 1, errors
    for (line,) in errors:
        assert line.startswith("error: ")
        assert f"{EVERY} in process 0, None in process 1" in line or not begun
        assert "there in process 0, missing in process 1" in line or begun


def test_one_that_dies_takes_the_other_along(tmp_path):
    workdir = tmp_path / "run"
    with running(workdir, "--config.train.num_steps=100000") as processes:
        processes.wait_for_step(3)
        processes.send(signal.SIGKILL, 1)
        begun = time.monotonic()
        assert processes.wait(0) == [1]
        assert time.monotonic() - begun < 60
        line = processes.printed(0, "err").splitlines()[-1]
        assert line.startswith("error: another process of this run seems to have ended")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("127.0.0.1:1,1/2", r"127\.0\.0\.1:1 \(2, this is process 1\) are not all there after 2 s"),
        ("auto", r"auto found no cluster .*HOST:PORT,INDEX/COUNT"),
    ],
)
def test_a_process_whose_others_do_not_come_says_so(spec, message):
    program = f"""
from policymix import distributed
try:
    distributed.initialize({spec!r}, timeout_s=2)
except ValueError as error:
    raise SystemExit(f"error: {{error}}")
"""
    names = ("SLURM", "OMPI", "KUBERNETES", "JAX_COORDINATOR", "TPU")
    env = {k: v for k, v in commands.ONE_DEVICE.items() if not k.startswith(names)}
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert re.match(f"error: .*{message}", line)
