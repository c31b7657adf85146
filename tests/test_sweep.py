"""Sweeps: variants and their names, runs that fail, are retried, interrupted and resumed; a whole ablation; SLURM."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_compare import noisy, write_run
from test_launch import cluster, script, shown, start_now, until  # noqa: F401  (a fixture)

import launch.work
from configs.ablations import multitask
from launch import sweep
from launch.work import Work, stop
from medjax.errors import UserError

REPO = Path(__file__).resolve().parents[1]
RECIPE = """
from ml_collections import ConfigDict
def get_config(arg=None):
    return ConfigDict({"model": {"name": "unet", "features": (4, 8)}, "tasks": {"t": {"type": "segmentation"}}})
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "recipe.py").write_text(RECIPE)
    return tmp_path / "recipe.py"


def work(folder: Path, name: str, code: str) -> Work:
    return Work(name, folder / name, ("bash", "-c", code))


def states(works: list[Work]) -> list[str]:
    return [w.status()["state"] for w in works]


# ---- variants


def test_values_are_split_outside_brackets() -> None:
    assert sweep.split_values("0.1,0.01") == ["0.1", "0.01"]
    assert sweep.split_values("(8,16),(16,32)") == ["(8,16)", "(16,32)"]
    assert sweep.split_values("'a,b',[1,2]") == ["'a,b'", "[1,2]"]


def test_a_grid_is_a_product() -> None:
    found = sweep.grid(["optim.lr=0.1,0.01", "model.features=(8,16),(16,32)"])
    assert [v.name for v in found] == [
        "lr=0.1_features=8-16", "lr=0.1_features=16-32", "lr=0.01_features=8-16", "lr=0.01_features=16-32",
    ]  # fmt: skip
    assert found[1].overrides == {"optim.lr": "0.1", "model.features": "(16,32)"}
    # Keys of one last name are told apart.
    assert sweep.grid(["optim.name=sgd", "model.name=unet"])[0].name == "optim.name=sgd_model.name=unet"


@pytest.mark.parametrize("axes", [["optim.lr"], ["optim.lr=0.1,"], ["=1"], ["a=1", "a=2"]])
def test_grids_that_make_no_sense(axes: list[str]) -> None:
    with pytest.raises(UserError, match="--grid"):
        sweep.grid(axes)


def dry(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    sweep.main([*arguments, "--dry-run"])
    return capsys.readouterr().out.splitlines()


def test_commands_of_a_sweep(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = dry(
        capsys,
        f"--config={recipe}",
        "--grid",
        "optim.lr=0.1,0.01",
        "--seeds=2",
        "--out=o",
        "--config.train.total=9 steps",
    )
    assert len(lines) == 5
    # Seeds outermost: a whole comparison is there after the first of them.
    assert [line.split("--workdir=")[1].split()[0] for line in lines[:-1]] == [
        "o/lr=0.1/seed0", "o/lr=0.01/seed0", "o/lr=0.1/seed1", "o/lr=0.01/seed1",
    ]  # fmt: skip
    assert "'--config.train.total=9 steps' --config.optim.lr=0.01 --config.name=lr=0.01 --config.seed=1" in lines[3]
    lines = dry(capsys, f"--config={recipe}", "--grid", "optim.lr=0.1,0.01", "--folds=3", "--only=lr=0.01", "--out=o")
    assert "o/lr=0.01/seed0_fold2" in lines[2]
    assert "--config.data.split.folds=3 --config.data.split.fold=2" in lines[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "has no sweep"),
        (["--grid", "optim.lrr=1,2"], "variant 'lrr=1': config: unknown key 'optim.lrr': did you mean 'optim.lr'"),
        (["--grid", "optim.lr=0.1,0.10"], "are the same configuration"),
        (["--grid", "optim.lr=0.1,0.2", "--only=x"], "no variant 'x'; there are: lr=0.1, lr=0.2"),
        (["--grid", "optim.lr=0.1,0.2", "--config.data.split.folds=5", "--seeds=2"], "give --folds=5"),
        (["--grid", "optim.lr=0.1,0.2", "--seeds=0"], "--seeds=0"),
        (["--grid", "optim.lr=0.1,0.2", "--jobs=10000"], "use 1 to"),
        (["--grids", "optim.lr=0.1"], "unknown argument"),
    ],
)
def test_mistakes_are_told_before_the_first_run(recipe: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sweep.main([f"--config={recipe}", f"--out={recipe.parent}/o", *arguments, "--dry-run"])


@pytest.mark.parametrize("variant", [":debug", ""])
def test_the_ablation_of_brain_seg_resolves(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    recipe = f"configs/ablations/brain_seg.py{variant}"
    found = sweep.variants(recipe, [])
    assert sweep.check(recipe, found, [], 3, 0) == 0
    names = {v.name for v in found}
    assert {"base", "loss_dice", "augment_none", "no_deep_supervision", "wide", "mednext"} <= names
    # A grid beside the recipe's own variants multiplies them.
    assert len(sweep.variants(recipe, ["optim.lr=0.1,0.01"])) == 2 * len(found)


def test_the_ablation_of_tasks_resolves(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(REPO)
    recipe = "configs/ablations/multitask.py:recipe=lung_nodule,debug"
    found = sweep.variants(recipe, [])
    assert [v.name for v in found] == ["together", "only_nodules", "only_outline"]
    assert sweep.check(recipe, found, [], 3, 0) == 0
    # The folder is called as the recipe is.
    assert (
        "--workdir=runs/sweeps/multitask_recipe-lung-nodule-debug/only_nodules/" in dry(capsys, f"--config={recipe}")[1]
    )
    assert "--workdir=runs/sweeps/brain_seg/base/" in dry(capsys, "--config=configs/ablations/brain_seg.py")[0]
    for wrong, message in (("brain_seg", "has one task"), ("none", "is no recipe"), ("breast,only=x", "is no task of")):
        with pytest.raises(UserError, match=message):
            multitask.get_config(f"recipe={wrong}")


def test_recipes_whose_sweep_is_wrong(recipe: Path) -> None:
    for body, message in (
        ("[{'name': 'a', 'override': {}}]", "has 'name', 'overrides'"),
        ("[{'name': 'a'}, {'name': 'a'}]", "two variants are called 'a'"),
        ("[{'name': '../a'}]", "cannot be the name"),
    ):
        recipe.write_text(RECIPE + f"def sweep(arg=None):\n    return {body}\n")
        with pytest.raises(UserError, match=message):
            sweep.variants(str(recipe), [])


# ---- this machine


def slots(n: int) -> list[sweep.Slot]:
    return [sweep.Slot({"SLOT": str(i)}, (), f"slot {i}") for i in range(n)]


def test_failures_are_alone_and_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    works = [
        work(tmp_path, "good", "echo fine"),
        work(tmp_path, "flaky", f"[ -e {tmp_path}/f ] && exit 0; touch {tmp_path}/f; echo no luck; exit 1"),
        work(tmp_path, "bad", "echo out of memory; exit 1"),
        work(tmp_path, "wrong", "echo a mistake; exit 2"),
        work(tmp_path, "shot", "kill -9 $$"),
        work(tmp_path, "moved", f"[ -e {tmp_path}/g ] && exit 0; touch {tmp_path}/g; exit 75"),
    ]
    sweep.run_local(works, slots(2), retries=2)
    assert states(works) == ["done", "done", "failed", "failed", "failed", "done"]
    # A configuration's mistake is not tried again; a preemption is no failure.
    assert [w.status()["tries"] for w in works] == [0, 1, 3, 1, 3, 0]
    assert [w.status()["code"] for w in works] == [0, 0, 1, 2, -9, 0]
    assert works[2].log.read_text().count("out of memory\n") == 3
    out = capsys.readouterr().out
    assert "bad: exit code 1 after 0 s: out of memory" in out
    assert "killed by SIGKILL" in sweep.table(works)


def test_no_more_runs_at_a_time_than_slots(tmp_path: Path) -> None:
    code = (
        f"echo start $SLOT $(date +%s%N) >> {tmp_path}/log; sleep 0.3; echo end $SLOT $(date +%s%N) >> {tmp_path}/log"
    )
    works = [work(tmp_path, f"r{i}", code) for i in range(5)]
    sweep.run_local(works, slots(2), retries=0)
    running: set[str] = set()
    for line in sorted((tmp_path / "log").read_text().splitlines(), key=lambda line: int(line.split()[2])):
        kind, slot, _ = line.split()
        assert (slot in running) == (kind == "end")  # a slot holds one run at a time
        running ^= {slot}
    assert not running
    assert states(works) == ["done"] * 5


def test_what_cannot_go_on_leaves_nothing_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> str:
        raise UserError("no room")

    monkeypatch.setattr(sweep, "tell", full)
    works = [work(tmp_path, "short", "true"), work(tmp_path, "long", f"echo $$ > {tmp_path}/pid; exec sleep 60")]
    with pytest.raises(UserError, match="no room"):
        sweep.run_local(works, slots(2), 0)
    pid = tmp_path / "pid"
    until(lambda: not pid.exists() or not Path(f"/proc/{pid.read_text().strip()}/exe").exists(), 10)


def test_states_that_are_half_there(tmp_path: Path) -> None:
    one = work(tmp_path, "one", "true")
    one.update(state="failed", code=None)
    file = one.folder / "status.json"
    file.write_text('{"state": "failed"}')
    assert one.status() == {"state": "failed", "tries": 0, "seconds": 0.0}
    assert "failed" in sweep.table([one])
    assert "lost" in sweep.table([one])
    for text in ("[1]", "{"):
        file.write_text(text)
        with pytest.raises(UserError, match=r"status.json: not readable"):
            one.status()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make this folder"):
        work(tmp_path / "file", "x", "true").update(state="waiting")


def test_slots_of_gpus_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep.common, "cores", lambda: list(range(8)))
    monkeypatch.setattr(sweep.common, "gpus", list)
    assert [list(s.cpus) for s in sweep.local_slots(None)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [list(s.cpus) for s in sweep.local_slots(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    monkeypatch.setattr(sweep.common, "gpus", lambda: ["0", "3"])
    assert [s.environment for s in sweep.local_slots(None)] == [{"CUDA_VISIBLE_DEVICES": g} for g in ("0", "3")]
    with pytest.raises(UserError, match="this machine has 2 GPU"):
        sweep.local_slots(3)


def test_a_folder_keeps_to_its_command(tmp_path: Path) -> None:
    first = work(tmp_path, "a", "true")
    sweep.run_local([first], slots(1), retries=0)
    first.check()
    with pytest.raises(UserError, match="Choose another --out"):
        work(tmp_path, "a", "false").check()


def test_one_sweep_a_folder(tmp_path: Path) -> None:
    with sweep.alone(tmp_path), pytest.raises(UserError, match="another sweep is at work"), sweep.alone(tmp_path):
        pass


def test_a_sweep_that_is_killed_leaves_its_folder_to_its_runs(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from launch import sweep
from launch.work import Work
with sweep.alone(Path({str(tmp_path)!r})) as lock:
    work = Work("a", Path({str(tmp_path)!r}) / "a", ("bash", "-c", "echo $$ > {tmp_path}/pid; exec sleep 60"))
    sweep.run_local([work], [sweep.Slot({{}}, (), "")], 0, [lock])
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPO)
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip())
    process.kill()
    process.wait()
    orphan = int((tmp_path / "pid").read_text())
    try:
        with pytest.raises(UserError, match=r"or runs that it left behind \(fuser .*/\.lock"), sweep.alone(tmp_path):
            pass
    finally:
        os.kill(orphan, signal.SIGKILL)

    def free() -> bool:
        try:
            with sweep.alone(tmp_path):
                return True
        except UserError:
            return False

    until(free)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_the_runs_save(tmp_path: Path, number: int) -> None:
    code = f"""
from pathlib import Path
from launch import sweep
from launch.work import Work
body = "trap 'sleep 0.5; echo saved; exit 75' TERM; echo up; for i in $(seq 300); do sleep 0.1; done"
works = [Work(str(i), Path({str(tmp_path)!r}) / str(i), ("bash", "-c", body)) for i in range(3)]
slots = [sweep.Slot({{}}, (), "") for _ in range(2)]
try:
    sweep.run_local(works, slots, 0)
except sweep.Interrupted as stopped:
    raise SystemExit(stopped.code)
"""
    # Whatever the tests themselves run under.
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPO)
    signal.signal(signal.SIGHUP, hangup)
    until(
        lambda: all(
            (tmp_path / i / "log.txt").exists() and "up" in (tmp_path / i / "log.txt").read_text() for i in "01"
        )
    )
    process.send_signal(number)
    assert process.wait(20) == 75
    for i in "01":
        assert (tmp_path / i / "log.txt").read_text().rstrip().endswith("saved")
        assert json.loads((tmp_path / i / "status.json").read_text())["state"] == "interrupted"
    assert not (tmp_path / "2" / "status.json").exists()


def test_a_closed_terminal_is_ignored_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = {signal.SIGHUP: signal.SIG_IGN}
    monkeypatch.setattr(sweep.common.signal, "getsignal", handlers.get)
    assert signal.SIGHUP not in sweep.common.stops()  # nohup
    handlers[signal.SIGHUP] = signal.SIG_DFL
    assert signal.SIGHUP in sweep.common.stops()


def test_a_run_is_stopped_from_within_a_look_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a signal's handler that came while the same thread was in `poll`, which then knows nothing for ever."""
    monkeypatch.setattr(launch.work, "_KILLED", 0.2)
    process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    with process._waitpid_lock:  # type: ignore[attr-defined]
        assert stop([process], 0.2) == [-9]
    assert process.wait(5) == -signal.SIGTERM


def test_a_squeue_that_fails_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.work, "_PAUSE", 0.0)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    busy = "#!/bin/bash\necho x >> {0}/n; [ $(wc -l < {0}/n) -lt {1} ] && exit 1; echo {2}\n"
    script(tmp_path / "squeue", busy.format(tmp_path, 5, "RUNNING"))
    assert launch.work.job_state() == "RUNNING"
    (tmp_path / "n").unlink()
    script(tmp_path / "squeue", busy.format(tmp_path, 5, "7_1 8 RUNNING"))
    assert sweep.jobs_in_queue() == {"7_1", "8"}
    (tmp_path / "n").unlink()
    script(tmp_path / "squeue", busy.format(tmp_path, 6, "RUNNING"))
    with pytest.raises(UserError, match="squeue failed"):
        sweep.jobs_in_queue()


# ---- what is told at the end


def finished(folder: Path, name: str, value: float, *, state: str = "done", cases: range = range(6)) -> Work:
    """A run of a sweep, as it is once it has ended."""
    one = work(folder, name, "true")
    if state == "done":
        variant, _, repeat = name.partition("/")
        seed, _, fold = repeat.removeprefix("seed").partition("_fold")
        data = {"split": {"fold": int(fold or 0)}, "batch_size": 2}
        write_run(one.folder, noisy(value, 0), name=variant, seed=int(seed), data=data, cases=cases)
    one.update(state=state)
    return one


def test_the_first_variant_stays_the_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    works = [
        finished(tmp_path, "base/seed0", 0.5, state="failed"), finished(tmp_path, "wide/seed0", 0.7),
        finished(tmp_path, "base/seed1", 0.5), finished(tmp_path, "wide/seed1", 0.7),
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="1"):
        sweep.finish(works, tmp_path, None)
    out = capsys.readouterr().out
    assert "difference from base" in out
    assert "1 run(s) failed" in out
    works[2].update(state="failed")
    with pytest.raises(SystemExit, match="1"):
        sweep.finish(works, tmp_path, None)
    out = capsys.readouterr().out
    assert "'base', the first variant, has no finished run: 'wide' is the baseline in its place" in out
    assert "2 run(s) failed" in out
    with pytest.raises(SystemExit, match="1"):
        sweep.finish(works, tmp_path, "base")
    assert "not compared: --baseline=base: no such experiment; there are: wide" in capsys.readouterr().out


def test_a_fold_that_failed_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its cases are missing from one experiment, which cannot be compared; that is no mistake of the user's."""
    works = [
        finished(tmp_path, f"{name}/seed0_fold{fold}", 0.5, cases=range(6 * fold, 6 * fold + 6),
                 state="failed" if (name, fold) == ("wide", 1) else "done")
        for fold in range(2)
        for name in ("base", "wide")
    ]  # fmt: skip
    with pytest.raises(SystemExit, match="1"):
        sweep.finish(works, tmp_path, None)
    out = capsys.readouterr().out
    assert "not compared: the runs were evaluated on different cases" in out
    assert "1 run(s) failed or were cancelled; the same command tries them again" in out


# ---- the whole


def run(out: Path, *more: str, **options: Any) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "launch.sweep",
        "--config=configs/ablations/brain_seg.py:debug",
        f"--out={out}",
        *more,
    ]
    return subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def test_an_ablation_is_interrupted_goes_on_and_is_compared(tmp_path: Path) -> None:
    first = run(tmp_path, "--only=base,narrow", "--jobs=1")
    until(lambda: (tmp_path / "base" / "seed0" / "metrics.jsonl").exists(), 200)
    first.send_signal(signal.SIGTERM)
    assert first.wait(90) == 75
    assert first.stdout is not None
    assert "the same command goes on" in first.stdout.read()
    again = run(tmp_path, "--only=base,narrow", "--jobs=1")
    out = again.communicate(timeout=300)[0]
    assert again.returncode == 0, out
    for name in ("base", "narrow"):
        assert json.loads((tmp_path / name / "seed0" / "status.json").read_text())["state"] == "done"
        rows = [json.loads(x) for x in (tmp_path / name / "seed0" / "metrics.jsonl").read_text().splitlines()]
        assert [r["step"] for r in rows if "train/loss" in r] == [2, 4]
    table = list(csv.DictReader((tmp_path / "compare" / "metrics.csv").open()))
    found = {r["experiment"]: r for r in table if (r["metric"], r["class"]) == ("dice", "")}
    assert set(found) == {"base", "narrow"}
    assert found["narrow"]["patients"] == "6"
    assert 0 <= float(found["narrow"]["p_holm"]) <= 1
    assert "| narrow |" in (tmp_path / "compare" / "summary.md").read_text()
    # Nothing is left to do, and that is quick.
    began = time.monotonic()
    done = run(tmp_path, "--only=base,narrow", "--jobs=1")
    assert "2 of them done" in done.communicate(timeout=60)[0]
    assert time.monotonic() - began < 30


@pytest.mark.slow
def test_the_whole_ablation_in_one_command(tmp_path: Path) -> None:
    done = run(tmp_path, "--jobs=2")
    out = done.communicate(timeout=900)[0]
    assert done.returncode == 0, out
    table = list(csv.DictReader((tmp_path / "compare" / "metrics.csv").open()))
    names = list(dict.fromkeys(r["experiment"] for r in table))
    assert names[0] == "base"
    assert len(names) == len(sweep.variants(str(REPO / "configs/ablations/brain_seg.py:debug"), []))


# ---- SLURM


@pytest.mark.slurm
def test_a_sweep_through_submitit(
    cluster: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        # On import it sets up logging, which closes every handler there is: absl's would close pytest's own stderr.
        patch.setenv("SUBMITIT_LOG_LEVEL", "NOCONFIG")
        pytest.importorskip("submitit")
    monkeypatch.chdir(REPO)
    # Preempted in its first turn, as if by the scheduler; a crash; a mistake; and one that just runs.
    moved = f"[ -e {tmp_path}/f ] && exit 0; touch {tmp_path}/f; exit 75"
    works = [
        work(tmp_path, "good", "echo $SLURM_JOB_ID"),
        work(tmp_path, "moved", moved),
        work(tmp_path, "bad", "echo no; exit 1"),
        work(tmp_path, "wrong", "exit 2"),
    ]
    options = sweep.slurm_options(["time=10", "cpus_per_task=1"])
    sweep.run_slurm(works, tmp_path, 1, options, 2, wait=False)
    # The same again adds no second job while the first is in the queue.
    arrays = {name.partition("_")[0] for name in sweep.jobs_in_queue() if "_" in name}
    sweep.run_slurm(works, tmp_path, 1, options, 2, wait=False)
    assert {name.partition("_")[0] for name in sweep.jobs_in_queue() if "_" in name} == arrays
    until(lambda: works[1].status()["state"] == "queued" and (tmp_path / "f").exists(), 60)
    job = works[1].status()["job"]
    until(lambda: "JobState=PENDING" in shown(job), 30)
    start_now(job)
    sweep.run_slurm(works, tmp_path, 1, options, 2, wait=True)
    assert states(works) == ["done", "done", "failed", "failed"]
    assert [w.status()["tries"] for w in works] == [0, 0, 2, 1]
    assert works[1].status()["turns"] == 1


@pytest.mark.slurm
def test_a_job_whose_time_is_up_is_queued_again(
    cluster: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SLURM sends SIGUSR2 two minutes before the limit; more often than submitit would allow by itself (3 times)."""
    with monkeypatch.context() as patch:
        patch.setenv("SUBMITIT_LOG_LEVEL", "NOCONFIG")
        submitit = pytest.importorskip("submitit")
    monkeypatch.chdir(REPO)
    made: list[int] = []
    executor = submitit.SlurmExecutor.__init__
    monkeypatch.setattr(
        submitit.SlurmExecutor,
        "__init__",
        lambda self, *a, **k: made.append(k.get("max_num_timeout", 3)) or executor(self, *a, **k),
    )
    code = f"[ -e {tmp_path}/f ] && exit 0; trap 'touch {tmp_path}/f; echo saved; exit 75' TERM; echo up; "
    one = work(tmp_path, "long", code + "for i in $(seq 600); do sleep 0.1; done")
    options = sweep.slurm_options(["time=10", "cpus_per_task=1"])
    sweep.run_slurm([one], tmp_path, 0, options, 1, wait=False)
    assert made == [launch.work.TURNS]
    until(lambda: one.log.exists() and "up" in one.log.read_text(), 60)
    job = one.status()["job"]
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    until(lambda: one.status()["state"] == "queued" and "saved" in one.log.read_text(), 60)
    until(lambda: "JobState=PENDING" in shown(job), 30)
    start_now(job)
    sweep.run_slurm([one], tmp_path, 0, options, 1, wait=True)
    assert states([one]) == ["done"]
    assert one.status()["tries"] == 0
