"""Searches over mixing coefficients: an objective in, the best coefficients found and the way there
out.

A search judges its final answer on *all* batches of the objective, never on the batch it happened
to step on, and returns the best of what it judged so. `gradient_descent` and `greedy` are what kai0
and model soups do; `bfgs` and `gauss_newton` come further in a few evaluations of all batches.
n checkpoints, G groups.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from policymix.mixing import objective as objective_lib
from policymix.mixing import simplex
from policymix.mixing.objective import Coefficients, Objective

Row = Mapping[str, Any]


class SearchResult(NamedTuple):
    """What a search found.

    Attributes:
      coefficients: [n], or {regex: [n]} where the search was over groups.
      loss: mean loss of the mix over all batches of the objective.
      history: one dict per step: step, loss, coefficients, evaluations (loss evaluations of one
        batch so far; a gradient counts as one, and so does each direction of a Gauss-Newton pass,
        which is two forward passes where a gradient is three or four), full_evaluations (those over
        the number of batches), seconds (None without a clock), and what else the method has to
        tell. Rows whose `batch` is None judge a candidate on all batches.
    """

    coefficients: Coefficients
    loss: float
    history: list[Row]


class _History:
    """Collects rows and knows the best; `observe` sees each as it comes, `clock` stamps them."""

    def __init__(self, objective: Objective, observe, clock):
        self.rows, self.evaluations = [], 0
        self._objective, self._observe, self._clock = objective, observe, clock
        self._best = (np.inf, None)
        self._start = clock() if clock else None

    def add(self, **row):
        seconds = self._clock() - self._start if self._clock else None
        count = {
            "evaluations": self.evaluations,
            "full_evaluations": self.evaluations / self._objective.num_batches,
        }
        self.rows.append({"step": len(self.rows), **row, **count, "seconds": seconds})
        if self._observe:
            self._observe(self.rows[-1])

    def count(self, passes: int = 1):
        """Evaluations of all batches."""
        self.evaluations += passes * self._objective.num_batches

    def judge(self, loss: float, c: Coefficients, **row):
        """A row for a candidate whose loss on all batches is known."""
        if loss < self._best[0]:
            self._best = (loss, _as_numpy(c))
        self.add(loss=loss, batch=None, coefficients=_as_numpy(c), **row)

    def result(self) -> SearchResult:
        """The best that was judged; a last row tells of evaluations that came after it."""
        loss, c = self._best
        if self.evaluations > self.rows[-1]["evaluations"]:
            self.judge(loss, c)
        return SearchResult(c, loss, self.rows)


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

    history, opt_state = _History(objective, observe, clock), optimizer.init(logits)
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
    for z in candidates:
        history.judge(_full_loss(objective, coefficients(z), history), coefficients(z))
    return history.result()


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
    history = _History(objective, observe, clock)
    if losses is None:
        losses = [_full_loss(objective, objective_lib.corner(n, [k]), history) for k in range(n)]
    for one in losses:
        _check_finite(one, 0.0, "of a single checkpoint")
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


def gauss_newton(
    objective: Objective,
    n: int,
    *,
    max_steps: int = 20,
    tolerance: float = 1e-4,
    damping: float = 1e-4,
    groups: tuple[str, ...] = (),
    start: Coefficients | None = None,
    observe: Callable[[Row], None] | None = None,
    clock: Callable[[], float] | None = None,
) -> SearchResult:
    """Levenberg's and Marquardt's method on the simplex, on all batches, without a backward pass.

    With r the residuals and J = ∂r/∂c, a step minimises gᵀδ + ½ δᵀMδ exactly over what keeps c + δ
    on the simplex, with g = 2 Jᵀr / N, H = 2 JᵀJ / N and M = κ H + (max(κ - 1, 0) + damping) h I,
    h the mean curvature of H along the simplex. Only what lowers the loss of all batches is
    accepted. After each trial the stiffness κ becomes what would have foretold the loss that was
    found: above one it damps; below one it makes up for the curvature that JᵀJ has too much, where
    checkpoints are better than what lies between them.

    A pass has G (n - 1) directions. The first tells the loss of a trial, so a step that is refused
    costs one evaluation and the others are spared. Linear residuals are done in one step.
    Nocedal & Wright 2006, section 10.3.

    Args:
      n: number of checkpoints.
      max_steps: trials at most.
      tolerance: a step that promises or brings less than this fraction of the loss is the last.
      damping: in units of h; it decides where the residuals do not.
      groups: path regexes; each gets its own coefficients. () is one set for the whole tree.
      start: coefficients to start from (None: 1/n each).
      observe, clock: as for `gradient_descent`.

    Raises:
      FloatingPointError: the loss or its curvature is not finite.
      ValueError: the objective has no residuals, or `start` is not on the simplex.
    """
    history, space = _History(objective, observe, clock), simplex.Space.of(n, groups)
    here, stiffness = None, 1.0

    def look(c: np.ndarray) -> _Place:
        def proceed(loss):
            history.count()
            _check_finite(loss, 0.0, f"for coefficients {space.split(c)}")
            history.judge(loss, space.split(c), stiffness=stiffness)
            better = here is None or here.loss - loss > tolerance * abs(here.loss)
            history.count(len(space.sizes) * max(n - 1, 1) - 1 if better else 0)
            return better

        loss, gradient, curvature = objective.gauss_newton(
            space.split(c), on_simplex=True, proceed=proceed
        )
        if curvature is None:
            return _Place(c, loss, None, None)
        _check_finite(loss, curvature, f"for coefficients {space.split(c)}")
        return _Place(c, loss, space.along @ gradient, space.along @ curvature @ space.along)

    here = look(space.start(start))
    for _ in range(max_steps):
        mean = np.trace(here.curvature) / max(len(here.c) - len(space.sizes), 1)
        damped = (max(stiffness - 1, 0) + damping) * mean * np.eye(len(here.c))
        step, promised = space.step(here.c, here.gradient, stiffness * here.curvature + damped)
        if promised <= tolerance * abs(here.loss):
            break
        there = look(here.c + step)
        fitting = _fitting_stiffness(here, step, there.loss, mean)
        if there.loss >= here.loss:
            stiffness = max(fitting, 2 * stiffness)
        elif there.curvature is None:  # lower, but by too little to go on
            break
        else:
            here, stiffness = there, float(np.clip(fitting, stiffness / 10, 2 * stiffness))
    return history.result()


def _fitting_stiffness(here: "_Place", step: np.ndarray, loss: float, mean: float) -> float:
    """The κ whose model foretells `loss` at the end of the step."""
    seen, known = here.seen(step, loss), step @ here.curvature @ step
    if seen >= known:
        return (seen + mean * step @ step) / (known + mean * step @ step)
    # Where the loss is concave the model goes as far as the simplex does.
    return max(seen / known, 0.05) if seen > 0 else 0.05


def bfgs(
    objective: Objective,
    n: int,
    *,
    max_steps: int = 20,
    tolerance: float = 1e-4,
    groups: tuple[str, ...] = (),
    start: Coefficients | None = None,
    observe: Callable[[Row], None] | None = None,
    clock: Callable[[], float] | None = None,
) -> SearchResult:
    """Quasi-Newton on the simplex, on all batches: every point it looks at costs one gradient.

    A step minimises gᵀδ + ½ δᵀBδ exactly over what keeps c + δ on the simplex, so that a
    coefficient may become exactly zero, and one alone exactly one. B learns from each gradient,
    also where the step is refused, by Powell's damped update, which keeps it positive definite
    (Nocedal & Wright 2006, procedure 18.2). A refused step (Armijo) raises B until it foretells the
    loss that was found, and B finds a better one.

    B starts as the least curvature that the loss admits: a sum of squares L cannot fall below zero,
    so along -g it curves by at least |g|² / 2L. The first step therefore goes far, to where the
    second gradient tells most about the whole simplex; their difference y then scales B to
    |y| / |δ| (as in Nocedal & Wright, equation 6.20).

    Args:
      max_steps: gradients at most, beside the first.
      n, tolerance, groups, start, observe, clock: as for `gauss_newton`.

    Raises:
      FloatingPointError: the loss or its gradient is not finite.
      ValueError: `start` is not on the simplex.
    """
    history, space = _History(objective, observe, clock), simplex.Space.of(n, groups)

    def look(c: np.ndarray) -> _Place:
        loss, gradient = objective.value_and_grad(space.split(c))
        gradient = space.join(gradient)
        history.count()
        _check_finite(loss, gradient, f"for coefficients {space.split(c)}")
        history.judge(float(loss), space.split(c))
        return _Place(c, float(loss), space.along @ gradient, None)

    here, one = look(space.start(start)), np.eye(n * len(space.sizes))
    slope = here.gradient @ here.gradient
    curvature = (slope / (2 * abs(here.loss)) if here.loss else np.sqrt(slope)) * one
    for trial in range(max_steps):
        step, promised = space.step(here.c, here.gradient, curvature)
        if promised <= tolerance * abs(here.loss):
            break
        there = look(here.c + step)
        change = there.gradient - here.gradient
        if trial == 0 and change @ step > 0:
            curvature = np.linalg.norm(change) / np.linalg.norm(step) * one
        curvature = _updated(curvature, step, change)
        if there.loss <= here.loss + 1e-4 * (here.gradient @ step):
            gain, here = here.loss - there.loss, there
            if gain <= tolerance * abs(here.loss):
                break
        else:
            lack = here.seen(step, there.loss) - step @ curvature @ step
            curvature = curvature + max(lack, 0) / (step @ step) * one
    return history.result()


def _updated(curvature: np.ndarray, step: np.ndarray, change: np.ndarray) -> np.ndarray:
    """B with B δ = y, or as near to it as a positive definite B may come (Powell)."""
    old = curvature @ step
    bent, known = change @ step, old @ step
    share = 1.0 if bent >= 0.2 * known else 0.8 * known / (known - bent)
    new = share * change + (1 - share) * old
    return curvature - np.outer(old, old) / known + np.outer(new, new) / (new @ step)


class _Place(NamedTuple):
    """A point on the simplex, flat, and what is known of the loss there."""

    c: np.ndarray
    loss: float
    gradient: np.ndarray | None
    curvature: np.ndarray | None

    def seen(self, step: np.ndarray, loss: float) -> float:
        """δᵀMδ of the quadratic that has this slope and the loss that was found after the step."""
        return 2 * (loss - self.loss - self.gradient @ step)


def _full_loss(objective: Objective, c: Coefficients, history: _History) -> float:
    loss = objective.value(c)
    history.count()
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
