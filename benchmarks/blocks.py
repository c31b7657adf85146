"""A MedNeXt or Swin block on the CPU, forward and with its gradients, medjax against MONAI's in PyTorch.

    python -m benchmarks.blocks --peer-python=/path/to/python [--cases=mednext3,swin] [--modes=train,infer] ...

Both sides have the same block on random tokens or voxels and, in 'train', the gradient of the mean square of its output
by its input and its parameters. Peers, by `--variants`:

    eager      as installed, in its better memory format
    compile    torch.compile on top

The two sides take turns of five repetitions each, as a network runs its blocks over and over. The peer's interpreter
needs torch and monai. The lines' form: `benchmarks/harness.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from benchmarks import harness

# Shape [N, X, Y, Z, C] and what the block is made with.
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "mednext3": ((1, 48, 48, 48, 32), {"expansion": 2, "kernel": 3}),
    "mednext5": ((1, 48, 48, 48, 32), {"expansion": 2, "kernel": 5}),
    "mednext3-deep": ((1, 12, 12, 12, 128), {"expansion": 4, "kernel": 3}),
    "swin": ((1, 48, 48, 48, 48), {"heads": 3, "shifted": False}),
    "swin-shifted": ((1, 24, 24, 24, 96), {"heads": 6, "shifted": True}),
    "swin-deep": ((1, 12, 12, 12, 192), {"heads": 12, "shifted": True}),
}

Setup = Callable[[], tuple[Callable[[], Any], dict[str, str]]]


def _ours(case: str, dtype: str, mode: str) -> Setup:
    def setup() -> tuple[Callable[[], Any], dict[str, str]]:
        import jax
        import jax.numpy as jnp

        from medjax import runtime
        from medjax.models.attention import WindowBlock
        from medjax.models.mednext import MedNeXtBlock

        shape, options = CASES[case]
        kind = jnp.dtype(dtype)
        net: Any
        if case.startswith("mednext"):
            net = MedNeXtBlock(shape[-1], options["expansion"], (options["kernel"],) * 3, dtype=kind)
        else:
            window, mlp = (7, 7, 7), 4 * shape[-1]
            net = WindowBlock(options["heads"], window, options["shifted"], mlp, True, False, 0.0, 0.0, False, kind)
        x = jax.random.normal(jax.random.key(0), shape).astype(kind)
        params = jax.jit(net.init)(jax.random.key(1), x)

        def loss(params: Any, x: Any) -> Any:
            return jnp.square(net.apply(params, x).astype(jnp.float32)).mean()

        function = jax.jit(jax.grad(loss, (0, 1)) if mode == "train" else net.apply)

        def run() -> None:
            jax.block_until_ready(function(params, x))

        run()
        runtime.release_unused()
        return run, {"jax": jax.__version__}

    return setup


def _torch(case: str, dtype: str, mode: str, variant: str) -> Setup:
    def setup() -> tuple[Callable[[], Any], dict[str, str]]:
        import monai
        import torch
        from monai.networks.blocks.mednext_block import MedNeXtBlock
        from monai.networks.nets import swin_unetr

        (n, *space, channels), options = CASES[case]
        torch.manual_seed(0)
        half = dtype == "bfloat16"

        def make(layout: Any) -> Callable[[], None]:
            if case.startswith("mednext"):
                block: Any = MedNeXtBlock(channels, channels, options["expansion"], options["kernel"])
                block = block.to(memory_format=layout)
                x = torch.randn(n, channels, *space).to(memory_format=layout)
                arguments: tuple[Any, ...] = ()
            else:
                shift = (3, 3, 3) if options["shifted"] else (0, 0, 0)
                block = swin_unetr.SwinTransformerBlock(channels, options["heads"], (7, 7, 7), shift)
                x = torch.randn(n, *space, channels)
                # As the network does: one mask a stage, made beforehand.
                mask = swin_unetr.compute_mask([-(-s // 7) * 7 for s in space], (7, 7, 7), shift, x.device)
                arguments = (mask if options["shifted"] else None,)
            x.requires_grad_(mode == "train")

            def forward(x: Any) -> Any:
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    return block(x, *arguments)

            if variant == "compile":
                forward = torch.compile(forward)

            def train() -> None:
                block.zero_grad(set_to_none=True)
                x.grad = None
                forward(x).float().square().mean().backward()

            def infer() -> None:
                with torch.inference_mode():
                    forward(x)

            return train if mode == "train" else infer

        formats = (torch.contiguous_format, torch.channels_last_3d)
        layouts = {str(f).rsplit(".", 1)[-1]: f for f in formats[: 2 if case.startswith("mednext") else 1]}
        runs = {name: make(layout) for name, layout in layouts.items()}
        best = harness.fastest(runs)
        return runs[best], {"torch": torch.__version__, "monai": monai.__version__, "torch_layout": best}

    return setup


def _work(side: str, case: str, dtype: str, mode: str) -> None:
    if side == "ours":
        harness.serve_jax(_ours(case, dtype, mode), "flax.linen")
    else:
        harness.serve_peer(_torch(case, dtype, mode, side), "torch", "monai.networks.nets")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has torch and monai")
    parser.add_argument("--variants", default="eager")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--modes", default="train,infer")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--work", nargs=4, metavar=("SIDE", "CASE", "DTYPE", "MODE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return _work(*options.work)

    def side(python: str, name: str, case: tuple[str, str, str]) -> harness.Worker:
        return harness.Worker([python, "-m", "benchmarks.blocks", "--work", name, *case])

    for case in options.cases.split(","):
        for dtype in options.dtypes.split(","):
            for mode in options.modes.split(","):
                for variant in options.variants.split(","):
                    this = (case, dtype, mode)
                    line = {"bench": "blocks", "case": case, "dtype": dtype, "mode": mode, "peer": f"torch-{variant}"}
                    ours, peer = side(sys.executable, "ours", this), side(options.peer_python, variant, this)
                    harness.compare(line, ours, peer, options.repetitions, in_a_row=5)
    return None


if __name__ == "__main__":
    main()
