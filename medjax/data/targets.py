"""Targets that are no mask file: classes, numbers, vectors and findings, as arrays on a case's prepared grid."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medjax.data.cases import Case, Finding
from medjax.errors import UserError, warn_once

KINDS = ("mask", "class", "number", "vector", "findings")
"""What a task's targets may be: a label map's file, an int, a float, floats, or `medjax.data.cases.Finding`s."""

FIXED_COLUMNS = 7
"""Columns of a findings array before the attributes: centre x, y, z (prepared voxels), size x, y, z (mm), label."""

_EDGE = 1e-3  # voxels: how far beyond the volume's border rounding may put a centre
_LARGEST = float(np.finfo(np.float32).max)
_MAX_FINDINGS = np.iinfo(np.uint16).max
_POINT = 2.0  # voxels: radius of the ball that stands for a point; of one voxel augmentation loses every fifth


def kind_of(value: Any) -> str:
    """One of `KINDS`; TypeError for anything else. No findings at all is an empty tuple."""
    if isinstance(value, Path):
        return "mask"
    if isinstance(value, numbers.Integral):
        return "class"
    if isinstance(value, numbers.Real):
        return "number"
    if isinstance(value, Sequence) and not isinstance(value, str):
        if all(isinstance(v, Finding) for v in value):
            return "findings"
        if all(isinstance(v, numbers.Real) for v in value):
            return "vector"
    raise TypeError(f"a target must be a path, a number, numbers or findings, not {value!r}")


def learn(cases: Iterable[Case]) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """What the targets of a cohort are.

    Returns:
      `(kinds, columns)`: task -> one of `KINDS` (whole numbers among fractions are numbers), and, for tasks of
      findings, the attribute names in sorted order.

    Raises:
      UserError: a task whose targets are of two kinds, or vectors of two lengths; names a case of each.
    """
    kinds: dict[str, str] = {}
    first: dict[str, tuple[str, Any]] = {}
    names: dict[str, set[str]] = {}
    for case in cases:
        for task, target in case.targets.items():
            value: Any = target
            kind, (id, example) = kind_of(value), first.setdefault(task, (case.id, value))
            known = kinds.setdefault(task, kind)
            if {kind, known} == {"class", "number"}:
                kinds[task] = "number"
            elif kind != known:
                raise UserError(
                    f"case {case.id}: the target of task {task!r} is a {_WORDS[kind]}, but that of case {id} is a "
                    f"{_WORDS[known]}. A task has one kind of target; give them two names."
                )
            elif kind == "vector" and len(value) != len(example):
                raise UserError(
                    f"case {case.id}: {len(value)} numbers for task {task!r}, but case {id} has {len(example)}. Give "
                    "every case the same numbers, NaN where one is unknown."
                )
            if kind == "findings":
                names.setdefault(task, set()).update(*(finding.attributes for finding in value))
    return dict(sorted(kinds.items())), {task: tuple(sorted(found)) for task, found in sorted(names.items())}


_WORDS = {
    "mask": "mask file",
    "class": "whole number",
    "number": "number",
    "vector": "list of numbers",
    "findings": "list of findings",
}


def as_array(value: Any, kind: str, task: str, case: str) -> np.ndarray:
    """A class as int32 [], a number as float32 [], a vector as float32 [K]; UserError naming the case if it is none."""
    where = f"case {case}: the target of task {task!r}"
    if kind == "class":
        if not isinstance(value, numbers.Integral):
            raise UserError(f"{where} is {value!r}, where the other cases have whole numbers. Correct it.")
        if not -(2**31) <= int(value) < 2**31:
            raise UserError(f"{where} is {value}, which is no class index. Number the classes from 0.")
        return np.asarray(int(value), np.int32)
    if kind == "number":
        if not isinstance(value, numbers.Real) or not abs(float(value)) <= _LARGEST:
            raise UserError(
                f"{where} is {value}, not a finite number. Correct it, or leave it out where it is unknown."
            )
        return np.asarray(value, np.float32)
    vector = np.asarray(value, np.float64)
    if vector.ndim != 1 or not len(vector) or (np.abs(vector) > _LARGEST).any():
        raise UserError(
            f"{where} must be a list of numbers that float32 holds (NaN: unknown), not {value!r}. Correct it."
        )
    return vector.astype(np.float32)


def declared(case: Case, task: str, kinds: Mapping[str, str], columns: Mapping[str, Sequence[str]]) -> Any:
    """A case's target as `encode` gives it, before the case is prepared; None for a mask, or where it has none.

    Of findings the places are world mm and not compared with the volume. kinds, columns: from `learn`.
    """
    value: Any = case.targets.get(task)
    kind = kinds.get(task) or (None if value is None else kind_of(value))
    if value is None or isinstance(value, Path) or kind == "mask":
        return None
    if kind != "findings":
        return as_array(value, str(kind), task, case.id)
    _check_findings(value, task, case.id)
    named = columns.get(task, ())
    rows = [(*f.center, *f.size, f.label, *(f.attributes.get(name, np.nan) for name in named)) for f in value]
    return np.asarray(rows, np.float64).reshape(-1, FIXED_COLUMNS + len(named))


def _check_findings(value: Any, task: str, case: str) -> None:
    if not isinstance(value, Sequence) or kind_of(value) != "findings":
        raise UserError(f"case {case}: the target of task {task!r} must be findings, not {value!r}. Correct it.")


def findings_array(
    findings: Sequence[Finding],
    columns: Sequence[str],
    affine: np.ndarray,
    file_affine: np.ndarray,
    file_shape: Sequence[int],
    task: str,
    case: str,
) -> np.ndarray:
    """Findings as rows.

    Args:
      findings: `medjax.data.cases.Finding`s, in world millimetres RAS+.
      columns: attribute names; one that a finding lacks is NaN there.
      affine: [4, 4], of the prepared grid.
      file_affine, file_shape: of the file, in which every centre must lie.
      task, case: for error messages.

    Returns:
      [M, 7 + len(columns)] float32: centre (x, y, z) in voxels of the prepared grid, size in mm, label, attributes.

    Raises:
      UserError: a centre outside the file's volume, a position or size that is not finite, a negative size.
    """
    rows = np.full((len(findings), FIXED_COLUMNS + len(columns)), np.nan)
    for number, (row, finding) in enumerate(zip(rows, findings, strict=True)):
        where = f"case {case}: finding {number + 1} of task {task!r}"
        center, size = np.asarray(finding.center, np.float64), np.asarray(finding.size, np.float64)
        if center.shape != (3,) or size.shape != (3,) or not (np.isfinite(center) & np.isfinite(size)).all():
            raise UserError(f"{where} needs a centre and a size of three finite numbers (mm). Correct it.")
        if (size < 0).any():
            raise UserError(f"{where} has a negative size {tuple(size.tolist())} mm. Correct it (zeros make a point).")
        if not _inside(center, file_affine, file_shape):
            flipped = center * (-1, -1, 1)
            cure = (
                "Its position in LPS would be inside: turn the signs of x and y, as positions are RAS+ here."
                if _inside(flipped, file_affine, file_shape)
                else "Positions are world millimetres in RAS+ (x grows to the right, y to the front), neither LPS nor "
                "voxels; convert them, or correct the file they belong to."
            )
            place = ", ".join(f"{v:g}" for v in center)
            raise UserError(f"{where}: its centre ({place}) mm lies outside the volume. {cure}")
        row[:3], row[3:6], row[6] = _voxel(center, affine), size, finding.label
        row[FIXED_COLUMNS:] = [finding.attributes.get(name, np.nan) for name in columns]
    return rows.astype(np.float32)


def _voxel(world: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return np.linalg.solve(np.asarray(affine)[:3, :3], world - np.asarray(affine)[:3, 3])


def _inside(world: np.ndarray, affine: np.ndarray, shape: Sequence[int]) -> bool:
    voxel = _voxel(world, affine)
    return bool((voxel >= -0.5 - _EDGE).all() and (voxel <= np.asarray(shape[:3]) - 0.5 + _EDGE).all())


def instances(rows: np.ndarray, affine: np.ndarray, shape: Sequence[int], name: str) -> np.ndarray:
    """Findings as an instance mask.

    Args:
      rows: [M, >= 6], from `findings_array`.
      affine: [4, 4], of the prepared grid; boxes lie along the world's axes, so on an oblique grid they are turned.
      shape: of the prepared grid.
      name: the case, for the note on findings that cannot be shown.

    Returns:
      [*shape] uint16: 0 background, i the i-th finding (from 1): the ellipsoid inscribed in its box, and at least the
      voxel that holds its centre. Smaller ones lie over larger ones. A point (no size along some axis) is a ball of
      radius 2 voxels; a voxel in the balls of several is of the nearest.
    """
    if len(rows) > _MAX_FINDINGS:
        raise UserError(f"case {name}: {len(rows)} findings; at most {_MAX_FINDINGS} can be numbered. Leave some out.")
    out = np.zeros(tuple(shape), np.uint16)
    matrix = np.asarray(affine, np.float64)[:3, :3]
    reach = np.abs(np.linalg.inv(matrix))
    points: np.ndarray = np.asarray((rows[:, 3:6] <= 0).any(axis=1))
    volumes = np.prod(rows[:, 3:6], axis=1, dtype=np.float64)
    volumes[points] = (2 * _POINT) ** 3 * abs(np.linalg.det(matrix))  # as it is drawn
    high_edge = np.asarray(out.shape) - 0.5 + _EDGE
    within: list[bool] = [bool(((c >= -0.5 - _EDGE) & (c <= high_edge)).all()) for c in rows[:, :3]]
    centers = np.clip(np.rint(rows[:, :3]).astype(np.intp), 0, np.asarray(out.shape) - 1)
    for i in np.argsort(-volumes, kind="stable"):
        center, half = rows[i, :3].astype(np.float64), rows[i, 3:6].astype(np.float64) / 2
        span = np.full(3, _POINT) if points[i] else reach @ half
        low = np.maximum(np.ceil(center - span), 0).astype(int)
        high = np.minimum(np.floor(center + span) + 1, out.shape).astype(int)
        if (within[i] or not points[i]) and (low < high).all():
            box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
            steps = np.meshgrid(
                *(np.arange(a, b) - c for a, b, c in zip(low, high, center, strict=True)), indexing="ij"
            )
            if points[i]:
                distance = (np.stack(steps) ** 2).sum(axis=0)
                out[box][(distance <= _POINT**2) & (distance < _to_points(out[box], low, rows, points))] = i + 1
            else:
                offsets = np.einsum("wv,v...->w...", matrix, np.stack(steps))
                distance = ((offsets / half[:, None, None, None]) ** 2).sum(axis=0)
                out[box][distance <= 1] = i + 1
        if within[i] and not points[i]:
            out[tuple(centers[i])] = i + 1
    # A voxel of their own for those that later, equally small ones hid.
    shown = np.bincount(out.ravel(), minlength=len(rows) + 1)
    for i in np.flatnonzero(shown[1:] == 0):
        place = tuple(centers[i])
        owner = int(out[place])
        twins = points[i] and owner and points[owner - 1] and (rows[i, :3] == rows[owner - 1, :3]).all()
        if within[i] and shown[owner] > 1 and not twins:
            shown[owner] -= 1
            shown[i + 1] = 1
            out[place] = i + 1
    if hidden := int((shown[1:] == 0).sum()):
        warn_once(
            f"case {name}: {hidden} of {len(rows)} findings have no voxel on the prepared grid (cropped away, or "
            "two in one place)"
        )
    return out


def touching(rows: np.ndarray, affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Whether any of the findings, as `instances` draws them, reaches the grid's first and last plane: bool [3, 2].

    Args:
      rows: [M, >= 6], from `findings_array`. affine, shape: of the prepared grid.
    """
    centers, last = np.asarray(rows[:, :3], np.float64), np.asarray(shape[:3]) - 1.0
    # An ellipsoid along the world's axes reaches so far along the grid's.
    spans = np.sqrt(np.square(rows[:, 3:6] / 2.0) @ np.square(np.linalg.inv(np.asarray(affine)[:3, :3])).T)
    spans[(rows[:, 3:6] <= 0).any(axis=1)] = _POINT
    low, high = (f(centers + sign * spans, np.rint(centers)) for sign, f in ((-1, np.minimum), (1, np.maximum)))
    here = ((high >= 0) & (low <= last)).all(axis=1, keepdims=True)
    return np.stack([((low <= 0) & here).any(axis=0), ((high >= last) & here).any(axis=0)], axis=1)


def _to_points(part: np.ndarray, low: np.ndarray, rows: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Squared distances, in voxels, from the voxels of an instance mask's part to the point that each is of; elsewhere
    infinite. low: of the part's first voxel."""
    found = np.full(part.shape, np.inf)
    for owner in np.unique(part):
        if owner and points[owner - 1]:
            place = np.argwhere(part == owner)
            found[tuple(place.T)] = ((place + low - rows[owner - 1, :3].astype(np.float64)) ** 2).sum(axis=1)
    return found


def encode(
    case: Case,
    tasks: Iterable[str],
    kinds: Mapping[str, str],
    columns: Mapping[str, Sequence[str]],
    affine: np.ndarray,
    shape: Sequence[int],
    file_affine: np.ndarray,
    file_shape: Sequence[int],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A case's targets that are no files.

    Args:
      case: the case. tasks: those wanted.
      kinds, columns: from `learn`; a task unknown there is taken as it comes.
      affine, shape: of the prepared grid. file_affine, file_shape: of the file.

    Returns:
      `(masks, values)`: task -> instance mask (findings only), and task -> array; see `Prepared`.
    """
    masks: dict[str, np.ndarray] = {}
    values: dict[str, np.ndarray] = {}
    for task in tasks:
        value: Any = case.targets[task]
        kind = kinds.get(task) or kind_of(value)
        if kind != "findings":
            values[task] = as_array(value, kind, task, case.id)
            continue
        _check_findings(value, task, case.id)
        named = columns[task] if task in columns else sorted({name for f in value for name in f.attributes})
        values[task] = findings_array(value, named, affine, file_affine, file_shape, task, case.id)
        masks[task] = instances(values[task], affine, shape, case.id)
    return masks, values
