"""The main job and prediction on real volumes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from untrained import labels_of, make_run, run_predict

from medjax import main
from medjax.errors import run_program

REPO = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.real


def test_hippocampus_trains_evaluates_and_writes_back(data_root: Path, tmp_path: Path) -> None:
    cohort = data_root / "hippocampus"
    main.main([f"--config={REPO / 'configs' / 'hippocampus.py'}:debug,data={cohort}", f"--workdir={tmp_path}"])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]

    with (cohort / "split.csv").open() as file:
        val = sorted(row["id"] for row in csv.DictReader(file) if row["split"] == "val")
    folder = tmp_path / "eval" / "val"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["split"], summary["n_cases"]) == ("val", len(val))
    names = {v: k for k, v in json.loads((cohort / "dataset.json").read_text())["labels"].items()}
    names = {int(k if str(k).isdigit() else v): v if str(k).isdigit() else k for k, v in names.items()}
    assert set(summary["metrics"]["dice"]["per_class"]) == {names[1], names[2]}
    with (folder / "cases.csv").open() as file:
        scores = {(row["case"], row["class"]): float(row["dice"]) for row in csv.DictReader(file)}
    assert sorted({case for case, _ in scores}) == val
    for case in val:
        given = nib.load(cohort / "imagesTr" / f"{case}.nii.gz")
        made = nib.load(folder / "predictions" / f"{case}.nii.gz")
        assert made.shape == given.shape
        np.testing.assert_array_equal(made.affine, given.affine)
        predicted = np.asarray(made.dataobj)
        reference = np.asarray(nib.load(cohort / "labelsTr" / f"{case}.nii.gz").dataobj)
        assert set(np.unique(predicted)) <= {0, 1, 2}
        for value in (1, 2):  # the scores are of what was written
            a, b = predicted == value, reference == value
            dice = 2 * (a & b).sum() / (a.sum() + b.sum())
            assert scores[case, names[value]] == pytest.approx(dice, abs=1e-5)
    assert {f.name for f in folder.glob("*.png")} == {"worst.png", "median.png", "best.png"}


@pytest.mark.parametrize("spacing", [None, (4.0, 4.0, 4.0)], ids=["own grid", "resampled"])
def test_48_orientations_give_one_prediction_in_world_space(data_root: Path, tmp_path: Path, spacing: Any) -> None:
    source = data_root / "odd_files" / "real" / "orient48"
    files = sorted(source.glob("*.nii.gz"))
    assert len(files) == 48
    run = make_run(tmp_path / "run", spacing=spacing)
    run_predict(run, source, tmp_path / "out", "--overlap=0")
    reference = labels_of(tmp_path / "out" / "RAS.nii.gz")
    assert (np.bincount(reference.ravel(), minlength=3) > 1000).all()
    for file in files:
        given, made = nib.load(file), nib.load(tmp_path / "out" / file.name)
        assert made.shape == given.shape
        np.testing.assert_array_equal(made.affine, given.affine)
        unlike = np.mean(np.asarray(nib.as_closest_canonical(made).dataobj) != reference)
        # Where the grid is the file's own, the same numbers meet the network in the same order.
        assert unlike <= (0.0 if spacing is None else 1e-4), file.name


@pytest.mark.parametrize(
    ("folder", "good", "bad"),
    [
        (
            "derived",
            {"plain", "same_bigendian", "same_nifti2", "int8", "u1_scaled", "4d_1vol", "no_affine", "qform_ne_sform",
             "not_gz_but_named", "gz_but_named", "trailing_garbage"},
            {"truncated60", "truncated_crc", "corrupt_middle", "header_only", "truncated", "zero_bytes", "lfs_pointer",
             "text", "nan_inf", "constant0", "dim0_is_9", "bad_datatype", "dim_lies"},
        ),
        (
            "real",
            {"bigendian_i2_anatomical", "scaled_ct_shear_u1", "scaled_T1_slope0.004", "oblique42_cine_mnms",
             "oblique53_S0", "single_slice_lax", "tiny_4x5x7_aniso", "analyze_ras", "intensity_1.7e6",
             "float64_map_neg", "nifti2_small", "slice_thick17"},
            {"nan_fmri_tsnr", "5d_warp_f4_huge", "4d_dwi_7vol", "rgb_ct_perfusion", "rgba_atlas", "complex",
             "2d_brain_slice", "constant_ones", "empty_label", "broken_short", "broken_appledouble", "cifti.dtseries",
             "surface_163842x1x1x1"},
        ),
    ],
)  # fmt: skip
def test_a_folder_of_odd_files(
    data_root: Path, tmp_path: Path, folder: str, good: set[str], bad: set[str], capsys: Any
) -> None:
    source = data_root / "odd_files" / folder
    run = make_run(tmp_path / "run", spacing=(8.0, 8.0, 8.0))
    with pytest.raises(SystemExit) as caught:
        run_program(lambda: run_predict(run, source, tmp_path / "out"))
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    listed = said.partition("medjax: error: ")[2]
    written = {f.name.removesuffix(".nii.gz") for f in (tmp_path / "out").iterdir()}
    assert good <= written, good - written
    assert not bad & written
    names = {f.name.removesuffix(".gz").removesuffix(".nii").removesuffix(".hdr"): f
             for f in source.iterdir() if f.name.removesuffix(".gz").endswith((".nii", ".hdr"))}  # fmt: skip
    for name, file in names.items():
        assert (str(file) in listed) != (name in written), name
        if name in written:
            # nibabel refuses two of them for their names alone.
            given = nib.load(file) if "but_named" not in name else nib.load(source / "plain.nii")
            made = nib.load(tmp_path / "out" / f"{name}.nii.gz")
            assert made.shape == given.shape[:3], name
            np.testing.assert_array_equal(made.affine, given.affine, err_msg=name)
            assert set(np.unique(made.dataobj)) <= {0, 1, 2}
