"""Checkpoints: training state, data position and configuration in one. Alone knows Orbax.

Two managers, so that keeping the best never evicts the latest: `<workdir>/checkpoints/latest` (the two newest) and
`<workdir>/checkpoints/best` (one). Writing is asynchronous and atomic: a killed save leaves the one before. So is
removing: an old checkpoint is moved out of the way at once, and deleted there before the next is written.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from medjax.errors import UserError, warn_once

# Room a save leaves on the disk beside the state's own bytes: metadata, and what else the run writes meanwhile.
_SPARE_BYTES = 1 << 20
_REMOVED = ".removed"  # folder of old checkpoints that are about to be deleted


class Damaged(UserError):
    """A checkpoint that cannot be read."""


class Checkpoints:
    """The checkpoints of one run.

    A checkpoint is `state` (a tree of arrays) and `meta` (JSON: step, config, plan, scores).
    """

    def __init__(self, workdir: Path, *, read_only: bool = False) -> None:
        import orbax.checkpoint as ocp

        logging.getLogger("absl").setLevel(logging.ERROR)
        logging.getLogger("absl").addFilter(_not_orbax)
        _hush_closed_loops()
        self._ocp, self._read_only = ocp, read_only
        self._folder = workdir.resolve() / "checkpoints"
        self._managers = {}
        for kind, keep in (("latest", 2), ("best", 1)):
            if not read_only or (self._folder / kind).is_dir():
                with self._writing(kind):
                    self._managers[kind] = self._manager(kind, keep, read_only)
                    self._purge(kind)

    def _manager(self, kind: str, keep: int, read_only: bool) -> Any:
        ocp = self._ocp
        # Both kinds may be written at a time, and processes wait for each other at barriers that go by name.
        several = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=kind)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            # Deleted in place, a killed process would leave the half of it, which looks like a checkpoint.
            todelete_subdir=None if read_only else _REMOVED,
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,  # what a killed save left
            enable_async_checkpointing=True,
            multiprocessing_options=several,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=lambda: _write_sums(self._folder / kind)),
        )
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(multiprocessing_options=several),
            "meta": ocp.JsonCheckpointHandler(multiprocessing_options=several),
        }
        return ocp.CheckpointManager(self._folder / kind, options=options, item_handlers=handlers)

    def save(self, kind: str, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Starts to write a checkpoint ('latest' or 'best'); returns when the arrays are copied, not when written.

        Raises UserError when the disk has no room or refuses; a failure while writing comes with the next call.
        """
        ocp, manager = self._ocp, self._managers[kind]
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(dict(meta)))
        with self._writing(kind):
            manager.wait_until_finished()
            self._purge(kind)
            needed = sum(x.nbytes for x in jax.tree.leaves(state) if hasattr(x, "nbytes")) + _SPARE_BYTES
            free = shutil.disk_usage(self._folder).free
            if free < needed:
                raise UserError(
                    f"{self._folder / kind / str(step)}: no room on the disk for the checkpoint: it needs "
                    f"{needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free. Free some room and give the same command "
                    "again: the run goes on from its newest checkpoint."
                )
            # After a kill between two saves the same step may come again: it replaces what is there.
            if step in manager.all_steps():
                manager.delete(step)
            manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Returns when everything is on disk."""
        for kind, manager in self._managers.items():
            with self._writing(kind):
                manager.wait_until_finished()
                self._purge(kind)

    def _purge(self, kind: str) -> None:
        """Deletes what the manager has put aside; while it is not at work."""
        if jax.process_index() == 0 and not self._read_only:
            shutil.rmtree(self._folder / kind / _REMOVED, ignore_errors=True)

    @contextlib.contextmanager
    def _writing(self, kind: str) -> Iterator[None]:
        """Turns what a full or broken disk raises into a UserError, and leaves nothing half-written."""
        try:
            yield
        except (OSError, ValueError) as error:
            # Orbax passes on the array writer's errors as ValueError, with the system's code in the text.
            code = re.search(r"os_error_code='(\d+)'", str(error))
            if (code is None and not isinstance(error, OSError)) or isinstance(error, TimeoutError):
                raise  # a TimeoutError is of the processes that write together, not of the disk
            reason = os.strerror(int(code[1])) if code else getattr(error, "strerror", None) or str(error)
            self._remove_unfinished(kind)
            raise UserError(
                f"{self._folder}: cannot write a checkpoint: {reason}. Free some room or repair the disk and give the "
                "same command again: the run goes on from its newest checkpoint."
            ) from error

    def _remove_unfinished(self, kind: str) -> None:
        for _ in range(20):  # writers of other arrays may still be at work on what is being removed
            if not (left := list((self._folder / kind).glob("*.orbax-checkpoint-tmp*"))):
                return
            for folder in left:
                shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.05)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        """Closes; after an error what is being written is still brought to its end, and the error is what is told."""
        with contextlib.suppress(*([Exception] if kind else [])):
            self.close()

    def close(self) -> None:
        self.wait()
        for manager in self._managers.values():
            manager.close()
        self._managers = {}

    def steps(self, kind: str) -> list[int]:
        """Steps of the complete checkpoints of that kind, the newest first."""
        return sorted(self._managers[kind].all_steps(), reverse=True) if kind in self._managers else []

    def first_whole(
        self, kind: str, read: Callable[[int], Any], agree: Callable[[bool], bool] = lambda whole: whole
    ) -> tuple[int, Any] | None:
        """Step and `read(step)` of the newest checkpoint that can be read; None if there is none at all.

        Those before it are set aside as `checkpoints/damaged/<kind>-<step>`, which is said.

        Args:
          agree: whether all processes of the run could read theirs, from whether this one could.

        Raises:
          UserError: there are checkpoints, and all are damaged.
        """
        steps = self.steps(kind)
        for number, step in enumerate(steps):
            found, failure = None, None
            try:
                found = read(step)
            except Damaged as error:
                failure = error
            if agree(failure is None):
                return step, found
            reason = str(failure or "another process cannot read it")
            if number + 1 == len(steps):
                raise Damaged(
                    f"{reason}\nNone before it is left. Delete {self._folder} to train from the beginning, or use "
                    "another --workdir."
                )
            place = self._set_aside(kind, step)
            agree(True)
            self._managers[kind].reload()
            warn_once(f"{reason}\nIt is set aside as {place}; the checkpoint of step {steps[number + 1]} is used.")
        return None

    def _set_aside(self, kind: str, step: int) -> Path:
        place = self._folder / "damaged" / f"{kind}-{step}"
        if jax.process_index() == 0:
            place.parent.mkdir(exist_ok=True)
            shutil.rmtree(place, ignore_errors=True)
            os.replace(self._folder / kind / str(step), place)
        return place

    def newest(self, kind: str) -> int | None:
        """Step of the newest complete checkpoint of that kind."""
        return self._managers[kind].latest_step() if kind in self._managers else None

    def meta(self, kind: str, step: int) -> dict[str, Any]:
        """The JSON part alone."""
        ocp = self._ocp
        with self._reading(kind, step):
            return self._managers[kind].restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta

    def restore_parameters(self, kind: str, step: int, like: Any) -> Any:
        """Only the parameters to evaluate: the averaged ones where the run kept an average."""
        stored = self._stored(kind, step)
        part = "average" if stored.get("average") else "params"
        self._check(kind, step, stored.get(part), like)
        return self._read(kind, step, {part: like})[part]

    def parameters(self, kind: str, step: int) -> tuple[Any, Any]:
        """The same of whatever network the checkpoint is of, as trees of NumPy arrays.

        Returns:
          (what trained, what was frozen); the second is None where everything trained.
        """
        stored = self._stored(kind, step)
        part = "average" if stored.get("average") else "params"
        parts = {name: stored[name] for name in (part, "frozen") if stored.get(name)}
        like = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), parts)
        found = self._read(kind, step, like, np.ndarray)
        return found[part], found.get("frozen")

    def divided(self, kind: str, step: int) -> bool:
        """Whether the checkpoint holds its network's parameters in parts, or refers to another's for some."""
        return bool(self._stored(kind, step).get("frozen") or self.meta(kind, step).get("base"))

    def held(self, kind: str, step: int) -> set[str]:
        """Paths of the parameters, and of what stands for a change of others, that the checkpoint itself holds."""
        stored = self._stored(kind, step)
        leaves = jax.tree_util.tree_flatten_with_path([stored.get("params") or {}, stored.get("frozen") or {}])[0]
        return {jax.tree_util.keystr(path[1:], simple=True, separator="/") for path, _ in leaves}

    def check_parameters(self, kind: str, step: int, found: Any, like: Any) -> None:
        """Raises UserError naming what differs unless parameters of a checkpoint have the shapes of `like`."""
        self._check(kind, step, found, like)

    def restore(self, kind: str, step: int, like: Any) -> Any:
        """The state, in the shapes, types and shardings of `like` (a tree of jax.ShapeDtypeStruct).

        Raises UserError naming the parameters that differ when the checkpoint is of another architecture.
        """
        self.check(kind, step, like)
        return self._read(kind, step, like)

    def verify(self, kind: str, step: int) -> None:
        """Raises `Damaged` unless the files are what was written; for one process of several to do."""
        folder = self._folder / kind / str(step)
        with self._reading(kind, step):
            if not (folder / _SUMS).exists():  # of an earlier version
                return
            for name, (size, crc) in json.loads((folder / _SUMS).read_text()).items():
                if _sum_of(folder / name) != (size, crc):
                    raise ValueError(f"{name} is not what was written")

    def damage(self, kind: str, step: int) -> str:
        """What `verify` finds wrong with the files; '' if nothing."""
        try:
            self.verify(kind, step)
        except Damaged as error:
            return str(error)
        return ""

    def check(self, kind: str, step: int, like: Any) -> None:
        """Raises UserError naming what differs unless the checkpoint holds arrays of the shapes of `like`."""
        self._check(
            kind, step, self._stored(kind, step), like,
            " An earlier version of medjax laid some out otherwise: a run of it with adapters or model.norm="
            "'batch_frozen' cannot go on (with the latter it still predicts).",
        )  # fmt: skip

    def _read(self, kind: str, step: int, like: Any, as_type: Any = None) -> Any:
        ocp = self._ocp
        if as_type is None:
            restore = ocp.checkpoint_utils.construct_restore_args(like)
        else:
            restore = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=as_type), like)
        args = ocp.args.PyTreeRestore(like, restore_args=restore, partial_restore=True)
        with self._reading(kind, step):
            return self._managers[kind].restore(step, args=ocp.args.Composite(state=args)).state

    def _stored(self, kind: str, step: int) -> Any:
        """Shapes and types of the arrays of a checkpoint."""
        with self._reading(kind, step):
            found = self._managers[kind].item_metadata(step).state
            return found.tree

    @contextlib.contextmanager
    def _reading(self, kind: str, step: int) -> Iterator[None]:
        """Turns what a damaged checkpoint raises into a UserError."""
        try:
            yield
        except (OSError, ValueError, KeyError, AttributeError) as error:
            folder = self._folder / kind / str(step)
            reason = " ".join(str(error).split())[:200]
            cure = " Delete this folder: the one before it, if any, is used then." if self._read_only else ""
            raise Damaged(f"{folder}: the checkpoint is damaged and cannot be read ({reason}).{cure}") from error

    def _check(self, kind: str, step: int, stored: Any, like: Any, more_cure: str = "") -> None:
        lines = mismatch(stored, like)
        # What the optimizer and the average keep of a parameter differs as the parameter does.
        lines = [line for line in lines if line.startswith("params/")] or lines
        if lines:
            more = f"\n  ... and {len(lines) - 12} more" if len(lines) > 12 else ""
            raise UserError(
                f"{self._folder / kind / str(step)}: the checkpoint is of another architecture or optimizer:\n  "
                + "\n  ".join(lines[:12])
                + more
                + "\nUse the configuration it was trained with, or another --workdir."
                + more_cure
            )


_SUMS = "meta/sums.json"


def _write_sums(folder: Path) -> None:
    """Size and CRC of each file of the checkpoint that has just been written, before it is renamed into its place."""
    if jax.process_index() != 0:
        return
    beside = max(folder.glob("*.orbax-checkpoint-tmp*"), key=lambda f: f.stat().st_mtime)
    files = sorted(f for f in beside.rglob("*") if f.is_file() and f.parent != beside)
    sums = {str(file.relative_to(beside)): _sum_of(file) for file in files}
    (beside / _SUMS).write_text(json.dumps(sums))


def _sum_of(path: Path) -> tuple[int, int]:
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def _not_orbax(record: logging.LogRecord) -> bool:
    """Drops Orbax's own tracebacks: the same errors are raised, and told in one sentence."""
    return f"{os.sep}orbax{os.sep}" not in record.pathname


@functools.cache
def _hush_closed_loops() -> None:
    """Once in a process: the array store's threads that report to an event loop already closed are not shown.

    When one array of a checkpoint cannot be read or written, its error is raised; those of the others come too late.
    """
    before = sys.unraisablehook

    def hook(info: Any) -> None:
        if not (isinstance(info.exc_value, RuntimeError) and str(info.exc_value) == "Event loop is closed"):
            before(info)

    sys.unraisablehook = hook


def mismatch(found: Any, wanted: Any) -> list[str]:
    """Lines that say which arrays of a stored tree differ in presence or shape from the wanted ones."""

    def flat(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
            for path, leaf in leaves
            if hasattr(leaf, "shape")
        }

    old, new = flat(found), flat(wanted)
    lines = []
    for name in sorted({*old, *new}):
        if name not in new:
            lines.append(f"{name} {old[name]}: in the checkpoint, not in the model")
        elif name not in old:
            lines.append(f"{name} {new[name]}: in the model, not in the checkpoint")
        elif old[name] != new[name]:
            lines.append(f"{name}: {old[name]} in the checkpoint, {new[name]} in the model")
    return lines


def require(workdir: Path) -> Path:
    """The run folder, if it holds a checkpoint; else UserError."""
    if not workdir.is_dir():
        raise UserError(f"{workdir}: no such run folder; train one with python -m medjax.main --config=... first")
    if not any((workdir / "checkpoints").glob("*/[0-9]*")):
        raise UserError(f"{workdir}: holds no checkpoint (checkpoints/latest or checkpoints/best); train it first")
    return workdir
