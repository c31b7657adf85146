"""Comparing runs: grouping, means, intervals and tests against analytic answers; refusals that name the cure."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medjax import compare
from medjax.errors import UserError
from medjax.metrics import stats

CLASSES = ("shell", "core")
Score = Callable[[int, str], float]  # (case, class) -> Dice


def write_run(
    folder: Path,
    score: Score,
    *,
    cases: range = range(12),
    split: str = "test",
    auroc: float | None = None,
    patients: int = 99,
    **config: Any,
) -> Path:
    """A run folder as training and evaluation leave it, with Dice by `score`."""
    whole = {
        "name": "base",
        "seed": 0,
        "data": {"split": {"fold": 0}, "batch_size": 2},
        "optim": {"lr": 0.1},
        "mesh": {},
    }
    whole |= config
    place = folder / "eval" / split
    place.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(whole))
    (folder / "cost.json").write_text(json.dumps({"parameters": 1000, "bytes": 5e9, "flops": 7, "total": 8}))
    rows = [{"step": s, "train/loss": 1.0, "train/patches_per_s": 4.0} for s in (4, 8)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    table = [
        {"case": f"c{i}", "group": f"p{i % patients}", "task": "t", "class": k, "dice": score(i, k), "volume_ml": 1.0}
        for i in cases
        for k in CLASSES
    ]
    metrics: dict[str, Any] = stats.summarize(table, ("dice",), CLASSES)
    if auroc is not None:
        metrics["auroc"] = {"mean": auroc, "ci95": [auroc - 0.1, auroc + 0.1], "per_class": {}}
    with (place / "cases.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(
            {k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in table
        )
    (place / "summary.json").write_text(json.dumps({"metrics": metrics, "seconds": 3.0}))
    return folder


def write_tasks(folder: Path, kinds: dict[str, str], shift: float = 0.0, unscored: tuple[str, ...] = ()) -> Path:
    """A run of several tasks ('dice' or 'auroc'), as the evaluation writes it: one task's metrics go without its name.

    The Dice of task 'a' is about 0.3, of any other 0.6, and `shift` higher.
    """
    write_run(folder, noisy(0.5, 0), name=folder.name, tasks=list(kinds))
    place, table, metrics = folder / "eval" / "test", [], {}
    for task, kind in kinds.items():
        rows: list[dict[str, Any]] = [
            {"case": f"c{i}", "group": f"p{i}", "task": task, "class": k}
            | ({"dice": (0.3 if task == "a" else 0.6) + shift + 0.01 * i} if kind == "dice" else {"probability": 0.5})
            for i in range(10)
            for k in CLASSES
        ]
        table += rows
        if kind == "dice":
            found: dict[str, Any] = stats.summarize(rows, ("dice",), CLASSES)
        else:
            found = {"auroc": {"mean": 0.8 + shift, "ci95": [0.7, 0.9], "per_class": {}}}
        metrics |= {f"{task}/{k}" if len(kinds) > 1 else k: v for k, v in found.items()}
    with (place / "cases.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(k for row in table for k in row)))
        writer.writeheader()
        writer.writerows(table)
    (place / "summary.json").write_text(json.dumps({"metrics": metrics, "seconds": 3.0}))
    return folder


def noisy(mean: float, seed: int, spread: float = 0.05) -> Score:
    def score(case: int, name: str) -> float:
        rng = np.random.default_rng((seed, case, CLASSES.index(name)))
        return float(mean + spread * rng.standard_normal())

    return score


def compared(folders: list[Path], baseline: str = "base") -> dict[tuple[str, str, str], dict[str, Any]]:
    runs = [compare.read_run(f, "test") for f in folders]
    rows = compare.compare(compare.group([r for r in runs if isinstance(r, compare.Result)]), baseline)
    return {(r["experiment"], r["metric"], r["class"]): r for r in rows}


def test_one_run_says_what_its_evaluation_said(tmp_path: Path) -> None:
    def score(case: int, name: str) -> float:
        return math.nan if case == 3 and name == "core" else noisy(0.7, 1)(case, name)

    folder = write_run(tmp_path / "a", score, patients=7)
    found = compared([folder])
    said = json.loads((folder / "eval/test/summary.json").read_text())["metrics"]["dice"]
    assert found["base", "dice", ""]["mean"] == pytest.approx(said["mean"], abs=1e-12)
    for name in CLASSES:
        assert found["base", "dice", name]["mean"] == pytest.approx(said["per_class"][name]["mean"], abs=1e-12)
    # Two bootstraps of the same distribution.
    row = found["base", "dice", ""]
    assert [row["low"], row["high"]] == pytest.approx(said["ci95"], abs=0.004)
    assert row["patients"] == 7


def test_runs_are_grouped_by_what_they_train(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"s{s}", noisy(0.7, s), seed=s) for s in range(3)]
    folders.append(write_run(tmp_path / "wide", noisy(0.7, 5), optim={"lr": 0.3}))
    folders.append(write_run(tmp_path / "other", noisy(0.7, 6), name="other", mesh={"data": 8}))
    runs = [compare.read_run(f, "test") for f in folders]
    experiments = compare.group([r for r in runs if isinstance(r, compare.Result)])
    assert [(e.name, e.seeds) for e in experiments] == [
        ("base", [0, 1, 2]), ("base (optim.lr=0.3)", [0]), ("other", [0]),
    ]  # fmt: skip
    assert experiments[0].cost("seconds") == 8 * 2 / 4.0
    assert experiments[0].cost("parameters") == 1000


def test_seeds_and_folds_are_averaged(tmp_path: Path) -> None:
    levels = {0: 0.5, 1: 0.7}
    folders = [
        write_run(
            tmp_path / f"{s}{f}", lambda case, name, s=s: levels[s] + 0.01 * case, seed=s,
            data={"split": {"fold": f}, "batch_size": 2}, cases=range(6 * f, 6 * f + 6),
        )
        for s in levels
        for f in (0, 1)
    ]  # fmt: skip
    row = compared(folders)["base", "dice", ""]
    assert row["mean"] == pytest.approx(0.6 + 0.01 * 5.5)
    assert (row["seeds"], row["patients"]) == (2, 12)
    # Student's interval of the seeds' means, a hundred times the standard error over patients.
    half = 12.7062 * 0.2 / 2
    assert row["mean"] - row["low"] == pytest.approx(half, rel=0.25)
    assert row["high"] - row["mean"] == pytest.approx(half, rel=0.25)


def test_interval_has_the_width_of_theory(tmp_path: Path) -> None:
    """One class' worth of spread over many patients: ±1.96 standard errors."""
    rng = np.random.default_rng(0)
    values = rng.normal(0.6, 0.1, 200)
    folder = write_run(tmp_path / "a", lambda case, name: float(values[case]), cases=range(200), patients=200)
    row = compared([folder])["base", "dice", ""]
    half = 1.96 * values.std() / math.sqrt(200)
    assert (row["high"] - row["low"]) / 2 == pytest.approx(half, rel=0.06)


def test_differences_are_paired(tmp_path: Path) -> None:
    """Cases differ far more than the two networks do; the constant gain is found all the same."""
    base = [write_run(tmp_path / f"b{s}", noisy(0.6, 1, 0.2), seed=s) for s in range(2)]
    better = [
        write_run(tmp_path / f"v{s}", lambda c, k: noisy(0.6, 1, 0.2)(c, k) + 0.01, seed=s, name="better")
        for s in range(2)
    ]
    same = [write_run(tmp_path / f"a{s}", noisy(0.6, 1, 0.2), seed=s, name="same") for s in range(2)]
    found = compared([*base, *better, *same])
    row = found["better", "dice", ""]
    assert row["difference"] == pytest.approx(0.01)
    assert row["difference_low"] == pytest.approx(0.01)
    assert row["difference_high"] == pytest.approx(0.01)
    assert row["high"] - row["low"] > 0.05
    assert row["p"] == pytest.approx(2 / 2**12)
    assert row["p_holm"] == pytest.approx(2 * row["p"])
    assert found["same", "dice", ""]["p_holm"] == 1.0
    assert "difference" not in found["base", "dice", ""]


def test_what_is_invented_is_tested(tmp_path: Path) -> None:
    """A lesion in every other patient; one experiment invents one in the others, of which the right answer is blank."""

    def right(case: int, name: str) -> float:
        return math.nan if case % 2 else noisy(0.8, 1, 0.01)(case, name)

    def inventive(case: int, name: str) -> float:
        return 0.0 if case % 2 and name == "core" else right(case, name)

    folders = [
        write_run(tmp_path / name, score, name=name, cases=range(40), optim={"lr": lr})
        for name, score, lr in (("base", right, 0.1), ("same", right, 0.2), ("new", inventive, 0.3))
    ]
    found = compared(folders)
    row = found["new", "dice", ""]
    assert row["difference"] == pytest.approx(-0.2, abs=0.01)  # of one of two classes, half of it
    assert row["difference_high"] < 0
    assert row["p"] < 1e-3
    assert (found["same", "dice", ""]["p"], found["same", "dice", ""]["difference"]) == (1.0, 0.0)
    # Who invents is the better side nowhere, whichever is the baseline.
    turned = compared(folders, "new")
    assert turned["base", "dice", ""]["p"] == row["p"]
    runs = [compare.read_run(f, "test") for f in folders]
    base, _, new = compare.group([r for r in runs if isinstance(r, compare.Result)])
    patients = [f"p{i}" for i in range(40)]
    for e, other, expected in ((new, base, -1.0), (base, new, 1.0)):
        values = compare.differences(e, other, "t", "dice", CLASSES, patients)
        assert values[1::2].tolist() == [expected] * 20
        assert not values[::2].any()
    # Blank on both sides is left out.
    assert np.isnan(compare.differences(base, base, "t", "dice", CLASSES, patients)[1::2]).all()


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    """Seeds differ far more than the networks; the gain is found all the same, where both have the same seeds."""

    def score(seed: int, gain: float) -> Score:
        return lambda case, name: 0.5 + 0.1 * seed + gain + noisy(0.0, seed + 10 * (gain > 0), 0.002)(case, name)

    base = [write_run(tmp_path / f"b{s}", score(s, 0.0), seed=s) for s in range(3)]
    better = [write_run(tmp_path / f"v{s}", score(s, 0.01), seed=s, name="better") for s in range(3)]
    fewer = [write_run(tmp_path / f"f{s}", score(s, 0.01), seed=s, name="fewer") for s in range(2)]
    found = compared([*base, *fewer, *better])
    row = found["better", "dice", ""]
    assert 0.005 < row["difference_low"] < 0.01 < row["difference_high"] < 0.015
    assert row["high"] - row["low"] > 0.2
    # Other seeds: nothing says which of them go together.
    row = found["fewer", "dice", ""]
    assert row["difference_high"] - row["difference_low"] > 0.2


@pytest.mark.parametrize("seeds", [2, 3, 10])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds: int) -> None:
    """Normal effects of patient, seed and both, of 3, 2 and 1.5 points, 20 patients; the truth is 0."""
    rng, patients, held = np.random.default_rng(seeds), 20, []
    for _ in range(500):
        values = sum(
            sd * rng.standard_normal(shape)
            for sd, shape in ((3, (patients, 1)), (2, (1, seeds)), (1.5, (patients, seeds)))
        )
        of = compare.Values(np.asarray(values)[..., None], np.ones((patients, seeds, 1)))
        drawn = rng.multinomial(patients, np.full(patients, 1 / patients), 400)
        low, high = compare._interval(of.resample(drawn, compare.seed_weights(seeds, 400, rng))[:, 0])
        held.append(low <= 0 <= high)
    assert np.mean(held) >= 0.92


def test_seeds_of_unlike_counts_keep_the_mean_in_place() -> None:
    """Nearly all cases in one seed, one class in none of another: nothing divides by a weight that may vanish."""
    counts = np.ones((4, 3, 2))
    counts[1:, 1:] = 0
    counts[:, 2, 1] = 0
    values = compare.Values(0.5 * counts, counts)
    drawn = np.random.default_rng(0).multinomial(4, np.full(4, 1 / 4), 200)
    found = values.resample(drawn, compare.seed_weights(3, 200, np.random.default_rng(1)))
    np.testing.assert_allclose(found, 0.5, atol=1e-12)


def test_holm_by_hand() -> None:
    assert compare.holm([0.01, 0.04, 0.03, math.nan])[:3] == pytest.approx([0.03, 0.06, 0.06])
    assert math.isnan(compare.holm([0.01, math.nan])[1])
    assert compare.holm([0.9, 0.8]) == [1.0, 1.0]


def test_metrics_of_the_whole_cohort(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"{s}", noisy(0.6, s), seed=s, auroc=a) for s, a in ((0, 0.8), (1, 0.9))]
    alone = write_run(tmp_path / "x", noisy(0.6, 9), name="alone", auroc=0.7)
    found = compared([*folders, alone])
    row = found["base", "auroc", ""]
    half = 12.7062 * 0.0707107 / math.sqrt(2)  # Student's t of one degree of freedom
    assert (row["mean"], row["low"], row["high"]) == pytest.approx((0.85, 0.85 - half, 0.85 + half), abs=1e-4)
    assert found["alone", "auroc", ""]["low"] == pytest.approx(0.6)
    assert "p" not in found["alone", "auroc", ""]


def test_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for s in range(2):
        write_run(tmp_path / "base" / f"seed{s}", noisy(0.6, s), seed=s)
        write_run(tmp_path / "wide" / f"seed{s}", noisy(0.7, s), seed=s, name="wide", optim={"lr": 0.3})
    half = write_run(tmp_path / "wide" / "seed2", noisy(0.7, 2), seed=2, name="wide", optim={"lr": 0.3})
    (half / "eval/test/summary.json").unlink()
    (tmp_path / "sweep.json").write_text(json.dumps({"variants": [{"name": "wide"}, {"name": "base"}]}))
    compare.main([str(tmp_path), "--baseline=base"])
    said = capsys.readouterr().out
    assert f"left out    {half}: logged to step 8, not evaluated" in said
    text = (tmp_path / "compare" / "summary.md").read_text()
    assert text.index("| wide | 2 | 0.") < text.index("| base | 2 | 0.")
    assert "- wide: optim.lr: 0.1 -> 0.3" in text
    assert "0:04" in text
    assert "no p here can be" not in text
    table = list(csv.DictReader((tmp_path / "compare" / "metrics.csv").open()))
    assert [(r["experiment"], r["class"]) for r in table] == [(e, k) for e in ("wide", "base") for k in ("", *CLASSES)]
    assert len(list(csv.DictReader((tmp_path / "compare" / "runs.csv").open()))) == 4
    assert (tmp_path / "compare" / "dice.png").stat().st_size > 10_000
    # Of the whole folder again: the report itself is no run.
    compare.main([str(tmp_path), "--baseline=seed0", "--to", str(tmp_path / "again")])


def test_too_few_patients_for_a_test_are_told(tmp_path: Path) -> None:
    for name in ("base", "x", "y"):
        model = {"name": name, "features": 4} | ({"window": 7} if name == "y" else {})
        write_run(tmp_path / name, noisy(0.6, 0), name=name, cases=range(5), model=model)
    compare.main([str(tmp_path)])
    text = (tmp_path / "compare" / "summary.md").read_text()
    assert "5 patients, 3 experiments: no p here can be below 0.12." in text  # 2 x 2 / 2^5
    assert "- y: model.name: base -> y\n" in text


def test_refusals(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", noisy(0.6, 0))
    b = write_run(tmp_path / "b", noisy(0.6, 0), name="b", cases=range(1, 13))
    c = write_run(tmp_path / "c", noisy(0.6, 0), name="c", split="val")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([tmp_path / "nowhere"], "no such folder"),
        ([tmp_path / "empty"], "holds no run"),
        ([a, b], "different cases: c0 only in base, seed 0; c12 only in b, seed 0"),
        ([a, c], "none of the runs was evaluated on a split that the others were too"),
        ([c, "--split=test"], "logged to step 8, evaluated on val"),
        ([a, "--baseline=z"], "no such experiment; there are: base"),
    ):
        with pytest.raises(UserError, match=message):
            compare.main([str(x) for x in arguments])
    write_run(tmp_path / "twice" / "a", noisy(0.6, 0))
    write_run(tmp_path / "twice" / "b", noisy(0.6, 0))
    with pytest.raises(UserError, match="the same run twice"):
        compare.main([str(tmp_path / "twice")])
    d = write_run(tmp_path / "d", noisy(0.6, 0), name="d")
    summary = json.loads((d / "eval/test/summary.json").read_text())
    summary["metrics"]["dice"]["per_class"].pop("core")
    (d / "eval/test/summary.json").write_text(json.dumps(summary))
    with pytest.raises(UserError, match="other classes"):
        compare.main([str(a), str(d)])


@pytest.mark.parametrize("patients", [3, 12])
def test_cases_under_other_patients_are_refused(tmp_path: Path, patients: int) -> None:
    """Fewer patients would be paired wrongly without a word; those that the baseline lacks would raise a KeyError."""
    a = write_run(tmp_path / "a", noisy(0.6, 0), patients=15 - patients)
    b = write_run(tmp_path / "b", noisy(0.7, 0), name="b", patients=patients)
    case = "c3 is of patient 'p3', and of 'p0'" if patients == 12 else "c3 is of patient 'p0', and of 'p3'"
    with pytest.raises(UserError, match=f"b: case {case} in .*a: .* with one data.group"):
        compare.main([str(a), str(b)])


def test_seeds_that_change_the_split_compare_seed_by_seed(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / f"{name}{s}", noisy(m, s), seed=s, name=name, cases=range(6 * s, 6 * s + 6))
        for name, m in (("base", 0.6), ("other", 0.7))
        for s in range(2)
    ]
    assert compared(folders)["other", "dice", ""]["patients"] == 12
    with pytest.raises(UserError, match="different cases"):
        compared(folders[:3])


@pytest.mark.parametrize("kind", ["auroc", "dice"])
def test_one_network_for_all_tasks_against_one_a_task(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is compared with the run of that task alone, whose metrics go without its name; never with another's."""
    write_tasks(tmp_path / "together", {"a": "dice", "b": kind})
    write_tasks(tmp_path / "only_a", {"a": "dice"}, 0.01)
    write_tasks(tmp_path / "only_b", {"b": kind}, 0.02)
    compare.main([*(str(tmp_path / n) for n in ("together", "only_a", "only_b")), f"--to={tmp_path}/compare"])
    table = list(csv.DictReader((tmp_path / "compare" / "metrics.csv").open()))
    found = {(r["task"], r["metric"], r["experiment"]): float(r["mean"]) for r in table if not r["class"]}
    b = (0.8, 0.82) if kind == "auroc" else (0.645, 0.665)
    assert found == pytest.approx(
        {
            ("a", "dice", "together"): 0.345,
            ("a", "dice", "only_a"): 0.355,
            ("b", kind, "together"): b[0],
            ("b", kind, "only_b"): b[1],
        }
    )
    differences = {r["experiment"]: float(r["difference"]) for r in table if r.get("difference") and not r["class"]}
    assert differences == pytest.approx({"only_a": 0.01} | ({"only_b": 0.02} if kind == "dice" else {}))
    text = (tmp_path / "compare" / "summary.md").read_text()
    assert all(f"\n| {name} | 1 | 8 |" in text.split("## Cost")[1] for name in ("together", "only_a", "only_b"))
    # From the side of one task the other is left out, which is said.
    capsys.readouterr()
    compare.main([*(str(tmp_path / n) for n in ("together", "only_a", "only_b")), "--baseline=only_a"])
    assert "left out    only_b: no metric in common with only_a" in capsys.readouterr().out
    with pytest.raises(UserError, match="no metric of a task in common"):
        compare.main([str(tmp_path / "only_a"), str(tmp_path / "only_b")])


def test_each_task_has_its_own_cases(tmp_path: Path) -> None:
    """Task b was scored on fewer cases than a: the runs of one task are compared all the same."""
    folders = [
        write_tasks(tmp_path / "together", {"a": "dice", "b": "dice"}),
        write_tasks(tmp_path / "only_a", {"a": "dice"}),
        write_tasks(tmp_path / "only_b", {"b": "dice"}),
    ]

    def without(folder: Path, task: str, case: str) -> None:
        file = folder / "eval/test/cases.csv"
        file.write_text("".join(x for x in file.open(newline="") if not (f",{task}," in x and x.startswith(case))))

    for folder in (folders[0], folders[2]):
        without(folder, "b", "c3")
    assert {key[0] for key in compared(folders, "together")} == {"together", "only_a", "only_b"}
    without(folders[1], "a", "c4")
    with pytest.raises(UserError, match="different cases: c4 only in together"):
        compared(folders, "together")
