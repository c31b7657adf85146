"""Which cases to label next: uncertainty against numbers worked out by hand, diversity against all choices."""

from __future__ import annotations

import csv
import itertools
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from test_sides import KnowsItsSide
from tiny import write_cohort, write_recipe
from untrained import make_run

from medjax import config as config_lib
from medjax import main, models, predict, select, tasks
from medjax.errors import UserError


def h(*p: float) -> float:
    return -sum(q * math.log(q) for q in p if q)


def test_entropy_of_the_mean_and_what_the_views_disagree_about() -> None:
    a, b = np.array([0.9, 0.1]), np.array([0.3, 0.7])
    found = select.uncertainty([a, b], independent=False)
    mean = h(0.6, 0.4) / math.log(2)
    own = (h(0.9, 0.1) + h(0.3, 0.7)) / 2 / math.log(2)
    assert found == pytest.approx({"entropy": mean, "disagreement": mean - own})
    assert select.uncertainty([a, a], independent=False)["disagreement"] == pytest.approx(0, abs=1e-12)
    # Yes-or-no answers: each has an entropy of its own.
    found = select.uncertainty([np.array([0.5, 1.0, 0.9])], independent=True)
    assert found["entropy"] == pytest.approx((math.log(2) + 0 + h(0.9, 0.1)) / 3 / math.log(2))


def test_certain_background_does_not_make_a_case_certain() -> None:
    volume = np.zeros((4, 4, 4, 3))
    volume[..., 0] = 1
    volume[0, 0, 0] = [0.2, 0.4, 0.4]
    volume[0, 0, 1] = [0.97, 0.02, 0.01]  # hardly foreground: not looked at
    want = h(0.2, 0.4, 0.4) / math.log(3)
    assert select.uncertainty([volume], False)["entropy"] == pytest.approx(want)
    empty = np.zeros((4, 4, 4, 2))
    empty[..., 0], empty[..., 1] = 0.99, 0.01
    assert select.uncertainty([empty], False)["entropy"] == pytest.approx(h(0.99, 0.01) / math.log(2))


def test_k_centre_is_within_twice_the_best_choice() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        points, centres = rng.normal(size=(9, 2)), rng.normal(size=(2, 2))
        picks = select.k_centre(points, centres, 3)
        numbers = [p.number for p in picks]
        assert len(set(numbers)) == 3

        def radius(chosen: tuple[int, ...], points: np.ndarray = points, centres: np.ndarray = centres) -> float:
            at = np.concatenate([centres, points[list(chosen)]])
            return np.linalg.norm(points[:, None] - at[None], axis=-1).min(axis=1).max()

        best = min(radius(c) for c in itertools.combinations(range(9), 3))
        assert radius(tuple(numbers)) <= 2 * best + 1e-9
        # The first is the farthest from the centres, and distances fall.
        away = np.linalg.norm(points[:, None] - centres[None], axis=-1).min(axis=1)
        assert numbers[0] == away.argmax()
        assert [p.distance for p in picks] == sorted((p.distance for p in picks), reverse=True)
    assert len(select.k_centre(points, centres, 50)) == 9
    assert select.k_centre(points, points[:0], 2, first=4)[0].number == 4


def test_twins_are_not_asked_for_twice() -> None:
    # Cases 0 and 1 are the most uncertain and look alike; case 2 is less uncertain and lies elsewhere.
    scores = np.array([0.9, 0.89, 0.5, 0.1])
    features = np.array([[5.0, 0], [5.0, 0.1], [-5.0, 0], [0, 0.1]])
    known = np.array([[0.0, 0.0]])
    assert [p.number for p in select.rank(scores, features, known, 2, 1)] == [0, 1, 2, 3]
    assert {p.number for p in select.rank(scores, features, known, 2, 2)[:2]} in ({0, 2}, {1, 2})
    ranked = select.rank(scores, features, known, 1, 0)
    assert [p.number for p in ranked[1:]] == [i for i in range(4) if i != ranked[0].number]
    assert ranked[0].distance == pytest.approx(5.0, abs=0.01)
    # Without a labelled case the most uncertain begins.
    assert select.rank(scores, features, known[:0], 2, 0)[0].number == 0


def test_features_that_tell_nothing_are_dropped() -> None:
    rng = np.random.default_rng(0)
    features = np.stack([np.full(20, 7.0) + 1e-6 * rng.normal(size=20), 100 * rng.normal(size=20), np.zeros(20)], 1)
    found = select.standardise(features)
    assert found.shape == (20, 1)
    np.testing.assert_allclose([found.mean(), found.std()], [0, 1], atol=1e-9)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that knew the labels of two of six training cases."""
    folder = tmp_path_factory.mktemp("select")
    recipe = write_recipe(folder / "tiny.py", write_cohort(folder / "cohort"))
    main.main([f"--config={recipe}", f"--workdir={folder / 'run'}", "--config.data.labelled=2",
               "--config.train.total=4 steps", "--config.eval.pictures=false", "--config.eval.predictions=false",
               "--config.eval.splits=('val',)"])  # fmt: skip
    return folder / "run"


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_cases_without_labels_are_ranked(run: Path, capsys: pytest.CaptureFixture) -> None:
    cohort = run.parent / "cohort"
    select.main([str(run), str(cohort), "--count=2"])
    rows = table(run / "select.csv")
    assert len(rows) == 4  # six training cases, two with labels; neither validation nor test
    assert {r["case"] for r in rows} < {f"case{i}" for i in range(6)}
    assert [r["rank"] for r in rows] == ["1", "2", "3", "4"]
    assert [r["label"] for r in rows] == ["yes", "yes", "", ""]
    assert all(0 < float(r["entropy"]) <= 1 for r in rows)
    # Trained with mirroring: the volume and its flip are two views.
    assert all(0 <= float(r["disagreement"]) < float(r["entropy"]) for r in rows)
    assert all(float(r["distance"]) > 0 for r in rows[:2])
    assert Path(rows[0]["image"]).exists()
    out = capsys.readouterr().out
    assert "2 of 4 cases chosen, 2 have labels" in out
    assert rows[0]["case"] in out
    # The same command gives the same table; by uncertainty alone it falls.
    first = (run / "select.csv").read_bytes()
    select.main([str(run), str(cohort), "--count=2"])
    assert (run / "select.csv").read_bytes() == first
    alone = run / "elsewhere" / "alone.csv"
    select.main([str(run), str(cohort), "--count=3", "--pool=1", "--by=disagreement", f"--output={alone}"])
    values = [float(r["disagreement"]) for r in table(alone)]
    assert values == sorted(values, reverse=True)


def judge_of(monkeypatch: pytest.MonkeyPatch, labels: dict[str, int], augment: Any, mirror: tuple[int, ...]) -> Any:
    regions = {"all": tuple(labels)[-2:], "left": (list(labels)[-2],), "right": (list(labels)[-1],)}
    config = config_lib.defaults()
    job = {"organ": {"type": "segmentation", "levels": 1},
           "parts": {"type": "segmentation", "levels": 1, "regions": regions}}  # fmt: skip
    config_lib.merge(config, {"tasks": job, "data": {"patch": (8, 8, 8)}, "augment": augment})
    options = {"model": models.options, "tasks": tasks.options}
    config = config_lib.resolve(config, (), lambda room, kind: options[room](kind))
    built = tasks.build(config.tasks, labels)
    model = KnowsItsSide()
    monkeypatch.setattr(select, "coarsest", lambda model, params, x: jnp.zeros((len(x), 1)))
    run = SimpleNamespace(config=config, tasks=built, params={}, model=model, folder=Path("run"),
                          plan=SimpleNamespace(modalities=("CT",), orientation="RAS"),
                          predictor=lambda shapes: predict.Predictor(config, model, built, shapes))  # fmt: skip
    return select.Judge(run, mirror, [(8, 8, 8)])


LUNGS = {"body": 1, "left lung": 2, "right lung": 3}


@pytest.mark.parametrize("augment", [{}, {"mirror": (0,), "swap": ((2, 3),)}])
def test_left_and_right_trade_places_in_a_flip(augment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = np.zeros((8, 8, 8, 1), np.float32)
    alone = judge_of(monkeypatch, LUNGS, augment, ()).uncertainty(volume)
    assert 0.1 < alone["entropy"] < 0.9
    # By their names where the run was never mirrored, or as they did in training: the views say the same.
    flipped = judge_of(monkeypatch, LUNGS, augment, (0, 1)).uncertainty(volume)
    assert flipped == pytest.approx(alone | {"disagreement": 0.0}, abs=1e-6)
    # A network that was mirrored and never told the sides apart would have said the same without that.
    told_nothing = judge_of(monkeypatch, LUNGS, {"mirror": (0,)}, (0,)).uncertainty(volume)
    assert told_nothing["disagreement"] > 0.2
    with pytest.raises(UserError, match=r"run: .*'left ventricle' of task 'organ' may have a side.*here with --mirror"):
        judge_of(monkeypatch, {"left ventricle": 1, "right ventricle": 2}, {}, (0,))


@pytest.mark.parametrize(
    ("sections", "axes"),
    [
        ({}, ()),
        ({"augment": {"mirror": (0, 2)}}, (0, 2)),
        ({"augment": {"mirror": (0, 2), "swap": ((1, 2),)}}, (0, 2)),
        ({"augment": {"policy": "nnunet"}}, (0, 1, 2)),
        ({"augment": {"transforms": (("noise", {}), ("mirror", {"axes": (1,)}))}}, (1,)),
        ({"augment": {"policy": "nnunet"}, "eval": {"mirror": (2,)}}, (2,)),
    ],
)
def test_the_views_are_those_of_prediction_or_training(sections: Any, axes: tuple[int, ...]) -> None:
    config = config_lib.defaults()
    config_lib.merge(config, sections)
    assert select.views(config) == axes


def test_a_run_that_is_mirrored_in_prediction_alone_has_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nib.save(nib.Nifti1Image(np.random.default_rng(0).normal(size=(16, 16, 16)), np.diag([2.0, 2, 2, 1])),
             tmp_path / "a.nii.gz")  # fmt: skip
    folder = make_run(tmp_path / "run", labels={"left lung": 1, "right lung": 2}, evaluation={"mirror": (0,)})
    flips: list[int] = []
    call = predict.Predictor.__call__

    def counted(self: predict.Predictor, params: Any, image: np.ndarray) -> dict[str, np.ndarray]:
        flips.append(len(self._window._flips))
        return call(self, params, image)

    monkeypatch.setattr(predict.Predictor, "__call__", counted)
    select.main([str(folder), str(tmp_path), "--by=disagreement", "--count=1"])
    assert float(table(folder / "select.csv")[0]["disagreement"]) > 0
    assert flips == [1, 1], "each view is predicted by itself"


def test_a_folder_of_volumes_will_do(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for file in sorted((run.parent / "cohort" / "imagesTr").iterdir())[:3]:
        shutil.copy(file, tmp_path)
    (tmp_path / "case0.nii.gz").rename(tmp_path / "banana.nii.gz")
    (tmp_path / "broken.nii.gz").write_bytes(b"nothing")
    with pytest.raises(UserError, match="1 case"):
        select.main([str(run), str(tmp_path), "--count=9", f"--output={tmp_path / 'out.csv'}"])
    rows = table(tmp_path / "out.csv")
    assert {r["case"] for r in rows} == {"banana", "case1", "case2"}
    out = capsys.readouterr().out
    assert "banana" in out
    assert re.search(rf"1  +0\.\d+  +0\.\d+ +-  {rows[0]['case']}", out)
    assert "inf" not in out
    assert all(r["label"] == "yes" for r in rows)
    # No case has labels: the first is near to none.
    assert rows[0]["distance"] == ""
    assert all(float(r["distance"]) > 0 for r in rows[1:])


def test_what_cannot_work_is_refused_in_words(run: Path, tmp_path: Path) -> None:
    cohort = str(run.parent / "cohort")
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.eye(4)), tmp_path / "a.nii.gz")
    for arguments, words in (
        ([str(run), cohort, "--count=0"], "--count=0"),
        ([str(run), cohort, "--pool=0.5"], "--pool=0.5"),
        ([str(run), cohort, "--by=disagreement", "--mirror"], "--mirror: names no axis, so there is one view"),
        ([str(make_run(tmp_path / "never")), cohort, "--by=disagreement"], "never: was trained without mirroring"),
        ([str(run), str(tmp_path / "none")], "none"),
        ([str(tmp_path), cohort], "holds no checkpoint"),
        ([str(make_run(tmp_path / "mae", {"mae": {"type": "masked"}})), cohort], "mae: no task says probabilities"),
    ):
        with pytest.raises(UserError, match=words):
            select.main(arguments)


def test_a_cohort_with_all_labels_has_nothing_to_choose(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run.parent / "cohort", tmp_path / "cohort")
    with pytest.raises(UserError, match="every case has labels"):
        select.main([str(run), str(tmp_path / "cohort")])
