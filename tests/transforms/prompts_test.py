"""Prompts, letter by letter as OpenPI words them."""

import numpy as np
import pytest

from policymix.transforms import prompts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pick up the cup", "pick up the cup\n"),
        ("  Pick_up the\ncup \n", "Pick up the cup\n"),
        ("", "\n"),
    ],
)
def test_pi0s_prompt_is_the_instruction_and_a_newline(text, expected):
    assert prompts.pi0(text) == expected


def test_pi05s_prompt_has_the_proprio_in_bins():
    """256 of them on [-1, 1), each 1/128 wide; what lies below is -1, what lies above 255."""
    proprio = np.array([-1.001, -1, -1 + 1 / 128, -1e-9, 0, 0.5, 0.9921, 0.9922, 1, 7], np.float32)
    assert prompts.pi05(" open_drawer\n", proprio) == (
        "Task: open drawer, State: -1 0 1 127 128 192 254 255 255 255;\nAction: "
    )
