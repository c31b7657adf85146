"""Sliding windows against their definition in numpy, properties of positions, and counts of compilations."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medjax.errors import UserError
from medjax.ops import windows


def volume(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def identity(variables, x):
    return x


def curved(variables, x):
    """Not linear, not the same at every place of the window, neighbours mixed: windows do differ where they overlap."""
    place = jnp.arange(x.shape[1])[:, None, None, None] * 0.1 + jnp.arange(x.shape[3])[:, None] * 0.05
    mixed = jnp.tanh(x + jnp.roll(x, 1, 2)) * variables["scale"] + place
    return jnp.stack([mixed[..., 0], mixed[..., -1] ** 2, mixed.sum(-1)], axis=-1)


def reference(apply_fn, variables, image, patch, overlap, mirror_axes=(), activation=None):
    """Sliding window from its definition: pad, weigh, add, divide, crop."""
    size = image.shape[:3]
    before = [max(0, p - s) // 2 for p, s in zip(patch, size, strict=True)]
    after = [max(0, p - s) - b for p, s, b in zip(patch, size, before, strict=True)]
    padded = np.pad(image, [*zip(before, after, strict=True), (0, 0)])
    weight = windows.gaussian(patch).astype(np.float64)[..., None]
    flips = [f for n in range(len(mirror_axes) + 1) for f in itertools.combinations(mirror_axes, n)]
    network = jax.jit(apply_fn)
    total = count = 0.0
    for corner in itertools.product(
        *(windows.positions(s, p, overlap) for s, p in zip(padded.shape[:3], patch, strict=True))
    ):
        box = tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))
        outputs = []
        for flip in flips:
            y = network(variables, np.flip(padded[box], flip)[None])[0]
            y = y if activation is None else activation(y)
            outputs.append(np.flip(np.asarray(y, np.float64), flip))
        added = np.zeros((*padded.shape[:3], outputs[0].shape[-1]))
        added[box] = np.mean(outputs, axis=0) * weight
        weights = np.zeros((*padded.shape[:3], 1))
        weights[box] = weight
        total, count = total + added, count + weights
    inside = tuple(slice(b, b + s) for b, s in zip(before, size, strict=True))
    return (total / count)[inside]


def test_positions_of_nnunet():
    assert windows.positions(240, 128, 0.5) == [0, 56, 112]
    assert windows.positions(128, 128, 0.5) == [0]
    assert windows.positions(100, 128, 0.5) == [0]
    assert windows.positions(129, 128, 0.5) == [0, 1]
    assert windows.positions(10, 4, 0.0) == [0, 3, 6]


@given(st.integers(1, 400), st.integers(1, 160), st.floats(0, 0.9))
@settings(max_examples=300, deadline=None)
def test_positions_cover_evenly(size, patch, overlap):
    starts = windows.positions(size, patch, overlap)
    steps = np.diff(starts)
    assert starts[0] == 0
    assert starts[-1] == max(size - patch, 0)
    assert (steps >= 1).all()
    assert (steps <= max(1, np.ceil(patch * (1 - overlap)))).all()
    assert len(steps) == 0 or steps.max() - steps.min() <= 1
    assert len(windows.positions(size + 1, patch, overlap)) >= len(starts)


@pytest.mark.parametrize("patch", [(8, 9, 16), (128, 64, 1)])
def test_gaussian(patch):
    weight = windows.gaussian(patch)
    assert weight.shape == patch
    assert weight.dtype == np.float32
    assert weight.max() == pytest.approx(1)
    assert weight.min() > 0
    for axis in range(3):
        np.testing.assert_array_equal(weight, np.flip(weight, axis))


def test_gaussian_width():
    profile = windows.gaussian((65, 1, 1), 0.125)[:, 0, 0]
    offset = np.arange(65) - 32
    np.testing.assert_allclose(profile[16:49], np.exp(-0.5 * (offset / (65 / 8)) ** 2)[16:49], rtol=1e-5)


@pytest.mark.parametrize("shape", [(16, 16, 16), (37, 23, 29), (16, 41, 17), (64, 20, 18), (9, 30, 5)])
@pytest.mark.parametrize("batch", [1, 3])
def test_identity_returns_the_volume(shape, batch):
    image = volume(*shape, 2)
    run = windows.SlidingWindow(identity, (16, 16, 16), 2, batch=batch)
    result = run(None, image)
    assert result.shape == image.shape
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, image, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(21, 18, 15), (9, 25, 7)])
@pytest.mark.parametrize("mirror_axes", [(), (2,), (0, 1, 2)])
@pytest.mark.parametrize("batch", [1, 2])
def test_equals_the_definition(shape, mirror_axes, batch):
    image, variables = volume(*shape, 2), {"scale": jnp.float32(1.7)}
    run = windows.SlidingWindow(curved, (8, 10, 12), 3, batch=batch, mirror_axes=mirror_axes, overlap=0.4)
    expected = reference(curved, variables, image, (8, 10, 12), 0.4, mirror_axes)
    np.testing.assert_allclose(run(variables, image), expected, rtol=1e-4, atol=1e-5)


def test_probabilities_are_averaged_after_the_activation():
    image, variables = volume(15, 12, 12, 2), {"scale": jnp.float32(3.0)}
    options = {"combine": "probabilities", "mirror_axes": (0,), "overlap": 0.5}
    soft = windows.SlidingWindow(curved, (8, 8, 8), 3, **options)(variables, image)
    expected = reference(curved, variables, image, (8, 8, 8), 0.5, (0,), jax.nn.softmax)
    np.testing.assert_allclose(soft, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(soft.sum(-1), 1, rtol=1e-5)
    sigmoid = windows.SlidingWindow(curved, (8, 8, 8), 3, activation=jax.nn.sigmoid, **options)(variables, image)
    expected = reference(curved, variables, image, (8, 8, 8), 0.5, (0,), jax.nn.sigmoid)
    np.testing.assert_allclose(sigmoid, expected, rtol=1e-4, atol=1e-6)


def test_finish_runs_in_the_program_on_the_blended_result():
    image, variables = volume(15, 12, 6, 2), {"scale": jnp.float32(2.0)}
    plain = windows.SlidingWindow(curved, (8, 8, 8), 3)(variables, image)
    run = windows.SlidingWindow(
        curved, (8, 8, 8), 3, finish=lambda x: {"label": x.argmax(-1), "soft": jax.nn.softmax(x)[..., :2]}
    )
    result = run(variables, image)
    np.testing.assert_array_equal(result["label"], plain.argmax(-1))
    np.testing.assert_allclose(result["soft"], np.asarray(jax.nn.softmax(plain))[..., :2], rtol=1e-5)
    assert run.compiles == 1


def test_mirroring_changes_nothing_for_an_equivariant_network():
    image = volume(20, 17, 18, 2)
    plain = windows.SlidingWindow(lambda v, x: jnp.tanh(x), (8, 8, 8), 2)(None, image)
    mirrored = windows.SlidingWindow(lambda v, x: jnp.tanh(x), (8, 8, 8), 2, mirror_axes=(0, 1, 2))(None, image)
    np.testing.assert_allclose(mirrored, plain, rtol=1e-5, atol=1e-6)


def test_only_the_volumes_own_windows_are_computed():
    """The number of network calls follows the volume, not the canvas."""
    calls = []

    def counted(variables, x):
        jax.debug.callback(lambda: calls.append(1))
        return x

    run = windows.SlidingWindow(counted, (8, 8, 8), 1, canvas=(64, 64, 64), batch=2)
    for shape, expected in (((16, 8, 8), 2), ((9, 9, 9), 4), ((8, 8, 8), 1), ((24, 24, 8), 13)):
        calls.clear()
        run(None, volume(*shape, 1))
        jax.effects_barrier()
        assert len(calls) == expected
    assert run.compiles == 1


def test_sizes_share_a_canvas_and_leave_no_trace():
    sizes = [(40, 33, 20), (17, 40, 24), (5, 40, 11), (40, 40, 24)]
    run = windows.SlidingWindow(identity, (16, 16, 16), 1, canvas=(40, 40, 24))
    for seed, size in enumerate(sizes):
        image = volume(*size, 1, seed=seed)
        np.testing.assert_allclose(run(None, image), image, rtol=2e-6, atol=1e-6)
    assert run.compiles == 1


def test_the_canvas_grows_by_buckets():
    run = windows.SlidingWindow(identity, (8, 8, 8), 1, bucket=16)
    for shape, compiles in (((10, 10, 10), 1), ((16, 16, 16), 1), ((17, 10, 10), 2), ((32, 16, 9), 2), ((8, 8, 8), 2)):
        image = volume(*shape, 1)
        np.testing.assert_allclose(run(None, image), image, rtol=2e-6, atol=1e-6)
        assert run.compiles == compiles


def test_small_volumes_are_padded_with_the_given_value_on_both_sides():
    run = windows.SlidingWindow(lambda v, x: jnp.cumsum(x, axis=1), (7, 4, 4), 1, pad_value=-2.0)
    result = run(None, np.ones((4, 4, 4, 1), np.float32))
    np.testing.assert_allclose(result[:, 0, 0, 0], [-1, 0, 1, 2], atol=1e-6)  # one voxel of -2 before, two after


def test_a_bfloat16_network_is_blended_in_float32():
    image = volume(30, 20, 20, 1)
    run = windows.SlidingWindow(lambda v, x: x.astype(jnp.bfloat16), (8, 8, 8), 1)
    expected = np.asarray(jnp.asarray(image).astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(run(None, image), expected, rtol=2e-6, atol=1e-6)


def test_results_do_not_share_memory():
    run = windows.SlidingWindow(identity, (8, 8, 8), 1)
    first = run(None, volume(12, 12, 12, 1))
    kept = first.copy()
    run(None, volume(12, 12, 12, 1, seed=1))
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize(
    "arguments",
    [
        {"patch": (8, 8)},
        {"patch": (8, 8, 0)},
        {"mirror_axes": (3,)},
        {"combine": "votes"},
        {"overlap": 1.0},
        {"batch": 0},
    ],
)
def test_wrong_settings_are_refused(arguments):
    with pytest.raises(UserError, match="sliding window"):
        windows.SlidingWindow(identity, **({"patch": (8, 8, 8), "channels_out": 1} | arguments))


def test_wrong_volumes_and_networks_are_refused():
    run = windows.SlidingWindow(identity, (8, 8, 8), 1)
    with pytest.raises(UserError, match="X, Y, Z, C"):
        run(None, volume(8, 8, 8))
    with pytest.raises(ValueError, match=r"\(1, 8, 8, 8, 2\), not \(1, 8, 8, 8, 1\)"):
        run(None, volume(8, 8, 8, 2))


def test_pooled_outputs_are_the_mean_over_windows_and_mirrors() -> None:
    volume = np.random.default_rng(0).standard_normal((20, 13, 9, 2)).astype(np.float32)

    def apply(variables, x):
        return jnp.tanh(x[..., :1]), jnp.stack([x[:, 0, 0, 0, 0], x.mean((1, 2, 3, 4)) ** 2], -1)

    run = windows.SlidingWindow(apply, (8, 8, 8), 1, pooled_out=2, batch=4, mirror_axes=(0, 2))
    dense, pooled = run(None, volume)
    plain = windows.SlidingWindow(lambda v, x: jnp.tanh(x[..., :1]), (8, 8, 8), 1, mirror_axes=(0, 2))(None, volume)
    np.testing.assert_allclose(dense, plain, atol=1e-6)
    corners, means = [], []
    for x in windows.positions(20, 8, 0.5):
        for y in windows.positions(13, 8, 0.5):
            for z in windows.positions(9, 8, 0.5):
                cut = volume[x : x + 8, y : y + 8, z : z + 8]
                corners.append(cut[::7, 0, ::7, 0].mean())
                means.append(cut.mean() ** 2)
    np.testing.assert_allclose(pooled, [np.mean(corners), np.mean(means)], atol=1e-6)


def test_a_network_with_pooled_outputs_only() -> None:
    volume = np.ones((9, 9, 9, 1), np.float32)
    run = windows.SlidingWindow(lambda v, x: (x[..., :0], x.sum((1, 2, 3))), (8, 8, 8), 0, pooled_out=1)
    dense, pooled = run(None, volume)
    assert dense.shape == (9, 9, 9, 0)
    np.testing.assert_allclose(pooled, [512.0])


def test_odd_channels_change_sign_under_mirrors() -> None:
    # An offset towards a plane at x = 3.5 of each window: mirrored windows point the other way.
    def apply(variables, x):
        offset = 3.5 - jnp.arange(8.0)
        return jnp.broadcast_to(offset[:, None, None, None], (*x.shape[:4], 1))

    options = {"odd": ((0,), (), ()), "overlap": 0.0}
    plain = windows.SlidingWindow(apply, (8, 8, 8), 1, **options)(None, np.zeros((8, 8, 8, 1), np.float32))
    run = windows.SlidingWindow(apply, (8, 8, 8), 1, mirror_axes=(0, 1), **options)
    np.testing.assert_allclose(run(None, np.zeros((8, 8, 8, 1), np.float32)), plain)
