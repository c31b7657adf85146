"""Instance normalisation with its activation, channels last: a native kernel on CPU, XLA's own operations elsewhere.

Both passes are bound by memory. XLA on CPU reads the tensor more often than needed and on one thread; the kernel
(`medjax.ops.native`) reads it twice and writes it once forward, and keeps no more for the backward pass than its input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.interpreters import ad

from medjax.ops import native
from medjax.ops.native import lowering

Array = jax.Array
_VOXELS = (1, 2, 3)


def instance_norm_act(
    x: Array, scale: Array, bias: Array, negative_slope: float | None = 0.01, eps: float = 1e-5
) -> Array:
    """Instance normalisation (Ulyanov et al. 2016), scale and bias, then leaky ReLU.

    Args:
      x: [N, X, Y, Z, C], floating.
      scale, bias: [C].
      negative_slope: of the leaky ReLU below zero; None for no activation.
      eps: added to the variance.

    Returns:
      Array of the shape and type of `x`. Mean and (biased) variance of each example and channel, scale and bias are in
      float32 at least. Two runs of a program agree bit for bit.

    Raises:
      ValueError: operands that do not fit together.
    """
    if x.ndim != 5 or scale.shape != x.shape[4:] or bias.shape != x.shape[4:]:
        raise ValueError(
            f"instance_norm_act: expected x [N, X, Y, Z, C] with scale and bias [C], got {x.shape}, {scale.shape}, "
            f"{bias.shape}"
        )
    wide = jnp.promote_types(x.dtype, jnp.float32)
    scale, bias = scale.astype(wide), bias.astype(wide)
    options = {"slope": 1.0 if negative_slope is None else float(negative_slope), "eps": float(eps)}
    if not native.enabled():
        return _xla_forward(x, scale, bias, **options)[0]
    return lowering.bind(_forward_p, x, scale, bias, **options)[0]


# --- the definition, in XLA's own operations -------------------------------------------------------------------------
# z = (x - mean) * r * scale + bias with r = 1 / sqrt(variance + eps); y = z where z >= 0, else slope * z.


def _over_voxels(table: Array) -> Array:
    return table[:, None, None, None, :]


def _moments(x: Array, eps: float) -> tuple[Array, Array]:
    mean = x.mean(_VOXELS)
    return mean, lax.rsqrt(jnp.square(x - _over_voxels(mean)).mean(_VOXELS) + eps)


def _xla_forward(x: Array, scale: Array, bias: Array, *, slope: float, eps: float) -> list[Array]:
    """-> y, mean [N, C], r [N, C]."""
    wide = x.astype(scale.dtype)
    mean, r = _moments(wide, eps)
    z = (wide - _over_voxels(mean)) * _over_voxels(r * scale) + bias
    return [jnp.where(z >= 0, z, slope * z).astype(x.dtype), mean, r]


def _xla_backward(
    x: Array, g: Array, mean: Array, r: Array, scale: Array, bias: Array, *, slope: float, eps: float
) -> list[Array]:
    """-> dx, and per example dscale [N, C], dbias [N, C]."""
    centred = x.astype(scale.dtype) - _over_voxels(mean)
    gain = _over_voxels(r * scale)
    dz = g.astype(scale.dtype)
    dz = jnp.where(centred * gain + bias >= 0, dz, slope * dz)
    dbias = dz.sum(_VOXELS)
    dscale = (dz * centred).sum(_VOXELS) * r
    voxels = math.prod(x.shape[1:4])
    dx = gain * (dz - _over_voxels(dbias / voxels) - centred * _over_voxels(dscale * r / voxels))
    return [dx.astype(x.dtype), dscale, dbias]


def _xla_tangent(
    dx: Array, dscale: Array, dbias: Array, x: Array, mean: Array, r: Array, scale: Array, bias: Array,
    *, slope: float, eps: float,
) -> list[Array]:  # fmt: skip
    """The forward pass's tangent for tangents (dx, dscale, dbias)."""
    return [jax.jvp(lambda *a: _xla_forward(*a, slope=slope, eps=eps)[0], (x, scale, bias), (dx, dscale, dbias))[1]]


# --- the native kernel -----------------------------------------------------------------------------------------------


def _native_forward(x: Array, scale: Array, bias: Array, *, slope: float, eps: float) -> list[Array]:
    if x.size == 0:
        return _xla_forward(x, scale, bias, slope=slope, eps=eps)
    table = jax.ShapeDtypeStruct((x.shape[0], x.shape[4]), jnp.float32)
    call = jax.ffi.ffi_call("medjax_instance_norm", [jax.ShapeDtypeStruct(x.shape, x.dtype), table, table])
    return list(call(x, scale, bias, slope=np.float32(slope), eps=np.float32(eps)))


def _native_backward(*operands: Array, slope: float, eps: float) -> list[Array]:
    x = operands[0]
    if x.size == 0:
        return _xla_backward(*operands, slope=slope, eps=eps)
    table = jax.ShapeDtypeStruct((x.shape[0], x.shape[4]), jnp.float32)
    call = jax.ffi.ffi_call("medjax_instance_norm_grad", [jax.ShapeDtypeStruct(x.shape, x.dtype), table, table])
    return list(call(*operands, slope=np.float32(slope)))


def _with_tables(x: Any, *others: Any, **_: Any) -> list[Any]:
    table = lowering.result_type(x, (x.shape[0], x.shape[4]), jnp.promote_types(x.dtype, jnp.float32))
    return [lowering.result_type(x, x.shape), table, table]


_forward_p = lowering.primitive(
    lowering.Kernel(
        "instance_norm",
        operands=(True, False, False),
        results=(True, True, True),
        abstract=_with_tables,
        xla=_xla_forward,
        native=_native_forward,
    )
)
_backward_p = lowering.primitive(
    lowering.Kernel(
        "instance_norm_grad",
        operands=(True, True, True, True, False, False),
        results=(True, True, True),
        abstract=_with_tables,
        xla=_xla_backward,
        native=_native_backward,
    )
)
# Forward mode, and the linear map whose transpose the backward pass is. No native form: nothing trains with it.
_tangent_p = lowering.primitive(
    lowering.Kernel(
        "instance_norm_tangent",
        operands=(True, False, False, True, True, True, False, False),
        results=(True,),
        abstract=lambda dx, *others, **_: [lowering.result_type(dx, dx.shape)],
        xla=_xla_tangent,
        native=_xla_tangent,
        accepts=lambda *avals, **_: False,
    )
)


# --- derivatives -----------------------------------------------------------------------------------------------------
# The mean and r handed from pass to pass are functions of x already counted in each formula: their own tangents are not
# propagated. Derivatives of the backward pass (second order) are XLA's.


def _forward_jvp(primals: Sequence[Array], tangents: Sequence[Any], **options: Any) -> tuple[list[Array], list[Any]]:
    x, scale, bias = primals
    y, mean, r = lowering.bind(_forward_p, *primals, **options)
    given = [ad.instantiate_zeros(t) for t in tangents]
    (dy,) = lowering.bind(_tangent_p, *given, x, mean, r, scale, bias, **options)
    return [y, mean, r], [dy, ad.Zero(jax.typeof(mean)), ad.Zero(jax.typeof(r))]


def _tangent_transpose(cotangents: Sequence[Any], *operands: Any, **options: Any) -> list[Any]:
    given, (x, mean, r, scale, bias) = operands[:3], operands[3:]
    (g,) = cotangents
    found: list[Any]
    if type(g) is ad.Zero:
        found = [ad.Zero(a.aval) if ad.is_undefined_primal(a) else None for a in given]
    else:
        dx, dscale, dbias = lowering.bind(_backward_p, x, g, mean, r, scale, bias, **options)
        found = [dx, dscale.sum(0), dbias.sum(0)]
    return [f if ad.is_undefined_primal(a) else None for f, a in zip(found, given, strict=True)] + [None] * 5


def _jvp_of(function: Any, primitive: Any, primals: Sequence[Array], tangents: Sequence[Any], **options: Any) -> Any:
    out = lowering.bind(primitive, *primals, **options)
    given = [ad.instantiate_zeros(t) for t in tangents]
    return out, jax.jvp(lambda *a: function(*a, **options), tuple(primals), tuple(given))[1]


def _whole_backward(
    x: Array, g: Array, mean: Array, r: Array, scale: Array, bias: Array, *, slope: float, eps: float
) -> list[Array]:
    """The backward pass as a function of x alone, not of the mean and r that came with it."""
    mean, r = _moments(x.astype(scale.dtype), eps)
    return _xla_backward(x, g, mean, r, scale, bias, slope=slope, eps=eps)


ad.primitive_jvps[_forward_p] = _forward_jvp
ad.primitive_transposes[_tangent_p] = _tangent_transpose
ad.primitive_jvps[_tangent_p] = lambda primals, tangents, **options: _jvp_of(
    _xla_tangent, _tangent_p, primals, tangents, **options
)
ad.primitive_jvps[_backward_p] = lambda primals, tangents, **options: _jvp_of(
    _whole_backward, _backward_p, primals, tangents, **options
)
