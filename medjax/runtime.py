"""The process's memory allocator: huge pages without asking the user for an environment variable.

A training step on the CPU allocates and frees hundreds of megabytes. In 4 KB pages that costs a fifth of its time in
page faults and address translation. glibc (2.35 or newer) asks the kernel for huge pages, and keeps what is freed, if
told to at process start, so a program tells it and starts itself again, once, in place: same process id, streams,
working directory and arguments. `MEDJAX_HUGEPAGES=0` in the environment prevents it.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from medjax.errors import UserError

_TUNABLE = "glibc.malloc.hugetlb"
# Freed memory stays with the process: XLA allocates a program's temporaries anew at every call, and pages that went
# back to the kernel in between cost more than a small network's forward pass.
_KEEP = {"glibc.malloc.mmap_threshold": str(1 << 33), "glibc.malloc.trim_threshold": str(1 << 33)}
_GUARD = "MEDJAX_RESTARTED"
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_OTHER_ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc", "hoard", "snmalloc")


def _tunables() -> dict[str, str]:
    """`GLIBC_TUNABLES`, "name=value" joined by colons."""
    pairs = (part.partition("=") for part in os.environ.get("GLIBC_TUNABLES", "").split(":"))
    return {name: value for name, _, value in pairs if name}


def _glibc() -> tuple[int, ...] | None:
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        return tuple(int(part) for part in version.split(".")[:2]) if name == "glibc" else None
    except (AttributeError, ValueError, OSError):  # no such call or name: another C library
        return None


def _state() -> tuple[bool, str]:
    """Whether huge pages could be had by starting anew, and in words what is in force."""
    wish = os.environ.get("MEDJAX_HUGEPAGES", "1")
    if wish not in ("0", "1"):
        raise UserError(f"MEDJAX_HUGEPAGES={wish}: expected 0 (leave the allocator alone) or 1 (the default)")
    if sys.platform != "linux":
        return False, f"as the system gives it ({sys.platform})"
    preloaded = next((name for name in _OTHER_ALLOCATORS if name in os.environ.get("LD_PRELOAD", "")), None)
    if preloaded:
        return False, f"{preloaded} (LD_PRELOAD)"
    version = _glibc()
    if version is None or version < (2, 35):
        found = "another C library" if version is None else "glibc " + ".".join(map(str, version))
        return False, f"4 KB pages (huge pages need glibc 2.35, this is {found})"
    try:
        mode = _THP.read_text()
    except OSError:
        mode = "[never]"
    if "[never]" in mode:
        return False, f"4 KB pages (the kernel's transparent huge pages are off: {_THP})"
    if "[always]" in mode:
        return False, "huge pages, by the kernel's own choice"
    if _TUNABLE in _tunables():
        value = _tunables()[_TUNABLE]
        return False, f"{'huge' if value != '0' else '4 KB'} pages ({_TUNABLE}={value})"
    if wish == "0":
        return False, "4 KB pages (MEDJAX_HUGEPAGES=0)"
    return True, "4 KB pages (the process was not started by a medjax program)"


def _can_restart() -> bool:
    """Whether this interpreter runs a program that can be started again from its command line."""
    if os.environ.pop(_GUARD, None) is not None:
        return False
    if not sys.executable or len(sys.orig_argv) < 2 or sys.argv[:1] in ([""], ["-"]):
        return False  # interactive, or a program read from standard input, which is used up
    if "jax" in sys.modules or "pytest" in sys.modules or sys.gettrace() is not None:
        return False  # too late to be the start of a program; a test; a debugger
    multiprocessing = sys.modules.get("multiprocessing")
    return multiprocessing is None or multiprocessing.parent_process() is None


def ensure_tuned_allocator() -> None:
    """Starts the program again with huge pages where that helps; to be the first call of a program.

    Returns, having done nothing, where there is nothing to gain: other systems and allocators, an old glibc, the
    kernel's huge pages off or on already, the tunable set by the user, `MEDJAX_HUGEPAGES=0`; and where a restart
    could lose something: in tests, debuggers, worker processes, or once jax is imported.
    """
    wanted, _ = _state()
    if not _can_restart() or not wanted:
        return
    # The user's own tunables come last and win.
    tunables = {_TUNABLE: "1"} | _KEEP | _tunables()
    environment = {
        **os.environ,
        "GLIBC_TUNABLES": ":".join(f"{name}={value}" for name, value in tunables.items()),
        _GUARD: "1",
    }
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(sys.executable, sys.orig_argv, environment)
    except OSError:
        return  # as it was: slower, not wrong


def release_unused() -> None:
    """Returns freed memory to the system (glibc keeps it); worth a call after compilation, which frees much."""
    if _glibc() is not None:
        ctypes.CDLL(None).malloc_trim(0)


def describe() -> str:
    """One line for a run's report: the allocator in force."""
    return f"{_state()[1]}"
