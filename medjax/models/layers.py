"""Layers every 3D backbone is made of. Arrays are [B, X, Y, Z, C]; parameters are float32, computation is `dtype`."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from medjax.ops import conv3d as ops
from medjax.ops.norm import instance_norm_act


def he_normal(key: Array, shape: Sequence[int], dtype: Any = jnp.float32, *, fan_in: int | None = None) -> Array:
    """Normal with variance 2 / (1 + 0.01²) / fan-in: He et al. 2015 for leaky ReLU with slope 0.01, as nnU-Net does.

    Args:
      fan_in: inputs an output sums over; by default all axes of `shape` but the last.
    """
    fan_in = fan_in or math.prod(shape[:-1])
    # Drawn flat: XLA takes ten times longer to compile the same draw in five dimensions.
    draw = jax.random.normal(key, (math.prod(shape),), dtype).reshape(shape)
    return draw * math.sqrt(2.0 / (1.0 + 0.01**2) / fan_in)


class Conv3D(nn.Module):
    """3D convolution through `medjax.ops.conv3d`.

    Attributes:
      features: output channels. kernel, strides, dilation: three ints, one an axis.
      padding: 'SAME', 'VALID' or ((lo, hi),) * 3.
    """

    features: int
    kernel: Sequence[int] = (3, 3, 3)
    strides: Sequence[int] = (1, 1, 1)
    dilation: Sequence[int] = (1, 1, 1)
    groups: int = 1
    padding: Any = "SAME"
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Any = he_normal

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (*self.kernel, x.shape[-1] // self.groups, self.features)
        w = self.param("kernel", self.kernel_init, shape, jnp.float32).astype(self.dtype)
        b = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32) if self.use_bias else None
        return ops.conv3d(
            x.astype(self.dtype),
            w,
            tuple(self.strides),
            self.padding,
            tuple(self.dilation),
            self.groups,
            None if b is None else b.astype(self.dtype),
        )


class PatchConv(nn.Module):
    """Downsampling: a dense map over cells of `factor` voxels (kernel = stride), [B, X, ...] -> [B, X/f, ...]."""

    features: int
    factor: Sequence[int] = (2, 2, 2)
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        w = self.param("kernel", he_normal, (*self.factor, x.shape[-1], self.features), jnp.float32)
        b = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32) if self.use_bias else None
        return ops.patch_conv(x.astype(self.dtype), w.astype(self.dtype), None if b is None else b.astype(self.dtype))


class PatchConvTranspose(nn.Module):
    """Upsampling: every voxel becomes a cell of `factor` voxels by a dense map (transposed conv, kernel = stride)."""

    features: int
    factor: Sequence[int] = (2, 2, 2)
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        # Every output voxel sums over the input channels alone, so the fan-in is C, not C times the cell.
        init = functools.partial(he_normal, fan_in=x.shape[-1])
        w = self.param("kernel", init, (*self.factor, x.shape[-1], self.features), jnp.float32)
        b = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32) if self.use_bias else None
        x = x.astype(self.dtype)
        return ops.patch_conv_transpose(x, w.astype(self.dtype), None if b is None else b.astype(self.dtype))


class InstanceNormAct(nn.Module):
    """Instance normalisation (Ulyanov et al. 2016) over the voxels of each example and channel, then leaky ReLU.

    Attributes:
      negative_slope: of the leaky ReLU; None leaves the activation out.
    """

    negative_slope: float | None = 0.01
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        return instance_norm_act(x, scale, bias, negative_slope=self.negative_slope, eps=self.eps)


class ConvBlock(nn.Module):
    """Convolution, instance normalisation, leaky ReLU. The bias is left to the normalisation."""

    features: int
    kernel: Sequence[int] = (3, 3, 3)
    strides: Sequence[int] = (1, 1, 1)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Conv3D(self.features, self.kernel, self.strides, use_bias=False, dtype=self.dtype, name="conv")(x)
        return InstanceNormAct(name="norm")(x)
