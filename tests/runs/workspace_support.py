"""A folder with what documents name: checkpoints of the :debug π0.5, validation batches, data, and
a bucket that serves one of them.
"""

import contextlib
import pathlib
from collections.abc import Iterator

import pytest

from configs import common
from policymix.checkpoints import assets, layout, safetensors
from policymix.data import validation
from tests import oracle


def orbax(path: pathlib.Path, which: str, model: str = "pi05", like: str = "base") -> None:
    """A step directory of a variant, with the norm stats that `like` has."""
    written = oracle.write(model, which, path.parent / f".{path.name}", norm_stats_of=like)
    path.parent.mkdir(parents=True, exist_ok=True)
    written.rename(path)


def torch(path: pathlib.Path, which: str, naming: str) -> None:
    """A PyTorch checkpoint of a variant, with the same norm stats."""
    safetensors.save_params(oracle.params("pi05", which), path, naming)
    asset_id, stats = assets.norm_stats_of(oracle.step("pi05", "base"))
    assets.write_norm_stats(path / "assets" / asset_id / assets.NORM_STATS, stats)


def batches(path: pathlib.Path, model: str = "pi05") -> None:
    """A validation file of two batches: one to select on, one held out."""
    first, second, *_ = oracle.batches(model)
    validation.save(path, [first], [second], {})


def dataset(path: pathlib.Path) -> None:
    """Eight episodes of PushT."""
    path.symlink_to(common.PUSHT)


@contextlib.contextmanager
def bucket(root: pathlib.Path, found: dict[str, pathlib.Path]) -> Iterator:
    """Serves directories at gs://openpi-assets/checkpoints/NAME while the block runs."""
    pytest.importorskip("google_crc32c", reason="pip install 'policymix[hub]'")
    pytest.importorskip("requests", reason="pip install 'policymix[hub]'")
    from tests import hub_server

    with hub_server.Server().running() as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLICYMIX_CACHE", str(root / "cache"))
        patch.setenv("STORAGE_EMULATOR_HOST", server.url)
        patch.setenv("NO_PROXY", "*")
        for name, directory in found.items():
            for file in sorted(p for p in directory.rglob("*") if p.is_file()):
                where = f"checkpoints/{name}/{file.relative_to(directory).as_posix()}"
                server.put("openpi-assets", where, file.read_bytes())
        layout._fetched.cache_clear()  # what another test fetched lies in another cache
        yield server
        layout._fetched.cache_clear()
