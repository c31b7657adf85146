"""Prediction: a trained network over whole volumes, back on each input's own grid.

`python -m medjax.predict --run=runs/brain_seg --input=scan.nii.gz --output=predictions/`
"""

from __future__ import annotations

from medjax import runtime

if __name__ == "__main__":
    runtime.ensure_tuned_allocator()  # starts anew, so before JAX is imported

import argparse
import ast
import csv
import io
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from medjax import parallel
from medjax.augment import sides
from medjax.errors import UserError, run_program, write_atomic
from medjax.ops import native

BASE = "where the weights lie that the run holds a change of (config.peft), if they have been moved"
_INPUT = re.compile(r"\.(nii|hdr)(\.gz)?$", re.IGNORECASE)  # of a .hdr/.img pair the header stands for both


class Predictor:
    """The network over whole prepared volumes: sliding window, softmax and split by task in one jitted program.

    Args:
      shapes: of the prepared volumes it will see; sizes up to the largest of them share one program.
      mesh: devices that the parameters lie on; each takes `eval.windows` windows a call, or its part of them in space.
    """

    def __init__(
        self,
        config: ConfigDict,
        model: Any,
        job: Mapping[str, Any],
        shapes: Sequence[Sequence[int]] = (),
        mesh: Mesh | None = None,
    ) -> None:
        from medjax.ops.windows import SlidingWindow
        from medjax.tasks import confirm

        # What is only learnt from predicts nothing.
        self.tasks = job = {name: task for name, task in job.items() if task.kind != "pretext"}
        self._confirm = confirm.rules(config.eval.get("confirm", {}), job)
        # What is said of voxels, and what of a case as a whole; each in the order of the network's output channels.
        self._dense = {name: task for name, task in job.items() if task.kind != "case"}
        self._whole = {name: task for name, task in job.items() if task.kind == "case"}

        parts = 1 if mesh is None else mesh.shape["space"]

        def apply(params: Any, x: jax.Array) -> Any:
            with native.divisible(parts):
                outputs = model.apply({"params": params}, x, train=False)
            dense = jnp.concatenate([x[..., :0], *(outputs[name][0] for name in self._dense)], axis=-1)
            if not self._whole:
                return dense
            return dense, jnp.concatenate([outputs[name][0] for name in self._whole], axis=-1)

        odd: tuple[list[int], ...] = ([], [], [])
        views = sides.views(config.augment, job, config.eval.mirror, config.data.preprocess.orientation)
        swap: list[tuple[int, int]] = []
        first = 0
        for name, task in (self._dense | self._whole).items():
            swap += [(first + a, first + b) for a, b in views.get(name, ())]
            for axis in range(3):
                odd[axis].extend(first + channel for channel in task.odd[axis])
            first += task.outputs
        if not self.tasks:
            return
        self._window = SlidingWindow(
            apply,
            tuple(config.data.patch),
            sum(task.outputs for task in self._dense.values()),
            pooled_out=sum(task.outputs for task in self._whole.values()),
            odd=odd,
            swap=swap,
            overlap=config.eval.overlap,
            batch=config.eval.windows * (1 if mesh is None else parallel.ways(mesh)),
            mirror_axes=tuple(config.eval.mirror),
            canvas=tuple(int(n) for n in np.max(np.asarray(shapes), axis=0)) if len(shapes) else None,
            finish=lambda outputs: _probabilities(self._dense, outputs),
            **({} if mesh is None or mesh.size == 1 else parallel.for_windows(mesh)),
        )

    def __call__(self, params: Any, image: np.ndarray) -> dict[str, np.ndarray]:
        """Prepared image [X, Y, Z, C] -> task -> probabilities float32, read-only: [X, Y, Z, K], or [K] of a case."""
        if not self.tasks:
            return {}
        if not self._whole:
            return self._window(params, image)
        found, whole = self._window(params, image)
        return found | jax.tree.map(np.asarray, _probabilities(self._whole, whole))

    def case(self, params: Any, prepared: Any) -> dict[str, np.ndarray]:
        """A prepared case -> what `__call__` says of its image, masks confirmed (`eval.confirm`)."""
        from medjax.tasks import confirm

        return confirm.confirmed(self._confirm, self.tasks, self(params, prepared.image), prepared.geometry)


def _probabilities(job: Mapping[str, Any], outputs: jax.Array) -> dict[str, Any]:
    """The network's joined channels [..., K], divided among the tasks: task -> probabilities."""
    ends = np.cumsum([task.outputs for task in job.values()])
    parts = jnp.split(jnp.asarray(outputs), ends[:-1], axis=-1) if job else []
    return {name: task.probabilities(part) for (name, task), part in zip(job.items(), parts, strict=True)}


class Run:
    """A trained run, ready to predict: its configuration, plan, tasks, network and parameters.

    Args:
      folder: of the run. kind: 'best' or 'latest'; without a best one the latest is taken.
      eval_options: overrides of `config.eval`, such as overlap or mirror.
      base: of a run that holds a change of other weights (`config.peft`): where they lie, if they have been moved.
    """

    def __init__(
        self, folder: Path, *, kind: str = "best", eval_options: Mapping[str, Any] | None = None, base: str = ""
    ) -> None:
        from medjax import checkpoint, tasks, transfer
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
        with self.config.ignore_type():
            for key, value in (eval_options or {}).items():  # tables as a whole: an empty one turns its option off
                self.config.eval[key] = value
        self.plan = preprocess.Plan.from_json(meta["plan"])
        self.labels = meta["labels"]
        built = tasks.build(tasks.read_as(self.config.tasks, self.config.eval.get("tasks", {})), self.labels)
        self.model = build_model(self.config, built)
        self.pretext = tasks.self_supervised(built)
        self.tasks = {name: task for name, task in built.items() if name not in self.pretext}
        patch = (1, *self.config.data.patch, len(self.plan.modalities))
        shapes = jax.eval_shape(lambda: self.model.init(jax.random.key(0), jnp.zeros(patch), train=True)["params"])
        # Of several processes each evaluates and predicts on its own devices.
        self.mesh = parallel.local_mesh(self.config.get("mesh", {}).get("space", 1))
        here = parallel.replicated(self.mesh)
        like = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here), shapes)
        self.params = transfer.restore_parameters(checkpoints, kind, self.step, like, folder, base)
        checkpoints.close()

    def predictor(self, shapes: Sequence[Sequence[int]] = ()) -> Predictor:
        """A `Predictor` of this run's network."""
        return Predictor(self.config, self.model, self.tasks, shapes, self.mesh)


def read_case(case: Any, plan: Any) -> tuple[Any, Any]:
    """A case prepared for the network, and a `Volume` of its grid and header to write predictions like."""
    from medjax.data import nifti, preprocess

    return preprocess.prepare_case(case, plan), nifti.read(next(iter(case.images.values())))


def read_ahead(cases: Iterable[Any], plan: Any) -> Iterator[tuple[Any, Callable[[], tuple[Any, Any]]]]:
    """Each case with a function that returns (or raises) its `read_case`; the next is read while one is worked on."""
    with ThreadPoolExecutor(1) as pool:
        pending: deque[tuple[Any, Future]] = deque()
        for case in cases:
            pending.append((case, pool.submit(read_case, case, plan)))
            if len(pending) == 2:
                ready, future = pending.popleft()
                yield ready, future.result
        for ready, future in pending:
            yield ready, future.result


def write(task: Any, decoded: np.ndarray, like: Any, path: Path) -> None:
    """Writes a decoded prediction as NIfTI on `like`'s grid; regions that cannot be painted become channels."""
    from medjax.data import nifti

    nifti.write(path, task.paint(decoded) if task.paintable else decoded.astype(np.uint8), like)


def table_rows(task: Any, case: str, decoded: Any) -> list[dict[str, Any]]:
    """Rows of a case in the table of a task; a case in which nothing was found has one with its id alone."""
    return [{"case": case, **row} for row in task.table(decoded) or [{}]]


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Rows as CSV; the columns are all keys in order of appearance, what is not finite or absent is left empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        plain = {k: (f"{v:.6g}" if np.isfinite(v) else "") if isinstance(v, float) else v for k, v in row.items()}
        writer.writerow(plain)
    write_atomic(path, out.getvalue())


def find_inputs(
    path: Path, modalities: Sequence[str], *, allow_missing: bool = False
) -> tuple[dict[str, dict[str, Path]], dict[str, str]]:
    """Groups files into cases.

    A file whose name ends in `_0000`, `_0001`... (the order of `modalities`) or in `_<modality>` is that modality of
    the case named by what comes before; any other file is a case by itself: its one modality, or all of them as the
    channels of a 4-D image. Case does not matter.

    Args:
      path: a file, or a folder of them. modalities: of the run, in the order of its files (`Plan.channels`).
      allow_missing: a case may lack some.

    Returns:
      `(cases, refused)`: id -> modality -> file, and id -> what is wrong with the files that do not make a case.

    Raises:
      UserError: there is no such path, or no NIfTI file in the folder.
    """
    try:
        there, folder = path.exists(), path.is_dir()
        found = [f for f in path.iterdir() if _INPUT.search(f.name) and not f.name.startswith("._")] if folder else []
        files = sorted(f for f in found if f.is_file()) if folder else [path]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}. Correct --input, or its permissions.") from None
    if not there:
        raise UserError(f"{path}: no such file or folder. Correct --input.")
    if not files:
        raise UserError(
            f"{path}: holds no NIfTI file (.nii, .nii.gz, .hdr) to predict. Correct --input; folders inside it are "
            "not searched."
        )
    names = {stem(file).lower() for file in files}
    suffixes = {f"_{m.lower()}": m for m in modalities} | {f"_{i:04d}": m for i, m in enumerate(modalities)}
    claims: dict[str, dict[str, list[Path]]] = {}
    for file in files:
        name, wanted = stem(file), tuple(modalities)
        # The longest first: with modalities 'c' and 't1_c', 'x_t1_c' is of the second.
        for suffix in sorted(suffixes, key=len, reverse=True):
            begin = name[: -len(suffix)]
            if name.lower().endswith(suffix) and begin:
                # Numbers that go on past the modalities count cases: scan_0000, scan_0001, scan_0002...
                if suffix[1:].isdigit() and f"{begin.lower()}_{len(modalities):04d}" in names:
                    break
                name, wanted = begin, (suffixes[suffix],)
                break
        for modality in wanted:
            claims.setdefault(name, {}).setdefault(modality, []).append(file)
    cases: dict[str, dict[str, Path]] = {}
    refused: dict[str, str] = {}
    for name, claimed in claims.items():
        twice = next(((m, f) for m, f in claimed.items() if len(f) > 1), None)
        missing = [m for m in modalities if m not in claimed]
        if twice:
            modality, (first, second, *_) = twice
            refused[name] = f"{first}: {second.name} beside it is the same case's {modality} too. Keep one of them."
        elif missing and not allow_missing:
            refused[name] = (
                f"{next(iter(claimed.values()))[0]}: case '{name}' lacks {', '.join(missing)}. The run needs "
                f"{', '.join(modalities)}: as files {name}_{modalities[0]}.nii.gz... (or {name}_0000.nii.gz...) in one "
                "folder given as --input, or as the channels of one 4-D file."
            )
        else:
            cases[name] = {m: claimed[m][0] for m in modalities if m in claimed}
    return cases, refused


def stem(path: Path) -> str:
    """File name without .nii.gz, .nii, .hdr or .img."""
    return re.sub(r"\.(nii|hdr|img)(\.gz)?$", "", path.name, flags=re.IGNORECASE)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m medjax.predict", description="Predicts new scans with a trained run.")
    p.add_argument("--run", type=Path, required=True, help="folder of a trained run")
    p.add_argument("--input", type=Path, required=True, help="a NIfTI file, or a folder of them")
    p.add_argument("--output", type=Path, required=True, help="folder for the predictions")
    p.add_argument("--checkpoint", choices=("best", "latest"), default="best")
    p.add_argument("--overlap", type=float, help="of the sliding windows (default: the run's eval.overlap)")
    p.add_argument("--table", type=Path, help="columns of the patients (height, frames...), for a run with measures")
    p.add_argument("--mirror", type=int, nargs="*", metavar="AXIS", help="axes to average over (0 1 2)")
    p.add_argument("--tasks", metavar="TABLE", help="eval.tasks, such as \"{'grade': {'temperature': 1.7}}\"")
    p.add_argument("--base", default="", metavar="FOLDER", help=BASE)
    return p


def _table(text: str) -> dict[str, Any]:
    try:
        table = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        table = None
    if not isinstance(table, dict):
        raise UserError(f"--tasks={text}: needs a table such as {{'grade': {{'temperature': 1.7}}}}")
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Predicts every case of --input.

    A case that cannot be read stops no other: those that can are predicted, then one UserError lists the rest.
    """
    args = parser().parse_args(argv)
    from medjax import measures
    from medjax.data import cohort as cohorts
    from medjax.logging import Progress, say

    given: dict[str, Any] = {"overlap": args.overlap, "mirror": None if args.mirror is None else tuple(args.mirror)}
    if args.tasks is not None:
        given["tasks"] = _table(args.tasks)
    options = {k: v for k, v in given.items() if v is not None}
    run = Run(args.run, kind=args.checkpoint, eval_options=options, base=args.base)
    if not run.tasks:
        raise UserError(
            f"{args.run}: the run has only self-supervised tasks ({', '.join(run.pretext)}), which predict nothing of "
            "new scans. Fine-tune it first (docs/pretraining.md)."
        )
    found, refused = find_inputs(args.input, run.plan.channels, allow_missing=run.plan.missing == "zero")
    numbered = any(stem(f).endswith("_0000") for images in found.values() for f in images.values())
    if numbered and len(run.plan.channels) > 1:
        say("taking " + ", ".join(f"_{i:04d} as {m}" for i, m in enumerate(run.plan.channels)))
    outputs = output_files(run.tasks, args.output, found)
    check_outputs(args.output, [p for paths in outputs.values() for p in paths.values()], found)

    # Headers first: the largest grid fixes the program's shapes, and what is no volume is known at once.
    cases, shapes = [], []
    for name, images in found.items():
        case = cohorts.Case(name, name, images)
        try:
            shapes.append(run.plan.prepared_shape(case))
            cases.append(case)
        except UserError as error:
            refused[name] = str(error)
    gauge = measures.of_run(args.run, run.tasks, cases, args.table)
    done = 0
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name, task in run.tasks.items() if task.kind != "dense"}
    if cases:
        predictor = run.predictor(shapes)
        progress = Progress("case", len(cases))
        for number, (case, load) in enumerate(read_ahead(cases, run.plan), 1):
            try:
                prepared, like = load()
            except UserError as error:
                refused[case.id] = str(error)
            else:
                probabilities = predictor.case(run.params, prepared)
                for task_name, task in run.tasks.items():
                    decoded = task.decode(probabilities[task_name], prepared.geometry)
                    gauge.predicted(task_name, case.id, decoded, like.spacing, voxel=like.voxel_volume)
                    if task.kind == "dense":
                        write(task, decoded, like, outputs[case.id][task_name])
                    else:
                        tables[task_name] += table_rows(task, case.id, decoded)
                done += 1
            progress.update(number, case.id)
        progress.close()
    if done:
        for task_name, rows in tables.items():
            write_table(rows, args.output / f"{task_name}.csv")
        if made := gauge.write(args.output):
            say(f"patients measured: {', '.join(made)}")
        say(f"{done} case(s) written to {args.output} (step {run.step}, {run.kind} checkpoint of {args.run})")
    if refused:
        raise UserError(refusal(args.input, refused, done))


def output_files(job: Mapping[str, Any], folder: Path, cases: Iterable[str]) -> dict[str, dict[str, Path]]:
    """Case -> mask task -> the file its prediction is written to; with several tasks their names are in it.

    Raises:
      UserError: two predictions would be one file, be it only where a disk does not tell capitals from small letters.
    """
    dense = [name for name, task in job.items() if task.kind == "dense"]
    found: dict[str, dict[str, Path]] = {case: {} for case in cases}
    taken: dict[str, tuple[str, str]] = {}
    for case, files in found.items():
        for task in dense:
            files[task] = folder / f"{case}{'' if len(dense) == 1 else f'_{task}'}.nii.gz"
            other, of = taken.setdefault(str(files[task]).lower(), (case, task))
            if (other, of) != (case, task):
                raise UserError(
                    f"{files[task]}: the predictions of case '{other}' (task '{of}') and of case '{case}' (task "
                    f"'{task}') would be one file, at least where capitals are no other letters. Rename one of them"
                )
    return found


def check_outputs(folder: Path, outputs: Iterable[Path], cases: Mapping[str, Mapping[str, Path]]) -> None:
    """Makes the folder; raises UserError if it cannot be made, or if an output would replace one of the inputs."""
    # By what lies there, not by name: links, and names that differ in capitals where the file system sees none.
    inputs = {_identity(file) for images in cases.values() for file in images.values()}
    for output in outputs:
        if output.exists() and _identity(output) in inputs:
            raise UserError(f"{output}: the prediction would replace the input of that name. Choose another --output.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot make the folder: {error.strerror}. Choose another --output.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: no permission to write there. Choose another --output.")


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def refusal(source: Path, refused: Mapping[str, str], done: int) -> str:
    """One message for all the cases that were not predicted; a single one's reason is the message."""
    if len(refused) == 1 and not done:
        return next(iter(refused.values()))
    listed = "".join(f"\n  {reason}" for reason in refused.values())
    return f"{source}: {len(refused)} of {len(refused) + done} case(s) were not predicted:{listed}"


if __name__ == "__main__":
    run_program(main)
