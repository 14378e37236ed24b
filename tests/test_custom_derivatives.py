"""Networks with a `jax.custom_vjp`, against reverse over reverse of the full batch in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import jaxlimit
from jaxlimit import batched


def with_rule(forward, backward):
    """A rounding to quarters; most rules call the function itself in the forward pass, some do not."""
    function = jax.custom_vjp(lambda x: jnp.round(4 * x) / 4)
    function.defvjp(lambda x: (forward(function, x), x), backward)
    return function


RULES = {
    "calls itself": with_rule(lambda f, x: f(x), lambda _, g: (g,)),
    "with a derivative": with_rule(lambda f, x: f(x) + x - x, lambda x, g: (g * jnp.cos(x),)),
    "written out": with_rule(
        lambda _, x: x + jax.lax.stop_gradient(jnp.round(4 * x) / 4 - x), lambda _, g: (g,)
    ),
}
RNG = np.random.default_rng(0)
ARRAYS = tuple(RNG.standard_normal(shape).astype(np.float32) for shape in ((7, 3), (7, 2)))
PARAMS = {"a": RNG.standard_normal((3, 4)), "b": RNG.standard_normal((4, 2))}
PARAMS = jax.tree.map(lambda x: x.astype(np.float32), PARAMS)


def network(rule):
    """A function of parameters and a batch that rounds weights and activations, within jit."""

    @jax.jit
    def hidden(weights, inputs):
        return jnp.tanh(rule(inputs @ rule(weights)))

    return lambda params, batch: hidden(params["a"], batch[0]) @ rule(params["b"])


def output_loss(outputs, batch):
    return jnp.mean(jnp.sum(jnp.cosh(outputs - batch[1]), axis=1))


@pytest.mark.parametrize(
    ("kind", "linear_bytes", "rule"),
    [
        ("hessian", None, "calls itself"),
        ("hessian", 0, "with a derivative"),
        ("hessian", None, "written out"),
        ("gauss_newton", None, "calls itself"),
        ("gauss_newton", 0, "with a derivative"),
    ],
)
def test_a_rule_for_reverse_mode_alone(kind, linear_bytes, rule):
    predict = network(RULES[rule])
    options = {"prunable": lambda *_: True, "linear_bytes": linear_bytes}
    batches = list(batched(ARRAYS, 4))

    def loss(params, batch):
        return output_loss(predict(params, batch), batch)

    if kind == "hessian":
        curvature = jaxlimit.hessian(loss, PARAMS, batches, **options)
    else:
        curvature = jaxlimit.gauss_newton(predict, output_loss, PARAMS, batches, **options)
    vectors = jax.tree.map(lambda x: RNG.standard_normal((2, *x.shape)).astype(np.float32), PARAMS)
    found = jax.vmap(lambda v: ravel_pytree(v)[0])(curvature.matmat(vectors))
    with jax.enable_x64(True):
        params, batch, wide = jax.tree.map(lambda x: jnp.asarray(x, float), (PARAMS, ARRAYS, vectors))
        flat, unravel = ravel_pytree(params)
        if kind == "hessian":
            matrix = jax.jacrev(jax.grad(lambda w: loss(unravel(w), batch)))(flat)
        else:
            jacobian = jax.jacrev(lambda w: predict(unravel(w), batch).ravel())(flat)
            second = jnp.cosh(predict(params, batch) - batch[1]).ravel() / 7
            matrix = jacobian.T @ (second[:, None] * jacobian)
        expected = jax.vmap(lambda v: matrix @ ravel_pytree(v)[0])(wide)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * scale)


def test_a_rule_that_cannot_be_differentiated_is_refused():
    def of_host(_, g):
        return (jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct(g.shape, g.dtype), g),)

    rule = with_rule(lambda f, x: f(x), of_host)
    with pytest.raises(ValueError, match="custom_vjp whose backward pass cannot be differentiated"):
        jaxlimit.hessian(
            lambda p, b: output_loss(network(rule)(p, b), b),
            PARAMS,
            batched(ARRAYS, 7),
            prunable=lambda *_: 1,
        )


@pytest.mark.parametrize("batches", [batched(ARRAYS[0], 4), [ARRAYS[0][:4], ARRAYS[0][4:]]])
def test_what_depends_on_no_batch_in_the_second_derivative(batches):
    """Nothing is kept of a batch: the Hessian of a linear loss is 0, of a square is the same for all."""
    weights = jnp.ones((3, 1))
    linear = jaxlimit.hessian(lambda w, x: jnp.mean(x @ w), weights, batches)
    np.testing.assert_array_equal(linear.matvec(weights), jnp.zeros((3, 1)))
    square = jaxlimit.hessian(lambda w, x: jnp.mean(x @ w) + jnp.sum(w**2), weights, batches)
    np.testing.assert_allclose(square.matvec(weights), 2 * weights)
