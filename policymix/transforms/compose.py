"""Transforms of examples, each with its inverse, and chains of them.

An example is a dict: "state" [..., p], "actions" [..., h, a], "images" {camera: [..., hh, ww, 3]},
"prompt"; any leading axes. What a dataset gives is named by features instead, which `Repack`
renames. `apply` leads from the dataset or robot to the model, `invert` back. Both leave what they
are given alone and return a new dict; both pass over "actions" where there are none, so that one
chain serves training and a running robot: `apply` on what it observes, `invert` on the state that
`apply` made and the actions that the model sampled.
"""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Example = Mapping[str, Any]
NUMERIC = ("state", "actions")


class Transform(abc.ABC):
    """example → example, with `invert(apply(example)) == example`."""

    @abc.abstractmethod
    def apply(self, example: Example) -> dict[str, Any]:
        """Towards the model."""

    @abc.abstractmethod
    def invert(self, example: Example) -> dict[str, Any]:
        """Towards the robot."""


@dataclasses.dataclass(frozen=True)
class Chain(Transform):
    """Several, applied in order and inverted in reverse order."""

    transforms: tuple[Transform, ...]

    def apply(self, example: Example) -> dict[str, Any]:
        for transform in self.transforms:
            example = transform.apply(example)
        return dict(example)

    def invert(self, example: Example) -> dict[str, Any]:
        for transform in reversed(self.transforms):
            example = transform.invert(example)
        return dict(example)


def chain(transforms: Sequence[Transform]) -> Chain:
    """The transforms in order; chains within are laid out flat. An empty one changes nothing."""
    flat: list[Transform] = []
    for transform in transforms:
        flat.extend(transform.transforms if isinstance(transform, Chain) else (transform,))
    return Chain(tuple(flat))


@dataclasses.dataclass(frozen=True)
class Repack(Transform):
    """Renames features of a dataset to ours.

    Attributes:
      structure: ours → the dataset's, nested as ours are: {"state": "observation.state",
        "images": {"base_0_rgb": "observation.images.top"}, ...}. What it does not name is dropped.
      optional: those of ours that may be lacking.
    """

    structure: Mapping[str, str | Mapping[str, str]]
    optional: tuple[str, ...] = ("actions", "prompt")

    def __post_init__(self):
        features = [feature for _, feature in self._paths()]
        if repeated := sorted({f for f in features if features.count(f) > 1}):
            raise ValueError(f"Repack: {repeated[0]!r} is named twice, so it has no inverse")

    def _paths(self) -> list[tuple[tuple[str, ...], str]]:
        """[(("state",), feature), (("images", camera), feature), ...]."""
        paths = []
        for name, features in self.structure.items():
            if isinstance(features, str):
                paths.append(((name,), features))
            else:
                paths += [((name, key), feature) for key, feature in features.items()]
        return paths

    def apply(self, example: Example) -> dict[str, Any]:
        """ValueError for a feature that is lacking and not optional."""
        renamed: dict[str, Any] = {}
        for (name, *inner), feature in self._paths():
            if feature not in example:
                if name in self.optional:
                    continue
                raise ValueError(
                    f"the example has no {feature!r}, which should become "
                    f"{'/'.join((name, *inner))!r}; it has {sorted(example)}"
                )
            if inner:
                renamed.setdefault(name, {})[inner[0]] = example[feature]
            else:
                renamed[name] = example[feature]
        return renamed

    def invert(self, example: Example) -> dict[str, Any]:
        """What there is of it: a policy answers with actions alone."""
        renamed = {}
        for (name, *inner), feature in self._paths():
            found = example.get(name, {}) if inner else example
            if (key := inner[0] if inner else name) in found:
                renamed[feature] = found[key]
        return renamed


@dataclasses.dataclass(frozen=True)
class ConcatState(Transform):
    """Several features side by side as one vector.

    Attributes:
      sizes: {feature: its dimension}, in order.
      name: what the vector [..., sum of the sizes] is called.
    """

    sizes: Mapping[str, int]
    name: str = "state"

    def apply(self, example: Example) -> dict[str, Any]:
        """ValueError for a feature that is lacking or of another size."""
        rest = {key: value for key, value in example.items() if key not in self.sizes}
        return rest | {self.name: np.concatenate(list(self._parts(example)), axis=-1)}

    def _parts(self, example: Example):
        for feature, size in self.sizes.items():
            if feature not in example:
                raise ValueError(
                    f"the example has no {feature!r}, a part of {self.name!r}; it has "
                    f"{sorted(example)}"
                )
            yield _sized(example[feature], size, feature)

    def invert(self, example: Example) -> dict[str, Any]:
        if self.name not in example:
            return dict(example)
        rest = {key: value for key, value in example.items() if key != self.name}
        ends = np.cumsum(list(self.sizes.values()))
        whole = _sized(example[self.name], int(ends[-1]), self.name)
        return rest | dict(zip(self.sizes, np.split(whole, ends[:-1], axis=-1), strict=True))


def bool_mask(*dims: int) -> tuple[bool, ...]:
    """OpenPI's way to write a mask: n is n times True, -n is n times False.

    `bool_mask(6, -1)` is six joints, and a gripper that is not meant.
    """
    return tuple(flag for dim in dims for flag in [dim > 0] * abs(dim))


@dataclasses.dataclass(frozen=True)
class DeltaActions(Transform):
    """Actions relative to the state in which their chunk begins: a_t - s_0 where the mask is True.

    The inverse adds the state, which must be in the example. Source: OpenPI's DeltaActions and
    AbsoluteActions. Dimensions beyond the mask pass through.
    """

    mask: tuple[bool, ...]

    def apply(self, example: Example) -> dict[str, Any]:
        return self._shifted(example, -1)

    def invert(self, example: Example) -> dict[str, Any]:
        return self._shifted(example, 1)

    def _shifted(self, example: Example, sign: int) -> dict[str, Any]:
        if "actions" not in example:
            return dict(example)
        if "state" not in example:
            raise ValueError("actions relative to the state need the 'state' in the example")
        state, actions = np.asarray(example["state"]), np.asarray(example["actions"])
        d = len(self.mask)
        if min(state.shape[-1], actions.shape[-1]) < d:
            raise ValueError(
                f"the mask of relative actions has {d} dimensions, 'state' is {state.shape} and "
                f"'actions' {actions.shape}: the state must begin with what the actions command"
            )
        # Not in place: a loader may keep and give out the same array again.
        moved = actions.astype(np.result_type(actions.dtype, np.float32))
        moved[..., :d] += sign * np.where(self.mask, state[..., None, :d], 0).astype(moved.dtype)
        return {**example, "actions": moved}


@dataclasses.dataclass(frozen=True)
class Pad(Transform):
    """Zeros up to the model's dimensions; the inverse cuts them off.

    Attributes:
      sizes: {"state": (robot's, model's), "actions": (robot's, model's)}.
    """

    sizes: Mapping[str, tuple[int, int]]

    def __post_init__(self):
        for key, (raw, padded) in self.sizes.items():
            if raw > padded:
                raise ValueError(f"{key!r} has {raw} dimensions, the model takes {padded}")

    def apply(self, example: Example) -> dict[str, Any]:
        return self._each(example, lambda x, raw, padded, key: pad(_sized(x, raw, key), padded))

    def invert(self, example: Example) -> dict[str, Any]:
        return self._each(example, lambda x, raw, padded, key: _sized(x, padded, key)[..., :raw])

    def _each(self, example: Example, change) -> dict[str, Any]:
        present = {key: sizes for key, sizes in self.sizes.items() if key in example}
        changed = {key: change(example[key], *sizes, key) for key, sizes in present.items()}
        return {**example, **changed}


def pad(x: np.ndarray, size: int) -> np.ndarray:
    """[..., d] → [..., size] with zeros behind. ValueError if d is more."""
    x = np.asarray(x)
    if x.shape[-1] > size:
        raise ValueError(f"an array of {x.shape[-1]} dimensions cannot be padded to {size}")
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])


def _sized(x, size: int, name: str) -> np.ndarray:
    x = np.asarray(x)
    if not x.ndim or x.shape[-1] != size:
        raise ValueError(f"{name!r} has shape {x.shape}; expected {size} numbers in its last axis")
    return x
