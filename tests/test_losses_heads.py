"""Losses of classes, numbers and findings, class weights and task weighting: definitions, limits, unknown targets."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from medjax.errors import UserError
from medjax.losses import classification, detection, regression, weighting

B, K = 5, 4


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (B, K)).astype(np.float32)
    labels = np.array([0, 3, 1, 2, -1], np.int32)
    answers = (rng.random((B, K)) < 0.5).astype(np.float32)
    answers[0, 1] = answers[4] = np.nan
    return logits, labels, answers


def test_cross_entropy(data):
    logits, labels, _ = data
    known = labels >= 0
    plain = np.asarray(classification.cross_entropy(logits, labels))
    expected = np.asarray(optax.softmax_cross_entropy_with_integer_labels(logits, np.maximum(labels, 0)))
    np.testing.assert_allclose(plain, np.where(known, expected, 0), rtol=1e-5)
    soft = np.eye(K)[labels] * 0.8 + 0.2 / K
    smooth = classification.cross_entropy(logits, labels, smoothing=0.2)
    np.testing.assert_allclose(smooth, np.where(known, optax.softmax_cross_entropy(logits, soft), 0), rtol=1e-5)
    focal = classification.cross_entropy(logits, labels, gamma=2.0)
    np.testing.assert_allclose(focal, (1 - np.exp(-plain)) ** 2 * plain, rtol=1e-4, atol=1e-6)
    weights = np.array([1.0, 2.0, 3.0, 4.0])
    weighted = classification.cross_entropy(logits, labels, class_weights=weights)
    np.testing.assert_allclose(weighted, plain * weights[labels], rtol=1e-5)


def test_binary_cross_entropy_over_known_answers(data):
    logits, _, answers = data
    each = np.asarray(optax.sigmoid_binary_cross_entropy(logits, np.nan_to_num(answers)))
    known = ~np.isnan(answers)
    expected = (each * known).sum(-1) / np.maximum(known.sum(-1), 1)
    np.testing.assert_allclose(classification.binary_cross_entropy(logits, answers), expected, rtol=1e-5)
    heavy = classification.binary_cross_entropy(logits, answers, positive_weights=np.full(K, 3.0))
    tripled = (each * known * np.where(answers == 1, 3, 1)).sum(-1) / np.maximum(known.sum(-1), 1)
    np.testing.assert_allclose(heavy, tripled, rtol=1e-5)


def test_smoothed_and_focal_binary_cross_entropy(data):
    logits, _, answers = data
    known = ~np.isnan(answers)

    def mean(terms):
        return (np.asarray(terms) * known).sum(-1) / np.maximum(known.sum(-1), 1)

    hard = np.nan_to_num(answers)
    for gamma in (1.0, 2.0, 3.5):
        expected = mean(optax.sigmoid_focal_loss(logits, hard, gamma=gamma))
        np.testing.assert_allclose(
            classification.binary_cross_entropy(logits, answers, gamma=gamma), expected, rtol=1e-4
        )
    soft = np.where(hard == 1, 0.9, 0.1)
    expected = mean(optax.sigmoid_binary_cross_entropy(logits, soft))
    np.testing.assert_allclose(classification.binary_cross_entropy(logits, answers, smoothing=0.2), expected, rtol=1e-5)
    # All at once: each side of the smoothed answer is a focal loss of its own.
    p, weights = 1 / (1 + np.exp(-np.float64(logits))), np.array([1.0, 2.0, 0.5, 3.0])
    terms = -weights * soft * (1 - p) ** 2 * np.log(p) - (1 - soft) * p**2 * np.log(1 - p)
    found = classification.binary_cross_entropy(logits, answers, smoothing=0.2, gamma=2.0, positive_weights=weights)
    np.testing.assert_allclose(found, mean(terms), rtol=1e-4)


def test_unknown_targets_have_no_loss_and_no_gradient(data):
    logits, labels, answers = data

    @jax.jit
    def last(x):
        parts = [
            classification.cross_entropy(x, labels, smoothing=0.1, gamma=2.0),
            classification.binary_cross_entropy(x, answers, smoothing=0.1, gamma=2.0),
            classification.ordinal(x[:, 1:], labels),
            regression.squared_error(x, answers),
            regression.smooth_l1(x, answers),
            regression.gaussian_nll(x, x, answers),
            regression.pinball(regression.ordered_quantiles(x[..., None], [0.5]), answers, [0.5]),
        ]
        return sum(p[4] for p in parts)

    value, gradient = jax.value_and_grad(last)(logits * 1e4)
    assert value == 0
    assert (np.asarray(gradient) == 0).all()


def test_ordinal(data):
    logits, labels, _ = data
    steps = logits[:, : K - 1]
    p = 1 / (1 + np.exp(-np.float64(steps)))
    above = labels[:, None] > np.arange(K - 1)
    expected = -np.where(above, np.log(p), np.log(1 - p)).sum(-1)
    np.testing.assert_allclose(classification.ordinal(steps, labels), np.where(labels >= 0, expected, 0), rtol=1e-5)
    weights = np.array([0.5, 2.0, 3.0, 7.0])
    weighted = classification.ordinal(steps, labels, class_weights=weights)
    np.testing.assert_allclose(weighted, np.where(labels >= 0, expected * weights[labels], 0), rtol=1e-5)
    crossing = classification.ordinal_probabilities(jnp.asarray(steps))
    assert (np.asarray(crossing) >= 0).all()
    np.testing.assert_allclose(np.asarray(crossing).sum(-1), 1, rtol=1e-6)
    falling = -np.sort(-steps, axis=-1)
    q = 1 / (1 + np.exp(-np.float64(falling)))
    expected = np.concatenate([1 - q[:, :1], q[:, :-1] - q[:, 1:], q[:, -1:]], -1)
    np.testing.assert_allclose(classification.ordinal_probabilities(jnp.asarray(falling)), expected, atol=1e-6)


def test_numbers():
    rng = np.random.default_rng(1)
    mean, target = rng.normal(size=(2, B, 3)).astype(np.float32)
    log_variance = rng.normal(size=(B, 3)).astype(np.float32)
    nll = -stats.norm.logpdf(target, mean, np.exp(0.5 * log_variance)).mean(-1) - 0.5 * math.log(2 * math.pi)
    np.testing.assert_allclose(regression.gaussian_nll(mean, log_variance, target), nll, rtol=1e-4)
    np.testing.assert_allclose(
        regression.smooth_l1(mean, target), np.asarray(optax.huber_loss(mean, target)).mean(-1), rtol=1e-5
    )
    np.testing.assert_allclose(regression.smooth_l1(mean, target, beta=0.0), np.abs(mean - target).mean(-1), rtol=1e-5)
    target[0, 1] = np.nan
    np.testing.assert_allclose(regression.squared_error(mean, target), np.nanmean((mean - target) ** 2, -1), rtol=1e-5)
    assert regression.gaussian_quantile(0.95) == pytest.approx(1.959964, abs=1e-6)


def test_quantile_loss_is_least_at_the_quantile():
    """Of the numbers 0 to 100, each level's best quantile is that level's number."""
    target = np.arange(101, dtype=np.float32)[:, None]
    for level in (0.1, 0.5, 0.8):
        tried = [float(regression.pinball(np.full((101, 1, 1), q), target, [level]).mean()) for q in range(0, 101, 5)]
        assert 5 * int(np.argmin(tried)) == pytest.approx(100 * level)
    free = np.random.default_rng(0).normal(0, 3, (50, 5)).astype(np.float32)
    q = np.asarray(regression.ordered_quantiles(free, [0.05, 0.25, 0.5, 0.75, 0.95]))
    assert (np.diff(q, axis=-1) > 0).all()
    np.testing.assert_array_equal(q[:, 2], free[:, 2])


# ---------------------------------------------------------------------------------------------------------- detection


def test_heat_losses():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 4, 4, 4, 2)).astype(np.float32)
    heat = rng.random(logits.shape).astype(np.float32) * 0.9
    heat[0, 1, 1, 1, 0] = heat[0, 2, 3, 1, 1] = 1.0
    p = 1 / (1 + np.exp(-np.float64(logits)))
    terms = np.where(heat == 1, -((1 - p) ** 2) * np.log(p), -((1 - heat) ** 4) * p**2 * np.log(1 - p))
    focal = jax.jit(detection.heat_focal)
    np.testing.assert_allclose(focal(logits, heat), terms.sum((1, 2, 3, 4)) / [2, 1], rtol=1e-5)
    counted = rng.random((2, 4, 4, 4)) < 0.5
    counted[0, 1, 1, 1], counted[0, 2, 3, 1] = True, False
    np.testing.assert_allclose(focal(logits, heat, counted), (terms * counted[..., None]).sum((1, 2, 3, 4)), rtol=1e-5)
    both = jax.jit(jax.value_and_grad(lambda x: detection.heat_bce_mse(x, heat, 3.0).sum()))
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = np.nan_to_num(-(heat * np.log(heat) + (1 - heat) * np.log(1 - heat)))
    bce = -(heat * np.log(p) + (1 - heat) * np.log(1 - p)) - entropy
    value, _ = both(logits)
    assert value == pytest.approx((bce + (p - heat) ** 2).sum() / 3, rel=1e-4)
    perfect = np.log(np.clip(heat, 1e-6, 1 - 1e-6) / (1 - np.clip(heat, 1e-6, 1 - 1e-6)))
    value, gradient = both(perfect)
    assert value == pytest.approx(0, abs=1e-3)
    np.testing.assert_allclose(gradient, 0, atol=1e-5)


def test_giou():
    unit = np.array([0, 0, 0, 2, 2, 2], np.float32)
    boxes = np.array(
        [[0, 0, 0, 2, 2, 2], [1, 0, 0, 2, 2, 2], [4, 0, 0, 2, 2, 2], [0, 0, 0, 1, 1, 1], [9, 9, 9, 0, 0, 0]], np.float32
    )
    found = detection.giou(jnp.broadcast_to(unit, boxes.shape), boxes)
    # hull - union: none, none, a gap of 2 in 6, none, nearly all
    expected = [1, 4 / 12, -(24 - 16) / 24, 1 / 8, -(1000 - 8) / 1000]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(detection.giou_loss(boxes, boxes)[:4], 0, atol=1e-6)
    gradient = jax.jit(jax.grad(lambda b: detection.giou_loss(b, unit[None]).sum()))(boxes)
    assert np.isfinite(gradient).all()
    assert gradient[2, 0] > 0  # a box that is too far to the right is drawn left, without any overlap


@pytest.mark.peers
def test_peer_monai_giou():
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("monai.data.box_utils")
    rng = np.random.default_rng(0)
    a, b = (
        np.concatenate([rng.normal(0, 2, (20, 3)), rng.uniform(0.5, 4, (20, 3))], 1).astype(np.float32) for _ in "ab"
    )
    corners = [torch.from_numpy(np.concatenate([x[:, :3] - x[:, 3:] / 2, x[:, :3] + x[:, 3:] / 2], 1)) for x in (a, b)]
    np.testing.assert_allclose(detection.giou(a, b), np.diag(peer.box_giou(*corners).numpy()), atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- weighting


def test_class_weights():
    counts = [90, 9, 1, 0]
    for rule in weighting.CLASS_WEIGHTS:
        weights = weighting.class_weights(counts, rule)
        assert (weights * counts).sum() == pytest.approx(100)
        assert weights[3] == pytest.approx(weights[2])
        assert (np.diff(weights[:3]) > 0).all() or rule == "none"
    np.testing.assert_allclose(weighting.class_weights(counts)[:3] * counts[:3], 100 / 3)
    many = weighting.class_weights([1e5, 1e6], "effective")
    assert many[0] == pytest.approx(many[1], rel=1e-3)  # beyond 1 / (1 - beta) cases more of them add little
    for wrong in ([0, 0], [-1, 2], []):
        with pytest.raises(UserError, match="class weights"):
            weighting.class_weights(wrong)
    with pytest.raises(UserError, match="not known"):
        weighting.class_weights([1, 2], "median")


def test_uncertainty_weighting_balances_losses():
    """At the optimum exp(-s) L = ½: each task's share of the total is the same whatever its scale."""
    losses, present = jnp.array([100.0, 1.0, 0.01]), jnp.array([True, True, True])
    slope = jax.jit(jax.grad(lambda s, p: weighting.uncertainty_total(losses, s, p)))
    s = jnp.zeros(3)
    assert weighting.uncertainty_total(losses, s, present) == pytest.approx(101.01)
    for _ in range(400):
        s = s - 0.2 * jnp.clip(slope(s, present), -1, 1)
    np.testing.assert_allclose(jnp.exp(-s) * losses, 0.5, rtol=1e-3)
    gone = slope(s, jnp.array([True, False, True]))
    assert gone[1] == 0
    bad = weighting.uncertainty_total(jnp.array([1.0, jnp.nan, 1.0]), jnp.zeros(3), jnp.array([True, False, True]))
    assert bad == 2


def test_gradnorm_balances_gradients_and_favours_the_slow():
    update = jax.jit(
        lambda state, losses, norms, present, alpha: weighting.gradnorm_update(
            state, losses, norms, present, alpha=alpha
        )
    )
    norms, present = jnp.array([10.0, 1.0]), jnp.array([True, True])
    state = weighting.gradnorm_init(2)
    for _ in range(300):
        state = update(state, jnp.ones(2), norms, present, 1.5)
        assert state.weights.sum() == pytest.approx(2, rel=1e-5)
    assert state.weights[0] * 10 == pytest.approx(float(state.weights[1]), rel=0.3)
    equal, start = jnp.ones(2), weighting.gradnorm_init(2)
    state = update(start, jnp.array([1.0, 1.0]), equal, present, 1.5)
    for _ in range(10):
        state = update(state, jnp.array([0.9, 0.2]), equal, present, 1.5)
    assert state.weights[0] > 1.05  # its loss has hardly fallen
    absent = update(start, jnp.array([1.0, jnp.nan]), jnp.array([1.0, 0.0]), jnp.array([True, False]), 1.5)
    np.testing.assert_allclose(absent.weights, 1)
    assert absent.first.tolist() == [1, 0]
