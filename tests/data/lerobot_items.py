"""What LeRobot itself reads of datasets: run by an interpreter that has it, not by pytest.

    python lerobot_items.py version
    python lerobot_items.py items DATASET …               every frame, and its neighbours, of each
                                                          to DATASET.npz
    python lerobot_items.py convert DATASET               version 2.1 to 3.0, in place

A small reader of videos stands in for LeRobot's, which needs torchcodec or torchvision.
"""

import pathlib
import sys

import av
import numpy as np
import torch
from lerobot.datasets import lerobot_dataset


def decode(path, timestamps, tolerance_s, backend=None):
    """Frames whose times are nearest, each within the tolerance: float [n, 3, hh, ww] in [0, 1]."""
    del backend
    with av.open(str(path)) as file:
        found = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)]
    times = np.array([time for time, _ in found])
    nearest = [int(np.abs(times - wanted).argmin()) for wanted in timestamps]
    off = np.abs(times[nearest] - np.array(timestamps))
    assert (off < tolerance_s).all(), (path, timestamps, off)
    frames = np.stack([found[k][1] for k in nearest])
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255


def items(path):
    lerobot_dataset.decode_video_frames = decode
    plain = lerobot_dataset.LeRobotDataset("test/test", root=path, video_backend="pyav")
    fps, cameras = plain.fps, plain.meta.camera_keys
    deltas = {"action": [0.0, 1 / fps, 2 / fps]} | {key: [-1 / fps, 0.0] for key in cameras}
    around = lerobot_dataset.LeRobotDataset(
        "test/test", root=path, delta_timestamps=deltas, video_backend="pyav"
    )
    assert len(plain) == plain.meta.total_frames
    fields = {}
    for name, dataset in (("plain", plain), ("around", around)):
        for index in range(len(dataset)):
            for key, value in dataset[index].items():
                fields.setdefault(f"{name}/{key}", []).append(np.asarray(value))
    fields = {key: np.stack(values) for key, values in fields.items()}
    for key, stats in plain.meta.stats.items():
        fields |= {f"stats/{key}/{name}": np.asarray(value) for name, value in stats.items()}
    np.savez(f"{path}.npz", **fields, episodes=plain.meta.total_episodes)


def convert(path):
    from lerobot.datasets.v30 import convert_dataset_v21_to_v30

    path = pathlib.Path(path)
    convert_dataset_v21_to_v30.convert_dataset(path.name, root=path.parent, push_to_hub=False)


if __name__ == "__main__":
    if sys.argv[1] == "version":
        print(lerobot_dataset.CODEBASE_VERSION)
    for folder in sys.argv[2:]:
        {"items": items, "convert": convert}[sys.argv[1]](folder)
