"""A run as a JobSet on Kubernetes (GKE): one pod a host, TPU slices or GPUs, restarted when preempted.

    python -m launch.gke --name=brain --image=REGISTRY/medjax:1 --claim=runs --tpu=tpu-v5-lite-podslice \\
        --topology=4x4 --hosts=4 --chips=4 -- --config=configs/brain_seg.py --config.data.batch_size=16 \\
        --workdir=/mnt/runs/brain
    python -m launch.gke --name=brain --image=... --claim=runs --gpu=nvidia-h100-80gb --hosts=2 --chips=8 -- ...

The manifest (JobSet v1alpha2) goes to gke/NAME.yaml and to `kubectl apply`; --dry-run prints it. The cluster needs the
JobSet controller. Exit code 75 and evicted pods restart all pods as often as it takes; any other failure --restarts
times. --workdir lies on storage all pods see: a ReadWriteMany claim (--claim) or a bucket (--bucket), at /mnt/runs.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import common
from medjax.errors import UserError, run_program, write_atomic

MOUNT = "/mnt/runs"
PORT = 8476  # of the coordinator
JOB = "workers"
_GRACE = 90  # seconds between SIGTERM and SIGKILL: a checkpoint takes at most 30


def manifest(args: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """The JobSet.

    Args:
      args: of `parser`. arguments: of medjax.main.
    """
    # Kubernetes puts variables in place of $(NAME), unless the $ stands twice.
    command = ["python", "-m", "medjax.main", *(a.replace("$(", "$$(") for a in arguments)]
    if args.hosts > 1:
        # Pods of a JobSet are reached as <jobset>-<job>-<job index>-<pod index>.<jobset>.
        command += [f"--coordinator={args.name}-{JOB}-0-0.{args.name}:{PORT}", f"--processes={args.hosts}"]
        command += ["--process=$(JOB_COMPLETION_INDEX)"]
    chips = {"google.com/tpu" if args.tpu else "nvidia.com/gpu": str(args.chips)} if args.tpu or args.gpu else {}
    resources = {**chips, **{k: v for k, v in (("cpu", args.cpu), ("memory", args.memory)) if v}}
    container: dict[str, Any] = {"name": "medjax", "image": args.image, "command": command}
    container["ports"] = [{"containerPort": PORT}]
    container["resources"] = {"limits": resources} if chips else {"requests": resources}
    container["volumeMounts"] = [{"name": "runs", "mountPath": MOUNT}]
    pod: dict[str, Any] = {"restartPolicy": "Never", "terminationGracePeriodSeconds": _GRACE}
    selector = {}
    if args.tpu:
        selector = {
            "cloud.google.com/gke-tpu-accelerator": args.tpu,
            "cloud.google.com/gke-tpu-topology": args.topology,
        }
    elif args.gpu:
        selector = {"cloud.google.com/gke-accelerator": args.gpu}
    if args.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    if selector:
        pod["nodeSelector"] = selector
    if args.service_account:
        pod["serviceAccountName"] = args.service_account
    pod["containers"] = [container]
    metadata: dict[str, Any] = {}
    if args.bucket:
        metadata["annotations"] = {"gke-gcsfuse/volumes": "true"}
        # A checkpoint that is complete is renamed: without the limit only in a bucket with hierarchical namespace.
        options = {"bucketName": args.bucket, "mountOptions": "implicit-dirs,rename-dir-limit=200000"}
        csi = {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": options}
        pod["volumes"] = [{"name": "runs", "csi": csi}]
    else:
        pod["volumes"] = [{"name": "runs", "persistentVolumeClaim": {"claimName": args.claim}}]
    job = {
        "parallelism": args.hosts,
        "completions": args.hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        # A run that saved and ended with 75, and a pod that was evicted, fail the job by this policy...
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": "medjax", "operator": "In", "values": [common.PREEMPTED]},
                },
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {**({"metadata": metadata} if metadata else {}), "spec": pod},
    }
    # ... for which the set starts all pods again without counting.
    again = {
        "name": "preempted",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": args.name, "namespace": args.namespace},
        "spec": {
            "failurePolicy": {"maxRestarts": args.restarts, "rules": [again]},
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "replicatedJobs": [{"name": JOB, "replicas": 1, "template": {"spec": job}}],
        },
    }


def check(args: argparse.Namespace) -> None:
    """Raises UserError for options that contradict each other, or would be refused by the cluster."""
    longest = 63 - len(f"-{JOB}-0-{args.hosts}")  # a pod's host name
    if not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", args.name) or len(args.name) > longest:
        raise UserError(f"--name={args.name}: at most {longest} small letters, digits and '-', a letter first")
    if bool(args.claim) == bool(args.bucket):
        raise UserError("give either --claim=NAME (of a ReadWriteMany volume) or --bucket=NAME for --workdir")
    if args.tpu and args.gpu:
        raise UserError("give either --tpu or --gpu")
    if bool(args.tpu) != bool(args.topology):
        raise UserError("--tpu=KIND and --topology=4x4 belong together")
    if args.tpu:
        chips = 1
        for side in args.topology.split("x"):
            chips *= int(side) if side.isdecimal() else 0
        if chips != args.hosts * args.chips:
            raise UserError(
                f"--topology={args.topology}: {chips} chips, and {args.hosts} host(s) with {args.chips} are "
                f"{args.hosts * args.chips}; correct --hosts or --chips"
            )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = common.parser("gke", __doc__)
    p.add_argument("--name", required=True, help="of the JobSet")
    p.add_argument(
        "--image", required=True, help="container image with medjax in its working folder and its requirements"
    )
    p.add_argument("--namespace", default="default")
    p.add_argument("--hosts", type=int, default=1, help="pods, one a host")
    p.add_argument("--chips", type=int, default=1, help="TPU chips or GPUs of a host")
    p.add_argument("--tpu", default="", help="tpu-v5-lite-podslice, tpu-v6e-slice...")
    p.add_argument("--topology", default="", help="of the TPU slice, such as 4x4")
    p.add_argument("--gpu", default="", help="nvidia-h100-80gb, nvidia-l4...")
    p.add_argument("--cpu", default="", help="of a pod, such as 8")
    p.add_argument("--memory", default="", help="of a pod, such as 64Gi")
    p.add_argument("--claim", default="", help="ReadWriteMany persistent volume claim, mounted at /mnt/runs")
    p.add_argument("--bucket", default="", help="or a Cloud Storage bucket, through GCS FUSE")
    p.add_argument("--service-account", default="", help="Kubernetes service account, for the bucket")
    p.add_argument("--spot", action="store_true", help="spot machines")
    p.add_argument("--restarts", type=int, default=3, help="after failures that are no preemptions; default 3")
    return p  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Writes and applies the manifest, or prints it."""
    import yaml

    own, arguments = common.split_arguments(argv)
    args = parser().parse_args(own)
    common.check_run(arguments, fixed_workdir=True, mount=MOUNT)
    common.at_least(args, hosts=1, chips=1, restarts=0)
    check(args)
    text = yaml.safe_dump(manifest(args, arguments), sort_keys=False)
    file = Path("gke") / f"{args.name}.yaml"
    if args.dry_run:
        print(f"# {file}, to be applied with: kubectl apply -f {file}\n{text}", end="")
        return
    common.make_folder(file.parent)
    write_atomic(file, text)
    common.execute(["kubectl", "apply", "-f", str(file)], dry_run=False)
    print(f"kubectl logs -f -l jobset.sigs.k8s.io/jobset-name={args.name}   # follows it")


if __name__ == "__main__":
    run_program(main)
