"""The index source: which case, which patch, which random key an example gets, as a pure function of its number.

Nothing here has state: example n of a run is the same whatever was drawn before, by whichever process, on whatever
number of workers. The data position of a run is therefore one integer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from medjax.errors import UserError

# Distinct streams of the counter-based generator, so that no two uses share numbers.
_ORDER, _PATCH, _FOREGROUND, _GROUP, _CASE, _FREE = range(1, 7)

_ONE = 1 << 32  # shares are fractions of this: whole numbers, so that the order is the same on every machine
_SHUFFLED = 64  # turns of a wheel that are shuffled together, at least

Key = tuple[str, int]
"""A class of labelled voxels: the task and the value in its mask."""


def generator(seed: int, stream: int, number: int) -> np.random.Generator:
    """A generator that depends on its three arguments alone (Philox, counter-based; Salmon et al. 2011)."""
    return np.random.Generator(np.random.Philox(key=[seed & (2**64 - 1), (stream << 56) | number]))


@dataclass(frozen=True)
class Wheel:
    """Takes items in turn, each as often as its weight says, in a shuffled order: turn n is a function of n alone.

    The turns that item i has had before turn n differ from n times its share by less than 2 plus what the shuffling of
    the turns under way moves about. Equal weights take every item once a round.

    Attributes:
      seed, stream, salt: of the shuffling; no two wheels of a run share all three.
      weights: of the items, not negative, not all 0.
    """

    seed: int
    stream: int
    weights: tuple[float, ...]
    salt: int = 0
    _sums: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_sums", np.concatenate([[0.0], np.cumsum(self.weights)]))

    def turn(self, n: int) -> tuple[int, int]:
        """(item of turn n, how many turns that item has before it, the shuffling apart: a number no other turn has)."""
        count = len(self.weights)
        if min(self.weights) == max(self.weights):
            epoch, place = divmod(n, count)
            return int(_permutation(self.seed, self.stream, self.salt << 40 | epoch, count)[place]), epoch
        length = max(count, _SHUFFLED)
        epoch, place = divmod(n, length)
        n = epoch * length + int(_permutation(self.seed, self.stream, self.salt << 40 | epoch, length)[place])
        # Halve the items: of every n turns the left half gets its share, rounded, and so on within it.
        low, high = 0, count
        while high - low > 1:
            middle = (low + high) // 2
            share = (self._sums[middle] - self._sums[low]) / (self._sums[high] - self._sums[low])
            before, here = _taken(n, share, _ONE // 2)
            n, low, high = (before, low, middle) if here else (n - before, middle, high)
        return low, n


def _taken(n: int, share: float, offset: int) -> tuple[int, bool]:
    """Of the turns 0..n-1, how many a share of all turns has, spread evenly, and whether it has turn n."""
    part = round(share * _ONE)
    before = (n * part + offset) // _ONE
    return before, ((n + 1) * part + offset) // _ONE > before


def fewest(share: float, rows: int) -> int:
    """How many of `rows` examples one after the other are of labelled cases at least, wherever they begin.

    `share` is the sampler's. Exactly so many are where the share divides the rows; else one more may be.
    """
    return rows * round(share * _ONE) // _ONE


@dataclass(frozen=True)
class Sampler:
    """Patches for training.

    Attributes:
      seed: of the run.
      n_cases: cases in the training split. With equal weights each is taken once an epoch, in an order of that epoch's
        own.
      foreground: share of examples whose patch is centred on a labelled voxel; kept exactly over time.
      weights: of the cases; empty: equal.
      classes: class -> weight: over time the patches centred on labelled voxels are centred on the classes in these
        proportions, exactly, and the case is one that has the class. Empty: case first, then any class it has.
      holders: class -> the cases that have it, for every class of `classes`.
      buckets: the cases of each shape that whole volumes are padded to; a batch is of one bucket. Empty: patches.
      batch_size: rows of a batch over all processes; buckets need it.
      share: of the examples that are of the cases `labelled`: exact over time, and in every batch that it divides.
        `foreground` and `classes` then rule those alone. 0: any case, in turn.
      labelled: the cases with a label, where `share` is not 0.
    """

    seed: int
    n_cases: int
    foreground: float = 0.5
    weights: tuple[float, ...] = ()
    classes: Mapping[Key, float] = field(default_factory=dict)
    holders: Mapping[Key, tuple[int, ...]] = field(default_factory=dict)
    buckets: tuple[tuple[int, ...], ...] = ()
    batch_size: int = 1
    share: float = 0.0
    labelled: tuple[int, ...] = ()
    _groups: Wheel | None = field(init=False, repr=False, compare=False)
    _members: tuple[tuple[tuple[int, ...], Wheel], ...] = field(init=False, repr=False, compare=False)
    _cases: tuple[tuple[int, ...], Wheel] = field(init=False, repr=False, compare=False)
    _free: tuple[tuple[int, ...], Wheel] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        weights = self.weights or (1.0,) * self.n_cases
        # What is chosen before the case: a class, or a batch's bucket.
        groups = self.buckets or tuple(self.holders[key] for key in self.classes)
        members = tuple(
            (group, Wheel(self.seed, _CASE, tuple(weights[case] for case in group), salt))
            for salt, group in enumerate(groups)
        )
        shares = tuple(sum(wheel.weights) for _, wheel in members) if self.buckets else tuple(self.classes.values())
        object.__setattr__(self, "_members", members)
        object.__setattr__(self, "_groups", Wheel(self.seed, _GROUP, shares) if shares else None)
        known = self.labelled if self.share else tuple(range(self.n_cases))
        free = tuple(sorted(set(range(self.n_cases)).difference(known)))
        object.__setattr__(self, "_cases", (known, Wheel(self.seed, _ORDER, tuple(weights[i] for i in known))))
        object.__setattr__(self, "_free", (free, Wheel(self.seed, _FREE, tuple(weights[i] for i in free) or (1.0,))))

    def bucket(self, example: int) -> int:
        """Number of the bucket whose shape example's batch has."""
        assert self._groups is not None
        return self._groups.turn(example // self.batch_size)[0]

    def draw(self, example: int) -> tuple[int, Key | None]:
        """(case, class) of an example; the class is None unless `classes` rules which one its patch is centred on."""
        key = None
        if self.share:
            # Cases with and without a label, each in turns of their own.
            before, known = self._known(example)
            if not known:
                free, wheel = self._free
                return free[wheel.turn(example - before)[0]], None
            example = before
        cases, wheel = self._cases
        if self._groups is None:
            return cases[wheel.turn(example)[0]], None
        if self.buckets:
            batch, row = divmod(example, self.batch_size)
            number, turn = self._groups.turn(batch)
            turn = turn * self.batch_size + row
        else:
            before, labelled = _taken(example, self.foreground, self._offset)
            if not labelled:
                return cases[wheel.turn(example - before)[0]], None
            number, turn = self._groups.turn(before)
            key = tuple(self.classes)[number]
        group, members = self._members[number]
        return group[members.turn(turn)[0]], key

    def _known(self, example: int) -> tuple[int, bool]:
        """How many examples before this one are of cases with a label, and whether it is."""
        return _taken(example, self.share, _ONE // 2)

    def case(self, example: int) -> int:
        """Number of the case that example takes."""
        return self.draw(example)[0]

    def is_foreground(self, example: int) -> bool:
        """Whether example's patch is centred on labelled tissue: true for exactly the asked share of any long run."""
        if self.share:
            example, known = self._known(example)
            if not known:
                return False
        return _taken(example, self.foreground, self._offset)[1]

    @property
    def _offset(self) -> int:
        # Fixed by the seed: keeps the choice from always falling on the same place in a batch.
        return int(_foreground_offset(self.seed) * _ONE)

    def start(
        self,
        example: int,
        shape: Sequence[int],
        patch: Sequence[int],
        points: Iterable[Sequence[Any]],
        overhang: Any = 0,
    ) -> np.ndarray:
        """First voxel of example's patch, int [3]; negative where the patch is larger than the volume (it is padded).

        Args:
          shape: of the prepared volume.
          points: the voxels int [n, 3] that a patch may be centred on, class by class (arrays, or what can be indexed
            like them): each class is as likely as another, and so is each voxel of it.
          overhang: how many voxels the patch may begin before the volume and end behind it, int [3, 2]. A volume
            smaller than the patch moves within its padding alone: nothing of it is lost. One as large as it moves only
            in a patch that is centred on a voxel of `points`, for nothing else makes whole what touches its border.
        """
        rng = generator(self.seed, _PATCH, example)
        room = np.asarray(shape) - np.asarray(patch)
        before, behind = np.broadcast_to(overhang, (3, 2)).T
        low = np.minimum(np.minimum(0, room // 2), -before)
        high = np.maximum(np.maximum(room, room // 2), room + behind)
        low, high = np.where(room < 0, np.maximum(low, room), low), np.where(room < 0, np.minimum(high, 0), high)
        draw = rng.random(3)
        if self.is_foreground(example) and (present := [p for p in points if len(p)]):
            voxels = present[rng.integers(len(present))]
            pick = int(rng.integers(len(voxels)))
            # Centred on the voxel, moved back inside the volume (and its overhang) as far as needed.
            first = np.asarray(voxels[pick : pick + 1])[0] - np.asarray(patch) // 2
            return np.clip(first, low, high)
        low, high = np.where(room == 0, 0, low), np.where(room == 0, 0, high)
        return (low + np.floor(draw * (high - low + 1))).astype(np.int64)


@lru_cache(maxsize=64)
def _permutation(seed: int, stream: int, number: int, n: int) -> np.ndarray:
    return generator(seed, stream, number).permutation(n)


@lru_cache(maxsize=8)
def _foreground_offset(seed: int) -> float:
    return generator(seed, _FOREGROUND, 0).random()


def foreground_points(
    target: np.ndarray, *, limit: int = 4096, seed: int = 0, ignore: int | None = None
) -> dict[int, np.ndarray]:
    """For each value of a mask [X, Y, Z] but 0 and `ignore`, up to `limit` of its voxels, int32 [n, 3], at random."""
    flat = target.ravel()
    where = np.flatnonzero(flat)
    values = flat[where]
    points = {}
    for value in np.unique(values):
        if value == ignore:
            continue
        index = where[values == value]
        if len(index) > limit:
            index = np.sort(generator(seed, _FOREGROUND, int(value)).choice(index, limit, replace=False))
        points[int(value)] = np.stack(np.unravel_index(index, target.shape), axis=-1).astype(np.int32)
    return points


def cut(array: Any, start: Any, patch: Sequence[int], fill: Any = 0, out: np.ndarray | None = None) -> np.ndarray:
    """The patch [*patch, ...] of array [X, Y, Z, ...] that begins at `start`, `fill` where it lies outside.

    Only that patch of `array` is read, where it is one that reads what is sliced (`medjax.data.records.Stored`).
    Written into `out` where it is given.
    """
    source, target = [], []
    for first, size, length in zip(start, patch, array.shape[:3], strict=True):
        lo, hi = max(0, int(first)), min(length, int(first) + size)
        source.append(slice(lo, max(lo, hi)))
        target.append(slice(lo - int(first), max(lo, hi) - int(first)))
    if out is None:
        out = np.empty((*patch, *array.shape[3:]), array.dtype)
    inside = out[tuple(target)]
    if inside.shape != out.shape:
        out[...] = fill
    if hasattr(array, "read_into"):
        array.read_into(source, inside)
    else:
        inside[...] = array[tuple(source)]
    return out


def bucket_shapes(shapes: Sequence[Sequence[int]], count: int, factor: Sequence[int]) -> list[tuple[int, int, int]]:
    """At most `count` shapes, multiples of `factor`, in which volumes of `shapes` lie with little padding.

    Starts from the volumes' own padded shapes and joins the two whose join adds the fewest voxels until few enough are
    left; the largest comes last.
    """
    padded = -(-np.asarray(shapes) // np.asarray(factor)) * np.asarray(factor)
    kept, number = np.unique(padded, axis=0, return_counts=True)
    while len(kept) > count:
        joined = np.maximum(kept[:, None], kept[None])
        cost = joined.prod(-1) * (number[:, None] + number[None])
        own = kept.prod(-1) * number
        cost = cost - own[:, None] - own[None] + np.where(np.eye(len(kept), dtype=bool), np.iinfo(np.int64).max // 2, 0)
        i, j = sorted(map(int, np.unravel_index(np.argmin(cost), cost.shape)))
        kept[i], number[i] = joined[i, j], number[i] + number[j]
        kept, number = np.delete(kept, j, 0), np.delete(number, j)
    # A join may have grown to hold another shape; each volume goes to the smallest that holds it.
    return sorted({_triple(shape) for shape in kept}, key=lambda s: (math.prod(s), s))


def bucket_of(shape: Sequence[int], buckets: Sequence[Sequence[int]]) -> int:
    """Number of the first of `buckets` that holds a volume of `shape`."""
    return next(i for i, bucket in enumerate(buckets) if all(n <= b for n, b in zip(shape, bucket, strict=True)))


def _triple(shape: Any) -> tuple[int, int, int]:
    x, y, z = (int(n) for n in shape)
    return x, y, z


def check_multiple(patch: Sequence[int], factor: Sequence[int]) -> None:
    """Raises UserError for a patch the network cannot halve; `factor` is its total downsampling (x, y, z)."""
    if min(patch) < 1 or any(p % f for p, f in zip(patch, factor, strict=True)):
        near = tuple(max(f, round(p / f) * f) for p, f in zip(patch, factor, strict=True))
        raise UserError(
            f"config: data.patch={tuple(patch)} must be a multiple of the network's downsampling {tuple(factor)}; "
            f"the nearest is {near}"
        )


def check_filled(patch: Sequence[int], shapes: Sequence[Sequence[int]], factor: Sequence[int]) -> None:
    """Raises UserError for a patch that no volume fills along every axis, even after padding.

    Args:
      shapes: of the prepared training volumes. factor: total downsampling of the network (x, y, z).
    """
    largest = np.max(np.asarray(shapes), axis=0)
    # A volume is padded to what the network can halve; a patch beyond that would hold nothing but padding.
    padded = tuple(int(-(-n // f) * f) for n, f in zip(largest, factor, strict=True))
    if any(p > n for p, n in zip(patch, padded, strict=True)):
        raise UserError(
            f"config: data.patch={tuple(patch)} is larger than every padded training volume (at most {padded} voxels "
            f"at this spacing); use data.patch={tuple(map(min, patch, padded))} or smaller"
        )
