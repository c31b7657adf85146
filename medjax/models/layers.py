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

from medjax.errors import UserError
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


class ConvTranspose3D(nn.Module):
    """The adjoint of a strided convolution with centred padding: [B, X, ...] -> [B, (X - 1) * stride + 1, ...].

    Attributes:
      features: output channels; a depthwise convolution (`groups` = channels in = channels out) or a dense one.
    """

    features: int
    kernel: Sequence[int] = (3, 3, 3)
    strides: Sequence[int] = (2, 2, 2)
    groups: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        n, *space, channels = x.shape
        # The kernel is that of the convolution whose adjoint this is: from `features` channels to those of x.
        init = functools.partial(he_normal, fan_in=math.prod(self.kernel) * channels // self.groups)
        shape = (*self.kernel, self.features // self.groups, channels)
        w = self.param("kernel", init, shape, jnp.float32).astype(self.dtype)
        b = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(self.dtype)
        fine = ((size - 1) * step + 1 for size, step in zip(space, self.strides, strict=True))
        image = jax.ShapeDtypeStruct((n, *fine, self.features), self.dtype)

        def down(y: Array) -> Array:
            return ops.conv3d(y, w, tuple(self.strides), centred(self.kernel), groups=self.groups)

        return jax.linear_transpose(down, image)(x.astype(self.dtype))[0] + b


class InstanceNormAct(nn.Module):
    """Instance normalisation (Ulyanov et al. 2016) over the voxels of each example and channel, then leaky ReLU.

    Attributes:
      negative_slope: of the leaky ReLU; None leaves the activation out, 0 is ReLU.
      affine: whether a scale and a bias are learnt.
    """

    negative_slope: float | None = 0.01
    eps: float = 1e-5
    affine: bool = True

    @nn.compact
    def __call__(self, x: Array, visible: Array | None = None) -> Array:
        """`visible`: bool [B, X, Y, Z], voxels that make the statistics, others become 0 (`medjax.models.sparse`)."""
        scale, bias = _affine(self, x.shape[-1], self.affine)
        if visible is not None:
            return _visible_norm(x, visible, x.shape[-1], scale, bias, self.negative_slope, self.eps)
        return instance_norm_act(x, scale, bias, negative_slope=self.negative_slope, eps=self.eps)


class GroupNormAct(nn.Module):
    """Group normalisation (Wu and He 2018) over voxels and channels of each group, then leaky ReLU.

    Attributes:
      groups: how many, where they divide the channels; else the largest number below that does both.
    """

    groups: int = 8
    negative_slope: float | None = 0.01
    eps: float = 1e-5
    affine: bool = True

    @nn.compact
    def __call__(self, x: Array, visible: Array | None = None) -> Array:
        """`visible`: as of `InstanceNormAct`."""
        scale, bias = _affine(self, x.shape[-1], self.affine)
        groups = math.gcd(self.groups, x.shape[-1])
        if visible is not None:
            return _visible_norm(x, visible, groups, scale, bias, self.negative_slope, self.eps)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
        centre = wide - wide.mean((1, 3), keepdims=True)
        scaled = centre * jax.lax.rsqrt(jnp.square(centre).mean((1, 3), keepdims=True) + self.eps)
        return leaky_relu(scaled.reshape(x.shape) * scale + bias, self.negative_slope).astype(x.dtype)


class FrozenBatchNormAct(nn.Module):
    """Batch normalisation (Ioffe and Szegedy 2015) by stored statistics, then leaky ReLU.

    For weights trained elsewhere: mean and variance are those of that training and frozen whatever `optim.rules` say;
    scale and bias train on. The same map at training and at evaluation.
    """

    negative_slope: float | None = 0.01
    eps: float = 1e-5
    affine: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[-1]
        scale, bias = _affine(self, channels, self.affine)
        mean = jax.lax.stop_gradient(self.param("mean", nn.initializers.zeros, (channels,), jnp.float32))
        variance = jax.lax.stop_gradient(self.param("variance", nn.initializers.ones, (channels,), jnp.float32))
        gain = scale * jax.lax.rsqrt(variance + self.eps)
        return leaky_relu(x * gain.astype(x.dtype) + (bias - mean * gain).astype(x.dtype), self.negative_slope)


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016) over the channels, the last axis; statistics in float32."""

    eps: float = 1e-5
    affine: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale, bias = _affine(self, x.shape[-1], self.affine)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centre = wide - wide.mean(-1, keepdims=True)
        r = jax.lax.rsqrt(jnp.square(centre).mean(-1, keepdims=True) + self.eps)
        return (centre * r * scale + bias).astype(x.dtype)


class Linear(nn.Module):
    """A dense map of the last axis; its initial weights are normal with standard deviation 0.02."""

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        w = self.param("kernel", nn.initializers.normal(0.02), (x.shape[-1], self.features), jnp.float32)
        y = x.astype(self.dtype) @ w.astype(self.dtype)
        if not self.use_bias:
            return y
        return y + self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32).astype(self.dtype)


class Bridge(nn.Module):
    """Where an encoder ends and its decoder begins: the identity, by which pretraining finds the place."""

    def __call__(self, levels: Sequence[Array]) -> list[Array]:
        return list(levels)


def _visible_norm(
    x: Array, visible: Array, groups: int, scale: Array, bias: Array, negative_slope: float | None, eps: float
) -> Array:
    """Normalisation by mean and variance over the visible voxels of each example and group of channels; 0 elsewhere."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    split = wide.reshape(*x.shape[:4], groups, -1)
    seen = visible[..., None, None]
    number = jnp.maximum(visible.sum((1, 2, 3)), 1)[:, None, None, None, None, None] * split.shape[-1]
    mean = jnp.where(seen, split, 0.0).sum((1, 2, 3, 5), keepdims=True) / number
    centre = jnp.where(seen, split - mean, 0.0)
    r = jax.lax.rsqrt(jnp.square(centre).sum((1, 2, 3, 5), keepdims=True) / number + eps)
    y = leaky_relu((centre * r).reshape(x.shape) * scale + bias, negative_slope)
    return jnp.where(visible[..., None], y, 0.0).astype(x.dtype)


def _affine(module: nn.Module, channels: int, learnt: bool) -> tuple[Array, Array]:
    """Scale and bias [C]: parameters of `module`, or ones and zeros."""
    if not learnt:
        return jnp.ones(channels), jnp.zeros(channels)
    scale = module.param("scale", nn.initializers.ones, (channels,), jnp.float32)
    return scale, module.param("bias", nn.initializers.zeros, (channels,), jnp.float32)


NORMS = {"instance": InstanceNormAct, "group": GroupNormAct, "batch_frozen": FrozenBatchNormAct}


def norm_act(
    kind: str,
    negative_slope: float | None = 0.01,
    *,
    affine: bool = True,
    eps: float = 1e-5,
    name: str | None = None,
) -> nn.Module:
    """The normalisation called `kind` with its activation; raises UserError for an unknown name."""
    if kind not in NORMS:
        raise UserError(f"config: model.norm '{kind}' is not known; known: {', '.join(NORMS)}")
    return NORMS[kind](negative_slope=negative_slope, affine=affine, eps=eps, name=name)


class ConvBlock(nn.Module):
    """Convolution, dropout of whole channels, normalisation, leaky ReLU. The bias is left to the normalisation.

    Attributes:
      negative_slope: of the leaky ReLU; None leaves the activation out.
      norm: one of `NORMS`. affine: whether it has a scale and a bias.
    """

    features: int
    kernel: Sequence[int] = (3, 3, 3)
    strides: Sequence[int] = (1, 1, 1)
    dilation: Sequence[int] = (1, 1, 1)
    use_bias: bool = False
    norm: str = "instance"
    affine: bool = True
    negative_slope: float | None = 0.01
    dropout: float = 0.0
    train: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = Conv3D(
            self.features,
            self.kernel,
            self.strides,
            self.dilation,
            padding=centred(self.kernel, self.dilation),
            use_bias=self.use_bias,
            dtype=self.dtype,
            name="conv",
        )(x)
        x = Dropout(self.dropout, whole_channels=True, name="dropout")(x, train=self.train)
        return norm_act(self.norm, self.negative_slope, affine=self.affine, name="norm")(x)


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014): zeros with probability `rate`, the rest scaled up.

    Acts where `train` is set and the caller gives a random key (`apply(..., rngs={"dropout": key})`); without a key it
    is the identity, so that a loss can be computed as at training but without noise.

    Attributes:
      whole_channels: drop channels of an example as one. whole_examples: drop examples as one (stochastic depth).
    """

    rate: float
    whole_channels: bool = False
    whole_examples: bool = False

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        if not 0 <= self.rate < 1:
            raise UserError(f"config: model.dropout and model.drop_path must be in [0, 1), got {self.rate}")
        if not (train and self.rate > 0 and self.has_rng("dropout")):
            return x
        space = (1,) * (x.ndim - 2)
        shape = (x.shape[0], *space, 1) if self.whole_examples else x.shape
        if self.whole_channels:
            shape = (x.shape[0], *space, x.shape[-1])
        # Drawn flat: XLA takes ten times longer to compile the same draw in five dimensions.
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, (math.prod(shape),)).reshape(shape)
        return jnp.where(keep, x / (1 - self.rate), jnp.zeros_like(x))


def drop_path(rate: float, name: str | None = None) -> Dropout:
    """Stochastic depth (Huang et al. 2016): leaves a residual branch out for whole examples."""
    return Dropout(rate, whole_examples=True, name=name)


def leaky_relu(x: Array, negative_slope: float | None = 0.01) -> Array:
    """x where x >= 0, else negative_slope * x; None: x."""
    return x if negative_slope is None else jnp.where(x >= 0, x, negative_slope * x)


def centred(kernel: Sequence[int], dilation: Sequence[int] = (1, 1, 1)) -> tuple[tuple[int, int], ...]:
    """Zeros before and after each axis that centre the kernel on every stride-th voxel, beginning with the first.

    'SAME' would put the odd zero of an even-sized image at its end when the convolution strides.
    """
    reach = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
    return tuple((r // 2, r - r // 2) for r in reach)


def max_pool(x: Array, kernel: Sequence[int], strides: Sequence[int]) -> Array:
    """Maximum over windows of `kernel` voxels centred on every stride-th voxel, [B, X, Y, Z, C] -> [B, X / s, ...].

    Axis by axis from shifted slices: XLA's windowed maximum and its gradient run on one thread of a CPU.
    """
    for axis, (width, stride) in enumerate(zip(kernel, strides, strict=True), start=1):
        pads = [(0, 0)] * x.ndim
        pads[axis] = centred((width,), (1,))[0]
        last = (x.shape[axis] - 1) // stride * stride
        padded = jnp.pad(x, pads, constant_values=-jnp.inf)
        taps = [jax.lax.slice_in_dim(padded, tap, tap + last + 1, stride, axis) for tap in range(width)]
        x = functools.reduce(jnp.maximum, taps)
    return x


class MaxPool(nn.Module):
    """`max_pool` over three voxels along each axis that strides, as a layer."""

    strides: Sequence[int]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return max_pool(x, [3 if s > 1 else 1 for s in self.strides], self.strides)


def mean_pool(x: Array, cell: Sequence[int]) -> Array:
    """Mean over cells of voxels, [B, X, Y, Z, C] -> [B, X / FX, ...]; a remainder is left out."""
    n, *space, channels = x.shape
    coarse = [size // factor for size, factor in zip(space, cell, strict=True)]
    whole = [size * factor for size, factor in zip(coarse, cell, strict=True)]
    split = [v for pair in zip(coarse, cell, strict=True) for v in pair]
    return x[:, : whole[0], : whole[1], : whole[2]].reshape(n, *split, channels).mean((2, 4, 6))
