"""What the launchers share: the command they start, commands said before they run, the devices of this machine."""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from medjax.errors import UserError

PREEMPTED = 75  # exit code of a run that saved its state because it was told to stop: start it again


def split_arguments(argv: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """The launcher's own arguments, and those behind '--', which are the program's."""
    given = list(sys.argv[1:] if argv is None else argv)
    at = given.index("--") if "--" in given else len(given)
    return given[:at], given[at + 1 :]


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A launcher's command line; what follows '--' is for medjax.main."""
    p = argparse.ArgumentParser(
        prog=f"python -m launch.{name}",
        usage=f"python -m launch.{name} [options] -- --config=RECIPE [--workdir=FOLDER] [--config.KEY=VALUE]",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    return p


def check_run(arguments: Sequence[str], fixed_workdir: bool = False, mount: str = "") -> None:
    """Raises UserError unless the arguments behind '--' name a recipe (and a run folder, where that is needed).

    Args:
      fixed_workdir: --workdir must be among them. mount: the folder that it must lie in; '': any.
    """
    for flag in ("--config", "--workdir"):
        if flag in arguments:
            raise UserError(f"behind '--': write {flag}=VALUE, in one word")
    if not any(a.startswith("--config=") for a in arguments):
        raise UserError("behind '--' belong the arguments of medjax.main: -- --config=configs/brain_seg.py ...")
    found = [a.removeprefix("--workdir=") for a in arguments if a.startswith("--workdir=")]
    if fixed_workdir and not found:
        raise UserError(
            "give --workdir=FOLDER behind '--': a folder that every machine sees and that outlives them, or the run "
            "cannot be resumed"
        )
    if mount and Path(mount) not in Path(os.path.normpath(found[-1])).parents:
        raise UserError(
            f"--workdir={found[-1]} must lie under {mount}, where the storage is mounted that outlives the machines"
        )


def stops() -> list[signal.Signals]:
    """The signals that end a launcher in good order; a closed terminal's is one, unless `nohup` has it ignored."""
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup]


def at_least(args: argparse.Namespace, **least: float) -> None:
    """UserError for the first option that is below its least value."""
    for name, bound in least.items():
        if getattr(args, name) < bound:
            raise UserError(f"--{name.replace('_', '-')}={getattr(args, name)}: at least {bound}")


def make_folder(path: Path) -> Path:
    """Makes a folder and those above it, if they are not there; UserError where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot make this folder: {error.strerror}; choose another") from error
    return path


def exit_words(code: int | None) -> str:
    """'exit code 1', 'killed by SIGKILL', 'preempted'; None: nobody saw how it ended."""
    if code is None:
        return "lost"
    if code == PREEMPTED:
        return "preempted"
    if code >= 0:
        return f"exit code {code}"
    names = {int(s): s.name for s in signal.Signals}
    return f"killed by {names.get(-code, f'signal {-code}')}"


def shown(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """A command as one would type it."""
    return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in (environment or {}).items()), shlex.join(command)])


def execute(command: Sequence[str], *, dry_run: bool, check: bool = True, **options: object) -> int:
    """Says a command and, unless `dry_run`, runs it; UserError if it is not there, or fails and `check` is set."""
    print(f"$ {shown(command)}", flush=True)
    if dry_run:
        return 0
    need(command[0])
    code = subprocess.run(command, check=False, **options).returncode  # type: ignore[call-overload]
    if check and code:
        raise UserError(f"{command[0]} failed with exit code {code}; its own message stands above")
    return int(code)


def need(program: str, hint: str = "") -> None:
    """UserError unless `program` is installed."""
    if shutil.which(program) is None:
        raise UserError(f"'{program}' is not installed here{f': {hint}' if hint else ''}; --dry-run works without it")


def gpus() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them; none where JAX is told to use the CPU."""
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [str(i) for i, line in enumerate(x for x in done.stdout.splitlines() if x.startswith("GPU "))]


def cores() -> list[int]:
    """The CPU cores this process may use."""
    try:
        return sorted(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return list(range(os.cpu_count() or 1))


def shares(items: Sequence[int] | Sequence[str], n: int) -> list[list]:
    """`items` in n consecutive parts as even as can be; all of them n times where there are fewer than n."""
    if len(items) < n:
        return [list(items)] * n
    cuts = [round(i * len(items) / n) for i in range(n + 1)]
    return [list(items[a:b]) for a, b in itertools.pairwise(cuts)]


def pin(cpus: Iterable[int]) -> None:
    """Binds this process to the cores; nothing where the system cannot."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus)
