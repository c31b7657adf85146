"""Lesion-wise scores by the rules of BraTS 2023: every lesion counts the same, whatever its size.

The rules, as the challenge states them (synapse.org, syn51156910; Saluja et al.):

1. The reference is dilated (18-neighbourhood, `dilation` times) to see what belongs together. Connected components
   (26) of the dilated reference are the lesions; a lesion's voxels are the reference's own within its component.
2. Components (26) of the prediction that touch a lesion's dilated component are its match, all of them together. A
   component may match several lesions.
3. A lesion without a match is a false negative, a component without a lesion a false positive: Dice 0 and HD95 374 mm.
   Each matched lesion has the Dice and HD95 of its own voxels against its match; in volumes larger than the
   challenge's that HD95 could exceed 374 mm, and counts as 374 mm: to miss a lesion is never better than to find it.
4. Lesions of the reference of `min_volume` mm³ or less do not count, matched or not; false positives count at any size.
5. The scores are means over lesions that count and false positives.

Where nothing counts the scores are nan (the challenge gives Dice 1), so an empty case cannot improve a mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from medjax.errors import UserError
from medjax.metrics import segmentation

PENALTY_MM = 374.0  # about the diagonal of a BraTS volume, 240 x 240 x 155 mm, in the challenge's rounding


class Lesions(NamedTuple):
    """Scores of one mask of one case; nan where no lesion counts.

    Attributes:
        dice, hd95: lesion-wise means.
        f1, sensitivity, precision: 2 TP / (2 TP + FP + FN), TP / (TP + FN), TP / (TP + FP).
        true_positives, false_negatives, false_positives: lesions that count, and false components.
        small: lesions left out for their volume.
    """

    dice: float
    hd95: float
    f1: float
    sensitivity: float
    precision: float
    true_positives: int
    false_negatives: int
    false_positives: int
    small: int


def lesion_metrics(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    *,
    dilation: int = 3,
    min_volume: float = 50.0,
    penalty: float = PENALTY_MM,
    convention: segmentation.Convention = "surface-distance",
    voxel: float | None = None,
) -> Lesions:
    """Lesion-wise Dice, HD95 and F1 of boolean masks [X, Y, Z] (rules: module docstring).

    Args:
        spacing: Voxel size in mm.
        dilation: Steps of one voxel: 3 for gliomas (GLI, SSA, PEDS), 1 for meningiomas and metastases.
        min_volume: mm³: 50, and 2 for metastases.
        penalty: HD95 of what is missed or invented, mm, and the largest of what is found.
        convention: Of HD95; the challenge uses 'surface-distance'.
        voxel: mm³ of a voxel; None: the product of `spacing`, which is too large where the grid is sheared.
    """
    from scipy import ndimage

    prediction, reference = segmentation._masks(prediction, reference)
    step = segmentation._spacing(spacing)
    if dilation < 0 or min_volume < 0:
        raise UserError(f"lesions: dilation {dilation} and min_volume {min_volume} must not be negative")
    both = prediction | reference
    if not both.any():
        return Lesions(math.nan, math.nan, math.nan, math.nan, math.nan, 0, 0, 0, 0)
    # Only what lies around the masks matters; the margin leaves room for the dilation, within the volume.
    box = tuple(
        slice(max(0, s.start - dilation), min(size, s.stop + dilation))
        for s, size in zip(segmentation._bounding_box(both), both.shape, strict=True)
    )
    prediction, reference = prediction[box], reference[box]
    near = ndimage.generate_binary_structure(3, 2)
    touching = ndimage.generate_binary_structure(3, 3)
    grown = ndimage.binary_dilation(reference, near, iterations=dilation) if dilation else reference
    lesions, lesion_count = ndimage.label(grown, touching)
    parts, part_count = ndimage.label(prediction, touching)
    overlap = prediction & grown
    pairs = np.unique(np.stack([lesions[overlap], parts[overlap]]), axis=1)
    volumes = np.bincount(lesions[reference], minlength=lesion_count + 1) * segmentation._voxel(step, voxel)

    dices, distances, missed, small = [], [], 0, 0
    places = ndimage.find_objects(lesions)
    part_places = ndimage.find_objects(parts)
    for lesion in range(1, lesion_count + 1):
        if volumes[lesion] <= min_volume:
            small += 1
            continue
        matched = pairs[1, pairs[0] == lesion]
        if not len(matched):
            missed += 1
            continue
        window = _hull([places[lesion - 1], *(part_places[part - 1] for part in matched)])
        true = reference[window] & (lesions[window] == lesion)
        found = np.isin(parts[window], matched)
        dices.append(segmentation.dice(found, true))
        # In a volume larger than the challenge's a lesion may be met by what reaches farther: no worse than missed.
        distances.append(min(segmentation.hausdorff(found, true, step, convention=convention), penalty))
    hits, false = len(dices), part_count - len(np.unique(pairs[1]))
    total = hits + missed + false
    if not total:
        return Lesions(math.nan, math.nan, math.nan, math.nan, math.nan, 0, 0, 0, small)
    return Lesions(
        dice=sum(dices) / total,
        hd95=(sum(distances) + penalty * (missed + false)) / total,
        f1=2 * hits / (2 * hits + missed + false),
        sensitivity=hits / (hits + missed) if hits + missed else math.nan,
        precision=hits / (hits + false) if hits + false else math.nan,
        true_positives=hits,
        false_negatives=missed,
        false_positives=false,
        small=small,
    )


def _hull(boxes: Sequence[tuple[slice, ...]]) -> tuple[slice, ...]:
    """The smallest box that holds all of them."""
    return tuple(
        slice(min(box[axis].start for box in boxes), max(box[axis].stop for box in boxes)) for axis in range(3)
    )
