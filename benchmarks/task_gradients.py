"""Whether one task of a recipe drowns another: their gradients in the backbone they share.

    python -m benchmarks.task_gradients --config=configs/breast.py [--run=runs/breast] [--batches=12]

One JSON line a task: the norm, over training batches, of the gradient of its weighed loss in the backbone's
parameters; one a pair of tasks: the cosine between their gradients. With `--run` the weights are those of a run's
latest checkpoint, else they are drawn. A task whose norm is several times another's decides where the backbone goes,
and what `optim.clip` cuts it cuts from both: lower its `weight`, or say `optim.balance='gradnorm'`.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medjax import config as config_lib
from medjax import job as job_lib
from medjax import models, tasks
from medjax.data import pipeline
from medjax.errors import UserError, run_program


def gradients(config: Any, run: Path | None, batches: int) -> Iterator[dict[str, np.ndarray]]:
    """Task -> gradient of its weighed loss in the backbone's parameters, [parameters], batch by batch.

    Raises:
      UserError: the recipe has one task; the run is of another network.
    """
    import jax
    import jax.numpy as jnp

    from medjax import peft, transfer
    from medjax.augment import policy
    from medjax.step import make_state

    job = job_lib.open_job(config)
    if len(job.tasks) < 2:
        raise UserError(f"config: tasks has '{', '.join(job.tasks)}' alone: there is nothing to compare")
    sources = job_lib.prepare_sources(config, job)
    job = job_lib.fit_tasks(config, job, sources["train"])
    params = jax.jit(make_state(config, job)[2])().params
    if run is not None:
        there = transfer.read(run, "latest").params
        own = {path: value.shape for path, value in peft.flat(params).items()}
        if own != {path: value.shape for path, value in there.items()}:
            raise UserError(f"{run}: is of another network or other tasks than the configuration")
        params = transfer.fill(params, there)
    examples, patch = job_lib.train_examples(config, job, sources["train"])
    feed = pipeline.train_batches(sources["train"], examples, patch=patch, batch_size=config.data.batch_size)
    augment, key = policy.build(config.augment, tuple(job.tasks), config.seed), jax.random.key(config.seed)

    def loss(params: Any, batch: dict[str, Any], name: str) -> Any:
        views = tasks.views(job.tasks, batch)
        outputs: Any = job.model.apply(
            {"params": params}, batch["image"], train=True, views=views, rngs={"dropout": key}
        )
        has = batch[f"{name}/mask"]
        each = jnp.where(has, job.tasks[name].loss(outputs[name], batch), 0.0)
        return job.tasks[name].weight * each.sum() / jnp.maximum(has.sum(), 1)

    @jax.jit
    def all_of(params: Any, batch: dict[str, Any]) -> dict[str, Any]:
        batch = augment(batch)
        for task in job.tasks.values():
            batch = task.prepare(key, batch)
        found = {name: jax.grad(loss)(params, batch, name)["backbone"] for name in job.tasks}
        return {name: jnp.concatenate([g.ravel() for g in jax.tree.leaves(tree)]) for name, tree in found.items()}

    for batch in itertools.islice(feed, batches):
        yield jax.device_get(all_of(params, {key: jnp.asarray(value) for key, value in batch.items()}))


def summary(found: Sequence[dict[str, np.ndarray]]) -> Iterator[dict[str, Any]]:
    """Rows: norm of a task, cosine of a pair: median and tenth and ninetieth percentile over the batches.

    A batch without a label of the task is left out.
    """

    def row(what: dict[str, Any], values: list[float]) -> dict[str, Any]:
        low, middle, high = np.quantile(values, (0.1, 0.5, 0.9)) if values else (np.nan,) * 3
        return {**what, "median": float(middle), "p10": float(low), "p90": float(high), "batches": len(values)}

    norms = {name: [float(np.linalg.norm(g[name])) for g in found] for name in found[0]}
    for name, values in norms.items():
        yield row({"task": name, "what": "norm"}, [v for v in values if v > 0])
    for a, b in itertools.combinations(norms, 2):
        pairs = zip(found, norms[a], norms[b], strict=True)
        yield row({"tasks": [a, b], "what": "cosine"}, [float(g[a] @ g[b] / (x * y)) for g, x, y in pairs if x * y > 0])


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.task_gradients",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--config", required=True, metavar="FILE[:ARG]")
    p.add_argument("--run", type=Path, help="run folder whose latest weights are taken")
    p.add_argument("--batches", type=int, default=12)
    args = p.parse_args(argv)
    options = {"model": models.options, "tasks": tasks.options}
    config = config_lib.load(args.config, [], lambda room, kind: options[room](kind))
    for line in summary(list(gradients(config, args.run, max(1, args.batches)))):
        print(json.dumps(line))


if __name__ == "__main__":
    run_program(main)
