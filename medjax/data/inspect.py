"""`python -m medjax.data.inspect COHORT`: what is in a cohort, and everything that is wrong with it, before training.

Reads every file to its last byte, prints an overview and saves it as a page with pictures (`inspect.html`) and for
programs (`inspect.json`). A bad file is reported and does not end the reading; the exit code is 0 unless no case at all
can be used.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from medjax import config as config_lib
from medjax.data import cohort as cohorts
from medjax.data import dataset, nifti, overview
from medjax.data.cases import Case, Cohort, Finding, Intake, Problem
from medjax.data.volume import Volume, check_same_grid
from medjax.errors import UserError, run_program, write_atomic
from medjax.logging import Progress, say
from medjax.ops.native.cpus import usable_cpus

PERCENTILES = (0.5, 5.0, 25.0, 50.0, 75.0, 95.0, 99.5)
_SAMPLE = 1 << 20  # voxels the percentiles are taken from
_WILD_RATIO = 1000.0  # between a case's intensities and the median case's: units or scaling differ
_WORKERS = 8
_SHOWN = 20  # problems printed; the files hold all

EPILOG = """Any key of a run's configuration is set with --config.KEY=VALUE, for example
  python -m medjax.data.inspect /data/Task04_Hippocampus
  python -m medjax.data.inspect cases.csv --config.data.images.T1=t1 --config.data.targets.lesion=mask
  python -m medjax.data.inspect /data/heart --config.data.images.MR='images/{patient}_{frame}.nii.gz'
  python -m medjax.data.inspect --config=configs/hippocampus.py"""


@dataclass(frozen=True)
class Image:
    """One image file of a case.

    Attributes:
      shape: [X, Y, Z] or with channels [X, Y, Z, C], as stored. spacing: mm along those axes.
      dtype: as stored. scaled: whether the header scales the stored values.
      low, high, mean, std, percentiles: of the finite values; percentiles at `PERCENTILES`, of an even sample.
      zeros: share of voxels that are exactly 0. nonfinite: number of NaN and infinite values.
      digest: of the voxels (`medjax.data.cohort.voxel_hash`).
    """

    file: str
    shape: tuple[int, ...]
    spacing: tuple[float, float, float]
    orientation: str
    dtype: str
    scaled: bool
    low: float
    high: float
    mean: float
    std: float
    percentiles: tuple[float, ...]
    zeros: float
    nonfinite: int
    digest: str


@dataclass(frozen=True)
class Mask:
    """One mask file of a case: volumes in ml of every label value it holds besides 0."""

    file: str
    volumes: Mapping[int, float]
    digest: str


@dataclass
class Report:
    """What was found in one case. `picture` is a PNG."""

    id: str
    group: str
    images: dict[str, Image] = field(default_factory=dict)
    masks: dict[str, Mask] = field(default_factory=dict)
    targets: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    picture: bytes | None = None

    @property
    def usable(self) -> bool:
        """Whether training could take it as it is."""
        return not any(problem.severity == "error" for problem in self.problems)

    def add(self, severity: str, message: str, file: Any = "") -> None:
        self.problems.append(Problem(severity, message, self.id, str(file)))


# ---------------------------------------------------------------------------------------------------------- one case


def examine(case: Case, cohort: Cohort, allow_nonfinite: bool = False, picture: bool = True) -> Report:
    """Reads all files of a case, one image at a time; whatever is wrong is in the report, and nothing raises."""
    report = Report(case.id, case.group, attributes=dict(case.attributes))
    try:
        masks = _read_masks(case, cohort, report)
        first: Volume | None = None
        canvas: overview.Canvas | None = None
        for file in dict.fromkeys(case.images.values()):
            names = [m for m, path in case.images.items() if path == file]
            try:
                volume = nifti.read(file)
            except UserError as error:
                report.add("error", str(error), file)
                continue
            _check_image(volume, names, allow_nonfinite, report)
            if first is None:
                first = _hollow(volume)
                _check_grids(masks, first, report)
                _check_findings(case, first, report)
                if picture:
                    unique = {mask.source: mask for mask in masks.values()}
                    canvas = overview.Canvas(first, list(unique.values()), list(cohort.labels.values()))
            elif not _same_grid(volume, first, report):
                continue
            if canvas:
                canvas.add(volume)
        if canvas:
            report.picture = canvas.png()
    except Exception as error:  # one case must not end the inspection of the others
        report.add("error", f"case {case.id}: cannot be examined ({type(error).__name__}: {error})")
    for task, target in case.targets.items():
        if not isinstance(target, Path):
            report.targets[task] = _plain(target)
    return report


def _read_masks(case: Case, cohort: Cohort, report: Report) -> dict[str, Volume]:
    """The masks that can be read; their volumes and what is odd about them go to the report."""
    masks: dict[Path, Volume] = {}
    about: dict[Path, Mask] = {}
    found: dict[str, Volume] = {}
    for task, path in case.targets.items():
        if not isinstance(path, Path):
            continue
        if path not in masks:
            try:
                masks[path] = nifti.read_label(path)
            except UserError as error:
                report.add("error", str(error), path)
                continue
            volume = masks[path]
            values, counts = np.unique(volume.data, return_counts=True)
            ml = volume.voxel_volume / 1000
            volumes = {int(v): float(n) * ml for v, n in zip(values, counts, strict=True) if v}
            about[path] = Mask(str(path), volumes, cohorts.voxel_hash(volume))
            _check_mask(volume, set(volumes), cohort, report)
        found[task], report.masks[task] = masks[path], about[path]
    return found


def _check_mask(mask: Volume, values: set[int], cohort: Cohort, report: Report) -> None:
    for note in mask.notes:
        report.add("note", f"{mask.source}: {note}", mask.source)
    if not values:
        report.add(
            "warning",
            f"{mask.source}: the mask is empty (every voxel is 0). Right where nothing was found.",
            mask.source,
        )
    declared = {*cohort.labels.values(), *([] if cohort.ignore is None else [cohort.ignore])}
    if cohort.labels and (extra := sorted(values - declared)):
        listed = ", ".join(map(str, extra[:10])) + (", ..." if len(extra) > 10 else "")
        report.add(
            "error",
            f"{mask.source}: undeclared label {listed}; declared are {', '.join(map(str, sorted({0, *declared})))}. "
            "Declare them in data.labels (or dataset.json), or correct the mask.",
            mask.source,
        )
    if mask.header.get_data_dtype().kind == "f" or _scaled(mask):
        stored = f"{mask.header.get_data_dtype()}{' with intensity scaling' if _scaled(mask) else ''}"
        report.add(
            "note", f"{mask.source}: label values are stored as {stored}; they are rounded to integers", mask.source
        )


def _check_image(volume: Volume, names: Sequence[str], allow_nonfinite: bool, report: Report) -> None:
    """Figures of an image file for the modalities it holds, and what is wrong with it."""
    source = volume.source
    for note in volume.notes:
        report.add("note", f"{source}: {note}", source)
    if volume.channels != len(names):
        report.add(
            "error",
            f"{source}: {volume.channels} channels for modality {', '.join(names)}; a file needs one channel for each "
            "modality that names it. Split the file, or declare the modalities of all its channels.",
            source,
        )
    if volume.nonfinite:
        severity = "warning" if allow_nonfinite else "error"
        report.add(
            severity,
            f"{source}: {volume.nonfinite} of {volume.data.size} values are NaN or infinite. Repair the file, or set "
            "data.preprocess.nonfinite='zero'.",
            source,
        )
    digest = cohorts.voxel_hash(volume)
    channels = volume.data if volume.data.ndim == 4 else volume.data[..., None]
    for index, name in enumerate(names[: channels.shape[3]]):
        image = _measure(channels[..., index], volume, digest)
        if not image.low < image.high:
            report.add(
                "error",
                f"{source}{f' ({name})' if len(names) > 1 else ''}: the image is constant (every voxel is "
                f"{image.low:g}). Give the right file or leave the case out.",
                source,
            )
        if max(abs(image.low), abs(image.high)) > np.finfo(np.float32).max:
            report.add("error", f"{source}: values beyond the range of float32 (3.4e38). Rescale the image.", source)
        report.images[name] = image


def _measure(data: np.ndarray, volume: Volume, digest: str) -> Image:
    flat = data.ravel(order="K")
    step = max(1, math.ceil(flat.size / _SAMPLE))
    while step > 1 and any(math.gcd(step, n) > 1 for n in data.shape):  # a step that walks along no axis
        step += 1
    with np.errstate(over="ignore", invalid="ignore"):
        sample = flat[::step].astype(np.float64)
        sample = sample[np.isfinite(sample)]
        known = flat if not volume.nonfinite else flat[np.isfinite(flat)]
        low, high = (known.min(), known.max()) if known.size else (np.nan, np.nan)
        percentiles = np.percentile(sample, PERCENTILES) if sample.size else np.full(len(PERCENTILES), np.nan)
        mean, std = (sample.mean(), sample.std()) if sample.size else (np.nan, np.nan)
    return Image(
        file=str(volume.source),
        shape=tuple(volume.data.shape),
        spacing=volume.spacing,
        orientation=volume.orientation,
        dtype=str(volume.header.get_data_dtype()),
        scaled=_scaled(volume),
        low=float(low),
        high=float(high),
        mean=float(mean),
        std=float(std),
        percentiles=tuple(float(p) for p in percentiles),
        zeros=float(np.count_nonzero(flat[::step] == 0)) / max(1, len(flat[::step])),
        nonfinite=volume.nonfinite,
        digest=digest,
    )


def _scaled(volume: Volume) -> bool:
    slope, inter = volume.header.get_slope_inter()
    return (slope is not None and slope != 1) or bool(inter)


def _hollow(volume: Volume) -> Volume:
    """The volume's geometry, without its voxels."""
    return replace(volume, data=np.broadcast_to(np.uint8(0), volume.shape), nonfinite=0)


def _same_grid(volume: Volume, first: Volume, report: Report) -> bool:
    try:
        check_same_grid(volume, first)
    except UserError as error:
        report.add("error", str(error), volume.source)
        return False
    return True


def _check_grids(masks: dict[str, Volume], image: Volume, report: Report) -> None:
    """Leaves out masks that lie on another grid than the image, and says so."""
    seen: dict[Path | None, bool] = {}
    for task, mask in list(masks.items()):
        if mask.source not in seen:
            seen[mask.source] = _same_grid(mask, image, report)
        if not seen[mask.source]:
            del masks[task]


def _check_findings(case: Case, image: Volume, report: Report) -> None:
    inverse = np.linalg.inv(image.affine)
    for task, target in case.targets.items():
        if not isinstance(target, tuple):
            continue
        for number, finding in enumerate((f for f in target if isinstance(f, Finding)), 1):
            place = (inverse @ (*finding.center, 1.0))[:3]
            if not ((place >= -0.5 - 1e-3) & (place <= np.array(image.shape) - 0.5 + 1e-3)).all():
                center = ", ".join(f"{c:g}" for c in finding.center)
                report.add(
                    "error",
                    f"case {case.id}: finding {number} of task {task!r}: its centre ({center}) mm, RAS+, lies outside "
                    f"{image.name}. Places are world millimetres; if yours are in LPS set "
                    "data.findings.coordinates='LPS'.",
                    image.source,
                )


def _plain(target: Any) -> Any:
    """A target that is no file, for JSON."""
    if isinstance(target, tuple):
        return [asdict(v) if isinstance(v, Finding) else v for v in target]
    return target


# ------------------------------------------------------------------------------------------------------ whole cohort


def examine_all(
    cohort: Cohort,
    workers: int = 0,
    pictures: int = 24,
    allow_nonfinite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[Report]:
    """Every case's report, in order.

    Args:
      workers: threads; each holds one image of one case, and its masks, at a time. 0: one a usable CPU, at most 8.
      pictures: cases that get one, evenly spaced.
      progress: told how many cases are done.
    """
    total = len(cohort.cases)
    shown = {round(i) for i in np.linspace(0, total - 1, min(pictures, total))} if pictures > 0 else set()
    done = []
    with ThreadPoolExecutor(workers or min(usable_cpus(), _WORKERS)) as pool:
        jobs = [
            pool.submit(examine, case, cohort, allow_nonfinite, index in shown)
            for index, case in enumerate(cohort.cases)
        ]
        try:
            for job in jobs:
                done.append(job.result())
                if progress:
                    progress(len(done))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return done


def duplicates(reports: Sequence[Report], splits: Mapping[str, Sequence[str]] | None = None) -> list[Problem]:
    """Images with the same voxels under several names.

    Args:
      splits: split name -> case ids, where known: a pair across two of them is an error.
    """
    where = {id: name for name, ids in (splits or {}).items() for id in ids}
    same: dict[str, dict[tuple[str, str], Report]] = defaultdict(dict)
    for report in reports:
        for image in report.images.values():
            if image.low != image.high:
                same[image.digest][image.file, report.id] = report
    problems = []
    for files in same.values():
        ((file_a, _), a), *others = files.items()
        for (file_b, _), b in others:
            pair = f"{file_b} (case {b.id}) and {file_a} (case {a.id}) hold identical voxels"
            if a is b:
                problems.append(Problem("warning", f"{pair}: one file under two modalities?", b.id, file_b))
                continue
            shared = sorted(set(a.masks) & set(b.masks))
            differ = [task for task in shared if a.masks[task].digest != b.masks[task].digest]
            if differ:
                pair += f", but their masks of task {', '.join(differ)} differ"
            elif shared:
                pair += ", and their masks are the same"
            if a.id in where and b.id in where and where[a.id] != where[b.id]:
                severity = "error"
                cure = f"They are in the splits {where[a.id]} and {where[b.id]}: a score would measure memory."
            elif a.group != b.group:
                severity, cure = "warning", "Two patients by name, one by voxels: a split that parts them is refused."
            else:
                severity, cure = "warning", "They count twice."
            less = b.id if a.group == b.group else b.group
            cure += f" Leave one out (data.exclude=({less!r},)), or give both one patient (data.group)."
            problems.append(Problem(severity, f"{pair}. {cure}", b.id, file_b))
    return problems


def compare(cohort: Cohort, reports: Sequence[Report]) -> Iterator[Problem]:
    """What shows only when cases are compared: intensities, spacings, labels nobody has, targets few cases have."""
    for modality in cohort.modalities:
        scales = {r.id: r.images[modality] for r in reports if modality in r.images}
        tops = [abs(image.percentiles[-1]) for image in scales.values() if image.percentiles[-1]]
        median = float(np.median(tops)) if tops else 0.0
        for id, image in scales.items():
            top = abs(image.percentiles[-1])
            if median and top and not 1 / _WILD_RATIO < top / median < _WILD_RATIO:
                yield Problem(
                    "warning",
                    f"{image.file}: intensities up to {top:.3g}, against {median:.3g} in the median case: other units "
                    "or scaling? Per-case normalisation (zscore) does not mind, ct does.",
                    id,
                    image.file,
                )
    spacings = {r.id: next(iter(r.images.values())) for r in reports if r.images}
    if spacings:
        voxel = {id: math.prod(image.spacing) for id, image in spacings.items()}
        middle = float(np.median(list(voxel.values())))
        for id, size in voxel.items():
            if not 0.05 < size / middle < 20:
                spacing = " x ".join(f"{s:.3g}" for s in spacings[id].spacing)
                yield Problem(
                    "warning",
                    f"{spacings[id].file}: spacing {spacing} mm is far from the median case's. Is the header right?",
                    id,
                    spacings[id].file,
                )
    seen = {value for r in reports for mask in r.masks.values() for value in mask.volumes}
    if any(r.masks for r in reports):
        for name, value in cohort.labels.items():
            if value not in seen:
                yield Problem("warning", f"label {name!r} ({value}) is declared, but no mask holds it")
        if not cohort.labels:
            names = ", ".join(f"'name{v}': {v}" for v in sorted(seen)[:8])
            yield Problem(
                "error", f"no labels are declared; the masks hold {sorted(seen)[:20]}. Set data.labels={{{names}}}."
            )


# ------------------------------------------------------------------------------------------------------ command line


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m medjax.data.inspect",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    p.add_argument("cohort", nargs="?", help="folder, manifest (.csv, .json), or 'synthetic_brain'")
    p.add_argument("--config", metavar="FILE[:ARG]", help="recipe whose data section describes the cohort")
    p.add_argument("--out", type=Path, help="where the overview goes (default: inspected/<cohort>)")
    p.add_argument("--pictures", type=int, default=24, help="cases that are drawn (default 24)")
    return p


class _AnyOption(dict):
    """Options of a model or task, none of which matter here: all are known."""

    def __contains__(self, key: object) -> bool:
        return True


def main(argv: Sequence[str] | None = None) -> None:
    """Inspects one cohort; raises UserError where nothing of it can be used."""
    args, rest = parser().parse_known_args(argv)
    overrides = []
    for text in rest:
        if not text.startswith("--config."):
            raise UserError(f"unknown argument '{text}'; see --help")
        overrides.append(text.removeprefix("--config."))
    if args.cohort:
        overrides.append(f"data.cohort={args.cohort}")
    if args.config:
        config = config_lib.load(args.config, overrides, lambda room, kind: _AnyOption())
    else:
        config = config_lib.resolve(config_lib.defaults(), overrides, lambda room, kind: _AnyOption())
    if not config.data.cohort:
        raise UserError("nothing to inspect: give a folder or manifest, or --config=RECIPE; see --help")
    inspect(config, args.out, args.pictures)


def inspect(config: Any, out: Path | None = None, pictures: int = 24) -> dict[str, Any]:
    """Inspects the cohort of `config.data`, prints and saves the overview, and returns what `inspect.json` holds."""
    intake = Intake(config.data.exclude, tolerant=True)
    cohort = dataset.open_cohort(config.data, config.tasks or {"segmentation": "segmentation"}, intake)
    problems = list(intake.problems)
    splits: dict[str, list[str]] = {}
    if cohort.splits or any(config.data.split[key] for key in ("file", "column", "folds")):
        try:
            opened = dataset.open_splits(cohort, config.data, config.seed, config.tasks, check_content=False)
            splits = {name: [case.id for case in cases] for name, cases in opened.items()}
        except UserError as error:
            problems.append(Problem("error", str(error)))
    progress = Progress("reading cases", len(cohort.cases))
    allow = config.data.preprocess.nonfinite == "zero"
    reports = examine_all(cohort, config.data.workers, pictures, allow, progress.update)
    progress.close()
    problems += [problem for report in reports for problem in report.problems]
    problems += [*duplicates(reports, splits), *compare(cohort, reports)]
    order = {"error": 0, "warning": 1, "note": 2}
    problems.sort(key=lambda problem: order[problem.severity])
    summary = overview.summarise(cohort, reports, problems, splits)
    folder = out or Path("inspected") / (cohort.name.replace("/", "_") or "cohort")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot make the folder: {error.strerror}; choose another --out") from None
    write_atomic(folder / "inspect.json", json.dumps(overview.finite(summary), indent=1) + "\n")
    write_atomic(folder / "inspect.html", overview.page(summary, {r.id: r.picture for r in reports if r.picture}))
    for line in overview.lines(summary, _SHOWN):
        say(line)
    say(f"written: {folder / 'inspect.html'}, {folder / 'inspect.json'}")
    if not any(report.usable for report in reports):
        raise UserError(f"{config.data.cohort}: no case can be used as it is; {folder / 'inspect.html'} says why")
    return summary


if __name__ == "__main__":
    run_program(main)
