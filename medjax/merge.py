"""Makes a run that holds a change of other weights (`config.peft`) one that needs nothing beside it.

    python -m medjax.merge --run=runs/brain_finetune --to=runs/brain_merged

The new run holds the one checkpoint that is evaluated, its parameters whole: the same arrays that prediction puts
together. `medjax.predict`, `medjax.select` and `init.source` take it as any other run. Low-rank changes are in the
kernels then; adapters and prompt tokens, which are no change of weights, stay in the network. It is not resumed:
`medjax.main` refuses to train in it.
"""

from __future__ import annotations

from medjax import runtime

if __name__ == "__main__":
    runtime.ensure_tuned_allocator()  # starts anew, so before JAX is imported

import argparse
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medjax import checkpoint, measures, peft, transfer
from medjax import config as config_lib
from medjax.errors import UserError, run_program, write_atomic
from medjax.logging import say
from medjax.models import adapters
from medjax.predict import BASE


def merge(run: Path, to: Path, *, kind: str = "best", base: str = "") -> tuple[int, int]:
    """Writes the checkpoint of `run` that would be evaluated to the new folder `to`, whole; (its step, parameters).

    Args:
      kind: 'best' or 'latest'; without a best one the latest is taken. base: as of `predict.Run`.

    Raises:
      UserError: the run needs nothing beside it, or what it needs is not there; `to` is a file, or not empty.
    """
    if to.exists() and not to.is_dir():
        raise UserError(f"{to}: is a file; choose another --to")
    if to.exists() and any(to.iterdir()):
        raise UserError(f"{to}: is not empty; choose another --to")
    with checkpoint.Checkpoints(checkpoint.require(run), read_only=True) as checkpoints:
        kind = kind if checkpoints.newest(kind) is not None else "latest"
        step = checkpoints.newest(kind)
        if step is None:
            raise UserError(f"{run}: holds no complete checkpoint; train it first")
        if not checkpoints.divided(kind, step):
            raise UserError(f"{run}: holds all of its parameters already; there is nothing to merge")
        whole = transfer.whole_parameters(checkpoints, kind, step, run, base)
        meta = {key: value for key, value in checkpoints.meta(kind, step).items() if key != "base"}
    meta["merged"] = str(run)
    config = config_lib.from_json(meta["config"])
    config.init.source = ""
    if config.peft.type not in adapters.KINDS:
        config.peft.type, config.peft.targets, config.peft.train = "", (), ("heads",)
    meta["config"] = json.loads(config_lib.to_json(config))
    to.mkdir(parents=True, exist_ok=True)
    made = checkpoint.Checkpoints(to)
    made.save("best", step, {"step": np.int32(step), "params": peft.nest(whole), "average": None}, meta)
    made.close()
    write_atomic(to / "config.json", config_lib.to_json(config) + "\n")
    if (run / measures.FILE).is_file():
        shutil.copyfile(run / measures.FILE, to / measures.FILE)
    return step, sum(math.prod(array.shape) for array in whole.values())


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m medjax.merge", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    p.add_argument("--run", type=Path, required=True, help="folder of a trained run")
    p.add_argument("--to", type=Path, required=True, help="folder of the new run")
    p.add_argument("--checkpoint", choices=("best", "latest"), default="best")
    p.add_argument("--base", default="", metavar="FOLDER", help=BASE)
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Merges; raises UserError for a user's mistake."""
    args = parser().parse_args(argv)
    step, count = merge(args.run, args.to, kind=args.checkpoint, base=args.base)
    say(f"step {step} of {args.run}, {count:,} parameters, written to {args.to}")


if __name__ == "__main__":
    run_program(main)
