"""Losses of checkpoints and mixes on the batches of a validation file."""

import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from policymix import memory, metrics, sharding, trees
from policymix.checkpoints import assets, streaming
from policymix.checkpoints.leaves import Leaf
from policymix.data.validation import Validation
from policymix.mixing import objective as objective_lib
from policymix.models import pi0, recognize
from policymix.runs import policies
from policymix.runs.inputs import Inputs
from policymix.structs import LossFn, Params
from policymix.transforms import normalize


class Judge:
    """Measures every candidate with the same noise, so that losses compare models.

    Attributes:
      warnings: what makes losses dishonest. mesh: where parameters are split over devices, if so.
      examples: the loss of each example, by (name, "selection" or "held_out").
    """

    def __init__(
        self,
        model: pi0.Pi0Config,
        path: pathlib.Path,
        validation: Validation,
        seed: int,
        fsdp_devices: int = 1,
    ):
        self.model, self.path, self.validation = model, path, validation
        self.warnings: list[str] = []
        self.mesh = sharding.mesh(fsdp_devices) if fsdp_devices > 1 else None
        self.examples: dict[tuple[str, str], np.ndarray] = {}
        # Cameras that are masked in every batch are not computed: losses are the same.
        masked = [
            {camera for camera, mask in batch.observation.image_masks.items() if not np.any(mask)}
            for batch in (*validation.selection, *validation.held_out)
        ]
        absent = set.intersection(*masked)
        seen = model.seeing([camera for camera in model.image_keys if camera not in absent])
        self._loss_fn, self._residual_fn = _loss_fn(seen), policies.residual_fn(seen)
        keys = jax.random.split(jax.random.key(seed))
        self._sets = {
            "selection": (validation.selection, keys[0]),
            "held_out": (validation.held_out, keys[1]),
        }

    def check(self, name: str, header: Mapping[str, Any]) -> None:
        """ValueError if the model of the config is not that of the checkpoint, or the batches do
        not fit it.
        """
        recognize.check(pi0.shapes(self.model), header, name)
        for number, batch in enumerate([*self.validation.selection, *self.validation.held_out]):
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
            expected = (self.model.action_horizon, self.model.action_dim)
            if batch.actions.shape[1:] != expected:
                raise ValueError(
                    f"{self.path}: actions of batch {number} are {batch.actions.shape[1:]} "
                    f"(horizon, dimension), config.model expects {expected}"
                )
            tokens = batch.observation.prompt_tokens
            if tokens is not None and tokens.max(initial=0) >= self.model.vocab_size:
                raise ValueError(
                    f"{self.path}: batch {number} has the prompt token {tokens.max()}, "
                    f"config.model.vocab_size is {self.model.vocab_size}: it was written for "
                    "another tokenizer"
                )
            try:
                jax.eval_shape(self._loss_fn, pi0.shapes(self.model), shapes, jax.random.key(0))
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{self.path}: batch {number} does not fit config.model: {error}"
                ) from error

    def normalised_otherwise(self, checkpoints: Sequence[str]) -> list[str]:
        """A sentence for every checkpoint whose norm stats are not those of the validation file."""
        if "norm_stats" not in self.validation.meta:
            return []
        ours, found = assets.parse_norm_stats(self.validation.meta, str(self.path)), []
        for name in checkpoints:
            theirs = assets.norm_stats_of(name, self.validation.meta.get("asset_id"))
            if theirs and (differs := normalize.difference(ours, theirs[1])):
                found.append(
                    f"{name} was trained with other norm stats than {self.path} was written with "
                    f"({differs}): its loss is not comparable"
                )
        return found

    def each(self, inputs: Inputs) -> list[dict[str, float | None]]:
        """The losses of checkpoints on disk, one in memory at a time."""
        rows = metrics.progress(
            range(len(inputs.names)), "losses of the inputs", total=len(inputs.names)
        )
        return [self.losses(inputs.names[row], inputs.tree(row)) for row in rows]

    def losses(self, name: str, tree: Mapping[str, Any]) -> dict[str, float | None]:
        """Mean loss on the selection and on the held-out batches (None where none are held out).

        Args:
          tree: parameters, or leaves that are read one by one.
        """
        params, result = self._placed(tree), {}
        for which, (batches, key) in self._sets.items():
            examples = [
                np.asarray(
                    objective_lib.evaluate(
                        self._loss_fn, params, batch, jax.random.fold_in(key, i)
                    )[1]["examples"]
                )
                for i, batch in enumerate(batches)
            ]
            self.examples[name, which] = np.concatenate([np.empty(0), *examples])
            result[which] = float(np.mean([e.mean() for e in examples])) if examples else None
            if examples and not math.isfinite(result[which]):
                raise FloatingPointError(
                    f"{name}: the loss on the {which} batches of {self.path} is {result[which]}; "
                    "the checkpoint has NaN or does not belong to this config"
                )
        return result

    def _placed(self, tree: Mapping[str, Any]) -> Params:
        """A tree on the devices, split over them where the mesh has several."""

        def place(leaf, where):
            array = leaf.read() if isinstance(leaf, Leaf) else leaf
            return jax.device_put(array, where)

        where = jax.local_devices()[0]
        if self.mesh is None:
            return jax.tree.map(lambda leaf: place(leaf, where), dict(tree))
        return jax.tree.map(place, dict(tree), sharding.parameters(self.mesh, dict(tree)))

    def objective(self, inputs: Inputs, settings) -> objective_lib.Objective:
        """The selection loss as a function of mixing coefficients of the inputs that are mixed.

        The checkpoints are held in memory if all of them fit, and else read from disk for every
        evaluation; `settings.search_in` decides otherwise.
        """
        batches, key = self._sets["selection"]
        if in_memory(inputs, settings.search_in, self.mesh):
            trees_ = [self._placed(inputs.checked_tree(row)) for row in inputs.mixed]
            return objective_lib.in_memory(self._loss_fn, trees_, batches, key, self._residual_fn)
        return streaming.objective(
            self._loss_fn,
            [trees.flatten(inputs.tree(row)) for row in inputs.mixed],
            batches,
            key,
            self._residual_fn,
            names=[inputs.names[row] for row in inputs.mixed],
            place=self._placed,
        )

    def describe(self) -> dict[str, Any]:
        """For mix.json."""
        counts = {which: len(batches) for which, (batches, _) in self._sets.items()}
        return {"path": str(self.path.absolute()), "batches": counts, "meta": self.validation.meta}

    def summary(self) -> str:
        """For the terminal."""
        chosen, held = len(self.validation.selection), len(self.validation.held_out)
        return f"validation {self.path}: {chosen} batches to select on, {held} held out"


@functools.cache
def _loss_fn(model: pi0.Pi0Config) -> LossFn:
    """The loss of a batch, with that of its examples, [b], among the metrics.

    One object per model, so that what was compiled for it is found again.
    """

    def loss_fn(params, batch, key):
        examples = jnp.mean(pi0.residual(model, params, batch, key) ** 2, axis=(1, 2))
        return jnp.mean(examples), {"examples": examples}

    return loss_fn


def in_memory(inputs: Inputs, wanted: str, mesh) -> bool:
    """Whether a search holds its checkpoints in memory: n of them, a mix, and its gradient.

    ValueError if `wanted` is neither "auto", "memory" nor "disk".
    """
    if wanted not in ("auto", "memory", "disk"):
        raise ValueError(f"config.mix.search_in is {wanted!r}; expected auto, memory or disk")
    if wanted != "auto":
        return wanted == "memory"
    needed = (len(inputs.mixed) + 2) * inputs.nbytes
    devices = 1 if mesh is None else mesh.shape["fsdp"]
    free = memory.free_bytes(jax.local_devices()[0].memory_stats())
    return free is None or needed <= 0.8 * free * devices
