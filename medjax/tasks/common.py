"""What several tasks share."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from medjax.errors import UserError

Kind = Literal["dense", "findings", "case", "pretext"]
Activation = Literal["softmax", "sigmoid", "identity", ""]
Odd = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


class Defaults:
    """Answers most tasks give."""

    name: str

    @property
    def width(self) -> int:
        return 0

    @property
    def odd(self) -> Odd:
        return (), (), ()

    @property
    def activation(self) -> Activation:
        return ""

    def check_target(self, one: Any) -> None:
        pass  # masks are checked where they are read

    def reference(self, value: np.ndarray, geometry: Any = None) -> Any:
        return value

    def table(self, decoded: Any) -> list[dict[str, Any]]:
        return []

    def where(self, key: str) -> str:
        """The beginning of a message about one of the task's options."""
        return f"config: tasks.{self.name}.{key}"

    def one_of(self, key: str, choices: Sequence[str]) -> None:
        """Raises UserError unless the option `key` is one of `choices`."""
        value = getattr(self, key)
        if value not in choices:
            raise UserError(f"{self.where(key)}='{value}' is not known; known: {', '.join(choices)}")

    def from_to(self, key: str, low: float, below: float = math.inf) -> None:
        """Raises UserError unless the option `key` is a number from `low` on and below `below`."""
        if not is_number(value := getattr(self, key)) or not low <= value < below:
            limit = "" if below == math.inf else f" and below {below:g}"
            raise UserError(f"{self.where(key)}={value}: needs a number from {low:g} on{limit}")

    def share(self, key: str) -> None:
        """Raises UserError unless the option `key` is a number from 0 to 1."""
        if not is_number(value := getattr(self, key)) or not 0 <= value <= 1:
            raise UserError(f"{self.where(key)}={value}: needs a number from 0 to 1")

    def count(self, key: str, least: int) -> None:
        """Raises UserError unless the option `key` is a whole number from `least` on."""
        if not is_number(value := getattr(self, key)) or value % 1 or not least <= value < math.inf:
            raise UserError(f"{self.where(key)}={value}: needs a whole number from {least} on")

    def check_pooled(self) -> None:
        """Checks the options of `medjax.models.heads.PooledHead`."""
        self.count("levels", 0)
        self.count("hidden", 0)
        self.from_to("dropout", 0, 1)

    def acts(self, key: str, acts: object, where: str) -> None:
        """Raises UserError where the option `key` is set, to another value than its default, and does nothing.

        Args:
          acts: whether it does something. where: says when it would.
        """
        default = next(f.default for f in dataclasses.fields(self) if f.name == key)  # type: ignore[arg-type]
        if not acts and (value := getattr(self, key)) != default:
            raise UserError(f"{self.where(key)}={value!r} does nothing here, for it acts {where} alone: leave it out")


@dataclasses.dataclass(frozen=True)
class Found:
    """A finding as a user reads it.

    Attributes:
      label: its class.
      score: 0 to 1.
      center: world millimetres, RAS+ (x to the right, y to the front, z up).
      size: full extents along the world's axes, mm.
      attributes: what else the network says of it: a number, or a probability.
    """

    label: str
    score: float
    center: tuple[float, float, float]
    size: tuple[float, float, float]
    attributes: Mapping[str, float]

    def row(self) -> dict[str, Any]:
        """As one flat row."""
        places = zip(("x_mm", "y_mm", "z_mm"), self.center, strict=True)
        sizes = zip(("size_x_mm", "size_y_mm", "size_z_mm"), self.size, strict=True)
        return {"class": self.label, "score": self.score, **dict(places), **dict(sizes), **self.attributes}


def is_number(value: object) -> bool:
    """Whether it is a real number (nan is one, True is none)."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_names(task: str, names: Sequence[str], least: int) -> None:
    """Raises UserError for names that are too few, repeated or no texts."""
    if len(names) < least or len(set(names)) < len(names) or not all(isinstance(n, str) and n for n in names):
        raise UserError(
            f"config: tasks.{task}.names={tuple(names)}: needs {least} or more different names, in the order of the "
            "target's values"
        )


def moved(names: Sequence[str], declared: Sequence[str]) -> list[str]:
    """Those of `names` that stand at another place in `declared`: answers would get each other's names.

    Names of another wording ('no stroke' for 'no') say nothing; capitals do not count.
    """
    order = [str(name).casefold() for name in declared]
    return [
        name for i, name in enumerate(names) if (word := str(name).casefold()) in order and order[i : i + 1] != [word]
    ]


def first_metric(summary: Mapping[str, Any], *metrics: str) -> float | None:
    """The mean of the first of these metrics that is defined."""
    return next((m for name in metrics if (m := summary.get(name, {}).get("mean")) is not None), None)
