"""Measures of patients: walls against rings, formulas against arithmetic, frames that are declared, a rule that can be
followed by hand; a whole run, and new patients measured as the evaluation measured them."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from untrained import make_run

from medjax import config as config_lib
from medjax import evaluate, main, measures, models, predict, tasks
from medjax.data import dataset, inspect, nifti
from medjax.data.cases import Case, Cohort
from medjax.errors import UserError
from medjax.measures import diagnosis, frames
from medjax.measures.formulas import Call, Formulas, measure
from medjax.metrics import walls

REPO = Path(__file__).resolve().parents[1]


# -------------------------------------------------------------------------------------------------------------- walls


def ring(inner: float, outer: float, spacing: tuple[float, float], size: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """(wall, cavity) [size, size] around a point between the pixels."""
    at = (np.indices((size, size)) - (size / 2 - 0.3)) * np.reshape(spacing, (2, 1, 1))
    distance = np.hypot(*at)
    return (distance >= inner) & (distance < outer), distance < inner


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("pixels", [(1.5, 1.5), (1.0, 1.4)])
def test_a_ring_has_its_thickness_in_any_plane(axis: int, pixels: tuple[float, float]) -> None:
    sizes = [(20.0, 30.0), (12.0, 15.0), (25.0, 33.0)]
    pairs = [ring(*size, pixels) for size in sizes]
    wall, cavity = (np.stack([pair[k] for pair in pairs], axis=axis) for k in (0, 1))
    spacing = [*pixels]
    spacing.insert(axis, 8.0)
    found = walls.wall(wall, cavity, spacing)
    assert found.thickness.shape == (3, walls.ANGLES)
    for k, (inner, outer) in enumerate(sizes):
        assert found.thickness[k].mean() == pytest.approx(outer - inner, abs=0.1)
        assert found.radius[k].mean() == pytest.approx(inner, abs=0.1)
        assert found.thickness[k].std() < 0.45 * max(pixels)


def test_an_open_ring_and_an_empty_slice_have_no_wall() -> None:
    wall, cavity = ring(20, 30, (1.5, 1.5))
    gap = wall.copy()
    gap[:, 38:42] = False  # two gaps of 4 pixels
    nothing = np.zeros_like(wall)
    stack = lambda *x: np.stack(x, axis=2)  # noqa: E731
    found = walls.wall(stack(wall, gap, nothing, wall), stack(cavity, cavity, cavity, nothing), (1.5, 1.5, 8))
    assert np.isfinite(found.thickness[0]).all()
    assert np.isnan(found.thickness[1:]).all()


def test_slices_are_not_guessed() -> None:
    assert walls.slice_axis((1.5, 10.0, 1.4)) == 1
    with pytest.raises(UserError, match="no axis is clearly the one across the slices"):
        walls.slice_axis((1.0, 1.0, 1.2))


# ----------------------------------------------------------------------------------------------------------- formulas


def test_formulas_are_arithmetic() -> None:
    texts = {
        "ef": "100 * stroke / edv",
        "edv": "volume(LV, ED)",
        "stroke": "edv - volume('LV', ES)",
        "mass": "1.05 * volume(wall, ED)",
        "index": "mass / bsa(attribute(Height), attribute(Weight))",
        "thick": "max(slices(thickness(wall, LV, ED)))",
        "top": "quantile(thickness(wall, LV, ED), 0.5) + -min(2, 3) ** 2",
        "spread": "sd(thickness(wall, LV, ED)) / sqrt(abs(-4))",
    }
    formulas = Formulas(texts, ("LV", "wall"), ("ED", "ES"))
    profile = np.array([[1.0, 3.0], [5.0, math.nan], [math.nan, math.nan]])
    measured = {
        Call("volume", ("LV",), "ED"): 150.0,
        Call("volume", ("LV",), "ES"): 60.0,
        Call("volume", ("wall",), "ED"): 100.0,
        Call("attribute", ("Height",), ""): 170.0,
        Call("attribute", ("Weight",), ""): 70.0,
        Call("thickness", ("wall", "LV"), "ED"): profile,
    }
    found = formulas(measured)
    assert list(found) == list(texts)
    assert found["ef"] == pytest.approx(60.0)
    # Mosteller's square metres for 170 cm and 70 kg: 1.818
    assert found["index"] == pytest.approx(105.0 / 1.8181, rel=1e-3)
    assert (found["thick"], found["top"]) == (5.0, 3.0 - 4.0)
    assert found["spread"] == pytest.approx(np.std([1, 3, 5]) / 2)
    empty = formulas({**measured, Call("volume", ("LV",), "ED"): 0.0, Call("volume", ("LV",), "ES"): 0.0})
    assert math.isnan(empty["ef"])
    assert math.isnan(formulas({})["index"])


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"a": "volume(LW, ED)"}, ["formulas.a", "no label 'LW'", "LV"]),
        ({"a": "volume(LV, EX)"}, ["no frame 'EX'", "ED, ES"]),
        ({"a": "volume(LV)"}, ["volume takes label, frame"]),
        ({"a": "volume(3, ED)"}, ["volume takes names"]),
        ({"a": "volum(LV, ED)"}, ["no function 'volum'", "volume"]),
        ({"a": "edw + 1", "edv": "volume(LV, ED)"}, ["no measure 'edw'", "did you mean 'edv'"]),
        ({"a": "b + 1", "b": "2 * a"}, ["needs itself"]),
        ({"a": "thickness(wall, LV, ED)"}, ["is an array"]),
        ({"a": "1 +"}, ["cannot be read"]),
        ({"a": "(1).__class__"}, ["neither a number"]),
        ({"a": "[1, 2]"}, ["neither a number"]),
        ({"a": "sqrt(1, 2)"}, ["sqrt takes 1"]),
        ({"a": "attribute(Height, Weight)"}, ["one column"]),
        ({"a": "1 % 2"}, ["neither a number"]),
    ],
)
def test_formulas_that_mean_nothing_are_refused(texts: dict[str, str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        Formulas(texts, ("LV", "wall"), ("ED", "ES"))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_cavity_counts_where_a_wall_is_around_it() -> None:
    wall, cavity = ring(20, 30, (1.5, 1.5))
    half, little = wall.copy(), wall.copy()
    half[:40] = False
    little[:, :56] = False
    masks = {"wall": np.stack([wall, half, little, wall & False], 2), "LV": np.stack([cavity] * 4, 2)}
    formulas = Formulas({"v": "enclosed(LV, wall, ED)"}, masks, ("ED",))
    found = formulas(measure(formulas.calls, "ED", masks.__getitem__, (1.5, 1.5, 10.0)))
    assert found["v"] == pytest.approx(2 * cavity.sum() * 2.25 * 10 / 1000)
    sheared = formulas(measure(formulas.calls, "ED", masks.__getitem__, (1.5, 1.5, 10.0), 20.0))
    assert sheared["v"] == pytest.approx(2 * cavity.sum() * 20 / 1000)
    closed = walls.wall(masks["wall"], masks["LV"], (1.5, 1.5, 10.0)).closed
    assert closed == pytest.approx([1, 0.5, 0.2, 0], abs=0.05)


def test_what_is_measured_in_a_mask() -> None:
    wall, cavity = ring(20, 30, (1.5, 1.5))
    masks = {"wall": np.stack([wall, wall], 2), "LV": np.stack([cavity, cavity], 2)}
    texts = {
        "v": "volume(LV, ED)",
        "a": "max(area(LV, ED))",
        "t": "mean(thickness(wall, LV, ED))",
        "s": "volume(LV, ES)",
    }
    formulas = Formulas(texts, masks, ("ED", "ES"))
    found = formulas(measure(formulas.calls, "ED", masks.__getitem__, (1.5, 1.5, 10.0)))
    assert found["v"] == pytest.approx(2 * cavity.sum() * 2.25 * 10 / 1000)
    assert found["a"] == pytest.approx(cavity.sum() * 2.25)
    assert found["t"] == pytest.approx(10.0, abs=0.1)
    assert math.isnan(found["s"])  # of another frame


# ------------------------------------------------------------------------------------------------------------- frames


def a_case(id: str, patient: str, **columns: str) -> Case:
    return Case(id, patient, {"MR": Path(f"{id}.nii.gz")}, {}, {"patient": patient, **columns})


def test_frames_are_those_the_table_declares() -> None:
    cases = [a_case(f"p1_frame{n:02}", "p1", ED="1", ES="12.0") for n in (1, 7, 12)]
    cases += [a_case(f"p2_frame{n:02}", "p2", ED="04", ES="9") for n in (4, 9)]
    found = frames.patients_of(cases, {"ED": "{patient}_frame{ED:02}", "ES": "{patient}_frame{ES:02}"})
    names = {patient: {frame: case.id for frame, case in of.items()} for patient, of in found.items()}
    assert names == {
        "p1": {"ED": "p1_frame01", "ES": "p1_frame12"},
        "p2": {"ED": "p2_frame04", "ES": "p2_frame09"},
    }
    phases = [a_case("x", "p1", phase="ED"), a_case("y", "p1", phase="ES"), a_case("z", "p1", phase="mid")]
    found = frames.patients_of(phases, {"ED": "phase=ED", "ES": "phase=ES"})
    assert {frame: case.id for frame, case in found["p1"].items()} == {"ED": "x", "ES": "y"}
    assert list(frames.patients_of(phases, {})) == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("columns", "templates", "words"),
    [
        ({}, {"ED": "{patient}_f{ED:02}"}, ["no column 'ED'", "not guessed"]),
        ({"ED": "first"}, {"ED": "{patient}_f{ED:02}"}, ["'first'", "integer"]),
        ({"ED": "3"}, {"ED": "{patient}_f{ED:02}"}, ["no case is frame ED", "p1_f01, p1_f02", "data.exclude=('p1',)"]),
        ({}, {"ED": "phase=ED"}, ["no column 'phase'"]),
        ({"phase": "ED"}, {"ED": "phase=ED"}, ["p1_f01 and p1_f02 are both frame ED"]),
    ],
)
def test_frames_that_are_not_declared_are_refused(
    columns: dict[str, str], templates: dict[str, str], words: list[str]
) -> None:
    cases = [a_case("p1_f01", "p1", **columns), a_case("p1_f02", "p1", **columns)]
    with pytest.raises(UserError) as caught:
        frames.patients_of(cases, templates)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_new_patients_are_known_by_names_and_a_table(tmp_path: Path) -> None:
    table = tmp_path / "new.csv"
    table.write_text("patient,ED,ES,Height\nq1,1,9,170\nq2,3,12,\n")
    cases = [Case(n, n, {"MR": Path(n)}) for n in ("q1_frame01", "q1_frame09", "q2_frame03", "q2_frame12", "other")]
    templates = {"ED": "{patient}_frame{ED:02}", "ES": "{patient}_frame{ES:02}"}
    known = frames.describe(cases, templates, "{patient}", "id", table)
    assert [(c.id, c.group) for c in known] == [(c.id, c.id[:2]) for c in cases[:4]]
    assert known[0].attributes["Height"] == "170"
    assert set(frames.patients_of(known, templates)) == {"q1", "q2"}
    bare = frames.describe(cases, templates, "{patient}", "id", None)
    with pytest.raises(UserError, match="no column 'ED'"):
        frames.patients_of(bare, templates)
    fixed = {"ED": "{patient}_frame01", "ES": "{patient}_frame09"}
    assert set(frames.patients_of(frames.describe(cases, fixed, "{patient}", "id", None), fixed)) == {"q1"}


# ---------------------------------------------------------------------------------------------------------- diagnosis


def patients(n: int = 60, seed: int = 0) -> tuple[list[dict[str, float]], list[str]]:
    rng = np.random.default_rng(seed)
    centres = {"A": (0, 0, 5), "B": (3, 1, 5), "C": (0, 4, 9)}
    mixing = rng.normal(size=(3, 3))
    rows, truths = [], []
    for i in range(n):
        name = "ABC"[i % 3]
        x = np.array(centres[name]) + mixing @ rng.normal(size=3)
        rows.append(dict(zip(("u", "v", "w"), x, strict=True)))
        truths.append(name)
    return rows, truths


def test_unshrunk_it_is_linear_discriminant_analysis() -> None:
    sklearn = pytest.importorskip("sklearn.discriminant_analysis")
    rows, truths = patients()
    rule = diagnosis.fit(rows, truths, ("u", "v", "w"), 0.0)
    peer = sklearn.LinearDiscriminantAnalysis(solver="lsqr", priors=[1 / 3] * 3)
    peer.fit([list(row.values()) for row in rows], truths)
    new, _ = patients(300, seed=1)
    want = peer.predict([list(row.values()) for row in new])
    assert np.mean([rule(row) == w for row, w in zip(new, want, strict=True)]) > 0.98


def test_a_call_can_be_followed_by_hand() -> None:
    rows, truths = patients()
    rule = diagnosis.fit(rows, truths, ("u", "w"), 0.5)
    table = json.loads(json.dumps(rule.to_json()))
    scores = {}
    for name, of in table["classes"].items():
        scores[name] = of["intercept"] + sum(
            of["weights"][m] * (rows[0][m] - table["mean"][m]) / table["sd"][m] for m in table["mean"]
        )
    odds = {name: math.exp(score) for name, score in scores.items()}
    want = {name: value / sum(odds.values()) for name, value in odds.items()}
    again = diagnosis.Diagnosis.from_json(table)
    assert again.probabilities(rows[0]) == pytest.approx(want)
    assert again.probabilities(rows[0]) == pytest.approx(rule.probabilities(rows[0]))
    assert again(rows[0]) == max(want, key=want.__getitem__)
    assert again({"u": math.nan, "w": 1.0}) == ""
    assert again({"u": 1.0}) == ""


def test_what_cannot_be_learnt_is_refused() -> None:
    rows, truths = patients(12)
    with pytest.raises(UserError, match="1 training patient.s. of class 'D'"):
        diagnosis.fit(rows, ["D", *truths[1:]], ("u",), 0.5)
    with pytest.raises(UserError, match="'v' is undefined in every"):
        diagnosis.fit([{**row, "v": math.nan} for row in rows], truths, ("u", "v"), 0.5)
    with pytest.raises(UserError, match="'v' is the same of every"):
        diagnosis.fit([{**row, "v": 2.0} for row in rows], truths, ("u", "v"), 0.5)


def test_twins_do_not_vouch_for_each_other() -> None:
    seen: list[int] = []

    def rule(rows: list[Any], truths: list[str]) -> Any:
        seen.append(len(rows))
        return lambda row: truths[0]

    diagnosis.cross_validate([{}] * 5, list("abcde"), [0, 1, 1, 2, 3], rule)
    assert seen == [4, 3, 3, 4, 4]


# -------------------------------------------------------------------------------------------------------- a whole run

RECIPE = """
from ml_collections import ConfigDict

def get_config(arg=None):
    config = ConfigDict()
    config.data = ConfigDict({{
        "cohort": {cohort!r}, "layout": "folder", "images": {{"MR": "images/{{patient}}_f{{frame}}.nii.gz"}},
        "targets": {{"heart": "labels/{{patient}}_f{{frame}}.nii.gz"}}, "labels": {{"wall": 1, "LV": 2}},
        "group": "{{patient}}", "table": "patients.csv", "split": {{"column": "part"}},
        "preprocess": {{"spacing": (2.0, 2.0, 6.0)}}, "patch": (32, 32, 4), "batch_size": 2,
    }})
    config.model = ConfigDict({{"name": "unet", "features": (4, 8), "factors": ((2, 2, 1),), "convs": 1,
                               "decoder_convs": 1}})
    config.tasks = ConfigDict({{"heart": {{"type": "segmentation", "levels": 1}}}})
    config.optim = ConfigDict({{"name": "adamw", "lr": 1e-2}})
    config.train = ConfigDict({{"total": "{total} steps", "eval_every": "{total} steps",
                               "checkpoint_every": "{total} steps"}})
    config.eval = ConfigDict({{"splits": ("val",)}})
    config.measures = ConfigDict({{
        "frames": {{"ED": "{{patient}}_{{ED:02}}", "ES": "{{patient}}_{{ES:02}}"}},
        "formulas": {{
            "edv_ml": "volume(LV, ED)", "ef": "100 * (1 - volume(LV, ES) / edv_ml)",
            "wall_mm": "mean(thickness(wall, LV, ED))", "index": "edv_ml / bsa(attribute(Height), 70)",
        }},
        "report": ("ef", "edv_ml", "wall_mm"),
        "diagnosis": {{"column": "group", "measures": ("ef", "edv_ml")}},
    }})
    return config
"""


LABELS = {"wall": 1, "LV": 2}


def write_heart(folder: Path, seed: int = 0) -> Path:
    """Eight patients, two frames each: 'sick' ones have a large cavity that hardly shrinks. Frames by the table."""
    rng = np.random.default_rng(seed)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    lines = ["patient,group,part,ED,ES,Height"]
    for i in range(8):
        sick, first, last = i % 2, 1 + i % 3, 7 + i
        part = "val" if i > 5 else "train"
        lines.append(f"p{i},{('well', 'sick')[sick]},{part},{first},{last},{165 + i}")
        for frame, inner in ((first, (15.0, 18.0)[sick]), (last, (9.0, 16.0)[sick])):
            wall, cavity = ring(inner + i / 4, inner + i / 4 + 6, (2.0, 2.0), 32)
            label = np.repeat((wall + 2 * cavity).astype(np.uint8)[..., None], 4, axis=2)
            image = (100 + 80 * label + rng.normal(0, 8, label.shape)).astype(np.float32)
            affine = np.diag([2.0, 2.0, 6.0, 1.0])
            nib.save(nib.Nifti1Image(image, affine), folder / "images" / f"p{i}_f{frame:02}.nii.gz")
            nib.save(nib.Nifti1Image(label, affine), folder / "labels" / f"p{i}_f{frame:02}.nii.gz")
    (folder / "patients.csv").write_text("\n".join(lines) + "\n")
    return folder


def load(recipe: Path, *overrides: str) -> Any:
    options = {"model": models.options, "tasks": tasks.options}
    return config_lib.load(str(recipe), overrides, lambda room, kind: options[room](kind))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("heart")
    write_heart(folder / "cohort")
    (folder / "heart.py").write_text(RECIPE.format(cohort=str(folder / "cohort"), total=60))
    main.main([f"--config={folder / 'heart.py'}", f"--workdir={folder / 'run'}"])
    return folder / "run"


def rows_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.open()))


def volume(file: Path, value: int) -> float:
    return float((np.asarray(nib.load(file).dataobj) == value).sum() * 24 / 1000)


def test_a_run_measures_its_patients(run: Path) -> None:
    folder, cohort = run / "eval" / "val", run.parent / "cohort"
    rows = {(r["patient"], r["measure"]): r for r in rows_of(folder / "measures.csv")}
    assert len(rows) == 2 * 4
    for patient, ed, es in (("p6", "01", "13"), ("p7", "02", "14")):
        for kind, place in (("reference", cohort / "labels"), ("predicted", folder / "predictions")):
            name = "{}_f{}.nii.gz" if kind == "reference" else "{}_{}.nii.gz"
            edv, esv = (volume(place / name.format(patient, frame), 2) for frame in (ed, es))
            assert float(rows[patient, "edv_ml"][kind]) == pytest.approx(edv, rel=1e-5)
            assert float(rows[patient, "ef"][kind]) == pytest.approx(100 * (1 - esv / edv), rel=1e-4)
    assert float(rows["p6", "wall_mm"]["reference"]) == pytest.approx(6.0, abs=0.15)
    edv = float(rows["p6", "edv_ml"]["reference"])
    assert float(rows["p6", "index"]["reference"]) == pytest.approx(edv / math.sqrt(171 * 70 / 3600), rel=1e-5)
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["measures"]) == ["ef", "edv_ml", "wall_mm"]
    differences = [float(rows[p, "ef"]["difference"]) for p in ("p6", "p7")]
    of = summary["measures"]["ef"]
    assert of["mae"]["value"] == pytest.approx(np.mean(np.abs(differences)), rel=1e-4)
    assert of["bias"]["value"] == pytest.approx(np.mean(differences), rel=1e-4)
    spread = 1.96 * np.std(differences, ddof=1)
    assert of["limit_low"]["value"] == pytest.approx(np.mean(differences) - spread, rel=1e-4)
    low, high = of["mae"]["ci95"]
    assert low <= of["mae"]["value"] <= high
    assert (of["n"], of["undefined"]) == (2, 0)
    assert (folder / "measures.png").stat().st_size > 1000


def test_a_run_calls_a_diagnosis_from_readable_json(run: Path) -> None:
    summary = json.loads((run / "eval" / "val" / "summary.json").read_text())["diagnosis"]
    assert (summary["accuracy"]["value"], summary["n"], summary["on_reference_masks"]) == (1.0, 2, 1.0)
    assert summary["cross_validation"] == {"accuracy": 1.0, "n": 6, "wrong": {}}
    assert summary["confusion"] == {"well": {"well": 1}, "sick": {"sick": 1}}
    calls = {r["patient"]: r for r in rows_of(run / "eval" / "val" / "diagnosis.csv")}
    assert (calls["p6"]["diagnosis"], calls["p7"]["diagnosis"]) == ("well", "sick")
    assert float(calls["p6"]["p_well"]) + float(calls["p6"]["p_sick"]) == pytest.approx(1, abs=1e-5)
    table = json.loads((run / "measures.json").read_text())
    assert set(table["diagnosis"]["fitted"]["classes"]) == {"sick", "well"}


def test_new_patients_are_measured_as_the_evaluation_measured_them(run: Path, tmp_path: Path, capfd: Any) -> None:
    cohort, scans = run.parent / "cohort", tmp_path / "scans"
    scans.mkdir()
    for old, new in (("p6_f01", "p6_01"), ("p6_f13", "p6_13"), ("p7_f02", "p7_02")):
        (scans / f"{new}.nii.gz").write_bytes((cohort / "images" / f"{old}.nii.gz").read_bytes())
    given = [f"--run={run}", f"--input={scans}"]
    predict.main([*given, f"--output={tmp_path / 'a'}", f"--table={cohort / 'patients.csv'}"])
    (new,) = rows_of(tmp_path / "a" / "measures.csv")
    old = {r["measure"]: r["predicted"] for r in rows_of(run / "eval" / "val" / "measures.csv") if r["patient"] == "p6"}
    assert new == {"patient": "p6", **old}
    (called,) = rows_of(tmp_path / "a" / "diagnosis.csv")
    assert (called["patient"], called["diagnosis"]) == ("p6", "well")
    assert "p7" in capfd.readouterr().err  # it lacks a frame, and that is said
    # Without the table nobody says which frame is which: masks alone, and the reason.
    predict.main([*given, f"--output={tmp_path / 'b'}"])
    assert not (tmp_path / "b" / "measures.csv").exists()
    assert "not guessed" in capfd.readouterr().err
    assert (tmp_path / "b" / "p6_01.nii.gz").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("measures.frames.ED={patient}_{EDD:02}", ["no column 'EDD'", "did you mean 'ED'"]),
        ("measures.formulas={'a':'volume(LW, ED)'}", ["no label 'LW'"]),
        ("measures.report=('fe',)", ["measures.report", "'fe'"]),
        ("measures.task=hart", ["measures.task='hart'", "heart"]),
        ("measures.diagnosis.column=grupp", ["measures.diagnosis.column='grupp'"]),
        ("measures.diagnosis.shrinkage=2.0", ["shrinkage=2.0"]),
        ("measures.formulas.index=volume(LV, ED) / attribute(Hight)", ["attribute(Hight)", "Height"]),
    ],
)
def test_what_cannot_be_measured_is_told_before_training(
    run: Path, tmp_path: Path, override: str, words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        main.main([f"--config={run.parent / 'heart.py'}", f"--workdir={tmp_path}", f"--config.{override}"])
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "checkpoints" / "latest" / "60").exists()


def gauge_of(run: Path) -> tuple[Any, list[Case], Any]:
    """The gauge of the run's training cases, those cases, and its task."""
    config = load(run.parent / "heart.py")
    cohort = dataset.open_cohort(config.data, config.tasks)
    cases = list(dataset.open_splits(cohort, config.data, 0)["train"])
    built = tasks.build(config.tasks, cohort.labels)
    content = json.loads((run / "measures.json").read_text())
    bound = measures.build(config.measures, config.data, built)
    rule = diagnosis.Diagnosis.from_json(content["diagnosis"]["fitted"])
    return measures.Gauge(bound, cases, rule), cases, built["heart"]


def test_a_structure_that_is_missed_never_improves_a_mean(run: Path, tmp_path: Path) -> None:
    gauge, cases, _ = gauge_of(run)
    for case in cases:
        mask = nifti.read_label(str(case.targets["heart"]))
        missed = case.group == "p0"
        gauge.predicted("heart", case.id, mask.data * (not missed), mask.spacing)
        gauge.reference("heart", case.id, mask.data, mask.spacing)
    found = gauge.finish(tmp_path, "test")
    of = found["measures"]["ef"]
    (row,) = [r for r in rows_of(tmp_path / "measures.csv") if (r["patient"], r["measure"]) == ("p0", "ef")]
    assert row["predicted"] == ""
    assert float(row["difference"]) == pytest.approx(-float(row["reference"]), rel=1e-5)
    assert of["mae"]["value"] == pytest.approx(float(row["reference"]) / 6, rel=1e-4)
    assert (of["n"], of["undefined"]) == (6, 1)
    assert found["diagnosis"]["accuracy"]["value"] == pytest.approx(5 / 6)
    assert found["diagnosis"]["confusion"]["well"] == {"none": 1, "well": 2}


def bound(formulas: dict[str, str], frames: dict[str, str]) -> Any:
    """Measures of the masks A (1) and B (2) of task 't'."""
    config = {"task": "", "frames": frames, "formulas": formulas, "report": ()}
    config |= {"diagnosis": {"column": "", "measures": (), "shrinkage": 0.8}}
    built = tasks.build({"t": {"type": "segmentation"}}, {"A": 1, "B": 2})
    return measures.build(config, {"group": "patient", "id": "id"}, built)


def mask_of(a: int, b: int) -> np.ndarray:
    mask = np.zeros((8, 8, 8), np.uint8)
    mask.reshape(-1)[: a + b] = np.repeat([1, 2], [a, b])
    return mask


def test_a_missed_structure_is_no_better_than_any_that_was_found(tmp_path: Path, capsys: Any) -> None:
    """Of equal volumes the logarithm of the ratio is near 0; without one of them there is none."""
    cases = [a_case(f"p{i}", f"p{i}") for i in range(5)]
    volumes = {"p0": 60, "p1": 80, "p2": 102, "p3": 125, "p4": 165}
    measured = bound({"ratio": "log(volume(A) / volume(B))"}, {})
    gauge = measures.Gauge(measured, cases)
    for name, a in volumes.items():
        gauge.reference("t", name, mask_of(a, 100), (1, 1, 1))
        gauge.predicted("t", name, mask_of(0 if name == "p2" else a, 100), (1, 1, 1))
    summary = gauge.finish(tmp_path, "test", pictures=False)
    rows = {r["patient"]: r for r in rows_of(tmp_path / "measures.csv")}
    assert rows["p2"]["predicted"] == ""
    known = [math.log(a / 100) for a in volumes.values()]
    worst = max(abs(v - math.log(1.02)) for v in known)
    assert abs(float(rows["p2"]["difference"])) == pytest.approx(worst, rel=1e-4)
    assert summary["measures"]["ratio"]["mae"]["value"] == pytest.approx(worst / 5, rel=1e-4)
    assert summary["measures"]["ratio"]["undefined"] == 1
    measures.say_summary(summary, tmp_path)
    assert "1 of 5 undefined, counted as far off as any reference or 0" in capsys.readouterr().out


def test_one_voxel_of_a_structure_is_no_worse_than_none(tmp_path: Path, capsys: Any) -> None:
    """A ratio to one voxel is as far off as one likes; missing that voxel too must not improve the mean, nor worsen it.

    A difference of volumes is always defined: it counts as it is.
    """
    measured = bound({"ratio": "volume(A) / volume(B)", "change": "100 * (volume(A) - volume(B))"}, {})
    cases = [a_case(f"p{i}", f"p{i}") for i in range(2)]
    counted = {}
    for b in (0, 1, 90, 100, 110):
        gauge = measures.Gauge(measured, cases)
        for case in cases:
            gauge.reference("t", case.id, mask_of(100, 100), (1, 1, 1))
            gauge.predicted("t", case.id, mask_of(100, b if case.id == "p0" else 110), (1, 1, 1))
        of = gauge.finish(tmp_path, "test", pictures=False)["measures"]
        assert (of["ratio"]["undefined"], of["ratio"]["capped"]) == (int(b == 0), int(b == 1))
        assert of["change"]["mae"]["value"] == pytest.approx((10 * abs(100 - b) / 100 + 1) / 2)
        assert of["change"]["capped"] == 0
        (row,) = [r for r in rows_of(tmp_path / "measures.csv") if (r["patient"], r["measure"]) == ("p0", "ratio")]
        assert row["predicted"] == (f"{100 / b:.6g}" if b else "")
        counted[b] = float(row["difference"])
        assert of["ratio"]["bias"]["value"] == pytest.approx((counted[b] - 1 / 11) / 2, abs=1e-6)
        if b == 1:
            measures.say_summary({"measures": of}, tmp_path)
            assert "1 of 2 counted as no farther off than if undefined" in capsys.readouterr().out
    assert abs(counted[0]) == counted[1] == 1.0  # the reference's distance from 0
    assert counted[100] == 0
    assert counted[90] == pytest.approx(1 / 9, rel=1e-4)


def test_measures_that_masks_can_leave_undefined_are_known() -> None:
    texts = {
        "volume_ml": "volume(A)",
        "square": "(volume_ml - 2 * volume(B)) ** 2",
        "index": "volume_ml / bsa(attribute(Height), 70)",
        "largest": "max(area(A))",
        "ratio": "volume_ml / volume(B)",
        "doubled": "ratio * 2",
        "root": "sqrt(volume_ml - volume(B))",
        "inverse": "volume_ml ** -1",
        "wall": "mean(thickness(A, B))",
        "years": "log(attribute(Age))",
    }
    assert Formulas(texts, ("A", "B"), ()).partial == {"ratio", "doubled", "root", "inverse", "wall"}


def test_intervals_resample_patients_where_scans_are_their_own(tmp_path: Path) -> None:
    """Four patients of ten scans each, all of a patient equally wrong; without frames each scan is measured alone."""
    measured = replace(bound({"ml": "1000 * volume(A)"}, {}), column="group")
    cases = [a_case(f"p{i}_{k}", f"p{i}", group="xy"[i % 2]) for i in range(4) for k in range(10)]
    # By the volume: x up to 100, beyond it y. Patients 0 and 2 are called rightly (x), patient 3 too, 1 is not.
    rule = diagnosis.Diagnosis(("ml",), ("x", "y"), np.array([100.5]), np.ones(1), np.zeros(2), np.array([[-1.0], [1]]))
    gauge = measures.Gauge(measured, cases, rule)
    for case in cases:
        gauge.reference("t", case.id, mask_of(100, 0), (1, 1, 1))
        gauge.predicted("t", case.id, mask_of(100 + int(case.group == "p3") * 20, 0), (1, 1, 1))
    found = gauge.finish(tmp_path, "test", pictures=False)
    assert found["measures"]["ml"]["n"] == 40
    assert found["measures"]["ml"]["mae"]["value"] == pytest.approx(5.0)
    # Of 4 patients of whom one is 20 off: none is drawn in a third of the resamples, three or more in one of twenty.
    assert found["measures"]["ml"]["mae"]["ci95"] == pytest.approx([0.0, 15.0])
    assert found["diagnosis"]["accuracy"]["value"] == pytest.approx(0.75)
    assert found["diagnosis"]["accuracy"]["ci95"] == pytest.approx([0.25, 1.0])


def test_scans_of_a_patient_do_not_vouch_for_each_other(tmp_path: Path) -> None:
    for i in range(6):
        nib.save(nib.Nifti1Image(np.full((2, 2, 2), i, np.int16) + np.eye(2, dtype=np.int16), np.eye(4)),
                 tmp_path / f"{i}.nii.gz")  # fmt: skip
    cases = [Case(f"s{i}", f"p{i // 2}", {"MR": tmp_path / f"{i}.nii.gz"}) for i in range(6)]
    numbers = measures._twins(frames.patients_of(cases, {}))
    assert [numbers[i] == numbers[j] for i, j in ((0, 1), (2, 3), (4, 5))] == [True] * 3
    assert len(set(numbers)) == 3
    # An image that two patients share joins all their scans.
    twice = [*cases[:5], replace(cases[5], images=cases[0].images)]
    joined = measures._twins(frames.patients_of(twice, {}))
    assert joined[4] == joined[5] == joined[0] == joined[1] != joined[2] == joined[3]


def test_a_patients_column_may_stand_in_any_frames_row(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    ed, es = a_case("x", "p", phase="ED", Height="170"), a_case("y", "p", phase="ES", Height="")
    measured = bound(
        {"index": "volume(A, ED) / bsa(attribute(Height), 70)", "es": "volume(A, ES)"},
        {"ED": "phase=ED", "ES": "phase=ES"},
    )

    def gauged(cases: list[Case], seen: list[Case]) -> Any:
        gauge = measures.Gauge(measured, cases)
        for case in seen:
            gauge.predicted("t", case.id, mask_of(100, 1), (10, 10, 10))
        return gauge

    expected = 100 / math.sqrt(170 * 70 / 3600)
    for order in ([ed, es], [es, ed]):
        assert gauged(order, order).table()["p"]["index"] == pytest.approx(expected)
        # Whichever process has which frame.
        parts = [gauged(order, [case]) for case in order]
        held = [(gauge._found, gauge._seen) for gauge in parts]
        with monkeypatch.context() as patch:
            patch.setattr(measures.processes, "count", lambda: 2)
            patch.setattr(measures.processes, "gather", lambda name, value, held=held: held)
            parts[0].gather("val")
        assert parts[0].table()["p"]["index"] == pytest.approx(expected)
    other = a_case("y", "p", phase="ES", Height="165")
    capsys.readouterr()
    assert math.isnan(gauged([ed, other], [ed, other]).table()["p"]["index"])
    assert "column 'Height' is 170 (case x) and 165 (case y): measures that need it" in capsys.readouterr().err
    same = a_case("y", "p", phase="ES", Height="170.0")
    assert gauged([ed, same], [ed, same]).table()["p"]["index"] == pytest.approx(expected)


def test_what_several_processes_measured_is_put_together(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cases, _ = gauge_of(run)
    parts = [gauge_of(run)[0] for _ in range(2)]
    for number, case in enumerate(cases):  # frames of one patient fall to different processes
        mask = nifti.read_label(str(case.targets["heart"]))
        for gauge in (whole, parts[number % 2]):
            gauge.predicted("heart", case.id, mask.data, mask.spacing)
    assert parts[0].table() == {}
    held = [(gauge._found, gauge._seen) for gauge in parts]
    monkeypatch.setattr(measures.processes, "count", lambda: 2)
    monkeypatch.setattr(measures.processes, "gather", lambda name, value: held)
    parts[0].gather("val")
    assert parts[0].table() == whole.table()
    assert len(whole.table()) == 6


def half_ignored(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spacing: tuple[float, float, float],
    *,
    half: int = 255,
    tilt: float = 0.0,
) -> tuple[Any, Case]:
    """An untrained run that calls all voxels 'lesion', and a case in half of which the reference ignores them.

    Args:
      half: what the reference has there. tilt: of the gantry, degrees.
    """
    monkeypatch.setattr(
        predict.Predictor,
        "__call__",
        lambda self, params, image: {"t": np.stack([np.zeros(image.shape[:3]), np.ones(image.shape[:3])], -1)},
    )
    job = {"t": {"type": "segmentation", "levels": 1, "ignore": 255}}
    off = {"pictures": False, "predictions": False}
    run = predict.Run(make_run(tmp_path / "run", job, labels={"lesion": 1}, spacing=None, evaluation=off))
    run.plan = replace(run.plan, ignore=255)
    image = np.random.default_rng(0).normal(100, 30, (16, 16, 16)).astype(np.float32)
    label = np.ones((16, 16, 16), np.uint8)
    label[:8] = half
    affine = np.diag([*spacing, 1.0])
    affine[1, 2] = spacing[2] * math.tan(math.radians(tilt))
    for name, data in (("image", image), ("label", label)):
        nib.save(nib.Nifti1Image(data, affine), tmp_path / f"{name}.nii.gz")
    return run, Case("c0", "c0", {"MRI": tmp_path / "image.nii.gz"}, {"t": tmp_path / "label.nii.gz"})


def test_what_the_reference_ignores_is_measured_in_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, case = half_ignored(tmp_path, monkeypatch, (1.0, 1.0, 1.0))
    config = config_lib.defaults()
    config.measures.formulas = {"v": "volume(lesion)"}
    bound = measures.build(config.measures, config.data, run.tasks)
    found = evaluate.evaluate_split(run, "val", [case], tmp_path / "val", measures.Gauge(bound, [case]))
    assert found["measures"]["v"]["mae"]["value"] == 0
    assert [float(row["predicted"]) for row in rows_of(tmp_path / "val" / "measures.csv")] == [8 * 16 * 16 / 1000]
    gauge = measures.Gauge(bound, [case])
    gauge.predicted("t", "c0", np.ones((16, 16, 16), np.uint8), (1.0, 1.0, 1.0))  # without a reference all count
    assert gauge.table()["c0"]["v"] == 16**3 / 1000


def test_volumes_of_a_tilted_gantry_are_exact_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shearing changes no volume: a voxel of 1 x 1 x 5 mm holds 5 mm³ at any tilt, though its edges are 1, 1, 5.32."""
    run, case = half_ignored(tmp_path, monkeypatch, (1.0, 1.0, 5.0), half=0, tilt=20.0)
    whole, part = 16**3 * 5 / 1000, 16**3 * 5 / 2000
    about = inspect.examine(case, Cohort("x", tmp_path, ("MRI",), {"lesion": 1}, (case,)), picture=False)
    assert about.masks["t"].volumes == {1: pytest.approx(part)}
    config = config_lib.defaults()
    config.measures.formulas = {"v": "volume(lesion)"}
    bound = measures.build(config.measures, config.data, run.tasks)
    assert list(bound.of_case(case, "").values()) == [pytest.approx(part)]
    evaluate.evaluate_split(run, "val", [case], tmp_path / "val", measures.Gauge(bound, [case]))
    (row,) = rows_of(tmp_path / "val" / "cases.csv")
    volumes = {key: float(row[key]) for key in ("volume_ml", "reference_ml", "volume_error_ml")}
    assert volumes == pytest.approx(
        {"volume_ml": whole, "reference_ml": part, "volume_error_ml": whole - part}, rel=1e-5
    )
    (row,) = rows_of(tmp_path / "val" / "measures.csv")
    assert [float(row[key]) for key in ("predicted", "reference")] == pytest.approx([whole, part], rel=1e-5)
    gauge = measures.Gauge(bound, [case])
    evaluate.evaluate_split(run, "new", [replace(case, targets={})], tmp_path / "new", gauge)
    assert gauge.table()["c0"]["v"] == pytest.approx(whole)
    prepared = predict.read_case(case, run.plan)[0]
    scores = evaluate.quick_scores(run.predictor(), run.params, [prepared])
    assert scores["volume_error_ml"] == pytest.approx(whole - part)
    (tmp_path / "run" / "measures.json").write_text(json.dumps(bound.to_json()))
    given = [f"--run={tmp_path / 'run'}", f"--input={tmp_path / 'image.nii.gz'}", f"--output={tmp_path / 'out'}"]
    predict.main(given)
    (row,) = rows_of(tmp_path / "out" / "measures.csv")
    assert float(row["v"]) == pytest.approx(whole, rel=1e-5)


SLICES = {"v": "volume(lesion)", "largest": "max(area(lesion))"}


def test_a_case_without_slices_ends_no_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("medjax.errors._said", set())
    run, case = half_ignored(tmp_path, monkeypatch, (1.0, 1.0, 1.2))
    config = config_lib.defaults()
    config.measures.formulas = SLICES
    bound = measures.build(config.measures, config.data, run.tasks)
    found = evaluate.evaluate_split(run, "val", [case], tmp_path / "val", measures.Gauge(bound, [case]))
    assert (found["measures"]["v"]["n"], found["measures"]["largest"]["n"]) == (1, 0)
    note = capsys.readouterr().err
    assert note.count("no axis is clearly the one across the slices") == 1
    assert "area: case c0: " in note


def test_a_case_without_slices_is_told_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, case = half_ignored(tmp_path, monkeypatch, (1.0, 1.0, 1.2))
    config = config_lib.defaults()
    config.measures.formulas = SLICES
    for split in ("train", "test"):
        with pytest.raises(UserError, match="area: case c0: voxels of 1 x 1 x 1.2 mm: no axis.*leave the case out"):
            measures.check(config.measures, config.data, run.tasks, {split: [case]})
    with pytest.raises(UserError, match="case c0"):
        measures.check(config.measures, config.data, run.tasks, {"test": [replace(case, targets={})]})
    config.measures.formulas = {"v": "volume(lesion)"}
    measures.check(config.measures, config.data, run.tasks, {"train": [case]})


def test_a_run_keeps_its_rule_and_learns_one_for_other_measures(run: Path, tmp_path: Path) -> None:
    config = load(run.parent / "heart.py")
    cohort = dataset.open_cohort(config.data, config.tasks)
    built, splits = tasks.build(config.tasks, cohort.labels), dataset.open_splits(cohort, config.data, 0)
    (tmp_path / "measures.json").write_text((run / "measures.json").read_text().replace("cross_validation", "kept"))
    measures.of_splits(config, built, {"val": splits["val"]}, tmp_path, config.data)
    assert "kept" in (tmp_path / "measures.json").read_text()
    config = load(run.parent / "heart.py", "measures.diagnosis.shrinkage=0.5")
    with pytest.raises(UserError, match="no 'train' split to learn"):
        measures.of_splits(config, built, {"val": splits["val"]}, tmp_path, config.data)
    measures.of_splits(config, built, splits, tmp_path, config.data)
    assert "kept" not in (tmp_path / "measures.json").read_text()


EXCHANGED = "measures.frames={'ED':'{patient}_{ES:02}','ES':'{patient}_{ED:02}'}"


def learnt(folder: Path, recipe: Path, *overrides: str) -> bytes:
    """What a run of the recipe writes before it trains."""
    folder.mkdir(exist_ok=True)
    config = load(recipe, *overrides)
    cohort = dataset.open_cohort(config.data, config.tasks)
    train = dataset.open_splits(cohort, config.data, 0)["train"]
    measures.learn(config, tasks.build(config.tasks, cohort.labels), train, folder)
    return (folder / "measures.json").read_bytes()


def judge(folder: Path, recipe: Path, trained: Any, *overrides: str) -> Any:
    """The gauge with which the run in `folder` evaluates the validation patients, who have been measured by it."""
    config = load(recipe, *overrides)
    cohort = dataset.open_cohort(config.data, config.tasks)
    splits = dataset.open_splits(cohort, config.data, 0)
    gauge = measures.of_splits(config, tasks.build(config.tasks, cohort.labels), splits, folder, trained)(splits["val"])
    for case in splits["val"]:
        mask = nifti.read_label(str(case.targets["heart"]))
        gauge.predicted("heart", case.id, mask.data, mask.spacing)
    return gauge


@pytest.fixture
def heart(tmp_path: Path) -> Path:
    """The recipe of a cohort."""
    write_heart(tmp_path / "cohort")
    (tmp_path / "heart.py").write_text(RECIPE.format(cohort=str(tmp_path / "cohort"), total=1))
    return tmp_path / "heart.py"


@pytest.mark.parametrize("moved", [False, True])
def test_frames_that_were_corrected_reach_the_rule_and_new_patients(heart: Path, tmp_path: Path, moved: bool) -> None:
    right = json.loads(learnt(tmp_path / "right", heart))
    learnt(tmp_path / "run", heart, EXCHANGED)
    trained, place = load(heart, EXCHANGED).data, tmp_path / "cohort"
    if moved:
        place = place.rename(tmp_path / "elsewhere")
    gauge = judge(tmp_path / "run", heart, trained, f"data.cohort={place}")
    assert json.loads((tmp_path / "run" / "measures.json").read_text()) == right
    table, rows = gauge.table(), gauge.diagnoses()
    assert all(of["ef"] > 0 for of in table.values())
    assert [row["diagnosis"] for row in rows] == ["well", "sick"]
    # New patients, whose rows of a table say which frame is which: the same numbers.
    cases = [Case(f"p6_{n}", f"p6_{n}", {"MR": place / "images" / f"p6_f{n}.nii.gz"}) for n in ("01", "13")]
    new = measures.of_run(tmp_path / "run", tasks.build(load(heart).tasks, LABELS), cases, place / "patients.csv")
    for case in cases:
        mask = nifti.read_label(str(case.images["MR"]).replace("images", "labels"))
        new.predicted("heart", case.id, mask.data, mask.spacing)
    assert new.table()["p6"] == pytest.approx(table["p6"])


def test_another_cohort_teaches_a_run_nothing(heart: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    kept, trained = learnt(tmp_path / "run", heart), load(heart).data
    other = f"data.cohort={write_heart(tmp_path / 'other', seed=1)}"
    for override in ("measures.report=('ef',)", EXCHANGED):
        gauge = judge(tmp_path / "run", heart, trained, other, override)
        assert len(gauge.diagnoses()) == 2
        assert (tmp_path / "run" / "measures.json").read_bytes() == kept
        assert ("keeps the frames of the run's own cohort" in capsys.readouterr().out) == (override == EXCHANGED)
    with pytest.raises(UserError, match="is not the run's own cohort, so the diagnosis is not learnt from it"):
        judge(tmp_path / "run", heart, trained, other, "measures.diagnosis.shrinkage=0.5")
    # Without a diagnosis there is nothing to learn, and other formulas measure what they will.
    gauge = judge(tmp_path / "run", heart, trained, other, "measures.diagnosis.column=", "measures.formulas.ef=1 + 1")
    assert {of["ef"] for of in gauge.table().values()} == {2}
    assert gauge.diagnoses() == []
    assert (tmp_path / "run" / "measures.json").read_bytes() == kept
    # A run that measured nothing when it was trained learns from what is at hand, as before.
    (tmp_path / "run" / "measures.json").unlink()
    assert len(judge(tmp_path / "run", heart, trained, other).diagnoses()) == 2


def test_nothing_is_measured_where_nothing_is_declared(tmp_path: Path) -> None:
    config = config_lib.defaults()
    assert measures.build(config.measures, config.data, {}) is None
    gauge = measures.Gauge(None, [])
    gauge.predicted("heart", "x", np.zeros((2, 2, 2)), (1, 1, 1))
    assert gauge.finish(tmp_path, "") == {}
    assert gauge.write(tmp_path) == []
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------ the real hearts


@pytest.fixture(scope="module")
def hearts(data_root: Path) -> tuple[Any, Any, Any]:
    """(config, splits, measures) of the recipe."""
    config = load(REPO / "configs" / "cardiac.py", f"data.cohort={data_root / 'cardiac_acdc'}")
    cohort = dataset.open_cohort(config.data, config.tasks)
    splits = dataset.open_splits(cohort, config.data, config.seed, check_content=False)
    return config, splits, measures.build(config.measures, config.data, tasks.build(config.tasks, cohort.labels))


@pytest.mark.real
def test_hearts_measured_on_their_reference_masks(hearts: Any, tmp_path: Path) -> None:
    config, splits, bound = hearts
    measures.check(config.measures, config.data, {bound.task.name: bound.task}, splits)
    rule, about = measures.fit(bound, splits["train"])
    assert about["cross_validation"]["accuracy"] >= 0.75
    gauge = measures.Gauge(bound, splits["val"], rule, about)
    for case in splits["val"]:
        mask = nifti.read_label(str(case.targets["heart"]))
        gauge.reference("heart", case.id, mask.data, mask.spacing)
        gauge.predicted("heart", case.id, mask.data, mask.spacing)
    found = gauge.finish(tmp_path, "reference", pictures=False)
    assert found["measures"]["lv_ef_percent"]["mae"]["value"] == 0
    assert found["diagnosis"]["accuracy"]["value"] == found["diagnosis"]["on_reference_masks"] >= 0.75
    # ACDC's own definitions: every infarct and dilated heart ejects less than 45 %, every other one more than 50 %.
    table = gauge.table("reference")
    truth = {case.group: case.attributes["group"] for case in splits["val"]}
    for patient, values in table.items():
        assert (values["lv_ef_percent"] < 45) == (truth[patient] in ("MINF", "DCM"))
        assert 0 < values["lv_esv_ml"] < values["lv_edv_ml"]
    # Every slice of a reference has its ring: what counts is all there is.
    for case in splits["train"][:12]:
        mask = nifti.read_label(str(case.targets["heart"]))
        frame = "ED" if case.id.endswith("01") else "ES"
        found = measure(bound.formulas.calls, frame, bound.masks(mask.data), mask.spacing)
        whole = float((mask.data == 3).sum() * np.prod(mask.spacing) / 1000)
        assert found[Call("enclosed", ("LV", "myocardium"), frame)] == pytest.approx(whole)


@pytest.mark.real
def test_hearts_in_masks_that_are_somewhat_wrong(hearts: Any, tmp_path: Path) -> None:
    """Every structure's border moved at random by about a pixel: the rule holds."""
    from scipy import ndimage

    _, splits, bound = hearts
    rule, _ = measures.fit(bound, splits["train"])
    gauge = measures.Gauge(bound, splits["val"], rule)
    rng = np.random.default_rng(0)
    for case in splits["val"]:
        mask = nifti.read_label(str(case.targets["heart"]))
        shift = [ndimage.gaussian_filter(rng.normal(size=mask.data.shape), (8, 8, 1)) for _ in range(2)]
        shift = [1.0 * s / s.std() for s in shift]
        at = np.indices(mask.data.shape).astype(np.float32)
        at[0] += shift[0]
        at[1] += shift[1]
        wrong = ndimage.map_coordinates(mask.data, at, order=0)
        gauge.predicted("heart", case.id, wrong, mask.spacing)
        gauge.reference("heart", case.id, mask.data, mask.spacing)
    found = gauge.finish(tmp_path, "wrong", pictures=False)
    assert 0 < found["measures"]["lv_ef_percent"]["mae"]["value"] < 6
    assert found["diagnosis"]["accuracy"]["value"] >= 0.75


@pytest.mark.real
def test_frames_of_hearts_are_not_guessed(hearts: Any) -> None:
    config, splits, bound = hearts
    other = replace(bound, frames={"ED": "{patient}_frame{ED:02}", "ES": "{patient}_frame{ES:02}"})
    with pytest.raises(UserError, match="no column 'ED'"):
        measures.fit(other, splits["train"])
    assert config.data.table == "patients.csv"
