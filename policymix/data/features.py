"""features.json of tfds: what the lists of numbers and bytes in an Example mean.

Nested features are joined to keys by "/"; all steps of an episode lie in one list. Formats:
tensorflow_datasets/core/{features,example_serializer,example_parser}.py of 4.9.
"""

import dataclasses
import io
import json
import math
import pathlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from policymix import files
from policymix.data.examples import BytesList, Values

KINDS = ("tensor", "text", "image")  # that are read
_JPEG = b"\xff\xd8\xff"
_AGAIN = "copy or download the dataset again"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A feature that is no collection of others, as features.json declares it.

    Attributes:
      key: its path, parts joined by "/".
      kind: "tensor", "text" or "image"; or the name of another kind, which is not read.
      shape: of one value; None where it varies.
      dtype: of numpy; object for bytes.
      lengths: of the sequences around it, outermost first; None where they vary.
      encoding: of a tensor "none", "bytes" or "zlib"; of an image "jpeg", "png" or "".
      optional: whether it may be missing.
    """

    key: str
    kind: str
    shape: tuple[int | None, ...]
    dtype: np.dtype
    lengths: tuple[int | None, ...] = ()
    encoding: str = "none"
    optional: bool = False

    @property
    def is_text(self) -> bool:
        """Or other bytes that are no picture."""
        return self.dtype == object and self.kind in ("tensor", "text")


Tree = dict[str, Any]  # names to Leaf or Tree


def read_features(path: pathlib.Path) -> Tree:
    """features.json → {name: Leaf, or the same of what is inside}; sequences and nested datasets
    ("steps") are only seen in the `lengths` of their leaves.

    Raises:
      FileNotFoundError, ValueError: no such file; no features as tfds declares them.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {_AGAIN}")
    value = files.read_json(path)
    try:
        tree = _declared(value, "", ())
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if str(error).startswith("feature "):
            raise ValueError(f"{path}: {error}") from error
        raise ValueError(
            f"{path}: expected features as tfds writes them, found something else ({error!r}); "
            f"{_AGAIN}"
        ) from error
    if not isinstance(tree, dict) or not tree:
        raise ValueError(f"{path}: expected a FeaturesDict, found {type(tree).__name__}; {_AGAIN}")
    return tree


def leaves(tree: Tree) -> Iterator[Leaf]:
    """All leaves of a tree."""
    for value in tree.values():
        yield from leaves(value) if isinstance(value, dict) else (value,)


def _opened(value: Mapping[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """A feature's class, the field that tells more of it, and what that says."""
    name = (value.get("pythonClassName") or value["type"]).rpartition(".")[2]
    beside = {"pythonClassName", "description", "valueRange", "type", "proto_cls"}
    place = "content" if "content" in value else next((k for k in value if k not in beside), "")
    content = value.get(place) or {}
    return name, place, json.loads(content) if isinstance(content, str) else content


def _declared(value: Mapping[str, Any], key: str, lengths: tuple) -> Tree | Leaf:
    """A feature of features.json, in tfds' present form or the one before it."""
    name, _, content = _opened(value)
    join = f"{key}/" if key else ""
    if name == "FeaturesDict":
        inside = content.get("features", content)
        return {k: _declared(v, f"{join}{k}", lengths) for k, v in inside.items()}
    if name in ("Sequence", "Dataset"):
        length = content.get("length")
        length = None if length is None or int(length) < 0 else int(length)
        return _declared(content["feature"], key, (*lengths, length))
    if name in ("Tensor", "Scalar"):
        optional, encoding = bool(content.get("optional")), content.get("encoding") or "none"
        dtype = _dtype(content["dtype"], key)
        return Leaf(key, "tensor", _shape(content), dtype, lengths, encoding.lower(), optional)
    if name == "Text":
        return Leaf(
            key, "text", (), np.dtype(object), lengths, optional=bool(content.get("optional"))
        )
    if name == "ClassLabel":
        return Leaf(key, "tensor", (), np.dtype(np.int64), lengths)
    if name == "BBoxFeature":
        return Leaf(key, "tensor", (4,), np.dtype(np.float32), lengths)
    if name == "Image":
        encoding = content.get("encodingFormat") or content.get("encoding_format") or ""
        dtype = _dtype(content.get("dtype") or "uint8", key)
        return Leaf(key, "image", _shape(content) or (None, None, 3), dtype, lengths, encoding)
    return Leaf(key, name, (), np.dtype(object), lengths)


def redeclared(
    value: Mapping[str, Any], changes: Mapping[str, Mapping[str, Any]], key: str = ""
) -> dict[str, Any]:
    """features.json, or the feature `key` in it, with other declarations of images.

    Args:
      changes: {key: {"shape": [hh, ww, c], "encoding": "jpeg"}}; all else is left as it is.
    """
    name, place, content = _opened(value)
    join = f"{key}/" if key else ""
    if name == "FeaturesDict":
        inside = content.get("features", content)
        new = {k: redeclared(v, changes, f"{join}{k}") for k, v in inside.items()}
        content = {**content, "features": new} if "features" in content else new
    elif name in ("Sequence", "Dataset"):
        content = {**content, "feature": redeclared(content["feature"], changes, key)}
    elif key in changes:
        shape, encoding = changes[key]["shape"], changes[key]["encoding"]
        as_list = isinstance(content.get("shape"), list)
        new = {"shape": shape if as_list else {"dimensions": [str(n) for n in shape]}}
        field = "encoding_format" if "encoding_format" in content else "encodingFormat"
        content = {**content, **new, field: encoding}
    else:
        return dict(value)
    return {**value, place: json.dumps(content) if isinstance(value[place], str) else content}


def _shape(content: Mapping[str, Any]) -> tuple[int | None, ...]:
    shape = content.get("shape") or ()
    if isinstance(shape, dict):
        shape = shape.get("dimensions") or ()
    return tuple(None if n is None or int(n) < 0 else int(n) for n in shape)


def _dtype(name: str, key: str) -> np.dtype:
    if name in ("string", "object", "str"):
        return np.dtype(object)
    try:
        return np.dtype(name)
    except TypeError:
        raise ValueError(f"feature {key!r} has the dtype {name!r}, which numpy lacks") from None


def decode(leaf: Leaf, example: Mapping[str, Values], *, pictures: str = "pixels") -> Any:
    """The value of a feature in an example, as tfds' `as_numpy` gives it: the declared dtype and
    shape, text as bytes, behind the axes of the sequences around it. Sequences of things that
    differ in shape are arrays of objects.

    Args:
      pictures: what images become: "pixels" [hh, ww, c], "bytes" as stored, or "ranges" [2]: where
        they begin in the example's bytes, and how many they are.

    Raises:
      ValueError: it is missing, or holds something else than declared; names the feature.
    """
    try:
        if leaf.kind not in KINDS:
            raise ValueError(f"it is of the kind {leaf.kind}, and read are only {', '.join(KINDS)}")
        if len(leaf.lengths) > 1 and any(n is None for n in leaf.lengths[1:]):
            return _ragged(leaf, example, pictures)
        if len(leaf.lengths) > 1:
            flat = dataclasses.replace(leaf, lengths=(None,))
            values = _flat(flat, example, f"{leaf.key}/ragged_flat_values", pictures)
            inner = leaf.lengths[1:]
            return values.reshape(-1, *inner, *values.shape[1:])
        return _flat(leaf, example, leaf.key, pictures)
    except (ValueError, TypeError, zlib.error) as error:
        raise ValueError(f"feature {leaf.key!r}: {error}; {_AGAIN}") from error


def _ragged(leaf: Leaf, example: Mapping[str, Values], pictures: str) -> np.ndarray:
    """Sequences in sequences: all values in one list, and the lengths of the rows, depth by
    depth.
    """
    flat = dataclasses.replace(leaf, lengths=(None,))
    values = _flat(flat, example, f"{leaf.key}/ragged_flat_values", pictures)
    for depth in reversed(range(len(leaf.lengths) - 1)):
        lengths = example.get(f"{leaf.key}/ragged_row_lengths_{depth}")
        if not isinstance(lengths, np.ndarray) or lengths.sum() != len(values):
            raise ValueError(f"the lengths of its rows do not sum to its {len(values)} values")
        ends = np.cumsum(lengths)
        values = objects([values[a:b] for a, b in zip(ends - lengths, ends, strict=True)])
    return values


def _flat(leaf: Leaf, example: Mapping[str, Values], key: str, pictures: str) -> Any:
    """A feature in at most one sequence."""
    dynamic = leaf.kind == "tensor" and leaf.shape.count(None) > 1
    values = example.get(f"{key}/value" if dynamic else key)
    if values is None:
        values = _missing(leaf)
    if leaf.kind == "image":
        return _images(leaf, values, pictures)
    if leaf.encoding != "none":
        shapes = example.get(f"{key}/shape") if dynamic else None
        return _encoded(leaf, values, shapes)
    shape = (*leaf.lengths, *leaf.shape)
    if leaf.dtype == object:
        array = objects(_as_bytes(values))
    else:
        kind = "f" if leaf.dtype.kind == "f" else "i"
        if not isinstance(values, np.ndarray) or values.dtype.kind != kind:
            raise ValueError(f"expected numbers for {leaf.dtype}, found {_words(values)}")
        array = values if values.dtype == leaf.dtype else values.astype(leaf.dtype)
    known = math.prod(n for n in shape if n is not None)
    fits = array.size == known if None not in shape else known and array.size % known == 0
    if not fits and array.size:
        raise ValueError(f"expected the shape {list(shape)}, found {array.size} values")
    array = array.reshape([(-1 if array.size else 0) if n is None else n for n in shape])
    return array if shape else array[()]


def _missing(leaf: Leaf) -> Values:
    """What tfds reads where nothing is stored."""
    size = math.prod(0 if n is None else n for n in (*leaf.lengths, *leaf.shape))
    if size and not leaf.optional:
        raise ValueError("it is missing")
    if leaf.dtype == object or leaf.kind == "image" or leaf.encoding != "none":
        return BytesList(b"", np.zeros((size, 2), np.int64))
    if leaf.dtype.kind == "f":
        with np.errstate(over="ignore"):  # float32 is stored, float64's least is -inf in it
            return np.full(size, np.finfo(leaf.dtype).min).astype(np.float32)
    least = 0 if leaf.dtype == bool else np.iinfo(leaf.dtype).min
    return np.full(size, least, np.int64)


def _encoded(leaf: Leaf, values: Values, shapes: np.ndarray | None) -> Any:
    """Tensors stored as bytes, compressed or not."""
    decoded = []
    shape = [-1 if n is None else n for n in leaf.shape]
    for number, item in enumerate(_as_bytes(values)):
        raw = zlib.decompress(item) if leaf.encoding == "zlib" else item
        if shapes is not None:
            shape = shapes.reshape(-1, len(leaf.shape))[number]
        decoded.append(np.frombuffer(raw, leaf.dtype).reshape(shape))
    return _stacked(leaf, decoded)


def _stacked(leaf: Leaf, items: list[np.ndarray]) -> np.ndarray:
    if not leaf.lengths:
        return items[0]
    if len({item.shape for item in items}) > 1:
        return objects(items)
    return np.stack(items) if items else np.empty((0, *(n or 0 for n in leaf.shape)), leaf.dtype)


def _images(leaf: Leaf, values: Values, pictures: str) -> Any:
    items = _as_bytes(values, copy=False)
    if pictures == "ranges":
        return items.ranges if leaf.lengths else items.ranges[0]
    if pictures == "bytes":
        return objects(items.tolist()) if leaf.lengths else bytes(items[0])
    if leaf.lengths and None not in leaf.shape and leaf.dtype == np.uint8:
        out = np.empty((len(items), *leaf.shape), np.uint8)
        for number, item in enumerate(items):
            picture(item, leaf.shape, leaf.dtype, out[number])
        return out
    return _stacked(leaf, [picture(item, leaf.shape, leaf.dtype) for item in items])


def picture(
    data: bytes | memoryview,
    shape: Sequence[int | None],
    dtype: np.dtype,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """JPEG or PNG → [hh, ww, c] of `dtype`, the pixels that TensorFlow decodes: of a JPEG with the
    faster of libjpeg's two integer transforms, some grey levels off the other. float32 pictures are
    PNGs whose four channels are the bytes of a number.

    Args:
      shape: expected, None where anything is.
      out: uint8 [hh, ww, c], contiguous, to decode into.

    Raises:
      ValueError: it is damaged, no picture, or of another shape.
    """
    channels = shape[-1]
    try:
        if dtype == np.uint8 and channels in (1, 3) and data[:3] == _JPEG:
            colours = "RGB" if channels == 3 else "GRAY"
            found = simplejpeg.decode_jpeg(data, colours, fastdct=True, buffer=out)
        else:
            found = _with_pillow(data, channels, dtype)
    except Exception as error:  # damaged data makes decoders fail in many ways
        raise ValueError(
            f"{len(data)} bytes that are no picture as declared ({files.reason(error)})"
        ) from error
    if any(n is not None and n != m for n, m in zip(shape, found.shape, strict=True)):
        raise ValueError(f"expected a picture {list(shape)}, found {list(found.shape)}")
    if out is None or found.ctypes.data == out.ctypes.data:
        return found
    out[...] = found
    return out


def _with_pillow(data: bytes | memoryview, channels: int | None, dtype: np.dtype) -> np.ndarray:
    modes = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
    with Image.open(io.BytesIO(data)) as image:
        if dtype == np.uint16:
            array = np.asarray(image)
            if array.dtype != np.uint16 and image.mode != "I":
                raise ValueError(f"a picture of 16 bits is expected, found {image.mode}")
            array = array.astype(np.uint16, copy=False)
        else:
            mode = "RGBA" if dtype == np.float32 else modes.get(channels, image.mode)
            if image.mode.startswith("I"):
                raise ValueError(f"a picture of 8 bits is expected, found {image.mode}")
            array = np.asarray(image if image.mode == mode else image.convert(mode))
    array = array[..., None] if array.ndim == 2 else array
    return np.ascontiguousarray(array).view(np.float32) if dtype == np.float32 else array


def _as_bytes(values: Values, *, copy: bool = True) -> Any:
    if not isinstance(values, BytesList):
        raise ValueError(f"expected bytes, found {_words(values)}")
    return values.tolist() if copy else values


def objects(items: Sequence[Any]) -> np.ndarray:
    array = np.empty(len(items), object)
    for number, item in enumerate(items):  # numpy would look for shapes inside
        array[number] = item
    return array


def _words(values: Values) -> str:
    kind = "bytes" if isinstance(values, BytesList) else getattr(values, "dtype", "nothing")
    return f"{0 if values is None else len(values)} values of {kind}"
