"""Small HDF5 files as LIBERO, robomimic and ACT write them: their keys, dtypes and attributes."""

import io
import json

import h5py
import numpy as np
from PIL import Image

LIBERO_NAME = "KITCHEN_SCENE10_close_the_top_drawer_of_the_cabinet_demo.hdf5"
LIBERO_TASK = "close the top drawer of the cabinet"


def libero(path, lengths=(3, 4), *, seed=0, first=0, says=LIBERO_TASK, convention="opengl", hz=20):
    """As LIBERO's scripts/create_dataset.py; returns {demo: {key: array}}."""
    rng, demos = np.random.default_rng(seed), {}
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_name"] = "Libero_Kitchen_Tabletop_Manipulation"
        data.attrs["problem_info"] = json.dumps(
            {"problem_name": "libero_kitchen", "domain_name": "robosuite"}
            | {"language_instruction": says}
        )
        data.attrs["macros_image_convention"] = convention
        data.attrs["env_args"] = json.dumps(
            {"type": 1, "env_name": "Libero_Kitchen_Tabletop_Manipulation"}
            | {"env_kwargs": {"robots": ["Panda"], "control_freq": hz, "camera_heights": 128}}
        )
        for number, length in enumerate(lengths, first):
            done = np.zeros(length, np.uint8)
            done[-1:] = 1
            states = rng.normal(size=(length, 6))
            arrays = {
                "obs/agentview_rgb": rng.integers(0, 256, (length, 16, 24, 3), dtype=np.uint8),
                "obs/eye_in_hand_rgb": rng.integers(0, 256, (length, 16, 24, 3), dtype=np.uint8),
                "obs/ee_states": states,
                "obs/ee_pos": states[:, :3],
                "obs/ee_ori": states[:, 3:],
                "obs/gripper_states": rng.normal(size=(length, 2)),
                "obs/joint_states": rng.normal(size=(length, 7)),
                "actions": rng.normal(size=(length, 7)),
                "states": rng.normal(size=(length, 92)),
                "robot_states": rng.normal(size=(length, 9)),
                "rewards": done,
                "dones": done,
            }
            write(file, f"data/demo_{number}", arrays)
            demos[f"demo_{number}"] = arrays
            file[f"data/demo_{number}"].attrs["num_samples"] = length
        data.attrs["num_demos"], data.attrs["total"] = len(lengths), sum(lengths)
    return demos


def robomimic(path, lengths=(3, 2), *, cameras=("agentview",), arms=1, seed=0, next_obs=True):
    """As robomimic's scripts/dataset_states_to_obs.py; returns {demo: {key: array}}."""
    rng, demos = np.random.default_rng(seed), {}
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps(
            {"env_name": "NutAssemblySquare", "type": 1, "env_version": "1.4.1"}
            | {"env_kwargs": {"robots": ["Panda"] * arms, "control_freq": 20}},
            indent=4,
        )
        for number, length in enumerate(lengths):
            obs = {"object": rng.normal(size=(length, 14))}
            for arm in range(arms):
                sizes = {"eef_pos": 3, "eef_quat": 4, "gripper_qpos": 2, "joint_pos": 7}
                obs |= {f"robot{arm}_{k}": rng.normal(size=(length, n)) for k, n in sizes.items()}
            for camera in cameras:
                image = rng.integers(0, 256, (length, 8, 12, 3), dtype=np.uint8)
                obs[f"{camera}_image"] = image
                obs[f"{camera}_depth"] = rng.random((length, 8, 12, 1), dtype=np.float32)
            arrays = {f"obs/{key}": value for key, value in obs.items()}
            if next_obs:
                arrays |= {f"next_obs/{key}": np.roll(value, -1, 0) for key, value in obs.items()}
            arrays |= {
                "actions": rng.uniform(-1, 1, (length, 7 * arms)),
                "states": rng.normal(size=(length, 45)),
                "rewards": rng.random(length),
                "dones": (np.arange(length) == length - 1).astype(np.int64),
            }
            write(file, f"data/demo_{number}", arrays)
            demos[f"demo_{number}"] = arrays
        data.attrs["total"] = sum(lengths)
    return demos


def aloha(path, length=4, *, cameras=("top",), compress="", effort=True, base=False, seed=0):
    """As ACT's record_sim_episodes.py; compress="jpeg" as ACT++'s compress_data.py; returns arrays,
    and the JPEG files of every camera in their place.
    """
    rng = np.random.default_rng(seed)
    arrays = {
        "observations/qpos": rng.normal(size=(length, 14)).astype(np.float32),
        "observations/qvel": rng.normal(size=(length, 14)).astype(np.float32),
        "action": rng.normal(size=(length, 14)).astype(np.float32),
    }
    if effort:
        arrays["observations/effort"] = rng.normal(size=(length, 14)).astype(np.float32)
    if base:
        arrays["base_action"] = rng.normal(size=(length, 2)).astype(np.float32)
    images = {}
    for camera in cameras:
        small = rng.integers(0, 256, (length, 3, 4, 3), dtype=np.uint8)
        images[camera] = small.repeat(8, 1).repeat(8, 2)  # blocks, which JPEG keeps nearly
    told = dict(arrays)
    with h5py.File(path, "w") as file:
        file.attrs["sim"] = True
        for camera, pixels in images.items():
            key = f"observations/images/{camera}"
            arrays[key] = told[key] = pixels
            if compress:
                told[key] = [jpeg(image) for image in pixels]
                arrays[key] = padded(told[key])
        if compress:
            file.attrs["compress"] = True
            sizes = [[len(data) for data in told[f"observations/images/{c}"]] for c in cameras]
            arrays["compress_len"] = np.float32(sizes)
        write(file, "/", arrays)
    return told


def write(file, group, arrays):
    for key, array in arrays.items():
        file.require_group(group).create_dataset(key, data=array)


def jpeg(image):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def padded(rows):
    """Bytes of several lengths → uint8 [T, longest], filled up with zeros."""
    found = np.zeros((len(rows), max(map(len, rows)) + 5), np.uint8)
    for row, data in zip(found, rows, strict=True):
        row[: len(data)] = np.frombuffer(data, np.uint8)
    return found


def decoded(data):
    return np.asarray(Image.open(io.BytesIO(data)))
