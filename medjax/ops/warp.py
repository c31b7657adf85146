"""Warping of volumes: an affine map and a smooth displacement in one interpolation, on the device.

`warp_image` and `warp_mask` have a native kernel on the CPU (`medjax.ops.native`), which never stores coordinates;
elsewhere they are XLA's own operations. Examples whose gate is off are copied.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from medjax.ops import native
from medjax.ops.gated import chosen
from medjax.ops.native import lowering

_COPY, _VOXELS, _GENERAL = 0, 1, 2
_LINEAR, _NEAREST, _VOTE = 0, 1, 2
_MODES = {"nearest": _NEAREST, "linear": _VOTE}
_MASK_TYPES = tuple(map(jnp.dtype, ("uint8", "int8", "uint16", "int16", "int32")))
_TIE = 1e-5  # shares of labels closer than this are equal: the lower label wins


class Pose(NamedTuple):
    """Where a batch's output voxels take their values: at `matrix @ (o - c + u(o)) + c + shift` for voxel o.

    c is the centre of the grid, all in voxels.

    Attributes:
      gate: bool [B]; False leaves the example as it is.
      matrix: float32 [B, 3, 3]. shift: float32 [B, 3].
      control: float32 [B, Gx, Gy, Gz, 3], displacements u at the control points of cubic B-splines, or None.
    """

    gate: Array
    matrix: Array
    shift: Array
    control: Array | None = None


def warp_image(image: Array, pose: Pose) -> Array:
    """Image [B, X, Y, Z, C] by trilinear interpolation; 0 outside. Whole-voxel moves (mirroring) are exact."""
    return _warp(image, pose, _LINEAR)


def warp_mask(mask: Array, pose: Pose, labels: str = "nearest") -> Array:
    """Mask [B, X, Y, Z], integer or bool; 0 outside.

    Args:
      labels: 'nearest' voxel, or 'linear': the indicator of each label is interpolated linearly and the label with the
        largest share wins, the lower one in a tie.
    """
    if labels not in _MODES:
        raise ValueError(f"warp_mask: labels '{labels}': 'nearest' or 'linear'")
    if mask.dtype not in _MASK_TYPES:
        wide = jnp.uint8 if mask.dtype == jnp.bool_ else jnp.int32
        return _warp(mask.astype(wide), pose, _MODES[labels]).astype(mask.dtype)
    return _warp(mask, pose, _MODES[labels])


def grid(shape: Sequence[int]) -> Array:
    """Voxel coordinates float32 [X, Y, Z, 3]."""
    axes = [jnp.arange(n, dtype=jnp.float32) for n in shape]
    return jnp.stack(jnp.meshgrid(*axes, indexing="ij"), axis=-1)


def sample_linear(volume: Array, coordinates: Array) -> Array:
    """Trilinear interpolation of volume [X, Y, Z, C] at voxel coordinates [..., 3]; 0 outside."""
    out = jnp.zeros((*coordinates.shape[:-1], volume.shape[-1]), jnp.promote_types(volume.dtype, jnp.float32))
    for values, weight in _corners(volume, coordinates):
        out += weight[..., None] * values
    return out.astype(volume.dtype)


def sample_nearest(volume: Array, coordinates: Array) -> Array:
    """Nearest voxel of volume [X, Y, Z] at voxel coordinates [..., 3]; 0 outside."""
    return _pick(volume, jnp.round(coordinates).astype(jnp.int32))


def sample_labels(volume: Array, coordinates: Array) -> Array:
    """The label of volume [X, Y, Z] with the largest linear share at voxel coordinates [..., 3]; label 0 outside."""
    pairs = list(_corners(volume, coordinates))
    shares = [sum(jnp.where(other == label, weight, 0) for other, weight in pairs) for label, _ in pairs]
    top = functools.reduce(jnp.maximum, shares)
    none = jnp.asarray(jnp.iinfo(volume.dtype).max, volume.dtype)
    able = [jnp.where(share >= top - _TIE, label, none) for share, (label, _) in zip(shares, pairs, strict=True)]
    return functools.reduce(jnp.minimum, able)


def spline_basis(size: int, points: int) -> np.ndarray:
    """Values [size, points] float32 of uniform cubic B-splines at the voxels of an axis.

    The first and last of `points` - 3 intervals end at the outer voxels. Rows sum to 1.
    """
    if points < 4:
        raise ValueError(f"cubic B-splines need 4 control points an axis at least, not {points}")
    t = np.linspace(0, points - 3, size) if size > 1 else np.array([(points - 3) / 2])
    first = np.minimum(t.astype(int), points - 4)
    f = t - first
    parts = ((1 - f) ** 3, 3 * f**3 - 6 * f**2 + 4, -3 * f**3 + 3 * f**2 + 3 * f + 1, f**3)
    basis = np.zeros((size, points))
    for i, part in enumerate(parts):
        basis[np.arange(size), first + i] = part / 6
    return basis.astype(np.float32)


def spline_field(control: Array, shape: Sequence[int]) -> Array:
    """The smooth field [X, Y, Z, ...] of control points [Gx, Gy, Gz, ...]."""
    out = control
    for axis, size in enumerate(shape):
        basis = spline_basis(size, control.shape[axis])
        out = jnp.moveaxis(jnp.tensordot(basis, out, (1, axis), precision=lax.Precision.HIGHEST), 0, axis)
    return out


# --- the definition, in XLA's own operations -------------------------------------------------------------------------


def _pick(volume: Array, at: Array) -> Array:
    size = jnp.asarray(volume.shape[:3])
    inside = jnp.all((at >= 0) & (at < size), axis=-1)
    at = jnp.clip(at, 0, size - 1)
    values = volume[at[..., 0], at[..., 1], at[..., 2]]
    return jnp.where(inside[..., None] if volume.ndim == 4 else inside, values, jnp.zeros((), volume.dtype))


def _corners(volume: Array, coordinates: Array) -> Iterator[tuple[Array, Array]]:
    """(values, weights) of the eight voxels around each coordinate; outside the volume values are 0."""
    low = jnp.floor(coordinates)
    fraction = coordinates - low
    low = low.astype(jnp.int32)
    for corner in itertools.product((0, 1), repeat=3):
        sides = [fraction[..., a] if c else 1 - fraction[..., a] for a, c in enumerate(corner)]
        yield _pick(volume, low + jnp.asarray(corner)), sides[0] * sides[1] * sides[2]


def _coordinates(shape: Sequence[int], matrix: Array, shift: Array, field: Array | None) -> Array:
    centre = (np.asarray(shape, np.float32) - 1) / 2
    d = grid(shape) - centre
    if field is not None:
        d = d + field
    x, y, z = (d[..., i] for i in range(3))
    rows = [matrix[i, 0] * x + matrix[i, 1] * y + matrix[i, 2] * z + (centre[i] + shift[i]) for i in range(3)]
    # What is far out, or not a number, is just outside: it shall not overflow an index.
    at = [jnp.clip(jnp.where(jnp.isnan(r), -2.0, r), -2.0, n + 1.0) for r, n in zip(rows, shape, strict=True)]
    return jnp.stack(at, axis=-1)


def _moved(volume: Array, matrix: Array, shift: Array) -> Array:
    """Whole voxels moved: the matrix is diagonal, ±1."""
    for a, size in enumerate(volume.shape[:3]):
        centre = np.float32(size - 1) / 2
        at = jnp.round(matrix[a, a] * (jnp.arange(size) - centre) + (centre + shift[a])).astype(jnp.int32)
        inside = (at >= 0) & (at < size)
        volume = jnp.take(volume, jnp.clip(at, 0, size - 1), axis=a)
        inside = inside.reshape([size if i == a else 1 for i in range(volume.ndim)])
        volume = jnp.where(inside, volume, jnp.zeros((), volume.dtype))
    return volume


def _xla(poses: Array, volume: Array, *splines: Array, mode: int) -> list[Array]:
    sample = {_LINEAR: sample_linear, _NEAREST: sample_nearest, _VOTE: sample_labels}[mode]

    def general(x: Array, pose: Array, *control: Array) -> Array:
        field = spline_field(control[0], x.shape[:3]) if control else None
        return sample(x, _coordinates(x.shape[:3], pose[1:10].reshape(3, 3), pose[10:13], field))

    def voxels(x: Array, pose: Array) -> Array:
        return _moved(x, pose[1:10].reshape(3, 3), pose[10:13])

    kind = poses[:, 0].astype(jnp.int32)
    out = chosen(voxels, kind == _VOXELS, volume, poses)
    return [chosen(general, kind == _GENERAL, out, poses, *splines[:1])]


# --- the native kernel -----------------------------------------------------------------------------------------------


def _native(poses: Array, volume: Array, *splines: Array, mode: int) -> list[Array]:
    if volume.size == 0:
        return [volume]
    call = jax.ffi.ffi_call("medjax_warp", jax.ShapeDtypeStruct(volume.shape, volume.dtype))
    return [call(poses, volume, *splines, mode=np.int32(mode))]


_warp_p = lowering.primitive(
    lowering.Kernel(
        "warp",
        operands=(True, True, True, False, False, False),
        results=(True,),
        abstract=lambda poses, volume, *splines, **_: [lowering.result_type(volume, volume.shape)],
        xla=_xla,
        native=_native,
        accepts=lambda poses, volume, *splines, mode: (
            volume.dtype in ((jnp.float32, jnp.bfloat16) if mode == _LINEAR else _MASK_TYPES)
        ),
    )
)


def _warp(volume: Array, pose: Pose, mode: int) -> Array:
    centre = (np.asarray(volume.shape[1:4], np.float32) - 1) / 2
    diagonal = jnp.diagonal(pose.matrix, axis1=1, axis2=2)
    first = centre - diagonal * centre + pose.shift  # where voxel 0 comes from
    whole = jnp.all(pose.matrix == diagonal[:, :, None] * np.eye(3, dtype=np.float32), axis=(1, 2))
    whole &= jnp.all((jnp.abs(diagonal) == 1) & (first == jnp.round(first)), axis=1)
    splines: list[Array] = []
    if pose.control is not None:
        whole &= jnp.all(pose.control == 0, axis=(1, 2, 3, 4))
        bases = (spline_basis(n, g) for n, g in zip(volume.shape[1:4], pose.control.shape[1:4], strict=True))
        splines = [pose.control, *map(jnp.asarray, bases)]
    kind = jnp.where(pose.gate, jnp.where(whole, _VOXELS, _GENERAL), _COPY).astype(jnp.float32)
    poses = jnp.concatenate([kind[:, None], pose.matrix.reshape(-1, 9), pose.shift], axis=1)
    if not native.enabled():
        return _xla(poses, volume, *splines, mode=mode)[0]
    return lowering.bind(_warp_p, poses, volume, *splines, mode=mode)[0]
