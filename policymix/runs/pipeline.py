"""From datasets on disk to batches that the network takes."""

import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from policymix import files, processes
from policymix.checkpoints import assets, layout
from policymix.data import loader
from policymix.models import pi0
from policymix.runs import encoding, metadata, statistics
from policymix.runs import sources as sources_lib
from policymix.structs import Batch
from policymix.transforms import normalize

_STRANGE = 20  # of normalised numbers, on average
_OWN = "the training episodes"  # where statistics come from that are not another's


class Pipeline:
    """Batches of one dataset, or of a mixture, for one model.

    Attributes:
      sources: one per dataset of config.data.
      norm_stats: {what they are called beside checkpoints: statistics}, one for all datasets; of a
        mixture one for each.
      norm_stats_from: where they come from, in words.
      encoders: of each source, raw examples → what the network takes; encoder: the first's.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        model: pi0.Pi0Config,
        resumed: pathlib.Path | None = None,
    ):
        """`resumed` is the step whose run goes on: its normalisation and data may not change."""
        data, parts = config.data, metadata.parts(config.data)
        _check(data)
        self.model, self._seed, self._data = model, config.train.seed, data
        self.sources = [
            sources_lib.Source(
                part.name,
                part.data,
                model.action_horizon,
                encoding.cameras(model, part.data),
                model.image_resolution,
            )
            for part in parts
        ]
        # A mixture is of several robots, each with its own sizes and its own normalisation.
        if data.mixture:
            groups = {
                part.asset_id: [source] for part, source in zip(parts, self.sources, strict=True)
            }
        else:
            sources_lib.check_alike(self.sources)
            groups = {data.asset_id or self.sources[0].dataset.path.name: self.sources}
        self.norm_stats, self.encoders = {}, []
        for asset_id, group in groups.items():
            own = parts[self.sources.index(group[0])].data
            stats, self.norm_stats_from = _find_norm_stats(config, own, asset_id, group, resumed)
            self._check_dimensions(group, stats)
            self.norm_stats[asset_id] = stats
            encoder = encoding.Encoder(model, own, stats, **_masks(config.train))
            self.encoders += [encoder] * len(group)
            for source in group if self.norm_stats_from != _OWN else ():
                _warn(source, encoder, self.norm_stats_from)
        self.encoder = self.encoders[0]
        if resumed:
            self._check_same_data(resumed)

    @functools.cached_property
    def _fractions(self) -> np.ndarray:
        return metadata.fractions(self._data, [len(source.train) for source in self.sources])

    def _check_dimensions(self, sources: Sequence[sources_lib.Source], stats) -> None:
        sizes = {"state": self.model.proprio_dim, "actions": self.model.action_dim}
        fields = {"state": "proprio_dim", "actions": "action_dim"}
        for source in sources:
            shapes, path = source.shapes(), source.dataset.path
            for key, size in sizes.items():
                if key not in stats:
                    raise ValueError(f"the norm stats of {self.norm_stats_from} lack {key!r}")
                d, known = shapes[key][-1], len(stats[key].mean)
                if d > size:
                    raise ValueError(
                        f"{key!r} of {path} has {d} dimensions, the model's {fields[key]} is "
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
                    "changed): resume with the old data, or start from that checkpoint "
                    "(init_from) in another --workdir"
                )

    def trainings(self) -> list[dict[str, Any]]:
        """What is recorded beside a checkpoint of what it was trained on, dataset by dataset."""
        return [source.training() for source in self.sources]

    def check_trains(self) -> None:
        """ValueError if there is nothing to train on, or fractions that cannot be."""
        for source in self.sources:
            if source.train is None:
                raise ValueError(
                    "config.data.held_out is 1, which keeps every episode for validation: nothing "
                    "is left to train on"
                )
        _ = self._fractions

    def batch(self, step: int, batch_size: int, rows: slice = slice(None)) -> Batch:
        """The `rows` of training batch number `step`: a function of the seed and the step alone."""
        drawn = sources_lib.draw(self.sources, self._fractions, batch_size, self._seed, step, rows)
        encoded = [self.encoders[number].batch(raw) for number, raw in drawn.items()]
        if len(encoded) == 1:
            return encoded[0]
        return jax.tree.map(lambda *parts: np.concatenate(parts), *encoded)

    def episodes(self, step: int, batch_size: int) -> dict[str, list[int]]:
        """{dataset: the episodes that training batch number `step` has frames of}."""
        drawn = sources_lib.drawn(self.sources, self._fractions, batch_size, self._seed, step)
        return {
            str(self.sources[n].dataset.path): self.sources[n].train.episodes(positions)
            for n, positions in drawn.items()
        }

    def batches(
        self, first: int, last: int, batch_size: int, shard: tuple[int, int] = (0, 1)
    ) -> Iterator[Batch]:
        """Training batches `first` to `last` - 1, made ahead by config.data.num_threads threads, or
        num_processes processes.

        Args:
          shard: (this process, how many there are): each makes its rows of every batch.
        """
        index, count = shard
        if batch_size % count or not 0 <= index < count:
            raise ValueError(
                f"a batch of {batch_size} cannot be shared equally by {count} processes, of which "
                f"this is {index}"
            )
        size = batch_size // count
        rows = slice(index * size, (index + 1) * size)
        make = functools.partial(self.batch, batch_size=batch_size, rows=rows)
        self._keep_decoded()
        return loader.ahead(
            make,
            first,
            last,
            num_threads=self._data.num_threads or processes.num_cores(),
            num_processes=self._data.num_processes,
        )

    def _keep_decoded(self) -> None:
        """Small pictures of small datasets are decoded once; other processes would do it again."""
        size = sum(source.decoded_bytes() for source in self.sources)
        if size <= 1e6 * self._data.cache_mb and not self._data.num_processes:
            for source in self.sources:
                source.keep_decoded()

    def validation(self, batch_size: int, num_batches: int, held_out: float):
        """Batches of held-out episodes, every frame at most once: (to select on, to report on).

        The two come from different episodes, a fraction `held_out` of the batches being for the
        report; one episode alone serves selection only.
        """
        (source,) = self.sources
        episodes = source.held_out_episodes
        if not 0 <= held_out < 1:
            raise ValueError(f"config.mix.held_out is {held_out}; expected 0 to below 1")
        if not episodes and source.left_out:
            raise ValueError(
                f"{source.dataset.path}: all episodes that were held out were left out, being bad"
            )
        if not episodes:
            raise ValueError(
                "config.data.held_out is 0, so no episodes are held out to validate on"
            )
        reported = 0
        if held_out > 0 and len(episodes) > 1:
            reported = min(max(1, round(held_out * num_batches)), num_batches - 1)
        count = min(max(1, round(held_out * len(episodes))), len(episodes) - 1) if reported else 0
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


def _masks(train: ml_collections.ConfigDict) -> dict[str, bool]:
    return {name: train[name] for name in ("mask_padded_steps", "mask_padded_dims")}


def _check(data: ml_collections.ConfigDict) -> None:
    """ValueError for numbers that no run can have."""
    for name in ("seed", "fps", "cache_mb", "num_threads", "num_processes"):
        if not data[name] >= 0:
            raise ValueError(f"config.data.{name} is {data[name]}; it may not be negative")
    if not 0 <= data.held_out <= 1:
        raise ValueError(f"config.data.held_out is {data.held_out}; expected a fraction, 0 to 1")


def _warn(source: sources_lib.Source, encoder: encoding.Encoder, stats_from: str) -> None:
    """Says so if statistics from elsewhere make strange numbers of a dataset's first examples."""
    chunks = source.chunks(source.held_out_episodes) if source.train is None else source.train
    if not len(chunks):
        return
    normalized = encoder.normalized(next(chunks.blocks()))
    for key, values in normalized.items():
        size = np.abs(values).reshape(-1, values.shape[-1]).mean(axis=0)
        if (strange := np.flatnonzero(size > _STRANGE)).size:
            print(
                f"WARNING: with the norm stats of {stats_from}, {key}{strange.tolist()} of "
                f"{source.dataset.path} are {size[strange[0]]:.0f} on average, where 1 is usual: "
                "are they of another robot, or relative to the state in one and not in the other?"
            )


def _find_norm_stats(
    config: ml_collections.ConfigDict,
    data: ml_collections.ConfigDict,
    asset_id: str,
    sources: Sequence[sources_lib.Source],
    resumed: pathlib.Path | None,
) -> tuple[normalize.Stats, str]:
    """Those of the run that goes on; else those named; else those of the checkpoint that training
    starts from, so that the two can be mixed; else new ones.
    """
    named, chosen = data.norm_stats, asset_id if data.mixture else data.asset_id or None
    if not resumed and named.endswith(".json"):
        return assets.read_norm_stats(files.local(named)), named
    source = str(resumed or named or config.train.init_from)
    if source:
        layout.find(source)  # what is not there is no reason to compute new ones
        known = assets.find(source, assets.NORM_STATS)
        # A base that knows other robots only, as OpenPI's do, says nothing of this one.
        strange = (len(known) > 1 or (known and data.mixture)) and chosen and chosen not in known
        if strange and not (resumed or named):
            print(f"{source} has norm stats of {', '.join(known)}, none of {chosen}: new ones")
        elif found := assets.norm_stats_of(source, chosen):
            return found[1], source
        if resumed or named:
            raise ValueError(f"{source} has no norm stats beside it")
    trained = [source.train for source in sources if source.train is not None]
    if not trained:
        raise ValueError(
            "config.data.held_out is 1, so there are no training episodes to take statistics "
            "from: name them with config.data.norm_stats=CHECKPOINT or a norm_stats.json"
        )
    stats = statistics.of_chunks(trained, encoding.wiring(data).adapt, data.quantile_rule)
    return stats, _OWN
