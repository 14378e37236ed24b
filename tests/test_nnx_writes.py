"""NNX models that write into themselves while they run. Oracle: the model itself in evaluation mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxlimit
from jaxlimit.models import from_equinox, from_linen, from_nnx

INPUTS = jax.random.normal(jax.random.key(0), (2, 5, 3))


def rngs():
    return nnx.Rngs(0)


class Cached(nnx.Module):
    """Writes what it does not read, and makes a variable of its own."""

    def __init__(self):
        self.dense, self.last = nnx.Linear(3, 4, rngs=rngs()), nnx.Cache(jnp.zeros(()))

    def __call__(self, x):
        self.made = nnx.Intermediate(self.dense(x))
        self.last[...] = self.made[...].sum()
        return self.made[...]


class Plain(nnx.Module):
    """Holds an array that is no variable."""

    def __init__(self):
        self.dense, self.scale = nnx.Linear(3, 4, rngs=rngs()), jnp.arange(4.0)

    def __call__(self, x):
        return self.dense(x) * self.scale


class Carried(nnx.Module):
    """Reads what it writes: every call of `predict` starts from the model as it was."""

    def __init__(self):
        self.dense, self.carry = nnx.Linear(3, 4, rngs=rngs()), nnx.Cache(jnp.ones(4))

    def __call__(self, x):
        outputs = self.dense(x) + self.carry[...]
        self.carry[...] = 2 * self.carry[...]
        return outputs


MODELS = {
    "gru": lambda: nnx.RNN(nnx.GRUCell(3, 4, rngs=rngs())),
    "lstm": lambda: nnx.RNN(nnx.LSTMCell(3, 4, rngs=rngs())),
    "both ways": lambda: nnx.Bidirectional(
        nnx.RNN(nnx.GRUCell(3, 4, rngs=rngs())), nnx.RNN(nnx.GRUCell(3, 4, rngs=rngs()))
    ),
    "with dropout and batch norm": lambda: nnx.Sequential(
        nnx.RNN(nnx.GRUCell(3, 4, rngs=rngs())), nnx.BatchNorm(4, rngs=rngs()), nnx.Dropout(0.5, rngs=rngs())
    ),
    "cache": Cached,
    "carry": Carried,
    "array": Plain,
}


@pytest.mark.parametrize("name", MODELS)
def test_what_a_model_writes_is_dropped(name):
    model = MODELS[name]()
    predict, params = from_nnx(model)
    model.eval()
    expected = model(INPUTS)
    for _ in range(2):
        np.testing.assert_allclose(jax.jit(predict)(params, INPUTS), expected, rtol=1e-5, atol=1e-6)


def test_the_hessian_of_a_recurrent_network():
    """Oracle: `jax.hessian` of the model, merged by hand for every value of the weights."""
    model = nnx.RNN(nnx.GRUCell(3, 2, rngs=rngs()))
    predict, params = from_nnx(model)
    graphdef, state, rest = nnx.split(model, nnx.Param, ...)
    paths = nnx.to_pure_dict(state)
    flat, unravel = jax.flatten_util.ravel_pytree(paths)

    def theirs(vector):
        copy = nnx.clone(nnx.merge(graphdef, unravel(vector), rest))
        return jnp.mean(copy(INPUTS) ** 2)

    where = jax.flatten_util.ravel_pytree(jax.tree.map(lambda x: jnp.full(x.shape, x.ndim >= 2), paths))[0]
    expected = jax.hessian(theirs)(flat)[where][:, where]
    curvature = jaxlimit.hessian(lambda p, x: jnp.mean(predict(p, x) ** 2), params, [INPUTS])
    np.testing.assert_allclose(curvature.dense(), expected, rtol=1e-3, atol=1e-5)


class Noisy(nnx.Module):
    def __init__(self):
        self.dense, self.rngs = nnx.Linear(3, 4, rngs=rngs()), rngs()

    def __call__(self, x):
        return self.dense(x) * jax.random.bernoulli(self.rngs.dropout(), 0.5, (*x.shape[:-1], 4))


class Training(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(3, rngs=rngs())

    def __call__(self, x):
        return self.norm(x, use_running_average=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Noisy, r"Noisy draws random numbers in evaluation mode: dropout must be off.*model\.eval"),
        (Training, r"Training changes running statistics in evaluation mode.*use_running_average=True"),
    ],
)
def test_models_that_are_another_function_at_every_call_are_refused(make, message):
    predict, params = from_nnx(make())
    for call in (predict, jax.jit(predict)):
        with pytest.raises(ValueError, match=message):
            call(params, INPUTS)


def test_models_of_other_libraries_are_refused():
    with pytest.raises(ValueError, match=r"an NNX module, got .*see from_linen"):
        from_nnx(lambda x: x)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"a module of Flax Linen, got .*see from_nnx"):
        from_linen({}, {})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"a module of Equinox, got .*see from_nnx"):
        from_equinox(3)  # pyright: ignore[reportArgumentType]
