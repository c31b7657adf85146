"""Where in a network a parameter stands: encoder stage by stage from the image on, decoder, heads.

For what fine-tuning treats by depth: learning rates that fall towards the image, stages that begin to learn one
after the other, parts that are frozen.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from medjax import models
from medjax.errors import UserError

PARTS = ("encoder", "decoder", "heads")

# file of a backbone -> of its encoder: (regex of a path within the backbone, what to add to the number in the first
# group; without a group the stage itself). The first that matches rules; what none matches is the decoder.
_ENCODERS: dict[str, tuple[tuple[str, int], ...]] = {
    "unet": ((r"(?:encoder|down)(\d+)(?:_norm)?/", 0),),
    "nnunet": ((r"stem/", 0), (r"encoder(\d+)/", 0)),
    "resnet": ((r"stem/", 0), (r"layer(\d+)_block\d+/", 1)),
    "densenet": ((r"stem/", 0), (r"block(\d+)_(?:layer\d+|norm)/", 1), (r"transition(\d+)/", 1)),
    "inception": ((r"stem\d+/", 0), (r"group(\d+)_block\d+/", 1)),
    # The step into a stage belongs to it.
    "mednext": ((r"stem/", 0), (r"encoder(\d+)_block\d+/", 0), (r"down(\d+)/", 1)),
    "vit": ((r"encoder/(?:embed|position)\b", 0), (r"encoder/block(\d+)/", 1), (r"encoder/norm/", -1)),
    "swin": ((r"embed/", 0), (r"stage(\d+)_block\d+/", 1), (r"merge(\d+)/", 1)),
}  # fmt: skip


class Place(NamedTuple):
    """`part`: 'encoder', 'decoder' or 'heads'. `stage`: of the encoder, 0 next to the image; elsewhere 0."""

    part: str
    stage: int = 0


def places(name: str, paths: Iterable[str]) -> dict[str, Place]:
    """Where every parameter of a model with the backbone `name` stands.

    Args:
      paths: of the model's parameters, 'backbone/encoder0/block0/conv/kernel', 'heads_organ/level0/bias'...

    Raises:
      UserError: a backbone whose stages are not listed here.
    """
    file = models.BACKBONES[name][0] if name in models.BACKBONES else name
    if file not in _ENCODERS:
        raise UserError(
            f"config: the depth of the stages of model.name '{name}' is not known to medjax/models/stages.py; known: "
            f"{', '.join(sorted(_ENCODERS))}"
        )
    found = {path: _place(_ENCODERS[file], path) for path in paths}
    last = max((place.stage for place in found.values()), default=0)
    return {path: Place(p.part, last) if p.stage < 0 else p for path, p in found.items()}


def _place(encoder: tuple[tuple[str, int], ...], path: str) -> Place:
    root, _, rest = path.partition("/")
    if root != "backbone":
        return Place("heads")
    for pattern, first in encoder:
        if m := re.match(pattern, rest):
            return Place("encoder", first + int(m[1]) if m.groups() else first)
    return Place("decoder")


def stage_count(found: dict[str, Place]) -> int:
    """Number of encoder stages."""
    return 1 + max((place.stage for place in found.values() if place.part == "encoder"), default=-1)
