"""What self-supervised tasks share: no target, every case, a view of their own, scores on one fixed patch a case."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from medjax.metrics import stats
from medjax.tasks.common import Defaults, Kind, first_metric


class Pretext(Defaults):
    """Answers of self-supervised tasks. What the spines ask of one besides `name`, `weight`, `head` and `loss`:

    `prepare(key, batch)` draws what is random, example by example, and sets `<task>/mask` to the rows that are real;
    `view(batch)` is what the head sends through the backbone; `measure(outputs, batch)` gives numbers of each example,
    metric -> [B]; `show(outputs, batch)` volumes [X, Y, Z, C] of the first example, title -> volume, or nothing.
    """

    metrics: tuple[str, ...] = ()

    @property
    def kind(self) -> Kind:
        return "pretext"

    @property
    def targets(self) -> tuple[str, ...]:
        return ()

    @property
    def outputs(self) -> int:
        return 0

    @property
    def causal(self) -> bool:
        """Whether tokens of a transformer see those before them alone."""
        return False

    def check(self, patch: Sequence[int]) -> None:
        """Raises UserError for a patch (`data.patch`) that the task cannot use."""

    def check_rows(self, rows: int) -> None:
        """Raises UserError for a batch of which one call of `loss` sees too few rows."""

    def check_cases(self, cases: int) -> None:
        """Says so where that many cases are too few to judge the task by."""

    def fit(self, known: Sequence[Any]) -> dict[str, Any]:
        return {}

    def keys(self, key: Array, batch: Mapping[str, Array]) -> Array:
        """A random key of each example, of this task alone: [B]."""
        own = jax.random.fold_in(key, zlib.crc32(self.name.encode()))
        return jax.vmap(lambda e: jax.random.fold_in(own, e))(batch["example"].astype("uint32"))

    def show(self, outputs: Sequence[Array], batch: Mapping[str, Array]) -> dict[str, Array]:
        return {}

    def summarize(self, rows: Sequence[Mapping[str, Any]], *, resamples: int = 1000) -> dict[str, Any]:
        """The mean of each metric over the cases."""
        wanted = {metric: lambda t, metric=metric: float(np.mean(t[metric])) for metric in self.metrics}
        return stats.summarize_cohort(rows, wanted, (self.name,), n=resamples)

    def selection(self, summary: Mapping[str, Any]) -> float:
        """The last metric, which is one of 0 (nothing learnt) to 1."""
        found = first_metric(summary, self.metrics[-1])
        return 0.0 if found is None else min(max(found, 0.0), 1.0)
