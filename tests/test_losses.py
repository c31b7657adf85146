"""Segmentation losses against analytic values, a float64 reference, finite differences and optax."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medjax.losses import segmentation as losses

B, S, K = 3, (4, 5, 6), 4

STATIC = ("activation", "include_background", "squared", "batch", "ignore")
softmax_cross_entropy = jax.jit(losses.softmax_cross_entropy, static_argnames="ignore")
sigmoid_cross_entropy = jax.jit(losses.sigmoid_cross_entropy)
soft_dice = jax.jit(losses.soft_dice, static_argnames=STATIC)
dice_ce = jax.jit(losses.dice_ce, static_argnames=STATIC)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (B, *S, K)).astype(np.float32)
    labels = rng.integers(0, K, (B, *S)).astype(np.int32)
    regions = rng.random((B, *S, K)) < 0.3
    mask = rng.random((B, *S)) < 0.7
    return logits, labels, regions, mask


def one_hot(labels: np.ndarray) -> np.ndarray:
    return labels[..., None] == np.arange(K)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reference_dice(p, t, *, smooth=1.0, squared=False, mask=None, batch=False, weights=None, first=0):
    """Soft Dice loss of probabilities and 0/1 targets in float64, from its definition."""
    p, t = np.float64(p), np.float64(t)
    m = np.ones(p.shape[:-1]) if mask is None else np.float64(mask)
    axes = (1, 2, 3)
    parts = [(v * m[..., None]).sum(axes) for v in (p * t, p**2 if squared else p, t)]
    if batch:
        w = np.ones(len(p)) if weights is None else weights
        parts = [np.tile((part * w[:, None]).sum(0), (len(p), 1)) for part in parts]
    overlap, predicted, true = parts
    return 1 - ((2 * overlap + smooth) / (predicted + true + smooth))[:, first:].mean(-1)


def reference_cross_entropy(logits, labels, mask=None, weights=None):
    log_p = np.take_along_axis(np.log(softmax(np.float64(logits))), labels[..., None], -1)[..., 0]
    w = np.ones(K)[labels] if weights is None else weights[labels]
    w = w if mask is None else w * mask
    return -(log_p * w).sum((1, 2, 3)) / w.sum((1, 2, 3))


def test_cross_entropy_is_its_definition_and_optax(data):
    logits, labels, _, mask = data
    weights = np.array([0.1, 1.0, 2.0, 3.0])
    np.testing.assert_allclose(
        softmax_cross_entropy(logits, labels), reference_cross_entropy(logits, labels), rtol=1e-5
    )
    np.testing.assert_allclose(
        softmax_cross_entropy(logits, labels),
        optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean((1, 2, 3)),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        softmax_cross_entropy(logits, labels, mask=mask, class_weights=weights),
        reference_cross_entropy(logits, labels, mask, weights),
        rtol=1e-5,
    )


def test_sigmoid_cross_entropy_is_optax(data):
    logits, _, regions, mask = data
    each = np.asarray(optax.sigmoid_binary_cross_entropy(logits, regions))
    np.testing.assert_allclose(sigmoid_cross_entropy(logits, regions), each.mean((1, 2, 3, 4)), rtol=1e-5)
    weights = np.array([1.0, 0.0, 2.0, 1.0])
    expected = ((each * mask[..., None]).sum((1, 2, 3)) / mask.sum((1, 2, 3))[:, None] * weights).sum(-1) / 4
    np.testing.assert_allclose(
        sigmoid_cross_entropy(logits, regions, mask=mask, class_weights=weights), expected, rtol=1e-5
    )


def test_uniform_logits_have_log_k_and_log_2(data):
    _, labels, regions, _ = data
    zeros = jnp.zeros((B, *S, K))
    np.testing.assert_allclose(softmax_cross_entropy(zeros, labels), math.log(K), rtol=1e-6)
    np.testing.assert_allclose(sigmoid_cross_entropy(zeros, regions), math.log(2), rtol=1e-6)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch", [False, True])
def test_soft_dice_is_its_definition(data, squared, masked, batch):
    logits, labels, regions, mask = data
    weights = np.array([1.0, 0.0, 0.5]) if batch else None
    options = {"squared": squared, "batch": batch, "weights": weights, "mask": mask if masked else None, "smooth": 0.3}
    p = softmax(np.float64(logits))
    for background in (False, True):
        np.testing.assert_allclose(
            soft_dice(logits, labels, include_background=background, **options),
            reference_dice(p, one_hot(labels), first=0 if background else 1, **options),
            rtol=1e-5,
        )
    np.testing.assert_allclose(
        soft_dice(softmax(logits), labels, activation="none", **options),
        reference_dice(p, one_hot(labels), first=1, **options),
        rtol=1e-5,
    )
    q = 1 / (1 + np.exp(-np.float64(logits)))
    for outputs, activation in ((logits, "sigmoid"), (q, "none")):
        np.testing.assert_allclose(
            soft_dice(outputs, regions, activation=activation, **options),
            reference_dice(q, regions, **options),
            rtol=1e-5,
        )


def test_batch_dice_averages_to_the_pooled_loss(data):
    logits, labels, _, _ = data
    weights = jnp.array([1.0, 0.0, 0.5])
    each = soft_dice(logits, labels, batch=True, weights=weights)
    pooled = soft_dice(jnp.concatenate([logits[0], logits[2]])[None], jnp.concatenate([labels[0], labels[2]])[None])
    equal = soft_dice(logits, labels, batch=True, weights=jnp.array([1.0, 0.0, 1.0]))
    np.testing.assert_allclose((each * weights).sum() / weights.sum(), each[0], rtol=1e-6)
    np.testing.assert_allclose(equal, jnp.full(B, pooled[0]), rtol=1e-6)


def test_dice_of_known_masks():
    labels = np.zeros((1, 8, 1, 1), np.int32)
    labels[0, :4] = 1
    prediction = np.zeros((1, 8, 1, 1, 2), np.float32)
    prediction[0, 2:8, ..., 1] = 1  # 6 voxels, 2 of them right
    prediction[..., 0] = 1 - prediction[..., 1]
    (loss,) = soft_dice(prediction, labels, activation="none", smooth=1.0)
    assert loss == pytest.approx(1 - (2 * 2 + 1) / (6 + 4 + 1))
    perfect = np.where(one_hot(labels)[..., :2], 200.0, -200.0)
    assert dice_ce(perfect, labels)[0] == pytest.approx(0, abs=1e-6)


def test_dice_ce_is_the_weighted_sum(data):
    logits, labels, regions, mask = data
    np.testing.assert_allclose(
        dice_ce(logits, labels, mask=mask, dice_weight=2, ce_weight=0.5),
        2 * soft_dice(logits, labels, mask=mask) + 0.5 * softmax_cross_entropy(logits, labels, mask=mask),
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        dice_ce(logits, regions, activation="sigmoid", mask=mask),
        soft_dice(logits, regions, activation="sigmoid", mask=mask) + sigmoid_cross_entropy(logits, regions, mask=mask),
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"squared": True, "include_background": True},
        {"batch": True},
        {"activation": "sigmoid"},
        {"class_weights": np.array([0.1, 1.0, 2.0, 3.0])},
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_gradient_by_finite_differences(data, options, masked):
    logits, labels, regions, mask = data
    targets = regions if options.get("activation") == "sigmoid" else labels
    options = options | {"mask": mask if masked else None}

    @jax.jit
    def loss(x):
        return (dice_ce(x, targets, **options) * jnp.array([1.0, 2.0, 3.0])).sum()

    gradient = np.asarray(jax.jit(jax.grad(loss))(logits))
    rng = np.random.default_rng(1)
    for _ in range(3):
        direction = rng.standard_normal(logits.shape).astype(np.float32)
        step = 1e-2
        numeric = (loss(logits + step * direction) - loss(logits - step * direction)) / (2 * step)
        assert (gradient * direction).sum() == pytest.approx(float(numeric), rel=2e-3, abs=2e-4)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_absent_classes_have_finite_losses_and_bounded_gradients(activation):
    shape = (1, 8, 8, 8)
    target = np.zeros(shape, np.int32) if activation == "softmax" else np.zeros((*shape, 3), bool)

    @jax.jit
    @jax.value_and_grad
    def loss(x, smooth):
        return soft_dice(x, target, activation=activation, smooth=smooth).sum()

    for logit in (-60.0, -8.0, 0.0, 60.0):
        for smooth in (1e-5, 1.0):
            x = np.zeros((*shape, 3), np.float32)
            x[..., 1:] = logit
            value, gradient = loss(x, smooth)
            assert np.isfinite(value)
            assert np.isfinite(gradient).all()
            assert np.abs(np.asarray(gradient))[..., 1:].sum() <= 0.25 + 1e-5
    x = np.zeros((*shape, 3), np.float32)
    x[..., 1:] = -60
    if activation == "softmax":
        assert soft_dice(x, target)[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_extreme_logits_stay_finite(data, dtype):
    _, labels, regions, _ = data
    rng = np.random.default_rng(2)
    extreme = jnp.asarray(rng.choice([-1e4, 0, 1e4], (B, *S, K)), dtype)
    for targets, activation in ((labels, "softmax"), (regions, "sigmoid")):

        @jax.jit
        @jax.value_and_grad
        def loss(x, targets=targets, activation=activation):
            return dice_ce(x, targets, activation=activation).sum()

        value, gradient = loss(extreme)
        assert np.isfinite(value)
        assert value > 1e3
        assert gradient.dtype == dtype
        assert np.isfinite(np.asarray(gradient, np.float32)).all()


def test_bfloat16_logits_are_summed_in_float32(data):
    logits, labels, regions, _ = data
    low = jnp.asarray(logits, jnp.bfloat16)
    same = low.astype(jnp.float32)
    for targets, activation in ((labels, "softmax"), (regions, "sigmoid")):
        value = dice_ce(low, targets, activation=activation)
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, dice_ce(same, targets, activation=activation), rtol=1e-6)


def test_ignored_voxels_do_not_count(data):
    logits, labels, _, mask = data
    marked = np.where(mask, labels, 255)
    np.testing.assert_allclose(dice_ce(logits, marked, ignore=255), dice_ce(logits, labels, mask=mask), rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda x: dice_ce(x, marked, ignore=255).sum()))(logits)
    assert (np.asarray(gradient)[~mask] == 0).all()
    assert (np.abs(np.asarray(gradient)[mask]).sum(-1) > 0).all()
    for dtype in (np.uint8, np.int64):
        np.testing.assert_allclose(
            dice_ce(logits, marked.astype(dtype), ignore=255), dice_ce(logits, labels, mask=mask), rtol=1e-6
        )
    changed = np.where(mask[..., None], logits, 50.0)
    np.testing.assert_allclose(dice_ce(changed, marked, ignore=255), dice_ce(logits, marked, ignore=255), rtol=1e-6)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_examples_without_voxels_have_no_loss_and_no_gradient(data, activation):
    logits, labels, regions, mask = data
    targets = labels if activation == "softmax" else regions
    mask = mask.copy()
    mask[1] = False
    value, gradient = jax.value_and_grad(lambda x: dice_ce(x, targets, activation=activation, mask=mask)[1])(logits)
    assert value == 0
    assert (np.asarray(gradient) == 0).all()


def test_sums_over_many_voxels_keep_small_probabilities():
    """2 million voxels of probability 1e-3 and half of them true: float32's running sum would be off by percents."""
    labels = np.zeros((1, 128, 128, 128), np.int32)
    labels[:, :64] = 1
    logits = np.zeros((*labels.shape, 2), np.float32)
    logits[..., 1] = math.log(1e-3 / (1 - 1e-3))
    n = labels.size
    expected = 1 - (2 * 1e-3 * n / 2 + 1) / (1e-3 * n + n / 2 + 1)
    assert soft_dice(logits, labels)[0] == pytest.approx(expected, rel=1e-6)
    assert softmax_cross_entropy(logits, labels)[0] == pytest.approx(
        -(math.log(1e-3) + math.log(1 - 1e-3)) / 2, rel=1e-5
    )


def test_fewer_spatial_axes_and_jit(data):
    logits, labels, _, _ = data
    flat = dice_ce(logits.reshape(B, -1, K), labels.reshape(B, -1))
    np.testing.assert_allclose(dice_ce(logits, labels), flat, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: dice_ce(x, y[..., None]), "labels must be int"),
        (lambda x, y: softmax_cross_entropy(x, y.astype(np.float32)), "labels must be int"),
        (lambda x, y: sigmoid_cross_entropy(x, y), "region targets"),
        (lambda x, y: dice_ce(x, y, activation="none"), "needs logits"),
        (lambda x, y: soft_dice(x, y, activation="relu"), "unknown activation"),
    ],
)
def test_wrong_shapes_are_refused(data, call, message):
    with pytest.raises(ValueError, match=message):
        call(data[0], data[1])
