"""Devices: the mesh, where arrays lie on it, and what each process owns. Alone knows meshes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from medjax.errors import UserError


def make_mesh(shape: Mapping[str, int]) -> Mesh:
    """A mesh over all devices; the axis 'data' splits the batch. One axis may be -1: what is left."""
    sizes = dict(shape)
    n = jax.device_count()
    known = int(np.prod([s for s in sizes.values() if s != -1]))
    for name, size in sizes.items():
        if size == -1:
            sizes[name] = n // known
    if int(np.prod(list(sizes.values()))) != n:
        raise UserError(f"config: mesh {dict(shape)} does not fit {n} device(s)")
    # Auto: the compiler spreads what the batch's sharding implies; nothing here is annotated per operation.
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 0 over the mesh axis 'data'."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raises UserError unless the batch can be cut into rounds, and each round over the devices."""
    ways = accumulate * mesh.shape["data"]
    if batch_size % ways:
        raise UserError(
            f"config: data.batch_size={batch_size} cannot be cut into optim.accumulate={accumulate} round(s) over "
            f"{mesh.shape['data']} device(s); use a multiple of {ways}"
        )


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """This process's rows of a batch -> one global array a key, axis 0 split over 'data'."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


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
