"""SWA against the plain mean of saved parameters, resumed bit for bit; GradNorm and uncertainty weighting in the step
against gradients taken by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train import a_batch, load, make, plain, state_bytes

from medjax import balance, main, optim, parallel
from medjax import job as job_lib
from medjax import step as step_lib
from medjax import train as train_lib
from medjax.checkpoint import Checkpoints
from medjax.errors import UserError
from medjax.losses import weighting
from medjax.models.model import tap
from medjax.tasks.regression import Regression
from medjax.tasks.segmentation import Segmentation

# --------------------------------------------------------------------------------------------------------------- SWA


@pytest.mark.parametrize(("start", "interval"), [(3, 2), (1, 1), (4, 3)])
def test_swa_is_the_mean_of_the_chosen_steps(start: int, interval: int) -> None:
    values = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    average = {"w": jnp.asarray(values[0])}
    for number in range(1, 12):  # values[n] are the parameters after n steps
        average = optim.swa(average, {"w": jnp.asarray(values[number])}, jnp.int32(number - 1), start, interval)
        taken = [values[n] for n in range(start, number + 1, interval)]
        want = np.mean(taken, axis=0) if taken else values[number]
        np.testing.assert_allclose(average["w"], want, rtol=1e-5, atol=1e-6)
        if number <= start:
            np.testing.assert_array_equal(average["w"], values[number])


def test_what_is_evaluated_is_the_swa_average(recipe: Path) -> None:
    swa = ("optim.ema=0.0", "optim.swa.start=2 steps", "optim.swa.interval=1 steps", "optim.schedule=constant")
    step, create, mesh = make(load(recipe, *swa))
    state, seen = jax.jit(create)(), []
    for i in range(3):
        state, _ = step(state, parallel.put_batch(a_batch(seed=i), mesh))
        seen.append(jax.device_get(state.params))
    want = jax.tree.map(lambda a, b: (a + b) / 2, *seen[1:])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.eval_params, want)


def test_a_resumed_run_with_swa_ends_bit_identical(recipe: Path, tmp_path: Path) -> None:
    def train(folder: str) -> None:
        main.main([
            f"--config={recipe}", f"--workdir={tmp_path / folder}", "--config.optim.ema=0.0",
            "--config.optim.swa.start=3 steps", "--config.optim.swa.interval=2 steps", "--config.train.total=6 steps",
            "--config.train.eval_every=6 steps", "--config.eval.pictures=false", "--config.eval.predictions=false",
        ])  # fmt: skip

    train("whole")
    calls = 0

    class Killed(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch:

        def block(sums: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 6:  # after step 5; the newest checkpoint is of step 4, within the average
                raise Killed
            return sums

        patch.setattr(train_lib.jax, "block_until_ready", block)
        with pytest.raises(Killed):
            train("cut")
    train("cut")
    assert state_bytes(tmp_path / "cut") == state_bytes(tmp_path / "whole")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optim.swa.start=2 steps"], ["decay 0.9", "optim.ema=0", "optim.swa.start"]),
        (["optim.ema=0.0", "optim.swa.start=9 steps"], ["step 9", "8 steps"]),
        (["optim.ema=0.0", "optim.swa.start=0 steps"], ["step 0"]),
        (["optim.ema=0.0", "optim.swa.start=2 steps", "optim.swa.interval=0 steps"], ["optim.swa.interval"]),
        (["optim.balance=grandnorm"], ["grandnorm", "gradnorm"]),
    ],
)
def test_what_cannot_be_averaged_is_refused(recipe: Path, overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make(load(recipe, *overrides))
    assert all(word in str(caught.value) for word in words), str(caught.value)


# ----------------------------------------------------------------------------------------------------------- GradNorm


def test_a_tap_tells_the_squared_norm_and_changes_nothing() -> None:
    features = [jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 1), jnp.bfloat16)]

    def loss(x: list[Any], probe: Any) -> Any:
        a, b = tap(x, probe)
        return (a**2).sum() + 3.0 * b.astype(jnp.float32).sum()

    gradients, squared = jax.grad(loss, argnums=(0, 1))(features, 0.0)
    np.testing.assert_allclose(gradients[0], 2 * features[0])
    np.testing.assert_allclose(squared, (4 * features[0] ** 2).sum() + 9 * 2)


def two(recipe: Path, *more: str) -> Any:
    """Two tasks on one net; the cohort need not know the second, for the batches are made by hand."""
    config = plain(recipe, "optim.balance=gradnorm", "optim.ema=0.0", *more)
    with config.unlocked(), config.ignore_type():
        config.tasks.second = {**config.tasks.spheres.to_dict(), "weight": 0.5, "dice": 3.0}
    return config


def two_batch(n: int = 4) -> dict[str, np.ndarray]:
    batch = a_batch(n)
    batch["second/target"] = (batch["spheres/target"] > 0).astype(np.uint8)
    batch["second/mask"] = np.array([True, False, True, True][:n])
    return batch


def by_hand(config: Any, batch: dict[str, np.ndarray]) -> tuple[list[float], list[float]]:
    """Losses of the tasks and the norms of their gradients in the features, each by a backward pass of its own."""
    job = job_lib.open_job(config)
    params = jax.jit(step_lib.make_state(config, job)[2])().params
    for task in job.tasks.values():
        batch = task.prepare(jax.random.key(0), {k: jnp.asarray(v) for k, v in batch.items()})
    features = job.model.apply({"params": params}, batch["image"], method=lambda m, x: m.backbone(x, train=True))
    found = []
    for name, task in job.tasks.items():
        mask = batch[f"{name}/mask"]

        def loss(x: Any, name: str = name, task: Any = task, mask: Any = mask) -> Any:
            outputs = job.model.apply({"params": params}, x, method=lambda m, x: m.heads[name](x, train=True))
            return jnp.where(mask, task.loss(outputs, batch), 0.0).sum() / mask.sum()

        value, slope = jax.value_and_grad(loss)(features)
        found.append((float(value), float(optax.global_norm(slope))))
    values, norms = zip(*found, strict=True)
    return list(values), list(norms)


@pytest.mark.parametrize("rounds", [1, 2])
def test_gradnorm_in_the_step_is_gradnorm_by_hand(recipe: Path, rounds: int) -> None:
    config = two(recipe, f"optim.accumulate={rounds}")
    values, norms = by_hand(config, two_batch())
    step, create, mesh = make(config)
    state, sums = step(jax.jit(create)(), parallel.put_batch(two_batch(), mesh))
    want = weighting.gradnorm_update(
        weighting.gradnorm_init(2), jnp.asarray(values), jnp.asarray(norms), jnp.ones(2, bool), alpha=1.5, rate=0.025
    )
    np.testing.assert_allclose(state.balance.weights, want.weights, rtol=1e-4)
    np.testing.assert_allclose(state.balance.first, values, rtol=1e-4)
    assert not np.allclose(state.balance.weights, 1.0, atol=1e-3)
    names = list(config.tasks)  # a config's keys are in order of the alphabet
    for name, weight in zip(names, want.weights, strict=True):
        np.testing.assert_allclose(sums[f"task_weight/{name}"], weight, rtol=1e-4)
    # The first step weighs as given: weights of GradNorm begin at 1.
    np.testing.assert_allclose(sums["loss"], np.dot([config.tasks[n].weight for n in names], values), rtol=1e-4)


@pytest.mark.parametrize("rounds", [1, 2])
def test_uncertainty_in_the_step_is_uncertainty_by_hand(recipe: Path, rounds: int) -> None:
    """d/ds of w (exp(-s) L + s / 2), however many rounds add up to the batch; and one step of Adam down it."""
    config = two(recipe, f"optim.accumulate={rounds}")
    values = np.array(by_hand(config, two_batch())[0])
    config.optim.balance = "uncertainty"
    step, create, mesh = make(config)
    state, at = jax.jit(create)(), np.array([0.3, -0.4], np.float32)  # not where it begins: exp(-s) must show
    state = state.replace(balance=(jnp.asarray(at), state.balance[1]))
    state, sums = step(state, parallel.put_batch(two_batch(), mesh))
    names = list(config.tasks)
    weights = np.array([config.tasks[n].weight for n in names])
    slope = weights * (0.5 - np.exp(-at) * values)
    log_variances, moments = state.balance
    np.testing.assert_allclose(moments[0].mu, 0.1 * slope, rtol=1e-4)
    np.testing.assert_allclose(moments[0].nu, 0.001 * slope**2, rtol=1e-4)
    np.testing.assert_allclose(log_variances, at - config.optim.lr * np.sign(slope), rtol=1e-4)
    for name, value in zip(names, log_variances, strict=True):
        assert sums[f"log_variance/{name}"] == value
    np.testing.assert_allclose(sums["loss"], weights @ values, rtol=1e-4)  # as logged: by the weights as given


def test_what_gradnorm_has_learnt_is_in_the_checkpoint(recipe: Path, tmp_path: Path) -> None:
    config = two(recipe)
    step, create, mesh = make(config)
    state, _ = step(jax.jit(create)(), parallel.put_batch(two_batch(), mesh))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save("latest", 1, state, {"step": 1})
    checkpoints.wait()
    like = step_lib.abstract_state(config, job_lib.open_job(config), mesh)
    again = checkpoints.restore("latest", 1, like)
    checkpoints.close()
    assert isinstance(again.balance, weighting.GradNormState)
    jax.tree.map(np.testing.assert_array_equal, again, jax.device_get(state))


def test_gradnorm_leaves_alone_what_has_no_label() -> None:
    rule = balance.GradNorm({"a": 1.0, "b": 0.0}, 1.5, 0.025)
    share = {"a": jnp.float32(0.0), "b": jnp.float32(1.0)}
    losses = {"a": jnp.float32(0.0), "b": jnp.float32(2.0)}
    state, logged = rule.update(rule.create(), (jnp.array([0.0, 0.0]), None), losses, share)
    np.testing.assert_array_equal(state.weights, [1.0, 1.0])
    assert all(np.isfinite(v) for v in logged.values())


def test_gradnorm_refuses_a_task_with_a_pass_of_its_own(recipe: Path) -> None:
    config = plain(recipe, "optim.balance=gradnorm", "optim.ema=0.0")
    kinds = {"a": SimpleNamespace(kind="dense", weight=1.0), "b": SimpleNamespace(kind="pretext", weight=1.0)}
    with pytest.raises(UserError, match="'b' makes a pass of its own"):
        balance.build(config, kinds, lambda _: 0.1)


def test_learnt_weights_refuse_losses_below_0(recipe: Path) -> None:
    """exp(-s) L + s / 2 falls without end in s where L < 0; GradNorm divides by the first loss."""

    def build(rule: str, *tasks: Any) -> balance.Fixed:
        named = {task.name: task for task in tasks}
        return balance.build(plain(recipe, f"optim.balance={rule}"), named, lambda _: 0.1)

    mask, edged = (Segmentation("mask", {"a": 1}, boundary=weight) for weight in (0.0, 0.1))
    age, wide = (Regression("age", uncertainty=kind) for kind in ("gaussian", "quantiles"))
    for tasks, words in (((mask, age), r"'age' may be negative \(uncertainty='gaussian'\)"),
                         ((edged, wide), r"'mask' may be negative \(boundary=0.1\)")):  # fmt: skip
        for rule in ("uncertainty", "gradnorm"):
            with pytest.raises(UserError, match=f"optim.balance '{rule}' needs losses of 0 and above.*{words}"):
                build(rule, *tasks)
        assert type(build("fixed", *tasks)) is balance.Fixed
    assert type(build("uncertainty", mask, wide)) is balance.Uncertainty
    assert type(build("gradnorm", mask, wide)) is balance.GradNorm
    assert type(build("uncertainty", age)) is balance.Fixed  # of a single task every rule is
    slope = jax.grad(lambda s: weighting.uncertainty_total(jnp.array([-1.0]), s, jnp.array([True])))
    assert (slope(jnp.array([0.0])) > 0).all()
    assert (slope(jnp.array([-5.0])) > 100).all()


def test_gradnorm_refuses_gradients_that_are_of_no_task(recipe: Path) -> None:
    kinds = {name: SimpleNamespace(kind="dense", weight=1.0) for name in "ab"}
    config = plain(recipe, "optim.balance=gradnorm", "semi.method=fixmatch")
    with pytest.raises(UserError, match="semi.method='fixmatch' adds one of its own"):
        balance.build(config, kinds, lambda _: 0.1)
