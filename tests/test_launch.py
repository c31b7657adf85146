"""Launchers: what they would run, processes that end together, a real SLURM, manifests against their schema."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import write_cohort, write_recipe

from launch import common, gke, local, slurm, tpu_vm
from medjax.errors import UserError

REPO = Path(__file__).resolve().parents[1]
RUN = ["--", "--config=configs/brain_seg.py", "--workdir=/mnt/runs/a b"]


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def until(condition: Callable[[], Any], seconds: float = 30) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)
    return found


# ---- this machine


def processes(*codes: str) -> list[local.Process]:
    return [local.Process((sys.executable, "-c", code), {}, ()) for code in codes]


SLEEP = "import time; time.sleep(60)"


def test_local_processes_end_together(capfd: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    assert local.run(processes("print('hello')", "print('there')"), 5) == (0, False)
    out = capfd.readouterr().out
    assert {"[0] hello", "[1] there"} <= set(out.splitlines())
    # One is killed: the other, which would go on for a minute, has a second to end by itself.
    assert local.run(processes("import os; os.kill(os.getpid(), 9)", SLEEP), 1) == (137, False)
    assert "process 0 ended (killed by SIGKILL); the others have 1 s" in capfd.readouterr().out
    assert local.run(processes(SLEEP, "raise SystemExit(3)"), 0)[0] == 3
    # One that ends by itself in time is let.
    assert local.run(processes("import time; time.sleep(1); raise SystemExit(75)", "raise SystemExit(75)"), 10)[0] == 75
    assert time.monotonic() - began < 25


def test_local_restarts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    codes = iter([(137, False), (75, False), (0, False), (2, False), (75, True)])
    monkeypatch.setattr(local, "run", lambda processes, grace: next(codes))
    assert local.main(["--processes=2", "--cpu-devices=1", "--restarts=5", *RUN]) == 0
    assert "started again (2 of 5)" in capsys.readouterr().out
    assert local.main(["--restarts=5", "--cpu-devices=1", *RUN]) == 2  # a mistake stays one
    assert local.main(["--restarts=5", "--cpu-devices=1", *RUN]) == 75  # someone told it to stop


def test_local_ends_what_it_started_when_another_cannot_start(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    first = local.Process(("bash", "-c", f"echo $$ > {pid}; exec sleep 60"), {}, ())
    with pytest.raises(OSError):
        local.run([first, local.Process((str(tmp_path / "none"),), {}, ())], 5)
    until(lambda: not pid.exists() or not Path(f"/proc/{pid.read_text().strip()}/exe").exists(), 10)


def test_local_exit_codes() -> None:
    assert [common.exit_words(c) for c in (1, 75, -9, -40, None)] == [
        "exit code 1", "preempted", "killed by SIGKILL", "killed by signal 40", "lost",
    ]  # fmt: skip
    assert local.together([0, 75]) == 75
    assert local.together([75, 2]) == 2
    assert local.together([-9, 1]) == 1  # the one that had something to say
    assert local.together([75, -15]) == 143
    assert local.together([0, 0]) == 0


def test_local_passes_a_signal_on() -> None:
    child = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print('up', flush=True); time.sleep(60)"
    )
    code = (
        "import sys; from launch import local\n"
        f"sys.exit(local.run([local.Process((sys.executable, '-c', {child!r}), {{}}, ())] * 2, 20)[0])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] in (["[0] up\n", "[1] up\n"], ["[1] up\n", "[0] up\n"])
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
    assert "told to save and end" in process.stdout.read()


def test_local_shares_out_devices(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    local.main(["--processes=2", "--port=1234", "--dry-run", *RUN])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "CUDA_VISIBLE_DEVICES=6,7" in lines[1]
    assert lines[1].endswith("'--workdir=/mnt/runs/a b' --coordinator=localhost:1234 --processes=2 --process=1")
    with pytest.raises(UserError, match="cannot be dealt out evenly; use a divisor of 4"):
        local.main(["--processes=3", "--dry-run", *RUN])
    local.main(["--processes=3", "--cpu-devices=2", "--dry-run", *RUN])
    assert "JAX_PLATFORMS=cpu" in (out := capsys.readouterr().out)
    assert "--xla_force_host_platform_device_count=2" in out
    for behind, message in (([], "arguments of medjax.main"), (["--", "--config", "x.py"], "write --config=VALUE")):
        with pytest.raises(UserError, match=message):
            local.main(["--dry-run", *behind])
    with pytest.raises(UserError, match="--restarts=-1: at least 0"):
        local.main(["--restarts=-1", *RUN])
    # A single process needs no coordinator.
    local.main(["--dry-run", *RUN])
    assert "--coordinator" not in capsys.readouterr().out


def test_shares() -> None:
    assert common.shares([0, 1, 2, 3, 4], 2) == [[0, 1], [2, 3, 4]]
    assert common.shares([0], 2) == [[0], [0]]


# ---- SLURM


def batch(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    slurm.main([*options, "--dry-run", *RUN])
    return capsys.readouterr().out


def test_slurm_script(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = batch(
        capsys, "--nodes=2", "--tasks-per-node=8", "--gpus-per-task=1", "--cpus-per-task=6", "--partition=gpu",
        "--sbatch=--constraint=a100", "--setup=module load cuda", "--python=python3",
    )  # fmt: skip
    options = re.findall(r"^#SBATCH --(\S+)$", text, re.M)
    for option in (
        "nodes=2", "ntasks-per-node=8", "gpus-per-task=1", "cpus-per-task=6", "partition=gpu", "constraint=a100",
        "requeue", "open-mode=append", "signal=TERM@120", "job-name=brain_seg",
    ):  # fmt: skip
        assert option in options
    assert "\nmodule load cuda\n" in text
    assert "--cpus-per-task=6 python3 -m medjax.main --config=configs/brain_seg.py '--workdir=/mnt/runs/a b'\n" in text
    assert "--array" not in text
    file = script(tmp_path / "job", text)
    assert subprocess.run(["bash", "-n", str(file)], check=False).returncode == 0


def test_slurm_array(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = batch(capsys, "--array", "model.features=(8,16),(16,32)", "--at-once=1", "--python=echo")
    assert "#SBATCH --array=0-1%1" in text
    assert "--output=slurm/%x-%A_%a.log" in text
    # As the shell expands it, with an srun that only says its arguments.
    srun = script(tmp_path / "srun", '#!/bin/bash\nshift 2; printf "%s|" "$@"; exit 3\n')
    environment = {**os.environ, "PATH": f"{srun.parent}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "1"}
    environment |= {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7"}
    file = script(tmp_path / "job", text)
    done = subprocess.run(["bash", str(file)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert done.stdout == (
        "echo|-m|medjax.main|--config=configs/brain_seg.py|--config.model.features=(16,32)|"
        "--workdir=/mnt/runs/a b/features(16,32)|"
    )
    for array, message in (("seed", "write KEY=VALUE1,VALUE2"), ("seed=0,1,0", "0 stands there twice")):
        with pytest.raises(UserError, match=message):
            slurm.main(["--array", array, "--dry-run", *RUN])


def test_slurm_asks_again_and_lets_a_setup_be_loose(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One look at the queue that fails is no cancelled job; a setup that reads an unset variable is no error."""
    text = batch(capsys, "--setup=echo setup $NOWHERE_SET", "--python=echo")
    here = tmp_path / "bin"
    here.mkdir()
    for name, body in {
        "srun": "exit 75",
        "squeue": f"echo x >> {here}/looks; [ $(wc -l < {here}/looks) -lt 3 ] && exit 1; echo RUNNING",
        "scontrol": f'echo "$@" > {here}/asked',
        "sleep": f'echo "$@" >> {here}/slept',
    }.items():
        script(here / name, f"#!/bin/bash\n{body}\n")
    environment = {**os.environ, "PATH": f"{here}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    environment.pop("SLURM_ARRAY_JOB_ID", None)
    file = script(tmp_path / "job", text)
    done = subprocess.run(["bash", str(file)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 75
    assert "setup" in done.stdout
    assert (here / "asked").read_text() == "requeue 7\n"
    assert (here / "slept").read_text() == "3\n3\n60\n"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A running SLURM of one node with two CPUs."""
    for program in ("slurmctld", "slurmd", "munged", "sbatch"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("slurmd starts other users' jobs, so this SLURM needs root")
    folder = tmp_path_factory.mktemp("slurm")
    start = REPO / "tests" / "slurm" / "start.sh"
    subprocess.run([str(start), str(folder), "2"], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        yield folder
        subprocess.run(["scancel", "--user=root"], check=False)
        time.sleep(1)
    subprocess.run([str(start), "--stop", str(folder)], check=True)


def queue(job: str) -> str:
    return subprocess.run(
        ["squeue", "--noheader", f"--jobs={job}", "--format=%T"], capture_output=True, text=True, check=False
    ).stdout.strip()


def start_now(job: str) -> None:
    """Starts a requeued job, which SLURM holds back for two minutes; one whose last turn still ends would be lost."""
    time.sleep(5)
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)


# Stands for medjax.main: the first turn works till it is told to stop and saves, the second finishes.
TURNS = """#!/bin/bash
echo "turn ${SLURM_RESTART_COUNT:-0}, process $SLURM_PROCID of $SLURM_NTASKS: ${*: -1}"
trap 'echo saved; exit 75' TERM
[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && exit 0
for _ in $(seq 300); do sleep 0.1; done
"""


def submit(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    monkeypatch.chdir(folder)
    slurm.main([*options, "--", "--config=recipe.py:debug", "--workdir=runs/x"])
    found = re.search(r"batch job (\d+)", capsys.readouterr().out)
    assert found is not None
    return found[1]


@pytest.mark.slurm
def test_slurm_requeues_a_preempted_run(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = script(tmp_path / "turns", TURNS)
    job = submit(tmp_path, monkeypatch, capsys, f"--python={program}", "--tasks-per-node=2", "--time=10")
    log = tmp_path / "slurm" / f"recipe_debug-{job}.log"
    until(lambda: log.exists() and log.read_text().count("turn 0") == 2)
    subprocess.run(["scancel", "--signal=TERM", job], check=True)  # what a preemption sends
    until(lambda: queue(job) == "PENDING")
    assert log.read_text().count("saved") == 2
    assert f"job {job} is queued again, and resumes" in log.read_text()
    start_now(job)
    until(lambda: log.read_text().count("turn 1") == 2)
    assert "turn 1, process 1 of 2: --workdir=runs/x" in log.read_text()
    until(lambda: queue(job) in ("", "COMPLETED", "COMPLETING"))
    until(lambda: "JobState=COMPLETED" in shown(job))


def shown(job: str) -> str:
    return subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=False).stdout


@pytest.mark.slurm
def test_slurm_leaves_a_cancelled_run_alone(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = script(tmp_path / "turns", TURNS)
    job = submit(tmp_path, monkeypatch, capsys, f"--python={program}", "--name=gone", "--time=10")
    log = tmp_path / "slurm" / f"gone-{job}.log"
    until(lambda: log.exists() and "turn 0" in log.read_text())
    subprocess.run(["scancel", job], check=True)
    until(lambda: "JobState=CANCELLED" in shown(job))
    assert "saved" in log.read_text()
    assert "queued again" not in log.read_text()


@pytest.mark.slurm
def test_slurm_array_requeues_its_elements(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = script(tmp_path / "turns", TURNS)
    job = submit(tmp_path, monkeypatch, capsys, f"--python={program}", "--array=seed=5,6", "--time=10")
    logs = [tmp_path / "slurm" / f"recipe_debug-{job}_{i}.log" for i in range(2)]
    until(lambda: all(log.exists() and "turn 0" in log.read_text() for log in logs))
    assert [log.read_text().strip().split(": ")[1] for log in logs] == [f"--workdir=runs/x/seed{s}" for s in (5, 6)]
    # The last element is preempted, whose number is that of the whole array: the other goes on.
    subprocess.run(["scancel", "--signal=TERM", f"{job}_1"], check=True)
    until(lambda: queue(f"{job}_1") == "PENDING")
    assert queue(f"{job}_0") == "RUNNING"
    assert f"job {job}_1 is queued again" in logs[1].read_text()
    assert "saved" not in logs[0].read_text()
    start_now(f"{job}_1")
    until(lambda: "turn 1" in logs[1].read_text())
    subprocess.run(["scancel", job], check=True)


@pytest.mark.slurm
def test_slurm_trains_on_two_tasks_through_a_preemption(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "tiny.py", write_cohort(tmp_path / "cohort"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    run = tmp_path / "run"
    train = {"total": "600 steps", "eval_every": "600 steps", "checkpoint_every": "600 steps"}
    more = [f"--config.train.{k}={v}" for k, v in train.items()]
    slurm.main(["--tasks-per-node=2", "--time=20", "--", f"--config={recipe}", f"--workdir={run}", *more])
    found = re.search(r"batch job (\d+)", capsys.readouterr().out)
    assert found is not None
    job, log = found[1], tmp_path / "slurm" / f"tiny-{found[1]}.log"
    until(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text().count("\n") > 3, 280)
    subprocess.run(["scancel", "--signal=TERM", job], check=True)
    until(lambda: queue(job) == "PENDING", 90)
    assert f"job {job} is queued again, and resumes" in log.read_text()
    before = len((run / "metrics.jsonl").read_text().splitlines())
    assert before < 600
    start_now(job)
    until(lambda: "JobState=COMPLETED" in shown(job), 280)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 601))  # none lost, none twice
    assert json.loads((run / "eval" / "test" / "summary.json").read_text())["checkpoint"]["step"] == 600


# ---- Kubernetes

GKE = ["--name=brain", "--image=example.org/medjax:1", "--dry-run"]


def jobset(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    import yaml

    gke.main([*GKE, *options, *RUN])
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize(
    "options",
    [
        ["--claim=runs", "--tpu=tpu-v5-lite-podslice", "--topology=4x4", "--hosts=4", "--chips=4", "--spot"],
        ["--bucket=my-runs", "--service-account=runner", "--gpu=nvidia-l4", "--hosts=2", "--chips=2", "--memory=64Gi"],
        ["--claim=runs", "--cpu=8", "--namespace=research"],
    ],
)
def test_jobset_fits_its_schema(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    from jobset import SCHEMA

    found = jobset(capsys, *options)
    jsonschema.validate(found, SCHEMA)
    for break_it in ({"spec": {**found["spec"], "suspended": True}}, {"apiVersion": "batch/v1"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**found, **break_it}, SCHEMA)


def test_jobset_of_a_bucket_lets_folders_be_renamed(capsys: pytest.CaptureFixture[str]) -> None:
    found = jobset(capsys, "--bucket=my-runs", "--gpu=nvidia-l4")
    [volume] = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["volumes"]
    assert volume["csi"]["volumeAttributes"] == {
        "bucketName": "my-runs",
        "mountOptions": "implicit-dirs,rename-dir-limit=200000",
    }


def test_jobset_says_what_it_must(capsys: pytest.CaptureFixture[str]) -> None:
    found = jobset(
        capsys, "--claim=runs", "--tpu=tpu-v5-lite-podslice", "--topology=4x4", "--hosts=4", "--chips=4", "--restarts=5"
    )
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"], job["backoffLimit"]) == (4, 4, "Indexed", 0)
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # or Kubernetes refuses a podFailurePolicy
    [container] = pod["containers"]
    assert container["command"][:4] == ["python", "-m", "medjax.main", "--config=configs/brain_seg.py"]
    # <jobset>-<job>-<job index>-<pod index>.<subdomain>, the subdomain being the JobSet's name
    assert container["command"][-3] == "--coordinator=brain-workers-0-0.brain:8476"
    assert container["command"][-2:] == ["--processes=4", "--process=$(JOB_COMPLETION_INDEX)"]
    assert container["resources"]["limits"]["google.com/tpu"] == "4"
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [75]
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--claim=a", "--bucket=b"], "either --claim=NAME"),
        ([], "either --claim=NAME"),
        (["--claim=a", "--tpu=t", "--topology=4x4", "--hosts=2", "--chips=4"], "16 chips, and 2 host"),
        (["--claim=a", "--tpu=t"], "belong together"),
        (["--claim=a", "--name=Brain_1"], "small letters"),
    ],
)
def test_jobset_refusals(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        gke.main([*GKE, *options, *RUN])
    with pytest.raises(UserError, match="give --workdir=FOLDER"):
        gke.main([*GKE, "--claim=a", "--", "--config=x.py"])
    with pytest.raises(UserError, match="--workdir=/mnt/runs/../x must lie under /mnt/runs"):
        gke.main([*GKE, "--claim=a", "--", "--config=x.py", "--workdir=/mnt/runs/../x"])


# ---- TPU VMs

TPU = ["--name=brain", "--zone=us-west4-a", "--type=v5litepod-16", "--bucket=my-runs", "--spot"]

# A slice that is there at the third look, is preempted under the first run, and has to be asked for again.
GCLOUD = """#!/bin/bash
here=$(dirname "$0"); echo "$@" >> $here/calls
case "$*" in
  *describe*) [ -e $here/there ] || { echo "ERROR: NOT_FOUND: no such thing" >&2; exit 1; }
    if [ -e $here/refused ]; then
      echo '{"state": {"state": "FAILED", "failedData": {"error": {"message": "no quota"}}}}'; exit
    fi
    if [ -e $here/broken ]; then echo '{"state": {"state": "SUSPENDED"}}'; exit; fi
    n=$(cat $here/there); echo $((n + 1)) > $here/there
    [ "$n" -ge 1 ] && echo '{"state": {"state": "ACTIVE"}}' || echo '{"state": {"state": "WAITING_FOR_RESOURCES"}}' ;;
  *queued-resources\\ create*) echo 0 > $here/there ;;
  *delete*) rm -f $here/there $here/broken ;;
  *medjax.main*) if [ -e $here/ran ]; then exit 0; fi; touch $here/ran $here/broken; exit 255 ;;
esac
"""


def test_tpu_vm_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert tpu_vm.main([*TPU, "--dry-run", *RUN]) == 0
    lines = [shlex.split(x[2:]) for x in capsys.readouterr().out.splitlines() if x.startswith("$ ")]
    assert [" ".join(x[:5]) for x in lines] == [
        "gcloud compute tpus queued-resources create", "gcloud compute tpus queued-resources describe",
        "git archive --format=tar.gz --output=FOLDER/medjax.tar.gz HEAD", "gcloud compute tpus tpu-vm scp",
        "gcloud compute tpus tpu-vm ssh", "gcloud compute tpus tpu-vm ssh",
        "gcloud compute tpus queued-resources delete",
    ]  # fmt: skip
    assert "--spot" in lines[0]
    for command in (lines[4][-1], lines[5][-1]):
        assert subprocess.run(["bash", "-n", "-c", command.removeprefix("--command=")], check=False).returncode == 0
    assert "'--workdir=/mnt/runs/a b'" in lines[5][-1]
    # On the hosts the code lies in the home folder, not where others may write.
    assert lines[3][5:7] == ["FOLDER/medjax.tar.gz", "brain:medjax.tar.gz"]
    assert "tar -xzf ~/medjax.tar.gz" in lines[4][-1]
    with pytest.raises(UserError, match="must lie under /mnt/runs"):
        tpu_vm.main([*TPU, "--dry-run", "--", "--config=x", "--workdir=runs/x"])


@pytest.fixture
def gcloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in in the place of `gcloud`, and the folder this runs in."""
    script(tmp_path / "gcloud", GCLOUD)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_tpu_vm_gives_a_request_up_that_fails(gcloud: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (gcloud / "refused").touch()
    with pytest.raises(UserError, match="3 times in a row: no quota; look at --type"):
        tpu_vm.main([*TPU, *RUN], poll=0.01)
    did = [c.split()[3] for c in (gcloud / "calls").read_text().splitlines() if "describe" not in c]
    assert did == ["create", "delete", "create", "delete", "create"]
    # What may still cost is said.
    assert "queued-resources delete brain --zone=us-west4-a --force --quiet" in capfd.readouterr().out.splitlines()[-1]


def test_tpu_vm_looks_again_before_it_gives_up(
    gcloud: Path,
) -> None:
    script(gcloud / "gcloud", '#!/bin/bash\necho look >> calls; echo "no network" >&2; exit 1')
    with pytest.raises(UserError, match="failed 4 times: no network"):
        tpu_vm.main([*TPU, *RUN], poll=0.01)
    assert (gcloud / "calls").read_text() == 4 * "look\n"


def test_tpu_vm_goes_on_after_a_preemption(
    gcloud: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with contextlib.suppress(KeyError):
        monkeypatch.delenv("GIT_DIR")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "file").write_text("x")
    for command in (["init", "-q"], ["add", "code"], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    assert tpu_vm.main([*TPU, *RUN], poll=0.01) == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    did = [c.split()[2:4] for c in calls if "describe" not in c]
    once = [["queued-resources", "create"], ["tpu-vm", "scp"], ["tpu-vm", "ssh"], ["tpu-vm", "ssh"]]
    assert did == [*once, ["queued-resources", "delete"], *once, ["queued-resources", "delete"]]
    assert "preempted (exit code 255); turn 2 resumes" in capfd.readouterr().out


def test_tpu_vm_goes_on_after_a_dropped_connection(
    gcloud: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The same slice, which is neither deleted nor set up again."""
    script(gcloud / "gcloud", GCLOUD.replace("touch $here/ran $here/broken", "touch $here/ran"))
    monkeypatch.setattr(tpu_vm, "pack", lambda folder: folder)
    assert tpu_vm.main([*TPU, *RUN], poll=0.01) == 0
    did = [c.split()[2:4] for c in (gcloud / "calls").read_text().splitlines() if "describe" not in c]
    assert did == [
        ["queued-resources", "create"], ["tpu-vm", "scp"], *3 * [["tpu-vm", "ssh"]], ["queued-resources", "delete"],
    ]  # fmt: skip
    out = capfd.readouterr().out
    assert "the connection to the hosts is lost; looking again" in out
    assert "the slice is still there; turn 2 resumes" in out


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder in the place of a TPU host's; programs that only say how they were called, in `said`."""
    (tmp_path / "bin").mkdir()
    for name in ("sudo", "gcsfuse", "tar", "uv"):
        script(tmp_path / "bin" / name, f'#!/bin/bash\necho {name} "$@" >> ~/said\n')
    script(tmp_path / "bin" / "mountpoint", "#!/bin/bash\nexit 1\n")
    (tmp_path / ".local").mkdir()
    (tmp_path / ".local" / "bin").symlink_to(tmp_path / "bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    return tmp_path


def on_host(text: str) -> subprocess.Popen:
    return subprocess.Popen(["bash", "-c", text], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def tpu_commands() -> tuple[str, str]:
    return tpu_vm.commands(argparse.Namespace(bucket="my-runs"), RUN[1:])


def test_tpu_vm_sets_a_host_up(host: Path) -> None:
    done = on_host(tpu_commands()[0])
    out = done.communicate(timeout=20)[0]
    assert done.returncode == 0, out
    assert (host / "said").read_text().replace(str(host), "~").splitlines() == [
        "tar -xzf ~/medjax.tar.gz -C ~/medjax",
        "uv venv -q --python 3.11 ~/env",
        "uv pip install -q --python ~/env/bin/python -r requirements.txt -r requirements-tpu.txt",
        "sudo mkdir -p /mnt/runs",
        "sudo chmod 777 /mnt/runs",
        "gcsfuse --implicit-dirs --rename-dir-limit=200000 my-runs /mnt/runs",
    ]
    (host / "bin" / "gcsfuse").unlink()
    done = on_host(tpu_commands()[0])
    assert (
        "gcsfuse is not on this host: choose another --runtime, or install it: https" in done.communicate(timeout=20)[0]
    )
    assert done.returncode == 2


def test_tpu_vm_ends_an_earlier_turn_on_its_hosts(host: Path) -> None:
    (host / "env" / "bin").mkdir(parents=True)
    (host / "env" / "bin" / "activate").touch()
    (host / "medjax").mkdir()
    body = (
        "[ -e ~/up ] && exit 0; trap 'touch ~/saved; exit 75' TERM; touch ~/up; for i in $(seq 300); do sleep 0.1; done"
    )
    script(host / "bin" / "python", f"#!/bin/bash\n{body}\n")
    first = on_host(tpu_commands()[1])
    until((host / "up").exists)
    second = on_host(tpu_commands()[1])
    assert "an earlier turn still runs here" in second.communicate(timeout=20)[0]
    assert (first.wait(10), second.returncode) == (75, 0)
    assert (host / "saved").exists()
    # The number of one that has ended says nothing, whoever has it now.
    (host / "medjax.pid").write_text(str(os.getpid()))
    third = on_host(tpu_commands()[1])
    assert third.communicate(timeout=20)[0] == ""
    assert third.returncode == 0


# ---- commands of the documentation


def documented() -> list[str]:
    """The commands of docs/cluster.md and of the launchers' own help that start a run, each on one line."""
    texts = [(REPO / "docs" / "cluster.md").read_text(), *(str(m.__doc__) for m in (local, slurm, tpu_vm, gke))]
    lines = [line.strip() for text in texts for line in text.replace("\\\n", " ").splitlines()]
    kinds = "python -m launch.", "python -m medjax.main --config=configs"
    return [line for line in lines if line.startswith(kinds) and not line.endswith("-- ...")]


def devices(command: str) -> int:
    """Of all the processes that a command starts."""
    given = dict(re.findall(r"--([a-z-]+)=(\S+)", command.partition(" -- ")[0]))

    def number(key: str, default: int = 1) -> int:
        return int(given.get(key, default))

    if said := re.search(r"# (\d+) (GPUs|CPU devices)", command):
        return int(said[1])
    return {
        "local": number("processes") * number("cpu-devices"),
        "slurm": number("nodes") * number("tasks-per-node") * number("gpus-per-task"),
        "tpu_vm": int(given.get("type", "-1").rpartition("-")[2]),
        "gke": number("hosts") * number("chips"),
    }[command.split()[2].removeprefix("launch.")]


@pytest.mark.parametrize("command", documented())
def test_documented_commands_start(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand: the batch of the recipe can be cut over the devices that they ask for."""
    from types import SimpleNamespace

    from medjax import config as config_lib
    from medjax import models, parallel, tasks

    monkeypatch.chdir(REPO)
    words = shlex.split(command, comments=True)
    arguments = words[words.index("--") + 1 :] if "--" in words else words[3:]
    common.check_run(arguments)
    [recipe] = [a.removeprefix("--config=") for a in arguments if a.startswith("--config=")]
    if recipe == "FILE":
        return
    overrides = [a.removeprefix("--config.") for a in arguments if a.startswith("--config.")]
    options = {"model": models.options, "tasks": tasks.options}
    config = config_lib.load(recipe, overrides, lambda room, kind: options[room](kind))
    n = devices(command)
    mesh = SimpleNamespace(shape={"data": n, "fsdp": 1, "space": 1}, size=n)
    parallel.check_batch(config.data.batch_size, config.optim.accumulate, mesh)  # type: ignore[arg-type]


def test_there_are_documented_commands() -> None:
    assert [devices(c) for c in documented()] == [8, 8, 8, 16, 1, 16, 16, 16, 8, 8, 16, 1, 16, 16]


def test_programs_that_are_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="'gcloud' is not installed here"):
        tpu_vm.main([*TPU, *RUN])
    with pytest.raises(UserError, match="'sbatch' is not installed here"):
        slurm.main([*RUN])
    with pytest.raises(UserError, match="'kubectl' is not installed here"):
        gke.main([*GKE[:2], "--claim=a", *RUN])
