"""Where the first parameters of a run come from: a checkpoint, leaf by leaf, or chance."""

import functools
from typing import Any

import jax
import ml_collections
import numpy as np

from policymix import nf4, sharding, trees
from policymix.checkpoints import keymaps, store
from policymix.models import lora, pi0, recognize
from policymix.runs import policies, train_settings
from policymix.structs import Params, PyTree


def fill(config: ml_collections.ConfigDict, model: pi0.Pi0Config) -> trees.Filled | None:
    """The headers of config.train.init_from in the model's tree; says what comes from where.

    ValueError where it is no checkpoint of this model. None: all of it is newly initialised.
    """
    shapes = pi0.shapes(model)
    if not config.train.init_from:
        print(f"all {len(jax.tree.leaves(shapes))} arrays are newly initialised")
        return None
    header = store.open_params(config.train.init_from, model.siglip_heads)
    may_miss = [*config.train.init_missing, lora.PARAMETERS]
    if "action_in_proj" not in header:  # a PaliGemma, whose vocabulary may be padded
        may_miss += keymaps.NOT_PALIGEMMA
        header = policies.cut_vocabulary(header, model.vocab_size)
    try:
        filled = trees.fill(shapes, header, may_miss=tuple(may_miss))
    except ValueError as error:
        kind = recognize.describe(header)
        raise ValueError(f"{config.train.init_from} holds {kind}; {error}") from error
    print(
        f"from {config.train.init_from}: {len(filled.loaded)} arrays loaded, {len(filled.fresh)} "
        f"newly initialised{_some(filled.fresh)}, {len(filled.ignored)} "
        f"ignored{_some(filled.ignored)}"
    )
    return filled


def place(
    filled: trees.Filled | None,
    model: pi0.Pi0Config,
    update: train_settings.Update,
    places: PyTree,
    key: jax.Array,
) -> Params:
    """The parameters on their devices, as training keeps them. Loaded ones are read, placed and
    made smaller one by one; of the others nothing that is not used is computed.
    """
    keep = functools.partial(train_settings.kept, update)
    flat_places = trees.flatten(places)
    wanted = set(flat_places) if filled is None else set(filled.fresh)

    def init(key):
        flat = trees.flatten(pi0.init(model, key))
        return {path: keep(path, leaf) for path, leaf in flat.items() if path in wanted}

    fresh_places = {path: place for path, place in flat_places.items() if path in wanted}
    fresh = jax.jit(init, out_shardings=fresh_places)(key) if wanted else {}
    if filled is None:
        return trees.unflatten(fresh)

    def put(path, leaf, place):
        if path in fresh:
            return fresh[path]
        return _put(leaf.read().astype(np.float32), functools.partial(keep, path), place)

    return trees.map_with_path(put, filled.tree, places)


def _put(array: np.ndarray, keep: Any, place: Any) -> Any:
    """A host array, which every process has whole, on its devices as it is kept."""
    small = jax.eval_shape(keep, array)
    narrow = isinstance(small, nf4.Nf4)
    return sharding.put_whole(nf4.by_layers(array) if narrow else array.astype(small.dtype), place)


def _some(paths: list[str]) -> str:
    if not paths:
        return ""
    return f" ({', '.join(paths[:3])}{', …' if len(paths) > 3 else ''})"
