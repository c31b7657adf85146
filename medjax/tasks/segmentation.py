"""Segmentation: exclusive labels through a softmax, or overlapping regions (whole tumour ⊃ core) through sigmoids."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from medjax.errors import UserError, warn_once
from medjax.losses import boundary, weighting
from medjax.losses import segmentation as losses
from medjax.metrics import lesions, regression, stats
from medjax.metrics import segmentation as metrics
from medjax.models.heads import DenseHead
from medjax.tasks.common import Activation, Defaults, Kind

MEANS = ("dice", "hd95", "nsd", "assd", "volume_error_ml")
EXTRA = ("cldice", "lesion_dice", "lesion_hd95", "lesion_f1")


@dataclass(frozen=True)
class Segmentation(Defaults):
    """Voxel-wise segmentation.

    The loss is the sum of a voxel-wise part, an overlap part, and where asked for the unified focal loss (which is
    both) and the boundary loss, each times its weight.

    Attributes:
      name: the task's name; also the target's key in a case.
      labels: label name -> value in the mask file, background (0) left out or named 'background'.
      regions: region name -> label names it covers; empty: the labels themselves, exclusive. Regions may overlap; kept
        from the one of most labels to the one of fewest, the order in which they are painted into a single label map.
      levels: decoder levels that are supervised; level i weighs 2^-i (nnU-Net's deep supervision).
      weight: of this task among several.
      ce, dice, unified, boundary: weights of the parts of the loss.
      voxelwise: the voxel-wise part: 'ce' (cross-entropy), 'focal' or 'top_k' (of the worst voxels alone).
      overlap: the overlap part: 'dice', 'generalised_dice' or 'tversky'.
      gamma: exponent of 'focal'. top: share of voxels of 'top_k'.
      alpha, beta: weight of false positives and false negatives in 'tversky'.
      batch_dice: pool the Dice sums over the batch rather than per example ('dice' alone); the batch is what one
        accumulation round holds, and with parallel='pmap' its part on one device.
      smoothing: of the labels in the cross-entropy ('ce' alone).
      balance: class weights of the voxel-wise part from the training masks: 'none', 'inverse', 'sqrt' or 'effective'
        (`medjax.losses.weighting.class_weights`). class_weights: those weights; learnt unless given.
      ignore: value of voxels that count neither in the loss nor in the scores; -1: none.
      nsd_tolerance: millimetres, for the normalised surface distance.
      convention: of HD95 and ASSD (`medjax.metrics.segmentation.hausdorff`).
      centreline: score clDice too, for vessels and airways.
      lesions: score lesion by lesion too, by the rules of BraTS 2023 (`medjax.metrics.lesions`). lesion_dilation:
        steps of a voxel by which the reference is dilated to see what is one lesion. lesion_volume: mm³; lesions of so
        little or less do not count. The defaults are those of gliomas; metastases have 1 and 2.
    """

    name: str
    labels: Mapping[str, int]
    regions: Mapping[str, Sequence[str]] = field(default_factory=dict)
    weight: float = 1.0
    levels: int = 3
    ce: float = 1.0
    dice: float = 1.0
    unified: float = 0.0
    boundary: float = 0.0
    voxelwise: str = "ce"
    overlap: str = "dice"
    gamma: float = 2.0
    top: float = 0.1
    alpha: float = 0.3
    beta: float = 0.7
    batch_dice: bool = False
    smoothing: float = 0.0
    balance: str = "none"
    class_weights: Sequence[float] = ()
    ignore: int = -1
    nsd_tolerance: float = 1.0
    convention: metrics.Convention = "monai"
    centreline: bool = False
    lesions: bool = False
    lesion_dilation: int = 3
    lesion_volume: float = 50.0

    def __post_init__(self) -> None:
        ordered = sorted(self.regions.items(), key=lambda item: -len(item[1]))
        object.__setattr__(self, "regions", dict(ordered))
        if not self.foreground:
            raise UserError(f"task '{self.name}': the cohort declares no label besides the background")
        self._check_regions()
        self.one_of("voxelwise", ("ce", "focal", "top_k"))
        self.one_of("overlap", ("dice", "generalised_dice", "tversky"))
        self.one_of("balance", weighting.CLASS_WEIGHTS)
        for key, low in {"ce": 0, "dice": 0, "unified": 0, "boundary": 0, "gamma": 0, "alpha": 0, "beta": 0}.items():
            self.from_to(key, low)
        self.count("levels", 1)
        self.from_to("smoothing", 0, 1)
        if not (self.ce or self.dice or self.unified or self.boundary):
            raise UserError(f"{self.where('ce')}, dice, unified and boundary are all 0: there is no loss")
        if not 0 < self.top <= 1:
            raise UserError(f"{self.where('top')}={self.top}: a share of the voxels, above 0 and up to 1")
        if (self.class_weights or self.balance != "none") and (not self.ce or self.voxelwise == "top_k"):
            raise UserError(
                f"{self.where('balance')}='{self.balance}', class_weights={tuple(self.class_weights)}: classes weigh "
                "in the voxel-wise part alone, which takes them where voxelwise is 'ce' or 'focal' and ce above 0"
            )
        if self.class_weights and len(self.class_weights) != self.outputs:
            raise UserError(
                f"{self.where('class_weights')}: {len(self.class_weights)} weights for {self.outputs} outputs "
                f"({'regions' if self.regions else 'background and labels'})"
            )
        if any(not 0 <= w < math.inf for w in self.class_weights):
            raise UserError(f"{self.where('class_weights')}={tuple(self.class_weights)}: weights are from 0 on")
        self.one_of("convention", get_args(metrics.Convention))
        self.from_to("nsd_tolerance", 0)
        self.count("lesion_dilation", 0)
        self.from_to("lesion_volume", 0)
        self._check_idle()
        if self.ignore in self.foreground.values() or self.ignore == 0:
            raise UserError(f"{self.where('ignore')}={self.ignore} is the value of a label, or the background")

    def _check_idle(self) -> None:
        """Refuses options of parts of the loss and of scores that there are not."""
        self.acts("voxelwise", self.ce, "where ce is above 0")
        self.acts("overlap", self.dice, "where dice is above 0")
        voxelwise, overlap = self.voxelwise if self.ce else "", self.overlap if self.dice else ""
        for key, choice in (("smoothing", "ce"), ("gamma", "focal"), ("top", "top_k")):
            self.acts(key, voxelwise == choice, f"where voxelwise is '{choice}' and ce above 0")
        for key, choice in (("batch_dice", "dice"), ("alpha", "tversky"), ("beta", "tversky")):
            self.acts(key, overlap == choice, f"where overlap is '{choice}' and dice above 0")
        for key in ("lesion_dilation", "lesion_volume"):
            self.acts(key, self.lesions, "where lesions is True")

    def _check_regions(self) -> None:
        covered: dict[frozenset[str], str] = {}
        for region, parts in self.regions.items():
            if isinstance(parts, str) or not parts or len(set(parts)) < len(parts):
                raise UserError(
                    f"{self.where(f'regions.{region}')} needs a list of labels, each once, not {parts!r}; labels: "
                    f"{', '.join(self.foreground)}"
                )
            for part in parts:
                if part not in self.foreground:
                    raise UserError(
                        f"config: tasks.{self.name}.regions.{region}: no label '{part}'; labels: "
                        f"{', '.join(self.foreground)}"
                    )
            twin = covered.setdefault(frozenset(parts), region)
            if twin != region:
                warn_once(f"task '{self.name}': regions '{twin}' and '{region}' cover the same labels")

    @property
    def kind(self) -> Kind:
        return "dense"

    @property
    def activation(self) -> Activation:
        return "sigmoid" if self.regions else "softmax"

    @property
    def targets(self) -> tuple[str, ...]:
        return ("mask",)

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

    def fit(self, known: Sequence[Any]) -> dict[str, Any]:
        """Notes labels that no training case has; learns class weights where `balance` asks for them."""
        wanted = self.balance != "none" and not self.class_weights
        counts = np.zeros(self.outputs)
        missing = dict(self.foreground)
        for one in known:
            if not wanted and not missing:
                break
            seen = _occurrences(one.value)
            seen.pop(self.ignore, None)
            missing = {n: v for n, v in missing.items() if v not in seen}
            for i, covers in enumerate(self.classes.values(), 0 if self.regions else 1):
                counts[i] += sum(seen.get(v, 0) for v in covers)
            if not self.regions:
                counts[0] += seen.get(0, 0)
        if missing:
            warn_once(
                f"task '{self.name}': no training case has {', '.join(missing)}; the network can learn nothing of it"
            )
        if not wanted or not counts.any():
            return {}
        return {"class_weights": tuple(float(w) for w in weighting.class_weights(counts, self.balance))}

    def prepare(self, key: Array, batch: dict[str, Array]) -> dict[str, Array]:
        """Mask values -> class numbers int32 [B, X, Y, Z] (-1: ignored); regions: membership bool [B, X, Y, Z, R].

        With regions and an `ignore` value adds `<task>/counted`, bool [B, X, Y, Z].
        """
        values = batch[f"{self.name}/target"]
        if max(*self.foreground.values(), self.ignore) > jnp.iinfo(values.dtype).max:
            values = values.astype(jnp.int32)  # a label that no training case has may not fit in the masks' type
        if self.regions:
            member = [jnp.isin(values, jnp.asarray(v, values.dtype)) for v in self.classes.values()]
            extra = {f"{self.name}/counted": values != self.ignore} if self.ignore >= 0 else {}
            return {**batch, f"{self.name}/target": jnp.stack(member, axis=-1), **extra}
        if list(self.foreground.values()) == list(range(1, self.outputs)):
            target = values.astype(jnp.int32)
        else:
            known = jnp.asarray(list(self.foreground.values()), values.dtype)
            target = sum((values == v) * (i + 1) for i, v in enumerate(known)).astype(jnp.int32)
        if self.ignore >= 0:
            target = jnp.where(values == self.ignore, -1, target)
        return {**batch, f"{self.name}/target": target}

    def loss(self, outputs: Sequence[Array], batch: Mapping[str, Array]) -> Array:
        """The parts of the loss over the supervised levels; per example [B]."""
        target, counted = batch[f"{self.name}/target"], batch.get(f"{self.name}/counted")
        shares = np.array([0.5**i for i in range(len(outputs))])
        shares /= shares.sum()
        total = jnp.zeros(target.shape[0])
        for logits, share in zip(outputs, shares, strict=True):
            # A coarser level is compared with every s-th voxel, as nnU-Net's nearest-neighbour targets.
            step = [t // s for t, s in zip(target.shape[1:4], logits.shape[1:4], strict=True)]
            every = (slice(None), *(slice(None, None, s) for s in step))
            total += share * self._region_loss(
                logits, target[every], None if counted is None else counted[every], batch[f"{self.name}/mask"]
            )
        if self.boundary:
            total += self.boundary * self._boundary_loss(outputs[0], target, counted, batch["spacing"])
        return total

    def _region_loss(self, logits: Array, target: Array, counted: Array | None, mask: Array) -> Array:
        common: dict[str, Any] = {
            "activation": "sigmoid" if self.regions else "softmax",
            "mask": counted,
            "ignore": -1 if self.ignore >= 0 and not self.regions else None,
        }
        weights = jnp.asarray(self.class_weights) if self.class_weights else None
        total = jnp.zeros(len(logits))
        if self.voxelwise == "ce" and self.overlap == "dice" and (self.ce or self.dice):
            total = losses.dice_ce(
                logits,
                target,
                dice_weight=self.dice,
                ce_weight=self.ce,
                class_weights=weights,
                batch=self.batch_dice,
                weights=mask,
                smoothing=self.smoothing,
                **common,
            )
        else:
            total += self.ce * self._voxelwise(logits, target, weights, common) if self.ce else 0.0
            total += self.dice * self._overlap(logits, target, mask, common) if self.dice else 0.0
        if self.unified:
            total += self.unified * losses.unified_focal(logits, target, **common)
        return total

    def _voxelwise(self, logits: Array, target: Array, weights: Array | None, common: dict[str, Any]) -> Array:
        if self.voxelwise == "focal":
            return losses.focal(logits, target, gamma=self.gamma, class_weights=weights, **common)
        if self.voxelwise == "top_k":
            return losses.top_k_cross_entropy(logits, target, fraction=self.top, **common)
        # The weight of Dice is 0: the compiler drops its sums.
        return losses.dice_ce(
            logits, target, dice_weight=0.0, class_weights=weights, smoothing=self.smoothing, **common
        )

    def _overlap(self, logits: Array, target: Array, mask: Array, common: dict[str, Any]) -> Array:
        if self.overlap == "generalised_dice":
            # Sums of w · voxels are 1 / voxels: the usual 1e-5 would outweigh a structure of 1e5 voxels.
            return losses.generalised_dice(logits, target, smooth=1e-12, **common)
        if self.overlap == "tversky":
            return losses.tversky(logits, target, alpha=self.alpha, beta=self.beta, **common)
        return losses.soft_dice(logits, target, batch=self.batch_dice, weights=mask, **common)

    def _boundary_loss(self, logits: Array, target: Array, counted: Array | None, spacing: Array) -> Array:
        if not self.regions:
            counted = target >= 0 if self.ignore >= 0 else None
            target = target[..., None] == jnp.arange(1, self.outputs)
            probabilities = self.probabilities(logits)[..., 1:]
        else:
            probabilities = self.probabilities(logits)
        distances = boundary.signed_distance(target, spacing)
        return boundary.boundary(probabilities, distances, include_background=True, mask=counted)

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

    def score(
        self, prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], voxel: float | None = None
    ) -> list[dict[str, Any]]:
        """Overlap, surface distances and volume of each class, on one grid.

        Voxels of the value `ignore` are background in both; a surface that runs into them ends there.

        Args:
          prediction: what `decode` returned. reference: mask values [x, y, z].
          voxel: mm³ of a voxel (`Task.score`).
        """
        unknown = reference == self.ignore if self.ignore >= 0 else None
        if self.regions:
            reference = np.stack([np.isin(reference, v) for v in self.classes.values()], axis=-1)
        if unknown is not None and unknown.any():
            # A product, not an assignment: predictions may be read-only.
            kept = ~unknown[..., None] if self.regions else ~unknown
            prediction, reference = prediction * kept, reference * kept
        step = tuple(spacing)
        rows = metrics.case_metrics(
            prediction,
            reference,
            self.classes,
            step,
            nsd_tolerance=self.nsd_tolerance,
            convention=self.convention,
            voxel=voxel,
        )
        for i, (row, values) in enumerate(zip(rows, self.classes.values(), strict=True)):
            if not (self.centreline or self.lesions):
                break
            pair = (
                (prediction[..., i], reference[..., i])
                if self.regions
                else (np.isin(prediction, values), np.isin(reference, values))
            )
            if self.centreline:
                row["cldice"] = metrics.centreline_dice(*pair)
            if self.lesions:
                found = lesions.lesion_metrics(
                    pair[0], pair[1], step, dilation=self.lesion_dilation, min_volume=self.lesion_volume, voxel=voxel
                )
                row |= {"lesion_dice": found.dice, "lesion_hd95": found.hd95, "lesion_f1": found.f1}
        return rows

    def summarize(self, rows: Sequence[Mapping[str, Any]], *, resamples: int = 1000) -> dict[str, Any]:
        """Means of the cases' metrics, and Bland & Altman's limits of agreement of the volumes."""
        names = list(self.classes)
        extra = [m for m in EXTRA if rows and m in rows[0]]
        limits = {
            "volume_low_ml": lambda t: regression.bland_altman(t["volume_ml"], t["reference_ml"]).low,
            "volume_high_ml": lambda t: regression.bland_altman(t["volume_ml"], t["reference_ml"]).high,
        }
        means = stats.summarize(rows, (*MEANS, *extra), names, n=2 * resamples)
        return means | stats.summarize_cohort(rows, limits, names, n=resamples)

    def selection(self, summary: Mapping[str, Any]) -> float:
        return summary["dice"]["mean"] or 0.0


def _occurrences(mask: np.ndarray) -> dict[int, int]:
    """Value -> voxels of a mask [X, Y, Z], values from 0 on; plane by plane, for counting takes 8 bytes a voxel."""
    counts = np.zeros(0, np.int64)
    for plane in mask:
        found = np.bincount(plane.ravel(), minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
