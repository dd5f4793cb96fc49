"""Datasets by name: folders, repositories of a hub, and what is neither."""

import pathlib

import numpy as np
import pytest

from policymix.data import lerobot, opening, rlds
from tests import hub_server

TESTDATA = pathlib.Path(__file__).parents[1] / "testdata"
PUSHT = TESTDATA / "lerobot" / "pusht_v30_video"


def test_folders_are_opened_by_what_they_hold(tmp_path, monkeypatch):
    monkeypatch.setenv("POLICYMIX_CACHE", str(tmp_path / "cache"))
    assert isinstance(opening.open_dataset(str(PUSHT)), lerobot.Dataset)
    built = next(path for path in sorted((TESTDATA / "rlds").iterdir()) if rlds.is_dataset(path))
    assert isinstance(opening.open_dataset(str(built)), rlds.Dataset)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        opening.open_dataset(str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError, match="Give one with meta/ and data/"):
        opening.open_dataset(str(tmp_path))


def test_a_repository_is_fetched_and_opened(tmp_path, monkeypatch):
    pytest.importorskip("requests", reason="pip install 'policymix[hub]'")
    constants = pytest.importorskip(
        "huggingface_hub.constants", reason="pip install 'policymix[hub]'"
    )
    with hub_server.Server().running() as server:
        monkeypatch.setenv("POLICYMIX_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        server.repositories["datasets/lerobot/pusht"] = {
            path.relative_to(PUSHT).as_posix(): path.read_bytes()
            for path in PUSHT.rglob("*")
            if path.is_file()
        }
        remote = opening.open_dataset("hf://datasets/lerobot/pusht")
    local = lerobot.open_dataset(PUSHT)
    assert remote.fingerprint() == local.fingerprint()
    frames = np.array([0, 99, 400])
    key = "observation.image"
    np.testing.assert_array_equal(remote.frames(key).get(frames), local.frames(key).get(frames))
