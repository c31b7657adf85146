"""Faults of a single process: told to stop, numbers that blow up, damaged checkpoints, no memory, a stalled step."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_train as training

from medjax import checkpoint, faults, main, parallel, report
from medjax.data import pipeline
from medjax.errors import RESUMABLE, Resumable, UserError, run_program


def run(recipe: Path, workdir: Path, *overrides: str) -> None:
    lean = ("eval.pictures=false", "eval.predictions=false", "eval.splits=('val',)")
    main.main([f"--config={recipe}", f"--workdir={workdir}", *(f"--config.{o}" for o in (*lean, *overrides))])


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("finished")
    run(recipe, workdir)
    return workdir


def same(a: Path, b: Path) -> None:
    assert training.state_bytes(a) == training.state_bytes(b)
    rows = [
        [(r["step"], r.get("train/loss"), r.get("val/dice")) for r in map(json.loads, (d / "metrics.jsonl").open())]
        for d in (a, b)
    ]
    assert rows[0] == rows[1]


# --- told to stop ----------------------------------------------------------------------------------------------------


# Calls of a run of 8 steps: one a step, and before that one a case at the evaluations of steps 4 and 8.
@pytest.mark.parametrize(("call", "step", "unevaluated"), [(3, 3, False), (4, 4, True), (9, 8, True)])
def test_told_to_stop_it_saves_and_goes_on(
    recipe: Path,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: int,
    step: int,
    unevaluated: bool,
) -> None:
    calls = iter(range(1, 1000))
    with monkeypatch.context() as patch:
        patch.setattr(faults.Preemption, "reached", lambda self: next(calls) >= call)
        with pytest.raises(Resumable, match=f"step {step} of 8 is saved"):
            run(recipe, tmp_path)
    checkpoints = checkpoint.Checkpoints(tmp_path, read_only=True)
    assert checkpoints.newest("latest") == step
    assert checkpoints.meta("latest", step).get("unevaluated", False) == unevaluated
    checkpoints.close()
    run(recipe, tmp_path)
    same(tmp_path, finished)


def test_sigterm_ends_with_75_and_a_checkpoint(recipe: Path, tmp_path: Path) -> None:
    command = training.command(recipe, tmp_path, "--config.train.total=100000 steps")
    log = tmp_path / "metrics.jsonl"
    process = subprocess.Popen(command, cwd=training.REPO, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 240
    while not (log.exists() and log.read_text().count("train/loss") > 2) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    told = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - told < 30
    assert process.returncode == RESUMABLE
    assert "is saved in" in said
    assert "the same command goes on from there" in said
    assert "Traceback" not in said
    checkpoints = checkpoint.Checkpoints(tmp_path, read_only=True)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert checkpoints.newest("latest") == max(steps)
    checkpoints.close()


def test_a_program_that_can_go_on_ends_with_75(capsys: pytest.CaptureFixture) -> None:
    def stops() -> None:
        raise Resumable("told to stop")

    with pytest.raises(SystemExit) as ended:
        run_program(stops)
    assert ended.value.code == 75
    assert capsys.readouterr().err == "\nmedjax: told to stop\n"


# --- numbers that blow up --------------------------------------------------------------------------------------------


def test_an_update_that_is_not_finite_is_not_made(recipe: Path) -> None:
    config = training.load(recipe)
    step, create, mesh = training.make(config)
    state, sums = step(jax.jit(create)(), parallel.put_batch(training.a_batch(), mesh))
    assert not sums["skipped"]
    before = jax.device_get(state)
    bad = training.a_batch(seed=1)
    bad["image"][2, 3, 3, 3] = np.nan
    state, sums = step(state, parallel.put_batch(bad, mesh))
    assert sums["skipped"]
    assert int(state.step) == 2
    for part in ("params", "opt_state", "average"):
        training.close(getattr(state, part), getattr(before, part), rtol=0, atol=0)
    state, sums = step(state, parallel.put_batch(training.a_batch(seed=2), mesh))
    assert not sums["skipped"]
    assert np.isfinite(float(sums["loss"]))


def poisoned(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Batches of these steps come with a NaN in each image."""
    batches = pipeline.train_batches

    def feed(*args: Any, first_step: int = 0, **options: Any) -> Iterator[Any]:
        for number, batch in enumerate(batches(*args, first_step=first_step, **options), first_step + 1):
            if number in steps:
                batch["image"] = np.full_like(batch["image"], np.nan)
            yield batch

    monkeypatch.setattr(pipeline, "train_batches", feed)


def test_skipped_updates_are_counted_and_then_end_the_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, {2, 4, 5, 6})
    with pytest.raises(UserError) as caught:
        run(recipe, tmp_path, "train.nan_limit=3")
    text = str(caught.value)
    assert "3 step(s) in a row, up to step 6" in text
    assert str(tmp_path / "nonfinite.json") in text
    found = json.loads((tmp_path / "nonfinite.json").read_text())
    assert [batch["step"] for batch in found["batches"]] == [4, 5, 6]
    names = {f"case{i}" for i in range(6)}
    assert all(len(batch["cases"]) == 4 and set(batch["cases"]) <= names for batch in found["batches"])
    rows = {row["step"]: row for row in map(json.loads, (tmp_path / "metrics.jsonl").open()) if "train/loss" in row}
    assert [rows[step].get("train/skipped", 0) for step in (1, 2, 3, 4, 5)] == [0, 1, 1, 2, 3]
    assert rows[4]["train/loss"] is None
    assert rows[3]["train/loss"] is not None
    # The count goes on after a restart, from the checkpoint of step 4.
    monkeypatch.undo()
    run(recipe, tmp_path)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-2])
    assert last["train/skipped"] == 2


# --- damaged checkpoints ---------------------------------------------------------------------------------------------


def damage(folder: Path, how: str) -> None:
    files = sorted((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    if how == "meta":
        for file in (folder / "meta").rglob("*"):
            if file.is_file():
                file.write_text("{")
    elif how == "cut":
        for file in files:
            if "state" in file.parts:
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif how == "flipped":
        data = bytearray(files[-1].read_bytes())
        data[len(data) // 2] ^= 0x10
        files[-1].write_bytes(bytes(data))


@pytest.mark.parametrize("how", ["meta", "cut", "flipped"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    recipe: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture, how: str
) -> None:
    run(recipe, tmp_path, "train.total=6 steps", "optim.schedule=constant")
    damage(tmp_path / "checkpoints" / "latest" / "6", how)
    run(recipe, tmp_path, "train.total=8 steps", "optim.schedule=constant")
    captured = capsys.readouterr()
    assert "the checkpoint is damaged" in captured.err
    assert "the checkpoint of step 4 is used" in captured.err
    assert (tmp_path / "checkpoints" / "damaged" / "latest-6").is_dir()
    assert "trained to step 8" in captured.out
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints" / "latest").iterdir()) == [6, 8]


def test_when_no_checkpoint_is_whole_a_person_decides(recipe: Path, tmp_path: Path) -> None:
    run(recipe, tmp_path, "train.total=4 steps")
    for step in (2, 4):
        damage(tmp_path / "checkpoints" / "latest" / str(step), "cut")
    with pytest.raises(UserError, match="None before it is left"):
        run(recipe, tmp_path)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_full_memory_is_explained() -> None:
    sizes = {"arguments": 2**30, "temporaries": 6 * 2**30}
    with pytest.raises(UserError) as caught, faults.memory_explained(4, (64, 64, 48), "float32", sizes):
        jax.block_until_ready(jnp.zeros(1 << 48, jnp.uint8))  # more than there is address space
    text = str(caught.value)
    assert text.startswith("out of memory: ")
    for words in (
        "temporaries      6.000 GiB",
        "in all           7.000 GiB",
        "optim.accumulate",
        "data.patch='(32, 32, 24)'",
        "train.precision=bfloat16",
    ):
        assert words in text
    with pytest.raises(RuntimeError, match="another"), faults.memory_explained(4, (8, 8, 8), "float32", {}):
        raise RuntimeError("another")


# --- stalls ----------------------------------------------------------------------------------------------------------


def test_a_stall_shows_all_stacks_and_ends_after_three(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    ended: list[int] = []
    watchdog = faults.Watchdog(0.2, tmp_path, end=ended.append)
    watchdog.doing("the data of step 7")
    until = time.monotonic() + 30
    while not ended and time.monotonic() < until:
        time.sleep(0.02)
    watchdog.__exit__()
    assert ended == [RESUMABLE]
    text = (tmp_path / "stalled.txt").read_text()
    assert text.count("waiting for the data of step 7") == 3
    assert "test_a_stall_shows_all_stacks" in text
    said = capfd.readouterr().err
    assert "test_a_stall_shows_all_stacks" in said
    assert "given up after" in said


def test_signs_of_life_and_long_work_keep_the_watchdog_quiet(tmp_path: Path) -> None:
    with faults.Watchdog(0.4, tmp_path, end=lambda code: None) as watchdog:
        with watchdog.unwatched():
            time.sleep(0.8)
        for _ in range(8):
            time.sleep(0.1)
            watchdog.doing("a step")
    assert not (tmp_path / "stalled.txt").exists()


def test_a_stalled_source_is_told(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    batches = pipeline.train_batches

    def feed(*args: Any, **options: Any) -> Iterator[Any]:
        for number, batch in enumerate(batches(*args, **options), 1):
            if number == 7:
                time.sleep(9)
            yield batch

    monkeypatch.setattr(pipeline, "train_batches", feed)
    monkeypatch.setattr(faults.Watchdog.__init__, "__defaults__", (lambda code: None,))  # on a machine slower yet
    run(recipe, tmp_path, "train.stall_seconds=3.0")
    assert "waiting for the data of step" in (tmp_path / "stalled.txt").read_text()


# --- compilations ----------------------------------------------------------------------------------------------------


def test_evaluations_do_not_compile_the_step_again(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiled = []
    compile_step = report.compile_step
    monkeypatch.setattr(report, "compile_step", lambda *a: compiled.append(1) or compile_step(*a))
    with jax.log_compiles(), caplog.at_level("WARNING"):
        run(recipe, tmp_path, "train.eval_every=2 steps")
    assert len(compiled) == 1
    names = [r.getMessage().split()[1] for r in caplog.records if r.getMessage().startswith("Compiling ")]
    assert sum("step" in name for name in names) == 1, names
    # Whatever the evaluations need is compiled by the first of them.
    assert sum("losses" in name for name in names) == 1, names
