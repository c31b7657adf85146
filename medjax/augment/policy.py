"""The policy of a config: which transforms, how often; applied to a whole batch on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from medjax.augment import transforms
from medjax.errors import UserError


def build(config: Mapping[str, Any], tasks: Sequence[str], seed: int) -> Callable[[dict[str, Array]], dict[str, Array]]:
    """`batch -> batch` of `config.augment`; the identity when nothing is on.

    Each example's randomness comes from (seed, example number) alone, so a batch equals its examples one by one, and
    a resumed run augments as the uninterrupted one. A transform that an example does not get is not computed.

    Args:
      tasks: names of the tasks whose masks [B, X, Y, Z] move with the image.
    """
    axes = tuple(config["mirror"])
    if any(a not in (0, 1, 2) for a in axes):
        raise UserError(f"config: augment.mirror={axes}: axes are 0, 1 and 2")
    rules = {k: v for k, v in config.items() if k != "mirror" and v["p"] > 0}
    if not axes and not rules:
        return lambda batch: batch

    def one(item: dict[str, Any]) -> dict[str, Any]:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), item["example"].astype(jnp.uint32)), 12)
        image, masks = item["image"], [item[f"{t}/target"] for t in tasks]
        if axes:
            image, *masks = transforms.mirror(keys[0], [image, *masks], axes)

        def maybe(number: int, name: str, function: Callable, value: Any) -> Any:
            if name not in rules:
                return value
            gate = jax.random.bernoulli(keys[number], rules[name]["p"])
            return jax.lax.cond(gate, lambda v: function(keys[number + 1], v), lambda v: v, value)

        def turn(key: Array, value: tuple[Array, list[Array]]) -> tuple[Array, list[Array]]:
            rule = rules["affine"]
            return transforms.affine(key, *value, item["spacing"], rule["rotate"], rule["scale"])

        image, masks = maybe(1, "affine", turn, (image, masks))
        for number, name in ((3, "noise"), (5, "brightness"), (7, "contrast"), (9, "gamma")):
            options = {k: v for k, v in rules.get(name, {}).items() if k != "p"}
            function = getattr(transforms, name)
            image = maybe(number, name, lambda k, v, f=function, o=options: f(k, v, **o), image)
        return {**item, "image": image, **{f"{t}/target": m for t, m in zip(tasks, masks, strict=True)}}

    return lambda batch: jax.lax.map(one, batch)
