"""From datasets on disk to batches that the network takes."""

import pathlib
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np

from policymix import files
from policymix.checkpoints import assets, layout
from policymix.models import pi0
from policymix.runs import encoding
from policymix.runs import sources as sources_lib
from policymix.structs import Batch
from policymix.transforms import normalize


class Pipeline:
    """Batches of one dataset, or of a mixture, for one model.

    Attributes:
      sources: one per dataset of config.data.path.
      asset_id: what the statistics are called beside checkpoints.
      norm_stats: {"state", "actions"}; norm_stats_from: where they come from, in words.
      encoder: raw examples → what the network takes.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        model: pi0.Pi0Config,
        resumed: pathlib.Path | None = None,
    ):
        """`resumed` is the step whose run goes on: its normalisation and data may not change."""
        data = config.data
        paths = [path for path in data.path.split(",") if path]
        if not paths:
            raise ValueError(
                "config.data.path is empty: pass --config.data.path=DIRECTORY of a LeRobot "
                "dataset, or several, as a,b"
            )
        self.model, self._seed = model, config.train.seed
        cameras = encoding.cameras(model, data)
        self.sources = [
            sources_lib.Source(path, data, model.action_horizon, cameras) for path in paths
        ]
        sources_lib.check_alike(self.sources)
        self._fractions = tuple(data.fractions)
        self.asset_id = data.asset_id or files.local(paths[0]).name
        self.norm_stats, self.norm_stats_from = self._find_norm_stats(config, resumed)
        self._check_dimensions()
        self.encoder = encoding.Encoder(model, data, self.norm_stats)
        if resumed:
            self._check_same_data(resumed)

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
            layout.find(source)  # what is not there is no reason to compute new ones
            if found := assets.norm_stats_of(source, asset_id):
                return found[1], source
            if resumed or named:
                raise ValueError(f"{source} has no norm stats beside it")
        trained = [source.train for source in self.sources if source.train]
        if not trained:
            raise ValueError(
                "config.data.held_out is 1, so there are no training episodes to take statistics "
                "from: name them with config.data.norm_stats=CHECKPOINT or a norm_stats.json"
            )
        arrays = [chunks.statistics_arrays() for chunks in trained]
        stats = {
            key: normalize.compute(np.concatenate([a[key] for a in arrays])) for key in arrays[0]
        }
        return stats, "the training episodes"

    def _check_dimensions(self) -> None:
        sizes = {"state": self.model.proprio_dim, "actions": self.model.action_dim}
        fields = {"state": "proprio_dim", "actions": "action_dim"}
        for source in self.sources:
            shapes, path = source.shapes(), source.dataset.path
            for key, size in sizes.items():
                if key not in self.norm_stats:
                    raise ValueError(f"the norm stats of {self.norm_stats_from} lack {key!r}")
                d, known = shapes[key][-1], len(self.norm_stats[key].mean)
                if d > size:
                    raise ValueError(
                        f"{key!r} of {path} has {d} dimensions, config.model.{fields[key]} is "
                        f"{size}: it must be at least as large"
                    )
                if d > known:
                    raise ValueError(
                        f"the norm stats of {self.norm_stats_from} have {known} dimensions for "
                        f"{key!r}, {path} has {d}: they belong to another robot"
                    )

    def _check_same_data(self, resumed: pathlib.Path) -> None:
        known = [training["fingerprint"] for training in assets.trainings_of(resumed)]
        for source in self.sources:
            if source.dataset.fingerprint() not in known:
                raise ValueError(
                    f"{source.dataset.path} is not what {resumed} was trained on (its content "
                    "changed): resume with the old data, or start from that checkpoint with "
                    "config.train.init_from in another --workdir"
                )

    def trainings(self) -> list[dict[str, Any]]:
        """What is recorded beside a checkpoint of what it was trained on, dataset by dataset."""
        return [source.training() for source in self.sources]

    def check_trains(self, batch_size: int) -> None:
        """ValueError if there is nothing to train on, or a dataset without a share of a batch."""
        for source in self.sources:
            if source.train is None:
                raise ValueError(
                    "config.data.held_out is 1, which keeps every episode for validation: nothing "
                    "is left to train on"
                )
        sources_lib.shares(self.sources, self._fractions, batch_size)

    def batch(self, step: int, batch_size: int) -> Batch:
        """Training batch number `step`: a function of the seed and the step alone."""
        counts = sources_lib.shares(self.sources, self._fractions, batch_size)
        return self.encoder.batch(sources_lib.draw(self.sources, counts, self._seed, step))

    def validation(self, batch_size: int, num_batches: int, held_out: float):
        """Batches of held-out episodes, every frame at most once: (to select on, to report on).

        The two come from different episodes, a fraction `held_out` of the batches being for the
        report; one episode alone serves selection only.
        """
        (source,) = self.sources
        episodes = source.held_out_episodes
        if not episodes:
            raise ValueError(
                "config.data.held_out is 0, so no episodes are held out to validate on"
            )
        reported = 0
        if held_out > 0 and len(episodes) > 1:
            reported = min(max(1, round(held_out * num_batches)), num_batches - 1)
        count = max(1, round(held_out * len(episodes))) if reported else 0
        select_on, report_on = episodes[: len(episodes) - count], episodes[len(episodes) - count :]
        selection = self._batches(select_on, batch_size, num_batches - reported)
        return selection, self._batches(report_on, batch_size, reported) if reported else []

    def _batches(self, episodes: Sequence[int], batch_size: int, num_batches: int) -> list[Batch]:
        (source,) = self.sources
        chunks = source.chunks(episodes)
        if len(chunks) < batch_size:
            raise ValueError(
                f"the held-out episodes {list(episodes)} have {len(chunks)} frames, fewer than "
                f"one batch of {batch_size}: lower config.train.batch_size, or hold out more with "
                "config.data.held_out"
            )
        order = np.random.default_rng(self._seed).permutation(len(chunks))
        starts = range(0, len(order) - batch_size + 1, batch_size)[:num_batches]
        return [
            self.encoder.batch(source.get(chunks, order[start : start + batch_size]))
            for start in starts
        ]
