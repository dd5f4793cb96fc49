"""Checkpoints that tests of this folder share."""

import faulthandler
import pathlib

import pytest

from policymix.reports import mixes
from tests.checkpoints.samples import KINDS


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """kind → a directory with two checkpoints, 0 and 1."""
    made = {}

    def make(kind: str) -> pathlib.Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            for seed in (0, 1):
                (made[kind] / str(seed)).mkdir()
                KINDS[kind](made[kind] / str(seed), seed)
        return made[kind]

    return make


@pytest.fixture
def few_words(monkeypatch):
    """The picture takes half a second, and a thread that hangs is to be seen."""
    monkeypatch.setattr(mixes, "draw", lambda *_: None)
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
