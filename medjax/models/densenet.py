"""3D DenseNet (Huang et al. 2017), in the shape MONAI uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from medjax.errors import UserError
from medjax.models.decoders import Decoder, coarsest_of_each_grid
from medjax.models.layers import Conv3D, ConvBlock, Dropout, MaxPool, centred, mean_pool, norm_act
from medjax.models.unet import per_stage

# depth -> dense layers of each block
DEPTHS = {121: (6, 12, 24, 16), 169: (6, 12, 32, 32), 201: (6, 12, 48, 32), 264: (6, 12, 64, 48)}


class DenseNet(nn.Module):
    """Returns the stem's and the blocks' normalised outputs, finest first; or what a U-Net decoder makes of them.

    Attributes:
      depth: 121, 169, 201 or 264. blocks: dense layers of each block instead of the depth's.
      features: channels of the stem. growth: channels a dense layer adds. width: the 1×1×1 convolutions have `width`
        times as many.
      stem_kernel, stem_stride: of the first convolution. pool: stride of the maximum over 3 voxels after it.
      factors: cells averaged between blocks, one (x, y, z) or one for each transition.
      kernel: of the dense layers.
      norm: 'instance', 'group' or 'batch_frozen' (stored statistics, for converted weights).
      dropout: of what a dense layer adds.
      decoder, decoder_convs, levels, bottleneck, remat, dtype: as `resnet.ResNet`'s.
    """

    depth: int = 121
    blocks: Sequence[int] = ()
    features: int = 64
    growth: int = 32
    width: int = 4
    stem_kernel: Sequence[int] = (7, 7, 7)
    stem_stride: Sequence[int] = (2, 2, 2)
    pool: Sequence[int] = (2, 2, 2)
    factors: Sequence[Any] = (2, 2, 2)
    kernel: Sequence[int] = (3, 3, 3)
    norm: str = "instance"
    dropout: float = 0.0
    decoder: str = "none"
    decoder_convs: Any = 2
    levels: int = 0
    bottleneck: bool = False
    remat: bool = False
    dtype: Any = jnp.float32

    def sizes(self) -> tuple[int, ...]:
        """Dense layers of each block."""
        if self.blocks:
            return tuple(self.blocks)
        if self.depth not in DEPTHS:
            raise UserError(f"config: model.depth {self.depth} is not known; known: {', '.join(map(str, DEPTHS))}")
        return DEPTHS[self.depth]

    def total_factor(self) -> tuple[int, int, int]:
        """By how much the coarsest level is smaller than the input; the patch must be a multiple of it."""
        steps = (self.stem_stride, self.pool, *per_stage(self.factors, len(self.sizes()) - 1, "model.factors"))
        x, y, z = (math.prod(s[a] for s in steps) for a in range(3))
        return x, y, z

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> list[Array]:
        """[B, X, Y, Z, C] -> [[B, X/s, Y/s, Z/s, F], ...], finest first."""
        image, sizes = x, self.sizes()
        factors = per_stage(self.factors, len(sizes) - 1, "model.factors")
        relu: dict[str, Any] = {"norm": self.norm, "negative_slope": 0.0, "dtype": self.dtype}
        x = ConvBlock(self.features, self.stem_kernel, self.stem_stride, name="stem", **relu)(x)
        levels = [x]
        if math.prod(self.pool) > 1:
            x = MaxPool(self.pool, name="stem_pool")(x)
        kind = nn.remat(DenseLayer) if self.remat else DenseLayer
        for i, layers in enumerate(sizes):
            for j in range(layers):
                layer = kind(
                    self.growth, self.width, self.kernel, self.norm, self.dropout, train, self.dtype,
                    name=f"block{i}_layer{j}",
                )  # fmt: skip
                x = jnp.concatenate([x, layer(x)], axis=-1)
            x = norm_act(self.norm, 0.0, name=f"block{i}_norm")(x)
            levels.append(x)
            if i < len(factors):
                # The mean over cells and the map of the channels commute; this order computes less.
                x = mean_pool(x, factors[i])
                x = Conv3D(x.shape[-1] // 2, (1, 1, 1), use_bias=False, dtype=self.dtype, name=f"transition{i}")(x)
        options: dict[str, Any] = {
            "levels": self.levels,
            "bottleneck": self.bottleneck,
            "remat": self.remat,
            "train": train,
        }
        options |= {"norm": self.norm, "dropout": self.dropout, "dtype": self.dtype, "convs": self.decoder_convs}
        return Decoder(self.decoder, name="decoder", **options)(image, coarsest_of_each_grid(levels))


class DenseLayer(nn.Module):
    """Normalisation, ReLU, 1×1×1 convolution; again with the wider kernel: the channels a layer adds."""

    growth: int
    width: int
    kernel: Sequence[int]
    norm: str
    dropout: float
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = norm_act(self.norm, 0.0, name="norm1")(x)
        x = Conv3D(self.width * self.growth, (1, 1, 1), use_bias=False, dtype=self.dtype, name="conv1")(x)
        x = norm_act(self.norm, 0.0, name="norm2")(x)
        padding = centred(self.kernel)
        x = Conv3D(self.growth, self.kernel, padding=padding, use_bias=False, dtype=self.dtype, name="conv2")(x)
        return Dropout(self.dropout, name="drop")(x, train=self.train)
