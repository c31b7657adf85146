"""A tiny cohort and recipe the spine's tests share: two nested spheres in noise, in Decathlon layout."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np

RECIPE = """
from ml_collections import ConfigDict
from medjax.config import parse_arg

def get_config(arg=None):
    arg = parse_arg(arg)
    config = ConfigDict()
    config.data = ConfigDict({{
        "cohort": {cohort!r},
        "split": {{"file": "split.csv"}},
        "preprocess": {{"spacing": (2.0, 2.0, 2.0), "normalize": "zscore"}},
        "patch": (16, 16, 16), "batch_size": 4, "foreground": 0.5,
    }})
    config.augment = ConfigDict({{
        "mirror": (0,), "affine": {{"p": 0.3}}, "gamma": {{"p": 0.3}}, "noise": {{"p": 0.5}},
    }})
    config.model = ConfigDict({{"name": "unet", "features": (4, 8), "convs": 1, "decoder_convs": 1}})
    config.tasks = ConfigDict({{"spheres": {{"type": "segmentation", "levels": 1}}}})
    config.optim = ConfigDict({{"name": "adamw", "lr": 1e-2, "schedule": "cosine", "ema": 0.9}})
    config.train = ConfigDict({{
        "total": "8 steps", "log_every": "1 steps", "eval_every": "4 steps", "checkpoint_every": "2 steps",
    }})
    return config
"""


def write_cohort(folder: Path, *, n: int = 8, size: int = 20, seed: int = 0) -> Path:
    """`n` one-channel cases of shape about size³, in differing orientations; the last two are val and test."""
    rng = np.random.default_rng(seed)
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    entries, lines = [], ["id,split"]
    for i in range(n):
        shape = (size + i % 3, size, size - i % 2)
        at = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
        centre = np.array(shape) / 2 + rng.uniform(-2, 2, 3)
        distance = np.linalg.norm(at - centre, axis=-1)
        label = ((distance < 7).astype(np.uint8) + (distance < 4)).astype(np.uint8)
        image = (200 + 100 * label + rng.normal(0, 20, shape)).astype(np.float32)
        affine = np.diag([2.0, 2.0, 2.0, 1.0])
        if i % 2:  # every other file runs from left to right backwards
            affine[0, 0], affine[0, 3] = -2.0, 2.0 * (shape[0] - 1)
        nib.save(nib.Nifti1Image(image, affine), folder / "imagesTr" / f"case{i}.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), folder / "labelsTr" / f"case{i}.nii.gz")
        entries.append({"image": f"./imagesTr/case{i}.nii.gz", "label": f"./labelsTr/case{i}.nii.gz"})
        lines.append(f"case{i},{'val' if i == n - 2 else 'test' if i == n - 1 else 'train'}")
    table = {
        "name": "Spheres",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "shell", "2": "core"},
        "numTraining": n,
        "training": entries,
        "test": [],
    }
    (folder / "dataset.json").write_text(json.dumps(table))
    (folder / "split.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_recipe(file: Path, cohort: Path) -> Path:
    file.write_text(RECIPE.format(cohort=str(cohort)))
    return file
