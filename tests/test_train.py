"""The training spine: exact resume, equal results however the batch is cut, masks, averages, clear refusals."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from tiny import write_cohort, write_recipe

from medjax import config as config_lib
from medjax import evaluate, main, models, optim, parallel, tasks
from medjax import job as job_lib
from medjax import step as step_lib
from medjax import train as spine
from medjax.checkpoint import Checkpoints
from medjax.errors import UserError

REPO = Path(__file__).resolve().parents[1]
LABELS = {"shell": 1, "core": 2}


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run, trained and evaluated in this process."""
    workdir = tmp_path_factory.mktemp("finished")
    main.main([f"--config={recipe}", f"--workdir={workdir}"])
    return workdir


def command(recipe: Path, workdir: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "medjax.main", f"--config={recipe}", f"--workdir={workdir}", *more]


def state_bytes(workdir: Path, step: int | None = None) -> dict[str, bytes]:
    """Every array of a checkpoint (None: the newest), bit for bit."""
    checkpoints = Checkpoints(workdir, read_only=True)
    step = checkpoints.newest("latest") if step is None else step
    like = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])),
        jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), checkpoints._stored("latest", step)),
    )
    state = checkpoints.restore("latest", step, like)
    checkpoints.close()
    return {jax.tree_util.keystr(k): np.asarray(v).tobytes() for k, v in jax.tree_util.tree_leaves_with_path(state)}


def test_a_run_leaves_what_it_promises(finished: Path, recipe: Path) -> None:
    cohort = recipe.parent / "cohort"
    assert json.loads((finished / "config.json").read_text())["train"]["total"] == "8 steps"
    for split, case in (("val", "case6"), ("test", "case7")):
        folder = finished / "eval" / split
        summary = json.loads((folder / "summary.json").read_text())
        assert (summary["split"], summary["n_cases"]) == (split, 1)
        assert set(summary["metrics"]["dice"]["per_class"]) == set(LABELS)
        assert {"command", "versions", "seconds"} <= set(summary)
        rows = list(csv.DictReader((folder / "cases.csv").open()))
        assert [(r["case"], r["class"]) for r in rows] == [(case, "shell"), (case, "core")]
        mean = np.mean([float(r["dice"]) for r in rows])
        assert summary["metrics"]["dice"]["mean"] == pytest.approx(mean, abs=1e-5)
        # On the input's own grid, in the input's own orientation.
        predicted = nib.load(folder / "predictions" / f"{case}.nii.gz")
        source = nib.load(cohort / "imagesTr" / f"{case}.nii.gz")
        assert predicted.shape == source.shape
        np.testing.assert_array_equal(predicted.affine, source.affine)
        assert {p.name for p in folder.glob("*.png")} == {"worst.png", "median.png", "best.png"}
        # The scores are of what was written.
        a = np.asarray(predicted.dataobj) == 2
        b = np.asarray(nib.load(cohort / "labelsTr" / f"{case}.nii.gz").dataobj) == 2
        dice = 2 * (a & b).sum() / max(1, a.sum() + b.sum())
        assert float(rows[1]["dice"]) == pytest.approx(dice, abs=1e-5)


def test_the_log_has_each_step_once(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "train/loss" in r] == list(range(1, 9))
    assert [r["step"] for r in rows if "val/dice" in r] == [4, 8]
    assert all(r["train/patches_per_s"] > 0 and 0 <= r["train/waiting"] <= 1 for r in rows if "train/loss" in r)


def test_killed_at_any_step_a_run_ends_bit_identical(finished: Path, recipe: Path, tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    kills = 0
    for wanted in (3, 5):  # steps logged before the kill: one not on a checkpoint, one after a resume
        process = subprocess.Popen(
            command(recipe, tmp_path), cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < until:
            if log.exists() and len([x for x in log.read_text().splitlines() if '"train/loss"' in x]) >= wanted:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.005)
        assert process.wait() in (-signal.SIGKILL, 0)
    assert kills >= 1
    done = subprocess.run(command(recipe, tmp_path), cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert state_bytes(tmp_path) == state_bytes(finished)
    losses = [
        [(r["step"], r.get("train/loss"), r.get("val/dice")) for r in map(json.loads, (d / "metrics.jsonl").open())]
        for d in (tmp_path, finished)
    ]
    assert losses[0] == losses[1]
    for split in ("val", "test"):
        assert (tmp_path / "eval" / split / "cases.csv").read_bytes() == (
            finished / "eval" / split / "cases.csv"
        ).read_bytes()


def load(recipe: Path, *overrides: str) -> Any:
    options = {"model": models.options, "tasks": tasks.options}
    return config_lib.load(str(recipe), overrides, lambda room, kind: options[room](kind))


def make(config: Any) -> tuple[Any, Any, Any]:
    """The train step, the function that makes its first state, and the mesh."""
    mesh = parallel.make_mesh({"data": -1})
    job = job_lib.open_job(config)
    tx, _, create = step_lib.make_state(config, job)
    return step_lib.make_train_step(config, job, tx, mesh), create, mesh


def test_what_evaluation_would_refuse_is_refused_before_training(tmp_path: Path) -> None:
    cohort = write_cohort(tmp_path / "cohort", n=4)
    write_cohort(tmp_path / "other", n=1, seed=1)
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / "other" / folder / "case0.nii.gz").rename(cohort / folder / "CASE2.nii.gz")
    table = json.loads((cohort / "dataset.json").read_text())
    table["training"].append({"image": "imagesTr/CASE2.nii.gz", "label": "labelsTr/CASE2.nii.gz"})
    (cohort / "dataset.json").write_text(json.dumps(table))
    with (cohort / "split.csv").open("a") as file:
        file.write("CASE2,val\n")
    recipe = write_recipe(tmp_path / "tiny.py", cohort)
    with pytest.raises(UserError, match="case 'case2' .* and of case 'CASE2' .* would be one file"):
        job_lib.open_job(load(recipe))
    job_lib.open_job(load(recipe, "eval.predictions=false"))


def a_batch(n: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "image": rng.normal(size=(n, 16, 16, 16, 1)).astype(np.float32),
        "modality": np.ones((n, 1), bool),
        "spacing": np.full((n, 3), 2.0, np.float32),
        "example": np.arange(n),
        "valid": np.ones(n, bool),
        "spheres/target": rng.integers(0, 3, (n, 16, 16, 16)).astype(np.uint8),
        "spheres/mask": np.ones(n, bool),
    }


def plain(recipe: Path, *more: str) -> Any:
    """Without augmentation and with plain SGD, so that updates are linear in the gradient."""
    return load(
        recipe, "augment.mirror=()", "augment.affine.p=0.0", "augment.gamma.p=0.0", "augment.noise.p=0.0",
        "optim.name=sgd", "optim.momentum=0.0", "optim.clip=0.0", "optim.schedule=constant", *more,
    )  # fmt: skip


def one_step(config: Any, batch: dict[str, np.ndarray]) -> tuple[Any, dict[str, float]]:
    step, create, mesh = make(config)
    state, sums = step(jax.jit(create)(), parallel.put_batch(batch, mesh))
    return state.params, {k: float(v) for k, v in sums.items()}


def close(a: Any, b: Any, **tolerance: float) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_accumulated_rounds_equal_the_whole_batch(recipe: Path) -> None:
    batch = a_batch()
    batch["spheres/mask"][1] = False  # rounds then hold different numbers of labelled examples
    whole, sums = one_step(plain(recipe), batch)
    for rounds in (2, 4):
        cut, cut_sums = one_step(plain(recipe, f"optim.accumulate={rounds}"), batch)
        close(whole, cut, rtol=1e-4, atol=1e-6)
        assert cut_sums["loss"] == pytest.approx(sums["loss"], rel=1e-5)


def test_an_example_without_a_label_changes_nothing(recipe: Path) -> None:
    batch = a_batch()
    batch["spheres/mask"][2:] = False
    other = {k: v.copy() for k, v in batch.items()}
    other["spheres/target"][2:] = 1
    clean, _ = one_step(plain(recipe), batch)
    close(clean, one_step(plain(recipe), other)[0], rtol=0, atol=0)
    # The labelled half alone, as a batch of its own, gives the same step.
    half, _ = one_step(plain(recipe), {k: v[:2] for k, v in batch.items()})
    close(clean, half, rtol=1e-4, atol=1e-6)


def test_a_batch_without_any_label_leaves_the_parameters(recipe: Path) -> None:
    batch = a_batch()
    batch["spheres/mask"][:] = False
    _, create, _ = make(plain(recipe, "optim.weight_decay=0.0"))
    before = jax.jit(create)().params
    after, sums = one_step(plain(recipe, "optim.weight_decay=0.0"), batch)
    close(before, after, rtol=0, atol=0)
    assert sums["loss"] == 0.0
    assert sums["grad_norm"] == 0.0


def test_the_average_is_what_is_evaluated(recipe: Path) -> None:
    step, create, mesh = make(load(recipe))
    state = jax.jit(create)()
    first = jax.device_get(state.params)
    state, _ = step(state, parallel.put_batch(a_batch(), mesh))
    want = optim.ema(first, jax.device_get(state.params), 0.9, 0)
    close(state.eval_params, want, rtol=1e-5, atol=1e-7)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32(recipe: Path) -> None:
    params, sums = one_step(plain(recipe, "train.precision=bfloat16"), a_batch())
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
    _, exact = one_step(plain(recipe), a_batch())
    assert sums["loss"] == pytest.approx(exact["loss"], rel=0.02)
    assert sums["loss"] != exact["loss"]


EIGHT = """
import os, json, sys
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=' + sys.argv[1]
sys.path[:0] = [{tests!r}]
import pathlib, jax
import test_train as t
from medjax import parallel
config = t.load(pathlib.Path({recipe!r}), 'data.batch_size=8')
step, create, mesh = t.make(config)
state = jax.jit(create, out_shardings=parallel.replicated(mesh))()
losses = []
for i in range(5):
    state, sums = step(state, parallel.put_batch(t.a_batch(8, seed=i), mesh))
    losses.append(float(sums['loss']))
print(json.dumps([jax.device_count(), losses]))
"""


def test_eight_devices_train_as_one(recipe: Path) -> None:
    code = EIGHT.format(tests=str(REPO / "tests"), recipe=str(recipe))
    found = {}
    for devices in ("1", "8"):
        done = subprocess.run(
            [sys.executable, "-c", code, devices], capture_output=True, text=True, cwd=REPO, env={**os.environ}
        )
        assert done.returncode == 0, done.stderr
        count, losses = json.loads(done.stdout.splitlines()[-1])
        assert count == int(devices)
        found[devices] = losses
    np.testing.assert_allclose(found["8"], found["1"], rtol=1e-5)


def test_without_validation_labels_the_newest_is_the_best(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    scores = evaluate.quick_scores

    def unlabelled(predictor: Any, params: Any, cases: Any, *rest: Any) -> dict[str, float]:
        return scores(predictor, params, [replace(case, targets={}) for case in cases], *rest)

    monkeypatch.setattr(evaluate, "quick_scores", unlabelled)
    monkeypatch.setattr("medjax.errors._said", set())  # another test's run may have said it
    config = load(recipe, "train.patience=1")
    spine.train(config, tmp_path)
    assert Checkpoints(tmp_path, read_only=True).newest("best") == 8
    said = capsys.readouterr()
    assert "the newest stands for the best" in said.err
    assert "best validation score" not in said.out


def test_early_stopping_stops_and_says_so(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    # A learning rate of 0 never improves on the first evaluation.
    def run(patience: int, total: int = 40) -> str:
        main.main(
            [f"--config={recipe}", f"--workdir={tmp_path}", "--config.optim.lr=0.0", "--config.eval.pictures=false",
             f"--config.train.patience={patience}", f"--config.train.total={total} steps"]
        )  # fmt: skip
        return capsys.readouterr().out

    assert "trained to step 8 (stopped early)" in run(1)
    # Given again, it does not go on training; with more patience it does.
    assert "already trained to step 8 (stopped early); it goes on with train.patience above 1, or 0" in run(1)
    assert "trained to step 12 (stopped early)" in run(2)
    said = run(0, 14)
    assert "trained to step 14 in" in said
    # What that command has gone on from stays ended for its own patience alone.
    assert "already trained to step 14 (stopped early); it goes on with" in run(2)


def test_patience_needs_a_score(recipe: Path, tmp_path: Path) -> None:
    config = load(recipe, "train.patience=1", "data.exclude=('case6',)", "eval.splits=('test',)")
    with pytest.raises(UserError, match=r"train\.patience=1: there is no 'val' split"):
        spine.train(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.patch=(15,16,16)", ["data.patch=(15, 16, 16)", "(2, 2, 2)"]),
        ("data.patch=(32,16,16)", ["larger than every padded training volume"]),
        ("train.precision=float16", ["float16", "bfloat16"]),
        ("data.split.file=nope.csv", ["nope.csv"]),
        ("data.cohort=/nonexistent", ["/nonexistent"]),
        ("optim.accumulate=3", ["optim.accumulate=3"]),
        ("train.log_every=0 steps", ["at least one step"]),
        ("augment.mirror=(0,4)", ["augment.mirror"]),
    ],
)
def test_what_cannot_work_is_refused_in_words(tmp_path: Path, recipe: Path, override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        main.main([f"--config={recipe}", f"--workdir={tmp_path}", f"--config.{override}"])
    assert all(w in str(caught.value) for w in words), str(caught.value)
    assert not list(tmp_path.glob("checkpoints/*/*"))


def test_another_architecture_is_refused_even_by_a_finished_run(finished: Path, recipe: Path) -> None:
    with pytest.raises(UserError) as caught:
        main.main([f"--config={recipe}", f"--workdir={finished}", "--config.model.features=(4,12)"])
    for words in ("another architecture", "encoder1", "in the checkpoint", "in the model", "earlier version"):
        assert words in str(caught.value)


def test_eval_without_a_checkpoint_and_exit_code(recipe: Path, tmp_path: Path) -> None:
    done = subprocess.run(command(recipe, tmp_path, "--mode=eval"), cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2
    assert "holds no checkpoint" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_resumed_run_says_what_changed(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base = [
        f"--config={recipe}",
        f"--workdir={tmp_path}",
        "--config.eval.pictures=false",
        "--config.train.total=2 steps",
    ]
    main.main(base)
    main.main([*base[:-1], "--config.train.total=4 steps"])
    assert "another configuration: train.total: 2 steps -> 4 steps" in capsys.readouterr().out
