"""Volumes without targets, to pretrain on: folders added to a cohort, and what cannot be used left out of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from medjax.data import nifti, preprocess
from medjax.data.cases import Case, Cohort, Intake, Problem, nearest
from medjax.data.cohort import content_hash
from medjax.data.folders import from_files
from medjax.data.joins import check_unique
from medjax.errors import UserError, warn_once
from medjax.logging import Progress
from medjax.ops.native.cpus import usable_cpus

EXTRA = "extra_"  # how ids and patients of added volumes begin
_LISTED = 10  # offenders a message names before it only counts


class NothingLeft(UserError):
    """No case can be used, or none of those added; `skipped` tells why of each, `left` how many can."""

    def __init__(self, message: str, skipped: Sequence[Problem], left: int = 0) -> None:
        super().__init__(message)
        self.skipped, self.left = tuple(skipped), left


def with_extra(cohort: Cohort, folder: str, modality: str, allow_missing: bool, intake: Intake | None = None) -> Cohort:
    """The cohort with every volume of `folder` as one more training case, without targets.

    Args:
      modality: of the cohort's, what the volumes are; '': its only one. allow_missing: `preprocess.missing` is 'zero'.
      intake: of the cohort, after it was read: what to leave out, and where to note what is wrong with a volume.
    """
    if not modality and len(cohort.modalities) > 1:
        raise UserError(
            f"config: data.extra.modality: the volumes of {folder} are one modality each; say which of "
            f"{', '.join(cohort.modalities)}"
        )
    modality = modality or cohort.modalities[0]
    if modality not in cohort.modalities:
        raise UserError(
            f"config: data.extra.modality={modality!r}: {cohort.name} has no such modality"
            f"{nearest(modality, cohort.modalities)} (it has: {', '.join(cohort.modalities)})"
        )
    if len(cohort.modalities) > 1 and not allow_missing:
        raise UserError(
            "config: data.extra: its volumes have one modality of several; set data.preprocess.missing='zero'"
        )
    intake = intake or Intake()
    own = intake.rest()
    found = from_files(Path(folder).expanduser(), modality, intake=own)
    extra = tuple(replace(case, id=EXTRA + case.id, group=EXTRA + case.group) for case in found.cases)
    intake.problems += [replace(p, case=p.case and EXTRA + p.case) for p in own.problems]
    check_unique(found.root, (*cohort.cases, *extra))
    return replace(cohort, extra=extra)


def usable(cohort: Cohort, spec: Mapping[str, Any], known: Sequence[Problem] = (), workers: int = 0) -> Cohort:
    """The cohort without the cases that cannot be read and prepared, which `Cohort.skipped` tells of.

    What the reader could not use of a case that is left, a target, is said once.

    Left out: what is 2-D, a single slice, 4-D, in colour, constant, damaged or otherwise refused by the readers, and
    what holds the voxels of a case before it. Every file is read; a process reads it once.

    Args:
      spec: `data.preprocess`. known: problems that the cohort's reader met. workers: threads; 0: one a usable CPU.

    Raises:
      UserError: no case is left, or none of those that `data.extra` adds.
    """
    cases = (*cohort.cases, *cohort.extra)
    plain = spec.to_dict() if hasattr(spec, "to_dict") else dict(spec)
    # Nothing is resampled, and nothing learnt from masks: what fails there is the config's fault, not the file's.
    kinds = plain.get("normalize", "zscore")
    table = dict.fromkeys(cohort.modalities, kinds) if isinstance(kinds, str) else dict(kinds)
    plain |= {"spacing": None, "normalize": {m: "none" if k == "ct" else k for m, k in table.items()}}
    preprocess.check_spec(plain, cohort.modalities)
    text = json.dumps(plain)
    skipped: list[Problem] = []
    kept: set[str] = set()
    seen: dict[str, Case] = {}
    progress = Progress("checking files", len(cases))
    with ThreadPoolExecutor(workers or usable_cpus()) as pool:
        checks = pool.map(lambda case: _checked(case, _marks(case), cohort.modalities, text), cases)
        for number, (case, (reason, digests)) in enumerate(zip(cases, checks, strict=True), 1):
            progress.update(number)
            twin = next((seen[d] for d in digests if d in seen), None)
            if twin and not reason:
                reason = f"{_file(case)}: holds the same voxels as case {twin.id} ({_file(twin)})"
            if reason:
                skipped.append(Problem("error", reason, case.id, str(_file(case))))
                continue
            kept.add(case.id)
            seen |= dict.fromkeys(digests, case)
    progress.close()
    before = [problem for problem in known if problem.severity == "error"]
    skipped = [problem for problem in before if problem.case not in kept] + skipped
    left = tuple(case for case in cohort.cases if case.id in kept)
    if not left:
        listed = "".join(f"\n  {problem.message}" for problem in skipped[:_LISTED])
        message = f"{cohort.root}: no case is left that can be used; {len(skipped)} were skipped:{listed}"
        raise NothingLeft(message, skipped)
    splits = cohort.splits and {name: tuple(id for id in ids if id in kept) for name, ids in cohort.splits.items()}
    gone = frozenset(problem.case for problem in skipped)
    if without := [problem for problem in before if problem.case in kept]:
        listed = "".join(f"\n  {problem.case}: {problem.message}" for problem in without[:_LISTED])
        more = f"\n  and {len(without) - _LISTED} more" if len(without) > _LISTED else ""
        warn_once(f"{cohort.root}: cases that are used without a target that should be there:{listed}{more}")
    extra = tuple(case for case in cohort.extra if case.id in kept)
    if cohort.extra and not extra:
        raise NothingLeft(
            f"config: data.extra.folder: none of its {len(cohort.extra)} volumes can be used: "
            f"{next(p.message for p in skipped if p.case == cohort.extra[0].id)}",
            skipped,
            len(left),
        )
    return replace(
        cohort, cases=left, extra=extra, splits=splits, left_out=cohort.left_out | gone, skipped=tuple(skipped)
    )


def _file(case: Case) -> Path:
    return next(iter(case.images.values()))


def _marks(case: Case) -> tuple[Any, ...]:
    """What tells an edited file from the one that was checked."""
    paths = [*case.images.values(), *(t for t in case.targets.values() if isinstance(t, Path))]
    return tuple((str(p), *_status(p)) for p in paths)


def _status(path: Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


_known: dict[tuple[Any, ...], tuple[str, tuple[str, ...]]] = {}


def _checked(case: Case, marks: tuple[Any, ...], modalities: tuple[str, ...], spec: str) -> tuple[str, tuple[str, ...]]:
    """(what is wrong with the case or '', digests of its images); remembered while the process lives."""
    key = (case.id, marks, modalities, spec)
    if key not in _known:
        try:
            _known[key] = "", _prepare(case, modalities, json.loads(spec))
        except UserError as error:
            _known[key] = str(error), ()
    return _known[key]


def _prepare(case: Case, modalities: tuple[str, ...], spec: dict[str, Any]) -> tuple[str, ...]:
    """Reads and prepares a case by itself, as the run will; its digests. Raises UserError."""
    for path in dict.fromkeys(case.images.values()):
        # By the header first: a long time series is not read to be refused.
        shape, _ = nifti.read_grid(path)
        sharing = sum(file == path for file in case.images.values())
        if len(shape) > 3 and shape[3] != sharing:
            raise UserError(f"{path}: 4-D, {shape[3]} volumes of {shape[:3]} voxels; a case is one 3-D volume")
        if min(shape[:3]) == 1:
            raise UserError(f"{path}: a single slice of shape {shape[:3]}, not a volume")
    alone = Cohort(case.id, _file(case).parent, modalities, {}, (case,))
    preprocess.prepare_case(case, preprocess.fit(spec, alone, (case,)))
    return tuple(content_hash(path) for path in dict.fromkeys(case.images.values()))
