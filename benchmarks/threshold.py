"""What an intensity threshold scores on a recipe's cohort, beside which a network's score is to be read.

`python -m benchmarks.threshold --config=configs/lung_nodule.py` prints one JSON line a task. The threshold (channel,
side and value, on the prepared images) is the one of a grid that does best on the training cases; it is scored on
`--split` as a network's answers are:

* segmentation: the voxels beyond the threshold; each label or region has a threshold of its own.
* detection: connected components beyond the threshold that are no smaller and no larger than the findings of the
  training cases; the fuller its box, the higher a component's score; its class is that of the nearest mean volume.
* classification: how many voxels lie beyond the threshold; the classes in the order that does best.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from medjax import config as config_lib
from medjax import job as job_lib
from medjax import models, tasks
from medjax.data import dataset
from medjax.tasks.common import Found
from medjax.tasks.findings import LABEL

_STEPS = 24
Rule = tuple[int, int, float]  # channel, side (1: above, -1: below), value


def rules(cases: Sequence[Any]) -> Iterator[Rule]:
    """The grid: quantiles of the training images, above and below, in each channel."""
    quantiles = np.concatenate([np.linspace(0.05, 0.9, _STEPS // 2), 1 - np.geomspace(0.09, 0.0005, _STEPS // 2)])
    for channel in range(cases[0].image.shape[-1]):
        values = np.concatenate([case.image[::3, ::3, ::3, channel].ravel() for case in cases])
        for value, side in itertools.product(np.quantile(values, quantiles), (1, -1)):
            yield channel, side, float(value)


def beyond(image: np.ndarray, rule: Rule) -> np.ndarray:
    channel, side, value = rule
    return image[..., channel] > value if side > 0 else image[..., channel] < value


def segmentation(task: Any, name: str, learn: Sequence[Any], held: Sequence[Any]) -> dict[str, Any]:
    found = {}
    for label, values in task.classes.items():

        def mean(rule: Rule, cases: Sequence[Any], values: Any = values) -> float:
            scores = []
            for case in cases:
                true, said = np.isin(case.targets[name], values), beyond(case.image, rule)
                if true.any() or said.any():
                    scores.append(2 * np.count_nonzero(true & said) / (np.count_nonzero(true) + np.count_nonzero(said)))
            return float(np.mean(scores))

        best = max(rules(learn), key=lambda rule: mean(rule, learn))
        found[label] = mean(best, held)
    return {"dice": found}


def detection(
    task: Any, name: str, learn: Sequence[Any], held: Sequence[Any], columns: Sequence[str] = ()
) -> dict[str, Any]:
    task = dataclasses.replace(task, columns=columns)
    rows = np.concatenate([case.values[name] for case in learn])
    volumes = np.prod(rows[:, 3:6].astype(float), axis=1) * np.pi / 6
    typical = [np.log(volumes[rows[:, LABEL] == i + 1]).mean() for i in range(len(task.names))]

    def summary(rule: Rule, cases: Sequence[Any]) -> dict[str, Any]:
        scored = []
        for number, case in enumerate(cases):
            parts, _ = ndimage.label(beyond(case.image, rule))
            counts, spacing = np.bincount(parts.ravel()), np.asarray(case.geometry.spacing)
            found = []
            for part, box in enumerate(ndimage.find_objects(parts), 1):
                volume = counts[part] * np.prod(spacing)
                if not volumes.min() / 1.5 <= volume <= volumes.max() * 1.5:
                    continue
                extent = np.array([s.stop - s.start for s in box])
                middle = np.array([(s.stop + s.start - 1) / 2 for s in box])
                world = case.geometry.affine[:3, :3] @ middle + case.geometry.affine[:3, 3]
                label = task.names[int(np.argmin(np.abs(np.log(volume) - typical)))]
                full = counts[part] / np.prod(extent)
                unknown = {attribute: 0.5 for attribute, _ in task.attributes}
                found.append(Found(label, float(full), tuple(world), tuple(extent * spacing), unknown))
            found = sorted(found, key=lambda one: -one.score)[: task.limit]
            reference = task.reference(case.values[name], case.geometry)
            scored += [
                {"case": number, "group": number, **row} for row in task.score(found, reference, case.geometry.spacing)
            ]
        return task.summarize(scored, resamples=0)

    # Bright or dark blobs: a fifth of the cases says which of the grid is worth a look.
    few = learn[:: max(1, len(learn) // 20)]
    best = max(rules(learn), key=lambda rule: task.selection(summary(rule, few)))
    return {"cpm": summary(best, held)["cpm"]["mean"]}


def classification(task: Any, name: str, learn: Sequence[Any], held: Sequence[Any]) -> dict[str, Any]:
    def of(cases: Sequence[Any]) -> tuple[list[Any], np.ndarray]:
        known = [case for case in cases if name in case.values]
        return known, np.array([int(case.values[name]) for case in known])

    def counts(rule: Rule, cases: Sequence[Any]) -> np.ndarray:
        return np.array([np.count_nonzero(beyond(case.image, rule)) for case in cases], float)

    (learn, truth), (held, held_truth) = of(learn), of(held)

    def auroc(x: np.ndarray, y: np.ndarray) -> float:
        """Of all pairs of different classes, the share in the right order (two classes: AUROC)."""
        wins = [(x[i] > x[j]) + 0.5 * (x[i] == x[j]) for i in range(len(y)) for j in range(len(y)) if y[i] > y[j]]
        return float(np.mean(wins))

    def right(rule: Rule, sign: int) -> float:
        return auroc(sign * counts(rule, learn), truth)

    best, sign = max(itertools.product(rules(learn), (1, -1)), key=lambda pair: right(*pair))
    x = sign * counts(best, held)
    found = {"pairs in order" if len(task.names) > 2 else "auroc": auroc(x, held_truth)}
    shares = np.cumsum(np.bincount(truth, minlength=len(task.names)))[:-1] / len(truth)
    called = np.searchsorted(np.quantile(sign * counts(best, learn), shares), x)
    return {**found, "accuracy": float(np.mean(called == held_truth))}


KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    "segmentation": segmentation,
    "detection": detection,
    "classification": classification,
}


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m benchmarks.threshold", description=__doc__.split("\n")[0])
    p.add_argument("--config", required=True, metavar="FILE[:ARG]")
    p.add_argument("--split", default="test")
    args = p.parse_args()
    options = {"model": models.options, "tasks": tasks.options}
    config = config_lib.load(args.config, (), lambda room, kind: options[room](kind))
    job = job_lib.open_job(config)
    # A sixth of the training cases and more is plenty for one number.
    learn = dataset.prepare(job.plan, job.splits["train"][:40])
    held = dataset.prepare(job.plan, job.splits[args.split])
    for name, task in job.tasks.items():
        kind = config.tasks[name].type
        if kind in KINDS:
            known = {"columns": job.plan.columns.get(name, ())} if kind == "detection" else {}
            score = KINDS[kind](task, name, learn, held, **known)
            print(json.dumps({"config": config.name, "task": name, "split": args.split, **score}), flush=True)


if __name__ == "__main__":
    main()
