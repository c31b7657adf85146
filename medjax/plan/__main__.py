"""`python -m medjax.plan COHORT --budget=8GB`: a plan and a recipe for a cohort. Flags and dispatch only."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from medjax import runtime
from medjax.errors import UserError, run_program

LIKE = ("nnunet", "nnunet-resenc-m", "nnunet-resenc-l", "nnunet-resenc-xl")
EPILOG = """Any key of the configuration is set with --config.KEY=VALUE and then stays, for example
  python -m medjax.plan scans/ --budget=8GB --config.data.preprocess.spacing='(1,1,1)' --config.model.features='(16,)'
(of model.features, the first number is taken: channels of the finest stage). The recipe that is written runs with
  python -m medjax.main --config=plans/scans/config.py"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m medjax.plan", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawTextHelpFormatter
    )
    p.add_argument("cohort", nargs="?", help="a folder or a table of cases, as data.cohort")
    p.add_argument("--config", metavar="FILE[:ARG]", help="a recipe to plan for, instead of or beside COHORT")
    p.add_argument("--budget", help="memory of one device for the training step, such as 8GB or 24GiB")
    p.add_argument("--device", choices=("gpu", "cpu"), help="what it will train on (default: a GPU if there is one)")
    p.add_argument("--like", choices=LIKE, help="nnU-Net's own estimate instead of the compiler's figures")
    p.add_argument("--out", type=Path, help="folder for plan.json and config.py (default: plans/<name>)")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Plans; raises UserError for a user's mistake."""
    args, rest = parser().parse_known_args(argv)
    overrides = []
    for text in rest:
        if not text.startswith("--config."):
            raise UserError(f"unknown argument '{text}'; see --help")
        overrides.append(text.removeprefix("--config."))
    if not args.cohort and not args.config:
        raise UserError("name a cohort (a folder or a table of cases) or a recipe: python -m medjax.plan COHORT")
    if not args.budget and not args.like:
        raise UserError("--budget is missing: the memory of one device, such as --budget=8GB (or --like=nnunet)")
    if args.device == "cpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")

    from medjax import config as config_lib
    from medjax import models, tasks
    from medjax.logging import say
    from medjax.plan import memory, planner, recipe

    budget = memory.parse_budget(args.budget) if args.budget else None
    cohort = args.cohort
    if cohort and Path(cohort).expanduser().exists():
        cohort = str(Path(cohort).expanduser().resolve())
    device, kind, exact = memory.find_device(args.device)
    kinds = {"model": models.options, "tasks": tasks.options}

    def options(room: str, name: str) -> dict:
        return kinds[room](name)

    if args.config:
        if cohort:
            overrides.insert(0, f"data.cohort={cohort}")
        config = config_lib.load(args.config, overrides, options)
        given = {text.partition("=")[0] for text in overrides} | {"augment"}
    else:
        config = config_lib.resolve(planner.start(kind, cohort), overrides, options)
        given = {text.partition("=")[0] for text in overrides}
    plan, config, folds = planner.make(
        config, budget=budget, kind=kind, device=device, exact=exact, like=args.like, given=given
    )
    out = args.out or Path("plans") / config.name
    command = shlex.join(["python", "-m", "medjax.plan", *(sys.argv[1:] if argv is None else argv)])
    recipe.write(out, config, plan, folds, command)
    for note in plan["notes"]:
        say(f"note        {note}")
    say(f"written     {out / recipe.PLAN}, {out / recipe.RECIPE}")
    say(f"next        python -m medjax.main --config={shlex.quote(str(out / recipe.RECIPE))}")


if __name__ == "__main__":
    runtime.ensure_tuned_allocator()
    run_program(main)
