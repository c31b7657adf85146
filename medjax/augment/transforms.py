"""Transforms of one example. Each takes a key and image [X, Y, Z, C]; spatial ones take its masks and spacing too."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from medjax.ops import warp


def mirror(key: Array, arrays: Sequence[Array], axes: Sequence[int]) -> list[Array]:
    """Flips all arrays [X, Y, Z, ...] together along each of `axes` with probability ½."""
    out = list(arrays)
    for axis, k in zip(axes, jax.random.split(key, max(1, len(axes))), strict=False):
        out = jax.lax.cond(jax.random.bernoulli(k), lambda a, axis=axis: [jnp.flip(x, axis) for x in a], list, out)
    return out


def affine(
    key: Array, image: Array, masks: Sequence[Array], spacing: Array, rotate: float, scale: float
) -> tuple[Array, list[Array]]:
    """Rotation about the patch's centre and isotropic scaling, both in physical space.

    Args:
      masks: [X, Y, Z], taken at the nearest voxel. spacing: millimetres [3].
      rotate: degrees; each of three Euler angles is uniform in ±rotate. scale: factor uniform in 1 ± scale.
    """
    k_angle, k_scale = jax.random.split(key)
    a, b, c = jnp.deg2rad(jax.random.uniform(k_angle, (3,), minval=-rotate, maxval=rotate))
    rx = jnp.array([[1, 0, 0], [0, jnp.cos(a), -jnp.sin(a)], [0, jnp.sin(a), jnp.cos(a)]])
    ry = jnp.array([[jnp.cos(b), 0, jnp.sin(b)], [0, 1, 0], [-jnp.sin(b), 0, jnp.cos(b)]])
    rz = jnp.array([[jnp.cos(c), -jnp.sin(c), 0], [jnp.sin(c), jnp.cos(c), 0], [0, 0, 1]])
    factor = jax.random.uniform(k_scale, minval=1 - scale, maxval=1 + scale)
    # Millimetres are turned, not voxels: with anisotropic voxels the two differ.
    matrix = (rx @ ry @ rz) * spacing[None, :] / spacing[:, None] / factor
    centre = (jnp.asarray(image.shape[:3], jnp.float32) - 1) / 2
    x, y, z = (warp.grid(image.shape[:3])[..., i] - centre[i] for i in range(3))
    at = jnp.stack([matrix[i, 0] * x + matrix[i, 1] * y + matrix[i, 2] * z + centre[i] for i in range(3)], axis=-1)
    return warp.sample_linear(image, at), [warp.sample_nearest(m, at) for m in masks]


def brightness(key: Array, image: Array, std: float) -> Array:
    """Adds to each channel a constant from N(0, std)."""
    return image + std * jax.random.normal(key, (image.shape[-1],), image.dtype)


def contrast(key: Array, image: Array, low: float, high: float) -> Array:
    """Stretches each channel about its mean by a factor uniform in [low, high]."""
    mean = image.mean((0, 1, 2), keepdims=True)
    factor = jax.random.uniform(key, (image.shape[-1],), image.dtype, low, high)
    return (image - mean) * factor + mean


def gamma(key: Array, image: Array, low: float, high: float) -> Array:
    """Power law on each channel rescaled to 0..1, log-uniform in [low, high]; mean and deviation are kept."""
    power = jnp.exp(jax.random.uniform(key, (image.shape[-1],), image.dtype, jnp.log(low), jnp.log(high)))
    bottom, top = image.min((0, 1, 2)), image.max((0, 1, 2))
    mean, std = image.mean((0, 1, 2)), image.std((0, 1, 2))
    out = ((image - bottom) / jnp.maximum(top - bottom, 1e-6)) ** power
    return (out - out.mean((0, 1, 2))) / jnp.maximum(out.std((0, 1, 2)), 1e-6) * std + mean


def noise(key: Array, image: Array, std: float) -> Array:
    """Adds Gaussian noise whose deviation is uniform in [0, std]."""
    k_std, k_noise = jax.random.split(key)
    # Drawn flat: the same draw in four dimensions takes XLA far longer to compile.
    draw = jax.random.normal(k_noise, (image.size,), image.dtype).reshape(image.shape)
    return image + jax.random.uniform(k_std, maxval=std) * draw
