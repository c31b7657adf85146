"""Errors a user can cure, and oddities worth one line.

`UserError` is for wrong input: the command-line programs print its message (no stack trace) and end with exit
code 2. The message names the file or key, says what is wrong and what to do. `Resumable` ends a program with exit code
75: nothing is wrong, the same command goes on.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class UserError(Exception):
    """Wrong input or setting. `str(error)` is one clear message for a person."""


RESUMABLE = 75
"""Exit code of a run that was cut short and goes on when the same command is given again (TEMPFAIL of sysexits.h)."""


class Resumable(Exception):
    """The program was told to stop, or lost a machine. `str(error)` says so and how it goes on."""


_said: set[str] = set()
_lock = threading.Lock()


def warn_once(message: str) -> None:
    """Prints `message` to standard error, once in the life of the process."""
    with _lock:
        if message in _said:
            return
        _said.add(message)
    print(f"medjax: note: {message}", file=sys.stderr, flush=True)


def check_regex(pattern: str, key: str) -> None:
    """Raises UserError unless the `pattern` at `key` of the config is a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, TypeError, OverflowError) as error:
        raise UserError(f"config: {key} {pattern!r} is no regular expression: {error}") from None


def write_atomic(path: Path, text: str) -> None:
    """Writes a text file beside its place and renames it; a failure leaves what was there and raises UserError."""
    # A name of its own: processes of one number may write from several machines.
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        beside.touch(exist_ok=False)  # what another has made is not removed
        try:
            beside.write_text(text)
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror}; free some room or choose another folder") from error


# What a disk may say to any write, whoever wrote.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def run_program(function: Callable[[], None]) -> None:
    """Calls a command-line program: a UserError ends it with one message and exit code 2, without a stack trace.

    So does a full or failing disk. A Resumable ends it with exit code 75.
    """
    try:
        function()
    except UserError as error:
        _fail(str(error))
    except Resumable as error:
        print(f"\nmedjax: {error}", file=sys.stderr, flush=True)
        raise SystemExit(RESUMABLE) from None
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        _fail(f"{error.filename or 'the disk'}: {error.strerror}; free some room and give the same command again")
    except KeyboardInterrupt:
        print("\nmedjax: interrupted; the same command goes on from the newest checkpoint", file=sys.stderr)
        raise SystemExit(130) from None


def _fail(message: str) -> NoReturn:
    print(f"\nmedjax: error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2) from None
