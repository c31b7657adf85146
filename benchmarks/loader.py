"""Patches from the store, and preprocessing, against MONAI, nnU-Net and TorchIO.

    python -m benchmarks.loader [--peer-python=/path/to/python] [--what=patches,preprocess,memory] [--data=FOLDER] ...

`patches`: warm 96^3 patches in batches of 2, half of them centred on foreground, classes balanced, no augmentation.
Ours come from the store through `medjax.data.pipeline`. Peers, by `--peers`:

    monai    CacheDataset (whole volumes and foreground indices in memory), RandCropByPosNegLabeld, DataLoader
    nnunet   nnU-Net's own loader on its own blosc2 files (its chunking for this patch), alone or behind its
             NonDetMultiThreadedAugmenter

Each peer runs the fastest of its settings (worker processes or none; MONAI: one or four patches a volume), found before
the measurement. `preprocess`: cases from .nii.gz to oriented (RAS), resampled (1 mm) and normalised arrays on two
workers, against `monai` and `torchio`; mode `default` leaves each its own interpolation (ours is cubic, theirs linear),
mode `cubic` asks all for cubic B-splines. `memory`: what building and reading the store take beyond the baseline, in
volumes (one JSON line each, with its own keys). `soak`: resident memory while batches are read for --minutes, some a
second as a training step would. The other lines' form: `benchmarks/harness.py`; memory there is of the main process
alone, so it leaves out what peers hold in worker processes.

The data are synthetic, or --data: a folder in Decathlon layout, from which --cases cases are taken.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks import harness

PATCH, BATCH, WORKERS = 96, 2, 2
_STEP_S = 0.1  # between the batches of `soak`
# Shape, spacing in mm and channels of the synthetic volumes.
VOLUMES: dict[str, tuple[tuple[int, int, int], tuple[float, float, float], int]] = {
    "mr4": ((240, 240, 155), (1.0, 1.0, 1.0), 4),
    "ct1": ((320, 320, 160), (1.0, 1.0, 1.0), 1),
    "thick": ((224, 224, 64), (0.9, 0.9, 2.5), 1),
}
_PEERS = {"patches": ("monai", "nnunet"), "preprocess": ("monai", "torchio")}
_SIZES = {"patches": ("mr4", "ct1"), "preprocess": ("mr4", "thick"), "memory": ("mr4",), "soak": ("mr4",)}


def write_cohort(folder: Path, kind: str, count: int, suffix: str) -> None:
    """`count` synthetic cases in Decathlon layout: a textured head in nothing, a lesion of three parts."""
    import nibabel as nib
    import numpy as np

    shape, spacing, channels = VOLUMES[kind]
    rng = np.random.default_rng(0)
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    grid = np.ogrid[tuple(slice(-1, 1, complex(0, n)) for n in shape)]
    head = grid[0] ** 2 + grid[1] ** 2 + grid[2] ** 2 < 0.7
    # Stored from left to right backwards and front to back backwards, as a scanner does.
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    training = []
    for i in range(count):
        image = rng.normal(300, 60, (*shape, channels)).astype(np.float32)
        centre = rng.uniform(-0.3, 0.3, 3)
        distance = np.sqrt(sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)))
        label = np.select([distance < 0.07, distance < 0.14, distance < 0.22], [3, 1, 2]).astype(np.uint8)
        image += 100 * label[..., None]
        image *= head[..., None]
        image = image[..., 0] if channels == 1 else image
        nib.save(nib.Nifti1Image(image.astype(np.int16), affine), folder / "imagesTr" / f"case{i}{suffix}")
        nib.save(nib.Nifti1Image(label, affine), folder / "labelsTr" / f"case{i}{suffix}")
        training.append({"image": f"imagesTr/case{i}{suffix}", "label": f"labelsTr/case{i}{suffix}"})
    table = {
        "name": kind,
        "modality": {str(c): f"m{c}" for c in range(channels)},
        "labels": {"1": "rim", "2": "oedema", "3": "core"},
        "training": training,
    }
    (folder / "dataset.json").write_text(json.dumps(table))


def _files(folder: Path, count: int) -> list[dict[str, str]]:
    """The first cases of a Decathlon folder, for the peers."""
    table = json.loads((folder / "dataset.json").read_text())
    return [{key: str(folder / record[key]) for key in ("image", "label")} for record in table["training"][:count]]


def _cohort(folder: Path, count: int, spec: dict[str, Any]) -> tuple[Any, Any]:
    """(cases, plan) of a Decathlon folder, ours."""
    from medjax.data import cohort, preprocess

    opened = cohort.from_msd(folder)
    cases = opened.cases[:count]
    return cases, preprocess.fit(spec, opened, cases)


def _versions(*names: str) -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in names}


# ------------------------------------------------------------------------------------------------------------- patches


def _batches(stored: Sequence[Any], cases: Sequence[Any], plan: Any) -> Iterator[Any]:
    """Batches as a run would read them from the store."""
    from medjax.data import pipeline

    source = pipeline.Source(stored, ("segmentation",))
    sampling = {"classes": "balanced", "balance": "", "weight": ""}
    sampler = pipeline.make_sampler(0, source, cases, foreground=0.5, labels=plan.labels, sampling=sampling)
    return pipeline.train_batches(source, sampler, patch=(PATCH,) * 3, batch_size=BATCH, workers=WORKERS)


def _patches_ours(folder: Path, count: int, patches: int) -> harness.Setup:
    def setup() -> tuple[Callable[[], Any], dict[str, str]]:
        from medjax.data import store

        cases, plan = _cohort(folder, count, {"normalize": "zscore_nonzero"})
        opened, _ = store.prepare(folder / "store", "benchmark", plan, {"train": cases}, WORKERS)
        batches = _batches(opened["train"], cases, plan)

        def run() -> None:
            for batch in islice(batches, patches // BATCH):
                assert batch["image"].shape[:2] == (BATCH, PATCH)

        for _ in range(3):  # every block of the files has been touched
            for case in opened["train"]:
                case.image[()], case.targets["segmentation"][()]
        run()
        return run, _versions("tensorflow-cpu")

    return setup


def _patches_monai(folder: Path, count: int, patches: int) -> harness.Setup:
    def setup() -> tuple[Callable[[], Any], dict[str, str]]:
        import numpy as np
        import torch
        from monai import transforms as mt
        from monai.data import CacheDataset, DataLoader

        def runner(per_volume: int, workers: int) -> Callable[[], None]:
            keys = ["image", "label"]
            chain = mt.Compose(
                [
                    mt.LoadImaged(keys),
                    mt.EnsureChannelFirstd(keys),
                    mt.Orientationd(keys, axcodes="RAS"),
                    mt.NormalizeIntensityd("image", nonzero=True, channel_wise=True),
                    mt.EnsureTyped(keys, dtype=[torch.float32, torch.uint8], track_meta=False),
                    mt.FgBgToIndicesd("label"),
                    mt.RandCropByPosNegLabeld(
                        keys,
                        "label",
                        (PATCH,) * 3,
                        num_samples=per_volume,
                        fg_indices_key="label_fg_indices",
                        bg_indices_key="label_bg_indices",
                    ),
                    mt.SelectItemsd(keys),
                ]
            )
            # What is cached is not copied, as the crop is a copy. Each case several times, so that an epoch is long and
            # starting its workers counts little.
            data = CacheDataset(_files(folder, count), chain, num_workers=2, copy_cache=False, progress=False)
            data.data, data._cache, data.cache_num = data.data * 400, list(data._cache) * 400, data.cache_num * 400
            loader = DataLoader(
                data, batch_size=max(1, BATCH // per_volume), num_workers=workers, shuffle=True,
                persistent_workers=bool(workers),
            )  # fmt: skip

            def forever() -> Iterator[Any]:
                while True:
                    yield from loader

            batches = forever()

            def run() -> None:
                done = 0
                while done < patches:
                    batch = next(batches)
                    np.asarray(batch["image"])
                    done += len(batch["image"])

            return run

        options = {f"{n} a volume, {w} workers": runner(n, w) for n in (1, 4) for w in (0, WORKERS)}
        name = harness.fastest(options)
        return options[name], {**_versions("monai", "torch"), "setting": name}

    return setup


def _patches_nnunet(folder: Path, count: int, patches: int) -> harness.Setup:
    def setup() -> tuple[Callable[[], Any], dict[str, str]]:
        import warnings
        from types import SimpleNamespace

        import nibabel as nib
        import numpy as np

        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            os.environ.setdefault(name, str(folder))
        warnings.simplefilter("ignore")
        from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
        from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
        from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

        kept = folder / "blosc2"
        if not kept.exists():
            kept.mkdir()
            for number, files in enumerate(_files(folder, count)):
                image = nib.as_closest_canonical(nib.load(files["image"]))
                label = nib.as_closest_canonical(nib.load(files["label"]))
                data = np.asarray(image.dataobj, np.float32)
                data = np.moveaxis(data, -1, 0) if data.ndim == 4 else data[None]
                for channel in data:
                    inside = channel != 0
                    channel[inside] = (channel[inside] - channel[inside].mean()) / channel[inside].std()
                seg = np.asarray(label.dataobj).astype(np.int8)[None]
                where = {
                    value: np.argwhere(seg == value)[:: max(1, int((seg == value).sum()) // 10000)]
                    for value in (1, 2, 3)
                }
                blocks, chunks = comp_blosc2_params(data.shape, (PATCH,) * 3, data.itemsize)
                blocks_seg, chunks_seg = comp_blosc2_params(seg.shape, (PATCH,) * 3, seg.itemsize)
                nnUNetDatasetBlosc2.save_case(
                    np.ascontiguousarray(data), seg, {"class_locations": where}, str(kept / f"case{number}"),
                    chunks=chunks, blocks=blocks, chunks_seg=chunks_seg, blocks_seg=blocks_seg,
                )  # fmt: skip
        labels = SimpleNamespace(all_labels=[1, 2, 3], has_ignore_label=False)

        def loader() -> Any:
            size = (PATCH,) * 3
            return nnUNetDataLoader(nnUNetDatasetBlosc2(str(kept)), BATCH, size, size, labels, 0.5)

        def runner(batches: Any) -> Callable[[], None]:
            def run() -> None:
                for _ in range(patches // BATCH):
                    assert next(batches)["data"].shape[-1] == PATCH

            return run

        alone = runner(loader())
        spread = runner(NonDetMultiThreadedAugmenter(loader(), None, WORKERS, 2, pin_memory=False))
        options = {"alone": alone, f"{WORKERS} processes": spread}
        name = harness.fastest(options)
        return options[name], {**_versions("nnunetv2", "blosc2", "torch"), "setting": name}

    return setup


# ---------------------------------------------------------------------------------------------------------- preprocess


def _preprocess_ours(folder: Path, count: int, mode: str) -> harness.Setup:
    del mode  # cubic in both

    def setup() -> tuple[Callable[[], Any], dict[str, str]]:
        from medjax.data import dataset

        spec = {"spacing": (1.0, 1.0, 1.0), "normalize": "zscore_nonzero"}
        cases, plan = _cohort(folder, count, spec)
        return lambda: dataset.check(plan, cases, WORKERS), _versions("numpy")

    return setup


def _preprocess_monai(folder: Path, count: int, mode: str) -> harness.Setup:
    def setup() -> tuple[Callable[[], Any], dict[str, str]]:
        import torch
        from monai import transforms as mt
        from monai.data import Dataset

        torch.set_num_threads(1)  # two workers, two cores
        keys = ["image", "label"]
        chain = mt.Compose(
            [
                mt.LoadImaged(keys),
                mt.EnsureChannelFirstd(keys),
                mt.Orientationd(keys, axcodes="RAS"),
                mt.Spacingd(keys, (1.0, 1.0, 1.0), mode=("bilinear" if mode == "default" else 3, "nearest")),
                mt.NormalizeIntensityd("image", nonzero=True, channel_wise=True),
            ]
        )
        return _all_of(Dataset(_files(folder, count), chain)), _versions("monai", "torch")

    return setup


def _preprocess_torchio(folder: Path, count: int, mode: str) -> harness.Setup:
    def setup() -> tuple[Callable[[], Any], dict[str, str]]:
        import SimpleITK
        import torch
        import torchio as tio

        torch.set_num_threads(1)
        SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
        subjects = [
            tio.Subject(image=tio.ScalarImage(files["image"]), label=tio.LabelMap(files["label"]))
            for files in _files(folder, count)
        ]
        chain = tio.Compose(
            [
                tio.ToCanonical(),
                tio.Resample(1.0, image_interpolation="linear" if mode == "default" else "bspline"),
                tio.ZNormalization(masking_method=lambda x: x != 0),
            ]
        )
        return _all_of(tio.SubjectsDataset(subjects, chain)), _versions("torchio", "torch", "SimpleITK")

    return setup


def _all_of(data: Any) -> Callable[[], None]:
    """Every item of a data set once, on two threads: the peers' work is outside the interpreter, and so is fastest."""
    from concurrent.futures import ThreadPoolExecutor

    def take(number: int) -> int:
        return len(data[number])

    def run() -> None:
        with ThreadPoolExecutor(WORKERS) as pool:
            assert all(pool.map(take, range(len(data))))

    return run


# -------------------------------------------------------------------------------------------------------------- memory


def _memory(folder: Path, count: int, patches: int) -> None:
    """Prints what building a store, and then reading from it, take beyond the baseline, in volumes."""
    import numpy as np

    from medjax.data import store

    cases, plan = _cohort(folder, count, {"spacing": (1.0, 1.0, 1.0), "normalize": "zscore_nonzero"})
    volume = np.prod(plan.prepared_shape(cases[0])) * (4 * len(plan.modalities) + 1) / 2**20
    for workers in (1, WORKERS):
        store.prepare(folder / f"warm{workers}", "benchmark", plan, {"train": cases[:1]}, workers)  # imports
        base = harness._memory_kb("VmRSS") / 1024
        Path("/proc/self/clear_refs").write_text("5")
        start = time.perf_counter()
        opened, _ = store.prepare(folder / f"store{workers}", "benchmark", plan, {"train": cases}, workers)
        seconds = time.perf_counter() - start
        peak = harness._memory_kb("VmHWM") / 1024 - base
        line = {"bench": "loader", "case": "build", "mode": "memory", "workers": workers, "volume_mb": round(volume, 1)}
        line |= {"peak_mb": round(peak, 1), "volumes_per_worker": round(peak / volume / workers, 2)}
        print(json.dumps({**line, "volumes_per_s": round(count / seconds, 2)}), flush=True)
    batches = _batches(opened["train"], cases, plan)
    next(batches)
    resident = []
    for _ in range(10):
        for batch in islice(batches, patches // BATCH):
            del batch
        resident.append(round(harness._memory_kb("VmRSS") / 1024, 1))
    line = {"bench": "loader", "case": "read", "mode": "memory", "workers": WORKERS, "volume_mb": round(volume, 1)}
    grown = resident[-1] - resident[1]
    print(
        json.dumps({**line, "batches": 10 * patches // BATCH, "resident_mb": resident, "grown_mb": grown}), flush=True
    )


def _soak(folder: Path, count: int, minutes: float) -> None:
    """Prints the resident memory (all, and without what is mapped from files) at twelve moments of a long read."""
    from medjax.data import store

    cases, plan = _cohort(folder, count, {"normalize": "zscore_nonzero"})
    opened, _ = store.prepare(folder / "store", "benchmark", plan, {"train": cases}, WORKERS)
    batches = _batches(opened["train"], cases, plan)
    resident, private, read = [], [], 0
    start, moments = time.monotonic(), 12
    for moment in range(moments):
        while time.monotonic() - start < 60 * minutes * (moment + 1) / moments:
            next(batches)
            read += 1
            time.sleep(_STEP_S)
        resident.append(round(harness._memory_kb("VmRSS") / 1024, 1))
        private.append(round(harness._memory_kb("RssAnon") / 1024, 1))
    line = {"bench": "loader", "case": "read", "mode": "soak", "minutes": minutes, "batches": read}
    print(json.dumps({**line, "resident_mb": resident, "private_mb": private}), flush=True)


_SIDES: dict[tuple[str, str], Callable[[Path, int, Any], harness.Setup]] = {
    ("patches", "ours"): _patches_ours,
    ("patches", "monai"): _patches_monai,
    ("patches", "nnunet"): _patches_nnunet,
    ("preprocess", "ours"): _preprocess_ours,
    ("preprocess", "monai"): _preprocess_monai,
    ("preprocess", "torchio"): _preprocess_torchio,
}


def _work(what: str, side: str, folder: str, count: str, argument: str) -> None:
    if what == "memory":
        return _memory(Path(folder), int(count), int(argument))
    if what == "soak":
        return _soak(Path(folder), int(count), float(argument))
    value: Any = int(argument) if what == "patches" else argument
    setup = _SIDES[what, side](Path(folder), int(count), value)
    return harness.serve_jax(setup) if side == "ours" else harness.serve_peer(setup)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default="patches,preprocess,memory")
    parser.add_argument("--peers", default="monai,nnunet,torchio")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the peers installed")
    parser.add_argument("--data", type=Path, help="folder in Decathlon layout in place of synthetic volumes")
    parser.add_argument("--sizes", default="", help=f"of the synthetic volumes, of {', '.join(VOLUMES)}")
    parser.add_argument("--modes", default="default,cubic", help="of preprocess")
    parser.add_argument("--cases", type=int, default=4)
    parser.add_argument("--patches", type=int, default=40, help="of one repetition")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=60, help="of soak")
    parser.add_argument(
        "--work", nargs=5, metavar=("WHAT", "SIDE", "FOLDER", "COUNT", "ARGUMENT"), help=argparse.SUPPRESS
    )
    options = parser.parse_args()
    if options.work:
        return _work(*options.work)
    for what in options.what.split(","):
        sizes: Sequence[str] = options.sizes.split(",") if options.sizes else _SIZES[what]
        for size in ["data"] if options.data else [s for s in sizes if s in VOLUMES]:
            with tempfile.TemporaryDirectory(prefix="medjax-loader-") as scratch:
                folder = Path(scratch) / "cohort"
                if options.data:
                    folder.mkdir()
                    for entry in options.data.resolve().iterdir():  # the store goes beside links, not into the data
                        (folder / entry.name).symlink_to(entry)
                else:
                    write_cohort(folder, size, options.cases, ".nii.gz" if what == "preprocess" else ".nii")
                _measure(what, size, folder, options)
    return None


def _measure(what: str, size: str, folder: Path, options: argparse.Namespace) -> None:
    def command(python: str, side: str, argument: Any) -> list[str]:
        work = [what, side, str(folder), str(options.cases), str(argument)]
        return [python, "-m", "benchmarks.loader", "--work", *work]

    if what in ("memory", "soak"):
        argument = options.patches if what == "memory" else options.minutes
        environment = {**os.environ, "PYTHONPATH": str(harness.ROOT)}
        subprocess.run(command(sys.executable, "ours", argument), check=True, cwd=harness.ROOT, env=environment)
        return
    for mode in ("warm",) if what == "patches" else options.modes.split(","):
        for peer in [p for p in _PEERS[what] if p in options.peers.split(",")]:
            argument = options.patches if what == "patches" else mode
            line = {"bench": "loader", "case": f"{what}-{size}", "dtype": "float32", "mode": mode, "peer": peer}
            ours, theirs = command(sys.executable, "ours", argument), command(options.peer_python, peer, argument)
            harness.compare(line, harness.Worker(ours), harness.Worker(theirs), options.repetitions)


if __name__ == "__main__":
    main()
