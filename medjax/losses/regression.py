"""Losses of numbers, with and without uncertainty. One value per example, float32 `[B]`: the mean over known entries.

A target entry that is NaN is unknown: it adds nothing and has gradient 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

# Bounds of the log variance: outside them exp() would drown every other loss, or overflow.
LOG_VARIANCE = (-10.0, 10.0)


def squared_error(prediction: Array, target: Array) -> Array:
    """Mean of (prediction - target)²; both `[B, K]`."""
    target, known = _known(target)
    return _mean(jnp.square(prediction.astype(jnp.float32) - target), known)


def smooth_l1(prediction: Array, target: Array, *, beta: float = 1.0) -> Array:
    """Mean smooth L1 (Girshick 2015): d² / (2 beta) where |d| < beta, else |d| - beta / 2; both `[B, K]`."""
    target, known = _known(target)
    return _mean(smooth_l1_terms(prediction.astype(jnp.float32) - target, beta), known)


def smooth_l1_terms(difference: Array, beta: float = 1.0) -> Array:
    """Smooth L1 of each difference."""
    size = jnp.abs(difference)
    if beta == 0:
        return size
    return jnp.where(size < beta, 0.5 * jnp.square(difference) / beta, size - 0.5 * beta)


def gaussian_nll(mean: Array, log_variance: Array, target: Array) -> Array:
    """Negative log likelihood of a Gaussian whose variance is predicted too (Nix & Weigend 1994), without the constant.

        ½ (log σ² + (mean - target)² / σ²)

    Args:
        mean: float `[B, K]`.
        log_variance: float `[B, K]`, log σ²; cut to `LOG_VARIANCE`.
        target: `[B, K]`, NaN is unknown.
    """
    target, known = _known(target)
    spread = jnp.clip(log_variance.astype(jnp.float32), *LOG_VARIANCE)
    error = jnp.square(mean.astype(jnp.float32) - target)
    return _mean(0.5 * (spread + error * jnp.exp(-spread)), known)


def pinball(quantiles: Array, target: Array, levels: Sequence[float]) -> Array:
    """Quantile loss (Koenker & Bassett 1978): level (t - q) where t is above q, (1 - level) (q - t) below.

    Args:
        quantiles: float `[B, K, Q]`.
        target: `[B, K]`, NaN is unknown.
        levels: Q numbers in (0, 1).
    """
    target, known = _known(target)
    below = target[..., None] - quantiles.astype(jnp.float32)
    level = np.asarray(levels, np.float32)
    return _mean(jnp.maximum(level * below, (level - 1.0) * below).mean(axis=-1), known)


def ordered_quantiles(outputs: Array, levels: Sequence[float]) -> Array:
    """[..., Q] free numbers -> [..., Q] quantiles that never cross.

    The number of the level nearest ½ is the quantile itself; the others are softplus steps away from it, 0 giving a
    step of log 2.
    """
    middle = int(np.argmin(np.abs(np.asarray(levels) - 0.5)))
    x = outputs.astype(jnp.float32)
    step = jax.nn.softplus(x)
    below = jnp.cumsum(step[..., :middle][..., ::-1], axis=-1)[..., ::-1]
    above = jnp.cumsum(step[..., middle + 1 :], axis=-1)
    centre = x[..., middle : middle + 1]
    return jnp.concatenate([centre - below, centre, centre + above], axis=-1)


def gaussian_quantile(level: float) -> float:
    """Half width, in standard deviations, of the central interval that holds `level` of a Gaussian: 1.96 for 0.95."""
    return math.sqrt(2.0) * _inverse_erf(level)


def _inverse_erf(y: float) -> float:
    low, high = 0.0, 6.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if math.erf(middle) < y else (low, middle)
    return (low + high) / 2


def _known(target: Array) -> tuple[Array, Array]:
    target = jnp.asarray(target, jnp.float32)
    known = ~jnp.isnan(target)
    return jnp.where(known, target, 0.0), known


def _mean(terms: Array, known: Array) -> Array:
    return jnp.where(known, terms, 0.0).sum(axis=-1) / jnp.maximum(known.sum(axis=-1), 1)
