"""From `config.data` to a cohort, its splits, the plan, and prepared cases."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from medjax.data import cohort as cohorts
from medjax.data import preprocess
from medjax.errors import UserError


def open_cohort(config: Mapping[str, Any]) -> cohorts.Cohort:
    """The cohort of `config.data`: a generator's name, a folder with dataset.json, or a manifest (.csv, .json)."""
    name = config["cohort"]
    if not name:
        raise UserError(
            "config: data.cohort is empty; give a folder with dataset.json, a manifest, or 'synthetic_brain'"
        )
    if name == "synthetic_brain":
        from medjax.data.synthetic import brain_cohort

        return cohorts.from_msd(brain_cohort(**config["options"]))
    path = Path(name).expanduser()
    if path.is_dir():
        return cohorts.from_msd(path)
    if path.suffix.lower() in (".csv", ".json"):
        if not config["images"]:
            raise UserError("config: a manifest needs data.images, e.g. {'T1': 't1_file', 'T2': 't2_file'}")
        return cohorts.from_manifest(
            path,
            images=dict(config["images"]),
            targets=dict(config["targets"]),
            labels=dict(config["labels"]),
            id_column=config["id_column"],
            group_column=config["group_column"] or None,
        )
    raise UserError(f"{path}: data.cohort is neither a folder nor a .csv or .json manifest; check the path")


def prepare(
    plan: preprocess.Plan,
    cases: Sequence[cohorts.Case],
    *,
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[preprocess.Prepared]:
    """Reads, checks and preprocesses the cases, in order, on threads.

    Args:
      workers: 0: one a usable CPU. progress: told how many are done.
    """
    prepared = []
    with ThreadPoolExecutor(workers or usable_cpus()) as pool:
        jobs = [pool.submit(preprocess.prepare_case, case, plan) for case in cases]
        try:
            for job in jobs:
                prepared.append(job.result())
                if progress:
                    progress(len(prepared))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return prepared


def usable_cpus() -> int:
    """CPUs this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
