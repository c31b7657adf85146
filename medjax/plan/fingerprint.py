"""What the training cases are like: shapes, spacings, what cropping leaves, intensities, and who appears twice.

Every case is read once, on a few threads, and only its figures are kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from medjax.data import cohort as cohorts
from medjax.data.volume import axes_towards, finite
from medjax.errors import UserError
from medjax.ops.native.cpus import usable_cpus
from medjax.ops.resample import bounding_box

QUANTILES = (0.0, 0.005, 0.5, 0.995, 1.0)
_NAMES = ("min", "p0.5", "median", "p99.5", "max")
_VOXELS = 100_000  # of a channel, evenly spaced, that stand for its intensities
_CONTRADICTION = 100.0  # spacings along one axis further apart than this cannot be in the same unit


@dataclass(frozen=True)
class Seen:
    """One case, along its oriented axes.

    Attributes:
      shape: of the file. box: shape of the box of voxels that are not 0 in every modality. spacing: mm.
      intensities: modality -> quantiles at `QUANTILES` inside the box.
      mark: the same for cases of the same voxels, and hardly for others.
    """

    id: str
    shape: tuple[int, ...]
    box: tuple[int, ...]
    spacing: tuple[float, ...]
    intensities: Mapping[str, tuple[float, ...]]
    mark: tuple[float, ...]


@dataclass(frozen=True)
class Fingerprint:
    """The training cases. `twins`: pairs of case ids whose first modality holds the same voxels."""

    cases: tuple[Seen, ...]
    twins: tuple[tuple[str, str], ...] = ()

    @property
    def spacings(self) -> np.ndarray:
        """[cases, 3] mm."""
        return np.array([c.spacing for c in self.cases])

    def shapes(self, crop: bool) -> np.ndarray:
        """[cases, 3] voxels, of the files or of the boxes."""
        return np.array([c.box if crop else c.shape for c in self.cases])

    @property
    def kept(self) -> float:
        """Median share of a file's voxels inside its box."""
        return float(np.median(self.shapes(True).prod(axis=1) / self.shapes(False).prod(axis=1)))

    def intensities(self, modality: str) -> dict[str, float]:
        """Medians over the cases of the quantiles of one modality."""
        found = [c.intensities[modality] for c in self.cases if modality in c.intensities]
        return {n: float(f"{v:.6g}") for n, v in zip(_NAMES, np.median(found, axis=0), strict=True)} if found else {}

    def check(self) -> None:
        """Raises UserError where two cases' spacings cannot be in the same unit."""
        for axis, name in enumerate("xyz"):
            low = min(self.cases, key=lambda c: c.spacing[axis])
            high = max(self.cases, key=lambda c: c.spacing[axis])
            if high.spacing[axis] > _CONTRADICTION * low.spacing[axis]:
                raise UserError(
                    f"the spacings contradict each other: along {name} {low.spacing[axis]:.4g} mm in case {low.id}, "
                    f"{high.spacing[axis]:.4g} mm in case {high.id}; one of them is not in millimetres. Correct its "
                    "header, or leave the case out."
                )


def fingerprint(
    cohort: cohorts.Cohort,
    cases: Sequence[cohorts.Case],
    spec: Mapping[str, Any],
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Fingerprint:
    """Reads the cases.

    Args:
      spec: `data.preprocess`. workers: cases held in memory at a time; 0: one a usable CPU, four at most.
    """
    by_mark: dict[tuple[float, ...], list[cohorts.Case]] = defaultdict(list)
    seen = []
    with ThreadPoolExecutor(workers or min(4, usable_cpus())) as pool:
        jobs = [pool.submit(_look, case, cohort.modalities, spec) for case in cases]
        try:
            for case, job in zip(cases, jobs, strict=True):
                seen.append(job.result())
                by_mark[seen[-1].mark].append(case)
                if progress:
                    progress(len(seen))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    twins = []
    for alike in by_mark.values():
        first: dict[str, str] = {}
        for case in alike if len(alike) > 1 else ():
            digest = cohorts.content_hash(next(iter(case.images.values())))
            if digest in first:
                twins.append((first[digest], case.id))
            first.setdefault(digest, case.id)
    found = Fingerprint(tuple(seen), tuple(twins))
    found.check()
    return found


def _look(case: cohorts.Case, modalities: Sequence[str], spec: Mapping[str, Any]) -> Seen:
    images = finite(cohorts.load_images(case, modalities, allow_missing=spec["missing"] == "zero"), spec["nonfinite"])
    order, _ = axes_towards(images.affine, spec["orientation"])
    data = images.data if images.data.ndim == 4 else images.data[..., None]
    mask = data[..., 0] != 0
    for channel in range(1, data.shape[3]):
        mask |= data[..., channel] != 0
    box = bounding_box(mask)
    if box is None:
        raise UserError(f"{images.name}: the image is 0 everywhere. Give the right file or leave the case out.")
    quantiles = {}
    for channel, modality in enumerate(modalities):
        if modality in case.images:
            values = data[(*box, channel)].ravel(order="K")
            values = values[:: max(1, values.size // _VOXELS)].astype(np.float64)
            quantiles[modality] = tuple(np.quantile(values, QUANTILES).tolist())
    first = data[..., modalities.index(next(m for m in modalities if m in case.images))]
    kept = [s.stop - s.start for s in box]
    return Seen(
        case.id,
        tuple(images.shape[a] for a in order),
        tuple(kept[a] for a in order),
        tuple(float(f"{images.spacing[a]:.6g}") for a in order),
        quantiles,
        # Nine digits of a sum do not depend on the order of the voxels, which a file's axes rule.
        (float(mask.sum()), float(f"{first.sum(dtype=np.float64):.9g}"), float(first.min()), float(first.max())),
    )
