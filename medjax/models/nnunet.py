"""nnU-Net's networks as its own package builds them (Isensee et al. 2021, 2024): plain and residual encoder.

They differ from `unet` in what goes down: a convolution of the stage's kernel that strides, rather than a map over
cells. `unet` is the faster one; these are what weights trained by nnU-Net fit into (`medjax.convert`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from medjax.models.decoders import Stage, UNetDecoder
from medjax.models.layers import ConvBlock, drop_path, leaky_relu, mean_pool
from medjax.models.unet import counts, per_stage


class NNUNet(nn.Module):
    """The plain network; returns the decoder's feature pyramid, finest first.

    Attributes:
      features: channels of each stage, finest first; as many stages as there are numbers.
      factors: stride into each stage after the first, one (x, y, z) a stage or one for all.
      kernels: convolution kernel of each stage, or one for all.
      blocks: convolutions (plain) or residual blocks of each encoder stage, or one number for all.
      decoder_convs: convolutions of each decoder stage, or one number for all.
      residual: residual blocks in the encoder, after a stem of one convolution.
      use_bias: convolutions before a normalisation have a bias, which cancels out there; nnU-Net's have.
      norm: 'instance', 'group' or 'batch_frozen'.
      dropout: of whole channels after each convolution. drop_path: stochastic depth of the residual branches.
      levels: how many decoder levels are returned (for deep supervision); 0: all but the bottleneck.
      bottleneck: also return the encoder's coarsest level, last.
      remat: recompute each stage in the backward pass instead of keeping its activations.
      dtype: of the computation; parameters are float32.
    """

    features: Sequence[int] = (32, 64, 128, 256, 320, 320)
    factors: Sequence[Any] = (2, 2, 2)
    kernels: Sequence[Any] = (3, 3, 3)
    blocks: Any = 2
    decoder_convs: Any = 2
    residual: bool = False
    use_bias: bool = True
    norm: str = "instance"
    dropout: float = 0.0
    drop_path: float = 0.0
    levels: int = 0
    bottleneck: bool = False
    remat: bool = False
    dtype: Any = jnp.float32

    def total_factor(self) -> tuple[int, int, int]:
        """By how much the coarsest stage is smaller than the input; the patch must be a multiple of it."""
        factors = per_stage(self.factors, len(self.features) - 1, "model.factors")
        x, y, z = (math.prod(f[a] for f in factors) for a in range(3))
        return x, y, z

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> list[Array]:
        """[B, X, Y, Z, C] -> [[B, X, Y, Z, F0], [B, X/f, Y/f, Z/f, F1], ...], finest first."""
        n = len(self.features)
        factors = ((1, 1, 1), *per_stage(self.factors, n - 1, "model.factors"))
        kernels = per_stage(self.kernels, n, "model.kernels")
        blocks = counts(self.blocks, n, "model.blocks")
        common: dict[str, Any] = {"use_bias": self.use_bias, "norm": self.norm, "dropout": self.dropout, "train": train}
        common["dtype"] = self.dtype
        if self.residual:
            kind: Any = ResidualStage
            extra: dict[str, Any] = {"drop_path": self.drop_path}
            x = ConvBlock(self.features[0], kernels[0], name="stem", **common)(x)
        else:
            kind, extra = Stage, {}
        stage = nn.remat(kind) if self.remat else kind
        skips = []
        for i in range(n):
            options = {**common, **extra}
            x = stage(self.features[i], blocks[i], kernels[i], factors[i], name=f"encoder{i}", **options)(x)
            skips.append(x)
        decoder = UNetDecoder(
            kernels[:-1], self.decoder_convs, self.levels, self.bottleneck, remat=self.remat, name="decoder", **common
        )
        return decoder(skips)


class ResEncUNet(NNUNet):
    """The residual-encoder network (Isensee et al. 2024), by default of the size 'L'; attributes as `NNUNet`'s."""

    blocks: Any = (1, 3, 4, 6, 6, 6)
    decoder_convs: Any = 1
    residual: bool = True


class ResidualStage(nn.Module):
    """`convs` residual blocks, the first of which may stride. Attributes: as `decoders.Stage`'s."""

    features: int
    convs: int
    kernel: Sequence[int] = (3, 3, 3)
    strides: Sequence[int] = (1, 1, 1)
    use_bias: bool = False
    norm: str = "instance"
    dropout: float = 0.0
    drop_path: float = 0.0
    train: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        common: dict[str, Any] = {"norm": self.norm, "train": self.train, "dtype": self.dtype}
        wide = {**common, "use_bias": self.use_bias}
        for i in range(self.convs):
            strides = self.strides if i == 0 else (1, 1, 1)
            # The shortcut of ResNet-D (He et al. 2019): mean over cells, then a map of the channels.
            skip = mean_pool(x, strides)
            if skip.shape[-1] != self.features:
                block = ConvBlock(self.features, (1, 1, 1), negative_slope=None, name=f"block{i}_skip", **common)
                skip = block(skip)
            first = ConvBlock(
                self.features, self.kernel, strides, dropout=self.dropout, name=f"block{i}_conv1", **wide
            )(x)
            second = ConvBlock(self.features, self.kernel, negative_slope=None, name=f"block{i}_conv2", **wide)(first)
            second = drop_path(self.drop_path, name=f"block{i}_drop")(second, train=self.train)
            x = leaky_relu(second + skip)
        return x
