"""Classification of whole cases: two classes, several, several answers at once, or ordered classes."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from medjax.errors import UserError, warn_once
from medjax.losses import classification as losses
from medjax.losses import weighting
from medjax.metrics import classification as metrics
from medjax.metrics import stats
from medjax.models.heads import POOLS, PooledHead
from medjax.tasks.common import Activation, Defaults, Kind, check_names, first_metric

PROBLEMS = ("binary", "multiclass", "multilabel", "ordinal")


@dataclass(frozen=True)
class Classification(Defaults):
    """One answer, or several, a case.

    Attributes:
      name: the task's name; also the target's key in a case.
      names: of the classes, in the order of the target's values from 0; of the answers for 'multilabel'.
      problem: 'binary' (names: negative, positive), 'multiclass', 'multilabel' (target: one 0 or 1 a name, NaN
        unknown), or 'ordinal' (names in rising order).
      weight: of this task among several.
      levels, pool, hidden, dropout: of the head (`medjax.models.heads.PooledHead`).
      coral: ordinal classes share their weights and differ by a bias (CORAL); False: each threshold has its own.
      smoothing: of the labels. gamma: of the focal loss; 0: cross-entropy. Neither for 'ordinal'.
      balance: class weights from the training cases: 'none', 'inverse', 'sqrt' or 'effective'; for 'binary' and
        'multilabel' it is positives against negatives. class_weights: those weights; learnt unless given.
      temperature: logits are divided by it (`calibrate`).
      threshold: probability from which an answer of 'binary' or 'multilabel' is called positive.
      specificity: at which a sensitivity is reported.
    """

    name: str
    names: Sequence[str] = ()
    problem: str = "multiclass"
    weight: float = 1.0
    levels: int = 0
    pool: str = "mean"
    hidden: int = 0
    dropout: float = 0.0
    coral: bool = True
    smoothing: float = 0.0
    gamma: float = 0.0
    balance: str = "none"
    class_weights: Sequence[float] = ()
    temperature: float = 1.0
    threshold: float = 0.5
    specificity: float = 0.9

    def __post_init__(self) -> None:
        self.one_of("problem", PROBLEMS)
        self.one_of("pool", POOLS)
        self.one_of("balance", weighting.CLASS_WEIGHTS)
        check_names(self.name, self.names, 1 if self.problem == "multilabel" else 2)
        if self.problem == "binary" and len(self.names) != 2:
            raise UserError(f"{self.where('names')}: a binary answer has two, negative and positive")
        if self.class_weights and len(self.class_weights) != self._weighted:
            raise UserError(f"{self.where('class_weights')} needs {self._weighted} numbers")
        self.from_to("smoothing", 0, 1)
        self.from_to("gamma", 0)
        for key in ("threshold", "specificity"):
            self.share(key)
        self.check_pooled()
        if any(not 0 <= w < math.inf for w in self.class_weights):
            raise UserError(f"{self.where('class_weights')}={tuple(self.class_weights)}: weights are from 0 on")
        for key in ("smoothing", "gamma"):
            self.acts(key, self.problem != "ordinal", "where problem is not 'ordinal'")
        self.acts("coral", self.problem == "ordinal", "where problem is 'ordinal'")
        self.acts("threshold", self.problem in ("binary", "multilabel"), "where problem is 'binary' or 'multilabel'")
        if not self.temperature > 0:
            raise UserError(f"{self.where('temperature')}={self.temperature} must be above 0")

    @property
    def _weighted(self) -> int:
        return 1 if self.problem == "binary" else len(self.names)

    @property
    def kind(self) -> Kind:
        return "case"

    @property
    def activation(self) -> Activation:
        return "softmax" if self.problem == "multiclass" else "sigmoid"

    @property
    def targets(self) -> tuple[str, ...]:
        return ("vector",) if self.problem == "multilabel" else ("class",)

    @property
    def width(self) -> int:
        return len(self.names) if self.problem == "multilabel" else 0

    @property
    def outputs(self) -> int:
        return {"binary": 1, "ordinal": len(self.names) - 1}.get(self.problem, len(self.names))

    @property
    def answers(self) -> tuple[str, ...]:
        """What is scored one against the rest: the positive class of two, else all names."""
        return (self.names[1],) if self.problem == "binary" else tuple(self.names)

    def head(self) -> nn.Module:
        shared = self.problem == "ordinal" and self.coral
        return PooledHead(self.outputs, self.levels, self.pool, self.hidden, self.dropout, shared)

    def fit(self, known: Sequence[Any]) -> dict[str, Any]:
        """Checks the classes; learns class weights where `balance` asks for them."""
        for one in known:
            self.check_target(one)
        counts = self._count_answers(known) if self.problem == "multilabel" else self._count_classes(known)
        if self.balance == "none" or self.class_weights:
            return {}
        if self.problem in ("binary", "multilabel"):
            # A weight of positives against negatives, which weigh 1.
            pairs = [weighting.class_weights(pair, self.balance) for pair in counts]
            return {"class_weights": tuple(float(p / n) for n, p in pairs)}
        return {"class_weights": tuple(float(w) for w in weighting.class_weights(counts, self.balance))}

    def check_target(self, one: Any) -> None:
        values = np.asarray(one.value)
        if self.problem == "multilabel":
            if values.shape != (len(self.names),) or not np.isin(values[~np.isnan(values)], (0, 1)).all():
                raise UserError(
                    f"task '{self.name}': case {one.case} has {values.tolist()}; it takes {len(self.names)} numbers "
                    f"({', '.join(self.names)}), each 0, 1 or NaN (unknown)"
                )
        elif values.ndim or values % 1 or not 0 <= int(values) < len(self.names):
            raise UserError(
                f"task '{self.name}': case {one.case} is of class {values}; the task has 0 to {len(self.names) - 1} "
                f"({', '.join(self.names)}). Correct the target or tasks.{self.name}.names."
            )

    def _count_classes(self, known: Sequence[Any]) -> np.ndarray:
        """Cases of each class, [K]; for 'binary' [1, 2]."""
        seen = Counter(int(one.value) for one in known)
        missing = [name for i, name in enumerate(self.names) if not seen[i]]
        if len(seen) < 2:
            raise UserError(
                f"task '{self.name}': every training case is '{self.names[next(iter(seen))]}', so there is nothing to "
                "learn. Add cases of other classes, divide the cases otherwise, or leave the task out."
            )
        if missing:
            warn_once(
                f"task '{self.name}': no training case is {', '.join(missing)}; the network can learn nothing of it"
            )
        counts = np.array([seen[i] for i in range(len(self.names))], np.float64)
        return counts[None] if self.problem == "binary" else counts

    def _count_answers(self, known: Sequence[Any]) -> np.ndarray:
        """Negatives and positives of each answer, [K, 2]."""
        values = np.stack([one.value for one in known])
        counts = np.stack([(values == 0).sum(axis=0), (values == 1).sum(axis=0)], axis=1).astype(np.float64)
        for name, (negative, positive) in zip(self.names, counts, strict=True):
            if not negative + positive:
                raise UserError(f"task '{self.name}': '{name}' is unknown in every training case; leave it out")
            if not negative or not positive:
                only = "positive" if positive else "negative"
                warn_once(f"task '{self.name}': every training case is {only} for '{name}'")
        return counts

    def prepare(self, key: Array, batch: dict[str, Array]) -> dict[str, Array]:
        return batch

    def loss(self, outputs: Sequence[Array], batch: Mapping[str, Array]) -> Array:
        logits, target = outputs[0], batch[f"{self.name}/target"]
        weights = jnp.asarray(self.class_weights) if self.class_weights else None
        soft = {"smoothing": self.smoothing, "gamma": self.gamma}
        if self.problem == "ordinal":
            return losses.ordinal(logits, target, class_weights=weights)
        if self.problem == "multiclass":
            return losses.cross_entropy(logits, target, class_weights=weights, **soft)
        if self.problem == "binary":
            target = jnp.where(target >= 0, target.astype(jnp.float32), jnp.nan)[:, None]
        return losses.binary_cross_entropy(logits, target, positive_weights=weights, **soft)

    def probabilities(self, outputs: Array) -> Array:
        """Logits -> a probability a name, [..., K]; for 'binary' of both."""
        logits = outputs / self.temperature
        if self.problem == "ordinal":
            return losses.ordinal_probabilities(logits)
        if self.problem == "multiclass":
            return jax.nn.softmax(logits, axis=-1)
        if self.problem == "binary":
            return jax.nn.sigmoid(jnp.concatenate([-logits, logits], axis=-1))
        return jax.nn.sigmoid(logits)

    def decode(self, outputs: np.ndarray, geometry: Any = None) -> dict[str, float]:
        """Name -> probability."""
        return {name: float(p) for name, p in zip(self.names, np.asarray(outputs), strict=True)}

    def called(self, decoded: Mapping[str, float]) -> tuple[str, ...]:
        """The names a prediction amounts to: one class, or the answers that are positive (maybe none)."""
        if self.problem == "multilabel":
            return tuple(name for name in self.names if decoded[name] >= self.threshold)
        if self.problem == "binary":
            return (self.names[int(decoded[self.names[1]] >= self.threshold)],)
        if self.problem == "ordinal":
            # The median: the middle of ordered classes rather than the likeliest.
            above = np.cumsum([decoded[name] for name in self.names])
            return (self.names[min(int((above < 0.5).sum()), len(self.names) - 1)],)
        return (max(self.names, key=lambda name: decoded[name]),)

    def table(self, decoded: Mapping[str, float]) -> list[dict[str, Any]]:
        called = self.called(decoded)
        return [{"class": n, "probability": decoded[n], "called": int(n in called)} for n in self.names]

    def score(
        self,
        prediction: Mapping[str, float],
        reference: np.ndarray,
        spacing: Sequence[float],
        voxel: float | None = None,
    ) -> list[dict[str, Any]]:
        """A row an answer whose truth is known: its probability, whether it is called, whether it is true.

        'truth' and 'predicted' are the class numbers of the case, in each of its rows.
        """
        called = self.called(prediction)
        numbers = {}
        if self.problem == "multilabel":
            truths = dict(zip(self.names, np.asarray(reference, np.float64).tolist(), strict=True))
        else:
            truth = int(reference)
            truths = {name: float(i == truth) for i, name in enumerate(self.names)}
            numbers = {"truth": truth, "predicted": list(self.names).index(called[0])}
        return [
            {
                "class": n,
                "probability": prediction[n],
                "called": int(n in called),
                "reference": int(truths[n]),
                **numbers,
            }
            for n in self.answers
            if not np.isnan(truths[n])
        ]

    def summarize(self, rows: Sequence[Mapping[str, Any]], *, resamples: int = 1000) -> dict[str, Any]:
        """One answer against the rest: AUROC, AP, sensitivity and specificity as called, sensitivity at the asked
        specificity, Brier, ECE. Of exclusive classes besides: accuracy, balanced accuracy, kappa, multi-class Brier
        and ECE."""

        def rate(t: Mapping[str, np.ndarray], which: str) -> float:
            return getattr(metrics.operating_point(t["called"], t["reference"], threshold=0.5), which)

        each = {
            "auroc": lambda t: metrics.auroc(t["probability"], t["reference"]),
            "average_precision": lambda t: metrics.average_precision(t["probability"], t["reference"]),
            "sensitivity": lambda t: rate(t, "sensitivity"),
            "specificity": lambda t: rate(t, "specificity"),
            f"sensitivity_at_{self.specificity:g}": lambda t: (
                metrics.operating_point(t["probability"], t["reference"], specificity=self.specificity).sensitivity
            ),
        }
        alone = {
            "brier": lambda t: metrics.brier(t["probability"], t["reference"]),
            "ece": lambda t: metrics.calibration_error(t["probability"], t["reference"]),
        }
        if self.problem == "multilabel":
            return stats.summarize_cohort(rows, each | alone, self.answers, n=resamples)

        def confusion(t: Mapping[str, np.ndarray]) -> np.ndarray:
            return metrics.confusion(t["predicted"], t["truth"], len(self.names))

        def matrix(t: Mapping[str, np.ndarray]) -> np.ndarray:
            return np.stack([t[f"p{i}"] for i in range(len(self.names))], axis=1)

        weights: metrics.Weights = "quadratic" if self.problem == "ordinal" else "none"
        together = {
            "accuracy": lambda t: metrics.accuracy(confusion(t)),
            "balanced_accuracy": lambda t: metrics.balanced_accuracy(confusion(t)),
            "kappa": lambda t: metrics.kappa(confusion(t), weights),
        }
        if self.problem == "binary":
            each |= alone
        else:
            together |= {
                "brier": lambda t: metrics.brier(matrix(t), t["truth"]),
                "ece": lambda t: metrics.calibration_error(matrix(t), t["truth"]),
            }
        found = stats.summarize_cohort(rows, each, self.answers, n=resamples)
        return found | stats.summarize_cohort(self._cases(rows), together, n=resamples)

    def _cases(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """One row a case with its probabilities p0, p1... The k-th row of each answer is of the k-th case."""
        of = {name: [row for row in rows if row["class"] == name] for name in self.answers}
        cases = []
        for number, row in enumerate(of[self.answers[-1]]):
            values = [of[name][number]["probability"] for name in self.answers]
            values = [1.0 - values[0], *values] if self.problem == "binary" else values
            cases.append({**row, "class": "all", **{f"p{i}": p for i, p in enumerate(values)}})
        return cases

    def calibrate(self, rows: Sequence[Mapping[str, Any]]) -> float:
        """The temperature that fits these (validation) rows best: the task's `temperature`, for later predictions.

        Logits are divided by it where the network gives them. Those of ordinal classes are thresholds': whether the
        class is beyond the k-th, each a question of its own.
        """
        logits = self._logits(rows)
        if self.problem in ("binary", "multilabel"):
            return self.temperature * metrics.fit_temperature(logits, [row["reference"] for row in rows])
        truths = np.array([case["truth"] for case in self._cases(rows)], int)
        if self.problem == "ordinal":
            beyond = truths[:, None] > np.arange(len(self.names) - 1)
            return self.temperature * metrics.fit_temperature(logits.ravel(), beyond.ravel())
        return self.temperature * metrics.fit_temperature(logits, truths)

    def calibration(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What `calibrate` finds in these rows, and the calibration error with and without it.

        Returns:
          'temperature'; 'ece' as predicted (of several answers the mean) and 'ece_calibrated' at that temperature, on
          the cases it was fitted to; 'n' of them.
        """
        temperature = self.calibrate(rows)
        errors = [self.summarize(r, resamples=0)["ece"]["mean"] for r in (rows, self._tempered(rows, temperature))]
        n = len({row["case"] for row in rows})
        return {"temperature": temperature, "ece": errors[0], "ece_calibrated": errors[1], "n": n}

    def _logits(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """What probabilities were made from, up to a shift: of rows [N], classes [N, K] or thresholds [N, K - 1]."""
        least = 1e-7
        if self.problem in ("binary", "multilabel"):
            p = np.clip([row["probability"] for row in rows], least, 1 - least)
            return np.log(p / (1 - p))
        p = np.array([[case[f"p{i}"] for i in range(len(self.names))] for case in self._cases(rows)])
        if self.problem == "multiclass":
            return np.log(np.clip(p, least, 1.0))
        below, above = p.cumsum(axis=1)[:, :-1], p[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]
        return np.log(np.clip(above, least, 1.0)) - np.log(np.clip(below, least, 1.0))

    def _tempered(self, rows: Sequence[Mapping[str, Any]], temperature: float) -> list[dict[str, Any]]:
        """The rows with the probabilities of another temperature."""
        task = dataclasses.replace(self, temperature=temperature / self.temperature)
        logits = self._logits(rows)
        if self.problem in ("binary", "multilabel"):
            p = np.asarray(task.probabilities(jnp.asarray(logits[:, None])))[:, -1]
            return [{**row, "probability": float(v)} for row, v in zip(rows, p, strict=True)]
        p = np.asarray(task.probabilities(jnp.asarray(logits)))
        columns = {name: iter(p[:, i].tolist()) for i, name in enumerate(self.names)}
        return [{**row, "probability": next(columns[row["class"]])} for row in rows]

    def selection(self, summary: Mapping[str, Any]) -> float:
        """AUROC; of ordered classes the accuracy."""
        first = ("accuracy",) if self.problem == "ordinal" else ("auroc",)
        return first_metric(summary, *first, "balanced_accuracy") or 0.0
