"""Lung nodules in CT: where, how large (mm), outlined, how solid, and whether malignant, by one network.

Data: canvases of 96³ mm with nodules of LIDC-IDRI at random places, beside vessels, airways, chest walls and lung
tissue without nodules (`medjax/data/synthetic_lung.py`), written on first use under the cache folder. The nodules are
read from `data=`, or else from `MEDJAX_DATA`/lung_nodules or ../shared/data/lung_nodules. Malignancy: ratings above 3
against ratings below; nodules rated 3 have no label. A quarter of the nodules, by a hash of their names, is shown on
the test canvases alone.

Score (mean of seeds 0, 1 and 2, 30 test canvases each): CPM 0.81, AUROC of malignancy 0.89 (of the nodules that were
found), Dice of the outline over whole canvases 0.59, 0.78 for a nodule that was outlined at all. An intensity threshold
(`python -m benchmarks.threshold`, seed 0): CPM 0.18, Dice 0.10. Cost: 20 minutes on 2 idle cores, in bfloat16 on a CPU
with AMX. See docs/benchmarks.md.

Arguments: `debug` (a few steps on a few canvases, under a minute), `data=FOLDER`, `seed=N` (holds out quarter N mod 4).
"""

from ml_collections import ConfigDict

from medjax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, debug=False, data="", seed=0)
    config = ConfigDict({"seed": arg.seed})
    config.data = ConfigDict(
        {
            "cohort": "synthetic_lung",
            "options": {"data": arg.data, "held_out": arg.seed % 4, "seed": arg.seed},
            "images": {"CT": "image"},
            "targets": {"outline": "mask", "nodules": "nodules"},
            "labels": {"nodule": 1},
            "split": {"column": "split"},
            "preprocess": {"normalize": "ct"},
            "patch": (40, 40, 40),
            "batch_size": 8,
            "foreground": 0.67,
        }
    )
    config.augment = ConfigDict(
        {
            "mirror": (0, 1, 2),
            "brightness": {"p": 0.3, "std": 0.1},
            "contrast": {"p": 0.3},
            "gamma": {"p": 0.3},
            "noise": {"p": 0.2},
        }
    )
    config.model = ConfigDict({"name": "unet", "features": (16, 32, 64, 128), "levels": 3})
    config.model.convs, config.model.decoder_convs = (1, 2, 2, 2), (2, 2, 2)
    config.tasks = ConfigDict(
        {
            "outline": {"type": "segmentation", "levels": 3, "batch_dice": True, "lesions": True},
            "nodules": {
                "type": "detection",
                "names": ("nodule",),
                "attributes": (("malignant", "binary"), ("texture", "number"), ("spiculation", "number")),
                "weight": 0.2,
                "heat": "bce_mse",
                "spread": 0.2,
                "level": 1,
                # The curve of sensitivity over false findings needs the doubtful ones too.
                "score_from": 0.01,
            },
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
            "warmup": "50 steps",
            "ema": 0.997,
        }
    )
    config.train = ConfigDict(
        {
            "total": "4000 steps",
            "eval_every": "1000 steps",
            "checkpoint_every": "500 steps",
            "precision": "bfloat16",
        }
    )
    # An outline that no finding confirms is a vessel or the wall; the score is chosen on the validation canvases.
    config.eval = ConfigDict({"splits": ("test",), "confirm": {"outline": {"by": "nodules", "score": 0.3}}})
    if arg.debug:
        config.optim.warmup = "2 steps"
        config.data.options.update({"n_train": 6, "n_val": 2, "n_test": 2, "size": 64})
        config.data.patch, config.data.batch_size = (32, 32, 32), 2
        config.model.features, config.model.convs, config.model.decoder_convs = (8, 16), (1, 1), (1,)
        config.train = ConfigDict(
            {"total": "8 steps", "log_every": "2 steps", "eval_every": "4 steps", "checkpoint_every": "4 steps"}
        )
    return config
