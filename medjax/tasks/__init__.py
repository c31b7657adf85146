"""Tasks: each says its targets, head, loss, metrics and how to decode what the network says.

A batch carries `<task>/target` and `<task>/mask` (bool[B]: False where the case has no label for the task), so cases
labelled for some tasks only train together.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import flax.linen as nn
import numpy as np
from jax import Array

from medjax.errors import UserError

# type in a config -> (file, class)
TASKS = {"segmentation": ("segmentation", "Segmentation")}


class Task(Protocol):
    """What the spines ask of a task. Shapes: B examples, K output channels."""

    name: str
    weight: float

    @property
    def outputs(self) -> int:
        """Channels of the head."""

    @property
    def classes(self) -> dict[str, tuple[int, ...]]:
        """What is scored: name -> values of the target it covers."""

    @property
    def paintable(self) -> bool:
        """Whether a prediction fits in one label map."""

    def paint(self, decoded: Any) -> np.ndarray:
        """What `decode` returned as one label map."""

    def head(self) -> nn.Module:
        """From the pyramid to this task's outputs."""

    def prepare(self, key: Array, batch: dict[str, Array]) -> dict[str, Array]:
        """The batch with this task's targets in the form its loss takes; runs on the device, inside jit.

        Args:
          key: of the run. What is random is drawn from it folded with `batch['example']`, example by example.
        """

    def loss(self, outputs: Any, batch: Mapping[str, Array]) -> Array:
        """Loss of each example [B]; the step weighs them by `<task>/mask` and the task by `weight`."""

    def probabilities(self, outputs: Array) -> Array:
        """Outputs of the head -> probabilities [..., K]."""

    def decode(self, outputs: np.ndarray, geometry: Any = None) -> Any:
        """Probabilities on the prepared grid -> what a user reads, on the input's own grid (without: on this one)."""

    def score(self, prediction: Any, reference: Any, spacing: Sequence[float]) -> list[dict[str, Any]]:
        """Whole-case metrics of a decoded prediction: one row a class or region."""


def _class(kind: str) -> Any:
    if kind not in TASKS:
        raise UserError(f"config: task type '{kind}' is not known; known: {', '.join(sorted(TASKS))}")
    file, cls = TASKS[kind]
    return getattr(importlib.import_module(f"medjax.tasks.{file}"), cls)


def options(kind: str) -> dict[str, Any]:
    """The options of a task type and their defaults."""
    skip = {"name", "labels"}
    return {
        f.name: f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        for f in dataclasses.fields(_class(kind))
        if f.name not in skip
    }


def build(config: Mapping[str, Any], labels: Mapping[str, int]) -> dict[str, Task]:
    """The tasks of `config.tasks`, bound to the cohort's labels (name -> value in the mask file)."""
    if not config:
        raise UserError("config: no tasks; set e.g. config.tasks = {'organ': {'type': 'segmentation'}}")
    return {
        name: _class(c["type"])(name=name, labels=dict(labels), **{k: v for k, v in c.items() if k != "type"})
        for name, c in config.items()
    }
