"""Masked pretraining: predict the hidden blocks of a volume from the visible ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from medjax.errors import UserError
from medjax.losses import reconstruction
from medjax.models.pretext import MaskedHead, block_grid, hidden_blocks
from medjax.models.sparse import spread
from medjax.tasks.pretext import Pretext


class Reconstruction(Pretext):
    """Of tasks that predict voxels block by block. Outputs: prediction [B, X, Y, Z, C], which blocks were predicted.

    Voxels outside of the volume count nowhere: not in the loss, nor in `explained`, nor in a block's mean and deviation
    (`normalize`). They are told by their value, exactly 0 in all real channels of the augmented image, which is what a
    patch beyond the border and spatial transforms fill in; so what normalisation leaves at 0 does not count either (the
    background of 'zscore_nonzero', what 'percentile' clips to 0, a raw 0 with 'none': 0 HU of a CT), and padding counts
    that a transform of intensities has made something else (noise, brightness).
    """

    metrics = ("error", "explained")
    objective: str
    normalize: bool

    def loss(self, outputs: Sequence[Array], batch: Mapping[str, Array]) -> Array:
        """The mean error over the voxels of predicted blocks inside of the volume, and the channels that are real, [B].

        0 where none is.
        """
        prediction, counted = outputs
        weight = reconstruction.weights(batch["image"], counted, batch["modality"])
        wanted = reconstruction.targets(batch["image"], weight, self.normalize)
        blocks = reconstruction.to_blocks(prediction.astype(jnp.float32), counted.shape[1:])
        return reconstruction.error(blocks, wanted, weight, self.objective)

    def measure(self, outputs: Sequence[Array], batch: Mapping[str, Array]) -> dict[str, Array]:
        """The loss; and the share of the predicted voxels' variance that is explained, 1 - squared error / variance.

        Where nothing varies (a patch of background alone) there is nothing to explain: 0.
        """
        prediction, counted = outputs
        weight = reconstruction.weights(batch["image"], counted, batch["modality"])
        wanted = reconstruction.targets(batch["image"], weight, self.normalize)
        blocks = reconstruction.to_blocks(prediction.astype(jnp.float32), counted.shape[1:])
        # About each channel's own mean: how channels lie to each other is known without a network.
        middle, _ = reconstruction.moments(wanted, weight, (1, 2, 3, 4))
        variance = reconstruction.error(middle, wanted, weight, "l2")
        varies = variance > 1e-8
        share = reconstruction.error(blocks, wanted, weight, "l2") / jnp.where(varies, variance, 1.0)
        return {"error": self.loss(outputs, batch), "explained": jnp.where(varies, 1 - share, 0.0)}

    def show(self, outputs: Sequence[Array], batch: Mapping[str, Array]) -> dict[str, Array]:
        """The first example: what it is, what was visible, what was predicted for the rest (outside of it: 0)."""
        prediction, image, counted = outputs[0][:1], batch["image"][:1], outputs[1][:1]
        grid = counted.shape[1:]
        size = [s // g for s, g in zip(image.shape[1:4], grid, strict=True)]
        weight = reconstruction.weights(image, counted, batch["modality"][:1])
        if self.normalize:
            own = reconstruction.to_blocks(image.astype(jnp.float32), grid)
            mean, std = reconstruction.block_moments(own, weight)
            blocks = reconstruction.to_blocks(prediction, grid) * std + mean
            prediction = reconstruction.from_blocks(blocks, size)
        hidden = spread(counted, image.shape[1:4])[..., None]
        seen = jnp.where(hidden, image.min(), image)
        told = jnp.where(reconstruction.from_blocks(weight, size), prediction, image)
        volumes = {"image": image, "visible": seen, "prediction": told}
        if self.all_predicted:
            del volumes["visible"]
        return {title: volume[0] for title, volume in volumes.items()}

    @property
    def all_predicted(self) -> bool:
        """Whether nothing is visible beside what is predicted."""
        return False


@dataclass(frozen=True)
class Masked(Reconstruction):
    """Masked autoencoding of volumes: He et al. 2022 (vision transformers), Tian et al. 2023 (convolutional networks),
    Xie et al. 2022 ('simmim').

    Attributes:
      name: the task's name.
      method: 'mae' or 'simmim', see `medjax.models.pretext.MaskedHead`.
      block: voxels along (x, y, z) that are hidden together. 'mae': a multiple of the network's total downsampling, or
        of a transformer's patch. The volume patch (`data.patch`) is a multiple of it.
      ratio: share of the blocks that is hidden, rounded to whole blocks; at least one is and one is not.
      objective: 'l2' or 'l1'.
      normalize: predict each block less its mean over its standard deviation, channel by channel; the deviation is at
        least 0.05 of that of all that is predicted in the channel, so that flat air is not blown up to its noise.
      decoder: of 'mae' in a convolutional network: 'light' or 'backbone', whose own decoder is so pretrained too.
      features: channels of the light decoder. depth, heads: of its transformer.
      weight: of this task among several.
    """

    name: str
    method: str = "mae"
    block: Sequence[int] = (16, 16, 16)
    ratio: float = 0.75
    objective: str = "l2"
    normalize: bool = False
    decoder: str = "light"
    features: int = 32
    depth: int = 2
    heads: int = 4
    weight: float = 1.0

    def __post_init__(self) -> None:
        self.one_of("method", ("mae", "simmim"))
        self.one_of("objective", ("l2", "l1"))
        self.one_of("decoder", ("light", "backbone"))
        self.from_to("features", 1)
        self.from_to("depth", 0)
        self.from_to("heads", 1)
        if not 0 < self.ratio < 1:
            raise UserError(
                f"{self.where('ratio')}={self.ratio}: between 0 and 1, both excluded: with nothing hidden there is "
                "nothing to predict, with everything hidden nothing to predict it from"
            )
        if len(self.block) != 3 or min(self.block) < 1:
            raise UserError(f"{self.where('block')}={tuple(self.block)}: three numbers of voxels, each at least 1")

    def check(self, patch: Sequence[int]) -> None:
        """Raises UserError for a patch that the blocks do not fill, or of which none or all would be hidden."""
        hidden_blocks(self.ratio, math.prod(block_grid(patch, self.block)))

    def head(self) -> MaskedHead:
        return MaskedHead(
            tuple(self.block), self.ratio, self.method, self.decoder, self.features, self.depth, self.heads
        )

    def prepare(self, key: Array, batch: dict[str, Array]) -> dict[str, Array]:
        """Adds `<task>/visible` bool [B, GX, GY, GZ]: blocks drawn without replacement, as many in each example."""
        grid = block_grid(batch["image"].shape[1:4], self.block)
        blocks = math.prod(grid)
        hidden = hidden_blocks(self.ratio, blocks)

        def draw(key: Array) -> Array:
            rank = jnp.argsort(jnp.argsort(jax.random.uniform(key, (blocks,))))
            return (rank >= hidden).reshape(grid)

        visible = jax.vmap(draw)(self.keys(key, batch))
        return {**batch, f"{self.name}/visible": visible, f"{self.name}/mask": batch["valid"]}

    def view(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        return {"image": batch["image"], "visible": batch[f"{self.name}/visible"]}
