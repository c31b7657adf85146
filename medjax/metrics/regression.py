"""Metrics of numbers over a cohort: errors, explained variance, agreement of two methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from medjax.errors import UserError

Numbers = Sequence[float] | np.ndarray


def mean_absolute_error(predictions: Numbers, truths: Numbers) -> float:
    """Mean |prediction - truth|; nan without cases."""
    a, b = _pairs(predictions, truths)
    return float(np.abs(a - b).mean()) if len(a) else math.nan


def root_mean_square_error(predictions: Numbers, truths: Numbers) -> float:
    """Root of the mean squared error; nan without cases."""
    a, b = _pairs(predictions, truths)
    return float(np.sqrt(((a - b) ** 2).mean())) if len(a) else math.nan


def r2(predictions: Numbers, truths: Numbers) -> float:
    """Coefficient of determination 1 - Σ (truth - prediction)² / Σ (truth - mean)²; nan where no truth differs."""
    a, b = _pairs(predictions, truths)
    spread = ((b - b.mean()) ** 2).sum() if len(b) else 0.0
    return float(1.0 - ((a - b) ** 2).sum() / spread) if spread else math.nan


def pearson(predictions: Numbers, truths: Numbers) -> float:
    """Pearson's correlation; nan where either does not vary."""
    a, b = _pairs(predictions, truths)
    if not len(a):
        return math.nan
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / scale) if scale else math.nan


class Agreement(NamedTuple):
    """Bland & Altman's limits: mean difference (prediction minus truth), and where 95 % of differences lie."""

    bias: float
    low: float
    high: float
    sd: float
    n: int


def bland_altman(predictions: Numbers, truths: Numbers) -> Agreement:
    """Bias and limits of agreement, bias ± 1.96 sd (Bland & Altman 1986); the variance has n - 1, nan below 2 cases."""
    a, b = _pairs(predictions, truths)
    difference = a - b
    n = len(difference)
    bias = float(difference.mean()) if n else math.nan
    sd = float(difference.std(ddof=1)) if n > 1 else math.nan
    return Agreement(bias, bias - 1.96 * sd, bias + 1.96 * sd, sd, n)


def coverage(low: Numbers, high: Numbers, truths: Numbers) -> float:
    """Share of truths within their interval; nan without cases."""
    a, b, t = (np.asarray(v, np.float64).ravel() for v in (low, high, truths))
    if not a.shape == b.shape == t.shape:
        raise UserError(f"intervals of {len(a)} and {len(b)} cases, {len(t)} truths")
    return float(((a <= t) & (t <= b)).mean()) if len(t) else math.nan


def _pairs(predictions: Numbers, truths: Numbers) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(predictions, np.float64).ravel(), np.asarray(truths, np.float64).ravel()
    if a.shape != b.shape:
        raise UserError(f"{len(a)} predictions and {len(b)} truths")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UserError("a prediction or a truth is not finite; leave the case out or mend it")
    return a, b
