import io
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from policymix.data import lerobot, pictures, writer

TESTDATA = pathlib.Path(__file__).parents[1] / "testdata" / "lerobot"
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
    loaded = pictures.load(dataset, "top")
    assert (loaded.dtype, loaded.shape) == (np.uint8, (9, 6, 8, 3))
    np.testing.assert_array_equal(loaded, images)
    assert "reading top: 9/9" in capsys.readouterr().err
    assert list(pictures.stored(dataset, "top")) == [pictures.png(image) for image in images]


def test_jpegs_are_read_too(dataset, images):
    smooth = np.full((6, 8, 3), (200, 100, 50), np.uint8)
    _replace(dataset, 1, _jpeg(smooth))
    loaded = pictures.load(dataset, "top")
    assert np.abs(loaded[1].astype(int) - smooth).max() <= 2
    np.testing.assert_array_equal(loaded[[0, 2]], images[[0, 2]])


def test_channels_first_in_the_declaration_are_last_in_the_array(dataset, images):
    dataset.features["top"] |= {"shape": [3, 6, 8], "names": ["channels", "height", "width"]}
    np.testing.assert_array_equal(pictures.load(dataset, "top"), images)
    dataset.features["top"]["names"] = None
    np.testing.assert_array_equal(pictures.load(dataset, "top"), images)


@pytest.mark.parametrize("part", [slice(0, 0), slice(0, 60), slice(9, None)])
def test_a_damaged_picture_is_named(dataset, images, part):
    _replace(dataset, 2, pictures.png(images[2])[part])
    with pytest.raises(ValueError, match=r"/d: 'top', frame 2: .* copy or record"):
        pictures.load(dataset, "top")


def test_a_picture_without_bytes_is_named(dataset):
    _replace(dataset, 1, None)
    with pytest.raises(ValueError, match="'top', frame 1, has no bytes"):
        pictures.load(dataset, "top")


@pytest.mark.parametrize(
    ("picture", "found"),
    [
        (pictures.png(np.zeros((8, 6, 3), np.uint8)), r"RGB \[8, 6\]"),
        (_jpeg(np.zeros((6, 8, 3), np.uint8), "L"), r"L \[6, 8\]"),
    ],
)
def test_a_picture_unlike_its_declaration_is_named(dataset, picture, found):
    _replace(dataset, 0, picture)
    with pytest.raises(ValueError, match=rf"frame 0: .*expected RGB \[6, 8, 3\], found {found}"):
        pictures.load(dataset, "top")


def test_a_feature_stored_as_something_else(dataset):
    table = pq.read_table(dataset.path / DATA)
    paths = pa.array(["a.png"] * 3)
    pq.write_table(table.set_column(0, "top", paths), dataset.path / DATA)
    with pytest.raises(ValueError, match="'top' is stored as string, expected pictures"):
        pictures.load(dataset, "top")


def test_single_channels_are_refused_by_name(dataset):
    dataset.features["top"] |= {"shape": [6, 8, 1]}
    with pytest.raises(ValueError, match=r"'top' declares pictures of shape \[6, 8, 1\]"):
        pictures.load(dataset, "top")


@pytest.mark.parametrize("name", ["pusht_v30_video", "pusht_v21_video"])
def test_videos_are_refused_by_name(name):
    dataset = lerobot.open_dataset(TESTDATA / name)
    with pytest.raises(ValueError, match="'observation.image' is a video, and videos are not"):
        pictures.load(dataset, "observation.image")


def test_other_features_and_unknown_ones(dataset):
    with pytest.raises(ValueError, match=r"'reward' has dtype float32, expected image.*\['top'\]"):
        pictures.load(dataset, "reward")
    with pytest.raises(ValueError, match="did you mean 'top'"):
        pictures.load(dataset, "topp")


def test_png_is_lossless_and_always_the_same(images):
    data = pictures.png(images[0])
    assert data.startswith(b"\x89PNG")
    assert data == pictures.png(images[0].copy())
    np.testing.assert_array_equal(pictures.decode(data, (6, 8), "here"), images[0])
    for wrong in (images[0].astype(np.float32), images[0][..., :1], images):
        with pytest.raises(ValueError, match="a picture is uint8"):
            pictures.png(wrong)
