"""`python -m medjax.compare RUNS...`: evaluated runs side by side: means, intervals, paired tests, cost.

Runs that differ only in seed (or fold) are one experiment. Each metric of the baseline is compared among the
experiments that have it: a network of several tasks stands beside one of a single task in the table of that task.
Writes `summary.md`, `metrics.csv`, `runs.csv` and a picture a metric into `--to`.

What the figures are. A metric of a case (Dice, HD95) is averaged over cases, then classes, as in `summary.json`, with
every seed counting alike. Its 95 % interval is that of draws of patients and seeds, independently of each other (after
the pigeonhole bootstrap: Owen, Ann. Appl. Stat. 1(2), 2007). Patients are resampled. So few seeds cannot be: resampled
means of n values have (n - 1) / n of the variance they should, and a normal's quantiles instead of Student's
(Hesterberg, Am. Stat. 69(4), 2015, on the narrowness of bootstrap intervals), for three seeds 2.7 times too narrow.
Instead the mean over the n seeds is drawn from Student's t of n - 1 degrees about what came out, scaled by the seeds'
standard error: exact for normal seeds, were they all that varies (Student, Biometrika 6, 1908). A single seed leaves
the seeds' part unknown, and the report says so. The difference from the baseline is drawn with the same patients on
both sides, and with the same seeds where both have the same; else the seeds of each are drawn for themselves.

The test is Wilcoxon's signed-rank test over patients (two-sided, zeros by Pratt) of differences averaged over seeds
and classes. A mask that one side leaves empty, as it should, has no Dice and does not count in a mean; where the other
side invents something, which counts, the test takes it as the best value there is. The p-values are corrected for the
number of experiments compared with the baseline, metric by metric (Holm, Scand. J. Stat. 6, 1979). The test is about
these trained networks: whether other seeds would undo the difference is what the interval tells. A metric of the whole
cohort (AUROC) has no value a case: its mean is over seeds, its interval Student's over seeds or, of a single seed, that
of its evaluation; it has no test.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medjax import config as config_lib
from medjax.errors import UserError, run_program, write_atomic
from medjax.logging import duration, say
from medjax.metrics.stats import LEVEL, RESAMPLES

# What may differ between the runs of one experiment.
REPEATS = ("seed", "data.split.fold")
# What says where and how a run ran, not what it trained.
ELSEWHERE = (
    "wandb",
    "mesh",
    "mesh_rules",
    "parallel",
    "data.workers",
    "data.store",
    "eval.pictures",
    "eval.predictions",
)
_ASIDE = {"checkpoints", "eval", "tensorboard", "compare", "predictions"}
# Metrics that are blank where a case has nothing to find and nothing was found, and their value where all is right.
_BEST = {
    "dice": 1.0,
    "nsd": 1.0,
    "cldice": 1.0,
    "hd95": 0.0,
    "assd": 0.0,
    "lesion_dice": 1.0,
    "lesion_f1": 1.0,
    "lesion_hd95": 0.0,
}
_SHOWN = 3  # metrics of a task in the report; metrics.csv has all


@dataclass(frozen=True)
class Result:
    """One evaluated run.

    Attributes:
      rows: of `cases.csv`. metrics: of `summary.json`, key -> {'mean', 'ci95', 'per_class'}. cost: what is known of
        'steps' and their 'total', 'seconds' (of training steps), 'eval_seconds', 'parameters' and how many of
        them are 'trained', 'flops' (of a step), 'bytes' (of a device).
    """

    folder: Path
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, str]]
    metrics: Mapping[str, Any]
    cost: Mapping[str, Any]

    @property
    def seed(self) -> int:
        return int(self.config.get("seed", 0))

    @cached_property
    def tasks(self) -> list[str]:
        """That cases were scored for."""
        return list(dict.fromkeys(row["task"] for row in self.rows))


@dataclass(frozen=True)
class Experiment:
    """Runs that differ only in seed and fold."""

    name: str
    runs: Sequence[Result]

    @property
    def seeds(self) -> list[int]:
        return sorted({run.seed for run in self.runs})

    def cost(self, key: str) -> float | None:
        """The mean over the runs, if every run has it."""
        values = [run.cost.get(key) for run in self.runs]
        return None if any(v is None for v in values) else float(np.mean([v for v in values if v is not None]))


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Run folders (those with a config.json) at or below `paths`; the runs of a sweep in the sweep's own order."""
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; give run folders, or folders that hold some")
        below = [path] if (path / "config.json").is_file() else sorted(_below(path))
        if not below:
            raise UserError(f"{path}: holds no run (a folder with config.json); train with --workdir={path}/NAME first")
        order = _sweep_order(path)
        found += sorted(below, key=lambda run: order.get(run.relative_to(path).parts[:1], len(order)))
    return list(dict.fromkeys(found))


def _below(path: Path) -> list[Path]:
    runs = []
    for folder in path.iterdir():
        if folder.is_dir() and folder.name not in _ASIDE and not folder.name.startswith("."):
            runs += [folder] if (folder / "config.json").is_file() else _below(folder)
    return runs


def _sweep_order(path: Path) -> dict[tuple[str, ...], int]:
    file = path / "sweep.json"
    names = [v["name"] for v in _json(file)["variants"]] if file.is_file() else []
    return {(name,): i for i, name in enumerate(names)}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); evaluate the run again: --mode=eval") from None


def read_run(folder: Path, split: str) -> Result | str:
    """The run in `folder` as evaluated on `split`, or what is missing of it."""
    config, place = _json(folder / "config.json"), folder / "eval" / split
    log = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")] if log.is_file() else []
    step = rows[-1]["step"] if rows else 0
    if not (place / "summary.json").is_file():
        there = sorted(p.parent.name for p in folder.glob("eval/*/summary.json"))
        return f"logged to step {step}, {f'evaluated on {chr(44).join(there)}' if there else 'not evaluated'}"
    summary = _json(place / "summary.json")
    with (place / "cases.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    if not table or not {"case", "group", "task", "class"} <= set(table[0]):
        return "evaluated by an older medjax; evaluate it again with --mode=eval"
    cost: dict[str, Any] = _json(folder / "cost.json") if (folder / "cost.json").is_file() else {}
    cost = {**cost, "steps": step, "seconds": training_seconds(rows, config), "eval_seconds": summary.get("seconds")}
    return Result(folder, config, table, summary["metrics"], cost)


def training_seconds(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> float | None:
    """Seconds spent in training steps: those between two log rows, at the speed that was logged."""
    total, last = 0.0, 0
    for row in rows:
        if speed := row.get("train/patches_per_s"):
            total += (row["step"] - last) * config["data"]["batch_size"] / speed
            last = row["step"]
    return total or None


def _without(config: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    copy = json.loads(json.dumps(config))
    for key in keys:
        *parents, last = key.split(".")
        node = copy
        for name in parents:
            node = node.get(name, {})
        node.pop(last, None)
    return copy


def group(runs: Sequence[Result]) -> list[Experiment]:
    """Experiments in order of appearance, each named by `config.name`, and by what differs where that is not enough."""
    members: dict[str, list[Result]] = {}
    for run in runs:
        key = json.dumps(_without(run.config, (*REPEATS, *ELSEWHERE)), sort_keys=True)
        members.setdefault(key, []).append(run)
    first: dict[str, Mapping[str, Any]] = {}
    experiments, taken = [], set()
    for key, found in members.items():
        config = json.loads(key)
        base = name = str(config.get("name", "run"))
        if base in first:
            lines = config_lib.difference(first[base], config)
            name = f"{base} ({', '.join(_short(line) for line in lines[:2])}{', ...' if len(lines) > 2 else ''})"
        first.setdefault(base, config)
        while name in taken:
            name += "'"
        taken.add(name)
        repeats = [(run.seed, run.config["data"]["split"]["fold"]) for run in found]
        twice = next((r for i, r in enumerate(repeats) if r in repeats[:i]), None)
        if twice is not None:
            folders = ", ".join(str(run.folder) for run, r in zip(found, repeats, strict=True) if r == twice)
            raise UserError(f"the same run twice (configuration and seed {twice[0]}): {folders}; leave one out")
        experiments.append(Experiment(name, found))
    return experiments


def _short(line: str) -> str:
    path, _, values = line.partition(": ")
    return f"{path}={values.partition(' -> ')[2]}"


# ---- figures


@dataclass(frozen=True)
class Values:
    """A metric of cases, of one experiment, summed a patient.

    Attributes:
      sums, counts: float64 [patients, seeds, classes].
    """

    sums: np.ndarray
    counts: np.ndarray

    def mean(self) -> np.ndarray:
        """[1 + classes]: the mean over the classes, then each class: over cases, seeds pooled."""
        return _with_mean(_ratio(self.sums.sum((0, 1)), self.counts.sum((0, 1))))

    def patients(self) -> np.ndarray:
        """[1 + classes]: how many patients count."""
        return np.array([(self.counts.sum((1, 2)) > 0).sum(), *(self.counts.sum(1) > 0).sum(0)])

    def resample(self, patients: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Means of resamples [n, 1 + classes].

        Args:
          patients: how often each is drawn, [n, patients]. seeds: what each counts beyond 1, [n, seeds], as of
            `seed_weights`.
        """
        sums, counts = (np.tensordot(patients, a, 1) for a in (self.sums, self.counts))
        mean = _ratio(sums.sum(1), counts.sum(1))
        # To first order in the seeds: what a seed adds to the ratio. No denominator can vanish or turn negative.
        apart = np.einsum("ns,nsk->nk", seeds, sums - np.nan_to_num(mean)[:, None] * counts)
        return _with_mean(mean + _ratio(apart, counts.sum(1)))

    def per_patient(self) -> np.ndarray:
        """[patients, classes]: means over cases and seeds."""
        return _ratio(self.sums.sum(1), self.counts.sum(1))


def seed_weights(seeds: int, n: int, generator: np.random.Generator) -> np.ndarray:
    """What each of the seeds counts beyond 1, [n, seeds]: mean values weighed so are Student's t about their mean.

    Normal deviates minus their mean give a weighted mean the variance (seeds - 1) / seeds times that of the mean of
    normal values, which is made up for; the root of chi-squared over its degrees makes a normal Student's. One seed
    counts 1.
    """
    if seeds == 1:
        return np.zeros((n, 1))
    drawn = generator.standard_normal((n, seeds))
    scale = np.sqrt(generator.chisquare(seeds - 1, (n, 1)) / (seeds - 1))
    return math.sqrt(seeds / (seeds - 1)) * (drawn - drawn.mean(1, keepdims=True)) / scale


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.divide(sums, counts, out=np.full(np.shape(sums), math.nan), where=counts > 0)


def _over_classes(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not nan; nan where nothing is."""
    counted = ~np.isnan(values)
    return _ratio(np.where(counted, values, 0.0).sum(-1), counted.sum(-1))


def _with_mean(values: np.ndarray) -> np.ndarray:
    """Puts the mean over the last axis before it."""
    return np.concatenate([_over_classes(values)[..., None], values], -1)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values; nan stays and does not count."""
    adjusted, known = [math.nan] * len(p), [i for i, v in enumerate(p) if not math.isnan(v)]
    worst = 0.0
    for rank, i in enumerate(sorted(known, key=lambda i: p[i])):
        worst = max(worst, min(1.0, (len(known) - rank) * p[i]))
        adjusted[i] = worst
    return adjusted


def wilcoxon(differences: np.ndarray) -> float:
    """Two-sided p of the signed-rank test, zeros by Pratt; 1 if all are zero, nan if there are none."""
    from scipy import stats

    known = differences[~np.isnan(differences)]
    if not len(known):
        return math.nan
    if not known.any():
        return 1.0
    return float(stats.wilcoxon(known, zero_method="pratt").pvalue)


def compare(
    experiments: Sequence[Experiment], baseline: str, *, n: int = RESAMPLES, seed: int = 0
) -> list[dict[str, Any]]:
    """Every metric of the baseline, its classes and their mean (class ''), beside that of each experiment that has it.

    Args:
      baseline: name of an experiment. n, seed: of the bootstrap.

    Returns:
      Rows with 'experiment', 'task', 'metric', 'class', 'kind' ('case' or 'cohort'), 'seeds', 'patients', 'mean',
      'low', 'high', and but for the baseline 'difference', 'difference_low', 'difference_high' and (of the mean alone)
      'p', 'p_holm'; nan where undefined.

    Raises:
      UserError: runs evaluated on different cases, on other patients of a case, or on different classes of a task.
    """
    rows: list[dict[str, Any]] = []
    reference = next(e for e in experiments if e.name == baseline)
    patients = list(dict.fromkeys(row["group"] for run in reference.runs for row in run.rows))
    draws = np.random.default_rng(seed).multinomial(len(patients), np.full(len(patients), 1 / len(patients)), n)
    measured = metrics_of(experiments, reference)
    for task in dict.fromkeys(m.task for m in measured):
        having = {name for m in measured if m.task == task for name in m.experiments}
        sharing = [e for e in experiments if e.name in having]
        check_cases(sharing, task)
        check_patients(sharing, task)
    for task, metric, classes, kind, having in measured:
        found: list[dict[str, Any]] = []
        drawn: dict[str, np.ndarray] = {}
        base = values_of(reference, task, metric, classes, patients)
        for i, experiment in enumerate([reference, *(e for e in experiments if e is not reference)]):
            if experiment.name not in having:
                continue
            about: dict[str, Any] = {"experiment": experiment.name, "task": task, "metric": metric, "kind": kind}
            about["seeds"] = len(experiment.seeds)
            if kind == "cohort":
                found += [about | row for row in _of_cohort(experiment, task, metric, classes)]
                continue
            values = values_of(experiment, task, metric, classes, patients)
            # The same draws for the same seeds: what a seed does to both sides is no part of their difference.
            own = 0 if experiment.seeds == reference.seeds else i
            weights = seed_weights(len(experiment.seeds), n, np.random.default_rng((seed, own)))
            drawn[experiment.name] = values.resample(draws, weights)
            for k, name in enumerate(["", *classes]):
                now = drawn[experiment.name][:, k]
                row = {**about, "class": name, "patients": int(values.patients()[k]), "mean": float(values.mean()[k])}
                row["low"], row["high"] = _interval(now)
                if experiment is not reference:
                    row["difference"] = row["mean"] - float(base.mean()[k])
                    row["difference_low"], row["difference_high"] = _interval(now - drawn[baseline][:, k])
                    if not name:
                        row["p"] = wilcoxon(differences(experiment, reference, task, metric, classes, patients))
                found.append(row)
        tested = [row for row in found if "p" in row]
        for row, p in zip(tested, holm([row["p"] for row in tested]), strict=True):
            row["p_holm"] = p
        rank = {e.name: i for i, e in enumerate(experiments)}
        rows += sorted(found, key=lambda row: rank[row["experiment"]])
    return rows


def _interval(estimates: np.ndarray) -> tuple[float, float]:
    known = estimates[~np.isnan(estimates)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.quantile(known, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)


def _of_cohort(experiment: Experiment, task: str, metric: str, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Means over runs of what each run's evaluation says of the whole cohort."""
    from scipy import stats

    rows = []
    for name in ("", *classes):
        found = [_entry(run, task, metric, name) for run in experiment.runs]
        values = np.array([math.nan if e is None or e["mean"] is None else e["mean"] for e in found])
        known = values[~np.isnan(values)]
        mean, low, high = (float(known.mean()) if len(known) else math.nan), math.nan, math.nan
        if len(values) == 1 and found[0] is not None:
            low, high = (math.nan if v is None else v for v in found[0]["ci95"])
        elif len(known) > 1:
            half = float(stats.t.ppf((1 + LEVEL) / 2, len(known) - 1) * known.std(ddof=1) / math.sqrt(len(known)))
            low, high = mean - half, mean + half
        rows.append({"class": name, "mean": mean, "low": low, "high": high})
    return rows


def _entry(run: Result, task: str, metric: str, name: str) -> Mapping[str, Any] | None:
    """What `summary.json` says of a metric, or of one class of it."""
    entry = run.metrics.get(f"{task}/{metric}")
    if entry is None and run.tasks == [task]:  # the only one, whose metrics may go without its name
        entry = run.metrics.get(metric)
    return entry if entry is None or not name else entry["per_class"].get(name)


class Measured(NamedTuple):
    """A metric to compare, by case or of the whole 'cohort' (`kind`), and the names of the experiments that have it."""

    task: str
    metric: str
    classes: list[str]
    kind: str
    experiments: set[str]


def metrics_of(experiments: Sequence[Experiment], reference: Experiment) -> list[Measured]:
    """What every run of `reference` and of one other experiment at least was scored by, in the evaluation's order."""
    first = reference.runs[0]
    found = []
    for key in first.metrics:
        lead, _, metric = key.rpartition("/")
        task = lead or first.tasks[0]
        having = [e for e in experiments if all(_entry(run, task, metric, "") is not None for run in e.runs)]
        if reference.name not in {e.name for e in having} or len(having) < min(2, len(experiments)):
            continue
        runs = [run for e in having for run in e.runs]
        classes = list(first.metrics[key]["per_class"])
        other = next((r for r in runs if list(_entry(r, task, metric, "")["per_class"]) != classes), None)  # type: ignore[index]
        if other is not None:
            raise UserError(
                f"{other.folder}: task '{task}' is scored on other classes than in {first.folder}; compare runs of one "
                "labelling"
            )
        of_cases = all(metric in run.rows[0] and _once(run, task) for run in runs)
        found.append(Measured(task, metric, classes, "case" if of_cases else "cohort", {e.name for e in having}))
    if not found:
        raise UserError("the runs have no metric of a task in common; compare runs that train the same task")
    return found


def _once(run: Result, task: str) -> bool:
    """Whether each case has one row a class."""
    seen = [(row["case"], row["class"]) for row in run.rows if row["task"] == task]
    return len(set(seen)) == len(seen)


def differences(
    one: Experiment, other: Experiment, task: str, metric: str, classes: Sequence[str], patients: Sequence[str]
) -> np.ndarray:
    """What is tested, [patients]: one experiment's values minus the other's, means over cases, seeds and classes.

    A case that counts in any run of either counts in all: where the metric is blank nothing was wrong (`_BEST`).
    """
    judged: set[tuple[str, str]] = set()
    if metric in _BEST:
        rows = (row for e in (one, other) for run in e.runs for row in run.rows)
        judged = {(row["case"], row["class"]) for row in rows if row["task"] == task and row.get(metric)}
    a, b = (values_of(e, task, metric, classes, patients, judged).per_patient() for e in (one, other))
    return _over_classes(a - b)


def values_of(
    experiment: Experiment,
    task: str,
    metric: str,
    classes: Sequence[str],
    patients: Sequence[str],
    judged: Container[tuple[str, str]] = (),
) -> Values:
    """A metric's sums and counts a patient, seed and class, over the folds.

    Args:
      judged: (case, class) that count with the best value where the metric is blank.
    """
    shape = (len(patients), len(experiment.seeds), len(classes))
    sums, counts = np.zeros(shape), np.zeros(shape)
    place = [{name: i for i, name in enumerate(names)} for names in (patients, experiment.seeds, classes)]
    for run in experiment.runs:
        for row in run.rows:
            text = row.get(metric)
            if row["task"] == task and (text or (row["case"], row["class"]) in judged):
                at = (place[0][row["group"]], place[1][run.seed], place[2][row["class"]])
                sums[at] += float(text) if text else _BEST[metric]
                counts[at] += 1
    return Values(sums, counts)


def check_cases(experiments: Sequence[Experiment], task: str) -> None:
    """Raises UserError unless a task was scored on the same cases everywhere: seed by seed, or whatever the seed."""
    maps: list[dict[int, set[str]]] = []
    for experiment in experiments:
        maps.append({seed: set() for seed in experiment.seeds})
        for run in experiment.runs:
            maps[-1][run.seed].update(row["case"] for row in run.rows if row["task"] == task)
    if all(m == maps[0] for m in maps):
        return
    sets = [(e, seed, cases) for e, m in zip(experiments, maps, strict=True) for seed, cases in m.items()]
    first, first_seed, known = sets[0]
    for experiment, seed, cases in sets[1:]:
        told = [
            f"{', '.join(ids[:3])}{f' and {len(ids) - 3} more' if len(ids) > 3 else ''} only in {where}"
            for ids, where in (
                (sorted(known - cases), f"{first.name}, seed {first_seed}"),
                (sorted(cases - known), f"{experiment.name}, seed {seed}"),
            )
            if ids
        ]
        if told:
            raise UserError(
                f"the runs were evaluated on different cases: {'; '.join(told)}. Give every experiment the same split "
                "(data.split.file, or all folds of the same seeds)"
            )


def check_patients(experiments: Sequence[Experiment], task: str) -> None:
    """Raises UserError where two runs know a case of a task under different patients: nothing would be paired right."""
    known: dict[str, tuple[str, Path]] = {}
    for run in (run for experiment in experiments for run in experiment.runs):
        for row in run.rows:
            if row["task"] != task:
                continue
            patient, folder = known.setdefault(row["case"], (row["group"], run.folder))
            if patient != row["group"]:
                raise UserError(
                    f"{run.folder}: case {row['case']} is of patient '{row['group']}', and of '{patient}' in {folder}: "
                    "patients are what is paired and resampled. Evaluate both again with one data.group (--mode=eval)"
                )


# ---- report


def report(
    experiments: Sequence[Experiment],
    rows: Sequence[Mapping[str, Any]],
    baseline: str,
    split: str,
    left: Mapping[Path, str],
) -> str:
    """The comparison as Markdown: a table a metric, cost, what differs, what was left out."""
    few = min(len(e.seeds) for e in experiments)
    patients = max((row.get("patients", 0) for row in rows), default=0)
    lines = [f"# {len(experiments)} experiments, split '{split}'", ""]
    seeds = "patients alone, as there is one seed" if few == 1 else "patients and seeds"
    lines += [
        f"Mean [95 % interval over {seeds}]; difference from the baseline, **{baseline}**; p of Wilcoxon's signed-rank "
        "test over patients, corrected by Holm for the experiments of a table.",
    ]
    # All differences of one sign: the smallest two-sided p that n patients can give, and what Holm makes of it.
    tested = min(Counter((row["task"], row["metric"]) for row in rows if "p" in row).values(), default=0)
    least = tested * 2.0 ** (1 - patients)
    if patients and least > 1 - LEVEL:
        lines += [
            "",
            f"{patients} patients, {tested + 1} experiments: no p here can be below {min(1.0, least):.2g}.",
        ]
    for task, metric in shown(rows):
        lines += [
            "",
            f"## {task}: {metric}",
            "",
            "| experiment | seeds | mean | difference | p |",
            "|---|---|---|---|---|",
        ]
        for row in rows:
            if (row["task"], row["metric"], row["class"]) == (task, metric, ""):
                change = _cell(row, "difference", "difference_low", "difference_high") if "difference" in row else "-"
                p = f"{row['p_holm']:.3g}" if not math.isnan(row.get("p_holm", math.nan)) else "-"
                lines.append(
                    f"| {row['experiment']} | {row['seeds']} | {_cell(row, 'mean', 'low', 'high')} | {change} | {p} |"
                )
    if without := strangers(experiments, rows):
        lines += ["", f"No metric in common with the baseline: {', '.join(without)}."]
    lines += [
        "",
        "## Cost of a run",
        "",
        "| experiment | runs | steps | training | evaluation | parameters | memory a device |",
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for e in experiments:
        lines.append("| " + " | ".join([e.name, str(len(e.runs)), *_cost_cells(e)]) + " |")
    lines += ["", "Training: seconds in steps, waiting for data included; compiling and validation are not."]
    first = next(e for e in experiments if e.name == baseline)
    lines += ["", "## What differs from the baseline", ""]
    for e in experiments:
        if e is not first:
            a, b = (_without(x.runs[0].config, (*REPEATS, *ELSEWHERE, "name")) for x in (first, e))
            # An option that only one of two backbones has differs for that alone.
            found = [x for x in config_lib.difference(a, b) if None not in (_at(a, x), _at(b, x))]
            lines.append(f"- {e.name}: {'; '.join(found) or 'nothing but the name'}")
    if left:
        lines += ["", "## Left out: not evaluated on this split", ""]
        lines += [f"- {folder}: {why}" for folder, why in left.items()]
    return "\n".join(lines) + "\n"


def _at(config: Any, line: str) -> Any:
    """The value of the key that a line of `config.difference` is about; None where there is none."""
    for key in line.partition(": ")[0].split("."):
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def strangers(experiments: Sequence[Experiment], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the experiments that no row is about."""
    compared = {row["experiment"] for row in rows}
    return [e.name for e in experiments if e.name not in compared]


def shown(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(task, metric) of the report: the first few of each task."""
    pairs = list(dict.fromkeys((row["task"], row["metric"]) for row in rows))
    return [p for p in pairs if [q for q in pairs if q[0] == p[0]].index(p) < _SHOWN]


def _cell(row: Mapping[str, Any], key: str, low: str, high: str) -> str:
    if math.isnan(row[key]):
        return "-"
    numbers = [v for v in (row[key], row[low], row[high]) if not math.isnan(v)]
    digits = 3 if max(map(abs, numbers)) <= 1 else 2
    sign = "+" if key == "difference" else ""
    if len(numbers) < 3:
        return f"{row[key]:{sign}.{digits}f}"
    return f"{row[key]:{sign}.{digits}f} [{row[low]:{sign}.{digits}f}, {row[high]:{sign}.{digits}f}]"


def _cost_cells(e: Experiment) -> list[str]:
    steps, train, evaluation = e.cost("steps"), e.cost("seconds"), e.cost("eval_seconds")
    parameters, size = e.cost("parameters"), e.cost("bytes")
    total = e.cost("total")
    short = steps is not None and total is not None and steps < total  # stopped early
    return [
        "-" if steps is None else f"{steps:.0f}{f' of {total:.0f}' if short else ''}",
        "-" if train is None else duration(train),
        "-" if evaluation is None else duration(evaluation),
        "-" if parameters is None else f"{parameters / 1e6:.3g} M",
        "-" if size is None else f"{size / 1e9:.2f} GB" if size > 1e8 else f"{size / 1e6:.1f} MB",
    ]


def write(
    folder: Path, experiments: Sequence[Experiment], rows: Sequence[Mapping[str, Any]], baseline: str, text: str
) -> None:
    """`summary.md`, `metrics.csv`, `runs.csv`, and a picture for each metric of the report."""
    import io

    from medjax import pictures

    def table(name: str, found: Sequence[Mapping[str, Any]]) -> None:
        out = io.StringIO()
        writer = csv.DictWriter(out, list(dict.fromkeys(k for row in found for k in row)), lineterminator="\n")
        writer.writeheader()
        for row in found:
            blank = {k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in blank.items()})
        write_atomic(folder / name, out.getvalue())

    folder.mkdir(parents=True, exist_ok=True)
    table("metrics.csv", rows)
    runs = [(e, run) for e in experiments for run in e.runs]
    table(
        "runs.csv",
        [{"experiment": e.name, "run": str(r.folder), "seed": r.seed, **r.cost} for e, r in runs],
    )
    write_atomic(folder / "summary.md", text)
    for task, metric in shown(rows):
        means = [row for row in rows if (row["task"], row["metric"], row["class"]) == (task, metric, "")]
        several = len({row["task"] for row in rows}) > 1
        pictures.comparison(
            means,
            {e.name: e.cost("seconds") for e in experiments},
            folder / f"{f'{task}_' if several else ''}{metric}.png",
            baseline=baseline,
            title=f"{task}: {metric}",
        )


def choose_split(folders: Sequence[Path], asked: str | None) -> str:
    """The split to compare on: as asked, else 'test' where every evaluated run has it, else 'val'."""
    if asked:
        return asked
    sets = [{p.parent.name for p in f.glob("eval/*/summary.json")} for f in folders]
    common = set.intersection(*found) if (found := [s for s in sets if s]) else set()
    for name in ("test", "val", *sorted(common)):
        if name in common:
            return name
    raise UserError(
        "none of the runs was evaluated on a split that the others were too: "
        + ", ".join(f"{f}: {'/'.join(sorted(s)) or 'none'}" for f, s in list(zip(folders, sets, strict=True))[:6])
        + "; evaluate them with python -m medjax.main ... --mode=eval, or name one with --split"
    )


def compare_folders(paths: Sequence[Path], baseline: str | None, to: Path | None, split: str | None) -> Path:
    """Compares the runs at or below `paths`, writes the report and says it; returns its folder."""
    folders = find_runs(paths)
    split = choose_split(folders, split)
    read = {folder: read_run(folder, split) for folder in folders}
    left = {folder: found for folder, found in read.items() if isinstance(found, str)}
    runs = [found for found in read.values() if isinstance(found, Result)]
    if not runs:
        raise UserError(
            f"none of the {len(folders)} run(s) was evaluated on split '{split}': "
            + "; ".join(f"{folder}: {why}" for folder, why in list(left.items())[:6])
        )
    experiments = group(runs)
    names = [e.name for e in experiments]
    chosen = baseline or names[0]
    if chosen not in names:
        # The folder of one of its runs serves as a name too.
        places = {place: e.name for e in experiments for r in e.runs for place in (str(r.folder), r.folder.name)}
        if chosen not in places:
            raise UserError(f"--baseline={chosen}: no such experiment; there are: {', '.join(names)}")
        chosen = places[chosen]
    rows = compare(experiments, chosen)
    text = report(experiments, rows, chosen, split, left)
    target = to or _common(paths) / "compare"
    write(target, experiments, rows, chosen, text)
    say_table(experiments, rows, chosen, split)
    for name in strangers(experiments, rows):
        say(f"left out    {name}: no metric in common with {chosen}")
    for folder, why in left.items():
        say(f"left out    {folder}: {why}")
    say(f"written     {target}/summary.md, metrics.csv, runs.csv and pictures")
    return target


def _common(paths: Sequence[Path]) -> Path:
    if len(paths) == 1:
        # Beside a run, in a folder of runs.
        return paths[0].parent if (paths[0] / "config.json").is_file() else paths[0]
    import os

    return Path(os.path.commonpath([path.resolve().parent for path in paths]))


def say_table(experiments: Sequence[Experiment], rows: Sequence[Mapping[str, Any]], baseline: str, split: str) -> None:
    """The first metric of each task at the terminal."""
    width = max(len(e.name) for e in experiments)
    for task in dict.fromkeys(row["task"] for row in rows):
        metric = next(row["metric"] for row in rows if row["task"] == task)
        say(f"\n{task}: {metric} on '{split}', mean [95 % interval], difference from {baseline}, p (Wilcoxon, Holm)")
        for row in rows:
            if (row["task"], row["metric"], row["class"]) == (task, metric, ""):
                change = _cell(row, "difference", "difference_low", "difference_high") if "difference" in row else ""
                p = f"p {row['p_holm']:.2g}" if not math.isnan(row.get("p_holm", math.nan)) else ""
                name, mean = row["experiment"], _cell(row, "mean", "low", "high")
                say(f"  {name:{width}}  {row['seeds']} seed(s)  {mean:24} {change:27} {p}".rstrip())


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m medjax.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="run folders, or folders that hold some")
    p.add_argument(
        "--baseline", metavar="NAME", help="experiment (or run folder) the others are compared with; default: the first"
    )
    p.add_argument(
        "--to", type=Path, metavar="FOLDER", help="where the report goes; default: 'compare' beside the runs"
    )
    p.add_argument("--split", help="evaluated split; default: test where every run has it, else val")
    args = p.parse_args(argv)
    compare_folders(args.runs, args.baseline, args.to, args.split)


if __name__ == "__main__":
    run_program(main)
