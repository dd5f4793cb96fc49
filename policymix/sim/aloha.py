"""gym-aloha's two arms: the same models, starts, steps, rewards and pixels.

Steps are the same up to rounding, which contact amplifies: in the experts' episodes joints differ
by 1e-15 until a hand touches something, by 1e-4 then, and later a grasp may hold in one and slip in
the other. Where the physics diverges gym-aloha raises an error, and an episode here goes on.

gym-aloha renders three cameras of 480 × 640 at every step and returns one. Here only the top camera
is rendered, and only when asked for; the fast simulator draws it small and without shadows. A
process simulates each task once for all its episodes, each of which keeps its physics aside while
another has the simulation.
"""

import atexit
import contextlib
import ctypes
import functools
import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import mujoco
import numpy as np
from gym_aloha import constants, utils

FPS = constants.FPS
PROMPTS = {
    # As LeRobot's datasets aloha_sim_transfer_cube_human and aloha_sim_insertion_human.
    "AlohaTransferCube-v0": "Pick up the cube with the right arm and transfer it to the left arm.",
    "AlohaInsertion-v0": "Insert the peg into the socket.",
}
PICTURES = {False: (480, 640), True: (120, 160)}  # height and width; fast or not
SUBSTEPS = 10  # of the physics, in a step

_ARM = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
JOINTS = [f"{side}_{name}" for side in ("left", "right") for name in _ARM]
GRIPPERS = (6, 13)  # among them: 0 closed … 1 open; the others are in rad

# The actuators' own limits. gym-aloha declares ±1, which its demonstrations exceed.
_LOW = (-3.14158, -1.85005, -1.76278, -3.14158, -1.8675, -3.14158, 0.0)
_HIGH = (3.14158, 1.25664, 1.6057, 3.14158, 2.23402, 3.14158, 1.0)
ACTION_RANGE = (np.float32(_LOW * 2), np.float32(_HIGH * 2))

_MODELS = {"AlohaTransferCube-v0": "transfer_cube", "AlohaInsertion-v0": "insertion"}
_SIDEWAYS = {"AlohaTransferCube-v0": ((0.0, 0.2),), "AlohaInsertion-v0": ((0.1, 0.2), (-0.2, -0.1))}
_STATE = mujoco.mjtState.mjSTATE_INTEGRATION  # also the solver's warm start: steps repeat exactly
_MOTORS = mujoco.mjtDisableBit.mjDSBL_ACTUATION.value
_LIBRARIES = {"egl": "libEGL.so.1", "osmesa": "libOSMesa.so"}  # and what MUJOCO_GL calls them
_EGL_PLATFORM_DEVICE = 0x313F  # EGL_EXT_platform_device
_MOST_DEVICES = 16

# The least that a context of MuJoCo's can be made for.
_NOTHING = """<mujoco><visual><global offwidth="1" offheight="1"/>
<quality shadowsize="0" offsamples="0"/></visual></mujoco>"""


class Env:
    """One episode at a time of one task, sharing its simulation with the others of the process."""

    fps = FPS
    action_range = ACTION_RANGE
    info_keys = ("reward",)  # gym-aloha's, 0 to 4

    def __init__(self, name: str, fast: bool, low: float = 0.0, high: float = 1.0):
        """A task whose objects start in a part of their x-range.

        Args:
          name: one of gym-aloha's, like "AlohaTransferCube-v0".
          fast: pictures of 120 × 160 without shadows, in place of gym-aloha's of 480 × 640.
          low: where the part begins, as a fraction of the range.
          high: where it ends.

        Raises:
          OSError: there is no OpenGL to render with.
        """
        self.name, self.prompt = name, PROMPTS[name]
        self.features = _features(fast)
        self._part = (low, high)
        self._simulation = _simulation(name, fast)
        self.start: np.ndarray | None = None  # pose of each object [n, 7] where the episode began
        self.info: dict[str, float] = {}  # of the last step
        self.physics: np.ndarray | None = None  # while another episode has the simulation

    def reset(self, seed: int) -> dict[str, np.ndarray]:
        """Starts an episode that depends on the seed alone; returns its first observation."""
        self.start = starts(self.name, seed, *self._part)
        self._simulation.restart(self, self.start)
        return self._simulation.observation()

    def step(
        self, action: np.ndarray, observe: bool = True
    ) -> tuple[dict[str, np.ndarray] | None, float, bool]:
        """Moves towards joint targets [14], clipped to the actuators' limits, for 1/50 s.

        Returns:
          The observation, or None without `observe`, which saves its picture; the step's reward as
          a fraction of the largest; and whether it is that.
        """
        if self.start is None:
            raise ValueError(f"{self.name}: reset the environment before its first step")
        self._simulation.give_to(self)
        self._simulation.advance(np.clip(np.float32(action), *ACTION_RANGE))
        reward = self._simulation.reward()
        self.info = {"reward": float(reward)}
        observation = self._simulation.observation() if observe else None
        return observation, reward / 4, reward == 4


def starts(name: str, seed: int, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """Poses (x, y, z, quaternion) of a task's objects [n, 7]: gym-aloha's of that seed, with their
    x brought into a part of its range.
    """
    if name == "AlohaTransferCube-v0":
        poses = utils.sample_box_pose(seed)[None]
    else:
        poses = np.stack(utils.sample_insertion_pose(seed))
    for pose, (least, most) in zip(poses, _SIDEWAYS[name], strict=True):
        pose[0] = least + low * (most - least) + (pose[0] - least) * (high - low)
    return poses


def load(model: str) -> mujoco.MjModel:
    """One of gym-aloha's MuJoCo models: "transfer_cube", or "end_effector_insertion"."""
    return mujoco.MjModel.from_xml_path(str(constants.ASSETS_DIR / f"bimanual_viperx_{model}.xml"))


def joints(qpos: np.ndarray) -> np.ndarray:
    """Positions of the arms' joints as states and actions have them, [14]."""
    arms = np.delete(qpos[:16], (7, 15))  # a gripper's other finger mirrors the first
    arms[list(GRIPPERS)] = constants.normalize_puppet_gripper_position(arms[list(GRIPPERS)])
    return arms


class _Simulation:
    """MuJoCo's model and data of a task, and the episode that has them."""

    def __init__(self, name: str, fast: bool):
        # Wild actions can make the physics diverge, whereupon MuJoCo puts everything back to its
        # own start and the episode goes on from there, as good as failed. It need not write a file
        # about it. This is of the whole process: so it waits until ALOHA is simulated in it.
        mujoco.set_mju_user_warning(lambda _: None)
        self._model = load(_MODELS[name])
        self._data = mujoco.MjData(self._model)
        self._names = [self._model.geom(k).name for k in range(self._model.ngeom)]
        self._reward = _transfer if name == "AlohaTransferCube-v0" else _insertion
        self._fast, self._gl = fast, _gl()
        self._owner: Env | None = None

    @functools.cached_property
    def _camera(self) -> "_Camera":
        return _Camera(self._model, self._gl, self._fast)

    def restart(self, owner: Env, objects: np.ndarray) -> None:
        """Gives the simulation to an episode that begins with objects at poses [n, 7]."""
        self._leave()
        self._owner = owner
        model, data = self._model, self._data
        mujoco.mj_resetData(model, data)
        data.qpos[:16] = data.ctrl[:] = constants.START_ARM_POSE
        data.qpos[16:] = objects.ravel()
        # As dm_control begins an episode: without what the motors would do.
        model.opt.disableflags |= _MOTORS
        mujoco.mj_forward(model, data)
        model.opt.disableflags &= ~_MOTORS

    def give_to(self, owner: Env) -> None:
        """Puts the physics of the episode that had the simulation aside, and restores `owner`'s."""
        if self._owner is not owner:
            self._leave()
            mujoco.mj_setState(self._model, self._data, owner.physics, _STATE)
            mujoco.mj_step1(self._model, self._data)
            self._owner = owner

    def advance(self, targets: np.ndarray) -> None:
        """A step towards joint targets [14]."""
        arms = np.float64(targets).reshape(2, 7)
        fingers = constants.unnormalize_puppet_gripper_position(arms[:, 6:])
        self._data.ctrl[:] = np.hstack([arms[:, :6], fingers, -fingers]).ravel()
        # As dm_control steps: contacts and poses are always of where it has come to.
        mujoco.mj_step2(self._model, self._data)
        mujoco.mj_step(self._model, self._data, SUBSTEPS - 1)
        mujoco.mj_step1(self._model, self._data)

    def reward(self) -> int:
        return self._reward(_touching(self._names, self._data))

    def observation(self) -> dict[str, np.ndarray]:
        return {
            "observation.images.top": self._camera.picture(self._data),
            "observation.state": joints(self._data.qpos).astype(np.float32),
        }

    def _leave(self) -> None:
        if self._owner is not None:
            physics = np.empty(mujoco.mj_stateSize(self._model, _STATE))
            mujoco.mj_getState(self._model, self._data, physics, _STATE)
            self._owner.physics = physics


@functools.cache
def _simulation(name: str, fast: bool) -> _Simulation:
    return _Simulation(name, fast)


def _features(fast: bool) -> dict[str, dict[str, Any]]:
    arms = {"dtype": "float32", "shape": (14,), "names": JOINTS}
    top = {
        "dtype": "image" if fast else "video",  # PNG files of these would be 0.2 MB each
        "shape": (*PICTURES[fast], 3),
        "names": ["height", "width", "channels"],
    }
    return {"observation.images.top": top, "observation.state": arms, "action": arms}


def _touching(names: Sequence[str], data: mujoco.MjData) -> Callable[[str, str], bool]:
    """Whether two geoms touch, by their names; `names` has those of all."""
    pairs = {frozenset((names[a], names[b])) for a, b in data.contact.geom.tolist()}
    return lambda one, other: frozenset((one, other)) in pairs


# gym-aloha looks at one finger of each hand.
_LEFT, _RIGHT = (f"vx300s_{side}/10_{side}_gripper_finger" for side in ("left", "right"))
_SOCKET = ("socket-1", "socket-2", "socket-3", "socket-4")


def _transfer(touch: Callable[[str, str], bool]) -> int:
    """1: the right hand has the cube; 2: in the air; 3: the left hand touches it; 4: in the air."""
    lifted = not touch("red_box", "table")
    if touch("red_box", _LEFT):
        return 3 + lifted
    return 1 + lifted if touch("red_box", _RIGHT) else 0


def _insertion(touch: Callable[[str, str], bool]) -> int:
    """1: hands have peg and socket; 2: in the air; 3: one touches the other; 4: the peg is inside,
    where it touches the pin.
    """
    if touch("red_peg", "pin"):
        return 4
    lifted = not any(touch(part, "table") for part in ("red_peg", *_SOCKET))
    if lifted and any(touch("red_peg", part) for part in _SOCKET):
        return 3
    held = touch("red_peg", _RIGHT) and any(touch(part, _LEFT) for part in _SOCKET)
    return 1 + lifted if held else 0


class _Camera:
    """The top camera, drawn off screen."""

    def __init__(self, model: mujoco.MjModel, gl: Any, fast: bool):
        height, width = PICTURES[fast]
        if fast:  # the context is made for what the model says
            model.vis.quality.offsamples = model.vis.quality.shadowsize = 0
            model.vis.global_.offwidth, model.vis.global_.offheight = width, height
        self._gl, self._context = _contexts(gl, model, width, height)
        atexit.register(self._free)  # before Python takes down what freeing needs
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._context)
        self._model, self._rect = model, mujoco.MjrRect(0, 0, width, height)
        self._scene = mujoco.MjvScene(model=model, maxgeom=1000)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = not fast
        self._options, self._view = mujoco.MjvOption(), mujoco.MjvCamera()
        self._view.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._view.fixedcamid = model.camera("top").id

    def picture(self, data: mujoco.MjData) -> np.ndarray:
        """What it sees, uint8 [height, width, 3]."""
        self._gl.make_current()
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(
            self._model, data, self._options, None, self._view, everything, self._scene
        )
        mujoco.mjr_render(self._rect, self._scene, self._context)
        upside_down = np.empty((self._rect.height, self._rect.width, 3), np.uint8)
        mujoco.mjr_readPixels(upside_down, None, self._rect, self._context)
        return np.ascontiguousarray(upside_down[::-1])

    def _free(self) -> None:
        with contextlib.suppress(Exception):  # another library may have ended OpenGL already
            self._gl.make_current()
            self._context.free()
            self._gl.free()


def _contexts(
    gl: Any, model: mujoco.MjModel, width: int, height: int
) -> tuple[Any, mujoco.MjrContext]:
    """OpenGL's context, now current, and MuJoCo's in it. OSError where there is none to be had."""
    gl.GLContext._context = None  # else its destructor complains where its constructor failed
    try:
        context = gl.GLContext(width, height)
        context.make_current()
        return context, mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150.value)
    except Exception as error:  # each library has its own
        raise OSError(_no_gl(f"{type(error).__name__}: {error}")) from error


def _gl() -> Any:
    """MuJoCo's module of the OpenGL that MUJOCO_GL names; if unset, EGL or else OSMesa. It has made
    a context once, so that a system without is found before anything is played.
    """
    asked = os.environ.get("MUJOCO_GL") or os.environ.get("PYOPENGL_PLATFORM")
    # PyOpenGL can be bound to one of them only, once: so they are not tried in turn.
    name = asked or next(filter(_is_there, _LIBRARIES), "")
    if not name:
        raise OSError(_no_gl("neither is there, with a driver"))
    try:
        module = importlib.import_module(f"mujoco.{name.lower()}")
    except (ImportError, AttributeError) as error:
        raise OSError(_no_gl(f"{type(error).__name__}: {error}")) from error
    context, drawn = _contexts(module, mujoco.MjModel.from_xml_string(_NOTHING), 1, 1)
    drawn.free()
    context.free()
    return module


def _no_gl(reason: str) -> str:
    asked = os.environ.get("MUJOCO_GL")
    now = f"; now it is {asked}" if asked else ""
    return (
        "ALOHA renders with OpenGL off screen, by EGL or OSMesa (MUJOCO_GL=egl or osmesa chooses"
        f"{now}), and this system cannot ({reason}): install it, on Debian and Ubuntu with "
        "`apt install libegl1 libegl-mesa0 libgl1-mesa-dri`, or `apt install libosmesa6`"
    )


def _is_there(name: str) -> bool:
    """Whether a library is installed, and of EGL, which is but a loader of drivers, a driver."""
    try:
        library = ctypes.CDLL(_LIBRARIES[name])
    except OSError:
        return False
    return name != "egl" or _has_driver(library)


def _has_driver(egl: ctypes.CDLL) -> bool:
    """Whether an EGL device can be initialised, as mujoco.egl does it but without PyOpenGL."""
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    egl.eglInitialize.argtypes = (ctypes.c_void_p,) * 3
    found = (egl.eglGetProcAddress(f) for f in (b"eglQueryDevicesEXT", b"eglGetPlatformDisplayEXT"))
    query, get_display = found
    if not query or not get_display:
        return False
    pointer = ctypes.c_void_p
    query = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, pointer, pointer)(query)
    get_display = ctypes.CFUNCTYPE(pointer, ctypes.c_uint, pointer, pointer)(get_display)
    devices, count = (pointer * _MOST_DEVICES)(), ctypes.c_int(0)
    if not query(_MOST_DEVICES, ctypes.addressof(devices), ctypes.addressof(count)):
        return False
    displays = (get_display(_EGL_PLATFORM_DEVICE, d, None) for d in devices[: count.value])
    return any(display and egl.eglInitialize(display, None, None) for display in displays)
