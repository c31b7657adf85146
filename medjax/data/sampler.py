"""The index source: which case, which patch, which random key an example gets, as a pure function of its number.

Nothing here has state: example n of a run is the same whatever was drawn before, by whichever process, on whatever
number of workers. The data position of a run is therefore one integer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from medjax.errors import UserError

# Distinct streams of the counter-based generator, so that no two uses share numbers.
_ORDER, _PATCH, _FOREGROUND = 1, 2, 3


def generator(seed: int, stream: int, number: int) -> np.random.Generator:
    """A generator that depends on its three arguments alone (Philox, counter-based; Salmon et al. 2011)."""
    return np.random.Generator(np.random.Philox(key=[seed & (2**64 - 1), (stream << 56) | number]))


@dataclass(frozen=True)
class Sampler:
    """Patches for training.

    Attributes:
      seed: of the run.
      n_cases: cases in the training split; each is taken once an epoch, in an order of that epoch's own.
      foreground: share of examples whose patch is centred on a labelled voxel; kept exactly over time.
    """

    seed: int
    n_cases: int
    foreground: float = 0.5

    def case(self, example: int) -> int:
        """Number of the case that example takes."""
        epoch, place = divmod(example, self.n_cases)
        return int(_permutation(self.seed, epoch, self.n_cases)[place])

    def is_foreground(self, example: int) -> bool:
        """Whether example's patch is centred on labelled tissue: true for exactly the asked share of any long run."""
        # The offset, fixed by the seed, keeps the choice from always falling on the same place in a batch.
        offset = generator(self.seed, _FOREGROUND, 0).random()
        return int((example + 1) * self.foreground + offset) > int(example * self.foreground + offset)

    def start(
        self, example: int, shape: Sequence[int], patch: Sequence[int], points: Sequence[np.ndarray]
    ) -> np.ndarray:
        """First voxel of example's patch, int [3]; negative where the patch is larger than the volume (it is padded).

        Args:
          shape: of the prepared volume. points: for each class present, voxels int [n, 3] of that class.
        """
        rng = generator(self.seed, _PATCH, example)
        room = np.asarray(shape) - np.asarray(patch)
        low, high = np.minimum(0, room // 2), np.maximum(room, room // 2)
        draw = rng.random(3)
        present = [p for p in points if len(p)]
        if present and self.is_foreground(example):
            voxels = present[rng.integers(len(present))]
            # Centred on the voxel, moved back inside the volume as far as needed.
            first = voxels[rng.integers(len(voxels))] - np.asarray(patch) // 2
            return np.clip(first, low, high)
        return (low + np.floor(draw * (high - low + 1))).astype(np.int64)


@lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    return generator(seed, _ORDER, epoch).permutation(n)


def foreground_points(target: np.ndarray, *, limit: int = 4096, seed: int = 0) -> list[np.ndarray]:
    """For each non-zero value of a mask [X, Y, Z], up to `limit` of its voxels, int32 [n, 3], drawn at random."""
    flat = target.ravel()
    where = np.flatnonzero(flat)
    values = flat[where]
    points = []
    for value in np.unique(values):
        index = where[values == value]
        if len(index) > limit:
            index = np.sort(generator(seed, _FOREGROUND, int(value)).choice(index, limit, replace=False))
        points.append(np.stack(np.unravel_index(index, target.shape), axis=-1).astype(np.int32))
    return points


def cut(array: np.ndarray, start: Any, patch: Sequence[int], fill: Any = 0) -> np.ndarray:
    """The patch [*patch, ...] of array [X, Y, Z, ...] that begins at `start`, `fill` where it lies outside."""
    out = np.full((*patch, *array.shape[3:]), fill, array.dtype)
    source, target = [], []
    for first, size, length in zip(start, patch, array.shape[:3], strict=True):
        lo, hi = max(0, int(first)), min(length, int(first) + size)
        source.append(slice(lo, max(lo, hi)))
        target.append(slice(lo - int(first), max(lo, hi) - int(first)))
    out[tuple(target)] = array[tuple(source)]
    return out


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
