"""Sparse linear maps along the axes of an image: blurring, resampling along an axis, and the like.

A native kernel on the CPU (`medjax.ops.native`), in place; elsewhere one matrix product an axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from medjax.ops import native
from medjax.ops.gated import chosen
from medjax.ops.native import lowering


class Taps(NamedTuple):
    """Along an axis of N voxels, `out[i] = sum_k weight[i, k] * in[source[i, k]]`; sources may repeat.

    Attributes:
      source: int32 [..., N, K], in 0..N-1. weight: float32 [..., N, K]. For images with the leading axes [B, C].
    """

    source: Array
    weight: Array


def separable(image: Array, gate: Array, taps: Sequence[Taps]) -> Array:
    """Maps the chosen channels along the three axes, one after the other.

    Args:
      image: [B, X, Y, Z, C], floating. gate: bool [B, C]; other channels stay bit for bit.
      taps: of the three axes, [B, C, N, K].
    """
    operands = (gate.astype(jnp.float32), image, *(table for pair in taps for table in pair))
    if not native.enabled():
        return _xla(*operands)[0]
    return lowering.bind(_separable_p, *operands)[0]


def identity(size: int) -> Taps:
    """Taps [N, 1] that change nothing."""
    return Taps(jnp.arange(size, dtype=jnp.int32)[:, None], jnp.ones((size, 1), jnp.float32))


def gaussian(size: int, sigma: Array, largest: float) -> Taps:
    """Taps [N, K] of a Gaussian of `sigma` voxels, cut at 4 sigma; the image goes on mirrored (b a | a b c d | d c).

    As `scipy.ndimage.gaussian_filter1d` with its defaults. `sigma` may be traced, and 0 (no blur), but not above
    `largest`, which fixes K.
    """
    reach = max(1, int(4 * largest + 0.5))
    offset = jnp.arange(-reach, reach + 1)
    weight = jnp.exp(-0.5 * jnp.square(offset / jnp.maximum(sigma, 1e-6)))
    weight = jnp.where(jnp.abs(offset) <= jnp.floor(4 * sigma + 0.5), weight, 0.0)
    at = jnp.mod(jnp.arange(size)[:, None] + offset, 2 * size)
    at = jnp.where(at < size, at, 2 * size - 1 - at).astype(jnp.int32)
    return Taps(at, jnp.broadcast_to(weight / weight.sum(), at.shape).astype(jnp.float32))


def coarse(size: int, factor: Array) -> Taps:
    """Taps [N, 2]: down to `round(N * factor)` voxels by picking the nearest, and back linearly; 0 < factor <= 1.

    Voxels of the coarse grid divide the field of view evenly, as in nnU-Net's low-resolution transform.
    """
    few = jnp.clip(jnp.round(size * factor), 1, size)
    at = jnp.maximum((jnp.arange(size) + 0.5) * (few / size) - 0.5, 0.0)
    low = jnp.minimum(jnp.floor(at), few - 1)
    high = jnp.minimum(low + 1, few - 1)
    share = at - low
    source = jnp.clip(jnp.floor((jnp.stack([low, high], -1) + 0.5) * (size / few)), 0, size - 1)
    taps = Taps(source.astype(jnp.int32), jnp.stack([1 - share, share], -1))
    whole = few == size  # bit for bit, whatever the rounding above
    return Taps(
        jnp.where(whole, jnp.arange(size, dtype=jnp.int32)[:, None], taps.source),
        jnp.where(whole, jnp.array([1.0, 0.0]), taps.weight).astype(jnp.float32),
    )


def _xla(gate: Array, image: Array, *tables: Array) -> list[Array]:
    def one(x: Array, on: Array, *own: Array) -> Array:
        y = jnp.moveaxis(x, -1, 0).astype(jnp.float32)
        for axis in range(3):
            source, weight = own[2 * axis], own[2 * axis + 1]
            size = x.shape[axis]
            matrix = jnp.sum((source[..., None] == jnp.arange(size)) * weight[..., None], axis=2)  # [C, N, N]
            contract = {0: "cij,cjyz->ciyz", 1: "cij,cxjz->cxiz", 2: "cij,cxyj->cxyi"}[axis]
            y = jnp.einsum(contract, matrix, y, precision=lax.Precision.HIGHEST)
        return jnp.where(on != 0, jnp.moveaxis(y, 0, -1).astype(x.dtype), x)

    return [chosen(one, jnp.any(gate != 0, axis=1), image, gate, *tables)]


def _native(gate: Array, image: Array, *tables: Array) -> list[Array]:
    if image.size == 0:
        return [image]
    shape = jax.ShapeDtypeStruct(image.shape, image.dtype)
    return [jax.ffi.ffi_call("medjax_separable", shape, input_output_aliases={1: 0})(gate, image, *tables)]


_separable_p = lowering.primitive(
    lowering.Kernel(
        "separable",
        operands=(True,) * 8,
        results=(True,),
        abstract=lambda gate, image, *tables: [lowering.result_type(image, image.shape)],
        xla=_xla,
        native=_native,
        accepts=lambda gate, image, *tables: image.dtype in (jnp.float32, jnp.bfloat16),
    )
)
