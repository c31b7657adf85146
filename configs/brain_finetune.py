"""Brain tissues and tumour from few labelled cases, beginning from masked pretraining: fine-tunes configs/brain_mae.py.

Data: the synthetic brains of configs/brain_seg.py, of whose 24 training cases 6 keep their labels; the others were for
pretraining. Run configs/brain_mae.py first (with the same `debug`; with other arguments and --workdir=runs/brain_mae),
or give another `source=`: a run, one of its checkpoints, or weights of `python -m medjax.convert` for this network. The
whole network learns, the encoder's stages slower the nearer they are to the image, and not before the heads have had a
few steps. Weights that saw other contrasts, such as the one of `brain_mae.py:data=FOLDER`, are averaged over channels.

With `peft=lora` the factors of a small change learn instead (4.9 % of the parameters), with `peft=probe` the head
alone; what is saved is that, and runs/brain_mae must stay. `scratch` begins at random, to compare.

Score: mean test Dice 0.78, from random weights 0.80, LoRA 0.76 (6 cases, one seed: no difference shown); the head alone
0.36. Cost: 3:30 minutes on 2 CPU cores, float32. See docs/benchmarks.md.

Arguments: `debug` (a few small brains, a few steps), `source=FOLDER`, `labelled=6`, `peft=lora`, `scratch`.
"""

from ml_collections import ConfigDict

from configs import brain_seg
from medjax.config import parse_arg


def get_config(arg=None):
    arg = parse_arg(arg, debug=False, source="", labelled=6, peft="", scratch=False)
    # Cohort, preparation and network are those of configs/brain_mae.py too: the weights know images prepared so.
    config = brain_seg.get_config("debug" if arg.debug else None)
    config.data.labelled, config.data.unlabelled = 2 if arg.debug else arg.labelled, False
    if not arg.scratch:
        config.init = ConfigDict({"source": arg.source or ("runs/brain_mae_debug" if arg.debug else "runs/brain_mae")})
        config.init.channels = "average"  # of a folder's one contrast; those of the same four are taken as they are
    config.peft = ConfigDict({"type": arg.peft, "rank": 4, "alpha": 8.0})
    # Factors that begin at zero take larger steps than trained weights bear.
    config.optim.lr = 3e-3 if arg.scratch or not arg.peft else 1e-2
    if not arg.scratch and not arg.peft:
        config.optim.update({"layer_decay": 0.75, "decoder_first": "2 steps" if arg.debug else "20 steps"})
    if not arg.debug:
        config.train = ConfigDict({"total": "300 steps", "eval_every": "100 steps", "checkpoint_every": "100 steps"})
    return config
