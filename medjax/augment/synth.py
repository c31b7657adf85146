"""Images made from label maps: random contrast, so that a network learns shapes and no scanner's intensities.

After Billot et al., "SynthSeg: segmentation of brain MRI scans of any contrast and resolution without retraining",
Medical Image Analysis 86, 2023. The policy 'synthseg' (`policy.py`) has the rest of their generator around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from medjax.augment.base import Batch, Draws, Scene, Transform, interval, share
from medjax.augment.intensity import normal_like
from medjax.errors import UserError
from medjax.ops.gated import chosen


@dataclass(frozen=True, kw_only=True)
class Paint(Transform):
    """Replaces the image: each label and channel gets a Gaussian of its own, its mean and deviation uniform.

    Attributes:
      task: whose mask is painted; may be empty where there is one mask only.
      mean, std: ranges of the Gaussians' means and deviations.
      background: share of the images whose label 0 is black (0 throughout).
      labels: label values below this get a Gaussian of their own; higher ones share those of their remainder.
    """

    task: str = ""
    mean: tuple[float, float] = (0.1, 0.9)
    std: tuple[float, float] = (0.02, 0.1)
    background: float = 0.5
    labels: int = 256
    name: ClassVar[str] = "paint"
    keyed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        interval("mean", self.mean)
        interval("std", self.std, 0)
        share("background", self.background)
        if not isinstance(self.labels, int) or self.labels < 2:
            raise ValueError(f"labels={self.labels}: a whole number from 2 on is needed")

    def plan(self, draw: Draws, scene: Scene) -> Any:
        on, black = draw.chance(self.p), draw.chance(self.background)
        table = jnp.stack([draw.uniform(*r, (self.labels, scene.channels)) for r in (self.mean, self.std)])
        return on, table.at[:, 0].set(jnp.where(black, 0.0, table[:, 0])), scene.present

    def apply(self, batch: Batch, plan: Any, keys: Array | None, masks: Sequence[str]) -> Batch:
        tasks = [k.removesuffix("/target") for k in masks if jnp.issubdtype(batch[k].dtype, jnp.integer)]
        task = self.task or (tasks[0] if len(tasks) == 1 else "")
        if task not in tasks:
            raise UserError(
                f"config: augment 'paint' needs the task whose label map is painted, task=...; masks there: "
                f"{', '.join(tasks) or 'none'}"
            )

        def one(x: Array, mask: Array, key: Array, table: Array, present: Array) -> Array:
            label = jnp.mod(mask.astype(jnp.int32), self.labels)
            painted = table[0][label] + table[1][label] * normal_like(key, x)
            return jnp.where(present, painted, 0.0).astype(x.dtype)

        on, table, present = plan
        assert keys is not None
        # An example without a label map keeps its image.
        on = on & batch.get(f"{task}/mask", True)
        image = chosen(one, on, batch["image"], batch[f"{task}/target"], keys, table, present)
        return {**batch, "image": image}
