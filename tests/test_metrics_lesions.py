"""Lesion-wise scores on masks whose answer is known, ASSD and clDice against definitions and MONAI."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from medjax.errors import UserError
from medjax.metrics import lesions
from medjax.metrics import segmentation as metrics

SHAPE = (60, 40, 40)


def cubes(*places: tuple[int, int, int, int]) -> np.ndarray:
    """Cubes (x, y, z, edge)."""
    mask = np.zeros(SHAPE, bool)
    for x, y, z, edge in places:
        mask[x : x + edge, y : y + edge, z : z + edge] = True
    return mask


BIG, OTHER, FAR = (5, 5, 5, 10), (30, 20, 20, 5), (50, 30, 30, 4)


def test_every_lesion_counts_the_same():
    reference = cubes(BIG, OTHER, FAR)
    found = lesions.lesion_metrics(cubes(BIG, (30, 20, 20, 4), (45, 3, 3, 3)), reference)
    half = 2 * 64 / (64 + 125)
    assert (found.true_positives, found.false_negatives, found.false_positives, found.small) == (2, 1, 1, 0)
    assert found.dice == pytest.approx((1 + half) / 4)
    hd95 = metrics.hausdorff(cubes((30, 20, 20, 4)), cubes(OTHER), convention="surface-distance")
    assert found.hd95 == pytest.approx((0 + hd95 + 2 * 374) / 4)
    assert found.f1 == pytest.approx(4 / 6)
    assert found.sensitivity == pytest.approx(2 / 3)
    assert found.precision == pytest.approx(2 / 3)


def test_small_lesions_do_not_count_but_false_ones_do():
    small = (40, 5, 5, 3)  # 27 mm³
    alone = lesions.lesion_metrics(cubes(BIG), cubes(BIG, small))
    assert (alone.true_positives, alone.false_negatives, alone.small) == (1, 0, 1)
    assert alone.dice == 1
    hit = lesions.lesion_metrics(cubes(BIG, small), cubes(BIG, small))
    assert (hit.true_positives, hit.false_positives) == (1, 0)
    invented = lesions.lesion_metrics(cubes(BIG, small), cubes(BIG))
    assert (invented.true_positives, invented.false_positives) == (1, 1)
    assert invented.dice == 0.5
    metastases = lesions.lesion_metrics(cubes(BIG), cubes(BIG, small), min_volume=2, dilation=1)
    assert metastases.false_negatives == 1
    # Volume is mm³: in voxels of 8 mm³ the same lesion counts.
    assert lesions.lesion_metrics(cubes(BIG), cubes(BIG, small), (2, 2, 2)).false_negatives == 1
    # And not where the grid is so sheared that they hold 1 mm³.
    assert lesions.lesion_metrics(cubes(BIG), cubes(BIG, small), (2, 2, 2), voxel=1.0).small == 1


def test_a_lesion_found_badly_is_no_worse_than_one_missed():
    """A volume longer than BraTS's: what touches the lesion reaches 600 mm away."""
    reference, prediction = np.zeros((2, 640, 12, 12), bool)
    reference[10:20, 3:9, 3:9] = True
    prediction[10:620, 5:7, 5:7] = True
    assert metrics.hausdorff(prediction, reference, convention="surface-distance") > lesions.PENALTY_MM
    found = lesions.lesion_metrics(prediction, reference)
    missed = lesions.lesion_metrics(prediction & False, reference)
    assert (found.true_positives, missed.false_negatives) == (1, 1)
    assert found.hd95 == missed.hd95 == 374
    assert lesions.lesion_metrics(prediction, reference, penalty=600.0).hd95 > 374


def test_neighbours_within_the_dilation_are_one_lesion():
    near = cubes(BIG, (17, 5, 5, 5))  # two voxels between them
    for dilation, count in ((3, 1), (0, 2)):
        found = lesions.lesion_metrics(near, near, dilation=dilation)
        assert found.true_positives == count
        assert found.dice == 1
    # Both parts of a prediction in two pieces belong to the lesion they touch; so does one just beside it.
    split = cubes(BIG)
    split[9] = False
    found = lesions.lesion_metrics(split, cubes(BIG))
    assert (found.true_positives, found.false_positives) == (1, 0)
    assert found.dice == pytest.approx(2 * 900 / 1900)
    beside = lesions.lesion_metrics(cubes((17, 5, 5, 5)), cubes(BIG))
    assert (beside.true_positives, beside.false_negatives, beside.dice) == (1, 0, 0)


def test_empty_masks_and_refusals():
    nothing = np.zeros(SHAPE, bool)
    assert math.isnan(lesions.lesion_metrics(nothing, nothing).dice)
    missed = lesions.lesion_metrics(nothing, cubes(BIG))
    assert (missed.dice, missed.hd95, missed.f1, missed.sensitivity) == (0, 374, 0, 0)
    assert math.isnan(missed.precision)
    invented = lesions.lesion_metrics(cubes(BIG), nothing)
    assert (invented.dice, invented.hd95, invented.f1, invented.precision) == (0, 374, 0, 0)
    only_small = lesions.lesion_metrics(nothing, cubes((5, 5, 5, 2)))
    assert math.isnan(only_small.dice)
    assert only_small.small == 1
    with pytest.raises(UserError, match="negative"):
        lesions.lesion_metrics(nothing, nothing, dilation=-1)


def random_masks(seed: int, shape=(13, 9, 11)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    fields = ndimage.gaussian_filter(rng.standard_normal((2, *shape)), (0, 1, 1, 1))
    return fields[0] > 0.1, fields[1] > 0.1


@pytest.mark.parametrize("seed", range(3))
def test_average_surface_distance_against_distance_maps(seed):
    prediction, reference = random_masks(seed)
    spacing = (0.7, 3.0, 1.2)
    padded = [np.pad(mask, 1) for mask in (prediction, reference)]
    borders = [mask & ~ndimage.binary_erosion(mask) for mask in padded]
    maps = [ndimage.distance_transform_edt(~border, sampling=spacing) for border in borders]
    both = np.concatenate([maps[1][borders[0]], maps[0][borders[1]]])
    assert metrics.average_surface_distance(prediction, reference, spacing) == pytest.approx(both.mean())
    (row,) = metrics.case_metrics(prediction.astype(int), reference.astype(int), {"a": (1,)}, spacing)
    assert row["assd"] == pytest.approx(both.mean())


def test_average_surface_distance_of_parallel_walls_and_nothing():
    a, b = np.zeros((2, 20, 6, 6), bool)
    a[:10], b[:13] = True, True
    assert metrics.average_surface_distance(b, b) == 0
    value = metrics.average_surface_distance(a, b, (2, 1, 1), convention="surface-distance")
    assert 0 < value < 6  # 6 mm at the shifted face, less at the sides
    nothing = np.zeros_like(a)
    assert metrics.average_surface_distance(a, nothing) == pytest.approx(math.sqrt(400 + 36 + 36))
    assert math.isnan(metrics.average_surface_distance(nothing, nothing))


def tube(radius: float, shift: int = 0) -> np.ndarray:
    x, y, _ = np.ogrid[:21, :21, :30]
    return np.broadcast_to((x - 10 - shift) ** 2 + (y - 10) ** 2 <= radius**2, (21, 21, 30)).copy()


def test_centreline_dice():
    line, thin, thick = tube(0), tube(2.2), tube(4.2)
    skeleton = metrics.skeleton(thick)
    assert (skeleton & ~thick).sum() == 0
    assert skeleton.sum() < 0.3 * thick.sum()
    assert metrics.skeleton(line).sum() == line.sum()
    # Thickness does not matter: each centreline lies in the other tube.
    assert metrics.centreline_dice(thin, thick) > 0.9 > metrics.dice(thin, thick)
    half = thick.copy()
    half[:, :, 15:] = False
    assert metrics.centreline_dice(half, thick) == pytest.approx(2 / 3, abs=0.05)
    assert metrics.centreline_dice(line, tube(0, 8)) == 0
    nothing = np.zeros_like(line)
    assert metrics.centreline_dice(line, nothing) == metrics.centreline_dice(nothing, line) == 0
    assert math.isnan(metrics.centreline_dice(nothing, nothing))


@pytest.mark.peers
@pytest.mark.parametrize("seed", range(4))
def test_peer_monai(seed):
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("monai.metrics")
    from monai.losses import SoftclDiceLoss

    prediction, reference = random_masks(seed)
    a, b = (torch.from_numpy(np.stack([~mask, mask])[None]) for mask in (prediction, reference))
    for spacing in ((1.0, 1.0, 1.0), (2.0, 0.8, 0.8)):
        assd = peer.compute_average_surface_distance(a, b, symmetric=True, spacing=spacing).item()
        assert metrics.average_surface_distance(prediction, reference, spacing) == pytest.approx(assd, rel=1e-5)
    # Padded: the peer's erosion keeps voxels at the border of the array.
    a, b = (torch.from_numpy(np.pad(mask, 2)[None, None].astype(np.float32)) for mask in (prediction, reference))
    loss = SoftclDiceLoss(iter_=12, smooth_nr=1e-6, smooth_dr=1e-6, smooth=1e-6)(b, a).item()
    assert metrics.centreline_dice(prediction, reference) == pytest.approx(1 - loss, abs=1e-4)
