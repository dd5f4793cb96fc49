"""The steps of a training run: state in, state out, and on the way checkpoints, metrics, losses on
held-out episodes and roll-outs.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import ml_collections
import numpy as np

from policymix import distributed, metrics, sharding
from policymix.checkpoints import series
from policymix.data import loader
from policymix.reports import trainings
from policymix.runs import held_out as held_out_lib
from policymix.runs import pipeline as pipeline_lib
from policymix.runs import policies, rollouts
from policymix.structs import Batch
from policymix.training.state import TrainState

REPORT = "report.html"
_NAMED = 12  # episodes that an error names at most


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run has at hand.

    Attributes:
      step_fn: (state, batch, key, learning rate) → (state, metrics), compiled.
      rates: float32 [num_steps], the learning rate of each.
      saved: the checkpoints; beside: what lies beside the parameters of each.
      held_out: None where nothing is evaluated.
    """

    config: ml_collections.ConfigDict
    workdir: pathlib.Path
    pipeline: pipeline_lib.Pipeline
    mesh: jax.sharding.Mesh
    step_fn: Callable[..., tuple[TrainState, dict[str, Any]]]
    rates: np.ndarray
    saved: series.Series
    beside: series.Assets
    held_out: held_out_lib.HeldOut | None


def go(run: Run, state: TrainState) -> TrainState:
    """Steps from state.step to config.train.num_steps, or until SIGTERM; saves where it stops.

    Raises:
      FloatingPointError: the loss or the gradient is not finite; nothing is saved after.
    """
    t, first = run.config.train, int(state.step)
    if first >= t.num_steps:
        print(f"step {first} is reached already; config.train.num_steps is {t.num_steps}")
        return state
    writer = metrics.Writer(
        run.workdir,
        resume_step=first,
        num_steps=t.num_steps,
        tensorboard=t.tensorboard,
        wandb=t.wandb,
        run_name=run.workdir.name,
        config=run.config.to_dict(),
        active=distributed.is_first(),
    )
    page = _Page(run.workdir)
    with distributed.Stop(first) as stop, writer:
        try:
            state = _steps(run, state, first, stop, writer, page)
            run.saved.wait()
        finally:
            page.close()
    end = int(state.step)
    if end < t.num_steps:
        print(
            f"stopped after step {end} of {t.num_steps}, which is saved; the same command goes on"
        )
    print(f"step {end} written to {run.workdir / str(end)}")
    return state


def _steps(run: Run, state: TrainState, first: int, stop, writer, page) -> TrainState:
    """Metrics are read one step late, so that the device never waits for the host."""
    t = run.config.train
    root_key = jax.random.fold_in(jax.random.key(t.seed), 1)  # apart from the key of init
    meter = metrics.Meter(first, time.monotonic(), batch_size=t.batch_size, num_steps=t.num_steps)
    pending = None
    with metrics.Progress("training", t.num_steps - first, lines=0) as shown:
        for step, batch in _batches(run, first, meter):
            state, values = run.step_fn(state, batch, root_key, run.rates[step])
            if pending:
                _tell(run, writer, meter, *pending)
            end, pending = step + 1, (step + 1, values)
            stopping = stop.requested(end)
            last = end == t.num_steps or stopping
            judged = bool(run.held_out) and not stopping and _due(end, t.eval_every, last)
            played = not stopping and _due(end, t.rollout_every, last)
            saved = played or _due(end, t.save_every, last)  # see saved_steps
            if saved or judged:
                _tell(run, writer, meter, *pending)  # a diverged state is not worth keeping
                pending = None
                with _timing(meter.paused):
                    if saved:
                        run.saved.save(state, run.beside)
                    if judged:
                        writer.write(end, run.held_out(state.acting_params))
                    if played:
                        writer.write(end, _roll_out(run, state))
                page.draw()
            shown.step()
            if stopping:
                break
    return state


@contextlib.contextmanager
def _timing(add: Callable[[float], None]) -> Iterator[None]:
    """Adds the seconds that its block takes."""
    begun = time.monotonic()
    yield
    add(time.monotonic() - begun)


def saved_steps(t: ml_collections.ConfigDict, first: int) -> list[int]:
    """The steps after `first` that config.train saves: also those before roll-outs, which take
    long, and a run may be killed meanwhile.
    """
    return [
        step
        for step in range(first + 1, t.num_steps + 1)
        if any(_due(step, n, step == t.num_steps) for n in (t.save_every, t.rollout_every))
    ]


def _due(step: int, every: int, last: bool = False) -> bool:
    """Whether what is done every so many steps (0: never), and at the last, is done after this."""
    return every > 0 and (last or step % every == 0)


def _batches(run: Run, first: int, meter: metrics.Meter) -> Iterator[tuple[int, Batch]]:
    """Step and batch, on its way to the devices before it is asked for."""
    t = run.config.train
    place = functools.partial(sharding.put, place=sharding.batch(run.mesh))
    shard = (jax.process_index(), jax.process_count())
    made = loader.placed(run.pipeline.batches(first, t.num_steps, t.batch_size, shard), place)
    for step in range(first, t.num_steps):
        with _timing(meter.waited):
            batch = next(made)
        yield step, batch


def _tell(run: Run, writer, meter: metrics.Meter, step: int, values) -> None:
    """Checks the metrics of a step, and writes them where that is due."""
    values = {name: float(value) for name, value in jax.device_get(values).items()}
    _check_finite(run, step, values)
    if _due(step, run.config.train.log_every, step == run.config.train.num_steps):
        used = metrics.memory_used(device.memory_stats() for device in run.mesh.local_devices)
        writer.write(step, values | meter.tell(step, time.monotonic()) | used)


def _check_finite(run: Run, step: int, values: dict[str, float]) -> None:
    names = ("loss", "grad_norm", "param_norm")  # the last is of the state that would be saved
    wrong = [name for name in names if not math.isfinite(values[name])]
    if not wrong:
        return
    # What a step starts from is of the batch before; batch number k is that of step k + 1.
    numbers = range(max(step - 2, 0), step)
    found: dict[str, set[int]] = {}
    for number in numbers:
        drawn = run.pipeline.episodes(number, run.config.train.batch_size)
        for path, episodes in drawn.items():
            found.setdefault(path, set()).update(episodes)
    named = "; ".join(f"{path}: {_few(sorted(episodes))}" for path, episodes in found.items())
    latest = run.saved.latest
    kept = "nothing was saved before" if latest is None else f"step {latest} was the last saved"
    raise FloatingPointError(
        f"{' and '.join(wrong)} not finite at step {step}. Steps {numbers[0] + 1} to {step} are "
        f"suspect, and of these the episodes {named}. Lower config.train.learning_rate, or look "
        f"for outliers in those episodes; {kept}"
    )


def _few(episodes: list[int]) -> str:
    more = f" and {len(episodes) - _NAMED} more" if len(episodes) > _NAMED else ""
    return ", ".join(map(str, episodes[:_NAMED])) + more


def _roll_out(run: Run, state: TrainState) -> dict[str, float]:
    """Success in the simulator of config.evaluate, played by the first process."""
    params = state.acting_params
    if jax.process_count() > 1:  # the others only help to bring the parameters together
        params = jax.tree.map(lambda leaf: _together(run.mesh)(leaf).addressable_data(0), params)
    told = {}
    if distributed.is_first():
        policy = policies.Live(str(run.workdir), params, run.pipeline.encoder)
        told = rollouts.play(policy, run.config)
    distributed.sync("roll-outs")
    return told


@functools.cache
def _together(mesh: jax.sharding.Mesh):
    """An array → a copy of it on every device."""
    return jax.jit(lambda leaf: leaf, out_shardings=sharding.replicated(mesh))


class _Page:
    """report.html, drawn beside the training by the first process. It decides nothing: one that
    cannot be written is a warning.
    """

    def __init__(self, workdir: pathlib.Path):
        self._workdir, self._thread = workdir, None

    def draw(self) -> None:
        """As the run is now, unless the last drawing goes on still."""
        if not distributed.is_first() or (self._thread and self._thread.is_alive()):
            return
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def close(self) -> None:
        """Once more, as the run has ended."""
        if self._thread:
            self._thread.join()
            self._write()

    def _write(self) -> None:
        try:
            trainings.write_page(self._workdir, self._workdir / REPORT)
        except (OSError, ValueError) as error:
            print(f"WARNING: {self._workdir / REPORT} was not drawn: {error}")
