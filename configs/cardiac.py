r"""Right ventricle, myocardium and left ventricle from cine MR: ACDC (Bernard et al., IEEE TMI 2018), thick slices.

Data: found at `data=` or else at `MEDJAX_DATA`/cardiac_acdc or ../shared/data/cardiac_acdc, in one of two layouts. As
we keep it: `images/patient001_frame01.nii.gz` (end-diastole) and `images/patient001_frame02.nii.gz` (end-systole),
masks of the same names in `labels/`, and `patients.csv` (columns patient, group). As published, `data=.../training`:
`patient001/patient001_frame12.nii.gz`, its mask `patient001/patient001_frame12_gt.nii.gz`; which frame is which stands
in every patient's `Info.cfg`, and has to be in a `patients.csv` beside the patients' folders. Make it once, there:

    (echo patient,group,ED,ES; for p in patient*/; do p=${p%/}; awk -F'[: \r]+' -v p="$p" \
      '{v[$1]=$2} END {print p "," v["Group"] "," v["ED"] "," v["ES"]}' "$p/Info.cfg"; done) > patients.csv

One fold of four is held out, by patient. Of the 32 patients of our folder, 074 and 076 share an image; both are in the
part trained on.

Measured of every patient: volumes of both ventricles, ejection fractions, stroke volumes, myocardial mass, the wall;
from them one of five diagnoses, by a rule learnt from the training patients' reference masks (docs/measures.md). Pixels
are nominally 1.5 mm and slices 10 mm apart in all of our files: millilitres are only as good as that, ejection
fractions and the diagnosis do not hang on it. Files as published have their own distances, which are read.

The first stages convolve and halve in plane alone: slices are 10 mm apart, pixels 2 mm.

Score: mean validation Dice 0.88 (RV 0.88, myocardium 0.86, LV 0.91) on 8 patients, 16 volumes; mean absolute error of
the LV's ejection fraction 5.0 points, 7 of 8 diagnoses right. Cost: 10.5 minutes in all on 2 idle cores, in bfloat16
on a CPU with AMX. See docs/benchmarks.md.

Arguments: `debug` (a few steps), `data=FOLDER`.
"""

import os

from ml_collections import ConfigDict

from medjax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, debug=False, data="")
    config = ConfigDict()
    cohort = arg.data or os.path.join(os.environ.get("MEDJAX_DATA", "../shared/data"), "cardiac_acdc")
    config.data = ConfigDict(
        {
            "cohort": cohort,
            "layout": "folder",
            "images": {"MR": "images/{patient}_{frame}.nii.gz"},
            "targets": {"heart": "labels/{patient}_{frame}.nii.gz"},
            "labels": {"RV": 1, "myocardium": 2, "LV": 3},
            "group": "{patient}",
            "table": "patients.csv",
            "split": {"folds": 4, "fold": 1},
            "preprocess": {"spacing": (2.0, 2.0, 10.0), "normalize": "zscore"},
            "patch": (128, 128, 8),
            "batch_size": 4,
            "foreground": 0.33,
        }
    )
    config.augment = ConfigDict(
        {
            "affine": {"p": 0.5, "rotate": 25.0, "scale": 0.2},
            "brightness": {"p": 0.15},
            "contrast": {"p": 0.15},
            "gamma": {"p": 0.3},
            "noise": {"p": 0.1},
        }
    )
    config.model = ConfigDict(
        {
            "name": "unet",
            "features": (16, 32, 64, 128, 128),
            "factors": ((2, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 1)),
            "kernels": ((3, 3, 1), (3, 3, 1), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
            "levels": 3,
        }
    )
    config.tasks = ConfigDict({"heart": {"type": "segmentation", "levels": 3}})
    config.optim = ConfigDict(
        {"name": "adamw", "lr": 3e-3, "weight_decay": 1e-2, "schedule": "cosine", "warmup": "50 steps", "ema": 0.997}
    )
    config.train = ConfigDict(
        {"total": "1300 steps", "eval_every": "650 steps", "checkpoint_every": "325 steps", "precision": "bfloat16"}
    )
    config.eval = ConfigDict({"splits": ("val",)})
    config.measures = ConfigDict(
        {
            # As the data's README declares them.
            "frames": {"ED": "{patient}_frame01", "ES": "{patient}_frame02"},
            # ACDC's left ventricles lie in rings of myocardium alone; a network may call the atrium above so.
            "formulas": {
                "lv_edv_ml": "enclosed(LV, myocardium, ED)",
                "lv_esv_ml": "enclosed(LV, myocardium, ES)",
                "lv_sv_ml": "lv_edv_ml - lv_esv_ml",
                "lv_ef_percent": "100 * lv_sv_ml / lv_edv_ml",
                "rv_edv_ml": "volume(RV, ED)",
                "rv_esv_ml": "volume(RV, ES)",
                "rv_sv_ml": "rv_edv_ml - rv_esv_ml",
                "rv_ef_percent": "100 * rv_sv_ml / rv_edv_ml",
                "mass_g": "1.05 * volume(myocardium, ED)",
                "wall_mm": "quantile(thickness(myocardium, LV, ED), 0.95)",
                "lv_radius_mm": "max(slices(radius(myocardium, LV, ED)))",
                "log_rv_to_lv": "log(rv_edv_ml / lv_edv_ml)",
                "log_wall_to_radius": "log(mean(thickness(myocardium, LV, ED)) / mean(radius(myocardium, LV, ED)))",
            },
            "report": (
                "lv_ef_percent", "lv_edv_ml", "lv_esv_ml", "lv_sv_ml", "rv_ef_percent", "rv_edv_ml", "rv_esv_ml",
                "rv_sv_ml", "mass_g", "wall_mm",
            ),
            # Nothing that hangs on the distance of the slices, which these files have lost.
            "diagnosis": {
                "column": "group",
                "measures": (
                    "lv_ef_percent", "rv_ef_percent", "log_rv_to_lv", "log_wall_to_radius", "lv_radius_mm", "wall_mm",
                ),
            },
        }
    )  # fmt: skip
    inside = os.listdir(cohort) if os.path.isdir(cohort) else ()
    if any(os.path.exists(os.path.join(cohort, name, "Info.cfg")) for name in inside):  # as published
        config.data.images.MR = "{patient}/{patient}_frame{frame}.nii.gz"
        config.data.targets.heart = "{patient}/{patient}_frame{frame}_gt.nii.gz"
        config.data.id = "{patient}_frame{frame}"
        config.measures.frames = {"ED": "{patient}_frame{ED:02}", "ES": "{patient}_frame{ES:02}"}
    if arg.debug:
        config.optim.warmup = "2 steps"
        config.data.patch = (64, 64, 8)
        config.model.features = (8, 8, 16, 16, 16)
        config.train = ConfigDict(
            {"total": "6 steps", "log_every": "2 steps", "eval_every": "3 steps", "checkpoint_every": "3 steps"}
        )
    return config
