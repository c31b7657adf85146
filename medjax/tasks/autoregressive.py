"""Autoregressive pretraining: predict each token of a volume from those before it (El-Nouby et al. 2024, in 3D)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
from jax import Array

from medjax.errors import UserError
from medjax.models.pretext import AutoregressiveHead
from medjax.tasks.masked import Reconstruction


@dataclass(frozen=True)
class Autoregressive(Reconstruction):
    """Next-patch prediction by a transformer (`model.name` 'vit' or 'unetr') whose tokens see only those before them.

    Attributes:
      name: the task's name.
      order: 'raster' (x slowest, z fastest), or 'random': an order of its own for each example.
      objective: 'l2' or 'l1'.
      normalize: predict each token's voxels less their mean over their standard deviation, channel by channel, as of
        `medjax.tasks.masked.Masked`.
      hidden: channels of the head's MLP. depth: its hidden layers.
      weight: of this task among several.
    """

    name: str
    order: str = "raster"
    objective: str = "l2"
    normalize: bool = True
    hidden: int = 128
    depth: int = 2
    weight: float = 1.0

    def __post_init__(self) -> None:
        self.one_of("order", ("raster", "random"))
        self.one_of("objective", ("l2", "l1"))
        if self.hidden < 1 or self.depth < 0:
            raise UserError(f"{self.where('hidden')}={self.hidden}, depth={self.depth}: channels, layers of the head")

    @property
    def all_predicted(self) -> bool:
        return True

    @property
    def causal(self) -> bool:
        return True

    def head(self) -> AutoregressiveHead:
        return AutoregressiveHead(self.order, self.hidden, self.depth)

    def prepare(self, key: Array, batch: dict[str, Array]) -> dict[str, Array]:
        """Adds `<task>/order` uint32 [B, 2]: a key for the order of each example."""
        order = jax.random.key_data(self.keys(key, batch))
        return {**batch, f"{self.name}/order": order, f"{self.name}/mask": batch["valid"]}

    def view(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        return {"image": batch["image"], "order": batch[f"{self.name}/order"]}
