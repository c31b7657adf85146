"""The train step: augment, forward, masked losses, gradients, update; and the state it changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec
from ml_collections import ConfigDict

from medjax import optim, parallel
from medjax.augment import policy
from medjax.errors import UserError
from medjax.job import Job, steps_of
from medjax.losses import weighting

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
