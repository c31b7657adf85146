"""The policy: identity when off, each example alone as in any batch, probabilities, configs, named policies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.ablations.few_labels import PAINTED
from medjax import config as config_lib
from medjax.augment import policy
from medjax.augment.base import Draws, Scene
from medjax.errors import UserError
from medjax.ops import native

REPO = Path(__file__).resolve().parents[1]
TABLES = {
    "mirror": (0, 1, 2),
    "affine": {"p": 0.5, "rotate": 20.0, "scale": 0.2},
    "brightness": {"p": 0.5, "std": 0.3},
    "contrast": {"p": 0.5, "low": 0.7, "high": 1.3},
    "gamma": {"p": 0.5, "low": 0.7, "high": 1.5},
    "noise": {"p": 0.5, "std": 0.2},
}
# What each transform needs said; 'mixup' mixes no masks and has tests of its own.
OPTIONS: dict[str, dict[str, Any]] = {"paint": {"task": "a"}, "mirror": {"swap": ((1, 2),)}}
EACH = [n for n in policy.TRANSFORMS if n != "mixup"]


def everything(p: float, names: list[str] = EACH) -> dict[str, Any]:
    return {"transforms": tuple((n, {"p": p, **OPTIONS.get(n, {})}) for n in names)}


def batch(n: int = 6, seed: int = 0, dtype: Any = jnp.float32) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(n, 10, 8, 6, 2))
    image[:, 0] = -0.0
    return {
        "image": jnp.asarray(image, dtype),
        "spacing": jnp.asarray(np.where(np.arange(n)[:, None] % 2, [1.0, 1.0, 3.5], [1.0, 1.5, 1.0]), jnp.float32),
        "modality": jnp.ones((n, 2), bool),
        "example": jnp.arange(100, 100 + n),
        "a/target": jnp.asarray(rng.integers(0, 4, (n, 10, 8, 6)), jnp.uint8),
        "a/mask": jnp.ones(n, bool),
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Bit for bit, the sign of zero included."""
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        assert np.asarray(a[key]).tobytes() == np.asarray(b[key]).tobytes(), key


def test_off_is_the_identity() -> None:
    augment = policy.build(config_lib.defaults().augment, ("a",), 0)
    data = batch()
    assert augment(data) is data


@pytest.mark.parametrize("way", ["native", "xla"])
def test_gated_out_is_bit_exact(way: str) -> None:
    # p = 1e-9 compiles every transform and applies none.
    data = batch(dtype=jnp.bfloat16 if way == "xla" else jnp.float32)
    if way == "native":
        out = jax.jit(policy.build(everything(1e-9), ("a",), 0))(data)
    else:
        with native.disabled():
            out = jax.jit(policy.build(everything(1e-9), ("a",), 0))(data)
    same(out, data)


def test_an_example_is_the_same_whatever_the_batch_and_depends_on_the_seed() -> None:
    names = [n for n in EACH if n != "cutmix"]  # which pairs neighbours: see test_augment_transforms.py
    augment = jax.jit(policy.build(everything(0.5, names), ("a",), 3))
    data = batch()
    whole = augment(data)
    for i in range(6):
        alone = augment({k: v[i : i + 1] for k, v in data.items()})
        same(alone, {k: v[i : i + 1] for k, v in whole.items()})
    order = np.array([4, 0, 5, 2, 1, 3])
    same(augment({k: v[order] for k, v in data.items()}), {k: v[order] for k, v in whole.items()})
    # No two examples get the same treatment by accident: the same image under two numbers differs.
    twin = augment({**data, **{k: jnp.stack([data[k][0]] * 6) for k in ("image", "a/target", "spacing")}})
    assert len({np.asarray(x).tobytes() for x in twin["image"]}) == 6
    other = jax.jit(policy.build(TABLES, ("a",), 4))
    assert not np.array_equal(other(data)["image"], jax.jit(policy.build(TABLES, ("a",), 5))(data)["image"])


def test_half_precision_stays_finite_and_keeps_its_type() -> None:
    names = [n for n in EACH if n != "paint"]
    data = batch(dtype=jnp.float16)
    data["image"] = data["image"] * 100 + 3000  # far from normalised: squares overflow
    out = jax.jit(policy.build(everything(1.0, names), ("a",), 0))(data)
    assert out["image"].dtype == jnp.float16
    assert np.isfinite(np.asarray(out["image"], np.float32)).all()
    assert set(np.unique(out["a/target"])) <= {0, 1, 2, 3}


def test_several_devices_augment_as_one() -> None:
    code = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, PartitionSpec
from medjax.augment import policy
from tests.test_augment import batch, same
data = batch(8)
augment = policy.build({"transforms": (("nnunet", {}), ("elastic", {"p": .5}), ("cutmix", {"p": .8}))}, ("a",), 0)
mesh, rows = Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data")
split = jax.jit(jax.shard_map(augment, mesh=mesh, in_specs=rows, out_specs=rows))(data)
same(jax.jit(augment)(data), split)
assert len(jax.devices()) == 2 and not np.array_equal(split["image"], data["image"])
print("the same")
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, env={**os.environ, **flags}
    )
    assert done.stdout.strip() == "the same", done.stderr[-3000:]


def test_masks_move_alike_and_other_targets_stay() -> None:
    rng = np.random.default_rng(0)
    data = batch()
    data |= {
        "b/target": data["a/target"].astype(jnp.int32) * 1000,
        "distance/target": jnp.asarray(rng.normal(size=(6, 10, 8, 6)), jnp.float32),
        "grade/target": jnp.arange(6),
        "age/target": jnp.asarray(rng.normal(size=(6, 3)), jnp.float32),
        "nodule/target": data["a/target"],
        "nodule/table": jnp.asarray(rng.normal(size=(6, 4, 7)), jnp.float32),
    }
    rules = {"transforms": (("mirror", {}), ("rotate", {}), ("elastic", {"std": 3.0}), ("shift", {}))}
    tasks = ("a", "b", "distance", "grade", "age", "nodule")
    out = jax.jit(policy.build(rules, tasks, 0))(data)
    for key in ("grade/target", "age/target", "nodule/table"):
        np.testing.assert_array_equal(out[key], data[key])
    assert not np.array_equal(out["a/target"], data["a/target"])
    np.testing.assert_array_equal(out["b/target"], out["a/target"].astype(jnp.int32) * 1000)
    np.testing.assert_array_equal(out["nodule/target"], out["a/target"])
    alone = jax.jit(policy.build(rules, ("a",), 0))({**data, "image": data["distance/target"][..., None]})
    np.testing.assert_allclose(out["distance/target"], alone["image"][..., 0], atol=1e-6)


def plans(transforms: list[Any], n: int = 4000, spacing: tuple = (1.0, 1.0, 1.0), channels: int = 4) -> list[Any]:
    """What `n` examples draw for each transform."""
    present = jnp.ones(channels, bool)

    def plan(row: Any, spacing: Any) -> list[Any]:
        draw, scene = Draws(row), Scene((16, 16, 16), channels, spacing, present)
        return [t.plan(draw, scene) for t in transforms]

    rows = jax.random.uniform(jax.random.key(0), (n, policy._numbers(transforms, (16, 16, 16), channels)))
    return jax.jit(jax.vmap(plan, (0, None)))(rows, jnp.asarray(spacing, jnp.float32))


def test_nnunet_has_the_published_probabilities_and_ranges() -> None:
    transforms, labels = policy.parse({"policy": "nnunet"})
    assert labels == "linear"
    assert [t.name for t in transforms] == [
        "mirror", "rotate", "scale", "noise", "blur", "multiply", "contrast", "low_resolution", "gamma", "gamma",
    ]  # fmt: skip
    mirror, rotate, scale, noise, blur, multiply, contrast, coarse, inverted, gamma = plans(transforms)

    def about(gate: Any, p: float) -> None:
        assert abs(np.asarray(gate).mean() - p) < 4 * np.sqrt(p * (1 - p) / np.size(gate)) + 1e-3

    for axis in range(3):
        about(mirror.flipped[:, axis], 0.5)
    about(rotate.on, 0.2)
    about(scale.on, 0.2)
    turned = np.asarray(rotate.matrix)[np.asarray(rotate.on)]
    # Rx Ry Rz has sin(b) at [0, 2]; the other angles follow.
    b = np.degrees(np.arcsin(turned[:, 0, 2]))
    assert 28 < b.max() <= 30.001
    assert -30.001 <= b.min() < -28
    np.testing.assert_allclose(np.linalg.det(turned), 1, atol=1e-5)
    steps = np.asarray(scale.matrix)[np.asarray(scale.on)][:, 0, 0]  # of the sampling coordinates
    assert 0.7 <= steps.min() < 0.72
    assert 1.38 < steps.max() <= 1.4
    assert abs(steps.mean() - 1.05) < 0.03
    about(np.asarray(noise[0]).any(1), 0.1)
    variance = np.asarray(noise[1]) ** 2
    assert variance.max() <= 0.1 + 1e-6
    assert abs(variance.mean() - 0.05) < 0.002
    about(np.asarray(blur[0]), 0.2 * 0.5)
    about(np.asarray(blur[0]).any(1), 0.2 * (1 - 0.5**4))
    about(np.asarray(multiply[0]).all(1), 0.15)
    about(np.asarray(contrast[0]).all(1), 0.15)
    about(np.asarray(coarse[0]), 0.25 * 0.5)
    about(np.asarray(inverted[0]).all(1), 0.1)
    about(np.asarray(gamma[0]).all(1), 0.3)
    for values, low, high in ((multiply[1], 0.75, 1.25), (contrast[1], 0.75, 1.25), (gamma[1], 0.7, 1.5)):
        values = np.asarray(values)
        assert low <= values.min() < low + 0.01
        assert high - 0.01 < values.max() <= high
        about(values < 1, 0.5)
    assert (transforms[-2].invert, transforms[-1].invert) == (True, False)  # type: ignore[attr-defined]
    assert transforms[6].keep_range  # type: ignore[attr-defined]


def test_thick_slices_are_turned_in_their_plane() -> None:
    transforms, _ = policy.parse({"policy": "nnunet"})
    chosen = [transforms[i] for i in (1, 2, 7)]
    rotate, scale, coarse = plans(chosen, 500, (0.8, 0.8, 5.0))
    eye = np.eye(3)
    for made in (rotate, scale):
        matrix = np.asarray(made.matrix)
        np.testing.assert_array_equal(matrix[:, 2], np.broadcast_to(eye[2], matrix[:, 2].shape))
        np.testing.assert_array_equal(matrix[:, :, 2], np.broadcast_to(eye[2], matrix[:, 2].shape))
    cosine = np.asarray(rotate.matrix)[:, 0, 0]
    assert cosine.min() < -0.99  # any angle
    identity = np.broadcast_to(np.arange(16), np.asarray(coarse[1][2].source)[..., 0].shape)
    np.testing.assert_array_equal(np.asarray(coarse[1][2].source)[..., 0], identity)
    assert not np.array_equal(np.asarray(coarse[1][0].source)[..., 0], identity)
    # A ratio of 3 is not above 3.
    assert not np.allclose(np.asarray(plans(chosen, 500, (1.0, 1.0, 3.0))[0].matrix)[:, 2], eye[2])


def test_synthseg_paints_label_maps() -> None:
    rng = np.random.default_rng(0)
    data = batch(4)
    blocks = np.kron(rng.integers(0, 4, (4, 5, 4, 3)), np.ones((1, 2, 2, 2)))
    data["a/target"] = jnp.asarray(blocks, jnp.uint8)
    augment = jax.jit(policy.build({"policy": "synthseg"}, ("a",), 0))
    out = augment(data)
    assert set(np.unique(out["a/target"])) <= {0, 1, 2, 3}
    image = np.asarray(out["image"])
    np.testing.assert_allclose(image.mean((1, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(image.std((1, 2, 3), where=image != 0), 1, atol=1e-4)
    # The image that came in does not matter, but for where it is 0; the example's number does.
    np.testing.assert_array_equal(augment({**data, "image": data["image"] * 8})["image"], image)
    assert not np.allclose(augment({**data, "example": data["example"] + 50})["image"], image)
    # An example without a label map keeps its image: it is deformed, not painted.
    kept = augment({**data, "a/mask": jnp.array([True, False, True, True])})["image"]
    np.testing.assert_array_equal(np.asarray(kept)[[0, 2, 3]], image[[0, 2, 3]])
    assert not np.array_equal(kept[1], image[1])


def test_what_is_outside_the_labels_is_painted_by_its_intensities() -> None:
    rng = np.random.default_rng(0)
    levels = np.kron(rng.integers(0, 3, (2, 5, 4, 3)), np.ones((1, 2, 2, 2)))
    data = batch(2)
    size = data["image"].shape[1:4]
    levels = levels[:, : size[0], : size[1], : size[2]]
    values = np.asarray([-1.0, 0.5, 4.0])[levels.astype(int)] + 0.1 * rng.standard_normal(levels.shape)
    label = np.zeros(levels.shape, np.uint8)
    label[:, 2:4, 2:4, 2:4] = 1
    data |= {"image": jnp.asarray(values[..., None], jnp.float32), "modality": jnp.ones((2, 1), bool)}
    data["a/target"] = jnp.asarray(label)
    for background in (0.0, 1.0):
        rule = ("paint", {"std": (0.0, 0.0), "background": background, "clusters": 3, "labels": 2})
        image = np.asarray(jax.jit(policy.build({"transforms": (rule,)}, ("a",), 0))(data)["image"])[..., 0]
        for painted, of, mask in zip(image, levels, label, strict=True):
            found = [np.unique(painted[(of == k) & (mask == 0)]) for k in range(3)]
            assert [len(f) for f in found] == [1, 1, 1]
            # A Gaussian for each cluster, or black all of it; the label has its own.
            assert len(np.unique(found)) == (1 if background else 3)
            assert np.all(np.isin(found, [0.0])) == bool(background)
            inside = np.unique(painted[mask == 1])
            assert len(inside) == 1
            assert inside[0] not in np.concatenate(found)


def padded(before: tuple[int, int, int], after: tuple[int, int, int], n: int = 4) -> dict[str, Any]:
    """Normalised volumes of 12 x 10 x 8 voxels, a label in them, amid zeros; 'b' is 1 in the volume, 0 outside."""
    rng = np.random.default_rng(1)
    image = rng.normal(size=(n, 12, 10, 8, 1))
    label = np.zeros(image.shape[:4], np.uint8)
    label[:, 4:8, 3:7, 2:4], label[:, 4:8, 3:7, 4:6] = 1, 2
    amid = [(0, 0), *zip(before, after, strict=True)]
    return {
        "image": jnp.asarray(np.pad(image, [*amid, (0, 0)]), jnp.float32),
        "spacing": jnp.ones((n, 3)),
        "modality": jnp.ones((n, 1), bool),
        "example": jnp.arange(n),
        "a/target": jnp.asarray(np.pad(label, amid)),
        "a/mask": jnp.arange(n) > 0,  # one has no label map
        "b/target": jnp.asarray(np.pad(np.ones(label.shape), amid), jnp.float32),
    }


MOVED_LATER = (
    ("paint", {"clusters": 3, "background": 0.0}), ("mirror", {"swap": ((1, 2),)}), ("shift", {}), ("noise", {}),
    ("cutmix", {}), ("standardize", {}),
)  # fmt: skip


@pytest.mark.parametrize("rules", [*PAINTED.values(), MOVED_LATER], ids=[*PAINTED, "moved later"])
def test_padding_is_never_painted(rules: Any) -> None:
    data = padded((2, 0, 1), (2, 4, 3))
    out = jax.jit(policy.build({"transforms": rules}, ("a", "b"), 0))(data)
    assert out.keys() == data.keys()
    # Where nothing of the volume came it is 0, as in the windows of a prediction; the volume is as if normalised alone.
    image, inside = np.asarray(out["image"])[..., 0], np.asarray(out["b/target"]) > 0
    np.testing.assert_array_equal(image != 0, inside)
    assert not inside.all((1, 2, 3)).any()
    np.testing.assert_allclose(image.mean((1, 2, 3), where=inside), 0, atol=1e-4)
    np.testing.assert_allclose(image.std((1, 2, 3), where=inside), 1, atol=1e-4)


def test_clusters_do_not_depend_on_padding() -> None:
    rule = ("paint", {"std": (0.0, 0.0), "background": 0.0, "clusters": 4})
    augment = jax.jit(policy.build({"transforms": (rule,)}, ("a",), 0))
    bare = np.asarray(augment(padded((0, 0, 0), (0, 0, 0)))["image"])
    some = np.asarray(augment(padded((2, 4, 4), (6, 0, 4)))["image"])
    np.testing.assert_array_equal(some[:, 2:14, 4:, 4:12], bare)
    assert [len(np.unique(x)) for x in bare[1:]] == [6] * 3
    # Until it is standardised, padding is the painted volume's mean.
    np.testing.assert_allclose(some[1:, 0, 0, 0], bare[1:].mean((1, 2, 3)), rtol=1e-5)


def test_without_padding_all_is_painted() -> None:
    data = padded((0, 0, 0), (0, 0, 0))
    paint, unit = ("paint", {"background": 0.0}), ("standardize", {})
    first, second, both = (
        jax.jit(policy.build({"transforms": rules}, ("a",), 0)) for rules in ((paint,), (unit,), (paint, unit))
    )
    np.testing.assert_allclose(both(data)["image"], second(first(data))["image"], atol=1e-5)
    # An image of zeros says nothing of padding: label maps can do without one. Nor need there be a label.
    empty = data | {"image": jnp.zeros_like(data["image"]), "a/mask": jnp.ones(4, bool)}
    full = first(data | {"a/mask": empty["a/mask"]})["image"]
    np.testing.assert_array_equal(first(empty)["image"], full)
    bare = both(empty | {"a/target": jnp.zeros_like(data["a/target"])})["image"]
    np.testing.assert_allclose(bare.std((1, 2, 3)), 1, atol=1e-4)
    none = both(empty | {"modality": jnp.zeros((4, 1), bool)})["image"]
    np.testing.assert_array_equal(none, 0)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"policy": "", "transforms": (("synthseg", {"clusters": 0}),)}, ["clusters=0", "from 1 on"]),
        ({"mirror": (0, 3)}, ["augment.mirror", "axes are 0, 1 and 2"]),
        ({"policy": "nnunett"}, ["augment.policy", "nnunett", "did you mean 'nnunet'"]),
        ({"transforms": (("elastc", {}),)}, ["augment.transforms[0]", "did you mean 'elastic'"]),
        ({"transforms": (("blur", {}), ("noise", {"sdt": 1.0}))}, ["transforms[1].noise", "did you mean 'std'"]),
        ({"transforms": (("nnunet", {"miror": ()}),)}, ["transforms[0].nnunet", "did you mean 'mirror'"]),
        ({"transforms": (("blur", {"sigma": (2.0, 1.0)}),)}, ["blur.sigma=(2.0, 1.0)", "lowest value comes first"]),
        ({"transforms": (("blur", {"p": 2}),)}, ["blur.p=2", "between 0 and 1"]),
        ({"transforms": (("blur", {"unit": "cm"}),)}, ["blur.unit='cm'", "'mm'"]),
        ({"transforms": (("rotate", {"degrees": "30"}),)}, ["rotate.degrees='30'", "number"]),
        ({"transforms": (("elastic", {"points": 3}),)}, ["elastic.points=3", "4 control points"]),
        ({"transforms": (("blur", 0.2),)}, ["transforms[0]", "table"]),
        ({"transforms": (3,)}, ["transforms[0]=3", "(name, options)"]),
        ({"policy": "nnunet", "noise": {"p": 0.1, "std": 0.1}}, ["augment.noise.p", "augment.policy"]),
        ({"policy": "nnunet", "transforms": ("blur",)}, ["augment.policy", "one of the two"]),
        ({"transforms": ("blur",), "mirror": (0,)}, ["augment.mirror", "('mirror', {...})"]),
        ({"label_interpolation": "cubic"}, ["label_interpolation", "cubic", "nearest"]),
        ({"swap": ((1, 2),)}, ["augment.swap", "augment.mirror"]),
        ({"mirror": (0,), "swap": (1, 2)}, ["augment.swap", "pairs"]),
        ({"gamma": {"p": 0.5, "low": 2.0, "high": 1.0}}, ["augment.gamma", "lowest value comes first"]),
    ],
)
def test_what_a_config_cannot_mean_is_refused(rules: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        policy.build(rules, ("a",), 0)
    for word in words:
        assert word in str(error.value)


def test_a_config_by_the_command_line_and_back_from_json() -> None:
    config = config_lib.defaults()
    config_lib._assign(config, "augment.transforms", "(('nnunet', {'mirror': (0,)}), ('cutout', {'p': 0.5}))")
    found, labels = policy.parse(config.augment)
    assert [t.name for t in found][-2:] == ["gamma", "cutout"]
    assert labels == "linear"
    assert found[0].axes == (0,)  # type: ignore[attr-defined]
    back = config_lib.from_json(config_lib.to_json(config))
    assert policy.parse(back.augment)[0] == found
    # Tables, and a policy whose mirrored axes and label pairs are the config's.
    config = config_lib.defaults()
    config.augment.mirror, config.augment.gamma.p = (0, 1), 0.3
    assert [t.name for t in policy.parse(config.augment)[0]] == ["mirror", "gamma"]
    config = config_lib.defaults()
    config.augment.policy, config.augment.mirror, config.augment.swap = "nnunet", (0,), ((1, 2),)
    first = policy.parse(config.augment)[0][0]
    assert (first.axes, first.swap) == ((0,), ((1, 2),))  # type: ignore[attr-defined]
    config.augment.label_interpolation = "nearest"
    assert policy.parse(config.augment)[1] == "nearest"


def test_spatial_neighbours_are_one_interpolation() -> None:
    names = ("mirror", "rotate", "elastic", "blur", "scale", "elastic", "elastic", "shift")
    found, _ = policy.parse({"transforms": names})
    assert policy._groups(found) == [[0, 1, 2], [3], [4, 5], [6, 7]]
