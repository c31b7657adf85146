"""Several processes: where they stand, agreement, barriers that name who is missing, and runs that lose one."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import layouts
import nibabel as nib
import numpy as np
import pytest
import test_train as training
from tiny import write_recipe

from medjax import processes
from medjax.checkpoint import Checkpoints
from medjax.errors import RESUMABLE, UserError

# --- where a process stands ------------------------------------------------------------------------------------------

SLURM = {"SLURM_JOB_ID": "4100", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
         "SLURM_STEP_NODELIST": "gpu[07-08,11]", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}  # fmt: skip


def test_a_process_on_its_own() -> None:
    assert processes.find_place(env={}) is None
    assert processes.find_place(env={"JOB_COMPLETION_INDEX": "0"}) is None
    assert processes.find_place("a:1", 1, 0, {}) is None
    assert processes.find_place(env=SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    # In a batch script the job's variables are set, but no step's.
    assert processes.find_place(env={"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}) is None


def test_flags_variables_and_slurm() -> None:
    assert processes.find_place("node1:8476", 2, 1, SLURM) == processes.Place("node1:8476", 2, 1)
    env = {"MEDJAX_COORDINATOR": "run-0.run:8476", "MEDJAX_PROCESSES": "8", "JOB_COMPLETION_INDEX": "5"}
    assert processes.find_place(env=env) == processes.Place("run-0.run:8476", 8, 5)
    assert processes.find_place(env=SLURM) == processes.Place("gpu07:61444", 4, 3)
    # Both tasks of a machine see its four devices: two each.
    assert processes.find_place(env=SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}) == ("gpu07:61444", 4, 3, (2, 3))
    assert processes.find_place(env=SLURM | {"CUDA_VISIBLE_DEVICES": "1"}) == ("gpu07:61444", 4, 3, None)
    # The last machine has one task, all of its devices are its own.
    last = {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_NODEID": "2", "CUDA_VISIBLE_DEVICES": "0,1"}
    assert processes.find_place(env=SLURM | last) == ("gpu07:61444", 4, 3, None)
    for nodes, first in (("n1", "n1"), ("n1,n2", "n1"), ("n[003-7]", "n003"), ("n[2,5],m1", "n2")):
        assert processes._first_host(nodes) == first


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (("a:1", 2, None), "--process is missing"),
        (("a:1", None, 0), "--processes is missing"),
        ((None, None, 1), "--process needs"),
        (("a:1", 2, 2), "from 0 to 1"),
        (("a", 2, 0), "a free port"),
    ],
)
def test_places_that_cannot_be(place: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        processes.find_place(*place, {})


# --- talking to each other -------------------------------------------------------------------------------------------

TALK = """
import sys, time, os
from medjax import processes
from medjax.errors import run_program
number, port = int(sys.argv[1]), sys.argv[2]
def talk():
    processes.start(f"127.0.0.1:{port}", 2, number)
    processes.program(body)()
def body():
BODY
run_program(talk)
"""


def talk(body: str, *, seconds: float = 100) -> list[tuple[int, str, float]]:
    """(exit code, output, seconds) of two processes that run `body` with `number` in scope."""
    code = TALK.replace("BODY", "\n".join("    " + line for line in body.strip().splitlines()))
    port, began = layouts.free_port(), time.monotonic()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(n), str(port)], cwd=layouts.REPO, env=layouts.environment(1), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for n in (0, 1)
    ]  # fmt: skip
    ends: list[tuple[int, str, float]] = []
    for process in started:
        out, _ = process.communicate(timeout=seconds)
        ends.append((process.returncode, out, time.monotonic() - began))
    return ends


def test_values_are_gathered_in_order() -> None:
    for code, out, _ in talk(
        """
processes.agree('{"seed": 0}')
for turn in range(3):
    print(processes.gather("rows", {"from": number, "turn": turn, "nan": float("nan")}))
print("primary", processes.primary())
"""
    ):
        assert code == 0, out
        assert out.count("[{'from': 0, 'turn'") == out.count("{'from': 1, 'turn'") == 3


def test_other_configurations_and_code_are_refused() -> None:
    for code, out, _ in talk("""processes.agree('{"optim": {"lr": 0.%d}}' % (number + 1))"""):
        assert code == 2
        assert "process 1 (" in out
        assert "has another configuration than process 0: optim.lr: 0.1 -> 0.2" in out
        assert "Traceback" not in out
    for code, out, _ in talk("processes.code_version = lambda: f'medjax {number}'\nprocesses.agree('{}')"):
        assert code == 2
        assert "runs other code than process 0 (medjax 1, not medjax 0)" in out


def test_a_barrier_names_who_is_missing() -> None:
    (first, said, _), (second, _, _) = talk(
        """
if number == 0:
    processes.barrier("here and there", 3)
else:
    time.sleep(60)
"""
    )
    assert first == 2
    assert "barrier 'here and there': after 3 s process 1 (" in said
    assert second == 2


@pytest.mark.parametrize("who", [0, 1])
def test_who_ends_ends_the_others_with_words(who: int) -> None:
    ends = talk(
        f"""
if number == {who}:
    from medjax.errors import UserError
    raise UserError("the cup is empty")
time.sleep(90)
"""
    )
    assert ends[who][0] == 2
    code, said, seconds = ends[1 - who]
    assert code == 2  # starting again would not help
    assert f"process {who} (" in said
    assert "ended: the cup is empty" in said
    assert seconds < 60


@pytest.mark.parametrize("who", [0, 1])
def test_who_is_killed_ends_the_others(who: int) -> None:
    ends = talk(
        f"""
processes.barrier("start")
if number == {who}:
    os.kill(os.getpid(), 9)
time.sleep(90)
"""
    )
    code, said, seconds = ends[1 - who]
    assert code == RESUMABLE, said
    assert f"process {who} (" in said
    assert "Start all processes again" in said
    assert seconds < 60


@pytest.mark.parametrize("who", [0, 1])
def test_sigterm_while_there_is_nothing_to_save(who: int) -> None:
    """Before the first step, and in the evaluation after the last, where JAX's own handler would only note it."""
    ends = talk(
        f"""
from medjax import faults
with faults.Preemption() as training:
    training.graceful = True
with faults.Preemption():
    processes.barrier("evaluation")
    if number == {who}:
        os.kill(os.getpid(), 15)
    time.sleep(90)
"""
    )
    for number, (code, said, seconds) in enumerate(ends):
        assert code == RESUMABLE, said
        words = "told to stop (SIGTERM); the same command" if number == who else "ended: told to stop (SIGTERM)."
        assert words in said
        assert seconds < 45


def test_sigterm_while_there_is_something_to_save() -> None:
    for code, said, _ in talk(
        """
from medjax import faults
with faults.Preemption() as preemption:
    preemption.graceful = True
    processes.barrier("training")
    if number == 1:
        os.kill(os.getpid(), 15)
    calls = 0
    while not preemption.reached():
        calls += 1
        time.sleep(0.05)
    print("stopped together at", calls)
"""
    ):
        assert code == 0, said
        assert "stopped together at" in said


# --- whole runs ------------------------------------------------------------------------------------------------------


def call(recipe: Path, workdir: Path, total: int = 12, *overrides: str) -> list[list[str]]:
    steps = (f"train.total={total} steps", "train.checkpoint_every=2 steps", "train.eval_every=4 steps")
    return [layouts.arguments(recipe, workdir, *steps, *overrides)]


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of two processes."""
    workdir = tmp_path_factory.mktemp("finished")
    pair = layouts.start(call(recipe, workdir), devices=2, processes=2, log=workdir / "log")
    assert [p.wait() for p in pair] == [0, 0], (workdir / "log.0").read_text()
    return workdir


def steps_logged(workdir: Path) -> int:
    log = workdir / "metrics.jsonl"
    return log.read_text().count("train/loss") if log.exists() else 0


def killed(recipe: Path, workdir: Path, victim: int, wanted: int, number: int = signal.SIGKILL) -> list[int]:
    """Exit codes of a pair of which one gets a signal once `wanted` steps are logged."""
    pair = layouts.start(call(recipe, workdir), devices=2, processes=2, log=workdir / "log")
    until = time.monotonic() + 240
    while steps_logged(workdir) < wanted and pair[victim].poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    pair[victim].send_signal(number)
    when = time.monotonic()
    codes = [p.wait(timeout=120) for p in pair]
    assert time.monotonic() - when < 60
    return codes


def ended(calls: list[list[str]], log: Path) -> tuple[list[int], list[str]]:
    """Exit codes of a pair that runs to its end, and what each of the two wrote."""
    pair = layouts.start(calls, devices=2, processes=2, log=log)
    try:
        codes = [p.wait(timeout=120) for p in pair]
    finally:
        for p in pair:
            p.kill()
    return codes, [log.with_suffix(f".{number}").read_text() for number in (0, 1)]


@pytest.mark.parametrize(("victim", "wanted"), [(1, 5), (0, 3)])
def test_one_of_two_killed_the_other_ends_and_both_go_on(
    recipe: Path, finished: Path, tmp_path: Path, victim: int, wanted: int
) -> None:
    codes = killed(recipe, tmp_path, victim, wanted)
    said = (tmp_path / f"log.{1 - victim}").read_text()
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == RESUMABLE, said
    assert f"process {victim} (" in said
    assert "Start all processes again with the same command" in said
    pair = layouts.start(call(recipe, tmp_path), devices=2, processes=2, log=tmp_path / "again")
    assert [p.wait() for p in pair] == [0, 0], (tmp_path / "again.0").read_text()
    assert training.state_bytes(tmp_path) == training.state_bytes(finished)
    assert layouts.losses(tmp_path) == layouts.losses(finished)


def test_one_of_two_told_to_stop_stops_both_at_one_step(recipe: Path, finished: Path, tmp_path: Path) -> None:
    assert killed(recipe, tmp_path, 1, 3, signal.SIGTERM) == [RESUMABLE, RESUMABLE]
    for number in (0, 1):
        assert "told to stop: step " in (tmp_path / f"log.{number}").read_text()
    pair = layouts.start(call(recipe, tmp_path), devices=2, processes=2, log=tmp_path / "again")
    assert [p.wait() for p in pair] == [0, 0], (tmp_path / "again.0").read_text()
    assert training.state_bytes(tmp_path) == training.state_bytes(finished)


def test_a_pair_goes_back_to_the_checkpoint_before_a_damaged_one(recipe: Path, finished: Path, tmp_path: Path) -> None:
    """Process 0 alone looks at the files; the other must not go on to read, which they do together."""
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    files = [f for f in (tmp_path / "checkpoints/latest/12/state").rglob("*") if f.is_file()]
    file = max(files, key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(bytes(data))
    # The one before is that of the last step, so that nothing is left to train.
    codes, said = ended(call(recipe, tmp_path, 10), tmp_path / "log")
    assert codes == [0, 0], said
    for text in said:
        assert "is not what was written" in text
        assert "the checkpoint of step 10 is used" in text
    assert "already trained to step 10" in said[0]
    assert (tmp_path / "checkpoints/damaged/latest-12").is_dir()


@pytest.mark.parametrize("bad", [4, 5])
def test_a_case_refused_by_one_of_two_stops_neither(recipe: Path, finished: Path, tmp_path: Path, bad: int) -> None:
    """Of three cases the first process has two; whoever refuses one, the others are scored and both end with words."""
    cohort, run = tmp_path / "cohort", tmp_path / "run"
    shutil.copytree(recipe.parent / "cohort", cohort)
    shutil.copytree(finished / "checkpoints", run / "checkpoints")
    sides = "".join(f"case{i},{'val' if i in (4, 5, 6) else 'train'}\n" for i in range(8))
    (cohort / "split.csv").write_text(f"id,split\n{sides}")
    file = cohort / "labelsTr" / f"case{bad}.nii.gz"
    mask = nib.load(file)
    nib.save(nib.Nifti1Image(np.asarray(mask.dataobj) * 3, mask.affine), file)
    calls = [[*call(write_recipe(tmp_path / "tiny.py", cohort), run, 12, "eval.predictions=true")[0], "--mode=eval"]]
    codes, said = ended(calls, tmp_path / "log")
    assert codes == [2, 2], said
    assert f"1 of 3 case(s) are refused and count in no score:\n  case{bad}: {file}: undeclared labels" in said[0]
    assert "process 0 (" in said[1]
    summary = json.loads((run / "eval" / "val" / "summary.json").read_text())
    assert (summary["n_cases"], list(summary["refused"])) == (2, [f"case{bad}"])
    masks = {f"case{i}.nii.gz" for i in (4, 5, 6) if i != bad}
    assert {f.name for f in (run / "eval" / "val" / "predictions").iterdir()} == masks


KILLS = 20


@pytest.mark.slow
def test_twenty_random_kills_lose_nothing(recipe: Path, tmp_path: Path) -> None:
    """A pair that saves after every step is killed 20 times in a row: mostly in a save, at times while it starts."""
    dice, newest, total, workdir = random.Random(0), 0, 150, tmp_path / "killed"
    every = ("train.checkpoint_every=1 steps", "train.eval_every=1000 steps")
    in_saves = 0
    workdir.mkdir()
    for number in range(KILLS):
        pair = layouts.start(call(recipe, workdir, total, *every), devices=1, processes=2, log=tmp_path / "log")
        wanted = steps_logged(workdir) + dice.randint(1, 4)
        if number % 5 == 4:  # while it starts: what it reads, and clears away, is what the last kill left
            time.sleep(dice.uniform(1, 6))
        while number % 5 < 4 and steps_logged(workdir) < wanted and all(p.poll() is None for p in pair):
            time.sleep(0.005)
        time.sleep(dice.uniform(0, 0.1))
        # One, and the other before it can notice: that it does is for the tests above.
        for process in dice.sample(pair, 2):
            assert process.poll() is None, [(tmp_path / f"log.{i}").read_text() for i in (0, 1)]
            process.send_signal(signal.SIGKILL)
            time.sleep(dice.choice((0, 0.02)))
        for process in pair:
            process.wait()
        in_saves += any((workdir / "checkpoints").glob("latest/*tmp*"))
        with Checkpoints(workdir, read_only=True) as checkpoints:
            steps = checkpoints.steps("latest")
            for step in steps:  # each is whole: its files are those that were written, and all of it can be read
                checkpoints.verify("latest", step)
                assert checkpoints.meta("latest", step)["step"] == step
                assert training.state_bytes(workdir, step)
        assert not (workdir / "checkpoints" / "damaged").exists()
        assert (steps[0] if steps else 0) >= newest
        newest = steps[0] if steps else 0
    print(f"{KILLS} kills, {in_saves} of them in a save, up to step {newest}")
    assert 0 < newest < total
    assert in_saves
    for folder in (workdir, tmp_path / "whole"):
        pair = layouts.start(call(recipe, folder, total, *every), devices=1, processes=2, log=tmp_path / "again")
        assert [p.wait() for p in pair] == [0, 0], (tmp_path / "again.0").read_text()
    assert training.state_bytes(workdir) == training.state_bytes(tmp_path / "whole")
    assert layouts.losses(workdir) == layouts.losses(tmp_path / "whole")
