"""The overview of a cohort that `medjax.data.inspect` writes: summary, text, page and pictures."""

from __future__ import annotations

import base64
import html
import math
import struct
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from medjax.data.cases import Cohort, Problem
from medjax.data.volume import Volume, axes_towards
from medjax.pictures import PALETTE

if TYPE_CHECKING:
    from medjax.data.inspect import Report

_FEW = 12  # different values a column may have to be counted one by one
_HEIGHT = 180  # pixels of a picture's tallest plane
_WIDTH = 480  # pixels a plane takes at most
_SAMPLE = 1 << 17
_CHARTED = 400  # cases in a chart
_UNDECLARED = "#FF0000"
_SEVERITIES = ("error", "warning", "note")


# ----------------------------------------------------------------------------------------------------------- summary


def summarise(
    cohort: Cohort, reports: Sequence[Report], problems: Sequence[Problem], splits: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """Everything the overview says, as plain tables and lists."""
    group_of = {report.id: report.group for report in reports}
    counts = Counter(problem.severity for problem in problems)
    return {
        "cohort": cohort.name,
        "root": str(cohort.root),
        "modalities": list(cohort.modalities),
        "labels": dict(cohort.labels),
        "regions": {name: list(values) for name, values in cohort.regions.items()},
        "ignore": cohort.ignore,
        "cases": len(reports),
        "patients": len(set(group_of.values())),
        "usable": sum(report.usable for report in reports),
        "splits": {
            name: {"cases": len(ids), "patients": len({group_of.get(id, id) for id in ids})}
            for name, ids in splits.items()
        },
        "geometry": _geometry(reports),
        "intensities": {m: _intensities(m, reports) for m in cohort.modalities},
        "label_volumes_ml": _label_volumes(cohort, reports),
        "targets": _targets(cohort, reports),
        "attributes": _attributes(reports),
        "problem_counts": {severity: counts[severity] for severity in _SEVERITIES},
        "problems": [asdict(problem) for problem in problems],
        "reports": [_record(report) for report in reports],
    }


def _record(report: Report) -> dict[str, Any]:
    return {
        "id": report.id,
        "group": report.group,
        "usable": report.usable,
        "images": {m: asdict(image) for m, image in report.images.items()},
        "masks": {
            task: {**asdict(mask), "volumes": {str(v): ml for v, ml in mask.volumes.items()}}
            for task, mask in report.masks.items()
        },
        "targets": report.targets,
        "attributes": report.attributes,
    }


def _range(values: Iterable[float]) -> dict[str, float] | None:
    known = [float(v) for v in values if v is not None and math.isfinite(v)]
    return {"min": min(known), "median": float(np.median(known)), "max": max(known)} if known else None


def _geometry(reports: Sequence[Report]) -> dict[str, Any]:
    """Shapes and spacings of each case's first image, along left-right, back-front and foot-head."""
    firsts = [next(iter(report.images.values())) for report in reports if report.images]
    orders = [
        [next(i for i, c in enumerate(f.orientation) if c in pair) for pair in ("RL", "AP", "SI")] for f in firsts
    ]
    shapes = [[f.shape[i] for i in order] for f, order in zip(firsts, orders, strict=True)]
    spacings = [[f.spacing[i] for i in order] for f, order in zip(firsts, orders, strict=True)]
    return {
        "shape": [_range(s[axis] for s in shapes) for axis in range(3)],
        "spacing": [_range(s[axis] for s in spacings) for axis in range(3)],
        "orientations": dict(Counter(f.orientation for f in firsts).most_common()),
    }


def _intensities(modality: str, reports: Sequence[Report]) -> dict[str, Any]:
    images = [report.images[modality] for report in reports if modality in report.images]
    return {
        "cases": len(images),
        "dtypes": dict(Counter(i.dtype + (" scaled" if i.scaled else "") for i in images).most_common()),
        "low": _range(i.low for i in images),
        "high": _range(i.high for i in images),
        "middle": _range(i.percentiles[len(i.percentiles) // 2] for i in images),
        "zeros": _range(i.zeros for i in images),
        "nonfinite_files": sum(i.nonfinite > 0 for i in images),
    }


def _label_volumes(cohort: Cohort, reports: Sequence[Report]) -> dict[str, Any]:
    """Task -> label name (or value) -> cases that have it, and the range of their volumes in ml."""
    names = {value: name for name, value in cohort.labels.items()}
    if cohort.ignore is not None:
        names[cohort.ignore] = "ignore"
    volumes: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    masks: Counter[str] = Counter()
    for report in reports:
        for task, mask in report.masks.items():
            masks[task] += 1
            for value, ml in mask.volumes.items():
                volumes[task][value].append(ml)
    return {
        task: {
            names.get(value, f"{value} (undeclared)"): {
                "value": value, "cases": len(ml), "of": masks[task], "ml": _range(ml),
            }
            for value, ml in sorted(volumes[task].items())
        }
        for task in masks
    }  # fmt: skip


def _targets(cohort: Cohort, reports: Sequence[Report]) -> dict[str, Any]:
    """Task -> what its targets other than masks are, over the cases that have one."""
    values: dict[str, list[Any]] = defaultdict(list)
    for report in reports:
        for task, value in report.targets.items():
            values[task].append(value)
    out: dict[str, Any] = {}
    for task, known in values.items():
        names = cohort.classes.get(task, ())
        if isinstance(known[0], list) and all(isinstance(v, dict) for value in known for v in value):
            found = [finding for value in known for finding in value]
            out[task] = {
                "kind": "findings",
                "cases": len(known),
                "none": sum(not value for value in known),
                "findings": len(found),
                "labels": {
                    names[label - 1] if label <= len(names) else str(label): n
                    for label, n in sorted(Counter(f["label"] for f in found).items())
                },
                "extent_mm": _range(max(f["size"]) for f in found),
            }
        elif isinstance(known[0], list):
            columns = names or [str(i) for i in range(len(known[0]))]
            out[task] = {
                "kind": "vector",
                "cases": len(known),
                "entries": {
                    str(name): {"known": sum(math.isfinite(v[i]) for v in known), "range": _range(v[i] for v in known)}
                    for i, name in enumerate(columns)
                },
            }
        elif names or (all(isinstance(v, int) for v in known) and len(set(known)) <= _FEW):
            counts = Counter(known)
            out[task] = {
                "kind": "class",
                "cases": len(known),
                "counts": {
                    str(names[v]) if isinstance(v, int) and 0 <= v < len(names) else str(v): counts[v]
                    for v in (range(len(names)) if names else sorted(counts))
                },
            }
        else:
            out[task] = {"kind": "number", "cases": len(known), "range": _range(known)}
    return out


def _attributes(reports: Sequence[Report]) -> dict[str, Any]:
    """Column -> counts of its values where they are few, else their range or number."""
    values: dict[str, list[str]] = defaultdict(list)
    for report in reports:
        for name, text in report.attributes.items():
            values[name].append(text)
    out: dict[str, Any] = {}
    for name, texts in values.items():
        counts = Counter(texts)
        numbers = [_number(text) for text in counts]
        out[name] = {"cases": len(texts), "different": len(counts)}
        if len(counts) <= _FEW:
            out[name]["counts"] = dict(sorted(counts.items()))
        elif all(number is not None for number in numbers):
            out[name]["range"] = _range(number for number in numbers if number is not None)
    return out


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -------------------------------------------------------------------------------------------------------------- text


def lines(summary: Mapping[str, Any], shown: int) -> Iterator[str]:
    """The overview for a terminal, with the first `shown` problems."""
    yield ""
    yield (
        f"{summary['cohort']}: {_many(summary['cases'], 'case')} of {_many(summary['patients'], 'patient')}, "
        f"{summary['usable']} usable as they are"
    )
    for key, text in facts(summary):
        yield f"  {key:<22} {text}"
    counts = summary["problem_counts"]
    yield "  " + f"{'problems':<22} " + ", ".join(_many(counts[s], s) for s in _SEVERITIES)
    listed = summary["problems"]
    for problem in listed[:shown]:
        yield f"    {problem['severity']}: {problem['message']}"
    if len(listed) > shown:
        yield f"    ... and {len(listed) - shown} more in the files"


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def facts(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(what, in words) of all but the problems."""
    if summary["splits"]:
        yield (
            "splits",
            ", ".join(
                f"{name} {about['cases']} ({_many(about['patients'], 'patient')})"
                for name, about in summary["splits"].items()
            ),
        )
    geometry = summary["geometry"]
    if all(geometry["shape"]):
        yield "shape (x, y, z)", " x ".join(_span(r) for r in geometry["shape"])
        yield "spacing (x, y, z)", " x ".join(_span(r) for r in geometry["spacing"]) + " mm"
        yield "orientation", _counts(geometry["orientations"])
    for modality, about in summary["intensities"].items():
        if about["cases"]:
            nonfinite = f"; {_many(about['nonfinite_files'], 'file')} with NaN" if about["nonfinite_files"] else ""
            yield (
                f"intensity {modality}",
                (
                    f"lowest {_span(about['low'])}, median {_span(about['middle'])}, highest {_span(about['high'])}; "
                    f"{_counts(about['dtypes'])}{nonfinite}"
                ),
            )
    for task, labels in summary["label_volumes_ml"].items():
        for name, about in labels.items():
            yield f"{task}: {name}", f"{_span(about['ml'])} ml, in {about['cases']} of {about['of']} masks"
        if not labels:
            yield task, "every mask is empty"
    for task, about in summary["targets"].items():
        yield f"{task} ({about['kind']})", _target_words(about)
    for name, about in summary["attributes"].items():
        if "counts" in about and about["different"] > 1:
            yield name, _counts(about["counts"])
        elif about.get("range"):
            yield name, _span(about["range"])


def _target_words(about: Mapping[str, Any]) -> str:
    known = f"{_many(about['cases'], 'case')}: "
    if about["kind"] == "class":
        return known + _counts(about["counts"])
    if about["kind"] == "number":
        return known + _span(about["range"])
    if about["kind"] == "vector":
        return known + ", ".join(f"{n} {_span(e['range'])} ({e['known']} known)" for n, e in about["entries"].items())
    extent = f", extent {_span(about['extent_mm'])} mm" if about["extent_mm"] else ""
    return f"{known}{_many(about['findings'], 'finding')} ({_counts(about['labels'])}){extent}, {about['none']} without"


def _counts(table: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in table.items()) or "none"


def _span(about: Mapping[str, float] | None) -> str:
    """'5' where all are alike, else '5 (3 to 9)': the median and the range."""
    if about is None:
        return "unknown"
    if math.isclose(about["min"], about["max"], rel_tol=1e-4):
        return f"{about['median']:.4g}"
    return f"{about['median']:.4g} ({about['min']:.4g} to {about['max']:.4g})"


# ---------------------------------------------------------------------------------------------------------- pictures


class Canvas:
    """A picture of one case: three planes of the first image with contours of the masks, one of each other image.

    Planes are cut where the masks hold most, else through the middle; radiological convention.

    Args:
      like: the grid all lie on.
      masks: label maps on it.
      labels: values that have a colour of their own, in order.
    """

    def __init__(self, like: Volume, masks: Sequence[Volume], labels: Sequence[int]) -> None:
        self._permutation, self._flips = axes_towards(like.affine)
        self._masks = [self._orient(mask.data) for mask in masks]
        self._colours = colours(labels)
        shape = [like.shape[axis] for axis in self._permutation]
        spacing = [like.spacing[axis] for axis in self._permutation]
        size = [n * s for n, s in zip(shape, spacing, strict=True)]
        scale = min(_HEIGHT / max(size[1], size[2]), _WIDTH / max(size[0], size[1]))
        self._pixels = [max(4, round(s * scale)) for s in size]
        self._cuts = []
        for axis in range(3):
            across = tuple(i for i in range(3) if i != axis)
            counts = sum((np.count_nonzero(mask, axis=across) for mask in self._masks), np.zeros(shape[axis], np.int64))
            self._cuts.append(int(counts.argmax()) if counts.any() else shape[axis] // 2)
        self._panels: list[np.ndarray] = []

    def add(self, volume: Volume) -> None:
        """Draws an image of that grid: the first in three planes, others in the axial one."""
        data = volume.data if volume.data.ndim == 4 else volume.data[..., None]
        for channel in range(data.shape[3]):
            low, high = _window(data[..., channel])
            oriented = self._orient(data[..., channel])
            # (cut, across, up): axial, coronal, sagittal.
            for cut, across, up in ((2, 0, 1), (1, 0, 2), (0, 1, 2)) if not self._panels else ((2, 0, 1),):
                grey = self._plane(oriented, cut, across, up).astype(np.float64)
                grey = (np.nan_to_num(grey, nan=low, posinf=high, neginf=low) - low) / (high - low)
                panel = np.repeat((np.clip(grey, 0, 1) * 255).astype(np.uint8)[..., None], 3, axis=2)
                for mask in self._masks:
                    self._outline(panel, self._plane(mask, cut, across, up))
                self._panels.append(panel)

    def png(self) -> bytes | None:
        """The picture; None where no image could be read."""
        if not self._panels:
            return None
        height = max(panel.shape[0] for panel in self._panels)
        padded = [np.pad(p, ((0, height - len(p)), (0, 3), (0, 0))) for p in self._panels]
        return png(np.concatenate(padded, axis=1))

    def _orient(self, data: np.ndarray) -> np.ndarray:
        turned = data.transpose(self._permutation)
        return turned[tuple(slice(None, None, -1) if flip else slice(None) for flip in self._flips)]

    def _plane(self, data: np.ndarray, cut: int, across: int, up: int) -> np.ndarray:
        """[rows, columns] of a slice at the picture's size: up is up, right and front are at the left edge."""
        flat = np.moveaxis(data, (up, across, cut), (0, 1, 2))[..., self._cuts[cut]]
        rows, columns = (
            (np.arange(n) * length // n)
            for n, length in zip((self._pixels[up], self._pixels[across]), flat.shape, strict=True)
        )
        return flat[np.ix_(rows[::-1], columns[::-1])]

    def _outline(self, panel: np.ndarray, labels: np.ndarray) -> None:
        padded = np.pad(labels, 1)
        edge = np.zeros(labels.shape, bool)
        for rows, columns in ((0, 1), (2, 1), (1, 0), (1, 2)):
            edge |= padded[rows : rows + len(labels), columns : columns + labels.shape[1]] != labels
        edge &= labels > 0
        for value in np.unique(labels[edge]):
            panel[edge & (labels == value)] = _rgb(self._colours.get(int(value), _UNDECLARED))


def colours(labels: Sequence[int]) -> dict[int, str]:
    """Label value -> '#RRGGBB'."""
    return {value: PALETTE[k % len(PALETTE)] for k, value in enumerate(sorted(labels))}


def _rgb(colour: str) -> tuple[int, int, int]:
    red, green, blue = (int(colour[k : k + 2], 16) for k in (1, 3, 5))
    return red, green, blue


def _window(data: np.ndarray) -> tuple[float, float]:
    """Grey window: 1st to 99.5th percentile of an even sample of the finite voxels above the lowest value."""
    flat = data.ravel(order="K")
    values = flat[:: max(1, flat.size // _SAMPLE) | 1].astype(np.float64)
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    if (above := values[values > values.min()]).size:
        values = above
    low, high = (float(v) for v in np.percentile(values, (1, 99.5)))
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def png(pixels: np.ndarray) -> bytes:
    """A PNG (www.w3.org/TR/png) of uint8 [rows, columns, 3]."""
    rows, columns, _ = pixels.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    # Every row begins with its filter, 0: none.
    raw = np.concatenate([np.zeros((rows, 1), np.uint8), pixels.reshape(rows, -1)], axis=1).tobytes()
    head = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw, 6)) + chunk(b"IEND", b"")


# -------------------------------------------------------------------------------------------------------------- page

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #8886; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
td, th { text-align: left; vertical-align: top; padding: .25rem .7rem .25rem 0; border-bottom: 1px solid #8883; }
th { white-space: nowrap; } td { overflow-wrap: anywhere; }
.error { color: #c62828; font-weight: 600; } .warning { color: #b26a00; font-weight: 600; } .note { color: #777; }
.gallery { display: flex; flex-wrap: wrap; gap: .8rem; }
figure { margin: 0; background: #111; color: #e8e8e8; padding: .4rem; border-radius: 4px; }
figcaption { font-size: 12px; } img { display: block; max-width: 100%; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin: 0 .3em 0 .9em; }
svg { width: 100%; height: 150px; background: #8881; }
details > summary { cursor: pointer; }
"""


def page(summary: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The overview as one HTML file that needs no other."""
    say = html.escape
    counts = summary["problem_counts"]
    parts = [
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{say(summary['cohort'])}</title>"
        f"<meta name='viewport' content='width=device-width'><style>{_STYLE}</style></head><body>",
        f"<h1>{say(summary['cohort'])}</h1><p>{_many(summary['cases'], 'case')} of "
        f"{_many(summary['patients'], 'patient')}, {summary['usable']} usable as they are &middot; "
        f"{', '.join(_many(counts[s], s) for s in _SEVERITIES)}<br>{say(summary['root'])}</p>",
        "<table>" + "".join(f"<tr><th>{say(k)}</th><td>{say(t)}</td></tr>" for k, t in facts(summary)) + "</table>",
        "<h2>Problems</h2>",
        _problem_table(summary["problems"]),
        _gallery(summary, pictures),
        "<h2>Intensities</h2><p>Percentiles 0.5 to 99.5 (line), 25 to 75 (bar) and 50 (tick) of every case.</p>",
    ]
    parts += [f"<h3>{say(m)}</h3>{_chart(m, summary['reports'])}" for m in summary["modalities"]]
    parts += ["<h2>Cases</h2>", _case_table(summary), "</body></html>\n"]
    return "\n".join(parts)


def _problem_table(problems: Sequence[Mapping[str, str]]) -> str:
    if not problems:
        return "<p>None found.</p>"
    rows = "".join(
        f"<tr><td class='{p['severity']}'>{p['severity']}</td><td>{html.escape(p['case'])}</td>"
        f"<td>{html.escape(p['message'])}</td></tr>"
        for p in problems
    )
    return f"<table><tr><th>severity</th><th>case</th><th>what, and the cure</th></tr>{rows}</table>"


def _gallery(summary: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    if not pictures:
        return ""
    palette = colours(list(summary["labels"].values()))
    names = {value: name for name, value in summary["labels"].items()}
    keys = "".join(
        f"<span class='key' style='background:{colour}'></span>{html.escape(names[value])}"
        for value, colour in palette.items()
    )
    figures = "".join(
        f"<figure><img alt='{html.escape(id)}' src='data:image/png;base64,{base64.b64encode(data).decode()}'>"
        f"<figcaption>{html.escape(id)}</figcaption></figure>"
        for id, data in pictures.items()
    )
    return (
        "<h2>Pictures</h2><p>Axial, coronal and sagittal plane through most of the labelled tissue "
        f"({html.escape(', axial '.join(summary['modalities']))}); the patient's right is at the left.{keys}</p>"
        f"<div class='gallery'>{figures}</div>"
    )


def _chart(modality: str, reports: Sequence[Mapping[str, Any]]) -> str:
    """Box plots of a modality's percentiles, one a case, as SVG."""
    having = [(r["id"], r["images"][modality]["percentiles"]) for r in reports if modality in r["images"]]
    having = [(id, p) for id, p in having if all(math.isfinite(v) for v in p)]
    if not having:
        return "<p>No image could be read.</p>"
    step = max(1, math.ceil(len(having) / _CHARTED))
    having = having[::step]
    low, high = min(p[0] for _, p in having), max(p[-1] for _, p in having)
    # Some cases in other units would press all others flat: beyond that, a logarithmic scale on both sides of 0.
    spans = sorted(p[-1] - p[0] for _, p in having)
    unit = spans[len(spans) // 2] or 1.0
    wild = high - low > 50 * unit

    def place(value: float) -> float:
        at = math.asinh(value / unit) if wild else value
        a, b = (math.asinh(low / unit), math.asinh(high / unit)) if wild else (low, high)
        return 95 - 90 * (at - a) / ((b - a) or 1)

    marks = []
    for i, (id, p) in enumerate(having):
        x, (bottom, q1, middle, q3, top) = i + 0.5, (place(p[k]) for k in (0, 2, 3, 4, 6))
        marks.append(
            f"<g><title>{html.escape(id)}: {', '.join(f'{v:.4g}' for v in p)}</title>"
            f"<path d='M{x} {bottom:.2f}V{top:.2f}' stroke='#888' stroke-width='.15'/>"
            f"<path d='M{x} {q1:.2f}V{q3:.2f}' stroke='#0072B2' stroke-width='.6'/>"
            f"<path d='M{x - 0.4} {middle:.2f}h.8' stroke='#D55E00' stroke-width='.8'/></g>"
        )
    scale = "; logarithmic, as the cases differ so much" if wild else ""
    return (
        f"<svg viewBox='0 0 {len(having)} 100' preserveAspectRatio='none'>{''.join(marks)}</svg>"
        f"<p class='note'>from {low:.4g} to {high:.4g}{scale}</p>"
    )


def _case_table(summary: Mapping[str, Any]) -> str:
    bad = Counter(p["case"] for p in summary["problems"] if p["severity"] != "note")
    names = {value: name for name, value in summary["labels"].items()}
    rows = []
    for report in summary["reports"]:
        image = next(iter(report["images"].values()), None)
        grid = (
            f"{' x '.join(map(str, image['shape']))} at {' x '.join(f'{s:.4g}' for s in image['spacing'])} mm, "
            f"{image['orientation']}, {image['dtype']}"
            if image
            else ""
        )
        volumes = "; ".join(
            f"{task}: "
            + (", ".join(f"{names.get(int(v), v)} {ml:.3g}" for v, ml in mask["volumes"].items()) or "empty")
            for task, mask in report["masks"].items()
        )
        targets = "; ".join(
            f"{task}: {f'{len(v)} findings' if v and isinstance(v[0], dict) else v}"
            if isinstance(v, list)
            else f"{task}: {v}"
            for task, v in report["targets"].items()
        )
        cells = (report["id"], report["group"], grid, volumes, targets, str(bad[report["id"]] or ""))
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{h}</th>" for h in ("case", "patient", "first image", "labels (ml)", "targets", "problems"))
    table = f"<table><tr>{head}</tr>{''.join(rows)}</table>"
    return f"<details open><summary>{_many(len(rows), 'case')}</summary>{table}</details>"
