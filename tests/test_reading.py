"""A trained run whose answers are read otherwise: the temperature is found by evaluation, and given to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from untrained import make_run, run_predict

from medjax import main, predict
from medjax.errors import UserError
from medjax.ops import windows

N = 40
JOB = {"grade": {"type": "classification", "problem": "binary", "names": ("low", "high")}}
RECIPE = """
from ml_collections import ConfigDict

def get_config(arg=None):
    config = ConfigDict()
    config.data = ConfigDict({{"cohort": {cohort!r}, "images": {{"MRI": "image"}}, "targets": {{"grade": "grade"}},
                              "split": {{"column": "part"}}, "patch": (16, 16, 16)}})
    config.model = ConfigDict({{"name": "unet", "features": (4, 8)}})
    config.tasks = ConfigDict({{"grade": {{"type": "classification", "problem": "binary", "names": ("low", "high")}}}})
    config.eval = ConfigDict({{"splits": ("val", "test"), "pictures": False}})
    return config
"""


class Sure:
    """In place of a network: the voxel that stands out says the logit, three times too large."""

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def __call__(self, params: Any, image: np.ndarray) -> tuple[dict, np.ndarray]:
        return {}, np.array([3.0 * (np.argmax(image[8, 8, :, 0]) - 7.5) / 3.0], np.float32)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(windows, "SlidingWindow", Sure)
    rng = np.random.default_rng(0)
    lines = ["id,image,grade,part"]
    for i in range(N + 1):
        place = int(rng.integers(16))
        image = rng.normal(0, 1, (16, 16, 16)).astype(np.float32)
        image[8, 8, place] = 50
        nib.save(nib.Nifti1Image(image, np.eye(4)), tmp_path / f"c{i}.nii.gz")
        grade = int(rng.random() < 1 / (1 + np.exp(-(place - 7.5) / 3.0)))
        lines.append(f"c{i},c{i}.nii.gz,{grade},{'train' if i == N else ('val', 'test')[i % 2]}")
    (tmp_path / "cases.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "recipe.py").write_text(RECIPE.format(cohort=str(tmp_path / "cases.csv")))
    return make_run(tmp_path / "run", JOB, labels={}, spacing=None)


def evaluated(run: Path, *more: str) -> dict[str, Any]:
    main.main([f"--config={run.parent / 'recipe.py'}", f"--workdir={run}", "--mode=eval", *more])
    return {split: json.loads((run / "eval" / split / "summary.json").read_text()) for split in ("val", "test")}


def test_the_temperature_is_found_and_given(run: Path, capsys: pytest.CaptureFixture) -> None:
    plain = evaluated(run)
    fitted = plain["val"]["calibration"]["grade"]
    assert "calibration" not in plain["test"]
    assert (fitted["n"], fitted["ece"]) == (N / 2, pytest.approx(plain["val"]["metrics"]["ece"]["mean"]))
    said = capsys.readouterr().out
    assert (
        f"grade: temperature {fitted['temperature']:.4g} fits these 20 cases best: ECE {fitted['ece']:.3f} ->" in said
    )
    table = f"{{'grade': {{'temperature': {fitted['temperature']}}}}}"
    cool = evaluated(run, f"--config.eval.tasks={table}")
    assert cool["val"]["metrics"]["ece"]["mean"] == pytest.approx(fitted["ece_calibrated"], abs=1e-6)
    assert cool["val"]["calibration"]["grade"]["temperature"] == pytest.approx(fitted["temperature"], rel=1e-3)
    assert cool["test"]["metrics"]["brier"]["mean"] < plain["test"]["metrics"]["brier"]["mean"]
    assert cool["test"]["metrics"]["auroc"] == plain["test"]["metrics"]["auroc"]

    # New scans take it too, and without it are read as the run was trained.
    scan, p = run.parent / "c0.nii.gz", []
    for more in ((), (f"--tasks={table}",)):
        run_predict(run, scan, run.parent / f"out{len(more)}", *more)
        rows = (run.parent / f"out{len(more)}" / "grade.csv").read_text().splitlines()
        p.append(float(rows[2].split(",")[2]))
    logit = [np.log(v / (1 - v)) for v in p]
    assert logit[0] / logit[1] == pytest.approx(fitted["temperature"], rel=1e-3)


def test_what_training_depends_on_is_refused(run: Path) -> None:
    with pytest.raises(UserError, match=r"eval\.tasks\.grade\.problem: not one of the options"):
        evaluated(run, "--config.eval.tasks={'grade': {'problem': 'ordinal'}}")
    with pytest.raises(UserError, match="--tasks=grade: needs a table"):
        run_predict(run, run.parent / "c0.nii.gz", run.parent / "out", "--tasks=grade")
    assert predict.Run(run, eval_options={"tasks": {"grade": {"threshold": 0.3}}}).tasks["grade"].threshold == 0.3
