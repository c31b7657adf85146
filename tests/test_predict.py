"""Prediction from the command line: what goes in, what comes out on the input's own grid, what is refused."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from test_rooms import BLOCK
from tiny import write_cohort, write_recipe

from medjax import config as config_lib
from medjax import main, models, predict, tasks
from medjax.checkpoint import Checkpoints
from medjax.data import preprocess
from medjax.errors import UserError, run_program
from medjax.models.model import build_model

REPO = Path(__file__).resolve().parents[1]
LABELS = {"shell": 1, "core": 2}
PATCH = (16, 16, 16)


# ------------------------------------------------------------------------------------------------ runs to predict with


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `cohort`, and `run`: two steps of training on it, evaluated."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(folder / "tiny.py", write_cohort(folder / "cohort"))
    main.main([f"--config={recipe}", f"--workdir={folder / 'run'}", "--config.train.total=2 steps",
               "--config.eval.pictures=false"])  # fmt: skip
    return folder


def make_run(
    folder: Path,
    job: Mapping[str, Any] | None = None,
    *,
    modalities: Sequence[str] = ("MRI",),
    labels: Mapping[str, int] = LABELS,
    spacing: tuple[float, float, float] | None = (2.0, 2.0, 2.0),
    missing: str = "error",
    seed: int = 0,
) -> Path:
    """A run of an untrained network: random weights are as good as learnt ones to follow voxels through a program."""
    config = config_lib.defaults()
    recipe = {
        "data": {"patch": PATCH},
        "model": {"name": "unet", "features": (4, 8), "convs": 1, "decoder_convs": 1},
        "tasks": job or {"spheres": {"type": "segmentation", "levels": 1}},
    }
    config_lib.merge(config, recipe)
    options = {"model": models.options, "tasks": tasks.options}
    config = config_lib.resolve(config, (), lambda room, kind: options[room](kind))
    model = build_model(config, tasks.build(config.tasks, labels))
    x = jnp.zeros((1, *PATCH, len(modalities)))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=True)["params"])
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.5, s.shape), s.dtype), shapes)
    plan = preprocess.Plan(
        tuple(modalities), dict(labels), "RAS", spacing, None, dict.fromkeys(modalities, "zscore"), missing=missing
    )
    checkpoints = Checkpoints(folder)
    meta = {"step": 0, "config": json.loads(config_lib.to_json(config)), "plan": plan.to_json(), "labels": labels}
    checkpoints.save("latest", 0, {"step": jnp.zeros((), jnp.int32), "params": params, "average": None}, meta)
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("untrained"))


def write_scan(file: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, np.diag([2.0, 2.0, 2.0, 1.0]) if affine is None else affine), file)
    return file


def scan(shape: Sequence[int] = (20, 18, 16), seed: int = 0) -> np.ndarray:
    """Smooth blobs: neighbouring voxels are alike, so predictions have regions rather than noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(100, 30, [-(-n // 4) for n in shape])
    fine = coarse.repeat(4, 0).repeat(4, 1).repeat(4, 2)[tuple(slice(n) for n in shape)]
    return (fine + rng.normal(0, 3, shape)).astype(np.float32)


def run_predict(run: Path, source: Path, output: Path, *more: str) -> None:
    predict.main([f"--run={run}", f"--input={source}", f"--output={output}", *more])


def refused(run: Path, source: Path, output: Path, *more: str, capsys: pytest.CaptureFixture) -> str:
    """Runs the program as a shell would; returns its error message, having checked that it is one."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run_program(lambda: run_predict(run, source, output, *more))
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.count("medjax: error:") == 1
    return said.partition("medjax: error: ")[2]


def labels_of(file: Path) -> np.ndarray:
    return np.asarray(nib.load(file).dataobj)


def files_in(folder: Path) -> set[str]:
    """Every file below, hidden ones included."""
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()} if folder.exists() else set()


# ------------------------------------------------------------------------------------------------------- files, folders


def test_a_folder_on_each_files_own_grid(trained: Path, tmp_path: Path) -> None:
    images = trained / "cohort" / "imagesTr"
    run_predict(trained / "run", images, tmp_path / "out")
    assert files_in(tmp_path / "out") == {f"case{i}.nii.gz" for i in range(8)}
    for source in images.glob("*.nii.gz"):
        given, made = nib.load(source), nib.load(tmp_path / "out" / source.name)
        assert made.shape == given.shape
        np.testing.assert_array_equal(made.affine, given.affine)
        assert made.get_data_dtype() == np.uint8
        assert set(np.unique(made.dataobj)) <= {0, 1, 2}
    # The same network on the same case says the same wherever it is asked from.
    for split, case in (("val", "case6"), ("test", "case7")):
        evaluated = trained / "run" / "eval" / split / "predictions" / f"{case}.nii.gz"
        assert (tmp_path / "out" / f"{case}.nii.gz").read_bytes() == evaluated.read_bytes()


def test_a_file(trained: Path, tmp_path: Path) -> None:
    run_predict(trained / "run", trained / "cohort" / "imagesTr" / "case7.nii.gz", tmp_path / "new" / "out")
    evaluated = trained / "run" / "eval" / "test" / "predictions" / "case7.nii.gz"
    assert files_in(tmp_path / "new") == {"out/case7.nii.gz"}
    assert (tmp_path / "new" / "out" / "case7.nii.gz").read_bytes() == evaluated.read_bytes()


def test_without_tensorflow_and_writers(trained: Path, tmp_path: Path) -> None:
    arguments = [
        f"--run={trained / 'run'}",
        f"--input={trained / 'cohort' / 'imagesTr' / 'case7.nii.gz'}",
        f"--output={tmp_path}",
    ]
    code = f"{BLOCK}from medjax import predict\npredict.main({arguments})\nprint(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "1 case(s) written" in done.stdout
    assert "'tensorflow'" not in done.stdout
    evaluated = trained / "run" / "eval" / "test" / "predictions" / "case7.nii.gz"
    assert (tmp_path / "case7.nii.gz").read_bytes() == evaluated.read_bytes()


def test_a_folder_of_unlike_shapes_compiles_once(untrained: Path) -> None:
    run = predict.Run(untrained)
    shapes = [(20, 18, 16), (31, 17, 40), (9, 33, 24), (64, 24, 16)]
    predictor = run.predictor(shapes)
    for shape in shapes:
        image = scan(shape)[..., None]
        probabilities = predictor(run.params, image)["spheres"]
        assert probabilities.shape == (*shape, 3)
        assert probabilities.dtype == np.float32
        np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-5)
    assert predictor._window.compiles == 1


# ------------------------------------------------------------------------------------------------------------- geometry


def rotation(degrees: float) -> np.ndarray:
    """About the axis (1, 2, 3), by Rodrigues' formula."""
    axis = np.array([1.0, 2.0, 3.0]) / np.sqrt(14.0)
    k = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    angle = np.deg2rad(degrees)
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k


@pytest.mark.parametrize("degrees", [0.0, 12.0], ids=["straight", "oblique"])
def test_every_orientation_gives_one_prediction_in_world_space(untrained: Path, tmp_path: Path, degrees: float) -> None:
    # Spacings that must be resampled to the run's 2 mm, unlike on each axis.
    affine = np.eye(4)
    affine[:3, :3] = rotation(degrees) @ np.diag([1.5, 2.0, 2.6])
    affine[:3, 3] = (-11.0, 7.5, 3.25)
    image = nib.Nifti1Image(scan((22, 18, 13)), affine)
    source = tmp_path / "in"
    source.mkdir()
    codes = ["".join(axes) for axes in itertools.product("RL", "AP", "SI")] + ["PSR", "SLA", "IRP", "AIL"]
    for code in codes:
        turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(tuple(code)))
        nib.save(image.as_reoriented(turn), source / f"{code}.nii.gz")
    run_predict(untrained, source, tmp_path / "out")
    reference = labels_of(tmp_path / "out" / "RAS.nii.gz")
    assert len(np.unique(reference)) == 3
    for code in codes:
        given, made = nib.load(source / f"{code}.nii.gz"), nib.load(tmp_path / "out" / f"{code}.nii.gz")
        assert made.shape == given.shape
        assert "".join(nib.aff2axcodes(made.affine)) == code
        np.testing.assert_array_equal(made.affine, given.affine)
        for which in ("get_sform", "get_qform"):
            assert getattr(made.header, which)(coded=True)[1] == getattr(given.header, which)(coded=True)[1]
        np.testing.assert_array_equal(np.asarray(nib.as_closest_canonical(made).dataobj), reference, err_msg=code)
