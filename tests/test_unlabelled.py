"""Volumes without targets: any folder of files, what cannot be used is listed and left out, the rest is trained on."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from tiny import RECIPE, write_cohort

from medjax import config as config_lib
from medjax import main
from medjax.data import cohort as cohorts
from medjax.data import dataset
from medjax.data.unlabelled import usable
from medjax.errors import UserError
from medjax.train import say_skipped

RNG = np.random.default_rng(0)
SPEC = {"spacing": None}


def save(path: Path, array: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([2.0, 2.0, 2.0, 1.0])), path)
    return path


def noise(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight good volumes, and one of every kind of bad file."""
    root = tmp_path_factory.mktemp("unlabelled")
    for i in range(6):
        save(root / f"good{i}.nii.gz", noise(20, 20, 18 + i))
    save(root / "deeper" / "good.nii", noise(20, 20, 20))
    save(root / "twin_a.nii.gz", noise(20, 20, 20))
    (root / "twin_b.nii.gz").write_bytes((root / "twin_a.nii.gz").read_bytes())
    save(root / "bad_2d.nii.gz", noise(20, 20))
    save(root / "bad_slice.nii.gz", noise(20, 20, 1))
    save(root / "bad_4d.nii.gz", noise(20, 20, 20, 5))
    save(root / "bad_constant.nii.gz", np.full((20, 20, 20), 3, np.int16))
    nan = noise(20, 20, 20)
    nan[3, 4, 5] = np.nan
    save(root / "bad_nan.nii.gz", nan)
    rgb = np.zeros((20, 20, 20), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    rgb["R"] = RNG.integers(0, 255, rgb.shape)
    save(root / "bad_rgb.nii.gz", rgb)
    whole = (root / "good0.nii.gz").read_bytes()
    (root / "bad_truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    (root / "bad_text.nii.gz").write_bytes(gzip.compress(b"not a volume"))
    (root / "bad_empty.nii").write_bytes(b"")
    header = bytearray(save(root / "bad_sform.nii", noise(20, 20, 20)).read_bytes())
    header[280:328] = bytes(48)
    (root / "bad_sform.nii").write_bytes(header)
    (root / ".hidden.nii.gz").write_bytes(b"")
    (root / "notes.txt").write_text("no image")
    return root


def test_every_file_is_a_case(folder: Path) -> None:
    cohort = cohorts.from_files(folder, "T1")
    assert cohort.modalities == ("T1",)
    assert {"deeper_good", "good0", "bad_rgb"} <= {case.id for case in cohort.cases}
    assert not any("hidden" in case.id or "notes" in case.id for case in cohort.cases)
    assert all(not case.targets and case.group == case.id for case in cohort.cases)
    grouped = cohorts.from_files(folder, "T1", group="(good|bad|twin)")
    assert {case.group for case in grouped.cases} == {"good", "bad", "twin"}


def test_links_to_folders_are_followed_once(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "site").symlink_to(folder)
    save(tmp_path / "own.nii.gz", noise(4, 4, 4))
    (tmp_path / "back").symlink_to(tmp_path)
    found = {case.id for case in cohorts.from_files(tmp_path).cases}
    assert found == {"own", *(f"site_{case.id}" for case in cohorts.from_files(folder).cases)}


def test_two_files_of_one_id_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a/b_c.nii.gz", "a_b/c.nii.gz"):
        (tmp_path / name).parent.mkdir()
        save(tmp_path / name, noise(4, 4, 4))
    with pytest.raises(UserError, match=r"a_b/c\.nii\.gz: .*a/b_c\.nii\.gz makes the same id, 'a_b_c'"):
        cohorts.from_files(tmp_path)
    intake = cohorts.Intake(tolerant=True)
    cohort = usable(cohorts.from_files(tmp_path, intake=intake), SPEC, intake.problems)
    assert [(case.id, case.images["image"].name) for case in cohort.cases] == [("a_b_c", "b_c.nii.gz")]
    assert [(problem.case, problem.file) for problem in cohort.skipped] == [("", str(tmp_path / "a_b" / "c.nii.gz"))]
    assert "a_b_c" not in cohort.left_out
    capsys.readouterr()
    say_skipped(cohort.skipped, len(cohort.cases), tmp_path)
    assert f"\n  {tmp_path / 'a_b' / 'c.nii.gz'}: " in capsys.readouterr().out


def test_what_cannot_be_used_is_listed(folder: Path) -> None:
    cohort = usable(cohorts.from_files(folder), SPEC)
    assert {case.id for case in cohort.cases} == {f"good{i}" for i in range(6)} | {"deeper_good", "twin_a"}
    reasons = {problem.case: problem.message for problem in cohort.skipped}
    for case, word in {
        "bad_2d": "2-D",
        "bad_slice": "single slice",
        "bad_4d": "4-D",
        "bad_constant": "constant",
        "bad_nan": "NaN",
        "bad_rgb": "RGB",
        "bad_truncated": "bad_truncated",
        "bad_text": "bad_text",
        "bad_empty": "empty",
        "bad_sform": "voxels have no size",
        "twin_b": "same voxels as case twin_a",
    }.items():
        assert word in reasons.pop(case), case
    assert not reasons


def test_nothing_left_is_an_error(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("bad_2d.nii.gz", "bad_rgb.nii.gz"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(UserError, match="no case is left that can be used; 2 were skipped"):
        usable(cohorts.from_files(tmp_path), SPEC)
    run, options = tmp_path / "run", ["--config.data.layout=files", "--config.data.skip_unreadable=true"]
    with pytest.raises(UserError, match="no case is left that can be used; 2 were skipped"):
        main.main([f"--config={recipe(tmp_path / 'r.py', tmp_path)}", f"--workdir={run}", *options])
    assert [row["case"] for row in csv.DictReader((run / "skipped.csv").open())] == ["bad_2d", "bad_rgb"]
    assert "skipped     2 of 2 cases" in capsys.readouterr().out
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="holds no NIfTI file"):
        cohorts.from_files(tmp_path / "nothing")


def test_strict_unless_asked(folder: Path) -> None:
    config = {"cohort": str(folder), "layout": "files", "exclude": (), "targets": {}, "images": {}, "group": ""}
    config |= {"modalities": (), "labels": {}, "classes": {}, "findings": {}, "options": {}, "table": "", "id": "id"}
    config |= {
        "preprocess": {"missing": "error"},
        "split": {"file": "", "column": "", "folds": 4, "fold": 0, "test": 0.0, "stratify": ""},
    }
    cohort = dataset.open_cohort(config, {"mae": {"type": "masked"}})
    assert not cohort.skipped
    with pytest.raises(UserError, match="bad_"):
        dataset.open_splits(cohort, config, 0)


def recipe(file: Path, cohort: Path) -> Path:
    text = RECIPE.format(cohort=str(cohort))
    tasks = '{"mae": {"type": "masked", "block": (4, 4, 4)}}'
    file.write_text(text.replace('{"spheres": {"type": "segmentation", "levels": 1}}', tasks))
    return file


def test_pretraining_on_a_folder(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    options = ["--config.data.layout=files", "--config.data.skip_unreadable=true", "--config.data.split.folds=4"]
    more = ["--config.data.split.file=", "--config.train.total=2 steps", "--config.train.eval_every=2 steps"]
    main.main([f"--config={recipe(tmp_path / 'r.py', folder)}", f"--workdir={run}", *options, *more])
    rows = list(csv.DictReader((run / "skipped.csv").open()))
    assert len(rows) == 11
    assert all(row["reason"] for row in rows)
    assert "skipped     11 of 19 cases" in capsys.readouterr().out
    summary = json.loads((run / "eval" / "val" / "summary.json").read_text())
    assert summary["n_cases"] == 2


def test_more_volumes_beside_a_cohort(folder: Path, tmp_path: Path) -> None:
    config_of = {"folder": str(folder), "modality": ""}
    cohort = write_cohort(tmp_path / "cohort")
    run = tmp_path / "run"
    options = [f"--config.data.extra={config_of}", "--config.data.skip_unreadable=true"]
    more = ["--config.train.total=2 steps", "--config.train.eval_every=2 steps"]
    main.main([f"--config={recipe(tmp_path / 'r.py', cohort)}", f"--workdir={run}", *options, *more])
    assert len(list(csv.DictReader((run / "skipped.csv").open()))) == 11
    # The cohort's own split, to which the folder's volumes are added for training.
    assert json.loads((run / "eval" / "val" / "summary.json").read_text())["n_cases"] == 1


def test_extra_volumes_have_a_modality_and_some_are_left(folder: Path, tmp_path: Path) -> None:
    from medjax.data.unlabelled import with_extra

    case = cohorts.Case("a", "a", {"T1": Path("x"), "T2": Path("x")})
    cohort = cohorts.Cohort("c", folder, ("T1", "T2"), {}, (case,))
    with pytest.raises(UserError, match="say which of T1, T2"):
        with_extra(cohort, str(folder), "", True)
    with pytest.raises(UserError, match="no such modality"):
        with_extra(cohort, str(folder), "FLAIR", True)
    with pytest.raises(UserError, match="missing='zero'"):
        with_extra(cohort, str(folder), "T1", False)
    both = with_extra(cohort, str(folder), "T2", True)
    for name in ("bad_2d.nii.gz", "bad_rgb.nii.gz"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(UserError, match="data.extra.folder: none of its 2 volumes can be used: .*bad_2d.nii.gz"):
        usable(with_extra(cohorts.from_files(folder, "T1"), str(tmp_path), "", False), SPEC)
    assert {tuple(case.images) for case in both.extra} == {("T2",)}


def opened(cohort: Path, **keys: Any) -> cohorts.Cohort:
    config = config_lib.defaults()
    config_lib.merge(config, {"data": {"cohort": str(cohort), "preprocess": {"missing": "zero"}, **keys}})
    return dataset.open_cohort(config.data, {"mae": {"type": "masked"}})


def test_extra_volumes_are_skipped_and_left_out_as_others_are(tmp_path: Path) -> None:
    cohort, scans = write_cohort(tmp_path / "cohort", n=2), tmp_path / "scans"
    for name in ("a.nii", "a.nii.gz", "b.nii", "c.nii", "case0.nii"):
        save(scans / name, noise(8, 8, 8))
    extra = {"extra": {"folder": str(scans), "modality": ""}}
    with pytest.raises(UserError, match="makes the same id, 'a'"):
        opened(cohort, **extra)
    found = opened(cohort, skip_unreadable=True, exclude=("extra_b", "extra_case0", "case1"), **extra)
    assert [case.id for case in found.cases] == ["case0"]
    assert [case.id for case in found.extra] == ["extra_a", "extra_c"]
    assert [(problem.case, "makes the same id" in problem.message) for problem in found.skipped] == [("", True)]
    for name, words in (("extra_d", "scans has no case or patient 'd'"), ("d", "has no case or patient 'd'")):
        with pytest.raises(UserError, match=words):
            opened(cohort, skip_unreadable=True, exclude=(name,), **extra)
    # A case of the cohort may be called so too.
    for name in ("cohort/imagesTr/case1.nii.gz", "cohort/labelsTr/case1.nii.gz"):
        (tmp_path / name).rename((tmp_path / name).with_name("extra_x.nii.gz"))
    (cohort / "dataset.json").write_text((cohort / "dataset.json").read_text().replace("case1", "extra_x"))
    found = opened(cohort, skip_unreadable=True, exclude=("extra_x",), **extra)
    assert [case.id for case in found.cases] == ["case0"]


@pytest.mark.real
def test_odd_files(data_root: Path) -> None:
    """Everything odd there is: nothing raises, and what is left is volumes."""
    cohort = usable(cohorts.from_files(data_root / "odd_files" / "real"), SPEC)
    left = {case.id for case in cohort.cases}
    assert not {name for name in left if name[:2] in ("2d", "4d", "5d") or name.startswith(("rgb", "complex"))}
    assert not {"constant_ones", "broken_short", "single_slice_lax", "empty_label"} & left
    assert {"anat_33x41x25", "scaled_T1_slope0.004", "nifti2_small", "analyze_ras"} <= left
    # One brain in 48 axis orders holds one set of voxels.
    assert sum(name.startswith("orient48") for name in left) == 1


@pytest.mark.real
def test_brain_unlabelled(data_root: Path) -> None:
    cohort = usable(cohorts.from_files(data_root / "brain_unlabelled"), SPEC)
    assert len(cohort.cases) == 12
