import concurrent.futures
import fractions
import multiprocessing
import pathlib
import pickle
import shutil

import av
import numpy as np
import pytest

from policymix.data import videos

FILE = (
    pathlib.Path(__file__).parents[1]
    / "testdata/lerobot/pusht_v30_video/videos/observation.image/chunk-000/file-000.mp4"
)


@pytest.fixture(scope="module")
def decoded():
    """All frames by a loop over PyAV: uint8 [753, 96, 96, 3]."""
    with av.open(str(FILE)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def _encode(path, count, *, codec="libx264", fps=10, size=(64, 48), skip=(), **options):
    """A video whose frame k has the grey level 4 (k modulo 60)."""
    width, height = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = fractions.Fraction(1, 90_000)
        stream.codec_context.time_base = stream.time_base
        for k in set(range(count)) - set(skip):
            image = np.full((height, width, 3), 4 * (k % 60), np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = k * 90_000 // fps, stream.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _levels(images):
    return np.rint(images.mean(axis=(1, 2, 3)) / 4).astype(int).tolist()


def test_any_order_of_frames_is_that_of_a_plain_loop(decoded):
    reader, rng = videos.Reader(FILE), np.random.default_rng(0)
    assert (reader.num_frames, reader.shape, reader.fps) == (753, (96, 96), 10)
    for frames in (
        [752, 0, 1, 1, 0],
        range(100, 120),
        range(120, 90, -1),
        [5],
        [5],
        [7, 6],
        *(rng.integers(0, 753, 9) for _ in range(20)),
        [],
    ):
        images = reader.get(np.array(frames, int))
        assert images.dtype == np.uint8
        np.testing.assert_array_equal(images, decoded[list(frames)])


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {"g": "2"}),
        ("libx264", {"g": "25", "bf": "3"}),  # frames are stored in another order than shown
        ("libx264", {"g": "100", "bf": "2", "x264-params": "open-gop=1:keyint=12:scenecut=0"}),
        ("libsvtav1", {"g": "20", "preset": "12"}),
    ],
)
@pytest.mark.parametrize("fps", [10, 30])
def test_codecs_and_keyframes(tmp_path, codec, options, fps):
    path = _encode(tmp_path / "a.mp4", 60, codec=codec, fps=fps, **options)
    reader, rng = videos.Reader(path, fps, (48, 64)), np.random.default_rng(0)
    for frames in (range(60), [59, 0], [40], [38, 41], *(rng.integers(0, 60, 4) for _ in range(9))):
        frames = list(frames)
        assert _levels(reader.get(frames)) == frames


def test_a_jump_is_made_only_where_it_saves_frames(tmp_path):
    reader = videos.Reader(_encode(tmp_path / "a.mp4", 60, g="20", sc_threshold="0"))
    jumps, jump = [], reader._jump
    reader._jump = lambda target: (jumps.append(target), jump(target))
    reader.get([0, 1, 3, 10, 19])
    assert jumps == []  # the keyframe before each is behind what is decoded
    reader.get([45])
    assert len(jumps) == 1
    reader.get([46, 59])
    assert len(jumps) == 1
    reader.get([58])
    assert len(jumps) == 2


def test_a_single_frame_has_no_rate(tmp_path):
    reader = videos.Reader(_encode(tmp_path / "a.mp4", 1), 10)
    assert reader.get([0]).shape == (1, 48, 64, 3)


def test_numbers_that_are_not_there():
    reader = videos.Reader(FILE)
    for number in (-1, 753):
        with pytest.raises(videos.NoFrame, match=rf"file-000\.mp4 has 753 .*no frame {number}"):
            reader.get([0, number])
    reader.get([752])


def test_a_frame_that_was_dropped_is_named(tmp_path):
    reader = videos.Reader(_encode(tmp_path / "a.mp4", 120, skip=[7], g="10"), 10)
    said = r"a\.mp4: expected frame 7 at 0\.700000 s \(within 0\.0001 s\), found one at 0\.80"
    with pytest.raises(videos.NoFrame, match=said) as caught:
        reader.get([3, 7, 9])
    assert caught.value.frame == 7
    assert _levels(reader.get([9, 6, 8])) == [9, 6, 8]


def test_a_rate_that_is_not_the_datasets(tmp_path):
    path = _encode(tmp_path / "a.mp4", 40, fps=10)
    with pytest.raises(ValueError, match=r"a\.mp4: 10 frames/s, meta/info\.json declares 12"):
        videos.Reader(path, 12)
    path = _encode(tmp_path / "b.mp4", 40, fps=fractions.Fraction(2997, 100))
    reader = videos.Reader(path, 30)  # near enough at first; then frames drift away
    reader.get([1])
    with pytest.raises(videos.NoFrame, match=r"frame 39 .*runs at 29\.97 frames/s.*Check fps"):
        reader.get([39])


def test_a_size_that_is_not_declared(tmp_path):
    path = _encode(tmp_path / "a.mp4", 2)
    with pytest.raises(ValueError, match=r"a\.mp4: pictures are \[48, 64\].*declares \[64, 48\]"):
        videos.Reader(path, 10, (64, 48))


@pytest.mark.parametrize("kept", [0, 100, 0.3, 0.9])
@pytest.mark.parametrize("index_first", [True, False])
def test_a_file_that_is_cut_off(tmp_path, kept, index_first):
    path = tmp_path / "a.mp4"
    if index_first:
        shutil.copy(FILE, path)
    else:
        _encode(path, 60, g="2")
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(
        ValueError,
        match=r"a\.mp4: expected .*(whole video|cut off).*copy or|holds no video; copy or",
    ) as e:
        videos.Reader(path)
    assert "\n" not in str(e.value)


def test_a_file_that_is_cut_off_anywhere_is_called_so(tmp_path):
    """Also in its header, where what the video's codec is has not been told yet."""
    path, content = tmp_path / "a.mp4", FILE.read_bytes()
    for kept in range(900):
        path.write_bytes(content[:kept])
        with pytest.raises(ValueError, match=r"whole video|cut off|holds no video"):
            videos.Reader(path)


def test_damage_inside_is_named_with_its_frame(tmp_path):
    content = bytearray(FILE.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 3000] = bytes(3000)
    (tmp_path / "a.mp4").write_bytes(content)
    reader = videos.Reader(tmp_path / "a.mp4", 10)
    with pytest.raises(videos.NoFrame, match=r"a\.mp4.* frame \d+") as caught:
        reader.get(np.arange(753))
    assert caught.value.frame > 100
    reader.get([0, 752])  # what is whole can still be read


def test_what_is_no_video(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.mp4: no such video; copy"):
        videos.Reader(tmp_path / "nowhere.mp4")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44_100, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 44_100
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match=r"sound\.mp4 holds no video"):
        videos.Reader(tmp_path / "sound.mp4")


def test_a_pool_keeps_few_files_open_and_each_only_once(tmp_path):
    paths = [str(_encode(tmp_path / f"{k}.mp4", 2)) for k in range(4)]
    pool = videos.Pool(3)
    first, second, third = (pool.reader(path) for path in paths[:3])
    assert pool.reader(paths[0]) is first
    pool.reader(paths[3])  # the second was used longest ago
    with pytest.raises(Exception, match="not open|closed"):
        second._container.seek(0)
    assert pool.reader(paths[0]) is first
    assert pool.reader(paths[2]) is third
    assert pool.reader(paths[1]) is not second


def test_a_pool_notices_that_a_file_was_replaced(tmp_path):
    path, pool = _encode(tmp_path / "a.mp4", 4), videos.Pool()
    assert pool.reader(str(path)).num_frames == 4
    _encode(path, 6)
    assert pool.reader(str(path)).num_frames == 6


def _sums(pool, numbers):
    return [int(pool.reader(str(FILE)).get([k])[0].sum()) for k in numbers]


def test_a_pool_is_good_for_threads_and_processes(decoded):
    pool = videos.Pool()
    parts = np.array_split(np.random.default_rng(0).permutation(753)[:80], 4)
    expected = [[int(decoded[k].sum()) for k in part] for part in parts]
    assert _sums(pool, parts[0]) == expected[0]
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        assert list(threads.map(lambda part: _sums(pool, part), parts)) == expected
    assert _sums(pickle.loads(pickle.dumps(pool)), parts[1]) == expected[1]


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_pool_in_another_process(decoded, method):
    pool = videos.Pool()
    context = multiprocessing.get_context(method)
    numbers = list(range(0, 700, 20))
    pool.reader(str(FILE)).get([300])
    with concurrent.futures.ProcessPoolExecutor(1, context) as processes:
        there = processes.submit(_sums, pool, numbers)
        here = _sums(pool, numbers)  # at the same time: the open file is not shared
        assert there.result() == here == [int(decoded[k].sum()) for k in numbers]
