"""PaliGemma as big_vision publishes it."""

import zipfile

import numpy as np
import pytest

from policymix import trees
from policymix.checkpoints import npz, store
from tests import oracle


@pytest.fixture(scope="module")
def language_and_vision():
    flat = trees.flatten(oracle.params("pi0"))
    return {p: x for p, x in flat.items() if p.startswith("PaliGemma/") and "_1/" not in p}


def write(path, arrays, save=np.savez):
    save(path, **{f"params/{p.removeprefix('PaliGemma/')}": x for p, x in arrays.items()}, step=1)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_holds_what_was_written(save, language_and_vision, tmp_path):
    path = write(tmp_path / "pt_224.npz", language_and_vision, save)
    found = trees.flatten(store.load_params(path))
    assert found.keys() == language_and_vision.keys()
    for name, array in language_and_vision.items():
        np.testing.assert_array_equal(found[name], array)


def test_is_read_in_pieces_forwards_and_again(language_and_vision, tmp_path):
    path = write(tmp_path / "pt_224.npz", language_and_vision, np.savez_compressed)
    name = "PaliGemma/llm/embedder/input_embedding"
    leaf, whole = npz.open_archive(path)[name], language_and_vision[name].reshape(-1)
    with leaf.opened() as reader:
        for start, count in ((0, 7), (7, 1000), (2000, 5), (3, 4), (len(whole) - 2, 2)):
            out = np.empty(count, leaf.dtype)
            reader.read(start, out)
            np.testing.assert_array_equal(out, whole[start : start + count])


def test_columns_first_and_objects_are_refused(tmp_path):
    for name, array in (
        ("a", np.asfortranarray(np.ones((2, 3)))),
        ("b", np.array([{}], object)),
    ):
        path = tmp_path / f"{name}.npz"
        np.savez(path, **{"params/img/x": array})
        with pytest.raises(ValueError, match=r"cannot be read as \.npz: it holds"):
            store.open_checkpoint(path)


def test_other_archives_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones(2))
    with pytest.raises(ValueError, match="not a PaliGemma as big_vision publishes it"):
        store.open_checkpoint(tmp_path / "a.npz")


def test_a_cut_archive_is_named(language_and_vision, tmp_path):
    path = write(tmp_path / "pt_224.npz", language_and_vision)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"pt_224.npz cannot be read as \.npz"):
        store.open_checkpoint(path)


def test_a_member_that_is_damaged_is_named(language_and_vision, tmp_path):
    path = write(tmp_path / "pt_224.npz", language_and_vision)
    name = "params/llm/embedder/input_embedding.npy"
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo(name).header_offset + 500
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 8)
    leaf = store.open_checkpoint(path).leaves["PaliGemma/llm/embedder/input_embedding"]
    with pytest.raises(ValueError, match="input_embedding.*is damaged, fetch it again"):
        leaf.read()
