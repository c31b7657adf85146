"""What all layouts share: joining a table to the cases, telling patients, and the checks at the end of reading."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from medjax.data.cases import Case, Cohort, Intake, nearest
from medjax.data.tables import Classes, Rows, TargetReader, columns_of, is_findings_table, load_rows
from medjax.errors import UserError

FIELD = re.compile(r"\{([A-Za-z_]\w*)\}")
"""A field of a pattern or template, such as '{patient}'; the '{3}' of a regular expression is none."""

_LISTED = 5  # offenders an error message names before it only counts
_PATIENT_FIELDS = ("patient", "subject", "sub")  # a field of this name groups cases where data.group says nothing
_GROUP_COLUMNS = ("group", "patient", "subject", "participant_id")


@dataclass(frozen=True)
class Table:
    """A table that is joined to the cases of a folder: its columns become attributes, and may be targets.

    Attributes:
      path: relative to the cohort's root; '' where there is no table.
      id: column of the case's id, where the table has no columns named as the fields of the layout.
      targets: task -> column, columns (a vector), or a table of findings.
      classes: task -> class names in order.
      findings: see `medjax.data.tables.FINDINGS`.
    """

    path: str = ""
    id: str = "id"
    targets: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    classes: Classes = field(default_factory=dict)
    findings: Mapping[str, str] = field(default_factory=dict)


class Template:
    """A text with fields in braces, filled with a case's."""

    def __init__(self, key: str, text: str, fields: Sequence[str]) -> None:
        self._text = text
        for name in FIELD.findall(text):
            if name not in fields:
                raise UserError(
                    f"config: {key}={text!r}: no field {name!r}{nearest(name, fields)} (known: {', '.join(fields)})"
                )

    def fill(self, values: Mapping[str, str]) -> str:
        return FIELD.sub(lambda match: values[match[1]], self._text)


def join(
    cohort: Cohort, table: Table | None, fields: Mapping[str, Mapping[str, str]], group: str | None, intake: Intake
) -> Cohort:
    """`join_rows` with the one table of `data.table`, where it is given."""
    table = table or Table()
    path = cohort.root / table.path
    tables = [(path, load_rows(path))] if table.path else []
    return join_rows(cohort, tables, table, fields, group, intake)


def join_rows(
    cohort: Cohort,
    tables: Sequence[tuple[Path, Rows]],
    spec: Table,
    fields: Mapping[str, Mapping[str, str]],
    group: str | None,
    intake: Intake,
) -> Cohort:
    """The cohort with the rows of tables joined: attributes, targets, and patients.

    Args:
      fields: case id -> the fields its layout gives it.
      group: see `patient_of`.
    """
    known = list(dict.fromkeys(column for _, listed in tables for column in columns_of(listed)))
    if group and FIELD.search(group) and not fields:
        raise UserError(
            f"config: data.group={group!r}: this layout has no fields; give a column or a regular expression"
        )
    if group and not FIELD.search(group) and group not in known:
        cohort = replace(cohort, cases=tuple(replace(c, group=patient_of(c.id, {}, group)) for c in cohort.cases))
    rows = {case.id: dict[str, str]() for case in cohort.cases}
    for path, listed in tables:
        _match(path, listed, spec.id, cohort, fields, rows, intake)
    path = tables[0][0] if tables else cohort.root / "table"
    named = [s for s in spec.targets.values() if not is_findings_table(s)]
    if named and not tables:
        example = named[0] if isinstance(named[0], str) else ", ".join(named[0])
        raise UserError(
            f"config: data.targets: {example!r} names a column, but there is no table. Set data.table, or write a "
            "pattern of files with fields in braces."
        )
    merged: Rows = [(f"{path}: case {id}", {**dict.fromkeys(known, ""), **row}) for id, row in rows.items()]
    reader = TargetReader(path, merged, spec.targets, spec.classes, spec.findings, spec.id, intake)
    column = group if group in known else None
    cases = []
    for case, (where, row) in zip(cohort.cases, merged, strict=True):
        patient = case.group
        if column and not (patient := row[column]):
            intake.refuse(f"{where} has no patient (column {column!r}); without it splits may leak", case.id)
            continue
        if not intake.wants(case.id, patient):
            continue
        found = reader.read(where, case.id, row)
        attributes = {k: v for k, v in row.items() if v and not reader.is_file(k, v)}
        cases.append(replace(case, group=patient, targets={**case.targets, **found},
                             attributes={**case.attributes, **attributes}))  # fmt: skip
    reader.check_tables([case.id for case in cases])
    return replace(cohort, cases=tuple(cases), classes=reader.classes)


def _match(
    path: Path,
    listed: Rows,
    id: str,
    cohort: Cohort,
    fields: Mapping[str, Mapping[str, str]],
    rows: dict[str, dict[str, str]],
    intake: Intake,
) -> None:
    """Adds to each case's row that of a table, found by the fields of the layout, by id, or by patient."""
    columns = columns_of(listed)
    names = list(dict.fromkeys(name for values in fields.values() for name in values))
    keys = tuple(name for name in names if name in columns)
    by_group = next((name for name in _GROUP_COLUMNS if name in columns), None)
    if keys:
        of = {case.id: tuple(fields[case.id].get(name, "") for name in keys) for case in cohort.cases}
    elif id in columns:
        keys, of = (id,), {case.id: (case.id,) for case in cohort.cases}
    elif by_group:
        keys, of = (by_group,), {case.id: (case.group,) for case in cohort.cases}
    else:
        raise UserError(
            f"{path}: no column tells whose row it is: {', '.join([*names, id, *_GROUP_COLUMNS])} were looked for, "
            f"there are {', '.join(columns) or 'none'}. Name the column of the ids in data.id."
        )
    table: dict[tuple[str, ...], dict[str, str]] = {}
    for where, row in listed:
        key = tuple(row.get(name, "") for name in keys)
        if key in table:
            raise UserError(f"{where}: {', '.join(key)} (column {', '.join(keys)}) is listed twice. Give one row each.")
        table[key] = {k: v for k, v in row.items() if v}
    without = [id for id, key in of.items() if key not in table]
    if len(without) == len(of):
        example = next(iter(table), ("no rows",))
        raise UserError(
            f"{path}: none of its rows belongs to a case: column {', '.join(keys)} holds {', '.join(example)!r}, cases "
            f"have {', '.join(of[without[0]]) if without else 'none'!r}. Make them agree."
        )
    if without:
        intake.remark(f"{path}: {len(without)} cases have no row (such as {without[0]}); they lack its columns")
    here = set(of.values())
    if strange := [key for key in table if key not in here and intake.wants(*key)]:
        intake.remark(f"{path}: {len(strange)} rows belong to no case (such as {', '.join(strange[0])})")
    for case_id, key in of.items():
        rows[case_id].update(table.get(key, {}))


def patient_of(id: str, fields: Mapping[str, str], group: str | None) -> str:
    """The patient of a case.

    Args:
      group: a template of the fields, a regular expression whose first group is searched in the id, or None: the field
        that is named as patients are, else the id.
    """
    if not group:
        return next((fields[name] for name in _PATIENT_FIELDS if name in fields), id)
    if FIELD.search(group):
        return Template("data.group", group, tuple(fields)).fill(fields)
    try:
        match = re.search(group, id)
    except re.error as error:
        raise UserError(f"config: data.group={group!r} is no regular expression ({error})") from None
    if not match or not match.groups():
        raise UserError(f"config: data.group: the group pattern {group!r} finds no patient in the id {id!r}")
    return match.group(1)


def check_labels(path: Path, labels: Mapping[str, int] | None) -> dict[str, int]:
    """Structure name -> value without the background.

    Raises UserError for a value that is no integer from 0 on, or that two structures have.
    """
    for structure, value in (labels or {}).items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise UserError(f"{path}: label {structure!r} must be an integer from 1 on, not {value!r}")
    found = {k: v for k, v in (labels or {}).items() if v != 0}
    names: dict[int, str] = {}
    for name, value in found.items():
        if (other := names.setdefault(value, name)) != name:
            raise UserError(
                f"{path}: labels {other!r} and {name!r} both have the value {value}; a value has one name (what "
                "several values make up, such as a whole tumour, is a region of the task)"
            )
    return found


def complete(where: Path, cohort: Cohort, intake: Intake) -> Cohort:
    """The cohort after the checks every layout shares: unique ids, files that exist, names left out that are there."""
    cases = tuple(case for case in cohort.cases if intake.wants(case.id, case.group))
    check_unique(where, cases)
    absent = [(case.id, file) for case in cases for file in all_files(case) if not _exists(file)]
    if absent and not intake.tolerant:
        listed = ", ".join(f"{file} (case {id})" for id, file in absent[:_LISTED])
        more = f" and {len(absent) - _LISTED} more" if len(absent) > _LISTED else ""
        raise UserError(f"{where}: missing file {listed}{more}. Correct the paths or fetch the files.")
    for id, file in absent:
        intake.refuse(f"{file}: no such file. Correct the path or fetch the file.", id, file)
    gone = {file for _, file in absent}
    if gone:
        cases = tuple(
            replace(case, targets={t: v for t, v in case.targets.items() if not (isinstance(v, Path) and v in gone)})
            for case in cases
            if not gone.intersection(case.images.values())
        )
    if not cases:
        raise UserError(f"{where}: no case is left" + (" that can be used" if intake.problems else ""))
    intake.check_excluded(cohort)
    ids = {case.id for case in cases}
    splits = None
    if cohort.splits is not None:  # without those that were left out
        splits = {name: tuple(id for id in listed if id in ids) for name, listed in cohort.splits.items()}
    return replace(cohort, cases=cases, splits=splits, left_out=frozenset(intake.left_out - ids))


def _exists(file: Path) -> bool:
    try:
        return file.exists()
    except OSError as error:  # a folder that may not be entered, a name too long
        raise UserError(f"{file}: cannot be read: {error.strerror}. Correct the path or its permissions.") from None


def check_unique(where: Path, cases: Sequence[Case]) -> None:
    """Raises UserError for an id that two cases have, or that leads out of the folder of predictions."""
    if bad := next((case.id for case in cases if case.id[:1] == "/" or {".", ".."} & {*case.id.split("/")}), None):
        raise UserError(
            f"{where}: the id {bad!r} leads out of the folder that predictions are written to. Give cases ids such as "
            f"{Path(bad).name!r}."
        )
    if twice := [id for id, n in Counter(case.id for case in cases).items() if n > 1]:
        raise UserError(
            f"{where}: the id {twice[0]!r} appears more than once ({len(twice)} such ids). Make ids unique."
        )


def all_files(case: Case) -> list[Path]:
    return [*dict.fromkeys(case.images.values()), *(t for t in case.targets.values() if isinstance(t, Path))]
