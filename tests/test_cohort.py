"""Cohorts and splits: what is refused, and that no split leaks."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medjax.data import cohort as cohorts
from medjax.data.cohort import Case, Cohort, content_hash, from_manifest, from_msd, load_images, split
from medjax.data.tables import load_rows
from medjax.errors import UserError


def save(path: Path, seed: int = 0, shape=(4, 5, 6), affine=None, dtype=np.int16) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.random.default_rng(seed).integers(0, 1000, shape).astype(dtype)
    nib.save(nib.Nifti1Image(data, np.eye(4) if affine is None else affine), path)
    return path


def msd(root: Path, n: int = 3, channels: int = 1, **changes) -> Path:
    shape = (4, 5, 6) if channels == 1 else (4, 5, 6, channels)
    for i in range(n):
        save(root / "imagesTr" / f"c_{i}.nii.gz", i, shape)
        save(root / "labelsTr" / f"c_{i}.nii.gz", i)
    table = {
        "name": "toy",
        "modality": {str(i): m for i, m in enumerate(("T1", "T2", "FLAIR")[:channels])},
        "labels": {"0": "background", "1": "left", "2": "right"},
        "training": [{"image": f"./imagesTr/c_{i}.nii.gz", "label": f"./labelsTr/c_{i}.nii.gz"} for i in range(n)],
        "test": [],
    } | changes
    (root / "dataset.json").write_text(json.dumps(table))
    return root


def table(folder: Path, text: str, name: str = "cases.csv") -> Path:
    (folder / name).write_text(text)
    return folder / name


# ------------------------------------------------------------------------------------------------------- from_msd


def test_msd(tmp_path):
    cohort = from_msd(msd(tmp_path), task="seg", group="(c)_")
    assert (cohort.name, cohort.modalities, cohort.labels) == ("toy", ("T1",), {"left": 1, "right": 2})
    assert [case.id for case in cohort.cases] == ["c_0", "c_1", "c_2"]
    assert {case.group for case in cohort.cases} == {"c"}
    assert cohort.cases[1].targets["seg"] == tmp_path / "labelsTr" / "c_1.nii.gz"
    assert cohort.splits == {"train": ("c_0", "c_1", "c_2")}


def test_msd_modalities_are_channels_of_one_file_in_any_order(tmp_path):
    case = from_msd(msd(tmp_path, channels=3)).cases[0]
    stored = np.asanyarray(nib.load(case.images["T1"]).dataobj)
    np.testing.assert_array_equal(load_images(case, ("T1", "T2", "FLAIR")).data, stored)
    np.testing.assert_array_equal(load_images(case, ("FLAIR", "T1")).data, stored[..., [2, 0]])
    np.testing.assert_array_equal(load_images(case, ("T2",)).data, stored[..., 1:2])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": []}, "training list is empty"),
        ({"modality": {"0": "T1", "1": "T1"}}, "differ"),
        ({"modality": {"T1": "0"}}, "numbered"),
        ({"labels": {"0": "background", "1": "a", "2": "a"}}, "two values"),
        ({"labels": {"0": "background", "a": "b"}}, "pair integers"),
        ({"labels": {"background": 0, "liver": 1, "Liver": 1}}, "'liver' and 'Liver' both have the value 1"),
        ({"labels": {"0": "background", "1": "liver", "01": "tumour"}}, "'liver' and 'tumour' both have the value 1"),
        ({"training": [{"image": "imagesTr/none.nii.gz"}]}, r"missing file .*none\.nii\.gz \(case none\)"),
        ({"training": [{"image": "imagesTr/c_0.nii.gz"}] * 2}, "'c_0' appears more than once"),
        ({"training": [{"label": "x"}]}, "no 'image'"),
        ({"channel_names": {}}, "nnU-Net"),
    ],
)
def test_bad_msd(tmp_path, changes, words):
    with pytest.raises(UserError, match=words) as error:
        from_msd(msd(tmp_path, **changes))
    assert "dataset.json" in str(error.value)


def test_msd_without_or_with_damaged_json(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        from_msd(tmp_path)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        from_msd(tmp_path)
    (tmp_path / "dataset.json").write_text('{"modality": {}}')
    with pytest.raises(UserError, match="no key 'labels'"):
        from_msd(tmp_path)


def test_msd_test_images_and_macos_entries(tmp_path):
    save(tmp_path / "imagesTs" / "t_0.nii.gz", 7)
    entries = [{"image": f"imagesTr/{n}.nii.gz", "label": f"labelsTr/{n}.nii.gz"} for n in ("c_0", "._c_0", "c_1")]
    cohort = from_msd(msd(tmp_path, training=entries, test=["imagesTs/t_0.nii.gz", "imagesTs/gone.nii.gz"]))
    assert cohort.splits == {"train": ("c_0", "c_1"), "test": ("t_0",)}
    assert not cohort.case("t_0").targets
    with pytest.raises(UserError, match=r"did you mean '[ct]_0'"):
        cohort.case("c0")


# -------------------------------------------------------------------------------------------------- from_manifest


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_manifest(tmp_path, separator):
    save(tmp_path / "img" / "a.nii.gz", 1)
    save(tmp_path / "b.nii.gz", 2)
    save(tmp_path / "m.nii.gz", 3)
    lines = [
        "id,who,t1,mask,grade,kind,site",
        "a,p1,img/a.nii.gz,m.nii.gz,2,DCM,X",
        f"b,p2,{tmp_path}/b.nii.gz,,0.5,NOR,",
    ]
    path = table(tmp_path, "\ufeff" + "\n".join(lines).replace(",", separator) + "\n\n")
    cohort = from_manifest(
        path,
        {"T1": "t1"},
        {"seg": "mask", "grade": "grade", "kind": "kind"},
        {"background": 0, "tumour": 1},
        group="who",
        classes={"kind": ["NOR", "DCM"]},
    )
    a, b = cohort.cases
    assert a.images == {"T1": tmp_path / "img" / "a.nii.gz"}
    assert a.targets == {"seg": tmp_path / "m.nii.gz", "grade": 2, "kind": 1}
    assert isinstance(a.targets["grade"], int)
    assert b.targets == {"grade": 0.5, "kind": 0}
    assert (a.group, a.attributes["site"], "site" in b.attributes) == ("p1", "X", False)
    # What is a number or a word may divide the cases too, what is a file may not.
    assert a.attributes["kind"] == "DCM"
    assert not {"mask", "t1"} & set(a.attributes)
    assert cohort.labels == {"tumour": 1}


def test_what_spreadsheets_make_of_a_table(tmp_path):
    # Lines before the header, emptied columns, a line's end within quotes, characters that end lines for Python alone.
    save(tmp_path / "a.nii.gz")
    text = '\r\n\r\nid,t1,note,,\r\na,a.nii.gz,"two\r\nlines, one cell",,\r\nb,a.nii.gz,x\x85y\u2028z,,\r\n'
    (tmp_path / "cases.csv").write_bytes(text.encode("utf-8-sig"))
    cases = from_manifest(tmp_path / "cases.csv", {"T1": "t1"}).cases
    assert [case.attributes["note"] for case in cases] == ["two\nlines, one cell", "x\x85y\u2028z"]
    assert all(set(case.attributes) == {"id", "note"} for case in cases)
    (tmp_path / "cases.csv").write_text(text, encoding="utf-16")
    with pytest.raises(UserError, match="cannot be read as UTF-8 text .* Save it as UTF-8"):
        from_manifest(tmp_path / "cases.csv", {"T1": "t1"})


@pytest.mark.parametrize("text", ["", "\n\n", ",,,\n", ";;\n;;\n"])
def test_an_empty_table(tmp_path, text):
    (tmp_path / "cases.csv").write_text(text)
    with pytest.raises(UserError, match=r"cases\.csv: empty\. Give a header line and one line a case"):
        load_rows(tmp_path / "cases.csv")


def test_json_manifest(tmp_path):
    save(tmp_path / "a.nii.gz")
    path = table(tmp_path, json.dumps([{"id": 7, "t1": "a.nii.gz", "age": 41.5, "note": None}]), "cases.json")
    cohort = from_manifest(path, {"T1": "t1"}, {"age": "age"})
    assert cohort.cases[0].id == "7"
    assert cohort.cases[0].targets == {"age": 41.5}
    table(tmp_path, json.dumps({"id": 1}), "cases.json")
    with pytest.raises(UserError, match="list of records"):
        from_manifest(path, {"T1": "t1"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("id,t1\n", "no column|no cases"),
        ("id,T1\na,a.nii.gz\n", r"no column 't1'; did you mean 'T1'\?|no column 't1'"),
        ("id,t1\na,gone.nii.gz\n", r"missing file .*gone\.nii\.gz \(case a\)"),
        ("id,t1\na,\n", "line 2: case a lacks modality T1"),
        ("id,t1\n,a.nii.gz\n", "line 2: the id"),
        ("id,t1\na,a.nii.gz\na,a.nii.gz\n", "'a' appears more than once"),
        ("id,t1\na,a.nii.gz,extra\n", "line 2: 3 cells where the header has 2"),
        ("id,t1,t1\na,a.nii.gz,a.nii.gz\n", "'t1' appears twice"),
        ('id,t1\na,"a.nii.gz\nb,a.nii.gz\nc,a.nii.gz\n', "line 4: unexpected end of data"),
        (f'id,t1\na,"{"x" * 200_000}"\n', "line 2: field larger"),
        ("id,t1\n/data/a,a.nii.gz\n", "the id '/data/a' leads out of the folder .* such as 'a'"),
        ("id,t1\na/../../b,a.nii.gz\n", "the id 'a/../../b' leads out of the folder"),
        (f"id,t1\na,{'x' * 300}.nii\n", "xxx.nii: cannot be read: File name too long"),
    ],
)
def test_bad_manifest(tmp_path, text, words):
    save(tmp_path / "a.nii.gz")
    with pytest.raises(UserError, match=words) as error:
        from_manifest(table(tmp_path, text), {"T1": "t1"})
    assert "cases.csv" in str(error.value) or "xxx.nii" in str(error.value)


@pytest.mark.parametrize(
    ("cell", "words"),
    [("DCM", "neither a NIfTI file nor a number"), ("nan", "no finite number"), ("gone.nii", "missing")],
)
def test_bad_target(tmp_path, cell, words):
    save(tmp_path / "a.nii.gz")
    with pytest.raises(UserError, match=words):
        from_manifest(table(tmp_path, f"id,t1,y\na,a.nii.gz,{cell}\n"), {"T1": "t1"}, {"y": "y"})


def test_unknown_class_and_missing_patient(tmp_path):
    save(tmp_path / "a.nii.gz")
    path = table(tmp_path, "id,t1,y,who\na,a.nii.gz,DCN,\n")
    with pytest.raises(UserError, match="'DCN' is no class of task 'y'; did you mean 'DCM'"):
        from_manifest(path, {"T1": "t1"}, {"y": "y"}, classes={"y": ["NOR", "DCM"]})
    with pytest.raises(UserError, match="case a has no patient"):
        from_manifest(path, {"T1": "t1"}, group="who")


def test_missing_modality_may_be_allowed(tmp_path):
    save(tmp_path / "a.nii.gz")
    path = table(tmp_path, "id,t1,t2\na,a.nii.gz,\n")
    with pytest.raises(UserError, match="lacks modality T2"):
        from_manifest(path, {"T1": "t1", "T2": "t2"})
    case = from_manifest(path, {"T1": "t1", "T2": "t2"}, allow_missing=True).cases[0]
    with pytest.raises(UserError, match="case a: lacks modality T2"):
        load_images(case, ("T1", "T2"))
    data = load_images(case, ("T2", "T1"), allow_missing=True).data
    assert not data[..., 0].any()
    assert data[..., 1].any()


# -------------------------------------------------------------------------------------------------------- loading


def test_files_of_a_case_are_stacked_and_must_share_a_grid(tmp_path):
    a, b = save(tmp_path / "a.nii.gz", 1), save(tmp_path / "b.nii.gz", 2, dtype=np.float32)
    volume = load_images(Case("x", "x", {"A": a, "B": b}), ("B", "A"))
    np.testing.assert_array_equal(volume.data[..., 0], nib.load(b).get_fdata())
    np.testing.assert_array_equal(volume.data[..., 1], nib.load(a).get_fdata())
    assert volume.data.dtype == np.float32
    moved = save(tmp_path / "moved.nii.gz", 2, affine=np.diag([1, 1, 2, 1.0]))
    with pytest.raises(UserError, match="another place") as error:
        load_images(Case("x", "x", {"A": a, "B": moved}), ("A", "B"))
    assert "a.nii.gz" in str(error.value)
    assert "moved.nii.gz" in str(error.value)
    with pytest.raises(UserError, match=r"big\.nii\.gz: 3 channels for modality A"):
        load_images(Case("x", "x", {"A": save(tmp_path / "big.nii.gz", 0, (4, 5, 6, 3))}), ("A",))


@pytest.mark.parametrize("codes", ["LPS", "SAR", "AIL"])
def test_content_hash_sees_through_storage(tmp_path, codes):
    a = save(tmp_path / "a.nii.gz", 1)
    image = nib.load(a)
    change = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(image.affine), nib.orientations.axcodes2ornt(tuple(codes))
    )
    turned = image.as_reoriented(change)
    nib.save(nib.Nifti2Image(turned.get_fdata().astype(np.float64), turned.affine), tmp_path / "b.nii")
    assert content_hash(a) == content_hash(tmp_path / "b.nii")
    assert content_hash(a) != content_hash(save(tmp_path / "c.nii.gz", 2))
    flat = nib.Nifti1Image(image.get_fdata().reshape(6, 5, 4), np.eye(4))
    nib.save(flat, tmp_path / "d.nii.gz")
    assert content_hash(a) != content_hash(tmp_path / "d.nii.gz")


# --------------------------------------------------------------------------------------------------------- splits


def toy(groups: str = "aabbccddee", splits=None, attributes=None, root: Path = Path(".")) -> Cohort:
    cases = tuple(
        Case(f"{g}{i}", g, {"T1": Path(f"{g}{i}.nii")}, {}, {k: v[i] for k, v in (attributes or {}).items()})
        for i, g in enumerate(groups)
    )
    return Cohort("toy", root, ("T1",), {}, cases, splits)


def ids(splits) -> dict[str, set[str]]:
    return {name: {case.id for case in cases} for name, cases in splits.items()}


def test_folds_cover_every_case_once_and_never_cut_a_patient():
    cohort = toy("aabbbcddeefgghij")
    folds = [split(cohort, {"folds": 5, "fold": k}, 3, check_content=False) for k in range(5)]
    vals = [ids(f)["val"] for f in folds]
    assert set.union(*vals) == {c.id for c in cohort.cases}
    assert all(not a & b for a, b in itertools.combinations(vals, 2))
    for f in folds:
        assert not {c.group for c in f["train"]} & {c.group for c in f["val"]}
        assert ids(f)["train"] | ids(f)["val"] == {c.id for c in cohort.cases}
    assert {len({c.group for c in f["val"]}) for f in folds} == {2}


def test_folds_depend_on_the_seed_and_not_on_the_order_of_cases():
    spec = {"folds": 3, "fold": 0, "test": 0.2}
    cohort = toy("abcdefghijklmnopqrst")
    turned = Cohort("toy", cohort.root, ("T1",), {}, cohort.cases[::-1])
    a = ids(split(cohort, spec, 0, check_content=False))
    assert a == ids(split(turned, spec, 0, check_content=False))
    assert a != ids(split(cohort, spec, 1, check_content=False))
    assert len(a["test"]) == 4
    other = ids(split(cohort, spec | {"fold": 1}, 0, check_content=False))
    assert other["test"] == a["test"]  # the same for every fold
    # Known answer: a change of the rule would silently mix old training cases into new test sets.
    assert a["test"] == {"a0", "f5", "n13", "t19"}


def test_stratified_folds_are_balanced():
    sex = "MF" * 10
    cohort = toy("abcdefghijklmnopqrst", attributes={"sex": sex})
    for k in range(5):
        val = split(cohort, {"folds": 5, "fold": k, "stratify": "sex"}, 0, check_content=False)["val"]
        assert sorted(c.attributes["sex"] for c in val) == ["F", "F", "M", "M"]


def test_split_file(tmp_path):
    cohort = toy("abc", root=tmp_path)
    table(tmp_path, "id,split\na0,train\nb1,val\nc2,train\n", "split.csv")
    # The unset options of a configuration are there and empty.
    spec = {"file": "split.csv", "column": "", "folds": 0, "fold": 0, "test": 0.0}
    assert ids(split(cohort, spec, check_content=False)) == {"train": {"a0", "c2"}, "val": {"b1"}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id,split\na0,train\nb1,val\n", r"1 cases are in no split \(c2"),
        ("id,split\na0,train\nb1,val\nc2,val\nc3,val\n", "line 5: .* no case 'c3'; did you mean 'c2'"),
        ("id,split\na0,train\nb1,val\nc2,\n", "'split' is missing or empty"),
        ("id,split\na0,train\na0,val\nb1,val\nc2,val\n", "'a0' is listed twice"),
        ("id,split\na0,val\nb1,val\nc2,test\n", "split 'train' is empty"),
    ],
)
def test_bad_split_file(tmp_path, text, words):
    table(tmp_path, text, "split.csv")
    with pytest.raises(UserError, match=words):
        split(toy("abc", root=tmp_path), {"file": "split.csv"}, check_content=False)


def test_column_and_own_splits():
    cohort = toy("abc", attributes={"part": ["train", "train", "val"]})
    assert ids(split(cohort, {"column": "part"}, check_content=False))["val"] == {"c2"}
    with pytest.raises(UserError, match="no attribute 'prat'; did you mean 'part'"):
        split(cohort, {"column": "prat"}, check_content=False)
    with pytest.raises(UserError, match="no splits of its own"):
        split(cohort, {}, check_content=False)
    own = toy("abc", {"train": ("a0", "b1"), "val": ("c2",)})
    assert ids(split(own, {}, check_content=False)) == {"train": {"a0", "b1"}, "val": {"c2"}}
    with pytest.raises(UserError, match="split 'val' is empty"):
        split(toy("abc", {"train": ("a0", "b1", "c2"), "val": ()}), {}, check_content=False)


def test_manifest_split_column_is_found_by_the_spec_too(tmp_path):
    for name in "ab":
        save(tmp_path / f"{name}.nii.gz", ord(name))
    path = table(tmp_path, "id,t1,part\na,a.nii.gz,train\nb,b.nii.gz,test\n")
    cohort = from_manifest(path, {"T1": "t1"}, split="part")
    expected = {"train": {"a"}, "test": {"b"}}
    assert ids(split(cohort, {"column": "part"})) == expected == ids(split(cohort, {}))


def test_patient_in_two_splits():
    with pytest.raises(UserError, match=r"patient 'a' is in more than one split \(a0 in train, a1 in val\)"):
        split(toy("aab", {"train": ("a0",), "val": ("a1", "b2")}), {}, check_content=False)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"flods": 5}, "unknown key 'flods'; did you mean 'folds'"),
        ({"folds": 5, "file": "x"}, "file and folds are both given"),
        ({"folds": 6}, r"from 2 to the number of patients \(5\)"),
        ({"folds": 5, "fold": 5}, "from 0 to 4"),
        ({"folds": 5, "test": 1.5}, "share"),
        ({"fold": 2}, "needs data.split.folds"),
    ],
)
def test_bad_split_specs(spec, words):
    with pytest.raises(UserError, match=words):
        split(toy(), spec, check_content=False)


def test_identical_voxels_across_and_inside_splits(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("medjax.errors._said", set())
    images = [save(tmp_path / f"{i}.nii.gz", seed) for i, seed in enumerate((1, 2, 1))]
    cases = tuple(Case(str(i), str(i), {"T1": p}) for i, p in enumerate(images))
    with pytest.raises(UserError, match="identical voxels") as error:
        split(Cohort("x", tmp_path, ("T1",), {}, cases, {"train": ("0", "1"), "val": ("2",)}), {})
    assert str(images[0]) in str(error.value)
    assert str(images[2]) in str(error.value)
    split(Cohort("x", tmp_path, ("T1",), {}, cases, {"train": ("0", "2"), "val": ("1",)}), {})
    assert "count twice" in capsys.readouterr().err


def test_empty_images_are_no_duplicates_and_unused_cases_no_leak(tmp_path):
    # A modality written as zeros shows nothing to remember; reading the case says what is wrong with it.
    images = [save(tmp_path / f"{i}.nii.gz", i) for i in range(2)]
    for name in ("e", "f"):
        nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.eye(4)), tmp_path / f"{name}.nii.gz")
    cases = tuple(Case(n, n, {"T1": p, "T2": tmp_path / f"{n}.nii.gz"}) for n, p in zip("ef", images, strict=True))
    cohort = Cohort("x", tmp_path, ("T1", "T2"), {}, cases, {"train": ("e",), "val": ("f",)})
    assert set(split(cohort, {})) == {"train", "val"}
    # What no run reads may be of a patient, or hold the voxels, that another split has.
    pair = (Case("a", "p", {"T1": images[0]}), Case("b", "p", {"T1": images[0]}))
    cohort = Cohort("x", tmp_path, ("T1",), {}, pair, {"train": ("a",), "unlabelled": ("b",)})
    assert [c.id for c in split(cohort, {})["unlabelled"]] == ["b"]


@pytest.mark.parametrize("shape", [(3, 700, 1100), (5, 4, 3, 2)])  # more and less than what is hashed at a time
def test_content_hash_is_that_of_the_whole(tmp_path, shape):
    data = np.random.default_rng(0).integers(-1, 2, shape).astype(np.float32) * np.float32(-1)  # with -0 among them
    nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / "a.nii")
    digest = hashlib.blake2b(str(data.shape).encode(), digest_size=16)
    digest.update((data + np.float32(0)).tobytes())
    assert content_hash(tmp_path / "a.nii") == digest.hexdigest()


def test_one_file_under_two_ids(tmp_path):
    path = save(tmp_path / "a.nii.gz", 1)
    cases = tuple(Case(id, id, {"T1": path}) for id in "ab")
    with pytest.raises(UserError, match="hold identical voxels"):
        split(Cohort("x", tmp_path, ("T1",), {}, cases, {"train": ("a",), "val": ("b",)}), {})


@pytest.mark.real
def test_hippocampus(data_root):
    cohort = from_msd(data_root / "hippocampus")
    assert len(cohort.cases) == 200
    assert cohort.labels == {"Anterior": 1, "Posterior": 2}
    parts = split(cohort, {"file": "split.csv"}, check_content=False)
    assert {name: len(cases) for name, cases in parts.items()} == {"train": 180, "val": 20}


@pytest.mark.real
def test_acdc_leak_between_two_patients_is_found(data_root, tmp_path):
    folder = data_root / "cardiac_acdc"
    lines = [
        f"patient{p:03d}_{f},patient{p:03d},{folder}/images/patient{p:03d}_{f}.nii.gz,{s}"
        for p, s in ((74, "train"), (75, "train"), (76, "val"))
        for f in ("frame01", "frame02")
        if (folder / f"images/patient{p:03d}_{f}.nii.gz").exists()
    ]
    path = table(tmp_path, "id,patient,image,split\n" + "\n".join(lines) + "\n")
    cohort = from_manifest(path, {"MR": "image"}, group="patient", split="split")
    with pytest.raises(UserError, match="identical voxels") as error:
        split(cohort, {})
    assert "patient074_frame0" in str(error.value)
    assert "patient076_frame0" in str(error.value)
    kept = from_manifest(table(tmp_path, path.read_text().replace(",val", ",train")), {"MR": "image"}, split="split")
    assert cohorts.split(kept, {})["train"] == kept.cases  # one side: only a note
