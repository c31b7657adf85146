"""The restart with huge pages: what it keeps, and when it does not happen."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from medjax import runtime
from medjax.errors import UserError

REPO = Path(__file__).resolve().parents[1]

PROGRAM = """
import json, os, signal, sys
os.environ["STARTS"] = os.environ.get("STARTS", "") + "x"
print("before", os.getpid(), flush=False)
from medjax import runtime
runtime.ensure_tuned_allocator()
assert "jax" not in sys.modules
told = {"pid": os.getpid(), "argv": sys.argv, "starts": os.environ["STARTS"], "stdin": sys.stdin.read(),
        "tunables": os.environ.get("GLIBC_TUNABLES"), "guard": "MEDJAX_RESTARTED" in os.environ,
        "name": __name__, "cwd": os.getcwd(), "says": runtime.describe(),
        "hup": signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, "pipe": os.read(int(os.environ["PIPE"]), 9).decode()}
print(json.dumps(told))
sys.stdout.flush()
if "--die" in sys.argv:
    os.kill(os.getpid(), signal.SIGTERM)
sys.exit(7)
"""


def thp_is_on_request() -> bool:
    return runtime._THP.exists() and "[madvise]" in runtime._THP.read_text()


needs_madvise = pytest.mark.skipif(
    sys.platform != "linux" or (runtime._glibc() or (0,)) < (2, 35) or not thp_is_on_request(),
    reason="needs Linux with glibc 2.35 and transparent huge pages on request",
)


def start(folder: Path, *arguments: str, **environment: str) -> tuple[dict, subprocess.CompletedProcess[str]]:
    """Runs PROGRAM as a module in `folder`."""
    (folder / "program.py").write_text(PROGRAM)
    read, write = os.pipe()
    os.write(write, b"by pipe")
    os.close(write)
    merged = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "MEDJAX_HUGEPAGES", "LD_PRELOAD")}
    merged |= {"PYTHONPATH": os.pathsep.join((str(REPO), str(folder))), "PIPE": str(read), **environment}
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # handed down, as nohup does
    try:
        done = subprocess.run(
            [sys.executable, "-X", "utf8", *(arguments or ("-m", "program"))],
            env=merged, cwd=folder, input="from stdin", capture_output=True, text=True, timeout=60, pass_fds=[read],
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGHUP, before)
        os.close(read)
    lines = done.stdout.splitlines()
    assert len(lines) > 1, done.stderr
    told = json.loads(lines[-1])
    told["before"] = [int(line.split()[1]) for line in lines if line.startswith("before")]
    return told, done


@needs_madvise
def test_a_restart_keeps_the_process_its_arguments_streams_and_exit_code(tmp_path):
    told, done = start(tmp_path, "-m", "program", "--name=a b", "*")
    assert told["starts"] == "xx"  # once, and not again
    assert told["before"] == [told["pid"]] * 2
    assert told["tunables"].split(":")[0] == "glibc.malloc.hugetlb=1"
    assert "glibc.malloc.trim_threshold=" in told["tunables"]
    assert "huge pages" in told["says"]
    assert told["argv"][1:] == ["--name=a b", "*"]
    assert told["name"] == "__main__"
    assert told["cwd"] == str(tmp_path)
    assert (told["stdin"], told["pipe"], told["hup"], told["guard"]) == ("from stdin", "by pipe", True, False)
    assert done.returncode == 7
    assert done.stderr == ""


@needs_madvise
def test_a_script_restarts_too_and_signals_end_it_as_usual(tmp_path):
    told, done = start(tmp_path, "program.py", "--die")
    assert told["starts"] == "xx"
    assert done.returncode == -signal.SIGTERM


@needs_madvise
def test_the_users_tunables_are_kept(tmp_path):
    told, _ = start(tmp_path, GLIBC_TUNABLES="glibc.malloc.arena_max=3:glibc.malloc.trim_threshold=7")
    assert {"glibc.malloc.hugetlb=1", "glibc.malloc.arena_max=3", "glibc.malloc.trim_threshold=7"} <= set(
        told["tunables"].split(":")
    )
    assert told["tunables"].count("trim_threshold") == 1


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"MEDJAX_HUGEPAGES": "0"}, "MEDJAX_HUGEPAGES=0"),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, "hugetlb=0"),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, "hugetlb=1"),
        ({"MEDJAX_RESTARTED": "1"}, "pages"),
    ],
)
@needs_madvise
def test_no_restart_where_it_is_unwanted_done_or_tried(tmp_path, environment, says):
    told, done = start(tmp_path, **environment)
    assert told["starts"] == "x"
    assert says in told["says"]
    assert done.returncode == 7


@pytest.mark.parametrize("program", ["main", "plan.__main__", "predict", "select", "merge"])
def test_programs_start_anew_before_jax_is_imported(program):
    code = (
        "import runpy, sys; from medjax import runtime\n"
        "def noted(): print('jax' in sys.modules); sys.exit()\n"
        f"runtime.ensure_tuned_allocator = noted; runpy.run_module('medjax.{program}', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, timeout=60)
    assert done.stdout == "False\n", done.stderr


def test_no_restart_under_pytest(monkeypatch):
    monkeypatch.setattr(runtime, "_state", lambda: (True, ""))
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("restarted"))
    runtime.ensure_tuned_allocator()


@pytest.mark.parametrize(
    ("mode", "version", "platform", "preload", "says"),
    [
        ("always madvise [never]", (2, 36), "linux", "", "off"),
        ("[always] madvise never", (2, 36), "linux", "", "kernel's own choice"),
        (None, (2, 36), "linux", "", "off"),
        ("always [madvise] never", (2, 31), "linux", "", "glibc 2.31"),
        ("always [madvise] never", None, "linux", "", "another C library"),
        ("always [madvise] never", (2, 36), "linux", "/usr/lib/libjemalloc.so.2", "jemalloc"),
        ("always [madvise] never", (2, 36), "darwin", "", "darwin"),
    ],
)
def test_where_nothing_is_to_be_gained(monkeypatch, tmp_path, mode, version, platform, preload, says):
    for name in ("GLIBC_TUNABLES", "MEDJAX_HUGEPAGES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LD_PRELOAD", preload)
    monkeypatch.setattr(runtime, "_THP", tmp_path / "enabled")
    if mode is not None:
        (tmp_path / "enabled").write_text(mode)
    monkeypatch.setattr(runtime, "_glibc", lambda: version)
    monkeypatch.setattr(runtime.sys, "platform", platform)
    wanted, words = runtime._state()
    assert not wanted
    assert says in words


def test_a_misspelt_switch_is_an_error(monkeypatch):
    monkeypatch.setenv("MEDJAX_HUGEPAGES", "no")
    with pytest.raises(UserError, match="MEDJAX_HUGEPAGES=no"):
        runtime.describe()
