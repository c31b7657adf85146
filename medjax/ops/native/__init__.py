"""Native CPU kernels: C++ calling oneDNN, reached from JAX through XLA's foreign function interface.

Built on first use by the system's C++ compiler (`build.py`). Where that cannot be, one warning says why and callers
use XLA's own operations. `MEDJAX_NATIVE=0` in the environment turns the kernels off, `MEDJAX_NATIVE=1` is the default.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Iterator
from typing import Any

from medjax.errors import UserError, warn_once
from medjax.ops.native import build
from medjax.ops.native.cpus import usable_cpus

_TARGETS = (
    "medjax_conv3d",
    "medjax_conv3d_bias",
    "medjax_conv3d_input_grad",
    "medjax_conv3d_filter_grad",
    "medjax_instance_norm",
    "medjax_instance_norm_grad",
    "medjax_channel_sum",
    "medjax_warp",
    "medjax_separable",
    "medjax_tone",
    "medjax_normal",
    "medjax_gelu",
    "medjax_gelu_grad",
)
# dnnl_cpu_isa_t is a bit mask; a set contains another when it has all of its bits.
_AVX2, _AVX512, _AVX512_BF16, _AMX = 0x7, 0x27, 0xE7, 0xFEF
_local = threading.local()
_load_lock = threading.Lock()


def enabled() -> bool:
    """Whether programs traced now may use the kernels: not `MEDJAX_NATIVE=0`, not inside `disabled()`."""
    wish = os.environ.get("MEDJAX_NATIVE", "1")
    if wish not in ("0", "1"):
        raise UserError(f"MEDJAX_NATIVE={wish}: expected 0 (XLA's own operations) or 1 (native kernels, the default)")
    return wish == "1" and not getattr(_local, "disabled", False)


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Programs traced inside use XLA's own operations only, e.g. to export for other hosts or to count FLOPs.

    What `jax.jit` has traced before stays as it was: give it a new function (`jax.jit(lambda *a: f(*a))`).
    """
    before = getattr(_local, "disabled", False)
    _local.disabled = True
    try:
        yield
    finally:
        _local.disabled = before


def divisible(parts: int) -> contextlib.AbstractContextManager[None]:
    """For programs in which volumes lie over several devices (`parts` of them).

    The compiler cannot cut a native call along a spatial axis and would gather the volume; XLA's operations it cuts,
    and exchanges the halos.
    """
    return disabled() if parts > 1 else contextlib.nullcontext()


class _Library:
    """The loaded library."""

    def __init__(self) -> None:
        import jax.ffi

        path = build.library()
        try:
            with _passive_openmp():
                ctypes.CDLL(str(build.onednn_library()))  # the built library names it and finds it loaded
                library = ctypes.CDLL(str(path))
        except OSError as error:
            cure = f"delete {path} to build it again"
            raise build.Unavailable(f"the built library does not load ({error}): {cure}") from None
        self.threads = usable_cpus()
        library.medjax_set_threads(self.threads)
        self.instruction_set = int(library.medjax_instruction_set())
        library.medjax_map.restype = ctypes.c_void_p
        for name in _TARGETS:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
        self.library = library


@contextlib.contextmanager
def _passive_openmp() -> Iterator[None]:
    """While libgomp loads: its idle threads are to sleep, not to spin, as XLA's pool needs the CPUs between calls.

    libgomp reads the variables once, when loaded. What the user set stays in force.
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = "2000"
    try:
        yield
    finally:
        os.environ.pop("GOMP_SPINCOUNT", None)


@functools.cache
def _load_once() -> _Library | str:
    try:
        return _Library()
    except build.Unavailable as error:
        return str(error)


def _load() -> _Library | str:
    with _load_lock:
        return _load_once()


def available() -> bool:
    """Loads (and on first use builds) the kernels. False, with one warning saying the cure, where that fails."""
    loaded = _load()
    if isinstance(loaded, str):
        warn_once(
            f"CPU convolutions run on XLA, some ten times slower: {loaded}. MEDJAX_NATIVE=0 accepts this silently."
        )
        return False
    return True


def function(name: str) -> Any | None:
    """A C function of the library, by ctypes, for callers that can do without; None where off or without JAX."""
    try:
        loaded = _load() if enabled() else ""
    except ImportError:
        return None
    return None if isinstance(loaded, str) else getattr(loaded.library, name)


def supports_bfloat16() -> bool:
    """Whether the CPU can run the kernels in bfloat16 (emulated below AVX512-BF16)."""
    loaded = _load()
    return not isinstance(loaded, str) and loaded.instruction_set & _AVX512 == _AVX512


def status() -> str:
    """One line for a run's report: which convolution the CPU backend uses, or why not the native one."""
    import jax

    if jax.default_backend() != "cpu":
        return f"native CPU kernels: not used, the backend is {jax.default_backend()}"
    if not enabled():
        return "native CPU kernels: off (MEDJAX_NATIVE=0)"
    loaded = _load()
    if isinstance(loaded, str):
        return f"native CPU kernels: not in force: {loaded}"
    names = {_AMX: "AMX", _AVX512_BF16: "AVX512-BF16", _AVX512: "AVX-512", _AVX2: "AVX2"}
    isa = next((name for bits, name in names.items() if loaded.instruction_set & bits == bits), "SSE4.1")
    threads = f"{loaded.threads} thread{'s' if loaded.threads > 1 else ''}"
    return f"native CPU kernels: oneDNN {build.onednn_version()}, {isa}, {threads}"
