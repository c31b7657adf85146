"""3D residual networks (He et al. 2016; Hara et al. 2018) in the shape MONAI and MedicalNet (Chen et al. 2019) use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from medjax.errors import UserError
from medjax.models.decoders import Decoder, coarsest_of_each_grid
from medjax.models.layers import ConvBlock, MaxPool, drop_path, leaky_relu
from medjax.models.unet import counts, per_stage

# depth -> (residual blocks of each layer, bottleneck blocks)
DEPTHS = {
    10: ((1, 1, 1, 1), False),
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}


class ResNet(nn.Module):
    """Returns the stem's and the four layers' outputs, finest first, one a grid; or what a U-Net decoder makes of them.

    Attributes:
      depth: 10, 18, 34, 50, 101 or 152.
      features: channels of the four layers, before the fourfold of bottleneck blocks.
      stem_kernel, stem_stride: of the first convolution. MONAI's nets stride by 1, MedicalNet's by 2.
      pool: stride of the maximum over 3 voxels after the stem; (1, 1, 1): none.
      factors: stride into each layer. dilations: of its 3×3×3 convolutions (MedicalNet: factors 1, 2, 1, 1 with
        dilations 1, 1, 2, 4).
      kernels: of each layer, or one for all.
      shortcut: where shapes differ: 'B' a 1×1×1 convolution, 'A' every stride-th voxel and zeros as new channels.
      shortcut_bias: whether the convolution of 'B' has one.
      norm: 'instance', 'group' or 'batch_frozen' (stored statistics, for converted weights).
      dropout: of whole channels after the first convolution of a block. drop_path: stochastic depth, rising from 0.
      decoder: 'none' or 'unet'. decoder_convs, levels, bottleneck: of the decoder; levels 0: all but the bottleneck.
      remat: recompute each block in the backward pass instead of keeping its activations.
      dtype: of the computation; parameters are float32.
    """

    depth: int = 18
    features: Sequence[int] = (64, 128, 256, 512)
    stem_kernel: Sequence[int] = (7, 7, 7)
    stem_stride: Sequence[int] = (1, 1, 1)
    pool: Sequence[int] = (2, 2, 2)
    factors: Sequence[Any] = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))
    dilations: Any = 1
    kernels: Sequence[Any] = (3, 3, 3)
    shortcut: str = "B"
    shortcut_bias: bool = False
    norm: str = "instance"
    dropout: float = 0.0
    drop_path: float = 0.0
    decoder: str = "none"
    decoder_convs: Any = 2
    levels: int = 0
    bottleneck: bool = False
    remat: bool = False
    dtype: Any = jnp.float32

    def total_factor(self) -> tuple[int, int, int]:
        """By how much the coarsest level is smaller than the input; the patch must be a multiple of it."""
        steps = (self.stem_stride, self.pool, *per_stage(self.factors, len(self.features), "model.factors"))
        x, y, z = (math.prod(s[a] for s in steps) for a in range(3))
        return x, y, z

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> list[Array]:
        """[B, X, Y, Z, C] -> [[B, X/s, Y/s, Z/s, F], ...], finest first."""
        if self.depth not in DEPTHS:
            raise UserError(f"config: model.depth {self.depth} is not known; known: {', '.join(map(str, DEPTHS))}")
        if self.shortcut not in ("A", "B"):
            raise UserError(f"config: model.shortcut '{self.shortcut}' is not known; known: A, B")
        image, n = x, len(self.features)
        blocks, wide = DEPTHS[self.depth]
        if n > len(blocks):
            raise UserError(
                f"config: model.features={tuple(self.features)}: a resnet has {len(blocks)} layers, so as many numbers"
            )
        factors = per_stage(self.factors, n, "model.factors")
        kernels = per_stage(self.kernels, n, "model.kernels")
        dilations = counts(self.dilations, n, "model.dilations")
        stem: dict[str, Any] = {"norm": self.norm, "negative_slope": 0.0, "dtype": self.dtype, "name": "stem"}
        x = ConvBlock(self.features[0], self.stem_kernel, self.stem_stride, **stem)(x)
        levels = [x]
        if math.prod(self.pool) > 1:
            x = MaxPool(self.pool, name="stem_pool")(x)
        kind = nn.remat(ResidualBlock) if self.remat else ResidualBlock
        done, total = 0, sum(blocks)
        for i in range(n):
            for j in range(blocks[i]):
                x = kind(
                    self.features[i],
                    wide,
                    kernels[i],
                    factors[i] if j == 0 else (1, 1, 1),
                    dilations[i],
                    self.shortcut,
                    self.shortcut_bias,
                    self.norm,
                    self.dropout,
                    self.drop_path * done / max(total - 1, 1),
                    train,
                    self.dtype,
                    name=f"layer{i}_block{j}",
                )(x)
                done += 1
            levels.append(x)
        options: dict[str, Any] = {
            "levels": self.levels,
            "bottleneck": self.bottleneck,
            "remat": self.remat,
            "train": train,
        }
        options |= {"norm": self.norm, "dropout": self.dropout, "dtype": self.dtype, "convs": self.decoder_convs}
        return Decoder(self.decoder, name="decoder", **options)(image, coarsest_of_each_grid(levels))


class ResidualBlock(nn.Module):
    """Two 3×3×3 convolutions (basic) or 1, 3, 1 with four times the channels (bottleneck), beside a shortcut."""

    features: int
    wide: bool
    kernel: Sequence[int]
    strides: Sequence[int]
    dilation: int
    shortcut: str
    shortcut_bias: bool
    norm: str
    dropout: float
    drop_path: float
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        out = self.features * (4 if self.wide else 1)
        relu: dict[str, Any] = {"norm": self.norm, "negative_slope": 0.0, "dtype": self.dtype}
        bare = {**relu, "negative_slope": None}
        drop: dict[str, Any] = {"dropout": self.dropout, "train": self.train}
        one, dilation = (1, 1, 1), (self.dilation,) * 3
        if self.wide:
            y = ConvBlock(self.features, one, name="conv1", **drop, **relu)(x)
            y = ConvBlock(self.features, self.kernel, self.strides, dilation, name="conv2", **relu)(y)
            y = ConvBlock(out, one, name="conv3", **bare)(y)
        else:
            y = ConvBlock(out, self.kernel, self.strides, dilation, name="conv1", **drop, **relu)(x)
            y = ConvBlock(out, self.kernel, one, dilation, name="conv2", **bare)(y)
        y = drop_path(self.drop_path, name="drop")(y, train=self.train)
        if tuple(self.strides) != one or x.shape[-1] != out:
            if self.shortcut == "A":
                x = x[:, :: self.strides[0], :: self.strides[1], :: self.strides[2]]
                x = jnp.pad(x, [(0, 0)] * 4 + [(0, out - x.shape[-1])])
            else:
                x = ConvBlock(out, one, self.strides, use_bias=self.shortcut_bias, name="shortcut", **bare)(x)
        return leaky_relu(x + y, 0.0)
