"""What a training step needs in memory, from the compiler, and the largest patch and batch that fit a budget."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from medjax.errors import UserError
from medjax.plan.rules import MIN_BATCH, Topology

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_WAITING = 2  # batches on the device ahead of the one a step works on (`parallel.prefetch`)
_COPIES = 2.3  # of each feature map that a step keeps, before anything is compiled; then what was measured counts
_COMPILES = 6  # after these, a patch that fits is good enough
_PROBE = (5, 7, 3)  # a patch whose shape no other axis of a batch has


def parse_budget(text: str) -> int:
    """'8GB', '24 GiB' or '800MB' in bytes; UserError for anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt])(i?)b\s*", text.lower())
    size = float(match[1]) * (_BINARY if match[3] else _UNITS)[match[2]] if match else 0
    if not size:
        raise UserError(f"--budget={text}: not a size; write e.g. --budget=8GB, --budget=24GiB or --budget=800MB")
    return int(size)


@dataclass(frozen=True)
class Trial:
    """One compilation.

    Attributes:
      net, batch: what was compiled. state: bytes of parameters, optimizer and gradients. needed: bytes of one device in
        all, with the batches that wait. arguments, temporaries, outputs: from the compiler, outputs without those that
        take the arguments' place. seconds: of compiling.
    """

    net: Topology
    batch: int
    state: int
    needed: int
    arguments: int = 0
    temporaries: int = 0
    outputs: int = 0
    seconds: float = 0.0

    def row(self) -> dict[str, Any]:
        """For plan.json."""
        return {
            "patch": list(self.net.patch),
            "batch_size": self.batch,
            "needed_bytes": self.needed,
            "arguments_bytes": self.arguments,
            "temporaries_bytes": self.temporaries,
            "outputs_bytes": self.outputs,
            "compile_seconds": round(self.seconds, 1),
        }


class TooSmall(UserError):
    """Even the smallest patch does not fit. `trial`: what it needs."""

    def __init__(self, trial: Trial, budget: int) -> None:
        super().__init__(f"{trial.needed} bytes needed, {budget} given")
        self.trial = trial


def search(
    nets: Sequence[Topology],
    budget: int,
    weight: Callable[[Topology], float],
    measure: Callable[[Topology, int], Trial],
    limit: Callable[[Topology], int],
    itemsize: int = 4,
    least: int = MIN_BATCH,
    rounds: int = 1,
) -> list[Trial]:
    """The largest patch that fits at batch `least`, then the largest batch up to the limit.

    Between two measurements a need is taken to be state + bytes x batch x weight, with bytes from the last one. What
    is chosen was measured.

    Args:
      nets: patches, from the largest on. weight: elements of a network's feature maps for one example.
      measure: compiles. limit: the largest batch allowed for a patch. itemsize: bytes of a feature map's element.
      least: the smallest batch. rounds: every batch is a multiple of it (`optim.accumulate`), as `least` must be.

    Returns:
      The measurements; the last is the chosen one. Raises TooSmall if even the smallest patch does not fit.
    """
    trials: list[Trial] = []
    state, bytes_each = 0.0, _COPIES * itemsize

    def expected(net: Topology, batch: int) -> float:
        return state + bytes_each * batch * weight(net)

    def learn(net: Topology, batch: int) -> Trial:
        nonlocal state, bytes_each
        trials.append(measure(net, batch))
        state = trials[-1].state
        bytes_each = max(1e-9, trials[-1].needed - state) / (batch * weight(net))
        return trials[-1]

    below, fits = -1, len(nets)  # nets up to `below` do not fit, nets[fits] does
    while True:
        between = range(below + 1, fits)
        guess = next((i for i in between if expected(nets[i], least) <= budget), None)
        if guess is None:
            if fits < len(nets) or not between:
                break
            guess = between[-1]
        if learn(nets[guess], least).needed <= budget:
            fits = guess
        else:
            below = guess
        if fits < len(nets) and len(trials) >= _COMPILES:
            break
    if fits == len(nets):
        raise TooSmall(trials[-1], budget)
    chosen = next(t for t in reversed(trials) if t.net == nets[fits])
    state, bytes_each = chosen.state, max(1e-9, chosen.needed - chosen.state) / (chosen.batch * weight(chosen.net))
    room = (budget - state) / (bytes_each * weight(chosen.net))
    batch = min(limit(chosen.net), math.floor(room)) // rounds * rounds
    while batch > chosen.batch:
        if learn(chosen.net, batch).needed <= budget:
            chosen = trials[-1]
            break
        batch = min(batch - 1, math.floor((budget - state) / (bytes_each * weight(chosen.net)))) // rounds * rounds
    if trials[-1] is not chosen:
        trials.append(trials.pop(trials.index(chosen)))
    return trials


class Meter:
    """Compiles the real training step of a configuration for other patches, networks and batches.

    Args:
      config: resolved. job: what it trains (`job.Job`). source: of prepared cases (`pipeline.Source`), for the keys
        and types of a batch. device: a JAX device. apply: writes a network and a batch size into a copy of the
        configuration.
    """

    def __init__(
        self, config: ConfigDict, job: Any, source: Any, device: Any, apply: Callable[[ConfigDict, Topology, int], None]
    ) -> None:
        import numpy as np

        self._config, self._job, self._device, self._apply = config, job, device, apply
        row = source.row(0, np.zeros(3, int), _PROBE, 0, True)
        self._row = {key: np.asarray(value) for key, value in row.items()}

    def __call__(self, net: Topology, batch: int) -> Trial:
        import dataclasses

        import jax
        import numpy as np

        from medjax import parallel, report, tasks
        from medjax import step as step_lib
        from medjax.models.model import build_model

        config = self._config.copy_and_resolve_references()
        with config.unlocked(), config.ignore_type():
            self._apply(config, net, batch)
        built = tasks.build(config.tasks, self._job.cohort.labels)
        job = dataclasses.replace(self._job, tasks=built, model=build_model(config, built))
        mesh = parallel.mesh_of(np.array([[[self._device]]]))  # a plan is for one device, whatever else there is
        tx, _, _ = step_lib.make_state(config, job)
        state = step_lib.abstract_state(config, job, mesh)
        rows = {}
        for key, value in self._row.items():
            shape = (*net.patch, *value.shape[3:]) if value.shape[:3] == _PROBE else value.shape
            kind = jax.dtypes.canonicalize_dtype(value.dtype)
            rows[key] = jax.ShapeDtypeStruct((batch, *shape), kind, sharding=parallel.batch_sharding(mesh))
        step = report.compile_step(step_lib.make_train_step(config, job, tx, mesh), state, rows)
        size = {k: sum(math.prod(s.shape) * s.dtype.itemsize for s in jax.tree.leaves(v)) for k, v in
                {"state": state, "params": state.params, "batch": rows}.items()}  # fmt: skip
        needed = step.peak + _WAITING * size["batch"]
        return Trial(
            net, batch, size["state"] + size["params"], needed, step.arguments, step.temporaries, step.outputs,
            step.seconds,
        )  # fmt: skip


def find_device(wanted: str | None) -> tuple[Any, str, bool]:
    """The device to compile for.

    Args:
      wanted: 'gpu', 'cpu' or None (a GPU where there is one).

    Returns:
      `(device, kind, exact)`: `kind` is what the plan is for; `exact` is False where that is a GPU and there is none,
      so that what is compiled for the CPU stands for it.
    """
    import jax

    def first(platform: str) -> Any:
        try:
            return jax.devices(platform)[0]
        except RuntimeError:  # JAX has no such backend here
            return None

    gpu = None if wanted == "cpu" else first("gpu")
    kind = wanted or ("cpu" if gpu is None else "gpu")
    return gpu or jax.devices("cpu")[0], kind, kind == "cpu" or gpu is not None


def measured_on(device: Any, exact: bool) -> dict[str, Any]:
    """What the figures of `Trial` are, for plan.json."""
    import jax

    from medjax.ops import native

    found: Mapping[str, Any] = {"platform": device.platform, "device": device.device_kind, "jax": jax.__version__}
    note = "memory_analysis() of the compiled training step"
    if not exact:
        note += (
            " for this machine's CPU, as it has no GPU: an estimate. A GPU's convolutions take work space of their "
            "own, and its compiler fuses otherwise. Give the same command on the GPU machine for a measurement"
        )
    convolution = {"convolution": native.status()} if device.platform == "cpu" else {}
    return {**found, **convolution, "exact": exact, "note": note}
