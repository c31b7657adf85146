"""Work on the examples of a batch that are chosen, and on no others."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from medjax.ops.native import lowering


def chosen(function: Callable[..., Array], gate: Array, batch: Array, *operands: Array) -> Array:
    """`function` of each example whose gate is set; the others stay bit for bit, at no cost.

    A loop as long as there are chosen examples: none, and the batch's memory is handed on as it is. A `cond` for each
    example would do, but costs copies on some platforms, and under `vmap` computes everything.

    Args:
      function: (example, *its operands) -> example, of the same shape and type.
      gate: bool [B]. batch: [B, ...]. operands: [B, ...] each.
    """
    gate, batch, *given = lowering.same_variance(gate, batch, *operands)
    count = jnp.cumsum(gate.astype(jnp.int32))

    def body(state: tuple[Array, Array]) -> tuple[Array, Array]:
        done, x = state
        i = jnp.argmax(count == done + 1)
        parts = [lax.dynamic_index_in_dim(a, i, 0, keepdims=False) for a in (x, *given)]
        # Without the barriers a batch of one example is fused otherwise, and its last bits differ.
        made = lax.optimization_barrier(function(*lax.optimization_barrier(parts)))
        return done + 1, lax.dynamic_update_index_in_dim(x, made, i, 0)

    first = count[-1] * 0
    return lax.while_loop(lambda state: state[0] < count[-1], body, (first, batch))[1]
