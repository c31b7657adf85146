"""3D convolution, channels last: oneDNN on CPU, XLA's own elsewhere.

`conv3d` is what every layer uses. It and its two gradients are JAX primitives that lower to a native kernel
(`medjax.ops.native`) on the CPU and to `lax.conv_general_dilated` on every other platform, so one traced program
still lowers and exports for any of them. The three are linear in each operand and are each other's transposes, so
derivatives of every order, forward or reverse, stay within them.

Shapes: images [N, X, Y, Z, C], filters [KX, KY, KZ, C / groups, F] (`lax` names: NDHWC and DHWIO).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad

from medjax.ops import native
from medjax.ops.native import lowering

Triple = tuple[int, int, int]
Pads = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
Array = jax.Array

_DIMENSION_NUMBERS = ("NDHWC", "DHWIO", "NDHWC")


class _Window(NamedTuple):
    """What a convolution does besides its operands; one hashable parameter of the primitives."""

    strides: Triple
    padding: Pads
    dilation: Triple
    groups: int

    def output(self, space: Sequence[int], kernel: Sequence[int]) -> Triple:
        """Spatial shape of the output for an image of spatial shape `space`."""
        return tuple(  # type: ignore[return-value]
            max(0, (size + low + high - (width - 1) * dilation - 1) // stride + 1)
            for size, width, stride, (low, high), dilation in zip(
                space, kernel, self.strides, self.padding, self.dilation, strict=True
            )
        )


def _triple(name: str, value: int | Sequence[int]) -> Triple:
    values = (value,) * 3 if isinstance(value, int | np.integer) else tuple(value)
    if len(values) != 3 or any(int(v) != v or v < 1 for v in values):
        raise ValueError(f"conv3d: {name} must be one or three positive integers, got {value!r}")
    return tuple(int(v) for v in values)  # type: ignore[return-value]


def _pads(
    padding: str | int | Sequence[Any], space: Sequence[int], kernel: Triple, strides: Triple, dilation: Triple
) -> Pads:
    if isinstance(padding, str):
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
        try:
            pads = lax.padtype_to_pads(space, reach, strides, padding.upper())
        except RuntimeError:
            raise ValueError(f"conv3d: padding {padding!r} is neither 'SAME' nor 'VALID'") from None
    elif isinstance(padding, int | np.integer):
        pads = [(int(padding), int(padding))] * 3
    else:
        pads = [(p, p) if isinstance(p, int | np.integer) else tuple(p) for p in padding]
    if len(pads) != 3 or any(len(p) != 2 for p in pads):
        raise ValueError(f"conv3d: padding must be 'SAME', 'VALID', a number or three pairs, got {padding!r}")
    return tuple((int(low), int(high)) for low, high in pads)  # type: ignore[return-value]


def conv3d(
    x: Array,
    w: Array,
    strides: int | Sequence[int] = 1,
    padding: str | int | Sequence[Any] = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    bias: Array | None = None,
) -> Array:
    """3D convolution (cross-correlation, as everywhere in deep learning).

    Args:
      x: images [N, X, Y, Z, C], floating.
      w: filters [KX, KY, KZ, C / groups, F], of the type of `x`.
      strides: one or three steps.
      padding: 'SAME' or 'VALID' as in `lax`, a number, or three numbers or (low, high) pairs; zeros are padded.
      dilation: one or three distances between the filter's taps.
      groups: number of channel groups; `groups == C` is a depthwise convolution.
      bias: [F], added to every voxel, or None.

    Returns:
      [N, X', Y', Z', F] of the type of `x`. Sums are in float32 or better; two runs of a program agree bit for bit.
      A NaN or an infinity reaches every output whose window holds it; where the CPU filters by cells of 2 voxels
      (float32, three taps an axis, channels in sixteens) it may reach outputs one voxel further, as NaN.

    Raises:
      ValueError, TypeError: operands that do not fit together.
    """
    if x.ndim != 5 or w.ndim != 5:
        raise ValueError(f"conv3d: expected x [N, X, Y, Z, C] and w [KX, KY, KZ, C, F], got {x.shape} and {w.shape}")
    if x.dtype != w.dtype or (bias is not None and bias.dtype != x.dtype):
        types = ", ".join(str(a.dtype) for a in (x, w, bias) if a is not None)
        raise TypeError(f"conv3d: operands must have one type, got {types}")
    if groups < 1 or x.shape[4] != w.shape[3] * groups or w.shape[4] % groups:
        raise ValueError(f"conv3d: x {x.shape} and w {w.shape} do not fit together with groups={groups}")
    if bias is not None and bias.shape != w.shape[4:]:
        raise ValueError(f"conv3d: bias must be [{w.shape[4]}], got {bias.shape}")
    strides, dilation = _triple("strides", strides), _triple("dilation", dilation)
    pads = _pads(padding, x.shape[1:4], _kernel(w), strides, dilation)
    window = _Window(strides, pads, dilation, int(groups))
    if not native.enabled():
        return _xla_conv(x, w, bias, window=window)
    return _bind(_conv_p, x, w, *([] if bias is None else [bias]), window=window)


def patch_conv(x: Array, w: Array, bias: Array | None = None) -> Array:
    """A dense map from each cell of voxels to one voxel: a convolution whose stride is its kernel.

    Args:
      x: [N, X, Y, Z, C], whose axes are multiples of the cell's.
      w: [FX, FY, FZ, C, F], the cell's size first.
      bias: [F] or None.

    Returns:
      [N, X / FX, Y / FY, Z / FZ, F].
    """
    if x.ndim == w.ndim == 5 and any(size % factor for size, factor in zip(x.shape[1:4], w.shape, strict=False)):
        raise ValueError(f"patch_conv: x {x.shape} is not a whole number of cells {w.shape[:3]} along every axis")
    return conv3d(x, w, w.shape[:3], "VALID", bias=bias)


def patch_conv_transpose(x: Array, w: Array, bias: Array | None = None) -> Array:
    """A dense map from each voxel to a cell of voxels: a transposed convolution whose stride is its kernel.

    Args:
      x: [N, X, Y, Z, C].
      w: [FX, FY, FZ, C, F], the cell's size first.
      bias: [F] or None.

    Returns:
      [N, X * FX, Y * FY, Z * FZ, F]; voxel (i, j, k) of a cell is `x @ w[i, j, k] + bias`.
    """
    if x.ndim != 5 or w.ndim != 5 or x.shape[4] != w.shape[3]:
        raise ValueError(
            f"patch_conv_transpose: x {x.shape} and w {w.shape} are not [N, X, Y, Z, C], [FX, FY, FZ, C, F]"
        )
    if x.dtype != w.dtype or (bias is not None and bias.dtype != x.dtype):
        raise TypeError(f"patch_conv_transpose: operands must have one type, got {x.dtype} and {w.dtype}")
    cell = _kernel(w)
    space = (x.shape[1] * cell[0], x.shape[2] * cell[1], x.shape[3] * cell[2])
    window = _Window(cell, ((0, 0),) * 3, (1, 1, 1), 1)
    swapped = w.swapaxes(3, 4)
    if native.enabled():
        y = _bind(_input_grad_p, x, swapped, space=space, window=window)
    else:
        y = _xla_input_grad(x, swapped, space=space, window=window)
    return y if bias is None else _add_bias(y, bias)


def _add_bias(y: Array, bias: Array) -> Array:
    y, bias = lowering.same_variance(y, bias)
    return y + _spread(bias, y.shape) if native.enabled() else _plus(y, bias)


def _plus(y: Array, bias: Array) -> Array:
    # In float32, for the gradient's sake: the sum over all voxels of bfloat16 numbers loses its low digits.
    return (y.astype(jnp.float32) + bias.astype(jnp.float32)).astype(y.dtype) if y.dtype == jnp.bfloat16 else y + bias


def _conv_shape(x: Any, w: Any, window: _Window) -> tuple[int, ...]:
    return (x.shape[0], *window.output(x.shape[1:4], w.shape[:3]), w.shape[4])


def _input_shape(g: Any, w: Any, space: Triple, window: _Window) -> tuple[int, ...]:
    return (g.shape[0], *space, w.shape[3] * window.groups)


def _filter_shape(x: Any, g: Any, kernel: Triple, window: _Window) -> tuple[int, ...]:
    return (*kernel, x.shape[4] // window.groups, g.shape[4])


# --- the three maps in XLA's own operations: every platform but the CPU, and the CPU's fallback ---------------------


def _fills_cells(window: _Window, space: Sequence[int], kernel: Sequence[int]) -> bool:
    """Whether the windows tile the image: no overlap, gap, padding or remainder."""
    return (
        window.strides == tuple(kernel)
        and all(pair == (0, 0) for pair in window.padding)
        and window.groups == 1
        and (window.dilation == (1, 1, 1) or tuple(kernel) == (1, 1, 1))
        and all(size % width == 0 for size, width in zip(space, kernel, strict=True))
    )


def _to_cells(x: Array, cell: Triple) -> Array:
    """[N, X, Y, Z, C] -> [N, X / FX, Y / FY, Z / FZ, FX * FY * FZ * C]."""
    n, *space, c = x.shape
    coarse = [size // factor for size, factor in zip(space, cell, strict=True)]
    split = [n for pair in zip(coarse, cell, strict=True) for n in pair]
    return x.reshape(n, *split, c).transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(n, *coarse, math.prod(cell) * c)


def _from_cells(x: Array, cell: Triple) -> Array:
    """The inverse of `_to_cells`."""
    n, *coarse, c = x.shape
    space = [size * factor for size, factor in zip(coarse, cell, strict=True)]
    return x.reshape(n, *coarse, *cell, -1).transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(n, *space, c // math.prod(cell))


# Where windows tile the image the maps are matrix products over cells: accelerators do those well, and badly what XLA
# makes of strided and transposed 3D convolutions.


def _xla_conv(x: Array, w: Array, bias: Array | None = None, *, window: _Window) -> Array:
    if _fills_cells(window, x.shape[1:4], w.shape[:3]):
        y = _to_cells(x, window.strides) @ w.reshape(-1, w.shape[4])
    else:
        y = _xla_general_conv(x, w, window)
    return y if bias is None else _plus(y, bias)


def _xla_general_conv(x: Array, w: Array, window: _Window) -> Array:
    return lax.conv_general_dilated(
        x,
        w,
        window.strides,
        window.padding,
        rhs_dilation=window.dilation,
        dimension_numbers=_DIMENSION_NUMBERS,
        feature_group_count=window.groups,
    )


def _xla_input_grad(g: Array, w: Array, *, space: Triple, window: _Window) -> Array:
    if _fills_cells(window, space, w.shape[:3]):
        return _from_cells(g @ w.reshape(-1, w.shape[4]).T, window.strides)
    x = jax.ShapeDtypeStruct(_input_shape(g, w, space, window), g.dtype)
    return jax.linear_transpose(lambda x: _xla_general_conv(x, w, window), x)(g)[0]


def _xla_filter_grad(x: Array, g: Array, *, kernel: Triple, window: _Window) -> Array:
    if _fills_cells(window, x.shape[1:4], kernel):
        cells = _to_cells(x, window.strides)
        return jnp.einsum("nxyzi,nxyzo->io", cells, g).reshape(_filter_shape(x, g, kernel, window))
    w = jax.ShapeDtypeStruct(_filter_shape(x, g, kernel, window), g.dtype)
    return jax.linear_transpose(lambda w: _xla_general_conv(x, w, window), w)(g)[0]


# --- the same in native calls ----------------------------------------------------------------------------------------


def _attributes(window: _Window) -> dict[str, Any]:
    return {
        "strides": np.array(window.strides, np.int64),
        "low": np.array([low for low, _ in window.padding], np.int64),
        "high": np.array([high for _, high in window.padding], np.int64),
        "dilation": np.array(window.dilation, np.int64),
        "groups": np.int64(window.groups),
    }


def _call(target: str, shape: tuple[int, ...], *operands: Array, window: _Window) -> Array:
    """One native call, or zeros where there is nothing to add up."""
    if math.prod(shape) == 0 or any(operand.size == 0 for operand in operands):
        return jnp.zeros(shape, operands[0].dtype)
    dtype = operands[0].dtype
    if dtype == jnp.bfloat16 and not native.supports_bfloat16():
        wide = _call(target, shape, *(operand.astype(jnp.float32) for operand in operands), window=window)
        return wide.astype(dtype)
    return jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(shape, dtype))(*operands, **_attributes(window))


def _native_conv(x: Array, w: Array, bias: Array | None = None, *, window: _Window) -> Array:
    shape = _conv_shape(x, w, window)
    if bias is None:
        return _call("medjax_conv3d", shape, x, w, window=window)
    if x.size == 0 or w.size == 0:
        return jnp.broadcast_to(bias, shape)
    return _call("medjax_conv3d_bias", shape, x, w, bias, window=window)


def _native_input_grad(g: Array, w: Array, *, space: Triple, window: _Window) -> Array:
    shape = _input_shape(g, w, space, window)
    return _call("medjax_conv3d_input_grad", shape, g, w, window=window)


def _native_filter_grad(x: Array, g: Array, *, kernel: Triple, window: _Window) -> Array:
    shape = _filter_shape(x, g, kernel, window)
    return _call("medjax_conv3d_filter_grad", shape, x, g, window=window)


def _native_channel_sum(g: Array) -> Array:
    if g.size == 0:
        return jnp.zeros(g.shape[-1:], g.dtype)
    sums = jax.ffi.ffi_call("medjax_channel_sum", jax.ShapeDtypeStruct(g.shape[-1:], jnp.float32))(g)
    return sums.astype(g.dtype)


# --- primitives ------------------------------------------------------------------------------------------------------


def _listed(function: Any) -> Any:
    return lambda *operands, **parameters: [function(*operands, **parameters)]


def _without_cropping(*avals: Any, window: _Window, **_: Any) -> bool:
    return min(min(pair) for pair in window.padding) >= 0


_conv_p = lowering.primitive(
    lowering.Kernel(
        "conv3d",
        operands=(True, False, False),
        results=(True,),
        abstract=lambda x, w, *_, window: [lowering.result_type(x, _conv_shape(x, w, window))],
        xla=_listed(_xla_conv),
        native=_listed(_native_conv),
        accepts=_without_cropping,
    )
)
_input_grad_p = lowering.primitive(
    lowering.Kernel(
        "conv3d_input_grad",
        operands=(True, False),
        results=(True,),
        abstract=lambda g, w, *, space, window: [lowering.result_type(g, _input_shape(g, w, space, window))],
        xla=_listed(_xla_input_grad),
        native=_listed(_native_input_grad),
        accepts=_without_cropping,
    )
)
_filter_grad_p = lowering.primitive(
    lowering.Kernel(
        "conv3d_filter_grad",
        operands=(True, True),
        results=(False,),
        abstract=lambda x, g, *, kernel, window: [
            lowering.result_type(x, _filter_shape(x, g, kernel, window), batched=False)
        ],
        xla=_listed(_xla_filter_grad),
        native=_listed(_native_filter_grad),
        accepts=_without_cropping,
    )
)


# A bias at every voxel is XLA's to fuse into what follows; its gradient, the sum over voxels, is native.
_spread_p = lowering.primitive(
    lowering.Kernel(
        "spread",
        operands=(False,),
        results=(True,),
        abstract=lambda bias, *, shape: [lowering.result_type(bias, shape, batched=False)],
        xla=lambda bias, *, shape: [jnp.broadcast_to(bias, shape)],
        native=lambda bias, *, shape: [jnp.broadcast_to(bias, shape)],
        accepts=lambda *avals, **_: False,
    )
)
_channel_sum_p = lowering.primitive(
    lowering.Kernel(
        "channel_sum",
        operands=(True,),
        results=(False,),
        abstract=lambda g: [lowering.result_type(g, g.shape[-1:], batched=False)],
        xla=lambda g: [g.astype(jnp.promote_types(g.dtype, jnp.float32)).sum((0, 1, 2, 3)).astype(g.dtype)],
        native=_listed(_native_channel_sum),
    )
)


def _spread(bias: Array, shape: tuple[int, ...]) -> Array:
    return _bind(_spread_p, bias, shape=shape)


def _channel_sum(g: Array) -> Array:
    return _bind(_channel_sum_p, g)


def _bind(primitive: Primitive, /, *operands: Array, **parameters: Any) -> Array:
    return lowering.bind(primitive, *operands, **parameters)[0]


# Derivatives. Each primitive is linear in either operand; a bias is added and has the derivative of an addition.


def _conv_jvp(primals: Sequence[Array], tangents: Sequence[Any], *, window: _Window) -> tuple[list[Array], list[Any]]:
    x, w, *bias = primals
    y = _bind(_conv_p, *primals, window=window)
    terms = []
    if type(tangents[0]) is not ad.Zero:
        terms.append(_conv(tangents[0], w, window))
    if type(tangents[1]) is not ad.Zero:
        terms.append(_conv(x, tangents[1], window))
    if bias and type(tangents[2]) is not ad.Zero:
        terms.append(_spread(tangents[2], y.shape))
    return [y], [functools.reduce(lax.add, terms)]


def _bilinear(primitive: Primitive, to_left: Any, to_right: Any) -> None:
    """Rules of a primitive linear in each of two operands.

    `to_left(g, left, right, **parameters)` and `to_right(...)` transpose it, given the type of the operand asked for.
    """

    def jvp(primals: Sequence[Array], tangents: Sequence[Any], **parameters: Any) -> tuple[list[Array], list[Any]]:
        terms = [
            _bind(primitive, *primals[:i], tangent, *primals[i + 1 :], **parameters)
            for i, tangent in enumerate(tangents)
            if type(tangent) is not ad.Zero
        ]
        return [_bind(primitive, *primals, **parameters)], [functools.reduce(lax.add, terms)]

    def transpose(cotangents: Sequence[Any], left: Any, right: Any, **parameters: Any) -> tuple[Any, Any]:
        (g,) = cotangents
        if ad.is_undefined_primal(left):
            return (ad.Zero(left.aval) if type(g) is ad.Zero else to_left(g, left.aval, right, **parameters)), None
        return None, (ad.Zero(right.aval) if type(g) is ad.Zero else to_right(g, left, right.aval, **parameters))

    ad.primitive_jvps.setdefault(primitive, jvp)
    ad.primitive_transposes[primitive] = transpose


def _space(x: Any) -> Triple:
    return x.shape[1:4]


def _kernel(w: Any) -> Triple:
    return w.shape[:3]


def _conv(x: Array, w: Array, window: _Window) -> Array:
    return _bind(_conv_p, x, w, window=window)


def _input_grad(g: Array, w: Array, space: Triple, window: _Window) -> Array:
    return _bind(_input_grad_p, g, w, space=space, window=window)


def _filter_grad(x: Array, g: Array, kernel: Triple, window: _Window) -> Array:
    return _bind(_filter_grad_p, x, g, kernel=kernel, window=window)


ad.deflinear2(_spread_p, lambda g, bias, *, shape: [_channel_sum(g[0])])
ad.deflinear2(_channel_sum_p, lambda g, x: [_spread(g[0], x.aval.shape)])
ad.primitive_jvps[_conv_p] = _conv_jvp
_bilinear(
    _conv_p,
    lambda g, x, w, *, window: _input_grad(g, w, _space(x), window),
    lambda g, x, w, *, window: _filter_grad(x, g, _kernel(w), window),
)
_bilinear(
    _input_grad_p,
    lambda u, g, w, *, space, window: _conv(u, w, window),
    lambda u, g, w, *, space, window: _filter_grad(u, g, _kernel(w), window),
)
_bilinear(
    _filter_grad_p,
    lambda v, x, g, *, kernel, window: _input_grad(g, v, _space(x), window),
    lambda v, x, g, *, kernel, window: _conv(x, v, window),
)
