"""A synthetic brain-tumour cohort: the data that the default job trains on, made in seconds without a download.

Every case starts from the MNI152 template (T1 and the grey and white matter maps that the `nilearn` wheel carries;
Fonov et al., NeuroImage 2011), is posed and deformed at random, gets one or two tumours (necrotic core, enhancing rim,
oedema along white matter) that push the tissue around them aside, and is imaged in four contrasts with bias field,
partial volume and Rician noise. Voxel grids differ from case to case in axis order, flips, spacing, obliquity and
number type, as the files of several scanners do.

A case is a pure function of (seed, case number, spacing, size), whoever computes it: no BLAS call is on the way, whose
result could depend on the number of threads.
"""

from __future__ import annotations

import csv
import difflib
import functools
import gzip
import hashlib
import importlib
import importlib.util
import inspect
import json
import numbers
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from medjax.data.volume import corner_distance
from medjax.errors import UserError
from medjax.ops.native.build import cache_root
from medjax.ops.native.cpus import usable_cpus

MODALITIES = ("T1", "T1c", "T2", "FLAIR")
LABELS = {
    "background": 0,
    "CSF": 1,
    "grey matter": 2,
    "white matter": 3,
    "oedema": 4,
    "tumour core": 5,
    "enhancing rim": 6,
}
# Raise it with every change of what is generated: cohorts already in the cache are then left alone and made anew.
VERSION = 1

# Name in `data.cohort` -> (module, function); the function takes `data.options` and returns a folder in Decathlon
# layout, or a manifest.
GENERATORS = {
    "synthetic_brain": ("medjax.data.synthetic", "brain_cohort"),
    "synthetic_stroke": ("medjax.data.synthetic_stroke", "stroke_cohort"),
    "synthetic_lung": ("medjax.data.synthetic_lung", "lung_cohort"),
    "synthetic_breast": ("medjax.data.synthetic_breast", "breast_cohort"),
    "synthetic_colon": ("medjax.data.synthetic_colon", "colon_cohort"),
}

_TEMPLATE_FILE = "datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
# Mean intensity of CSF, grey and white matter in the template's T1 (maximum 1), read off its pure voxels.
_TEMPLATE_MEANS = (0.27, 0.65, 0.88)
_STALE_SECONDS = 24 * 3600.0
_BUILD = re.compile(r"\..+-v\w+-[0-9a-f]{10}-\w+\.tmp")  # a cohort's folder before it is complete

# Mean intensity of CSF, grey matter, white matter, oedema, core, rim; white matter in T1 is about 0.85.
_MEANS = np.array(
    [
        [0.28, 0.62, 0.85, 0.62, 0.43, 0.57],  # T1
        [0.30, 0.64, 0.84, 0.62, 0.45, 1.12],  # T1c
        [0.98, 0.62, 0.47, 0.76, 0.86, 0.69],  # T2
        [0.20, 0.62, 0.50, 0.84, 0.60, 0.75],  # FLAIR
    ],
    np.float32,
)
_MEAN_JITTER = np.array([0.05, 0.045, 0.045, 0.06, 0.09, 0.09], np.float32)
# Number types of the files, and whether integers carry a slope.
_STORAGE = tuple(
    (np.dtype(kind), scaled)
    for kind, scaled in (
        ("int16", False),
        ("int16", False),
        ("uint16", False),
        ("int16", True),
        ("float32", False),
    )
)
# Where the lateral ventricles are widened, MNI mm.
_VENTRICLES = ((-16.0, -12.0, 16.0), (16.0, -12.0, 16.0))
# How much of the template's own T1 detail (deep nuclei, brainstem, vessels) shows in each contrast.
_DETAIL = (1.0, 0.9, -0.6, -0.35)
_HETEROGENEITY = (0.08, 0.14, 0.12, 0.10)


@dataclass(frozen=True)
class BrainCase:
    """One synthetic case on its file grid.

    Attributes:
        image: float32 [X, Y, Z, 4], contrasts in the order of `MODALITIES`; 0 outside the brain.
        label: uint8 [X, Y, Z], values of `LABELS`; 0 exactly where `image` is.
        affine: float64 [4, 4], voxel index -> patient millimetres, RAS+.
        dtype: number type the image is stored in.
        slope: what a count of the stored integers is worth, None for floating point.
        foci: world position (mm, RAS+) and radius (mm) of every enhancing tumour.
    """

    image: np.ndarray
    label: np.ndarray
    affine: np.ndarray
    dtype: np.dtype
    slope: float | None
    foci: tuple[tuple[tuple[float, float, float], float], ...]


@dataclass(frozen=True)
class _Template:
    """Maps on the cropped template grid (1 mm, axis aligned, RAS+); `start` is voxel 0 in mm."""

    tissue: np.ndarray  # [3, X, Y, Z] CSF, GM, WM; sums to the brain's share of the voxel
    detail: np.ndarray  # [X, Y, Z] T1 that the tissue means leave unexplained
    white: np.ndarray  # [X, Y, Z] white matter, blurred: where oedema spreads
    caps: np.ndarray  # [X, Y, Z] nearness of the ventricles
    depth: np.ndarray  # [X, Y, Z] mm below the brain's surface
    start: np.ndarray
    surface: np.ndarray  # [N, 3] mm, points on the brain's outside
    middle: np.ndarray  # [3] mm, centre of the brain's bounding box
    sites: np.ndarray  # [N, 3] mm, deep in white matter: where tumours may start


def generate(name: str, options: Mapping[str, Any]) -> Path:
    """The cohort that the generator `name` makes with `options`: a folder in Decathlon layout, or a manifest.

    Raises:
        UserError: an option the generator does not have, or what the generator says of a value.
    """
    module, function = GENERATORS[name]
    generator = getattr(importlib.import_module(module), function)
    known = inspect.signature(generator).parameters
    for key in options:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            raise UserError(f"config: data.options: {name} has no option {key!r}; {hint}")
    return generator(**options)


def brain_cohort(
    folder: str | os.PathLike[str] | None = None,
    *,
    n_train: int = 24,
    n_val: int = 6,
    n_test: int = 6,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
    spacing: float = 2.0,
    size: tuple[int, int, int] | None = None,
) -> Path:
    """Returns the folder of a synthetic brain-tumour cohort, and makes it on first use.

    The layout is that of the Medical Segmentation Decathlon: `dataset.json`, `imagesTr/<id>.nii.gz` ([X, Y, Z, 4]),
    `labelsTr/<id>.nii.gz`, and `split.csv` (id, split) with train, val and test; the test cases have labels too. With
    8 training cases or more, the last of them has no tumour.

    The cohort is built beside its final place and renamed when complete: two processes may ask for it at once, and a
    build that was killed is never mistaken for a cohort.

    Args:
        folder: where cohorts are kept; None means the user's cache (`medjax.ops.native.build.cache_root`). The cohort
            is a subfolder whose name tells the generator's version and a hash of the parameters.
        n_train, n_val, n_test: cases in each split.
        seed: source of all randomness; each case draws from its own stream (seed, case number).
        workers: processes that generate; None means one for each CPU this process may use. Results do not depend on it.
        progress: show progress on standard error: a bar on a terminal, else some lines.
        spacing: mean voxel size in mm; the cases vary by a tenth around it.
        size: voxels along the patient's left-right, back-front and foot-head axes, cut around the middle of the
            brain; None takes the whole brain.

    Raises:
        UserError: a parameter is out of range, the cache cannot be written, nilearn's template is missing, or files
            have gone from a finished cohort.
    """
    counts = {"train": n_train, "val": n_val, "test": n_test}
    check_request(counts, seed, workers, spacing, size)
    parameters = {"version": VERSION, **counts, "seed": seed, "spacing": float(spacing), "size": size and list(size)}
    splits = [split for split, count in counts.items() for _ in range(count)]
    ids = [f"brain_{number:03d}" for number in range(len(splits))]
    healthy = n_train - 1 if n_train >= 8 else None
    jobs = [
        {
            "id": name,
            "seed": seed,
            "number": number,
            "tumour": number != healthy,
            "spacing": float(spacing),
            "size": size,
        }
        for number, name in enumerate(ids)
    ]
    return make_cohort(
        folder,
        "brain",
        parameters,
        jobs,
        ["dataset.json", "split.csv"] + [f"{part}/{name}.nii.gz" for name in ids for part in ("imagesTr", "labelsTr")],
        before=_template_paths,
        finish=lambda build: _write_tables(build, ids, splits),
        workers=workers,
        progress=progress,
    )


def make_cohort(
    folder: str | os.PathLike[str] | None,
    name: str,
    parameters: Mapping[str, Any],
    jobs: Sequence[dict[str, Any]],
    files: Sequence[str],
    *,
    before: Callable[[], Any],
    finish: Callable[[Path], None],
    workers: int | None,
    progress: bool,
) -> Path:
    """Returns the folder of a cohort, which is built on first use beside its final place and renamed when complete.

    Args:
        folder: where cohorts are kept, see `brain_cohort`.
        name, parameters: the folder is called after the name, the parameters' `version` and a hash of the parameters.
        jobs: what the workers write, one JSON record a case with 'id'; 'writer' ('module:function') is called with the
            record and 'folder', and is this module's `_write_case` where it is left out.
        files: names within the folder that a finished cohort has.
        before: called before anything is built; raises UserError for what is missing.
        finish: writes the tables.
        workers, progress: see `brain_cohort`.
    """
    digest = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:10]
    cache = Path(folder).expanduser() if folder else cache_root()
    target = cache / f"{name}-v{parameters['version']}-{digest}"
    if target.exists():
        _check_complete(target, files)
        return target

    before()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_stale(cache)
        build = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=".tmp", dir=cache))
    except OSError as error:
        raise UserError(
            f"{cache}: cannot write the synthetic cohort here ({error.strerror}); set MEDJAX_CACHE to a writable folder"
        ) from error
    try:
        for part in {Path(file).parent for file in files}:
            (build / part).mkdir(parents=True, exist_ok=True)
        jobs = [{**job, "folder": str(build)} for job in jobs]
        n_workers = min(workers or usable_cpus(), len(jobs))
        with _Progress(len(jobs), f"synthetic cohort {target}", progress) as bar:
            if n_workers == 1:
                for job in jobs:
                    _work(job)
                    bar.advance()
            else:
                _run_workers(jobs, n_workers, bar.advance)
        finish(build)
        build.chmod(0o755)
        try:
            build.rename(target)
        except OSError:
            # Another process finished the same cohort first: its files are byte for byte these.
            if not target.exists():
                raise
    finally:
        shutil.rmtree(build, ignore_errors=True)
    return target


def brain_case(
    seed: int,
    number: int,
    *,
    tumour: bool = True,
    spacing: float = 2.0,
    size: tuple[int, int, int] | None = None,
    site: Sequence[float] | None = None,
) -> BrainCase:
    """Makes one case in memory.

    Args:
        seed, number: the case's random stream.
        tumour: False leaves the brain healthy.
        spacing: mean voxel size, mm.
        size: voxels along the patient's (left-right, back-front, foot-head) axes; None takes the whole brain.
        site: centre of the (then only) tumour in MNI152 millimetres; None draws it, or two, within white matter.
    """
    return make_brain(np.random.default_rng([seed, number]), spacing, size, tumour=tumour, site=site)


class Anatomy(NamedTuple):
    """A brain before its image is rendered, all float32 on the case's grid.

    Attributes:
        parts: [6, X, Y, Z], shares of the tissues in the order of `LABELS`.
        mni: [3, X, Y, Z], place in the template, mm.
        white: white matter, blurred. caps: nearness of the ventricles. Both [X, Y, Z], 0 to 1.
        voxel: [3], mm.
    """

    parts: np.ndarray
    mni: np.ndarray
    white: np.ndarray
    caps: np.ndarray
    voxel: np.ndarray


def make_brain(
    rng: np.random.Generator,
    spacing: float,
    size: tuple[int, int, int] | None,
    *,
    tumour: bool = False,
    site: Sequence[float] | None = None,
    atrophy: float | None = None,
    change: Callable[[Anatomy], np.ndarray] | None = None,
) -> BrainCase:
    """One case from a generator of random numbers; the other arguments are those of `brain_case`, and:

    Args:
        atrophy: 0 to 1, how wide ventricles and sulci are; None draws it.
        change: changes the tissues in place and returns a mask [X, Y, Z] of what it did, which becomes `label` 4.
    """
    from scipy import ndimage

    template = _template(float(spacing))

    pose = _draw_pose(rng, template.middle)
    grid, shape = _grid(rng, template, pose, spacing, size)
    index = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in shape), indexing="ij", sparse=True)
    patient = _apply(grid, index)  # [3, X, Y, Z] mm
    voxel = np.sqrt((grid[:3, :3] ** 2).sum(0))

    # Individual anatomy: two scales of smooth displacement, and each lateral ventricle wider or narrower by itself.
    anatomy = smooth_noise(rng, shape, 52 / voxel, 3) * rng.uniform(2.0, 3.0)
    anatomy += smooth_noise(rng, shape, 19 / voxel, 3) * rng.uniform(0.8, 1.2)
    widening = np.clip(rng.normal(0.08, 0.12) + rng.normal(0, 0.08, 2), -0.2, 0.35).astype(np.float32)
    if atrophy is not None:
        widening = np.clip(widening + np.float32(0.35 * atrophy - 0.1), -0.2, 0.4)

    def locate(points: np.ndarray) -> np.ndarray:
        """Where in the template the tissue at these patient points comes from."""
        mni = _apply(pose.to_mni, points) + anatomy
        for gain, centre in zip(widening, _VENTRICLES, strict=True):
            offset = mni - _column(centre)
            mni -= gain * offset * np.exp(-(offset**2).sum(0) / np.float32(2 * 17.0**2))
        return mni

    def sample(array: np.ndarray, mni: np.ndarray) -> np.ndarray:
        return ndimage.map_coordinates(array, mni - _column(template.start), order=1, prefilter=False)

    mni = locate(patient)
    foci: list[_Focus] = []
    if tumour:
        foci = _draw_foci(rng, template, pose, site, spacing)
        depth = sample(template.depth, mni)
        mni = locate(patient - _mass_effect(patient, foci, depth))

    tissue = np.stack([sample(part, mni) for part in template.tissue])
    fluid = rng.uniform(0.9, 1.8) if atrophy is None else 0.9 + 1.1 * atrophy
    brain = tissue.sum(0)
    tissue[0] *= np.float32(fluid)
    tissue *= brain / np.maximum(tissue.sum(0), 1e-6)
    inside = brain > 0.5

    parts = np.zeros((6, *shape), np.float32)
    parts[:3] = tissue / np.maximum(brain, 1e-6)
    if foci:
        white = sample(template.white, mni)
        lesion = _lesion(rng, patient, foci, white, parts[0], voxel, spacing)
        parts[:3] *= 1 - lesion.sum(0)
        parts[3:] = lesion
    changed = None
    if change is not None:
        changed = change(Anatomy(parts, mni, sample(template.white, mni), sample(template.caps, mni), voxel))
    label = np.where(inside, parts.argmax(0) + 1, 0).astype(np.uint8)
    if changed is not None:
        label[changed & inside] = LABELS["oedema"]

    image = _render(
        rng,
        parts,
        sample(template.detail, mni),
        sample(template.caps, mni),
        sample(template.depth, mni),
        voxel,
        spacing,
    )
    image *= inside[..., None]
    image *= np.float32(np.exp(rng.uniform(np.log(300), np.log(3000))))  # scanners share no unit
    dtype, scaled = _STORAGE[rng.integers(len(_STORAGE))]
    slope = None
    if dtype.kind in "iu":
        slope = float(np.float32(image.max() / 30000)) if scaled else 1.0
        # Rounding must not make a voxel of the brain look like background.
        counts = np.maximum(np.rint(image / np.float32(slope)), 1) * inside[..., None]
        image = counts * np.float32(slope)

    image, label, affine = _reorient(rng, image, label, grid)
    positions = tuple(((float(f.centre[0]), float(f.centre[1]), float(f.centre[2])), f.radius) for f in foci)
    return BrainCase(image, label, affine, dtype, slope, positions)


# ---- geometry


def _rotation(degrees: np.ndarray) -> np.ndarray:
    """Rotation matrix [3, 3] about x, then y, then z."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(degrees)):
        i, j = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[j, i], turn[i, j] = np.sin(angle), -np.sin(angle)
        matrix = turn @ matrix
    return matrix


@dataclass(frozen=True)
class _Pose:
    """The head's place in the scanner: patient = middle + shift + matrix (mni - middle)."""

    matrix: np.ndarray
    middle: np.ndarray
    shift: np.ndarray

    def to_patient(self, points: np.ndarray) -> np.ndarray:
        """MNI points [N, 3] -> patient points [N, 3]."""
        return self.middle + self.shift + (points - self.middle) @ self.matrix.T

    @property
    def to_mni(self) -> np.ndarray:
        affine = np.eye(4)
        affine[:3, :3] = np.linalg.inv(self.matrix)
        affine[:3, 3] = self.middle - affine[:3, :3] @ (self.middle + self.shift)
        return affine


def _draw_pose(rng: np.random.Generator, middle: np.ndarray) -> _Pose:
    """Head size, slight shear, rotation of a few degrees and a shift of up to 12 mm."""
    stretch = np.diag(rng.uniform(0.93, 1.07) * rng.uniform(0.97, 1.03, 3))
    shear = np.eye(3)
    shear[np.triu_indices(3, 1)] = rng.normal(0, 0.02, 3)
    return _Pose(_rotation(rng.normal(0, [4.0, 3.0, 4.0])) @ shear @ stretch, middle, rng.uniform(-12, 12, 3))


def _column(vector: Sequence[float] | np.ndarray) -> np.ndarray:
    """Three numbers as float32 [3, 1, 1, 1], to meet [3, X, Y, Z]."""
    return np.asarray(vector, np.float32).reshape(3, 1, 1, 1)


def _apply(affine: np.ndarray, points: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """`affine` [4, 4] on three broadcastable coordinate arrays -> float32 [3, X, Y, Z]."""
    matrix = affine.astype(np.float32)
    rows = [row[0] * points[0] + row[1] * points[1] + row[2] * points[2] + row[3] for row in matrix[:3]]
    return np.stack(rows)


def _grid(
    rng: np.random.Generator,
    template: _Template,
    pose: _Pose,
    spacing: float,
    size: tuple[int, int, int] | None,
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """A slightly oblique scanner grid around the posed brain: affine (RAS order) and shape."""
    voxel = spacing * rng.uniform(0.9, 1.1) * np.ones(3)
    if rng.random() < 1 / 3:
        voxel *= rng.permutation([0.95, 0.95, 1.2])
    tilt = _rotation(rng.uniform(-6, 6, 3))
    margin = rng.uniform(6, 14, 3)
    posed = pose.to_patient(template.surface) @ tilt
    low, high = posed.min(0) - margin, posed.max(0) + margin
    if size is None:
        shape = np.ceil((high - low) / voxel).astype(int)
    else:
        shape = np.asarray(size)
    affine = np.eye(4)
    affine[:3, :3] = tilt * voxel
    affine[:3, 3] = tilt @ ((low + high) / 2 - voxel * (shape - 1) / 2)
    return affine, (int(shape[0]), int(shape[1]), int(shape[2]))


def _reorient(
    rng: np.random.Generator, image: np.ndarray, label: np.ndarray, affine: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Permutes and flips the voxel axes at random; the affine follows, so the world stays where it is."""
    order = [int(axis) for axis in rng.permutation(3)]
    flips = rng.random(3) < 0.5
    move = np.zeros((4, 4))  # new voxel index -> old voxel index
    move[3, 3] = 1
    for new, old in enumerate(order):
        n = label.shape[old]
        move[old, new] = -1 if flips[new] else 1
        move[old, 3] = n - 1 if flips[new] else 0
    cut = tuple(slice(None, None, -1) if flip else slice(None) for flip in flips)
    return image.transpose(*order, 3)[cut], label.transpose(order)[cut], affine @ move


def smooth_noise(rng: np.random.Generator, shape: Sequence[int], step: np.ndarray, channels: int) -> np.ndarray:
    """Random cubic B-spline surfaces of unit variance, float32 [channels, X, Y, Z]; `step` voxels between knots.

    Coefficients are cut at 2.5 standard deviations: a displacement whose coefficients stay below 0.48 of the knot
    spacing cannot fold (Choi and Lee, Graphical Models 2000).
    """
    bases = [_spline_basis(n, float(s)) for n, s in zip(shape, step, strict=True)]
    knots = rng.standard_normal((channels, *(basis.shape[1] for basis in bases)), dtype=np.float32)
    # A sum of independent coefficients at one point has the variance (mean of the sum of squared weights) per axis.
    spread = np.float32(np.prod([np.sqrt((basis**2).sum(1).mean()) for basis in bases]))
    field = np.clip(knots, -2.5, 2.5) / spread
    field = np.einsum("xa,kabc->kxbc", bases[0], field)
    field = np.einsum("yb,kxbc->kxcy", bases[1], field)
    return np.ascontiguousarray(np.einsum("zc,kxcy->kxyz", bases[2], field))


def _spline_basis(n: int, step: float) -> np.ndarray:
    """Weights [n, knots] of the uniform cubic B-spline at positions 0..n-1, knots `step` apart."""
    position = np.arange(n) / step
    cell = position.astype(int)
    t = position - cell
    weights = [(1 - t) ** 3 / 6, (3 * t**3 - 6 * t**2 + 4) / 6, (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6, t**3 / 6]
    basis = np.zeros((n, int(cell[-1]) + 4), np.float32)
    for k, weight in enumerate(weights):
        basis[np.arange(n), cell + k] = weight
    return basis


# ---- the tumour


@dataclass(frozen=True)
class _Focus:
    """One enhancing tumour: patient mm; `shape` [3, 3] maps offsets to the unit ball's, times the radius."""

    centre: np.ndarray
    radius: float
    rim: float
    oedema: float
    push: float
    shape: np.ndarray


def _draw_foci(
    rng: np.random.Generator,
    template: _Template,
    pose: _Pose,
    site: Sequence[float] | None,
    spacing: float,
) -> list[_Focus]:
    """One tumour, at times with a smaller second one in the same brain."""
    scale = float(np.clip(spacing / 2, 1.0, 1.4))  # larger on coarse grids, where a rim is soon below one voxel
    foci: list[_Focus] = []
    for k in range(2 if site is None and rng.random() < 0.2 else 1):
        sites = template.sites if site is None else np.asarray(site, float)[None]
        world = pose.to_patient(sites)
        radius = scale * (rng.uniform(11.5, 22) if k == 0 else rng.uniform(6, 10))
        if foci:
            apart = np.linalg.norm(world - foci[0].centre, axis=1)
            world = world[(apart > foci[0].radius + radius + 12) & (apart < 80)]
            if not len(world):
                break
        axes = rng.uniform(0.8, 1.25, 3)
        axes /= np.prod(axes) ** (1 / 3)
        turn = _rotation(rng.uniform(-90, 90, 3))
        foci.append(
            _Focus(
                centre=world[rng.integers(len(world))],
                radius=radius,
                rim=float(np.clip(0.33 * radius, 3.8 * scale, 5.5 * scale)),
                oedema=scale * rng.uniform(7, 15),
                push=rng.uniform(0.25, 0.6),
                shape=turn @ np.diag(1 / axes) @ turn.T,
            )
        )
    return foci


def _mass_effect(patient: np.ndarray, foci: Sequence[_Focus], depth: np.ndarray) -> np.ndarray:
    """Displacement (mm, [3, X, Y, Z]) from where tissue was to where the tumour has pushed it.

    Radial, r - r0 = push * r / (1 + (r / R)^3): falls with the square of the distance as an incompressible medium's
    does, and r0 grows with r wherever push < 1. It fades towards the skull, which does not give way.
    """
    total = np.zeros_like(patient)
    fade = depth / (depth + 7)
    for focus in foci:
        offset = patient - _column(focus.centre)
        cube = (np.sqrt((offset**2).sum(0)) / np.float32(focus.radius)) ** 3
        total += offset * (np.float32(focus.push) * fade / (1 + cube))
    return total


def _lesion(
    rng: np.random.Generator,
    patient: np.ndarray,
    foci: Sequence[_Focus],
    white: np.ndarray,
    csf: np.ndarray,
    voxel: np.ndarray,
    spacing: float,
) -> np.ndarray:
    """Shares of oedema, core and rim in each voxel, float32 [3, X, Y, Z]."""
    shape = csf.shape
    edge = np.float32(0.22 * spacing)  # the mean over a voxel turns a sharp edge into a slope of about one voxel
    lobes, fingers, thickness = (smooth_noise(rng, shape, mm / voxel, 1)[0] for mm in (15.0, 9.0, 12.0))
    outside = np.full(shape, np.inf, np.float32)  # signed mm from the surface of the nearest focus
    rim = np.zeros(shape, np.float32)
    swollen = np.full(shape, np.inf, np.float32)
    for focus in foci:
        offset = np.einsum("ab,bxyz->axyz", focus.shape.astype(np.float32), patient - _column(focus.centre))
        reach = np.sqrt((offset**2).sum(0)) - np.float32(focus.radius) * (1 + np.float32(0.17) * lobes)
        rim = np.where(reach < outside, np.float32(focus.rim) * (1 + np.float32(0.2) * thickness), rim)
        outside = np.minimum(outside, reach)
        # White matter carries the fluid, the cortex holds it up.
        width = np.float32(focus.oedema) * (0.1 + 1.1 * white) + np.float32(1.6) * fingers
        swollen = np.minimum(swollen, reach - width)
    enhancing = _sigmoid(-outside / edge)
    core = np.minimum(_sigmoid(-(outside + np.maximum(rim, 0.5)) / edge), enhancing)
    oedema = _sigmoid(-swollen / (2 * edge)) * (1 - enhancing) * np.clip(1 - 1.3 * csf, 0, 1)
    return np.stack([oedema, core, enhancing - core])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -30, 30)))


# ---- the image


def _render(
    rng: np.random.Generator,
    parts: np.ndarray,
    detail: np.ndarray,
    caps: np.ndarray,
    depth: np.ndarray,
    voxel: np.ndarray,
    spacing: float,
) -> np.ndarray:
    """Four contrasts, float32 [X, Y, Z, 4], from the shares of the six tissues [6, X, Y, Z]."""
    from scipy import ndimage

    shape = parts.shape[1:]
    means = _MEANS + _MEAN_JITTER * rng.standard_normal(_MEANS.shape, dtype=np.float32)
    contrast = rng.uniform(0.65, 1.1, len(MODALITIES)).astype(np.float32)  # flatter or stronger around the grey
    means = np.maximum(means[:, 1:2] + (means - means[:, 1:2]) * contrast[:, None], 0.08)
    healthy = parts[1] + parts[2]
    lesion = parts[3:].sum(0)
    patchy = smooth_noise(rng, shape, 6 / voxel, 1)[0] + smooth_noise(rng, shape, 14 / voxel, 1)[0]
    patchy *= lesion * np.float32(0.7)
    mottle = smooth_noise(rng, shape, 8 / voxel, 1)[0] * np.float32(0.035)
    # Vessels and meninges take up contrast too: a bright T1c alone does not make a tumour.
    vessels = parts[0] * _sigmoid((smooth_noise(rng, shape, 9 / voxel, 1)[0] - 1.1) / 0.15) * (depth < 14)
    age = np.float32(rng.uniform(0, 0.4))  # bright caps on the ventricles, which are not oedema
    common = smooth_noise(rng, shape, 90 / voxel, 1)[0]
    image = np.empty((*shape, len(MODALITIES)), np.float32)
    for m, name in enumerate(MODALITIES):
        signal = np.zeros(shape, np.float32)
        for k in range(6):
            signal += means[m, k] * parts[k]
        signal += healthy * (np.float32(_DETAIL[m]) * detail + mottle)
        signal += np.float32(_HETEROGENEITY[m] * rng.choice((-1, 1))) * patchy
        if name == "T1c":
            signal += np.float32(0.55) * vessels
        elif name in ("FLAIR", "T2"):
            signal += (age if name == "FLAIR" else age / 2) * caps * parts[2]
        blur = np.abs(rng.normal(0, 0.35, 3)) * rng.permutation([1.0, 0.5, 0.5])
        signal = ndimage.gaussian_filter(signal, blur, truncate=3)
        signal *= np.exp(np.float32(0.13) * common + np.float32(0.09) * smooth_noise(rng, shape, 70 / voxel, 1)[0])
        noise = np.float32(rng.uniform(0.035, 0.065))
        real, imaginary = rng.standard_normal((2, *shape), dtype=np.float32) * noise
        image[..., m] = np.hypot(np.maximum(signal, 0) + real, imaginary)
    return np.maximum(image, 1e-3)


# ---- the template


def _template_paths() -> dict[str, Path]:
    """The three files inside the nilearn wheel, found without importing nilearn (1.8 s)."""
    spec = importlib.util.find_spec("nilearn")
    roots = (spec.submodule_search_locations if spec else None) or [""]
    paths = {key: Path(roots[0]) / _TEMPLATE_FILE.format(key) for key in ("t1", "gm", "wm")}
    if spec is None or not all(path.exists() for path in paths.values()):
        raise UserError(
            "the synthetic cohort needs the MNI152 template inside the package nilearn, which "
            f"{'lacks it' if spec else 'is not installed'}; pip install 'nilearn>=0.12,<0.16'"
        )
    return paths


@functools.lru_cache(maxsize=2)
def _template(spacing: float) -> _Template:
    """Reads the template and prepares it for sampling at about `spacing` mm (about 1.5 s, once in a process)."""
    import nibabel as nib
    from scipy import ndimage

    volumes = {key: nib.Nifti1Image.from_filename(path) for key, path in _template_paths().items()}
    affine = volumes["t1"].affine
    t1, gm, wm = (np.asarray(volumes[key].dataobj, np.float32) / 255 for key in ("t1", "gm", "wm"))
    mask = ndimage.binary_dilation(t1 > 0, iterations=2)  # the subarachnoid space, which the template's mask cuts off
    box = ndimage.find_objects(mask.astype(np.uint8))[0]
    pad = 3
    t1, gm, wm, mask = (np.pad(array[box], pad) for array in (t1, gm, wm, mask))
    start = affine[:3, 3] + np.array([part.start - pad for part in box])

    # The maps are means over many heads, hence blurred; weighing them with the T1 gives back one head's sharp folds.
    # CSF counts double, or the thin sulci would drown in the cortex beside them.
    prior = np.stack([2 * np.clip(1 - gm - wm, 0, 1), gm, wm]) + np.float32(0.01)
    means = np.array(_TEMPLATE_MEANS, np.float32)[:, None, None, None]
    tissue = prior * np.exp(-((t1 - means) ** 2) / np.float32(2 * 0.10**2)) + np.float32(1e-12)
    tissue /= tissue.sum(0)
    tissue[:, (t1 == 0) & mask] = np.array([1, 0, 0], np.float32)[:, None]
    tissue *= mask

    deep = ndimage.distance_transform_edt(t1 > 0).astype(np.float32)
    detail = np.clip(np.where(t1 > 0, t1 - (tissue * means).sum(0), 0), -0.15, 0.15)
    ventricles = tissue[0] * (deep > 22)
    width = 0.35 * spacing  # a voxel's mean
    tissue = np.stack([ndimage.gaussian_filter(part, width, truncate=3) for part in tissue])
    white = ndimage.gaussian_filter(tissue[2], 2.0, truncate=2.5)
    caps = np.clip(3 * ndimage.gaussian_filter(ventricles, 3.0, truncate=2.5), 0, 1)
    detail = ndimage.gaussian_filter(detail, width, truncate=3)

    outside = np.argwhere(mask & ~ndimage.binary_erosion(mask))[::11] + start
    x, _, z = np.meshgrid(*(s + np.arange(n) for s, n in zip(start, t1.shape, strict=True)), indexing="ij", sparse=True)
    allowed = (white > 0.75) & (deep > 13) & (np.abs(x) > 13) & (z > -8)  # in a hemisphere, above the brainstem
    sites = np.argwhere(allowed)[::37] + start
    return _Template(
        tissue=tissue,
        detail=detail,
        white=white,
        caps=caps,
        depth=ndimage.gaussian_filter(deep, 2.0, truncate=2),
        start=start,
        surface=outside,
        middle=(outside.min(0) + outside.max(0)) / 2,
        sites=sites,
    )


# ---- files


def _write_case(job: dict[str, Any]) -> None:
    size = job["size"]
    case = brain_case(
        job["seed"], job["number"], tumour=job["tumour"], spacing=job["spacing"], size=tuple(size) if size else None
    )
    write_brain(case, Path(job["folder"]), ("imagesTr", "labelsTr"), job["id"])


def write_brain(case: BrainCase, folder: Path, parts: tuple[str, str], name: str) -> None:
    """Writes `<image part>/<name>.nii.gz` and `<label part>/<name>.nii.gz`."""
    import nibabel as nib

    # With a slope in its header, nibabel stores the array as it is: the zero stays a zero.
    stored = case.image if case.slope is None else np.rint(case.image / np.float32(case.slope)).astype(case.dtype)
    image = nib.Nifti1Image(stored, case.affine)
    image.header.set_slope_inter(1 if case.slope is None else case.slope, 0)
    write_volume(folder / parts[0] / f"{name}.nii.gz", image, case.affine)
    write_volume(folder / parts[1] / f"{name}.nii.gz", nib.Nifti1Image(case.label, case.affine), case.affine)


def write_volume(path: Path, volume: Any, affine: np.ndarray) -> None:
    """Writes a NIfTI volume in millimetres, the same bytes whenever it is written."""
    volume.set_sform(affine, code=1)
    volume.set_qform(affine, code=1)
    # Three float32 numbers of a quaternion say little of rotations by nearly half a turn: no qform then, for what
    # differs from the sform would be read otherwise by other programs.
    if corner_distance(volume.header.get_qform(), affine, volume.shape) > 0.01:
        volume.set_qform(None, code=0)
    volume.header.set_xyzt_units("mm")
    path.write_bytes(gzip.compress(volume.to_bytes(), compresslevel=1, mtime=0))


def _write_tables(folder: Path, ids: Sequence[str], splits: Sequence[str]) -> None:
    with open(folder / "split.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("id", "split"))
        writer.writerows(zip(ids, splits, strict=True))
    content = {
        "name": "SyntheticBrainTumour",
        "description": "Synthetic brain tumours in deformed MNI152 anatomy, four MR contrasts",
        "reference": "MNI152 ICBM 2009a symmetric: Fonov et al., NeuroImage 54 (2011) 313-327",
        "licence": "generated; the template: permission to use, copy, modify and distribute, copyright McConnell Brain "
        "Imaging Centre, McGill University",
        "tensorImageSize": "4D",
        "modality": {str(k): name for k, name in enumerate(MODALITIES)},
        "labels": {str(value): name for name, value in LABELS.items()},
        "numTraining": len(ids),
        "numTest": 0,
        "training": [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in ids],
        "test": [],
    }
    (folder / "dataset.json").write_text(json.dumps(content, indent=1) + "\n")


def check_request(
    counts: Mapping[str, Any], seed: Any, workers: Any = None, spacing: Any = 1.0, size: Any = None
) -> None:
    """Raises UserError for what no cohort can be made of; the same for all generators.

    Args:
        counts: split -> cases. workers, spacing, size: of the generators that have them.
    """
    for split, count in counts.items():
        if not _whole(count, 0):
            raise UserError(f"n_{split} is {count!r}: give 0 or more cases")
    if not sum(counts.values()):
        raise UserError("n_train, n_val and n_test are all 0: ask for at least one case")
    if not _whole(seed, 0):
        raise UserError(f"seed is {seed!r}: give 0 or more")
    check_workers(workers)
    if not is_real(spacing) or not 1.0 <= spacing <= 8.0:
        raise UserError(f"spacing is {spacing!r} mm: the synthetic brains are made between 1 and 8 mm")
    if size is not None:
        three = isinstance(size, tuple | list) and len(size) == 3
        if not three or not all(_whole(n, 8) for n in size):
            raise UserError(f"size is {size!r}: give three voxel counts of at least 8, or None for the whole brain")


def check_workers(workers: Any) -> None:
    """Raises UserError unless `workers` is a number of processes, or None."""
    if workers is not None and not _whole(workers, 1):
        raise UserError(f"workers is {workers!r}: give 1 or more, or None for one a CPU")


def is_real(value: Any) -> bool:
    """Whether a value is a number, and no truth value."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= least


def _check_complete(target: Path, names: Sequence[str]) -> None:
    missing = [name for name in names if not (target / name).exists()]
    if missing:
        raise UserError(
            f"{target}: {len(missing)} files of this synthetic cohort are missing (first {missing[0]}); "
            "delete the folder to have it made again"
        )


def _remove_stale(cache: Path) -> None:
    """Removes what killed builds of any cohort left; a case takes seconds, so a day without a new one means dead."""
    for path in cache.glob(".*.tmp"):
        if not _BUILD.fullmatch(path.name):
            continue
        try:
            newest = max(folder.stat().st_mtime for folder in (path, *path.iterdir()))
        except OSError:  # another has removed it, or it is another's
            continue
        if time.time() - newest > _STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


# ---- processes


class _Progress:
    """A bar on a terminal, else a line for every eighth of the work, on standard error."""

    def __init__(self, total: int, title: str, show: bool) -> None:
        self._total, self._title, self._done = total, title, 0
        self._lines = show and not sys.stderr.isatty()
        self._bar: Any = None
        if show and not self._lines:
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=title, unit="case")

    def __enter__(self) -> _Progress:
        if self._lines:
            print(f"medjax: {self._title}: {self._total} cases to make", file=sys.stderr, flush=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.update()
        elif self._lines and (self._done * 8) // self._total > ((self._done - 1) * 8) // self._total:
            print(f"medjax: synthetic cohort {self._done}/{self._total}", file=sys.stderr, flush=True)


def _run_workers(jobs: Sequence[dict[str, Any]], n_workers: int, advance: Callable[[], None]) -> None:
    """Spreads the jobs over fresh interpreters, each fed one job at a time.

    Not `multiprocessing`: forking is unsafe once JAX has threads, and its other start methods import the caller's main
    module again (JAX with it) and fail for programs read from standard input. A worker ends when its standard input
    does, so none outlives this process by more than one case.
    """
    pending: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    for job in jobs:
        pending.put(job)
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", "from medjax.data import synthetic; synthetic._serve()"]
    lock = threading.Lock()
    failures: list[str] = []

    def feed(process: subprocess.Popen[str], errors: IO[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        while not failures:
            try:
                job = pending.get_nowait()
            except queue.Empty:
                return
            try:
                process.stdin.write(json.dumps(job) + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            with lock:
                if answer.strip() == job["id"]:
                    advance()
                    continue
                process.wait()
                errors.seek(0)
                failures.append(f"case {job['id']}, exit code {process.returncode}:\n{errors.read()[-2000:]}")

    processes: list[subprocess.Popen[str]] = []
    threads: list[threading.Thread] = []
    logs: list[IO[str]] = []
    finished = False
    try:
        for _ in range(n_workers):
            logs.append(tempfile.TemporaryFile("w+"))  # noqa: SIM115 (closed below, with all of them)
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=logs[-1], text=True, env=environment)
            processes.append(process)
            threads.append(threading.Thread(target=feed, args=(process, logs[-1]), daemon=True))
            threads[-1].start()
        for thread in threads:
            thread.join()
        finished = not failures
    finally:
        if not finished:
            for process in processes:
                process.kill()
        for thread in threads:
            thread.join()
        for process in processes:
            process.communicate()  # closes its standard input, at which it ends
        for log in logs:
            log.close()
    if failures:
        raise RuntimeError(f"a worker of the synthetic cohort failed: {failures[0]}")


def _serve() -> None:
    """Worker: one JSON job a line on standard input, the case's id on standard output when its files are written."""
    for line in sys.stdin:
        job = json.loads(line)
        _work(job)
        print(job["id"], flush=True)


def _work(job: dict[str, Any]) -> None:
    module, _, function = job.get("writer", "medjax.data.synthetic:_write_case").partition(":")
    getattr(importlib.import_module(module), function)(job)
