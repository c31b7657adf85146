"""Readers of every layout: what they make of a folder or table, and what they refuse."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medjax import config as config_lib
from medjax import predict
from medjax.data import dataset, preprocess, readers
from medjax.data.cases import Case, Intake
from medjax.data.cohort import Finding, from_manifest, from_msd, from_nnunet, load_images, split
from medjax.data.tables import load_rows, parse_findings
from medjax.errors import UserError


def image(path: Path, seed: int = 0, shape: Sequence[int] = (4, 5, 6), affine: Any = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.random.default_rng(seed).integers(1, 1000, shape).astype(np.int16)
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return path


def touch(root: Path, *names: str) -> Path:
    """Files that are never read."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def data(cohort: Path, **keys: Any) -> Any:
    """`config.data` for a cohort."""
    config = config_lib.defaults()
    config_lib.merge(config, {"data": {"cohort": str(cohort), **keys}})
    return config.data


def opened(cohort: Path, tasks: Mapping[str, Any] | None = None, **keys: Any):
    return dataset.open_cohort(data(cohort, **keys), tasks or {})


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# --------------------------------------------------------------------------------------------------------- recognition


@pytest.mark.parametrize(
    ("files", "images", "layout"),
    [
        ({"dataset.json": {"channel_names": {"0": "T1"}}}, {}, "nnunet"),
        ({"dataset.json": {"modality": {"0": "T1"}}}, {}, "msd"),
        ({"dataset.json": {"modality": {}, "training": [{"image": "./imagesTr/a.nii.gz"}]},
          "imagesTr/a_0000.nii.gz": ""}, {}, "nnunet"),
        ({"dataset_description.json": {"Name": "x"}}, {"T1": "T1w"}, "bids"),
        ({"dataset_description.json": {"Name": "x"}}, {"T1": "{case}.nii.gz"}, "folder"),
    ],
)  # fmt: skip
def test_layouts_are_told_apart(tmp_path, files, images, layout):
    for name, content in files.items():
        write(tmp_path / name, content)
    assert readers.recognise(tmp_path, images) == layout
    if "dataset.json" in files and not images:
        assert readers.recognise(tmp_path / "dataset.json", images) == layout


def test_what_is_recognised_as_nothing_says_what_was_looked_for(tmp_path):
    touch(tmp_path, "scan.nii.gz")
    with pytest.raises(UserError, match=r"no layout recognised.*dataset\.json.*BIDS.*data\.images.*scan\.nii\.gz"):
        opened(tmp_path)
    with pytest.raises(UserError, match="neither a folder nor"):
        opened(tmp_path / "gone.csv")
    with pytest.raises(UserError, match="data.layout='nnunte' is not known"):
        opened(tmp_path, layout="nnunte")
    write(tmp_path / "dataset.json", {"name": "x"})
    with pytest.raises(UserError, match="neither channel_names"):
        opened(tmp_path)


# -------------------------------------------------------------------------------------------------------------- nnU-Net


def nnunet(root: Path, ids: Sequence[str] = ("a", "b", "c"), channels: int = 2, **changes: Any) -> Path:
    for id in ids:
        touch(root, f"labelsTr/{id}.nii.gz", *(f"imagesTr/{id}_{c:04d}.nii.gz" for c in range(channels)))
    table = {
        "channel_names": {"0": "T1", "1": "FLAIR"},
        "labels": {"background": 0, "core": 1, "rim": 2},
        "numTraining": len(ids),
        "file_ending": ".nii.gz",
    }
    write(root / "dataset.json", {k: v for k, v in (table | changes).items() if v is not None})
    return root


def test_nnunet(tmp_path):
    touch(nnunet(tmp_path), "imagesTs/t_0000.nii.gz", "imagesTs/t_0001.nii.gz", "imagesTs/u_0000.nii.gz",
          "imagesTs/u_0001.nii.gz", "labelsTs/u.nii.gz", "imagesTr/._a_0000.nii.gz")  # fmt: skip
    cohort = opened(tmp_path, {"lesion": {"type": "segmentation"}, "again": {"type": "segmentation"}})
    assert (cohort.modalities, cohort.labels, cohort.ignore, cohort.regions) == (
        ("T1", "FLAIR"), {"core": 1, "rim": 2}, None, {},
    )  # fmt: skip
    assert cohort.splits == {"train": ("a", "b", "c"), "test": ("t", "u")}
    a, u = cohort.case("a"), cohort.case("u")
    assert a.images == {"T1": tmp_path / "imagesTr/a_0000.nii.gz", "FLAIR": tmp_path / "imagesTr/a_0001.nii.gz"}
    assert a.targets == dict.fromkeys(("lesion", "again"), tmp_path / "labelsTr/a.nii.gz")
    assert u.targets["lesion"] == tmp_path / "labelsTs/u.nii.gz"
    assert not cohort.case("t").targets


def test_nnunet_regions_and_ignore(tmp_path):
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}
    cohort = from_nnunet(nnunet(tmp_path, labels=labels, regions_class_order=[1, 2, 3]))
    assert cohort.regions == {"whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)}
    assert cohort.labels == {"label_1": 1, "label_2": 2, "enhancing": 3}
    assert cohort.ignore == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"file_ending": ".nrrd"}, "file_ending '.nrrd'; medjax reads NIfTI. Convert"),
        ({"labels": {"background": 0, "a": 3, "ignore": 2}}, "'ignore' must be the highest value, above 3"),
        ({"labels": {"background": 0, "a": [1, "2"]}}, "'a' must be an integer or a list"),
        (
            {"labels": {"background": 0, "a": [1, 2]}, "regions_class_order": [1, 2]},
            "one value for each region, 1 in all",
        ),
        ({"labels": {"background": 0, "a": "x"}}, "pair integers"),
        ({"channel_names": {"0": "T1", "2": "T2"}}, "without gaps"),
        ({"channel_names": {"0": "T1"}}, "case a has a_0001.nii.gz, a channel too many"),
        ({"channel_names": {str(i): f"M{i}" for i in range(3)}}, r"case a lacks a_0002\.nii\.gz \(M2\)"),
        ({"labels": None}, "no table 'labels'"),
    ],
)
def test_bad_nnunet(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        from_nnunet(nnunet(tmp_path, **changes))


def test_nnunet_mask_missing_left_out_or_loose(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("medjax.errors._said", set())
    (nnunet(tmp_path) / "labelsTr/b.nii.gz").unlink()
    with pytest.raises(UserError, match=r"case b has no mask.*data\.exclude=\('b',\)"):
        from_nnunet(tmp_path)
    cohort = opened(tmp_path, exclude=("b",))
    assert [case.id for case in cohort.cases] == ["a", "c"]
    assert cohort.splits == {"train": ("a", "c")}
    with pytest.raises(UserError, match="data.exclude: .* has no case or patient 'x'"):
        opened(tmp_path, exclude=("b", "x"))
    intake = Intake(tolerant=True)
    assert [case.id for case in from_nnunet(tmp_path, intake=intake).cases] == ["a", "c"]
    assert [(p.severity, p.case) for p in intake.problems] == [("error", "b")]
    touch(tmp_path, "labelsTr/b.nii.gz", "labelsTr/zz.nii.gz")
    from_nnunet(tmp_path)
    assert "1 masks have no image in imagesTr (such as zz.nii.gz)" in capsys.readouterr().err


def test_nnunet_version_1_listed_files_and_equal_channel_names(tmp_path):
    one = {"modality": {"0": "MRI", "1": "MRI"}, "labels": {"0": "background", "1": "x"}, "channel_names": None,
           "training": [{"image": "./imagesTr/a.nii.gz"}]}  # fmt: skip
    cohort = opened(nnunet(tmp_path / "one", **one))
    assert (cohort.modalities, cohort.labels) == (("MRI_0", "MRI_1"), {"x": 1})
    touch(tmp_path / "two", "elsewhere/p.nii.gz", "elsewhere/q.nii.gz", "elsewhere/m.nii.gz")
    listed = {"P": {"images": ["elsewhere/p.nii.gz", "elsewhere/q.nii.gz"], "label": "elsewhere/m.nii.gz"}}
    cohort = from_nnunet(nnunet(tmp_path / "two", ids=(), dataset=listed, numTraining=1), "seg")
    assert cohort.case("P").targets["seg"] == tmp_path / "two" / "elsewhere/m.nii.gz"


def test_nnunet_splits_final(tmp_path):
    nnunet(tmp_path)
    folds = [{"train": ["a", "b"], "val": ["c"]}, {"train": ["c", "b"], "val": ["a"]}]
    write(tmp_path / "splits_final.json", folds)
    assert from_nnunet(tmp_path, fold=1).splits == {"train": ("c", "b"), "val": ("a",)}
    assert opened(tmp_path, exclude=("c",)).splits == {"train": ("a", "b"), "val": ()}
    with pytest.raises(UserError, match="has 2 folds"):
        from_nnunet(tmp_path, fold=2)
    write(tmp_path / "splits_final.json", [{"train": ["a", "bb"], "val": ["c"]}])
    with pytest.raises(UserError, match="names 'bb', and there is no such training case"):
        from_nnunet(tmp_path)


def test_nnunet_channels_are_stacked_in_order(tmp_path):
    nnunet(tmp_path, ids=("a",))
    for c in range(2):
        image(tmp_path / f"imagesTr/a_{c:04d}.nii.gz", c)
    cohort = opened(tmp_path, modalities=("FLAIR", "T1"))
    stacked = load_images(cohort.cases[0], cohort.modalities).data
    for index, c in enumerate((1, 0)):
        expected = np.asanyarray(nib.load(tmp_path / f"imagesTr/a_{c:04d}.nii.gz").dataobj)
        np.testing.assert_array_equal(stacked[..., index], expected)
    with pytest.raises(UserError, match="must name each modality once: T1, FLAIR"):
        opened(tmp_path, modalities=("T1",))
    with pytest.raises(UserError, match="data.labels: a folder with dataset.json names its own labels"):
        opened(tmp_path, labels={"x": 1})


@pytest.mark.parametrize("layout", ["msd", "nnunet"])
def test_prediction_gives_a_reordered_network_the_channels_it_was_trained_with(tmp_path, layout):
    root = tmp_path / "cohort"
    if layout == "msd":
        image(root / "imagesTr/a.nii.gz", shape=(4, 5, 6, 2))
        table = {"modality": {"0": "T1", "1": "FLAIR"}, "labels": {"0": "background", "1": "core"}}
        write(root / "dataset.json", table | {"training": ["./imagesTr/a.nii.gz"]})
    else:
        nnunet(root, ids=("a",))
        for c in range(2):
            image(root / f"imagesTr/a_{c:04d}.nii.gz", c)
    for modalities, numbered in ((("FLAIR", "T1"), ("T1", "FLAIR")), (("T1", "FLAIR"), ())):
        cohort = opened(root, modalities=modalities)
        trained = load_images(cohort.cases[0], cohort.modalities).data
        plan = preprocess.fit({}, cohort, cohort.cases)
        assert (plan.modalities, plan.numbered) == (modalities, numbered)
        plan = preprocess.Plan.from_json(plan.to_json())
        found, refused = predict.find_inputs(root / "imagesTr", plan.channels)
        assert refused == {}
        read = load_images(Case("a", "a", found["a"]), plan.modalities).data
        np.testing.assert_array_equal(read, trained)
        assert (read[..., 0] != read[..., 1]).any()


def test_several_modalities_in_one_file_need_their_order(tmp_path):
    table = write(tmp_path / "m.csv", "id,scan\na,a.nii.gz\n")
    file = image(tmp_path / "a.nii.gz", shape=(4, 5, 6, 2))
    with pytest.raises(UserError, match=r"data.modalities is empty, and .*a.nii.gz holds CT, PET as its channels"):
        opened(table, images={"PET": "scan", "CT": "scan"})
    cohort = opened(table, images={"PET": "scan", "CT": "scan"}, modalities=("PET", "CT"))
    stacked = load_images(cohort.cases[0], ("CT", "PET")).data
    np.testing.assert_array_equal(stacked, np.asarray(nib.load(file).dataobj)[..., ::-1])


# ------------------------------------------------------------------------------------------------------------ Decathlon


def test_a_decathlon_mask_reaches_every_segmentation_task_and_a_table_adds_the_rest(tmp_path):
    names = ("p1_a", "p1_b", "p2_a")
    touch(tmp_path, *(f"{kind}/{n}.nii.gz" for n in names for kind in ("im", "lab")))
    write(tmp_path / "dataset.json", {
        "modality": {"0": "CT"}, "labels": {"0": "background", "1": "organ"},
        "training": [{"image": f"im/{n}.nii.gz", "label": f"lab/{n}.nii.gz"} for n in names],
    })  # fmt: skip
    write(tmp_path / "grades.csv", "patient,grade,sex,x\np1,high,M,1\np2,low,F,\n")
    tasks = {"b_organ": {"type": "segmentation"}, "a_grade": {"type": "classification"}, "boxes": {"type": "detection"}}
    cohort = opened(tmp_path, tasks, group="(p\\d)", table="grades.csv", classes={"a_grade": ("low", "high")},
                    targets={"a_grade": "grade", "boxes": "label", "both": ("x", "x")})  # fmt: skip
    first, last = cohort.cases[0], cohort.cases[2]
    mask = tmp_path / "lab/p1_a.nii.gz"
    assert first.targets == {"b_organ": mask, "boxes": mask, "a_grade": 1, "both": (1.0, 1.0)}
    assert (first.group, first.attributes) == ("p1", {"patient": "p1", "grade": "high", "sex": "M", "x": "1"})
    assert (last.targets["a_grade"], "both" in last.targets) == (0, False)
    assert cohort.classes["a_grade"] == ("low", "high")
    with pytest.raises(UserError, match="names a column, but there is no table. Set data.table"):
        opened(tmp_path, tasks, targets={"a_grade": "grade"})
    with pytest.raises(UserError, match="this layout has no fields"):
        opened(tmp_path, tasks, group="{patient}")
    with pytest.raises(UserError, match="is no regular expression"):
        opened(tmp_path, tasks, group="(p")
    assert {c.id: c.group for c in from_msd(tmp_path, group="(p\\d{1})").cases}["p2_a"] == "p2"


# --------------------------------------------------------------------------------------------------------------- folder


def heart(root: Path) -> Path:
    for p in ("p01", "p02"):
        for f in ("ed", "es"):
            touch(root, f"images/{p}_{f}.nii.gz", f"labels/{p}_{f}.nii.gz")
    write(root / "patients.csv", "patient,group,age\np01,DCM,50\np02,NOR,\n")
    return root


HEART: dict[str, Any] = {
    "images": {"MR": "images/{patient}_{frame}.nii.gz"},
    "targets": {"heart": "labels/{patient}_{frame}.nii.gz", "diagnosis": "group", "age": "age"},
    "table": "patients.csv",
    "classes": {"diagnosis": ("NOR", "DCM")},
    "labels": {"lv": 1},
}


def test_folder_with_patterns_and_a_table(tmp_path):
    cohort = opened(heart(tmp_path), group="{patient}", **HEART)
    assert [case.id for case in cohort.cases] == ["p01_ed", "p01_es", "p02_ed", "p02_es"]
    first, last = cohort.cases[0], cohort.cases[3]
    assert first.images == {"MR": tmp_path / "images/p01_ed.nii.gz"}
    assert first.targets == {"heart": tmp_path / "labels/p01_ed.nii.gz", "diagnosis": 1, "age": 50}
    assert first.attributes == {"patient": "p01", "frame": "ed", "group": "DCM", "age": "50"}
    assert last.targets == {"heart": tmp_path / "labels/p02_es.nii.gz", "diagnosis": 0}
    assert [case.group for case in cohort.cases] == ["p01", "p01", "p02", "p02"]
    assert cohort.classes == {"diagnosis": ("NOR", "DCM")}
    parts = split(cohort, {"folds": 2, "fold": 0, "stratify": "group"}, check_content=False)
    assert {len(p) for p in parts.values()} == {2}


def test_a_label_value_has_one_name(tmp_path):
    heart(tmp_path)
    with pytest.raises(UserError, match="labels 'x' and 'y' both have the value 1; a value has one name"):
        opened(tmp_path, **HEART | {"labels": {"x": 1, "z": 2, "y": 1}})
    assert opened(tmp_path, **HEART | {"labels": {"out": 0, "unclear": 0, "x": 1}}).cases
    # Regions may overlap, and be the same.
    labels = {"background": 0, "whole": [1, 2], "core": [2], "kernel": [2]}
    cohort = from_nnunet(nnunet(tmp_path / "nnunet", labels=labels, regions_class_order=[1, 2, 2]))
    assert cohort.regions == {"whole": (1, 2), "core": (2,), "kernel": (2,)}


def test_ids_and_patients_of_a_folder(tmp_path):
    heart(tmp_path)
    # Without a word about patients, a field of that name still keeps a patient's images together.
    assert {c.group for c in opened(tmp_path, **HEART).cases} == {"p01", "p02"}
    assert {c.group for c in opened(tmp_path, group="_(e.)$", **HEART).cases} == {"ed", "es"}
    assert {c.group for c in opened(tmp_path, group="group", **HEART).cases} == {"DCM", "NOR"}
    assert {c.group for c in opened(tmp_path, group="patient", **HEART).cases} == {"p01", "p02"}
    assert opened(tmp_path, id="{frame} of {patient}", **HEART).cases[0].id == "ed of p01"
    with pytest.raises(UserError, match="data.group='{patent}': no field 'patent'; did you mean 'patient'"):
        opened(tmp_path, group="{patent}", **HEART)
    with pytest.raises(UserError, match="'p01' appears more than once"):
        opened(tmp_path, id="{patient}", **HEART)
    left = opened(tmp_path, exclude=("p01",), **HEART)
    assert [c.id for c in left.cases] == ["p02_ed", "p02_es"]
    write(tmp_path / "split.csv", "id,split\np01_ed,train\np01_es,train\np02_ed,train\np02_es,train\n")
    assert split(left, {"file": "split.csv"}, check_content=False)["train"] == left.cases


def test_patterns(tmp_path):
    touch(
        tmp_path, "sub/a/a_t1.nii.gz", "sub/a/a_2019_seg.nii.gz", "sub/b/b_t1.nii.gz", "sub/b/x_t1.nii.gz", "t1.nii.gz"
    )
    cohort = opened(
        tmp_path, images={"T1": "sub/{case}/{case}_t1.nii.gz"}, targets={"s": "sub/{case}/{case}_*_seg.nii.gz"}
    )
    assert {c.id: sorted(c.targets) for c in cohort.cases} == {"a": ["s"], "b": []}
    touch(tmp_path, "sub/a/a_2020_seg.nii.gz")
    with pytest.raises(UserError, match=r"a_2020_seg\.nii\.gz.*finds this and .*a_2019_seg\.nii\.gz for one case"):
        opened(tmp_path, images={"T1": "sub/{case}/{case}_t1.nii.gz"}, targets={"s": "sub/{case}/*_seg.nii.gz"})


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"images": {"T1": "images/{a}{b}.nii.gz"}}, "put some text between two fields"),
        ({"images": {"T1": "/images/{a}.nii.gz"}}, "lies below the cohort's folder"),
        ({"images": {"T1": "images/{a}.png"}}, "ends as its files do"),
        ({"images": {"T1": "images/{a b}.nii.gz"}}, "no layout recognised"),
        ({"images": {"T1": "images/{a}_{b}.nii.gz", "T2": "images/{a}_ed.nii.gz"}}, "needs the same fields"),
        ({"images": {"T1": "imgs/{a}.nii.gz"}}, r"finds no file\. There are: images/p01_ed\.nii\.gz"),
        ({"images": {"T1": "images/{a}_ed.nii.gz"}, "targets": {"s": "{f}.nii.gz"}}, "no image has the field 'f'"),
        ({"images": {"T1": "images/{a}.nii.gz"}, "targets": {"s": "grade"}}, "there is no table"),
        ({"images": {"T1": "images/{a}.nii.gz"}, "table": "patients.csv"}, "none of its rows belongs to a case"),
        ({"images": {"T1": "images/{patient}_{f}.nii.gz"}, "table": "twice.csv"}, "p01 .* is listed twice"),
        ({"images": {"T1": "images/{patient}_{f}.nii.gz"}, "table": "none.csv"}, "no such file"),
        ({"images": {"T1": "images/{q}_{f}.nii.gz"}, "table": "odd.csv"}, "no column tells whose row it is"),
        (HEART | {"classes": {"diagnosis": ("NOR", "DCN")}}, "'DCM' is no class of task .* did you mean 'DCN'"),
        (HEART | {"classes": {}}, r"data\.classes=\{'diagnosis': \('DCM', 'NOR',\)\}"),
        (HEART | {"classes": {"diagnoses": ("a",)}}, "unknown key 'diagnoses'; did you mean 'diagnosis'"),
        (HEART | {"targets": {"v": ("age", "group")}, "classes": {}}, "'DCM' .* is no number; a vector holds numbers"),
        (HEART | {"targets": {"v": ("age", "agee")}, "classes": {}}, "no column 'agee'; did you mean 'age'"),
    ],
)  # fmt: skip
def test_bad_folder(tmp_path, keys, words):
    heart(tmp_path)
    write(tmp_path / "twice.csv", "patient,x\np01,1\np01,2\n")
    write(tmp_path / "odd.csv", "who,x\np01,1\n")
    with pytest.raises(UserError, match=words):
        opened(tmp_path, **keys)


def test_a_file_is_an_image_or_a_mask(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("medjax.errors._said", set())
    touch(tmp_path, *(f"{name}.nii.gz" for name in ("a", "a_seg", "b", "b_seg", "c", "d_seg", "b_2_seg")))
    keys = {"images": {"CT": "{case}.nii.gz"}, "targets": {"organ": "{case}_seg.nii.gz"}}
    cohort = opened(tmp_path, **keys)
    assert {c.id: (c.images["CT"].name, [f.name for f in c.targets.values()]) for c in cohort.cases} == {
        "a": ("a.nii.gz", ["a_seg.nii.gz"]), "b": ("b.nii.gz", ["b_seg.nii.gz"]), "c": ("c.nii.gz", []),
    }  # fmt: skip
    said = capsys.readouterr().err
    assert "4 files that data.images.CT='{case}.nii.gz' finds are masks of task 'organ' and no images" in said
    assert f"(such as {tmp_path}/a_seg.nii.gz)" in said
    assert "2 masks of task 'organ' belong to no image" in said
    # The other way round: it is the masks' pattern that finds the images too.
    touch(tmp_path / "flat", "a_ct.nii.gz", "a.nii.gz", "b_ct.nii.gz", "a_ct_ct.nii.gz")
    keys = {"images": {"CT": "{case}_ct.nii.gz"}, "targets": {"organ": "{case}.nii.gz"}}
    cohort = opened(tmp_path / "flat", **keys)
    assert {c.id: (c.images["CT"].name, [f.name for f in c.targets.values()]) for c in cohort.cases} == {
        "a": ("a_ct.nii.gz", ["a.nii.gz"]), "a_ct": ("a_ct_ct.nii.gz", []), "b": ("b_ct.nii.gz", []),
    }  # fmt: skip
    assert not capsys.readouterr().err


@pytest.mark.parametrize("mask", ["{case}.nii.gz", "{case}_ct.nii.gz"])
def test_no_image_or_no_mask_is_left(tmp_path, mask):
    touch(tmp_path, "a_ct.nii.gz", "b_ct.nii.gz")
    key = "data.images.CT" if "_ct" in mask else "data.targets.organ"
    with pytest.raises(UserError, match=rf"all files of {key}=.* \(such as a_ct.nii.gz\) are .* an image or a mask"):
        opened(tmp_path, images={"CT": "{case}_ct.nii.gz"}, targets={"organ": mask})


def test_an_incomplete_case_is_refused_left_out_or_allowed(tmp_path):
    touch(tmp_path, "a/t1.nii.gz", "a/t2.nii.gz", "b/t1.nii.gz")
    keys: dict[str, Any] = {"images": {"T1": "{case}/t1.nii.gz", "T2": "{case}/t2.nii.gz"}}
    with pytest.raises(UserError, match=r"case b lacks modality T2 .*data\.exclude=\('b',\)"):
        opened(tmp_path, **keys)
    assert [c.id for c in opened(tmp_path, exclude=("b",), **keys).cases] == ["a"]
    both = opened(tmp_path, preprocess={"missing": "zero"}, **keys)
    assert [sorted(c.images) for c in both.cases] == [["T1", "T2"], ["T1"]]


def test_identical_images_across_a_folders_split_are_refused(tmp_path):
    for name, seed in (("p1", 1), ("p2", 2), ("p3", 1)):
        image(tmp_path / f"{name}.nii.gz", seed)
    config = data(tmp_path, images={"T1": "{case}.nii.gz"}, split={"file": "split.csv"})
    write(tmp_path / "split.csv", "id,split\np1,train\np2,train\np3,val\n")
    cohort = dataset.open_cohort(config, {})
    with pytest.raises(UserError, match=r"p3\.nii\.gz .*p1\.nii\.gz .* hold identical voxels"):
        dataset.open_splits(cohort, config, 0)


# ----------------------------------------------------------------------------------------------------------------- BIDS


def bids(root: Path) -> Path:
    write(root / "dataset_description.json", {"Name": "Toy", "BIDSVersion": "1.9.0"})
    write(root / "participants.tsv", "participant_id\tsex\tage\tgrade\nsub-01\tF\t41\tn/a\nsub-02\tM\tn/a\thigh\n")
    touch(root, "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz", "sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz",
          "sub-02/ses-1/anat/sub-02_ses-1_T1w.nii.gz", "sub-02/ses-1/anat/sub-02_ses-1_T1w.json",
          "sub-02/ses-1/anat/sub-02_ses-1_acq-fast_FLAIR.nii.gz", "sub-02/ses-1/dwi/sub-02_ses-1_dwi.nii.gz",
          "derivatives/lesions/sub-01/ses-1/anat/sub-01_ses-1_space-orig_desc-lesion_mask.nii.gz",
          "derivatives/lesions/sub-02/ses-1/anat/sub-02_ses-1_desc-lesion_mask.nii.gz",
          "derivatives/lesions/sub-02/ses-1/anat/sub-02_ses-1_dseg.nii.gz",
          "derivatives/prep/sub-01/ses-1/anat/sub-01_ses-1_desc-preproc_T1w.nii.gz")  # fmt: skip
    return root


def test_bids(tmp_path):
    cohort = opened(bids(tmp_path), images={"T1": "T1w"}, labels={"lesion": 1},
                    targets={"lesion": "desc-lesion_mask", "age": "age", "grade": "grade"},
                    classes={"grade": ("low", "high")})  # fmt: skip
    assert (cohort.name, [(c.id, c.group) for c in cohort.cases]) == (
        "Toy", [("sub-01_ses-1", "sub-01"), ("sub-01_ses-2", "sub-01"), ("sub-02_ses-1", "sub-02")],
    )  # fmt: skip
    first, second, third = cohort.cases
    assert first.images["T1"] == tmp_path / "sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz"
    assert first.targets["lesion"].name == "sub-01_ses-1_space-orig_desc-lesion_mask.nii.gz"
    assert second.targets == {"age": 41}
    lesions = tmp_path / "derivatives/lesions/sub-02/ses-1/anat"
    assert third.targets == {"lesion": lesions / "sub-02_ses-1_desc-lesion_mask.nii.gz", "grade": 1}
    assert third.attributes == {"participant_id": "sub-02", "sub": "02", "ses": "1", "sex": "M", "grade": "high"}
    derived = opened(tmp_path, images={"T1": "derivatives/prep/desc-preproc_T1w"}, exclude=())
    assert [c.id for c in derived.cases] == ["sub-01_ses-1"]
    left = opened(tmp_path, images={"T1": "T1w"}, exclude=("sub-01",))
    assert [c.id for c in left.cases] == ["sub-02_ses-1"]


def test_a_bids_mask_of_another_session_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("medjax.errors._said", set())
    keys = {"images": {"T1": "T1w"}, "targets": {"lesion": "desc-lesion_mask"}}
    opened(bids(tmp_path), **keys)
    assert "belong to no image" not in capsys.readouterr().err
    name = "derivatives/lesions/sub-01/anat/sub-01_desc-lesion_mask.nii.gz"
    touch(tmp_path, name, "derivatives/lesions/sub-09/ses-1/anat/sub-09_ses-1_desc-lesion_mask.nii.gz")
    assert len(opened(tmp_path, exclude=("sub-02",), **keys).cases) == 2
    words = f"2 masks of task 'lesion' belong to no image (such as {tmp_path / name})"
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, r"name the modalities.* Its images are: FLAIR \(1\), T1w \(3\), dwi \(1\)"),
        ({"images": {"T2": "T2w"}}, "data.images.T2='T2w' finds no file"),
        ({"images": {"T1": "T1w", "FLAIR": "FLAIR"}}, "case sub-01_ses-1 lacks modality FLAIR"),
        ({"images": {"T1": "high_T1w"}}, "'high' is no BIDS entity"),
        ({"images": {"T1": "T1w"}, "targets": {"s": "desc-lesoin_mask"}},
         "neither a column .* There are|In derivatives/ there are: .*desc-lesion_mask"),
        ({"images": {"T1": "T1w"}, "targets": {"s": "agee"}}, "did you mean 'age'"),
    ],
)  # fmt: skip
def test_bad_bids(tmp_path, keys, words):
    with pytest.raises(UserError, match=words):
        opened(bids(tmp_path), layout="bids", **keys)


def test_two_bids_files_for_one_case_are_not_chosen_between(tmp_path):
    touch(bids(tmp_path), "sub-02/ses-1/anat/sub-02_ses-1_run-2_T1w.nii.gz")
    with pytest.raises(UserError, match="finds this and .* for one case. Add the entity"):
        opened(tmp_path, images={"T1": "T1w"})
    assert [c.id for c in opened(tmp_path, images={"T1": "run-2_T1w"}).cases] == ["sub-02_ses-1"]


# ------------------------------------------------------------------------------------------- targets beyond masks


def manifest(folder: Path, columns: str, *cells: str) -> Path:
    lines = [f"{i},a.nii.gz,{cell}" for i, cell in enumerate(cells)]
    touch(folder, "a.nii.gz")
    return write(folder / "cases.csv", f"id,t1,{columns}\n" + "\n".join(lines) + "\n")


def test_findings_in_a_cell(tmp_path):
    cell = (
        '"[{""center"": [1, -2, 3.5], ""diameter"": 8, ""label"": 2, ""malignancy"": 4}, '
        '{""box"": [0, 0, 0, 2, 4, 6]}]"'
    )
    path = manifest(tmp_path, "nodules", cell, "[]", "")
    cohort = from_manifest(path, {"T1": "t1"}, {"nodules": "nodules"})
    assert cohort.cases[0].targets["nodules"] == (
        Finding((1, -2, 3.5), (8, 8, 8), 2, {"malignancy": 4}), Finding((1, 2, 3), (2, 4, 6)),
    )  # fmt: skip
    # Looked and found none is not the same as unknown.
    assert cohort.cases[1].targets == {"nodules": ()}
    assert cohort.cases[2].targets == {}
    lps = from_manifest(path, {"T1": "t1"}, {"nodules": "nodules"}, findings={"coordinates": "LPS"})
    assert [f.center for f in lps.cases[0].targets["nodules"]] == [(-1, 2, 3.5), (-1, -2, 3)]
    assert [f.size for f in lps.cases[0].targets["nodules"]] == [(8, 8, 8), (2, 4, 6)]


def test_json_manifest_holds_lists_as_they_are(tmp_path):
    touch(tmp_path, "a.nii.gz")
    path = write(tmp_path / "cases.json", [
        {"id": 1, "t1": "a.nii.gz", "marks": [{"center": [1, 2, 3], "label": "apex"}], "scores": [1, None, 0.5]},
        {"id": 2, "t1": "a.nii.gz", "marks": []},
    ])  # fmt: skip
    keys = {"targets": {"marks": "marks", "scores": "scores"}, "classes": {"marks": ("base", "apex")}}
    one, two = from_manifest(path, {"T1": "t1"}, **keys).cases
    assert one.targets["marks"] == (Finding((1, 2, 3), (0, 0, 0), 2),)
    assert one.targets["scores"][::2] == (1.0, 0.5)
    assert math.isnan(one.targets["scores"][1])
    assert two.targets == {"marks": ()}


def test_vector_from_columns(tmp_path):
    path = manifest(tmp_path, "x,y,z", "1,,0.5", ",,", "0,1,1")
    cohort = from_manifest(path, {"T1": "t1"}, {"v": ("x", "y", "z")})
    assert cohort.classes == {"v": ("x", "y", "z")}
    first, second, third = (case.targets for case in cohort.cases)
    assert (first["v"][0], math.isnan(first["v"][1]), first["v"][2]) == (1.0, True, 0.5)
    assert (second, third) == ({}, {"v": (0.0, 1.0, 1.0)})
    assert cohort.cases[2].attributes["y"] == "1"


def test_table_of_findings(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("medjax.errors._said", set())
    # LUNA16's own columns, which are LPS.
    write(tmp_path / "annotations.csv", "seriesuid,coordX,coordY,coordZ,diameter_mm\n0,-128.7,-175.3,-298.4,5.65\n"
          "0,103.8,-211.9,-227.1,4.22\n1,,,,\n")  # fmt: skip
    path = manifest(tmp_path, "site", "x", "x", "x")
    keys: dict[str, Any] = {"images": {"T1": "t1"}, "targets": {"nodules": "annotations.csv"}}
    options = {"id": "seriesuid", "coordinates": "LPS"}
    cohort = opened(path, findings=options, **keys)
    first = cohort.cases[0].targets["nodules"]
    assert first[0] == Finding((128.7, 175.3, -298.4), (5.65, 5.65, 5.65))
    assert (len(first), cohort.cases[1].targets, cohort.cases[2].targets) == (2, {"nodules": ()}, {})
    assert "1 cases (such as '2') have no row" in capsys.readouterr().err
    every = opened(path, findings={**options, "unlisted": "none"}, **keys)
    assert every.cases[2].targets == {"nodules": ()}
    write(tmp_path / "annotations.csv", "id,x,y,z,dx,dy,dz,label,score\n0,1,2,3,4,5,6,2,0.5\n")
    assert opened(path, **keys).cases[0].targets["nodules"] == (Finding((1, 2, 3), (4, 5, 6), 2, {"score": 0.5}),)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id,x,y\n0,1,2\n", "no column 'z'"),
        ("id,x,y,z\n0,1,2,\n", r"line 2: '' \(column 'z'\) must be a finite number"),
        ("id,x,y,z,diameter\n0,1,2,3,-4\n", "negative"),
        ("id,x,y,z,dx\n0,1,2,3,4\n", "dx, dy and dz, or diameter"),
        ("id,x,y,z,label\n0,1,2,3,0\n", "label '0' must be an integer from 1 on"),
        ("id,x,y,z\n,1,2,3\n", "line 2: the id"),
        ("id,x,y,z\nother,1,2,3\n", "none of its ids is a case"),
    ],
)
def test_bad_table_of_findings(tmp_path, text, words):
    write(tmp_path / "marks.csv", text)
    with pytest.raises(UserError, match=words):
        from_manifest(manifest(tmp_path, "x", ""), {"T1": "t1"}, {"marks": "marks.csv"})


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({}, "give either 'box', or 'center'"),
        ({"center": [1, 2, 3], "box": [0] * 6}, "give either 'box', or 'center'"),
        ({"center": [1, 2]}, "'center' must be 3 finite numbers"),
        ({"center": [1, 2, math.nan]}, "'center' must be 3 finite numbers"),
        ({"center": [1, 2, 3], "size": [1, 1, 1], "diameter": 2}, "give either 'box'"),
        ({"box": [3, 0, 0, 1, 1, 1]}, "lower corner"),
        ({"center": [1, 2, 3], "label": "x"}, "label 'x' must be an integer"),
        ({"center": [1, 2, 3], "texture": "solid"}, "texture='solid' is no number"),
    ],
)
def test_bad_findings(entry, words):
    with pytest.raises(UserError, match=words):
        parse_findings("here", [{"center": [0, 0, 0]}, entry] if "size" not in entry else [entry])


@pytest.mark.parametrize(
    ("cell", "words"),
    [('"[{""center"": 1"', "not valid JSON"), ('"[[1, 2]]"', "must be a JSON list of findings")],
)
def test_bad_list_in_a_cell(tmp_path, cell, words):
    with pytest.raises(UserError, match=f"line 2: .*{words}"):
        from_manifest(manifest(tmp_path, "y", cell), {"T1": "t1"}, {"y": "y"})


@pytest.mark.parametrize("key", ["coordinates", "unlisted", "cordinates"])
def test_bad_findings_options(tmp_path, key):
    with pytest.raises(UserError, match=f"data.findings.*{key}"):
        from_manifest(manifest(tmp_path, "y", ""), {"T1": "t1"}, {"y": "y"}, findings={key: "x"})


def test_a_tolerant_reader_tells_everything_and_keeps_what_is_good(tmp_path):
    touch(tmp_path, "a.nii.gz")
    path = write(tmp_path / "cases.csv", "id,t1,y,m\na,a.nii.gz,1,a.nii.gz\nb,gone.nii.gz,1,\nc,,1,\nd,a.nii.gz,x,\n"
                 "e,a.nii.gz,1,gone_mask.nii.gz\n,a.nii.gz,1,\n")  # fmt: skip
    intake = Intake(tolerant=True)
    cohort = from_manifest(path, {"T1": "t1"}, {"y": "y", "m": "m"}, intake=intake)
    assert {case.id: set(case.targets) for case in cohort.cases} == {"a": {"y", "m"}, "d": set(), "e": {"y"}}
    said = " ".join(problem.message for problem in intake.problems)
    for words in ("gone.nii.gz", "case c lacks modality T1", "'x' (column 'y'", "gone_mask.nii.gz", "the id (column"):
        assert words in said
    assert {problem.case for problem in intake.problems} == {"b", "c", "d", "e", ""}


def test_findings_beside_a_missing_file(tmp_path):
    cell = '"[{""center"": [1, 2, 3], ""texture"": 5}]"'
    touch(tmp_path, "a.nii.gz")
    path = write(tmp_path / "cases.csv", f"id,t1,y\na,a.nii.gz,{cell}\nb,gone.nii.gz,{cell}\n")
    intake = Intake(tolerant=True)
    cohort = from_manifest(path, {"T1": "t1"}, {"y": "y"}, intake=intake)
    assert [(case.id, len(case.targets["y"])) for case in cohort.cases] == [("a", 1)]
    assert [problem.case for problem in intake.problems] == ["b"]


def test_cases_used_without_a_target_are_not_among_the_skipped(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("medjax.errors._said", set())
    for seed, name in enumerate("abcd"):
        image(tmp_path / f"{name}.nii.gz", seed)
    image(tmp_path / "a_mask.nii.gz")
    write(tmp_path / "cases.csv", "id,t1,m\na,a.nii.gz,a_mask.nii.gz\nb,b.nii.gz,b_mask.nii.gz\nc,c.nii.gz,\n"
          "d,gone.nii.gz,\n")  # fmt: skip
    keys = {"images": {"T1": "t1"}, "targets": {"m": "m"}, "skip_unreadable": True}
    cohort = opened(tmp_path / "cases.csv", **keys)
    assert {case.id: set(case.targets) for case in cohort.cases} == {"a": {"m"}, "b": set(), "c": set()}
    assert ([problem.case for problem in cohort.skipped], cohort.left_out) == (["d"], {"d"})
    said = capsys.readouterr().err
    assert "used without a target that should be there:\n  b: " in said
    assert "b_mask.nii.gz: no such file" in said
    write(tmp_path / "split.csv", "id,split\na,train\nb,train\nc,val\nd,val\n")
    parts = split(cohort, {"file": "split.csv"}, check_content=False)
    assert {name: [case.id for case in cases] for name, cases in parts.items()} == {"train": ["a", "b"], "val": ["c"]}


def test_what_two_files_claim_is_nobodys(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("medjax.errors._said", set())
    files = ("s1_t1", "s2_t1", "s3_t1", "s1_A_seg", "s1_B_seg", "s2_A_seg", "s9_A_seg", "s9_B_seg")
    for seed, name in enumerate(files):
        image(tmp_path / f"{name}.nii.gz", seed)
    keys = {"images": {"T1": "{case}_t1.nii.gz"}, "targets": {"seg": "{case}_*_seg.nii.gz"}, "id": "case-{case}"}
    with pytest.raises(UserError, match=r"s1_B_seg\.nii\.gz.*finds this and .*s1_A_seg\.nii\.gz for one case \(s1\)"):
        opened(tmp_path, **keys)
    # Who is left out on purpose may have what they like.
    assert {c.id for c in opened(tmp_path, exclude=("case-s1",), **keys).cases} == {"case-s2", "case-s3"}
    assert "1 masks of task 'seg' belong to no image" in capsys.readouterr().err  # of s9
    lenient = opened(tmp_path, skip_unreadable=True, **keys)
    assert {c.id: len(c.targets) for c in lenient.cases} == {"case-s1": 0, "case-s2": 1, "case-s3": 0}
    assert (lenient.skipped, lenient.left_out) == ((), frozenset())
    assert "without a target that should be there:\n  case-s1: " in capsys.readouterr().err
    # Of two images neither is the case's.
    names = ("more/p_1_t1", "more/p_2_t1", "more/q_1_t1")
    p1, p2, _ = (image(tmp_path / f"{name}.nii.gz", 10 + seed) for seed, name in enumerate(names))
    lenient = opened(tmp_path, skip_unreadable=True, images={"T1": "more/{case}_*_t1.nii.gz"})
    assert ([c.id for c in lenient.cases], lenient.left_out) == (["q"], {"p"})
    ((said, case),) = ((problem.message, problem.case) for problem in lenient.skipped)
    assert case == "p"
    assert said.startswith(f"{p2}: ")
    assert f"finds this and {p1} for one case" in said


def test_two_bids_files_are_nobodys(tmp_path):
    touch(bids(tmp_path), "sub-02/ses-1/anat/sub-02_ses-1_run-2_T1w.nii.gz",
          "derivatives/other/sub-01/ses-1/anat/sub-01_ses-1_desc-lesion_mask.nii.gz")  # fmt: skip
    intake = Intake(tolerant=True)
    cohort = readers.from_bids(tmp_path, {"T1": "T1w"}, {"lesion": "desc-lesion_mask"}, {"lesion": 1}, intake=intake)
    assert {case.id: len(case.targets) for case in cohort.cases} == {"sub-01_ses-1": 0, "sub-01_ses-2": 0}
    assert {problem.case for problem in intake.problems if problem.severity == "error"} == {
        "sub-01_ses-1",
        "sub-02_ses-1",
    }
    assert cohort.left_out == {"sub-02_ses-1"}


def test_rows_keep_json_lists(tmp_path):
    path = write(tmp_path / "x.json", [{"a": [1, 2], "b": None, "c": {"d": 1}, "e": 2.5}])
    assert load_rows(path)[0][1] == {"a": "[1, 2]", "b": "", "c": '{"d": 1}', "e": "2.5"}


# ----------------------------------------------------------------------------------------------------------- real data


@pytest.mark.real
def test_cardiac_folder(data_root):
    keys: dict[str, Any] = {
        **HEART,
        "group": "{patient}",
        "labels": {"RV": 1, "myocardium": 2, "LV": 3},
        "targets": {"heart": "labels/{patient}_{frame}.nii.gz", "diagnosis": "group"},
        "classes": {"diagnosis": ("NOR", "DCM", "HCM", "MINF", "RV")},
    }
    cohort = opened(data_root / "cardiac_acdc", **keys)
    assert (len(cohort.cases), len({c.group for c in cohort.cases})) == (64, 32)
    assert cohort.case("patient021_frame02").targets["diagnosis"] == 2
    assert cohort.case("patient076_frame01").attributes["note"].startswith("same image as patient074")
    left = opened(data_root / "cardiac_acdc", exclude=("patient076",), **keys)
    assert len(left.cases) == 62


@pytest.mark.real
def test_lung_and_brain_folders(data_root):
    lung = opened(data_root / "lung_nodules", images={"CT": "images/{name}.nii.gz"}, labels={"nodule": 1},
                  targets={"nodule": "masks/{name}.nii.gz", "ratings": ("malignancy", "texture")},
                  table="attributes.csv")  # fmt: skip
    assert len(lung.cases) == 101
    assert lung.case("103_nod1_ann0").targets["ratings"] == (5.0, 4.0)
    assert all(len(c.targets["ratings"]) == 2 and c.targets["nodule"].exists() for c in lung.cases)
    names = {"T1": "t1n", "T1c": "t1c", "T2": "t2w", "FLAIR": "t2f"}
    brain = opened(data_root / "brats_4mod", images={m: f"{{case}}/{f}.nii.gz" for m, f in names.items()},
                   targets={"tumour": "{case}/seg-BraTS23_1.nii.gz"}, modalities=tuple(names))  # fmt: skip
    assert brain.modalities == tuple(names)
    assert {c.id: set(c.targets) for c in brain.cases} == {
        "BraTS-GLI-00001-000": {"tumour"},
        "BraTS-MET-00110-000": set(),
    }
