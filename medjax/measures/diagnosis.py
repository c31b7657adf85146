"""A diagnosis from measures: linear discriminant analysis, small enough to be read in its JSON.

Measures are standardised over the training patients. Classes are Gaussians of their own means and one covariance, the
pooled one within the classes, shrunk towards its diagonal, S = (1 - a) S + a diag(S) (Friedman, JASA 1989; a = 1 is the
naive Bayes rule). All classes are taken to be equally frequent. Then log odds are linear in the measures, and a call
can be followed by hand: score = intercept + sum of weight · (value - mean) / sd, the highest is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medjax.errors import UserError

Row = Mapping[str, float]


@dataclass(frozen=True)
class Diagnosis:
    """A fitted rule. `intercepts` [K], `weights` [K, M], of M standardised `measures` and K `classes`."""

    measures: tuple[str, ...]
    classes: tuple[str, ...]
    mean: np.ndarray
    sd: np.ndarray
    intercepts: np.ndarray
    weights: np.ndarray

    def probabilities(self, row: Row) -> dict[str, float] | None:
        """Class -> probability by the rule; None where a measure is undefined."""
        x = np.array([row.get(name, math.nan) for name in self.measures])
        if not np.isfinite(x).all():
            return None
        scores = self.intercepts + self.weights @ ((x - self.mean) / self.sd)
        odds = np.exp(scores - scores.max())
        return dict(zip(self.classes, (odds / odds.sum()).tolist(), strict=True))

    def __call__(self, row: Row) -> str:
        """The class called; '' where a measure is undefined."""
        found = self.probabilities(row)
        return max(found, key=found.__getitem__) if found else ""

    def to_json(self) -> dict[str, Any]:
        """As a plain table."""
        of = lambda values: dict(zip(self.measures, map(float, values), strict=True))  # noqa: E731
        return {
            "rule": "score = intercept + sum of weight * (value - mean) / sd; the class of the highest score is called",
            "mean": of(self.mean),
            "sd": of(self.sd),
            "classes": {
                name: {"intercept": float(intercept), "weights": of(weights)}
                for name, intercept, weights in zip(self.classes, self.intercepts, self.weights, strict=True)
            },
        }

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Diagnosis:
        names, classes = tuple(table["mean"]), table["classes"]
        rows = [[values["weights"][name] for name in names] for values in classes.values()]
        return cls(
            names,
            tuple(classes),
            np.array([table["mean"][name] for name in names]),
            np.array([table["sd"][name] for name in names]),
            np.array([values["intercept"] for values in classes.values()]),
            np.array(rows),
        )


def fit(rows: Sequence[Row], truths: Sequence[str], measures: Sequence[str], shrinkage: float) -> Diagnosis:
    """The rule of these patients.

    Args:
      rows: measures of each patient; patients with an undefined one are left out. truths: their classes.
      shrinkage: a, 0 to 1.

    Raises:
      UserError: a measure that none or all alike have, a class of fewer than two patients.
    """
    x = np.array([[row[name] for name in measures] for row in rows], np.float64).reshape(len(rows), len(measures))
    y = np.array(truths)
    for name, column in zip(measures, x.T, strict=True):
        values = column[np.isfinite(column)]
        if not len(values) or not np.ptp(values) > 0:
            what = "the same of" if len(values) else "undefined in"
            raise UserError(
                f"config: measures.diagnosis.measures: '{name}' is {what} every training patient; leave it out, or "
                "correct its formula"
            )
    kept = np.isfinite(x).all(axis=1)
    classes = tuple(sorted(set(truths)))
    for name in classes:
        if (n := int((kept & (y == name)).sum())) < 2:
            raise UserError(
                f"measures.diagnosis: {n} training patient(s) of class '{name}' with all measures; two are the least "
                "to learn from. Add patients, or leave out those of this class (data.exclude)."
            )
    x, y = x[kept], y[kept]
    mean, sd = x.mean(axis=0), x.std(axis=0)
    z = (x - mean) / sd
    means = np.stack([z[y == name].mean(axis=0) for name in classes])
    within = z - means[[classes.index(name) for name in y]]
    covariance = within.T @ within / max(len(y) - len(classes), 1)
    covariance = (1 - shrinkage) * covariance + shrinkage * np.diag(np.diag(covariance))
    # A measure that is constant within every class would decide alone; a thousandth of its spread is the least.
    covariance += 1e-3 * np.eye(len(measures))
    weights = np.linalg.solve(covariance, means.T).T
    return Diagnosis(tuple(measures), classes, mean, sd, -0.5 * (weights * means).sum(axis=1), weights)


def cross_validate(
    rows: Sequence[Row],
    truths: Sequence[str],
    twins: Sequence[int],
    fit_to: Callable[[list[Row], list[str]], Diagnosis],
) -> list[str]:
    """What each patient would be called by the rule of the others ('' where none can be fitted).

    Args:
      twins: number of the group of each patient; one is called by those of other groups alone.
    """
    called = []
    for row, twin in zip(rows, twins, strict=True):
        others = [i for i, other in enumerate(twins) if other != twin]
        try:
            called.append(fit_to([rows[i] for i in others], [truths[i] for i in others])(row))
        except UserError:  # the last but one patient of a class
            called.append("")
    return called
