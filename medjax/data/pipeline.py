"""From prepared cases to batches, through tf.data. TensorFlow is imported when a pipeline is made, and only if it is
installed: without it threads give the same batches.

Rows are `sampler.Sampler` examples: the pipeline can start at any step and gives the same batches from there on.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import math
import os
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medjax.data.cases import Case, nearest
from medjax.data.sampler import Key, Sampler, bucket_of, cut, foreground_points
from medjax.data.targets import touching
from medjax.errors import UserError, warn_once

Row = dict[str, np.ndarray]


@dataclass(frozen=True)
class Source:
    """Prepared cases of one split, in memory or in the store.

    Attributes:
      cases: `medjax.data.preprocess.Prepared` or `medjax.data.store.StoredCase`, in the split's order.
      tasks: names of the tasks whose targets a batch carries; a case may lack some.
      ignore: value in the masks that no patch is centred on, if there is one.
      points: of each case, the voxels int [n, 3] a patch may be centred on, by class. Findings are of one class, 1.
      dtypes: type of each mask task's target in a batch.
      values: task -> shape and type of what is no mask in a row; findings have as many rows as the case with most.
      overhang: of each case, how far its patches may hang over the volume, int [3, 2]: 0 but where a finding touches
        the first or last plane. A patch that ends there cuts the finding, and one that is cut is not learnt from.
    """

    cases: Sequence[Any]
    tasks: Sequence[str]
    ignore: int | None = None
    points: Sequence[Mapping[Key, Sequence[Any]]] = field(init=False)
    dtypes: Mapping[str, np.dtype] = field(init=False)
    values: Mapping[str, tuple[tuple[int, ...], np.dtype]] = field(init=False)
    overhang: Sequence[np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        values: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        dtypes: dict[str, np.dtype] = {}
        for task in self.tasks:
            if found := [_values(c)[task] for c in self.cases if task in _values(c)]:
                shape = tuple(max(sizes) for sizes in zip(*(v.shape for v in found), strict=True))
                values[task] = shape, np.result_type(*found)
            # Each case keeps its mask in the smallest type that holds it; a batch has one type for all.
            if kinds := [c.targets[task].dtype for c in self.cases if task in c.targets]:
                dtypes[task] = np.result_type(*kinds)
            elif not found:
                dtypes[task] = np.dtype(np.uint8)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "dtypes", dtypes)
        object.__setattr__(self, "points", [self._points(case) for case in self.cases])
        object.__setattr__(self, "overhang", [self._overhang(case) for case in self.cases])

    def _overhang(self, case: Any) -> np.ndarray:
        out = np.zeros((3, 2), np.int64)
        for task, (shape, _) in self.values.items():
            rows = _values(case).get(task)
            if rows is not None and len(shape) == 2:
                out[touching(rows, case.geometry.affine, case.image.shape)] = _OVERHANG
        return out

    def _points(self, case: Any) -> dict[Key, list[Any]]:
        out: dict[Key, list[Any]] = {}
        for task in self.tasks:
            if task not in case.targets:
                continue
            stored = getattr(case, "points", None)
            # An instance mask holds numbers of rows: none of them is the value that is ignored in masks.
            ignore = None if task in self.values else self.ignore
            found = stored[task] if stored else foreground_points(case.targets[task], ignore=ignore)
            for value, voxels in found.items():
                out.setdefault((task, 1 if task in self.values else value), []).append(voxels)
        return out

    def centres(self, number: int, key: Key | None = None) -> list[Any]:
        """The voxels that patches of a case may be centred on, those of class `key` or of each class."""
        known = self.points[number]
        return list(known[key]) if key else [voxels for arrays in known.values() for voxels in arrays]

    def row(
        self, number: int, start: Any, patch: Sequence[int], example: int, valid: bool, out: Row | None = None
    ) -> Row:
        """One example of a batch; see `docs/design.md` for the keys. What is large is written into `out`, if given."""
        case, slots = self.cases[number], out or {}
        row: Row = {
            "image": cut(case.image, start, patch, out=slots.get("image")),
            "modality": np.asarray(case.present, bool),
            "spacing": np.asarray(case.geometry.spacing, np.float32),
            "example": np.asarray(example, np.int64),
            "valid": np.asarray(valid, np.bool_),
        }
        for task in self.tasks:
            known = task in case.targets or task in _values(case)
            row[f"{task}/mask"] = np.asarray(known and valid, np.bool_)
            if task in self.dtypes:
                slot = slots.get(f"{task}/target")
                target = np.empty(tuple(patch), self.dtypes[task]) if slot is None else slot
                row[f"{task}/target"] = cut(case.targets[task] if known else _NOTHING, start, patch, out=target)
            if task in self.values:
                shape, dtype = self.values[task]
                table = len(shape) == 2
                value = np.full(shape, np.nan if table else 0, dtype)
                if known:
                    given = _values(case)[task]
                    value[tuple(slice(n) for n in given.shape)] = given
                row[f"{task}/table" if table else f"{task}/target"] = value
        return row


_NOTHING = np.zeros((0, 0, 0), np.uint8)
_OVERHANG = 3  # voxels: one makes what touches the border whole, and it may be turned and stretched a little


def _values(case: Any) -> Mapping[str, np.ndarray]:
    return getattr(case, "values", {})


def make_sampler(
    seed: int,
    source: Source,
    cases: Sequence[Case],
    *,
    foreground: float,
    sampling: Mapping[str, Any],
    labels: Mapping[str, int],
    buckets: Sequence[Sequence[int]] = (),
    batch_size: int = 1,
) -> Sampler:
    """The sampler that `config.data` asks for.

    Args:
      source: of the training split. cases: the same cases in the cohort, for their attributes.
      foreground: `data.foreground`. labels: of the cohort, for the names of classes.
      sampling: `data.sampling`; see `docs/store.md`:
        classes: 'present', 'balanced' or {label or task of findings: weight}.
        balance: an attribute whose values are taken equally often; '': off.
        weight: an attribute that says how often a case is taken; '': equally.
        labelled: share of the examples that come from cases with a label; 0: as the cases come.
      buckets: shapes of whole volumes (`bucket_shapes`); none: patches.
    """
    weights = _case_weights(cases, sampling["balance"], sampling["weight"])
    chosen: dict[Key, float] = {}
    members: tuple[tuple[int, ...], ...] = ()
    if buckets:
        of = [bucket_of(case.image.shape[:3], buckets) for case in source.cases]
        members = tuple(tuple(i for i, b in enumerate(of) if b == number) for number in range(len(buckets)))
    elif sampling["classes"] != "present" and foreground > 0:
        chosen = _class_weights(source, sampling["classes"], labels)
    holders = {
        key: tuple(i for i, known in enumerate(source.points) if key in known and (not weights or weights[i] > 0))
        for key in chosen
    }
    chosen = {key: weight for key, weight in chosen.items() if holders[key]}
    share = sampling.get("labelled", 0.0)
    labelled = _labelled(source, share, weights, buckets) if share else ()
    share = share if labelled else 0.0
    return Sampler(seed, len(source.cases), foreground, weights, chosen, holders, members, batch_size, share, labelled)


def _labelled(
    source: Source, share: float, weights: Sequence[float], buckets: Sequence[Sequence[int]]
) -> tuple[int, ...]:
    """The cases with a label, of which `share` of the examples are to be; none where all or none have one."""
    if not 0 < share <= 1:
        raise UserError(f"config: data.sampling.labelled={share}: needs a share from 0 to 1")
    if buckets:
        raise UserError("config: data.sampling.labelled is for patches; with data.buckets leave it 0")
    known = [any(t in c.targets or t in _values(c) for t in source.tasks) for c in source.cases]
    if all(known) or not any(known):
        some = "every training case has" if all(known) else "no training case has"
        warn_once(f"data.sampling.labelled={share}: {some} a label, so cases are taken as they come")
        return ()
    chosen = tuple(i for i, k in enumerate(known) if k)
    if weights and not (
        any(weights[i] for i in chosen) and any(w for w, k in zip(weights, known, strict=True) if not k)
    ):
        raise UserError(
            "config: data.sampling.weight gives all cases with a label, or all without, the weight 0; data.sampling."
            "labelled needs some of both"
        )
    return chosen


def _class_weights(source: Source, wanted: Any, labels: Mapping[str, int]) -> dict[Key, float]:
    present = sorted({key for known in source.points for key in known})
    if wanted == "balanced":
        return dict.fromkeys(present, 1.0)
    if isinstance(wanted, str):
        raise UserError(f"config: data.sampling.classes={wanted!r}: 'present', 'balanced' or a table {{label: weight}}")
    # The points of findings are all of class 1, whatever their labels: the task names them, and no label of the masks.
    tables = [task for task, (shape, _) in source.values.items() if len(shape) == 2]
    names = (*labels, *(task for task in tables if task not in labels))

    def called(key: Key) -> list[str]:
        """The names of `wanted` that stand for a class of voxels."""
        task, value = key
        return [n for n in wanted if (n == task if task in tables else labels.get(n) == value)]

    for name, weight in wanted.items():
        if name not in names:
            raise UserError(
                f"config: data.sampling.classes: no label or task of findings {name!r}{nearest(name, names)} (known: "
                f"{', '.join(names)})"
            )
        if not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise UserError(f"config: data.sampling.classes.{name}={weight!r}: needs a number, 0 or more")
        if weight and not any(name in called(key) for key in present):
            warn_once(f"data.sampling.classes: no training case has {name!r}, so its weight has no effect")
    weight_of = {key: float(wanted[known[-1]]) for key in present if (known := called(key))}
    found = {key: weight for key, weight in weight_of.items() if weight}
    if not found:
        raise UserError("config: data.sampling.classes: no label with a weight is in the training cases")
    return found


def _case_weights(cases: Sequence[Case], balance: str, weight: str) -> tuple[float, ...]:
    if not balance and not weight:
        return ()
    for key, column in (("balance", balance), ("weight", weight)):
        if column and (lacking := [case for case in cases if column not in case.attributes]):
            known = {name for case in cases for name in case.attributes}
            raise UserError(
                f"config: data.sampling.{key}={column!r}: case {lacking[0].id} has no such attribute"
                f"{nearest(column, known)} (known: {', '.join(sorted(known)) or 'none'})"
            )
    out = np.ones(len(cases))
    if weight:
        for i, case in enumerate(cases):
            try:
                out[i] = float(case.attributes[weight])
            except ValueError:
                out[i] = np.nan
            if not 0 <= out[i] < np.inf:
                raise UserError(
                    f"config: data.sampling.weight={weight!r}: case {case.id} has {case.attributes[weight]!r}; needs a "
                    "number, 0 or more"
                )
    if balance:
        groups = np.asarray([case.attributes[balance] for case in cases])
        for group in np.unique(groups):
            total = out[groups == group].sum()
            out[groups == group] /= total or 1.0
    if not out.sum() > 0:
        raise UserError(f"config: data.sampling.weight={weight!r}: every case has the weight 0")
    return tuple(out.tolist())


def train_batches(
    source: Source,
    sampler: Sampler,
    *,
    patch: Sequence[int] | Sequence[Sequence[int]],
    batch_size: int,
    first_step: int = 0,
    process: int = 0,
    processes: int = 1,
    workers: int = 2,
) -> Iterator[Row]:
    """Endless batches from `first_step` on: rows [step · batch_size, (step + 1) · batch_size) of the global order.

    Args:
      patch: shape of every row; with `sampler.buckets`, the shape of each bucket.
      batch_size: over all processes; this one gets its `batch_size / processes` consecutive rows.
    """
    local = batch_size // processes
    shapes: list[Any] = list(patch) if sampler.buckets else [patch]

    def place(turn: int) -> Place:
        step, number = divmod(turn, local)
        example = (first_step + step) * batch_size + process * local + number
        case, key = sampler.draw(example)
        size = shapes[sampler.bucket(example)] if sampler.buckets else shapes[0]
        shape, points = source.cases[case].image.shape[:3], source.centres(case, key)
        start = sampler.start(example, shape, size, points, source.overhang[case])
        return case, start, size, example, True

    return _run(source, place, None, shapes, local, workers)


def center_batches(
    source: Source, *, patch: Sequence[int], batch_size: int, process: int = 0, processes: int = 1, workers: int = 2
) -> Iterator[Row]:
    """One fixed patch a case, centred on the middle of its labelled voxels; the last batch is padded (`valid` False).

    Every process sees the same number of batches, so a collective step never waits for one that has finished.
    """
    local = batch_size // processes
    per_process = -(-len(source.cases) // processes)
    rows = -(-per_process // local) * local

    def place(turn: int) -> Place:
        # Cases are dealt in turn: process p holds p, p + n, p + 2n...
        number = process + turn * processes
        valid = number < len(source.cases)
        number = number if valid else 0
        shape, points = source.cases[number].image.shape[:3], source.centres(number)
        middle = np.concatenate([np.asarray(p) for p in points]).mean(0) if points else np.asarray(shape) / 2
        return number, centred(middle, shape, patch), patch, number, valid

    return _run(source, place, rows, [patch], local, workers)


def centred(middle: Any, shape: Sequence[int], patch: Sequence[int]) -> np.ndarray:
    """First voxel int [3] of the patch about `middle`, moved into a volume of `shape` as far as it goes."""
    room = np.asarray(shape) - np.asarray(patch)
    start = np.round(middle).astype(int) - np.asarray(patch) // 2
    return np.clip(start, np.minimum(0, room // 2), np.maximum(room, room // 2))


Place = tuple[int, Any, Sequence[int], int, bool]
"""A row before it is made: the first five arguments of `Source.row`."""

_AHEAD = 2  # batches being made at a time; as many again are waiting
_KEPT = 2 * _AHEAD + 1  # arrays of a size that wait to be used again


def _run(
    source: Source,
    place: Callable[[int], Place],
    count: int | None,
    shapes: Sequence[Sequence[int]],
    local: int,
    workers: int,
) -> Iterator[Row]:
    """Rows 0, 1... (`count` of them, or without end), made by `workers` threads, as batches of `local`, in order."""
    # What a row looks like; an axis that differs between buckets has no fixed length.
    examples = [source.row(0, np.zeros(3, int), shape, 0, False) for shape in shapes]
    layouts = {tuple(s): {k: (v.shape, v.dtype) for k, v in e.items()} for s, e in zip(shapes, examples, strict=True)}
    pool, buffers = ThreadPoolExecutor(max(1, workers), thread_name_prefix="medjax-rows"), _Buffers()

    def batch(step: int) -> Row:
        places = [place(step * local + i) for i in range(local)]
        made = {k: buffers.empty((local, *shape), dtype) for k, (shape, dtype) in layouts[tuple(places[0][2])].items()}

        def fill(i: int) -> None:
            out = {key: array[i : i + 1].reshape(array.shape[1:]) for key, array in made.items()}
            for key, value in source.row(*places[i], out).items():
                if value is not out[key]:
                    out[key][...] = value

        filled: Iterator[None] = map(fill, range(local))
        if workers > _AHEAD and local > 1:  # else the threads that make batches are enough, and need not wait
            with contextlib.suppress(RuntimeError):  # the program ends, and nobody will see this batch
                filled = pool.map(fill, range(local))
        for _ in filled:
            pass
        return made

    steps = None if count is None else count // local
    # Before the import: no chatter at the terminal, and no kernels that differ in rounding from run to run.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        import tensorflow as tf
    except ImportError:
        return _closed_at_exit(_threads(batch, steps, pool))

    tf.config.set_visible_devices([], "GPU")  # the accelerator belongs to JAX
    keys = list(examples[0])
    types = [tf.as_dtype(examples[0][key].dtype) for key in keys]
    sizes = {
        key: [n.pop() if len(n) == 1 else None for n in map(set, zip(*(e[key].shape for e in examples), strict=True))]
        for key in keys
    }
    failed: list[BaseException] = []

    def as_list(number: Any) -> list[np.ndarray]:
        try:
            made = batch(int(number))
        except BaseException as error:
            failed.append(error)
            raise
        return [made[key] for key in keys]

    def make(number: Any) -> dict[str, Any]:
        values = tf.numpy_function(as_list, [number], types)
        for value, key in zip(values, keys, strict=True):
            value.set_shape((local, *sizes[key]))
        return dict(zip(keys, values, strict=True))

    data = tf.data.Dataset.counter() if steps is None else tf.data.Dataset.range(steps)
    data = data.map(make, num_parallel_calls=_AHEAD, deterministic=True).prefetch(_AHEAD)
    options = tf.data.Options()
    options.threading.private_threadpool_size = _AHEAD
    options.threading.max_intra_op_parallelism = 1
    # The global order is the contract: nothing may reorder, and the graph is small, so no rewriting either.
    options.deterministic = True
    options.autotune.enabled = False

    def batches() -> Generator[Row, None, None]:
        try:
            yield from data.with_options(options).as_numpy_iterator()
        except tf.errors.OpError:
            if failed:  # what went wrong, rather than TensorFlow's account of it
                raise failed[0] from None
            raise

    return _closed_at_exit(batches())


_open: weakref.WeakSet[Generator[Row, None, None]] = weakref.WeakSet()


def _closed_at_exit(batches: Generator[Row, None, None]) -> Iterator[Row]:
    """The same iterator: one still open when the program ends would wait for threads that cannot run any more."""
    _open.add(batches)
    return batches


@atexit.register
def _close_all() -> None:
    for batches in list(_open):
        with contextlib.suppress(ValueError):  # a thread is in it
            batches.close()


def _threads(batch: Callable[[int], Row], steps: int | None, pool: ThreadPoolExecutor) -> Generator[Row, None, None]:
    """The batches of `_run` where TensorFlow is not installed."""
    ahead: deque[Any] = deque()
    todo = iter(itertools.count() if steps is None else range(steps))
    makers = ThreadPoolExecutor(_AHEAD, thread_name_prefix="medjax-batches")
    try:
        while True:
            while len(ahead) < 2 * _AHEAD and (step := next(todo, None)) is not None:
                ahead.append(makers.submit(batch, step))
            if not ahead:
                return
            yield ahead.popleft().result()
    finally:
        makers.shutdown(cancel_futures=True)
        pool.shutdown()


class _Buffers:
    """Arrays for batches. Memory of those that are gone is used again: fresh pages, which the kernel clears first, cost
    as much as the copy into them."""

    def __init__(self) -> None:
        self._free: dict[int, deque[np.ndarray]] = {}

    def empty(self, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
        """An array that begins at a multiple of 64 bytes: TensorFlow and JAX take such arrays over without a copy."""
        size = math.prod(shape) * dtype.itemsize
        free = self._free.setdefault(size, deque(maxlen=_KEPT))
        try:
            raw = free.pop()
        except IndexError:
            raw = np.empty(size + 64, np.uint8)
        first = -raw.ctypes.data % 64
        # What views the array holds its base, and so the memory.
        return np.asarray(_Lent(raw[first : first + size], raw, free)).view(dtype).reshape(tuple(shape))


class _Lent:
    """Memory of an array; goes back when nothing views it any more."""

    def __init__(self, part: np.ndarray, raw: np.ndarray, free: deque[np.ndarray]) -> None:
        self.__array_interface__, self._raw, self._free = part.__array_interface__, raw, free

    def __del__(self) -> None:
        self._free.append(self._raw)
