"""Heads: from a backbone's feature pyramid to a task's outputs.

Every head returns a list whose first entry is what whole cases are predicted with: float32 [B, X, Y, Z, K] of dense
heads, float32 [B, K] of pooled ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from medjax.models.layers import Conv3D

POOLS = ("mean", "max", "both", "share")
_MARKED, _LEAST = 1e-2, 1e-5  # shares of voxels, see `log_share`


def log_share(features: Array, maps: int, name: str) -> Array:
    """[B, X, Y, Z, F] -> the log of the share of voxels that each of `maps` learnt maps marks, float32 [B, maps].

    A map is a logistic function of a voxel's features, a convolution `name` of the module that calls this. An instance
    norm leaves the mean of its features no trace of how much of something there is; a share has it, whatever the norms.
    At the start a hundredth of the voxels is marked, and that is the zero of what is returned. The least share, of a
    small lesion's order, keeps the log of nothing finite.
    """
    head = Conv3D(maps, (1, 1, 1), dtype=features.dtype, name=name)
    marked = jax.nn.sigmoid(head(features).astype(jnp.float32) + math.log(_MARKED / (1 - _MARKED)))
    return jnp.log((marked.mean(axis=(1, 2, 3)) + _LEAST) / (_MARKED + _LEAST))


class DenseHead(nn.Module):
    """A 1×1×1 convolution on each of the finest `levels` of the pyramid; logits in float32, finest first.

    Attributes:
      outputs: channels per voxel. levels: how many levels get logits (deep supervision); at evaluation only the first.
    """

    on_grid = True  # the outputs are taken to lie on the image's own grid

    outputs: int
    levels: int = 1

    @nn.compact
    def __call__(self, pyramid: Sequence[Array], *, train: bool = False) -> list[Array]:
        levels = min(self.levels, len(pyramid))
        logits = []
        for i in range(levels):
            # Every level's parameters exist in both modes; only the finest level is computed for evaluation.
            if train or i == 0 or self.is_initializing():
                head = Conv3D(self.outputs, (1, 1, 1), dtype=pyramid[i].dtype, name=f"level{i}")
                logits.append(head(pyramid[i]).astype(jnp.float32))
        return logits


class PooledHead(nn.Module):
    """Pyramid -> one vector a volume: levels pooled over space, joined, dropout, an optional hidden layer, a dense one.

    Attributes:
      outputs: K. levels: how many levels are pooled, the coarsest first; 0: all.
      pool: 'mean', 'max' or 'both' over the voxels of a level; or 'share': of voxels that each of `maps` learnt maps
        marks (`log_share`).
      hidden: units of a hidden layer (GELU); 0: none.
      dropout: rate, on the pooled features and the hidden units; needs a 'dropout' key while training.
      shared: all K outputs are one linear function and differ by their bias alone (CORAL, Cao et al. 2020).
      start: initial bias [K], say the log odds of the classes; zeros if empty.
    """

    outputs: int
    levels: int = 0
    pool: str = "mean"
    hidden: int = 0
    dropout: float = 0.0
    shared: bool = False
    start: Sequence[float] = ()
    maps: int = 16

    @nn.compact
    def __call__(self, pyramid: Sequence[Array], *, train: bool = False) -> list[Array]:
        pooled = []
        first = max(0, len(pyramid) - self.levels) if self.levels else 0
        for i, features in enumerate(pyramid[first:], first):
            if self.pool == "share":
                pooled.append(log_share(features, self.maps, f"map{i}"))
                continue
            # Pooled in float32: thousands of bfloat16 values lose the sum.
            x = features.astype(jnp.float32)
            if self.pool in ("mean", "both"):
                pooled.append(x.mean(axis=(1, 2, 3)))
            if self.pool in ("max", "both"):
                pooled.append(x.max(axis=(1, 2, 3)))
        x = self._drop(jnp.concatenate(pooled, axis=-1), train)
        if self.hidden:
            x = self._drop(jax.nn.gelu(nn.Dense(self.hidden, name="hidden")(x)), train)
        x = nn.Dense(1 if self.shared else self.outputs, use_bias=False, name="dense")(x)
        return [x + self.param("bias", _constant(self.start, self.outputs))]

    def _drop(self, x: Array, train: bool) -> Array:
        if not self.dropout:
            return x
        return nn.Dropout(self.dropout, deterministic=not train or self.is_initializing())(x)


class HeatHead(nn.Module):
    """Pyramid level -> a 3×3×3 convolution with ReLU, then one 1×1×1 convolution to all channels, at full resolution.

    A coarser level costs less; its outputs are repeated to the finest grid, so whole cases are put together on it.

    Attributes:
      outputs: K. features: of the hidden convolution. level: of the pyramid, 0 the finest.
      start: initial bias [K]; a heat map begins at the logit of a small probability (Lin et al. 2017, focal loss).
      offset: first of three channels that point from a voxel to a centre, in voxels of the finest grid; None: none.
    """

    on_grid = True  # the outputs are taken to lie on the image's own grid

    outputs: int
    features: int = 32
    level: int = 0
    start: Sequence[float] = ()
    offset: int | None = None

    @nn.compact
    def __call__(self, pyramid: Sequence[Array], *, train: bool = False) -> list[Array]:
        level = min(self.level, len(pyramid) - 1)
        x = pyramid[level]
        dtype: Any = x.dtype
        x = nn.relu(Conv3D(self.features, (3, 3, 3), dtype=dtype, name="hidden")(x))
        x = Conv3D(self.outputs, (1, 1, 1), use_bias=False, dtype=dtype, name="out")(x).astype(jnp.float32)
        x = x + self.param("bias", _constant(self.start, self.outputs))
        for axis in range(3):
            fine, coarse = pyramid[0].shape[axis + 1], x.shape[axis + 1]
            times = fine // coarse
            x = jnp.repeat(x, times, axis=axis + 1)
            if self.offset is not None and times > 1:
                # The level's voxel points from its own centre: the finest voxels in it lie beside that.
                beside = (times - 1) / 2 - jnp.arange(fine) % times
                shape = [1] * 4
                shape[axis + 1] = fine
                x = x.at[..., self.offset + axis].add(beside.reshape(shape))
        return [x]


def _constant(values: Sequence[float], size: int) -> Callable[[Array], Array]:
    """An initialiser of `values`, or of zeros where there are none."""
    return lambda _: jnp.asarray(values or (0.0,) * size, jnp.float32)
