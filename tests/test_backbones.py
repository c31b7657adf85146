"""Every backbone: published parameter counts, pyramids, gradients, stochastic regularisation, refusals."""

from __future__ import annotations

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medjax import models
from medjax.errors import UserError
from medjax.models import layers
from medjax.models.adapters import Insert
from medjax.models.attention import attend, from_windows, relative_bias, shifted_regions, to_windows
from medjax.models.heads import DenseHead
from medjax.models.model import Model, parameter_count
from medjax.models.vit import ViT

# A small network of every family: options, patch, expected shapes of the levels (voxels and channels).
SMALL: dict[str, tuple[dict[str, Any], tuple[int, ...], list[tuple[int, ...]]]] = {
    "nnunet": (
        {"features": (4, 6, 8), "factors": ((1, 2, 2), (2, 2, 2)), "kernels": ((1, 3, 3), (3, 3, 3), (3, 3, 3))},
        (4, 8, 8),
        [(4, 8, 8, 4), (4, 4, 4, 6)],
    ),
    "resenc": (
        {"features": (4, 6, 8), "blocks": (1, 1, 2), "bottleneck": True},
        (8, 8, 8),
        [(8, 8, 8, 4), (4, 4, 4, 6), (2, 2, 2, 8)],
    ),
    "resnet": (
        {"depth": 10, "features": (4, 4, 8, 8), "stem_kernel": (3, 3, 3), "pool": (1, 2, 2), "norm": "group",
         "stem_stride": (2, 2, 2), "factors": ((1, 1, 1), (2, 2, 2), (2, 2, 2), (1, 1, 1)), "dilations": (1, 1, 1, 2),
         "decoder": "unet", "decoder_convs": 1},
        (16, 32, 32),
        [(16, 32, 32, 8), (8, 16, 16, 4), (8, 8, 8, 4), (4, 4, 4, 4)],
    ),
    "densenet": (
        {"blocks": (1, 2), "features": 4, "growth": 2, "stem_kernel": (3, 3, 3), "norm": "batch_frozen"},
        (8, 8, 16),
        [(4, 4, 8, 4), (2, 2, 4, 6), (1, 1, 2, 7)],
    ),
    "inception": (
        {
            "width": 1 / 4, "factors": ((1, 2, 2), (2, 2, 2), (1, 1, 1), (1, 1, 2)),
            "decoder": "unet", "decoder_convs": 1,
        },
        (16, 32, 32),
        [(16, 32, 32, 8), (8, 16, 16, 16), (8, 8, 8, 48), (4, 4, 4, 208)],
    ),
    "mednext": (
        {
            "features": 4, "blocks": (1, 1, 1), "expansions": (2, 3, 2), "factors": ((1, 2, 2), (2, 2, 2)),
            "kernel": (1, 3, 3),
        },
        (4, 8, 8),
        [(4, 8, 8, 4), (4, 4, 4, 8)],
    ),
    "vit": ({"features": 8, "depth": 2, "heads": 2, "mlp": 8, "patch": (2, 4, 4)}, (4, 8, 8), [(2, 2, 2, 8)]),
    "unetr": (
        {"features": 8, "depth": 4, "heads": 2, "mlp": 8, "patch": (4, 8, 8), "decoder_features": 4},
        (4, 8, 8),
        [(4, 8, 8, 4), (4, 8, 8, 8), (4, 4, 4, 16), (2, 2, 2, 32)],
    ),
    "swin": (
        {"features": 4, "depths": (2,), "heads": (2,), "window": (2, 2, 2), "factors": (1, 2, 2)},
        (8, 16, 8),
        [(4, 8, 4, 4), (4, 4, 2, 8)],
    ),
    "swin_unetr": (
        {"features": 4, "depths": (2,), "heads": (2,), "window": (3, 3, 3), "factors": (1, 2, 2)},
        (8, 16, 8),
        [(8, 16, 8, 4), (4, 8, 4, 4)],
    ),
}  # fmt: skip


def small(name: str, **options: Any) -> tuple[nn.Module, jax.Array]:
    """The small network of a family and an image for it, of two channels."""
    given, patch, _ = SMALL[name]
    x = jax.random.normal(jax.random.key(0), (1, *patch, 2))
    return models.build({"name": name, **given, **options}, jnp.float32), x


def initialised(net: nn.Module, x: jax.Array) -> Any:
    return jax.jit(lambda: net.init(jax.random.key(1), x, train=True))()


def drawn(net: nn.Module, x: jax.Array) -> Any:
    """Variables of a network without its initialisation, whose random draws take the compiler longest."""
    rng = np.random.default_rng(0)

    def value(path: Any, like: jax.ShapeDtypeStruct) -> np.ndarray:
        if like.shape[:-1]:
            return rng.normal(0, np.prod(like.shape[:-1]) ** -0.5, like.shape).astype(np.float32)
        return np.full(like.shape, 1.0 if path[-1].key in ("scale", "variance") else 0.0, np.float32)

    return jax.tree_util.tree_map_with_path(value, jax.eval_shape(lambda x: net.init(jax.random.key(0), x), x))


def count(name: str, channels: int, size: int, head: int = 0, levels: int = 1, **options: Any) -> int:
    """Parameters of a network, without making any of them."""
    net = models.build({"name": name, **options}, jnp.float32)
    model = Model(net, {"task": DenseHead(head, levels=levels)}) if head else net
    x = jax.ShapeDtypeStruct((1, size, size, size, channels), jnp.float32)
    return parameter_count(jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=True), x))


@pytest.mark.parametrize(
    ("name", "options", "channels", "size", "head", "millions", "digits"),
    [
        ("nnunet", {}, 4, 32, 3, 31.2, 1),  # nnU-Net's plan for BraTS: six stages, 32 to 320 features
        ("resenc", {}, 1, 32, 2, 102.35, 2),  # nnU-Net revisited: ResEnc L
        ("mednext", {"variant": "S"}, 1, 16, 13, 5.6, 1),
        ("mednext", {"variant": "B"}, 1, 16, 13, 10.5, 1),
        ("mednext", {"variant": "M"}, 1, 16, 13, 17.6, 1),
        ("mednext", {"variant": "L"}, 1, 16, 13, 61.8, 1),
        ("swin_unetr", {}, 1, 32, 14, 62.2, 1),
        ("resnet", {"depth": 18, "shortcut": "A"}, 1, 16, 0, 32.99, 2),
        ("resnet", {"depth": 50}, 1, 16, 0, 46.16, 2),  # MedicalNet's page
        ("densenet", {"depth": 121}, 1, 32, 0, 11.24, 2),
        ("inception", {}, 3, 32, 0, 12.29, 2),
        ("unetr", {}, 1, 96, 14, 92.78, 2),
    ],
)  # fmt: skip
def test_published_parameter_counts(
    name: str, options: dict[str, Any], channels: int, size: int, head: int, millions: float, digits: int
) -> None:
    levels = 1 if name == "swin_unetr" or name == "unetr" else 5
    found = count(name, channels, size, head, levels, **options) / 1e6
    assert round(found, digits) == millions, found


@pytest.mark.parametrize("name", SMALL)
def test_pyramid_shapes(name: str) -> None:
    _, patch, shapes = SMALL[name]
    net, x = small(name)
    total = net.total_factor()
    assert all(size % f == 0 for size, f in zip(patch, total, strict=True))
    levels, _ = jax.eval_shape(lambda x: net.init_with_output(jax.random.key(0), x), x)
    assert [v.shape[1:] for v in levels] == shapes
    assert all(v.dtype == jnp.float32 for v in levels)
    half, _ = small(name)
    half = half.clone(dtype=jnp.bfloat16)
    levels, variables = jax.eval_shape(lambda x: half.init_with_output(jax.random.key(0), x), x)
    assert all(v.dtype == jnp.bfloat16 for v in levels)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(variables))


# What takes the compiler long is left to the slow tests.
LONG = ("inception", "unetr", "swin_unetr", "densenet")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in SMALL])
def test_gradients_reach_every_parameter(name: str) -> None:
    """All finite; with remat, the same."""
    net, x = small(name)
    variables = drawn(net, x)

    def gradient(net: Any) -> Any:
        def loss(variables: Any) -> jax.Array:
            levels = net.apply(variables, x, train=True)
            # Uneven weights: what is constant over voxels or channels a normalisation takes away.
            rng = np.random.default_rng(2)
            terms = (jnp.mean(jnp.tanh(v) * rng.normal(size=v.shape).astype(np.float32)) for v in levels)
            return sum(terms, jnp.zeros(()))

        return jax.jit(jax.grad(loss))(variables)

    found = gradient(net)
    flat = jax.tree_util.tree_flatten_with_path(found)[0]
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(g) for path, g in flat}
    assert all(np.isfinite(g).all() for g in leaves.values())
    dead = [path for path, g in leaves.items() if not np.abs(g).max() > 0 and not path.endswith(("mean", "variance"))]
    # A bias before an instance normalisation cancels.
    assert [path for path in dead if not path.endswith("bias")] == []
    again = gradient(small(name, remat=True)[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), again, found)


# Encoders whose small network has no decoder, with one: shapes of the levels, the encoder's coarsest last.
DECODED = {
    "densenet": [(8, 8, 16, 8), (4, 4, 8, 4), (2, 2, 4, 6), (1, 1, 2, 7)],
    "swin": [(8, 16, 8, 8), (4, 8, 4, 4), (4, 4, 2, 8)],
}


@pytest.mark.parametrize("name", [n for n in SMALL if n not in ("inception", "unetr", "swin_unetr")])
def test_bfloat16_says_what_float32_says(name: str) -> None:
    """Each level to a few percent of its norm. What `DECODED` lists runs with a decoder on its levels."""
    more = {"decoder": "unet", "decoder_convs": 1, "bottleneck": True} if name in DECODED else {}
    net, x = small(name, **more)
    variables, half = drawn(net, x), net.clone(dtype=jnp.bfloat16)
    wide, narrow = jax.jit(lambda v, x: (net.apply(v, x), half.apply(v, x)))(variables, x)
    if name in DECODED:
        assert [v.shape[1:] for v in wide] == DECODED[name]
        fewer = net.clone(levels=2)
        levels = jax.eval_shape(fewer.apply, variables, x)
        assert [v.shape for v in levels] == [v.shape for v in (*wide[:2], wide[-1])]
    for a, b in zip(wide, narrow, strict=True):
        assert b.dtype == jnp.bfloat16
        error = np.linalg.norm(np.float32(a) - np.float32(b)) / np.linalg.norm(np.float32(a))
        assert 0 < error < 0.06, error


# What adapters stand after, and how many there are: blocks, the outer one where they hold blocks.
ADAPTED = {
    "nnunet": (r"encoder\d/block\d|decoder/stage\d/block\d", 10),
    "resenc": (r"stem|encoder\d/block\d_(conv\d|skip)|decoder/stage\d/block0", 13),
    "resnet": (r"stem|layer\d_block\d|decoder/image/block\d|decoder/unet/stage\d/block0", 11),
    "densenet": (r"stem|block\d_layer\d", 4),
    "inception": (r"stem\d|group\d_block\d|decoder/image/block\d|decoder/unet/stage\d/block0", 18),
    "mednext": (r"(encoder|decoder)\d_block\d|(down|up)\d", 9),
    "vit": (r"encoder/block\d", 2),
    "unetr": (r"encoder/block\d|image|skip\d_block\d|decoder\d/block", 12),
    "swin": (r"stage\d_block\d", 2),
    "swin_unetr": (r"stage\d_block\d|image|skip\d|decoder\d/block", 6),
}


@pytest.mark.parametrize("name", SMALL)
def test_adapters_stand_after_what_a_backbone_repeats(name: str) -> None:
    net, x = small(name, remat=True)
    model = Model(net, {}, Insert("adapter", 3))
    made = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), x)["params"]
    leaves = jax.tree_util.tree_flatten_with_path(made)[0]
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    places = {path.split("/adapter/")[0] for path in paths if "/adapter/" in path}
    pattern, number = ADAPTED[name]
    assert all(re.fullmatch(f"backbone/({pattern})", place) for place in places), places
    assert len(places) == number, places


def test_stochastic_regularisation_needs_training_and_a_key() -> None:
    net, x = small("resenc", dropout=0.3, drop_path=0.5)
    variables = initialised(net, x)
    apply = jax.jit(lambda train, key: net.apply(variables, x, train=train, rngs={"dropout": key})[0], static_argnums=0)
    bare = jax.jit(lambda: net.apply(variables, x, train=True)[0])()
    first, again, other = (apply(True, jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    np.testing.assert_array_equal(apply(False, jax.random.key(0)), bare)


def test_dropout_keeps_the_mean_and_drops_what_it_says() -> None:
    x = jnp.ones((4, 3, 3, 3, 500))
    key = {"dropout": jax.random.key(3)}
    for options, axes in (({}, ()), ({"whole_channels": True}, (1, 2, 3)), ({"whole_examples": True}, (1, 2, 3, 4))):
        y = np.asarray(layers.Dropout(0.25, **options).apply({}, x, train=True, rngs=key))
        values = y.mean(axes)
        np.testing.assert_allclose(np.unique(values), [0, 1 / 0.75] if y.min() == 0 else [1 / 0.75], rtol=1e-5)
        if not options.get("whole_examples"):
            assert abs(y.mean() - 1) < 0.06
    with pytest.raises(UserError, match="must be in"):
        layers.Dropout(1.0).apply({}, x, train=True)


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 2)])
def test_pools_by_hand(kernel: tuple[int, ...]) -> None:
    """Maximum over windows centred on every stride-th voxel; mean over cells."""
    x = np.random.default_rng(0).normal(size=(1, 5, 6, 7, 2)).astype(np.float32)
    strides = (2, 1, 3)
    got = np.asarray(layers.max_pool(jnp.asarray(x), kernel, strides))
    assert got.shape == (1, 3, 6, 3, 2)
    low = [(k - 1) // 2 for k in kernel]
    for i, j, k in np.ndindex(*got.shape[1:4]):
        starts = [at * s - margin for at, s, margin in zip((i, j, k), strides, low, strict=True)]
        cut = tuple(slice(max(a, 0), a + width) for a, width in zip(starts, kernel, strict=True))
        np.testing.assert_array_equal(got[0, i, j, k], x[0][cut].max((0, 1, 2)))
    mean = np.asarray(layers.mean_pool(jnp.asarray(x), (2, 3, 2)))
    assert mean.shape == (1, 2, 2, 3, 2)
    np.testing.assert_allclose(mean[0, 1, 0, 2], x[0, 2:4, :3, 4:6].mean((0, 1, 2)), rtol=1e-5)


def test_transposed_convolution_is_the_adjoint() -> None:
    """<conv(y), x> = <y, transposed(x)> for depthwise and dense kernels, against XLA's own convolution."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(1, 3, 2, 4, 4)).astype(np.float32))
    for groups, features, strides in ((4, 4, (2, 2, 2)), (1, 3, (1, 2, 2))):
        net = layers.ConvTranspose3D(features, (3, 3, 3), strides, groups)
        variables = net.init(jax.random.key(0), x)
        up = net.apply(variables, x)
        assert up.shape[1:4] == tuple((n - 1) * s + 1 for n, s in zip(x.shape[1:4], strides, strict=True))
        y = jnp.asarray(rng.normal(size=up.shape).astype(np.float32))
        down = jax.lax.conv_general_dilated(
            y, variables["params"]["kernel"], strides, [(1, 1)] * 3, feature_group_count=groups,
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        )  # fmt: skip
        np.testing.assert_allclose((down * x).sum(), (y * up).sum(), rtol=1e-4)


def test_norms_by_their_definitions() -> None:
    x = jnp.asarray(np.random.default_rng(2).normal(2.0, 3.0, (2, 3, 4, 2, 6)).astype(np.float32))
    made = layers.norm_act("group", None)
    y = np.asarray(made.apply(made.init(jax.random.key(0), x), x)).reshape(2, -1, 2, 3)  # gcd(8, 6) = 2 groups of 3
    np.testing.assert_allclose(y.mean((1, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(y.std((1, 3)), 1, atol=1e-4)
    frozen = layers.norm_act("batch_frozen", 0.0)
    params = {k: jnp.full(6, v) for k, v in (("scale", 2.0), ("bias", 1.0), ("mean", 2.0), ("variance", 9.0))}
    want = np.maximum((np.asarray(x) - 2) / 3 * 2 + 1, 0)
    np.testing.assert_allclose(frozen.apply({"params": params}, x), want, atol=1e-4)
    gradient = jax.grad(lambda p: (frozen.apply({"params": p}, x) ** 2).sum())(params)
    assert [float(np.abs(gradient[k]).max()) > 0 for k in ("scale", "bias", "mean", "variance")] == [
        True,
        True,
        False,
        False,
    ]
    with pytest.raises(UserError, match="model.norm 'batch' is not known; known: instance, group, batch_frozen"):
        layers.norm_act("batch")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet", {"depth": 10, "features": (4, 4, 4, 4), "stem_kernel": (3, 3, 3)}),
        ("densenet", {"blocks": (1, 1), "features": 4, "growth": 2, "stem_kernel": (3, 3, 3)}),
        ("inception", {"width": 1 / 8}),
    ],
)
def test_a_new_decoder_of_stored_statistics_normalises(name: str, options: dict[str, Any]) -> None:
    """The encoder keeps the statistics it came with; those of a decoder that is new would be 0 and 1 for good."""
    net = models.build({"name": name, "norm": "batch_frozen", "decoder": "unet", **options}, jnp.float32)
    x = jnp.zeros((1, *net.total_factor(), 1))
    params = jax.eval_shape(lambda: net.init(jax.random.key(0), x))["params"]
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    stored = [path for path in paths if path.endswith("/variance")]
    assert stored
    assert not [path for path in stored if path.startswith("decoder/")]
    assert [path for path in paths if path.startswith("decoder/unet/") and path.endswith("/norm/scale")]


def test_window_attention_by_hand() -> None:
    """Two shifted windows of two heads, with the bias of every offset, against a loop over tokens."""
    rng = np.random.default_rng(3)
    size, heads, depth = (2, 1, 3), 2, 4
    table = rng.normal(size=(3, 1, 5, heads)).astype(np.float32)
    places = [(i, j, k) for i in range(2) for j in range(1) for k in range(3)]
    bias = np.asarray(relative_bias(jnp.asarray(table), size))
    for a, p in enumerate(places):
        for b, q in enumerate(places):
            np.testing.assert_array_equal(bias[:, a, b], table[p[0] - q[0] + 1, 0, p[2] - q[2] + 2])
    regions = shifted_regions((2, 1, 6), size, (0, 0, 1))
    # Along z the last window holds what came from both ends.
    assert [len(set(r)) for r in regions] == [1, 2]
    assert regions[1].tolist() == [regions[1][0]] * 2 + [regions[1][2]] + [regions[1][0]] * 2 + [regions[1][2]]
    qkv = rng.normal(size=(4, 6, 3 * heads * depth)).astype(np.float32)
    got = np.asarray(attend(jnp.asarray(qkv), heads, jnp.asarray(bias), regions))
    q, k, v = np.moveaxis(qkv.reshape(4, 6, 3, heads, depth), 2, 0)
    for w in range(4):
        for h in range(heads):
            logits = q[w, :, h] @ k[w, :, h].T / np.sqrt(depth) + bias[h]
            apart = regions[w % 2][:, None] != regions[w % 2][None]
            weights = np.exp(logits - 100 * apart)
            weights /= weights.sum(1, keepdims=True)
            np.testing.assert_allclose(got[w, :, h * depth : (h + 1) * depth], weights @ v[w, :, h], atol=1e-5)
    x = jnp.asarray(rng.normal(size=(2, 4, 2, 6, 3)))
    np.testing.assert_array_equal(from_windows(to_windows(x, size), size, (4, 2, 6)), x)


def test_vit_takes_a_subset_of_tokens_and_other_grids() -> None:
    net = ViT(features=8, depth=1, heads=2, mlp=8, patch=(2, 2, 2))
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 4, 1))
    variables = initialised(net, x)
    everything = jnp.tile(jnp.array([3, 1, 0, 2, 7, 6, 5, 4]), (2, 1))
    both = jax.jit(lambda v: (net.apply(v, x)[0].reshape(2, 8, 8), net.apply(v, x, keep=everything)))
    grid, tokens = both(variables)
    np.testing.assert_allclose(tokens, jnp.take_along_axis(grid, everything[..., None], 1), atol=1e-5)
    few = jax.eval_shape(lambda v: net.apply(v, x, keep=jnp.array([[0, 5], [7, 2]])), variables)
    assert few.shape == (2, 2, 8)
    # Another grid: the positions are interpolated; on their own grid they are what they are.
    other = jax.jit(lambda v: net.apply(v, jnp.ones((1, 8, 4, 6, 1)))[0])(variables)
    assert other.shape == (1, 4, 2, 3, 8)
    assert np.isfinite(other).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet", {"depth": 20}, "model.depth 20 is not known; known: 10, 18"),
        ("resnet", {"shortcut": "C"}, "model.shortcut 'C'"),
        ("resnet", {"decoder": "fpn"}, "model.decoder 'fpn' is not known; known: none, unet"),
        ("densenet", {"depth": 120, "blocks": ()}, "model.depth 120"),
        ("mednext", {"variant": "XL", "blocks": (), "expansions": ()}, "model.variant 'XL' is not known; known: S, B"),
        ("mednext", {"blocks": (1, 1)}, "differ in the number of stages"),
        ("swin", {"decoder": "upernet"}, "model.decoder 'upernet'"),
        ("swin", {"merging": "mean"}, "model.merging 'mean'"),
        ("swin", {"heads": (3,)}, "stage 0 has 4 channels, no multiple of its 3 heads"),
        ("swin", {"heads": (2, 2)}, "one number a stage"),
        ("vit", {"heads": 3}, "model.features 8 is not a multiple of model.heads 3"),
        ("unetr", {"patch": (6, 8, 8)}, r"model.patch \(6, 8, 8\) must be made of 1, 2, 4, 8 and 16"),
        ("nnunet", {"blocks": (1, 2)}, "model.blocks.*one number, or 3"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_in_words(name: str, options: dict[str, Any], message: str) -> None:
    net, _ = small(name, **options)
    x = jax.ShapeDtypeStruct((1, 24, 24, 24, 1), jnp.float32)
    with pytest.raises(UserError, match=message):
        jax.eval_shape(lambda x: net.init(jax.random.key(0), x), x)


def test_every_backbone_has_plain_options() -> None:
    """What a configuration needs: defaults for all options, none of them mutable."""
    for name in models.BACKBONES:
        known = models.options(name)
        assert {"levels", "remat"} <= set(known) or name == "unet"
        assert all(isinstance(v, int | float | str | tuple) for v in known.values()), known
