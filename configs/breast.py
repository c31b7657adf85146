"""Breast lesions in dynamic contrast-enhanced MR: outlined, and graded 1 to 3.

Data: 204 drawn breasts (120 train, 24 validation, 60 test; 2 mm; before contrast, early and late after it), written on
first use under the cache folder (`medjax/data/synthetic_breast.py`). They are no patients: outline, uptake and
washout follow the grade by rules of the generator, each with so much spread that none of them tells the grade alone.
A breast without a lesion has an empty mask and no grade, and trains the outline only.

An intensity threshold (`python -m benchmarks.threshold`) reaches a Dice of 0.24 on the test cases and no better than
chance for the grade (accuracy 0.20); the network reaches a Dice of 0.76 and an accuracy of 0.57 (quadratic kappa 0.52;
mean AUROC of the grades 0.84). Cost: 6 minutes on 2 idle cores, in bfloat16 on a CPU with AMX. See docs/benchmarks.md.

Arguments: `debug` (a few breasts, a few steps; under a minute).
"""

from ml_collections import ConfigDict

from medjax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, debug=False)
    config = ConfigDict()
    config.data = ConfigDict(
        {
            "cohort": "synthetic_breast",
            "images": {"pre": "image", "early": "image", "late": "image"},
            "modalities": ("pre", "early", "late"),
            "targets": {"lesion": "mask", "grade": "grade"},
            "classes": {"grade": ("1", "2", "3")},
            "labels": {"lesion": 1},
            "split": {"column": "split"},
            # One scale for all three images: what a lesion gains and loses between them must not be normalised away.
            "preprocess": {"normalize": "ct"},
            "patch": (72, 64, 56),
            "batch_size": 2,
        }
    )
    config.augment = ConfigDict({"mirror": (0, 2), "noise": {"p": 0.2}, "brightness": {"p": 0.2, "std": 0.05}})
    config.model = ConfigDict({"name": "unet", "features": (12, 24, 48, 96), "levels": 3})
    config.tasks = ConfigDict(
        {
            "lesion": {"type": "segmentation", "levels": 2, "batch_dice": True},
            "grade": {
                "type": "classification",
                "problem": "ordinal",
                "names": ("1", "2", "3"),
                # With 0.3, and the maximum over the volume, the grade's gradient in the backbone is five times the
                # outline's, which pays for it (`benchmarks/task_gradients.py`).
                "weight": 0.02,
                "pool": "share",
                "dropout": 0.2,
            },
        }
    )
    config.optim = ConfigDict(
        {"name": "adamw", "lr": 6e-3, "weight_decay": 1e-2, "schedule": "cosine", "warmup": "30 steps", "ema": 0.995}
    )
    config.optim.clip, config.optim.betas = 1.0, (0.9, 0.99)
    config.train = ConfigDict(
        {"total": "20 epochs", "eval_every": "5 epochs", "checkpoint_every": "5 epochs", "precision": "bfloat16"}
    )
    config.eval = ConfigDict({"splits": ("test",)})
    if arg.debug:
        config.optim.warmup = "1 steps"
        config.data.options = ConfigDict({"n_train": 6, "n_val": 2, "n_test": 2})
        config.data.preprocess.spacing = (4.0, 4.0, 4.0)
        config.data.patch = (36, 32, 28)
        config.model.features = (8, 16)
        config.tasks.lesion.levels = 1
        config.train = ConfigDict(
            {"total": "4 steps", "log_every": "2 steps", "eval_every": "4 steps", "checkpoint_every": "4 steps"}
        )
    return config
