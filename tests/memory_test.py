"""The peak is this process's own and can be reset; freed memory stays where that was asked for."""

import ctypes
import pathlib
import subprocess
import sys

import pytest

from policymix import memory

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's /proc")
ROOT = pathlib.Path(__file__).parents[1]


def told(program: str) -> list[float]:
    """Megabytes that a program prints; in a process of its own, for nothing else to allocate."""
    begin = (
        "import pathlib, subprocess, sys\nimport numpy as np\nfrom policymix import memory\n"
        "def resident():\n"
        "    pages = pathlib.Path('/proc/self/statm').read_text().split()[1]\n"
        "    return int(pages) * 4096 / 1e6\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", begin + program],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return [float(word) for word in result.stdout.split()]


@LINUX
def test_the_peak_outlives_what_was_freed_until_it_is_reset():
    before, peak, after = told(
        "print(memory.peak_bytes() / 1e6)\n"
        "block = np.ones(25_000_000)\ndel block\nprint(memory.peak_bytes() / 1e6)\n"
        "memory.reset_peak()\nprint(memory.peak_bytes() / 1e6)"
    )
    assert 195 < peak - before < 215
    assert after < before + 20


@LINUX
def test_the_peak_is_not_that_of_the_process_that_started_it():
    parent, child = told(
        "block = np.ones(25_000_000)\nprint(memory.peak_bytes() / 1e6, flush=True)\n"
        "own = 'from policymix import memory; print(memory.peak_bytes() / 1e6)'\n"
        "subprocess.run([sys.executable, '-c', own], check=True)"
    )
    assert parent > 200
    assert child < 100


@LINUX
def test_freed_memory_stays_with_the_process_if_asked():
    program = "block = np.ones(12_500_000)\nfull = resident()\ndel block\nprint(full - resident())"
    (given_back,) = told(program)
    (kept,) = told(f"memory.keep_freed()\n{program}")
    assert given_back > 90
    assert kept < 1


def test_other_systems_are_left_as_they_are(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", None)  # what would be called
    memory.keep_freed()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())  # a C library without mallopt
    memory.keep_freed()


def test_without_proc_the_peak_is_what_the_system_counts(monkeypatch):
    monkeypatch.setattr(pathlib.Path, "exists", lambda _: False)
    assert memory.peak_bytes() > 10e6
