"""Is one network with several heads worse, on any of its tasks, than one network a task?

    python -m launch.sweep --config=configs/ablations/multitask.py:recipe=stroke_risk --seeds=3

Variants of one recipe with several tasks: `together` first, then `only_TASK` for every task of it, with the same
network, cases, patches and steps; in each the other tasks' heads and losses are left out. `runs/sweeps/` then holds
every run and the comparison, whose cost column tells what the single networks take in all. Cost: the recipe's, once
for every task and once more, a seed.

Arguments: `recipe=NAME` of `configs/` (stroke_risk, breast, lung_nodule...), `only=TASK`, `debug` (that of the recipe).
"""

import importlib

from ml_collections import ConfigDict

from medjax.config import parse_arg
from medjax.errors import UserError


def _tasks(recipe: str, debug: bool) -> tuple[ConfigDict, list[str]]:
    try:
        module = importlib.import_module(f"configs.{recipe}")
    except ImportError as error:
        raise UserError(
            f"--config: recipe={recipe} is no recipe of configs/ ({error}): stroke_risk, breast..."
        ) from None
    config = module.get_config("debug" if debug else None)
    names = list(config.tasks)
    if len(names) < 2:
        raise UserError(f"--config: recipe={recipe} has one task, {names[0]}: there is nothing to compare")
    return config, names


def get_config(arg=None):
    arg = parse_arg(arg, debug=False, recipe="stroke_risk", only="")
    config, names = _tasks(arg.recipe, arg.debug)
    config.eval.predictions = config.eval.pictures = False
    # One task confirms another only where both are there: networks are compared without it.
    if "confirm" in config.eval:
        del config.eval["confirm"]
    if not arg.only:
        return config
    if arg.only not in names:
        raise UserError(f"--config: only={arg.only} is no task of {arg.recipe}: {', '.join(names)}")
    # The loss of a task alone has the weight 1; Adam would not see the difference, clipping would.
    task = config.tasks[arg.only]
    task.weight = 1.0
    config.tasks = ConfigDict({arg.only: task})
    return config


def sweep(arg=None):
    """The variants, by the recipe's argument."""
    arg = parse_arg(arg, debug=False, recipe="stroke_risk")
    lead = f"{'debug,' if arg.debug else ''}recipe={arg.recipe}"
    names = _tasks(arg.recipe, arg.debug)[1]
    return [{"name": "together", "arg": lead}, *({"name": f"only_{n}", "arg": f"{lead},only={n}"} for n in names)]
