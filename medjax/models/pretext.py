"""Heads of self-supervised tasks: they send views of their own through the shared backbone and predict from those.

A head is called with the backbone and a view, a table of arrays: an image and what is done to it. `blank` makes the
view that parameters are initialised with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from medjax.errors import UserError
from medjax.models.attention import TransformerBlock
from medjax.models.decoders import factor_between
from medjax.models.heads import log_share
from medjax.models.layers import Bridge, Conv3D, ConvBlock, LayerNorm, Linear, PatchConvTranspose
from medjax.models.sparse import Sparse, hide, spread
from medjax.models.vit import ViT
from medjax.ops.gelu import gelu

View = Mapping[str, Array]
_small = nn.initializers.normal(0.02)


class PretextHead(nn.Module):
    """What every head of a self-supervised task is; see the module."""

    def blank(self, image: Array) -> dict[str, Array]:
        """A view of `image` [B, X, Y, Z, C] of the kind this head takes."""
        raise NotImplementedError

    def __call__(self, backbone: Callable, view: View, *, train: bool = False) -> list[Array]:
        """Outputs of one view."""
        raise NotImplementedError


class MaskedHead(PretextHead):
    """Predicts the voxels of hidden blocks. View: 'image' [B, X, Y, Z, C] and 'visible' bool [B, GX, GY, GZ], blocks.

    Attributes:
      block: voxels of a block. ratio: share of the blocks of each example that is hidden (`hidden_blocks`).
      method: 'mae', hidden voxels never enter the encoder: a transformer gets the visible tokens alone, a convolutional
        encoder is confined to visible voxels (`medjax.models.sparse`); what is hidden is filled with learnt tokens
        before the decoder. 'simmim': a learnt block stands for each hidden one and the whole net is used as it is.
      decoder: of 'mae': 'light', the head's own, or 'backbone', a U-Net's own, which is so pretrained too.
      features: channels of the light decoder. depth, heads: its blocks, after a transformer.

    Returns `[prediction float32 [B, X, Y, Z, C], predicted bool [B, GX, GY, GZ]]`.
    """

    block: Sequence[int]
    ratio: float
    method: str = "mae"
    decoder: str = "light"
    features: int = 32
    depth: int = 2
    heads: int = 4

    def blank(self, image: Array) -> dict[str, Array]:
        return {"image": image, "visible": jnp.ones((image.shape[0], *block_grid(image.shape[1:4], self.block)), bool)}

    @nn.compact
    def __call__(self, backbone: Any, view: View, *, train: bool = False) -> list[Array]:
        image, visible = view["image"], view["visible"]
        if self.method == "simmim":
            token = self.param("token", nn.initializers.zeros, (*self.block, image.shape[-1]))
            filling = jnp.tile(token, (*visible.shape[1:], 1)).astype(image.dtype)
            seen = spread(visible, image.shape[1:4])[..., None]
            pyramid = backbone(jnp.where(seen, image, filling), train=train)
            prediction = ToImage(image.shape[-1], name="out")(pyramid, image)
        elif isinstance(backbone, ViT):
            if self.decoder == "backbone":
                raise UserError(
                    "masked pretraining: decoder='backbone' is for convolutional networks, not "
                    f"{type(backbone).__name__}: of a transformer 'mae' pretrains the encoder alone; use "
                    "decoder='light', or method='simmim'"
                )
            prediction = self._tokens(backbone, image, visible, train)
        else:
            prediction = self._sparse(backbone, image, visible, train)
        return [prediction, ~visible]

    def _tokens(self, backbone: ViT, image: Array, visible: Array, train: bool) -> Array:
        """The transformer sees visible tokens only; a small one sees them all and predicts."""
        grid = token_grid(backbone, image)
        if any(b % p for b, p in zip(self.block, backbone.patch, strict=True)):
            raise UserError(
                f"masked pretraining: block {tuple(self.block)} must be a multiple of model.patch "
                f"{tuple(backbone.patch)}"
            )
        if self.features % self.heads:
            raise UserError(
                f"masked pretraining: features {self.features} of the decoder are no multiple of its heads {self.heads}"
            )
        seen = spread(visible, grid).reshape(image.shape[0], -1)
        total = seen.shape[1]
        blocks = math.prod(visible.shape[1:])
        kept = (blocks - hidden_blocks(self.ratio, blocks)) * total // blocks
        # Visible ones first, each part in its own order.
        order = jnp.argsort(~seen, axis=1, stable=True)
        tokens = backbone(image, train=train, keep=order[:, :kept])
        y = Linear(self.features, dtype=backbone.dtype, name="narrow")(tokens)
        mask = self.param("mask", _small, (self.features,))
        y = jnp.concatenate([y, _everywhere(mask, (y.shape[0], total - kept, self.features), y.dtype)], axis=1)
        y = jnp.take_along_axis(y, jnp.argsort(order, axis=1)[:, :, None], axis=1)
        y += _everywhere(self.param("position", _small, (total, self.features)), y.shape, y.dtype)
        for i in range(self.depth):
            options: tuple[Any, ...] = (self.heads, 4 * self.features, True, 0.0, 0.0, train, backbone.dtype)
            y = TransformerBlock(*options, name=f"block{i}")(y)
        y = LayerNorm(name="norm")(y).reshape(image.shape[0], *grid, self.features)
        return ToImage(image.shape[-1], name="out")([y], image)

    def _sparse(self, backbone: Any, image: Array, visible: Array, train: bool) -> Array:
        """The encoder sees visible voxels only; hidden ones of each level are filled with a token before decoding."""
        if self.decoder not in ("light", "backbone"):
            raise UserError(f"masked pretraining: decoder '{self.decoder}' is not known; known: light, backbone")

        def dense(levels: Sequence[Array]) -> list[Array]:
            filled = []
            for i, level in enumerate(levels):
                token = self.param(f"token{i}", _small, (level.shape[-1],))
                token = _everywhere(token, level.shape, level.dtype)
                filled.append(jnp.where(spread(visible, level.shape[1:4])[..., None], level, token))
            return filled

        sparse = Sparse(visible, dense if self.decoder == "backbone" else None)
        with nn.intercept_methods(sparse):
            pyramid = backbone(hide(image, visible), train=train)
        if self.decoder == "backbone":
            if not sparse.levels:
                raise UserError(
                    f"masked pretraining: {type(backbone).__name__} has no decoder of its own as configured; use "
                    "decoder='light', or a backbone with a U-Net decoder"
                )
            return ToImage(image.shape[-1], name="out")(pyramid, image)
        levels = dense(sparse.levels or pyramid)
        y = levels[-1]
        for i in range(len(levels) - 1, -1, -1):
            common: dict[str, Any] = {"dtype": levels[i].dtype}
            skip = Conv3D(self.features, (1, 1, 1), name=f"project{i}", **common)(levels[i])
            if i < len(levels) - 1:
                skip += PatchConvTranspose(self.features, factor_between(skip, y), name=f"up{i}", **common)(y)
            # The finest level, which costs most, takes what is known as it is.
            y = ConvBlock(self.features, name=f"block{i}", **common)(skip) if i else skip
        return ToImage(image.shape[-1], name="out")([y], image)


class AutoregressiveHead(PretextHead):
    """Predicts each token's voxels from the tokens before it. View: 'image', and 'order' uint32 [B, 2], random keys.

    A causal transformer reads the tokens in order; what it makes of a token, with the position of the next one, goes
    through an MLP to the voxels of that next one (after El-Nouby et al. 2024, where the order is the raster's).

    Attributes:
      order: 'raster' (x slowest, z fastest) or 'random', one of its own for each example and step.
      hidden: channels of the MLP. depth: its hidden layers.

    Returns as `MaskedHead`, by token: all but the first of the order are predicted.
    """

    order: str = "raster"
    hidden: int = 128
    depth: int = 2

    def blank(self, image: Array) -> dict[str, Array]:
        return {"image": image, "order": jnp.zeros((image.shape[0], 2), jnp.uint32)}

    @nn.compact
    def __call__(self, backbone: Any, view: View, *, train: bool = False) -> list[Array]:
        if not isinstance(backbone, ViT):
            raise UserError("task 'autoregressive': needs a transformer; set model.name to 'vit' or 'unetr'")
        image = view["image"]
        grid = token_grid(backbone, image)
        rows, total = image.shape[0], math.prod(grid)
        if total < 2:
            raise UserError(
                f"task 'autoregressive': a patch of {image.shape[1:4]} voxels is one token of {tuple(backbone.patch)}, "
                "so there is no next one to predict; enlarge data.patch or lessen model.patch"
            )

        def shuffled(key: Array) -> Array:
            return jnp.argsort(jax.random.uniform(jax.random.wrap_key_data(key), (total,)))

        order = jnp.broadcast_to(jnp.arange(total), (rows, total))
        if self.order == "random":
            order = jax.vmap(shuffled)(view["order"])
        tokens = backbone(image, train=train, keep=order, causal=True)[:, :-1]
        y = Linear(self.hidden, dtype=backbone.dtype, name="narrow")(tokens)
        position = self.param("position", _small, (total, self.hidden))
        y += position[order[:, 1:]].astype(y.dtype)
        for i in range(self.depth):
            y += Linear(self.hidden, dtype=backbone.dtype, name=f"layer{i}")(gelu(LayerNorm(name=f"norm{i}")(y)))
        # The first has nothing before it; then everything to its own place.
        y = jnp.concatenate([jnp.zeros_like(y[:, :1]), LayerNorm(name="norm")(y)], axis=1)
        place = jnp.argsort(order, axis=1)
        y = jnp.take_along_axis(y, place[:, :, None], axis=1).reshape(rows, *grid, self.hidden)
        return [ToImage(image.shape[-1], name="out")([y], image), (place > 0).reshape(rows, *grid)]


class ContrastHead(PretextHead):
    """Vectors of two views to be compared. View: 'image' [B, 2, X, Y, Z, C]; locally 'place' int [B, 2, P, 3] besides.

    Attributes:
      features: of the vectors. hidden: of the layer before; both of a projection that pretraining alone uses.
      local: vectors of places (voxels of the finest level), not of whole views: of these `maps` shares of the coarsest
        level's voxels are taken (`heads.log_share`), as the mean right after an instance norm says next to nothing.

    Returns `[vectors float32 [B, 2, D]]`, locally `[vectors [B, 2, P, D], cells int32 [B, 2, P]]`: voxels of the finest
    level, numbered over the batch. Places within one have one vector between them.
    """

    features: int = 64
    hidden: int = 128
    local: bool = False
    maps: int = 64

    def blank(self, image: Array) -> dict[str, Array]:
        two = jnp.stack([image, image], axis=1)
        return {"image": two, "place": jnp.zeros((image.shape[0], 2, 1, 3), jnp.int32)}

    @nn.compact
    def __call__(self, backbone: Any, view: View, *, train: bool = False) -> list[Array]:
        image = view["image"]
        rows = image.shape[0]
        factor = backbone.total_factor()
        if any(size % f for size, f in zip(image.shape[2:5], factor, strict=True)):
            raise UserError(
                f"contrastive pretraining: views of {image.shape[2:5]} voxels are no multiple of the network's total "
                f"downsampling {tuple(factor)}; correct the task's crop"
            )
        end = _Catch()
        # Both views of an example lie beside each other: what is on a device stays there.
        with nn.intercept_methods(end):
            pyramid = backbone(image.reshape(2 * rows, *image.shape[2:]), train=train)
        if self.local:
            place = view["place"].reshape(2 * rows, -1, 3)
            finest = pyramid[0]
            stride = jnp.asarray([a // b for a, b in zip(image.shape[2:5], finest.shape[1:4], strict=True)])
            x, y, z = jnp.moveaxis(place // stride, -1, 0)
            own = jnp.ravel_multi_index((x, y, z), finest.shape[1:4], mode="clip")
            cells = own + math.prod(finest.shape[1:4]) * jnp.arange(2 * rows)[:, None]
            x = jax.vmap(lambda f, i, j, k: f[i, j, k])(finest, x, y, z)
        else:
            cells = None
            x = log_share((end.levels or pyramid)[-1], self.maps, "maps")
        x = gelu(LayerNorm(name="norm")(nn.Dense(self.hidden, name="hidden")(x.astype(jnp.float32))))
        x = nn.Dense(self.features, name="out")(x)
        vectors = x.reshape(rows, 2, *x.shape[1:])
        return [vectors] if cells is None else [vectors, cells.reshape(rows, 2, -1)]


class ToImage(nn.Module):
    """The finest level of a pyramid -> voxels of the image [B, X, Y, Z, channels] float32, by one linear map."""

    channels: int

    @nn.compact
    def __call__(self, pyramid: Sequence[Array], image: Array) -> Array:
        finest = pyramid[0]
        factor = factor_between(image, finest)
        if factor == (1, 1, 1):
            out: nn.Module = Conv3D(self.channels, (1, 1, 1), dtype=finest.dtype, name="map")
        else:
            out = PatchConvTranspose(self.channels, factor, dtype=finest.dtype, name="map")
        return out(finest).astype(jnp.float32)


def _everywhere(parameter: Array, shape: Sequence[int], dtype: Any) -> Array:
    """A parameter spread over a shape, then of a type: in that order its gradient is summed in the parameter's own."""
    return jnp.broadcast_to(parameter, tuple(shape)).astype(dtype)


class _Catch:
    """Interceptor that keeps the encoder's levels of a backbone with a decoder."""

    def __init__(self) -> None:
        self.levels: list[Array] = []

    def __call__(self, call: Callable, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, Bridge) and context.method_name == "__call__":
            self.levels = list(args[0])
        return call(*args, **kwargs)


def block_grid(shape: Sequence[int], block: Sequence[int]) -> tuple[int, ...]:
    """Blocks of `block` voxels along each axis of a patch; UserError unless they fill it."""
    if any(size % b for size, b in zip(shape, block, strict=True)):
        raise UserError(
            f"masked pretraining: a patch of {tuple(shape)} voxels is not made of whole blocks of {tuple(block)}; "
            "correct data.patch or the task's block"
        )
    return tuple(size // b for size, b in zip(shape, block, strict=True))


def hidden_blocks(ratio: float, blocks: int) -> int:
    """How many of so many blocks are hidden; UserError where that is none or all."""
    hidden = round(ratio * blocks)
    if not 0 < hidden < blocks:
        raise UserError(
            f"masked pretraining: ratio {ratio} of {blocks} block(s) hides {hidden}; make the block smaller, the patch "
            "larger or correct the ratio, so that some are hidden and some are not"
        )
    return hidden


def token_grid(backbone: ViT, image: Array) -> tuple[int, ...]:
    """Tokens along (x, y, z)."""
    return tuple(size // p for size, p in zip(image.shape[1:4], backbone.patch, strict=True))
