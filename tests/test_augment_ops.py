"""What augmentation is computed with (warps, separable maps, tones): against scipy, and native against XLA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.interpolate
import scipy.ndimage

from medjax.ops import gated, native, normal, separable, tone, warp

SHAPE = (9, 8, 7)
needs_native = pytest.mark.skipif(
    not (native.enabled() and native.available()), reason="native kernels are off or cannot be built here"
)


def example(n: int = 3, channels: int = 3, dtype: Any = jnp.float32, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    image = jnp.asarray(rng.normal(size=(n, *SHAPE, channels)), dtype)
    return image, jnp.asarray(rng.integers(0, 4, (n, *SHAPE)), jnp.uint8)


def poses(control: bool, seed: int = 1) -> warp.Pose:
    """Three examples: a general map, a flip with a shift, and one that is left alone."""
    rng = np.random.default_rng(seed)
    matrix = np.eye(3) + 0.2 * rng.normal(size=(3, 3, 3))
    matrix[1] = np.diag([-1.0, 1.0, -1.0])
    shift = np.array([[0.3, 0.0, 1.0], [0.0, 2.0, -1.0], [1.0, 1.0, 1.0]])
    points = rng.normal(size=(3, 5, 4, 6, 3))
    points[1] = 0
    made = jnp.asarray(points, jnp.float32) if control else None
    return warp.Pose(
        jnp.array([True, True, False]), jnp.asarray(matrix, jnp.float32), jnp.asarray(shift, jnp.float32), made
    )


def places(pose: warp.Pose, i: int) -> np.ndarray:
    """Input coordinates [3, X, Y, Z] of example i, in float64, from the definition."""
    centre = (np.array(SHAPE) - 1) / 2
    d = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1) - centre
    if pose.control is not None:
        bases = [warp.spline_basis(n, g) for n, g in zip(SHAPE, pose.control.shape[1:4], strict=True)]
        d = d + np.einsum("xa,yb,zc,abcd->xyzd", *bases, np.asarray(pose.control[i], np.float64))
    return np.moveaxis(d @ np.asarray(pose.matrix[i], np.float64).T + centre + np.asarray(pose.shift[i]), -1, 0)


def both_ways(function: Callable, *operands: Any) -> tuple[np.ndarray, np.ndarray]:
    """With the native kernels and without."""
    first = jax.jit(lambda *a: function(*a))(*operands)
    with native.disabled():
        second = jax.jit(lambda *a: function(*a))(*operands)
    assert first.dtype == second.dtype
    return np.asarray(first), np.asarray(second)


@pytest.mark.parametrize("control", [False, True])
def test_a_warp_equals_scipy(control: bool) -> None:
    image, mask = example()
    pose = poses(control)
    for out in both_ways(warp.warp_image, image, pose):
        for i in (0, 1):
            for c in range(3):
                want = scipy.ndimage.map_coordinates(image[i, ..., c], places(pose, i), order=1, mode="grid-constant")
                np.testing.assert_allclose(out[i, ..., c], want, atol=2e-5)
        np.testing.assert_array_equal(out[2], image[2])
    for out in both_ways(warp.warp_mask, mask, pose):
        at = places(pose, 0)
        clear = np.all(np.abs(at - np.floor(at) - 0.5) > 1e-3, axis=0)  # away from ties between two voxels
        want = scipy.ndimage.map_coordinates(mask[0], at, order=0, mode="grid-constant")
        np.testing.assert_array_equal(out[0][clear], want[clear])
        np.testing.assert_array_equal(out[2], mask[2])
        assert out.dtype == np.uint8
    # Flipped along x and z, moved by two voxels along y and one along z.
    moved = np.zeros(SHAPE, np.uint8)
    moved[:, :-2, :-1] = np.asarray(mask[1])[::-1, 2:, ::-1][..., 1:]
    np.testing.assert_array_equal(out[1], moved)


@pytest.mark.parametrize("control", [False, True])
def test_labels_by_share_are_the_argmax_of_linear_indicators(control: bool) -> None:
    _, mask = example()
    pose = poses(control)
    outs = both_ways(lambda m, p: warp.warp_mask(m, p, "linear"), mask, pose)
    shares = np.stack(
        [
            scipy.ndimage.map_coordinates(
                (np.asarray(mask[0]) == v).astype(float), places(pose, 0), order=1, mode="grid-constant",
                cval=float(v == 0),
            )
            for v in range(4)
        ]
    )  # fmt: skip
    ordered = np.sort(shares, 0)
    clear = ordered[-1] - ordered[-2] > 1e-3
    assert clear.mean() > 0.9
    for out in outs:
        np.testing.assert_array_equal(out[0][clear], shares.argmax(0)[clear])
        np.testing.assert_array_equal(out[2], mask[2])


@needs_native
@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_native_warps_equal_those_of_xla(channels: int) -> None:
    for dtype, bound in ((jnp.float32, 2e-5), (jnp.bfloat16, 0.04)):
        image, _ = example(channels=channels, dtype=dtype)
        a, b = both_ways(warp.warp_image, image, poses(channels != 2))
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), atol=bound)
        np.testing.assert_array_equal(a[1:], b[1:])


@needs_native
@pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "int16", "int32", "uint32"])
def test_every_type_of_mask(dtype: str) -> None:
    mask = example()[1].astype(dtype)
    for labels in ("nearest", "linear"):
        a, b = both_ways(lambda m, p, way=labels: warp.warp_mask(m, p, way), mask, poses(True))
        assert a.dtype == np.dtype(dtype)
        assert (a != b).mean() < 0.005  # ties


def test_far_and_undefined_places_are_outside() -> None:
    image, mask = example(1)
    for bad in (1e20, np.nan, np.inf):
        pose = warp.Pose(jnp.ones(1, bool), jnp.eye(3)[None] * 0.5, jnp.full((1, 3), bad, jnp.float32))
        assert not jax.jit(warp.warp_image)(image, pose).any()
        assert not jax.jit(warp.warp_mask)(mask, pose).any()


@pytest.mark.parametrize("seed", range(2))
def test_samples_equal_scipy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    volume = rng.normal(size=(7, 6, 5, 2)).astype(np.float32)
    labels = rng.integers(0, 5, (7, 6, 5))
    at = rng.uniform(0, 4, (4, 4, 4, 3)).astype(np.float32)
    got = warp.sample_linear(jnp.asarray(volume), jnp.asarray(at))
    for c in range(2):
        want = scipy.ndimage.map_coordinates(volume[..., c], np.moveaxis(at, -1, 0), order=1)
        np.testing.assert_allclose(got[..., c], want, atol=1e-5)
    nearest = warp.sample_nearest(jnp.asarray(labels), jnp.asarray(at))
    np.testing.assert_array_equal(nearest, scipy.ndimage.map_coordinates(labels, np.moveaxis(at, -1, 0), order=0))
    outside = jnp.array([[-1.5, 0, 0], [0, 6.5, 0], [0, 0, 99.0]])
    assert not np.any(warp.sample_linear(jnp.asarray(volume), outside))
    assert not np.any(warp.sample_nearest(jnp.asarray(labels), outside))


def test_splines_are_those_of_scipy() -> None:
    size, points = 13, 7
    basis = warp.spline_basis(size, points)
    step = (size - 1) / (points - 3)
    knots = (np.arange(points + 4) - 3) * step
    for g in range(points):
        spline = scipy.interpolate.BSpline(knots, np.eye(points)[g], 3)
        np.testing.assert_allclose(basis[:, g], spline(np.minimum(np.arange(size), size - 1 - 1e-9)), atol=1e-6)
    np.testing.assert_allclose(basis.sum(1), 1, atol=1e-6)
    control = np.random.default_rng(0).normal(size=(4, 5, 6, 2)).astype(np.float32)
    bases = [warp.spline_basis(n, g) for n, g in zip(SHAPE, control.shape[:3], strict=True)]
    want = np.einsum("xa,yb,zc,abcd->xyzd", *bases, control)
    np.testing.assert_allclose(warp.spline_field(jnp.asarray(control), SHAPE), want, atol=1e-5)


def blur_taps(sigma: jax.Array, largest: float) -> list[separable.Taps]:
    """Of sigma [B, C, 3]."""
    return [
        jax.vmap(jax.vmap(lambda s, n=n: separable.gaussian(n, s, largest)))(sigma[..., a]) for a, n in enumerate(SHAPE)
    ]


def test_blur_equals_scipy() -> None:
    image, _ = example()
    sigma = jnp.asarray(np.random.default_rng(2).uniform(0.3, 3.0, (3, 3, 3)), jnp.float32)  # wider than the image
    gate = jnp.asarray([[1, 0, 1], [0, 0, 0], [1, 1, 1]], bool)
    for out in both_ways(lambda x, g, s: separable.separable(x, g, blur_taps(s, 3.0)), image, gate, sigma):
        for i in range(3):
            for c in range(3):
                if gate[i, c]:
                    want = scipy.ndimage.gaussian_filter(np.asarray(image[i, ..., c]), np.asarray(sigma[i, c]))
                    np.testing.assert_allclose(out[i, ..., c], want, atol=1e-5)
                else:
                    np.testing.assert_array_equal(out[i, ..., c], image[i, ..., c])


def test_coarse_voxels_are_picked_and_joined_by_lines() -> None:
    values = np.random.default_rng(0).normal(size=20).astype(np.float32)
    for factor in (0.5, 0.26, 0.77, 1.0, 0.01):
        few = min(max(round(20 * factor), 1), 20)
        centres = (np.arange(few) + 0.5) * 20 / few  # of the coarse voxels, in units of fine ones
        picked = values[np.floor(centres).astype(int)]
        want = np.interp(np.arange(20) + 0.5, centres, picked)
        taps = separable.coarse(20, jnp.float32(factor))
        np.testing.assert_allclose((np.asarray(taps.weight) * values[np.asarray(taps.source)]).sum(1), want, atol=1e-5)
    np.testing.assert_array_equal(separable.coarse(20, jnp.float32(1.0)).source[:, 0], np.arange(20))


@needs_native
def test_native_separable_maps_equal_those_of_xla() -> None:
    rng = np.random.default_rng(3)
    for dtype, bound in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.04)):
        image, _ = example(channels=5, dtype=dtype)
        gate = jnp.asarray(rng.random((3, 5)) < 0.6)
        taps = [
            separable.Taps(
                jnp.asarray(rng.integers(0, n, (3, 5, n, 3)), jnp.int32),
                jnp.asarray(rng.normal(size=(3, 5, n, 3)), jnp.float32),
            )
            for n in SHAPE
        ]
        taps[1] = separable.Taps(*(jnp.broadcast_to(t, (3, 5, *t.shape)) for t in separable.identity(SHAPE[1])))
        a, b = both_ways(separable.separable, image, gate, taps)
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), atol=bound * 20)
        off = np.broadcast_to(~np.asarray(gate)[:, None, None, None, :], a.shape)
        np.testing.assert_array_equal(a[off], np.asarray(image)[off])


TONES: dict[str, Callable] = {
    "linear": lambda x, g, f: tone.linear(x, g, f, f - 1),
    "contrast": lambda x, g, f: tone.linear(x, g, f, 0 * f, about_mean=True),
    "clipped": lambda x, g, f: tone.linear(x, g, f, 0 * f, about_mean=True, keep_range=True),
    "power": lambda x, g, f: tone.power(x, g, f, keep_moments=False),
    "gamma": tone.power,
    "inverted": lambda x, g, f: tone.power(x, g, f, invert=True),
}


def expected(name: str, x: np.ndarray, f: float) -> np.ndarray:
    """The formulas, in float64."""
    x = x.astype(np.float64)
    low, high, mean = x.min(), x.max(), x.mean()
    if name == "linear":
        return x * f + f - 1
    if name in ("contrast", "clipped"):
        y = (x - mean) * f + mean
        return np.clip(y, low, high) if name == "clipped" else y
    unit = (x - low) / (high - low)
    y = 1 - (1 - unit) ** f if name == "inverted" else unit**f
    return y * (high - low) + low if name == "power" else (y - y.mean()) / y.std() * x.std() + mean


@pytest.mark.parametrize("name", list(TONES))
def test_tones_are_their_formulas(name: str) -> None:
    rng = np.random.default_rng(4)
    image = example()[0] * 50 + 1000  # as in computed tomography: a large mean takes digits away
    factor = jnp.asarray(rng.uniform(0.6, 1.6, (3, 3)), jnp.float32)
    gate = jnp.asarray([[1, 1, 1], [0, 0, 0], [0, 1, 0]], bool)
    for out in both_ways(TONES[name], image, gate, factor):
        for i in range(3):
            for c in range(3):
                own = np.asarray(image[i, ..., c])
                if gate[i, c]:
                    np.testing.assert_allclose(out[i, ..., c], expected(name, own, float(factor[i, c])), atol=2e-3)
                else:
                    np.testing.assert_array_equal(out[i, ..., c], own)


@needs_native
@pytest.mark.parametrize("name", ["clipped", "gamma", "inverted"])
def test_native_tones_equal_those_of_xla(name: str) -> None:
    gate, factor = jnp.ones((3, 5), bool).at[0, 2].set(False), jnp.linspace(0.5, 2, 15).reshape(3, 5)
    for dtype, bound in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.04)):
        a, b = both_ways(TONES[name], example(channels=5, dtype=dtype)[0], gate, factor)
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), atol=bound)
    flat = jnp.full((3, *SHAPE, 5), 2.0)  # no range, no deviation
    for out in both_ways(TONES[name], flat, gate, factor):
        np.testing.assert_allclose(out, flat, atol=1e-5)


def test_only_the_chosen_are_worked_on() -> None:
    x = jnp.arange(12.0).reshape(4, 3)
    add = jnp.arange(4.0)
    for gate in ([0, 0, 0, 0], [1, 0, 0, 1], [0, 1, 0, 0], [1, 1, 1, 1]):
        on = jnp.asarray(gate, bool)
        out = jax.jit(lambda x, g, a: gated.chosen(lambda v, a: v * 2 + a, g, x, a))(x, on, add)
        np.testing.assert_array_equal(out, np.where(np.asarray(gate)[:, None], x * 2 + add[:, None], x))


def test_normal_numbers_are_those_of_jax() -> None:
    keys = jax.random.key_data(jax.random.split(jax.random.key(7), 2))
    for size in (1, 5000, 100_003):
        want = jax.vmap(lambda k, n=size: jax.random.normal(jax.random.wrap_key_data(k), (n,)))(keys)
        for got in both_ways(lambda k, n=size: normal.normal(k, n), keys):
            np.testing.assert_allclose(got, want, atol=2e-5)
    assert abs(got.std() - 1) < 0.01
    assert np.abs(got).max() > 4
