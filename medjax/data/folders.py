"""Cohorts from folders whose file names say what belongs together: patterns of one's own, and BIDS."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medjax.data.cases import Case, Cohort, Intake, Target, nearest
from medjax.data.joins import FIELD, Table, Template, check_labels, check_unique, complete, join, join_rows, patient_of
from medjax.data.tables import IMAGE_SUFFIXES, Rows, columns_of, is_findings_table, load_json, load_rows, stem
from medjax.errors import UserError

_BRACES = re.compile(r"\{([^{}]*)\}")
_WILD = re.compile(r"(\{[^{}]*\}|\*)")
# BIDS entities that a file name carries before its suffix: 'sub-01_ses-1_acq-high_T1w'.
_ENTITY = re.compile(r"([a-zA-Z]+)-([a-zA-Z0-9+]+)")

_Twice = dict[tuple[str, ...], tuple[str, Path]]
"""What two files lie at, of which none is taken -> what is wrong, and the second of them."""


# ----------------------------------------------------------------------------------------------------------- folders


def from_folder(
    root: str | os.PathLike[str],
    images: Mapping[str, str],
    targets: Mapping[str, str | Sequence[str]] | None = None,
    labels: Mapping[str, int] | None = None,
    id: str = "",
    group: str | None = None,
    table: Table | None = None,
    allow_missing: bool = False,
    intake: Intake | None = None,
) -> Cohort:
    """Reads a folder whose file names say what belongs together.

    Args:
      root: the folder.
      images: modality -> pattern of its files below the root, such as 'images/{patient}_{frame}.nii.gz'. A field in
        braces stands for any text within one part of the path (as short as can be, so the last field takes what is
        left), the same text wherever it stands twice; '*' for any text that does not matter. All modalities have the
        same fields.
      targets: task -> pattern of its mask files, with some or all of the fields; or what `table` takes. A file that
        the patterns of an image and of a mask find is of the pattern that says more: with '{case}.nii.gz' and
        '{case}_seg.nii.gz', 'a_seg.nii.gz' is a mask.
      labels: structure name -> value in the masks.
      id: template of a case's id, such as '{patient}-{frame}'; '' joins the fields with '_'.
      group: the patient: a template such as '{patient}', a column of the table, or a regular expression whose first
        group is searched in the id. None: the field named patient, subject or sub if there is one, else every case is
        its own patient.
      table: joined on its columns that are named as fields; without such columns on ids or patients.
      allow_missing: True lets a case lack modalities.
      intake: what to do about cases that cannot be used: one with two files for a modality is left out, one with two
        masks for a task goes without.

    Returns:
      The cohort, cases in order of their file names; the fields are attributes too.

    Raises:
      UserError: a bad pattern or one that matches nothing, two files for one case, a case that lacks a modality.
    """
    root, intake = Path(root), intake or Intake()
    if not images:
        raise UserError(f"{root}: name the files, such as data.images={{'T1': '{{case}}/t1.nii.gz'}}")
    patterns = {modality: _Pattern(f"data.images.{modality}", str(spec)) for modality, spec in images.items()}
    first = next(iter(patterns.values()))
    for pattern in patterns.values():
        if set(pattern.fields) != set(first.fields) or not pattern.fields:
            raise UserError(
                f"config: {pattern.key}={pattern.text!r}: every image pattern needs the same fields in braces "
                f"(at least one); {first.key} has {', '.join(first.fields) or 'none'}"
            )
    fields = first.fields
    found: dict[str, dict[tuple[str, ...], Path]] = {}
    twice: dict[str, _Twice] = {}
    for modality, pattern in patterns.items():
        found[modality], twice[modality] = pattern.find(root, fields)
    masks: dict[str, tuple[_Pattern, dict[tuple[str, ...], Path]]] = {}
    unclear: dict[str, _Twice] = {}
    columns: dict[str, str | Sequence[str]] = {}
    for task, spec in (targets or {}).items():
        if isinstance(spec, str) and FIELD.search(spec):
            pattern = _Pattern(f"data.targets.{task}", spec)
            if strange := [name for name in pattern.fields if name not in fields]:
                raise UserError(
                    f"config: {pattern.key}={spec!r}: no image has the field {strange[0]!r}; write '*' for it"
                )
            matched, unclear[task] = pattern.find(root, pattern.fields)
            masks[task] = pattern, matched
        else:
            columns[task] = spec
    _tell_apart(root, patterns, found, masks, intake)
    template = Template("data.id", id, fields) if id else None
    cases, values_of = [], {}
    keys = sorted({key for modality in images for key in (*found[modality], *twice[modality])})
    for key in keys:
        values = dict(zip(fields, key, strict=True))
        case_id = template.fill(values) if template else "_".join(key)
        patient = patient_of(case_id, values, group if group and FIELD.search(group) else None)
        if not intake.wants(case_id, patient):
            continue
        if any(_refused(both, key, case_id, intake) for both in twice.values()):
            continue
        files = {modality: matched[key] for modality, matched in found.items() if key in matched}
        if (absent := [m for m in images if m not in files]) and not allow_missing:
            intake.refuse(
                f"{root}: case {case_id} lacks modality {', '.join(absent)} ({patterns[absent[0]].text}). Add the "
                "file, allow missing modalities (data.preprocess.missing='zero'), or leave the case out "
                f"(data.exclude=({case_id!r},)).",
                case_id,
            )
            continue
        own: dict[str, Target] = {}
        for task, (pattern, matched) in masks.items():
            part = tuple(values[name] for name in pattern.fields)
            if part in matched:
                own[task] = matched[part]
            _refused(unclear[task], part, case_id, intake)
        values_of[case_id] = values
        cases.append(Case(case_id, patient, files, own, values))
    if not cases:
        raise UserError(f"{root}: no case is complete")
    for task, (pattern, matched) in masks.items():
        places = [fields.index(name) for name in pattern.fields]
        used = {tuple(key[place] for place in places) for key in keys}
        _remark_loose(root, task, matched, unclear[task], used, intake)
    cohort = Cohort(root.resolve().name, root, tuple(images), check_labels(root, labels), tuple(cases))
    check_unique(root, cohort.cases)
    table = replace(table or Table(), targets=columns)
    return complete(root, join(cohort, table, values_of, group, intake), intake)


def from_files(
    root: str | os.PathLike[str], modality: str = "image", group: str | None = None, intake: Intake | None = None
) -> Cohort:
    """Every NIfTI file below a folder as a case of its own, without targets: what pretraining takes.

    Args:
      root: the folder; hidden files and folders in it are passed over, links to folders followed.
      modality: what all of them are. group: the patient, see `from_folder`; None: every file its own.
      intake: what to do about cases that cannot be used.

    Returns:
      The cohort; a case's id is its path below the root without the ending, parts joined by '_'.
    """
    root, intake = Path(root), intake or Intake()
    if not root.is_dir():
        raise UserError(f"{root}: no such folder. Correct the path.")
    found: dict[str, Path] = {}
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            # A header stands for its pair.
            if name.startswith(".") or not name.lower().endswith(IMAGE_SUFFIXES) or ".img" in name.lower()[-7:]:
                continue
            path = Path(folder) / name
            id = "_".join((*path.relative_to(root).parts[:-1], stem(path)))
            if id in found:  # about no case: the one of this id is read
                intake.refuse(f"{path}: {found[id]} makes the same id, {id!r}. Rename one.", file=path)
                continue
            found[id] = path
    cases = []
    for id, path in found.items():
        patient = patient_of(id, {}, group)
        if intake.wants(id, patient):
            cases.append(Case(id, patient, {modality: path}))
    if not cases:
        raise UserError(f"{root}: holds no NIfTI file ({', '.join(IMAGE_SUFFIXES[:3])}). Correct the path.")
    return complete(root, Cohort(root.resolve().name, root, (modality,), {}, tuple(cases)), intake)


def _refused(twice: _Twice, key: tuple[str, ...], id: str, intake: Intake) -> bool:
    """Whether two files lie at `key`, which case `id` then is refused for."""
    if key not in twice:
        return False
    message, file = twice[key]
    intake.refuse(message, id, file)
    return True


def _remark_loose(
    root: Path,
    task: str,
    matched: Mapping[tuple[str, ...], Path],
    twice: _Twice,
    used: Collection[tuple[str, ...]],
    intake: Intake,
) -> None:
    """Says which masks lie at none of the places `used` by images."""
    every = {**matched, **{key: file for key, (_, file) in twice.items()}}
    if loose := [file for key, file in every.items() if key not in used]:
        intake.remark(f"{root}: {len(loose)} masks of task {task!r} belong to no image (such as {loose[0]})")


def _tell_apart(
    root: Path,
    patterns: Mapping[str, _Pattern],
    found: Mapping[str, dict[tuple[str, ...], Path]],
    masks: Mapping[str, tuple[_Pattern, dict[tuple[str, ...], Path]]],
    intake: Intake,
) -> None:
    """Removes files that images and masks both claim from the one whose pattern says less; of equals, from the image.

    Raises UserError where nothing is left of a modality or a task's masks.
    """
    taken: dict[Path, tuple[str, str]] = {}
    for modality, files in found.items():
        for task, (pattern, matched) in masks.items():
            image_first = patterns[modality].said > pattern.said
            both = {*files.values()}.intersection(matched.values())
            loser, keeper = (matched, patterns[modality]) if image_first else (files, pattern)
            for key in [key for key, file in loser.items() if file in both]:
                file = loser.pop(key)
                if not image_first:
                    taken[file] = modality, task
            if both and not loser:
                other = pattern if image_first else patterns[modality]
                raise UserError(
                    f"{root}: all files of {other.key}={other.text!r} (such as {min(both).name}) are {keeper.key}="
                    f"{keeper.text!r} too. Write the patterns so that a file is an image or a mask."
                )
    if taken:
        file = min(taken)
        modality, task = taken[file]
        intake.remark(
            f"{root}: {len(taken)} files that {patterns[modality].key}={patterns[modality].text!r} finds are masks of "
            f"task {task!r} and no images (such as {file})"
        )


class _Pattern:
    """A pattern of file names with fields in braces, relative to a root."""

    def __init__(self, key: str, text: str) -> None:
        self.key, self.text = key, text
        parts = text.removeprefix("./").split("/")
        self.said = sum(map(len, _WILD.sub("", "/".join(parts))))  # characters that a file's name has to have
        if text.startswith("/") or ".." in parts or "" in parts:
            raise UserError(
                f"config: {key}={text!r}: a pattern lies below the cohort's folder, parts divided by one '/'"
            )
        if not text.lower().endswith(IMAGE_SUFFIXES):
            raise UserError(f"config: {key}={text!r}: a pattern ends as its files do, in .nii.gz or .nii")
        self.fields: tuple[str, ...] = tuple(dict.fromkeys(_BRACES.findall(text)))
        for name in self.fields:
            if not name.isidentifier():
                raise UserError(f"config: {key}={text!r}: {{{name}}} is no name; write a word in the braces")
        if re.search(r"[}*][{*]", text):
            raise UserError(
                f"config: {key}={text!r}: put some text between two fields, else nobody knows where one ends"
            )
        self._parts = [re.compile("".join(self._loose(piece) for piece in _WILD.split(part))) for part in parts]
        seen: set[str] = set()
        self._whole = re.compile("/".join("".join(self._exact(p, seen) for p in _WILD.split(part)) for part in parts))

    @staticmethod
    def _loose(piece: str) -> str:
        return "[^/]*" if _WILD.fullmatch(piece) else re.escape(piece)

    @staticmethod
    def _exact(piece: str, seen: set[str]) -> str:
        if not _WILD.fullmatch(piece):
            return re.escape(piece)
        if piece == "*":
            return "[^/]*"
        name = piece[1:-1]
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return f"(?P<{name}>[^/]+?)"

    def find(self, root: Path, fields: Sequence[str]) -> tuple[dict[tuple[str, ...], Path], _Twice]:
        """Values of the fields, in that order, -> file; and those of several files, which are not chosen between."""
        if not root.is_dir():
            raise UserError(f"{root}: no such folder. Correct the path.")
        found: dict[tuple[str, ...], Path] = {}
        twice: _Twice = {}
        for relative in sorted(self._walk(root, "", 0)):
            if not (match := self._whole.fullmatch(relative)):
                continue
            key = tuple(match[name] for name in fields)
            if key in found:
                message = (
                    f"{root / relative}: {self.key}={self.text!r} finds this and {found[key]} for one case "
                    f"({', '.join(key)}). Write the pattern so that it finds one."
                )
                twice.setdefault(key, (message, root / relative))
                continue
            found[key] = root / relative
        if not found:
            there = sorted(str(p.relative_to(root)) for p in _first_files(root, 3))
            raise UserError(
                f"{root}: {self.key}={self.text!r} finds no file. There are: {', '.join(there) or 'no NIfTI files'}."
            )
        return {key: file for key, file in found.items() if key not in twice}, twice

    def _walk(self, folder: Path, before: str, depth: int) -> Iterator[str]:
        last = depth == len(self._parts) - 1
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise UserError(f"{folder}: cannot be read: {error.strerror}") from None
        for entry in entries:
            if entry.name.startswith(".") or not self._parts[depth].fullmatch(entry.name):
                continue
            if last:
                yield before + entry.name
            elif entry.is_dir():
                yield from self._walk(Path(entry.path), f"{before}{entry.name}/", depth + 1)


def _first_files(root: Path, count: int) -> list[Path]:
    """Some NIfTI files below a folder, for a message."""
    found: list[Path] = []
    for folder, folders, files in os.walk(root):
        folders.sort()
        found += [Path(folder) / f for f in sorted(files) if f.lower().endswith(IMAGE_SUFFIXES) and f[0] != "."][:2]
        if len(found) >= count:
            break
    return found[:count]


# -------------------------------------------------------------------------------------------------------------- BIDS


@dataclass(frozen=True)
class _BidsFile:
    """One image of a BIDS tree: where it lies and what its name says."""

    path: Path
    derived: bool  # lies in derivatives/
    entities: Mapping[str, str]
    suffix: str

    @property
    def name(self) -> str:
        """What a spec would call it: the entities after subject and session, and the suffix."""
        return "_".join([*(f"{k}-{v}" for k, v in self.entities.items() if k not in ("sub", "ses")), self.suffix])


def from_bids(
    root: str | os.PathLike[str],
    images: Mapping[str, str],
    targets: Mapping[str, str | Sequence[str]] | None = None,
    labels: Mapping[str, int] | None = None,
    group: str | None = None,
    table: Table | None = None,
    allow_missing: bool = False,
    intake: Intake | None = None,
) -> Cohort:
    """Reads a BIDS dataset (bids-specification.readthedocs.io): `sub-*/[ses-*/]anat/...` and `derivatives/`.

    Args:
      root: holds `dataset_description.json`.
      images: modality -> what its files are called after subject and session: a suffix with any entities it needs,
        such as 'T1w' or 'acq-high_T1w'; a folder before it takes the file from there:
        'derivatives/prep/desc-preproc_T1w'.
      targets: task -> the same for its masks ('desc-lesion_mask'), looked for in the whole dataset; or what `table`
        takes, with the columns of `participants.tsv`.
      labels: structure name -> value in the masks.
      group: None: the subject. Else a template of 'sub' and 'ses', a column, or a regular expression on the id.
      table: joined like `participants.tsv`, in addition to it.
      allow_missing: True lets a case lack modalities.
      intake: what to do about cases that cannot be used.

    Returns:
      The cohort: one case a subject and session ('sub-01' or 'sub-01_ses-1').

    Raises:
      UserError: no such files, two files for one case, a case that lacks a modality.
    """
    root, intake = Path(root), intake or Intake()
    files = list(_bids_files(root))
    raw = Counter(f.suffix for f in files if not f.derived)
    present = ", ".join(f"{suffix} ({n})" for suffix, n in sorted(raw.items())) or "none"
    if not images:
        raise UserError(f"{root}: name the modalities, such as data.images={{'T1': 'T1w'}}. Its images are: {present}")
    found: dict[str, dict[tuple[str, ...], Path]] = {}
    twice: dict[str, _Twice] = {}
    for modality, spec in images.items():
        found[modality], twice[modality] = _bids_find(root, files, f"data.images.{modality}", str(spec), False)
        if not found[modality] and not twice[modality]:
            raise UserError(f"{root}: data.images.{modality}={spec!r} finds no file. Its images are: {present}")
    masks: dict[str, dict[tuple[str, ...], Path]] = {}
    unclear: dict[str, _Twice] = {}
    columns: dict[str, str | Sequence[str]] = {}
    participants = root / "participants.tsv"
    rows = _bids_rows(participants) if participants.exists() else []
    in_tables = {*columns_of(rows), *(columns_of(load_rows(root / table.path)) if table and table.path else ())}
    for task, target in (targets or {}).items():
        if not isinstance(target, str) or target in in_tables or is_findings_table(target):
            columns[task] = target
            continue
        masks[task], unclear[task] = _bids_find(root, files, f"data.targets.{task}", target, True)
        if not masks[task] and not unclear[task]:
            other = sorted({f.name for f in files if f.derived})
            raise UserError(
                f"{root}: data.targets.{task}={target!r} is neither a column of participants.tsv"
                f"{nearest(target, in_tables)} nor the name of any file. In derivatives/ there are: "
                f"{', '.join(other[:10]) or 'no images'}."
            )
    templated = bool(group and FIELD.search(group))
    cases, values_of = [], {}
    places = {key for modality in images for key in (*found[modality], *twice[modality])}
    for sub, ses in sorted(places):
        case_id = f"sub-{sub}" + (f"_ses-{ses}" if ses else "")
        values = {"sub": sub, **({"ses": ses} if ses else {})}
        patient = patient_of(case_id, values, group) if templated else f"sub-{sub}"
        if not intake.wants(case_id, patient):
            continue
        if any(_refused(both, (sub, ses), case_id, intake) for both in twice.values()):
            continue
        own_images = {modality: matched[sub, ses] for modality, matched in found.items() if (sub, ses) in matched}
        if (absent := [m for m in images if m not in own_images]) and not allow_missing:
            intake.refuse(
                f"{root}: case {case_id} lacks modality {', '.join(absent)} ({images[absent[0]]}). Add the file, allow "
                f"missing modalities (data.preprocess.missing='zero'), or leave it out (data.exclude=({case_id!r},)).",
                case_id,
            )
            continue
        own: dict[str, Target] = {task: matched[sub, ses] for task, matched in masks.items() if (sub, ses) in matched}
        for both in unclear.values():
            _refused(both, (sub, ses), case_id, intake)
        cases.append(Case(case_id, patient, own_images, own, values))
        values_of[case_id] = {"participant_id": f"sub-{sub}"} | ({"session_id": f"ses-{ses}"} if ses else {}) | values
    if not cases:
        raise UserError(f"{root}: no case is complete")
    for task, matched in masks.items():
        _remark_loose(root, task, matched, unclear[task], places, intake)
    name = str((load_json(root / "dataset_description.json") or {}).get("Name", root.resolve().name))
    cohort = Cohort(name, root, tuple(images), check_labels(root, labels), tuple(cases))
    extra = table.path if table else ""
    table = replace(table or Table(), targets=columns, path="")
    tables: list[tuple[Path, Rows]] = [(participants, rows)] if rows else []
    tables += [(root / extra, load_rows(root / extra))] if extra else []
    return complete(root, join_rows(cohort, tables, table, values_of, None if templated else group, intake), intake)


def _bids_files(root: Path) -> Iterator[_BidsFile]:
    """Every NIfTI file of the raw data and the derivatives, in order of name."""

    def walk(folder: Path, derived: bool) -> Iterator[_BidsFile]:
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                continue
            if path.is_dir():
                yield from walk(path, derived)
            elif path.name.endswith((".nii.gz", ".nii")):
                *parts, suffix = stem(path).split("_")
                matches = [_ENTITY.fullmatch(part) for part in parts]
                entities = {match[1]: match[2] for match in matches if match}
                if "sub" in entities and all(matches):
                    yield _BidsFile(path, derived, entities, suffix)

    for path in sorted(root.glob("sub-*")):
        if path.is_dir():
            yield from walk(path, False)
    for path in sorted((root / "derivatives").glob("*")):
        if path.is_dir() and not path.name.startswith("."):
            yield from walk(path, True)


def _bids_find(
    root: Path, files: Iterable[_BidsFile], key: str, spec: str, everywhere: bool
) -> tuple[dict[tuple[str, ...], Path], _Twice]:
    """(subject, session or '') -> the file that a spec such as 'derivatives/x/desc-lesion_mask' names.

    And those of several files, which are not chosen between.
    """
    folder, _, tail = spec.removesuffix(".gz").removesuffix(".nii").rpartition("/")
    *parts, suffix = tail.split("_")
    entities = {}
    for part in parts:
        if not (match := _ENTITY.fullmatch(part)):
            raise UserError(f"config: {key}={spec!r}: {part!r} is no BIDS entity such as 'desc-lesion'")
        entities[match[1]] = match[2]
    found: dict[tuple[str, ...], Path] = {}
    twice: _Twice = {}
    for file in files:
        inside = f"{file.path.relative_to(root).as_posix()}".startswith(f"{folder.strip('/')}/") if folder else (
            everywhere or not file.derived
        )  # fmt: skip
        if not inside or file.suffix != suffix or any(file.entities.get(k) != v for k, v in entities.items()):
            continue
        place = file.entities["sub"], file.entities.get("ses", "")
        if place in found:
            message = (
                f"{file.path}: {key}={spec!r} finds this and {found[place]} for one case. Add the entity that tells "
                "them apart (such as 'run-1_' or 'acq-high_'), or the folder before it."
            )
            twice.setdefault(place, (message, file.path))
            continue
        found[place] = file.path
    return {place: path for place, path in found.items() if place not in twice}, twice


def _bids_rows(path: Path) -> Rows:
    """Rows of a BIDS table; 'n/a' is an empty cell."""
    return [(where, {k: "" if v == "n/a" else v for k, v in row.items()}) for where, row in load_rows(path)]
