"""tf.data from prepared cases to batches. The one file that imports TensorFlow, and only when a pipeline is made.

Rows are `sampler.Sampler` examples: the pipeline can start at any step and gives the same batches from there on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medjax.data.sampler import Sampler, cut, foreground_points


@dataclass(frozen=True)
class Source:
    """Prepared cases of one split, in memory.

    Attributes:
      cases: `medjax.data.preprocess.Prepared`, in the split's order.
      tasks: names of the tasks whose masks a batch carries; a case may lack some.
    """

    cases: Sequence[Any]
    tasks: Sequence[str]
    points: Sequence[list[np.ndarray]] = field(init=False)
    dtypes: Mapping[str, np.dtype] = field(init=False)

    def __post_init__(self) -> None:
        # Each case keeps its mask in the smallest type that holds it; a batch has one type for all.
        kinds = {t: [c.targets[t].dtype for c in self.cases if t in c.targets] or [np.uint8] for t in self.tasks}
        object.__setattr__(self, "dtypes", {t: np.result_type(*found) for t, found in kinds.items()})
        found = []
        for number, case in enumerate(self.cases):
            found.append(
                [p for t in self.tasks if t in case.targets for p in foreground_points(case.targets[t], seed=number)]
            )
        object.__setattr__(self, "points", found)

    def row(self, number: int, start: Any, patch: Sequence[int], example: int, valid: bool) -> dict[str, Any]:
        """One example of a batch; see `docs/design.md` for the keys."""
        case = self.cases[number]
        row = {
            "image": cut(case.image, start, patch),
            "modality": np.asarray(case.present, bool),
            "spacing": np.asarray(case.geometry.spacing, np.float32),
            "example": np.int64(example),
            "valid": np.bool_(valid),
        }
        for task in self.tasks:
            known = task in case.targets
            row[f"{task}/mask"] = np.bool_(known and valid)
            target = cut(case.targets[task], start, patch) if known else np.zeros(patch)
            row[f"{task}/target"] = target.astype(self.dtypes[task])
        return row


def train_batches(
    source: Source,
    sampler: Sampler,
    *,
    patch: Sequence[int],
    batch_size: int,
    first_step: int = 0,
    process: int = 0,
    processes: int = 1,
    workers: int = 2,
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches from `first_step` on: rows [step · batch_size, (step + 1) · batch_size) of the global order.

    Args:
      batch_size: over all processes; this one gets its `batch_size / processes` consecutive rows.
    """
    local = batch_size // processes

    def numbers() -> Iterator[int]:
        step = first_step
        while True:
            first = step * batch_size + process * local
            yield from range(first, first + local)
            step += 1

    def row(example: int) -> dict[str, np.ndarray]:
        number = sampler.case(example)
        start = sampler.start(example, source.cases[number].image.shape[:3], patch, source.points[number])
        return source.row(number, start, patch, example, True)

    return _run(source, numbers, row, patch, local, workers, forever=True)


def center_batches(
    source: Source, *, patch: Sequence[int], batch_size: int, process: int = 0, processes: int = 1, workers: int = 2
) -> Iterator[dict[str, np.ndarray]]:
    """One fixed patch a case, centred on the middle of its labelled voxels; the last batch is padded (`valid` False).

    Every process sees the same number of batches, so a collective step never waits for one that has finished.
    """
    local = batch_size // processes
    per_process = -(-len(source.cases) // processes)
    rows = -(-per_process // local) * local

    def numbers() -> Iterator[int]:
        yield from range(process * rows, (process + 1) * rows)

    def row(place: int) -> dict[str, np.ndarray]:
        # Cases are dealt in turn: process p holds p, p + n, p + 2n...
        number = process + (place - process * rows) * processes
        valid = number < len(source.cases)
        number = number if valid else 0
        shape, points = source.cases[number].image.shape[:3], source.points[number]
        middle = np.concatenate(points).mean(0) if points else np.asarray(shape) / 2
        room = np.asarray(shape) - np.asarray(patch)
        start = np.round(middle).astype(int) - np.asarray(patch) // 2
        return source.row(
            number, np.clip(start, np.minimum(0, room // 2), np.maximum(room, room // 2)), patch, number, valid
        )

    return _run(source, numbers, row, patch, local, workers, forever=False)


def _run(
    source: Source, numbers: Any, row: Any, patch: Sequence[int], local: int, workers: int, *, forever: bool
) -> Iterator[dict[str, np.ndarray]]:
    # Before the import: no chatter at the terminal, and no kernels that differ in rounding from run to run.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")  # the accelerator belongs to JAX
    example = source.row(0, np.zeros(3, int), patch, 0, False)
    keys = list(example)
    types = [tf.as_dtype(np.asarray(example[k]).dtype) for k in keys]

    def as_list(number: Any) -> list[np.ndarray]:
        made = row(int(number))
        return [np.asarray(made[k]) for k in keys]

    def make(number: Any) -> dict[str, Any]:
        values = tf.numpy_function(as_list, [number], types)
        for value, key in zip(values, keys, strict=True):
            value.set_shape(np.shape(example[key]))
        return dict(zip(keys, values, strict=True))

    data = tf.data.Dataset.from_generator(numbers, output_signature=tf.TensorSpec((), tf.int64))
    data = data.map(make, num_parallel_calls=max(1, workers), deterministic=True)
    data = data.batch(local, drop_remainder=True).prefetch(2)
    options = tf.data.Options()
    options.threading.private_threadpool_size = max(1, workers)
    options.threading.max_intra_op_parallelism = 1
    # The global order is the contract: nothing may reorder, and the graph is small, so no rewriting either.
    options.deterministic = True
    options.autotune.enabled = False
    return data.with_options(options).as_numpy_iterator()
