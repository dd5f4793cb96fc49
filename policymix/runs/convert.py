"""One checkpoint in another format: Orbax, or safetensors as OpenPI and LeRobot name them.

Every array keeps its bits unless another dtype is asked for; low-rank updates can be merged on the
way. The output appears whole or not at all.
"""

import collections
import dataclasses
import importlib.metadata
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_collections
import numpy as np

from policymix import files, hub, memory, metrics
from policymix.checkpoints import assets, copies, jobs, outputs, provenance, store
from policymix.checkpoints.leaves import Leaf
from policymix.models import pi0, recognize
from policymix.runs import metadata, policies
from policymix.runs.policy_files import PolicyFiles
from policymix.transforms.normalize import Stats

RECORD = "convert.json"
DTYPES = ("float32", "bfloat16", "float16")
_OPEN_PI_ZERO = "open_pi_zero"


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
    config = metadata.complete(config, checkpoints=(request.checkpoint,))
    plan = _plan(config, request)
    print("\n".join(plan.lines()))
    if request.dry_run:
        print("dry run: nothing was written")
        return plan.told
    memory.keep_freed()
    nbytes = sum(leaf.size * plan.dtypes[path].itemsize for path, leaf in plan.leaves.items())
    files.check_space(request.output, nbytes)
    with files.whole_directory(request.output, overwrite=request.overwrite) as partial:
        plan.told["not_finite"] = bad = plan.write(partial)
        if provenance.fingerprint(request.checkpoint) != plan.told["fingerprint"]:
            raise ValueError(f"{request.checkpoint} changed while it was read: convert it again")
        files.write_json(partial / RECORD, plan.told)
    if bad:
        print(f"WARNING: {len(bad)} arrays hold NaN or infinity, such as {bad[0]}")
    print(f"written to {request.output}")
    return plan.told


class _Plan(NamedTuple):
    """What is copied to where.

    Attributes:
      leaves: by path or tensor name, as the output has them; dtypes: of the output.
      stats: (asset id, normalisation) of the output; others: further robots' that it keeps.
      beside: what stands beside PyTorch tensors. told: what convert.json is to say.
    """

    request: Request
    output: outputs.Output
    leaves: Mapping[str, Leaf]
    dtypes: Mapping[str, np.dtype]
    stats: tuple[str, Stats] | None
    others: Mapping[str, Stats]
    beside: PolicyFiles
    told: dict[str, Any]

    def lines(self) -> list[str]:
        """For the terminal."""
        told, request = self.told, self.request
        lora = told["lora_merged"]
        merged = f", {lora} low-rank updates merged" if lora else ""
        named = ", ".join([*self.others, self.stats[0]] if self.stats else self.others) or "none"
        return [
            f"{request.checkpoint}: {told['from']}, {told['holds']}, {len(self.leaves)} arrays",
            f"  → {request.output}: {told['format']}, {told['dtypes']}{merged}",
            f"  norm stats: {named}",
            *(f"  {note}" for note in [self.beside.note()] if note),
        ]

    def write(self, directory: pathlib.Path) -> list[str]:
        """Into a directory in the making; the arrays that hold NaN or infinity."""
        shapes = {path: (leaf.shape, self.dtypes[path]) for path, leaf in self.leaves.items()}
        with self.output.sink(directory, shapes) as sink:
            total = sum(leaf.size for leaf in self.leaves.values())
            with metrics.Progress("converting", total, lines=5) as shown:
                bad = copies.copy(self.leaves, sink, self.dtypes, progress=shown.step)
            self.output.finish(directory, sink, list(shapes), self.stats)
        self.beside.write(directory)
        folder = self.output.assets(directory)
        for asset_id, stats in self.others.items():
            assets.write_norm_stats(folder / asset_id / assets.NORM_STATS, stats)
        if trainings := assets.trainings_of(self.request.checkpoint):
            beside = self.stats[0] if self.stats else "robot"
            assets.write_episodes(folder / beside / assets.EPISODES, trainings)
        return bad


def _check_request(request: Request) -> None:
    if not request.format:
        raise ValueError(f"--format is missing: one of {', '.join(store.FORMATS)}")
    if request.dtype not in ("", *DTYPES):
        raise ValueError(f"--dtype is {request.dtype!r}; expected one of {', '.join(DTYPES)}")
    if not hub.is_remote(request.checkpoint):
        files.check_apart(request.output, [request.checkpoint])
    files.check_output(request.output, overwrite=request.overwrite, ours=_is_ours)


def _is_ours(path: pathlib.Path) -> bool:
    if not path.is_dir():
        return False
    converted = (path / RECORD).is_file() and not (path / "mix.json").exists()
    return converted or not any(path.iterdir())


def _plan(config: ml_collections.ConfigDict, request: Request) -> _Plan:
    """Everything that headers tell. ValueError where the checkpoint is not the model's, or cannot
    become what is asked.
    """
    model, name = policies.optional_model(config), request.checkpoint
    opened = policies.open_checkpoint(name, model, merge_lora=request.merge_lora)
    heads = model.siglip_heads if model else None
    tree = opened.tree(heads)
    variant = _check_variant(opened, model, request)
    whole = "action_in_proj/kernel" in tree
    if request.format != "orbax" and not whole:
        raise ValueError(f"{name} is no π0: it can be converted to --format=orbax alone")
    if request.format != "orbax" and any("lora" in path for path in tree):
        raise ValueError(
            f"{name} has low-rank updates, which --format={request.format} has no names for: pass "
            "--merge_lora to add them to their weights"
        )
    if model is not None and whole:
        wanted = model.without_lora() if request.merge_lora else model
        recognize.check(pi0.shapes(wanted), tree, name)
    source = opened.format if opened.place.kind != "pt" else "pt"
    if source in ("pt", "safetensors"):  # names that nothing is written by
        opened = dataclasses.replace(opened, format="orbax", leaves=tree, files=None)
    output = outputs.choose([opened], 0, request.format)
    leaves = output.select(opened, heads)
    dtypes = {path: _dtype(leaf.dtype, request.dtype) for path, leaf in leaves.items()}
    stats, others = _norm_stats(request, config.data.asset_id)
    kinds = {str(dtype) for dtype in dtypes.values()}
    beside = PolicyFiles(output, model, config.data, None if stats is None else stats[1], kinds)
    beside.check()
    if output.format == "lerobot" and model is None and beside.needed:
        raise ValueError(f"--format=lerobot: {beside.note()}")
    told = {
        "policymix": importlib.metadata.version("policymix"),
        "checkpoint": name if hub.is_remote(name) else str(files.local(name)),
        "fingerprint": provenance.fingerprint(name),
        "from": source,
        "format": output.format,
        "holds": recognize.describe(tree),
        "variant": variant,
        "lora_merged": opened.lora,
        "dtypes": dict(collections.Counter(map(str, dtypes.values()))),
    }
    return _Plan(request, output, leaves, dtypes, stats, others, beside, told)


def _check_variant(opened: store.Checkpoint, model: pi0.Pi0Config | None, request: Request) -> str:
    """Whose conventions a checkpoint has, which no array tells: its file's kind does, or the record
    of an earlier conversion.
    """
    place, foreign = opened.place, opened.place.kind == "pt"
    for record in (place.directory / RECORD, place.directory.parent / RECORD):
        if record.is_file():
            foreign |= files.read_json(record).get("variant") == _OPEN_PI_ZERO
    if foreign and request.format != "orbax":
        raise ValueError(
            f"{opened.name} is an open-pi-zero, which other programs compute otherwise: it can be "
            "converted to --format=orbax alone"
        )
    if foreign and model is not None and not model.open_pi_zero:
        raise ValueError(
            f"{opened.name} is an open-pi-zero, config.model.variant is {model.variant!r}: pass "
            "--config=configs/pi0_bridge.py or pi0_fractal.py"
        )
    return _OPEN_PI_ZERO if foreign or (model and model.open_pi_zero) else "openpi"


def _norm_stats(
    request: Request, asset_id: str
) -> tuple[tuple[str, Stats] | None, dict[str, Stats]]:
    """The statistics, by their asset id, and those of other robots that the checkpoint has, which
    an Orbax output keeps all. ValueError where one of several must be chosen.
    """
    found = assets.find(request.checkpoint, assets.NORM_STATS)
    if not asset_id and request.format == "orbax" and len(found) > 1:
        return None, {name: assets.read_norm_stats(path) for name, path in found.items()}
    stats = assets.norm_stats_of(request.checkpoint, asset_id or None)
    if stats is None or any(found):
        return stats, {}
    return (asset_id or "robot", stats[1]), {}  # what has no name yet


def _dtype(stored: np.dtype, wanted: str) -> np.dtype:
    return np.dtype(jnp.dtype(wanted)) if wanted and jobs.is_floating(stored) else stored
