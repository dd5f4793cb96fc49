"""The doctor: a line for everything looked at, and the command that mends what is missing."""

import collections
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys

import jax
import pytest

from policymix.runs import doctor
from policymix.sim import envs
from tests import commands
from tests.runs.sim_support import ROOT

pytest.importorskip("metaworld")
pytest.importorskip("gym_pusht")
pytest.importorskip("gym_aloha")


@pytest.fixture(scope="module")
def findings():
    return doctor.examine()


def named(found, what):
    (finding,) = (finding for finding in found if finding.what == what)
    return finding


def test_everything_is_looked_at_once(findings):
    extras = importlib.metadata.metadata("policymix").get_all("Provides-Extra")
    assert [finding.what for finding in findings] == [
        "python",
        "policymix",
        *(f"extra {extra}" for extra in extras if extra != "sim"),
        "jax devices",
        "simulator metaworld",
        "simulator pusht",
        "simulator aloha",
        "simulator aloha_fast",
        "machine",
        "disk",
        "cache",
    ]
    assert {finding.state for finding in findings} <= {"ok", "missing", "broken"}
    assert all(finding.mend for finding in findings if finding.state != "ok")
    table = doctor.table(findings).splitlines()
    for finding in findings:
        (line,) = (line for line in table if line.startswith(f"{finding.what}  "))
        assert finding.found in line
        assert not finding.mend or f"{finding.what}: {finding.mend}" in table


def test_versions_are_told(findings):
    assert named(findings, "python").found == platform.python_version()
    assert f"jax {jax.__version__}" in named(findings, "policymix").found
    for simulator, tested in envs.TESTED.items():
        found = named(findings, f"simulator {simulator}")
        assert found.state == "ok" or simulator.startswith("aloha")  # which needs OpenGL
        for package in tested:
            assert f"{package} {importlib.metadata.version(package)}" in found.found
    assert "8 × cpu" in named(findings, "jax devices").found


def test_nothing_to_be_done_is_said():
    assert doctor.table([doctor.Finding("disk", "ok", "much")]).endswith("nothing is to be done")


@pytest.mark.parametrize(
    ("package", "what", "state", "mend"),
    [
        ("pytest", "extra dev", "missing", "if you need it (make test), make venv EXTRAS=dev"),
        (
            "jax-cuda12-plugin",
            "extra cuda",
            "missing",
            "if you need it (NVIDIA GPUs), make venv EXTRAS=cuda",
        ),
        (
            "huggingface_hub",
            "extra hub",
            "missing",
            "if you need it (download.py, gs:// and hf:// paths), make venv EXTRAS=hub",
        ),
        ("numpy", "policymix", "broken", "make venv"),
    ],
)
def test_a_package_that_is_absent_is_named_with_its_command(
    monkeypatch, package, what, state, mend
):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == package else real(name))
    finding = named(doctor._packages(), what)
    assert (finding.state, finding.mend) == (state, mend)
    assert package in finding.found.removeprefix("without ").split(", ")


def test_a_checkout_that_was_never_installed_is_broken(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    assert doctor._packages() == [
        doctor.Finding("policymix", "broken", "not installed", "make venv")
    ]


@pytest.mark.parametrize(
    ("reason", "mend"),
    [
        ("libGL.so.1: cannot open shared object file", "apt install libgl1"),
        ("No module named 'gym_pusht'", "make venv EXTRAS=sim"),
    ],
)
def test_a_simulator_that_does_not_load_says_what_to_install(monkeypatch, reason, mend):
    def fail(task):
        raise OSError(envs._missing(task.simulator, ImportError(reason)))

    monkeypatch.setattr(envs, "make", fail)
    finding = doctor._simulator("pusht")
    assert finding.state == "missing"
    assert reason in finding.mend
    assert mend in finding.mend


def test_a_simulator_that_fails_in_its_own_way_is_broken(monkeypatch):
    def fail(task):
        raise AttributeError("mjModel has no site_pos")

    monkeypatch.setattr(envs, "make", fail)
    finding = doctor._simulator("metaworld")
    assert (finding.state, finding.mend) == ("broken", "make venv")
    assert finding.found == "AttributeError: mjModel has no site_pos"


def test_other_versions_than_the_tested_ones_are_told(monkeypatch):
    other = envs.versions("metaworld") | {"mujoco": "9.9"}
    monkeypatch.setattr(envs, "versions", lambda _: other)
    finding = doctor._simulator("metaworld")
    assert finding.state == "ok"
    tested = envs.TESTED["metaworld"]["mujoco"]
    assert finding.mend == f"tested with mujoco {tested}; figures may differ"


def test_an_old_python_a_full_disk_and_an_idle_gpu_are_told(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    assert doctor._python().state == "broken"
    assert "PYTHON=python3.11" in doctor._python().mend
    usage = collections.namedtuple("usage", "total used free")(10**12, 10**12 - 10**9, 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert doctor._disk() == doctor.Finding(
        "disk", "broken", "1.0 GB free", "make room: 2 GB are needed"
    )
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    finding = doctor._devices()
    assert (finding.state, finding.mend) == ("missing", "there is a GPU: make venv EXTRAS=cuda")


def test_every_extra_says_what_it_is_for():
    extras = importlib.metadata.metadata("policymix").get_all("Provides-Extra")
    assert set(doctor._FOR) == {*extras} - {"sim"}  # simulators are looked at one by one


def test_a_cache_that_cannot_be_written_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("POLICYMIX_CACHE", str(tmp_path / "a" / "cache"))
    found = doctor._cache()
    assert (found.state, found.mend) == ("ok", "")
    assert found.found.startswith(f"{tmp_path / 'a' / 'cache'}, ")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("POLICYMIX_CACHE", str(tmp_path / "file"))
    assert doctor._cache().state == "missing"
    assert "POLICYMIX_CACHE" in doctor._cache().mend


def examined(**env) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "experiments/doctor.py")]
    env = commands.ONE_DEVICE | env
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


def test_only_what_is_broken_is_an_error(tmp_path):
    """A simulator that is not there is none; JAX without a device is."""
    (tmp_path / "metaworld.py").write_text("raise ImportError('No module named mujoco')")
    result = examined(PYTHONPATH=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert re.search("simulator metaworld +missing", result.stdout)
    assert "simulator metaworld: metaworld is not installed, or not whole" in result.stdout
    assert not result.stderr
    result = examined(JAX_PLATFORMS="nonsense")
    assert result.returncode != 0
    (line,) = result.stderr.splitlines()
    assert line == "error: broken: jax devices; the lines above say how to mend it"
    assert re.search("simulator metaworld +ok", result.stdout)


@pytest.mark.parametrize("package", ["absl", "numpy", "ml_collections"])
def test_the_doctor_itself_says_what_to_do_where_hardly_anything_is_installed(package, tmp_path):
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('no', name={package!r})")
    result = subprocess.run(
        [sys.executable, str(ROOT / "experiments/doctor.py")],
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr == f"error: {package} is missing: make venv installs it, into .venv\n"
