"""Masked pretraining on brains without labels: four MR contrasts (T1, T1c, T2, FLAIR), a quarter of each patch visible.

Data: the synthetic brains of configs/brain_seg.py, whose labels are not read; with `folder=FOLDER` the volumes of any
folder besides, all of one contrast (`modality=T1`); with `data=FOLDER` such a folder alone, one channel. Files that are
no volume are left out and listed in the run folder (`skipped.csv`). The network is that of configs/brain_seg.py, and
all of it is pretrained; configs/brain_finetune.py loads it from runs/brain_mae: with arguments say
`--workdir=runs/brain_mae`, or give it this run as `source=`.

Score: of the variance of hidden voxels in the validation brains 0.43 explained. Cost: 6 minutes on 2 CPU cores, the
cohort already drawn; 763 MB for the step. See docs/benchmarks.md.

Arguments: `debug` (a few small brains, a few steps; about a minute), `data=FOLDER`, `folder=FOLDER`, `modality=NAME`.
"""

from ml_collections import ConfigDict

from configs import brain_seg
from medjax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, debug=False, data="", folder="", modality="T1")
    config = brain_seg.get_config("debug" if arg.debug else None)
    config.data.preprocess.missing = "zero"
    config.data.skip_unreadable, config.data.foreground = True, 0.0
    config.augment = ConfigDict({"mirror": (0,)})
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
            "warmup": "2 steps" if arg.debug else "40 steps",
            "clip": 1.0,
        }
    )
    if not arg.debug:
        config.train = ConfigDict({"total": "600 steps", "eval_every": "200 steps", "checkpoint_every": "200 steps"})
    config.eval = ConfigDict({"splits": ("val",)})
    if arg.folder:
        config.data.extra = ConfigDict({"folder": arg.folder, "modality": arg.modality})
    if arg.data:
        config.data.cohort, config.data.layout, config.data.modalities = arg.data, "files", (arg.modality,)
        config.data.options = ConfigDict()
        config.data.split = ConfigDict({"folds": 5})
    return config
