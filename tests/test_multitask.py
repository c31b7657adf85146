"""Several tasks of every kind in one run, each case labelled for some of them: trained, evaluated, predicted."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from tiny import write_cohort

from benchmarks import task_gradients
from medjax import evaluate, main, predict
from medjax.errors import UserError

RECIPE = """
from ml_collections import ConfigDict

def get_config(arg=None):
    config = ConfigDict()
    config.data = ConfigDict({{
        "cohort": {manifest!r}, "images": {{"MRI": "image"}}, "labels": {{"shell": 1, "core": 2}},
        "targets": {{"organ": "mask", "grade": "grade", "size": "size", "spot": "spots"}},
        "classes": {{"grade": ("low", "high")}}, "split": {{"column": "split"}},
        "preprocess": {{"spacing": (2.0, 2.0, 2.0)}}, "patch": (16, 16, 16), "batch_size": 4,
    }})
    config.augment = ConfigDict({{"mirror": (0,), "affine": {{"p": 0.5}}}})
    config.model = ConfigDict({{"name": "unet", "features": (8, 8)}})
    config.tasks = ConfigDict({{
        "organ": {{"type": "segmentation", "levels": 1}}, "grade": {{"type": "classification"}},
        "size": {{"type": "regression"}}, "spot": {{"type": "detection"}},
    }})
    config.optim = ConfigDict({{"name": "adamw", "lr": 3e-3, "balance": "uncertainty", "accumulate": 2}})
    config.train = ConfigDict({{
        "total": "4 steps", "log_every": "1 steps", "eval_every": "4 steps", "checkpoint_every": "2 steps",
    }})
    return config
"""
LACKS = {0: "mask", 1: "grade", 2: "size", 3: "spots"}  # case -> what nobody noted


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    cohort = write_cohort(folder / "cohort", n=9)
    rows = []
    for i in range(9):
        label = nib.load(cohort / "labelsTr" / f"case{i}.nii.gz")
        mask = np.asarray(label.dataobj)
        centre = label.affine @ [*np.argwhere(mask == 2).mean(0), 1.0]
        row = {
            "id": f"case{i}",
            "image": f"imagesTr/case{i}.nii.gz",
            "mask": f"labelsTr/case{i}.nii.gz",
            "grade": ("low", "high")[i % 2],
            "size": float((mask > 0).sum()) / 1000,
            "spots": [{"center": centre[:3].tolist(), "size": [14.0, 14.0, 14.0]}],
            "split": "val" if i > 6 else "train",
        }
        if i in LACKS:
            row[LACKS[i]] = ""
        rows.append(row)
    (cohort / "cases.json").write_text(json.dumps(rows))
    recipe = folder / "recipe.py"
    recipe.write_text(RECIPE.format(manifest=str(cohort / "cases.json")))
    main.main([f"--config={recipe}", f"--workdir={folder / 'run'}"])
    return folder / "run"


def test_every_task_is_trained_and_weighed(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "train/loss" in row]
    assert len(steps) == 4
    for task in ("organ", "grade", "size", "spot"):
        losses = [row[f"train/loss/{task}"] for row in steps]
        assert np.isfinite(losses).all()
        assert any(losses)
        assert steps[-1][f"train/log_variance/{task}"] != 0
    assert "val/score" in next(row for row in rows if "val/loss" in row)
    config = json.loads((run / "config.json").read_text())
    assert config["tasks"]["grade"]["names"] == ["low", "high"]


def test_every_kind_is_scored_and_written(run: Path) -> None:
    summary = json.loads((run / "eval" / "val" / "summary.json").read_text())
    assert summary["n_cases"] == 2
    assert set(summary["metrics"]["organ/dice"]["per_class"]) == {"shell", "core"}
    assert {key.split("/")[0] for key in summary["metrics"]} == {"organ", "grade", "size", "spot"}
    rows = list(csv.DictReader((run / "eval" / "val" / "cases.csv").open()))
    assert {row["task"] for row in rows} == {"organ", "grade", "size", "spot"}
    made = run / "eval" / "val" / "predictions"
    assert (made / "case7.nii.gz").exists()
    grades = list(csv.DictReader((made / "grade.csv").open()))
    assert [row["case"] for row in grades] == ["case7", "case7", "case8", "case8"]
    for case in ("case7", "case8"):
        assert sum(float(row["probability"]) for row in grades if row["case"] == case) == pytest.approx(1, abs=1e-5)
    assert [row["case"] for row in csv.DictReader((made / "size.csv").open())] == ["case7", "case8"]
    assert (made / "spot.csv").exists()


def test_a_new_scan_gets_what_the_evaluation_gave(run: Path, tmp_path: Path) -> None:
    scan = run.parent / "cohort" / "imagesTr" / "case7.nii.gz"
    predict.main([f"--run={run}", f"--input={scan}", f"--output={tmp_path / 'out'}"])
    made = run / "eval" / "val" / "predictions"
    np.testing.assert_array_equal(
        np.asarray(nib.load(tmp_path / "out" / "case7.nii.gz").dataobj),
        np.asarray(nib.load(made / "case7.nii.gz").dataobj),
    )
    for task in ("grade", "size", "spot"):
        alone = list(csv.DictReader((tmp_path / "out" / f"{task}.csv").open()))
        assert alone == [row for row in csv.DictReader((made / f"{task}.csv").open()) if row["case"] == "case7"]


def test_classes_in_another_order_than_the_run_are_not_scored(run: Path) -> None:
    text = (run.parent / "recipe.py").read_text()
    turned = run.parent / "turned.py"
    turned.write_text(text.replace('("low", "high")', '("high", "low")'))
    with pytest.raises(UserError, match=r"task 'grade' was trained on the order \('low', 'high'\)"):
        main.main([f"--config={turned}", f"--workdir={run}", "--mode=eval"])


@pytest.mark.parametrize(
    ("names", "trained", "data"),
    [
        (("low", "high"), {}, {"classes": {"t": ("high", "low")}}),
        (("mild", "severe"), {"classes": {"t": ("low", "high")}}, {"classes": {"t": ("High", "Low")}}),
        (("nodule", "effusion"), {}, {"targets": {"t": ("effusion", "nodule")}}),
        ((), {"targets": {"t": ("a", "b")}, "classes": {"t": ("x", "y")}}, {"targets": {"t": ("b", "a")}}),
    ],
)
def test_an_order_is_compared_with_names_and_with_the_runs_own(names: tuple, trained: Any, data: Any) -> None:
    with pytest.raises(UserError, match="would be scored as another"):
        evaluate.check_classes(Path("run"), "t", names, trained, data)
    evaluate.check_classes(Path("run"), "t", names, trained, trained)
    evaluate.check_classes(Path("run"), "t", names, trained, {"classes": {"t": ("no", "yes")}, "targets": {"t": "t"}})


def test_which_task_drowns_the_others_can_be_asked(run: Path, capsys: pytest.CaptureFixture) -> None:
    text = (run.parent / "recipe.py").read_text()
    doubled = run.parent / "doubled.py"
    doubled.write_text(text.replace('"size": {"type": "regression"}', '"size": {"type": "regression", "weight": 2.0}'))
    found = []
    for recipe in (run.parent / "recipe.py", doubled):
        capsys.readouterr()
        task_gradients.main([f"--config={recipe}", f"--run={run}", "--batches=2"])
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
        found.append({row.get("task") or "/".join(row["tasks"]): row for row in rows})
    first, second = found
    assert len(first) == 4 + 6
    assert second["size"]["median"] == pytest.approx(2 * first["size"]["median"], rel=1e-4)
    assert second["organ"]["median"] == pytest.approx(first["organ"]["median"], rel=1e-4)
    for name, row in first.items():
        if "/" in name:
            assert -1 <= row["p10"] <= row["p90"] <= 1
            assert row["median"] == pytest.approx(second[name]["median"], abs=1e-4)
    with pytest.raises(UserError, match="another network"):
        task_gradients.main([f"--config={other_network(run, text)}", f"--run={run}", "--batches=1"])


def other_network(run: Path, text: str) -> Path:
    recipe = run.parent / "other.py"
    recipe.write_text(text.replace('"features": (8, 8)', '"features": (8, 12)'))
    return recipe
