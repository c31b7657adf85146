"""Distance maps on the device, and the boundary loss that needs them.

The targets of a patch exist only after augmentation, inside the jitted step, so their distance maps are computed there
too rather than on the host: an exact Euclidean transform, one axis after the other,

    d²(x) = min_y ( f(y) + (spacing (x - y))² ),   f: 0 on the set, infinite elsewhere, then the axis before

(the min-plus form of Felzenszwalb & Huttenlocher 2012). All pairs (x, y) of an axis are compared, shift by shift, which
is N (X + Y + Z) additions and comparisons for N voxels, without memory beyond a few copies of the map.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

# Stands for infinity: its square root is far beyond any volume, and sums of a few stay finite in float32.
_FAR = 1e12


def distance(mask: Array, spacing: Any = (1.0, 1.0, 1.0), *, limit: int | None = None) -> Array:
    """Euclidean distance in mm of every voxel to the nearest voxel of the mask, between voxel centres.

    Args:
        mask: bool `[B, X, Y, Z, ...]`.
        spacing: `[3]` or `[B, 3]`, mm; may be traced.
        limit: Voxels along an axis that are searched; None: all. What is farther gets too large a distance.

    Returns:
        float32, the mask's shape; 1e6 (no distance) where a mask is empty.
    """
    steps = jnp.broadcast_to(jnp.asarray(spacing, jnp.float32), (len(mask), 3))
    square = jnp.where(mask, 0.0, _FAR)
    for axis in range(3):
        size = mask.shape[axis + 1]
        reach = size - 1 if limit is None else min(limit, size - 1)
        if reach < 1:
            continue
        step = steps[:, axis].reshape(-1, *(1,) * (mask.ndim - 1)) ** 2
        widths = [(0, 0)] * mask.ndim
        widths[axis + 1] = (reach, reach)
        padded = jnp.pad(square, widths, constant_values=_FAR)

        def nearer(k: Array, best: Array, axis=axis, size=size, reach=reach, step=step, padded=padded) -> Array:
            cost = step * jnp.square(k.astype(jnp.float32))
            one = lax.dynamic_slice_in_dim(padded, reach + k, size, axis + 1)
            other = lax.dynamic_slice_in_dim(padded, reach - k, size, axis + 1)
            return jnp.minimum(best, jnp.minimum(one, other) + cost)

        square = lax.fori_loop(1, reach + 1, nearer, square)
    return jnp.where(square < _FAR, jnp.sqrt(square), jnp.sqrt(_FAR))


def signed_distance(mask: Array, spacing: Any = (1.0, 1.0, 1.0), *, limit: int | None = None) -> Array:
    """Signed distance to the mask's boundary in mm: positive outside, negative inside; 0 where there is no boundary.

    Outside: the distance to the mask. Inside: minus the distance to the background, plus the smallest spacing, so that
    the voxels of the mask along its boundary have about 0 (Kervadec et al. subtract one voxel likewise). A mask that
    is empty, or fills the array, has no boundary.

    Returns:
        float32 `[B, X, Y, Z, ...]`.
    """
    mask = mask.astype(bool)
    steps = jnp.broadcast_to(jnp.asarray(spacing, jnp.float32), (len(mask), 3))
    voxel = steps.min(axis=1).reshape(-1, *(1,) * (mask.ndim - 1))
    outside = distance(mask, steps, limit=limit)
    inside = distance(~mask, steps, limit=limit) - voxel
    there = mask.any(axis=(1, 2, 3), keepdims=True) & (~mask).any(axis=(1, 2, 3), keepdims=True)
    return jnp.where(there, jnp.where(mask, -inside, outside), 0.0)


def boundary(
    probabilities: Array, distances: Array, *, include_background: bool = False, mask: Array | None = None
) -> Array:
    """Boundary loss (Kervadec et al. 2019, arXiv:1812.07032): mean over voxels and classes of probability x distance.

    It is negative for a good prediction and says nothing of a class that is absent, so it is added to a region loss,
    with a weight. Distances in mm make it a length: how far off the predicted mass lies on the mean.

    Args:
        probabilities: float `[B, X, Y, Z, K]`.
        distances: `signed_distance` of the target's classes, same shape.
        include_background: Whether class 0 counts (regions: True).
        mask: bool `[B, X, Y, Z]`, voxels that count.

    Returns:
        float32 `[B]`.
    """
    if probabilities.shape != distances.shape:
        raise ValueError(f"distances must have the probabilities' shape {probabilities.shape}, not {distances.shape}")
    term = probabilities.astype(jnp.float32) * lax.stop_gradient(distances)
    if not include_background:
        term = term[..., 1:]
    if mask is None:
        return term.mean(axis=(1, 2, 3, 4))
    voxels = jnp.maximum(mask.astype(jnp.float32).sum(axis=(1, 2, 3)), 1.0)
    return jnp.where(mask[..., None], term, 0.0).sum(axis=(1, 2, 3)).mean(axis=-1) / voxels
