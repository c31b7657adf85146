"""3D Swin transformer (Liu et al. 2021) and Swin UNETR (Hatamizadeh et al. 2022), a U-Net decoder on top of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from medjax.errors import UserError
from medjax.models.attention import WindowBlock
from medjax.models.decoders import DECODERS, Decoder, ResidualConv, ResidualUp
from medjax.models.layers import Dropout, LayerNorm, Linear, PatchConv
from medjax.models.unet import per_stage

# Corners of a 2×2×2 cell in the order in which MONAI's network before its correction puts their channels together: two
# of them twice, two never. Weights trained with it need it.
LEGACY_CORNERS = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1))
MERGING = ("cells", "legacy")


class Swin(nn.Module):
    """Returns the embedding's and the stages' outputs, finest first; or what a decoder makes of them.

    Attributes:
      features: channels of the embedding; each stage ends with twice as many.
      depths: blocks of each stage; every other one has shifted windows. heads: of each stage's attention.
      window: tokens along (x, y, z). patch: voxels of a token.
      factors: tokens merged at the end of each stage, one (x, y, z) or one a stage.
      mlp_ratio: hidden channels of the MLP by those of a token. qkv_bias: whether queries, keys and values have one.
      merging: 'cells', or 'legacy' for weights of MONAI before its correction of the merging's order.
      reference_bias: of windows larger than their grid; True for weights of MONAI (see `attention.WindowBlock`).
      dropout: after the embedding, the attention and the MLP. drop_path: stochastic depth, rising from 0.
      decoder: 'none', 'unet' or 'swin_unetr'. decoder_convs: of 'unet'.
      levels: how many decoder levels are returned (for deep supervision); 0: all but the bottleneck.
      bottleneck: also return the coarsest level, last.
      remat: recompute each block in the backward pass instead of keeping its activations.
      dtype: of the computation; parameters are float32.
    """

    features: int = 48
    depths: Sequence[int] = (2, 2, 2, 2)
    heads: Sequence[int] = (3, 6, 12, 24)
    window: Sequence[int] = (7, 7, 7)
    patch: Sequence[int] = (2, 2, 2)
    factors: Sequence[Any] = (2, 2, 2)
    mlp_ratio: int = 4
    qkv_bias: bool = True
    merging: str = "cells"
    reference_bias: bool = False
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
        steps = (self.patch, *per_stage(self.factors, len(self.depths), "model.factors"))
        x, y, z = (math.prod(s[a] for s in steps) for a in range(3))
        return x, y, z

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> list[Array]:
        """[B, X, Y, Z, C] -> [[B, X/s, Y/s, Z/s, F], ...], finest first."""
        known = (*DECODERS, "swin_unetr")
        if self.decoder not in known:
            raise UserError(f"config: model.decoder '{self.decoder}' is not known; known: {', '.join(known)}")
        if self.merging not in MERGING:
            raise UserError(f"config: model.merging '{self.merging}' is not known; known: {', '.join(MERGING)}")
        if len(self.heads) != len(self.depths):
            raise UserError("config: model.heads and model.depths need one number a stage each")
        image = x
        factors = per_stage(self.factors, len(self.depths), "model.factors")
        total, done = sum(self.depths), 0
        kind = nn.remat(WindowBlock) if self.remat else WindowBlock
        x = PatchConv(self.features, self.patch, dtype=self.dtype, name="embed")(x)
        x = Dropout(self.dropout, name="drop")(x, train=train)
        levels = [LayerNorm(affine=False, name="out0")(x)]
        for i, (depth, heads) in enumerate(zip(self.depths, self.heads, strict=True)):
            if x.shape[-1] % heads:
                raise UserError(f"config: stage {i} has {x.shape[-1]} channels, no multiple of its {heads} heads")
            for j in range(depth):
                block = kind(
                    heads,
                    self.window,
                    bool(j % 2),
                    self.mlp_ratio * x.shape[-1],
                    self.qkv_bias,
                    self.reference_bias,
                    self.dropout,
                    self.drop_path * done / max(total - 1, 1),
                    train,
                    self.dtype,
                    name=f"stage{i}_block{j}",
                )
                x, done = block(x), done + 1
            x = PatchMerging(factors[i], self.merging, self.dtype, name=f"merge{i}")(x)
            levels.append(LayerNorm(affine=False, name=f"out{i + 1}")(x))
        if self.decoder != "swin_unetr":
            options: dict[str, Any] = {
                "levels": self.levels,
                "bottleneck": self.bottleneck,
                "remat": self.remat,
                "train": train,
            }
            options |= {"dropout": self.dropout, "dtype": self.dtype, "convs": self.decoder_convs}
            return Decoder(self.decoder, name="decoder", **options)(image, levels)

        def refine(x: Array, features: int, name: str) -> Array:
            return ResidualConv(features, dtype=self.dtype, name=name)(x)

        # The skip above the coarsest level is taken as it is.
        n = len(levels)
        skips = [refine(image, self.features, "image")]
        skips += [refine(x, x.shape[-1], f"skip{i}") for i, x in enumerate(levels[: n - 2])]
        skips.append(levels[n - 2])
        x = bottom = refine(levels[-1], levels[-1].shape[-1], f"skip{n - 1}")
        pyramid: list[Array] = []
        for i in range(n - 1, -1, -1):
            x = ResidualUp(dtype=self.dtype, name=f"decoder{i}")(x, skips[i])
            pyramid.insert(0, x)
        return pyramid[: self.levels or None] + [bottom] * self.bottleneck


class SwinUNETR(Swin):
    """The transformer with its decoder; attributes as `Swin`'s."""

    decoder: str = "swin_unetr"


class PatchMerging(nn.Module):
    """Cells of tokens become one token: channels side by side, normalised, mapped to twice those of one."""

    factor: Sequence[int]
    merging: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        _, *grid, channels = x.shape
        fx, fy, fz = self.factor
        corners = [(i, j, k) for i in range(fx) for j in range(fy) for k in range(fz)]
        if self.merging == "legacy":
            if tuple(self.factor) != (2, 2, 2):
                raise UserError("config: model.merging 'legacy' is of 2×2×2 cells only")
            corners = list(LEGACY_CORNERS)
        pads = [(0, -size % f) for size, f in zip(grid, self.factor, strict=True)]
        if any(high for _, high in pads):
            x = jnp.pad(x, [(0, 0), *pads, (0, 0)])
        cells = jnp.concatenate([x[:, i::fx, j::fy, k::fz] for i, j, k in corners], axis=-1)
        return Linear(2 * channels, use_bias=False, dtype=self.dtype, name="reduce")(LayerNorm(name="norm")(cells))
