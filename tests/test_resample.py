"""Resampling against scipy's spline interpolation, analytic answers and properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medjax.ops.resample import axis_matrix, bounding_box, resample, resample_labels, sample_positions


def scipy_resample(array: np.ndarray, shape, ratios, order: int) -> np.ndarray:
    """The definition, evaluated voxel by voxel in float64."""
    axes = [(np.arange(m) - (m - 1) / 2) * r + (n - 1) / 2 for n, m, r in zip(array.shape, shape, ratios, strict=True)]
    grid = np.meshgrid(*axes, indexing="ij")
    return ndimage.map_coordinates(array.astype(np.float64), grid, order=order, mode="nearest")


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 14)] * 3),
    target=st.tuples(*[st.integers(1, 16)] * 3),
    ratios=st.tuples(*[st.floats(0.2, 4)] * 3),
    order=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
def test_equals_scipy(shape, target, ratios, order, seed):
    array = np.random.default_rng(seed).normal(0, 100, shape).astype(np.float32)
    expected = np.clip(scipy_resample(array, target, ratios, order), array.min(), array.max())
    np.testing.assert_allclose(resample(array, target, ratios, order), expected, atol=1e-3)


def test_nearest_equals_scipy_and_keeps_the_dtype():
    array = np.random.default_rng(0).integers(0, 1000, (9, 7, 5)).astype(np.int16)
    ratios = (0.61, 1.37, 2.11)
    out = resample(array, (14, 5, 3), ratios, 0)
    assert out.dtype == np.int16
    np.testing.assert_array_equal(out, scipy_resample(array, (14, 5, 3), ratios, 0))


@pytest.mark.parametrize("order", [0, 1, 3])
def test_rows_sum_to_one_and_identity_is_exact(order):
    np.testing.assert_allclose(axis_matrix(31, 17, 1.8, order).sum(axis=1), 1, atol=1e-6)
    array = np.random.default_rng(1).normal(size=(5, 6, 7, 2)).astype(np.float32)
    np.testing.assert_array_equal(resample(array, (5, 6, 7), (1, 1, 1), order), array)


def test_linear_ramp_lands_on_the_sampled_positions():
    x = np.broadcast_to(np.arange(20.0, dtype=np.float32)[:, None, None], (20, 3, 3))
    out = resample(x, (9, 3, 3), (2.0, 1.0, 1.0), 1)[:, 1, 1]
    np.testing.assert_allclose(out, sample_positions(20, 9, 2.0), atol=1e-5)
    assert out[0] == pytest.approx(1.5)  # centre 9.5, four steps of 2 to the left


def test_channels_are_resampled_alone():
    array = np.random.default_rng(2).normal(size=(8, 9, 10, 3)).astype(np.float32)
    out = resample(array, (5, 12, 7), (1.6, 0.75, 1.4), 3)
    assert out.shape == (5, 12, 7, 3)
    for c in range(3):
        np.testing.assert_array_equal(out[..., c], resample(array[..., c], (5, 12, 7), (1.6, 0.75, 1.4), 3))


def test_long_axes_are_cut_into_blocks_without_a_seam():
    array = np.random.default_rng(3).normal(size=(200, 3, 130)).astype(np.float32)
    out = resample(array, (133, 3, 260), (1.5, 1, 0.5), 3)
    expected = np.clip(scipy_resample(array, (133, 3, 260), (1.5, 1, 0.5), 3), array.min(), array.max())
    np.testing.assert_allclose(out, expected, atol=2e-5)


def test_cubic_does_not_leave_the_range_of_the_input():
    step = np.zeros((16, 4, 4), np.float32)
    step[8:] = 1
    assert scipy_resample(step, (32, 4, 4), (0.5, 1, 1), 3).min() < -0.05  # the spline itself rings
    out = resample(step, (32, 4, 4), (0.5, 1, 1), 3)
    assert out.min() == 0
    assert out.max() == 1


def test_huge_values_do_not_overflow():
    array = np.random.default_rng(4).uniform(-3e38, 3e38, (8, 8, 8)).astype(np.float32)
    out = resample(array, (13, 13, 13), (0.6,) * 3, 3)
    assert np.isfinite(out).all()
    small = resample(array / np.float32(2**64), (13, 13, 13), (0.6,) * 3, 3)
    np.testing.assert_allclose(out / np.float32(2**64), small, rtol=1e-5, atol=1e13)


def test_memory_layout_does_not_change_a_bit():
    array = np.random.default_rng(5).normal(size=(20, 21, 22)).astype(np.float32)
    a = resample(array, (13, 30, 11), (1.5, 0.7, 2), 3)
    np.testing.assert_array_equal(a, resample(np.asfortranarray(array), (13, 30, 11), (1.5, 0.7, 2), 3))


def reference_labels(labels, shape, ratios):
    values = np.unique(labels)
    shares = np.stack([scipy_resample(labels == v, shape, ratios, 1) for v in values])
    return values[np.argmax(np.round(shares, 5), axis=0)]


@pytest.mark.parametrize("ratios", [(1.5, 1.5, 1.5), (0.5, 0.5, 0.5), (0.37, 2.3, 1.0)])
def test_labels_equal_argmax_of_resampled_one_hot(ratios):
    rng = np.random.default_rng(6)
    labels = (ndimage.gaussian_filter(rng.normal(size=(24, 20, 18)), 2) * 20).clip(0, 3).round().astype(np.uint8) * 7
    shape = tuple(round(n / r) for n, r in zip(labels.shape, ratios, strict=True))
    out = resample_labels(labels, shape, ratios)
    assert out.dtype == labels.dtype
    np.testing.assert_array_equal(out, reference_labels(labels, shape, ratios))


def test_label_ties_go_to_the_lower_label():
    labels = np.zeros((2, 2, 2), np.int32)
    labels[1] = 5  # one output voxel, half 0 and half 5
    assert resample_labels(labels, (1, 1, 1), (2, 2, 2)).item() == 0
    labels[0] = 9
    assert resample_labels(labels, (1, 1, 1), (2, 2, 2)).item() == 5


def test_a_label_that_rounding_alone_reaches_is_not_there():
    # Positions such as 4 + 2e-15: the slice at 5 has a crumb of that voxel's weight, and nothing else.
    labels = np.zeros((24, 24, 24), np.uint8)
    labels[5, 5:9, 5:9] = 1
    assert not resample_labels(labels, (8, 8, 8), (1.2 / 0.4,) * 3).any()
    labels[4:6] = 2
    out = resample_labels(labels, (8, 8, 8), (1.2 / 0.4,) * 3)
    np.testing.assert_array_equal(out, labels[1::3, 1::3, 1::3])


def test_single_label_and_single_voxel():
    assert (resample_labels(np.full((3, 3, 3), 4, np.uint8), (5, 2, 1), (0.6, 1.5, 3)) == 4).all()
    assert resample(np.full((1, 1, 1), 7.0), (3, 2, 1), (0.3, 0.5, 1), 3).tolist() == np.full((3, 2, 1), 7.0).tolist()


def test_slices_on_their_own_equal_each_slice_resampled():
    """nnU-Net's rule for thick slices: in the plane as ordered, along the coarse axis the nearest slice."""
    array = np.random.default_rng(7).normal(size=(20, 18, 5)).astype(np.float32)
    out = resample(array, (30, 27, 9), (20 / 30, 18 / 27, 5 / 9), (3, 3, 0))
    nearest = np.round(np.arange(9) * 5 / 9 + (5 / 9 - 1) / 2).astype(int).clip(0, 4)
    for k, source in enumerate(nearest):
        plane = scipy_resample(array[..., source : source + 1], (30, 27, 1), (20 / 30, 18 / 27, 1), 3)
        np.testing.assert_allclose(out[..., k : k + 1], plane.clip(array.min(), array.max()), atol=1e-4)
    labels = np.random.default_rng(8).integers(0, 3, (10, 11, 4)).astype(np.uint8)
    out = resample_labels(labels, (15, 7, 8), (10 / 15, 11 / 7, 0.5), (1, 1, 0))
    for k in range(8):
        plane = resample_labels(labels[..., k // 2 : k // 2 + 1], (15, 7, 1), (10 / 15, 11 / 7, 1))
        np.testing.assert_array_equal(out[..., k : k + 1], plane)


def test_bounding_box():
    mask = np.zeros((5, 6, 7), bool)
    assert bounding_box(mask) is None
    mask[1, 2, 3] = mask[3, 2, 6] = True
    assert bounding_box(mask) == (slice(1, 4), slice(2, 3), slice(3, 7))


@pytest.mark.parametrize(
    "bad", [{"order": 2}, {"order": (1, 1)}, {"order": (1, 1, 2)}, {"shape": (0, 3, 3)}, {"ratios": (1, -1, 1)}]
)
def test_bad_arguments(bad):
    arguments = {"array": np.zeros((3, 3, 3)), "shape": (2, 3, 3), "ratios": (1.5, 2, 1), "order": 1} | bad
    with pytest.raises(ValueError):
        resample(**arguments)
