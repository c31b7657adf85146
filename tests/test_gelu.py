"""gelu against SciPy's normal distribution, its derivatives against the formulas, both forms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from medjax.ops import native
from medjax.ops.gelu import gelu

X = np.concatenate([np.linspace(-12, 12, 4001), [-1e4, -88.0, -40.5, 0.0, 40.5, 1e4]]).astype(np.float32)


@pytest.fixture(params=["native", "xla"])
def form(request, monkeypatch):
    if request.param == "native" and not (native.enabled() and native.available()):
        pytest.skip("native kernels are off or cannot be built here")
    monkeypatch.setenv("MEDJAX_NATIVE", str(int(request.param == "native")))


@pytest.mark.usefixtures("form")
def test_values_and_derivatives_are_those_of_the_definition():
    x = X.astype(np.float64)
    normal = scipy.stats.norm
    np.testing.assert_allclose(jax.jit(lambda v: gelu(v))(X), x * normal.cdf(x), rtol=2e-6, atol=2e-6)
    slope = jax.jit(jax.grad(lambda v: (3.0 * gelu(v)).sum()))(X)
    np.testing.assert_allclose(slope, 3 * (normal.cdf(x) + x * normal.pdf(x)), rtol=3e-6, atol=3e-6)
    curve = jax.jit(jax.vmap(jax.grad(jax.grad(gelu))))(X[:-6])
    np.testing.assert_allclose(curve, ((2 - x**2) * normal.pdf(x))[:-6], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("form")
def test_undefined_and_infinite_values():
    got = np.asarray(jax.jit(lambda v: gelu(v))(jnp.array([np.nan, np.inf, 1.0])))
    assert np.isnan(got[0])
    assert got[1] == np.inf
    assert gelu(jnp.zeros((0, 3))).shape == (0, 3)
    assert gelu(jnp.float32(0.0)) == 0


@pytest.mark.usefixtures("form")
def test_bfloat16_is_the_rounded_float32():
    narrow = jnp.asarray(X[::40], jnp.bfloat16)
    want = jax.jit(lambda v: gelu(v))(narrow.astype(jnp.float32)).astype(jnp.bfloat16)
    got = jax.jit(lambda v: gelu(v))(narrow)
    np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), rtol=8e-3, atol=1e-6)


def test_forms_agree_under_vmap():
    x = jnp.asarray(X[:4000]).reshape(2, 4, 500)
    mapped = jax.jit(jax.vmap(jax.value_and_grad(lambda v: gelu(v).sum())))(x)
    with native.disabled():
        plain = jax.jit(jax.vmap(jax.value_and_grad(lambda v: gelu(v).sum())))(x)
    for a, b in zip(mapped, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
