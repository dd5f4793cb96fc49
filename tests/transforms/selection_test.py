"""Quantiles of blocks are numpy's of everything, to the last bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policymix.transforms import selection

laws = settings(deadline=None, max_examples=60)
finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


@laws
@given(
    st.lists(st.lists(finite, max_size=20), min_size=1, max_size=4),
    st.lists(st.floats(0, 1), min_size=1, max_size=4),
    st.sampled_from([np.float32, np.float64]),
    st.booleans(),
)
def test_quantiles_are_numpys(parts, fractions, dtype, counted):
    """Of all floats that are finite: subnormal ones, both zeros, the largest."""
    parts = [*parts, [1.5]]
    blocks = [np.array(part, dtype).reshape(-1, 1) for part in parts]
    every = np.concatenate(blocks)
    if counted:  # some blocks come with counts, some do not
        counts = [np.arange(len(block)) % 3 + 1 for block in blocks]
        every = np.concatenate(
            [np.repeat(b, c, axis=0) for b, c in zip(blocks, counts, strict=True)]
        )
        blocks = list(zip(blocks, counts, strict=True))
        every = np.concatenate([every, [[2.5]]])
        blocks.append(np.array([[2.5]], dtype))
    found = selection.quantiles(
        [lambda: blocks[::2], lambda: blocks[1::2]], fractions, len(every), 1, np.dtype(dtype)
    )
    with np.errstate(over="ignore"):
        expected = np.quantile(every.astype(np.float64), fractions, axis=0)
    np.testing.assert_array_equal(found, expected)


def test_pieces_are_large_whatever_the_blocks(monkeypatch):
    monkeypatch.setattr(selection, "ROWS", 10)
    blocks = [np.full((2, 3, 1), i, np.float32) for i in range(4)] + [np.zeros((25, 1))]
    sizes = [len(values) for values, _ in selection.pieces(blocks)]
    assert sizes == [10, 2, 10, 2, 10, 10, 5]
    together = np.concatenate([values for values, _ in selection.pieces(blocks)])
    np.testing.assert_array_equal(together, np.concatenate([b.reshape(-1, 1) for b in blocks]))


def test_a_pass_that_cannot_be_repeated_is_told():
    once = iter([np.zeros((5, 1), np.float32)])
    with pytest.raises(ValueError, match="must begin a new pass"):
        selection.quantiles([lambda: once], (0.5,), 5, 1, np.dtype(np.float32))
