"""Where metrics go beside a run's own file: TensorBoard's event files, and Weights & Biases."""

import importlib.util
import json
import pathlib
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from policymix import files

_FLUSH_SECONDS = 10  # a killed run lacks so much of its events; metrics.jsonl lacks nothing
_EVENTS = "events.out.tfevents"  # TensorBoard looks for this in a file's name


def check(*, tensorboard: bool, wandb: str) -> None:
    """OSError, with the command that helps, if a package is not installed that these need."""
    if tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise OSError(
            "config.train.tensorboard needs the package tensorboardX: pip install tensorboardX, or "
            "pass --config.train.tensorboard=False"
        )
    if wandb and importlib.util.find_spec("wandb") is None:
        raise OSError(
            f"config.train.wandb is {wandb!r} and the package wandb is not installed: pip install "
            "'policymix[wandb]', or leave config.train.wandb empty"
        )


class TensorBoard:
    """Event files in `directory`, one for each start of the run: `tensorboard --logdir=DIRECTORY`.

    What an earlier start wrote of steps after `resume_step` is purged by TensorBoard when it reads.
    Written by the caller's thread, so that a full disk is an OSError here and not a thread's death.
    """

    def __init__(self, directory: pathlib.Path, *, resume_step: int = 0):
        import tensorboardX  # takes a while
        from tensorboardX.proto import event_pb2

        self._event = event_pb2.Event
        directory.mkdir(parents=True, exist_ok=True)
        earlier = sum(_EVENTS in path.name for path in directory.iterdir())
        # Read in the order of their names; the number tells apart starts within one second.
        name = f"{_EVENTS}.{int(time.time()):010}.{socket.gethostname()}.{earlier:04}"
        self.path = directory / name
        self._records, self._flushed = tensorboardX.RecordWriter(str(self.path)), 0.0
        self._add(file_version="brain.Event:2")
        if earlier:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(step=resume_step + 1, session_log=start)
        self._flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars of a step."""
        told = [{"tag": name, "simple_value": value} for name, value in values.items()]
        self._add(step=step, summary={"value": told})
        if time.monotonic() - self._flushed >= _FLUSH_SECONDS:
            self._flush()

    def close(self, *, failed: bool = False) -> None:
        """Event files have no word for a run that failed."""
        self._records.close()

    def _add(self, **fields) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())

    def _flush(self) -> None:
        self._records.flush()
        self._flushed = time.monotonic()


class WandB:
    """A run of Weights & Biases, which goes on under its id where `directory` has one of `project`.

    What it lacks, a network or an account, is printed once and does not end the run.
    """

    def __init__(
        self, directory: pathlib.Path, project: str, *, name: str = "", config: Any = None
    ):
        import wandb

        settings = {
            "project": project,
            "name": name or None,
            "id": _run_id(directory / "wandb.json", project),
            "config": config,
            "resume": "allow",
            "dir": str(directory),
        }
        self._run = _tried("begin", lambda: wandb.init(**settings))
        if self._run is None:
            offline = _tried("begin offline", lambda: wandb.init(**settings, mode="offline"))
            if offline is not None:
                print(f"Weights & Biases is kept offline in {directory}/wandb: wandb sync sends it")
            self._run = offline

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars of a step."""
        if self._run is None:
            return
        if _tried("log", lambda: self._run.log(dict(values), step=step) or True) is None:
            self._run = None  # said once; the run has other things to do

    def close(self, *, failed: bool = False) -> None:
        run, self._run = self._run, None
        if run is not None:
            _tried("finish", lambda: run.finish(exit_code=int(failed)))


def _tried(what: str, action: Callable[[], Any]) -> Any:
    """What the action gives; None, and a line, where it fails: that may be any error of its own."""
    try:
        return action()
    except Exception as error:
        print(
            f"WARNING: Weights & Biases cannot {what} ({files.reason(error)}); training goes on, "
            "metrics.jsonl has everything"
        )
        return None


def _run_id(path: pathlib.Path, project: str) -> str:
    """The id kept in a file; a new one where there is none, or one of another project."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["project"] == project:
            return str(known["id"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # the first start, or a file that a full disk left empty
    made = secrets.token_hex(4)
    files.write_json(path, {"project": project, "id": made})
    return made
