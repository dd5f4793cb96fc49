"""Where a checkpoint comes from: fingerprints, distances to its siblings, and leaks of validation
data.
"""

import hashlib
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from policymix.checkpoints import assets, layout, safetensors

_ENDS = 65_536  # bytes hashed at both ends of a file


def fingerprint(checkpoint: str) -> str:
    """SHA-256 over the names, sizes and both ends of a checkpoint's parameter files.

    Cheap at any size, and different for any two checkpoints that were written apart; it does not
    prove that every byte in between is whole.
    """
    place, digest = layout.find(checkpoint), hashlib.sha256()
    if place.kind == "orbax":
        paths = sorted(p for p in place.params.rglob("*") if p.is_file())
    else:
        paths = safetensors.files_of(place.params)
    root = place.params if place.kind == "orbax" else place.directory
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(root)} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(size - _ENDS, 0))
            digest.update(file.read(_ENDS))
    return digest.hexdigest()


def leaks(checkpoints: Sequence[str], meta: Mapping[str, Any] | None) -> list[str]:
    """A sentence for every checkpoint that was trained on some of the validation episodes."""
    found = []
    for checkpoint in checkpoints:
        for training in assets.trainings_of(checkpoint):
            if not meta or training["fingerprint"] != meta.get("fingerprint"):
                continue
            shared = sorted(set(training["episodes"]) & set(meta.get("episodes", ())))
            if shared:
                shown = ", ".join(map(str, shared[:8])) + ("…" if len(shared) > 8 else "")
                found.append(
                    f"{checkpoint} was trained on {len(shared)} of the {len(meta['episodes'])} "
                    f"validation episodes ({shown}): its loss is not honest"
                )
    return found


def geometry(gram: np.ndarray, square_norm: float, *, base: int | None) -> dict[str, Any]:
    """Distances between inputs, and cosines of their task vectors, from ⟨θ_i - θ_0, θ_j - θ_0⟩.

    Args:
      gram: float64 [n, n]. square_norm: ‖θ_0‖².
      base: which row is the base that task vectors start from; None if there is no base.

    Returns:
      distance [n][n], relative_distance [n][n] (in units of ‖θ_0‖), cosine (between the inputs
      other than the base; None without a base), and `meaning`: what that says about mixing, in
      words.
    """
    diagonal = np.diag(gram)
    distance = np.sqrt(np.maximum(diagonal[:, None] + diagonal[None, :] - 2 * gram, 0.0))
    relative = distance / math.sqrt(square_norm) if square_norm else np.zeros_like(distance)
    cosine = None
    if base is not None:
        tuned = [i for i in range(len(gram)) if i != base]
        vectors = gram - gram[base][None, :] - gram[:, base][:, None] + gram[base, base]
        vectors = vectors[np.ix_(tuned, tuned)]
        lengths = np.sqrt(np.maximum(np.diag(vectors), 1e-300))
        cosine = np.clip(vectors / np.outer(lengths, lengths), -1.0, 1.0)
    return {
        "distance": distance.tolist(),
        "relative_distance": relative.tolist(),
        "cosine": None if cosine is None else cosine.tolist(),
        "meaning": _meaning(relative, cosine),
    }


def _meaning(relative: np.ndarray, cosine: np.ndarray | None) -> str:
    n = len(relative)
    if n < 2:
        return "there is one input, so there is nothing to compare"
    apart = relative[np.triu_indices(n, 1)]
    if apart.min() == 0.0:
        return "at least two inputs do not differ anywhere that was looked at: they add little"
    far = f"{apart.min():.2g}" + (f" to {apart.max():.2g}" if n > 2 else "")
    words = f"the inputs lie {far} apart, in units of the length of the first"
    if apart.max() < 1e-4:
        words += "; they are nearly the same model, so a mix can hardly differ from them"
    if apart.max() > 0.5:
        words += (
            "; that is far, as for models with different ancestors, whose mixes are usually useless"
        )
    if cosine is not None and len(cosine) > 1:
        pairs = cosine[np.triu_indices(len(cosine), 1)]
        words += f"; the cosines of their task vectors are {pairs.min():.2f} to {pairs.max():.2f}"
        if pairs.min() > 0.95:
            words += ", so they learned the same and will gain little from each other"
        elif abs(pairs).max() < 0.05:
            words += ", so they learned unrelated things and a mix dilutes each"
    return words


def describe(checkpoint: str) -> dict[str, str]:
    """The path and fingerprint of an input, for mix.json."""
    return {
        "path": str(pathlib.Path(checkpoint).absolute()),
        "fingerprint": fingerprint(checkpoint),
    }
