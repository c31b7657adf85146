"""Prediction from the command line: what goes in, what comes out on the input's own grid, what is refused."""

from __future__ import annotations

import csv
import errno
import gzip
import itertools
import re
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from tiny import write_cohort, write_recipe
from untrained import PATCH, labels_of, make_run, run_predict

from medjax import evaluate, main, predict
from medjax.data.cohort import Case
from medjax.errors import UserError, run_program
from medjax.tasks.segmentation import Segmentation

REPO = Path(__file__).resolve().parents[1]


# ------------------------------------------------------------------------------------------------ runs to predict with


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `cohort`, and `run`: two steps of training on it, evaluated."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(folder / "tiny.py", write_cohort(folder / "cohort"))
    main.main([f"--config={recipe}", f"--workdir={folder / 'run'}", "--config.train.total=2 steps",
               "--config.eval.pictures=false"])  # fmt: skip
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


# As on a machine without them: they cannot be found. (A finder that raises instead would also stop those who only ask.)
HIDE = """
import sys
from importlib.machinery import PathFinder
hidden = ("tensorflow", "tensorflow_datasets", "clu", "tensorboard", "nilearn", "matplotlib")
find = PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] in hidden else find(name, path, target)
PathFinder.find_spec = staticmethod(find_spec)
"""


def test_without_tensorflow_and_writers(trained: Path, tmp_path: Path) -> None:
    arguments = [
        f"--run={trained / 'run'}",
        f"--input={trained / 'cohort' / 'imagesTr' / 'case7.nii.gz'}",
        f"--output={tmp_path}",
    ]
    code = f"{HIDE}from medjax import predict\npredict.main({arguments})\nprint(set(hidden) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "1 case(s) written" in done.stdout
    assert done.stdout.endswith("set()\n")
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


# -------------------------------------------------------------------------------------------------- several modalities


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("two"), modalities=("T1", "FLAIR"))


def test_modalities_by_number_by_name_and_as_channels(two: Path, tmp_path: Path) -> None:
    t1, flair = scan(seed=1), scan(seed=2)
    for folder, names in (
        ("numbers", ("a_0000.nii.gz", "a_0001.nii.gz")),
        ("names", ("a_t1.nii", "a_FLAIR.nii.gz")),
        ("swapped", ("a_FLAIR.nii.gz", "a_T1.nii.gz")),
    ):
        for name, data in zip(names, (t1, flair), strict=True):
            write_scan(tmp_path / folder / name, data)
    write_scan(tmp_path / "channels" / "a.nii.gz", np.stack([t1, flair], axis=-1))
    sources = {"numbers", "names", "swapped", "channels"}
    made = {}
    for source in sources:
        run_predict(two, tmp_path / source, tmp_path / "out" / source)
        assert files_in(tmp_path / "out" / source) == {"a.nii.gz"}
        made[source] = labels_of(tmp_path / "out" / source / "a.nii.gz")
        assert made[source].shape == t1.shape
    run_predict(two, tmp_path / "channels" / "a.nii.gz", tmp_path / "out" / "file")
    np.testing.assert_array_equal(made["names"], made["numbers"])
    np.testing.assert_array_equal(made["channels"], made["numbers"])
    np.testing.assert_array_equal(labels_of(tmp_path / "out" / "file" / "a.nii.gz"), made["numbers"])
    assert (made["swapped"] != made["numbers"]).mean() > 0.05


@pytest.mark.parametrize(
    ("names", "modalities", "cases"),
    [
        (["a.nii.gz", "b.nii", "c.hdr"], ["MR"], {"a": "a.nii.gz", "b": "b.nii", "c": "c.hdr"}),
        (["x_0000.nii.gz", "y_MR.NII.GZ"], ["MR"], {"x": "x_0000.nii.gz", "y": "y_MR.NII.GZ"}),
        (["._a.nii.gz", "a.nii.gz", "a.txt", "c.hdr", "c.img"], ["MR"], {"a": "a.nii.gz", "c": "c.hdr"}),
        # Numbers that run on past the modalities are case numbers.
        (["s_0000.nii", "s_0001.nii"], ["MR"], {"s_0000": "s_0000.nii", "s_0001": "s_0001.nii"}),
        (["a_c.nii", "a_T1_c.nii"], ["c", "T1_c"], {"a": ["a_c.nii", "a_T1_c.nii"]}),
        (["T1.nii", "_T1.nii"], ["T1"], {"T1": "T1.nii", "_T1": "_T1.nii"}),
        (["a.nii", "b_0001.nii", "b_0000.nii"], ["T1", "T2"], {"a": ["a.nii"] * 2, "b": ["b_0000.nii", "b_0001.nii"]}),
    ],
)
def test_grouping(tmp_path: Path, names: list[str], modalities: list[str], cases: Mapping[str, Any]) -> None:
    for name in names:
        (tmp_path / name).touch()
    found, wrong = predict.find_inputs(tmp_path, modalities)
    assert wrong == {}
    expected = {
        case: dict(zip(modalities, [files] * len(modalities) if isinstance(files, str) else files, strict=True))
        for case, files in cases.items()
    }
    assert {c: {m: f.name for m, f in files.items()} for c, files in found.items()} == expected


def test_two_files_for_one_place_are_refused(tmp_path: Path) -> None:
    for name in ("a.nii", "a.nii.gz", "b_0000.nii.gz", "b_T1.nii.gz", "b_FLAIR.nii.gz", "c.nii"):
        (tmp_path / name).touch()
    found, wrong = predict.find_inputs(tmp_path, ("T1", "FLAIR"))
    assert set(found) == {"c"}
    assert "a.nii" in wrong["a"]
    assert "a.nii.gz" in wrong["a"]
    assert "b_0000.nii.gz" in wrong["b"]
    assert "b_T1.nii.gz" in wrong["b"]


def test_a_missing_modality_is_refused_or_allowed_as_the_run_was(two: Path, tmp_path: Path, capsys: Any) -> None:
    write_scan(tmp_path / "in" / "a_FLAIR.nii.gz", scan())
    said = refused(two, tmp_path / "in", tmp_path / "out", capsys=capsys)
    assert "a_FLAIR.nii.gz: case 'a' lacks T1." in said
    assert "a_T1.nii.gz" in said
    assert files_in(tmp_path / "out") == set()
    # The single file alone, and a file with too few channels.
    said = refused(two, tmp_path / "in" / "a_FLAIR.nii.gz", tmp_path / "out", capsys=capsys)
    assert "lacks T1" in said
    lone = write_scan(tmp_path / "lone.nii.gz", scan())
    said = refused(two, lone, tmp_path / "out", capsys=capsys)
    assert "lone.nii.gz: 1 channels for modality T1, FLAIR" in said
    tolerant = make_run(tmp_path / "tolerant", modalities=("T1", "FLAIR"), missing="zero")
    run_predict(tolerant, tmp_path / "in", tmp_path / "out")
    assert files_in(tmp_path / "out") == {"a.nii.gz"}


# ------------------------------------------------------------------------------------------------------ what is written


def probabilities_of(run: predict.Run, data: np.ndarray) -> dict[str, np.ndarray]:
    """By hand, for a scan on the run's own grid that fits in one window: no medjax code but the network's."""
    normal = (data.astype(np.float64) - data.mean()) / data.std()
    outputs = run.model.apply({"params": run.params}, jnp.asarray(normal, jnp.float32)[None, ..., None], train=False)
    return {name: np.asarray(levels[0][0], np.float64) for name, levels in outputs.items()}


def test_values_are_the_declared_labels(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", labels={"core": 7, "shell": 300})
    data = scan(PATCH)
    write_scan(tmp_path / "a.nii.gz", data)
    run_predict(run, tmp_path / "a.nii.gz", tmp_path / "out")
    logits = probabilities_of(predict.Run(run), data)["spheres"]
    expected = np.array([0, 7, 300])[logits.argmax(-1)]
    made = labels_of(tmp_path / "out" / "a.nii.gz")
    assert made.dtype.kind in "iu"
    assert set(np.unique(made)) == {0, 7, 300}
    assert (made != expected).mean() < 0.001  # ties


@pytest.mark.parametrize("names", [("all", "inner"), ("whole", "inner")])  # in either alphabetical order
def test_overlapping_regions_are_painted(tmp_path: Path, names: tuple[str, str]) -> None:
    regions = {names[0]: ("shell", "core"), names[1]: ("core",)}
    run = make_run(tmp_path / "run", {"t": {"type": "segmentation", "levels": 1, "regions": regions}})
    data = scan(PATCH)
    write_scan(tmp_path / "a.nii.gz", data)
    run_predict(run, tmp_path / "a.nii.gz", tmp_path / "out")
    logits = probabilities_of(predict.Run(run), data)["t"]
    expected = np.where(logits[..., 1] > 0, 2, np.where(logits[..., 0] > 0, 1, 0))
    made = labels_of(tmp_path / "out" / "a.nii.gz")
    assert made.shape == data.shape
    assert set(np.unique(made)) == {0, 1, 2}
    assert (made != expected).mean() < 0.001


def test_regions_that_no_label_map_holds_become_channels(tmp_path: Path) -> None:
    regions = {"left": ("shell", "core"), "right": ("core", "shell")}
    run = make_run(tmp_path / "run", {"t": {"type": "segmentation", "levels": 1, "regions": regions}})
    data = scan(PATCH)
    affine = np.diag([-2.0, 2.0, 2.0, 1.0])  # the file runs the other way
    write_scan(tmp_path / "a.nii.gz", data[::-1], affine)
    run_predict(run, tmp_path / "a.nii.gz", tmp_path / "out")
    logits = probabilities_of(predict.Run(run), data)["t"]
    made = nib.load(tmp_path / "out" / "a.nii.gz")
    np.testing.assert_array_equal(made.affine, affine)
    values = np.asarray(made.dataobj)
    assert values.shape == (*data.shape, 2)
    assert values.dtype == np.uint8
    assert 0 < values.mean() < 1
    assert (values[::-1] != (logits > 0)).mean() < 0.001


def test_several_tasks_write_a_file_each(tmp_path: Path) -> None:
    job = {name: {"type": "segmentation", "levels": 1} for name in ("one", "two")}
    run = make_run(tmp_path / "run", job)
    data = scan(PATCH)
    write_scan(tmp_path / "a.nii.gz", data)
    run_predict(run, tmp_path / "a.nii.gz", tmp_path / "out")
    assert files_in(tmp_path / "out") == {"a_one.nii.gz", "a_two.nii.gz"}
    for name, logits in probabilities_of(predict.Run(run), data).items():
        made = labels_of(tmp_path / "out" / f"a_{name}.nii.gz")
        assert (made != logits.argmax(-1)).mean() < 0.001


def test_mirror_averaging_makes_left_and_right_alike(untrained: Path, tmp_path: Path) -> None:
    # The network is not symmetric; averaged over both directions it must be, to rounding.
    data = scan((24, 18, 16))
    write_scan(tmp_path / "in" / "there.nii.gz", data)
    write_scan(tmp_path / "in" / "back.nii.gz", data[::-1])
    unlike = {}
    for name, more in (("plain", ()), ("mirrored", ("--mirror", "0"))):
        run_predict(untrained, tmp_path / "in", tmp_path / name, *more)
        there, back = (labels_of(tmp_path / name / f"{x}.nii.gz") for x in ("there", "back"))
        unlike[name] = float((there != back[::-1]).mean())
    assert unlike["mirrored"] < 0.001
    assert unlike["plain"] > 0.01


def test_overlap_is_the_users(untrained: Path, tmp_path: Path) -> None:
    write_scan(tmp_path / "in" / "large.nii.gz", scan((40, 18, 16)))
    write_scan(tmp_path / "in" / "small.nii.gz", scan((16, 15, 16)))
    for overlap in ("0.0", "0.75"):
        run_predict(untrained, tmp_path / "in", tmp_path / overlap, f"--overlap={overlap}")
    large, small = (
        (labels_of(tmp_path / "0.0" / name), labels_of(tmp_path / "0.75" / name))
        for name in ("large.nii.gz", "small.nii.gz")
    )
    assert (large[0] != large[1]).mean() > 0.001
    np.testing.assert_array_equal(*small)  # one window, whatever the overlap


# ----------------------------------------------------------------------------------------------------------- evaluation


def test_regions_that_no_label_map_holds_are_scored_and_drawn(trained: Path, tmp_path: Path) -> None:
    regions = {"left": ("shell", "core"), "right": ("core", "shell")}
    run = make_run(tmp_path / "run", {"t": {"type": "segmentation", "levels": 1, "regions": regions}})
    cohort = trained / "cohort"
    cases = [
        Case(f"case{i}", f"case{i}", {"MRI": cohort / "imagesTr" / f"case{i}.nii.gz"},
             {"t": cohort / "labelsTr" / f"case{i}.nii.gz"})
        for i in (0, 1)
    ]  # fmt: skip
    summary = evaluate.evaluate_split(predict.Run(run), "odd", cases, tmp_path / "odd")
    assert set(summary["metrics"]["dice"]["per_class"]) == {"left", "right"}
    assert {f for f in files_in(tmp_path / "odd") if f.endswith(".png")} == {"worst.png", "median.png", "best.png"}
    for i in (0, 1):
        whole = labels_of(cohort / "labelsTr" / f"case{i}.nii.gz") > 0
        made = labels_of(tmp_path / "odd" / "predictions" / f"case{i}.nii.gz")
        rows = [row for row in csv.DictReader((tmp_path / "odd" / "cases.csv").open()) if row["case"] == f"case{i}"]
        for channel, row in enumerate(rows):
            predicted = made[..., channel] > 0
            dice = 2 * (predicted & whole).sum() / (predicted.sum() + whole.sum())
            assert float(row["dice"]) == pytest.approx(dice, abs=1e-5)


def test_what_is_drawn_of_regions() -> None:
    labels = {"oedema": 1, "core": 4}
    reference = np.array([0, 1, 4, 4], np.uint8).reshape(4, 1, 1)
    nested = Segmentation("t", labels, {"a_whole": ("oedema", "core"), "core": ("core",)})
    decoded = np.array([[1, 0], [0, 0], [1, 1], [0, 1]], bool).reshape(4, 1, 1, 2)
    drawn = evaluate.drawable(nested, reference, decoded)
    np.testing.assert_array_equal(drawn[0], reference)
    assert drawn[1].ravel().tolist() == [1, 0, 4, 4]
    assert drawn[2] == {1: "oedema", 4: "core"}
    same = Segmentation("t", labels, {"one": ("oedema", "core"), "two": ("core", "oedema")})
    drawn = evaluate.drawable(same, reference, decoded)
    assert drawn[0].ravel().tolist() == [0, 2, 2, 2]
    assert drawn[1].ravel().tolist() == [1, 0, 2, 2]
    assert drawn[2] == {1: "one", 2: "two"}
    # A label that no region covers is not asked for, and would only crowd the picture.
    among = Segmentation("t", {"grey matter": 2, **labels}, {"whole": ("oedema", "core"), "core": ("core",)})
    assert evaluate.drawable(among, reference, decoded)[2] == {1: "oedema", 4: "core"}


@pytest.mark.parametrize(
    ("modalities", "channel"),
    [
        (("T1", "T1c", "T2", "FLAIR"), 1),
        (("T1", "T2", "flair"), 2),
        (("T1ce", "T1"), 0),
        (("CT",), 0),
        (("T2", "ADC"), 0),
    ],
)
def test_the_channel_drawn_shows_a_tumour(modalities: tuple[str, ...], channel: int) -> None:
    assert evaluate.shown_channel(modalities) == channel


# ------------------------------------------------------------------------------------------------------------- refusals


def test_one_bad_file_stops_no_other(untrained: Path, tmp_path: Path, capsys: Any) -> None:
    source = tmp_path / "in"
    write_scan(source / "good1.nii.gz", scan(seed=1))
    write_scan(source / "good2.nii.gz", scan(seed=2))
    whole = write_scan(source / "cut.nii.gz", scan(seed=3)).read_bytes()
    (source / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    spoilt = bytearray(whole)
    spoilt[-8:-4] = b"\0\0\0\0"  # the checksum: every voxel reads, none can be trusted
    (source / "crc.nii.gz").write_bytes(spoilt)
    (source / "text.nii").write_text("not a volume")
    nan = scan()
    nan[3, 3, 3] = np.nan
    write_scan(source / "nan.nii.gz", nan)
    write_scan(source / "flat.nii.gz", np.full((16, 16, 16), 7.0, np.float32))
    header = bytearray(write_scan(source / "nan_sform.nii", scan()).read_bytes())
    header[280:328] = struct.pack("<12f", *[np.nan] * 12)
    (source / "nan_sform.nii").write_bytes(header)
    header[280:328] = bytes(48)
    (source / "zero_sform.nii.gz").write_bytes(gzip.compress(bytes(header)))
    header = bytearray(write_scan(source / "huge.nii", scan()).read_bytes())
    header[42:48] = struct.pack("<3h", 30000, 30000, 30000)  # would make the program's shapes as large
    (source / "huge.nii").write_bytes(header)
    said = refused(untrained, source, tmp_path / "out", capsys=capsys)
    assert "8 of 10 case(s) were not predicted" in said
    for name in ("cut.nii.gz", "crc.nii.gz", "text.nii", "nan.nii.gz", "flat.nii.gz", "nan_sform.nii",
                 "zero_sform.nii.gz", "huge.nii"):  # fmt: skip
        assert said.count(f"{source / name}") == 1, name
    assert "good" not in said
    assert files_in(tmp_path / "out") == {"good1.nii.gz", "good2.nii.gz"}
    # And these two are what they are without the bad ones.
    run_predict(untrained, source / "good1.nii.gz", tmp_path / "alone")
    assert (tmp_path / "alone" / "good1.nii.gz").read_bytes() == (tmp_path / "out" / "good1.nii.gz").read_bytes()


def test_what_was_looked_at_is_told_from_what_was_not(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    """A scan without findings has a row with its id alone; one that is refused has none, and stops no other."""

    def heat(self: predict.Predictor, params: Any, image: np.ndarray) -> dict[str, np.ndarray]:
        found = np.zeros((*image.shape[:3], 7), np.float32)
        found[2, 2, 2, 0], found[..., 4:] = 0.9 * (image.shape[0] == 4), 6.0
        return {"nodules": found}

    monkeypatch.setattr(predict.Predictor, "__call__", heat)
    job = {"nodules": {"type": "detection", "names": ("nodule",)}}
    run = make_run(tmp_path / "run", job, labels={}, spacing=(4.0, 4.0, 4.0), normalize="zscore_nonzero")
    source = tmp_path / "in"
    write_scan(source / "empty.nii.gz", scan((12, 12, 12)))
    write_scan(source / "found.nii.gz", scan((8, 12, 12)))
    hot = np.zeros((16, 16, 16), np.float32)  # of a tracer; between the voxels of 4 mm
    hot[0, 0, 0], hot[8, 8, 8] = 5, 9
    write_scan(source / "hot.nii.gz", hot, np.eye(4))
    said = refused(run, source, tmp_path / "out", capsys=capsys)
    assert (
        f"1 of 3 case(s) were not predicted:\n  {source / 'hot.nii.gz'}: its few voxels that are not 0 are lost" in said
    )
    rows = list(csv.DictReader((tmp_path / "out" / "nodules.csv").open()))
    assert [(row["case"], row["class"], row["score"]) for row in rows] == [
        ("empty", "", ""),
        ("found", "nodule", "0.9"),
    ]
    run_predict(run, source / "empty.nii.gz", tmp_path / "alone")
    assert (tmp_path / "alone" / "nodules.csv").read_text() == "case\nempty\n"
    # An evaluation says it alike.
    cases = [Case(name, name, {"MRI": source / f"{name}.nii.gz"}) for name in ("empty", "found")]
    evaluate.evaluate_split(predict.Run(run), "val", cases, tmp_path / "val")
    assert (tmp_path / "val" / "predictions" / "nodules.csv").read_text() == (
        tmp_path / "out" / "nodules.csv"
    ).read_text()


def test_a_folder_that_may_not_be_listed_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    def closed(self: Path) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", closed)  # root may list any
    with pytest.raises(UserError, match=f"^{tmp_path}: cannot be read: Permission denied. Correct --input"):
        predict.find_inputs(tmp_path, ("MRI",))


def test_a_corrupt_file_alone_is_named(untrained: Path, tmp_path: Path, capsys: Any) -> None:
    file = write_scan(tmp_path / "a.nii.gz", scan())
    file.write_bytes(file.read_bytes()[:-100])
    said = refused(untrained, file, tmp_path / "out", capsys=capsys)
    assert said.startswith(f"{file}: the gzip stream is cut short")
    assert files_in(tmp_path / "out") == set()


def test_an_input_is_never_replaced(untrained: Path, tmp_path: Path, capsys: Any) -> None:
    file = write_scan(tmp_path / "in" / "a.nii.gz", scan())
    write_scan(tmp_path / "in" / "b.nii", scan())
    before = file.read_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for source, output in ((file, file.parent), (tmp_path / "in", tmp_path / "link"), (tmp_path / "link", file.parent)):
        said = refused(untrained, source, output, capsys=capsys)
        assert "would replace the input" in said
        assert "a.nii.gz" in said
    (tmp_path / "same").mkdir()
    (tmp_path / "same" / "a.nii.gz").hardlink_to(file)  # as a file system that sees no capitals has it, too
    assert "would replace the input" in refused(untrained, file, tmp_path / "same", capsys=capsys)
    assert file.read_bytes() == before
    assert files_in(tmp_path / "in") == {"a.nii.gz", "b.nii"}
    # A name that does not clash may lie beside it.
    run_predict(untrained, tmp_path / "in" / "b.nii", tmp_path / "in")
    assert files_in(tmp_path / "in") == {"a.nii.gz", "b.nii", "b.nii.gz"}


@pytest.mark.parametrize(
    ("job", "names", "words"),
    [
        (("core", "x_core"), ("p1", "p1_x"), "'p1' (task 'x_core') and of case 'p1_x' (task 'core') would be one file"),
        (("one",), ("A", "a"), "'A' (task 'one') and of case 'a' (task 'one') would be one file"),
    ],
)
def test_no_prediction_is_written_over_another(job: Any, names: Any, words: str, tmp_path: Path, capsys: Any) -> None:
    run = make_run(tmp_path / "run", {name: {"type": "segmentation", "levels": 1} for name in job})
    images = [write_scan(tmp_path / "in" / f"{name}.nii.gz", scan()) for name in names]
    assert words in refused(run, tmp_path / "in", tmp_path / "out", capsys=capsys)
    assert not (tmp_path / "out").exists()
    cases = [Case(name, name, {"MRI": image}) for name, image in zip(names, images, strict=True)]
    with pytest.raises(UserError, match=re.escape(words)):
        evaluate.evaluate_split(predict.Run(run), "val", cases, tmp_path / "val")
    assert not (tmp_path / "val").exists()


def test_what_is_no_run_is_refused(untrained: Path, tmp_path: Path, capsys: Any) -> None:
    file = write_scan(tmp_path / "a.nii.gz", scan())
    (tmp_path / "empty").mkdir()
    for run, words in (
        (tmp_path / "nowhere", "nowhere: no such run folder"),
        (file, "a.nii.gz: no such run folder"),
        (tmp_path / "empty", "empty: holds no checkpoint"),
    ):
        assert words in refused(run, file, tmp_path / "out", capsys=capsys)
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_named(tmp_path: Path, capsys: Any) -> None:
    file = write_scan(tmp_path / "a.nii.gz", scan())
    run = make_run(tmp_path / "run")
    stored = [f for f in (run / "checkpoints" / "latest" / "0" / "state").rglob("*") if f.is_file() and "/d/" in str(f)]
    assert stored
    for part in stored:
        part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    said = refused(run, file, tmp_path / "out", capsys=capsys)
    assert f"{run / 'checkpoints' / 'latest' / '0'}: the checkpoint is damaged" in said
    assert not (tmp_path / "out").exists()


def test_wrong_paths_and_options_are_refused(untrained: Path, tmp_path: Path, capsys: Any) -> None:
    file = write_scan(tmp_path / "a.nii.gz", scan())
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    for source, output, more, words in (
        (tmp_path / "nowhere", tmp_path / "out", (), "nowhere: no such file or folder"),
        (tmp_path / "empty", tmp_path / "out", (), "empty: holds no NIfTI file"),
        (file, file, (), "a.nii.gz: cannot make the folder"),
        (file, file / "below", (), "below: cannot make the folder"),
        (file, tmp_path / "out", ("--overlap=1.0",), "overlap 1.0"),
        (file, tmp_path / "out", ("--mirror", "0", "3"), "mirror axes (0, 3)"),
    ):
        assert words in refused(untrained, source, output, *more, capsys=capsys)
    assert files_in(tmp_path) == {"a.nii.gz", "empty/notes.txt"}


def test_a_disk_that_refuses_leaves_nothing(untrained: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    file = write_scan(tmp_path / "a.nii.gz", scan())

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    said = refused(untrained, file, tmp_path / "out", capsys=capsys)
    assert f"{tmp_path / 'out' / 'a.nii.gz'}: cannot be written: No space left on device" in said
    assert files_in(tmp_path / "out") == set()
