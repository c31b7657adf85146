"""Masked pretraining on brains without labels: four MR contrasts (T1, T1c, T2, FLAIR), a quarter of each patch visible.

Data: the synthetic brains of configs/brain_seg.py, whose labels are not read; with `folder=FOLDER` the volumes of any
folder besides, all of one contrast (`modality=T1`); with `data=FOLDER` such a folder alone, one channel. Files that are
no volume are left out and listed in the run folder (`skipped.csv`). The network is that of configs/brain_seg.py, and
all of it is pretrained; configs/brain_finetune.py loads it.

Arguments: `debug` (a few small brains, a few steps; about a minute), `data=FOLDER`, `folder=FOLDER`, `modality=NAME`.
"""

from ml_collections import ConfigDict

from medjax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, debug=False, data="", folder="", modality="T1")
    config = ConfigDict()
    config.data = ConfigDict(
        {
            "cohort": "synthetic_brain",
            "split": {"file": "split.csv"},
            "preprocess": {
                "spacing": (2.0, 2.0, 2.0),
                "crop": "nonzero",
                "normalize": "zscore_nonzero",
                "missing": "zero",
            },
            "skip_unreadable": True,
            "patch": (64, 64, 64),
            "batch_size": 2,
            "foreground": 0.0,
        }
    )
    config.augment = ConfigDict({"mirror": (0,)})
    config.model = ConfigDict({"name": "unet", "features": (16, 32, 64, 128), "levels": 2})
    config.tasks = ConfigDict(
        {"mae": {"type": "masked", "block": (8, 8, 8), "ratio": 0.75, "decoder": "backbone", "objective": "l2"}}
    )
    config.optim = ConfigDict(
        {
            "name": "adamw",
            "lr": 2e-3,
            "betas": (0.9, 0.95),
            "weight_decay": 1e-2,
            "schedule": "cosine",
            "warmup": "40 steps",
            "clip": 1.0,
        }
    )
    config.train = ConfigDict({"total": "600 steps", "eval_every": "200 steps", "checkpoint_every": "200 steps"})
    config.eval = ConfigDict({"splits": ("val",)})
    if arg.debug:
        config.optim.warmup = "2 steps"
        config.data.options = ConfigDict({"n_train": 4, "n_val": 2, "n_test": 2, "spacing": 4.0})
        config.data.preprocess.spacing = (4.0, 4.0, 4.0)
        config.data.patch = (32, 32, 32)
        config.model.features = (8, 16, 32)
        config.train = ConfigDict(
            {"total": "12 steps", "log_every": "4 steps", "eval_every": "6 steps", "checkpoint_every": "6 steps"}
        )
    if arg.folder:
        config.data.extra = ConfigDict({"folder": arg.folder, "modality": arg.modality})
    if arg.data:
        config.data.cohort, config.data.layout, config.data.modalities = arg.data, "files", (arg.modality,)
        config.data.options = ConfigDict()
        config.data.split = ConfigDict({"folds": 5})
    return config
