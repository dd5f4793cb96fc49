"""What `make bench` runs in processes of their own, to measure their memory: little is imported."""

import pathlib
from collections.abc import Callable

import numpy as np
import simplejpeg

from policymix import memory
from policymix.data import examples, tfds, tfrecord


def read(path: str) -> Callable[[], None]:
    """All episodes of an RLDS dataset, decoded."""
    memory.keep_freed()  # as in training

    def run():
        for episode in tfds.Builder(path).episodes("train"):
            assert len(episode["steps"]["action"])

    run()  # memory that a process touches for the first time is slow
    return run


def decode(path: str) -> Callable[[], None]:
    """The same pictures, from memory."""
    encoded = [
        bytes(picture)
        for record in tfrecord.read(next(pathlib.Path(path).glob("*.tfrecord*")))
        for picture in examples.parse(record.data)["steps/observation/image"]
    ]

    buffer = np.empty((224, 224, 3), np.uint8)

    def run():
        for picture in encoded:
            simplejpeg.decode_jpeg(picture, fastdct=True, buffer=buffer)

    run()
    return run
