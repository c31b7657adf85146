"""Losses of detection: heat maps of centres, and boxes in 3D.

Heat map logits and targets are `[B, X, Y, Z, K]`; a target is 1 at a centre and falls off around it. Losses are sums
over voxels divided by a number that does not depend on the patch's size, one value per example, float32 `[B]`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def heat_focal(
    logits: Array, targets: Array, counted: Array | None = None, *, alpha: float = 2.0, beta: float = 4.0
) -> Array:
    """Penalty-reduced focal loss (Law & Deng 2018, arXiv:1808.01244; CenterNet, Zhou et al. 2019, arXiv:1904.07850).

        -1/N Σ  (1 - p)^alpha log p               where the target is 1
                (1 - t)^beta p^alpha log(1 - p)   elsewhere

    N is the number of voxels where the target is 1 (at least 1).

    Args:
        logits: float `[B, X, Y, Z, K]`.
        targets: in [0, 1], same shape.
        counted: bool `[B, X, Y, Z]`, voxels that count.
    """
    x, t = logits.astype(jnp.float32), targets.astype(jnp.float32)
    p, centre = jax.nn.sigmoid(x), t >= 1.0
    at = (1.0 - p) ** alpha * -jax.nn.log_sigmoid(x)
    off = (1.0 - t) ** beta * p**alpha * -jax.nn.log_sigmoid(-x)
    if counted is not None:
        centre = centre & counted[..., None]
        off = jnp.where(counted[..., None], off, 0.0)
    return _sum(jnp.where(centre, at, jnp.where(t >= 1.0, 0.0, off))) / jnp.maximum(_sum(centre), 1.0)


def heat_bce(logits: Array, targets: Array, mass: Array | float, counted: Array | None = None) -> Array:
    """Binary cross-entropy against the heat itself, less the target's entropy: 0 for a perfect map.

    Its minimum is where the probability equals the heat, so a centroid of the map is unbiased.

    Args:
        logits: float `[B, X, Y, Z, K]`.
        targets: in [0, 1], same shape.
        mass: `[B]` or a number: what the sum is divided by, say the sum of one Gaussian.
        counted: bool `[B, X, Y, Z]`, voxels that count.
    """
    x, t = logits.astype(jnp.float32), targets.astype(jnp.float32)
    loss = jnp.maximum(x, 0.0) - x * t + jnp.log1p(jnp.exp(-jnp.abs(x))) - _entropy(t)
    if counted is not None:
        loss = jnp.where(counted[..., None], loss, 0.0)
    return _sum(loss) / mass


def heat_bce_mse(
    logits: Array, targets: Array, mass: Array | float, counted: Array | None = None, *, mse: float = 1.0
) -> Array:
    """`heat_bce` + `mse` · Σ (p - t)² / mass."""
    error = jnp.square(jax.nn.sigmoid(logits.astype(jnp.float32)) - targets)
    if counted is not None:
        error = jnp.where(counted[..., None], error, 0.0)
    return heat_bce(logits, targets, mass, counted) + mse * _sum(error) / mass


def giou(a: Array, b: Array) -> Array:
    """Generalised intersection over union of boxes in 3D (Rezatofighi et al. 2019, arXiv:1902.09630), in [-1, 1].

        IoU - (hull - union) / hull,   hull: the smallest box that holds both

    Args:
        a, b: float `[..., 6]`: centre (x, y, z) and full size (x, y, z), sizes >= 0. Boxes without volume give 0
            where they coincide.

    Returns:
        float32 `[...]`.
    """
    (low_a, high_a), (low_b, high_b) = _corners(a), _corners(b)
    overlap = jnp.prod(jnp.maximum(jnp.minimum(high_a, high_b) - jnp.maximum(low_a, low_b), 0.0), axis=-1)
    union = jnp.prod(high_a - low_a, axis=-1) + jnp.prod(high_b - low_b, axis=-1) - overlap
    hull = jnp.prod(jnp.maximum(high_a, high_b) - jnp.minimum(low_a, low_b), axis=-1)
    tiny = 1e-9
    return overlap / jnp.maximum(union, tiny) - (hull - union) / jnp.maximum(hull, tiny)


def giou_loss(a: Array, b: Array) -> Array:
    """1 - `giou`, in [0, 2]."""
    return 1.0 - giou(a, b)


def _corners(boxes: Array) -> tuple[Array, Array]:
    centre, half = boxes[..., :3].astype(jnp.float32), boxes[..., 3:6].astype(jnp.float32) / 2.0
    return centre - half, centre + half


def _entropy(t: Array) -> Array:
    inside = (t > 0) & (t < 1)
    safe = jnp.where(inside, t, 0.5)
    return jnp.where(inside, -(safe * jnp.log(safe) + (1 - safe) * jnp.log1p(-safe)), 0.0)


def _sum(term: Array) -> Array:
    return term.astype(jnp.float32).sum(axis=(3, 4)).sum(axis=(1, 2))
