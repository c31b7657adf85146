"""The training spine, readable top to bottom: data, model, step, report, loop."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from medjax import config as config_lib
from medjax import (
    evaluate,
    faults,
    measures,
    parallel,
    peft,
    pictures,
    pretext,
    processes,
    report,
    runtime,
    tasks,
    transfer,
)  # fmt: skip
from medjax.checkpoint import Checkpoints, Damaged
from medjax.data import pipeline, sampler
from medjax.data.cases import Problem
from medjax.data.unlabelled import NothingLeft
from medjax.errors import Resumable, UserError, warn_once, write_atomic
from medjax.job import Job, fit_tasks, open_job, prepare_sources, steps_of, train_examples
from medjax.logging import Metrics, Progress, duration, say
from medjax.models.model import parameter_count
from medjax.ops import native
from medjax.ops.native.cpus import usable_cpus
from medjax.predict import write_table
from medjax.step import State, abstract_state, divide, make_state, make_train_step, refer, shardings, start_from


class Intervals(NamedTuple):
    """Steps between two log rows, two evaluations, two checkpoints."""

    log: int
    evaluate: int
    checkpoint: int


def train(config: ConfigDict, workdir: Path) -> None:
    """Trains `config` in `workdir`, going on from its newest checkpoint if there is one.

    Raises `Resumable` when it was told to stop and has saved where it is.
    """
    sizes: dict[str, int] = {}
    explained = faults.memory_explained(config.data.batch_size, config.data.patch, config.train.precision, sizes)
    with faults.Preemption() as preemption, explained, contextlib.ExitStack() as stack:
        _train(config, workdir, preemption, stack, sizes)


def _train(
    config: ConfigDict,
    workdir: Path,
    preemption: faults.Preemption,
    stack: contextlib.ExitStack,
    sizes: dict[str, int],
) -> None:
    began = time.perf_counter()
    mesh = parallel.make_mesh(config.mesh)
    parallel.check_mode(config.parallel, mesh)
    parallel.check_batch(config.data.batch_size, config.optim.accumulate, mesh)
    try:
        job = open_job(config)
    except NothingLeft as error:
        say_skipped(error.skipped, error.left, workdir)
        raise
    say_skipped(job.cohort.skipped, len(job.cohort.cases) + len(job.cohort.extra), workdir)
    sampler.check_multiple(config.data.patch, job.model.backbone.total_factor())
    parallel.check_space(config.data.patch, job.model.backbone.total_factor(), mesh)
    every = intervals(config, len(job.splits["train"]))
    if config.train.patience and "val" not in job.splits:
        raise UserError(
            f"config: train.patience={config.train.patience}: there is no 'val' split (data.split), so no score to "
            "wait for; set train.patience=0, or give the cohort one"
        )
    checkpoints = stack.enter_context(Checkpoints(workdir))

    def read(step: int) -> tuple[dict[str, Any], transfer.Start | None, Any]:
        damage = checkpoints.damage("latest", step) if processes.primary() else ""
        # All hear of it before any goes on: reading is done together, and would wait for process 0 for ever.
        if told := processes.gather("files of the checkpoint", damage)[0]:
            raise Damaged(told)
        meta, start = checkpoints.meta("latest", step), None
        if meta.get("base"):
            own = checkpoints.held("latest", step)
            start = transfer.open_start(config, job.model, job.plan.modalities, workdir, meta["base"], own)
        known = dataclasses.replace(job, known=frozenset(start.params if start else ()))
        abstract = abstract_state(config, known, mesh).stored
        checkpoints.check("latest", step, abstract)
        # By the patience of this command: a run that has stopped early goes on with a larger one.
        meta["history"]["stopped"] = out_of_patience(config, meta["history"])
        over = (step >= job.total or meta["history"]["stopped"]) and not meta.get("unevaluated")
        return meta, start, None if over else checkpoints.restore("latest", step, abstract)

    agree = lambda whole: all(processes.gather("reading the checkpoint", whole))  # noqa: E731
    found: tuple[int, Any] | None = checkpoints.first_whole("latest", read, agree)
    state: Any
    newest, meta, start, state = (None, {}, None, None) if found is None else (found[0], *found[1])
    history: dict[str, Any] = meta.get("history", {"best": None, "best_step": None, "stale": 0, "stopped": False})
    first = newest or 0
    if newest is None:
        refuse_merged(checkpoints, workdir)
        start = transfer.open_start(config, job.model, job.plan.modalities, workdir)
    job = dataclasses.replace(job, known=frozenset(start.params if start else ()))
    if newest is not None and state is None:
        early = history["stopped"] and first < job.total
        how = f" (stopped early); it goes on with train.patience above {history['stale']}, or 0" if early else ""
        say(f"{workdir}: already trained to step {first}{how}")
        return

    # Prepared cases and what the tasks learn from them, the step compiled for both, and the state it begins with.
    sources = prepare_sources(config, job)
    job = fit_tasks(config, job, sources["train"])
    measures.learn(config, job.tasks, job.splits["train"], workdir)
    tx, rate, create = make_state(config, job)
    abstract = abstract_state(config, job, mesh)
    if newest is not None:
        for line in config_lib.difference(meta["config"], json.loads(config_lib.to_json(config))):
            say(f"the checkpoint was written with another configuration: {line}")
        if meta["plan"] != job.plan.to_json():
            say("the training cases are not those of the checkpoint: the preprocessing learnt from them differs")
    examples, patch = train_examples(config, job, sources["train"])
    share, shares = parallel.row_share(mesh)
    feed = pipeline.train_batches(
        sources["train"],
        examples,
        patch=patch,
        batch_size=config.data.batch_size,
        first_step=first,
        process=share,
        processes=shares,
        workers=usable_cpus(),
    )
    batches = parallel.prefetch(feed, mesh)
    batch = next(batches)
    step = make_train_step(config, job, tx, mesh)
    compiled = report.compile_step(step, abstract, batch)
    calls = {batch["image"].shape: compiled.call}
    sizes |= {"arguments": compiled.arguments, "temporaries": compiled.temporaries, "outputs": compiled.outputs}
    if newest is None:
        state = jax.jit(create, out_shardings=shardings(abstract))()
        if start:
            state = start_from(start, state)
    base = meta.get("base")
    if start and abstract.base:
        base, state = refer(start, state, abstract, base, workdir)
    if processes.primary():
        write_atomic(workdir / "config.json", config_lib.to_json(config) + "\n")
        counts = divide(config, job, jax.eval_shape(lambda s: s.eval_params, abstract)).count()
        report.write_cost(workdir / "cost.json", compiled, *counts, mesh.devices.size, job.total)
    say_report(config, mesh, job, abstract, compiled, first)
    if start and newest is None:
        say(transfer.table(start, [*peft.flat(state.frozen), *peft.flat(state.base)]))
    metrics = Metrics(workdir, first, config)
    validation = Validation(config, job, sources["val"], mesh) if "val" in sources else None

    def case_ids(number: int) -> list[str]:
        rows = range((number - 1) * config.data.batch_size, number * config.data.batch_size)
        return [job.splits["train"][examples.draw(row)[0]].id for row in rows]

    nonfinite = faults.Nonfinite(config.train.nan_limit, workdir, case_ids, history.get("skipped", 0))
    watchdog = stack.enter_context(faults.Watchdog(config.train.stall_seconds, workdir))

    def save(kind: str, number: int, **more: Any) -> None:
        about = {"step": number, "config": json.loads(config_lib.to_json(config)), "plan": job.plan.to_json()}
        past = history | ({"skipped": nonfinite.total} if nonfinite.total else {})
        about |= {"labels": dict(job.cohort.labels), "history": past, **more} | ({"base": base} if base else {})
        checkpoints.save(kind, number, state.stored, about)

    def evaluate_now(number: int) -> None:
        """Scores the state, keeps the best; `Preempted` if there is no time left for it."""
        assert validation is not None
        scores = validation(state.eval_params, preemption.reached, watchdog)
        metrics.write(number, {f"val/{k}": v for k, v in scores.items()})
        for name, picture in validation.draw(state.eval_params, workdir / "pretext", number).items():
            metrics.image(number, name, picture)
        if (score := scores.get("score")) is None:
            warn_once(
                "no validation case has a label (data.split), so checkpoints cannot be compared: the newest stands for "
                "the best"
            )
            save("best", number)
            return
        if history["best"] is None or score > history["best"]:
            history.update({"best": score, "best_step": number, "stale": 0})
            save("best", number)
        else:
            history["stale"] += 1
        history["stopped"] = out_of_patience(config, history)

    def stop(number: int) -> NoReturn:
        """Told to stop: what has been saved is complete before the process ends."""
        checkpoints.close()
        metrics.close()
        if processes.primary():
            draw_curves(workdir)
        raise Resumable(
            f"told to stop: step {number} of {job.total} is saved in {workdir / 'checkpoints'}; the same command goes "
            "on from there"
        )

    # The loop.
    preemption.graceful = True
    if meta.get("unevaluated"):  # there was no time to, when this step was saved
        try:
            evaluate_now(first)
        except faults.Preempted:
            stop(first)
        if first >= job.total or history["stopped"]:
            save("latest", first)
    progress, clock, text = Progress("step", job.total), Clock(), ""
    rate = jax.jit(rate)  # one call a log row, not one for each of its operations
    for number in range(first + 1, job.total + 1):
        if history["stopped"]:
            break
        if batch["image"].shape not in calls:  # the first of its bucket
            with watchdog.unwatched():
                calls[batch["image"].shape] = report.compile_step(step, abstract, batch).call
        state, sums = calls[batch["image"].shape](state, batch)
        last = number == job.total
        if not last:
            watchdog.doing(f"the data of step {number + 1}")
            with clock.waiting():
                batch = next(batches)
        watchdog.doing(f"step {number}")
        # One step in flight at most: the host must not run ahead of the device.
        jax.block_until_ready(sums)
        nonfinite.step(number, bool(sums.pop("skipped")), sums)
        clock.steps += 1
        if number % every.log == 0 or last:
            values = {k: float(v) for k, v in jax.device_get(sums).items()}
            steps, seconds, waited = clock.lap()
            speed = {"patches_per_s": steps * config.data.batch_size / seconds, "waiting": waited / seconds}
            values |= {"lr": float(rate(number - 1)), **speed}
            values |= {"skipped": nonfinite.total} if nonfinite.total else {}
            metrics.write(number, {f"train/{k}": v for k, v in values.items()})
            text = f"loss {values['loss']:.4f}  {speed['patches_per_s']:.2f} patches/s  waiting {speed['waiting']:.1%}"
        best = "" if history["best"] is None else f"  best val score {history['best']:.4f}"
        progress.update(number, text + best)
        if validation and (number % every.evaluate == 0 or last):
            try:
                evaluate_now(number)
            except faults.Preempted:
                save("latest", number, unevaluated=True)
                stop(number)
            clock.lap()
        told = preemption.reached()
        if number % every.checkpoint == 0 or last or history["stopped"] or told:
            save("latest", number)
        if told:
            stop(number)
        if history["stopped"]:
            break
    progress.close()
    batches.close()
    checkpoints.close()
    metrics.close()
    if processes.primary():
        draw_curves(workdir)
    early = " (stopped early)" if history["stopped"] else ""
    best = "" if history["best"] is None else f", best validation score {history['best']:.4f} at {history['best_step']}"
    say(f"trained to step {int(state.step)}{early} in {duration(time.perf_counter() - began)}{best}")


def refuse_merged(checkpoints: Checkpoints, workdir: Path) -> None:
    """Raises UserError if the folder holds what `medjax.merge` wrote: a training would begin anew beside it.

    A best checkpoint without a latest one is no sign of that: so is a run that was killed before its first.
    """
    best = checkpoints.newest("best")
    if best is not None and (run := checkpoints.meta("best", best).get("merged")):
        raise UserError(
            f"{workdir}: holds the weights of {run}, merged by medjax.merge, and no training that could go on; train "
            f"in another --workdir, or begin from them there with --config.init.source={workdir}"
        )


def intervals(config: ConfigDict, n_examples: int) -> Intervals:
    """The intervals of `config.train`; each at least one step."""
    keys = ("train.log_every", "train.eval_every", "train.checkpoint_every")
    found = [steps_of(config, key, n_examples) for key in keys]
    for key, steps in zip(keys, found, strict=True):
        if steps < 1:
            raise UserError(f"config: '{key}' must be at least one step")
    return Intervals(*found)


def out_of_patience(config: ConfigDict, history: Mapping[str, Any]) -> bool:
    """Whether `train.patience` evaluations have gone by without a better score."""
    return 0 < config.train.patience <= history["stale"]


class Validation:
    """Scores while training: loss on one fixed patch a case, and Dice of whole cases on the prepared grid."""

    def __init__(self, config: ConfigDict, job: Job, source: pipeline.Source, mesh: Mesh) -> None:
        self._source, self._tasks, self._mesh = source, job.tasks, mesh
        self._batches = {"patch": tuple(config.data.patch), "batch_size": config.data.batch_size}
        self._cases = source.cases[: config.train.eval_cases or None]
        shapes = [case.image.shape[:3] for case in self._cases]
        # Of several processes each scores a part of the cases, on its own devices.
        self._group, self._share = parallel.group_mesh(mesh), parallel.row_share(mesh)
        self._predictor = evaluate.Predictor(config, job.model, job.tasks, shapes, self._group)
        own = tasks.self_supervised(job.tasks)
        self._examiner = pretext.Examiner(config, job.model, own) if own else None
        if self._examiner:
            for number, case in enumerate(self._cases):
                self._examiner.add(case, number, number, number)

        def losses(params: Any, batch: dict[str, Any]) -> dict[str, Any]:
            params, batch = parallel.whole(params, mesh), parallel.spread(batch, mesh)
            key = jax.random.key(config.seed)
            for task in job.tasks.values():
                batch = task.prepare(key, batch)
            # As in training, deep supervision included; what is random is the same every time.
            views = tasks.views(job.tasks, batch)
            with native.divisible(mesh.shape["space"]):
                outputs: Any = job.model.apply(
                    {"params": params}, batch["image"], train=True, views=views, rngs={"dropout": key}
                )
            sums = {}
            for name, task in job.tasks.items():
                mask = batch[f"{name}/mask"]
                sums[name] = (jnp.sum(jnp.where(mask, task.loss(outputs[name], batch), 0.0)), jnp.sum(mask))
            return sums

        self._losses = jax.jit(losses)

    def __call__(self, params: Any, stop: Callable[[], bool], watchdog: faults.Watchdog) -> dict[str, float]:
        """Scores of the parameters; `stop` and the watchdog hear of each case."""
        index, shares = self._share
        totals = {name: np.zeros(2) for name in self._tasks}
        for batch in pipeline.center_batches(self._source, **self._batches, process=index, processes=shares):
            watchdog.doing("validation")
            sums = jax.device_get(self._losses(params, parallel.put_batch(batch, self._mesh)))
            for name, pair in sums.items():
                totals[name] += np.asarray(pair)
        loss = sum(task.weight * totals[name][0] / max(totals[name][1], 1) for name, task in self._tasks.items())
        params = parallel.onto(params, self._mesh, self._group)

        def asked() -> bool:
            watchdog.doing("validation")
            return stop()

        leads = parallel.leads_share(self._mesh)
        return {"loss": float(loss)} | evaluate.quick_scores(
            self._predictor, params, self._cases, self._share, asked, leads, self._examiner
        )

    def draw(self, params: Any, folder: Path, step: int) -> dict[str, np.ndarray]:
        """Pictures of what self-supervised tasks have learnt: files in `folder`, and name -> uint8 [H, W, 3]."""
        if not self._examiner:
            return {}
        params = parallel.onto(params, self._mesh, self._group)
        return self._examiner.draw(params, folder if processes.primary() else None, step)


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


def say_skipped(skipped: Sequence[Problem], left: int, workdir: Path) -> None:
    """The cases that were left out for what is wrong with them, at the terminal and in `skipped.csv`.

    Args:
      left: how many were not.
    """
    if not skipped or not processes.primary():
        return
    rows = [{"case": p.case, "file": p.file, "reason": p.message} for p in skipped]
    write_table(rows, workdir / "skipped.csv")
    say(f"skipped     {len(rows)} of {len(rows) + left} cases ({workdir / 'skipped.csv'}):")
    for row in rows:
        say(f"  {row['case']}: {row['reason']}" if row["case"] else f"  {row['reason']}")


def say_report(config: ConfigDict, mesh: Mesh, job: Job, state: State, compiled: report.Compiled, first: int) -> None:
    """What will run, and what it costs, before it runs."""
    cases = ", ".join(f"{len(v)} {k}" for k, v in job.splits.items())
    patch = "×".join(map(str, config.data.patch))
    arguments, temporaries = report.human(compiled.arguments, "B"), report.human(compiled.temporaries, "B")
    say(f"run         {config.name}: {cases} cases, patch {patch}, batch {config.data.batch_size}")
    device = f"{mesh.devices.size} × {jax.devices()[0].device_kind}"
    if processes.count() > 1:
        device += f" of {processes.count()} processes"
    if mesh.size > mesh.shape["data"]:
        device += f" as {' × '.join(f'{size} {axis}' for axis, size in mesh.shape.items() if size > 1)}"
    say(f"device      {device}, {config.train.precision}, steps {first}..{job.total}")
    params = jax.eval_shape(lambda s: s.eval_params, state)
    say(
        f"model       {config.model.name}, {report.human(parameter_count(params), '')} parameters, tasks: "
        f"{', '.join(job.tasks)}"
    )
    if state.frozen or state.base:
        say(f"trains      {divide(config, job, params).describe()}")
    say(
        f"step        {report.human(compiled.flops, 'FLOP')}, compiled in {compiled.seconds:.1f} s, "
        f"{report.human(compiled.peak, 'B')} a device (arguments {arguments}, temporaries {temporaries})"
    )
    say(f"convolution {native.status()}")
    say(f"memory      {runtime.describe()}")
