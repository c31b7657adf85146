"""Separable resampling of volumes between grids that share their axes and the centre of their field of view.

Each axis is one small banded matrix, so a volume is resampled by three matrix products (BLAS) whatever the order:
faster than evaluating a spline kernel at every voxel, and the inverse direction is the same code with 1 / ratio.

Output voxel j of an axis samples the input at `x = (j - (n_out - 1) / 2) * ratio + (n_in - 1) / 2`, where
`ratio = spacing_out / spacing_in`. Beyond the first and last voxel the edge values go on (mode 'nearest' of
`scipy.ndimage`). Input must be finite: one NaN would spread along its lines.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

ORDERS = (0, 1, 3)
"""Interpolation orders: 0 nearest voxel, 1 linear, 3 cubic B-spline."""

_SAFE_MAGNITUDE = 1e30  # float32 ends at 3.4e38; a cubic spline's sums of |weights| stay far below the room left
_BLOCK = 16  # output voxels whose shared band of weights is one matrix product
# Multiply-adds of one product: small enough that BLAS does not spread it over threads. Cases are prepared on threads of
# their own, and BLAS threads that wait for each other on busy cores made this 40 times slower.
_PRODUCT = 200_000
_NEGLIGIBLE = 1e-9  # weights below float32 rounding; a cubic spline's fall by 0.27 a voxel
_TIE = 1e-6  # a later label must win by more than rounding to displace an earlier one


def sample_positions(n_in: int, n_out: int, ratio: float) -> np.ndarray:
    """Input coordinates [n_out] float64 of the output voxel centres; below 0 and above n_in - 1 outside the input."""
    return (np.arange(n_out) - (n_out - 1) / 2) * ratio + (n_in - 1) / 2


@functools.lru_cache(maxsize=512)
def axis_matrix(n_in: int, n_out: int, ratio: float, order: int) -> np.ndarray:
    """Interpolation along one axis as a matrix: `out = matrix @ values`.

    Args:
      n_in, n_out: voxels before and after.
      ratio: spacing after over spacing before; above 1 makes voxels larger.
      order: 0, 1 or 3 (cubic B-spline, interpolating: with the prefilter of M. Unser, "Splines: a perfect fit for
        signal and image processing", IEEE Signal Processing Magazine 16(6), 1999).

    Returns:
      [n_out, n_in] float32, read-only, rows summing to 1; equals `scipy.ndimage.map_coordinates` with mode 'nearest'.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, not {order}")
    if n_in < 1 or n_out < 1 or not ratio > 0:
        raise ValueError(f"need n_in, n_out >= 1 and ratio > 0, not {n_in}, {n_out}, {ratio}")
    x = sample_positions(n_in, n_out, ratio)
    matrix = np.zeros((n_out, n_in), np.float64)
    rows = np.arange(n_out)
    if order == 0 or n_in == 1:
        matrix[rows, _nearest(x, n_in)] = 1.0
    elif order == 1:
        x = np.clip(x, 0, n_in - 1)
        low = np.minimum(x.astype(np.intp), n_in - 2)
        matrix[rows, low] = 1.0 - (x - low)
        matrix[rows, low + 1] = x - low
    else:
        from scipy import ndimage

        # The response to each unit impulse is one column.
        for column, impulse in enumerate(np.eye(n_in)):
            matrix[:, column] = ndimage.map_coordinates(impulse, x[None], order=3, mode="nearest")
    out = matrix.astype(np.float32)
    out.flags.writeable = False
    return out


def resample(
    array: np.ndarray, shape: Sequence[int], ratios: Sequence[float], order: int | Sequence[int]
) -> np.ndarray:
    """Resamples a volume onto `shape`.

    Args:
      array: [X, Y, Z] or [X, Y, Z, C], finite.
      shape: three voxel counts of the result.
      ratios: per axis, spacing after over spacing before.
      order: for all axes, or one each. 0 everywhere keeps the dtype and picks voxels; 1 and 3 return float32. Order 3
        is clipped to the range of each channel, so that ringing makes no value that the input does not reach.

    Returns:
      [*shape] or [*shape, C], C-contiguous.
    """
    array = np.asarray(array)
    if array.ndim not in (3, 4):
        raise ValueError(f"array must be [X, Y, Z] or [X, Y, Z, C], not {array.shape}")
    orders = (order,) * 3 if isinstance(order, int) else tuple(order)
    if len(orders) != 3 or any(o not in ORDERS for o in orders):
        raise ValueError(f"order must be one of {ORDERS}, or three of them, not {order}")
    a, b, c = (int(n) for n in shape)
    target = (a, b, c)
    if orders == (0, 0, 0):
        index = [
            _nearest(sample_positions(n, m, r), n) for n, m, r in zip(array.shape[:3], target, ratios, strict=True)
        ]
        return np.ascontiguousarray(array[np.ix_(*index)])
    if array.ndim == 3:
        return _resample_channel(array, target, ratios, orders)
    out = np.empty((*target, array.shape[3]), np.float32)
    for channel in range(array.shape[3]):
        out[..., channel] = _resample_channel(array[..., channel], target, ratios, orders)
    return out


def resample_labels(
    labels: np.ndarray, shape: Sequence[int], ratios: Sequence[float], orders: Sequence[int] = (1, 1, 1)
) -> np.ndarray:
    """Resamples an integer label map: each label's indicator linearly, then the label with the largest share wins.

    Smoother outlines than nearest-voxel sampling, and no label that was not there. Ties go to the lower label.

    Args:
      labels: [X, Y, Z] integers.
      shape, ratios: as for `resample`.
      orders: 1, or 0 along an axis whose voxels are picked.

    Returns:
      [*shape], dtype of `labels`. One label is held at a time, inside its bounding box.
    """
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iub" or labels.ndim != 3:
        raise ValueError(f"labels must be [X, Y, Z] integers, not {labels.dtype} {labels.shape}")
    matrices = [
        axis_matrix(n, m, float(r), order) for n, m, r, order in zip(labels.shape, shape, ratios, orders, strict=True)
    ]
    values = np.unique(labels)
    out = np.full(tuple(shape), values[0], labels.dtype)
    if len(values) == 1:
        return out
    best = np.zeros(out.shape, np.float32)
    for value in values:
        member = labels == value
        box = bounding_box(member)
        assert box is not None  # every value of np.unique occurs
        # Only output voxels that touch the box can hold the label; by a crumb of rounding none does.
        parts = [matrix[:, s] for matrix, s in zip(matrices, box, strict=True)]
        reach = [np.flatnonzero((part > _NEGLIGIBLE).any(axis=1)) for part in parts]
        if any(len(r) == 0 for r in reach):
            continue
        region = tuple(slice(int(r[0]), int(r[-1]) + 1) for r in reach)
        share = _products(member[box].astype(np.float32), [part[s] for part, s in zip(parts, region, strict=True)])
        wins = share > best[region] + _TIE
        out[region][wins] = value
        best[region][wins] = share[wins]
    return out


def bounding_box(mask: np.ndarray) -> tuple[slice, slice, slice] | None:
    """The smallest box that holds every True voxel of `mask` [X, Y, Z]; None where there is none."""
    slices = []
    for axis in range(3):
        # Reduce the longest-stride axes first and reuse nothing: three passes over booleans are cheap.
        hit = np.flatnonzero(mask.any(axis=tuple(i for i in range(3) if i != axis)))
        if len(hit) == 0:
            return None
        slices.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return slices[0], slices[1], slices[2]


def _nearest(x: np.ndarray, n: int) -> np.ndarray:
    """Nearest voxel of each position, halves upwards as scipy does; [len(x)] indices below `n`."""
    return np.clip(np.floor(x + 0.5).astype(np.intp), 0, n - 1)


def _resample_channel(
    channel: np.ndarray, shape: tuple[int, int, int], ratios: Sequence[float], orders: Sequence[int]
) -> np.ndarray:
    matrices: list[np.ndarray | None] = []
    for n, m, r, order in zip(channel.shape, shape, ratios, orders, strict=True):
        matrices.append(None if n == m and r == 1 else axis_matrix(n, m, float(r), order))
    values = np.ascontiguousarray(channel, np.float32)
    if all(matrix is None for matrix in matrices):
        return values.copy() if np.shares_memory(values, channel) else values
    low, high = float(values.min()), float(values.max())
    largest = max(abs(low), abs(high))
    # A power of two divides out and back without rounding.
    scale = 2.0 ** np.ceil(np.log2(largest / _SAFE_MAGNITUDE)) if largest > _SAFE_MAGNITUDE else 1.0
    if scale != 1.0:
        values = values / np.float32(scale)
    out = _products(values, matrices)
    if scale != 1.0:
        np.clip(out, low / scale, high / scale, out=out)
        out *= np.float32(scale)
    if 3 in orders or scale != 1.0:
        np.clip(out, low, high, out=out)
    return out


def _products(values: np.ndarray, matrices: Sequence[np.ndarray | None]) -> np.ndarray:
    """Applies one [n_out, n_in] matrix per axis (None: leave the axis) to `values` [X, Y, Z] float32."""
    given = [(axis, matrix) for axis, matrix in enumerate(matrices) if matrix is not None]
    # The axis that shrinks most goes first: the others then have less to do.
    for axis, matrix in sorted(given, key=lambda item: item[1].shape[0] / item[1].shape[1]):
        values = _product(values, matrix, axis)
    return values


def _product(values: np.ndarray, matrix: np.ndarray, axis: int) -> np.ndarray:
    shape = list(values.shape)
    shape[axis] = len(matrix)
    out = np.empty(shape, np.float32)
    # [batch, axis, free] views: matrix products run over the last two.
    order = {0: (1, 0, 2), 1: (0, 1, 2), 2: (0, 2, 1)}[axis]
    source, target = values.transpose(order), out.transpose(order)
    # Interpolation is local, so the matrix is banded: a block of rows needs a short range of columns only.
    for start in range(0, len(matrix), _BLOCK):
        rows = slice(start, min(start + _BLOCK, len(matrix)))
        used = np.flatnonzero(np.abs(matrix[rows]).max(axis=0) > _NEGLIGIBLE)
        columns = slice(int(used[0]), int(used[-1]) + 1)
        block = matrix[rows, columns]
        step = max(1, _PRODUCT // block.size)
        for first in range(0, source.shape[2], step):
            free = slice(first, first + step)
            if axis == 2:
                np.matmul(values[:, free, columns], block.T, out=out[:, free, rows])
            else:
                np.matmul(block, source[:, columns, free], out=target[:, rows, free])
    return out
