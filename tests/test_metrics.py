"""Segmentation metrics against published values, analytic answers, brute force and peer libraries."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import ndimage

from medjax.errors import UserError
from medjax.metrics import segmentation as metrics

SHAPE = (40, 48, 44)
CONVENTIONS = ("monai", "surface-distance", "pooled")


def ball(radius: float, centre=(20, 24, 22), shape=SHAPE) -> np.ndarray:
    grid = np.ogrid[tuple(slice(0, size) for size in shape)]
    return sum((axis - c) ** 2 for axis, c in zip(grid, centre, strict=True)) <= radius**2


def with_outlier() -> np.ndarray:
    mask = ball(9)
    mask[3:8, 3:8, 3:8] = True
    return mask


def random_masks(seed: int, shape=(13, 9, 11)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    fields = ndimage.gaussian_filter(rng.standard_normal((2, *shape)), (0, 1, 1, 1))
    return fields[0] > 0.1, fields[1] > 0.1


# Measured with MONAI 1.6.1, surface-distance 0.1 and medpy 0.5.2.
@pytest.mark.parametrize(
    ("prediction", "spacing", "hd", "hd95", "nsd"),
    [
        (with_outlier(), (1, 1, 1), 23.1517, (20.0499, 19.1311, 17.1232), (0.8021, 0.9192)),
        (with_outlier(), (2, 0.8, 0.8), 25.0440, (21.2503, 20.1950, 17.7647), (0.6556, 0.8594)),
        (ball(10, (22, 24, 22)), (1, 1, 1), 2.0, (2.0, 2.0, 2.0), (0.5767, 0.7892)),
    ],
)
def test_golden_values_of_peers(prediction, spacing, hd, hd95, nsd):
    reference = ball(10)
    assert metrics.hausdorff(prediction, reference, spacing, percentile=100) == pytest.approx(hd, abs=5e-5)
    for convention, expected in zip(CONVENTIONS, hd95, strict=True):
        assert metrics.hausdorff(prediction, reference, spacing, convention=convention) == pytest.approx(
            expected, abs=5e-5
        )
    for boundary, expected in zip(("voxel", "surfel"), nsd, strict=True):
        assert metrics.surface_dice(prediction, reference, spacing, boundary=boundary) == pytest.approx(
            expected, abs=5e-5
        )


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 3.0, 1.2)])
def test_against_distance_maps(seed, spacing):
    """The nearest-neighbour search equals Euclidean distance maps of the whole padded volume."""
    prediction, reference = random_masks(seed)
    padded = [np.pad(mask, 1) for mask in (prediction, reference)]
    borders = [mask & ~ndimage.binary_erosion(mask) for mask in padded]
    maps = [ndimage.distance_transform_edt(~border, sampling=spacing) for border in borders]
    there, back = maps[1][borders[0]], maps[0][borders[1]]
    assert metrics.hausdorff(prediction, reference, spacing) == pytest.approx(
        max(np.percentile(there, 95), np.percentile(back, 95))
    )
    assert metrics.hausdorff(prediction, reference, spacing, percentile=60, convention="pooled") == pytest.approx(
        np.percentile(np.concatenate([there, back]), 60)
    )
    within = np.concatenate([there, back]) <= 1.0
    assert metrics.surface_dice(prediction, reference, spacing, boundary="voxel") == pytest.approx(within.mean())

    overlap = (prediction & reference).sum()
    assert metrics.dice(prediction, reference) == pytest.approx(2 * overlap / (prediction.sum() + reference.sum()))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_hausdorff_properties(convention):
    prediction, reference = random_masks(7)
    value = metrics.hausdorff(prediction, reference, (1, 2, 3), convention=convention)
    assert metrics.hausdorff(reference, prediction, (1, 2, 3), convention=convention) == pytest.approx(value)
    assert metrics.hausdorff(prediction, reference, (2, 4, 6), convention=convention) == pytest.approx(2 * value)
    swapped = [mask.transpose(2, 0, 1) for mask in (prediction, reference)]
    assert metrics.hausdorff(*swapped, (3, 1, 2), convention=convention) == pytest.approx(value)
    padded = [np.pad(mask, ((0, 5), (3, 0), (2, 2))) for mask in (prediction, reference)]
    assert metrics.hausdorff(*padded, (1, 2, 3), convention=convention) == pytest.approx(value)
    assert metrics.hausdorff(reference, reference, convention=convention) == 0


def test_surface_dice_of_a_mask_with_itself_and_its_tolerance():
    reference, shifted = ball(10), ball(10, (22, 24, 22))
    assert metrics.surface_dice(reference, reference, tolerance=0) == 1
    values = [metrics.surface_dice(shifted, reference, tolerance=t) for t in (0, 0.5, 1, 1.5, 2)]
    assert values == sorted(values)
    assert values[0] < 0.5
    assert values[-1] == 1


@pytest.mark.parametrize("boundary", ["surfel", "voxel"])
def test_surface_dice_does_not_depend_on_how_a_header_rounds(boundary):
    """Outlines one voxel of 1 mm apart, the voxel's size taken from oblique headers in float32."""
    reference, smaller = (np.zeros((16, 16, 16), bool) for _ in range(2))
    reference[3:13, 3:13, 3:13] = True
    smaller[4:12, 4:12, 4:12] = True
    expected = metrics.surface_dice(smaller, reference, (1, 1, 1), tolerance=1, boundary=boundary)
    assert expected > 0.8
    rng = np.random.default_rng(0)
    turns = [np.linalg.qr(rng.normal(size=(3, 3)))[0].astype(np.float32) for _ in range(8)]
    sizes = [np.linalg.norm(turn.astype(np.float64), axis=0) for turn in turns]
    assert any((size > 1).any() for size in sizes)
    for size in sizes:
        found = metrics.surface_dice(smaller, reference, size.tolist(), tolerance=1, boundary=boundary)
        assert found == pytest.approx(expected, abs=1e-5)
    assert metrics.surface_dice(smaller, reference, (1, 1, 1), tolerance=0.999, boundary=boundary) < 0.5


def test_surfel_area_of_one_voxel_is_an_octahedron():
    mask = np.zeros((3, 3, 3), bool)
    mask[1, 1, 1] = True
    a, b, c = 1.0, 0.7, 1.5  # half the spacing: the octahedron's corners
    face = 0.5 * math.sqrt((b * c) ** 2 + (a * c) ** 2 + (a * b) ** 2)
    areas = metrics.surfel_areas((2 * a, 2 * b, 2 * c))
    assert areas[metrics._cell_codes(mask)].sum() == pytest.approx(8 * face)


@pytest.mark.parametrize("radius", [8.3, 15.1])
def test_surfel_area_of_a_ball(radius):
    mask = ball(radius, (20, 20, 20), (41, 41, 41))
    area = metrics.surfel_areas()[metrics._cell_codes(mask)].sum()
    # A staircase surface of half-voxel steps is too large by some percent, and by the same at any radius.
    assert 1.0 < area / (4 * math.pi * radius**2) < 1.12


def test_surfel_areas_of_flat_walls_and_symmetries():
    spacing = (2.0, 0.8, 0.5)
    areas = metrics.surfel_areas(spacing)
    assert areas.shape == (256,)
    assert areas[0] == areas[255] == 0
    assert (areas[1:255] > 0).all()
    np.testing.assert_allclose(areas, areas[::-1])
    for axis, product in enumerate((0.8 * 0.5, 2.0 * 0.5, 2.0 * 0.8)):
        wall = np.zeros((2, 2, 2), bool)
        wall[(slice(None),) * axis + (1,)] = True
        code = metrics._cell_codes(wall)[1, 1, 1]
        assert areas[code] == pytest.approx(product)
    cells = np.array([[code >> bit & 1 for bit in range(8)] for code in range(256)], bool).reshape(256, 2, 2, 2)
    unit = metrics.surfel_areas()
    for turned in (cells.transpose(0, 2, 3, 1), cells[:, ::-1], cells.transpose(0, 1, 3, 2)):
        codes = turned.reshape(256, 8) @ (1 << np.arange(8))
        np.testing.assert_allclose(unit[codes], unit)


def test_empty_masks():
    reference, nothing = ball(5), np.zeros(SHAPE, bool)
    diagonal = math.sqrt(80**2 + 48**2 + 22**2)
    spacing = (2, 1, 0.5)
    for a, b in ((reference, nothing), (nothing, reference)):
        assert metrics.dice(a, b) == 0
        assert metrics.surface_dice(a, b) == 0
        for convention in CONVENTIONS:
            assert metrics.hausdorff(a, b, spacing, convention=convention) == pytest.approx(diagonal)
    assert math.isnan(metrics.dice(nothing, nothing))
    assert math.isnan(metrics.surface_dice(nothing, nothing))
    assert math.isnan(metrics.hausdorff(nothing, nothing))
    size = int(reference.sum()) / 1000
    assert metrics.volume_error(nothing, nothing)[0] == 0
    assert metrics.volume_error(nothing, reference, spacing) == pytest.approx((-size, -1))
    millilitres, fraction = metrics.volume_error(reference, nothing)
    assert millilitres == pytest.approx(size)
    assert math.isnan(fraction)


def test_volume_error():
    reference, prediction = np.zeros((2, 10, 10, 10), bool)
    reference[:5], prediction[:4] = True, True
    assert metrics.volume_error(prediction, reference, (2, 3, 0.5)) == pytest.approx((-0.3, -0.2))
    assert metrics.volume_error(prediction, reference, (2, 3, 0.5), voxel=2.5) == pytest.approx((-0.25, -0.2))


def test_voxels_of_a_sheared_grid_hold_less_than_the_product_of_its_spacing():
    prediction, reference = labels()
    cuboid = metrics.case_metrics(prediction, reference, CLASSES, (1, 1, 2))
    sheared = metrics.case_metrics(prediction, reference, CLASSES, (1, 1, 2), voxel=1.5)
    for a, b in zip(cuboid, sheared, strict=True):
        for key in a:
            assert b[key] == (pytest.approx(0.75 * a[key]) if key.endswith("_ml") else a[key])
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="voxel volume"):
            metrics.case_metrics(prediction, reference, CLASSES, (1, 1, 2), voxel=wrong)


def labels() -> tuple[np.ndarray, np.ndarray]:
    maps = []
    for shift in (0, 2):
        array = np.zeros(SHAPE, np.int16)
        for radius, value in ((14, 2), (9, 1), (5, 4)):
            array[ball(radius, (20 + shift, 24, 22))] = value
        maps.append(array)
    return maps[1], maps[0]


CLASSES = {"whole": (1, 2, 4), "core": (1, 4), "enhancing": (4,)}


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("boundary", ["voxel", "surfel"])
def test_case_metrics_is_the_single_metrics(convention, boundary):
    prediction, reference = labels()
    spacing = (1.5, 1, 1)
    rows = metrics.case_metrics(
        prediction, reference, CLASSES, spacing, nsd_tolerance=2, convention=convention, boundary=boundary
    )
    assert [row["class"] for row in rows] == list(CLASSES)
    for row, values in zip(rows, CLASSES.values(), strict=True):
        a, b = np.isin(prediction, values), np.isin(reference, values)
        assert row["dice"] == metrics.dice(a, b)
        assert row["hd95"] == metrics.hausdorff(a, b, spacing, convention=convention)
        assert row["nsd"] == metrics.surface_dice(a, b, spacing, tolerance=2, boundary=boundary)
        assert row["volume_error_ml"] == pytest.approx(metrics.volume_error(a, b, spacing)[0])
        assert row["volume_ml"] == pytest.approx(a.sum() * 1.5e-3)
        assert row["reference_ml"] == pytest.approx(b.sum() * 1.5e-3)
        assert row["empty"] == ""


def test_case_metrics_takes_region_masks():
    prediction, reference = labels()
    expected = metrics.case_metrics(prediction, reference, CLASSES)
    masks = [np.stack([np.isin(array, v) for v in CLASSES.values()], -1) for array in (prediction, reference)]
    assert metrics.case_metrics(masks[0], masks[1], list(CLASSES)) == expected
    assert metrics.case_metrics(masks[0], reference, CLASSES) == expected


def test_case_metrics_of_empty_classes():
    prediction, reference = labels()
    prediction[prediction == 4] = 1
    reference[reference == 2] = 0
    rows = metrics.case_metrics(prediction, reference, {"a": (4,), "b": (2,), "c": (9,), "d": (0,)}, (1, 1, 2))
    diagonal = math.sqrt(40**2 + 48**2 + 88**2)
    assert [row["empty"] for row in rows] == ["prediction", "reference", "both", ""]
    assert [row["dice"] for row in rows[:2]] == [0, 0]
    assert [row["hd95"] for row in rows[:2]] == pytest.approx([diagonal, diagonal])
    assert math.isnan(rows[2]["dice"])
    assert math.isnan(rows[2]["hd95"])
    assert rows[2]["volume_error_ml"] == 0
    assert rows[3]["dice"] == metrics.dice(prediction == 0, reference == 0)
    nothing = np.zeros_like(reference)
    assert {row["empty"] for row in metrics.case_metrics(nothing, nothing, CLASSES)} == {"both"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": np.zeros((4, 4, 5), int)}, "different grids"),
        ({"prediction": np.zeros((4, 4, 4), np.float32)}, "integer label map"),
        ({"prediction": np.zeros((4, 4, 4, 2), bool)}, "region masks"),
        ({"spacing": (1, 1, 0)}, "spacing"),
        ({"spacing": (1, 1)}, "spacing"),
        ({"convention": "medpy"}, "unknown Hausdorff convention 'medpy'"),
        ({"boundary": "edge"}, "unknown boundary"),
        ({"nsd_tolerance": -1}, "tolerance"),
        ({"classes": ["a"]}, "mapping"),
    ],
)
def test_case_metrics_refuses(change, message):
    arguments = {"prediction": np.zeros((4, 4, 4), int), "reference": np.zeros((4, 4, 4), int), "classes": {"a": (1,)}}
    with pytest.raises(UserError, match=message):
        metrics.case_metrics(**(arguments | change))


@pytest.mark.peers
@pytest.mark.parametrize("spacing", [(1, 1, 1), (2, 0.8, 0.8), (0.5, 3, 1)])
def test_peer_surface_distance(spacing):
    peer = pytest.importorskip("surface_distance")
    from surface_distance import lookup_tables

    expected = np.array(lookup_tables.create_table_neighbour_code_to_surface_area(spacing))
    bits = np.array([[code >> bit & 1 for bit in range(8)] for code in range(256)])
    for ours in (np.arange(8), np.arange(8)[::-1]):  # either order of bits: the table is symmetric
        np.testing.assert_allclose(metrics.surfel_areas(spacing)[bits @ (1 << ours)], expected, atol=1e-6)
    for seed in range(5):
        prediction, reference = random_masks(seed)
        distances = peer.compute_surface_distances(reference, prediction, spacing)
        assert metrics.hausdorff(prediction, reference, spacing, convention="surface-distance") == pytest.approx(
            peer.compute_robust_hausdorff(distances, 95)
        )
        assert metrics.surface_dice(prediction, reference, spacing, tolerance=1.1) == pytest.approx(
            peer.compute_surface_dice_at_tolerance(distances, 1.1)
        )


@pytest.mark.peers
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 0.8, 0.8)])
def test_peer_monai(spacing):
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("monai.metrics")
    for seed in range(5):
        prediction, reference = random_masks(seed)
        a, b = (torch.from_numpy(np.stack([~mask, mask])[None]) for mask in (prediction, reference))
        hd95 = peer.compute_hausdorff_distance(a, b, percentile=95, spacing=spacing).item()
        assert metrics.hausdorff(prediction, reference, spacing) == pytest.approx(hd95, rel=1e-5)
        nsd = peer.compute_surface_dice(a, b, class_thresholds=[1.1], spacing=spacing).item()
        assert metrics.surface_dice(prediction, reference, spacing, tolerance=1.1, boundary="voxel") == pytest.approx(
            nsd, rel=1e-5
        )


@pytest.mark.peers
def test_peer_medpy():
    peer = pytest.importorskip("medpy.metric.binary")
    for seed in range(5):
        prediction, reference = random_masks(seed)
        expected = peer.hd95(prediction, reference, (0.9, 1.4, 2.0))
        assert metrics.hausdorff(prediction, reference, (0.9, 1.4, 2.0), convention="pooled") == pytest.approx(expected)
