"""Backbones, heads and the segmentation task."""

from __future__ import annotations

import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medjax import report
from medjax.errors import UserError
from medjax.models.heads import DenseHead
from medjax.models.model import Model, parameter_count
from medjax.models.unet import UNet
from medjax.tasks import build
from medjax.tasks.segmentation import Segmentation

LABELS = {"background": 0, "necrosis": 1, "oedema": 2, "enhancing": 4}
REGIONS = {
    "whole": ("necrosis", "oedema", "enhancing"),
    "core": ("necrosis", "enhancing"),
    "enhancing": ("enhancing",),
}


def initialised(model: nn.Module, x: jax.Array) -> Any:
    return jax.jit(lambda: model.init(jax.random.key(0), x, train=True))()


def test_pyramid_shapes_and_anisotropic_stages() -> None:
    net = UNet(features=(4, 8, 12), factors=((1, 2, 2), (2, 2, 2)), kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)), convs=1)
    assert net.total_factor() == (2, 4, 4)
    x = jnp.ones((2, 4, 8, 8, 3))
    variables = initialised(net, x)
    pyramid = net.apply(variables, x)
    assert [p.shape for p in pyramid] == [(2, 4, 8, 8, 4), (2, 4, 4, 4, 8)]
    assert variables["params"]["encoder0"]["block0"]["conv"]["kernel"].shape == (1, 3, 3, 3, 4)


def test_parameter_count_by_hand() -> None:
    """One convolution a stage, features 4 and 8, one input channel: counted from the definition of the layers."""
    x = jnp.ones((1, 4, 4, 4, 1))
    net = UNet(features=(4, 8), convs=1, decoder_convs=1)
    conv = lambda k, i, o: k**3 * i * o  # noqa: E731
    norm = lambda c: 2 * c  # noqa: E731
    want = (
        conv(3, 1, 4) + norm(4)  # encoder 0
        + conv(2, 4, 8) + norm(8)  # down
        + conv(3, 8, 8) + norm(8)  # encoder 1
        + conv(2, 8, 4) + 4  # up, with a bias
        + conv(3, 8, 4) + norm(4)  # decoder 0, on the concatenation
    )  # fmt: skip
    assert parameter_count(initialised(net, x)) == want


def test_remat_changes_nothing_but_memory() -> None:
    x = jax.random.normal(jax.random.key(1), (1, 8, 8, 8, 2))
    plain, saved = UNet(features=(4, 8)), UNet(features=(4, 8), remat=True)
    variables = initialised(plain, x)
    assert jax.tree.structure(variables) == jax.tree.structure(initialised(saved, x))

    def loss(net: UNet) -> Any:
        return jax.jit(jax.value_and_grad(lambda v: (net.apply(v, x)[0] ** 2).mean()))(variables)

    a, b = loss(plain), loss(saved)
    jax.tree.map(lambda p, q: np.testing.assert_allclose(p, q, rtol=1e-4, atol=1e-6), a, b)


def test_unet_drops_channels_in_training_alone() -> None:
    x = jax.random.normal(jax.random.key(1), (1, 4, 4, 4, 2))
    plain, net = (UNet(features=(4, 8), convs=1, decoder_convs=1, dropout=rate) for rate in (0.0, 0.5))
    variables = initialised(plain, x)
    assert jax.tree.structure(variables) == jax.tree.structure(jax.eval_shape(lambda: net.init(jax.random.key(0), x)))

    @jax.jit
    def both(key: jax.Array) -> Any:
        trained = net.apply(variables, x, train=True, rngs={"dropout": key})[0]
        return trained, [n.apply(variables, x, train=t)[0] for n, t in ((plain, True), (net, True), (net, False))]

    (first, (bare, *same)), (other, _) = both(jax.random.key(0)), both(jax.random.key(1))
    assert np.abs(first - other).max() > 1e-3
    for found in same:
        np.testing.assert_array_equal(found, bare)


def test_a_batch_equals_its_examples() -> None:
    """Instance normalisation: no example sees another."""
    x = jax.random.normal(jax.random.key(2), (3, 8, 12, 8, 2))
    net = UNet(features=(4, 8), convs=1, decoder_convs=1)
    variables = initialised(net, x)
    whole = net.apply(variables, x)[0]
    for i in range(3):
        np.testing.assert_allclose(net.apply(variables, x[i : i + 1])[0][0], whole[i], atol=1e-4)


def test_initial_weights_follow_their_variance() -> None:
    variables = initialised(UNet(features=(16, 32)), jnp.ones((1, 4, 4, 4, 8)))["params"]
    gain = 2 / (1 + 0.01**2)
    for path, fan_in in (("encoder0/block0/conv", 27 * 8), ("down1", 8 * 16), ("up0", 32)):
        kernel: Any = variables
        for part in path.split("/"):
            kernel = kernel[part]
        np.testing.assert_allclose(np.var(kernel["kernel"]), gain / fan_in, rtol=0.15)


def test_wrong_stages_are_refused_in_words() -> None:
    with pytest.raises(UserError, match="model.factors.*2 times three numbers"):
        UNet(features=(4, 8, 16), factors=((2, 2, 2),)).stage_factors()
    with pytest.raises(UserError, match="model.convs.*one number, or 2"):
        initialised(UNet(features=(4, 8), convs=(1, 2, 3)), jnp.ones((1, 4, 4, 4, 1)))


def test_deep_supervision_has_its_parameters_in_both_modes() -> None:
    x = jnp.ones((1, 8, 8, 8, 1))
    model = Model(UNet(features=(4, 8, 8)), {"a": DenseHead(3, levels=2), "b": DenseHead(1)})
    variables = initialised(model, x)
    assert set(variables["params"]["heads_a"]) == {"level0", "level1"}
    train, test = model.apply(variables, x, train=True), model.apply(variables, x)
    assert [o.shape for o in train["a"]] == [(1, 8, 8, 8, 3), (1, 4, 4, 4, 3)]
    assert [o.shape for o in test["a"]] == [(1, 8, 8, 8, 3)]
    np.testing.assert_array_equal(train["a"][0], test["a"][0])
    assert all(o.dtype == jnp.float32 for o in train["a"])


def test_prepare_numbers_the_classes() -> None:
    task = Segmentation("t", LABELS)
    values = jnp.array([[[[0, 1, 2, 4]]]], jnp.uint8)
    out = task.prepare(jax.random.key(0), {"t/target": values})["t/target"]
    assert out.tolist() == [[[[0, 1, 2, 3]]]]
    assert task.outputs == 4
    regions = Segmentation("t", LABELS, regions=REGIONS)
    member = regions.prepare(jax.random.key(0), {"t/target": values})["t/target"]
    assert member[0, 0, 0].tolist() == [[False] * 3, [True, True, False], [True, False, False], [True] * 3]
    assert regions.outputs == 3


def test_decode_and_paint_return_the_files_values() -> None:
    task = Segmentation("t", LABELS)
    values = np.array([0, 1, 2, 4])
    probabilities = np.eye(4)[None, None].astype(np.float32)
    np.testing.assert_array_equal(task.decode(probabilities)[0, 0], values)
    regions = Segmentation("t", LABELS, regions=dict(reversed(REGIONS.items())))  # any order: the largest paints first
    member = np.array([[[[0.1, 0.2, 0.3], [0.9, 0.1, 0.0], [0.9, 0.8, 0.2], [0.9, 0.9, 0.9]]]], np.float32)
    assert regions.paintable
    np.testing.assert_array_equal(regions.paint(regions.decode(member))[0, 0], [0, 2, 1, 4])
    # Two regions of the same labels cannot be told apart in one map.
    twin = Segmentation("t", LABELS, regions={"a": ("oedema",), "b": ("oedema",)})
    assert not twin.paintable
    with pytest.raises(UserError, match=r"regions\.a: .*exactly one label"):
        twin.paint(np.zeros((1, 1, 1, 2), bool))


def test_a_perfect_answer_loses_little_and_scores_one() -> None:
    rng = np.random.default_rng(0)
    values = np.array([0, 1, 2, 4])[rng.integers(0, 4, (2, 8, 8, 8))]
    for regions in ({}, REGIONS):
        task = Segmentation("t", LABELS, regions=regions, levels=1)
        batch = task.prepare(
            jax.random.key(0), {"t/target": jnp.asarray(values, jnp.uint8), "t/mask": jnp.ones(2, bool)}
        )
        target = np.asarray(batch["t/target"])
        hot = target if regions else np.eye(4)[target]
        logits = jnp.asarray(40.0 * hot - 20.0, jnp.float32)
        assert np.all(np.asarray(task.loss([logits], batch)) < 1e-3)
        decoded = task.decode(np.asarray(task.probabilities(logits))[0])
        rows = task.score(decoded, values[0], (1.0, 1.0, 1.0))
        assert [r["class"] for r in rows] == list(regions or ("necrosis", "oedema", "enhancing"))
        assert all(r["dice"] == 1.0 and r["hd95"] == 0.0 and r["nsd"] == 1.0 for r in rows)
        np.testing.assert_array_equal(task.paint(decoded), values[0])


def test_tasks_are_built_or_refused() -> None:
    made = build({"t": {"type": "segmentation", "dice": 2.0}}, LABELS)["t"]
    assert (made.name, made.dice, made.weight) == ("t", 2.0, 1.0)
    with pytest.raises(UserError, match="no tasks"):
        build({}, LABELS)
    with pytest.raises(UserError, match="task type 'segment'"):
        build({"t": {"type": "segment"}}, LABELS)
    with pytest.raises(UserError, match=r"regions\.all: no label 'tumour'"):
        build({"t": {"type": "segmentation", "regions": {"all": ("tumour",)}}}, LABELS)
    with pytest.raises(UserError, match="no label besides the background"):
        build({"t": {"type": "segmentation"}}, {"background": 0})


def test_flops_by_hand() -> None:
    x = jnp.ones((2, 8, 8, 8, 3))
    net = nn.Conv(5, (3, 3, 3), use_bias=False)
    variables = net.init(jax.random.key(0), x)
    forward = jax.make_jaxpr(net.apply)(variables, x)
    assert report.flops(forward) == 2 * 2 * 8**3 * 27 * 3 * 5
    ours = UNet(features=(4, 8), convs=1, decoder_convs=1)
    variables = initialised(ours, x)
    voxels = 2 * 8**3
    want = 2 * voxels * (27 * 3 * 4 + 27 * 8 * 4) + 2 * voxels // 8 * (27 * 8 * 8 + 2 * 8 * 4 * 8)
    jaxpr = jax.make_jaxpr(ours.apply)(variables, x)
    assert report.flops(jaxpr) == want
    # Forward, gradient by the input (but not of the first layer's) and gradient by the filter.
    gradient = jax.make_jaxpr(jax.grad(lambda v: (ours.apply(v, x)[0] ** 2).sum()))(variables)
    assert report.flops(gradient) == 3 * want - 2 * voxels * 27 * 3 * 4
    scan = jax.make_jaxpr(lambda a: jax.lax.scan(lambda c, _: (c @ c, None), a, None, length=7)[0])(jnp.ones((4, 4)))
    assert report.flops(scan) == 7 * 2 * 4**3


def test_versions_are_json() -> None:
    assert {"medjax", "jax", "python", "device"} <= set(json.loads(json.dumps(report.versions())))


@pytest.mark.parametrize(
    ("number", "text"),
    [(999, "999 B"), (1_240, "1.2 kB"), (123_456_789, "123 MB"), (5e12, "5.0 TB"), (5e15, "5000 TB")],
)
def test_human_numbers(number: float, text: str) -> None:
    assert report.human(number, "B") == text
