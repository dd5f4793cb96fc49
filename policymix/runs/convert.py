"""One checkpoint in another format: Orbax, or safetensors as OpenPI and LeRobot name them.

Every array keeps its bits unless another dtype is asked for; low-rank updates can be merged on the
way. The output appears whole or not at all.
"""

import collections
import dataclasses
import importlib.metadata
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np

from policymix import files, hub, memory, metrics
from policymix.checkpoints import assets, copies, jobs, keymaps, outputs, provenance, store
from policymix.models import pi0, recognize
from policymix.runs import policies
from policymix.runs.beside import Beside
from policymix.transforms.normalize import Stats

RECORD = "convert.json"
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Attributes:
      format: one of `store.FORMATS`. dtype: of floating-point arrays; "" keeps theirs.
    """

    checkpoint: str
    output: pathlib.Path
    format: str
    merge_lora: bool = False
    dtype: str = ""
    overwrite: bool = False
    dry_run: bool = False


def convert(config: ml_collections.ConfigDict, request: Request) -> dict[str, Any]:
    """Writes a checkpoint in another format and returns what its convert.json says.

    Raises:
      ValueError, OSError: bad input; one clear message, and no output.
    """
    _check_request(request)
    model = policies.optional_model(config)
    opened, tree = _open(request, model)
    output = outputs.choose([opened], 0, request.format)
    leaves = output.select(opened, policies.siglip_heads(model))
    dtypes = {path: _dtype(leaf.dtype, request.dtype) for path, leaf in leaves.items()}
    stats, others = _norm_stats(request, config.data.asset_id)
    kinds = {str(dtype) for dtype in dtypes.values()}
    beside = Beside(output, model, config.data, None if stats is None else stats[1], kinds)
    beside.check()
    if output.format == "lerobot" and (lacking := beside.note()):
        raise ValueError(f"--format=lerobot: {lacking}")
    told = {
        "policymix": importlib.metadata.version("policymix"),
        "checkpoint": _absolute(opened.name),
        "fingerprint": provenance.fingerprint(opened.name),
        "format": output.format,
        "holds": recognize.describe(tree),
        "lora_merged": opened.lora,
        "dtypes": dict(collections.Counter(map(str, dtypes.values()))),
    }
    print(f"{opened.name}: {opened.format}, {told['holds']}, {len(leaves)} arrays")
    merged = f", {opened.lora} low-rank updates merged" if opened.lora else ""
    print(f"  → {request.output}: {output.format}, {told['dtypes']}{merged}")
    named = ", ".join([*others, stats[0]] if stats else others) or "none"
    print(f"  norm stats: {named}")
    if note := beside.note():
        print(f"  {note}")
    if request.dry_run:
        print("dry run: nothing was written")
        return told
    memory.keep_freed()
    files.check_space(request.output, sum(x.size * dtypes[p].itemsize for p, x in leaves.items()))
    with files.whole_directory(request.output, overwrite=request.overwrite) as partial:
        shapes = {path: (leaf.shape, dtypes[path]) for path, leaf in leaves.items()}
        with output.sink(partial, shapes) as sink:
            total = sum(leaf.size for leaf in leaves.values())
            with metrics.Progress("converting", total, lines=5) as shown:
                told["not_finite"] = copies.copy(leaves, sink, dtypes, progress=shown.step)
            output.finish(partial, sink, list(shapes), stats)
        beside.write(partial)
        for asset_id, one in others.items():
            assets.write_norm_stats(output.assets(partial) / asset_id / assets.NORM_STATS, one)
        if trainings := assets.trainings_of(request.checkpoint):
            folder = output.assets(partial) / (stats[0] if stats else "mixed")
            assets.write_episodes(folder / assets.EPISODES, trainings)
        if provenance.fingerprint(opened.name) != told["fingerprint"]:
            raise ValueError(f"{opened.name} changed while it was read: convert it again")
        files.write_json(partial / RECORD, told)
    if bad := told["not_finite"]:
        print(f"WARNING: {len(bad)} arrays hold NaN or infinity, such as {bad[0]}")
    print(f"written to {request.output}")
    return told


def _check_request(request: Request) -> None:
    if not request.format:
        raise ValueError(f"--format is missing: one of {', '.join(store.FORMATS)}")
    if request.dtype not in ("", *DTYPES):
        raise ValueError(f"--dtype is {request.dtype!r}; expected one of {', '.join(DTYPES)}")
    if not hub.is_remote(request.checkpoint):
        files.check_apart(request.output, [request.checkpoint])
    files.check_output(request.output, overwrite=request.overwrite, ours=_is_ours)


def _is_ours(path: pathlib.Path) -> bool:
    return path.is_dir() and ((path / RECORD).is_file() or not any(path.iterdir()))


def _absolute(name: str) -> str:
    return name if hub.is_remote(name) else str(files.local(name))


def _open(request: Request, model: pi0.Pi0Config | None) -> tuple[store.Checkpoint, Any]:
    """The checkpoint, and the leaves of our tree by path.

    ValueError where they are not the model's, or cannot become what is asked.
    """
    opened = store.open_checkpoint(
        request.checkpoint, merge_lora=request.merge_lora, lora_scale=_lora_scale(model)
    )
    name, tree = opened.name, opened.tree(policies.siglip_heads(model))
    foreign = opened.place.kind == "pt"
    alone = "action_in_proj/kernel" not in tree
    if request.format != "orbax" and (foreign or alone):
        kind = "an open-pi-zero, which other programs compute otherwise" if foreign else "no π0"
        raise ValueError(f"{name} is {kind}: it can be converted to --format=orbax alone")
    if request.format != "orbax" and any("lora" in path for path in tree):
        raise ValueError(
            f"{name} has low-rank updates, which --format={request.format} has no names for: pass "
            "--merge_lora to add them to their weights"
        )
    if model is not None and not alone:
        wanted = model.without_lora() if request.merge_lora else model
        recognize.check(pi0.shapes(wanted), tree, name)
    if foreign or opened.format == "safetensors":  # names that nothing is written by
        opened = dataclasses.replace(opened, format="orbax", leaves=tree, files=None)
    return opened, tree


def _norm_stats(
    request: Request, asset_id: str
) -> tuple[tuple[str, Stats] | None, dict[str, Stats]]:
    """The statistics, by their asset id, and those of other robots that the checkpoint has, which
    an Orbax output keeps all. ValueError where one of several must be chosen.
    """
    found = assets.find(request.checkpoint, assets.NORM_STATS)
    if asset_id or request.format != "orbax" or len(found) < 2:
        return assets.norm_stats_of(request.checkpoint, asset_id or None), {}
    return None, {name: assets.read_norm_stats(path) for name, path in found.items()}


def _lora_scale(model: pi0.Pi0Config | None) -> Callable[[str], float]:
    """alpha / rank of an attention weight's update, by its path: 1 where no config says."""
    if model is None:
        return lambda path: 1.0
    sizes = model.paligemma_variant, model.action_expert_variant

    def scale(path: str) -> float:
        expert = re.fullmatch(keymaps.GROUPS["action_expert"], path) is not None
        lora = sizes[expert].lora
        return 1.0 if lora is None else lora.scale

    return scale


def _dtype(stored: np.dtype, wanted: str) -> np.dtype:
    return np.dtype(jnp.dtype(wanted)) if wanted and jobs.is_floating(stored) else stored
