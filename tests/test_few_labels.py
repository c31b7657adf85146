"""The label-efficiency study: equal time for every arm, no label too many, a table that says what the runs said."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from test_compare import noisy, write_run

from benchmarks import few_labels
from configs.ablations import few_labels as study
from launch import sweep
from medjax import config as config_lib
from medjax import models, peft, tasks, transfer
from medjax.data import dataset
from medjax.errors import UserError
from medjax.models.model import build_model

REPO = Path(__file__).resolve().parents[1]
RECIPE = str(REPO / study.__file__)


def resolved(arg: str) -> Any:
    options = {"model": models.options, "tasks": tasks.options}
    return config_lib.load(f"{RECIPE}:{arg}", (), lambda room, kind: options[room](kind))


def steps(config: Any) -> int:
    return config_lib.steps(config.train.total, batch_size=4, n_examples=1)


def test_every_arm_has_the_same_time() -> None:
    for arm in study.ARMS:
        config = resolved(f"arm={arm},labels=5,seconds=200,step=0.5,pretrain=0.25")
        spent = steps(config) * study.COST[arm] * 0.5
        if arm in study.PRETRAINED:
            assert config.init.source == "runs/few_labels/pretrained/seed{seed}"
            pretraining = steps(resolved("arm=pretrain,seconds=200,step=0.5,pretrain=0.25"))
            spent += pretraining * study.COST["pretrain"] * 0.5
        else:
            assert not config.init.source
        assert spent == pytest.approx(200, abs=1)
        # The validation cases are looked at once, after the last step.
        assert config_lib.steps(config.train.eval_every, batch_size=4, n_examples=1) == steps(config)
        assert tuple(config.eval.splits) == ("val",)


def test_only_semi_supervision_sees_images_without_labels() -> None:
    for arm in study.ARMS:
        few, all_ = resolved(f"arm={arm},labels=5"), resolved(f"arm={arm},labels=180")
        assert (few.data.labelled, all_.data.labelled) == (5, 0)
        assert few.data.unlabelled == arm.endswith("mean_teacher")
        assert (few.semi.method == "mean_teacher") == arm.endswith("mean_teacher")
        if few.semi.method:
            assert (few.data.sampling.labelled, few.semi.cases) == (0.5, "unlabelled")
            assert (all_.data.sampling.labelled, all_.semi.cases) == (0.0, "all")


def test_lora_trains_a_twentieth_at_most(data_root: Path) -> None:
    config = resolved(f"arm=lora,data={data_root / 'hippocampus'}")
    built = tasks.build(config.tasks, {"anterior": 1, "posterior": 2})
    model, x = build_model(config, built), jnp.zeros((1, *config.data.patch, 1))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=True)["params"])
    division = peft.divide(config, {path: leaf.shape for path, leaf in peft.flat(shapes).items()})
    factors = sum(math.prod(f.a) + math.prod(f.b) for f in division.factors.values())
    trained = factors + sum(math.prod(division.shapes[path]) for path in division.trained)
    assert 0.02 < trained / sum(map(math.prod, division.shapes.values())) <= 0.05


@pytest.mark.parametrize("arg", ["", "labels=5+10,arms=scratch+lora,seconds=60,debug"])
def test_the_sweep_has_an_entry_for_each(arg: str) -> None:
    found = sweep.variants(f"{RECIPE}:{arg}", [])
    names = [variant.name for variant in found]
    if arg:
        assert names == ["scratch_5", "lora_5", "scratch_10", "lora_10"]
        assert all("debug" in variant.arg and "seconds=60.0" in variant.arg for variant in found)
    else:
        assert len(names) == 5 * len(study.ARMS)
    assert sweep.check(RECIPE, found, [], 3, 0) == 0


def test_pretraining_sees_training_images_and_brains_alone(data_root: Path) -> None:
    config = resolved(f"arm=pretrain,data={data_root / 'hippocampus'}")
    splits = dataset.open_splits(dataset.open_cohort(config.data, config.tasks), config.data, 0, check_content=False)
    with (data_root / "hippocampus" / "split.csv").open(newline="") as file:
        train = {row["id"] for row in csv.DictReader(file) if row["split"] == "train"}
    brains = len(list((data_root / "brain_unlabelled").glob("*.nii.gz")))
    found = {case.id for case in splits["train"]}
    assert train < found
    assert len(found) == 180 + brains
    assert not found & {case.id for case in splits["val"]}
    assert [task.type for task in config.tasks.values()] == ["masked"]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for arm, level in (("scratch", 0.7), ("mean_teacher", 0.75)):
        for labels, more in ((5, 0.0), (20, 0.1)):
            for seed in range(3):
                write_run(
                    tmp_path / "arms" / f"{arm}_{labels}" / f"seed{seed}",
                    noisy(level + more, seed, 0.02),
                    split="val",
                    name=f"{arm}_{labels}",
                    seed=seed,
                )
    (tmp_path / "arms" / "mae_5" / "seed0").mkdir(parents=True)  # not begun
    return tmp_path


def test_the_table_says_what_the_runs_said(runs: Path, capsys: pytest.CaptureFixture) -> None:
    rows = {(row["arm"], row["labels"]): row for row in few_labels.table(runs)}
    assert set(rows) == {("scratch", 5), ("scratch", 20), ("mean_teacher", 5), ("mean_teacher", 20)}
    assert rows["mean_teacher", 20]["mean"] == pytest.approx(0.85, abs=0.01)
    assert rows["mean_teacher", 5]["difference"] == pytest.approx(0.05, abs=1e-6)  # the same noise on both sides
    assert "mae_5/seed0: not begun" in capsys.readouterr().out
    target = runs / "page.md"
    target.write_text("before\n<!-- table: begin -->\nold\n<!-- table: end -->\nafter\n")
    few_labels.main(["--report", f"--out={runs}", f"--page={target}"])
    text = target.read_text()
    assert text.startswith("before\n<!-- table: begin -->\n")
    assert text.endswith("<!-- table: end -->\nafter\n")
    assert "old" not in text
    first = next(line for line in text.splitlines() if line.startswith("| `mean_teacher`"))
    assert first.startswith(f"| `mean_teacher` | {100 * rows['mean_teacher', 5]['mean']:.1f} [")
    assert "| `mean_teacher` | +5.0 [" in text
    assert "| `scratch` | 8 | 4 to 4 | 6 |" in text
    assert (runs / "page.png").read_bytes() == (runs / "few_labels.png").read_bytes()
    assert (runs / "few_labels.png").stat().st_size > 10_000


def test_what_cannot_work_is_refused_in_words(runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "no_marks.md"
    page.write_text("nothing")
    for arguments, words in (
        (["--report", f"--out={tmp_path / 'none'}"], "no evaluated run"),
        (["--report", f"--out={runs}", f"--page={page}"], "table: begin"),
        (["--config=configs/brain_seg.py"], "this command is about"),
        (["--config=configs/ablations/few_labels.py:arms=magic"], "no arm 'magic'"),
    ):
        with pytest.raises(UserError, match=words):
            few_labels.main(arguments)


def test_each_seed_begins_from_its_own_pretraining() -> None:
    config = resolved("arm=mae,labels=5,pretrained=nowhere/seed{seed}")
    with config.unlocked():
        config.seed = 7
    with pytest.raises(UserError, match="nowhere/seed7: there is no such run"):
        transfer.open_start(config, None, ("MRI",), Path())


@pytest.mark.slow
@pytest.mark.real
def test_the_study_runs_from_end_to_end(data_root: Path, tmp_path: Path) -> None:
    data = data_root / "hippocampus"
    recipe = f"{RECIPE}:debug,labels=3,arms=scratch+mae_mean_teacher+lora,data={data}"
    few_labels.main([f"--config={recipe}", f"--out={tmp_path}", "--seeds=1"])
    text = (tmp_path / "few_labels.md").read_text()
    assert all(f"| `{arm}` |" in text for arm in ("scratch", "mae_mean_teacher", "lora"))
    config = json.loads((tmp_path / "arms" / "lora_3" / "seed0" / "config.json").read_text())
    assert config["init"]["source"] == f"{tmp_path}/pretrained/seed{{seed}}"
