"""Point operations on intensities that need a channel's own moments: brightness, contrast, power laws.

A native kernel on the CPU (`medjax.ops.native`), in place; elsewhere XLA's own operations.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from medjax.ops import native
from medjax.ops.gated import chosen
from medjax.ops.native import lowering

_ABOUT_MEAN, _KEEP_RANGE, _POWER, _INVERT, _KEEP_MOMENTS = 1, 2, 4, 8, 16
_SMALL = 1e-6  # least range and deviation divided by
_VOXELS = (0, 1, 2)


def linear(
    image: Array, gate: Array, gain: Array, offset: Array, *, about_mean: bool = False, keep_range: bool = False
) -> Array:
    """`x * gain + offset` in the chosen channels.

    Args:
      image: [B, X, Y, Z, C], floating. gate: bool [B, C]; other channels stay bit for bit. gain, offset: [B, C].
      about_mean: the channel's mean is stretched about: `(x - mean) * gain + mean + offset`.
      keep_range: the result is clipped to the channel's own minimum and maximum before.
    """
    flags = _ABOUT_MEAN * about_mean | _KEEP_RANGE * keep_range
    return _tone(image, gate, gain, offset, jnp.ones_like(gain), flags)


def power(image: Array, gate: Array, exponent: Array, *, invert: bool = False, keep_moments: bool = True) -> Array:
    """Power law on the chosen channels, each scaled to 0..1 by its minimum and maximum and back.

    Args:
      image: [B, X, Y, Z, C], floating. gate: bool [B, C]; other channels stay bit for bit. exponent: [B, C], above 0.
      invert: of the inverted image, `1 - (1 - x)^exponent`.
      keep_moments: the channel's mean and standard deviation are restored.
    """
    one = jnp.ones_like(exponent)
    return _tone(image, gate, one, one, exponent, _POWER | _INVERT * invert | _KEEP_MOMENTS * keep_moments)


def _xla(gate: Array, image: Array, gain: Array, offset: Array, exponent: Array, *, flags: int) -> list[Array]:
    def one(x: Array, on: Array, gain: Array, offset: Array, exponent: Array) -> Array:
        v = x.astype(jnp.float32)
        low, high = v.min(_VOXELS), v.max(_VOXELS)
        if flags & _POWER:
            width = jnp.maximum(high - low, _SMALL)
            scaled = jnp.clip((high - v) / width if flags & _INVERT else (v - low) / width, 0, 1)
            curved = scaled**exponent * width
            y = high - curved if flags & _INVERT else curved + low
            if flags & _KEEP_MOMENTS:
                y = (y - y.mean(_VOXELS)) / jnp.maximum(y.std(_VOXELS), _SMALL) * v.std(_VOXELS) + v.mean(_VOXELS)
        else:
            mean = v.mean(_VOXELS)
            y = (v - mean) * gain + (mean + offset) if flags & _ABOUT_MEAN else v * gain + offset
            if flags & _KEEP_RANGE:
                y = jnp.clip(y, low, high)
        return jnp.where(on != 0, y.astype(x.dtype), x)

    return [chosen(one, jnp.any(gate != 0, axis=1), image, gate, gain, offset, exponent)]


def _native(gate: Array, image: Array, *tables: Array, flags: int) -> list[Array]:
    if image.size == 0:
        return [image]
    call = jax.ffi.ffi_call("medjax_tone", jax.ShapeDtypeStruct(image.shape, image.dtype), input_output_aliases={1: 0})
    return [call(gate, image, *tables, flags=np.int32(flags))]


_tone_p = lowering.primitive(
    lowering.Kernel(
        "tone",
        operands=(True,) * 5,
        results=(True,),
        abstract=lambda gate, image, *tables, **_: [lowering.result_type(image, image.shape)],
        xla=_xla,
        native=_native,
        accepts=lambda gate, image, *tables, **_: image.dtype in (jnp.float32, jnp.bfloat16),
    )
)


def _tone(image: Array, gate: Array, gain: Array, offset: Array, exponent: Array, flags: int) -> Array:
    operands = (gate.astype(jnp.float32), image, *(t.astype(jnp.float32) for t in (gain, offset, exponent)))
    if not native.enabled():
        return _xla(*operands, flags=flags)[0]
    return lowering.bind(_tone_p, *operands, flags=flags)[0]
