"""Sliding windows: where they start, how they are weighted, and a jitted loop that blends a network over a volume."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from medjax.errors import UserError

# Least weight along an axis, relative to the centre's: no voxel of a window may count for nothing.
_FLOOR = 1e-4


def positions(size: int, patch: int, overlap: float) -> list[int]:
    """Starts of the windows along one axis, spread evenly from edge to edge.

    The fewest windows whose step is at most `patch * (1 - overlap)`, at steps as equal as whole voxels allow: 240
    voxels, patch 128, overlap 0.5 give 0, 56, 112 (the rule of nnU-Net, Isensee et al. 2021).

    Args:
        size: Voxels along the axis.
        patch: Window length in voxels; an axis not longer than that has the one window 0.
        overlap: Least share of a window that its neighbour covers too, in [0, 1).
    """
    if patch < 1 or not 0 <= overlap < 1:
        raise UserError(f"sliding window: patch {patch} must be positive and overlap {overlap} in [0, 1)")
    if size <= patch:
        return [0]
    step = max(1.0, patch * (1.0 - overlap))
    count = math.ceil((size - patch) / step) + 1
    return [round(index * (size - patch) / (count - 1)) for index in range(count)]


def gaussian(patch: Sequence[int], sigma_scale: float = 0.125) -> np.ndarray:
    """Weight of each voxel of a window, float32 `patch`: a Gaussian about its centre, at most 1 and never 0.

    Standard deviation `sigma_scale` times the patch along each axis (1/8 as in nnU-Net). It is a product of one profile
    an axis, and symmetric, so mirrored windows are weighted alike.
    """
    weight = np.ones(())
    for size in patch:
        weight = weight[..., None] * _profile(size, sigma_scale)
    return weight.astype(np.float32)


def _profile(size: int, sigma_scale: float) -> np.ndarray:
    offset = np.arange(size) - (size - 1) / 2.0
    profile = np.exp(-0.5 * (offset / (sigma_scale * size)) ** 2)
    return np.maximum(profile / profile.max(), _FLOOR)


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised array that starts at a multiple of 64 bytes, so that JAX on CPU uses it in place, uncopied."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    offset = -memory.ctypes.data % 64
    return memory[offset : offset + size].view(dtype).reshape(shape)


class SlidingWindow:
    """Applies a network to whole volumes, window by window, in one compiled program.

    Windows overlap and are blended with Gaussian weights that are divided, ahead of time, by their sum over the windows
    that cover a voxel: the weights of a voxel add up to 1, and what the loop accumulates is the result. Since both the
    Gaussian and the grid of windows are products over the axes, so are the weights: three short tables, no volume of
    weights. Blending is float32 whatever the network computes in.

    Volumes are laid in a corner of a *canvas*, and the program is compiled for the canvas, not for the volume: the
    number of windows is a run-time number, only the volume's own windows are computed, and the rest of the canvas is
    never read. The canvas only ever grows, so a cohort compiles once if `canvas` is given or its largest volume
    comes first.

    Device memory, beside the network's: canvas voxels x (C x bytes of the input + K x 4) bytes.

    Args:
        apply_fn: `(variables, x [B, *patch, C]) -> logits [B, *patch, K]`, any float type; with `pooled_out` a pair of
            that and of `[B, P]`, which speaks of the window as a whole.
        patch: Window size in voxels.
        channels_out: K; may be 0 where `pooled_out` is not.
        pooled_out: P. The mean over the windows, each counted once, is returned beside the volume.
        odd: For each axis the channels (of K, then P) that change sign when the volume is mirrored along it: offsets.
        swap: Pairs of channels of K that trade places when the volume is mirrored along axis 0: the left and the right
            of something.
        overlap: Least overlap of neighbouring windows, see `positions`.
        batch: Windows a call of the network, B.
        mirror_axes: Test-time mirroring over these axes (0, 1, 2): the network sees a window under all combinations
            of flips and the flipped-back outputs are averaged (2, 4 or 8 times the cost).
        combine: What is averaged over windows and mirrors: 'logits' (as nnU-Net does; the result is logits) or
            'probabilities' (the result is probabilities).
        activation: For 'probabilities': from logits to probabilities, over the last axis.
        finish: Last step of the compiled program, from the blended `[X, Y, Z, K]` to an array or a tree of arrays
            `[X, Y, Z, ...]`, voxel by voxel (it is given the whole canvas): a softmax, an argmax, a split by task.
        canvas: Smallest canvas in voxels, say the largest size in the cohort.
        bucket: Canvas sizes are multiples of this.
        pad_value: What a volume smaller than the patch is padded with, evenly on both sides. 0 is right for
            images normalised with zero for background, or to mean zero; else give the value of air.
        sigma_scale: Of the Gaussian, see `gaussian`.
        lay, collect: Of several devices: lays the windows `[B, *patch, C]` of a call over them, and brings the results
            (an array, a tree of arrays) to each of them.

    Attributes:
        compiles: Programs compiled so far.
    """

    def __init__(
        self,
        apply_fn: Callable[[Any, jax.Array], jax.Array],
        patch: Sequence[int],
        channels_out: int,
        *,
        pooled_out: int = 0,
        odd: Sequence[Sequence[int]] = ((), (), ()),
        swap: Sequence[tuple[int, int]] = (),
        overlap: float = 0.5,
        batch: int = 1,
        mirror_axes: Sequence[int] = (),
        combine: Literal["logits", "probabilities"] = "logits",
        activation: Callable[[jax.Array], jax.Array] = jax.nn.softmax,
        finish: Callable[[jax.Array], Any] | None = None,
        canvas: Sequence[int] | None = None,
        bucket: int = 32,
        pad_value: float = 0.0,
        sigma_scale: float = 0.125,
        lay: Callable[[jax.Array], jax.Array] = lambda windows: windows,
        collect: Callable[[Any], Any] = lambda results: results,
    ):
        if len(patch) != 3 or min(patch) < 1 or batch < 1 or bucket < 1:
            raise UserError(f"sliding window: patch {tuple(patch)}, batch {batch} and bucket {bucket} must be positive")
        if not 0 <= overlap < 1:
            raise UserError(f"sliding window: overlap {overlap} is outside [0, 1)")
        if not set(mirror_axes) <= {0, 1, 2}:
            raise UserError(f"sliding window: mirror axes {tuple(mirror_axes)} are not among 0, 1, 2")
        if combine not in ("logits", "probabilities"):
            raise UserError(f"sliding window: combine {combine!r} is not 'logits' or 'probabilities'")
        self.patch = tuple(int(size) for size in patch)
        if channels_out < 0 or pooled_out < 0 or not channels_out + pooled_out:
            raise UserError(f"sliding window: {channels_out} + {pooled_out} channels; the network must have an output")
        self.channels_out = channels_out
        self.pooled_out = pooled_out
        signs = np.ones((3, channels_out + pooled_out), np.float32)
        for axis, channels in enumerate(odd):
            signs[axis, list(channels)] = -1.0
        self._signs = signs
        self._other_side = np.arange(channels_out)
        for left, right in swap:
            self._other_side[[left, right]] = right, left
        self.overlap = overlap
        self.compiles = 0
        self._apply_fn = apply_fn
        self._batch = batch
        self._combine = combine
        self._activation = activation
        self._finish = finish
        self._bucket = bucket
        self._pad_value = pad_value
        self._lay, self._collect = lay, collect
        self._profiles = [_profile(size, sigma_scale) for size in self.patch]
        flips = itertools.product(*((False, True) if axis in set(mirror_axes) else (False,) for axis in range(3)))
        self._flips = np.array(list(flips))
        self._canvas = self._rounded(canvas or self.patch)
        self._program = jax.jit(self._run)

    def __call__(self, variables: Any, volume: np.ndarray) -> Any:
        """Result for a volume `[X, Y, Z, C]`: float32 `[X, Y, Z, K]` on its grid, or what `finish` makes of that.

        With `pooled_out` a pair of that and of float32 `[P]`. The arrays are NumPy's, read-only, and views into the
        canvas.
        """
        volume = np.asarray(volume)
        if volume.ndim != 4:
            raise UserError(f"sliding window: expected a volume [X, Y, Z, C], not shape {volume.shape}")
        size = volume.shape[:3]
        padded = tuple(max(axis, patch) for axis, patch in zip(size, self.patch, strict=True))
        self._canvas = tuple(map(max, self._canvas, self._rounded(padded)))
        canvas = _empty((*self._canvas, volume.shape[3]), volume.dtype)
        if padded != size:
            canvas[tuple(slice(axis) for axis in padded)] = self._pad_value
        inside = tuple(slice((p - s) // 2, (p - s) // 2 + s) for p, s in zip(padded, size, strict=True))
        canvas[inside] = volume
        starts, weights, counts = self._grid(padded)
        result, pooled = self._program(variables, canvas, starts, weights, counts)
        result = jax.tree.map(lambda array: np.asarray(array)[inside], result)
        return (result, np.asarray(pooled)) if self.pooled_out else result

    def _rounded(self, size: Sequence[int]) -> tuple[int, ...]:
        """Smallest canvas of whole buckets that holds `size` and a window."""
        return tuple(
            math.ceil(max(axis, patch) / self._bucket) * self._bucket
            for axis, patch in zip(size, self.patch, strict=True)
        )

    def _grid(self, size: Sequence[int]) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
        """Per axis: starts int32 [n] and weights float32 [n, patch], n the most the canvas can need; and counts [3]."""
        starts, weights, counts = [], [], []
        for axis, (length, patch, profile) in enumerate(zip(size, self.patch, self._profiles, strict=True)):
            here = positions(length, patch, self.overlap)
            total = np.zeros(length)
            for start in here:
                total[start : start + patch] += profile
            most = len(positions(self._canvas[axis], patch, self.overlap))
            starts.append(np.zeros(most, np.int32))
            weights.append(np.zeros((most, patch), np.float32))
            starts[-1][: len(here)] = here
            weights[-1][: len(here)] = [profile / total[start : start + patch] for start in here]
            counts.append(len(here))
        return starts, weights, np.array(counts, np.int32)

    def _run(
        self, variables: Any, canvas: jax.Array, starts: list[jax.Array], weights: list[jax.Array], counts: jax.Array
    ) -> Any:
        """The compiled program: canvas [X, Y, Z, C] -> float32 [X, Y, Z, K], finished, and [P]."""
        self.compiles += 1  # runs when traced only
        count = self.channels_out
        # Z and K share an axis: rows long enough for vector code where K alone is not.
        z_weights = jnp.repeat(weights[2], count, axis=1)
        windows = counts.prod()

        def step(number: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            result, pooled = carry
            index = number * self._batch + jnp.arange(self._batch)
            real = index < windows
            index = jnp.minimum(index, windows - 1)
            at = jnp.unravel_index(index, (counts[0], counts[1], counts[2]))
            corner = [axis[place] for axis, place in zip(starts, at, strict=True)]  # 3 x [B]
            batch = jnp.stack(
                [
                    lax.dynamic_slice(canvas, (*(axis[b] for axis in corner), 0), (*self.patch, canvas.shape[3]))
                    for b in range(self._batch)
                ]
            )
            dense, whole = self._predict(variables, self._lay(batch))
            pooled = pooled + real.astype(jnp.float32) @ whole
            if not count:
                return result, pooled
            outputs = dense.reshape(self._batch, *self.patch[:2], -1)
            for b in range(self._batch):
                x, y, z = (axis[b] for axis in corner)
                weight = (weights[0][at[0][b]] * real[b])[:, None, None] * weights[1][at[1][b]][:, None]
                added = outputs[b] * (weight * z_weights[at[2][b]])
                origin = (x, y, z * count)
                result = lax.dynamic_update_slice(
                    result, lax.dynamic_slice(result, origin, added.shape) + added, origin
                )
            return result, pooled

        empty = jnp.zeros((*canvas.shape[:2], canvas.shape[2] * count), jnp.float32)
        first = (empty, jnp.zeros((self.pooled_out,), jnp.float32))
        result, pooled = lax.fori_loop(0, (windows + self._batch - 1) // self._batch, step, first)
        result = result.reshape(*canvas.shape[:3], count)
        return self._collect((result if self._finish is None else self._finish(result), pooled / windows))

    def _predict(self, variables: Any, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Network output averaged over mirrors, float32 [B, *patch, K] and [B, P]."""

        def once(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            outputs = self._apply_fn(variables, x)
            y, whole = outputs if self.pooled_out else (outputs, jnp.zeros((len(x), 0)))
            wanted = (*x.shape[:4], self.channels_out), (len(x), self.pooled_out)
            for found, shape in zip((y.shape, whole.shape), wanted, strict=True):
                if found != shape:
                    raise ValueError(f"the network's output is {found}, not {shape}")
            y, whole = y.astype(jnp.float32), whole.astype(jnp.float32)
            return (self._activation(y) if self._combine == "probabilities" else y), whole

        if len(self._flips) == 1:
            return once(batch)
        flips = jnp.asarray(self._flips)
        axes = [axis for axis in range(3) if self._flips[:, axis].any()]

        def flipped(x: jax.Array, flip: jax.Array) -> jax.Array:
            for axis in axes:
                x = jnp.where(flip[axis], jnp.flip(x, axis + 1), x)
            return x

        # A loop, not an unrolled sum: the network is compiled once, not 2, 4 or 8 times over.
        def add(number: jax.Array, total: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            y, whole = once(flipped(batch, flips[number]))
            if (self._signs < 0).any():
                sign = jnp.where(flips[number][:, None], self._signs, 1.0).prod(0)
                y, whole = y * sign[: self.channels_out], whole * sign[self.channels_out :]
            if (self._other_side != np.arange(self.channels_out)).any():
                y = jnp.where(flips[number][0], y[..., self._other_side], y)
            return total[0] + flipped(y, flips[number]), total[1] + whole

        empty = jnp.zeros((*batch.shape[:4], self.channels_out)), jnp.zeros((len(batch), self.pooled_out))
        y, whole = lax.fori_loop(0, len(self._flips), add, empty)
        return y / len(self._flips), whole / len(self._flips)
