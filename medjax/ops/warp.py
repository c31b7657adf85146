"""Warping of volumes by coordinates, on the device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array


def grid(shape: Sequence[int]) -> Array:
    """Voxel coordinates float32 [X, Y, Z, 3]."""
    axes = [jnp.arange(n, dtype=jnp.float32) for n in shape]
    return jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1)


def sample_linear(volume: Array, coordinates: Array) -> Array:
    """Trilinear interpolation of volume [X, Y, Z, C] at voxel coordinates [..., 3]; 0 outside."""
    size = jnp.asarray(volume.shape[:3])
    low = jnp.floor(coordinates)
    fraction = coordinates - low
    low = low.astype(jnp.int32)
    out = jnp.zeros((*coordinates.shape[:-1], volume.shape[-1]), volume.dtype)
    for corner in itertools.product((0, 1), repeat=3):
        at = low + jnp.asarray(corner)
        weight = jnp.prod(jnp.where(jnp.asarray(corner, bool), fraction, 1 - fraction), axis=-1)
        weight = weight * jnp.all((at >= 0) & (at < size), axis=-1)
        at = jnp.clip(at, 0, size - 1)
        out += weight[..., None].astype(volume.dtype) * volume[at[..., 0], at[..., 1], at[..., 2]]
    return out


def sample_nearest(volume: Array, coordinates: Array) -> Array:
    """Nearest voxel of volume [X, Y, Z] at voxel coordinates [..., 3]; 0 outside."""
    size = jnp.asarray(volume.shape[:3])
    at = jnp.round(coordinates).astype(jnp.int32)
    inside = jnp.all((at >= 0) & (at < size), axis=-1)
    at = jnp.clip(at, 0, size - 1)
    return jnp.where(inside, volume[at[..., 0], at[..., 1], at[..., 2]], 0)
