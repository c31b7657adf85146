"""The label-efficiency study: pretraining, every run, the table and the curves.

    python -m benchmarks.few_labels                                           # all of it: hours
    python -m benchmarks.few_labels --config=configs/ablations/few_labels.py:labels=5,seconds=120 --seeds=3
    python -m benchmarks.few_labels --report                                  # of the runs there are

The same command goes on where it was interrupted. Runs, pretrained networks, `few_labels.md` and `few_labels.png` are
in `--out`; with `--page` the table goes into the page between its two marks, and the curves beside it.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medjax.errors import UserError, run_program, write_atomic
from medjax.logging import duration, say

RECIPE = "configs/ablations/few_labels.py"
_SKIPPED = 2  # log rows that `calibrate` leaves out
_MARKS = ("<!-- table: begin -->", "<!-- table: end -->")


def recipe_of(text: str) -> Any:
    """The recipe's module and its argument's values."""
    import importlib

    path, _, arg = text.partition(":")
    if Path(path).name != Path(RECIPE).name:
        raise UserError(f"--config={text}: this command is about {RECIPE}")
    module = importlib.import_module("configs.ablations.few_labels")
    return module, module.read(arg or None), arg


def run(arguments: Sequence[str]) -> None:
    """A program of the project; its failure ends this one."""
    if code := subprocess.run([sys.executable, "-m", *arguments]).returncode:
        raise SystemExit(code)


def pretrain(recipe: str, arg: str, out: Path, seeds: Sequence[int]) -> None:
    """Pretrains the network of each seed, or goes on with it, in `out/pretrained`."""
    for seed in seeds:
        folder = out / "pretrained" / f"seed{seed}"
        given = ",".join(filter(None, [arg, "arm=pretrain"]))
        run(["medjax.main", f"--config={recipe}:{given}", f"--workdir={folder}", f"--config.seed={seed}"])


def seconds_a_step(folder: Path) -> float | None:
    """What a step took, from the run's log without its first rows."""
    config = json.loads((folder / "config.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["train/patches_per_s"] for row in rows if row.get("train/patches_per_s")]
    speeds = speeds[_SKIPPED:] or speeds
    return config["data"]["batch_size"] / float(np.median(speeds)) if speeds else None


def experiments(out: Path) -> dict[str, Any]:
    """Name -> experiment of every arm and number of labels whose runs are evaluated."""
    from medjax import compare

    found: dict[str, list[Any]] = {}
    for folder in sorted(out.glob("arms/*/seed*")):
        result = compare.read_run(folder, "val") if (folder / "config.json").is_file() else "not begun"
        if isinstance(result, str):
            say(f"left out    {folder}: {result}")
        else:
            found.setdefault(folder.parent.name, []).append(result)
    return {name: compare.Experiment(name, runs) for name, runs in found.items()}


def table(out: Path) -> list[dict[str, Any]]:
    """Rows: arm, labels, Dice with its interval, and the difference from `scratch` of the same number of labels."""
    from medjax import compare

    known = experiments(out)
    if not known:
        raise UserError(f"{out}: holds no evaluated run; run the study first")
    rows = []
    numbers = sorted({int(name.rpartition("_")[2]) for name in known})
    for labels in numbers:
        chosen = {name.rpartition("_")[0]: e for name, e in known.items() if int(name.rpartition("_")[2]) == labels}
        base = "scratch" if "scratch" in chosen else next(iter(chosen))
        for row in compare.compare(list(chosen.values()), chosen[base].name):
            if (row["metric"], row["class"]) == ("dice", ""):
                e = known[row["experiment"]]
                cost = {"seconds": e.cost("seconds"), "steps": e.cost("steps")}
                rows.append({**row, **cost, "arm": row["experiment"].rpartition("_")[0], "labels": labels})
    return rows


def page(rows: Sequence[Mapping[str, Any]], arms: Sequence[str], about: Sequence[str]) -> str:
    """The tables as Markdown."""
    numbers = sorted({row["labels"] for row in rows})
    arms = [arm for arm in arms if any(row["arm"] == arm for row in rows)]
    cell = {(row["arm"], row["labels"]): row for row in rows}
    head = [f"| arm | {' | '.join(f'{n} labels' for n in numbers)} |", "|---" * (len(numbers) + 1) + "|"]

    def line(arm: str, keys: tuple[str, str, str], sign: str) -> str:
        texts = []
        for n in numbers:
            row = cell.get((arm, n), {})
            values = [100 * row.get(key, math.nan) for key in keys]
            texts.append(
                "-" if math.isnan(values[0]) else "{0:{s}.1f} [{1:{s}.1f}, {2:{s}.1f}]".format(*values, s=sign)
            )
        return f"| `{arm}` | {' | '.join(texts)} |"

    lines = [*about, "", "Dice, percent [95 % interval over patients and seeds]:", "", *head]
    lines += [line(arm, ("mean", "low", "high"), "") for arm in arms]
    lines += [
        "",
        "Difference from `scratch`, points [95 % interval, the same patients and seeds on both sides]:",
        "",
        *head,
    ]
    keys = ("difference", "difference_low", "difference_high")
    lines += [line(arm, keys, "+") for arm in arms if arm != "scratch"]
    lines += ["", "| arm | steps | seconds of training steps, as it came out | runs |", "|---|---|---|---|"]
    for arm in arms:
        of = [row for row in rows if row["arm"] == arm]
        steps = sorted({round(row["steps"]) for row in of if row["steps"]})
        seconds = [row["seconds"] for row in of if row["seconds"]]
        took = f"{min(seconds):.0f} to {max(seconds):.0f}" if seconds else "-"
        lines.append(f"| `{arm}` | {', '.join(map(str, steps))} | {took} | {sum(row['seeds'] for row in of)} |")
    return "\n".join(lines) + "\n"


def report(out: Path, arms: Sequence[str], about: Sequence[str], target: Path | None) -> None:
    """Writes table and curves, and puts them into the page if there is one."""
    from medjax import pictures

    rows = table(out)
    text = page(rows, arms, about)
    write_atomic(out / "few_labels.md", text)
    with (out / "few_labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(k for row in rows for k in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    lines = {arm: [row for row in rows if row["arm"] == arm] for arm in arms}
    points = {
        arm: [(row["labels"], 100 * row["mean"], 100 * row["low"], 100 * row["high"]) for row in found]
        for arm, found in lines.items()
        if found
    }
    pictures.lines(points, out / "few_labels.png", x="labelled cases", y="Dice, percent", title="Hippocampus")
    if target:
        before, mark, rest = target.read_text().partition(_MARKS[0])
        _, end, after = rest.partition(_MARKS[1])
        if not mark or not end:
            raise UserError(f"{target}: needs the two lines {_MARKS[0]} and {_MARKS[1]} to put the table between")
        write_atomic(target, f"{before}{mark}\n{text}{end}{after}")
        picture = target.with_suffix(".png")
        picture.write_bytes((out / "few_labels.png").read_bytes())
    say(text)


def calibrate(recipe: str, arg: str, out: Path, arms: Sequence[str]) -> None:
    """Prints what a step takes here: of `scratch` in seconds, of the other arms relative to it (`COST`)."""
    folder = out / "calibrate"
    found = {}
    for arm in dict.fromkeys(("scratch", "pretrain", *arms)):
        given = ",".join(filter(None, [arg, f"arm={arm}"]))
        command = ["--config.train.total=40 steps", "--config.train.log_every=5 steps", "--config.optim.warmup=1 steps"]
        command += ["--config.train.eval_cases=1", "--config.init.source="]
        run(["medjax.main", f"--config={recipe}:{given}", f"--workdir={folder / arm}", *command])
        found[arm] = round(seconds_a_step(folder / arm) or math.nan, 3)
    step = found["scratch"]
    cost = {arm: round(seconds / step, 2) for arm, seconds in found.items()}
    say(f"step={step}\nCOST = {json.dumps(cost, indent=4)}")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.few_labels", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    p.add_argument("--config", default=RECIPE, metavar="FILE[:ARG]", help="the recipe and its argument")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--jobs", type=int, help="runs at a time, as in `launch.sweep`; the cores are divided among them")
    p.add_argument("--out", type=Path, default=Path("runs/few_labels"))
    p.add_argument("--page", type=Path, help="Markdown file whose table is replaced")
    p.add_argument("--report", action="store_true", help="only the table and the curves, of the runs there are")
    p.add_argument("--calibrate", action="store_true", help="only measure what a step of each arm takes")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    module, given, arg = recipe_of(args.config)
    recipe = args.config.partition(":")[0]
    arms = given.arms.split("+")
    if unknown := [arm for arm in arms if arm not in module.ARMS]:
        raise UserError(f"--config={args.config}: no arm '{unknown[0]}'; there are: {', '.join(module.ARMS)}")
    given_arg = re.sub(r"(^|,)(arms|arm|pretrained)=[^,]*", "", arg).strip(",")
    if args.calibrate:
        return calibrate(recipe, given_arg, args.out, arms)
    if not args.report:
        if set(arms) & set(module.PRETRAINED):
            pretrain(recipe, given_arg, args.out, range(args.seeds))
        pretrained = f"pretrained={args.out}/pretrained/seed{{seed}}"
        whole = ",".join(filter(None, [given_arg, f"arms={given.arms}", pretrained]))
        jobs = [f"--jobs={args.jobs}"] if args.jobs else []
        out = f"--out={args.out / 'arms'}"
        run(["launch.sweep", f"--config={recipe}:{whole}", f"--seeds={args.seeds}", out, *jobs])
        spent = "a few steps" if given.debug else f"{duration(given.seconds)} of training steps an arm and seed"
        if set(arms) & set(module.PRETRAINED) and not given.debug:
            spent += f", {given.pretrain:.0%} of it pretraining where there is any"
        command = " ".join(["python -m benchmarks.few_labels", *(sys.argv[1:] if argv is None else argv)])
        write_atomic(args.out / "about.md", f"`{command}`: {spent}; {platform.machine()}, {os.cpu_count()} cores.\n")
    about = (args.out / "about.md").read_text().splitlines() if (args.out / "about.md").is_file() else []
    report(args.out, module.ARMS, about, args.page)
    return None


if __name__ == "__main__":
    run_program(main)
