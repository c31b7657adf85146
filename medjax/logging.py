"""What a run says: one live line at the terminal, metrics to JSONL, TensorBoard and, when asked, Weights & Biases.

Importing this file imports neither clu nor TensorFlow: the writers are looked for when a run opens them, and a
machine without them still trains and keeps its JSONL.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medjax.errors import UserError, warn_once, write_atomic

_silent = False


def leave_to_another() -> None:
    """From now on this process says nothing and writes no metrics: another one of the run does."""
    global _silent
    _silent = True


class Metrics:
    """Writes scalars (and pictures) of a run, step by step; nothing where that is left to another process.

    Args:
      folder: of the run; rows go to `metrics.jsonl`, TensorBoard events to `tensorboard/`.
      step: where training goes on; rows past it, from a run that was killed, are dropped so that none stands twice.
    """

    def __init__(self, folder: Path, step: int, config: Mapping[str, Any] | None = None) -> None:
        self._path = Path(os.devnull) if _silent else folder / "metrics.jsonl"
        self._writer = self._wandb = None
        if _silent:
            self._file = self._path.open("a")
            return
        _truncate(self._path, step)
        self._file = self._path.open("a")
        self._writer = _clu_writer(folder / "tensorboard")
        self._wandb = _wandb_run(folder, config)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One row of scalars; a value that is not finite is null in the JSONL file."""
        numbers = {k: float(v) for k, v in values.items()}
        row = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        try:
            self._file.write(json.dumps({"step": step, **row}) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self._path}: cannot write: {error.strerror}") from error
        self._tensorboard("write_scalars", step, {k: v for k, v in numbers.items() if math.isfinite(v)})
        if self._wandb:
            self._wandb.log(numbers, step=step)

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """A picture uint8 [H, W, 3] for TensorBoard."""
        self._tensorboard("write_images", step, {name: picture[None]})

    def close(self) -> None:
        self._file.close()
        self._tensorboard("close")
        if self._wandb:
            self._wandb.finish()

    def _tensorboard(self, method: str, *arguments: Any) -> None:
        """TensorBoard's events are a convenience: when they cannot be written (a full disk) the run goes on without."""
        if self._writer is None:
            return
        try:
            getattr(self._writer, method)(*arguments)
        except Exception as error:
            warn_once(f"TensorBoard events end here ({type(error).__name__}: {error}); metrics.jsonl goes on")
            self._writer = None


def _truncate(path: Path, step: int) -> None:
    if not path.exists():
        return
    rows = [line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step]
    write_atomic(path, "".join(line + "\n" for line in rows))


def _clu_writer(folder: Path) -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        from clu import metric_writers
    except ImportError:
        warn_once("clu or TensorFlow is not installed: no TensorBoard events; metrics.jsonl has every figure")
        return None
    return metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(folder)))


def _wandb_run(folder: Path, config: Mapping[str, Any] | None) -> Any:
    options = (config or {}).get("wandb") or {}
    if not options.get("project"):
        return None
    try:
        import wandb
    except ImportError:
        raise UserError("config: wandb.project is set, but wandb is not installed: pip install wandb") from None
    return wandb.init(project=options["project"], entity=options["entity"] or None, dir=str(folder), resume="allow")


class Progress:
    """Progress of a long job: one live line on a terminal, a plain line now and then elsewhere.

    Args:
      every: seconds between two plain lines.
    """

    def __init__(self, label: str, total: int, *, every: float = 10.0, stream: Any = None) -> None:
        self._label, self._total, self._every = label, total, every
        self._stream = stream or (io.StringIO() if _silent else sys.stderr)
        self._live = self._stream.isatty()
        self._began = self._last = time.monotonic()
        self._first: int | None = None

    def update(self, done: int, text: str = "") -> None:
        """Shows `done` of the total; `text` is what stands beside it."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._began = done, now
        if not self._live and now - self._last < self._every and done != self._total:
            return
        if self._live and now - self._last < 0.1 and done != self._total:
            return
        self._last = now
        gone = done - self._first
        eta = f"ETA {duration((now - self._began) / gone * (self._total - done))}" if gone > 0 else ""
        line = "  ".join(filter(None, [f"{self._label} {done}/{self._total}", text, eta]))
        self._stream.write(f"\r\x1b[K{line}" if self._live else line + "\n")
        self._stream.flush()

    def close(self) -> None:
        if self._live:
            self._stream.write("\n")
            self._stream.flush()


def duration(seconds: float) -> str:
    """'1:02:03' or '4:05'."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def say(text: str) -> None:
    """One line of the report, on standard output."""
    if not _silent:
        print(text, flush=True)
