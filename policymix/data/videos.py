"""Videos: frames of mp4 files by their number, with PyAV (AV1 by dav1d, H.264 and others).

Frame k of a file has the presentation time k / fps, as LeRobot writes it. A file stays open, and
its decoder goes on from where it stands wherever that costs less than a jump to a keyframe.
"""

import collections
import fractions
import os
import pathlib
import threading
from typing import Any

import av
import av.video.reformatter
import numpy as np

from policymix import files

TOLERANCE_S = 1e-4  # how far a frame may lie from k / fps, in seconds; LeRobot's default
OPEN_FILES = 16  # per thread: more cameras than any robot has, and few file descriptors
_RATE = 0.01  # a rate that differs by more is another rate, whatever a container rounds
# How far before a frame a jump goes, in seconds. Where frames are stored in another order than they
# are shown in, a jump can end behind the frame; then it is tried again.
_BACK = (0, 1, 10, 1_000_000)
_JUMP = 1  # frames that could be decoded in the time that a jump to a keyframe takes
_AGAIN = "copy or download the dataset again"
_STEPS = "Check fps in meta/info.json, or encode the video at a constant rate"


class NoFrame(ValueError):
    """What is wrong with the frame number `frame` of a file."""

    def __init__(self, frame: int, message: str):
        super().__init__(message)
        self.frame = frame


class Reader:
    """An open video file. For one thread at a time.

    Attributes:
      path: the file.
      num_frames: as its container says.
      fps: a fraction, frames per second: as given, else as its container says.
      shape: (hh, ww).

    Args:
      path: the file.
      fps: the rate that it should have; None for any.
      shape: (hh, ww) that it should have; None for any.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file that is cut off or holds no video, of another rate or size.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        fps: float | None = None,
        shape: tuple[int, int] | None = None,
    ):
        self.path = pathlib.Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: no such video; {_AGAIN}")
        try:
            self._container = av.open(str(path))
        except (av.FFmpegError, OSError, ValueError) as error:
            raise self._unreadable(error) from error
        try:
            self._check_whole()
            self._stream = self._container.streams.video[0]
            self._stream.codec_context.thread_count = 1  # the callers bring threads
            self.num_frames = self._stream.frames or len(self._stream.index_entries)
            self.shape = (self._stream.height, self._stream.width)
            self.fps = self._checked_rate(fps)
            if shape is not None and self.shape != tuple(shape):
                raise ValueError(
                    f"{path}: pictures are {list(self.shape)} [height, width], meta/info.json "
                    f"declares {list(shape)}; correct the shape there, or encode the video again"
                )
        except BaseException:
            self.close()
            raise
        ticks = 1 / (self.fps * self._stream.time_base)  # of the stream's clock, per frame
        self._ticks = (ticks.numerator, ticks.denominator)
        self._second = int(1 / self._stream.time_base)
        self._tolerance = TOLERANCE_S / float(self._stream.time_base)
        entries = self._stream.index_entries
        # The index has times of decoding, which frames that refer to later ones put off.
        self._delay = (self._stream.start_time or 0) - entries[0].timestamp if len(entries) else 0
        self._reformatter = av.video.reformatter.VideoReformatter()
        self._decoder = self._container.decode(self._stream)
        self._frame: Any = None  # the last that was decoded
        self._ahead: int | None = 0  # the number of the next one; None where that is not known

    def close(self) -> None:
        self._decoder = self._frame = None
        self._container.close()

    def get(self, frames: np.ndarray) -> np.ndarray:
        """The frames of these numbers, int [n]: uint8 [n, hh, ww, 3], in their order.

        Raises:
          NoFrame: a number that the file does not have, or one that cannot be decoded.
        """
        numbers = np.asarray(frames, np.int64).tolist()
        images = np.empty((len(numbers), *self.shape, 3), np.uint8)
        before = None
        for place in sorted(range(len(numbers)), key=numbers.__getitem__):
            if before is not None and numbers[before] == numbers[place]:
                images[place] = images[before]
            else:
                self._convert(self._find(numbers[place]), images[place])
            before = place
        return images

    def _find(self, number: int) -> av.VideoFrame:
        """The decoded frame `number`."""
        if not 0 <= number < self.num_frames:
            raise NoFrame(
                number, f"{self.path} has {self.num_frames} frames, no frame {number}; {_AGAIN}"
            )
        target = self._pts(number)
        if self._frame is not None and abs(self._frame.pts - target) <= self._tolerance:
            return self._frame
        try:
            going_on = self._goes_on(number, target)
            frame, passed = self._decode_to(target) if going_on else (None, False)
            for seconds in () if going_on else _BACK:
                self._jump(max(0, target - seconds * self._second))
                frame, passed = self._decode_to(target)
                if passed or (frame is not None and frame.pts <= target + self._tolerance):
                    break
        except av.FFmpegError as error:
            self._ahead = None
            raise NoFrame(number, str(self._unreadable(error, f", frame {number}"))) from error
        if frame is None or abs(frame.pts - target) > self._tolerance:
            tick = self._stream.time_base
            found = "none" if frame is None else f"one at {float(frame.pts * tick):.6f} s"
            raise NoFrame(
                number,
                f"{self.path}: expected frame {number} at {float(target * tick):.6f} s (within "
                f"{TOLERANCE_S} s), found {found}; the file runs at "
                f"{float(self._stream.average_rate or 0):.6g} frames/s. {_STEPS}",
            )
        return frame

    def _pts(self, number: int) -> int:
        """The time of a frame, on the stream's clock, rounded."""
        numerator, denominator = self._ticks
        return (2 * number * numerator + denominator) // (2 * denominator)

    def _goes_on(self, number: int, target: int) -> bool:
        """Whether decoding on reaches a frame sooner than a jump to the keyframe before it."""
        if self._ahead is None or number < self._ahead:
            return False
        if number - self._ahead <= _JUMP:
            return True
        keyframe = self._stream.index_entries.search_timestamp(target - self._delay)
        return keyframe <= self._ahead + _JUMP  # -1 where the file has no index of them

    def _jump(self, target: int) -> None:
        self._frame, self._ahead = None, None
        self._container.seek(target, stream=self._stream)
        self._decoder = self._container.decode(self._stream)

    def _decode_to(self, target: int) -> tuple[av.VideoFrame | None, bool]:
        """(the first frame at or after a time, None where there is none; whether others came first)

        If others came first, and the frame is at another time, then none is at this one.
        """
        passed = False
        for frame in self._decoder:
            if frame.pts is not None and frame.pts >= target - self._tolerance:
                numerator, denominator = self._ticks
                self._frame = frame
                self._ahead = round(frame.pts * denominator / numerator) + 1
                return frame, passed
            passed = True
        self._frame, self._ahead = None, None  # at the end: only a jump helps
        return None, passed

    def _convert(self, frame: av.VideoFrame, image: np.ndarray) -> None:
        """Writes a frame's RGB into uint8 [hh, ww, 3]."""
        if (frame.height, frame.width) != self.shape:
            raise ValueError(
                f"{self.path}: a frame is {[frame.height, frame.width]}, others are "
                f"{list(self.shape)}; encode the video again"
            )
        # One reformatter for all frames keeps its tables; `to_ndarray` makes them for each.
        plane = self._reformatter.reformat(frame, format="rgb24", threads=1).planes[0]
        height, width = self.shape
        lines = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
        image[:] = lines[:height, : 3 * width].reshape(height, width, 3)

    def _check_whole(self) -> None:
        """ValueError unless there is a video and all its bytes, which the index says, are there."""
        if not self._container.streams.video:
            raise ValueError(f"{self.path} holds no video; {_AGAIN}")
        stream = self._container.streams.video[0]
        entries = stream.index_entries
        if not len(entries):
            raise ValueError(f"{self.path}: the video is cut off before its index ends; {_AGAIN}")
        if stream.codec_context is None:
            raise ValueError(
                f"{self.path}: PyAV has no decoder for it here; encode it as AV1 or H.264"
            )
        size = self.path.stat().st_size
        if len(entries) and entries[-1].pos + entries[-1].size > size:
            raise ValueError(
                f"{self.path}: expected {entries[-1].pos + entries[-1].size} bytes or more, found "
                f"{size}: the video is cut off; {_AGAIN}"
            )

    def _checked_rate(self, fps: float | None) -> fractions.Fraction:
        rate = self._stream.average_rate
        if fps is None:
            if not rate:
                raise ValueError(f"{self.path} says no frame rate; encode the video again")
            return fractions.Fraction(rate)
        # One frame alone has no rate.
        if rate and self.num_frames > 1 and abs(rate - fps) > _RATE * fps:
            raise ValueError(
                f"{self.path}: {float(rate):.6g} frames/s, meta/info.json declares "
                f"{fps:g}. {_STEPS}"
            )
        return fractions.Fraction(fps)

    def _unreadable(self, error: Exception, where: str = "") -> ValueError:
        size = self.path.stat().st_size
        return ValueError(
            f"{self.path}{where}: expected a whole video, found {size} bytes that cannot be "
            f"decoded ({files.reason(getattr(error, 'strerror', None) or error)}); {_AGAIN}"
        )


class Pool:
    """Readers of many files, open once per file and thread; the least recently used is closed.

    It works after a fork and pickles: what is open stays behind.
    """

    def __init__(self, open_files: int = OPEN_FILES):
        self._open_files = open_files
        self._local = threading.local()

    def __getstate__(self) -> dict:
        return {"_open_files": self._open_files}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["_open_files"])

    def reader(
        self, path: str, fps: float | None = None, shape: tuple[int, int] | None = None
    ) -> Reader:
        """The reader of a file, of this thread alone. Raises as `Reader`."""
        # A forked process shares its parent's place in every open file: it must open its own.
        if getattr(self._local, "process", None) != os.getpid():
            self._local.process = os.getpid()
            self._local.readers = collections.OrderedDict()
        readers = self._local.readers
        try:
            now = os.stat(path)
        except OSError:
            return Reader(path, fps, shape)  # says what is wrong
        key = (path, fps, shape, now.st_size, now.st_mtime_ns)  # a file that was replaced is new
        if key not in readers:
            while len(readers) >= self._open_files:
                readers.popitem(last=False)[1].close()
            readers[key] = Reader(path, fps, shape)
        readers.move_to_end(key)
        return readers[key]
