"""Attention (Vaswani et al. 2017) within windows of tokens, and the blocks of transformers around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from medjax.models.layers import Dropout, LayerNorm, Linear, drop_path
from medjax.ops.gelu import gelu

# What is added to the logits of two tokens of a window that a cyclic shift brought together from apart.
_APART = -100.0
_LATER = -1e9  # and of a token that comes later


def attend(qkv: Array, heads: int, bias: Array | None = None, regions: np.ndarray | None = None) -> Array:
    """Attention of every token to those of its own window.

    Args:
      qkv: queries, keys and values of all heads one after the other, [windows, tokens, 3 * C].
      bias: added to the logits, [heads, tokens, tokens].
      regions: [n, tokens] numbers, for windows that repeat after n; tokens of different numbers do not see each other.

    Returns:
      [windows, tokens, C].
    """
    windows, tokens, width = qkv.shape
    depth = width // 3 // heads
    scale = depth**-0.5
    labels = None if regions is None else jnp.tile(jnp.asarray(regions, jnp.int32), (windows // len(regions), 1))

    def several(qkv: Array, labels: Array | None) -> Array:
        q, k, v = (qkv.reshape(-1, tokens, 3, heads, depth)[:, :, i] for i in range(3))
        logits = jnp.einsum("wihd,wjhd->whij", q * scale, k, preferred_element_type=jnp.float32)
        if bias is not None:
            logits += bias
        if labels is not None:
            logits += jnp.where(labels[:, None, :, None] == labels[:, None, None, :], 0.0, _APART)
        weights = jax.nn.softmax(logits, axis=-1).astype(qkv.dtype)
        return jnp.einsum("whij,wjhd->wihd", weights, v).reshape(-1, tokens, width // 3)

    # The logits are never kept for the backward pass: they are far larger than all else.
    # Where the program may be divided it has no loop over the windows: the compiler would gather them for it.
    if jax.default_backend() != "cpu" or jax.device_count() > 1:
        return jax.checkpoint(several)(qkv, labels)

    # On one CPU device one window after the other, whose logits stay in the cache.
    @jax.checkpoint
    def one(item: tuple[Array, Array | None]) -> Array:
        qkv, labels = item
        return several(qkv[None], None if labels is None else labels[None])[0]

    return jax.lax.map(one, (qkv, labels))


def relative_bias(table: Array, window: Sequence[int]) -> Array:
    """The bias of every pair of tokens of a window from one number an offset and head.

    Args:
      table: [2 WX - 1, 2 WY - 1, 2 WZ - 1, heads]; the entry of offset o (query's place - key's) is at o + W - 1.

    Returns:
      [heads, tokens, tokens], tokens in the order of (x, y, z), z fastest.
    """
    for axis, width in enumerate(window):
        # [..., offset, ...] -> [..., query, key, ...] by slices: a gather's gradient would scatter.
        keys = [jax.lax.slice_in_dim(table, width - 1 - j, 2 * width - 1 - j, axis=2 * axis) for j in range(width)]
        table = jnp.stack(keys, axis=2 * axis + 1)
    tokens = int(np.prod(window))
    return table.transpose(6, 0, 2, 4, 1, 3, 5).reshape(-1, tokens, tokens)


class MLP(nn.Module):
    """Linear, GELU, linear; dropout after each."""

    hidden: int
    dropout: float
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        drop = Dropout(self.dropout, name="drop")
        y = gelu(Linear(self.hidden, dtype=self.dtype, name="linear1")(x))
        return drop(Linear(x.shape[-1], dtype=self.dtype, name="linear2")(drop(y, train=self.train)), train=self.train)


class TransformerBlock(nn.Module):
    """Normalisation and attention, normalisation and MLP, each beside a shortcut; tokens [B, N, C].

    Attributes:
      causal: a token sees itself and those before it.
    """

    heads: int
    mlp: int
    qkv_bias: bool
    dropout: float
    drop_path: float
    train: bool
    dtype: Any
    causal: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels, tokens = x.shape[-1], x.shape[1]
        drop = drop_path(self.drop_path, name="drop_path")
        y = LayerNorm(name="norm1")(x)
        y = Linear(3 * channels, self.qkv_bias, self.dtype, name="qkv")(y)
        later = jnp.where(np.tri(tokens, dtype=bool), 0.0, _LATER)[None] if self.causal else None
        y = Linear(channels, dtype=self.dtype, name="proj")(attend(y, self.heads, later))
        y = Dropout(self.dropout, name="drop")(y, train=self.train)
        x = x + drop(y, train=self.train)
        y = MLP(self.mlp, self.dropout, self.train, self.dtype, name="mlp")(LayerNorm(name="norm2")(x))
        return x + drop(y, train=self.train)


class WindowBlock(nn.Module):
    """The same with attention within windows of a grid (Liu et al. 2021), [B, X, Y, Z, C].

    Attributes:
      window: tokens along each axis; less where the grid is smaller. shifted: windows begin half a window later.
      reference_bias: how a smaller window takes its bias: False: that of its own offsets; True: the first tokens' of
        the full window, as MONAI's network does.
    """

    heads: int
    window: Sequence[int]
    shifted: bool
    mlp: int
    qkv_bias: bool
    reference_bias: bool
    dropout: float
    drop_path: float
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        _, *grid, channels = x.shape
        drop = drop_path(self.drop_path, name="drop_path")
        size = tuple(min(g, w) for g, w in zip(grid, self.window, strict=True))
        shift = tuple(w // 2 if self.shifted and g > w else 0 for g, w in zip(grid, self.window, strict=True))
        padded = tuple(-(-g // s) * s for g, s in zip(grid, size, strict=True))

        y = LayerNorm(name="norm1")(x)
        y = jnp.pad(y, [(0, 0), *((0, p - g) for p, g in zip(padded, grid, strict=True)), (0, 0)])
        y = _roll(y, [-s for s in shift])
        windows = to_windows(y, size)
        y = Linear(3 * channels, self.qkv_bias, self.dtype, name="qkv")(windows)
        y = attend(y, self.heads, self._bias(size), shifted_regions(padded, size, shift) if any(shift) else None)
        y = Linear(channels, dtype=self.dtype, name="proj")(y)
        y = _roll(from_windows(y, size, padded), shift)[:, : grid[0], : grid[1], : grid[2]]
        y = Dropout(self.dropout, name="drop")(y, train=self.train)
        x = x + drop(y, train=self.train)
        y = MLP(self.mlp, self.dropout, self.train, self.dtype, name="mlp")(LayerNorm(name="norm2")(x))
        return x + drop(y, train=self.train)

    def _bias(self, size: Sequence[int]) -> Array:
        shape = (*(2 * w - 1 for w in self.window), self.heads)
        table = self.param("bias_table", _flat_normal, shape)
        if tuple(size) == tuple(self.window):
            return relative_bias(table, size)
        if self.reference_bias:
            tokens = int(np.prod(size))
            return relative_bias(table, self.window)[:, :tokens, :tokens]
        middle = tuple(slice(w - s, w + s - 1) for w, s in zip(self.window, size, strict=True))
        return relative_bias(table[middle], size)


def _flat_normal(key: Array, shape: Sequence[int]) -> Array:
    """Normal with standard deviation 0.02, drawn flat: quicker to compile."""
    return 0.02 * jax.random.normal(key, (int(np.prod(shape)),)).reshape(shape)


def _roll(x: Array, shift: Sequence[int]) -> Array:
    axes = [a for a, s in enumerate(shift, start=1) if s]
    return jnp.roll(x, [s for s in shift if s], axes) if axes else x


def to_windows(x: Array, size: Sequence[int]) -> Array:
    """[B, X, Y, Z, C] -> [B * windows, tokens, C], windows and tokens in the order of (x, y, z), z fastest."""
    n, *grid, channels = x.shape
    split = [v for g, s in zip(grid, size, strict=True) for v in (g // s, s)]
    return x.reshape(n, *split, channels).transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, int(np.prod(size)), channels)


def from_windows(windows: Array, size: Sequence[int], grid: Sequence[int]) -> Array:
    """The inverse of `to_windows` for a grid of that many tokens."""
    counts = [g // s for g, s in zip(grid, size, strict=True)]
    x = windows.reshape(-1, *counts, *size, windows.shape[-1])
    return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(-1, *grid, windows.shape[-1])


def shifted_regions(grid: Sequence[int], size: Sequence[int], shift: Sequence[int]) -> np.ndarray:
    """[windows, tokens] numbers: after the cyclic shift, tokens of a window that were neighbours before have one."""
    number = np.zeros(tuple(grid), np.int32)
    for axis, (g, w, s) in enumerate(zip(grid, size, shift, strict=True)):
        place = np.arange(g)
        part = (place >= g - w).astype(np.int32) + (place >= g - s) if s else np.zeros(g, np.int32)
        number = 3 * number + part.reshape([-1 if a == axis else 1 for a in range(3)])
    split = [v for g, s in zip(grid, size, strict=True) for v in (g // s, s)]
    return number.reshape(split).transpose(0, 2, 4, 1, 3, 5).reshape(-1, int(np.prod(size)))
