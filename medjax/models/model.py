"""A model: one backbone and one head a task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from jax import Array


class Model(nn.Module):
    """`{task: outputs}` of one image batch [B, X, Y, Z, C].

    Attributes:
      backbone: returns a feature pyramid, finest first.
      heads: task name -> module from pyramid to that task's outputs.
    """

    backbone: nn.Module
    heads: Mapping[str, nn.Module]

    def __call__(self, x: Array, *, train: bool = False) -> dict[str, Any]:
        pyramid = self.backbone(x, train=train)
        return {name: head(pyramid, train=train) for name, head in self.heads.items()}
