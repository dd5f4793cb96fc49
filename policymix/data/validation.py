"""Validation files: fixed batches, normalised, padded and tokenised, ready for the model.

An `.npz` with the entries `<i>/image/<camera>` (uint8 or float in [-1, 1]),
`<i>/image_mask/<camera>`, `<i>/state`, `<i>/tokenized_prompt`, `<i>/tokenized_prompt_mask` and
`<i>/actions` for batch i, and optionally `meta`: JSON with the dataset's `fingerprint`, the
`episodes`, and the batch numbers of `selection` and `held_out`.
"""

import io
import json
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from policymix import files
from policymix.structs import Batch, Observation


class Validation(NamedTuple):
    """Batches to choose coefficients on, batches to report on, and what the file says of itself."""

    selection: list[Batch]
    held_out: list[Batch]
    meta: dict[str, Any]


def load(path: pathlib.Path, held_out: float = 0.2) -> Validation:
    """Reads a validation file.

    Args:
      held_out: fraction of the batches, the last ones, to hold out where the file does not say
        which; at least one is, and 0 holds out none.

    Raises:
      FileNotFoundError, ValueError: not there, a pickle, not an .npz, damaged, or lacking an entry.
    """
    if not path.is_file():
        raise FileNotFoundError(f"validation file {path} does not exist")
    arrays = _read(path)
    meta = _meta(arrays.pop("meta", None), path)
    numbers = sorted({int(name.split("/")[0]) for name in arrays if name.split("/")[0].isdigit()})
    if not numbers or numbers != list(range(len(numbers))):
        raise ValueError(
            f"{path}: expected batches 0, 1, 2 … as '<i>/actions' and so on; found the batches "
            f"{numbers}"
        )
    batches = [_batch(arrays, i, path) for i in numbers]
    if "selection" in meta:
        chosen, held = meta["selection"], meta.get("held_out", [])
        if len({*chosen, *held} & {*numbers}) < len([*chosen, *held]):
            raise ValueError(
                f"{path}: meta selects the batches {chosen} and holds out {held}; expected "
                f"distinct numbers of the {len(numbers)} batches"
            )
    else:
        count = min(max(1, round(held_out * len(batches))), len(batches)) if held_out > 0 else 0
        chosen, held = numbers[: len(batches) - count], numbers[len(batches) - count :]
    if not chosen:
        raise ValueError(
            f"{path}: holding out {held_out:.0%} of {len(batches)} batches leaves none to select "
            "on; dump more batches, or set config.mix.held_out=0 to select on all"
        )
    return Validation([batches[i] for i in chosen], [batches[i] for i in held], meta)


def _read(path: pathlib.Path) -> dict[str, np.ndarray]:
    if not zipfile.is_zipfile(path):
        kind = (
            "a pickle, which is never loaded (it could run code)"
            if _is_pickle(path)
            else "not an .npz archive"
        )
        raise ValueError(
            f"validation file {path} is {kind}; write one with experiments/dump_validation.py"
        )
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise ValueError(
            f"validation file {path} is damaged or holds Python objects ({error})"
        ) from error


def _meta(entry: np.ndarray | None, path: pathlib.Path) -> dict[str, Any]:
    try:
        meta = {} if entry is None else json.loads(str(entry))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: the entry 'meta' is not readable JSON ({error})") from error
    if not isinstance(meta, dict):
        raise ValueError(f"{path}: the entry 'meta' is {meta!r}, expected a JSON object")
    return meta


def _is_pickle(path: pathlib.Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == b"\x80" or path.suffix in (".pkl", ".pickle")


def _batch(arrays: dict[str, np.ndarray], i: int, path: pathlib.Path) -> Batch:
    def get(name, *, required=True):
        if required and f"{i}/{name}" not in arrays:
            raise ValueError(f"{path}: batch {i} lacks {name!r}")
        return arrays.get(f"{i}/{name}")

    prefix = f"{i}/image/"
    cameras = [name.removeprefix(prefix) for name in arrays if name.startswith(prefix)]
    actions = get("actions")
    for name, array in (
        (n.partition("/")[2], a) for n, a in arrays.items() if n.startswith(f"{i}/")
    ):
        _check_array(array, f"{path}: {name!r} of batch {i}", name.split("/")[0], len(actions))
    masks = {c: get(f"image_mask/{c}", required=False) for c in cameras}
    return Batch(
        Observation(
            images={c: get(f"image/{c}") for c in cameras},
            image_masks={
                c: np.ones(len(actions), bool) if m is None else m for c, m in masks.items()
            },
            proprio=get("state"),
            prompt_tokens=get("tokenized_prompt", required=False),
            prompt_mask=get("tokenized_prompt_mask", required=f"{i}/tokenized_prompt" in arrays),
        ),
        actions,
    )


_KINDS = {  # numpy's letters for the dtypes that an entry may have
    "image": "uf",
    "image_mask": "b",
    "state": "f",
    "tokenized_prompt": "iu",
    "tokenized_prompt_mask": "b",
    "actions": "f",
}


def _check_array(array: np.ndarray, what: str, entry: str, batch_size: int) -> None:
    kinds, kind = _KINDS.get(entry, array.dtype.kind), array.dtype.kind
    if kind not in kinds or (entry == "image" and kind == "u" and array.dtype != np.uint8):
        raise ValueError(
            f"{what} has dtype {array.dtype}; expected numpy kind {' or '.join(kinds)}"
        )
    if not array.ndim or len(array) != batch_size:
        raise ValueError(f"{what} has shape {array.shape}; actions have {batch_size} examples")
    if kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{what} holds NaN or infinity")
    if kind == "f" and entry == "image" and np.abs(array).max(initial=0) > 1.01:
        raise ValueError(f"{what} reaches {np.abs(array).max():.4g}; float pictures lie in [-1, 1]")


def save(
    path: pathlib.Path, selection: Sequence[Batch], held_out: Sequence[Batch], meta: dict[str, Any]
) -> None:
    """Writes a validation file, whole or not at all; selection batches come first."""
    entries = {}
    for i, batch in enumerate([*selection, *held_out]):
        observation = batch.observation
        for camera, image in observation.images.items():
            entries[f"{i}/image/{camera}"] = image
            entries[f"{i}/image_mask/{camera}"] = observation.image_masks[camera]
        entries[f"{i}/state"] = observation.proprio
        if observation.prompt_tokens is not None:
            entries[f"{i}/tokenized_prompt"] = observation.prompt_tokens
            entries[f"{i}/tokenized_prompt_mask"] = observation.prompt_mask
        entries[f"{i}/actions"] = batch.actions
    numbers = list(range(len(selection) + len(held_out)))
    split = {"selection": numbers[: len(selection)], "held_out": numbers[len(selection) :]}
    entries["meta"] = np.array(json.dumps(meta | split))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{name: np.asarray(value) for name, value in entries.items()})
    files.write_whole(path, buffer.getvalue())
