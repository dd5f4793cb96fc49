"""Videos written: frames encoded as LeRobot does, and runs of frames copied from other videos.

An episode of one camera becomes a `Segment`, packets in memory; a `File` takes one after the other
and is never rewritten. Frame k of a file has the time k / fps, exactly.
"""

import dataclasses
import fractions
import io
import os
import pathlib
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import av
import numpy as np

from policymix import files
from policymix.data import videos

os.environ.setdefault("SVT_LOG", "0")  # the AV1 encoder prints a page for every video otherwise

PIX_FMT = "yuv420p"
# LeRobot's settings. The bytes of x264 depend on its threads, and the default is the machine's
# cores; those of SVT-AV1 do not.
_ENCODERS = {
    "av1": ("libsvtav1", {"preset": "12", "crf": "30", "g": "2", "svtav1-params": "fast-decode=0"}),
    "h264": ("libx264", {"crf": "30", "g": "2", "threads": "4"}),
}
CODECS = tuple(_ENCODERS)
_SAME_COLOURS = (2, 5, 6)  # colour matrices: not said, and the two names of what is assumed then
_FULL_RANGE = 2
_IDR = 5  # the type of H.264's unit behind which nothing looks back
OPEN_FILES = 16  # that `Sources` keeps
_AGAIN = "copy or download the video again"


@dataclasses.dataclass(frozen=True)
class Clip:
    """A run of frames of an existing video: `num_frames` from number `first_frame` on.

    `fps` is the file's; frame k lies at k / fps seconds.
    """

    path: str | os.PathLike
    first_frame: int
    num_frames: int
    fps: int

    def __len__(self) -> int:
        return self.num_frames


@dataclasses.dataclass(frozen=True)
class Format:
    """What a camera's files hold: `codec` is of CODECS; fps; the size in pixels."""

    codec: str
    fps: int
    height: int
    width: int

    def info(self) -> dict[str, Any]:
        """What LeRobot's info.json says of such a video."""
        return {
            "video.height": self.height,
            "video.width": self.width,
            "video.codec": self.codec,
            "video.pix_fmt": PIX_FMT,
            "video.is_depth_map": False,
            "video.fps": self.fps,
            "video.channels": 3,
            "has_audio": False,
        }


class Segment:
    """The packets of an episode's frames, 0.. in the order of display, with what decodes them.

    Attributes:
      num_frames: how many; size: bytes of all packets; copied: whether they are a clip's own.
      delay: by how many frames decoding must run ahead of display (0 without B-frames).
      parameters: segments that agree in these can follow one another in a file.
    """

    def __init__(
        self, container, stream, packets: list[av.Packet], places: list[int], copied: bool
    ):
        self._container = container  # the stream and its packets live no longer than this
        self.stream, self.packets, self.places, self.copied = stream, packets, places, copied
        self.num_frames = len(packets)
        self.size = sum(packet.size for packet in packets)
        self.delay = max(order - place for order, place in enumerate(places))
        context = stream.codec_context
        size = (context.height, context.width)
        self.parameters = (stream.codec.canonical_name, size, context.pix_fmt, context.extradata)


class File:
    """An mp4 in the making, to which segments are appended; whole once `close` has returned.

    Raises:
      OSError: the disk is full, or the file cannot be written.
    """

    def __init__(self, path: pathlib.Path, like: Segment, fps: int):
        self._path, self._tick = path, fractions.Fraction(1, fps)
        self._parameters, self._delay = like.parameters, like.delay
        self.num_frames = self.size = 0
        self._container = av.open(str(path), "w", format="mp4", options={"movflags": "faststart"})
        self._stream = self._container.add_stream_from_template(like.stream, opaque=True)
        self._stream.time_base = self._tick

    def takes(self, segment: Segment) -> bool:
        """Whether a segment can follow: it is decoded with the same parameters."""
        return segment.parameters == self._parameters and segment.delay <= self._delay

    def append(self, segment: Segment) -> int:
        """Writes a segment, which cannot be used again; returns the number of its first frame."""
        first = self.num_frames
        for order, (packet, place) in enumerate(zip(segment.packets, segment.places, strict=True)):
            packet.time_base, packet.stream = self._tick, self._stream
            packet.pts, packet.dts, packet.duration = first + place, first + order - self._delay, 1
            self._container.mux(packet)
        self.num_frames += segment.num_frames
        self.size += segment.size
        return first

    def close(self) -> None:
        self._container.close()
        try:
            with av.open(str(self._path)) as written:
                found = written.streams.video[0].frames
        except av.FFmpegError as error:
            raise OSError(f"{self._path} was not written whole ({files.reason(error)})") from error
        if found != self.num_frames:
            raise OSError(f"{self._path}: wrote {self.num_frames} frames, and it holds {found}")

    def abandon(self) -> None:
        """Lets go of a file that will be deleted."""
        self._container.close()


class Sources:
    """Videos that stay open from one clip to the next, as opening takes longer than most copying.

    Threads may share it: no two of them have the same open file at a time.
    """

    def __init__(self):
        self._idle: dict[str, Any] = {}
        self._lock = threading.Lock()

    def take(self, clip: Clip, where: str) -> Any:
        """A clip's file, open at any place."""
        container = self._idle.pop(str(clip.path), None)
        try:
            return container or av.open(str(clip.path))
        except av.FFmpegError as error:
            raise _unreadable(clip, where, error) from error

    def keep(self, clip: Clip, container: Any) -> None:
        """Gives back what was taken, if nothing went wrong with it."""
        with self._lock:
            self._idle[str(clip.path)] = container
            if len(self._idle) > OPEN_FILES:  # it is closed once its last segment is gone
                self._idle.pop(next(iter(self._idle)))


def segment(
    frames: Iterable[np.ndarray] | Clip,
    target: Format,
    where: str,
    sources: Sources | None = None,
) -> Segment:
    """The packets of an episode: a clip is copied if it can be, all else is encoded.

    A clip is copied bit by bit if its codec and pixel format are the target's, and its frames can
    be decoded by themselves: the first is a keyframe, and none hangs on a frame outside.

    Args:
      frames: uint8 [hh, ww, 3] each, or a Clip of that size and of the target's fps.
      where: names the feature and the episode in errors.
      sources: keeps the files of clips open.

    Raises:
      FileNotFoundError, ValueError: there is no such video, it is damaged, ends too early, or is of
        another size or fps; or the encoder does not take the frames.
    """
    if not isinstance(frames, Clip):
        pictures = (av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in frames)
        return _encoded(pictures, target, where)
    _check_clip(frames, target, where)
    sources = sources or Sources()
    container = sources.take(frames, where)
    stream = _checked_stream(container, frames, target, where)
    if (stream.codec.canonical_name, stream.codec_context.pix_fmt) == (target.codec, PIX_FMT):
        found = _cut(container, stream, frames, where)
        if found is not None:
            sources.keep(frames, container)
            return found
    with Sources().take(frames, where) as container:
        stream = _checked_stream(container, frames, target, where)
        return _encoded(_decoded(container, stream, frames, where), target, where)


def _check_clip(clip: Clip, target: Format, where: str) -> None:
    if clip.fps != target.fps:
        raise ValueError(
            f"{where}: the clip of {clip.path} counts {clip.fps} frames per second, the dataset "
            f"{target.fps}; write it with fps={clip.fps}, or give the frames that are to be kept"
        )
    if clip.num_frames < 1 or clip.first_frame < 0:
        raise ValueError(
            f"{where}: the clip of {clip.path} has {clip.num_frames} frames from number "
            f"{clip.first_frame} on; expected one or more, from 0 on"
        )
    if not pathlib.Path(clip.path).is_file():
        raise FileNotFoundError(f"{where}: the video {clip.path} does not exist; {_AGAIN}")


def _checked_stream(container, clip: Clip, target: Format, where: str) -> Any:
    """The container's video, of the target's size."""
    if not container.streams.video:
        raise ValueError(f"{where}: {clip.path} holds no video; {_AGAIN}")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise ValueError(
            f"{where}: {clip.path} is cut off, or of a codec that PyAV has no decoder for here; "
            f"{_AGAIN}, or encode it as AV1 or H.264"
        )
    found = [stream.codec_context.height, stream.codec_context.width]
    if found != [target.height, target.width]:
        raise ValueError(
            f"{where}: {clip.path} is of size {found} (height, width), expected "
            f"{[target.height, target.width]}; declare the feature with the video's size"
        )
    return stream


def _packets(
    container, stream, clip: Clip, frame: int, where: str
) -> Iterator[tuple[int | None, av.Packet]]:
    """(number, packet) in the order of decoding, from the keyframe at or before a frame on;
    (None, an empty packet) at the end of the file.
    """
    tick = float(stream.time_base) * clip.fps  # in frames
    back = 0
    try:
        while True:  # the index goes by times of decoding: the keyframe found may be too late
            start = max(0, frame - back)
            container.seek(round(start / tick), stream=stream, backward=True)
            packets = container.demux(stream)
            packet = next(packets)
            if not start or (packet.pts is not None and packet.pts * tick < frame + 0.5):
                break
            back = 2 * back + 8
        while True:
            if packet.dts is None and not packet.size:
                yield None, packet
                return
            if packet.is_corrupt or packet.pts is None:
                raise ValueError(f"{where}: {clip.path} is damaged or truncated; {_AGAIN}")
            number = round(packet.pts * tick)
            off = abs(packet.pts - round(number / tick)) * float(stream.time_base)
            if off > videos.TOLERANCE_S:  # as the reader, so that both take the same videos
                raise ValueError(
                    f"{where}: {clip.path} has a frame at {packet.pts * float(stream.time_base)} "
                    f"s, which is no multiple of 1/{clip.fps} s (within {videos.TOLERANCE_S} s); "
                    "give the clip the video's fps, or encode it at a constant rate"
                )
            yield number, packet
            packet = next(packets)
    except (av.FFmpegError, StopIteration) as error:
        raise _unreadable(clip, where, error) from error


def _cut(container, stream, clip: Clip, where: str) -> Segment | None:
    """The clip's own packets; None if they cannot be decoded by themselves.

    Decoding looks back only, so a run of packets from a keyframe on is enough for its frames; if
    these are just the clip's, none of them waits for a packet behind.
    """
    packets, places = [], []
    for number, packet in _packets(container, stream, clip, clip.first_frame, where):
        if number is None or len(packets) == clip.num_frames:
            break
        if not packets:
            if number < clip.first_frame:
                continue
            if number > clip.first_frame or not _starts_anew(stream, packet):
                return None
        if packet.has_sidedata("new_extradata"):  # the file has several sets of parameters
            return None
        packets.append(packet)
        places.append(number - clip.first_frame)
    if sorted(places) != list(range(clip.num_frames)):
        return None
    return Segment(container, stream, packets, places, copied=True)


def _starts_anew(stream, packet: av.Packet) -> bool:
    """Whether a packet is a keyframe behind which nothing looks back.

    In AV1 every one is. In H.264 an I-frame may be called one that does not reset the decoder; an
    mp4 has its units with their lengths (4 bytes) before them.
    """
    if not packet.is_keyframe or stream.codec.canonical_name != "h264":
        return packet.is_keyframe
    data, place = memoryview(packet), 0
    while place + 4 < len(data):
        if data[place + 4] & 31 == _IDR:
            return True
        place += 4 + int.from_bytes(data[place : place + 4], "big")
    return False


def _decoded(container, stream, clip: Clip, where: str) -> Iterator[av.VideoFrame]:
    """The clip's frames in order, none left out."""
    tick = float(stream.time_base) * clip.fps
    wanted, end = clip.first_frame, clip.first_frame + clip.num_frames
    stream.thread_type = "AUTO"
    try:
        # Behind some keyframes decoders need more before they show a frame: the start is right.
        for start in dict.fromkeys((clip.first_frame, 0)):
            packets = _packets(container, stream, clip, start, where)
            for frame in (frame for _, packet in packets for frame in packet.decode()):
                number = round(frame.pts * tick)
                if number > wanted:
                    break
                if number == wanted:
                    yield frame
                    wanted += 1
                if wanted == end:
                    return
            if wanted > clip.first_frame:
                break
    except av.FFmpegError as error:
        raise _unreadable(clip, where, error) from error
    raise _missing(clip, wanted, where)


def _missing(clip: Clip, frame: int, where: str) -> ValueError:
    return ValueError(
        f"{where}: {clip.path} has no frame {frame}, expected {clip.num_frames} from number "
        f"{clip.first_frame} on; it is truncated or not the dataset's: {_AGAIN}"
    )


def _encoded(frames: Iterator[av.VideoFrame], target: Format, where: str) -> Segment:
    name, options = _ENCODERS[target.codec]
    if name == "libx264" and (target.height % 2 or target.width % 2):
        raise ValueError(
            f"{where}: H.264 takes pictures of even height and width only, got "
            f"{[target.height, target.width]}; write codec av1, or dtype image"
        )
    buffer, given = io.BytesIO(), 0
    try:
        with av.open(buffer, "w", format="mp4") as output:
            stream = output.add_stream(name, target.fps, options=options)
            stream.height, stream.width, stream.pix_fmt = target.height, target.width, PIX_FMT
            for frame in map(_neutral, frames):
                frame.pts, frame.time_base = given, fractions.Fraction(1, target.fps)
                output.mux(stream.encode(frame))
                given += 1
            output.mux(stream.encode())
    except av.FFmpegError as error:
        raise ValueError(
            f"{where}: the encoder {name} failed at frame {given} of {target.height} x "
            f"{target.width} ({files.reason(error)}); try another codec, or dtype image"
        ) from error
    buffer.seek(0)
    container = av.open(buffer)
    stream = container.streams.video[0]
    packets = [packet for packet in container.demux(stream) if packet.size]
    if len(packets) != given:
        raise ValueError(f"{where}: the encoder {name} made {len(packets)} of {given} frames")
    tick = float(stream.time_base) * target.fps
    places = [round(packet.pts * tick) for packet in packets]
    return Segment(container, stream, packets, places, copied=False)


def _neutral(frame: av.VideoFrame) -> av.VideoFrame:
    """A frame without what an earlier encoder decided of it; colours as the files here have them.

    Decoded frames stay as they are, if they mean the same colours: each way to RGB and back blurs.
    """
    said = frame.colorspace in _SAME_COLOURS and frame.color_range != _FULL_RANGE
    if frame.format.name != "rgb24" and not (frame.format.name == PIX_FMT and said):
        frame = av.VideoFrame.from_ndarray(frame.to_ndarray(format="rgb24"), format="rgb24")
    frame.pict_type = 0
    return frame


def _unreadable(clip: Clip, where: str, error: BaseException) -> ValueError:
    return ValueError(
        f"{where}: {clip.path} cannot be read as a video ({files.reason(error) or 'it ends'}); "
        f"{_AGAIN}"
    )
