"""Contrastive pretraining: two views of one volume are alike, in what is said of them or of each of their places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from medjax.augment import policy, spatial
from medjax.errors import UserError, warn_once
from medjax.losses import contrastive as losses
from medjax.models.pretext import ContrastHead
from medjax.tasks.pretext import Pretext

# What changes the look of a view: strong, since what a view shares with its partner is what is learnt.
_LOOKS: tuple[Any, ...] = (
    ("noise", {"p": 0.5, "variance": (0.0, 0.1)}),
    ("blur", {"p": 0.3, "sigma": (0.5, 1.5)}),
    ("multiply", {"p": 0.5, "low": 0.6, "high": 1.4}),
    ("gamma", {"p": 0.5, "low": 0.5, "high": 2.0}),
    ("cutout", {"p": 0.5, "boxes": 3}),
)


@dataclass(frozen=True)
class Contrastive(Pretext):
    """Two views of each patch: boxes of `crop` voxels at random places, mirrored at random, their look changed.

    Attributes:
      name: the task's name.
      method: 'simclr' (Chen et al. 2020): of all views in the batch, find the partner; or 'vicreg' (Bardes et al.
        2022): equal, but varied over the batch. Both want batches of many examples; the batch is what one accumulation
        round holds, over all devices.
      scope: 'global', vectors of the coarsest level as a whole; or 'local', vectors of places that both views show, for
        segmentation: the same place is the partner, all other places of all views are not (save those that lie in
        one voxel of the network's finest level).
      crop: voxels of a view along (x, y, z); empty: the whole patch. Locally more than half of the patch. A multiple of
        the network's total downsampling.
      mirror: axes along which a view is flipped with p ½.
      transforms: as `augment.transforms`; locally those that move no voxels.
      places: of 'local', how many are compared in each example.
      temperature: of 'simclr'. terms: of 'vicreg', weights of invariance, variance and covariance.
      features, hidden: of the projection.
      weight: of this task among several.
    """

    name: str
    method: str = "simclr"
    scope: str = "global"
    crop: Sequence[int] = ()
    mirror: Sequence[int] = (0,)
    transforms: Sequence[Any] = _LOOKS
    places: int = 64
    temperature: float = 0.1
    terms: Sequence[float] = (25.0, 25.0, 1.0)
    features: int = 64
    hidden: int = 128
    weight: float = 1.0

    metrics = ("error", "found")

    def __post_init__(self) -> None:
        self.one_of("method", ("simclr", "vicreg"))
        self.one_of("scope", ("global", "local"))
        self.from_to("features", 1)
        self.from_to("hidden", 1)
        if not self.temperature > 0:
            raise UserError(f"{self.where('temperature')}={self.temperature}: must be above 0")
        if len(self.terms) != 3 or self.places < 2 or not set(self.mirror) <= {0, 1, 2}:
            raise UserError(
                f"{self.where('terms')}={tuple(self.terms)}: three weights; places={self.places}: at least 2; "
                f"mirror={tuple(self.mirror)}: of the axes 0, 1 and 2"
            )
        if len(self.crop) not in (0, 3) or any(c < 1 for c in self.crop):
            raise UserError(f"{self.where('crop')}={tuple(self.crop)}: three numbers of voxels from 1 on, or none")
        moving = [t.name for t in self._looks[0] if isinstance(t, spatial.Spatial)]
        if self.scope == "local" and moving:
            raise UserError(
                f"{self.where('transforms')}: '{moving[0]}' moves voxels, so that nobody knows which places of two "
                "views are the same; leave it out with scope='local' (crop and mirror are followed)"
            )

    @property
    def _looks(self) -> tuple[Any, str]:
        return policy.parse({"transforms": tuple(self.transforms)})

    def check(self, patch: Sequence[int]) -> None:
        size = self.crop or patch
        if any(c > p or (self.scope == "local" and 2 * c <= p) for c, p in zip(size, patch, strict=True)):
            more = ", and locally more than half of it, so that any two overlap" if self.scope == "local" else ""
            raise UserError(f"{self.where('crop')}={tuple(size)} in patches of {tuple(patch)}: at most the patch{more}")

    def check_rows(self, rows: int) -> None:
        if self.scope == "global" and rows < 2:
            raise UserError(
                f"{self.where('scope')}='global' compares examples with others, and its loss sees {rows} at a time "
                "(data.batch_size / optim.accumulate, with parallel='pmap' of one device): make that 2 or more, "
                "as many as memory allows, or use scope='local'"
            )

    def check_cases(self, cases: int) -> None:
        if self.scope == "global" and cases == 1:
            warn_once(
                f"task '{self.name}': one case cannot be compared with others, and 'found' is 0; have 2 cases or more "
                "to judge it by"
            )

    def head(self) -> ContrastHead:
        return ContrastHead(self.features, self.hidden, self.scope == "local")

    def prepare(self, key: Array, batch: dict[str, Array]) -> dict[str, Array]:
        """Adds `<task>/views` [B, 2, X, Y, Z, C], and locally `<task>/places` int32 [B, 2, P, 3], voxels of a view."""
        self.check(batch["image"].shape[1:4])
        shape = batch["image"].shape[1:4]
        size = tuple(self.crop) or shape
        room = jnp.asarray([s - c for s, c in zip(shape, size, strict=True)])
        flips = jnp.asarray([axis in self.mirror for axis in range(3)])
        rows = batch["image"].shape[0]
        keys = self.keys(key, batch)
        count = 2 * 3 + 2 * 3 + 3 * self.places
        draws = jax.vmap(lambda k: jax.random.uniform(k, (count,)))(keys)
        starts = jnp.minimum(jnp.floor(draws[:, :6].reshape(-1, 2, 3) * (room + 1)).astype(jnp.int32), room)
        flipped = (draws[:, 6:12].reshape(-1, 2, 3) < 0.5) & flips

        def cut(image: Array, start: Array, flip: Array) -> Array:
            box = jax.lax.dynamic_slice(image, (*start, 0), (*size, image.shape[-1]))
            for axis in range(3):
                box = jnp.where(flip[axis], jnp.flip(box, axis), box)
            return box

        boxes = jax.vmap(lambda i, s, f: jnp.stack([cut(i, s[0], f[0]), cut(i, s[1], f[1])]))(
            batch["image"], starts, flipped
        )
        more = {f"{self.name}/mask": batch["valid"]}
        if self.scope == "local":
            # Places of the patch that lie in both boxes, then as voxels of each.
            low = starts.max(1)
            wide = starts.min(1) + jnp.asarray(size) - low
            place = draws[:, 12:].reshape(rows, self.places, 3)
            place = low[:, None] + jnp.minimum(jnp.floor(place * wide[:, None]).astype(jnp.int32), wide[:, None] - 1)
            within = place[:, None] - starts[:, :, None]
            more[f"{self.name}/places"] = jnp.where(flipped[:, :, None], jnp.asarray(size) - 1 - within, within)
        if self._looks[0]:
            own = jax.random.fold_in(key, 1)
            change = policy.build({"transforms": tuple(self.transforms)}, (), own)
            flat = {k: jnp.repeat(batch[k], 2, axis=0) for k in ("modality", "spacing")}
            # Two numbers an example: its two views draw apart.
            number = jnp.stack([2 * batch["example"], 2 * batch["example"] + 1], axis=1).reshape(-1)
            both = boxes.reshape(2 * rows, *boxes.shape[2:])
            boxes = change({"image": both, "example": number, **flat})["image"].reshape(boxes.shape)
        return {**batch, **more, f"{self.name}/views": boxes}

    def view(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        views = {"image": batch[f"{self.name}/views"]}
        return views | ({"place": batch[f"{self.name}/places"]} if self.scope == "local" else {})

    def _compare(self, outputs: Sequence[Array], batch: Mapping[str, Array]) -> tuple[Array, Array]:
        """Loss and share of partners found, [B]."""
        vectors = outputs[0]
        real = batch[f"{self.name}/mask"]
        rows, width = vectors.shape[0], vectors.shape[-1]
        pairs = vectors.reshape(rows, 2, -1, width)
        each = pairs.shape[2]
        a, b = (pairs[:, i].reshape(-1, width) for i in (0, 1))
        counted = jnp.repeat(real, each)
        # Places that a coarse level does not tell apart are one.
        which = jnp.moveaxis(outputs[1], 1, 0).reshape(-1) if self.scope == "local" else None
        loss, found = losses.info_nce(a, b, self.temperature, counted, which)
        if self.method == "vicreg":
            loss = losses.vicreg(a, b, counted, (self.terms[0], self.terms[1], self.terms[2]))
        return loss.reshape(rows, each).mean(1), found.reshape(rows, each).mean(1)

    def loss(self, outputs: Sequence[Array], batch: Mapping[str, Array]) -> Array:
        return self._compare(outputs, batch)[0]

    def measure(self, outputs: Sequence[Array], batch: Mapping[str, Array]) -> dict[str, Array]:
        """The loss, and how many views (places) are nearest to their partner among all of the batch."""
        loss, found = self._compare(outputs, batch)
        return {"error": loss, "found": found}

    def show(self, outputs: Sequence[Array], batch: Mapping[str, Array]) -> dict[str, Array]:
        """The first example and its two views."""
        views = batch[f"{self.name}/views"][0]
        return {"image": batch["image"][0], "view 1": views[0], "view 2": views[1]}
