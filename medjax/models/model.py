"""A model: one backbone and one head a task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from medjax import models
from medjax.errors import UserError
from medjax.models.adapters import Insert, insert
from medjax.models.pretext import PretextHead

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Model(nn.Module):
    """`{task: outputs}` of one image batch [B, X, Y, Z, C].

    Attributes:
      backbone: returns a feature pyramid, finest first.
      heads: task name -> module from pyramid to that task's outputs; or a `PretextHead`, which makes its own pass.
      insert: adapters or prompt tokens within the backbone (`config.peft`), if any.
    """

    backbone: nn.Module
    heads: Mapping[str, nn.Module]
    insert: Insert | None = None

    def __call__(
        self, x: Array, *, train: bool = False, views: Mapping[str, Mapping[str, Array]] | None = None
    ) -> dict[str, Any]:
        """Args: views: task -> what its pass of its own through the backbone takes (`medjax.tasks.views`); a
        self-supervised task without one gives no outputs."""
        pretext = {name: head for name, head in self.heads.items() if isinstance(head, PretextHead)}
        views = {name: head.blank(x) for name, head in pretext.items()} if self.is_initializing() else views or {}
        outputs: dict[str, Any] = {}
        if self.is_initializing() or len(pretext) < len(self.heads):
            pyramid = self.insert.call(self.backbone, x, train=train) if self.insert else self.backbone(x, train=train)
        for name, head in self.heads.items():
            if name not in pretext:
                outputs[name] = head(pyramid, train=train)
            elif name in views:
                outputs[name] = head(self.backbone, views[name], train=train)
        return outputs


def build_model(config: Mapping[str, Any], tasks: Mapping[str, Any]) -> Model:
    """The model of a config: its backbone, computing in `train.precision`, and the heads of its tasks."""
    precision = config["train"]["precision"]
    if precision not in DTYPES:
        raise UserError(f"config: train.precision '{precision}' is not known; known: {', '.join(DTYPES)}")
    heads = {name: task.head() for name, task in tasks.items()}
    return Model(models.build(config["model"], DTYPES[precision]), heads, insert(config.get("peft")))


def parameter_count(params: Any) -> int:
    """Number of scalars in a tree of parameters."""
    return sum(math.prod(p.shape) for p in jax.tree.leaves(params))
