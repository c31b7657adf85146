"""Whole-case segmentation metrics with physical units: overlap, surface distances, centreline Dice, volume error.

Masks are boolean `[X, Y, Z]`; `spacing` is the voxel size in millimetres along the same axes. Everything is computed in
the joint bounding box of the two masks, as if both were surrounded by background.

Two definitions of a mask's boundary are in use, and papers seldom say which:

* **voxel**: the mask's voxels that have a face in common with the background (6-connected), at their centres, each
  with weight 1 (MONAI, medpy).
* **surfel**: the cells of eight neighbouring voxel centres that hold both mask and background, at the cell centre,
  each weighted by the area in mm² of the surface that passes through it (Nikolov et al. 2018, arXiv:1809.04430;
  DeepMind's `surface-distance`). The area is that of the marching-cubes surface (see `surfel_areas`).

Conventions for empty masks, chosen so that missing a structure can never improve a mean:

| prediction | reference | Dice, surface Dice, clDice | Hausdorff, ASSD | volume error |
|---|---|---|---|---|
| empty | empty | nan: the case does not count | nan: does not count | 0 ml, relative nan |
| empty | present | 0 | diagonal of the volume, mm | minus the reference, relative -1 |
| present | empty | 0 | diagonal of the volume, mm | the prediction, relative nan |
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from scipy.spatial import cKDTree

from medjax.errors import UserError

Boundary = Literal["voxel", "surfel"]
Convention = Literal["monai", "surface-distance", "pooled"]

# Cell corners in the order of their bits in a cell code: bit 4*i + 2*j + k is the corner at offset (i, j, k).
_CORNERS = tuple(itertools.product((0, 1), repeat=3))


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Dice's coefficient 2|A∩B| / (|A| + |B|) of two boolean masks of one shape; nan if both are empty."""
    prediction, reference = _masks(prediction, reference)
    return _dice(prediction, reference, int(np.count_nonzero(prediction)), int(np.count_nonzero(reference)))


def hausdorff(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    *,
    percentile: float = 95.0,
    convention: Convention = "monai",
) -> float:
    """Percentile of the Hausdorff distance in mm: 95 is HD95, 100 the Hausdorff distance itself.

    Each boundary element of one mask has a distance to the nearest boundary element of the other. The conventions
    differ in what they do with these two directed sets of distances:

    * `'monai'`: voxel boundaries; the larger of the two directed quantiles, with linear interpolation.
    * `'surface-distance'`: surfel boundaries; in each direction the smallest distance within which at least
      `percentile` % of the surface *area* lies; the larger of the two.
    * `'pooled'` (medpy): voxel boundaries; one quantile, linear interpolation, of both sets put together.

    Args:
        prediction: Boolean `[X, Y, Z]`.
        reference: Boolean, same shape.
        spacing: Voxel size in mm.
        percentile: In (0, 100].
        convention: See above.

    Returns:
        Millimetres; nan if both masks are empty, the diagonal of the volume if one is.
    """
    prediction, reference = _masks(prediction, reference)
    step = _spacing(spacing)
    _check_choice("Hausdorff convention", convention, Convention)
    if not 0 < percentile <= 100:
        raise UserError(f"Hausdorff percentile {percentile} is outside (0, 100]")
    diagonal = float(np.linalg.norm(np.multiply(prediction.shape, step)))
    empty = _emptiness(bool(prediction.any()), bool(reference.any()))
    if empty:
        return math.nan if empty == "both" else diagonal
    box = _bounding_box(prediction | reference)
    surface = _surface_distances(prediction[box], reference[box], step, _boundary_of(convention))
    return _hausdorff(surface, percentile, convention)


def average_surface_distance(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    *,
    convention: Convention = "monai",
) -> float:
    """Average symmetric surface distance (ASSD) in mm: the mean distance of both boundaries' elements to the other.

    The two directed sets of distances are put together, so the larger boundary counts for more: voxels each with weight
    1 ('monai', and 'pooled' is the same), or surfels weighted by area ('surface-distance'). The mean of the two
    directed means, which medpy calls assd, is another number.

    Returns:
        Millimetres; nan if both masks are empty, the diagonal of the volume if one is.
    """
    prediction, reference = _masks(prediction, reference)
    step = _spacing(spacing)
    _check_choice("surface distance convention", convention, Convention)
    empty = _emptiness(bool(prediction.any()), bool(reference.any()))
    if empty:
        return math.nan if empty == "both" else float(np.linalg.norm(np.multiply(prediction.shape, step)))
    box = _bounding_box(prediction | reference)
    return _average(_surface_distances(prediction[box], reference[box], step, _boundary_of(convention)))


def centreline_dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """clDice of tubular structures (Shit et al. 2021, arXiv:2003.07311): the harmonic mean of two shares.

    How much of the prediction's skeleton lies in the reference (precision) and of the reference's in the prediction
    (sensitivity). The skeleton is the morphological one that the paper's soft skeleton is on masks, see `skeleton`.

    Returns:
        A number in [0, 1]; nan if both masks are empty, 0 if one is.
    """
    prediction, reference = _masks(prediction, reference)
    empty = _emptiness(bool(prediction.any()), bool(reference.any()))
    if empty:
        return math.nan if empty == "both" else 0.0
    box = _bounding_box(prediction | reference)
    prediction, reference = prediction[box], reference[box]
    lines = skeleton(prediction), skeleton(reference)
    precision = np.count_nonzero(lines[0] & reference) / np.count_nonzero(lines[0])
    sensitivity = np.count_nonzero(lines[1] & prediction) / np.count_nonzero(lines[1])
    total = precision + sensitivity
    return float(2.0 * precision * sensitivity / total) if total else 0.0


def skeleton(mask: np.ndarray) -> np.ndarray:
    """Morphological skeleton of a mask [X, Y, Z], bool: the voxels that an opening loses, over all erosions.

    Erosion takes off voxels with a face on the outside (beyond the array too), opening is an erosion and a dilation by
    3x3x3 voxels (the pooling sizes of soft-clDice). It is thin but need not be connected.
    """
    from scipy import ndimage

    current = np.pad(np.asarray(mask, bool), 1)
    found = np.zeros_like(current)
    while current.any():
        smaller = ndimage.binary_erosion(current)
        found |= current & ~ndimage.binary_dilation(smaller, np.ones((3, 3, 3), bool))
        current = smaller
    return found[1:-1, 1:-1, 1:-1]


def surface_dice(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    *,
    tolerance: float = 1.0,
    boundary: Boundary = "surfel",
) -> float:
    """Normalised surface Dice (NSD): the share of both surfaces that lies within `tolerance` mm of the other.

    NSD = (|S_A within tolerance of S_B| + |S_B within tolerance of S_A|) / (|S_A| + |S_B|), where |S| is an area for
    surfel boundaries and a number of voxels for voxel boundaries (Nikolov et al. 2018).

    Returns:
        A number in [0, 1]; nan if both masks are empty, 0 if one is.
    """
    prediction, reference = _masks(prediction, reference)
    step = _spacing(spacing)
    _check_tolerance(tolerance)
    _check_choice("boundary", boundary, Boundary)
    empty = _emptiness(bool(prediction.any()), bool(reference.any()))
    if empty:
        return math.nan if empty == "both" else 0.0
    box = _bounding_box(prediction | reference)
    return _surface_dice(_surface_distances(prediction[box], reference[box], step, boundary), tolerance)


def volume_error(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    *,
    voxel: float | None = None,
) -> tuple[float, float]:
    """Signed volume error, prediction minus reference: (millilitres, fraction of the reference's volume).

    The fraction is nan where the reference is empty. `voxel` as of `case_metrics`.
    """
    prediction, reference = _masks(prediction, reference)
    millilitres = _voxel(_spacing(spacing), voxel) / 1000.0
    found, true = int(np.count_nonzero(prediction)), int(np.count_nonzero(reference))
    return (found - true) * millilitres, (found - true) / true if true else math.nan


def case_metrics(
    prediction: np.ndarray,
    reference: np.ndarray,
    classes: Mapping[str, Sequence[int]] | Sequence[str],
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    *,
    nsd_tolerance: float = 1.0,
    convention: Convention = "monai",
    boundary: Boundary = "surfel",
    voxel: float | None = None,
) -> list[dict[str, Any]]:
    """All metrics of one case, one row a class.

    Args:
        prediction: Label map, integer `[X, Y, Z]`, or region masks, boolean `[X, Y, Z, K]`, channels in the order of
            `classes`.
        reference: The same, on the same grid; one may be a label map and the other masks.
        classes: Name -> the label values that make up the class; classes may overlap (`{'whole': (1, 2, 3), 'core':
            (1, 3)}`). A plain sequence of names will do if both arrays are region masks.
        spacing: Voxel size in mm.
        nsd_tolerance: Tolerance of the surface Dice in mm.
        convention: Of HD95 and ASSD, see `hausdorff`.
        boundary: Of the surface Dice, see `surface_dice`.
        voxel: mm³ of a voxel; None: the product of `spacing`, which is too large where the grid is sheared.

    Returns:
        Rows `{class, dice, hd95, assd, nsd, volume_ml, reference_ml, volume_error_ml, empty}`; `empty` is '' or says
        which mask was empty: 'prediction', 'reference', 'both'. See the module's docstring for the numbers then.

    Raises:
        UserError: shapes, types or options that do not fit.
    """
    prediction, reference = np.asarray(prediction), np.asarray(reference)
    if prediction.shape[:3] != reference.shape[:3]:
        raise UserError(
            f"prediction {prediction.shape[:3]} and reference {reference.shape[:3]} are on different grids: "
            "bring the prediction onto the reference's grid first"
        )
    step = _spacing(spacing)
    _check_tolerance(nsd_tolerance)
    _check_choice("Hausdorff convention", convention, Convention)
    _check_choice("boundary", boundary, Boundary)
    found, true = _Regions(prediction, classes, "prediction"), _Regions(reference, classes, "reference")
    diagonal = float(np.linalg.norm(np.multiply(prediction.shape[:3], step)))
    millilitres = _voxel(step, voxel) / 1000.0
    hd_boundary = _boundary_of(convention)

    box = _bounding_box(found.anything() | true.anything())
    rows = []
    for index, name in enumerate(classes):
        a, b = found.mask(index, box), true.mask(index, box)
        size_a, size_b = int(np.count_nonzero(a)), int(np.count_nonzero(b))
        empty = _emptiness(size_a, size_b)
        if empty:
            hd95, nsd = (math.nan, math.nan) if empty == "both" else (diagonal, 0.0)
            assd = hd95
        else:
            inner = _bounding_box(a | b)
            a, b = a[inner], b[inner]
            surface = _surface_distances(a, b, step, hd_boundary)
            hd95, assd = _hausdorff(surface, 95.0, convention), _average(surface)
            if boundary != hd_boundary:
                surface = _surface_distances(a, b, step, boundary)
            nsd = _surface_dice(surface, nsd_tolerance)
        rows.append(
            {
                "class": name,
                "dice": _dice(a, b, size_a, size_b),
                "hd95": hd95,
                "assd": assd,
                "nsd": nsd,
                "volume_ml": size_a * millilitres,
                "reference_ml": size_b * millilitres,
                "volume_error_ml": (size_a - size_b) * millilitres,
                "empty": empty,
            }
        )
    return rows


def surfel_areas(spacing: Sequence[float] = (1.0, 1.0, 1.0)) -> np.ndarray:
    """Area in mm² of the surface through a cell of 2x2x2 voxel centres, for each of the 256 ways to fill it.

    Computed from the definition of marching cubes (Lorensen & Cleveland 1987), not from a table:

    1. The surface meets each cell edge with one corner inside the mask at its midpoint.
    2. On each cell face, midpoints are joined by segments; on a face with four of them the segments cut off the inside
       corners. A cell with more than four inside corners is treated as its complement, so a mask and its
       complement have the same area.
    3. The segments close to polygons. A polygon that is not flat has several triangulations: the one of largest area
       on the unit cube is taken (ties have the same areas at any spacing). This is what reproduces the values
       of `surface-distance` for all 256 codes and any spacing.
    4. Spacing (sx, sy, sz) scales a triangle's area vector by (sy*sz, sx*sz, sx*sy).

    Returns:
        float64 `[256]`; the index is the sum of `1 << (4*i + 2*j + k)` over inside corners at offset (i, j, k).
    """
    sx, sy, sz = _spacing(spacing)
    code, vectors = _surfel_triangles()
    return np.bincount(code, np.linalg.norm(vectors * (sy * sz, sx * sz, sx * sy), axis=1), minlength=256)


class _Surface(NamedTuple):
    """Directed distances [n] in mm of the boundary elements of each mask, and their weights [n]."""

    to_reference: np.ndarray
    to_prediction: np.ndarray
    prediction_weight: np.ndarray
    reference_weight: np.ndarray


class _Regions:
    """A label map or region masks seen as one boolean mask a class, cut out on demand."""

    def __init__(self, array: np.ndarray, classes: Mapping[str, Sequence[int]] | Sequence[str], what: str):
        self.array = array
        if array.ndim == 4:
            if array.dtype != np.bool_ or array.shape[3] != len(classes):
                raise UserError(
                    f"{what}: region masks must be bool [X, Y, Z, {len(classes)}], one channel a class, "
                    f"not {array.dtype} {array.shape}"
                )
            return
        if array.ndim != 3 or array.dtype.kind not in "iub":
            raise UserError(f"{what}: expected an integer label map [X, Y, Z], not {array.dtype} {array.shape}")
        if not isinstance(classes, Mapping):
            raise UserError(f"{what} is a label map: give the classes as a mapping from name to label values")
        self.values = [np.unique(np.asarray(values, dtype=np.int64)) for values in classes.values()]

    def anything(self) -> np.ndarray:
        """Boolean [X, Y, Z]: voxels that may belong to a class."""
        if self.array.ndim == 4:
            return np.any(self.array, axis=3)
        if any(0 in values for values in self.values):
            return np.ones(self.array.shape, bool)
        return np.not_equal(self.array, 0)

    def mask(self, index: int, box: tuple[slice, ...]) -> np.ndarray:
        """Boolean mask of class `index` within `box`."""
        if self.array.ndim == 4:
            return self.array[box][..., index]
        values, part = self.values[index], self.array[box]
        if len(values) == 1:
            return np.equal(part, values[0])
        return np.isin(part, values)


def _masks(prediction: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    prediction, reference = np.asarray(prediction), np.asarray(reference)
    for what, mask in (("prediction", prediction), ("reference", reference)):
        if mask.ndim != 3 or mask.dtype != np.bool_:
            raise UserError(f"{what}: expected a boolean mask [X, Y, Z], not {mask.dtype} {mask.shape}")
    if prediction.shape != reference.shape:
        raise UserError(f"prediction {prediction.shape} and reference {reference.shape} are on different grids")
    return prediction, reference


def _spacing(spacing: Sequence[float]) -> tuple[float, float, float]:
    values = tuple(float(value) for value in spacing)
    if len(values) != 3 or not all(0 < value < math.inf for value in values):
        raise UserError(f"spacing {spacing} is not three positive lengths in mm")
    return values


def _voxel(step: tuple[float, float, float], volume: float | None) -> float:
    """mm³ of a voxel: as given, else of a cuboid."""
    if volume is not None and not 0 < volume < math.inf:
        raise UserError(f"voxel volume {volume} is not above 0 mm³")
    return math.prod(step) if volume is None else float(volume)


def _check_choice(what: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise UserError(f"unknown {what} {value!r}: use one of {', '.join(get_args(choices))}")


def _check_tolerance(tolerance: float) -> None:
    if not 0 <= tolerance < math.inf:
        raise UserError(f"surface Dice tolerance {tolerance} is not a length in mm")


def _boundary_of(convention: Convention) -> Boundary:
    return "surfel" if convention == "surface-distance" else "voxel"


def _emptiness(prediction: int | bool, reference: int | bool) -> str:
    if prediction and reference:
        return ""
    return "prediction" if reference else "reference" if prediction else "both"


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """Smallest box that holds the mask; empty slices if nothing is there."""
    plane = np.any(mask, axis=2)
    x = np.flatnonzero(plane.any(axis=1))
    y = np.flatnonzero(plane.any(axis=0))
    if not len(x):
        return (slice(0, 0),) * 3
    z = np.flatnonzero(mask[x[0] : x[-1] + 1, y[0] : y[-1] + 1].any(axis=(0, 1)))
    return tuple(slice(int(axis[0]), int(axis[-1]) + 1) for axis in (x, y, z))


def _dice(prediction: np.ndarray, reference: np.ndarray, size_a: int, size_b: int) -> float:
    total = size_a + size_b
    return 2.0 * int(np.count_nonzero(prediction & reference)) / total if total else math.nan


def _hausdorff(surface: _Surface, percentile: float, convention: Convention) -> float:
    if convention == "pooled":
        return float(np.percentile(np.concatenate([surface.to_reference, surface.to_prediction]), percentile))
    if convention == "monai":
        return float(max(np.percentile(d, percentile) for d in (surface.to_reference, surface.to_prediction)))
    directed = []
    for distance, weight in (
        (surface.to_reference, surface.prediction_weight),
        (surface.to_prediction, surface.reference_weight),
    ):
        order = np.argsort(distance)
        share = np.cumsum(weight[order])
        position = np.searchsorted(share, share[-1] * (percentile / 100.0))
        directed.append(distance[order[min(position, len(order) - 1)]])
    return float(max(directed))


def _average(surface: _Surface) -> float:
    total = float(surface.to_reference @ surface.prediction_weight + surface.to_prediction @ surface.reference_weight)
    return total / float(surface.prediction_weight.sum() + surface.reference_weight.sum())


def _surface_dice(surface: _Surface, tolerance: float) -> float:
    within = total = 0.0
    for distance, weight in (
        (surface.to_reference, surface.prediction_weight),
        (surface.to_prediction, surface.reference_weight),
    ):
        # Sizes from the float32 columns of a header are off by some 1e-7: a voxel of 1 mm is within 1 mm all the same.
        near = distance <= tolerance * (1.0 + 1e-5) + 1e-9
        within += float(weight[near].sum())
        total += float(weight.sum())
    return within / total


def _surface_distances(
    prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, float, float], boundary: Boundary
) -> _Surface:
    """Nearest-boundary distances in both directions between two masks that are not empty."""
    if boundary == "surfel":
        codes_a, codes_b = _cell_codes(prediction), _cell_codes(reference)
        # 0 and 255 are cells wholly outside and wholly inside; adding 1 in uint8 sends both below 2.
        border_a, border_b = (codes_a + np.uint8(1)) > 1, (codes_b + np.uint8(1)) > 1
        areas = surfel_areas(spacing)
        weights = areas[codes_a[border_a]], areas[codes_b[border_b]]
    else:
        border_a, border_b = _border_voxels(prediction), _border_voxels(reference)
        weights = np.ones(np.count_nonzero(border_a)), np.ones(np.count_nonzero(border_b))
    index_a, index_b = np.nonzero(border_a), np.nonzero(border_b)
    points_a, points_b = (np.stack(index, axis=1) * np.asarray(spacing) for index in (index_a, index_b))
    # Where the boundaries coincide the distance is 0: only the rest needs a search.
    distance_a = _nearest(points_a, ~border_b[index_a], points_b)
    distance_b = _nearest(points_b, ~border_a[index_b], points_a)
    return _Surface(distance_a, distance_b, *weights)


def _nearest(points: np.ndarray, apart: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Distance of each of `points` [n, 3] to the nearest of `targets` [m, 3]; 0 where not `apart` [n]."""
    distance = np.zeros(len(points))
    if apart.any():
        tree = cKDTree(targets, balanced_tree=False, compact_nodes=False)
        distance[apart] = tree.query(points[apart], workers=-1)[0]
    return distance


def _border_voxels(mask: np.ndarray) -> np.ndarray:
    """Voxels of the mask with one of six neighbours outside it; beyond the array is outside."""
    inside = mask.copy()
    for axis in range(3):
        lower, upper = _all_but_last(axis), _all_but_first(axis)
        inside[lower] &= mask[upper]
        inside[upper] &= mask[lower]
        ends = np.moveaxis(inside, axis, 0)
        ends[0] = ends[-1] = False
    return mask & ~inside


def _cell_codes(mask: np.ndarray) -> np.ndarray:
    """uint8 [X+1, Y+1, Z+1]: which corners of each cell of voxel centres lie inside, coded as in `surfel_areas`."""
    codes = np.pad(mask, 1).view(np.uint8)
    # One axis at a time: 1 bit becomes 2 (k), then 4 (j), then 8 (i).
    for axis, shift in ((2, 1), (1, 2), (0, 4)):
        codes = codes[_all_but_last(axis)] | (codes[_all_but_first(axis)] << np.uint8(shift))
    return codes


def _all_but_last(axis: int) -> tuple[slice, ...]:
    return (slice(None),) * axis + (slice(None, -1),)


def _all_but_first(axis: int) -> tuple[slice, ...]:
    return (slice(None),) * axis + (slice(1, None),)


@functools.cache
def _surfel_triangles() -> tuple[np.ndarray, np.ndarray]:
    """Cell codes int [n] and area vectors float64 [n, 3] of all surface triangles at unit spacing."""
    codes: list[int] = []
    vectors: list[np.ndarray] = []
    for code in range(256):
        inside = [bool(code >> bit & 1) for bit in range(8)]
        if sum(inside) > 4:
            inside = [not value for value in inside]
        for polygon in _cell_polygons(inside):
            chosen = max(_triangulations(polygon), key=lambda option: round(np.linalg.norm(option, axis=1).sum(), 9))
            codes.extend([code] * len(chosen))
            vectors.extend(chosen)
    return np.asarray(codes), np.asarray(vectors)


def _cell_polygons(inside: Sequence[bool]) -> list[np.ndarray]:
    """Closed polygons [n, 3] of the surface through a unit cell whose corners are `inside` or not."""
    neighbours: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for axis, side in itertools.product(range(3), (0, 1)):
        ring = []
        for u, v in ((0, 0), (0, 1), (1, 1), (1, 0)):
            corner = [u, v]
            corner.insert(axis, side)
            ring.append(_CORNERS.index(tuple(corner)))
        edges = [(min(a, b), max(a, b)) for a, b in zip(ring, ring[1:] + ring[:1], strict=True)]
        cut = [edge for edge in edges if inside[edge[0]] != inside[edge[1]]]
        pairs = [tuple(cut)] if len(cut) == 2 else []
        if len(cut) == 4:  # the two edges that meet at an inside corner
            pairs = [(edges[i - 1], edges[i]) for i in range(4) if inside[ring[i]]]
        for a, b in pairs:
            neighbours.setdefault(a, []).append(b)
            neighbours.setdefault(b, []).append(a)
    polygons = []
    while neighbours:
        loop = [next(iter(neighbours))]
        while True:
            onward = [edge for edge in neighbours.pop(loop[-1]) if edge in neighbours]
            if not onward:
                break
            loop.append(onward[0])
        polygons.append(np.array([np.add(_CORNERS[a], _CORNERS[b]) / 2.0 for a, b in loop]))
    return polygons


def _triangulations(polygon: np.ndarray) -> list[list[np.ndarray]]:
    """Every way to cut a polygon [n, 3] into n - 2 triangles without new vertices, as lists of area vectors [3]."""
    if len(polygon) < 3:
        return [[]]
    found = []
    first, last = polygon[0], polygon[-1]
    for middle in range(1, len(polygon) - 1):
        area = np.cross(polygon[middle] - first, last - first) / 2.0
        for left in _triangulations(polygon[: middle + 1]):
            for right in _triangulations(polygon[middle:]):
                found.append([*left, area, *right])
    return found
