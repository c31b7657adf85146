"""Landmarks: named points, one heat map each, read off as the centroid around the map's peak."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from medjax.errors import UserError, warn_once
from medjax.losses import detection as losses
from medjax.metrics import stats
from medjax.models.heads import HeatHead
from medjax.tasks import findings
from medjax.tasks.common import Defaults, Found, Kind, check_names
from medjax.tasks.findings import LABEL

PRIOR = 0.01  # probability a heat map begins with
_ROUNDS, _STILL = 10, 1e-3  # of the search for a centre, and the voxels it moves by when it is found


@dataclass(frozen=True)
class Landmark(Defaults):
    """Points of the anatomy, at most one of each name a case.

    Attributes:
      name: the task's name; also the target's key in a case.
      names: of the landmarks; the target's label i is names[i - 1]. One that a case's target lacks is unknown there.
      weight: of this task among several.
      level: of the pyramid the head reads, 0 the finest. features: of its hidden convolution.
      sigma: standard deviation of a heat bump, mm.
      mse: weight of the squared error beside the cross-entropy of the heat maps.
      score_from: least peak at which a landmark is reported; below it is missed.
      tolerance: mm within which a landmark counts as found.
      penalty: error in mm of one that is missed, and the largest of one that is not: missing it never improves a mean.
    """

    name: str
    names: Sequence[str] = ()
    weight: float = 1.0
    level: int = 0
    features: int = 32
    sigma: float = 3.0
    mse: float = 1.0
    score_from: float = 0.0
    tolerance: float = 4.0
    penalty: float = 100.0

    def __post_init__(self) -> None:
        check_names(self.name, self.names, 1)
        for key in ("sigma", "tolerance", "penalty"):
            if not getattr(self, key) > 0:
                raise UserError(f"{self.where(key)}={getattr(self, key)} must be above 0 mm")
        self.from_to("mse", 0)
        self.share("score_from")
        self.count("level", 0)
        self.count("features", 1)

    @property
    def kind(self) -> Kind:
        return "findings"

    @property
    def targets(self) -> tuple[str, ...]:
        return ("findings",)

    @property
    def outputs(self) -> int:
        return len(self.names)

    def head(self) -> nn.Module:
        low = math.log(PRIOR / (1.0 - PRIOR))
        return HeatHead(self.outputs, self.features, self.level, (low,) * self.outputs)

    def fit(self, known: Sequence[Any]) -> dict[str, Any]:
        """Checks the landmarks; learns nothing."""
        seen: set[int] = set()
        for one in known:
            self.check_target(one)
            seen |= set(np.asarray(one.value)[:, LABEL].tolist())
        if not seen:
            raise UserError(f"task '{self.name}': no training case has a landmark, so there is nothing to learn")
        missing = [name for i, name in enumerate(self.names, 1) if i not in seen]
        if missing:
            warn_once(f"task '{self.name}': no training case has {', '.join(missing)}; the network cannot learn it")
        findings.note_hidden(self.name, known)
        return {}

    def check_target(self, one: Any) -> None:
        rows = np.asarray(one.value, np.float64)
        labels = rows[:, LABEL].tolist()
        wrong = [v for v in labels if v not in range(1, len(self.names) + 1)]
        if wrong:
            raise UserError(
                f"task '{self.name}': case {one.case} has a landmark {wrong[0]:g}; the task has 1 to "
                f"{len(self.names)} ({', '.join(self.names)}). Correct the target or tasks.{self.name}.names."
            )
        if len(set(labels)) < len(labels):
            raise UserError(
                f"task '{self.name}': case {one.case} has the same landmark twice. Leave one of them in the target."
            )
        places = rows[:, :3]
        outside = one.shape is not None and ((places < -0.5) | (places > np.asarray(one.shape) - 0.5)).any()
        if outside or not np.isfinite(places).all():
            raise UserError(f"task '{self.name}': case {one.case} has a landmark outside its volume {one.shape}")

    def prepare(self, key: Array, batch: dict[str, Array]) -> dict[str, Array]:
        """Adds the landmarks' places in the patch, `<task>/centre` f32[B, L, 3] (voxels), and `<task>/state` i32[B, L].

        The state is -1 where the landmark is unknown in the case, or cut by the patch's border, for the centre of what
        is left of it is another; 0 where it lies outside the patch, 1 inside.
        """
        table = batch[f"{self.name}/table"]
        found = findings.locate(batch[f"{self.name}/target"], table.shape[1], batch.get(f"{self.name}/cut"))
        own = table[..., LABEL, None] == jnp.arange(1, self.outputs + 1)  # [B, M, L]
        centre = jnp.einsum("bml,bma->bla", own.astype(jnp.float32), found.centre, precision="highest")
        whole, cut = ((own & (found.state == state)[..., None]).any(axis=1) for state in (findings.WHOLE, findings.CUT))
        state = jnp.where(own.any(axis=1) & ~cut, whole.astype(jnp.int32), -1)
        return {**batch, f"{self.name}/centre": centre, f"{self.name}/state": state}

    def loss(self, outputs: Sequence[Array], batch: Mapping[str, Array]) -> Array:
        """Cross-entropy and squared error of the heat maps, over the sum of one bump, mean over known landmarks."""
        logits, state = outputs[0], batch[f"{self.name}/state"]
        sigma = self.sigma / batch["spacing"]  # [B, 3] voxels
        width = jnp.broadcast_to(sigma[:, None], (*state.shape, 3))
        channel = jnp.where(state == 1, jnp.arange(self.outputs), -1)
        heat = findings.heat_maps(logits.shape[1:4], batch[f"{self.name}/centre"], width, channel, self.outputs)
        # An unknown landmark's map is its own target: no loss, no gradient.
        known = (state >= 0)[:, None, None, None, :]
        heat = jnp.where(known, heat, 0.0)
        logits = jnp.where(known, logits, -1e4)
        mass = (2.0 * math.pi) ** 1.5 * jnp.prod(sigma, axis=-1) * jnp.maximum((state >= 0).sum(axis=-1), 1)
        return losses.heat_bce_mse(logits, heat, mass, mse=self.mse)

    def probabilities(self, outputs: Array) -> Array:
        return jax.nn.sigmoid(outputs)

    def decode(self, outputs: np.ndarray, geometry: Any = None) -> list[Found]:
        """Each landmark at the centre of its map, in world mm; its score is the peak.

        The centre is the one that is the centroid of what is within 2 sigma of it, reached from the peak: the centroid
        around the peak itself is drawn to the middle of a voxel.
        """
        affine = findings.affine_of(geometry)
        reach = 2.0 * self.sigma / findings.spacing_of(affine)
        found = []
        for number, name in enumerate(self.names):
            heat = outputs[..., number]
            peak = np.array(np.unravel_index(int(heat.argmax()), heat.shape))
            score = float(heat[tuple(peak)])
            if score < self.score_from or not score > 0:
                continue
            centre = _centre(heat, peak, reach)
            x, y, z = (float(v) for v in findings.to_world(centre[None], affine)[0])
            found.append(Found(name, score, (x, y, z), (0.0, 0.0, 0.0), {}))
        return found

    def table(self, decoded: Sequence[Found]) -> list[dict[str, Any]]:
        return [{k: v for k, v in one.row().items() if not k.startswith("size")} for one in decoded]

    def reference(self, value: np.ndarray, geometry: Any = None) -> np.ndarray:
        """A table of landmarks with its places in world mm, [M, 7]."""
        return findings.reference_rows(value, geometry)

    def score(
        self, prediction: Sequence[Found], reference: np.ndarray, spacing: Sequence[float], voxel: float | None = None
    ) -> list[dict[str, Any]]:
        """A row a landmark that the case has: its error in mm, at most `penalty`, which a missed one has; whether it is
        found."""
        found = {one.label: one for one in prediction}
        rows = []
        for row in reference:
            name = self.names[int(row[LABEL]) - 1]
            one = found.get(name)
            distance = math.inf if one is None else float(np.linalg.norm(np.subtract(one.center, row[:3])))
            rows.append(
                {
                    "class": name,
                    "error_mm": min(self.penalty, distance),
                    "found": float(distance <= self.tolerance),
                    "score": math.nan if one is None else one.score,
                    "missed": int(one is None),
                }
            )
        return rows

    def summarize(self, rows: Sequence[Mapping[str, Any]], *, resamples: int = 1000) -> dict[str, Any]:
        """Mean error in mm, and the share found within the tolerance."""
        return stats.summarize(rows, ("error_mm", "found"), self.names, n=2 * resamples)

    def selection(self, summary: Mapping[str, Any]) -> float:
        """1 / (1 + mean error / tolerance)."""
        error = summary["error_mm"]["mean"]
        return 0.0 if error is None else 1.0 / (1.0 + error / self.tolerance)


def _centre(heat: np.ndarray, start: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """The place, float64 [3] in voxels, that is the centroid of a map [X, Y, Z] in the ellipsoid of half axes `reach`
    around it, by repetition from `start`."""
    centre = start.astype(np.float64)
    for _ in range(_ROUNDS):
        low = np.maximum(np.ceil(centre - reach), 0).astype(int)
        high = np.minimum(np.floor(centre + reach) + 1, heat.shape).astype(int)
        grid = np.meshgrid(*(np.arange(a, b) for a, b in zip(low, high, strict=True)), indexing="ij")
        part = heat[tuple(slice(a, b) for a, b in zip(low, high, strict=True))].astype(np.float64)
        part = part * (sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, reach, strict=True)) <= 1.0)
        if not (total := part.sum()) > 0:
            break  # an ellipsoid less than a voxel across may lie between the voxels
        last, centre = centre, np.array([(g * part).sum() for g in grid]) / total
        if np.abs(centre - last).max() < _STILL:
            break
    return centre
