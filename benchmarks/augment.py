"""Augmentation of patches with their label map, medjax on the device against batchgeneratorsv2 in processes of its own.

    python -m benchmarks.augment --peer=batchgeneratorsv2 --peer-python=/path/to/python [--cases=a,b] ...
    python -m benchmarks.augment --peer=xla        # medjax itself with XLA's own operations (MEDJAX_NATIVE=0)
    python -m benchmarks.augment --peer=none       # medjax alone, e.g. on a GPU; prints patches a second

Both sides have nnU-Net's default policy with its published probabilities, on random images and a label map of nested
balls. A repetition is `--patches` patches with fresh random numbers, in batches of two on our side; on the peer's, two
processes (`--processes`) with a thread each take patches from one queue and hand results over in shared memory, as
nnU-Net's loader has it. The lines' form: `benchmarks/harness.py`; the seconds are those of a repetition.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import harness

# Shape of a patch [X, Y, Z, C].
CASES = {"a": (128, 128, 128, 4), "b": (128, 128, 128, 1), "c": (20, 256, 224, 1)}
_LABELS, _BATCH = 4, 2

Setup = Callable[[], tuple[Callable[[], Any], dict[str, str]]]


def _balls(shape: tuple[int, ...]) -> np.ndarray:
    """Nested balls [X, Y, Z], labels 0.._LABELS - 1."""
    axes = [(np.arange(n) + 0.5) / n - 0.5 for n in shape]
    radius = np.sqrt(sum(a**2 for a in np.meshgrid(*axes, indexing="ij")))
    return sum((radius < 0.45 * (i + 1) / _LABELS).astype(np.uint8) for i in range(_LABELS - 1))  # type: ignore[return-value]


def _ours(case: str, dtype: str, patches: int) -> Setup:
    def setup() -> tuple[Callable[[], Any], dict[str, str]]:
        import jax
        import jax.numpy as jnp

        from medjax.augment import policy

        shape = CASES[case]
        rng = np.random.default_rng(0)
        thick = shape[0] < shape[1] / 3
        batch = {
            "image": jnp.asarray(rng.normal(size=(_BATCH, *shape)), dtype),
            "spacing": jnp.asarray([[5.0 if thick else 1.0, 1.0, 1.0]] * _BATCH, jnp.float32),
            "modality": jnp.ones((_BATCH, shape[3]), bool),
            "seg/target": jnp.asarray(np.stack([_balls(shape[:3])] * _BATCH)),
            "seg/mask": jnp.ones(_BATCH, bool),
        }
        augment = jax.jit(policy.build({"policy": "nnunet"}, ("seg",), 0))
        number = [0]

        def repeat() -> None:
            for _ in range(patches // _BATCH):
                number[0] += _BATCH
                out = augment({**batch, "example": jnp.arange(_BATCH) + number[0]})
                out["image"].block_until_ready()

        begun = time.perf_counter()
        repeat()
        print(f"first {patches} patches, compilation included: {time.perf_counter() - begun:.1f} s", file=sys.stderr)
        return repeat, {"jax": jax.__version__}

    return setup


def _pipeline(shape: tuple[int, ...]) -> Any:
    """nnU-Net's training transforms of batchgeneratorsv2, without what only reformats targets."""
    from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
    from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
    from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
    from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
    from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
    from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
    from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
    from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
    from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
    from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform
    from batchgeneratorsv2.transforms.utils.random import RandomTransform

    flat = shape[0] < shape[1] / 3
    angle = np.pi if flat else np.pi / 6
    spatial = SpatialTransform(
        shape[1:] if flat else shape, patch_center_dist_from_border=0, random_crop=False, p_elastic_deform=0,
        p_rotation=0.2, rotation=(-angle, angle), p_scaling=0.2, scaling=(0.7, 1.4),
        p_synchronize_scaling_across_axes=1, bg_style_seg_sampling=False,
    )  # fmt: skip
    around = [Convert3DTo2DTransform(), spatial, Convert2DTo3DTransform()] if flat else [spatial]
    each: dict[str, Any] = {"synchronize_channels": False, "p_per_channel": 1}
    blur = GaussianBlurTransform(
        blur_sigma=(0.5, 1.0), synchronize_channels=False, synchronize_axes=False, p_per_channel=0.5, benchmark=True
    )
    coarse = SimulateLowResolutionTransform(
        scale=(0.5, 1), synchronize_channels=False, synchronize_axes=True, ignore_axes=(0,) if flat else None,
        allowed_channels=None, p_per_channel=0.5,
    )  # fmt: skip

    def gamma(invert: int) -> Any:
        return GammaTransform(gamma=BGContrast((0.7, 1.5)), p_invert_image=invert, p_retain_stats=1, **each)

    factor = BGContrast((0.75, 1.25))
    return ComposeTransforms(
        [
            *around,
            RandomTransform(GaussianNoiseTransform((0, 0.1), p_per_channel=1, synchronize_channels=True), 0.1),
            RandomTransform(blur, 0.2),
            RandomTransform(MultiplicativeBrightnessTransform(factor, **each), 0.15),
            RandomTransform(ContrastTransform(factor, preserve_range=True, **each), 0.15),
            RandomTransform(coarse, 0.25),
            RandomTransform(gamma(1), 0.1),
            RandomTransform(gamma(0), 0.3),
            MirrorTransform(allowed_axes=(0, 1, 2)),
        ]
    )


def _produce(case: str, orders: Any, results: Any) -> None:
    """A process of the peer's: a patch for each order."""
    import torch

    torch.set_num_threads(1)
    *space, channels = CASES[case]
    image = torch.from_numpy(np.random.default_rng(0).normal(size=(channels, *space)).astype(np.float32))
    labels = torch.from_numpy(_balls(tuple(space)).astype(np.int16))[None]
    transforms = _pipeline(tuple(space))
    while True:
        seed = orders.get()
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        out = transforms(image=image.clone(), segmentation=labels.clone())
        results.put((out["image"], out["segmentation"]))


def _theirs(case: str, patches: int, processes: int) -> Setup:
    def setup() -> tuple[Callable[[], Any], dict[str, str]]:
        import importlib.metadata

        import torch
        import torch.multiprocessing as mp

        torch.set_num_threads(1)
        context = mp.get_context("fork")
        orders, results = context.Queue(), context.Queue(maxsize=4)
        for _ in range(processes):
            context.Process(target=_produce, args=(case, orders, results), daemon=True).start()
        number = [0]

        def repeat() -> None:
            for _ in range(patches):
                number[0] += 1
                orders.put(number[0])
            for _ in range(patches):
                results.get()

        repeat()
        versions = {n: importlib.metadata.version(n) for n in ("torch", "batchgeneratorsv2")}
        return repeat, versions

    return setup


def _imports_ours() -> None:
    import jax

    jax.devices()


def _imports_theirs() -> None:
    import torch  # noqa: F401


def _work(side: str, case: str, dtype: str, patches: int, processes: int) -> None:
    if side == "ours":
        from medjax import runtime

        runtime.ensure_tuned_allocator()
        harness.serve(_ours(case, dtype, patches), _imports_ours)
    else:
        harness.serve(_theirs(case, patches, processes), _imports_theirs)


def _alone(case: str, dtype: str, patches: int, repetitions: int) -> None:
    import jax

    repeat, versions = _ours(case, dtype, patches)()
    taken = []
    for _ in range(repetitions):
        begun = time.perf_counter()
        repeat()
        taken.append(time.perf_counter() - begun)
    seconds = statistics.median(taken)
    line = {
        "bench": "augment", "case": case, "dtype": dtype, "mode": "nnunet", "peer": None,
        "device": jax.devices()[0].device_kind, "patches": patches, "ours_s": round(seconds, 5),
        "patches_per_s": round(patches / seconds, 2), "versions": versions,
    }  # fmt: skip
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=("batchgeneratorsv2", "xla", "none"), default="batchgeneratorsv2")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the peer installed")
    parser.add_argument("--cases", default="a")
    parser.add_argument("--dtypes", default="float32", help="of our side's images; the peer's are float32")
    parser.add_argument("--patches", type=int, default=32, help="patches of a repetition")
    parser.add_argument("--processes", type=int, default=2, help="of the peer")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--work", nargs=3, metavar=("SIDE", "CASE", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        name, case, dtype = options.work
        return _work(name, case, dtype, options.patches, options.processes)

    def side(python: str, name: str, case: str, dtype: str, **environment: str) -> harness.Worker:
        sizes = [f"--patches={options.patches}", f"--processes={options.processes}"]
        return harness.Worker(
            [python, "-m", "benchmarks.augment", *sizes, "--work", name, case, dtype], environment or None
        )

    for case in options.cases.split(","):
        for dtype in options.dtypes.split(","):
            if options.peer == "none":
                _alone(case, dtype, options.patches, options.repetitions)
                continue
            if options.peer == "xla":
                peer = side(sys.executable, "ours", case, dtype, MEDJAX_NATIVE="0")
            else:
                peer = side(options.peer_python, "theirs", case, dtype)
            name = options.peer if options.peer == "xla" else f"{options.peer}-{options.processes}p"
            line = {"bench": "augment", "case": case, "dtype": dtype, "mode": "nnunet", "peer": name}
            harness.compare(line, side(sys.executable, "ours", case, dtype), peer, options.repetitions)
    return None


if __name__ == "__main__":
    main()
