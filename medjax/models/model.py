"""A model: one backbone and one head a task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from medjax import models
from medjax.errors import UserError
from medjax.models.adapters import Insert, insert
from medjax.models.pretext import PretextHead

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Model(nn.Module):
    """`{task: outputs}` of one image batch [B, X, Y, Z, C].

    Attributes:
      backbone: returns a feature pyramid, finest first.
      heads: task name -> module from pyramid to that task's outputs; or a `PretextHead`, which makes its own pass.
      insert: adapters or prompt tokens within the backbone (`config.peft`), if any.
    """

    backbone: nn.Module
    heads: Mapping[str, nn.Module]
    insert: Insert | None = None

    def __call__(
        self,
        x: Array,
        *,
        train: bool = False,
        views: Mapping[str, Mapping[str, Array]] | None = None,
        probes: Mapping[str, Array] | None = None,
    ) -> dict[str, Any]:
        """Outputs of every head.

        Args:
          views: task -> what its pass of its own through the backbone takes (`medjax.tasks.views`); a self-supervised
            task without one gives no outputs.
          probes: task -> 0.0; they tell how strongly each task pulls at the features (`tap`).
        """
        pretext = {name: head for name, head in self.heads.items() if isinstance(head, PretextHead)}
        views = {name: head.blank(x) for name, head in pretext.items()} if self.is_initializing() else views or {}
        outputs: dict[str, Any] = {}
        if self.is_initializing() or len(pretext) < len(self.heads):
            pyramid = self.insert.call(self.backbone, x, train=train) if self.insert else self.backbone(x, train=train)
            check_grid(self, x.shape, pyramid[0].shape)
        for name, head in self.heads.items():
            if name not in pretext:
                features = pyramid if probes is None else tap(pyramid, probes[name])
                outputs[name] = head(features, train=train)
            elif name in views:
                outputs[name] = head(self.backbone, views[name], train=train)
        return outputs


@jax.custom_vjp
def tap(features: list[Array], probe: Array) -> list[Array]:
    """The features as they are. The gradient in `probe`, a float32 scalar, is the squared norm of that in them."""
    return features


def _tap_backward(_: None, gradients: list[Array]) -> tuple[list[Array], Array]:
    return gradients, jnp.sum(jnp.stack([jnp.sum(jnp.square(g.astype(jnp.float32))) for g in gradients]))


tap.defvjp(lambda features, probe: (features, None), _tap_backward)


def check_grid(model: Model, image: Sequence[int], finest: Sequence[int]) -> None:
    """Refuses heads that speak of every voxel on a pyramid whose finest level is not the image's grid.

    Args:
      image, finest: shapes [B, X, Y, Z, C] of the image and of the pyramid's first level.
    """
    dense = [name for name, head in model.heads.items() if _on_grid(head)]
    if dense and tuple(image[1:4]) != tuple(finest[1:4]):
        grids = ["×".join(map(str, shape[1:4])) for shape in (image, finest)]
        raise UserError(
            f"config: task '{dense[0]}' says something of every voxel, but the finest level of this "
            f"{type(model.backbone).__name__} is {grids[1]} for an image of {grids[0]}: it is an encoder alone. Give "
            "it a decoder (model.decoder='unet'; of a vit 'unetr'), or choose a network that has one (model.name: "
            "unet, nnunet, resenc, mednext, unetr, swin_unetr)."
        )


def _on_grid(head: nn.Module) -> bool:
    """Whether a head speaks of every voxel of the image; heads of one's own may say so by an attribute `on_grid`."""
    return getattr(head, "on_grid", False)


def build_model(config: Mapping[str, Any], tasks: Mapping[str, Any]) -> Model:
    """The model of a config: its backbone, computing in `train.precision`, and the heads of its tasks."""
    precision = config["train"]["precision"]
    if precision not in DTYPES:
        raise UserError(f"config: train.precision '{precision}' is not known; known: {', '.join(DTYPES)}")
    heads = {name: task.head() for name, task in tasks.items()}
    inserted = insert(config.get("peft"))
    for name, head in heads.items():
        if inserted and isinstance(head, PretextHead):
            raise UserError(
                f"config: peft.type '{inserted.kind}': task '{name}' is self-supervised and makes a pass of its own, "
                "in which nothing is inserted, so it would not train them; use 'lora', 'bitfit' or 'norm'"
            )
    return Model(models.build(config["model"], DTYPES[precision]), heads, inserted)


def check_heads(model: Model, channels: int) -> None:
    """Raises at once what the first call of an encoder without a decoder would (`check_grid`), before data is read.

    And for a network of one stage, which has no pyramid (a plan takes its one number as the width to begin with).
    """
    stages = getattr(model.backbone, "features", None)
    if isinstance(stages, Sequence) and len(stages) < 2:
        raise UserError(
            f"config: model.features={tuple(stages)}: needs a number of channels for each stage, two stages at least"
        )
    if getattr(model.backbone, "decoder", "") == "none" and any(_on_grid(head) for head in model.heads.values()):
        shape = (1, *(2 * factor for factor in model.backbone.total_factor()), channels)
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros(shape), train=False))


def check_levels(model: Model, wanted: Mapping[str, int], channels: int) -> None:
    """Raises UserError for a task that asks for more levels of the pyramid than the backbone gives.

    Args:
      wanted: task -> `tasks.<task>.levels`, of those that have been set. channels: of the image.
    """
    if max(wanted.values(), default=0) < 2:
        return
    image = jnp.zeros((1, *(2 * factor for factor in model.backbone.total_factor()), channels))
    there = len(jax.eval_shape(lambda: model.backbone.init_with_output(jax.random.key(0), image)[0]))
    for name, levels in wanted.items():
        if levels > there:
            raise UserError(
                f"config: tasks.{name}.levels={levels}: this {type(model.backbone).__name__}'s pyramid has {there} "
                f"level(s); set tasks.{name}.levels={there}, or see model.levels and the number of its stages"
            )


def parameter_count(params: Any) -> int:
    """Number of scalars in a tree of parameters."""
    return sum(math.prod(p.shape) for p in jax.tree.leaves(params))
