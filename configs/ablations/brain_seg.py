"""What the parts of `configs/brain_seg.py` are worth: loss, augmentation, deep supervision, width, backbone.

    python -m launch.sweep --config=configs/ablations/brain_seg.py --seeds=3

Thirteen variants of one recipe, `base` first, each with the same cases, patches and steps. `runs/sweeps/` then holds
every run and the comparison. Cost: about 8 minutes a run and seed on 2 CPU cores for the widths of the recipe (`wide`
three times that).

Arguments: `debug` (tiny brains, a few steps: it shows that every variant runs, not what it is worth); `backbone=NAME`.
"""

from ml_collections import ConfigDict

from configs import brain_seg
from medjax.config import parse_arg

# name -> options of `config.model`, about as many features a level as the recipe's U-Net.
BACKBONES = {
    "unet": {},
    "resenc": {"features": (16, 32, 64, 128), "blocks": (1, 3, 4, 6), "decoder_convs": 1},
    "mednext": {"features": 16, "blocks": (2, 2, 2, 2), "expansions": (2, 3, 4, 4)},
    "swin_unetr": {"features": 12, "heads": (3, 6, 12, 24)},
}
TINY = {
    "unet": {},
    "resenc": {"features": (4, 8, 8), "blocks": (1, 1, 1), "decoder_convs": 1},
    "mednext": {"features": 4, "blocks": (1, 1, 1), "expansions": (2, 2, 2)},
    "swin_unetr": {"features": 6, "depths": (1, 1), "heads": (1, 2), "window": (2, 2, 2)},
}


def get_config(arg=None):
    arg = parse_arg(arg, debug=False, backbone="unet")
    config = brain_seg.get_config("debug" if arg.debug else None)
    config.eval = ConfigDict({"splits": ("test",), "predictions": False, "pictures": False})
    if arg.backbone != "unet":
        options = (TINY if arg.debug else BACKBONES)[arg.backbone]
        config.model = ConfigDict({"name": arg.backbone, "levels": config.model.levels, **options})
    elif arg.debug:
        config.model.features = (4, 8, 8)
    if arg.debug:
        config.data.options = ConfigDict({"n_train": 2, "n_val": 1, "n_test": 6, "spacing": 8.0})
        config.data.preprocess.spacing = (8.0, 8.0, 8.0)
        config.data.patch = (16, 16, 16)
        config.train = ConfigDict(
            {"total": "4 steps", "log_every": "2 steps", "eval_every": "4 steps", "checkpoint_every": "2 steps"}
        )
    return config


def sweep(arg=None):
    """The variants: what each changes, and the recipe's argument where a backbone is chosen."""
    debug = parse_arg(arg, debug=False).debug
    lead = "debug," if debug else ""
    features = (4, 8, 8) if debug else (16, 32, 64, 128)
    off = {f"augment.{name}.p": 0.0 for name in ("brightness", "contrast", "gamma", "noise")}
    return [
        {"name": "base"},
        {"name": "loss_ce", "overrides": {"tasks.brain.dice": 0.0}},
        {"name": "loss_dice", "overrides": {"tasks.brain.ce": 0.0}},
        {"name": "loss_focal", "overrides": {"tasks.brain.voxelwise": "focal"}},
        {"name": "loss_top_k", "overrides": {"tasks.brain.voxelwise": "top_k"}},
        {"name": "augment_none", "overrides": {"augment.mirror": (), **off}},
        {"name": "augment_nnunet", "overrides": {"augment.policy": "nnunet", **off}},
        {"name": "no_deep_supervision", "overrides": {"tasks.brain.levels": 1, "model.levels": 1}},
        {"name": "narrow", "overrides": {"model.features": tuple(f // 2 for f in features)}},
        {"name": "wide", "overrides": {"model.features": tuple(f * 2 for f in features)}},
        *({"name": name, "arg": f"{lead}backbone={name}"} for name in BACKBONES if name != "unet"),
    ]
