"""What the network takes and gives, from and to what a dataset or a robot has: normalisation,
padding, prompts, cameras.
"""

import difflib
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np

from policymix.data import tokenizer
from policymix.models import pi0
from policymix.structs import Batch, Observation
from policymix.transforms import normalize, prompts

ABSENT = "absent"  # what config.data.cameras says of a camera that the robot does not have


class Encoder:
    """Raw examples → batches, sampled actions → raw ones.

    Attributes:
      model: the network's configuration; norm_stats: {"state", "actions"}.
      cameras: {camera of the model: picture feature of the dataset}, without absent ones.
      seen: the model with these cameras alone: what computes on encoded observations.
    """

    def __init__(
        self,
        model: pi0.Pi0Config,
        data: ml_collections.ConfigDict,
        norm_stats: normalize.Stats,
    ):
        self.model, self.norm_stats, self.cameras = model, norm_stats, cameras(model, data)
        self.seen = model.seeing(self.cameras)
        self._quantiles = data.quantiles
        self._tokenizer = _tokenizer(model, data.tokenizer)
        self._prompts: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # few, and met at every step

    def observation(self, raw: Mapping[str, Any]) -> Observation:
        """What the network sees.

        Args:
          raw: "state" [b, p]; "prompt": b sentences; "images": {camera of the model: uint8
            [b, hh, ww, 3]}, needed for `cameras`.
        """
        state = self._normalized(raw["state"], "state")
        tokens, mask = self._tokens(raw["prompt"], state) if self._tokenizer else (None, None)
        images = {camera: self._picture(raw["images"][camera], camera) for camera in self.cameras}
        masks = {camera: np.ones(len(state), bool) for camera in self.cameras}
        proprio = _pad(state, self.model.proprio_dim)
        return masked(self.seen, Observation(images, masks, proprio, tokens, mask))

    def batch(self, raw: Mapping[str, Any]) -> Batch:
        """The same with the "actions" [b, h, a] that follow."""
        actions = self._normalized(raw["actions"], "actions")
        return Batch(self.observation(raw), _pad(actions, self.model.action_dim))

    def actions(self, sampled: np.ndarray) -> np.ndarray:
        """What the network sampled [b, h, action_dim] → actions of the robot, float32 [b, h, a]."""
        stats = self.norm_stats["actions"]
        kept = np.asarray(sampled)[..., : len(stats.mean)]
        return normalize.unnormalize(kept, stats, use_quantiles=self._quantiles).astype(np.float32)

    def _normalized(self, values: np.ndarray, key: str) -> np.ndarray:
        stats, values = self.norm_stats[key], np.asarray(values)
        if not np.isfinite(values).all():
            *example, dim = (int(i) for i in np.argwhere(~np.isfinite(values))[0])
            raise ValueError(
                f"{key!r} of a robot holds {values[(*example, dim)]} in dimension {dim} of "
                f"example {example[0]}: a sensor that gave no number, or data that was not recorded"
            )
        return normalize.normalize(values, stats, use_quantiles=self._quantiles).astype(np.float32)

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

    def _picture(self, images: np.ndarray, camera: str) -> np.ndarray:
        expected = (*self.model.image_resolution, 3)
        if images.dtype != np.uint8:
            raise ValueError(
                f"pictures of {self.cameras[camera]!r} have dtype {images.dtype}; expected uint8 "
                "in 0..255"
            )
        if images.shape[1:] != expected:
            raise ValueError(
                f"pictures of {self.cameras[camera]!r} are {images.shape[1:]}, "
                f"config.model.image_resolution expects {expected}: set it to that of the pictures"
            )
        return images


def cameras(model: pi0.Pi0Config, data: ml_collections.ConfigDict) -> dict[str, str]:
    """{camera of the model: picture feature}, without those that are said to be absent.

    ValueError for a camera of which nothing is said.
    """
    named = {camera: feature for camera, feature in data.cameras.items() if feature}
    if unknown := sorted(set(named) - set(model.image_keys)):
        near = difflib.get_close_matches(unknown[0], model.image_keys, n=1)
        raise ValueError(
            f"config.data.cameras names {unknown[0]!r}, config.model.image_keys are "
            f"{list(model.image_keys)}" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    if lacking := [camera for camera in model.image_keys if camera not in named]:
        raise ValueError(
            f"config.model.image_keys names the cameras {lacking}, and config.data.cameras says of "
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
    named = {camera: data.cameras.get(camera, "") for camera in model.image_keys}
    return {camera: feature for camera, feature in named.items() if feature != ABSENT}


def sentencepiece(name: str, max_token_len: int) -> tokenizer.SentencePieceTokenizer:
    """What config.data.tokenizer names. ValueError where it is none of PaliGemma's kind."""
    if name == "paligemma":
        return tokenizer.paligemma(max_token_len)
    if name.endswith(".model"):
        return tokenizer.SentencePieceTokenizer(name, max_token_len)
    raise ValueError(
        f"config.data.tokenizer is {name!r}; expected paligemma, the path of a SentencePiece "
        ".model, bytes or words"
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
            f"config.model.vocab_size is {model.vocab_size}; the tokenizer {name!r} needs "
            f"{made.vocab_size}"
        )
    return made


def _pad(array: np.ndarray, size: int) -> np.ndarray:
    """Zeros up to the model's dimension."""
    return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, size - array.shape[-1])])
