"""From `config.data` to a cohort, its splits, the plan, and prepared cases."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from medjax.data import cohort as cohorts
from medjax.data import joins, preprocess, readers, synthetic, unlabelled
from medjax.errors import UserError
from medjax.ops.native.cpus import usable_cpus


def open_cohort(
    config: Mapping[str, Any], tasks: str | Mapping[str, Any], intake: cohorts.Intake | None = None
) -> cohorts.Cohort:
    """The cohort of `config.data`: a generator's name, a folder of a known layout, or a manifest.

    Args:
      tasks: those of the run, name -> its section (or its type), or the one name of a segmentation. Segmentation tasks
        that `data.targets` does not name get the mask that a Decathlon or nnU-Net folder has for each case.
      intake: what to do about cases that cannot be used; by default the first raises, and `data.exclude` is left out.
    """
    name = config["cohort"]
    if not name:
        known = ", ".join(synthetic.GENERATORS)
        raise UserError(f"config: data.cohort is empty; give a folder, a manifest (.csv, .json) or one of {known}")
    lenient = bool(config.get("skip_unreadable")) and intake is None
    intake = intake or cohorts.Intake(config["exclude"], tolerant=lenient)
    extra = dict(config.get("extra") or {})
    intake.beside = unlabelled.EXTRA if extra.get("folder") else ""
    types = (
        dict.fromkeys([tasks] if tasks else [], "segmentation")
        if isinstance(tasks, str)
        else {t: _type(c) for t, c in tasks.items()}
    )
    targets = {task: spec if isinstance(spec, str) else tuple(spec) for task, spec in config["targets"].items()}
    masks = [task for task, kind in types.items() if kind == "segmentation" and task not in targets]
    masks += [task for task, spec in targets.items() if spec == readers.MASK]
    path = synthetic.generate(name, config["options"]) if name in synthetic.GENERATORS else Path(name).expanduser()
    layout = config["layout"] or readers.recognise(path, config["images"])
    path = path.parent if path.name == "dataset.json" and layout in ("msd", "nnunet") else path
    group, missing = config["group"] or None, config["preprocess"]["missing"] == "zero"
    labels, classes, findings = dict(config["labels"]), dict(config["classes"]), dict(config["findings"])
    images = _images(config)
    if layout in ("msd", "nnunet"):
        for key in ("images", "labels"):
            if config[key]:
                raise UserError(f"config: data.{key}: a folder with dataset.json names its own {key}; leave it empty")
        others = {task: spec for task, spec in targets.items() if spec != readers.MASK}
        table = joins.Table(config["table"], config["id"], others, classes, findings)
        if layout == "msd":
            cohort = cohorts.from_msd(path, masks, group, table, intake)
        else:
            cohort = cohorts.from_nnunet(path, masks, group, config["split"]["fold"], table, intake)
    elif layout == "manifest":
        if not images:
            raise UserError("config: a manifest needs data.images, e.g. {'T1': 't1_file', 'T2': 't2_file'}")
        if config["table"]:
            raise UserError("config: data.table: a manifest is its own table; put the columns into it")
        cohort = cohorts.from_manifest(
            path,
            images,
            targets,
            labels,
            id=config["id"],
            group=group,
            split=config["split"]["column"] or None,
            classes=classes,
            allow_missing=missing,
            findings=findings,
            intake=intake,
        )
    elif layout == "bids":
        table = joins.Table(config["table"], config["id"], {}, classes, findings)
        cohort = cohorts.from_bids(path, images, targets, labels, group, table, missing, intake)
    elif layout == "folder":
        template = config["id"] if "{" in config["id"] else ""
        table = joins.Table(config["table"], "id" if template else config["id"], {}, classes, findings)
        cohort = cohorts.from_folder(path, images, targets, labels, template, group, table, missing, intake)
    elif layout == "files":
        cohort = cohorts.from_files(path, next(iter(config["modalities"]), "image"), group, intake)
    else:
        raise UserError(
            f"config: data.layout={layout!r} is not known; use {', '.join(readers.LAYOUTS)}, or leave it empty"
        )
    order = tuple(config["modalities"]) or cohort.modalities
    if images and not config["modalities"]:
        for case in cohort.cases:
            shared = [m for m, file in case.images.items() if list(case.images.values()).count(file) > 1]
            if shared:  # a configuration sorts its keys: their order says nothing
                raise UserError(
                    f"config: data.modalities is empty, and {case.images[shared[0]]} holds {', '.join(shared)} as its "
                    f"channels. Name all modalities, these in the order of the channels: data.modalities={order}, say."
                )
    if sorted(order) != sorted(cohort.modalities):
        raise UserError(f"config: data.modalities={order} must name each modality once: {', '.join(cohort.modalities)}")
    cohort = replace(cohort, modalities=order)
    if extra.get("folder"):
        cohort = unlabelled.with_extra(cohort, extra["folder"], extra["modality"], missing, intake)
    return unlabelled.usable(cohort, config["preprocess"], intake.problems, config["workers"]) if lenient else cohort


def same_source(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two `config.data` read the same cohort: one generator with the same options, or one place."""
    names = [str(config["cohort"]) for config in (one, other)]
    if not set(names).isdisjoint(synthetic.GENERATORS):
        return names[0] == names[1] and dict(one["options"]) == dict(other["options"])
    places = [Path(name).expanduser().resolve() for name in names]
    a, b = (place.parent if place.name == "dataset.json" else place for place in places)
    return a == b


def _type(task: Any) -> str:
    return task if isinstance(task, str) else str(task["type"])


def _images(config: Mapping[str, Any]) -> dict[str, str]:
    """`data.images` in the order of `data.modalities`."""
    images = dict(config["images"])
    order = tuple(config["modalities"]) or tuple(images)
    if images and sorted(order) != sorted(images):
        raise UserError(f"config: data.modalities={order} must name each modality of data.images once: {list(images)}")
    return {modality: images[modality] for modality in order if modality in images}


def class_orders(config: Mapping[str, Any], task: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What `data.classes` calls a task's classes, and which columns `data.targets` makes its vector of.

    Both in the order of the target's values; empty where there is none.
    """
    classes, columns = config.get("classes", {}).get(task, ()), config.get("targets", {}).get(task, ())
    return tuple(map(str, classes)), () if isinstance(columns, str) else tuple(map(str, columns))


def open_splits(
    cohort: cohorts.Cohort,
    config: Mapping[str, Any],
    seed: int,
    tasks: Collection[str] = (),
    check_content: bool = True,
) -> cohorts.Splits:
    """The splits of `config.data.split`: a file, a column, folds by patient, or else the cohort's own.

    Args:
      tasks: names of the run's, see `hide_labels`.
      check_content: compare the voxels of images across splits, which reads them all.
    """
    wanted = config["split"]
    spec: dict[str, Any] = {k: wanted[k] for k in ("file", "column") if wanted[k]}
    if wanted["folds"]:
        spec |= {"folds": wanted["folds"], "fold": wanted["fold"]}
        spec |= {key: wanted[key] for key in ("test", "stratify") if wanted[key]}
    splits = cohorts.split(cohort, spec, seed, check_content)
    return hide_labels(splits, config.get("labelled", 0), config.get("unlabelled", True), seed, tasks)


def hide_labels(
    splits: cohorts.Splits, count: int, keep: bool, seed: int, tasks: Collection[str] = ()
) -> cohorts.Splits:
    """Takes the targets from all training patients but `count` of those who have labels; 0: from none.

    Patients with labels for more of the tasks come first. Among equals a place in the order depends on (seed, patient)
    alone: those chosen for 3 are among those for 5, on any machine, and patients that are added change nobody else's
    place.

    Args:
      count: `data.labelled`. keep: `data.unlabelled`; whether cases without labels stay.
      tasks: whose targets are labels; where no training case has one of theirs, every target is.

    Raises:
      UserError: a negative count, or one above the number of patients with labels.
    """
    if "train" not in splits or (not count and keep):
        return splits
    every = {name for case in splits["train"] for name in case.targets}
    labels = every & set(tasks) or every
    having: dict[str, set[str]] = {}
    for case in splits["train"]:
        if own := labels & set(case.targets):
            having.setdefault(case.group, set()).update(own)
    if count and not 0 < count <= len(having):
        raise UserError(
            f"config: data.labelled={count}: needs a number from 1 to {len(having)}, the training patients with labels "
            "(0: all of them)"
        )

    def order(group: str) -> tuple[int, bytes]:
        draw = hashlib.blake2b(f"labelled:{seed}:{group}".encode(), digest_size=8).digest()
        return -len(having[group]), draw

    chosen = set(sorted(having, key=order)[: count or None])
    train = [case if case.group in chosen else replace(case, targets={}) for case in splits["train"]]
    return {**splits, "train": tuple(case for case in train if keep or not chosen or labels & set(case.targets))}


def prepare(
    plan: preprocess.Plan,
    cases: Sequence[cohorts.Case],
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[preprocess.Prepared]:
    """Reads, checks and preprocesses the cases, in order, on threads.

    Args:
      workers: 0: one a usable CPU. progress: told how many are done.
    """
    prepared = each(lambda case: preprocess.prepare_case(case, plan), cases, workers, progress)
    preprocess.compare_intensities({c.id: p.scale for c, p in zip(cases, prepared, strict=True)}, plan.modalities)
    return prepared


def check(
    plan: preprocess.Plan,
    cases: Sequence[cohorts.Case],
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Raises what `prepare` would for any of the cases, and keeps none: a bad test case is told before training."""

    def read(case: cohorts.Case) -> None:
        preprocess.prepare_case(case, plan)

    each(read, cases, workers, progress)


def each(
    function: Callable[[cohorts.Case], Any],
    cases: Sequence[cohorts.Case],
    workers: int,
    progress: Callable[[int], None] | None,
) -> list[Any]:
    """`function` of each case, in order, on `workers` threads (0: one a usable CPU); an error ends it all."""
    done = []
    with ThreadPoolExecutor(workers or usable_cpus()) as pool:
        jobs = [pool.submit(function, case) for case in cases]
        try:
            for job in jobs:
                done.append(job.result())
                if progress:
                    progress(len(done))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return done
