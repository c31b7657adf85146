"""Findings in arrays: where the instances of a patch lie after augmentation, heat maps of them, and peaks of a map.

A batch has an instance mask `<task>/target` int [B, X, Y, Z] (0 background, i the i-th row of the table) and
`<task>/table` f32[B, M, 7 + A], NaN where a case has fewer rows: label in column 6, attributes from column 7 on.
Places and sizes of a patch come from the mask alone, because cropping and augmentation move it and not the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from medjax.errors import warn_once

LABEL = 6
"""Column of the label in a table of findings; attributes follow."""

ABSENT, WHOLE, CUT = 0, 1, 2

_POINT = 2.0  # voxels: radius of the ball that stands for a point (`medjax.data.targets`)


class Located(NamedTuple):
    """The instances of each patch.

    Attributes:
      centre: f32[B, M, 3], centre of mass in voxels of the patch.
      size: f32[B, M, 3], full extents in voxels along the axes.
      state: i32[B, M]: ABSENT, WHOLE, or CUT by the patch's border.
    """

    centre: Array
    size: Array
    state: Array


def locate(mask: Array, count: int, before: Array | None = None) -> Located:
    """Places and sizes of instances 1 to `count` of a mask int [B, X, Y, Z].

    `before`, bool [B, count]: those that were cut already before the patch was augmented; a part of them is left.

    Instances are ellipsoids (`medjax.data.targets.instances`), turned and stretched by augmentation: along an axis a
    full ellipsoid of extent 2r has variance r²/5, so the extent is √(20 · variance), at least one voxel. Unlike a
    bounding box it takes fractions of a voxel into account.
    """

    def one(number: Array) -> Located:
        inside = mask == number
        plane = inside.astype(jnp.float32).sum(axis=3)
        profiles = (plane.sum(axis=2), plane.sum(axis=1), inside.astype(jnp.float32).sum(axis=(1, 2)))
        voxels = profiles[0].sum(axis=1)
        centres, sizes, cut = [], [], jnp.zeros(len(mask), bool)
        for profile in profiles:
            share = profile / jnp.maximum(voxels, 1.0)[:, None]
            index = jnp.arange(profile.shape[1], dtype=jnp.float32)
            centre = (share * index).sum(axis=1)  # a product of matrices is of 8 to 11 bits on accelerators
            variance = (share * jnp.square(index - centre[:, None])).sum(axis=1)
            centres.append(centre)
            sizes.append(jnp.sqrt(jnp.maximum(20.0 * variance, 1.0)))
            cut |= (profile[:, 0] > 0) | (profile[:, -1] > 0)
        state = jnp.where(voxels == 0, ABSENT, jnp.where(cut, CUT, WHOLE))
        return Located(jnp.stack(centres, -1), jnp.stack(sizes, -1), state.astype(jnp.int32))

    found = lax.map(one, jnp.arange(1, count + 1, dtype=mask.dtype))
    found = Located(*(jnp.swapaxes(part, 0, 1) for part in found))
    if before is None:
        return found
    return found._replace(state=jnp.where(before & (found.state == WHOLE), CUT, found.state))


def gaussian(shape: tuple[int, ...], centre: Array, sigma: Array) -> Array:
    """f32[B, X, Y, Z]: exp(-½ Σ ((voxel - centre) / sigma)²); centre and sigma [B, 3] in voxels."""
    x, y, z = (
        jnp.exp(-0.5 * jnp.square((jnp.arange(n) - centre[:, a, None]) / sigma[:, a, None]))
        for a, n in enumerate(shape)
    )
    return x[:, :, None, None] * y[:, None, :, None] * z[:, None, None, :]


def heat_maps(shape: tuple[int, ...], centre: Array, sigma: Array, channel: Array, channels: int) -> Array:
    """The largest of the instances' Gaussians at each voxel, f32[B, X, Y, Z, channels].

    Args:
      centre, sigma: [B, M, 3] in voxels.
      channel: int [B, M], which map an instance belongs to; one that is out of range belongs to none.
    """

    def add(heat: Array, item: tuple[Array, ...]) -> tuple[Array, None]:
        at, width, where = item
        own = (where[:, None] == jnp.arange(channels)).astype(jnp.float32)
        bump = gaussian(shape, at, width)[..., None] * own[:, None, None, None, :]
        return jnp.maximum(heat, bump), None

    empty = jnp.zeros((len(centre), *shape, channels))
    items = tuple(jnp.swapaxes(part, 0, 1) for part in (centre, sigma, channel))
    return lax.scan(add, empty, items)[0]


def state_of(mask: Array, state: Array) -> Array:
    """i32[B, X, Y, Z]: the state of the instance that each voxel belongs to; 0 for the background."""
    table = jnp.pad(state, ((0, 0), (1, 0)))
    return jax.vmap(lambda row, m: row[m])(table, mask.astype(jnp.int32))


def around(outputs: Array, centre: Array) -> tuple[Array, Array, Array]:
    """What the network says in the 27 voxels around each centre.

    Args:
      outputs: [B, X, Y, Z, K]. centre: f32[B, M, 3], voxels.

    Returns:
      `(values, voxels, inside)`: [B, M, 27, K], i32[B, M, 27, 3] and whether a voxel is in the patch, bool [B, M, 27].
    """
    shape = np.asarray(outputs.shape[1:4])
    steps = np.stack(np.meshgrid(*(np.arange(-1, 2),) * 3, indexing="ij"), -1).reshape(27, 3)
    middle = jnp.clip(jnp.round(centre).astype(jnp.int32), 0, shape - 1)
    voxels = middle[:, :, None] + steps
    inside = ((voxels >= 0) & (voxels < shape)).all(axis=-1)
    kept = jnp.clip(voxels, 0, shape - 1)
    flat = (kept[..., 0] * shape[1] + kept[..., 1]) * shape[2] + kept[..., 2]
    rows = outputs.reshape(len(outputs), -1, outputs.shape[-1])
    return jax.vmap(lambda r, i: r[i])(rows, flat), voxels, inside


def peaks(heat: np.ndarray, least: float, limit: int = 20000) -> np.ndarray:
    """Voxels of a map [X, Y, Z] that no one of their 26 neighbours exceeds, int [n, 3], from the highest down.

    Only values of `least` or more. All voxels of a plateau are peaks. Of more than `limit` peaks the highest: voxels on
    the slopes of a large one take no place of a small one's.
    """
    flat = heat.ravel()
    index = np.flatnonzero(heat >= least)
    if len(index) > limit:  # of many voxels a filter of the whole map is cheaper than a look around each
        from scipy import ndimage

        index = index[flat[index] >= ndimage.maximum_filter(heat, 3, mode="nearest").ravel()[index]]
    else:
        x, y, z = np.unravel_index(index, heat.shape)
        top = np.ones(len(index), bool)
        for i, j, k in np.ndindex(3, 3, 3):
            beside = [np.clip(v + d - 1, 0, n - 1) for v, d, n in zip((x, y, z), (i, j, k), heat.shape, strict=True)]
            top &= heat[tuple(beside)] <= flat[index]
        index = index[top]
    order = np.argsort(-flat[index], kind="stable")[:limit]
    return np.stack(np.unravel_index(index[order], heat.shape), axis=-1)


def affine_of(geometry: Any) -> np.ndarray:
    """[4, 4] float64, prepared voxel -> world mm; the identity without a geometry."""
    return np.eye(4) if geometry is None else np.asarray(geometry.affine, np.float64)


def spacing_of(affine: np.ndarray) -> np.ndarray:
    """Voxel size in mm, float64 [3]."""
    return np.linalg.norm(affine[:3, :3], axis=0)


def to_world(centres: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Voxels [n, 3] -> world mm [n, 3]."""
    return centres @ affine[:3, :3].T + affine[:3, 3]


def sizes_to_world(sizes: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Extents [n, 3] in mm of ellipsoids along the grid's axes -> along the world's axes."""
    turn = affine[:3, :3] / spacing_of(affine)
    return np.sqrt(np.square(sizes) @ np.square(turn).T)


def reach(sizes: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """How far ellipsoids of full extents [n, 3] (mm, along the world's axes) reach along the grid's: voxels [n, 3]."""
    return np.sqrt(np.square(sizes / 2) @ np.square(np.linalg.inv(affine[:3, :3])).T)


def hidden(rows: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Share of each finding [M, >= 6] that lies under others in an instance mask (`medjax.data.targets.instances`).

    Smaller ones lie over larger ones, and a place in the balls of several points is of the nearest.
    """
    matrix = affine[:3, :3]
    centres, half = np.asarray(rows[:, :3], np.float64), np.asarray(rows[:, 3:6], np.float64) / 2
    points: np.ndarray = np.asarray((half <= 0).any(axis=1))
    volumes = np.where(points, (2 * _POINT) ** 3 * abs(np.linalg.det(matrix)), 8 * half.prod(axis=1))
    order = np.empty(len(rows), int)
    order[np.argsort(-volumes, kind="stable")] = np.arange(len(rows))
    radii = np.where(points, _POINT * spacing_of(affine).max(), half.max(axis=1, initial=0.0))
    ball = np.stack(np.meshgrid(*(np.linspace(-1, 1, 13),) * 3, indexing="ij"), -1).reshape(-1, 3)
    ball = ball[(ball**2).sum(axis=1) <= 1]
    shares = np.zeros(len(rows))
    for i in range(len(rows)):
        near = np.linalg.norm((centres - centres[i]) @ matrix.T, axis=1) < radii + radii[i]
        near[i] = False
        steps = ball * _POINT if points[i] else (ball * half[i]) @ np.linalg.inv(matrix).T  # voxels
        under = np.zeros(len(ball), bool)
        for j in np.flatnonzero(near):
            away = steps + centres[i] - centres[j]
            if points[i] and points[j]:
                under |= (away**2).sum(axis=1) < (steps**2).sum(axis=1)
            elif order[j] > order[i]:
                scaled = away / _POINT if points[j] else away @ matrix.T / half[j]
                under |= (scaled**2).sum(axis=1) <= 1
        shares[i] = under.mean()
    return shares


def note_hidden(task: str, known: Sequence[Any]) -> None:
    """Notes findings of which others hide more than a tenth, for what is left of them has another place and size."""
    found = [(one.case, hidden(np.asarray(one.value), affine_of(one.geometry))) for one in known if len(one.value) > 1]
    most = [f"case {case}, finding {i + 1}" for case, shares in found for i in np.flatnonzero(shares > 0.1)]
    if most:
        warn_once(
            f"task '{task}': others hide more than a tenth of {len(most)} of {sum(len(one.value) for one in known)} "
            f"findings (the first: {most[0]}). Training takes them for what is left of them, so their places and sizes "
            "are taught wrong; check whether one is marked twice, or make one of what belongs together"
        )


def reference_rows(value: np.ndarray, geometry: Any) -> np.ndarray:
    """A table of findings as prepared, [M, 7 + A], with its centres in world mm; rows of NaN (padding) left out."""
    rows = np.asarray(value, np.float64)
    rows = rows[~np.isnan(rows[:, LABEL])].copy() if len(rows) else rows.reshape(0, rows.shape[-1])
    rows[:, :3] = to_world(rows[:, :3], affine_of(geometry))
    return rows
