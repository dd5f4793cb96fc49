"""LeRobot's normalisation statistics: in files beside the model that describe its processors, and
in the first published checkpoints among the model's own tensors.
"""

import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from policymix import files
from policymix.checkpoints import safetensors
from policymix.checkpoints.leaves import Leaf
from policymix.transforms.normalize import NormStats, Stats

_FEATURES = {"state": "observation.state", "actions": "action"}  # ours → LeRobot's
_FIELDS = ("mean", "std", "q01", "q99")
_STEPS = ("normalizer_processor", "unnormalizer_processor")
BUFFER = re.compile(r"(?:un)?normalize_(?:inputs|targets|outputs)\.buffer_(\w+)\.(\w+)")


def state_files(directory: pathlib.Path) -> list[pathlib.Path]:
    """The files that hold statistics, as policy_preprocessor.json and its sibling name them."""
    found = []
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        if not (directory / name).is_file():
            continue
        content = files.read_json(directory / name)
        steps = content.get("steps", []) if isinstance(content, dict) else None
        if not isinstance(steps, list):
            raise ValueError(f"{directory / name} does not list the steps of a processor")
        for step in steps:
            file = step.get("state_file") if isinstance(step, dict) else None
            if file is None or step.get("registry_name") not in _STEPS:
                continue
            if pathlib.PurePath(str(file)).name != file or not (directory / file).is_file():
                raise ValueError(
                    f"{directory / name} names the state file {file!r}, which is not beside it"
                )
            found.append(directory / file)
    return found


def read(directory: pathlib.Path) -> Stats | None:
    """The statistics beside a LeRobot model; None if there are none."""
    file = next(iter(state_files(directory)), None)
    if file is None:
        return None
    tensors, _ = safetensors.open_tensors(file)
    return _stats(
        {
            (feature, field): tensors[f"{feature}.{field}"].read()
            for feature in _FEATURES.values()
            for field in _FIELDS
            if f"{feature}.{field}" in tensors
        },
        file,
    )


def read_buffers(tensors: Mapping[str, Leaf]) -> Stats | None:
    """The statistics among the tensors of a first-published checkpoint; None if there are none."""
    known = {feature.replace(".", "_"): feature for feature in _FEATURES.values()}
    values = {}
    for name, leaf in tensors.items():
        matched = BUFFER.fullmatch(name)
        if matched and matched[1] in known:
            values[known[matched[1]], matched[2]] = leaf.read()
    return _stats(values, next((leaf.where for leaf in tensors.values()), ""))


def _stats(values: Mapping[tuple[str, str], np.ndarray], where: str | os.PathLike) -> Stats | None:
    found = {}
    for key, feature in _FEATURES.items():
        read = {f: values[feature, f] for f in _FIELDS if (feature, f) in values}
        fields = {f: np.asarray(x, np.float64).reshape(-1) for f, x in read.items()}
        if any(np.isnan(field).any() for field in fields.values()):
            raise ValueError(f"{where}: the statistics of {feature} hold NaN; it is damaged")
        # A policy without statistics has infinity in their place until it is trained.
        fields = {f: x for f, x in fields.items() if np.isfinite(x).all()}
        if "mean" in fields and "std" in fields:
            try:
                found[key] = NormStats(*map(fields.get, _FIELDS))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
    return found or None


def check(directory: pathlib.Path, tensors: Mapping[str, Leaf], stats: Stats) -> None:
    """ValueError where statistics cannot take the place of those beside, or within, a model."""
    for file in state_files(directory):
        arrays = {name: leaf.read() for name, leaf in safetensors.open_tensors(file)[0].items()}
        _replaced(arrays, stats, file)
    buffers(tensors, stats)


def write(directory: pathlib.Path, stats: Stats) -> None:
    """Puts other statistics into the state files of a copied LeRobot directory."""
    for file in state_files(directory):
        tensors, layout = safetensors.open_tensors(file)
        arrays = {name: leaf.read() for name, leaf in tensors.items()}
        for name, array in _replaced(arrays, stats, file).items():
            arrays[name] = array
        file.unlink()  # copied here, and replaced within a directory that is still being made
        safetensors.write(directory, arrays, layout)


def _replaced(
    arrays: Mapping[str, np.ndarray], stats: Stats, file: pathlib.Path
) -> dict[str, np.ndarray]:
    found = {}
    for name, array in arrays.items():
        for key, feature in _FEATURES.items():
            field = name.removeprefix(feature + ".")
            if name == f"{feature}.{field}" and field in _FIELDS and key in stats:
                value: Any = getattr(stats[key], field)
                if value is None:
                    raise ValueError(
                        f"{file} has {name!r}, the mix's norm stats have no {field}; name others "
                        "with --config.mix.norm_stats=PATH"
                    )
                found[name] = _like(value, array, name, file)
    return found


def _like(value: Any, old: Any, name: str, where: str | os.PathLike) -> np.ndarray:
    """Statistics in place of others, an array or a leaf. ValueError if they are of another size."""
    if np.size(value) != old.size:
        raise ValueError(
            f"{where}: {name!r} has {old.size} numbers, the mix's norm stats have "
            f"{np.size(value)}; name others with --config.mix.norm_stats=PATH"
        )
    return np.asarray(value, old.dtype).reshape(old.shape)


def buffers(tensors: Mapping[str, Leaf], stats: Stats | None) -> dict[str, np.ndarray]:
    """What the statistics among a model's tensors are to hold; their own content without `stats`.

    Only what `BUFFER` matches is told.
    """
    ours = {feature.replace(".", "_"): key for key, feature in _FEATURES.items()}
    found = {}
    for name, leaf in tensors.items():
        if not (matched := BUFFER.fullmatch(name)):
            continue
        value = getattr((stats or {}).get(ours.get(matched[1])), matched[2], None)
        found[name] = leaf.read() if value is None else _like(value, leaf, name, leaf.where)
    return found
