"""A run as a SLURM job: one process a task, requeued when it is preempted or its time is up; or an array of runs.

    python -m launch.slurm --nodes=2 --tasks-per-node=8 --gpus-per-task=1 -- --config=configs/brain_seg.py \\
        --config.data.batch_size=16
    python -m launch.slurm --gpus-per-task=1 --array data.split.fold=0,1,2,3,4 -- --config=FILE \\
        --config.data.split.folds=5

The script is written to slurm/NAME.sbatch and submitted; --dry-run prints it. A run that ends with 75 (it was told to
stop, and has saved) is requeued under its own number and resumes. More options: --sbatch='--constraint=a100'.
"""

from __future__ import annotations

import argparse
import re
import shlex
import string
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import common
from launch.sweep import split_values
from medjax.errors import UserError, run_program, write_atomic

TEMPLATE = Path(__file__).with_name("slurm.sbatch")
WARNING = 120  # seconds before the time limit


def script(args: argparse.Namespace, arguments: Sequence[str], here: Path) -> str:
    """The batch script.

    Args:
      args: of `parser`. arguments: of medjax.main. here: the folder it runs in.
    """
    key, values = array_of(args.array)
    name = args.name or job_name(arguments)
    options = {
        "job-name": name,
        "nodes": args.nodes,
        "ntasks-per-node": args.tasks_per_node,
        "cpus-per-task": args.cpus_per_task,
        "gpus-per-task": args.gpus_per_task,
        "mem": args.mem,
        "time": args.time,
        "partition": args.partition,
        "account": args.account,
        "signal": f"TERM@{WARNING}",
        "output": f"slurm/%x-{'%A_%a' if values else '%j'}.log",
        "array": f"0-{len(values) - 1}{f'%{args.at_once}' if args.at_once else ''}" if values else None,
    }
    lines = [f"#SBATCH --{k}={v}" for k, v in options.items() if v]
    lines += ["#SBATCH --open-mode=append", "#SBATCH --requeue", *(f"#SBATCH {text}" for text in args.sbatch)]
    own = [a for a in arguments if not (values and a.startswith("--workdir="))]
    words = [shlex.quote(w) for w in (args.python, "-m", "medjax.main", *own)]
    element = ""
    if values:
        element = f"values=({' '.join(map(shlex.quote, values))})\nvalue=${{values[$SLURM_ARRAY_TASK_ID]}}"
        words += [
            f'{shlex.quote(f"--config.{key}=")}"$value"',
            f'{shlex.quote(workdir(arguments, name))}/{shlex.quote(key.rpartition(".")[2])}"$value"',
        ]
    return string.Template(TEMPLATE.read_text()).substitute(
        directives="\n".join(lines),
        here=shlex.quote(str(here)),
        setup="\n".join(args.setup),
        warning=WARNING,
        element=element,
        # Since SLURM 22.05 srun no longer takes it from sbatch.
        cpus=f"--cpus-per-task={args.cpus_per_task} " if args.cpus_per_task else "",
        command=" ".join(words),
    )


def workdir(arguments: Sequence[str], name: str) -> str:
    """'--workdir=...' of an array's runs, to which each adds its own folder."""
    return next((a for a in arguments if a.startswith("--workdir=")), f"--workdir=runs/{name}")


def job_name(arguments: Sequence[str]) -> str:
    """'brain_seg_debug' for --config=configs/brain_seg.py:debug."""
    recipe = next(a for a in arguments if a.startswith("--config=")).partition("=")[2]
    path, _, variant = recipe.partition(":")
    return re.sub(r"[^A-Za-z0-9]+", "_", f"{Path(path).stem}_{variant}").strip("_")


def array_of(text: str) -> tuple[str, list[str]]:
    """'KEY=V1,V2' as key and values; ('', []) for none. UserError for anything else."""
    key, eq, values = text.partition("=")
    found = split_values(values)
    if text and (not eq or not key or not all(found)):
        raise UserError(f"--array {text}: write KEY=VALUE1,VALUE2, e.g. --array seed=0,1,2")
    if twice := [value for value in found if found.count(value) > 1]:
        raise UserError(f"--array {text}: {twice[0]} stands there twice, and both runs would write into one folder")
    return (key, found) if text else ("", [])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = common.parser("slurm", __doc__)
    p.add_argument("--nodes", type=int, default=1)
    p.add_argument("--tasks-per-node", type=int, default=1, help="processes a node; one a GPU is usual")
    p.add_argument("--gpus-per-task", type=int, default=0)
    p.add_argument("--cpus-per-task", type=int, default=0)
    p.add_argument("--mem", help="memory a node, such as 64G")
    p.add_argument("--time", default="24:00:00", help="limit of one turn, not of the run; default 24:00:00")
    p.add_argument("--partition")
    p.add_argument("--account")
    p.add_argument("--name", help="of the job; default: the recipe's")
    p.add_argument("--array", default="", metavar="KEY=V1,V2", help="one run a value of a configuration key")
    p.add_argument("--at-once", type=int, default=0, help="runs of the array at a time; 0: as many as fit")
    p.add_argument(
        "--setup", action="append", default=[], metavar="LINE", help="shell line before, e.g. 'module load cuda'"
    )
    p.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="any option of sbatch, e.g. --constraint=a100"
    )
    p.add_argument("--python", default=sys.executable, help="interpreter on the nodes; default: this one")
    return p  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Writes and submits the job, or prints it."""
    own, arguments = common.split_arguments(argv)
    args = parser().parse_args(own)
    common.check_run(arguments)
    common.at_least(args, nodes=1, tasks_per_node=1, gpus_per_task=0, cpus_per_task=0, at_once=0)
    text = script(args, arguments, Path.cwd())
    file = Path("slurm") / f"{args.name or job_name(arguments)}.sbatch"
    if args.dry_run:
        print(f"# {file}, to be submitted with: sbatch {file}\n{text}", end="")
        return
    common.need("sbatch", "start this on a machine of a SLURM cluster")
    common.make_folder(file.parent)
    write_atomic(file, text)
    done = subprocess.run(["sbatch", str(file)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"sbatch refused {file}: {done.stderr.strip()}")
    print(f"{done.stdout.strip()}; log: slurm/, script: {file}")


if __name__ == "__main__":
    run_program(main)
