"""A 3D image with its geometry: voxels, the map from voxel indices to millimetres, and where it came from.

World coordinates are RAS+ millimetres (x grows to the patient's right, y to the front, z to the head), as in NIfTI.
Voxel (i, j, k) has its centre at `affine @ (i, j, k, 1)`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medjax.errors import UserError, warn_once

GRID_TOLERANCE_MM = 1e-3
"""Two grids are the same when no corner of the volume moves further than this."""

GRID_TOLERANCE_VOXELS = 1e-2
"""Up to this share of the smallest voxel edge two grids still count as the same, with a note: headers store the same
rotation as a quaternion (qform) or as a float32 matrix (sform), which agree to some 1e-4 of a voxel only."""

_MIN_VOLUME_RATIO = 1e-4  # |det| of the unit direction vectors: below it the three axes lie (almost) in one plane
_MAX_SHEAR = 1e-3  # |cosine| between axes that header rounding alone does not reach


@dataclass(frozen=True, eq=False)
class Volume:
    """An image as its file stores it.

    Attributes:
      data: [X, Y, Z] or [X, Y, Z, C] in the file's own axis order, native byte order, intensity scaling applied.
      affine: [4, 4] float64, voxel index -> world millimetres, RAS+.
      source: the file, for every error message.
      header: the nibabel header it came with, so that a prediction can be written with the same one.
      nonfinite: number of NaN and infinite values in `data`.
      notes: oddities met while reading (each was also reported once through `warn_once`).

    Raises:
      UserError: the affine is not finite or not invertible.
    """

    data: np.ndarray
    affine: np.ndarray
    source: Path | None = None
    header: Any = None
    nonfinite: int = 0
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.data.ndim not in (3, 4):
            raise UserError(f"{self.name}: a volume is [X, Y, Z] or [X, Y, Z, C], this one has shape {self.data.shape}")
        check_affine(self.affine, self.name)

    @property
    def name(self) -> str:
        """The file, or words for a volume that has none."""
        return str(self.source) if self.source is not None else "volume made in memory"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along the three axes."""
        x, y, z = self.data.shape[:3]
        return x, y, z

    @property
    def channels(self) -> int:
        """Values a voxel: 1 for [X, Y, Z]."""
        return self.data.shape[3] if self.data.ndim == 4 else 1

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance in mm between neighbouring voxel centres along each axis."""
        return spacing_of(self.affine)

    @property
    def voxel_volume(self) -> float:
        """Of one voxel, mm³: exact on sheared grids too, where the product of `spacing` is too large."""
        return voxel_volume_of(self.affine)

    @property
    def orientation(self) -> str:
        """Where each axis points, such as 'LPS' (first axis to the left, second to the back, third to the head)."""
        return orientation_of(self.affine)


def spacing_of(affine: np.ndarray) -> tuple[float, float, float]:
    """Lengths in mm of the three columns of `affine` [4, 4]."""
    x, y, z = np.sqrt((np.asarray(affine, np.float64)[:3, :3] ** 2).sum(axis=0)).tolist()
    return x, y, z


def voxel_volume_of(affine: np.ndarray) -> float:
    """Volume in mm³ of the parallelepiped that the three columns of `affine` [4, 4] span."""
    return abs(float(np.linalg.det(np.asarray(affine, np.float64)[:3, :3])))


def orientation_of(affine: np.ndarray) -> str:
    """Axis codes of `affine` [4, 4]: for each voxel axis the nearest of R/L, A/P, S/I that it grows towards."""
    from nibabel.orientations import aff2axcodes

    return "".join(aff2axcodes(affine))


def axes_towards(affine: np.ndarray, codes: str = "RAS") -> tuple[tuple[int, int, int], tuple[bool, bool, bool]]:
    """The axis permutation and flips that bring a grid to `codes`, without interpolation.

    Args:
      affine: [4, 4], of the stored grid.
      codes: wanted axis codes, such as 'RAS'.

    Returns:
      `(permutation, flips)`: `data.transpose(permutation)` with the axes flipped where `flips` says so grows towards
      `codes` as nearly as whole axes can; an oblique grid stays oblique.
    """
    from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

    change = ornt_transform(io_orientation(affine), axcodes2ornt(tuple(codes)))
    # change[i] = (axis of the result that stored axis i becomes, direction)
    permutation = np.argsort(change[:, 0])
    flips = change[permutation, 1] < 0
    a, b, c = (int(i) for i in permutation)
    fa, fb, fc = (bool(f) for f in flips)
    return (a, b, c), (fa, fb, fc)


def check_affine(affine: np.ndarray, name: str) -> None:
    """Raises UserError naming `name` where `affine` cannot place voxels: not finite, a zero or dependent axis."""
    affine = np.asarray(affine)
    if affine.shape != (4, 4):
        raise UserError(f"{name}: the affine must be [4, 4], not {affine.shape}")
    cure = "Set a valid qform or sform in the header (the scanner's, not an invented one), or export the file again."
    if not np.isfinite(affine).all():
        raise UserError(f"{name}: the affine has values that are not finite, so voxels have no place in space. {cure}")
    spacing = np.array(spacing_of(affine))
    if (spacing <= 0).any():
        axes = ", ".join("xyz"[i] for i in np.flatnonzero(spacing <= 0))
        raise UserError(f"{name}: the voxel spacing along {axes} is 0, so voxels have no size. {cure}")
    if abs(np.linalg.det(affine[:3, :3] / spacing)) < _MIN_VOLUME_RATIO:
        raise UserError(f"{name}: the affine is singular (its axes lie in one plane). {cure}")


def shear(affine: np.ndarray) -> float:
    """Largest |cosine| between two axes of `affine` [4, 4]; 0 for an orthogonal grid, above 0 with gantry tilt."""
    with np.errstate(divide="ignore", invalid="ignore"):  # an axis of no length is reported elsewhere
        directions = affine[:3, :3] / np.array(spacing_of(affine))
    worst = float(np.abs(directions.T @ directions - np.eye(3)).max())
    return worst if worst > _MAX_SHEAR else 0.0


def corner_distance(a: np.ndarray, b: np.ndarray, shape: tuple[int, ...]) -> float:
    """Largest distance in mm between the corner voxels' centres of one `shape` grid under affines `a` and `b`."""
    corners = np.array([(*c, 1.0) for c in itertools.product(*((0.0, n - 1.0) for n in shape[:3]))])
    return float(np.linalg.norm(corners @ (np.asarray(a) - np.asarray(b)).T, axis=1).max())


def check_same_grid(volume: Volume, like: Volume) -> None:
    """Raises UserError naming both files and the numbers that differ, unless the two share shape and affine.

    The affines may differ by `GRID_TOLERANCE_MM` at the corners; up to `GRID_TOLERANCE_VOXELS` they pass with a note.
    """
    if volume.shape != like.shape:
        turned = sorted(volume.shape) == sorted(like.shape)
        raise UserError(
            f"{volume.name}: shape {volume.shape} differs from {like.shape} of {like.name}; both must lie on one grid. "
            + ("The same numbers in another order: were axes swapped on the way? " if turned else "")
            + "Resample one onto the other's grid, or pair the right files."
        )
    distance = corner_distance(volume.affine, like.affine, like.shape)
    if distance <= GRID_TOLERANCE_MM:
        return
    if distance <= GRID_TOLERANCE_VOXELS * min(like.spacing):
        warn_once(f"{volume.name}: its affine is {distance:.2g} mm off that of {like.name}; taken as the same grid")
        return
    raise UserError(
        f"{volume.name}: same shape as {like.name} but another place in space ({distance:.4g} mm apart at a corner): "
        f"{_describe(volume)} against {_describe(like)}. "
        "Copy the right header or resample one onto the other's grid; left and right are not guessed."
    )


def _describe(volume: Volume) -> str:
    spacing = " x ".join(f"{s:.4g}" for s in volume.spacing)
    origin = ", ".join(f"{o:.4g}" for o in volume.affine[:3, 3])
    return f"{volume.orientation}, spacing {spacing} mm, origin ({origin})"


def count_nonfinite(data: np.ndarray) -> int:
    """Number of NaN and infinite values in `data`; no copy of the array where there are none."""
    if data.dtype.kind != "f":
        return 0
    # A sum is finite only if every term is; when it is not (or overflows) the slow exact count decides.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(data.sum(dtype=np.float64)):
            return 0
    return int(data.size - np.count_nonzero(np.isfinite(data)))


def finite(volume: Volume, policy: str = "error") -> Volume:
    """The volume with finite values only.

    Args:
      volume: any volume.
      policy: 'error' refuses a volume with NaN or infinite values; 'zero' replaces them by 0.

    Raises:
      UserError: naming the file, the count and the cure; or an unknown policy.
    """
    if policy not in ("error", "zero"):
        raise UserError(f"data.preprocess.nonfinite={policy!r} is not known; use 'error' or 'zero'")
    if volume.nonfinite == 0:
        return volume
    if policy == "error":
        raise UserError(
            f"{volume.name}: {volume.nonfinite} of {volume.data.size} values are NaN or infinite. Repair the file, or "
            "set data.preprocess.nonfinite='zero' to replace them by 0."
        )
    return replace(volume, data=np.nan_to_num(volume.data, nan=0.0, posinf=0.0, neginf=0.0), nonfinite=0)
