"""From a config to a policy: the model's configuration and its loss."""

import functools

import ml_collections

from policymix.models import pi0
from policymix.structs import LossFn


def model_config(config: ml_collections.ConfigDict, *, why: str) -> pi0.Pi0Config:
    """config.model as a Pi0Config. ValueError if it is empty, with `why` it is needed."""
    fields = config.model.to_dict()
    if not fields:
        raise ValueError(
            f"{why} needs a model, and config.model is empty: pass --config=configs/NAME.py of "
            "the policy that the checkpoints belong to, for example configs/pi05_libero.py"
        )
    known = set(pi0.Pi0Config.__dataclass_fields__)
    if unknown := sorted(set(fields) - known):
        raise ValueError(
            f"config.model has unknown fields {unknown}; Pi0Config has {sorted(known)}"
        )
    return pi0.Pi0Config(**fields)


@functools.cache
def loss_fn(model: pi0.Pi0Config) -> LossFn:
    """(params, batch, key) → (mean flow-matching loss, metrics); one object per model, so that what
    was compiled for it is found again.
    """
    return functools.partial(pi0.loss, model)
