"""MedNeXt (Roy et al. 2023): a U-Net of ConvNeXt blocks, depthwise convolution and an inverted bottleneck."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from medjax.errors import UserError
from medjax.models.layers import Bridge, Conv3D, ConvTranspose3D, Dropout, InstanceNormAct, centred, drop_path
from medjax.models.unet import counts, per_stage
from medjax.ops.gelu import gelu

# variant -> (blocks, expansion) of the encoder's stages and the bottleneck; the decoder mirrors them.
VARIANTS = {
    "S": ((2, 2, 2, 2, 2), (2, 2, 2, 2, 2)),
    "B": ((2, 2, 2, 2, 2), (2, 3, 4, 4, 4)),
    "M": ((3, 4, 4, 4, 4), (2, 3, 4, 4, 4)),
    "L": ((3, 4, 8, 8, 8), (3, 4, 8, 8, 8)),
}


class MedNeXt(nn.Module):
    """Returns the decoder's feature pyramid, finest first.

    Attributes:
      variant: 'S', 'B', 'M' or 'L'; blocks and expansions of the stages, finest first, instead of the variant's.
      down_expansions: of the steps down, finest first, instead of those of the stages they lead to. (MONAI's network
        has those of the stages they come from.)
      features: channels of the finest stage; each coarser one has twice as many.
      kernel: of the depthwise convolutions, 3 or 5 along (x, y, z) in the paper.
      factors: stride into each stage after the first, one (x, y, z) a stage or one for all.
      dropout: of whole channels between a block's two 1×1×1 convolutions. drop_path: stochastic depth, rising from 0.
      levels: how many decoder levels are returned (for deep supervision); 0: all but the bottleneck.
      bottleneck: also return the coarsest level, last.
      remat: recompute each block in the backward pass instead of keeping its activations.
      dtype: of the computation; parameters are float32.
    """

    variant: str = "S"
    blocks: Sequence[int] = ()
    expansions: Sequence[int] = ()
    down_expansions: Sequence[int] = ()
    features: int = 32
    kernel: Sequence[int] = (3, 3, 3)
    factors: Sequence[Any] = (2, 2, 2)
    dropout: float = 0.0
    drop_path: float = 0.0
    levels: int = 0
    bottleneck: bool = False
    remat: bool = False
    dtype: Any = jnp.float32

    def stages(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(blocks, expansions) of the stages, finest first."""
        if self.variant not in VARIANTS:
            raise UserError(f"config: model.variant '{self.variant}' is not known; known: {', '.join(VARIANTS)}")
        blocks = tuple(self.blocks) or VARIANTS[self.variant][0]
        expansions = tuple(self.expansions) or VARIANTS[self.variant][1]
        if len(blocks) != len(expansions):
            raise UserError(
                f"config: model.blocks {blocks} and model.expansions {expansions} differ in the number of stages"
            )
        return blocks, expansions

    def total_factor(self) -> tuple[int, int, int]:
        """By how much the coarsest stage is smaller than the input; the patch must be a multiple of it."""
        factors = per_stage(self.factors, len(self.stages()[0]) - 1, "model.factors")
        x, y, z = (math.prod(f[a] for f in factors) for a in range(3))
        return x, y, z

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> list[Array]:
        """[B, X, Y, Z, C] -> [[B, X, Y, Z, F], [B, X/f, Y/f, Z/f, 2F], ...], finest first."""
        blocks, expansions = self.stages()
        n = len(blocks)
        factors = per_stage(self.factors, n - 1, "model.factors")
        down_expansions = counts(self.down_expansions or expansions[1:], n - 1, "model.down_expansions")
        kind = nn.remat(MedNeXtBlock) if self.remat else MedNeXtBlock
        total = 2 * sum(blocks) - blocks[-1]
        common: dict[str, Any] = {"kernel": self.kernel, "dropout": self.dropout, "train": train, "dtype": self.dtype}

        def stage(x: Array, i: int, done: int, name: str) -> Array:
            for j in range(blocks[i]):
                rate = self.drop_path * (done + j) / max(total - 1, 1)
                x = kind(x.shape[-1], expansions[i], drop_path=rate, name=f"{name}{i}_block{j}", **common)(x)
            return x

        x = Conv3D(self.features, (1, 1, 1), dtype=self.dtype, name="stem")(x)
        skips, done = [], 0
        for i in range(n - 1):
            x = stage(x, i, done, "encoder")
            done += blocks[i]
            skips.append(x)
            step = {**common, "resample": "down", "strides": factors[i], "name": f"down{i}"}
            x = kind(2 * x.shape[-1], down_expansions[i], **step)(x)
        skips = Bridge(name="bridge")([*skips, stage(x, n - 1, done, "encoder")])
        x = bottom = skips[-1]
        done += blocks[-1]
        pyramid: list[Array] = []
        for i in range(n - 2, -1, -1):
            step = {**common, "resample": "up", "strides": factors[i], "name": f"up{i}"}
            x = kind(x.shape[-1] // 2, expansions[i], **step)(x) + skips[i]
            x = stage(x, i, done, "decoder")
            done += blocks[i]
            pyramid.insert(0, x)
        return pyramid[: self.levels or None] + [bottom] * self.bottleneck


class MedNeXtBlock(nn.Module):
    """Depthwise convolution, normalisation, 1×1×1 up by `expansion`, GELU, 1×1×1 to `features`; beside a shortcut.

    Attributes:
      resample: 'none', or 'down' or 'up' by `strides`, where a 1×1×1 convolution of that stride is the shortcut. Up,
        the transposed convolutions reach (n - 1) * stride + 1 voxels; zeros come before them, as in the paper's code.
    """

    features: int
    expansion: int
    kernel: Sequence[int] = (3, 3, 3)
    resample: str = "none"
    strides: Sequence[int] = (1, 1, 1)
    dropout: float = 0.0
    drop_path: float = 0.0
    train: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels, strides = x.shape[-1], tuple(self.strides)
        one = (1, 1, 1)
        if self.resample == "up":
            y = ConvTranspose3D(channels, self.kernel, strides, groups=channels, dtype=self.dtype, name="depthwise")(x)
        else:
            options: dict[str, Any] = {"padding": centred(self.kernel), "groups": channels, "dtype": self.dtype}
            y = Conv3D(channels, self.kernel, strides, name="depthwise", **options)(x)
        # The paper's group normalisation has a group a channel: instance normalisation.
        y = InstanceNormAct(negative_slope=None, name="norm")(y)
        y = Conv3D(self.expansion * channels, one, dtype=self.dtype, name="expand")(y)
        y = Dropout(self.dropout, whole_channels=True, name="dropout")(gelu(y), train=self.train)
        y = Conv3D(self.features, one, dtype=self.dtype, name="compress")(y)
        y = drop_path(self.drop_path, name="drop")(y, train=self.train)
        if self.resample == "none":
            return x + y
        if self.resample == "down":
            return y + Conv3D(self.features, one, strides, padding="VALID", dtype=self.dtype, name="shortcut")(x)
        y += ConvTranspose3D(self.features, one, strides, dtype=self.dtype, name="shortcut")(x)
        return jnp.pad(y, [(0, 0), *((s - 1, 0) for s in strides), (0, 0)])
