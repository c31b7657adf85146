"""3D vision transformer (Dosovitskiy et al. 2021) and UNETR (Hatamizadeh et al. 2022), a U-Net decoder on top of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from medjax.errors import UserError
from medjax.models.attention import TransformerBlock
from medjax.models.decoders import ResidualConv, ResidualUp
from medjax.models.layers import Dropout, LayerNorm, PatchConv, PatchConvTranspose

DECODERS = ("none", "unetr")


class ViTEncoder(nn.Module):
    """Cells of the image as tokens, through transformer blocks. Attributes: those of `ViT`.

    Call with an image [B, X, Y, Z, C] and, for pretraining, `keep` [B, K]: numbers of the tokens to use, counted in the
    order of (x, y, z), z fastest; `causal`: a token sees those that `keep` names before it. Returns the normalised
    tokens [B, N or K, F] and the output of every block.

    The learnt positions belong to the grid of the image the net was made with; for another they are interpolated.
    """

    features: int
    depth: int
    heads: int
    mlp: int
    patch: Sequence[int]
    qkv_bias: bool
    dropout: float
    drop_path: float
    remat: bool
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Array, *, train: bool = False, keep: Array | None = None, causal: bool = False
    ) -> tuple[Array, list[Array]]:
        x = PatchConv(self.features, self.patch, dtype=self.dtype, name="embed")(x)
        grid = x.shape[1:4]
        made = grid
        if self.has_variable("params", "position"):
            made = self.get_variable("params", "position").shape[:3]
        position = self.param("position", _positions, (*made, self.features))
        if made != grid:
            position = jax.image.resize(position, (*grid, self.features), "trilinear")
        x = (x + position.astype(self.dtype)).reshape(x.shape[0], -1, self.features)
        if keep is not None:
            x = jnp.take_along_axis(x, keep[:, :, None], axis=1)
        x = Dropout(self.dropout, name="drop")(x, train=train)
        kind = nn.remat(TransformerBlock) if self.remat else TransformerBlock
        hidden = []
        for i in range(self.depth):
            rate = self.drop_path * i / max(self.depth - 1, 1)
            more: dict[str, Any] = {"causal": causal, "name": f"block{i}"}
            x = kind(self.heads, self.mlp, self.qkv_bias, self.dropout, rate, train, self.dtype, **more)(x)
            hidden.append(x)
        return LayerNorm(name="norm")(x), hidden


def _positions(key: Array, shape: Sequence[int]) -> Array:
    """Normal with standard deviation 0.02, drawn flat: quicker to compile."""
    count = shape[0] * shape[1] * shape[2] * shape[3]
    return 0.02 * jax.random.normal(key, (count,)).reshape(shape)


class ViT(nn.Module):
    """Returns one level, the tokens as a grid; or the pyramid of UNETR's decoder, finest first.

    Attributes:
      features: channels of a token. depth: blocks. heads: of the attention. mlp: hidden channels of the MLP.
      patch: voxels of a token along (x, y, z); for the decoder 2, 4, 8 or 16.
      qkv_bias: whether queries, keys and values have one.
      dropout: after the embedding, the attention and the MLP. drop_path: stochastic depth, rising from 0.
      decoder: 'none' or 'unetr'. decoder_features: of its finest level; each coarser one has twice as many.
      levels: how many decoder levels are returned (for deep supervision); 0: all but the tokens.
      bottleneck: also return the tokens as a grid, last.
      remat: recompute each block in the backward pass instead of keeping its activations.
      dtype: of the computation; parameters are float32.
    """

    features: int = 768
    depth: int = 12
    heads: int = 12
    mlp: int = 3072
    patch: Sequence[int] = (16, 16, 16)
    qkv_bias: bool = False
    dropout: float = 0.0
    drop_path: float = 0.0
    decoder: str = "none"
    decoder_features: int = 16
    levels: int = 0
    bottleneck: bool = False
    remat: bool = False
    dtype: Any = jnp.float32

    def total_factor(self) -> tuple[int, int, int]:
        """Voxels of a token; the patch must be a multiple of it."""
        x, y, z = self.patch
        return x, y, z

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False, keep: Array | None = None, causal: bool = False) -> Any:
        """[B, X, Y, Z, C] -> [[B, X/s, Y/s, Z/s, F], ...], finest first; given `keep` the tokens [B, K, F]."""
        if self.decoder not in DECODERS:
            raise UserError(f"config: model.decoder '{self.decoder}' is not known; known: {', '.join(DECODERS)}")
        if self.features % self.heads:
            raise UserError(f"config: model.features {self.features} is not a multiple of model.heads {self.heads}")
        encoder = ViTEncoder(
            self.features, self.depth, self.heads, self.mlp, self.patch, self.qkv_bias, self.dropout, self.drop_path,
            self.remat, self.dtype, name="encoder",
        )  # fmt: skip
        tokens, hidden = encoder(x, train=train, keep=keep, causal=causal)
        if keep is not None:
            return tokens
        grid = [size // p for size, p in zip(x.shape[1:4], self.patch, strict=True)]
        bottom = tokens.reshape(-1, *grid, self.features)
        if self.decoder == "none":
            return [bottom]
        factors = _halvings(self.patch)
        skips = [ResidualConv(self.decoder_features, dtype=self.dtype, name="image")(x)]
        for level in (1, 2, 3):
            # Tokens of a quarter, half and three quarters of the depth; the earlier ones end on finer grids.
            y = hidden[level * self.depth // 4].reshape(-1, *grid, self.features)
            channels = self.decoder_features * 2**level
            for step in range(3, level - 1, -1):
                up = PatchConvTranspose(
                    channels, factors[step], use_bias=False, dtype=self.dtype, name=f"skip{level}_up{step}"
                )
                y = up(y)
                if step < 3:
                    y = ResidualConv(channels, dtype=self.dtype, name=f"skip{level}_block{step}")(y)
            skips.append(y)
        pyramid: list[Array] = []
        y = bottom
        for level in (3, 2, 1, 0):
            y = ResidualUp(dtype=self.dtype, name=f"decoder{level}")(y, skips[level])
            pyramid.insert(0, y)
        return pyramid[: self.levels or None] + [bottom] * self.bottleneck


class UNETR(ViT):
    """The transformer with its decoder; attributes as `ViT`'s."""

    decoder: str = "unetr"


def _halvings(patch: Sequence[int]) -> list[tuple[int, ...]]:
    """The four steps from the image to the tokens, finest first; an axis of fewer halvings skips the finest."""
    if any(p not in (1, 2, 4, 8, 16) for p in patch):
        raise UserError(f"config: model.patch {tuple(patch)} must be made of 1, 2, 4, 8 and 16 for the decoder 'unetr'")
    halvings = [p.bit_length() - 1 for p in patch]
    return [tuple(2 if step >= 4 - h else 1 for h in halvings) for step in range(4)]
