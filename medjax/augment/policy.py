"""The policy of a config: which transforms, how often, in what order; applied to a whole batch on the device.

What is random is drawn for each example from (seed, example number) alone, so a batch equals its examples one by one
wherever they lie, and a resumed run augments as the uninterrupted one. A policy runs in two parts: small numbers are
drawn for all examples at once (`plan`), then each transform works on those examples that get it (`apply`). The others
stay bit for bit and cost nothing.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from medjax.augment import artefacts, intensity, mixing, spatial, synth
from medjax.augment.base import INSIDE, Batch, Draws, Scene, Transform
from medjax.errors import UserError

TRANSFORMS: dict[str, type[Transform]] = {
    kind.name: kind
    for kind in (
        spatial.Mirror, spatial.Rotate, spatial.Scale, spatial.Shear, spatial.Affine, spatial.Elastic, spatial.Shift,
        intensity.Noise, intensity.Rician, intensity.Blur, intensity.LowResolution, intensity.Brightness,
        intensity.Multiply, intensity.Contrast, intensity.Gamma, intensity.Bias, intensity.Histogram, intensity.Cutout,
        intensity.Standardize, artefacts.Ghosting, artefacts.Gibbs, artefacts.Spike, artefacts.Motion,
        mixing.CutMix, mixing.MixUp, mixing.ModalityDropout, synth.Paint,
    )
}  # fmt: skip
# Of `config.augment`, in the order they are done.
_TABLES = ("affine", "noise", "brightness", "contrast", "gamma")
_LABELS = ("auto", "nearest", "linear")

Entry = tuple[str, Mapping[str, Any]]


def nnunet(*, mirror: tuple[int, ...] = (0, 1, 2), swap: tuple = (), degrees: float = 30.0) -> list[Entry]:
    """nnU-Net's default augmentation (Isensee et al., Nature Methods 18, 2021, as of version 2 of its code).

    Mirroring stands first, not last: it commutes with all that follows, and joins the rotation in one interpolation.
    """
    balanced = {"low": 0.75, "high": 1.25, "balanced": True}
    power = {"low": 0.7, "high": 1.5, "balanced": True}
    return [
        ("mirror", {"axes": mirror, "swap": swap}),
        ("rotate", {"p": 0.2, "degrees": degrees}),
        ("scale", {"p": 0.2, "factor": (1 / 1.4, 1 / 0.7), "reciprocal": True}),
        ("noise", {"p": 0.1, "variance": (0.0, 0.1)}),
        ("blur", {"p": 0.2, "sigma": (0.5, 1.0), "p_channel": 0.5}),
        ("multiply", {"p": 0.15, **balanced}),
        ("contrast", {"p": 0.15, **balanced, "keep_range": True}),
        ("low_resolution", {"p": 0.25, "factor": (0.5, 1.0), "p_channel": 0.5}),
        ("gamma", {"p": 0.1, "invert": True, **power}),
        ("gamma", {"p": 0.3, **power}),
    ]


def synthseg(
    *,
    task: str = "",
    mirror: tuple[int, ...] = (0,),
    swap: tuple = (),
    mm: tuple[float, float] = (1.0, 8.0),
    background: float = 0.5,
    clusters: int = 1,
) -> list[Entry]:
    """Images painted from a task's label map, with the generator of Billot et al. (2023) in this room's terms.

    Args:
      task: whose mask is painted, where there are several. mm: voxel sizes simulated along one axis.
      background, clusters: of `paint`. Where labels cover a part of the anatomy, 0.0 and some clusters.
    """
    return [
        ("mirror", {"axes": mirror, "swap": swap}),
        ("affine", {"rotate": 15.0, "scale": 0.15, "shear": 0.012, "isotropic": False, "inplane": 0.0}),
        ("elastic", {"points": 8, "std": (0.0, 3.0), "inplane": 0.0}),
        (
            "paint",
            {"task": task, "mean": (0.1, 0.9), "std": (0.02, 0.1), "background": background, "clusters": clusters},
        ),
        ("bias", {"std": 0.5, "points": 6}),
        ("gamma", {"low": 0.4, "high": 2.5, "keep_moments": False}),
        ("low_resolution", {"p": 0.5, "mm": mm, "factor": (0.1, 1.0), "axes": "one", "smooth": True, "inplane": 0.0}),
        (
            "low_resolution",
            {"p": 0.5, "mm": (mm[0], max(mm[0], mm[1] / 2)), "factor": (0.1, 1.0), "smooth": True, "inplane": 0.0},
        ),
        ("standardize", {}),
    ]


# Name -> (what makes its list, how it takes labels).
POLICIES: dict[str, tuple[Callable[..., list[Entry]], str]] = {
    "nnunet": (nnunet, "linear"),
    "synthseg": (synthseg, "nearest"),
}


def build(config: Mapping[str, Any], tasks: Sequence[str], seed: int | Array) -> Callable[[Batch], Batch]:
    """`batch -> batch` of `config.augment`; the identity when nothing is on.

    Args:
      config: see `medjax.config.defaults` and docs/augmentation.md. Raises UserError for what it cannot mean.
      tasks: names of the tasks whose masks `<task>/target` [B, X, Y, Z] move with the image. Targets of another rank,
        and tables, are left alone.
      seed: of the run, or a key.

    The function wants a batch as in docs/design.md ('modality' and 'spacing' may be lacking), works under `jax.jit`
    and inside a `jax.shard_map` over the batch axis, and returns arrays of the same shapes and types; with tables of
    instances also which the patch had cut (`spatial.apply`).
    """
    transforms, labels = parse(config)
    if not transforms:
        return lambda batch: batch
    keyed, groups = any(t.keyed for t in transforms), _groups(transforms)

    def augment(batch: Batch) -> Batch:
        image, examples = batch["image"], batch["example"].astype(jnp.uint32)
        rows, *size, channels = image.shape
        shape = (size[0], size[1], size[2])
        spacing = batch.get("spacing", jnp.ones((rows, 3))).astype(jnp.float32)
        present = batch.get("modality", jnp.ones((rows, channels), bool))
        masks = [k for k in (f"{t}/target" for t in tasks) if k in batch and batch[k].shape == (rows, *shape)]

        def plan(row: Array, spacing: Array, present: Array) -> list[Any]:
            draw, scene = Draws(row), Scene(shape, channels, spacing, present)
            made = [t.plan(draw, scene) for t in transforms]
            return [spatial.join([made[i] for i in g]) if moving(g) else made[g[0]] for g in groups]

        def moving(group: list[int]) -> bool:
            return isinstance(transforms[group[0]], spatial.Spatial)

        many = _numbers(transforms, shape, channels)
        root = jax.random.key(seed) if isinstance(seed, int) else seed
        keys = jax.vmap(lambda e: jax.random.fold_in(root, e))(examples)
        drawn = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 0), (many,)))(keys)
        # On the CPU one after the other: the last bits of vectorised arithmetic depend on the number of rows.
        plans = lax.platform_dependent(
            drawn, spacing, present, cpu=lambda *rows: lax.map(lambda r: plan(*r), rows), default=jax.vmap(plan)
        )
        streams = None
        if keyed:  # one for each transform and example
            numbers = jnp.arange(1, len(transforms) + 1)
            streams = jax.vmap(lambda n: jax.random.key_data(jax.vmap(lambda k: jax.random.fold_in(k, n))(keys)))(
                numbers
            )
        for group, made in zip(groups, plans, strict=True):
            if moving(group):
                batch = spatial.apply(batch, [transforms[i] for i in group], made, masks, labels)
            else:
                own = None if streams is None else streams[group[0]]
                batch = transforms[group[0]].apply(batch, made, own, masks)
        return {k: v for k, v in batch.items() if k != INSIDE}

    return augment


def _numbers(transforms: Sequence[Transform], shape: tuple[int, int, int], channels: int) -> int:
    """How many uniform numbers an example's plan takes."""
    used = [0]

    def count() -> Any:
        draw = Draws(jnp.zeros(1 << 24))
        scene = Scene(shape, channels, jnp.ones(3), jnp.ones(channels, bool))
        plans = [t.plan(draw, scene) for t in transforms]
        used[0] = draw.used
        return plans

    jax.eval_shape(count)
    return used[0]


def _groups(transforms: Sequence[Transform]) -> list[list[int]]:
    """Numbers of the transforms; neighbouring spatial ones, with one displacement field at most, go together."""
    groups: list[list[int]] = []
    for i, transform in enumerate(transforms):
        last = [transforms[j] for j in groups[-1]] if groups else []
        joins = last and isinstance(transform, spatial.Spatial) and isinstance(last[0], spatial.Spatial)
        if joins and not (isinstance(transform, spatial.Elastic) and any(isinstance(t, spatial.Elastic) for t in last)):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


# --- from a config ---------------------------------------------------------------------------------------------------


def parse(config: Mapping[str, Any]) -> tuple[list[Transform], str]:
    """The transforms of `config.augment` in order, and how labels are taken ('nearest', 'linear')."""
    named, chain = config.get("policy", ""), tuple(config.get("transforms", ()))
    mirror, swap = tuple(config.get("mirror", ())), _plain(config.get("swap", ()))
    labels = config.get("label_interpolation", "auto")
    if labels not in _LABELS:
        raise UserError(f"config: augment.label_interpolation='{labels}': one of {', '.join(_LABELS)}")
    tables = [(f"augment.{n}", n, dict(config[n])) for n in _TABLES if n in config and config[n]["p"] > 0]
    if swap and not mirror and not named:
        raise UserError("config: augment.swap is for mirrored axes: set augment.mirror, with axis 0 among them")
    if named and chain:
        raise UserError(
            f"config: augment.policy='{named}' and augment.transforms: one of the two; a policy can stand in the list: "
            f"(('{named}', {{}}), ...)"
        )
    if (named or chain) and tables:
        where = "augment.policy" if named else "augment.transforms"
        raise UserError(f"config: {tables[0][0]}.p is set beside {where}; write it into augment.transforms")
    if chain and (mirror or swap):
        raise UserError("config: augment.mirror and .swap beside augment.transforms; write ('mirror', {...}) into it")
    if named:
        options: dict[str, Any] = {"mirror": mirror} if mirror else {}
        if swap:
            options["swap"] = swap
        found, own = _expand("augment.policy", named, options)
    elif chain:
        found, own = [], "nearest"
        for i, entry in enumerate(chain):
            if isinstance(entry, str):
                entry = (entry, {})
            if not isinstance(entry, tuple | list) or len(entry) != 2 or not isinstance(entry[0], str):
                raise UserError(
                    f"config: augment.transforms[{i}]={entry!r}: (name, options) is needed, e.g. ('blur', {{'p': 0.2}})"
                )
            more, way = _expand(f"augment.transforms[{i}]", entry[0], entry[1])
            found += more
            own = way if way != "nearest" else own
    else:
        first = [_make("augment", "mirror", {"axes": mirror, "swap": swap})] if mirror else []
        found, own = first + [_make(*table) for table in tables], "nearest"
    return [t for t in found if t.p > 0], own if labels == "auto" else labels


def _expand(where: str, name: str, options: Any) -> tuple[list[Transform], str]:
    """The transforms that an entry stands for: one, or a policy's."""
    if name not in POLICIES:
        return [_make(f"{where}.{name}", name, options, near=(*TRANSFORMS, *POLICIES))], "nearest"
    function, labels = POLICIES[name]
    known = function.__kwdefaults__ or {}
    given = _options(f"{where}.{name}", options, known)
    return [_make(f"{where}.{name}", n, o) for n, o in function(**given)], labels


def _make(where: str, name: str, options: Any, near: Iterable[str] = TRANSFORMS) -> Transform:
    if name not in TRANSFORMS:
        raise _unknown(where.removesuffix(f".{name}"), name, near)
    kind = TRANSFORMS[name]
    given = _options(where, options, [f.name for f in dataclasses.fields(kind)])
    try:
        return kind(**given)
    except ValueError as error:
        raise UserError(f"config: {where}.{error}") from None


def _options(where: str, options: Any, known: Iterable[str]) -> dict[str, Any]:
    if not isinstance(options, Mapping) and not hasattr(options, "items"):
        raise UserError(f"config: {where}: options are a table, e.g. {{'p': 0.2}}, not {options!r}")
    for key in options:
        if key not in known:
            raise _unknown(where, key, known)
    return {key: _plain(value) for key, value in options.items()}


def _unknown(where: str, name: str, known: Iterable[str]) -> UserError:
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(known)}"
    return UserError(f"config: {where}: unknown '{name}': {hint}")


def _plain(value: Any) -> Any:
    """Lists as tuples, as options have them."""
    return tuple(_plain(v) for v in value) if isinstance(value, list | tuple) else value
