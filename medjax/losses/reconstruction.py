"""Losses of pretraining that predict an image, block by block, over those voxels alone that are to be predicted."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

_EPS = 1e-6
_FLOOR = 0.05  # least deviation of a block, in that of its image


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


def weights(image: Array, counted: Array, channels: Array) -> Array:
    """Which voxels are to be predicted, block by block: bool [B, GX, GY, GZ, V, C].

    Voxels that are exactly 0 in all real channels are not: they lie outside of the volume (what a patch or a warp fills
    in), or are background that normalisation has set to 0.

    Args:
      image: [B, X, Y, Z, C]. counted: bool [B, GX, GY, GZ], blocks. channels: bool [B, C], those that are real.
    """
    inside = jnp.any((image != 0) & channels[:, None, None, None, :], axis=-1, keepdims=True)
    blocks = to_blocks(inside, counted.shape[1:]) & counted[..., None, None]
    return blocks & channels[:, None, None, None, None, :]


def moments(blocks: Array, weight: Array, axes: Sequence[int] = (4,)) -> tuple[Array, Array]:
    """Mean and standard deviation (of variance + 1e-6) over what counts of some axes, which stay with length 1.

    Args:
      blocks: float32 [B, GX, GY, GZ, V, C]. weight: as of `weights`. axes: of each block alone (4), or (1, 2, 3, 4).
    """
    number = jnp.maximum(weight.sum(axes, keepdims=True), 1)
    mean = jnp.where(weight, blocks, 0.0).sum(axes, keepdims=True) / number
    square = jnp.where(weight, jnp.square(blocks - mean), 0.0)
    return mean, jnp.sqrt(square.sum(axes, keepdims=True) / number + _EPS)


def block_moments(blocks: Array, weight: Array) -> tuple[Array, Array]:
    """The moments of each block and channel that 'normalize' goes by, [B, GX, GY, GZ, 1, C].

    The deviation is at least 0.05 of the image's own, its channel's over all that counts: a block of flat air would
    else be as much to predict as one of tissue, and be its noise.
    """
    mean, std = moments(blocks, weight)
    return mean, jnp.maximum(std, _FLOOR * moments(blocks, weight, (1, 2, 3, 4))[1])


def targets(image: Array, weight: Array, normalize: bool) -> Array:
    """What is to be predicted, float32 [B, GX, GY, GZ, V, C].

    `normalize`: each block less its mean, over its standard deviation, per channel (He et al. 2022), both over what
    counts (`block_moments`).
    """
    blocks = to_blocks(image.astype(jnp.float32), weight.shape[1:4])
    if normalize:
        mean, std = block_moments(blocks, weight)
        blocks = (blocks - mean) / std
    return blocks


def error(prediction: Array, wanted: Array, weight: Array, objective: str) -> Array:
    """The mean error of each example over what counts, float32 [B]; 0 where nothing does.

    Args:
      prediction, wanted: float32 [B, GX, GY, GZ, V, C], or what broadcasts to it. weight: as of `weights`.
      objective: 'l2', squared (He et al. 2022), or 'l1', absolute (Xie et al. 2022).
    """
    # `where`, not a product: what does not count may be anything, and gets no gradient.
    difference = jnp.where(weight, prediction - wanted, 0.0)
    return mean_of(jnp.square(difference) if objective == "l2" else jnp.abs(difference), weight)


def mean_of(values: Array, weight: Array) -> Array:
    """The mean of values [B, GX, GY, GZ, V, C] over what counts, [B]; 0 where nothing does."""
    axes = tuple(range(1, 6))
    return jnp.where(weight, values, 0.0).sum(axes) / jnp.maximum(weight.sum(axes), 1)
