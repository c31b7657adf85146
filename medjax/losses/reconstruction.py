"""Losses of pretraining that predict an image: block by block, so that what is not to be predicted does not count."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

_EPS = 1e-6


def to_blocks(volume: Array, grid: Sequence[int]) -> Array:
    """[B, X, Y, Z, C] -> [B, GX, GY, GZ, BX * BY * BZ, C], the voxels of each block of a grid of so many blocks."""
    n, *space, channels = volume.shape
    size = [s // g for s, g in zip(space, grid, strict=True)]
    split = [v for pair in zip(grid, size, strict=True) for v in pair]
    blocks = volume.reshape(n, *split, channels).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return blocks.reshape(n, *grid, -1, channels)


def from_blocks(blocks: Array, size: Sequence[int]) -> Array:
    """The inverse of `to_blocks` for blocks of `size` voxels."""
    n, *grid, _, channels = blocks.shape
    volume = blocks.reshape(n, *grid, *size, channels).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return volume.reshape(n, *(g * s for g, s in zip(grid, size, strict=True)), channels)


def moments(volume: Array, grid: Sequence[int]) -> tuple[Array, Array]:
    """Mean and standard deviation (of variance + 1e-6) of each block and channel, [B, GX, GY, GZ, C]."""
    blocks = to_blocks(volume.astype(jnp.float32), grid)
    mean = blocks.mean(-2)
    return mean, jnp.sqrt(jnp.square(blocks - mean[..., None, :]).mean(-2) + _EPS)


def block_errors(prediction: Array, image: Array, grid: Sequence[int], objective: str, normalize: bool) -> Array:
    """The mean error of each block and channel.

    Args:
      prediction, image: [B, X, Y, Z, C]. grid: blocks along (x, y, z).
      objective: 'l2', squared (He et al. 2022), or 'l1', absolute (Xie et al. 2022).
      normalize: the target is each block less its mean, over its standard deviation, per channel (He et al. 2022).

    Returns:
      float32 [B, GX, GY, GZ, C].
    """
    wanted = to_blocks(image.astype(jnp.float32), grid)
    if normalize:
        mean, std = moments(image, grid)
        wanted = (wanted - mean[..., None, :]) / std[..., None, :]
    difference = to_blocks(prediction.astype(jnp.float32), grid) - wanted
    return (jnp.square(difference) if objective == "l2" else jnp.abs(difference)).mean(-2)


def counted_mean(errors: Array, counted: Array, channels: Array) -> Array:
    """The mean of block errors over what counts, [B]; 0 where nothing does.

    Args:
      errors: [B, GX, GY, GZ, C]. counted: bool [B, GX, GY, GZ]. channels: bool [B, C], those that are real.
    """
    weight = counted[..., None] & channels[:, None, None, None, :]
    # `where`, not a product: what does not count may be anything, and gets no gradient.
    total = jnp.where(weight, errors, 0.0).sum((1, 2, 3, 4))
    return total / jnp.maximum(weight.sum((1, 2, 3, 4)), 1)
