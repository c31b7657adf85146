"""Compiles the native library on first use, into a per-user cache."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from medjax.ops.native.cpus import usable_cpus

_HERE = Path(__file__).resolve().parent
_SOURCES = (
    "team.cc",
    "conv3d.cc",
    "depthwise.cc",
    "winograd.cc",
    "norm.cc",
    "warp.cc",
    "separable.cc",
    "tone.cc",
    "normal.cc",
    "gelu.cc",
    "gather.cc",
)
_HEADERS = ("team.h", "conv3d.h", "element.h", "exponential.h")
_RUNTIME_WHEEL, _HEADER_WHEEL = "onednn-cpu-gomp", "onednn-devel-cpu-gomp"
# Without errno a square root is one instruction, and loops with one in them are vectorised.
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-mprefer-vector-width=512",
    "-fno-math-errno",
    "-fPIC",
    "-fopenmp",
    "-w",
)
_TIMEOUT_S = 600


class Unavailable(Exception):
    """The native library cannot be had here. `str(error)` says why and what would cure it."""


def cache_root() -> Path:
    """The user's cache of medjax: `MEDJAX_CACHE`, else `$XDG_CACHE_HOME/medjax`, else `~/.cache/medjax`."""
    explicit = os.environ.get("MEDJAX_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medjax"


def cache_folder() -> Path:
    """Where built libraries are kept: in `cache_root`."""
    return cache_root() / "native"


def _wheel_file(wheel: str, name: str) -> Path:
    try:
        files = importlib.metadata.distribution(wheel).files or []
    except importlib.metadata.PackageNotFoundError:
        raise Unavailable(f"the package {wheel} is not installed: `pip install {wheel}`") from None
    for file in files:
        path = Path(str(file.locate())).resolve()
        if path.name == name and path.exists():
            return path
    raise Unavailable(f"the package {wheel} holds no {name}: `pip install --force-reinstall {wheel}`")


def onednn_library() -> Path:
    """The shared library of the oneDNN wheel."""
    return _wheel_file(_RUNTIME_WHEEL, "libdnnl.so.3")


def onednn_version() -> str:
    return importlib.metadata.version(_RUNTIME_WHEEL)


def _compiler() -> str:
    wish = os.environ.get("CXX")
    for name in [wish] if wish else ["g++", "c++"]:
        found = shutil.which(name)
        if found:
            return found
    raise Unavailable(f"no C++ compiler ({wish or 'g++'}) on the PATH: install one (Debian, Ubuntu: `apt install g++`)")


def _key() -> str:
    digest = hashlib.sha256()
    for name in (*_SOURCES, *_HEADERS):
        digest.update((_HERE / name).read_bytes())
    versions = (importlib.metadata.version("jaxlib"), onednn_version())
    # For `-march=native`: a cache in a home directory may serve hosts of different kinds.
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    digest.update(repr((flags, _FLAGS, versions, os.environ.get("CXX"), platform.libc_ver())).encode())
    return digest.hexdigest()[:20]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl  # Unix only

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released with the file, also by a process that dies
        yield


def _compile(target: Path) -> None:
    import jax.ffi

    compiler = _compiler()
    header = _wheel_file(_HEADER_WHEEL, "dnnl.hpp")
    library = onednn_library()
    includes = [f"-I{header.parent}", f"-I{jax.ffi.include_dir()}"]
    print(f"medjax: building the native CPU kernels with {compiler} into {target.parent}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as folder:
        objects = [Path(folder) / f"{Path(name).stem}.o" for name in _SOURCES]
        commands = [
            [compiler, *_FLAGS, *includes, "-c", str(_HERE / name), "-o", str(out)]
            for name, out in zip(_SOURCES, objects, strict=True)
        ]
        _run_all(commands, at_once=usable_cpus())
        # No run path: the oneDNN of the running environment is loaded first and found by its name.
        shared = Path(folder) / target.name
        link = [compiler, "-shared", "-fopenmp", *map(str, objects), "-o", str(shared)]
        _run_all([[*link, f"-L{library.parent}", f"-l:{library.name}"]], at_once=1)
        os.replace(shared, target)
    print(f"medjax: built in {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


def _run_all(commands: list[list[str]], at_once: int) -> None:
    for first in range(0, len(commands), at_once):
        running = [
            subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            for command in commands[first : first + at_once]
        ]
        try:
            said = [process.communicate(timeout=_TIMEOUT_S)[0] for process in running]
        except subprocess.TimeoutExpired:
            raise Unavailable(f"the compiler took more than {_TIMEOUT_S} s") from None
        finally:
            for process in running:
                process.kill()  # nothing to a process that has ended
        for process, output in zip(running, said, strict=True):
            if process.returncode:
                error = next((line for line in output.splitlines() if "error" in line), output[-300:])
                raise Unavailable(f"the build failed: {error.strip() or f'exit status {process.returncode}'}")


def library() -> Path:
    """Path of the built library, building it if the cache has none for these sources and versions.

    Several processes may call this at once: one builds, the others wait for it.

    Raises:
      Unavailable: wrong platform, no compiler, a package missing, or the build failed.
    """
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise Unavailable(f"the native kernels are for x86-64 Linux, this is {platform.machine()} {sys.platform}")
    onednn_library()
    try:
        folder = cache_folder()
        target = folder / f"medjax-{_key()}.so"
        if target.exists():
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{target.stem}.lock"):
            if not target.exists():
                _compile(target)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        raise Unavailable(
            f"the cache of built kernels cannot be used ({error}): set MEDJAX_CACHE to a folder"
        ) from None
    return target
