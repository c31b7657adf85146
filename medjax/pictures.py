"""Pictures for people: segmentations over the image they were made from, and training curves.

matplotlib is imported when the first picture is drawn and is used without pyplot: no global state, no display.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from medjax.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Okabe and Ito's colour-blind-safe set (jfly.uni-koeln.de/color) without black, strongest first on grey images.
PALETTE = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#CC79A7", "#0072B2")


class _Plane(NamedTuple):
    name: str
    cut: int  # axis across the picture's plane
    across: int  # axis shown from right to left: every plane runs from high (R, A) index at the left edge to low
    up: int  # axis shown upwards
    letters: str  # at the left, right, bottom and top edge


# Radiological convention: the reader faces the patient, whose left is on the right of axial and coronal pictures.
_PLANES = (
    _Plane("axial", 2, 0, 1, "RLPA"),
    _Plane("coronal", 1, 0, 2, "RLIS"),
    _Plane("sagittal", 0, 1, 2, "APIS"),
)
_CONVENTION = "radiological convention: the patient's left is on the right of axial and coronal views"
# For white paper, where yellow is lost.
_DARK = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_BACK = "#111111"
_INK = "#e8e8e8"
_DASHES = (0, (2.2, 1.8))
_WIDTH = 13.0  # inches
_SCORES = {"dice", "nsd", "iou", "auc", "auroc", "cpm", "accuracy", "score", "f1"}
_LINES = 10  # of scores in one panel, before those of single classes are left out
_LEGEND_COLUMNS = 9


def overlay(
    image: np.ndarray,
    reference: np.ndarray | None,
    prediction: np.ndarray,
    *,
    spacing: Sequence[float],
    class_names: Mapping[int, str] | Sequence[str],
    title: str,
    path: str | os.PathLike[str],
) -> None:
    """Draws prediction (solid) and reference (dashed) contours over three planes of the image, as a PNG.

    Each plane is cut where reference and prediction together hold most, every class counted as a share of its own
    volume; where both are empty, through the middle. Axial and coronal planes follow the
    radiological convention, as the picture says.

    Args:
        image: float [X, Y, Z], axes towards the patient's right-to-left, back-to-front and foot-to-head (RAS+); grey
            values are windowed between robust percentiles of the finite voxels that are not background.
        reference: int [X, Y, Z] or None where there is none.
        prediction: int [X, Y, Z].
        spacing: mm along the three axes.
        class_names: label value -> name, or the names of values 1, 2, ... in order. Values without a name are left
            out; a name given for 0 is ignored.
        title: written above the picture.
        path: the PNG; parent folders are made. It is written beside and renamed.

    Raises:
        UserError: shapes differ or are not three-dimensional, or a spacing is not positive.
    """
    _check(image, reference, prediction, spacing)
    names = dict(class_names) if isinstance(class_names, Mapping) else dict(enumerate(class_names, start=1))
    names.pop(0, None)
    colours = {value: PALETTE[k % len(PALETTE)] for k, value in enumerate(names)}

    # A class counts by its share of itself, so that a small lesion is not outvoted by the organ around it.
    weight = np.zeros(image.shape, np.float32)
    for value in names:
        for labels in (prediction, reference):
            if labels is not None and (mask := labels == value).any():
                weight += mask / np.float32(np.count_nonzero(mask))
    widths = np.array([image.shape[plane.across] * spacing[plane.across] for plane in _PLANES])
    tallest = max(image.shape[plane.up] * spacing[plane.up] for plane in _PLANES)
    panel = float(np.clip(_WIDTH * tallest / widths.sum(), 2.5, 7.0))  # inches; bounded for very flat volumes
    shares = np.maximum(widths / widths.sum(), 0.12)
    shares /= shares.sum()
    handles = _legend_handles(names, colours, reference is not None)
    header, footer = 0.45, 0.5 + 0.22 * math.ceil(len(handles) / _LEGEND_COLUMNS)
    total = header + panel + footer
    figure = _figure(_WIDTH, total)
    for plane, left, share in zip(_PLANES, np.cumsum(shares) - shares, shares, strict=True):
        axes = figure.add_axes((left + 0.005, footer / total, share - 0.01, panel / total))
        _panel(axes, plane, image, reference, prediction, weight, spacing, colours)
    figure.text(0.008, 1 - 0.12 / total, title, color=_INK, fontsize=12, va="top", weight="bold")
    figure.text(0.992, 1 - 0.14 / total, _CONVENTION, color=_INK, fontsize=8.5, ha="right", va="top")
    style = {"frameon": False, "labelcolor": _INK, "fontsize": 9, "handlelength": 1.8}
    figure.legend(handles=handles, loc="lower center", ncol=min(len(handles), _LEGEND_COLUMNS), **style)
    _save(figure, path)


def curves(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], *, title: str = "") -> None:
    """Draws training curves as a PNG: losses in one panel, scores in [0, 1] (Dice, NSD, AUC...) in another.

    Args:
        rows: entries of a metric log, each with "step" and any metrics; keys with the word "loss" are losses,
            those with dice, nsd, iou, auc, auroc, cpm, accuracy, f1 or score are scores, all others (rates, times,
            millimetres) are left out. Rows may hold different keys and come in any order. A class's score
            ("dice/core" beside "dice") is left out where it is no other than the mean, or the lines get too many.
        path: the PNG; parent folders are made. It is written beside and renamed.
        title: written above.

    Raises:
        UserError: no row has a step and a finite loss or score.
    """
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        step = row.get("step")
        if step is None:
            continue
        for key, value in row.items():
            if key != "step" and isinstance(value, (int, float, np.number)) and not isinstance(value, bool):
                series.setdefault(key, []).append((float(step), float(value)))
    groups: dict[str, list[str]] = {}
    for key in sorted(series):
        kind = _kind(key)
        if kind and any(math.isfinite(value) for _, value in series[key]):
            groups.setdefault(kind, []).append(key)
    if not groups:
        raise UserError(f"{path}: no training curve to draw: no row has a 'step' and a finite loss or score")

    figure = _figure(6.4 * len(groups), 4.4, face="white")
    for k, (kind, keys) in enumerate(sorted(groups.items())):
        axes = figure.add_subplot(1, len(groups), k + 1)
        keys = _readable(keys, series)
        for i, key in enumerate(keys):
            steps, values = zip(*sorted(series[key]), strict=True)
            colour, style = _DARK[i % len(_DARK)], ("-", "--", ":")[i // len(_DARK) % 3]
            marker = "o" if len(steps) < 40 else None
            axes.plot(steps, values, style, color=colour, label=key, linewidth=1.4, marker=marker, markersize=3)
        axes.set_xlabel("step")
        axes.set_ylabel(kind)
        if kind == "score":
            axes.set_ylim(0, 1)
        axes.grid(alpha=0.25)
        beside: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1)} if len(keys) > 4 else {}
        axes.legend(fontsize=8, framealpha=0.85, **beside)
    _finish(figure, path, title)


def comparison(
    rows: Sequence[Mapping[str, Any]],
    seconds: Mapping[str, float | None],
    path: str | os.PathLike[str],
    *,
    baseline: str,
    title: str = "",
) -> None:
    """Draws experiments side by side as a PNG: means, differences from the baseline, and means over training time.

    Args:
        rows: one an experiment, from top to bottom: "experiment", "mean", "low", "high" and, but for the baseline,
            "difference", "difference_low", "difference_high"; nan where unknown.
        seconds: experiment -> training time, None where unknown; the third panel is left out if any is.
        path: the PNG; parent folders are made. It is written beside and renamed.
        baseline: the experiment of the vertical line.
        title: written above.
    """
    names = [str(row["experiment"]) for row in rows]
    timed = all(seconds.get(name) for name in names)
    figure = _figure(5.2 * (2 + timed), 1.5 + 0.34 * max(len(names), 4), face="white")
    panels = [("mean", "low", "high", "mean, 95 % interval")]
    panels.append(("difference", "difference_low", "difference_high", f"difference from {baseline}"))
    for k, (key, low, high, label) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels) + timed, k + 1)
        for i, row in enumerate(rows):
            _bar(axes, row, (key, low, high), i, _DARK[1] if row["experiment"] == baseline else _DARK[0])
        reference = next((row["mean"] for row in rows if row["experiment"] == baseline), math.nan) if k == 0 else 0.0
        axes.axvline(reference, color=_DARK[1], linewidth=0.8, linestyle=_DASHES)
        axes.set_yticks(range(len(names)), names if k == 0 else [""] * len(names))
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel(label)
        axes.grid(alpha=0.25, axis="x")
    if timed:
        axes = figure.add_subplot(1, 3, 3)
        for row in rows:
            x, y = float(seconds[str(row["experiment"])] or 0.0), row["mean"]
            axes.plot([x], [y], "o", color=_DARK[1] if row["experiment"] == baseline else _DARK[0], markersize=5)
            axes.annotate(str(row["experiment"]), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=8)
        axes.set_xlabel("seconds of training steps")
        axes.set_ylabel("mean")
        axes.margins(x=0.25, y=0.15)
        axes.grid(alpha=0.25)
    _finish(figure, path, title)


def agreement(
    measures: Mapping[str, Sequence[tuple[float, float]]], path: str | os.PathLike[str], *, title: str = ""
) -> None:
    """Draws Bland & Altman's plot of each measure as a PNG: differences over means, bias and limits of agreement.

    Args:
        measures: name -> (prediction, reference) of each patient, at least one, all finite.
        path: the PNG; parent folders are made. It is written beside and renamed.
        title: written above.
    """
    columns = min(3, len(measures))
    rows = math.ceil(len(measures) / columns)
    figure = _figure(4.6 * columns, 3.4 * rows + 0.5, face="white")
    for k, (name, pairs) in enumerate(measures.items()):
        predicted, reference = np.asarray(pairs, np.float64).T
        means, differences = (predicted + reference) / 2, predicted - reference
        axes = figure.add_subplot(rows, columns, k + 1)
        axes.axhline(0, color="#999999", linewidth=0.8)
        axes.plot(means, differences, "o", color=_DARK[1], markersize=4.5)
        bias = differences.mean()
        axes.axhline(bias, color=_DARK[0], linewidth=1.3, label=f"bias {bias:.3g}")
        if len(differences) > 1:
            half = 1.96 * differences.std(ddof=1)
            for side, label in ((-half, f"± 1.96 sd: {bias - half:.3g} .. {bias + half:.3g}"), (half, None)):
                axes.axhline(bias + side, color=_DARK[2], linewidth=1.1, linestyle="--", label=label)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("mean of prediction and reference", fontsize=8)
        axes.set_ylabel("prediction - reference", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.margins(y=0.25)
        axes.legend(fontsize=7, framealpha=0.85)
    _finish(figure, path, title)


def lines(
    series: Mapping[str, Sequence[tuple[float, float, float, float]]],
    path: str | os.PathLike[str],
    *,
    x: str,
    y: str,
    title: str = "",
) -> None:
    """Draws means with their intervals over a logarithmic axis as a PNG, one line a name.

    Args:
        series: name -> points (x, mean, low, high), x above 0; what is not finite is left out.
        path: the PNG; parent folders are made. It is written beside and renamed.
        x, y: what the axes are called. title: written above.
    """
    figure = _figure(9.0, 5.5, face="white")
    axes = figure.add_subplot()
    ticks = sorted({point[0] for points in series.values() for point in points})
    for k, (name, points) in enumerate(series.items()):
        colour, marker = _DARK[k % len(_DARK)], "os^vD*P"[k // len(_DARK) % 7]
        # Beside each other, so that no interval hides another.
        known = [(at * 1.03 ** (k - (len(series) - 1) / 2), *rest) for at, *rest in points if math.isfinite(rest[0])]
        line = ("-", "--", ":")[k // len(_DARK) % 3]
        axes.plot([p[0] for p in known], [p[1] for p in known], line, marker=marker, color=colour, label=name)
        for at, _, low, high in known:
            if math.isfinite(low) and math.isfinite(high):
                axes.plot([at, at], [low, high], "-", color=colour, linewidth=1, alpha=0.6)
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(x)
    axes.set_ylabel(f"{y} (bars: 95 % interval)")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    if title:
        axes.set_title(title, fontsize=12)
    figure.set_layout_engine("tight")
    _save(figure, path)


def columns(
    volumes: Mapping[str, np.ndarray], path: str | os.PathLike[str], *, spacing: Sequence[float], title: str = ""
) -> np.ndarray:
    """Draws volumes side by side, the three planes through the middle of each below one another, as a PNG.

    The first volume's grey window is that of all which are within a factor of its range; others have their own.

    Args:
        volumes: title -> float [X, Y, Z], oriented as in `overlay`; the shapes may differ.
        path: the PNG; parent folders are made. It is written beside and renamed.
        spacing: mm along the three axes.
        title: written above.

    Returns:
        The picture, uint8 [H, W, 3].
    """
    first = next(iter(volumes.values()))
    for volume in volumes.values():
        _check(volume, None, np.zeros(volume.shape, np.uint8), spacing)
    window = _window(first)
    figure = _figure(2.2 * len(volumes) + 0.2, 2.2 * len(_PLANES) + 0.6)
    for i, (name, volume) in enumerate(volumes.items()):
        own = _window(volume)
        alike = 0.2 < (own[1] - own[0]) / (window[1] - window[0]) < 5
        low, high = window if alike else own
        for j, plane in enumerate(_PLANES):
            axes = figure.add_subplot(len(_PLANES), len(volumes), j * len(volumes) + i + 1)
            middle = volume.shape[plane.cut] // 2
            grey = np.moveaxis(volume, (plane.up, plane.across, plane.cut), (0, 1, 2))[:, ::-1, middle]
            box = (0.0, grey.shape[1] * spacing[plane.across], 0.0, grey.shape[0] * spacing[plane.up])
            grey = np.nan_to_num(grey.astype(np.float32), nan=low)
            axes.imshow(grey, cmap="gray", vmin=low, vmax=high, origin="lower", extent=box, interpolation="nearest")
            axes.set_axis_off()
            if j == 0:
                axes.set_title(name, color=_INK, fontsize=9)
    figure.suptitle(title, color=_INK, fontsize=10)
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.9, 0.03, 0.03)
    _save(figure, path)
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]


# ---- parts


def _bar(axes: Axes, row: Mapping[str, Any], keys: tuple[str, str, str], y: int, colour: str) -> None:
    """A point with its interval, lying."""
    value, low, high = (float(row.get(key, math.nan)) for key in keys)
    if math.isfinite(low) and math.isfinite(high):
        axes.plot([low, high], [y, y], "-", color=colour, linewidth=2)
    if math.isfinite(value):
        axes.plot([value], [y], "o", color=colour, markersize=5)


def _check(image: np.ndarray, reference: np.ndarray | None, prediction: np.ndarray, spacing: Sequence[float]) -> None:
    if image.ndim != 3 or not image.size:
        raise UserError(f"overlay: the image has shape {image.shape}; give one non-empty channel [X, Y, Z]")
    for name, labels in (("reference", reference), ("prediction", prediction)):
        if labels is not None and labels.shape != image.shape:
            raise UserError(f"overlay: the {name} has shape {labels.shape}, the image {image.shape}; give one grid")
    if len(spacing) != 3 or not all(math.isfinite(s) and s > 0 for s in spacing):
        raise UserError(f"overlay: spacing is {tuple(spacing)}; give three positive numbers in mm")


def _window(image: np.ndarray) -> tuple[float, float]:
    """Grey window: 1st to 99.5th percentile of the finite voxels, without the commonest extreme (air, padding)."""
    values = image[np.isfinite(image)]
    if not values.size:
        return 0.0, 1.0
    floor = values.min()
    if (values == floor).mean() > 0.05 and (values > floor).any():
        values = values[values > floor]
    low, high = np.percentile(values, (1, 99.5))
    return (float(low), float(high)) if high > low else (float(low) - 0.5, float(low) + 0.5)


def _panel(
    axes: Axes,
    plane: _Plane,
    image: np.ndarray,
    reference: np.ndarray | None,
    prediction: np.ndarray,
    weight: np.ndarray,
    spacing: Sequence[float],
    colours: Mapping[int, str],
) -> None:
    counts = weight.sum(axis=(plane.across, plane.up))
    index = int(counts.argmax()) if counts.any() else image.shape[plane.cut] // 2

    def slab(array: np.ndarray) -> np.ndarray:
        return np.moveaxis(array, (plane.up, plane.across, plane.cut), (0, 1, 2))[:, ::-1, index]

    low, high = _window(image)
    grey = np.nan_to_num(slab(image).astype(np.float32), nan=low, posinf=high, neginf=low)
    x_size, y_size = spacing[plane.across], spacing[plane.up]
    box = (0.0, grey.shape[1] * x_size, 0.0, grey.shape[0] * y_size)
    axes.imshow(grey, cmap="gray", vmin=low, vmax=high, origin="lower", extent=box, interpolation="nearest")
    for labels, dashed in ((prediction, False), (reference, True)):
        if labels is not None:
            flat = slab(labels)
            masks = {value: flat == value for value in colours}
            # Small on top: a core's contour would vanish under the inner one of its rim.
            for value in sorted(masks, key=lambda value: -np.count_nonzero(masks[value])):
                _outline(axes, masks[value], (x_size, y_size), colours[value], dashed)
    axes.set_xlim(*box[:2])
    axes.set_ylim(*box[2:])
    axes.set_aspect("equal")
    axes.set_facecolor("black")
    axes.tick_params(left=False, bottom=False, labelleft=False, labelbottom=False)
    where: dict[str, Any] = {"ha": "center", "va": "center", "transform": axes.transAxes, "color": _INK, "fontsize": 11}
    for letter, (x, y) in zip(plane.letters, ((0.035, 0.5), (0.965, 0.5), (0.5, 0.035), (0.5, 0.965)), strict=True):
        axes.text(x, y, letter, weight="bold", bbox={"facecolor": "black", "alpha": 0.45, "pad": 1.5, "lw": 0}, **where)
    axes.set_xlabel(f"{plane.name}, slice {index + 1} of {image.shape[plane.cut]}", color=_INK, fontsize=9)


def _outline(axes: Axes, mask: np.ndarray, size: tuple[float, float], colour: str, dashed: bool) -> None:
    """Contour of a mask [rows, columns] whose pixels measure `size` (x, y) mm."""
    if not mask.any():
        return
    # A rim of background closes contours at the border and lets single rows or columns have one.
    padded = np.pad(mask, 1).astype(np.float32)
    x, y = ((np.arange(n) - 0.5) * step for n, step in zip(padded.shape[::-1], size, strict=True))
    if dashed:
        axes.contour(x, y, padded, levels=[0.5], colors=_pale(colour), linewidths=1.0, linestyles=[_DASHES])
    else:
        axes.contour(x, y, padded, levels=[0.5], colors=colour, linewidths=1.5, linestyles="solid")


def _pale(colour: str) -> str:
    """The colour mixed with white, so that a reference drawn over an equal prediction still shows."""
    return "#" + "".join(f"{(int(colour[k : k + 2], 16) + 2 * 255) // 3:02X}" for k in (1, 3, 5))


def _legend_handles(names: Mapping[int, str], colours: Mapping[int, str], with_reference: bool) -> list[Line2D]:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colours[value], linewidth=3, label=name) for value, name in names.items()]
    handles.append(Line2D([], [], color=_INK, linewidth=1.5, label="prediction"))
    if with_reference:
        handles.append(Line2D([], [], color=_INK, linewidth=1.2, linestyle=_DASHES, label="reference"))
    return handles


def _kind(key: str) -> str | None:
    """Panel of a metric; None for rates, times and counts."""
    words = set(re.split(r"[^a-z0-9]+", key.lower()))  # whole words: "iou" is in "suspicious" as well
    if "loss" in words:
        return "loss"
    return "score" if words & _SCORES else None


def _readable(keys: Sequence[str], series: Mapping[str, Sequence[tuple[float, float]]]) -> list[str]:
    """The keys without those of a class whose mean is there too, where they say the same or make too many lines."""

    def said(key: str) -> bool:
        mean = key.rpartition("/")[0]
        same = mean in keys and np.array_equal(sorted(series[mean]), sorted(series[key]), equal_nan=True)
        return same or (mean in keys and len(keys) > _LINES)

    return [key for key in keys if _kind(key) == "loss" or not said(key)]


def _figure(width: float, height: float, face: str = _BACK) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, facecolor=face)
    FigureCanvasAgg(figure)
    return figure


def _finish(figure: Figure, path: str | os.PathLike[str], title: str) -> None:
    """Writes panels on white, with the title above them all."""
    if title:
        figure.suptitle(title, fontsize=12)
    figure.set_layout_engine("tight")
    _save(figure, path)


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a PNG beside `path` and renames it."""
    target = Path(path)
    if target.suffix.lower() != ".png":
        raise UserError(f"{target}: pictures are written as PNG; give a name that ends in .png")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=".png", dir=target.parent)
    except OSError as error:
        raise UserError(f"{target}: cannot write the picture ({error.strerror}); choose a writable folder") from error
    try:
        with os.fdopen(handle, "wb") as file:
            figure.savefig(file, format="png")
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, target)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"{target}: cannot write the picture ({error.strerror}); free some room") from error
        raise
