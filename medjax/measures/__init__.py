"""Measures: quantities of patients from the masks of their images, beside the same from the reference masks.

`config.measures` names frames (which image of a patient is end-diastole), formulas over the masks
(`medjax.measures.formulas`) and, where wanted, a diagnosis learnt from the training patients' reference masks
(`medjax.measures.diagnosis`). Evaluation writes `measures.csv`, `measures.png` and what both amount to into
`summary.json`; `measures.json` in the run folder holds all that prediction needs. docs/measures.md shows it at work.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medjax import processes
from medjax.config import difference
from medjax.data import cohort as cohorts
from medjax.data import dataset, nifti
from medjax.errors import UserError, warn_once, write_atomic
from medjax.logging import say
from medjax.measures import diagnosis, frames
from medjax.measures.formulas import SLICED, Call, Formulas, Value, measure
from medjax.metrics import regression, stats, walls
from medjax.predict import write_table

FILE = "measures.json"
_SAMPLE = 8  # digests of training images in it, by which the run's cohort is known again wherever it lies

_STATISTICS: dict[str, Callable[[Mapping[str, np.ndarray]], float]] = {
    "mae": lambda t: regression.mean_absolute_error(t["predicted"], t["reference"]),
    "bias": lambda t: regression.bland_altman(t["predicted"], t["reference"]).bias,
    "limit_low": lambda t: regression.bland_altman(t["predicted"], t["reference"]).low,
    "limit_high": lambda t: regression.bland_altman(t["predicted"], t["reference"]).high,
}


@dataclass(frozen=True)
class Measures:
    """What is measured: `config.measures` bound to the task whose masks it is about.

    Attributes:
      frames: frame -> name of its case (`medjax.measures.frames`). report: measures that are summed up, in order.
      column: of the diagnosis; '': none. features: measures it is made from. shrinkage: see `diagnosis.fit`.
      group, id: `data.group` and `data.id`, by which new patients are known.
    """

    task: Any
    frames: Mapping[str, str]
    texts: Mapping[str, str]
    formulas: Formulas
    report: tuple[str, ...]
    column: str
    features: tuple[str, ...]
    shrinkage: float
    group: str
    id: str

    def masks(self, decoded: np.ndarray, like: np.ndarray | None = None) -> Callable[[str], np.ndarray]:
        """Label -> bool [x, y, z] of a mask as `task.decode` gives it.

        Args:
          like: the reference mask: where it has the value `ignore` there is nothing.
        """
        ignore = getattr(self.task, "ignore", -1)
        kept = True if like is None or ignore < 0 else like != ignore
        names = list(self.task.classes)

        def mask_of(label: str) -> np.ndarray:
            if decoded.ndim == 4:
                return decoded[..., names.index(label)] & kept
            return np.isin(decoded, self.task.classes[label]) & kept

        return mask_of

    def of_case(self, case: cohorts.Case, frame: str) -> dict[Any, Value]:
        """What is measured of a case's reference mask, on the file's own grid."""
        mask = nifti.read_label(str(case.targets[self.task.name]))
        self.check_slices(case.id, frame, mask.spacing)
        return measure(self.formulas.calls, frame, self.masks(mask.data, mask.data), mask.spacing, mask.voxel_volume)

    @property
    def sliced(self) -> tuple[Call, ...]:
        """What formulas measure slice by slice."""
        return tuple(call for call in self.formulas.calls if call.function in SLICED)

    def check_slices(self, case: str, frame: str, spacing: Sequence[float]) -> None:
        """Raises UserError where a formula measures the frame slice by slice and the voxels have no slices."""
        if not (wanted := {c.function: None for c in self.sliced if c.frame == frame}):
            return
        try:
            walls.slice_axis(spacing)
        except UserError as error:
            raise UserError(
                f"config: measures.formulas: {', '.join(wanted)}: case {case}: {error}, or leave the case out "
                "(data.exclude)"
            ) from None

    def attributes(self, patient: Mapping[str, cohorts.Case]) -> dict[Any, float]:
        """The numbers that formulas take from the columns of a patient, in the row of any frame.

        What is absent, or another number in another frame's row, is noted and left out.
        """
        found = {}
        for call in self.formulas.calls:
            if call.function != "attribute":
                continue
            said = {c.id: text for c in patient.values() if (text := c.attributes.get(call.names[0], ""))}
            numbers = {number: id for id, text in said.items() if (number := _number_in(text)) is not None}
            if len(numbers) == 1:
                (found[call],) = numbers
                continue
            text = next(iter(said.values()), "")
            what = f"'{text}', which is no number" if text else "empty"
            if numbers:
                what = " and ".join(f"{number:g} (case {id})" for number, id in numbers.items())
            cases = ", ".join(case.id for case in patient.values())
            warn_once(f"case {cases}: column '{call.names[0]}' is {what}: measures that need it are undefined")
        return found

    def to_json(self) -> dict[str, Any]:
        """What `from_json` needs."""
        return {
            "task": self.task.name,
            "group": self.group,
            "id": self.id,
            "frames": dict(self.frames),
            "formulas": dict(self.texts),
            "report": list(self.report),
            "diagnosis": {"column": self.column, "measures": list(self.features), "shrinkage": self.shrinkage},
        }


def build(config: Mapping[str, Any], data: Mapping[str, Any], tasks: Mapping[str, Any]) -> Measures | None:
    """The measures of `config.measures`; None where it has no formulas.

    Args:
      config: `config.measures`. data: `config.data`, of which the keys group and id are read. tasks: of the run.

    Raises:
      UserError: a task that has no masks, a formula that cannot be read, a name nobody knows.
    """
    if not config.get("formulas"):
        return None
    dense = {name: task for name, task in tasks.items() if task.kind == "dense" and hasattr(task, "classes")}
    name = config["task"] or (next(iter(dense)) if len(dense) == 1 else "")
    if name not in dense:
        raise UserError(
            f"config: measures.task='{config['task']}': name the task whose masks are measured "
            f"({', '.join(dense) or 'this run has none'})"
        )
    formulas = Formulas(config["formulas"], dense[name].classes, config["frames"])
    chosen, wanted = tuple(config["report"]), config["diagnosis"]
    for key, names in (("report", chosen), ("diagnosis.measures", wanted["measures"])):
        cohorts.check_keys(f"config: measures.{key}", names, tuple(config["formulas"]))
    if wanted["column"] and not wanted["measures"]:
        raise UserError("config: measures.diagnosis.measures is empty; name the measures the diagnosis is made from")
    if not 0 <= wanted["shrinkage"] <= 1:
        raise UserError(f"config: measures.diagnosis.shrinkage={wanted['shrinkage']} must be from 0 to 1")
    return Measures(
        dense[name],
        dict(config["frames"]),
        dict(config["formulas"]),
        formulas,
        chosen or tuple(config["formulas"]),
        wanted["column"],
        tuple(wanted["measures"]),
        float(wanted["shrinkage"]),
        data["group"],
        data["id"],
    )


def check(config: Mapping[str, Any], data: Mapping[str, Any], tasks: Mapping[str, Any], splits: cohorts.Splits) -> None:
    """Raises before training what would spoil the evaluation after it: formulas, frames, columns, slices.

    Of the images only headers are read, and those only where something is measured slice by slice.
    """
    if not (measures := build(config, data, tasks)):
        return
    for name, cases in splits.items():
        for patient, of in frames.patients_of(cases, measures.frames).items():
            if measures.column and name == "train":
                _class(patient, of, measures.column)
            for frame, case in of.items() if measures.sliced else ():
                file = case.targets.get(measures.task.name) or next(iter(case.images.values()))
                affine = nifti.read_grid(str(file))[1]
                measures.check_slices(case.id, frame, np.linalg.norm(affine[:3, :3], axis=0).tolist())
    known = dict.fromkeys(column for cases in splits.values() for case in cases for column in case.attributes)
    for call in measures.formulas.calls:
        if call.function == "attribute" and call.names[0] not in known:
            raise UserError(
                f"config: measures.formulas: attribute({call.names[0]}): the table has no such column (there are: "
                f"{', '.join(known) or 'none'})"
            )


def _number_in(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _class(patient: str, of: frames.Patient, column: str) -> str:
    found = {case.attributes.get(column, "") for case in of.values()}
    if len(found) != 1 or not (name := found.pop()):
        raise UserError(
            f"config: measures.diagnosis.column='{column}': patient {patient} has "
            f"{'no such column' if not found or found == {''} else 'several of it'}; give each training patient one"
        )
    return name


class Gauge:
    """Measures the patients of one split, or new ones, as their cases come by.

    Args:
      measures: what; None: nothing, and every call does nothing. rule: the diagnosis, where there is one.
      cases: all that will come. about: what else is known about the rule, for the summary.
    """

    def __init__(
        self,
        measures: Measures | None,
        cases: Sequence[cohorts.Case],
        rule: diagnosis.Diagnosis | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self._measures, self._rule, self._about = measures, rule, about or {}
        self._patients = frames.patients_of(cases, measures.frames) if measures else {}
        self._frame = {case.id: (name, frame) for name, of in self._patients.items() for frame, case in of.items()}
        self._found: dict[str, dict[str, dict[Any, Value]]] = {"predicted": {}, "reference": {}}
        self._seen: set[tuple[str, str]] = set()

    def predicted(
        self,
        task: str,
        case: str,
        decoded: np.ndarray,
        spacing: Sequence[float],
        like: np.ndarray | None = None,
        voxel: float | None = None,
    ) -> None:
        """Takes in what the network says of a case, on the file's own grid.

        Args:
          like: the reference mask, where there is one: what it says nothing of (`ignore`) is not measured either.
          voxel: mm³ of a voxel (`formulas.measure`).
        """
        self._take("predicted", task, case, decoded, like, spacing, voxel)

    def reference(
        self, task: str, case: str, mask: np.ndarray, spacing: Sequence[float], voxel: float | None = None
    ) -> None:
        """Takes in a case's reference mask."""
        self._take("reference", task, case, mask, mask, spacing, voxel)

    def _take(
        self,
        kind: str,
        task: str,
        case: str,
        mask: np.ndarray,
        like: np.ndarray | None,
        spacing: Sequence[float],
        voxel: float | None,
    ) -> None:
        if not (m := self._measures) or task != m.task.name or case not in self._frame:
            return
        patient, frame = self._frame[case]
        of = self._found[kind].setdefault(patient, m.attributes(self._patients[patient]))
        calls = m.formulas.calls
        try:
            m.check_slices(case, frame, spacing)
        except UserError as error:
            warn_once(f"{error}. What needs its slices is undefined")
            calls = tuple(call for call in calls if call not in m.sliced)
        of |= measure(calls, frame, m.masks(mask, like), spacing, voxel)
        self._seen.add((kind, case))

    def gather(self, split: str) -> None:
        """Takes in what the other processes measured; each has had cases of its own."""
        if not self._measures or processes.count() == 1:
            return
        for found, seen in processes.gather(f"measures of {split}", (self._found, self._seen)):
            self._seen |= seen
            for kind, patients in found.items():
                for name, values in patients.items():
                    self._found[kind].setdefault(name, {}).update(values)

    def table(self, kind: str = "predicted") -> dict[str, dict[str, float]]:
        """Patient -> measures, of those all of whose frames were seen."""
        if not (m := self._measures):
            return {}
        whole = {n for n, of in self._patients.items() if all((kind, c.id) in self._seen for c in of.values())}
        return {name: m.formulas(of) for name, of in self._found[kind].items() if name in whole}

    def diagnoses(self, kind: str = "predicted") -> list[dict[str, Any]]:
        """Rows of patients: what is called, and the probability of each class by the rule."""
        rows: list[dict[str, Any]] = []
        if not (rule := self._rule):
            return rows
        for patient, values in self.table(kind).items():
            found = rule.probabilities(values) or {}
            odds = {f"p_{name}": value for name, value in found.items()}
            rows.append({"patient": patient, "diagnosis": rule(values), **odds})
        return rows

    def write(self, folder: Path) -> list[str]:
        """Writes what was measured of new patients, `measures.csv` and `diagnosis.csv`; returns their names."""
        table = self.table()
        if not table:
            return []
        write_table([{"patient": patient, **values} for patient, values in table.items()], folder / "measures.csv")
        if not (rows := self.diagnoses()):
            return ["measures.csv"]
        write_table(rows, folder / "diagnosis.csv")
        return ["measures.csv", "diagnosis.csv"]

    def finish(self, folder: Path, title: str, *, pictures: bool = True) -> dict[str, Any]:
        """Writes the split's measures beside the reference's, draws them, and sums them up.

        What is undefined in a prediction and not in the reference counts as that one of 0 and the cohort's references
        which is farthest from the truth. Of a measure that can be undefined no prediction counts as farther off than
        that, to its own side: one voxel of a structure is no worse than none. So to miss a structure is never better
        than to find it anyhow, and never worse than to find it worse. Measures that the reference does not define do
        not count.

        Returns:
          The summary's entries 'measures' and 'diagnosis'; none where nothing was measured.
        """
        predicted, reference = self.table("predicted"), self.table("reference")
        if not (m := self._measures) or not predicted:
            return {}
        rows: list[dict[str, Any]] = []
        lines: list[dict[str, Any]] = []
        known = {key: [0.0, *(v for of in reference.values() if not np.isnan(v := of[key]))] for key in m.texts}
        for name, values in predicted.items():
            group = next(iter(self._patients[name].values())).group
            for key, a in values.items():
                b, missed = reference.get(name, {}).get(key, math.nan), int(np.isnan(a))
                counted = _counted(a, b, known[key], key in m.formulas.partial)
                both = {"reference": b, "predicted": a, "difference": counted - b}
                lines.append({"patient": name, "measure": key, **both})
                if not np.isnan(b):
                    about = {"class": key, "case": name, "group": group, "missed": missed}
                    rows.append({**both, **about, "predicted": counted, "capped": int(not missed and counted != a)})
        write_table(lines, folder / "measures.csv")
        found = stats.summarize_cohort(rows, _STATISTICS, m.report)
        summary: dict[str, Any] = {"measures": {}}
        for key in m.report:
            of = {statistic: found[statistic]["per_class"][key] for statistic in _STATISTICS}
            summary["measures"][key] = {
                **{statistic: {"value": v["mean"], "ci95": v["ci95"]} for statistic, v in of.items()},
                "n": of["mae"]["n"],
                "undefined": sum(row["missed"] for row in rows if row["class"] == key),
                "capped": sum(row["capped"] for row in rows if row["class"] == key),
            }
        pairs = {k: [(r["predicted"], r["reference"]) for r in rows if r["class"] == k] for k in m.report}
        if pictures and any(pairs.values()):
            from medjax.pictures import agreement

            agreement({k: v for k, v in pairs.items() if v}, folder / "measures.png", title=title)
        if self._rule:
            summary["diagnosis"] = self._judge(list(predicted), folder)
        return summary

    def _judge(self, patients: Sequence[str], folder: Path) -> dict[str, Any]:
        """Writes the calls beside the truth; accuracy of those who have one. No call is a wrong one."""
        m = self._measures
        assert m is not None
        truth = {
            name: next((t for c in self._patients[name].values() if (t := c.attributes.get(m.column))), "")
            for name in patients
        }
        calls, right = ({row["patient"]: row for row in self.diagnoses(kind)} for kind in ("predicted", "reference"))
        rows = [
            {
                "patient": name,
                "reference": truth[name],
                "from_reference_masks": right.get(name, {}).get("diagnosis", ""),
                **{k: v for k, v in calls[name].items() if k != "patient"},
            }
            for name in patients
        ]
        write_table(rows, folder / "diagnosis.csv")
        judged = [row for row in rows if row["reference"]]
        if not judged:
            return {}
        hits = np.array([float(row["diagnosis"] == row["reference"]) for row in judged])
        groups = [next(iter(self._patients[row["patient"]].values())).group for row in judged]
        order = {group: number for number, group in enumerate(dict.fromkeys(groups))}
        numbers = [order[group] for group in groups]
        right_of, count_of = np.bincount(numbers, hits), np.bincount(numbers)

        def accuracy(drawn: np.ndarray, axis: int) -> np.ndarray:
            """Of resampled patients, with all scans of each."""
            index = drawn.astype(np.intp)
            return right_of[index].sum(axis=axis) / count_of[index].sum(axis=axis)

        ideal = [row["from_reference_masks"] == row["reference"] for row in judged if row["patient"] in right]
        ci = stats.bootstrap_ci(np.arange(len(count_of)), statistic=accuracy)
        confusion: dict[str, dict[str, int]] = {}
        for row in judged:
            of, call = confusion.setdefault(row["reference"], {}), row["diagnosis"] or "none"
            of[call] = of.get(call, 0) + 1
        return {
            "accuracy": {"value": float(np.mean(hits)), "ci95": list(ci)},
            "n": len(judged),
            "on_reference_masks": float(np.mean(ideal)) if ideal else None,
            "confusion": confusion,
            **self._about,
        }


def _counted(value: float, truth: float, known: Sequence[float], partial: bool) -> float:
    """What a predicted value counts as: see `Gauge.finish`.

    Args:
      known: 0 and the cohort's references. partial: whether a prediction may leave the measure undefined.
    """
    farthest = max(known, key=lambda one: abs(one - truth))
    if np.isnan(value):
        return farthest
    most = abs(farthest - truth)
    # Where every reference is 0 there is no scale to cap by.
    return truth + math.copysign(most, value - truth) if partial and 0 < most < abs(value - truth) else value


def fit(
    measures: Measures, cases: Sequence[cohorts.Case], workers: int = 0
) -> tuple[diagnosis.Diagnosis, dict[str, Any]]:
    """The diagnosis learnt from the reference masks of the training patients.

    Patients one of whose images is the very same (`medjax.data.cohort.content_hash`) stay together in the
    cross-validation, and so do the scans of a patient where no frames are declared.

    Returns:
      The rule, and what its cross-validation on those patients says: each is called by the rule of all the others.
    """
    patients = frames.patients_of(cases, measures.frames)
    labelled = {n: of for n, of in patients.items() if all(measures.task.name in c.targets for c in of.values())}
    if not labelled:
        raise UserError(f"measures.diagnosis: no training patient has all masks of task '{measures.task.name}'")
    listed = [(case, frame) for of in labelled.values() for frame, case in of.items()]
    frame_of = {case.id: frame for case, frame in listed}
    found = dataset.each(lambda c: measures.of_case(c, frame_of[c.id]), [case for case, _ in listed], workers, None)
    values: dict[str, dict[Any, Value]] = {}
    for (case, _), one in zip(listed, found, strict=True):
        name = case.group if measures.frames else case.id
        values.setdefault(name, measures.attributes(labelled[name])).update(one)
    rows = [measures.formulas(values[name]) for name in labelled]
    truths = [_class(name, of, measures.column) for name, of in labelled.items()]

    def rule(rows: Sequence[Mapping[str, float]], truths: Sequence[str]) -> diagnosis.Diagnosis:
        return diagnosis.fit(rows, truths, measures.features, measures.shrinkage)

    fitted = rule(rows, truths)
    called = diagnosis.cross_validate(rows, truths, _twins(labelled), rule)
    wrong = {n: {"is": t, "called": c} for n, t, c in zip(labelled, truths, called, strict=True) if t != c}
    return fitted, {
        "cross_validation": {"accuracy": 1 - len(wrong) / len(called), "n": len(called), "wrong": wrong},
    }


def _twins(patients: Mapping[str, frames.Patient]) -> list[int]:
    """A number for each entry of `patients`, the same for those that are of one patient or share an image."""
    number = {name: i for i, name in enumerate(patients)}
    files = [(name, file) for name, of in patients.items() for case in of.values() for file in case.images.values()]
    shared = zip(files, cohorts.content_hashes(file for _, file in files), strict=True)
    marks = [(name, ("patient", case.group)) for name, of in patients.items() for case in of.values()]
    marks += [(name, ("image", digest)) for (name, _), digest in shared]
    owner: dict[tuple[str, str], str] = {}
    for name, mark in marks:
        old, new = number[name], number[owner.setdefault(mark, name)]
        number = {patient: new if value == old else value for patient, value in number.items()}
    return list(number.values())


def learn(config: Any, tasks: Mapping[str, Any], train: Sequence[cohorts.Case], workdir: Path) -> dict[str, Any]:
    """Learns the diagnosis from the training cases' reference masks and writes `measures.json` into the run folder.

    Returns:
      What the file holds; empty where nothing is measured.
    """
    if not (measures := build(config.measures, config.data, tasks)):
        return {}
    labelled = [case for case in train if measures.task.name in case.targets]
    table = measures.to_json() | {"images": _images(labelled)[:_SAMPLE]}
    if measures.column:
        rule, about = fit(measures, train, config.data.workers)
        table["diagnosis"] |= {"fitted": rule.to_json(), **about}
        checked = about["cross_validation"]
        say(
            f"diagnosis   from the reference masks of {checked['n']} training patients, cross-validated accuracy "
            f"{checked['accuracy']:.3f}"
        )
    if processes.primary():
        write_atomic(workdir / FILE, json.dumps(table, indent=2) + "\n")
    return table


def of_splits(
    config: Any, tasks: Mapping[str, Any], splits: cohorts.Splits, workdir: Path, trained: Any
) -> Callable[[Sequence[cohorts.Case]], Gauge]:
    """What makes the gauge of a split's cases.

    The rule is the run's own, from its `measures.json`: another cohort is judged by it, teaches nothing, and may name
    its frames otherwise. Where there is none, or the run's own cohort is measured otherwise by now, it is learnt from
    the training cases at hand, and the file is written anew for the patients to come.

    Args:
      trained: `config.data` as the run was trained.

    Raises:
      UserError: no training cases to learn from; another cohort, and a diagnosis that the run has not learnt.
    """
    if not (measures := build(config.measures, config.data, tasks)):
        return lambda cases: Gauge(None, cases)
    content = read(workdir)
    own = not content or _own(content, trained, config.data, splits)
    named = _as_written(measures, content, ("frames", "group", "id"))
    if not own and not _fits(measures, content):
        if measures.column:
            raise UserError(
                f"{workdir / FILE}: is of other measures (formulas, or config: measures.diagnosis), and "
                f"'{config.data.cohort}' is not the run's own cohort, so the diagnosis is not learnt from it. Evaluate "
                "the run's own cohort with them first, or set measures.diagnosis.column=''."
            )
        return lambda cases: Gauge(measures, cases)
    if not own and not named:
        say(
            f"measures    {workdir / FILE} keeps the frames of the run's own cohort, by which new patients are known; "
            f"those given now are taken to be of '{config.data.cohort}' alone"
        )
    if own and not (named and _fits(measures, content)):
        if measures.column and "train" not in splits:
            raise UserError(
                f"{workdir / FILE}: not there, or of other measures or frames, and the cohort has no 'train' split to "
                "learn the diagnosis from. Evaluate with the measures of the run, or set measures.diagnosis.column=''."
            )
        content = learn(config, tasks, splits.get("train", ()), workdir)
    found = content["diagnosis"]
    rule = diagnosis.Diagnosis.from_json(found["fitted"]) if measures.column else None
    return lambda cases: Gauge(measures, cases, rule, {k: v for k, v in found.items() if k == "cross_validation"})


def read(folder: Path) -> dict[str, Any]:
    """The `measures.json` of a run folder; empty where there is none. UserError where it cannot be read."""
    try:
        return json.loads((folder / FILE).read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / FILE}: cannot be read ({error}); delete it and evaluate the run again") from None


def _fits(measures: Measures, found: Mapping[str, Any]) -> bool:
    """Whether what a run folder holds was learnt by these formulas for this diagnosis; `report` has no part in it."""
    old, same = found.get("diagnosis", {}), _as_written(measures, found, ("task", "formulas"))
    return same and all(old.get(key) == value for key, value in measures.to_json()["diagnosis"].items())


def _as_written(measures: Measures, found: Mapping[str, Any], keys: Sequence[str]) -> bool:
    wanted = measures.to_json()
    return all(found.get(key) == wanted[key] for key in keys)


def _own(content: Mapping[str, Any], trained: Any, data: Any, splits: cohorts.Splits) -> bool:
    """Whether a cohort is the one the run was trained on: by its name, or where it has moved by an image of it."""
    if trained.cohort == data.cohort and not difference(trained.options, data.options):
        return True
    known = content.get("images", ())
    return bool(known) and not set(known).isdisjoint(_images([case for cases in splits.values() for case in cases]))


def _images(cases: Sequence[cohorts.Case]) -> list[str]:
    """Digests of the cases' images in an order of their own, without those that hold one value only."""
    digests = cohorts.content_hashes(file for case in cases for file in case.images.values())
    return sorted({digest for digest in digests if not digest.startswith(cohorts._BLANK)})


def of_run(folder: Path, tasks: Mapping[str, Any], cases: Sequence[cohorts.Case], table: Path | None) -> Gauge:
    """The gauge of a trained run for new cases, from its `measures.json`; it measures nothing where there is none.

    Patients that lack a frame, and cases whose name is no frame's, are noted and not measured.

    Args:
      table: columns of the patients, where frames or formulas need them.
    """
    if not (content := read(folder)):
        if table:
            raise UserError(
                f"{folder / FILE}: no such file: the run measures nothing, so --table has no use. A run whose config "
                "has measures writes it when it is trained or evaluated."
            )
        return Gauge(None, cases)
    data = {"group": content["group"], "id": content["id"]}
    measures = build(content, data, tasks)
    assert measures is not None
    known = frames.describe(cases, measures.frames, measures.group, measures.id, table)
    whole: list[cohorts.Case] = []
    refused: list[str] = []
    for patient in dict.fromkeys(case.group for case in known):
        own = [case for case in known if case.group == patient]
        try:
            frames.patients_of(own, measures.frames)
            whole += own
        except UserError as error:
            refused.append(str(error))
    if left := [case.id for case in cases if case.id not in {one.id for one in known}]:
        named = " nor ".join(f"'{text}'" for text in measures.frames.values())
        warn_once(f"{len(left)} case(s) are not measured: their names ({left[0]}...) fit neither {named}")
    if refused:
        warn_once(f"{len(refused)} patient(s) are not measured: {refused[0]}" + (" ..." if len(refused) > 1 else ""))
    fitted = content["diagnosis"].get("fitted")
    return Gauge(measures, whole, diagnosis.Diagnosis.from_json(fitted) if fitted else None)


def say_summary(summary: Mapping[str, Any], folder: Path) -> None:
    """The measures at the terminal."""
    if not (measures := summary.get("measures")):
        return
    say(f"  measures: mean absolute error with 95 % interval, bias, limits of agreement ({folder / 'measures.csv'})")
    width = max(map(len, measures))
    for name, of in measures.items():
        low, high = of["limit_low"]["value"], of["limit_high"]["value"]
        limits = "-" if low is None or high is None else f"{low:.2f} .. {high:.2f}"
        how = "undefined, counted as far off as any reference or 0"
        missed = f"  ({of['undefined']} of {of['n']} {how})" if of["undefined"] else ""
        capped = f"  ({of['capped']} of {of['n']} counted as no farther off than if undefined)" if of["capped"] else ""
        say(f"  {name:{width}}  {_number(of['mae'])}  {_plain(of['bias']['value'])}  {limits}{missed}{capped}")
    if of := summary.get("diagnosis"):
        checked = of.get("cross_validation")
        more = f", cross-validated on {checked['n']} training patients {checked['accuracy']:.3f}" if checked else ""
        say(
            f"  diagnosis: accuracy {_number(of['accuracy'])} of {of['n']} patients (from the reference masks "
            f"{_plain(of['on_reference_masks'])}{more})"
        )


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _number(of: Mapping[str, Any]) -> str:
    low, high = of["ci95"]
    return f"{_plain(of['value'])} [{_plain(low)}, {_plain(high)}]"
