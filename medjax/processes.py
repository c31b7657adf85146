"""Several processes as one run: how they start, agree, wait for each other, and notice that one is gone.

They talk through the key-value service of `jax.distributed`, which process 0 keeps. Every process has a heart that
beats there; one whose heart stops, or who says that it ends, ends the others with a message and exit code 75, so that
a scheduler starts them all again. Importing this file does not import JAX.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import pickle
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from medjax.errors import RESUMABLE, Resumable, UserError

START_SECONDS = 300  # that processes wait for each other to start
_BEAT_SECONDS = 2.0
_SILENT_SECONDS = 30.0  # without a beat a process counts as gone
_LEAVE_SECONDS = 20.0  # for writers at work to end, once a process is to
_FAREWELL_SECONDS = 3.0  # process 0 keeps the service so long for the others to read why it ends


class Place(NamedTuple):
    """Where a process stands: `coordinator` is the address "host:port" of process 0."""

    coordinator: str
    processes: int
    process: int
    devices: tuple[int, ...] | None = None  # of this machine's accelerators; None: all


def find_place(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    env: Mapping[str, str] = os.environ,
) -> Place | None:
    """The place of this process in its run; None for a process on its own.

    Given by flags, by MEDJAX_COORDINATOR, MEDJAX_PROCESSES and MEDJAX_PROCESS (an indexed job of Kubernetes numbers its
    pods by JOB_COMPLETION_INDEX), or by SLURM's `srun`.

    Raises:
      UserError: some of the three are given and some are not, or they do not fit together.
    """
    given: dict[str, Any] = {
        "--coordinator": coordinator or env.get("MEDJAX_COORDINATOR"),
        "--processes": processes if processes is not None else _number(env, "MEDJAX_PROCESSES"),
        "--process": process if process is not None else _number(env, "MEDJAX_PROCESS", "JOB_COMPLETION_INDEX"),
    }
    if given["--coordinator"] is None and given["--processes"] is None:
        if process is not None or "MEDJAX_PROCESS" in env:
            raise UserError("--process needs --coordinator=HOST:PORT and --processes=N beside it")
        return _slurm(env)
    if lacking := [flag for flag, value in given.items() if value is None]:
        raise UserError(f"several processes need --coordinator, --processes and --process; {lacking[0]} is missing")
    address, n, i = given.values()
    if not 0 <= i < n:
        raise UserError(f"--process={i} of --processes={n}: processes are numbered from 0 to {n - 1}")
    if not re.fullmatch(r".+:\d+", address):
        raise UserError(f"--coordinator={address}: needs the host of process 0 and a free port, e.g. node1:8476")
    return Place(address, n, i) if n > 1 else None


def _number(env: Mapping[str, str], *names: str) -> int | None:
    for name in names:
        if env.get(name):
            try:
                return int(env[name])
            except ValueError:
                raise UserError(f"{name}={env[name]}: not a number") from None
    return None


def _slurm(env: Mapping[str, str]) -> Place | None:
    """Of a task that `srun` started; a batch script itself is no task."""
    tasks = _number(env, "SLURM_STEP_NUM_TASKS")
    if not tasks or tasks == 1 or "SLURM_PROCID" not in env or "SLURM_STEP_NODELIST" not in env:
        return None
    # Ports past those that programs are given by chance begin there; two jobs on a machine differ in their number.
    port = 61440 + int(env.get("SLURM_JOB_ID", "0")) % 4096
    here = _tasks_here(env)
    visible = [d for d in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if d]
    devices = None
    if here > 1 and len(visible) >= here:  # every task of the machine sees all of its devices: a part for each
        each, local = len(visible) // here, _number(env, "SLURM_LOCALID") or 0
        devices = tuple(range(local * each, (local + 1) * each))
    return Place(f"{_first_host(env['SLURM_STEP_NODELIST'])}:{port}", tasks, int(env["SLURM_PROCID"]), devices)


def _tasks_here(env: Mapping[str, str]) -> int:
    """Tasks of this task's machine, the n-th of '2(x3),1'."""
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    each = [int(tasks) for tasks, times in runs for _ in range(int(times or 1))]
    return each[min(_number(env, "SLURM_NODEID") or 0, len(each) - 1)] if each else 1


def _first_host(nodes: str) -> str:
    """'node1' of 'node1,node7' and of 'node[1-4,7]'."""
    match = re.match(r"([^,\[]+)(?:\[([^,\]-]+))?", nodes)
    assert match is not None
    return match[1] + (match[2] or "")


def on_tpus(env: Mapping[str, str] = os.environ) -> bool:
    """Whether this is a host of TPUs, which JAX itself finds the others of."""
    from importlib import util

    told = "TPU_PROCESS_ADDRESSES" in env or "TPU_WORKER_HOSTNAMES" in env or "MEGASCALE_COORDINATOR_ADDRESS" in env
    chips = any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return (told or chips) and util.find_spec("libtpu") is not None


def start(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins the other processes of the run, if there are any; before JAX's first computation.

    Raises:
      UserError: the flags do not fit together, or some process did not come.
    """
    place = find_place(coordinator, processes, process)
    if place is None and not on_tpus():
        return
    import jax

    options: dict[str, Any] = {"initialization_timeout": START_SECONDS}
    if place is not None:
        options |= {
            "coordinator_address": place.coordinator,
            "num_processes": place.processes,
            "process_id": place.process,
            "local_device_ids": place.devices,
            "cluster_detection_method": "deactivate",
        }
    try:
        with _own_last_words():
            jax.distributed.initialize(**options)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{_where(place)}: {_why_not_started(str(error))}") from error
    _run.begin()


def _where(place: Place | None) -> str:
    return "TPU hosts" if place is None else f"process {place.process} of {place.processes} at {place.coordinator}"


def _why_not_started(text: str) -> str:
    missing = sorted({int(n) for n in re.findall(r"/task:(\d+)", text.partition("timed out task")[2])})
    if missing:
        return f"process {', '.join(map(str, missing))} did not come within {START_SECONDS} s; look at its log"
    first = text.strip().splitlines()[0] if text.strip() else "unknown"
    return f"the processes could not meet within {START_SECONDS} s ({first}); is process 0 up, and its port open?"


@contextlib.contextmanager
def _own_last_words() -> Iterator[None]:
    """While JAX makes its client: when process 0 is lost, and the service with it, our own message ends this process.

    JAX's client would end it at once with exit code 1. It takes a function to call instead, but cannot hand over the
    status it calls it with (jaxlib 0.10: std::bad_cast), and aborts. So the abort is where the words are said.
    """
    import ctypes

    from jax._src.lib import _jax

    make = _jax.get_distributed_runtime_client

    def client(*args: Any, **options: Any) -> Any:
        return make(*args, **{**options, "missed_heartbeat_callback": _run.service_lost})

    libc = ctypes.CDLL(None)

    def aborted(number: int) -> None:
        for _ in range(10):  # what is killed closes its files one by one
            if not _run.service_there():
                _run.service_lost()
            time.sleep(0.2)
        libc.signal(number, None)  # of some other cause: as it would have been
        os.abort()

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    _run.guard = lambda: libc.signal(signal.SIGABRT, handler)
    _run.guard()
    _jax.get_distributed_runtime_client = client
    try:
        yield
    finally:
        _jax.get_distributed_runtime_client = make


def count() -> int:
    """Processes of the run."""
    return _run.count


def index() -> int:
    """Number of this process."""
    return _run.index


def primary() -> bool:
    """Whether this process writes what is to be written once."""
    return _run.index == 0


class _Run:
    """What this process knows of the others."""

    def __init__(self) -> None:
        self.count, self.index = 1, 0
        self.guard: Callable[[], Any] = lambda: None
        self._client: Any = None
        self._hosts: dict[int, str] = {}
        self._heard: dict[int, tuple[str, float]] = {}
        self._barriers = 0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        import jax
        from jax._src import distributed

        self._client = distributed.global_state.client
        self.count, self.index = jax.process_count(), jax.process_index()
        if self.count == 1:
            return
        self._put(f"host/{self.index}", f"{socket.gethostname()}, pid {os.getpid()}")
        barrier("names", START_SECONDS)
        self._hosts = self._all("host")
        self._thread = threading.Thread(target=self._beat, name="medjax-heart", daemon=True)
        self._thread.start()

    # Keys live under medjax/.

    def _put(self, key: str, value: str) -> None:
        self._client.key_value_set(f"medjax/{key}", value, allow_overwrite=True)

    def _all(self, key: str) -> dict[int, str]:
        found = self._client.key_value_dir_get(f"medjax/{key}/")
        return {int(name.rpartition("/")[2]): value for name, value in found}

    def name(self, process: int) -> str:
        """'process 1 (node2, pid 4711)'."""
        return f"process {process} ({self._hosts.get(process, 'which never started')})"

    def _beat(self) -> None:
        number, failing = 0, None
        while not self._over.wait(_BEAT_SECONDS):
            number += 1
            self.guard()  # again: a library that was loaded meanwhile may have put its own in its place
            try:
                self._put(f"beat/{self.index}", str(number))
                beats = self._all("beat")
                failing = None
            except Exception:
                failing = failing or time.monotonic()
                if time.monotonic() - failing > _SILENT_SECONDS and not self._over.is_set():
                    self.end(f"{self.name(0)}, which keeps the run together, no longer answers")
                continue
            now = time.monotonic()
            for process in range(self.count):
                value = beats.get(process, "")
                if value.startswith("ended"):
                    _, code, words = value.split(" ", 2)
                    if int(code) and process != self.index and not self._over.is_set():
                        self.end(f"{self.name(process)} ended: {words}", int(code))
                elif self._heard.get(process, ("?", 0.0))[0] != value:
                    self._heard[process] = value, now
            for process, (_, when) in self._heard.items():
                if beats.get(process, "").startswith("ended") or process == self.index:
                    continue
                if now - when > _SILENT_SECONDS and not self._over.is_set():
                    self.end(f"{self.name(process)} is gone: no sign of life for {now - when:.0f} s")

    def lost(self, seconds: float) -> list[str]:
        """Names of the processes that show no new sign of life within `seconds`; for a step that failed."""
        began = time.monotonic()
        before = {p: v for p, (v, _) in self._heard.items()}
        silent = [p for p in range(self.count) if p != self.index]
        while silent and time.monotonic() - began < seconds:
            time.sleep(0.2)
            silent = [p for p in silent if self._heard.get(p, ("", 0.0))[0] == before.get(p, "")]
        return [self.name(p) for p in silent]

    def service_there(self) -> bool:
        from jax._src import distributed

        host, _, port = (distributed.global_state.coordinator_address or "").rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=2).close()
        except (OSError, ValueError):
            return False
        return True

    def service_lost(self, *_: Any) -> None:
        """Called when the service fails this process."""
        if not self._over.is_set():
            self.end(f"{self.name(0)}, which keeps the run together, is gone")

    def end(self, why: str, code: int = RESUMABLE) -> NoReturn:
        """Ends this process at once, whatever it is at."""
        self._over.set()
        cure = "Start all processes again with the same command: the run goes on from its newest checkpoint."
        line = f"\nmedjax: process {self.index} of {self.count} ends: {why.rstrip('.')}."
        print(line, *([cure] if code == RESUMABLE else []), file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(code)

    def say_end(self, code: int, words: str = "") -> None:
        """Tells the others that this process ends: with them (code 0), or by itself and why."""
        if self.count == 1 or self._over.is_set():
            return
        self._over.set()
        with contextlib.suppress(Exception):  # the service may be what has ended
            self._put(f"beat/{self.index}", f"ended {code} {words}")
            if code and self.index == 0:
                time.sleep(_FAREWELL_SECONDS)

    def barrier(self, name: str, seconds: float) -> None:
        if self.count == 1:
            return
        self._barriers += 1
        key = f"barrier/{self._barriers}"
        self._put(f"{key}/{self.index}", name)
        began = time.monotonic()
        while True:
            there = self._all(key)
            if len(there) == self.count:
                break
            if time.monotonic() - began > seconds:
                missing = [self.name(p) for p in range(self.count) if p not in there]
                raise UserError(
                    f"barrier '{name}': after {seconds:.0f} s {', '.join(missing)} had not come; look at its log"
                )
            time.sleep(min(0.5, 0.01 + 0.1 * (time.monotonic() - began)))
        if other := {p: v for p, v in there.items() if v != name}:
            p, v = next(iter(other.items()))
            raise UserError(f"barrier '{name}': {self.name(p)} is at barrier '{v}'; do all run the same code?")

    def exchange(self, name: str, value: str, seconds: float) -> dict[int, str]:
        """Every process's text, by process."""
        if self.count == 1:
            return {0: value}
        key = f"say/{self._barriers + 1}"
        self._put(f"{key}/{self.index}", value)
        self.barrier(name, seconds)
        return self._all(key)


_run = _Run()


def say_end(code: int, words: str) -> None:
    """Tells the other processes that this one is about to end by itself, and why: they end with the same code."""
    _run.say_end(code, words)


def barrier(name: str, seconds: float = 600) -> None:
    """Returns when every process is here; UserError naming those that are not after `seconds`."""
    _run.barrier(name, seconds)


def gather(name: str, value: Any, seconds: float = 3600) -> list[Any]:
    """A value (anything that pickles) of every process, in their order; for rows of a table, not for volumes."""
    import base64

    if count() == 1:
        return [value]
    text = base64.b64encode(pickle.dumps(value)).decode()
    found = _run.exchange(name, text, seconds)
    return [pickle.loads(base64.b64decode(found[process])) for process in range(count())]


def agree(config: str, seconds: float = 120) -> None:
    """Raises UserError unless every process runs this configuration (JSON) with this code."""
    if count() == 1:
        return
    mine = {"code": code_version(), "config": config}
    everyone = {
        p: json.loads(v) for p, v in _run.exchange("same configuration and code", json.dumps(mine), seconds).items()
    }
    first = everyone[0]
    for process, other in sorted(everyone.items()):
        if other["code"] != first["code"]:
            raise UserError(
                f"{_run.name(process)} runs other code than process 0 ({other['code']}, not {first['code']}): install "
                "the same version of medjax, JAX and Python everywhere"
            )
        if other["config"] != first["config"]:
            from medjax.config import difference

            lines = difference(json.loads(first["config"]), json.loads(other["config"]))
            raise UserError(
                f"{_run.name(process)} has another configuration than process 0: {'; '.join(lines[:5])}. Give every "
                "process the same command."
            )


def code_version() -> str:
    """Version and hash of this package's sources, and the versions of Python and JAX."""
    from importlib import metadata

    import medjax

    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.rglob("*") if f.suffix in (".py", ".cc", ".h")):
        digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    python = ".".join(map(str, sys.version_info[:3]))
    return f"medjax {medjax.__version__} {digest.hexdigest()[:12]}, Python {python}, JAX {metadata.version('jax')}"


def missing(seconds: float = 12.0) -> Sequence[str]:
    """Names of the processes that are gone, after a collective call has failed here; waits up to `seconds` for life."""
    return _run.lost(seconds) if count() > 1 else []


def program(function: Callable[[], None]) -> Callable[[], None]:
    """`function` as one of several processes: how it ends is told to the others, and all end together."""

    def run() -> None:
        code, words = 1, "by an error"
        try:
            function()
            barrier("end", 3600)
            code = 0
        except Resumable:  # all of them do
            code = 0
            raise
        except UserError as error:
            code, words = 2, str(error)
            raise
        except SystemExit as error:
            code, words = error.code if isinstance(error.code, int) else int(error.code is not None), "by its own exit"
            raise
        except KeyboardInterrupt:
            code, words = 130, "interrupted"
            raise
        except Exception as error:
            words = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            if gone := missing():  # a collective call fails where a process is lost
                _run.end(f"{', '.join(gone)} no longer answers ({words[:200]})")
            raise
        finally:
            _run.say_end(code, words)
            if code and count() > 1:
                # The others end too, but not in the order in which JAX would take its leave of them.
                atexit.register(_leave, code)
                timer = threading.Timer(_LEAVE_SECONDS, _leave, [code])
                timer.daemon = True
                timer.start()

    return run


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
