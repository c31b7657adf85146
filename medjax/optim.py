"""Optimizers and schedules from Optax; rules by regex that must cover every parameter."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from medjax.errors import UserError, check_regex


def schedule(config: Mapping[str, Any], total: int, warmup: int) -> Callable[[Any], Any]:
    """Learning rate as a function of the step: linear warm-up, then 'poly', 'cosine' or 'constant' to `total`.

    Poly: lr · (1 - step / total) ^ power (Chen et al. 2018, as nnU-Net uses it).
    """
    lr, rest = config["lr"], max(1, total - warmup)
    if warmup >= total > 0:
        raise UserError(
            f"config: optim.warmup ({warmup} steps) must be shorter than train.total ({total} steps): set "
            "optim.warmup='0 steps', or train longer"
        )
    kinds = {
        "poly": lambda: optax.polynomial_schedule(lr, 0.0, config["power"], rest),
        "cosine": lambda: optax.cosine_decay_schedule(lr, rest),
        "constant": lambda: optax.constant_schedule(lr),
    }
    if config["schedule"] not in kinds:
        raise UserError(f"config: optim.schedule '{config['schedule']}' is not known; known: {', '.join(kinds)}")
    main = kinds[config["schedule"]]()
    # The first step already learns: step 0 of a warm-up of w uses lr / w.
    ramp = optax.linear_schedule(lr / max(1, warmup), lr, max(1, warmup - 1))
    return optax.join_schedules([ramp, main], [warmup]) if warmup else main


def build(
    config: Mapping[str, Any],
    params: Any,
    total: int,
    warmup: int = 0,
    *,
    known: Any = None,
    scales: Any = None,
    begins: Any = None,
    factors: Mapping[str, str] | None = None,
) -> tuple[optax.GradientTransformation, Callable]:
    """The optimizer of `config.optim` and its schedule.

    Args:
      params: tree of arrays or shapes; the rules are matched against its paths ('backbone/encoder0/.../kernel').
      total, warmup: in steps.
      known: tree of all parameters where `params` has only those that train; the rules must cover it.
      scales: tree of further factors of the learning rate. begins: tree of the steps after which a parameter begins to
        change; until then it has neither gradient nor moments, and from then on a warm-up of its own, as long as the
        run's. Both have the parameters of `params` at least.
      factors: as of `rule_factors`.

    Raises:
      UserError: a parameter no rule covers, a rule that matches nothing, an unknown name, a number out of its range.
    """
    for key in ("lr", "weight_decay", "clip"):
        if not config[key] >= 0:
            raise UserError(f"config: optim.{key}={config[key]}: needs 0 or more")
    lr = schedule(config, total, warmup)
    if config["name"] == "sgd":
        core = optax.trace(decay=config["momentum"], nesterov=True)
    elif config["name"] == "adamw":
        b1, b2 = config["betas"]
        core = optax.scale_by_adam(b1=b1, b2=b2)
    else:
        raise UserError(f"config: optim.name '{config['name']}' is not known; known: adamw, sgd")
    ruled = rule_factors(config["rules"], params if known is None else known, factors)
    rates, decays = (_part(tree, params) for tree in ruled)
    if scales is not None:
        rates = jax.tree.map(lambda rate, scale: rate * scale, rates, _part(scales, params))
    decay = _per_parameter(lambda u, p, f: u + config["weight_decay"] * f * p, decays)
    # SGD adds the decay to the gradient (L2), AdamW after the preconditioner (decoupled).
    chain = [
        _per_parameter(lambda u, p, f: u if f else jnp.zeros_like(u), rates)
    ]  # frozen ones do not count in the norm
    gate: list[optax.GradientTransformation] = []
    ramp: list[optax.GradientTransformation] = []
    if begins is not None:
        begins = _part(begins, params)
        gate, ramp, core = [_gate(begins)], [_gate(begins, warmup)], _delayed(core, begins)
    chain += gate
    chain += [optax.clip_by_global_norm(config["clip"])] if config["clip"] else []
    chain += [decay, core] if config["name"] == "sgd" else [core, decay]
    chain += [*ramp, _per_parameter(lambda u, p, f: u * f, rates), optax.scale_by_learning_rate(lr)]
    return optax.chain(*chain), lr


def rule_factors(rules: Any, params: Any, factors: Mapping[str, str] | None = None) -> tuple[Any, Any]:
    """Learning-rate and weight-decay factors, two trees like `params`: the first rule matching a whole path rules.

    Args:
      factors: path of a factor of a kernel's change -> the kernel's. Unless the rule of a factor is one that does not
        match its kernel too, the factor learns at the kernel's rate; its weight decay is of its own rule.

    Raises UserError for a parameter no rule covers and for a rule that rules nothing (but a closing '.*').
    """
    used = set()
    factors = factors or {}
    for rule in rules:
        if not (isinstance(rule, Sequence) and len(rule) == 2 and isinstance(rule[1], Mapping)):
            raise UserError(f"config: optim.rules are pairs (regex, {{'lr': factor, 'decay': factor}}), not {rule!r}")
        check_regex(rule[0], "optim.rules")

        for key, factor in rule[1].items():
            if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor < float("inf"):
                raise UserError(f"config: optim.rules '{rule[0]}': '{key}' is {factor!r}; it needs a number from 0 on")

    def first(name: str) -> tuple[str, Mapping[str, float]]:
        for pattern, found in rules:
            if re.fullmatch(pattern, name):
                used.add(pattern)
                if not set(found) <= {"lr", "decay"}:
                    raise UserError(f"config: optim.rules '{pattern}': keys are 'lr' and 'decay', not {dict(found)}")
                return pattern, found
        raise UserError(f"config: optim.rules cover no parameter '{name}'; end them with a rule for '.*'")

    def find(path: Any, _: Any) -> tuple[float, float]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        pattern, own = first(name)
        kernel = factors.get(name)
        ruling = first(kernel)[1] if kernel and re.fullmatch(pattern, kernel) else own
        rate = float(ruling.get("lr", 1.0))
        return rate, float(own.get("decay", 1.0)) if rate else 0.0

    found = jax.tree_util.tree_map_with_path(find, params)
    for pattern, _ in rules:
        if pattern not in used and pattern != ".*":
            raise UserError(f"config: optim.rules: '{pattern}' matches no parameter, or only those ruled before it")
    outer = jax.tree.structure(params)
    rates, decays = jax.tree.transpose(outer, jax.tree.structure((0, 0)), found)
    return rates, decays


def _per_parameter(function: Callable, factors: Any) -> optax.GradientTransformation:
    """A stateless transformation `function(update, parameter, factor)`."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(function, updates, params, factors), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def _part(tree: Any, params: Any) -> Any:
    """The leaves of `tree` at the places that `params` has."""

    def find(path: Any, _: Any) -> Any:
        node = tree
        for key in path:
            node = node[key.key]
        return node

    return jax.tree_util.tree_map_with_path(find, params)


def _gate(begins: Any, warmup: int = 0) -> optax.GradientTransformation:
    """Zeros in place of the updates of parameters whose first step has not come; those after it rise over `warmup`.

    What is left of the schedule's own rise over `warmup` steps is taken out, so that each rises once. A parameter that
    begins with the run is left as it is.
    """

    def share(u: Any, begin: int, count: Any) -> Any:
        if not begin:
            return u
        if warmup:
            own, common = (jnp.clip((count - first + 1) / warmup, 0.0, 1.0) for first in (begin, 0))
            u = u * (own / common)
        return jnp.where(count >= begin, u, 0)

    def update(updates: Any, count: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(lambda u, begin: share(u, begin, count), updates, begins), count + 1

    return optax.GradientTransformation(lambda _: jnp.zeros((), jnp.int32), update)


def _delayed(core: optax.GradientTransformation, begins: Any) -> optax.GradientTransformation:
    """`core` for each group of parameters that begin together: its state, steps counted included, is from there on."""

    def late(begin: int) -> optax.GradientTransformation:
        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            count, inner = state
            updates, new = core.update(updates, inner, params)
            return updates, (count + 1, jax.tree.map(lambda a, b: jnp.where(count >= begin, a, b), new, inner))

        return optax.GradientTransformation(lambda params: (jnp.zeros((), jnp.int32), core.init(params)), update)

    labels = jax.tree.map(str, begins)
    return optax.partition({label: late(int(label)) for label in sorted(set(jax.tree.leaves(labels)))}, labels)


def ema(average: Any, params: Any, decay: float, step: Any) -> Any:
    """Averaged weights after a step; the decay warms up as (1 + step) / (10 + step), as TensorFlow's average does."""
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, p: d * a + (1.0 - d) * p, average, params)


def swa(average: Any, params: Any, step: Any, start: int, interval: int) -> Any:
    """Stochastic weight averaging (Izmailov et al. 2018, arXiv:1803.05407) after a step.

    The equal mean of the parameters after steps `start`, `start + interval`...; before the first of them the
    parameters themselves. How many are in it follows from the step, so nothing else is carried along.

    Args:
      step: number of steps before this one.
    """
    since = step + 1 - start
    taken, before = (since >= 0) & (since % interval == 0), since // interval

    def follow(a: Any, p: Any) -> Any:
        mean = a + (p - a) / (before + 1)
        return jnp.where(since <= 0, p, jnp.where(taken, mean, a))

    return jax.tree.map(follow, average, params)


def averaging(
    decay: float, options: Mapping[str, Any], total: int, start: int, interval: int
) -> Callable[[Any, Any, Any], Any] | None:
    """`(average, params, step) -> average`: exponential (`ema`), or by `swa`; None where neither is asked for.

    Instance norm, the backbones' default, keeps no statistics, so the averaged weights need none computed anew; nor do
    the frozen ones of converted networks.

    Args:
      decay: of the exponential average; 0: none. options: `config.optim.swa`.
      total, start, interval: in steps; the last two of `optim.swa`.
    """
    if not options["start"]:
        return (lambda a, p, step: ema(a, p, decay, step)) if decay else None
    if decay:
        raise UserError(
            f"config: optim.swa.start='{options['start']}' averages the weights, and so does an exponential average of "
            f"decay {decay} (optim.ema, or the teacher of semi.method); one average is evaluated: set optim.ema=0, or "
            "optim.swa.start=''"
        )
    if not 1 <= start <= total:
        raise UserError(
            f"config: optim.swa.start='{options['start']}' is step {start}; it must lie within the {total} steps of "
            "the run (train.total)"
        )
    if interval < 1:
        raise UserError(f"config: optim.swa.interval='{options['interval']}' must be at least one step")
    return lambda a, p, step: swa(a, p, step, start, interval)
