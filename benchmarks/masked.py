"""A masked-pretraining step on the CPU: MAE of a ViT by visible tokens, and medjax against PyTorch.

    python -m benchmarks.masked --peer=dense [--ratios=0.5,0.75,0.9]
    python -m benchmarks.masked --peer=torch [--peer-python=/path/to/python] [--cases=vit,unet] ...

With `--peer=dense` both sides are medjax: the same transformer and decoder, with a share of the tokens hidden against
with none hidden. With `--peer=torch` both sides take the same step, from the image and the choice of blocks to the
updated weights (AdamW):

    vit     masked autoencoder of a vision transformer: the encoder sees visible tokens, a small one predicts the rest
    unet    a U-Net whose encoder is confined to visible voxels (masked convolutions, statistics over visible voxels),
            skips filled with learnt tokens, its own decoder

Both have the loss on hidden voxels alone. Turns of three steps; the lines' form: `benchmarks/harness.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from benchmarks import harness

# Shape of the images [N, X, Y, Z, C], voxels of a block, and what the net is made with.
CASES: dict[str, tuple[tuple[int, ...], int, dict[str, Any]]] = {
    "vit": ((4, 64, 64, 64, 1), 8, {"features": 384, "depth": 8, "heads": 6, "mlp": 1536}),
    "unet": ((2, 64, 64, 64, 4), 8, {"features": (16, 32, 64, 128)}),
}
_DECODER: dict[str, Any] = {"features": 192, "depth": 2, "heads": 6}
_RATE = 1e-4

Setup = Callable[[], tuple[Callable[[], Any], dict[str, str]]]


def _ours(case: str, dtype: str, ratio: float) -> Setup:
    def setup() -> tuple[Callable[[], Any], dict[str, str]]:
        import jax
        import jax.numpy as jnp
        import numpy as np
        import optax

        from medjax import runtime, tasks
        from medjax.models import pretext
        from medjax.models.model import Model
        from medjax.models.unet import UNet
        from medjax.models.vit import ViT
        from medjax.tasks import masked

        shape, block, options = CASES[case]
        kind = jnp.dtype(dtype)
        # Nothing hidden is no task, but it is what the others are measured against.
        hide = lambda ratio, blocks: round(ratio * blocks)  # noqa: E731
        masked.hidden_blocks = pretext.hidden_blocks = hide
        decoder = "light" if case == "vit" else "backbone"
        task = masked.Masked("mae", block=(block,) * 3, ratio=0.5, decoder=decoder, **_DECODER)
        object.__setattr__(task, "ratio", ratio)
        net: Any = ViT(patch=(block,) * 3, dtype=kind, **options) if case == "vit" else UNet(dtype=kind, **options)
        model = Model(net, {"mae": task.head()})
        image = jax.random.normal(jax.random.key(0), shape)
        rows = shape[0]
        batch = {
            "image": image,
            "modality": jnp.ones((rows, shape[-1]), bool),
            "example": jnp.arange(rows),
            "valid": jnp.ones(rows, bool),
        }
        params = jax.jit(lambda: model.init(jax.random.key(1), image, train=True))()
        optimizer = optax.adamw(_RATE)

        def loss(params: Any, batch: Any) -> Any:
            views = tasks.views({"mae": task}, batch)
            outputs: Any = model.apply(params, batch["image"], train=True, views=views)
            return task.loss(outputs["mae"], batch).mean()

        @jax.jit(donate_argnums=(0, 1))
        def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, Any]:
            value, gradient = jax.value_and_grad(loss)(params, task.prepare(jax.random.key(2), batch))
            update, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, update), state, value

        kept = [params, jax.jit(optimizer.init)(params)]
        first = np.arange(rows)

        def run() -> None:
            batch["example"] = jnp.asarray(first)
            first[:] += rows
            kept[0], kept[1], value = step(*kept, batch)
            value.block_until_ready()

        run()
        runtime.release_unused()
        return run, {"jax": jax.__version__}

    return setup


def _torch(case: str, dtype: str, ratio: float, variant: str) -> Setup:
    def setup() -> tuple[Callable[[], Any], dict[str, str]]:
        import torch
        import torch.nn.functional as F
        from torch import nn

        (n, *space, channels), block, options = CASES[case]
        grid = [s // block for s in space]
        total = grid[0] * grid[1] * grid[2]
        hidden = round(ratio * total)
        torch.manual_seed(0)

        def to_blocks(x: Any) -> Any:
            x = x.reshape(n, channels, grid[0], block, grid[1], block, grid[2], block)
            return x.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(n, total, -1)

        class Block(nn.Module):
            def __init__(self, width: int, heads: int, mlp: int, bias: bool) -> None:
                super().__init__()
                self.heads = heads
                self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
                self.qkv, self.proj = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width)
                self.mlp = nn.Sequential(nn.Linear(width, mlp), nn.GELU(), nn.Linear(mlp, width))

            def forward(self, x: Any) -> Any:
                b, t, c = x.shape
                q, k, v = self.qkv(self.norm1(x)).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
                y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c)
                x = x + self.proj(y)
                return x + self.mlp(self.norm2(x))

        class Tokens(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                width, narrow = options["features"], _DECODER["features"]
                self.embed = nn.Conv3d(channels, width, block, block)
                self.position = nn.Parameter(0.02 * torch.randn(total, width))
                self.blocks = nn.Sequential(
                    *(Block(width, options["heads"], options["mlp"], False) for _ in range(options["depth"]))
                )
                self.norm, self.narrow = nn.LayerNorm(width), nn.Linear(width, narrow)
                self.mask = nn.Parameter(0.02 * torch.randn(narrow))
                self.place = nn.Parameter(0.02 * torch.randn(total, narrow))
                self.decoder = nn.Sequential(
                    *(Block(narrow, _DECODER["heads"], 4 * narrow, True) for _ in range(_DECODER["depth"]))
                )
                self.last, self.out = nn.LayerNorm(narrow), nn.Linear(narrow, block**3 * channels)

            def forward(self, x: Any, order: Any) -> Any:
                kept = total - hidden
                x = self.embed(x).flatten(2).transpose(1, 2) + self.position
                x = torch.gather(x, 1, order[:, :kept, None].expand(-1, -1, x.shape[2]))
                y = self.narrow(self.norm(self.blocks(x)))
                y = torch.cat([y, self.mask.expand(n, hidden, -1)], 1)
                y = torch.gather(y, 1, order.argsort(1)[:, :, None].expand(-1, -1, y.shape[2])) + self.place
                return self.out(self.last(self.decoder(y)))

        class Norm(nn.Module):
            """Instance normalisation over visible voxels, leaky ReLU."""

            def __init__(self, features: int) -> None:
                super().__init__()
                self.scale, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))

            def forward(self, x: Any, seen: Any) -> Any:
                number = seen.sum((2, 3, 4), keepdim=True)
                mean = (x * seen).sum((2, 3, 4), keepdim=True) / number
                centred = (x - mean) * seen
                r = torch.rsqrt(centred.square().sum((2, 3, 4), keepdim=True) / number + 1e-5)
                y = centred * r * self.scale[:, None, None, None] + self.bias[:, None, None, None]
                return F.leaky_relu(y, 0.01) * seen

        class Sparse(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                features = options["features"]

                def conv(c: int, f: int, k: int = 3) -> nn.Module:
                    return nn.Conv3d(c, f, k, 1 if k == 3 else k, k // 2 if k == 3 else 0, bias=False)

                def dense(c: int, f: int) -> nn.Module:
                    norm = nn.InstanceNorm3d(f, affine=True)
                    return nn.Sequential(conv(c, f), norm, nn.LeakyReLU(0.01, inplace=True))

                pairs = list(zip((channels, *features[:-1]), features, strict=True))
                self.down = nn.ModuleList([conv(c, f, 2) for c, f in pairs[1:]])
                self.down_norm = nn.ModuleList([Norm(f) for _, f in pairs[1:]])
                firsts = zip((channels, *features[1:]), features, strict=True)
                self.convs = nn.ModuleList([nn.ModuleList([conv(c, f), conv(f, f)]) for c, f in firsts])
                self.norms = nn.ModuleList([nn.ModuleList([Norm(f), Norm(f)]) for f in features])
                # Of rank 5, which `channels_last_3d` wants of every parameter that is no vector.
                self.tokens = nn.ParameterList([0.02 * torch.randn(1, f, 1, 1, 1) for f in features])
                self.up = nn.ModuleList([nn.ConvTranspose3d(f, c, 2, 2) for c, f in pairs[1:]])
                self.decoder = nn.ModuleList([nn.Sequential(dense(2 * c, c), dense(c, c)) for c, _ in pairs[1:]])
                self.head = nn.Conv3d(features[0], channels, 1)

            def forward(self, x: Any, order: Any) -> Any:
                seen = torch.zeros(n, total).scatter_(1, order[:, : total - hidden], 1.0).reshape(n, 1, *grid)
                masks = [F.interpolate(seen, scale_factor=block // 2**i) for i in range(len(self.convs))]
                x, skips = x * masks[0], []
                for i, (convs, norms) in enumerate(zip(self.convs, self.norms, strict=True)):
                    if i:
                        x = self.down_norm[i - 1](self.down[i - 1](x), masks[i])
                    for conv, norm in zip(convs, norms, strict=True):
                        x = norm(conv(x), masks[i])
                    skips.append(torch.where(masks[i] > 0, x, self.tokens[i].to(x.dtype)))
                x = skips[-1]
                for i in reversed(range(len(self.up))):
                    x = self.decoder[i](torch.cat([self.up[i](x), skips[i]], 1))
                return to_blocks(self.head(x))

        net = Tokens() if case == "vit" else Sparse()
        layout = torch.contiguous_format if case == "vit" else torch.channels_last_3d
        net = net.to(memory_format=layout)
        image = torch.randn(n, channels, *space).to(memory_format=layout)
        optimizer = torch.optim.AdamW(net.parameters(), _RATE)

        def loss(image: Any, order: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                predicted = net(image, order)
            errors = (predicted.float() - to_blocks(image)).square().mean(-1)
            return torch.gather(errors, 1, order[:, total - hidden :]).mean()

        if variant != "eager":
            loss = torch.compile(loss)

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            loss(image, torch.rand(n, total).argsort(1)).backward()
            optimizer.step()

        return run, {"torch": torch.__version__}

    return setup


def _work(side: str, case: str, dtype: str, ratio: str) -> None:
    if side == "ours":
        harness.serve_jax(_ours(case, dtype, float(ratio)), "flax.linen", "optax")
    else:
        harness.serve_peer(_torch(case, dtype, float(ratio), side), "torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=("dense", "torch"), default="torch")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the peer installed")
    parser.add_argument("--variants", default="eager,compile,tuned")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--ratios", default="", help="shares hidden (default 0.75; of the peer 'dense' 0.5,0.75,0.9)")
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--jemalloc", help="path of libjemalloc.so.2")
    parser.add_argument("--work", nargs=4, metavar=("SIDE", "CASE", "DTYPE", "RATIO"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return _work(*options.work)

    def side(python: str, name: str, *case: str, **environment: str) -> harness.Worker:
        return harness.Worker([python, "-m", "benchmarks.masked", "--work", name, *case], environment)

    dense = options.peer == "dense"
    tuned = harness.jemalloc(options.jemalloc)
    for case in ["vit"] if dense else options.cases.split(","):
        for dtype in options.dtypes.split(","):
            for ratio in (options.ratios or ("0.5,0.75,0.9" if dense else "0.75")).split(","):
                for variant in ["dense"] if dense else options.variants.split(","):
                    if variant == "tuned" and tuned is None:
                        print("benchmark: no libjemalloc.so.2: the variant 'tuned' is left out", file=sys.stderr)
                        continue
                    if dense:
                        peer = side(sys.executable, "ours", case, dtype, "0")
                    else:
                        more = (tuned or {}) if variant == "tuned" else {}
                        peer = side(options.peer_python, variant, case, dtype, ratio, **more)
                    name = "dense" if dense else f"torch-{variant}"
                    line = {"bench": "masked", "case": f"{case}-{ratio}", "dtype": dtype, "mode": "train", "peer": name}
                    ours = side(sys.executable, "ours", case, dtype, ratio)
                    harness.compare(line, ours, peer, options.repetitions, in_a_row=3)
    return None


if __name__ == "__main__":
    main()
