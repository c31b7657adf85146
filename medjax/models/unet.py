"""The plain 3D U-Net (Ronneberger et al. 2015; Çiçek et al. 2016) in the shape nnU-Net gave it (Isensee et al. 2021).

Convolution, instance normalisation and leaky ReLU; downsampling and upsampling are dense maps over cells of
1 or 2 voxels an axis, which every backend does fast. Kernels and factors may differ from stage to stage and
from axis to axis, for anisotropic voxels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from medjax.errors import UserError
from medjax.models.layers import Bridge, ConvBlock, InstanceNormAct, PatchConv, PatchConvTranspose


class UNet(nn.Module):
    """Encoder and decoder; returns the decoder's feature pyramid, finest first.

    Attributes:
      features: channels of each stage, finest first; as many stages as there are numbers.
      factors: downsampling into each stage after the first, one (x, y, z) a stage or one for all.
      kernels: convolution kernel of each stage, or one for all.
      convs: convolutions of each encoder stage, or one number for all.
      decoder_convs: convolutions of each decoder stage, or one number for all.
      dropout: of whole channels after each convolution.
      levels: how many decoder levels are returned (for deep supervision); 0: all but the bottleneck.
      remat: recompute each stage in the backward pass instead of keeping its activations.
      dtype: of the computation; parameters are float32.
    """

    features: Sequence[int] = (32, 64, 128, 256, 320)
    factors: Sequence[Any] = (2, 2, 2)
    kernels: Sequence[Any] = (3, 3, 3)
    convs: Any = 2
    decoder_convs: Any = 2
    dropout: float = 0.0
    levels: int = 0
    remat: bool = False
    dtype: Any = jnp.float32

    def stage_factors(self) -> tuple[tuple[int, ...], ...]:
        """Downsampling into stages 1.. as (x, y, z)."""
        return per_stage(self.factors, len(self.features) - 1, "model.factors")

    def total_factor(self) -> tuple[int, int, int]:
        """By how much the coarsest stage is smaller than the input; the patch must be a multiple of it."""
        x, y, z = (math.prod(f[a] for f in self.stage_factors()) for a in range(3))
        return x, y, z

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> list[Array]:
        """[B, X, Y, Z, C] -> [[B, X, Y, Z, F0], [B, X/f, Y/f, Z/f, F1], ...], finest first."""
        n = len(self.features)
        factors = self.stage_factors()
        kernels = per_stage(self.kernels, n, "model.kernels")
        convs = counts(self.convs, n, "model.convs")
        up_convs = counts(self.decoder_convs, n - 1, "model.decoder_convs")
        stage = nn.remat(_Stage) if self.remat else _Stage
        common: dict[str, Any] = {"dropout": self.dropout, "train": train, "dtype": self.dtype}

        skips = []
        for i in range(n):
            if i:
                x = PatchConv(self.features[i], factors[i - 1], use_bias=False, dtype=self.dtype, name=f"down{i}")(x)
                x = InstanceNormAct(name=f"down{i}_norm")(x)
            x = stage(self.features[i], kernels[i], convs[i], name=f"encoder{i}", **common)(x)
            skips.append(x)
        skips = Bridge(name="bridge")(skips)
        x = skips[-1]
        pyramid: list[Array] = []
        for i in range(n - 2, -1, -1):
            x = PatchConvTranspose(self.features[i], factors[i], dtype=self.dtype, name=f"up{i}")(x)
            x = jnp.concatenate([x, skips[i]], axis=-1)
            x = stage(self.features[i], kernels[i], up_convs[i], name=f"decoder{i}", **common)(x)
            pyramid.insert(0, x)
        return pyramid[: self.levels or None]


class _Stage(nn.Module):
    features: int
    kernel: Sequence[int]
    convs: int
    dropout: float
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        common: dict[str, Any] = {"dropout": self.dropout, "train": self.train, "dtype": self.dtype}
        for i in range(self.convs):
            x = ConvBlock(self.features, self.kernel, name=f"block{i}", **common)(x)
        return x


def per_stage(value: Sequence[Any], n: int, key: str) -> tuple[tuple[int, ...], ...]:
    """One (x, y, z) a stage, from one for all or from a list of n."""
    value = tuple(tuple(v) if isinstance(v, Sequence) else v for v in value)
    if len(value) == 3 and all(isinstance(v, int) for v in value):
        return (value,) * n
    if len(value) == n and all(isinstance(v, tuple) and len(v) == 3 for v in value):
        return value
    raise UserError(f"config: '{key}' needs three numbers, or {n} times three numbers (one a stage); it is {value}")


def counts(value: int | Sequence[int], n: int, key: str) -> tuple[int, ...]:
    """One number a stage, from one for all or from a list of n."""
    if isinstance(value, int):
        return (value,) * n
    if len(value) in (1, n):
        return tuple(value) * (n // len(value))
    raise UserError(f"config: '{key}' needs one number, or {n} (one a stage); it is {tuple(value)}")
