"""Cohorts: which files belong to which case, what the labels are called, and who may be learnt from.

A `Cohort` (`medjax.data.cases`) comes from one of the readers (`medjax.data.readers`). `load_images` reads a case;
`split` divides the cases and refuses to when a patient, or the same voxels under two names, would sit on both sides.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from medjax.data import hashes, nifti
from medjax.data.cases import Case, Cohort, Finding, Intake, Problem, Target, check_keys, nearest
from medjax.data.readers import from_bids, from_files, from_folder, from_manifest, from_msd, from_nnunet
from medjax.data.tables import load_rows
from medjax.data.volume import Volume, axes_towards, check_same_grid, count_nonfinite
from medjax.errors import UserError, warn_once

__all__ = [
    "Case",
    "Cohort",
    "Finding",
    "Intake",
    "Problem",
    "Splits",
    "Target",
    "check_keys",
    "content_hash",
    "content_hashes",
    "from_bids",
    "from_files",
    "from_folder",
    "from_manifest",
    "from_msd",
    "from_nnunet",
    "load_images",
    "nearest",
    "split",
    "voxel_hash",
]

Splits = dict[str, tuple[Case, ...]]

UNUSED = "unlabelled"
"""Name of a split that no run learns from or is judged by (`medjax.plan` writes it): patients may be in another too."""

_LISTED = 5  # offenders an error message names before it only counts
_HASHED = 1 << 21  # voxels that are hashed at a time
_BLANK = "blank-"  # how the digest of a volume begins that holds one value only


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
    by path, size and times, in this process; `medjax.data.hashes` remembers it longer.
    """
    return _content_hash(os.path.abspath(path), str(hashes.stamp(Path(path))))


@functools.lru_cache(maxsize=1 << 16)
def _content_hash(path: str, stamp: str) -> str:
    del stamp  # part of the cache's key only
    return voxel_hash(nifti.read(path))


def content_hashes(paths: Iterable[Path]) -> list[str]:
    """`content_hash` of each, read only where no process before has: see `medjax.data.hashes`."""
    return hashes.remembered(content_hash, paths, workers=min(4, os.cpu_count() or 1))


def voxel_hash(volume: Volume) -> str:
    """`content_hash` of a volume that is read already; it says so where all voxels are the same."""
    permutation, flips = axes_towards(volume.affine)
    data = np.moveaxis(volume.data, range(3), np.argsort(permutation))
    data = data[tuple(slice(None, None, -1) if f else slice(None) for f in flips)]
    digest = hashlib.blake2b(str(data.shape).encode(), digest_size=16)
    rows = max(_HASHED // max(1, data[:1].size), 1)
    first, blank = np.float32(data.flat[0]), True
    for start in range(0, len(data), rows):  # a part at a time: no float32 copy of the whole
        # Adding 0 makes -0 the same as 0.
        part = np.ascontiguousarray(data[start : start + rows].astype(np.float32) + np.float32(0))
        digest.update(part.data.cast("B"))
        blank = blank and bool((part == first).all())
    return _BLANK * blank + digest.hexdigest()


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
      check_content: compare the images' voxels across splits (`content_hash`; reads the images that are new or have
        changed since a process last did, see `medjax.data.hashes`).

    Returns:
      split name -> its cases, in the cohort's order; `Cohort.extra` come last in 'train'. Folds depend on the patients
      and the seed alone, not on library versions.

    Raises:
      UserError: unknown key, unlisted or unknown ids, an empty split, a patient in two splits (names the ids), or
        identical voxels in two splits (names both files). The split `UNUSED` is not compared.
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
    if cohort.extra:
        splits["train"] = (*splits.get("train", ()), *cohort.extra)
    for name in ("train", *splits):
        if not splits.get(name):
            there = ", ".join(f"{k} ({len(v)})" for k, v in splits.items())
            raise UserError(f"data.split of {cohort.name}: the split {name!r} is empty (there are: {there or 'none'})")
    used = {name: members for name, members in splits.items() if name != UNUSED}
    _check_groups(cohort, used)
    if check_content:
        _check_content(used)
    return splits


def _split_file(cohort: Cohort, file: str | os.PathLike[str]) -> dict[str, list[str]]:
    path = cohort.root / file
    rows = load_rows(path)
    known = {case.id for case in cohort.cases}
    listed: dict[str, str] = {}
    splits: dict[str, list[str]] = defaultdict(list)
    for where, row in rows:
        for column in ("id", "split"):
            if not row.get(column):
                raise UserError(
                    f"{where}: column {column!r} is missing or empty; a split file has columns id and split"
                )
        if row["id"] in cohort.left_out:
            continue
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
    places: dict[Path, dict[str, str]] = defaultdict(dict)  # file -> the cases that have it, and their splits
    for name, cases in splits.items():
        for case in cases:
            for path in case.images.values():
                places[path][case.id] = name
    digests = content_hashes(places)
    same: dict[str, dict[tuple[Path, str], str]] = defaultdict(dict)
    for (path, holders), digest in zip(places.items(), digests, strict=True):
        same[digest] |= {(path, id): name for id, name in holders.items()}
    inside = []
    for digest, files in same.items():
        if digest.startswith(_BLANK):
            continue  # an empty channel shows nothing; where it is read it is refused as what it is
        ((path_a, id_a), split_a), *others = files.items()
        for (path_b, id_b), split_b in others:
            if split_a != split_b:
                raise UserError(
                    f"{path_b} ({split_b}, case {id_b}) and {path_a} ({split_a}, case {id_a}) hold identical voxels: "
                    "a score would measure memory. Leave one out (data.exclude), or put both into one split (one "
                    "patient for both)."
                )
            if id_a != id_b:
                inside.append((path_b, path_a))
    if inside:
        a, b = inside[0]
        warn_once(
            f"{a} and {b} hold identical voxels ({len(inside)} such pairs inside a split): these cases count twice"
        )
