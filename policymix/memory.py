"""The memory of this process: how much it has taken, and that it keeps what it will need again."""

import ctypes
import pathlib
import resource
import sys
from collections.abc import Mapping

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # glibc's malloc.h


def peak_bytes(pid: int | None = None) -> int:
    """The largest resident size of this process, since the last `reset_peak` if any.

    Of another one, by its number; 0 where that is gone or the system does not say.
    """
    try:  # getrusage would count what the parent had before it started us
        lines = pathlib.Path(f"/proc/{pid or 'self'}/status").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    if pid:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def reset_peak() -> None:
    """Lets `peak_bytes` count anew; where the system has no such thing, nothing happens."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def keep_freed() -> None:
    """Freed memory stays with the process, where glibc would give large blocks back at once.

    XLA on a CPU allocates its buffers anew for every call: small training steps spend a quarter of
    their time in page faults otherwise. Elsewhere than on glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 64 * 2**20)


def free_bytes(device: Mapping[str, int] | None) -> int | None:
    """Memory that is free: of a device by its statistics, else of this machine; None if unknown."""
    if device and "bytes_limit" in device:
        return device["bytes_limit"] - device.get("bytes_in_use", 0)
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
