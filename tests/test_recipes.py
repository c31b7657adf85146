"""Every recipe of synthetic data runs in its debug variant through the command line: trained, scored, written."""

from __future__ import annotations

import ast
import csv
import dataclasses
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest

from medjax import config as config_lib
from medjax import job as job_lib
from medjax import main, models, peft, tasks, transfer
from medjax.errors import UserError
from medjax.models.model import build_model

REPO = Path(__file__).resolve().parents[1]
RUNS: dict[str, Path] = {}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        # The cohorts of this file alone; the native kernels stay where the other tests find them.
        folder = tmp_path_factory.mktemp("cohorts")
        known = Path(os.environ.get("MEDJAX_CACHE") or Path.home() / ".cache" / "medjax") / "native"
        if known.is_dir():
            (folder / "native").symlink_to(known)
        patch.setenv("MEDJAX_CACHE", str(folder))
        yield folder


def run(name: str, cache: Path, arg: str = "debug", *more: str, split: str = "test") -> tuple[Path, dict[str, Any]]:
    """The run folder of a recipe and its metrics of a split; trained once for all tests."""
    workdir = cache / "runs" / name
    if name not in RUNS:
        main.main([f"--config={REPO}/configs/{name}.py:{arg}", f"--workdir={workdir}", *more])
        RUNS[name] = workdir
    return workdir, json.loads((workdir / "eval" / split / "summary.json").read_text())["metrics"]


def losses(workdir: Path) -> list[float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def predictions(workdir: Path, file: str) -> list[dict[str, str]]:
    with open(workdir / "eval" / "test" / "predictions" / file, newline="") as table:
        return list(csv.DictReader(table))


def test_brain_tumour(cache: Path) -> None:
    workdir, metrics = run("brain_tumour", cache)
    assert np.isfinite(losses(workdir)).all()
    assert set(metrics["dice"]["per_class"]) == {"whole tumour", "core", "enhancing"}
    config = json.loads((workdir / "config.json").read_text())
    assert config["data"]["preprocess"]["missing"] == "zero"
    # A case with two of the four contrasts is predicted all the same.
    from medjax import predict

    image = next((workdir / "eval" / "test" / "predictions").glob("*.nii.gz"))
    source = next(cache.glob("brain-*/imagesTr")) / image.name
    volume = nib.load(source)
    for channel, modality in ((1, "T1c"), (3, "FLAIR")):
        part = nib.Nifti1Image(np.asarray(volume.dataobj)[..., channel], volume.affine)
        nib.save(part, cache / f"some_{modality}.nii.gz")
    only = cache / "only"
    only.mkdir()
    for file in cache.glob("some_*.nii.gz"):
        file.rename(only / file.name)
    predict.main([f"--run={workdir}", f"--input={only}", f"--output={cache / 'said'}"])
    assert nib.load(cache / "said" / "some.nii.gz").shape == volume.shape[:3]


def test_brain_finetune_begins_from_brain_mae(
    cache: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two commands of the README, one after the other in one folder."""
    monkeypatch.chdir(cache)
    main.main([f"--config={REPO}/configs/brain_mae.py:debug"])
    capsys.readouterr()
    main.main([f"--config={REPO}/configs/brain_finetune.py:debug"])
    said = capsys.readouterr().out
    workdir = cache / "runs" / "brain_finetune_debug"
    metrics = json.loads((workdir / "eval" / "test" / "summary.json").read_text())["metrics"]
    assert "init        runs/brain_mae_debug (" in said
    assert "40 matched, 0 reshaped, 4 missing" in said, "all of the network, and nothing of its head"
    assert np.isfinite(losses(workdir)).all()
    assert "dice" in metrics
    assert "run         brain_finetune: 2 train, 2 val, 2 test cases" in said
    shutil.rmtree(cache / "runs" / "brain_mae_debug")
    with pytest.raises(UserError, match="run --config=configs/brain_mae.py:debug first, with --workdir=.*source="):
        main.main([f"--config={REPO}/configs/brain_finetune.py:debug", f"--workdir={cache / 'runs' / 'none'}"])


def resolved(recipe: str, overrides: Sequence[str] = ()) -> Any:
    options = {"model": models.options, "tasks": tasks.options}
    return config_lib.load(f"{REPO}/configs/{recipe}", overrides, lambda room, kind: options[room](kind))


def test_every_argument_of_pretraining_and_fine_tuning() -> None:
    plain = resolved("brain_mae.py")
    assert (plain.data.cohort, plain.data.extra.folder, plain.data.layout) == ("synthetic_brain", "", "")
    more = resolved("brain_mae.py:folder=/scans,modality=T2")
    assert (more.data.cohort, dict(more.data.extra)) == ("synthetic_brain", {"folder": "/scans", "modality": "T2"})
    alone = resolved("brain_mae.py:data=/scans,modality=T2")
    assert (alone.data.cohort, alone.data.layout, alone.data.modalities) == ("/scans", "files", ("T2",))
    assert (alone.data.split.file, alone.data.split.folds, alone.data.extra.folder) == ("", 5, "")
    for config in (plain, more, alone):
        assert config.data.skip_unreadable
        assert config.data.preprocess.missing == "zero"

    tuned = resolved("brain_finetune.py")
    assert (tuned.init.source, tuned.data.labelled, tuned.peft.type) == ("runs/brain_mae", 6, "")
    assert (tuned.optim.layer_decay, tuned.optim.decoder_first) == (0.75, "20 steps")
    other = resolved("brain_finetune.py:source=runs/else,labelled=3")
    assert (other.init.source, other.data.labelled) == ("runs/else", 3)
    random = resolved("brain_finetune.py:scratch")
    assert (random.init.source, random.optim.layer_decay, random.optim.lr) == ("", 1.0, tuned.optim.lr)
    for kind, share in (("lora", "(4.9 %)"), ("probe", "(0.0")):
        config = resolved(f"brain_finetune.py:peft={kind}")
        assert (config.init.source, config.optim.layer_decay, config.optim.lr) == ("runs/brain_mae", 1.0, 1e-2)
        model = build_model(config, tasks.build(config.tasks, {str(i): i for i in range(1, 7)}))
        image = jnp.zeros((1, *config.data.patch, 4))
        shapes = jax.eval_shape(lambda m=model, x=image: m.init(jax.random.key(0), x, train=True)["params"])
        division = peft.divide(config, {path: leaf.shape for path, leaf in peft.flat(shapes).items()})
        assert division.trained == {path for path in division.shapes if path.startswith("heads_")}
        assert share in division.describe()


def test_brain_mae_of_a_folder(cache: Path, tmp_path: Path) -> None:
    """`folder=` beside the cohort, for training alone; `data=` by itself, trained."""
    rng = np.random.default_rng(0)
    (tmp_path / "scans").mkdir()
    for number in range(6):
        volume = rng.normal(100, 10, (32, 32, 31 + number)).astype(np.float32)
        nib.save(nib.Nifti1Image(volume, np.diag([4.0, 4.0, 4.0, 1.0])), tmp_path / "scans" / f"scan{number}.nii.gz")
    (tmp_path / "scans" / "broken.nii.gz").write_bytes(b"")
    both = job_lib.open_job(resolved(f"brain_mae.py:debug,folder={tmp_path / 'scans'},modality=T2"))
    assert {split: len(cases) for split, cases in both.splits.items()} == {"train": 4 + 6, "val": 2, "test": 2}
    assert {tuple(case.images) for case in both.splits["train"] if "scan" in case.id} == {("T2",)}
    run, recipe = tmp_path / "run", f"{REPO}/configs/brain_mae.py:debug,data={tmp_path / 'scans'},modality=T2"
    short = ["--config.train.total=2 steps", "--config.train.eval_every=2 steps", "--config.optim.warmup=0 steps"]
    short += ["--config.model.features=(4,8)", "--config.eval.pictures=false"]
    main.main([f"--config={recipe}", f"--workdir={run}", *short, "--config.train.log_every=1 steps"])
    assert np.isfinite(losses(run)).all()
    assert len(losses(run)) == 2
    assert "broken" in (run / "skipped.csv").read_text()
    summary = json.loads((run / "eval" / "val" / "summary.json").read_text())
    assert 0 < summary["n_cases"] < 6
    assert {"error", "explained"} <= set(summary["metrics"])
    # It is what brain_finetune.py begins from, though that has four contrasts.
    config = resolved(f"brain_finetune.py:debug,source={run}", ["model.features=(4,8)"])
    model = build_model(config, tasks.build(config.tasks, {str(i): i for i in range(1, 7)}))
    start = transfer.open_start(config, model, ("T1", "T1c", "T2", "FLAIR"), tmp_path)
    assert start is not None
    stem = "backbone/encoder0/block0/conv/kernel"
    assert {path: text.endswith("channels averaged") for path, text in start.reshaped.items()} == {stem: True}
    assert start.missing
    assert all(path.startswith("heads_") for path in start.missing)
    # Weights that saw the same four are taken as they are.
    four = dataclasses.replace(start.source, modalities=("T1", "T1c", "T2", "FLAIR"))
    four.params[stem] = rng.normal(size=start.params[stem].shape).astype(np.float32)
    again = transfer.match(four, transfer.describe(config, model, four.modalities), config.init)
    np.testing.assert_array_equal(again.params[stem], four.params[stem])
    assert not again.reshaped


def test_stroke_risk(cache: Path) -> None:
    workdir, metrics = run("stroke_risk", cache)
    assert np.isfinite(losses(workdir)).all()
    assert {"suspicious/dice", "stroke/accuracy"} <= set(metrics)
    rows = predictions(workdir, "stroke.csv")
    assert [row["class"] for row in rows] == ["no stroke", "stroke"] * 2
    for pair in zip(rows[::2], rows[1::2], strict=True):
        assert sum(float(row["probability"]) for row in pair) == pytest.approx(1, abs=1e-5)


def test_breast(cache: Path) -> None:
    workdir, metrics = run("breast", cache)
    assert np.isfinite(losses(workdir)).all()
    assert {"lesion/dice", "grade/accuracy", "grade/kappa"} <= set(metrics)
    assert {row["class"] for row in predictions(workdir, "grade.csv")} == {"1", "2", "3"}


def test_colorectal(cache: Path) -> None:
    workdir, metrics = run("colorectal", cache)
    assert np.isfinite(losses(workdir)).all()
    assert {"cpm", "size_mae_mm", "pedunculated_auroc", "flat_auroc"} <= set(metrics)


# Of ACDC three patients of every diagnosis: enough to learn each from two or more.
HEARTS = {"DCM": (1, 2, 3), "HCM": (21, 22, 23), "MINF": (41, 42, 43), "NOR": (61, 62, 63), "RV": (81, 82, 83)}


@pytest.mark.real
def test_cardiac(cache: Path, data_root: Path) -> None:
    folder = data_root / "cardiac_acdc"
    truth = {row["patient"]: row["group"] for row in csv.DictReader((folder / "patients.csv").read_text().splitlines())}
    kept = {f"patient{number:03d}" for numbers in HEARTS.values() for number in numbers}
    left_out = tuple(patient for patient in truth if patient not in kept)
    # What six steps teach is nonsense all over the chest, whose surfaces take long to measure: few are judged, once.
    keys = [f"data.exclude={left_out}", "data.split.stratify=group", "data.split.folds=8", "train.eval_every=6 steps"]
    keys = [f"--config.{key}" for key in keys]
    workdir, metrics = run("cardiac", cache, f"debug,data={folder}", *keys, split="val")
    assert np.isfinite(losses(workdir)).all()
    assert set(metrics["dice"]["per_class"]) == {"RV", "myocardium", "LV"}
    evaluated = workdir / "eval" / "val"
    summary = json.loads((evaluated / "summary.json").read_text())
    assert summary["n_cases"] == len(list((evaluated / "predictions").glob("*.nii.gz"))) == 4
    assert {"lv_ef_percent", "rv_ef_percent", "mass_g", "wall_mm"} <= set(summary["measures"])
    table = json.loads((workdir / "measures.json").read_text())["diagnosis"]
    assert set(table["fitted"]["classes"]) == set(HEARTS)
    judged = summary["diagnosis"]
    assert judged["n"] == 2
    assert 0 <= judged["accuracy"]["value"] <= 1
    assert 0 <= judged["on_reference_masks"] <= 1
    with open(evaluated / "diagnosis.csv", newline="") as rows:
        said = {row["patient"]: row["reference"] for row in csv.DictReader(rows)}
    assert said == {patient: truth[patient] for patient in said}
    assert len(said) == 2


def test_acdc_as_published_is_read(tmp_path: Path) -> None:
    """Folders of patients with Info.cfg; the table is made by the command in the recipe's docstring."""
    from medjax.data import dataset
    from medjax.measures import frames

    for number, (group, ed, es) in enumerate((("DCM", 1, 12), ("NOR", 4, 8), ("RV", 1, 10), ("HCM", 1, 9)), start=1):
        patient = f"patient{number:03d}"
        (tmp_path / patient).mkdir()
        text = f"ED: {ed}\r\nES: {es}\r\nGroup: {group}\r\nHeight: 184.0\r\nNbFrame: 30\r\nWeight: 95.0\r\n"
        (tmp_path / patient / "Info.cfg").write_text(text if number > 1 else text.replace("\r", ""))
        (tmp_path / patient / "MANDATORY_CITATION.md").write_text("cite")
        nib.save(
            nib.Nifti1Image(np.zeros((4, 4, 2, 3), np.int16), np.eye(4)), tmp_path / patient / f"{patient}_4d.nii.gz"
        )
        for frame in (ed, es):
            name = f"{patient}_frame{frame:02d}"
            image = np.full((4, 4, 2), 31 * number + frame, np.int16)
            nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / patient / f"{name}.nii.gz")
            nib.save(nib.Nifti1Image(np.ones((4, 4, 2), np.uint8), np.eye(4)), tmp_path / patient / f"{name}_gt.nii.gz")
    docstring = ast.get_docstring(ast.parse((REPO / "configs" / "cardiac.py").read_text())) or ""
    command = "\n".join(line for line in docstring.splitlines() if line.startswith("    "))
    subprocess.run(["sh", "-ec", command], cwd=tmp_path, check=True)
    assert (tmp_path / "patients.csv").read_text().splitlines()[:3] == [
        "patient,group,ED,ES", "patient001,DCM,1,12", "patient002,NOR,4,8",
    ]  # fmt: skip
    config = resolved(f"cardiac.py:data={tmp_path}")
    cohort = dataset.open_cohort(config.data, config.tasks)
    assert [case.id for case in cohort.cases][:3] == ["patient001_frame01", "patient001_frame12", "patient002_frame04"]
    assert all("heart" in case.targets and case.group in case.id for case in cohort.cases)
    assert {k: len(v) for k, v in dataset.open_splits(cohort, config.data, 0, config.tasks).items()} == {
        "train": 6, "val": 2,
    }  # fmt: skip
    found = frames.patients_of(cohort.cases, config.measures.frames)
    assert {frame: case.id for frame, case in found["patient002"].items()} == {
        "ED": "patient002_frame04", "ES": "patient002_frame08",
    }  # fmt: skip


def test_hippocampus_as_downloaded_is_dealt_into_folds(tmp_path: Path) -> None:
    """The Decathlon's archive has no split.csv; a folder with one is split by it."""
    from medjax.data import dataset

    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / folder).mkdir()
    listed = []
    for number in range(10):
        name = f"hippocampus_{number:03d}.nii.gz"
        nib.save(nib.Nifti1Image(np.full((4, 4, 4), number, np.int16), np.eye(4)), tmp_path / "imagesTr" / name)
        nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.uint8), np.eye(4)), tmp_path / "labelsTr" / name)
        listed.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    about = {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "Anterior", "2": "Posterior"}}
    (tmp_path / "dataset.json").write_text(json.dumps(about | {"training": listed, "test": []}))
    config = resolved(f"hippocampus.py:data={tmp_path}")
    cohort = dataset.open_cohort(config.data, config.tasks)
    splits = dataset.open_splits(cohort, config.data, config.seed, config.tasks)
    assert {name: len(cases) for name, cases in splits.items()} == {"train": 8, "val": 2}
    rows = [f"{case.id},{'val' if number == 3 else 'train'}" for number, case in enumerate(cohort.cases)]
    (tmp_path / "split.csv").write_text("\n".join(["id,split", *rows]) + "\n")
    config = resolved(f"hippocampus.py:data={tmp_path}")
    splits = dataset.open_splits(cohort, config.data, config.seed, config.tasks)
    assert [case.id for case in splits["val"]] == ["hippocampus_003"]


@pytest.mark.real
def test_lung_nodule(cache: Path, data_root: Path) -> None:
    workdir, metrics = run("lung_nodule", cache, f"debug,data={data_root / 'lung_nodules'}")
    assert np.isfinite(losses(workdir)).all()
    assert {"outline/dice", "nodules/cpm", "nodules/malignant_auroc", "nodules/texture_mae"} <= set(metrics)
    config = json.loads((workdir / "config.json").read_text())
    assert config["tasks"]["nodules"]["typical"] > 3, "the size of a nodule in mm is learnt from the training canvases"


def test_brats_folder_is_read(tmp_path: Path) -> None:
    """The patterns of `data=FOLDER` fit the names of BraTS, and a contrast may lack."""
    from medjax.data import dataset

    for number in range(6):
        name = f"BraTS-GLI-{number:05d}-000"
        (tmp_path / name).mkdir()
        for part in ("t1n", "t1c", "t2w", "t2f", "seg")[number == 3 :]:
            array = np.full((4, 4, 4), number, np.uint8 if part == "seg" else np.int16)
            nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / name / f"{name}-{part}.nii.gz")
    config = resolved(f"brain_tumour.py:data={tmp_path}")
    cohort = dataset.open_cohort(config.data, config.tasks)
    assert cohort.modalities == ("T1", "T1c", "T2", "FLAIR")
    assert [len(case.images) for case in cohort.cases] == [4, 4, 4, 3, 4, 4]
    assert all("tumour" in case.targets for case in cohort.cases)
    assert tasks.build(config.tasks, cohort.labels)["tumour"].classes["core"] == (1, 3)


@pytest.mark.real
def test_two_real_cases_are_read_and_predicted(data_root: Path, tmp_path: Path) -> None:
    """A folder whose masks have another name, one case without any: predicted both, scored what has a mask."""
    from untrained import make_run

    from medjax import config as config_lib
    from medjax import models, tasks
    from medjax.data import dataset
    from medjax.evaluate import evaluate_split
    from medjax.predict import Run

    options = {"model": models.options, "tasks": tasks.options}
    recipe = f"{REPO}/configs/brain_tumour.py:debug,data={data_root / 'brats_4mod'}"

    def load(*keys: str) -> Any:
        return config_lib.load(recipe, keys, lambda room, kind: options[room](kind))

    config = load()
    with pytest.raises(UserError, match=r"\*seg.nii.gz' finds no file. There are: .*seg-BraTS23_1.nii.gz"):
        dataset.open_cohort(config.data, config.tasks)
    config = load("data.targets.tumour={case}/seg-BraTS23_1.nii.gz")
    cohort = dataset.open_cohort(config.data, config.tasks)
    assert {case.id: set(case.targets) for case in cohort.cases} == {
        "BraTS-GLI-00001-000": {"tumour"},
        "BraTS-MET-00110-000": set(),
    }
    with pytest.raises(UserError, match=r"folds=5: must be from 2 to the number of patients \(2\)"):
        dataset.open_splits(cohort, config.data, config.seed, check_content=False)
    folder = make_run(
        tmp_path / "run", config.tasks.to_dict(), modalities=cohort.modalities, labels=dict(cohort.labels),
        spacing=(4.0, 4.0, 4.0), missing="zero", evaluation={"pictures": False},
    )  # fmt: skip
    summary = evaluate_split(Run(folder), "test", cohort.cases, tmp_path / "eval")
    assert summary["n_cases"] == 1
    assert set(summary["metrics"]["dice"]["per_class"]) == {"whole tumour", "core", "enhancing"}
    for case in cohort.cases:
        image, said = nib.load(case.images["T1"]), nib.load(tmp_path / "eval" / "predictions" / f"{case.id}.nii.gz")
        assert said.shape == image.shape == (240, 240, 155)
        np.testing.assert_array_equal(said.affine, image.affine)
