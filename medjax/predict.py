"""Prediction: a trained network over whole volumes, back on each input's own grid.

`python -m medjax.predict --run=runs/brain_seg --input=scan.nii.gz --output=predictions/`
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from medjax import runtime
from medjax.errors import UserError, run_program


class Predictor:
    """The network over whole prepared volumes: sliding window in one jitted program.

    Args:
      shapes: of the prepared volumes it will see; sizes up to the largest of them share one program.
    """

    def __init__(
        self, config: ConfigDict, model: Any, job: Mapping[str, Any], shapes: Sequence[Sequence[int]] = ()
    ) -> None:
        from medjax.ops.windows import SlidingWindow

        self.tasks = job

        def apply(params: Any, x: jax.Array) -> jax.Array:
            outputs = model.apply({"params": params}, x, train=False)
            return jnp.concatenate([outputs[name][0] for name in job], axis=-1)

        self._window = SlidingWindow(
            apply,
            tuple(config.data.patch),
            sum(task.outputs for task in job.values()),
            overlap=config.eval.overlap,
            batch=config.eval.windows,
            mirror_axes=tuple(config.eval.mirror),
            canvas=tuple(int(n) for n in np.max(np.asarray(shapes), axis=0)) if len(shapes) else None,
        )
        self._split = jax.jit(self._probabilities)

    def _probabilities(self, logits: jax.Array) -> dict[str, jax.Array]:
        ends = np.cumsum([task.outputs for task in self.tasks.values()])
        parts = jnp.split(logits, ends[:-1], axis=-1)
        return {name: task.probabilities(p) for (name, task), p in zip(self.tasks.items(), parts, strict=True)}

    def __call__(self, params: Any, image: np.ndarray) -> dict[str, np.ndarray]:
        """Prepared image [X, Y, Z, C] -> task -> probabilities float32 [X, Y, Z, K]."""
        return {k: np.asarray(v) for k, v in self._split(self._window(params, image)).items()}


class Run:
    """A trained run, ready to predict: its configuration, plan, tasks, network and parameters.

    Args:
      folder: of the run. kind: 'best' or 'latest'; without a best one the latest is taken.
      eval_options: overrides of `config.eval`, such as overlap or mirror.
    """

    def __init__(self, folder: Path, *, kind: str = "best", eval_options: Mapping[str, Any] | None = None) -> None:
        from medjax import checkpoint, tasks
        from medjax import config as config_lib
        from medjax.data import preprocess
        from medjax.models.model import build_model

        checkpoints = checkpoint.Checkpoints(checkpoint.require(folder), read_only=True)
        kind = kind if checkpoints.newest(kind) is not None else "latest"
        newest = checkpoints.newest(kind)
        if newest is None:
            raise UserError(f"{folder}: holds no complete checkpoint; train it first")
        self.folder, self.step, self.kind = folder, newest, kind
        meta = checkpoints.meta(kind, self.step)
        self.config = config_lib.from_json(meta["config"])
        self.config.eval.update(dict(eval_options or {}))
        self.plan = preprocess.Plan.from_json(meta["plan"])
        self.labels = meta["labels"]
        self.tasks = tasks.build(self.config.tasks, self.labels)
        self.model = build_model(self.config, self.tasks)
        patch = (1, *self.config.data.patch, len(self.plan.modalities))
        shapes = jax.eval_shape(lambda: self.model.init(jax.random.key(0), jnp.zeros(patch), train=True)["params"])
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here), shapes)
        self.params = checkpoints.restore_parameters(kind, self.step, like)
        checkpoints.close()

    def predictor(self, shapes: Sequence[Sequence[int]] = ()) -> Predictor:
        """A `Predictor` of this run's network."""
        return Predictor(self.config, self.model, self.tasks, shapes)


def read_case(case: Any, plan: Any) -> tuple[Any, Any]:
    """A case prepared for the network, and a `Volume` of its grid and header to write predictions like."""
    from medjax.data import nifti, preprocess

    return preprocess.prepare_case(case, plan), nifti.read(next(iter(case.images.values())))


def write(task: Any, decoded: np.ndarray, like: Any, path: Path) -> None:
    """Writes a decoded prediction as NIfTI on `like`'s grid; regions that cannot be painted become channels."""
    from medjax.data import nifti

    nifti.write(path, task.paint(decoded) if task.paintable else decoded.astype(np.uint8), like)


def find_inputs(path: Path, modalities: Sequence[str]) -> dict[str, dict[str, Path]]:
    """Groups files into cases: id -> modality -> file.

    A single file is a case of one modality, or of all of them as the channels of a 4-D image. In a folder, files that
    end in `_0000`, `_0001`... (the order of the run's modalities) or in `_<modality>` are joined by what comes
    before; with none of those, each file is a case.
    """
    if path.is_file():
        return {stem(path): dict.fromkeys(modalities, path)}
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    files = sorted(
        f for f in path.iterdir() if re.search(r"\.(nii(\.gz)?|hdr)$", f.name.lower()) and not f.name.startswith("._")
    )
    if not files:
        raise UserError(f"{path}: holds no NIfTI file (.nii, .nii.gz, .hdr)")
    suffixes = {f"{i:04d}": m for i, m in enumerate(modalities)} | {m.lower(): m for m in modalities}
    cases: dict[str, dict[str, Path]] = {}
    for file in files:
        name, _, suffix = stem(file).rpartition("_")
        modality = suffixes.get(suffix.lower()) if name else None
        if modality is None:
            cases[stem(file)] = dict.fromkeys(modalities, file)
        else:
            cases.setdefault(name, {})[modality] = file
    for case, images in cases.items():
        missing = [m for m in modalities if m not in images]
        if missing:
            raise UserError(
                f"{path}: case '{case}' lacks {', '.join(missing)}; this run needs {', '.join(modalities)}, as "
                f"channels of one 4-D file or as files {case}_{modalities[0]}.nii.gz ... (or {case}_0000.nii.gz ...)"
            )
    return cases


def stem(path: Path) -> str:
    """File name without .nii.gz, .nii or .hdr."""
    return re.sub(r"\.(nii(\.gz)?|hdr|img)$", "", path.name, flags=re.IGNORECASE)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m medjax.predict", description="Predicts new scans with a trained run.")
    p.add_argument("--run", type=Path, required=True, help="folder of a trained run")
    p.add_argument("--input", type=Path, required=True, help="a NIfTI file, or a folder of them")
    p.add_argument("--output", type=Path, required=True, help="folder for the predictions")
    p.add_argument("--checkpoint", choices=("best", "latest"), default="best")
    p.add_argument("--overlap", type=float, help="of the sliding windows (default: the run's eval.overlap)")
    p.add_argument("--mirror", type=int, nargs="*", metavar="AXIS", help="axes to average over (0 1 2)")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Predicts every case of --input; a case that cannot be read stops the run and names the file."""
    args = parser().parse_args(argv)
    from medjax.data import cohort as cohorts
    from medjax.logging import Progress, say

    given = {"overlap": args.overlap, "mirror": None if args.mirror is None else tuple(args.mirror)}
    given = {k: v for k, v in given.items() if v is not None}
    run = Run(args.run, kind=args.checkpoint, eval_options=given)
    cases = find_inputs(args.input, run.plan.modalities)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{args.output}: cannot make the folder: {error.strerror}") from error
    predictor = run.predictor()
    progress = Progress("case", len(cases))
    for number, (name, images) in enumerate(cases.items(), 1):
        case = cohorts.Case(name, name, images, {}, {})
        prepared, like = read_case(case, run.plan)
        probabilities = predictor(run.params, prepared.image)
        for task_name, task in run.tasks.items():
            suffix = "" if len(run.tasks) == 1 else f"_{task_name}"
            decoded = task.decode(probabilities[task_name], prepared.geometry)
            write(task, decoded, like, args.output / f"{name}{suffix}.nii.gz")
        progress.update(number, name)
    progress.close()
    say(f"{len(cases)} case(s) written to {args.output} (step {run.step}, {run.kind} checkpoint of {args.run})")


if __name__ == "__main__":
    runtime.ensure_tuned_allocator()
    run_program(main)
