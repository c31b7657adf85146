"""The probability of a stroke from a brain's small-vessel disease, and a map of the tissue that speaks for it.

Data: 250 synthetic brains (160 train, 30 validation, 60 test; 3 mm) with white-matter lesions, lacunes and atrophy,
written on first use under the cache folder. Whether a stroke followed is drawn from a risk that is a formula of the
generator (`medjax/data/synthetic_stroke.py`), not a finding of medicine: this recipe shows how a map and a probability
are learnt together, and says nothing about patients.

An intensity threshold (`python -m benchmarks.threshold`) reaches a Dice of 0.23 for the tissue on the test cases, and
how many voxels lie beyond it an AUROC of 0.59 for the stroke; the network reaches 0.59 and 0.76. The risk itself, which
the generator knows, has an AUROC of 0.95, the volume of the lesions alone 0.86: with 160 patients to learn from, much
is left. Cost: 6 minutes on 2 cores, in bfloat16 on a CPU with AMX. See docs/benchmarks.md.

Arguments: `debug` (a few small brains, a few steps; under a minute).
"""

from ml_collections import ConfigDict

from medjax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, debug=False)
    config = ConfigDict()
    config.data = ConfigDict(
        {
            "cohort": "synthetic_stroke",
            "images": {"T1": "image", "T1c": "image", "T2": "image", "FLAIR": "image"},
            "modalities": ("T1", "T1c", "T2", "FLAIR"),
            "targets": {"suspicious": "mask", "stroke": "stroke"},
            "labels": {"suspicious tissue": 1},
            "split": {"column": "split"},
            "preprocess": {"spacing": (3.0, 3.0, 3.0), "crop": "nonzero", "normalize": "zscore_nonzero"},
            # The whole brain at once: what decides lies anywhere in it.
            "buckets": 1,
            "batch_size": 2,
        }
    )
    config.augment = ConfigDict(
        {
            "mirror": (0,),
            "brightness": {"p": 0.2, "std": 0.1},
            "contrast": {"p": 0.2},
            "noise": {"p": 0.2},
        }
    )
    config.model = ConfigDict({"name": "unet", "features": (12, 24, 48, 96), "levels": 3})
    config.tasks = ConfigDict(
        {
            "suspicious": {"type": "segmentation", "levels": 2, "batch_dice": True},
            "stroke": {
                "type": "classification",
                "problem": "binary",
                "names": ("no stroke", "stroke"),
                "weight": 0.3,
                # How much tissue is suspicious decides, and a mean after an instance norm does not tell how much.
                "pool": "share",
            },
        }
    )
    config.optim = ConfigDict(
        {"name": "adamw", "lr": 6e-3, "weight_decay": 1e-2, "schedule": "cosine", "warmup": "30 steps", "ema": 0.995}
    )
    config.optim.clip, config.optim.betas = 1.0, (0.9, 0.99)
    config.train = ConfigDict(
        {"total": "15 epochs", "eval_every": "5 epochs", "checkpoint_every": "5 epochs", "precision": "bfloat16"}
    )
    config.eval = ConfigDict({"splits": ("test",)})
    if arg.debug:
        config.optim.warmup = "1 steps"
        config.data.options = ConfigDict({"n_train": 6, "n_val": 2, "n_test": 2, "spacing": 6.0})
        config.data.preprocess.spacing = (6.0, 6.0, 6.0)
        config.model.features = (8, 16)
        config.tasks.suspicious.levels = 1
        config.train = ConfigDict(
            {"total": "4 steps", "log_every": "2 steps", "eval_every": "4 steps", "checkpoint_every": "4 steps"}
        )
    return config
