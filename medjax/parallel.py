"""Devices: the mesh, where arrays lie on it, and what each process owns. Alone knows meshes.

The mesh has three axes. `data` and `fsdp` split the rows of a batch; `fsdp` splits the parameters and what the
optimizer keeps of them as well, so that each device holds a part and gathers the rest when a step needs it; `space`
splits the first spatial axis of every volume.
"""

from __future__ import annotations

import math
import queue
import re
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from medjax.errors import UserError, check_regex

AXES = ("data", "fsdp", "space")
ROWS = PartitionSpec(("data", "fsdp"))
MODES = ("jit", "pmap")
# Below this many numbers a parameter stays whole: it costs more to gather than it takes.
_SMALL = 1024


def make_mesh(shape: Mapping[str, int]) -> Mesh:
    """A mesh over all devices of all processes; an axis left out has size 1. One axis may be -1: what is left."""
    if unknown := [name for name in shape if name not in AXES]:
        raise UserError(f"config: unknown mesh axis '{unknown[0]}'; known: {', '.join(AXES)}")
    sizes = {name: int(shape.get(name, 1)) for name in AXES}
    n, free = jax.device_count(), [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(free) == 1 and known > 0:
        sizes[free[0]] = n // known
    if min(sizes.values()) < 1 or math.prod(sizes.values()) != n:
        raise UserError(f"config: mesh {dict(shape)} does not fit {n} device(s)")
    # Auto: the compiler spreads what the batch's sharding implies; nothing here is annotated per operation.
    mesh = jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    if _shares(mesh) is None:
        # A layout made for the wires between chips that deals one process's rows out: the processes' own order then.
        ordered = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
        mesh = mesh_of(np.array(ordered, dtype=object).reshape(tuple(sizes.values())))
    if _shares(mesh) is None:
        raise UserError(
            f"config: mesh {sizes} over {jax.process_count()} processes gives them unlike shares of a batch; make "
            "mesh.space divide the devices of a process, or be a multiple of them"
        )
    return mesh


def mesh_of(devices: np.ndarray) -> Mesh:
    """A mesh of devices [data, fsdp, space]."""
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _shares(mesh: Mesh) -> dict[int, tuple[int, int]] | None:
    """Process -> (first block of rows, number of blocks), or None unless each has as many, one after the other."""
    blocks = mesh.devices.reshape(-1, mesh.shape["space"])
    owned: dict[int, list[int]] = {}
    for number, devices in enumerate(blocks):
        for process in {d.process_index for d in devices}:
            owned.setdefault(process, []).append(number)
    size = len(next(iter(owned.values())))
    whole = all(len(own) == size and own[-1] - own[0] == size - 1 and own[0] % size == 0 for own in owned.values())
    return {process: (own[0], size) for process, own in owned.items()} if whole else None


def row_share(mesh: Mesh) -> tuple[int, int]:
    """(i, n): this process feeds the i-th of n equal shares of a batch's rows.

    n is the number of processes, unless `space` spans several: those feed the same rows.
    """
    shares = _shares(mesh)
    assert shares is not None
    first, size = shares[jax.process_index()]
    return first // size, ways(mesh) // size


def leads_share(mesh: Mesh) -> bool:
    """Whether this process is the first of those that feed the same rows."""
    shares = _shares(mesh)
    assert shares is not None
    mine = shares[jax.process_index()]
    return min(process for process, share in shares.items() if share == mine) == jax.process_index()


def ways(mesh: Mesh) -> int:
    """Parts that the rows of a batch are cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 0 over the mesh axes 'data' and 'fsdp'."""
    return NamedSharding(mesh, ROWS)


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raises UserError unless the batch can be cut into rounds, and each round over the devices."""
    if batch_size % (accumulate * ways(mesh)):
        raise UserError(
            f"config: data.batch_size={batch_size} cannot be cut into optim.accumulate={accumulate} round(s) over "
            f"{ways(mesh)} device(s); use a multiple of {accumulate * ways(mesh)}"
        )


def rows_together(config: Any, mesh: Mesh) -> int:
    """Rows of a batch that one call of a loss sees: of an accumulation round, under 'pmap' of one device."""
    return config.data.batch_size // config.optim.accumulate // (ways(mesh) if config.parallel == "pmap" else 1)


def check_mode(mode: str, mesh: Mesh) -> None:
    """Raises UserError unless `config.parallel` is known and can do what the mesh asks for."""
    if mode not in MODES:
        raise UserError(f"config: parallel='{mode}' is not known; known: {', '.join(MODES)}")
    if mode == "pmap" and mesh.shape["data"] != mesh.size:
        raise UserError(
            f"config: parallel='pmap' splits the batch only, not mesh {dict(mesh.shape)}; use parallel='jit'"
        )


# --- parameters ------------------------------------------------------------------------------------------------------


def param_specs(params: Any, rules: Sequence[Any], mesh: Mesh) -> dict[str, PartitionSpec]:
    """Parameter's path -> where its axes lie; the first rule (regex, place) that matches a whole path rules.

    Args:
      params: tree of arrays or shapes.
      rules: `config.mesh_rules`. A place is 'fsdp' (the longest axis that the mesh axis fsdp divides, the last of
        equals; whole if there is none or the parameter is small), 'replicate', or a mesh axis (or None) for each axis.

    Raises:
      UserError: a parameter no rule covers, a rule that rules nothing (but a closing '.*'), a place that cannot be.
    """
    used, specs = set(), {}
    for pattern, _ in rules:
        check_regex(pattern, "mesh_rules")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rule = next((rule for rule in rules if re.fullmatch(rule[0], name)), None)
        if rule is None:
            raise UserError(f"config: mesh_rules cover no parameter '{name}'; end them with a rule for '.*'")
        used.add(rule[0])
        specs[name] = _place(name, tuple(leaf.shape), rule, mesh)
    for pattern, _ in rules:
        if pattern not in used and pattern != ".*":
            raise UserError(f"config: mesh_rules: '{pattern}' matches no parameter, or only those ruled before it")
    return specs


def _place(name: str, shape: tuple[int, ...], rule: Sequence[Any], mesh: Mesh) -> PartitionSpec:
    pattern, place = rule
    if place == "replicate":
        return PartitionSpec()
    if place == "fsdp":
        n = mesh.shape["fsdp"]
        fits = [axis for axis, size in enumerate(shape) if size % n == 0]
        if n == 1 or not fits or math.prod(shape) < _SMALL:
            return PartitionSpec()
        axis = max(fits, key=lambda axis: (shape[axis], axis))
        return PartitionSpec(*[None] * axis, "fsdp")
    if isinstance(place, str) or not all(axis is None or axis in AXES for axis in place):
        raise UserError(
            f"config: mesh_rules '{pattern}': a place is 'fsdp', 'replicate' or one of {', '.join(AXES)} or None for "
            f"each axis, not {place!r}"
        )
    if len(place) != len(shape):
        raise UserError(f"config: mesh_rules '{pattern}': {len(place)} places for '{name}', which has shape {shape}")
    for size, axis in zip(shape, place, strict=True):
        if axis and size % mesh.shape[axis]:
            raise UserError(
                f"config: mesh_rules '{pattern}': '{name}' {shape} has an axis of {size}, which mesh.{axis}="
                f"{mesh.shape[axis]} does not divide"
            )
    return PartitionSpec(*place)


def state_shardings(state: Any, params: Any, rules: Sequence[Any], mesh: Mesh) -> Any:
    """A tree like `state` of shardings: what is kept of a parameter (moments, averages) lies where the parameter does.

    It is known by a path that ends in the parameter's own and by the parameter's shape; all else is on every device.
    """
    specs = param_specs(params, rules, mesh)
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }

    def find(path: Any, leaf: Any) -> NamedSharding:
        parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        for first in range(len(parts)):
            name = "/".join(parts[first:])
            if shapes.get(name) == tuple(leaf.shape):
                return NamedSharding(mesh, specs[name])
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(find, state)


def whole(tree: Any, mesh: Mesh) -> Any:
    """Inside a jitted function: every array gathered on every device, where parameters lie split."""
    if mesh.size == 1:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, replicated(mesh)), tree)


# --- volumes ---------------------------------------------------------------------------------------------------------


def spread(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Inside a jitted function: the volumes [B, X, Y, Z, ...] of a batch laid along X over the mesh axis 'space'."""
    n = mesh.shape["space"]
    if n == 1:
        return dict(batch)
    laid = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "space"))

    def lay(x: Any) -> Any:
        return jax.lax.with_sharding_constraint(x, laid) if x.ndim >= 4 and x.shape[1] % n == 0 else x

    return {key: lay(value) for key, value in batch.items()}


def check_space(patch: Sequence[int], factor: Sequence[int], mesh: Mesh) -> None:
    """Raises UserError unless each device's part of a patch is a whole number of the network's coarsest voxels."""
    n = mesh.shape["space"]
    if n > 1 and patch[0] % (n * factor[0]):
        raise UserError(
            f"config: data.patch={tuple(patch)}: mesh.space={n} cuts the first axis into parts that the network halves "
            f"down by {factor[0]}; make it a multiple of {n * factor[0]}"
        )


# --- batches ---------------------------------------------------------------------------------------------------------


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """This process's rows of a batch -> one global array a key, axis 0 split over 'data' and 'fsdp'."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:  # all at once: half of what it takes one by one
        return jax.device_put(dict(batch), sharding)
    _, shares = row_share(mesh)
    return {
        k: jax.make_array_from_process_local_data(sharding, v, (v.shape[0] * shares, *v.shape[1:]))
        for k, v in batch.items()
    }


def prefetch(
    batches: Iterator[Mapping[str, np.ndarray]], mesh: Mesh, depth: int = 2
) -> Generator[dict[str, Any], None, None]:
    """Batches already on the devices: a thread keeps `depth` of them ahead of the step."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: Any) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for batch in batches:
                put(put_batch(batch, mesh))
                if stop.is_set():
                    return
            put(None)
        except BaseException as error:  # handed to the consumer, who raises it
            put(error)

    thread = threading.Thread(target=work, name="medjax-prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join(timeout=5)


# --- evaluation ------------------------------------------------------------------------------------------------------


def group_mesh(mesh: Mesh) -> Mesh:
    """The devices that evaluate this process's share of the cases: those that its rows of a batch lie on."""
    if jax.process_count() == 1:
        return mesh
    shares = _shares(mesh)
    assert shares is not None
    first, size = shares[jax.process_index()]
    return mesh_of(mesh.devices.reshape(-1, 1, mesh.shape["space"])[first : first + size])


def local_mesh(space: int = 1) -> Mesh:
    """This process's devices, for inference; `space` of them share a window, if it divides their number."""
    devices = np.array(jax.local_devices(), dtype=object)
    return mesh_of(devices.reshape(-1, 1, space if len(devices) % space == 0 else 1))


def onto(tree: Any, mesh: Mesh, group: Mesh) -> Any:
    """Arrays of `mesh`, whole on every device of `group`, a part of it; a collective call."""
    if mesh.size == 1:
        return tree
    if any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(tree)):
        tree = jax.jit(lambda t: t, out_shardings=replicated(mesh))(tree)
    if group is mesh:
        return tree
    everywhere = replicated(group)

    def move(x: Any) -> Any:
        mine = [s.data for s in x.addressable_shards if s.device in everywhere.device_set]
        return jax.make_array_from_single_device_arrays(x.shape, everywhere, mine)

    return jax.tree.map(move, tree)


def for_windows(mesh: Mesh) -> dict[str, Any]:
    """How a sliding window uses a mesh: the options `lay` and `collect` of `medjax.ops.windows.SlidingWindow`."""

    def lay(x: Any) -> Any:
        rows = ("data", "fsdp") if x.shape[0] % ways(mesh) == 0 else None
        space = "space" if x.shape[1] % mesh.shape["space"] == 0 else None
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(rows, space)))

    return {"lay": lay, "collect": lambda tree: whole(tree, mesh)}
