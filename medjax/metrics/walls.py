"""Walls around a cavity, slice by slice: how thick, and how far from the middle (the heart's short axis, a vessel)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from medjax.errors import UserError

ANGLES = 72
_STEP = 0.25  # of the finest pixel edge, along a ray
_CLOSED = 0.95  # share of rays that must meet the wall: where the ring is open (the heart's base) a slice has no wall


class Wall(NamedTuple):
    """Along rays from the middle of the cavity in each slice; NaN in slices without a closed ring.

    Attributes:
      thickness: mm of wall on the ray, [slices, angles]. radius: mm of cavity on the ray.
      closed: share of the rays that meet the wall, [slices]; 0 where there is no cavity.
    """

    thickness: np.ndarray
    radius: np.ndarray
    closed: np.ndarray


def slice_axis(spacing: Sequence[float]) -> int:
    """The axis across the slices: the one of the largest voxel edge; UserError where no edge is clearly the largest."""
    longest = int(np.argmax(spacing))
    others = [s for axis, s in enumerate(spacing) if axis != longest]
    if spacing[longest] < 1.5 * max(others):
        listed = " x ".join(f"{s:.4g}" for s in spacing)
        raise UserError(
            f"voxels of {listed} mm: no axis is clearly the one across the slices, so walls have no plane to be "
            "measured in; measure on the thick slices they were drawn on"
        )
    return longest


def wall(
    wall: np.ndarray,
    cavity: np.ndarray,
    spacing: Sequence[float],
    *,
    axis: int | None = None,
    angles: int = ANGLES,
) -> Wall:
    """Thickness of a wall along rays from the centroid of the cavity, in each slice.

    The masks are interpolated linearly along the rays, so that a ring of any radius has its own thickness to a few
    hundredths of a pixel in the mean over angles. On a ring that is not round a ray crosses the wall obliquely and is
    longer than the shortest distance through it (by 1 / cos of the angle; a tenth at 25 degrees).

    Args:
      wall, cavity: bool [X, Y, Z], disjoint. spacing: mm. axis: across the slices; None: `slice_axis`.
      angles: number of rays; ray k points 2 pi k / angles from the first of the plane's axes towards the second.
    """
    axis = slice_axis(spacing) if axis is None else axis
    edges = np.array([s for i, s in enumerate(spacing) if i != axis])
    walls, cavities = np.moveaxis(wall, axis, 0), np.moveaxis(cavity, axis, 0)
    thickness, radius = np.full((2, len(walls), angles), math.nan)
    closed = np.zeros(len(walls))
    for i, (ring, inside) in enumerate(zip(walls, cavities, strict=True)):
        if not ring.any() or not inside.any():
            continue
        middle = np.argwhere(inside).mean(axis=0)
        step = _STEP * edges.min()
        far = np.abs((np.argwhere(ring | inside) - middle) * edges).max() * math.sqrt(2) + edges.max()
        reach = (np.arange(math.ceil(far / step)) + 0.5) * step
        turn = 2 * math.pi * np.arange(angles) / angles
        places = np.stack([np.cos(turn), np.sin(turn)])[..., None] * reach / edges[:, None, None]  # [2, angles, reach]
        places += middle[:, None, None]
        through = _linear(ring, places).sum(axis=-1) * step
        closed[i] = (through > edges.min() / 2).mean()
        if closed[i] >= _CLOSED:
            thickness[i], radius[i] = through, _linear(inside, places).sum(axis=-1) * step
    return Wall(thickness, radius, closed)


def _linear(mask: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The mask [X, Y] between its pixels, at `places` [2, ...] in pixels; 0 outside."""
    from scipy import ndimage

    return ndimage.map_coordinates(mask.astype(np.float32), places, order=1, mode="constant")
