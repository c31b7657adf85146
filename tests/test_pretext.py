"""What is drawn of self-supervised tasks: where a transformer's last attention goes, worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import scipy.special
from test_masked import parameters

from medjax import config as config_lib
from medjax import pictures, pretext
from medjax.data import preprocess
from medjax.models.model import Model
from medjax.models.swin import Swin
from medjax.models.vit import UNETR, ViT
from medjax.tasks.autoregressive import Autoregressive
from medjax.tasks.masked import Masked

PATCH, TOKEN = (16, 8, 16), (4, 4, 4)
GRID = (4, 2, 4)
OPTIONS: dict[str, Any] = {"features": 8, "depth": 2, "heads": 2, "mlp": 12, "patch": TOKEN}
MASKED = Masked("t", block=TOKEN, features=8, heads=2, depth=1)
AUTOREGRESSIVE = Autoregressive("t", order="random", hidden=8, depth=1)


def norm(x: np.ndarray, own: Any) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * own["scale"] + own["bias"]


def linear(x: np.ndarray, own: Any) -> np.ndarray:
    return x @ own["kernel"] + own.get("bias", 0.0)


def attention(encoder: Any, image: np.ndarray, causal: bool) -> np.ndarray:
    """Attention of the last block, mean of the heads, [N, N]."""
    (gx, gy, gz), (px, py, pz) = GRID, TOKEN
    cells = image.reshape(gx, px, gy, py, gz, pz, -1).transpose(0, 2, 4, 1, 3, 5, 6).reshape(math.prod(GRID), -1)
    embed = encoder["embed"]
    x = cells @ embed["kernel"].reshape(cells.shape[1], -1) + embed["bias"]
    x = x + encoder["position"].reshape(x.shape)
    for i in range(OPTIONS["depth"]):
        own = encoder[f"block{i}"]
        q, k, v = np.moveaxis(linear(norm(x, own["norm1"]), own["qkv"]).reshape(len(x), 3, 2, -1), 1, 0)
        logits = np.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[-1])
        if causal:
            logits[:, ~np.tri(len(x), dtype=bool)] = -np.inf
        weights = scipy.special.softmax(logits, axis=-1)
        x = x + linear(np.einsum("hij,jhd->ihd", weights, v).reshape(x.shape), own["proj"])
        y = linear(norm(x, own["norm2"]), own["mlp"]["linear1"])
        x = x + linear(y * scipy.special.ndtr(y), own["mlp"]["linear2"])
    return weights.mean(0)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, np.ndarray]]:
    """The volumes of every picture, which is drawn all the same."""
    found: list[dict[str, np.ndarray]] = []
    real = pictures.columns

    def columns(volumes: Any, *args: Any, **kwargs: Any) -> np.ndarray:
        found.append(dict(volumes))
        return real(volumes, *args, **kwargs)

    monkeypatch.setattr(pictures, "columns", columns)
    return found


def examined(net: Any, task: Any, folder: Path) -> tuple[Any, np.ndarray]:
    """Parameters of the backbone in float64, and the image of one case that `Examiner` has drawn into `folder`."""
    config = config_lib.defaults()
    config.data.patch, config.data.batch_size = PATCH, 1
    model = Model(net, {"t": task.head()})
    image = np.random.default_rng(0).normal(size=(*PATCH, 1)).astype(np.float32)
    params = parameters(model, image[None], train=True)["params"]
    examiner = pretext.Examiner(config, model, {"t": task})
    geometry: Any = SimpleNamespace(spacing=(2.0, 1.0, 1.0))
    examiner.add(preprocess.Prepared(image, {}, geometry, (True,), (1.0,)), "case", "case", 0)
    examiner.draw(params, folder)
    return jax.tree.map(lambda a: np.asarray(a, np.float64), params["backbone"]), image.astype(np.float64)


@pytest.mark.parametrize(
    ("net", "task"),
    [
        (ViT(**OPTIONS, remat=True), MASKED),
        (UNETR(**OPTIONS, decoder_features=4), MASKED),
        (ViT(**OPTIONS), AUTOREGRESSIVE),
    ],
    ids=["vit", "unetr", "autoregressive"],
)
def test_the_attention_of_the_middle_by_hand(net: Any, task: Any, tmp_path: Path, drawn: Any) -> None:
    params, image = examined(net, task, tmp_path)
    (volumes,) = drawn
    found = volumes["attention of the middle"]
    middle = np.ravel_multi_index([g // 2 for g in GRID], GRID)
    want = attention(params["encoder"], image, task is AUTOREGRESSIVE)[middle].reshape(GRID)
    assert found.shape == PATCH
    np.testing.assert_allclose(found, np.kron(want, np.ones(TOKEN)), rtol=1e-4, atol=1e-7)
    assert found[::4, ::4, ::4].sum() == pytest.approx(1, abs=1e-5)
    later = found[::4, ::4, ::4].ravel()[middle + 1 :]
    assert later.any() == (task is not AUTOREGRESSIVE)
    assert (tmp_path / "t_0.png").stat().st_size > 1000


def test_windows_have_no_attention_of_the_middle(tmp_path: Path, drawn: Any) -> None:
    net = Swin(features=6, depths=(1, 1), heads=(1, 2), window=(2, 2, 2))
    examined(net, Masked("t", block=TOKEN, method="simmim"), tmp_path)
    assert "prediction" in drawn[0]
    assert not any("attention" in title for title in drawn[0])
