"""`python -m medjax.main --config=configs/brain_seg.py`: trains, then evaluates. Flags and dispatch only."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from medjax import processes, runtime
from medjax.errors import UserError, run_program

if TYPE_CHECKING:
    from ml_collections import ConfigDict

EPILOG = """Any key of the configuration is set with --config.KEY=VALUE, for example
  python -m medjax.main --config=configs/brain_seg.py --config.optim.lr=0.02 --config.train.total='20 epochs'
A run that was interrupted goes on from its newest checkpoint when the same command is given again."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m medjax.main", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawTextHelpFormatter
    )
    p.add_argument("--config", required=True, metavar="FILE[:ARG]", help="recipe, such as configs/brain_seg.py:debug")
    p.add_argument("--workdir", type=Path, help="where results go (default: runs/<config name>)")
    p.add_argument("--coordinator", metavar="HOST:PORT", help="of several processes: where process 0 listens")
    p.add_argument("--processes", type=int, metavar="N", help="how many there are (SLURM and TPU pods tell themselves)")
    p.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")
    p.add_argument("--mode", choices=("train", "eval"), default="train", help="eval: only evaluate the best checkpoint")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one job; raises UserError for a user's mistake."""
    args, rest = parser().parse_known_args(argv)
    overrides = []
    for text in rest:
        if not text.startswith("--config."):
            raise UserError(f"unknown argument '{text}'; see --help")
        overrides.append(text.removeprefix("--config."))

    from medjax import config as config_lib
    from medjax import models, tasks

    options = {"model": models.options, "tasks": tasks.options}
    config = config_lib.load(args.config, overrides, lambda room, kind: options[room](kind))
    variant = args.config.partition(":")[2]
    name = config.name + "".join(f"_{c}" if i == 0 else c for i, c in enumerate(filter(str.isalnum, variant)))
    workdir = args.workdir or Path("runs") / name

    processes.start(args.coordinator, args.processes, args.process)
    processes.program(lambda: run(config, workdir, args.mode))()


def run(config: ConfigDict, workdir: Path, mode: str) -> None:
    """Trains (unless mode is 'eval') and evaluates, in this process and those beside it."""
    from medjax import config as config_lib
    from medjax import evaluate, logging, train

    processes.agree(config_lib.to_json(config))
    if not processes.primary():
        logging.leave_to_another()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{workdir}: cannot make the run folder: {error.strerror}") from error
    if mode == "train":
        train.train(config, workdir)
    evaluate.evaluate(workdir, config)


if __name__ == "__main__":
    runtime.ensure_tuned_allocator()
    run_program(main)
