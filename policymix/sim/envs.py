"""Tasks of the simulators by name, and the environments that play them."""

import dataclasses
import difflib
import importlib.metadata
import os
from typing import Any, Protocol

import numpy as np

# What the tests ran with; other versions may start, move and score differently.
TESTED = {
    "metaworld": {"metaworld": "3.1.1", "mujoco": "3.3.0", "gymnasium": "1.4.0"},
    "pusht": {"gym-pusht": "0.1.8", "pymunk": "6.11.1", "gymnasium": "1.4.0"},
    "aloha": {"gym-aloha": "0.1.5", "mujoco": "3.3.0", "gymnasium": "1.4.0"},
}
TESTED["aloha_fast"] = TESTED["aloha"]  # the same arms, in small pictures without shadows

# Names are known without the simulator, so that a wrong one is found wherever a command is typed.
_METAWORLD = """
assembly basketball bin-picking box-close button-press button-press-topdown
button-press-topdown-wall button-press-wall coffee-button coffee-pull coffee-push dial-turn
disassemble door-close door-lock door-open door-unlock drawer-close drawer-open faucet-close
faucet-open hammer hand-insert handle-press handle-press-side handle-pull handle-pull-side
lever-pull peg-insert-side peg-unplug-side pick-out-of-hole pick-place pick-place-wall
plate-slide plate-slide-back plate-slide-back-side plate-slide-side push push-back push-wall
reach reach-wall shelf-place soccer stick-pull stick-push sweep sweep-into window-close
window-open
"""
TASKS = {
    "metaworld": tuple(f"{name}-v3" for name in _METAWORLD.split()),
    "pusht": ("PushT-v0",),
    "aloha": ("AlohaTransferCube-v0", "AlohaInsertion-v0"),
}
TASKS["aloha_fast"] = TASKS["aloha"]


# After as many steps an episode has failed, unless a command says otherwise.
MAX_STEPS = {"metaworld": 150, "pusht": 300, "aloha": 400, "aloha_fast": 400}
_MOST_STEPS = {"metaworld": 500}  # then the simulator itself refuses to go on

_OPENGL = (
    "unset that, or set it to an OpenGL that this system has: egl or osmesa, on Debian and Ubuntu "
    "from `apt install libegl1 libegl-mesa0 libgl1-mesa-dri` or `apt install libosmesa6`"
)


class Env(Protocol):
    """An environment: one episode at a time of one task.

    Attributes:
      prompt: the instruction, as a sentence or a phrase.
      fps: steps per simulated second.
      features: what observations and actions hold, as LeRobot declares features.
      action_range: the least and the largest numbers of an action, alike in all its dimensions or
        [a]; others are clipped.
      info_keys: what the simulator tells of a step beside its score and success.
      info: it, a number each, of the last step.
    """

    prompt: str
    fps: int
    features: dict[str, dict[str, Any]]
    action_range: tuple[float, float] | tuple[np.ndarray, np.ndarray]
    info_keys: tuple[str, ...]
    info: dict[str, float]

    def reset(self, seed: int) -> dict[str, np.ndarray]:
        """Starts an episode that depends on the seed alone; returns its first observation."""

    def step(
        self, action: np.ndarray, observe: bool = True
    ) -> tuple[dict[str, np.ndarray] | None, float, bool]:
        """Observation (None without `observe`), score in [0, 1], and success, after an action [a].

        The action is clipped to what the task allows. An episode is over at its first success.
        """


@dataclasses.dataclass(frozen=True)
class Task:
    """A task of a simulator, and the part of its range of starts that episodes start in.

    `low` and `high` are fractions of the range of x of what is placed at random: in Meta-World the
    object and the goal, in PushT the block, in ALOHA the cube, or peg and socket.
    """

    simulator: str
    name: str
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        _check(self.simulator, self.name)
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(
                f"task {self}: the part of the starts is two fractions LOW:HIGH with "
                "0 <= LOW < HIGH <= 1, as in 0:0.2"
            )

    def __str__(self) -> str:
        if (self.low, self.high) == (0, 1):
            return self.name
        return f"{self.name}@{_short(self.low)}:{_short(self.high)}"


def parse(simulator: str, text: str) -> Task:
    """A task from its text: NAME, or NAME@LOW:HIGH. ValueError says what is wrong with it."""
    name, at, part = text.strip().partition("@")
    _check(simulator, name)
    if not at:
        return Task(simulator, name)
    try:
        low, high = map(float, part.split(":"))
    except ValueError:
        raise ValueError(
            f"task {text!r}: after @ stand two fractions LOW:HIGH with 0 <= LOW < HIGH <= 1, as in "
            f"{name}@0:0.2"
        ) from None
    return Task(simulator, name, low, high)


def parse_all(text: str) -> list[Task]:
    """Tasks of one simulator from SIMULATOR/TASK,TASK. ValueError says what is wrong with it."""
    simulator, slash, names = text.partition("/")
    if not slash or not names:
        raise ValueError(
            f"env {text!r}: expected SIMULATOR/TASK,TASK, as in metaworld/push-v3,reach-v3, "
            "pusht/PushT-v0 or aloha_fast/AlohaTransferCube-v0"
        )
    tasks = [parse(simulator, name) for name in names.split(",")]
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"env {text!r} names a task twice")
    return tasks


def make(task: Task) -> Env:
    """The environment of a task. OSError: the simulator is missing, or a library that it needs, or
    what its pictures are rendered with; the message says what to install or to set.
    """
    asked = _asked_opengl()  # before an import of MuJoCo sets what is unset
    try:
        module = _imported(task.simulator, asked)
        if task.simulator == "metaworld":
            return module.Env(task.name, task.low, task.high)
        if task.simulator == "pusht":
            return module.Env(task.low, task.high)
        return module.Env(task.name, task.simulator == "aloha_fast", task.low, task.high)
    except ImportError as error:
        raise OSError(_missing(task.simulator, error)) from error


def _imported(simulator: str, asked: str) -> Any:
    """The module that plays a simulator's tasks. Importing MuJoCo loads the OpenGL that is asked
    for, whether it is to render or not, and raises whatever comes up where that is not there.
    """
    try:
        if simulator == "metaworld":
            from policymix.sim import metaworld

            return metaworld
        if simulator == "pusht":
            from policymix.sim import pusht

            return pusht
        from policymix.sim import aloha

        return aloha
    except Exception as error:
        absent = isinstance(error, ModuleNotFoundError)
        if absent or simulator == "pusht" or not asked:
            raise
        raise OSError(
            f"{simulator} cannot be imported with {asked} ({type(error).__name__}: {error}): "
            f"{_OPENGL}"
        ) from error


def _asked_opengl() -> str:
    """Which OpenGL the environment variables ask for, as NAME=VALUE; "" for none."""
    for name in ("MUJOCO_GL", "PYOPENGL_PLATFORM"):
        if os.environ.get(name):
            return f"{name}={os.environ[name]}"
    return ""


def limit(simulator: str, max_steps: int = 0) -> int:
    """Steps of an episode; 0 asks for the default. ValueError for more than the simulator has."""
    _check_simulator(simulator)
    steps, most = max_steps or MAX_STEPS[simulator], _MOST_STEPS.get(simulator, max_steps)
    if max_steps > most:
        raise ValueError(f"max_steps is {max_steps}; {simulator} ends its episodes after {most}")
    return steps


def versions(simulator: str) -> dict[str, str]:
    """Installed versions of a simulator's packages; "none" for those that are not there."""
    _check_simulator(simulator)
    return {package: _version(package) for package in TESTED[simulator]}


def _check(simulator: str, name: str) -> None:
    _check_simulator(simulator)
    known = TASKS[simulator]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]}?" if close else ""
        names = ", ".join(known) if len(known) <= 5 else f"{known[0]} … {known[-1]}"
        raise ValueError(f"{simulator} has no task {name!r} among its {len(known)}: {names}{hint}")


def _check_simulator(simulator: str) -> None:
    if simulator not in TASKS:
        raise ValueError(f"unknown simulator {simulator!r}; choose one of {', '.join(TASKS)}")


def _short(fraction: float) -> str:
    """The shortest text that reads back as the same number: 0, 0.2, 1."""
    return repr(float(fraction)).removesuffix(".0")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _missing(simulator: str, error: ImportError) -> str:
    if ".so" in str(error):  # a wheel that is there, over a library of the system that is not
        return (
            f"{simulator} needs a library of the system ({error}): install it, on Debian and "
            "Ubuntu with `apt install libgl1 libglib2.0-0`"
        )
    return (
        f"{simulator} is not installed, or not whole ({error}): run `make venv EXTRAS=sim`, or "
        "`pip install 'policymix[sim]'`"
    )
