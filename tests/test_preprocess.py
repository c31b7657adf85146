"""Preparation and the way back: exact where nothing is resampled, on the file's own grid always."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medjax.data import nifti
from medjax.data.cohort import Case, Cohort
from medjax.data.preprocess import (
    DEFAULT_SPEC,
    Geometry,
    Plan,
    check_spec,
    compare_intensities,
    fit,
    prepare_case,
)
from medjax.data.volume import Volume
from medjax.errors import UserError

CODES = ["".join(c) for p in itertools.permutations(("RL", "AP", "SI")) for c in itertools.product(*p)]


def plan(modalities=("T1",), normalize="none", **changes) -> Plan:
    base = Plan(tuple(modalities), {}, "RAS", None, None, dict.fromkeys(modalities, normalize))
    return dataclasses.replace(base, **changes)


def volume(data: np.ndarray, affine=None, name: str = "a.nii.gz") -> Volume:
    return Volume(data, np.eye(4) if affine is None else np.asarray(affine, np.float64), Path(name))


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(100, 30, shape).astype(np.float32)


def save(path: Path, data: np.ndarray, affine=None) -> Path:
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return path


def cohort_of(*cases: Case, modalities=("T1",), labels=None) -> Cohort:
    return Cohort("toy", Path("."), tuple(modalities), labels or {}, cases)


def blobs(shape) -> np.ndarray:
    rng = np.random.default_rng(1)
    return (ndimage.gaussian_filter(rng.normal(size=shape), 2) * 15).clip(0, 2).round().astype(np.uint8)


# -------------------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize("codes", CODES)
def test_every_orientation_gives_the_same_array_and_finds_its_way_back(codes):
    """Resampled, cropped and normalised: bit for bit, whatever order the file stores its axes in."""
    data, labels = noise(12, 13, 14), blobs((12, 13, 14))
    data[:2], data[:, :, 11:] = 0, 0
    affine = nib.affines.from_matvec(np.diag([1.1, 0.9, 2.0]), [-5, 6, 7])
    turn = nib.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], nib.orientations.axcodes2ornt(tuple(codes)))
    stored_data = nib.orientations.apply_orientation(data, turn)
    stored_labels = nib.orientations.apply_orientation(labels, turn)
    stored_affine = affine @ nib.orientations.inv_ornt_aff(turn, data.shape)
    stored = volume(np.asfortranarray(stored_data), stored_affine)
    assert stored.orientation == codes

    exact = plan().apply(stored, {"seg": volume(stored_labels, stored_affine)})
    np.testing.assert_array_equal(exact.image[..., 0], data)
    np.testing.assert_array_equal(exact.targets["seg"], labels)
    np.testing.assert_allclose(exact.geometry.affine, affine, atol=1e-12)
    np.testing.assert_array_equal(exact.geometry.to_original(exact.image, None)[..., 0], stored_data)
    np.testing.assert_array_equal(exact.geometry.label_map_to_original(labels), stored_labels)

    spec = plan(normalize="zscore_nonzero", crop="nonzero", spacing=(1.5, 1.2, 1.0))
    here = spec.apply(stored, {"seg": volume(stored_labels, stored_affine)})
    ras = spec.apply(volume(data, affine), {"seg": volume(labels, affine)})
    np.testing.assert_array_equal(here.image, ras.image)
    np.testing.assert_array_equal(here.targets["seg"], ras.targets["seg"])
    np.testing.assert_allclose(here.geometry.affine, ras.geometry.affine, atol=1e-12)
    prob = np.random.default_rng(2).random((*here.image.shape[:3], 3)).astype(np.float32)
    back = nib.orientations.apply_orientation(ras.geometry.to_original(prob), turn)
    np.testing.assert_array_equal(here.geometry.to_original(prob), back)


@pytest.mark.real
def test_one_brain_in_48_orientations(data_root):
    """In the files only the order of axes differs, so one prepared array and one place in the world must come out."""
    files = sorted((data_root / "odd_files" / "real" / "orient48").glob("*.nii.gz"))
    assert len(files) == 48
    spec = plan(normalize="zscore", crop="nonzero", spacing=(4.0, 5.0, 3.0))
    first = None
    for file in files:
        prepared = prepare_case(Case(file.stem, file.stem, {"T1": file}), spec)
        assert nifti.read(file).orientation == file.name[:3]
        if first is None:
            first = prepared
            continue
        np.testing.assert_array_equal(prepared.image, first.image, err_msg=file.name)
        np.testing.assert_allclose(prepared.geometry.affine, first.geometry.affine, atol=1e-3, err_msg=file.name)
        # and back: the same world positions, shown by nibabel's own reorientation
        if file.name[:3] in ("LPS", "SAR", "IPL"):
            back = prepared.geometry.to_original(prepared.image, None)[..., 0]
            image = nib.as_closest_canonical(nib.Nifti1Image(back, nib.load(file).affine))
            ras = first.geometry.to_original(first.image, None)[..., 0]
            ras = nib.as_closest_canonical(nib.Nifti1Image(ras, np.array(first.geometry.original_affine)))
            np.testing.assert_array_equal(image.get_fdata(), ras.get_fdata())


def test_oblique_stays_oblique_and_world_positions_hold():
    turn = nib.eulerangles.euler2mat(z=0.4, y=0.2, x=-0.3) @ np.diag([1.0, 1.5, 3.0])
    affine = nib.affines.from_matvec(turn, [10, -20, 30])
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in (20, 18, 12)), indexing="ij"), -1)
    world_x = nib.affines.apply_affine(affine, grid)[..., 0].astype(np.float32)  # each voxel holds its own x in mm
    stored = volume(world_x[::-1], affine @ np.array([[-1, 0, 0, 19], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]))
    prepared = plan(spacing=(2.0, 2.0, 2.0)).apply(stored)
    shape = prepared.image.shape[:3]
    inside = tuple(slice(3, -3) for _ in range(3))
    places = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    expected = nib.affines.apply_affine(prepared.geometry.affine, places)[..., 0]
    np.testing.assert_allclose(prepared.image[..., 0][inside], expected[inside], atol=2e-2)
    np.testing.assert_allclose(prepared.geometry.spacing, (2, 2, 2))
    back = prepared.geometry.to_original(prepared.image, None)[..., 0]
    np.testing.assert_allclose(back[inside], stored.data[inside], atol=2e-2)


# --------------------------------------------------------------------------------------------- crop and resample


def test_crop_keeps_the_box_of_any_channel_and_back_fills_background():
    data = np.zeros((10, 9, 8, 2), np.float32)
    data[2:5, 3:6, 1:4, 0] = noise(3, 3, 3)
    data[4:8, 4:5, 2:6, 1] = noise(4, 1, 4)
    prepared = plan(("T1", "T2"), crop="nonzero").apply(volume(data))
    np.testing.assert_array_equal(prepared.image, data[2:8, 3:6, 1:6])
    prob = np.random.default_rng(0).dirichlet((1, 1, 1), prepared.image.shape[:3]).astype(np.float32)
    back = prepared.geometry.to_original(prob)
    np.testing.assert_array_equal(back[2:8, 3:6, 1:6], prob)
    np.testing.assert_allclose(back.sum(-1), 1, atol=1e-6)
    assert (back[0, 0, 0] == (1, 0, 0)).all()
    assert not prepared.geometry.to_original(prob, None)[0, 0, 0].any()
    np.testing.assert_array_equal(prepared.geometry.labels_to_original(prob), back.argmax(-1))
    regions = prepared.geometry.regions_to_original(prob)
    assert regions.dtype == bool
    np.testing.assert_array_equal(regions, prepared.geometry.to_original(prob, None) > 0.5)


def test_prepared_shape_and_spacing_follow_the_target():
    case = volume(noise(30, 40, 10), np.diag([-0.5, 0.75, 4.0, 1.0]))
    prepared = plan(spacing=(1.0, 1.0, 2.0)).apply(case)
    assert prepared.image.shape == (15, 30, 20, 1)
    np.testing.assert_allclose(prepared.geometry.spacing, (1, 1, 2), rtol=1e-12)
    # The middle of the two fields of view is one place in the world.
    middle = nib.affines.apply_affine(prepared.geometry.affine, (np.array((15, 30, 20)) - 1) / 2)
    np.testing.assert_allclose(middle, nib.affines.apply_affine(case.affine, (np.array((30, 40, 10)) - 1) / 2))


def test_nearly_the_same_spacing_is_not_resampled():
    data = noise(9, 9, 9)
    prepared = plan(spacing=(1.0, 1.0, 1.0)).apply(volume(data, np.diag([1.0005, 0.9999999, 1.0, 1.0])))
    np.testing.assert_array_equal(prepared.image[..., 0], data)
    assert prepared.geometry.spacing[0] == pytest.approx(1.0005)  # the truth is kept


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 12)] * 3).filter(lambda s: sum(n > 1 for n in s) > 1),
    spacing=st.tuples(*[st.floats(0.3, 5)] * 3),
    target=st.tuples(*[st.floats(0.3, 5)] * 3),
)
def test_any_grid_comes_back_onto_itself(shape, spacing, target):
    data = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    prepared = plan(spacing=target).apply(volume(data, np.diag([*spacing, 1.0])))
    assert prepared.geometry.to_original(np.ones((*prepared.image.shape[:3], 2), np.float32)).shape == (*shape, 2)
    np.testing.assert_allclose(
        prepared.geometry.to_original(np.ones((*prepared.image.shape[:3], 1), np.float32)), 1, atol=1e-5
    )


def test_thick_slices_are_resampled_on_their_own():
    """As nnU-Net does above a ratio of 3: no blending across slices, on the way there and back."""
    case = volume(noise(16, 18, 6), np.diag([1.0, 1.0, 8.0, 1.0]))
    labels = blobs((16, 18, 6))
    thick = plan(spacing=(0.8, 0.8, 4.0), anisotropy=3.0).apply(case, {"seg": volume(labels, case.affine)})
    assert thick.geometry.coarse == 2
    assert thick.image.shape[:3] == (20, 22, 12)
    np.testing.assert_array_equal(thick.image[:, :, 0::2], thick.image[:, :, 1::2])  # each slice twice
    np.testing.assert_array_equal(thick.targets["seg"][:, :, 0::2], thick.targets["seg"][:, :, 1::2])
    blended = plan(spacing=(0.8, 0.8, 4.0)).apply(case)
    assert blended.geometry.coarse is None
    assert np.abs(blended.image[:, :, 2] - blended.image[:, :, 3]).max() > 1
    assert Geometry.from_json(thick.geometry.to_json()) == thick.geometry
    prob = np.random.default_rng(0).dirichlet((1, 1), (20, 22, 12)).astype(np.float32)
    prob[:, :, 5] = prob[:, :, 4]
    back = thick.geometry.to_original(prob)
    np.testing.assert_allclose(back.sum(-1), 1, atol=1e-5)
    alone = dataclasses.replace(thick.geometry, original_shape=(16, 18, 1), crop_shape=(16, 18, 1), shape=(20, 22, 1))
    alone = dataclasses.replace(alone, ratios=(*thick.geometry.ratios[:2], 1.0))
    np.testing.assert_allclose(back[:, :, 2:3], alone.to_original(prob[:, :, 4:5]), atol=1e-5)
    assert (thick.geometry.label_map_to_original(thick.targets["seg"]) == labels).mean() > 0.97


@pytest.mark.parametrize("slices", [20, 30])
def test_how_many_slices_there_are_does_not_say_how_they_are_resampled(slices):
    case = volume(noise(8, 8, slices), np.diag([1.0, 1.0, 5.0, 1.0]))
    spec = plan(spacing=(1.0, 1.0, 5.1), anisotropy=3.0)
    prepared = spec.apply(case)
    assert prepared.image.shape[2] == {20: 20, 30: 29}[slices]
    own = plan().apply(case).image
    stored = {own[:, :, i].tobytes() for i in range(slices)}
    assert {prepared.image[:, :, i].tobytes() for i in range(prepared.image.shape[2])} <= stored  # none is a blend
    same = plan(spacing=(1.0, 1.0, 5.0), anisotropy=3.0).apply(case)
    assert same.geometry.same_grid
    np.testing.assert_array_equal(same.image, own)


@pytest.mark.parametrize(
    ("edges", "target", "coarse"),
    [
        ((1, 1, 3), (1, 1, 1), None),  # not above the ratio
        ((1, 1, 3.1), (1, 1, 1), 2),
        ((5, 1, 1), (1, 1, 1), 0),
        ((0.24, 1.25, 1.25), (1, 1, 1), None),  # two long edges make no slices
        ((1, 1, 1), (1, 1, 5), 2),  # else the target's voxels decide
        ((1, 1, 5), (1, 1, 5), None),  # nothing to resample
        ((1, 1, 5), (1, 1, 5.1), 2),  # though 9 slices stay 9
    ],
)
def test_which_axis_is_coarse(edges, target, coarse):
    spec = plan(spacing=tuple(float(s) for s in target), anisotropy=3.0)
    assert spec.geometry((9, 9, 9), np.diag([*map(float, edges), 1.0])).coarse == coarse


def test_linear_interpolation_where_it_is_asked_for():
    ramp = np.broadcast_to(np.arange(12, dtype=np.float32)[:, None, None], (12, 4, 4)).copy()
    ramp[6:] += 50
    cubic, linear = (plan(spacing=(0.5, 1.0, 1.0), order=o).apply(volume(ramp)).image[:, 0, 0, 0] for o in (3, 1))
    np.testing.assert_allclose(linear, np.interp(np.arange(24) / 2 - 0.25, np.arange(12), ramp[:, 0, 0]), atol=1e-4)
    assert np.abs(cubic - linear).max() > 1


def test_labels_round_trip_through_resampling():
    labels = np.kron(blobs((12, 12, 12)), np.ones((3, 3, 3), np.uint8))
    prepared = plan(spacing=(1.5, 1.5, 1.5)).apply(volume(noise(36, 36, 36)), {"seg": volume(labels)})
    back = prepared.geometry.label_map_to_original(prepared.targets["seg"])
    one_hot = np.eye(3, dtype=np.float32)[prepared.targets["seg"]]
    assert (prepared.geometry.labels_to_original(one_hot) == back).mean() > 0.999
    for value in (1, 2):
        a, b = back == value, labels == value
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.95


def test_target_dtype():
    data = noise(4, 4, 4)
    for top, dtype in ((2, np.uint8), (2035, np.uint16), (70_000, np.int32)):
        labels = np.zeros((4, 4, 4), np.int64)
        labels[0, 0, 0] = top
        assert plan().apply(volume(data), {"seg": volume(labels)}).targets["seg"].dtype == dtype


def test_large_label_values_survive_resampling(tmp_path):
    """Parcellations number structures up to 12175 and skip most numbers; scaling leaves ones a hair off."""
    ids = np.array([0, 2, 1035, 2035, 12175])
    labels = np.kron(blobs((8, 8, 8)) + (blobs((8, 8, 8)) > 1) * 2, np.ones((3, 3, 3), int))
    image = save(tmp_path / "a.nii.gz", noise(24, 24, 24))
    mask = save(tmp_path / "m.nii.gz", ids[labels].astype(np.float32) * np.float32(0.99999997))
    case = Case("a", "a", {"T1": image}, {"seg": mask})
    spec = plan(spacing=(1.5, 1.5, 1.5), labels={str(i): int(i) for i in ids[1:]})
    out = prepare_case(case, spec).targets["seg"]
    assert out.dtype == np.uint16
    assert set(np.unique(out)) <= set(ids.tolist())
    assert out.max() == 12175


def test_labels_outside_the_crop_are_told(capsys, monkeypatch):
    monkeypatch.setattr("medjax.errors._said", set())
    data, labels = np.zeros((6, 6, 6), np.float32), np.zeros((6, 6, 6), np.uint8)
    data[2:4, 2:4, 2:4] = noise(2, 2, 2)
    labels[0, 0, :3] = 1
    plan(crop="nonzero").apply(volume(data), {"seg": volume(labels, name="mask.nii")})
    assert "mask.nii: 3 labelled voxels" in capsys.readouterr().err


@pytest.mark.real
@pytest.mark.parametrize("name", ["tiny_7x5x3", "tiny_4x5x7_aniso", "single_slice_lax"])
@pytest.mark.parametrize("spacing", [None, (1.5, 1.5, 1.5), (9.0, 9.0, 9.0)])
def test_tiny_files(data_root, name, spacing):
    file = data_root / "odd_files" / "real" / f"{name}.nii.gz"
    prepared = prepare_case(Case("a", "a", {"T1": file}), plan(spacing=spacing))
    assert prepared.geometry.to_original(prepared.image, None).shape[:3] == nib.load(file).shape
    if spacing is None:
        back = prepared.geometry.to_original(prepared.image, None)[..., 0]
        np.testing.assert_array_equal(back, nib.load(file).get_fdata())


# ------------------------------------------------------------------------------------------------- normalisation


def test_zscore():
    out = plan(normalize="zscore").apply(volume(noise(9, 8, 7) * 1e4)).image
    assert out.mean() == pytest.approx(0, abs=1e-5)
    assert out.std() == pytest.approx(1, abs=1e-5)


def test_zscore_nonzero_leaves_zeros():
    data = noise(9, 8, 7)
    data[:4] = 0
    out = plan(normalize="zscore_nonzero").apply(volume(data)).image[..., 0]
    expected = (data[4:] - data[4:].mean(dtype=np.float64)) / data[4:].std(dtype=np.float64)
    np.testing.assert_allclose(out[4:], expected, atol=1e-5)
    assert not out[:4].any()
    resampled = plan(normalize="zscore_nonzero", spacing=(0.5, 0.5, 0.5)).apply(volume(data)).image[..., 0]
    assert not resampled[:8].any()  # ringing of the spline into the zeros is masked


def test_zscore_nonzero_of_voxels_that_resampling_loses(tmp_path):
    data = np.zeros((16, 16, 16), np.float32)
    data[0, 0, 0], data[8, 8, 8] = 5, 9
    case = Case("a", "a", {"T1": save(tmp_path / "pet.nii.gz", data)})
    with pytest.raises(
        UserError, match=r"pet\.nii\.gz: its few voxels that are not 0 are lost .*Choose a finer spacing"
    ):
        prepare_case(case, plan(normalize="zscore_nonzero", spacing=(4.0, 4.0, 4.0)))
    assert prepare_case(case, plan(normalize="zscore_nonzero")).image.any()


def test_percentile():
    data = noise(20, 20, 20)
    data[0, 0, 0] = 1e9  # one hot pixel must not flatten the rest
    out = plan(normalize="percentile").apply(volume(data)).image
    low, high = np.percentile(data, (0.5, 99.5))
    np.testing.assert_allclose(out[..., 0], (np.clip(data, low, high) - low) / (high - low), atol=1e-5)
    assert (out.min(), out.max()) == (0, 1)
    sparse = np.zeros((20, 20, 20), np.float32)
    sparse[3, 3, 3] = 5  # percentiles coincide: the range is used
    assert plan(normalize="percentile").apply(volume(sparse)).image.max() == 1


def test_none_is_exact():
    data = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    np.testing.assert_array_equal(plan().apply(volume(data)).image[..., 0], data)


def test_ct_uses_the_training_foreground(tmp_path):
    rng = np.random.default_rng(0)
    cases, inside = [], []
    for i in range(3):
        data = rng.normal(-900, 50, (10, 10, 10)).astype(np.float32)
        labels = np.zeros((10, 10, 10), np.uint8)
        labels[2:6, 3:8, 1:9] = 1
        data[labels > 0] = rng.normal(40 + i, 20, (labels > 0).sum())
        inside.append(data[labels > 0])
        image, mask = save(tmp_path / f"{i}.nii.gz", data), save(tmp_path / f"{i}_m.nii.gz", labels)
        cases.append(Case(str(i), str(i), {"CT": image}, {"seg": mask}))
    cohort = cohort_of(*cases, modalities=("CT",), labels={"organ": 1})
    fitted = fit({"normalize": "ct"}, cohort, cases)
    pooled = np.concatenate(inside).astype(np.float64)
    low, high = np.percentile(pooled, (0.5, 99.5))
    assert fitted.foreground["CT"] == pytest.approx(
        {"lower": low, "upper": high, "mean": pooled.mean(), "std": pooled.std()}, rel=1e-6
    )
    out = prepare_case(cases[0], fitted).image[..., 0]
    raw = nib.load(cases[0].images["CT"]).get_fdata()
    np.testing.assert_allclose(out, (raw.clip(low, high) - pooled.mean()) / pooled.std(), atol=1e-4)
    with pytest.raises(UserError, match="'ct' for CT needs masks"):
        fit({"normalize": "ct"}, cohort, [dataclasses.replace(c, targets={}) for c in cases])


# ------------------------------------------------------------------------------------------------- spec and plan


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"spacng": None}, "unknown key 'spacng'; did you mean 'spacing'"),
        ({"normalize": "z-score"}, "'z-score' for T1; did you mean 'zscore'"),
        ({"normalize": {"T1": "zscore"}}, "no normalisation for modality 'T2'"),
        ({"normalize": {"T1": "zscore", "T3": "ct", "T2": "ct"}}, "'T3'; did you mean 'T"),
        ({"orientation": "RAX"}, "orientation='RAX'"),
        ({"orientation": "RAR"}, "orientation='RAR'"),
        ({"orientation": "RASI"}, "orientation='RASI'"),
        ({"spacing": (1, 1)}, "spacing"),
        ({"spacing": (1, 0, 1)}, "spacing"),
        ({"spacing": "mean"}, "spacing='mean'"),
        ({"crop": "non-zero"}, "crop='non-zero'; did you mean 'nonzero'"),
        ({"nonfinite": "ignore"}, "nonfinite='ignore'"),
        ({"order": 2}, "order=2: images are resampled with 1"),
        ({"anisotropy": 0.5}, "anisotropy=0.5"),
        ({"anisotropy": "3"}, "anisotropy='3'"),
    ],
)
def test_bad_specs(spec, words):
    with pytest.raises(UserError, match=words):
        check_spec(spec, ("T1", "T2"))


def test_spec_defaults_and_orientations():
    assert check_spec({}, ("T1",)) == DEFAULT_SPEC | {"normalize": {"T1": "zscore"}}
    for codes in CODES:
        assert check_spec({"orientation": codes}, ("T1",))["orientation"] == codes


def test_fit_median_spacing_and_shape(tmp_path):
    cases = []
    for i, (spacing, shape) in enumerate((((1, 2, 3), (8, 6, 4)), ((2, 2, 5), (6, 6, 6)), ((1.5, 1, 4), (5, 8, 7)))):
        affine = np.diag([*(float(s) for s in spacing), 1.0])[:, [2, 0, 1, 3]]  # stored (z, x, y)
        data = noise(*(shape[k] for k in (2, 0, 1)))
        cases.append(Case(str(i), str(i), {"T1": save(tmp_path / f"{i}.nii.gz", data, affine)}))
    fitted = fit({"spacing": "median"}, cohort_of(*cases), cases)
    assert fitted.spacing == (1.5, 2.0, 4.0) == fitted.median_spacing
    # shapes at that spacing: (5, 6, 3), (8, 6, 8), (5, 4, 7)
    assert fitted.median_shape == (5, 6, 7)
    for case in cases:
        assert prepare_case(case, fitted).image.shape[:3] == fitted.prepared_shape(case)
    with pytest.raises(UserError, match="no training cases"):
        fit({}, cohort_of(*cases), [])


def test_plan_and_geometry_survive_json(tmp_path):
    case = Case("a", "a", {"T1": save(tmp_path / "a.nii.gz", noise(7, 8, 9), np.diag([-1.1, 0.3, 2.7, 1]))})
    for spacing in ("median", None, (1, 1, 1)):
        fitted = fit({"spacing": spacing, "normalize": "zscore"}, cohort_of(case, labels={"x": 1}), [case])
        assert Plan.from_json(fitted.to_json()) == fitted
        assert Plan.from_json(json.loads(fitted.to_json())) == fitted
        geometry = prepare_case(case, fitted).geometry
        assert Geometry.from_json(geometry.to_json()) == geometry
    old = json.loads(fitted.to_json()) | {"version": 0}
    with pytest.raises(UserError, match="version 0"):
        Plan.from_json(old)


# ------------------------------------------------------------------------------------------------------ bad cases


def test_constant_and_empty_images_name_the_file(tmp_path):
    ones = save(tmp_path / "ones.nii.gz", np.ones((4, 4, 4), np.uint8))
    with pytest.raises(UserError, match=r"ones\.nii\.gz: the image is constant \(every voxel is 1\)"):
        prepare_case(Case("a", "a", {"T1": ones}), plan())
    zeros = save(tmp_path / "zeros.nii.gz", np.zeros((4, 4, 4), np.uint8))
    with pytest.raises(UserError, match=r"zeros\.nii\.gz: the image is 0 everywhere"):
        prepare_case(Case("a", "a", {"T1": zeros}), plan(crop="nonzero"))
    good = save(tmp_path / "good.nii.gz", noise(4, 4, 4))
    with pytest.raises(UserError, match=r"ones\.nii\.gz"):  # of two channels the constant one is named
        prepare_case(Case("a", "a", {"T1": good, "T2": ones}), plan(("T1", "T2")))
    binary = save(tmp_path / "binary.nii.gz", np.eye(4, dtype=np.uint8)[..., None].repeat(4, 2))
    with pytest.raises(UserError, match=r"binary\.nii\.gz: constant where normalize='zscore_nonzero'"):
        prepare_case(Case("a", "a", {"T1": binary}), plan(normalize="zscore_nonzero"))


def test_nonfinite_values(tmp_path):
    data = noise(4, 4, 4)
    data[0, 0, 0], data[1, 1, 1] = np.nan, -np.inf
    case = Case("a", "a", {"T1": save(tmp_path / "nan.nii.gz", data)})
    with pytest.raises(UserError, match=r"nan\.nii\.gz: 2 of 64 values .*data\.preprocess\.nonfinite='zero'"):
        prepare_case(case, plan())
    out = prepare_case(case, plan(nonfinite="zero")).image[..., 0]
    np.testing.assert_array_equal(out, np.where(np.isfinite(data), data, 0))


def test_values_beyond_float32(tmp_path):
    case = Case("a", "a", {"T1": save(tmp_path / "huge.nii.gz", noise(4, 4, 4).astype(np.float64) * 1e300)})
    with pytest.raises(UserError, match=r"huge\.nii\.gz: values beyond the range of float32"):
        prepare_case(case, plan())


def test_missing_modality(tmp_path):
    case = Case("a", "a", {"T1": save(tmp_path / "a.nii.gz", noise(4, 4, 4))})
    with pytest.raises(UserError, match="case a: lacks modality T2"):
        prepare_case(case, plan(("T1", "T2")))
    prepared = prepare_case(case, plan(("T2", "T1"), "zscore", missing="zero"))
    assert prepared.present == (False, True)
    assert not prepared.image[..., 0].any()
    assert prepared.image[..., 1].std() == pytest.approx(1, abs=1e-5)


def test_labels_are_checked_against_image_and_declaration(tmp_path):
    image = save(tmp_path / "image.nii.gz", noise(4, 4, 4))
    labels = np.zeros((4, 4, 4), np.uint8)
    labels[0, 0, 0] = 3
    mask = save(tmp_path / "mask.nii.gz", labels)
    case = Case("a", "a", {"T1": image}, {"seg": mask, "age": 41.0})
    assert set(prepare_case(case, plan()).targets) == {"seg"}
    assert prepare_case(case, plan(), tasks=()).targets == {}
    with pytest.raises(UserError, match=r"mask\.nii\.gz: undeclared label 3"):
        prepare_case(case, plan(labels={"x": 1}))
    save(tmp_path / "mask.nii.gz", labels, np.diag([1, 1, 3, 1.0]))
    with pytest.raises(UserError, match=r"mask\.nii\.gz: same shape as .*image\.nii\.gz but another place"):
        prepare_case(case, plan())


def test_wrong_number_of_channels():
    with pytest.raises(UserError, match=r"a\.nii\.gz: 3 channels, but the plan has 1 modalities \(T1\)"):
        plan().apply(volume(noise(4, 4, 4, 3)))


def test_wild_intensities_are_told_once(capsys, monkeypatch):
    monkeypatch.setattr("medjax.errors._said", set())
    compare_intensities({"a": (100.0, 5.0), "b": (1.5e6, 6.0), "c": (120.0, 0.0)}, ("T1", "T2"))
    told = capsys.readouterr().err
    assert told.count("T1: intensities differ wildly") == 1
    assert "1.5e+06 in b" in told
    assert "T2" not in told


@pytest.mark.real
def test_real_hippocampus_intensities(data_root, capsys, monkeypatch):
    monkeypatch.setattr("medjax.errors._said", set())
    folder = data_root / "hippocampus"
    names = [e["image"] for e in json.loads((folder / "dataset.json").read_text())["training"]]
    scales = {n: prepare_case(Case(n, n, {"MRI": folder / n}), plan(("MRI",), "zscore")).scale for n in names[:60]}
    compare_intensities(scales, ("MRI",))
    assert "differ wildly" in capsys.readouterr().err


@pytest.mark.real
def test_real_brats_case_back_on_its_own_grid(data_root, tmp_path):
    """From four files to a written prediction: the mask itself as the model's answer must score as the mask."""
    folder = data_root / "brats_4mod" / "BraTS-GLI-00001-000"
    names = ("t1n", "t1c", "t2w", "t2f")
    mask = folder / "seg-BraTS23_1.nii.gz"
    case = Case("a", "a", {m: folder / f"{m}.nii.gz" for m in names}, {"seg": mask})
    cohort = cohort_of(case, modalities=names, labels={"a": 1, "b": 2, "c": 3})
    fitted = fit({"crop": "nonzero", "normalize": "zscore_nonzero"}, cohort, [case])
    prepared = prepare_case(case, fitted)
    assert prepared.image.shape[:3] < (240, 240, 155)
    like = nifti.read(case.images["t1n"])
    nifti.write(tmp_path / "pred.nii.gz", prepared.geometry.label_map_to_original(prepared.targets["seg"]), like)
    back, truth = nib.load(tmp_path / "pred.nii.gz"), nib.load(mask)
    np.testing.assert_array_equal(np.asanyarray(back.dataobj), np.asanyarray(truth.dataobj))
    np.testing.assert_array_equal(back.affine, nib.load(case.images["t1n"]).affine)
