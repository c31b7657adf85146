"""What a cohort is made of: cases, their targets, and the findings marked in them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medjax.errors import UserError, warn_once


@dataclass(frozen=True)
class Finding:
    """Something marked at a place: a nodule's box, a landmark.

    Attributes:
      center: world millimetres, RAS+.
      size: full extents in mm along the world axes; zeros for a point.
      label: class, from 1 on.
      attributes: numbers known about it (a rating, a score).
    """

    center: tuple[float, float, float]
    size: tuple[float, float, float] = (0.0, 0.0, 0.0)
    label: int = 1
    attributes: Mapping[str, float] = field(default_factory=dict)


Target = Path | int | float | tuple[float, ...] | tuple[Finding, ...]
"""A mask file, a class index, a number, a vector (NaN: unknown entry), or findings (none: looked, and found none)."""


@dataclass(frozen=True)
class Case:
    """One example.

    Attributes:
      id: unique in the cohort.
      group: the patient; splits never cut through a group.
      images: modality -> file. Modalities that share one file are its channels, in this order.
      targets: task -> target; a case may lack some.
      attributes: anything else that is known (site, scanner, age...), as text.
    """

    id: str
    group: str
    images: Mapping[str, Path]
    targets: Mapping[str, Target] = field(default_factory=dict)
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """Something wrong or odd about a cohort.

    Attributes:
      severity: 'error' (the case cannot be used as it is), 'warning' (it can, but look) or 'note'.
      message: what is wrong, and the cure.
      case: its id; '' where it concerns no single one.
      file: the file it is about, where there is one.
    """

    severity: str
    message: str
    case: str = ""
    file: str = ""


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
      classes: task -> class names in order, where the source names classes in words; for a vector, its columns.
      regions: region name -> mask values it covers, where the source is labelled in regions (nnU-Net); else empty.
      ignore: mask value of voxels nobody labelled (nnU-Net's ignore label); it is not among `labels`.
      left_out: ids of cases that were left out on purpose; a split file may still name them.
      extra: cases without targets that are trained on, whatever the splits (`data.extra`).
      skipped: what is wrong with the cases that `data.skip_unreadable` left out.
    """

    name: str
    root: Path
    modalities: tuple[str, ...]
    labels: Mapping[str, int]
    cases: tuple[Case, ...]
    splits: Mapping[str, tuple[str, ...]] | None = None
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ignore: int | None = None
    left_out: frozenset[str] = frozenset()
    extra: tuple[Case, ...] = ()
    skipped: tuple[Problem, ...] = ()

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


class Intake:
    """What a reader does about single cases.

    Args:
      exclude: ids or patients to leave out, before anything about them is checked.
      tolerant: note what is wrong in `problems` and go on without that case or target; else the first raises.
    """

    def __init__(self, exclude: Iterable[str] = (), tolerant: bool = False) -> None:
        self.problems: list[Problem] = []
        self.left_out: set[str] = set()
        self.tolerant = tolerant
        self.beside = ""  # how names of `exclude` begin that may be another reader's; see `rest`
        self._exclude = frozenset(str(name) for name in exclude)
        self._met: set[str] = set()

    def wants(self, id: str, *names: str) -> bool:
        """Whether a case of that id (and patient) is to be read."""
        if met := self._exclude.intersection((id, *names)):
            self._met |= met
            self.left_out.add(id)
        return not met

    def refuse(self, message: str, case: str = "", file: str | Path = "") -> None:
        """Raises UserError, or notes an error where tolerant."""
        if not self.tolerant:
            raise UserError(message)
        self.problems.append(Problem("error", message, case, str(file)))
        self.left_out.add(case)

    def remark(self, message: str, case: str = "") -> None:
        """Says an oddity once, or notes a warning where tolerant."""
        if self.tolerant:
            self.problems.append(Problem("warning", message, case))
        else:
            warn_once(message)

    def rest(self) -> Intake:
        """The like for cases whose ids will begin with `beside`: of the names that begin so those not met yet."""
        names = (name for name in self._exclude - self._met if name.startswith(self.beside))
        return Intake((name.removeprefix(self.beside) for name in names), self.tolerant)

    def check_excluded(self, cohort: Cohort) -> None:
        """Raises UserError for a name to leave out that no case has."""
        for name in sorted(self._exclude - self._met):
            if self.beside and name.startswith(self.beside):
                continue
            known = [*(c.id for c in cohort.cases), *(c.group for c in cohort.cases)]
            raise UserError(
                f"config: data.exclude: {cohort.name} has no case or patient {name!r}{nearest(name, known)}"
            )
