"""From a case's files to the array a model sees, and back onto the file's own grid.

The way there: orient (whole-axis permutation and flips, exact) -> enhance (where asked) -> crop -> resample ->
normalise, as nnU-Net does (F. Isensee et al., Nature Methods 18, 2021). What is learnt from the training cases (median
spacing, CT foreground statistics, standard intensity scale) is in a `Plan`, which is JSON and travels with the model;
what is particular to one case is in its `Geometry`, which is JSON too and knows the way back.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medjax.data import enhance, nifti, targets
from medjax.data.cohort import Case, Cohort, check_keys, load_images, nearest
from medjax.data.volume import Volume, axes_towards, check_same_grid, finite, spacing_of
from medjax.errors import UserError, warn_once
from medjax.ops.native.cpus import usable_cpus
from medjax.ops.resample import bounding_box, resample, resample_labels

NORMALIZATIONS = ("zscore", "zscore_nonzero", "ct", "percentile", "none")
DEFAULT_SPEC: dict[str, Any] = {
    "orientation": "RAS",
    "spacing": None,
    "order": 3,
    "anisotropy": 0.0,
    "crop": None,
    "enhance": (),
    "normalize": "zscore",
    "nonfinite": "error",
    "missing": "error",
}
"""What a spec may say, with its defaults; `fit` documents the values."""

_PERCENTILES = (0.5, 99.5)
_SAME_SPACING = 1e-3  # relative: closer than this, voxels stay as they are and the geometry keeps the exact affine
_FOREGROUND_PER_CASE = 20_000  # quantiles a case gives to the CT statistics, so that large organs do not outvote cases
_PLAN_VERSION = 1
_PIECE = 1 << 18
_WILD_RATIO = 1000.0


# --------------------------------------------------------------------------------------------------------- geometry


@dataclass(frozen=True)
class Geometry:
    """How one case's prepared grid lies in its file's grid.

    Attributes:
      original_shape, original_affine: of the file; affine [4, 4] as nested tuples.
      permutation, flips: file axes -> oriented axes (`medjax.data.volume.axes_towards`).
      crop_start, crop_shape: the box kept of the oriented grid, in voxels.
      shape: of the prepared grid.
      ratios: prepared spacing over oriented spacing along each axis; the two grids share the centre of the crop box.
      coarse: the axis along which voxels are picked, not interpolated (`Plan.anisotropy`); None where there is none.
    """

    original_shape: tuple[int, int, int]
    original_affine: tuple[tuple[float, ...], ...]
    permutation: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    crop_start: tuple[int, int, int]
    crop_shape: tuple[int, int, int]
    shape: tuple[int, int, int]
    ratios: tuple[float, float, float]
    coarse: int | None = None

    @property
    def affine(self) -> np.ndarray:
        """[4, 4] float64: prepared voxel index -> world millimetres."""
        to_oriented = np.diag([*self.ratios, 1.0])
        for axis in range(3):
            middle = (self.crop_shape[axis] - 1) / 2 - (self.shape[axis] - 1) / 2 * self.ratios[axis]
            to_oriented[axis, 3] = self.crop_start[axis] + middle
        to_file = np.zeros((4, 4))
        to_file[3, 3] = 1
        for axis, (source, flip) in enumerate(zip(self.permutation, self.flips, strict=True)):
            to_file[source, axis] = -1.0 if flip else 1.0
            to_file[source, 3] = self.original_shape[source] - 1 if flip else 0
        return np.array(self.original_affine) @ to_file @ to_oriented

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Of the prepared grid, mm."""
        return spacing_of(self.affine)

    @property
    def same_grid(self) -> bool:
        """Whether the prepared voxels are the file's own (no resampling)."""
        return self.shape == self.crop_shape and self.ratios == (1.0, 1.0, 1.0)

    def orders(self, order: int) -> tuple[int, int, int]:
        """Interpolation order along each axis: `order`, but 0 along the coarse one."""
        a, b, c = (0 if axis == self.coarse else order for axis in range(3))
        return a, b, c

    def orient(self, array: np.ndarray) -> np.ndarray:
        """An array [x, y, z, ...] on the file's grid in oriented axis order, as a view."""
        rest = range(3, array.ndim)
        return array.transpose(*self.permutation, *rest)[tuple(_step(f) for f in self.flips)]

    @property
    def crop(self) -> tuple[slice, slice, slice]:
        """The box kept of the oriented grid."""
        a, b, c = (slice(s, s + n) for s, n in zip(self.crop_start, self.crop_shape, strict=True))
        return a, b, c

    def to_original(self, prob: np.ndarray, background: int | None = 0) -> np.ndarray:
        """Brings per-voxel outputs back onto the file's grid, linearly.

        Args:
          prob: [X, Y, Z, K] on the prepared grid.
          background: channel that is 1 outside the crop box (softmax outputs); None leaves zeros there (sigmoid
            outputs).

        Returns:
          [x, y, z, K] float32, `original_shape`.
        """
        prob = self._on_prepared(prob, 4)
        out = np.zeros((*self.original_shape, prob.shape[3]), np.float32)
        oriented = self.orient(out)
        if background is not None:
            oriented[..., background] = 1.0
        for channel in range(prob.shape[3]):
            oriented[(*self.crop, channel)] = self._uncropped(prob[..., channel])
        return out

    def labels_to_original(self, prob: np.ndarray, background: int = 0) -> np.ndarray:
        """The most probable class of each voxel of the file's grid; one channel is held at a time.

        Args:
          prob: [X, Y, Z, K] on the prepared grid: probabilities or logits.
          background: class outside the crop box.

        Returns:
          [x, y, z] uint8 (uint16 above 256 classes): channel indices. Ties go to the lower channel.
        """
        prob = self._on_prepared(prob, 4)
        classes = prob.shape[3]
        dtype = np.uint8 if classes <= 256 else np.uint16
        best = self._uncropped(prob[..., 0])
        winner = np.zeros(self.crop_shape, dtype)
        for channel in range(1, classes):
            values = self._uncropped(prob[..., channel])
            wins = values > best
            winner[wins] = channel
            np.maximum(best, values, out=best)
        return self._placed(winner, background)

    def regions_to_original(self, prob: np.ndarray, threshold: float = 0.5) -> np.ndarray:
        """Overlapping regions on the file's grid: probabilities [X, Y, Z, K] -> bool [x, y, z, K], > `threshold`."""
        prob = self._on_prepared(prob, 4)
        out = np.zeros((*self.original_shape, prob.shape[3]), bool)
        oriented = self.orient(out)
        for channel in range(prob.shape[3]):
            oriented[(*self.crop, channel)] = self._uncropped(prob[..., channel]) > threshold
        return out

    def label_map_to_original(self, labels: np.ndarray, background: int = 0) -> np.ndarray:
        """A label map [X, Y, Z] of integers on the file's grid [x, y, z], for when its probabilities are gone."""
        labels = self._on_prepared(labels, 3)
        inverse = tuple(1 / r for r in self.ratios)
        if not self.same_grid:
            labels = resample_labels(labels, self.crop_shape, inverse, self.orders(1))
        return self._placed(labels, background)

    def to_json(self) -> str:
        """As JSON text; floats keep every bit."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | Mapping[str, Any]) -> Geometry:
        """The geometry `to_json` wrote (text or the parsed object)."""
        table: dict[str, Any] = dict(json.loads(text) if isinstance(text, str) else text)
        table["original_affine"] = tuple(tuple(float(v) for v in row) for row in table["original_affine"])
        for key, value in table.items():
            table[key] = tuple(value) if isinstance(value, list) else value
        return cls(**table)

    def _on_prepared(self, array: np.ndarray, ndim: int) -> np.ndarray:
        array = np.asarray(array)
        if array.ndim != ndim or array.shape[:3] != self.shape:
            raise ValueError(f"expected {ndim} axes on the prepared grid {self.shape}, got shape {array.shape}")
        return array

    def _uncropped(self, channel: np.ndarray) -> np.ndarray:
        """One channel of the prepared grid on the crop box, float32."""
        channel = np.asarray(channel, np.float32)
        return resample(channel, self.crop_shape, tuple(1 / r for r in self.ratios), self.orders(1))

    def _placed(self, labels: np.ndarray, background: int) -> np.ndarray:
        out = np.full(self.original_shape, background, labels.dtype)
        self.orient(out)[self.crop] = labels
        return out


def _step(flip: bool) -> slice:
    return slice(None, None, -1) if flip else slice(None)


# -------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True, eq=False)
class Prepared:
    """One case, ready for the store or the model.

    Attributes:
      image: [X, Y, Z, C] float32, C-contiguous.
      targets: task -> [X, Y, Z] label map, the smallest of uint8, uint16, int32 that holds it. For findings, uint16: i
        marks the i-th of them (from 1), see `medjax.data.targets.instances`.
      geometry: the way back.
      present: which channels are real; the others are 0 everywhere.
      scale: per channel, the 99th percentile of |raw intensity| (0 where absent), for `compare_intensities`.
      values: task -> what is no mask: a class (int32 []), a number (float32 []), a vector (float32 [K], NaN unknown),
        or findings (float32 [M, 7 + A]): centre x, y, z in voxels of the prepared grid, size x, y, z in mm along the
        world's axes, label, then the attributes in the order of `Plan.columns`, NaN where absent.
    """

    image: np.ndarray
    targets: dict[str, np.ndarray]
    geometry: Geometry
    present: tuple[bool, ...]
    scale: tuple[float, ...]
    values: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Everything about preparation that a trained model needs again.

    Attributes:
      modalities: channel order.
      labels: structure name -> value in the masks.
      orientation: axis codes, such as 'RAS'.
      spacing: mm, along the oriented axes; None keeps each file's own.
      order: interpolation of images, 1 linear or 3 cubic B-spline; labels are always interpolated linearly.
      anisotropy: above this ratio of a voxel's longest to its shortest edge, slices are resampled each on its own and
        picked along the coarse axis, as nnU-Net does above 3; 0: never.
      crop: 'nonzero' or None.
      enhance: steps before cropping, with all their options and what they learnt (`medjax.data.enhance.check`).
      normalize: modality -> one of `NORMALIZATIONS`.
      foreground: modality -> lower, upper (percentiles 0.5 and 99.5), mean, std inside the training masks, for 'ct'.
      median_spacing, median_shape: of the oriented training cases before cropping; the shape at `spacing`.
      nonfinite, missing: 'error' or 'zero'.
      kinds: task -> what its targets are, one of `medjax.data.targets.KINDS`.
      columns: task of findings -> names of their attributes, sorted.
      ignore: value of voxels that nobody labelled, kept in the targets as it is; None where there is none.
      numbered: the modalities in the order of the files' channels, and of names that end in _0000, _0001..., where the
        cohort's layout has an order of its own that `data.modalities` changed; empty: that of `modalities`.
    """

    modalities: tuple[str, ...]
    labels: Mapping[str, int]
    orientation: str
    spacing: tuple[float, float, float] | None
    crop: str | None
    normalize: Mapping[str, str]
    foreground: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    median_spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    median_shape: tuple[int, int, int] = (1, 1, 1)
    nonfinite: str = "error"
    missing: str = "error"
    kinds: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ignore: int | None = None
    order: int = 3
    anisotropy: float = 0.0
    enhance: tuple[Mapping[str, Any], ...] = ()
    numbered: tuple[str, ...] = ()

    @property
    def channels(self) -> tuple[str, ...]:
        """The modalities in the order in which files have them."""
        return self.numbered or self.modalities

    @property
    def declared(self) -> tuple[int, ...] | None:
        """Values that masks may hold besides 0; None: any."""
        return (*self.labels.values(), *(() if self.ignore is None else (self.ignore,))) if self.labels else None

    def to_json(self) -> str:
        """As JSON text; floats keep every bit."""
        table = dataclasses.asdict(self)
        if not self.numbered:
            del table["numbered"]  # the text by which runs are compared stays what it was before there was this key
        return json.dumps({"version": _PLAN_VERSION, **table}, indent=1)

    @classmethod
    def from_json(cls, text: str | Mapping[str, Any]) -> Plan:
        """The plan `to_json` wrote (text or the parsed object); UserError for one of another version."""
        table = dict(json.loads(text) if isinstance(text, str) else text)
        if (version := table.pop("version", None)) != _PLAN_VERSION:
            raise UserError(f"preprocessing plan of version {version}: this medjax reads version {_PLAN_VERSION}")
        for key in ("modalities", "spacing", "median_spacing", "median_shape"):
            table[key] = None if table[key] is None else tuple(table[key])
        table["enhance"] = tuple(table.get("enhance", ()))
        table["numbered"] = tuple(table.get("numbered", ()))
        table["columns"] = {task: tuple(names) for task, names in table.get("columns", {}).items()}
        return cls(**table)

    def apply(
        self,
        images: Volume,
        labels: Mapping[str, Volume] | None = None,
        present: Sequence[bool] | None = None,
        names: Sequence[str] | None = None,
    ) -> Prepared:
        """Prepares one case.

        Args:
          images: [X, Y, Z, C] (or [X, Y, Z] for one modality) in the file's own axis order.
          labels: task -> integer label map on the same grid.
          present: which channels are real; all by default.
          names: what error messages call each channel; the volume's file by default.

        Returns:
          The prepared case, float32; deterministic, and the same whatever axis order the file was stored in.

        Raises:
          UserError: wrong number of channels, non-finite values, a constant channel, labels on another grid.
        """
        labels = dict(labels or {})
        data = images.data if images.data.ndim == 4 else images.data[..., None]
        count = len(self.modalities)
        if data.shape[3] != count:
            raise UserError(
                f"{images.name}: {data.shape[3]} channels, but the plan has {count} modalities "
                f"({', '.join(self.modalities)}). Give every modality, in this order."
            )
        real = (True,) * count if present is None else tuple(bool(p) for p in present)
        called = list(names) if names is not None else [f"{images.name} ({m})" for m in self.modalities]
        if images.nonfinite:
            data = finite(images, self.nonfinite).data.reshape(data.shape, order="A")
        for volume in labels.values():
            check_same_grid(volume, images)
        raw = [_large_value(data[..., c]) if real[c] else 0.0 for c in range(count)] if self.enhance else None
        if self.enhance:
            images = dataclasses.replace(images, data=data, nonfinite=0)
            data = self.enhanced(images, real, called).data

        if self.crop == "nonzero":
            geometry = self._nonzero_geometry(images, data)
        else:
            geometry = self.geometry(images.shape, images.affine)
        scales = []
        image = np.zeros((*geometry.shape, count), np.float32)
        for channel, modality in enumerate(self.modalities):
            if not real[channel]:
                scales.append(0.0)
                continue
            values = _float_copy(geometry.orient(data[..., channel])[geometry.crop], called[channel])
            scales.append(_large_value(values) if raw is None else raw[channel])
            self._finish(values, modality, geometry, called[channel], image[..., channel])
        masks = {task: self._target(volume, geometry) for task, volume in labels.items()}
        return Prepared(image, masks, geometry, real, tuple(scales))

    def enhanced(
        self,
        images: Volume,
        present: Sequence[bool] | None = None,
        names: Sequence[str] | None = None,
        steps: Sequence[Mapping[str, Any]] | None = None,
    ) -> Volume:
        """A case after the steps of `enhance` (or `steps`), on the file's own grid: [X, Y, Z, C] float32.

        Arguments as for `apply`; finite values only.
        """
        data = images.data if images.data.ndim == 4 else images.data[..., None]
        called = list(names or [f"{images.name} ({m})" for m in self.modalities])
        real = list(present or [True] * len(self.modalities))
        chosen = self.enhance if steps is None else steps
        grid = self.geometry(images.shape, images.affine)
        spacing = np.array(spacing_of(images.affine))[list(grid.permutation)].tolist()

        def oriented(channel: int) -> np.ndarray:
            return _float_copy(grid.orient(data[..., channel]), called[channel])

        wanted = enhance.mask_modalities(chosen)
        masks = {m: oriented(c) for c, m in enumerate(self.modalities) if m in wanted and real[c]}
        out = np.zeros((*images.shape, len(self.modalities)), np.float32, order="F")
        for channel, modality in enumerate(self.modalities):
            if real[channel]:
                made = enhance.run(oriented(channel), modality, chosen, spacing, called[channel], masks)
                grid.orient(out[..., channel])[...] = made
        return dataclasses.replace(images, data=out)

    def prepared_shape(self, case: Case) -> tuple[int, int, int]:
        """Shape of the prepared case from its header alone: exact without cropping, else an upper bound."""
        first = next((case.images[m] for m in self.modalities if m in case.images), None)
        if first is None:
            raise UserError(f"case {case.id}: has none of the modalities {', '.join(self.modalities)}")
        return self.geometry(*nifti.read_grid(first)).shape

    def geometry(
        self, shape: Sequence[int], affine: np.ndarray, box: tuple[slice, slice, slice] | None = None
    ) -> Geometry:
        """The geometry of a file's grid under this plan.

        Args:
          shape: of the file (further axes than three are ignored).
          affine: [4, 4], of the file.
          box: what to keep of the oriented grid; all of it by default.
        """
        permutation, flips = axes_towards(affine, self.orientation)
        start, kept, prepared, ratios = [0] * 3, [1] * 3, [1] * 3, [1.0] * 3
        for axis, source in enumerate(permutation):
            start[axis], stop, _ = (box[axis] if box else slice(None)).indices(shape[source])
            kept[axis] = prepared[axis] = stop - start[axis]
            # Six digits: a header's float32 holds no more, and files stored in another axis order differ beyond.
            own = float(f"{spacing_of(affine)[source]:.6g}")
            if self.spacing is not None and abs(self.spacing[axis] / own - 1) > _SAME_SPACING:
                ratios[axis] = self.spacing[axis] / own
                prepared[axis] = max(1, round(kept[axis] / ratios[axis]))
        return Geometry(
            original_shape=_three(shape),
            original_affine=tuple(tuple(row) for row in np.asarray(affine, np.float64).tolist()),
            permutation=permutation,
            flips=flips,
            crop_start=_three(start),
            crop_shape=_three(kept),
            shape=_three(prepared),
            ratios=(ratios[0], ratios[1], ratios[2]),
            # By the ratios: 20 slices of 5 mm stay 20 at 5.1 mm, and are resampled all the same.
            coarse=None if ratios == [1.0] * 3 else self._coarse(np.array(spacing_of(affine))[list(permutation)]),
        )

    def _coarse(self, spacing: np.ndarray) -> int | None:
        """The axis along which voxels are picked: the one long edge of the file's voxels, else of the target's."""
        if not self.anisotropy:
            return None
        for edges in (spacing, np.asarray(self.spacing or spacing)):
            if edges.max() > self.anisotropy * edges.min():
                # Two long edges make no slices.
                longest = np.flatnonzero(edges >= edges.max() * (1 - _SAME_SPACING))
                return int(longest[0]) if len(longest) == 1 else None
        return None

    def _nonzero_geometry(self, images: Volume, data: np.ndarray) -> Geometry:
        """The geometry that keeps the bounding box of voxels where any channel of `data` is not 0."""
        mask = data[..., 0] != 0
        for channel in range(1, data.shape[3]):
            mask |= data[..., channel] != 0
        box = bounding_box(self.geometry(images.shape, images.affine).orient(mask))
        if box is None:
            raise UserError(f"{images.name}: the image is 0 everywhere. Give the right file or leave the case out.")
        return self.geometry(images.shape, images.affine, box)

    def _finish(self, values: np.ndarray, modality: str, geometry: Geometry, name: str, out: np.ndarray) -> None:
        """Resamples and normalises one channel [*crop_shape] float32, which it may overwrite, into `out` [*shape]."""
        kind = self.normalize[modality]
        mask = values != 0 if kind == "zscore_nonzero" else None  # before interpolation blurs the border of the zeros
        if not geometry.same_grid:
            values = resample(values, geometry.shape, geometry.ratios, geometry.orders(self.order))
            if mask is not None:
                mask = resample(mask, geometry.shape, geometry.ratios, order=0)
                if not mask.any():
                    raise UserError(
                        f"{name}: its few voxels that are not 0 are lost between those of data.preprocess.spacing="
                        f"{self.spacing}, and normalize='zscore_nonzero' measures no others. Choose a finer spacing or "
                        "'zscore', or leave the case out."
                    )
        if kind == "none":
            out[...] = values
            return
        if kind == "percentile":
            low, high = (np.float32(v) for v in np.percentile(values, _PERCENTILES))
            if not high > low:
                low, high = values.min(), values.max()
            np.clip(values, low, high, out=values)
            mean, std = float(low), float(high - low)
        elif kind == "ct":
            known = self.foreground[modality]
            np.clip(values, np.float32(known["lower"]), np.float32(known["upper"]), out=values)
            mean, std = known["mean"], known["std"]
        else:
            mean, std = _moments(values if mask is None else values[mask])
        if not std > 0:
            raise UserError(
                f"{name}: constant where normalize={kind!r} measures it. Choose another normalisation for it."
            )
        if mask is not None:
            values[~mask] = np.float32(mean)  # exactly 0 after the next lines
        for before, after in zip(
            values, out, strict=True
        ):  # slab by slab: `out` is strided, the slab stays in the cache
            before -= np.float32(mean)
            np.divide(before, np.float32(std), out=after)

    def _target(self, volume: Volume, geometry: Geometry) -> np.ndarray:
        oriented = geometry.orient(volume.data)
        labels = oriented[geometry.crop]
        if lost := np.count_nonzero(oriented) - np.count_nonzero(labels):
            warn_once(
                f"{volume.name}: {lost} labelled voxels lie where the image is 0 and are cropped (crop='nonzero')"
            )
        dtype = next(d for d in (np.uint8, np.uint16, np.int32) if int(labels.max()) <= np.iinfo(d).max)
        labels = _copied(labels, dtype)
        if geometry.same_grid:
            return labels
        return resample_labels(labels, geometry.shape, geometry.ratios, geometry.orders(1))


def _three(numbers: Sequence[int]) -> tuple[int, int, int]:
    return int(numbers[0]), int(numbers[1]), int(numbers[2])


def _float_copy(array: np.ndarray, name: str) -> np.ndarray:
    """A C-contiguous float32 copy of one channel [X, Y, Z]; UserError where it shows nothing or leaves float32."""
    # One memory order whatever the file's: sums, and so the result, then agree to the bit.
    with np.errstate(over="ignore"):
        values = _copied(array, np.float32)
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError(f"{name}: values beyond the range of float32 (3.4e38). Rescale the image.")
    if low == high:
        raise UserError(
            f"{name}: the image is constant (every voxel is {low:g}), so there is nothing to see in it. Give the right "
            "file or leave the case out."
        )
    return values


def _copied(array: np.ndarray, dtype: Any) -> np.ndarray:
    """A C-contiguous copy of [X, Y, Z]; a few rows at a time, which keeps a file's Fortran order inside the cache."""
    out = np.empty(array.shape, dtype)
    for row in range(0, array.shape[1], 8):
        out[:, row : row + 8] = array[:, row : row + 8]
    return out


def _moments(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation in float64, piece by piece: no float64 copy of the whole."""
    flat = values.reshape(-1)
    pieces = [flat[i : i + _PIECE] for i in range(0, flat.size, _PIECE)]
    mean = sum(float(piece.sum(dtype=np.float64)) for piece in pieces) / flat.size
    squares = sum(float(np.square(piece - mean, dtype=np.float64).sum()) for piece in pieces)
    return mean, math.sqrt(squares / flat.size)


def _large_value(values: np.ndarray) -> float:
    """99th percentile of |values|, from at most about 1e5 evenly spaced voxels."""
    flat = values.ravel()
    return float(np.percentile(np.abs(flat[:: max(1, flat.size // 100_000)]), 99))


# --------------------------------------------------------------------------------------------------------------- fit


def check_spec(spec: Mapping[str, Any], modalities: Sequence[str]) -> dict[str, Any]:
    """The spec with its defaults filled in and `normalize` as {modality: name}; UserError names what is wrong in it."""
    check_keys("data.preprocess", spec.keys(), tuple(DEFAULT_SPEC))
    full = {**DEFAULT_SPEC, **dict(spec)}
    codes = full["orientation"]
    pairs = [next((pair for pair in ("LR", "PA", "IS") if c in pair), "") for c in str(codes)]
    if sorted(pairs) != ["IS", "LR", "PA"]:
        raise UserError(
            f"data.preprocess.orientation={codes!r}: give one letter of each of L/R, P/A, I/S, such as 'RAS'"
        )
    spacing = full["spacing"]
    if spacing is not None and spacing != "median":
        try:
            numbers = tuple(float(s) for s in spacing)
        except (TypeError, ValueError):
            numbers = ()
        if isinstance(spacing, str) or len(numbers) != 3 or not all(0 < s < math.inf for s in numbers):
            raise UserError(f"data.preprocess.spacing={spacing!r}: give three positive numbers (mm), 'median' or None")
        full["spacing"] = numbers
    for key, known in (("crop", (None, "nonzero")), ("nonfinite", ("error", "zero")), ("missing", ("error", "zero"))):
        if full[key] not in known:
            hint = nearest(full[key], (k for k in known if k))
            raise UserError(f"data.preprocess.{key}={full[key]!r}{hint} (known: {', '.join(map(str, known))})")
    if full["order"] not in (1, 3):
        raise UserError(f"data.preprocess.order={full['order']!r}: images are resampled with 1 (linear) or 3 (cubic)")
    ratio = full["anisotropy"]
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not (ratio == 0 or 1 <= ratio < math.inf):
        raise UserError(
            f"data.preprocess.anisotropy={ratio!r}: give the ratio of voxel edges from which slices are resampled on "
            "their own (nnU-Net: 3), or 0 for never"
        )
    full["anisotropy"] = float(ratio)
    full["enhance"] = enhance.check(full["enhance"], modalities, codes)
    given = full["normalize"]
    table = dict.fromkeys(modalities, given) if isinstance(given, str) else dict(given)
    check_keys("data.preprocess.normalize", table, tuple(modalities))
    for modality in modalities:
        if modality not in table:
            raise UserError(f"data.preprocess.normalize: names no normalisation for modality {modality!r}")
        if table[modality] not in NORMALIZATIONS:
            raise UserError(
                f"data.preprocess.normalize: unknown {table[modality]!r} for {modality}"
                f"{nearest(table[modality], NORMALIZATIONS)} (known: {', '.join(NORMALIZATIONS)})"
            )
    full["normalize"] = table
    return full


def fit(spec: Mapping[str, Any], cohort: Cohort, cases: Iterable[Case]) -> Plan:
    """Learns a plan from the training cases.

    Args:
      spec: keys of `DEFAULT_SPEC`:
        orientation: axis codes, 'RAS' by default.
        spacing: three mm along the oriented axes, 'median' of the training cases, or None (each file's own).
        order: 3, cubic B-spline, or 1, linear: interpolation of images.
        anisotropy: resample slices on their own where voxels are longer than this many times their shortest edge
          (nnU-Net's rule, with 3), 0 by default: never.
        enhance: steps of `medjax.data.enhance`, names or tables: ('n4', {'name': 'median', 'radius': 1}).
        crop: 'nonzero' (bounding box of voxels where any modality is not 0) or None.
        normalize: a name for all modalities or {modality: name}. 'zscore': mean 0, std 1 over the volume;
          'zscore_nonzero': over its non-zero voxels, zeros stay 0; 'ct': clipped to the 0.5 and 99.5 percentiles of the
          training masks' foreground, then by its mean and std, the same for every case; 'percentile': 0.5 to 99.5
          percentiles of the volume to 0..1, clipped; 'none'.
        nonfinite: 'error', or 'zero' to read NaN and infinite values as 0.
        missing: 'error', or 'zero' to let a case lack modalities.
      cohort: for modalities and labels.
      cases: the training cases. Only headers are read, except for 'ct', which reads those images and masks, and for
        'nyul' among the steps of `enhance`, which reads the images.

    Returns:
      The plan.

    Raises:
      UserError: an unknown key or value (with the nearest known), no cases, or 'ct' without masks.
    """
    cases = tuple(cases)
    if not cases:
        raise UserError("data.preprocess: there are no training cases to fit to")
    full = check_spec(spec, cohort.modalities)
    kinds, _ = targets.learn({id(case): case for case in (*cohort.cases, *cases)}.values())
    _, columns = targets.learn(cases)
    with ThreadPoolExecutor(max_workers=4) as pool:
        grids = list(pool.map(nifti.read_grid, (next(iter(case.images.values())) for case in cases)))
    oriented = [axes_towards(affine, full["orientation"])[0] for _, affine in grids]
    spacings = [np.array(spacing_of(affine))[list(order)] for (_, affine), order in zip(grids, oriented, strict=True)]
    files = next((tuple(case.images) for case in cases if len(case.images) == len(cohort.modalities)), ())
    x, y, z = (float(f"{s:.6g}") for s in np.median(spacings, axis=0))
    plan = Plan(
        modalities=cohort.modalities,
        labels=dict(cohort.labels),
        orientation=full["orientation"],
        spacing=(x, y, z) if full["spacing"] == "median" else full["spacing"],
        crop=full["crop"],
        normalize=full["normalize"],
        median_spacing=(x, y, z),
        nonfinite=full["nonfinite"],
        missing=full["missing"],
        kinds=kinds,
        columns=columns,
        ignore=cohort.ignore,
        order=full["order"],
        anisotropy=full["anisotropy"],
        enhance=full["enhance"],
        numbered=() if files == cohort.modalities else files,
    )
    shapes = [plan.geometry(shape, affine).shape for shape, affine in grids]
    a, b, c = (round(float(n)) for n in np.median(shapes, axis=0))
    plan = dataclasses.replace(plan, median_shape=(a, b, c))
    for number, step in enumerate(plan.enhance):
        if step["name"] == "nyul":
            learnt = enhance.learn(step, _landmarks(plan, number, cases))
            plan = dataclasses.replace(plan, enhance=(*plan.enhance[:number], learnt, *plan.enhance[number + 1 :]))
    ct = [m for m in cohort.modalities if full["normalize"][m] == "ct"]
    return dataclasses.replace(plan, foreground=_foreground(plan, ct, cases)) if ct else plan


def _landmarks(plan: Plan, number: int, cases: Sequence[Case]) -> list[dict[str, np.ndarray]]:
    """For each case, modality -> its landmarks for step `number` of `plan.enhance`, after the steps before it."""
    step = plan.enhance[number]

    def measure(case: Case) -> dict[str, np.ndarray]:
        images, present, names = _read(case, plan)
        data = plan.enhanced(images, present, names, plan.enhance[:number]).data
        return {
            modality: enhance.landmarks(data[..., channel], step, names[channel])
            for channel, modality in enumerate(plan.modalities)
            if present[channel] and modality in step["modalities"]
        }

    with ThreadPoolExecutor(max_workers=usable_cpus()) as pool:
        return list(pool.map(measure, cases))


def _read(case: Case, plan: Plan) -> tuple[Volume, list[bool], list[str]]:
    """A case's images with finite values, which of them are there, and what to call them."""
    images = finite(load_images(case, plan.modalities, allow_missing=plan.missing == "zero"), plan.nonfinite)
    return images, [m in case.images for m in plan.modalities], [str(case.images.get(m, m)) for m in plan.modalities]


def _foreground(plan: Plan, modalities: Sequence[str], cases: Sequence[Case]) -> dict[str, dict[str, float]]:
    """Intensity statistics inside the training masks, for each of `modalities`."""
    samples: dict[str, list[np.ndarray]] = {m: [] for m in modalities}
    for case in cases:
        masks = [t for t in case.targets.values() if isinstance(t, Path)]
        have = [m for m in modalities if m in case.images]
        if not masks or not have:
            continue
        if plan.enhance:
            images, present, names = _read(case, plan)
            images = plan.enhanced(images, present, names)
            channels = [plan.modalities.index(m) for m in have]
        else:
            images, channels = finite(load_images(case, have), plan.nonfinite), list(range(len(have)))
        inside = np.zeros(images.shape, bool)
        for path in masks:
            mask = nifti.read_label(path, images, plan.declared).data
            inside |= (mask > 0) & (mask != plan.ignore) if plan.ignore is not None else mask > 0
        data = images.data if images.data.ndim == 4 else images.data[..., None]
        for channel, modality in zip(channels, have, strict=True):
            values = np.sort(data[..., channel][inside].astype(np.float32))
            if len(values):
                # Evenly spaced quantiles stand for the case.
                n = min(len(values), _FOREGROUND_PER_CASE)
                samples[modality].append(values[np.linspace(0, len(values) - 1, n).round().astype(np.intp)])
    out = {}
    for modality, parts in samples.items():
        if not parts:
            raise UserError(
                f"data.preprocess.normalize: 'ct' for {modality} needs masks with foreground in the training cases. "
                "Use 'percentile' or 'zscore' where there are none."
            )
        pooled = np.concatenate(parts).astype(np.float64)
        lower, upper = (float(v) for v in np.percentile(pooled, _PERCENTILES))
        out[modality] = {"lower": lower, "upper": upper, "mean": float(pooled.mean()), "std": float(pooled.std())}
    return out


# ------------------------------------------------------------------------------------------------------------- cases


def prepare_case(case: Case, plan: Plan, tasks: Sequence[str] | None = None) -> Prepared:
    """Reads, checks and prepares one case.

    Args:
      case: the case.
      plan: from `fit`.
      tasks: those whose targets are wanted; all by default.

    Returns:
      The prepared case.

    Raises:
      UserError: anything wrong with its files or targets, naming them.
    """
    wanted = [task for task in case.targets if tasks is None or task in tasks]
    images = load_images(case, plan.modalities, allow_missing=plan.missing == "zero")
    present = [m in case.images for m in plan.modalities]
    labels, rest = {}, []
    for task in wanted:
        if isinstance(path := case.targets[task], Path):
            labels[task] = nifti.read_label(path, images, plan.declared)
        else:
            rest.append(task)
    names = [str(case.images.get(m, m)) for m in plan.modalities]
    prepared = plan.apply(images, labels, present, names)
    at = prepared.geometry
    masks, values = targets.encode(
        case, rest, plan.kinds, plan.columns, at.affine, at.shape, images.affine, images.shape
    )
    return dataclasses.replace(prepared, targets=prepared.targets | masks, values=values)


def compare_intensities(scales: Mapping[str, Sequence[float]], modalities: Sequence[str]) -> None:
    """Notes once where the cases' raw intensities differ wildly (`Prepared.scale` by case id).

    One file in other units (a map times 1e6, a CT without its offset) rarely is what its folder says; normalisation per
    case hides it, fixed CT windows do not.
    """
    for channel, modality in enumerate(modalities):
        known = {id: s[channel] for id, s in scales.items() if s[channel] > 0}
        if not known:
            continue
        low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
        if known[high] > _WILD_RATIO * known[low]:
            warn_once(
                f"{modality}: intensities differ wildly between cases (99th percentile {known[low]:.3g} in {low}, "
                f"{known[high]:.3g} in {high}); are their units the same?"
            )
