"""What is compiled once, and what is never served to another function.

Compilations are counted as JAX itself reports them. The oracle of every number is the function as it is now,
under `jax.grad` alone, or a closed form.
"""

import gc
import weakref
from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxlimit
from jaxlimit import batched
from jaxlimit.core import programs
from jaxlimit.core.programs import Program, Traced
from jaxlimit.models import from_linen, from_nnx
from jaxlimit.spectrum import lanczos
from jaxlimit.training import (
    classification_curvature,
    classification_loss,
    classification_metrics,
    train,
    train_model,
)

COMPILED = "/jax/core/compile/backend_compile_duration"
_count = [0]


def _on_event(name, _, **kwargs):
    _count[0] += name == COMPILED


jax.monitoring.register_event_duration_secs_listener(_on_event)


@contextmanager
def compilations():
    """A list whose only entry is, afterwards, how many programs were compiled."""
    before, found = _count[0], []
    yield found
    found.append(_count[0] - before)


def test_compilations_are_counted():
    with compilations() as found:
        jax.jit(lambda x: 3 * x + 1.25)(np.ones(7))
    assert found == [1]


# One network, one compilation.


class Convolutional(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 2, (2, 2), rngs=rngs)
        self.out = nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.conv(x[..., None])).reshape(len(x), -1))


class Normalized(nnx.Module):
    """Its running statistics are arrays that the network closes over; other seeds have others."""

    def __init__(self, rngs):
        self.norm, self.out = nnx.BatchNorm(6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
        self.norm.mean.set_value(jax.random.normal(rngs(), (6,)))

    def __call__(self, x):
        return self.out(self.norm(x.reshape(len(x), -1)))


networks = pytest.mark.parametrize("network", [Convolutional, Normalized])


def examples(seed, count=11):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, 3, 2)).astype(np.float32), rng.integers(0, 3, count)


def spectrum(curvature):
    start = jax.tree.map(lambda x: x[None], curvature.weights)
    return lanczos.run(curvature.matmat, lanczos.init(start), 4).tridiagonals()


def use_curvature(kind, network, seed):
    predict, params = from_nnx(network(nnx.Rngs(seed)))
    curvature = classification_curvature(kind, predict, params, list(batched(examples(seed), 4)))
    jax.block_until_ready((curvature.matvec(curvature.weights), curvature.gradient))
    spectrum(curvature)


def use_measurements(network, seed):
    predict, params = from_nnx(network(nnx.Rngs(seed)))
    loss, batches = classification_loss(predict), batched(examples(seed), 4)
    jaxlimit.loss_statistics(loss, params, batches)
    metrics = classification_metrics(predict)
    jaxlimit.sparsity_sweep(metrics, params, batches, [0.1, 0.2, 0.9], chunk_size=2)
    jaxlimit.finetuned_sweep(
        loss, params, batches, [0.2, 0.9], num_steps=3, learning_rate=0.1 + seed, metrics_fn=metrics
    )


def use_training(network, seed):
    settings = {"epochs": 2, "batch_size": 4, "learning_rate": 0.1 / (seed + 1), "l1": 1e-3 * seed}
    model = network(nnx.Rngs(seed))
    predict, params = from_nnx(model)
    train(classification_loss(predict), params, examples(seed), jax.random.key(seed), **settings)
    settings |= {"momentum": 0.5 + seed / 10, "weight_decay": 0.1 + seed}
    train_model(model, examples(seed), jax.random.key(seed), **settings)


USES = {
    "hessian": partial(use_curvature, "hessian"),
    "gauss_newton": partial(use_curvature, "gauss_newton"),
    "measurements": use_measurements,
    "training": use_training,
}


@pytest.mark.parametrize(
    ("use", "network"),
    [
        *((use, Normalized) for use in USES.values()),
        (USES["hessian"], Convolutional),
        *(
            pytest.param(USES[name], Convolutional, marks=pytest.mark.nightly)
            for name in ("gauss_newton", "measurements", "training")
        ),
    ],
    ids=[*(f"{name}-Normalized" for name in USES), *(f"{name}-Convolutional" for name in USES)],
)
def test_a_second_network_compiles_nothing(use, network):
    use(network, 0)
    gc.collect()  # the first one is dropped
    with compilations() as found:
        use(network, 1)
    assert found == [0]


def test_a_first_hessian_compiles_few_programs():
    """Not the hundreds of single operations that a loss consists of. Other sizes than in any other test."""
    predict, params = from_nnx(Normalized(nnx.Rngs(0)))
    with compilations() as found:
        curvature = jaxlimit.hessian(classification_loss(predict), params, batched(examples(0, 13), 5))
        jax.block_until_ready((curvature.matvec(curvature.weights), curvature.gradient))
    assert found[0] <= 24


def squares(params, batch):
    return jnp.mean((batch @ params) ** 2) / 2


def test_a_bare_function_compiles_nothing_for_other_parameters_and_data():
    def use(seed):
        x = np.random.default_rng(seed).standard_normal((5, 3)).astype(np.float32)
        curvature = jaxlimit.hessian(squares, jnp.full((3, 1), seed + 1.0), batched(x, 2))
        np.testing.assert_allclose(curvature.dense(), x.T @ x / 5, rtol=1e-5, atol=1e-6)

    use(0)
    with compilations() as found:
        use(1)
    assert found == [0]


def test_another_function_of_the_same_name_is_another_function():
    def make(power):
        def loss(params, batch):
            return jnp.mean((batch @ params) ** power)

        return loss

    data = batched(np.ones((4, 1), np.float32), 4)
    for power in (2, 3, 4):
        with compilations() as found:
            curvature = jaxlimit.hessian(make(power), jnp.full((1, 1), 2.0), data)
            assert curvature.dense()[0, 0] == pytest.approx(power * (power - 1) * 2.0 ** (power - 2))
        assert found[0] > 0


# What changes is seen. Each loss is scale * mean((x w)^2) / 2, whose scale changes in its own way.

X = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
W = np.array([[0.5], [-1.0], [2.0]], np.float32)
SCALE = 1.0


def scaled(scale, params, batch):
    return scale * jnp.mean((batch @ params) ** 2) / 2


class Object:
    def __init__(self):
        self.scale = 1.0

    def loss(self, params, batch):
        return scaled(self.scale, params, batch)

    __call__ = loss


class Equal(Object):
    """Equal to every other, as a careless dataclass may be."""

    def __eq__(self, other):
        return isinstance(other, Equal)

    def __hash__(self):
        return 0


def bound_method():
    made = Object()
    return lambda: made.loss, partial(setattr, made, "scale")


def called_object():
    made = Object()
    return lambda: made, partial(setattr, made, "scale")


def equal_object():
    made = [Equal()]

    def change(scale):
        made[0] = Equal()
        made[0].scale = scale

    return lambda: made[0], change


def partial_of_a_list():
    held = [1.0]

    def of_list(held, params, batch):
        return scaled(held[0], params, batch)

    def change(scale):
        held[0] = scale

    return lambda: partial(of_list, held), change


def of_module(params, batch):
    return scaled(SCALE, params, batch)


def module_variable():
    return lambda: of_module, partial(globals().__setitem__, "SCALE")


def closed_over_array():
    held = np.ones(3, np.float32)  # changed in place

    def loss(params, batch):
        return scaled(held[0] + 0 * jnp.sum(held), params, batch)

    return lambda: loss, lambda scale: held.fill(scale)


def custom_rule():
    """Only the derivative changes; that of the first derivative is right again."""
    factor = [1.0]

    @jax.custom_jvp
    def half_square(z):
        return z**2 / 2

    @half_square.defjvp
    def rule(primals, tangents):
        return half_square(primals[0]), factor[0] * primals[0] * tangents[0]

    def loss(params, batch):
        return jnp.mean(half_square(batch @ params))

    def change(scale):
        factor[0] = scale

    return lambda: loss, change


WAYS = [bound_method, called_object, equal_object, partial_of_a_list, module_variable, closed_over_array]


@pytest.fixture(autouse=True)
def _restore_scale():
    yield
    globals()["SCALE"] = 1.0


def hessian_is(loss, scale):
    curvature = jaxlimit.hessian(loss, jnp.asarray(W), batched(X, 4))
    np.testing.assert_allclose(curvature.dense(), scale * X.T @ X / 7, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(curvature.gradient, scale * X.T @ X @ W / 7, rtol=1e-5, atol=1e-5)


def gauss_newton_is(loss, scale):
    """Of a linear network, whose outputs' loss changes; then of a network that changes."""
    of_outputs = jaxlimit.gauss_newton(
        lambda p, x: x @ p,
        lambda outputs, batch: loss(outputs, np.eye(len(outputs), dtype=np.float32)),
        jnp.asarray(W),
        batched(X, 4),
    )
    np.testing.assert_allclose(of_outputs.dense(), scale * X.T @ X / 7, rtol=1e-5, atol=1e-5)
    of_network = jaxlimit.gauss_newton(
        lambda p, x: jax.grad(loss)(p, np.eye(3, dtype=np.float32)).T * x,  # scale / 3 * w_j x_j
        lambda outputs, batch: jnp.mean(jnp.sum(outputs, axis=1) ** 2) / 2,
        jnp.asarray(W),
        batched(X, 4),
    )
    np.testing.assert_allclose(of_network.dense(), (scale / 3) ** 2 * X.T @ X / 7, rtol=1e-5, atol=1e-5)


def statistics_are(loss, scale):
    found = jaxlimit.loss_statistics(loss, W, batched(X, 4)).mean
    assert found == pytest.approx(scale * np.mean((X @ W) ** 2) / 2, rel=1e-5)


def sweep_is(loss, scale):
    sweep = jaxlimit.sparsity_sweep(lambda p, b: {"loss": loss(p, b)}, W, batched(X, 4), [0.0])
    assert sweep.metrics["loss"][0] == pytest.approx(scale * np.mean((X @ W) ** 2) / 2, rel=1e-5)


def finetuned_is(loss, scale):
    sweep = jaxlimit.finetuned_sweep(
        loss,
        W,
        batched(X, 7),
        [1.0, 0.0],
        num_steps=1,
        learning_rate=1e-9,
        metrics_fn=lambda p, b: {"l": loss(p, b)},
    )
    expected = scale * np.mean((X @ W) ** 2) / 2
    assert sweep.metrics["loss"][0] == pytest.approx(expected, rel=1e-5)
    assert sweep.metrics["eval_l"][0] == pytest.approx(expected, rel=1e-5)


def training_is(loss, scale):
    """One step of gradient descent."""
    found = train(loss, W, X, jax.random.key(0), epochs=1, batch_size=7, learning_rate=0.1, momentum=0.0)
    np.testing.assert_allclose(found, W - 0.1 * scale * X.T @ X @ W / 7, rtol=1e-5, atol=1e-5)


uses = [hessian_is, gauss_newton_is, statistics_are, sweep_is, finetuned_is, training_is]


@pytest.mark.parametrize(
    ("is_right", "way"),
    [
        pytest.param(
            use,
            way,
            id=f"{use.__name__}-{way.__name__}",
            # Every way with one use, and every use in one way; all pairs are slow tests.
            marks=[] if use is hessian_is or way is bound_method else [pytest.mark.nightly],
        )
        for use in uses
        for way in WAYS
    ],
)
def test_a_function_that_changed_is_another_function(is_right, way):
    get, change = way()
    for scale in (1.0, 3.0, 1.0):
        change(scale)
        is_right(get(), scale)


@pytest.mark.parametrize("is_right", [hessian_is, training_is])
def test_a_derivative_that_changed_is_another_one(is_right):
    get, change = custom_rule()
    for scale in (1.0, 3.0):
        change(scale)
        is_right(get(), scale)


def test_a_curvature_is_of_the_loss_as_it_was():
    """It was traced when it was made: a later change does not mix two functions in one matrix."""
    get, change = bound_method()
    curvature = jaxlimit.hessian(get(), jnp.asarray(W), list(batched(X, 4)), linear_bytes=0)
    change(3.0)
    np.testing.assert_allclose(curvature.dense(), X.T @ X / 7, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(curvature.gradient, X.T @ X @ W / 7, rtol=1e-5, atol=1e-5)


def test_what_calls_the_host_is_not_shared():
    """Two callbacks look the same in the text of a program."""

    def of_host(factor):
        def loss(params, batch):
            scale = jax.pure_callback(lambda: np.float32(factor), jax.ShapeDtypeStruct((), jnp.float32))
            return scaled(scale, params, batch)

        return loss

    for scale in (1.0, 3.0):
        statistics_are(of_host(scale), scale)


def test_types_and_devices_are_part_of_what_is_shared():
    """Keys and their numbers are one text; float32 and float64 are not."""
    data = jax.random.key_data(jax.random.key(3))
    raw = Program(lambda x: jnp.asarray(x))(data)
    key = Program(lambda x: jax.random.wrap_key_data(x))(data)
    assert raw.dtype == jnp.uint32
    assert jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    double = Program(lambda x: x * 2)
    with jax.enable_x64(True):
        assert double(np.ones(3)).dtype == jnp.float64
    assert double(np.ones(3)).dtype == jnp.float32


# Within other compiled functions.


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("linear_bytes", [0, None])
def test_a_curvature_is_an_argument_of_a_compiled_function(kind, linear_bytes):
    predict, params = from_nnx(Convolutional(nnx.Rngs(0)))
    batches = list(batched(examples(0), 4))  # the last holds three
    if kind == "hessian":
        curvature = jaxlimit.hessian(classification_loss(predict), params, batches, linear_bytes=linear_bytes)
    else:
        curvature = jaxlimit.gauss_newton(
            lambda p, b: predict(p, b[0]),
            lambda z, b: classification_loss(lambda p, x: p)(z, b),
            params,
            batches,
            linear_bytes=linear_bytes,
        )
    outside = curvature.matvec(curvature.weights), curvature.gradient
    product = jax.jit(lambda c, v: (c.matvec(v), c.gradient, c.loss))
    *inside, loss = product(curvature, curvature.weights)
    for found, expected in zip(jax.tree.leaves(inside), jax.tree.leaves(outside), strict=True):
        # One program of the whole may add in another order: equal to a few units in the last place.
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    assert float(loss) == pytest.approx(curvature.loss)
    again = jax.jit(lambda c: c)(curvature)
    jax.tree.map(np.testing.assert_array_equal, again.matvec(again.weights), outside[0])


def test_a_stream_passes_through_a_compiled_function():
    class Stream:
        def __iter__(self):
            return iter([X[:4], jnp.asarray(X[4:])])

    curvature = jaxlimit.hessian(squares, jnp.asarray(W), Stream())
    product = jax.jit(lambda c, v: c.matvec(v))(curvature, jnp.asarray(W))
    np.testing.assert_allclose(product, X.T @ X @ W / 7, rtol=1e-5, atol=1e-5)
    # What is computed inside from known arrays is known outside.
    inside = jax.jit(lambda v: (curvature.matvec(v), curvature.gradient))(jnp.asarray(W))
    for found in (*inside, curvature.gradient):
        np.testing.assert_allclose(found, X.T @ X @ W / 7, rtol=1e-5, atol=1e-5)


def test_a_compiled_function_is_not_served_the_old_curvature():
    get, change = bound_method()
    product = jax.jit(lambda c, v: c.matvec(v))
    for scale in (1.0, 3.0):
        change(scale)
        curvature = jaxlimit.hessian(get(), jnp.asarray(W), batched(X, 4))
        found = product(curvature, curvature.weights)
        np.testing.assert_allclose(found, scale * X.T @ X @ W / 7, rtol=1e-5, atol=1e-5)


def test_curvatures_are_equal_to_themselves_alone():
    first, second = (jaxlimit.hessian(squares, jnp.asarray(W), batched(X, 4)) for _ in range(2))
    assert first == first
    assert first != second
    assert len({first, second}) == 2


@networks
def test_functions_of_one_architecture_share_a_callers_compiled_function(network):
    value = jax.jit(lambda loss, metrics, params, batch: (loss(params, batch), metrics(params, batch)))
    found = []
    for seed in (0, 1):
        predict, params = from_nnx(network(nnx.Rngs(seed)))
        loss, metrics = classification_loss(predict), classification_metrics(predict)
        batch = jax.tree.map(jnp.asarray, examples(seed))
        expected = float(loss(params, batch))
        with compilations() as counted:
            inside, measured = value(loss, metrics, params, batch)
        assert float(inside) == pytest.approx(expected, rel=1e-5)
        assert float(measured["loss"]) == pytest.approx(expected, rel=1e-5)
        found += counted
    assert found == [1, 0]


def test_functions_of_linen_modules_share_a_callers_compiled_function():
    module, x = linen.Sequential([linen.Dense(4), linen.BatchNorm(use_running_average=True)]), X[:2]
    value = jax.jit(lambda predict, params, x: predict(params, x))
    found = []
    for seed in (0, 1):
        predict, params = from_linen(module, module.init(jax.random.key(seed), x))
        with compilations() as counted:
            outputs = value(predict, params, x)
        np.testing.assert_allclose(outputs, predict(params, x), rtol=1e-5)
        found += counted
    assert found == [1, 0]


def test_functions_of_others_compare_by_identity():
    value = jax.jit(lambda loss, params, batch: loss(params, batch))
    batch = jnp.eye(2), jnp.array([0, 1])
    for factor in (1.0, 2.0):
        loss = classification_loss(lambda params, inputs, factor=factor: factor * inputs @ params)
        assert float(value(loss, jnp.eye(2), batch)) == pytest.approx(np.log(1 + np.exp(-factor)), rel=1e-5)


# Memory.


class Holder:
    scale = 1.0


def used_and_dropped(use):
    """Weak references to what was handed over, and to what that closes over."""
    held, data, params = Holder(), jnp.asarray(X), jnp.asarray(W)
    constant = jnp.array([1.0, 2.0, 3.0])

    def loss(params, batch):
        return held.scale * jnp.mean((batch * constant @ params) ** 2)

    if use == "curvature":
        curvature = jaxlimit.hessian(loss, params, batched(data, 4))
        assert curvature.matvec(curvature.weights) is not curvature.gradient
    elif use == "statistics":
        jaxlimit.loss_statistics(loss, params, batched(data, 4))
    elif use == "sweeps":
        jaxlimit.finetuned_sweep(loss, params, batched(data, 4), [0.5], num_steps=1)
        jaxlimit.sparsity_sweep(lambda p, b: {"loss": loss(p, b)}, params, [data], [0.5])
    else:
        train(loss, params, data, jax.random.key(0), epochs=1, learning_rate=0.1)
    return [weakref.ref(x) for x in (held, loss, data, params, constant)]


@pytest.mark.parametrize("use", ["curvature", "statistics", "sweeps", "training"])
def test_nothing_is_kept_alive(use):
    alive = used_and_dropped(use)
    gc.collect()
    assert [x() is not None for x in alive] == [False] * 5


def test_the_number_of_programs_that_are_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(programs, "MAX_SHARED", 3)
    monkeypatch.setattr(programs, "_shared", type(programs._shared)())
    for factor in range(5):
        assert Program(lambda x, factor=factor: x * factor)(2.0) == 2.0 * factor
    assert len(programs._shared) == 3
    with compilations() as found:
        Program(lambda x: x * 4)(2.0)  # the last one is there, the first is not
        Program(lambda x: x * 0)(2.0)
    assert found == [1]


# The parts.


def test_a_program_is_a_part_of_another_compiled_function():
    double = Program(lambda x: 2 * x)
    assert jax.jit(double)(3.0) == 6
    np.testing.assert_array_equal(jax.vmap(double)(jnp.arange(3.0)), [0, 2, 4])
    assert jax.grad(double)(1.0) == 2
    with jax.disable_jit():
        assert double(3.0) == 6


@pytest.mark.parametrize("layer", ["max pool", "sum pool", "convolution", "softmax"])
def test_without_compilation_the_rewritten_forms_are_the_same_functions(layer):
    images = np.random.default_rng(0).standard_normal((4, 6, 6, 2)).astype(np.float32)

    def loss(params, batch):
        hidden = jnp.tanh(batch @ params["w"])
        match layer:
            case "max pool":
                hidden = nnx.max_pool(hidden, (2, 2), (1, 1))
            case "sum pool":
                hidden = nnx.avg_pool(hidden, (2, 2), (2, 2))
            case "convolution":
                hidden = jax.lax.conv(hidden.transpose(0, 3, 1, 2), jnp.ones((1, 3, 2, 2)), (1, 1), "VALID")
            case "softmax":
                hidden = jax.nn.log_softmax(hidden)
        return jnp.mean(jnp.sum(hidden**2, axis=(1, 2, 3)))

    params = {"w": np.random.default_rng(1).standard_normal((2, 3)).astype(np.float32)}
    expected = jax.hessian(lambda w: loss({"w": w.reshape(2, 3)}, images))(jnp.ravel(params["w"]))
    with jax.disable_jit():
        curvature = jaxlimit.hessian(loss, params, jaxlimit.batched(images, 2))
        found = curvature.dense()
        (swept,) = jaxlimit.sparsity_sweep(
            lambda params, batch: {"loss": loss(params, batch)}, params, jaxlimit.batched(images, 2), [0.0]
        ).metrics["loss"]
    assert curvature.loss == pytest.approx(float(loss(params, images)), rel=1e-5)
    assert swept == pytest.approx(float(loss(params, images)), rel=1e-5)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_a_large_array_that_is_closed_over_is_an_argument():
    """Also within a loop. What a function compiled by the caller closes over is a constant of that."""
    rng, zeros = np.random.default_rng(0), jnp.zeros(10_000)
    for is_first in (True, False):
        array = rng.standard_normal(10_000).astype(np.float32)
        program = Program(lambda x, a=array: jax.lax.fori_loop(0, 2, lambda _, c: (c + a) * 2, x))
        with compilations() as found:
            result = program(zeros)
        np.testing.assert_allclose(result, 6 * array, rtol=1e-6)
        assert found == [is_first]
    assert len(program.lower(zeros).as_text()) < 5_000


def test_donated_memory_is_used():
    x = jnp.ones(1000)
    add = Program(lambda x, y: x + y, donate_first=True)
    add(x, 1.0)
    assert x.is_deleted()


def test_a_traced_function_runs_once_for_each_shape():
    shapes = []

    def square(x):
        shapes.append(x.shape)
        return x**2

    traced = Traced(square)
    assert traced.shape(np.ones(2)).shape == (2,)
    np.testing.assert_array_equal(traced(np.arange(2.0)), [0, 1])
    np.testing.assert_array_equal(jax.grad(lambda x: traced(x).sum())(jnp.arange(2.0)), [0, 2])
    traced(np.ones(3))
    assert shapes == [(2,), (3,)]


def test_sums_of_products_of_a_broadcast_array_are_right():
    """On CPUs jaxlib 0.10.2 computes others by itself (jax-ml/jax #39103); oracle: float64 NumPy."""
    rng = np.random.default_rng(0)
    weights, inputs = (rng.standard_normal(shape).astype(np.float32) for shape in ((64, 10), (640, 64, 10)))

    def loss(weights, batch):
        left = batch - jnp.sum(weights * batch, axis=-1, keepdims=True)
        return jnp.mean(jnp.sum(left**2, axis=(1, 2)))

    batches = jaxlimit.batched(inputs, 640)
    exact = inputs.astype(np.float64)
    left = exact - np.sum(weights * exact, -1, keepdims=True)
    mean = jaxlimit.loss_statistics(loss, weights, batches).mean
    assert mean == pytest.approx(np.mean(np.sum(left**2, axis=(1, 2))), rel=1e-5)
    # H v = 2 C mean_i x_i (x_i . v) for C entries of a row, all of which hold the same sum
    vector = rng.standard_normal(weights.shape)
    wanted = 20 * np.mean(exact * np.sum(exact * vector, -1, keepdims=True), axis=0)
    product = jaxlimit.hessian(loss, weights, batches).matvec(jnp.asarray(vector, jnp.float32))
    np.testing.assert_allclose(product, wanted, atol=1e-4 * np.abs(wanted).max())
