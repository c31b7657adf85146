"""The published rules of nnU-Net: target spacing, patch, stages, kernels, and its own estimate of memory.

Sources: F. Isensee et al., "nnU-Net: a self-configuring method...", Nature Methods 18 (2021), with its supplementary
note on the rules; F. Isensee et al., "nnU-Net Revisited" (MICCAI 2024) for the residual encoders; the constants of
`PRESETS` are those of the released planners. Everything here is arithmetic on shapes.

Axes are (x, y, z) throughout. nnU-Net lists them (z, y, x), the coarsest first; where two axes tie it takes its last.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from medjax.errors import UserError

Triple = tuple[int, int, int]

ANISOTROPY = 3.0  # a spacing, and a shape, that differ by more than this make an axis a low-resolution one
MIN_EDGE = 4  # voxels that pooling leaves an axis
START_VOXELS = 256**3  # of the patch that shrinking begins with
WIDTH, MAX_WIDTH = 32, 320
MIN_BATCH = 2
COVERED = 0.05  # of the voxels of all training cases: the largest share that one batch may show


@dataclass(frozen=True)
class Topology:
    """A patch and the stages of the network that takes it.

    Attributes:
      patch: voxels. factors: downsampling into each stage after the first. kernels: of each stage's convolutions.
    """

    patch: Triple
    factors: tuple[Triple, ...]
    kernels: tuple[Triple, ...]

    @property
    def stages(self) -> int:
        return len(self.kernels)

    @property
    def multiple(self) -> Triple:
        """What the patch is a multiple of."""
        return _triple(math.prod(f[a] for f in self.factors) for a in range(3))

    @property
    def voxels(self) -> tuple[int, ...]:
        """Voxels of the feature maps of each stage."""
        counts = [math.prod(self.patch)]
        for factor in self.factors:
            counts.append(counts[-1] // math.prod(factor))
        return tuple(counts)

    def features(self, width: int = WIDTH) -> tuple[int, ...]:
        """Channels of each stage: doubled from `width`, up to ten times it (320 of 32)."""
        return tuple(min(width * 2**i, width * MAX_WIDTH // WIDTH) for i in range(self.stages))


@dataclass(frozen=True)
class Preset:
    """One of nnU-Net's released planners.

    Attributes:
      gigabytes: the memory it is meant for. elements: feature-map elements that fill that memory at batch 2.
      blocks: residual blocks of each encoder stage; empty: two plain convolutions. covered: see `COVERED`.
    """

    gigabytes: float
    elements: float
    blocks: tuple[int, ...] = ()
    covered: float = 1.0


_BLOCKS = (1, 3, 4, *(6,) * 10)
PRESETS = {
    "nnunet": Preset(8, 560e6, covered=COVERED),
    "nnunet-resenc-m": Preset(8, 680e6, _BLOCKS),
    "nnunet-resenc-l": Preset(24, 2100e6, _BLOCKS),
    "nnunet-resenc-xl": Preset(40, 3600e6, _BLOCKS),
}


def target_spacing(spacings: np.ndarray, shapes: np.ndarray) -> tuple[float, float, float]:
    """The spacing to resample to, from spacings and shapes [cases, 3] of the training cases.

    The median, save that an axis of far lower resolution (in millimetres and in voxels) takes the 10th percentile of
    its spacings: at the median, the cases of thin slices would lose most of them.
    """
    spacings, shapes = np.asarray(spacings, float), np.asarray(shapes, float)
    target, size = np.median(spacings, axis=0), np.median(shapes, axis=0)
    worst = int(np.argmax(target))
    others = [a for a in range(3) if a != worst]
    coarsest = max(target[others])
    if target[worst] > ANISOTROPY * coarsest and size[worst] * ANISOTROPY < min(size[others]):
        # Never finer than the other axes, of which it would then be one.
        target[worst] = max(float(np.percentile(spacings[:, worst], 10)), coarsest)
    x, y, z = (float(f"{s:.6g}") for s in target)
    return x, y, z


def resampled(shapes: np.ndarray, spacings: np.ndarray, target: Sequence[float]) -> np.ndarray:
    """Shapes [cases, 3] at the target spacing."""
    return np.maximum(1, np.round(np.asarray(shapes) * np.asarray(spacings) / np.asarray(target))).astype(int)


def topology(spacing: Sequence[float], size: Sequence[float]) -> Topology:
    """The stages for patches of about `size` voxels at `spacing`; the patch is `size`, rounded up to what fits.

    In each stage the axes are halved whose spacing is within a factor 2 of the finest that can still be halved, which
    an axis can down to `MIN_EDGE`. An axis is convolved over (kernel 3) from the stage on at which its spacing is
    within a factor 2 of the finest; the last stage convolves over all.
    """
    at, left, kernel = list(map(float, spacing)), list(map(float, size)), [1, 1, 1]
    factors: list[Triple] = []
    kernels: list[Triple] = []
    while True:
        able = [a for a in range(3) if left[a] >= 2 * MIN_EDGE]
        finest = min((at[a] for a in able), default=0.0)
        halved = [a for a in able if at[a] / finest < 2]
        # One axis alone must be worth a stage of its own.
        if not halved or (len(halved) == 1 and left[halved[0]] < 3 * MIN_EDGE):
            break
        kernel = [3 if at[a] / min(at) < 2 else kernel[a] for a in range(3)]
        kernels.append(_triple(kernel))
        factors.append(_triple(2 if a in halved else 1 for a in range(3)))
        for a in halved:
            at[a] *= 2
            left[a] = math.ceil(left[a] / 2)
    multiple = [math.prod(f[a] for f in factors) for a in range(3)]
    patch = _triple(math.ceil(n / m) * m for n, m in zip(size, multiple, strict=True))
    return Topology(patch, tuple(factors), (*kernels, (3, 3, 3)))


def largest(spacing: Sequence[float], median: Sequence[float]) -> Topology:
    """What shrinking begins with: a patch as wide in millimetres along each axis, of `START_VOXELS`, within `median`.

    Args:
      median: shape of the training cases at `spacing`.

    Raises:
      UserError: the cases are too small for a network of two stages.
    """
    start = topology(spacing, _start_size(spacing, median))
    if start.stages < 2:
        shape = "×".join(f"{n:g}" for n in median)
        raise UserError(
            f"the training cases are of {shape} voxels at spacing {'×'.join(f'{s:g}' for s in spacing)} mm (median): "
            f"too small to be halved even once, which needs two axes of {2 * MIN_EDGE} voxels. Set a finer "
            "data.preprocess.spacing."
        )
    return start


def _start_size(spacing: Sequence[float], median: Sequence[float]) -> list[float]:
    per_mm = 1 / np.asarray(spacing, float)
    cube = per_mm * (START_VOXELS / per_mm.prod()) ** (1 / 3)
    return [min(round(c), m) for c, m in zip(cube.tolist(), median, strict=True)]


def shrink(start: Topology, spacing: Sequence[float], median: Sequence[float]) -> Topology | None:
    """The next smaller patch: the axis that is largest against the `median` shape gives up one step; None at the end.

    The step is the smallest that leaves the axis a multiple of what the stages then ask for.
    """
    for axis in _axes_to_reduce(start.patch, spacing, median):
        step, patch = start.multiple[axis], list(start.patch)
        if patch[axis] - step < MIN_EDGE:
            continue
        patch[axis] -= step
        patch[axis] += step - topology(spacing, patch).multiple[axis]
        smaller = topology(spacing, patch)
        if smaller.stages > 1 and math.prod(smaller.patch) < math.prod(start.patch):
            return smaller
    return None


def sequence(spacing: Sequence[float], median: Sequence[float]) -> Iterator[Topology]:
    """`largest` and every smaller one after it."""
    step: Topology | None = largest(spacing, median)
    while step is not None:
        yield step
        step = shrink(step, spacing, median)


def fixed(patch: Sequence[int], multiple: Triple) -> Topology:
    """A patch for a network whose stages are its own and halve by `multiple` in all; `kernels` say nothing."""
    return Topology(_triple(patch), (multiple,), ((3, 3, 3),) * 2)


def patches_of(multiple: Triple, spacing: Sequence[float], median: Sequence[float]) -> Iterator[Topology]:
    """Ever smaller patches for a network whose stages are its own; `multiple`: its downsampling in all."""
    patch = [math.ceil(n / m) * m for n, m in zip(_start_size(spacing, median), multiple, strict=True)]
    while True:
        yield fixed(patch, multiple)
        axes = [a for a in _axes_to_reduce(_triple(patch), spacing, median) if patch[a] > multiple[a]]
        if not axes:
            return
        patch[axes[0]] -= multiple[axes[0]]


def _axes_to_reduce(patch: Triple, spacing: Sequence[float], median: Sequence[float]) -> list[int]:
    """Axes, the one largest against the median first; of equals the coarsest last, then x before y before z."""
    coarsest = max(reversed(range(3)), key=lambda a: spacing[a])
    return sorted(range(3), key=lambda a: (-patch[a] / median[a], a == coarsest, a))


def elements(net: Topology, outputs: int, blocks: Sequence[int] = (), width: int = WIDTH) -> int:
    """Elements of all feature maps that convolutions of nnU-Net's network write: its measure of memory.

    Args:
      outputs: channels of the head. blocks: see `Preset`.
    """
    features, voxels = net.features(width), net.voxels
    sizes = [f * v for f, v in zip(features, voxels, strict=True)]
    if blocks:
        # A stem; two convolutions a block; one on the shortcut where a stage begins; in the decoder one convolution.
        encoder = sizes[0] + sum(
            (2 * n + (i > 0)) * size for i, (n, size) in enumerate(zip(blocks, sizes, strict=False))
        )
        decoder = 2 * sum(sizes[:-1])
    else:
        encoder = 2 * sum(sizes)
        decoder = 3 * sum(sizes[:-1])
    return encoder + decoder + outputs * voxels[0]


def batch_limit(patch: Sequence[int], median: Sequence[float], cases: int, covered: float = COVERED) -> int:
    """The largest batch that shows no more than the share `covered` of the training voxels; at least `MIN_BATCH`."""
    return max(MIN_BATCH, round(float(np.prod(median)) * cases * covered / math.prod(patch)))


def like_nnunet(
    preset: Preset,
    spacing: Sequence[float],
    median: Sequence[float],
    cases: int,
    outputs: int,
    gigabytes: float | None = None,
) -> tuple[Topology, int]:
    """The patch, stages and batch size that nnU-Net's planner would choose.

    Args:
      median: shape of the training cases at `spacing`. cases: how many they are.
      outputs: labels with the background. gigabytes: other memory than the preset's.
    """
    room = preset.elements * (gigabytes or preset.gigabytes) / preset.gigabytes
    for net in sequence(spacing, median):
        need = elements(net, outputs, preset.blocks)
        if need <= room:
            break
    else:
        raise UserError(
            f"--budget={gigabytes:g}GB: by nnU-Net's estimate even the patch {net.patch} needs "
            f"{need / preset.elements * preset.gigabytes:.2f} GB; raise the budget"
        )
    return net, max(MIN_BATCH, min(round(room / need * 2), batch_limit(net.patch, median, cases, preset.covered)))


def _triple(numbers: Iterator[int] | Sequence[int]) -> Triple:
    x, y, z = numbers
    return int(x), int(y), int(z)
