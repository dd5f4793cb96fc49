import concurrent.futures
import io
import itertools
import json
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from policymix.data import frames, lerobot, pictures, writer

TESTDATA = pathlib.Path(__file__).parents[1] / "testdata" / "lerobot"
CAMERA = "observation.image"
VIDEO = "videos/observation.image/chunk-000/file-000.mp4"
DATA = "data/chunk-000/file-000.parquet"
FEATURE = {"dtype": "image", "shape": [6, 8, 3], "names": ["height", "width", "channels"]}
NUMBER = {"dtype": "float32", "shape": [1], "names": None}


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (9, 6, 8, 3), dtype=np.uint8)


@pytest.fixture
def dataset(tmp_path, images):
    features = {"top": FEATURE, "reward": NUMBER}
    with writer.Writer(
        tmp_path / "d", fps=10, features=features, data_files_size_in_mb=1e-3
    ) as opened:
        for part in np.split(images, 3):
            opened.add_episode({"top": part, "reward": np.zeros(3)}, "look")
    return lerobot.open_dataset(tmp_path / "d")


def _replace(dataset, frame, picture):
    """Puts other bytes in place of a stored picture; the first file holds frames 0..2."""
    table = pq.read_table(dataset.path / DATA)
    rows = table["top"].to_pylist()
    rows[frame]["bytes"] = picture
    column = pa.array(rows, table.schema.field("top").type)
    pq.write_table(table.set_column(0, "top", column), dataset.path / DATA)


def _jpeg(image, mode="RGB"):
    buffer = io.BytesIO()
    Image.fromarray(image).convert(mode).save(buffer, "JPEG", quality=100, subsampling=0)
    return buffer.getvalue()


def test_pictures_of_all_files_in_order(dataset, images, capsys):
    assert len(list(dataset.path.glob("data/*/*"))) == 3
    loaded = frames.load(dataset, "top")
    assert (loaded.dtype, loaded.shape) == (np.uint8, (9, 6, 8, 3))
    np.testing.assert_array_equal(loaded, images)
    assert "reading top: 9/9" in capsys.readouterr().err
    pieces = (frames.separate(*piece) for piece in dataset.frames("top").encoded())
    assert list(itertools.chain(*pieces)) == [pictures.png(image) for image in images]


def test_jpegs_are_read_too(dataset, images):
    smooth = np.full((6, 8, 3), (200, 100, 50), np.uint8)
    _replace(dataset, 1, _jpeg(smooth))
    loaded = frames.load(dataset, "top")
    assert np.abs(loaded[1].astype(int) - smooth).max() <= 2
    np.testing.assert_array_equal(loaded[[0, 2]], images[[0, 2]])


def test_channels_first_in_the_declaration_are_last_in_the_array(dataset, images):
    dataset.features["top"] |= {"shape": [3, 6, 8], "names": ["channels", "height", "width"]}
    np.testing.assert_array_equal(frames.load(dataset, "top"), images)
    dataset.features["top"]["names"] = None
    np.testing.assert_array_equal(frames.load(dataset, "top"), images)


@pytest.mark.parametrize("part", [slice(0, 0), slice(0, 60), slice(9, None)])
def test_a_damaged_picture_is_named(dataset, images, part):
    _replace(dataset, 2, pictures.png(images[2])[part])
    with pytest.raises(
        ValueError, match=r"/d: 'top', frame 2 of episode 0, in file-000.parquet: .* copy or record"
    ):
        frames.load(dataset, "top")


def test_a_picture_without_bytes_is_named(dataset):
    _replace(dataset, 1, None)
    with pytest.raises(
        ValueError, match="'top', frame 1 of episode 0, in file-000.parquet, has no bytes"
    ):
        frames.load(dataset, "top")


@pytest.mark.parametrize(
    ("picture", "found"),
    [
        (pictures.png(np.zeros((8, 6, 3), np.uint8)), r"RGB \[8, 6\]"),
        (_jpeg(np.zeros((6, 8, 3), np.uint8), "L"), r"L \[6, 8\]"),
    ],
)
def test_a_picture_unlike_its_declaration_is_named(dataset, picture, found):
    _replace(dataset, 0, picture)
    with pytest.raises(
        ValueError, match=rf"frame 0 of episode 0, .*expected RGB \[6, 8, 3\], found {found}"
    ):
        frames.load(dataset, "top")


def test_a_feature_stored_as_something_else(dataset):
    table = pq.read_table(dataset.path / DATA)
    paths = pa.array(["a.png"] * 3)
    pq.write_table(table.set_column(0, "top", paths), dataset.path / DATA)
    with pytest.raises(ValueError, match="'top' is stored as string, expected pictures"):
        frames.load(dataset, "top")


def test_single_channels_are_refused_by_name(dataset):
    dataset.features["top"] |= {"shape": [6, 8, 1]}
    with pytest.raises(ValueError, match=r"'top' declares pictures of shape \[6, 8, 1\]"):
        frames.load(dataset, "top")


def test_other_features_and_unknown_ones(dataset):
    with pytest.raises(
        ValueError, match=r"'reward' has dtype float32, expected image or video.*\['top'\]"
    ):
        frames.load(dataset, "reward")
    with pytest.raises(ValueError, match="did you mean 'top'"):
        frames.load(dataset, "topp")


@pytest.fixture
def small_memory(monkeypatch, tmp_path):
    """Encoded pictures are laid out in a file; gives the directory for such files."""
    monkeypatch.setattr(frames, "IN_MEMORY", 100)
    monkeypatch.setenv("POLICYMIX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "frames"


def _sample(dataset, images, key="top"):
    """get() of several orders agrees with the pictures."""
    found = dataset.frames(key)
    assert (found.shape, found.num_frames) == (images.shape[1:3], len(images))
    for indices in ([], [3], range(9), [8, 0, 0, 5], [2, 2], np.array([7, 1], np.int32)):
        got = found.get(indices)
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, images[list(indices)])
    for wrong in ([-1], [len(images)]):
        with pytest.raises(IndexError, match=rf"frames 0\.\.{len(images) - 1}"):
            found.get(wrong)


def test_random_access_from_memory(dataset, images):
    _sample(dataset, images)
    assert dataset.frames("top") is dataset.frames("top")


def test_random_access_from_a_file(dataset, images, small_memory, capsys):
    _sample(dataset, images)
    (folder,) = [path for path in small_memory.iterdir() if path.is_dir()]
    said = capsys.readouterr().err
    assert str(folder) in said
    assert "reading top: 9/9" in said
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    _sample(lerobot.open_dataset(dataset.path), images)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    assert "reading" not in capsys.readouterr().err


def test_a_changed_data_file_is_laid_out_anew(dataset, images, small_memory):
    _sample(dataset, images)
    changed = images.copy()
    changed[1] = 255 - images[1]
    _replace(dataset, 1, pictures.png(changed[1]))
    _sample(lerobot.open_dataset(dataset.path), changed)
    assert len([path for path in small_memory.iterdir() if path.is_dir()]) == 2


@pytest.mark.parametrize("damage", ["cut", "lost", "numbers"])
def test_a_damaged_layout_is_made_again(dataset, images, small_memory, damage):
    _sample(dataset, images)
    (folder,) = [path for path in small_memory.iterdir() if path.is_dir()]
    data, offsets = folder / "pictures.bin", folder / "offsets.npy"
    if damage == "cut":
        os.truncate(data, 50)
    elif damage == "lost":
        data.unlink()
    else:
        offsets.write_bytes(b"not numbers")
    _sample(lerobot.open_dataset(dataset.path), images)


def test_a_damaged_picture_leaves_no_layout(dataset, images, small_memory):
    _replace(dataset, 1, None)
    with pytest.raises(
        ValueError, match="'top', frame 1 of episode 0, in file-000.parquet, has no bytes"
    ):
        lerobot.open_dataset(dataset.path).frames("top").get([0])
    assert [path for path in small_memory.iterdir() if path.suffix != ".lock"] == []


def test_no_room_for_a_layout(dataset, small_memory, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"frames/\w+ needs up to .* make room"):
        dataset.frames("top").get([0])


KILLED = """
    import os, signal, sys
    from policymix.data import frames, lerobot
    frames.IN_MEMORY = 100
    made = lerobot.open_dataset(sys.argv[1]).frames("top")
    encoded, seen = made.encoded, []
    def dying():
        for piece in encoded():
            yield piece
            seen.append(piece)
            if len(seen) == 2:  # of three files
                os.kill(os.getpid(), signal.SIGKILL)
    made.encoded = dying
    made.get([0])
"""


def test_a_process_killed_while_laying_out_leaves_nothing_that_is_used(
    dataset, images, small_memory
):
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(dataset.path)]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    (left,) = [path for path in small_memory.iterdir() if path.is_dir()]
    assert left.name.startswith(".")
    _sample(dataset, images)
    assert not left.exists()


@pytest.mark.parametrize("kind", ["memory", "file", "video"])
def test_threads_share_frames(dataset, images, kind, request):
    if kind == "file":
        request.getfixturevalue("small_memory")
    if kind == "video":
        dataset = lerobot.open_dataset(TESTDATA / "pusht_v30_video")
        images = frames.load(dataset, CAMERA)
    found = dataset.frames(CAMERA if kind == "video" else "top")
    parts = np.array_split(np.random.default_rng(0).permutation(len(images))[:120], 6)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        for part, got in zip(parts, pool.map(found.get, parts), strict=True):
            np.testing.assert_array_equal(got, images[part])
    again = pickle.loads(pickle.dumps(found))
    np.testing.assert_array_equal(again.get(parts[0]), images[parts[0]])
    assert len(pickle.dumps(found)) < 5000


@pytest.mark.parametrize("name", ["pusht_v30_video", "pusht_v21_video"])
def test_videos_are_what_a_plain_loop_decodes(name, capsys):
    dataset = lerobot.open_dataset(TESTDATA / name)
    expected = []
    for path in sorted(dataset.path.glob("videos/**/*.mp4")):
        with av.open(str(path)) as container:
            expected += [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    expected = np.stack(expected)
    np.testing.assert_array_equal(frames.load(dataset, CAMERA), expected)
    assert "reading observation.image: 753/753" in capsys.readouterr().err
    rng, found = np.random.default_rng(0), dataset.frames(CAMERA)
    indices = rng.permutation(753)[:40]
    np.testing.assert_array_equal(found.get(indices), expected[indices])
    np.testing.assert_array_equal(found.get(np.sort(indices)), expected[np.sort(indices)])


@pytest.fixture(params=["pusht_v30_video", "pusht_v21_video"])
def video(request, tmp_path):
    """(a copy of the dataset, the video of its episode 3)."""
    path = shutil.copytree(TESTDATA / request.param, tmp_path / "copy")
    dataset = lerobot.open_dataset(path)
    return dataset, dataset.clip(CAMERA, 3)[0]


WHERE = r"^/.*/copy: 'observation\.image', episode 3: "


def test_a_video_that_is_missing_or_cut_off(video):
    dataset, path = video
    content, frame = path.read_bytes(), dataset.episode_from[3]
    dataset.frames(CAMERA).get([frame])
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"{WHERE}.*\.mp4: expected .*cut off|whole video"):
        dataset.frames(CAMERA).get([frame])
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{WHERE}.*\.mp4: no such video"):
        dataset.item(frame)


def test_a_video_of_another_size_or_rate(video):
    dataset, _ = video
    info = json.loads((dataset.path / "meta/info.json").read_text())
    info["features"][CAMERA]["shape"] = [96, 95, 3]
    (dataset.path / "meta/info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=rf"{WHERE}.*\[96, 96\].*declares \[96, 95\]"):
        lerobot.open_dataset(dataset.path).frames(CAMERA).get([dataset.episode_from[3]])
    for file in dataset.path.glob("data/*/*.parquet"):
        table = pq.read_table(file)
        times = pa.array(np.asarray(table["timestamp"]) / 2, pa.float32())
        place = table.schema.get_field_index("timestamp")
        pq.write_table(table.set_column(place, "timestamp", times), file)
    for file in dataset.path.glob("meta/episodes/*/*.parquet"):
        table = pq.read_table(file)
        for name in (f"videos/{CAMERA}/from_timestamp", f"videos/{CAMERA}/to_timestamp"):
            times = pa.array(np.asarray(table[name]) / 2)
            table = table.set_column(table.schema.get_field_index(name), name, times)
        pq.write_table(table, file)
    (dataset.path / "meta/info.json").write_text(json.dumps(info | {"fps": 20}))
    said = rf"{WHERE}.*\.mp4: pictures are|{WHERE}.*\.mp4: 10 frames/s, .*declares 20"
    with pytest.raises(ValueError, match=said):
        lerobot.open_dataset(dataset.path).frames(CAMERA).get([dataset.episode_from[3]])


def test_a_video_with_fewer_frames_than_its_episodes(video):
    dataset, path = video
    shorter = path.with_name("shorter.mp4")
    count = dataset.clip(CAMERA, 3)[1] + 40
    with av.open(str(path)) as source, av.open(str(shorter), "w") as target:
        stream = target.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 96, "yuv420p"
        for frame, _ in zip(source.decode(video=0), range(count), strict=False):
            frame.pict_type = av.video.frame.PictureType.NONE
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
    shorter.replace(path)
    with pytest.raises(ValueError, match=rf"{WHERE}expected frames .* found {count} frames; copy"):
        dataset.frames(CAMERA).get([dataset.episode_from[3]])


def test_damage_inside_a_video_names_frame_and_episode(video):
    dataset, path = video
    content = bytearray(path.read_bytes())
    size = 1500
    for start in range(len(content) // 3, len(content) * 2 // 3, 2 * size):
        content[start : start + size] = bytes(size)
    path.write_bytes(content)
    indices = np.arange(dataset.episode_from[3], dataset.episode_to[3])
    with pytest.raises(ValueError, match=r"frame \d+ of episode 3: .*\.mp4.* frame \d+") as caught:
        dataset.frames(CAMERA).get(indices)
    assert "\n" not in str(caught.value)
