"""How good a policy is on episodes that training never sees: its loss, and how near the chunks that
it samples come to the recorded ones.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float

from policymix import sharding
from policymix.data import loader
from policymix.models import pi0
from policymix.runs import metadata, policies
from policymix.runs import pipeline as pipeline_lib
from policymix.runs import sources as sources_lib
from policymix.structs import Array, Batch, Params, typechecked

THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.5)  # open-pi-zero's, of normalised actions


class HeldOut:
    """Fixed batches of held-out episodes, and what a policy makes of them; false where there are
    none, which is printed.

    Datasets have the shares that they have in training. Which frames, noise and times are drawn
    depends on config.data.seed and the batch size alone, so that runs can be compared.

    Attributes:
      batch_size: what training sees at once, config.train.batch_size / accumulate, or as many as
        there are frames, for all devices to share.
      num_batches: config.train.eval_batches, or as many as there are frames.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        model: pi0.Pi0Config,
        pipeline: pipeline_lib.Pipeline,
        mesh: Mesh,
    ):
        """Reads the batches, each process its rows of them.

        Args:
          model: with the cameras that are there, as training computes it.

        Raises:
          ValueError, OSError: episodes that cannot be read.
        """
        self._model, self._mesh, self._pipeline = model, mesh, pipeline
        self._seed, self._num_flow_steps = config.data.seed, config.evaluate.num_flow_steps
        self._chunks = [
            source.chunks(source.held_out_episodes) if source.held_out_episodes else ()
            for source in pipeline.sources
        ]
        sizes = [len(chunks) for chunks in self._chunks]
        trained = [len(source.train or ()) for source in pipeline.sources]
        shares = np.where(sizes, metadata.fractions(config.data, trained), 0.0)
        self._fractions = shares / max(shares.sum(), 1e-9)
        most = config.train.batch_size // config.train.accumulate
        self.batch_size = min(most, sum(sizes)) // mesh.size * mesh.size
        self.num_batches = 0
        if self.batch_size:
            self.num_batches = min(config.train.eval_batches, sum(sizes) // self.batch_size)
        elif sum(sizes):
            print(
                f"no evaluation on held-out episodes: they have {sum(sizes)} frames, fewer than "
                f"the {mesh.size} devices; raise config.data.held_out"
            )
        else:
            print(
                "no evaluation on held-out episodes: there are none (config.data.held_out is "
                f"{config.data.held_out})"
            )
        count = self.batch_size // jax.process_count()
        rows = slice(jax.process_index() * count, (jax.process_index() + 1) * count)
        self._batches = [self._batch(number, rows) for number in range(self.num_batches)]

    def __bool__(self) -> bool:
        return self.num_batches > 0

    def __call__(self, params: Params) -> dict[str, float]:
        """{"held_out/loss", "held_out/l1", "held_out/accuracy_0.05" … "held_out/accuracy_0.5"} as
        `accuracies` has them; {} without batches. The loss is training's, without augmentation.
        """
        if not self:
            return {}
        place, key, totals = sharding.batch(self._mesh), jax.random.key(self._seed), None
        measure = _compiled(self._model, self._num_flow_steps, self._mesh)
        for number, (batch, mask) in enumerate(self._batches):
            batch, mask = sharding.put((batch, mask), place)
            sums = measure(params, batch, mask, jax.random.fold_in(key, number))
            totals = sums if totals is None else jax.tree.map(jnp.add, totals, sums)
        found = {name: float(value) for name, value in totals.items()}
        steps, numbers = found.pop("steps"), found.pop("numbers")
        loss, l1 = found.pop("loss") / self.num_batches, found.pop("l1") / max(numbers, 1)
        near = {f"held_out/{name}": count / max(steps, 1) for name, count in found.items()}
        return {"held_out/loss": loss, "held_out/l1": l1} | near

    def _batch(self, number: int, rows: slice) -> tuple[Batch, np.ndarray]:
        before, after = (
            sources_lib.drawn_before(self._fractions, self.batch_size, number + k) for k in (0, 1)
        )
        wanted, place, parts = np.arange(self.batch_size)[rows], 0, []
        for which, (first, end) in enumerate(zip(before.tolist(), after.tolist(), strict=True)):
            here = wanted[(wanted >= place) & (wanted < place + end - first)] - place
            place += end - first
            if len(here):
                # A small dataset with a large share is gone through again.
                seed = self._seed + which
                drawn = loader.drawn(len(self._chunks[which]), first, end - first, seed)
                parts.append(self._encoded(which, drawn[here]))
        return jax.tree.map(lambda *same: np.concatenate(same), *parts)

    def _encoded(self, which: int, positions: np.ndarray) -> tuple[Batch, np.ndarray]:
        source, encoder = self._pipeline.sources[which], self._pipeline.encoders[which]
        raw = source.get(self._chunks[which], positions)
        batch = encoder.batch(raw)
        numbers = encoder.normalized({key: raw[key] for key in ("state", "actions")})
        has = np.arange(batch.actions.shape[-1]) < numbers["actions"].shape[-1]
        return batch, ~raw["action_is_pad"][..., None] & has


@functools.cache
def _compiled(model: pi0.Pi0Config, num_flow_steps: int, mesh: Mesh):
    """(params, batch, mask, key) → {"loss" of the batch, and the sums of `accuracies`}, on every
    device; runs of one process share it.
    """
    loss_fn = policies.loss_fn(model)

    def measure(params: Params, batch: Batch, mask: jax.Array, key: jax.Array):
        loss_key, noise_key = jax.random.split(key)
        loss, _ = loss_fn(params, batch, loss_key)
        sampled = pi0.sample_actions(
            model,
            params,
            batch.observation,
            noise=jax.random.normal(noise_key, batch.actions.shape),
            num_flow_steps=num_flow_steps,
        )
        return {"loss": loss} | accuracies(sampled, batch.actions, mask)

    return jax.jit(measure, out_shardings=sharding.replicated(mesh))


@typechecked
def accuracies(
    actions: Float[Array, "b h a"],
    truth: Float[Array, "b h a"],
    mask: Bool[Array, "b h a"],
    thresholds: Sequence[float] = THRESHOLDS,
) -> dict[str, jax.Array]:
    """Sums over a batch of how near sampled actions are to the recorded ones, as open-pi-zero
    validates: an action counts at a threshold if it is nearer than that in each of its numbers.

    open-pi-zero also counts what lies beyond the end of an episode; here that, and the dimensions
    that a robot lacks, are False in `mask`.

    Returns:
      {"accuracy_0.05" …: actions that near; "steps": actions, of which these are shares; "l1": sum
      of |error|; "numbers": over so many}, all float32 [].
    """
    error, counts = jnp.abs(actions - truth), mask.any(axis=-1)
    largest = jnp.where(mask, error, 0).max(axis=-1)
    near = {
        f"accuracy_{t:g}": jnp.sum((largest < t) & counts, dtype=jnp.float32) for t in thresholds
    }
    return near | {
        "steps": counts.sum(dtype=jnp.float32),
        "l1": jnp.sum(jnp.where(mask, error, 0), dtype=jnp.float32),
        "numbers": mask.sum(dtype=jnp.float32),
    }
