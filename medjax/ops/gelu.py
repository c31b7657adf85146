"""The Gaussian error linear unit: a native kernel on the CPU, XLA's own operations elsewhere.

In float32 XLA's error function takes a CPU longer than reading and writing the tensor does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.interpreters import ad

from medjax.ops import native
from medjax.ops.native import lowering


def gelu(x: Array) -> Array:
    """x Φ(x) with Φ the standard normal's distribution function (Hendrycks and Gimpel 2016), not its approximation.

    Args:
      x: floating, any shape.

    Returns:
      Array of the shape and type of `x`, computed in float32 at least; Φ is within 2e-7.
    """
    if not native.enabled() or x.ndim == 0:
        return _xla(x)[0]
    return lowering.bind(_gelu_p, x)[0]


# --- the definition, in XLA's own operations -------------------------------------------------------------------------


def _xla(x: Array) -> list[Array]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # By the error function, on a CPU a third of the work of its complement (`jax.nn.gelu`). Where the two differ, far
    # below zero, the product is below 1e-6.
    return [(0.5 * wide * (1 + lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)]


def _xla_grad(g: Array, x: Array) -> list[Array]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    slope = 0.5 * (1 + lax.erf(wide * math.sqrt(0.5))) + wide * jnp.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    return [(g.astype(wide.dtype) * slope).astype(x.dtype)]


# --- the native kernel -----------------------------------------------------------------------------------------------


def _native(x: Array) -> list[Array]:
    return [jax.ffi.ffi_call("medjax_gelu", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)] if x.size else [x]


def _native_grad(g: Array, x: Array) -> list[Array]:
    return [jax.ffi.ffi_call("medjax_gelu_grad", jax.ShapeDtypeStruct(x.shape, x.dtype))(g, x)] if x.size else [x]


def _same(x: Any, *_: Any) -> list[Any]:
    return [lowering.result_type(x, x.shape)]


_gelu_p = lowering.primitive(lowering.Kernel("gelu", (True,), (True,), _same, _xla, _native))
# Linear in its first operand.
_grad_p = lowering.primitive(lowering.Kernel("gelu_grad", (True, True), (True,), _same, _xla_grad, _native_grad))


# --- derivatives -----------------------------------------------------------------------------------------------------


def _jvp(primals: Sequence[Array], tangents: Sequence[Any]) -> tuple[list[Array], list[Array]]:
    (x,), (t,) = primals, tangents
    return lowering.bind(_gelu_p, x), lowering.bind(_grad_p, ad.instantiate_zeros(t), x)


def _grad_jvp(primals: Sequence[Array], tangents: Sequence[Any]) -> tuple[list[Array], list[Any]]:
    (g, x), (dg, dx) = primals, tangents
    out, change = lowering.bind(_grad_p, g, x), None
    if type(dg) is not ad.Zero:
        change = lowering.bind(_grad_p, dg, x)[0]
    if type(dx) is not ad.Zero:
        curved = jax.jvp(lambda x: _xla_grad(g, x)[0], (x,), (dx,))[1]
        change = curved if change is None else change + curved
    return out, [ad.Zero(jax.typeof(out[0])) if change is None else change]


def _grad_transpose(cotangents: Sequence[Any], g: Any, x: Any) -> list[Any]:
    (ct,) = cotangents
    return [ct if type(ct) is ad.Zero else lowering.bind(_grad_p, ct, x)[0], None]


ad.primitive_jvps[_gelu_p] = _jvp
ad.primitive_jvps[_grad_p] = _grad_jvp
ad.primitive_transposes[_grad_p] = _grad_transpose
