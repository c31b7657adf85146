"""What parameter-efficient fine-tuning puts into a network without changing its files: adapters and prompt tokens.

A module of the network is called as it was, and something small and trained is done to what goes in or comes out. Its
parameters lie within that module's own ('.../block0/adapter/down/kernel', '.../block0/prompt').
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from medjax.errors import UserError, check_regex
from medjax.models.layers import Linear
from medjax.ops.gelu import gelu

KINDS = ("adapter", "prompt")
# How the classes end of what backbones repeat (nn.remat puts 'Checkpoint' before their names).
_UNITS = ("Block", "DenseLayer", "ResidualConv")


class Adapter(nn.Module):
    """A bottleneck beside a shortcut (Houlsby et al. 2019): x + up(GELU(down(x))) of the last axis.

    `up` begins at zero, so the network begins as it was.

    Attributes:
      width: channels between the two maps.
    """

    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = gelu(Linear(self.width, dtype=x.dtype, name="down")(x))
        # Zeros, where `Linear` begins at random.
        w = self.param("up", nn.initializers.zeros, (self.width, x.shape[-1]), jnp.float32)
        b = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        return x + y @ w.astype(x.dtype) + b.astype(x.dtype)


@dataclass(frozen=True)
class Insert:
    """Puts adapters after, or prompt tokens before, the modules of a network that match.

    Adapters come after every block of the backbone (of a DenseNet after every dense layer, on the channels it adds),
    and where blocks hold blocks after the outer one. Prompt tokens are the deep kind of visual prompt tuning (Jia et
    al. 2022): every transformer block sees `size` learnt tokens of its own before the image's, and what it makes of
    them is dropped.

    Attributes:
      kind: 'adapter' or 'prompt'. size: channels of an adapter; number of tokens.
      targets: regexes of module paths, 'backbone/encoder0/block1'; (): all blocks of the backbone.
    """

    kind: str
    size: int
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for target in self.targets:
            check_regex(target, "peft.targets")

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`function(*args, **kwargs)` with the inserts in the modules it calls."""
        used: set[str] = set()
        with nn.intercept_methods(self._interceptor(used)):
            found = function(*args, **kwargs)
        unused = [t for t in self.targets if t not in used]
        if unused or not used:
            what = "transformer block (prompt tokens are for a ViT)" if self.kind == "prompt" else "block"
            which = f"peft.targets '{unused[0]}' matches no" if unused else "peft.type finds no"
            raise UserError(f"config: {which} {what} of this backbone; a target is a module, such as "
                            "'backbone/encoder0/block0' or 'backbone/encoder/block3'")  # fmt: skip
        return found

    def _interceptor(self, used: set[str]) -> Callable[..., Any]:
        inside = 0

        def interceptor(function: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
            nonlocal inside
            target = None if inside or context.method_name != "__call__" else self._target(context.module)
            if target is None:
                return function(*args, **kwargs)
            used.add(target)
            inside += 1
            try:
                if self.kind == "prompt":
                    return self._prompted(context.module, function, *args, **kwargs)
                found = function(*args, **kwargs)
                if not isinstance(found, jax.Array):
                    raise UserError(
                        f"config: peft.targets '{target}' takes the module '{'/'.join(context.module.path)}', which "
                        "makes no single array; name the blocks in it, such as 'backbone/encoder0/block0'"
                    )
                return Adapter(self.size, name="adapter")(found)
            finally:
                inside -= 1

        return interceptor

    def _target(self, module: nn.Module) -> str | None:
        """The target that takes a module; '' where all blocks are taken; None: it is left alone."""
        path, kind = "/".join(module.path), type(module).__name__
        fits = kind.endswith("TransformerBlock") if self.kind == "prompt" else True
        if self.targets:
            return next((t for t in self.targets if fits and re.fullmatch(t, path)), None)
        return "" if fits and path.startswith("backbone/") and kind.endswith(_UNITS) else None

    def _prompted(self, module: nn.Module, function: Callable, x: Array, *args: Any, **kwargs: Any) -> Array:
        prompt = module.param("prompt", nn.initializers.normal(0.02), (self.size, x.shape[-1]), jnp.float32)
        tokens = jnp.broadcast_to(prompt.astype(x.dtype), (x.shape[0], *prompt.shape))
        return function(jnp.concatenate([tokens, x], axis=1), *args, **kwargs)[:, self.size :]


def insert(peft: Mapping[str, Any] | None) -> Insert | None:
    """What `config.peft` puts into the network, if anything."""
    if not peft or peft["type"] not in KINDS:
        return None
    size = peft["rank"] if peft["type"] == "adapter" else peft["tokens"]
    return Insert(peft["type"], int(size), tuple(peft["targets"]))
