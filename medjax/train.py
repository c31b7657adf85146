"""The training spine, readable top to bottom: data, model, step, report, loop."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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
from medjax.data import dataset, pipeline, preprocess, sampler
from medjax.errors import UserError, write_atomic
from medjax.logging import Metrics, Progress, duration, say
from medjax.models.model import Model, build_model, parameter_count
from medjax.ops import native


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


def train(config: ConfigDict, workdir: Path) -> None:
    """Trains `config` in `workdir`, going on from its newest checkpoint if there is one."""
    began = time.perf_counter()
    mesh = parallel.make_mesh(config.mesh)
    parallel.check_batch(config.data.batch_size, config.optim.accumulate, mesh)

    # Data: cohort, splits, plan, prepared cases.
    cohort = dataset.open_cohort(config.data, next(iter(config.tasks), ""))
    splits = dataset.open_splits(cohort, config.data, config.seed)
    if "train" not in splits:
        raise UserError(
            f"config: data.split gives no 'train' split for cohort '{cohort.name}'; it gives {list(splits)}"
        )
    plan = preprocess.fit(config.data.preprocess, cohort, splits["train"])
    job = tasks.build(config.tasks, cohort.labels)
    model = build_model(config, job)
    total = steps_of(config, "train.total", len(splits["train"]))
    sources = {}
    for name in ("train", "val"):
        if name in splits:
            progress = Progress(f"preparing {name} cases", len(splits[name]))
            cases = dataset.prepare(plan, splits[name], workers=config.data.workers, progress=progress.update)
            progress.close()
            sources[name] = pipeline.Source(cases, tuple(job))
    patch = tuple(config.data.patch)
    sampler.check_patch(patch, [c.image.shape[:3] for c in sources["train"].cases], model.backbone.total_factor())
    check_targets(job, sources["train"])

    # State, step and their compilation.
    tx, rate, create = make_state(config, model, total, len(splits["train"]), patch, len(plan.modalities))
    everywhere = parallel.replicated(mesh)
    shapes = jax.eval_shape(create)
    step = make_train_step(config, model, job, tx, mesh)
    feed = sampler.Sampler(config.seed, len(splits["train"]), config.data.foreground)
    processes = {"process": jax.process_index(), "processes": jax.process_count()}
    shape = {"patch": patch, "batch_size": config.data.batch_size, **processes}
    abstract = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=everywhere), shapes)
    example = next(pipeline.train_batches(sources["train"], feed, **shape))
    compiled = report.compile_step(step, abstract, parallel.put_batch(example, mesh))

    # Resume, or begin.
    checkpoints = Checkpoints(workdir)
    newest = checkpoints.newest("latest")
    history: dict[str, Any] = {"best": None, "best_step": None, "stale": 0, "stopped": False}
    if newest is None:
        state = jax.jit(create, out_shardings=everywhere)()
        first = 0
    else:
        meta = checkpoints.meta("latest", newest)
        for line in config_lib.difference(meta["config"], json.loads(config_lib.to_json(config))):
            say(f"resumed with another configuration than before: {line}")
        state = checkpoints.restore("latest", newest, abstract)
        history = meta["history"]
        first = newest
    write_config(workdir, config)
    say_report(config, mesh, model, shapes, compiled, splits, total, first)
    metrics = Metrics(workdir, first, config)
    validation = Validation(config, model, job, plan, sources["val"], mesh) if "val" in sources else None

    def save(kind: str, step_number: int) -> None:
        meta = {
            "step": step_number,
            "config": json.loads(config_lib.to_json(config)),
            "plan": plan.to_json(),
            "labels": dict(cohort.labels),
            "history": history,
        }
        checkpoints.save(kind, step_number, state, meta)

    # The loop.
    every = {
        k: steps_of(config, f"train.{k}", len(splits["train"])) for k in ("log_every", "checkpoint_every", "eval_every")
    }
    if any(v < 1 for v in every.values()):
        raise UserError("config: train.log_every, checkpoint_every and eval_every must be at least one step")
    batches = parallel.prefetch(
        pipeline.train_batches(sources["train"], feed, first_step=first, **shape, workers=dataset.usable_cpus()), mesh
    )
    progress = Progress("step", total)
    clock = Clock()
    text = ""
    for number in range(first + 1, total + 1):
        if history["stopped"]:
            break
        with clock.waiting():
            batch = next(batches)
        state, sums = compiled.call(state, batch)
        if number % every["log_every"] == 0 or number == total:
            values = {k: float(v) for k, v in jax.device_get(sums).items()}
            seconds, waited = clock.lap()
            count = number - max(first, (number - 1) // every["log_every"] * every["log_every"])
            speed = {"patches_per_s": count * config.data.batch_size / seconds, "waiting": waited / seconds}
            values = {**values, "lr": float(rate(number - 1))}
            metrics.write(number, {f"train/{k}": v for k, v in {**values, **speed}.items()})
            if not math.isfinite(values["loss"]):
                raise UserError(
                    f"training: the loss is not finite at step {number}; lower optim.lr, or train in float32 "
                    f"(train.precision). The newest checkpoint in {workdir / 'checkpoints'} is from before."
                )
            text = (
                f"loss {values['loss']:.4f}  {speed['patches_per_s']:.2f} patches/s  waiting {speed['waiting']:.1%}"
                + (f"  best val Dice {history['best']:.4f}" if history["best"] is not None else "")
            )
        else:
            # One step in flight at most: the host must not run ahead of the device.
            jax.block_until_ready(sums)
        progress.update(number, text)
        last = number == total
        if validation and (number % every["eval_every"] == 0 or last):
            scores = validation(state.eval_params)
            metrics.write(number, {f"val/{k}": v for k, v in scores.items()})
            improved = history["best"] is None or scores["dice"] > history["best"]
            if improved:
                history.update(best=scores["dice"], best_step=number, stale=0)
                save("best", number)
            else:
                history["stale"] += 1
            patience = config.train.patience
            history["stopped"] = bool(patience) and history["stale"] >= patience
            clock.lap()
        if number % every["checkpoint_every"] == 0 or last or history["stopped"]:
            save("latest", number)
            clock.lap()
    progress.close()
    batches.close()  # type: ignore[attr-defined]
    checkpoints.close()
    metrics.close()
    draw_curves(workdir)
    done = int(state.step)
    best = (
        ""
        if history["best"] is None
        else (f", best validation Dice {history['best']:.4f} at step {history['best_step']}")
    )
    early = " (stopped early)" if history["stopped"] else ""
    say(f"trained to step {done}{early} in {duration(time.perf_counter() - began)}{best}")


def steps_of(config: ConfigDict, key: str, n_examples: int) -> int:
    """The duration at `key` in optimizer steps."""
    value: Any = config
    for part in key.split("."):
        value = value[part]
    return config_lib.steps(value, batch_size=config.data.batch_size, n_examples=n_examples, key=key)


def check_targets(job: Mapping[str, tasks.Task], source: pipeline.Source) -> None:
    """Raises UserError for a task none of the training cases has a target for."""
    for name in job:
        if not any(name in case.targets for case in source.cases):
            raise UserError(
                f"task '{name}': no training case has a target of that name; targets there: "
                f"{', '.join(sorted({t for c in source.cases for t in c.targets})) or 'none'}"
            )


def make_state(
    config: ConfigDict, model: Model, total: int, n_examples: int, patch: tuple[int, ...], channels: int
) -> tuple[Any, Callable, Callable[[], State]]:
    """The optimizer, its schedule, and the function that makes the first state from the seed."""

    def parameters() -> Any:
        x = jnp.zeros((1, *patch, channels), jnp.float32)
        return model.init(jax.random.key(config.seed), x, train=True)["params"]

    warmup = steps_of(config, "optim.warmup", n_examples)
    tx, rate = optim.build(config.optim, jax.eval_shape(parameters), total, warmup)

    def create() -> State:
        params = parameters()
        return State(jnp.zeros((), jnp.int32), params, tx.init(params), params if config.optim.ema else None)

    return tx, rate, create


def make_train_step(
    config: ConfigDict, model: Model, job: Mapping[str, tasks.Task], tx: Any, mesh: Mesh
) -> Callable[[State, dict[str, Any]], tuple[State, dict[str, Any]]]:
    """The jitted step: augment, forward, masked losses, gradients over `optim.accumulate` rounds, update."""
    rounds = config.optim.accumulate
    augment = policy.build(config.augment, tuple(job), config.seed)
    rows = PartitionSpec("data")
    augment = jax.shard_map(augment, mesh=mesh, in_specs=rows, out_specs=rows)

    def loss(params: Any, batch: dict[str, Any], share: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        outputs: Any = model.apply({"params": params}, batch["image"], train=True)
        total, sums = 0.0, {}
        for name, task in job.items():
            # `where`, not a product: an example without a label must not bring in a NaN.
            losses = jnp.where(batch[f"{name}/mask"], task.loss(outputs[name], batch), 0.0)
            sums[name] = jnp.sum(losses) * share[name]
            total += task.weight * sums[name]
        return total, {"loss": total, **{f"loss/{k}": v for k, v in sums.items()}}

    def step(state: State, batch: dict[str, Any]) -> tuple[State, dict[str, Any]]:
        batch = augment(batch)
        key = jax.random.key(config.seed)
        for task in job.values():
            batch = task.prepare(key, batch)
        # Each task's losses are averaged over the examples of the whole batch that have its label.
        share = {name: 1.0 / jnp.maximum(jnp.sum(batch[f"{name}/mask"]), 1) for name in job}
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

    def __init__(
        self, config: ConfigDict, model: Model, job: Mapping[str, Any], plan: Any, source: pipeline.Source, mesh: Mesh
    ) -> None:
        self._source, self._job, self._mesh = source, job, mesh
        self._batches = {"patch": tuple(config.data.patch), "batch_size": config.data.batch_size}
        self._cases = source.cases[: config.train.eval_cases or None]
        self._predictor = evaluate.Predictor(config, model, job, [c.image.shape[:3] for c in self._cases])

        def losses(params: Any, batch: dict[str, Any]) -> dict[str, Any]:
            for task in job.values():
                batch = task.prepare(jax.random.key(config.seed), batch)
            outputs: Any = model.apply({"params": params}, batch["image"], train=True)
            sums = {}
            for name, task in job.items():
                mask = batch[f"{name}/mask"]
                sums[name] = (jnp.sum(jnp.where(mask, task.loss(outputs[name], batch), 0.0)), jnp.sum(mask))
            return sums

        self._losses = jax.jit(losses)

    def __call__(self, params: Any) -> dict[str, float]:
        totals: dict[str, np.ndarray] = {name: np.zeros(2) for name in self._job}
        for batch in pipeline.center_batches(self._source, **self._batches):
            sums = jax.device_get(self._losses(params, parallel.put_batch(batch, self._mesh)))
            for name, pair in sums.items():
                totals[name] += np.asarray(pair)
        scores = {"loss": float(sum(t.weight * totals[n][0] / max(totals[n][1], 1) for n, t in self._job.items()))}
        return scores | evaluate.quick_dice(self._predictor, params, self._cases)


class Clock:
    """Seconds since the last lap, and how many of them were spent waiting for data."""

    def __init__(self) -> None:
        self._began, self._waited = time.perf_counter(), 0.0

    def waiting(self) -> Clock:
        return self

    def __enter__(self) -> None:
        self._entered = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._waited += time.perf_counter() - self._entered

    def lap(self) -> tuple[float, float]:
        """(seconds, of them waiting) since the last lap; starts the next."""
        now = time.perf_counter()
        seconds, waited = now - self._began, self._waited
        self._began, self._waited = now, 0.0
        return seconds, waited


def draw_curves(workdir: Path) -> None:
    """Losses and scores over the steps, as `curves.png` beside the run."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    if any(k.endswith("loss") and v is not None for row in rows for k, v in row.items()):
        pictures.curves(rows, workdir / "curves.png", title=workdir.name)


def write_config(workdir: Path, config: ConfigDict) -> None:
    """The resolved configuration beside the run."""
    write_atomic(workdir / "config.json", config_lib.to_json(config) + "\n")


def say_report(
    config: ConfigDict,
    mesh: Mesh,
    model: Model,
    shapes: State,
    compiled: report.Compiled,
    splits: Mapping[str, Any],
    total: int,
    first: int,
) -> None:
    """What will run, and what it costs, before it runs."""
    cases = ", ".join(f"{len(v)} {k}" for k, v in splits.items())
    kind = f"{mesh.devices.size} × {jax.devices()[0].device_kind}"
    say(
        f"run         {config.name}: {cases} cases, patch {'×'.join(map(str, config.data.patch))}, "
        f"batch {config.data.batch_size}, steps {first}..{total}, {config.train.precision}, {kind}"
    )
    say(
        f"model       {config.model.name}, {report.human(parameter_count(shapes.params), '')} parameters, tasks: "
        f"{', '.join(config.tasks)}"
    )
    say(
        f"step        {report.human(compiled.flops, 'FLOP')}, compiled in {compiled.seconds:.1f} s, "
        f"{report.human(compiled.peak, 'B')} a device: arguments {report.human(compiled.arguments, 'B')}, temporaries "
        f"{report.human(compiled.temporaries, 'B')}"
    )
    say(f"convolution {native.status()}")
    say(f"memory      {runtime.describe()}")
