"""The checkpoints of a run: `WORKDIR/<step>/{params,train_state,assets}`, written and resumed by
Orbax.

As in OpenPI, `params` holds the moving average where there is one, and `train_state/params` then
the raw parameters.
"""

import asyncio
import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from policymix import distributed, trees
from policymix.checkpoints import assets, items, layout
from policymix.structs import Params
from policymix.transforms.normalize import Stats

_CHUNK_BYTES = 64 * 2**20


class State(Protocol):
    """What a run resumes from: parameters that act, and the rest."""

    step: Any

    @property
    def policy_params(self) -> Params: ...

    def rest(self) -> dict[str, Any]: ...

    def joined(self, policy_params: Params, rest: Mapping[str, Any]) -> "State": ...


_State = TypeVar("_State", bound=State)


@dataclasses.dataclass(frozen=True)
class Assets:
    """What lies beside the parameters of every step."""

    norm_stats: dict[str, Stats]  # by asset id
    trainings: list[dict[str, Any]]  # as `assets.trainings_of` gives them; its own dataset first


class _AssetsHandler(ocp.AsyncCheckpointHandler):
    """Writes norm_stats.json and episodes.json into the step's `assets`, in the first process."""

    async def async_save(self, directory, args: "_SaveAssets"):
        # The step's directory is itself made in the background; this future waits for it.
        coroutine = asyncio.to_thread(self.save, directory, args)
        return [ocp.future.CommitFutureAwaitingContractedSignals(coroutine, name="assets")]

    def save(self, directory, args: "_SaveAssets"):
        if not distributed.is_first():
            return
        for asset_id, stats in args.value.norm_stats.items():
            assets.write_norm_stats(pathlib.Path(directory) / asset_id / assets.NORM_STATS, stats)
        first = next(iter(args.value.norm_stats))
        path = pathlib.Path(directory) / first / assets.EPISODES
        assets.write_episodes(path, args.value.trainings)

    def restore(self, directory, args: "_RestoreAssets | None" = None):
        raise ValueError(f"{directory}: read assets with checkpoints.assets, not through Orbax")


@ocp.args.register_with_handler(_AssetsHandler, for_save=True)
@dataclasses.dataclass
class _SaveAssets(ocp.args.CheckpointArgs):
    value: Assets


@ocp.args.register_with_handler(_AssetsHandler, for_restore=True)
@dataclasses.dataclass
class _RestoreAssets(ocp.args.CheckpointArgs):
    """Orbax wants both registered before it accepts either."""


def latest_step(workdir: pathlib.Path) -> int | None:
    """The last whole step of a run, None if there is none. ValueError if it cannot be resumed."""
    steps = layout.steps_of(workdir)
    if steps and not (workdir / steps[-1] / "train_state").is_dir():
        raise ValueError(
            f"{workdir / steps[-1]} has no train_state, so it cannot be resumed: start from it "
            "(init_from) in another --workdir, or pass --overwrite to begin again"
        )
    return int(steps[-1]) if steps else None


class Series:
    """Saves and restores train states of one run. Steps appear whole or not at all.

    Args:
      max_to_keep: how many of the latest steps stay; keep_period: multiples of it stay for good.
    """

    def __init__(self, workdir: pathlib.Path, *, max_to_keep: int, keep_period: int | None):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep,
            keep_period=keep_period,
            create=True,
            cleanup_tmp_directories=True,
        )
        handlers = {
            "params": ocp.PyTreeCheckpointHandler(),
            "train_state": ocp.PyTreeCheckpointHandler(),
            "assets": _AssetsHandler(),
        }
        self._manager = ocp.CheckpointManager(workdir, options=options, item_handlers=handlers)

    @property
    def latest(self) -> int | None:
        """The last whole step, None if there is none."""
        return self._manager.latest_step()

    def save(self, state: State, beside: Assets) -> None:
        """Starts writing `state` under its step; training goes on meanwhile."""
        try:
            self._save(state, beside)
        except ValueError as error:
            raise items.unwritten(pathlib.Path(self._manager.directory), error) from error

    def _save(self, state: State, beside: Assets) -> None:
        saved = self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                params=save_args(state.policy_params),
                train_state=ocp.args.PyTreeSave(state.rest()),
                assets=_SaveAssets(beside),
            ),
        )
        if not saved:
            raise OSError(
                f"{self._manager.directory}: step {int(state.step)} exists and was not saved"
            )

    def restore(self, like: _State, shardings: _State) -> _State:
        """The latest state. `like` gives structure, shapes and dtypes (`jax.eval_shape`),
        `shardings` the places.

        Raises:
          ValueError: the checkpoint belongs to another model or optimizer, or is damaged.
        """
        like = jax.tree.map(_at, like, shardings)
        try:
            restored = self._manager.restore(
                self.latest,
                args=ocp.args.Composite(
                    params=_restore_args(to_item(like.policy_params)),
                    train_state=_restore_args(like.rest()),
                ),
            )
            return like.joined(from_item(restored.params), restored.train_state)
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise ValueError(
                f"{self._manager.directory}: step {self.latest} cannot be resumed "
                f"({str(error).splitlines()[0]}); it was saved by another model or optimizer, or "
                "is damaged: pass --overwrite to start again"
            ) from error

    def wait(self) -> None:
        """Blocks until everything saved is on disk; the writer's errors surface here."""
        try:
            self._manager.wait_until_finished()
        except ValueError as error:
            raise items.unwritten(pathlib.Path(self._manager.directory), error) from error

    def close(self) -> None:
        """Waits and lets go."""
        try:
            self.wait()
        finally:
            self._manager.close()


def _at(shape: jax.ShapeDtypeStruct, place: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)


def _restore_args(like: Any) -> ocp.args.PyTreeRestore:
    """To the places in `like`; what has none, for it is not kept as it is saved, to the host."""

    def args(leaf):
        if leaf.sharding is None:
            return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
        return ocp.ArrayRestoreArgs(
            sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype
        )

    return ocp.args.PyTreeRestore(like, restore_args=jax.tree.map(args, like))


def to_item(tree: Mapping[str, Any]) -> dict[str, Any]:
    """OpenPI's params item: {"params": tree}, every path with a trailing `value`."""
    return {"params": jax.tree.map(lambda leaf: {"value": leaf}, dict(tree))}


def from_item(item: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `to_item`."""
    flat = trees.flatten(item["params"])
    return trees.unflatten({path.removesuffix("/value"): leaf for path, leaf in flat.items()})


def save_args(params: Params) -> ocp.args.PyTreeSave:
    """How Orbax is to save a params item: in chunks that a reader can hold."""
    item = to_item(params)
    chunked = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), item)
    return ocp.args.PyTreeSave(item, save_args=chunked)
