"""Losses of pretraining that compare views: two views of an example belong together, those of others do not."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

_NOTHING = -1e9  # logit of what may not be chosen
_EPS = 1e-4


def unit(x: Array) -> Array:
    """Vectors of the last axis over their length, in float32."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-12))


def info_nce(a: Array, b: Array, temperature: float, counted: Array, which: Array | None = None) -> tuple[Array, Array]:
    """NT-Xent (Chen et al. 2020): each of the 2 N vectors must find its partner among the 2 N - 1 others.

    Args:
      a, b: [N, D], rows i of both belong together. temperature: of the softmax over cosines.
      counted: bool [N]; rows that do not count are nobody's negatives.
      which: int [2 N], of `a`, then of `b`: vectors of one number are the same vector. A vector is then no negative of
        itself, nor its partner's double of the partner.

    Returns:
      `(loss, found)` [N]: the mean of the two directions; the share of the two whose partner is the nearest,
      0 where there is nothing else.
    """
    z = unit(jnp.concatenate([a, b]))
    n = a.shape[0]
    logits = z @ z.T / temperature
    there = jnp.concatenate([counted, counted])
    partner = jnp.roll(jnp.eye(2 * n, dtype=bool), n, axis=1)
    barred = jnp.eye(2 * n, dtype=bool)
    if which is not None:
        same = which[:, None] == which[None, :]
        barred |= (same | jnp.roll(same, n, axis=0)) & ~partner
    logits = jnp.where(there[None, :] & ~barred, logits, _NOTHING)
    right = jnp.where(partner, logits, 0.0).sum(1)
    best = jnp.where(partner, _NOTHING, logits).max(1)
    top = lax.stop_gradient(logits.max(1, keepdims=True))
    loss = jnp.log(jnp.exp(logits - top).sum(1)) + top[:, 0] - right
    found = (right > best) & (best > _NOTHING)
    return loss.reshape(2, n).mean(0), found.astype(jnp.float32).reshape(2, n).mean(0)


def vicreg(a: Array, b: Array, counted: Array, weights: tuple[float, float, float] = (25.0, 25.0, 1.0)) -> Array:
    """VICReg (Bardes et al. 2022): equal views, features that vary over the batch, features that do not repeat.

    Args:
      a, b: [N, D], rows i of both belong together. counted: bool [N], rows that are real.
      weights: of invariance, variance and covariance.

    Returns:
      float32 [N]. Variance and covariance are of the batch: the same number for each row.
    """
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    invariance = jnp.square(a - b).mean(-1)
    spread, overlap = zip(*(_variance_covariance(x, counted) for x in (a, b)), strict=True)
    batch = weights[1] * sum(spread) / 2 + weights[2] * sum(overlap)
    return weights[0] * invariance + batch


def _variance_covariance(x: Array, counted: Array) -> tuple[Array, Array]:
    """The hinge of the standard deviations at 1, and the squares of the covariances off the diagonal over D."""
    weight = counted.astype(jnp.float32)[:, None]
    number = jnp.maximum(weight.sum(), 1.0)
    centred = jnp.where(weight > 0, x - (weight * x).sum(0) / number, 0.0)
    covariance = centred.T @ centred / jnp.maximum(number - 1, 1.0)
    variance = jnp.diagonal(covariance)
    hinge = jnp.maximum(0.0, 1.0 - jnp.sqrt(variance + _EPS)).mean()
    return hinge, (jnp.square(covariance).sum() - jnp.square(variance).sum()) / x.shape[1]
