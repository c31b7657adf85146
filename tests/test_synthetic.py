"""The synthetic cohort: files against nibabel, anatomy against known volumes, the maps against their mathematics."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from scipy.interpolate import BSpline

from medjax.data import synthetic
from medjax.data.synthetic import LABELS, MODALITIES, brain_case, brain_cohort
from medjax.errors import UserError

REPO = Path(__file__).resolve().parents[1]
TINY = {"spacing": 8.0, "size": (16, 18, 16), "progress": False}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    return brain_cohort(folder, n_train=4, n_val=2, n_test=2, spacing=4.0, workers=2, progress=False)


@pytest.fixture(scope="module")
def cases() -> list[synthetic.BrainCase]:
    return [brain_case(0, number, spacing=3.0) for number in range(5)]


def ids(folder: Path) -> dict[str, str]:
    with open(folder / "split.csv", newline="") as file:
        return {row["id"]: row["split"] for row in csv.DictReader(file)}


def world(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return nib.affines.apply_affine(affine, np.argwhere(mask)).mean(0)


def test_layout_is_the_decathlons(cohort: Path) -> None:
    content = json.loads((cohort / "dataset.json").read_text())
    assert content["modality"] == {"0": "T1", "1": "T1c", "2": "T2", "3": "FLAIR"}
    assert content["labels"] == {str(value): name for name, value in LABELS.items()}
    splits = ids(cohort)
    assert sorted(splits.values()) == ["test"] * 2 + ["train"] * 4 + ["val"] * 2
    assert [Path(row["image"]).name for row in content["training"]] == [f"{name}.nii.gz" for name in splits]
    for row in content["training"]:
        image, label = nib.load(cohort / row["image"]), nib.load(cohort / row["label"])
        assert image.ndim == 4
        assert image.shape == (*label.shape, len(MODALITIES))
        np.testing.assert_array_equal(image.affine, label.affine)
        # Readers that prefer the qform must land in the same place.
        np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-4)
        assert image.header.get_xyzt_units()[0] == "mm"
        assert set(np.unique(np.asarray(label.dataobj))) == set(LABELS.values())


def test_the_loader_reads_it(cohort: Path) -> None:
    from medjax.data.cohort import from_msd

    loaded = from_msd(cohort)
    assert tuple(loaded.modalities) == MODALITIES
    assert {case.id for case in loaded.cases} == set(ids(cohort))


def test_files_vary_as_scanners_do(cohort: Path) -> None:
    images = [nib.load(cohort / "imagesTr" / f"{name}.nii.gz") for name in ids(cohort)]
    assert len({nib.aff2axcodes(image.affine) for image in images}) >= 5
    assert len({image.get_data_dtype() for image in images}) >= 2
    tilts = [
        np.abs(image.affine[:3, :3] / np.linalg.norm(image.affine[:3, :3], axis=0)).max(0).min() for image in images
    ]
    assert min(tilts) < 0.999  # oblique: no voxel axis along a world axis
    zooms = np.array([image.header.get_zooms()[:3] for image in images])
    assert ((zooms > 4 * 0.85) & (zooms < 4 * 1.33)).all()
    assert zooms.std() > 0.05


def test_a_file_holds_what_the_case_holds(cohort: Path) -> None:
    for number, name in enumerate(ids(cohort)):
        case = brain_case(0, number, spacing=4.0)
        image = nib.load(cohort / "imagesTr" / f"{name}.nii.gz")
        assert image.get_data_dtype() == case.dtype
        read = image.get_fdata(dtype=np.float32)
        np.testing.assert_allclose(read, case.image, rtol=1e-5)
        # Exactly zero outside, scaled integers included: brain masks are taken from this.
        np.testing.assert_array_equal(read == 0, np.repeat((case.label == 0)[..., None], len(MODALITIES), -1))
        np.testing.assert_allclose(image.affine, case.affine, atol=1e-4)


def test_bytes_depend_on_the_seed_alone(tmp_path: Path) -> None:
    one = brain_cohort(tmp_path / "a", n_train=2, n_val=1, n_test=1, workers=1, **TINY)
    two = brain_cohort(tmp_path / "b", n_train=2, n_val=1, n_test=1, workers=2, **TINY)
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.is_file())
    assert len(names) == 10
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    other = brain_cohort(tmp_path / "a", n_train=2, n_val=1, n_test=1, workers=1, seed=1, **TINY)
    assert other != one
    name = "labelsTr/brain_000.nii.gz"
    assert (one / name).read_bytes() != (other / name).read_bytes()


@pytest.mark.parametrize("site", [(-34, -25, 25), (34, -25, 25), (-28, 38, 10), (28, -62, 28)])
def test_left_stays_left_on_every_grid(site: tuple[int, int, int]) -> None:
    codes = set()
    for number in range(6):
        case = brain_case(3, number, site=site, spacing=4.0)
        codes.add(nib.aff2axcodes(case.affine))
        tumour = world(case.label >= LABELS["tumour core"], case.affine)
        brain = world(case.label > 0, case.affine)
        # In MNI the brain's centroid lies near (0, -20, 5); the pose adds a few degrees and per cent.
        np.testing.assert_allclose(tumour - brain, np.array(site) - (0, -20, 5), atol=18)
        assert np.sign(tumour[0] - brain[0]) == np.sign(site[0])
        np.testing.assert_allclose(tumour, case.foci[0][0], atol=6)
    assert len(codes) >= 4


@pytest.mark.parametrize("degrees", [30, 179.98])
def test_both_forms_of_the_header_agree(tmp_path: Path, degrees: float) -> None:
    angle = np.deg2rad(degrees)
    affine = np.diag([3.0, 3.0, 3.8, 1.0])
    affine[:2, :2] = 3.0 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    affine[:3, 3] = 75, -84, 86
    synthetic.write_volume(tmp_path / "v.nii.gz", nib.Nifti1Image(np.zeros((64, 53, 46), np.int16), affine), affine)
    read = nib.load(tmp_path / "v.nii.gz")
    np.testing.assert_allclose(read.affine, affine, atol=1e-5)
    q, code = read.get_qform(coded=True)
    assert (code == 0) == (degrees > 90)  # near half a turn a quaternion would be off
    if code:
        np.testing.assert_allclose(q, affine, atol=1e-4)


def test_anatomy_has_human_volumes() -> None:
    for number in range(3):
        case = brain_case(1, number, tumour=False)
        assert case.label.max() == LABELS["white matter"]
        assert not case.foci
        litre = abs(np.linalg.det(case.affine[:3, :3])) / 1e6
        csf, gm, wm = (np.count_nonzero(case.label == k) * litre for k in (1, 2, 3))
        # Template: 1.89 l within its mask; poses change that by up to a third.
        assert 1.4 < csf + gm + wm < 2.8
        assert 1.2 < gm / wm < 2.4
        sizes = np.linalg.norm(case.affine[:3, :3], axis=0)
        deep = ndimage.distance_transform_edt(case.label > 0, sampling=sizes) > 28
        parts, n = ndimage.label((case.label == LABELS["CSF"]) & deep)
        ventricles = np.bincount(parts.ravel())[1:].max() * litre * 1000
        assert n
        assert 4 < ventricles < 80, "the lateral ventricles hold some 10 to 40 ml and are CSF"


def test_contrasts_are_in_order(cases: list[synthetic.BrainCase]) -> None:
    for case in cases:
        mean = {
            (m, name): case.image[..., k][case.label == value].mean()
            for k, m in enumerate(MODALITIES)
            for name, value in LABELS.items()
        }
        assert mean["T1", "white matter"] > mean["T1", "grey matter"] > mean["T1", "CSF"]
        assert mean["T2", "CSF"] > mean["T2", "grey matter"] > mean["T2", "white matter"]
        assert mean["FLAIR", "CSF"] < mean["FLAIR", "white matter"] < mean["FLAIR", "oedema"]
        assert mean["T1c", "enhancing rim"] == max(mean["T1c", name] for name in LABELS)
        assert mean["T1", "tumour core"] < mean["T1", "white matter"]


def test_the_rim_encloses_the_core(cases: list[synthetic.BrainCase]) -> None:
    for case in cases:
        core, rim = (case.label == LABELS[name] for name in ("tumour core", "enhancing rim"))
        around = ndimage.binary_dilation(core, np.ones((3, 3, 3))) & ~core & (case.label > 0)
        assert rim[around].mean() > 0.9
        radius = case.foci[0][1]
        assert 11 <= radius <= 36


def test_no_threshold_finds_the_rim(cases: list[synthetic.BrainCase]) -> None:
    scores = []
    for case in cases:
        values, rim = case.image[..., 1], case.label == LABELS["enhancing rim"]
        values = (values - values[case.label > 0].mean()) / values[case.label > 0].std()
        scores.append(
            [2 * ((values > t) & rim).sum() / ((values > t).sum() + rim.sum()) for t in np.linspace(0.5, 5, 19)]
        )
    assert 0.2 < np.mean(scores, 0).max() < 0.85


def test_the_map_into_the_template_never_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    caught: list[np.ndarray] = []
    real = ndimage.map_coordinates

    def spy(array: np.ndarray, coordinates: np.ndarray, **options: object) -> np.ndarray:
        caught.append(coordinates)
        return real(array, coordinates, **options)

    monkeypatch.setattr(ndimage, "map_coordinates", spy)
    for number in range(4):
        caught.clear()
        case = brain_case(2, number, spacing=2.0)
        final = caught[-1]  # voxels before the reorientation -> template mm
        jacobian = np.stack([np.stack(np.gradient(part)) for part in final])
        determinant = np.linalg.det(np.moveaxis(jacobian, (0, 1), (-2, -1))) / abs(np.linalg.det(case.affine[:3, :3]))
        assert determinant.min() > 0.1
        assert determinant.max() < 4
        assert determinant.std() > 0.05  # and it does deform


def test_mass_effect_is_an_increasing_push() -> None:
    focus = synthetic._Focus(np.zeros(3), 15.0, 4.0, 10.0, 0.6, np.eye(3))
    r = np.linspace(0.1, 80, 800, dtype=np.float32)
    points = np.zeros((3, 800, 1, 1), np.float32)
    points[0, :, 0, 0] = r
    push = synthetic._mass_effect(points, [focus], np.full((800, 1, 1), 1e9, np.float32))[0, :, 0, 0]
    assert (np.diff(r - push) > 0).all()
    np.testing.assert_allclose(push, 0.6 * r / (1 + (r / 15) ** 3), rtol=1e-4)


def test_spline_noise_is_scipys_spline() -> None:
    basis = synthetic._spline_basis(23, 5.3)
    knots = np.arange(-3, basis.shape[1] + 1) * 5.3
    expected = BSpline(knots, np.eye(basis.shape[1]), 3)(np.arange(23))
    np.testing.assert_allclose(basis, expected, atol=1e-6)
    field = synthetic.smooth_noise(np.random.default_rng(0), (60, 50, 40), np.array([3.0, 4.0, 5.0]), 1)
    assert abs(field.std() - 1) < 0.1


def test_coarse_noise_of_an_axis_shorter_than_its_knots() -> None:
    field = synthetic.smooth_noise(np.random.default_rng(0), (8, 8, 8), np.array([40.0, 40.0, 40.0]), 2)
    assert field.shape == (2, 8, 8, 8)
    assert np.isfinite(field).all()


def test_size_and_healthy_case(tmp_path: Path) -> None:
    folder = brain_cohort(tmp_path, n_train=8, n_val=0, n_test=1, workers=1, **TINY)
    maxima = {}
    for name in ids(folder):
        label = nib.load(folder / "labelsTr" / f"{name}.nii.gz")
        assert sorted(label.shape) == [16, 16, 18]
        canonical = nib.as_closest_canonical(label)
        assert canonical.shape == (16, 18, 16)
        maxima[name] = np.asarray(label.dataobj).max()
    assert [name for name, top in maxima.items() if top <= 3] == ["brain_007"]


def test_two_builders_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDJAX_CACHE", str(tmp_path))
    found: list[Path] = []

    def build() -> None:
        found.append(brain_cohort(n_train=2, n_val=1, n_test=1, workers=1, **TINY))

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(set(found)) == 1
    assert [path.name for path in tmp_path.iterdir()] == [found[0].name]
    assert len(list(found[0].rglob("*.nii.gz"))) == 8


def test_a_killed_build_is_no_cohort(tmp_path: Path) -> None:
    code = "import sys; from medjax.data.synthetic import brain_cohort as b; b(sys.argv[1], spacing=5.0, workers=2)"
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.time() + 40
    while not list(tmp_path.rglob("*.nii.gz")):
        assert time.time() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    left = next(tmp_path.iterdir())
    # A day later it is cleared away; a worker may be at its last case still.
    while left.exists():
        assert time.time() < deadline
        for folder in (left, *left.iterdir()):
            os.utime(folder, (0, 0))
        synthetic._remove_stale(tmp_path)


def test_what_killed_builds_left_goes_with_the_next_cohort_whichever_it_is(tmp_path: Path) -> None:
    dead, young, working, other = (
        tmp_path / name
        for name in (
            ".lung-v3-0123456789-ab_cdefg.tmp", ".lung-v3-0123456789-12345678.tmp", ".lung-v2-0123456789-1234abcd.tmp",
            ".notes-v1.tmp",
        )
    )  # fmt: skip
    for folder in (dead, young, working, other):
        (folder / "images").mkdir(parents=True)
    for folder in (dead, other):
        os.utime(folder / "images", (0, 0))
    for folder in (dead, working, other):
        os.utime(folder, (0, 0))  # made long ago, and in 'working' a case has just been written
    made = brain_cohort(tmp_path, n_train=1, n_val=0, n_test=1, workers=1, **TINY)
    assert set(tmp_path.iterdir()) == {made, young, working, other}


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    folder = brain_cohort(tmp_path, n_train=1, n_val=0, n_test=1, workers=1, **TINY)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.nii.gz")}
    assert brain_cohort(tmp_path, n_train=1, n_val=0, n_test=1, workers=1, **TINY) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.nii.gz")} == before
    (folder / "labelsTr" / "brain_001.nii.gz").unlink()
    with pytest.raises(UserError, match=r"labelsTr/brain_001\.nii\.gz.*delete the folder"):
        brain_cohort(tmp_path, n_train=1, n_val=0, n_test=1, workers=1, **TINY)


def test_a_failing_worker_is_reported(tmp_path: Path) -> None:
    job = {"folder": str(tmp_path / "gone"), "id": "brain_000", "seed": 0, "number": 0, "tumour": False}
    job |= {"spacing": 8.0, "size": [8, 8, 8]}
    with pytest.raises(RuntimeError, match=r"(?s)brain_000.*FileNotFoundError"):
        synthetic._run_workers([job, job], 2, lambda: None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_train": -1}, "n_train is -1"),
        ({"n_train": 0, "n_val": 0, "n_test": 0}, "at least one case"),
        ({"workers": 0}, "workers is 0"),
        ({"spacing": 0.2}, "between 1 and 8 mm"),
        ({"size": (4, 64, 64)}, "at least 8"),
        ({"seed": -3}, "seed is -3"),
    ],
)
def test_wrong_parameters(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        brain_cohort(tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


def test_an_unwritable_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="MEDJAX_CACHE"):
        brain_cohort(tmp_path / "file" / "cache", **TINY)


def test_workers_import_little() -> None:
    code = (
        "import sys; from medjax.data.synthetic import brain_case; brain_case(0, 0, spacing=8.0);"
        "print([m for m in ('jax', 'nilearn', 'sklearn', 'tensorflow', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True
    )
    assert result.stdout.strip() == "[]", result.stderr


def test_progress_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    brain_cohort(tmp_path, n_train=2, n_val=1, n_test=1, workers=1, **{**TINY, "progress": True})
    lines = capsys.readouterr().err.strip().splitlines()
    assert "4 cases to make" in lines[0]
    assert lines[-1].endswith("4/4")


def test_without_the_template_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="nilearn, which is not installed"):
        brain_cohort(tmp_path, **TINY)
    assert not list(tmp_path.iterdir())
