"""The training spine, readable top to bottom: data, model, step, report, loop."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from medjax import config as config_lib
from medjax import evaluate, optim, parallel, pictures, report, runtime, tasks
from medjax.augment import policy
from medjax.checkpoint import Checkpoints
from medjax.data import cohort as cohorts
from medjax.data import dataset, pipeline, preprocess, sampler, store
from medjax.errors import UserError, write_atomic
from medjax.logging import Metrics, Progress, duration, say
from medjax.losses import weighting
from medjax.models.model import Model, build_model, parameter_count
from medjax.ops import native
from medjax.ops.native.cpus import usable_cpus

_DROPOUT = 1  # of the run's key: the stream that dropout draws from


@flax.struct.dataclass
class State:
    """What training changes.

    Attributes:
      average: exponential moving average of the parameters, or None.
      balance: of several tasks weighed by uncertainty: (log variances [T], their optimizer's state); else None.
    """

    step: Any
    params: Any
    opt_state: Any
    average: Any
    balance: Any = None

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
    everywhere = parallel.replicated(mesh)
    if newest is not None:
        checkpoints.check("latest", newest, abstract_state(config, job, everywhere))
    if first >= job.total or history["stopped"]:
        say(f"{workdir}: already trained to step {first}{' (stopped early)' if history['stopped'] else ''}")
        checkpoints.close()
        return

    # Prepared cases and what the tasks learn from them, the step compiled for both, and the state it begins with.
    sources = prepare_sources(config, job)
    job = fit_tasks(config, job, sources["train"])
    tx, rate, create = make_state(config, job)
    abstract = abstract_state(config, job, everywhere)
    if newest is not None:
        for line in config_lib.difference(meta["config"], json.loads(config_lib.to_json(config))):
            say(f"the checkpoint was written with another configuration: {line}")
        if meta["plan"] != job.plan.to_json():
            say("the training cases are not those of the checkpoint: the preprocessing learnt from them differs")
    shapes = bucket_shapes(config, job, [case.image.shape[:3] for case in sources["train"].cases])
    feed = pipeline.train_batches(
        sources["train"],
        pipeline.make_sampler(
            config.seed,
            sources["train"],
            job.splits["train"],
            foreground=config.data.foreground,
            sampling=config.data.sampling,
            labels=job.cohort.labels,
            buckets=shapes,
            batch_size=config.data.batch_size,
        ),
        patch=shapes or tuple(config.data.patch),
        batch_size=config.data.batch_size,
        first_step=first,
        process=jax.process_index(),
        processes=jax.process_count(),
        workers=usable_cpus(),
    )
    batches = parallel.prefetch(feed, mesh)
    batch = next(batches)
    step = make_train_step(config, job, tx, mesh)
    compiled = report.compile_step(step, abstract, batch)
    calls = {batch["image"].shape: compiled.call}
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
        if batch["image"].shape not in calls:  # the first of its bucket
            calls[batch["image"].shape] = report.compile_step(step, abstract, batch).call
        state, sums = calls[batch["image"].shape](state, batch)
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
        best = "" if history["best"] is None else f"  best val score {history['best']:.4f}"
        progress.update(number, text + best)
        if validation and (number % every.evaluate == 0 or last):
            scores = validation(state.eval_params)
            metrics.write(number, {f"val/{k}": v for k, v in scores.items()})
            if history["best"] is None or scores["score"] > history["best"]:
                history |= {"best": scores["score"], "best_step": number, "stale": 0}
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
    best = "" if history["best"] is None else f", best validation score {history['best']:.4f} at {history['best_step']}"
    say(f"trained to step {int(state.step)}{early} in {duration(time.perf_counter() - began)}{best}")


def open_job(config: ConfigDict) -> Job:
    """Opens the cohort, divides it, learns the plan, builds tasks and model."""
    cohort = dataset.open_cohort(config.data, config.tasks)
    declare_targets(config, cohort)
    splits = dataset.open_splits(cohort, config.data, config.seed)
    if "train" not in splits:
        raise UserError(f"config: data.split gives cohort '{cohort.name}' no 'train' split; it gives {list(splits)}")
    evaluate.splits_to_evaluate(config, splits)
    job = tasks.build(config.tasks, cohort.labels)
    total = steps_of(config, "train.total", len(splits["train"]))
    plan = preprocess.fit(config.data.preprocess, cohort, splits["train"])
    model = build_model(config, job)
    if config.data.buckets:
        # What the network is made for, and the window of prediction: whatever volume there is.
        cases = (*splits["train"], *splits.get("val", ()))
        shapes = [plan.prepared_shape(case) for case in cases]
        config.data.patch = sampler.bucket_shapes(shapes, 1, model.backbone.total_factor())[0]
    return Job(cohort, splits, plan, job, model, total)


def declare_targets(config: ConfigDict, cohort: cohorts.Cohort) -> None:
    """Writes what the cohort declares about targets into the tasks that do not say otherwise.

    Names of classes, and for the masks of an nnU-Net folder its regions and its ignore label.
    """
    by_value = {value: name for name, value in cohort.labels.items()}
    with config.unlocked(), config.ignore_type():
        for name, task in config.tasks.items():
            if "names" in task and not task.names and name in cohort.classes:
                task.names = tuple(cohort.classes[name])
            if task.type != "segmentation":
                continue
            if cohort.regions and not task.regions:
                task.regions = {
                    region: tuple(by_value[value] for value in values) for region, values in cohort.regions.items()
                }
            if cohort.ignore is not None and task.ignore < 0:
                task.ignore = int(cohort.ignore)


def prepare_sources(config: ConfigDict, job: Job) -> dict[str, pipeline.Source]:
    """Reads, checks and preprocesses the training and validation cases, in memory or in the store (`data.store`)."""
    kept: list[str] = [name for name in ("train", "val") if name in job.splits]
    others = [name for name in config.eval.splits if name in job.splits and name not in kept]
    prepared: dict[str, Any] = {}
    if config.data.store:
        splits = {split: job.splits[split] for split in (*kept, *others)}
        prepared, folder = store.prepare(
            config.data.store, job.cohort.name, job.plan, splits, config.data.workers, Progress
        )
        say(f"store       {folder}")
    else:
        for split in (*kept, *others):
            progress = Progress(f"{'preparing' if split in kept else 'checking'} {split} cases", len(job.splits[split]))
            function: Callable = dataset.prepare if split in kept else dataset.check
            prepared[split] = function(job.plan, job.splits[split], config.data.workers, progress.update)
            progress.close()
    sources = {name: pipeline.Source(prepared[name], tuple(job.tasks), job.plan.ignore) for name in kept}
    if not config.data.buckets:
        shapes = [case.image.shape[:3] for case in sources["train"].cases]
        sampler.check_filled(config.data.patch, shapes, job.model.backbone.total_factor())
    return sources


def bucket_shapes(config: ConfigDict, job: Job, shapes: Sequence[Sequence[int]]) -> list[tuple[int, int, int]]:
    """The shapes that whole volumes of `shapes` are padded to; none where training takes patches."""
    if not config.data.buckets:
        return []
    return sampler.bucket_shapes(shapes, config.data.buckets, job.model.backbone.total_factor())


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


class Targets(Sequence[tasks.Known]):
    """A task's targets of the training cases that have one, read singly: a store may hold more than memory."""

    def __init__(
        self, name: str, cases: Sequence[cohorts.Case], source: pipeline.Source, plan: preprocess.Plan
    ) -> None:
        self._name, self._ids, self._prepared = name, [case.id for case in cases], source.cases
        self._columns = tuple(plan.columns.get(name, ()))
        self._with = [i for i, p in enumerate(source.cases) if name in p.targets or name in p.values]

    def __len__(self) -> int:
        return len(self._with)

    def __getitem__(self, index: Any) -> Any:
        number = self._with[index]
        case = self._prepared[number]
        # Findings are in both: the table describes the instances of the mask.
        value = case.values[self._name] if self._name in case.values else case.targets[self._name]
        return tasks.Known(self._ids[number], np.asarray(value), case.image.shape[:3], self._columns)


def fit_tasks(config: ConfigDict, job: Job, source: pipeline.Source) -> Job:
    """Lets the tasks check the training targets and learn from them; what they learn is written into `config.tasks`.

    Raises:
      UserError: a task without targets, or with targets that are not of its kind.
    """
    for name, task in job.tasks.items():
        kind = job.plan.kinds.get(name)
        if kind and kind not in task.targets and not (kind == "class" and "number" in task.targets):
            raise UserError(
                f"task '{name}': the cohort's target is a {kind}, and tasks of type '{config.tasks[name].type}' take a "
                f"{' or a '.join(task.targets)}; correct tasks.{name}.type or data.targets.{name}"
            )
    names = dict.fromkeys((*job.tasks, *(t for case in job.splits["train"] for t in case.targets)))
    known = {name: Targets(name, job.splits["train"], source, job.plan) for name in names}
    learnt = tasks.fit(config.tasks, job.tasks, known)
    if not any(learnt.values()):
        return job
    with config.unlocked(), config.ignore_type():
        for name, values in learnt.items():
            config.tasks[name].update(values)
    built = tasks.build(config.tasks, job.cohort.labels)
    return dataclasses.replace(job, tasks=built, model=build_model(config, built))


def make_state(config: ConfigDict, job: Job) -> tuple[Any, Callable, Callable[[], State]]:
    """The optimizer, its schedule, and the function that makes the first state from the seed."""
    shape = (1, *config.data.patch, len(job.plan.modalities))

    def parameters() -> Any:
        x = jnp.zeros(shape, jnp.float32)
        return job.model.init(jax.random.key(config.seed), x, train=True)["params"]

    warmup = steps_of(config, "optim.warmup", len(job.splits["train"]))
    tx, rate = optim.build(config.optim, jax.eval_shape(parameters), job.total, warmup)

    def create() -> State:
        params, log_variances = parameters(), jnp.zeros(len(job.tasks))
        balance = (log_variances, optax.adam(rate).init(log_variances)) if by_uncertainty(config, job) else None
        average = params if config.optim.ema else None
        return State(jnp.zeros((), jnp.int32), params, tx.init(params), average, balance)

    return tx, rate, create


def by_uncertainty(config: ConfigDict, job: Job) -> bool:
    """Whether the tasks are weighed by trained uncertainties (`optim.balance`); a single task has nothing to weigh."""
    if config.optim.balance not in ("fixed", "uncertainty"):
        raise UserError(f"config: optim.balance '{config.optim.balance}' is not known; known: fixed, uncertainty")
    return config.optim.balance == "uncertainty" and len(job.tasks) > 1


def abstract_state(config: ConfigDict, job: Job, sharding: Any) -> State:
    """The state's shapes and types, laid out by `sharding`."""
    shapes = jax.eval_shape(make_state(config, job)[2])
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes)


def make_train_step(
    config: ConfigDict, job: Job, tx: Any, mesh: Mesh
) -> Callable[[State, dict[str, Any]], tuple[State, dict[str, Any]]]:
    """The jitted step: augment, forward, masked losses, gradients over `optim.accumulate` rounds, update."""
    rounds = config.optim.accumulate
    augment = policy.build(config.augment, tuple(job.tasks), config.seed)
    rows = PartitionSpec("data")
    augment = jax.shard_map(augment, mesh=mesh, in_specs=rows, out_specs=rows)

    balanced = by_uncertainty(config, job)
    rate = optim.schedule(config.optim, job.total, steps_of(config, "optim.warmup", len(job.splits["train"])))
    weights = jnp.asarray([task.weight for task in job.tasks.values()])

    def loss(
        trained: tuple[Any, Any], batch: dict[str, Any], share: Mapping[str, Any], key: Any
    ) -> tuple[Any, dict[str, Any]]:
        params, log_variances = trained
        outputs: Any = job.model.apply({"params": params}, batch["image"], train=True, rngs={"dropout": key})
        total, sums = 0.0, {}
        for name, task in job.tasks.items():
            # `where`, not a product: an example without a label must not bring in a NaN.
            losses = jnp.where(batch[f"{name}/mask"], task.loss(outputs[name], batch), 0.0)
            sums[name] = jnp.sum(losses) * share[name]
            total += task.weight * sums[name]
        parts = {f"loss/{name}": value for name, value in sums.items()} if len(sums) > 1 else {}
        if balanced:
            # A round has its part of the losses, and so of the penalty on the variances.
            terms, present = jnp.stack(list(sums.values())), jnp.stack([share[n] > 0 for n in job.tasks])
            whole = weighting.uncertainty_total(terms, log_variances, present, weights)
            penalty = 0.5 * jnp.where(present, weights * log_variances, 0.0).sum()
            return whole - (1 - 1 / rounds) * penalty, {"loss": total, **parts}
        return total, {"loss": total, **parts}

    def step(state: State, batch: dict[str, Any]) -> tuple[State, dict[str, Any]]:
        batch = augment(batch)
        key = jax.random.key(config.seed)
        for task in job.tasks.values():
            batch = task.prepare(key, batch)
        # Each task's losses are averaged over the examples of the whole batch that have its label.
        counts = {name: jnp.sum(batch[f"{name}/mask"]) for name in job.tasks}
        share = {name: jnp.where(count > 0, 1.0 / jnp.maximum(count, 1), 0.0) for name, count in counts.items()}
        gradient = jax.grad(loss, has_aux=True)
        drop = jax.random.fold_in(jax.random.fold_in(key, _DROPOUT), state.step)
        trained = (state.params, state.balance[0] if balanced else None)
        if rounds == 1:
            (grads, steepness), sums = gradient(trained, batch, share, drop)
        else:
            # Round r takes rows r, r + rounds...: what lies on a device stays there.
            split = {k: v.reshape(-1, rounds, *v.shape[1:]).swapaxes(0, 1) for k, v in batch.items()}

            def add(carry: Any, part: tuple[Any, dict[str, Any]]) -> tuple[Any, None]:
                number, rows = part
                found = gradient(trained, rows, share, jax.random.fold_in(drop, number))
                return jax.tree.map(jnp.add, carry, found), None

            one = jax.tree.map(lambda v: v[0], split)
            zero = jax.tree.map(
                lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradient, trained, one, share, drop)
            )
            ((grads, steepness), sums), _ = jax.lax.scan(add, zero, (jnp.arange(rounds), split))
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p + u, state.params, updates)
        average = state.average
        if average is not None:
            average = optim.ema(average, params, config.optim.ema, state.step)
        balance = state.balance
        if balanced:
            change, moments = optax.adam(rate).update(steepness, balance[1])
            balance = (balance[0] + change, moments)
            sums |= {f"log_variance/{name}": balance[0][i] for i, name in enumerate(job.tasks)}
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
        return State(state.step + 1, params, opt_state, average, balance), {**sums, "grad_norm": norm}

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
            key = jax.random.key(config.seed)
            for task in job.tasks.values():
                batch = task.prepare(key, batch)
            # As in training, deep supervision included; what is random is the same every time.
            outputs: Any = job.model.apply({"params": params}, batch["image"], train=True, rngs={"dropout": key})
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
        return {"loss": float(loss)} | evaluate.quick_scores(self._predictor, params, self._cases)


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
