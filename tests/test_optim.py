"""Schedules and updates against their formulas; rules that must cover every parameter."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medjax import config as config_lib
from medjax import optim
from medjax.errors import UserError

PARAMS = {
    "net": {"conv": {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([0.5])}},
    "head": {"kernel": jnp.array([3.0])},
}
GRADS = jax.tree.map(lambda p: 0.1 * p + 0.3, PARAMS)


def settings(**changes: Any) -> Any:
    config = config_lib.defaults().optim
    with config.ignore_type():
        config.update(changes)
    return config


def run(config: Any, steps: int = 3, total: int = 10) -> Any:
    tx, _ = optim.build(config, PARAMS, total)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        updates, state = tx.update(GRADS, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params


def test_schedules() -> None:
    rate = optim.schedule(settings(schedule="poly", lr=0.01, power=0.9), 100, 0)
    np.testing.assert_allclose([rate(0), rate(50), rate(99)], [0.01, 0.01 * 0.5**0.9, 0.01 * 0.01**0.9], rtol=1e-5)
    rate = optim.schedule(settings(schedule="cosine", lr=1.0), 110, 10)
    np.testing.assert_allclose([rate(0), rate(9), rate(10), rate(60), rate(110)], [0.1, 1, 1, 0.5, 0], atol=1e-6)
    assert optim.schedule(settings(schedule="constant", lr=0.3), 10, 0)(9) == pytest.approx(0.3)
    with pytest.raises(UserError, match="optim.schedule 'cosin'"):
        optim.schedule(settings(schedule="cosin"), 10, 0)
    with pytest.raises(UserError, match="warmup"):
        optim.schedule(settings(), 10, 10)


def test_sgd_is_nesterov_with_l2() -> None:
    config = settings(lr=0.1, schedule="constant", momentum=0.9, weight_decay=0.01, clip=0.0)
    got = run(config)["net"]["conv"]
    for name, decay in (("kernel", 0.01), ("bias", 0.0)):
        p, g = (np.asarray(t["net"]["conv"][name], np.float64) for t in (PARAMS, GRADS))
        velocity = np.zeros_like(p)
        for _ in range(3):
            gradient = g + decay * p
            velocity = 0.9 * velocity + gradient
            p = p - 0.1 * (gradient + 0.9 * velocity)
        np.testing.assert_allclose(got[name], p, rtol=1e-5)


def test_adamw_decays_apart_from_the_gradient() -> None:
    config = settings(name="adamw", lr=0.1, schedule="constant", weight_decay=0.01, clip=0.0)
    got = run(config)["head"]["kernel"]
    p, g = (np.asarray(t["head"]["kernel"], np.float64) for t in (PARAMS, GRADS))
    m = v = np.zeros_like(p)
    for t in range(1, 4):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        p = p - 0.1 * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8) + 0.01 * p)
    np.testing.assert_allclose(got, p, rtol=1e-5)


def test_clipping_bounds_the_global_norm() -> None:
    config = settings(lr=1.0, schedule="constant", momentum=0.0, weight_decay=0.0, clip=1e-3)
    moved = jax.tree.map(jnp.subtract, run(config, steps=1), PARAMS)
    norm = np.sqrt(sum(float((u**2).sum()) for u in jax.tree.leaves(moved)))
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_rules_scale_and_freeze() -> None:
    rules = ((r"head/.*", {"lr": 0.0}), (r".*/kernel", {"lr": 0.5, "decay": 1.0}), (r".*", {"decay": 0.0}))
    base = settings(lr=0.1, schedule="constant", momentum=0.0, weight_decay=0.0, clip=0.0)
    plain = run(base, steps=1)
    ruled = run(settings(**{**base.to_dict(), "rules": rules}), steps=1)
    np.testing.assert_array_equal(ruled["head"]["kernel"], PARAMS["head"]["kernel"])
    before = PARAMS["net"]["conv"]
    np.testing.assert_allclose(
        ruled["net"]["conv"]["kernel"] - before["kernel"],
        0.5 * (plain["net"]["conv"]["kernel"] - before["kernel"]),
        rtol=1e-4,
    )
    np.testing.assert_array_equal(ruled["net"]["conv"]["bias"], plain["net"]["conv"]["bias"])


def test_what_is_frozen_does_not_count_in_the_clipped_norm() -> None:
    rules = ((r"head/.*", {"lr": 0.0}), (r".*", {"decay": 0.0}))
    config = settings(lr=1.0, schedule="constant", momentum=0.0, weight_decay=0.0, clip=1e-3, rules=rules)
    moved = jax.tree.map(jnp.subtract, run(config, steps=1), PARAMS)["net"]
    assert np.sqrt(sum(float((u**2).sum()) for u in jax.tree.leaves(moved))) == pytest.approx(1e-3, rel=1e-3)


def test_rules_must_cover_and_must_match() -> None:
    with pytest.raises(UserError, match="cover no parameter 'net/conv/bias'"):
        optim.build(settings(rules=((r".*kernel", {}),)), PARAMS, 10)
    with pytest.raises(UserError, match="'decoder/.*' matches no parameter"):
        optim.build(settings(rules=((r"decoder/.*", {}), (r".*", {}))), PARAMS, 10)
    with pytest.raises(UserError, match="keys are 'lr' and 'decay'"):
        optim.build(settings(rules=((r".*", {"rate": 1.0}),)), PARAMS, 10)
    with pytest.raises(UserError, match="optim.name 'adam'"):
        optim.build(settings(name="adam"), PARAMS, 10)
    for key in ("lr", "weight_decay", "clip"):
        with pytest.raises(UserError, match=f"optim.{key}=-0.1: needs 0 or more"):
            optim.build(settings(**{key: -0.1}), PARAMS, 10)


def test_a_factor_follows_its_kernel() -> None:
    """In its rate, unless a rule is of factors alone; in its decay never."""
    params = {"net": {"kernel": 1.0, "kernel_lora_a": 1.0}, "head": {"kernel": 1.0}}
    factors = {"net/kernel_lora_a": "net/kernel"}
    for rules, want in (
        (((r".*/kernel", {"lr": 0.1}), (r".*", {"decay": 0.0})), (0.1, 0.0)),
        (((r"net/kernel", {"lr": 0.0}), (r".*", {})), (0.0, 0.0)),
        (((r"net/.*", {"lr": 0.3}), (r".*", {})), (0.3, 1.0)),
        (((r".*/kernel", {"lr": 0.1}), (r".*_lora_.", {"lr": 16.0, "decay": 0.5}), (r".*", {})), (16.0, 0.5)),
        (((r"head/.*", {"lr": 0.1}), (r".*", {"decay": 0.0})), (1.0, 0.0)),
    ):
        rates, decays = optim.rule_factors(rules, params, factors)
        assert (rates["net"]["kernel_lora_a"], decays["net"]["kernel_lora_a"]) == want


def test_average_follows_its_recursion() -> None:
    average, want = jnp.array(1.0), 1.0
    for step, value in enumerate((2.0, 3.0, 5.0)):
        average = optim.ema(average, jnp.array(value), 0.5, step)
        d = min(0.5, (1 + step) / (10 + step))
        want = d * want + (1 - d) * value
    assert float(average) == pytest.approx(want)
