"""Brains with small-vessel disease, and whether a stroke followed: a cohort for risk and suspicious tissue at once.

The brains of `medjax.data.synthetic` without tumours get white-matter lesions (around the ventricles and scattered
deep ones), lacunes (small cavities with a rim) and atrophy. Bright caps on the ventricles and widened spaces around
vessels, which every age has, look alike and are not labelled.

The risk is a formula of this file, not of medicine: its logit grows with the volume of the lesions, with the share of
them in the corona radiata, with the lacunes and with atrophy. Whether a stroke followed is drawn from it, so not even
the risk itself tells for sure: the manifest has both.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medjax.data.synthetic import (
    LABELS,
    Anatomy,
    BrainCase,
    _sigmoid,
    _template_paths,
    check_request,
    make_brain,
    smooth_noise,
    write_brain,
)
from medjax.data.synthetic_manifest import manifest_cohort, split_jobs, write_row

# Raise it with every change of what is generated: cohorts already in the cache are then left alone and made anew.
VERSION = 1

_STRATEGIC = ((-25.0, -8.0, 22.0), (25.0, -8.0, 22.0))  # corona radiata, MNI mm
_STRATEGIC_RADIUS = 20.0
_TISSUE = LABELS["oedema"] - 1  # its place in `Anatomy.parts`; white-matter lesions look like oedema


def stroke_cohort(
    folder: str | os.PathLike[str] | None = None,
    *,
    n_train: int = 160,
    n_val: int = 30,
    n_test: int = 60,
    seed: int = 0,
    spacing: float = 3.0,
    size: tuple[int, int, int] | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Returns the manifest of a cohort, and makes it on first use.

    Beside `manifest.csv` (id, split, image, mask, stroke, risk, lesion_ml, strategic, lacunes, atrophy) lie `images/`
    ([X, Y, Z, 4]: T1, T1c, T2, FLAIR) and `masks/` (1: suspicious tissue).

    Args:
        folder: where cohorts are kept, see `medjax.data.synthetic.brain_cohort`, as for the other arguments.
        n_train, n_val, n_test: cases in each split.

    Raises:
        UserError: a parameter is out of range, or what `brain_cohort` raises.
    """
    counts = {"train": n_train, "val": n_val, "test": n_test}
    check_request(counts, seed, workers, spacing, size)
    options = {"spacing": float(spacing), "size": size and list(size)}
    jobs = split_jobs("stroke", "medjax.data.synthetic_stroke:_write_case", counts, seed, options)
    parameters = {"version": VERSION, **counts, "seed": seed, **options}
    return manifest_cohort(
        folder, "stroke", parameters, jobs, workers=workers, progress=progress, before=_template_paths
    )


def stroke_case(
    seed: int, number: int, *, spacing: float = 3.0, size: tuple[int, int, int] | None = None
) -> tuple[BrainCase, dict[str, float]]:
    """One case (its label 4 is suspicious tissue) and its row: risk, stroke, and what the risk comes from."""
    rng = np.random.default_rng([seed, 2, number])
    load, atrophy = rng.beta(1.2, 1.6), rng.random()
    lacunes = int(rng.poisson(1.2 * load + 0.2))
    deep = rng.normal(0, 0.5)
    counted = {"strategic": 0.0}

    def change(anatomy: Anatomy) -> np.ndarray:
        mask, counted["strategic"] = _lesions(rng, anatomy, load, deep, lacunes)
        return mask

    case = make_brain(rng, spacing, size, atrophy=atrophy, change=change)
    voxel_ml = abs(float(np.linalg.det(case.affine[:3, :3]))) / 1000
    volume = np.count_nonzero(case.label == LABELS["oedema"]) * voxel_ml
    row = {"lesion_ml": volume, **counted, "lacunes": lacunes, "atrophy": atrophy}
    risk = 1 / (1 + math.exp(-_logit(**row)))
    return case, {"stroke": int(rng.random() < risk), "risk": risk, **row}


def _logit(lesion_ml: float, strategic: float, lacunes: float, atrophy: float) -> float:
    return -9.3 + 2.0 * math.log1p(lesion_ml) + 6.0 * strategic + 0.7 * min(lacunes, 3) + 2.4 * atrophy


def _lesions(
    rng: np.random.Generator, anatomy: Anatomy, load: float, deep: float, lacunes: int
) -> tuple[np.ndarray, float]:
    """Puts lesions into the tissues; returns their mask and the share of their volume in the corona radiata."""
    parts, shape = anatomy.parts, anatomy.white.shape
    near = np.zeros(shape, np.float32)
    for centre in _STRATEGIC:
        offset = anatomy.mni - np.asarray(centre, np.float32).reshape(3, 1, 1, 1)
        near = np.maximum(near, np.exp(-(offset**2).sum(0) / np.float32(2 * 14.0**2)))
    coarse, fine = (smooth_noise(rng, shape, mm / anatomy.voxel, 1)[0] for mm in (16.0, 8.0))
    height = np.float32(2.6 * load) + 0.5 * coarse + np.float32(deep) * near
    around = _sigmoid((height + 2.4 * anatomy.caps - 2.6) / 0.2)
    scattered = _sigmoid((0.6 * height + 1.2 * fine - 2.7) / 0.2)
    white = np.clip(1.6 * anatomy.white - 0.45, 0, 1)
    share = np.maximum(around, scattered) * white * (1 - parts[0])
    cavities = np.zeros(shape, np.float32)
    for place in _places(rng, anatomy.white > 0.6, lacunes):
        distance = _distance(anatomy.voxel, shape, place)
        radius = rng.uniform(2.5, 4.5)
        share = np.maximum(share, np.clip((radius + 2.0 - distance) / 1.5 + 0.5, 0, 1))
        cavities = np.maximum(cavities, np.clip((radius - distance) / 1.5 + 0.5, 0, 1))
    mask = share > 0.5
    parts *= 1 - share
    parts[_TISSUE] += share
    parts *= 1 - cavities
    parts[0] += cavities
    # Spaces around vessels: cavities without a rim, in everybody.
    for place in _places(rng, anatomy.white > 0.5, int(rng.integers(2, 9))):
        hole = np.clip((rng.uniform(1.5, 3.0) - _distance(anatomy.voxel, shape, place)) / 1.5 + 0.5, 0, 1) * ~mask
        parts *= 1 - hole
        parts[0] += hole
    inside = np.sqrt(-2 * 14.0**2 * np.log(np.maximum(near, 1e-9))) < _STRATEGIC_RADIUS
    return mask, int(np.count_nonzero(mask & inside)) / max(int(np.count_nonzero(mask)), 1)


def _places(rng: np.random.Generator, allowed: np.ndarray, count: int) -> np.ndarray:
    where = np.argwhere(allowed)
    return where[rng.integers(0, len(where), count)] if len(where) else where[:0]


def _distance(voxel: np.ndarray, shape: Sequence[int], place: np.ndarray) -> np.ndarray:
    """Distance in mm of each voxel from one, float32 [X, Y, Z]."""
    steps = [(np.arange(n) - p) * mm for n, p, mm in zip(shape, place, voxel, strict=True)]
    x, y, z = np.meshgrid(*steps, indexing="ij", sparse=True)
    return np.sqrt(x**2 + y**2 + z**2).astype(np.float32)


def _write_case(job: dict[str, Any]) -> None:
    size = job["size"]
    case, row = stroke_case(job["seed"], job["number"], spacing=job["spacing"], size=tuple(size) if size else None)
    mask = (case.label == LABELS["oedema"]).astype(np.uint8)
    write_brain(replace(case, label=mask), Path(job["folder"]), ("images", "masks"), job["id"])
    write_row(job, row)
