"""Measures two programs by turns and prints one JSON line a case.

Each side is a process of its own, which sets itself up, warms up, then does one repetition whenever it is told to. The
repetitions alternate, so that whatever else the machine does hits both sides alike. Every line has the keys
`bench, case, dtype, mode, peer, ours_s, peer_s, ratio, ours_peak_mb, peer_peak_mb, versions`: medians in seconds,
ratio = peer_s / ours_s (above 1: ours is faster), and the step's memory, which is the highest resident memory during
the repetitions less that right after the imports.

Only the standard library is imported: a peer's interpreter need not have what ours has.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_JEMALLOC = ("/usr/lib/x86_64-linux-gnu/libjemalloc.so.2", "/usr/lib64/libjemalloc.so.2", "/usr/lib/libjemalloc.so.2")


def _memory_kb(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    return 0


Setup = Callable[[], tuple[Callable[[], Any], dict[str, str]]]
"""Makes a side ready: (one repetition, versions)."""


def serve(setup: Setup, imports: Callable[[], Any]) -> None:
    """The worker's side: `imports()`, then `setup()` -> (one repetition, versions), then repetitions on demand.

    Answers each line of standard input with one JSON line: "go" with the seconds of a repetition, "end" with the
    memory and the versions.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    imports()
    before = _memory_kb("VmRSS")
    repeat, versions = setup()
    repeat()
    repeat()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of compilation
    except OSError:
        print("benchmark: the kernel does not reset peak memory; it includes compilation", file=sys.stderr)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            peak = max(_memory_kb("VmHWM") - before, 0) / 1024
            print(json.dumps({"peak_mb": round(peak, 1), "versions": versions}), file=answers, flush=True)
            return
        start = time.perf_counter()
        repeat()
        print(json.dumps(time.perf_counter() - start), file=answers, flush=True)


def serve_jax(setup: Setup, *modules: str) -> None:
    """`serve` on medjax's side: with its allocator, on the CPU; `modules` are imported beside JAX."""
    from medjax import runtime

    runtime.ensure_tuned_allocator()

    def imports() -> None:
        import jax

        for name in modules:
            importlib.import_module(name)
        jax.config.update("jax_platforms", "cpu")
        jax.devices()

    serve(setup, imports)


def serve_peer(setup: Setup, *modules: str) -> None:
    """`serve` on a peer's side; `modules` are those whose import its memory leaves out."""
    serve(setup, lambda: [importlib.import_module(name) for name in modules])


def fastest(options: Mapping[str, Callable[[], Any]], turns: int = 3) -> str:
    """Which of them takes least time at its best of `turns`, after one to warm up."""

    def seconds(run: Callable[[], Any]) -> float:
        run()
        taken = []
        for _ in range(turns):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
        return min(taken)

    return min(options, key=lambda name: seconds(options[name])) if len(options) > 1 else next(iter(options))


class Worker:
    """A side of a comparison: a process that runs `serve`."""

    def __init__(self, command: Sequence[str], environment: dict[str, str] | None = None) -> None:
        merged = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
        self._command = " ".join(command)
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=merged,
            cwd=ROOT,
            start_new_session=True,
        )

    def wait(self) -> None:
        """Until the worker is warm."""
        self._answer()

    def repeat(self) -> float:
        """Seconds of one repetition."""
        return self._ask("go")

    def end(self) -> dict[str, Any]:
        """Ends the worker; {'peak_mb': ..., 'versions': ...}."""
        told = self._ask("end")
        self.close()
        return told

    def close(self) -> None:
        """Ends the worker and the processes it started, without asking."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _ask(self, what: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"benchmark worker ended with {self._process.wait()}: {self._command}")
        return json.loads(line)


def compare(case: dict[str, str], ours: Worker, peer: Worker, repetitions: int, in_a_row: int = 1) -> None:
    """Alternates `repetitions` of each side and prints the JSON line. `case`: bench, case, dtype, mode, peer.

    A turn is `in_a_row` repetitions. More than one is for what runs many times over in practice, such as a training
    step: the first step after a pause is slower than those that follow it.
    """
    try:
        for side in (ours, peer):
            side.wait()
        times: tuple[list[float], list[float]] = ([], [])
        for i in range(-(-repetitions // in_a_row)):
            for j in (0, 1) if i % 2 else (1, 0):
                times[j].extend((ours, peer)[j].repeat() for _ in range(in_a_row))
        ends = [side.end() for side in (ours, peer)]
    finally:
        for side in (ours, peer):
            side.close()
    ours_s, peer_s = (statistics.median(t) for t in times)
    line = {
        **case,
        "ours_s": round(ours_s, 5),
        "peer_s": round(peer_s, 5),
        "ratio": round(peer_s / ours_s, 3),
        "ours_peak_mb": ends[0]["peak_mb"],
        "peer_peak_mb": ends[1]["peak_mb"],
        "versions": {**ends[0]["versions"], **ends[1]["versions"]},
    }
    print(json.dumps(line), flush=True)


def jemalloc(path: str | None = None) -> dict[str, str] | None:
    """Environment for jemalloc with huge pages, as PyTorch's tuning guide has it; None where there is no jemalloc."""
    library = next((p for p in ([path] if path else _JEMALLOC) if Path(p).exists()), None)
    if library is None:
        return None
    keep = "dirty_decay_ms:9000000000,muzzy_decay_ms:9000000000"
    return {"LD_PRELOAD": library, "MALLOC_CONF": f"thp:always,metadata_thp:auto,background_thread:true,{keep}"}
