"""Damaged checkpoints, three hundred of them: each is refused in one line that names it, or is
mixed as the other readers of its format read the same bytes.

A format has a checksum or it has none: a flipped bit in plain numbers is a number. So the bar is
the `safetensors` library and tensorstore, which are asked about every mix that succeeds.
"""

import pathlib
import shutil
import time

import numpy as np
import pytest

from configs import common
from policymix import memory
from policymix.checkpoints import zarr
from policymix.runs import mix
from tests.checkpoints.damage import damage, one_of
from tests.checkpoints.samples import KINDS, TORCH, average, by_others, state

SECONDS, BYTES = 5, 2**28  # what refusing or mixing a few kilobytes may take


pytestmark = pytest.mark.usefixtures("few_words")


def check(kind: str, seed: int, original: pathlib.Path, root: pathlib.Path, monkeypatch) -> bool:
    """Damages a copy and mixes it with its sibling; returns whether that succeeded."""
    rng = np.random.default_rng([seed, list(KINDS).index(kind)])
    sibling, damaged = original / "0", root / f"damaged-{seed}"
    shutil.copytree(original / "1", damaged)
    how = f"{kind} {seed}, {damage(kind, seed, damaged, sibling, rng)}"
    monkeypatch.setattr(zarr, "_HELD", one_of(rng, [0, 2**25]))
    monkeypatch.setattr(zarr, "_PIECE", one_of(rng, [64, 2**20]))
    inputs, out = [str(damaged), str(sibling)], root / f"out-{seed}"
    before, began = (state(sibling), state(damaged)), time.monotonic()
    memory.reset_peak()
    held, error = memory.peak_bytes(), None
    try:
        mix.mix(common.get_config(), mix.Request(tuple(inputs[:: one_of(rng, [1, -1])]), out))
    except Exception as caught:
        error = caught
    assert time.monotonic() - began < SECONDS, how
    assert memory.peak_bytes() - held < BYTES, how
    assert (state(sibling), state(damaged)) == before, how
    assert not list(root.glob(".*")), how
    if error is None:
        expected, intact = by_others(kind, damaged), by_others(kind, sibling)
        found = by_others(kind if kind in TORCH else "own", out if kind in TORCH else out / "0")
        assert found.keys() == expected.keys() == intact.keys(), how
        for name, array in found.items():
            correct = average(expected[name], intact[name])
            assert (array.dtype, array.shape) == (correct.dtype, correct.shape), (how, name)
            assert array.tobytes() == correct.tobytes(), (how, name)
        return True
    assert not out.exists(), how
    assert type(error) is ValueError or isinstance(error, OSError), (how, repr(error))
    assert str(damaged) in str(error), (how, str(error))
    assert "\n" not in str(error), (how, str(error))
    assert len(str(error)) < 2000, (how, str(error))
    assert "tensorstore_spec" not in str(error), (how, str(error))
    return False


FAST, ALL = 7, 34  # of each of nine kinds


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_checkpoints_are_refused_or_read_as_others_read_them(
    kind, originals, tmp_path, monkeypatch
):
    for seed in range(FAST):
        check(kind, seed, originals(kind), tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_three_hundred_damaged_checkpoints_are_refused_or_read_as_others_read_them(
    kind, originals, tmp_path, monkeypatch
):
    mixed = [check(kind, k, originals(kind), tmp_path, monkeypatch) for k in range(FAST, ALL)]
    assert any(mixed)
    assert not all(mixed)
