"""A run on a Cloud TPU VM slice through `gcloud`: create, install, run on all hosts, go on after preemptions, delete.

    python -m launch.tpu_vm --name=brain --zone=us-west4-a --type=v5litepod-16 --spot --bucket=my-runs -- \\
        --config=configs/brain_seg.py --workdir=/mnt/runs/brain

Needs `gcloud`, logged in, with a project that has TPU quota; --dry-run prints every command. The slice is asked for as
a queued resource. What git tracks here is copied to each host. --workdir lies in a bucket that every host mounts at
/mnt/runs, as a slice that is preempted is gone: it is then deleted, asked for anew, and the run resumes.
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
_POLL = 30.0  # seconds between two looks at a queued resource
_GONE = ("FAILED", "SUSPENDING", "SUSPENDED", "DELETING")
SETUP = (
    "set -e; mkdir -p ~/medjax; tar -xzf /tmp/medjax.tar.gz -C ~/medjax; cd ~/medjax; "
    "python3 -m venv ~/env; . ~/env/bin/activate; pip install -q -r requirements.txt -r requirements-tpu.txt; "
    f"sudo mkdir -p {MOUNT}; sudo chmod 777 {MOUNT}; mountpoint -q {MOUNT} || gcsfuse --implicit-dirs BUCKET {MOUNT}"
)


class Slice:
    """The `gcloud` commands of one TPU slice."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._where = [f"--zone={args.zone}", *([f"--project={args.project}"] if args.project else [])]

    def create(self) -> list[str]:
        """Asks for the slice; it comes when there is one."""
        a = self._args
        command = [
            "gcloud",
            "compute",
            "tpus",
            "queued-resources",
            "create",
            a.name,
            f"--node-id={a.name}",
            *self._where,
        ]
        command += [f"--accelerator-type={a.type}", f"--runtime-version={a.runtime}", *(["--spot"] if a.spot else [])]
        return command

    def state(self) -> list[str]:
        """Says how the queued resource stands, as JSON."""
        return [
            "gcloud",
            "compute",
            "tpus",
            "queued-resources",
            "describe",
            self._args.name,
            *self._where,
            "--format=json",
        ]

    def delete(self) -> list[str]:
        """Gives the slice back, and takes the request from the queue."""
        return [
            "gcloud",
            "compute",
            "tpus",
            "queued-resources",
            "delete",
            self._args.name,
            *self._where,
            "--force",
            "--quiet",
        ]

    def copy(self, file: str, to: str) -> list[str]:
        """Copies a file to every host."""
        return [
            "gcloud",
            "compute",
            "tpus",
            "tpu-vm",
            "scp",
            file,
            f"{self._args.name}:{to}",
            *self._where,
            "--worker=all",
        ]

    def ssh(self, text: str) -> list[str]:
        """Runs a shell command on every host."""
        return [
            "gcloud",
            "compute",
            "tpus",
            "tpu-vm",
            "ssh",
            self._args.name,
            *self._where,
            "--worker=all",
            f"--command={text}",
        ]


def resource_state(slice_: Slice) -> str:
    """ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED...; '' where there is no such request."""
    done = subprocess.run(slice_.state(), capture_output=True, text=True, check=False)
    if done.returncode:
        if "NOT_FOUND" in done.stderr or "not found" in done.stderr.lower():
            return ""
        raise UserError(f"gcloud failed: {done.stderr.strip()}")
    state = json.loads(done.stdout).get("state", {})
    return str(state.get("state", "") if isinstance(state, dict) else state)


def acquire(slice_: Slice, poll: float = _POLL) -> bool:
    """Waits till the slice is there, asking for it if need be; returns whether it is a new one."""
    fresh = False
    said = ""
    while (state := resource_state(slice_)) != "ACTIVE":
        if state != said:
            print(f"launch: the slice is {state or 'not asked for yet'}", flush=True)
            said = state
        if state in _GONE:
            common.execute(slice_.delete(), dry_run=False)
        elif not state:
            common.execute(slice_.create(), dry_run=False)
            fresh = True
        time.sleep(poll)
    return fresh


def pack(folder: Path) -> Path:
    """What git tracks here, as a tar file."""
    file = folder / "medjax.tar.gz"
    done = subprocess.run(
        ["git", "archive", "--format=tar.gz", f"--output={file}", "HEAD"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"git archive failed: {done.stderr.strip()}; start this in the repository's folder")
    return file  # fmt: skip


def commands(args: argparse.Namespace, arguments: Sequence[str]) -> tuple[str, str]:
    """What every host runs: once to set it up, and the run."""
    setup = SETUP.replace("BUCKET", shlex.quote(args.bucket))
    run = shlex.join(["python", "-m", "medjax.main", *arguments])
    return setup, f". ~/env/bin/activate; cd ~/medjax; {run}"


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
    common.check_run(arguments, fixed_workdir=True)
    if not next(a for a in arguments if a.startswith("--workdir=")).removeprefix("--workdir=").startswith(MOUNT):
        raise UserError(
            f"--workdir must lie under {MOUNT}, where the bucket is: a preempted slice's own disks are gone"
        )
    slice_ = Slice(args)
    setup, run = commands(args, arguments)
    if args.dry_run:
        archive = ["git", "archive", "--format=tar.gz", "--output=/tmp/medjax.tar.gz", "HEAD"]
        wait = "# wait till `state` is ACTIVE; after each preemption begin again here"
        for line in (
            slice_.create(), wait, slice_.state(), archive, slice_.copy("/tmp/medjax.tar.gz", "/tmp/medjax.tar.gz"),
            slice_.ssh(setup), slice_.ssh(run), *([] if args.keep else [slice_.delete()]),
        ):  # fmt: skip
            print(line if isinstance(line, str) else f"$ {common.shown(line)}")
        return 0
    common.need("gcloud", "install the Google Cloud CLI and log in")
    for turn in range(args.restarts + 1):
        fresh = acquire(slice_, poll)
        if fresh or turn == 0:
            with tempfile.TemporaryDirectory() as folder:
                common.execute(slice_.copy(str(pack(Path(folder))), "/tmp/medjax.tar.gz"), dry_run=False)
            common.execute(slice_.ssh(setup), dry_run=False)
        code = common.execute(slice_.ssh(run), dry_run=False, check=False)
        # A slice that vanished under the run ends the connection with a code that says nothing.
        if code != common.PREEMPTED and resource_state(slice_) == "ACTIVE":
            break
        print(f"launch: preempted (exit code {code}); turn {turn + 2} resumes", flush=True)
    if not args.keep:
        common.execute(slice_.delete(), dry_run=False, check=False)
    return code


if __name__ == "__main__":
    run_program(lambda: sys.exit(main()))
