"""The Dice family, focal, top-k, unified focal and boundary losses: definitions in numpy, limits, masks, MONAI."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from medjax.losses import boundary
from medjax.losses import segmentation as losses

B, S, K = 3, (4, 5, 6), 4
FAMILY = {
    "generalised_dice": losses.generalised_dice,
    "tversky": lambda x, t, **k: losses.tversky(x, t, gamma=0.75, **k),
    "focal": losses.focal,
    "top_k": losses.top_k_cross_entropy,
    "unified": losses.unified_focal,
    "smoothed": lambda x, t, activation="softmax", **k: losses.dice_ce(x, t, activation=activation, smoothing=0.1, **k),
}


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (B, *S, K)).astype(np.float32)
    labels = rng.integers(0, K, (B, *S)).astype(np.int32)
    regions = rng.random((B, *S, K)) < 0.3
    mask = rng.random((B, *S)) < 0.7
    return logits, labels, regions, mask


@jax.jit
def everything(logits, labels, regions, mask):
    """All losses and gradients, of labels and of regions, in one compiled program."""
    found = {}
    for name, function in FAMILY.items():
        for kind, targets in (("softmax", labels), ("sigmoid", regions)):

            def loss(x, function=function, targets=targets, kind=kind):
                each = function(x, targets, activation=kind, mask=mask)
                return each.sum(), each

            (_, each), gradient = jax.value_and_grad(loss, has_aux=True)(logits)
            found[name, kind] = each, gradient
    return found


def softmax(x):
    e = np.exp(np.float64(x) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def reference(name, p, t, mask, exclusive):
    """Losses from their definitions in float64; p and t [B, *S, K], t 0/1."""
    axes, m = (1, 2, 3), mask[..., None]
    n = mask.sum(axes)
    overlap, predicted, true = (np.where(m, v, 0).sum(axes) for v in (p * t, p, t))
    first = 1 if exclusive else 0
    if name == "generalised_dice":
        w = 1 / true**2
        return 1 - (2 * (w * overlap).sum(-1) + 1e-5) / ((w * (predicted + true)).sum(-1) + 1e-5)
    if name == "tversky":
        fp, fn = predicted - overlap, true - overlap
        index = (overlap + 1) / (overlap + 0.3 * fp + 0.7 * fn + 1)
        return ((1 - index) ** 0.75)[:, first:].mean(-1)
    if exclusive:
        right = (p * t).sum(-1, keepdims=True)
    else:
        right = np.where(t > 0, p, 1 - p)
    if name == "focal":
        return np.where(m, (1 - right) ** 2 * -np.log(right), 0).sum(axes).mean(-1) / n
    if name == "top_k":
        each = -np.log(right).mean(-1)
        worst = [np.sort(e[c])[::-1][: int(np.ceil(0.1 * c.sum()))] for e, c in zip(each, mask, strict=True)]
        return np.array([w.mean() for w in worst])
    if name == "smoothed":
        soft = 0.9 * t + (0.1 / K if exclusive else 0.05)
        cross = -(soft * np.log(p)).sum(-1) if exclusive else -(soft * np.log(p) + (1 - soft) * np.log(1 - p)).mean(-1)
        dice = (2 * overlap + 1) / (predicted + true + 1)
        return np.where(mask, cross, 0).sum(axes) / n + 1 - dice[:, first:].mean(-1)
    assert name == "unified"

    def unified(p, t):  # classes [background, ...]
        rest = np.arange(p.shape[-1]) > 0
        e = np.where(rest, 1.0, (1 - p) ** 0.5)
        f = (np.where(m, e * t * -np.log(p), 0) * np.where(rest, 0.6, 0.4)).sum(-1).sum(axes) / n
        tp, fn, fp = (np.where(m, v, 0).sum(axes) for v in (p * t, (1 - p) * t, p * (1 - t)))
        index = (tp + 1e-5) / (tp + 0.6 * fn + 0.4 * fp + 1e-5)
        return 0.5 * f + 0.5 * np.where(rest, (1 - index) ** 0.5, 1 - index).mean(-1)

    if exclusive:
        return unified(p, t)
    return np.mean(
        [unified(np.stack([1 - p[..., i], p[..., i]], -1), np.stack([1 - t[..., i], t[..., i]], -1)) for i in range(K)],
        axis=0,
    )


def test_losses_are_their_definitions(data):
    logits, labels, regions, mask = data
    found = everything(logits, labels, regions, mask)
    for (name, kind), (each, gradient) in found.items():
        exclusive = kind == "softmax"
        p = softmax(logits) if exclusive else 1 / (1 + np.exp(-np.float64(logits)))
        t = (labels[..., None] == np.arange(K)) * 1.0 if exclusive else regions * 1.0
        np.testing.assert_allclose(each, reference(name, p, t, mask, exclusive), rtol=2e-5, err_msg=f"{name} {kind}")
        assert np.isfinite(gradient).all()
        assert (np.asarray(gradient)[~mask] == 0).all(), name


def test_extremes_and_masks_without_voxels_are_finite(data):
    logits, labels, regions, mask = data
    labels, regions = np.zeros_like(labels), np.zeros_like(regions)  # every class but one is absent
    for scale in (0.0, 1e4):
        found = everything(np.sign(logits) * np.float32(scale), labels, regions, mask)
        for name, (each, gradient) in found.items():
            assert np.isfinite(each).all(), name
            assert np.isfinite(gradient).all(), name
    none = everything(logits, labels, regions, np.zeros_like(mask))
    for name, (_, gradient) in none.items():
        assert (np.asarray(gradient) == 0).all(), name
    for name in ("focal", "top_k"):
        assert (np.asarray(none[name, "softmax"][0]) == 0).all()


def test_a_perfect_prediction_loses_nothing(data):
    _, labels, _, mask = data
    mask = np.ones_like(mask)
    sure = np.where(labels[..., None] == np.arange(K), 50.0, -50.0).astype(np.float32)
    both = everything(sure, labels, labels[..., None] == np.arange(K), mask)
    for (name, _), (each, _) in both.items():
        if name != "smoothed":
            np.testing.assert_allclose(each, 0, atol=1e-5, err_msg=name)


def test_special_cases_meet(data):
    logits, labels, _, mask = data
    dice = losses.soft_dice(logits, labels, mask=mask, smooth=2.0)
    np.testing.assert_allclose(losses.tversky(logits, labels, alpha=0.5, beta=0.5, mask=mask), dice, rtol=1e-5)
    cross = losses.softmax_cross_entropy(logits, labels, mask=mask)
    np.testing.assert_allclose(losses.focal(logits, labels, gamma=0.0, mask=mask), cross, rtol=1e-5)
    np.testing.assert_allclose(losses.top_k_cross_entropy(logits, labels, fraction=1.0, mask=mask), cross, rtol=1e-5)
    weights = np.array([0.1, 1.0, 2.0, 3.0])
    np.testing.assert_allclose(
        losses.focal(logits, labels, gamma=0.0, mask=mask, class_weights=weights),
        losses.softmax_cross_entropy(logits, labels, mask=mask, class_weights=weights),
        rtol=1e-5,
    )
    marked = np.where(mask, labels, -1)
    for function in (losses.tversky, losses.generalised_dice, losses.unified_focal, losses.top_k_cross_entropy):
        np.testing.assert_allclose(function(logits, marked, ignore=-1), function(logits, labels, mask=mask), rtol=1e-5)
    with pytest.raises(ValueError, match="fraction"):
        losses.top_k_cross_entropy(logits, labels, fraction=0.0)


def test_unified_focal_symmetric(data):
    """gamma 0 leaves plain parts, and then symmetric and asymmetric are the same."""
    logits, labels, _, _ = data
    plain = [losses.unified_focal(logits, labels, gamma=0.0, asymmetric=a) for a in (True, False)]
    np.testing.assert_allclose(*plain, rtol=1e-6)
    assert (losses.unified_focal(logits, labels, asymmetric=False) != plain[0]).all()


# ---------------------------------------------------------------------------------------------------------- boundary

distance = jax.jit(boundary.distance, static_argnames="limit")
signed = jax.jit(boundary.signed_distance)
SPACINGS = np.array([[1.0, 1.0, 1.0], [0.7, 2.0, 1.3]], np.float32)


def test_distances_are_exact():
    mask = np.random.default_rng(0).random((2, 9, 7, 8)) < 0.02
    mask[:, 4, 4, 4] = True
    found = distance(mask, SPACINGS)
    for one, map_, spacing in zip(mask, found, SPACINGS, strict=True):
        expected = ndimage.distance_transform_edt(~one, sampling=spacing)
        np.testing.assert_allclose(map_, expected, rtol=1e-5)
    near = np.asarray(distance(mask, SPACINGS, limit=3))
    within = np.asarray(found) <= 2.0
    np.testing.assert_array_equal(near[within], np.asarray(found)[within])
    assert (np.asarray(distance(np.zeros((2, 9, 7, 8), bool), SPACINGS)) >= 1e6).all()


def test_signed_distance_and_boundary_loss():
    mask = np.zeros((2, 9, 7, 8), bool)
    mask[0, 2:6, 2:6, 2:6] = True
    found = np.asarray(signed(mask, SPACINGS))
    assert (found[1] == 0).all()  # no boundary
    outside = ndimage.distance_transform_edt(~mask[0])
    inside = ndimage.distance_transform_edt(mask[0])
    np.testing.assert_allclose(found[0], np.where(mask[0], -(inside - 1), outside), rtol=1e-5)
    distances = np.stack([np.zeros_like(found), found], -1)

    def loss(p):
        return boundary.boundary(p, distances)

    exact = jnp.stack([~mask, mask], -1).astype(jnp.float32)
    wide = jnp.stack([jnp.zeros(mask.shape), jnp.ones(mask.shape)], -1)
    assert loss(exact)[0] < 0 < loss(wide)[0]
    assert loss(wide)[1] == 0
    np.testing.assert_allclose(loss(wide)[0], found[0].mean(), rtol=1e-4)
    counted = np.ones(mask.shape, bool)
    counted[0, :, :, 4:] = False
    np.testing.assert_allclose(boundary.boundary(wide, distances, mask=counted)[0], found[0][..., :4].mean(), rtol=1e-4)
    with pytest.raises(ValueError, match="shape"):
        boundary.boundary(wide, distances[..., :1])


# -------------------------------------------------------------------------------------------------------------- peers


@pytest.mark.peers
def test_peer_monai(data):
    torch = pytest.importorskip("torch")
    peer = pytest.importorskip("monai.losses")
    logits, labels, regions, _ = data
    x = torch.from_numpy(np.moveaxis(logits, -1, 1))
    hot = torch.from_numpy(np.moveaxis((labels[..., None] == np.arange(K)).astype(np.float32), -1, 1))
    many = torch.from_numpy(np.moveaxis(regions.astype(np.float32), -1, 1))

    def each(loss, *arguments):
        return np.array([float(loss(*(a[i : i + 1] for a in arguments))) for i in range(B)])

    np.testing.assert_allclose(
        losses.generalised_dice(logits, labels), each(peer.GeneralizedDiceLoss(softmax=True), x, hot), atol=1e-5
    )
    tversky = peer.TverskyLoss(softmax=True, alpha=0.3, beta=0.7, smooth_nr=1.0, smooth_dr=1.0)
    np.testing.assert_allclose(
        losses.tversky(logits, labels, include_background=True), each(tversky, x, hot), atol=1e-5
    )
    np.testing.assert_allclose(
        losses.focal(logits, regions, activation="sigmoid"), each(peer.FocalLoss(gamma=2.0), x, many), atol=1e-5
    )
    softmaxed = peer.FocalLoss(gamma=2.0, use_softmax=True)
    np.testing.assert_allclose(losses.focal(logits, labels), K * each(softmaxed, x, hot), atol=1e-5)
