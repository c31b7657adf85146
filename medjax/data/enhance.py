"""Image enhancement before resampling: bias field, noise, contrast, common intensity scale, what lies outside the body.

Steps run one after the other on the file's own voxels, in the plan's axis order, before cropping, resampling and
normalisation. They belong to the `Plan` and so run the same at prediction. N4 needs SimpleITK, non-local means and
CLAHE need scikit-image (`pip install -r requirements-enhance.txt`); the others need neither.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from medjax.data.cases import check_keys, nearest
from medjax.errors import UserError

WINDOWS = {
    "lung": (-1350.0, 150.0),
    "mediastinum": (-125.0, 225.0),
    "soft_tissue": (-150.0, 250.0),
    "abdomen": (-150.0, 250.0),
    "liver": (-45.0, 105.0),
    "bone": (-500.0, 1300.0),
    "temporal_bone": (-800.0, 2000.0),
    "brain": (0.0, 80.0),
    "stroke": (20.0, 60.0),
    "subdural": (-25.0, 175.0),
    "angiography": (0.0, 600.0),
}
"""CT windows in HU, lowest and highest: level -/+ width / 2 of the widths in clinical use (Radiopaedia, "Windowing
(CT)"): lung 1500/-600, mediastinum 350/50, soft tissue 400/50, liver 150/30, bone 1800/400, temporal bone 2800/600,
brain 80/40, stroke 40/40, subdural 200/75, angiography 600/300."""

Step = Mapping[str, Any]

_BINS = 256
_HOT = 99.9  # percentile above which values do not widen Otsu's histogram: hot voxels would leave it two bins
_ITK_SHORTEST = 4  # voxels along an axis that N4's cubic B-spline mesh needs
_SHRUNK = 24  # voxels that shrinking leaves along an axis for N4
_NEGATIVE = 0.01  # share of negative voxels above which an image is no magnitude image (z-scored? CT?)


# ------------------------------------------------------------------------------------------------------------- steps


def n4(values: np.ndarray, step: Step, spacing: Sequence[float], name: str) -> np.ndarray:
    """Divides by the smooth field that N4 finds (N. Tustison et al., IEEE TMI 29(6), 2010; SimpleITK).

    The field is fitted on every `shrink`-th voxel of the foreground, evaluated on all, and scaled to a geometric mean
    of 1 there, so that intensities keep their size. One thread, so that equal input gives equal bits.
    """
    if np.count_nonzero(values < 0) > _NEGATIVE * values.size:
        raise UserError(
            f"{name}: enhance='n4' needs magnitudes, but many values are negative (normalised already, or CT?). Leave "
            "the step out for this modality, or give the image before normalisation."
        )
    if min(values.shape) < _ITK_SHORTEST:
        raise UserError(
            f"{name}: enhance='n4' needs {_ITK_SHORTEST} voxels along every axis, not {values.shape}. Leave it out."
        )
    mask = values > (otsu(values) if step["mask"] == "otsu" else 0)
    sitk = importlib.import_module("SimpleITK")

    def image(array: np.ndarray) -> Any:
        out = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
        out.SetSpacing([float(s) for s in spacing])
        return out

    whole = image(values)
    factors = [max(1, min(int(step["shrink"]), n // _SHRUNK)) for n in values.shape]
    corrector = sitk.N4BiasFieldCorrectionImageFilter()
    corrector.SetNumberOfThreads(1)
    corrector.SetMaximumNumberOfIterations([int(n) for n in step["iterations"]])
    corrector.SetConvergenceThreshold(float(step["convergence"]))
    try:
        corrector.Execute(
            sitk.Shrink(whole, factors), sitk.Shrink(image((mask & (values > 0)).astype(np.uint8)), factors)
        )
        field = sitk.GetArrayFromImage(corrector.GetLogBiasFieldAsImage(whole)).T
    except RuntimeError as error:
        why = str(error).strip().splitlines()[-1]
        raise UserError(f"{name}: N4 cannot correct this image ({why}). Leave the step out for it.") from None
    field = field - field[mask].mean(dtype=np.float64)
    return np.ascontiguousarray(values / np.exp(field), np.float32)


def nlm(values: np.ndarray, step: Step, spacing: Sequence[float], name: str) -> np.ndarray:
    """Non-local means (A. Buades et al., CVPR 2005; scikit-image): each voxel the mean of those with a like patch.

    The noise level is measured in the image (`noise_level`); `strength` multiplies it to the filter's bandwidth. Voxels
    of the lowest value, such as a background of zeros, keep it.
    """
    del spacing, name
    sigma = noise_level(values)
    if sigma == 0:
        return values
    out = importlib.import_module("skimage.restoration").denoise_nl_means(
        values,
        patch_size=int(step["patch"]),
        patch_distance=int(step["search"]),
        h=float(step["strength"]) * sigma,
        sigma=sigma,
        fast_mode=True,
        preserve_range=True,
    )
    return np.where(values == values.min(), values, out).astype(np.float32, copy=False)


def median(values: np.ndarray, step: Step, spacing: Sequence[float], name: str) -> np.ndarray:
    """The median of the box of `radius` voxels around each voxel; the edge goes on outside."""
    del spacing, name
    from scipy import ndimage

    radius = step["radius"]
    size = [2 * int(r) + 1 for r in (radius if isinstance(radius, Sequence) else [radius] * 3)]
    return ndimage.median_filter(values, size=size, mode="nearest")


def clahe(values: np.ndarray, step: Step, spacing: Sequence[float], name: str) -> np.ndarray:
    """Contrast-limited adaptive histogram equalisation in 3-D, to 0..1 (K. Zuiderveld, Graphics Gems IV; scikit-image).

    Voxels of the lowest value, such as a background of zeros, come out as 0.
    """
    del spacing, name
    low, high = values.min(), values.max()
    if low == high:
        return np.zeros_like(values)
    lowest = values == low
    scaled = (values - low) / (high - low)
    exposure = importlib.import_module("skimage.exposure")
    tile = [max(1, round(n / step["tiles"])) for n in values.shape]
    out = exposure.equalize_adapthist(scaled, kernel_size=tile, clip_limit=float(step["clip"]), nbins=_BINS)
    out = np.ascontiguousarray(out, np.float32)
    out[lowest] = 0
    return out


def nyul(values: np.ndarray, step: Step, spacing: Sequence[float], name: str) -> np.ndarray:
    """Maps the image's own landmarks onto the learnt ones, linearly between them (see `standard_scale`).

    Beyond the outermost landmarks the nearest piece goes on. With mask 'nonzero' zeros stay 0.
    """
    del spacing
    own, target = landmarks(values, step, name), np.asarray(step["scale"])
    keep = np.r_[True, np.diff(own) > 0]  # equal percentiles (an image of few values) are one landmark
    own, target = own[keep], target[keep]
    if len(own) < 2:
        raise UserError(f"{name}: enhance='nyul' found one value only inside its mask. Leave the step out for it.")
    out = np.interp(values, own, target).astype(np.float32)
    for side, (a, b) in ((values < own[0], (0, 1)), (values > own[-1], (-1, -2))):
        slope = (target[a] - target[b]) / (own[a] - own[b])
        out[side] = target[a] + (values[side] - own[a]) * slope
    if step["mask"] == "nonzero":
        out[values == 0] = 0
    return out


def window(values: np.ndarray, step: Step, spacing: Sequence[float], name: str) -> np.ndarray:
    """Clips to a CT window; the values stay HU."""
    del spacing, name
    return np.clip(values, np.float32(step["low"]), np.float32(step["high"]))


def body(values: np.ndarray, step: Step, spacing: Sequence[float], name: str) -> np.ndarray:
    """Sets what lies outside the body to the image's lowest value: Otsu's threshold, largest part, holes filled.

    Holes are filled in the whole and in every slice across `axis` (from foot to head), because lungs and airways are
    open where the volume ends.
    """
    del spacing, name
    return np.where(body_mask(values, int(step["axis"])), values, values.min())


# Name -> (function, its options with their defaults, package that must be installed or None). 'brain' needs another
# modality beside the image, so `run` calls `_masked` for it.
STEPS: dict[str, tuple[Callable[..., np.ndarray] | None, dict[str, Any], str | None]] = {
    "n4": (n4, {"shrink": 4, "iterations": [50, 50, 50, 50], "convergence": 1e-3, "mask": "otsu"}, "SimpleITK"),
    "nlm": (nlm, {"strength": 0.8, "patch": 3, "search": 3}, "skimage"),
    "median": (median, {"radius": 1}, None),
    "clahe": (clahe, {"tiles": 8, "clip": 0.01}, "skimage"),
    "nyul": (nyul, {"percentiles": [1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 99], "mask": "mean"}, None),
    "window": (window, {"window": "", "low": None, "high": None}, None),
    "body": (body, {}, None),
    "brain": (None, {"mask": ""}, None),
}
"""What `data.preprocess.enhance` may name."""

_MASKS = {"n4": ("otsu", "nonzero"), "nyul": ("mean", "nonzero", "all")}
_PIP = {"SimpleITK": "SimpleITK", "skimage": "scikit-image"}


# ------------------------------------------------------------------------------------------------------ the user's spec


def check(steps: Any, modalities: Sequence[str], orientation: str = "RAS") -> tuple[dict[str, Any], ...]:
    """The steps of `data.preprocess.enhance` as full tables.

    Args:
      steps: names, names with one word ('window:lung'), or tables such as {'name': 'n4', 'modalities': ('T1',)}.
      modalities: of the cohort.
      orientation: axis codes of the plan.

    Returns:
      For each step its name, `modalities` (all by default, save a brain mask's) and every option; JSON can hold them.

    Raises:
      UserError: an unknown step, option, modality or value, or a package that is not installed.
    """
    where = "data.preprocess.enhance"
    if isinstance(steps, str) or hasattr(steps, "keys"):
        raise UserError(f"{where}={steps!r}: give a tuple of steps, such as ('n4',) with its comma")
    given = [_as_table(step, where) for step in steps]
    masks = mask_modalities({"mask": "", **step} for step in given)
    return tuple(_full(step, where, modalities, masks, orientation) for step in given)


def _as_table(step: Any, where: str) -> dict[str, Any]:
    if isinstance(step, str):
        name, _, word = step.partition(":")
        table: dict[str, Any] = {"name": name}
        if word:
            table[{"window": "window", "brain": "mask"}.get(name, "option")] = word
    elif hasattr(step, "keys"):
        table = dict(step)
    else:
        raise UserError(f"{where}: a step is a name or a table with a name, not {step!r}")
    if table.get("name") not in STEPS:
        raise UserError(
            f"{where}: unknown step {table.get('name')!r}{nearest(str(table.get('name')), STEPS)} "
            f"(known: {', '.join(STEPS)})"
        )
    return table


def _full(
    step: Mapping[str, Any], where: str, modalities: Sequence[str], masks: set[str], orientation: str
) -> dict[str, Any]:
    name = step["name"]
    where = f"{where}: {name}"
    _, options, package = STEPS[name]
    check_keys(where, step.keys(), ("name", "modalities", *options))
    full: dict[str, Any] = {"name": name, "modalities": [m for m in modalities if m not in masks], **options, **step}
    full = {key: list(value) if isinstance(value, tuple) else value for key, value in full.items()}
    if isinstance(full["modalities"], str):
        full["modalities"] = [full["modalities"]]
    check_keys(f"{where}: modalities", full["modalities"], tuple(modalities))
    if name in _MASKS and full["mask"] not in _MASKS[name]:
        raise UserError(f"{where}: mask={full['mask']!r} (known: {', '.join(_MASKS[name])})")
    for key in ("shrink", "patch", "search", "tiles", "strength", "convergence", "clip"):
        _positive(where, key, full.get(key, 1))
    for number in full.get("iterations", [1]):
        _positive(where, "iterations", number)
    if name == "median":
        radius = full["radius"] if isinstance(full["radius"], list) else [full["radius"]] * 3
        if len(radius) != 3 or not all(isinstance(r, int) and r >= 0 for r in radius):
            raise UserError(f"{where}: radius={full['radius']!r} must be one or three whole numbers of voxels")
    elif name == "nyul":
        at = full["percentiles"]
        if len(at) < 2 or any(not 0 <= p <= 100 for p in at) or any(a >= b for a, b in itertools.pairwise(at)):
            raise UserError(f"{where}: percentiles={at} must rise, from 0 to 100, two at least")
    elif name == "window":
        full |= dict(zip(("low", "high"), _limits(full, where), strict=True))
    elif name == "body":
        full["axis"] = next(i for i, code in enumerate(orientation) if code in "SI")
    elif name == "brain" and full["mask"] not in modalities:
        raise UserError(
            f"{where}: mask={full['mask']!r} must be the modality that holds the brain mask"
            f"{nearest(full['mask'], modalities)} (there are: {', '.join(modalities)}); no mask is guessed"
        )
    if package:
        _require(package, name)
    return full


def _positive(where: str, key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{where}: {key}={value!r} must be a positive number")


def _limits(step: Mapping[str, Any], where: str) -> tuple[float, float]:
    low, high = step["low"], step["high"]
    if step["window"]:
        if low is not None or high is not None:
            raise UserError(f"{where}: window={step['window']!r} and limits of its own are both given; choose one")
        if step["window"] not in WINDOWS:
            raise UserError(
                f"{where}: unknown window {step['window']!r}{nearest(step['window'], WINDOWS)} "
                f"(known: {', '.join(WINDOWS)}, or low and high in HU)"
            )
        return WINDOWS[step["window"]]
    if not all(isinstance(v, int | float) and math.isfinite(v) for v in (low, high)) or not low < high:
        raise UserError(f"{where}: low={low!r}, high={high!r}: give a window's name, or low below high in HU")
    return float(low), float(high)


@functools.lru_cache
def _require(package: str, step: str) -> None:
    try:
        importlib.import_module(package)
    except ImportError:
        name = _PIP[package]
        raise UserError(
            f"data.preprocess.enhance: {step} needs {name}, which is not installed: pip install {name}"
        ) from None


# ---------------------------------------------------------------------------------------------------------- running


def run(
    values: np.ndarray,
    modality: str,
    steps: Iterable[Step],
    spacing: Sequence[float],
    name: str,
    masks: Mapping[str, np.ndarray] | None = None,
) -> np.ndarray:
    """Runs the steps that are meant for `modality` on one image.

    Args:
      values: [X, Y, Z] float32 in the plan's axis order; left as it is.
      steps: full tables, from `check` (and `learn`).
      spacing: mm along the axes.
      name: what error messages call the image.
      masks: modality -> [X, Y, Z], those that `mask_modalities` names, where the case has them.

    Returns:
      [X, Y, Z] float32.

    Raises:
      UserError: naming the image a step cannot be applied to, or a package that is missing.
    """
    for step in steps:
        function, _, package = STEPS[step["name"]]
        if modality not in step["modalities"]:
            continue
        if values.min() == values.max():
            break  # nothing left to see in it, which the caller tells
        if package:
            _require(package, step["name"])
        if function is None:
            values = _masked(values, (masks or {}).get(step["mask"]), step["mask"], name)
        else:
            own = {**step, "scale": step["scales"][modality]} if step["name"] == "nyul" else step
            values = function(values, own, spacing, name)
    return values


def mask_modalities(steps: Iterable[Step]) -> set[str]:
    """Modalities that steps take as masks."""
    return {step["mask"] for step in steps if step["name"] == "brain"}


def _masked(values: np.ndarray, mask: np.ndarray | None, modality: str, name: str) -> np.ndarray:
    if mask is None:
        raise UserError(f"{name}: its case has no {modality}, which data.preprocess.enhance takes as the brain mask")
    inside = mask > 0.5
    if not inside.any():
        raise UserError(f"{name}: the brain mask ({modality}) of its case is empty. Give the right file.")
    return np.where(inside, values, np.float32(0))


def learn(step: Step, measured: Iterable[Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """A 'nyul' step with what it learns from the training cases.

    Args:
      step: from `check`.
      measured: for each case modality -> its `landmarks`, after the steps before this one.

    Returns:
      The step with `scales`: modality -> landmarks of the standard scale.
    """
    found: dict[str, list[np.ndarray]] = {modality: [] for modality in step["modalities"]}
    for case in measured:
        for modality, marks in case.items():
            found[modality].append(marks)
    scales = {}
    for modality, rows in found.items():
        if not rows:
            raise UserError(f"data.preprocess.enhance: nyul: no training case has {modality}; name its modalities")
        scales[modality] = standard_scale(np.stack(rows)).tolist()
    return {**step, "scales": scales}


# --------------------------------------------------------------------------------------------------------- measuring


def landmarks(values: np.ndarray, step: Step, name: str) -> np.ndarray:
    """The image's intensities at the step's percentiles, inside its mask, [K] float64.

    Mask 'mean': voxels above the mean of all, the foreground of L. Nyul and J. Udupa; 'nonzero'; or 'all'.
    """
    if step["mask"] == "mean":
        inside = values[values > values.mean(dtype=np.float64)]
    elif step["mask"] == "nonzero":
        inside = values[values != 0]
    else:
        inside = values.ravel()
    if not len(inside):
        raise UserError(f"{name}: enhance='nyul' finds no voxel inside its mask. Give the right file.")
    return np.percentile(inside, step["percentiles"]).astype(np.float64)


def standard_scale(marks: np.ndarray) -> np.ndarray:
    """Landmarks of the standard scale from those of the training images, [N, K] -> [K].

    L. Nyul and J. Udupa, "On standardizing the MR image intensity scale", Magnetic Resonance in Medicine 42(6), 1999:
    each image is mapped so that its first and last landmark are 0 and 100, then the landmarks are averaged.
    """
    low, high = marks[:, :1], marks[:, -1:]
    usable = (high > low)[:, 0]
    if not usable.any():
        raise UserError("data.preprocess.enhance: nyul: every training image has one value only inside its mask")
    return (100 * (marks - low) / np.where(high > low, high - low, 1))[usable].mean(axis=0)


def otsu(values: np.ndarray) -> float:
    """The threshold that separates two classes best (N. Otsu, IEEE Trans. SMC 9(1), 1979), from 256 bins."""
    low = float(values.min())
    high = float(np.percentile(values, _HOT))
    if not high > low:
        high = float(values.max())
    counts, edges = np.histogram(
        np.minimum(values, np.float32(high)), bins=_BINS, range=(low, max(high, np.nextafter(low, np.inf)))
    )
    centers = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts, dtype=np.float64)[:-1]
    above = values.size - below
    sums = np.cumsum(counts * centers)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums[:-1] / below - (sums[-1] - sums[:-1]) / above) ** 2
    # Between two far classes many thresholds are equally good: the middle one.
    between = np.nan_to_num(between)
    best = np.flatnonzero(between >= between.max() * (1 - 1e-9))
    return float(edges[best[len(best) // 2] + 1])


def body_mask(values: np.ndarray, axis: int) -> np.ndarray:
    """[X, Y, Z] bool: the largest connected part above Otsu's threshold, with its holes and those of its slices filled.

    Args:
      axis: from foot to head.
    """
    from scipy import ndimage

    parts, count = ndimage.label(values > otsu(values))
    if count == 0:
        return np.ones(values.shape, bool)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    inside = ndimage.binary_fill_holes(parts == sizes.argmax())
    for piece in np.moveaxis(inside, axis, 0):
        piece[...] = ndimage.binary_fill_holes(piece)
    return inside


def noise_level(values: np.ndarray) -> float:
    """Standard deviation of the noise, from pseudo-residuals: sqrt(6/7) (u - mean of its six neighbours).

    P. Coupe et al., IEEE TMI 27(4), 2008; robustly, 1.4826 times the median absolute deviation over voxels that are not
    the lowest value (a background of zeros has no noise).
    """
    if min(values.shape) < 3:
        return 0.0
    core = values[1:-1, 1:-1, 1:-1]
    neighbours = np.zeros(core.shape, np.float32)
    for axis in range(3):
        for step in (0, 2):
            index = [slice(1, -1)] * 3
            index[axis] = slice(step, values.shape[axis] - 2 + step)
            neighbours += values[tuple(index)]
    residual = (core - neighbours / 6)[core > values.min()] * math.sqrt(6 / 7)
    if not len(residual):
        return 0.0
    return float(1.4826 * np.median(np.abs(residual - np.median(residual))))
