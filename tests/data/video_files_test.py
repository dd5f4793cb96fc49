import errno
import fractions
import pathlib
import subprocess
import sys

import av
import numpy as np
import pytest

from policymix.data import video_files, videos
from policymix.data.video_files import Clip, Format

FPS = 10
SHAPE = (48, 64)
PUSHT = (
    pathlib.Path(__file__).parents[1]
    / "testdata/lerobot/pusht_v30_video/videos/observation.image/chunk-000/file-000.mp4"
)


def target(codec="av1", fps=FPS, shape=SHAPE):
    return Format(codec, fps, *shape)


def pictures(length=10, shape=SHAPE, start=0):
    """Smooth colours that move: uint8 [length, hh, ww, 3]."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    phases = np.arange(start, start + length)[:, None, None] / 3
    planes = [np.sin(x / (9 + c) + phases) * np.cos(y / (7 + c)) for c in range(3)]
    return (127.5 + 90 * np.stack(planes, -1)).astype(np.uint8)


def write(path, *episodes, fps=FPS):
    """Segments → one file, all of which it must take."""
    file = video_files.File(path, episodes[0], fps)
    assert all(file.takes(segment) for segment in episodes)
    firsts = [file.append(segment) for segment in episodes]
    file.close()
    return firsts


def segment(frames, codec="av1", **options):
    return video_files.segment(frames, target(codec, **options), "d, episode 0: 'top'")


def decoded(path):
    """(times in seconds, uint8 [n, hh, ww, 3])"""
    with av.open(str(path)) as file:
        frames = list(file.decode(video=0))
    times = [fractions.Fraction(frame.pts) * frame.time_base for frame in frames]
    return times, np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


def alike(found, written):
    """Whether a lossy frame is the one written: far nearer to it than the next in time is."""
    off = np.abs(found.astype(float) - written).mean((1, 2, 3))
    apart = np.abs(np.diff(pictures(20).astype(float), axis=0)).mean((1, 2, 3))
    return found.shape == written.shape and off.max() < apart.min() / 2


def by_another_encoder(path, length, encoder="libx264", fps=FPS, pix_fmt="yuv420p", **options):
    """A video with settings that are not LeRobot's."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(encoder, fps, options=options)
        stream.height, stream.width, stream.pix_fmt = *SHAPE, pix_fmt
        for picture in pictures(length):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    return path


def test_frames_are_encoded_as_lerobot_does(tmp_path):
    """Its own file has the same codec, pixels, clock, keyframes and parameters."""
    write(tmp_path / "a.mp4", segment(pictures(10, (96, 96)), shape=(96, 96)))
    facts = []
    for path in (PUSHT, tmp_path / "a.mp4"):
        with av.open(str(path)) as file:
            stream = file.streams.video[0]
            context = stream.codec_context
            packets = [p for p in file.demux(stream) if p.size][:10]
            facts.append(
                (
                    (stream.codec.canonical_name, context.pix_fmt, context.profile),
                    (stream.time_base, context.color_range, context.colorspace),
                    [(p.pts, p.dts, p.duration, p.is_keyframe) for p in packets],
                    context.extradata[:4],  # av1C; what follows differs by encoder's version
                    file.format.name,
                )
            )
    assert facts[0] == facts[1]


@pytest.mark.parametrize("codec", video_files.CODECS)
@pytest.mark.parametrize("fps", [10, 30, 7])
def test_episodes_follow_one_another(codec, fps, tmp_path):
    episodes = [pictures(10), pictures(1, start=40), pictures(7, start=20)]
    segments = [segment(frames, codec, fps=fps) for frames in episodes]
    assert write(tmp_path / "a.mp4", *segments, fps=fps) == [0, 10, 11]
    times, found = decoded(tmp_path / "a.mp4")
    assert times == [fractions.Fraction(k, fps) for k in range(18)]
    assert alike(found, np.concatenate(episodes))
    with av.open(str(tmp_path / "a.mp4")) as file:
        assert file.streams.video[0].average_rate == fps


@pytest.mark.parametrize("codec", video_files.CODECS)
def test_the_index_comes_before_the_frames(codec, tmp_path):
    write(tmp_path / "a.mp4", segment(pictures(10), codec))
    content = (tmp_path / "a.mp4").read_bytes()
    assert 0 < content.index(b"moov") < content.index(b"mdat")


@pytest.mark.parametrize("codec", video_files.CODECS)
def test_the_same_frames_give_the_same_bytes(codec, tmp_path):
    for name in "ab":
        write(tmp_path / name, segment(pictures(40), codec), segment(pictures(9), codec))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("codec", video_files.CODECS)
def test_clips_are_copied_bit_by_bit(codec, tmp_path):
    write(tmp_path / "a.mp4", segment(pictures(20), codec), segment(pictures(9), codec))
    _, source = decoded(tmp_path / "a.mp4")
    clips = [Clip(tmp_path / "a.mp4", *place, FPS) for place in ((20, 9), (4, 5), (0, 20), (28, 1))]
    write(tmp_path / "b.mp4", *(segment(clip, codec) for clip in clips))
    times, found = decoded(tmp_path / "b.mp4")
    assert times == [fractions.Fraction(k, FPS) for k in range(35)]
    rows = np.concatenate([np.arange(c.first_frame, c.first_frame + len(c)) for c in clips])
    np.testing.assert_array_equal(found, source[rows])


def test_clips_of_a_file_by_lerobot_are_copied_bit_by_bit(tmp_path):
    _, source = decoded(PUSHT)
    clips = [Clip(PUSHT, *place, FPS) for place in ((175, 94), (0, 78))]
    write(tmp_path / "a.mp4", *(segment(clip, shape=(96, 96)) for clip in clips))
    _, found = decoded(tmp_path / "a.mp4")
    np.testing.assert_array_equal(found, np.concatenate([source[175:269], source[:78]]))


@pytest.mark.parametrize("codec", video_files.CODECS)
def test_a_clip_from_between_keyframes_is_encoded(codec, tmp_path):
    write(tmp_path / "a.mp4", segment(pictures(20), codec))
    write(tmp_path / "b.mp4", segment(Clip(tmp_path / "a.mp4", 3, 6, FPS), codec))
    (_, source), (times, found) = decoded(tmp_path / "a.mp4"), decoded(tmp_path / "b.mp4")
    assert len(times) == 6
    assert alike(found, source[3:9])
    assert (found != source[3:9]).any()


B_FRAMES = {"g": "12", "bf": "3", "x264-params": "b-adapt=0:scenecut=0"}


@pytest.mark.parametrize(
    ("first", "length", "copied"),
    [(0, 40, True), (12, 12, True), (24, 16, True), (12, 28, True), (0, 10, False), (12, 6, False)],
)
def test_b_frames_are_copied_where_they_stand_alone(first, length, copied, tmp_path):
    """Frames 9..11 wait for a later one, and so does a run that ends among them."""
    path = by_another_encoder(tmp_path / "a.mp4", 40, **B_FRAMES)
    taken = segment(Clip(path, first, length, FPS), "h264")
    again = segment(Clip(path, first, length, FPS), "h264")
    assert (taken.delay > 0) == copied
    write(tmp_path / "b.mp4", taken, again)
    (_, source), (times, found) = decoded(path), decoded(tmp_path / "b.mp4")
    assert times == [fractions.Fraction(k, FPS) for k in range(2 * length)]
    for part in (found[:length], found[length:]):
        if copied:
            np.testing.assert_array_equal(part, source[first : first + length])
        else:
            assert alike(part, source[first : first + length])


OPEN = {
    "open groups": {"bf": "3", "x264-params": "open-gop=1:b-adapt=0:scenecut=0"},
    "gradual refresh": {"bf": "0", "x264-params": "intra-refresh=1:scenecut=0"},
}


@pytest.mark.parametrize("kind", OPEN)
@pytest.mark.parametrize(("first", "length"), [(12, 12), (24, 16), (12, 28)])
def test_keyframes_that_do_not_reset_the_decoder_are_no_beginning(kind, first, length, tmp_path):
    """H.264 calls frames keyframes behind which others look back; a copy would lose frames."""
    path = by_another_encoder(tmp_path / "a.mp4", 40, **({"g": "12"} | OPEN[kind]))
    with av.open(str(path)) as file:
        keyframes = [round(p.pts * p.time_base * FPS) for p in file.demux(video=0) if p.is_keyframe]
    assert first in keyframes
    (_, source), clip = decoded(path), Clip(path, first, length, FPS)
    write(tmp_path / "b.mp4", segment(clip, "h264"), segment(clip, "h264"))
    times, found = decoded(tmp_path / "b.mp4")
    assert times == [fractions.Fraction(k, FPS) for k in range(2 * length)]
    for part in (found[:length], found[length:]):
        assert alike(part, source[first : first + length])
        assert (part != source[first : first + length]).any()


@pytest.mark.parametrize(
    ("pix_fmt", "options"),
    [
        ("yuv444p", {}),
        ("yuvj420p", {}),
        ("yuv420p", {"colorspace": "bt709", "color_range": "tv"}),
    ],
)
def test_videos_of_other_colours_keep_what_is_seen(pix_fmt, options, tmp_path):
    path = by_another_encoder(tmp_path / "a.mp4", 12, pix_fmt=pix_fmt, **options)
    write(tmp_path / "b.mp4", segment(Clip(path, 2, 7, FPS), "av1"))
    (_, source), (_, found) = decoded(path), decoded(tmp_path / "b.mp4")
    assert alike(found, source[2:9])
    with av.open(str(tmp_path / "b.mp4")) as file:
        assert file.streams.video[0].pix_fmt == "yuv420p"


def test_another_codec_is_encoded_anew(tmp_path):
    write(tmp_path / "a.mp4", segment(pictures(10)))
    write(tmp_path / "b.mp4", segment(Clip(tmp_path / "a.mp4", 0, 10, FPS), "h264"))
    with av.open(str(tmp_path / "b.mp4")) as file:
        assert file.streams.video[0].codec.canonical_name == "h264"
    (_, source), (_, found) = decoded(tmp_path / "a.mp4"), decoded(tmp_path / "b.mp4")
    assert alike(found, source)


def test_a_file_does_not_take_what_another_decoder_needs(tmp_path):
    plain = segment(pictures(10), "h264")
    other = by_another_encoder(tmp_path / "a.mp4", 20, **B_FRAMES)
    file = video_files.File(tmp_path / "b.mp4", plain, FPS)
    assert not file.takes(segment(Clip(other, 0, 20, FPS), "h264"))
    file.append(plain)
    file.close()


@pytest.mark.parametrize("shape", [(47, 63), (6, 8), (480, 640)])
def test_av1_takes_odd_sizes(shape, tmp_path):
    write(tmp_path / "a.mp4", segment(pictures(3, shape), shape=shape))
    _, found = decoded(tmp_path / "a.mp4")
    assert found.shape == (3, *shape, 3)


def test_h264_takes_even_sizes_only():
    with pytest.raises(ValueError, match=r"episode 0: 'top': H.264 takes .* even .*\[47, 64\]"):
        segment(pictures(3, (47, 64)), "h264", shape=(47, 64))


@pytest.mark.parametrize("shape", [(1, 1), (2, 20_000)])
def test_an_encoder_that_fails_is_told(shape):
    with pytest.raises(ValueError, match=r"episode 0: 'top': the encoder libsvtav1 failed at fr"):
        segment(pictures(2, shape), shape=shape)


def damaged(path, tmp_path):
    """The first half of a video's bytes; the index at the start is whole."""
    content = path.read_bytes()
    (tmp_path / "half.mp4").write_bytes(content[: len(content) // 2])
    return tmp_path / "half.mp4"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path, _: Clip(path.with_name("no.mp4"), 0, 3, FPS), r"no.mp4 does not exist"),
        (lambda path, _: Clip(path, 0, 3, 20), r"counts 20 frames per second, the dataset 10"),
        (lambda path, _: Clip(path, 8, 13, FPS), r"a.mp4 has no frame 20, expected 13 from numb"),
        (lambda path, _: Clip(path, 40, 2, FPS), r"a.mp4 has no frame 40"),
        (lambda path, _: Clip(path, -1, 2, FPS), r"2 frames from number -1 on"),
        (lambda path, _: Clip(path, 0, 0, FPS), r"0 frames from number 0 on"),
        (lambda path, tmp: Clip(damaged(path, tmp), 16, 4, FPS), r"half.mp4"),
        (lambda path, tmp: Clip(damaged(path, tmp), 1, 19, FPS), r"half.mp4"),
        (lambda path, tmp: Clip(damaged(path, tmp), 0, 20, FPS), r"half.mp4"),
        (lambda *_: Clip(__file__, 0, 3, FPS), r"_test.py cannot be read as a video \(.*Invalid"),
    ],
)
@pytest.mark.parametrize("codec", video_files.CODECS)
def test_clips_that_are_not_there(codec, make, message, tmp_path):
    write(tmp_path / "a.mp4", segment(pictures(20), codec))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        segment(make(tmp_path / "a.mp4", tmp_path), codec)
    assert str(raised.value).startswith("d, episode 0: 'top'")
    assert "\n" not in str(raised.value)


def test_a_video_of_another_size_or_rate_is_told(tmp_path):
    path = by_another_encoder(tmp_path / "a.mp4", 12, fps=25)
    with pytest.raises(ValueError, match=r"which is no multiple of 1/10 s"):
        segment(Clip(path, 0, 5, FPS), "h264")
    with pytest.raises(ValueError, match=r"is of size \[48, 64\] .*expected \[48, 96\]"):
        segment(Clip(path, 0, 5, FPS), "h264", shape=(48, 96))


@pytest.mark.parametrize("codec", video_files.CODECS)
def test_a_video_that_is_cut_off_anywhere_is_told(codec, tmp_path):
    """Also in its header, where what the video's codec is has not been told yet."""
    write(tmp_path / "a.mp4", segment(pictures(10), codec))
    content = (tmp_path / "a.mp4").read_bytes()
    for kept in range(900):
        (tmp_path / "a.mp4").write_bytes(content[:kept])
        with pytest.raises(ValueError, match="d, episode 0: 'top': .*a.mp4"):
            segment(Clip(tmp_path / "a.mp4", 0, 10, FPS), codec)


@pytest.mark.parametrize(("fps", "scale"), [(10, 90_000), (29, 90_000), (29, 16_000)])
@pytest.mark.parametrize("off", [0, 0.1])
def test_what_the_reader_refuses_is_not_copied(fps, scale, off, tmp_path):
    """Frame 7 lies `off` frames late; else times are only rounded to the clock of the file."""
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("libx264", fps, options={"g": "2", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = *SHAPE, "yuv420p"
        stream.time_base = stream.codec_context.time_base = fractions.Fraction(1, scale)
        for k, picture in enumerate(pictures(10)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = round((k + (off if k == 7 else 0)) * scale / fps)
            frame.time_base = stream.time_base
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    clip, reader = Clip(tmp_path / "a.mp4", 0, 10, fps), videos.Reader(tmp_path / "a.mp4", fps)
    if off:
        with pytest.raises(videos.NoFrame):
            reader.get(np.arange(10))
        with pytest.raises(ValueError, match=rf"no multiple of 1/{fps} s \(within 0.0001 s\)"):
            segment(clip, "h264", fps=fps)
    else:
        assert segment(clip, "h264", fps=fps).copied
        reader.get(np.arange(10))


def test_a_disk_that_is_full_is_told(tmp_path):
    program = f"""
import resource
import numpy as np
from policymix.data import video_files
noise = np.random.default_rng(0).integers(0, 256, (60, 96, 96, 3), dtype=np.uint8)
found = video_files.segment(noise, video_files.Format("h264", 10, 96, 96), "d")
file = video_files.File({str(tmp_path / "a.mp4")!r}, found, 10)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    file.append(found)
    file.close()
except OSError as error:
    print(error.errno)
"""
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == str(errno.EFBIG)
