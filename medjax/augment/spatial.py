"""Transforms that move voxels. Neighbours in a policy are one map, so that an image is interpolated once.

Matrices map output to input voxels about the patch's centre. They are made in millimetres: a rotation turns
millimetres, not voxels. In-plane mode: where the spacing along one axis is more than `inplane` times the next smaller
(0: never), that axis is left alone, as what would be interpolated between thick slices is not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from medjax.augment.base import INSIDE, Batch, Draws, Scene, Transform, axes, interval, number, share, triple
from medjax.errors import UserError
from medjax.ops import warp
from medjax.ops.gated import chosen

# Cubic B-splines on a grid of spacing h fold nowhere if no control point moves by more than 0.4033 h (Choi & Lee,
# "Injectivity conditions of 2D and 3D uniform cubic B-spline functions", Graphical Models 62, 2000).
_FOLD_FREE = 0.4
_LABEL = 6  # column of the label in a table of findings


class Move(NamedTuple):
    """Where one example's voxels come from; see `warp.Pose`. `flipped`: bool [3], the axes that are mirrored."""

    on: Array
    matrix: Array
    shift: Array
    control: Array | None
    flipped: Array


def move(
    on: Array, matrix: Array | None = None, shift: Array | None = None, control: Array | None = None,
    flipped: Array | None = None,
) -> Move:  # fmt: skip
    """A move that is the identity where `on` is False."""
    return Move(
        on,
        jnp.where(on, jnp.eye(3) if matrix is None else matrix, jnp.eye(3)),
        jnp.where(on, jnp.zeros(3) if shift is None else shift, 0.0),
        None if control is None else jnp.where(on, control, 0.0),
        jnp.zeros(3, bool) if flipped is None else flipped & on,
    )


def times(a: Array, b: Array) -> Array:
    """Product of matrices [3, 3], or of a matrix and a vector [3], without a matrix unit's rounding."""
    return jnp.sum(a * b, axis=1) if b.ndim == 1 else jnp.sum(a[:, :, None] * b, axis=1)


def rotation(angles: Array) -> Array:
    """Rx @ Ry @ Rz of angles [3] in radians."""
    (cx, cy, cz), (sx, sy, sz) = jnp.cos(angles), jnp.sin(angles)
    one, nil = jnp.ones(()), jnp.zeros(())
    rx = jnp.stack([one, nil, nil, nil, cx, -sx, nil, sx, cx]).reshape(3, 3)
    ry = jnp.stack([cy, nil, sy, nil, one, nil, -sy, nil, cy]).reshape(3, 3)
    rz = jnp.stack([cz, -sz, nil, sz, cz, nil, nil, nil, one]).reshape(3, 3)
    return times(times(rx, ry), rz)


def in_voxels(matrix: Array, spacing: Array) -> Array:
    """A map of millimetres as one of voxels."""
    return matrix * spacing[None, :] / spacing[:, None]


class Spatial(Transform):
    """A transform whose plan is a `Move`."""

    def plan(self, draw: Draws, scene: Scene) -> Move:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Mirror(Spatial):
    """Flips each of `axes` with probability p: 0 left/right, 1 posterior/anterior, 2 inferior/superior.

    `swap`: label values that trade places where axis 0 is flipped, ((left, right), ...) in every label map, or
    (('task', left, right), ...) in one task's; of findings, whose masks number them, the labels in their table.
    """

    p: float = 0.5
    axes: tuple[int, ...] = (0, 1, 2)
    swap: tuple[tuple[Any, ...], ...] = ()
    name: ClassVar[str] = "mirror"

    def __post_init__(self) -> None:
        share("p", self.p)
        axes("mirror", self.axes)
        for pair in self.swap:
            values = pair[1:] if isinstance(pair, tuple) and pair and isinstance(pair[0], str) else pair
            if not isinstance(values, tuple) or len(values) != 2 or not all(isinstance(v, int) for v in values):
                raise ValueError(f"swap={self.swap}: pairs of label values are needed: ((left, right), ...)")

    def plan(self, draw: Draws, scene: Scene) -> Move:
        flipped = draw.chance(self.p, (3,)) & np.isin(np.arange(3), self.axes)
        return move(jnp.any(flipped), jnp.diag(jnp.where(flipped, -1.0, 1.0)), flipped=flipped)


@dataclass(frozen=True, kw_only=True)
class Rotate(Spatial):
    """Turns by angles about x, y, z, each uniform in ±`degrees` (one number, or three).

    In-plane mode: by one angle, uniform in ±`inplane_degrees`, about the axis of the thick slices.
    """

    degrees: Any = 30.0
    inplane: float = 3.0
    inplane_degrees: float = 180.0
    name: ClassVar[str] = "rotate"

    def __post_init__(self) -> None:
        super().__post_init__()
        triple("degrees", self.degrees, 0)
        number("inplane", self.inplane, 0)
        number("inplane_degrees", self.inplane_degrees, 0)

    def plan(self, draw: Draws, scene: Scene) -> Move:
        on, u = draw.chance(self.p), draw.uniform(-1.0, 1.0, (3,))
        thick = scene.coarse(self.inplane)
        angles = u * np.array(triple("degrees", self.degrees), np.float32)
        angles = jnp.where(jnp.any(thick), jnp.where(thick, u * self.inplane_degrees, 0.0), angles)
        return move(on, in_voxels(rotation(jnp.deg2rad(angles)), scene.spacing))


@dataclass(frozen=True, kw_only=True)
class Scale(Spatial):
    """Enlarges by a factor uniform in `factor`, the same along all axes or one for each (`isotropic=False`).

    `reciprocal`: one over the factor is what is uniform.
    """

    factor: tuple[float, float] = (0.7, 1.4)
    isotropic: bool = True
    reciprocal: bool = False
    inplane: float = 3.0
    name: ClassVar[str] = "scale"

    def __post_init__(self) -> None:
        super().__post_init__()
        interval("factor", self.factor, 1e-3)
        number("inplane", self.inplane, 0)

    def plan(self, draw: Draws, scene: Scene) -> Move:
        on, u = draw.chance(self.p), draw.uniform(shape=(1,) if self.isotropic else (3,))
        low, high = self.factor
        steps = 1 / high + (1 / low - 1 / high) * u if self.reciprocal else 1 / (low + (high - low) * u)
        return move(on, jnp.diag(jnp.where(scene.coarse(self.inplane), 1.0, jnp.broadcast_to(steps, (3,)))))


@dataclass(frozen=True, kw_only=True)
class Shear(Spatial):
    """Each axis is moved along each other one by a share of the distance from the centre, uniform in ±`amount`."""

    amount: float = 0.1
    inplane: float = 3.0
    name: ClassVar[str] = "shear"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("amount", self.amount, 0)
        number("inplane", self.inplane, 0)

    def plan(self, draw: Draws, scene: Scene) -> Move:
        on, u = draw.chance(self.p), draw.uniform(-self.amount, self.amount, (3, 3))
        thick = scene.coarse(self.inplane)
        u = jnp.where(np.eye(3, dtype=bool) | thick[:, None] | thick[None, :], 0.0, u)
        return move(on, in_voxels(jnp.eye(3) + u, scene.spacing))


@dataclass(frozen=True, kw_only=True)
class Affine(Spatial):
    """Rotation, scaling and shear in one: the same as the three transforms with their probability in common.

    Attributes:
      rotate: degrees; each angle is uniform in ±rotate. scale: the factor is uniform in 1 ± scale. shear: see `Shear`.
    """

    rotate: Any = 15.0
    scale: float = 0.15
    shear: float = 0.0
    isotropic: bool = True
    inplane: float = 3.0
    name: ClassVar[str] = "affine"

    def __post_init__(self) -> None:
        super().__post_init__()
        triple("rotate", self.rotate, 0)
        share("scale", self.scale)
        number("shear", self.shear, 0)
        number("inplane", self.inplane, 0)

    def plan(self, draw: Draws, scene: Scene) -> Move:
        on = draw.chance(self.p)
        largest = max(triple("rotate", self.rotate))
        parts: list[Spatial] = [
            Rotate(degrees=self.rotate, inplane=self.inplane, inplane_degrees=largest),
            Scale(factor=(max(1 - self.scale, 1e-3), 1 + self.scale), isotropic=self.isotropic, inplane=self.inplane),
        ]
        if self.shear:
            parts.append(Shear(amount=self.shear, inplane=self.inplane))
        matrix = jnp.eye(3)
        for part in parts:
            matrix = times(matrix, part.plan(draw, scene).matrix)
        return move(on, matrix)


@dataclass(frozen=True, kw_only=True)
class Elastic(Spatial):
    """A smooth displacement: cubic B-splines over `points` control points an axis, moved by N(0, s²) mm.

    s is uniform in `std` (one number: that). No control point moves further than keeps the deformation from folding.
    """

    points: int = 7
    std: Any = (0.0, 4.0)
    inplane: float = 3.0
    name: ClassVar[str] = "elastic"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.points, int) or self.points < 4:
            raise ValueError(f"points={self.points}: cubic B-splines need a whole number of 4 control points or more")
        interval("std", self._std(), 0)
        number("inplane", self.inplane, 0)

    def _std(self) -> Any:
        return self.std if isinstance(self.std, tuple) else (self.std, self.std)

    def plan(self, draw: Draws, scene: Scene) -> Move:
        on, std = draw.chance(self.p), draw.uniform(*self._std())
        control = std * draw.normal((self.points,) * 3 + (3,)) / scene.spacing
        room = _FOLD_FREE * (np.array(scene.shape, np.float32) - 1) / (self.points - 3)
        control = jnp.clip(control, -room, room)
        return move(on, control=jnp.where(scene.coarse(self.inplane), 0.0, control))


@dataclass(frozen=True, kw_only=True)
class Shift(Spatial):
    """Moves by whole voxels, uniform in ±`fraction` of the patch along each axis: a crop a little beside."""

    fraction: float = 0.1
    name: ClassVar[str] = "shift"

    def __post_init__(self) -> None:
        super().__post_init__()
        share("fraction", self.fraction)

    def plan(self, draw: Draws, scene: Scene) -> Move:
        on, u = draw.chance(self.p), draw.uniform(-self.fraction, self.fraction, (3,))
        return move(on, shift=jnp.round(u * np.array(scene.shape, np.float32)))


class Joined(NamedTuple):
    """Neighbouring moves as one. `flipped`: of each of them, bool [3]."""

    pose: warp.Pose
    flipped: list[Array]


def join(moves: Sequence[Move]) -> Joined:
    """One example's neighbouring moves, the first done first, as one map.

    At most one has a displacement field; it lies on the output's grid.
    """
    matrix, shift = moves[0].matrix, moves[0].shift
    for following in moves[1:]:
        shift = times(matrix, following.shift) + shift
        matrix = times(matrix, following.matrix)
    on = jnp.any(jnp.stack([m.on for m in moves]))
    control = next((m.control for m in moves if m.control is not None), None)
    return Joined(warp.Pose(on, matrix, shift, control), [m.flipped for m in moves])


def apply(batch: Batch, transforms: Sequence[Transform], joined: Joined, masks: Sequence[str], labels: str) -> Batch:
    """Image and masks through the neighbouring `transforms` at once.

    Args:
      joined: of `join`, with the axis [B] in front. labels: how masks are taken, see `warp.warp_mask`.

    Where a mask numbers the instances of `<task>/table` [B, M, ...], `<task>/cut` bool [B, M] then says which of them
    the patch had cut before it was turned, stretched or bent.
    """
    pose = joined.pose
    out = {**batch, "image": warp.warp_image(batch["image"], pose)}
    if INSIDE in batch:
        out[INSIDE] = warp.warp_mask(batch[INSIDE], pose)
    for key in masks:
        if jnp.issubdtype(batch[key].dtype, jnp.floating):
            out[key] = warp.warp_image(batch[key][..., None], pose)[..., 0]
            continue
        out[key] = warp.warp_mask(batch[key], pose, labels)
        task = key.removesuffix("/target")
        table = f"{task}/table"
        if table in batch and not all(isinstance(t, Mirror) for t in transforms):
            # What the patch cuts may be turned away from its border, and would then pass for whole.
            cut = at_border(batch[key], batch[table].shape[1])
            out[f"{task}/cut"] = batch[f"{task}/cut"] | cut if f"{task}/cut" in batch else cut
        for transform, flipped in zip(transforms, joined.flipped, strict=True):
            if not isinstance(transform, Mirror):
                continue
            if table in batch:
                # The mask says which finding, the table which side.
                pairs = [p[-2:] for p in transform.swap if p[0] == task]
                names = out[table][..., _LABEL]
                sides = jnp.where(flipped[:, :1], _swapped(names, pairs), names)
                out[table] = out[table].at[..., _LABEL].set(sides) if pairs else out[table]
            elif pairs := _pairs(transform.swap, key, batch[key].dtype):
                out[key] = chosen(lambda m, pairs=pairs: _swapped(m, pairs), flipped[:, 0], out[key])
    return out


def at_border(mask: Array, count: int) -> Array:
    """bool [B, count]: whether instance i + 1 of a mask int [B, X, Y, Z] touches the patch's border."""
    faces = [lax.index_in_dim(mask, end, axis, keepdims=False) for axis in (1, 2, 3) for end in (0, -1)]
    shown = jnp.concatenate([face.reshape(len(mask), -1) for face in faces], axis=1)
    return (shown[:, None] == jnp.arange(1, count + 1, dtype=mask.dtype)[:, None]).any(axis=2)


def _pairs(swap: Sequence[tuple[Any, ...]], key: str, dtype: Any) -> list[tuple[int, int]]:
    """The pairs that hold for a label map of the batch, without those that its type says do not occur."""
    task = key.removesuffix("/target")
    pairs = [tuple(p[-2:]) for p in swap if not isinstance(p[0], str) or p[0] == task]
    limit = 1 if dtype == jnp.bool_ else jnp.iinfo(dtype).max
    for a, b in pairs:
        if min(a, b) <= limit < max(a, b):
            raise UserError(
                f"config: augment swap: the labels ({a}, {b}) are to trade places, but {max(a, b)} does not occur in "
                f"the masks of task '{task}', which hold values up to {limit} at most"
            )
    return [(a, b) for a, b in pairs if max(a, b) <= limit]


def _swapped(mask: Array, pairs: Sequence[tuple[Any, ...]]) -> Array:
    out = mask
    for a, b in pairs:
        there, back = jnp.asarray(b, mask.dtype), jnp.asarray(a, mask.dtype)
        out = jnp.where(mask == a, there, jnp.where(mask == b, back, out))
    return out
