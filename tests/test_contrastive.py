"""Contrastive pretraining: the losses by their definitions, views that are keyed by example, places that correspond."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_masked import batch_of, parameters, prepared
from tiny import RECIPE, write_cohort

from medjax import config as config_lib
from medjax import job as job_lib
from medjax import main, models, parallel, tasks
from medjax.errors import UserError
from medjax.losses import contrastive as losses
from medjax.models.heads import log_share
from medjax.models.layers import InstanceNormAct
from medjax.models.model import Model
from medjax.models.pretext import ContrastHead
from medjax.models.unet import UNet
from medjax.pretext import Examiner
from medjax.tasks.contrastive import Contrastive

RNG = np.random.default_rng(0)
# Every voxel is its own number: a view tells where it comes from.
PLACES = jnp.stack([jnp.arange(16**3, dtype=jnp.float32).reshape(16, 16, 16, 1)] * 3)


def test_info_nce_by_hand() -> None:
    a, b = RNG.normal(size=(2, 4, 5))
    real = np.array([True, True, False, True])
    loss, found = losses.info_nce(jnp.asarray(a), jnp.asarray(b), 0.2, jnp.asarray(real))
    z = np.concatenate([a, b])
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    there = np.concatenate([real, real])
    for i in np.flatnonzero(real):
        wanted, hits = [], []
        for me, partner in ((i, i + 4), (i + 4, i)):
            others = [j for j in range(8) if j != me and there[j]]
            cosines = np.array([z[me] @ z[j] / 0.2 for j in others])
            wanted.append(np.log(np.exp(cosines).sum()) - z[me] @ z[partner] / 0.2)
            hits.append(others[int(cosines.argmax())] == partner)
        assert float(loss[i]) == pytest.approx(np.mean(wanted), rel=1e-5)
        assert float(found[i]) == np.mean(hits)
    assert np.isfinite(np.asarray(loss)).all()


def test_doubles_are_no_negatives() -> None:
    """Rows drawn twice: as if they had been drawn once, but that each of the two is asked."""
    a, b = (jnp.asarray(v) for v in RNG.normal(size=(2, 3, 5)))
    once, found = losses.info_nce(a, b, 0.2, jnp.ones(3, bool))
    twice = jnp.asarray([0, 1, 2, 1])
    which = jnp.concatenate([twice, 10 + twice])
    loss, again = losses.info_nce(a[twice], b[twice], 0.2, jnp.ones(4, bool), which)
    # Of rows 1 and 3 neither sees the other; rows 0 and 2 see both.
    np.testing.assert_allclose(loss[1], once[1], rtol=1e-5)
    np.testing.assert_allclose(loss[3], once[1], rtol=1e-5)
    assert float(again[1]) == float(found[1])
    wrong, _ = losses.info_nce(a[twice], b[twice], 0.2, jnp.ones(4, bool))
    assert float(wrong[1]) > float(loss[1]) + 0.1


def test_places_of_a_coarse_voxel_are_one() -> None:
    """A network whose finest level is 4 times coarser: places in one voxel have one vector, and no quarrel."""

    class Coarse(nn.Module):
        def total_factor(self) -> tuple[int, int, int]:
            return (4, 4, 4)

        @nn.compact
        def __call__(self, x: Any, *, train: bool = False) -> Any:
            return [x[:, ::4, ::4, ::4]]

    task = Contrastive("c", scope="local", mirror=(), transforms=(), places=80, features=6, hidden=8)
    model = Model(Coarse(), {"c": task.head()})
    image = jnp.asarray(RNG.normal(size=(2, 16, 16, 16, 3)), jnp.float32)
    params = parameters(model, image, train=True)
    batch = prepared(task, 0, batch_of(image))
    outputs: Any = jax.jit(
        lambda b: model.apply(params, b["image"], train=True, views=tasks.views({"c": task}, b))["c"]
    )(batch)
    vectors, cells = outputs
    assert cells.shape == (2, 2, 80)
    places = np.asarray(batch["c/places"]) // 4
    wanted = np.ravel_multi_index(tuple(np.moveaxis(places, -1, 0)), (4, 4, 4)) + 64 * np.arange(4).reshape(2, 2, 1)
    np.testing.assert_array_equal(cells, wanted)
    # 80 places in 64 voxels, the same in both views as nothing is cut or mirrored: every partner is found.
    assert len(np.unique(wanted[0, 0])) < 80
    measured = task.measure(outputs, batch)
    np.testing.assert_array_equal(measured["found"], 1)
    apart = task.measure([vectors, jnp.arange(320).reshape(2, 2, 80)], batch)
    assert (np.asarray(apart["found"]) < 0.8).all()
    assert (np.asarray(measured["error"]) < np.asarray(apart["error"])).all()


def test_vicreg_by_hand() -> None:
    a, b = RNG.normal(size=(2, 6, 4))
    real = np.array([True] * 5 + [False])
    loss = losses.vicreg(jnp.asarray(a), jnp.asarray(b), jnp.asarray(real), (25.0, 25.0, 1.0))
    wanted = 25 * np.square(a - b).mean(1)
    for x in (a[:5], b[:5]):
        covariance = np.cov(x.T)
        wanted = wanted + 12.5 * np.maximum(0, 1 - np.sqrt(np.diag(covariance) + 1e-4)).mean()
        wanted = wanted + np.square(covariance - np.diag(np.diag(covariance))).sum() / 4
    np.testing.assert_allclose(loss[:5], wanted[:5], rtol=1e-4)
    # Constant vectors are equal, and no answer: the variance says so.
    still = losses.vicreg(jnp.ones((6, 4)), jnp.ones((6, 4)), jnp.ones(6, bool))
    assert float(still[0]) == pytest.approx(25 * (1 - 0.01), rel=1e-4)


def test_info_nce_prefers_partners() -> None:
    a = jnp.asarray(RNG.normal(size=(8, 16)))
    near, _ = losses.info_nce(a, a + 0.01, 0.1, jnp.ones(8, bool))
    far, found = losses.info_nce(a, jnp.roll(a, 1, axis=0), 0.1, jnp.ones(8, bool))
    assert float(near.mean()) < 0.1 < float(far.mean())
    assert float(found.sum()) == 0


def test_places_show_the_same_voxel() -> None:
    task = Contrastive("c", scope="local", crop=(12, 10, 16), mirror=(0, 1, 2), transforms=(), places=20)
    batch = prepared(task, 0, batch_of(PLACES))
    views, places = batch["c/views"], np.asarray(batch["c/places"])
    assert views.shape == (3, 2, 12, 10, 16, 1)
    assert places.shape == (3, 2, 20, 3)
    for row in range(3):
        values = [[float(views[(row, i, *at, 0)]) for at in places[row, i]] for i in (0, 1)]
        assert values[0] == values[1]
        assert len(set(values[0])) > 10
    assert len({tuple(np.asarray(views)[row, i, 0, 0, :2, 0]) for row in range(3) for i in (0, 1)}) > 3


def test_views_are_keyed_by_example() -> None:
    task = Contrastive("c", crop=(12, 12, 12), transforms=(("noise", {"std": 0.1}), ("gamma", {"p": 0.5})))
    batch = batch_of(PLACES / 4096)
    whole = np.asarray(prepared(task, 0, batch)["c/views"])
    alone = prepared(task, 0, {k: v[2:] for k, v in batch.items()})["c/views"]
    np.testing.assert_array_equal(alone[0], whole[2])
    assert np.abs(whole[:, 0] - whole[:, 1]).max() > 0.01
    noise = Contrastive("c", mirror=(), transforms=(("noise", {"std": 0.1}),))
    views = np.asarray(prepared(noise, 0, batch)["c/views"]) - np.asarray(batch["image"])[:, None]
    assert abs(np.corrcoef(views[0, 0].ravel(), views[0, 1].ravel())[0, 1]) < 0.1
    assert 0.02 < views.std() < 0.11


def test_padding_is_nobodys_negative() -> None:
    task = Contrastive("c")
    vectors = jnp.asarray(RNG.normal(size=(3, 2, 8)), jnp.float32)
    three = {"c/mask": jnp.asarray([True, True, False])}
    both = task.loss([vectors], three)[:2]
    np.testing.assert_allclose(both, task.loss([vectors[:2]], {"c/mask": jnp.ones(2, bool)}), rtol=1e-6)
    gradient = jax.grad(lambda v: task.loss([v], three)[:2].sum())(vectors)
    assert not np.asarray(gradient[2]).any()


@pytest.mark.parametrize("options", [{}, {"method": "vicreg"}, {"scope": "local", "places": 6}])
def test_vectors_follow_views(options: dict[str, Any]) -> None:
    task = Contrastive("c", crop=(12, 12, 12), features=6, hidden=8, **options)
    net = UNet(features=(4, 8), convs=1, decoder_convs=1)
    model = Model(net, {"c": task.head()})
    image = jnp.asarray(RNG.normal(size=(3, 16, 16, 16, 1)), jnp.float32)
    params = parameters(model, image, train=True)
    batch = prepared(task, 0, batch_of(image))

    def loss(params: Any) -> Any:
        outputs: Any = model.apply(params, batch["image"], train=True, views=tasks.views({"c": task}, batch))
        return task.loss(outputs["c"], batch).mean(), outputs["c"]

    (value, outputs), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    vectors = outputs[0]
    assert vectors.shape == ((3, 2, 6, 6) if task.scope == "local" else (3, 2, 6))
    assert np.isfinite(float(value))
    encoder = gradient["params"]["backbone"]["encoder0"]
    assert all(np.asarray(g).any() for g in jax.tree.leaves(encoder))
    decoder = gradient["params"]["backbone"]["decoder0"]
    # Locally the decoder is trained too; globally it is left alone.
    assert any(np.asarray(g).any() for g in jax.tree.leaves(decoder)) == (task.scope == "local")
    found = task.measure(outputs, batch)
    assert set(found) == {"error", "found"}


def test_how_much_there_is_of_something_outlives_an_instance_norm() -> None:
    """Gaussian lesions of growing width, instance-normalised: the mean is 0 of all, a share of voxels grows."""

    grid = np.stack(np.meshgrid(*[np.arange(16) - 7.5] * 3, indexing="ij"))
    widths = np.asarray([1.0, 1.5, 2.0, 2.5, 3.0])
    lesions = np.stack([np.exp(-np.square(grid).sum(0) / (2 * w**2)) for w in widths])
    views = jnp.asarray(lesions[:, None, ..., None] + 0.005 * RNG.normal(size=(5, 2, 16, 16, 16, 1)), jnp.float32)

    class Normed(nn.Module):
        def total_factor(self) -> tuple[int, int, int]:
            return (1, 1, 1)

        @nn.compact
        def __call__(self, x: Any, *, train: bool = False) -> Any:
            return [InstanceNormAct(negative_slope=None, name="norm")(x)]

    class Pooled(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            (y,) = Normed(name="normed")(x)
            return y.mean((1, 2, 3)), log_share(y, 1, "map")

    pooled = Pooled()
    params = jax.jit(pooled.init)(jax.random.key(0), views[:, 0])["params"]
    # Marks what is a deviation above the mean.
    params["map"] = {"kernel": jnp.full((1, 1, 1, 1, 1), 1e3), "bias": jnp.full((1,), -1e3)}
    mean, share = jax.jit(pooled.apply)({"params": params}, views[:, 0])
    np.testing.assert_allclose(mean, 0, atol=1e-4)
    flat = np.asarray(views[:, 0]).reshape(5, -1)
    wanted = (flat > (flat.mean(1) + flat.std(1))[:, None]).mean(1)
    np.testing.assert_allclose(np.exp(share[:, 0]) * (0.01 + 1e-5) - 1e-5, wanted, rtol=0.02)
    assert np.corrcoef(share[:, 0], np.log(widths))[0, 1] > 0.97
    # So two views of a lesion lie nearer to each other than to those of any other, before anything is learnt.
    model = Model(Normed(), {"c": ContrastHead(features=8, hidden=32)})
    params = jax.jit(model.init)(jax.random.key(1), views[:, 0])
    vectors = np.asarray(jax.jit(lambda v: model.apply(params, v[:, 0], views={"c": {"image": v}})["c"][0])(views))
    apart = np.linalg.norm(vectors[:, None, 0] - vectors[None, :, 1], axis=-1)
    np.testing.assert_array_equal(apart.argmin(1), np.arange(5))


def test_what_is_refused() -> None:
    with pytest.raises(UserError, match="'affine' moves voxels"):
        Contrastive("c", scope="local", transforms=(("affine", {}),))
    with pytest.raises(UserError, match="more than half"):
        Contrastive("c", scope="local", crop=(8, 16, 16)).check((16, 16, 16))
    with pytest.raises(UserError, match="at most the patch"):
        Contrastive("c", crop=(20, 16, 16)).check((16, 16, 16))
    task = Contrastive("c", crop=(12, 9, 12))
    model = Model(UNet(features=(4, 8), convs=1, decoder_convs=1), {"c": task.head()})
    view = {"image": jnp.zeros((1, 2, 12, 9, 12, 1))}
    with pytest.raises(UserError, match=r"views of \(12, 9, 12\) voxels are no multiple of the network"):
        jax.eval_shape(lambda: model.bind({"params": {}}).heads["c"](model.backbone, view))
    for crop in ((0, 0, 0), (12, -4, 12), (12, 12)):
        with pytest.raises(UserError, match=r"tasks\.c\.crop=.*three numbers of voxels from 1 on, or none"):
            Contrastive("c", crop=crop)
    for key in ("features", "hidden"):
        with pytest.raises(UserError, match=rf"tasks\.c\.{key}=0: needs a number from 1 on"):
            Contrastive("c", **{key: 0})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="temperature"):
        Contrastive("c", temperature=0.0)
    with pytest.raises(UserError, match="unknown 'blurr'"):
        Contrastive("c", transforms=(("blurr", {}),))


def test_cases_are_compared_with_as_many_whatever_is_left_over() -> None:
    """Of 5 cases in batches of 4 the last is judged among four; alone it would find its partner whatever it knew."""
    task = Contrastive("c", crop=(12, 12, 12), transforms=(), features=6, hidden=8)
    model = Model(UNet(features=(4, 8), convs=1, decoder_convs=1), {"c": task.head()})
    image = np.asarray(RNG.normal(size=(5, 16, 16, 16, 1)), np.float32)
    params = parameters(model, jnp.asarray(image[:1]), train=True)["params"]
    config = SimpleNamespace(seed=0, data=SimpleNamespace(patch=(16, 16, 16), batch_size=4))
    everything = {k: np.asarray(v) for k, v in batch_of(jnp.asarray(image)).items()}
    examiner = Examiner(config, model, {"c": task})

    def judged(order: list[int]) -> dict[int, Any]:
        examiner._patches = [{k: v[i] for k, v in everything.items()} for i in order]
        examiner._who = [(i, i) for i in order]
        return {row["case"]: (row["error"], row["found"]) for row in examiner.rows(params)["c"]}

    found = judged([0, 1, 2, 3, 4])
    assert list(found) == [0, 1, 2, 3, 4]
    np.testing.assert_allclose(found[4], judged([4, 0, 1, 2])[4], rtol=1e-5)
    np.testing.assert_allclose(found[1], judged([0, 1, 2, 3])[1], rtol=1e-5)
    assert found[4][0] > 0.1
    # Nothing to be compared with: nothing found.
    assert judged([2])[2][1] == 0


@pytest.mark.parametrize(
    ("overrides", "seen"),
    [
        (("data.batch_size=1",), 1),
        (("data.batch_size=4", "optim.accumulate=4"), 1),
        (("data.batch_size=2", "parallel=pmap"), 2),
    ],
)
def test_a_view_alone_has_nothing_to_be_told_from(tmp_path: Path, overrides: tuple[str, ...], seen: int) -> None:
    cohort = write_cohort(tmp_path / "cohort", n=3)
    text, task = RECIPE.format(cohort=str(cohort)), '{"whole": {"type": "contrastive"}}'
    recipe = tmp_path / "recipe.py"
    recipe.write_text(text.replace('{"spheres": {"type": "segmentation", "levels": 1}}', task))
    options: dict[str, Any] = {"model": models.options, "tasks": tasks.options}

    def load(*more: str) -> Any:
        return config_lib.load(str(recipe), (*overrides, *more), lambda room, kind: options[room](kind))

    config = load()
    assert parallel.rows_together(config, parallel.make_mesh(config.mesh)) == seen
    if seen > 1:
        job_lib.open_job(config)
        two = SimpleNamespace(shape={"data": 2, "fsdp": 1})
        assert parallel.rows_together(config, two) == 1  # type: ignore[arg-type]
        return
    with pytest.raises(
        UserError, match=r"tasks\.whole\.scope='global' compares examples with others, and its loss sees 1 at a time"
    ):
        job_lib.open_job(config)
    job_lib.open_job(load("tasks.whole.scope=local"))


def test_through_the_spine(tmp_path: Path) -> None:
    cohort = write_cohort(tmp_path / "cohort")
    text = RECIPE.format(cohort=str(cohort))
    both = (
        '{"near": {"type": "contrastive", "scope": "local", "crop": (12, 12, 12), "places": 8},'
        ' "whole": {"type": "contrastive", "method": "vicreg", "weight": 0.01}}'
    )
    file = tmp_path / "recipe.py"
    file.write_text(text.replace('{"spheres": {"type": "segmentation", "levels": 1}}', both))
    run = tmp_path / "run"
    main.main([f"--config={file}", f"--workdir={run}", "--config.train.total=2 steps"])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("val/near/found" in row for row in rows)
    assert (run / "pretext" / "near_0_0000002.png").exists()
