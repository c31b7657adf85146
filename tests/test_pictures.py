"""Pictures: what is drawn is found again in the pixels of the file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from medjax import pictures
from medjax.errors import UserError

REPO = Path(__file__).resolve().parents[1]
NAMES = {1: "liver", 2: "lesion"}


def pixels(path: Path) -> np.ndarray:
    """RGB in [0, 1], [rows from the top, columns, 3]."""
    return imread(path)[..., :3]


def panels(picture: np.ndarray) -> list[np.ndarray]:
    """The three equal panels of a cubic volume, without header and legend."""
    height, width = picture.shape[:2]
    body = picture[int(0.12 * height) : int(0.8 * height)]
    return [body[:, k * width // 3 : (k + 1) * width // 3] for k in range(3)]


def found(picture: np.ndarray, colour: str | float) -> np.ndarray:
    wanted = np.full(3, colour) if isinstance(colour, float) else np.array(to_rgb(colour))
    return np.abs(picture - wanted).max(-1) < 0.03


def draw(
    path: Path, image: np.ndarray, reference: np.ndarray | None, prediction: np.ndarray, **options: object
) -> Path:
    arguments = {"spacing": (1, 1, 1), "class_names": NAMES, "title": "case_001", "path": path, **options}
    pictures.overlay(image, reference, prediction, **arguments)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize(
    ("corner", "sides"),
    [
        # Corner at the patient's left, front and top (low x is left-hand in RAS+: x grows to the right).
        ((slice(2, 8), slice(28, 38), slice(28, 38)), [("right", "up"), ("right", "up"), ("left", "up")]),
        ((slice(32, 38), slice(2, 12), slice(2, 12)), [("left", "down"), ("left", "down"), ("right", "down")]),
    ],
)
def test_sides_of_the_patient(tmp_path: Path, corner: tuple[slice, ...], sides: list[tuple[str, str]]) -> None:
    image = np.zeros((40, 40, 40), np.float32)
    image[corner] = 1.0
    mask = (image > 0).astype(int)
    picture = pixels(draw(tmp_path / "a.png", image, None, mask))
    for panel, (across, up) in zip(panels(picture), sides, strict=True):
        rows, columns = np.nonzero(found(panel, pictures.PALETTE[0]))
        height, width = panel.shape[:2]
        assert len(rows) > 50
        assert (columns.mean() > width / 2) == (across == "right")
        assert (rows.mean() < height / 2) == (up == "up")


def test_prediction_solid_reference_dashed(tmp_path: Path) -> None:
    image = np.random.default_rng(0).random((40, 40, 40)).astype(np.float32)
    one, two = np.zeros((2, 40, 40, 40), int)
    one[6:16, 15:25, 15:25] = 1
    two[24:34, 15:25, 15:25] = 2
    axial = panels(pixels(draw(tmp_path / "a.png", image, two, one)))[0]
    solid, dashed = found(axial, pictures.PALETTE[0]), found(axial, pictures._pale(pictures.PALETTE[1]))
    assert solid.sum() > 1.3 * dashed.sum() > 50
    # x is mirrored: the prediction at low x (patient left) is drawn on the right.
    assert np.nonzero(solid)[1].mean() > np.nonzero(dashed)[1].mean() + 50
    alone = panels(pixels(draw(tmp_path / "b.png", image, None, one)))[0]
    assert not found(alone, pictures._pale(pictures.PALETTE[1])).any()


def test_planes_go_through_the_rarest_class_too(tmp_path: Path) -> None:
    """A lesion of 27 voxels decides, not the organ of thousands; grey tells the slice."""
    image = np.broadcast_to(np.arange(30.0), (30, 30, 30)).copy()
    labels = np.zeros((30, 30, 30), int)
    labels[4:26, 4:26, 0:20] = 1
    labels[14:17, 14:17, 23:26] = 2
    axial = panels(pixels(draw(tmp_path / "a.png", image, None, labels)))[0]
    low, high = pictures._window(image)
    grey = axial[(np.ptp(axial, axis=-1) < 0.01) & (axial.max(-1) > 0.2)]
    values, counts = np.unique(grey.round(3), return_counts=True)
    assert low + values[counts.argmax()] * (high - low) == pytest.approx(24, abs=1.2)


def test_aspect_follows_the_spacing(tmp_path: Path) -> None:
    image = np.full((30, 30, 30), 5.0, np.float32)
    image[10:20, 10:20, 10:20] = 6.0  # shown in the middle of the window, all that is above the floor
    empty = np.zeros(image.shape, int)
    picture = pixels(draw(tmp_path / "a.png", image, empty, empty, spacing=(1, 1, 2)))
    for panel, ratio in zip(panels(picture), (1, 2, 2), strict=True):
        block = found(panel, 0.5)
        rows, columns = (np.count_nonzero(block.sum(axis) > 20) for axis in (1, 0))  # letters are smaller
        assert rows / columns == pytest.approx(ratio, rel=0.1)


@pytest.mark.parametrize("shape", [(1, 1, 1), (40, 30, 1), (1, 30, 40), (200, 3, 2)])
@pytest.mark.parametrize("value", [0, 1])
def test_any_volume_gives_a_picture(tmp_path: Path, shape: tuple[int, int, int], value: int) -> None:
    labels = np.full(shape, value)
    picture = pixels(draw(tmp_path / "a.png", np.ones(shape, np.float32), labels, labels, spacing=(0.5, 0.5, 8)))
    assert min(picture.shape[:2]) > 200
    assert max(picture.shape[:2]) < 2000


def test_nan_and_outliers_do_not_set_the_window() -> None:
    image = np.random.default_rng(0).normal(100, 10, (20, 20, 20))
    image[0, 0, 0], image[0, 0, 1], image[0, 0, 2] = np.nan, np.inf, 1e9
    image[10:] = 0  # air
    low, high = pictures._window(image)
    assert 60 < low < 95
    assert 110 < high < 150
    assert pictures._window(np.full((2, 2, 2), np.nan)) == (0.0, 1.0)


def test_names_in_order_and_background_ignored(tmp_path: Path) -> None:
    image = np.random.default_rng(0).random((20, 20, 20))
    labels = np.zeros(image.shape, int)
    labels[5:15, 5:15, 5:15] = 1
    one = pixels(draw(tmp_path / "a.png", image, labels, labels, class_names=["liver", "lesion"]))
    two = pixels(draw(tmp_path / "b.png", image, labels, labels, class_names={0: "background", **NAMES}))
    np.testing.assert_array_equal(one, two)


def test_overlay_refuses(tmp_path: Path) -> None:
    image, labels = np.zeros((4, 4, 4)), np.zeros((4, 4, 4), int)
    with pytest.raises(UserError, match=r"reference has shape \(4, 4, 3\)"):
        draw(tmp_path / "a.png", image, labels[..., :3], labels)
    with pytest.raises(UserError, match=r"shape \(4, 4, 4, 1\)"):
        draw(tmp_path / "a.png", image[..., None], None, labels)
    with pytest.raises(UserError, match="spacing"):
        draw(tmp_path / "a.png", image, None, labels, spacing=(1, 0, 1))
    with pytest.raises(UserError, match=r"\.png"):
        draw(tmp_path / "a.jpg", image, None, labels)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="writable"):
        draw(tmp_path / "file" / "a.png", image, None, labels)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "a.png"
    image, labels = np.zeros((4, 4, 4)), np.ones((4, 4, 4), int)
    before = draw(path, image, None, labels).read_bytes()

    def fail(self: Figure, file: object, **_: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(UserError, match="a.png: cannot write the picture .disk full"):
        draw(path, image, None, labels)
    assert path.read_bytes() == before
    assert [child.name for child in path.parent.iterdir()] == ["a.png"]


def test_columns_are_the_middle_planes(tmp_path: Path) -> None:
    """Voxel by voxel: a volume, one in its window, one in its own; voxels twice as long along z as across."""
    rng = np.random.default_rng(0)
    first = rng.random((8, 8, 4))
    volumes = {"image": first, "half": 0.5 * first, "heat": 100 * rng.random((8, 8, 4))}
    picture = pictures.columns(volumes, tmp_path / "a.png", spacing=(1, 1, 2), title="case")
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(np.round(255 * pixels(tmp_path / "a.png")), picture)
    height, width = picture.shape[:2]
    # Cells of the grid with a thirtieth between them; a square picture in the middle of each.
    high, wide = 0.89 * height / (3 + 2 * 0.03), 0.98 * width / (3 + 2 * 0.03)
    side = min(high, wide)
    for i, (name, volume) in enumerate(volumes.items()):
        low, top = np.percentile(first if name != "heat" else volume, (1, 99.5))
        middle = {"axial": volume[:, :, 2], "coronal": volume[:, 4, :], "sagittal": volume[4, :, :]}
        for j, plane in enumerate(middle.values()):
            # The first axis runs to the left, the second up.
            want = np.clip((plane.T[::-1, ::-1] - low) / (top - low), 0, 1)
            down, right = 0.1 * height + (1.03 * j + 0.5) * high, 0.01 * width + (1.03 * i + 0.5) * wide
            rows, columns = ((np.arange(n) + 0.5) / n - 0.5 for n in want.shape)
            at = np.ix_((down + side * rows).astype(int), (right + side * columns).astype(int))
            np.testing.assert_allclose(picture[at] / 255, np.repeat(want[..., None], 3, -1), atol=0.01)


def test_no_pyplot(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np; from medjax import pictures as p; assert 'matplotlib' not in sys.modules;"
        "p.overlay(np.eye(3)[None], None, np.ones((1, 3, 3), int), spacing=(1, 1, 1), class_names=['a'], title='t',"
        "path=sys.argv[1]); "
        "p.curves([{'step': 1, 'loss': 2.0}], sys.argv[1]); print('matplotlib.pyplot' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPO), "MPLBACKEND": "agg"}
    command = [sys.executable, "-c", code, str(tmp_path / "a.png")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr


def test_curves_split_losses_from_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    real = Figure.savefig

    def spy(self: Figure, *args: object, **options: object) -> None:
        for axes in self.axes:
            drawn[axes.get_ylabel()] = {
                str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines
            }
        real(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", spy)
    rows = [
        {"step": 20, "train/loss": 0.5, "learning_rate": 1e-3},
        {"step": 10, "train/loss": 1.0, "val/dice/core": 0.25, "note": "warm"},
        {"step": 30, "train/loss": float("nan"), "val/dice/core": np.float32(0.5), "val/loss": 2},
        {"epoch": 3, "train/loss": 9.0},
    ]
    pictures.curves(rows, tmp_path / "c.png", title="run")
    assert set(drawn) == {"loss", "score"}
    assert drawn["score"] == {"val/dice/core": ([10, 30], [0.25, 0.5])}
    assert set(drawn["loss"]) == {"train/loss", "val/loss"}
    assert drawn["loss"]["train/loss"][0] == [10, 20, 30]
    np.testing.assert_array_equal(drawn["loss"]["train/loss"][1], [1.0, 0.5, np.nan])
    assert pixels(tmp_path / "c.png").std() > 0.02


def test_curves_know_a_metric_by_its_whole_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No millimetres among the scores because a task is called "suspicious" (...iou...), and AUROC among them."""
    drawn: dict[str, set[str]] = {}

    def spy(self: Figure, *args: object, **options: object) -> None:
        self.draw_without_rendering()
        for axes in self.axes:
            drawn[axes.get_ylabel()] = {str(line.get_label()) for line in axes.lines}
            legend, lines = axes.get_legend(), axes.get_window_extent()
            assert len(axes.lines) <= 4 or legend.get_window_extent().x0 >= lines.x1, "the legend hides the curves"
            assert legend.get_window_extent().x1 <= self.bbox.x1, "the legend is cut off"

    monkeypatch.setattr(Figure, "savefig", spy)
    row = {"val/suspicious/hd95": 9.0, "val/risk/auroc": 0.7, "val/risk/auroc/stroke": 0.7, "glossy/volume_ml": 3.0}
    row |= {"val/dice": 0.5, "val/dice/core": 0.25, "val/dice/rim": 0.75, "val/cpm": 0.5}
    losses = {f"train/loss/task{i}": 0.1 * i for i in range(6)}
    pictures.curves([{"step": 1} | row | losses], tmp_path / "c.png")
    assert drawn["score"] == {"val/risk/auroc", "val/dice", "val/dice/core", "val/dice/rim", "val/cpm"}
    assert drawn["loss"] == set(losses)
    many = {f"val/dice/structure{i}": 0.01 * i for i in range(20)}
    pictures.curves([{"step": 1, "val/dice": 0.5} | many], tmp_path / "c.png")
    assert drawn["score"] == {"val/dice"}


def test_curves_without_numbers(tmp_path: Path) -> None:
    for rows in ([], [{"step": 1, "loss": float("nan")}], [{"loss": 1.0}], [{"step": 1, "seconds": 3.0}]):
        with pytest.raises(UserError, match="no training curve"):
            pictures.curves(rows, tmp_path / "c.png")
    assert not list(tmp_path.iterdir())
