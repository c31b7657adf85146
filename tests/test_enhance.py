"""Enhancement against analytic answers, the definitions written out, and the libraries it stands on."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from medjax.data import enhance
from medjax.data.cases import Case, Cohort
from medjax.data.preprocess import Plan, check_spec, fit, prepare_case
from medjax.data.volume import Volume
from medjax.errors import UserError


def apply(values: np.ndarray, step, spacing=(1.0, 1.0, 1.0), **changes) -> np.ndarray:
    (full,) = enhance.check((step,), ("T1",))
    return enhance.run(values, "T1", [{**full, **changes}], spacing, "a.nii.gz")


def spheres(shape=(48, 44, 40)) -> np.ndarray:
    """Tissue classes 0 (background), 1 and 2: two nested balls."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    distance = np.sqrt((grid**2).sum(0))
    return (distance < 0.9).astype(np.uint8) + (distance < 0.5)


def save(path: Path, data: np.ndarray, affine=None) -> Path:
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return path


# ------------------------------------------------------------------------------------------------ the spec


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ("median", r"give a tuple of steps, such as \('n4',\)"),
        (("meadian",), "unknown step 'meadian'; did you mean 'median'"),
        ((3,), "a step is a name or a table"),
        (({"radius": 2},), "unknown step None"),
        (({"name": "median", "radios": 2},), "median: unknown key 'radios'; did you mean 'radius'"),
        (({"name": "median", "radius": 1.5},), "one or three whole numbers"),
        (({"name": "median", "radius": (1, 1)},), "one or three whole numbers"),
        (({"name": "median", "modalities": ("T9",)},), "unknown key 'T9'; did you mean 'T"),
        (({"name": "nyul", "percentiles": (10, 5)},), "percentiles=.* must rise"),
        (({"name": "nyul", "mask": "brain"},), "mask='brain'"),
        (("window",), "give a window's name, or low below high"),
        (("window:lungs",), "unknown window 'lungs'; did you mean 'lung'"),
        (({"name": "window", "low": 5, "high": 5},), "low below high"),
        (({"name": "window", "window": "lung", "low": 5},), "choose one"),
        (("brain",), "mask='' must be the modality that holds the brain mask"),
        (("brain:T9",), "mask='T9' must be the modality .*did you mean 'T"),
        (("body:x",), "body: unknown key 'option'"),
    ],
)
def test_bad_steps(steps, words):
    with pytest.raises(UserError, match=f"data.preprocess.enhance.*{words}"):
        check_spec({"enhance": steps}, ("T1", "T2"))


def test_a_missing_library_is_named_with_its_cure(monkeypatch):
    for step, package, pip in (("n4", "SimpleITK", "SimpleITK"), ("nlm", "skimage", "scikit-image")):
        monkeypatch.setitem(sys.modules, package, None)
        enhance._require.cache_clear()
        with pytest.raises(UserError, match=f"{step} needs {pip}, which is not installed: pip install {pip}"):
            check_spec({"enhance": (step,)}, ("T1",))
    enhance._require.cache_clear()


def test_steps_are_json_and_complete():
    steps = enhance.check(({"name": "median", "radius": (1, 1, 0)}, "window:lung", "brain:mask"), ("T1", "mask"))
    assert json.loads(json.dumps(steps)) == list(steps)
    assert [s["modalities"] for s in steps] == [["T1"]] * 3  # the mask itself is not enhanced
    assert (steps[1]["low"], steps[1]["high"]) == (-1350, 150)


# ------------------------------------------------------------------------------------------- steps one by one


@pytest.mark.parametrize("name", enhance.WINDOWS)
def test_windows_keep_hu_inside_and_clip_outside(name):
    low, high = enhance.WINDOWS[name]
    assert low < high
    hu = np.linspace(-2000, 3000, 4 * 5 * 6, dtype=np.float32).reshape(4, 5, 6)
    np.testing.assert_array_equal(apply(hu, f"window:{name}"), np.clip(hu, low, high))
    np.testing.assert_array_equal(apply(hu, {"name": "window", "low": low, "high": high}), np.clip(hu, low, high))


def test_windows_are_level_and_width():
    """Level and width as read on a scanner's console."""
    table = {"lung": (1500, -600), "bone": (1800, 400), "brain": (80, 40), "soft_tissue": (400, 50), "liver": (150, 30)}
    for name, (width, level) in table.items():
        assert enhance.WINDOWS[name] == (level - width / 2, level + width / 2)


def test_median_is_the_median_of_the_box():
    values = np.random.default_rng(0).normal(size=(7, 8, 6)).astype(np.float32)
    out = apply(values, {"name": "median", "radius": (1, 2, 0)})
    assert out[3, 4, 2] == np.median(values[2:5, 2:7, 2])
    salt = np.zeros((9, 9, 9), np.float32)
    salt[4, 4, 4] = 1000
    assert not apply(salt, "median").any()


def test_nyul_maps_landmarks_exactly_and_linearly_between():
    rng = np.random.default_rng(0)
    images = [(rng.gamma(2, 30 * k, (20, 20, 20)) + 5 * k).astype(np.float32) for k in (1, 2, 4)]
    (step,) = enhance.check(({"name": "nyul", "mask": "all"},), ("T1",))
    marks = [enhance.landmarks(image, step, "a") for image in images]
    learnt = enhance.learn(step, [{"T1": m} for m in marks])
    scale = np.array(learnt["scales"]["T1"])
    # By the paper: each image's ends to 0 and 100, then the mean of the landmarks.
    np.testing.assert_allclose(scale, np.mean([100 * (m - m[0]) / (m[-1] - m[0]) for m in marks], axis=0))
    for image, own in zip(images, marks, strict=True):
        out = enhance.run(image, "T1", [learnt], (1, 1, 1), "a")
        np.testing.assert_allclose(np.percentile(out, step["percentiles"]), scale, atol=1e-3)
        inside = (image > own[3]) & (image < own[4])
        slope = (scale[4] - scale[3]) / (own[4] - own[3])
        np.testing.assert_allclose(out[inside], scale[3] + (image[inside] - own[3]) * slope, atol=1e-3)
        above = image > own[-1]
        slope = (scale[-1] - scale[-2]) / (own[-1] - own[-2])
        np.testing.assert_allclose(out[above], scale[-1] + (image[above] - own[-1]) * slope, rtol=1e-4)
        assert (np.diff(out.ravel()[np.argsort(image.ravel(), kind="stable")]) >= -1e-4).all()  # order is kept


def test_nyul_undoes_a_change_of_scale():
    rng = np.random.default_rng(1)
    image = rng.gamma(2, 30, (20, 20, 20)).astype(np.float32)
    image[:5] = 0
    (step,) = enhance.check(({"name": "nyul", "mask": "nonzero"},), ("T1",))
    learnt = enhance.learn(step, [{"T1": enhance.landmarks(image, step, "a")}])
    one, other = (enhance.run(image * k, "T1", [learnt], (1, 1, 1), "a") for k in (1, 37))
    np.testing.assert_allclose(one, other, atol=1e-3)
    assert not one[:5].any()


def test_nyul_of_few_values_and_of_one():
    few = np.random.default_rng(2).integers(0, 3, (9, 9, 9)).astype(np.float32)
    (step,) = enhance.check(({"name": "nyul", "mask": "all"},), ("T1",))
    learnt = enhance.learn(step, [{"T1": enhance.landmarks(few, step, "a")}])
    out = enhance.run(few, "T1", [learnt], (1, 1, 1), "a")
    assert np.isfinite(out).all()
    assert len(np.unique(out)) == 3
    binary = (few > 1).astype(np.float32)
    with pytest.raises(UserError, match=r"a\.nii\.gz: enhance='nyul' found one value only"):
        apply(binary, {"name": "nyul", "mask": "nonzero"}, scales={"T1": learnt["scales"]["T1"]})


def test_otsu_and_body_mask():
    tissue = spheres() > 0
    rng = np.random.default_rng(3)
    image = np.where(tissue, 40.0, -1000.0) + rng.normal(0, 30, tissue.shape)
    image[18:28, 18:24, 10:16] = -900  # a lung, closed
    image[20:22, 20:22, 16:] = -950  # and the airway that leads out of the volume
    table = np.zeros(tissue.shape, bool)
    table[:, -1, :] = True
    image[table] = 100  # the table, apart from the body
    image = image.astype(np.float32)
    assert -850 < enhance.otsu(image) < -50
    inside = enhance.body_mask(image, axis=2)
    np.testing.assert_array_equal(inside, tissue)
    out = apply(image, "body")
    np.testing.assert_array_equal(out[tissue], image[tissue])
    assert (out[~tissue] == image.min()).all()


def test_otsu_equals_its_definition():
    values = np.random.default_rng(4).choice([1.0, 2.0, 3.0, 10.0, 11.0, 13.0], (10, 10, 10)).astype(np.float32)
    threshold = enhance.otsu(values)
    between = []
    for cut in (1.5, 2.5, 6, 10.5, 12):
        below, above = values[values < cut], values[values > cut]
        between.append((len(below) * len(above) * (below.mean() - above.mean()) ** 2, cut))
    best = max(between)[1]
    np.testing.assert_array_equal(values > threshold, values > best)


def test_noise_level():
    rng = np.random.default_rng(5)
    smooth = 100 * ndimage.gaussian_filter(rng.normal(size=(40, 40, 40)), 6)
    image = (smooth + 500 + rng.normal(0, 7, smooth.shape)).astype(np.float32)
    assert enhance.noise_level(image) == pytest.approx(7, rel=0.05)
    image[:20] = 0  # a background without noise does not count
    assert enhance.noise_level(image) == pytest.approx(7, rel=0.15)
    assert enhance.noise_level(np.zeros((5, 5, 1), np.float32)) == 0


def test_brain_mask_is_given_never_guessed(tmp_path):
    image = np.random.default_rng(6).normal(100, 20, (8, 8, 8)).astype(np.float32)
    mask = np.zeros((8, 8, 8), np.float32)
    mask[2:6, 2:6, 2:6] = 0.99999997
    case = Case("a", "a", {"T1": save(tmp_path / "i.nii.gz", image), "brain": save(tmp_path / "m.nii.gz", mask)})
    cohort = Cohort("toy", Path("."), ("T1", "brain"), {}, (case,))
    plan = fit({"enhance": ("brain:brain",), "normalize": "none", "crop": "nonzero"}, cohort, [case])
    with_table = dataclasses.replace(plan, crop=None)
    prepared = prepare_case(case, with_table)
    np.testing.assert_array_equal(prepared.image[..., 0], np.where(mask > 0, image, 0))
    np.testing.assert_array_equal(prepared.image[..., 1], mask)
    without = dataclasses.replace(case, images={"T1": case.images["T1"]})
    with pytest.raises(UserError, match=r"i\.nii\.gz: its case has no brain"):
        prepare_case(without, dataclasses.replace(plan, missing="zero"))


# --------------------------------------------------------------------------------------------- with libraries


def test_n4_recovers_a_known_field():
    pytest.importorskip("SimpleITK")
    tissue = spheres()
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in tissue.shape), indexing="ij"))
    field = np.exp(0.35 * grid[0] - 0.25 * grid[1] + 0.3 * grid[2] * grid[0])
    truth = np.array([0.0, 300.0, 500.0])[tissue] + np.random.default_rng(7).normal(0, 5, tissue.shape)
    biased = np.clip(truth * field, 0, None).astype(np.float32)
    out = apply(biased, {"name": "n4", "shrink": 2})
    assert out.dtype == np.float32

    def spread(values, label):
        return values[tissue == label].std() / values[tissue == label].mean()

    for label in (1, 2):
        assert spread(out, label) < spread(biased, label) / 4
    found = np.log(biased[tissue > 0] / out[tissue > 0])
    assert np.corrcoef(found, np.log(field[tissue > 0]))[0, 1] > 0.98
    assert abs(found.mean()) < 1e-3  # intensities keep their size
    np.testing.assert_array_equal(apply(biased, {"name": "n4", "shrink": 2}), out)


def test_n4_refuses_what_it_cannot_correct():
    pytest.importorskip("SimpleITK")
    with pytest.raises(UserError, match=r"a\.nii\.gz: enhance='n4' needs magnitudes"):
        apply(np.random.default_rng(8).normal(size=(8, 8, 8)).astype(np.float32), "n4")
    with pytest.raises(UserError, match="needs 4 voxels along every axis"):
        apply(np.random.default_rng(8).random((8, 8, 2), np.float32), "n4")


def test_nlm_takes_noise_away_and_leaves_edges():
    pytest.importorskip("skimage")
    tissue = spheres((28, 28, 28))
    truth = np.array([0.0, 300.0, 500.0])[tissue]
    noisy = (truth + np.random.default_rng(9).normal(0, 20, truth.shape)).astype(np.float32)
    out = apply(noisy, "nlm")
    assert np.abs(out - truth).std() < 0.5 * np.abs(noisy - truth).std()
    blurred = ndimage.gaussian_filter(noisy, 1)
    assert np.square(out - truth).mean() < np.square(blurred - truth).mean()
    assert not out[noisy == noisy.min()].std()
    flat = np.zeros((20, 20, 20), np.float32)
    flat[3:17, 3:17, 3:17] = 5
    np.testing.assert_array_equal(apply(flat, "nlm"), flat)  # no noise, no change


def test_clahe_equals_scikit_image_and_keeps_the_background():
    exposure = pytest.importorskip("skimage.exposure")
    tissue = spheres((32, 24, 16))
    image = (tissue * 100 + (tissue > 0) * np.random.default_rng(10).normal(50, 5, tissue.shape)).astype(np.float32)
    out = apply(image, "clahe")
    low, high = image.min(), image.max()
    peer = exposure.equalize_adapthist((image - low) / (high - low), kernel_size=(4, 3, 2), clip_limit=0.01)
    shown = image > low
    np.testing.assert_allclose(out[shown], peer[shown], atol=1e-6)
    assert not out[~shown].any()
    assert 0 <= out.min() <= out.max() <= 1


# ---------------------------------------------------------------------------------------------- in the plan


def cohort_with(tmp_path, n=3) -> Cohort:
    rng = np.random.default_rng(11)
    cases = []
    for i in range(n):
        image = (rng.gamma(3, 20 * (i + 1), (14, 12, 10)) + 1).astype(np.float32)
        mask = np.zeros(image.shape, np.uint8)
        mask[4:8, 4:8, 4:8] = 1
        image_file = save(tmp_path / f"{i}.nii.gz", image, np.diag([1.0, 1.0, 2.0, 1.0]))
        mask_file = save(tmp_path / f"{i}_m.nii.gz", mask, np.diag([1.0, 1.0, 2.0, 1.0]))
        cases.append(Case(str(i), str(i), {"T1": image_file}, {"seg": mask_file}))
    return Cohort("toy", Path("."), ("T1",), {"x": 1}, tuple(cases))


def test_plan_learns_after_the_steps_before_and_travels(tmp_path):
    cohort = cohort_with(tmp_path)
    spec = {"enhance": ("median", {"name": "nyul", "mask": "all"}), "normalize": "none"}
    plan = fit(spec, cohort, cohort.cases)
    assert Plan.from_json(plan.to_json()) == plan
    marks = []
    for case in cohort.cases:
        image = ndimage.median_filter(nib.load(case.images["T1"]).get_fdata(dtype=np.float32), 3, mode="nearest")
        marks.append(np.percentile(image, plan.enhance[1]["percentiles"]))
    expected = np.mean([100 * (m - m[0]) / (m[-1] - m[0]) for m in marks], axis=0)
    np.testing.assert_allclose(plan.enhance[1]["scales"]["T1"], expected, rtol=1e-6)
    prepared = [prepare_case(case, Plan.from_json(plan.to_json())) for case in cohort.cases]
    for case in prepared:  # three images of other scales are alike now
        np.testing.assert_allclose(np.percentile(case.image, plan.enhance[1]["percentiles"]), expected, atol=0.1)
    raw = nib.load(cohort.cases[2].images["T1"]).get_fdata()
    assert prepared[2].scale[0] == pytest.approx(np.percentile(raw, 99), rel=1e-5)  # of the file, not of what it became


def test_ct_statistics_are_those_of_the_enhanced_images(tmp_path):
    cohort = cohort_with(tmp_path)
    spec = {"enhance": ({"name": "window", "low": 20, "high": 60},), "normalize": "ct"}
    plan = fit(spec, cohort, cohort.cases)
    inside = np.concatenate(
        [np.clip(nib.load(c.images["T1"]).get_fdata()[4:8, 4:8, 4:8].ravel(), 20, 60) for c in cohort.cases]
    )
    assert plan.foreground["T1"]["mean"] == pytest.approx(inside.mean(), rel=1e-5)
    assert plan.foreground["T1"]["upper"] <= 60


def test_storage_order_changes_no_bit():
    rng = np.random.default_rng(12)
    data = rng.gamma(3, 20, (12, 14, 10)).astype(np.float32)
    data[spheres(data.shape) == 0] = 0
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    steps = enhance.check(("median", "body", "window:abdomen"), ("T1",))
    plan = Plan(("T1",), {}, "RAS", (1.5, 1.5, 1.5), "nonzero", {"T1": "zscore_nonzero"}, enhance=steps)
    turn = nib.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], nib.orientations.axcodes2ornt(tuple("SLA")))
    stored = np.asfortranarray(nib.orientations.apply_orientation(data, turn))
    there = affine @ nib.orientations.inv_ornt_aff(turn, data.shape)
    ras = plan.apply(Volume(data, affine, Path("a.nii")))
    other = plan.apply(Volume(stored, there, Path("a.nii")))
    np.testing.assert_array_equal(other.image, ras.image)
    assert ras.image.shape[0] < round(12 / 1.5)  # cropped to what the steps left


def test_an_enhanced_case_finds_its_way_back(tmp_path):
    cohort = cohort_with(tmp_path, 1)
    plan = fit({"enhance": ("median",), "spacing": (2.0, 2.0, 2.0)}, cohort, cohort.cases)
    prepared = prepare_case(cohort.cases[0], plan)
    back = prepared.geometry.label_map_to_original(prepared.targets["seg"])
    truth = np.asanyarray(nib.load(cohort.cases[0].targets["seg"]).dataobj)
    np.testing.assert_array_equal(back, truth)
