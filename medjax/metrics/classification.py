"""Metrics of classes and probabilities over a cohort: discrimination, agreement, calibration.

Scores are the higher the more positive; truths are 0/1. What is undefined is nan and does not count: an AUROC without
positives or without negatives, a kappa where both raters always agree by chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from medjax.errors import UserError

Weights = Literal["none", "linear", "quadratic"]
Bins = Literal["width", "mass"]
Numbers = Sequence[float] | np.ndarray


def auroc(scores: Numbers, truths: Numbers) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    nan unless there are both positives and negatives.
    """
    s, t = _binary(scores, truths)
    positives = int(t.sum())
    negatives = len(t) - positives
    if not positives or not negatives:
        return math.nan
    _, place, count = np.unique(s, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2.0  # mean rank of tied scores, from 1
    return float((rank[place][t].sum() - positives * (positives + 1) / 2.0) / (positives * negatives))


def average_precision(scores: Numbers, truths: Numbers) -> float:
    """Average precision Σ (R_n - R_{n-1}) P_n over falling distinct scores, uninterpolated; nan without positives."""
    s, t = _binary(scores, truths)
    if not t.any():
        return math.nan
    true, false, _ = _sweep(s, t)
    precision = true / (true + false)
    return float((np.diff(true, prepend=0.0) * precision).sum() / true[-1])


class Operating(NamedTuple):
    """A point of the ROC curve: 'positive' is a score of `threshold` or more."""

    threshold: float
    sensitivity: float
    specificity: float


def operating_point(
    scores: Numbers,
    truths: Numbers,
    *,
    threshold: float | None = None,
    specificity: float | None = None,
    sensitivity: float | None = None,
) -> Operating:
    """Sensitivity and specificity at a threshold, or where one of them is at least what is asked and the other highest.

    Exactly one of `threshold`, `specificity` and `sensitivity` is given. Thresholds are the scores seen, and infinity
    (nothing is positive). A rate without cases is nan.
    """
    if [threshold, specificity, sensitivity].count(None) != 2:
        raise UserError("operating point: give exactly one of threshold, specificity and sensitivity")
    for name, asked in (("specificity", specificity), ("sensitivity", sensitivity)):
        if asked is not None and not 0 <= asked <= 1:
            raise UserError(f"operating point: {name} {asked} is outside 0 to 1")
    s, t = _binary(scores, truths)
    positives = int(t.sum())
    negatives = len(t) - positives
    if threshold is not None:
        called = s >= threshold
        return Operating(
            float(threshold),
            float((called & t).sum() / positives) if positives else math.nan,
            float((~called & ~t).sum() / negatives) if negatives else math.nan,
        )
    if not positives or not negatives:
        return Operating(math.nan, math.nan, math.nan)
    true, false, cuts = _sweep(s, t)
    sens = np.concatenate([[0.0], true / positives])
    spec = np.concatenate([[1.0], 1.0 - false / negatives])
    cuts = np.concatenate([[math.inf], cuts])
    # A share such as 0.9 of 10 cases must not fail by rounding.
    if specificity is not None:
        allowed = np.flatnonzero(spec >= specificity - 1e-9)
        best = allowed[np.lexsort((spec[allowed], sens[allowed]))[-1]]
    else:
        assert sensitivity is not None
        allowed = np.flatnonzero(sens >= sensitivity - 1e-9)
        best = allowed[np.lexsort((sens[allowed], spec[allowed]))[-1]]
    return Operating(float(cuts[best]), float(sens[best]), float(spec[best]))


def confusion(predictions: Numbers, truths: Numbers, classes: int) -> np.ndarray:
    """int `[classes, classes]`: how often each truth (row) is called each class (column)."""
    a, b = np.asarray(predictions, np.int64).ravel(), np.asarray(truths, np.int64).ravel()
    if a.shape != b.shape:
        raise UserError(f"{len(a)} predictions and {len(b)} truths")
    if len(a) and (min(a.min(), b.min()) < 0 or max(a.max(), b.max()) >= classes):
        raise UserError(f"a class lies outside 0 to {classes - 1}")
    return np.bincount(b * classes + a, minlength=classes * classes).reshape(classes, classes)


def accuracy(table: np.ndarray) -> float:
    """Share of cases called right, from a `confusion` table; nan without cases."""
    return float(np.trace(table) / table.sum()) if table.sum() else math.nan


def balanced_accuracy(table: np.ndarray) -> float:
    """Mean over the classes there are of the share of their cases called right (chance is not taken off)."""
    total = table.sum(axis=1)
    present = total > 0
    return float((np.diag(table)[present] / total[present]).mean()) if present.any() else math.nan


def kappa(table: np.ndarray, weights: Weights = "none") -> float:
    """Cohen's kappa 1 - Σ w O / Σ w E, w = 0 on the diagonal and 1, |i - j| or (i - j)² beside it (Cohen 1960, 1968).

    nan where chance leaves no room for disagreement (all cases of one class, and called so).
    """
    if weights not in get_args(Weights):
        raise UserError(f"kappa weights '{weights}' are not known; known: {', '.join(get_args(Weights))}")
    if not table.sum():
        return math.nan
    apart = np.abs(np.subtract.outer(np.arange(len(table)), np.arange(len(table)))).astype(np.float64)
    apart = {"none": (apart > 0).astype(np.float64), "linear": apart, "quadratic": apart**2}[weights]
    expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / table.sum()
    chance = (apart * expected).sum()
    return float(1.0 - (apart * table).sum() / chance) if chance else math.nan


def brier(probabilities: np.ndarray, truths: Numbers) -> float:
    """Brier score, the mean squared error of probabilities; 0 is perfect.

    `[N]` probabilities of the positive class with truths 0/1: mean (p - t)², in [0, 1]. `[N, K]` with class indices:
    mean over cases of the sum over classes, in [0, 2] (Brier 1950). nan without cases.
    """
    p, t = _probabilities(probabilities, truths)
    if not len(p):
        return math.nan
    if p.ndim == 1:
        return float(((p - t) ** 2).mean())
    return float(((p - np.eye(p.shape[1])[t.astype(int)]) ** 2).sum(axis=1).mean())


def calibration_error(probabilities: np.ndarray, truths: Numbers, *, bins: int = 15, binning: Bins = "width") -> float:
    """Expected calibration error: Σ_bins (n_bin / n) |share that is right - mean confidence| (Naeini et al. 2015).

    `[N, K]` with class indices: the confidence is the largest probability, and right is whether that class is the truth
    (Guo et al. 2017). `[N]` with truths 0/1: the probability itself, and the positive share.

    Args:
        bins: How many. binning: Of equal 'width' over (0, 1], an upper edge belonging to its bin, or of equal 'mass'.
    """
    if bins < 1 or binning not in get_args(Bins):
        raise UserError(
            f"calibration error: bins={bins} must be at least 1, binning one of {', '.join(get_args(Bins))}"
        )
    p, t = _probabilities(probabilities, truths)
    if not len(p):
        return math.nan
    sure, right = (p, t > 0) if p.ndim == 1 else (p.max(axis=1), p.argmax(axis=1) == t)
    if binning == "width":
        place = np.clip(np.ceil(sure * bins).astype(int) - 1, 0, bins - 1)
    else:
        place = np.empty(len(sure), int)
        place[np.argsort(sure, kind="stable")] = np.arange(len(sure)) * bins // len(sure)
    gaps = np.bincount(place, right, bins) - np.bincount(place, sure, bins)
    return float(np.abs(gaps).sum() / len(sure))


def fit_temperature(logits: np.ndarray, truths: Numbers, *, low: float = 0.05, high: float = 20.0) -> float:
    """The temperature T of softmax(logits / T) with the least cross-entropy on held-out cases (Guo et al. 2017).

    Args:
        logits: `[N, K]` logits or log probabilities, truths class indices; or `[N]` logits of the positive class,
            truths 0/1.
        low, high: Bounds of T. Cases that are all told right drive T to `low`.

    Returns:
        T; 1 without cases.
    """
    x, t = np.asarray(logits, np.float64), np.asarray(truths)
    if x.ndim == 1:
        x, t = np.stack([np.zeros_like(x), x], axis=1), (t > 0).astype(int)
    if not len(x):
        return 1.0
    if not np.isfinite(x).all():
        raise UserError("temperature scaling: logits must be finite; take log probabilities no smaller than 1e-7")
    x = x - x.max(axis=1, keepdims=True)

    def slope(scale: float) -> float:
        # The cross-entropy is convex in 1/T: its derivative, mean of E[x] - x[truth], rises with it.
        p = np.exp(scale * x)
        p /= p.sum(axis=1, keepdims=True)
        return float(((p * x).sum(axis=1) - x[np.arange(len(x)), t.astype(int)]).mean())

    lower, upper = 1.0 / high, 1.0 / low
    if slope(upper) <= 0:
        return low
    if slope(lower) >= 0:
        return high
    for _ in range(60):
        middle = math.sqrt(lower * upper)
        lower, upper = (middle, upper) if slope(middle) < 0 else (lower, middle)
    return 1.0 / math.sqrt(lower * upper)


def _binary(scores: Numbers, truths: Numbers) -> tuple[np.ndarray, np.ndarray]:
    s, t = np.asarray(scores, np.float64).ravel(), np.asarray(truths).ravel()
    if s.shape != t.shape:
        raise UserError(f"{len(s)} scores and {len(t)} truths")
    if np.isnan(s).any():
        raise UserError("a score is NaN; leave the case out or mend the prediction")
    if not np.isin(t, (0, 1)).all():
        raise UserError("truths must be 0 or 1")
    return s, t.astype(bool)


def _sweep(s: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True and false positives, float, where each distinct score and what is above it is called positive; falling."""
    order = np.argsort(-s, kind="stable")
    s, t = s[order], t[order]
    last = np.flatnonzero(np.append(s[1:] != s[:-1], len(s) > 0))
    true = np.cumsum(t)[last].astype(np.float64)
    return true, last + 1 - true, s[last]


def _probabilities(probabilities: np.ndarray, truths: Numbers) -> tuple[np.ndarray, np.ndarray]:
    p, t = np.asarray(probabilities, np.float64), np.asarray(truths).ravel()
    if p.ndim not in (1, 2) or len(p) != len(t):
        raise UserError(f"probabilities {p.shape} do not fit {len(t)} truths")
    if not ((p >= -1e-6) & (p <= 1 + 1e-6)).all():
        raise UserError("a probability lies outside 0 to 1")
    return p, t
