"""Several processes of one run on this machine: a pod on a desk, or one process a GPU.

    python -m launch.local --processes=8 -- --config=configs/brain_seg.py --config.data.batch_size=8    # 8 GPUs
    python -m launch.local --processes=2 --cpu-devices=4 -- --config=configs/brain_seg.py:debug \\
        --config.data.batch_size=8    # 8 CPU devices

Each process gets its share of the GPUs (or of the cores), and the address of the first as coordinator. They end
together: when one dies, the others are given time to end by themselves, then they are ended. A signal to the launcher
goes to all of them. Ends with 75 if they were preempted and saved: give the same command again. --restarts does that by
itself after a process died.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from launch import common
from launch.work import FINAL
from medjax.errors import UserError, run_program

_POLL = 0.1  # seconds


@dataclass(frozen=True)
class Process:
    """One process: its command, what it adds to the environment, and the cores it is bound to (none: all)."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    cpus: tuple[int, ...]


def plan(arguments: Sequence[str], n: int, cpu_devices: int, port: int) -> list[Process]:
    """The processes of one run.

    Args:
      arguments: of medjax.main. n: processes. cpu_devices: forced CPU devices of each; 0: what there is. port: of the
        coordinator.

    Raises:
      UserError: GPUs that cannot be dealt out evenly.
    """
    gpus = [] if cpu_devices else common.gpus()
    if gpus and len(gpus) % n:
        raise UserError(
            f"--processes={n}: {len(gpus)} GPU(s) cannot be dealt out evenly; use a divisor of {len(gpus)}, or "
            "--cpu-devices=1 for a trial on the CPU"
        )
    cores = common.shares(common.cores(), n)
    found = []
    for i in range(n):
        environment: dict[str, str] = {}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(common.shares(gpus, n)[i])
        if cpu_devices:
            flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={cpu_devices}"
            environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
        command = [sys.executable, "-m", "medjax.main", *arguments]
        if n > 1:
            command += [f"--coordinator=localhost:{port}", f"--processes={n}", f"--process={i}"]
        found.append(Process(tuple(command), environment, tuple(cores[i])))
    return found


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return int(s.getsockname()[1])


def run(processes: Sequence[Process], grace: float) -> tuple[int, bool]:
    """Runs the processes till all have ended; returns the exit code of the whole, and whether a signal ended them.

    Args:
      grace: seconds the others have when one has died or a signal has come, before they are ended: SIGTERM, and SIGKILL
        ten seconds later.
    """
    got: list[int] = []
    before = {s: signal.signal(s, lambda number, _: got.append(number)) for s in common.stops()}
    running: list[subprocess.Popen] = []
    threads: list[threading.Thread] = []
    limit, told = float("inf"), False
    try:
        for i, process in enumerate(processes):
            running.append(_start(process))
            prefix = f"[{i}] " if len(processes) > 1 else ""
            threads.append(threading.Thread(target=_copy, args=(running[-1].stdout, prefix), daemon=True))
            threads[-1].start()
        while any(p.poll() is None for p in running):
            if got and not told:
                _say(f"launch: {signal.Signals(got[0]).name}: the processes are told to save and end\n")
                _signal(running, signal.SIGTERM)
                limit, told = time.monotonic() + grace, True
            dead = next((i for i, p in enumerate(running) if p.poll() not in (None, 0)), None)
            if dead is not None and limit == float("inf"):
                how = common.exit_words(running[dead].returncode)
                _say(f"launch: process {dead} ended ({how}); the others have {grace:.0f} s to end\n")
                limit = time.monotonic() + grace
            if time.monotonic() > limit:
                _signal(running, signal.SIGTERM if time.monotonic() < limit + 10 else signal.SIGKILL)
                time.sleep(1.0)
            time.sleep(_POLL)
    finally:
        _signal(running, signal.SIGKILL)  # only what an error above left
        for number, handler in before.items():
            signal.signal(number, handler)
    for thread in threads:
        thread.join(timeout=5)
    return together([p.returncode for p in running]), bool(got)


def _start(process: Process) -> subprocess.Popen:
    return subprocess.Popen(
        process.command,
        env={**os.environ, **process.environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C is passed on once, by the launcher
        preexec_fn=(lambda: common.pin(process.cpus)) if process.cpus else None,
    )


def _copy(stream: IO[str], prefix: str) -> None:
    for line in stream:
        _say(prefix + line)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that is gone must not keep the processes from saving
        sys.stdout.write(text)
        sys.stdout.flush()


def _signal(running: Sequence[subprocess.Popen], number: int) -> None:
    for process in running:
        if process.poll() is None:
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                continue


def together(codes: Sequence[int]) -> int:
    """The exit code of all: 0 if all are; 75 if the rest of them saved and asked to go on; else what went wrong first.

    A death by signal n counts as 128 + n, as in a shell.
    """
    plain = [128 - c if c < 0 else c for c in codes]
    wrong = [c for c in plain if c not in (0, common.PREEMPTED)]
    # Those that were killed for another's sake say less than the one that had something to say.
    wrong.sort(key=lambda c: c in (128 + signal.SIGTERM, 128 + signal.SIGKILL))
    return wrong[0] if wrong else max(plain, default=0)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    own, arguments = common.split_arguments(argv)
    p = common.parser("local", __doc__)
    p.add_argument("--processes", type=int, default=1, help="how many; default 1")
    p.add_argument("--cpu-devices", type=int, default=0, help="CPU devices to force in each process, for trials")
    p.add_argument("--port", type=int, default=0, help="of the coordinator; default: a free one")
    p.add_argument("--restarts", type=int, default=0, help="times all are started again after one died; default 0")
    p.add_argument("--grace", type=float, default=60.0, help="seconds the others have when one has died; default 60")
    args = p.parse_args(own)
    common.check_run(arguments)
    common.at_least(args, processes=1, cpu_devices=0, port=0, restarts=0, grace=0)
    for turn in range(args.restarts + 1):
        # A new port for each turn: the last one may still be held.
        processes = plan(arguments, args.processes, args.cpu_devices, args.port or free_port())
        if args.dry_run:
            for process in processes:
                cores = f"taskset -c {','.join(map(str, process.cpus))} "
                print(f"{cores}{common.shown(process.command, process.environment)}")
            return 0
        code, told = run(processes, args.grace)
        if code in (0, FINAL) or told or turn == args.restarts:
            break
        print(f"launch: ended with exit code {code}; all are started again ({turn + 1} of {args.restarts})", flush=True)
    return code


if __name__ == "__main__":
    run_program(lambda: sys.exit(main()))
