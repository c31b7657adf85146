"""Brain tissues and tumour from four MR contrasts (T1, T1c, T2, FLAIR), on the embedded synthetic cohort.

Data: 36 synthetic brains (24 train, 6 validation, 6 test; about 2 mm), written on first use as NIfTI files under the
cache folder. Labels: CSF, grey matter, white matter, oedema, tumour core, enhancing rim.

Score: mean test Dice 0.90 over the tissues, 0.83 over the tumour regions. Cost: 6 to 8 minutes in all on 2 CPU
cores, nothing cached; 2.7 GB. See docs/benchmarks.md.

Arguments: `debug` (a few small brains, a few steps; about a minute).
"""

from ml_collections import ConfigDict

from medjax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, debug=False)
    config = ConfigDict()
    config.data = ConfigDict(
        {
            "cohort": "synthetic_brain",
            "split": {"file": "split.csv"},
            "preprocess": {"spacing": (2.0, 2.0, 2.0), "crop": "nonzero", "normalize": "zscore_nonzero"},
            "patch": (64, 64, 64),
            "batch_size": 2,
            "foreground": 0.67,
        }
    )
    config.augment = ConfigDict(
        {
            "mirror": (0,),
            "brightness": {"p": 0.2, "std": 0.15},
            "contrast": {"p": 0.2},
            "gamma": {"p": 0.15},
            "noise": {"p": 0.15},
        }
    )
    config.model = ConfigDict({"name": "unet", "features": (16, 32, 64, 128), "levels": 2})
    config.tasks = ConfigDict({"brain": {"type": "segmentation", "levels": 2}})
    config.optim = ConfigDict(
        {"name": "adamw", "lr": 3e-3, "weight_decay": 1e-2, "schedule": "cosine", "warmup": "20 steps", "ema": 0.99}
    )
    config.train = ConfigDict({"total": "420 steps", "eval_every": "140 steps", "checkpoint_every": "140 steps"})
    if arg.debug:
        config.optim.warmup = "2 steps"
        config.data.options = ConfigDict({"n_train": 4, "n_val": 2, "n_test": 2, "spacing": 4.0})
        config.data.preprocess.spacing = (4.0, 4.0, 4.0)
        config.data.patch = (32, 32, 32)
        config.model.features = (8, 16, 32)
        config.train = ConfigDict(
            {"total": "12 steps", "log_every": "4 steps", "eval_every": "6 steps", "checkpoint_every": "6 steps"}
        )
    return config
