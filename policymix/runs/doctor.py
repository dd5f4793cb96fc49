"""What is installed, what is missing, and the command that mends it."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import re
import shutil
import sys

from policymix import files, processes
from policymix.reports import tables
from policymix.sim import envs

_LEAST_PYTHON = (3, 11)
_LEAST_DISK = 2 * 10**9  # what the quickstart and an environment of one's own need, roughly
# What an extra of jax itself installs.
_PLUGINS = {"cuda": "jax-cuda12-plugin", "tpu": "libtpu"}
# What needs an extra; all else, training and offline RL among it, needs none.
_FOR = {
    "cuda": "NVIDIA GPUs",
    "tpu": "TPUs",
    "rlds": "building RLDS datasets; reading them needs none",
    "hub": "download.py, gs:// and hf:// paths",
    "wandb": "config.train.wandb",
    "torch": "open-pi-zero's .pt checkpoints",
    "notebooks": "experiments/notebooks",
    "dev": "make test",
}
_EXTRA = re.compile(r";\s*extra\s*==\s*['\"]([\w-]+)['\"]")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
      state: "ok", "missing" (of an extra that not everyone needs) or "broken".
      mend: the command that mends it; "" where nothing is to be done.
    """

    what: str
    state: str
    found: str
    mend: str = ""


def examine() -> list[Finding]:
    """Looks at the interpreter, the packages, devices, simulators and the disk."""
    simulators = map(_simulator, envs.TASKS)
    return [_python(), *_packages(), _devices(), *simulators, _cores(), _disk(), _cache()]


def table(findings: list[Finding]) -> str:
    """A line each, and below them what to do."""
    rows = [[f.what, f.state, f.found] for f in findings]
    lines = [tables.table(rows, ["", "state", "found"])]
    todo = [f for f in findings if f.mend]
    lines += [f"{f.what}: {f.mend}" for f in todo] or ["nothing is to be done"]
    return "\n".join(lines)


def _python() -> Finding:
    found = platform.python_version()
    if sys.version_info < _LEAST_PYTHON:
        return Finding("python", "broken", found, "make clean, then make venv PYTHON=python3.11")
    return Finding("python", "ok", found)


def _packages() -> list[Finding]:
    """What setup.py asks for: the core together, then each extra."""
    try:
        asked = importlib.metadata.requires("policymix") or []
    except importlib.metadata.PackageNotFoundError:
        return [Finding("policymix", "broken", "not installed", "make venv")]
    groups: dict[str, list[str]] = {"": []}
    for line in asked:
        extra = _EXTRA.search(line)
        name = re.match(r"[\w.-]+", line)[0]
        group = extra[1] if extra else ""
        groups.setdefault(group, []).append(_PLUGINS.get(group, name))
    findings = []
    for extra, names in groups.items():
        versions = {name: _version(name) for name in names}
        absent = [name for name, version in versions.items() if version is None]
        if extra == "sim":
            continue  # looked at one by one, with their versions
        what = f"extra {extra}" if extra else "policymix"
        if absent:
            mend = f"make venv EXTRAS={extra}" if extra else "make venv"
            state = "missing" if extra else "broken"
            use = f" ({_FOR[extra]})" if extra in _FOR else ""
            mend = mend if not extra else f"if you need it{use}, {mend}"
            findings.append(Finding(what, state, f"without {', '.join(absent)}", mend))
        else:
            shown = ", ".join(f"{n} {v}" for n, v in list(versions.items())[:4])
            findings.append(Finding(what, "ok", shown))
    return findings


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Finding:
    """Starts JAX, which says best itself whether it works."""
    try:
        import jax

        devices = jax.devices()
    except Exception as error:  # whatever a driver or a plugin may throw
        text = " ".join(str(error).split())
        return Finding("jax devices", "broken", text[:120], "make venv, or EXTRAS=cuda, EXTRAS=tpu")
    kinds = sorted({device.device_kind for device in devices})
    found = f"{len(devices)} × {', '.join(kinds)}"
    if devices[0].platform == "cpu" and shutil.which("nvidia-smi"):
        return Finding("jax devices", "missing", found, "there is a GPU: make venv EXTRAS=cuda")
    return Finding("jax devices", "ok", found)


def _simulator(name: str) -> Finding:
    """Starts an episode: a simulator may be installed and yet lack a library of the system."""
    what = f"simulator {name}"
    versions = envs.versions(name)
    shown = ", ".join(f"{package} {version}" for package, version in versions.items())
    try:
        task = envs.Task(name, envs.TASKS[name][0])
        env = envs.make(task)
        env.reset(0)
    except OSError as error:
        return Finding(what, "missing", shown, str(error))
    except Exception as error:  # another version's way to fail is not known
        return Finding(what, "broken", f"{type(error).__name__}: {error}"[:120], "make venv")
    other = [p for p, version in versions.items() if version != envs.TESTED[name][p]]
    if other:
        tested = ", ".join(f"{package} {envs.TESTED[name][package]}" for package in other)
        return Finding(what, "ok", shown, f"tested with {tested}; figures may differ")
    return Finding(what, "ok", shown)


def _cores() -> Finding:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Finding(
        "machine", "ok", f"{processes.num_cores()} cores, {memory / 1e9:.0f} GB of memory"
    )


def _disk() -> Finding:
    free = shutil.disk_usage(pathlib.Path.cwd()).free
    if free < _LEAST_DISK:
        return Finding("disk", "broken", f"{free / 1e9:.1f} GB free", "make room: 2 GB are needed")
    return Finding("disk", "ok", f"{free / 1e9:.0f} GB free")


def _cache() -> Finding:
    """Where download.py and gs:// and hf:// paths put what they fetch."""
    path = files.local(os.environ.get("POLICYMIX_CACHE") or "~/.cache/policymix")
    parent = next(p for p in (path, *path.parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        mend = "set POLICYMIX_CACHE to a folder that may be written"
        return Finding("cache", "missing", f"{path}: {parent} cannot be written", mend)
    return Finding("cache", "ok", f"{path}, {shutil.disk_usage(parent).free / 1e9:.0f} GB free")
