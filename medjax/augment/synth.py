"""Images made from label maps: random contrast, so that a network learns shapes and no scanner's intensities.

After Billot et al., "SynthSeg: segmentation of brain MRI scans of any contrast and resolution without retraining",
Medical Image Analysis 86, 2023. The policy 'synthseg' (`policy.py`) has the rest of their generator around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array, lax

from medjax.augment.base import INSIDE, Batch, Draws, Scene, Transform, interval, share
from medjax.augment.intensity import mean_inside, normal_like
from medjax.errors import UserError
from medjax.ops.gated import chosen


@dataclass(frozen=True, kw_only=True)
class Paint(Transform):
    """Replaces the image: each label and channel gets a Gaussian of its own, its mean and deviation uniform.

    What the volume is padded with, 0 in all channels and without a label, is no tissue: it is in no cluster, and gets
    the mean of what is painted, as 0 is of a normalised volume, until 'standardize' sets it to 0 again. So do corners
    that turned in, and zeros around a brain without its skull. An image of zeros alone is painted in full.

    Attributes:
      task: whose mask is painted; may be empty where there is one mask only.
      mean, std: ranges of the Gaussians' means and deviations.
      background: share of the images whose label 0 is black (0 throughout).
      clusters: label 0 is divided by the image's intensities (mean of the channels) into so many, each with a Gaussian
        of its own, as Billot et al. do where the labels cover a part of the anatomy; 1: not at all.
      labels: label values below this get a Gaussian of their own; higher ones share those of their remainder.
    """

    task: str = ""
    mean: tuple[float, float] = (0.1, 0.9)
    std: tuple[float, float] = (0.02, 0.1)
    background: float = 0.5
    clusters: int = 1
    labels: int = 256
    name: ClassVar[str] = "paint"
    keyed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        interval("mean", self.mean)
        interval("std", self.std, 0)
        share("background", self.background)
        for name, least in (("labels", 2), ("clusters", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value}: a whole number from {least} on is needed")

    def plan(self, draw: Draws, scene: Scene) -> Any:
        on, black = draw.chance(self.p), draw.chance(self.background)
        # Label 0's clusters but the first come after the labels.
        rows = self.labels + self.clusters - 1
        table = jnp.stack([draw.uniform(*r, (rows, scene.channels)) for r in (self.mean, self.std)])
        outside = (jnp.arange(rows) == 0) | (jnp.arange(rows) >= self.labels)
        return on, jnp.where(black & outside[:, None], 0.0, table), scene.present

    def apply(self, batch: Batch, plan: Any, keys: Array | None, masks: Sequence[str]) -> Batch:
        tasks = [k.removesuffix("/target") for k in masks if jnp.issubdtype(batch[k].dtype, jnp.integer)]
        task = self.task or (tasks[0] if len(tasks) == 1 else "")
        if task not in tasks:
            raise UserError(
                f"config: augment 'paint' needs the task whose label map is painted, task=...; masks there: "
                f"{', '.join(tasks) or 'none'}"
            )

        def one(x: Array, mask: Array, inside: Array, key: Array, table: Array, present: Array) -> Array:
            label = jnp.mod(mask.astype(jnp.int32), self.labels)
            if self.clusters > 1:
                level = jnp.where(present, x, 0.0).sum(-1) / jnp.maximum(present.sum(), 1)
                cluster = divided(level, inside & (label == 0), self.clusters)
                label = jnp.where((label == 0) & (cluster > 0), self.labels - 1 + cluster, label)
            painted = table[0][label] + table[1][label] * normal_like(key, x)
            painted = jnp.where(inside[..., None], painted, mean_inside(painted, inside))
            return jnp.where(present, painted, 0.0).astype(x.dtype)

        on, table, present = plan
        assert keys is not None
        # An example without a label map keeps its image.
        on = on & batch.get(f"{task}/mask", True)
        image, mask = batch["image"], batch[f"{task}/target"]
        inside = batch.get(INSIDE, True) & _inside(image, mask, present)
        return {**batch, "image": chosen(one, on, image, mask, inside, keys, table, present), INSIDE: inside}


def _inside(image: Array, mask: Array, present: Array) -> Array:
    """bool [B, X, Y, Z]: the voxels that are not padding, see `Paint`."""
    seen = jnp.any((image != 0) & present[:, None, None, None], axis=-1)
    return seen | (mask != 0) | ~jnp.any(seen, axis=(1, 2, 3), keepdims=True)


def divided(x: Array, mask: Array, k: int) -> Array:
    """Clusters 0..k-1, darkest first, of the voxels of `x` [X, Y, Z] in `mask`: k-means of their intensities.

    Begins at quantiles and does eight rounds (Lloyd 1982), on every other voxel an axis: it is levels that are looked
    for, not their last digit. Outside the mask what comes means nothing.
    """
    seen, counted = (a[::2, ::2, ::2].ravel() for a in (x.astype(jnp.float32), mask))
    total = counted.sum()
    ordered = jnp.sort(jnp.where(counted, seen, jnp.inf))
    first = ((jnp.arange(k) + 0.5) / k * total).astype(jnp.int32)
    centres = jnp.where(total > 0, ordered[jnp.clip(first, 0, jnp.maximum(total - 1, 0))], 0.0)

    def better(_: Any, centres: Array) -> Array:
        own = counted & (_nearest(seen, centres) == jnp.arange(k)[:, None])
        number = own.sum(1)
        return jnp.where(number > 0, jnp.where(own, seen, 0.0).sum(1) / jnp.maximum(number, 1), centres)

    return _nearest(x.astype(jnp.float32), lax.fori_loop(0, 8, better, centres))


def _nearest(x: Array, centres: Array) -> Array:
    """Which of the centres, in increasing order, is nearest: by the borders halfway between them."""
    borders = (centres[1:] + centres[:-1]) / 2
    return (x > borders.reshape(-1, *[1] * x.ndim)).sum(0)
