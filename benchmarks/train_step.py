"""A U-Net's training step or forward pass on the CPU, medjax against PyTorch or against plain XLA.

    python -m benchmarks.train_step --peer=torch [--peer-python=/path/to/python] [--cases=a,b,c] ...

Both sides have the same network (encoder and decoder of two convolution-normalisation-activation blocks a stage,
strided 2x2x2 maps between stages), the same loss (cross-entropy and soft Dice) and the same optimizer (SGD with
Nesterov momentum), on random images. Peers of `--peer=torch`, by `--variants`:

    eager      as installed, in its better memory format (both are tried)
    compile    torch.compile on top
    tuned      torch.compile, jemalloc and huge pages (needs libjemalloc: `apt install libjemalloc2`, or --jemalloc)

The two sides take turns of three steps each. `--peer=xla` is medjax itself with XLA's own convolutions
(MEDJAX_NATIVE=0). The lines' form: `benchmarks/harness.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from benchmarks import harness

# Shape of the images [N, X, Y, Z, C] and features of the stages.
CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "a": ((2, 64, 64, 64, 4), (16, 32, 64, 128)),
    "b": ((1, 96, 96, 96, 4), (32, 64, 128, 256)),
    "c": ((9, 40, 56, 40, 1), (32, 64, 128)),
}
_CLASSES = 4
_RATE, _MOMENTUM = 1e-3, 0.99

Setup = Callable[[], tuple[Callable[[], Any], dict[str, str]]]


def _ours(case: str, dtype: str, mode: str) -> Setup:
    def setup() -> tuple[Callable[[], Any], dict[str, str]]:
        import flax.linen as nn
        import jax
        import jax.numpy as jnp
        import optax

        from medjax import runtime
        from medjax.losses import segmentation
        from medjax.models.layers import Conv3D
        from medjax.models.unet import UNet

        shape, features = CASES[case]
        compute = jnp.dtype(dtype)

        class Net(nn.Module):
            @nn.compact
            def __call__(self, x: Any) -> Any:
                finest = UNet(features=features, levels=1, dtype=compute)(x)[0]
                return Conv3D(_CLASSES, (1, 1, 1), dtype=compute, name="head")(finest)

        net = Net()
        keys = jax.random.split(jax.random.key(0), 3)
        x = jax.random.normal(keys[0], shape)
        labels = jax.random.randint(keys[1], shape[:4], 0, _CLASSES)
        params = jax.jit(net.init)(keys[2], x)
        optimizer = optax.sgd(_RATE, momentum=_MOMENTUM, nesterov=True)

        def loss(params: Any) -> Any:
            logits: Any = net.apply(params, x)
            return segmentation.dice_ce(logits, labels).mean()

        @jax.jit(donate_argnums=(0, 1))
        def step(params: Any, state: Any) -> tuple[Any, Any, Any]:
            value, gradient = jax.value_and_grad(loss)(params)
            update, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, update), state, value

        forward = jax.jit(net.apply)
        kept = [params, jax.jit(optimizer.init)(params)]

        def train() -> None:
            kept[0], kept[1], value = step(*kept)
            value.block_until_ready()

        def infer() -> None:
            forward(params, x).block_until_ready()

        run = train if mode == "train" else infer
        run()
        runtime.release_unused()
        return run, {"jax": jax.__version__}

    return setup


def _torch(case: str, dtype: str, mode: str, variant: str) -> Setup:
    def setup() -> tuple[Callable[[], Any], dict[str, str]]:
        import torch
        import torch.nn.functional as F
        from torch import nn

        (n, *space, channels), features = CASES[case]

        def block(c: int, f: int, k: int = 3, stride: int = 1) -> nn.Module:
            conv = nn.Conv3d(c, f, k, stride, padding=k // 2 if stride == 1 else 0, bias=False)
            return nn.Sequential(conv, nn.InstanceNorm3d(f, affine=True), nn.LeakyReLU(0.01, inplace=True))

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                pairs = list(zip((channels, *features[:-1]), features, strict=True))
                self.down = nn.ModuleList([block(c, f, 2, 2) for c, f in pairs[1:]])
                firsts = (channels, *features[1:])
                self.encoder = nn.ModuleList(
                    [nn.Sequential(block(c, f), block(f, f)) for c, f in zip(firsts, features, strict=True)]
                )
                self.up = nn.ModuleList([nn.ConvTranspose3d(f, c, 2, 2) for c, f in pairs[1:]])
                self.decoder = nn.ModuleList([nn.Sequential(block(2 * c, c), block(c, c)) for c, _ in pairs[1:]])
                self.head = nn.Conv3d(features[0], _CLASSES, 1)

            def forward(self, x: Any) -> Any:
                skips = []
                for i, stage in enumerate(self.encoder):
                    x = stage(self.down[i - 1](x) if i else x)
                    skips.append(x)
                for i in reversed(range(len(self.up))):
                    x = self.decoder[i](torch.cat([self.up[i](x), skips[i]], 1))
                return self.head(x)

        torch.manual_seed(0)
        half = dtype == "bfloat16"

        def make(layout: Any, compiled: bool) -> Callable[[], None]:
            net = Net().to(memory_format=layout)
            x = torch.randn(n, channels, *space).to(memory_format=layout)
            labels = torch.randint(0, _CLASSES, (n, *space))
            optimizer = torch.optim.SGD(net.parameters(), _RATE, _MOMENTUM, nesterov=True)

            def forward(x: Any) -> Any:
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    return net(x)

            def loss(x: Any, labels: Any) -> Any:
                logits = forward(x).float()
                p = torch.softmax(logits, 1)[:, 1:]
                t = F.one_hot(labels, _CLASSES).movedim(-1, 1)[:, 1:].to(p.dtype)
                dims = (2, 3, 4)
                dice = (2 * (p * t).sum(dims) + 1) / (p.sum(dims) + t.sum(dims) + 1)
                return F.cross_entropy(logits, labels) + 1 - dice.mean()

            if compiled:
                forward, loss = torch.compile(forward), torch.compile(loss)

            def train() -> None:
                optimizer.zero_grad(set_to_none=True)
                loss(x, labels).backward()
                optimizer.step()

            def infer() -> None:
                with torch.inference_mode():
                    forward(x)

            return train if mode == "train" else infer

        layouts = {str(f).rsplit(".", 1)[-1]: f for f in (torch.contiguous_format, torch.channels_last_3d)}
        runs = {name: make(layout, variant != "eager") for name, layout in layouts.items()}
        best = harness.fastest(runs)
        return runs[best], {"torch": torch.__version__, "torch_layout": best}

    return setup


def _work(side: str, case: str, dtype: str, mode: str) -> None:
    if side == "ours":
        harness.serve_jax(_ours(case, dtype, mode), "flax.linen", "optax")
    else:
        harness.serve_peer(_torch(case, dtype, mode, side), "torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=("torch", "xla"), default="torch")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the peer installed")
    parser.add_argument("--variants", default="eager,compile,tuned")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--modes", default="train,infer")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--jemalloc", help="path of libjemalloc.so.2")
    parser.add_argument("--work", nargs=4, metavar=("SIDE", "CASE", "DTYPE", "MODE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return _work(*options.work)

    def side(python: str, name: str, case: tuple[str, str, str], **environment: str) -> harness.Worker:
        command = [python, "-m", "benchmarks.train_step", "--work", name, *case]
        return harness.Worker(command, {k: v for k, v in environment.items() if v})

    tuned = harness.jemalloc(options.jemalloc)
    for case in options.cases.split(","):
        for dtype in options.dtypes.split(","):
            for mode in options.modes.split(","):
                this = (case, dtype, mode)
                variants = options.variants.split(",") if options.peer == "torch" else [""]
                for variant in variants:
                    if variant == "tuned" and tuned is None:
                        print("benchmark: no libjemalloc.so.2: the variant 'tuned' is left out", file=sys.stderr)
                        continue
                    if options.peer == "xla":
                        peer = side(sys.executable, "ours", this, MEDJAX_NATIVE="0")
                    else:
                        peer = side(options.peer_python, variant, this, **(tuned or {}) if variant == "tuned" else {})
                    name = f"torch-{variant}" if variant else "xla"
                    line = {"bench": "train_step", "case": case, "dtype": dtype, "mode": mode, "peer": name}
                    harness.compare(line, side(sys.executable, "ours", this), peer, options.repetitions, in_a_row=3)
    return None


if __name__ == "__main__":
    main()
