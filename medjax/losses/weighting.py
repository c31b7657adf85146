"""How classes weigh in a loss, and how the losses of several tasks become one.

Multi-task weighting. `losses` and `weights` are `[T]`, one entry a task in a fixed order; `present` is bool `[T]`:
whether the batch has an example with that task's label. A task that is not present adds nothing and changes nothing.

* fixed: `weights @ losses`; nothing is learnt.
* uncertainty: T numbers are trained beside the network's parameters with the gradient of `uncertainty_total`.
* GradNorm: `GradNormState` is carried from step to step beside the optimizer's state. The norms of the tasks' gradients
  in something that all share (`medjax.balance` says in what) go into `gradnorm_update`, and the next step's total is
  `state.weights @ losses`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from medjax.errors import UserError

Array = jax.Array

CLASS_WEIGHTS = ("none", "inverse", "sqrt", "effective")


def class_weights(counts: Sequence[float] | np.ndarray, rule: str = "inverse", *, beta: float = 0.9999) -> np.ndarray:
    """Weights of classes from how often they occur in the cohort, of mean 1 over all examples.

    * 'inverse': 1 / n. 'sqrt': 1 / √n. 'none': all 1.
    * 'effective': (1 - beta) / (1 - beta^n), the inverse effective number (Cui et al. 2019, arXiv:1901.05555).

    A class that does not occur has the weight of the rarest that does (its weight never acts on the cohort itself).

    Args:
        counts: `[K]`, examples (or voxels) of each class.

    Returns:
        float64 `[K]` with Σ n w = Σ n.
    """
    n = np.asarray(counts, np.float64)
    if rule not in CLASS_WEIGHTS:
        raise UserError(f"class weights '{rule}' are not known; known: {', '.join(CLASS_WEIGHTS)}")
    if n.ndim != 1 or (n < 0).any() or not n.sum() > 0:
        raise UserError(f"class weights need counts that are not all 0, not {counts}")
    seen = np.where(n > 0, n, n[n > 0].min())
    if rule == "none":
        weights = np.ones_like(n)
    elif rule == "effective":
        weights = (1.0 - beta) / -np.expm1(seen * np.log(beta))
    else:
        weights = seen ** (-0.5 if rule == "sqrt" else -1.0)
    return weights * n.sum() / (n * weights).sum()


def uncertainty_total(losses: Array, log_variances: Array, present: Array, weights: Any = 1.0) -> Array:
    """Σ_t w_t (exp(-s_t) L_t + ½ s_t), homoscedastic uncertainty (Kendall, Gal & Cipolla 2018, arXiv:1705.07115).

    s = log σ² are the trained numbers, 0 at first: then the total is that of fixed weights. (The paper's ½ before the
    loss of a regression is left to its weight.) Where L_t < 0 this falls without end in s_t.

    Args:
        losses: `[T]`. log_variances: s, `[T]`. present: bool `[T]`.
        weights: `[T]` or a number: fixed weights on top.

    Returns:
        float32 scalar.
    """
    safe = jnp.where(present, losses, 0.0)
    terms = jnp.asarray(weights) * (jnp.exp(-log_variances) * safe + 0.5 * log_variances)
    return jnp.where(present, terms, 0.0).sum()


class GradNormState(NamedTuple):
    """What GradNorm carries: weights `[T]` of sum T, and each task's first loss `[T]` (0: not seen yet)."""

    weights: Array
    first: Array


def gradnorm_init(tasks: int) -> GradNormState:
    """All weights 1."""
    return GradNormState(jnp.ones(tasks), jnp.zeros(tasks))


def gradnorm_update(
    state: GradNormState,
    losses: Array,
    norms: Array,
    present: Array,
    *,
    alpha: float = 1.5,
    rate: float = 0.025,
    least: float = 1e-3,
) -> GradNormState:
    """One step of GradNorm (Chen et al. 2018, arXiv:1711.02257): tasks' gradients of like size, slower tasks' larger.

    With G_t = w_t · norm_t, the gradient norm of the weighted loss, and r_t the loss relative to the first one, divided
    by the mean over tasks, w_t moves down the gradient of |G_t - mean(G) r_t^alpha|, the target held fixed; then the
    weights are scaled to sum T.

    Args:
        losses: `[T]`, unweighted. norms: `[T]`, of the gradients of the unweighted losses in what the tasks share.
        present: bool `[T]`; the weights of tasks that are not stay as they are, but for the scaling.
        alpha: How strongly slower tasks are pulled up. rate: Of the descent. least: Bound below each weight.
    """
    usable = present & jnp.isfinite(losses) & jnp.isfinite(norms)
    first = jnp.where((state.first == 0) & usable, losses, state.first)
    count = jnp.maximum(usable.sum(), 1)
    ratio = jnp.where(usable, losses / jnp.where(first == 0, 1.0, first), 0.0)
    relative = ratio / jnp.maximum(ratio.sum() / count, 1e-12)
    scaled = jnp.where(usable, state.weights * norms, 0.0)
    target = scaled.sum() / count * jnp.maximum(relative, 0.0) ** alpha
    slope = jnp.where(usable, norms * jnp.sign(scaled - target), 0.0)
    # The slope is a norm: divided by the mean norm, the rate does not depend on the scale of the losses.
    slope /= jnp.maximum(jnp.where(usable, norms, 0.0).sum() / count, 1e-12)
    weights = jnp.maximum(state.weights - rate * slope, least)
    return GradNormState(weights * len(weights) / weights.sum(), first)
