"""Volumes and their geometry against nibabel and hand-made grids."""

from __future__ import annotations

import itertools
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medjax.data.volume import (
    Volume,
    axes_towards,
    check_same_grid,
    corner_distance,
    count_nonfinite,
    finite,
    shear,
)
from medjax.errors import UserError


def volume(affine=None, shape=(4, 5, 6), data=None, source="a.nii") -> Volume:
    data = np.zeros(shape, np.float32) if data is None else data
    affine = np.eye(4) if affine is None else np.asarray(affine, np.float64)
    return Volume(data, affine, Path(source), nonfinite=count_nonfinite(data))


def rotation(degrees: float) -> np.ndarray:
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    affine = np.eye(4)
    affine[:2, :2] = [[c, -s], [s, c]]
    return affine


def test_properties():
    v = volume(np.diag([-0.5, -0.75, 3.0, 1.0]), (4, 5, 6, 2), np.zeros((4, 5, 6, 2)))
    assert v.shape == (4, 5, 6)
    assert v.channels == 2
    assert v.spacing == (0.5, 0.75, 3.0)
    assert v.orientation == "LPS"


@pytest.mark.parametrize("codes", ["".join(c) for c in itertools.product("RL", "AP", "SI")] + ["SPR", "ILA", "ARI"])
@pytest.mark.parametrize("tilt", [0, 30])
def test_axes_towards_equals_nibabel(codes, tilt):
    data = np.random.default_rng(0).integers(0, 99, (3, 4, 5))
    affine = rotation(tilt) @ np.diag([2.0, 3.0, 4.0, 1.0])
    stored = nib.Nifti1Image(data.astype(np.int16), affine).as_reoriented(
        nib.orientations.ornt_transform(
            nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(tuple(codes))
        )
    )
    permutation, flips = axes_towards(stored.affine)
    back = np.asarray(stored.dataobj).transpose(permutation)[tuple(slice(None, None, -1 if f else 1) for f in flips)]
    np.testing.assert_array_equal(back, nib.as_closest_canonical(stored).get_fdata())
    # and towards the stored codes nothing is to do
    assert axes_towards(stored.affine, codes) == ((0, 1, 2), (False, False, False))


@pytest.mark.parametrize(
    ("affine", "words"),
    [
        (np.diag([1.0, 1.0, 0.0, 1.0]), "spacing along z is 0"),
        (np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "singular"),
        (np.diag([1.0, np.nan, 1.0, 1.0]), "not finite"),
        (np.eye(3), r"\[4, 4\]"),
    ],
)
def test_unusable_affine(affine, words):
    with pytest.raises(UserError, match=words) as error:
        volume(affine)
    assert "a.nii" in str(error.value)


def test_tiny_spacing_is_not_singular():
    assert volume(np.diag([1e-6, 1e-6, 1e-6, 1.0])).spacing == pytest.approx((1e-6,) * 3)


def test_shear():
    tilted = np.eye(4)
    tilted[1, 2] = np.tan(np.deg2rad(20))
    assert shear(tilted) == pytest.approx(np.sin(np.deg2rad(20)))
    assert volume(tilted @ np.diag([-1.0, 2.0, 3.0, 1.0])).voxel_volume == pytest.approx(6)  # shearing changes none
    assert shear(rotation(33) @ np.diag([1, 2, 3, 1.0])) == 0


def test_corner_distance_of_a_rotation():
    # The far corner of an (11, 1, 1) line turns by 10 mm times the chord of the angle.
    assert corner_distance(np.eye(4), rotation(60), (11, 1, 1)) == pytest.approx(10.0)


def test_same_grid(capsys):
    a = volume()
    near = np.eye(4)
    near[0, 3] = 5e-4
    check_same_grid(volume(near), a)
    assert capsys.readouterr().err == ""
    near[0, 3] = 5e-3
    check_same_grid(volume(near, source="rounded.nii"), a)
    assert "rounded.nii" in capsys.readouterr().err


def test_other_grids_name_both_files_and_the_numbers():
    with pytest.raises(UserError) as error:
        check_same_grid(volume(shape=(4, 5, 7), source="label.nii"), volume())
    assert all(word in str(error.value) for word in ("label.nii", "a.nii", "(4, 5, 7)", "(4, 5, 6)"))
    moved = np.diag([1.0, 1.0, 2.0, 1.0])
    with pytest.raises(UserError) as error:
        check_same_grid(volume(moved, source="label.nii"), volume())
    assert all(word in str(error.value) for word in ("label.nii", "a.nii", "1 x 1 x 2", "1 x 1 x 1", "5 mm"))


def test_finite_policies():
    data = np.ones((2, 2, 3), np.float32)
    data[0, 0, 0], data[1, 1, 1], data[0, 1, 2] = np.nan, np.inf, -np.inf
    v = volume(data=data, source="bad.nii")
    assert v.nonfinite == 3
    with pytest.raises(UserError, match=r"bad\.nii: 3 of 12 .*nonfinite='zero'"):
        finite(v)
    cured = finite(v, "zero")
    assert cured.nonfinite == 0
    assert cured.data.sum() == 9
    assert np.isnan(data[0, 0, 0])  # the source is left alone
    with pytest.raises(UserError, match="ignore"):
        finite(v, "ignore")


def test_count_nonfinite_survives_an_overflowing_sum():
    assert count_nonfinite(np.full((4, 4, 4), 1e308)) == 0
    assert count_nonfinite(np.array([np.inf, -np.inf, 1.0])) == 2
    assert count_nonfinite(np.arange(5)) == 0
