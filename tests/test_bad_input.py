"""Wrong input through the command line: one message that names the file or key and the cure, nothing half-written."""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from tiny import write_cohort, write_recipe

from medjax import config as config_lib
from medjax import errors, evaluate, main, models, tasks
from medjax import job as job_lib
from medjax.checkpoint import Checkpoints
from medjax.data import dataset, nifti
from medjax.errors import UserError, run_program

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tiny.py` and the four cases of `cohort`: two to train, then val and test."""
    folder = tmp_path_factory.mktemp("pristine")
    write_recipe(folder / "tiny.py", write_cohort(folder / "cohort", n=4))
    return folder


@pytest.fixture(scope="module")
def trained(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    workdir = tmp_path_factory.mktemp("trained")
    main.main([f"--config={pristine / 'tiny.py'}", f"--workdir={workdir}", "--config.train.total=2 steps",
               "--config.eval.pictures=false"])  # fmt: skip
    return workdir


@pytest.fixture
def place(pristine: Path, tmp_path: Path) -> Path:
    """A folder with a copy of the cohort to spoil, its recipe, and nothing else; the run is to be `place/run`."""
    shutil.copytree(pristine / "cohort", tmp_path / "cohort")
    write_recipe(tmp_path / "tiny.py", tmp_path / "cohort")
    return tmp_path


def files_in(folder: Path) -> dict[str, int]:
    """Every file below, hidden ones included, and its time of change."""
    return {str(f.relative_to(folder)): f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()}


def failure(place: Path, *more: str, capsys: pytest.CaptureFixture, workdir: Path | None = None) -> str:
    """Runs `medjax.main` as a shell would; returns its error message, having checked what must hold of all of them."""
    workdir = workdir or place / "run"
    before = files_in(workdir) if workdir.exists() else {}
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run_program(lambda: main.main([f"--config={place / 'tiny.py'}", f"--workdir={workdir}", *more]))
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.count("medjax: error:") == 1
    if workdir.exists():
        assert files_in(workdir) == before
    return said.partition("medjax: error: ")[2]


# ---------------------------------------------------------------------------------------------------------------- files


def image(place: Path, number: int) -> Path:
    return place / "cohort" / "imagesTr" / f"case{number}.nii.gz"


def label(place: Path, number: int) -> Path:
    return place / "cohort" / "labelsTr" / f"case{number}.nii.gz"


def rewrite(file: Path, change: Callable[[np.ndarray], np.ndarray], affine: np.ndarray | None = None) -> Path:
    volume = nib.load(file)
    data = change(np.array(volume.dataobj))
    nib.save(nib.Nifti1Image(data, volume.affine if affine is None else affine), file)
    return file


def put(index: tuple[int, ...], value: Any, dtype: Any = None) -> Callable[[np.ndarray], np.ndarray]:
    def change(data: np.ndarray) -> np.ndarray:
        data = data.astype(dtype or data.dtype)
        data[index] = value
        return data

    return change


def missing_image(place: Path) -> Path:
    image(place, 1).unlink()
    return image(place, 1)


def missing_label(place: Path) -> Path:
    label(place, 3).unlink()
    return label(place, 3)


def cut_gzip(place: Path) -> Path:
    file = image(place, 0)
    file.write_bytes(file.read_bytes()[:-20])
    return file


def silent_gzip(place: Path) -> Path:
    """All bytes are there and decode; only the checksum tells."""
    file = image(place, 3)
    data = bytearray(file.read_bytes())
    data[-8] ^= 1
    file.write_bytes(data)
    return file


def corrupt_label(place: Path) -> Path:
    file = label(place, 0)
    data = bytearray(file.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 16] = bytes(16)
    file.write_bytes(data)
    return file


def text_file(place: Path) -> Path:
    image(place, 0).write_text("not a volume at all, but long enough to hold a header " * 10)
    return image(place, 0)


def dicom_file(place: Path) -> Path:
    image(place, 0).write_bytes(bytes(128) + b"DICM" + bytes(600))
    return image(place, 0)


def zero_affine(place: Path) -> Path:
    volume = nib.load(image(place, 0))
    volume.header.set_sform(np.diag([2.0, 2.0, 0.0, 1.0]), 1)
    volume.header.set_qform(None, 0)
    nib.save(nib.Nifti1Image(np.array(volume.dataobj), None, volume.header), image(place, 0))
    return image(place, 0)


BAD_FILES: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "missing image": (missing_image, ["missing file", "Correct the paths"]),
    "missing label": (missing_label, ["missing file", "Correct the paths"]),
    "truncated gzip": (cut_gzip, ["cut short", "Copy or download the file again"]),
    "gzip wrong in its checksum alone": (silent_gzip, ["corrupt", "Copy or download the file again"]),
    "corrupt gzip label": (corrupt_label, ["corrupt", "Copy or download the file again"]),
    "not a NIfTI": (text_file, ["not a NIfTI file", "Convert it, or correct the path"]),
    "a DICOM": (dicom_file, ["a DICOM file", "dcm2niix"]),
    "a spacing of 0": (zero_affine, ["spacing along z is 0", "Set a valid qform or sform"]),
    "label of another shape": (
        lambda p: rewrite(label(p, 0), lambda d: d[:-1]),
        ["shape (19, 20, 20) differs from (20, 20, 20) of", "imagesTr/case0.nii.gz", "Resample"],
    ),
    "label of another affine": (
        lambda p: rewrite(label(p, 0), lambda d: d, np.diag([2.0, 2.0, 2.5, 1.0])),
        ["another place in space", "imagesTr/case0.nii.gz", "spacing 2 x 2 x 2.5 mm", "Copy the right header"],
    ),
    "label mirrored": (
        lambda p: rewrite(label(p, 0), lambda d: d, np.diag([-2.0, 2.0, 2.0, 1.0])),
        ["another place in space", "LAS", "RAS", "left and right are not guessed"],
    ),
    "undeclared label": (
        lambda p: rewrite(label(p, 1), put((0, 0, slice(3)), 9)),
        ["undeclared label 9 (3 voxels)", "declared are 0, 1, 2", "Declare them"],
    ),
    "negative label": (
        lambda p: rewrite(label(p, 1), put((0, 0, 0), -1, np.int16)),
        ["negative labels -1 (1 voxels)", "Correct the mask"],
    ),
    "label that is no integer": (
        lambda p: rewrite(label(p, 1), put((0, 0, 0), 1.5, np.float32)),
        ["not integers (1.5)", "one integer a voxel"],
    ),
    "label not a number": (
        lambda p: rewrite(label(p, 1), put((0, 0, 0), np.nan, np.float32)),
        ["1 label values are NaN or infinite"],
    ),
    "NaN": (lambda p: rewrite(image(p, 0), put((1, 2, 3), np.nan)), ["1 of 8000 values", "nonfinite='zero'"]),
    "Inf": (lambda p: rewrite(image(p, 2), put((1, 2, 3), np.inf)), ["values are NaN or infinite", "nonfinite='zero'"]),
    "constant image": (
        lambda p: rewrite(image(p, 1), np.ones_like),
        ["the image is constant (every voxel is 1)", "leave the case out"],
    ),
    "too many channels": (
        lambda p: rewrite(image(p, 1), lambda d: np.stack([d, d], -1)),
        ["2 channels for modality MRI", "Split the file, or declare the modalities"],
    ),
    "one image on two sides of a split": (
        lambda p: shutil.copy(image(p, 0), image(p, 3)),
        ["imagesTr/case0.nii.gz", "train", "test", "identical voxels", "Leave one out"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files(place: Path, kind: str, capsys: Any) -> None:
    spoil, words = BAD_FILES[kind]
    file = spoil(place)
    said = failure(place, capsys=capsys)
    for word in (str(file), *words):
        assert word in said, said
    assert not files_in(place / "run")


# ------------------------------------------------------------------------------------------------------- cohort, splits


def test_missing_modality(place: Path, capsys: Any) -> None:
    table = place / "cases.csv"
    table.write_text(
        "id,t1,flair,mask,side\n"
        f"a,{image(place, 0)},{image(place, 0)},{label(place, 0)},train\n"
        f"b,{image(place, 1)},,{label(place, 1)},val\n"
    )
    said = failure(
        place, f"--config.data.cohort={table}", "--config.data.images.T1=t1", "--config.data.images.FLAIR=flair",
        "--config.data.targets.spheres=mask", "--config.data.labels.shell=1", "--config.data.labels.core=2",
        "--config.data.split.file=", "--config.data.split.column=side", capsys=capsys,
    )  # fmt: skip
    assert f"{table}: line 3: case b lacks modality FLAIR. Give its file" in said


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (
            "id,split\ncase0,val\ncase1,val\ncase2,val\ncase3,test\n",
            ["the split 'train' is empty", "val (3), test (1)"],
        ),
        ("id,split\ncase0,train\ncase1,train\ncase2,val\n", ["1 cases are in no split", "case3", "List every case"]),
        ("id,split\ncase0,train\ncase0,val\ncase1,val\ncase2,val\ncase3,val\n", ["line 3", "'case0' is listed twice"]),
        ("id,split\ncase0,train\ncsae1,train\ncase2,val\ncase3,val\n", ["line 3", "'csae1'", "did you mean 'case1'?"]),
        ("id,fold\ncase0,train\n", ["column 'split' is missing or empty", "columns id and split"]),
    ],
)
def test_splits_that_cannot_be(place: Path, table: str, words: list[str], capsys: Any) -> None:
    (place / "cohort" / "split.csv").write_text(table)
    said = failure(place, capsys=capsys)
    assert all(word in said for word in words), said


def test_a_patient_in_two_splits(place: Path, capsys: Any) -> None:
    said = failure(place, "--config.data.group=(case)", capsys=capsys)
    assert "patient 'case' is in more than one split (case0 in train, case2 in val, case3 in test)" in said
    assert "Keep all images of a patient on one side" in said


def test_a_split_to_evaluate_that_is_not_there(place: Path, trained: Path, capsys: Any) -> None:
    said = failure(place, "--mode=eval", "--config.eval.splits=('holdout',)", workdir=trained, capsys=capsys)
    assert "eval.splits=('holdout',)" in said
    assert "train, val, test" in said


def test_training_cases_are_no_validation(pristine: Path, trained: Path, tmp_path: Path, capsys: Any) -> None:
    """An evaluation with another split than the run's scores what the network has seen."""
    other = tmp_path / "other.csv"
    other.write_text("id,split\ncase0,val\ncase1,test\ncase2,train\ncase3,val\n")
    said = failure(pristine, "--mode=eval", f"--config.data.split.file={other}", workdir=trained, capsys=capsys)
    assert f"{trained}: 1 of the 2 cases of split 'val' are of patients that the run was trained on" in said
    assert "first case case0, patient case0" in said
    assert "Give the run's own split (--config.data.split.file=split.csv)" in said
    assert "eval.splits=('train',)" in said


def loaded(place: Path, *overrides: str) -> Any:
    options = {"model": models.options, "tasks": tasks.options}
    return config_lib.load(str(place / "tiny.py"), overrides, lambda room, kind: options[room](kind))


def seen_in(trained: Any, config: Any, *names: str) -> str:
    """What is said of the evaluation of `config`'s splits by a run of `trained`'s; '' where it is let be."""
    cohort = dataset.open_cohort(config.data, config.tasks)
    splits = dataset.open_splits(cohort, config.data, config.seed, config.tasks)
    try:
        evaluate.check_unseen(Path("run"), trained, config, {name: splits[name] for name in names})
    except UserError as error:
        return str(error)
    return ""


def test_which_cases_a_run_has_seen(pristine: Path, place: Path, tmp_path: Path, capsys: Any) -> None:
    folds = ("data.split.file=", "data.split.folds=2", "data.split.test=0.25")
    own = loaded(pristine, *folds, "seed=1")
    assert not seen_in(own, own, "val", "test")
    # A flag forgotten: each case is in 'train' of one of the two folds, and the test cases go with the seed.
    fold = loaded(pristine, *folds, "seed=1", "data.split.fold=1")
    assert "--config.data.split.fold=0" in seen_in(own, fold, "val")
    assert not seen_in(own, fold, "train")
    assert not seen_in(own, fold, "test")
    said = [seen_in(own, loaded(pristine, *folds, f"seed={seed}"), "val", "test") for seed in range(2, 8)]
    assert any("--config.seed=1" in text for text in said)
    # The same files, whatever the folder and the patients are called; those of another cohort have the same ids.
    (tmp_path / "link").symlink_to(pristine / "cohort")
    link = f"data.cohort={tmp_path / 'link' / 'dataset.json'}"
    assert "of split 'val'" in seen_in(own, loaded(pristine, *folds, "seed=1", "data.split.fold=1", link), "val")
    renamed = [loaded(pristine, *folds, "seed=1", f"data.split.fold={k}", "data.group=case(.)") for k in (0, 1)]
    assert any(seen_in(own, config, "val", "test") for config in renamed)  # between them they evaluate every case
    copied = loaded(place, *folds, "seed=1", "data.split.fold=1")
    assert not seen_in(own, copied, "val")
    # A split that is not known any more is not made up.
    lost = loaded(pristine, "data.split.file=lost.csv")
    assert not seen_in(lost, own, "val")
    assert "lost.csv" in capsys.readouterr().err.partition("is not checked")[2]


def test_what_headers_tell_is_told_before_any_case_is_evaluated(place: Path, trained: Path, capsys: Any) -> None:
    mask = nib.load(label(place, 3))
    nib.save(nib.Nifti1Image(np.asarray(mask.dataobj)[1:], mask.affine), label(place, 3))
    label(place, 2).write_bytes(b"no mask at all")
    said = failure(place, "--mode=eval", workdir=trained, capsys=capsys)
    assert "2 of 2 case(s) cannot be evaluated, and none was:" in said
    assert f"{label(place, 3)}: shape" in said
    assert str(label(place, 2)) in said


def test_a_case_that_cannot_be_read_stops_no_other(place: Path, trained: Path, tmp_path: Path, capsys: Any) -> None:
    """A label nobody declared, which no header tells: the rest is scored, and nothing old stands beside it."""
    run = tmp_path / "evaluated"
    shutil.copytree(trained, run)
    (place / "cohort" / "split.csv").write_text("id,split\ncase0,train\ncase1,val\ncase2,val\ncase3,val\n")
    mask = nib.load(label(place, 2))
    nib.save(nib.Nifti1Image(np.asarray(mask.dataobj) * 3, mask.affine), label(place, 2))
    folder = run / "eval" / "val"
    (folder / "worst.png").touch()
    capsys.readouterr()
    arguments = [f"--config={place / 'tiny.py'}", f"--workdir={run}", "--mode=eval", "--config.eval.pictures=false"]
    with pytest.raises(SystemExit) as caught:
        run_program(lambda: main.main([*arguments, "--config.eval.splits=('val',)"]))
    out, said = capsys.readouterr()
    assert caught.value.code == 2
    assert f"{run}: 1 of 3 case(s) are refused and count in no score:\n  case2: " in said
    assert f"{label(place, 2)}: undeclared labels 3" in said
    assert "data.exclude" in said
    assert "Traceback" not in said
    assert "1 case(s) refused, in no score: case2" in out
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["n_cases"] == 2
    assert list(summary["refused"]) == ["case2"]
    assert {p.name for p in (folder / "predictions").iterdir()} == {"case1.nii.gz", "case3.nii.gz"}
    assert not (folder / "worst.png").exists()


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("--config.data.patch=(32,16,16)", ["data.patch=(32, 16, 16)", "larger than every padded", "or smaller"]),
        ("--config.data.patch=(15,16,16)", ["data.patch=(15, 16, 16)", "multiple of", "the nearest is (16, 16, 16)"]),
        ("--config.optim.lrr=1", ["unknown key 'optim.lrr'", "did you mean 'optim.lr'?"]),
        ("--config.optm.lr=1", ["unknown key 'optm'", "did you mean 'optim'?"]),
        ("--config.model.feature=(4,8)", ["unknown key 'model.feature'", "did you mean 'model.features'?"]),
        (
            "--config.tasks.spheres.level=1",
            ["unknown key 'tasks.spheres.level'", "did you mean 'tasks.spheres.levels'"],
        ),
        ("--config.model.name=unett", ["unett", "unet"]),
        ("--config.optim.lr=fast", ["optim.lr", "fast"]),
        ("--config.optim.lr", ["--config.optim.lr=VALUE"]),
        ("--config.train.total=2 weeks", ["train.total", "'500 steps', '20 epochs' or '8000 examples'"]),
        ("--config.optim.warmup=999 steps", ["optim.warmup (999 steps) must be shorter", "set optim.warmup='0 steps'"]),
        ("--config.data.preprocess.normalize=zscor", ["normalize", "zscor", "zscore"]),
        ("--config.data.preprocess.spacing=(2,2)", ["spacing", "three positive numbers"]),
        ("--lr=1", ["unknown argument '--lr=1'", "--help"]),
        ("--config.train.total=0 steps", ["train.total='0 steps' must be at least one step"]),
        ("--config.train.total=1.2.3 steps", ["train.total", "'500 steps', '20 epochs' or '8000 examples'"]),
        ("--config.train.total=1e300 steps", ["train.total", "more than 2147483647 steps"]),
        ("--config.optim.rules=(('.*',{'lr':'a'}),)", ["optim.rules '.*': 'lr' is 'a'; it needs a number from 0 on"]),
        ("--config.optim.rules=(('.*',{'decay':-1}),)", ["optim.rules '.*': 'decay' is -1"]),
        ("--config.tasks.spheres.levels=7", ["tasks.spheres.levels=7: this UNet's pyramid has 1 level(s)"]),
        ("--config.tasks.spheres.levels=2", ["set tasks.spheres.levels=1, or see model.levels"]),
        ("--config.model.features=16", ["model.features=(16,)", "two stages at least"]),
        ("--config.model.features=()", ["model.features=()", "from 1 on for each stage"]),
        ("--config.model.features=(8,0)", ["model.features=(8, 0)"]),
    ],
)
def test_settings_that_cannot_be(place: Path, override: str, words: list[str], capsys: Any) -> None:
    said = failure(place, override, capsys=capsys)
    assert all(word in said for word in words), said


def test_an_unknown_key_in_a_recipe(place: Path, capsys: Any) -> None:
    recipe = place / "tiny.py"
    recipe.write_text(recipe.read_text().replace('"batch_size": 4', '"batchsize": 4'))
    said = failure(place, capsys=capsys)
    assert "unknown key 'data.batchsize': did you mean 'data.batch_size'?" in said
    assert not (place / "run").exists()


def test_no_such_recipe(tmp_path: Path, capsys: Any) -> None:
    said = failure(tmp_path, capsys=capsys)
    assert f"no such file '{tmp_path / 'tiny.py'}'" in said
    assert "configs/" in said


# ---------------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_of_another_architecture(pristine: Path, trained: Path, capsys: Any) -> None:
    said = failure(pristine, "--config.model.features=(4,12)", workdir=trained, capsys=capsys)
    assert str(trained / "checkpoints" / "latest" / "2") in said
    assert "another architecture" in said
    # Which parameters, and how they differ.
    assert "params/backbone/down1/kernel: (2, 2, 2, 4, 8) in the checkpoint, (2, 2, 2, 4, 12) in the model" in said
    assert "another --workdir" in said


def test_first_weights_of_another_backbone(place: Path, trained: Path, capsys: Any) -> None:
    recipe = place / "tiny.py"
    recipe.write_text(
        recipe.read_text().replace(
            '"unet", "features": (4, 8), "convs": 1', '"nnunet", "features": (4, 8), "blocks": 1'
        )
    )
    said = failure(place, f"--config.init.source={trained}", capsys=capsys)
    assert f"init.source {trained} (" in said
    assert "its backbone is 'unet', this run's is 'nnunet'; set model.name='unet' with its options, or" in said
    assert not files_in(place / "run")


def test_first_weights_of_another_number_of_channels(place: Path, trained: Path, capsys: Any) -> None:
    table, sides = place / "cases.csv", ("train", "train", "val", "test")
    rows = [f"{i},{image(place, i)},{image(place, i)},{label(place, i)},{side}" for i, side in enumerate(sides)]
    table.write_text("\n".join(["id,t1,flair,mask,side", *rows]) + "\n")
    said = failure(
        place, f"--config.init.source={trained}", f"--config.data.cohort={table}", "--config.data.images.T1=t1",
        "--config.data.images.FLAIR=flair", "--config.data.modalities=('T1', 'FLAIR')",
        "--config.data.targets.spheres=mask", "--config.data.labels.shell=1", "--config.data.labels.core=2",
        "--config.data.split.file=", "--config.data.split.column=side", capsys=capsys,
    )  # fmt: skip
    assert f"init.source {trained} (" in said
    assert "backbone/encoder0/block0/conv/kernel: 3×3×3×1×4 there, 3×3×3×2×4 here (1 channel(s) there, 2 here" in said
    assert "init.channels='average' or 'names' says how" in said
    assert not files_in(place / "run")


def test_a_run_without_a_checkpoint(pristine: Path, tmp_path: Path) -> None:
    """As a shell sees it: both programs in processes of their own."""
    (tmp_path / "run").mkdir()
    for command in (
        ["medjax.main", f"--config={pristine / 'tiny.py'}", f"--workdir={tmp_path / 'run'}", "--mode=eval"],
        [
            "medjax.predict",
            f"--run={tmp_path / 'run'}",
            f"--input={image(pristine, 0)}",
            f"--output={tmp_path / 'out'}",
        ],
    ):
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, cwd=REPO, timeout=240)
        assert done.returncode == 2
        assert f"medjax: error: {tmp_path / 'run'}: holds no checkpoint" in done.stderr
        assert "train it first" in done.stderr
        assert "Traceback" not in done.stderr
    assert files_in(tmp_path) == {}


def test_another_cohort_than_the_run_was_trained_on(place: Path, trained: Path, capsys: Any) -> None:
    table = place / "cohort" / "dataset.json"
    table.write_text(table.read_text().replace('"shell"', '"rind"'))
    said = failure(place, "--mode=eval", workdir=trained, capsys=capsys)
    assert str(trained) in said
    assert "shell" in said
    assert "rind" in said


GRADES = "id,grade,a,b\ncase0,low,0,1\ncase1,high,1,0\ncase2,low,0,1\ncase3,high,1,0\n"


def graded(place: Path, target: Any, classes: Any, **task: Any) -> None:
    """Gives the cohort a table of grades, and the recipe a task 'grade' of them."""
    (place / "cohort" / "grades.csv").write_text(GRADES)
    recipe = place / "tiny.py"
    lines = f"""
    config.data.table, config.data.targets = "grades.csv", ConfigDict({{"grade": {target!r}}})
    config.data.classes = ConfigDict({{{f"'grade': {classes!r}" if classes else ""}}})
    config.tasks.grade = ConfigDict({task!r})
    return config"""
    recipe.write_text(recipe.read_text().replace("    return config", lines))


@pytest.mark.parametrize(
    ("target", "classes", "task"),
    [
        ("grade", ("high", "low"), {"type": "classification", "problem": "binary", "names": ("low", "high")}),
        ("grade", ("high", "low"), {"type": "classification", "problem": "ordinal", "names": ("Low", "High")}),
        ("grade", ("low", "high"), {"type": "classification", "names": ("none", "low", "high")}),
        (("a", "b"), (), {"type": "classification", "problem": "multilabel", "names": ("b", "a")}),
        (("a", "b"), (), {"type": "regression", "names": ("b", "a")}),
        (("a", "b"), ("b", "a"), {"type": "regression", "names": ()}),
        ("grade", ("high", "low"), {"type": "detection", "names": ("low", "high")}),
        ("grade", ("high", "low"), {"type": "landmark", "names": ("low", "high")}),
    ],
)
def test_names_in_another_order_than_the_data(place: Path, target: Any, classes: Any, task: Any, capsys: Any) -> None:
    graded(place, target, classes, **task)
    said = failure(place, capsys=capsys)
    assert "tasks.grade.names=" in said
    assert "stands at another place than in the data" in said


@pytest.mark.parametrize(
    ("target", "classes", "task"),
    [
        ("grade", ("low", "high"), {"type": "classification", "problem": "binary", "names": ("not high", "high")}),
        ("grade", ("low", "high"), {"type": "classification", "names": ("benign", "malignant", "unsure")}),
        ("grade", ("low", "high"), {"type": "regression", "names": ("how high",)}),
        (("a", "b"), (), {"type": "regression", "names": ("first", "second")}),
        (("a", "b"), ("first", "second"), {"type": "classification", "problem": "multilabel", "names": ()}),
    ],
)
def test_names_of_another_wording_pass(place: Path, target: Any, classes: Any, task: Any) -> None:
    graded(place, target, classes, **task)
    options = {"model": models.options, "tasks": tasks.options}
    config = config_lib.load(str(place / "tiny.py"), (), lambda room, kind: options[room](kind))
    assert tuple(job_lib.open_job(config).tasks["grade"].names) == (task["names"] or classes)


def test_a_value_no_task_takes_in_a_case_that_is_not_trained_on(place: Path, capsys: Any) -> None:
    """Validation cases and those to evaluate are checked as those of training are, and before the first step."""
    graded(place, ("a", "b"), (), type="classification", problem="multilabel", names=("a", "b"))
    table = place / "cohort" / "grades.csv"
    table.write_text(GRADES.replace("case1,high,1", "case1,high,5"))
    (place / "split.csv").write_text("id,split\ncase0,train\ncase1,val\ncase2,train\ncase3,train\n")
    said = failure(place, f"--config.data.split.file={place / 'split.csv'}", capsys=capsys)
    assert "task 'grade': case case1 has [5.0, 0.0]; it takes 2 numbers" in said


# ------------------------------------------------------------------------------------------------- no room on the disk


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: what a full disk is to a writer, without filling one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_no_room_for_a_checkpoint(pristine: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run_program(
            lambda: main.main(
                [f"--config={pristine / 'tiny.py'}", f"--workdir={tmp_path}", "--config.train.total=1 steps"]
            )
        )
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert f"{tmp_path / 'checkpoints' / 'best' / '1'}: no room on the disk" in said
    assert "0.0 MB are free" in said
    assert "Traceback" not in said
    assert not any((tmp_path / "checkpoints").rglob("*.*"))
    assert not (tmp_path / "eval").exists()


def test_a_disk_that_fills_while_a_checkpoint_is_written(tmp_path: Path, recwarn: Any) -> None:
    state = {"a": jnp.arange(100_000.0), "b": jnp.ones(100_000) / 3}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save("latest", 1, state, {"step": 1})
    checkpoints.wait()
    before = files_in(tmp_path)
    with files_up_to(4096):
        checkpoints.save("latest", 2, state, {"step": 2})
        with pytest.raises(UserError) as caught:
            checkpoints.wait()
    assert str(tmp_path / "checkpoints") in str(caught.value)
    assert os.strerror(errno.EFBIG) in str(caught.value)
    assert files_in(tmp_path) == before
    # The one before is whole, and with room again the next is written.
    checkpoints.save("latest", 3, state, {"step": 3})
    checkpoints.close()
    again = Checkpoints(tmp_path, read_only=True)
    assert again.newest("latest") == 3
    assert again.meta("latest", 1) == {"step": 1}
    assert not [str(w.message) for w in recwarn if "exception" in str(w.message).lower()]


@pytest.mark.parametrize(
    ("target", "name"),
    [("os.fsync", "eval/val/predictions/case2.nii.gz"), ("os.replace", "eval/val/predictions/case2.nii.gz")],
)
def test_no_room_for_a_prediction(
    pristine: Path, trained: Path, tmp_path: Path, target: str, name: str, capsys: Any, monkeypatch: Any
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    shutil.rmtree(run / "eval")
    monkeypatch.setattr(target, full)
    said = failure(pristine, "--mode=eval", workdir=run, capsys=capsys)
    assert f"{run / name}: cannot be written: No space left on device" in said


def test_no_room_for_the_summary(pristine: Path, trained: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    summary = run / "eval" / "val" / "summary.json"
    assert summary.exists()
    replace = os.replace
    monkeypatch.setattr("os.replace", lambda a, b: full() if str(b).endswith(".json") else replace(a, b))
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run_program(lambda: main.main([f"--config={pristine / 'tiny.py'}", f"--workdir={run}", "--mode=eval"]))
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert f"{summary}: cannot write: No space left on device" in said
    assert "Traceback" not in said
    assert not summary.exists()  # the old one would stand beside masks that are new
    assert not [f for f in files_in(run) if "tmp" in f]


def test_any_other_writer_on_a_full_disk(capsys: Any) -> None:
    def program(code: int) -> None:
        raise OSError(code, os.strerror(code), "picture.png")

    with pytest.raises(SystemExit) as caught:
        run_program(lambda: program(errno.ENOSPC))
    assert caught.value.code == 2
    assert "medjax: error: picture.png: No space left on device" in capsys.readouterr().err
    with pytest.raises(OSError):  # not the disk's: a defect, which must keep its stack trace
        run_program(lambda: program(errno.EBADF))


# ------------------------------------------------------------------------------------------------------------- oddities


@pytest.fixture
def fresh_notes(monkeypatch: Any) -> None:
    """As in a new process: nothing was reported yet."""
    monkeypatch.setattr(errors, "_said", set())
    monkeypatch.setattr(nifti, "_reported", set())


def oddities(place: Path, capsys: Any) -> str:
    """What is said while the data are prepared; the run then ends because of its patch, before anything is compiled."""
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run_program(
            lambda: main.main(
                [f"--config={place / 'tiny.py'}", f"--workdir={place / 'run'}", "--config.data.patch=(32,16,16)"]
            )
        )
    said = capsys.readouterr().err
    assert said.count("medjax: error:") == 1
    assert "data.patch" in said
    return said


def test_headers_that_contradict_themselves_are_reported_once(place: Path, fresh_notes: None, capsys: Any) -> None:
    for number in (0, 1):  # every train case, image and label: one line all the same
        for file in (image(place, number), label(place, number)):
            volume = nib.load(file)
            header = volume.header.copy()
            header.set_sform(volume.affine, 1)
            shifted = volume.affine.copy()
            shifted[:3, 3] += 5
            header.set_qform(shifted, 1)
            nib.save(nib.Nifti1Image(np.array(volume.dataobj), None, header), file)
    said = oddities(place, capsys)
    assert said.count("medjax: note:") == 1
    assert "qform" in said.partition("medjax: note:")[2]
    assert "case0.nii.gz" in said or "case1.nii.gz" in said


def test_a_pixdim_of_0_beside_a_good_sform_is_reported_once(place: Path, fresh_notes: None, capsys: Any) -> None:
    for number in (0, 1):
        for file in (image(place, number), label(place, number)):
            volume = nib.load(file)
            volume.header.set_sform(volume.affine, 1)
            volume.header.set_qform(None, 0)
            data = bytearray(nib.Nifti1Image(np.array(volume.dataobj), None, volume.header).to_bytes())
            data[80:84] = bytes(4)  # pixdim[1]
            file.write_bytes(gzip.compress(bytes(data)))
    said = oddities(place, capsys)
    assert said.count("medjax: note:") == 1
    assert "(pixdim) is 0; the sform has it and is used" in said


def test_wildly_different_intensities_are_reported_once(place: Path, fresh_notes: None, capsys: Any) -> None:
    rewrite(image(place, 1), lambda d: d * np.float32(1e5))
    said = oddities(place, capsys)
    assert said.count("intensities differ wildly") == 1
    assert "case0" in said
    assert "case1" in said
