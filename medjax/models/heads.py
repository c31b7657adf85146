"""Heads: from a backbone's feature pyramid to a task's outputs."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from medjax.models.layers import Conv3D


class DenseHead(nn.Module):
    """A 1×1×1 convolution on each of the finest `levels` of the pyramid; logits in float32, finest first.

    Attributes:
      outputs: channels per voxel. levels: how many levels get logits (deep supervision); at evaluation only the first.
    """

    outputs: int
    levels: int = 1

    @nn.compact
    def __call__(self, pyramid: Sequence[Array], *, train: bool = False) -> list[Array]:
        levels = min(self.levels, len(pyramid))
        logits = []
        for i in range(levels):
            # Every level's parameters exist in both modes; only the finest level is computed for evaluation.
            if train or i == 0 or self.is_initializing():
                head = Conv3D(self.outputs, (1, 1, 1), dtype=pyramid[i].dtype, name=f"level{i}")
                logits.append(head(pyramid[i]).astype(jnp.float32))
        return logits
