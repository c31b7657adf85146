"""Segmentation: exclusive labels through a softmax, or overlapping regions (whole tumour ⊃ core) through sigmoids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from medjax.errors import UserError
from medjax.losses import segmentation as losses
from medjax.metrics import segmentation as metrics
from medjax.models.heads import DenseHead


@dataclass(frozen=True)
class Segmentation:
    """Voxel-wise segmentation.

    Attributes:
      name: the task's name; also the target's key in a case.
      labels: label name -> value in the mask file, background (0) left out or named 'background'.
      regions: region name -> label names it covers; empty: the labels themselves, exclusive. Regions may overlap; kept
        from the one of most labels to the one of fewest, the order in which they are painted into a single label map.
      levels: decoder levels that are supervised; level i weighs 2^-i (nnU-Net's deep supervision).
      weight: of this task among several.
      ce, dice: weights of the two parts of the loss.
      batch_dice: pool the Dice sums over the batch rather than per example.
      nsd_tolerance: millimetres, for the normalised surface distance.
    """

    name: str
    labels: Mapping[str, int]
    regions: Mapping[str, Sequence[str]] = field(default_factory=dict)
    weight: float = 1.0
    levels: int = 3
    ce: float = 1.0
    dice: float = 1.0
    batch_dice: bool = False
    nsd_tolerance: float = 1.0

    def __post_init__(self) -> None:
        ordered = sorted(self.regions.items(), key=lambda item: -len(item[1]))
        object.__setattr__(self, "regions", dict(ordered))
        if not self.foreground:
            raise UserError(f"task '{self.name}': the cohort declares no label besides the background")
        for region, parts in self.regions.items():
            for part in parts:
                if part not in self.foreground:
                    raise UserError(
                        f"config: tasks.{self.name}.regions.{region}: no label '{part}'; labels: "
                        f"{', '.join(self.foreground)}"
                    )

    @property
    def foreground(self) -> dict[str, int]:
        """Label name -> value, in order of value, without the background."""
        return dict(sorted(((n, v) for n, v in self.labels.items() if v != 0), key=lambda item: item[1]))

    @property
    def classes(self) -> dict[str, tuple[int, ...]]:
        """What is scored: name -> label values it covers."""
        values = self.foreground
        if self.regions:
            return {region: tuple(values[p] for p in parts) for region, parts in self.regions.items()}
        return {name: (value,) for name, value in values.items()}

    @property
    def outputs(self) -> int:
        """Channels of the head: one a region, or one a label and one for the background."""
        return len(self.regions) or len(self.foreground) + 1

    def head(self) -> nn.Module:
        return DenseHead(self.outputs, self.levels)

    def prepare(self, key: Array, batch: dict[str, Array]) -> dict[str, Array]:
        """Mask values -> class numbers int32 [B, X, Y, Z], or membership bool [B, X, Y, Z, R] for regions."""
        values = batch[f"{self.name}/target"]
        if self.regions:
            member = [jnp.isin(values, jnp.asarray(v, values.dtype)) for v in self.classes.values()]
            target = jnp.stack(member, axis=-1)
        elif list(self.foreground.values()) == list(range(1, self.outputs)):
            target = values.astype(jnp.int32)
        else:
            known = jnp.asarray(list(self.foreground.values()), values.dtype)
            target = sum((values == v) * (i + 1) for i, v in enumerate(known)).astype(jnp.int32)
        return {**batch, f"{self.name}/target": target}

    def loss(self, outputs: Sequence[Array], batch: Mapping[str, Array]) -> Array:
        """Cross-entropy plus soft Dice over the supervised levels; per example [B]."""
        target = batch[f"{self.name}/target"]
        shares = np.array([0.5**i for i in range(len(outputs))])
        shares /= shares.sum()
        total = jnp.zeros(target.shape[0])
        for logits, share in zip(outputs, shares, strict=True):
            # A coarser level is compared with every s-th voxel, as nnU-Net's nearest-neighbour targets.
            step = [t // s for t, s in zip(target.shape[1:4], logits.shape[1:4], strict=True)]
            total += share * losses.dice_ce(
                logits,
                target[:, :: step[0], :: step[1], :: step[2]],
                activation="sigmoid" if self.regions else "softmax",
                dice_weight=self.dice,
                ce_weight=self.ce,
                batch=self.batch_dice,
                weights=batch[f"{self.name}/mask"],
            )
        return total

    def probabilities(self, logits: Array) -> Array:
        """[..., K] logits -> probabilities."""
        return jax.nn.sigmoid(logits) if self.regions else jax.nn.softmax(logits, axis=-1)

    def decode(self, outputs: np.ndarray, geometry: Any = None) -> np.ndarray:
        """Probabilities [X, Y, Z, K] on the prepared grid -> what is written and scored.

        Args:
          geometry: the way back to the input's own grid; None stays on the prepared one.

        Returns:
          Labels: values of the mask file [x, y, z]. Regions: membership bool [x, y, z, R].
        """
        if self.regions:
            return outputs > 0.5 if geometry is None else geometry.regions_to_original(outputs)
        table = np.array([0, *self.foreground.values()])
        table = table.astype(np.min_scalar_type(int(table.max())))
        return table[outputs.argmax(-1) if geometry is None else geometry.labels_to_original(outputs)]

    @property
    def paintable(self) -> bool:
        """Whether a prediction fits in one label map: labels do, regions if each has a label of its own."""
        names = list(self.regions)
        return all(len(self._own(names, i)) == 1 for i in range(len(names)))

    def _own(self, names: list[str], i: int) -> list[str]:
        """Labels of region i that are in no later region."""
        later = {part for name in names[i + 1 :] for part in self.regions[name]}
        return [part for part in self.regions[names[i]] if part not in later]

    def paint(self, decoded: np.ndarray) -> np.ndarray:
        """A single label map [x, y, z]: a region paints the value of the label that is in no later region."""
        if not self.regions:
            return decoded
        names = list(self.regions)
        out = np.zeros(decoded.shape[:3], np.min_scalar_type(max(self.foreground.values())))
        for i, name in enumerate(names):
            own = self._own(names, i)
            if len(own) != 1:
                raise UserError(
                    f"config: tasks.{self.name}.regions.{name}: a label map needs exactly one label of its own in each "
                    f"region (not in a later one); '{name}' has {', '.join(own) or 'none'}"
                )
            out[decoded[..., i]] = self.foreground[own[0]]
        return out

    def score(self, prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float]) -> list[dict[str, Any]]:
        """Dice, HD95, NSD and volume of each class, on one grid.

        Args:
          prediction: what `decode` returned. reference: mask values [x, y, z].
        """
        if self.regions:
            reference = np.stack([np.isin(reference, v) for v in self.classes.values()], axis=-1)
        return metrics.case_metrics(
            prediction, reference, self.classes, tuple(spacing), nsd_tolerance=self.nsd_tolerance
        )
