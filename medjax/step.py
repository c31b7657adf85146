"""The train step: augment, forward, masked losses, gradients, update; and the state it changes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from medjax import balance as balancing
from medjax import config as config_lib
from medjax import optim, parallel, peft, tasks, transfer
from medjax import semi as semi_lib
from medjax.augment import policy
from medjax.job import Job, steps_of
from medjax.ops import native

# Streams of the run's key: of dropout, of the second network's first parameters, of the first factors of `medjax.peft`.
_DROPOUT, _TWIN, _FACTORS = 1, 2, 3


@flax.struct.dataclass
class State:
    """What training changes.

    Attributes:
      average: average of the parameters over the steps (`medjax.optim.averaging`), or None.
      balance: what the rule by which several tasks are weighed has learnt (`medjax.balance`), or None.
      twin: of cross pseudo supervision: (the second network's parameters, their optimizer's state); else None.
      frozen: parameters that do not train, or None; `params` then lacks them. base: those that checkpoints leave out
        and refer to, or None (`medjax.peft`).
    """

    step: Any
    params: Any
    opt_state: Any
    average: Any
    balance: Any = None
    twin: Any = None
    frozen: Any = None
    base: Any = None

    @property
    def eval_params(self) -> Any:
        """The parameters to evaluate, as the network takes them: the averaged ones where there are any."""
        return peft.combine(self.params if self.average is None else self.average, self.frozen, self.base)

    @property
    def stored(self) -> State:
        """What a checkpoint holds."""
        return self.replace(base=None)  # type: ignore[attr-defined]


def make_state(config: ConfigDict, job: Job) -> tuple[Any, Callable, Callable[[], State]]:
    """The optimizer, its schedule, and the function that makes the first state from the seed."""
    shape = (1, *config.data.patch, len(job.plan.modalities))

    def parameters(twin: bool = False) -> Any:
        key = jax.random.key(config.seed)
        key = jax.random.fold_in(key, _TWIN) if twin else key
        return job.model.init(key, jnp.zeros(shape, jnp.float32), train=True)["params"]

    def duration(text: str, key: str) -> int:
        return config_lib.steps(text, batch_size=config.data.batch_size, n_examples=len(job.splits["train"]), key=key)

    shapes = jax.eval_shape(parameters)
    division = divide(config, job, shapes)

    def divided(twin: bool = False) -> tuple[Any, Any, Any]:
        return division.split(parameters(twin), jax.random.fold_in(jax.random.key(config.seed), _FACTORS + twin))

    scales, begins = peft.by_depth(config, division, duration)
    warmup = duration(config.optim.warmup, "optim.warmup")
    tx, rate = optim.build(
        config.optim, jax.eval_shape(divided)[0], job.total, warmup, known=division.everything(), scales=scales,
        begins=begins, factors=division.bases,
    )  # fmt: skip

    balance = balancing.build(config, job.tasks, rate)
    averages = averaging(config, job) is not None

    def create() -> State:
        params, frozen, base = divided()
        average = params if averages else None
        twin = None
        if config.semi.method == "cps":
            second = divided(twin=True)[0]
            twin = (second, tx.init(second))
        return State(jnp.zeros((), jnp.int32), params, tx.init(params), average, balance.create(), twin, frozen, base)

    return tx, rate, create


def divide(config: ConfigDict, job: Job, params: Any) -> peft.Division:
    """Which parameters train, from the tree of them all (arrays or shapes)."""
    return peft.divide(config, {path: tuple(leaf.shape) for path, leaf in peft.flat(params).items()}).referring(
        job.known
    )


def start_from(start: transfer.Start, state: State) -> State:
    """The first state with the weights of `config.init` in place of random ones."""
    names = ("params", "average", "frozen", "base")
    parts = {name: transfer.fill(getattr(state, name), start.params) for name in names}
    if state.twin is not None:
        # Its heads stay at random: two networks that are the same teach each other nothing.
        shared = {path: array for path, array in start.params.items() if path.startswith("backbone/")}
        parts["twin"] = (transfer.fill(state.twin[0], shared), state.twin[1])
    return state.replace(**parts)  # type: ignore[attr-defined]


def refer(
    start: transfer.Start, state: State, abstract: State, reference: Any, folder: Path
) -> tuple[dict[str, Any], State]:
    """The reference that checkpoints have instead of the parameters they leave out, and the state with those.

    Args:
      reference: of the checkpoint the run goes on from; it must fit. None: the run begins. folder: of the run.
    """
    paths = list(peft.flat(abstract.base))
    if reference:
        start.verify(reference, paths, folder)
    base = transfer.fill(abstract.base, start.params)
    here = start.reference(paths, folder)
    if reference and reference["beside"] == here["beside"]:
        here = reference  # not moved, or the run with it: called as it was
    return here, state.replace(base=base)  # type: ignore[attr-defined]


def averaging(config: ConfigDict, job: Job) -> Callable[[Any, Any, Any], Any] | None:
    """`medjax.optim.averaging` of the run, of which the teacher of `config.semi` may be one."""
    swa, n = config.optim.swa, len(job.splits["train"])
    start, interval = (steps_of(config, f"optim.swa.{k}", n) if swa.start else 0 for k in ("start", "interval"))
    return optim.averaging(semi_lib.average_decay(config), swa, job.total, start, interval)


def make_semi(config: ConfigDict, job: Job, consecutive: bool) -> semi_lib.Semi | None:
    """What `config.semi` adds to the step; None where nothing is asked for. consecutive: see `medjax.semi.Semi`."""
    if not config.semi.method:
        return None
    train = job.splits["train"]
    rampup = steps_of(config, "semi.rampup", len(train))
    return semi_lib.Semi(config, job.tasks, rampup, [tuple(case.targets) for case in train], consecutive)


def abstract_state(config: ConfigDict, job: Job, mesh: Mesh) -> State:
    """The state's shapes and types, and where `config.mesh_rules` lay it on the mesh."""
    shapes = jax.eval_shape(make_state(config, job)[2])
    params = peft.nest(peft.flat(shapes.params) | peft.flat(shapes.frozen) | peft.flat(shapes.base))
    laid = parallel.state_shardings(shapes, params, config.mesh_rules, mesh)
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, laid)


def shardings(abstract: State) -> State:
    """Where the arrays of an abstract state lie."""
    return jax.tree.map(lambda s: s.sharding, abstract)


def _norm(gradients: Any) -> Any:
    return jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients)))


def ruled(config: ConfigDict) -> bool:
    """Whether `config.mesh_rules` may split a parameter over another axis than fsdp."""
    return any(place not in ("fsdp", "replicate") for _, place in config.mesh_rules)


def make_train_step(
    config: ConfigDict, job: Job, tx: Any, mesh: Mesh
) -> Callable[[State, dict[str, Any]], tuple[State, dict[str, Any]]]:
    """The jitted step: augment, forward, masked losses, gradients over `optim.accumulate` rounds, update.

    An update whose loss or gradient is not finite is not made; the sums then have 'skipped' True.
    """
    parallel.check_mode(config.parallel, mesh)
    # One program for all devices that the compiler divides, or one a device that sums over the others where it must.
    mapped = config.parallel == "pmap"
    rounds = config.optim.accumulate
    augment = policy.build(config.augment, tuple(job.tasks), config.seed)
    if not mapped:
        augment = jax.shard_map(augment, mesh=mesh, in_specs=parallel.ROWS, out_specs=parallel.ROWS)

    def over_devices(tree: Any) -> Any:
        return jax.lax.psum(tree, parallel.AXES) if mapped else tree

    def laid(batch: Mapping[str, Any]) -> dict[str, Any]:
        return dict(batch) if mapped else parallel.spread(batch, mesh)

    rate = optim.schedule(config.optim, job.total, steps_of(config, "optim.warmup", len(job.splits["train"])))
    cuts = rounds * (mesh.size if mapped else 1)  # of a batch, each with its part of the losses
    balance, follow = balancing.build(config, job.tasks, rate, cuts), averaging(config, job)
    # A round takes every n-th row, and what the compiler divides lies on several devices.
    semi = make_semi(config, job, consecutive=rounds == 1 and (mapped or mesh.size == 1))

    def network(
        still: Sequence[Any],
        params: Any,
        image: Any,
        key: Any,
        train: bool = True,
        views: Any = None,
        probes: Any = None,
    ) -> Any:
        variables = {"params": peft.combine(params, *still)}
        options: dict[str, Any] = {"train": train, "views": views, "probes": probes, "rngs": {"dropout": key}}
        with native.divisible(mesh.shape["space"]):
            return job.model.apply(variables, image, **options)

    def supervised(outputs: Any, batch: dict[str, Any], share: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        total, sums = 0.0, {}
        for name, task in job.tasks.items():
            # `where`, not a product: an example without a label must not bring in a NaN.
            losses = jnp.where(batch[f"{name}/mask"], task.loss(outputs[name], batch), 0.0)
            sums[name] = jnp.sum(losses) * share[name]
            total += task.weight * sums[name]
        return total, sums

    def loss(
        trained: tuple[Any, ...], others: tuple[Any, ...], batch: dict[str, Any], share: Mapping[str, Any], key: Any,
        number: Any,
    ) -> tuple[Any, dict[str, Any]]:  # fmt: skip
        (params, knobs, second), (teacher, *still) = trained, others
        forward = functools.partial(network, still)
        views = tasks.views(job.tasks, batch)
        outputs = forward(params, batch["image"], key, views=views, probes=balance.probes(knobs))
        total, sums = supervised(outputs, batch, share)
        parts = {f"loss/{name}": value for name, value in sums.items()} if len(sums) > 1 else {}
        whole = balance.total(knobs, sums, share, total)
        if semi:
            extra: Any = 0.0
            other = params if teacher is None else teacher
            if second is not None:
                other = forward(second, batch["image"], jax.random.fold_in(key, _TWIN), views=views)
                extra += supervised(other, batch, share)[0]
            more, found = semi.loss(forward, outputs, other, batch, share, key, number)
            extra, parts = extra + more, parts | found
            total, whole = total + extra, whole + extra
        return whole, {"loss": total, **parts}

    def step(state: State, batch: dict[str, Any]) -> tuple[State, dict[str, Any]]:
        batch = laid(augment(batch))
        key = jax.random.key(config.seed)
        for task in job.tasks.values():
            batch = task.prepare(key, batch)
        # Each task's losses are averaged over the examples of the whole batch that have its label.
        counts = {name: jnp.sum(batch[f"{name}/mask"]) for name in job.tasks}
        if semi:
            views = semi.views
            if not mapped:
                views = jax.shard_map(views, mesh=mesh, in_specs=parallel.ROWS, out_specs=parallel.ROWS)
            batch = laid(views(batch))
            counts |= {name: jnp.sum(batch[name]) for name in semi.masks}
        counts = over_devices(counts)
        share = {name: jnp.where(count > 0, 1.0 / jnp.maximum(count, 1), 0.0) for name, count in counts.items()}
        # Only a teacher that is an average is not the student itself.
        others = (state.average if config.semi.method == "mean_teacher" else None, state.frozen, state.base)
        if not mapped:
            others = parallel.whole(others, mesh)

        def gradient(trained: Any, batch: dict[str, Any], key: Any) -> Any:
            return jax.grad(loss, has_aux=True)(trained, others, batch, share, key, state.step)

        drop = jax.random.fold_in(jax.random.fold_in(key, _DROPOUT), state.step)
        if mapped and mesh.size > 1:
            drop = jax.random.fold_in(drop, jax.lax.axis_index(parallel.AXES))
        held = (state.params, balance.knobs(state.balance), state.twin[0] if state.twin else None)
        trained = held if mapped else parallel.whole(held, mesh)
        if rounds == 1:
            (grads, slopes, second), sums = gradient(trained, batch, drop)
        else:
            # Round r takes rows r, r + rounds...: what lies on a device stays there.
            split = {k: v.reshape(-1, rounds, *v.shape[1:]).swapaxes(0, 1) for k, v in batch.items()}

            def add(carry: Any, part: tuple[Any, dict[str, Any]]) -> tuple[Any, None]:
                number, rows = part
                found = gradient(trained, laid(rows), jax.random.fold_in(drop, number))
                return jax.tree.map(jnp.add, carry, found), None

            one = jax.tree.map(lambda v: v[0], split)
            zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradient, trained, one, drop))
            ((grads, slopes, second), sums), _ = jax.lax.scan(add, zero, (jnp.arange(rounds), split))
        (grads, slopes, second), sums = over_devices(((grads, slopes, second), sums))
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p + u, state.params, updates)
        average = state.average
        if follow:
            average = follow(average, params, state.step)
        each = {name: sums.get(f"loss/{name}") for name in job.tasks}
        weighed, values = balance.update(state.balance, slopes, each, share)
        twin = state.twin
        if twin is not None:
            change, moments = tx.update(second, twin[1], twin[0])
            twin = (jax.tree.map(jnp.add, twin[0], change), moments)
        if semi:
            values["semi/ramp"] = semi.ramp(state.step)
        norm = _norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(sums["loss"])
        if twin is not None:  # which learns from a gradient of its own
            finite &= jnp.isfinite(_norm(second))
        changed = {"params": params, "opt_state": opt_state, "average": average, "balance": weighed, "twin": twin}
        made = state.replace(**changed)  # type: ignore[attr-defined]
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), made, state)
        return kept.replace(step=state.step + 1), {**sums, **values, "grad_norm": norm, "skipped": ~finite}

    everywhere = parallel.replicated(mesh)
    if mapped:
        # What jax.pmap is made of since JAX 0.8, over arrays that several processes share.
        step = jax.shard_map(
            step, mesh=mesh, in_specs=(PartitionSpec(), parallel.ROWS), out_specs=PartitionSpec(), check_vma=False
        )
    where = (
        everywhere if mesh.shape["fsdp"] == 1 and not ruled(config) else shardings(abstract_state(config, job, mesh))
    )
    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(where, parallel.batch_sharding(mesh)),
        out_shardings=(where, everywhere),
    )
