"""One run of a sweep: its command, its folder, its state; and how a batch system's job works it off."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.common import PREEMPTED, make_folder, pin, shown
from medjax.errors import UserError, write_atomic

FINAL = 2  # exit code of a user's mistake: the same command would end the same way
TURNS = 50  # times a run is started again after a preemption
GRACE = 60.0  # seconds a run is given to save its state when it is told to stop
_KILLED = 10.0  # seconds a run that is killed may take to be gone
_POLL = 0.2  # seconds between two looks at a run
_TRIES, _PAUSE = 5, 3.0  # of asking SLURM, whose daemon may be busy or restarting, and seconds between them


@dataclass(frozen=True)
class Work:
    """One run.

    Attributes:
      name: 'variant/seed0'. folder: of the run, its log and its state. command: that trains, resumes and evaluates it.
    """

    name: str
    folder: Path
    command: tuple[str, ...]

    @property
    def log(self) -> Path:
        """What the command says, over all its turns."""
        return self.folder / "log.txt"

    def status(self) -> dict[str, Any]:
        """'state' (waiting, queued, running, interrupted, failed, done), 'tries', 'code', 'seconds', 'job'."""
        file = self.folder / "status.json"
        try:
            found = dict(json.loads(file.read_text()))
        except FileNotFoundError:
            found = {}
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{file}: not readable ({error}); delete it, and the run goes on from its checkpoint"
            ) from None
        return {"state": "waiting", "tries": 0, "seconds": 0.0} | found

    def update(self, **values: Any) -> dict[str, Any]:
        """Changes the state on disk."""
        make_folder(self.folder)
        status = self.status() | {"command": list(self.command)} | values
        write_atomic(self.folder / "status.json", json.dumps(status, indent=2) + "\n")
        return status

    def check(self) -> None:
        """Raises UserError if the folder holds a run of another command."""
        known = self.status().get("command")
        if known is not None and known[1:] != list(self.command[1:]):  # whatever the interpreter's path
            raise UserError(
                f"{self.folder}: was started as\n  {shown(known)}\nand would now be\n  {shown(self.command)}\n"
                "Choose another --out, or delete that folder"
            )

    def start(
        self, environment: Mapping[str, str] | None = None, cpus: Sequence[int] = (), keep: Sequence[int] = ()
    ) -> subprocess.Popen:
        """Starts the command in a process group of its own; what it says is added to the log.

        Args:
          keep: file descriptors that it inherits.
        """
        make_folder(self.folder)
        with self.log.open("a") as log:
            log.write(f"$ {shown(self.command, environment)}\n")
            log.flush()
            return subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
                pass_fds=keep,
                preexec_fn=(lambda: pin(cpus)) if cpus else None,
            )

    def ended(self, code: int, seconds: float, retries: int) -> str:
        """Writes down how a turn ended; returns the new state: 'done', 'failed', or 'waiting' for another turn."""
        before = self.status()
        spent = {"code": code, "seconds": round(before["seconds"] + seconds, 1)}
        if code == 0:
            return self.update(state="done", **spent)["state"]
        if code == PREEMPTED:
            turns = before.get("turns", 0) + 1
            return self.update(state="waiting" if turns < TURNS else "failed", turns=turns, **spent)["state"]
        tries = before["tries"] + 1
        again = code != FINAL and tries <= retries
        return self.update(state="waiting" if again else "failed", tries=tries, **spent)["state"]

    def last_words(self) -> str:
        """The last line of the log that says something."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def stop(processes: Sequence[subprocess.Popen], grace: float = GRACE) -> list[int]:
    """Tells runs to save and end; kills their whole groups after `grace` seconds. Returns their exit codes.

    In a signal's handler that came in the midst of a `poll` nobody can tell how that process ended: -9 then.
    """
    for number, seconds in ((signal.SIGTERM, grace), (signal.SIGKILL, _KILLED)):
        end = time.monotonic() + seconds
        for process in processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
    return [-signal.SIGKILL if process.returncode is None else process.returncode for process in processes]


def job_id() -> str:
    """Of the SLURM job this process is in. The bare number of an array's last element means the whole array."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def job_state() -> str:
    """What SLURM says of the job this process is in: RUNNING, or COMPLETING when it has been cancelled."""
    return squeue(f"--jobs={job_id()}", "--format=%T").stdout.strip()


def squeue(*options: str) -> subprocess.CompletedProcess[str]:
    """What `squeue` answers; asked again where it fails, as it does while SLURM's daemon is busy."""
    command = ["squeue", "--noheader", *options]
    for turn in range(_TRIES):
        if turn:
            time.sleep(_PAUSE)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not done.returncode:
            break
    return done


class Remote:
    """Works off a run inside a job of a batch system; what `submitit` pickles and calls.

    A crash is tried again in the same job. A preempted run, and a job whose time is up, are requeued.
    """

    def __init__(self, work: Work, retries: int) -> None:
        self.work, self.retries = work, retries
        self._process: subprocess.Popen | None = None
        self._told = False

    def __getstate__(self) -> dict[str, Any]:
        return {"work": self.work, "retries": self.retries, "_process": None, "_told": False}

    def __call__(self) -> str:
        # submitit ignores SIGTERM, which says that the job is to end: the run saves, and ends with 75.
        signal.signal(signal.SIGTERM, self._pass_on)
        state = "waiting"
        while state == "waiting":
            self.work.update(state="running", job=job_id())
            began = time.monotonic()
            self._process = self.work.start()
            if self._told:  # while it was being started
                self._pass_on(signal.SIGTERM)
            # Not `wait`: it holds a lock that `checkpoint`, called by a signal's handler in this thread, would need.
            while (code := self._process.poll()) is None:
                time.sleep(_POLL)
            state = self.work.ended(code, time.monotonic() - began, self.retries)
            if code != 0 and job_state() != "RUNNING":  # cancelled by someone: not to be brought back
                return str(self.work.update(state="interrupted")["state"])
            if code == PREEMPTED and state == "waiting":
                self.work.update(state="queued")
                subprocess.run(["scontrol", "requeue", job_id()], check=True)
                time.sleep(60)  # SLURM ends this job now
        return state

    def _pass_on(self, number: int, _: Any = None) -> None:
        self._told = True
        if self._process is not None and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def checkpoint(self) -> Any:
        """Called by submitit when the job is preempted or its time nearly up: ends the run, to be queued again."""
        import submitit

        if self._process is not None:
            stop([self._process])
        self.work.update(state="queued")
        return submitit.helpers.DelayedSubmission(Remote(self.work, self.retries))
