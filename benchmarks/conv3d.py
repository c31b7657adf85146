"""Single 3D convolutions on the CPU, medjax against PyTorch or against XLA's own.

    python -m benchmarks.conv3d --peer=torch [--peer-python=/path/to/python] [--cases=k3_64,...]

Mode `infer` is the forward pass, `train` the forward pass and both gradients. PyTorch runs eagerly in its better memory
format. The lines' form: `benchmarks/harness.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks import harness


class Case(NamedTuple):
    """A convolution: image [N, X, Y, Z], channels in and out, kernel, stride, groups; or its transpose."""

    image: tuple[int, int, int, int]
    channels: int
    features: int
    kernel: tuple[int, int, int]
    stride: int = 1
    groups: int = 1
    transposed: bool = False


CASES = {
    "k3_first": Case((2, 64, 64, 64), 4, 16, (3, 3, 3)),
    "k3_64": Case((2, 64, 64, 64), 16, 16, (3, 3, 3)),
    "k3_concat": Case((2, 64, 64, 64), 32, 16, (3, 3, 3)),
    "k3_32": Case((2, 32, 32, 32), 32, 32, (3, 3, 3)),
    "k3_8": Case((2, 8, 8, 8), 128, 128, (3, 3, 3)),
    "k3_stride2": Case((2, 64, 64, 64), 16, 32, (3, 3, 3), 2),
    "k133": Case((2, 64, 64, 32), 32, 32, (1, 3, 3)),
    "k5": Case((2, 32, 32, 32), 32, 32, (5, 5, 5)),
    "k7_depthwise": Case((2, 32, 32, 32), 32, 32, (7, 7, 7), 1, 32),
    "k1_head": Case((2, 64, 64, 64), 16, 4, (1, 1, 1)),
    "down": Case((2, 64, 64, 64), 16, 32, (2, 2, 2), 2),
    "up": Case((2, 32, 32, 32), 32, 16, (2, 2, 2), 2, 1, True),
}

Setup = Callable[[], tuple[Callable[[], Any], dict[str, str]]]


def _ours(case: Case, dtype: str, mode: str) -> Setup:
    def setup() -> tuple[Callable[[], Any], dict[str, str]]:
        import jax
        import jax.numpy as jnp

        from medjax.ops.conv3d import conv3d, patch_conv, patch_conv_transpose

        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], (*case.image, case.channels), jnp.dtype(dtype))
        w = jax.random.normal(keys[1], (*case.kernel, case.channels // case.groups, case.features), x.dtype)

        def forward(x: Any, w: Any) -> Any:
            if case.transposed:
                return patch_conv_transpose(x, w)
            if case.kernel == (case.stride,) * 3:
                return patch_conv(x, w)
            return conv3d(x, w, case.stride, [k // 2 for k in case.kernel], groups=case.groups)

        g = jax.random.normal(keys[2], jax.eval_shape(forward, x, w).shape, x.dtype)

        def train(x: Any, w: Any, g: Any) -> Any:
            y, back = jax.vjp(forward, x, w)
            return y, *back(g)

        compiled = jax.jit(forward if mode == "infer" else train)
        operands = (x, w) if mode == "infer" else (x, w, g)
        return lambda: jax.block_until_ready(compiled(*operands)), {"jax": jax.__version__}

    return setup


def _torch(case: Case, dtype: str, mode: str) -> Setup:
    def setup() -> tuple[Callable[[], Any], dict[str, str]]:
        import torch
        import torch.nn.functional as F

        torch.manual_seed(0)
        n, *space = case.image
        kind = getattr(torch, dtype)

        def make(layout: Any) -> Callable[[], Any]:
            x = torch.randn(n, case.channels, *space, dtype=kind).to(memory_format=layout)
            shape = (case.channels, case.features) if case.transposed else (case.features, case.channels // case.groups)
            w = torch.randn(*shape, *case.kernel, dtype=kind).to(memory_format=layout)

            def forward() -> Any:
                if case.transposed:
                    return F.conv_transpose3d(x, w, stride=case.stride)
                padding = [0] * 3 if case.kernel == (case.stride,) * 3 else [k // 2 for k in case.kernel]
                return F.conv3d(x, w, stride=case.stride, padding=padding, groups=case.groups)

            if mode == "infer":

                def infer() -> None:
                    with torch.inference_mode():
                        forward()

                return infer
            x.requires_grad_()
            w.requires_grad_()
            g = torch.randn_like(forward())

            def train() -> None:
                x.grad = w.grad = None
                forward().backward(g)

            return train

        layouts = {str(f).rsplit(".", 1)[-1]: f for f in (torch.contiguous_format, torch.channels_last_3d)}
        runs = {name: make(layout) for name, layout in layouts.items()}
        best = harness.fastest(runs)
        return runs[best], {"torch": torch.__version__, "torch_layout": best}

    return setup


def _work(side: str, case: str, dtype: str, mode: str) -> None:
    if side == "ours":
        harness.serve_jax(_ours(CASES[case], dtype, mode))
    else:
        harness.serve_peer(_torch(CASES[case], dtype, mode), "torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=("torch", "xla"), default="torch")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the peer installed")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--modes", default="train,infer")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--work", nargs=4, metavar=("SIDE", "CASE", "DTYPE", "MODE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return _work(*options.work)
    for case in options.cases.split(","):
        for dtype in options.dtypes.split(","):
            for mode in options.modes.split(","):
                work = ["-m", "benchmarks.conv3d", "--work"]
                ours = harness.Worker([sys.executable, *work, "ours", case, dtype, mode])
                if options.peer == "xla":
                    peer = harness.Worker([sys.executable, *work, "ours", case, dtype, mode], {"MEDJAX_NATIVE": "0"})
                else:
                    peer = harness.Worker([options.peer_python, *work, "torch", case, dtype, mode])
                line = {"bench": "conv3d", "case": case, "dtype": dtype, "mode": mode, "peer": options.peer}
                harness.compare(line, ours, peer, options.repetitions)
    return None


if __name__ == "__main__":
    main()
