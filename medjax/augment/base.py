"""What every transform is made of: options with their checks, and the random numbers of an example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

Batch = dict[str, Any]
# Key of bool [B, X, Y, Z], the volume's voxels and not those it is padded with: there from 'paint' to the policy's end.
INSIDE = "augment/inside"


class Draws:
    """Hands out an example's random numbers, one after the other, from one row of uniform numbers drawn at once.

    One draw for the whole policy compiles in a fraction of the time of a draw for each number.
    """

    def __init__(self, row: Array) -> None:
        self._row, self.used = row, 0

    def uniform(self, low: Any = 0.0, high: Any = 1.0, shape: Sequence[int] = ()) -> Array:
        """Uniform in [low, high)."""
        size = 1
        for n in shape:
            size *= n
        values = self._row[self.used : self.used + size].reshape(tuple(shape))
        self.used += size
        return low + (high - low) * values

    def normal(self, shape: Sequence[int] = ()) -> Array:
        u = jnp.clip(self.uniform(-1.0, 1.0, shape), -1 + 2**-23, 1 - 2**-23)
        return jnp.sqrt(2.0) * jax.lax.erf_inv(u)

    def chance(self, p: float, shape: Sequence[int] = ()) -> Array:
        """True with probability p."""
        return self.uniform(shape=shape) < p

    def index(self, n: int, shape: Sequence[int] = ()) -> Array:
        """Integers 0..n-1, all as likely."""
        return jnp.minimum(jnp.floor(self.uniform(0.0, float(n), shape)).astype(jnp.int32), n - 1)

    def about_one(self, low: float, high: float, shape: Sequence[int] = ()) -> Array:
        """A factor below one in half of the cases, uniform in [low, 1], else uniform in [1, high]."""
        below, u = self.chance(0.5, shape), self.uniform(shape=shape)
        return jnp.where(below, low + (1 - low) * u, 1 + (high - 1) * u) if low < 1 < high else low + (high - low) * u


class Scene(NamedTuple):
    """What a transform may know of an example: shape and number of channels, spacing [3] mm, channels that are real."""

    shape: tuple[int, int, int]
    channels: int
    spacing: Array
    present: Array

    def coarse(self, ratio: float) -> Array:
        """bool [3]: the axis of thick slices, where its spacing exceeds `ratio` times the next; else none. 0: never."""
        if ratio <= 0:
            return jnp.zeros(3, bool)
        order = jnp.sort(self.spacing)
        return (jnp.arange(3) == jnp.argmax(self.spacing)) & (order[2] > ratio * order[1])


@dataclass(frozen=True, kw_only=True)
class Transform:
    """Options of a transform. `plan` draws what an example gets; `apply` does it to those of a batch that get it.

    Attributes:
      p: share of the examples that get it.
    """

    p: float = 1.0
    name: ClassVar[str] = ""
    keyed: ClassVar[bool] = False  # whether it draws a number a voxel

    def __post_init__(self) -> None:
        share("p", self.p)

    def plan(self, draw: Draws, scene: Scene) -> Any:
        """What one example gets: arrays, none of a volume's size."""
        raise NotImplementedError

    def apply(self, batch: Batch, plan: Any, keys: Array | None, masks: Sequence[str]) -> Batch:
        """The batch with the transform done.

        Args:
          plan: as of `plan`, with the axis [B] in front. keys: uint32 [B, 2], key data, if `keyed`.
          masks: keys of the batch that hold masks [B, X, Y, Z].
        """
        raise NotImplementedError


class OnImage(Transform):
    """A transform that changes intensities only."""

    def apply(self, batch: Batch, plan: Any, keys: Array | None, masks: Sequence[str]) -> Batch:
        return {**batch, "image": self.image(batch["image"], plan, keys)}

    def image(self, image: Array, plan: Any, keys: Array | None) -> Array:
        raise NotImplementedError


# Checks of options raise ValueError; the policy puts the place in the config in front.


def share(name: str, value: Any) -> None:
    number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value}: a share between 0 and 1 is needed")


def number(name: str, value: Any, low: float = float("-inf")) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < float("inf"):
        raise ValueError(f"{name}={value!r}: a number{'' if low == float('-inf') else f' from {low:g} on'} is needed")


def interval(name: str, value: Any, low: float = float("-inf")) -> None:
    if not isinstance(value, tuple) or len(value) != 2:
        raise ValueError(f"{name}={value!r}: (lowest, highest) is needed")
    for v in value:
        number(name, v, low)
    if value[0] > value[1]:
        raise ValueError(f"{name}={value}: the lowest value comes first")


def one_of(name: str, value: Any, known: Sequence[Any]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r}: one of {', '.join(map(repr, known))} is needed")


def triple(name: str, value: Any, low: float = float("-inf")) -> tuple[float, float, float]:
    """A number for each axis, from one for all or from three."""
    values = value if isinstance(value, tuple) else (value,) * 3
    if len(values) != 3:
        raise ValueError(f"{name}={value}: one number, or three for the axes x, y, z")
    for v in values:
        number(name, v, low)
    return values


def axes(name: str, value: Any) -> None:
    if not isinstance(value, tuple) or any(a not in (0, 1, 2) for a in value):
        raise ValueError(f"{name}={value}: axes are 0, 1 and 2")
