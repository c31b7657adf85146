"""Hippocampus from a handful of outlined cases and many that nobody outlined: five labels and a mean teacher.

Data: as `hippocampus.py`. Of the 180 training patients `labels` keep their outlines (which ones, `seed` decides); the
others are trained on without. docs/semi_supervised.md explains the keys, docs/few_labels.md compares methods.

Arguments: `labels=5`, `method=mean_teacher` (or `fixmatch`, `cps`; `none` trains on the labelled cases alone), `debug`
(a few steps), `data=FOLDER`.
"""

import os

from ml_collections import ConfigDict

from medjax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, debug=False, data="", labels=5, method="mean_teacher")
    config = ConfigDict()
    config.data = ConfigDict(
        {
            "cohort": arg.data or os.path.join(os.environ.get("MEDJAX_DATA", "../shared/data"), "hippocampus"),
            "split": {"file": "split.csv"},
            "labelled": arg.labels,
            "preprocess": {"spacing": (1.0, 1.0, 1.0), "normalize": "zscore"},
            "patch": (40, 56, 40),
            "batch_size": 4,
            "foreground": 0.33,
            # Half of every batch has labels, however few they are.
            "sampling": {"labelled": 0.5},
        }
    )
    config.augment = ConfigDict(
        {
            # Left and right mirror each other; front and back are what is to be told apart.
            "mirror": (0,),
            "affine": {"p": 0.5, "rotate": 15.0, "scale": 0.15},
            "brightness": {"p": 0.15},
            "contrast": {"p": 0.15},
            "gamma": {"p": 0.3},
            "noise": {"p": 0.1},
        }
    )
    config.model = ConfigDict({"name": "unet", "features": (16, 32, 64, 128), "levels": 2})
    config.tasks = ConfigDict({"hippocampus": {"type": "segmentation", "levels": 2}})
    config.optim = ConfigDict(
        {"name": "adamw", "lr": 3e-3, "weight_decay": 1e-2, "schedule": "cosine", "warmup": "50 steps", "ema": 0.99}
    )
    config.semi = ConfigDict({"method": arg.method, "weight": 1.0, "rampup": "300 steps", "ema": 0.99})
    # No choice of a checkpoint by the validation cases: those labels would be labels too.
    config.train = ConfigDict({"total": "800 steps", "eval_every": "800 steps", "checkpoint_every": "200 steps"})
    config.eval = ConfigDict({"splits": ("val",), "mirror": (0,)})
    if arg.method == "none":
        config.semi.method, config.data.unlabelled, config.data.sampling.labelled = "", False, 0.0
    if arg.debug:
        config.optim.warmup, config.semi.rampup = "2 steps", "4 steps"
        config.model.features = (8, 16, 32)
        config.train = ConfigDict(
            {"total": "6 steps", "log_every": "2 steps", "eval_every": "6 steps", "checkpoint_every": "3 steps"}
        )
        config.train.eval_cases = 2
    return config
