"""What may go wrong while a run goes on: the machine is taken away, a step stalls, numbers blow up, memory runs out.

A run that can go on later ends with exit code 75 (`errors.Resumable`); one that needs a person's decision with 2.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medjax import processes
from medjax.errors import RESUMABLE, UserError, write_atomic

_DUMPS = 3  # of the stacks of a stalled process before it is given up


class Preempted(Exception):
    """Raised where long work is left unfinished because `Preemption.reached` said so."""


class Preemption:
    """Notices SIGTERM, by which schedulers and clouds announce that they take the machine away.

    As a context: until `graceful` is set there is nothing to save, and the process ends at once with exit code 75, as
    do the others of its run, which it tells. After that, `reached` becomes True at the next call. Of several processes
    any may get the signal: JAX's preemption service (which Orbax uses as well) finds a call that all have yet to come
    to, and there it becomes True for all. The service's own handler, which is not Python's, only notes the signal: it
    is in force while `graceful` is set, and outside this context.
    """

    def __init__(self) -> None:
        self._graceful = False
        self._service: _Disposition | None = None
        self._asked = threading.Event()
        self._calls = 0
        self._before: Any = None

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            self._service = _Disposition(signal.SIGTERM) if processes.count() > 1 else None
            self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        if self._service is not None:
            self._service.restore()

    @property
    def graceful(self) -> bool:
        """Whether there is a state to save, and `reached` is called now and then."""
        return self._graceful

    @graceful.setter
    def graceful(self, value: bool) -> None:
        if value and self._service is not None:
            self._service.restore()
        self._graceful = value

    def _handle(self, number: int, frame: Any) -> None:
        self._asked.set()
        if not self.graceful:
            # Written past Python's buffers: the signal may have come while one was being written to.
            os.write(2, b"\nmedjax: told to stop (SIGTERM); the same command begins where this one was\n")
            processes.say_end(RESUMABLE, "told to stop (SIGTERM)")
            os._exit(RESUMABLE)
        if self._service is not None:  # it came a moment before the service's handler was back
            signal.raise_signal(number)

    def reached(self) -> bool:
        """Whether to save and stop here. Every process calls it equally often."""
        if processes.count() == 1:
            return self._asked.is_set()
        from jax.experimental import multihost_utils

        self._calls += 1
        return bool(multihost_utils.reached_preemption_sync_point(self._calls))


class _Disposition:
    """What the process does at a signal, C handlers included, which Python can neither tell nor put back."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._action = ctypes.create_string_buffer(1024)  # a struct sigaction, which is smaller everywhere
        self._call(None, self._action)

    def restore(self) -> None:
        """Puts back what was in force when this was made."""
        self._call(self._action, None)

    def _call(self, new: Any, old: Any) -> None:
        if self._libc.sigaction(self._number, new, old):
            raise OSError(ctypes.get_errno(), "sigaction")


class Watchdog:
    """Says when a step or the data source stalls: all threads' stacks, at the terminal and in `<folder>/stalled.txt`.

    After the third time in a row the process ends with exit code 75, for a scheduler to start it again.

    Args:
      seconds: without a sign of life; 0: no watch is kept.
    """

    def __init__(self, seconds: float, folder: Path, end: Callable[[int], Any] = os._exit) -> None:
        self._seconds, self._end = seconds, end
        self._file = folder / ("stalled.txt" if processes.count() == 1 else f"stalled-{processes.index()}.txt")
        # Replaced as one, so that the watching thread never sees the half of it.
        self._now = ("the first step", time.monotonic())
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="medjax-watchdog", daemon=True)
        if seconds > 0:
            self._thread.start()

    def doing(self, what: str) -> None:
        """A sign of life: what is waited for from now on."""
        self._now = (what, time.monotonic())

    @contextlib.contextmanager
    def unwatched(self) -> Iterator[None]:
        """While something runs that may take any time, such as a compilation."""
        before, _ = self._now
        self._now = (before, float("inf"))
        try:
            yield
        finally:
            self.doing(before)

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _watch(self) -> None:
        seen, said = self._now, 0
        while not self._over.wait(min(1.0, self._seconds / 4)):
            if self._now is not seen:
                seen, said = self._now, 0
            doing, since = seen
            stalled = time.monotonic() - since
            if stalled < self._seconds * (said + 1):
                continue
            said += 1
            self._dump(doing, stalled)
            if said == _DUMPS:
                print(
                    f"medjax: given up after {stalled:.0f} s; the same command goes on from the newest checkpoint",
                    file=sys.stderr,
                    flush=True,
                )
                self._end(RESUMABLE)

    def _dump(self, doing: str, stalled: float) -> None:
        line = f"\nmedjax: stalled: waiting for {doing} for {stalled:.0f} s (train.stall_seconds); all stacks follow"
        print(f"{line} and are in {self._file}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        try:
            with self._file.open("a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}{line}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            pass  # the terminal has them


class Nonfinite:
    """Counts updates that were skipped because the loss or a gradient was not finite.

    Args:
      limit: so many in a row end the run; 0: never. cases: step -> case ids of its batch. total: skipped before.
    """

    def __init__(self, limit: int, folder: Path, cases: Callable[[int], Sequence[str]], total: int = 0) -> None:
        self._limit, self._file, self._cases, self.total = limit, folder / "nonfinite.json", cases, total
        self._steps: list[int] = []

    def step(self, number: int, skipped: bool, values: Mapping[str, Any]) -> None:
        """Notes a step; raises UserError after `limit` skipped ones in a row."""
        if not skipped:
            self._steps.clear()
            return
        self.total += 1
        self._steps.append(number)
        if not self._limit or len(self._steps) < self._limit:
            return
        rows = [{"step": step, "cases": list(self._cases(step))} for step in self._steps]
        text = {k: str(float(v)) for k, v in values.items()}
        if processes.primary():
            write_atomic(self._file, json.dumps({"batches": rows, "last": text}, indent=2) + "\n")
        raise UserError(
            f"training: the loss or a gradient is not finite in {len(self._steps)} step(s) in a row, up to step "
            f"{number}; no such update was made. The cases of these batches are in {self._file}: look at them, lower "
            "optim.lr, or train in float32 (train.precision)."
        )


_NO_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|[Oo]ut of memory|OOM|failed to allocate")


@contextlib.contextmanager
def memory_explained(
    batch_size: int, patch: Sequence[int], precision: str, sizes: Mapping[str, float]
) -> Iterator[None]:
    """Turns the error of a full device memory inside into a UserError with the compiler's table and what helps.

    Args:
      sizes: part -> bytes of one device, as far as the compiler has said them by then.
    """
    try:
        yield
    except RuntimeError as error:
        if not _NO_MEMORY.search(str(error)):
            raise
        lines = [f"out of memory: {str(error).strip().splitlines()[0][:300]}"]
        if sizes:
            lines.append("One device needs, as the compiler says:")
            lines += [f"  {name:12} {size / 2**30:9.3f} GiB" for name, size in sizes.items()]
            lines.append(f"  {'in all':12} {sum(sizes.values()) / 2**30:9.3f} GiB")
        halved = tuple(max(1, n // 2) for n in patch)
        lines += [
            "What helps, the gentlest first:",
            f"  --config.optim.accumulate=N   cuts the batch of {batch_size} into rounds; the result stays the same",
            f"  --config.data.patch='{halved}'   half of {tuple(patch)} along each axis takes an eighth",
            "  --config.mesh.space=N (or mesh.fsdp=N)   spreads volumes (or parameters) over several devices"
            if precision == "bfloat16"
            else "  --config.train.precision=bfloat16   halves the activations; parameters stay float32",
        ]
        raise UserError("\n".join(lines)) from error
