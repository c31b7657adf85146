"""The evaluation spine: whole cases on their own grid, scored, written and drawn.

Writes `<workdir>/eval/<split>/`: `cases.csv` (one row a case and class), `summary.json`, `predictions/*.nii.gz` on each
input's own grid, and overlays of the worst, the median and the best case.
"""

from __future__ import annotations

import csv
import io
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from medjax import report
from medjax.data import cohort as cohorts
from medjax.data import dataset, nifti, preprocess
from medjax.errors import UserError, write_atomic
from medjax.logging import Progress, say
from medjax.metrics import segmentation as metrics
from medjax.metrics import stats
from medjax.predict import Predictor, Run, output_files, read_ahead, read_case, write

COLUMNS = ("case", "group", "class", "dice", "hd95", "nsd", "volume_ml", "reference_ml", "volume_error_ml", "empty")


def quick_dice(predictor: Predictor, params: Any, cases: Sequence[preprocess.Prepared]) -> dict[str, float]:
    """Dice of prepared cases on their own grid: {'dice': mean over classes, 'dice/<class>': mean over cases}."""
    found: dict[str, list[float]] = {}
    for case in cases:
        probabilities = predictor(params, case.image)
        for name, task in predictor.tasks.items():
            if name in case.targets:
                decoded, reference = task.decode(probabilities[name]), case.targets[name]
                for i, (label, values) in enumerate(task.classes.items()):
                    mask = decoded[..., i] if decoded.ndim == 4 else np.isin(decoded, values)
                    key = label if len(predictor.tasks) == 1 else f"{name}/{label}"
                    found.setdefault(key, []).append(metrics.dice(mask, np.isin(reference, values)))
    means = {k: float(np.nanmean(v)) for k, v in found.items() if not np.all(np.isnan(v))}
    return {
        "dice": float(np.mean(list(means.values()))) if means else 0.0,
        **{f"dice/{k}": v for k, v in means.items()},
    }


def evaluate(workdir: Path, config: ConfigDict) -> None:
    """Evaluates the best checkpoint of the run in `workdir` on `config.eval.splits` that the cohort has.

    What the network is comes from the checkpoint; how it is evaluated (`config.eval`) and on which data from `config`.
    """
    run = Run(workdir, eval_options=config.eval)
    cohort = dataset.open_cohort(config.data, next(iter(config.tasks)))
    if dict(cohort.labels) != dict(run.labels):
        raise UserError(
            f"{workdir}: the run was trained on labels {dict(run.labels)}, "
            f"the cohort '{cohort.name}' has {dict(cohort.labels)}"
        )
    splits = dataset.open_splits(cohort, config.data, config.seed)
    for name in splits_to_evaluate(config, splits):
        evaluate_split(run, name, splits[name], workdir / "eval" / name)


def splits_to_evaluate(config: ConfigDict, splits: Mapping[str, Any]) -> list[str]:
    """Those of `config.eval.splits` that there are; UserError if none."""
    names = [name for name in config.eval.splits if name in splits]
    if not names:
        raise UserError(f"config: eval.splits={tuple(config.eval.splits)}: the cohort's splits are {', '.join(splits)}")
    return names


def evaluate_split(run: Run, split: str, cases: Sequence[cohorts.Case], folder: Path) -> dict[str, Any]:
    """Predicts, scores, writes and draws one split; returns the summary."""
    began = time.perf_counter()
    options = run.config.eval
    folder.mkdir(parents=True, exist_ok=True)
    predictor = run.predictor([run.plan.prepared_shape(case) for case in cases])
    rows: list[dict[str, Any]] = []
    progress = Progress(f"evaluating {split}", len(cases))
    for number, (case, load) in enumerate(read_ahead(cases, run.plan), 1):
        prepared, like = load()
        probabilities = predictor(run.params, prepared.image)
        outputs = output_files(run, folder / "predictions", case.id)
        for name, task in run.tasks.items():
            decoded = task.decode(probabilities[name], prepared.geometry)
            if options.predictions:
                write(task, decoded, like, outputs[name])
            if name not in case.targets:
                continue
            reference = nifti.read_label(str(case.targets[name]))
            for row in task.score(decoded, reference.data, reference.spacing):
                label = row["class"] if len(run.tasks) == 1 else f"{name}/{row['class']}"
                rows.append({"case": case.id, "group": case.group, **row, "class": label})
        progress.update(number, case.id)
    progress.close()
    if not rows:
        say(f"{split}: {len(cases)} cases predicted; none has a reference to score against")
        return {}
    summary = {
        "split": split,
        "n_cases": len({row["case"] for row in rows}),
        "metrics": stats.summarize(rows),
        "checkpoint": {"step": run.step, "kind": run.kind},
        "command": shlex.join(["python", "-m", "medjax.main", *sys.argv[1:]]),
        "versions": report.versions(),
        "seconds": round(time.perf_counter() - began, 2),
    }
    write_atomic(folder / "cases.csv", table(rows))
    write_atomic(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    if options.pictures:
        draw(run, predictor, cases, rows, folder)
    say_summary(summary, folder)
    return summary


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as CSV; a metric that does not count for a case is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        plain = {k: (f"{v:.6g}" if np.isfinite(v) else "") if isinstance(v, float) else v for k, v in row.items()}
        writer.writerow(plain)
    return out.getvalue()


def draw(
    run: Run, predictor: Predictor, cases: Sequence[cohorts.Case], rows: Sequence[Mapping[str, Any]], folder: Path
) -> None:
    """Overlays of the worst, median and best case by mean Dice, on the prepared grid."""
    from medjax import pictures

    scores: dict[str, list[float]] = {}
    for row in rows:
        scores.setdefault(row["case"], []).append(row["dice"])
    means = {case: float(np.nanmean(v)) for case, v in scores.items() if not np.all(np.isnan(v))}
    ranked = sorted(means, key=lambda case: (means[case], case))
    if not ranked:
        return
    by_id = {case.id: case for case in cases}
    channel = shown_channel(run.plan.modalities)
    for rank, case_id in {"worst": ranked[0], "median": ranked[len(ranked) // 2], "best": ranked[-1]}.items():
        prepared = read_case(by_id[case_id], run.plan)[0]
        probabilities = predictor(run.params, prepared.image)
        for name, task in run.tasks.items():
            if name not in prepared.targets:
                continue
            suffix = "" if len(run.tasks) == 1 else f"_{name}"
            # What normalisation left at exactly 0 is outside the body: black, not mid-grey.
            image = prepared.image[..., channel]
            reference, prediction, names = drawable(task, prepared.targets[name], task.decode(probabilities[name]))
            pictures.overlay(
                np.where(image == 0, image.min(), image),
                reference,
                prediction,
                spacing=prepared.geometry.spacing,
                class_names=names,
                title=f"{rank}: {case_id}, mean Dice {means[case_id]:.3f}",
                path=folder / f"{rank}{suffix}.png",
            )


def drawable(task: Any, reference: np.ndarray, decoded: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Reference and prediction as label maps [X, Y, Z], and value -> name.

    Regions that no map of the task's own labels can hold are drawn one over the other, numbered in their order.
    """
    if task.paintable:
        return reference, task.paint(decoded), {value: name for name, value in task.foreground.items()}
    maps = np.zeros((2, *reference.shape), np.uint8)
    for number, values in enumerate(task.classes.values(), 1):
        maps[0][np.isin(reference, values)] = number
        maps[1][decoded[..., number - 1]] = number
    return maps[0], maps[1], dict(enumerate(task.classes, 1))


def shown_channel(modalities: Sequence[str]) -> int:
    """The channel to draw: the one in which a brain tumour shows, where there is one; else the first."""
    names = [name.lower() for name in modalities]
    wanted = ("t1c", "t1ce", "t1gd", "flair")
    return next((names.index(name) for name in wanted if name in names), 0)


def say_summary(summary: Mapping[str, Any], folder: Path) -> None:
    """The table at the terminal."""
    found = summary["metrics"]
    say(f"\n{summary['split']}: {summary['n_cases']} cases, mean with 95 % interval over cases ({folder})")
    width = max(len("mean"), *(len(name) for name in found["dice"]["per_class"]))
    say(f"  {'':{width}}  {'Dice':24}{'HD95 mm':24}NSD")
    lines = {**found["dice"]["per_class"], "mean": None}
    for name in lines:
        cells = []
        for metric in ("dice", "hd95", "nsd"):
            value = found[metric] if name == "mean" else found[metric]["per_class"][name]
            digits = 2 if metric == "hd95" else 3
            low, high = value["ci95"]
            text = "-" if value["mean"] is None else f"{value['mean']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
            cells.append(f"{text:24}")
        say(f"  {name:{width}}  {''.join(cells)}".rstrip())
