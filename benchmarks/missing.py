"""Dice of a trained run for every subset of the contrasts: `python -m benchmarks.missing --run=runs/brain_tumour`.

Prints one JSON line a subset. An absent contrast is what it is in training and prediction: all zeros once normalised.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from medjax.data import dataset
from medjax.predict import Run


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m benchmarks.missing", description=__doc__.split("\n")[0])
    p.add_argument("--run", type=Path, required=True)
    p.add_argument("--split", default="test")
    args = p.parse_args()
    run = Run(args.run)
    cohort = dataset.open_cohort(run.config.data, run.config.tasks)
    splits = dataset.open_splits(cohort, run.config.data, run.config.seed, run.config.tasks)
    cases = dataset.prepare(run.plan, splits[args.split])
    predictor = run.predictor([case.image.shape[:3] for case in cases])
    dense = {name: task for name, task in run.tasks.items() if task.kind == "dense"}
    names = run.plan.modalities
    for size in range(len(names), 0, -1):
        for kept in itertools.combinations(range(len(names)), size):
            rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
            for number, case in enumerate(cases):
                image = np.zeros_like(case.image)
                image[..., list(kept)] = case.image[..., list(kept)]
                said = predictor(run.params, image)
                for name, task in dense.items():
                    found = task.score(task.decode(said[name]), case.targets[name], case.geometry.spacing)
                    rows[name] += [{"case": number, "group": number, **row} for row in found]
            scores = {
                name: {k: round(v["mean"], 4) for k, v in task.summarize(rows[name])["dice"]["per_class"].items()}
                for name, task in dense.items()
            }
            print(json.dumps({"contrasts": [names[i] for i in kept], **scores}), flush=True)


if __name__ == "__main__":
    main()
