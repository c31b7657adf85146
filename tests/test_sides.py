"""Left and right under mirroring: names with a side, labels of findings, channels of mirrored predictions."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medjax import config as config_lib
from medjax import models, predict, tasks
from medjax.augment import policy, sides
from medjax.errors import UserError

KIDNEYS = {"left kidney": 2, "liver": 1, "right kidney": 5}


@pytest.mark.parametrize(
    ("names", "pairs", "lonely", "unlike"),
    [
        (("left_kidney", "Right Kidney"), [("left_kidney", "Right Kidney")], [], []),
        (("kidneyRight", "kidneyLeft"), [("kidneyLeft", "kidneyRight")], [], []),
        (("ctx-rh-insula", "ctx-lh-insula"), [("ctx-lh-insula", "ctx-rh-insula")], [], []),
        (("R_Thal", "L_Thal", "brainstem"), [("L_Thal", "R_Thal")], [], []),
        (("hippocampus_l", "hippocampus_r"), [("hippocampus_l", "hippocampus_r")], [], []),
        (("leftkidney", "rightkidney"), [("leftkidney", "rightkidney")], [], []),
        (("Left-Lateral-Ventricle", "Right-Lateral-Ventricle"),
         [("Left-Lateral-Ventricle", "Right-Lateral-Ventricle")], [], []),
        # The heart's left is no mirror image of its right; that LK and RK are is not known.
        (("left ventricle", "right ventricle"), [], [], ["left ventricle", "right ventricle"]),
        (("LK", "RK"), [], [], ["LK", "RK"]),
        (("RV", "myocardium", "LV"), [], [], []),
        (("left atrium",), [], ["left atrium"], []),
        (("L1", "L2", "cleft", "leftover", "liver", "rim", "lesion"), [], [], []),
    ],
)  # fmt: skip
def test_names_say_their_side(names, pairs, lonely, unlike):
    assert sides.sided(names) == (pairs, lonely, unlike)


def run_of(job: dict[str, Any], labels: dict[str, int], **sections: Any) -> tuple[Any, Any]:
    """(config, tasks)."""
    config = config_lib.defaults()
    config_lib.merge(config, {"tasks": job, "model": {"features": (4, 8)}, "data": {"patch": (8, 8, 8)}, **sections})
    options = {"model": models.options, "tasks": tasks.options}
    config = config_lib.resolve(config, (), lambda room, kind: options[room](kind))
    return config, tasks.build(config.tasks, labels)


SEGMENTATION = {"organ": {"type": "segmentation", "levels": 1}}
SIDE = {"side": {"type": "classification", "names": ("left", "right")}}
FLUID = {"fluid": {"type": "classification", "problem": "multilabel", "names": ("left_effusion", "right_effusion")}}
VOLUMES = {"volumes": {"type": "regression", "names": ("left_ml", "right_ml", "spleen_ml")}}
LEFT = {"left_effusion": {"type": "classification", "names": ("no", "yes"), "problem": "binary"}}
HEART = {"heart": {"type": "regression", "names": ("left ventricle ml", "right_ventricle_ml", "left atrium ml")}}
POINTS = {"hips": {"type": "landmark", "names": ("left hip", "right hip", "sacrum")}}


@pytest.mark.parametrize(
    ("job", "augment", "orientation", "words"),
    [
        (SEGMENTATION, {"mirror": (0,), "swap": ((2, 5),)}, "ASR", "axis 0 is flipped, and with .*'ASR' that is not"),
        (SEGMENTATION, {"mirror": (0,), "swap": ((2, 3),)}, "RAS", "task 'organ' has no label 3 .*left kidney 2"),
        (SEGMENTATION, {"mirror": (0,), "swap": (("organs", 2, 5),)}, "RAS", "no task 'organs'"),
        (POINTS, {"mirror": (0,), "swap": ((1, 2),)}, "RAS", "no task has label maps. Name the task"),
        (POINTS, {"policy": "nnunet", "swap": (("hips", 1, 4),)}, "RAS", "task 'hips' has no label 4"),
        # Answers of whole cases are not moved.
        (SEGMENTATION | SIDE, {"mirror": (0,), "swap": (("side", 1, 2),)}, "RAS", "task 'side' is of whole cases"),
        (SIDE, {"mirror": (0,)}, "RAS", "'left' of task 'side' has a side, .* Leave the axis out of augment.mirror"),
        (FLUID, {"mirror": (1, 2)}, "SRA", "'left_effusion' of task 'fluid' has a side"),
        (VOLUMES, {"policy": "nnunet"}, "RAS", "'left_ml' of task 'volumes' has a side"),
        (LEFT, {"mirror": (0,)}, "RAS", "'left_effusion' of task 'left_effusion' has a side"),
    ],
)
def test_pairs_that_cannot_be_meant(job, augment, orientation, words):
    config, built = run_of(job, KIDNEYS, augment=augment)
    with pytest.raises(UserError, match=words):
        sides.check(config.augment, built, orientation)


@pytest.mark.parametrize(
    ("job", "augment", "orientation", "words"),
    [
        (SEGMENTATION, {"mirror": (0,)}, "LPS", r"axis 0.*'left kidney' and 'right kidney' do not.*swap=\(\(2, 5\),\)"),
        (SEGMENTATION, {"policy": "nnunet"}, "PIR", r"augment.mirror flips axis 2, left to right"),
        (POINTS, {"transforms": (("mirror", {}),)}, "RAS", "'left hip' and 'right hip' do not trade places"),
        (SEGMENTATION, {"mirror": (1, 2)}, "RAS", ""),
        (SIDE | FLUID | VOLUMES | LEFT, {"mirror": (1, 2)}, "RAS", ""),
        (HEART, {"mirror": (0,)}, "RAS", ""),  # one tells its left from its right in a mirror too
        (SEGMENTATION, {"mirror": (0,), "swap": ((5, 2),)}, "RAS", ""),
        (POINTS, {"mirror": (0, 1), "swap": (("hips", 1, 2),)}, "LAS", ""),
    ],
)
def test_sides_that_are_mirrored_and_stay_what_they_are_are_told(job, augment, orientation, words, capsys, monkeypatch):
    monkeypatch.setattr("medjax.errors._said", set())
    config, built = run_of(job, KIDNEYS, augment=augment)
    sides.check(config.augment, built, orientation)
    said = capsys.readouterr().err
    assert re.search(words, said) if words else not said


def test_pairs_are_labels_of_findings_and_not_their_numbers():
    # Instance 1 is on the right and instance 2 on the left: row i - 1 of the table describes instance i.
    mask = jnp.asarray(np.arange(4, dtype=np.int16).reshape(1, 4, 1, 1).repeat(64, 0))
    table = jnp.tile(jnp.asarray([[0, 0, 0, 1, 1, 1, 2, 7], [0] * 6 + [1, 8], [0] * 6 + [3, 9.0]]), (64, 1, 1))
    batch = {"image": mask[..., None] * 1.0, "example": jnp.arange(64), "hips/target": mask, "hips/table": table,
             "organ/target": mask.astype(jnp.uint8)}  # fmt: skip
    rules = {"transforms": (("mirror", {"axes": (0,), "swap": (("hips", 1, 2), (1, 3))}),)}
    out = jax.jit(policy.build(rules, ("hips", "organ"), 0))(batch)
    turned = np.asarray(out["image"][:, 0, 0, 0, 0]) == 3
    assert 16 < turned.sum() < 48
    np.testing.assert_array_equal(out["hips/target"][turned], mask[turned][:, ::-1])
    np.testing.assert_array_equal(out["hips/table"][turned][..., 6], [[1, 2, 3]] * int(turned.sum()))
    np.testing.assert_array_equal(out["hips/table"][turned][..., 7], [[7, 8, 9]] * int(turned.sum()))
    np.testing.assert_array_equal(out["hips/table"][~turned], table[~turned])
    np.testing.assert_array_equal(out["organ/target"][turned][:, :, 0, 0], [[1, 2, 3, 0]] * int(turned.sum()))


class KnowsItsSide:
    """A network that calls left what lies at low x, as one does that was trained with labels trading places."""

    def apply(self, variables: Any, x: jax.Array, train: bool) -> Any:
        towards = jnp.broadcast_to((3.5 - jnp.arange(8.0))[:, None, None, None], (*x.shape[:4], 1))
        low, high, nothing = towards, -towards, jnp.zeros_like(towards)
        return {
            "organ": [jnp.concatenate([nothing, nothing - 9, low, high], -1)],
            "parts": [jnp.concatenate([nothing, low, high], -1)],
            "hips": [jnp.concatenate([low, high, nothing], -1)],
        }


@pytest.mark.parametrize("swapped", [True, False])
def test_averaged_over_mirrors_left_stays_left(swapped):
    regions = {"right": ("right kidney",), "left": ("left kidney",), "all": ("left kidney", "right kidney")}
    job = SEGMENTATION | POINTS | {"parts": {"type": "segmentation", "levels": 1, "regions": regions}}
    volume = np.zeros((8, 8, 8, 1), np.float32)
    found = {}
    for axes in ((), (0, 1)):
        # A run that was never mirrored has no pairs: names say which they are.
        augment = {"mirror": (0,), "swap": ((5, 2), ("hips", 1, 2))} if swapped else {"mirror": (1, 2)}
        config, built = run_of(job, KIDNEYS, augment=augment, eval={"mirror": axes})
        assert list(built["parts"].classes) == ["all", "left", "right"]
        found[axes] = predict.Predictor(config, KnowsItsSide(), built)({}, volume)
    for name, expected in found[()].items():
        assert expected.std() > 0.1
        np.testing.assert_allclose(found[0, 1][name], expected, atol=1e-6, err_msg=name)


def test_regions_trade_places_by_their_own_names_where_values_have_none():
    regions = {
        "left lung": ("label_1", "label_2"),
        "all": ("label_1", "label_2", "label_3"),
        "right lung": ("label_3",),
    }
    job = {"lungs": {"type": "segmentation", "levels": 1, "regions": regions}}
    config, built = run_of(job, {f"label_{i}": i for i in (1, 2, 3)})
    assert list(built["lungs"].classes) == ["all", "left lung", "right lung"]
    assert sides.views(config.augment, built, (0, 2), "RAS") == {"lungs": [(1, 2)]}


@pytest.mark.parametrize(
    ("job", "labels", "augment", "orientation", "words"),
    [
        (SEGMENTATION, KIDNEYS, {}, "ASR", "'left kidney' of task 'organ' has a side, and labels .* axis 0 only"),
        (SEGMENTATION, {"left kidney": 1, "liver": 2}, {}, "RAS", "'left kidney' of task 'organ' may have a side"),
        (SEGMENTATION, {"LK": 1, "RK": 2}, {"mirror": (1,)}, "RAS", "'LK' of task 'organ' may have a side"),
        (POINTS, {}, {}, "ASR", "'left hip' of task 'hips' has a side"),
        (SEGMENTATION | SIDE, {"liver": 2}, {}, "RAS", "'left' of task 'side' .* Leave the axis out of eval.mirror"),
        (VOLUMES, {}, {}, "RAS", "'left_ml' of task 'volumes' has a side"),
    ],
)
def test_sides_that_a_network_has_never_seen_mirrored_are_not_averaged(job, labels, augment, orientation, words):
    side = sides.axis_of(orientation)
    options = {"augment": augment, "data": {"patch": (8, 8, 8), "preprocess": {"orientation": orientation}}}
    config, built = run_of(job, labels, **options, eval={"mirror": (0, 1, 2)})
    with pytest.raises(UserError, match=f"eval.mirror names axis {side}, left to right.*{words}"):
        predict.Predictor(config, KnowsItsSide(), built)
    others = tuple(axis for axis in range(3) if axis != side)
    assert not sides.views(config.augment, built, others, orientation)


def test_what_a_network_has_learnt_in_mirrors_is_averaged_over_them(capsys, monkeypatch):
    monkeypatch.setattr("medjax.errors._said", set())
    config, built = run_of(SEGMENTATION | POINTS, KIDNEYS, augment={"mirror": (0,)})
    assert sides.views(config.augment, built, (0,), "RAS") == {"organ": [], "hips": []}
    said = capsys.readouterr().err
    assert "eval.mirror names axis 0, left to right, but 'left kidney' and 'right kidney' do not trade places" in said
    assert "'left hip' and 'right hip' do not trade places" in said


def test_a_region_without_a_counterpart_cannot_be_mirrored():
    job = {"parts": {"type": "segmentation", "levels": 1, "regions": {"some": ("liver", "left kidney")}}}
    config, built = run_of(job, KIDNEYS, augment={"mirror": (0,), "swap": ((2, 5),)}, eval={"mirror": (0,)})
    with pytest.raises(UserError, match=r"eval.mirror: region 'some' of task 'parts' has no counterpart"):
        predict.Predictor(config, KnowsItsSide(), built)
