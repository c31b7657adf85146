"""Many runs of one recipe: a grid, or the variants its `sweep()` gives, each with several seeds; compared at the end.

    python -m launch.sweep --config=configs/brain_seg.py --grid optim.lr=0.01,0.003 --grid 'optim.ema=0,0.99'
    python -m launch.sweep --config=configs/ablations/brain_seg.py --seeds=3

The same command goes on where it was interrupted: finished runs are skipped, begun ones resume from their checkpoint. A
run that fails leaves the others alone and is tried again (--retries), unless the mistake is in its configuration (exit
code 2). Every configuration is resolved before the first run starts. Results: OUT/VARIANT/seedN, OUT/compare.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.util
import itertools
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch import common
from launch.work import TURNS, Remote, Work, squeue, stop
from medjax.errors import UserError, run_program, write_atomic

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+,() -]*")
_POLL = 0.2  # seconds between two looks at local runs
_CORES = 4  # of a CPU run, where --jobs does not say otherwise


@dataclass(frozen=True)
class Variant:
    """What one experiment of a sweep changes.

    Attributes:
      name: of its folder and in tables. overrides: key -> text, as in --config.KEY=TEXT. arg: of the recipe, in place
        of the one on the command line; None: that one.
    """

    name: str
    overrides: Mapping[str, str] = field(default_factory=dict)
    arg: str | None = None


def text_of(value: Any) -> str:
    """A value as --config.KEY=TEXT takes it."""
    return value if isinstance(value, str) else repr(value)


def split_values(text: str) -> list[str]:
    """'0.1,0.01' or '(8,16),(16,32)' at the commas outside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        if char == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts]


def grid(axes: Sequence[str]) -> list[Variant]:
    """Every combination of 'key=v1,v2,...' texts; the first values of each are the first variant, the baseline."""
    pairs: list[tuple[str, list[str]]] = []
    for axis in axes:
        key, eq, text = axis.partition("=")
        values = split_values(text)
        if not eq or not key or not all(values):
            raise UserError(f"--grid {axis}: write KEY=VALUE1,VALUE2, e.g. --grid optim.lr=0.1,0.01")
        if key in dict(pairs):
            raise UserError(f"--grid {axis}: '{key}' is in the grid twice; list its values once")
        pairs.append((key, values))
    last = [key.rpartition(".")[2] for key, _ in pairs]
    short = {key: name if last.count(name) == 1 else key for (key, _), name in zip(pairs, last, strict=True)}
    found = []
    for combination in itertools.product(*(values for _, values in pairs)):
        chosen = dict(zip((key for key, _ in pairs), combination, strict=True))
        found.append(Variant("_".join(f"{short[k]}={_plain(v)}" for k, v in chosen.items()), chosen))
    return found


def _plain(text: str) -> str:
    """A value as part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-") or "empty"


def recipe_variants(recipe: str) -> list[Variant]:
    """What the recipe's `sweep(arg)` gives: a list of {'name': ..., 'overrides': {key: value}, 'arg': ...}."""
    path, _, arg = recipe.partition(":")
    spec = importlib.util.spec_from_file_location(f"medjax_sweep_{Path(path).stem}", path)
    if not Path(path).is_file() or spec is None or spec.loader is None:
        raise UserError(f"--config={recipe}: no such recipe; they lie in configs/")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "sweep"):
        return []
    found = []
    for entry in module.sweep(arg or None):
        odd = set(entry) - {"name", "overrides", "arg"}
        if odd or "name" not in entry:
            raise UserError(f"{path}: sweep(): an entry has 'name', 'overrides' and perhaps 'arg', not {sorted(entry)}")
        overrides = {key: text_of(value) for key, value in dict(entry.get("overrides", {})).items()}
        found.append(Variant(str(entry["name"]), overrides, entry.get("arg")))
    return found


def variants(recipe: str, axes: Sequence[str]) -> list[Variant]:
    """The recipe's own variants times the grid; UserError if there are none, or names clash or cannot be folders."""
    own, crossed = recipe_variants(recipe), grid(axes) if axes else []
    found = own or crossed
    if own and crossed:
        found = [Variant(f"{a.name}_{b.name}", {**a.overrides, **b.overrides}, a.arg) for a in own for b in crossed]
    if not found:
        raise UserError(f"{recipe}: has no sweep(), so say what varies: --grid optim.lr=0.1,0.01")
    for variant in found:
        if not _NAME.fullmatch(variant.name) or variant.name == "compare":
            raise UserError(f"sweep: '{variant.name}' cannot be the name of a variant; use letters, digits and ._=+-")
    names = [v.name for v in found]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise UserError(f"sweep: two variants are called '{twice[0]}'; give each its own name")
    return found


def resolve(recipe: str, variant: Variant, extra: Sequence[str]) -> Any:
    """The variant's configuration, as medjax.main would resolve it; UserError names the variant."""
    from medjax import config, models, tasks

    options = {"model": models.options, "tasks": tasks.options}
    overrides = [*extra, *(f"{k}={v}" for k, v in variant.overrides.items())]
    try:
        return config.load(_with_arg(recipe, variant), overrides, lambda room, kind: options[room](kind))
    except UserError as error:
        raise UserError(f"variant '{variant.name}': {error}") from None


def _with_arg(recipe: str, variant: Variant) -> str:
    path, _, arg = recipe.partition(":")
    arg = arg if variant.arg is None else variant.arg
    return f"{path}:{arg}" if arg else path


def check(recipe: str, found: Sequence[Variant], extra: Sequence[str], seeds: int, folds: int) -> int:
    """Resolves every configuration, and refuses two that are the same; returns the first seed."""
    from medjax import config as config_lib

    known: dict[str, str] = {}
    first = 0
    for variant in found:
        config = resolve(recipe, variant, extra)
        first = config.seed
        twin = known.setdefault(config_lib.to_json(config), variant.name)
        if twin != variant.name:
            raise UserError(
                f"sweep: variants '{twin}' and '{variant.name}' are the same configuration; what one overrides is the "
                "default, or the grid repeats a value"
            )
        if config.data.split.folds and not folds and seeds > 1:
            raise UserError(
                "sweep: with data.split.folds the seed changes the split, and seeds could not be told from splits: "
                f"give --folds={config.data.split.folds} for all of them, or --seeds=1"
            )
    return first


def make_works(
    recipe: str, found: Sequence[Variant], extra: Sequence[str], out: Path, seeds: Sequence[int], folds: int
) -> list[Work]:
    """A run a variant, seed and fold; seeds outermost, so that a first whole comparison is there early."""
    works = []
    for seed, fold in itertools.product(seeds, range(folds) if folds else (None,)):
        for variant in found:
            name = f"{variant.name}/seed{seed}" + ("" if fold is None else f"_fold{fold}")
            overrides = {f"config.{k}": v for k, v in variant.overrides.items()}
            overrides |= {"config.name": variant.name, "config.seed": str(seed)}
            if fold is not None:
                overrides |= {"config.data.split.folds": str(folds), "config.data.split.fold": str(fold)}
            command = [sys.executable, "-m", "medjax.main", f"--config={_with_arg(recipe, variant)}"]
            command += [f"--workdir={out / name}", *(f"--config.{text}" for text in extra)]
            command += [f"--{k}={v}" for k, v in overrides.items()]
            works.append(Work(name, out / name, tuple(command)))
    return works


# ---- executors


@dataclass(frozen=True)
class Slot:
    """A share of this machine: environment and cores of one run at a time."""

    environment: Mapping[str, str]
    cpus: Sequence[int]
    label: str


def local_slots(jobs: int | None) -> list[Slot]:
    """One slot a GPU, or shares of the cores; UserError for more jobs than there are."""
    gpus, cores = common.gpus(), common.cores()
    most, what = (len(gpus), "GPU(s)") if gpus else (len(cores), "core(s)")
    n = jobs or (most if gpus else max(1, most // _CORES))
    if not 1 <= n <= most:
        raise UserError(f"--jobs={n}: this machine has {most} {what} for runs of their own; use 1 to {most}")
    parts = common.shares(cores, n)
    if gpus:
        return [Slot({"CUDA_VISIBLE_DEVICES": gpus[i]}, parts[i], f"GPU {gpus[i]}") for i in range(n)]
    return [Slot({}, parts[i], f"{len(parts[i])} core(s)") for i in range(n)]


class Interrupted(Exception):
    """The sweep was told to stop; `code` is what it ends with."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@contextlib.contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """Gives a function that raises Interrupted once the sweep is told to stop; the handlers do nothing else."""
    got: list[int] = []
    before = {s: signal.signal(s, lambda number, _: got.append(number)) for s in common.stops()}

    def look() -> None:
        if got:
            raise Interrupted(130 if got[0] == signal.SIGINT else common.PREEMPTED)

    try:
        yield look
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_local(works: Sequence[Work], slots: Sequence[Slot], retries: int, keep: Sequence[int] = ()) -> None:
    """Works the runs off on this machine, one a slot at a time; a signal lets all save, and raises Interrupted.

    Args:
      keep: file descriptors that they inherit.
    """
    waiting, free = list(works), list(slots)
    busy: dict[subprocess.Popen, tuple[Work, Slot, float]] = {}
    with stoppable() as look:
        try:
            while waiting or busy:
                look()
                while waiting and free:
                    work, slot = waiting.pop(0), free.pop(0)
                    work.update(state="running")
                    busy[work.start(slot.environment, slot.cpus, keep)] = (work, slot, time.monotonic())
                    say(f"started     {work.name} on {slot.label}")
                for process in [p for p in busy if p.poll() is not None]:
                    work, slot, began = busy.pop(process)
                    free.append(slot)
                    if tell(work, process.returncode, time.monotonic() - began, retries) == "waiting":
                        waiting.append(work)
                time.sleep(_POLL)
        except Interrupted:
            for code, (work, _, began) in zip(stop(list(busy)), busy.values(), strict=True):
                seconds = work.status()["seconds"] + time.monotonic() - began
                work.update(state="interrupted" if code else "done", code=code, seconds=round(seconds, 1))
            raise
        except BaseException:  # a full disk, say: nothing is left running that nobody looks after
            stop(list(busy))
            raise


def tell(work: Work, code: int, seconds: float, retries: int) -> str:
    """Writes down and says how a turn ended; returns the state."""
    state = work.ended(code, seconds, retries)
    if state == "done":
        say(f"done        {work.name} in {seconds:.0f} s")
    else:
        what = "again" if state == "waiting" else "failed"
        say(f"{what:11} {work.name}: {common.exit_words(code)} after {seconds:.0f} s: {work.last_words()} ({work.log})")
    return state


def run_slurm(
    works: Sequence[Work], out: Path, retries: int, options: Mapping[str, Any], at_once: int, wait: bool
) -> None:
    """Submits the runs that wait as one job array through submitit, and waits for all; what is queued stays there."""
    alive = jobs_in_queue()
    fresh = [w for w in works if w.status()["state"] not in ("done", "failed") and not _alive(w, alive)]
    if fresh:
        try:
            import submitit
        except ImportError:
            raise UserError("--executor=slurm needs submitit: pip install submitit") from None
        common.need("sbatch", "--executor=slurm runs on a machine of a SLURM cluster")
        executor = submitit.SlurmExecutor(folder=out / "slurm", max_num_timeout=TURNS)
        executor.update_parameters(
            job_name=f"medjax_{out.name}"[:40], array_parallelism=at_once, signal_delay_s=120, **options
        )
        for work in fresh:
            work.update(state="queued")
        with executor.batch():
            jobs = [executor.submit(Remote(work, retries)) for work in fresh]
        for work, job in zip(fresh, jobs, strict=True):
            if work.status()["state"] == "queued":
                work.update(job=job.job_id)
        say(f"submitted   {len(jobs)} run(s): {jobs[0].job_id} to {jobs[-1].job_id}")
    if not wait:
        say("The same command shows how they stand, and compares them when they are done.")
        return
    with stoppable() as look:
        seen: dict[str, str] = {}
        missing: dict[str, int] = {}
        while True:
            alive = jobs_in_queue()
            states = {}
            for work in works:
                status = work.status()
                states[work.name] = state = status["state"]
                if state in ("queued", "running") and not _alive(work, alive):
                    # A job leaves the queue a moment before or after its state is on this machine's disk.
                    missing[work.name] = missing.get(work.name, 0) + 1
                    if missing[work.name] > 5:
                        work.update(state="failed", code=None)
                        states[work.name] = "failed"
                else:
                    missing.pop(work.name, None)
                if seen.get(work.name) != states[work.name] and states[work.name] not in ("waiting", "queued"):
                    words = f": {work.last_words()} ({work.log})" if states[work.name] == "failed" else ""
                    say(f"{states[work.name]:11} {work.name}, job {status.get('job', '?')}{words}")
                seen[work.name] = states[work.name]
            if all(s in ("done", "failed", "interrupted") for s in states.values()):
                return
            for _ in range(10):
                look()
                time.sleep(0.2)


def jobs_in_queue() -> set[str]:
    """Ids of this user's jobs that SLURM has, array elements as 'array_element' and by their own number."""
    common.need("squeue", "--executor=slurm runs on a machine of a SLURM cluster")
    done = squeue("--me", "--array", "--format=%i %A %T")
    if done.returncode:
        raise UserError(f"squeue failed: {done.stderr.strip()}")
    return {name for line in done.stdout.splitlines() for name in line.split()[:2]}


def _alive(work: Work, alive: set[str]) -> bool:
    return work.status().get("job", "") in alive


# ---- the program


def say(text: str) -> None:
    print(text, flush=True)


def table(works: Sequence[Work]) -> str:
    """How every run stands."""
    width = max(len(w.name) for w in works)
    lines = [f"{'run':{width}}  {'state':11}  {'time':>8}  tries"]
    for work in works:
        status = work.status()
        failed = f"  {common.exit_words(status.get('code'))}: {work.last_words()[:80]}"
        words = failed if status["state"] == "failed" else ""
        lines.append(f"{work.name:{width}}  {status['state']:11}  {status['seconds']:7.0f}s  {status['tries']}{words}")
    return "\n".join(lines)


@contextlib.contextmanager
def alone(out: Path) -> Iterator[int]:
    """Holds the sweep's folder; UserError if another sweep does, or runs that one left behind.

    Yields:
      A file descriptor: the folder stays held as long as any process has it open.
    """
    common.make_folder(out)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{out}: another sweep is at work in this folder, or runs that it left behind (fuser {out}/.lock shows "
                "them): wait till they end, or choose another --out"
            ) from None
        yield file.fileno()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m launch.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--config", required=True, metavar="FILE[:ARG]", help="recipe; its sweep(arg) gives the variants, if it has one"
    )
    p.add_argument(
        "--grid",
        action="append",
        nargs="+",
        default=[],
        metavar="KEY=V1,V2",
        help="values of a key; several make a product",
    )
    p.add_argument("--seeds", type=int, default=1, help="runs of each variant, from the recipe's seed on")
    p.add_argument("--folds", type=int, default=0, help="runs of each variant and seed: all folds of so many")
    p.add_argument("--only", default="", metavar="NAME,NAME", help="these variants alone")
    p.add_argument("--baseline", metavar="NAME", help="variant the others are compared with (default: the first)")
    p.add_argument("--out", type=Path, help="folder of the sweep (default: runs/sweeps/RECIPE or RECIPE_ARGUMENT)")
    p.add_argument("--executor", choices=("local", "slurm"), default="local")
    p.add_argument("--jobs", type=int, help="runs at a time; default: one a GPU, or one for every 4 cores; slurm: 256")
    p.add_argument("--retries", type=int, default=1, help="times a run that crashed is tried again")
    p.add_argument(
        "--slurm",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of submitit's SlurmExecutor: partition, time (minutes), gpus_per_node, cpus_per_task, mem...",
    )
    p.add_argument("--no-wait", action="store_true", help="slurm: submit and end; the same command later compares")
    p.add_argument("--status", action="store_true", help="only show how the runs stand")
    p.add_argument("--dry-run", action="store_true", help="only show the commands")
    return p  # fmt: skip


def slurm_options(texts: Sequence[str]) -> dict[str, Any]:
    """'partition=gpu', 'time=60' as keywords; numbers are numbers."""
    found: dict[str, Any] = {"time": 24 * 60}
    for text in texts:
        key, eq, value = text.partition("=")
        if not eq:
            raise UserError(f"--slurm {text}: write KEY=VALUE, e.g. --slurm partition=gpu --slurm gpus_per_node=1")
        found[key] = int(value) if value.isdecimal() else value
    for key in ("nodes", "tasks_per_node", "ntasks_per_node"):
        if found.get(key, 1) != 1:
            raise UserError(
                f"--slurm {key}={found[key]}: a run of a sweep is one process; launch.slurm starts larger ones"
            )
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a sweep; ends with code 1 if some run failed."""
    args, rest = parser().parse_known_args(argv)
    unknown = [a for a in rest if not a.startswith("--config.")]
    if unknown:
        raise UserError(f"unknown argument '{unknown[0]}'; see --help")
    extra = [a.removeprefix("--config.") for a in rest]
    common.at_least(args, seeds=1, folds=0, retries=0)
    recipe, _, given = args.config.partition(":")
    out = args.out or Path("runs") / "sweeps" / "_".join([Path(recipe).stem, *([_plain(given)] if given else [])])
    found = variants(args.config, [axis for group in args.grid for axis in group])
    names = [v.name for v in found]
    wanted = [n for n in args.only.split(",") if n]
    for name in (*wanted, *filter(None, [args.baseline])):
        if name not in names:
            raise UserError(f"sweep: no variant '{name}'; there are: {', '.join(names)}")
    found = [v for v in found if not wanted or v.name in wanted]
    first = check(args.config, found, extra, args.seeds, args.folds)
    works = make_works(args.config, found, extra, out, range(first, first + args.seeds), args.folds)
    if args.dry_run:
        for work in works:
            say(f"$ {common.shown(work.command)}")
        say(where(args))
        return
    if args.status:
        say(table(works))
        return
    with alone(out) as lock:
        for work in works:
            work.check()
        given = ["python", "-m", "launch.sweep", *(sys.argv[1:] if argv is None else argv)]
        about = [{"name": v.name, "overrides": dict(v.overrides)} for v in found]
        write_atomic(out / "sweep.json", json.dumps({"command": shlex.join(given), "variants": about}, indent=2) + "\n")
        todo = [w for w in works if w.status()["state"] != "done"]
        say(f"sweep       {len(found)} variant(s), {len(works)} run(s), {len(works) - len(todo)} of them done; {out}")
        # A new command is a new set of tries for what failed.
        for work in todo:
            if work.status()["state"] in ("failed", "interrupted") or (
                args.executor == "local" and work.status()["state"] != "waiting"
            ):
                work.update(state="waiting", tries=0, turns=0)
        try:
            if args.executor == "local":
                # Its runs hold the folder too: should the sweep be killed, no second one begins while they go on.
                run_local(todo, local_slots(args.jobs), args.retries, [lock])
            elif todo:
                run_slurm(todo, out, args.retries, slurm_options(args.slurm), args.jobs or 256, not args.no_wait)
        except Interrupted as stopped:
            with contextlib.suppress(OSError):  # the terminal may be what is gone
                say(f"\n{table(works)}\ninterrupted; the same command goes on")
            raise SystemExit(stopped.code) from None
        say(f"\n{table(works)}")
        finish(works, out, args.baseline)


def where(args: argparse.Namespace) -> str:
    """What the commands would run on."""
    if args.executor == "slurm":
        return f"one SLURM job array, {args.jobs or 256} at a time, {slurm_options(args.slurm)}"
    slots = local_slots(args.jobs)
    return f"{len(slots)} at a time on this machine: {', '.join(slot.label for slot in slots)}"


def finish(works: Sequence[Work], out: Path, baseline: str | None) -> None:
    """Compares what is done, in the variants' order; ends with code 1 if something failed."""
    from medjax import compare

    states = [w.status()["state"] for w in works]
    left = states.count("failed") + states.count("interrupted")
    if "done" in states and not any(s in ("queued", "running", "waiting") for s in states):
        order = list(dict.fromkeys(w.name.partition("/")[0] for w in works))
        # Seeds are outermost in `works`: the first that is done may be another variant's than the first.
        done = [(w.name.partition("/")[0], w.folder) for w, s in zip(works, states, strict=True) if s == "done"]
        done.sort(key=lambda found: order.index(found[0]))
        say("")
        if not baseline and done[0][0] != order[0]:
            say(f"'{order[0]}', the first variant, has no finished run: '{done[0][0]}' is the baseline in its place")
        try:
            compare.compare_folders([folder for _, folder in done], baseline, out / "compare", None)
        except UserError as error:
            if not left:
                raise
            say(f"not compared: {error}")  # a fold that failed leaves its cases out, say
    if left:
        say(f"{left} run(s) failed or were cancelled; the same command tries them again")
        raise SystemExit(1)


if __name__ == "__main__":
    run_program(main)
