"""Readers: a cohort from each of the layouts that people keep their data in.

| layout | reader | told by |
|---|---|---|
| nnU-Net raw | `from_nnunet` | `dataset.json` with `channel_names` (or a version 1 file whose images end in `_0000`) |
| Medical Segmentation Decathlon | `from_msd` | `dataset.json` with `modality` |
| BIDS | `from_bids` | `dataset_description.json` |
| a table | `from_manifest` | a `.csv`, `.tsv` or `.json` file |
| any folder | `from_folder` | patterns of file names such as `'{case}/t1.nii.gz'` |
| any files, no targets | `from_files` | `data.layout='files'` |

Every reader raises UserError at the first thing that is wrong; given a tolerant `Intake` it notes what is wrong with
single cases there, leaves them out and goes on.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medjax.data.cases import Case, Cohort, Intake, Target, nearest
from medjax.data.folders import from_bids, from_files, from_folder
from medjax.data.joins import FIELD, Table, all_files, check_labels, check_unique, complete, join
from medjax.data.tables import (
    TABLE_SUFFIXES,
    Classes,
    TargetReader,
    check_columns,
    load_json,
    load_rows,
    stem,
)
from medjax.errors import UserError, warn_once

__all__ = [
    "LAYOUTS",
    "MASK",
    "from_bids",
    "from_files",
    "from_folder",
    "from_manifest",
    "from_msd",
    "from_nnunet",
    "recognise",
]

LAYOUTS = ("nnunet", "msd", "bids", "manifest", "folder", "files")
MASK = "label"
"""What a target's spec says for the mask that a Decathlon or nnU-Net folder has for each case."""


def recognise(path: Path, images: Mapping[str, Any]) -> str:
    """The layout of what lies at `path`, one of `LAYOUTS`; UserError that lists what was looked for."""
    if path.is_file():
        if path.name == "dataset.json":
            return recognise(path.parent, images)
        if path.suffix.lower() in TABLE_SUFFIXES:
            return "manifest"
    if not path.is_dir():
        raise UserError(f"{path}: data.cohort is neither a folder nor a .csv, .tsv or .json manifest; check the path")
    if any(FIELD.search(str(spec)) for spec in images.values()):
        return "folder"
    if (path / "dataset.json").is_file():
        table = load_json(path / "dataset.json")
        keys = table if isinstance(table, dict) else {}
        if "channel_names" in keys or ("modality" in keys and _numbered(path, keys)):
            return "nnunet"
        if "modality" in keys:
            return "msd"
        raise UserError(f"{path / 'dataset.json'}: has neither channel_names (nnU-Net) nor modality (Decathlon)")
    if (path / "dataset_description.json").is_file():
        return "bids"
    there = sorted(p.name + ("/" if p.is_dir() else "") for p in path.iterdir() if not p.name.startswith("."))
    listed = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "")
    raise UserError(
        f"{path}: no layout recognised. Looked for dataset.json (nnU-Net: channel_names; Decathlon: modality), "
        "dataset_description.json (BIDS) and patterns in data.images (any folder), such as "
        "data.images={'T1': '{case}/t1.nii.gz'}; to pretrain on every volume in it, set data.layout='files'. "
        f"There are: {listed or 'no files'}."
    )


def _numbered(root: Path, table: Mapping[str, Any]) -> bool:
    """Whether a dataset.json of the Decathlon's kind goes with nnU-Net's file names (its version 1)."""
    entries = table.get("training") or [{}]
    first = entries[0] if isinstance(entries, list) else {}
    image = str(first.get("image", "")) if isinstance(first, dict) else str(first)
    if not image or (root / image).exists():
        return False
    return any((root / Path(image).parent / f"{stem(Path(image))}_0000{end}").exists() for end in (".nii.gz", ".nii"))


# ------------------------------------------------------------------------------------------------ Decathlon, nnU-Net


def from_msd(
    root: str | os.PathLike[str],
    task: str | Sequence[str] = "segmentation",
    group: str | None = None,
    table: Table | None = None,
    intake: Intake | None = None,
) -> Cohort:
    """Reads a folder in the layout of the Medical Segmentation Decathlon (medicaldecathlon.com).

    Args:
      root: holds `dataset.json` (modality, labels, training, test) and the files it names.
      task: name (or names) under which the masks become targets.
      group: the patient: a column of the table, or a regular expression whose first group, searched in a case's id,
        is its patient (such as '(patient\\d+)'); None makes every case its own patient.
      table: joined on a column of ids or of patients.
      intake: what to do about cases that cannot be used.

    Returns:
      The cohort; `splits` has 'train' (the training list) and 'test' (the test list) where each is not empty. A
      4-D file holds the modalities as channels.

    Raises:
      UserError: no or damaged dataset.json, missing keys or files, duplicate ids, labels that are not integers.
    """
    root, intake = Path(root), intake or Intake()
    path = root / "dataset.json"
    content = _load_table(path)
    if "channel_names" in content:
        raise UserError(f"{path}: nnU-Net's layout, not the Decathlon's. Set data.layout='nnunet', or leave it empty.")
    for key in ("modality", "labels", "training"):
        if key not in content:
            raise UserError(f"{path}: no key {key!r}; a Decathlon dataset.json has modality, labels and training")
    if not all(isinstance(content[key], dict) for key in ("modality", "labels")):
        raise UserError(f"{path}: modality and labels must be tables such as {{'0': 'MRI'}}")
    modalities = _channels(path, "modality", content["modality"])
    if len(set(modalities)) < len(modalities):
        raise UserError(f"{path}: modality names must be there and differ, not {', '.join(modalities)}")
    labels = _labels(path, content["labels"])
    tasks = (task,) if isinstance(task, str) else tuple(task)
    training = list(_msd_cases(root, path, content["training"], modalities, tasks))
    test = list(_msd_cases(root, path, content.get("test", []), modalities, tasks))
    if not training:
        raise UserError(f"{path}: the training list is empty")
    if absent := [case for case in test if not all_files(case)[0].exists()]:
        warn_once(f"{path}: {len(absent)} of {len(test)} listed test images are not there and are left out")
        test = [case for case in test if case not in absent]
    splits = {"train": tuple(c.id for c in training)} | ({"test": tuple(c.id for c in test)} if test else {})
    cohort = Cohort(str(content.get("name", root.name)), root, modalities, labels, tuple(training + test), splits)
    check_unique(path, cohort.cases)
    return complete(path, join(cohort, table, {}, group, intake), intake)


def from_nnunet(
    root: str | os.PathLike[str],
    task: str | Sequence[str] = "segmentation",
    group: str | None = None,
    fold: int = 0,
    table: Table | None = None,
    intake: Intake | None = None,
) -> Cohort:
    """Reads a raw dataset of nnU-Net, version 2 or 1 (nnU-Net's documentation/dataset_format.md).

    Args:
      root: holds `dataset.json`, `imagesTr/CASE_0000.nii.gz` (one file a channel), `labelsTr/CASE.nii.gz` and
        optionally `imagesTs`, `labelsTs` and `splits_final.json`.
      task, group, table, intake: as for `from_msd`.
      fold: of `splits_final.json`.

    Returns:
      The cohort. Labels that are lists of values are regions: `labels` then names the single values ('label_2' where
      no region consists of it alone) and `regions` the regions, in the order of the file. The label 'ignore' is in
      `ignore`. `splits` has 'test' for `imagesTs`, and 'train' and 'val' from `splits_final.json`, without it 'train'
      only.

    Raises:
      UserError: keys or files that are missing or do not fit, another file ending than NIfTI's.
    """
    root, intake = Path(root), intake or Intake()
    path = root / "dataset.json"
    content = _load_table(path)
    key = "channel_names" if "channel_names" in content else "modality"
    for wanted in (key, "labels"):
        if not isinstance(content.get(wanted), dict):
            raise UserError(f"{path}: no table {wanted!r}; an nnU-Net dataset.json has channel_names and labels")
    ending = str(content.get("file_ending", ".nii.gz"))
    if ending not in (".nii.gz", ".nii"):
        raise UserError(
            f"{path}: file_ending {ending!r}; medjax reads NIfTI. Convert images and labels (SimpleITK reads and "
            "writes them with their geometry) and set file_ending to '.nii.gz'."
        )
    modalities = _distinct(_channels(path, key, content[key]))
    labels, regions, ignore = _nnunet_labels(path, content)
    tasks = (task,) if isinstance(task, str) else tuple(task)
    listed = content.get("dataset")
    if listed is None:
        training = list(_nnunet_cases(root, "imagesTr", "labelsTr", ending, modalities, tasks, True, intake))
    else:
        training = list(_nnunet_listed(path, listed, modalities, tasks, intake))
    if not training:
        raise UserError(f"{path}: no training case: imagesTr holds no usable CASE_0000{ending}")
    count = content.get("numTraining")
    if isinstance(count, int) and count != len(training) and not intake.problems:
        intake.remark(f"{path}: numTraining says {count}, but there are {len(training)} training cases")
    test = list(_nnunet_cases(root, "imagesTs", "labelsTs", ending, modalities, tasks, False, intake))
    splits = _nnunet_splits(root / "splits_final.json", [c.id for c in training], fold, intake)
    splits |= {"test": tuple(c.id for c in test)} if test else {}
    cohort = Cohort(
        str(content.get("name", root.name)), root, modalities, labels, tuple(training + test), splits,
        regions=regions, ignore=ignore,
    )  # fmt: skip
    check_unique(path, cohort.cases)
    return complete(path, join(cohort, table, {}, group, intake), intake)


def _load_table(path: Path) -> dict[str, Any]:
    content = load_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold one JSON object")
    return content


def _channels(path: Path, key: str, table: Mapping[str, Any]) -> tuple[str, ...]:
    if not all(str(number).isdigit() for number in table):
        raise UserError(f"{path}: {key} must be numbered from '0' on, not {', '.join(table)}")
    if sorted(int(number) for number in table) != list(range(len(table))) or not table:
        raise UserError(f"{path}: {key} must be there and numbered from '0' on without gaps, not {', '.join(table)}")
    return tuple(str(table[number]) for number in sorted(table, key=int))


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Names that differ: nnU-Net names its channels by their normalisation, so two may be called 'MRI'."""
    twice = {name for name, n in Counter(names).items() if n > 1}
    return tuple(f"{name}_{i}" if name in twice else name for i, name in enumerate(names))


def _labels(path: Path, table: Mapping[str, Any]) -> dict[str, int]:
    """Structure name -> value, from either way round, without the background; UserError for two of one value."""
    labels: dict[str, int] = {}
    for key, value in table.items():
        # The Decathlon writes value -> name; nnU-Net and many copies write name -> value.
        text, number = (value, key) if str(key).lstrip("-").isdigit() else (key, value)
        if not str(number).isdigit():
            raise UserError(f"{path}: labels must pair integers from 0 on with names, not {key!r} with {value!r}")
        if int(number) == 0:
            continue
        if str(text) in labels:
            raise UserError(f"{path}: the label name {text!r} stands for two values; give each value its own name")
        labels[str(text)] = int(number)
    return check_labels(path, labels)


def _msd_cases(
    root: Path, path: Path, entries: Sequence[Any], modalities: tuple[str, ...], tasks: Sequence[str]
) -> Iterator[Case]:
    for entry in entries:
        record = {"image": entry} if isinstance(entry, str) else entry
        if not isinstance(record, Mapping) or "image" not in record:
            raise UserError(f"{path}: an entry of the training or test list has no 'image': {entry!r}")
        image = root / str(record["image"])
        if image.name.startswith("._"):
            continue
        case_id = stem(image)
        targets: dict[str, Target] = dict.fromkeys(tasks, root / str(record["label"])) if "label" in record else {}
        yield Case(case_id, case_id, dict.fromkeys(modalities, image), targets)


def _nnunet_labels(
    path: Path, content: Mapping[str, Any]
) -> tuple[dict[str, int], dict[str, tuple[int, ...]], int | None]:
    """(labels, regions, ignore) of a dataset.json."""
    table = dict(content["labels"])
    ignore = table.pop("ignore", None)
    lists = {name: value for name, value in table.items() if isinstance(value, list)}
    if not lists:
        labels = _labels(path, table)
        values = set(labels.values())
        regions: dict[str, tuple[int, ...]] = {}
    else:
        regions = {}
        for name, value in table.items():
            parts = value if isinstance(value, list) else [value]
            if not parts or not all(isinstance(v, int) and v >= 0 for v in parts):
                raise UserError(f"{path}: labels: {name!r} must be an integer or a list of integers, not {value!r}")
            if parts != [0]:
                regions[str(name)] = tuple(sorted(set(parts)))
        order = content.get("regions_class_order")
        if order is not None and (not isinstance(order, list) or len(order) != len(regions)):
            raise UserError(f"{path}: regions_class_order must list one value for each region, {len(regions)} in all")
        values = {v for parts in regions.values() for v in parts if v}
        alone = {parts[0]: name for name, parts in regions.items() if len(parts) == 1}
        labels = {alone.get(v, f"label_{v}"): v for v in sorted(values)}
    if ignore is not None and (not isinstance(ignore, int) or ignore <= max(values, default=0)):
        raise UserError(f"{path}: labels: 'ignore' must be the highest value, above {max(values, default=0)}")
    return labels, regions, ignore


def _nnunet_cases(
    root: Path,
    images: str,
    masks: str,
    ending: str,
    modalities: tuple[str, ...],
    tasks: Sequence[str],
    training: bool,
    intake: Intake,
) -> Iterator[Case]:
    folder = root / images
    if not folder.is_dir():
        if training:
            raise UserError(f"{folder}: no such folder; an nnU-Net dataset keeps its training images there")
        return
    files: dict[str, dict[int, Path]] = defaultdict(dict)
    other = []
    for file in sorted(folder.iterdir()):
        if file.name.startswith("."):
            continue
        if match := re.fullmatch(r"(.+)_(\d{4})" + re.escape(ending), file.name):
            files[match[1]][int(match[2])] = file
        else:
            other.append(file.name)
    if other:
        intake.remark(f"{folder}: {len(other)} files are not named CASE_0000{ending} and are left out, as {other[0]}")
    for id, channels in files.items():
        if not intake.wants(id):
            continue
        mask = root / masks / f"{id}{ending}"
        absent = [f"{id}_{i:04d}{ending} ({m})" for i, m in enumerate(modalities) if i not in channels]
        extra = [channels[i].name for i in channels if i >= len(modalities)]
        if absent or extra:
            what = f"lacks {', '.join(absent)}" if absent else f"has {', '.join(extra)}, a channel too many"
            intake.refuse(
                f"{folder}: case {id} {what}; dataset.json declares {len(modalities)} channels. Correct either, or "
                f"leave the case out (data.exclude=({id!r},)).",
                id,
            )
            continue
        if training and not mask.exists():
            intake.refuse(
                f"{mask}: no such file: case {id} has no mask. Add it, or leave the case out (data.exclude=({id!r},)).",
                id,
                mask,
            )
            continue
        targets: dict[str, Target] = dict.fromkeys(tasks, mask) if mask.exists() else {}
        yield Case(id, id, {m: channels[i] for i, m in enumerate(modalities)}, targets)
    if (root / masks).is_dir():
        loose = sorted(
            f.name for f in (root / masks).glob(f"*{ending}") if not f.name.startswith(".")
            and f.name[: -len(ending)] not in files
        )  # fmt: skip
        if loose:
            intake.remark(f"{root / masks}: {len(loose)} masks have no image in {images} (such as {loose[0]})")


def _nnunet_listed(
    path: Path, listed: Any, modalities: tuple[str, ...], tasks: Sequence[str], intake: Intake
) -> Iterator[Case]:
    """Cases of the optional key 'dataset': id -> {'images': [...], 'label': ...}, relative to the file."""
    if not isinstance(listed, dict):
        raise UserError(f"{path}: 'dataset' must be a table of cases, each with 'images' and 'label'")
    for id, entry in listed.items():
        if not intake.wants(id):
            continue
        files = entry.get("images") if isinstance(entry, dict) else None
        if not isinstance(files, list) or len(files) != len(modalities) or "label" not in entry:
            intake.refuse(f"{path}: dataset: case {id} needs a 'label' and {len(modalities)} 'images'", id)
            continue
        images = {m: path.parent / str(f) for m, f in zip(modalities, files, strict=True)}
        yield Case(str(id), str(id), images, dict.fromkeys(tasks, path.parent / str(entry["label"])))


def _nnunet_splits(path: Path, ids: Sequence[str], fold: int, intake: Intake) -> dict[str, tuple[str, ...]]:
    if not path.exists():
        return {"train": tuple(ids)}
    folds = load_json(path)
    if (
        not isinstance(folds, list)
        or not folds
        or not all(isinstance(f, dict) and {"train", "val"} <= {*f} for f in folds)
    ):
        raise UserError(f"{path}: must hold a list of folds, each with 'train' and 'val'")
    if not 0 <= fold < len(folds):
        raise UserError(f"data.split.fold={fold}: {path} has {len(folds)} folds, from 0 on")
    splits = {name: tuple(str(id) for id in folds[fold][name]) for name in ("train", "val")}
    used = {id for listed in splits.values() for id in listed}
    for id in (id for id in sorted(used.difference(ids)) if intake.wants(id)):
        intake.refuse(f"{path}: fold {fold} names {id!r}, and there is no such training case{nearest(id, ids)}", id)
    if left := [id for id in ids if id not in used]:
        intake.remark(
            f"{path}: {len(left)} training cases are in no part of fold {fold} (such as {left[0]}) and not used"
        )
    return splits


# ------------------------------------------------------------------------------------------------------------ tables


def from_manifest(
    path: str | os.PathLike[str],
    images: Mapping[str, str],
    targets: Mapping[str, str | Sequence[str]] | None = None,
    labels: Mapping[str, int] | None = None,
    id: str = "id",
    group: str | None = None,
    split: str | None = None,
    classes: Classes | None = None,
    allow_missing: bool = False,
    name: str | None = None,
    findings: Mapping[str, str] | None = None,
    intake: Intake | None = None,
) -> Cohort:
    """Reads a table of cases: CSV (comma, semicolon or tab) or JSON (a list of records).

    Args:
      path: the table; relative file names in it start from its folder.
      images: modality -> column of its file.
      targets: task -> column: a mask file, a number, a class named in `classes`, a JSON list of numbers or of findings
        (`medjax.data.tables.parse_findings`); or several columns: a vector; or a table with one row a finding, such as
        'nodules.csv' (`medjax.data.tables.read_findings_table`). An empty cell means the case has no target for the
        task.
      labels: structure name -> value in the masks.
      id: column of the case's unique id.
      group: column of the patient; None makes every case its own patient.
      split: column with the split of each case; becomes `Cohort.splits`.
      classes: task -> its class names in order (or name -> index), for columns of text.
      allow_missing: True lets a case lack modalities (an empty cell), though not all of them.
      name: of the cohort; the file's name by default.
      findings: how findings are written, see `medjax.data.tables.FINDINGS`.
      intake: what to do about cases that cannot be used.

    Returns:
      The cohort. Columns that hold no files are the cases' `attributes`, those that are targets too.

    Raises:
      UserError: naming the table and the line: missing file, column or modality, empty table, duplicate or empty ids,
        a target that is neither file, number nor class.
    """
    path, intake = Path(path), intake or Intake()
    if not images:
        raise UserError(f"{path}: name at least one modality and its column, such as images={{'T1': 't1'}}")
    rows = load_rows(path)
    check_columns(path, rows, [id, *images.values()])
    reader = TargetReader(path, rows, targets or {}, classes, findings, id, intake)
    check_columns(path, rows, [c for c in (group, split) if c])
    cases, own_splits = [], defaultdict[str, list[str]](list)
    for where, row in rows:
        if not (case_id := row.get(id, "")):
            intake.refuse(f"{where}: the id (column {id!r}) is empty; every case needs one")
            continue
        patient = row.get(group, "") if group else case_id
        if not intake.wants(case_id, patient):
            continue
        files = {m: path.parent / Path(row[c]).expanduser() for m, c in images.items() if row.get(c, "")}
        if any(f.name.startswith("._") for f in files.values()):
            warn_once(f"{where}: lists a macOS bookkeeping file ('._...'); such lines are ignored")
            continue
        if (absent := [m for m in images if m not in files]) and (not allow_missing or not files):
            cure = "" if not files else ", or allow missing modalities (data.preprocess.missing='zero')"
            intake.refuse(f"{where}: case {case_id} lacks modality {', '.join(absent)}. Give its file{cure}.", case_id)
            continue
        if not patient:
            intake.refuse(
                f"{where}: case {case_id} has no patient (column {group!r}); without it splits may leak", case_id
            )
            continue
        found = reader.read(where, case_id, row)
        if split:
            own_splits[row.get(split, "")].append(case_id)
        of_images = {*images.values()}
        attributes = {k: v for k, v in row.items() if v and k not in of_images and not reader.is_file(k, v)}
        cases.append(Case(case_id, patient, files, found, attributes))
    if not cases:
        raise UserError(f"{path}: holds no cases" + (" that can be used" if intake.problems else ""))
    if "" in own_splits:
        raise UserError(f"{path}: case {own_splits[''][0]} has no split (column {split!r}); name one for every case")
    cohort = Cohort(
        name or path.stem,
        path.parent,
        tuple(images),
        check_labels(path, labels),
        tuple(cases),
        {k: tuple(v) for k, v in own_splits.items()} if split else None,
        reader.classes,
    )
    reader.check_tables([case.id for case in cases])
    return complete(path, cohort, intake)
