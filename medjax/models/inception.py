"""Inception-3D: GoogLeNet (Szegedy et al. 2015) with filters inflated to three dimensions, as I3D (Carreira 2017)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from medjax.models.decoders import Decoder, coarsest_of_each_grid
from medjax.models.layers import ConvBlock, MaxPool, max_pool
from medjax.models.unet import per_stage

# Channels of each block's branches, by level: 1; 1 then 3; 1 then 3 (GoogLeNet's 5, as I3D has it); pool then 1.
BLOCKS = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)


class Inception(nn.Module):
    """Returns the levels of two stem convolutions and three groups of blocks, finest first; or a U-Net's on them.

    Attributes:
      width: factor on all numbers of channels.
      stem_stride: of the first convolution (7×7×7).
      factors: stride of the maximum before the second stem convolution and before each group, one (x, y, z) or one for
        each of the four. I3D, for video, does not stride along time in the first two.
      norm: 'instance', 'group' or 'batch_frozen'.
      dropout: of whole channels after each block's 3×3×3 convolutions.
      decoder, decoder_convs, levels, bottleneck, remat, dtype: as `resnet.ResNet`'s.
    """

    width: float = 1.0
    stem_stride: Sequence[int] = (2, 2, 2)
    factors: Sequence[Any] = (2, 2, 2)
    norm: str = "instance"
    dropout: float = 0.0
    decoder: str = "none"
    decoder_convs: Any = 2
    levels: int = 0
    bottleneck: bool = False
    remat: bool = False
    dtype: Any = jnp.float32

    def total_factor(self) -> tuple[int, int, int]:
        """By how much the coarsest level is smaller than the input; the patch must be a multiple of it."""
        steps = (self.stem_stride, *per_stage(self.factors, len(BLOCKS) + 1, "model.factors"))
        x, y, z = (math.prod(s[a] for s in steps) for a in range(3))
        return x, y, z

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> list[Array]:
        """[B, X, Y, Z, C] -> [[B, X/s, Y/s, Z/s, F], ...], finest first."""
        image = x
        factors = per_stage(self.factors, len(BLOCKS) + 1, "model.factors")
        common: dict[str, Any] = {"norm": self.norm, "dtype": self.dtype}
        wide = lambda c: max(1, round(c * self.width))  # noqa: E731

        x = ConvBlock(wide(64), (7, 7, 7), self.stem_stride, negative_slope=0.0, name="stem0", **common)(x)
        levels = [x]
        x = MaxPool(factors[0], name="stem_pool")(x)
        x = ConvBlock(wide(64), (1, 1, 1), negative_slope=0.0, name="stem1", **common)(x)
        x = ConvBlock(wide(192), negative_slope=0.0, name="stem2", **common)(x)
        levels.append(x)
        kind = nn.remat(InceptionBlock) if self.remat else InceptionBlock
        for i, group in enumerate(BLOCKS):
            x = MaxPool(factors[i + 1], name=f"group{i}_pool")(x)
            for j, channels in enumerate(group):
                branches = tuple(map(wide, channels))
                x = kind(branches, self.norm, self.dropout, train, self.dtype, name=f"group{i}_block{j}")(x)
            levels.append(x)
        options: dict[str, Any] = {
            "levels": self.levels,
            "bottleneck": self.bottleneck,
            "remat": self.remat,
            "train": train,
        }
        options |= {"dropout": self.dropout, "convs": self.decoder_convs}
        return Decoder(self.decoder, name="decoder", **options, **common)(image, coarsest_of_each_grid(levels))


class InceptionBlock(nn.Module):
    """Four branches side by side: 1; 1 then 3; 1 then 3; maximum over 3 then 1 (kernels along every axis)."""

    channels: Sequence[int]
    norm: str
    dropout: float
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        relu: dict[str, Any] = {"norm": self.norm, "negative_slope": 0.0, "dtype": self.dtype}
        drop: dict[str, Any] = {"dropout": self.dropout, "train": self.train}
        one, three = (1, 1, 1), (3, 3, 3)
        a, b0, b1, c0, c1, d = self.channels
        branches = [ConvBlock(a, one, name="a", **relu)(x)]
        branches.append(ConvBlock(b1, three, name="b1", **drop, **relu)(ConvBlock(b0, one, name="b0", **relu)(x)))
        branches.append(ConvBlock(c1, three, name="c1", **drop, **relu)(ConvBlock(c0, one, name="c0", **relu)(x)))
        branches.append(ConvBlock(d, one, name="d", **relu)(max_pool(x, three, one)))
        return jnp.concatenate(branches, axis=-1)
