"""Regression: one number a case or several, with an interval where asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array

from medjax.errors import UserError
from medjax.losses import regression as losses
from medjax.metrics import regression as metrics
from medjax.metrics import stats
from medjax.models.heads import POOLS, PooledHead
from medjax.tasks.common import Activation, Defaults, Kind, check_names, first_metric


@dataclass(frozen=True)
class Regression(Defaults):
    """Numbers of a case. The network predicts them standardised by the training cases' mean and standard deviation.

    Attributes:
      name: the task's name; also the target's key in a case.
      names: of the numbers, in the target's order; empty: one number, called as the task. NaN is unknown.
      unit: for the reader.
      uncertainty: 'none'; 'gaussian', a variance is predicted too (heteroscedastic likelihood); or 'quantiles', of the
        interval's ends and the median.
      objective: without uncertainty: 'smooth_l1' or 'squared'. beta: of smooth L1, in standard deviations; 0: plain L1.
      interval: coverage of the predicted interval.
      weight: of this task among several.
      levels, pool, hidden, dropout: of the head (`medjax.models.heads.PooledHead`).
      centre, scale: mean and standard deviation of each number; learnt unless given.
    """

    name: str
    names: Sequence[str] = ()
    unit: str = ""
    uncertainty: str = "none"
    objective: str = "smooth_l1"
    beta: float = 1.0
    interval: float = 0.95
    weight: float = 1.0
    levels: int = 0
    pool: str = "mean"
    hidden: int = 0
    dropout: float = 0.0
    centre: Sequence[float] = ()
    scale: Sequence[float] = ()

    def __post_init__(self) -> None:
        self.one_of("uncertainty", ("none", "gaussian", "quantiles"))
        self.one_of("objective", ("smooth_l1", "squared"))
        self.one_of("pool", POOLS)
        check_names(self.name, self.numbers, 1)
        self.from_to("beta", 0)
        self.check_pooled()
        self.acts("objective", self.uncertainty == "none", "where uncertainty is 'none'")
        plain = self.uncertainty == "none" and self.objective == "smooth_l1"
        self.acts("beta", plain, "where uncertainty is 'none' and objective 'smooth_l1'")
        self.acts("interval", self.uncertainty != "none", "where uncertainty is 'gaussian' or 'quantiles'")
        if not 0 < self.interval < 1:
            raise UserError(f"{self.where('interval')}={self.interval} is outside (0, 1)")
        for key in ("centre", "scale"):
            if len(getattr(self, key)) not in (0, len(self.numbers)):
                raise UserError(f"{self.where(key)} needs {len(self.numbers)} numbers ({', '.join(self.numbers)})")
        if any(not s > 0 for s in self.scale):
            raise UserError(f"{self.where('scale')}={tuple(self.scale)}: standard deviations are above 0")

    @property
    def numbers(self) -> tuple[str, ...]:
        """Names of the numbers."""
        return tuple(self.names) or (self.name,)

    @property
    def kind(self) -> Kind:
        return "case"

    @property
    def activation(self) -> Activation:
        return "identity"

    @property
    def targets(self) -> tuple[str, ...]:
        return ("vector",) if len(self.names) > 1 else ("number", "class", "vector")

    @property
    def width(self) -> int:
        return len(self.names) if len(self.names) > 1 else 0

    @property
    def outputs(self) -> int:
        """One, two (mean, log variance) or three (quantiles) channels a number, number by number."""
        return len(self.numbers) * self._each

    @property
    def _each(self) -> int:
        return {"none": 1, "gaussian": 2, "quantiles": 3}[self.uncertainty]

    @property
    def _levels(self) -> tuple[float, float, float]:
        tail = (1.0 - self.interval) / 2.0
        return tail, 0.5, 1.0 - tail

    def _scaling(self) -> tuple[np.ndarray, np.ndarray]:
        ones = np.ones(len(self.numbers), np.float32)
        centre = np.asarray(self.centre, np.float32) if self.centre else 0 * ones
        return centre, np.asarray(self.scale, np.float32) if self.scale else ones

    def head(self) -> nn.Module:
        return PooledHead(self.outputs, self.levels, self.pool, self.hidden, self.dropout)

    def fit(self, known: Sequence[Any]) -> dict[str, Any]:
        """Checks the numbers; learns their mean and standard deviation."""
        for one in known:
            self.check_target(one)
        table = np.stack([np.atleast_1d(one.value) for one in known]).astype(np.float64)
        for number, name in enumerate(self.numbers):
            seen = table[~np.isnan(table[:, number]), number]
            if not len(seen):
                raise UserError(f"task '{self.name}': '{name}' is unknown in every training case; leave it out")
            if seen.std() == 0:
                raise UserError(
                    f"task '{self.name}': '{name}' is {seen[0]:g} in every training case, so there is nothing to "
                    "learn; leave it out"
                )
        learnt = {"centre": np.nanmean(table, axis=0), "scale": np.nanstd(table, axis=0)}
        return {k: tuple(float(x) for x in v) for k, v in learnt.items() if not getattr(self, k)}

    def check_target(self, one: Any) -> None:
        values = np.atleast_1d(one.value)
        if values.shape != (len(self.numbers),) or np.isinf(values).any():
            raise UserError(
                f"task '{self.name}': case {one.case} has {np.asarray(one.value).tolist()}; it takes "
                f"{len(self.numbers)} finite number(s) ({', '.join(self.numbers)}), NaN where unknown"
            )

    def prepare(self, key: Array, batch: dict[str, Array]) -> dict[str, Array]:
        """Numbers [B] or [B, K] -> standardised f32[B, K]."""
        centre, scale = self._scaling()
        target = batch[f"{self.name}/target"].astype(jnp.float32).reshape(-1, len(self.numbers))
        return {**batch, f"{self.name}/target": (target - centre) / scale}

    def loss(self, outputs: Sequence[Array], batch: Mapping[str, Array]) -> Array:
        target = batch[f"{self.name}/target"]
        x = outputs[0].reshape(-1, len(self.numbers), self._each)
        if self.uncertainty == "gaussian":
            return losses.gaussian_nll(x[..., 0], x[..., 1], target)
        if self.uncertainty == "quantiles":
            return losses.pinball(losses.ordered_quantiles(x, self._levels), target, self._levels)
        if self.objective == "squared":
            return losses.squared_error(x[..., 0], target)
        return losses.smooth_l1(x[..., 0], target, beta=self.beta)

    def probabilities(self, outputs: Array) -> Array:
        """Outputs -> value, lower and upper end (NaN without an interval) of each number in its unit, [..., 3 K]."""
        x = outputs.astype(jnp.float32).reshape(*outputs.shape[:-1], len(self.numbers), self._each)
        if self.uncertainty == "gaussian":
            spread = jnp.exp(0.5 * jnp.clip(x[..., 1], *losses.LOG_VARIANCE))
            half = losses.gaussian_quantile(self.interval) * spread
            parts = (x[..., 0], x[..., 0] - half, x[..., 0] + half)
        elif self.uncertainty == "quantiles":
            q = losses.ordered_quantiles(x, self._levels)
            parts = (q[..., 1], q[..., 0], q[..., 2])
        else:
            parts = (x[..., 0], jnp.full_like(x[..., 0], jnp.nan), jnp.full_like(x[..., 0], jnp.nan))
        centre, scale = self._scaling()
        values = jnp.stack(parts, axis=-1) * scale[:, None] + centre[:, None]
        return values.reshape(*outputs.shape[:-1], -1)

    def decode(self, outputs: np.ndarray, geometry: Any = None) -> dict[str, dict[str, float]]:
        """Name -> {'value', and with uncertainty 'low' and 'high', the ends of the interval}."""
        keys = ("value", "low", "high")[: 1 if self.uncertainty == "none" else 3]
        rows = np.asarray(outputs, np.float64).reshape(len(self.numbers), 3)
        return {
            name: {k: float(v) for k, v in zip(keys, row, strict=False)}
            for name, row in zip(self.numbers, rows, strict=True)
        }

    def table(self, decoded: Mapping[str, Mapping[str, float]]) -> list[dict[str, Any]]:
        unit = {"unit": self.unit} if self.unit else {}
        return [{"class": name, **values, **unit} for name, values in decoded.items()]

    def score(
        self,
        prediction: Mapping[str, Mapping[str, float]],
        reference: np.ndarray,
        spacing: Sequence[float],
        voxel: float | None = None,
    ) -> list[dict[str, Any]]:
        """A row a number that is known: prediction, interval, reference, error."""
        truths = np.atleast_1d(np.asarray(reference, np.float64))
        rows = []
        for (name, found), truth in zip(prediction.items(), truths.tolist(), strict=True):
            if not math.isnan(truth):
                ends = {k: v for k, v in found.items() if k != "value"}
                value = found["value"]
                rows.append({"class": name, "prediction": value, **ends, "reference": truth, "error": value - truth})
        return rows

    def summarize(self, rows: Sequence[Mapping[str, Any]], *, resamples: int = 1000) -> dict[str, Any]:
        """MAE, RMSE, R², correlation, Bland & Altman's bias and limits, coverage of the interval."""

        def of(function: Any) -> Any:
            return lambda t: function(t["prediction"], t["reference"])

        wanted = {
            "mae": of(metrics.mean_absolute_error),
            "rmse": of(metrics.root_mean_square_error),
            "r2": of(metrics.r2),
            "pearson": of(metrics.pearson),
            "bias": lambda t: metrics.bland_altman(t["prediction"], t["reference"]).bias,
            "limit_low": lambda t: metrics.bland_altman(t["prediction"], t["reference"]).low,
            "limit_high": lambda t: metrics.bland_altman(t["prediction"], t["reference"]).high,
        }
        if self.uncertainty != "none":
            wanted["coverage"] = lambda t: metrics.coverage(t["low"], t["high"], t["reference"])
        return stats.summarize_cohort(rows, wanted, self.numbers, n=resamples)

    def selection(self, summary: Mapping[str, Any]) -> float:
        """1 / (1 + MAE in standard deviations), the mean over numbers: 1 is perfect, ½ a standard deviation off."""
        _, scale = self._scaling()
        errors = [summary["mae"]["per_class"][name]["mean"] for name in self.numbers]
        found = [1.0 / (1.0 + error / s) for error, s in zip(errors, scale.tolist(), strict=True) if error is not None]
        return float(np.mean(found)) if found and first_metric(summary, "mae") is not None else 0.0
