"""How the losses of several tasks become one while training: fixed weights, trained uncertainties, GradNorm.

Each rule says what it carries from step to step (`create`), what the step differentiates beside the parameters
(`knobs`), the loss that is minimised (`total`) and how it goes on (`update`). Formulas: `medjax.losses.weighting`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import optax
from jax import Array
from ml_collections import ConfigDict

from medjax.errors import UserError
from medjax.losses import weighting


class Fixed:
    """The tasks' weights as given; nothing is learnt. Of a single task every rule is this one."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.names, self.weights = tuple(weights), jnp.asarray(list(weights.values()))

    def create(self) -> Any:
        """What is carried from step to step, at first; None: nothing."""
        return None

    def knobs(self, state: Any) -> Any:
        """What the step differentiates beside the parameters."""
        return None

    def probes(self, knobs: Any) -> dict[str, Array] | None:
        """Task -> the probe its head's features pass (`medjax.models.model.tap`); None: no probes."""
        return None

    def total(self, knobs: Any, losses: Mapping[str, Array], share: Mapping[str, Array], fixed: Any) -> Array:
        """What is minimised, of one round.

        Args:
          losses: of each task, unweighted; a round has its part of them. share: 0 of a task without any label in the
            batch. fixed: the sum by the weights as given.
        """
        return fixed

    def update(self, state: Any, slopes: Any, losses: Mapping[str, Array], share: Mapping[str, Array]) -> Any:
        """(what is carried on, values to log), from the gradient in the knobs and the losses of the whole batch."""
        return None, {}

    def _present(self, share: Mapping[str, Array]) -> Array:
        return jnp.stack([share[name] > 0 for name in self.names])

    def _stack(self, values: Mapping[str, Array]) -> Array:
        return jnp.stack([values[name] for name in self.names])


class Uncertainty(Fixed):
    """Log variances [T] trained beside the parameters, by Adam at the run's learning rate."""

    def __init__(self, weights: Mapping[str, float], rate: Callable, cuts: int) -> None:
        super().__init__(weights)
        self._adam, self._cuts = optax.adam(rate), cuts

    def create(self) -> Any:
        log_variances = jnp.zeros(len(self.names))
        return log_variances, self._adam.init(log_variances)

    def knobs(self, state: Any) -> Any:
        return state[0]

    def total(self, knobs: Any, losses: Mapping[str, Array], share: Mapping[str, Array], fixed: Any) -> Array:
        present = self._present(share)
        whole = weighting.uncertainty_total(self._stack(losses), knobs, present, self.weights)
        # A round (of one device's program) has its part of the losses, and so of the penalty on the variances.
        penalty = 0.5 * jnp.where(present, self.weights * knobs, 0.0).sum()
        return whole - (1 - 1 / self._cuts) * penalty

    def update(self, state: Any, slopes: Any, losses: Mapping[str, Array], share: Mapping[str, Array]) -> Any:
        change, moments = self._adam.update(slopes, state[1])
        log_variances = state[0] + change
        return (log_variances, moments), {f"log_variance/{n}": log_variances[i] for i, n in enumerate(self.names)}


class GradNorm(Fixed):
    """Weights that keep the tasks' gradients of like size; the weights as given act on top.

    The gradients are compared in the features that the heads are given, the last thing all tasks share (Sener & Koltun
    2018, arXiv:1810.04650, argue for it), not in the parameters of one layer: every backbone has a last layer of its
    own, and heads read different levels. The norms of all tasks come with the one backward pass, from probes.
    """

    def __init__(self, weights: Mapping[str, float], alpha: float, rate: float) -> None:
        super().__init__(weights)
        self._alpha, self._rate = alpha, rate

    def create(self) -> Any:
        return weighting.gradnorm_init(len(self.names))

    def knobs(self, state: Any) -> Any:
        return jnp.zeros(len(self.names)), state.weights

    def probes(self, knobs: Any) -> dict[str, Array] | None:
        return {name: knobs[0][i] for i, name in enumerate(self.names)}

    def total(self, knobs: Any, losses: Mapping[str, Array], share: Mapping[str, Array], fixed: Any) -> Array:
        terms = jnp.where(self._present(share), self._stack(losses), 0.0)
        return (self.weights * knobs[1] * terms).sum()

    def update(self, state: Any, slopes: Any, losses: Mapping[str, Array], share: Mapping[str, Array]) -> Any:
        # A probe's slope is the squared norm of the weighted loss's gradient; examples, and so rounds, add up.
        scale = self.weights * state.weights
        norms = jnp.where(scale > 0, jnp.sqrt(slopes[0]) / jnp.where(scale > 0, scale, 1.0), 0.0)
        present = self._present(share) & (scale > 0)
        state = weighting.gradnorm_update(
            state, self._stack(losses), norms, present, alpha=self._alpha, rate=self._rate
        )
        return state, {f"task_weight/{name}": state.weights[i] for i, name in enumerate(self.names)}


def build(config: ConfigDict, tasks: Mapping[str, Any], rate: Callable, cuts: int = 1) -> Fixed:
    """The rule `optim.balance` of these tasks.

    Args:
      config: of the run. rate: learning rate by step. cuts: parts of a batch whose totals are added.
    """
    weights, optim = {name: task.weight for name, task in tasks.items()}, config.optim
    kinds: dict[str, Callable[[], Fixed]] = {
        "fixed": lambda: Fixed(weights),
        "uncertainty": lambda: Uncertainty(weights, rate, cuts),
        "gradnorm": lambda: GradNorm(weights, optim.gradnorm.alpha, optim.gradnorm.rate),
    }
    if optim.balance not in kinds:
        raise UserError(f"config: optim.balance '{optim.balance}' is not known; known: {', '.join(kinds)}")
    apart = [name for name, task in tasks.items() if getattr(task, "kind", "") == "pretext"]
    if optim.balance == "gradnorm" and apart and len(tasks) > 1:
        raise UserError(
            f"config: optim.balance 'gradnorm' compares tasks in the features they share, and '{apart[0]}' makes a "
            "pass of its own; use 'uncertainty' or 'fixed'"
        )
    if optim.balance == "gradnorm" and config.semi.method and len(tasks) > 1:
        raise UserError(
            f"config: optim.balance 'gradnorm' compares the gradients of the tasks' losses, and semi.method="
            f"'{config.semi.method}' adds one of its own to them; use 'uncertainty' or 'fixed'"
        )
    # exp(-s) L + s / 2 has no minimum in s where L < 0: the weight of such a task grows without end. GradNorm's rate of
    # training is the loss over the first one: of a loss that passes 0 it says nothing, and the task would starve.
    for name, task in tasks.items() if optim.balance != "fixed" and len(tasks) > 1 else ():
        gaussian = getattr(task, "uncertainty", "") == "gaussian"
        if gaussian or getattr(task, "boundary", 0.0) > 0:
            what, cure = ("uncertainty='gaussian'", "'quantiles'") if gaussian else (f"boundary={task.boundary}", "0")
            raise UserError(
                f"config: optim.balance '{optim.balance}' needs losses of 0 and above, and that of '{name}' may be "
                f"negative ({what}); use optim.balance='fixed', or {cure} there"
            )
    return kinds[optim.balance if len(tasks) > 1 else "fixed"]()
