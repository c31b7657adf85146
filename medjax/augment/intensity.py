"""Transforms of intensities. Channels that an example lacks (`batch['modality']` False) are left alone.

Arithmetic is in float32 whatever the image's type. Images are expected to be normalised to about zero mean and unit
deviation; what needs a magnitude (Rician noise, bias fields) counts from each channel's minimum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from medjax.augment.base import INSIDE, Batch, Draws, OnImage, Scene, interval, number, one_of, share
from medjax.ops import normal, separable, tone, warp
from medjax.ops.gated import chosen

_VOXELS = (0, 1, 2)


def normal_like(key: Array, image: Array) -> Array:
    """Standard normal numbers, float32, of the image's shape. `key`: key data."""
    return normal.normal(key[None], image.size).reshape(image.shape)


def mean_inside(x: Array, inside: Array) -> Array:
    """Mean [C] of x [X, Y, Z, C] over the voxels of `inside` [X, Y, Z]; 0 where there are none."""
    return jnp.where(inside[..., None], x, 0.0).sum(_VOXELS) / jnp.maximum(inside.sum(), 1)


class PerChannel(OnImage):
    """A transform that each channel gets or not, with probability `p_channel`, where the example gets it."""

    p_channel: float

    def on(self, draw: Draws, scene: Scene) -> Array:
        """bool [C]."""
        return draw.chance(self.p) & draw.chance(self.p_channel, (scene.channels,)) & scene.present


@dataclass(frozen=True, kw_only=True)
class Noise(PerChannel):
    """Adds Gaussian noise; its deviation is uniform in [0, `std`], or its variance in `variance` where given."""

    std: float = 0.1
    variance: tuple[float, float] | None = None
    p_channel: float = 1.0
    name: ClassVar[str] = "noise"
    keyed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        number("std", self.std, 0)
        if self.variance is not None:
            interval("variance", self.variance, 0)
        share("p_channel", self.p_channel)

    def plan(self, draw: Draws, scene: Scene) -> Any:
        on, u = self.on(draw, scene), draw.uniform()
        if self.variance is None:
            return on, u * self.std
        low, high = self.variance
        return on, jnp.sqrt(low + (high - low) * u)

    def image(self, image: Array, plan: Any, keys: Array | None) -> Array:
        def one(x: Array, key: Array, on: Array, std: Array) -> Array:
            return jnp.where(on, (x + std * normal_like(key, x)).astype(x.dtype), x)

        on, std = plan
        assert keys is not None
        return chosen(one, jnp.any(on, axis=1), image, keys, on, std)


@dataclass(frozen=True, kw_only=True)
class Rician(PerChannel):
    """Noise of magnitude images: √((x + n₁)² + n₂²), x counted from the channel's minimum.

    The deviation of n₁ and n₂ is uniform in [0, `std`].
    """

    std: float = 0.1
    p_channel: float = 1.0
    name: ClassVar[str] = "rician"
    keyed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        number("std", self.std, 0)
        share("p_channel", self.p_channel)

    def plan(self, draw: Draws, scene: Scene) -> Any:
        return self.on(draw, scene), draw.uniform(0.0, self.std)

    def image(self, image: Array, plan: Any, keys: Array | None) -> Array:
        def one(x: Array, key: Array, on: Array, std: Array) -> Array:
            low = x.min(_VOXELS).astype(jnp.float32)
            first, second = normal_like(key, x), normal_like(key ^ jnp.uint32(1), x)
            noisy = jnp.sqrt(jnp.square(x - low + std * first) + jnp.square(std * second)) + low
            return jnp.where(on, noisy.astype(x.dtype), x)

        on, std = plan
        assert keys is not None
        return chosen(one, jnp.any(on, axis=1), image, keys, on, std)


@dataclass(frozen=True, kw_only=True)
class Blur(PerChannel):
    """Gaussian blur, its deviation uniform in `sigma`, drawn for each channel and axis.

    `unit`: 'voxel', or 'mm' (then at most `widest` voxels, which fixes the size of the kernel).
    """

    sigma: tuple[float, float] = (0.5, 1.0)
    unit: str = "voxel"
    widest: float = 4.0
    p_channel: float = 1.0
    name: ClassVar[str] = "blur"

    def __post_init__(self) -> None:
        super().__post_init__()
        interval("sigma", self.sigma, 0)
        one_of("unit", self.unit, ("voxel", "mm"))
        number("widest", self.widest, 0)
        share("p_channel", self.p_channel)

    def plan(self, draw: Draws, scene: Scene) -> Any:
        on, sigma = self.on(draw, scene), draw.uniform(*self.sigma, (scene.channels, 3))
        largest = self.sigma[1]
        if self.unit == "mm":
            largest = self.widest
            sigma = jnp.minimum(sigma / scene.spacing, largest)
        return on, [
            jax.vmap(lambda s, n=n: separable.gaussian(n, s, largest))(sigma[:, a]) for a, n in enumerate(scene.shape)
        ]

    def image(self, image: Array, plan: Any, keys: Array | None) -> Array:
        return separable.separable(image, *plan)


@dataclass(frozen=True, kw_only=True)
class LowResolution(PerChannel):
    """Coarser voxels, picked, then interpolated linearly back onto the grid.

    Attributes:
      factor: what the number of voxels along an axis is multiplied by, uniform in (lowest, highest), at most 1.
      axes: 'all' by one factor, 'each' by its own, 'one' axis at random, 'some': each axis with probability ½.
      mm: instead of `factor`, the voxel size is drawn uniformly in (lowest, highest) mm; `factor` then bounds it.
      smooth: blur first, as a slice of that thickness would: deviation 0.733 coarse voxels (Billot et al. 2023).
      inplane: the axis of thick slices is left alone where its spacing exceeds this many times the next; 0: never.
    """

    factor: tuple[float, float] = (0.5, 1.0)
    axes: str = "all"
    mm: tuple[float, float] | None = None
    smooth: bool = False
    inplane: float = 3.0
    p_channel: float = 1.0
    name: ClassVar[str] = "low_resolution"

    def __post_init__(self) -> None:
        super().__post_init__()
        interval("factor", self.factor, 0.01)
        if self.factor[1] > 1:
            raise ValueError(f"factor={self.factor}: above 1 would be a finer grid")
        one_of("axes", self.axes, ("all", "each", "one", "some"))
        if self.mm is not None:
            interval("mm", self.mm, 0)
        number("inplane", self.inplane, 0)
        share("p_channel", self.p_channel)

    def plan(self, draw: Draws, scene: Scene) -> Any:
        channels = scene.channels
        on, u = self.on(draw, scene), draw.uniform(shape=(channels, 1 if self.axes == "all" else 3))
        low, high = self.factor if self.mm is None else self.mm
        drawn = jnp.broadcast_to(low + (high - low) * u, (channels, 3))
        factor = drawn if self.mm is None else jnp.clip(scene.spacing / drawn, self.factor[0], 1.0)
        if self.axes == "one":
            factor = jnp.where(jnp.arange(3) == draw.index(3, (channels, 1)), factor, 1.0)
        elif self.axes == "some":
            factor = jnp.where(draw.chance(0.5, (channels, 3)), factor, 1.0)
        factor = jnp.where(scene.coarse(self.inplane), 1.0, factor)
        taps = [jax.vmap(lambda f, n=n: separable.coarse(n, f))(factor[:, a]) for a, n in enumerate(scene.shape)]
        blur = []
        if self.smooth:
            sigma, largest = jnp.where(factor < 1, 0.733 / factor, 0.0), 0.733 / self.factor[0]
            blur = [
                jax.vmap(lambda s, n=n: separable.gaussian(n, s, largest))(sigma[:, a])
                for a, n in enumerate(scene.shape)
            ]
        return on, taps, blur

    def image(self, image: Array, plan: Any, keys: Array | None) -> Array:
        on, taps, blur = plan
        if blur:
            image = separable.separable(image, on, blur)
        return separable.separable(image, on, taps)


@dataclass(frozen=True, kw_only=True)
class Brightness(PerChannel):
    """Adds to each channel a constant from N(0, `std`²)."""

    std: float = 0.2
    p_channel: float = 1.0
    name: ClassVar[str] = "brightness"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("std", self.std, 0)
        share("p_channel", self.p_channel)

    def plan(self, draw: Draws, scene: Scene) -> Any:
        return self.on(draw, scene), self.std * draw.normal((scene.channels,))

    def image(self, image: Array, plan: Any, keys: Array | None) -> Array:
        on, offset = plan
        return tone.linear(image, on, jnp.ones_like(offset), offset)


@dataclass(frozen=True, kw_only=True)
class _Factor(PerChannel):
    """`low`, `high`: range of a channel's factor, uniform; `balanced`: below 1 in half of the cases."""

    low: float = 0.75
    high: float = 1.25
    balanced: bool = False
    p_channel: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        interval("(low, high)", (self.low, self.high), 0)
        share("p_channel", self.p_channel)

    def factor(self, draw: Draws, scene: Scene) -> Array:
        return (draw.about_one if self.balanced else draw.uniform)(self.low, self.high, (scene.channels,))

    def plan(self, draw: Draws, scene: Scene) -> Any:
        return self.on(draw, scene), self.factor(draw, scene)


@dataclass(frozen=True, kw_only=True)
class Multiply(_Factor):
    """Multiplies each channel by a factor."""

    name: ClassVar[str] = "multiply"

    def image(self, image: Array, plan: Any, keys: Array | None) -> Array:
        on, factor = plan
        return tone.linear(image, on, factor, jnp.zeros_like(factor))


@dataclass(frozen=True, kw_only=True)
class Contrast(_Factor):
    """Stretches each channel about its mean by a factor; `keep_range` clips to the values it had."""

    keep_range: bool = False
    name: ClassVar[str] = "contrast"

    def image(self, image: Array, plan: Any, keys: Array | None) -> Array:
        on, factor = plan
        return tone.linear(image, on, factor, jnp.zeros_like(factor), about_mean=True, keep_range=self.keep_range)


@dataclass(frozen=True, kw_only=True)
class Gamma(_Factor):
    """Power law on each channel scaled to 0..1, or on its inverse (`invert`).

    The exponent is log-uniform in [low, high]; `balanced`: uniform, below 1 in half of the cases. `keep_moments`: mean
    and deviation stay.
    """

    low: float = 0.7
    high: float = 1.5
    invert: bool = False
    keep_moments: bool = True
    name: ClassVar[str] = "gamma"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("low", self.low, 1e-3)

    def factor(self, draw: Draws, scene: Scene) -> Array:
        if self.balanced:
            return super().factor(draw, scene)
        return jnp.exp(draw.uniform(float(np.log(self.low)), float(np.log(self.high)), (scene.channels,)))

    def image(self, image: Array, plan: Any, keys: Array | None) -> Array:
        on, exponent = plan
        return tone.power(image, on, exponent, invert=self.invert, keep_moments=self.keep_moments)


@dataclass(frozen=True, kw_only=True)
class Bias(PerChannel):
    """Multiplies by the exponential of a smooth field, counted from the channel's minimum.

    Cubic B-splines over `points` control points an axis, from N(0, s²) with s uniform in [0, `std`].
    """

    std: float = 0.5
    points: int = 4
    p_channel: float = 1.0
    name: ClassVar[str] = "bias"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("std", self.std, 0)
        if not isinstance(self.points, int) or self.points < 4:
            raise ValueError(f"points={self.points}: cubic B-splines need a whole number of 4 control points or more")
        share("p_channel", self.p_channel)

    def plan(self, draw: Draws, scene: Scene) -> Any:
        on, std = self.on(draw, scene), draw.uniform(0.0, self.std)
        return on, std * draw.normal((self.points,) * 3 + (scene.channels,))

    def image(self, image: Array, plan: Any, keys: Array | None) -> Array:
        def one(x: Array, on: Array, control: Array) -> Array:
            low = x.min(_VOXELS).astype(jnp.float32)
            field = jnp.exp(warp.spline_field(control, x.shape[:3]))
            return jnp.where(on, ((x - low) * field + low).astype(x.dtype), x)

        on, control = plan
        return chosen(one, jnp.any(on, axis=1), image, on, control)


@dataclass(frozen=True, kw_only=True)
class Histogram(PerChannel):
    """A random increasing map of each channel's range onto itself, linear between `points` places.

    The rises between them are log-normal with deviation `strength`, in shares of the range.
    """

    points: int = 10
    strength: float = 0.3
    p_channel: float = 1.0
    name: ClassVar[str] = "histogram"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.points, int) or self.points < 2:
            raise ValueError(f"points={self.points}: a whole number from 2 on is needed")
        number("strength", self.strength, 0)
        share("p_channel", self.p_channel)

    def plan(self, draw: Draws, scene: Scene) -> Any:
        rises = jnp.exp(self.strength * draw.normal((self.points - 1, scene.channels)))
        return self.on(draw, scene), rises / rises.sum(0)

    def image(self, image: Array, plan: Any, keys: Array | None) -> Array:
        def one(x: Array, on: Array, rises: Array) -> Array:
            low, high = (f(_VOXELS).astype(jnp.float32) for f in (x.min, x.max))
            width = jnp.maximum(high - low, 1e-6)
            at = (x - low) / width * (self.points - 1)
            mapped = sum(rises[j] * jnp.clip(at - j, 0, 1) for j in range(self.points - 1))
            return jnp.where(on, (mapped * width + low).astype(x.dtype), x)

        on, rises = plan
        return chosen(one, jnp.any(on, axis=1), image, on, rises)


@dataclass(frozen=True, kw_only=True)
class Cutout(OnImage):
    """Blanks `boxes` boxes in all channels; each side is uniform in `size` times the patch's. Masks stay.

    `fill`: 'zero' or the channel's 'mean'.
    """

    boxes: int = 1
    size: tuple[float, float] = (0.1, 0.3)
    fill: str = "zero"
    name: ClassVar[str] = "cutout"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.boxes, int) or self.boxes < 1:
            raise ValueError(f"boxes={self.boxes}: a whole number from 1 on is needed")
        interval("size", self.size, 0)
        one_of("fill", self.fill, ("zero", "mean"))

    def plan(self, draw: Draws, scene: Scene) -> Any:
        on, centre = draw.chance(self.p), draw.uniform(shape=(self.boxes, 3))
        return on & jnp.any(scene.present), centre, draw.uniform(*self.size, (self.boxes, 3)), scene.present

    def image(self, image: Array, plan: Any, keys: Array | None) -> Array:
        def one(x: Array, centre: Array, size: Array, present: Array) -> Array:
            blank = jnp.zeros(x.shape[:3], bool)
            for i in range(self.boxes):
                blank |= inside_box(x.shape[:3], centre[i], size[i])
            fill = x.astype(jnp.float32).mean(_VOXELS) if self.fill == "mean" else jnp.zeros(())
            return jnp.where(blank[..., None] & present, fill.astype(x.dtype), x)

        on, *rest = plan
        return chosen(one, on, image, *rest)


def inside_box(shape: Any, centre: Array, size: Array) -> Array:
    """bool [X, Y, Z]: voxels whose place, as a share of the patch, is within `size` / 2 of `centre` [3]."""
    inside = jnp.ones((), bool)
    for axis, n in enumerate(shape):
        near = jnp.abs((jnp.arange(n) + 0.5) / n - centre[axis]) <= size[axis] / 2
        inside = inside & near.reshape([n if i == axis else 1 for i in range(3)])
    return inside


@dataclass(frozen=True, kw_only=True)
class Standardize(OnImage):
    """Brings each channel to zero mean and unit deviation.

    After 'paint' those of the volume without what it is padded with, which is set to 0: as a volume that was normalised
    before it was padded.
    """

    name: ClassVar[str] = "standardize"

    def plan(self, draw: Draws, scene: Scene) -> Any:
        return draw.chance(self.p) & scene.present

    def apply(self, batch: Batch, plan: Any, keys: Array | None, masks: Sequence[str]) -> Batch:
        if INSIDE not in batch:
            return super().apply(batch, plan, keys, masks)

        def one(x: Array, on: Array, inside: Array) -> Array:
            v = x.astype(jnp.float32)
            v = v - mean_inside(v, inside)
            unit = v / jnp.maximum(jnp.sqrt(mean_inside(jnp.square(v), inside)), 1e-6)
            return jnp.where(on, jnp.where(inside[..., None], unit, 0.0).astype(x.dtype), x)

        return {**batch, "image": chosen(one, jnp.any(plan, axis=1), batch["image"], plan, batch[INSIDE])}

    def image(self, image: Array, plan: Any, keys: Array | None) -> Array:
        def one(x: Array, on: Array) -> Array:
            v = x.astype(jnp.float32)
            return jnp.where(on, ((v - v.mean(_VOXELS)) / jnp.maximum(v.std(_VOXELS), 1e-6)).astype(x.dtype), x)

        return chosen(one, jnp.any(plan, axis=1), image, plan)
