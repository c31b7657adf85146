"""What few labels need: hippocampus from 3, 5, 10, 20 or 180 outlined cases, by nine ways, in equal time.

    python -m benchmarks.few_labels                                  # pretraining, all runs, table and curves; hours
    python -m benchmarks.few_labels --config=configs/ablations/few_labels.py:labels=5,arms=scratch+mae --seeds=1

Every arm has `seconds` of training steps in all. Steps are counted, not timed, so that a run can be repeated: their
number is `seconds` over `step`, what a step of `scratch` takes, times the arm's `COST`; `--calibrate` of
`python -m benchmarks.few_labels` measures both in the precision of the runs and prints them as they stand below. Arms
that begin from pretraining spend `pretrain` of their seconds on it, in full each, though all of them share one. The
validation cases are looked at once, after the last step.

The network is half as wide as that of `hippocampus.py`, its patches are smaller, and it computes in bfloat16: labels
are to be what is short, not steps.

| arm | |
|---|---|
| `scratch` | the labelled cases alone |
| `synthseg` | images painted from their label maps (Billot et al. 2023), outside of the labels by the image |
| `synthseg_half` | half of the examples painted |
| `mean_teacher` | the other training cases too, without labels; teacher and student are compared by their overlap |
| `mae` | begun from a masked autoencoder of all 180 training images and of brains of other contrasts |
| `mae_mean_teacher` | both |
| `lora` | begun likewise; low-rank changes of the network, its norms and biases and a new head train, in larger steps |
| `probe`, `probe_random` | the encoder stays as pretrained, or as drawn at random; decoder and head are trained |

Arguments: `labels=3+5+10+20+180`, `arms=scratch+mae+...`, `seconds=60`, `step=0.052`, `pretrain=0.33`, `width=8`,
`pretrained=FOLDER` (with `{seed}`), `data=FOLDER` (beside it lies `brain_unlabelled`), `arm=NAME` (one of the arms, or
`pretrain`), `debug` (a few steps).
"""

import os

from ml_collections import ConfigDict

from configs import hippocampus
from medjax.config import parse_arg
from medjax.errors import UserError

# Seconds of a step of `scratch`, and what one of each arm takes relative to it. Of `--calibrate`: median of steps 11 to
# 60, bfloat16, width 8, batch 4; Intel Xeon with AMX, 2 cores, jax 0.10.2. Arms that compute the same have their mean.
STEP = 0.052
COST = {
    "pretrain": 1.53,
    "scratch": 1.0,
    "synthseg": 1.23,
    "synthseg_half": 1.11,
    "mean_teacher": 1.31,
    "mean_teacher_all": 1.61,  # both arms with a teacher, of 180 labels: it teaches all rows
    "mae": 1.0,
    "mae_mean_teacher": 1.31,
    "lora": 1.07,
    "probe": 0.77,
    "probe_random": 0.77,
}
ARMS = tuple(arm for arm in COST if arm not in ("pretrain", "mean_teacher_all"))
PRETRAINED = ("mae", "mae_mean_teacher", "lora", "probe")
ALL = 180  # training cases
OUT = "runs/few_labels"
# What is outside the labels is never one tissue, and never black: painted by the image's intensities, in four.
OUTSIDE = {"background": 0.0, "clusters": 4}
PAINTED = {
    "synthseg": (("synthseg", {"mirror": (0,), **OUTSIDE}),),
    "synthseg_half": (
        ("mirror", {"axes": (0,)}),
        ("affine", {"p": 0.5, "rotate": 15.0, "scale": 0.15}),
        ("elastic", {"p": 0.5, "points": 8, "std": (0.0, 3.0)}),
        ("paint", {"p": 0.5, "mean": (0.1, 0.9), "std": (0.02, 0.1), **OUTSIDE}),
        ("bias", {"p": 0.5, "std": 0.5, "points": 6}),
        ("gamma", {"p": 0.3}),
        ("noise", {"p": 0.1}),
        ("standardize", {}),
    ),
}
# Of the volumes (35 x 50 x 36 on average) 97 % of such a patch is filled, of the 40 x 56 x 40 of `hippocampus.py` 69 %.
PATCH = (32, 48, 32)
ENCODER = r"backbone/(encoder|down)\d+.*"


def read(arg):
    values = parse_arg(
        arg,
        debug=False,
        data="",
        arm="scratch",
        arms="+".join(ARMS),
        labels="3+5+10+20+180",
        seconds=60.0,
        step=STEP,
        width=8,
        pretrain=0.33,
        pretrained=f"{OUT}/pretrained/seed{{seed}}",
    )
    for number in values.labels.split("+"):
        if number not in map(str, range(1, ALL + 1)):
            raise UserError(f"config: argument 'labels={values.labels}': '{number}' is no number from 1 to {ALL} (all)")
    return values


def get_config(arg=None):
    arg = read(arg)
    config = hippocampus.get_config(f"data={arg.data}" if arg.data else None)
    labels = int(arg.labels.split("+")[0])
    share = arg.pretrain if arg.arm == "pretrain" else 1 - arg.pretrain if arg.arm in PRETRAINED else 1.0
    all_rows = labels >= ALL and arg.arm in ("mean_teacher", "mae_mean_teacher")
    cost = COST["mean_teacher_all" if all_rows else arg.arm]
    steps = 4 if arg.debug else max(1, round(share * arg.seconds / (arg.step * cost)))
    every = f"{steps} steps"
    config.train = ConfigDict(
        {"total": every, "eval_every": every, "checkpoint_every": every, "log_every": f"{max(1, steps // 10)} steps"}
    )
    config.train.eval_cases, config.train.precision = 1, "bfloat16"
    config.optim.warmup = f"{steps // 10} steps"
    config.eval = ConfigDict({"splits": ("val",), "mirror": (0,), "predictions": False, "pictures": False})
    config.model.features = tuple(arg.width * 2**i for i in range(4))
    if arg.debug:
        config.model.features = (4, 8, 16)
        config.data.patch = (24, 24, 24)
    else:
        config.data.patch = PATCH
    if arg.arm == "pretrain":
        return pretraining(config, arg)
    config.data.labelled, config.data.unlabelled = (0 if labels >= ALL else labels), False
    if arg.arm in PRETRAINED:
        config.init = ConfigDict({"source": arg.pretrained, "which": "latest"})
    if arg.arm in ("mae", "mae_mean_teacher"):  # as in `brain_finetune.py`
        config.optim.update({"layer_decay": 0.75, "decoder_first": f"{steps // 40} steps"})
    if arg.arm in ("probe", "probe_random"):
        config.optim.rules = (
            (ENCODER, {"lr": 0.0}),
            (r".*/kernel", {"lr": 1.0, "decay": 1.0}),
            (r".*", {"lr": 1.0, "decay": 0.0}),
        )
    if arg.arm == "probe":  # what is compared is the encoder: both decoders begin at random
        config.init.skip = (r"backbone/(decoder|up)\d+.*",)
    if arg.arm in ("mean_teacher", "mae_mean_teacher"):
        config.data.unlabelled, config.data.sampling = True, ConfigDict({"labelled": 0.5 if labels < ALL else 0.0})
        config.semi = ConfigDict({"method": "mean_teacher", "weight": 1.0, "rampup": f"{2 * steps // 5} steps"})
        config.semi.cases = "unlabelled" if labels < ALL else "all"
        config.semi.loss = "dice"  # the hippocampus is 5 % of a volume
    if arg.arm in ("synthseg", "synthseg_half"):
        config.augment = ConfigDict({"transforms": PAINTED[arg.arm]})
    if arg.arm == "lora":
        lora(config)
    return config


def pretraining(config, arg):
    """Every training image of the cohort and the brains that lie beside it; the whole network is pretrained."""
    brains = os.path.join(os.path.dirname(config.data.cohort), "brain_unlabelled")
    config.data.extra = ConfigDict({"folder": brains, "modality": "MRI"})
    config.data.skip_unreadable, config.data.foreground = True, 0.0
    config.augment = ConfigDict({"mirror": (0,), "affine": {"p": 0.3, "rotate": 15.0, "scale": 0.15}})
    config.tasks = ConfigDict({"mae": {"type": "masked", "block": (8, 8, 8), "ratio": 0.6, "decoder": "backbone"}})
    config.optim.ema = 0.0
    return config


def lora(config):
    """At most 5 % of the parameters: low-rank changes of the blocks' and `up` kernels; head, norms and biases in full.

    Factors that begin at zero take larger steps than trained weights bear, as in `brain_finetune.py`.
    """
    config.optim.lr = 1e-2
    config.peft = ConfigDict({"type": "lora", "rank": 2, "alpha": 4.0})
    config.peft.targets = (r"backbone/(encoder|decoder)\d+/.*/kernel", r"backbone/up\d+/kernel")
    config.peft.train = ("heads", r"backbone/.*/(scale|bias)")


def sweep(arg=None):
    """A variant an arm and number of labels; `scratch` first, number by number."""
    given = read(arg)
    passed = ("data", "seconds", "step", "width", "pretrain", "pretrained")
    flags = [f"{key}={given[key]}" for key in passed if given[key] != ""]
    flags += ["debug"] if given.debug else []
    return [
        {"name": f"{arm}_{labels}", "arg": ",".join([f"arm={arm}", f"labels={labels}", *flags])}
        for labels in given.labels.split("+")
        for arm in given.arms.split("+")
    ]
