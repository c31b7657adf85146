"""The label-efficiency study: pretraining, every run, the table and the curves.

    python -m benchmarks.few_labels                                           # all of it: hours
    python -m benchmarks.few_labels --config=configs/ablations/few_labels.py:labels=5,arms=scratch+mae --seeds=1
    python -m benchmarks.few_labels --config=configs/ablations/few_labels.py:seconds=120 --out=runs/few_labels_120s
    python -m benchmarks.few_labels --report                                  # of the runs there are
    python -m benchmarks.few_labels --calibrate                               # STEP and COST of the recipe

The same command goes on where it was interrupted. Commands for some labels, arms or seeds add to one `--out`, and its
table says of every cell whether it has been run; whatever else is changed (`seconds`, `width`, ..., the recipe itself)
needs an `--out` of its own. Runs, pretrained networks, `few_labels.md` and `few_labels.png` are in `--out`; with
`--page` the tables and the picture go into the page between its two marks, the picture's file beside it.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import platform
import re
import shutil
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
_UNEQUAL = 0.1  # share of the baseline's seconds that an arm may be off before the table warns
_KEYS = ("difference", "difference_low", "difference_high")
# Arm and what it is held against, beside the baseline (issue 6): fine-tuning in full, an encoder that learnt nothing.
_BARS = (("lora", "mae", "at least -1"), ("probe", "probe_random", "above 0"))
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
    """Pretrains the network of each seed, or goes on with it, in `out/pretrained`.

    Raises:
      UserError: what is there was pretrained, or begun, under other arguments.
    """
    given = ",".join(filter(None, [arg, "arm=pretrain"]))
    # How it is evaluated is nothing to the arms.
    refuse(changed(out / "pretrained", f"{recipe}:{given}", aside=("eval",)), "pretrained")
    for seed in seeds:
        folder = out / "pretrained" / f"seed{seed}"
        run(["medjax.main", f"--config={recipe}:{given}", f"--workdir={folder}", f"--config.seed={seed}"])


def check_arms(recipe: str, arg: str, out: Path, known: Sequence[str]) -> None:
    """Raises UserError if a run in `out/arms`, of whatever arm, labels and seed, is not what `recipe` makes of it now.

    The table pools all of them, and their commands, which the sweep compares, tell nothing of what the recipe holds
    itself, such as COST.

    Args:
      known: arms of the recipe; runs of others are in no table.
    """
    found: dict[Path, list[str]] = {}
    for folder in sorted(out.glob("arms/*")):
        arm, _, labels = folder.name.rpartition("_")
        if arm in known:
            given = ",".join(filter(None, [arg, f"arm={arm}", f"labels={labels}"]))
            found |= changed(folder, f"{recipe}:{given}", f"name={folder.name}")
    refuse(found, "trained")


def changed(folder: Path, recipe: str, *overrides: str, aside: Sequence[str] = ()) -> dict[Path, list[str]]:
    """What the runs `folder/seed*` were told otherwise than `recipe` says now; those without any are left out.

    Args:
      aside: keys that may differ, beside those of where a run is computed.
    """
    from medjax import compare, models, tasks
    from medjax import config as config_lib

    runs = sorted(file.parent for file in folder.glob("seed*/config.json"))
    if not runs:
        return {}
    options = {"model": models.options, "tasks": tasks.options}
    config = config_lib.load(recipe, overrides, lambda room, kind: options[room](kind))
    now = json.loads(config_lib.to_json(config))
    elsewhere = re.compile("|".join(re.escape(key) for key in (*compare.ELSEWHERE, *aside)))
    found = {}
    for run in runs:
        there = json.loads((run / "config.json").read_text())
        here = shared(now | {"seed": int(run.name.removeprefix("seed"))}, there)
        if here.get("init", {}).get("source") and there["init"]["source"]:  # below --out, however that was written
            here["init"]["source"] = there["init"]["source"]
        if lines := [line for line in config_lib.difference(there, here) if not elsewhere.match(line)]:
            found[run] = lines
    return found


def shared(new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """`new` without the keys that `old` lacks: what a run's version did not know is no difference in what it was told.

    In a table that is empty in `old` it is: that table has been filled.
    """

    def both(a: Any, b: Any) -> Any:
        return shared(a, b) if isinstance(a, Mapping) and isinstance(b, Mapping) and b else a

    return {key: both(value, old[key]) for key, value in new.items() if key in old}


def refuse(found: Mapping[Path, Sequence[str]], what: str) -> None:
    """Raises UserError for runs that were `what` ('trained', 'pretrained') with these differences, if there are any."""
    if not found:
        return
    first, *others = found
    lines = found[first]
    more = f" and {len(lines) - 6} more" if len(lines) > 6 else ""
    began = " and the runs that began from it" if what == "pretrained" else ""
    likewise = f". Likewise: {', '.join('/'.join(folder.parts[-2:]) for folder in others)}" if others else ""
    raise UserError(
        f"{first}: was {what} under other arguments, or the recipe has changed ({'; '.join(lines[:6])}{more}); choose "
        f"another --out, or delete that folder{began}{likewise}"
    )


def log_of(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A run's configuration and the rows of its log."""
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    return json.loads((folder / "config.json").read_text()), [json.loads(row) for row in rows if row.endswith("}")]


def seconds_a_step(folder: Path) -> float | None:
    """What a step took, from the run's log without its first rows."""
    config, rows = log_of(folder)
    speeds = [row["train/patches_per_s"] for row in rows if row.get("train/patches_per_s")]
    speeds = speeds[_SKIPPED:] or speeds
    return config["data"]["batch_size"] / float(np.median(speeds)) if speeds else None


def pretraining_seconds(out: Path, seeds: Sequence[int]) -> float | None:
    """Seconds of training steps of the pretrainings that these seeds began from, on average; None: not known."""
    from medjax import compare

    folders = [out / "pretrained" / f"seed{seed}" for seed in seeds]
    if not all((folder / "metrics.jsonl").is_file() for folder in folders):
        return None
    found = []
    for folder in folders:
        config, rows = log_of(folder)
        found.append(compare.training_seconds(rows, config))
    return None if None in found else float(np.mean([seconds for seconds in found if seconds is not None]))


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


def dice(of: Sequence[Any], against: Any) -> list[dict[str, Any]]:
    """Rows of `medjax.compare` of the mean Dice; `against` is one of the experiments `of`."""
    from medjax import compare

    return [row for row in compare.compare(of, against.name) if (row["metric"], row["class"]) == ("dice", "")]


def table(out: Path, pretrained: Sequence[str]) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]]]:
    """The baseline; rows: arm, labels, Dice, the difference from the baseline at the same number of labels; the bars.

    Args:
      pretrained: arms that begin from `out/pretrained`.

    The baseline is `scratch`, or the first arm there is. A bar: 'arm', 'against', 'labels', and the difference.
    """
    known = experiments(out)
    if not known:
        raise UserError(f"{out}: holds no evaluated run; run the study first")
    by_labels: dict[int, dict[str, Any]] = {}
    for name, e in known.items():
        by_labels.setdefault(int(name.rpartition("_")[2]), {})[name.rpartition("_")[0]] = e
    arms = list(dict.fromkeys(arm for chosen in by_labels.values() for arm in chosen))
    base = "scratch" if "scratch" in arms else arms[0]
    rows, bars = [], []
    for labels, chosen in sorted(by_labels.items()):
        of = {e.name: arm for arm, e in chosen.items()}
        found = dice(list(chosen.values()), chosen.get(base, next(iter(chosen.values()))))
        for row in found:
            e, arm = known[row["experiment"]], of[row["experiment"]]
            about = {"arm": arm, "labels": labels, "steps": e.cost("steps"), "seconds": e.cost("seconds")}
            about["pretraining"] = pretraining_seconds(out, e.seeds) if arm in pretrained else 0.0
            about |= {"trained": e.cost("trained"), "parameters": e.cost("parameters")}
            rows.append({k: v for k, v in row.items() if base in chosen or k not in _KEYS} | about)
        better = [row for row in found if base in chosen and not math.isnan(row.get("difference", math.nan))]
        if better:
            best = max(better, key=lambda row: row["difference"])
            own = next(row for row in found if row["experiment"] == chosen[base].name)
            apart = best["low"] > own["high"]
            bars.append({**best, "arm": of[best["experiment"]], "against": base, "labels": labels, "apart": apart})
        for arm, against, _ in _BARS:
            if arm in chosen and against in chosen:
                row = next(r for r in dice([chosen[against], chosen[arm]], chosen[against]) if "difference" in r)
                bars.append({**row, "arm": arm, "against": against, "labels": labels})
    return base, rows, bars


def cell(row: Mapping[str, Any] | None, keys: Sequence[str], sign: str = "", seeds: int = 0) -> str:
    """'81.2 [79.9, 82.5]' in percent; with the number of seeds where there are fewer than `seeds`."""
    if row is None or keys[0] not in row:
        return "not run"
    values = [100 * row[key] for key in keys]
    if math.isnan(values[0]):
        return "-"
    fewer = f" ({row['seeds']} of {seeds} seeds)" if row["seeds"] < seeds else ""
    return "{0:{s}.1f} [{1:{s}.1f}, {2:{s}.1f}]".format(*values, s=sign) + fewer


def page(
    base: str,
    rows: Sequence[Mapping[str, Any]],
    bars: Sequence[Mapping[str, Any]],
    arms: Sequence[str],
    numbers: Sequence[int],
    about: Sequence[str],
    picture: str,
) -> str:
    """Picture and tables as Markdown; `arms` and `numbers` (of labels) are those of the whole study."""
    numbers = sorted({*numbers, *(row["labels"] for row in rows)})
    seeds = max(row["seeds"] for row in rows)
    found = {(row["arm"], row["labels"]): row for row in rows}
    head = [f"| arm | {' | '.join(f'{n} labels' for n in numbers)} |", "|---" * (len(numbers) + 1) + "|"]

    def line(arm: str, keys: Sequence[str], sign: str = "") -> str:
        return f"| `{arm}` | {' | '.join(cell(found.get((arm, n)), keys, sign, seeds) for n in numbers)} |"

    lines = [*about, "", f"![Dice over the number of labelled cases]({picture})", ""]
    over = f"patients and {seeds} seeds" if seeds > 1 else "patients alone, of one seed"
    lines += [f"Dice, percent [95 % interval over {over}]:", "", *head]
    lines += [line(arm, ("mean", "low", "high")) for arm in arms]
    lines += ["", f"Difference from `{base}`, points [95 % interval; the same patients and seeds on both sides]:", ""]
    lines += [*head, *(line(arm, _KEYS, "+") for arm in arms if arm != base)]
    lines += ["", *_bars(base, bars, numbers, seeds), "", *_trained(rows), "", *_times(base, rows, arms)]
    return "\n".join(lines) + "\n"


def _bars(base: str, bars: Sequence[Mapping[str, Any]], numbers: Sequence[int], seeds: int) -> list[str]:
    """What the study was to show, with what came out at each number of labels."""
    lines = ["The bars, points [95 % interval]. Which arm is best is read off the same cases, which flatters it:"]
    lines += ["", f"| bar | {' | '.join(f'{n} labels' for n in numbers)} |", "|---" * (len(numbers) + 1) + "|"]
    best = [row for row in bars if "apart" in row]
    texts = []
    for n in numbers:
        row = next((row for row in best if row["labels"] == n), None)
        named = f"`{row['arm']}` " if row else ""
        apart = f", intervals {'apart' if row['apart'] else 'overlap'}" if row else ""
        texts.append(named + cell(row, _KEYS, "+", seeds) + apart)
    lines.append(f"| best arm less `{base}`: at least +2 at 5 labels, intervals apart | {' | '.join(texts)} |")
    for arm, against, bar in _BARS:
        of = {
            row["labels"]: row for row in bars if (row["arm"], row["against"], "apart" in row) == (arm, against, False)
        }
        texts = [cell(of.get(n), _KEYS, "+", seeds) for n in numbers]
        lines.append(f"| `{arm}` less `{against}`: {bar} | {' | '.join(texts)} |")
    return lines


def _trained(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which share of the parameters `lora` trains."""
    of = next((row for row in rows if row["arm"] == "lora"), None)
    if of is None or not of["trained"]:
        return [f"Parameters that `lora` trains: {'not run' if of is None else 'not known'}; bar: 5 %."]
    share = of["trained"] / of["parameters"]
    return [f"`lora` trains {of['trained']:,.0f} of {of['parameters']:,.0f} parameters, {100 * share:.1f} %; bar: 5 %."]


def _times(base: str, rows: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> list[str]:
    """Seconds of every arm beside those of the baseline at the same numbers of labels."""
    lines = [
        f"Seconds of training steps as they came out, on average; those of `{base}` with as many labels are 100 %:"
    ]
    lines += ["", f"| arm | runs | steps | pretraining | arm's own | in all | of `{base}` |", "|---" * 7 + "|"]
    total: dict[tuple[str, int], float] = {}
    for row in rows:
        if row["seconds"] and row["pretraining"] is not None:
            total[row["arm"], row["labels"]] = row["seconds"] + row["pretraining"]
    unequal = []
    for arm in arms:
        of = [row for row in rows if row["arm"] == arm]
        if not of:
            lines.append(f"| `{arm}` | not run | | | | | |")
            continue
        steps = sorted({round(row["steps"]) for row in of if row["steps"]})
        both = [row["labels"] for row in of if (arm, row["labels"]) in total and (base, row["labels"]) in total]
        share = math.nan
        if both:
            share = sum(total[arm, n] for n in both) / sum(total[base, n] for n in both)
        off = abs(share - 1) > _UNEQUAL
        unequal += [f"`{arm}`"] if off else []
        cells = [_mean(of, "pretraining"), _mean(of, "seconds"), _seconds([total.get((arm, r["labels"])) for r in of])]
        said = "-" if math.isnan(share) else f"**{100 * share:.0f} %**" if off else f"{100 * share:.0f} %"
        runs = sum(row["seeds"] for row in of)
        lines.append(f"| `{arm}` | {runs} | {', '.join(map(str, steps))} | {' | '.join(cells)} | {said} |")
    if unequal:
        lines += ["", f"**Not equal time** (more than {100 * _UNEQUAL:.0f} % off): {', '.join(unequal)}."]
    return lines


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    return _seconds([row[key] for row in rows])


def _seconds(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return "not known" if len(known) < len(values) else f"{np.mean(known):.0f}"


def report(out: Path, module: Any, target: Path | None) -> None:
    """Writes tables and curves of all runs in `out`, and puts them into the page if there is one."""
    from medjax import pictures

    base, rows, bars = table(out, module.PRETRAINED)
    about = (out / "about.md").read_text().splitlines() if (out / "about.md").is_file() else []
    numbers = [int(n) for n in module.read(None).labels.split("+")]
    parts = (base, rows, bars, module.ARMS, numbers, about)
    text = page(*parts, "few_labels.png")
    write_atomic(out / "few_labels.md", text)
    with (out / "few_labels.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(k for row in rows for k in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    lines = {arm: [row for row in rows if row["arm"] == arm] for arm in module.ARMS}
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
        picture = target.with_suffix(".png")
        picture.write_bytes((out / "few_labels.png").read_bytes())
        write_atomic(target, f"{before}{mark}\n{page(*parts, picture.name)}{end}{after}")
    say(text)


def calibrate(recipe: str, arg: str, out: Path, arms: Sequence[str]) -> None:
    """Measures what a step of every arm takes here, in the recipe's precision, and prints it as the recipe has it."""
    folder = out / "calibrate"
    shutil.rmtree(folder, ignore_errors=True)  # a run that is finished would not be measured again
    found: dict[str, float] = {}
    for arm in arms:
        which = "arm=mean_teacher,labels=180" if arm == "mean_teacher_all" else f"arm={arm}"
        given = ",".join(filter(None, [arg, which]))
        command = ["--config.train.total=60 steps", "--config.train.log_every=5 steps", "--config.optim.warmup=1 steps"]
        command += ["--config.train.eval_cases=1", "--config.eval.mirror=()", "--config.init.source="]
        command += ["--config.optim.decoder_first=0 steps"]  # as short as the run is, the encoder would never learn
        run(["medjax.main", f"--config={recipe}:{given}", f"--workdir={folder / arm}", *command])
        seconds = seconds_a_step(folder / arm)
        if not seconds:
            raise UserError(f"{folder / arm}: has logged no speed; see there")
        found[arm] = seconds
    config, _ = log_of(folder / "scratch")
    width, precision = config["model"]["features"][0], config["train"]["precision"]
    say(
        f"# Of `--calibrate`: median of steps {5 * _SKIPPED + 1} to 60, {precision}, width {width}, batch "
        f"{config['data']['batch_size']}; {machine()}."
    )
    lines = "".join(f'    "{arm}": {seconds / found["scratch"]:.2f},\n' for arm, seconds in found.items())
    say(f"STEP = {found['scratch']:.3g}\nCOST = {{\n{lines}}}")


def machine() -> str:
    """'AMD EPYC 9654, 2 cores, jax 0.7.0'."""
    import importlib.metadata

    from medjax.ops.native.cpus import usable_cpus

    file = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", file.read_text()) if file.is_file() else []
    name = names[0].strip() if names else platform.processor() or platform.machine()
    return f"{name}, {usable_cpus()} cores, jax {importlib.metadata.version('jax')}"


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
    p.add_argument(
        "--calibrate", action="store_true", help="only measure what a step of each arm takes; let the machine idle"
    )
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
        return calibrate(recipe, given_arg, args.out, list(module.COST))
    failed = 0
    if not args.report:
        check_arms(recipe, given_arg, args.out, module.ARMS)
        if set(arms) & set(module.PRETRAINED):
            pretrain(recipe, given_arg, args.out, range(args.seeds))
        pretrained = f"pretrained={args.out}/pretrained/seed{{seed}}"
        whole = ",".join(filter(None, [given_arg, f"arms={given.arms}", pretrained]))
        jobs = [f"--jobs={args.jobs}"] if args.jobs else []
        out = f"--out={args.out / 'arms'}"
        note(args.out, " ".join(["python -m benchmarks.few_labels", *(sys.argv[1:] if argv is None else argv)]), given)
        try:
            run(["launch.sweep", f"--config={recipe}:{whole}", f"--seeds={args.seeds}", out, *jobs])
        except SystemExit as ended:  # what is done is reported all the same
            failed = int(ended.code or 0)
            if not experiments(args.out):
                raise
    report(args.out, module, args.page)
    if failed:
        raise SystemExit(failed)
    return None


def note(out: Path, command: str, given: Any) -> None:
    """Adds a command, and what it spends, to those that made the runs in `out`."""
    spent = "a few steps" if given.debug else f"{duration(given.seconds)} of training steps an arm and seed"
    if not given.debug:
        spent += f", {given.pretrain:.0%} of it pretraining where there is any"
    file = out / "about.md"
    before = file.read_text().splitlines() if file.is_file() else []
    line = f"- `{command}`: {spent}; {machine()}."
    if line not in before:
        write_atomic(file, "\n".join([*before, line]) + "\n")


if __name__ == "__main__":
    run_program(main)
