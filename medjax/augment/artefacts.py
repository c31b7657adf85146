"""Artefacts of magnetic resonance imaging, as they arise: in the plane of spatial frequencies (k-space).

An operation on lines of k-space along one axis that treats +k and -k alike is a real circular convolution along that
axis. Others leave an imaginary part, which a real image does not show; what remains is again such a convolution, with
the mean of the responses at +k and -k. So no Fourier transform of a volume is needed: an axis is one matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from medjax.augment.base import Draws, OnImage, Scene, interval, number, one_of
from medjax.augment.spatial import in_voxels, rotation
from medjax.ops import warp
from medjax.ops.gated import chosen

_VOXELS = (0, 1, 2)


def frequencies(size: int) -> np.ndarray:
    """Whole cycles a field of view [size], in the order of a discrete Fourier transform: 0, 1, ..., -2, -1."""
    return np.round(np.fft.fftfreq(size) * size).astype(np.int32)


def filtered(image: Array, axis: int, response: Array) -> Array:
    """Image [X, Y, Z, C] with its frequencies along `axis` multiplied by `response` [N], even in the frequency."""
    n = image.shape[axis]
    turns = np.outer(np.arange(n), np.arange(n)) % n
    kernel = jnp.sum(np.cos(2 * np.pi * turns / n).astype(np.float32) * response, axis=1) / n
    matrix = kernel[(np.arange(n)[:, None] - np.arange(n)) % n]
    x = image.astype(jnp.float32)
    return jnp.moveaxis(jnp.tensordot(matrix, x, (1, axis), precision=lax.Precision.HIGHEST), 0, axis)


def along(axis: Array, image: Array, response: Any) -> Array:
    """`filtered` along an axis known at run time; `response(n)` gives the response of an axis of n voxels."""
    return lax.switch(axis, [lambda x, a=a: filtered(x, a, response(x.shape[a])) for a in range(3)], image)


class Artefact(OnImage):
    """One that an example gets with its real channels alike."""

    def on(self, draw: Draws, scene: Scene) -> Array:
        """bool [C]."""
        return draw.chance(self.p) & scene.present


@dataclass(frozen=True, kw_only=True)
class Ghosting(Artefact):
    """Copies along a random axis: every n-th line of k-space is weakened by `intensity`, save about the centre.

    n, drawn from `ghosts` (fewest, most), is the number of copies.
    """

    intensity: tuple[float, float] = (0.3, 0.8)
    ghosts: tuple[int, int] = (2, 8)
    name: ClassVar[str] = "ghosting"

    def __post_init__(self) -> None:
        super().__post_init__()
        interval("intensity", self.intensity, 0)
        interval("ghosts", self.ghosts, 2)

    def plan(self, draw: Draws, scene: Scene) -> Any:
        low, high = self.ghosts
        on, count = self.on(draw, scene), low + draw.index(int(high - low) + 1)
        return on, draw.index(3), count, draw.uniform(*self.intensity)

    def image(self, image: Array, plan: Any, keys: Array | None) -> Array:
        def one(x: Array, on: Array, axis: Array, count: Array, intensity: Array) -> Array:
            def response(n: int) -> Array:
                k = frequencies(n)
                return jnp.where((k % count == 0) & (np.abs(k) > 0.01 * n), 1 - intensity, 1.0)

            return jnp.where(on, along(axis, x, response).astype(x.dtype), x)

        on, *rest = plan
        return chosen(one, jnp.any(on, axis=1), image, on, *rest)


@dataclass(frozen=True, kw_only=True)
class Gibbs(Artefact):
    """Ringing at edges: frequencies beyond a share of the highest, uniform in `keep`, are lost along random axes.

    Each axis has probability ½, one at least.
    """

    keep: tuple[float, float] = (0.4, 0.8)
    name: ClassVar[str] = "gibbs"

    def __post_init__(self) -> None:
        super().__post_init__()
        interval("keep", self.keep, 0)

    def plan(self, draw: Draws, scene: Scene) -> Any:
        on, keep = self.on(draw, scene), draw.uniform(*self.keep)
        lost = draw.chance(0.5, (3,)) | (jnp.arange(3) == draw.index(3))
        return on, jnp.where(lost, keep, 1.0)

    def image(self, image: Array, plan: Any, keys: Array | None) -> Array:
        def one(x: Array, on: Array, keep: Array) -> Array:
            y = x.astype(jnp.float32)
            for axis in range(3):
                k = frequencies(x.shape[axis])
                y = filtered(y, axis, (np.abs(k) <= keep[axis] * (x.shape[axis] / 2)).astype(jnp.float32))
            return jnp.where(on, y.astype(x.dtype), x)

        on, keep = plan
        return chosen(one, jnp.any(on, axis=1), image, on, keep)


@dataclass(frozen=True, kw_only=True)
class Spike(Artefact):
    """Stripes: one point of k-space, and its mirror image, is too bright.

    That adds a plane wave; its amplitude is uniform in `intensity` times the channel's deviation.
    """

    intensity: tuple[float, float] = (0.3, 1.5)
    name: ClassVar[str] = "spike"

    def __post_init__(self) -> None:
        super().__post_init__()
        interval("intensity", self.intensity, 0)

    def plan(self, draw: Draws, scene: Scene) -> Any:
        on, half = self.on(draw, scene), np.array(scene.shape) // 2
        k = jnp.round(draw.uniform(-1.0, 1.0, (3,)) * half)
        return on, k, draw.uniform(0.0, 2 * np.pi), draw.uniform(*self.intensity)

    def image(self, image: Array, plan: Any, keys: Array | None) -> Array:
        def one(x: Array, on: Array, k: Array, phase: Array, intensity: Array) -> Array:
            turns = jnp.zeros(())
            for axis, n in enumerate(x.shape[:3]):
                place = jnp.arange(n, dtype=jnp.float32).reshape([n if i == axis else 1 for i in range(3)])
                turns = turns + jnp.mod(k[axis] * place, n) / n
            wave = jnp.cos(2 * np.pi * turns + phase)[..., None]
            amplitude = intensity * x.astype(jnp.float32).std(_VOXELS)
            return jnp.where(on, (x + amplitude * wave).astype(x.dtype), x)

        on, *rest = plan
        return chosen(one, jnp.any(on, axis=1), image, on, *rest)


@dataclass(frozen=True, kw_only=True)
class Motion(Artefact):
    """The patient moves `moves` times while the lines of k-space along a random axis are read, one after the other.

    Angles are uniform in ±`degrees`, displacements in ±`mm`, along each axis. In the middle of the scan, where the
    lines that make up the image's bulk are read, the patient lies as the mask has it.
    """

    degrees: float = 5.0
    mm: float = 5.0
    moves: int = 2
    name: ClassVar[str] = "motion"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("degrees", self.degrees, 0)
        number("mm", self.mm, 0)
        one_of("moves", self.moves, (1, 2, 3, 4, 5, 6))

    def plan(self, draw: Draws, scene: Scene) -> Any:
        on, axis = self.on(draw, scene), draw.index(3)
        times = jnp.sort(draw.uniform(0.05, 0.95, (self.moves,)))
        still = jnp.sum(times < 0.5)  # moves before the middle
        angles = draw.uniform(-self.degrees, self.degrees, (self.moves + 1, 3))
        shifts = draw.uniform(-self.mm, self.mm, (self.moves + 1, 3)) / scene.spacing
        moving = (jnp.arange(self.moves + 1) != still)[:, None]
        matrices = jax.vmap(lambda a: in_voxels(rotation(jnp.deg2rad(a)), scene.spacing))(angles)
        matrices = jnp.where(moving[..., None], matrices, jnp.eye(3))
        return on, axis, times, matrices, jnp.where(moving, shifts, 0.0)

    def image(self, image: Array, plan: Any, keys: Array | None) -> Array:
        def one(x: Array, on: Array, axis: Array, times: Array, matrices: Array, shifts: Array) -> Array:
            starts, ends = jnp.append(jnp.zeros(1), times), jnp.append(times, jnp.full(1, 2.0))
            gate = jnp.ones(1, bool)

            def response(n: int, start: Array, end: Array) -> Array:
                place = frequencies(n) / n + 0.5  # when a line is read, as a share of the scan
                read = ((place >= start) & (place < end)).astype(jnp.float32)
                return (read + read[-np.arange(n) % n]) / 2

            total = jnp.zeros(x.shape, jnp.float32)
            for i in range(self.moves + 1):
                pose = warp.Pose(gate, matrices[i][None], shifts[i][None])
                moved = warp.warp_image(x[None], pose)[0]
                total += along(axis, moved, lambda n, i=i: response(n, starts[i], ends[i]))
            return jnp.where(on, total.astype(x.dtype), x)

        on, *rest = plan
        return chosen(one, jnp.any(on, axis=1), image, on, *rest)
