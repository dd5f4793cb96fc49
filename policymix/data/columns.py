"""What a feature is as a column: which values it takes, and how LeRobot stores them in parquet.

A video is a feature without a column; here are the values it takes, and its place in the episode
table.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from policymix import files
from policymix.data import pictures, statistics

NUMBERS = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"),
    *("float16", "float32", "float64"),
)
PICTURES = ("image", "video")
_PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

_BLOCK = 1 << 20  # frames that are looked at together


def check_feature(name: str, feature: Mapping[str, Any], where: str) -> None:
    """ValueError unless a feature of this name and declaration can be written."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise ValueError(
            f"{where}: a feature's name is a text without '/', '\\' and zero bytes, and not '.' or "
            f"'..', for folders are called by it; got {name!r}"
        )
    if not {"dtype", "shape"} <= feature.keys():
        raise ValueError(f"{where}: {name!r} needs dtype and shape, got {dict(feature)}")
    dtype, shape = feature["dtype"], list(feature["shape"])
    if dtype in PICTURES:
        pictures.size(feature, f"{where}: {name!r}")
        return
    if dtype not in (*NUMBERS, "string"):
        raise ValueError(
            f"{where}: {name!r} has dtype {dtype!r}; known are {', '.join(NUMBERS)}, string, "
            "image and video"
        )
    whole = all(isinstance(n, int | np.integer) and n >= 1 for n in shape)
    if not whole or not 1 <= len(shape) <= 5 or (dtype == "string" and shape != [1]):
        raise ValueError(
            f"{where}: {name!r} has shape {shape}; expected one to five numbers from 1 on, and "
            "[1] for text"
        )


def check_text(text: str, where: str) -> None:
    """ValueError for a text that no file can hold, such as half of a pair of UTF-16."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        said = files.reason(repr(text))
        raise ValueError(f"{where}: {said} is no text in UTF-8 ({error.reason})") from None


def checked(
    feature: Mapping[str, Any], values: Any, where: str, parallel: Callable = map
) -> np.ndarray | list[str] | list[bytes]:
    """Values of T frames as they are stored: numbers [T, *shape] ([T] for [1]), texts, or PNGs.

    Of a video they are what is encoded later: uint8 [T, hh, ww, 3], or PNG and JPEG files.

    Args:
      parallel: what maps the encoder of PNG over pictures.

    Raises:
      ValueError: says `where` and how they differ from what the feature declares.
    """
    if feature["dtype"] in PICTURES:
        found = _checked_pictures(feature, values, where)
        if feature["dtype"] == "video" or isinstance(found, list):
            return found
        return list(parallel(pictures.png, np.ascontiguousarray(found)))
    if feature["dtype"] == "string":
        texts = [values] if isinstance(values, str) else list(np.ravel(np.asarray(values, object)))
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise ValueError(f"{where} is text, got {wrong[0]!r}")
        for text in texts:
            check_text(text, where)
        return texts
    return _checked_numbers(feature, values, where)


def _checked_numbers(feature: Mapping[str, Any], values: Any, where: str) -> np.ndarray:
    try:
        values = np.asarray(values)
    except ValueError as error:  # lists of several lengths
        raise ValueError(f"{where} is no array of numbers ({error})") from error
    dtype, shape = np.dtype(feature["dtype"]), tuple(feature["shape"])
    if values.shape[1:] != shape and not (shape == (1,) and values.ndim == 1):
        raise ValueError(
            f"{where} has shape {list(values.shape)}, expected [frames, "
            f"{', '.join(map(str, shape))}]"
        )
    kinds = {values.dtype.kind, dtype.kind}  # a bool is no number here, nor a number a bool
    if not np.can_cast(values.dtype, dtype, "same_kind") or (kinds > {"b"}):
        raise ValueError(f"{where} has dtype {values.dtype}, expected {dtype}")
    with np.errstate(over="ignore"):  # told below
        stored = values.astype(dtype).reshape(len(values), *(() if shape == (1,) else shape))
    if dtype.kind == "f":
        wrong, what = ~np.isfinite(stored), "is not finite"
    else:
        wrong, what = stored != values.reshape(stored.shape), f"does not fit into {dtype}"
    if wrong.any():
        frame, *place = (int(n) for n in np.argwhere(wrong)[0])
        value = values.reshape(stored.shape)[(frame, *place)]
        raise ValueError(f"{where}, frame {frame}: {value} {what}{f' (at {place})' * bool(place)}")
    return stored


def _checked_pictures(
    feature: Mapping[str, Any], values: Any, where: str
) -> np.ndarray | list[bytes]:
    """uint8 [T, hh, ww, 3], or the files of pictures."""
    shape = pictures.size(feature, where)
    if isinstance(values, Sequence) and all(isinstance(v, bytes) for v in values):
        for frame, data in enumerate(values):
            pictures.check_header(data, shape, f"{where}, frame {frame}")
        return list(values)
    try:
        values = np.asarray(values)
    except ValueError as error:  # pictures of several sizes
        raise ValueError(f"{where} is no array of pictures ({error})") from error
    declared = [int(n) for n in feature["shape"]]
    if values.dtype != np.uint8 or list(values.shape[1:]) != declared:
        raise ValueError(
            f"{where} is {values.dtype} {list(values.shape)}, expected uint8 [frames, "
            f"{', '.join(map(str, declared))}]"
        )
    return values if pictures.is_channels_last(feature) else np.moveaxis(values, 1, -1)


def stored(features: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The features that have a column in the data files."""
    return {name: feature for name, feature in features.items() if feature["dtype"] != "video"}


def schema(features: Mapping[str, Mapping[str, Any]], vector: str = "List") -> pa.Schema:
    """Of the data files, with the description by which Hugging Face's `datasets` reads them.

    Args:
      features: of the dataset.
      vector: what `datasets` calls a list: "List" from version 4 on, which LeRobot's v3.0 needs;
        before "Sequence", which the newer ones still read.
    """
    features = stored(features)
    described = {name: _hugging_face(feature, vector) for name, feature in features.items()}
    described = {"info": {"features": described}}
    fields = [_field(name, feature) for name, feature in features.items()]
    return pa.schema(fields, {"huggingface": json.dumps(described)})


def _field(name: str, feature: Mapping[str, Any]) -> pa.Field:
    shape = list(feature["shape"])
    if feature["dtype"] == "image":
        return pa.field(name, _PICTURE)
    element = _element(feature["dtype"])
    if shape == [1]:
        return pa.field(name, element)
    if len(shape) == 1:
        return pa.field(name, pa.list_(element, shape[0]))
    for _ in shape:
        element = pa.list_(element)
    # `datasets` stores these as an extension type of its own, over nested lists.
    extension = {
        "ARROW:extension:name": f"datasets.features.features.Array{len(shape)}DExtensionType",
        "ARROW:extension:metadata": json.dumps([shape, feature["dtype"]]),
    }
    return pa.field(name, element, metadata=extension)


def _hugging_face(feature: Mapping[str, Any], vector: str) -> dict[str, Any]:
    shape = list(feature["shape"])
    if feature["dtype"] == "image":
        return {"_type": "Image"}
    if len(shape) > 1:
        return {"shape": shape, "dtype": feature["dtype"], "_type": f"Array{len(shape)}D"}
    value = {"dtype": feature["dtype"], "_type": "Value"}
    return value if shape == [1] else {"feature": value, "length": shape[0], "_type": vector}


def _element(dtype: str) -> pa.DataType:
    return pa.string() if dtype == "string" else pa.from_numpy_dtype(dtype)


def table(
    features: Mapping[str, Mapping[str, Any]],
    values: Mapping[str, Any],
    schema: pa.Schema,
    picture: str = "frame-{:06d}.png",
) -> pa.Table:
    """The rows of one episode from values that `checked` has passed; `picture` names pictures."""
    arrays = [_array(feature, values[name], picture) for name, feature in stored(features).items()]
    return pa.Table.from_arrays(arrays, schema=schema)


def _array(feature: Mapping[str, Any], values: Any, picture: str) -> pa.Array:
    if feature["dtype"] == "image":
        paths = [picture.format(frame) for frame in range(len(values))]
        return pa.array(
            [{"bytes": data, "path": p} for data, p in zip(values, paths, strict=True)], _PICTURE
        )
    if feature["dtype"] == "string":
        return pa.array(values, pa.string())
    array = pa.array(np.ascontiguousarray(values).ravel(), _element(feature["dtype"]))
    if values.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(array, values.shape[1])
    for size in reversed(values.shape[1:]):
        offsets = np.arange(0, len(array) + 1, size, dtype=np.int32)
        array = pa.ListArray.from_arrays(offsets, array)
    return array


def episodes_schema(features: Mapping[str, Mapping[str, Any]]) -> pa.Schema:
    """Of the episode table: where every episode lies, and its statistics."""
    number = pa.int64()
    fields = [("episode_index", number), ("tasks", pa.list_(pa.string())), ("length", number)]
    places = ("data/chunk_index", "data/file_index", "dataset_from_index", "dataset_to_index")
    fields += [(name, number) for name in places]
    for name, feature in features.items():
        if feature["dtype"] == "video":
            video = f"videos/{name}"
            fields += [(f"{video}/{place}", number) for place in ("chunk_index", "file_index")]
            fields += [(f"{video}/{end}_timestamp", pa.float64()) for end in ("from", "to")]
    for name, feature in features.items():
        if feature["dtype"] != "string":
            fields += [
                (f"stats/{name}/{stat}", _stat_type(feature, stat)) for stat in statistics.NAMES
            ]
    fields += [(f"meta/episodes/{name}", number) for name in ("chunk_index", "file_index")]
    return pa.schema(fields)


def _stat_type(feature: Mapping[str, Any], stat: str) -> pa.DataType:
    if stat == "count":
        return pa.list_(pa.int64())
    is_picture = feature["dtype"] in PICTURES
    kind = "f" if is_picture else np.dtype(feature["dtype"]).kind
    known = {"b": pa.bool_(), "i": pa.int64(), "u": pa.int64()}
    element = known.get(kind, pa.float64()) if stat in ("min", "max") else pa.float64()
    for _ in range(3 if is_picture else 1):  # [3, 1, 1], or [n]
        element = pa.list_(element)
    return element


def bad_episodes(
    values: Iterable[tuple[str, np.ndarray]], episode_from: np.ndarray, episode_to: np.ndarray
) -> dict[int, str]:
    """{episode: what is wrong with it}: no frames, or numbers that are not finite.

    Args:
      values: (feature, all its frames [num_frames, …]), which may be mapped from a disk.
      episode_from, episode_to: int64 [num_episodes], its frames, `to` exclusive.
    """
    found = dict.fromkeys(np.flatnonzero(episode_from == episode_to).tolist(), "it has no frames")
    for key, column in values:
        if column.dtype.kind != "f":
            continue
        wrong = [np.zeros(0, np.int64)]
        for start in range(0, len(column), _BLOCK):
            block = column[start : start + _BLOCK]
            finite = np.isfinite(block).reshape(len(block), -1).all(axis=1)
            wrong.append(start + np.flatnonzero(~finite))
        frames = np.concatenate(wrong)
        episodes = np.searchsorted(episode_to, frames, side="right")
        for episode, row in zip(*np.unique(episodes, return_index=True), strict=True):
            first, count = frames[row] - episode_from[episode], (episodes == episode).sum()
            what = f"{key!r} is not finite in {count} frames, the first is frame {first}"
            found.setdefault(int(episode), what)
    return dict(sorted(found.items()))
