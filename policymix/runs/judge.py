"""Losses of checkpoints and mixes on the batches of a validation file."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from policymix import metrics, trees
from policymix.checkpoints import assets, store
from policymix.data.validation import Validation
from policymix.mixing import objective as objective_lib
from policymix.models import pi0
from policymix.runs import policies
from policymix.structs import Params
from policymix.transforms import normalize


class Judge:
    """Measures every candidate with the same noise, so that losses compare models."""

    def __init__(self, model: pi0.Pi0Config, path: pathlib.Path, validation: Validation, seed: int):
        self.model, self.path, self.validation = model, path, validation
        self.warnings: list[str] = []
        self._loss_fn = policies.loss_fn(model)
        keys = jax.random.split(jax.random.key(seed))
        self._sets = {
            "selection": (validation.selection, keys[0]),
            "held_out": (validation.held_out, keys[1]),
        }

    def check(self, name: str, header: Mapping[str, Any]) -> None:
        """ValueError if the model of the config is not that of the checkpoint, or the batches do
        not fit it.
        """
        trees.check_same(pi0.shapes(self.model), header, names=("config.model", name))
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

    def each(self, checkpoints: Sequence[str]) -> list[dict[str, float | None]]:
        """The losses of checkpoints on disk, one in memory at a time."""
        return [
            self.losses(name, store.load_params(name))
            for name in metrics.progress(list(checkpoints), "losses of the inputs")
        ]

    def losses(self, name: str, params: Params) -> dict[str, float | None]:
        """Mean loss on the selection and on the held-out batches (None where none are held out)."""
        params = jax.tree.map(jnp.asarray, dict(params))
        result = {}
        for which, (batches, key) in self._sets.items():
            result[which] = None
            if batches:
                value = float(
                    objective_lib.in_memory(self._loss_fn, [params], batches, key).value(np.ones(1))
                )
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"{name}: the loss on the {which} batches of {self.path} is {value}; the "
                        "checkpoint has NaN or does not belong to this config"
                    )
                result[which] = value
        return result

    def objective(self, params: Sequence[Params]) -> objective_lib.Objective:
        """The selection loss as a function of mixing coefficients."""
        batches, key = self._sets["selection"]
        return objective_lib.in_memory(self._loss_fn, params, batches, key)

    def describe(self) -> dict[str, Any]:
        """For mix.json."""
        counts = {which: len(batches) for which, (batches, _) in self._sets.items()}
        return {"path": str(self.path.absolute()), "batches": counts, "meta": self.validation.meta}

    def summary(self) -> str:
        """For the terminal."""
        chosen, held = len(self.validation.selection), len(self.validation.held_out)
        return f"validation {self.path}: {chosen} batches to select on, {held} held out"
