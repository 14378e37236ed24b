"""Convolutions and pools in another form, against JAX's own: values, gradients, second derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxpr_as_fun
from jax.flatten_util import ravel_pytree

import jaxlimit
from jaxlimit import batched
from jaxlimit.core import convolutions
from jaxlimit.core.batches import grouped
from jaxlimit.core.convolutions import convolves, quick_in_loops
from jaxlimit.curvature import linearizing, products
from jaxlimit.measuring.finetuning import FinetunedNetwork
from jaxlimit.measuring.sweeps import PrunedNetwork

WINDOWED = ("conv_general_dilated", "reduce_window")


def rewritten(fn, *args):
    """The function in the other form, of which nothing is left."""
    jaxpr = quick_in_loops(jax.make_jaxpr(fn)(*args))
    assert not any(name in str(jaxpr) for name in WINDOWED)
    return lambda *xs: jaxpr_as_fun(jaxpr)(*xs)[0]


def is_the_same(fn, *args, rng):
    """With JAX's derivatives in reverse over reverse, which agree on the first of several maxima."""
    other, out = rewritten(fn, *args), fn(*args)
    vectors = [jnp.asarray(rng.standard_normal(x.shape)) for x in args]
    weights = jnp.asarray(rng.standard_normal(out.shape))

    def derivatives(fn):
        gradient = jax.grad(lambda xs: jnp.sum(weights * jnp.sin(fn(*xs))))

        def slope(xs):
            return sum(jnp.vdot(g, v) for g, v in zip(gradient(xs), vectors, strict=True))

        return fn(*args), gradient(list(args)), jax.grad(slope)(list(args))

    found, expected = jax.jit(lambda: (derivatives(other), derivatives(fn)))()
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9)


def random_convolution(rng):
    """A function of images and kernels, and these; None where the output is empty."""
    rank, groups = rng.integers(0, 4), rng.choice([1, 2, 3])
    into, out = (groups, groups) if rng.random() < 0.3 else groups * rng.integers(1, 4, 2)
    space, size = rng.integers(3, 7, rank), rng.integers(1, 4, rank)
    strides = size if rng.random() < 0.3 else rng.integers(1, 4, rank)
    padding = [tuple(pair) for pair in rng.integers(-1, 3, (rank, 2)).tolist()]
    dilations = [rng.choice([1, 1, 2], rank).tolist() for _ in range(2)]
    specs = [tuple(rng.permutation(rank + 2).tolist()) for _ in range(3)]
    numbers = jax.lax.ConvDimensionNumbers(specs[0], specs[1], specs[2])
    shapes = []
    for spec, shape in zip(specs, ([2, into, *space], [out, into // groups, *size]), strict=False):
        shapes.append([int(length) for _, length in sorted(zip(spec, shape, strict=True))])

    def convolve(images, kernel):
        return jax.lax.conv_general_dilated(
            images, kernel, strides.tolist(), padding, dilations[0], dilations[1], numbers, int(groups)
        )

    args = [jnp.asarray(rng.standard_normal(shape)) for shape in shapes]
    dilated = [base * (length - 1) + 1 for base, length in zip(dilations[0], space, strict=True)]
    whole = [low + x + high for x, (low, high) in zip(dilated, padding, strict=True)]
    reach = [far * (length - 1) + 1 for far, length in zip(dilations[1], size, strict=True)]
    return (convolve, args) if all(x >= y for x, y in zip(whole, reach, strict=True)) else None


@pytest.mark.parametrize("seed", range(8))
def test_convolutions_keep_their_values_and_derivatives(seed, x64):
    rng = np.random.default_rng(seed)
    while (drawn := random_convolution(rng)) is None:
        pass
    is_the_same(drawn[0], *drawn[1], rng=rng)


@pytest.mark.parametrize(("operation", "start"), [("max", -jnp.inf), ("min", jnp.inf), ("add", 0.0)])
@pytest.mark.parametrize(
    ("size", "strides", "padding"),
    [
        ((1, 2, 2), (1, 2, 2), "VALID"),
        ((1, 2, 2), (1, 2, 2), "SAME"),
        ((1, 3, 3), (1, 2, 2), ((0, 0), (1, 1), (1, 1))),
        ((2, 3, 1), (1, 1, 2), "SAME"),
    ],
)
def test_pools_keep_their_values_and_derivatives(operation, start, size, strides, padding, x64):
    """Most windows have several largest entries: the first one counts."""
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 3, (2, 5, 7)), float)

    def pool(x):
        return jax.lax.reduce_window(x, start, getattr(jax.lax, operation), size, strides, padding)

    is_the_same(pool, images, rng=rng)


@pytest.mark.parametrize("strides", [1, 2])
def test_what_is_no_number_stays_none(strides):
    def pool(x):
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (2,), (strides,), "VALID")

    x = jnp.array([1.0, jnp.nan, 2.0, 3.0, jnp.inf, -jnp.inf])
    np.testing.assert_array_equal(rewritten(pool, x)(x), pool(x))


def convolve(images, kernel):
    return jax.lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def test_what_is_called_is_rewritten_too(x64):
    """Within jit, scan, checkpoint and cond."""

    def network(images, kernel):
        def step(images, _):
            return jax.checkpoint(convolve)(images, kernel), None

        images = jax.jit(lambda x: jax.lax.scan(step, x, None, 2)[0])(images)
        return jax.lax.cond(images[0, 0, 0, 0] < 9, lambda x: convolve(x, kernel), jnp.sin, images)

    rng = np.random.default_rng(0)
    images, kernel = rng.standard_normal((1, 3, 3, 2)), rng.standard_normal((2, 2, 2, 2)) / 3
    is_the_same(network, jnp.asarray(images), jnp.asarray(kernel), rng=rng)


def test_what_is_not_known_stays(monkeypatch):
    images, kernel = jnp.ones((2, 4, 4, 3)), jnp.ones((3, 3, 3, 3))

    def stays(fn, *args):
        jaxpr = jax.make_jaxpr(fn)(*args)
        return quick_in_loops(jaxpr) is jaxpr

    assert not stays(convolve, images, kernel)
    assert stays(jnp.sin, images)
    assert stays(convolve, images.astype(jnp.int32), kernel.astype(jnp.int32))
    monkeypatch.setattr(convolutions, "PATCH_BYTES", 2 * 4 * 4 * 9 * 3 * 4 - 1)
    assert stays(convolve, images, kernel)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert stays(convolve, images[:1], kernel)


def loss(params, batch):
    hidden = jax.nn.relu(convolve(batch[0], params["kernel"]))
    hidden = jax.lax.reduce_window(hidden, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return jnp.mean((hidden.reshape(len(hidden), -1) @ params["out"] - batch[1]) ** 2)


@pytest.mark.parametrize(("as_it_is", "linear_bytes"), [(False, None), (True, None), (True, 0)])
def test_products_of_a_strangers_network(as_it_is, linear_bytes, monkeypatch):
    """Rewritten within loops over batches, or as it is without any: the Hessian of the full batch."""
    if as_it_is:
        monkeypatch.setattr(convolutions, "PATCH_BYTES", 0)
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in ((7, 4, 4, 1), (7, 2))]
    shapes = {"kernel": (2, 2, 1, 2), "out": (8, 2)}
    params = {key: jnp.asarray(rng.standard_normal(x).astype(np.float32)) for key, x in shapes.items()}
    curvature = jaxlimit.hessian(
        loss, params, list(batched(tuple(arrays), 3)), prunable=lambda *_: True, linear_bytes=linear_bytes
    )
    batch = tuple(map(jnp.asarray, arrays))
    shape = jax.eval_shape(lambda: jax.tree.map(lambda x: x[:3], batch))
    assert curvature.product.convolves(curvature.weights, curvature.rest, shape) == as_it_is
    assert convolves(curvature.product.linearize.jaxpr(params, curvature.rest, shape)) == as_it_is
    vectors = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal((2, *x.shape)), np.float32), params)
    flat, unravel = ravel_pytree(params)
    found = jax.vmap(lambda v: ravel_pytree(v)[0])(curvature.matmat(vectors))
    with jax.enable_x64(True):
        hessian = jax.hessian(lambda w: loss(unravel(w), jax.tree.map(lambda x: x.astype(float), batch)))(
            flat.astype(float)
        )
        expected = jax.vmap(lambda v: hessian @ ravel_pytree(v)[0])(vectors)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_sweeps_of_a_strangers_network():
    """No convolution is left in their loops; the losses are those of the full batch, computed at once."""
    rng = np.random.default_rng(0)
    data = tuple(rng.standard_normal(shape).astype(np.float32) for shape in ((7, 4, 4, 1), (7, 2)))
    shapes = {"kernel": (2, 2, 1, 2), "out": (8, 2)}
    params = {key: rng.standard_normal(x).astype(np.float32) for key, x in shapes.items()}
    batches, counts = batched(data, 3), np.array([8], np.int32)
    swept = PrunedNetwork(params, lambda *args: {"loss": loss(*args)})
    args = (swept.weights, swept.rest, swept.ranks, counts), grouped(batches)[0]
    tuned = FinetunedNetwork(loss, params, batches, num_steps=1)
    state = tuned.first_state(counts)
    for lowered in (
        swept.metrics_sum.program(None).lower(*args),
        tuned.advance.lower(state, *tuned.arguments(counts), 0, 1),
    ):
        assert "stablehlo.convolution" not in lowered.as_text()
    pruned = jaxlimit.apply_mask(params, jaxlimit.magnitude_mask(params, 0.5))
    expected = float(loss(pruned, data))
    assert swept.sweep(batches, [0.5]).metrics["loss"][0] == pytest.approx(expected, rel=1e-5)


def test_networks_with_steps_take_larger_batches(monkeypatch):
    """As a recurrent network, whose every step costs a call."""

    def recurrent(params, batch):
        hidden = jnp.zeros((len(batch), 3))
        steps = jnp.swapaxes(batch, 0, 1)
        return jnp.mean(jax.lax.scan(lambda h, x: (jnp.tanh((h + x) @ params), None), hidden, steps)[0] ** 2)

    monkeypatch.setitem(linearizing.BATCH_BYTES, "cpu", 2**14)
    sequences, sizes = jnp.ones((1009, 5, 3)), []
    for factor in (1, 4):
        monkeypatch.setattr(linearizing, "LOOP_FACTOR", factor)
        product = products.HessianProduct(recurrent, "highest")
        sizes.append(linearizing.suitable_batch_size(product, jnp.ones((3, 3)), None, sequences))
    assert sizes[0] < 1009 / 4
    assert 4 * sizes[0] <= sizes[1] < 4 * (sizes[0] + 1)
