"""A run on a Cloud TPU VM slice through `gcloud`: create, install, run on all hosts, go on after preemptions, delete.

    python -m launch.tpu_vm --name=brain --zone=us-west4-a --type=v5litepod-16 --spot --bucket=my-runs -- \\
        --config=configs/brain_seg.py --config.data.batch_size=16 --workdir=/mnt/runs/brain

Needs `gcloud`, logged in, with a project that has TPU quota; --dry-run prints every command. The slice is asked for as
a queued resource. What git tracks here is copied to each host. --workdir lies in a bucket that every host mounts at
/mnt/runs, as a slice that is preempted is gone: it is then deleted, asked for anew, and the run resumes. So it does on
the same slice after a dropped connection: what still runs there is ended first.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from launch import common
from medjax.errors import UserError, run_program

MOUNT = "/mnt/runs"
PACKED = "medjax.tar.gz"  # what git tracks, in the home folder of each host
_POLL = 30.0  # seconds between two looks at a queued resource
_GONE = ("FAILED", "SUSPENDING", "SUSPENDED", "DELETING")
_FAILURES = 3  # of the request in a row, before it is given up
_LOST = 255  # what ssh ends with when the connection is lost
_UV = "~/.local/bin/uv"
_INSTALLED = "https://cloud.google.com/storage/docs/cloud-storage-fuse/install"
# uv brings a Python of its own: that of the images may be older than medjax asks for. In a bucket without hierarchical
# namespace gcsfuse refuses to rename a folder, as a complete checkpoint is, unless it may copy that many files for it.
SETUP = (
    f"set -e; mountpoint -q {MOUNT} || command -v gcsfuse >/dev/null || {{ "
    f"echo 'launch: gcsfuse is not on this host: choose another --runtime, or install it: {_INSTALLED}' >&2; "
    "exit 2; }; "
    f"rm -rf ~/medjax; mkdir ~/medjax; tar -xzf ~/{PACKED} -C ~/medjax; cd ~/medjax; "
    f"[ -x {_UV} ] || curl -LsSf https://astral.sh/uv/install.sh | sh; "
    f"[ -x ~/env/bin/python ] || {_UV} venv -q --python 3.11 ~/env; "
    f"{_UV} pip install -q --python ~/env/bin/python -r requirements.txt -r requirements-tpu.txt; "
    f"sudo mkdir -p {MOUNT}; sudo chmod 777 {MOUNT}; "
    f"mountpoint -q {MOUNT} || gcsfuse --implicit-dirs --rename-dir-limit=200000 BUCKET {MOUNT}"
)
# An earlier turn whose connection was lost may still hold the chips: it is told to save, and ended after 90 s.
_ALONE = (
    'old=$(cat ~/medjax.pid 2>/dev/null); ours() { [ -n "$old" ] && [ "$old" != $$ ] && '
    "grep -qs medjax.main /proc/$old/cmdline; }; "
    "if ours; then echo 'launch: an earlier turn still runs here: it is told to save and end'; kill $old; "
    "for _ in $(seq 90); do ours || break; sleep 1; done; if ours; then kill -9 $old; sleep 1; fi; fi; "
)


class Slice:
    """The `gcloud` commands of one TPU slice."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._where = [f"--zone={args.zone}", *([f"--project={args.project}"] if args.project else [])]

    def _command(self, what: str, verb: str, *words: str) -> list[str]:
        return ["gcloud", "compute", "tpus", what, verb, *words, *self._where]

    def create(self) -> list[str]:
        """Asks for the slice; it comes when there is one."""
        a = self._args
        command = self._command("queued-resources", "create", a.name, f"--node-id={a.name}")
        return [
            *command, f"--accelerator-type={a.type}", f"--runtime-version={a.runtime}", *(["--spot"] if a.spot else [])
        ]  # fmt: skip

    def state(self) -> list[str]:
        """Says how the queued resource stands, as JSON."""
        return [*self._command("queued-resources", "describe", self._args.name), "--format=json"]

    def delete(self) -> list[str]:
        """Gives the slice back, and takes the request from the queue."""
        return [*self._command("queued-resources", "delete", self._args.name), "--force", "--quiet"]

    def copy(self, file: str, to: str) -> list[str]:
        """Copies a file to every host, into the home folder."""
        return [*self._command("tpu-vm", "scp", file, f"{self._args.name}:{to}"), "--worker=all"]

    def ssh(self, text: str) -> list[str]:
        """Runs a shell command on every host."""
        return [*self._command("tpu-vm", "ssh", self._args.name), "--worker=all", f"--command={text}"]


def resource_state(slice_: Slice, poll: float = _POLL, looks: int = 4) -> tuple[str, str]:
    """(ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED...; why it failed); ('', '') where there is no such request.

    Raises:
      UserError: `gcloud` failed so many times in a row (`looks`): one may be the network.
    """
    for look in range(looks):
        done = subprocess.run(slice_.state(), capture_output=True, text=True, check=False)
        if not done.returncode:
            state = json.loads(done.stdout).get("state", {})
            if not isinstance(state, dict):
                return str(state), ""
            return str(state.get("state", "")), str(state.get("failedData", {}).get("error", {}).get("message", ""))
        if "NOT_FOUND" in done.stderr or "not found" in done.stderr.lower():
            return "", ""
        if look + 1 < looks:
            time.sleep(poll)
    raise UserError(f"{common.shown(slice_.state())} failed {looks} times: {done.stderr.strip()}")


def acquire(slice_: Slice, poll: float = _POLL) -> bool:
    """Waits till the slice is there, asking for it if need be; returns whether it is a new one.

    Raises:
      UserError: the request fails again and again: a quota, or a type that the zone does not have.
    """
    fresh, failures, said = False, 0, ""
    while (found := resource_state(slice_, poll))[0] != "ACTIVE":
        state, why = found
        if state != said:
            print(f"launch: the slice is {state or 'not asked for yet'}{f' ({why})' if why else ''}", flush=True)
            said = state
        if state in _GONE:
            failures += state == "FAILED"
            if failures == _FAILURES:
                raise UserError(
                    f"the slice could not be made, {failures} times in a row: {why or 'gcloud does not say why'}; look "
                    "at --type, --zone, --runtime and the project's quota"
                )
            common.execute(slice_.delete(), dry_run=False)
        elif not state:
            common.execute(slice_.create(), dry_run=False)
            fresh = True
        time.sleep(poll)
    return fresh


def pack(folder: Path) -> Path:
    """What git has at HEAD of the folder this runs in, as a tar file in `folder`."""
    common.need("git")
    file = folder / PACKED
    command = ["git", "archive", "--format=tar.gz", f"--output={file}", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"git archive failed: {done.stderr.strip()}; start this in the repository's folder")
    return file


def commands(args: argparse.Namespace, arguments: Sequence[str]) -> tuple[str, str]:
    """What every host runs: once to set it up, and the run."""
    setup = SETUP.replace("BUCKET", shlex.quote(args.bucket))
    run = shlex.join(["python", "-m", "medjax.main", *arguments])
    return setup, f"{_ALONE}. ~/env/bin/activate; cd ~/medjax; echo $$ > ~/medjax.pid; exec {run}"


def main(argv: Sequence[str] | None = None, poll: float = _POLL) -> int:
    """The command line; returns the exit code of the run."""
    own, arguments = common.split_arguments(argv)
    p = common.parser("tpu_vm", __doc__)
    p.add_argument("--name", required=True, help="of the slice")
    p.add_argument("--zone", required=True)
    p.add_argument("--type", required=True, help="accelerator type, such as v5litepod-16 or v6e-8")
    p.add_argument("--bucket", required=True, help="Cloud Storage bucket, mounted at /mnt/runs on every host")
    p.add_argument(
        "--runtime", default="v2-alpha-tpuv5-lite", help="software version of the VM; v2-alpha-tpuv6e for v6e"
    )
    p.add_argument("--project", default="")
    p.add_argument("--spot", action="store_true", help="cheaper, and preempted at times")
    p.add_argument("--keep", action="store_true", help="do not delete the slice at the end")
    p.add_argument("--restarts", type=int, default=50, help="turns after preemptions; default 50")
    args = p.parse_args(own)
    common.check_run(arguments, fixed_workdir=True, mount=MOUNT)
    common.at_least(args, restarts=0)
    slice_ = Slice(args)
    setup, run = commands(args, arguments)
    if args.dry_run:
        archive = ["git", "archive", "--format=tar.gz", f"--output=FOLDER/{PACKED}", "HEAD"]
        wait = "# wait till `state` is ACTIVE; after each preemption begin again here"
        for line in (
            slice_.create(), wait, slice_.state(), "# FOLDER: a temporary one", archive,
            slice_.copy(f"FOLDER/{PACKED}", PACKED), slice_.ssh(setup), slice_.ssh(run),
            *([] if args.keep else [slice_.delete()]),
        ):  # fmt: skip
            print(line if isinstance(line, str) else f"$ {common.shown(line)}")
        return 0
    common.need("gcloud", "install the Google Cloud CLI and log in")
    try:
        code = _turns(slice_, setup, run, args.restarts, poll)
    except BaseException:
        print(
            f"launch: the slice, if it was made, is still there and costs; the same command goes on with it, and this "
            f"gives it back:\n$ {common.shown(slice_.delete())}",
            flush=True,
        )
        raise
    if not args.keep and common.execute(slice_.delete(), dry_run=False, check=False):
        print("launch: the slice could not be given back, and costs; give that command again", flush=True)
    return code


def _turns(slice_: Slice, setup: str, run: str, restarts: int, poll: float) -> int:
    """The run, again and again while its slice is preempted or not reached; returns the exit code of the last turn."""
    for turn in range(restarts + 1):
        fresh = acquire(slice_, poll)
        if fresh or turn == 0:
            with tempfile.TemporaryDirectory() as folder:
                common.execute(slice_.copy(str(pack(Path(folder))), PACKED), dry_run=False)
            common.execute(slice_.ssh(setup), dry_run=False)
        code = common.execute(slice_.ssh(run), dry_run=False, check=False)
        lost = code == _LOST  # by the network, or because the slice vanished under the run: a later look tells
        if lost:
            print(f"launch: the connection to the hosts is lost; looking again in {poll:.0f} s", flush=True)
            time.sleep(poll)
        there = code != common.PREEMPTED and resource_state(slice_, poll)[0] == "ACTIVE"
        if there and not lost:
            break
        again = f"turn {turn + 2} resumes" if turn < restarts else f"--restarts={restarts} are used up"
        what = "the slice is still there" if there else f"preempted (exit code {code})"
        print(f"launch: {what}; {again}", flush=True)
    return code


if __name__ == "__main__":
    run_program(lambda: sys.exit(main()))
