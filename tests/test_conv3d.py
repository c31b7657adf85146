"""conv3d: the native CPU kernel and its fallback against XLA, finite differences and float64."""

from __future__ import annotations

import concurrent.futures
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from medjax.errors import UserError
from medjax.ops import native
from medjax.ops.conv3d import conv3d, patch_conv, patch_conv_transpose
from medjax.ops.native import build, cpus

REPO = Path(__file__).resolve().parents[1]
IS_NATIVE = native.enabled() and native.available()
needs_native = pytest.mark.skipif(not IS_NATIVE, reason="native kernels are off or cannot be built here")


def reference(x, w, strides=1, padding="SAME", dilation=1, groups=1, bias=None):
    """The definition, by XLA."""
    three = lambda v: (v,) * 3 if isinstance(v, int) else tuple(v)  # noqa: E731
    y = lax.conv_general_dilated(
        x,
        w,
        three(strides),
        padding,
        rhs_dilation=three(dilation),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        feature_group_count=groups,
    )
    return y if bias is None else y + bias


def arrays(*shapes, seed=0, dtype=np.float32):
    generator = np.random.default_rng(seed)
    return tuple(jnp.asarray(generator.standard_normal(shape), dtype) for shape in shapes)


def relative(a, b):
    """Largest difference over the largest reference value."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-30)


@st.composite
def problems(draw):
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    kernel = draw(st.tuples(*[st.integers(1, 4)] * 3))
    dilation = draw(st.tuples(*[st.integers(1, 2)] * 3))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    explicit = st.tuples(*[st.tuples(st.integers(0, 3), st.integers(0, 3))] * 3)
    return {
        "x": (
            draw(st.integers(0, 3)),
            *[draw(st.integers(max(1, r - 1), r + 6)) for r in reach],
            groups * draw(st.sampled_from([1, 3, 17])),
        ),
        "kernel": kernel,
        "features": groups * draw(st.sampled_from([1, 2, 5, 17])),
        "strides": draw(st.tuples(*[st.integers(1, 3)] * 3)),
        "padding": draw(st.one_of(st.sampled_from(["SAME", "VALID"]), explicit)),
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
        "dtype": draw(st.sampled_from([jnp.float32, jnp.float32, jnp.bfloat16])),
        "seed": draw(st.integers(0, 1000)),
    }


@settings(max_examples=40, deadline=None, derandomize=True)
@given(problems())
def test_agrees_with_xla_in_float64_over_shapes_kernels_strides_padding_groups_and_types(problem):
    shape, dtype, groups = problem["x"], problem["dtype"], problem["groups"]
    filters = (*problem["kernel"], shape[4] // groups, problem["features"])
    x, w, bias = arrays(shape, filters, (problem["features"],), seed=problem["seed"], dtype=dtype)
    bias = bias if problem["bias"] else None
    options = {name: problem[name] for name in ("strides", "padding", "dilation", "groups")}

    def pulled(function, operands, g):
        y, back = jax.vjp(lambda *a: function(*a[:2], **options, bias=a[2] if len(a) > 2 else None), *operands)
        return y, *back(g.astype(y.dtype))

    operands = (x, w) if bias is None else (x, w, bias)
    (g,) = arrays(jax.eval_shape(lambda: conv3d(x, w, **options)).shape, seed=1, dtype=dtype)
    ours = pulled(conv3d, operands, g)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in (*operands, g)]
        exact = pulled(reference, wide[:-1], wide[-1])
    bounds = (1e-6, 1e-5, 1e-5, 1e-5) if dtype == jnp.float32 else (1e-2,) * 4
    for value, wanted, bound in zip(ours, exact, bounds, strict=False):
        assert value.dtype == dtype
        assert relative(value, wanted) < bound


@pytest.mark.parametrize(("kernel", "groups"), [((1, 3, 3), 1), ((5, 5, 5), 1), ((7, 7, 7), 8), ((1, 1, 1), 1)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_common_kernels(kernel, groups, dtype):
    x, w = arrays((2, 12, 11, 10, 8), (*kernel, 8 // groups, 16), dtype=dtype)
    got = jax.value_and_grad(lambda x, w: jnp.sum(conv3d(x, w, groups=groups).astype(jnp.float32) ** 2), (0, 1))(x, w)
    x, w = x.astype(jnp.float32), w.astype(jnp.float32)
    want = jax.value_and_grad(lambda x, w: jnp.sum(reference(x, w, groups=groups) ** 2), (0, 1))(x, w)
    bound = 1e-5 if dtype == jnp.float32 else 2e-2
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative(a, b) < bound


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("kernel", "strides", "dilation", "padding", "channels"),
    [
        ((7, 7, 7), 1, 1, "SAME", 32),
        ((3, 3, 3), 2, 1, "SAME", 17),
        ((5, 3, 2), (1, 2, 3), (1, 2, 1), "VALID", 3),
        ((3, 3, 3), 1, 2, [(1, 0), (3, 2), (5, 1)], 40),
        ((3, 5, 3), (2, 1, 2), 2, [(0, 3), (1, 2), (9, 8)], 16),
        ((1, 3, 5), 1, 1, [(0, 0), (2, 2), (6, 0)], 2),
    ],
)
def test_depthwise(kernel, strides, dilation, padding, channels, dtype):
    x, w, bias = arrays((2, 12, 13, 14, channels), (*kernel, 1, channels), (channels,), dtype=dtype)

    def pulled(function, *operands):
        y, back = jax.vjp(lambda x, w, b: function(x, w, strides, padding, dilation, channels, b), *operands)
        (g,) = arrays(y.shape, seed=1, dtype=dtype)
        return y, *back(g.astype(y.dtype))

    got = pulled(conv3d, x, w, bias)
    want = pulled(reference, *(a.astype(jnp.float32) for a in (x, w, bias)))
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < (1e-5 if dtype == jnp.float32 else 2e-2)


@pytest.mark.parametrize(
    ("shape", "kernel", "features", "padding"),
    [
        ((2, 15, 11, 13, 16), (3, 3, 3), 32, "SAME"),
        ((1, 14, 14, 15, 48), (3, 3, 3), 16, "VALID"),
        ((3, 9, 14, 13, 32), (3, 3, 1), 48, "SAME"),
        ((3, 9, 14, 13, 16), (1, 3, 3), 32, ((0, 0), (2, 1), (0, 2))),
        ((2, 16, 3, 29, 80), (3, 1, 3), 16, ((1, 1), (2, 0), (0, 4))),
    ],
)
def test_minimal_filtering(shape, kernel, features, padding):
    x, w, bias = arrays(shape, (*kernel, shape[4], features), (features,))

    def pulled(function, x, w, bias, g):
        y, back = jax.vjp(lambda x, w, b: function(x, w, padding=padding, bias=b), x, w, bias)
        return y, *back(g)

    (g,) = arrays(jax.eval_shape(lambda: conv3d(x, w, padding=padding)).shape, seed=1)
    ours = jax.jit(functools.partial(pulled, conv3d))(x, w, bias, g)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in (x, w, bias, g)]
        exact = pulled(reference, *wide)
    for value, wanted, bound in zip(ours, exact, (1e-6, 1e-5, 1e-5, 1e-5), strict=True):
        assert relative(value, wanted) < bound


@pytest.mark.parametrize("cell", [(2, 2, 2), (1, 2, 2), (2, 1, 3)])
def test_maps_of_cells_are_the_strided_convolution_and_its_transpose(cell):
    x, w, bias = arrays((2, 4, 6, 6, 3), (*cell, 3, 5), (5,))
    down = patch_conv(x, w, bias)
    assert relative(down, reference(x, w, cell, "VALID", bias=bias)) < 1e-6
    up = np.asarray(patch_conv_transpose(x, w, bias))
    assert up.shape == (2, 4 * cell[0], 6 * cell[1], 6 * cell[2], 5)
    for i, j, k in np.ndindex(*cell):
        want = np.asarray(x, np.float64) @ np.asarray(w[i, j, k], np.float64) + np.asarray(bias, np.float64)
        assert relative(up[:, i :: cell[0], j :: cell[1], k :: cell[2]], want) < 1e-6


@pytest.mark.parametrize("function", [patch_conv, patch_conv_transpose])
def test_gradients_of_maps_of_cells(function):
    x, w, bias = arrays((2, 4, 6, 6, 3), (2, 1, 2, 3, 5), (5,))

    def derivatives():
        loss = lambda *a: jnp.sum(jnp.sin(function(*a)))  # noqa: E731
        penalty = lambda *a: sum(jnp.sum(g**2) for g in jax.grad(loss, (0, 1, 2))(*a))  # noqa: E731
        return jax.grad(loss, (0, 1, 2))(x, w, bias), jax.grad(penalty, (0, 1, 2))(x, w, bias)

    got = derivatives()
    with native.disabled():
        want = derivatives()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative(a, b) < 1e-5


def test_an_image_that_is_not_whole_cells_is_refused():
    with pytest.raises(ValueError, match="whole number of cells"):
        patch_conv(jnp.zeros((1, 4, 5, 4, 3)), jnp.zeros((2, 2, 2, 3, 4)))


def test_gradient_agrees_with_finite_differences():
    x, w, g, dx, dw = arrays((1, 5, 6, 4, 3), (3, 3, 3, 3, 2), (1, 3, 3, 2, 2), (1, 5, 6, 4, 3), (3, 3, 3, 3, 2))
    loss = lambda x, w: float(np.sum(np.asarray(conv3d(x, w, 2) * g, np.float64)))  # noqa: E731
    gx, gw = jax.grad(lambda x, w: jnp.sum(conv3d(x, w, 2) * g), (0, 1))(x, w)
    # The loss is quadratic along the line, so central differences are exact up to rounding, at any step.
    slope = (loss(x + dx, w + dw) - loss(x - dx, w - dw)) / 2
    assert slope == pytest.approx(float(jnp.vdot(gx, dx) + jnp.vdot(gw, dw)), rel=1e-4)


def test_second_order_and_forward_mode_agree_with_xla():
    x, w, bias, v = arrays((2, 5, 6, 4, 3), (3, 2, 3, 3, 4), (4,), (3, 2, 3, 3, 4))

    def curvature(function):
        loss = lambda x, w, b: jnp.sum(jnp.sin(function(x, w, (2, 1, 1), bias=b)))  # noqa: E731
        penalty = lambda *a: sum(jnp.sum(g**2) for g in jax.grad(loss, (0, 1, 2))(*a))  # noqa: E731
        over = jax.jvp(lambda w: jax.grad(loss, 1)(x, w, bias), (w,), (v,))
        return jax.grad(penalty, (0, 1, 2))(x, w, bias), over

    for a, b in zip(jax.tree.leaves(curvature(conv3d)), jax.tree.leaves(curvature(reference)), strict=True):
        assert relative(a, b) < 1e-5


def test_vmap_of_images_filters_and_gradients():
    x, w, one = arrays((3, 2, 5, 6, 4, 3), (3, 3, 3, 3, 3, 4), (3, 3, 3, 3, 4))
    grad = lambda f: jax.grad(lambda w, x: jnp.sum(jnp.sin(f(x, w))))  # noqa: E731
    for a, b in [
        (jax.vmap(conv3d, (0, None))(x, one), jnp.stack([reference(i, one) for i in x])),
        (jax.vmap(conv3d, (1, None), 2)(x, one), jnp.stack([reference(x[:, i], one) for i in range(2)], 2)),
        (jax.vmap(conv3d, (None, 0))(x[0], w), jnp.stack([reference(x[0], i) for i in w])),
        (jax.vmap(conv3d)(x, w), jnp.stack([reference(i, j) for i, j in zip(x, w, strict=True)])),
        (jax.vmap(grad(conv3d), (None, 0))(one, x), jnp.stack([grad(reference)(one, i) for i in x])),
    ]:
        assert relative(a, b) < 1e-5


def test_scan_and_remat():
    x, w = arrays((1, 5, 6, 4, 3), (3, 3, 3, 3, 3))

    def loss(function, wrap):
        layer = wrap(lambda x: jnp.tanh(function(x, w * 0.2)))
        return jax.jit(jax.grad(lambda x: jnp.sum(lax.scan(lambda c, _: (layer(c), None), x, None, length=3)[0])))(x)

    assert relative(loss(conv3d, jax.checkpoint), loss(reference, lambda f: f)) < 1e-5


def test_nan_and_infinity_reach_their_windows_only():
    x = np.zeros((1, 9, 9, 9, 3), np.float32)
    x[0, 2, 2, 2, 1], x[0, 6, 6, 6, 0] = np.nan, np.inf
    y = np.array(conv3d(jnp.asarray(x), jnp.ones((3, 3, 3, 3, 5))))
    assert np.isnan(y[0, 1:4, 1:4, 1:4]).all()
    assert np.isinf(y[0, 5:8, 5:8, 5:8]).all()
    y[0, 1:4, 1:4, 1:4] = y[0, 5:8, 5:8, 5:8] = 0
    assert (y == 0).all()


def test_minimal_filtering_keeps_nan_and_infinity_within_a_voxel_of_their_windows():
    x = np.zeros((1, 14, 14, 14, 16), np.float32)
    x[0, 3, 3, 3, 1], x[0, 9, 9, 9, 0] = np.nan, np.inf
    y = np.array(conv3d(jnp.asarray(x), jnp.ones((3, 3, 3, 16, 16))))
    assert np.isnan(y[0, 2:5, 2:5, 2:5]).all()
    assert not np.isfinite(y[0, 8:11, 8:11, 8:11]).any()
    y[0, 1:6, 1:6, 1:6] = y[0, 7:12, 7:12, 7:12] = 0
    assert (y == 0).all()


@pytest.mark.parametrize("channels", [8, 16])
def test_two_runs_agree_bit_for_bit(channels):
    x, w = arrays((2, 24, 20, 18, channels), (3, 3, 3, channels, 16))
    step = jax.jit(jax.value_and_grad(lambda x, w: jnp.sum(jnp.sin(conv3d(x, w))), (0, 1)))
    first = [np.asarray(a) for a in jax.tree.leaves(step(x, w))]
    for _ in range(5):
        for a, b in zip(first, jax.tree.leaves(step(x, w)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_calls_from_several_threads():
    x, w = arrays((1, 16, 16, 16, 4), (3, 3, 3, 4, 8))
    conv = jax.jit(conv3d)
    want = np.asarray(conv(x, w))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda i: np.asarray(conv(x * i, w)) / i, [1, 2, 4, 8] * 8):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"x": (5, 6, 4, 3)}, ValueError),
        ({"groups": 2}, ValueError),
        ({"bias": (3,)}, ValueError),
        ({"strides": 0}, ValueError),
        ({"padding": "FULL"}, ValueError),
        ({"padding": [(1, 1)]}, ValueError),
        ({"dtype": jnp.bfloat16}, TypeError),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, error):
    options = {name: change[name] for name in change if name in ("groups", "strides", "padding")}
    if "bias" in change:
        options["bias"] = jnp.zeros(change["bias"])
    x = jnp.zeros(change.get("x", (1, 5, 6, 4, 3)), change.get("dtype", jnp.float32))
    with pytest.raises(error, match="conv3d"):
        conv3d(x, jnp.zeros((3, 3, 3, 3, 4)), **options)


@pytest.mark.parametrize("platforms", [["cuda"], ["tpu"], ["cuda", "tpu"]])
def test_a_program_exports_for_accelerators_without_the_native_call(platforms):
    x, w = arrays((1, 8, 8, 8, 3), (3, 3, 3, 3, 4))
    step = jax.jit(jax.grad(lambda x, w: jnp.sum(conv3d(x, w) ** 2), (0, 1)))
    exported = jax.export.export(step, platforms=platforms)(x, w)
    assert "stablehlo.convolution" in exported.mlir_module()
    assert "custom_call" not in exported.mlir_module()
    assert exported.serialize()


def test_shape_polymorphic_export_falls_back():
    (w,) = arrays((3, 3, 3, 3, 4))
    shape = jax.export.symbolic_shape("b, 8, 8, 8, 3")
    exported = jax.export.export(jax.jit(conv3d))(jax.ShapeDtypeStruct(shape, jnp.float32), w)
    (x,) = arrays((2, 8, 8, 8, 3))
    assert relative(exported.call(x, w), reference(x, w)) < 1e-6


@needs_native
def test_the_cpu_program_holds_the_native_call_and_can_be_kept_from_it():
    x, w = arrays((1, 8, 8, 8, 3), (3, 3, 3, 3, 4))
    assert "medjax_conv3d" in jax.jit(lambda x: conv3d(x, w)).lower(x).as_text()
    with native.disabled():
        text = jax.jit(lambda x: conv3d(x, w)).lower(x).as_text()
    assert "custom_call" not in text
    assert "oneDNN" in native.status()


# --- in other processes: devices, threads, builds --------------------------------------------------------------------


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    merged = {**os.environ, "PYTHONPATH": str(REPO), "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run([sys.executable, "-c", code], env=merged, capture_output=True, text=True, timeout=300)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from medjax.ops.conv3d import conv3d
key = jax.random.key(0)
x, w, b = jax.random.normal(key, (8, 6, 6, 6, 3)), jax.random.normal(key, (3, 3, 3, 3, 4)), jnp.arange(4.0)
step = lambda w, b, x: jax.value_and_grad(lambda w, b, x: jnp.sum(jnp.sin(conv3d(x, w, bias=b))), (0, 1, 2))(w, b, x)
want = jax.jit(step)(w, b, x)
mesh = Mesh(np.array(jax.devices()), ("data",))
split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
placed = jax.device_put((w, b, x), (whole, whole, split))
compiled = jax.jit(step).lower(*placed).compile()
got = compiled(*placed)
text = compiled.as_text()
assert "all-gather" not in text and "all-reduce" in text, text
assert "medjax_conv3d" in text or "convolution" in text
assert got[1][2].sharding.is_equivalent_to(split, 5), got[1][2].sharding
for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
for check in (True, False):
    mapped = jax.shard_map(lambda w, b, x: jax.lax.psum(jnp.sum(jnp.sin(conv3d(x, w, bias=b))), "data"), mesh=mesh,
                           in_specs=(P(), P(), P("data")), out_specs=P(), check_vma=check)
    got = jax.jit(jax.value_and_grad(mapped, (0, 1, 2)))(*placed)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
print("devices", len(jax.devices()))
"""


def test_the_batch_axis_stays_sharded_over_eight_devices():
    done = python(SHARDED, XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert "devices 8" in done.stdout, done.stderr


ONE_CALL = """
import jax.numpy as jnp
from medjax.ops.conv3d import conv3d
from medjax.ops import native
print(float(conv3d(jnp.ones((1, 4, 4, 4, 1)), jnp.ones((3, 3, 3, 1, 1)))[0, 1, 1, 1, 0]))
print(native.status())
"""


@needs_native
def test_two_processes_build_at_once_and_a_third_finds_it_built(tmp_path):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: python(ONE_CALL, MEDJAX_CACHE=str(tmp_path)), range(2)))
    for done in (*both, python(ONE_CALL, MEDJAX_CACHE=str(tmp_path))):
        assert done.stdout.startswith("27.0"), done.stderr
        assert "oneDNN" in done.stdout
    assert sum("building" in done.stderr for done in both) == 1
    assert len(list((tmp_path / "native").glob("*.so"))) == 1


@needs_native
@pytest.mark.parametrize(
    ("compiler", "said"),
    [("no-such-compiler", "no C++ compiler"), ("false", "build failed")],
    ids=["missing", "failing"],
)
def test_without_a_working_compiler_one_warning_then_xla(tmp_path, compiler, said):
    done = python(ONE_CALL, MEDJAX_CACHE=str(tmp_path), CXX=compiler)
    assert done.stdout.startswith("27.0"), done.stderr
    assert done.stderr.count("some ten times slower") == 1
    assert said in done.stderr
    assert "not in force" in done.stdout


def test_an_unusable_cache_falls_back(tmp_path):
    (tmp_path / "file").write_text("")
    done = python(ONE_CALL, MEDJAX_CACHE=str(tmp_path / "file"), MEDJAX_NATIVE="1")
    assert done.stdout.startswith("27.0"), done.stderr
    assert "MEDJAX_CACHE" in done.stderr or not IS_NATIVE


def test_the_environment_turns_the_kernels_off(tmp_path):
    done = python(ONE_CALL, MEDJAX_NATIVE="0", MEDJAX_CACHE=str(tmp_path))
    assert done.stdout.startswith("27.0"), done.stderr
    assert "off" in done.stdout
    assert not list(tmp_path.iterdir())
    assert done.stderr.count("medjax:") == 0


def test_a_misspelt_switch_is_an_error(monkeypatch):
    monkeypatch.setenv("MEDJAX_NATIVE", "yes")
    with pytest.raises(UserError, match="MEDJAX_NATIVE=yes"):
        native.enabled()


@pytest.mark.parametrize(("machine", "system"), [("aarch64", "linux"), ("x86_64", "darwin")])
def test_other_platforms_are_told_apart(monkeypatch, machine, system):
    monkeypatch.setattr(build.platform, "machine", lambda: machine)
    monkeypatch.setattr(build.sys, "platform", system)
    with pytest.raises(build.Unavailable, match=f"{machine} {system}"):
        build.library()


@pytest.mark.parametrize(
    ("files", "membership", "quota"),
    [
        ({"a/b/cpu.max": "150000 100000", "a/cpu.max": "max 100000"}, "0::/a/b\n", 1.5),
        ({"a/b/cpu.max": "400000 100000", "a/cpu.max": "200000 100000"}, "0::/a/b\n", 2.0),
        ({"cpu.max": "300000 100000"}, "0::/not/mounted/here\n", 3.0),
        ({"a/cpu.max": "max 100000"}, "0::/a\n", None),
        ({"cpu,cpuacct/j/cpu.cfs_quota_us": "50000", "cpu,cpuacct/j/cpu.cfs_period_us": "100000"},
         "4:cpu,cpuacct:/j\n3:memory:/j\n", 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu:/\n", None),
        ({}, "", None),
    ],
)  # fmt: skip
def test_control_group_quotas(tmp_path, files, membership, quota):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "membership").write_text(membership)
    assert cpus.cgroup_quota(tmp_path, tmp_path / "membership") == quota


def test_threads_follow_affinity_quota_and_openmp(monkeypatch):
    monkeypatch.setattr(cpus.os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(cpus, "cgroup_quota", lambda: None)
    assert cpus.usable_cpus() == 6
    monkeypatch.setattr(cpus, "cgroup_quota", lambda: 2.5)
    assert cpus.usable_cpus() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "2,1")
    assert cpus.usable_cpus() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    assert cpus.usable_cpus() == 3


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_thousand_steps_without_memory_growth():
    x, w = arrays((1, 8, 8, 8, 4), (3, 3, 3, 4, 4))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(w):
        return w - 1e-3 * jax.grad(lambda w: jnp.mean(jnp.sin(conv3d(x, w))))(w)

    for _ in range(100):
        w = step(w)
    before = resident_mb()
    for _ in range(1000):
        w = step(w)
    assert np.isfinite(np.asarray(w)).all()
    assert resident_mb() - before < 16
