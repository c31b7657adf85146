"""Learning from examples without labels: who teaches, what the student is asked, and which cases have labels at all."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import layouts
import numpy as np
import pytest
from test_train import a_batch, close, load, make, plain, state_bytes

from medjax import main, optim, parallel, select, semi, train
from medjax import tasks as tasks_lib
from medjax.data import dataset, pipeline
from medjax.data.cases import Case
from medjax.data.sampler import Sampler, fewest
from medjax.errors import UserError

# --- what is compared ----------------------------------------------------------------------------------------------


def test_the_ramp_as_published() -> None:
    # exp(-5 (1 - t)^2) at t = 0, 1/4, 1/2, 1 and beyond.
    found = [float(semi.ramp(step, 400)) for step in (0, 100, 200, 400, 4000)]
    np.testing.assert_allclose(found, [0.00673795, 0.06005468, 0.28650480, 1.0, 1.0], rtol=1e-5)
    assert float(semi.ramp(0, 0)) == 1.0


def test_entropy_is_a_share_of_the_greatest() -> None:
    p = jnp.asarray([[1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    np.testing.assert_allclose(semi.entropy(p, "softmax")[:, 0], [1, 0, np.log(2) / np.log(3)], atol=1e-6)
    np.testing.assert_allclose(semi.entropy(jnp.asarray([0.5, 0.0, 1.0]), "sigmoid"), [1, 0, 0], atol=1e-6)
    assert not semi.entropy(jnp.asarray([3.0, -1.0]), "identity").any()


def test_consistency_is_a_weighted_mean_square() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 2, 4, 4, 4, 3)).astype(np.float32)
    weight = rng.integers(0, 2, (2, 4, 4, 4, 1)).astype(np.float32)
    want = [((a - b) ** 2)[i][weight[i, ..., 0] > 0].mean() for i in range(2)]
    np.testing.assert_allclose(semi.consistency(a, b, weight), want, rtol=1e-5)
    value, grad = jax.value_and_grad(lambda x: semi.consistency(x, b, 0 * weight).sum())(a)
    assert value == 0
    assert not np.asarray(grad).any()
    assert not np.asarray(jax.grad(lambda x: semi.consistency(x, b, weight).sum())(b)).any()


def test_overlap_is_of_structures_whatever_their_size() -> None:
    def volume(size: int, inside: float) -> np.ndarray:
        p = np.zeros((1, size, size, size, 2), np.float32)
        p[:, :4, :4, :4, 0] = inside
        return p

    one = np.ones((1, 1, 1, 1, 1), np.float32)
    # Uncertain, but the same: nothing to learn.
    np.testing.assert_allclose(semi.overlap_loss(volume(8, 0.5), volume(8, 0.5), one), [0.0], atol=1e-6)
    # 64 voxels of 0.5 against 1: (2 * 32 + 1) / (16 + 64 + 1); of the empty channel 1.
    want = [1 - (65 / 81 + 1) / 2]
    np.testing.assert_allclose(semi.overlap_loss(volume(8, 0.5), volume(8, 1.0), one), want, rtol=1e-5)
    np.testing.assert_allclose(semi.overlap_loss(volume(16, 0.5), volume(16, 1.0), one), want, rtol=1e-5)
    away = semi.consistency(volume(16, 0.5), volume(16, 1.0), one) / semi.consistency(
        volume(8, 0.5), volume(8, 1.0), one
    )
    np.testing.assert_allclose(away, [1 / 8], rtol=1e-5)
    # Voxels of no weight: as if both said nothing.
    weight = np.ones((1, 8, 8, 8, 1), np.float32)
    weight[:, :4, :4, :4] = 0
    np.testing.assert_allclose(semi.overlap_loss(volume(8, 0.5), volume(8, 1.0), weight), [0.0], atol=1e-6)


def test_pseudo_labels_count_where_the_teacher_is_confident() -> None:
    teacher = np.asarray([[[0.97, 0.02, 0.01], [0.5, 0.4, 0.1], [0.01, 0.01, 0.98]]], np.float32)
    logits = np.random.default_rng(0).normal(size=(1, 3, 3)).astype(np.float32)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = -(log_p[0, 0, 0] + log_p[0, 2, 2]) / 3  # the doubtful voxel counts as 0 in the mean over all three
    np.testing.assert_allclose(semi.pseudo_loss(logits, teacher, 0.95, "softmax"), [want], rtol=1e-5)
    p = 1 / (1 + np.exp(-logits[..., :1]))
    want = -(np.log(p[0, 0, 0]) + np.log(1 - p[0, 2, 0])) / 3
    np.testing.assert_allclose(semi.pseudo_loss(logits[..., :1], teacher[..., :1], 0.95, "sigmoid"), [want], rtol=1e-5)


# --- the step ------------------------------------------------------------------------------------------------------


def unlabelled(recipe: Path, method: str, *more: str) -> Any:
    """Plain SGD without augmentation or decay, half of the cases without labels."""
    base = (f"semi.method={method}", "semi.rampup=0 steps", "data.labelled=3", "optim.weight_decay=0.0")
    return plain(recipe, *base, *more)


def steps(config: Any, *batches: dict[str, np.ndarray]) -> tuple[list[Any], dict[str, float]]:
    """The states from the first on, and the sums of the last step."""
    step, create, mesh = make(config)
    states, sums = [jax.device_get(jax.jit(create)())], {}
    for batch in batches:
        state, sums = step(jax.device_put(states[-1]), parallel.put_batch(batch, mesh))
        states.append(jax.device_get(state))
    return states, {k: float(v) for k, v in sums.items()}


def same(a: Any, b: Any) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def half(n: int = 4) -> dict[str, np.ndarray]:
    """A batch whose first half is labelled."""
    batch = a_batch(n)
    batch["spheres/mask"][n // 2 :] = False
    return batch


def none(n: int = 4) -> dict[str, np.ndarray]:
    batch = a_batch(n)
    batch["spheres/mask"][:] = False
    return batch


def test_the_teacher_is_the_average_of_the_student(recipe: Path) -> None:
    states, sums = steps(unlabelled(recipe, "mean_teacher", "semi.ema=0.15", "optim.ema=0.5"), half(), half())
    average = states[0].params
    for number, state in enumerate(states[1:]):
        decay = min(0.15, (1 + number) / (10 + number))  # 0.1, then 0.15
        average = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, average, state.params)
        close(state.average, average, rtol=1e-5, atol=1e-7)
        assert state.eval_params is state.average
    assert sums["semi/spheres"] > 0
    assert sums["semi/ramp"] == 1


def test_examples_without_labels_give_no_supervised_gradient(recipe: Path) -> None:
    # With weight 0 nothing but the supervised loss is left.
    batch = half()
    other = {k: v.copy() for k, v in batch.items()}
    other["spheres/target"][2:] = 1
    config = unlabelled(recipe, "mean_teacher", "semi.weight=0.0")
    (_, clean), _ = steps(config, batch)
    assert same(clean.params, steps(config, other)[0][1].params)
    (_, alone), _ = steps(plain(recipe, "optim.weight_decay=0.0"), {k: v[:2] for k, v in batch.items()})
    close(clean.params, alone.params, rtol=1e-4, atol=1e-6)


def test_labelled_examples_alone_train_as_without(recipe: Path) -> None:
    config = unlabelled(recipe, "mean_teacher", "semi.ema=0.9")
    (_, taught), sums = steps(config, a_batch())
    (_, alone), wanted = steps(plain(recipe, "optim.weight_decay=0.0"), a_batch())
    assert sums["semi/spheres"] == 0
    assert sums["loss"] == wanted["loss"]
    # Another program: the same sums, perhaps in another order.
    close(taught.params, alone.params, rtol=1e-5, atol=1e-7)
    close(taught.average, alone.average, rtol=1e-5, atol=1e-7)


def test_equal_views_of_equal_networks_give_no_gradient(recipe: Path) -> None:
    (before, after), sums = steps(unlabelled(recipe, "mean_teacher", "semi.strong=()", "semi.noise=0.0"), none())
    assert sums["semi/spheres"] < 1e-12
    assert sums["loss"] < 1e-12
    close(before.params, after.params, rtol=0, atol=1e-7)
    # Views that differ do.
    (before, after), sums = steps(unlabelled(recipe, "mean_teacher"), none())
    assert sums["loss"] > 1e-7
    assert not same(before.params, after.params)


def test_the_teacher_may_be_compared_by_overlap(recipe: Path) -> None:
    more = ("semi.strong=()", "semi.noise=0.0", "semi.loss=dice")
    (before, after), sums = steps(unlabelled(recipe, "mean_teacher", *more), none())
    assert abs(sums["semi/spheres"]) < 1e-6
    close(before.params, after.params, rtol=0, atol=1e-6)
    (_, after), sums = steps(unlabelled(recipe, "mean_teacher", "semi.loss=dice", "semi.noise=1.0"), none())
    assert 0 < sums["semi/spheres"] < 1
    assert not same(before.params, after.params)


def test_the_mean_of_several_passes_teaches(recipe: Path) -> None:
    config = load(recipe, "semi.method=mean_teacher", "semi.passes=3", "semi.noise=0.0", "semi.rampup=0 steps")
    learner = semi.Semi(config, tasks_lib.build({"age": {"type": "regression"}}, {}), 0, [()])
    modes = []

    def forward(_: Any, image: Any, key: Any, train: bool) -> dict[str, Any]:
        modes.append(train)
        return {"age": [jax.random.normal(key, (2, 1))]}

    batch = {"semi/image": jnp.zeros((2, 4, 4, 4, 1)), "example": jnp.arange(2), "modality": jnp.ones((2, 1), bool)}
    batch["semi/age"] = jnp.ones(2, bool)
    own, key = np.asarray([[0.5], [-2.0]], np.float32), jax.random.key(7)
    _, parts = learner.loss(forward, {"age": [own]}, None, batch, {"semi/age": 0.5}, key, 0)
    # The loss of the mean is not the mean of the losses.
    said = [np.asarray(jax.random.normal(jax.random.fold_in(key, k), (2, 1))) for k in (1, 2, 3)]
    assert float(parts["semi/age"]) == pytest.approx(0.5 * np.square(own - np.mean(said, axis=0)).sum(), rel=1e-5)
    assert modes
    assert all(modes), "with dropout, in which the passes differ"


@pytest.mark.parametrize("uncertainty", ["threshold", "entropy", "none"])
def test_what_counts_as_certain_by_hand(recipe: Path, uncertainty: str) -> None:
    """The weights at ramps of 0, 1/2 and 1; and the loss of a task of each kind, while the ramp goes up."""
    config = load(recipe, "semi.method=mean_teacher", f"semi.uncertainty={uncertainty}", "semi.noise=0.0")
    kinds = {"organ": "segmentation", "grade": "classification", "age": "regression"}
    job = {name: {"type": kind} for name, kind in kinds.items()} | {"flags": {"type": "segmentation", "regions": {}}}
    job["flags"]["regions"] = {"low": ("low",), "all": ("low", "high")}
    job["grade"]["names"] = ("a", "b", "c")
    built = tasks_lib.build(job, {"low": 1, "high": 2})
    assert [built[name].activation for name in job] == ["softmax", "softmax", "identity", "sigmoid"]
    learner = semi.Semi(config, built, 400, [()])

    shares = np.asarray([[0.0], [0.5], [0.75], [0.76], [0.87], [0.88], [1.0]], np.float32)
    want = {
        "threshold": {0.0: [1, 1, 1, 0, 0, 0, 0], 0.5: [1, 1, 1, 1, 1, 0, 0], 1.0: [1] * 7},
        "entropy": dict.fromkeys((0.0, 0.5, 1.0), 1 - shares[:, 0]),
        "none": dict.fromkeys((0.0, 0.5, 1.0), [1] * 7),
    }[uncertainty]
    for rise, weights in want.items():
        np.testing.assert_allclose(learner._certainty(jnp.asarray(shares), rise)[:, 0], weights, rtol=1e-6)

    rng = np.random.default_rng(0)
    shapes = {"organ": (2, 4, 4, 4, 3), "grade": (2, 3), "age": (2, 1), "flags": (2, 4, 4, 4, 2)}
    own, theirs = ({name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()} for _ in range(2))
    batch = {"semi/image": jnp.zeros((2, 4, 4, 4, 1)), "example": jnp.arange(2), "modality": jnp.ones((2, 1), bool)}
    batch |= {f"semi/{name}": jnp.ones(2, bool) for name in job}
    forward = lambda *_, **__: {name: [x] for name, x in theirs.items()}  # noqa: E731
    mine = {name: [x] for name, x in own.items()}
    share = dict.fromkeys(learner.masks, 1.0)
    for step, rise in ((0, np.exp(-5)), (200, np.exp(-1.25)), (400, 1.0)):
        total, parts = learner.loss(forward, mine, None, batch, share, jax.random.key(0), step)
        for name, task in built.items():
            p, q = (np.asarray(semi.said(x[name], task.activation), np.float64) for x in (own, theirs))
            if task.activation == "softmax":
                share_of = -(q * np.log(q)).sum(-1, keepdims=True) / np.log(3)
            elif task.activation == "sigmoid":
                share_of = -(q * np.log2(q) + (1 - q) * np.log2(1 - q))
            else:
                share_of = np.zeros_like(q)
            weight = {"threshold": share_of <= 0.75 + 0.25 * rise, "entropy": 1 - share_of}.get(uncertainty, 1.0)
            weight = np.broadcast_to(weight, p.shape).astype(float)
            each = [(w * (a - b) ** 2).sum() / max(w.sum(), 1e-9) for w, a, b in zip(weight, p, q, strict=True)]
            assert float(parts[f"semi/{name}"]) == pytest.approx(sum(each), rel=1e-4, abs=1e-7)
        assert float(total) == pytest.approx(config.semi.weight * rise * sum(map(float, parts.values())), rel=1e-5)


def test_the_teachers_noise_leaves_absent_modalities_alone(recipe: Path) -> None:
    config = load(recipe, "semi.method=mean_teacher", "semi.rampup=0 steps")
    built = tasks_lib.build({"age": {"type": "regression"}}, {})
    learner, seen = semi.Semi(config, built, 0, [()]), []

    def forward(_: Any, image: Any, key: Any, train: bool) -> dict[str, Any]:
        seen.append(np.asarray(image))
        return {"age": [jnp.zeros((2, 1))]}

    batch = {"semi/image": jnp.zeros((2, 6, 6, 6, 2)), "example": jnp.arange(2), "semi/age": jnp.ones(2, bool)}
    batch["modality"] = jnp.asarray([[True, False], [True, True]])
    learner.loss(forward, {"age": [jnp.ones((2, 1))]}, None, batch, {"semi/age": 0.5}, jax.random.key(0), 0)
    assert not seen[0][0, ..., 1].any()
    for row, channel in ((0, 0), (1, 0), (1, 1)):
        noise = seen[0][row, ..., channel]
        assert 0.07 < noise.std() < 0.11  # 0.1, cut at 0.2
        assert np.abs(noise).max() <= 0.2 + 1e-6


def test_fixmatch_asks_for_what_is_confident(recipe: Path) -> None:
    (before, after), sums = steps(unlabelled(recipe, "fixmatch", "semi.threshold=1.0"), none())
    assert sums["loss"] == 0
    assert same(before.params, after.params)
    (before, after), sums = steps(unlabelled(recipe, "fixmatch", "semi.threshold=0.0"), none())
    # A fresh network knows nothing: the cross-entropy of three classes with its own favourite is below log 3.
    assert 0.1 < sums["semi/spheres"] < 1.3
    assert not same(before.params, after.params)


def test_two_networks_teach_each_other(recipe: Path) -> None:
    config = unlabelled(recipe, "cps", "tasks.spheres.regions={'all': ('shell', 'core'), 'core': ('core',)}")
    states, sums = steps(config, none(), half())
    assert not same(states[0].params, states[0].twin[0])
    for before, after in itertools.pairwise(states):
        assert not same(before.params, after.params)
        assert not same(before.twin[0], after.twin[0])
    # The optimizer of each is fed by its own gradient alone: exchanging the two exchanges what comes out.
    step, _, mesh = make(config)
    first = states[1]
    swapped = first.replace(params=first.twin[0], opt_state=first.twin[1], twin=(first.params, first.opt_state))
    after, again = step(jax.device_put(swapped), parallel.put_batch(half(), mesh))
    close(after.params, states[2].twin[0], rtol=1e-5, atol=1e-7)
    close(after.twin[0], states[2].params, rtol=1e-5, atol=1e-7)
    assert float(again["loss"]) == pytest.approx(sums["loss"], rel=1e-5)


def test_a_second_network_that_overflows_is_not_updated(recipe: Path) -> None:
    config = unlabelled(recipe, "cps", "semi.weight=0.0")
    step, create, mesh = make(config)
    state = jax.device_get(jax.jit(create)())
    wild = jax.tree.map(np.copy, state.twin[0])
    # A finite loss, and a gradient whose norm is beyond float32.
    wild["heads_spheres"]["level0"]["kernel"] *= np.float32(1e25)
    before = state.replace(twin=(wild, state.twin[1]))
    after, sums = jax.device_get(step(jax.device_put(before), parallel.put_batch(half(), mesh)))
    assert np.isfinite(sums["loss"])
    assert np.isfinite(sums["grad_norm"])
    assert sums["skipped"]
    assert same(after.twin[0], wild)
    assert same(after.params, before.params)


def test_rounds_leave_the_step_as_it_is(recipe: Path) -> None:
    batch = half(4)
    batch["spheres/mask"][:] = [True, False, False, False]  # rounds hold different numbers of each
    (_, whole), sums = steps(unlabelled(recipe, "mean_teacher"), batch)
    (_, cut), cut_sums = steps(unlabelled(recipe, "mean_teacher", "optim.accumulate=2"), batch)
    close(whole.params, cut.params, rtol=1e-4, atol=1e-6)
    assert cut_sums["loss"] == pytest.approx(sums["loss"], rel=1e-5)
    assert cut_sums["semi/ramp"] == sums["semi/ramp"] == 1


# Drawn for each example, and quick to compile.
SOME = "semi.strong=(('brightness', {'p': 0.5, 'std': 0.5}), ('noise', {'p': 0.5, 'std': 0.2}))"


@pytest.mark.parametrize(
    ("method", "known", "more"),
    [
        ("mean_teacher", [True, False, True, True], ()),  # fewer are compared than there is room for
        ("mean_teacher", [True, False, True, False], ("optim.accumulate=2",)),
        ("fixmatch", [False, True, False, True], ("semi.threshold=0.0",)),
    ],
)
def test_the_teacher_of_fewer_rows_teaches_the_same(
    recipe: Path, method: str, known: list[bool], more: tuple[str, ...]
) -> None:
    batch = a_batch()
    batch["spheres/mask"][:] = known
    (_, whole), sums = steps(unlabelled(recipe, method, SOME, *more), batch)
    (_, fewer), fewer_sums = steps(unlabelled(recipe, method, SOME, "data.sampling.labelled=0.5", *more), batch)
    assert sums["semi/spheres"] > 0
    assert fewer_sums == pytest.approx(sums, rel=1e-5)
    # Plain SGD: the parameters differ as the gradients do.
    close(fewer.params, whole.params, rtol=1e-5, atol=1e-7)


def learner_of(recipe: Path, tasks: Any, labelled: Any, *more: str, consecutive: bool = True) -> semi.Semi:
    config = load(recipe, "semi.method=mean_teacher", "semi.rampup=0 steps", "semi.noise=0.0", *more)
    built = tasks_lib.build({name: {"type": "regression"} for name in tasks}, {})
    return semi.Semi(config, built, 0, labelled, consecutive)


def rows_taught(learner: semi.Semi, **known: list[bool]) -> list[float]:
    """The examples that the teacher of a batch sees; `semi.Semi.views` makes its view of the image."""
    n = len(next(iter(known.values())))
    seen: list[float] = []

    def forward(_: Any, image: Any, key: Any, train: bool) -> dict[str, Any]:
        seen.extend(np.asarray(image)[:, 0, 0, 0, 0])
        return {name: [jnp.zeros((len(image), 1))] for name in known}

    image = jnp.broadcast_to(jnp.arange(n, dtype=jnp.float32).reshape(n, 1, 1, 1, 1), (n, 4, 4, 4, 1))
    batch = {"image": image, "example": jnp.arange(n), "valid": jnp.ones(n, bool), "modality": jnp.ones((n, 1), bool)}
    batch |= {"spacing": jnp.ones((n, 3))} | {f"{name}/mask": jnp.asarray(mask) for name, mask in known.items()}
    batch = learner.views(batch)
    assert np.array_equal(batch["semi/image"], image)
    compared = np.any([batch[key] for key in learner.masks], axis=0)
    changed = np.any(np.asarray(batch["image"] != image).reshape(n, -1), axis=1)
    assert np.array_equal(changed, compared)  # the strong view, of those alone
    # Squares of the students' outputs: a sum that says which rows it is of.
    own = {name: [10.0 ** jnp.arange(n)[:, None]] for name in known}
    share = dict.fromkeys(learner.masks, 1.0)
    _, parts = learner.loss(forward, own, None, batch, share, jax.random.key(0), 0)
    for key in learner.masks:
        assert float(parts[key]) == pytest.approx(sum(100.0**i for i in np.flatnonzero(batch[key])), rel=1e-5)
    return seen


ALWAYS = "semi.strong=(('brightness', {'p': 1.0, 'std': 0.5}), ('noise', {'p': 1.0}))"


def test_rows_that_nobody_compares_are_not_taught(recipe: Path) -> None:
    bare, labelled = ((), ("age",)), ("data.sampling.labelled=0.5", ALWAYS)
    half = learner_of(recipe, ("age",), bare, *labelled)
    assert rows_taught(half, age=[True, False, True, False]) == [1, 3]
    assert rows_taught(half, age=[False, False, True, True]) == [0, 1]
    assert sorted(rows_taught(half, age=[True, True, True, False])) == [0, 3]  # as many rows in every batch
    assert len(rows_taught(half, age=[True, False, False])) == 2  # of three examples one is labelled at least
    few = learner_of(recipe, ("age",), bare, "data.sampling.labelled=0.3", ALWAYS)
    assert len(rows_taught(few, age=[True, False, False, False])) == 3
    # All rows: labelled examples are compared; a case lacks one label of two; every n-th row, or several devices.
    for every in (
        learner_of(recipe, ("age",), bare, *labelled, "semi.cases=all"),
        learner_of(recipe, ("age",), bare, *labelled, consecutive=False),
        learner_of(recipe, ("age",), bare, ALWAYS),
    ):
        assert rows_taught(every, age=[True, False, True, False]) == [0, 1, 2, 3]
    two = learner_of(recipe, ("age", "size"), ((), ("age",), ("age", "size")), *labelled)
    assert rows_taught(two, age=[True, True, False, False], size=[False, True, False, False]) == [0, 1, 2, 3]
    both = learner_of(recipe, ("age", "size"), ((), ("age", "size")), *labelled)
    assert rows_taught(both, age=[True, True, False, False], size=[True, True, False, False]) == [2, 3]


def test_of_all_cases_the_student_sees_another_view_than_the_teacher(recipe: Path) -> None:
    # Without noise and without a step between them, teacher and student differ by their views alone.
    config = ("semi.noise=0.0", "semi.cases=all", "semi.weight=5.0")
    (_, taught), sums = steps(unlabelled(recipe, "mean_teacher", ALWAYS, *config), a_batch())
    _, same_view = steps(unlabelled(recipe, "mean_teacher", "semi.strong=()", *config), a_batch())
    assert sums["semi/spheres"] > 1e-7 > 1e-12 > same_view["semi/spheres"]
    # Labels are learnt on the student's view.
    (_, alone), _ = steps(unlabelled(recipe, "mean_teacher", ALWAYS, "semi.cases=all", "semi.weight=0.0"), a_batch())
    (_, weak), _ = steps(plain(recipe, "optim.weight_decay=0.0"), a_batch())
    assert not same(alone.params, weak.params)
    assert not same(alone.params, taught.params)


def test_a_teacher_of_few_rows_teaches_on_several_devices_as_on_one(recipe: Path, tmp_path: Path) -> None:
    given = (
        "semi.method=mean_teacher", "semi.rampup=2 steps", "semi.weight=5.0", "data.labelled=2",
        "data.sampling.labelled=0.5", "train.total=4 steps", "optim.name=sgd", SOME,
    )  # fmt: skip

    def call(name: str, *more: str) -> list[str]:
        return layouts.arguments(recipe, tmp_path / name, *layouts.BARE, *given, *more)

    started = layouts.start([call("one")], devices=1, log=tmp_path / "one.log")
    started += layouts.start([call("jit"), call("pmap", "parallel=pmap")], devices=2, log=tmp_path / "two.log")
    assert [process.wait() for process in started] == [0, 0], (tmp_path / "two.log.0").read_text()
    want = layouts.losses(tmp_path / "one")
    assert len(want) == 4
    for name in ("jit", "pmap"):
        assert layouts.losses(tmp_path / name) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("method", ["mean_teacher", "cps"])
def test_an_interrupted_run_ends_bit_identical(
    recipe: Path, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [
        f"--config={recipe}", f"--config.semi.method={method}", "--config.semi.rampup=6 steps",
        "--config.data.labelled=2", "--config.data.sampling.labelled=0.5", "--config.train.total=5 steps",
        "--config.train.eval_every=5 steps", "--config.eval.splits=('val',)", "--config.eval.pictures=false",
        "--config.eval.predictions=false",
    ]  # fmt: skip
    main.main([*command, f"--workdir={tmp_path / 'whole'}"])
    write = train.Metrics.write

    def fail(self: Any, step: int, values: Any) -> None:
        if step == 4:
            raise RuntimeError("stopped")
        write(self, step, values)

    with monkeypatch.context() as patch:
        patch.setattr(train.Metrics, "write", fail)
        with pytest.raises(RuntimeError, match="stopped"):
            main.main([*command, f"--workdir={tmp_path / 'cut'}"])
    main.main([*command, f"--workdir={tmp_path / 'cut'}"])
    assert state_bytes(tmp_path / "cut") == state_bytes(tmp_path / "whole")


def test_a_class_and_a_number_of_a_case_are_compared_too(recipe: Path) -> None:
    config = load(recipe, "semi.method=mean_teacher", "semi.rampup=0 steps", "semi.uncertainty=none")
    built = tasks_lib.build(
        {
            "grade": {"type": "classification", "names": ("1", "2", "3"), "problem": "ordinal"},
            "age": {"type": "regression", "weight": 0.5},
            "nodule": {"type": "detection", "names": ("nodule",)},
        },
        {},
    )
    learner = semi.Semi(config, built, 0, [()])
    assert learner.masks == ("semi/grade", "semi/age")  # boxes cannot be compared one by one
    batch = {"semi/image": jnp.zeros((2, 1, 1, 1, 1)), "example": jnp.arange(2), "modality": jnp.ones((2, 1), bool)}
    batch |= {key: jnp.asarray([True, False]) for key in learner.masks}
    own = {"grade": [jnp.asarray([[0.0, 2.0], [5.0, 5.0]])], "age": [jnp.asarray([[1.0], [9.0]])]}
    taught = {"grade": [jnp.asarray([[0.0, 0.0], [0.0, 0.0]])], "age": [jnp.asarray([[3.0], [0.0]])]}
    share = dict.fromkeys(learner.masks, 1.0)
    total, parts = learner.loss(lambda *_, train: taught, own, None, batch, share, jax.random.key(0), 0)
    grade = (1 / (1 + np.exp(-2.0)) - 0.5) ** 2 / 2
    np.testing.assert_allclose([parts["semi/grade"], parts["semi/age"], total], [grade, 4, grade + 2], rtol=1e-5)
    with pytest.raises(UserError, match="semi.method='fixmatch': no task"):
        semi.Semi(load(recipe, "semi.method=fixmatch"), {"age": built["age"]}, 0, [()])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["semi.method=meanteacher"], ["semi.method 'meanteacher'", "mean_teacher"]),
        (["semi.method=fixmatch"], ["every training case has its labels", "data.labelled", "semi.cases='all'"]),
        (["semi.method=fixmatch", "data.labelled=2", "semi.threshold=95.0"], ["semi.threshold=95.0", "from 0 to 1"]),
        (["semi.method=mean_teacher", "data.labelled=2", "semi.ema=1.5"], ["semi.ema=1.5", "less than 1"]),
        # A teacher of decay 1 would never learn.
        (["semi.method=mean_teacher", "data.labelled=2", "semi.ema=1.0"], ["semi.ema=1.0", "less than 1"]),
        (["semi.method=mean_teacher", "data.labelled=2", "semi.passes=0"], ["semi.passes=0"]),
        (["semi.method=mean_teacher", "data.labelled=2", "semi.cases=some"], ["semi.cases 'some'", "unlabelled"]),
        (["semi.method=mean_teacher", "data.labelled=2", "semi.loss=l1"], ["semi.loss 'l1'", "mse, dice"]),
        (["semi.method=fixmatch", "data.labelled=2", "semi.loss=dice"], ["semi.loss='dice' is how the mean teacher"]),
        (["semi.method=fixmatch", "data.labelled=2", "semi.passes=4"], ["semi.passes=4 is of the mean teacher"]),
        (["semi.method=cps", "data.labelled=2", "semi.uncertainty=none"], ["semi.uncertainty='none' is of the mean"]),
        (["semi.method=fixmatch", "data.labelled=2", "semi.strong=(('affine', {}),)"], ["'affine' changes more"]),
        (["semi.method=fixmatch", "data.labelled=2", "semi.strong=(('cutmix', {}),)"], ["'cutmix' changes more"]),
        (["data.labelled=7"], ["data.labelled=7", "1 to 6"]),
        (["data.labelled=-1"], ["data.labelled=-1"]),
    ],
)
def test_what_cannot_work_is_refused_in_words(recipe: Path, overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make(load(recipe, *overrides))
    assert all(word in str(caught.value) for word in words), str(caught.value)


# --- which cases have labels ---------------------------------------------------------------------------------------


def cases(n: int, twins: bool = False) -> tuple[Case, ...]:
    return tuple(Case(f"c{i}", f"p{i // 2 if twins else i}", {"T1": Path(f"{i}")}, {"organ": 1}) for i in range(n))


def known(splits: Any) -> list[str]:
    return [case.id for case in splits["train"] if case.targets]


def test_fewer_labels_are_among_more_and_none_is_lost_on_the_way() -> None:
    splits = {"train": cases(30), "val": cases(3)}
    chosen = {n: known(dataset.hide_labels(splits, n, True, 4)) for n in (3, 5, 10, 20, 30)}
    assert [len(ids) for ids in chosen.values()] == [3, 5, 10, 20, 30]
    for few, more in zip(chosen.values(), list(chosen.values())[1:], strict=False):
        assert set(few) < set(more)
    found = dataset.hide_labels(splits, 5, True, 4)
    assert [c.id for c in found["train"]] == [c.id for c in splits["train"]]
    assert found["val"] == splits["val"]
    assert [c.id for c in dataset.hide_labels(splits, 5, False, 4)["train"]] == chosen[5]
    assert dataset.hide_labels(splits, 0, False, 4) == splits
    others = [known(dataset.hide_labels(splits, 5, True, seed)) for seed in range(20)]
    assert len({tuple(ids) for ids in others}) > 15
    # A patient that is added changes nobody else's place.
    more = {"train": (*splits["train"], Case("new", "new", {}, {"organ": 1}))}
    assert set(known(dataset.hide_labels(more, 6, True, 4))) - {"new"} <= set(chosen[10])


def test_patients_are_counted_and_only_those_with_labels() -> None:
    splits = {"train": (*cases(8, twins=True), Case("bare", "bare", {}))}
    found = known(dataset.hide_labels(splits, 2, True, 0))
    assert len(found) == 4
    assert len({id for id in found if id != "bare"}) == 4
    with pytest.raises(UserError, match="1 to 4"):
        dataset.hide_labels(splits, 5, True, 0)


def test_labels_are_the_targets_of_the_tasks() -> None:
    """60 patients, all of known age; five have the organ too."""
    masks = {"p07", "p19", "p23", "p31", "p58"}
    names = [f"p{i:02}" for i in range(60)]
    splits = {"train": tuple(
        Case(n, n, {}, {"age": 50.0, **({"organ": Path(n)} if n in masks else {})}) for n in names
    )}  # fmt: skip
    chosen = {n: known(dataset.hide_labels(splits, n, True, 0, ("organ", "mae"))) for n in (1, 3, 5)}
    assert set(chosen[1]) < set(chosen[3]) < set(chosen[5]) == masks
    with pytest.raises(UserError, match="data.labelled=6: needs a number from 1 to 5"):
        dataset.hide_labels(splits, 6, True, 0, ("organ",))
    # Of both tasks: who has both comes first, whoever else is asked for.
    both = {n: set(known(dataset.hide_labels(splits, n, True, 0, ("organ", "age")))) for n in (3, 5, 20)}
    assert both[3] < both[5] == masks < both[20]
    # Where all have the same it is the order by (seed, patient) alone, whatever else they have.
    assert known(dataset.hide_labels(splits, 7, True, 0, ("age",))) == known(
        dataset.hide_labels({"train": tuple(Case(n, n, {}, {"age": 1.0}) for n in names)}, 7, True, 0)
    )


def test_cases_without_labels_are_left_out_where_all_labels_are_used() -> None:
    bare = tuple(Case(f"bare{i}", f"bare{i}", {}) for i in range(55))
    splits = {"train": (*cases(5), *bare, Case("old", "old", {}, {"age": 80.0})), "val": bare[:2]}
    found = dataset.hide_labels(splits, 0, False, 0, ("organ",))
    assert found == {"train": cases(5), "val": bare[:2]}
    assert dataset.hide_labels(splits, 5, False, 0, ("organ",)) == found
    assert dataset.hide_labels(splits, 0, True, 0, ("organ",)) == splits
    # Pretraining has no labels to lack.
    assert dataset.hide_labels({"train": bare}, 0, False, 0, ("mae",)) == {"train": bare}


@pytest.mark.parametrize(("share", "batch"), [(0.5, 4), (0.25, 4), (1 / 3, 4), (1.0, 2)])
def test_the_labelled_share_is_exact_in_batches_and_over_time(share: float, batch: int) -> None:
    sampler = Sampler(1, 20, foreground=0.33, share=share, labelled=(3, 7, 11))
    taken = np.array([sampler.case(n) for n in range(1200)])
    labelled = np.isin(taken, (3, 7, 11))
    for first, last in ((0, 1200), (17, 400), (900, 1200)):
        assert abs(labelled[first:last].sum() - share * (last - first)) <= 1
    if (share * batch).is_integer():
        assert set(labelled.reshape(-1, batch).sum(1)) == {share * batch}
    counts = Counter(taken.tolist())
    for group in ((3, 7, 11), [i for i in range(20) if i not in (3, 7, 11)] if share < 1 else ()):
        of = [counts[i] for i in group]
        assert not of or max(of) - min(of) <= 1
    # Foreground is asked of labelled examples alone, in its exact share of them.
    foreground = np.array([sampler.is_foreground(n) for n in range(1200)])
    assert not (foreground & ~labelled).any()
    assert abs(foreground.sum() - 0.33 * labelled.sum()) <= 1
    again = Sampler(1, 20, foreground=0.33, share=share, labelled=(3, 7, 11))
    assert [again.case(n) for n in (1199, 5, 600)] == [taken[n] for n in (1199, 5, 600)]


@pytest.mark.parametrize("share", [0.5, 0.25, 1 / 3, 0.1, 0.77, 1.0])
def test_of_examples_in_a_row_so_many_are_labelled_at_least(share: float) -> None:
    sampler = Sampler(1, 9, share=share, labelled=(3, 7))
    labelled = np.array([sampler.case(n) in (3, 7) for n in range(700)])
    for rows in (1, 2, 3, 4, 10, 64):
        counts = {int(labelled[first : first + rows].sum()) for first in range(len(labelled) - rows)}
        assert min(counts) == fewest(share, rows) or (1 / 3, rows % 3) == (share, 0)
        assert fewest(share, rows) <= min(counts) <= max(counts) <= fewest(share, rows) + 1


def test_classes_are_balanced_among_the_labelled() -> None:
    classes = {("organ", 1): 1.0, ("organ", 2): 1.0}
    holders = {("organ", 1): (3, 7), ("organ", 2): (7,)}
    sampler = Sampler(2, 9, 0.5, (), classes, holders, share=0.5, labelled=(3, 7))
    drawn = [sampler.draw(n) for n in range(800)]
    assert sum(key == ("organ", 2) for _, key in drawn) == pytest.approx(100, abs=2)
    assert all((key is not None) == sampler.is_foreground(n) for n, (_, key) in enumerate(drawn))
    assert all(case in holders[key] for case, key in drawn if key)
    assert sum(case in (3, 7) for case, _ in drawn) == 400


class Prepared:
    def __init__(self, known: bool) -> None:
        self.image, self.present = np.zeros((4, 4, 4, 1), np.float32), (True,)
        self.targets = {"organ": np.ones((4, 4, 4), np.uint8)} if known else {}


def test_the_pipeline_asks_for_the_share(capsys: pytest.CaptureFixture) -> None:
    members = [Prepared(i % 3 == 0) for i in range(9)]
    spec = {"classes": "present", "balance": "", "weight": "", "labelled": 0.5}
    common: dict[str, Any] = {"foreground": 0.5, "labels": {"organ": 1}}
    sampler = pipeline.make_sampler(0, pipeline.Source(members, ("organ",)), cases(9), sampling=spec, **common)
    assert (sampler.share, sampler.labelled) == (0.5, (0, 3, 6))
    full = pipeline.Source([Prepared(True)] * 9, ("organ",))
    assert pipeline.make_sampler(0, full, cases(9), sampling=spec, **common).share == 0
    assert "every training case has a label" in capsys.readouterr().err
    for bad, words in (({"labelled": 1.5}, "labelled=1.5"), ({"labelled": -0.5}, "labelled=-0.5")):
        with pytest.raises(UserError, match=words):
            pipeline.make_sampler(0, full, cases(9), sampling=spec | bad, **common)
    with pytest.raises(UserError, match=r"data.buckets"):
        pipeline.make_sampler(0, full, cases(9), sampling=spec, buckets=[(4, 4, 4)], **common)


def test_the_average_keeps_its_decay_elsewhere(recipe: Path) -> None:
    assert semi.average_decay(load(recipe)) == 0.9
    assert semi.average_decay(load(recipe, "semi.method=fixmatch")) == 0.9
    assert semi.average_decay(load(recipe, "semi.method=mean_teacher")) == 0.99
    with pytest.raises(UserError, match=r"optim.ema=-0.5: needs a number from 0 on, less than 1"):
        semi.average_decay(load(recipe, "optim.ema=-0.5"))
    assert float(optim.ema(jnp.ones(()), jnp.zeros(()), 0.99, 10**6)) == pytest.approx(0.99)


@pytest.mark.real
def test_the_recipe_of_few_labels_trains_and_chooses(data_root: Path, tmp_path: Path) -> None:
    recipe = Path(__file__).resolve().parents[1] / "configs" / "hippocampus_fewshot.py"
    arg = f"debug,labels=3,data={data_root / 'hippocampus'}"
    main.main([f"--config={recipe}:{arg}", f"--workdir={tmp_path}", "--config.eval.pictures=false"])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["train/semi/hippocampus"]) for row in rows if "train/loss" in row)
    select.main([str(tmp_path), str(data_root / "hippocampus"), "--count=2", "--pool=0"])
    table = (tmp_path / "select.csv").read_text().splitlines()
    assert len(table) == 1 + 177  # 180 training cases, 3 with labels
