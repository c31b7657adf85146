"""The overview of a cohort: its figures, every problem by file, duplicates, pictures, and that nothing stops it."""

from __future__ import annotations

import csv
import html.parser
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from tiny import write_cohort

from medjax import config as config_lib
from medjax.data import inspect as inspection
from medjax.data import overview
from medjax.data.cases import Case, Cohort, Finding
from medjax.data.volume import Volume
from medjax.errors import UserError

REPO = Path(__file__).resolve().parents[1]


def look(cohort: Path, out: Path, *overrides: str, pictures: int = 2) -> dict[str, Any]:
    inspection.main([str(cohort), f"--out={out}", f"--pictures={pictures}", *(f"--config.{o}" for o in overrides)])
    return json.loads((out / "inspect.json").read_text())


def problems(found: dict[str, Any], severity: str) -> dict[str, str]:
    """Case -> its messages of that severity."""
    out: dict[str, str] = {}
    for problem in found["problems"]:
        if problem["severity"] == severity:
            out[problem["case"]] = f"{out.get(problem['case'], '')} {problem['message']}".strip()
    return out


def save(path: Path, array: np.ndarray, affine: Any = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


@pytest.fixture(scope="module")
def spheres(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("spheres") / "cohort", n=6)


# --------------------------------------------------------------------------------------------------------- a good one


def test_figures_are_those_of_the_files(spheres, tmp_path, capsys):
    found = look(spheres, tmp_path, "data.split.file=split.csv")
    assert (found["cohort"], found["cases"], found["patients"], found["usable"]) == ("Spheres", 6, 6, 6)
    assert found["problem_counts"]["error"] == 0
    assert {name: about["cases"] for name, about in found["splits"].items()} == {"train": 4, "val": 1, "test": 1}
    for report in found["reports"]:
        image = nib.load(spheres / "imagesTr" / f"{report['id']}.nii.gz")
        label = nib.load(spheres / "labelsTr" / f"{report['id']}.nii.gz")
        voxels, mask = image.get_fdata(), np.asanyarray(label.dataobj)
        (about,) = report["images"].values()
        assert tuple(about["shape"]) == image.shape
        assert about["spacing"] == [2.0, 2.0, 2.0]
        assert about["orientation"] == "".join(nib.aff2axcodes(image.affine))
        np.testing.assert_allclose(about["percentiles"], np.percentile(voxels, inspection.PERCENTILES), rtol=1e-6)
        np.testing.assert_allclose([about["low"], about["high"], about["mean"], about["std"]],
                                   [voxels.min(), voxels.max(), voxels.mean(), voxels.std()], rtol=1e-6)  # fmt: skip
        volumes = report["masks"]["segmentation"]["volumes"]
        assert volumes == {str(v): pytest.approx((mask == v).sum() * 8 / 1000) for v in (1, 2)}
    said = capsys.readouterr().out
    assert "Spheres: 6 cases of 6 patients, 6 usable" in said
    assert "segmentation: core" in said


class _Page(html.parser.HTMLParser):
    """Balanced tags, and the sources of pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.links = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.sources += [str(values["src"])] if "src" in values else []
        self.links += tag in ("script", "link", "a")
        if tag not in ("meta", "img", "br", "path"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else(spheres, tmp_path):
    look(spheres, tmp_path, pictures=3)
    page = _Page()
    page.feed((tmp_path / "inspect.html").read_text())
    assert page.open == []
    assert page.links == 0
    assert len(page.sources) == 3
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)


def test_a_recipe_describes_the_cohort(tmp_path, spheres, capsys):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from ml_collections import ConfigDict\ndef get_config(arg=None):\n"
        f"    return ConfigDict({{'data': {{'cohort': {str(spheres)!r}, 'split': {{'file': 'split.csv'}}}},"
        " 'model': {'name': 'unet', 'width': 3},"
        " 'tasks': {'balls': {'type': 'segmentation', 'levels': 2}, 'x': {'type': 'classification'}}})\n"
    )
    inspection.main([f"--config={recipe}", f"--out={tmp_path / 'out'}", "--pictures=0"])
    assert "balls: shell" in capsys.readouterr().out
    assert "<img" not in (tmp_path / "out" / "inspect.html").read_text()
    with pytest.raises(UserError, match="give a folder or manifest"):
        inspection.main([])
    with pytest.raises(UserError, match="unknown argument '--confg"):
        inspection.main([str(spheres), "--confg.x=1"])


# ---------------------------------------------------------------------------------------------------------- bad files


@pytest.fixture
def spoiled(spheres: Path, tmp_path: Path) -> Path:
    """A copy with one thing wrong in each case."""
    root = tmp_path / "cohort"
    shutil.copytree(spheres, root)

    def change(name: str, function: Any, kind: str = "imagesTr", affine: Any = None, dtype: Any = None) -> None:
        path = root / kind / f"{name}.nii.gz"
        old = nib.load(path)
        array = function(np.asanyarray(old.dataobj).copy())
        nib.save(nib.Nifti1Image(array.astype(dtype or array.dtype), old.affine if affine is None else affine), path)

    def nan(array: np.ndarray) -> np.ndarray:
        array[:2, 0, 0] = np.nan
        return array

    def extra(array: np.ndarray) -> np.ndarray:
        array[0, 0, :3] = 7
        return array

    change("case0", nan)
    change("case1", lambda a: a, "labelsTr", np.diag([2.0, 2.0, 2.5, 1.0]))
    change("case2", extra, "labelsTr")
    stream = (root / "imagesTr" / "case3.nii.gz").read_bytes()
    (root / "imagesTr" / "case3.nii.gz").write_bytes(stream[: len(stream) // 2])
    (root / "labelsTr" / "case4.nii.gz").unlink()
    change("case5", lambda a: a * np.float32(1e6))
    return root


def test_every_bad_file_is_told_and_none_stops_it(spoiled, tmp_path):
    found = look(spoiled, tmp_path / "out")
    errors, warnings = problems(found, "error"), problems(found, "warning")
    assert set(errors) == {"case0", "case1", "case2", "case3", "case4"}
    for case, words in {
        "case0": "imagesTr/case0.nii.gz: 2 of", "case1": "another place in space",
        "case2": "labelsTr/case2.nii.gz: undeclared label 7; declared are 0, 1, 2", "case3": "cut short",
        "case4": "labelsTr/case4.nii.gz: no such file",
    }.items():  # fmt: skip
        assert words in errors[case]
    assert "in the median case: other units" in warnings["case5"]
    assert found["usable"] == 2  # case4, without its mask, and case5
    allowed = look(spoiled, tmp_path / "allowed", "data.preprocess.nonfinite=zero")
    assert "case0" in problems(allowed, "warning")
    assert "case0" not in problems(allowed, "error")


def test_the_range_is_that_of_the_finite_voxels(tmp_path):
    for name, array in (("a", np.linspace(5, 9, 64)), ("b", np.full(64, 5.0)), ("c", np.full(64, np.nan))):
        array[1] = np.nan
        save(tmp_path / "in" / f"{name}.nii", array.reshape(4, 4, 4).astype(np.float32))
    keys = ("data.images.MR={case}.nii", "data.preprocess.nonfinite=zero")
    found = look(tmp_path / "in", tmp_path / "out", *keys, pictures=0)
    a, b, c = (report["images"]["MR"] for report in found["reports"])
    assert (a["low"], a["high"], b["low"], b["high"], c["low"]) == (5, 9, 5, 5, None)
    errors = problems(found, "error")
    assert set(errors) == {"b", "c"}
    assert "the image is constant" in errors["b"]


def test_exit_codes(spheres, tmp_path):
    """0 with problems, 2 when nothing can be used; through the command line."""
    for name in ("a", "b"):
        save(tmp_path / "in" / f"{name}.nii.gz", np.zeros((4, 4, 4), np.int16))
    command = [sys.executable, "-m", "medjax.data.inspect", str(tmp_path / "in"),
               "--config.data.images.CT={case}.nii.gz", f"--out={tmp_path / 'out'}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, timeout=120)
    assert done.returncode == 2
    assert "no case can be used as it is" in done.stderr
    assert "Traceback" not in done.stderr
    assert "the image is constant" in (tmp_path / "out" / "inspect.html").read_text()
    save(tmp_path / "in" / "c.nii.gz", np.arange(64, dtype=np.int16).reshape(4, 4, 4))
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, timeout=120)
    assert done.returncode == 0
    assert "3 cases" in done.stdout
    assert "1 usable" in done.stdout


def test_labels_nobody_declared_are_proposed(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        save(tmp_path / "in" / f"{name}_t1.nii.gz", rng.integers(0, 99, (6, 5, 4), np.int16))
        save(tmp_path / "in" / f"{name}_seg.nii.gz", rng.integers(0, 3, (6, 5, 4), np.uint8))
    keys = ("data.images.T1={case}_t1.nii.gz", "data.targets.seg={case}_seg.nii.gz")
    found = look(tmp_path / "in", tmp_path / "out", *keys)
    assert "Set data.labels={'name1': 1, 'name2': 2}" in problems(found, "error")[""]
    found = look(tmp_path / "in", tmp_path / "out", *keys, "data.labels={'x':1,'y':2,'z':5}")
    assert "label 'z' (5) is declared, but no mask holds it" in problems(found, "warning")[""]


def test_masks_with_rounding_and_4d_stacks(tmp_path):
    rng = np.random.default_rng(0)
    save(tmp_path / "in" / "a_t1.nii.gz", rng.integers(0, 99, (6, 5, 4), np.int16))
    save(tmp_path / "in" / "b_t1.nii.gz", rng.integers(0, 99, (6, 5, 4), np.int16))
    save(tmp_path / "in" / "a_seg.nii.gz", rng.integers(0, 2, (6, 5, 4)) * 0.99999997)
    save(tmp_path / "in" / "b_seg.nii.gz", rng.integers(0, 2, (6, 5, 4, 3)).astype(np.uint8))
    found = look(tmp_path / "in", tmp_path / "out", "data.images.T1={case}_t1.nii.gz",
                 "data.targets.seg={case}_seg.nii.gz", "data.labels={'x':1}")  # fmt: skip
    assert "stored as float64; they are rounded" in problems(found, "note")["a"]
    assert "3 channels. Merge them into one map" in problems(found, "error")["b"]
    assert list(found["reports"][0]["masks"]["seg"]["volumes"]) == ["1"]


def test_duplicates_across_patients_with_other_labels(tmp_path):
    rng = np.random.default_rng(0)
    voxels = rng.integers(0, 99, (6, 5, 4), np.int16)
    # The same image under another name, axis order and type.
    turned = nib.Nifti1Image(voxels, np.eye(4)).as_reoriented(np.array([[0, -1], [2, 1], [1, 1]]))
    save(tmp_path / "in" / "p1_a_t1.nii.gz", voxels)
    save(tmp_path / "in" / "p2_a_t1.nii", np.asanyarray(turned.dataobj).astype(np.float32), turned.affine)
    (tmp_path / "in" / "p2_a_t1.nii").rename(tmp_path / "in" / "p2_a_t1.nii.gz")
    save(tmp_path / "in" / "p2_b_t1.nii.gz", rng.integers(0, 99, (6, 5, 4), np.int16))
    save(tmp_path / "in" / "p1_a_seg.nii.gz", rng.integers(0, 2, (6, 5, 4)).astype(np.uint8))
    save(tmp_path / "in" / "p2_a_seg.nii.gz", np.ones(turned.shape, np.uint8), turned.affine)
    keys = (
        "data.images.T1={patient}_{n}_t1.nii.gz",
        "data.targets.seg={patient}_{n}_seg.nii.gz",
        "data.labels={'x':1}",
    )
    found = look(tmp_path / "in", tmp_path / "out", *keys)
    said = problems(found, "warning")["p2_a"]
    assert "hold identical voxels, but their masks of task seg differ" in said
    assert "data.exclude=('p2',)" in said
    (tmp_path / "in" / "split.csv").write_text("id,split\np1_a,train\np2_a,val\np2_b,val\n")
    found = look(tmp_path / "in", tmp_path / "out", *keys, "data.split.file=split.csv")
    assert "in the splits train and val: a score would measure memory" in problems(found, "error")["p2_a"]


def test_targets_and_attributes_are_summed_up(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in "abcd":
        save(tmp_path / f"{name}.nii.gz", rng.integers(0, 99, (6, 5, 4), np.int16))
    (tmp_path / "cases.csv").write_text(
        "id,t1,kind,age,x,y,site,marks\n"
        'a,a.nii.gz,yes,40,1,,N,"[{""center"": [1, 1, 1], ""diameter"": 3}]"\n'
        "b,b.nii.gz,no,60.5,0,1,N,[]\nc,c.nii.gz,yes,,,,S,\n"
        'd,d.nii.gz,,50,1,1,S,"[{""center"": [-1, -1, 1], ""diameter"": 3}]"\n'
    )
    found = look(tmp_path / "cases.csv", tmp_path / "out", "data.images.T1=t1", "data.targets.kind=kind",
                 "data.targets.age=age", "data.targets.v=('x','y')", "data.targets.marks=marks",
                 "data.classes.kind=('no','yes')")  # fmt: skip
    assert found["targets"]["kind"] == {"kind": "class", "cases": 3, "counts": {"no": 1, "yes": 2}}
    assert found["targets"]["age"]["range"] == {"min": 40, "median": 50, "max": 60.5}
    assert found["targets"]["v"]["entries"]["y"]["known"] == 2
    assert found["targets"]["marks"] == {
        "kind": "findings", "cases": 3, "none": 1, "findings": 2, "labels": {"1": 2},
        "extent_mm": {"min": 3, "median": 3, "max": 3},
    }  # fmt: skip
    assert found["attributes"]["site"]["counts"] == {"N": 2, "S": 2}
    # In LPS, d's mark would lie inside.
    assert "its centre (-1, -1, 1) mm, RAS+, lies outside" in problems(found, "error")["d"]
    assert "a" not in problems(found, "error")
    assert "no 1, yes 2" in capsys.readouterr().out


def test_a_case_that_breaks_everything_is_one_problem(tmp_path, monkeypatch):
    def broken(path: object) -> None:
        raise ZeroDivisionError("never seen before")

    monkeypatch.setattr(inspection.nifti, "read", broken)
    cohort = Cohort("x", tmp_path, ("T1",), {}, ())
    report = inspection.examine(Case("a", "a", {"T1": tmp_path / "a.nii"}, {"f": (Finding((0, 0, 0)),)}), cohort)
    assert "ZeroDivisionError: never seen before" in report.problems[0].message
    assert not report.usable


# ---------------------------------------------------------------------------------------------------------- pictures


def test_png_reads_back():
    image = pytest.importorskip("matplotlib.image")
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 3), np.uint8)
    from io import BytesIO

    read = image.imread(BytesIO(overview.png(pixels)), format="png")
    np.testing.assert_array_equal((read * 255).round().astype(np.uint8)[..., :3], pixels)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SRA"])
def test_pictures_are_turned_the_radiological_way(codes):
    """A bright corner at the patient's right, back and foot, stored in several orders, lies where it should."""
    array = np.zeros((8, 8, 8), np.float32)
    array[5:, :3, :3] = np.linspace(50, 100, 27).reshape(3, 3, 3)
    start = nib.Nifti1Image(array, np.eye(4))
    change = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(tuple(codes))
    )
    turned = start.as_reoriented(change)
    volume = Volume(np.asanyarray(turned.dataobj), turned.affine)
    mask = Volume((volume.data > 0).astype(np.uint8), turned.affine)
    canvas = overview.Canvas(volume, [mask], [1])
    canvas.add(volume)
    panels = canvas._panels
    assert len(panels) == 3
    for panel, (vertical, horizontal) in zip(panels, (("low", "left"), ("low", "left"), ("low", "right")), strict=True):
        rows, columns = np.nonzero(panel.sum(axis=2) > 30)
        half = panel.shape[0] / 2, panel.shape[1] / 2
        assert (rows.mean() > half[0]) == (vertical == "low")
        assert (columns.mean() < half[1]) == (horizontal == "left")


# ----------------------------------------------------------------------------------------------------------- real data


@pytest.mark.real
def test_cardiac(data_root, tmp_path):
    found = look(
        data_root / "cardiac_acdc", tmp_path, "data.images.MR=images/{patient}_{frame}.nii.gz",
        "data.targets.heart=labels/{patient}_{frame}.nii.gz", "data.targets.diagnosis=group",
        "data.table=patients.csv", "data.group={patient}", "data.classes.diagnosis=('NOR','DCM','HCM','MINF','RV')",
        "data.labels={'RV':1,'myo':2,'LV':3}",
    )  # fmt: skip
    assert (found["cases"], found["patients"], found["problem_counts"]["error"]) == (64, 32, 0)
    warned = problems(found, "warning")
    for frame in ("frame01", "frame02"):
        assert "masks of task heart differ" in warned[f"patient076_{frame}"]
        assert f"patient074_{frame}" in warned[f"patient076_{frame}"]
    assert sum(found["targets"]["diagnosis"]["counts"].values()) == 64


@pytest.mark.real
def test_a_mask_with_the_same_shape_and_other_axes_is_found(data_root, tmp_path):
    keys = ("data.images.T1={case}/t1n.nii.gz", "data.labels={'a':1,'b':2,'c':3,'d':4}")
    found = look(data_root / "brats_4mod", tmp_path, *keys, "data.targets.s={case}/seg-BraTS23_1_mapped.nii.gz")
    said = problems(found, "error")["BraTS-GLI-00001-000"]
    assert "seg-BraTS23_1_mapped.nii.gz: same shape as" in said
    assert "RAS, spacing" in said
    good = look(data_root / "brats_4mod", tmp_path, *keys, "data.targets.s={case}/seg-BraTS23_1.nii.gz")
    assert good["problem_counts"]["error"] == 0


# What each odd file must end in: a word of its error, or None for a file that is good as an image.
ODD = {
    "nan_": "NaN", "5d_warp": "5-D", "4d_functional": "20 channels", "4d_example": "2 channels",
    "4d_fmri": "30 channels", "4d_pcasl": "10 channels", "4d_dwi": "7 channels", "4d_onehot": "3 channels",
    "nifti2_example": "2 channels", "rgb_": "RGB", "rgba_": "RGBA", "complex": "complex", "2d_": "2-D",
    "empty_label": "constant", "constant": "constant", "broken_short": "promises", "broken_apple": "AppleDouble",
    "image.mha": "MetaImage", "FLAIR.nrrd": "NRRD", "surface_": "one line", "cifti": "CIFTI",
    "orient48": "no such file",
    "truncated60": "cut short", "truncated_crc": "cut short", "corrupt_middle": "corrupt", "header_only": "promises",
    "truncated.nii": "promises", "zero_bytes": "empty", "lfs_pointer": "git lfs pull", "text.nii": "not a NIfTI",
    "dim0_is_9": "dim[0]", "bad_datatype": "damaged header", "dim_lies": "promises",
}  # fmt: skip


@pytest.mark.real
def test_odd_files_through_their_manifest(data_root, tmp_path):
    root = data_root / "odd_files"
    found = look(root / "manifest.csv", tmp_path, "data.images.image=file", "data.id=file")
    errors = problems(found, "error")
    with (root / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        name = row["file"].split("/", 1)[1]
        words = next((words for start, words in ODD.items() if name.startswith(start)), None)
        if words is None:
            assert row["file"] not in errors, errors[row["file"]]
        else:
            assert words in errors[row["file"]], (row["file"], errors.get(row["file"]))
            assert str(root / row["file"]) in errors[row["file"]]
    # What is read has the shape and spacing the manifest says.
    about = {report["id"]: report["images"].get("image") for report in found["reports"]}
    checked = 0
    for row in rows:
        if row["shape"] and (image := about.get(row["file"])) and row["file"] not in errors:
            shape = tuple(int(n) for n in row["shape"].strip("()").split(",") if n.strip())
            zooms = tuple(float(n) for n in row["zooms"].strip("()").split(","))
            assert tuple(image["shape"]) == tuple(shape[:3])
            if row["file"] != "derived/qform_ne_sform.nii.gz":  # the manifest has the qform's
                np.testing.assert_allclose(image["spacing"], zooms[:3], rtol=2e-3)
            assert image["dtype"] == row["dtype"]
            checked += 1
    assert checked > 30


@pytest.mark.real
def test_all_48_orders_of_one_brain_are_one_image(data_root, tmp_path):
    found = look(data_root / "odd_files" / "real" / "orient48", tmp_path, "data.images.T1={codes}.nii.gz", pictures=0)
    assert found["cases"] == 48
    assert len({report["images"]["T1"]["digest"] for report in found["reports"]}) == 1
    assert {r["images"]["T1"]["orientation"] for r in found["reports"]} == {r["id"] for r in found["reports"]}
    assert sum("identical voxels" in p["message"] for p in found["problems"]) == 47


def test_defaults_name_the_new_keys():
    config = config_lib.defaults()
    for key in ("layout", "classes", "findings", "table", "exclude"):
        assert key in config.data
