"""The training spine, readable top to bottom: data, model, step, report, loop."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from medjax import config as config_lib
from medjax import evaluate, optim, parallel, pictures, report, runtime, tasks
from medjax.augment import policy
from medjax.checkpoint import Checkpoints
from medjax.data import cohort as cohorts
from medjax.data import dataset, pipeline, preprocess, sampler
from medjax.errors import UserError, write_atomic
from medjax.logging import Metrics, Progress, duration, say
from medjax.models.model import Model, build_model, parameter_count
from medjax.ops import native
from medjax.ops.native.cpus import usable_cpus


@flax.struct.dataclass
class State:
    """What training changes. `average` is the exponential moving average of the parameters, or None."""

    step: Any
    params: Any
    opt_state: Any
    average: Any

    @property
    def eval_params(self) -> Any:
        """The parameters to evaluate: the averaged ones where there are any."""
        return self.params if self.average is None else self.average


class Intervals(NamedTuple):
    """Steps between two log rows, two evaluations, two checkpoints."""

    log: int
    evaluate: int
    checkpoint: int


@dataclass(frozen=True)
class Job:
    """What a run trains on and what it trains.

    Attributes:
      splits: split name -> cases, with 'train'. plan: preprocessing, learnt from the training cases.
      total: optimizer steps of the whole run.
    """

    cohort: cohorts.Cohort
    splits: cohorts.Splits
    plan: preprocess.Plan
    tasks: Mapping[str, tasks.Task]
    model: Model
    total: int


def train(config: ConfigDict, workdir: Path) -> None:
    """Trains `config` in `workdir`, going on from its newest checkpoint if there is one."""
    began = time.perf_counter()
    mesh = parallel.make_mesh(config.mesh)
    parallel.check_batch(config.data.batch_size, config.optim.accumulate, mesh)
    job = open_job(config)
    sampler.check_multiple(config.data.patch, job.model.backbone.total_factor())
    every = intervals(config, len(job.splits["train"]))
    checkpoints = Checkpoints(workdir)
    newest = checkpoints.newest("latest")
    meta = {} if newest is None else checkpoints.meta("latest", newest)
    history: dict[str, Any] = meta.get("history", {"best": None, "best_step": None, "stale": 0, "stopped": False})
    first = newest or 0
    tx, rate, create = make_state(config, job)
    everywhere = parallel.replicated(mesh)
    abstract = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=everywhere), jax.eval_shape(create)
    )
    if newest is not None:
        for line in config_lib.difference(meta["config"], json.loads(config_lib.to_json(config))):
            say(f"the checkpoint was written with another configuration: {line}")
        if meta["plan"] != job.plan.to_json():
            say("the training cases are not those of the checkpoint: the preprocessing learnt from them differs")
        checkpoints.check("latest", newest, abstract)
    if first >= job.total or history["stopped"]:
        say(f"{workdir}: already trained to step {first}{' (stopped early)' if history['stopped'] else ''}")
        checkpoints.close()
        return

    # Prepared cases, the step compiled for them, and the state it begins with.
    sources = prepare_sources(config, job)
    feed = pipeline.train_batches(
        sources["train"],
        sampler.Sampler(config.seed, len(job.splits["train"]), config.data.foreground),
        patch=tuple(config.data.patch),
        batch_size=config.data.batch_size,
        first_step=first,
        process=jax.process_index(),
        processes=jax.process_count(),
        workers=usable_cpus(),
    )
    batches = parallel.prefetch(feed, mesh)
    batch = next(batches)
    compiled = report.compile_step(make_train_step(config, job, tx, mesh), abstract, batch)
    if newest is None:
        state = jax.jit(create, out_shardings=everywhere)()
    else:
        state = checkpoints.restore("latest", newest, abstract)
    write_atomic(workdir / "config.json", config_lib.to_json(config) + "\n")
    say_report(config, mesh, job, abstract, compiled, first)
    metrics = Metrics(workdir, first, config)
    validation = Validation(config, job, sources["val"], mesh) if "val" in sources else None

    def save(kind: str, number: int) -> None:
        about = {"step": number, "config": json.loads(config_lib.to_json(config)), "plan": job.plan.to_json()}
        checkpoints.save(kind, number, state, {**about, "labels": dict(job.cohort.labels), "history": dict(history)})

    # The loop.
    progress, clock, text = Progress("step", job.total), Clock(), ""
    for number in range(first + 1, job.total + 1):
        state, sums = compiled.call(state, batch)
        last = number == job.total
        if not last:
            with clock.waiting():
                batch = next(batches)
        # One step in flight at most: the host must not run ahead of the device.
        jax.block_until_ready(sums)
        clock.steps += 1
        if number % every.log == 0 or last:
            values = {k: float(v) for k, v in jax.device_get(sums).items()}
            steps, seconds, waited = clock.lap()
            speed = {"patches_per_s": steps * config.data.batch_size / seconds, "waiting": waited / seconds}
            values |= {"lr": float(rate(number - 1)), **speed}
            metrics.write(number, {f"train/{k}": v for k, v in values.items()})
            if not math.isfinite(values["loss"]):
                raise UserError(
                    f"training: the loss is not finite at step {number}; lower optim.lr, or train in float32 "
                    f"(train.precision). The newest checkpoint in {workdir / 'checkpoints'} is from before."
                )
            text = f"loss {values['loss']:.4f}  {speed['patches_per_s']:.2f} patches/s  waiting {speed['waiting']:.1%}"
        best = "" if history["best"] is None else f"  best val Dice {history['best']:.4f}"
        progress.update(number, text + best)
        if validation and (number % every.evaluate == 0 or last):
            scores = validation(state.eval_params)
            metrics.write(number, {f"val/{k}": v for k, v in scores.items()})
            if history["best"] is None or scores["dice"] > history["best"]:
                history |= {"best": scores["dice"], "best_step": number, "stale": 0}
                save("best", number)
            else:
                history["stale"] += 1
            history["stopped"] = 0 < config.train.patience <= history["stale"]
            clock.lap()
        if number % every.checkpoint == 0 or last or history["stopped"]:
            save("latest", number)
        if history["stopped"]:
            break
    progress.close()
    batches.close()
    checkpoints.close()
    metrics.close()
    draw_curves(workdir)
    early = " (stopped early)" if history["stopped"] else ""
    best = "" if history["best"] is None else f", best validation Dice {history['best']:.4f} at {history['best_step']}"
    say(f"trained to step {int(state.step)}{early} in {duration(time.perf_counter() - began)}{best}")


def open_job(config: ConfigDict) -> Job:
    """Opens the cohort, divides it, learns the plan, builds tasks and model."""
    cohort = dataset.open_cohort(config.data, next(iter(config.tasks), ""))
    splits = dataset.open_splits(cohort, config.data, config.seed)
    if "train" not in splits:
        raise UserError(f"config: data.split gives cohort '{cohort.name}' no 'train' split; it gives {list(splits)}")
    evaluate.splits_to_evaluate(config, splits)
    job = tasks.build(config.tasks, cohort.labels)
    total = steps_of(config, "train.total", len(splits["train"]))
    plan = preprocess.fit(config.data.preprocess, cohort, splits["train"])
    return Job(cohort, splits, plan, job, build_model(config, job), total)


def prepare_sources(config: ConfigDict, job: Job) -> dict[str, pipeline.Source]:
    """Reads, checks and preprocesses the training and validation cases."""
    sources: dict[str, pipeline.Source] = {}
    for name in ("train", "val"):
        if name in job.splits:
            progress = Progress(f"preparing {name} cases", len(job.splits[name]))
            cases = dataset.prepare(job.plan, job.splits[name], config.data.workers, progress.update)
            progress.close()
            sources[name] = pipeline.Source(cases, tuple(job.tasks))
    for name in config.eval.splits:
        if name in job.splits and name not in sources:
            progress = Progress(f"checking {name} cases", len(job.splits[name]))
            dataset.check(job.plan, job.splits[name], config.data.workers, progress.update)
            progress.close()
    shapes = [case.image.shape[:3] for case in sources["train"].cases]
    sampler.check_filled(config.data.patch, shapes, job.model.backbone.total_factor())
    check_targets(job.tasks, sources["train"])
    return sources


def steps_of(config: ConfigDict, key: str, n_examples: int) -> int:
    """The duration at `key` in optimizer steps."""
    value: Any = config
    for part in key.split("."):
        value = value[part]
    return config_lib.steps(value, batch_size=config.data.batch_size, n_examples=n_examples, key=key)


def intervals(config: ConfigDict, n_examples: int) -> Intervals:
    """The intervals of `config.train`; each at least one step."""
    keys = ("train.log_every", "train.eval_every", "train.checkpoint_every")
    found = [steps_of(config, key, n_examples) for key in keys]
    for key, steps in zip(keys, found, strict=True):
        if steps < 1:
            raise UserError(f"config: '{key}' must be at least one step")
    return Intervals(*found)


def check_targets(job: Mapping[str, tasks.Task], source: pipeline.Source) -> None:
    """Raises UserError for a task none of the training cases has a target for."""
    for name in job:
        if not any(name in case.targets for case in source.cases):
            raise UserError(
                f"task '{name}': no training case has a target of that name; targets there: "
                f"{', '.join(sorted({t for c in source.cases for t in c.targets})) or 'none'}"
            )


def make_state(config: ConfigDict, job: Job) -> tuple[Any, Callable, Callable[[], State]]:
    """The optimizer, its schedule, and the function that makes the first state from the seed."""
    shape = (1, *config.data.patch, len(job.plan.modalities))

    def parameters() -> Any:
        x = jnp.zeros(shape, jnp.float32)
        return job.model.init(jax.random.key(config.seed), x, train=True)["params"]

    warmup = steps_of(config, "optim.warmup", len(job.splits["train"]))
    tx, rate = optim.build(config.optim, jax.eval_shape(parameters), job.total, warmup)

    def create() -> State:
        params = parameters()
        return State(jnp.zeros((), jnp.int32), params, tx.init(params), params if config.optim.ema else None)

    return tx, rate, create


def make_train_step(
    config: ConfigDict, job: Job, tx: Any, mesh: Mesh
) -> Callable[[State, dict[str, Any]], tuple[State, dict[str, Any]]]:
    """The jitted step: augment, forward, masked losses, gradients over `optim.accumulate` rounds, update."""
    rounds = config.optim.accumulate
    augment = policy.build(config.augment, tuple(job.tasks), config.seed)
    rows = PartitionSpec("data")
    augment = jax.shard_map(augment, mesh=mesh, in_specs=rows, out_specs=rows)

    def loss(params: Any, batch: dict[str, Any], share: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        outputs: Any = job.model.apply({"params": params}, batch["image"], train=True)
        total, sums = 0.0, {}
        for name, task in job.tasks.items():
            # `where`, not a product: an example without a label must not bring in a NaN.
            losses = jnp.where(batch[f"{name}/mask"], task.loss(outputs[name], batch), 0.0)
            sums[name] = jnp.sum(losses) * share[name]
            total += task.weight * sums[name]
        parts = {f"loss/{name}": value for name, value in sums.items()} if len(sums) > 1 else {}
        return total, {"loss": total, **parts}

    def step(state: State, batch: dict[str, Any]) -> tuple[State, dict[str, Any]]:
        batch = augment(batch)
        key = jax.random.key(config.seed)
        for task in job.tasks.values():
            batch = task.prepare(key, batch)
        # Each task's losses are averaged over the examples of the whole batch that have its label.
        share = {name: 1.0 / jnp.maximum(jnp.sum(batch[f"{name}/mask"]), 1) for name in job.tasks}
        gradient = jax.grad(loss, has_aux=True)
        if rounds == 1:
            grads, sums = gradient(state.params, batch, share)
        else:
            # Round r takes rows r, r + rounds...: what lies on a device stays there.
            split = {k: v.reshape(-1, rounds, *v.shape[1:]).swapaxes(0, 1) for k, v in batch.items()}

            def add(carry: Any, part: dict[str, Any]) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, carry, gradient(state.params, part, share)), None

            zero = jax.tree.map(
                lambda s: jnp.zeros(s.shape, s.dtype),
                jax.eval_shape(gradient, state.params, jax.tree.map(lambda v: v[0], split), share),
            )
            (grads, sums), _ = jax.lax.scan(add, zero, split)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p + u, state.params, updates)
        average = state.average
        if average is not None:
            average = optim.ema(average, params, config.optim.ema, state.step)
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
        return State(state.step + 1, params, opt_state, average), {**sums, "grad_norm": norm}

    everywhere = parallel.replicated(mesh)
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(everywhere, parallel.batch_sharding(mesh)),
        out_shardings=(everywhere, everywhere),
    )


class Validation:
    """Scores while training: loss on one fixed patch a case, and Dice of whole cases on the prepared grid."""

    def __init__(self, config: ConfigDict, job: Job, source: pipeline.Source, mesh: Mesh) -> None:
        self._source, self._tasks, self._mesh = source, job.tasks, mesh
        self._batches = {"patch": tuple(config.data.patch), "batch_size": config.data.batch_size}
        self._cases = source.cases[: config.train.eval_cases or None]
        shapes = [case.image.shape[:3] for case in self._cases]
        self._predictor = evaluate.Predictor(config, job.model, job.tasks, shapes)

        def losses(params: Any, batch: dict[str, Any]) -> dict[str, Any]:
            for task in job.tasks.values():
                batch = task.prepare(jax.random.key(config.seed), batch)
            outputs: Any = job.model.apply({"params": params}, batch["image"], train=True)
            sums = {}
            for name, task in job.tasks.items():
                mask = batch[f"{name}/mask"]
                sums[name] = (jnp.sum(jnp.where(mask, task.loss(outputs[name], batch), 0.0)), jnp.sum(mask))
            return sums

        self._losses = jax.jit(losses)

    def __call__(self, params: Any) -> dict[str, float]:
        totals = {name: np.zeros(2) for name in self._tasks}
        for batch in pipeline.center_batches(self._source, **self._batches):
            sums = jax.device_get(self._losses(params, parallel.put_batch(batch, self._mesh)))
            for name, pair in sums.items():
                totals[name] += np.asarray(pair)
        loss = sum(task.weight * totals[name][0] / max(totals[name][1], 1) for name, task in self._tasks.items())
        return {"loss": float(loss)} | evaluate.quick_dice(self._predictor, params, self._cases)


class Clock:
    """Steps and seconds since the last lap, and how many of the seconds were spent waiting for data."""

    def __init__(self) -> None:
        self.steps, self._began, self._waited = 0, time.perf_counter(), 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts what runs inside as waiting."""
        entered = time.perf_counter()
        yield
        self._waited += time.perf_counter() - entered

    def lap(self) -> tuple[int, float, float]:
        """(steps, seconds, of them waiting) since the last lap; starts the next."""
        now = time.perf_counter()
        done = self.steps, now - self._began, self._waited
        self.steps, self._began, self._waited = 0, now, 0.0
        return done


def draw_curves(workdir: Path) -> None:
    """Losses and scores over the steps, as `curves.png` beside the run."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    if any(k.endswith("loss") and v is not None for row in rows for k, v in row.items()):
        pictures.curves(rows, workdir / "curves.png", title=workdir.name)


def say_report(config: ConfigDict, mesh: Mesh, job: Job, state: State, compiled: report.Compiled, first: int) -> None:
    """What will run, and what it costs, before it runs."""
    cases = ", ".join(f"{len(v)} {k}" for k, v in job.splits.items())
    patch = "×".join(map(str, config.data.patch))
    arguments, temporaries = report.human(compiled.arguments, "B"), report.human(compiled.temporaries, "B")
    say(f"run         {config.name}: {cases} cases, patch {patch}, batch {config.data.batch_size}")
    device = f"{mesh.devices.size} × {jax.devices()[0].device_kind}"
    say(f"device      {device}, {config.train.precision}, steps {first}..{job.total}")
    say(
        f"model       {config.model.name}, {report.human(parameter_count(state.params), '')} parameters, tasks: "
        f"{', '.join(job.tasks)}"
    )
    say(
        f"step        {report.human(compiled.flops, 'FLOP')}, compiled in {compiled.seconds:.1f} s, "
        f"{report.human(compiled.peak, 'B')} a device (arguments {arguments}, temporaries {temporaries})"
    )
    say(f"convolution {native.status()}")
    say(f"memory      {runtime.describe()}")
