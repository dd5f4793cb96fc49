"""What the network takes and gives, from and to what a dataset or a robot has: the robot's own
numbers, relative actions, normalisation, padding, prompts, cameras.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np

from policymix.data import tokenizer
from policymix.models import pi0
from policymix.structs import Batch, Observation
from policymix.transforms import compose, images, normalize, prompts, robots

ABSENT = "absent"  # what config.data.cameras says of a camera that the robot does not have
_STATE, _ACTION = "observation.state", "action"  # LeRobot's names


@dataclasses.dataclass(frozen=True)
class Wiring:
    """What lies between a dataset's features and the network's, as config.data says, and where it
    leaves that open its robot's table.

    Attributes:
      state_keys, action_keys: features of numbers, laid side by side.
      cameras: {camera of the model: picture feature or ABSENT}; what is not said is not there.
      adapt: the robot's numbers ↔ those that are normalised.
      relative: whether that makes actions relative to the state of their frame.
      scheme: of normalisation; masks: {"state" or "actions": dimensions that it is of}.
    """

    state_keys: tuple[str, ...]
    action_keys: tuple[str, ...]
    cameras: Mapping[str, str]
    adapt: compose.Chain
    relative: bool
    scheme: str
    masks: Mapping[str, tuple[bool, ...]]


def wiring(data: ml_collections.ConfigDict) -> Wiring:
    """ValueError for a robot that has no table, or fields that say what cannot be."""
    robot = robots.find(data.robot) if data.robot else None
    relative = _relative(data.delta_actions, robot)
    named = {camera: feature for camera, feature in data.cameras.items() if feature}
    if robot:
        named = dict.fromkeys(data.cameras, ABSENT) | dict(robot.cameras) | named
    return Wiring(
        state_keys=_keys(data.state_key, robot.state if robot else (_STATE,)),
        action_keys=_keys(data.action_key, (robot.action,) if robot else (_ACTION,)),
        cameras=named,
        adapt=robots.adaptation(robot, relative, data.adapt),
        relative=any(relative),
        scheme=data.normalization or (robot.scheme if robot else "") or "mean_std",
        masks=robot.normalized if robot else {},
    )


def _keys(named: str, default) -> tuple[str, ...]:
    return tuple(key.strip() for key in named.split(",") if key.strip()) or tuple(default)


def _relative(said, robot: robots.Robot | None) -> tuple[bool, ...]:
    """Which actions are relative to the state: as said, in OpenPI's way; None: as of the robot."""
    if said is None:
        return robot.positions if robot and robot.relative else ()
    if not all(isinstance(n, int) and n for n in said):
        raise ValueError(
            f"config.data.delta_actions is {tuple(said)}; expected OpenPI's way to write a mask: "
            "(6, -1) is six dimensions relative to the state and one that is not, () is none"
        )
    return compose.bool_mask(*said)


class Encoder:
    """Raw examples → batches, sampled actions → raw ones.

    Attributes:
      model: the network's configuration; norm_stats: {"state", "actions"}.
      wiring: what lies between the robot and what is normalised.
      cameras: {camera of the model: picture feature of the dataset}, without absent ones.
      seen: the model with these cameras alone: what computes on encoded observations.
      mask_padded_steps, mask_padded_dims: whether batches leave out of the loss what lies beyond
        the end of an episode, and the dimensions of an action that the robot does not have.
    """

    def __init__(
        self,
        model: pi0.Pi0Config,
        data: ml_collections.ConfigDict,
        norm_stats: normalize.Stats,
        mask_padded_steps: bool = False,
        mask_padded_dims: bool = False,
    ):
        self.mask_padded_steps, self.mask_padded_dims = mask_padded_steps, mask_padded_dims
        self.model, self.norm_stats, self.cameras = model, norm_stats, cameras(model, data)
        self.seen = model.seeing(self.cameras)
        self.wiring = wiring(data)
        masks = _fitting(self.wiring.masks, norm_stats)
        self._normalize = normalize.Normalize(norm_stats, self.wiring.scheme, masks)
        self._tokenizer = _tokenizer(model, data.tokenizer)
        self._prompts: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # few, and met at every step

    def observation(self, raw: Mapping[str, Any]) -> Observation:
        """What the network sees.

        Args:
          raw: "state" [b, p]; "prompt": b sentences; "images": {camera of the model: uint8
            [b, hh, ww, 3]}, needed for `cameras`.
        """
        _check_finite(raw["state"], "state")
        return self._observation(raw, self.wiring.adapt.apply({"state": raw["state"]}))

    def batch(self, raw: Mapping[str, Any]) -> Batch:
        """The same with the "actions" [b, h, a] that follow, and a mask where one is asked for:
        that of padded steps takes "action_is_pad" [b, h].
        """
        numbers = {key: raw[key] for key in compose.NUMERIC}
        for key, values in numbers.items():
            _check_finite(values, key)
        adapted = self.wiring.adapt.apply(numbers)
        actions = self._normalize.apply(adapted)["actions"].astype(np.float32)
        padded = compose.pad(actions, self.model.action_dim)
        mask = self._action_mask(raw, actions, padded.shape)
        return Batch(self._observation(raw, adapted), padded, mask)

    def normalized(self, raw: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """{"state" [b, p], "actions" [b, h, a]} of a robot as the network has them, not padded."""
        return self._normalize.apply(self.wiring.adapt.apply(raw))

    def actions(self, sampled: np.ndarray, state: np.ndarray) -> np.ndarray:
        """What the network sampled [b, h, action_dim] → actions of the robot, float32 [b, h, a].

        Args:
          state: the robot's [b, p] that it was sampled for.
        """
        kept = np.asarray(sampled)[..., : len(self.norm_stats["actions"].mean)]
        found = self._normalize.invert({"actions": kept})
        adapted = self.wiring.adapt.apply({"state": np.asarray(state)})
        return self.wiring.adapt.invert(adapted | found)["actions"].astype(np.float32)

    def _observation(self, raw: Mapping[str, Any], adapted: Mapping[str, Any]) -> Observation:
        state = self._normalize.apply({"state": adapted["state"]})["state"].astype(np.float32)
        tokens, mask = self._tokens(raw["prompt"], state) if self._tokenizer else (None, None)
        seen = {camera: self._picture(raw["images"][camera], camera) for camera in self.cameras}
        masks = {camera: np.ones(len(state), bool) for camera in self.cameras}
        proprio = compose.pad(state, self.model.proprio_dim)
        return masked(self.seen, Observation(seen, masks, proprio, tokens, mask))

    def _action_mask(self, raw, actions: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
        """bool of that shape [b, h, a], True for what counts; None where everything does."""
        if not self.mask_padded_steps and not self.mask_padded_dims:
            return None
        mask = np.ones(shape, bool)
        if self.mask_padded_steps:
            mask &= ~np.asarray(raw["action_is_pad"])[..., None]
        if self.mask_padded_dims:
            mask[..., actions.shape[-1] :] = False
        return mask

    def _tokens(self, texts, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.model.discrete_state_input:
            return self._tokenizer.encode(
                [prompts.pi05(text, row) for text, row in zip(texts, state, strict=True)]
            )
        for text in set(texts) - self._prompts.keys():
            ((tokens,), (mask,)) = self._tokenizer.encode([prompts.pi0(text)])
            self._prompts[text] = tokens, mask
        tokens, masks = zip(*(self._prompts[text] for text in texts), strict=True)
        return np.stack(tokens), np.stack(masks)

    def _picture(self, pictures: np.ndarray, camera: str) -> np.ndarray:
        if pictures.dtype != np.uint8:
            raise ValueError(
                f"pictures of {self.cameras[camera]!r} have dtype {pictures.dtype}; expected uint8 "
                "in 0..255"
            )
        return images.resize_with_pad(pictures, *self.model.image_resolution)


def _check_finite(values: np.ndarray, key: str) -> None:
    if not np.isfinite(values).all():
        *example, dim = (int(i) for i in np.argwhere(~np.isfinite(values))[0])
        raise ValueError(
            f"{key!r} of a robot holds {np.asarray(values)[(*example, dim)]} in dimension {dim} of "
            f"example {example[0]}: a sensor that gave no number, or data that was not recorded"
        )


def _fitting(
    masks: Mapping[str, tuple[bool, ...]], stats: normalize.Stats
) -> dict[str, tuple[bool, ...]]:
    """Masks of as many dimensions as the statistics have: beyond them all are normalised."""
    return {
        key: (mask + (True,) * len(stats[key].mean))[: len(stats[key].mean)]
        for key, mask in masks.items()
        if key in stats
    }


def cameras(model: pi0.Pi0Config, data: ml_collections.ConfigDict) -> dict[str, str]:
    """{camera of the model: picture feature}, without those that are said to be absent.

    ValueError for a camera of which nothing is said.
    """
    named = {camera for camera, feature in data.cameras.items() if feature}
    if unknown := sorted(named - set(model.image_keys)):
        near = difflib.get_close_matches(unknown[0], model.image_keys, n=1)
        raise ValueError(
            f"config.data.cameras names {unknown[0]!r}, the model's image_keys are "
            f"{list(model.image_keys)}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    known = wiring(data).cameras
    if lacking := [camera for camera in model.image_keys if camera not in known]:
        raise ValueError(
            f"the model's image_keys names the cameras {lacking}, and config.data.cameras says of "
            "no picture feature that it is theirs: name it, as --config.data.cameras."
            f"{lacking[0]}=FEATURE, or say =absent where the robot has no such camera"
        )
    return present(model, data)


def masked(model: pi0.Pi0Config, observation: Observation) -> Observation:
    """An observation with every camera of the model: absent ones are black and masked."""
    size = len(observation.proprio)
    absent = [camera for camera in model.image_keys if camera not in observation.images]
    black = np.zeros((size if absent else 0, *model.image_resolution, 3), np.uint8)
    images = dict.fromkeys(absent, black) | dict(observation.images)
    masks = dict.fromkeys(absent, np.zeros(size, bool)) | dict(observation.image_masks)
    return observation.replace(images=images, image_masks=masks)


def present(model: pi0.Pi0Config, data: ml_collections.ConfigDict) -> dict[str, str]:
    """{camera of the model: what the config says of it}, without those that are absent."""
    known = wiring(data).cameras
    named = {camera: known.get(camera, "") for camera in model.image_keys}
    return {camera: feature for camera, feature in named.items() if feature != ABSENT}


def sentencepiece(name: str, max_token_len: int) -> tokenizer.SentencePieceTokenizer:
    """What a config's `tokenizer` names. ValueError where it is none of PaliGemma's kind."""
    if name == "paligemma":
        return tokenizer.paligemma(max_token_len)
    if name.endswith(".model"):
        return tokenizer.SentencePieceTokenizer(name, max_token_len)
    raise ValueError(
        f"tokenizer is {name!r}; expected paligemma, the path of a SentencePiece .model, bytes or "
        "words"
    )


def _tokenizer(model: pi0.Pi0Config, name: str) -> tokenizer.ByteTokenizer | None:
    """None for a model without prompts. ValueError if it does not fit the vocabulary."""
    if not model.max_token_len:
        return None
    if name == "words":
        return tokenizer.WordTokenizer(model.max_token_len, model.vocab_size)
    if name == "bytes":
        made = tokenizer.ByteTokenizer(model.max_token_len)
    else:
        made = sentencepiece(name, model.max_token_len)
    if model.vocab_size < made.vocab_size:
        raise ValueError(
            f"the model's vocab_size is {model.vocab_size}; the tokenizer {name!r} needs "
            f"{made.vocab_size}"
        )
    return made
