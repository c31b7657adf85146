"""Pieces of air-filled colon in CT with polyps and tumours on the wall: drawn, not measured.

A winding tube at 1.5 mm with haustral folds, a wall, fat around it, often a pool of tagged (bright) fluid. Polyps are
sessile, pedunculated or flat; tumours are large, lobed and narrow the lumen. All are soft tissue as the wall and the
folds are, and so is the stool that lies about: by intensity nothing is found. Stool is ragged and holds bubbles; folds
run around the lumen.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medjax.data.synthetic import smooth_noise
from medjax.data.synthetic_lung import _turn
from medjax.data.synthetic_manifest import finding, manifest_cohort, scanner_affine, split_jobs, write_case

# Raise it with every change of what is generated: cohorts already in the cache are then left alone and made anew.
VERSION = 1
SHAPE = (80, 64, 64)
SPACING = 1.5
LABELS = ("polyp", "tumour")
SHAPES = ("sessile", "pedunculated", "flat")

_AIR, _FAT, _TISSUE, _TAGGED = -960.0, -95.0, 35.0, 420.0


class Lesion(NamedTuple):
    """label 1 polyp or 2 tumour; morphology one of `SHAPES` ('' of a tumour); centre (voxels) and full extents (mm)."""

    label: int
    morphology: str
    center: tuple[float, ...]
    size: tuple[float, ...]


class Colon(NamedTuple):
    """image int16 [X, Y, Z] in HU, mask uint8 (0, or the label), affine [4, 4], and the lesions."""

    image: np.ndarray
    mask: np.ndarray
    affine: np.ndarray
    lesions: tuple[Lesion, ...]


def colon_cohort(
    folder: str | os.PathLike[str] | None = None,
    *,
    n_train: int = 120,
    n_val: int = 16,
    n_test: int = 40,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Returns the manifest (id, split, image, mask, lesions) of a cohort, and makes it on first use.

    The column `lesions` lists them as JSON: centre and size in world mm, label 1 (polyp) or 2 (tumour); of polyps
    `pedunculated` and `flat`, 0 or 1 (both 0: sessile).

    Args: see `medjax.data.synthetic.brain_cohort`. Raises UserError for a parameter out of range.
    """
    counts = {"train": n_train, "val": n_val, "test": n_test}
    jobs = split_jobs("colon", "medjax.data.synthetic_colon:_write_case", counts, seed, {})
    parameters = {"version": VERSION, **counts, "seed": seed}
    return manifest_cohort(folder, "colon", parameters, jobs, workers=workers, progress=progress)


class _Tube(NamedTuple):
    """The lumen: centre line [X, 2] and mean radius in mm, signed distance from its wall in mm (negative inside)."""

    centre: np.ndarray
    radius: float
    wall: np.ndarray


def colon_case(seed: int, number: int) -> Colon:
    """One piece of colon."""
    from scipy import ndimage

    rng = np.random.default_rng([seed, 5, number])
    tube = _tube(rng)
    lumen = np.clip(0.5 - tube.wall / SPACING, 0, 1)
    air = lumen.copy()

    numbers = np.zeros(SHAPE, np.uint8)
    drawn: list[tuple[int, str]] = []
    places: list[np.ndarray] = []
    for _ in range(int(rng.choice((0, 1, 2, 3), p=(0.15, 0.35, 0.3, 0.2)))):
        label = 2 if rng.random() < 0.25 else 1
        kind = "" if label == 2 else SHAPES[int(rng.integers(3))]
        if (spot := _spot(rng, tube, places, 26.0 if label == 2 else 16.0)) is None:
            continue
        share = _lesion(rng, *spot, kind, label)
        own = (share > 0.5) & (tube.wall < 0.5 * SPACING)
        if own.sum() < 12:
            continue
        drawn.append((label, kind))
        numbers[own] = len(drawn)
        air = np.minimum(air, 1 - share)
    for _ in range(int(rng.integers(0, 5))):
        if (spot := _spot(rng, tube, places, 14.0)) is not None:
            air = np.minimum(air, 1 - _stool(rng, *spot))

    outside = np.clip((tube.wall - rng.uniform(1.8, 3.5)) / SPACING + 0.5, 0, 1)
    organ = np.clip(smooth_noise(rng, SHAPE, np.full(3, 14.0), 1)[0] - 0.9, 0, 0.15) / 0.15  # other gut nearby
    around = np.float32(_FAT) + organ * np.float32(_TISSUE - _FAT)
    image = np.float32(_TISSUE) + 12 * smooth_noise(rng, SHAPE, np.full(3, 5.0), 1)[0]
    image += outside * (around - image)
    filling = np.full(SHAPE, _AIR, np.float32)
    if rng.random() < 0.6:  # a pool on the low side
        height = np.arange(SHAPE[1])[None, :, None] * SPACING
        level = tube.centre[:, 0].mean() - tube.radius * rng.uniform(0.2, 0.8)
        pool = np.clip((level - height) / SPACING + 0.5, 0, 1) * np.ones(SHAPE, np.float32)
        filling += pool * np.float32(_TAGGED * rng.uniform(0.7, 1.3) - _AIR)
    image += air * (filling - image)
    image = ndimage.gaussian_filter(image, rng.uniform(0.4, 0.7))
    grain = ndimage.gaussian_filter(rng.standard_normal(SHAPE, dtype=np.float32), 0.6)
    image += grain * np.float32(rng.uniform(60, 160))

    counts = np.clip(np.rint(image), -1024, 3000).astype(np.int16)
    counts, numbers = _turn(rng, counts, numbers)
    lesions = []
    mask = np.zeros(counts.shape, np.uint8)
    for number_, (label, kind) in enumerate(drawn, 1):
        where = np.argwhere(numbers == number_)
        if len(where) < 8:  # a later one lies over it
            continue
        mask[numbers == number_] = label
        size = (where.max(0) - where.min(0) + 1) * SPACING
        lesions.append(Lesion(label, kind, tuple(map(float, where.mean(0))), tuple(map(float, size))))
    return Colon(counts, mask, scanner_affine((SPACING,) * 3, rng), tuple(lesions))


def _tube(rng: np.random.Generator) -> _Tube:
    along = np.arange(SHAPE[0]) * SPACING
    middle = np.asarray(SHAPE[1:]) * SPACING / 2
    phase, period = rng.uniform(0, 2 * np.pi, 2), rng.uniform(110, 220, 2)
    sway = rng.uniform(3, 10, 2) * np.sin(2 * np.pi * along[:, None] / period + phase)
    centre = middle + sway + rng.uniform(-4, 4, 2)
    radius = rng.uniform(17, 26)
    y, z = (np.arange(n, dtype=np.float32) * SPACING for n in SHAPE[1:])
    dy = y[None, :, None] - centre[:, 0, None, None].astype(np.float32)
    dz = z[None, None, :] - centre[:, 1, None, None].astype(np.float32)
    distance = np.sqrt(dy**2 + dz**2)
    angle = np.arctan2(dz, dy)
    haustra = rng.uniform(22, 36)
    edge = radius * (1 + 0.10 * np.cos(2 * np.pi * along / haustra))[:, None, None].astype(np.float32)
    edge = edge * (1 + 0.06 * smooth_noise(rng, SHAPE, np.full(3, 14.0), 1)[0])
    wall = distance - edge
    start = rng.uniform(0, haustra)
    for at in np.arange(start - haustra, along[-1] + haustra, haustra) + haustra / 2:
        # A fold: a crescent that stands into the lumen over a part of its circumference, slightly askew.
        turn, half = rng.uniform(-np.pi, np.pi), rng.uniform(0.9, 1.5)
        away = np.abs(np.angle(np.exp(1j * (angle - turn)))).astype(np.float32)
        height = rng.uniform(4, 10) * np.clip(1 - (away / half) ** 2, 0, 1)
        lean = rng.uniform(-0.25, 0.25)
        thick = rng.uniform(1.2, 2.2)
        plate = np.abs(along[:, None, None] - at - lean * dy) - thick
        fold = np.maximum(plate, edge - height - distance)  # negative within the fold
        wall = np.maximum(wall, -fold)
    return _Tube(centre, float(radius), np.asarray(wall, np.float32))


def _spot(
    rng: np.random.Generator, tube: _Tube, places: list[np.ndarray], apart: float
) -> tuple[np.ndarray, np.ndarray] | None:
    """A place on the wall (mm) away from the others, and the direction into the lumen; None without room."""
    from scipy import ndimage

    for _ in range(60):
        i = int(rng.integers(9, SHAPE[0] - 9))
        turn = rng.uniform(-np.pi, np.pi)
        direction = np.array([0.0, np.cos(turn), np.sin(turn)])
        reach = np.arange(0, 2 * tube.radius, 0.5)
        line = np.array([i * SPACING, *tube.centre[i]])[:, None] + direction[:, None] * reach
        values = ndimage.map_coordinates(tube.wall, line / SPACING, order=1, mode="nearest")
        hit = np.argmax(values > 0)
        if not hit or values[0] > 0:
            continue
        place = line[:, hit]
        room = (place > 8).all() and (place < np.asarray(SHAPE) * SPACING - 8).all()
        if room and all(np.linalg.norm(place - other) > apart for other in places):
            places.append(place)
            return place, -direction
    return None


def _offsets(place: np.ndarray) -> np.ndarray:
    """Steps in mm from a place to every voxel, float32 [3, X, Y, Z]."""
    steps = (np.arange(n, dtype=np.float32) * SPACING - np.float32(p) for n, p in zip(SHAPE, place, strict=True))
    return np.stack(np.meshgrid(*steps, indexing="ij"))


def _solid(distance: np.ndarray) -> np.ndarray:
    return np.clip(0.5 - distance / SPACING, 0, 1)


def _lesion(rng: np.random.Generator, place: np.ndarray, inward: np.ndarray, kind: str, label: int) -> np.ndarray:
    """Share of a lesion in each voxel, float32 [X, Y, Z]."""
    offset = _offsets(place)
    height = np.einsum("a,axyz->xyz", inward.astype(np.float32), offset)
    side = np.sqrt(np.maximum((offset**2).sum(0) - height**2, 0))
    bumps = smooth_noise(rng, SHAPE, np.full(3, 4.0), 1)[0]
    if label == 2:
        radius = rng.uniform(9, 15)
        return _solid(np.sqrt(side**2 + (1.25 * height) ** 2) - radius * (1 + 0.16 * bumps))
    if kind == "flat":
        wide, high = rng.uniform(5, 9), rng.uniform(1.8, 2.8)
        return _solid(high * (np.sqrt((side / wide) ** 2 + (height / high) ** 2) - 1 - 0.06 * bumps))
    radius = rng.uniform(3, 6.5)
    if kind == "sessile":
        return _solid(np.sqrt(side**2 + (height - 0.35 * radius) ** 2) - radius * (1 + 0.08 * bumps))
    stalk, width = radius + rng.uniform(3, 7), rng.uniform(1.4, 2.2)
    head = np.sqrt(side**2 + (height - stalk) ** 2) - 0.9 * radius * (1 + 0.08 * bumps)
    neck = np.maximum(side - width, np.abs(height - stalk / 2) - stalk / 2)
    return _solid(np.minimum(head, neck))


def _stool(rng: np.random.Generator, place: np.ndarray, inward: np.ndarray) -> np.ndarray:
    """Share of untagged stool: ragged, with bubbles."""
    offset = _offsets(place + rng.uniform(0.3, 1.0) * 4 * inward)
    radius = rng.uniform(3, 9)
    ragged = smooth_noise(rng, SHAPE, np.full(3, 2.2), 1)[0]
    bubbles = np.clip((smooth_noise(rng, SHAPE, np.full(3, 1.6), 1)[0] - 0.7) / 0.4, 0, 1)
    return _solid(np.sqrt((offset**2).sum(0)) - radius * (1 + 0.28 * ragged)) * (1 - 0.9 * bubbles)


def _write_case(job: dict[str, Any]) -> None:
    case = colon_case(job["seed"], job["number"])
    listed = []
    for one in case.lesions:
        polyp = {"pedunculated": int(one.morphology == "pedunculated"), "flat": int(one.morphology == "flat")}
        known = polyp if one.label == 1 else {}
        listed.append(finding(one.center, one.size, case.affine, known, label=one.label))
    write_case(job, case.image, case.mask, case.affine, {"lesions": listed})
