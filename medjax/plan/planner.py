"""The planner: cohort -> fingerprint -> spacing, network, patch, batch, normalisation and folds."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from medjax import config as config_lib
from medjax.augment import sides
from medjax.data import cohort as cohorts
from medjax.data import dataset, pipeline, preprocess, sampler
from medjax.errors import UserError
from medjax.logging import Progress, say
from medjax.plan import memory, recipe, rules
from medjax.plan.fingerprint import Fingerprint, fingerprint

VERSION = 1
FOREGROUND = 0.33  # share of examples centred on a structure: nnU-Net's
FOLDS = 5
CROP_BELOW = 0.95  # median share of voxels inside the non-zero box under which cropping to it is worth while
MASKED_BELOW = 0.75  # ... under which the zeros are background: intensities are measured without them
_CT = re.compile(r"(?<![a-z])(ce|nc|lr|hr|ld)?ct(?![a-z])", re.IGNORECASE)
_RESIDUAL = "resenc"  # nnU-Net's network with residual encoder among `models.BACKBONES`

# How a recipe trains that has no opinion of its own. On a GPU nnU-Net's schedule; on a CPU one that ends the same day.
SCHEDULES: dict[str, dict[str, dict[str, Any]]] = {
    "gpu": {
        "optim": {"name": "sgd", "lr": 0.01, "momentum": 0.99, "schedule": "poly", "weight_decay": 3e-5, "clip": 12.0},
        "train": {"total": "250000 steps", "log_every": "50 steps", "eval_every": "5000 steps",
                  "checkpoint_every": "1000 steps", "precision": "bfloat16"},
    },
    "cpu": {
        "optim": {"name": "adamw", "lr": 3e-3, "weight_decay": 1e-2, "schedule": "cosine", "warmup": "50 steps",
                  "ema": 0.997},
        "train": {"total": "1500 steps", "eval_every": "500 steps", "checkpoint_every": "250 steps"},
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Division:
    """Who is learnt from.

    Attributes:
      fitted: cases the plan is learnt from. splits: of the first fold. folds: fold -> case id -> split; empty where the
        configuration's or the cohort's own splits are used.
    """

    fitted: tuple[cohorts.Case, ...]
    splits: cohorts.Splits
    folds: tuple[dict[str, str], ...] = ()


def start(kind: str, cohort: str) -> ConfigDict:
    """The configuration a plan for a cohort begins with, before the user's overrides."""
    config = config_lib.defaults()
    config.data.cohort = cohort
    config.data.foreground = FOREGROUND
    config.name = re.sub(r"\W+", "_", Path(cohort).stem.split(".")[0]) or "planned"
    for section, values in SCHEDULES[kind].items():
        config_lib.merge(config[section], values)
    config.augment.policy = "nnunet"
    return config


def make(
    config: ConfigDict, *, budget: int | None, kind: str, device: Any, exact: bool, like: str | None, given: set[str]
) -> tuple[dict[str, Any], ConfigDict, tuple[dict[str, str], ...]]:
    """Plans.

    Args:
      config: resolved; changed in place to what is planned.
      budget: bytes. kind, device, exact: see `memory.find_device`.
      like: one of `rules.PRESETS`, or None: the compiler decides.
      given: keys the user set, which stay.

    Returns:
      `(plan, config, folds)`: plan.json's table, the whole configuration, and `Division.folds`.
    """
    cohort, job = open_tasks(config)
    division = divide(cohort, config, job)
    progress = Progress("reading training cases", len(division.fitted))
    seen = fingerprint(cohort, division.fitted, config.data.preprocess, config.data.workers, progress.update)
    progress.close()
    notes = []
    if seen.twins:
        division = divide(cohort, config, job, seen.twins)
        pairs = ", ".join(f"{a} and {b}" for a, b in seen.twins[:3])
        notes.append(f"{len(seen.twins)} pair(s) of cases hold the same voxels and stay on one side: {pairs}")
    if not any(case.targets.keys() & job.keys() for case in division.splits.get("val", ())):
        notes.append("no validation case has a label: there will be no score to choose the best checkpoint by")
    crop, normalize, said = intensity_rules(cohort, seen, config.data.preprocess, given)
    notes += said
    with config.unlocked(), config.ignore_type():
        config.data.preprocess.crop = crop
        config.data.preprocess.normalize = ConfigDict(normalize)
        shapes = seen.shapes(crop is not None)
        spacing = planned_spacing(config.data.preprocess.spacing, seen.spacings, shapes)
        config.data.preprocess.spacing = spacing
        if config.augment.policy and not {"augment", "augment.mirror", "augment.swap"} & given:
            config.augment.mirror, config.augment.swap, said = mirroring(
                cohort.labels, config.data.preprocess.orientation, job.values()
            )
            notes += said
    at_target = rules.resampled(shapes, seen.spacings, spacing)
    median = tuple(float(n) for n in np.median(at_target, axis=0))
    say(f"cases       {len(division.fitted)} to learn from; median shape {_by(median)} at {_by(spacing)} mm")

    if like and rules.PRESETS[like].blocks and "model.name" not in given:
        with config.unlocked():
            config.model = ConfigDict({"name": _RESIDUAL})
            config_lib.fill(config, _options)
    fit = preprocess.fit(config.data.preprocess, cohort, division.splits["train"])
    planner = _Planner(config, cohort, division, fit, job, median, given)
    if like:
        trials = planner.like(like, budget)
    else:
        assert budget is not None
        trials = planner.compiled(budget, device, exact)
    net, batch = trials[-1].net, trials[-1].batch
    with config.unlocked(), config.ignore_type():
        planner.apply(config, net, batch)
    decided = {
        "data": {
            "preprocess": {"spacing": list(spacing), "crop": crop, "normalize": dict(normalize)},
            "patch": list(net.patch),
            "batch_size": batch,
            "foreground": config.data.foreground,
        },
        "model": {k: plain(config.model[k]) for k in _order(config.model, recipe.changes(config).get("model", {}))},
        "tasks": {name: {"levels": c["levels"]} for name, c in config.tasks.items() if c.type == "segmentation"},
        "train": {"precision": config.train.precision},
    }
    plan = {
        "version": VERSION,
        "config": decided,
        "folds": len(division.folds),
        "memory": {
            "budget_bytes": budget,
            "needed_bytes": trials[-1].needed or None,
            "planned_for": kind,
            "decided_by": like or "the compiler",
            "measured_on": memory.measured_on(device, exact) if trials[-1].needed else None,
            "trials": [t.row() for t in trials if t.needed],
        },
        "fingerprint": {
            "cases": len(seen.cases),
            "median_spacing": np.median(seen.spacings, axis=0).round(6).tolist(),
            "finest_spacing": seen.spacings.min(axis=0).tolist(),
            "coarsest_spacing": seen.spacings.max(axis=0).tolist(),
            "median_shape": np.median(seen.shapes(False), axis=0).tolist(),
            "median_share_kept_by_cropping": round(seen.kept, 4),
            "median_shape_at_target": list(median),
            "intensities": {m: seen.intensities(m) for m in cohort.modalities},
        },
        "notes": notes,
    }
    return plan, config, division.folds


def open_tasks(config: ConfigDict) -> tuple[cohorts.Cohort, Mapping[str, Any]]:
    """The cohort, and its tasks; a configuration without tasks gets a segmentation for each mask target."""
    from medjax import job as job_lib
    from medjax import tasks

    if config.data.buckets:
        raise UserError("config: data.buckets: whole volumes are trained on, so there is no patch to plan; set it to 0")
    # A folder that names its masks itself gives them to a task of this name, unless data.targets names others.
    wanted = config.tasks.to_dict() or ({} if config.data.targets else "segmentation")
    cohort = dataset.open_cohort(config.data, wanted)
    if not config.tasks:
        masks = {t: None for case in cohort.cases for t, v in case.targets.items() if isinstance(v, Path)}
        if not masks:
            raise UserError(
                f"{config.data.cohort}: no case has a mask, so there is nothing to plan a segmentation for. Name the "
                "masks (data.targets), or give a recipe with its tasks: --config=RECIPE"
            )
        with config.unlocked():
            config.tasks = ConfigDict({name: {"type": "segmentation"} for name in masks})
            config_lib.fill(config, _options)
    job_lib.declare_targets(config, cohort)
    return cohort, tasks.build(config.tasks, cohort.labels)


def _options(room: str, kind: str) -> Mapping[str, Any]:
    from medjax import models, tasks

    return {"model": models.options, "tasks": tasks.options}[room](kind)


def divide(
    cohort: cohorts.Cohort,
    config: ConfigDict,
    job: Mapping[str, Any],
    twins: Sequence[tuple[str, str]] = (),
) -> Division:
    """The configuration's splits, the cohort's own if it has 'train' and 'val', or else folds by patient.

    Args:
      twins: pairs of case ids that must not be parted.

    Raises:
      UserError: fewer than two patients.
    """
    wanted = config.data.split
    own = cohort.splits or {}
    if wanted.file or wanted.column or wanted.folds or {"train", "val"} <= set(own):
        splits = dataset.open_splits(cohort, config.data, config.seed, config.tasks)
        if "train" not in splits:
            raise UserError(
                f"config: data.split gives cohort '{cohort.name}' no 'train' split; it gives {list(splits)}"
            )
        return Division(_labelled(splits["train"], job, cohort), splits)

    held = {id for name, ids in own.items() if name != "train" for id in ids}
    pool = [case for case in cohort.cases if case.id not in held]
    labelled = _labelled(pool, job, cohort)
    group = {case.id: case.group for case in labelled}
    for a, b in twins:
        old, new = group[b], group[a]
        group = {id: new if g == old else g for id, g in group.items()}
    patients = set(group.values())
    rest = {case.id: cohorts.UNUSED for case in pool if case.id not in group}
    rest |= {id: name for name, ids in own.items() if name != "train" for id in ids}
    if len(patients) >= 2:
        dealt = dataclasses.replace(
            cohort, cases=tuple(dataclasses.replace(c, group=group[c.id]) for c in labelled), splits=None
        )
        k = min(FOLDS, len(patients))
        folds = []
        for i in range(k):
            parts = cohorts.split(dealt, {"folds": k, "fold": i}, config.seed, check_content=False)
            folds.append({c.id: name for name, part in parts.items() for c in part} | rest)
    elif others := [c.id for c in pool if c.id in rest and c.group not in {case.group for case in labelled}]:
        folds = [dict.fromkeys(group, "train") | rest | dict.fromkeys(others, "val")]
    else:
        raise UserError(
            f"{cohort.name}: all {len(labelled)} labelled case(s) are of one patient, so that none is left to validate "
            "on. Add a second patient, or say who is whom (data.group)."
        )
    first = folds[0]
    splits = {name: tuple(c for c in cohort.cases if first.get(c.id) == name) for name in dict.fromkeys(first.values())}
    return Division(labelled, splits, tuple(folds))


def _labelled(
    cases: Sequence[cohorts.Case], job: Mapping[str, Any], cohort: cohorts.Cohort
) -> tuple[cohorts.Case, ...]:
    found = tuple(case for case in cases if case.targets.keys() & job.keys())
    if not found:
        raise UserError(f"{cohort.name}: no training case has a target for {', '.join(job)}")
    return found


def planned_spacing(wanted: Any, spacings: np.ndarray, shapes: np.ndarray) -> tuple[float, float, float]:
    """The spacing asked for ('median' counts as such), or that of the rules."""
    if wanted is None:
        return rules.target_spacing(spacings, shapes)
    if wanted == "median":
        x, y, z = (float(f"{s:.6g}") for s in np.median(spacings, axis=0))
        return x, y, z
    return preprocess.check_spec({"spacing": wanted}, ())["spacing"]


def intensity_rules(
    cohort: cohorts.Cohort, seen: Fingerprint, spec: Mapping[str, Any], given: set[str]
) -> tuple[str | None, dict[str, str], list[str]]:
    """Cropping, and how each modality is normalised: CT by the training foreground, else by the volume itself.

    Returns:
      `(crop, {modality: normalisation}, notes)`. What the user set (or a recipe other than the defaults) stays.
    """
    notes: list[str] = []
    ct = {m for m in cohort.modalities if _CT.search(m)}
    crop = spec["crop"]
    if "data.preprocess.crop" not in given and crop is None and not ct and seen.kept < CROP_BELOW:
        crop = "nonzero"
    asked = spec["normalize"]
    if "data.preprocess.normalize" in given or asked != preprocess.DEFAULT_SPEC["normalize"]:
        return crop, preprocess.check_spec({"normalize": asked}, cohort.modalities)["normalize"], notes
    table = {}
    for modality in cohort.modalities:
        if modality in ct:
            table[modality] = "ct"
        else:
            table[modality] = "zscore_nonzero" if crop and seen.kept < MASKED_BELOW else "zscore"
            low = seen.intensities(modality).get("min", 0)
            if low < -500:
                notes.append(
                    f"{modality} goes down to {low:g}: if it is CT, data.preprocess.normalize={{'{modality}': 'ct'}}"
                )
    return crop, table, notes


def mirroring(
    labels: Mapping[str, int], orientation: str = "RAS", job: Iterable[Any] = ()
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...], list[str]]:
    """`(axes, swap, notes)`: all axes; labels of the left trade places with those of the right, or that axis stays."""
    answers = [name for task in job if task.kind == "case" and (name := sides.answer_of_one_side(task))]
    pairs, lonely, unlike = sides.sided(labels)
    side = sides.axis_of(orientation)
    swap = tuple(sorted((min(labels[a], labels[b]), max(labels[a], labels[b])) for a, b in pairs))
    why = ""
    if lonely:
        why = f"label '{lonely[0]}' has no counterpart on the other side"
    elif unlike:
        why = f"label '{unlike[0]}' may have a side, and no other label is sure to be its mirror image"
    elif answers:
        why = f"'{answers[0]}' is an answer of one side, and answers of whole cases do not trade places"
    elif swap and side:
        why = f"labels trade places along axis 0 only, and left and right is axis {side} of '{orientation}'"
    if why:
        axes = tuple(axis for axis in range(3) if axis != side)
        return axes, (), [f"{why}: no mirroring from left to right"]
    return (0, 1, 2), swap, []


class _Planner:
    """Chooses network, patch and batch."""

    def __init__(
        self,
        config: ConfigDict,
        cohort: cohorts.Cohort,
        division: Division,
        fit: preprocess.Plan,
        job: Mapping[str, Any],
        median: Sequence[float],
        given: set[str],
    ) -> None:
        self._config, self._cohort, self._division, self._fit, self._tasks = config, cohort, division, fit, job
        self._median, self._spacing, self._given = tuple(median), tuple(config.data.preprocess.spacing), given
        # As nnU-Net counts: labels or regions, and the background. Other tasks' heads weigh nothing.
        masks = [t for name, t in job.items() if config.tasks[name].type == "segmentation"]
        self._outputs = sum(t.outputs + bool(t.regions) for t in masks)
        # A backbone whose stages are lists takes the rules' stages; another keeps its own and takes the patch.
        own = {"model.factors", "model.kernels"} & given
        self._staged = {"features", "factors", "kernels"} <= set(config.model) and not own

    def apply(self, config: ConfigDict, net: rules.Topology, batch: int) -> None:
        """Writes a network and a batch size into an unlocked configuration."""
        config.data.patch, config.data.batch_size = net.patch, batch
        if not self._staged:
            return
        config.model.features = net.features(self._width)
        config.model.factors, config.model.kernels = net.factors, net.kernels
        for key, count in (("convs", net.stages), ("blocks", net.stages), ("decoder_convs", net.stages - 1)):
            if isinstance(config.model.get(key), list | tuple):
                each = tuple(self._config.model[key])
                config.model[key] = (*each, *each[-1:] * count)[:count]
        for name, task in config.tasks.items():
            if task.type == "segmentation" and f"tasks.{name}.levels" not in self._given:
                # As nnU-Net: all of the decoder but its coarsest level.
                task["levels"] = max(1, net.stages - 2)

    @property
    def _width(self) -> int:
        return int(self._config.model.features[0])

    def like(self, name: str, budget: int | None) -> list[memory.Trial]:
        """nnU-Net's own choice, from its estimate; nothing is compiled."""
        preset = rules.PRESETS[name]
        if fixed := sorted({"data.patch", "data.batch_size", "model.factors", "model.kernels"} & self._given):
            raise UserError(f"--like={name} decides on {fixed[0]}: leave --config.{fixed[0]} out, or leave out --like")
        gigabytes = None if budget is None else budget / 1e9
        cases = len(self._division.fitted)
        net, batch = rules.like_nnunet(preset, self._spacing, self._median, cases, self._outputs, gigabytes)
        say(f"{name:11} patch {_by(net.patch)}, batch {batch}, {net.stages} stages (by nnU-Net's estimate)")
        return [memory.Trial(net, batch, 0, 0)]

    def compiled(self, budget: int, device: Any, exact: bool) -> list[memory.Trial]:
        """The compiler's choice."""
        from medjax import job as job_lib
        from medjax.models.model import DTYPES, build_model

        config = self._config.copy_and_resolve_references()
        model = build_model(config, self._tasks)
        nets = self._candidates(model)
        train_cases = self._division.splits["train"]
        total = job_lib.steps_of(config, "train.total", len(train_cases))
        read: Sequence[cohorts.Case] = _labelled(train_cases, self._tasks, self._cohort)
        masks_alone = all(task.type == "segmentation" for task in config.tasks.values())
        if masks_alone:  # one stands for all; else heads are made for what all the targets are
            read = [min(read, key=lambda case: np.prod(self._fit.prepared_shape(case)))]
        prepared = dataset.each(self._prepared_targets, read, config.data.workers, None)
        source = pipeline.Source(prepared, tuple(self._tasks), self._fit.ignore)
        job = job_lib.Job(self._cohort, {"train": tuple(read)}, self._fit, self._tasks, model, total)
        if not masks_alone:
            job = job_lib.fit_tasks(config, job, source)
        if not exact:
            say("no GPU here: the step is compiled for this CPU instead, which only estimates what a GPU needs")
        meter = memory.Meter(config, job, source, device, self.apply)

        blocks = rules.PRESETS["nnunet-resenc-l"].blocks if config.model.get("residual") else ()

        def measure(net: rules.Topology, batch: int) -> memory.Trial:
            say(f"compiling   patch {_by(net.patch)}, batch {batch}, {net.stages} stages ...")
            trial = meter(net, batch)
            verdict = "fits" if trial.needed <= budget else "too large"
            say(f"            {trial.needed / 1e9:.2f} GB of {budget / 1e9:.2f}: {verdict} ({trial.seconds:.0f} s)")
            return trial

        def weight(net: rules.Topology) -> float:
            if not self._staged:
                return float(np.prod(net.patch))
            return rules.elements(net, self._outputs, blocks, self._width)

        own_batch = int(config.data.batch_size) if "data.batch_size" in self._given else None

        def limit(net: rules.Topology) -> int:
            return own_batch or rules.batch_limit(net.patch, self._median, len(self._division.fitted))

        try:
            itemsize = DTYPES[config.train.precision].dtype.itemsize
            rounds = config.optim.accumulate
            least = own_batch or math.ceil(rules.MIN_BATCH / rounds) * rounds
            return memory.search(nets, budget, weight, measure, limit, itemsize, least, rounds)
        except memory.TooSmall as error:
            need = error.trial.needed
            cures = [f"--budget={need / 1e9 * 1.05:.2f}GB"]
            if self._staged:
                cures.append(f"a narrower network, --config.model.features='({max(1, self._width // 2)},)'")
            if "remat" in config.model and not config.model.remat:
                cures.append("--config.model.remat=True")
            if config.train.precision == "float32":
                cures.append("--config.train.precision=bfloat16")
            raise UserError(
                f"--budget={budget / 1e9:.3g}GB is too small: even the patch {_by(error.trial.net.patch)} at "
                f"batch {error.trial.batch}, needs {need / 1e9:.3g} GB. What would help: {', or '.join(cures)}"
            ) from None

    def _prepared_targets(self, case: cohorts.Case) -> preprocess.Prepared:
        """A prepared case whose image takes no memory: only its shape and the targets are asked for."""
        prepared = preprocess.prepare_case(case, self._fit)
        empty = np.broadcast_to(np.zeros((), prepared.image.dtype), prepared.image.shape)
        return dataclasses.replace(prepared, image=empty)

    def _candidates(self, model: Any) -> list[rules.Topology]:
        factor = tuple(model.backbone.total_factor())
        if "data.patch" in self._given:
            patch = tuple(self._config.data.patch)
            net = rules.topology(self._spacing, patch) if self._staged else rules.fixed(patch, factor)
            sampler.check_multiple(patch, net.multiple)
            return [net]
        if self._staged:
            return list(rules.sequence(self._spacing, self._median))
        return list(rules.patches_of(factor, self._spacing, self._median))


def _order(model: Mapping, changed: Mapping) -> list[str]:
    """The keys of the model to write: what the rules set in the order of thought, then what else is not the default."""
    first = [k for k in ("name", "features", "factors", "kernels") if k in model]
    return first + [k for k in changed if k not in first]


def plain(value: Any) -> Any:
    """A configuration as JSON has it: tables, lists, numbers and texts."""
    if isinstance(value, Mapping | ConfigDict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def _by(numbers: Sequence[float]) -> str:
    return "×".join(f"{n:g}" for n in numbers)
