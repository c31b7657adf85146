"""Masks that break metrics (nothing, one voxel, the same twice, all of the volume, at its border) beside the peers.

With something in both masks all agree. Where one is empty we differ on purpose (`medjax.metrics.segmentation`: what is
missed must never improve a mean), and `EMPTY` lists what each library says; medpy raises.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest

from medjax.metrics import segmentation as metrics

pytestmark = pytest.mark.peers

SHAPE, SPACING, TOLERANCE = (12, 9, 10), (2.0, 0.8, 0.9), 1.1
DIAGONAL = math.sqrt(24.0**2 + 7.2**2 + 9.0**2)


def box(*sides: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[tuple(slice(*side) for side in sides)] = True
    return mask


NOTHING, ALL = box((0, 0), (0, 0), (0, 0)), box((0, 12), (0, 9), (0, 10))
BLOB, DOT = box((3, 8), (2, 7), (2, 8)), box((5, 6), (4, 5), (3, 4))
CORNER, LAST = box((0, 1), (0, 1), (0, 1)), box((11, 12), (8, 9), (9, 10))
EDGE = box((0, 5), (0, 9), (4, 10))
PAIRS = {
    "two voxels": (DOT, box((8, 9), (4, 5), (3, 4))),
    "the same voxel": (DOT, DOT),
    "a voxel within": (DOT, BLOB),
    "opposite corners": (CORNER, LAST),
    "the same corner": (CORNER, CORNER),
    "identical": (BLOB, BLOB),
    "at the border": (EDGE, box((0, 4), (1, 9), (3, 10))),
    "identical at the border": (EDGE, EDGE),
    "all of it": (ALL, ALL),
    "all for a part": (ALL, BLOB),
}
# what is empty -> library -> Dice, HD95, ASSD, NSD, clDice, or those it has
EMPTY: dict[str, dict[str, Any]] = {
    "both": {
        "ours": (math.nan,) * 5,
        "monai": (math.nan, math.nan, math.nan, math.nan, 1),
        "surface-distance": {"dice": math.nan, "hd95": math.inf, "nsd": math.nan},
    },
    "prediction": {
        "ours": (0, DIAGONAL, DIAGONAL, 0, 0),
        "monai": (0, math.nan, math.inf, 0, 0),
        "surface-distance": {"dice": 0, "hd95": math.inf, "nsd": 0},
    },
    "reference": {
        "ours": (0, DIAGONAL, DIAGONAL, 0, 0),
        "monai": (math.nan, math.nan, math.inf, 0, 0),
        "surface-distance": {"dice": 0, "hd95": math.inf, "nsd": 0},
    },
}
EMPTY_MASKS = {"both": (NOTHING, NOTHING), "prediction": (NOTHING, BLOB), "reference": (BLOB, NOTHING)}


def ours(prediction: np.ndarray, reference: np.ndarray) -> tuple[float, ...]:
    """By MONAI's conventions."""
    return (
        metrics.dice(prediction, reference),
        metrics.hausdorff(prediction, reference, SPACING),
        metrics.average_surface_distance(prediction, reference, SPACING),
        metrics.surface_dice(prediction, reference, SPACING, tolerance=TOLERANCE, boundary="voxel"),
        metrics.centreline_dice(prediction, reference),
    )


def monais(prediction: np.ndarray, reference: np.ndarray) -> tuple[float, ...]:
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("monai.metrics")
    from monai.losses import SoftclDiceLoss

    a, b = (torch.from_numpy(np.stack([~mask, mask])[None]) for mask in (prediction, reference))
    # Padded: the peer's erosion keeps voxels at the border of the array.
    c, d = (torch.from_numpy(np.pad(mask, 2)[None, None].astype(np.float32)) for mask in (prediction, reference))
    loss = SoftclDiceLoss(iter_=12, smooth_nr=1e-6, smooth_dr=1e-6, smooth=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of empty masks
        found = (
            peer.DiceMetric(include_background=False)(a.float(), b.float()),
            peer.compute_hausdorff_distance(a, b, percentile=95, spacing=SPACING),
            peer.compute_average_surface_distance(a, b, symmetric=True, spacing=SPACING),
            peer.compute_surface_dice(a, b, class_thresholds=[TOLERANCE], spacing=SPACING),
            1 - loss(d, c),
        )
    return tuple(float(value) for value in found)


def surface_distances(prediction: np.ndarray, reference: np.ndarray, patch: pytest.MonkeyPatch) -> dict[str, float]:
    peer = pytest.importorskip("surface_distance")
    for name, value in (("Inf", math.inf), ("NaN", math.nan)):  # 0.1 calls them as NumPy 1 did
        patch.setattr(np, name, value, raising=False)
    distances = peer.compute_surface_distances(reference, prediction, SPACING)
    return {
        "dice": float(peer.compute_dice_coefficient(reference, prediction)),
        "hd95": float(peer.compute_robust_hausdorff(distances, 95)),
        "nsd": float(peer.compute_surface_dice_at_tolerance(distances, TOLERANCE)),
    }


def same(found: tuple[float, ...], expected: tuple[float, ...]) -> None:
    np.testing.assert_allclose(found[:4], expected[:4], rtol=1e-5, atol=1e-6)
    assert found[4] == pytest.approx(expected[4], abs=1e-4, nan_ok=True)  # clDice: the loss is smoothed


@pytest.mark.parametrize("pair", PAIRS)
def test_monai(pair):
    same(ours(*PAIRS[pair]), monais(*PAIRS[pair]))


@pytest.mark.parametrize("pair", PAIRS)
def test_surface_distance(pair, monkeypatch):
    prediction, reference = PAIRS[pair]
    expected = surface_distances(prediction, reference, monkeypatch)
    assert metrics.dice(prediction, reference) == pytest.approx(expected["dice"])
    hd95 = metrics.hausdorff(prediction, reference, SPACING, convention="surface-distance")
    assert hd95 == pytest.approx(expected["hd95"])
    nsd = metrics.surface_dice(prediction, reference, SPACING, tolerance=TOLERANCE)
    assert nsd == pytest.approx(expected["nsd"])


@pytest.mark.parametrize("pair", PAIRS)
def test_medpy(pair):
    peer = pytest.importorskip("medpy.metric.binary")
    prediction, reference = PAIRS[pair]
    found = metrics.hausdorff(prediction, reference, SPACING, convention="pooled")
    assert found == pytest.approx(peer.hd95(prediction, reference, SPACING))


@pytest.mark.parametrize("which", EMPTY)
def test_of_an_empty_mask_each_says_what_it_says(which, monkeypatch):
    masks, expected = EMPTY_MASKS[which], EMPTY[which]
    same(ours(*masks), expected["ours"])
    same(monais(*masks), expected["monai"])
    told = surface_distances(*masks, monkeypatch)
    assert told == pytest.approx(expected["surface-distance"], nan_ok=True)


@pytest.mark.parametrize("which", EMPTY)
def test_medpy_refuses_an_empty_mask(which):
    peer = pytest.importorskip("medpy.metric.binary")
    with pytest.raises(RuntimeError, match="does not contain any binary object"):
        peer.hd95(*EMPTY_MASKS[which], SPACING)
