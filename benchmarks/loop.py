"""What the training loop costs beside its step, and a checkpoint: `python -m benchmarks.loop [--config=...]`.

Prints two JSON lines.

`loop`: seconds from one call of the compiled step to the next in `medjax.train`, data and bookkeeping included, against
those of the bare step (the same executable, called again and again with one batch and waited for). Blocks of the bare
step are done in the middle of the run, so that whatever else the machine does hits both alike; medians.

`checkpoint`: how long `Checkpoints.save` keeps the loop from its next step, against how long it takes until the
checkpoint is whole on the disk.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from medjax import runtime

if __name__ == "__main__":
    runtime.ensure_tuned_allocator()  # starts the program anew, which is too late once JAX is imported

import jax
import jax.numpy as jnp

from medjax import config as config_lib
from medjax import models, report, tasks, train
from medjax.checkpoint import Checkpoints

_BLOCK = 6  # bare steps in a row


class Timed:
    """The compiled step: notes when it is called, and now and then is done bare."""

    def __init__(self, call: Callable, every: int) -> None:
        self._call, self._every, self._count = call, every, 0
        self._last: float | None = None
        self.loop: list[float] = []
        self.bare: list[float] = []

    def __call__(self, state: Any, batch: Any) -> Any:
        now = time.perf_counter()
        if self._last is not None:
            self.loop.append(now - self._last)
        self._last = now
        self._count += 1
        if self._count % self._every == 0:
            copy = jax.tree.map(jnp.copy, state)
            for number in range(_BLOCK + 1):
                began = time.perf_counter()
                copy, sums = self._call(copy, batch)
                jax.block_until_ready(sums)
                if number:  # the first comes after a pause
                    self.bare.append(time.perf_counter() - began)
            self._last = None
        return self._call(state, batch)


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m benchmarks.loop", description=__doc__.split("\n")[0])
    p.add_argument("--config", default="configs/brain_seg.py")
    p.add_argument("--steps", type=int, default=60)
    p.add_argument("--megabytes", type=int, default=400, help="of the state that is saved")
    args, overrides = p.parse_known_args()
    options = {"model": models.options, "tasks": tasks.options}
    length = [f"train.total={args.steps} steps", "train.eval_every=100000 steps", "train.log_every=10 steps"]
    given = [*length, "train.checkpoint_every=100000 steps", *(o.removeprefix("--config.") for o in overrides)]
    config = config_lib.load(args.config, given, lambda room, kind: options[room](kind))
    timed: list[Timed] = []
    compile_step = report.compile_step

    def compiled(*arguments: Any) -> report.Compiled:
        made = compile_step(*arguments)
        timed.append(Timed(made.call, max(8, args.steps // 6)))
        return dataclasses.replace(made, call=timed[-1])

    with tempfile.TemporaryDirectory() as folder:
        with (
            mock.patch.object(report, "compile_step", compiled),
            mock.patch.object(train.Validation, "__call__", return_value={"score": 0.0}),
        ):
            train.train(config, Path(folder) / "run")
        # The first periods hold the start of the feed.
        loop, bare = statistics.median(timed[0].loop[4:]), statistics.median(timed[0].bare)
        line = {"loop_s": round(loop, 5), "bare_s": round(bare, 5), "overhead": round(loop / bare - 1, 4)}
        print(json.dumps({"bench": "loop", "case": config.name, **line, "versions": report.versions()}), flush=True)
        print(json.dumps({"bench": "checkpoint", **checkpoint(Path(folder) / "save", args.megabytes)}), flush=True)


def checkpoint(folder: Path, megabytes: int) -> dict[str, Any]:
    """Medians of the pause and of the whole save over 5 saves of 30 arrays of random numbers."""
    draw = jax.jit(lambda key: [jax.random.normal(k, (megabytes * 250_000 // 30,)) for k in jax.random.split(key, 30)])
    checkpoints = Checkpoints(folder)
    pauses, seconds = [], []
    for step in range(6):
        state = jax.block_until_ready(draw(jax.random.key(step)))
        began = time.perf_counter()
        checkpoints.save("latest", step, state, {"step": step})
        pauses.append(time.perf_counter() - began)
        checkpoints.wait()
        seconds.append(time.perf_counter() - began)
    checkpoints.close()
    pause, whole = statistics.median(pauses[1:]), statistics.median(seconds[1:])
    return {
        "megabytes": megabytes,
        "pause_s": round(pause, 4),
        "save_s": round(whole, 4),
        "share": round(pause / whole, 4),
    }


if __name__ == "__main__":
    main()
