"""Augmentation: identity when off, each example alone as in the batch, geometry that is what it says."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from medjax import config as config_lib
from medjax.augment import policy, transforms
from medjax.ops import warp

ON = {
    "mirror": (0, 1, 2),
    "affine": {"p": 0.5, "rotate": 20.0, "scale": 0.2},
    "brightness": {"p": 0.5, "std": 0.3},
    "contrast": {"p": 0.5, "low": 0.7, "high": 1.3},
    "gamma": {"p": 0.5, "low": 0.7, "high": 1.5},
    "noise": {"p": 0.5, "std": 0.2},
}


def batch(n: int = 6, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.normal(size=(n, 10, 8, 6, 2)), jnp.float32),
        "spacing": jnp.tile(jnp.array([1.0, 1.0, 3.0]), (n, 1)),
        "example": jnp.arange(100, 100 + n),
        "a/target": jnp.asarray(rng.integers(0, 4, (n, 10, 8, 6)), jnp.uint8),
        "a/mask": jnp.ones(n, bool),
    }


def test_off_is_the_identity() -> None:
    augment = policy.build(config_lib.defaults().augment, ("a",), 0)
    data = batch()
    assert augment(data) is data


def test_gated_out_is_bit_exact() -> None:
    # p = 1e-9 compiles every transform and applies none.
    rules = {k: {**v, "p": 1e-9} for k, v in ON.items() if isinstance(v, dict)}
    data = batch()
    out = jax.jit(policy.build({"mirror": (), **rules}, ("a",), 0))(data)
    for key in data:
        np.testing.assert_array_equal(out[key], data[key])


def test_a_batch_equals_its_examples_one_by_one_and_depends_on_the_seed() -> None:
    augment = jax.jit(policy.build(ON, ("a",), 3))
    data = batch()
    whole = augment(data)
    for i in range(6):
        alone = augment({k: v[i : i + 1] for k, v in data.items()})
        for key in data:
            np.testing.assert_array_equal(alone[key][0], whole[key][i])
    other = jax.jit(policy.build(ON, ("a",), 4))(data)
    assert not np.array_equal(other["image"], whole["image"])
    # No two examples get the same treatment by accident: the same image under two numbers differs.
    twin = augment({**data, "image": jnp.stack([data["image"][0]] * 6)})
    assert len({np.asarray(x).tobytes() for x in twin["image"]}) > 3


def test_mirror_flips_image_and_mask_together_half_of_the_time() -> None:
    image = jnp.arange(24.0).reshape(2, 3, 4, 1)
    mask = jnp.arange(24).reshape(2, 3, 4)
    seen = []
    flip = jax.jit(lambda key: transforms.mirror(key, [image, mask], (0,)))
    for i in range(200):
        a, b = flip(jax.random.key(i))
        np.testing.assert_array_equal(np.asarray(a)[..., 0], np.asarray(b))
        seen.append(not np.array_equal(a, image))
        np.testing.assert_array_equal(a, image[::-1] if seen[-1] else image)
    assert 70 < sum(seen) < 130


def test_affine_turns_millimetres_not_voxels(monkeypatch: pytest.MonkeyPatch) -> None:
    # A rod along x of 40 mm, turned by 90 degrees about z in a grid of 1 × 2 × 1 mm, becomes a rod along y of 40 mm:
    # half as many voxels long.
    image = jnp.zeros((61, 61, 3, 1)).at[10:51, 29:32].set(1.0)
    spacing = jnp.array([1.0, 2.0, 1.0])

    def draw(key: Any, shape: tuple = (), *, minval: float, maxval: float) -> Any:
        """Angles 0, 0, 90 degrees and the scale 1."""
        return jnp.array([0.0, 0.0, 90.0]) if shape == (3,) else jnp.asarray((minval + maxval) / 2)

    monkeypatch.setattr(jax.random, "uniform", draw)
    out, (mask,) = transforms.affine(jax.random.key(0), image, [image[..., 0]], spacing, 90.0, 0.2)
    where = np.argwhere(np.asarray(out[..., 1, 0]) > 0.5)
    extent = (where.max(0) - where.min(0)) * np.array([1.0, 2.0])
    assert abs(extent[1] - 40) <= 2
    assert extent[0] <= 6
    clear = np.abs(np.asarray(out[..., 0]) - 0.5) > 0.1  # away from ties between two voxels
    np.testing.assert_array_equal(np.asarray(mask)[clear] > 0.5, np.asarray(out[..., 0])[clear] > 0.5)


@pytest.mark.parametrize("seed", range(3))
def test_warps_equal_scipy(seed: int) -> None:
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


def test_intensity_transforms_keep_what_they_promise() -> None:
    image = batch(1)["image"][0]
    key = jax.random.key(5)
    bright = transforms.brightness(key, image, 0.5) - image
    assert np.ptp(np.asarray(bright), axis=(0, 1, 2)).max() < 1e-5  # one constant a channel
    stretched = transforms.contrast(key, image, 0.5, 0.5)
    np.testing.assert_allclose(stretched.mean((0, 1, 2)), image.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(stretched.std((0, 1, 2)), 0.5 * image.std((0, 1, 2)), rtol=1e-4)
    curved = transforms.gamma(key, image, 0.5, 2.0)
    np.testing.assert_allclose(curved.mean((0, 1, 2)), image.mean((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(curved.std((0, 1, 2)), image.std((0, 1, 2)), rtol=1e-3)
    order = np.argsort(np.asarray(image)[..., 0].ravel())
    assert np.all(np.diff(np.asarray(curved)[..., 0].ravel()[order]) >= -1e-6)  # monotone
    flat = jnp.full_like(image, 2.0)
    np.testing.assert_allclose(transforms.gamma(key, flat, 0.5, 2.0), flat, atol=1e-5)
