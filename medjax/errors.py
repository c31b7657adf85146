"""Errors a user can cure, and oddities worth one line.

`UserError` is for wrong input: the command-line programs print its message (no stack trace) and end with exit
code 2. The message names the file or key, says what is wrong and what to do.
"""

from __future__ import annotations

import sys
import threading


class UserError(Exception):
    """Wrong input or setting. `str(error)` is one clear message for a person."""


_said: set[str] = set()
_lock = threading.Lock()


def warn_once(message: str) -> None:
    """Prints `message` to standard error, once in the life of the process."""
    with _lock:
        if message in _said:
            return
        _said.add(message)
    print(f"medjax: note: {message}", file=sys.stderr, flush=True)
