"""Output that is whole or absent, whatever kills the run, and errors before any work."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from policymix import files


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def run(program, *args):
    """Runs a Python program that has `files` and `out`, a pathlib.Path; returns its exit code."""
    head = (
        "import os, pathlib, signal, sys\nfrom policymix import files\n"
        "out = pathlib.Path(sys.argv[1])\n"
    )
    return subprocess.run(
        [sys.executable, "-c", head + program, *map(str, args)], check=False
    ).returncode


def test_a_directory_is_absent_until_it_is_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with files.whole_directory(out) as partial:
        (partial / "a").write_text("1")
        assert not out.exists()
        assert names(partial) == ["a"]
    assert (out / "a").read_text() == "1"
    assert names(out.parent) == ["out"]


def _fail_within(out, error, **options):
    with files.whole_directory(out, **options) as partial:
        (partial / "a").write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_nothing(tmp_path, error):
    with pytest.raises(error):
        _fail_within(tmp_path / "out", error)
    assert names(tmp_path) == []


def test_an_existing_directory_is_replaced_only_on_request(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    with pytest.raises(FileExistsError, match="out .*--overwrite"), files.whole_directory(out):
        pass
    with files.whole_directory(out, overwrite=True) as partial:
        (partial / "new").touch()
        assert names(out) == ["old"]  # until the new one is whole
    assert names(out) == ["new"]
    with pytest.raises(OSError, match="disk"), files.whole_directory(out, overwrite=True):
        raise OSError("disk full")
    assert names(out) == ["new"]
    assert names(tmp_path) == ["out"]


KILLED_WITHIN = """
with files.whole_directory(out) as partial:
    (partial / "a").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("name", ["out", "mix[1]*"])
def test_a_killed_run_leaves_no_directory_that_looks_complete(tmp_path, name):
    out = tmp_path / name
    assert run(KILLED_WITHIN, out) == -signal.SIGKILL
    assert not out.exists()
    (left,) = names(tmp_path)
    assert left.startswith(".")
    with files.whole_directory(out) as partial:
        (partial / "a").write_text("whole")
    assert names(tmp_path) == [name]
    assert (out / "a").read_text() == "whole"


KILLED_BETWEEN_RENAMES = """
rename, calls = pathlib.Path.rename, []
def kill_at_second(self, target):
    calls.append(target)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
pathlib.Path.rename = kill_at_second
with files.whole_directory(out, overwrite=True) as partial:
    (partial / "a").write_text("new")
"""


def test_a_run_killed_while_it_replaces_the_old_directory_gives_it_back(tmp_path):
    out = tmp_path / "out"
    with files.whole_directory(out) as partial:
        (partial / "a").write_text("old")
    assert run(KILLED_BETWEEN_RENAMES, out) == -signal.SIGKILL
    assert not out.exists()
    with pytest.raises(FileExistsError, match="--overwrite"):
        _fail_within(out, RuntimeError)  # refused before any work
    with pytest.raises(RuntimeError):
        _fail_within(out, RuntimeError, overwrite=True)
    assert (out / "a").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_run_that_is_alive_keeps_its_partial_directory(tmp_path):
    program = """
with files.whole_directory(out) as partial:
    print(partial, flush=True)
    sys.stdin.read()
"""
    head = "import pathlib, sys\nfrom policymix import files\nout = pathlib.Path(sys.argv[1])\n"
    with subprocess.Popen(
        [sys.executable, "-c", head + program, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        partial = other.stdout.readline().strip()
        with pytest.raises(RuntimeError):
            _fail_within(tmp_path / "out", RuntimeError)
        assert os.path.isdir(partial)
        other.stdin.close()
    assert other.returncode == 0
    assert names(tmp_path) == ["out"]


def test_a_process_writes_an_output_once_at_a_time(tmp_path):
    with files.whole_directory(tmp_path / "out") as partial:
        (partial / "a").write_text("mine")
        with pytest.raises(FileExistsError, match="out is being written already"):
            _fail_within(tmp_path / "out", RuntimeError, overwrite=True)
        assert names(partial) == ["a"]
    assert (tmp_path / "out" / "a").read_text() == "mine"
    with files.whole_directory(tmp_path / "out", overwrite=True):
        pass
    assert names(tmp_path / "out") == []


@pytest.mark.parametrize("number", ["same", "unknown here"])
def test_a_writer_on_another_machine_keeps_its_partial_directory(tmp_path, number):
    """On a shared disk: its number is ours, or of no process here, but it holds the lock."""
    pid = os.getpid() if number == "same" else 2**22 + 1  # beyond Linux's greatest
    program = f"""
os.getpid = lambda: {pid}
with files.whole_directory(out) as partial:
    print(partial, flush=True)
    sys.stdin.read()
"""
    head = "import os, pathlib, sys\nfrom policymix import files\nout = pathlib.Path(sys.argv[1])\n"
    with subprocess.Popen(
        [sys.executable, "-c", head + program, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        partial = other.stdout.readline().strip()
        with pytest.raises(FileExistsError if number == "same" else RuntimeError):
            _fail_within(tmp_path / "out", RuntimeError)
        assert os.path.isdir(partial)
        other.kill()
    with pytest.raises(RuntimeError):
        _fail_within(tmp_path / "out", RuntimeError)
    assert names(tmp_path) == []


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    path = tmp_path / "deep" / "file"
    files.write_whole(path, b"old")
    program = """
pathlib.Path.replace = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
files.write_whole(out, b"new")
"""
    assert run(program, path) == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    files.write_whole(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        files.write_whole(tmp_path / "taken", b"")
    assert names(tmp_path) == ["taken"]


def test_an_output_that_exists_is_refused_before_any_work(tmp_path):
    out = tmp_path / "out"
    files.check_output(out, overwrite=False)
    out.mkdir()
    with pytest.raises(FileExistsError, match="--overwrite"):
        files.check_output(out, overwrite=False)
    files.check_output(out, overwrite=True)


@pytest.mark.parametrize("out", ["in", "in/0", ".", "other/../in", "link"])
def test_an_output_that_overlaps_an_input_is_refused(tmp_path, out):
    (tmp_path / "in").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with pytest.raises(ValueError, match="overlaps the input .*/in"):
        files.check_apart(tmp_path / out, [tmp_path / "in"])


def test_an_output_beside_an_input_of_a_similar_name_is_fine(tmp_path):
    files.check_apart(tmp_path / "in2", [tmp_path / "in"])


def test_only_ones_own_output_is_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    with pytest.raises(FileExistsError, match="not written by this command"):
        files.check_output(tmp_path / "thesis", overwrite=True, ours=pathlib.Path.is_file)
    files.check_output(tmp_path / "thesis", overwrite=True, ours=pathlib.Path.is_dir)


def test_an_output_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PermissionError, match="file is not a writable directory"):
        files.check_output(tmp_path / "file" / "out", overwrite=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_in_a_read_only_directory_is_refused(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(PermissionError, match="locked is not a writable directory"):
        files.check_output(tmp_path / "locked" / "out", overwrite=False)


def test_json_is_read_back_and_refuses_nan(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"π": [1, 2.5, None]})
    assert files.read_json(path) == {"π": [1, 2.5, None]}
    assert "π" in path.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"loss": float("nan")})
    assert json.loads(path.read_text(encoding="utf-8"))["π"] == [1, 2.5, None]


@pytest.mark.parametrize("content", [b'{"a": ', b"\xff\xfe", b""])
def test_damaged_json_names_its_file(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json is not readable JSON"):
        files.read_json(tmp_path / "a.json")


def test_a_full_disk_is_told_with_what_did_not_fit(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    message = r"cannot write .*out: No space left on device; make room"
    with pytest.raises(OSError, match=message), files.whole_directory(tmp_path / "out"):
        full()
    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"cannot write .*a.json: No space left .*; make room"):
        files.write_json(tmp_path / "a.json", {})
    assert not names(tmp_path)


def test_an_error_that_is_not_of_the_disk_stays_what_it_was(tmp_path):
    lost, out = tmp_path / "weights", tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="weights"), files.whole_directory(out):
        lost.read_bytes()


def test_a_directory_is_removed_whole_or_not_at_all(tmp_path):
    out = tmp_path / "out"
    (out / "deep").mkdir(parents=True)
    (out / "deep" / "file").write_text("old")
    program = "os.rmdir = os.unlink = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
    assert run(program + "files.remove(out)", out) == -signal.SIGKILL
    assert not out.exists()
    (leftover,) = names(tmp_path)
    assert leftover.startswith(".out.partial-")
    files.remove(out)
    assert not names(tmp_path)


def test_a_directory_with_a_torn_file_alone_is_empty(tmp_path):
    assert files.is_empty(tmp_path)
    (tmp_path / ".config.json.partial-12").write_text("{")
    assert files.is_empty(tmp_path)
    (tmp_path / ".hidden").write_text("")
    assert not files.is_empty(tmp_path)
