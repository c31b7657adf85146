"""Which case is which frame of a patient: said by the table or the recipe, never guessed."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from medjax.data.cases import Case, Cohort, Intake, nearest
from medjax.data.joins import FIELD, Table, join, patient_of
from medjax.errors import UserError

_FIELD = re.compile(r"\{(\w+)(?::(\d+))?\}")

Patient = dict[str, Case]  # frame ('' where none is declared) -> case


def name_of(frame: str, text: str, case: Case) -> str:
    """The name of the case that is `frame` of the patient of `case`: `text` with the case's columns filled in.

    `{ED}` stands for the column ED as it is written, `{ED:02}` for the integer in it with at least two digits.
    """

    def fill(match: re.Match[str]) -> str:
        column, digits = match[1], match[2]
        if column not in case.attributes:
            raise UserError(
                f"config: measures.frames.{frame}='{text}': case {case.id} has no column '{column}'"
                f"{nearest(column, case.attributes)}, so which image is its {frame} is not known, and it is not "
                f"guessed. Add the column to the table (it has: {', '.join(case.attributes) or 'none'})."
            )
        value = case.attributes[column]
        if digits is None:
            return value
        if not re.fullmatch(r"\d+(\.0*)?", value):
            raise UserError(f"case {case.id}: column '{column}' is '{value}'; the number of a frame is an integer")
        return f"{int(float(value)):0{int(digits)}d}"

    return _FIELD.sub(fill, text)


def is_frame(frame: str, text: str, case: Case) -> bool:
    """Whether `case` is the frame: by its name ('{patient}_frame{ED:02}'), or by a column ('phase=ED')."""
    if "=" not in text:
        return name_of(frame, text, case) == case.id
    column, _, value = text.partition("=")
    if column not in case.attributes:
        raise UserError(
            f"config: measures.frames.{frame}='{text}': case {case.id} has no column '{column}'"
            f"{nearest(column, case.attributes)}; add it to the table"
        )
    return case.attributes[column] == value


def patients_of(cases: Sequence[Case], frames: Mapping[str, str]) -> dict[str, Patient]:
    """Patient -> frame -> case. Cases that are no frame are left out; without frames a case is its own patient.

    Raises:
      UserError: a column that is not there, a patient that lacks a frame or has two of one.
    """
    if not frames:
        return {case.id: {"": case} for case in cases}
    found: dict[str, Patient] = defaultdict(dict)
    for case in cases:
        patient = found[case.group]
        for frame, text in frames.items():
            if is_frame(frame, text, case):
                if frame in patient:
                    raise UserError(
                        f"patient {case.group}: {patient[frame].id} and {case.id} are both frame {frame} "
                        f"(measures.frames.{frame}='{text}'); correct the table or data.group"
                    )
                patient[frame] = case
    for name, patient in found.items():
        if missing := [frame for frame in frames if frame not in patient]:
            ids = ", ".join(case.id for case in cases if case.group == name)
            raise UserError(
                f"patient {name}: no case is frame {missing[0]} (measures.frames.{missing[0]}='{frames[missing[0]]}'; "
                f"there are: {ids}). Correct the table, or leave the patient out (data.exclude=('{name}',))."
            )
    return dict(found)


def describe(
    cases: Sequence[Case], frames: Mapping[str, str], group: str, id_column: str, table: Path | None
) -> list[Case]:
    """Cases known by their names alone, with patient and columns: from their names and a table.

    Args:
      group: `data.group`. id_column: `data.id`. table: its columns become attributes.

    Returns:
      Those whose name fits one of `frames`. The fields that all frames' names share say whose row of the table it is.

    Raises:
      UserError: the table cannot be read, or its rows belong to none of the cases.
    """
    texts = [text for text in frames.values() if "=" not in text]
    named = [dict(_FIELD.findall(text)) for text in texts]
    shared = [field for field in (named[0] if named else ()) if all(field in fields for fields in named)]
    known, fields = [], {}
    for case in cases:
        match = next((m for text in texts if (m := _pattern(text).fullmatch(case.id))), None)
        if match or len(texts) < len(frames) or not frames:
            fields[case.id] = {name: match[name] for name in shared} if match else {}
            patient = patient_of(case.id, fields[case.id], group if FIELD.search(group) else None)
            known.append(replace(case, group=patient, attributes=fields[case.id]))
    if not known:
        return []
    cohort = Cohort("--input", Path(), tuple(known[0].images), {}, tuple(known))
    spec = Table(str(table.resolve()) if table else "", "id" if "{" in id_column else id_column)
    return list(join(cohort, spec, fields, group or None, Intake()).cases)


def _pattern(text: str) -> re.Pattern[str]:
    """Names of cases that `text` may stand for, its fields as groups."""
    seen: set[str] = set()

    def field(name: str, digits: str) -> str:
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return f"(?P<{name}>{r'[0-9]+' if digits else '.+?'})"

    parts, end = [], 0
    for match in _FIELD.finditer(text):
        parts += [re.escape(text[end : match.start()]), field(match[1], match[2] or "")]
        end = match.end()
    return re.compile("".join(parts) + re.escape(text[end:]))
