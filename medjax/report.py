"""What a step costs, told by the compiler before it runs: parameters, FLOPs, compile time, bytes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.extend import core

from medjax.errors import write_atomic

# `medjax.ops.conv3d` primitives: which of (operands, result) are the convolution's output and filter.
NATIVE = {"medjax_conv3d": (-1, 1), "medjax_conv3d_input_grad": (0, 1), "medjax_conv3d_filter_grad": (1, -1)}


@dataclass(frozen=True)
class Compiled:
    """A jitted function compiled ahead of time.

    Attributes:
      call: the executable. seconds: compile time. flops: of one call (multiply and add count 2; convolutions and
        matrix products alone). arguments, temporaries, outputs: bytes on one device, from `memory_analysis()`.
    """

    call: Callable
    seconds: float
    flops: int
    arguments: int
    temporaries: int
    outputs: int

    @property
    def peak(self) -> int:
        """Bytes one device needs at once; outputs that reuse donated arguments are counted once."""
        return self.arguments + self.temporaries + self.outputs


def compile_step(function: Callable, *arguments: Any) -> Compiled:
    """Traces and compiles a jitted `function` for `arguments` (arrays or jax.ShapeDtypeStruct) without running it."""
    began = time.perf_counter()
    traced = function.trace(*arguments)  # type: ignore[attr-defined]
    executable = traced.lower().compile()
    seconds = time.perf_counter() - began
    memory = executable.memory_analysis()
    sizes = (0, 0, 0)
    if memory is not None:
        alias = memory.alias_size_in_bytes
        sizes = (memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.output_size_in_bytes - alias)
    return Compiled(executable, seconds, flops(traced.jaxpr), *sizes)


def write_cost(path: Path, step: Compiled, trained: int, parameters: int, devices: int, total: int) -> None:
    """What a run costs, as JSON for `medjax.compare`: 'bytes' are of one device, 'flops' of one step over all."""
    cost = {
        "parameters": parameters,
        "trained": trained,
        "flops": step.flops,
        "bytes": step.peak,
        "compile_seconds": round(step.seconds, 2),
        "devices": devices,
        "device": jax.devices()[0].device_kind,
        "total": total,
    }
    write_atomic(path, json.dumps(cost, indent=2) + "\n")


def flops(jaxpr: Any) -> int:
    """FLOPs of the convolutions and matrix products of a jaxpr.

    Counted from shapes rather than by the compiler, who does not see into a native kernel. Where the program picks one
    of several branches (a platform's, a gate's), the most expensive one is counted.
    """
    if isinstance(jaxpr, core.ClosedJaxpr):
        jaxpr = jaxpr.jaxpr
    return sum(_equation(eqn) for eqn in jaxpr.eqns)


def _equation(eqn: Any) -> int:
    name = eqn.primitive.name
    if name == "conv_general_dilated":
        lhs, rhs, out = eqn.invars[0].aval, eqn.invars[1].aval, eqn.outvars[0].aval
        spec = eqn.params["dimension_numbers"]
        per_output = rhs.size // rhs.shape[spec.rhs_spec[0]]
        # Zeros put between the input's voxels (the gradient of a stride) cost nothing that counts.
        return 2 * out.size * per_output // math.prod(eqn.params["lhs_dilation"]) if lhs.size else 0
    if name in NATIVE:
        shapes = [v.aval.shape for v in (*eqn.invars, *eqn.outvars)]
        image, kernel = (shapes[i] for i in NATIVE[name])
        return 2 * math.prod(image) * math.prod(kernel[:4])
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        lhs, out = eqn.invars[0].aval, eqn.outvars[0].aval
        return 2 * out.size * math.prod(lhs.shape[d] for d in contracted)
    inner = [flops(value) for value in _jaxprs(eqn.params)]
    if "branches" in eqn.params:
        return max(inner, default=0)
    return sum(inner) * (eqn.params["length"] if name == "scan" else 1)


def _jaxprs(params: Any) -> list[Any]:
    found = []
    for value in params.values():
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, core.ClosedJaxpr | core.Jaxpr):
                found.append(item)
    return found


def human(number: float, unit: str) -> str:
    """'3.2 GB', '418 GFLOP', '1.9 M'."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(number) < 1000 or prefix == "T":
            text = f"{number:.0f}" if not prefix or number >= 100 else f"{number:.1f}"
            return f"{text} {prefix}{unit}".rstrip()
        number /= 1000
    raise AssertionError


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    import platform
    from importlib import metadata

    import medjax

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy", "nibabel")
    found = {"medjax": medjax.__version__, "python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {**found, "device": jax.devices()[0].device_kind}
