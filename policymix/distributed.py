"""Several processes that train together, on one machine or on many: JAX's own runtime.

All run the same program on the same arguments. What only one of them may do, such as printing, the
first one does. A process that is alone needs nothing of this, and pays nothing for it.
"""

import atexit
import contextlib
import hashlib
import os
import pathlib
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

_SPEC = re.compile(r"(?P<address>(?:\[[^\]]+\]|[^\s,:/]+):\d+),(?P<index>\d+)/(?P<count>\d+)")
_EXPECTED = (
    'expected "auto" (Slurm, a TPU pod, Kubernetes or Open MPI say who the others are) or '
    '"HOST:PORT,INDEX/COUNT": where process 0 listens, which process this is, and how many there '
    "are, as in 10.0.0.1:12345,0/2"
)
_TIMEOUT_S = 300  # within which all must have started
_SEEN_S = 60  # within which a shared disk shows what another machine has written: NFS's acdirmax
_LEAD_S = 1.0  # that the others have for an error of their own
_SHOWN = 80  # letters of a value in an error
# What JAX raises in a process whose others are gone; its other errors, of memory say, are its own.
_PEERS = re.compile(
    r"gloo|nccl|\bpeer\b|socket closed|heartbeat|coordination service|barrier|"
    r"UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED",
    re.IGNORECASE,
)


def initialize(spec: str, *, timeout_s: int = _TIMEOUT_S) -> None:
    """Joins this process to the others; to be called before anything touches a device.

    A process whose others do not come within `timeout_s` seconds ends here, with a line that says
    so.

    Args:
      spec: "" for a process that is alone, "auto" or "HOST:PORT,INDEX/COUNT".

    Raises:
      ValueError: the spec is none of these, "auto" finds no cluster, or JAX refuses it.
      OSError: JAX cannot start its service, as when the port is taken.
    """
    if not spec:
        return
    found = None if spec == "auto" else parse(spec)
    where = (
        f"at {found[0]} ({found[1]}, this is process {found[2]})" if found else "of this cluster"
    )
    # JAX would abort the process, with a page of C++; from there no Python error can be raised.
    late = threading.Timer(timeout_s, _give_up, (where, timeout_s))
    late.daemon = True
    late.start()
    try:
        if found is None:
            jax.distributed.initialize(initialization_timeout=timeout_s + 60)
        else:
            # Inside a Slurm job JAX would otherwise also choose the devices, by the job's tasks.
            jax.distributed.initialize(
                *found,
                cluster_detection_method="deactivate",
                initialization_timeout=timeout_s + 60,
            )
    except ValueError as error:
        if found:
            raise ValueError(f"--distributed is {spec!r}: {_first_line(error)}") from error
        # of a cluster's variables that are not there
        raise ValueError(f"--distributed=auto found no cluster ({error}); {_EXPECTED}") from error
    except RuntimeError as error:
        raise OSError(f"the processes {where} cannot be joined: {_first_line(error)}") from error
    finally:
        late.cancel()


def parse(spec: str) -> tuple[str, int, int]:
    """A spec "HOST:PORT,INDEX/COUNT" as JAX takes it: ("HOST:PORT", COUNT, INDEX).

    ValueError for any other.
    """
    match = _SPEC.fullmatch(spec)
    if not match:
        raise ValueError(f"--distributed is {spec!r}; {_EXPECTED}")
    address, index, count = match["address"], int(match["index"]), int(match["count"])
    port = int(address.rpartition(":")[2])
    if not 0 < port < 2**16:
        raise ValueError(f"--distributed is {spec!r}, whose port is {port}; expected 1 to 65535")
    if not count:
        raise ValueError(f"--distributed is {spec!r}; there is at least one process")
    if index >= count:
        raise ValueError(
            f"--distributed is {spec!r}: of {count} processes, INDEX is 0 to {count - 1}"
        )
    return address, count, index


def _first_line(error: Exception) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def _give_up(where: str, seconds: int) -> None:
    print(
        f"error: the processes {where} are not all there after {seconds} s: start every one of "
        "them, see that the address can be reached from all machines, and unset http_proxy",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def is_first() -> bool:
    """Whether this process is the one that prints, and writes what is no array."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def sync(name: str) -> None:
    """Waits until every process is here; all give the same `name`."""
    if jax.distributed.is_initialized():
        multihost_utils.sync_global_devices(name)


def agreed(value: int | str | None, what: str) -> None:
    """Sees that all processes have the same `value` of `what`; all of them are to call it.

    Raises:
      ValueError, in all: they do not, as when one reads another disk.
    """
    if not jax.distributed.is_initialized():
        return
    text = str(value).encode()
    known = _gathered(hashlib.sha256(text).digest() + len(text).to_bytes(8, "little"))
    if len(set(known)) == 1:
        return
    longest = max(int.from_bytes(each[-8:], "little") for each in known)
    texts = [each.rstrip(b"\0").decode() for each in _gathered(text.ljust(longest, b"\0"))]
    if is_first():
        time.sleep(_LEAD_S)  # JAX aborts the others, with a page of C++, once this one has ended
    raise ValueError(
        f"{what} is not the same in all processes: {_difference(texts)}; all need the same flags, "
        "and a --workdir and data on a disk that all see"
    )


def _gathered(row: bytes) -> list[bytes]:
    """The row of every process; all are of one length."""
    rows = multihost_utils.process_allgather(np.frombuffer(row, np.uint8))
    return [bytes(each) for each in rows.astype(np.uint8)]


def _difference(texts: Sequence[str]) -> str:
    """The values, each with the first process that has it, from a little before they part."""
    same = os.path.commonprefix(texts)  # noqa: RUF071 - of letters, not of folders
    start = max(0, len(same) - _SHOWN // 2)
    first: dict[str, int] = {}
    for process, text in enumerate(texts):
        first.setdefault(text, process)
    told = []
    for text, process in list(first.items())[:4]:
        end = "…" * (len(text) > start + _SHOWN)
        shown = "…" * (start > 0) + text[start : start + _SHOWN] + end
        told.append(f"{shown or 'nothing'} in process {process}")
    return ", ".join(told) + " and others" * (len(first) > len(told))


def seen_by_all(path: pathlib.Path) -> None:
    """Waits until every process sees `path`, which one of them has written before.

    Raises:
      ValueError, in all: one of them does not within a minute, so that it has another disk.
    """
    if not jax.distributed.is_initialized():
        return
    end = time.monotonic() + _SEEN_S
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.5)
    agreed("there" if path.exists() else "missing", str(path))


def quiet_others() -> None:
    """From here on only the first process has a stdout; errors of all still reach stderr."""
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - to the end


@contextlib.contextmanager
def failing_at_once() -> Iterator[None]:
    """Lets an error in this block end the process, among several, as soon as it is told.

    JAX would wait at the exit for the others, which wait in a collective for this one. They hear of
    it by the connection that breaks (CPUs), or by heartbeats that fail to come, in 100 s at most.

    Raises:
      ConnectionError: what JAX says of a connection that broke.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        code = 130 if isinstance(error, KeyboardInterrupt) else 1  # as in a process that is alone
        atexit.register(_leave, code)  # called before those that JAX registered earlier
        if isinstance(error, jax.errors.JaxRuntimeError) and _PEERS.search(str(error)):
            raise ConnectionError(
                "another process of this run seems to have ended, and its own log says why; what "
                f"is heard of it here: {_first_line(error)}"
            ) from error
        raise


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Stop:
    """Whether a run is to end early. SIGTERM asks it to, which schedulers send before they take a
    machine away.

    In a process that is alone, within the block. Among several JAX's own handler is there from the
    start; a signal to one of them is one to all. More signals change nothing, since schedulers send
    several; SIGKILL ends a process at once, and so does Ctrl-C in one that is alone. Outside the
    main thread, where Python has no handlers, a process that is alone is never asked.
    """

    def __init__(self, first: int = 0):
        """`first`: the steps that were done before the block, the same in all processes."""
        self._first, self._asked, self._before, self._ours = first, False, None, False

    def __enter__(self) -> "Stop":
        if jax.distributed.is_initialized():
            # JAX lets all stop one step after the last that any has asked about, which is 0 before
            # the first question: a signal that came while a run was resumed would mean step 1.
            if self._first:
                self._asked = multihost_utils.reached_preemption_sync_point(1)
            multihost_utils.reached_preemption_sync_point(self._first)
        elif threading.current_thread() is threading.main_thread():
            self._before, self._ours = signal.signal(signal.SIGTERM, self._ask), True
        return self

    def __exit__(self, *_) -> None:
        if self._ours:  # None: a handler that is not Python's, which cannot be put back
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)
            self._ours = False

    def _ask(self, *_) -> None:
        self._asked = True

    def requested(self, step: int) -> bool:
        """Whether to stop now that `step` steps are done: the same answer in every process.

        To be asked once after each step, with the numbers under which checkpoints are saved: Orbax
        asks JAX too, and JAX compares them.
        """
        if jax.distributed.is_initialized():
            reached = multihost_utils.reached_preemption_sync_point(step)
            self._asked = self._asked or reached
        return self._asked
