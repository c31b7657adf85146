"""The planner: nnU-Net's published plans, the search by compiled memory, folds, and the files it writes."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_cohort

from medjax import config as config_lib
from medjax import main as train_main
from medjax import models, tasks, train
from medjax.data import cohort as cohorts
from medjax.errors import UserError
from medjax.plan import __main__ as program
from medjax.plan import memory, planner, recipe, rules
from medjax.plan.fingerprint import Fingerprint, Seen, fingerprint
from medjax.tasks.classification import Classification

SPEC = config_lib.defaults().data.preprocess


# ------------------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize(
    ("preset", "spacing", "median", "cases", "outputs", "patch", "batch"),
    [
        ("nnunet", (1, 1, 1), (138, 169, 138), 484, 4, (128, 128, 128), 2),  # MSD01
        ("nnunet", (1, 1, 1), (140, 171, 136), 1251, 4, (128, 160, 112), 2),  # BraTS 2021
        ("nnunet-resenc-l", (1, 1, 1), (140, 171, 136), 1251, 4, (160, 192, 160), 3),
        ("nnunet", (1.37, 1.25, 1.25), (115, 320, 232), 20, 2, (80, 192, 160), 2),  # MSD02 heart
        ("nnunet", (1, 1, 1), (36, 50, 35), 260, 3, (40, 56, 40), 9),  # MSD04 hippocampus
        ("nnunet", (5, 1.5625, 1.5625), (18, 237, 208), 200, 4, (20, 256, 224), 4),  # ACDC
    ],
)
def test_nnunets_published_plans(
    preset: str, spacing: Any, median: Any, cases: int, outputs: int, patch: Any, batch: int
) -> None:
    """All numbers in nnU-Net's own axis order (z, y, x); ours is the reverse."""
    net, chosen = rules.like_nnunet(rules.PRESETS[preset], spacing[::-1], median[::-1], cases, outputs)
    assert (net.patch[::-1], chosen) == (patch, batch)


def test_the_stages_of_an_anisotropic_plan() -> None:
    """ACDC at 1.5625² x 5 mm: the first stage convolves and halves in plane; slices follow once they are as near."""
    net, _ = rules.like_nnunet(rules.PRESETS["nnunet"], (1.5625, 1.5625, 5), (208, 237, 18), 200, 4)
    assert net.factors == ((2, 2, 1), (2, 2, 2), (2, 2, 2), (2, 2, 1), (2, 2, 1))
    assert net.kernels == ((3, 3, 1), *((3, 3, 3),) * 5)
    assert net.features() == (32, 64, 128, 256, 320, 320)
    assert (net.multiple, net.stages) == ((32, 32, 4), 6)


def test_elements_of_the_feature_maps_as_nnunet_counts_them() -> None:
    """The residual encoder at 128³, 3 labels: 558319104 with a head on each decoder level, says nnU-Net's source."""
    net = rules.Topology((128,) * 3, ((2, 2, 2),) * 5, ((3, 3, 3),) * 6)
    heads = 3 * sum(net.voxels[1:-1])
    assert rules.elements(net, 3, rules.PRESETS["nnunet-resenc-l"].blocks) + heads == 558_319_104


def test_target_spacing() -> None:
    shapes = np.tile([256, 216, 10], (10, 1))
    spacings = np.column_stack([np.full(10, 1.5), np.full(10, 1.4), [5, 6, 10, 10, 10, 10, 10, 10, 10, 10]])
    assert rules.target_spacing(spacings, shapes) == (1.5, 1.4, pytest.approx(np.percentile(spacings[:, 2], 10)))
    # As coarse, but no thinner than the others in voxels: the median.
    assert rules.target_spacing(spacings, np.tile([30, 30, 10], (10, 1))) == (1.5, 1.4, 10)
    # The 10th percentile is finer than the plane: held at the plane's.
    spacings[:5, 2] = 0.5
    assert rules.target_spacing(spacings, shapes)[2] == pytest.approx(1.5)


@settings(max_examples=60, deadline=None)
@given(
    spacing=st.tuples(*[st.floats(0.3, 8.0)] * 3),
    median=st.tuples(*[st.integers(12, 400)] * 3),
)
def test_every_patch_of_the_sequence_is_one_the_network_takes(spacing: Any, median: Any) -> None:
    previous = math.inf
    for net in rules.sequence(spacing, median):
        assert all(n % m == 0 for n, m in zip(net.patch, net.multiple, strict=True))
        assert len(net.factors) == len(net.kernels) - 1 >= 1
        assert net.kernels[-1] == (3, 3, 3)
        for axis, (n, m) in enumerate(zip(net.patch, net.multiple, strict=True)):
            assert n // m >= rules.MIN_EDGE or m == 1
            held = [k[axis] for k in net.kernels]
            assert held == sorted(held)  # once an axis is convolved over, it stays so
        assert math.prod(net.patch) < previous
        previous = math.prod(net.patch)
    assert previous <= rules.START_VOXELS


@settings(max_examples=30, deadline=None)
@given(spacing=st.tuples(*[st.sampled_from([0.7, 1.1, 1.9, 3.3, 5.2])] * 3), order=st.permutations([0, 1, 2]))
def test_axes_are_alike(spacing: Any, order: list[int]) -> None:
    size = (61, 75, 93)
    here = rules.topology(spacing, size)
    there = rules.topology([spacing[a] for a in order], [size[a] for a in order])
    assert there.patch == tuple(here.patch[a] for a in order)
    assert there.kernels == tuple(tuple(k[a] for a in order) for k in here.kernels)


def test_volumes_too_small_for_a_network() -> None:
    with pytest.raises(UserError, match=r"6×7×5 voxels.*too small.*preprocess.spacing"):
        rules.largest((1, 1, 1), (6, 7, 5))


def test_patches_for_a_network_with_stages_of_its_own() -> None:
    patches = [net.patch for net in rules.patches_of((8, 8, 4), (1, 1, 2), (70, 66, 30))]
    assert patches[0] == (72, 72, 32)
    assert patches[-1] == (8, 8, 4)
    assert all(n % m == 0 for patch in patches for n, m in zip(patch, (8, 8, 4), strict=True))


# ------------------------------------------------------------------------------------------------------------ search


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8e9), ("24 GiB", 24 * 2**30), ("800mb", 8e8), ("1.5TB", 1.5e12), ("64kB", 64e3)]
)
def test_budgets(text: str, size: float) -> None:
    assert memory.parse_budget(text) == int(size)


@pytest.mark.parametrize("text", ["8", "GB", "-1GB", "8 apples", "", "0GB", "1e3GB"])
def test_budgets_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--budget=8GB"):
        memory.parse_budget(text)


class Machine:
    """A step whose need is known: state, and bytes for each element of the feature maps."""

    def __init__(self, each: float, state: int = 10**8, bend: float = 0.0) -> None:
        self.each, self.state, self.bend, self.calls = each, state, bend, 0

    def need(self, net: rules.Topology, batch: int) -> int:
        weight = rules.elements(net, 2)
        return int(self.state + self.each * batch * weight * (1 + self.bend * math.sin(weight)))

    def __call__(self, net: rules.Topology, batch: int) -> memory.Trial:
        self.calls += 1
        return memory.Trial(net, batch, self.state, self.need(net, batch))


def run_search(
    machine: Machine, budget: float, limit: int = 99, **more: int
) -> tuple[memory.Trial, list[rules.Topology]]:
    nets = list(rules.sequence((1, 1, 1), (140, 171, 136)))
    trials = memory.search(nets, int(budget), lambda n: rules.elements(n, 2), machine, lambda _: limit, **more)
    assert len(trials) == machine.calls
    return trials[-1], nets


@pytest.mark.parametrize("each", [2.0, 16.0, 60.0])
@pytest.mark.parametrize("budget", [1e9, 6e9, 11e9])
def test_the_search_takes_the_largest_patch_that_fits_in_few_compilations(each: float, budget: float) -> None:
    machine = Machine(each)
    chosen, nets = run_search(machine, budget)
    assert machine.calls <= 5
    assert chosen.needed <= budget
    place = nets.index(chosen.net)
    assert all(machine.need(net, rules.MIN_BATCH) > budget for net in nets[:place])
    assert machine.need(chosen.net, chosen.batch + 1) > budget


def test_the_search_on_a_machine_that_does_not_scale() -> None:
    machine = Machine(20.0, bend=0.2)
    chosen, _ = run_search(machine, 4e9)
    assert chosen.needed <= 4e9
    assert machine.calls <= 8


def test_one_patch_at_one_batch() -> None:
    machine = Machine(1.0)
    net = rules.topology((1, 1, 1), (64, 64, 64))
    trials = memory.search([net], 10**10, lambda n: rules.elements(n, 2), machine, lambda _: 7, least=7)
    assert [(t.net, t.batch) for t in trials] == [(net, 7)]


def test_the_batch_keeps_its_limit() -> None:
    assert run_search(Machine(1.0), 100e9, limit=5)[0].batch == 5
    assert run_search(Machine(1.0), 100e9, limit=2)[0].batch == 2
    assert run_search(Machine(1.0), 100e9, limit=8, least=3, rounds=3)[0].batch == 6


def test_nothing_fits() -> None:
    with pytest.raises(memory.TooSmall) as caught:
        run_search(Machine(16.0, state=10**9), 5e8)
    assert caught.value.trial.needed > 1e9


# ------------------------------------------------------------------------------------------------------- fingerprint


def make_case(
    folder: Path, id: str, data: np.ndarray, spacing: Sequence[float] = (1, 1, 1), group: str = "", mask: bool = True
) -> cohorts.Case:
    file = folder / f"{id}.nii.gz"
    nib.save(nib.Nifti1Image(data.astype(np.float32), np.diag([*spacing, 1.0])), file)
    return cohorts.Case(id, group or id, {"MR": file}, {"organ": file} if mask else {})


def make_cohort(cases: Sequence[cohorts.Case], splits: Any = None) -> cohorts.Cohort:
    return cohorts.Cohort("test", Path("."), ("MR",), {"organ": 1}, tuple(cases), splits)


def test_fingerprint_reads_boxes_and_finds_twins(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    volumes = [np.zeros((10, 12, 8)) for _ in range(3)]
    for v in volumes:
        v[2:8, 3:12, 1:7] = rng.uniform(1, 2, (6, 9, 6))
    cases = [make_case(tmp_path, f"c{i}", v, (1, 2, 3)) for i, v in enumerate([*volumes, volumes[1]])]
    seen = fingerprint(make_cohort(cases), cases, SPEC)
    assert seen.shapes(False).tolist() == [[10, 12, 8]] * 4
    assert seen.shapes(True).tolist() == [[6, 9, 6]] * 4
    assert seen.spacings.tolist() == [[1, 2, 3]] * 4
    assert seen.kept == pytest.approx(6 * 9 * 6 / (10 * 12 * 8))
    assert seen.twins == (("c1", "c3"),)
    assert seen.intensities("MR")["median"] == pytest.approx(1.5, abs=0.1)


def test_spacings_that_contradict_each_other(tmp_path: Path) -> None:
    data = np.ones((8, 8, 8))
    cases = [make_case(tmp_path, "a", data), make_case(tmp_path, "metres", data, (0.001, 0.001, 0.001))]
    with pytest.raises(UserError, match=r"0\.001 mm in case metres, 1 mm in case a.*header"):
        fingerprint(make_cohort(cases), cases, SPEC)


def sight(low: float = 0.0, kept: float = 1.0, modality: str = "MR") -> Fingerprint:
    box = (10, 10, round(100 * kept))
    return Fingerprint((Seen("a", (10, 10, 100), box, (1, 1, 1), {modality: (low, 0, 1, 2, 3)}, ()),))


@pytest.mark.parametrize(
    ("modality", "kept", "crop", "normalize"),
    [
        ("MR", 1.0, None, "zscore"),
        ("MR", 0.9, "nonzero", "zscore"),
        ("FLAIR", 0.5, "nonzero", "zscore_nonzero"),
        ("CT", 0.5, None, "ct"),
        ("ceCT", 1.0, None, "ct"),
        ("vector", 1.0, None, "zscore"),
    ],
)
def test_normalisation_by_modality(modality: str, kept: float, crop: Any, normalize: str) -> None:
    cohort = dataclasses.replace(make_cohort([]), modalities=(modality,))
    found = planner.intensity_rules(cohort, sight(kept=kept, modality=modality), SPEC, set())
    assert found[:2] == (crop, {modality: normalize})


def test_hounsfield_units_under_another_name_are_told() -> None:
    _, table, notes = planner.intensity_rules(make_cohort([]), sight(low=-1024), SPEC, set())
    assert table == {"MR": "zscore"}
    assert "if it is CT" in notes[0]


def test_mirroring_minds_the_sides() -> None:
    assert planner.mirroring({"liver": 1}) == ((0, 1, 2), (), [])
    labels = {"Left kidney": 1, "right kidney": 4, "LH cortex": 2, "rh cortex": 3, "sacrum": 5, "leftover": 6}
    assert planner.mirroring(labels)[:2] == ((0, 1, 2), ((1, 4), (2, 3)))
    axes, swap, notes = planner.mirroring({"heart_left_ventricle": 1})
    assert (axes, swap) == ((1, 2), ())
    assert "no counterpart" in notes[0]
    # No mirror images of each other; and where left and right is another axis, labels cannot trade places.
    axes, swap, notes = planner.mirroring({"left atrium": 1, "right atrium": 2})
    assert (axes, swap) == ((1, 2), ())
    assert "'left atrium' may have a side" in notes[0]
    axes, swap, notes = planner.mirroring({"kidney_l": 1, "kidney_r": 2}, "PIR")
    assert (axes, swap) == ((0, 1), ())
    assert "axis 2 of 'PIR'" in notes[0]
    assert planner.mirroring({"kidney_l": 1, "kidney_r": 2}, "LPI")[:2] == ((0, 1, 2), ((1, 2),))
    job = [Classification("side", ("left", "right"))]
    axes, swap, notes = planner.mirroring({"kidney_l": 1, "kidney_r": 2}, "RAS", job)
    assert (axes, swap) == ((1, 2), ())
    assert "'left' is an answer of one side" in notes[0]


# ------------------------------------------------------------------------------------------------------------- folds


def divide(cases: Sequence[cohorts.Case], splits: Any = None, twins: Any = ()) -> planner.Division:
    return planner.divide(make_cohort(cases, splits), config_lib.defaults(), {"organ": None}, twins)


def plain_cases(n: int, per_patient: int = 1, mask: bool = True, first: int = 0) -> list[cohorts.Case]:
    return [
        cohorts.Case(f"c{i}", f"p{i // per_patient}", {"MR": Path(f"{i}")}, {"organ": Path("m")} if mask else {})
        for i in range(first, first + n)
    ]


def test_folds_cut_no_patient_and_cover_every_case() -> None:
    cases = plain_cases(24, per_patient=2)
    found = divide(cases)
    assert len(found.folds) == 5
    validated = [id for fold in found.folds for id, split in fold.items() if split == "val"]
    assert sorted(validated) == sorted(c.id for c in cases)
    for fold in found.folds:
        sides = {c.group: set() for c in cases}  # type: dict[str, set[str]]
        for case in cases:
            sides[case.group].add(fold[case.id])
        assert all(len(s) == 1 for s in sides.values())


def test_twins_stay_on_one_side() -> None:
    twins = [("c0", "c7"), ("c7", "c3")]
    for fold in divide(plain_cases(10), twins=twins).folds:
        assert fold["c0"] == fold["c7"] == fold["c3"]


def test_test_lists_and_unlabelled_cases_are_not_learnt_from() -> None:
    cases = [*plain_cases(6), *plain_cases(2, mask=False, first=6), *plain_cases(2, mask=False, first=8)]
    own = {"train": tuple(c.id for c in cases[:8]), "test": ("c8", "c9")}
    found = divide(cases, own)
    assert [c.id for c in found.fitted] == [f"c{i}" for i in range(6)]
    for fold in found.folds:
        assert fold["c6"] == fold["c7"] == "unlabelled"
        assert fold["c8"] == fold["c9"] == "test"
        assert set(fold) == {c.id for c in cases}


def test_one_labelled_patient() -> None:
    cases = [*plain_cases(1), *plain_cases(1, mask=False, first=1)]
    assert divide(cases).folds == ({"c0": "train", "c1": "val"},)
    with pytest.raises(UserError, match="one patient.*data.group"):
        divide(plain_cases(2, per_patient=2))
    # Another image of the patient learnt from is none to validate on.
    twice = [*plain_cases(1, per_patient=9), *plain_cases(1, per_patient=9, mask=False, first=1)]
    with pytest.raises(UserError, match="one patient.*data.group"):
        divide(twice)
    (fold,) = divide([*twice, *plain_cases(1, mask=False, first=2)]).folds
    assert fold == {"c0": "train", "c1": "unlabelled", "c2": "val"}
    with pytest.raises(UserError, match="no training case has a target"):
        divide(plain_cases(3, mask=False))


# ------------------------------------------------------------------------------------------------------------- files


def test_a_plan_is_checked_key_by_key(tmp_path: Path) -> None:
    plan: dict[str, Any] = {
        "version": 1,
        "folds": 0,
        "config": {
            "data": {"patch": [16, 16, 8], "batch_size": 2, "preprocess": {"spacing": [1, 1, 2.5]}},
            "model": {"features": [4, 8], "factors": [[2, 2, 1]], "kernels": [[3, 3, 1], [3, 3, 3]]},
        },
    }
    file = tmp_path / "plan.json"

    def read(change: str = "", value: Any = None) -> Any:
        table = json.loads(json.dumps(plan))
        *path, last = change.split(".")
        node = table
        for part in path:
            node = node[part]
        if last:
            node[last] = value
        file.write_text(recipe.dumps(table))
        return recipe.read(file)

    assert read()["config"]["model"]["factors"] == ((2, 2, 1),)
    assert json.loads(recipe.dumps(plan)) == plan
    for key, value, said in [
        ("config.data.ptch", [1], "did you mean 'data.patch'"),
        ("confg", {}, "unknown key 'confg'"),
        ("version", 2, "version 2"),
        ("folds", -1, "'folds'"),
        ("config.data.patch", [16, 16], "config.data.patch is"),
        ("config.data.patch", [17, 16, 8], "config.data.patch.*multiple.*nearest is \\[16, 16, 8\\]"),
        ("config.data.batch_size", 0, "config.data.batch_size is 0"),
        ("config.data.batch_size", "two", "config.data.batch_size"),
        ("config.data.preprocess.spacing", [1, -1, 1], "config.data.preprocess.spacing"),
        ("config.model.factors", [[2, 2, 3]], "config.model.factors"),
        ("config.model.factors", [[2, 2, 2], [2, 2, 2]], "config.model.factors has 2 entries"),
        ("config.model.kernels", [[3, 3, 2], [3, 3, 3]], "config.model.kernels"),
        ("config.model.features", [], "config.model.features"),
    ]:
        with pytest.raises(UserError, match=said) as caught:
            read(key, value)
        assert str(file) in str(caught.value), key
    file.write_text("{")
    with pytest.raises(UserError, match="plan.json.*not valid JSON"):
        recipe.read(file)


def load(file: Path, argument: str = "", *overrides: str) -> Any:
    options = {"model": models.options, "tasks": tasks.options}
    return config_lib.load(f"{file}:{argument}", overrides, lambda room, kind: options[room](kind))


def run_plan(*arguments: Any) -> None:
    program.main([*map(str, arguments), "--device=cpu"])


@pytest.fixture(scope="module")
def spheres(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A cohort and the folder of its plan: a narrow network, so that compiling takes seconds."""
    folder = tmp_path_factory.mktemp("plan")
    cohort = write_cohort(folder / "cohort")
    narrow = ["--config.model.features=(4,)", "--config.model.convs=1", "--config.model.decoder_convs=1"]
    # Without augmentation, which takes longest to compile.
    run_plan(cohort, "--budget=3MB", f"--out={folder / 'out'}", *narrow, "--config.augment.policy=")
    return cohort, folder / "out"


def test_a_plan_fits_its_budget_and_its_recipe_trains(
    spheres: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    cohort, out = spheres
    plan = json.loads((out / "plan.json").read_text())
    found = plan["memory"]
    assert found["needed_bytes"] <= found["budget_bytes"] == 3_000_000
    assert found["measured_on"]["platform"] == "cpu"
    assert found["measured_on"]["exact"]
    assert len(found["trials"]) <= 6
    assert plan["config"]["data"]["preprocess"] == {
        "spacing": [2.0, 2.0, 2.0], "crop": None, "normalize": {"MRI": "zscore"}
    }  # fmt: skip
    assert plan["config"]["model"]["features"][0] == 4
    assert plan["folds"] == 5
    config = load(out / "config.py", "fold=2")
    assert config.data.cohort == str(cohort)
    assert config.data.patch == tuple(plan["config"]["data"]["patch"])
    assert (config.augment.policy, config.augment.mirror) == ("", ())
    assert config.data.split.file == str(out / "split_2.csv")
    with (out / "split_2.csv").open() as file:
        assert {row["split"] for row in csv.DictReader(file)} == {"train", "val"}

    # What the training program reports for the same step is what the plan says.
    short = ["--config.train.total=2 steps", "--config.train.eval_every=2 steps", "--config.optim.warmup=1 steps"]
    train_main.main([f"--config={out / 'config.py'}", f"--workdir={tmp_path / 'run'}", *short])
    said = capsys.readouterr().out
    trial = found["trials"][-1]
    peak = re.search(r"([0-9.]+) MB a device", said)
    assert peak is not None, said
    total = sum(trial[f"{k}_bytes"] for k in ("arguments", "temporaries", "outputs"))
    assert float(peak[1]) == pytest.approx(total / 1e6, abs=0.06)
    assert (tmp_path / "run" / "eval" / "val" / "summary.json").exists()


def test_a_hand_edited_plan_is_what_runs(spheres: tuple[Path, Path], tmp_path: Path) -> None:
    _, out = spheres
    for file in out.iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    plan = json.loads((tmp_path / "plan.json").read_text())
    plan["config"]["data"]["batch_size"] = 7
    plan["config"]["data"]["preprocess"]["spacing"] = [2.0, 2.0, 3.0]
    plan["config"]["eval"] = {"overlap": 0.25}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    config = load(tmp_path / "config.py")
    assert (config.data.batch_size, config.data.preprocess.spacing) == (7, (2.0, 2.0, 3.0))
    assert config.eval.overlap == 0.25
    assert load(tmp_path / "config.py", "", "data.batch_size=3").data.batch_size == 3
    assert load(tmp_path / "config.py", "debug").train.total == "4 steps"
    with pytest.raises(UserError, match="'folds' is 5"):
        load(tmp_path / "config.py", "fold=5")
    plan["config"]["model"]["featurs"] = plan["config"]["model"].pop("features")
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UserError, match="did you mean 'model.features'"):
        load(tmp_path / "config.py")


def test_like_nnunet_compiles_nothing(spheres: tuple[Path, Path], tmp_path: Path) -> None:
    run_plan(spheres[0], "--like=nnunet", f"--out={tmp_path}")
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["memory"]["measured_on"] is None
    assert plan["memory"]["decided_by"] == "nnunet"
    # 8 cases of 21 x 20 x 20, the batch bound by the share of the data set.
    assert plan["config"]["data"]["patch"] == [24, 20, 20]
    assert plan["config"]["data"]["batch_size"] == 2
    config = load(tmp_path / "config.py")
    assert (config.augment.policy, config.augment.mirror) == ("nnunet", (0, 1, 2))


def test_the_residual_preset_takes_its_network(spheres: tuple[Path, Path], tmp_path: Path) -> None:
    run_plan(spheres[0], "--like=nnunet-resenc-l", f"--out={tmp_path}")
    config = load(tmp_path / "config.py")
    assert config.model.name == "resenc"
    stages = len(config.model.features)
    assert config.model.blocks == rules.PRESETS["nnunet-resenc-l"].blocks[:stages]


def test_a_given_patch_and_batch_stay(spheres: tuple[Path, Path], tmp_path: Path) -> None:
    narrow = ["--config.model.features=(4,)", "--config.model.convs=1", "--config.augment.policy="]
    fixed = ["--config.data.patch=(16,16,8)", "--config.data.batch_size=3"]
    run_plan(spheres[0], "--budget=1GB", f"--out={tmp_path}", *narrow, *fixed)
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert [(t["patch"], t["batch_size"]) for t in plan["memory"]["trials"]] == [([16, 16, 8], 3)]
    assert plan["config"]["data"]["batch_size"] == 3


def test_other_tasks_are_planned_beside_a_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grade from a table: its head is compiled too, and what it learns of the cases is left to training."""
    root = write_cohort(tmp_path / "cohort")
    (root / "grades.csv").write_text("id,grade\n" + "".join(f"case{i},{i % 3}\n" for i in range(8)))
    shapes: list[Any] = []
    compiled = memory.Meter.__call__

    def spy(self: memory.Meter, net: rules.Topology, batch: int) -> memory.Trial:
        shapes.append({name: task.outputs for name, task in self._job.tasks.items()})
        return compiled(self, net, batch)

    monkeypatch.setattr(memory.Meter, "__call__", spy)
    table = ["--config.data.table=grades.csv", "--config.data.targets={'organ': 'label', 'grade': 'grade'}"]
    grade = "{'type': 'classification', 'names': ('a', 'b', 'c'), 'balance': 'inverse'}"
    job = [f"--config.tasks={{'organ': {{'type': 'segmentation'}}, 'grade': {grade}}}"]
    net = ["--config.model.features=(4,)", "--config.model.convs=1", "--config.augment.policy="]
    fixed = ["--config.data.patch=(16,16,8)", "--config.data.batch_size=2"]
    run_plan(root, "--budget=1GB", f"--out={tmp_path / 'out'}", *table, *job, *net, *fixed)
    assert shapes == [{"organ": 3, "grade": 3}]
    config = load(tmp_path / "out" / "config.py")
    assert {name: task.type for name, task in config.tasks.items()} == {
        "organ": "segmentation", "grade": "classification"
    }  # fmt: skip
    assert (config.tasks.grade.balance, config.tasks.grade.class_weights) == ("inverse", ())


def test_planning_for_a_recipe_keeps_its_own_choices(spheres: tuple[Path, Path], tmp_path: Path) -> None:
    from tiny import write_recipe

    file = write_recipe(tmp_path / "mine.py", spheres[0])
    run_plan(f"--config={file}", "--like=nnunet", f"--out={tmp_path / 'out'}", "--config.data.foreground=0.9")
    config = load(tmp_path / "out" / "config.py")
    assert config.optim.ema == 0.9
    assert config.augment.mirror == (0,)
    assert config.data.split.file == "split.csv"
    assert config.data.foreground == 0.9
    assert config.data.preprocess.spacing == (2.0, 2.0, 2.0)
    assert list(config.tasks) == ["spheres"]
    assert config.model.features[0] == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budget=8"], "--budget=8: not a size"),
        ([], "--budget is missing"),
        (["--budget=1kB"], r"even the patch.*What would help: --budget=.*features.*remat.*bfloat16"),
        (["--budget=1GB", "--config.data.preprocess.spacing=(40,40,40)"], "too small to be halved"),
        (["--budget=1GB", "--config.data.preprocess.spacing=(1,1)"], "spacing"),
        (["--budget=1GB", "--config.data.patch=(17,16,16)"], r"data.patch=\(17, 16, 16\).*nearest is \(16, 16, 16\)"),
        (["--like=nnunet", "--config.data.batch_size=3"], "leave --config.data.batch_size out"),
        (["--budget=1GB", "--patch=3"], "unknown argument '--patch=3'"),
        (["--budget=1GB", "--config.data.ptch=3"], "did you mean 'data.patch'"),
    ],
)
def test_what_is_refused(spheres: tuple[Path, Path], arguments: list[str], said: str, tmp_path: Path) -> None:
    narrow = ["--config.model.features=(4,)", "--config.model.convs=1", "--config.model.decoder_convs=1"]
    with pytest.raises(UserError, match=said):
        run_plan(spheres[0], f"--out={tmp_path}", *narrow, *arguments)
    assert not (tmp_path / "plan.json").exists()


def test_a_gpu_that_is_not_there_is_not_pretended() -> None:
    device, kind, exact = memory.find_device("gpu")
    if device.platform == "gpu":
        pytest.skip("there is a GPU")
    assert (kind, exact) == ("gpu", False)
    found = memory.measured_on(device, exact)
    assert found["platform"] == "cpu"
    assert not found["exact"]
    assert "estimate" in found["note"]


# -------------------------------------------------------------------------------------------------------------- real

CARDIAC = [
    "--config.data.layout=folder",
    "--config.data.images={'MR': 'images/{patient}_{frame}.nii.gz'}",
    "--config.data.targets={'heart': 'labels/{patient}_{frame}.nii.gz'}",
    "--config.data.labels={'RV': 1, 'myocardium': 2, 'LV': 3}",
    "--config.data.group={patient}",
]
BRATS = [
    "--config.data.layout=folder",
    "--config.data.images={'t1': '{id}/t1n.nii.gz', 't1c': '{id}/t1c.nii.gz', 't2': '{id}/t2w.nii.gz', "
    "'flair': '{id}/t2f.nii.gz'}",
    "--config.data.targets={'tumour': '{id}/seg-BraTS23_1.nii.gz'}",
    "--config.data.labels={'core': 1, 'oedema': 2, 'enhancing': 3}",
]


@pytest.mark.real
@pytest.mark.parametrize(
    ("cohort", "arguments", "budget"),
    [("hippocampus", [], "40MB"), ("cardiac_acdc", CARDIAC, "80MB"), ("brats_4mod", BRATS, "150MB")],
)
def test_real_cohorts_are_planned_and_train(
    data_root: Path, tmp_path: Path, cohort: str, arguments: list[str], budget: str
) -> None:
    narrow = ["--config.model.features=(4,)", "--config.model.convs=1", "--config.model.decoder_convs=1"]
    run_plan(data_root / cohort, f"--budget={budget}", f"--out={tmp_path / 'plan'}", *arguments, *narrow)
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    data = plan["config"]["data"]
    assert plan["memory"]["needed_bytes"] <= plan["memory"]["budget_bytes"]
    if cohort == "cardiac_acdc":
        assert data["preprocess"]["spacing"] == [1.5, 1.5, 10.0]
        assert plan["config"]["model"]["kernels"][0] == [3, 3, 1]
        assert plan["config"]["model"]["factors"][0] == [2, 2, 1]
        assert any("patient074" in note and "patient076" in note for note in plan["notes"])
    if cohort == "brats_4mod":
        assert set(data["preprocess"]["normalize"].values()) == {"zscore_nonzero"}
        assert data["preprocess"]["crop"] == "nonzero"
        assert any("no validation case has a label" in note for note in plan["notes"])
    run = tmp_path / "run"
    run.mkdir()
    train.train(load(tmp_path / "plan" / "config.py", "debug"), run)
    losses = [json.loads(line).get("train/loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(loss) for loss in losses if loss is not None)
    assert any(loss is not None for loss in losses)
