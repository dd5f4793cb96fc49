"""Prompts as OpenPI words them for π0 and π0.5."""

import numpy as np

_BINS = np.linspace(-1.0, 1.0, 257)[:-1]


def clean(text: str) -> str:
    """Strips; underscores and newlines become spaces. Case is kept."""
    return text.strip().replace("_", " ").replace("\n", " ")


def pi0(text: str) -> str:
    """π0's prompt, and π0.5's without proprio in it: the instruction and a newline."""
    return clean(text) + "\n"


def pi05(text: str, proprio: np.ndarray) -> str:
    """π0.5's prompt with discretised proprio.

    Args:
      proprio: [p], normalised and not padded. Each value becomes its bin among 256 on [-1, 1);
        below -1 it is written as -1 and from 1 on as 255, as OpenPI does.
    """
    bins = np.digitize(proprio, _BINS) - 1
    return f"Task: {clean(text)}, State: {' '.join(map(str, bins))};\nAction: "
