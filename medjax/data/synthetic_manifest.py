"""What the generators of images with masks and a manifest share."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medjax.data.synthetic import check_request, check_workers, make_cohort, write_volume

Job = dict[str, Any]


def split_jobs(name: str, writer: str, counts: Mapping[str, int], seed: int, options: Mapping[str, Any]) -> list[Job]:
    """One record for a worker a case: id, split, seed and number beside the options.

    Raises UserError for numbers of cases or a seed that cannot be.
    """
    check_request(counts, seed)
    splits = [split for split, count in counts.items() for _ in range(count)]
    return [
        {"id": f"{name}_{number:03d}", "split": split, "writer": writer, "seed": seed, "number": number, **options}
        for number, split in enumerate(splits)
    ]


def manifest_cohort(
    folder: str | os.PathLike[str] | None,
    name: str,
    parameters: Mapping[str, Any],
    jobs: Sequence[Job],
    *,
    workers: int | None,
    progress: bool,
    before: Callable[[], Any] = lambda: None,
) -> Path:
    """The manifest of the cohort that `jobs` write with `write_case`; see `medjax.data.synthetic.make_cohort`."""
    check_workers(workers)
    files = ["manifest.csv", *(f"{part}/{job['id']}.nii.gz" for job in jobs for part in ("images", "masks"))]
    made = make_cohort(
        folder,
        name,
        parameters,
        jobs,
        files,
        before=before,
        finish=lambda build: _write_manifest(build, jobs),
        workers=workers,
        progress=progress,
    )
    return made / "manifest.csv"


def write_case(job: Job, image: np.ndarray, mask: np.ndarray, affine: np.ndarray, row: Mapping[str, Any]) -> None:
    """Writes a case and keeps its row until the manifest is written.

    Args:
        image: [X, Y, Z] or [X, Y, Z, C] of the type it is stored in. mask: uint8 [X, Y, Z]. row: columns beside id,
            split, image and mask; lists become JSON.
    """
    import nibabel as nib

    folder = Path(job["folder"])
    for part, array in (("images", image), ("masks", mask)):
        write_volume(folder / part / f"{job['id']}.nii.gz", nib.Nifti1Image(array, affine), affine)
    write_row(job, row)


def write_row(job: Job, row: Mapping[str, Any]) -> None:
    """Keeps the row of a case whose files are written until the manifest is."""
    (Path(job["folder"]) / "masks" / f"{job['id']}.json").write_text(json.dumps(row))


def _write_manifest(folder: Path, jobs: Sequence[Job]) -> None:
    rows = []
    for job in jobs:
        name = job["id"]
        kept = folder / "masks" / f"{name}.json"
        files = {"image": f"images/{name}.nii.gz", "mask": f"masks/{name}.nii.gz"}
        rows.append({"id": name, "split": job["split"], **files, **json.loads(kept.read_text())})
        kept.unlink()
    with open(folder / "manifest.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: _cell(value) for key, value in row.items()})


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return json.dumps(value)
    return f"{value:.5g}" if isinstance(value, float) else value


def scanner_affine(spacing: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    """[4, 4]: x to the left and y to the back, as scanners store it, at a random place."""
    affine = np.diag([-float(spacing[0]), -float(spacing[1]), float(spacing[2]), 1.0])
    affine[:3, 3] = np.round(rng.uniform(-150, 150, 3), 1)
    return affine


def finding(
    center: Sequence[float], size: Sequence[float], affine: np.ndarray, attributes: Mapping[str, float], **more: Any
) -> dict[str, Any]:
    """A finding as a manifest lists it.

    Args:
        center: voxels. size: full extents in mm. attributes: numbers. more: 'label', say.
    """
    world = affine[:3, :3] @ np.asarray(center) + affine[:3, 3]
    place = [round(float(v), 2) for v in world]
    return {"center": place, "size": [round(float(v), 2) for v in size], **more, **attributes}
