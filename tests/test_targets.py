"""Targets that are no mask file, against analytic answers: places, volumes, and words for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from medjax.data.cases import Case, Cohort, Finding
from medjax.data.preprocess import Plan, fit, prepare_case
from medjax.data.targets import instances, learn
from medjax.errors import UserError
from medjax.evaluate import check_targets
from medjax.tasks.classification import Classification
from medjax.tasks.detection import Detection
from medjax.tasks.landmark import Landmark
from medjax.tasks.regression import Regression


@pytest.fixture
def image(tmp_path) -> Path:
    """30 x 20 x 10 voxels of 1 x 2 x 3 mm; x is stored towards the left, from 30 down to 1 mm."""
    affine = np.diag([-1.0, 2.0, 3.0, 1.0])
    affine[:3, 3] = 30, -20, -10
    file = tmp_path / "a.nii.gz"
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((30, 20, 10), np.float32), affine), file)
    return file


def case(image: Path, id: str = "a", **targets) -> Case:
    return Case(id, id, {"T1": image}, targets)


def fitted(*cases: Case, **spec) -> Plan:
    return fit(spec, Cohort("toy", Path("."), ("T1",), {}, cases), cases)


def test_values_of_every_kind(image):
    nodules = (Finding((10, 0, 0), (8, 8, 8), 1, {"z": 3.0}), Finding((11, 2, 1), label=2, attributes={"a": 0.5}))
    first = case(image, grade=2, age=40, survival=(1.5, float("nan")), nodules=nodules)
    second = case(image, "b", grade=0, age=40.5, nodules=())
    plan = fitted(first, second, spacing=(1, 1, 1))
    assert plan.kinds == {"grade": "class", "age": "number", "survival": "vector", "nodules": "findings"}
    assert plan.columns == {"nodules": ("a", "z")}
    assert Plan.from_json(json.loads(plan.to_json())) == plan

    prepared = prepare_case(first, plan)
    assert set(prepared.targets) == {"nodules"}
    values = prepared.values
    assert {k: (v.dtype.name, v.shape) for k, v in values.items()} == {
        "grade": ("int32", ()), "age": ("float32", ()), "survival": ("float32", (2,)), "nodules": ("float32", (2, 9)),
    }  # fmt: skip
    assert (values["grade"], values["age"]) == (2, 40)
    np.testing.assert_array_equal(values["survival"], np.float32([1.5, np.nan]))
    np.testing.assert_array_equal(
        values["nodules"][:, 3:], np.float32([[8, 8, 8, 1, np.nan, 3], [0, 0, 0, 2, 0.5, np.nan]])
    )
    world = nib.affines.apply_affine(prepared.geometry.affine, values["nodules"][:, :3])
    np.testing.assert_allclose(world, [(10, 0, 0), (11, 2, 1)], atol=1e-4)

    other = prepare_case(second, plan)
    assert other.values["nodules"].shape == (0, 9)  # looked, and found none
    assert not other.targets["nodules"].any()
    assert "survival" not in other.values
    assert prepare_case(first, plan, tasks=("age",)).values.keys() == {"age"}


def test_ellipsoids_have_their_volume_and_place(image):
    nodules = (Finding((15, 0, 5), (12, 16, 14)), Finding((15, 0, 5), (6, 6, 6)), Finding((4, 12, 12)))
    prepared = prepare_case(case(image, n=nodules), fitted(case(image, n=nodules), spacing=(0.5, 0.5, 0.5)))
    mask = prepared.targets["n"]
    assert mask.dtype == np.uint16
    sizes = np.bincount(mask.ravel()) * 0.5**3
    assert sizes[2] == pytest.approx(np.pi / 6 * 6**3, rel=0.1)
    assert sizes[1] + sizes[2] == pytest.approx(np.pi / 6 * 12 * 16 * 14, rel=0.01)
    assert sizes[3] == pytest.approx(np.pi / 6 * 2.0**3, rel=0.2)  # a point is a ball of four voxels across
    assert prepared.values["n"][2, 3:6].tolist() == [0, 0, 0]
    for number, nodule in enumerate(nodules, 1):
        middle = nib.affines.apply_affine(prepared.geometry.affine, np.argwhere(mask == number)).mean(0)
        np.testing.assert_allclose(middle, nodule.center, atol=0.3)


def test_boxes_lie_along_the_world_on_an_oblique_grid():
    turn = nib.eulerangles.euler2mat(z=0.5, y=0.3, x=-0.2)
    affine = nib.affines.from_matvec(turn, -turn @ (20, 20, 20))  # the world's origin is the middle voxel
    mask = instances(np.float32([[20, 20, 20, 30, 10, 6, 1]]), affine, (41, 41, 41), "a")
    world = nib.affines.apply_affine(affine, np.argwhere(mask))
    np.testing.assert_allclose(2 * np.abs(world).max(0), (30, 10, 6), atol=1.2)


def test_none_vanishes():
    rows = np.float32([[5, 5, 5, 2, 2, 2, 1], [5, 5, 5, 8, 8, 8, 1], [5, 5, 4, 2, 2, 2, 1], [2, 2, 2, 0, 0, 0, 1]])
    mask = instances(rows, np.eye(4), (10, 10, 10), "a")
    assert set(np.unique(mask)) == {0, 1, 2, 3, 4}
    assert (mask[5, 5, 6], mask[2, 2, 2]) == (1, 4)


def test_two_points_in_one_voxel_are_told(capsys):
    instances(np.float32([[1, 1, 1, 0, 0, 0, 1]] * 2), np.eye(4), (3, 3, 3), "twins")
    assert "case twins: 1 of 2 findings have no voxel" in capsys.readouterr().err


def test_points_that_are_near_each_other_are_told_apart(capsys):
    """A voxel in both balls is of the nearer point; in one voxel, too."""
    points = np.float32(
        [[6, 6, 6, 0, 0, 0, 1], [6.4, 6, 6, 0, 0, 0, 2], [6, 8.5, 6, 0, 0, 0, 3], [0, 12, 0, 0, 0, 0, 4]]
    )
    mask = instances(points, np.diag([1.0, 1.0, 3.0, 1.0]), (13, 13, 13), "near")
    assert "near" not in capsys.readouterr().err
    place = np.argwhere(mask)
    distance = np.linalg.norm(place[:, None] - points[:, :3], axis=-1)
    np.testing.assert_array_equal(mask[mask > 0], distance.argmin(axis=1) + 1)
    assert (mask > 0).sum() == (
        np.linalg.norm(np.argwhere(mask >= 0)[:, None] - points[:, :3], axis=-1).min(1) <= 2
    ).sum()
    assert np.bincount(mask.ravel())[1:].min() >= 5


def test_a_point_lies_over_a_lesion_and_under_a_smaller_one():
    rows = np.float32([[6, 6, 6, 0, 0, 0, 1], [6, 6, 6, 10, 10, 10, 2], [7, 6, 6, 2, 2, 2, 3]])
    sizes = np.bincount(instances(rows, np.eye(4), (13, 13, 13), "a").ravel())
    assert (sizes[1], sizes[3]) == (33 - 7, 7)
    assert sizes[1:].sum() == (sum((g - 6) ** 2 for g in np.ogrid[:13, :13, :13]) <= 25).sum()


def test_a_finding_in_the_cropped_away_background(tmp_path, capsys):
    data = np.zeros((12, 12, 12), np.float32)
    data[4:8, 4:8, 4:8] = np.random.default_rng(0).random((4, 4, 4)) + 1
    nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / "a.nii.gz")
    outside = case(tmp_path / "a.nii.gz", "cropped", n=(Finding((1, 1, 1)), Finding((5, 5, 5))))
    prepared = prepare_case(outside, fitted(outside, crop="nonzero"))
    np.testing.assert_array_equal(prepared.values["n"][:, :3], [(-3, -3, -3), (1, 1, 1)])
    assert np.bincount(prepared.targets["n"].ravel()).tolist() == [34, 0, 30]
    assert "case cropped: 1 of 2 findings have no voxel" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("finding", "words"),
    [
        (Finding((-10, 0, -9)), "lies outside the volume. Its position in LPS would be inside"),
        (Finding((10, 300, 0)), r"\(10, 300, 0\) mm lies outside the volume.*RAS\+ .*neither LPS nor voxels"),
        (Finding((30.6, 0, 0)), "outside"),
        (Finding((10, np.nan, 0)), "three finite numbers"),
        (Finding((10, 0, 0), (1, 1, -1)), "negative size"),
        (Finding((10, 0, 0), (1, 1)), "three finite numbers"),  # type: ignore[arg-type]
    ],
)
def test_findings_that_cannot_be(image, finding, words):
    bad = case(image, "p07", nodules=(Finding((10, 0, 0)), finding))
    with pytest.raises(UserError, match=f"case p07: finding 2 of task 'nodules'.*{words}"):
        prepare_case(bad, fitted(bad))


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ({"age": float("nan")}, "'age' is nan, not a finite number"),
        ({"age": float("inf")}, "'age' is inf"),
        ({"age": 1e300}, r"'age' is 1e\+300"),
        ({"grade": 2**40}, "no class index"),
        ({"scores": (1.0, float("inf"))}, "'scores' must be a list of numbers"),
    ],
)
def test_numbers_that_cannot_be(image, targets, words):
    bad = case(image, "p07", **targets)
    with pytest.raises(UserError, match=f"case p07: .*{words}"):
        prepare_case(bad, fitted(bad))


@pytest.mark.parametrize(
    ("task", "value", "words"),
    [
        (Detection("t", ("a",)), (Finding((1.0, 2.0, 3.0), label=2),), "finding 1: label 2; the task has 1 to 1"),
        (Detection("t", ("a",), (("m", "binary"),)), (Finding((1.0, 2.0, 3.0), attributes={"m": 5.0}),),
         "case b, finding 1: attribute 'm' is 5; it takes 0 to 1"),
        (Detection("t", ("a",), (("m", "binary"),), columns=("k",)), (Finding((1.0, 2.0, 3.0)),), "columns=\\('k',\\)"),
        (Landmark("t", ("p", "q")), (Finding((1.0, 2.0, 3.0), label=0),), "b has a landmark 0; the task has 1 to 2"),
        (Landmark("t", ("p", "q")), (Finding((1.0, 2.0, 3.0), label=3),), "case b has a landmark 3"),
        (Landmark("t", ("p",)), (Finding((1.0, 2.0, 3.0)),) * 2, "case b has the same landmark twice"),
        (Landmark("t", ("p",)), 1, "case b: the target of task 't' must be findings"),
        (Classification("t", ("no", "yes")), 2, "case b is of class 2; the task has 0 to 1 .*Correct"),
        (Classification("t", ("x", "y"), "multilabel"), (1.0, 0.0, 1.0), "case b has .*it takes 2 numbers"),
        (Classification("t", ("x", "y"), "multilabel"), (5.0, 0.0), "each 0, 1 or NaN"),
        (Regression("t", ("v", "w")), (1.0,), "case b has .*it takes 2 finite number"),
    ],
)  # fmt: skip
def test_what_is_evaluated_is_checked_before_it_is_predicted(task, value, words):
    """From the values in the cohort alone: no file is read, for there is none."""
    right = {"findings": (Finding((1.0, 2.0, 3.0)),), "class": 1, "number": 0.5, "vector": (1.0, 0.0)}
    kind = "vector" if task.width else task.targets[0]
    plan = SimpleNamespace(kinds={"t": kind}, columns={"t": ("m",) if getattr(task, "attributes", ()) else ()})
    good, bad = (Case(id, id, {}, {"t": v}) for id, v in (("a", right[kind]), ("b", value)))
    if "columns" not in words:
        check_targets({"t": task}, plan, [good, Case("c", "c", {}, {})])
    with pytest.raises(UserError, match=words):
        check_targets({"t": task}, plan, [bad])


def test_kinds_agree_over_a_cohort(image):
    with pytest.raises(
        UserError, match=r"case b: the target of task 'x' is a mask file, but that of case a is a whole"
    ):
        learn([case(image, x=1), case(image, "b", x=image)])
    with pytest.raises(UserError, match="case b: 3 numbers for task 'x', but case a has 2"):
        learn([case(image, x=(1.0, 2.0)), case(image, "b", x=(1.0, 2.0, 3.0))])
    assert learn([case(image, x=1), case(image, "b", x=1.5), case(image, "c", x=2)])[0] == {"x": "number"}
    plan = fitted(case(image, x=1))
    with pytest.raises(UserError, match=r"case b: the target of task 'x' is 1\.5, where the other cases have whole"):
        prepare_case(case(image, "b", x=1.5), plan)
    with pytest.raises(UserError, match="case b: the target of task 'x' must be findings"):
        prepare_case(case(image, "b", x=1), fitted(case(image, x=(Finding((10, 0, 0)),))))


def test_a_cohort_without_masks_or_targets(image):
    plan = fitted(case(image, grade=1), spacing="median")
    assert prepare_case(case(image, grade=1), plan).targets == {}
    assert prepare_case(case(image), plan).values == {}


def test_ignore_value_is_declared(image, tmp_path):
    labels = np.zeros((30, 20, 10), np.uint8)
    labels[3:6], labels[9] = 1, 9
    nib.save(nib.Nifti1Image(labels, nib.load(image).affine), tmp_path / "m.nii.gz")
    one = case(image, seg=tmp_path / "m.nii.gz")
    plan = fit({}, Cohort("toy", Path("."), ("T1",), {"organ": 1}, (one,), ignore=9), [one])
    assert np.unique(prepare_case(one, plan).targets["seg"]).tolist() == [0, 1, 9]
