"""Robots as small tables: how published datasets name what they recorded, and what lies between
their numbers and the model's.

A table's adapter leads from the robot's state and actions to those that policies are trained on,
and back. Sources: OpenPI's policies/ and training/config.py; open-pi-zero's oxe_dataset_configs.py
and env_adapter/simpler.py.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from policymix.transforms import compose

BASE, LEFT_WRIST, RIGHT_WRIST = "base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"


@dataclasses.dataclass(frozen=True)
class Robot:
    """One robot's table.

    Attributes:
      state: {feature: its dimension}; several are laid side by side.
      action: the feature of the actions; action_dim: their dimension.
      cameras: {camera of π0 and π0.5: picture feature}; the others the robot does not have.
      fps: of the recordings, 1/s.
      positions: which actions are targets for the state's dimensions; the others (grippers,
        velocities) can never be relative to it. (): none.
      relative: whether policies are trained on these as differences from the state.
      adapter: the robot's numbers ↔ the model's; adapted: whether policies are trained so.
      scheme: how open-pi-zero normalises; "": as the model does elsewhere.
      normalized: {"state" or "actions": [d]}, dimensions that are; keys left out: all of them.
    """

    state: Mapping[str, int]
    action: str
    action_dim: int
    cameras: Mapping[str, str]
    fps: float
    positions: tuple[bool, ...] = ()
    relative: bool = False
    adapter: compose.Transform | None = None
    adapted: bool = True
    scheme: str = ""
    normalized: Mapping[str, tuple[bool, ...]] = dataclasses.field(default_factory=dict)

    @property
    def proprio_dim(self) -> int:
        return sum(self.state.values())


def find(name: str) -> Robot:
    """An entry of `ROBOTS`. ValueError with what was perhaps meant."""
    if name in ROBOTS:
        return ROBOTS[name]
    near = difflib.get_close_matches(name, ROBOTS, n=1)
    raise ValueError(
        f"no robot is called {name!r}; there are {', '.join(ROBOTS)}"
        + (f"; did you mean {near[0]!r}?" if near else "")
    )


def transforms(
    robot: Robot,
    *,
    relative: bool | None = None,
    adapted: bool | None = None,
    prompt: str = "task",
) -> compose.Chain:
    """Features of its dataset → {"state", "actions", "images", "prompt"} as the model is trained
    on, before normalisation.

    Args:
      relative, adapted: other than the robot's table says, for policies trained otherwise.
      prompt: what the dataset calls the instruction.
    """
    (first, *others), steps = robot.state, []
    if others:
        steps.append(compose.ConcatState(robot.state))
        first = "state"
    structure = {"state": first, "actions": robot.action, "prompt": prompt}
    steps.append(compose.Repack(structure | ({"images": robot.cameras} if robot.cameras else {})))
    moved = robot.relative if relative is None else relative
    if moved and not any(robot.positions):
        raise ValueError("this robot's actions are no positions, to be relative to its state")
    steps.append(adaptation(robot, robot.positions if moved else (), adapted))
    return compose.chain(steps)


def adaptation(
    robot: Robot | None, relative: tuple[bool, ...], adapted: bool | None = None
) -> compose.Chain:
    """A robot's "state" and "actions" → those that are normalised: `relative` says which actions
    become differences from the state, `adapted` what its table does not. ValueError: no adapter.
    """
    adapter = robot.adapter if robot else None
    if adapted and not adapter:
        raise ValueError(
            "there is no adapter between this robot's numbers and the model's (config.data.adapt); "
            f"there is one for {', '.join(name for name, one in ROBOTS.items() if one.adapter)}"
        )
    steps: list[compose.Transform] = []
    if adapter and (robot.adapted if adapted is None else adapted):
        steps.append(adapter)
    if any(relative):
        steps.append(compose.DeltaActions(relative))
    return compose.chain(steps)


class _Adapter(compose.Transform):
    """Changes "state" and "actions" where they are there, all else being left."""

    dims: ClassVar[Mapping[str, tuple[int, int]]]  # {key: (the robot's, the model's)}

    def apply(self, example: compose.Example) -> dict[str, Any]:
        return self._each(example, 0, {"state": self.state, "actions": self.actions})

    def invert(self, example: compose.Example) -> dict[str, Any]:
        return self._each(example, 1, {"state": self.robot_state, "actions": self.robot_actions})

    def _each(self, example: compose.Example, side: int, changes: Mapping[str, Callable]):
        changed = dict(example)
        for key, change in changes.items():
            if key in example:
                x, expected = np.asarray(example[key]), self.dims[key][side]
                if x.shape[-1] != expected:
                    raise ValueError(
                        f"{key!r} has shape {x.shape}; {type(self).__name__} expects {expected} "
                        "numbers in its last axis"
                    )
                dtype = np.result_type(x.dtype, np.float32)
                changed[key] = change(x.astype(np.float64)).astype(dtype)
        return changed


@dataclasses.dataclass(frozen=True)
class Aloha(_Adapter):
    """ALOHA's two arms ↔ the joint space that π0 was pretrained in.

    Per arm six joints, of which the second and third turn the other way, and a gripper. ALOHA gives
    a gripper's opening in metres between two limits, and takes the angle of its motor between two
    others; the model has an angle for both. Opening l and angle φ of the linkage, with the horn's
    radius r and the arm's length a: sin φ = (r² + l² - a²) / (2 r l).

    Attributes:
      low, high: angles in rad that are the model's 0 and 1 in the state.
      span: what is 1 in the model's actions, in rad. OpenPI leaves them in rad.
    """

    low: float = 0.5476
    high: float = 1.6296
    span: float = 1.0

    dims: ClassVar = {"state": (14, 14), "actions": (14, 14)}
    _FLIP = np.array([1, -1, -1, 1, 1, 1, 1] * 2)
    _GRIPPERS = (6, 13)
    _OPENING = (0.01844, 0.05800)  # m, ALOHA's limits of the puppets' grippers
    _ANGLE = (-0.6213, 1.4910)  # rad, of their motors
    _ARM, _HORN = 0.036, 0.022  # m, Interbotix's linkage

    def state(self, x: np.ndarray) -> np.ndarray:
        return self._changed(x, self._to_angle)

    def robot_state(self, x: np.ndarray) -> np.ndarray:
        return self._changed(x, self._to_opening)

    def actions(self, x: np.ndarray) -> np.ndarray:
        least, most = self._ANGLE
        return self._changed(x, lambda g: (g * (most - least) + least - self.low) / self.span)

    def robot_actions(self, x: np.ndarray) -> np.ndarray:
        least, most = self._ANGLE
        return self._changed(x, lambda g: (g * self.span + self.low - least) / (most - least))

    def _changed(self, x: np.ndarray, gripper: Callable) -> np.ndarray:
        flipped = self._FLIP * x
        flipped[..., self._GRIPPERS] = gripper(x[..., self._GRIPPERS])
        return flipped

    def _to_angle(self, opening: np.ndarray) -> np.ndarray:
        least, most = self._OPENING
        metres = opening * (most - least) + least
        sine = (self._HORN**2 + metres**2 - self._ARM**2) / (2 * self._HORN * metres)
        return (np.arcsin(np.clip(sine, -1, 1)) - self.low) / (self.high - self.low)

    def _to_opening(self, angle: np.ndarray) -> np.ndarray:
        least, most = self._OPENING
        reach = self._HORN * np.sin(angle * (self.high - self.low) + self.low)
        metres = reach + np.sqrt(reach**2 + self._ARM**2 - self._HORN**2)
        return (metres - least) / (most - least)


# LeRobot's adapt_to_pi_aloha, up to its version 0.3: other limits, and actions between them too.
LEROBOT_ALOHA = Aloha(low=0.4, high=1.5, span=1.1)


class _Simpler(_Adapter):
    """What SIMPLER's robots measure and obey: poses x, y, z in m, quaternion w, x, y, z, gripper's
    openness; pose changes whose turn is an axis times an angle, gripper between -1 and 1.
    """

    opens = 1  # what opens the gripper

    def actions(self, x: np.ndarray) -> np.ndarray:
        turn = _euler(_axis_angle_matrix(x[..., 3:6]))
        gripper = (self.opens * x[..., 6:] + 1) / 2
        return np.concatenate([x[..., :3], turn, gripper], axis=-1)

    def robot_actions(self, x: np.ndarray) -> np.ndarray:
        turn = _axis_angle(_euler_matrix(x[..., 3:6]))
        gripper = self.opens * self.command(x[..., 6:])
        return np.concatenate([x[..., :3], turn, gripper], axis=-1)

    def command(self, openness: np.ndarray) -> np.ndarray:
        """The model's 0 closed … 1 open → -1 closed, 1 open."""
        return openness * 2 - 1


@dataclasses.dataclass(frozen=True)
class SimplerBridge(_Simpler):
    """SIMPLER's WidowX ↔ BridgeData V2: angles are roll, pitch, yaw (sxyz) from a gripper that
    points down; a gripper's command is all or nothing.
    """

    dims: ClassVar = {"state": (8, 7), "actions": (7, 7)}
    _DOWN = np.array([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])

    def state(self, x: np.ndarray) -> np.ndarray:
        turn = _euler(_quaternion_matrix(x[..., 3:7]) @ self._DOWN.T)
        return np.concatenate([x[..., :3], turn, x[..., 7:]], axis=-1)

    def robot_state(self, x: np.ndarray) -> np.ndarray:
        turn = _quaternion(_euler_matrix(x[..., 3:6]) @ self._DOWN)
        return np.concatenate([x[..., :3], turn, x[..., 6:]], axis=-1)

    def command(self, openness: np.ndarray) -> np.ndarray:
        return 2.0 * (openness > 0.5) - 1.0


@dataclasses.dataclass(frozen=True)
class SimplerFractal(_Simpler):
    """SIMPLER's Google robot ↔ RT-1's data: quaternions x, y, z, w, and how closed the gripper is.

    open-pi-zero holds a gripper's command for 15 steps; that is memory, and the roll-out's.
    """

    dims: ClassVar = {"state": (8, 8), "actions": (7, 7)}
    opens = -1

    def state(self, x: np.ndarray) -> np.ndarray:
        return np.concatenate([x[..., :3], x[..., 4:7], x[..., 3:4], 1 - x[..., 7:]], axis=-1)

    def robot_state(self, x: np.ndarray) -> np.ndarray:
        return np.concatenate([x[..., :3], x[..., 6:7], x[..., 3:6], 1 - x[..., 7:]], axis=-1)


def _euler_matrix(angles: np.ndarray) -> np.ndarray:
    """Roll, pitch, yaw about fixed axes (sxyz), rad [..., 3] → rotations [..., 3, 3]."""
    (cr, cp, cy), (sr, sp, sy) = (np.moveaxis(f(angles), -1, 0) for f in (np.cos, np.sin))
    rows = [
        [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
        [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
        [-sp, cp * sr, cp * cr],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def _euler(r: np.ndarray) -> np.ndarray:
    """The inverse, pitch within ± π/2."""
    level = np.hypot(r[..., 0, 0], r[..., 1, 0])
    roll = np.arctan2(r[..., 2, 1], r[..., 2, 2])
    pitch, yaw = np.arctan2(-r[..., 2, 0], level), np.arctan2(r[..., 1, 0], r[..., 0, 0])
    return np.stack([roll, pitch, yaw], axis=-1)


def _quaternion_matrix(q: np.ndarray) -> np.ndarray:
    """Quaternions w, x, y, z [..., 4], of any length but 0 → rotations [..., 3, 3]."""
    w, x, y, z = np.moveaxis(q / np.linalg.norm(q, axis=-1, keepdims=True), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def _quaternion(r: np.ndarray) -> np.ndarray:
    """The inverse, of length 1 and w ≥ 0: the largest of four squares is the one to divide by."""
    xx, yy, zz = r[..., 0, 0], r[..., 1, 1], r[..., 2, 2]
    wx, xy = r[..., 2, 1] - r[..., 1, 2], r[..., 0, 1] + r[..., 1, 0]
    wy, xz = r[..., 0, 2] - r[..., 2, 0], r[..., 0, 2] + r[..., 2, 0]
    wz, yz = r[..., 1, 0] - r[..., 0, 1], r[..., 1, 2] + r[..., 2, 1]
    outer = np.stack(  # four times the products of q with itself
        [
            np.stack([1 + xx + yy + zz, wx, wy, wz], axis=-1),
            np.stack([wx, 1 + xx - yy - zz, xy, xz], axis=-1),
            np.stack([wy, xy, 1 - xx + yy - zz, yz], axis=-1),
            np.stack([wz, xz, yz, 1 - xx - yy + zz], axis=-1),
        ],
        axis=-2,
    )
    best = np.argmax(np.diagonal(outer, axis1=-2, axis2=-1), axis=-1)[..., None, None]
    q = np.take_along_axis(outer, best, axis=-2)[..., 0, :]
    return q / np.linalg.norm(q, axis=-1, keepdims=True) * np.where(q[..., :1] < 0, -1, 1)


def _axis_angle(r: np.ndarray) -> np.ndarray:
    """Rotations [..., 3, 3] → axis times angle in rad, at most π, [..., 3]."""
    q = _quaternion(r)
    sine = np.linalg.norm(q[..., 1:], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(sine, q[..., :1])
    return q[..., 1:] * np.where(sine > 0, angle / np.where(sine > 0, sine, 1), 2)


def _axis_angle_matrix(turn: np.ndarray) -> np.ndarray:
    """The inverse."""
    angle = np.linalg.norm(turn, axis=-1, keepdims=True)
    sine = 0.5 * np.sinc(angle / (2 * np.pi))  # sin(angle / 2) / angle
    return _quaternion_matrix(np.concatenate([np.cos(angle / 2), turn * sine], axis=-1))


_POSE_THEN_GRIPPER = compose.bool_mask(6, -1)
_ALOHA = Robot(
    state={"observation.state": 14},
    action="action",
    action_dim=14,
    cameras={
        BASE: "observation.images.cam_high",
        LEFT_WRIST: "observation.images.cam_left_wrist",
        RIGHT_WRIST: "observation.images.cam_right_wrist",
    },
    fps=50,
    positions=compose.bool_mask(6, -1, 6, -1),
    relative=True,
    adapter=Aloha(),
)
_DROID = Robot(  # OpenPI's conversion to LeRobot: actions are joint velocities and the gripper
    state={"joint_position": 7, "gripper_position": 1},
    action="actions",
    action_dim=8,
    cameras={BASE: "exterior_image_1_left", LEFT_WRIST: "wrist_image_left"},
    fps=15,
)
_BRIDGE = Robot(  # as data.oxe standardises it; adapted for SIMPLER's robot alone
    state={"observation.state": 7},
    action="action",
    action_dim=7,
    cameras={BASE: "observation.images.primary"},
    fps=5,
    adapter=SimplerBridge(),
    adapted=False,
    scheme="bounds",
    normalized={"actions": _POSE_THEN_GRIPPER},
)
ROBOTS: Mapping[str, Robot] = {
    "aloha": _ALOHA,
    "aloha_sim": dataclasses.replace(  # gym-aloha, as OpenPI trained its pi0_aloha_sim
        _ALOHA, cameras={BASE: "observation.images.top"}, relative=False
    ),
    # OpenPI's π0 checkpoints of LIBERO were trained with relative=True, π0.5's were not: its
    # actions are changes of pose already.
    "libero": Robot(
        state={"state": 8},
        action="actions",
        action_dim=7,
        cameras={BASE: "image", LEFT_WRIST: "wrist_image"},
        fps=10,
        positions=_POSE_THEN_GRIPPER,
    ),
    "droid": _DROID,
    # DROID's RLDS as data.oxe standardises it: joint positions, made relative.
    "droid_rlds": dataclasses.replace(
        _DROID,
        state={"observation.state": 8},
        action="action",
        cameras={BASE: "observation.images.primary", LEFT_WRIST: "observation.images.wrist"},
        positions=compose.bool_mask(7, -1),
        relative=True,
    ),
    "bridge": _BRIDGE,
    "fractal": dataclasses.replace(
        _BRIDGE, state={"observation.state": 8}, fps=3, adapter=SimplerFractal()
    ),
    "pusht": Robot(  # where the disc shall go, and where it is, both in 0..512
        state={"observation.state": 2},
        action="action",
        action_dim=2,
        cameras={BASE: "observation.image"},
        fps=10,
        positions=(True, True),
    ),
    "metaworld": Robot(
        state={"observation.state": 39}, action="action", action_dim=4, cameras={}, fps=80
    ),
}
