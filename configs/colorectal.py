"""Polyps and tumours in CT colonography: where, how large (mm), and of which shape.

Data: 176 drawn pieces of colon (120 train, 16 validation, 40 test; 1.5 mm), written on first use under the cache folder
(`medjax/data/synthetic_colon.py`). They are no patients: polyps are sessile, pedunculated or flat by construction, and
lie among folds and stool of their own intensity.

An intensity threshold (`python -m benchmarks.threshold`) reaches a CPM of 0.08 on the test cases; the network 0.84
(polyps 0.69, tumours 1.00), AUROC 0.994 for pedunculated and 0.94 for flat polyps. Cost: 7.5 minutes on 2 cores, in
bfloat16 on a CPU with AMX. See docs/benchmarks.md.

Arguments: `debug` (a few pieces, a few steps; under a minute).
"""

from ml_collections import ConfigDict

from medjax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, debug=False)
    config = ConfigDict()
    config.data = ConfigDict(
        {
            "cohort": "synthetic_colon",
            "images": {"CT": "image"},
            "targets": {"lesions": "lesions"},
            "split": {"column": "split"},
            "preprocess": {"normalize": "percentile"},
            "patch": (40, 40, 40),
            "batch_size": 8,
            "foreground": 0.67,
        }
    )
    config.augment = ConfigDict(
        {"mirror": (0, 1, 2), "noise": {"p": 0.2}, "brightness": {"p": 0.2, "std": 0.05}, "contrast": {"p": 0.2}}
    )
    config.model = ConfigDict({"name": "unet", "features": (12, 24, 48, 96), "levels": 2})
    config.tasks = ConfigDict(
        {
            "lesions": {
                "type": "detection",
                "names": ("polyp", "tumour"),
                "attributes": (("pedunculated", "binary"), ("flat", "binary")),
                "heat": "bce_mse",
                "spread": 0.2,
                "level": 1,
                # The curve of sensitivity over false findings needs the doubtful ones too.
                "score_from": 0.01,
            }
        }
    )
    config.optim = ConfigDict(
        {
            "name": "adamw",
            "lr": 5e-3,
            # The first gradients of a heat map are a hundred times the later ones; Adam must forget them soon.
            "betas": (0.9, 0.99),
            "clip": 1.0,
            "weight_decay": 1e-2,
            "schedule": "cosine",
            "warmup": "30 steps",
            "ema": 0.995,
        }
    )
    config.train = ConfigDict(
        {"total": "2400 steps", "eval_every": "600 steps", "checkpoint_every": "600 steps", "precision": "bfloat16"}
    )
    config.eval = ConfigDict({"splits": ("test",)})
    if arg.debug:
        config.optim.warmup = "1 steps"
        config.data.options = ConfigDict({"n_train": 6, "n_val": 2, "n_test": 2})
        config.data.preprocess.spacing = (3.0, 3.0, 3.0)
        config.data.patch, config.data.batch_size = (32, 32, 32), 2
        config.model.features = (8, 16)
        config.train = ConfigDict(
            {"total": "4 steps", "log_every": "2 steps", "eval_every": "4 steps", "checkpoint_every": "4 steps"}
        )
    return config
