"""Transforms across examples, and of which channels there are.

Mixing pairs neighbours: examples 2m and 2m + 1 of the global order, which lie in one batch on one device where the rows
of a device are an even number. So the outcome depends on (seed, example number) and on nothing else.

What may be mixed is a matter of what targets mean. A mask can be cut and pasted. A number can be blended only if its
owner says so (`blend`): half of a stage II is nothing. Tables of instances can be neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array, lax

from medjax.augment.base import INSIDE, Batch, Draws, Scene, Transform, interval, share
from medjax.augment.intensity import inside_box
from medjax.errors import UserError
from medjax.ops.gated import chosen


def _targets(batch: Batch, masks: Sequence[str], name: str, blend: Sequence[str], *, pastes: bool) -> list[str]:
    """Keys of the targets to be mixed; refuses those that cannot be."""
    keys = [key for key in batch if key.endswith("/target")]
    for key in batch:
        if key.endswith("/table"):
            raise UserError(f"config: augment '{name}': task '{key[:-6]}' describes instances, which cannot be mixed")
    known = {key.removesuffix("/target") for key in keys}
    if unknown := sorted(set(blend) - known):
        raise UserError(
            f"config: augment '{name}': blend names '{unknown[0]}', which is no task; tasks: {', '.join(sorted(known))}"
        )
    for key in keys:
        task, kind = key.removesuffix("/target"), batch[key].dtype
        if key in masks:
            if pastes or (task in blend and jnp.issubdtype(kind, jnp.floating)):
                continue
            raise UserError(
                f"config: augment '{name}': the mask of task '{task}' cannot be blended; 'cutmix' cuts and pastes masks"
            )
        if task not in blend:
            raise UserError(
                f"config: augment '{name}': the target of task '{task}' is one value an example. If a weighted mean of "
                f"two of them means something, say so with blend=('{task}',); else leave '{name}' out"
            )
        if not jnp.issubdtype(kind, jnp.floating):
            raise UserError(
                f"config: augment '{name}': the target of task '{task}' is {kind}; only real numbers can be blended"
            )
    if batch["image"].shape[0] % 2:
        raise UserError(
            f"config: augment '{name}' mixes neighbours and needs an even number of examples on each device, not "
            f"{batch['image'].shape[0]}: change data.batch_size"
        )
    return keys


def _partner(x: Array) -> Array:
    """Rows 1, 0, 3, 2..."""
    return x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)


def _alike(batch: Batch) -> Array:
    """bool [B]: whether both of a pair are real, have the same channels and labels for the same tasks."""
    alike = jnp.ones(batch["image"].shape[0], bool)
    for key, value in batch.items():
        if key == "modality" or key.endswith("/mask"):
            alike &= jnp.all((value == _partner(value)).reshape(value.shape[0], -1), axis=1)
        elif key == "valid":
            alike &= value & _partner(value)
    return alike


def _mixed(batch: Batch, gate: Array, function: Any, keys: Sequence[str], *operands: Array) -> Batch:
    """`function(own, partner's, *operands)` of the chosen examples' image and targets."""

    def do(values: list[Array]) -> list[Array]:
        return [chosen(function, gate, v, _partner(v), *operands) for v in values]

    names = ["image", *keys, *[k for k in (INSIDE,) if k in batch]]
    done = lax.cond(jnp.any(gate), do, list, [batch[k] for k in names])
    return {**batch, **dict(zip(names, done, strict=True))}


@dataclass(frozen=True, kw_only=True)
class CutMix(Transform):
    """Pastes a box of the neighbour, image and masks alike; each side is uniform in `size` times the patch's.

    `blend`: tasks of one real number an example, which becomes the mean weighted by volume.
    """

    size: tuple[float, float] = (0.2, 0.6)
    blend: tuple[str, ...] = ()
    name: ClassVar[str] = "cutmix"

    def __post_init__(self) -> None:
        super().__post_init__()
        interval("size", self.size, 0)

    def plan(self, draw: Draws, scene: Scene) -> Any:
        size = draw.uniform(*self.size, (3,))
        return draw.chance(self.p), draw.uniform(shape=(3,)) * (1 - size) + size / 2, size

    def apply(self, batch: Batch, plan: Any, keys: Array | None, masks: Sequence[str]) -> Batch:
        targets = _targets(batch, masks, self.name, self.blend, pastes=True)
        on, centre, size = plan

        def one(own: Array, other: Array, centre: Array, size: Array) -> Array:
            if own.ndim < 3:
                pasted = inside_box(batch["image"].shape[1:4], centre, size).mean()
                return ((1 - pasted) * own + pasted * other).astype(own.dtype)
            inside = inside_box(own.shape[:3], centre, size)
            return jnp.where(inside.reshape(inside.shape + (1,) * (own.ndim - 3)), other, own)

        return _mixed(batch, on & _alike(batch), one, targets, centre, size)


@dataclass(frozen=True, kw_only=True)
class MixUp(Transform):
    """The weighted mean with the neighbour; the example's own weight is uniform in [`low`, 1].

    `blend`: the tasks whose real numbers (or volumes of real numbers) are averaged with the same weight.
    """

    low: float = 0.5
    blend: tuple[str, ...] = ()
    name: ClassVar[str] = "mixup"

    def __post_init__(self) -> None:
        super().__post_init__()
        share("low", self.low)

    def plan(self, draw: Draws, scene: Scene) -> Any:
        return draw.chance(self.p), draw.uniform(self.low, 1.0)

    def apply(self, batch: Batch, plan: Any, keys: Array | None, masks: Sequence[str]) -> Batch:
        targets = _targets(batch, masks, self.name, self.blend, pastes=False)
        on, weight = plan

        def one(own: Array, other: Array, weight: Array) -> Array:
            return (weight * own + (1 - weight) * other).astype(own.dtype)

        return _mixed(batch, on & _alike(batch), one, targets, weight)


@dataclass(frozen=True, kw_only=True)
class ModalityDropout(Transform):
    """Takes each channel that is there away with probability `p_channel`, never the last: zeros, 'modality' False."""

    p_channel: float = 0.25
    name: ClassVar[str] = "modality_dropout"

    def __post_init__(self) -> None:
        super().__post_init__()
        share("p_channel", self.p_channel)

    def plan(self, draw: Draws, scene: Scene) -> Any:
        lost = draw.chance(self.p) & draw.chance(self.p_channel, (scene.channels,)) & scene.present
        kept = jnp.argmax(jnp.where(scene.present, draw.uniform(shape=(scene.channels,)), -1.0))
        return lost & (jnp.arange(scene.channels) != kept)

    def apply(self, batch: Batch, plan: Any, keys: Array | None, masks: Sequence[str]) -> Batch:
        def one(x: Array, lost: Array) -> Array:
            return jnp.where(lost, jnp.zeros((), x.dtype), x)

        image = chosen(one, jnp.any(plan, axis=1), batch["image"], plan)
        present = batch.get("modality", jnp.ones(plan.shape, bool))
        return {**batch, "image": image, "modality": present & ~plan}
