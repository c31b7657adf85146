"""What a run trains, and on what: cohort, splits, plan, tasks, model, prepared cases."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from medjax import config as config_lib
from medjax import evaluate, measures, optim, parallel, tasks
from medjax.augment import sides
from medjax.data import cohort as cohorts
from medjax.data import dataset, pipeline, preprocess, sampler, store
from medjax.errors import UserError
from medjax.logging import Progress, say
from medjax.models.model import Model, build_model, check_heads, check_levels
from medjax.tasks import confirm
from medjax.tasks.common import moved


@dataclass(frozen=True)
class Job:
    """What a run trains on and what it trains.

    Attributes:
      splits: split name -> cases, with 'train'. plan: preprocessing, learnt from the training cases.
      total: optimizer steps of the whole run. known: paths of the parameters that `config.init` has filled.
    """

    cohort: cohorts.Cohort
    splits: cohorts.Splits
    plan: preprocess.Plan
    tasks: Mapping[str, tasks.Task]
    model: Model
    total: int
    known: frozenset[str] = frozenset()


def open_job(config: ConfigDict) -> Job:
    """Opens the cohort, divides it, learns the plan, builds tasks and model."""
    cohort = dataset.open_cohort(config.data, config.tasks)
    declare_targets(config, cohort)
    splits = dataset.open_splits(cohort, config.data, config.seed, config.tasks)
    if "train" not in splits:
        raise UserError(f"config: data.split gives cohort '{cohort.name}' no 'train' split; it gives {list(splits)}")
    evaluated = evaluate.splits_to_evaluate(config, splits)
    job = tasks.build(config.tasks, cohort.labels)
    for split in evaluated if config.eval.predictions else ():
        evaluate.output_files(job, Path(split), [case.id for case in splits[split]])
    for task in tasks.self_supervised(job).values():
        task.check(config.data.patch)
        task.check_rows(parallel.rows_together(config, parallel.make_mesh(config.mesh)))
    measures.check(config.measures, config.data, job, splits)
    confirm.rules(config.eval.confirm, job)
    confirm.rules(config.eval.confirm, tasks.build(tasks.read_as(config.tasks, config.eval.tasks), cohort.labels))
    total = steps_of(config, "train.total", len(splits["train"]))
    if total < 1:
        raise UserError(f"config: train.total='{config.train.total}' must be at least one step")
    # Before cases are prepared: a warm-up longer than the run.
    optim.schedule(config.optim, total, steps_of(config, "optim.warmup", len(splits["train"])))
    plan = preprocess.fit(config.data.preprocess, cohort, splits["train"])
    sides.check(config.augment, job, plan.orientation)
    sides.views(config.augment, job, config.eval.mirror, plan.orientation)
    model = build_model(config, job)
    check_heads(model, len(plan.modalities))
    # A default says 'at most so many'.
    levels = {n: t.levels for n, t in config.tasks.items() if t.get("levels") != tasks.options(t.type).get("levels")}
    check_levels(model, levels, len(plan.modalities))
    if config.data.buckets:
        # What the network is made for, and the window of prediction: whatever volume there is.
        cases = (*splits["train"], *splits.get("val", ()))
        shapes = [plan.prepared_shape(case) for case in cases]
        config.data.patch = sampler.bucket_shapes(shapes, 1, multiple(config, model))[0]
    return Job(cohort, splits, plan, job, model, total)


def declare_targets(config: ConfigDict, cohort: cohorts.Cohort) -> None:
    """Writes what the cohort declares about targets into the tasks that do not say otherwise.

    Names of classes, and for the masks of an nnU-Net folder its regions and its ignore label.

    Raises:
      UserError: a task's names are those of the cohort's classes in another order.
    """
    by_value = {value: name for name, value in cohort.labels.items()}
    with config.unlocked(), config.ignore_type():
        for name, task in config.tasks.items():
            if "names" in task and not task.names and name in cohort.classes:
                task.names = tuple(cohort.classes[name])
            for declared in dataset.class_orders(config.data, name):
                if swapped := moved(task.get("names", ()), declared):
                    raise UserError(
                        f"config: tasks.{name}.names={tuple(task.names)}: '{swapped[0]}' stands at another place than "
                        f"in the data, which are numbered {declared} (data.classes, or the columns of data.targets): "
                        "answers would get each other's names. Give both the same order, or leave the names out"
                    )
            if task.type != "segmentation":
                continue
            if cohort.regions and not task.regions:
                task.regions = {
                    region: tuple(by_value[value] for value in values) for region, values in cohort.regions.items()
                }
            if cohort.ignore is not None and task.ignore < 0:
                task.ignore = int(cohort.ignore)


def prepare_sources(config: ConfigDict, job: Job) -> dict[str, pipeline.Source]:
    """Reads, checks and preprocesses the training and validation cases, in memory or in the store (`data.store`)."""
    kept: list[str] = [name for name in ("train", "val") if name in job.splits]
    others = [name for name in config.eval.splits if name in job.splits and name not in kept]
    prepared: dict[str, Any] = {}
    if config.data.store:
        splits = {split: job.splits[split] for split in (*kept, *others)}
        prepared, folder = store.prepare(
            config.data.store, job.cohort.name, job.plan, splits, config.data.workers, Progress
        )
        say(f"store       {folder}")
    else:
        for split in (*kept, *others):
            progress = Progress(f"{'preparing' if split in kept else 'checking'} {split} cases", len(job.splits[split]))
            function: Callable = dataset.prepare if split in kept else dataset.check
            prepared[split] = function(job.plan, job.splits[split], config.data.workers, progress.update)
            progress.close()
    labelled = tuple(name for name, task in job.tasks.items() if task.kind != "pretext")
    sources = {name: pipeline.Source(prepared[name], labelled, job.plan.ignore) for name in kept}
    if not config.data.buckets:
        shapes = [case.image.shape[:3] for case in sources["train"].cases]
        sampler.check_filled(config.data.patch, shapes, job.model.backbone.total_factor())
    return sources


def multiple(config: ConfigDict, model: Model) -> tuple[int, int, int]:
    """What the axes of a whole volume are padded to multiples of: what the network halves, on each device."""
    x, y, z = model.backbone.total_factor()
    return x * parallel.make_mesh(config.mesh).shape["space"], y, z


def train_examples(
    config: ConfigDict, job: Job, source: pipeline.Source
) -> tuple[sampler.Sampler, Sequence[int] | Sequence[Sequence[int]]]:
    """Which case each training example is of, and the shape of every row: of each bucket where there are buckets."""
    shapes: list[tuple[int, int, int]] = []
    if config.data.buckets:
        whole = [case.image.shape[:3] for case in source.cases]
        shapes = sampler.bucket_shapes(whole, config.data.buckets, multiple(config, job.model))
    examples = pipeline.make_sampler(
        config.seed,
        source,
        job.splits["train"],
        foreground=config.data.foreground,
        sampling=config.data.sampling,
        labels=job.cohort.labels,
        buckets=shapes,
        batch_size=config.data.batch_size,
    )
    return examples, shapes or tuple(config.data.patch)


def steps_of(config: ConfigDict, key: str, n_examples: int) -> int:
    """The duration at `key` in optimizer steps."""
    value: Any = config
    for part in key.split("."):
        value = value[part]
    return config_lib.steps(value, batch_size=config.data.batch_size, n_examples=n_examples, key=key)


class Targets(Sequence[tasks.Known]):
    """A task's targets of the training cases that have one, read singly: a store may hold more than memory."""

    def __init__(
        self, name: str, cases: Sequence[cohorts.Case], source: pipeline.Source, plan: preprocess.Plan
    ) -> None:
        self._name, self._ids, self._prepared = name, [case.id for case in cases], source.cases
        self._columns = tuple(plan.columns.get(name, ()))
        self._with = [i for i, p in enumerate(source.cases) if name in p.targets or name in p.values]

    def __len__(self) -> int:
        return len(self._with)

    def __getitem__(self, index: Any) -> Any:
        number = self._with[index]
        case = self._prepared[number]
        # Findings are in both: the table describes the instances of the mask.
        value = case.values[self._name] if self._name in case.values else case.targets[self._name]
        return tasks.Known(self._ids[number], np.asarray(value), case.image.shape[:3], self._columns, case.geometry)


def fit_tasks(config: ConfigDict, job: Job, source: pipeline.Source) -> Job:
    """Lets the tasks check the training targets and learn from them; what they learn is written into `config.tasks`.

    Raises:
      UserError: a task without targets, or with targets that are not of its kind.
    """
    for name, task in job.tasks.items():
        kind = job.plan.kinds.get(name)
        if kind and kind not in task.targets and not (kind == "class" and "number" in task.targets):
            raise UserError(
                f"task '{name}': the cohort's target is a {kind}, and tasks of type '{config.tasks[name].type}' take a "
                f"{' or a '.join(task.targets)}; correct tasks.{name}.type or data.targets.{name}"
            )
    names = dict.fromkeys((*job.tasks, *(t for case in job.splits["train"] for t in case.targets)))
    known = {name: Targets(name, job.splits["train"], source, job.plan) for name in names}
    learnt = tasks.fit(config.tasks, job.tasks, known)
    for split in dict.fromkeys(("val", *config.eval.splits)):
        evaluate.check_targets(job.tasks, job.plan, job.splits.get(split, ()))
    if not any(learnt.values()):
        return job
    with config.unlocked(), config.ignore_type():
        for name, values in learnt.items():
            config.tasks[name].update(values)
    built = tasks.build(config.tasks, job.cohort.labels)
    return dataclasses.replace(job, tasks=built, model=build_model(config, built))
