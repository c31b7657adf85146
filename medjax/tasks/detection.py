"""Detection: centres as peaks of heat maps, with offset, size and attributes beside them (CenterNet in 3D).

After Zhou et al. 2019 (Objects as Points, arXiv:1904.07850), in physical units: the network sees voxels, sizes are
millimetres, and what a user reads is a place in the world.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from medjax.errors import UserError, warn_once
from medjax.losses import classification as class_losses
from medjax.losses import detection as losses
from medjax.losses import regression as number_losses
from medjax.metrics import classification as class_metrics
from medjax.metrics import detection as metrics
from medjax.metrics import regression as number_metrics
from medjax.metrics import stats
from medjax.models.heads import HeatHead
from medjax.tasks import findings
from medjax.tasks.common import Defaults, Found, Kind, Odd, check_names, first_metric, is_number
from medjax.tasks.findings import LABEL

PRIOR = 0.01  # probability a heat map begins with (Lin et al. 2017)


@dataclass(frozen=True)
class Detection(Defaults):
    """Findings: where, how large, of which class, with which attributes.

    Attributes:
      name: the task's name; also the target's key in a case.
      names: of the classes; the target's label i is names[i - 1].
      attributes: pairs of an attribute's name in the target and its kind: 'binary', 'number', or a number of classes
        n >= 2 (values 0 to n - 1; their expected value is what is reported). A value that is unknown is NaN.
      weight: of this task among several.
      level: of the pyramid the head reads, 0 the finest. features: of its hidden convolution.
      heat: loss of the heat maps: 'focal' (penalty-reduced), 'bce' or 'bce_mse'.
      box: loss of offsets and log sizes: 'smooth_l1' or 'squared'.
      offset, size, giou, attribute: weights of these parts against the heat's; giou 0: none.
      spread: standard deviation of a heat bump over the finding's extent, at least one voxel.
      score_from: least score that is reported. limit: most findings of a class in a case.
      iou: of two findings of one class that overlap more than this the lower is dropped.
      rule, match_iou: what counts as found, see `medjax.metrics.detection.match`.
      rates: false positives a scan at which sensitivities are averaged.
      columns, typical, moments: attribute columns of the target, typical size in mm, mean and standard deviation of
        each attribute that is a number; learnt unless given.
    """

    name: str
    names: Sequence[str] = ("finding",)
    attributes: Sequence[tuple[str, Any]] = ()
    weight: float = 1.0
    level: int = 0
    features: int = 32
    heat: str = "focal"
    box: str = "smooth_l1"
    offset: float = 1.0
    size: float = 1.0
    giou: float = 0.0
    attribute: float = 1.0
    spread: float = 1.0 / 6.0
    score_from: float = 0.05
    limit: int = 100
    iou: float = 0.2
    rule: metrics.Rule = "radius"
    match_iou: float = 0.1
    rates: Sequence[float] = metrics.LUNA_RATES
    columns: Sequence[str] = ()
    typical: float = 0.0
    moments: Sequence[tuple[float, float]] = ()

    def __post_init__(self) -> None:
        check_names(self.name, self.names, 1)
        self.one_of("heat", ("focal", "bce", "bce_mse"))
        self.one_of("box", ("smooth_l1", "squared"))
        self.one_of("rule", get_args(metrics.Rule))
        for key in ("offset", "size", "giou", "attribute", "spread", "typical"):
            self.from_to(key, 0)
        for key in ("score_from", "iou", "match_iou"):
            self.share(key)
        self.count("level", 0)
        self.count("features", 1)
        self.count("limit", 1)
        if (
            isinstance(self.rates, str)
            or not self.rates
            or not all(is_number(r) and 0 <= r < math.inf for r in self.rates)
        ):
            raise UserError(
                f"{self.where('rates')}={self.rates!r}: needs rates of false positives a scan, numbers from 0 on"
            )
        for pair in self.attributes:
            if isinstance(pair, str) or len(pair) != 2 or not (pair[1] in ("binary", "number") or _classes(pair[1])):
                raise UserError(
                    f"{self.where('attributes')}: {pair!r} must be a pair of a name and 'binary', 'number' or a number "
                    "of classes from 2 on, such as ('malignancy', 'binary')"
                )
        taken = {"class", "score", "x_mm", "y_mm", "z_mm", "size_x_mm", "size_y_mm", "size_z_mm"}
        names = [name for name, _ in self.attributes]
        if len(set(names)) < len(names) or taken & set(names):
            raise UserError(f"{self.where('attributes')}: names must differ and be none of {', '.join(sorted(taken))}")
        self.acts("match_iou", self.rule == "iou", "where rule is 'iou'")
        self.acts("attribute", self.attributes, "where there are attributes")
        if len(self.moments) not in (0, len(names)) or any(not scale > 0 for _, scale in self.moments):
            raise UserError(
                f"{self.where('moments')}={self.moments!r}: needs a mean and a standard deviation above 0 of each "
                f"attribute ({', '.join(names) or 'none'})"
            )

    @property
    def kind(self) -> Kind:
        return "findings"

    @property
    def targets(self) -> tuple[str, ...]:
        return ("findings",)

    @property
    def outputs(self) -> int:
        """A heat map a class, three offsets in voxels, three log sizes, then the attributes' channels."""
        return len(self.names) + 6 + sum(_channels(kind) for _, kind in self.attributes)

    @property
    def odd(self) -> Odd:
        first = len(self.names)
        return (first,), (first + 1,), (first + 2,)

    def head(self) -> nn.Module:
        low = math.log(PRIOR / (1.0 - PRIOR))
        start = (low,) * len(self.names) + (0.0,) * (self.outputs - len(self.names))
        return HeatHead(self.outputs, self.features, self.level, start, offset=len(self.names))

    def fit(self, known: Sequence[Any]) -> dict[str, Any]:
        """Checks the findings; learns attribute columns, the typical size, and the attributes' scale."""
        columns = tuple(known[0].columns)
        for name, _ in self.attributes:
            if name not in columns:
                raise UserError(
                    f"task '{self.name}': no finding has an attribute '{name}'; there are: "
                    f"{', '.join(columns) or 'none'}"
                )
        for one in known:
            self.check_target(one)
        rows = np.concatenate([one.value for one in known]).astype(np.float64)
        if not len(rows):
            raise UserError(
                f"task '{self.name}': no training case has a finding, so there is nothing to learn. Check the targets, "
                "or leave the task out."
            )
        missing = [name for number, name in enumerate(self.names, 1) if number not in rows[:, LABEL]]
        if missing:
            warn_once(f"task '{self.name}': no training case has {', '.join(missing)}; the network cannot learn it")
        sizes = rows[:, 3:6][(rows[:, 3:6] > 0).all(axis=1)]
        if points := int((rows[:, 3:6].mean(axis=1) == 0).sum()):
            warn_once(
                f"task '{self.name}': {points} of {len(rows)} findings have no size. Within a radius of 0 lies "
                "nothing, so they always count as missed: give them the size within which a candidate is right"
            )
        self._note_cut(known, len(rows))
        findings.note_hidden(self.name, known)
        moments = []
        for name, kind in self.attributes:
            values = rows[:, LABEL + 1 + columns.index(name)]
            values = values[~np.isnan(values)]
            if not len(values):
                raise UserError(f"task '{self.name}': attribute '{name}' is unknown in every finding; leave it out")
            if kind != "number" and len(np.unique(values)) < 2:
                warn_once(f"task '{self.name}': attribute '{name}' is {values[0]:g} in every finding")
            scale = float(values.std()) if kind == "number" else 1.0
            moments.append((float(values.mean()) if kind == "number" else 0.0, scale or 1.0))
        learnt = {
            "columns": columns,
            "typical": float(np.exp(np.log(sizes).mean())) if len(sizes) else 1.0,
            "moments": tuple(moments),
        }
        return {k: v for k, v in learnt.items() if not getattr(self, k)}

    def check_target(self, one: Any) -> None:
        # By another order of columns one attribute would be read for another.
        if self.attributes and self.columns and tuple(self.columns) != tuple(one.columns):
            raise UserError(
                f"{self.where('columns')}={tuple(self.columns)}: the findings of case {one.case} have the attributes "
                f"{tuple(one.columns)}. Leave columns out, or give every finding those attributes and no other"
            )
        rows = np.asarray(one.value, np.float64)
        if rows.ndim != 2 or rows.shape[1] != LABEL + 1 + len(one.columns):
            raise UserError(
                f"task '{self.name}': case {one.case}: findings must be [M, 7 + attributes], not {rows.shape}"
            )
        for number, row in enumerate(rows, 1):
            where = f"task '{self.name}': case {one.case}, finding {number}"
            if not np.isfinite(row[: LABEL + 1]).all() or (row[3:6] < 0).any():
                raise UserError(
                    f"{where}: place, size and label must be finite, sizes not negative: {row[:7].tolist()}"
                )
            if one.shape is not None and ((row[:3] < -0.5) | (row[:3] > np.asarray(one.shape) - 0.5)).any():
                place = ", ".join(f"{v:.1f}" for v in row[:3])
                raise UserError(
                    f"{where}: its centre, voxel ({place}) of the prepared volume {tuple(one.shape)}, lies outside the "
                    "volume: correct the table, or set data.preprocess.crop=None if the finding was cropped away"
                )
            if not 1 <= row[LABEL] <= len(self.names) or row[LABEL] % 1:
                raise UserError(
                    f"{where}: label {row[LABEL]:g}; the task has 1 to {len(self.names)} ({', '.join(self.names)}). "
                    f"Correct the target or tasks.{self.name}.names."
                )
            for name, kind in self.attributes if one.columns else ():
                self._check_attribute(where, name, kind, float(row[LABEL + 1 + tuple(one.columns).index(name)]))

    def _note_cut(self, known: Sequence[Any], count: int) -> None:
        """Notes findings that reach by more than a voxel beyond the prepared volume their centres lie in."""
        cut = []
        for one in known:
            rows = np.asarray(one.value, np.float64)
            half = findings.reach(rows[:, 3:6], findings.affine_of(one.geometry))
            beyond = np.maximum(half - rows[:, :3], rows[:, :3] + half - (np.asarray(one.shape) - 1.0)) - 0.5
            cut += [f"case {one.case}, finding {i + 1}" for i in np.flatnonzero((beyond > 1.0).any(axis=1))]
        if cut:
            warn_once(
                f"task '{self.name}': {len(cut)} of {count} findings reach more than a voxel beyond their volume (the "
                f"first: {cut[0]}). What is outside is not seen, and training takes them for as large as what is "
                "inside; check their sizes, which are full extents in mm, and the cropping"
            )

    def _check_attribute(self, where: str, name: str, kind: Any, value: float) -> None:
        if math.isinf(value):
            raise UserError(f"{where}: attribute '{name}' is not finite (NaN: unknown)")
        if kind == "number" or math.isnan(value):
            return
        top = 1 if kind == "binary" else kind - 1
        if not 0 <= value <= top or value % 1:
            raise UserError(f"{where}: attribute '{name}' is {value:g}; it takes 0 to {top}")

    def prepare(self, key: Array, batch: dict[str, Array]) -> dict[str, Array]:
        """Adds where the instances of the patch lie: `<task>/centre`, `<task>/extent` f32[B, M, 3] in voxels, and
        `<task>/state` i32[B, M] (`medjax.tasks.findings`)."""
        table = batch[f"{self.name}/table"]
        found = findings.locate(batch[f"{self.name}/target"], table.shape[1], batch.get(f"{self.name}/cut"))
        labelled = (table[..., LABEL] >= 1) & (table[..., LABEL] <= len(self.names))
        state = jnp.where(labelled, found.state, findings.ABSENT)
        return {
            **batch,
            f"{self.name}/centre": found.centre,
            f"{self.name}/extent": found.size,
            f"{self.name}/state": state,
        }

    def loss(self, outputs: Sequence[Array], batch: Mapping[str, Array]) -> Array:
        """Heat, offset, size and attributes, each a mean over the findings of an example.

        A finding that the patch's border cuts is neither sought nor wrong to find: its voxels do not count.
        """
        out = outputs[0]
        centre, extent, state = (batch[f"{self.name}/{part}"] for part in ("centre", "extent", "state"))
        table, classes = batch[f"{self.name}/table"], len(self.names)
        whole = state == findings.WHOLE
        label = jnp.where(whole, jnp.nan_to_num(table[..., LABEL]).astype(jnp.int32) - 1, -1)
        middle = jnp.clip(jnp.round(centre), 0, jnp.asarray(out.shape[1:4]) - 1)
        sigma = jnp.maximum(extent * self.spread, 1.0)
        heat = findings.heat_maps(out.shape[1:4], middle, sigma, label, classes)
        counted = findings.state_of(batch[f"{self.name}/target"], state) != findings.CUT
        total = self._heat_loss(out[..., :classes], heat, sigma, whole, counted)

        values, voxels, inside = findings.around(out[..., classes:], centre)
        used = (inside & whole[..., None]).astype(jnp.float32)
        share = used / jnp.maximum(used.sum(axis=-1, keepdims=True), 1.0)
        share /= jnp.maximum(whole.sum(axis=-1), 1)[:, None, None]  # sums to 1 over an example's findings
        spacing = batch["spacing"][:, None, None, :]
        # Absent findings have a centre at the origin and no share: what they give is finite and counts nothing.
        wanted_offset = jnp.where(used[..., None] > 0, centre[:, :, None] - voxels, 0.0)
        wanted_size = extent[:, :, None] * spacing
        log_size = jnp.log(wanted_size / (self.typical or 1.0))
        term = self._box(values[..., :3] - wanted_offset).mean(axis=-1) * self.offset
        term += self._box(values[..., 3:6] - log_size).mean(axis=-1) * self.size
        if self.giou:
            sizes = jnp.exp(jnp.clip(values[..., 3:6], -8.0, 8.0)) * (self.typical or 1.0)
            boxes = jnp.concatenate([values[..., :3] * spacing, sizes], axis=-1)
            wanted = jnp.concatenate([wanted_offset * spacing, jnp.broadcast_to(wanted_size, sizes.shape)], axis=-1)
            term += self.giou * losses.giou_loss(boxes, wanted)
        total += (share * term).sum(axis=(1, 2))
        if self.attributes:
            total += self.attribute * (share * self._attribute_loss(values[..., 6:], table)).sum(axis=(1, 2))
        return total

    def _heat_loss(self, logits: Array, heat: Array, sigma: Array, whole: Array, counted: Array) -> Array:
        if self.heat == "focal":
            return losses.heat_focal(logits, heat, counted)
        # What one bump amounts to, summed over the findings; a patch without any is divided by that of one voxel's.
        one = (2.0 * math.pi) ** 1.5 * jnp.prod(sigma, axis=-1)
        mass = jnp.maximum((one * whole).sum(axis=-1), (2.0 * math.pi) ** 1.5)
        function = losses.heat_bce if self.heat == "bce" else losses.heat_bce_mse
        return function(logits, heat, mass, counted)

    def _box(self, difference: Array) -> Array:
        return jnp.square(difference) if self.box == "squared" else number_losses.smooth_l1_terms(difference)

    def _attribute_loss(self, values: Array, table: Array) -> Array:
        """Mean over attributes, [B, M, 27]; an unknown one adds nothing."""
        total, first = jnp.zeros(values.shape[:-1]), 0
        for number, (name, kind) in enumerate(self.attributes):
            channels = _channels(kind)
            x = values[..., first : first + channels].reshape(-1, channels)
            target = jnp.broadcast_to(self._column(table, name)[..., None], total.shape).reshape(-1)
            if kind == "binary":
                loss = class_losses.binary_cross_entropy(x, target[:, None])
            elif kind == "number":
                mean, deviation = self._moments(number)
                loss = number_losses.smooth_l1(x, (target[:, None] - mean) / deviation)
            else:
                loss = class_losses.cross_entropy(x, jnp.where(jnp.isnan(target), -1, target).astype(jnp.int32))
            total += loss.reshape(total.shape) / len(self.attributes)
            first += channels
        return total

    def _column(self, table: Any, name: str) -> Any:
        """An attribute's column of a table of findings."""
        columns = list(self.columns or [name for name, _ in self.attributes])
        return table[..., LABEL + 1 + columns.index(name)]

    def _moments(self, number: int) -> tuple[float, float]:
        return self.moments[number] if self.moments else (0.0, 1.0)

    def probabilities(self, outputs: Array) -> Array:
        """Heat as probabilities, offsets in voxels, sizes in mm, attributes as probabilities or in their own unit."""
        classes = len(self.names)
        sizes = jnp.exp(jnp.clip(outputs[..., classes + 3 : classes + 6], -8.0, 8.0)) * (self.typical or 1.0)
        parts = [jax.nn.sigmoid(outputs[..., :classes]), outputs[..., classes : classes + 3], sizes]
        first = classes + 6
        for number, (_, kind) in enumerate(self.attributes):
            channels = _channels(kind)
            x = outputs[..., first : first + channels]
            if kind == "number":
                mean, deviation = self._moments(number)
                parts.append(x * deviation + mean)
            else:
                parts.append(jax.nn.sigmoid(x) if kind == "binary" else jax.nn.softmax(x, axis=-1))
            first += channels
        return jnp.concatenate(parts, axis=-1)

    def decode(self, outputs: np.ndarray, geometry: Any = None) -> list[Found]:
        """The findings of a case, highest score first: peaks of the maps, those that overlap a better one left out."""
        affine, classes = findings.affine_of(geometry), len(self.names)
        found = []
        for number, name in enumerate(self.names):
            heat = np.ascontiguousarray(outputs[..., number])
            voxels = findings.peaks(heat, self.score_from)
            at = outputs[tuple(voxels.T)].astype(np.float64)
            scores = at[:, number]
            centres = findings.to_world(voxels + at[:, classes : classes + 3], affine)
            sizes = findings.sizes_to_world(at[:, classes + 3 : classes + 6], affine)
            boxes = np.concatenate([centres, sizes], axis=1)
            for i in metrics.non_maximum_suppression(boxes, scores, iou=self.iou)[: self.limit]:
                found.append(
                    Found(
                        name, float(scores[i]), _three(centres[i]), _three(sizes[i]), self._read(at[i, classes + 6 :])
                    )
                )
        return sorted(found, key=lambda one: -one.score)

    def _read(self, values: np.ndarray) -> dict[str, float]:
        read, first = {}, 0
        for name, kind in self.attributes:
            part = values[first : first + _channels(kind)]
            read[name] = float(part @ np.arange(len(part))) if _classes(kind) else float(part[0])
            first += len(part)
        return read

    def table(self, decoded: Sequence[Found]) -> list[dict[str, Any]]:
        return [one.row() for one in decoded]

    def reference(self, value: np.ndarray, geometry: Any = None) -> np.ndarray:
        """A table of findings with its centres in world mm, [M, 7 + A]."""
        return findings.reference_rows(value, geometry)

    def score(
        self, prediction: Sequence[Found], reference: np.ndarray, spacing: Sequence[float], voxel: float | None = None
    ) -> list[dict[str, Any]]:
        """A row a lesion ('hit' or 'missed') and a row a false finding ('false'); 'none' for a class without either.

        Findings that a better one has found already have no row: they count neither way.
        """
        rows = []
        for number, name in enumerate(self.names, 1):
            found = [one for one in prediction if one.label == name]
            true = reference[reference[:, LABEL] == number]
            boxes = np.array([(*one.center, *one.size) for one in found]).reshape(-1, 6)
            scores = np.array([one.score for one in found])
            matched = metrics.match(boxes, scores, true[:, :6], rule=self.rule, iou=self.match_iou)
            events = [
                self._hit(name, found[by] if by >= 0 else None, row) for by, row in zip(matched.by, true, strict=True)
            ]
            events += [self._row(name, "false", score=scores[i]) for i in np.flatnonzero(matched.false)]
            rows += events or [self._row(name, "none")]
        return rows

    def _row(self, name: str, event: str, **values: float) -> dict[str, Any]:
        keys = ["score", "error_mm", "size_mm", "reference_size_mm"]
        keys += [key for attribute, _ in self.attributes for key in (attribute, f"{attribute}_reference")]
        return {"class": name, "event": event} | {key: float(values.get(key, math.nan)) for key in keys}

    def _hit(self, name: str, found: Found | None, true: np.ndarray) -> dict[str, Any]:
        values = {"reference_size_mm": float(true[3:6].mean())}
        for attribute, _ in self.attributes:
            values[f"{attribute}_reference"] = float(self._column(true, attribute))
        if found is None:
            return self._row(name, "missed", **values)
        values |= {
            "score": found.score,
            "error_mm": float(np.linalg.norm(np.subtract(found.center, true[:3]))),
            "size_mm": float(np.mean(found.size)),
            **found.attributes,
        }
        return self._row(name, "hit", **values)

    def summarize(self, rows: Sequence[Mapping[str, Any]], *, resamples: int = 1000) -> dict[str, Any]:
        """CPM, the sensitivities it is the mean of, average precision; of what is found: distance, size, attributes.

        Of the latter `n` is how many lesions were found and have the attribute, `of` how many have it, found or not.
        """
        marked, seen = [], set()
        for number, row in enumerate(rows):
            scan = (row["class"], row.get("case", number))
            marked.append({**row, "scan": scan not in seen})
            seen.add(scan)

        def scores(t: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
            lesion = (t["event"] == "hit") | (t["event"] == "missed")
            found = np.where(t["event"] == "hit", t["score"], -math.inf)[lesion]
            return found, t["score"][t["event"] == "false"]

        def curve(t: Mapping[str, np.ndarray]) -> metrics.Curve:
            # A resample repeats a patient's rows, first ones included: their number is that of its scans.
            return metrics.froc(*scores(t), max(int(t["scan"].sum()), 1))

        def hits(function: Any, a: str, b: str) -> Any:
            def value(t: Mapping[str, np.ndarray]) -> float:
                known = (t["event"] == "hit") & ~np.isnan(t[b])
                return function(t[a][known], t[b][known]) if known.any() else math.nan

            return value

        def distance(t: Mapping[str, np.ndarray]) -> float:
            found = t["error_mm"][t["event"] == "hit"]
            return float(found.mean()) if len(found) else math.nan

        wanted: dict[str, Any] = {"cpm": lambda t: metrics.cpm(curve(t), self.rates)}
        for rate in self.rates:
            wanted[f"sensitivity_at_{rate:g}"] = lambda t, r=rate: float(metrics.sensitivity_at(curve(t), [r])[0])
        wanted["average_precision"] = lambda t: metrics.detection_average_precision(*scores(t))
        wanted["error_mm"] = distance
        wanted["size_mae_mm"] = hits(number_metrics.mean_absolute_error, "size_mm", "reference_size_mm")
        for name, kind in self.attributes:
            if kind == "binary":
                wanted[f"{name}_auroc"] = hits(class_metrics.auroc, name, f"{name}_reference")
            else:
                wanted[f"{name}_mae"] = hits(number_metrics.mean_absolute_error, name, f"{name}_reference")
        summary = stats.summarize_cohort(marked, wanted, self.names, n=resamples)
        known = {"error_mm": "reference_size_mm", "size_mae_mm": "reference_size_mm"}
        for name, kind in self.attributes:
            known[f"{name}_{'auroc' if kind == 'binary' else 'mae'}"] = f"{name}_reference"
        for metric, key in known.items():
            for name, values in summary[metric]["per_class"].items():
                events = [r["event"] for r in rows if r["class"] == name and not math.isnan(r[key])]
                values |= {"n": events.count("hit"), "of": events.count("hit") + events.count("missed")}
        return summary

    def selection(self, summary: Mapping[str, Any]) -> float:
        return first_metric(summary, "cpm") or 0.0


def _classes(kind: Any) -> bool:
    return isinstance(kind, int) and not isinstance(kind, bool) and kind >= 2


def _channels(kind: Any) -> int:
    return kind if _classes(kind) else 1


def _three(values: np.ndarray) -> tuple[float, float, float]:
    x, y, z = (float(v) for v in values)
    return x, y, z
