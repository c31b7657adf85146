"""What every backbone costs: parameters, operations, and seconds on this machine, as rows of docs/models.md.

    python -m benchmarks.backbones [--size=64] [--cases=unet,resenc] [--repetitions=5] [--count-only]

One image of one channel and `size`³ voxels, float32. GFLOP counts convolutions and matrix products of a forward pass
(`medjax.report.flops`); the step is a forward pass and the gradient of the levels' mean squares by every parameter.
Each case is a process of its own; medians of the repetitions. One JSON line a case.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

# Case -> (backbone, options).
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "unet": ("unet", {"features": (32, 64, 128, 256, 320, 320)}),
    "nnunet": ("nnunet", {}),
    "resenc-L": ("resenc", {}),
    "resnet-10": ("resnet", {"depth": 10}),
    "resnet-18": ("resnet", {"depth": 18}),
    "resnet-34": ("resnet", {"depth": 34}),
    "resnet-50": ("resnet", {"depth": 50}),
    "resnet-18-unet": ("resnet", {"depth": 18, "decoder": "unet"}),
    "densenet-121": ("densenet", {"depth": 121}),
    "densenet-169": ("densenet", {"depth": 169}),
    "inception": ("inception", {}),
    "mednext-S": ("mednext", {"variant": "S"}),
    "mednext-B": ("mednext", {"variant": "B"}),
    "mednext-M": ("mednext", {"variant": "M"}),
    "mednext-L": ("mednext", {"variant": "L"}),
    "vit": ("vit", {}),
    "unetr": ("unetr", {}),
    "swin": ("swin", {}),
    "swin_unetr": ("swin_unetr", {}),
}


def measure(case: str, size: int, repetitions: int) -> dict[str, Any]:
    """The row of one case; no times where `repetitions` is 0."""
    import jax
    import jax.numpy as jnp

    from medjax import models, report
    from medjax.models.model import parameter_count

    name, options = CASES[case]
    net = models.build({"name": name, **options}, jnp.float32)
    x = jax.ShapeDtypeStruct((1, size, size, size, 1), jnp.float32)
    like = jax.eval_shape(lambda x: net.init(jax.random.key(0), x), x)
    row = {
        "bench": "backbones",
        "case": case,
        "size": size,
        "parameters": parameter_count(like),
        "gflop": round(report.flops(jax.make_jaxpr(net.apply)(like, x)) / 1e9, 1),
    }
    if not repetitions:
        return row

    def loss(variables: Any, x: Any) -> Any:
        # Every level counts: of an encoder alone the finest hangs on the stem, and the rest would be compiled away.
        return sum(jnp.square(level).mean() for level in net.apply(variables, x))

    image = jax.random.normal(jax.random.key(1), x.shape)
    variables = jax.jit(lambda x: net.init(jax.random.key(0), x))(image)
    for kind, function in (("forward", net.apply), ("step", jax.grad(loss))):
        began = time.perf_counter()
        call = jax.jit(function).lower(variables, image).compile()
        row[f"{kind}_compile_s"] = round(time.perf_counter() - began, 1)
        jax.block_until_ready(call(variables, image))
        taken = []
        for _ in range(repetitions):
            began = time.perf_counter()
            jax.block_until_ready(call(variables, image))
            taken.append(time.perf_counter() - began)
        row[f"{kind}_s"] = round(statistics.median(taken), 4)
    return {**row, "versions": {"jax": jax.__version__}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--count-only", action="store_true", help="parameters and operations, without running anything")
    parser.add_argument("--work", metavar="CASE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    repetitions = 0 if options.count_only else options.repetitions
    if options.work:
        from medjax import runtime

        runtime.ensure_tuned_allocator()
        print(json.dumps(measure(options.work, options.size, repetitions)), flush=True)
        return
    for case in options.cases.split(","):
        if options.count_only:
            print(json.dumps(measure(case, options.size, 0)), flush=True)
        else:
            shared = [f"--size={options.size}", f"--repetitions={repetitions}"]
            subprocess.run([sys.executable, "-m", "benchmarks.backbones", "--work", case, *shared], check=True)


if __name__ == "__main__":
    main()
