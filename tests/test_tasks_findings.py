"""Detection and landmarks: places from masks, targets and decoding that agree, world millimetres, refusals."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.spatial.transform import Rotation

from medjax.augment import policy
from medjax.data.pipeline import Source
from medjax.data.sampler import Sampler, cut
from medjax.data.targets import instances
from medjax.errors import UserError
from medjax.ops import warp
from medjax.tasks import Known, findings
from medjax.tasks.common import Found
from medjax.tasks.detection import Detection
from medjax.tasks.findings import LABEL
from medjax.tasks.landmark import Landmark

S = (24, 20, 16)
SPACING = (1.0, 1.5, 2.0)


def ellipsoid(centre, size, shape=S, spacing=SPACING) -> np.ndarray:
    """Voxels of an ellipsoid; centre in voxels, size in mm."""
    grid = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    parts = zip(grid, centre, size, spacing, strict=True)
    return sum(((g - c) * s / (d / 2)) ** 2 for g, c, d, s in parts) <= 1


def oblique() -> SimpleNamespace:
    """A grid turned by 30 degrees about z, its first axis reversed."""
    a = math.radians(30)
    turn = np.array([[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-1.0, 1.5, 2.0])
    affine[:3, 3] = (40, -20, 7)
    return SimpleNamespace(affine=affine)


locate = jax.jit(findings.locate, static_argnums=1)


def test_places_and_sizes_come_from_the_mask():
    centres = np.array([[10.3, 9.8, 7.6], [18.0, 4.0, 5.0]])
    sizes = np.array([[10.0, 12.0, 14.0], [7.0, 7.0, 9.0]])
    mask = np.zeros((2, *S), np.uint16)
    for i, (c, d) in enumerate(zip(centres, sizes, strict=True)):
        mask[0][ellipsoid(c, d)] = i + 1
    mask[1][ellipsoid((0, 10, 8), (9, 9, 9))] = 2
    found = locate(mask, 3)
    assert found.state.tolist() == [[findings.WHOLE, findings.WHOLE, findings.ABSENT], [0, findings.CUT, 0]]
    np.testing.assert_allclose(found.centre[0, :2], centres, atol=0.25)
    np.testing.assert_allclose(found.size[0, :2] * np.array(SPACING), sizes, rtol=0.1)
    mirrored = locate(mask[:, ::-1], 3)
    np.testing.assert_allclose(mirrored.centre[0, :2, 0], S[0] - 1 - found.centre[0, :2, 0], rtol=1e-4)
    none = locate(mask, 0)
    assert none.centre.shape == (2, 0, 3)


def test_places_are_exact_on_every_device():
    """A product of matrices has 8 to 11 bits on an accelerator: no centre may be one of its."""
    program = str(jax.make_jaxpr(lambda mask: locate(mask, 2))(jnp.zeros((1, *S), jnp.int32)))
    assert "dot_general" not in program


def test_one_voxel_is_a_finding_of_one_voxel():
    mask = np.zeros((1, *S), np.uint16)
    mask[0, 3, 4, 5] = 1
    found = locate(mask, 1)
    assert found.centre[0, 0].tolist() == [3, 4, 5]
    assert found.size[0, 0].tolist() == [1, 1, 1]


def test_heat_maps_and_states():
    centre = jnp.array([[[5.0, 6.0, 7.0], [15.0, 6.0, 7.0]]])
    heat = findings.heat_maps(S, centre, jnp.full((1, 2, 3), 2.0), jnp.array([[0, -1]]), 2)
    assert heat.shape == (1, *S, 2)
    assert float(heat[0, 5, 6, 7, 0]) == 1
    assert float(heat[0, 7, 6, 7, 0]) == pytest.approx(math.exp(-0.5))
    assert float(heat[0, 15, 6, 7, 0]) < 1e-3  # it is of no map
    assert float(heat[..., 1].max()) == 0
    mask = np.zeros((1, *S), np.uint16)
    mask[0, 0], mask[0, 1] = 1, 2
    state = findings.state_of(jnp.asarray(mask), jnp.array([[2, 1]]))
    assert state[0, :3, 0, 0].tolist() == [2, 1, 0]


def test_peaks():
    rng = np.random.default_rng(0)
    heat = rng.random(S).astype(np.float32)
    padded = np.pad(heat, 1, constant_values=-1)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3, 3)).max((3, 4, 5))
    expected = {tuple(v) for v in np.argwhere((heat >= windows) & (heat >= 0.5))}
    found = findings.peaks(heat, 0.5)
    assert {tuple(v) for v in found} == expected
    assert (np.diff(heat[tuple(found.T)]) <= 0).all()
    np.testing.assert_array_equal(findings.peaks(heat, 0.5, limit=200), found[:200])  # more voxels than that
    assert len(findings.peaks(heat, 2.0)) == 0
    assert len(findings.peaks(np.ones((4, 4, 4)), 0.5)) == 64
    assert len(findings.peaks(np.ones((4, 4, 4)), 0.5, limit=10)) == 10


def test_a_large_peak_hides_no_small_one():
    """A finding whose slope alone has more voxels of a higher value than there may be peaks."""
    large = 0.9 - 0.01 * np.abs(np.arange(S[0]) - 6.0)[:, None, None] - 1e-4 * sum(np.ogrid[:1, : S[1], : S[2]])
    heat = np.where(np.arange(S[0])[:, None, None] < 18, large, 0.0).astype(np.float32)
    heat[21, 10, 8] = 0.6
    assert (heat > 0.6).sum() > 1000
    assert findings.peaks(heat, 0.5, limit=1000).tolist() == [[6, 0, 0], [21, 10, 8]]


TASK = Detection(
    "t",
    ("solid", "ground glass"),
    attributes=(("malignant", "binary"), ("spiculation", "number"), ("texture", 3)),
    columns=("malignant", "spiculation", "texture"),
    typical=8.0,
    moments=((0, 1), (3.0, 2.0), (0, 1)),
    giou=0.5,
)
TRUTH = np.array(  # centre, size, label, malignant, spiculation, texture
    [
        [6.3, 5.2, 4.1, 8.0, 9.0, 10.0, 1, 1, 4.0, 2],
        [16.4, 13.5, 9.7, 6.0, 7.0, 8.0, 1, 0, 1.5, 0],
        [15.0, 5.0, 10.0, 9.0, 8.0, 7.0, 2, np.nan, np.nan, 1],
    ]
)


def batch_of(rows: np.ndarray, columns: int = 10) -> dict[str, np.ndarray]:
    mask = np.zeros((1, *S), np.uint16)
    for i, row in enumerate(rows):
        mask[0][ellipsoid(row[:3], np.maximum(row[3:6], 0.1))] = i + 1
        mask[(0, *np.rint(row[:3]).astype(int))] = i + 1
    table = np.full((1, len(rows) + 1, columns), np.nan, np.float32)
    table[0, :-1] = rows[:, :columns]
    return {"t/target": mask, "t/table": table, "t/mask": np.ones(1, bool), "spacing": np.array([SPACING], np.float32)}


def best_outputs(task, batch, steps: int) -> np.ndarray:
    """Outputs that the loss is content with, found by descent on the outputs themselves; [X, Y, Z, K] probabilities."""
    start = jnp.zeros((1, *S, task.outputs)).at[..., : len(task.names)].set(-4.0)
    tx = optax.adam(optax.cosine_decay_schedule(0.5, steps))

    @jax.jit
    def descend(x):
        prepared = task.prepare(jax.random.key(0), batch)

        def step(carry, _):
            x, state = carry
            gradient = jax.grad(lambda x: task.loss([x], prepared).sum())(x)
            updates, state = tx.update(gradient, state)
            return (x + updates, state), None

        (x, _), _ = jax.lax.scan(step, (x, tx.init(x)), length=steps)
        return task.probabilities(x), task.loss([x], prepared)

    probabilities, loss = descend(start)
    assert np.isfinite(loss).all()
    return np.asarray(probabilities)[0]


def test_what_the_loss_asks_for_is_what_is_decoded():
    """The best outputs are read as the truth: place and size in world millimetres, class and attributes."""
    outputs = best_outputs(TASK, batch_of(TRUTH), 150)
    geometry = oblique()
    found = TASK.decode(outputs, geometry)
    assert len(found) == 3
    reference = TASK.reference(np.concatenate([TRUTH, np.full((1, 10), np.nan)]), geometry)
    assert reference.shape == (3, 10)
    # Sizes of the reference are along the world's axes already; turn the grid's as the decoder does.
    reference[:, 3:6] = findings.sizes_to_world(TRUTH[:, 3:6], geometry.affine)
    rows = TASK.score(found, reference, SPACING)
    assert [row["event"] for row in rows] == ["hit"] * 3
    for row in rows:
        assert row["score"] > 0.9
        assert row["error_mm"] < 0.7
        assert row["size_mm"] == pytest.approx(row["reference_size_mm"], rel=0.12)
    first, second, other = rows
    assert (first["malignant"] > 0.9, second["malignant"] < 0.1) == (True, True)
    assert first["spiculation"] == pytest.approx(4.0, abs=0.2)
    assert second["spiculation"] == pytest.approx(1.5, abs=0.2)
    assert (first["texture"], second["texture"], other["texture"]) == pytest.approx((2, 0, 1), abs=0.15)
    assert math.isnan(other["malignant_reference"])
    summary = TASK.summarize([{**row, "case": 0} for row in rows])
    assert summary["cpm"]["mean"] == 1
    assert summary["malignant_auroc"]["per_class"]["solid"]["mean"] == 1
    assert TASK.selection(summary) == 1
    table = TASK.table(found)
    assert table[0].keys() >= {"class", "score", "x_mm", "size_z_mm", "malignant", "texture"}
    place = geometry.affine @ [*TRUTH[0, :3], 1]
    assert any(np.linalg.norm(np.subtract(one.center, place[:3])) < 0.7 for one in found)


def test_sizes_on_a_turned_grid():
    affine = oblique().affine
    ball = findings.sizes_to_world(np.array([[6.0, 6.0, 6.0]]), affine)
    np.testing.assert_allclose(ball, 6)
    rod = findings.sizes_to_world(np.array([[10.0, 0.0, 2.0]]), affine)
    np.testing.assert_allclose(rod, [[10 * math.cos(math.pi / 6), 5.0, 2.0]])


def found(label, score, x, size=6.0, malignant=0.5) -> Found:
    return Found(label, score, (x, 0.0, 0.0), (size,) * 3, {"malignant": malignant})


SIMPLE = Detection("t", ("a", "b"), attributes=(("malignant", "binary"),))


def test_scores_of_a_cohort():
    lesion = [0, 0, 0, 6, 6, 6, 1, 1]
    cases = {
        "one": ([found("a", 0.9, 1.0), found("a", 0.8, 2.0), found("a", 0.4, 50.0)], [lesion]),
        "two": ([found("a", 0.6, 30.0)], [lesion]),
        "three": ([], []),
        "four": ([found("b", 0.7, 0.0)], [[*lesion[:6], 2, 0]]),
    }
    rows = []
    for case, (prediction, reference) in cases.items():
        table = np.array(reference, float).reshape(-1, 8)
        rows += [{**row, "case": case, "group": case} for row in SIMPLE.score(prediction, table, (1, 1, 1))]
    events = {(row["case"], row["class"]): [] for row in rows}
    for row in rows:
        events[row["case"], row["class"]].append(row["event"])
    assert events["one", "a"] == ["hit", "false"]  # the second finding of the lesion counts neither way
    assert events["two", "a"] == ["missed", "false"]
    assert events["three", "a"] == events["three", "b"] == ["none"]
    summary = SIMPLE.summarize(rows)
    a = {k: v["per_class"]["a"]["mean"] for k, v in summary.items()}
    # Two lesions, four scans: one found at 0.9 before any false one; false ones at 0.6 and 0.4.
    assert a["cpm"] == a["sensitivity_at_1"] == 0.5
    assert a["error_mm"] == 1
    assert a["average_precision"] == 0.5
    # Of the two lesions of a one was found, and of b the one there is.
    for metric in ("error_mm", "size_mae_mm", "malignant_auroc"):
        counts = {k: (v["n"], v["of"]) for k, v in summary[metric]["per_class"].items()}
        assert counts == {"a": (1, 2), "b": (1, 1)}
    assert "of" not in summary["cpm"]["per_class"]["a"]
    unrated = [{**row, "malignant_reference": math.nan} for row in rows]
    assert SIMPLE.summarize(unrated, resamples=0)["malignant_auroc"]["per_class"]["a"] == {
        "mean": None, "ci95": [None, None], "n": 0, "of": 0,
    }  # fmt: skip
    assert summary["cpm"]["per_class"]["b"]["mean"] == 1
    assert summary["cpm"]["mean"] == 0.75
    nothing = SIMPLE.summarize([r for r in rows if r["event"] in ("none", "missed")])
    assert nothing["cpm"]["per_class"]["a"]["mean"] == 0
    assert nothing["cpm"]["per_class"]["b"]["mean"] is None
    assert SIMPLE.selection(SIMPLE.summarize([])) == 0


def test_overlapping_findings_are_one():
    heat = np.zeros((*S, 8), np.float32)
    heat[..., 5:8] = 6.0
    heat[10, 10, 8, 0], heat[12, 10, 8, 0], heat[3, 3, 3, 0] = 0.9, 0.8, 0.7
    task = Detection("t", ("a", "b"))
    assert [round(one.score, 2) for one in task.decode(heat)] == [0.9, 0.7]
    assert len(dataclasses.replace(task, iou=0.9).decode(heat)) == 3
    assert len(dataclasses.replace(task, score_from=0.75).decode(heat)) == 1
    assert len(dataclasses.replace(task, limit=1).decode(heat)) == 1


def known(*tables, columns=("malignant",)) -> list[Known]:
    return [
        Known(f"c{i}", np.asarray(t, np.float32).reshape(-1, 7 + len(columns)), S, columns)
        for i, t in enumerate(tables)
    ]


def test_findings_without_a_size_are_told(capsys, monkeypatch):
    monkeypatch.setattr("medjax.errors._said", set())
    SIMPLE.fit(known([[5, 5, 5, 0, 0, 0, 1, 0], [9, 9, 9, 9, 9, 9, 2, 1]]))
    assert "1 of 2 findings have no size" in capsys.readouterr().err
    point = np.array([[5.0, 5, 5, 0, 0, 0, 1, 0]])
    near = [Found(SIMPLE.names[0], 0.9, (5.0, 5.0, 5.5), (4.0, 4.0, 4.0), {"malignant": 0.5})]
    assert [row["event"] for row in SIMPLE.score(near, point, SPACING)][:2] == ["missed", "false"]


def test_a_class_absent_from_training_is_noted(capsys):
    """As is a landmark that no case has; what there is is learnt."""
    Detection("rare", ("a", "b", "c")).fit(known([[5, 5, 5, 4, 4, 4, 2, 0]]))
    assert "task 'rare': no training case has a, c; the network cannot learn it" in capsys.readouterr().err
    points = np.array([[1, 2, 3, 0, 0, 0, 1], [4, 4, 4, 0, 0, 0, 3]], float)
    dataclasses.replace(POINTS, name="few").fit([Known("c", points, S, ())])
    assert "task 'few': no training case has right; the network cannot learn it" in capsys.readouterr().err


def test_a_finding_that_reaches_beyond_the_volume_is_noted(capsys):
    """Its centre is inside; of a box that is too large (a radius taken for a diameter, cm) nothing else tells."""

    def note(row, geometry=None) -> str:
        task = Detection(f"edge{len(notes)}", ("a",))
        table = np.array([[12, 10, 8, 6, 6, 6, 1], row], np.float32)
        task.fit([Known("c1", table, S, (), geometry), Known("c2", table[:1], S, (), geometry)])
        notes.append(capsys.readouterr().err)
        return notes[-1]

    notes: list[str] = []
    assert note([1, 10, 8, 4, 4, 4, 1]) == ""  # half a voxel beyond the first plane's edge
    assert "1 of 3 findings reach more than a voxel beyond their volume (the first: case c1, finding 2)" in note(
        [1, 10, 8, 6, 4, 4, 1]
    )
    assert "finding 2" in note([12, 10, 14, 4, 4, 6, 1])
    coarse = SimpleNamespace(affine=np.diag([*SPACING, 1.0]))  # 2 mm along z: 6 mm are three voxels
    assert note([12, 10, 14, 4, 4, 6, 1], coarse) == ""
    assert "finding 2" in note([12, 10, 14, 4, 4, 12, 1], coarse)
    long = [2.5, 10, 8, 1, 9, 1, 1]  # along the world's y, half of it along the turned grid's x
    assert note(long) == ""
    assert note(long, oblique()) == ""
    assert "finding 2" in note([2.5, 10, 8, 1, 18, 1, 1], oblique())
    assert note([0, 0, 0, 0, 0, 0, 1]).count("reach") == 0  # a point


def test_a_finding_that_others_hide_is_noted(capsys):
    """As much of it as the instance mask does not show."""
    pairs = ([[12, 10, 8, 12, 12, 12, 1], [16, 10, 8, 12, 12, 12, 1]],
             [[12, 10, 8, 12, 9, 12, 1], [14, 10, 8, 6, 6, 6, 1]],
             [[12, 10, 8, 0, 0, 0, 1], [13, 10, 8, 0, 0, 0, 1]], [[12, 10, 8, 12, 12, 12, 1], [9, 10, 8, 0, 0, 0, 1]],
             [[5, 10, 8, 4, 4, 4, 1], [16, 10, 8, 4, 4, 4, 1]])  # fmt: skip
    affine = np.eye(4)
    for pair in pairs:
        rows = np.array(pair, np.float32)
        alone = [(instances(rows[i : i + 1], affine, S, "c") > 0).sum() for i in range(2)]
        together = np.bincount(instances(rows, affine, S, "c").ravel(), minlength=3)[1:]
        np.testing.assert_allclose(findings.hidden(rows, affine), 1 - together / np.array(alone), atol=0.13)
    tables = [np.array(pair, np.float32) for pair in (pairs[-1], pairs[0])]
    Detection("crowd", ("a",)).fit([Known(f"c{i}", t, S, ()) for i, t in enumerate(tables)])
    said = capsys.readouterr().err
    assert "task 'crowd': others hide more than a tenth of 1 of 4 findings (the first: case c1, finding 1)" in said
    Detection("apart", ("a",)).fit([Known("c0", tables[0], S, ())])
    assert "hide" not in capsys.readouterr().err
    near = np.array(pairs[2], np.float32)
    near[1, LABEL] = 2
    Landmark("near", ("p", "q")).fit([Known("c0", near, S, ())])
    assert "task 'near': others hide more than a tenth of 2 of 2 findings" in capsys.readouterr().err


def test_attributes_of_other_columns_are_not_read():
    """The columns of another run, or of the table before it gained an attribute: one would be read for another."""
    columns = ("calcification", "malignant")
    data = known([[5, 5, 5, 4, 4, 4, 1, 6, 0], [9, 9, 9, 9, 9, 9, 2, 5, 1]], columns=columns)
    other = dataclasses.replace(SIMPLE, columns=("malignant",))
    words = r"tasks\.\w+\.columns=\('malignant',\): the findings of case c0 have .*'calcification'.*Leave columns out"
    with pytest.raises(UserError, match=words):
        other.fit(data)
    with pytest.raises(UserError, match=words):
        other.check_target(data[0]._replace(shape=None))
    learnt = SIMPLE.fit(data)
    assert learnt["columns"] == columns
    again = dataclasses.replace(SIMPLE, **learnt)
    assert again.fit(data) == {}  # an unchanged run goes on
    assert again._column(data[0].value, "malignant").tolist() == [0, 1]
    assert dataclasses.replace(SIMPLE, attributes=(), columns=("malignant",)).fit(data)["typical"] > 0  # reads none


def test_detection_learns_and_refuses():
    rows = [[5, 5, 5, 4, 4, 4, 1, 0], [9, 9, 9, 9, 9, 9, 2, 1]]
    learnt = SIMPLE.fit(known(rows, []))
    assert learnt["columns"] == ("malignant",)
    assert learnt["typical"] == pytest.approx(6)
    rated = Detection("t", ("a", "b"), attributes=(("malignant", "number"),))
    assert rated.fit(known(rows))["moments"] == ((0.5, 0.5),)

    def with_(column, value):
        changed = [list(row) for row in rows]
        changed[1][column] = value
        return known(changed)

    for wrong, message in (
        (with_(0, 24.0), r"case c0, finding 2: its centre, voxel \(24.0, 9.0, 9.0\) of .* lies outside the volume"),
        (with_(2, math.nan), "must be finite"),
        (with_(4, -1.0), "not negative"),
        (with_(6, 3), r"label 3; the task has 1 to 2 \(a, b\)"),
        (with_(7, 2), "case c0, finding 2: attribute 'malignant' is 2; it takes 0 to 1"),
        (with_(7, math.inf), "case c0, finding 2: attribute 'malignant' is not finite"),
        (known(rows, columns=("texture",)), "no finding has an attribute 'malignant'; there are: texture"),
        (known([]), "no training case has a finding"),
        (known([[*row[:7], math.nan] for row in rows]), "unknown in every finding"),
    ):
        with pytest.raises(UserError, match=message):
            SIMPLE.fit(wrong)
    for options, message in (
        ({"names": ()}, "1 or more different names"),
        ({"attributes": ("malignant",)}, "must be a pair"),
        ({"attributes": (("malignant", 1),)}, "must be a pair"),
        ({"attributes": (("score", "number"),)}, "be none of"),
        ({"heat": "mse"}, "heat='mse'"),
        ({"box": "l2"}, "box='l2'"),
        ({"rule": "touch"}, "rule='touch'"),
        ({"rates": ()}, r"rates=\(\): needs rates of false positives a scan, numbers from 0 on"),
        ({"rates": (1.0, -1.0)}, "needs rates"),
        ({"rates": (math.nan,)}, "needs rates"),
        ({"rates": "1"}, "needs rates"),
        ({"offset": -1.0}, "offset=-1.0: needs a number from 0 on"),
        ({"size": -1.0}, "size=-1.0"),
        ({"giou": -1.0}, "giou=-1.0"),
        ({"attribute": -1.0}, "attribute=-1.0"),
        ({"spread": -0.1}, "spread=-0.1"),
        ({"limit": -1}, "limit=-1: needs a whole number from 1 on"),
        ({"limit": 2.5}, "limit=2.5"),
        ({"iou": 1.5}, "iou=1.5: needs a number from 0 to 1"),
        ({"rule": "iou", "match_iou": -0.1}, "match_iou=-0.1"),
        ({"score_from": 5}, "score_from=5: needs a number from 0 to 1"),
        ({"level": -1}, "level=-1"),
        ({"features": 0}, "features=0"),
        (
            {"attributes": (("m", "number"),), "moments": ((0.0, 0.0),)},
            "a standard deviation above 0 of each attribute",
        ),
        ({"moments": ((0.0, 1.0),)}, "of each attribute"),
        # What does nothing.
        ({"match_iou": 0.5}, "match_iou=0.5 does nothing here, for it acts where rule is 'iou' alone"),
        ({"attribute": 2.0}, "attribute=2.0 does nothing here"),
    ):
        with pytest.raises(UserError, match=message):
            Detection("t", **options)


# ---------------------------------------------------------------------------------------------------------- landmarks


def states_of(row, examples, patch, inside=False) -> tuple[list[int], np.ndarray, Source]:
    """States of the finding in patches of its case, 40 voxels of 1 mm an axis; where they begin; the source.

    inside: keeps the patches inside the volume.
    """
    rows, shape = np.array([row], np.float32), (40, 40, 40)
    case = SimpleNamespace(
        image=np.zeros((*shape, 1), np.float32),
        targets={"t": instances(rows, np.eye(4), shape, "c")},
        values={"t": rows},
        geometry=SimpleNamespace(spacing=(1.0, 1.0, 1.0), affine=np.eye(4)),
        present=(True,),
    )
    source, sampler = Source([case], ("t",)), Sampler(0, 1, 0.5)
    points, overhang = source.centres(0), 0 * source.overhang[0] if inside else source.overhang[0]
    starts = np.array([sampler.start(n, shape, patch, points, overhang) for n in range(examples)])
    masks = np.stack([cut(case.targets["t"], start, patch) for start in starts])
    return np.asarray(locate(masks, 1).state)[:, 0].tolist(), starts, source


@pytest.mark.parametrize("patch", [(16, 16, 16), (16, 16, 40)])
def test_what_touches_the_volumes_border_is_whole_in_some_patches(patch):
    assert set(states_of([20, 20, 1.4, 4, 4, 4, 1], 200, patch, inside=True)[0]) <= {findings.CUT, findings.ABSENT}
    state, starts, source = states_of([20, 20, 1.4, 4, 4, 4, 1], 200, patch)
    assert source.overhang[0].tolist() == [[0, 0], [0, 0], [3, 0]]
    assert state.count(findings.WHOLE) > 80  # of 100 that are centred on it
    assert (starts.min(axis=0) >= (0, 0, -3)).all()
    assert starts[:, 2].min() == -3
    assert (starts.max(axis=0) <= 40 - np.array(patch)).all()
    assert (states_of([20, 38.2, 20, 4, 4, 4, 1], 1, patch)[2].overhang[0] == [[0, 0], [0, 3], [0, 0]]).all()
    assert states_of([20, 20, 1.4, 0, 0, 0, 1], 200, patch)[0].count(findings.WHOLE) > 80  # a point's ball


def test_patches_of_other_cases_are_drawn_as_ever():
    _, starts, source = states_of([20, 20, 3.2, 4, 4, 4, 1], 50, (16, 16, 16))
    assert not source.overhang[0].any()
    sampler = Sampler(0, 1, 0.5)
    expected = [sampler.start(n, (40, 40, 40), (16, 16, 16), source.centres(0)) for n in range(50)]
    np.testing.assert_array_equal(starts, expected)
    assert (starts >= 0).all()


def test_a_cut_landmark_is_unknown():
    """What is left of its ball has another centre."""
    centres = [-1.0, 0.0, 1.0, 3.0, 8.0, -4.0]
    mask = np.zeros((6, *S), np.uint16)
    for i, z in enumerate(centres):
        mask[i][sum((g - c) ** 2 for g, c in zip(np.indices(S), (12, 10, z), strict=True)) <= 4] = 1
    table = np.tile(np.array([0, 0, 0, 0, 0, 0, 2], np.float32), (6, 1, 1))
    found = POINTS.prepare(jax.random.key(0), {"t/target": jnp.asarray(mask), "t/table": jnp.asarray(table)})
    assert found["t/state"].tolist() == [[-1, state, -1] for state in (-1, -1, -1, 1, 1, 0)]
    np.testing.assert_allclose(found["t/centre"][3:5, 1], [[12, 10, 3], [12, 10, 8]], atol=1e-5)


POINTS = Landmark("t", ("left", "right", "apex"), sigma=2.0, tolerance=2.0)


def test_landmarks_are_read_where_they_are():
    truth = np.array([[6, 5, 4, 0, 0, 0, 1], [16, 13, 9, 0, 0, 0, 2]], float)
    batch = batch_of(truth, 7)
    outputs = best_outputs(POINTS, batch, 120)
    assert outputs[..., 2].max() < 0.02  # unknown in this case: nothing has moved it
    geometry = SimpleNamespace(affine=np.diag([*SPACING, 1.0]))
    located = POINTS.decode(outputs, geometry)
    reference = POINTS.reference(truth, geometry)
    rows = POINTS.score(located, reference, SPACING)
    assert [row["class"] for row in rows] == ["left", "right"]
    for row in rows:
        assert row["error_mm"] < 0.3
        assert row["score"] > 0.8
    summary = POINTS.summarize([{**row, "case": 0} for row in rows])
    assert summary["found"]["mean"] == 1
    assert POINTS.selection(summary) > 0.85
    assert POINTS.table(located)[0].keys() == {"class", "score", "x_mm", "y_mm", "z_mm"}


def test_the_centroid_is_finer_than_the_grid():
    """A bump between voxels is read where it is."""
    centre = np.array([10.4, 8.7, 7.2])
    heat = np.asarray(findings.gaussian(S, jnp.asarray(centre[None]), 2.0 / jnp.array([SPACING])))[0]
    (one,) = Landmark("t", ("a",), sigma=2.0).decode(heat[..., None], SimpleNamespace(affine=np.diag([*SPACING, 1.0])))
    np.testing.assert_allclose(np.array(one.center) / SPACING, centre, atol=0.15)


def bump(centre: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    grid = np.meshgrid(*(np.arange(n) for n in S), indexing="ij")
    return np.exp(-0.5 * sum(((g - c) / s) ** 2 for g, c, s in zip(grid, centre, sigma, strict=True)))


def test_the_centre_is_not_drawn_to_the_grid():
    task, rng = Landmark("t", ("a",), sigma=4.0), np.random.default_rng(0)
    geometry = SimpleNamespace(affine=np.diag([*SPACING, 1.0]))
    error = []
    for _ in range(40):
        centre = rng.uniform((10.5, 9.5, 7.5), (11.5, 10.5, 8.5))
        (one,) = task.decode(bump(centre, 4.0 / np.array(SPACING))[..., None], geometry)
        error.append(np.array(one.center) / SPACING - centre)
    assert np.abs(error).max() < 0.07
    assert np.sqrt(np.mean(np.square(error))) < 0.025


def test_a_map_narrower_than_a_voxel_has_its_centre():
    heat = np.zeros((*S, 1))
    heat[5:7, 5:7, 5:7] = 0.8
    (one,) = Landmark("t", ("a",), sigma=0.45).decode(heat)
    assert np.isfinite(one.center).all()
    assert np.abs(np.array(one.center) - 5.5).max() <= 0.5


@pytest.mark.parametrize("labels", ["nearest", "linear"])
def test_a_landmark_survives_augmentation(labels):
    """Points of a case are in the patch however it is turned and stretched, and where they were moved to."""
    rng, n = np.random.default_rng(0), 64
    shape, middle = (24, 20, 16), np.array([11.5, 9.5, 7.5])
    rows = np.zeros((1, 7), np.float32)
    rows[0, :3], rows[0, LABEL] = (13.3, 8.6, 9.1), 1
    mask = instances(rows, np.diag([*SPACING, 1.0]), shape, "a")
    turn = Rotation.from_euler("xyz", rng.uniform(-0.5, 0.5, (n, 3))).as_matrix() * rng.uniform(0.7, 1.4, (n, 1, 1))
    shift = rng.uniform(-1, 1, (n, 3))
    pose = warp.Pose(jnp.ones(n, bool), jnp.asarray(turn, jnp.float32), jnp.asarray(shift, jnp.float32))
    batch = {"t/target": jnp.broadcast_to(mask, (n, *shape)), "t/table": jnp.broadcast_to(rows, (n, 1, 7))}

    @jax.jit
    def moved(batch):
        return POINTS.prepare(jax.random.key(0), {**batch, "t/target": warp.warp_mask(batch["t/target"], pose, labels)})

    found = moved(batch)
    assert found["t/state"].tolist() == [[1, -1, -1]] * n
    wanted = np.linalg.solve(turn, (rows[0, :3] - middle - shift)[..., None])[..., 0] + middle
    assert np.linalg.norm(found["t/centre"][:, 0] - wanted, axis=1).mean() < 0.35


def test_what_the_patch_cut_is_never_whole_again():
    """A finding cut by the patch and turned away from its border has another centre and size: neither is taught."""
    n = 32
    mask = np.zeros((n, 24, 24, 24), np.uint16)
    mask[:, :4, 8:16, 8:16] = 1  # half of it is outside
    mask[:, 10:16, 10:16, 10:16] = 2
    table = np.full((n, 2, 8), np.nan, np.float32)
    table[:, :, :7], table[:, 1, LABEL] = 1, 2
    batch = {"image": np.zeros((n, 24, 24, 24, 1), np.float32), "example": np.arange(n, dtype=np.uint32)}
    batch |= {"t/target": mask, "t/table": table}
    rules = {"transforms": (("scale", {"factor": (0.5, 0.8)}), ("noise", {}), ("rotate", {"degrees": 20.0}))}

    @jax.jit
    def states(batch):
        moved = policy.build(rules, ("t",), 0)(batch)
        prepared = [task.prepare(jax.random.key(0), moved)["t/state"] for task in (Detection("t", ("a", "b")), POINTS)]
        return *prepared, findings.locate(moved["t/target"], 2).state

    detection, landmark, unaware = states(batch)
    assert (unaware[:, 0] == findings.WHOLE).sum() > n // 2  # to the mask alone it looks whole
    assert detection.tolist() == [[findings.CUT, findings.WHOLE]] * n
    assert landmark.tolist() == [[-1, 1, -1]] * n


def test_a_missed_landmark_never_improves_the_mean():
    reference = np.array([[1, 2, 3, 0, 0, 0, 1], [5, 5, 5, 0, 0, 0, 3]], float)
    rows = POINTS.score([Found("left", 0.9, (1.0, 2.0, 4.0), (0.0,) * 3, {})], reference, SPACING)
    assert [(row["class"], row["error_mm"], row["found"]) for row in rows] == [("left", 1, 1), ("apex", 100, 0)]
    far = POINTS.score([Found("apex", 0.9, (5.0, 5.0, 300.0), (0.0,) * 3, {})], reference[1:], SPACING)
    assert [(row["error_mm"], row["found"], row["missed"]) for row in far] == [(100, 0, 0)]
    (lenient,) = dataclasses.replace(POINTS, penalty=1.0).score([], reference[1:], SPACING)
    assert (lenient["error_mm"], lenient["found"]) == (1, 0)  # what is missed is not found
    quiet = dataclasses.replace(POINTS, score_from=0.5)
    assert quiet.decode(np.full((*S, 3), 0.1, np.float32)) == []
    assert POINTS.selection(POINTS.summarize([])) == 0


def test_landmark_refuses():
    def table(*rows):
        return [Known("c", np.array(rows, float).reshape(-1, 7), S, ())]

    assert POINTS.fit(table([1, 2, 3, 0, 0, 0, 1], [1, 2, 3, 0, 0, 0, 2], [4, 4, 4, 0, 0, 0, 3])) == {}
    for wrong, message in (
        (table([1, 2, 3, 0, 0, 0, 4]), "case c has a landmark 4; the task has 1 to 3"),
        (table([1, 2, 3, 0, 0, 0, math.nan]), "case c has a landmark nan; the task has 1 to 3"),
        (table([1, 2, 3, 0, 0, 0, 1], [1, 2, 4, 0, 0, 0, 1]), "twice"),
        (table([1, 2, 30, 0, 0, 0, 1]), "outside its volume"),
        (table([1, 2, math.nan, 0, 0, 0, 1]), "outside its volume"),
        (table(), "no training case has a landmark"),
    ):
        with pytest.raises(UserError, match=message):
            POINTS.fit(wrong)
    for options, message in (
        ({"sigma": 0.0}, "sigma=0.0 must be above 0"),
        ({"mse": -1.0}, "mse=-1.0"),
        ({"score_from": 2.0}, "score_from=2.0: needs a number from 0 to 1"),
        ({"level": 0.5}, "level=0.5"),
    ):
        with pytest.raises(UserError, match=message):
            Landmark("t", ("a",), **options)
