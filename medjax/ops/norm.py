"""Instance normalisation with its activation, channels last."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def instance_norm_act(
    x: Array, scale: Array, bias: Array, negative_slope: float | None = 0.01, eps: float = 1e-5
) -> Array:
    """Instance normalisation (Ulyanov et al. 2016), scale and bias, then leaky ReLU.

    Args:
      x: [N, X, Y, Z, C].
      scale, bias: [C], float32.
      negative_slope: of the leaky ReLU below zero; None for no activation.
      eps: added to the variance.

    Returns:
      Array of the shape and type of `x`. Mean and (biased) variance of each example and channel are in float32.
    """
    wide = x.astype(jnp.float32)
    mean = wide.mean((1, 2, 3), keepdims=True)
    variance = jnp.square(wide - mean).mean((1, 2, 3), keepdims=True)
    y = (wide - mean) * (jax.lax.rsqrt(variance + eps) * scale) + bias
    if negative_slope is not None:
        y = jnp.where(y >= 0, y, negative_slope * y)
    return y.astype(x.dtype)
