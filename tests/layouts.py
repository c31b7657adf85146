"""Runs of the tiny recipe on forced CPU devices, in processes of their own: one after the other in each process.

`python tests/layouts.py '[["--workdir=a", "--config.mesh.fsdp=2"], ...]'` calls medjax.main once a list of arguments.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
# The schedule and the intervals do not depend on the length, so that a run cut in two does what the whole one does.
LEAN = (
    "data.batch_size=8", "optim.schedule=constant", "train.eval_every=1000 steps", "train.checkpoint_every=1000 steps",
    "eval.pictures=false", "eval.predictions=false", "eval.splits=('val',)",
)  # fmt: skip
# Where augmentation is not what is asked: it is most of what a step takes to compile.
BARE = ("augment.mirror=()", "augment.affine.p=0.0", "augment.gamma.p=0.0", "augment.noise.p=0.0")


def environment(devices: int) -> dict[str, str]:
    return {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "MEDJAX_HUGEPAGES": "0"}


def arguments(recipe: Path, workdir: Path, *overrides: str) -> list[str]:
    return [f"--config={recipe}", f"--workdir={workdir}", *(f"--config.{o}" for o in (*LEAN, *overrides))]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start(
    calls: Sequence[Sequence[str]],
    *,
    devices: int,
    processes: int = 1,
    log: Path | None = None,
    tensorflow: bool = False,
) -> list[subprocess.Popen]:
    """Starts `processes` processes of `devices` devices that do `calls`; each one's output goes to `<log>.<number>`.

    Without `tensorflow`, three quarters of what a start costs, they get the same batches from threads.
    """
    port, started = free_port(), []
    for number in range(processes):
        place = [f"--coordinator=127.0.0.1:{port}", f"--processes={processes}", f"--process={number}"]
        # They meet in the first call, and stay together.
        calls_here = [[*call, *(place if processes > 1 and not turn else [])] for turn, call in enumerate(calls)]
        command = [sys.executable, __file__, json.dumps(calls_here), *(["tensorflow"] if tensorflow else [])]
        with Path(f"{log}.{number}" if log else os.devnull).open("w") as out:
            started.append(
                subprocess.Popen(command, cwd=REPO, env=environment(devices), stdout=out, stderr=subprocess.STDOUT)
            )
    return started


def losses(workdir: Path) -> dict[int, float]:
    """Step -> training loss."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


if __name__ == "__main__":
    sys.path[:0] = [str(REPO)]
    if "tensorflow" not in sys.argv[2:]:
        sys.modules["tensorflow"] = None  # type: ignore[assignment]
    from medjax import main
    from medjax.errors import run_program

    for call in json.loads(sys.argv[1]):
        run_program(lambda call=call: main.main(call))  # type: ignore[misc]
