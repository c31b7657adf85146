"""Means over cases and metrics of cohorts with their uncertainty: percentile bootstrap intervals over patients."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from medjax.errors import UserError

LEVEL = 0.95
RESAMPLES = 2000
COHORT_RESAMPLES = 1000  # of metrics that are computed anew for every resample
_CHUNK = 1 << 22  # resampled values held at a time


def bootstrap_ci(
    values: Sequence[float] | np.ndarray,
    *,
    level: float = LEVEL,
    n: int = RESAMPLES,
    seed: int = 0,
    statistic: Callable[..., Any] = np.mean,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic over independent cases (Efron & Tibshirani 1993, ch. 13).

    The same arguments give the same interval on any machine. The interval of few cases is narrow for want of evidence,
    not for abundance: it never reaches beyond the values seen, and that of a single case is that value twice.

    Args:
        values: One number a case; nan says the case does not count.
        level: Coverage, in (0, 1).
        n: Number of resamples.
        seed: Of the resampling.
        statistic: Called with resampled cases `[m, cases]` and `axis=1`, returns `[m]`.

    Returns:
        (low, high); nan if no case counts.
    """
    _check(level, n)
    counted = np.asarray(values, dtype=np.float64).ravel()
    counted = counted[~np.isnan(counted)]
    if not len(counted):
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    rows = max(1, _CHUNK // len(counted))
    estimates = [
        np.asarray(statistic(counted[generator.integers(0, len(counted), (min(rows, n - done), len(counted)))], axis=1))
        for done in range(0, n, rows)
    ]
    return _interval(np.concatenate(estimates), level)


def summarize(
    rows: Sequence[Mapping[str, Any]],
    metrics: Sequence[str] = ("dice", "hd95", "nsd", "volume_error_ml"),
    classes: Sequence[str] | None = None,
    *,
    n: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Means with 95 % intervals of per-case, per-class rows (`medjax.metrics.segmentation.case_metrics`).

    A metric's mean is the mean over classes of the classes' means over cases. Cases that do not count for a class
    (nan) are left out of that class; a class nobody has is left out of the mean. Intervals are percentile bootstrap:
    what is resampled is the patient, with all their cases and classes together, so the dependence between the classes
    of a patient and between a patient's cases is kept. With one patient the interval is the mean twice.

    Args:
        rows: Each has 'class', the metrics, and 'case' (and 'group', the patient, where several cases share one). If no
            row names its case, the k-th row of each class is taken to be of the k-th case.
        metrics: Keys to summarise.
        classes: Which classes, in this order; all in order of appearance if None.
        n: Number of resamples; 0: no intervals (None).
        seed: Of the resampling; all metrics see the same resamples.

    Returns:
        `{metric: {"mean": m, "ci95": [low, high], "per_class": {class: {"mean": m, "ci95": [low, high], "n": n}}}}`
        with n the cases that count. Ready for JSON: what is undefined is None.

    Raises:
        UserError: rows without 'class' or one of the metrics; a case with two rows of one class.
    """
    _check(LEVEL, n, least=0)
    names = list(dict.fromkeys(row["class"] for row in rows if "class" in row)) if classes is None else list(classes)
    wanted = [row for row in rows if row.get("class") in set(names)]
    if any("class" not in row for row in rows):
        raise UserError("summarize: a row has no 'class'")
    groups = _groups(wanted)
    order = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    group_of = np.array([order[group] for group in groups], dtype=np.intp)
    class_of = np.array([names.index(row["class"]) for row in wanted], dtype=np.intp)
    draws = _draws(len(order), n, seed)

    result: dict[str, Any] = {}
    for metric in metrics:
        missing = next((row for row in wanted if metric not in row), None)
        if missing is not None:
            raise UserError(f"summarize: a row of class {missing['class']!r} has no {metric!r}")
        values = np.array([row[metric] for row in wanted], dtype=np.float64)
        counted = ~np.isnan(values)
        sums, counts = np.zeros((2, len(order), len(names)))
        np.add.at(sums, (group_of[counted], class_of[counted]), values[counted])
        np.add.at(counts, (group_of[counted], class_of[counted]), 1.0)
        means = _ratio(sums.sum(axis=0), counts.sum(axis=0))  # [classes]
        resampled = _ratio(draws @ sums, draws @ counts)  # [n, classes]
        overall = _mean_of_counted(means[None])[0]
        result[metric] = {
            "mean": _json(overall),
            "ci95": _json_interval(_mean_of_counted(resampled)),
            "per_class": {
                name: {
                    "mean": _json(means[index]),
                    "ci95": _json_interval(resampled[:, index]),
                    "n": int(counts[:, index].sum()),
                }
                for index, name in enumerate(names)
            },
        }
    return result


def summarize_cohort(
    rows: Sequence[Mapping[str, Any]],
    statistics: Mapping[str, Callable[[Mapping[str, np.ndarray]], float]],
    classes: Sequence[str] | None = None,
    *,
    n: int = COHORT_RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Metrics that need all cases at once (an AUROC, a kappa), per class, with 95 % intervals.

    A metric's mean is the mean over the classes for which it is defined. What is resampled is the patient, with all
    their rows of all classes; a resample in which a metric is undefined does not count for its interval.

    Args:
        rows: Each has 'class' and what the statistics read; a case may have any number of rows of a class. 'case' and
            'group' (the patient) as in `summarize`; without them each row is its own patient.
        statistics: Metric -> function of the columns of one class, key -> array [rows], to a number (nan: undefined).
        classes: Which classes, in this order; all in order of appearance if None.
        n: Number of resamples; 0: no intervals (None).
        seed: Of the resampling; all metrics and classes see the same resamples.

    Returns:
        As `summarize`, n being the rows of the class.

    Raises:
        UserError: a row without 'class'.
    """
    _check(LEVEL, n, least=0)
    if any("class" not in row for row in rows):
        raise UserError("summarize: a row has no 'class'")
    names = list(dict.fromkeys(row["class"] for row in rows)) if classes is None else list(classes)
    wanted = [row for row in rows if row["class"] in set(names)]
    patients: list[Hashable] = [row.get("group", row.get("case", i)) for i, row in enumerate(wanted)]
    order = {patient: index for index, patient in enumerate(dict.fromkeys(patients))}
    draws = _draws(len(order), n, seed).astype(np.intp)
    members, columns = [], []
    for name in names:
        index = [i for i, row in enumerate(wanted) if row["class"] == name]
        keys = list(wanted[index[0]]) if index else []
        columns.append({k: np.array([wanted[i].get(k, math.nan) for i in index]) for k in keys})
        members.append(np.array([order[patients[i]] for i in index], np.intp))

    def value(metric: str, number: int, taken: np.ndarray | None = None) -> float:
        table = columns[number]
        if taken is not None:
            table = {k: v[taken] for k, v in table.items()}
        return float(statistics[metric](table)) if table and len(next(iter(table.values()))) else math.nan

    result: dict[str, Any] = {}
    resampled = {metric: np.full((n, len(names)), math.nan) for metric in statistics}
    for number, patient in enumerate(members):
        for i in range(n):
            taken = np.repeat(np.arange(len(patient)), draws[i][patient])
            for metric in statistics:
                resampled[metric][i, number] = value(metric, number, taken)
    for metric in statistics:
        found = np.array([value(metric, number) for number in range(len(names))])
        result[metric] = {
            "mean": _json(_mean_of_counted(found[None])[0]),
            "ci95": _json_interval(_mean_of_counted(resampled[metric])),
            "per_class": {
                name: {
                    "mean": _json(found[number]),
                    "ci95": _json_interval(resampled[metric][:, number]),
                    "n": len(members[number]),
                }
                for number, name in enumerate(names)
            },
        }
    return result


def _check(level: float, n: int, least: int = 1) -> None:
    if not 0 < level < 1:
        raise UserError(f"bootstrap level {level} is outside (0, 1)")
    if n < least:
        raise UserError(f"bootstrap needs at least {least} resample(s), not {n}")


def _groups(rows: Sequence[Mapping[str, Any]]) -> list[Hashable]:
    """The patient of each row; refuses two rows of one class for one case."""
    named = ["case" in row for row in rows]
    if any(named) and not all(named):
        raise UserError("summarize: some rows name their 'case' and some do not")
    cases: list[Hashable] = []
    seen: dict[str, int] = {}
    for row in rows:
        position = seen.get(row["class"], 0)
        seen[row["class"]] = position + 1
        cases.append(row.get("case", position))
    pairs = set()
    for case, row in zip(cases, rows, strict=True):
        if (case, row["class"]) in pairs:
            raise UserError(f"summarize: case {case!r} has two rows of class {row['class']!r}")
        pairs.add((case, row["class"]))
    return [row.get("group", case) for case, row in zip(cases, rows, strict=True)]


def _draws(groups: int, n: int, seed: int) -> np.ndarray:
    """float64 [n, groups]: how often each group is drawn in each resample."""
    if not groups:
        return np.zeros((n, 0))
    return np.random.default_rng(seed).multinomial(groups, np.full(groups, 1.0 / groups), size=n).astype(np.float64)


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.divide(sums, counts, out=np.full(np.shape(sums), math.nan), where=counts > 0)


def _mean_of_counted(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not nan; nan if nothing is."""
    counted = ~np.isnan(values)
    return _ratio(np.where(counted, values, 0.0).sum(axis=-1), counted.sum(axis=-1))


def _interval(estimates: np.ndarray, level: float) -> tuple[float, float]:
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(estimates, (tail, 1.0 - tail))
    return float(low), float(high)


def _json(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _json_interval(estimates: np.ndarray) -> list[float | None]:
    counted = estimates[~np.isnan(estimates)]
    if not len(counted):
        return [None, None]
    return [_json(value) for value in _interval(counted, LEVEL)]
