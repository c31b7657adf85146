"""Brain tissues and tumour from few labelled cases, beginning from masked pretraining: fine-tunes configs/brain_mae.py.

Data: the synthetic brains of configs/brain_seg.py, of whose 24 training cases 6 keep their labels; the others were for
pretraining. Run configs/brain_mae.py first (with the same `debug`), or give another source: a run, one of its
checkpoints, or weights of `python -m medjax.convert` for this network. The whole network learns, the encoder's stages
slower the nearer they are to the image, and not before the heads have had a few steps.

With `peft=lora` the factors of a small change learn instead (4.9 % of the parameters), with `peft=probe` the head
alone; what is saved is that, and runs/brain_mae must stay. `scratch` begins at random, to compare.

Arguments: `debug` (a few small brains, a few steps), `source=FOLDER`, `labelled=6`, `peft=lora`, `scratch`.
"""

from ml_collections import ConfigDict

from medjax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, debug=False, source="", labelled=6, peft="", scratch=False)
    config = ConfigDict()
    config.data = ConfigDict(
        {
            "cohort": "synthetic_brain",
            "split": {"file": "split.csv"},
            "labelled": arg.labelled,
            "unlabelled": False,
            # As configs/brain_mae.py: the weights know images prepared so.
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
    if not arg.scratch:
        config.init = ConfigDict({"source": arg.source or ("runs/brain_mae_debug" if arg.debug else "runs/brain_mae")})
    config.peft = ConfigDict({"type": arg.peft, "rank": 4, "alpha": 8.0})
    config.optim = ConfigDict(
        {
            "name": "adamw",
            # Factors that begin at zero take larger steps than trained weights bear.
            "lr": 3e-3 if arg.scratch or not arg.peft else 1e-2,
            "weight_decay": 1e-2,
            "schedule": "cosine",
            "warmup": "20 steps",
            "ema": 0.99,
        }
    )
    if not arg.scratch and not arg.peft:
        config.optim.update({"layer_decay": 0.75, "decoder_first": "20 steps"})
    config.train = ConfigDict({"total": "300 steps", "eval_every": "100 steps", "checkpoint_every": "100 steps"})
    if arg.debug:
        config.optim.warmup = "2 steps"
        if "decoder_first" in config.optim:
            config.optim.decoder_first = "2 steps"
        config.data.labelled = 2
        config.data.options = ConfigDict({"n_train": 4, "n_val": 2, "n_test": 2, "spacing": 4.0})
        config.data.preprocess.spacing = (4.0, 4.0, 4.0)
        config.data.patch = (32, 32, 32)
        config.model.features = (8, 16, 32)
        config.train = ConfigDict(
            {"total": "12 steps", "log_every": "4 steps", "eval_every": "6 steps", "checkpoint_every": "6 steps"}
        )
    return config
