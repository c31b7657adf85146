"""Segmentation losses: cross-entropy, soft Dice and their sum, one value per example.

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
) -> Array:
    """Mean cross-entropy over voxels, -log softmax(logits)[label].

    Args:
        logits: float `[B, *S, K]`.
        labels: int `[B, *S]`, in [0, K) wherever they count.
        class_weights: `[K]`; the mean becomes Σ w[label] loss / Σ w[label].
        mask: bool `[B, *S]`, voxels that count.
        ignore: Label of voxels that do not count.

    Returns:
        float32 `[B]`.
    """
    _check_labels(logits, labels)
    sums = _softmax_sums(logits, labels, _valid(labels, mask, ignore), class_weights, False, False)
    return _mean_cross_entropy(sums, class_weights)


def sigmoid_cross_entropy(
    logits: Array, targets: Array, *, class_weights: Array | None = None, mask: Array | None = None
) -> Array:
    """Mean binary cross-entropy over voxels and channels, for regions that may overlap.

    Args:
        logits: float `[B, *S, K]`.
        targets: bool (or 0/1 of any type) `[B, *S, K]`.
        class_weights: `[K]`, weights of the mean over channels.
        mask: bool `[B, *S]`, voxels that count.

    Returns:
        float32 `[B]`.
    """
    _check_regions(logits, targets)
    sums = _sigmoid_sums(logits, targets.astype(bool), mask, False)
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
) -> Array:
    """`dice_weight` · soft Dice + `ce_weight` · cross-entropy, both from one pass over the logits.

    The loss nnU-Net trains with (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z), with softmax for labels and
    sigmoid for regions. `class_weights` act on the cross-entropy alone. The other arguments are those of `soft_dice`,
    `softmax_cross_entropy` and `sigmoid_cross_entropy`.

    Returns:
        float32 `[B]`.
    """
    if activation not in ("softmax", "sigmoid"):
        raise ValueError(f"dice_ce needs logits and activation 'softmax' or 'sigmoid', not {activation!r}")
    sums = _sums(logits, targets, activation, mask, ignore, class_weights, squared)
    dice = _dice_loss(sums, activation == "softmax" and not include_background, smooth, batch, weights)
    if activation == "softmax":
        cross_entropy = _mean_cross_entropy(sums, class_weights)
    else:
        cross_entropy = _mean_binary_cross_entropy(sums, logits.shape, mask, class_weights)
    return dice_weight * dice + ce_weight * cross_entropy


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
) -> _Sums:
    if activation == "softmax":
        _check_labels(logits, targets)
        return _softmax_sums(logits, targets, _valid(targets, mask, ignore), class_weights, True, squared)
    if activation == "sigmoid":
        _check_regions(logits, targets)
        return _sigmoid_sums(logits, targets.astype(bool), mask, squared)
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
    logits: Array, labels: Array, mask: Array | None, class_weights: Array | None, dice: bool, squared: bool
) -> _Sums:
    """Sums for labels; `overlap` and `predicted` only if `dice`."""
    x = logits.astype(jnp.float32)
    labels = labels.astype(jnp.int32)
    if mask is not None:
        labels = jnp.where(mask, labels, -1)  # of no class
    hit = labels[..., None] == jnp.arange(x.shape[-1])
    log_total = jax.nn.logsumexp(x, axis=-1)
    loss = log_total - jnp.where(hit, x, 0.0).sum(axis=-1)
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


def _sigmoid_sums(logits: Array, targets: Array, mask: Array | None, squared: bool) -> _Sums:
    """Sums for regions."""
    x = logits.astype(jnp.float32)
    loss = jnp.maximum(x, 0.0) - jnp.where(targets, x, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(x)))
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
