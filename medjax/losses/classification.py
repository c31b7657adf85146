"""Losses of classes: one, several at once, or ordered. Logits `[B, K]`; one value per example, float32 `[B]`.

A target that is unknown (a negative class, NaN) adds nothing and has gradient 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

Array = jax.Array


def cross_entropy(
    logits: Array,
    labels: Array,
    *,
    class_weights: Array | None = None,
    smoothing: float = 0.0,
    gamma: float = 0.0,
) -> Array:
    """Cross-entropy of one class out of K, -w[label] (1 - p)^gamma log p, p the label's probability.

    Args:
        logits: float `[B, K]`.
        labels: int `[B]`; outside [0, K) is unknown.
        class_weights: `[K]`.
        smoothing: ε of label smoothing (Szegedy et al. 2016): 1 - ε on the label plus ε/K on every class.
        gamma: Of the focal loss (Lin et al. 2017); 0: plain cross-entropy.
    """
    x = logits.astype(jnp.float32)
    known = (labels >= 0) & (labels < x.shape[-1])
    hit = labels[:, None] == jnp.arange(x.shape[-1])
    log_p = jax.nn.log_softmax(x)
    loss = -(1.0 - smoothing) * jnp.where(hit, log_p, 0.0).sum(axis=-1) - smoothing * log_p.mean(axis=-1)
    if gamma:
        loss *= jnp.maximum(-jnp.expm1(jnp.where(hit, log_p, 0.0).sum(axis=-1)), 1e-7) ** gamma
    if class_weights is not None:
        loss *= jnp.where(hit, class_weights, 0.0).sum(axis=-1)
    return jnp.where(known, loss, 0.0)


def binary_cross_entropy(
    logits: Array,
    targets: Array,
    *,
    positive_weights: Array | None = None,
    smoothing: float = 0.0,
    gamma: float = 0.0,
) -> Array:
    """Binary cross-entropy of K answers, mean over those that are known.

    Args:
        logits: float `[B, K]`.
        targets: `[B, K]` in [0, 1]; NaN is unknown.
        positive_weights: `[K]`, how much a positive counts against a negative.
        smoothing: ε: 1 becomes 1 - ε/2, 0 becomes ε/2.
        gamma: Of the focal loss; 0: plain.
    """
    x, t = logits.astype(jnp.float32), jnp.asarray(targets, jnp.float32)
    known = ~jnp.isnan(t)
    t = jnp.where(known, t, 0.0)
    soft = t * (1.0 - smoothing) + 0.5 * smoothing
    weight = jnp.ones(x.shape[-1]) if positive_weights is None else jnp.asarray(positive_weights, jnp.float32)
    positive, negative = -jax.nn.log_sigmoid(x), -jax.nn.log_sigmoid(-x)
    if gamma:
        positive *= jnp.maximum(jax.nn.sigmoid(-x), 1e-7) ** gamma
        negative *= jnp.maximum(jax.nn.sigmoid(x), 1e-7) ** gamma
    loss = jnp.where(known, weight * soft * positive + (1.0 - soft) * negative, 0.0)
    return loss.sum(axis=-1) / jnp.maximum(known.sum(axis=-1), 1)


def ordinal(logits: Array, labels: Array, *, class_weights: Array | None = None) -> Array:
    """Cumulative-link loss of K ordered classes: the sum over k of the binary cross-entropy of 'above class k'.

    With logits that share their weights and differ by a bias it is CORAL (Cao et al. 2020, arXiv:1901.07884), with
    logits of their own the extended binary classification of Li & Lin (2007).

    Args:
        logits: float `[B, K - 1]`, of P(y > 0), ..., P(y > K - 2).
        labels: int `[B]`; outside [0, K) is unknown.
        class_weights: `[K]`, of the labels.
    """
    steps = logits.shape[-1]
    known = (labels >= 0) & (labels <= steps)
    above = (labels[:, None] > jnp.arange(steps)).astype(jnp.float32)
    loss = optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), above).sum(axis=-1)
    if class_weights is not None:
        loss *= jnp.asarray(class_weights, jnp.float32)[jnp.clip(labels, 0, steps)]
    return jnp.where(known, loss, 0.0)


def ordinal_probabilities(logits: Array) -> Array:
    """[..., K - 1] cumulative logits -> [..., K] probabilities; what is not monotone is cut to the least before it."""
    above = jax.lax.cummin(jax.nn.sigmoid(logits.astype(jnp.float32)), axis=logits.ndim - 1)
    padded = jnp.pad(above, [(0, 0)] * (logits.ndim - 1) + [(1, 1)], constant_values=(1.0, 0.0))
    return padded[..., :-1] - padded[..., 1:]
