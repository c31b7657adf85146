"""Segmentation losses, one value per example: cross-entropies, the Dice family, and sums of the two.

Logits are `[B, *S, K]` (any number of spatial axes, K classes or regions last), of any float type; the arithmetic is
float32. Labels are integer `[B, *S]` in [0, K), region targets boolean `[B, *S, K]`. A voxel `mask` `[B, *S]` or an
`ignore` label takes voxels out of every sum; an example without a voxel left has loss 0 and gradient 0.

Soft Dice, per class k and example:

    D_k = (2 Σ p_k t_k + s) / (Σ p_k + Σ t_k + s),   loss = 1 - mean_k D_k

(Drozdzal et al. 2016, arXiv:1608.04117; `squared=True` has Σ p_k² in the denominator, Milletari et al. 2016,
arXiv:1606.04797). `batch=True` pools the sums over the batch first, as nnU-Net does (Isensee et al. 2021).

Classes absent from the reference are safe. Then D_k = s / (P + s) with P = Σ p_k: perfect (1) where nothing is
predicted, falling to 0 as P grows beyond the smoothing `s`, in voxels. Its gradient pushes p_k down, by s / (P + s)² a
voxel, so 1/s at most; by way of the softmax the absolute gradients over the logits of class k add up to 1/4 at most,
whatever s is. A tiny s (1e-5 is usual elsewhere) makes the loss of an absent class a constant 1 as soon as one voxel is
predicted, with no gradient to speak of; the default of 1 keeps it smooth and is still 0 for a perfect prediction.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array
Activation = Literal["softmax", "sigmoid", "none"]


def softmax_cross_entropy(
    logits: Array,
    labels: Array,
    *,
    class_weights: Array | None = None,
    mask: Array | None = None,
    ignore: int | None = None,
    smoothing: float = 0.0,
) -> Array:
    """Mean cross-entropy over voxels, -log softmax(logits)[label].

    Args:
        logits: float `[B, *S, K]`.
        labels: int `[B, *S]`, in [0, K) wherever they count.
        class_weights: `[K]`; the mean becomes Σ w[label] loss / Σ w[label].
        smoothing: ε of label smoothing (Szegedy et al. 2016): the target is 1 - ε on the label plus ε/K on every class.
        mask: bool `[B, *S]`, voxels that count.
        ignore: Label of voxels that do not count.

    Returns:
        float32 `[B]`.
    """
    _check_labels(logits, labels)
    sums = _softmax_sums(logits, labels, _valid(labels, mask, ignore), class_weights, False, False, smoothing)
    return _mean_cross_entropy(sums, class_weights)


def sigmoid_cross_entropy(
    logits: Array,
    targets: Array,
    *,
    class_weights: Array | None = None,
    mask: Array | None = None,
    smoothing: float = 0.0,
) -> Array:
    """Mean binary cross-entropy over voxels and channels, for regions that may overlap.

    Args:
        logits: float `[B, *S, K]`.
        targets: bool (or 0/1 of any type) `[B, *S, K]`.
        class_weights: `[K]`, weights of the mean over channels.
        mask: bool `[B, *S]`, voxels that count.
        smoothing: ε: a target of 1 becomes 1 - ε/2, one of 0 becomes ε/2.

    Returns:
        float32 `[B]`.
    """
    _check_regions(logits, targets)
    sums = _sigmoid_sums(logits, targets.astype(bool), mask, False, smoothing)
    return _mean_binary_cross_entropy(sums, logits.shape, mask, class_weights)


def soft_dice(
    logits: Array,
    targets: Array,
    *,
    activation: Activation = "softmax",
    include_background: bool = False,
    smooth: float = 1.0,
    squared: bool = False,
    batch: bool = False,
    weights: Array | None = None,
    mask: Array | None = None,
    ignore: int | None = None,
) -> Array:
    """Soft Dice loss, 1 - mean over classes of D_k (formula, sources and absent classes: module docstring).

    Args:
        logits: float `[B, *S, K]`; probabilities if `activation='none'`.
        targets: int labels `[B, *S]`, or regions bool `[B, *S, K]` (always so for 'sigmoid', never for 'softmax').
        activation: From logits to probabilities.
        include_background: Whether class 0 of labels counts. Regions have no background: all count.
        smooth: s in the formula, in voxels, > 0.
        squared: Σ p² in the denominator instead of Σ p.
        batch: Pool the sums over the batch. Every example then has the pooled loss, so any weighted mean of them is it.
        weights: `[B]`, how much an example counts in the pooled sums (0: padding row). Only for `batch`.
        mask: bool `[B, *S]`, voxels that count.
        ignore: Label of voxels that do not count (labels only).

    Returns:
        float32 `[B]` in [0, 1].
    """
    sums = _sums(logits, targets, activation, mask, ignore, None, squared)
    return _dice_loss(sums, targets.ndim < logits.ndim and not include_background, smooth, batch, weights)


def dice_ce(
    logits: Array,
    targets: Array,
    *,
    activation: Literal["softmax", "sigmoid"] = "softmax",
    dice_weight: float = 1.0,
    ce_weight: float = 1.0,
    class_weights: Array | None = None,
    include_background: bool = False,
    smooth: float = 1.0,
    squared: bool = False,
    batch: bool = False,
    weights: Array | None = None,
    mask: Array | None = None,
    ignore: int | None = None,
    smoothing: float = 0.0,
) -> Array:
    """`dice_weight` · soft Dice + `ce_weight` · cross-entropy, both from one pass over the logits.

    The loss nnU-Net trains with (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z), with softmax for labels and
    sigmoid for regions. `class_weights` and `smoothing` (of labels; `smooth` is Dice's) act on the cross-entropy
    alone. The other arguments are those of `soft_dice`,
    `softmax_cross_entropy` and `sigmoid_cross_entropy`.

    Returns:
        float32 `[B]`.
    """
    if activation not in ("softmax", "sigmoid"):
        raise ValueError(f"dice_ce needs logits and activation 'softmax' or 'sigmoid', not {activation!r}")
    sums = _sums(logits, targets, activation, mask, ignore, class_weights, squared, smoothing)
    dice = _dice_loss(sums, activation == "softmax" and not include_background, smooth, batch, weights)
    if activation == "softmax":
        cross_entropy = _mean_cross_entropy(sums, class_weights)
    else:
        cross_entropy = _mean_binary_cross_entropy(sums, logits.shape, mask, class_weights)
    return dice_weight * dice + ce_weight * cross_entropy


def generalised_dice(
    logits: Array,
    targets: Array,
    *,
    activation: Activation = "softmax",
    include_background: bool = True,
    smooth: float = 1e-5,
    mask: Array | None = None,
    ignore: int | None = None,
) -> Array:
    """Generalised Dice loss (Sudre et al. 2017, arXiv:1707.03237): classes weigh by the inverse square of their size.

        1 - (2 Σ_k w_k Σ p_k t_k + s) / (Σ_k w_k Σ (p_k + t_k) + s),   w_k = 1 / (Σ t_k)²

    A class absent from the reference has the largest weight of those present; where none is, all weigh 1.

    Args:
        smooth: s, added to numerator and denominator.

    The other arguments are those of `soft_dice`.

    Returns:
        float32 `[B]` in [0, 1].
    """
    sums = _sums(logits, targets, activation, mask, ignore, None, False)
    overlap, predicted, true = _foreground(sums, targets.ndim < logits.ndim and not include_background)
    weight = jnp.where(true > 0, 1.0 / jnp.maximum(true, 1.0) ** 2, 0.0)
    largest = weight.max(axis=-1, keepdims=True)
    weight = jnp.where(true > 0, weight, jnp.where(largest > 0, largest, 1.0))
    numerator = 2.0 * (weight * overlap).sum(axis=-1) + smooth
    return 1.0 - numerator / ((weight * (predicted + true)).sum(axis=-1) + smooth)


def tversky(
    logits: Array,
    targets: Array,
    *,
    activation: Activation = "softmax",
    alpha: float = 0.3,
    beta: float = 0.7,
    gamma: float = 1.0,
    include_background: bool = False,
    smooth: float = 1.0,
    mask: Array | None = None,
    ignore: int | None = None,
) -> Array:
    """Tversky loss (Salehi et al. 2017, arXiv:1706.05721), mean over classes of (1 - T_k)^gamma.

        T_k = (TP + s) / (TP + alpha FP + beta FN + s),   TP = Σ p t, FP = Σ p (1 - t), FN = Σ (1 - p) t

    alpha = beta = ½ is Dice (with s for 2s); beta above alpha favours sensitivity. gamma other than 1 is the focal
    Tversky loss (Abraham & Khan 2019, arXiv:1810.07842, whose exponent is 3/4). The other arguments are those of
    `soft_dice`.

    Returns:
        float32 `[B]` in [0, 1].
    """
    sums = _sums(logits, targets, activation, mask, ignore, None, False)
    overlap, predicted, true = _foreground(sums, targets.ndim < logits.ndim and not include_background)
    false_positive, false_negative = predicted - overlap, true - overlap
    index = (overlap + smooth) / (overlap + alpha * false_positive + beta * false_negative + smooth)
    return _power(1.0 - index, gamma).mean(axis=-1)


def focal(
    logits: Array,
    targets: Array,
    *,
    activation: Literal["softmax", "sigmoid"] = "softmax",
    gamma: float = 2.0,
    class_weights: Array | None = None,
    mask: Array | None = None,
    ignore: int | None = None,
) -> Array:
    """Focal loss (Lin et al. 2017, arXiv:1708.02002), mean over voxels of -(1 - p_t)^gamma log p_t.

    p_t is the probability of what is true: of the label, or of each region's presence or absence (then the mean is over
    regions too). Weights of labels act as in `softmax_cross_entropy`, those of regions as in `sigmoid_cross_entropy`.

    Returns:
        float32 `[B]`.
    """
    log_p, counted = _log_true(logits, targets, activation, mask, ignore)
    loss = _power(-jnp.expm1(log_p), gamma) * -log_p
    if activation == "sigmoid":
        return _mean_over(loss, counted, class_weights)
    if class_weights is None:
        return _mean_over(loss[..., None], counted, None)
    weight = jnp.asarray(class_weights, jnp.float32)[jnp.clip(targets, 0, logits.shape[-1] - 1)]
    if counted is not None:
        weight = jnp.where(counted, weight, 0.0)
    total = _voxel_sum(weight, 0)
    return _voxel_sum(loss * weight, 0) / jnp.where(total > 0, total, 1.0)


def top_k_cross_entropy(
    logits: Array,
    targets: Array,
    *,
    activation: Literal["softmax", "sigmoid"] = "softmax",
    fraction: float = 0.1,
    mask: Array | None = None,
    ignore: int | None = None,
) -> Array:
    """Cross-entropy of the worst voxels alone (Wu et al. 2016, arXiv:1605.06885): the mean over `fraction` of them.

    The number is that of the voxels that count, times `fraction`, rounded up. For regions a voxel's loss is the mean
    over regions.

    Returns:
        float32 `[B]`.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"top-k cross-entropy needs a fraction in (0, 1], not {fraction}")
    log_p, counted = _log_true(logits, targets, activation, mask, ignore)
    loss = (-log_p if activation == "softmax" else -log_p.mean(axis=-1)).reshape(len(log_p), -1)
    voxels: Any = jnp.full(len(loss), float(loss.shape[1]))
    if counted is not None:
        counted = counted.reshape(len(loss), -1)
        voxels = counted.sum(axis=1).astype(jnp.float32)
        loss = jnp.where(counted, loss, -1.0)
    worst, _ = lax.top_k(loss, math.ceil(fraction * loss.shape[1]))
    # A whole number of voxels must not become one more for float32's rounding.
    taken = jnp.ceil(voxels * fraction - 1e-3)
    keep = (jnp.arange(worst.shape[1]) < taken[:, None]) & (worst >= 0)
    return jnp.where(keep, worst, 0.0).sum(axis=1) / jnp.maximum(taken, 1.0)


def unified_focal(
    logits: Array,
    targets: Array,
    *,
    activation: Literal["softmax", "sigmoid"] = "softmax",
    weight: float = 0.5,
    delta: float = 0.6,
    gamma: float = 0.5,
    asymmetric: bool = True,
    smooth: float = 1e-5,
    mask: Array | None = None,
    ignore: int | None = None,
) -> Array:
    """Unified focal loss (Yeung et al. 2022, doi:10.1016/j.compmedimag.2021.102026): `weight` · F + (1 - weight) · T.

    F is a focal cross-entropy, summed over classes and averaged over voxels:

        F = Σ_k a_k (1 - p_k)^{e_k} · -t_k log p_k,   a = 1 - delta for the background, delta for the rest

    T is a focal Tversky loss, averaged over classes:

        T = mean_k (1 - I_k)^{f_k},   I_k = (TP + s) / (TP + delta FN + (1 - delta) FP + s)

    Asymmetric: the background alone is suppressed in F (e = gamma for it, else 0), the rest alone enhanced in T
    (f = 1 - gamma for them, 1 for the background). Symmetric: e = gamma and f = 1 - gamma for all. For regions, each is
    a problem of two classes, and the loss is their mean.

    Returns:
        float32 `[B]`.
    """
    x = logits.astype(jnp.float32)
    if activation == "softmax":
        _check_labels(logits, targets)
        counted = _valid(targets, mask, ignore)
        log_p = jax.nn.log_softmax(x)[..., None, :]  # [B, *S, 1, K]
        hit = (targets[..., None] == jnp.arange(x.shape[-1]))[..., None, :]
    else:
        _check_regions(logits, targets)
        counted = None if mask is None else mask.astype(bool)
        log_p = jnp.stack([jax.nn.log_sigmoid(-x), jax.nn.log_sigmoid(x)], axis=-1)  # [B, *S, R, 2]
        present = targets.astype(bool)
        hit = jnp.stack([~present, present], axis=-1)
    if counted is not None:
        hit = hit & counted[..., None, None]
    classes = log_p.shape[-1]
    rest = np.arange(classes) > 0
    p, missed = jnp.exp(log_p), -jnp.expm1(log_p)
    suppressed = _power(missed, gamma)
    if asymmetric:
        suppressed = jnp.where(rest, 1.0, suppressed)
    cross = jnp.where(hit, suppressed * -log_p, 0.0) * np.where(rest, delta, 1.0 - delta)
    voxels: Any = float(math.prod(x.shape[1:-1]))
    if counted is not None:
        voxels = jnp.maximum(counted.astype(jnp.float32).sum(axis=tuple(range(1, counted.ndim))), 1.0)[:, None]
        p = jnp.where(counted[..., None, None], p, 0.0)
    focal_part = _voxel_sum(cross, 2).sum(axis=-1) / voxels
    overlap, predicted, true = (_voxel_sum(term, 2) for term in (jnp.where(hit, p, 0.0), p, hit))
    index = (overlap + smooth) / (overlap + delta * (true - overlap) + (1.0 - delta) * (predicted - overlap) + smooth)
    enhanced = _power(1.0 - index, 1.0 - gamma)
    if asymmetric:
        enhanced = jnp.where(rest, enhanced, 1.0 - index)
    return (weight * focal_part + (1.0 - weight) * enhanced.mean(axis=-1)).mean(axis=-1)


def _power(base: Array, exponent: float) -> Array:
    """base^exponent for base >= 0, with a finite gradient at 0 (where rounding may leave a base below it)."""
    if exponent == 1.0:
        return base
    if exponent == 0.0:
        return jnp.ones_like(base)
    if exponent > 1.0:
        return jnp.maximum(base, 0.0) ** exponent
    return jnp.where(base > 1e-7, jnp.maximum(base, 1e-7) ** exponent, 0.0)


def _foreground(sums: _Sums, drop_background: bool) -> tuple[Array, Array, Array]:
    overlap, predicted, true = sums.overlap, sums.predicted, sums.true
    assert overlap is not None
    assert predicted is not None
    if drop_background:
        return overlap[:, 1:], predicted[:, 1:], true[:, 1:]
    return overlap, predicted, true


def _log_true(
    logits: Array, targets: Array, activation: str, mask: Array | None, ignore: int | None
) -> tuple[Array, Array | None]:
    """Log probability of what is true, [B, *S] for labels and [B, *S, K] for regions, and the voxels that count."""
    x = logits.astype(jnp.float32)
    if activation == "sigmoid":
        _check_regions(logits, targets)
        return jax.nn.log_sigmoid(jnp.where(targets.astype(bool), x, -x)), None if mask is None else mask.astype(bool)
    _check_labels(logits, targets)
    counted = _valid(targets, mask, ignore)
    hit = jnp.clip(targets, 0, x.shape[-1] - 1)[..., None] == jnp.arange(x.shape[-1])
    return jnp.where(hit, x, 0.0).sum(axis=-1) - jax.nn.logsumexp(x, axis=-1), counted


def _mean_over(loss: Array, counted: Array | None, class_weights: Array | None) -> Array:
    """Mean of [B, *S, K] over the voxels that count, then weighted over channels."""
    if counted is not None:
        loss = jnp.where(counted[..., None], loss, 0.0)
    sums = _Sums(_voxel_sum(loss, 1), None, None, jnp.zeros(()))
    return _mean_binary_cross_entropy(sums, loss.shape, counted, class_weights)


class _Sums(NamedTuple):
    """Sums over the voxels that count, float32."""

    cross_entropy: Array  # [B], weighted by class; [B, K] for regions
    overlap: Array | None  # [B, K]: sum of p t
    predicted: Array | None  # [B, K]: sum of p, or of p²
    true: Array  # [B, K]: sum of t


def _sums(
    logits: Array,
    targets: Array,
    activation: Activation,
    mask: Array | None,
    ignore: int | None,
    class_weights: Array | None,
    squared: bool,
    smoothing: float = 0.0,
) -> _Sums:
    if activation == "softmax":
        _check_labels(logits, targets)
        return _softmax_sums(logits, targets, _valid(targets, mask, ignore), class_weights, True, squared, smoothing)
    if activation == "sigmoid":
        _check_regions(logits, targets)
        return _sigmoid_sums(logits, targets.astype(bool), mask, squared, smoothing)
    if activation == "none":
        return _probability_sums(logits, targets, mask, ignore, squared)
    raise ValueError(f"unknown activation {activation!r}: use 'softmax', 'sigmoid' or 'none'")


def _check_labels(logits: Array, labels: Array) -> None:
    if labels.shape != logits.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be int {logits.shape[:-1]} for logits {logits.shape}, not {labels.dtype} {labels.shape}"
        )


def _check_regions(logits: Array, targets: Array) -> None:
    if targets.shape != logits.shape:
        raise ValueError(f"region targets must have the logits' shape {logits.shape}, not {targets.shape}")


def _valid(labels: Array, mask: Array | None, ignore: int | None) -> Array | None:
    """Voxels that count, bool [B, *S]; None if all do."""
    if ignore is None:
        return None if mask is None else mask.astype(bool)
    counted = labels != ignore
    return counted if mask is None else counted & mask.astype(bool)


def _mean_cross_entropy(sums: _Sums, class_weights: Array | None) -> Array:
    voxels = sums.true if class_weights is None else sums.true * class_weights
    total = voxels.sum(axis=-1)
    return sums.cross_entropy / jnp.where(total > 0, total, 1.0)


def _mean_binary_cross_entropy(
    sums: _Sums, shape: tuple[int, ...], mask: Array | None, class_weights: Array | None
) -> Array:
    voxels: Any = float(math.prod(shape[1:-1]))
    if mask is not None:
        voxels = jnp.maximum(mask.astype(jnp.float32).sum(axis=tuple(range(1, mask.ndim))), 1.0)[:, None]
    channels = jnp.ones(shape[-1]) if class_weights is None else jnp.asarray(class_weights, jnp.float32)
    return (sums.cross_entropy / voxels * channels).sum(axis=-1) / channels.sum()


def _dice_loss(sums: _Sums, drop_background: bool, smooth: float, batch: bool, weights: Array | None) -> Array:
    overlap, predicted, true = sums.overlap, sums.predicted, sums.true
    assert overlap is not None
    assert predicted is not None
    examples = overlap.shape[0]
    if batch:
        share = jnp.ones(examples) if weights is None else weights.astype(jnp.float32)
        overlap, predicted, true = (
            jnp.einsum("b,bk->k", share, part, precision="highest")[None] for part in (overlap, predicted, true)
        )
    if drop_background:
        overlap, predicted, true = overlap[:, 1:], predicted[:, 1:], true[:, 1:]
    dice = (2.0 * overlap + smooth) / (predicted + true + smooth)
    return jnp.broadcast_to((1.0 - dice).mean(axis=-1), (examples,))


def _softmax_sums(
    logits: Array,
    labels: Array,
    mask: Array | None,
    class_weights: Array | None,
    dice: bool,
    squared: bool,
    smoothing: float = 0.0,
) -> _Sums:
    """Sums for labels; `overlap` and `predicted` only if `dice`."""
    x = logits.astype(jnp.float32)
    labels = labels.astype(jnp.int32)
    if mask is not None:
        labels = jnp.where(mask, labels, -1)  # of no class
    hit = labels[..., None] == jnp.arange(x.shape[-1])
    log_total = jax.nn.logsumexp(x, axis=-1)
    loss = log_total - jnp.where(hit, x, 0.0).sum(axis=-1) * (1.0 - smoothing)
    if smoothing:
        loss -= smoothing * x.mean(axis=-1)
    if class_weights is not None:
        loss *= jnp.where(hit, class_weights, 0.0).sum(axis=-1)
    elif mask is not None:
        loss = jnp.where(mask, loss, 0.0)
    loss_sum, true = _voxel_sum(loss, 0), _voxel_sum(hit, 1)
    if not dice:
        return _Sums(loss_sum, None, None, true)
    p = jnp.exp(x - log_total[..., None])
    counted = p if mask is None else jnp.where(mask[..., None], p, 0.0)
    return _Sums(
        loss_sum, _voxel_sum(jnp.where(hit, p, 0.0), 1), _voxel_sum(counted**2 if squared else counted, 1), true
    )


def _sigmoid_sums(logits: Array, targets: Array, mask: Array | None, squared: bool, smoothing: float = 0.0) -> _Sums:
    """Sums for regions."""
    x = logits.astype(jnp.float32)
    loss = jnp.maximum(x, 0.0) - jnp.where(targets, x, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(x)))
    if smoothing:
        loss += smoothing * jnp.where(targets, 0.5 * x, -0.5 * x)
    p = jax.nn.sigmoid(x)
    terms = (loss, jnp.where(targets, p, 0.0), p**2 if squared else p, targets)
    return _Sums(*(_voxel_sum(term if mask is None else jnp.where(mask[..., None], term, 0.0), 1) for term in terms))


def _probability_sums(
    probabilities: Array, targets: Array, mask: Array | None, ignore: int | None, squared: bool
) -> _Sums:
    """Sums for probabilities of any kind; the cross-entropy is not taken."""
    p = probabilities.astype(jnp.float32)
    if targets.ndim < p.ndim:
        _check_labels(p, targets)
        mask = _valid(targets, mask, ignore)
        hit = targets[..., None] == jnp.arange(p.shape[-1])
    else:
        _check_regions(p, targets)
        hit = targets.astype(bool)
    if mask is not None:
        hit, p = hit & mask[..., None], jnp.where(mask[..., None], p, 0.0)
    terms = (jnp.where(hit, p, 0.0), p**2 if squared else p, hit)
    return _Sums(jnp.zeros(p.shape[0]), *(_voxel_sum(term, 1) for term in terms))


def _voxel_sum(term: Array, trailing: int) -> Array:
    """Sum over the spatial axes of `[B, *S]` (`trailing` 0) or `[B, *S, K]` (1), float32.

    The first spatial axis is summed apart from the rest. One running float32 sum over millions of voxels would lose
    small probabilities, and on CPU XLA runs the two sums about twice as fast; the barrier keeps it from
    joining them again.
    """
    inner = tuple(range(2, term.ndim - trailing))
    return lax.optimization_barrier(term.astype(jnp.float32).sum(axis=inner)).sum(axis=1)
