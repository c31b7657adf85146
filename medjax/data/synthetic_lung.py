"""CT-like canvases of lung with real nodules at random places: a cohort to learn to find, outline and judge them on.

The nodules are read where they lie, from a folder of crops around one nodule each (`images/NAME.nii.gz`,
`masks/NAME.nii.gz`, `attributes.csv` with radiologists' ratings); LIDC-IDRI: Armato et al., Medical Physics 38 (2011)
915-931. A canvas is drawn: air, vessel trees, airways, fissures, a chest wall with ribs. Tissue of the crops is
blended into it:

* nodules, with a part of their own surroundings (at a random place within it, for in the crops they lie dead centre)
  or alone;
* as distractors, parts of crops whose nodule is left out, and balls of vessels and lung; blended in the same way, so
  that neither real texture nor the trace of a blend tells where a nodule is.

Nodules are divided by a hash of their name. The tissue on a canvas, distractors included, comes from the nodules of
its split alone.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medjax.data.synthetic import is_real, smooth_noise
from medjax.data.synthetic_manifest import finding, manifest_cohort, scanner_affine, split_jobs, write_case
from medjax.errors import UserError

# Raise it with every change of what is generated: cohorts already in the cache are then left alone and made anew.
VERSION = 1
RATINGS = ("malignancy", "texture", "spiculation", "lobulation", "sphericity", "margin", "subtlety")

_SOFT, _BONE, _TOP = 2650.0, 3600.0, 4095.0  # muscle, ribs, and the largest value of the crops
_DENSE = 1750.0  # half-way between lung and soft tissue
_CLEAR = 3  # voxels that stay free around a nodule


@dataclass(frozen=True)
class Nodule:
    """A crop around a nodule: image float32 and mask bool, [X, Y, Z] at 1 mm, and its ratings (1 to 5)."""

    name: str
    image: np.ndarray
    mask: np.ndarray
    ratings: Mapping[str, float]


@dataclass(frozen=True)
class Placed:
    """A nodule on a canvas: centre of mass and full extents in voxels."""

    name: str
    center: tuple[float, float, float]
    size: tuple[float, float, float]
    ratings: Mapping[str, float]


@dataclass(frozen=True)
class Canvas:
    """image int16 and label uint8 (1: nodule), [X, Y, Z] at 1 mm; affine [4, 4], voxel index -> world mm, RAS+."""

    image: np.ndarray
    label: np.ndarray
    affine: np.ndarray
    nodules: tuple[Placed, ...]


def lung_cohort(
    folder: str | os.PathLike[str] | None = None,
    *,
    data: str | os.PathLike[str] = "",
    n_train: int = 150,
    n_val: int = 16,
    n_test: int = 30,
    held_out: int = 0,
    share: float = 0.1,
    seed: int = 0,
    size: int = 96,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Returns the manifest of a cohort of lung canvases, and makes it on first use.

    Beside `manifest.csv` (id, split, image, mask, nodules, names) lie `images/` and `masks/`. The column `nodules`
    lists the nodules of a canvas as JSON: centre and size in world mm; `malignant` 1 (malignancy above 3) or 0
    (below; without the key at 3, which says nothing); every rating under its own name.

    Args:
        folder: where cohorts are kept, see `medjax.data.synthetic.brain_cohort`.
        data: folder of the crops; empty: `lung_nodules` in the folder that the environment variable MEDJAX_DATA names,
            or else in ../shared/data.
        n_train, n_val, n_test: canvases. Every nodule of a split is placed about as often as another; of the canvases
            one in ten has no nodule.
        held_out: the quarter of the nodules, 0 to 3 by a hash of their names, that only the test canvases show.
        share: of the other nodules goes to the validation canvases, by the same hash.
        seed: of all that is random but the division.
        size: voxels of a canvas along each axis.
        workers, progress: see `medjax.data.synthetic.brain_cohort`.

    Raises:
        UserError: no crops at `data`, crops without ratings or masks, a parameter out of range.
    """
    if not isinstance(data, str | os.PathLike):
        raise UserError(f"data is {data!r}: give the folder of the crops")
    root = Path(data or Path(os.environ.get("MEDJAX_DATA", "../shared/data")) / "lung_nodules").expanduser().resolve()
    if held_out not in range(4):
        raise UserError(f"held_out is {held_out}: the nodules are divided into quarters, 0 to 3")
    if not is_real(share) or not 0 <= share < 1:
        raise UserError(f"share is {share}: the validation split takes 0 to 1 (less than all) of what is not held out")
    if not isinstance(size, int) or size < 64:
        raise UserError(f"size is {size}: a canvas needs 64 voxels or more, for nodules of up to 40 mm")
    counts = {"train": n_train, "val": n_val, "test": n_test}
    options = {"data": str(root), "size": size}
    jobs = split_jobs("lung", "medjax.data.synthetic_lung:_write_case", counts, seed, options)
    ratings = read_ratings(root)
    divided = divide(list(ratings), held_out, share if n_val else 0.0)
    for number, (split, count) in enumerate(counts.items()):
        if count and not divided[split]:
            raise UserError(f"{root}: none of its {len(ratings)} nodules falls into the split {split!r}; give more")
        hands = _deal(divided[split], count, np.random.default_rng([seed, 3, number]))
        for job, hand in zip((job for job in jobs if job["split"] == split), hands, strict=True):
            job |= {"nodules": hand, "others": divided[split]}
    stamp = hashlib.sha256((root / "attributes.csv").read_bytes()).hexdigest()[:10]
    parameters = {"version": VERSION, **counts, **options, "ratings": stamp, "held_out": held_out, "share": share}
    parameters["seed"] = seed
    return manifest_cohort(folder, "lung", parameters, jobs, workers=workers, progress=progress)


def read_ratings(root: Path) -> dict[str, dict[str, float]]:
    """Name of each nodule -> its ratings, in the order of `attributes.csv`."""
    table = root / "attributes.csv"
    try:
        rows = list(csv.DictReader(table.read_text().splitlines()))
    except OSError as error:
        raise UserError(
            f"{table}: cannot be read ({error.strerror}). The canvases need the crops of real nodules: set MEDJAX_DATA "
            "to the folder that holds lung_nodules/, or data.options.data to that folder itself."
        ) from None
    for row in rows[:1] or [{}]:
        if lacking := [c for c in ("name", *RATINGS) if c not in row]:
            raise UserError(f"{table}: no column {lacking[0]!r}; it needs name, {', '.join(RATINGS)}")
    found = {}
    for number, row in enumerate(rows, 2):
        try:
            found[row["name"]] = {key: float(row[key]) for key in RATINGS}
        except (TypeError, ValueError):
            raise UserError(f"{table}: line {number}: a rating of {row['name']!r} is no number") from None
    return found


def divide(names: Sequence[str], held_out: int, share: float) -> dict[str, list[str]]:
    """Split -> names: quarter `held_out` of the names in the order of their SHA-256, then `share` of the others."""
    ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    test = ranked[len(ranked) * held_out // 4 : len(ranked) * (held_out + 1) // 4]
    rest = [name for name in ranked if name not in test]
    n_val = math.ceil(share * len(rest))
    return {"train": rest[n_val:], "val": rest[:n_val], "test": test}


def _deal(names: Sequence[str], count: int, rng: np.random.Generator) -> list[list[str]]:
    """One to three nodules for each of `count` canvases, none for every tenth; all nodules about equally often."""
    stack: list[str] = []
    dealt = []
    for number in range(count):
        wanted = 0 if number % 10 == 9 else int(rng.choice((1, 2, 3), p=(0.4, 0.4, 0.2)))
        hand: list[str] = []
        while len(hand) < min(wanted, len(names)):
            if not stack:
                stack = [names[i] for i in rng.permutation(len(names))]
            place = next((i for i, name in enumerate(stack) if name not in hand), None)
            if place is None:
                stack += [names[i] for i in rng.permutation(len(names))]
                continue
            hand.append(stack.pop(place))
        dealt.append(hand)
    return dealt


@functools.lru_cache(maxsize=256)
def _read(root: str, name: str) -> Nodule:
    import nibabel as nib

    parts = {}
    for part in ("images", "masks"):
        path = Path(root) / part / f"{name}.nii.gz"
        if not path.exists():
            raise UserError(f"{path}: no such file, though attributes.csv lists {name!r}")
        parts[part] = np.asarray(nib.Nifti1Image.from_filename(path).dataobj)
    mask = parts["masks"] > 0
    if mask.shape != parts["images"].shape or not mask.any():
        raise UserError(f"{root}: the mask of {name!r} is empty, or has another shape than its image")
    return Nodule(name, parts["images"].astype(np.float32), mask, {})


# ---- the canvas


def lung_canvas(nodules: Sequence[Nodule], others: Sequence[Nodule], rng: np.random.Generator, size: int) -> Canvas:
    """One canvas.

    Args:
        nodules: those to place. others: crops whose tissue may distract; their own nodules are left out.
        size: voxels along each axis.
    """
    shape = (size,) * 3
    level = rng.uniform(780, 1080)
    image = _background(rng, shape, level)
    nodules, others = ([_levelled(one, level) for one in crops] for crops in (nodules, others))
    scale = (size / 96) ** 3
    for _ in range(round(scale * rng.integers(4, 9))):
        _paste_tissue(image, others[rng.integers(len(others))], rng)
    for _ in range(round(scale * rng.integers(2, 6))):
        _paste_ball(image, others[rng.integers(len(others))], rng)
    label = np.zeros(shape, np.uint8)
    taken = np.zeros(shape, bool)
    placed = []
    # The largest first: it finds room with more difficulty.
    for nodule in sorted(nodules, key=lambda n: -int(n.mask.sum())):
        if found := _paste_nodule(image, label, taken, nodule, rng):
            placed.append(found)
    # One noise over all that was put together.
    grain = rng.standard_normal(shape, dtype=np.float32) * np.float32(rng.uniform(5, 45))
    image = np.clip(np.rint(image + grain), 0, _TOP).astype(np.int16)
    return Canvas(image, label, scanner_affine((1.0, 1.0, 1.0), rng), tuple(placed))


def _levelled(nodule: Nodule, level: float) -> Nodule:
    """The nodule with the lung of its crop at about `level`, and solid tissue as it was."""
    lung = nodule.image[nodule.image < _DENSE]
    own = float(np.median(lung)) if len(lung) else level
    share = np.clip((_SOFT - nodule.image) / (_SOFT - own), 0, 1.2)
    return replace(nodule, image=nodule.image + share * np.float32(level - own))


def _background(rng: np.random.Generator, shape: tuple[int, ...], level: float) -> np.ndarray:
    """Lung of the intensity `level`, its vessels, airways and fissures, and often a chest wall; float32."""
    from scipy import ndimage

    one = np.ones(3)
    image = np.full(shape, level, np.float32)
    image += smooth_noise(rng, shape, 24 * one, 1)[0] * np.float32(rng.uniform(20, 70))
    solid = np.zeros(shape, np.float32)  # share of soft tissue
    for _ in range(int(rng.integers(0, 3))):
        solid = np.maximum(solid, np.float32(rng.uniform(0.1, 0.25)) * _sheet(rng, shape))
    branches: list[tuple[np.ndarray, np.ndarray, float, float]] = []
    for _ in range(int(rng.integers(5, 12))):
        _grow(rng, branches, _edge_point(rng, shape), _unit(rng), rng.uniform(1.2, 3.6), shape)
    _draw_tubes(solid, branches)
    image += solid * (np.float32(rng.uniform(2300, 2900)) - image)
    for _ in range(int(rng.integers(0, 2))):
        airway: list[tuple[np.ndarray, np.ndarray, float, float]] = []
        _grow(rng, airway, _edge_point(rng, shape), _unit(rng), rng.uniform(2.5, 4.5), shape)
        wall, lumen = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        _draw_tubes(wall, [(a, b, r + 1.2, s + 1.2) for a, b, r, s in airway])
        _draw_tubes(lumen, airway)
        image += wall * (np.float32(rng.uniform(1700, 2400)) - image)
        image += lumen * (np.float32(rng.uniform(300, 600)) - image)
    if rng.random() < 0.65:
        _wall(rng, image)
    grain = rng.standard_normal(shape, dtype=np.float32)
    width = rng.uniform(0.4, 0.9)  # reconstruction kernels smooth the noise
    return image + ndimage.gaussian_filter(grain, width) * np.float32(rng.uniform(80, 320) * width)


def _unit(rng: np.random.Generator) -> np.ndarray:
    vector = rng.standard_normal(3)
    return vector / np.linalg.norm(vector)


def _edge_point(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    point = rng.uniform(0, 1, 3) * shape
    axis = int(rng.integers(3))
    point[axis] = rng.choice((0.0, shape[axis] - 1.0))
    return point


def _grow(
    rng: np.random.Generator,
    branches: list[tuple[np.ndarray, np.ndarray, float, float]],
    start: np.ndarray,
    direction: np.ndarray,
    radius: float,
    shape: Sequence[int],
) -> None:
    """Adds the segments (from, to, radius there, radius here) of a tree that thins out and forks."""
    paths = [(start, direction, radius)]
    # Into the canvas, not along its border.
    inward = (np.asarray(shape) / 2 - start) / np.linalg.norm(np.asarray(shape) / 2 - start)
    paths[0] = (start, _normal(direction + 1.5 * inward), radius)
    while paths and len(branches) < 260:
        point, heading, width = paths.pop()
        while width > 0.55 and len(branches) < 260:
            heading = _normal(heading + 0.22 * rng.standard_normal(3))
            end = point + heading * (2.5 + 1.2 * width)
            thinner = width * rng.uniform(0.93, 0.99)
            branches.append((point, end, width, thinner))
            point, width = end, thinner
            if (point < -6).any() or (point > np.asarray(shape) + 5).any():
                break
            if rng.random() < 0.16:
                share = rng.uniform(0.5, 0.8)
                paths.append((point, _normal(heading + 0.8 * rng.standard_normal(3)), width * share))
                width *= (1 - share**3) ** (1 / 3)  # Murray's law: the cubes of the radii add up


def _normal(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def _draw_tubes(out: np.ndarray, segments: Sequence[tuple[np.ndarray, np.ndarray, float, float]]) -> None:
    """Raises `out` to the share of each voxel that lies within the tubes."""
    for a, b, first, last in segments:
        reach = max(first, last) + 1.5
        low = np.maximum(np.floor(np.minimum(a, b) - reach), 0).astype(int)
        high = np.minimum(np.ceil(np.maximum(a, b) + reach) + 1, out.shape).astype(int)
        if (low >= high).any():
            continue
        grid = np.meshgrid(
            *(np.arange(s, e, dtype=np.float32) for s, e in zip(low, high, strict=True)), indexing="ij", sparse=True
        )
        along = b - a
        length = float(along @ along)
        t = np.clip(sum((g - p) * d for g, p, d in zip(grid, a, along, strict=True)) / length, 0, 1)
        square = sum((g - p - t * d) ** 2 for g, p, d in zip(grid, a, along, strict=True))
        share = np.clip(first + (last - first) * t - np.sqrt(square) + 0.5, 0, 1)
        # A tube thinner than a voxel fills a part of it only.
        share *= min(1.0, (max(first, last) / 0.8) ** 2)
        box = tuple(slice(s, e) for s, e in zip(low, high, strict=True))
        np.maximum(out[box], share, out=out[box])


def _sheet(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Share of a fissure, a thin curved sheet, in each voxel."""
    distance = _plane(rng, shape, 0.5) + 4 * smooth_noise(rng, shape, np.full(3, 40.0), 1)[0]
    return np.clip(1.2 - np.abs(distance), 0, 1)


def _plane(rng: np.random.Generator, shape: tuple[int, ...], inside: float) -> np.ndarray:
    """Signed distance from a plane in a random direction through a point in the inner share of the canvas."""
    normal = _unit(rng)
    point = np.asarray(shape) * (0.5 + inside * rng.uniform(-0.5, 0.5, 3))
    grid = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in shape), indexing="ij", sparse=True)
    return np.asarray(sum((g - p) * d for g, p, d in zip(grid, point, normal, strict=True)), np.float32)


def _wall(rng: np.random.Generator, image: np.ndarray) -> None:
    """A chest wall on one side: pleura, muscle, fat beyond it, ribs across."""
    shape = image.shape
    depth = _plane(rng, shape, 0.0) - np.float32(rng.uniform(0.22, 0.48) * shape[0])
    depth += np.float32(rng.uniform(1, 4)) * smooth_noise(rng, shape, np.full(3, 22.0), 1)[0]
    inside = np.clip(depth + 0.5, 0, 1)
    tissue = np.full(shape, _SOFT * rng.uniform(0.94, 1.08), np.float32)
    fat = np.clip(depth - rng.uniform(5, 14) + 2 * smooth_noise(rng, shape, np.full(3, 9.0), 1)[0], 0, 1)
    tissue -= fat * np.float32(rng.uniform(150, 350))
    across = _plane(rng, shape, 1.0) / np.float32(rng.uniform(14, 24))
    height = np.abs(across - np.rint(across)) * 2  # 0 in the middle of a rib, 1 between two
    middle, half = rng.uniform(4, 8), rng.uniform(2.5, 4.5)
    rib = np.clip(1.5 - np.maximum(np.abs(depth - middle) / half, height / 0.4), 0, 1) * (depth > 0.5)
    tissue += np.minimum(1, 2 * rib) * (np.float32(_BONE * rng.uniform(0.85, 1.1)) - tissue)
    tissue += 60 * smooth_noise(rng, shape, np.full(3, 5.0), 1)[0]
    image += inside * (tissue - image)


# ---- what is blended in


def _turn(rng: np.random.Generator, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """The arrays in one of the 48 orders and directions of their axes."""
    order = rng.permutation(3)
    cut = tuple(slice(None, None, -1) if flip else slice(None) for flip in rng.random(3) < 0.5)
    return tuple(np.ascontiguousarray(a.transpose(order)[cut]) for a in arrays)


def _smoothstep(x: np.ndarray) -> np.ndarray:
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def _box_weight(shape: Sequence[int], low: np.ndarray, high: np.ndarray, edge: float) -> np.ndarray:
    """1 inside the box low..high - 1, falling to 0 at its sides over `edge` voxels."""
    sides = []
    for n, a, b in zip(shape, low, high, strict=True):
        at = np.arange(n, dtype=np.float32)
        sides.append(_smoothstep((np.minimum(at - a, b - 1 - at) + 0.5) / edge))
    # Rounded corners: the product of the sides, not their least.
    return sides[0][:, None, None] * sides[1][None, :, None] * sides[2][None, None, :]


def _beside(mask: np.ndarray, near: float, far: float) -> np.ndarray:
    """1 within `near` voxels of the mask, 0 beyond `far`."""
    from scipy import ndimage

    distance = ndimage.distance_transform_edt(~mask).astype(np.float32)
    return _smoothstep((far - distance) / (far - near))


def _blend(image: np.ndarray, crop: np.ndarray, weight: np.ndarray, start: np.ndarray) -> None:
    """Mixes a crop whose voxel 0 lies at `start` into the image; parts beyond its border are cut."""
    low = np.maximum(start, 0)
    high = np.minimum(start + crop.shape, image.shape)
    if (low >= high).any():
        return
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    own = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
    image[box] += weight[own] * (crop[own] - image[box])


def _part(rng: np.random.Generator, low: np.ndarray, high: np.ndarray, n: int, least: int) -> tuple[Any, Any]:
    """A random box of at least `least` voxels an axis within 0..n that holds low..high."""
    first = np.array([rng.integers(0, max(1, min(int(a), n - least) + 1)) for a in low])
    last = np.array(
        [rng.integers(min(n, max(int(b), int(a) + least)), n + 1) for a, b in zip(first, high, strict=True)]
    )
    return first, last


def _paste_tissue(image: np.ndarray, nodule: Nodule, rng: np.random.Generator) -> None:
    """A part of a crop, its nodule left out."""
    crop, mask = _turn(rng, nodule.image, nodule.mask)
    n = crop.shape[0]
    corner = rng.integers(0, n - 20, 3)
    first, last = _part(rng, corner, corner + 20, n, 24)
    weight = _box_weight(crop.shape, first, last, rng.uniform(3, 8))
    near = rng.uniform(1.5, 3)
    weight *= 1 - _beside(mask, near, near + rng.uniform(2, 5))
    _blend(image, crop, weight, rng.integers(-n // 2, np.asarray(image.shape) - n // 2))


def _paste_ball(image: np.ndarray, nodule: Nodule, rng: np.random.Generator) -> None:
    """A ball of lung or vessels of the size of a nodule, where what surrounds it is like what it came from.

    A ball of solid tissue within the lung would be a nodule to every eye, so its surface must be lung.
    """
    from scipy import ndimage

    crop, mask = _turn(rng, nodule.image, nodule.mask)
    radius = rng.uniform(3, 9)
    n = 2 * math.ceil(radius + 6) + 1
    room = crop.shape[0] - n
    if room < 0:
        return
    grid = np.meshgrid(*(np.arange(n, dtype=np.float32) - n // 2,) * 3, indexing="ij", sparse=True)
    stretch = rng.uniform(0.8, 1.25, 3)
    distance = np.sqrt(np.asarray(sum((g / s) ** 2 for g, s in zip(grid, stretch, strict=True))))
    edge = rng.uniform(3, 5)
    weight = _smoothstep((radius + edge - distance) / edge)
    shell = (distance > radius) & (distance < radius + edge)
    far = ndimage.distance_transform_edt(~mask)
    for _ in range(12):
        corner = rng.integers(0, room + 1, 3)
        own = tuple(slice(c, c + n) for c in corner)
        if far[own][weight > 0].min() < _CLEAR or np.mean(crop[own][shell] > _DENSE) > 0.08:
            continue
        start = rng.integers(0, np.asarray(image.shape) - n + 1)
        there = image[tuple(slice(s, s + n) for s in start)]
        if np.mean(there[shell] > _DENSE) < 0.08:
            _blend(image, crop[own], weight, start)
            return


def _paste_nodule(
    image: np.ndarray, label: np.ndarray, taken: np.ndarray, nodule: Nodule, rng: np.random.Generator
) -> Placed | None:
    """A nodule with a part of its crop around it or, where it lies free in the lung, at times alone.

    Returns None where 60 random places have no room for it.
    """
    crop, mask = _turn(rng, nodule.image, nodule.mask)
    n = crop.shape[0]
    where = np.argwhere(mask)
    low, high = where.min(0), where.max(0) + 1
    alone = _beside(mask, 2.0, rng.uniform(5, 8))
    shell = (alone > 0.02) & (alone < 0.6)
    free = float(np.mean(crop[shell] > _DENSE)) < 0.1
    if free and rng.random() < 0.4:
        weight = alone
    else:
        margin = 4
        first, last = _part(rng, np.maximum(low - margin, 0), np.minimum(high + margin, n), n, 16)
        weight = np.maximum(_box_weight(crop.shape, first, last, rng.uniform(3, 8)), alone)
    for _ in range(60):
        # Somewhere on the canvas, two voxels from its border.
        least, most = 2 - low, np.asarray(image.shape) - 2 - high
        if (least > most).any():
            return None
        start = np.array([rng.integers(a, b + 1) for a, b in zip(least, most, strict=True)])
        box = tuple(slice(s + a, s + b) for s, a, b in zip(start, low, high, strict=True))
        wide = tuple(slice(max(0, s + a - _CLEAR), s + b + _CLEAR) for s, a, b in zip(start, low, high, strict=True))
        if taken[wide].any():
            continue
        if weight is alone:
            around = tuple(slice(max(0, s), s + n) for s in start)
            own = tuple(slice(max(0, -s), min(n, size - s)) for s, size in zip(start, image.shape, strict=True))
            if np.mean(image[around][shell[own]] > _DENSE) > 0.1:
                continue
        keep = label > 0
        before = image[keep]
        _blend(image, crop, weight, start)
        image[keep] = before  # what surrounds one nodule does not cover another
        inside = mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
        label[box][inside] = 1
        taken[wide] = True
        center = start + where.mean(0)
        return Placed(
            nodule.name,
            (float(center[0]), float(center[1]), float(center[2])),
            tuple(float(v) for v in high - low),  # type: ignore[arg-type]
            nodule.ratings,
        )
    return None


def _write_case(job: dict[str, Any]) -> None:
    ratings = read_ratings(Path(job["data"]))
    nodules = [replace(_read(job["data"], name), ratings=ratings[name]) for name in job["nodules"]]
    rng = np.random.default_rng([job["seed"], 1, job["number"]])
    # A few crops are enough to distract on one canvas; reading them all for each would take longer than drawing it.
    chosen = rng.permutation(len(job["others"]))[:8]
    canvas = lung_canvas(nodules, [_read(job["data"], job["others"][i]) for i in chosen], rng, job["size"])
    listed = []
    for one in canvas.nodules:
        malignancy = one.ratings["malignancy"]
        known = {} if malignancy == 3 else {"malignant": int(malignancy > 3)}
        listed.append(finding(one.center, one.size, canvas.affine, {**known, **one.ratings}))
    row = {"nodules": listed, "names": " ".join(one.name for one in canvas.nodules)}
    write_case(job, canvas.image, canvas.label, canvas.affine, row)
