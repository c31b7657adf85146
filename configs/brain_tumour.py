"""Brain tumour regions (whole tumour, core, enhancing tumour) from T1, T1c, T2 and FLAIR, any of which may be missing.

Data: the synthetic brains of brain_seg.py; or with `data=FOLDER` one folder a case as BraTS 2023 and later have them:
CASE/...t1n.nii.gz, ...t1c, ...t2w, ...t2f and the mask ...seg (1 necrotic core, 2 oedema, 3 enhancing; 4 is not read).
In training each example loses channels at random, and a case whose files lack modalities is trained on and predicted
as it is: an absent channel is all zeros. Five folds beside a fifth for testing want six cases or more:
two cannot train it. Masks of another name are said by `--config.data.targets.tumour={case}/seg-mine.nii.gz`; a case
without one is read and predicted, and trains nothing (docs/bring_your_own_data.md).

An intensity threshold (`python -m benchmarks.threshold`) reaches a Dice of 0.59, 0.38 and 0.51 on the synthetic test
cases with all four images; the network reaches 0.86, 0.88 and 0.82 (6 cases). Cost: 4 minutes on 2 idle cores, in
bfloat16 on a CPU with AMX. See docs/benchmarks.md.

Arguments: `debug` (a few small brains, a few steps; under a minute), `data=FOLDER`.
"""

from ml_collections import ConfigDict

from medjax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, debug=False, data="")
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
            "patch": (64, 64, 64),
            "batch_size": 2,
            "foreground": 0.67,
            # Of the labels only the tumour's matter, and the brain around it comes along.
            "sampling": {"classes": {"oedema": 1.0, "tumour core": 1.0, "enhancing rim": 1.0}},
        }
    )
    parts = ("oedema", "tumour core", "enhancing rim")
    if arg.data:
        config.data.cohort = arg.data
        config.data.layout = "folder"
        config.data.images = ConfigDict(
            {
                "T1": "{case}/*t1n.nii.gz",
                "T1c": "{case}/*t1c.nii.gz",
                "T2": "{case}/*t2w.nii.gz",
                "FLAIR": "{case}/*t2f.nii.gz",
            }
        )
        config.data.modalities = ("T1", "T1c", "T2", "FLAIR")
        config.data.targets = ConfigDict({"tumour": "{case}/*seg.nii.gz"})
        config.data.labels = ConfigDict({"tumour core": 1, "oedema": 2, "enhancing rim": 3})
        config.data.split = ConfigDict({"folds": 5, "test": 0.2})
        config.data.preprocess.spacing = (1.0, 1.0, 1.0)
        config.data.patch = (128, 128, 128)
    config.augment = ConfigDict(
        {
            "transforms": (
                ("mirror", {"axes": (0,)}),
                ("noise", {"p": 0.15}),
                ("brightness", {"p": 0.2, "std": 0.15}),
                ("contrast", {"p": 0.2}),
                ("gamma", {"p": 0.15}),
                ("modality_dropout", {"p": 0.6, "p_channel": 0.4}),
            )
        }
    )
    config.model = ConfigDict({"name": "unet", "features": (16, 32, 64, 128), "levels": 2})
    config.tasks = ConfigDict(
        {
            "tumour": {
                "type": "segmentation",
                "levels": 2,
                "regions": {"whole tumour": parts, "core": parts[1:], "enhancing": parts[2:]},
            }
        }
    )
    config.optim = ConfigDict(
        {"name": "adamw", "lr": 5e-3, "weight_decay": 1e-2, "schedule": "cosine", "warmup": "20 steps", "ema": 0.99}
    )
    config.train = ConfigDict(
        {
            "total": "800 steps",
            "eval_every": "200 steps",
            "checkpoint_every": "200 steps",
            "precision": "bfloat16",
        }
    )
    if arg.debug:
        config.optim.warmup = "2 steps"
        config.data.options = ConfigDict({"n_train": 3, "n_val": 1, "n_test": 1, "spacing": 4.0})
        config.data.preprocess.spacing = (4.0, 4.0, 4.0)
        config.data.patch = (32, 32, 32)
        config.model.features = (8, 16)
        config.tasks.tumour.levels = 1
        config.train = ConfigDict(
            {"total": "4 steps", "log_every": "2 steps", "eval_every": "4 steps", "checkpoint_every": "4 steps"}
        )
    return config
