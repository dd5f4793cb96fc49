"""Mixing while things go wrong around it: disks that are full or read-only, what others left
behind, and kill -9. Every fault is one line, and leaves the output that was there, or none.
"""

import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from policymix import files
from policymix.checkpoints import store, streaming
from policymix.reports import mixes
from tests import commands
from tests.runs.faults_support import FORMS, TWO, arrays, cut, names, pair, run, save, state
from tests.runs.mix_support import ROOT


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch):
    """It takes half a second, and has tests of its own."""
    monkeypatch.setattr(mixes, "draw", lambda *_: None)


# Disks


def _mount(*options: object) -> bool:
    """Needs root, and a system that lets it."""
    command = ["mount", *map(str, options)]
    return not subprocess.run(command, capture_output=True, check=False).returncode


@pytest.fixture
def disk(tmp_path):
    """A disk of three megabytes."""
    path = tmp_path / "disk"
    path.mkdir()
    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("only root may mount a small disk")
    if not _mount("-t", "tmpfs", "-o", "size=3m", "tmpfs", path):
        pytest.skip("nothing can be mounted here")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.mark.parametrize("form", TWO)
def test_a_disk_without_room_is_told_before_the_work(form, disk, tmp_path, before_any_work):
    inputs = pair(tmp_path, form, size=500_000)  # two arrays, 4 MB
    with pytest.raises(OSError, match=f"{disk}/out needs up to 4.0 MB, and its disk has 3.1 MB"):
        run(inputs, disk / "out")
    assert not names(disk)


@pytest.mark.parametrize("size", [350_000, 700_000])  # one array fits beside the old output, none
@pytest.mark.parametrize("form", TWO)
def test_a_disk_that_fills_leaves_the_old_output(form, size, disk, tmp_path, monkeypatch):
    small = pair(tmp_path / "small", form, size=100_000)
    run(small, disk / "out")
    before = state(disk / "out")
    inputs = pair(tmp_path / "large", form, size=size)
    monkeypatch.setattr(files, "check_space", lambda *_: None)  # somebody else took the room
    message = f"cannot write {disk}/out: No space left on device; make room"
    with pytest.raises(OSError, match=message):
        run(inputs, disk / "out", overwrite=True)
    assert state(disk / "out") == before
    with pytest.raises(OSError, match=message.replace("/out:", "/new:")):
        run(inputs, disk / "new")
    assert names(disk) == ["out"]
    run(small[::-1], disk / "out", overwrite=True)
    assert names(disk) == ["out"]


@pytest.mark.parametrize("form", TWO)
def test_a_disk_that_fills_at_the_very_end_leaves_nothing(form, disk, tmp_path, monkeypatch):
    """What comes after the arrays is written to the same disk."""
    monkeypatch.setattr(mixes, "draw", lambda _, path: path.write_bytes(b"\1" * 2**22))
    with pytest.raises(OSError, match=f"cannot write {disk}/out: No space left on device"):
        run(pair(tmp_path, form), disk / "out")
    assert not names(disk)


def test_inputs_on_a_read_only_disk_are_mixed_and_outputs_refused(disk, tmp_path, monkeypatch):
    inputs = {form: pair(disk / form, form, size=20_000) for form in FORMS}
    if not _mount("-o", "remount,ro", disk):
        pytest.skip("nothing can be mounted again here")
    for form, paths in inputs.items():
        run(paths, tmp_path / form)
        c = store.open_checkpoint(tmp_path / form).leaves["c"].read()
        np.testing.assert_array_equal(c, (arrays(0, 20_000)["c"] + arrays(1, 20_000)["c"]) / 2)
    monkeypatch.setattr(streaming, "mix", None)
    message = f"cannot write {disk}/deep/out: {disk} is not a writable directory"
    with pytest.raises(PermissionError, match=message):
        run(paths, disk / "deep" / "out")


# What others leave where the output is to be


@pytest.mark.parametrize("left", ["abc", "1-2", "9" * 30, "999999999", "999999999-old"])
@pytest.mark.parametrize("make", [pathlib.Path.mkdir, pathlib.Path.touch])
def test_what_looks_like_a_leftover_stops_nothing(left, make, tmp_path):
    make(tmp_path / f".out.partial-{left}")
    if left.endswith("-old"):
        (tmp_path / "out").mkdir()  # else an old output is put back
    run(pair(tmp_path, "safetensors", size=100), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "mix.json").is_file()


def test_an_output_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    """The old one has gone out of the way when the new one cannot come."""
    inputs, rename = pair(tmp_path, "safetensors", size=100), pathlib.Path.rename
    run(inputs, tmp_path / "out")
    before = state(tmp_path / "out")

    def refuse(self, target):
        if pathlib.Path(target).name == "out" and not self.name.endswith("-old"):
            raise OSError(16, "Device or resource busy", str(target))
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", refuse)
    with pytest.raises(OSError, match="busy"):
        run(inputs[::-1], tmp_path / "out", overwrite=True)
    assert state(tmp_path / "out") == before
    assert names(tmp_path) == ["in0", "in1", "out"]


@pytest.mark.parametrize("inner", ["checkpoints/last", "pretrained_model", "7"])
def test_links_that_lead_back_are_told(inner, tmp_path, before_any_work):
    run_directory = tmp_path / "run"
    (run_directory / "params").mkdir(parents=True)
    (run_directory / inner).parent.mkdir(exist_ok=True)
    (run_directory / inner).symlink_to(run_directory)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match=f"{run_directory} is not a checkpoint: its links lead"):
        run((str(run_directory),), tmp_path / "out")
    with pytest.raises((ValueError, OSError), match=f"{tmp_path}/loop"):
        run((str(tmp_path / "loop"),), tmp_path / "out")


# From the command line


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "experiments/mix.py"), *arguments]


ENVIRONMENT = commands.ONE_DEVICE


def error_of(*arguments: str, preexec_fn=None, **variables: str) -> str:
    """The one line on stderr that is not of the progress."""
    result = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=120,
        env=ENVIRONMENT | variables, preexec_fn=preexec_fn,
    )  # fmt: skip
    assert result.returncode == 1, result.stdout
    lines = [line for line in result.stderr.splitlines() if not line.startswith("mixing: ")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.slow
def test_a_damaged_input_is_one_line(tmp_path):
    one, two = pair(tmp_path, "orbax")
    cut(pathlib.Path(two))
    line = error_of(f"--checkpoints={one},{two}", f"--output={tmp_path / 'out'}")
    assert f"{two}/params: cannot read" in line
    assert names(tmp_path) == ["in0", "in1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("checkpoints", "message"),
    [
        ("", "--checkpoints is empty: give the checkpoints to mix"),
        ("ONE,", "a checkpoint's path is empty; lists are written a,b,c"),
        ("ONE,ONE", "is given twice"),
        ("ONE,LOOP", "loop"),
        ("ONE,DEEP", "not readable JSON"),
    ],
)
def test_wrong_lists_are_one_line(checkpoints, message, tmp_path):
    one, two = pair(tmp_path, "orbax")
    (tmp_path / "loop").symlink_to("loop")
    (pathlib.Path(two) / "params/_METADATA").write_text("[" * 100_000)
    words = {"ONE": one, "DEEP": two, "LOOP": str(tmp_path / "loop")}
    for word, meant in words.items():
        checkpoints = checkpoints.replace(word, meant)
    line = error_of(f"--checkpoints={checkpoints}", f"--output={tmp_path / 'out'}")
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("form", TWO)
def test_files_that_may_not_grow_are_one_line(form, tmp_path):
    """The limit is met by threads, which are to end all the same."""
    inputs = ",".join(pair(tmp_path, form))

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    line = error_of(
        f"--checkpoints={inputs}", f"--output={tmp_path / 'out'}", preexec_fn=limit,
        JAX_ENABLE_COMPILATION_CACHE="false",
    )  # fmt: skip
    assert f"cannot write {tmp_path / 'out'}: File too large; make room" in line
    assert names(tmp_path) == ["in0", "in1"]


@pytest.mark.slow
@pytest.mark.parametrize("form", TWO)
def test_kill_9_leaves_the_old_output_or_the_new(form, tmp_path):
    """While 192 MB are read and 64 MB are written, at ten random moments."""
    inputs = {k: save(tmp_path / f"in{k}", form, arrays(k, 8_000_000)) for k in range(3)}
    root = tmp_path / "outputs"
    out = root / "out"
    root.mkdir()
    flags = [f"--checkpoints={','.join(inputs.values())}", f"--output={out}", "--overwrite"]
    old, new = (command(*flags, f"--coefficients={c}") for c in ("1,0,0", "0,1,0"))
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": ENVIRONMENT}

    def partial():
        return [p for p in root.iterdir() if not p.name.endswith("-old") and p != out]

    def begun(process):
        """Waits until it writes."""
        left = {p.name for p in partial()}
        while process.poll() is None and not {p.name for p in partial()} - left:
            time.sleep(0.002)

    def whole() -> int:
        """Which input the output is, to the last bit."""
        which = json.loads((out / "mix.json").read_text())["coefficients"].index(1)
        found = store.open_checkpoint(out).leaves
        expected = store.open_checkpoint(inputs[which]).leaves
        assert found.keys() == expected.keys()
        for name, leaf in found.items():
            np.testing.assert_array_equal(leaf.read(), expected[name].read(), err_msg=name)
        return which

    subprocess.run(old, check=True, **quiet)
    process = subprocess.Popen(old, **quiet)
    begun(process)
    started = time.monotonic()
    process.wait()
    length, rng, killed = time.monotonic() - started, np.random.default_rng(0), 0
    now = whole()
    assert now == 0
    before = {k: state(pathlib.Path(path)) for k, path in inputs.items()}
    for _ in range(30):
        process = subprocess.Popen((new, old)[now], **quiet)  # what is not there yet
        begun(process)
        time.sleep(rng.uniform(0, 0.9) * length)
        process.kill()  # signal 9
        if process.wait() == 0:  # too late: the machine was busier when the length was taken
            length, last = length * 0.8, now
            now = whole()
            assert now != last
            continue
        if out.exists():
            now = whole()
        else:  # between the two renames: the next run puts the old one back
            assert [p for p in root.iterdir() if p.name.endswith("-old")]
        if (killed := killed + 1) == 10:
            break
    assert killed == 10
    subprocess.run(new, check=True, **quiet)
    assert names(root) == ["out"]
    assert whole() == 1
    assert {k: state(pathlib.Path(path)) for k, path in inputs.items()} == before
