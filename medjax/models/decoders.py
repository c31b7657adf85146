"""Decoders: from an encoder's pyramid to one that reaches the image's own grid. They combine with every encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from medjax.errors import UserError
from medjax.models.layers import Bridge, ConvBlock, PatchConvTranspose, leaky_relu
from medjax.models.unet import counts, per_stage

DECODERS = ("none", "unet")


class Stage(nn.Module):
    """`convs` blocks of convolution, normalisation and leaky ReLU, the first of which may stride.

    Attributes: those of `layers.ConvBlock`, for every block.
    """

    features: int
    convs: int
    kernel: Sequence[int] = (3, 3, 3)
    strides: Sequence[int] = (1, 1, 1)
    use_bias: bool = False
    norm: str = "instance"
    dropout: float = 0.0
    train: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.convs):
            strides = self.strides if i == 0 else (1, 1, 1)
            options: dict[str, Any] = {
                "use_bias": self.use_bias,
                "norm": self.norm,
                "dropout": self.dropout,
                "train": self.train,
            }
            x = ConvBlock(self.features, self.kernel, strides, dtype=self.dtype, name=f"block{i}", **options)(x)
        return x


class ResidualConv(nn.Module):
    """UNETR's block: two convolutions with plain instance normalisation, beside a shortcut (1×1×1 where needed)."""

    features: int
    norm: str = "instance"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        common: dict[str, Any] = {"norm": self.norm, "affine": False, "dtype": self.dtype}
        y = ConvBlock(self.features, name="conv1", **common)(x)
        y = ConvBlock(self.features, negative_slope=None, name="conv2", **common)(y)
        if x.shape[-1] != self.features:
            x = ConvBlock(self.features, (1, 1, 1), negative_slope=None, name="shortcut", **common)(x)
        return leaky_relu(x + y)


class ResidualUp(nn.Module):
    """UNETR's step up: a map over cells, the skip beside it, `ResidualConv`."""

    norm: str = "instance"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, skip: Array) -> Array:
        features = skip.shape[-1]
        up = PatchConvTranspose(features, factor_between(skip, x), use_bias=False, dtype=self.dtype, name="up")(x)
        return ResidualConv(features, self.norm, self.dtype, name="block")(jnp.concatenate([up, skip], axis=-1))


class UNetDecoder(nn.Module):
    """The decoder of a U-Net: up by dense maps over cells, the skip beside it, `convs` blocks; channels as the skips'.

    Attributes:
      kernels, convs: of each level but the coarsest, finest first, or one for all.
      levels: how many of the finest levels are returned; 0: all but the bottleneck.
      bottleneck: also return the encoder's coarsest level, last.
      the others: those of `Stage`.
    """

    kernels: Sequence[Any] = (3, 3, 3)
    convs: Any = 2
    levels: int = 0
    bottleneck: bool = False
    use_bias: bool = False
    norm: str = "instance"
    dropout: float = 0.0
    remat: bool = False
    train: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, skips: Sequence[Array]) -> list[Array]:
        """[[B, X, Y, Z, F0], [B, X/f, Y/f, Z/f, F1], ...] -> the decoded levels, finest first."""
        n = len(skips) - 1
        kernels = per_stage(self.kernels, n, "model.decoder_kernels")
        convs = counts(self.convs, n, "model.decoder_convs")
        stage = nn.remat(Stage) if self.remat else Stage
        options: dict[str, Any] = {
            "use_bias": self.use_bias,
            "norm": self.norm,
            "dropout": self.dropout,
            "train": self.train,
        }
        skips = Bridge(name="bridge")(skips)
        x = skips[-1]
        pyramid: list[Array] = []
        for i in range(n - 1, -1, -1):
            features = skips[i].shape[-1]
            x = PatchConvTranspose(features, factor_between(skips[i], x), dtype=self.dtype, name=f"up{i}")(x)
            x = jnp.concatenate([x, skips[i]], axis=-1)
            x = stage(features, convs[i], kernels[i], dtype=self.dtype, name=f"stage{i}", **options)(x)
            pyramid.insert(0, x)
        return pyramid[: self.levels or None] + [skips[-1]] * self.bottleneck


class Decoder(nn.Module):
    """What an encoder family adds by `decoder='unet'`: a U-Net decoder that ends on the image's own grid.

    Where the encoder's finest level is coarser than the image, two blocks on the image itself are the finest skip.

    Attributes:
      kind: 'none' returns the encoder's pyramid as it is.
      norm: the encoder's; where that is 'batch_frozen', 'instance' here: nobody stored statistics of a new decoder.
      the others: those of `UNetDecoder`.
    """

    kind: str
    convs: Any = 2
    levels: int = 0
    bottleneck: bool = False
    norm: str = "instance"
    dropout: float = 0.0
    remat: bool = False
    train: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: Array, pyramid: Sequence[Array]) -> list[Array]:
        if self.kind not in DECODERS:
            raise UserError(f"config: model.decoder '{self.kind}' is not known; known: {', '.join(DECODERS)}")
        if self.kind == "none":
            return list(pyramid)[: self.levels or None]
        skips = list(pyramid)
        norm = "instance" if self.norm == "batch_frozen" else self.norm
        common: dict[str, Any] = {"norm": norm, "dropout": self.dropout, "train": self.train, "dtype": self.dtype}
        if skips[0].shape[1:4] != image.shape[1:4]:
            stage = nn.remat(Stage) if self.remat else Stage
            skips.insert(0, stage(max(skips[0].shape[-1] // 2, 8), 2, name="image", **common)(image))
        options: dict[str, Any] = {
            "convs": self.convs,
            "levels": self.levels,
            "bottleneck": self.bottleneck,
            "remat": self.remat,
        }
        return UNetDecoder(name="unet", **options, **common)(skips)


def factor_between(fine: Array, coarse: Array) -> tuple[int, ...]:
    """By how much two levels of a pyramid differ along (x, y, z); raises UserError unless they are whole numbers."""
    pairs = list(zip(fine.shape[1:4], coarse.shape[1:4], strict=True))
    if any(a % b for a, b in pairs):
        raise UserError(
            f"model: a level of {fine.shape[1:4]} voxels is no multiple of the next coarser one of "
            f"{coarse.shape[1:4]}; the patch must be a multiple of the backbone's total factor"
        )
    return tuple(a // b for a, b in pairs)


def coarsest_of_each_grid(levels: Sequence[Array]) -> list[Array]:
    """The last of those consecutive levels that share a grid: what a pyramid keeps of an encoder's stages."""
    following = [*levels[1:], None]
    return [a for a, b in zip(levels, following, strict=True) if b is None or a.shape[1:4] != b.shape[1:4]]
