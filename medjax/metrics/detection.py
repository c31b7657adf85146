"""Metrics of findings: boxes in 3D, which candidate finds which lesion, FROC and CPM, average precision.

Boxes are `[n, 6]`: centre (x, y, z) and full size (x, y, z), millimetres.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from medjax.errors import UserError

Rule = Literal["radius", "iou"]

# False positives a scan at which LUNA16 averages the sensitivity (Setio et al. 2017, doi:10.1016/j.media.2017.06.015).
LUNA_RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of every pair of boxes, `[n, 6]` and `[m, 6]` -> float64 `[n, m]`; 0 without volume."""
    a, b = _boxes(a), _boxes(b)
    low = np.maximum((a[:, None, :3] - a[:, None, 3:] / 2), (b[None, :, :3] - b[None, :, 3:] / 2))
    high = np.minimum((a[:, None, :3] + a[:, None, 3:] / 2), (b[None, :, :3] + b[None, :, 3:] / 2))
    overlap = np.prod(np.maximum(high - low, 0.0), axis=-1)
    union = np.prod(a[:, 3:], axis=1)[:, None] + np.prod(b[:, 3:], axis=1)[None] - overlap
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=union > 0)


def non_maximum_suppression(
    boxes: np.ndarray, scores: np.ndarray, *, iou: float = 0.3, apart: float = 0.0
) -> np.ndarray:
    """Indices of the boxes kept, highest score first: each suppresses those that overlap it.

    Args:
        boxes: `[n, 6]`. scores: `[n]`; of equal ones the earlier box goes first.
        iou: Boxes of larger intersection over union than this are suppressed.
        apart: So are those whose centres lie nearer than this, in mm (boxes may be points).
    """
    boxes, left = _boxes(boxes), np.argsort(-np.asarray(scores, np.float64), kind="stable")
    kept = []
    while len(left):
        first, left = left[0], left[1:]
        kept.append(first)
        distance = np.linalg.norm(boxes[left, :3] - boxes[first, :3], axis=1)
        left = left[(box_iou(boxes[[first]], boxes[left])[0] <= iou) & ((distance >= apart) | (apart <= 0))]
    return np.array(kept, np.intp)


class Matches(NamedTuple):
    """How the candidates of a scan find its lesions.

    Attributes:
        by: int `[m]`, of each lesion the candidate of highest score that finds it; -1 where none does.
        found: float64 `[m]`, that candidate's score; -inf for a lesion that is missed.
        false: bool `[n]`, candidates that find no lesion. Those that find one which a higher score found are no
            errors either: they count neither way.
    """

    by: np.ndarray
    found: np.ndarray
    false: np.ndarray


def match(
    candidates: np.ndarray, scores: np.ndarray, lesions: np.ndarray, *, rule: Rule = "radius", iou: float = 0.1
) -> Matches:
    """Which candidate of a scan finds which lesion.

    * 'radius' (LUNA16): a candidate whose centre lies within the lesion's radius, half the mean of its sizes, of the
      lesion's centre. One candidate may find several lesions.
    * 'iou': boxes whose intersection over union is at least `iou`.

    Args:
        candidates: `[n, 6]`. scores: `[n]`. lesions: `[m, 6]`.
    """
    if rule not in get_args(Rule):
        raise UserError(f"matching rule '{rule}' is not known; known: {', '.join(get_args(Rule))}")
    a, b = _boxes(candidates), _boxes(lesions)
    if rule == "iou":
        touches = box_iou(a, b) >= max(iou, 1e-12)
    else:
        distance = np.linalg.norm(a[:, None, :3] - b[None, :, :3], axis=-1)
        touches = distance <= b[:, 3:].mean(axis=1)[None] / 2.0
    values = np.where(touches, np.asarray(scores, np.float64).reshape(-1, 1), -math.inf)
    if not len(a):
        return Matches(np.full(len(b), -1), np.full(len(b), -math.inf), np.zeros(0, bool))
    found = values.max(axis=0)
    return Matches(np.where(np.isfinite(found), values.argmax(axis=0), -1), found, touches.sum(axis=1) == 0)


class Curve(NamedTuple):
    """FROC: sensitivity at false positives a scan, both rising, one point a threshold; the first is (0, s)."""

    rates: np.ndarray
    sensitivity: np.ndarray
    thresholds: np.ndarray


def froc(found: np.ndarray, false: np.ndarray, scans: int) -> Curve:
    """Free-response ROC over a cohort.

    Args:
        found: `[lesions]`, the score at which each lesion of the cohort is found; -inf where it never is.
        false: scores of all false positives of the cohort.
        scans: How many, those without lesions or candidates included.

    Returns:
        The curve; without lesions its sensitivity is nan.
    """
    found, false = np.asarray(found, np.float64).ravel(), np.asarray(false, np.float64).ravel()
    if scans < 1:
        raise UserError(f"FROC needs at least one scan, not {scans}")
    if np.isnan(found).any() or np.isnan(false).any():
        raise UserError("FROC: a score is NaN; mend the prediction")
    thresholds = np.unique(np.concatenate([found[np.isfinite(found)], false]))[::-1]
    thresholds = np.concatenate([[math.inf], thresholds])
    hits = len(found) - np.searchsorted(np.sort(found), thresholds, side="left")
    errors = len(false) - np.searchsorted(np.sort(false), thresholds, side="left")
    share = hits / len(found) if len(found) else np.full(len(hits), math.nan)
    return Curve(errors / scans, share, thresholds)


def sensitivity_at(curve: Curve, rates: Sequence[float] = LUNA_RATES) -> np.ndarray:
    """Sensitivity at each rate of false positives a scan, float64 `[len(rates)]`.

    Linear between the points of the curve, as LUNA16's evaluation has it; beyond the last point that one's.
    """
    # Of the thresholds that share a rate the lowest has the highest sensitivity: the last of them.
    last = np.append(curve.rates[1:] != curve.rates[:-1], True)
    return np.interp(np.asarray(rates, np.float64), curve.rates[last], curve.sensitivity[last])


def cpm(curve: Curve, rates: Sequence[float] = LUNA_RATES) -> float:
    """Competition performance metric: the mean sensitivity at `rates`, LUNA16's seven from 1/8 to 8 by default."""
    return float(sensitivity_at(curve, rates).mean())


def detection_average_precision(found: np.ndarray, false: np.ndarray) -> float:
    """Average precision of findings, Σ (R_n - R_{n-1}) P_n over falling scores; nan without lesions.

    Args: those of `froc`.
    """
    curve = froc(found, false, 1)
    if not len(found):
        return math.nan
    hits = curve.sensitivity * len(found)
    called = hits + curve.rates
    precision = np.divide(hits, called, out=np.ones_like(hits), where=called > 0)
    return float((np.diff(curve.sensitivity, prepend=0.0) * precision).sum())


def _boxes(boxes: np.ndarray) -> np.ndarray:
    found = np.asarray(boxes, np.float64)
    if not found.size:
        return np.zeros((0, 6))
    if found.ndim != 2 or found.shape[1] != 6 or not np.isfinite(found).all() or (found[:, 3:] < 0).any():
        raise UserError(f"boxes must be finite [n, 6] with sizes of at least 0, not {found.shape}")
    return found
