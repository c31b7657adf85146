"""What self-supervised tasks have learnt: numbers of one fixed patch a case, and pictures of them.

These tasks predict nothing of a whole case. Each case shows its middle; what is random (blocks that are hidden, views)
is a function of the seed and the case's number, so that every evaluation asks the same.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from medjax import pictures, tasks
from medjax.data import pipeline, preprocess
from medjax.models.layers import Linear
from medjax.models.pretext import token_grid
from medjax.models.sparse import spread
from medjax.models.vit import ViT

_SHOWN = 2  # cases that are drawn


class Examiner:
    """Measures and draws self-supervised tasks; cases are added one by one, and only their patches are kept."""

    def __init__(self, config: Any, model: Any, job: Mapping[str, Any]) -> None:
        self.tasks = dict(job)
        self._model, self._patch, self._size = model, tuple(config.data.patch), int(config.data.batch_size)
        self._patches: list[pipeline.Row] = []
        self._who: list[tuple[Hashable, Hashable]] = []

        def run(params: Any, batch: dict[str, Array]) -> tuple[dict[str, Array], Any]:
            key = jax.random.key(config.seed)
            for task in self.tasks.values():
                batch = task.prepare(key, batch)
            # As while training, but nothing is dropped: no key for dropout is given.
            views = tasks.views(self.tasks, batch)
            return batch, model.apply({"params": params}, batch["image"], train=True, views=views)

        def measure(params: Any, batch: dict[str, Array]) -> Any:
            batch, outputs = run(params, batch)
            return {name: task.measure(outputs[name], batch) for name, task in self.tasks.items()}

        def show(params: Any, batch: dict[str, Array]) -> Any:
            batch, outputs = run(params, batch)
            volumes = {name: task.show(outputs[name], batch) for name, task in self.tasks.items()}
            first = batch["image"][:1]
            return volumes, {n: _attention(model, params, first, self.tasks[n].causal) for n in volumes if volumes[n]}

        self._measure, self._show = jax.jit(measure), jax.jit(show)

    def add(self, case: preprocess.Prepared, name: Hashable, group: Hashable, number: int) -> None:
        """Keeps the middle of a prepared case; what is random about it follows from `number`."""
        shape = case.image.shape[:3]
        start = pipeline.centred(np.asarray(shape) / 2, shape, self._patch)
        self._patches.append(pipeline.Source([case], ()).row(0, start, self._patch, number, True))
        self._who.append((name, group))

    def rows(self, params: Any) -> dict[str, list[dict[str, Any]]]:
        """Task -> rows for its `summarize`, one a case."""
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in self.tasks}
        for task in self.tasks.values():
            task.check_cases(len(self._who))
        for first in range(0, len(self._who), self._size):
            who = self._who[first : first + self._size]
            measured = jax.device_get(self._measure(params, self._batch(first)))
            for name, values in measured.items():
                for i, (case, group) in enumerate(who):
                    numbers = {metric: float(v[i]) for metric, v in values.items()}
                    found[name].append({"case": case, "group": group, "class": name, **numbers})
        return found

    def draw(self, params: Any, folder: Path | None, step: int | None = None) -> dict[str, np.ndarray]:
        """Pictures of the first cases as PNGs in `folder`; name -> uint8 [H, W, 3]. Without a folder only computed."""
        drawn = {}
        for number in range(min(_SHOWN, len(self._who))):
            volumes, attention = jax.device_get(self._show(params, self._batch(number, 1)))
            spacing = self._patches[number]["spacing"].tolist()
            for name, shown in volumes.items():
                if not shown or folder is None:
                    continue
                # One channel is enough to see it by: the first that is real.
                channel = int(np.argmax(self._patches[number]["modality"]))
                columns = {title: np.asarray(volume)[..., channel] for title, volume in shown.items()}
                heat = {title: np.asarray(volume) for title, volume in attention[name].items()}
                about = f"{name}, {self._who[number][0]}" + ("" if step is None else f", step {step}")
                file = f"{name}_{number}" + ("" if step is None else f"_{step:07d}")
                picture = pictures.columns({**columns, **heat}, folder / f"{file}.png", spacing=spacing, title=about)
                drawn[f"{name}/{number}"] = picture
        return drawn

    def _batch(self, first: int, size: int | None = None) -> pipeline.Row:
        """Rows from `first` on. The last batch is filled up with the first ones, so that in each as many are compared;
        with rows that are not valid where there are no others."""
        size = size or self._size
        chosen = self._patches[first : first + size]
        chosen += self._patches[: min(size - len(chosen), first)]
        rows = [*chosen, *[{**chosen[0], "valid": np.asarray(False)}] * (size - len(chosen))]
        return {k: np.stack([row[k] for row in rows]) for k in rows[0]}


def _attention(model: Any, params: Any, image: Array, causal: bool) -> dict[str, Array]:
    """Where the middle token of a vision transformer's last block looks in a whole image [1, X, Y, Z, C]: the mean of
    its heads, as a volume. Nothing for other backbones.

    `causal`: tokens see those before them alone, in the order of the raster, which is one of the random orders too.
    """
    if not isinstance(model.backbone, ViT):
        return {}
    backbone: ViT = model.backbone
    grid = token_grid(backbone, image)
    every = jnp.arange(math.prod(grid))[None]
    asked = {"capture_intermediates": _is_attention, "mutable": ["intermediates"]}
    see = lambda m, x: m.backbone(x, train=False, keep=every, causal=causal)  # noqa: E731
    _, found = model.apply({"params": params}, image, method=see, **asked)
    qkv = found["intermediates"]["backbone"]["encoder"][f"block{backbone.depth - 1}"]["qkv"]["__call__"][0][0]
    q, k, _ = jnp.moveaxis(qkv.astype(jnp.float32).reshape(len(qkv), 3, backbone.heads, -1), 1, 0)
    middle = int(np.ravel_multi_index([g // 2 for g in grid], grid))
    logits = jnp.einsum("hd,jhd->hj", q[middle], k) * q.shape[-1] ** -0.5
    seen = every[0] <= middle if causal else None
    weights = jax.nn.softmax(logits, axis=-1, where=seen).mean(0)
    return {"attention of the middle": spread(weights.reshape(1, *grid), image.shape[1:4])[0]}


def _is_attention(module: nn.Module, method: str) -> bool:
    return isinstance(module, Linear) and module.name == "qkv" and method == "__call__"
