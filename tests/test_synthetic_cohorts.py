"""The generators of lungs, strokes, breasts and colons: files against what they say, and no leak between splits."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from medjax.config import defaults
from medjax.data import dataset, synthetic
from medjax.data import synthetic_breast as breast
from medjax.data import synthetic_colon as colon
from medjax.data import synthetic_lung as lung
from medjax.data import synthetic_stroke as stroke
from medjax.errors import UserError

FEW = {"n_train": 3, "n_val": 0, "n_test": 1, "progress": False, "workers": 1}


def rows_of(manifest: Path) -> list[dict[str, str]]:
    with open(manifest, newline="") as file:
        return list(csv.DictReader(file))


def array(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def write_nodules(folder: Path, n: int = 24, size: int = 31) -> Path:
    """Crops as the real ones: lung at 900, a bright ball in the middle whose value is the nodule's own."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    lines = ["name," + ",".join(lung.RATINGS)]
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*(np.arange(size) - size // 2,) * 3, indexing="ij"))
    for i in range(n):
        ball = np.sqrt((grid**2).sum(0)) < 3 + i % 4
        image = np.where(ball, 2650 + 25 * i, 900) + rng.normal(0, 3, ball.shape)
        for part, data in (("images", image.astype(np.int16)), ("masks", ball.astype(np.uint8))):
            nib.save(nib.Nifti1Image(data, np.eye(4)), folder / part / f"nodule{i}.nii.gz")
        lines.append(f"nodule{i},{1 + i % 5},5,1,1,5,5,5")
    (folder / "attributes.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def nodules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_nodules(tmp_path_factory.mktemp("nodules"))


@pytest.fixture(scope="module")
def canvases(nodules: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"data": nodules, "n_train": 8, "n_val": 2, "n_test": 4, "size": 64, "progress": False, "workers": 1}
    return lung.lung_cohort(tmp_path_factory.mktemp("cache"), **options)


def test_canvases_say_where_their_nodules_are(canvases: Path) -> None:
    seen = 0
    for row in rows_of(canvases):
        volume, mask = nib.load(canvases.parent / row["image"]), array(canvases.parent / row["mask"])
        assert volume.shape == mask.shape == (64, 64, 64)
        listed = json.loads(row["nodules"])
        parts, n = ndimage.label(mask)
        assert n == len(listed) == len(row["names"].split())
        for one in listed:
            voxel = np.linalg.solve(volume.affine, [*one["center"], 1])[:3]
            part = parts[tuple(np.rint(voxel).astype(int))]
            assert part, "the centre lies in the nodule"
            where = np.argwhere(parts == part)
            np.testing.assert_allclose(voxel, where.mean(0), atol=0.05)
            np.testing.assert_array_equal(where.max(0) - where.min(0) + 1, one["size"])
            assert ("malignant" in one) == (one["malignancy"] != 3)
            assert one.get("malignant", one["malignancy"] > 3) == (one["malignancy"] > 3)
            seen += 1
    assert seen > 14


def test_a_pasted_nodule_keeps_its_voxels(canvases: Path) -> None:
    """The ball of nodule i has the value 2650 + 25 i, up to the canvas's own noise."""
    for row in rows_of(canvases)[:6]:
        image, mask = array(canvases.parent / row["image"]), array(canvases.parent / row["mask"])
        parts, n = ndimage.label(mask)
        means = sorted(image[ndimage.binary_erosion(parts == k)].mean() for k in range(1, n + 1))
        wanted = sorted(2650 + 25 * int(name[6:]) for name in row["names"].split())
        np.testing.assert_allclose(means, wanted, atol=25)


def test_no_nodule_is_on_two_sides(nodules: Path, canvases: Path) -> None:
    ratings = lung.read_ratings(nodules)
    quarters = [lung.divide(list(ratings), k, 0.1)["test"] for k in range(4)]
    assert sorted(name for quarter in quarters for name in quarter) == sorted(ratings)
    assert {len(q) for q in quarters} == {6}
    divided = lung.divide(list(ratings), 0, 0.1)
    names = {split: set() for split in divided}
    for row in rows_of(canvases):
        names[row["split"]] |= set(row["names"].split())
    for split, used in names.items():
        assert used <= set(divided[split])
    assert not names["train"] & (names["val"] | names["test"])
    # A name keeps its place whatever the order of the table.
    assert lung.divide(list(ratings)[::-1], 0, 0.1)["test"] == divided["test"]


def test_distractors_hold_no_nodule(nodules: Path) -> None:
    """Tissue of crops is blended in without the nodule: a canvas of distractors alone has nothing of its value."""
    ratings = lung.read_ratings(nodules)
    names = [f"nodule{i}" for i in (20, 21, 22, 23)]
    crops = [lung._read(str(nodules), name) for name in names]
    assert ratings["nodule23"]["malignancy"] == 4
    rng = np.random.default_rng(3)
    image = np.full((64, 64, 64), 900, np.float32)
    for _ in range(40):
        lung._paste_tissue(image, crops[rng.integers(4)], rng)
        lung._paste_ball(image, crops[rng.integers(4)], rng)
    assert image.max() < 1400
    assert image.std() > 1, "and something is blended in"


def test_canvases_are_reproducible_and_keyed(nodules: Path, tmp_path: Path, canvases: Path) -> None:
    options = {"data": nodules, "n_train": 8, "n_val": 2, "n_test": 4, "size": 64, "progress": False}
    other = lung.lung_cohort(tmp_path, workers=2, **options)
    assert other.parent.name == canvases.parent.name
    for row in rows_of(canvases)[:3]:
        assert (other.parent / row["image"]).read_bytes() == (canvases.parent / row["image"]).read_bytes()
    assert other.read_bytes() == canvases.read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "/nowhere"}, "set MEDJAX_DATA"),
        ({"held_out": 4}, "quarters"),
        ({"share": 1.0}, "validation"),
        ({"size": 32}, "64 voxels"),
        ({"n_train": -1}, "n_train is -1"),
        ({"n_train": 0, "n_val": 0, "n_test": 0}, "at least one case"),
        ({"workers": 0}, "workers is 0"),
        ({"n_train": "6"}, "n_train is '6'"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"size": "big"}, "64 voxels"),
        ({"share": "half"}, "validation"),
        ({"data": 3}, "data is 3"),
    ],
)
def test_wrong_options(nodules: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        lung.lung_cohort(tmp_path, **{"data": nodules, **options})


@pytest.mark.parametrize("name", ["brain", "stroke", "breast", "colon"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_train": "6"}, "n_train is '6'"),
        ({"n_val": 1.5}, "n_val is 1.5"),
        ({"n_test": True}, "n_test is True"),
        ({"seed": "a"}, "seed is 'a'"),
        ({"workers": 2.5}, "workers is 2.5"),
        ({"workers": 0}, "workers is 0"),
        ({"size": 64}, "size is 64: give three voxel counts"),
        ({"size": (4, 4, 4)}, "at least 8"),
        ({"size": (16.5, 16, 16)}, "three voxel counts"),
        ({"spacing": "fine"}, "spacing is 'fine'"),
        ({"spacing": None}, "spacing is None"),
        ({"spacing": 0.5}, "between 1 and 8 mm"),
    ],
)
def test_options_that_cannot_be(name: str, options: dict, message: str, tmp_path: Path) -> None:
    if name in ("breast", "colon") and options.keys() & {"size", "spacing"}:
        message = "has no option"
    with pytest.raises(UserError, match=message):
        synthetic.generate(f"synthetic_{name}", {"folder": tmp_path / "cache", **options})
    assert not (tmp_path / "cache").exists()


def test_a_breast_without_room_for_its_lesion_has_no_grade(monkeypatch: pytest.MonkeyPatch) -> None:
    assert breast.breast_case(3, 0).grade
    mass = breast._mass

    def crowded(rng: np.random.Generator, allowed: np.ndarray, taken: list, *rest: float, **more: bool) -> tuple:
        return mass(rng, allowed, [*taken, (np.zeros(3), 1e6)], *rest, **more)

    monkeypatch.setattr(breast, "_mass", crowded)
    case = breast.breast_case(3, 0)
    assert not case.mask.any()
    assert case.grade == 0


def test_crops_that_do_not_fit(nodules: Path, tmp_path: Path) -> None:
    table = (nodules / "attributes.csv").read_text()
    for text, message in (
        (table.replace("texture", "textur"), "no column 'texture'"),
        (table.replace("nodule0,1,", "nodule0,x,"), "line 2: a rating of 'nodule0'"),
    ):
        (tmp_path / "attributes.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            lung.lung_cohort(tmp_path, data=tmp_path)


def test_stroke_rows_say_what_is_in_the_files(tmp_path: Path) -> None:
    manifest = stroke.stroke_cohort(tmp_path, spacing=6.0, **FEW)
    for row in rows_of(manifest):
        volume, mask = nib.load(manifest.parent / row["image"]), array(manifest.parent / row["mask"])
        assert volume.shape == (*mask.shape, 4)
        ml = np.count_nonzero(mask) * abs(np.linalg.det(volume.affine[:3, :3])) / 1000
        assert float(row["lesion_ml"]) == pytest.approx(ml, rel=1e-3)
        assert row["stroke"] in ("0", "1")
        known = {key: float(row[key]) for key in ("lesion_ml", "strategic", "lacunes", "atrophy")}
        assert float(row["risk"]) == pytest.approx(1 / (1 + np.exp(-stroke._logit(**known))), rel=2e-2)


def test_risk_rises_with_each_of_its_causes() -> None:
    base = {"lesion_ml": 10.0, "strategic": 0.1, "lacunes": 1.0, "atrophy": 0.3}
    for key, more in (("lesion_ml", 30.0), ("strategic", 0.3), ("lacunes", 2.0), ("atrophy", 0.6)):
        assert stroke._logit(**{**base, key: more}) > stroke._logit(**base) + 0.3
    rows = [stroke.stroke_case(0, i, spacing=8.0)[1] for i in range(40)]
    assert 0.25 < np.mean([row["stroke"] for row in rows]) < 0.75
    assert np.std([row["risk"] for row in rows]) > 0.2


def test_lesions_look_like_disease_and_stay_in_the_brain() -> None:
    contrast = []
    for number in range(4):
        case, _ = stroke.stroke_case(1, number, spacing=4.0)
        lesion, white = case.label == 4, case.label == 3
        assert (case.image[lesion] > 0).all()
        if lesion.sum() > 50:
            contrast.append(case.image[..., 3][lesion].mean() / case.image[..., 3][white].mean())
    assert np.mean(contrast) > 1.1


def test_a_breast_points_forwards() -> None:
    """In the world's axes (RAS+) the chest wall fills the back of the volume, and before the nipple there is air."""
    for number in range(4):
        case = breast.breast_case(5, number)
        volume = nib.as_closest_canonical(nib.Nifti1Image(case.image[..., 0], case.affine))
        assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
        body = (np.asarray(volume.dataobj) > 0.15).mean(axis=(0, 2))  # share of a coronal plane, from back to front
        assert body[1] > 0.95, number
        assert body[-2] < 0.2, number


def test_breast_files(tmp_path: Path) -> None:
    manifest = breast.breast_cohort(tmp_path, **{**FEW, "n_train": 7})
    rows = rows_of(manifest)
    assert [bool(row["grade"]) for row in rows] == [number % 7 != 6 for number in range(8)]
    for row in rows:
        image, mask = array(manifest.parent / row["image"]), array(manifest.parent / row["mask"])
        assert image.shape == (*breast.SHAPE, 3)
        assert mask.any() == bool(row["grade"])
        if mask.any():
            pre, early, _ = (image[..., c][mask > 0].mean() for c in range(3))
            assert early > 1.3 * pre


def test_washout_and_outline_follow_the_grade_loosely() -> None:
    washed: dict[int, list[float]] = {1: [], 2: [], 3: []}
    for number in range(24):
        case = breast.breast_case(3, number)
        if case.grade:
            pre, early, late = (float(case.image[..., c][case.mask > 0].mean()) for c in range(3))
            washed[case.grade].append((late - pre) / (early - pre))
    means = [np.mean(washed[grade]) for grade in (1, 2, 3)]
    assert means[0] > means[1] > means[2]
    assert max(washed[3]) > min(washed[2]) or max(washed[2]) > min(washed[1]), "the grades overlap"


def test_colon_says_where_its_lesions_are(tmp_path: Path) -> None:
    manifest = colon.colon_cohort(tmp_path, **{**FEW, "n_train": 7})
    labels = set()
    for row in rows_of(manifest):
        volume, mask = nib.load(manifest.parent / row["image"]), array(manifest.parent / row["mask"])
        for one in json.loads(row["lesions"]):
            voxel = np.linalg.solve(volume.affine, [*one["center"], 1])[:3]
            box = tuple(slice(max(0, int(v) - 2), int(v) + 3) for v in voxel)
            assert (mask[box] == one["label"]).any()
            assert min(one["size"]) >= 2 * colon.SPACING
            assert ("flat" in one) == (one["label"] == 1)
            labels.add(one["label"])
    assert labels


def test_lesions_of_the_colon_are_no_brighter_than_its_wall() -> None:
    inside, wall = [], []
    for number in range(6):
        case = colon.colon_case(0, number)
        air = ndimage.binary_dilation(case.image < -600, iterations=2) & (case.image > -200)
        inside += list(case.image[ndimage.binary_erosion(case.mask > 0)])
        wall += list(case.image[air & (case.mask == 0)])
    assert abs(np.median(inside) - 35) < 40
    assert np.percentile(wall, 20) < np.median(inside) < np.percentile(wall, 95)


@pytest.mark.parametrize("name", sorted(synthetic.GENERATORS))
def test_an_unknown_option_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="did you mean 'n_train'"):
        synthetic.generate(name, {"n_trian": 3})


def test_generators_open_as_cohorts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDJAX_CACHE", str(tmp_path))
    config = defaults().data
    config.cohort = "synthetic_colon"
    config.options = {"n_train": 1, "n_val": 0, "n_test": 1, "progress": False}
    config.images, config.targets = {"CT": "image"}, {"lesions": "lesions"}
    config.split.column = "split"
    cohort = dataset.open_cohort(config, {"lesions": "detection"})
    assert [case.id for case in cohort.cases] == ["colon_000", "colon_001"]
    assert set(dataset.open_splits(cohort, config, 0)) == {"train", "test"}
