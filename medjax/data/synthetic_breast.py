"""Breasts in dynamic contrast-enhanced MR with a lesion of some grade: drawn, not measured.

Three images at 2 mm, before contrast, early and late after it: fat, glandular tissue that takes up contrast by itself,
vessels, chest wall and heart. Grade shows as it is said to in life, and never in one sign alone: with the grade the
outline gets spiky, the uptake uneven and stronger at the rim, and contrast washes out where a low grade still gains.
Every sign of a grade overlaps with its neighbours'. Smooth benign masses that keep gaining contrast, and cysts, are
in most breasts and not labelled; one breast in seven has no lesion, and so no grade.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medjax.data.synthetic import _sigmoid, smooth_noise
from medjax.data.synthetic_lung import _draw_tubes, _grow, _unit
from medjax.data.synthetic_manifest import manifest_cohort, scanner_affine, split_jobs, write_case

# Raise it with every change of what is generated: cohorts already in the cache are then left alone and made anew.
VERSION = 2
SHAPE = (72, 64, 56)
SPACING = 2.0
GRADES = ("1", "2", "3")

_FREE = 7  # one breast in so many has no lesion
_WASH = (1.12, 0.97, 0.82)  # late uptake over early, by grade
_SPIKES = (0.10, 0.19, 0.28)  # of the radius


class Breast(NamedTuple):
    """image float32 [X, Y, Z, 3], mask uint8 (1: lesion), affine [4, 4], and the grade, 0 where there is none."""

    image: np.ndarray
    mask: np.ndarray
    affine: np.ndarray
    grade: int


def breast_cohort(
    folder: str | os.PathLike[str] | None = None,
    *,
    n_train: int = 120,
    n_val: int = 24,
    n_test: int = 60,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Returns the manifest (id, split, image, mask, grade) of a cohort, and makes it on first use.

    Args: see `medjax.data.synthetic.brain_cohort`. Raises UserError for a parameter out of range.
    """
    counts = {"train": n_train, "val": n_val, "test": n_test}
    jobs = split_jobs("breast", "medjax.data.synthetic_breast:_write_case", counts, seed, {})
    parameters = {"version": VERSION, **counts, "seed": seed}
    return manifest_cohort(folder, "breast", parameters, jobs, workers=workers, progress=progress)


def breast_case(seed: int, number: int) -> Breast:
    """One breast. It is drawn from the chest wall (low y) forwards, and turned at the end: a scanner's y runs back."""
    from scipy import ndimage

    rng = np.random.default_rng([seed, 4, number])
    voxel = np.full(3, SPACING)
    x, y, z = np.meshgrid(
        *((np.arange(n, dtype=np.float32) + 0.5) * SPACING for n in SHAPE), indexing="ij", sparse=True
    )
    middle = np.asarray(SHAPE) * SPACING / 2
    reach, wide = rng.uniform(75, 105), rng.uniform(54, 66, 2)
    chest = 18 + 0.004 * (x - middle[0]) ** 2 + 2 * smooth_noise(rng, SHAPE, 40 / voxel, 1)[0]
    ball = ((x - middle[0]) / wide[0]) ** 2 + (np.maximum(y - 14, 0) / reach) ** 2 + ((z - middle[2]) / wide[1]) ** 2
    body = (ball < 1) | (y < chest)
    deep = ndimage.distance_transform_edt(body, sampling=voxel).astype(np.float32)
    front = np.clip((y - chest) / SPACING + 0.5, 0, 1)  # of the chest wall
    inner = np.clip((deep - 6) / 6, 0, 1) * front

    density = rng.uniform(-0.9, 0.9)
    strands = 0.7 * smooth_noise(rng, SHAPE, 22 / voxel, 1)[0] + 0.7 * smooth_noise(rng, SHAPE, 7 / voxel, 1)[0]
    gland = _sigmoid((strands + density - 2.2 * (ball - 0.35)) / 0.35) * inner
    branches: list[Any] = []
    for _ in range(int(rng.integers(3, 8))):
        start = np.array([rng.uniform(0.2, 0.8) * SHAPE[0], 14, rng.uniform(0.2, 0.8) * SHAPE[2]])
        _grow(rng, branches, start, _unit(rng), rng.uniform(0.8, 1.7), SHAPE)
    vessel = np.zeros(SHAPE, np.float32)
    _draw_tubes(vessel, branches)
    vessel *= inner

    uptake = rng.uniform(0.05, 0.55)  # of the gland: its own enhancement
    patchy = np.clip(1 + 0.5 * smooth_noise(rng, SHAPE, 14 / voxel, 1)[0], 0.1, 2.5)
    pre = 0.28 + 0.24 * gland + 0.2 * (1 - front) + 0.25 * vessel + 0.15 * (deep < 4)
    early = uptake * patchy * gland + 0.35 * (1 - front) + rng.uniform(0.9, 1.3) * vessel
    late = rng.uniform(1.1, 1.5) * uptake * patchy * gland + 0.45 * (1 - front) + rng.uniform(0.75, 1.0) * vessel
    if rng.random() < 0.5:  # the heart, behind the left breast
        blood = np.clip(9 - chest + 14 - y + 6 * smooth_noise(rng, SHAPE, 30 / voxel, 1)[0], 0, 1) * (y < chest)
        early, late = early + 1.2 * blood, late + 0.95 * blood

    allowed = np.argwhere((deep > 14) & (y > chest + 12))
    taken: list[tuple[np.ndarray, float]] = []
    for _ in range(int(rng.integers(0, 3))):  # cysts: dark, without uptake
        share, _ = _mass(rng, allowed, taken, rng.uniform(3, 8), 0.05)
        pre, early, late = pre - 0.25 * share * pre, early * (1 - share), late * (1 - share)
    for _ in range(int(rng.integers(0, 3))):  # benign masses
        share, _ = _mass(rng, allowed, taken, rng.uniform(4, 10), rng.uniform(0.04, 0.12))
        strength = rng.uniform(0.55, 1.15)
        pre += share * (0.5 - pre)
        early += share * (strength - early)
        late += share * (strength * rng.uniform(1.3, 1.65) - late)
    mask, grade = np.zeros(SHAPE, np.uint8), 0
    if number % _FREE != _FREE - 1:
        grade = int(rng.integers(1, 4))
        radius = float(np.clip(rng.normal(6.5 + 1.6 * grade, 2.5), 4, 17))
        share, rim = _mass(rng, allowed, taken, radius, _SPIKES[grade - 1] + rng.normal(0, 0.03), spiky=True)
        strength = rng.uniform(0.6, 1.2)
        uneven = 0.06 + 0.05 * grade
        texture = 1 + uneven * smooth_noise(rng, SHAPE, 6 / voxel, 1)[0] + (0.12 * grade - 0.15) * (rim - 0.5)
        wash = _WASH[grade - 1] + rng.normal(0, 0.06)
        pre += share * (0.5 - pre)
        early += share * (strength * texture - early)
        late += share * (strength * texture * wash - late)
        mask[share > 0.5] = 1
        grade = grade if mask.any() else 0  # there was no room for it

    bias = np.exp(0.08 * smooth_noise(rng, SHAPE, 70 / voxel, 1)[0]) * rng.uniform(0.93, 1.07)
    noise = rng.uniform(0.02, 0.05)
    image = np.empty((*SHAPE, 3), np.float32)
    for channel, signal in enumerate((pre, pre + np.maximum(early, 0), pre + np.maximum(late, 0))):
        signal = ndimage.gaussian_filter(signal * body, 0.4) * bias
        real, imaginary = rng.standard_normal((2, *SHAPE), dtype=np.float32) * np.float32(noise)
        image[..., channel] = np.hypot(signal + real, imaginary)
    turned = np.ascontiguousarray(image[:, ::-1]), np.ascontiguousarray(mask[:, ::-1])
    return Breast(*turned, scanner_affine((SPACING,) * 3, rng), grade)


def _mass(
    rng: np.random.Generator,
    allowed: np.ndarray,
    taken: list[tuple[np.ndarray, float]],
    radius: float,
    rough: float,
    spiky: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Share of a mass of `radius` mm in each voxel, and how near its rim, 0 to 1; none where there is no room."""
    place = None
    for _ in range(80):
        drawn = allowed[rng.integers(len(allowed))] * SPACING
        if all(np.linalg.norm(drawn - other) > radius + far + 6 for other, far in taken):
            place = drawn
            break
    if place is None:
        return np.zeros(SHAPE, np.float32), np.zeros(SHAPE, np.float32)
    taken.append((place, radius * (1 + 2 * rough)))
    stretch = rng.uniform(0.8, 1.25, 3)
    steps = (
        ((np.arange(n) * SPACING - p) / s).astype(np.float32) for n, p, s in zip(SHAPE, place, stretch, strict=True)
    )
    x, y, z = np.meshgrid(*steps, indexing="ij", sparse=True)
    distance = np.sqrt(x**2 + y**2 + z**2)
    bumps = smooth_noise(rng, SHAPE, np.full(3, max(3.0, radius / 2)) / SPACING, 1)[0]
    edge = radius * (1 + rough * bumps)
    if spiky:
        # Spicules: a few directions along which the surface reaches out.
        for _ in range(round(40 * max(rough - 0.05, 0))):
            a, b, c = _unit(rng)
            along = (x * a + y * b + z * c) / np.maximum(distance, 1e-3)
            edge = edge + radius * 2.2 * rough * _sigmoid((along - 0.93) / 0.015)
    share = np.clip((edge - distance) / SPACING + 0.5, 0, 1)
    return share, np.clip(1 - (edge - distance) / (0.5 * radius), 0, 1)


def _write_case(job: dict[str, Any]) -> None:
    case = breast_case(job["seed"], job["number"])
    counts = np.rint(case.image * 1000).astype(np.int16)
    write_case(job, counts, case.mask, case.affine, {"grade": str(case.grade) if case.grade else ""})
