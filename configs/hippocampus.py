"""Anterior and posterior hippocampus from T1 MR crops: Medical Segmentation Decathlon Task04.

Data: the task's folder in Decathlon layout (`dataset.json`, imagesTr/, labelsTr/), found at `data=` or else at
`MEDJAX_DATA`/hippocampus or ../shared/data/hippocampus. Where it has a `split.csv` (columns id, split) that is the
split; as downloaded it has none, and the first of five folds of its patients is held out (data.split.fold chooses).

Score, on the 20 validation cases of our `split.csv`: mean Dice 0.88 (anterior 0.89, posterior 0.87). Cost: 12 minutes
of training on 2 idle CPU cores. See docs/benchmarks.md.

Arguments: `debug` (a few steps), `data=FOLDER`.
"""

import os

from ml_collections import ConfigDict

from medjax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, debug=False, data="")
    config = ConfigDict()
    cohort = arg.data or os.path.join(os.environ.get("MEDJAX_DATA", "../shared/data"), "hippocampus")
    # The Decathlon's own archive brings no split.
    dealt = os.path.exists(os.path.join(cohort, "dataset.json")) and not os.path.exists(
        os.path.join(cohort, "split.csv")
    )
    config.data = ConfigDict(
        {
            "cohort": cohort,
            "split": {"folds": 5, "fold": 0} if dealt else {"file": "split.csv"},
            "preprocess": {"spacing": (1.0, 1.0, 1.0), "normalize": "zscore"},
            "patch": (40, 56, 40),
            "batch_size": 4,
            "foreground": 0.33,
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
        {"name": "adamw", "lr": 3e-3, "weight_decay": 1e-2, "schedule": "cosine", "warmup": "50 steps", "ema": 0.997}
    )
    config.train = ConfigDict({"total": "1300 steps", "eval_every": "325 steps", "checkpoint_every": "325 steps"})
    config.eval = ConfigDict({"splits": ("val",), "mirror": (0,)})
    if arg.debug:
        config.optim.warmup = "2 steps"
        config.model.features = (8, 16, 32)
        config.train = ConfigDict(
            {"total": "6 steps", "log_every": "2 steps", "eval_every": "3 steps", "checkpoint_every": "3 steps"}
        )
    return config
