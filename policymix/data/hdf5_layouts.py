"""How LIBERO, robomimic and ALOHA lay demonstrations out in HDF5 files, and what becomes of them.

| layout | a demo is | its features |
| --- | --- | --- |
| libero | data/demo_N; a file a task | OpenPI's image, wrist_image, state, actions; reward, done |
| robomimic | data/demo_N | observation.{state, images.CAMERA, NAME}, action, next.{reward, done} |
| aloha | a file | observation.{state, velocity, effort, images.CAMERA}, action, next.{…} |

LIBERO. Pictures are stored upside down (robosuite's "opengl") and are turned by 180 degrees, as
OpenPI turns them: image[::-1, ::-1]. Where a file says "opencv" they stand upright already, and of
that turn the mirroring is left. state is ee_pos (3), the axis-angle ee_ori (3) and both fingers of
gripper_states (2). The instruction is what LIBERO makes of the file's name, by which policies are
evaluated; the one in problem_info may differ, and is for files under other names. LIBERO's own
script stores in row t what was seen after action t, and so it is kept.

robomimic. state is eef_pos (3), eef_quat (4, xyzw) and gripper_qpos of robot0, then of robot1.
Other numbers of a frame keep their names. Pictures stand upright already. next_obs is left out: it
is obs a step on. The filter keys in `mask` become lists of episodes.

ALOHA. Pictures are uint8 [T, hh, ww, 3], or JPEG files in rows padded with zeros: cut there, and
not at compress_len, whose rows follow an order of cameras that the file does not tell. JPEG is read
as the format says, as OpenPI does. ACT's compress_data.py gives RGB to an encoder of BGR: its files
need `swap_channels`.

Rewards and dones are kept where a file has them, one a frame, row t of what action t led to. They
are named as the other features are: `reward`, which chunk-level offline RL reads, and `done` beside
OpenPI's names; else LeRobot's next.reward and next.done.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable

import h5py

from policymix.data import hdf5

_JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
_MOTORS = tuple(f"{side}_{joint}" for side in ("left", "right") for joint in _JOINTS)
_POSE = ("x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z", "finger_0", "finger_1")
_STANDS = "stands for it unless a task is given"
_NO_OBS = "robomimic's dataset_states_to_obs.py adds obs to files that have states alone"
_EXPECTED = "data/demo_N/obs (LIBERO, robomimic), or observations and action (ALOHA)"


@dataclasses.dataclass(frozen=True)
class Layout:
    """What is known of a program's files.

    Attributes:
      rate: of its controller, frames a second.
      demos: file → the groups that are demos, in the order of their numbers.
      fields: (demo, file, whether pictures are BGR) → {feature: Field}; ValueError for what is not
        there or not as expected.
      task: (path, file, demo's group) → the instruction; and what to tell of it, or "".
    """

    name: str
    rate: int
    demos: Callable[[h5py.File], list[str]]
    fields: Callable[[hdf5.Group, h5py.File, bool], dict[str, hdf5.Field]]
    task: Callable[[pathlib.Path, h5py.File, h5py.Group], tuple[str, str]]

    def header(self, file: h5py.File) -> tuple[float, str | None]:
        """(frames a second, type of robot), from what a file says of its environment."""
        if self.name == "aloha":
            return self.rate, "aloha"
        options = hdf5.described(file["data"], "env_args").get("env_kwargs")
        options = options if isinstance(options, dict) else {}
        rate, robots = options.get("control_freq", self.rate), options.get("robots")
        robots = robots if isinstance(robots, list) else [robots]
        known = robots and all(isinstance(robot, str) for robot in robots)
        rate = rate if isinstance(rate, int | float) else self.rate
        return rate, "_".join(robots).lower() if known else None


def recognised(file: h5py.File, path: pathlib.Path, name: str = "") -> Layout:
    """The layout of a file; or the one of that name, if the file can have it.

    Raises:
      ValueError: it has none of them; says what it holds.
    """
    data, demos = file.get("data"), _demos(file)
    found = (file.get(f"{demo}/obs") for demo in demos)  # of the first that has any
    seen = next((hdf5.inside(obs) for obs in found if isinstance(obs, h5py.Group)), [])
    like = ""
    if isinstance(file.get("observations"), h5py.Group) and "action" in file:
        like = "aloha"
    elif demos and ("problem_info" in data.attrs or {"agentview_rgb", "ee_states"} & {*seen}):
        like = "libero"
    elif seen:
        like = "robomimic"
    chosen = name or like
    if chosen and (chosen == "aloha") == (like == "aloha") and like:
        return _LAYOUTS[chosen]
    there = f"{hdf5.inside(file)[:20]}"
    if isinstance(data, h5py.Group):
        there += f", in data {hdf5.inside(data)[:5]}"
    if demos:
        there += f", in {demos[0]} {hdf5.Group(file, demos[0], f'{path}, {demos[0]}').inside()}"
    advice = f"; {_NO_OBS}" if demos and not seen else ""
    raise ValueError(
        f"{path} has not the layout of {name or ' or '.join(NAMES)}: expected {_EXPECTED}; it "
        f"holds {there}{advice}"
    )


def _demos(file: h5py.File) -> list[str]:
    """The groups in `data`, and what cannot be opened; demo_2 stands before demo_10."""
    data = file.get("data")
    if not isinstance(data, h5py.Group):
        return []
    return [f"data/{n}" for n in hdf5.inside(data) if not isinstance(data.get(n), h5py.Dataset)]


def _libero_fields(demo: hdf5.Group, file: h5py.File, swap: bool) -> dict[str, hdf5.Field]:
    upright = hdf5.attribute(file["data"], "macros_image_convention") == "opencv"
    order = (1 if upright else -1, -1, -1 if swap else 1)
    cameras = {"image": "obs/agentview_rgb", "wrist_image": "obs/eye_in_hand_rgb"}
    pose = ("obs/ee_pos", "obs/ee_ori") if demo.has("obs/ee_pos") else ("obs/ee_states",)
    fields = {name: _camera(demo, key, order) for name, key in cameras.items()}
    fields["state"] = demo.real(*pose, "obs/gripper_states", size=8, names=_POSE)
    fields["actions"] = demo.real("actions")
    return fields | _outcome(demo, "reward", "done")


def _robomimic_fields(demo: hdf5.Group, file: h5py.File, swap: bool) -> dict[str, hdf5.Field]:
    names, fields = demo.arrays("obs"), {}
    if not names:
        raise ValueError(f"{demo.where}: no arrays in 'obs', it holds {demo.inside()}; {_NO_OBS}")
    parts = ("eef_pos", "eef_quat", "gripper_qpos")
    robots = [f"robot{i}" for i in range(len(names)) if f"robot{i}_eef_pos" in names or not i]
    state = tuple(f"obs/{robot}_{part}" for robot in robots for part in parts)
    fields["observation.state"] = demo.real(*state)
    for name in names:
        key = f"obs/{name}"
        if key in state:
            continue
        if camera := demo.picture(key, (1, 1, -1 if swap else 1)):
            fields[f"observation.images.{name.removesuffix('_image')}"] = camera
        elif _is_vector(demo.array(key)):
            fields.setdefault(f"observation.{name}", demo.numbers(key))
    fields["action"] = demo.real("actions")
    return fields | _outcome(demo, "next.reward", "next.done")


def _is_vector(array: h5py.Dataset) -> bool:
    """Whether a frame of it is one number or more in a row."""
    return array.dtype.kind in "fiub" and (
        array.ndim == 1 or (array.ndim == 2 and array.shape[1] > 0)
    )


def _aloha_fields(demo: hdf5.Group, file: h5py.File, swap: bool) -> dict[str, hdf5.Field]:
    fields = {"observation.state": demo.real("observations/qpos", names=_MOTORS)}
    for name, key in {"velocity": "qvel", "effort": "effort"}.items():
        if demo.has(f"observations/{key}"):
            field = demo.real(f"observations/{key}", names=_MOTORS)
            fields[f"observation.{name}"] = field
    order = (1, 1, -1 if swap else 1)
    for name in demo.arrays("observations/images"):
        camera = demo.picture(f"observations/images/{name}", order, coded=True)
        if camera:  # depth is left out
            fields[f"observation.images.{name}"] = camera
    fields["action"] = demo.real("action", names=_MOTORS)
    if demo.has("base_action"):  # of a mobile one: forward and turning speed
        fields["base_action"] = demo.real("base_action")
    return fields | _outcome(demo, "next.reward", "next.done")


def _camera(demo: hdf5.Group, key: str, order: tuple[int, int, int]) -> hdf5.Field:
    """Of pictures that must be there."""
    if field := demo.picture(key, order):
        return field
    array = demo.array(key)
    raise ValueError(
        f"{demo.where}: {key!r} is {array.dtype} {list(array.shape)}, expected pictures, uint8 "
        "[frames, height, width, 3]"
    )


def _outcome(demo: hdf5.Group, reward: str, done: str) -> dict[str, hdf5.Field]:
    """Rewards and dones, where there are any."""
    found = {reward: demo.real("rewards", size=1)} if demo.has("rewards") else {}
    return found | ({done: demo.flags("dones")} if demo.has("dones") else {})


def _libero_task(path: pathlib.Path, file: h5py.File, group: h5py.Group) -> tuple[str, str]:
    told = hdf5.described(file["data"], "problem_info").get("language_instruction")
    told = " ".join(told.strip('" ').split()) if isinstance(told, str) else ""
    if not path.stem.endswith("_demo"):
        return (told, "") if told else (_words(path.stem), "")
    # KITCHEN_SCENE10_close_the_drawer_demo.hdf5; the scene is no part of the instruction.
    named = _words(re.sub(r"^[A-Z].*?SCENE[0-9]+_", "", path.stem.removesuffix("_demo")))
    differs = bool(told) and told.lower() != named.lower()
    note = f"{path.name}: the file's name says {named!r}, its problem_info {told!r}; the name holds"
    return named, note if differs else ""


def _robomimic_task(path: pathlib.Path, file: h5py.File, group: h5py.Group) -> tuple[str, str]:
    if lang := hdf5.described(group, "ep_meta").get("lang"):  # of RoboCasa
        return str(lang), ""
    name = hdf5.described(file["data"], "env_args").get("env_name") or _words(path.stem)
    return str(name), f"{path.name} holds no instruction; {str(name)!r} {_STANDS}"


def _aloha_task(path: pathlib.Path, file: h5py.File, group: h5py.Group) -> tuple[str, str]:
    words = _words(path.parent.name)
    return words, f"ALOHA's files hold no instruction; their folder's name, {words!r}, {_STANDS}"


def _words(name: str) -> str:
    return " ".join(name.replace("_", " ").split())


_LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("libero", 20, _demos, _libero_fields, _libero_task),
        Layout("robomimic", 20, _demos, _robomimic_fields, _robomimic_task),
        Layout("aloha", 50, lambda file: ["/"], _aloha_fields, _aloha_task),
    )
}
NAMES = tuple(_LAYOUTS)
