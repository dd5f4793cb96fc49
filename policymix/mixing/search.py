"""Searches over mixing coefficients: an objective in, the best coefficients found and the way there
out.

A search judges its final answer on *all* batches of the objective, never on the batch it happened
to step on.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from policymix.mixing import objective as objective_lib
from policymix.mixing.objective import Coefficients, Objective

Row = Mapping[str, Any]


class SearchResult(NamedTuple):
    """What a search found.

    Attributes:
      coefficients: [n], or {regex: [n]} where the search was over groups.
      loss: mean loss of the mix over all batches of the objective.
      history: one dict per step: step, loss, coefficients, evaluations (loss evaluations of one
        batch so far, a gradient counting as one), seconds (None without a clock), and what else the
        method has to tell. Rows whose `batch` is None judge a candidate on all batches.
    """

    coefficients: Coefficients
    loss: float
    history: list[Row]


class _History:
    """Collects rows; `observe` sees each as it comes, `clock` stamps them."""

    def __init__(self, observe, clock):
        self.rows, self.evaluations = [], 0
        self._observe, self._clock = observe, clock
        self._start = clock() if clock else None

    def add(self, **row):
        seconds = self._clock() - self._start if self._clock else None
        self.rows.append(
            {"step": len(self.rows), **row, "evaluations": self.evaluations, "seconds": seconds}
        )
        if self._observe:
            self._observe(self.rows[-1])


def gradient_descent(
    objective: Objective,
    n: int,
    *,
    learning_rate: float = 0.05,
    num_iterations: int = 50,
    adaptive: bool = False,
    groups: tuple[str, ...] = (),
    observe: Callable[[Row], None] | None = None,
    clock: Callable[[], float] | None = None,
) -> SearchResult:
    """Adam on the logits z of c = softmax(z), one batch per step, as kai0's model arithmetic does.

    ∂L/∂z_k = c_k (g_k - Σ_j c_j g_j) with g = ∂L/∂c; the learning rate falls on a cosine to a
    hundredth. The start, the iterate after each pass over the batches, and the last one are
    evaluated on all batches; the best of them is returned.

    Args:
      n: number of checkpoints.
      adaptive: scale the gradient by (loss / 0.05)^2, so that steps on batches with a large loss
        weigh more.
      groups: path regexes; each gets its own coefficients. () is one set for the whole tree.
      observe: called with each row of the history. clock: seconds, for the history; floor 1 has
        none of its own.

    Raises:
      FloatingPointError: the loss or its gradient is not finite.
    """
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, num_iterations, alpha=0.01))
    logits = jnp.zeros((max(len(groups), 1), n), jnp.float32)  # one row per group

    def coefficients(logits):
        c = jax.nn.softmax(logits, axis=-1)
        return dict(zip(groups, c, strict=True)) if groups else c[0]

    @jax.jit
    def update(logits, opt_state, loss, grad):
        c = jax.nn.softmax(logits, axis=-1)
        grad = c * (grad - jnp.sum(c * grad, axis=-1, keepdims=True))
        if adaptive:
            grad = grad * (loss / 0.05) ** 2
        updates, opt_state = optimizer.update(grad, opt_state)
        return optax.apply_updates(logits, updates), opt_state

    history, opt_state = _History(observe, clock), optimizer.init(logits)
    candidates = [logits]
    for iteration in range(num_iterations):
        batch = iteration % objective.num_batches
        c = coefficients(logits)
        loss, grad = objective.value_and_grad(c, batch)
        grad = jnp.stack([grad[g] for g in groups] if groups else [grad])
        history.evaluations += 1
        _check_finite(loss, grad, f"at iteration {iteration}, batch {batch}")
        history.add(loss=float(loss), batch=batch, coefficients=_as_numpy(c))
        logits, opt_state = update(logits, opt_state, loss, grad)
        if (iteration + 1) % objective.num_batches == 0 or iteration + 1 == num_iterations:
            candidates.append(logits)
    losses = []
    for z in candidates:
        losses.append(_full_loss(objective, coefficients(z), history))
        history.add(loss=losses[-1], batch=None, coefficients=_as_numpy(coefficients(z)))
    best = int(np.argmin(losses))
    return SearchResult(_as_numpy(coefficients(candidates[best])), losses[best], history.rows)


def greedy(
    objective: Objective,
    n: int,
    *,
    losses: np.ndarray | None = None,
    observe: Callable[[Row], None] | None = None,
    clock: Callable[[], float] | None = None,
) -> SearchResult:
    """Forward selection of an equal-weight mix: start at the best single, add whichever lowers the
    loss most, stop.

    Never worse than the best single checkpoint on the objective's batches (Wortsman et al. 2022,
    arXiv:2203.05482).

    Args:
      losses: [n] losses of the single checkpoints over all batches, where they are known already.
    """
    history = _History(observe, clock)
    if losses is None:
        losses = [_full_loss(objective, objective_lib.corner(n, [k]), history) for k in range(n)]
    chosen, loss = [int(np.argmin(losses))], float(np.min(losses))
    history.add(loss=loss, chosen=list(chosen), coefficients=objective_lib.corner(n, chosen))
    while len(chosen) < n:
        rest = [k for k in range(n) if k not in chosen]
        trials = [
            _full_loss(objective, objective_lib.corner(n, [*chosen, k]), history) for k in rest
        ]
        best = int(np.argmin(trials))
        if trials[best] >= loss:
            break
        chosen, loss = [*chosen, rest[best]], trials[best]
        history.add(loss=loss, chosen=list(chosen), coefficients=objective_lib.corner(n, chosen))
    return SearchResult(objective_lib.corner(n, chosen), loss, history.rows)


def _full_loss(objective: Objective, c: Coefficients, history: _History) -> float:
    loss = objective.value(c)
    history.evaluations += objective.num_batches
    _check_finite(loss, 0.0, f"for coefficients {_as_numpy(c)}")
    return float(loss)


def _check_finite(loss, grad, where: str) -> None:
    if not (np.isfinite(loss) and np.all(np.isfinite(grad))):
        raise FloatingPointError(
            f"the validation loss or its gradient is not finite {where} (loss {float(loss)}): "
            "look for NaN in the batches, or compute in float32 (config.model.dtype)"
        )


def _as_numpy(c: Coefficients) -> Coefficients:
    """Coefficients as numpy, groups in their order."""
    return {g: np.asarray(v) for g, v in c.items()} if isinstance(c, Mapping) else np.asarray(c)
