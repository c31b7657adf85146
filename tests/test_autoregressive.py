"""Autoregressive pretraining: a token is predicted from those before it, and from nothing else."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_masked import IMAGE, SIZE, batch_of, parameters, prepared

from medjax import tasks
from medjax.errors import UserError
from medjax.losses import reconstruction
from medjax.models.model import Model
from medjax.models.unet import UNet
from medjax.models.vit import ViT
from medjax.tasks.autoregressive import Autoregressive

PATCH = (8, 4, 8)
GRID = (2, 4, 2)
NET = ViT(features=12, depth=2, heads=2, mlp=16, patch=PATCH)


def program(task: Autoregressive) -> tuple[Any, Any]:
    model = Model(NET, {"ar": task.head()})
    params = parameters(model, IMAGE, train=True)
    return params, jax.jit(
        lambda p, b: model.apply(p, b["image"], train=True, views=tasks.views({"ar": task}, b))["ar"]
    )


def orders(task: Autoregressive, batch: dict[str, Any]) -> np.ndarray:
    """Token numbers in the order they are read, [B, N]."""
    total = math.prod(GRID)
    if task.order == "raster":
        return np.tile(np.arange(total), (2, 1))
    keys = jax.random.wrap_key_data(batch["ar/order"])
    return np.stack([np.argsort(jax.random.uniform(key, (total,))) for key in keys])


@pytest.mark.parametrize("order", ["raster", "random"])
def test_nothing_later_is_seen(order: str) -> None:
    task = Autoregressive("ar", order=order, hidden=8, depth=1)
    params, run = program(task)
    batch = prepared(task, 3, batch_of())
    sequence = orders(task, batch)
    prediction, counted = run(params, batch)
    assert prediction.shape == IMAGE.shape
    assert (np.asarray(counted).sum((1, 2, 3)) == 15).all()
    for row in range(2):
        assert not np.asarray(counted)[row].reshape(-1)[sequence[row][0]]
    place = 6  # in the order: tokens up to this one depend on nothing from here on
    blocks = np.asarray(reconstruction.to_blocks(IMAGE, GRID)).reshape(2, 16, -1, 2).copy()
    for row in range(2):
        blocks[row, sequence[row][place]] += 5.0
    changed = reconstruction.from_blocks(jnp.asarray(blocks).reshape(2, *GRID, -1, 2), PATCH)
    again, _ = run(params, {**batch, "image": changed})
    differs = np.asarray(jnp.abs(reconstruction.to_blocks(again - prediction, GRID)).max((-1, -2))).reshape(2, 16)
    for row in range(2):
        assert (differs[row][sequence[row][: place + 1]] == 0).all()
        assert (differs[row][sequence[row][place + 1 :]] > 1e-6).all()


def test_the_order_is_each_examples_own_and_fixed() -> None:
    task = Autoregressive("ar", order="random")
    batch = prepared(task, 3, batch_of())
    first, second = orders(task, batch)
    assert sorted(first) == list(range(16))
    assert list(first) != list(second)
    alone = prepared(task, 3, {k: v[1:] for k, v in batch_of().items()})
    np.testing.assert_array_equal(alone["ar/order"][0], batch["ar/order"][1])


def test_a_token_does_not_say_what_it_is() -> None:
    """The loss falls where tokens repeat the one before, and not where they are noise."""
    task = Autoregressive("ar", hidden=16, depth=1, normalize=False)
    params, run = program(task)

    @jax.jit
    def descend(params: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
        value, gradient = jax.value_and_grad(lambda p: task.loss(run(p, batch), batch).mean())(params)
        return jax.tree.map(lambda p, g: p - 0.02 * g / (1e-3 + jnp.abs(g)), params, gradient), value

    base = jnp.ones((2, *SIZE, 2)) * jnp.asarray([1.0, -1.0])[:, None, None, None, None]
    batch = prepared(task, 0, batch_of(base))
    values = []
    for _ in range(40):
        params, value = descend(params, batch)
        values.append(float(value))
    assert values[-1] < 0.3 * values[0]
    # Of noise nothing can be told from what came before; of what does not vary there is nothing to explain.
    noise = prepared(task, 0, batch_of())
    assert float(task.measure(run(params, noise), noise)["explained"].max()) < 0.1
    assert not np.asarray(task.measure(run(params, batch), batch)["explained"]).any()


def test_needs_a_transformer() -> None:
    model = Model(UNet(features=(4, 8), convs=1, decoder_convs=1), {"ar": Autoregressive("ar").head()})
    with pytest.raises(UserError, match="needs a transformer"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGE, train=True))
    one = ViT(features=12, depth=2, heads=2, mlp=16, patch=(16, 16, 16))
    model = Model(one, {"ar": Autoregressive("ar").head()})
    with pytest.raises(UserError, match=r"a patch of \(16, 16, 16\) voxels is one token.*enlarge data.patch"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((2, 16, 16, 16, 1)), train=True))
    with pytest.raises(UserError, match="order='spiral' is not known"):
        Autoregressive("ar", order="spiral")
