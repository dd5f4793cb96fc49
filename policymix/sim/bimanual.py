"""Scripted experts of ALOHA's tasks: hands led through waypoints, and the joints that this takes.

As in ACT (Zhao et al. 2023, arXiv:2304.13705): in gym-aloha's models for it the hands are welded to
bodies that go from waypoint to waypoint. The joint positions on the way are the actions, but for
the grippers, whose actions are what they are commanded.
"""

import functools
from collections.abc import Sequence

import mujoco
import numpy as np
from gym_aloha import constants

from policymix.sim import aloha

NUM_STEPS = 240

_STIFF = (0.9, 0.95, 0.001)  # solimp of the welds; with the models' own the arms lag and miss
_HANDS = ("vx300s_left/gripper_link", "vx300s_right/gripper_link")

# Turns from where the hands are level and face one another: axis and degrees.
_LEVEL = (1, 0, 0, 0)
_LEFT_DOWN, _RIGHT_DOWN = (0, 1, 0, 60), (0, 1, 0, -60)
_ROLLED = (1, 0, 0, 90)  # to take a cube between fingers above and below it
_OPEN, _CLOSED = 1.0, 0.0

# A hand first turns where it is. Turned only on its way, its wrist would pass the pose in which two
# of its joints have one axis to one side or the other, and forearms end half a turn apart.
_TURNED = 24

# (step, where the point between the fingers is in m, turn, opening): a hand's way from its start.
# None is where it starts.
Waypoint = tuple[int, np.ndarray | None, tuple[float, ...], float]


def plan(name: str, objects: np.ndarray) -> np.ndarray:
    """Joint targets [240, 14] that solve a task, as a rule, whose objects are at poses [n, 7]."""
    if name == "AlohaTransferCube-v0":
        return _hands("end_effector_transfer_cube").follow(objects, *_transfer(objects[0, :3]))
    return _hands("end_effector_insertion").follow(objects, *_insertion(*objects[:, :3]))


def _transfer(cube: np.ndarray) -> tuple[list[Waypoint], list[Waypoint]]:
    """Ways of both hands: ACT's in less time, but that the left waits for the cube to rest."""
    meet, over, at = _at(0, 0.5, 0.25), cube + _at(0, 0, 0.08), cube + _at(0, 0, -0.015)
    wait, take = meet + _at(-0.12, 0, -0.02), meet + _at(0.02, 0, -0.02)
    left = [
        (60, wait, _ROLLED, _OPEN),
        (129, wait, _ROLLED, _OPEN),
        (159, take, _ROLLED, _OPEN),
        (177, take, _ROLLED, _CLOSED),
        (NUM_STEPS, take, _ROLLED, _CLOSED),
    ]
    right = [
        (_TURNED, None, _RIGHT_DOWN, _OPEN),
        (54, over, _RIGHT_DOWN, _OPEN),
        (78, at, _RIGHT_DOWN, _OPEN),
        (102, at, _RIGHT_DOWN, _CLOSED),
        (120, meet + _at(0.05, 0, 0), _RIGHT_DOWN, _CLOSED),
        (132, meet, _RIGHT_DOWN, _CLOSED),
        (180, meet, _RIGHT_DOWN, _CLOSED),
        (198, meet, _RIGHT_DOWN, _OPEN),
        (219, meet + _at(0.1, 0, 0), _RIGHT_DOWN, _OPEN),
        (NUM_STEPS, meet + _at(0.1, 0, 0), _RIGHT_DOWN, _OPEN),
    ]
    return left, right


def _insertion(peg: np.ndarray, socket: np.ndarray) -> tuple[list[Waypoint], list[Waypoint]]:
    meet = _at(0, 0.5, 0.15)
    lift = _at(0, 0, 0.0115)  # the peg hangs lower in its hand than the socket

    def way(thing: np.ndarray, turn: tuple, meet: np.ndarray, away: np.ndarray):
        return [
            (_TURNED, None, turn, _OPEN),
            (72, thing + _at(0, 0, 0.08), turn, _OPEN),
            (102, thing + _at(0, 0, -0.03), turn, _OPEN),
            (132, thing + _at(0, 0, -0.03), turn, _CLOSED),
            (171, meet + 2 * away, turn, _CLOSED),
            (204, meet + away, turn, _CLOSED),
            (NUM_STEPS, meet + away, turn, _CLOSED),
        ]

    left = way(socket, _LEFT_DOWN, meet, _at(-0.05, 0, 0))
    return left, way(peg, _RIGHT_DOWN, meet + lift, _at(0.05, 0, 0))


def _at(x: float, y: float, z: float) -> np.ndarray:
    return np.array((x, y, z))


class _Hands:
    """A model whose hands follow mocap bodies, to which they are welded."""

    def __init__(self, model: str):
        self._model = aloha.load(model)
        self._model.eq_solimp[:, :3] = _STIFF
        self._data = mujoco.MjData(self._model)

    def follow(
        self, objects: np.ndarray, left: Sequence[Waypoint], right: Sequence[Waypoint]
    ) -> np.ndarray:
        """Joint targets [240, 14] on the ways of both hands, from the arms' start."""
        model, data = self._model, self._data
        mujoco.mj_resetData(model, data)
        data.qpos[:16], data.qpos[16:] = constants.START_ARM_POSE, objects.ravel()
        mujoco.mj_kinematics(model, data)
        opening = aloha.joints(data.qpos)[list(aloha.GRIPPERS)]
        ways = [
            _interpolated(*self._welded(hand), opening[hand], way)
            for hand, way in enumerate((left, right))
        ]
        commands = np.stack([way[:, 7] for way in ways], axis=1)
        fingers = constants.unnormalize_puppet_gripper_position(commands)
        targets = np.empty((NUM_STEPS, len(aloha.JOINTS)))
        for step in range(NUM_STEPS):
            for hand, way in enumerate(ways):
                data.mocap_pos[hand], data.mocap_quat[hand] = way[step, :3], way[step, 3:7]
            data.ctrl[:] = np.outer(fingers[step], (1, -1)).ravel()
            mujoco.mj_step(model, data, aloha.SUBSTEPS)
            targets[step] = aloha.joints(data.qpos)
        targets[:, aloha.GRIPPERS] = commands
        return targets.astype(np.float32)

    def _welded(self, hand: int) -> tuple[np.ndarray, np.ndarray]:
        """Position and quaternion of a mocap body that leaves its hand where it is."""
        model, body = self._model, self._data.body(_HANDS[hand])
        back, turn, position, quaternion = np.empty(3), np.empty(4), np.empty(3), np.empty(4)
        mujoco.mju_negPose(back, turn, model.eq_data[hand, 3:6], model.eq_data[hand, 6:10])
        mujoco.mju_mulPose(position, quaternion, body.xpos, body.xquat, back, turn)
        return position, quaternion


def _interpolated(
    position: np.ndarray, quaternion: np.ndarray, opening: float, way: Sequence[Waypoint]
) -> np.ndarray:
    """Position, quaternion and opening at each step, [240, 8]: straight between waypoints."""
    steps, rows = [0], [[*position, *quaternion, opening]]
    for step, where, (*axis, degrees), wanted in way:
        turn = np.empty(4)
        mujoco.mju_axisAngle2Quat(turn, np.array(axis, float), np.deg2rad(degrees))
        steps.append(step)
        rows.append([*(position if where is None else where), *turn, wanted])
    between = np.stack(
        [np.interp(np.arange(1, NUM_STEPS + 1), steps, column) for column in np.transpose(rows)], 1
    )
    between[:, 3:7] /= np.linalg.norm(between[:, 3:7], axis=1, keepdims=True)
    return between


@functools.cache
def _hands(model: str) -> _Hands:
    return _Hands(model)
