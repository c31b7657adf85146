"""Each transform against what it says: geometry, formulas, spectra, statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from medjax.augment import artefacts, intensity, mixing, policy, spatial
from medjax.augment.base import Draws, Scene, Transform
from medjax.errors import UserError
from medjax.ops import warp

SHAPE = (12, 12, 12)


def run(
    transform: Transform, image: Any, *, masks: dict[str, Any] | None = None, spacing: Sequence[float] = (1, 1, 1),
    seed: int = 0, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """The batch [B, ...] after `transform`, on all examples whose gate opens."""
    n, channels = image.shape[0], image.shape[-1]
    options = {f.name: getattr(transform, f.name) for f in dataclasses.fields(transform)}
    batch = {
        "image": jnp.asarray(image),
        "spacing": jnp.tile(jnp.asarray(spacing, jnp.float32), (n, 1)),
        "modality": jnp.ones((n, channels), bool),
        "example": jnp.arange(n),
        **{f"{k}/target": jnp.asarray(v) for k, v in (masks or {}).items()},
        **more,
    }
    rules = {"transforms": ((transform.name, options),)}
    return jax.jit(policy.build(rules, tuple(masks or ()), seed))(batch)


def moved(image: Any, mask: Any, *moves: spatial.Move, labels: str = "nearest") -> tuple[np.ndarray, np.ndarray]:
    """One image [X, Y, Z, C] and mask through given moves."""
    batch = {"image": jnp.asarray(image)[None], "a/target": jnp.asarray(mask)[None]}
    joined = jax.tree.map(lambda x: x[None], spatial.join(moves))
    out = spatial.apply(batch, [spatial.Shift()] * len(moves), joined, ["a/target"], labels)
    return np.asarray(out["image"][0]), np.asarray(out["a/target"][0])


def noise(shape: Sequence[int] = (*SHAPE, 2), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def ball(shape: Sequence[int], radius: float, spacing: Sequence[float] = (1, 1, 1)) -> np.ndarray:
    """A ball of `radius` mm about the centre of the patch."""
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)]
    return (sum(a**2 for a in np.meshgrid(*axes, indexing="ij")) <= radius**2).astype(np.uint8)


ON = jnp.ones((), bool)


# --- moves -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("axis", "plane"), [(0, (1, 2)), (1, (2, 0)), (2, (0, 1))])
def test_a_quarter_turn_is_rot90(axis: int, plane: tuple[int, int]) -> None:
    image, mask = noise(), np.random.default_rng(1).integers(0, 5, SHAPE).astype(np.uint8)
    angles = jnp.zeros(3).at[axis].set(jnp.pi / 2)
    turn = spatial.move(ON, spatial.rotation(angles))
    got, labels = moved(image, mask, turn)
    np.testing.assert_allclose(got, np.rot90(image, -1, plane), atol=1e-5)
    np.testing.assert_array_equal(labels, np.rot90(mask, -1, plane))
    back, _ = moved(image, mask, turn, spatial.move(ON, spatial.rotation(-angles)))
    np.testing.assert_allclose(back, image, atol=1e-5)


def test_neighbours_are_done_in_order() -> None:
    image, mask = noise(), np.zeros(SHAPE, np.uint8)
    turn = spatial.move(ON, spatial.rotation(jnp.array([0.0, 0.0, jnp.pi / 2])))
    step = spatial.move(ON, shift=jnp.array([2.0, 0.0, 0.0]))
    one, _ = moved(image, mask, turn, step)
    two, _ = moved(moved(image, mask, turn)[0], mask, step)
    np.testing.assert_allclose(one, two, atol=1e-5)
    other, _ = moved(image, mask, step, turn)
    assert not np.allclose(other, one, atol=1e-2)


def test_rotation_turns_millimetres_not_voxels() -> None:
    # A rod along x of 41 mm, turned by 90 degrees about z in a grid of 1 × 2 × 1 mm, is a rod along y of 41 mm: half as
    # many voxels.
    image = np.zeros((61, 61, 3, 1), np.float32)
    image[10:51, 29:32] = 1.0
    angle = spatial.rotation(jnp.array([0.0, 0.0, jnp.pi / 2]))
    out, mask = moved(image, image[..., 0] > 0, spatial.move(ON, spatial.in_voxels(angle, jnp.array([1.0, 2.0, 1.0]))))
    where = np.argwhere(out[:, :, 1, 0] > 0.5)
    extent = (where.max(0) - where.min(0)) * np.array([1.0, 2.0])
    assert abs(extent[1] - 40) <= 2
    assert extent[0] <= 6
    assert mask.dtype == bool
    clear = np.abs(out[..., 0] - 0.5) > 0.1  # away from ties between two voxels
    np.testing.assert_array_equal(mask[clear], out[..., 0][clear] > 0.5)


def test_mirroring_twice_changes_nothing_and_pairs_trade_places() -> None:
    image = noise((40, 4, 3, 2, 1))
    mask = np.random.default_rng(1).integers(0, 6, (40, 4, 3, 2)).astype(np.uint8)
    flip = spatial.Mirror(axes=(0, 2), swap=((1, 2), ("b", 4, 5), (300, 301)))
    once = run(flip, image, masks={"a": mask, "b": mask})
    twice = run(flip, once["image"], masks={k: once[f"{k}/target"] for k in "ab"})
    np.testing.assert_array_equal(twice["image"], image)
    np.testing.assert_array_equal(twice["a/target"], mask)
    np.testing.assert_array_equal(twice["b/target"], mask)
    pairs = {"a": np.array([0, 2, 1, 3, 4, 5]), "b": np.array([0, 2, 1, 3, 5, 4])}
    seen = set()
    for i in range(40):
        for axes in ((), (0,), (2,), (0, 2)):
            if np.array_equal(once["image"][i], np.flip(image[i], axes)):
                seen.add(axes)
                for task, table in pairs.items():
                    want = np.flip(mask[i], axes)
                    np.testing.assert_array_equal(once[f"{task}/target"][i], table[want] if 0 in axes else want)
                break
        else:
            raise AssertionError("neither flipped nor left")
    assert len(seen) == 4
    with pytest.raises(UserError, match="300 does not occur in the masks of task 'a'"):
        run(spatial.Mirror(swap=((2, 300),)), image, masks={"a": mask})


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.8, 0.8, 2.0)])
def test_scaling_a_ball_scales_its_volume(spacing: tuple[float, ...]) -> None:
    shape = (44, 44, 20) if spacing[2] > 1 else (40, 40, 40)
    mask = ball(shape, 10, spacing)
    out = run(
        spatial.Scale(factor=(1.3, 1.3)), mask[None, ..., None].astype(np.float32), masks={"a": mask[None]},
        spacing=spacing,
    )  # fmt: skip
    assert np.asarray(out["a/target"]).sum() / mask.sum() == pytest.approx(1.3**3, rel=0.04)
    assert np.asarray(out["image"]).sum() / mask.sum() == pytest.approx(1.3**3, rel=0.04)
    # Turned, a ball in millimetres stays one.
    turned = run(spatial.Rotate(degrees=90.0), mask[None, ..., None].astype(np.float32), masks={"a": mask[None]},
                 spacing=spacing)  # fmt: skip
    assert (np.asarray(turned["a/target"][0]) != mask).mean() < 0.02


def test_shear_and_elastic_keep_to_the_plane_of_thick_slices() -> None:
    thick = Scene((16, 16, 8), 1, jnp.array([1.0, 1.0, 4.0]), jnp.ones(1, bool))
    row = jax.random.uniform(jax.random.key(0), (4000,))
    shear = np.asarray(spatial.Shear(amount=0.3).plan(Draws(row), thick).matrix)
    assert abs(shear[0, 1]) > 0.01
    np.testing.assert_array_equal(shear[2], [0, 0, 1])
    np.testing.assert_array_equal(shear[:, 2], [0, 0, 1])
    control = np.asarray(spatial.Elastic(std=3.0).plan(Draws(row), thick).control)
    assert not control[..., 2].any()
    assert control[..., :2].std() > 0.5
    free = np.asarray(spatial.Elastic(std=3.0, inplane=0.0).plan(Draws(row), thick).control)
    assert free[..., 2].std() > 0.1


def test_elastic_never_folds() -> None:
    shape = (24, 20, 16)
    scene = Scene(shape, 1, jnp.ones(3), jnp.ones(1, bool))
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).astype(float)
    for seed in range(5):
        row = jax.random.uniform(jax.random.key(seed), (4000,))
        control = spatial.Elastic(std=50.0, points=6).plan(Draws(row), scene).control  # far more than there is room for
        at = grid + np.asarray(warp.spline_field(control, shape))
        jacobian = np.stack([np.stack(np.gradient(at[..., i]), -1) for i in range(3)], -2)
        assert np.linalg.det(jacobian).min() > 0
        assert np.abs(at - grid).max() > 0.5


def test_a_shift_moves_whole_voxels() -> None:
    one = np.random.default_rng(0).permutation(np.prod(SHAPE)).reshape(SHAPE) + 1.0  # no value twice
    image = np.stack([one] * 8)[..., None].astype(np.float32)
    steps = set()
    for after in np.asarray(run(spatial.Shift(fraction=0.25), image)["image"])[..., 0]:
        where = np.argwhere(after)
        moved = {tuple(w - np.argwhere(one == after[tuple(w)])[0]) for w in where[:: len(where) // 20]}
        assert len(moved) == 1  # every voxel left is one of before, moved alike
        step = np.array(moved.pop())
        assert len(where) == np.prod(np.array(SHAPE) - np.abs(step))
        assert np.abs(step).max() <= 3
        steps.add(tuple(step))
    assert len(steps) > 5


# --- intensities -----------------------------------------------------------------------------------------------------


def test_gaussian_noise_has_the_deviation_it_says() -> None:
    image = np.zeros((60, *SHAPE, 2), np.float32)
    out = np.asarray(run(intensity.Noise(std=0.4), image)["image"])
    std = out.std((1, 2, 3, 4))
    assert 0.33 < std.max() < 0.42
    assert abs(std.mean() - 0.2) < 0.05
    np.testing.assert_allclose((out / std[:, None, None, None, None] > 1).mean(), 0.1587, atol=0.005)
    variance = np.asarray(run(intensity.Noise(variance=(0.25, 0.25)), image)["image"]).var((1, 2, 3, 4))
    np.testing.assert_allclose(variance, 0.25, rtol=0.1)


def test_rician_noise_is_that_of_a_magnitude() -> None:
    image = np.zeros((1, 24, 24, 24, 1), np.float32)
    image[:, 12:] = 50.0
    out = np.asarray(run(intensity.Rician(std=1.0), image)["image"])[0, ..., 0]
    dark, bright = out[:12], out[12:]
    # In the dark a Rayleigh distribution, mean s √(π/2) and variance (2 - π/2) s²; in the bright a Gaussian.
    s = bright.std()
    np.testing.assert_allclose(dark.mean(), s * np.sqrt(np.pi / 2), rtol=0.03)
    np.testing.assert_allclose(dark.var(), (2 - np.pi / 2) * s**2, rtol=0.08)
    np.testing.assert_allclose(bright.mean(), np.sqrt(50**2 + s**2), atol=0.05)


def test_blur_is_scipys_in_voxels_or_millimetres() -> None:
    image = noise((2, *SHAPE, 2))
    for unit, spacing, sigma in (("voxel", (1, 1, 2), (0.9, 0.9, 0.9)), ("mm", (1, 1, 2), (0.9, 0.9, 0.45))):
        out = run(intensity.Blur(sigma=(0.9, 0.9), unit=unit), image, spacing=spacing)["image"]
        for i in range(2):
            for c in range(2):
                want = scipy.ndimage.gaussian_filter(image[i, ..., c], sigma)
                np.testing.assert_allclose(out[i, ..., c], want, atol=1e-5)


def test_low_resolution_repeats_what_a_coarse_grid_has() -> None:
    image = noise((6, *SHAPE, 1))
    out = np.asarray(run(intensity.LowResolution(factor=(0.5, 0.5), axes="one"), image)["image"])
    seen = set()
    for before, after in zip(image[..., 0], out[..., 0], strict=True):
        changed = [a for a in range(3) if not np.allclose(after, before)]
        assert changed
        for axis in range(3):
            lines, made = np.moveaxis(before, axis, -1), np.moveaxis(after, axis, -1)
            want = scipy.ndimage.zoom(lines[..., 1::2], (1, 1, 2), order=1, grid_mode=True, mode="nearest")
            if np.allclose(made, want, atol=1e-5):
                seen.add(axis)
    assert len(seen) >= 2
    half = run(intensity.LowResolution(factor=(0.01, 1.0), mm=(2.0, 2.0), smooth=True), image)["image"]
    assert np.asarray(half).std() < 0.5 * image.std()
    fine = run(intensity.LowResolution(factor=(0.01, 1.0), mm=(0.5, 1.0), smooth=True), image)["image"]
    np.testing.assert_array_equal(fine, image)  # no finer grid than the image's own


def test_tones_keep_what_they_promise() -> None:
    image = noise((3, *SHAPE, 2))
    space = (1, 2, 3)
    bright = np.asarray(run(intensity.Brightness(std=0.5), image)["image"]) - image
    assert np.ptp(bright, axis=space).max() < 1e-5  # one constant a channel
    assert bright.std() > 0.1
    stretched = np.asarray(run(intensity.Contrast(low=0.5, high=0.5), image)["image"])
    np.testing.assert_allclose(stretched.mean(space), image.mean(space), atol=1e-5)
    np.testing.assert_allclose(stretched.std(space), 0.5 * image.std(space), rtol=1e-4)
    clipped = np.asarray(run(intensity.Contrast(low=1.5, high=1.5, keep_range=True), image)["image"])
    np.testing.assert_array_equal(clipped.max(space), image.max(space))
    curved = np.asarray(run(intensity.Gamma(low=0.5, high=2.0), image)["image"])
    np.testing.assert_allclose(curved.mean(space), image.mean(space), atol=1e-4)
    np.testing.assert_allclose(curved.std(space), image.std(space), rtol=1e-3)
    order = np.argsort(image[0, ..., 0].ravel())
    assert np.all(np.diff(curved[0, ..., 0].ravel()[order]) >= -1e-6)  # monotone
    flat = np.full_like(image, 2.0)
    np.testing.assert_allclose(run(intensity.Gamma(low=0.5, high=2.0), flat)["image"], flat, atol=1e-5)
    unit = np.asarray(run(intensity.Standardize(), image * 30 + 7)["image"])
    np.testing.assert_allclose(unit.mean(space), 0, atol=1e-5)
    np.testing.assert_allclose(unit.std(space), 1, atol=1e-4)


def test_a_bias_field_is_smooth_and_positive() -> None:
    image = np.ones((4, 20, 20, 20, 1), np.float32)
    image[:, 0, 0, 0] = 0.0  # the minimum, from which the field counts
    out = np.asarray(run(intensity.Bias(std=0.8), image)["image"])[..., 0]
    assert out[:, 0, 0, 0].max() == 0
    field = np.log(out[:, 1:, 1:, 1:])
    assert field.std() > 0.05
    assert max(np.abs(np.diff(field, n=3, axis=a)).max() for a in (1, 2, 3)) < 0.05  # cubic pieces


def test_a_histogram_keeps_order_and_range() -> None:
    image = noise((3, *SHAPE, 1))
    out = np.asarray(run(intensity.Histogram(), image)["image"])
    for before, after in zip(image, out, strict=True):
        order = np.argsort(before.ravel())
        assert np.all(np.diff(after.ravel()[order]) >= -1e-6)
        np.testing.assert_allclose([after.min(), after.max()], [before.min(), before.max()], atol=1e-5)
        assert np.abs(after - before).max() > 0.05


def test_cutout_blanks_boxes() -> None:
    image = noise((20, *SHAPE, 2)) + 10
    out = np.asarray(run(intensity.Cutout(size=(0.5, 0.5)), image)["image"])
    blank = out == 0
    np.testing.assert_array_equal(blank[..., 0], blank[..., 1])
    np.testing.assert_array_equal(out[~blank], image[~blank])
    for box in blank[..., 0]:
        where = np.argwhere(box)
        assert box.sum() == np.prod(np.ptp(where, axis=0) + 1)  # filled
        assert np.all(np.ptp(where, axis=0) + 1 <= 7)
    mean = np.asarray(run(intensity.Cutout(size=(0.5, 0.5), fill="mean"), image)["image"])
    np.testing.assert_allclose(mean[blank], np.broadcast_to(image.mean((1, 2, 3), keepdims=True), image.shape)[blank],
                               rtol=1e-4)  # fmt: skip


def test_channels_an_example_lacks_are_left_alone() -> None:
    image = noise((2, *SHAPE, 2))
    image[0, ..., 1] = 0
    present = jnp.array([[True, False], [True, True]])
    for transform in (intensity.Noise(std=1.0), intensity.Brightness(), artefacts.Spike(), intensity.Cutout()):
        out = np.asarray(run(transform, image, modality=present)["image"])
        assert not out[0, ..., 1].any()
        assert not np.array_equal(out[0, ..., 0], image[0, ..., 0])


# --- artefacts -------------------------------------------------------------------------------------------------------


def spectra(image: np.ndarray, axis: int) -> np.ndarray:
    return np.fft.fft(image, axis=axis)


def test_ghosting_weakens_every_nth_line() -> None:
    image = noise((6, 12, 12, 12, 1))
    out = np.asarray(run(artefacts.Ghosting(intensity=(0.5, 0.5), ghosts=(3, 3)), image)["image"])
    k = artefacts.frequencies(12)
    weak = (k % 3 == 0) & (k != 0)
    for before, after in zip(image[..., 0], out[..., 0], strict=True):
        right = []
        for axis in range(3):
            want = spectra(before, axis) * np.where(weak, 0.5, 1.0).reshape([12 if a == axis else 1 for a in range(3)])
            right.append(np.allclose(spectra(after, axis), want, atol=1e-3))
        assert sum(right) == 1


def test_gibbs_loses_high_frequencies() -> None:
    image = noise((6, 12, 12, 12, 1))
    out = np.asarray(run(artefacts.Gibbs(keep=(0.5, 0.5)), image)["image"])
    high = np.abs(artefacts.frequencies(12)) > 3
    for before, after in zip(image[..., 0], out[..., 0], strict=True):
        lost = [np.abs(np.moveaxis(spectra(after, a), a, 0)[high]).max() < 1e-3 for a in range(3)]
        assert any(lost)
        kept = np.ix_(*[~high if gone else np.ones(12, bool) for gone in lost])
        np.testing.assert_allclose(np.fft.fftn(after)[kept], np.fft.fftn(before)[kept], atol=2e-3)


def test_a_spike_is_one_point_of_k_space_and_its_mirror_image() -> None:
    image = noise((5, 12, 10, 8, 1))
    out = np.asarray(run(artefacts.Spike(intensity=(0.7, 0.7)), image)["image"])
    for before, after in zip(image[..., 0], out[..., 0], strict=True):
        k_space = np.abs(np.fft.fftn(after - before)).ravel()
        assert 1 <= (k_space > 0.02 * k_space.max()).sum() <= 2
        assert np.abs(after - before).max() == pytest.approx(0.7 * before.std(), rel=0.1)


def test_motion_leaves_the_middle_of_k_space() -> None:
    image = noise((4, 16, 16, 16, 1))
    still = run(artefacts.Motion(degrees=0.0, mm=0.0), image)["image"]
    np.testing.assert_allclose(still, image, atol=1e-4)
    out = np.asarray(run(artefacts.Motion(degrees=10.0, mm=3.0, moves=1), image)["image"])
    assert np.abs(out - image).max() > 0.1
    for before, after in zip(image[..., 0], out[..., 0], strict=True):
        # The plane of zero frequency along the read axis is as it was.
        assert any(np.allclose(before.sum(a), after.sum(a), atol=1e-3) for a in range(3))


# --- across examples -------------------------------------------------------------------------------------------------


def test_cutmix_pastes_image_and_mask_alike() -> None:
    image = np.arange(8, dtype=np.float32)[:, None, None, None, None] * np.ones((8, *SHAPE, 2), np.float32)
    mask = np.arange(8)[:, None, None, None] * np.ones((8, *SHAPE), int)
    told = {"age/target": jnp.arange(8.0)[:, None] * jnp.ones((8, 2)), "a/mask": jnp.ones(8, bool)}
    told["a/mask"] = told["a/mask"].at[2].set(False)  # example 2 has no label: it and its partner stay apart
    out = run(mixing.CutMix(blend=("age",)), image, masks={"a": mask.astype(np.int32)}, **told)
    np.testing.assert_array_equal(out["image"][..., 0], out["a/target"])
    for i in range(8):
        values, counts = np.unique(out["a/target"][i], return_counts=True)
        if i in (2, 3):
            assert list(values) == [i]
            continue
        assert set(values) == {i, i ^ 1}
        share = counts[list(values).index(i ^ 1)] / np.prod(SHAPE)
        np.testing.assert_allclose(out["age/target"][i], i + share * ((i ^ 1) - i), atol=1e-5)
        assert 0 < share < 0.3
    # The same examples, in another batch.
    half = run(
        mixing.CutMix(blend=("age",)), image[4:], masks={"a": mask[4:].astype(np.int32)}, example=jnp.arange(4, 8),
        **{k: v[4:] for k, v in told.items()},
    )  # fmt: skip
    np.testing.assert_array_equal(half["image"], out["image"][4:])


def test_mixup_is_a_weighted_mean() -> None:
    image = noise((4, *SHAPE, 1))
    value = jnp.arange(4.0)
    out = run(mixing.MixUp(low=0.6, blend=("age",)), image, **{"age/target": value, "age/mask": jnp.ones(4, bool)})
    for i in range(4):
        weight = 1 - (float(out["age/target"][i]) - i) / ((i ^ 1) - i)
        assert 0.6 <= weight <= 1
        np.testing.assert_allclose(out["image"][i], weight * image[i] + (1 - weight) * image[i ^ 1], atol=1e-5)


@pytest.mark.parametrize(
    ("transform", "more", "words"),
    [
        (mixing.MixUp(), {"a/target": np.zeros((2, *SHAPE), np.uint8)}, ["mask of task 'a'", "cutmix"]),
        (mixing.MixUp(), {"grade/target": np.zeros(2, np.int32)}, ["grade", "blend=('grade',)"]),
        (mixing.CutMix(), {"grade/target": np.zeros(2, np.float32)}, ["grade", "blend=('grade',)"]),
        (mixing.CutMix(blend=("grade",)), {"grade/target": np.zeros(2, np.int32)}, ["grade", "real numbers"]),
        (mixing.CutMix(blend=("aeg",)), {"age/target": np.zeros(2, np.float32)}, ["'aeg'", "age"]),
        (mixing.CutMix(), {"nodule/table": np.zeros((2, 3, 7), np.float32)}, ["nodule", "instances"]),
        (mixing.CutMix(), {"image": jnp.zeros((3, *SHAPE, 1))}, ["even number", "batch_size"]),
    ],
)
def test_what_cannot_be_mixed_is_refused(transform: Transform, more: dict[str, Any], words: list[str]) -> None:
    batch = {"image": jnp.zeros((2, *SHAPE, 1)), "example": jnp.arange(2), **more}
    options = {f.name: getattr(transform, f.name) for f in dataclasses.fields(transform)}
    augment = policy.build({"transforms": ((transform.name, options),)}, ("a", "grade", "age"), 0)
    with pytest.raises(UserError) as error:
        jax.eval_shape(augment, {**batch, "example": jnp.arange(batch["image"].shape[0])})
    for word in words:
        assert word in str(error.value)


def test_modality_dropout_says_what_it_took_and_leaves_one() -> None:
    image = noise((200, 2, 2, 2, 3)) + 5
    present = np.ones((200, 3), bool)
    present[::4, 0] = False
    image[::4, ..., 0] = 0
    out = run(mixing.ModalityDropout(p_channel=0.6), image, modality=jnp.asarray(present))
    left = np.asarray(out["modality"])
    assert left.any(1).all()
    assert not (left & ~present).any()
    np.testing.assert_array_equal(np.asarray(out["image"]), image * left[:, None, None, None, :])
    assert 0.4 < (left & present).sum() / present.sum() < 0.65
