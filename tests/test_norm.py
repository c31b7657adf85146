"""instance_norm_act, native and fallback, against the definition in float64 and finite differences."""

from __future__ import annotations

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

from medjax.ops import native
from medjax.ops.norm import instance_norm_act

REPO = Path(__file__).resolve().parents[1]
needs_native = pytest.mark.skipif(
    not (native.enabled() and native.available()), reason="native kernels are off or cannot be built here"
)


def definition(x, scale, bias, slope, eps=1e-5):
    """As the paper has it, in numpy and float64."""
    x, scale, bias = (np.asarray(a, np.float64) for a in (x, scale, bias))
    mean, variance = x.mean((1, 2, 3), keepdims=True), x.var((1, 2, 3), keepdims=True)
    z = (x - mean) / np.sqrt(variance + eps) * scale + bias
    return z if slope is None else np.where(z >= 0, z, slope * z)


def gradients(x, g, scale, bias, slope, eps=1e-5):
    """Its derivatives by hand: (dx, dscale, dbias) for the cotangent g."""
    x, g, scale, bias = (np.asarray(a, np.float64) for a in (x, g, scale, bias))
    voxels = (1, 2, 3)
    r = 1 / np.sqrt(x.var(voxels, keepdims=True) + eps)
    hat = (x - x.mean(voxels, keepdims=True)) * r
    dz = g if slope is None else np.where(hat * scale + bias >= 0, g, slope * g)
    dhat = dz * scale
    dx = r * (dhat - dhat.mean(voxels, keepdims=True) - hat * (dhat * hat).mean(voxels, keepdims=True))
    return dx, (dz * hat).sum((0, 1, 2, 3)), dz.sum((0, 1, 2, 3))


def example(shape, seed=0, dtype=np.float32, offset=0.0):
    generator = np.random.default_rng(seed)
    c = shape[-1]
    x = jnp.asarray(generator.standard_normal(shape) * generator.uniform(0.5, 2, c) + offset, dtype)
    g = jnp.asarray(generator.standard_normal(shape), dtype)
    return x, g, *(jnp.asarray(generator.standard_normal(c), jnp.float32) for _ in range(2))


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return np.abs(a - b).max(initial=0) / max(np.abs(b).max(initial=0), 1e-30)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 3), *[st.integers(1, 13)] * 3, st.sampled_from([1, 2, 3, 8, 16, 17, 64, 200])),
    st.sampled_from([None, 0.0, 0.01, 0.2]),
    st.sampled_from([np.float32, np.float32, jnp.bfloat16]),
    st.integers(0, 1000),
)
def test_agrees_with_the_definition_in_float64(shape, slope, dtype, seed):
    x, g, scale, bias = example(shape, seed, dtype, offset=1.0)
    y, back = jax.vjp(lambda *a: instance_norm_act(*a, slope), x, scale, bias)
    got = (y, *back(g))
    want = (definition(x, scale, bias, slope), *gradients(x, g, scale, bias, slope))
    bound = 3e-5 if dtype == np.float32 else 2e-2
    if np.prod(shape[1:4]) < 8:
        bound *= 30  # two or three voxels may lie so close together that eps matters, and rounding with it
    assert y.dtype == dtype
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < bound


def test_a_large_tensor_spanning_many_chunks_keeps_its_accuracy():
    x, g, scale, bias = example((2, 40, 41, 43, 17), offset=30.0)
    assert relative(instance_norm_act(x, scale, bias), definition(x, scale, bias, 0.01)) < 1e-5
    # Without the activation: at its kink the sign of a rounding error decides the gradient.
    _, back = jax.vjp(lambda *a: instance_norm_act(*a, None), x, scale, bias)
    for a, b in zip(back(g), gradients(x, g, scale, bias, None), strict=True):
        assert relative(a, b) < 2e-5


def test_a_constant_channel_gives_the_bias():
    x = jnp.full((1, 4, 5, 6, 3), 7.25)
    y, back = jax.vjp(lambda x: instance_norm_act(x, jnp.ones(3), jnp.asarray([1.0, 0.0, -2.0])), x)
    np.testing.assert_allclose(y[0, 1, 2, 3], [1.0, 0.0, -0.02], atol=1e-3)  # rounding over sqrt(eps)
    assert np.isfinite(back(y)[0]).all()


def test_gradient_agrees_with_finite_differences():
    x, g, scale, bias = example((2, 4, 5, 3, 3))
    dx, dscale, dbias = (t * 1e-3 for t in (g[::-1], bias, scale))
    loss = lambda *a: float(np.sum(definition(*a, None) * np.asarray(g, np.float64)))  # noqa: E731
    slope = (loss(x + dx, scale + dscale, bias + dbias) - loss(x - dx, scale - dscale, bias - dbias)) / 2
    found = jax.grad(lambda *a: jnp.sum(instance_norm_act(*a, None) * g), (0, 1, 2))(x, scale, bias)
    products = [float(jnp.vdot(a, b)) for a, b in zip(found, (dx, dscale, dbias), strict=True)]
    assert slope == pytest.approx(sum(products), rel=1e-3)


def test_forward_mode_and_second_order_agree_with_plain_xla():
    x, g, scale, bias = example((2, 4, 5, 3, 3))
    tangents = (g, bias, scale)

    def derivatives():
        loss = lambda *a: jnp.sum(jnp.sin(instance_norm_act(*a)))  # noqa: E731
        penalty = lambda *a: sum(jnp.sum(d**2) for d in jax.grad(loss, (0, 1, 2))(*a))  # noqa: E731
        return (
            jax.jvp(instance_norm_act, (x, scale, bias), tangents),
            jax.grad(penalty, (0, 1, 2))(x, scale, bias),
            jax.jvp(jax.grad(loss), (x, scale, bias), tangents),
            jax.jvp(lambda *a: jax.jvp(instance_norm_act, a, tangents)[1], (x, scale, bias), tangents),
        )

    got = derivatives()
    with native.disabled():
        want = derivatives()
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative(a, b) < 1e-4


def test_vmap_over_images_and_over_parameters():
    x, g, scale, bias = example((4, 3, 4, 5, 3))
    x, g = (a.reshape(2, 2, *a.shape[1:]) for a in (x, g))
    scales = jnp.stack([scale, 2 * scale])
    one = lambda x, s: instance_norm_act(x, s, bias)  # noqa: E731
    grad = lambda x, s, g: jax.grad(lambda x, s: jnp.sum(one(x, s) * g), (0, 1))(x, s)  # noqa: E731
    for axes in ((0, None), (0, 0), (None, 0)):
        pick = lambda a, axis, i: a if axis is None else a[i]  # noqa: E731
        operands = (x if axes[0] == 0 else x[0], scales if axes[1] == 0 else scale)
        got = jax.vmap(one, axes)(*operands)
        want = jnp.stack([one(*(pick(a, axis, i) for a, axis in zip(operands, axes, strict=True))) for i in range(2)])
        assert relative(got, want) < 1e-6
        got = jax.vmap(grad, (*axes, 0))(*operands, g)
        for i in range(2):
            want = grad(*(pick(a, axis, i) for a, axis in zip(operands, axes, strict=True)), g[i])
            for a, b in zip(got, want, strict=True):
                assert relative(a[i], b) < 1e-5


def test_two_runs_agree_bit_for_bit():
    x, g, scale, bias = example((3, 20, 21, 22, 16))
    step = jax.jit(lambda x, s, b: jax.vjp(instance_norm_act, x, s, b)[1](g))
    first = [np.asarray(a) for a in step(x, scale, bias)]
    for _ in range(5):
        for a, b in zip(first, step(x, scale, bias), strict=True):
            np.testing.assert_array_equal(a, b)


def test_nan_stays_in_its_example_and_channel():
    x, _, scale, bias = example((2, 4, 5, 6, 3))
    y = np.array(instance_norm_act(x.at[0, 1, 2, 3, 1].set(jnp.nan), scale, bias))
    assert np.isnan(y[0, ..., 1]).all()
    y[0, ..., 1] = 0
    assert np.isfinite(y).all()


def test_empty_batch_and_other_types():
    scale = bias = jnp.ones(3)
    assert instance_norm_act(jnp.zeros((0, 4, 4, 4, 3)), scale, bias).shape == (0, 4, 4, 4, 3)
    x, _, scale, bias = example((2, 4, 5, 6, 3), dtype=np.float16)
    y = instance_norm_act(x, scale, bias)
    assert y.dtype == jnp.float16
    assert relative(y, definition(x, scale, bias, 0.01)) < 1e-2


def test_operands_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="instance_norm_act"):
        instance_norm_act(jnp.zeros((1, 2, 2, 2, 3)), jnp.ones(4), jnp.zeros(4))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_exports_for_accelerators(platform):
    x, _, scale, bias = example((2, 4, 5, 6, 3))
    step = jax.jit(jax.grad(lambda x: jnp.sum(instance_norm_act(x, scale, bias) ** 2)))
    exported = jax.export.export(step, platforms=[platform])(x)
    assert "custom_call" not in exported.mlir_module()


@needs_native
def test_the_cpu_program_holds_the_native_calls():
    x, _, scale, bias = example((2, 4, 5, 6, 3))
    text = jax.jit(jax.grad(lambda x: jnp.sum(instance_norm_act(x, scale, bias) ** 2))).lower(x).as_text()
    assert "medjax_instance_norm" in text
    assert "medjax_instance_norm_grad" in text


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from medjax.ops.norm import instance_norm_act
x = jax.random.normal(jax.random.key(0), (8, 6, 5, 4, 3))
scale, bias = jnp.asarray([1.0, 2.0, 3.0]), jnp.asarray([0.5, -1.0, 0.0])
step = jax.value_and_grad(lambda x, s, b: jnp.sum(jnp.sin(instance_norm_act(x, s, b))), (0, 1, 2))
want = jax.jit(step)(x, scale, bias)
mesh = Mesh(np.array(jax.devices()), ("data",))
split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
placed = jax.device_put((x, scale, bias), (split, whole, whole))
compiled = jax.jit(step).lower(*placed).compile()
assert "all-gather" not in compiled.as_text()
mapped = jax.shard_map(lambda *a: jax.lax.psum(jnp.sum(jnp.sin(instance_norm_act(*a))), "data"), mesh=mesh,
                       in_specs=(P("data"), P(), P()), out_specs=P())
for got in (compiled(*placed), jax.jit(jax.value_and_grad(mapped, (0, 1, 2)))(*placed)):
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
print("devices", len(jax.devices()))
"""


def test_the_batch_axis_stays_sharded_over_eight_devices():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], env={**os.environ, **flags}, capture_output=True, text=True, timeout=300
    )
    assert "devices 8" in done.stdout, done.stderr
