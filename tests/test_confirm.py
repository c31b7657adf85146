"""Masks confirmed by findings: which parts stay, on any grid, and the same in every program."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from untrained import labels_of, make_run, run_predict

from medjax import config as config_lib
from medjax import evaluate, predict
from medjax.data.cohort import Case
from medjax.data.preprocess import prepare_case
from medjax.errors import UserError
from medjax.tasks import confirm
from medjax.tasks.common import Found
from medjax.tasks.detection import Detection
from medjax.tasks.segmentation import Segmentation

S = (20, 18, 16)
BALLS = (((5, 5, 5), 3.0), ((14, 12, 10), 3.5))


def ball(centre, radius) -> np.ndarray:
    grid = np.meshgrid(*(np.arange(n) for n in S), indexing="ij")
    return sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) <= radius**2


def at(centre, *, size: float = 4.0, score: float = 0.9) -> Found:
    return Found("nodule", score, tuple(centre), (size,) * 3, {})


class Says:
    """A task of findings that says the same of every case, in world mm."""

    kind = "findings"

    def __init__(self, *found: Found) -> None:
        self.found = list(found)

    def decode(self, outputs, geometry=None):
        return self.found


def two_balls() -> tuple[np.ndarray, list[np.ndarray]]:
    """Probabilities of background and lesion, and the two lesions."""
    balls = [ball(*one) for one in BALLS]
    lesion = np.where(balls[0] | balls[1], 0.8, 0.1).astype(np.float32)
    return np.stack([1 - lesion, lesion], -1), balls


def test_what_no_finding_hits_is_background():
    probabilities, (first, second) = two_balls()
    probabilities.setflags(write=False)
    tasks = {
        "outline": Segmentation("outline", {"lesion": 1}),
        "nodules": Says(at((5, 5, 6)), at((14, 12, 10), score=0.29)),
    }
    rules = confirm.rules({"outline": {"by": "nodules", "score": 0.3}}, tasks)
    given = {"outline": probabilities, "nodules": np.zeros((*S, 7))}
    out = confirm.confirmed(rules, tasks, given)
    assert (tasks["outline"].decode(out["outline"]) == first).all()
    assert (out["outline"][second] == (1, 0)).all()
    assert (out["outline"][~second] == probabilities[~second]).all()  # nothing else is touched, to the bit
    assert out["nodules"] is given["nodules"]
    lower = confirm.rules({"outline": {"by": "nodules", "score": 0.29}}, tasks)
    assert confirm.confirmed(lower, tasks, given)["outline"] is probabilities
    assert confirm.confirmed({}, tasks, given) == given


def test_regions_lose_all_channels():
    _, (first, second) = two_balls()
    whole = np.where(first | second, 0.9, 0.2)
    core = np.where(second & ball((14, 12, 10), 2), 0.7, 0.1)
    task = Segmentation("outline", {"rim": 1, "core": 2}, {"whole": ("rim", "core"), "core": ("core",)})
    tasks = {"outline": task, "nodules": Says(at((5, 5, 5)))}
    rules = confirm.rules({"outline": {"by": "nodules"}}, tasks)
    out = confirm.confirmed(rules, tasks, {"outline": np.stack([whole, core], -1), "nodules": None})["outline"]
    assert (out[second] == 0).all()
    decoded = task.decode(out)
    assert (decoded[..., 0] == first).all()
    assert not decoded[..., 1].any()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    angle=st.floats(0, 6.2),
    steps=st.tuples(*(st.floats(0.5, 3.0),) * 3),
    count=st.integers(0, 6),
)
def test_parts_that_stay_are_those_within_a_findings_radius(seed, angle, steps, count):
    rng = np.random.default_rng(seed)
    shape = (12, 11, 10)
    mask = ndimage.gaussian_filter(rng.standard_normal(shape), 1.2) > 0.12
    affine = np.eye(4)
    c, s = math.cos(angle), math.sin(angle)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.diag(np.multiply(steps, (-1, 1, 1)))
    affine[:3, 3] = rng.uniform(-50, 50, 3)
    voxels = rng.uniform(-3, 14, (count, 3))
    found = [at(affine[:3, :3] @ v + affine[:3, 3], size=float(rng.uniform(0, 14))) for v in voxels]
    drop = confirm.unconfirmed(mask.astype(np.uint8), found, affine)
    # Every voxel's distance in world millimetres.
    world = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) @ affine[:3, :3].T + affine[:3, 3]
    parts, n = ndimage.label(mask, np.ones((3, 3, 3)))
    expected = np.zeros(shape, bool)
    for part in range(1, n + 1):
        own = world[parts == part]
        reach = [max(one.size[0] / 2, max(steps)) for one in found]
        near = [np.linalg.norm(own - one.center, axis=1).min() for one in found]
        expected[parts == part] = not any(d <= r for d, r in zip(near, reach, strict=True))
    np.testing.assert_array_equal(drop, expected)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"outlin": {"by": "nodules"}}, ["eval.confirm.outlin", "there are: outline"]),
        ({"nodules": {"by": "nodules"}}, ["eval.confirm.nodules", "masks"]),
        ({"outline": {"by": "outline"}}, ["eval.confirm.outline.by='outline'", "there are: nodules"]),
        ({"outline": {}}, ["eval.confirm.outline.by=''"]),
        ({"outline": 0.3}, ["eval.confirm.outline", "table"]),
        ({"outline": {"by": "nodules", "score": 30}}, ["eval.confirm.outline.score=30", "0 to 1"]),
        ({"outline": {"by": "nodules", "scores": 0.3}}, ["no option 'scores'", "by, score"]),
    ],
)
def test_a_wrong_rule_is_refused(table, words):
    tasks = {"outline": Segmentation("outline", {"lesion": 1}), "nodules": Says()}
    with pytest.raises(UserError) as caught:
        confirm.rules(table, tasks)
    for word in words:
        assert word in str(caught.value)


def test_a_score_below_what_is_reported_is_refused():
    """The findings that it asks for are never reported: it would act as the detector's `score_from`."""
    nodules = Detection("nodules", score_from=0.3)
    tasks = {"outline": Segmentation("outline", {"lesion": 1}), "nodules": nodules}
    with pytest.raises(UserError) as caught:
        confirm.rules({"outline": {"by": "nodules", "score": 0.2}}, tasks)
    for word in ("eval.confirm.outline.score=0.2", "below 0.3", "eval.tasks.nodules.score_from", " tasks.nodules.sc"):
        assert word in str(caught.value)
    assert confirm.rules({"outline": {"by": "nodules", "score": 0.3}}, tasks) == {"outline": ("nodules", 0.3)}
    lower = tasks | {"nodules": Detection("nodules", score_from=0.1)}
    assert confirm.rules({"outline": {"by": "nodules", "score": 0.2}}, lower)


def test_the_key_of_the_config():
    config = config_lib.defaults()
    assert dict(config.eval.confirm) == {}
    config_lib.merge(config, {"eval": {"confirm": {"outline": {"by": "nodules", "score": 0.3}}}})
    assert config.eval.confirm.outline.to_dict() == {"by": "nodules", "score": 0.3}


JOB = {"outline": {"type": "segmentation", "levels": 1}, "nodules": {"type": "detection", "names": ("nodule",)}}
RULE = {"outline": {"by": "nodules", "score": 0.3}}


def said(self, params, image) -> dict[str, np.ndarray]:
    """Two lesions, of which one is found: what a network might say on the prepared grid."""
    probabilities, _ = two_balls()
    heat = np.zeros((*S, 7), np.float32)
    heat[(*BALLS[0][0], 0)], heat[(*BALLS[1][0], 0)] = 0.9, 0.2
    heat[..., 4:] = 6.0  # mm
    return {"outline": probabilities, "nodules": heat}


def test_evaluation_and_prediction_confirm_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(predict.Predictor, "__call__", said)
    first, second = (ball(*one) for one in BALLS)
    scan = tmp_path / "in" / "scan.nii.gz"
    scan.parent.mkdir()
    affine = np.diag([-2.0, 2.0, 2.0, 1.0])  # from right to left: prepared the other way round
    image = np.random.default_rng(0).normal(100, 30, S).astype(np.float32)
    nib.save(nib.Nifti1Image(image, affine), scan)
    folder = make_run(tmp_path / "run", JOB, labels={"lesion": 1}, evaluation={"confirm": RULE})
    run_predict(folder, scan, tmp_path / "out")
    np.testing.assert_array_equal(labels_of(tmp_path / "out" / "scan.nii.gz")[::-1], first)

    # While training, the confirmed mask is what is scored.
    run = predict.Run(folder)
    prepared = prepare_case(Case("scan", "scan", {"MRI": scan}), run.plan)
    known = SimpleNamespace(
        image=prepared.image, geometry=prepared.geometry, targets={"outline": first.astype(np.uint8)}, values={}
    )
    assert evaluate.quick_scores(run.predictor(), run.params, [known])["outline/dice"] == 1.0
    # An empty table given at evaluation turns it off, another score rules.
    for table, mask in (({}, first | second), ({"outline": {"by": "nodules", "score": 0.1}}, first | second)):
        other = predict.Run(folder, eval_options={"confirm": table})
        outline = other.predictor().case(other.params, prepared)["outline"]
        np.testing.assert_array_equal(other.tasks["outline"].decode(outline) > 0, mask)
