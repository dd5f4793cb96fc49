"""From a dataset on disk to batches that the network takes: chunks, normalisation, padding,
prompts.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np

from policymix import files
from policymix.checkpoints import assets, layout
from policymix.data import lerobot, loader, tokenizer
from policymix.models import pi0
from policymix.structs import Batch, Observation
from policymix.transforms import normalize, prompts


class Pipeline:
    """Batches of one dataset for one model.

    Attributes:
      dataset: the LeRobot dataset; asset_id: what its statistics are called beside checkpoints.
      train_episodes, held_out_episodes: disjoint, chosen by config.data.seed.
      norm_stats: {"state", "actions"}; norm_stats_from: where they come from, in words.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        model: pi0.Pi0Config,
        resumed: pathlib.Path | None = None,
    ):
        """`resumed` is the step whose run goes on: its normalisation and data may not change."""
        data = config.data
        if not data.path:
            raise ValueError(
                "config.data.path is empty: pass --config.data.path=DIRECTORY of a LeRobot dataset"
            )
        if model.image_keys and not data.mask_cameras:
            raise ValueError(
                f"config.model.image_keys names the cameras {list(model.image_keys)}, and only "
                "the numeric columns of a dataset are read here; set config.model.image_keys to "
                "(), or config.data.mask_cameras=True to train as if every camera were absent"
            )
        self.model, self._quantiles, self._seed = model, data.quantiles, config.train.seed
        self.dataset = lerobot.open_dataset(files.local(data.path))
        self.asset_id = data.asset_id or files.local(data.path).name
        self.train_episodes, self.held_out_episodes = loader.split_episodes(
            self.dataset.num_episodes, data.held_out, data.seed
        )
        self._keys = {
            "state_key": data.state_key,
            "action_key": data.action_key,
            "default_prompt": data.default_prompt or None,
        }
        self._train = self._chunks(self.train_episodes)
        self._tokenizer = (
            tokenizer.ByteTokenizer(model.max_token_len) if model.max_token_len else None
        )
        if self._tokenizer and model.vocab_size < self._tokenizer.vocab_size:
            raise ValueError(
                f"config.model.vocab_size is {model.vocab_size}; byte prompts need "
                f"{self._tokenizer.vocab_size}"
            )
        self.norm_stats, self.norm_stats_from = self._find_norm_stats(config, resumed)
        self._check_dimensions()
        if resumed:
            self._check_same_data(resumed)

    def _chunks(self, episodes: Sequence[int]) -> loader.ActionChunks:
        return loader.ActionChunks(self.dataset, self.model.action_horizon, episodes, **self._keys)

    def _find_norm_stats(
        self, config: ml_collections.ConfigDict, resumed: pathlib.Path | None
    ) -> tuple[normalize.Stats, str]:
        """Those of the run that goes on; else those named; else those of the checkpoint that
        training starts from, so that the two can be mixed; else new ones.
        """
        named, asset_id = config.data.norm_stats, config.data.asset_id or None
        if not resumed and named.endswith(".json"):
            return assets.read_norm_stats(files.local(named)), named
        source = str(resumed or named or config.train.init_from)
        if source:
            layout.find_params(
                source
            )  # one that is not there is an error, not a reason to compute new ones
            if found := assets.norm_stats_of(source, asset_id):
                return found[1], source
            if resumed or named:
                raise ValueError(f"{source} has no norm stats beside it")
        arrays = self._train.statistics_arrays()
        stats = {key: normalize.compute(values) for key, values in arrays.items()}
        return stats, "the training episodes"

    def _check_dimensions(self) -> None:
        sample = self._train.get(np.arange(1))
        for key, array in ((key, sample[key]) for key in ("state", "actions")):
            if key not in self.norm_stats:
                raise ValueError(f"the norm stats of {self.norm_stats_from} lack {key!r}")
            d, known = array.shape[-1], len(self.norm_stats[key].mean)
            if d > self.model.action_dim:
                raise ValueError(
                    f"{key!r} of {self.dataset.path} has {d} dimensions, config.model.action_dim "
                    f"is {self.model.action_dim}: it must be at least as large"
                )
            if d > known:
                raise ValueError(
                    f"the norm stats of {self.norm_stats_from} have {known} dimensions for "
                    f"{key!r}, {self.dataset.path} has {d}: they belong to another robot"
                )

    def _check_same_data(self, resumed: pathlib.Path) -> None:
        fingerprint = self.dataset.fingerprint()
        known = [training["fingerprint"] for training in assets.trainings_of(resumed)]
        if fingerprint not in known:
            raise ValueError(
                f"{self.dataset.path} is not what {resumed} was trained on (its content changed): "
                "resume with the old data, or start from that checkpoint with "
                "config.train.init_from in another --workdir"
            )

    def training(self) -> dict[str, Any]:
        """What is recorded beside a checkpoint of what it was trained on."""
        return {
            "path": str(self.dataset.path),
            "fingerprint": self.dataset.fingerprint(),
            "episodes": [int(episode) for episode in self.train_episodes],
        }

    def batch(self, step: int, batch_size: int) -> Batch:
        """Training batch number `step`: a function of the seed and the step alone."""
        indices = loader.batch_indices(len(self._train), batch_size, self._seed, step)
        return self.encode(self._train.get(indices))

    def validation(self, batch_size: int, num_batches: int, held_out: float):
        """Batches of held-out episodes, every frame at most once: (to select on, to report on).

        The two come from different episodes, a fraction `held_out` of the batches being for the
        report; one episode alone serves selection only.
        """
        if not self.held_out_episodes:
            raise ValueError(
                "config.data.held_out is 0, so no episodes are held out to validate on"
            )
        reported = 0
        if held_out > 0 and len(self.held_out_episodes) > 1:
            reported = min(max(1, round(held_out * num_batches)), num_batches - 1)
        count = max(1, round(held_out * len(self.held_out_episodes))) if reported else 0
        cut = len(self.held_out_episodes) - count
        select_on, report_on = self.held_out_episodes[:cut], self.held_out_episodes[cut:]
        selection = self._batches(select_on, batch_size, num_batches - reported)
        return selection, self._batches(report_on, batch_size, reported) if reported else []

    def _batches(self, episodes: Sequence[int], batch_size: int, num_batches: int) -> list[Batch]:
        chunks = self._chunks(episodes)
        if len(chunks) < batch_size:
            raise ValueError(
                f"the held-out episodes {list(episodes)} have {len(chunks)} frames, fewer than "
                f"one batch of {batch_size}: lower config.train.batch_size, or hold out more with "
                "config.data.held_out"
            )
        order = np.random.default_rng(self._seed).permutation(len(chunks))
        starts = range(0, len(order) - batch_size + 1, batch_size)[:num_batches]
        return [self.encode(chunks.get(order[start : start + batch_size])) for start in starts]

    def encode(self, raw: dict[str, Any]) -> Batch:
        """Raw chunks as `ActionChunks.get` gives them → normalised, tokenised, padded."""
        state, actions = (
            normalize.normalize(
                raw[key], self.norm_stats[key], use_quantiles=self._quantiles
            ).astype(np.float32)
            for key in ("state", "actions")
        )
        tokens = mask = None
        if self._tokenizer:
            if self.model.discrete_state_input:
                texts = [
                    prompts.pi05(text, row) for text, row in zip(raw["prompt"], state, strict=True)
                ]
            else:
                texts = [prompts.pi0(text) for text in raw["prompt"]]
            tokens, mask = self._tokenizer.encode(texts)
        size, cameras = len(state), self.model.image_keys
        black = np.zeros((size, *self.model.image_resolution, 3), np.uint8)
        images, masks = dict.fromkeys(cameras, black), dict.fromkeys(cameras, np.zeros(size, bool))
        return Batch(Observation(images, masks, self._pad(state), tokens, mask), self._pad(actions))

    def _pad(self, array: np.ndarray) -> np.ndarray:
        """Zeros up to the model's action dimension."""
        missing = self.model.action_dim - array.shape[-1]
        return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)])
