"""From `config.data` to a cohort, its splits, the plan, and prepared cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from medjax.data import cohort as cohorts
from medjax.data import preprocess
from medjax.errors import UserError
from medjax.ops.native.cpus import usable_cpus


def open_cohort(config: Mapping[str, Any], task: str) -> cohorts.Cohort:
    """The cohort of `config.data`: a generator's name, a folder with dataset.json, or a manifest (.csv, .json).

    Args:
      task: name under which the masks of a folder become targets.
    """
    name = config["cohort"]
    if not name:
        raise UserError(
            "config: data.cohort is empty; give a folder with dataset.json, a manifest or 'synthetic_brain'"
        )
    if name == "synthetic_brain":
        from medjax.data.synthetic import brain_cohort

        return cohorts.from_msd(brain_cohort(**config["options"]), task)
    path = Path(name).expanduser()
    if path.is_dir():
        return cohorts.from_msd(path, task, group=config["group"] or None)
    if path.suffix.lower() in (".csv", ".json"):
        images = dict(config["images"])
        if not images:
            raise UserError("config: a manifest needs data.images, e.g. {'T1': 't1_file', 'T2': 't2_file'}")
        order = tuple(config["modalities"]) or tuple(images)
        if sorted(order) != sorted(images):
            raise UserError(
                f"config: data.modalities={order} must name each modality of data.images once: {list(images)}"
            )
        return cohorts.from_manifest(
            path,
            {modality: images[modality] for modality in order},
            dict(config["targets"]),
            dict(config["labels"]),
            id=config["id"],
            group=config["group"] or None,
            split=config["split"]["column"] or None,
            allow_missing=config["preprocess"]["missing"] == "zero",
        )
    raise UserError(f"{path}: data.cohort is neither a folder nor a .csv or .json manifest; check the path")


def open_splits(cohort: cohorts.Cohort, config: Mapping[str, Any], seed: int) -> cohorts.Splits:
    """The splits of `config.data.split`: a file, a column, folds by patient, or else the cohort's own."""
    wanted = config["split"]
    spec: dict[str, Any] = {k: wanted[k] for k in ("file", "column") if wanted[k]}
    if wanted["folds"]:
        spec |= {"folds": wanted["folds"], "fold": wanted["fold"]}
        spec |= {"test": wanted["test"]} if wanted["test"] else {}
    return cohorts.split(cohort, spec, seed)


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
    prepared = _each(lambda case: preprocess.prepare_case(case, plan), cases, workers, progress)
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

    _each(read, cases, workers, progress)


def _each(
    function: Callable[[cohorts.Case], Any],
    cases: Sequence[cohorts.Case],
    workers: int,
    progress: Callable[[int], None] | None,
) -> list[Any]:
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
