"""Time of Dice, HD95, ASSD and surface Dice of one BraTS-sized case, beside surface-distance and MONAI if installed.

    python -m benchmarks.metrics [--repeats 5]

The case: 240x240x155 voxels of 1 mm, three nested regions of 7 to 190 ml, the prediction an irregular deformation of
the reference. Prints the best and the median of the repeats for each library, and Dice, HD95 and surface Dice as each
gets them (ASSD, which the peers would compute apart, is in our time and not in theirs).
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy import ndimage

from medjax.metrics import segmentation

SHAPE = (240, 240, 155)
SPACING = (1.0, 1.0, 1.0)
CLASSES: Mapping[str, Sequence[int]] = {"whole": (1, 2, 3), "core": (1, 3), "enhancing": (3,)}


def case(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Prediction and reference label maps, uint8 `SHAPE`."""
    rng = np.random.default_rng(seed)
    grid = np.ogrid[tuple(slice(0, size) for size in SHAPE)]
    distance = np.sqrt(sum((axis - centre) ** 2 for axis, centre in zip(grid, (110, 130, 80), strict=True)))

    def rough(width: float) -> np.ndarray:
        field = ndimage.gaussian_filter(rng.standard_normal(SHAPE, np.float32), width)
        return field / field.std()

    shape = distance + 5 * rough(6)
    maps = []
    for radius in (shape + 2.5 * rough(3), shape):
        maps.append(np.select([radius < 12, radius < 20, radius < 34], [3, 1, 2]).astype(np.uint8))
    return maps[0], maps[1]


def ours(
    prediction: np.ndarray,
    reference: np.ndarray,
    convention: segmentation.Convention,
    boundary: segmentation.Boundary = "surfel",
) -> list[tuple]:
    rows = segmentation.case_metrics(prediction, reference, CLASSES, SPACING, convention=convention, boundary=boundary)
    return [(row["dice"], row["hd95"], row["nsd"]) for row in rows]


def surface_distance(prediction: np.ndarray, reference: np.ndarray) -> list[tuple]:
    import surface_distance as peer

    result = []
    for values in CLASSES.values():
        a, b = np.isin(prediction, values), np.isin(reference, values)
        surface = peer.compute_surface_distances(b, a, SPACING)
        result.append(
            (
                peer.compute_dice_coefficient(b, a),
                peer.compute_robust_hausdorff(surface, 95),
                peer.compute_surface_dice_at_tolerance(surface, 1.0),
            )
        )
    return result


def monai(prediction: np.ndarray, reference: np.ndarray) -> list[tuple]:
    import torch
    from monai import metrics as peer

    a, b = (
        torch.from_numpy(np.stack([np.isin(labels, values) for values in CLASSES.values()])[None])
        for labels in (prediction, reference)
    )
    dice = peer.compute_dice(a.float(), b.float())
    hd95 = peer.compute_hausdorff_distance(a, b, include_background=True, percentile=95, spacing=SPACING)
    nsd = peer.compute_surface_dice(a, b, class_thresholds=[1.0] * 3, include_background=True, spacing=SPACING)
    return [tuple(float(metric[0, k]) for metric in (dice, hd95, nsd)) for k in range(len(CLASSES))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    prediction, reference = case()
    programs: dict[str, Callable[[], list[tuple]]] = {
        "medjax (HD95 voxel, NSD surfel)": lambda: ours(prediction, reference, "monai"),
        "medjax (all voxel)": lambda: ours(prediction, reference, "monai", "voxel"),
        "medjax (all surfel)": lambda: ours(prediction, reference, "surface-distance"),
    }
    if importlib.util.find_spec("surface_distance"):
        programs["surface-distance (all surfel)"] = lambda: surface_distance(prediction, reference)
    if importlib.util.find_spec("monai"):
        programs["MONAI (all voxel)"] = lambda: monai(prediction, reference)
    for name, program in programs.items():
        seconds, result = [], program()
        for _ in range(repeats):
            began = time.perf_counter()
            program()
            seconds.append(time.perf_counter() - began)
        numbers = "  ".join(f"{dice:.4f} {hd95:.3f} {nsd:.4f}" for dice, hd95, nsd in result)
        print(f"{name:32} best {min(seconds):.3f} s, median {statistics.median(seconds):.3f} s   {numbers}", flush=True)


if __name__ == "__main__":
    main()
