"""What runs on a device lowers for cpu, cuda and tpu, without float64 and without a call back to the host.

The oracle is the StableHLO text that `jax.export` writes for a platform, which need not be there. The last
tests make sure that float64 and callbacks are found where they are.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_mlp
from jax import export

import jaxlimit
from jaxlimit.core.sums import ExampleSum
from jaxlimit.curvature import products
from jaxlimit.geometry import differentiable, magnitude
from jaxlimit.limits import conjugate_gradients
from jaxlimit.measuring import loss_statistics, sweeps
from jaxlimit.spectrum import basis, lanczos
from jaxlimit.spectrum.probes import rademacher

PLATFORMS = ("cpu", "cuda", "tpu")
DOUBLE = re.compile(r"[<x]f64\b")
HOST = re.compile(r"custom_call @\w*callback\w*")


def inspect(text):
    """The marks of double precision and of the host in a program."""
    return sorted({*DOUBLE.findall(text), *HOST.findall(text)})


def exported(function, *args, platforms=PLATFORMS):
    return export.export(jax.jit(function), platforms=platforms)(*args)


def products_of(curvature, vectors):
    """Products with a curvature: linearised in each of them, or once for all."""
    product, weights, rest = curvature.product, curvature.weights, curvature.rest
    group, linear = curvature.groups[0], curvature.linear[:1]
    return {
        "anew": (product.sum.program(None), (weights, rest, vectors), group),
        "linearize_group": (partial(products.linearize_group, product, None), weights, rest, group),
        "linear_mean": (
            lambda linear, vectors: product.linear_mean(linear, curvature.num_examples, vectors),
            linear,
            vectors,
        ),
        "gradient": (product.gradient_sum.program(None), (weights, rest), group),
        "loss": (ExampleSum(products.Loss(product)).program(None), (weights, rest), group),
    }


def programs():
    """Every part of the core that runs on a device: a function and its arguments, all of them float32."""
    mlp = make_mlp("float32")
    cut = jaxlimit.batched(mlp.arrays, 5)
    curvatures = {
        "hessian": jaxlimit.hessian(mlp.loss, mlp.params, cut),
        "gauss_newton": jaxlimit.gauss_newton(mlp.predict, mlp.output_loss, mlp.params, cut),
    }
    weights, rest, group = (getattr(curvatures["hessian"], name) for name in ("weights", "rest", "groups"))
    group, one = group[0], jax.tree.map(lambda x: x[0], group[0])
    vectors = rademacher(jax.random.key(0), weights, 2)
    panel, scalars = jax.tree.map(basis.empty_panel, vectors), jnp.ones(2, jnp.float32)
    counts = jnp.array([3, 20], jnp.int32)

    def start(vectors):
        return jax.tree.map(lambda x: x / basis.per_run(basis.norms(vectors), x), vectors)

    def lanczos_step(previous, current, product, beta, norm, panel):
        """As in `lanczos.run`, with both passes of Gram-Schmidt."""
        residual, alpha = lanczos.three_terms(previous, current, beta, product)
        panel = basis.store(panel, current, 0)
        residual = basis.project_out(panel, basis.project_out(panel, residual))
        return lanczos.next_vector(residual, alpha, beta, norm), panel

    def signs(seed):
        return rademacher(jax.random.wrap_key_data(seed), weights, 2)

    def metrics(params, batch):
        return {"loss": mlp.loss(params, batch)}

    def width_dimension(params, batch, probes):
        return differentiable.width_dimension_of_params(
            mlp.predict, mlp.output_loss, params, batch, probes, sparsity=0.5, loss_tolerance=0.1
        )

    pruned = sweeps.PrunedNetwork(mlp.params, metrics)
    mask = magnitude.magnitude_mask(weights, 0.5)
    return {
        **{
            f"{name}: {part}": program
            for name, curvature in curvatures.items()
            for part, program in products_of(curvature, vectors).items()
        },
        "lanczos: start": (start, vectors),
        "lanczos: step": (lanczos_step, vectors, vectors, vectors, scalars, scalars, panel),
        "lanczos: next vector": (lanczos.next_vector, vectors, scalars, scalars, scalars),
        "probes": (signs, np.zeros(2, np.uint32)),
        "conjugate gradients: inner": (conjugate_gradients.inner_products, vectors, vectors),
        "conjugate gradients: add": (conjugate_gradients.add_scaled, vectors, vectors, np.float32(0.5)),
        "batch losses": (partial(loss_statistics.batch_losses, mlp.loss, None), mlp.params, group),
        "sparsity sweep": (
            pruned.metrics_sum.program(None),
            (weights, rest, pruned.ranks, counts),
            group,
        ),
        "masks": (magnitude.apply_mask, mlp.params, mask),
        "differentiable width": (width_dimension, mlp.params, one, vectors),
    }


@pytest.mark.parametrize(
    ("platforms", "x64"),
    [
        (PLATFORMS, True),  # all three in one text
        *(
            pytest.param([name], x64, marks=pytest.mark.nightly)
            for name in PLATFORMS
            for x64 in (False, True)
        ),
    ],
)
def test_the_core_is_exported_without_float64_or_callbacks(platforms, x64):
    with jax.enable_x64(x64):
        found = {}
        for name, (function, *args) in programs().items():
            assert not {np.dtype("float64"), np.dtype("complex128")} & {
                np.asarray(leaf).dtype for leaf in jax.tree.leaves(args)
            }, name
            program = exported(function, *args, platforms=platforms)
            assert program.platforms == tuple(platforms)
            found[name] = inspect(program.mlir_module())
    assert not {name: marks for name, marks in found.items() if marks}


@pytest.mark.slow
def test_an_exported_product_is_the_product():
    """The text that is looked at is that of the computation: exported for this machine, it gives the same."""
    for name, (function, *args) in programs().items():
        ours = jax.jit(function)(*args)
        theirs = exported(function, *args, platforms=["cpu"]).call(*args)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6, err_msg=name)


def test_float64_is_found_where_it_is():
    single = np.ones(3, np.float32)
    with jax.enable_x64(True):
        for function in (
            lambda x: x.astype(jnp.float64),
            lambda x: jnp.sum(x, dtype=jnp.float64).astype(jnp.float32),
            lambda x: jnp.where(x > 0, 0.0, x),  # a constant, converted to float32
            lambda x: jnp.fft.fft(x.astype(jnp.complex128)).real.astype(jnp.float32),
        ):
            assert inspect(exported(function, single).mlir_module())
        assert not inspect(exported(lambda x: jnp.where(x > 0, 0, 2.0 * x), single).mlir_module())


def test_callbacks_are_found_where_they_are():
    """In a program for this machine. For export, JAX itself refuses them."""

    def called_back(x):
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    x = np.ones(3, np.float32)
    assert inspect(jax.jit(called_back).lower(x).as_text())
    for platform in PLATFORMS:
        with pytest.raises((ValueError, NotImplementedError)):
            exported(called_back, x, platforms=[platform])
