"""Runs to predict with that cost no training: an untrained network, saved as a run saves its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np

from medjax import config as config_lib
from medjax import models, predict, tasks
from medjax.checkpoint import Checkpoints
from medjax.data import preprocess
from medjax.models.model import build_model

LABELS = {"shell": 1, "core": 2}
PATCH = (16, 16, 16)


def make_run(
    folder: Path,
    job: Mapping[str, Any] | None = None,
    *,
    modalities: Sequence[str] = ("MRI",),
    labels: Mapping[str, int] = LABELS,
    spacing: tuple[float, float, float] | None = (2.0, 2.0, 2.0),
    missing: str = "error",
    normalize: str = "zscore",
    evaluation: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """A run of an untrained network: random weights are as good as learnt ones to follow voxels through a program."""
    config = config_lib.defaults()
    recipe = {
        "data": {"patch": PATCH},
        "model": {"name": "unet", "features": (4, 8), "convs": 1, "decoder_convs": 1},
        "tasks": job or {"spheres": {"type": "segmentation", "levels": 1}},
        "eval": evaluation or {},
    }
    config_lib.merge(config, recipe)
    options = {"model": models.options, "tasks": tasks.options}
    config = config_lib.resolve(config, (), lambda room, kind: options[room](kind))
    model = build_model(config, tasks.build(config.tasks, labels))
    x = jnp.zeros((1, *PATCH, len(modalities)))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=True)["params"])
    rng = np.random.default_rng(seed)
    # Biases of 0: no class wins everywhere.
    params = jax.tree_util.tree_map_with_path(
        lambda path, s: jnp.asarray(rng.normal(0, 0.0 if "bias" in str(path[-1]) else 0.5, s.shape), s.dtype), shapes
    )
    plan = preprocess.Plan(
        tuple(modalities), dict(labels), "RAS", spacing, None, dict.fromkeys(modalities, normalize), missing=missing
    )
    checkpoints = Checkpoints(folder)
    meta = {"step": 0, "config": json.loads(config_lib.to_json(config)), "plan": plan.to_json(), "labels": labels}
    checkpoints.save("latest", 0, {"step": jnp.zeros((), jnp.int32), "params": params, "average": None}, meta)
    checkpoints.close()
    return folder


def run_predict(run: Path, source: Path, output: Path, *more: str) -> None:
    predict.main([f"--run={run}", f"--input={source}", f"--output={output}", *more])


def labels_of(file: Path) -> np.ndarray:
    return np.asarray(nib.load(file).dataobj)
