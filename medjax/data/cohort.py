"""Cohorts: which files belong to which case, what the labels are called, and who may be learnt from.

A `Cohort` comes from a Medical Segmentation Decathlon folder (`from_msd`) or from a table (`from_manifest`).
`split` divides its cases and refuses to when a patient, or the same voxels under two names, would sit on both sides.
"""

from __future__ import annotations

import csv
import difflib
import functools
import hashlib
import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from medjax.data import nifti
from medjax.data.volume import Volume, axes_towards, check_same_grid, count_nonfinite
from medjax.errors import UserError, warn_once

Splits = dict[str, tuple["Case", ...]]

_IMAGE_SUFFIXES = (".nii.gz", ".nii", ".hdr", ".img", ".hdr.gz", ".img.gz")
_LISTED = 5  # offenders an error message names before it only counts


@dataclass(frozen=True)
class Case:
    """One example.

    Attributes:
      id: unique in the cohort.
      group: the patient; splits never cut through a group.
      images: modality -> file. Modalities that share one file are its channels, in this order.
      targets: task -> mask file, class index or number; a case may lack some.
      attributes: anything else that is known (site, scanner, age...), as text.
    """

    id: str
    group: str
    images: Mapping[str, Path]
    targets: Mapping[str, Path | float | int] = field(default_factory=dict)
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Cohort:
    """Cases that share modalities and labels.

    Attributes:
      name: for reports.
      root: folder that relative paths (a split file, say) start from.
      modalities: channel order of every image.
      labels: structure name -> value in the masks; background (0) is not listed.
      cases: in the order of their source.
      splits: the source's own splits, split name -> case ids; None where it has none.
    """

    name: str
    root: Path
    modalities: tuple[str, ...]
    labels: Mapping[str, int]
    cases: tuple[Case, ...]
    splits: Mapping[str, tuple[str, ...]] | None = None

    def case(self, id: str) -> Case:
        """The case of that id; UserError with the nearest one where there is none."""
        for case in self.cases:
            if case.id == id:
                return case
        raise UserError(f"{self.name}: no case {id!r}{nearest(id, (c.id for c in self.cases))}")


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean ...?' for a word nearly in `known`, else the empty string."""
    close = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_keys(where: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raises UserError for the first key that is not known, with the nearest one that is."""
    for key in given:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, known)} (known: {', '.join(known)})")


# ---------------------------------------------------------------------------------------------------------- sources


def from_msd(root: str | os.PathLike[str], task: str = "segmentation", group: str | None = None) -> Cohort:
    """Reads a folder in the layout of the Medical Segmentation Decathlon (medicaldecathlon.com).

    Args:
      root: holds `dataset.json` (modality, labels, training, test) and the files it names.
      task: name under which the masks become targets.
      group: regular expression whose first group, searched in a case's id, is its patient (such as '(patient\\d+)');
        None makes every case its own patient.

    Returns:
      The cohort; `splits` has 'train' (the training list) and 'test' (the test list) where each is not empty. A
      4-D file holds the modalities as channels.

    Raises:
      UserError: no or damaged dataset.json, missing keys or files, duplicate ids, labels that are not integers.
    """
    root = Path(root)
    path = root / "dataset.json"
    table = _load_json(path)
    if not isinstance(table, dict):
        raise UserError(f"{path}: must hold one JSON object")
    if "channel_names" in table:
        raise UserError(
            f"{path}: nnU-Net's layout, not the Decathlon's. List its files in a table and use from_manifest."
        )
    for key in ("modality", "labels", "training"):
        if key not in table:
            raise UserError(f"{path}: no key {key!r}; a Decathlon dataset.json has modality, labels and training")
    if not all(isinstance(table[key], dict) for key in ("modality", "labels")):
        raise UserError(f"{path}: modality and labels must be tables such as {{'0': 'MRI'}}")
    if not all(str(key).isdigit() for key in table["modality"]):
        raise UserError(f"{path}: modality must be numbered from '0' on, not {', '.join(table['modality'])}")
    modalities = tuple(str(table["modality"][key]) for key in sorted(table["modality"], key=int))
    if len(set(modalities)) < len(modalities) or not modalities:
        raise UserError(f"{path}: modality names must be there and differ, not {', '.join(modalities) or 'none'}")
    labels = _msd_labels(path, table["labels"])
    training = _msd_cases(root, path, table["training"], modalities, task, group)
    test = _msd_cases(root, path, table.get("test", []), modalities, task, group)
    if not training:
        raise UserError(f"{path}: the training list is empty")
    _require_files(path, training)
    if absent := [case for case in test if not _all_files(case)[0].exists()]:
        warn_once(f"{path}: {len(absent)} of {len(test)} listed test images are not there and are left out")
        test = [case for case in test if case not in absent]
    cases = tuple(training + test)
    _require_unique(path, cases)
    splits = {"train": tuple(c.id for c in training)} | ({"test": tuple(c.id for c in test)} if test else {})
    return Cohort(str(table.get("name", root.name)), root, modalities, labels, cases, splits)


def from_manifest(
    path: str | os.PathLike[str],
    images: Mapping[str, str],
    targets: Mapping[str, str] | None = None,
    labels: Mapping[str, int] | None = None,
    id: str = "id",
    group: str | None = None,
    split: str | None = None,
    classes: Mapping[str, Mapping[str, int] | Sequence[str]] | None = None,
    allow_missing: bool = False,
    name: str | None = None,
) -> Cohort:
    """Reads a table of cases: CSV (comma, semicolon or tab) or JSON (a list of records).

    Args:
      path: the table; relative file names in it start from its folder.
      images: modality -> column of its file.
      targets: task -> column: a mask file, a number, or a class named in `classes`; an empty cell means the case has no
        target for the task.
      labels: structure name -> value in the masks.
      id: column of the case's unique id.
      group: column of the patient; None makes every case its own patient.
      split: column with the split of each case; becomes `Cohort.splits`.
      classes: task -> its class names in order (or name -> index), for columns of text.
      allow_missing: True lets a case lack modalities (an empty cell), though not all of them.
      name: of the cohort; the file's name by default.

    Returns:
      The cohort. Columns that hold neither images nor targets are the cases' `attributes`.

    Raises:
      UserError: naming the table and the line: missing file, column or modality, empty table, duplicate or empty ids,
        a target that is neither file, number nor class.
    """
    path = Path(path)
    targets, classes = dict(targets or {}), dict(classes or {})
    if not images:
        raise UserError(f"{path}: name at least one modality and its column, such as images={{'T1': 't1'}}")
    check_keys(f"{path}: classes", classes, tuple(targets))
    rows = _load_records(path)
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    files_and_targets = {*images.values(), *targets.values()}
    for column in dict.fromkeys((id, *images.values(), *targets.values(), *(c for c in (group, split) if c))):
        if column not in columns:
            raise UserError(
                f"{path}: no column {column!r}{nearest(column, columns)} (there are: {', '.join(columns) or 'none'})"
            )
    cases, own_splits = [], defaultdict[str, list[str]](list)
    for where, row in rows:
        if not (case_id := row.get(id, "")):
            raise UserError(f"{where}: the id (column {id!r}) is empty; every case needs one")
        files = {m: _resolve(path, row[c]) for m, c in images.items() if row.get(c, "")}
        if any(f.name.startswith("._") for f in files.values()):
            warn_once(f"{where}: lists a macOS bookkeeping file ('._...'); such lines are ignored")
            continue
        if (absent := [m for m in images if m not in files]) and (not allow_missing or not files):
            cure = "" if not files else ", or allow missing modalities (allow_missing=True)"
            raise UserError(f"{where}: case {case_id} lacks modality {', '.join(absent)}. Give its file{cure}.")
        found: dict[str, Path | float | int] = {}
        for task, column in targets.items():
            if cell := row.get(column, ""):
                found[task] = _target(path, where, task, column, cell, classes.get(task))
        if group and not row.get(group, ""):
            raise UserError(f"{where}: case {case_id} has no patient (column {group!r}); without it splits may leak")
        if split:
            own_splits[row.get(split, "")].append(case_id)
        attributes = {k: v for k, v in row.items() if k not in files_and_targets and v}
        cases.append(Case(case_id, row[group] if group else case_id, files, found, attributes))
    if not cases:
        raise UserError(f"{path}: holds no cases")
    _require_unique(path, cases)
    _require_files(path, cases)
    if "" in own_splits:
        raise UserError(f"{path}: case {own_splits[''][0]} has no split (column {split!r}); name one for every case")
    for structure, value in (labels or {}).items():
        if not isinstance(value, int) or value < 0:
            raise UserError(f"{path}: label {structure!r} must be an integer from 1 on, not {value!r}")
    return Cohort(
        name or path.stem,
        path.parent,
        tuple(images),
        {k: v for k, v in (labels or {}).items() if v != 0},
        tuple(cases),
        {k: tuple(v) for k, v in own_splits.items()} if split else None,
    )


def _msd_labels(path: Path, table: Mapping[str, Any]) -> dict[str, int]:
    labels = {}
    for key, value in table.items():
        # The Decathlon writes value -> name; many copies write name -> value.
        text, number = (value, key) if str(key).lstrip("-").isdigit() else (key, value)
        if not str(number).isdigit():
            raise UserError(f"{path}: labels must pair integers from 0 on with names, not {key!r} with {value!r}")
        if int(number) == 0:
            continue
        if str(text) in labels:
            raise UserError(f"{path}: the label name {text!r} stands for two values; give each value its own name")
        labels[str(text)] = int(number)
    return labels


def _msd_cases(
    root: Path, path: Path, entries: Sequence[Any], modalities: tuple[str, ...], task: str, group: str | None
) -> list[Case]:
    cases = []
    for entry in entries:
        record = {"image": entry} if isinstance(entry, str) else entry
        if not isinstance(record, Mapping) or "image" not in record:
            raise UserError(f"{path}: an entry of the training or test list has no 'image': {entry!r}")
        image = root / str(record["image"])
        if image.name.startswith("._"):
            continue
        case_id = _stem(image)
        patient = case_id
        if group is not None:
            match = re.search(group, case_id)
            if not match or not match.groups():
                raise UserError(f"{path}: the group pattern {group!r} finds no patient in the id {case_id!r}")
            patient = match.group(1)
        targets = {task: root / str(record["label"])} if "label" in record else {}
        cases.append(Case(case_id, patient, dict.fromkeys(modalities, image), targets))
    return cases


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Correct the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error}). Correct the file.") from None


def _load_records(path: Path) -> list[tuple[str, dict[str, str]]]:
    """Rows of a CSV or JSON table as (place for messages, column -> stripped text)."""
    if path.suffix.lower() == ".json":
        table = _load_json(path)
        if not isinstance(table, list) or not all(isinstance(row, dict) for row in table):
            raise UserError(f"{path}: must hold a JSON list of records, one a case")
        return [
            (f"{path}: record {i}", {str(k): "" if v is None else str(v).strip() for k, v in row.items()})
            for i, row in enumerate(table, 1)
        ]
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Correct the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    lines = text.splitlines()
    if not lines:
        raise UserError(f"{path}: empty. Give a header line and one line a case.")
    delimiter = max(",;\t", key=lines[0].count)
    reader = csv.reader(lines, delimiter=delimiter)
    header = [cell.strip() for cell in next(reader)]
    if twice := [column for column, n in Counter(header).items() if n > 1]:
        raise UserError(f"{path}: the column {twice[0]!r} appears twice. Rename one.")
    rows = []
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        where = f"{path}: line {reader.line_num}"
        if len(cells) != len(header):
            raise UserError(f"{where}: {len(cells)} cells where the header has {len(header)}. Quote text with commas.")
        rows.append((where, dict(zip(header, (cell.strip() for cell in cells), strict=True))))
    return rows


def _target(
    path: Path, where: str, task: str, column: str, cell: str, classes: Mapping[str, int] | Sequence[str] | None
) -> Path | float | int:
    if classes is not None:
        index = dict(classes) if isinstance(classes, Mapping) else {name: i for i, name in enumerate(classes)}
        if cell not in index:
            raise UserError(
                f"{where}: {cell!r} is no class of task {task!r}{nearest(cell, index)} (known: {', '.join(index)})"
            )
        return index[cell]
    if cell.lower().endswith(_IMAGE_SUFFIXES):
        return _resolve(path, cell)
    try:
        number = float(cell)
    except ValueError:
        raise UserError(
            f"{where}: {cell!r} (column {column!r}, task {task!r}) is neither a NIfTI file nor a number. For classes "
            f"named in words declare them: classes={{{task!r}: [...]}}."
        ) from None
    if not math.isfinite(number):
        raise UserError(f"{where}: {cell!r} (column {column!r}) is no finite number; leave the cell empty if unknown")
    return int(cell) if re.fullmatch(r"[+-]?\d+", cell) else number


def _resolve(manifest: Path, cell: str) -> Path:
    return manifest.parent / Path(cell).expanduser()


def _stem(path: Path) -> str:
    for suffix in _IMAGE_SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.stem


def _all_files(case: Case) -> list[Path]:
    return [*dict.fromkeys(case.images.values()), *(t for t in case.targets.values() if isinstance(t, Path))]


def _require_files(where: Path, cases: Iterable[Case]) -> None:
    absent = [(case.id, file) for case in cases for file in _all_files(case) if not file.exists()]
    if absent:
        listed = ", ".join(f"{file} (case {id})" for id, file in absent[:_LISTED])
        more = f" and {len(absent) - _LISTED} more" if len(absent) > _LISTED else ""
        raise UserError(f"{where}: missing file {listed}{more}. Correct the paths or fetch the files.")


def _require_unique(where: Path, cases: Iterable[Case]) -> None:
    if twice := [id for id, n in Counter(case.id for case in cases).items() if n > 1]:
        raise UserError(
            f"{where}: the id {twice[0]!r} appears more than once ({len(twice)} such ids). Make ids unique."
        )


# ---------------------------------------------------------------------------------------------------------- loading


def load_images(case: Case, modalities: Sequence[str], allow_missing: bool = False) -> Volume:
    """Reads a case's images as one volume.

    Args:
      case: the case.
      modalities: channel order of the result.
      allow_missing: fill the channel of a modality that the case lacks with zeros instead of refusing it.

    Returns:
      Data [X, Y, Z, len(modalities)] in the files' own axis order; affine, header and source are the first file's.

    Raises:
      UserError: a missing modality, a file whose channels do not fit, or files on different grids (names both).
    """
    absent = [m for m in modalities if m not in case.images]
    if absent and (not allow_missing or len(absent) == len(modalities)):
        raise UserError(
            f"case {case.id}: lacks modality {', '.join(absent)} (it has: {', '.join(case.images) or 'none'})"
        )
    wanted = list(dict.fromkeys(case.images[m] for m in modalities if m in case.images))
    if len(wanted) == 1:
        volumes = {wanted[0]: nifti.read(wanted[0])}
    else:
        with ThreadPoolExecutor(max_workers=min(len(wanted), 4)) as pool:
            volumes = dict(zip(wanted, pool.map(nifti.read, wanted), strict=True))
    first = volumes[wanted[0]]
    for path, volume in volumes.items():
        sharing = [m for m, file in case.images.items() if file == path]
        if volume.channels != len(sharing):
            raise UserError(
                f"{path}: {volume.channels} channels for modality {', '.join(sharing)}; a file needs one channel for "
                "each modality that names it. Split the file, or declare the modalities of all its channels."
            )
        check_same_grid(volume, first)
    channels: list[np.ndarray | None] = []
    for modality in modalities:
        if modality not in case.images:
            channels.append(None)
            continue
        volume = volumes[case.images[modality]]
        sharing = [m for m, file in case.images.items() if file == volume.source]
        channels.append(volume.data[..., sharing.index(modality)] if volume.data.ndim == 4 else volume.data)
    if len(wanted) == 1 and tuple(case.images) == tuple(modalities):
        return replace(first, data=first.data.reshape((*first.shape, len(modalities)), order="A"))
    dtype = np.result_type(*(c.dtype for c in channels if c is not None))
    data = np.zeros((*first.shape, len(modalities)), dtype, order="F")  # the files' own order: channels are contiguous
    for index, channel in enumerate(channels):
        if channel is not None:
            data[..., index] = channel
    return replace(first, data=data, nonfinite=count_nonfinite(data))


def content_hash(path: str | os.PathLike[str]) -> str:
    """Digest of an image's voxels and shape, in RAS order and float32.

    Compression, dtype, scaling and axis order do not change it, so the same image is found under another name. Cached
    by path, size and modification time.
    """
    status = os.stat(path)
    return _content_hash(os.path.abspath(path), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1 << 16)
def _content_hash(path: str, size: int, mtime: int) -> str:
    del size, mtime  # part of the cache's key only
    volume = nifti.read(path)
    permutation, flips = axes_towards(volume.affine)
    data = np.moveaxis(volume.data, range(3), np.argsort(permutation))
    data = data[tuple(slice(None, None, -1) if f else slice(None) for f in flips)]
    # Adding 0 makes -0 the same as 0.
    values = np.ascontiguousarray(data.astype(np.float32) + np.float32(0))
    digest = hashlib.blake2b(str(values.shape).encode(), digest_size=16)
    digest.update(values.data.cast("B"))
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------- splits


def split(cohort: Cohort, spec: Mapping[str, Any], seed: int = 0, check_content: bool = True) -> Splits:
    """Divides a cohort.

    Args:
      cohort: the cohort.
      spec: one of
        `{'file': 'split.csv'}`: a table with columns `id` and `split` that names every case, relative to the cohort's
        root;
        `{'column': 'site'}`: an attribute whose value is the split;
        `{'folds': k, 'fold': i, 'test': 0.2, 'stratify': 'sex'}`: patients dealt into k folds, fold i is 'val', the
        others 'train'; `test` (optional) first sets that share of the patients aside, the same for every fold;
        `stratify` (optional) balances the folds by an attribute;
        `{}`: the cohort's own splits (`from_msd`, the split column of `from_manifest`).
        Empty values ('' or 0) count as not given.
      seed: of the folds.
      check_content: compare the images' voxels across splits (`content_hash`; reads every image once a process).

    Returns:
      split name -> its cases, in the cohort's order. Folds depend on the patients and the seed alone, not on library
      versions.

    Raises:
      UserError: unknown key, unlisted or unknown ids, an empty split, a patient in two splits (names the ids), or
        identical voxels in two splits (names both files).
    """
    check_keys("data.split", spec.keys(), ("file", "column", "folds", "fold", "test", "stratify"))
    given = {key: value for key, value in spec.items() if value}
    chosen = [kind for kind in ("file", "column", "folds") if kind in given]
    if len(chosen) > 1:
        raise UserError(f"data.split: {' and '.join(chosen)} are both given; choose one")
    if "folds" not in given and (loose := [key for key in ("fold", "test", "stratify") if key in given]):
        raise UserError(f"data.split.{loose[0]}={given[loose[0]]!r} needs data.split.folds; set it, or leave this out")
    if "file" in given:
        ids = _split_file(cohort, given["file"])
    elif "column" in given:
        ids = _split_column(cohort, given["column"])
    elif "folds" in given:
        ids = _split_folds(cohort, given, seed)
    else:
        ids = _split_own(cohort)
    member = {id: name for name, listed in ids.items() for id in listed}
    splits: Splits = {name: tuple(c for c in cohort.cases if member.get(c.id) == name) for name in ids}
    for name in ("train", *splits):
        if not splits.get(name):
            there = ", ".join(f"{k} ({len(v)})" for k, v in splits.items())
            raise UserError(f"data.split of {cohort.name}: the split {name!r} is empty (there are: {there or 'none'})")
    _check_groups(cohort, splits)
    if check_content:
        _check_content(splits)
    return splits


def _split_file(cohort: Cohort, file: str | os.PathLike[str]) -> dict[str, list[str]]:
    path = cohort.root / file
    rows = _load_records(path)
    known = {case.id for case in cohort.cases}
    listed: dict[str, str] = {}
    splits: dict[str, list[str]] = defaultdict(list)
    for where, row in rows:
        for column in ("id", "split"):
            if not row.get(column):
                raise UserError(
                    f"{where}: column {column!r} is missing or empty; a split file has columns id and split"
                )
        if row["id"] not in known:
            raise UserError(f"{where}: the cohort {cohort.name} has no case {row['id']!r}{nearest(row['id'], known)}")
        if row["id"] in listed:
            raise UserError(f"{where}: {row['id']!r} is listed twice ({listed[row['id']]} and {row['split']})")
        listed[row["id"]] = row["split"]
        splits[row["split"]].append(row["id"])
    if left := [case.id for case in cohort.cases if case.id not in listed]:
        raise UserError(f"{path}: {len(left)} cases are in no split ({', '.join(left[:_LISTED])}...). List every case.")
    return dict(splits)


def _split_column(cohort: Cohort, column: str) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = defaultdict(list)
    for case in cohort.cases:
        splits[_attribute(cohort, case, column)].append(case.id)
    return dict(splits)


def _attribute(cohort: Cohort, case: Case, column: str) -> str:
    if column not in case.attributes:
        hint = nearest(column, case.attributes)
        raise UserError(f"data.split of {cohort.name}: case {case.id} has no attribute {column!r}{hint}")
    return case.attributes[column]


def _split_own(cohort: Cohort) -> dict[str, list[str]]:
    if not cohort.splits:
        raise UserError(f"data.split: the cohort {cohort.name} has no splits of its own; set file, column or folds")
    return {name: list(ids) for name, ids in cohort.splits.items()}


def _split_folds(cohort: Cohort, spec: Mapping[str, Any], seed: int) -> dict[str, list[str]]:
    folds, fold, test = spec["folds"], spec.get("fold", 0), spec.get("test", 0.0)
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in cohort.cases:
        groups[case.group].append(case)
    if not isinstance(folds, int) or not 2 <= folds <= len(groups):
        raise UserError(f"data.split.folds={folds!r}: must be from 2 to the number of patients ({len(groups)})")
    if not isinstance(fold, int) or not 0 <= fold < folds:
        raise UserError(f"data.split.fold={fold!r}: must be from 0 to {folds - 1}")
    if not 0 <= test < 1:
        raise UserError(f"data.split.test={test!r}: must be a share from 0 to below 1")

    def order(group: str) -> tuple[str, bytes]:
        # A digest, not a generator: the order stays the same across versions of numpy, and when patients are added.
        column = spec.get("stratify")
        stratum = _attribute(cohort, groups[group][0], column) if column else ""
        return stratum, hashlib.blake2b(f"{seed}:{group}".encode(), digest_size=8).digest()

    ranked = sorted(groups, key=order)
    # Evenly spaced ranks: strata stay balanced in the test set as well.
    held = [g for i, g in enumerate(ranked) if math.floor((i + 1) * test + 1e-9) > math.floor(i * test + 1e-9)]
    rest = [g for g in ranked if g not in set(held)]
    parts = {
        "train": [g for i, g in enumerate(rest) if i % folds != fold],
        "val": [g for i, g in enumerate(rest) if i % folds == fold],
    } | ({"test": held} if test else {})
    return {name: [case.id for g in members for case in groups[g]] for name, members in parts.items()}


def _check_groups(cohort: Cohort, splits: Splits) -> None:
    where: dict[str, dict[str, str]] = defaultdict(dict)
    for name, cases in splits.items():
        for case in cases:
            where[case.group].setdefault(name, case.id)
    for group, sides in where.items():
        if len(sides) > 1:
            listed = ", ".join(f"{id} in {name}" for name, id in sides.items())
            raise UserError(
                f"data.split of {cohort.name}: patient {group!r} is in more than one split ({listed}). "
                "Keep all images of a patient on one side."
            )


def _check_content(splits: Splits) -> None:
    files = {path: (name, case.id) for name, cases in splits.items() for case in cases for path in case.images.values()}
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(content_hash, files))
    same: dict[str, list[Path]] = defaultdict(list)
    for path, digest in zip(files, digests, strict=True):
        same[digest].append(path)
    inside = []
    for paths in same.values():
        for other in paths[1:]:
            (split_a, id_a), (split_b, id_b) = files[paths[0]], files[other]
            if split_a != split_b:
                raise UserError(
                    f"{other} ({split_b}, case {id_b}) and {paths[0]} ({split_a}, case {id_a}) hold identical voxels: "
                    "a score would measure memory. Leave one out, or put both into one split (one patient for both)."
                )
            if id_a != id_b:
                inside.append((other, paths[0]))
    if inside:
        a, b = inside[0]
        warn_once(
            f"{a} and {b} hold identical voxels ({len(inside)} such pairs inside a split): these cases count twice"
        )
