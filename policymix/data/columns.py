"""What a feature is as a column: which values it takes, and how LeRobot stores them in parquet."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from policymix.data import pictures, statistics

NUMBERS = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"),
    *("float16", "float32", "float64"),
)
_PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def check_feature(name: str, feature: Mapping[str, Any], where: str) -> None:
    """ValueError unless a feature of this name and declaration can be written."""
    if not isinstance(name, str) or not name or "/" in name:
        raise ValueError(f"{where}: a feature's name is a text without '/', got {name!r}")
    if not {"dtype", "shape"} <= feature.keys():
        raise ValueError(f"{where}: {name!r} needs dtype and shape, got {dict(feature)}")
    dtype, shape = feature["dtype"], list(feature["shape"])
    if dtype == "video":
        raise ValueError(
            f"{where}: {name!r} has dtype video, and videos are not encoded here; declare it with "
            "dtype image"
        )
    if dtype == "image":
        pictures.size(feature, f"{where}: {name!r}")
        return
    if dtype not in (*NUMBERS, "string"):
        raise ValueError(
            f"{where}: {name!r} has dtype {dtype!r}; known are {', '.join(NUMBERS)}, string and "
            "image"
        )
    whole = all(isinstance(n, int) and n >= 1 for n in shape)
    if not whole or not 1 <= len(shape) <= 5 or (dtype == "string" and shape != [1]):
        raise ValueError(
            f"{where}: {name!r} has shape {shape}; expected one to five numbers from 1 on, and "
            "[1] for text"
        )


def checked(
    feature: Mapping[str, Any], values: Any, where: str, parallel: Callable = map
) -> np.ndarray | list[str] | list[bytes]:
    """Values of T frames as they are stored: numbers [T, *shape] ([T] for [1]), texts, or PNGs.

    Args:
      parallel: what maps the encoder over pictures.

    Raises:
      ValueError: says `where` and how they differ from what the feature declares.
    """
    if feature["dtype"] == "image":
        return _checked_pictures(feature, values, where, parallel)
    if feature["dtype"] == "string":
        texts = [values] if isinstance(values, str) else list(np.ravel(np.asarray(values, object)))
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise ValueError(f"{where} is text, got {wrong[0]!r}")
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
    feature: Mapping[str, Any], values: Any, where: str, parallel: Callable
) -> list[bytes]:
    shape = pictures.size(feature, where)
    if not isinstance(values, np.ndarray) and all(isinstance(v, bytes) for v in values):
        for frame, data in enumerate(values):
            pictures.check_header(data, shape, f"{where}, frame {frame}")
        return list(values)
    values = np.asarray(values)
    declared = [int(n) for n in feature["shape"]]
    if values.dtype != np.uint8 or list(values.shape[1:]) != declared:
        raise ValueError(
            f"{where} is {values.dtype} {list(values.shape)}, expected uint8 [frames, "
            f"{', '.join(map(str, declared))}]"
        )
    if not pictures.is_channels_last(feature):
        values = np.moveaxis(values, 1, -1)
    return list(parallel(pictures.png, np.ascontiguousarray(values)))


def schema(features: Mapping[str, Mapping[str, Any]]) -> pa.Schema:
    """Of the data files, with the description by which Hugging Face's `datasets` reads them."""
    described = {"info": {"features": {k: _hugging_face(f) for k, f in features.items()}}}
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


def _hugging_face(feature: Mapping[str, Any]) -> dict[str, Any]:
    shape = list(feature["shape"])
    if feature["dtype"] == "image":
        return {"_type": "Image"}
    if len(shape) > 1:
        return {"shape": shape, "dtype": feature["dtype"], "_type": f"Array{len(shape)}D"}
    value = {"dtype": feature["dtype"], "_type": "Value"}
    return value if shape == [1] else {"feature": value, "length": shape[0], "_type": "List"}


def _element(dtype: str) -> pa.DataType:
    return pa.string() if dtype == "string" else pa.from_numpy_dtype(dtype)


def table(
    features: Mapping[str, Mapping[str, Any]], values: Mapping[str, Any], schema: pa.Schema
) -> pa.Table:
    """The rows of one episode from values that `checked` has passed."""
    arrays = [_array(feature, values[name]) for name, feature in features.items()]
    return pa.Table.from_arrays(arrays, schema=schema)


def _array(feature: Mapping[str, Any], values: Any) -> pa.Array:
    if feature["dtype"] == "image":
        paths = [f"frame-{frame:06d}.png" for frame in range(len(values))]
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
        if feature["dtype"] != "string":
            fields += [
                (f"stats/{name}/{stat}", _stat_type(feature, stat)) for stat in statistics.NAMES
            ]
    fields += [(f"meta/episodes/{name}", number) for name in ("chunk_index", "file_index")]
    return pa.schema(fields)


def _stat_type(feature: Mapping[str, Any], stat: str) -> pa.DataType:
    if stat == "count":
        return pa.list_(pa.int64())
    kind = "f" if feature["dtype"] == "image" else np.dtype(feature["dtype"]).kind
    known = {"b": pa.bool_(), "i": pa.int64(), "u": pa.int64()}
    element = known.get(kind, pa.float64()) if stat in ("min", "max") else pa.float64()
    for _ in range(3 if feature["dtype"] == "image" else 1):  # [3, 1, 1], or [n]
        element = pa.list_(element)
    return element
