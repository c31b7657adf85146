"""Tables about cases: rows of CSV, TSV and JSON files, and the targets their cells hold."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medjax.data.cases import Finding, Intake, Target, check_keys, nearest
from medjax.errors import UserError

IMAGE_SUFFIXES = (".nii.gz", ".nii", ".hdr", ".img", ".hdr.gz", ".img.gz")
TABLE_SUFFIXES = (".csv", ".tsv", ".json")

FINDINGS: dict[str, str] = {"id": "", "coordinates": "RAS", "unlisted": "unknown"}
"""How findings are written. id: column of the case in a table of findings ('': as in the cohort's own table).
coordinates: 'RAS' or 'LPS' (ITK, DICOM, LUNA16) world millimetres. unlisted: a case that the table does not name is
'unknown' (it has no target) or has 'none' (it was looked at, and nothing was found)."""

_INTEGER = re.compile(r"[+-]?\d+")
_SHOWN = 12  # class names an error message lists
# Names that a place goes by in tables of findings; coordX... and diameter_mm are LUNA16's.
_AXES = (("x", "coordX"), ("y", "coordY"), ("z", "coordZ"))
_SIZES = ("dx", "dy", "dz")
_DIAMETERS = ("diameter", "diameter_mm")

Rows = list[tuple[str, dict[str, str]]]
Classes = Mapping[str, Mapping[str, int] | Sequence[str]]


def stem(path: Path) -> str:
    """A file's name without the ending of an image."""
    ending = next((suffix for suffix in IMAGE_SUFFIXES if path.name.lower().endswith(suffix)), path.suffix)
    return path.name[: len(path.name) - len(ending)]


def load_json(path: Path) -> Any:
    """The content of a JSON file; UserError naming it where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Correct the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON ({error}). Correct the file.") from None


def load_rows(path: Path) -> Rows:
    """Rows of a CSV (comma, semicolon or tab) or JSON table as (place for messages, column -> stripped text).

    Lists and tables within a JSON record become JSON text.
    """
    if path.suffix.lower() == ".json":
        table = load_json(path)
        if not isinstance(table, list) or not all(isinstance(row, dict) for row in table):
            raise UserError(f"{path}: must hold a JSON list of records, one a case")
        return [(f"{path}: record {i}", {str(k): _text(v) for k, v in row.items()}) for i, row in enumerate(table, 1)]
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Correct the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}). Save it as UTF-8.") from None
    # Whole, not by lines: a quoted cell may hold a line's end, and some characters end a line for Python alone.
    first = next((line for line in text.splitlines() if line.strip()), "")
    if not first:
        raise UserError(f"{path}: empty. Give a header line and one line a case.")
    # Strict: a quote that is never closed would take the rest of the file for one cell.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first.count), strict=True)
    try:
        lines = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise UserError(
            f"{path}: line {reader.line_num}: {error}. Correct the line; long lists fit into JSON."
        ) from None
    if not lines:  # separators alone
        raise UserError(f"{path}: empty. Give a header line and one line a case.")
    header = [cell.strip() for cell in lines[0][1]]
    # Spreadsheets write columns that were emptied as commas at the end.
    while header and not header[-1] and all(len(c) == len(header) and not c[-1].strip() for _, c in lines):
        header.pop()
        lines = [(number, cells[:-1]) for number, cells in lines]
    if twice := [column for column, n in Counter(header).items() if n > 1]:
        raise UserError(f"{path}: the column {twice[0]!r} appears twice. Rename one.")
    rows = []
    for number, cells in lines[1:]:
        where = f"{path}: line {number}"
        if len(cells) != len(header):
            raise UserError(f"{where}: {len(cells)} cells where the header has {len(header)}. Quote text with commas.")
        rows.append((where, dict(zip(header, (cell.strip() for cell in cells), strict=True))))
    return rows


def _text(value: Any) -> str:
    if value is None:
        return ""
    return json.dumps(value) if isinstance(value, list | dict) else str(value).strip()


def columns_of(rows: Rows) -> list[str]:
    """The columns that any row has, in order."""
    return list(dict.fromkeys(column for _, row in rows for column in row))


def check_columns(path: Path, rows: Rows, wanted: Sequence[str]) -> None:
    """Raises UserError for the first wanted column that is not there, with the nearest one that is."""
    columns = columns_of(rows)
    for column in dict.fromkeys(wanted):
        if column not in columns:
            raise UserError(
                f"{path}: no column {column!r}{nearest(column, columns)} (there are: {', '.join(columns) or 'none'})"
            )


def is_findings_table(spec: Any) -> bool:
    """Whether a target's spec names a table of findings rather than a column."""
    return isinstance(spec, str) and spec.lower().endswith((".csv", ".tsv"))


class TargetReader:
    """Reads the targets of cases from the rows of a table.

    Args:
      path: the table; relative file names start from its folder.
      rows: its rows.
      targets: task -> a column, several columns (a vector), or a table of findings ('nodules.csv').
      classes: task -> class names in order (or name -> index), for columns of text and labels of findings; for a
        vector, what its entries are called.
      findings: see `FINDINGS`.
      id: column of the case's id, for tables of findings that do not say otherwise.
      intake: what to do about a target that cannot be read.
    """

    def __init__(
        self,
        path: Path,
        rows: Rows,
        targets: Mapping[str, str | Sequence[str]],
        classes: Classes | None = None,
        findings: Mapping[str, str] | None = None,
        id: str = "id",
        intake: Intake | None = None,
    ) -> None:
        self._path, self._rows, self._intake = path, rows, intake or Intake()
        self._targets = {
            task: spec if isinstance(spec, str) else tuple(str(c) for c in spec) for task, spec in targets.items()
        }
        classes = dict(classes or {})
        check_keys(f"{path}: classes", classes, tuple(targets))
        self._index = {task: _class_index(path, task, names) for task, names in classes.items()}
        self._options = findings_options(findings or {})
        check_columns(path, rows, self.columns)
        for task, spec in self._targets.items():
            if isinstance(spec, tuple) and (not spec or len(self._index.get(task, spec)) != len(spec)):
                raise UserError(f"{path}: task {task!r}: {len(spec)} columns, but its classes name another number")
        self._tables = {
            task: read_findings_table(path.parent / str(spec), self._options, id, self._index.get(task))
            for task, spec in self._targets.items()
            if is_findings_table(spec)
        }

    @property
    def columns(self) -> list[str]:
        """The columns of the table that targets are read from."""
        named = [s for s in self._targets.values() if not is_findings_table(s)]
        return [column for spec in named for column in ((spec,) if isinstance(spec, str) else spec)]

    def is_file(self, column: str, cell: str) -> bool:
        """Whether a cell is a target's file or list, and so nothing that cases are grouped by."""
        return column in self.columns and (cell.startswith("[") or cell.lower().endswith(IMAGE_SUFFIXES))

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        """Task -> names of its classes or of its vector's entries, for `Cohort.classes`."""
        vectors = {task: spec for task, spec in self._targets.items() if isinstance(spec, tuple)}
        return vectors | {task: tuple(index) for task, index in self._index.items()}

    def read(self, where: str, id: str, row: Mapping[str, str]) -> dict[str, Target]:
        """The targets of case `id`, whose row this is; a task whose cell is empty is left out."""
        found: dict[str, Target] = {}
        for task, spec in self._targets.items():
            value: Target | None
            try:
                if task in self._tables:
                    value = self._tables[task].get(id, () if self._options["unlisted"] == "none" else None)
                elif isinstance(spec, tuple):
                    value = self._vector(where, task, [(column, row.get(column, "")) for column in spec])
                else:
                    cell = row.get(spec, "")
                    value = self._cell(where, task, spec, cell) if cell else None
            except UserError as error:
                self._intake.refuse(str(error), id)
                continue
            if value is not None:
                found[task] = value
        return found

    def check_tables(self, known: Sequence[str]) -> None:
        """Says what the tables of findings and the cohort do not agree on; `known` are the ids of its cases."""
        for task, table in self._tables.items():
            file, here = self._path.parent / str(self._targets[task]), set(known)
            if strange := [id for id in table if id not in here and self._intake.wants(id)]:
                self._intake.remark(
                    f"{file}: {len(strange)} of its {len(table)} cases are not in the cohort (such as {strange[0]!r})"
                )
            if known and len(strange) == len(table):
                self._intake.refuse(
                    f"{file}: none of its ids is a case of the cohort: {strange[0] if strange else 'it has no rows'!r} "
                    f"against {known[0]!r}. Use the cohort's ids, or name the right column in data.findings.id."
                )
            missing = [id for id in known if id not in table]
            if missing and self._options["unlisted"] == "unknown":
                self._intake.remark(
                    f"{file}: {len(missing)} cases (such as {missing[0]!r}) have no row and so no target for task "
                    f"{task!r}. If they were looked at and hold nothing, set data.findings.unlisted='none'."
                )

    def _cell(self, where: str, task: str, column: str, cell: str) -> Target:
        if cell.startswith("["):
            return self._list(where, task, column, cell)
        if (index := self._index.get(task)) is not None:
            if cell not in index:
                raise UserError(
                    f"{where}: {cell!r} is no class of task {task!r}{nearest(cell, index)} (known: {', '.join(index)})"
                )
            return index[cell]
        if cell.lower().endswith(IMAGE_SUFFIXES):
            return self._path.parent / Path(cell).expanduser()
        try:
            number = float(cell)
        except ValueError:
            raise UserError(
                f"{where}: {cell!r} (column {column!r}, task {task!r}) is neither a NIfTI file nor a number. For "
                f"classes named in words declare them: data.classes={{{task!r}: {self._names(column)}}}."
            ) from None
        if not math.isfinite(number):
            raise UserError(
                f"{where}: {cell!r} (column {column!r}) is no finite number; leave the cell empty if unknown"
            )
        return int(cell) if _INTEGER.fullmatch(cell) else number

    def _names(self, column: str) -> str:
        """The different cells of a column, as one would declare them."""
        names = sorted({row.get(column, "") for _, row in self._rows} - {""})
        return f"({', '.join(map(repr, names[:_SHOWN]))}{', ...' if len(names) > _SHOWN else ','})"

    def _list(self, where: str, task: str, column: str, cell: str) -> Target:
        try:
            entries = json.loads(cell)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where}: column {column!r}, task {task!r}: not valid JSON ({error}); write a list of numbers or of "
                'findings, such as [{"center": [1, 2, 3], "diameter": 8}]'
            ) from None
        if entries and all(entry is None or _is_number(entry) for entry in entries):
            return tuple(math.nan if entry is None else float(entry) for entry in entries)
        return parse_findings(
            f"{where}: column {column!r}, task {task!r}", entries, self._options["coordinates"], self._index.get(task)
        )

    def _vector(self, where: str, task: str, cells: Sequence[tuple[str, str]]) -> tuple[float, ...] | None:
        if not any(cell for _, cell in cells):
            return None
        values = []
        for column, cell in cells:
            try:
                value = float(cell) if cell else math.nan
            except ValueError:
                raise UserError(
                    f"{where}: {cell!r} (column {column!r}, task {task!r}) is no number; a vector holds numbers. "
                    "Write 0 and 1 for yes and no, and leave the cell empty if unknown."
                ) from None
            if cell and not math.isfinite(value):
                raise UserError(
                    f"{where}: {cell!r} (column {column!r}) is no finite number; leave the cell empty if unknown"
                )
            values.append(value)
        return tuple(values)


def _class_index(path: Path, task: str, names: Mapping[str, int] | Sequence[str]) -> dict[str, int]:
    if isinstance(names, str):
        raise UserError(f"{path}: data.classes.{task}={names!r} must list the class names, such as ('no', 'yes')")
    index = (
        {str(k): int(v) for k, v in sorted(names.items(), key=lambda item: item[1])}
        if isinstance(names, Mapping)
        else {str(name): i for i, name in enumerate(names)}
    )
    if sorted(index.values()) != list(range(len(names))) or not index:
        raise UserError(f"{path}: data.classes.{task}: give every class one name, numbered from 0 without gaps")
    return index


# --------------------------------------------------------------------------------------------------------- findings


def findings_options(given: Mapping[str, str]) -> dict[str, str]:
    """`FINDINGS` with what is given; UserError for a key or value nobody knows."""
    check_keys("config: data.findings", given, tuple(FINDINGS))
    options = {**FINDINGS, **given}
    for key, known in (("coordinates", ("RAS", "LPS")), ("unlisted", ("unknown", "none"))):
        if options[key] not in known:
            raise UserError(f"config: data.findings.{key}={options[key]!r} is not known; use {' or '.join(known)}")
    return options


def parse_findings(
    where: str, entries: Any, coordinates: str = "RAS", classes: Mapping[str, int] | None = None
) -> tuple[Finding, ...]:
    """Findings from the records of a JSON list.

    Args:
      where: for messages.
      entries: each with 'center' [3] and optionally 'size' [3] or 'diameter', or with 'box' [6] (lower, then upper
        corner); 'label' is a number from 1 on or a name of `classes`. All lengths in mm. Other numbers become
        attributes.
      coordinates: 'RAS' or 'LPS', of places.
    """
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{where}: must be a JSON list of findings, each a table such as {{'center': [1, 2, 3]}}")
    return tuple(_finding(f"{where}, finding {i}", e, coordinates, classes) for i, e in enumerate(entries, 1))


def _finding(where: str, entry: Mapping[str, Any], coordinates: str, classes: Mapping[str, int] | None) -> Finding:
    if ("box" in entry) == ("center" in entry) or ("size" in entry and "diameter" in entry):
        raise UserError(f"{where}: give either 'box', or 'center' with 'size' or 'diameter' (mm)")
    if "box" in entry:
        if "size" in entry or "diameter" in entry:
            raise UserError(f"{where}: a 'box' has its size; leave out 'size' and 'diameter'")
        box = _numbers(where, "box", entry["box"], 6)
        if any(low > high for low, high in zip(box[:3], box[3:], strict=True)):
            raise UserError(f"{where}: box {box}: the lower corner (x, y, z) comes first, then the upper one")
        center = [(low + high) / 2 for low, high in zip(box[:3], box[3:], strict=True)]
        size = [high - low for low, high in zip(box[:3], box[3:], strict=True)]
    else:
        center = _numbers(where, "center", entry["center"], 3)
        if "diameter" in entry:
            size = _numbers(where, "diameter", [entry["diameter"]] * 3, 3)
        else:
            size = _numbers(where, "size", entry.get("size", [0, 0, 0]), 3)
    if any(n < 0 for n in size):
        raise UserError(f"{where}: size {size} is negative; give full extents in mm (0: a point)")
    if coordinates == "LPS":
        center = [-center[0], -center[1], center[2]]
    rest = {k: v for k, v in entry.items() if k not in ("box", "center", "size", "diameter", "label")}
    for key, value in rest.items():
        if not _is_number(value):
            raise UserError(f"{where}: {key}={value!r} is no number; a finding's attributes are numbers")
    attributes = {key: float(value) for key, value in rest.items()}
    label = _label(where, entry.get("label", 1), classes)
    return Finding((center[0], center[1], center[2]), (size[0], size[1], size[2]), label, attributes)


def _label(where: str, value: Any, classes: Mapping[str, int] | None) -> int:
    if classes is not None and str(value) in classes:
        return classes[str(value)] + 1
    text = str(value)
    if not _INTEGER.fullmatch(text) or int(text) < 1 or (classes is not None and int(text) > len(classes)):
        known = f" or one of {', '.join(classes)}" if classes else " (or declare names in data.classes)"
        raise UserError(f"{where}: label {value!r} must be an integer from 1 on{known}")
    return int(text)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(where: str, key: str, value: Any, count: int) -> list[float]:
    if not isinstance(value, list) or len(value) != count or not all(_is_number(v) for v in value):
        raise UserError(f"{where}: {key!r} must be {count} finite numbers (mm), not {value!r}")
    return [float(v) for v in value]


def read_findings_table(
    path: Path, options: Mapping[str, str], id: str = "id", classes: Mapping[str, int] | None = None
) -> dict[str, tuple[Finding, ...]]:
    """A table with one row a finding.

    Args:
      path: columns: the case's id; x, y, z (or coordX...) in world mm; dx, dy, dz or diameter (or diameter_mm) in mm,
        without them points; label. A row without a place says that its case was looked at and holds nothing.
        Other columns of numbers become attributes.
      options: see `FINDINGS`.
      id: column of the id where `options` names none.

    Returns:
      id -> its findings.
    """
    rows = load_rows(path)
    columns = columns_of(rows)
    id = options["id"] or id
    axes = [next((name for name in names if name in columns), names[0]) for names in _AXES]
    check_columns(path, rows, [id, *axes])
    diameter = next((name for name in _DIAMETERS if name in columns), None)
    sizes = [name for name in _SIZES if name in columns]
    if len(sizes) not in (0, 3) or (sizes and diameter):
        raise UserError(f"{path}: give the columns dx, dy and dz, or diameter, or neither (points)")
    own = {id, *axes, *sizes, *([diameter] if diameter else []), "label"}
    found: dict[str, list[Finding]] = defaultdict(list)
    for where, row in rows:
        if not row[id]:
            raise UserError(f"{where}: the id (column {id!r}) is empty")
        listed = found[row[id]]
        if not any(row[name] for name in axes):
            continue
        entry: dict[str, Any] = {"center": [_number(where, name, row[name]) for name in axes]}
        if sizes:
            entry["size"] = [_number(where, name, row[name]) for name in sizes]
        if diameter:
            entry["diameter"] = _number(where, diameter, row[diameter])
        if row.get("label"):
            entry["label"] = row["label"]
        for name, cell in row.items():
            if name not in own and cell and _as_float(cell) is not None:
                entry[name] = _as_float(cell)
        listed.append(_finding(where, entry, options["coordinates"], classes))
    return {case: tuple(listed) for case, listed in found.items()}


def _as_float(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _number(where: str, column: str, cell: str) -> float:
    if (value := _as_float(cell)) is None:
        raise UserError(f"{where}: {cell!r} (column {column!r}) must be a finite number in mm")
    return value
