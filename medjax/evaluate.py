"""The evaluation spine: whole cases on their own grid, scored, written and drawn.

Writes `<workdir>/eval/<split>/`: `cases.csv` (one row a case and class), `summary.json`, `predictions/*.nii.gz` on each
input's own grid, and overlays of the worst, the median and the best case.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from medjax import faults, measures, pretext, processes, report
from medjax.config import difference
from medjax.data import cohort as cohorts
from medjax.data import dataset, nifti, preprocess, targets
from medjax.data.volume import Volume, check_same_grid, voxel_volume_of
from medjax.errors import UserError, warn_once, write_atomic
from medjax.logging import Progress, say
from medjax.predict import Predictor, Run, output_files, read_ahead, read_case, table_rows, write, write_table
from medjax.tasks import Known
from medjax.tasks.common import moved


def quick_scores(
    predictor: Predictor,
    params: Any,
    cases: Sequence[preprocess.Prepared],
    share: tuple[int, int] = (0, 1),
    stop: Callable[[], bool] = lambda: False,
    contribute: bool = True,
    examiner: pretext.Examiner | None = None,
) -> dict[str, float]:
    """Scores of prepared cases on their own grid, while training.

    Args:
      share: (i, n): of n processes (or groups) this is the i-th and predicts cases i, i + n...; all get all scores.
      stop: asked before each turn, by each process equally often; True raises `faults.Preempted`.
      contribute: whether what this process finds counts; of those that share their cases one does.
      examiner: of the self-supervised tasks, where there are any.

    Returns:
      'score', by which checkpoints are compared: the mean of the tasks' own (of masks, Dice), not there where no case
      has a label; and what it is made of:
      '<metric>' and '<metric>/<class>' of one task, with '<task>/' before it of several.
    """
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in predictor.tasks}
    index, ways = share
    for turn in range(-(-len(cases) // ways) if predictor.tasks else 0):
        if stop():
            raise faults.Preempted
        number = turn * ways + index
        if number >= len(cases):
            continue
        case = cases[number]
        probabilities = predictor.case(params, case)
        for name, task in predictor.tasks.items():
            value = (case.targets if task.kind == "dense" else case.values).get(name)
            if value is None:
                continue
            # Masks stay on the prepared grid; findings are compared in world millimetres.
            geometry = None if task.kind == "dense" else case.geometry
            decoded, reference = task.decode(probabilities[name], geometry), task.reference(value, geometry)
            found = task.score(decoded, reference, case.geometry.spacing, voxel_volume_of(case.geometry.affine))
            rows[name] += [{"case": number, "group": number, **row} for row in found]
    rows = _gathered("validation", rows if contribute else {}, key=lambda row: row["case"])
    examined = examiner.rows(params) if examiner else {}
    rows |= examined
    judged = predictor.tasks | {name: examiner.tasks[name] for name in examined if examiner}
    scores: dict[str, float] = {}
    selected = []
    for name, task in judged.items():
        if not rows[name]:
            continue
        summary = task.summarize(rows[name], resamples=0)
        selected.append(task.selection(summary))
        lead = "" if len(judged) == 1 else f"{name}/"
        for metric, value in summary.items():
            if value["mean"] is not None:
                scores[f"{lead}{metric}"] = value["mean"]
            each = {k: v["mean"] for k, v in value["per_class"].items() if v["mean"] is not None}
            scores |= {f"{lead}{metric}/{label}": mean for label, mean in each.items()}
    return ({"score": float(np.mean(selected))} if selected else {}) | scores


def _gathered(name: str, tables: dict[str, list[dict[str, Any]]], key: Callable) -> dict[str, list[dict[str, Any]]]:
    """The rows of all processes, in the order of their cases, whoever had them."""
    if processes.count() == 1:
        return tables
    found = processes.gather(name, tables)
    names = list(dict.fromkeys(table for part in found for table in part))
    return {table: sorted((row for part in found for row in part.get(table, ())), key=key) for table in names}


def evaluate(workdir: Path, config: ConfigDict) -> None:
    """Evaluates the best checkpoint of the run in `workdir` on `config.eval.splits` that the cohort has.

    What the network is comes from the checkpoint; how it is evaluated (`config.eval`) and on which data from `config`.
    """
    with faults.Preemption():
        _evaluate(workdir, config)


def _evaluate(workdir: Path, config: ConfigDict) -> None:
    run = Run(workdir, eval_options=config.eval, base=config.init.source if config.peft.type else "")
    cohort = dataset.open_cohort(config.data, config.tasks)
    if dict(cohort.labels) != dict(run.labels):
        raise UserError(
            f"{workdir}: the run was trained on labels {dict(run.labels)}, "
            f"the cohort '{cohort.name}' has {dict(cohort.labels)}"
        )
    for name, task in run.tasks.items():
        check_classes(workdir, name, getattr(task, "names", ()), run.config.data, config.data)
    splits = dataset.open_splits(cohort, config.data, config.seed, config.tasks)
    names = splits_to_evaluate(config, splits)
    check_unseen(workdir, run.config, config, {name: splits[name] for name in names})
    check_targets(run.tasks, run.plan, [case for name in names for case in splits[name]])
    check_headers(run.plan, [case for name in names for case in splits[name]], config.data.workers)
    gauge = measures.of_splits(config, run.tasks, splits, workdir, run.config.data)
    refused: dict[str, str] = {}
    for name in names:
        summary = evaluate_split(run, name, splits[name], workdir / "eval" / name, gauge(splits[name]))
        refused |= summary.get("refused", {})
    # Of several processes the first alone has what all refused: it has written everything by now, and ends the others.
    if refused:
        listed = "".join(f"\n  {case}: {reason}" for case, reason in refused.items())
        raise UserError(
            f"{workdir}: {len(refused)} of {sum(len(splits[name]) for name in names)} case(s) are refused and count in "
            f"no score:{listed}\nMend them, or leave them out (data.exclude), and evaluate again: --mode=eval"
        )


def check_unseen(workdir: Path, trained: ConfigDict, config: ConfigDict, splits: cohorts.Splits) -> None:
    """Raises UserError where cases to evaluate, but as 'train', are of patients that the run was trained on.

    The splits are those of the command's seed and `data.split`, which need not be the run's. Another cohort is not
    compared: its patients may have the same names by chance.

    Args:
      trained, config: of the run, and of the evaluation. splits: those to evaluate.
    """
    own, given = trained.data, config.data
    if not dataset.same_source(own, given) or (trained.seed == config.seed and not difference(own, given)):
        return
    try:
        known = dataset.open_cohort(own, trained.tasks)
        learnt = dataset.open_splits(known, own, trained.seed, trained.tasks, check_content=False)["train"]
    except UserError as error:
        warn_once(f"{workdir}: whether the run was trained on cases that are evaluated is not checked: {error}")
        return
    train = {case.group for case in learnt}
    # By the files: ids and patients may be called otherwise by now.
    patient = {os.path.realpath(f): case.group for case in (*known.cases, *known.extra) for f in case.images.values()}
    for name, cases in splits.items():
        if name in ("train", cohorts.UNUSED):
            continue
        seen = []
        for case in cases:
            files = (os.path.realpath(file) for file in case.images.values())
            patients = {patient[file] for file in files if file in patient}
            if not patients and own.group == given.group:
                patients = {case.group}
            if not train.isdisjoint(patients):
                seen.append(case)
        if seen:
            keys = {"seed": (trained.seed, config.seed)}
            keys |= {f"data.split.{k}": (v, given.split.get(k)) for k, v in own.split.items()}
            cure = " ".join(f"--config.{k}={was}" for k, (was, now) in keys.items() if was != now)
            how = f"Give the run's own split ({cure})" if cure else f"Give the run's own data ({_changed(own, given)})"
            raise UserError(
                f"{workdir}: {len(seen)} of the {len(cases)} cases of split '{name}' are of patients that the run was "
                f"trained on (first case {seen[0].id}, patient {seen[0].group}): its scores would measure memory. "
                f"{how}, or, if training cases are meant, eval.splits=('train',)"
            )


def _changed(own: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    return "; ".join(f"data.{line}" for line in difference(given, own)[:3])


def check_headers(plan: preprocess.Plan, cases: Sequence[cohorts.Case], workers: int = 0) -> None:
    """Raises one UserError for all cases whose files' headers say that they cannot be evaluated, before any is.

    Files that are not there, are no volumes, or do not lie on one grid; what only the voxels tell is left.
    """

    def wrong(case: cohorts.Case) -> str:
        try:
            plan.prepared_shape(case)
            masks = [target for target in case.targets.values() if isinstance(target, Path)]
            images = [case.images[m] for m in plan.modalities if m in case.images]
            first, *others = [_header(file) for file in dict.fromkeys((*images, *masks))]
            for other in others:
                check_same_grid(other, first)
        except UserError as error:
            return str(error)
        return ""

    reasons = [text for text in dataset.each(wrong, cases, workers, None) if text]
    if len(reasons) > 1:
        listed = "".join(f"\n  {reason}" for reason in reasons)
        raise UserError(f"{len(reasons)} of {len(cases)} case(s) cannot be evaluated, and none was:{listed}")
    if reasons:
        raise UserError(reasons[0])


def _header(file: Path) -> Volume:
    """A volume of a file's grid, of zeros that take no memory."""
    shape, affine = nifti.read_grid(file)
    return Volume(np.broadcast_to(np.uint8(0), shape), affine, file)


def check_targets(job: Mapping[str, Any], plan: preprocess.Plan, cases: Sequence[cohorts.Case]) -> None:
    """Raises UserError, naming task and case, for a target that a task cannot be scored with; reads no file.

    Masks are checked where they are read, places of findings where cases are prepared.
    """
    for case in cases:
        for name, task in job.items():
            value = targets.declared(case, name, plan.kinds, plan.columns)
            if value is not None:
                task.check_target(Known(case.id, value, None, tuple(plan.columns.get(name, ()))))


def check_classes(
    workdir: Path, task: str, names: Sequence[str], trained: Mapping[str, Any], data: Mapping[str, Any]
) -> None:
    """Raises UserError where the data to evaluate on number a task's classes in another order than the run.

    Args:
      names: of the task's classes. trained, data: `config.data` of the run, and of the evaluation.
    """
    known, given = dataset.class_orders(trained, task), dataset.class_orders(data, task)
    for order, here in ((names, given[0]), (names, given[1]), (known[0], given[0]), (known[1], given[1])):
        if swapped := moved(here, order):
            raise UserError(
                f"{workdir}: task '{task}' was trained on the order {tuple(order)}, the data to evaluate on have "
                f"{here}: '{swapped[0]}' would be scored as another. Give data.classes.{task} (of a vector, "
                f"data.targets.{task}) the run's order"
            )


def splits_to_evaluate(config: ConfigDict, splits: Mapping[str, Any]) -> list[str]:
    """Those of `config.eval.splits` that there are; UserError if none."""
    names = [name for name in config.eval.splits if name in splits]
    if not names:
        raise UserError(f"config: eval.splits={tuple(config.eval.splits)}: the cohort's splits are {', '.join(splits)}")
    return names


def evaluate_split(
    run: Run, split: str, cases: Sequence[cohorts.Case], folder: Path, gauge: measures.Gauge | None = None
) -> dict[str, Any]:
    """Predicts, scores, measures, writes and draws one split.

    A case that cannot be read stops no other. What an earlier evaluation left of what this one writes is removed first.

    Returns:
      The summary, with 'refused' (case -> why) where there are any; of several processes only the first has it.
    """
    gauge = gauge or measures.Gauge(None, cases)
    began = time.perf_counter()
    options = run.config.eval
    outputs = output_files(run.tasks, folder / "predictions", [c.id for c in cases]) if options.predictions else {}
    folder.mkdir(parents=True, exist_ok=True)
    predictor = run.predictor([run.plan.prepared_shape(case) for case in cases])
    own = cases[processes.index() :: processes.count()]
    remove_old(run, folder, [file for case in own for file in outputs.get(case.id, {}).values()])
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in run.tasks}
    examiner = pretext.Examiner(run.config, run.model, run.pretext) if run.pretext else None
    judged = run.tasks | run.pretext
    progress = Progress(f"evaluating {split}", len(cases))
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name, task in run.tasks.items() if task.kind != "dense"}
    # Each process predicts, scores and writes its own cases; the rows meet at the end.
    turns, order = processes.count(), {case.id: number for number, case in enumerate(cases)}
    refused: dict[str, str] = {}
    for number, (case, load) in enumerate(read_ahead(own, run.plan), 1):
        try:
            prepared, like = load()
        except UserError as error:
            refused[case.id] = str(error)
            progress.update(min(number * turns, len(cases)), case.id)
            continue
        if examiner:
            examiner.add(prepared, case.id, case.group, order[case.id])
        probabilities = predictor.case(run.params, prepared)
        for name, task in run.tasks.items():
            decoded = task.decode(probabilities[name], prepared.geometry)
            if task.kind != "dense":
                tables[name] += table_rows(task, case.id, decoded)
            elif options.predictions:
                write(task, decoded, like, outputs[case.id][name])
            if name not in case.targets:
                gauge.predicted(name, case.id, decoded, like.spacing, voxel=like.voxel_volume)
                continue
            if task.kind == "dense":
                mask = nifti.read_label(str(case.targets[name]))
                found = task.score(decoded, mask.data, mask.spacing, mask.voxel_volume)
                gauge.predicted(name, case.id, decoded, like.spacing, mask.data, like.voxel_volume)
                gauge.reference(name, case.id, mask.data, mask.spacing, mask.voxel_volume)
            else:
                reference = task.reference(prepared.values[name], prepared.geometry)
                found = task.score(decoded, reference, prepared.geometry.spacing)
            rows[name] += [{"case": case.id, "group": case.group, **row} for row in found]
        progress.update(min(number * turns, len(cases)), case.id)
    progress.close()
    if examiner:
        rows |= examiner.rows(run.params)
    rows = _gathered(f"scores of {split}", rows, key=lambda row: order[row["case"]])
    tables = _gathered(f"tables of {split}", tables, key=lambda row: order[row["case"]])
    gauge.gather(split)
    refused = {id: reason for part in processes.gather(f"refused of {split}", refused) for id, reason in part.items()}
    about = {"refused": {case.id: refused[case.id] for case in cases if case.id in refused}} if refused else {}
    if not processes.primary():
        return {}
    measured = gauge.finish(folder, f"{run.config.name}, {split}", pictures=options.pictures)
    for name, found in tables.items():
        if options.predictions:
            (folder / "predictions").mkdir(exist_ok=True)
            write_table(found, folder / "predictions" / f"{name}.csv")
    if not any(rows.values()):
        say(f"{split}: {len(cases) - len(refused)} cases predicted; none has a reference to score against")
        return about
    several = len(judged) > 1
    metrics: dict[str, Any] = {}
    for name, task in judged.items():
        if rows[name]:
            metrics |= {f"{name}/{k}" if several else k: v for k, v in task.summarize(rows[name]).items()}
    # A temperature is chosen on validation cases; how it does on others, their own ECE says.
    fitted = {
        name: task.calibration(rows[name])
        for name, task in run.tasks.items()
        if split == "val" and rows[name] and hasattr(task, "calibration")
    }
    every = [{"case": r["case"], "group": r["group"], "task": name, **r} for name, v in rows.items() for r in v]
    summary = {
        "split": split,
        "n_cases": len({row["case"] for row in every}),
        **about,
        "metrics": metrics,
        **measured,
        **({"calibration": fitted} if fitted else {}),
        "checkpoint": {"step": run.step, "kind": run.kind},
        "command": shlex.join(["python", "-m", "medjax.main", *sys.argv[1:]]),
        "versions": report.versions(),
        "seconds": round(time.perf_counter() - began, 2),
    }
    write_table(every, folder / "cases.csv")
    write_atomic(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    if options.pictures:
        if examiner:
            examiner.draw(run.params, folder)
        draw(run, predictor, cases, rows, folder)
    say_summary(summary, folder)
    return summary


def remove_old(run: Run, folder: Path, predictions: Sequence[Path]) -> None:
    """Removes what an earlier evaluation wrote, so that no old summary stands beside new masks if this one ends early.

    Args:
      predictions: masks that this process is about to write. The tables and pictures are the first process's.
    """
    old = list(predictions)
    if processes.primary():
        tables = ("summary.json", "cases.csv", "measures.csv", "measures.png", "diagnosis.csv")
        old += [folder / name for name in tables]
        old += [folder / "predictions" / f"{name}.csv" for name in run.tasks]
        pictures = (f"{name}*.png" for name in ("worst", "median", "best", *(f"{name}_" for name in run.pretext)))
        old += [file for pattern in pictures for file in folder.glob(pattern)]
    for file in old:
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{file}: cannot be replaced: {error.strerror}. Correct its permissions.") from error


def draw(
    run: Run,
    predictor: Predictor,
    cases: Sequence[cohorts.Case],
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    folder: Path,
) -> None:
    """Overlays of the worst, median and best case by mean Dice over the masks, on the prepared grid."""
    from medjax import pictures

    dense = {name: task for name, task in run.tasks.items() if task.kind == "dense"}
    scores: dict[str, list[float]] = {}
    for name in dense:
        for row in rows[name]:
            scores.setdefault(row["case"], []).append(row["dice"])
    means = {case: float(np.nanmean(v)) for case, v in scores.items() if not np.all(np.isnan(v))}
    ranked = sorted(means, key=lambda case: (means[case], case))
    if not ranked:
        return
    by_id = {case.id: case for case in cases}
    channel = shown_channel(run.plan.modalities)
    for rank, case_id in {"worst": ranked[0], "median": ranked[len(ranked) // 2], "best": ranked[-1]}.items():
        prepared = read_case(by_id[case_id], run.plan)[0]
        probabilities = predictor.case(run.params, prepared)
        for name, task in dense.items():
            if name not in prepared.targets:
                continue
            suffix = "" if len(dense) == 1 else f"_{name}"
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

    Regions that no map of the task's own labels can hold are drawn one over the other, numbered in their order. Labels
    that no region covers are not what is predicted, and have no name here: they are not drawn.
    """
    if task.paintable:
        asked = {value for values in task.classes.values() for value in values}
        names = {value: name for name, value in task.foreground.items() if value in asked}
        return reference, task.paint(decoded), names
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


_SHOWN = 3  # metrics of a task at the terminal; all are in summary.json
_NAMES = {"dice": "Dice", "hd95": "HD95 mm", "nsd": "NSD"}


def say_summary(summary: Mapping[str, Any], folder: Path) -> None:
    """The table of each task at the terminal."""
    by_task: dict[str, dict[str, Any]] = {}
    for key, value in summary["metrics"].items():
        task, _, metric = key.rpartition("/")
        by_task.setdefault(task, {})[metric] = value
    say(f"\n{summary['split']}: {summary['n_cases']} cases, mean with 95 % interval over patients ({folder})")
    for task, metrics in by_task.items():
        shown = list(metrics)[:_SHOWN]
        lines = list(dict.fromkeys(label for metric in shown for label in metrics[metric]["per_class"]))
        width = max(len(name) for name in ("mean", task, *lines))
        say(f"  {task:{width}}  {''.join(f'{_NAMES.get(metric, metric):24}' for metric in shown)}".rstrip())
        for name in [*lines, "mean"]:
            cells = []
            for metric in shown:
                value = metrics[metric] if name == "mean" else metrics[metric]["per_class"].get(name)
                cells.append(f"{_with_interval(value):24}")
            say(f"  {name:{width}}  {''.join(cells)}".rstrip())
    for name, found in summary.get("calibration", {}).items():
        best = f"{found['temperature']:.4g}"
        say(
            f"  {name}: temperature {best} fits these {found['n']} cases best: ECE {found['ece']:.3f} -> "
            f"{found['ece_calibrated']:.3f} (eval.tasks={{'{name}': {{'temperature': {best}}}}})"
        )
    measures.say_summary(summary, folder)
    if refused := summary.get("refused"):
        say(f"  {len(refused)} case(s) refused, in no score: {', '.join(refused)}")


def _with_interval(value: Mapping[str, Any] | None) -> str:
    if value is None or value["mean"] is None:
        return "-"
    numbers = [value["mean"], *(v for v in value["ci95"] if v is not None)]
    digits = 3 if max(map(abs, numbers)) <= 1 else 2
    low, high = (f"{v:.{digits}f}" if v is not None else "-" for v in value["ci95"])
    return f"{value['mean']:.{digits}f} [{low}, {high}]"
