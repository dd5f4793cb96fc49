"""What the RLDS datasets of Open X-Embodiment and DROID mean: standardisation of whole
trajectories, and mixtures. Pure functions of numpy arrays.

A trajectory is {"observation": {name: [T, ...]}, "action": ..., "language_instruction": [T], ...},
with T steps; pictures may be pixels, bytes, or anything else with an entry per step. Conventions
are those of Octo and open-pi-zero (src/data/oxe, src/data/utils/data_utils.py), OpenVLA for the
variants of Bridge, and OpenPI for DROID; docs/conventions.md lists them.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

OPEN, CLOSED = 0.95, 0.05  # beyond them a gripper command of Bridge is one of the two
_MOVES = 0.1  # of Fractal's relative gripper commands, those that count
_IDLE = 1e-3  # rad/s: joint velocity commands of DROID that change by less are one command
_MIN_IDLE, _MIN_MOVING, _LAST = 7, 16, 10  # frames: OpenPI's idle filter
STATE, ACTION, IMAGES = "observation.state", "action", "observation.images."
INSTRUCTION, IS_KEPT = "language_instruction", "is_kept"

Trajectory = Mapping[str, Any]
Standardized = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Standard:
    """How a dataset becomes examples that a policy learns from.

    Attributes:
      transform: (trajectory, episode metadata) → {STATE: float32 [T', p], ACTION: float32 [T', a],
        INSTRUCTION: bytes [T'], IMAGES + camera: [T', ...], and IS_KEPT: bool [T'] where frames are
        chosen}, T' <= T.
      cameras: {camera: its name among the observations}.
      fps: steps per second.
      robot: whose it is.
      proprio, action: what their dimensions are, in words.
      normalized: the action's dimensions that are normalised; a gripper command is not.
      refuses: (trajectory, metadata) → why an episode is left out, "" for most.
    """

    transform: Callable[[Trajectory, Mapping[str, Any]], Standardized]
    cameras: Mapping[str, str]
    fps: float
    robot: str
    proprio: str
    action: str
    normalized: tuple[bool, ...]
    refuses: Callable[[Trajectory, Mapping[str, Any]], str] = lambda trajectory, metadata: ""


def standardize(
    name: str, trajectory: Trajectory, metadata: Mapping[str, Any] | None = None
) -> Standardized:
    """A trajectory of the dataset `name` of `DATASETS`, standardised.

    Args:
      metadata: of the episode; DROID's file_path chooses among its instructions and cameras.

    Raises:
      ValueError: no such dataset, or the trajectory lacks something that it should have.
    """
    standard = find(name)
    try:
        return standard.transform(trajectory, metadata or {})
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"the standardisation {name!r} does not fit the trajectory ({error}), which has "
            f"{sorted(_keys(trajectory))}: is it another dataset?"
        ) from error


def find(name: str) -> Standard:
    """An entry of `DATASETS`, or ValueError that lists them."""
    if name not in DATASETS:
        raise ValueError(f"no standardisation is called {name!r}; there are {sorted(DATASETS)}")
    return DATASETS[name]


def _keys(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in tree.items():
        found += _keys(value, f"{prefix}{key}/") if isinstance(value, Mapping) else [prefix + key]
    return found


def binarized_gripper(actions: np.ndarray) -> np.ndarray:
    """Absolute gripper commands [T], 1 open … 0 closed → float32 [T] of 0 and 1.

    Values between `CLOSED` and `OPEN` become what is reached after them; those at the end, after
    which nothing is reached, become the last command as it is. What is no number stays so.
    """
    actions = np.asarray(actions)
    clear = (actions > OPEN) | (actions < CLOSED)
    reached = np.where(clear, np.arange(len(actions)), len(actions))
    reached = np.minimum.accumulate(reached[::-1])[::-1]
    values = np.append((actions > OPEN).astype(np.float32), actions[-1:].astype(np.float32))
    return _with_gaps(values[reached], actions) if len(actions) else values


def absolute_gripper(actions: np.ndarray) -> np.ndarray:
    """Relative gripper commands [T], +1 closes, -1 opens → float32 [T], 1 open, 0 closed.

    A command holds until the next. Before the first one the gripper is in the other state, since
    it would not be told what it is already; without any it is open. What is no number stays so.
    """
    actions = np.asarray(actions)
    commands = (actions < -_MOVES).astype(np.float32) - (actions > _MOVES)  # 1 opens, -1 closes
    last = np.maximum.accumulate(np.where(commands != 0, np.arange(len(commands)), -1))
    first = commands[np.argmax(commands != 0)] if len(commands) else 0
    before = -first if first else 1
    held = np.where(last < 0, before, commands[last]) / 2 + 0.5 if len(commands) else commands
    return _with_gaps(held, actions)


def _with_gaps(commands: np.ndarray, recorded: np.ndarray) -> np.ndarray:
    """Commands, but NaN or infinity where that was recorded, so that a check can find it."""
    return np.where(np.isfinite(recorded), commands, recorded).astype(np.float32)


def _bridge_steps(state, gripper, instruction, images) -> Standardized:
    """Actions are the differences of the states that were reached; the last step has none."""
    state = np.asarray(state, np.float32)
    action = np.concatenate([state[1:, :6] - state[:-1, :6], gripper[:-1, None]], axis=1)
    found = {STATE: state[:-1], ACTION: action, INSTRUCTION: instruction[:-1]}
    return found | {IMAGES + camera: values[:-1] for camera, values in images.items()}


def _bridge(first: int) -> Callable:
    """BridgeData V2 as RAIL distributes it, from step `first` on."""

    def transform(trajectory: Trajectory, metadata: Mapping[str, Any]) -> Standardized:
        observation = trajectory["observation"]
        cameras = {c: observation[n][first:] for c, n in _BRIDGE.items() if n in observation}
        gripper = binarized_gripper(trajectory["action"][first:, -1])
        words = trajectory["language_instruction"][first:]
        return _bridge_steps(observation["state"][first:], gripper, words, cameras)

    return transform


def _bridge_of_oxe(trajectory: Trajectory, metadata: Mapping[str, Any]) -> Standardized:
    """Its first step has an action of zeros, and is left out."""
    observation = trajectory["observation"]
    gripper = np.asarray(trajectory["action"]["open_gripper"], np.float32).reshape(-1)[1:]
    words = observation["natural_language_instruction"][1:]
    images = {"primary": observation["image"][1:]}
    return _bridge_steps(observation["state"][1:], gripper, words, images)


def _fractal(trajectory: Trajectory, metadata: Mapping[str, Any]) -> Standardized:
    observation, action = trajectory["observation"], trajectory["action"]
    gripper = absolute_gripper(action["gripper_closedness_action"][:, 0])
    moves = [action["world_vector"], action["rotation_delta"], gripper[:, None]]
    pose = [observation["base_pose_tool_reached"], observation["gripper_closed"]]
    return {
        STATE: np.concatenate(pose, axis=1, dtype=np.float32),
        ACTION: np.concatenate(moves, axis=1, dtype=np.float32),
        INSTRUCTION: observation["natural_language_instruction"],
        f"{IMAGES}primary": observation["image"],
    }


def _droid(command: str) -> Callable:
    """DROID with joint_position or joint_velocity commands."""

    def transform(trajectory: Trajectory, metadata: Mapping[str, Any]) -> Standardized:
        observation, commands = trajectory["observation"], trajectory["action_dict"]
        pose = [observation["joint_position"], observation["gripper_position"]]
        moves = [commands[command], commands["gripper_position"]]
        choice = _choice(metadata)
        outside = ["exterior_image_1_left", "exterior_image_2_left"]
        outside = outside[::-1] if choice.integers(2) else outside
        return {
            STATE: np.concatenate(pose, axis=1, dtype=np.float32),
            ACTION: np.concatenate(moves, axis=1, dtype=np.float32),
            INSTRUCTION: _one_instruction(trajectory, choice),
            IS_KEPT: moving(commands["joint_velocity"]),
            f"{IMAGES}primary": observation[outside[0]],
            f"{IMAGES}secondary": observation[outside[1]],
            f"{IMAGES}wrist": observation["wrist_image_left"],
        }

    return transform


def _choice(metadata: Mapping[str, Any]) -> np.random.Generator:
    """Of an episode: the same on every machine and in every order of reading."""
    return np.random.default_rng(zlib.crc32(_path(metadata)))


def _path(metadata: Mapping[str, Any]) -> bytes:
    """Of the episode's raw files; b"" where it is not told."""
    path = metadata.get("file_path", b"")
    return path if isinstance(path, bytes) else str(path).encode()


def _one_instruction(trajectory: Trajectory, choice: np.random.Generator) -> np.ndarray:
    """One of the three annotations; only those that say something are drawn from."""
    names = [
        INSTRUCTION,
        *(f"{INSTRUCTION}_{n}" for n in (2, 3) if f"{INSTRUCTION}_{n}" in trajectory),
    ]
    given = [name for name in names if not is_unlabeled(trajectory[name])]
    return trajectory[given[choice.integers(len(given))] if given else INSTRUCTION]


def _failed(trajectory: Trajectory, metadata: Mapping[str, Any]) -> str:
    """DROID keeps failures in folders called "failure"; OpenPI trains on "success" alone."""
    told = "file_path" in metadata and b"success" not in _path(metadata)
    return "the attempt failed" if told else ""


def moving(joint_velocity: np.ndarray) -> np.ndarray:
    """The steps of a DROID episode that OpenPI trains on, from joint velocity commands [T, 7]:
    bool [T].

    Out are runs of 7 or more steps that repeat the command before them, what is left between such
    runs where it is shorter than 16 steps, and the last 10 steps of what is kept, whose action
    chunks are mostly idle (examples/droid/compute_droid_nonidle_ranges.py).
    """
    velocity = np.asarray(joint_velocity)
    idle = np.zeros(len(velocity), bool)
    idle[1:] = (np.abs(np.diff(velocity, axis=0)) < _IDLE).all(axis=1)
    kept = np.ones(len(velocity), bool)
    for start, end in _runs(idle):
        kept[start:end] &= end - start < _MIN_IDLE
    chosen = np.zeros(len(velocity), bool)
    for start, end in _runs(kept):
        if end - start >= _MIN_MOVING:
            chosen[start : end - _LAST] = True
    return chosen


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """The runs of true values, as (first, one past the last)."""
    steps = np.diff(np.concatenate([[0], mask.astype(np.int8), [0]]))
    starts, ends = np.flatnonzero(steps == 1), np.flatnonzero(steps == -1)
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def is_unlabeled(instructions: Sequence[bytes | str]) -> bool:
    """Whether no step of an episode has an instruction."""
    return not any(len(words) for words in instructions)


_BRIDGE = {"primary": "image_0", "secondary": "image_1"}
_EEF = "the pose's change: x, y, z in m, roll, pitch, yaw in rad; gripper command, 1 open, 0 closed"
_GRIPPER_LAST = (True,) * 6 + (False,)
_DROID = Standard(
    transform=_droid("joint_position"),
    cameras={
        "primary": "exterior_image_1_left",
        "secondary": "exterior_image_2_left",
        "wrist": "wrist_image_left",
    },
    fps=15,
    robot="franka",
    proprio="7 joint angles in rad; gripper, 0 open, 1 closed",
    action="7 joint angles in rad; gripper, 0 open, 1 closed",
    normalized=(True,) * 7 + (False,),
    refuses=_failed,
)
_BRIDGE_V2 = Standard(
    transform=_bridge(0),
    cameras=_BRIDGE,
    fps=5,
    robot="widowx",
    proprio="x, y, z in m, roll, pitch, yaw (sxyz) in rad; gripper, 1 open, 0 closed",
    action=_EEF,
    normalized=_GRIPPER_LAST,
)
DATASETS: Mapping[str, Standard] = {
    "bridge_dataset": _BRIDGE_V2,  # RAIL's; Octo and open-pi-zero keep its first step
    "bridge_orig": dataclasses.replace(_BRIDGE_V2, transform=_bridge(1)),  # OpenVLA does not
    "bridge": dataclasses.replace(
        _BRIDGE_V2, transform=_bridge_of_oxe, cameras={"primary": "image"}
    ),
    "fractal20220817_data": Standard(
        transform=_fractal,
        cameras={"primary": "image"},
        fps=3,
        robot="google_robot",
        proprio="x, y, z in m, quaternion x, y, z, w; gripper, 0 open, 1 closed",
        action=_EEF,
        normalized=_GRIPPER_LAST,
    ),
    "droid": _DROID,
    "droid_joint_velocity": dataclasses.replace(
        _DROID,
        transform=_droid("joint_velocity"),
        action="7 joint velocities in rad/s; gripper, 0 open, 1 closed",
    ),
}
DATASETS = {**DATASETS, "droid_100": _DROID}

MIXTURES: Mapping[str, Sequence[tuple[str, float]]] = {
    "bridge": (("bridge_dataset", 1.0),),
    "fractal": (("fractal20220817_data", 1.0),),
    "oxe_simple": (("fractal20220817_data", 1.0), ("bridge_dataset", 1.0)),
    "droid": (("droid", 1.0),),
}


def mixture(name: str) -> Sequence[tuple[str, float]]:
    """The (dataset, weight) of a named mixture. ValueError lists those that there are."""
    if name not in MIXTURES:
        raise ValueError(f"no mixture is called {name!r}; there are {sorted(MIXTURES)}")
    return MIXTURES[name]


def fractions(weights: Sequence[float], num_frames: Sequence[int]) -> np.ndarray:
    """How often each dataset of a mixture is drawn from: float64 [n], summing to 1.

    In proportion to weight times size, so that equal weights go through all datasets at the same
    pace (Octo's balance_weights).
    """
    shares = np.asarray(weights, np.float64) * np.asarray(num_frames, np.float64)
    if not len(shares) or not (shares >= 0).all() or not shares.sum() > 0:
        raise ValueError(
            f"a mixture needs weights and sizes of 0 or more, some positive; got weights "
            f"{list(weights)} and {list(num_frames)} frames"
        )
    return shares / shares.sum()
