"""Checkpoints of one architecture, and requests to mix them."""

import pytest

from policymix.checkpoints import streaming
from policymix.runs import mix
from tests import oracle


@pytest.fixture(scope="module")
def singles(tmp_path_factory):
    """Three checkpoints that share their norm stats, and their base."""
    root = tmp_path_factory.mktemp("singles")
    return {
        which: str(oracle.write("pi0", which, root, norm_stats_of="base"))
        for which in ("base", *oracle.VARIANTS)
    }


@pytest.fixture
def request_for(singles, tmp_path):
    def make(*which, **fields):
        chosen = tuple(singles[w] for w in which or oracle.VARIANTS)
        return mix.Request(**{"checkpoints": chosen, "output": tmp_path / "out"} | fields)

    return make


@pytest.fixture
def before_any_work(monkeypatch):
    """No array is read: what is wrong can be known from headers."""

    def read(*_, **__):
        raise AssertionError("arrays were read before the fault was told")

    monkeypatch.setattr(streaming, "mix", read)
