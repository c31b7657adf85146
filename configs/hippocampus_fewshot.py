"""Hippocampus from a handful of outlined cases and many that nobody outlined: five labels and a mean teacher.

Data: as `hippocampus.py`. Of the training patients, 180 by our `split.csv`, `labels` keep their outlines (which ones,
`seed` decides); the others are trained on without. docs/semi_supervised.md explains the keys, docs/few_labels.md
compares methods.

Arguments: `labels=5`, `method=mean_teacher` (or `fixmatch`, `cps`; `none` trains on the labelled cases alone), `debug`
(a few steps), `data=FOLDER`.
"""

from ml_collections import ConfigDict

from configs import hippocampus
from medjax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, debug=False, data="", labels=5, method="mean_teacher")
    config = hippocampus.get_config(",".join([*["debug"] * arg.debug, f"data={arg.data}"]))
    config.data.labelled = arg.labels
    # Half of every batch has labels, however few they are.
    config.data.sampling = ConfigDict({"labelled": 0.5})
    config.optim.ema = 0.99
    config.semi = ConfigDict({"method": arg.method, "weight": 1.0, "rampup": "300 steps", "ema": 0.99})
    # No choice of a checkpoint by the validation cases: those labels would be labels too.
    config.train = ConfigDict({"total": "800 steps", "eval_every": "800 steps", "checkpoint_every": "200 steps"})
    if arg.method == "none":
        config.semi.method, config.data.unlabelled, config.data.sampling.labelled = "", False, 0.0
    if arg.debug:
        config.semi.rampup = "4 steps"
        config.train = ConfigDict(
            {"total": "6 steps", "log_every": "2 steps", "eval_every": "6 steps", "checkpoint_every": "3 steps"}
        )
        config.train.eval_cases = 2
    return config
