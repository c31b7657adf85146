"""Tasks: one program trains them all, unlabelled examples move nothing, what a user reads is what was meant."""

from __future__ import annotations

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medjax import tasks
from medjax.errors import UserError
from medjax.models.heads import HeatHead, PooledHead
from medjax.tasks import Known
from medjax.tasks.classification import Classification
from medjax.tasks.regression import Regression
from medjax.tasks.segmentation import Segmentation

LABELS = {"oedema": 2, "core": 1, "enhancing": 4}
REGIONS = {"whole": ("oedema", "core", "enhancing"), "core": ("core", "enhancing"), "enhancing": ("enhancing",)}
CONFIG = {
    "labels": {"type": "segmentation", "levels": 2, "ignore": 255},
    "regions": {"type": "segmentation", "regions": REGIONS, "levels": 1, "ignore": 255, "boundary": 0.1},
    "other": {"type": "segmentation", "levels": 1, "voxelwise": "top_k", "overlap": "tversky", "unified": 0.5},
    "binary": {"type": "classification", "problem": "binary", "names": ("benign", "malignant"), "smoothing": 0.1},
    "grade": {"type": "classification", "problem": "ordinal", "names": ("I", "II", "III", "IV")},
    "disease": {"type": "classification", "names": ("a", "b", "c"), "gamma": 2.0, "hidden": 8, "pool": "both"},
    "signs": {"type": "classification", "problem": "multilabel", "names": ("x", "y"), "class_weights": (2.0, 3.0)},
    "age": {"type": "regression", "uncertainty": "gaussian", "centre": (60.0,), "scale": (10.0,)},
    "volumes": {"type": "regression", "names": ("lv", "rv"), "uncertainty": "quantiles"},
    "plain": {"type": "regression", "objective": "squared"},
    "nodules": {
        "type": "detection",
        "names": ("solid", "other"),
        "attributes": (("malignant", "binary"), ("texture", "number"), ("margin", 3)),
        "giou": 1.0,
    },
    "points": {"type": "landmark", "names": ("left", "right"), "level": 1},
}
S, B = (16, 16, 8), 3


class Heads(nn.Module):
    heads: dict

    def __call__(self, pyramid, train=False):
        return {name: head(pyramid, train=train) for name, head in self.heads.items()}


@pytest.fixture(scope="module")
def built():
    return tasks.build(CONFIG, LABELS)


@pytest.fixture(scope="module")
def pyramid():
    rng = np.random.default_rng(0)
    return [rng.normal(size=(B, *(n // f for n in S), 4 * f)).astype(np.float32) for f in (1, 2, 4)]


def batch_of() -> dict[str, np.ndarray]:
    """Targets as a pipeline gives them, with what is unknown among them."""
    rng = np.random.default_rng(1)
    values = rng.choice([0, 1, 2, 4, 255], (B, *S)).astype(np.uint8)
    instances = np.zeros((B, *S), np.uint16)
    instances[0, 3:8, 3:8, 2:6], instances[0, 10:14, 10:14, 3:6] = 1, 2
    instances[1, 0:3, 4:8, 2:5] = 1  # cut by the border
    table = np.full((B, 2, 10), np.nan, np.float32)
    table[0] = [[5, 5, 4, 5, 5, 4, 1, 1, 2.5, 0], [11, 11, 4, 4, 4, 3, 2, np.nan, np.nan, np.nan]]
    table[1, 0] = [1, 5, 3, 3, 4, 3, 1, 0, 1, 2]
    batch = {
        "spacing": np.array([[1, 1, 1], [0.7, 0.7, 2.5], [1, 1, 1]], np.float32),
        "labels/target": values,
        "regions/target": values,
        "other/target": np.where(values == 255, 0, values),
        "binary/target": np.array([0, 1, 1], np.int32),
        "grade/target": np.array([3, 0, 2], np.int32),
        "disease/target": np.array([2, 0, 1], np.int32),
        "signs/target": np.array([[0, 1], [np.nan, 1], [np.nan, np.nan]], np.float32),
        "age/target": np.array([71, 40, np.nan], np.float32),
        "volumes/target": np.array([[1, 2], [np.nan, 3], [np.nan, np.nan]], np.float32),
        "plain/target": np.array([1, 2, 3], np.int32),
        "nodules/target": instances,
        "nodules/table": table,
        "points/target": instances,
        "points/table": table[..., :7],
    }
    return batch | {f"{name}/mask": np.array([True, True, False]) for name in CONFIG}


@pytest.fixture(scope="module")
def program(built, pyramid):
    """(params, batch) -> losses by task, gradient of those that count, outputs, probabilities."""
    model = Heads({name: task.head() for name, task in built.items()})
    params = jax.jit(lambda: model.init(jax.random.key(0), pyramid, train=True))()

    @jax.jit
    def run(params, batch):
        for task in built.values():
            batch = task.prepare(jax.random.key(0), batch)

        def total(params):
            outputs = model.apply(params, pyramid, train=True)
            losses = {name: task.loss(outputs[name], batch) for name, task in built.items()}
            kept = {n: jnp.where(batch[f"{n}/mask"], v, 0.0) for n, v in losses.items()}
            return sum(v.sum() for v in kept.values()), (losses, outputs)

        (_, (losses, outputs)), gradient = jax.value_and_grad(total, has_aux=True)(params)
        chances = {name: task.probabilities(outputs[name][0]) for name, task in built.items()}
        return losses, gradient, outputs, chances

    return params, run


def test_all_tasks_train_in_one_step(built, program, pyramid):
    params, run = program
    losses, gradient, outputs, _ = run(params, batch_of())
    for name, task in built.items():
        assert losses[name].shape == (B,), name
        assert np.isfinite(losses[name]).all(), name
        first = outputs[name][0]
        assert first.shape == ((B, task.outputs) if task.kind == "case" else (B, *S, task.outputs)), name
        leaves = jax.tree.leaves(gradient["params"][f"heads_{name}"])
        assert all(np.isfinite(g).all() for g in leaves), name
        assert any((np.asarray(g) != 0).any() for g in leaves), name


@pytest.mark.parametrize("regions", [{}, {"both": ("a", "b"), "rare": ("b",)}])
def test_a_label_that_no_mask_holds_need_not_fit_in_their_type(regions):
    mask = jnp.asarray([0, 1, 1, 0], jnp.uint8).reshape(1, 4, 1, 1)
    task = Segmentation("s", {"a": 1, "b": 12175}, regions=regions, ignore=20000)
    found = task.prepare(jax.random.key(0), {"s/target": mask})["s/target"][0, :, 0, 0]
    expected = [[0, 0], [1, 0], [1, 0], [0, 0]] if regions else [0, 1, 1, 0]
    np.testing.assert_array_equal(found, expected)


def test_a_batch_without_labels_moves_nothing(program):
    params, run = program
    for values in (batch_of(), {k: np.zeros_like(v) for k, v in batch_of().items()}):
        blank = {**values, "spacing": np.ones((B, 3), np.float32)}
        blank |= {k: np.zeros_like(v) for k, v in blank.items() if k.endswith("/mask")}
        losses, gradient, _, _ = run(params, blank)
        assert all(np.isfinite(v).all() for v in losses.values())
        assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(gradient))


def test_unknown_entries_do_not_count(program):
    """Example 2 knows nothing of these tasks but its own mask: its loss is 0 whatever the network says."""
    params, run = program
    losses, *_ = run(params, batch_of())
    for name in ("signs", "age", "volumes"):
        assert losses[name][2] == 0, name


def test_ignored_voxels_do_not_count(program):
    params, run = program
    batch = batch_of()
    one, *_ = run(params, batch)
    blank = {**batch, "labels/target": np.full_like(batch["labels/target"], 255)}
    blank["regions/target"] = blank["labels/target"]
    none, gradient, _, _ = run(params, blank)
    for name in ("labels", "regions"):
        assert (np.asarray(one[name]) > 0.1).all()
        leaves = jax.tree.leaves(gradient["params"][f"heads_{name}"])
        assert all((np.asarray(g) == 0).all() for g in leaves), name
    assert (np.asarray(none["other"]) == np.asarray(one["other"])).all()


def test_outputs_become_probabilities(built, program):
    params, run = program
    _, _, outputs, chances = run(params, batch_of())
    for name, task in built.items():
        p = np.asarray(chances[name])
        assert p.shape[:-1] == outputs[name][0].shape[:-1]
        if isinstance(task, Classification):
            assert p.shape[-1] == len(task.names)
            assert ((p >= 0) & (p <= 1)).all()
            if task.problem != "multilabel":
                np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-5)
        decoded = task.decode(p[0])
        rows = task.table(decoded)
        assert all(isinstance(v, str | int | float) for row in rows for v in row.values()), name
        if task.kind == "case":
            assert rows


def test_options_are_the_fields(built):
    for kind in tasks.TASKS:
        found = tasks.options(kind)
        assert "weight" in found
        assert not {"name", "labels"} & set(found)
    assert {t.kind for t in built.values()} == {"dense", "findings", "case"}
    for task in built.values():
        names = {f.name for f in dataclasses.fields(task)}
        for method in ("head", "fit", "prepare", "loss", "probabilities", "decode", "reference", "score", "summarize"):
            assert callable(getattr(task, method))
            assert method not in names
        assert len(task.odd) == 3
    with pytest.raises(UserError, match="task type 'segment' is not known"):
        tasks.build({"a": {"type": "segment"}}, LABELS)


def test_heads():
    rng = np.random.default_rng(0)
    pyramid = [jnp.asarray(rng.normal(size=(2, 8 // f, 8 // f, 4, 3)), jnp.float32) for f in (1, 2)]
    head = PooledHead(2, levels=1, pool="both", start=(1.0, -1.0))
    variables = jax.jit(head.init)(jax.random.key(0), pyramid)
    (found,) = jax.jit(head.apply)(variables, pyramid)
    kernel, bias = variables["params"]["dense"]["kernel"], variables["params"]["bias"]
    coarse = np.asarray(pyramid[1])
    pooled = np.concatenate([coarse.mean((1, 2, 3)), coarse.max((1, 2, 3))], -1)
    np.testing.assert_allclose(found, pooled @ kernel + bias, rtol=1e-5, atol=1e-6)
    assert bias.tolist() == [1, -1]
    # Marks of great slope on one feature: what is pooled is the log of the share of voxels where it is above 0.1.
    counts = PooledHead(1, levels=1, pool="share", maps=1)
    variables = jax.jit(counts.init)(jax.random.key(0), pyramid)
    kernel = jnp.zeros((1, 1, 1, 3, 1)).at[0, 0, 0, 0, 0].set(1e4)
    marks = {"kernel": kernel, "bias": jnp.asarray([-1e3])}
    params = {"map1": marks, "dense": {"kernel": jnp.ones((1, 1))}, "bias": jnp.zeros(1)}
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, variables["params"])
    (found,) = jax.jit(counts.apply)({"params": params}, pyramid)
    share = (coarse[..., 0] > 0.1).mean((1, 2, 3))
    np.testing.assert_allclose(found[:, 0], np.log((share + 1e-5) / (0.01 + 1e-5)), rtol=1e-4)
    (nothing,) = jax.jit(counts.apply)({"params": params}, [p * 0 for p in pyramid])
    np.testing.assert_allclose(nothing, math.log(1e-5 / (0.01 + 1e-5)), rtol=1e-4)
    shared = PooledHead(3, shared=True)
    (steps,) = jax.jit(shared.init_with_output)(jax.random.key(0), pyramid)[0]
    np.testing.assert_allclose(steps, np.broadcast_to(steps[:, :1], (2, 3)))
    dropped = PooledHead(2, dropout=0.5)
    variables = jax.jit(functools.partial(dropped.init, train=True))(jax.random.key(0), pyramid)
    noisy = jax.jit(lambda key: dropped.apply(variables, pyramid, train=True, rngs={"dropout": key})[0])
    one, two = (noisy(jax.random.key(i)) for i in (1, 2))
    assert (one != two).any()
    np.testing.assert_array_equal(*(dropped.apply(variables, pyramid)[0] for _ in "ab"))
    # A coarse voxel's offset points from its own centre, whichever fine voxel it is read at.
    heat = HeatHead(4, features=2, level=1, start=(-4.0, 0.0, 0.0, 0.0), offset=1)
    variables = jax.tree.map(jnp.zeros_like, jax.jit(heat.init)(jax.random.key(0), pyramid))
    (found,) = jax.jit(heat.apply)(variables, pyramid)
    assert found.shape == (2, 8, 8, 4, 4)
    places = np.stack(np.meshgrid(np.arange(8), np.arange(8), np.arange(4), indexing="ij"), -1) + found[0, ..., 1:]
    np.testing.assert_allclose(places[..., 0][:, 0, 0], np.repeat([0.5, 2.5, 4.5, 6.5], 2))
    np.testing.assert_allclose(places[..., 2][0, 0], np.arange(4))


# ------------------------------------------------------------------------------------------------------- segmentation


def known(*values, columns=(), shape=(8, 8, 8)) -> list[Known]:
    return [Known(f"c{i}", np.asarray(v), shape, columns) for i, v in enumerate(values)]


def test_segmentation_scores_without_ignored_voxels():
    rng = np.random.default_rng(0)
    reference = rng.choice([0, 1, 2, 4], (12, 12, 12)).astype(np.uint8)
    prediction = np.where(rng.random(reference.shape) < 0.8, reference, 0).astype(np.uint8)
    blind = rng.random(reference.shape) < 0.2
    for regions in ({}, REGIONS):
        task = Segmentation("t", LABELS, regions=regions, ignore=255, lesions=True, centreline=True)

        def shaped(labels, task=task, regions=regions):
            return np.stack([np.isin(labels, v) for v in task.classes.values()], -1) if regions else labels

        marked = task.score(shaped(prediction), np.where(blind, 255, reference).astype(np.uint8), (1, 1, 1))
        gone = task.score(shaped(np.where(blind, 0, prediction)), np.where(blind, 0, reference), (1, 1, 1))
        assert marked == gone
        summary = task.summarize([{"case": "a", **row} for row in marked])
        assert set(summary) >= {"dice", "hd95", "nsd", "assd", "cldice", "lesion_dice", "lesion_f1", "volume_low_ml"}
        assert task.selection(summary) == pytest.approx(summary["dice"]["mean"])


def test_segmentation_learns_class_weights(capsys):
    mask = np.zeros((8, 8, 8), np.uint8)
    mask[0], mask[1, 0] = 1, 2
    mask[7] = 255
    task = Segmentation("t1", LABELS, balance="inverse", ignore=255)
    learnt = task.fit(known(mask, mask))
    counts = np.array([512 - 64 - 64 - 8, 64, 8, 0])
    weights = np.array(learnt["class_weights"])
    np.testing.assert_allclose(weights[:3] * counts[:3], counts.sum() / 3)
    assert "no training case has enhancing" in capsys.readouterr().err
    assert dataclasses.replace(task, **learnt).fit(known(mask)) == {}
    assert Segmentation("t2", LABELS).fit(known(np.where(mask == 0, 4, mask))) == {}


@pytest.mark.parametrize("shape", [(256, 256, 60), (1024, 1024, 2)])
def test_class_weights_count_every_plane(shape):
    """The last axis lies next to each other in memory: every n-th voxel would meet some of its planes alone."""
    mask = np.zeros(shape, np.uint8)
    mask[..., ::3] = 1
    learnt = Segmentation("even", {"organ": 1}, balance="inverse").fit(known(mask))
    np.testing.assert_allclose(learnt["class_weights"], mask.size / 2 / np.bincount(mask.ravel()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regions": {"a": ()}}, r"regions\.a needs a list of labels"),
        ({"regions": {"a": "core"}}, "needs a list of labels"),
        ({"regions": {"a": ("core", "core")}}, "each once"),
        ({"regions": {"a": ("cores",)}}, "no label 'cores'"),
        ({"voxelwise": "topk"}, "voxelwise='topk' is not known; known: ce, focal, top_k"),
        ({"overlap": "iou"}, "overlap='iou'"),
        ({"class_weights": (1.0,)}, "1 weights for 4 outputs"),
        ({"ignore": 4}, "ignore=4 is the value of a label"),
        ({"balance": "all"}, "balance='all'"),
        ({"balance": "inverse", "voxelwise": "top_k"}, "classes weigh in the voxel-wise part alone"),
        ({"balance": "inverse", "ce": 0.0}, "classes weigh in the voxel-wise part alone"),
        ({"ce": 0.0, "dice": 0.0}, "there is no loss"),
        ({"dice": -1.0}, r"tasks\.t\.dice=-1\.0: needs a number from 0 on"),
        ({"levels": 0}, "levels=0"),
        ({"smoothing": 1.0}, r"smoothing=1\.0: needs a number from 0 on and below 1"),
        ({"top": 0.0}, r"top=0\.0"),
        ({"convention": "medpy"}, "convention='medpy' is not known; known: monai, surface-distance, pooled"),
        ({"nsd_tolerance": -1.0}, r"nsd_tolerance=-1\.0: needs a number from 0 on"),
        ({"nsd_tolerance": math.nan}, "nsd_tolerance=nan"),
        ({"nsd_tolerance": "2"}, "nsd_tolerance=2: needs a number"),
        ({"class_weights": (1.0, -1.0, 1.0, 1.0)}, "weights are from 0 on"),
        ({"lesions": True, "lesion_dilation": 1.5}, r"lesion_dilation=1\.5: needs a whole number from 0 on"),
        ({"lesions": True, "lesion_volume": -1.0}, r"lesion_volume=-1\.0"),
        # What does nothing.
        ({"lesion_dilation": 1}, "lesion_dilation=1 does nothing here, for it acts where lesions is True alone"),
        ({"lesion_volume": 2.0}, "lesion_volume=2.0 does nothing"),
        ({"smoothing": 0.1, "voxelwise": "focal"}, "smoothing=0.1 does nothing here.*where voxelwise is 'ce'"),
        ({"smoothing": 0.1, "ce": 0.0}, "smoothing=0.1 does nothing"),
        ({"gamma": 1.0}, "gamma=1.0 does nothing here.*where voxelwise is 'focal'"),
        ({"top": 0.2}, "top=0.2 does nothing"),
        ({"batch_dice": True, "overlap": "tversky"}, "batch_dice=True does nothing here.*where overlap is 'dice'"),
        ({"batch_dice": True, "dice": 0.0}, "batch_dice=True does nothing"),
        ({"alpha": 0.5}, "alpha=0.5 does nothing here.*where overlap is 'tversky'"),
        ({"beta": 0.5}, "beta=0.5 does nothing"),
        ({"voxelwise": "focal", "ce": 0.0}, "voxelwise='focal' does nothing"),
        ({"overlap": "tversky", "dice": 0.0}, "overlap='tversky' does nothing"),
    ],
)
def test_segmentation_refuses(options, message):
    with pytest.raises(UserError, match=message):
        Segmentation("t", LABELS, **options)


def test_regions_of_the_same_labels_are_noted(capsys):
    """One of the two can never differ from the other in the reference."""
    same = {"inner": ("core", "enhancing"), "middle": ("enhancing", "core"), "whole": ("core", "enhancing", "oedema")}
    Segmentation("twins", LABELS, regions=same)
    assert "task 'twins': regions 'inner' and 'middle' cover the same labels" in capsys.readouterr().err
    Segmentation("nested", LABELS, regions=REGIONS)
    assert "nested" not in capsys.readouterr().err


def test_which_lesions_count_is_the_tasks_to_say():
    reference = np.zeros((24, 12, 12), int)
    reference[2:8, 2:8, 2:8] = reference[10:13, 2:5, 2:5] = 1  # 216 mm³; 27 mm³ two voxels beside it
    reference[20:23, 2:5, 2:5] = 1
    found = np.where(np.arange(24)[:, None, None] < 9, reference, 0)
    scores = [
        Segmentation("t", {"a": 1}, lesions=True, **options).score(found, reference, (1, 1, 1))[0]["lesion_f1"]
        for options in ({}, {"lesion_dilation": 0}, {"lesion_volume": 2.0}, {"lesion_dilation": 0, "lesion_volume": 2})
    ]
    # Dilated the two near ones are one lesion; of 50 mm³ and more there is one, with the other merged or left out.
    assert scores == pytest.approx([1, 1, 2 / 3, 2 / 4])
    # In voxels of 2 mm³ the small ones have 54 mm³ and count.
    undilated = Segmentation("t", {"a": 1}, lesions=True, lesion_dilation=0)
    assert undilated.score(found, reference, (1, 1, 1), 2.0)[0]["lesion_f1"] == pytest.approx(2 / 4)


# ----------------------------------------------------------------------------------------------------- classification


def scored(task, probabilities, truths) -> list[dict]:
    rows = []
    for case, (p, t) in enumerate(zip(probabilities, truths, strict=True)):
        rows += [{**row, "case": case, "group": case} for row in task.score(task.decode(p), np.asarray(t), (1, 1, 1))]
    return rows


def test_binary_classification_of_a_cohort():
    task = Classification("t", ("benign", "malignant"), "binary")
    p = np.array([0.9, 0.8, 0.3, 0.6, 0.2, 0.1])
    truths = [1, 1, 1, 0, 0, 0]
    decoded = task.decode([0.1, 0.9])
    assert decoded == {"benign": 0.1, "malignant": 0.9}
    assert task.called(decoded) == ("malignant",)
    rows = scored(task, np.stack([1 - p, p], 1), truths)
    assert [row["class"] for row in rows] == ["malignant"] * 6
    found = {k: v["mean"] for k, v in task.summarize(rows).items()}
    assert found["auroc"] == pytest.approx(8 / 9)
    assert found["sensitivity"] == found["specificity"] == pytest.approx(2 / 3)
    assert found["sensitivity_at_0.9"] == pytest.approx(2 / 3)
    assert found["accuracy"] == found["balanced_accuracy"] == pytest.approx(4 / 6)
    assert found["kappa"] == pytest.approx(1 / 3)
    assert found["brier"] == pytest.approx(((p - truths) ** 2).mean())
    assert task.selection(task.summarize(rows)) == pytest.approx(8 / 9)
    one = task.summarize(rows[:1])
    assert one["auroc"]["mean"] is None
    assert task.selection(one) == 1.0  # no AUROC of one class: the balanced accuracy stands in
    assert task.selection(task.summarize([])) == 0.0


def test_generalised_dice_sees_a_structure_of_any_size():
    """A region of a million voxels that is missed costs what a small one does."""
    task = Segmentation("t", {"a": 1}, {"r": ("a",)}, ce=0.0, overlap="generalised_dice")
    overlap = jax.jit(
        jax.value_and_grad(lambda x, t, m: task._overlap(x, t, m, {"activation": "sigmoid", "mask": m}).sum())
    )
    shape = (1, 100, 100, 100, 1)
    everywhere, counted = jnp.ones(shape, bool), jnp.ones(shape[:-1], bool)
    missed, hit = jnp.full(shape, -20.0), jnp.full(shape, 20.0)
    assert float(overlap(missed, everywhere, counted)[0]) == pytest.approx(1, abs=1e-3)
    assert float(overlap(hit, everywhere, counted)[0]) == pytest.approx(0, abs=1e-3)
    for target, mask in ((everywhere, ~counted), (~everywhere, counted), (~everywhere, ~counted)):
        for logits in (missed, hit, jnp.zeros(shape)):
            value, gradient = overlap(logits, target, mask)
            assert 0 <= float(value) <= 1
            assert np.isfinite(gradient).all()
            if not mask.any():  # nothing counts
                assert float(value) == 0
                assert not gradient.any()


def test_classes_of_a_cohort_and_calibration():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, (400, 3))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    truths = (rng.random((400, 1)) > p.cumsum(1)).sum(1)
    task = Classification("t", ("a", "b", "c"))
    sure = np.exp(2 * logits) / np.exp(2 * logits).sum(1, keepdims=True)
    rows = scored(task, sure[:60], truths[:60])
    summary = task.summarize(rows)
    assert summary["accuracy"]["mean"] == pytest.approx((sure[:60].argmax(1) == truths[:60]).mean())
    assert set(summary["auroc"]["per_class"]) == {"a", "b", "c"}
    assert task.calibrate(scored(task, sure, truths)) == pytest.approx(2, rel=0.2)
    cool = dataclasses.replace(task, temperature=2.0)
    np.testing.assert_allclose(cool.probabilities(jnp.asarray(2 * logits)), p, rtol=1e-4)
    ordinal = Classification("t", ("I", "II", "III"), "ordinal")
    assert ordinal.called({"I": 0.4, "II": 0.15, "III": 0.45}) == ("II",)
    kappa = ordinal.summarize(scored(ordinal, sure[:60], truths[:60]))["kappa"]["mean"]
    assert kappa is not None
    many = Classification("t", ("x", "y"), "multilabel")
    rows = scored(many, [[0.9, 0.2], [0.1, 0.8], [0.3, 0.4]], [[1, 0], [0, math.nan], [1, 1]])
    assert [(row["class"], row["reference"]) for row in rows] == [("x", 1), ("y", 0), ("x", 0), ("x", 1), ("y", 1)]
    assert many.summarize(rows)["auroc"]["mean"] == 1
    assert many.called({"x": 0.2, "y": 0.1}) == ()


def test_the_temperature_of_ordered_classes_is_that_of_their_thresholds():
    """Of a network three times too sure, and of one not sure enough. A softmax of the classes has 4.5 and 2.5."""
    rng = np.random.default_rng(0)
    task = Classification("t", ("I", "II", "III", "IV"), "ordinal")
    logits = rng.normal(0, 1.0, (1500, 1)) + np.array([1.0, 0.0, -1.0])
    right = np.asarray(task.probabilities(jnp.asarray(logits)))
    truths = (rng.random((1500, 1)) > right.cumsum(1)[:, :3]).sum(1)
    shy = np.asarray(task.probabilities(jnp.asarray(0.4 * logits)))
    assert task.calibrate(scored(task, shy, truths)) == pytest.approx(0.4, rel=0.1)
    sure = np.asarray(task.probabilities(jnp.asarray(3.0 * logits)))
    rows = scored(task, sure, truths)
    assert task.calibrate(rows) == pytest.approx(3, rel=0.1)
    assert dataclasses.replace(task, temperature=2.0).calibrate(rows) == pytest.approx(6, rel=0.1)  # on top of its own
    found = task.calibration(rows)
    cool = dataclasses.replace(task, temperature=found["temperature"])
    read = scored(cool, np.asarray(cool.probabilities(jnp.asarray(3.0 * logits))), truths)
    assert found["n"] == 1500
    assert found["ece"] == task.summarize(rows, resamples=0)["ece"]["mean"]
    assert found["ece_calibrated"] == pytest.approx(cool.summarize(read, resamples=0)["ece"]["mean"], abs=2e-3)
    assert found["ece_calibrated"] < found["ece"] / 4


@pytest.mark.parametrize("problem", ["binary", "multiclass", "multilabel"])
def test_calibration_says_what_the_temperature_will_do(problem):
    rng = np.random.default_rng(1)
    names = ("a", "b") if problem == "binary" else ("a", "b", "c")
    task = Classification("t", names, problem)
    logits = rng.normal(0, 1.5, (900, task.outputs))
    right = np.asarray(task.probabilities(jnp.asarray(logits)))
    draws = rng.random((900, len(names) if problem == "multilabel" else 1))
    truths = draws < right if problem == "multilabel" else (draws > right.cumsum(1)[:, :-1]).sum(1)
    sure = np.asarray(task.probabilities(jnp.asarray(2.5 * logits)))
    rows = scored(task, sure, truths)
    found = task.calibration(rows)
    assert found["temperature"] == pytest.approx(2.5, rel=0.15)
    cool = dataclasses.replace(task, temperature=found["temperature"])
    read = scored(cool, np.asarray(cool.probabilities(jnp.asarray(2.5 * logits))), truths)
    assert found["ece_calibrated"] == pytest.approx(cool.summarize(read, resamples=0)["ece"]["mean"], abs=2e-3)
    assert found["ece_calibrated"] < found["ece"] / 2


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"grad": {"temperature": 2.0}}, ["eval.tasks.grad", "no task 'grad'", "grade"]),
        ({"grade": 2.0}, ["eval.tasks.grade", "a table"]),
        ({"grade": {"names": ("a", "b")}}, ["eval.tasks.grade.names", "temperature, threshold, specificity"]),
        ({"grade": {"temperature": "hot"}}, ["eval.tasks.grade.temperature='hot'", "1.0"]),
        ({"grade": {"temperature": True}}, ["eval.tasks.grade.temperature=True"]),
        ({"age": {"unit": "d"}}, ["eval.tasks.age.unit", "it has none"]),
        ({"labels": {"ignore": 3}}, ["eval.tasks.labels.ignore", "nsd_tolerance"]),
    ],
)
def test_only_how_answers_are_read_may_change(table, words):
    with pytest.raises(UserError) as caught:
        tasks.read_as(CONFIG, table)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_every_reading_option_is_one_of_its_task():
    for kind, keys in tasks.READING.items():
        assert set(keys) <= set(tasks.options(kind))
    read = tasks.read_as(CONFIG, {"grade": {"temperature": 2}, "nodules": {"rates": [1.0], "limit": 3}})
    built = tasks.build(read, LABELS)
    assert (built["grade"].temperature, built["nodules"].limit, built["nodules"].rates) == (2, 3, [1.0])
    assert "temperature" not in CONFIG["grade"]
    for reading, message in (
        ({"grade": {"temperature": 0}}, "above 0"),
        ({"binary": {"specificity": 90.0}}, "specificity=90.0: needs a number from 0 to 1"),
        ({"binary": {"threshold": -1.0}}, "threshold=-1.0"),
        ({"labels": {"nsd_tolerance": -1.0}}, "nsd_tolerance=-1.0"),
        ({"labels": {"convention": "medpy"}}, "convention='medpy'"),
        ({"nodules": {"rates": ()}}, "needs rates of false positives"),
    ):
        with pytest.raises(UserError, match=message):
            tasks.build(tasks.read_as(CONFIG, reading), LABELS)


def test_classification_learns_class_weights_and_refuses():
    task = Classification("t", ("a", "b", "c"), balance="inverse")
    assert task.fit(known(0, 0, 1, 2)) == {"class_weights": pytest.approx((2 / 3, 4 / 3, 4 / 3))}
    binary = Classification("t", ("no", "yes"), "binary", balance="inverse")
    assert binary.fit(known(0, 0, 0, 1)) == {"class_weights": pytest.approx((3.0,))}
    many = Classification("t", ("x", "y"), "multilabel", balance="inverse")
    learnt = many.fit(known([0.0, 1.0], [0.0, np.nan], [1.0, 0.0]))
    assert learnt == {"class_weights": pytest.approx((2.0, 1.0))}
    with pytest.raises(UserError, match="case c1 is of class 3; the task has 0 to 2"):
        task.fit(known(0, 3))
    with pytest.raises(UserError, match="every training case is 'b'"):
        task.fit(known(1, 1))
    with pytest.raises(UserError, match="each 0, 1 or NaN"):
        many.fit(known([0.0, 2.0]))
    with pytest.raises(UserError, match="'y' is unknown in every training case"):
        many.fit(known([0.0, np.nan], [1.0, np.nan]))
    for options, message in (
        ({"names": ("a",)}, "2 or more different names"),
        ({"names": ("a", "a")}, "different names"),
        ({"names": ("a", "b", "c"), "problem": "binary"}, "binary answer has two"),
        ({"names": ("a", "b"), "problem": "multi"}, "problem='multi'"),
        ({"names": ("a", "b"), "pool": "avg"}, "pool='avg'"),
        ({"names": ("a", "b"), "class_weights": (1.0,)}, "needs 2 numbers"),
        ({"names": ("a", "b"), "temperature": 0.0}, "above 0"),
        ({"names": ("a", "b"), "smoothing": -0.1}, "smoothing=-0.1"),
        ({"names": ("a", "b"), "gamma": -1.0}, "gamma=-1.0"),
        ({"names": ("a", "b"), "specificity": 90}, "specificity=90: needs a number from 0 to 1"),
        ({"names": ("a", "b"), "specificity": math.nan}, "specificity=nan"),
        ({"names": ("a", "b"), "problem": "binary", "threshold": -0.5}, "threshold=-0.5: needs a number from 0 to 1"),
        ({"names": ("a", "b"), "problem": "binary", "threshold": "half"}, "threshold=half"),
        ({"names": ("a", "b"), "class_weights": (1.0, -1.0)}, "weights are from 0 on"),
        ({"names": ("a", "b"), "dropout": 1.0}, "dropout=1.0"),
        ({"names": ("a", "b"), "hidden": 2.5}, "hidden=2.5: needs a whole number"),
        ({"names": ("a", "b"), "levels": -1}, "levels=-1"),
        # What does nothing.
        ({"names": ("a", "b"), "problem": "ordinal", "smoothing": 0.1}, "smoothing=0.1 does nothing here"),
        ({"names": ("a", "b"), "problem": "ordinal", "gamma": 2.0}, "gamma=2.0 does nothing here"),
        (
            {"names": ("a", "b"), "coral": False},
            "coral=False does nothing here, for it acts where problem is 'ordinal'",
        ),
        ({"names": ("a", "b"), "threshold": 0.3}, "threshold=0.3 does nothing here"),
    ):
        with pytest.raises(UserError, match=message):
            Classification("t", **options)


@pytest.mark.parametrize("problem", ["binary", "multilabel"])
def test_options_of_the_loss_reach_it(problem):
    """Smoothing, exponent and weights of a task, by NumPy."""
    rng = np.random.default_rng(0)
    width = 1 if problem == "binary" else 2
    logits = rng.normal(0, 2, (4, width)).astype(np.float32)
    target = rng.integers(0, 2, (4, width))
    options = {"smoothing": 0.2, "gamma": 1.5, "class_weights": (3.0,) * width}
    task = Classification("t", ("a", "b"), problem, **options)
    found = task.loss([jnp.asarray(logits)], {"t/target": jnp.asarray(target[:, 0] if width == 1 else target)})
    p = 1 / (1 + np.exp(-np.float64(logits)))
    t = target * 0.8 + 0.1
    terms = -3 * t * (1 - p) ** 1.5 * np.log(p) - (1 - t) * p**1.5 * np.log(1 - p)
    np.testing.assert_allclose(found, terms.mean(-1), rtol=1e-4)


def test_a_class_absent_from_training_is_noted(capsys):
    Classification("few", ("a", "b", "c")).fit(known(0, 1))
    assert "no training case is c" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- regression


def test_regression_learns_its_scale_and_reads_in_its_unit():
    task = Regression("ef", unit="%", uncertainty="gaussian")
    learnt = task.fit(known(50.0, 60.0, 70.0))
    assert learnt["centre"] == (60.0,)
    task = dataclasses.replace(task, **learnt)
    sd = learnt["scale"][0]
    decoded = task.decode(np.asarray(task.probabilities(jnp.array([1.0, 0.0]))))
    assert decoded["ef"]["value"] == pytest.approx(60 + sd, rel=1e-5)
    assert decoded["ef"]["high"] - decoded["ef"]["value"] == pytest.approx(1.96 * sd, rel=1e-3)
    assert task.table(decoded)[0] == {"class": "ef", **decoded["ef"], "unit": "%"}
    batch = task.prepare(jax.random.key(0), {"ef/target": jnp.array([60.0, 60 + sd])})
    np.testing.assert_allclose(batch["ef/target"], [[0], [1]], atol=1e-5)
    rows = []
    for case, (value, truth) in enumerate([(52.0, 50.0), (61.0, 60.0), (67.0, 70.0), (60.0, math.nan)]):
        outputs = [value, value - 4, value + 2.5]
        rows += [{**row, "case": case} for row in task.score(task.decode(outputs), np.float32(truth), (1, 1, 1))]
    assert len(rows) == 3
    found = {k: v["mean"] for k, v in task.summarize(rows).items()}
    assert found["mae"] == pytest.approx(2)
    assert found["bias"] == pytest.approx(0)
    assert found["coverage"] == pytest.approx(2 / 3)
    assert found["r2"] == pytest.approx(1 - 14 / 200)
    assert task.selection(task.summarize(rows)) == pytest.approx(1 / (1 + 2 / sd))
    assert task.selection(task.summarize([])) == 0


def test_regression_of_several_numbers_and_refusals():
    task = Regression("v", ("lv", "rv"), uncertainty="quantiles", interval=0.8)
    assert task.width == 2
    assert task.outputs == 6
    learnt = task.fit(known([1.0, np.nan], [3.0, 5.0], [5.0, 9.0]))
    assert learnt["centre"] == (3.0, 7.0)
    p = np.asarray(task.probabilities(jnp.zeros((4, 6))))
    assert p.shape == (4, 6)
    found = task.decode(p[0])
    for name in ("lv", "rv"):
        assert found[name]["low"] < found[name]["value"] < found[name]["high"]
    assert set(Regression("n").decode([1.0, math.nan, math.nan])["n"]) == {"value"}
    with pytest.raises(UserError, match=r"case c0 has \[1.0\]"):
        task.fit(known([1.0]))
    with pytest.raises(UserError, match="finite"):
        Regression("n").fit(known(math.inf, 1.0))
    with pytest.raises(UserError, match="unknown in every training case"):
        Regression("n").fit(known(math.nan, math.nan))
    with pytest.raises(UserError, match="is 2 in every training case"):
        Regression("n").fit(known(2.0, 2.0))
    for options, message in (
        ({"uncertainty": "bayes"}, "uncertainty='bayes'"),
        ({"interval": 1.0}, "interval=1.0"),
        ({"centre": (1.0, 2.0)}, "centre needs 1"),
        ({"scale": (0.0,)}, "above 0"),
        ({"beta": -1.0}, "beta=-1.0: needs a number from 0 on"),
        ({"beta": None}, "beta=None: needs a number"),
        ({"hidden": -1}, "hidden=-1"),
        # What does nothing.
        ({"beta": 0.5, "objective": "squared"}, "beta=0.5 does nothing here"),
        ({"beta": 0.5, "uncertainty": "gaussian"}, "beta=0.5 does nothing here"),
        ({"objective": "squared", "uncertainty": "quantiles"}, "objective='squared' does nothing here"),
        ({"interval": 0.9}, "interval=0.9 does nothing here, for it acts where uncertainty is 'gaussian' or"),
    ):
        with pytest.raises(UserError, match=message):
            Regression("n", **options)


# -------------------------------------------------------------------------------------------------------- all of them


def test_fit_names_the_task_that_has_no_target():
    config = {"grade": {"type": "classification", "names": ("a", "b")}, "ef": {"type": "regression"}}
    built = tasks.build(config, {})
    with pytest.raises(
        UserError, match="task 'grade': no training case has a target of that name; did you mean 'grad'"
    ):
        tasks.fit(config, built, {"grad": known(0, 1), "ef": known(1.0, 2.0)})
    with pytest.raises(UserError, match="task 'ef'"):
        tasks.fit(config, built, {"grade": known(0, 1), "ef": []})
    learnt = tasks.fit(config, built, {"grade": known(0, 1), "ef": known(1.0, 3.0)})
    assert learnt == {"grade": {}, "ef": {"centre": (2.0,), "scale": (1.0,)}}
    again = {name: {**config[name], **learnt[name]} for name in config}
    rebuilt = tasks.build(again, {})
    assert rebuilt["ef"].centre == (2.0,)
    assert tasks.fit(again, rebuilt, {"grade": known(0, 1), "ef": known(5.0, 9.0)})["ef"] == {}
    with pytest.raises(UserError, match="no tasks"):
        tasks.build({}, {})
    with pytest.raises(UserError, match=r"tasks\.ef\.weight=-1\.0: needs a number from 0 on"):
        tasks.build({"ef": {"type": "regression", "weight": -1.0}}, {})
