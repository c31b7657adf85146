"""Sparse encoders for masked pretraining: a convolutional encoder sees the visible voxels and nothing else.

After Tian et al. 2023 (SparK): hidden voxels are 0 at every stage, as if the convolutions were sparse, and
normalisation takes its statistics over visible voxels. No backbone knows of it: `Sparse` stands between the calls of
its layers. What the encoder gives for a visible box that is aligned with the total stride is what a dense net gives for
that box alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from medjax.errors import UserError
from medjax.models.layers import (
    Bridge,
    Conv3D,
    FrozenBatchNormAct,
    GroupNormAct,
    InstanceNormAct,
    LayerNorm,
    MaxPool,
    PatchConv,
)

Levels = Sequence[Array]


class Sparse:
    """Interceptor of linen calls (`nn.intercept_methods`) that confines an encoder to what is visible.

    Args:
      visible: bool [B, GX, GY, GZ], block by block. densify: from the encoder's levels to what its decoder is given.

    Attributes:
      levels: of the encoder, finest first, where the backbone has a decoder; else empty.
    """

    def __init__(self, visible: Array, densify: Callable[[Levels], list[Array]] | None = None) -> None:
        self._visible, self._densify = visible, densify
        self.levels: list[Array] = []

    def __call__(self, call: Callable, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__" or self.levels:
            return call(*args, **kwargs)
        if isinstance(module, Bridge):
            self.levels = list(args[0])
            return self._densify(self.levels) if self._densify else list(self.levels)
        if isinstance(module, (InstanceNormAct, GroupNormAct)):
            return call(*args, **kwargs, visible=spread(self._visible, args[0].shape[1:4]))
        # nn.remat names its classes 'Checkpoint...'.
        if type(module).__name__.endswith(("TransformerBlock", "WindowBlock")):
            raise UserError("masked pretraining: method 'mae' of a transformer in windows is not there; use 'simmim'")
        y = call(*args, **kwargs)
        if isinstance(module, (Conv3D, PatchConv, FrozenBatchNormAct, LayerNorm, MaxPool)):
            return hide(y, self._visible)
        return y


def spread(blocks: Array, shape: Sequence[int]) -> Array:
    """A value a block [B, GX, GY, GZ] -> a value a voxel [B, X, Y, Z] of a grid of `shape`."""
    for axis, size in enumerate(shape, start=1):
        if size % blocks.shape[axis]:
            raise UserError(
                f"masked pretraining: a level of the network has {tuple(shape)} voxels for {blocks.shape[1:]} blocks; "
                "the task's block must be a multiple of the network's total downsampling (method 'mae')"
            )
        if size != blocks.shape[axis]:
            blocks = jnp.repeat(blocks, size // blocks.shape[axis], axis=axis)
    return blocks


def hide(x: Array, visible: Array) -> Array:
    """[B, X, Y, Z, C] with zeros where it is not visible."""
    return jnp.where(spread(visible, x.shape[1:4])[..., None], x, jnp.zeros((), x.dtype))
