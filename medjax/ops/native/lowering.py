"""JAX primitives that lower to a native call on the CPU and to XLA's own operations on every other platform.

Every kernel here works example by example: some operands and results carry the batch in their first axis, the others
are shared by all examples. That one fact gives a primitive its rules for `vmap` and for meshes of devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax._src import dispatch as _dispatch
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from medjax.ops import native

Array = jax.Array
_NATIVE_TYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))


class Kernel(NamedTuple):
    """A map of arrays in two forms. `operands` and `results` tell which carry the batch in axis 0.

    A result without a batch is a sum over the examples. `native` and `xla` take the operands and the primitive's
    parameters and return a sequence of results; trailing operands may be absent. `accepts` says for which operand
    types and parameters there is a native form.
    """

    name: str
    operands: tuple[bool, ...]
    results: tuple[bool, ...]
    abstract: Callable[..., Sequence[Any]]
    xla: Callable[..., Sequence[Array]]
    native: Callable[..., Sequence[Array]]
    accepts: Callable[..., bool] = lambda *avals, **parameters: True


def primitive(kernel: Kernel) -> Primitive:
    """The primitive of a kernel, with rules for lowering, `vmap` and meshes; derivatives are left to the caller."""
    prim = Primitive(f"medjax_{kernel.name}")
    prim.multiple_results = True
    prim.def_impl(_eager(prim))
    prim.def_abstract_eval(kernel.abstract)
    # Rules per platform are what `lax.platform_dependent` is made of. A rule, unlike its branch, runs only when a
    # program is lowered for the CPU: nothing is built on a host that computes elsewhere.
    mlir.register_lowering(prim, mlir.lower_fun(kernel.xla, multiple_results=True))
    mlir.register_lowering(prim, functools.partial(_lower_for_cpu, kernel), platform="cpu")
    batching.primitive_batchers[prim] = functools.partial(_batch, kernel, prim)
    # `custom_partitioning` wants to know the devices while a program is lowered, and only a look into this set tells
    # JAX that the primitive will use it. There is no public name for it (JAX's own cuDNN attention does the same).
    _dispatch.prim_requires_devices_during_lowering.add(prim)
    return prim


def bind(prim: Primitive, /, *operands: Array, **parameters: Any) -> list[Array]:
    """Applies a primitive to operands made of the same variance."""
    return prim.bind(*same_variance(*operands), **parameters)


def same_variance(*operands: Array) -> tuple[Array, ...]:
    """Inside a `shard_map`, marks all operands as varying over the axes any of them varies over."""
    axes = [_varying(x) for x in operands]
    everywhere = frozenset().union(*axes)
    return tuple(
        lax.pcast(x, tuple(everywhere - own), to="varying") if own != everywhere else x
        for x, own in zip(operands, axes, strict=True)
    )


def result_type(like: Any, shape: Sequence[int], dtype: Any = None, *, batched: bool = True) -> Any:
    """A result's abstract value: as `like`, an operand with the batch in axis 0, in sharding and variance."""
    axis = like.sharding.spec[0] if batched and len(like.sharding.spec) else None
    spec = PartitionSpec(axis, *[None] * (len(shape) - 1))
    return like.update(
        shape=tuple(shape), dtype=dtype or like.dtype, weak_type=False, sharding=like.sharding.update(spec=spec)
    )


def _varying(x: Any) -> frozenset[str]:
    """Axes of a `shard_map` over which `x` differs."""
    aval = jax.typeof(x)
    kind = getattr(aval, "manual_axis_type", None)
    return frozenset(kind.varying if kind is not None else getattr(aval, "vma", ()))


def _eager(prim: Primitive) -> Callable[..., Any]:
    @functools.cache
    def compiled(parameters: tuple[tuple[str, Any], ...]) -> Any:
        return jax.jit(functools.partial(prim.bind, **dict(parameters)))

    return lambda *operands, **parameters: compiled(tuple(sorted(parameters.items())))(*operands)


def _lower_for_cpu(kernel: Kernel, ctx: Any, /, *operands: Any, **parameters: Any) -> Any:
    avals = ctx.avals_in
    possible = (
        all(isinstance(size, int) for aval in avals for size in aval.shape)  # not shape-polymorphic
        and avals[0].dtype in _NATIVE_TYPES
        and kernel.accepts(*avals, **parameters)
        and native.available()
    )
    if not possible:
        function = functools.partial(kernel.xla, **parameters)
    elif _split_by_the_partitioner(ctx):
        ranks = tuple(aval.ndim for aval in avals), tuple(aval.ndim for aval in ctx.avals_out)
        function = _partitioned(kernel, tuple(sorted(parameters.items())), *ranks)
    else:
        function = functools.partial(kernel.native, **parameters)
    return mlir.lower_fun(function, multiple_results=True)(ctx, *operands)


def _split_by_the_partitioner(ctx: Any) -> bool:
    """Whether the program is for several devices; inside a full `shard_map` the shapes are one device's already."""
    axes = ctx.module_context.axis_context
    if isinstance(axes, mlir.SPMDAxisContext):
        return frozenset(axes.mesh.axis_names) != frozenset(axes.manual_axes)
    return getattr(axes, "num_devices", 1) != 1


@functools.cache
def _partitioned(
    kernel: Kernel, parameters: tuple[tuple[str, Any], ...], ranks_in: tuple[int, ...], ranks_out: tuple[int, ...]
) -> Any:
    """The native form for a mesh of CPU devices.

    The partitioner cannot look into a native call and would gather its operands. It is told that the batch axis may
    stay split; every other axis is replicated.
    """
    from jax.experimental.custom_partitioning import custom_partitioning

    def function(*operands: Array) -> tuple[Array, ...]:
        return tuple(kernel.native(*operands, **dict(parameters)))

    def batch_axis(arrays: Sequence[Any]) -> Any:
        spec = arrays[0].sharding.spec
        return spec[0] if len(spec) else None

    def shardings(mesh: Any, axis: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        split, whole = NamedSharding(mesh, PartitionSpec(axis)), NamedSharding(mesh, PartitionSpec())
        ins = tuple(split if batched else whole for batched, _ in zip(kernel.operands, ranks_in, strict=False))
        return ins, tuple(split if batched else whole for batched in kernel.results)

    def partition(mesh: Any, operands: Any, results: Any) -> Any:
        axis = batch_axis(operands)
        ins, outs = shardings(mesh, axis)

        def shard(*arrays: Array) -> tuple[Array, ...]:
            return tuple(
                y if batched or axis is None else lax.psum(y, axis)
                for y, batched in zip(function(*arrays), kernel.results, strict=True)
            )

        return mesh, shard, outs, ins

    def infer(mesh: Any, operands: Any, results: Any) -> Any:
        return shardings(mesh, batch_axis(operands))[1]

    whole: list[str] = []  # one factor for each axis that is not the batch

    def factors(rank: int, batched: bool) -> str:
        own = [f"a{len(whole) + i}" for i in range(rank - batched)]
        whole.extend(own)
        return " ".join((["n"] if batched else []) + own)

    left = ", ".join(factors(rank, batched) for rank, batched in zip(ranks_in, kernel.operands, strict=False))
    right = ", ".join(factors(rank, batched) for rank, batched in zip(ranks_out, kernel.results, strict=True))
    call = custom_partitioning(function)
    call.def_partition(
        partition,
        infer_sharding_from_operands=infer,
        sharding_rule=f"{left} -> {right}",
        need_replication_factors=tuple(whole),
        reduction_factors=() if any(kernel.results) else ("n",),
    )
    return call


def _batch(
    kernel: Kernel, prim: Primitive, operands: Sequence[Array], axes: Sequence[Any], /, **parameters: Any
) -> tuple[list[Array], list[int]]:
    """vmap: where just the batched operands are mapped, the mapped axis joins the batch; else one after another."""
    mapped = [axis is not None for axis in axes]
    first = [jnp.moveaxis(x, a, 0) if m else x for x, a, m in zip(operands, axes, mapped, strict=True)]
    zeros = [0] * len(kernel.results)
    if all(kernel.results) and mapped == list(kernel.operands[: len(mapped)]):
        joined = [x.reshape(-1, *x.shape[2:]) if m else x for x, m in zip(first, mapped, strict=True)]
        lead = first[mapped.index(True)].shape[:2]
        return [y.reshape(*lead, *y.shape[1:]) for y in bind(prim, *joined, **parameters)], zeros

    def one(slices: tuple[Array, ...]) -> list[Array]:
        parts = iter(slices)
        return bind(prim, *(next(parts) if m else x for x, m in zip(first, mapped, strict=True)), **parameters)

    return list(lax.map(one, tuple(x for x, m in zip(first, mapped, strict=True) if m))), zeros
