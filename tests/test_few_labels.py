"""The label-efficiency study: equal time for every arm, no label too many, a table that says what the runs said."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_compare import noisy, write_run
from test_train import make
from tiny import write_cohort

from benchmarks import few_labels
from configs.ablations import few_labels as study
from launch import sweep
from medjax import config as config_lib
from medjax import models, optim, peft, tasks, transfer
from medjax.data import dataset
from medjax.errors import UserError
from medjax.models.model import build_model

REPO = Path(__file__).resolve().parents[1]
RECIPE = str(REPO / study.__file__)


def resolved(arg: str, overrides: Sequence[str] = ()) -> Any:
    options = {"model": models.options, "tasks": tasks.options}
    return config_lib.load(f"{RECIPE}:{arg}", overrides, lambda room, kind: options[room](kind))


def steps(config: Any) -> int:
    return config_lib.steps(config.train.total, batch_size=4, n_examples=1)


def test_every_arm_has_the_same_time() -> None:
    for arm, labels in itertools.product(study.ARMS, (5, 180)):
        config = resolved(f"arm={arm},labels={labels},seconds=200,step=0.5,pretrain=0.25")
        # A teacher of all cases teaches twice as many rows.
        every = "mean_teacher_all" if "mean_teacher" in arm and config.semi.cases == "all" else arm
        spent = steps(config) * study.COST[every] * 0.5
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


@pytest.mark.parametrize("labels", ["0", "-3", "181", "5+", "05", "all"])
def test_labels_that_there_are_not_are_refused(labels: str) -> None:
    assert resolved("labels=1").data.labelled == 1
    assert resolved("labels=179").data.labelled == 179
    for read in (
        lambda: resolved(f"arm=scratch,labels={labels}"),
        lambda: sweep.variants(f"{RECIPE}:labels={labels}", []),
    ):
        with pytest.raises(UserError, match=r"labels=.*is no number from 1 to 180"):
            read()


def test_lora_trains_a_twentieth_at_most(data_root: Path) -> None:
    config = resolved(f"arm=lora,data={data_root / 'hippocampus'}")
    built = tasks.build(config.tasks, {"anterior": 1, "posterior": 2})
    model, x = build_model(config, built), jnp.zeros((1, *config.data.patch, 1))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=True)["params"])
    division = peft.divide(config, {path: leaf.shape for path, leaf in peft.flat(shapes).items()})
    trained, whole = division.count()
    assert 0.02 < trained / whole <= 0.05
    assert (config.peft.alpha / config.peft.rank, config.optim.lr) == (2.0, 1e-2)  # as in brain_finetune.py


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


LEVELS = {"scratch": 0.7, "mean_teacher": 0.75, "mae": 0.77, "lora": 0.765, "probe": 0.72, "probe_random": 0.68}


def write_arm(out: Path, arm: str, labels: int, seeds: range = range(3)) -> None:
    for seed in seeds:
        folder = write_run(
            out / "arms" / f"{arm}_{labels}" / f"seed{seed}",
            noisy(LEVELS[arm] + labels / 200, seed, 0.02),
            split="val",
            name=f"{arm}_{labels}",
            seed=seed,
        )
        cost = json.loads((folder / "cost.json").read_text())
        (folder / "cost.json").write_text(json.dumps(cost | {"trained": 47 if arm == "lora" else 1000}))


def write_pretraining(out: Path, config: Any, seed: int, steps: int) -> None:
    folder = out / "pretrained" / f"seed{seed}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config_lib.to_json(config))
    row = {"step": steps, "train/patches_per_s": config.data.batch_size}  # a second a step
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for arm in ("scratch", "mean_teacher"):
        for labels in (5, 20):
            write_arm(tmp_path, arm, labels)
    (tmp_path / "arms" / "mae_5" / "seed0").mkdir(parents=True)  # not begun
    return tmp_path


def write_configs(out: Path) -> None:
    """The configurations that the runs in `out` would have had."""
    for folder in out.glob("arms/*/seed*"):
        if (folder / "config.json").is_file():
            arm, _, labels = folder.parent.name.rpartition("_")
            config = resolved(f"arm={arm},labels={labels}")
            with config.unlocked():
                config.name, config.seed = folder.parent.name, int(folder.name[-1])
            (folder / "config.json").write_text(config_lib.to_json(config))


def lines_of(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def test_the_table_says_what_the_runs_said(runs: Path, capsys: pytest.CaptureFixture) -> None:
    base, found, bars = few_labels.table(runs, study.PRETRAINED)
    rows = {(row["arm"], row["labels"]): row for row in found}
    assert base == "scratch"
    assert set(rows) == {("scratch", 5), ("scratch", 20), ("mean_teacher", 5), ("mean_teacher", 20)}
    assert rows["mean_teacher", 20]["mean"] == pytest.approx(0.85, abs=0.01)
    assert rows["mean_teacher", 5]["difference"] == pytest.approx(0.05, abs=1e-6)  # the same noise on both sides
    assert [(row["arm"], row["against"], row["labels"]) for row in bars] == [
        ("mean_teacher", "scratch", 5),
        ("mean_teacher", "scratch", 20),
    ]
    assert "mae_5/seed0: not begun" in capsys.readouterr().out
    target = runs / "page.md"
    target.write_text("before\n<!-- table: begin -->\nold\n<!-- table: end -->\nafter\n")
    few_labels.main(["--report", f"--out={runs}", f"--page={target}"])
    text = target.read_text()
    assert text.startswith("before\n<!-- table: begin -->\n")
    assert text.endswith("<!-- table: end -->\nafter\n")
    assert "old" not in text
    first = lines_of(text, "| `mean_teacher`")[0]
    assert first.startswith(
        f"| `mean_teacher` | not run | {100 * rows['mean_teacher', 5]['mean']:.1f} [",
    )
    assert "| `mean_teacher` | not run | +5.0 [" in text
    assert "| `scratch` | 6 | 8 | 0 | 4 | 4 | 100 % |" in text
    assert "Not equal time" not in text
    # No arm is left out, nor any number of labels of the study.
    assert "| arm | 3 labels | 5 labels | 10 labels | 20 labels | 180 labels |" in text
    assert lines_of(text, "| `probe` |") == [f"| `probe` |{' not run |' * 5}"] * 2 + ["| `probe` | not run | | | | | |"]
    assert "Parameters that `lora` trains: not run" in text
    assert "](page.png)" in text
    assert "](few_labels.png)" in (runs / "few_labels.md").read_text()
    assert (runs / "page.png").read_bytes() == (runs / "few_labels.png").read_bytes()
    assert (runs / "few_labels.png").stat().st_size > 10_000


def test_the_bars_and_the_time_are_read_off(runs: Path) -> None:
    for arm in ("mae", "lora", "probe", "probe_random"):
        write_arm(runs, arm, 5)
    write_arm(runs, "mae", 20, range(2))
    for seed in range(3):
        write_pretraining(runs, resolved("arm=pretrain"), seed, 4)
    _, rows, bars = few_labels.table(runs, study.PRETRAINED)
    found = {(row["arm"], row["against"], row["labels"]): row for row in bars}
    assert set(found) == {
        ("mae", "scratch", 5), ("lora", "mae", 5), ("probe", "probe_random", 5), ("mae", "scratch", 20),
    }  # fmt: skip
    assert found["mae", "scratch", 5]["apart"]
    for key, points in ((("lora", "mae", 5), -0.005), (("probe", "probe_random", 5), 0.04)):
        for at in ("difference", "difference_low", "difference_high"):
            assert found[key][at] == pytest.approx(points, abs=1e-6)
    spent = {row["arm"]: (row["seconds"], row["pretraining"]) for row in rows if row["labels"] == 5}
    assert spent["mae"] == (4.0, 4.0)
    assert spent["probe_random"] == (4.0, 0.0)
    few_labels.main(["--report", f"--out={runs}"])
    text = (runs / "few_labels.md").read_text()
    best = lines_of(text, "| best arm less `scratch`")[0]
    assert "| not run | `mae` +7.0 [+7.0, +7.0], intervals apart | not run | `mae` +" in best
    assert "(2 of 3 seeds)" in best
    assert "| `lora` less `mae`: at least -1 | not run | -0.5 [-0.5, -0.5] | not run | not run | not run |" in text
    assert "`lora` trains 47 of 1,000 parameters, 4.7 %" in text
    assert "| `mae` | 5 | 8 | 4 | 4 | 8 | **200 %** |" in text
    assert "**Not equal time** (more than 10 % off): `mae`, `lora`, `probe`." in text


def test_without_scratch_another_arm_is_named_as_the_baseline(tmp_path: Path) -> None:
    write_arm(tmp_path, "mae", 5)
    write_arm(tmp_path, "lora", 5)
    few_labels.main(["--report", f"--out={tmp_path}"])
    text = (tmp_path / "few_labels.md").read_text()
    assert "Difference from `lora`, points" in text
    assert "`scratch`, points" not in text
    assert "not known" in lines_of(text, "| `mae` | 3")[0]  # how long the pretraining took


def test_pretraining_of_other_arguments_is_never_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(few_labels, "run", commands.append)
    config = resolved("arm=pretrain,seconds=30")
    write_pretraining(tmp_path, config, 0, 4)
    # Where it runs and which labels the arms keep is nothing to the pretraining; the second seed is not there yet.
    few_labels.pretrain(RECIPE, "seconds=30,labels=5", tmp_path, range(2))
    assert len(commands) == 2
    for arg, key in (
        ("", "train.total"),
        ("seconds=30,width=4", "model.features"),
        ("seconds=30,data=x", "data.cohort"),
    ):
        with pytest.raises(UserError, match=rf"(?s)seed0: was pretrained under other.*{key}.*choose another --out"):
            few_labels.pretrain(RECIPE, arg, tmp_path, range(2))
    assert len(commands) == 2
    with config.unlocked():
        config.seed = 1
    (tmp_path / "pretrained" / "seed0" / "config.json").write_text(config_lib.to_json(config))
    with pytest.raises(UserError, match="seed: 1 -> 0"):
        few_labels.pretrain(RECIPE, "seconds=30", tmp_path, range(1))


def test_runs_of_another_recipe_are_never_pooled(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(few_labels, "run", commands.append)
    write_arm(runs, "lora", 5)
    write_configs(runs)
    # Other arms and labels of the same study; --out written otherwise; where runs are computed; a key that is new.
    file = runs / "arms" / "lora_5" / "seed2" / "config.json"
    whole = json.loads(file.read_text())
    whole["init"]["source"], whole["data"]["workers"] = "before/pretrained/seed{seed}", 7
    del whole["optim"]["decoder_first"]
    file.write_text(json.dumps(whole))
    command = [f"--config={RECIPE}:labels=3,arms=scratch", f"--out={runs}", "--seeds=1"]
    few_labels.main(command)
    assert [c[0] for c in commands] == ["launch.sweep"]
    # Nothing of this is in the runs' commands. Those of other arms, labels and seeds than the command's count too.
    recipe, text = tmp_path / "few_labels.py", Path(RECIPE).read_text()
    cost = re.findall(r'"mean_teacher": ([0-9.]+)', text)[0]
    for old, new, words in (
        (
            f'"mean_teacher": {cost}', '"mean_teacher": 9.0',
            r"mean_teacher_20/seed0: was trained under other arguments, or the recipe has changed \(.*train.total: \d+ "
            r"steps -> \d+ steps.*\); choose another --out, or delete that folder. Likewise: mean_teacher_20/seed1, "
            r"mean_teacher_20/seed2, mean_teacher_5/seed0, mean_teacher_5/seed1, mean_teacher_5/seed2$",
        ),
        ("optim.lr = 1e-2", "optim.lr = 2e-2", r"lora_5/seed0: was trained .*\(optim.lr: 0.01 -> 0.02\)"),
        ('"weight": 1.0', '"weight": 0.5', r"mean_teacher_20/seed0: .*\(semi.weight: 1.0 -> 0.5\)"),
        ('config.semi.cases =', 'config.semi.threshold = 0.5; config.semi.cases =',
         r"\(semi.threshold: None -> 0.5\)"),
        ('"mirror": (0,), "predictions"', '"mirror": (), "predictions"',
         r"lora_5/seed0: .*\(eval.mirror: \[0\] -> \[\]"),
    ):  # fmt: skip
        assert text.count(old) == 1
        recipe.write_text(text.replace(old, new))
        with pytest.raises(UserError, match=words):
            few_labels.main([f"--config={recipe}:labels=3,arms=scratch", f"--out={runs}", "--seeds=1"])
    with pytest.raises(UserError, match=r"lora_5/seed0: .*model.features"):
        few_labels.main([f"--config={RECIPE}:labels=3,arms=scratch,width=4", f"--out={runs}", "--seeds=1"])
    assert len(commands) == 1


def test_calibration_prints_what_the_recipe_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def run(arguments: list[str]) -> None:
        arm = next(a for a in arguments if a.startswith("--config=")).rpartition("arm=")[2]
        assert "--config.train.precision" not in " ".join(arguments), "the recipe's own"
        folder = Path(next(a for a in arguments if a.startswith("--workdir=")).partition("=")[2])
        assert not folder.exists(), "measured anew"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(config_lib.to_json(resolved(f"arm={arm}")))
        speeds = [1.0, 1.0, *[20.0 if arm == "pretrain" else 40.0] * 10]  # the first steps are slow
        rows = [{"step": 5 * i, "train/patches_per_s": speed} for i, speed in enumerate(speeds)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr(few_labels, "run", run)
    for _ in range(2):
        few_labels.main(["--calibrate", f"--out={tmp_path}", f"--config={RECIPE}:arms=scratch"])
        said = capsys.readouterr().out
        assert "median of steps 11 to 60, bfloat16, width 8, batch 4; " in said
        found: dict[str, Any] = {}
        exec(said, found)
        assert found["STEP"] == 0.1
        assert found["COST"] == {arm: 2.0 if arm == "pretrain" else 1.0 for arm in study.COST}
        assert list(found["COST"]) == list(study.COST)


def test_every_arm_of_a_longer_study_can_be_calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: dict[str, list[str]] = {}

    def run(arguments: list[str]) -> None:
        arm = next(a for a in arguments if a.startswith("--config=")).removeprefix(f"--config={RECIPE}:")
        commands[arm] = [a.removeprefix("--config.") for a in arguments if a.startswith("--config.")]

    monkeypatch.setattr(few_labels, "run", run)
    monkeypatch.setattr(few_labels, "seconds_a_step", lambda folder: 1.0)
    monkeypatch.setattr(few_labels, "log_of", lambda folder: (resolved("").to_dict(), []))
    few_labels.main(["--calibrate", f"--out={tmp_path}", f"--config={RECIPE}:seconds=600"])
    assert len(commands) == len(study.COST)
    for arg, overrides in commands.items():
        config = resolved(arg, overrides)
        late = config_lib.steps(config.optim.decoder_first, batch_size=4, n_examples=1)
        assert late < steps(config) == 60, f"{arg}: the encoder would stand still"
        optim.schedule(config.optim, 60, config_lib.steps(config.optim.warmup, batch_size=4, n_examples=1))


def test_a_failed_sweep_still_reports_and_commands_add_up(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: list[str]) -> None:
        if arguments[0] == "launch.sweep" and failing:
            raise SystemExit(1)

    monkeypatch.setattr(few_labels, "run", run)
    write_configs(runs)
    failing = True
    command = [f"--config={RECIPE}:labels=5,arms=scratch", f"--out={runs}"]
    with pytest.raises(SystemExit):
        few_labels.main(command)
    assert "| `scratch` | not run | 7" in (runs / "few_labels.md").read_text()
    failing = False
    few_labels.main(command)
    few_labels.main([f"--config={RECIPE}:labels=20,arms=scratch", f"--out={runs}"])
    notes = lines_of((runs / "few_labels.md").read_text(), "- `python -m benchmarks.few_labels")
    assert len(notes) == 2, "each command once"
    assert "labels=5" in notes[0]
    assert "labels=20" in notes[1]


def test_what_cannot_work_is_refused_in_words(runs: Path, tmp_path: Path) -> None:
    page = tmp_path / "no_marks.md"
    page.write_text("nothing")
    for arguments, words in (
        (["--report", f"--out={tmp_path / 'none'}"], "no evaluated run"),
        (["--report", f"--out={runs}", f"--page={page}"], "table: begin"),
        (["--config=configs/brain_seg.py"], "this command is about"),
        (["--config=configs/ablations/few_labels.py:arms=magic"], "no arm 'magic'"),
        (["--config=configs/ablations/few_labels.py:labels=5+0"], r"'labels=5\+0': '0' is no number from 1 to 180"),
    ):
        with pytest.raises(UserError, match=words):
            few_labels.main(arguments)


def test_each_seed_begins_from_its_own_pretraining() -> None:
    config = resolved("arm=mae,labels=5,pretrained=nowhere/seed{seed}")
    with config.unlocked():
        config.seed = 7
    with pytest.raises(UserError, match="nowhere/seed7: there is no such run"):
        transfer.open_start(config, None, ("MRI",), Path())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cohort, and volumes without labels beside it, where the study looks for them."""
    folder = tmp_path_factory.mktemp("study")
    write_cohort(folder / "cohort")
    write_cohort(folder / "more", n=2, seed=1)
    (folder / "more" / "imagesTr").rename(folder / "brain_unlabelled")
    return folder


@pytest.mark.parametrize(
    "arm", [*(f"arm={arm},labels=3" for arm in study.ARMS), "arm=mean_teacher,labels=180", "arm=pretrain"]
)
def test_every_arm_has_a_step(folders: Path, arm: str) -> None:
    """Traced, not run."""
    config = resolved(f"{arm},debug,data={folders / 'cohort'}")
    step, create, _ = make(config)
    patch = tuple(config.data.patch)
    batch = {
        "image": np.zeros((4, *patch, 1), np.float32),
        "modality": np.ones((4, 1), bool),
        "spacing": np.ones((4, 3), np.float32),
        "example": np.arange(4),
        "valid": np.ones(4, bool),
        "hippocampus/target": np.zeros((4, *patch), np.uint8),
        "hippocampus/mask": np.asarray([True, True, False, False]),
    }
    before = jax.eval_shape(create)
    state, sums = step.trace(before, batch).out_info
    assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == jax.tree.map(lambda a: (a.shape, a.dtype), before)
    assert ("semi/hippocampus" in sums) == ("mean_teacher" in arm)
    assert "loss" in sums


@pytest.mark.slow
@pytest.mark.real
def test_the_study_runs_from_end_to_end(data_root: Path, tmp_path: Path) -> None:
    data = data_root / "hippocampus"
    recipe = f"{RECIPE}:debug,labels=3,arms=scratch+mae_mean_teacher+lora,data={data}"
    few_labels.main([f"--config={recipe}", f"--out={tmp_path}", "--seeds=1"])
    text = (tmp_path / "few_labels.md").read_text()
    for arm in ("scratch", "mae_mean_teacher", "lora"):
        assert "not run" not in lines_of(text, f"| `{arm}` |")[0].split("|")[2]
    assert re.search(r"`lora` trains [0-9,]+ of [0-9,]+ parameters", text)
    # Once more: all is there already.
    few_labels.main([f"--config={recipe}", f"--out={tmp_path}", "--seeds=1"])
    config = json.loads((tmp_path / "arms" / "lora_3" / "seed0" / "config.json").read_text())
    assert config["init"]["source"] == f"{tmp_path}/pretrained/seed{{seed}}"
