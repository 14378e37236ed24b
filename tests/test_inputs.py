"""What people put in: batches, parameters and arguments of every kind. Right, or refused in our words.

Oracle: a linear network with a squared error, whose Hessian 2 X^T X / N (x) I is written out in NumPy.
"""

import functools
from collections import UserDict
from dataclasses import dataclass
from itertools import pairwise

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from flax.core import FrozenDict
from jax.experimental import sparse

import jaxlimit
from jaxlimit.core.batches import batched
from jaxlimit.reference.paper_code import spectrum_parameters

RNG = np.random.default_rng(5)
X = RNG.integers(-8, 8, (11, 3)).astype(np.float32) / 4  # exact in bfloat16
Y = RNG.integers(-8, 8, (11, 2)).astype(np.float32) / 4
W = RNG.standard_normal((3, 2)).astype(np.float32)
HESSIAN = np.kron(2 * X.astype(float).T @ X / len(X), np.eye(2))
LOSS = np.mean(np.sum((X.astype(float) @ W - Y) ** 2, -1))


def loss(params, batch):
    x, y = batch
    return jnp.mean(jnp.sum((x.astype(jnp.float32) @ params["w"] - y) ** 2, -1))


def cut(convert=lambda x: x, sizes=(4, 4, 3), kind=tuple):
    ends = np.cumsum([0, *sizes])
    return [kind([convert(X[i:j]), convert(Y[i:j])]) for i, j in pairwise(ends)]


class Tensor:
    """Read as PyTorch's tensors are: by `numpy(force=True)`, which has no bfloat16."""

    def __init__(self, values, dtype="torch.float32"):
        self.values, self.dtype = np.array(values), dtype

    def detach(self):
        return self

    def float(self):
        return Tensor(self.values)

    def numpy(self, *, force=False):
        if not force:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad.")
        if self.dtype == "torch.bfloat16":
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self.values


class Foreign:
    """An array of a library that nobody knows."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)


class Loader:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def restarted():
    yield from cut()


BATCHES = {
    "tensors": lambda: cut(Tensor),
    "lists of tensors, as torch's DataLoader": lambda: Loader(cut(Tensor, kind=list)),
    "list of a DataLoader": lambda: list(Loader(cut(Tensor, kind=list))),
    "bfloat16 tensors": lambda: cut(lambda x: Tensor(x, "torch.bfloat16")),
    "batched tensors": lambda: batched((Tensor(X), Tensor(Y)), 4),
    "foreign arrays": lambda: cut(Foreign),
    "float64": lambda: cut(lambda x: x.astype(np.float64)),
    "another byte order": lambda: cut(lambda x: x.astype(">f8")),
    "read backwards and forwards": lambda: cut(lambda x: np.asfortranarray(x)),
    "an empty batch": lambda: cut(sizes=(4, 0, 4, 3, 0)),
    "an empty batch of a stream": lambda: Loader(cut(sizes=(4, 0, 4, 3, 0))),
    "a generator function": lambda: restarted,
    "a function that returns a list": lambda: cut,
    "a tuple of batches": lambda: tuple(cut()),
    "nothing beside": lambda: [(x, y) for x, y in cut()],
}


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_of_every_kind_give_the_matrix(kind):
    curvature = jaxlimit.hessian(loss, {"w": W}, BATCHES[kind]())
    assert (curvature.num_examples, curvature.dim) == (11, 6)
    assert curvature.loss == pytest.approx(LOSS, rel=1e-5)
    np.testing.assert_allclose(curvature.dense(), HESSIAN, rtol=1e-5, atol=1e-5)
    statistics = jaxlimit.loss_statistics(loss, {"w": W}, BATCHES[kind]())
    assert (statistics.mean, statistics.num_examples) == (pytest.approx(LOSS, rel=1e-5), 11)


def test_a_mapping_that_is_no_pytree_is_a_dictionary():
    batches = [UserDict(x=x, y=y) for x, y in cut()]
    curvature = jaxlimit.hessian(lambda w, b: loss({"w": w}, (b["x"], b["y"])), W, batches)
    np.testing.assert_allclose(curvature.dense(), HESSIAN, rtol=1e-5, atol=1e-5)


def test_random_keys_may_be_part_of_a_batch():
    """They shift the loss by a number that NumPy knows, and change no curvature."""
    keys = jax.random.split(jax.random.key(3), 11)
    noise = np.mean([float(jax.random.normal(key)) for key in keys])

    def noisy(params, batch):
        return loss(params, batch[:2]) + jnp.mean(jax.vmap(jax.random.normal)(batch[2]))

    listed = [(x, y, k) for (x, y), k in zip(cut(), (keys[:4], keys[4:8], keys[8:]), strict=True)]
    for batches in (batched((X, Y, keys), 4), listed):
        curvature = jaxlimit.hessian(noisy, {"w": W}, batches)
        assert curvature.loss == pytest.approx(LOSS + noise, rel=1e-4)
        np.testing.assert_allclose(curvature.dense(), HESSIAN, rtol=1e-5, atol=1e-5)


def test_data_and_weights_written_to_later_are_not_seen():
    x, w = X.copy(), W.copy()
    curvature = jaxlimit.hessian(loss, {"w": w}, batched((x, Y), 4))
    x[:], w[:] = 0, 0
    np.testing.assert_allclose(curvature.dense(), HESSIAN, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(curvature.params["w"], W)


def test_a_loader_may_fill_its_buffers_anew():
    def reusing():
        x, y = np.empty((1, 3), np.float32), np.empty((1, 2), np.float32)
        for i in range(11):
            x[:], y[:] = X[i], Y[i]
            yield x, y

    np.testing.assert_allclose(
        jaxlimit.hessian(loss, {"w": W}, reusing).dense(), HESSIAN, rtol=1e-5, atol=1e-5
    )


class Unregistered:
    pass


ONE = iter(cut())
NOT_BATCHES = {
    "two arrays": ((X, Y), r"arrays of shapes \(11, 3\), \(11, 2\), which look like the parts of one batch"),
    "a list of two arrays": ([X, Y[:, 0]], "look like the parts of one batch: pass batched"),
    "one array": (X, r"it is one ndarray: pass batched\(arrays"),
    "one dictionary": ({"x": X, "y": Y}, r"it is one dict: .*\[batch\]"),
    "parameters": ({"w": W}, "batches must hold batches, but it is one dict"),
    "a text": ("train", "batches must hold batches, but it is one str"),
    "nothing": (None, "iterable more than once, got NoneType"),
    "a generator": ((b for b in cut()), "iterable more than once, got generator.*the function that"),
    "the loss": (loss, "got loss, which takes arguments"),
    "the same iterator again": (lambda: ONE, "returned the same iterator twice"),
    "a function of nothing": (lambda: None, "must return an iterable, got NoneType"),
    "only empty batches": (cut(sizes=(0, 0)), "at least one example"),
    "names": ([(X, np.array(["a"] * 11))], r"batches\[0\]\[1\] must be an array of numbers, got dtype <U1"),
    "objects": ([(X, Y.astype(object))], "got dtype object"),
    "dates": ([(X, np.zeros(11, "M8[s]"))], "got dtype datetime64"),
    "long doubles": ([(X.astype(np.longdouble), Y)], "got dtype float128"),
    "text in a list": ([(X, ["a"] * 11)], r"batches\[0\]\[1\]\[0\] .*got the str 'a'"),
    "an unknown class": ([Unregistered()], "got the Unregistered"),
    "Python lists": ([(X.tolist(), Y.tolist())], r"a leading example axis.*pass np\.asarray\(list\)"),
    "a number": ([(X, Y, 3.0)], r"a leading example axis, got shapes \[\(11, 3\), \(11, 2\), \(\)\]"),
    "one key": ([(X, Y, jax.random.key(0))], "of random keys one for each example"),
    "masked": ([(np.ma.array(X), Y)], "masked array.*weight_fn"),
    "sparse": ([(sparse.BCOO.fromdense(X), Y)], "is a sparse BCOO: pass a dense array"),
    "wide integers": ([(X, Y, np.full(11, 2**40))], "which int32 does not hold: set jax_enable_x64"),
}


@pytest.mark.parametrize("name", NOT_BATCHES)
def test_what_is_no_collection_of_batches_is_refused(name):
    batches, message = NOT_BATCHES[name]
    with pytest.raises(ValueError, match=message):
        jaxlimit.hessian(loss, {"w": W}, batches)


def test_an_array_that_its_library_does_not_give_is_refused():
    class Closed(Tensor):
        def numpy(self, *, force=False):
            raise RuntimeError("on another machine")

    with pytest.raises(ValueError, match=r"a Closed, cannot be read.*NumPy array.*on another machine"):
        jaxlimit.hessian(loss, {"w": W}, [(Closed(X), Y)])


# ---- parameters ------------------------------------------------------------------------------------------

MORE = {
    "None": None,
    "a function": jax.nn.relu,
    "a text": "relu",
    "an int": 3,
    "a float": 0.5,
    "integers": np.arange(3),
    "names": np.array(["a", "b"]),
    "a key": jax.random.key(0),
    "complex": np.ones(2, complex),
    "a tensor": Tensor(np.ones(2)),
}


@pytest.mark.parametrize(
    ("name", "convert"),
    [
        *((name, np.asarray) for name in MORE),
        *(("a function", convert) for convert in (jnp.asarray, Tensor, lambda w: w.astype(">f8"))),
    ],
)
def test_parameters_may_hold_more_than_arrays(name, convert):
    params = {"w": convert(W), "more": MORE[name]}
    curvature = jaxlimit.hessian(loss, params, batched((X, Y), 4))
    np.testing.assert_allclose(curvature.dense(), HESSIAN, rtol=1e-5, atol=1e-5)
    assert jaxlimit.loss_statistics(loss, params, cut()).mean == pytest.approx(LOSS, rel=1e-5)


def test_what_is_no_array_reaches_the_loss_as_it_was():
    def reshaped(params, batch):
        w = params["w"].reshape(params["rows"], -1)
        return loss({"w": params["activation"](w)}, batch)

    params = {"w": W, "rows": 3, "activation": lambda w: w}
    np.testing.assert_allclose(
        jaxlimit.hessian(reshaped, params, cut()).dense(), HESSIAN, rtol=1e-5, atol=1e-5
    )


def squared(predict):
    return lambda params, batch: jnp.mean(jnp.sum((predict(params, batch[0]) - batch[1]) ** 2, -1))


def nnx_state():
    graphdef, state = nnx.split(nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0)))
    return squared(lambda state, x: nnx.merge(graphdef, state)(x)), state


def haiku():
    network = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(2, with_bias=False)(x)))
    return squared(network.apply), network.init(jax.random.key(0), X)


def frozen_linen():
    module = linen.Dense(2, use_bias=False)
    return squared(module.apply), FrozenDict(module.init(jax.random.key(0), X))


@pytest.mark.parametrize("make", [nnx_state, haiku, frozen_linen])
def test_parameters_of_libraries(make):
    their_loss, params = make()
    curvature = jaxlimit.hessian(their_loss, params, cut())
    np.testing.assert_allclose(curvature.dense(), HESSIAN, rtol=1e-5, atol=1e-5)
    sweep = jaxlimit.sparsity_sweep(lambda p, b: {"loss": their_loss(p, b)}, params, cut(), [0.0, 1.0])
    expected = [jaxlimit.loss_statistics(their_loss, params, cut()).mean, np.mean(np.sum(Y**2, -1))]
    np.testing.assert_allclose(sweep.metrics["loss"], expected, rtol=1e-5)


def test_an_equinox_model_is_parameters():
    """Oracle: `jax.hessian` of the loss as a function of the model's two kernels."""
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    their_loss = squared(lambda model, x: jax.vmap(model)(x))
    kernels = [layer.weight for layer in model.layers]
    flat, unravel = jax.flatten_util.ravel_pytree(kernels)
    where = lambda m: [layer.weight for layer in m.layers]  # noqa: E731
    expected = jax.hessian(lambda v: their_loss(eqx.tree_at(where, model, unravel(v)), (X, Y)))(flat)
    for prunable in (jaxlimit.is_kernel, jax.tree.map(lambda x: np.ndim(x) == 2, model)):
        curvature = jaxlimit.hessian(their_loss, model, cut(), prunable=prunable)
        np.testing.assert_allclose(curvature.dense(), expected, rtol=1e-3, atol=1e-4)
    assert curvature.params.activation is model.activation
    chosen = jax.tree.leaves(spectrum_parameters(curvature.params))
    assert sum(chosen) == 4  # of the reference's spectrum: kernels and biases, and no function


@dataclass
class Scaled:
    """Equal to others, so that it has no hash."""

    scale: jax.Array

    def __call__(self, params, batch):
        return self.scale * loss(params, batch)


@pytest.mark.parametrize(
    "callable_",
    [
        Scaled(jnp.ones(())),
        functools.partial(lambda scale, params, batch: scale * loss(params, batch), jnp.ones(())),
        functools.partial(lambda params, batch, scale: scale[0] * loss(params, batch), scale=[1.0]),
    ],
)
def test_callables_without_a_hash_are_losses(callable_):
    curvature = jaxlimit.hessian(callable_, {"w": W}, cut())
    np.testing.assert_allclose(curvature.dense(), HESSIAN, rtol=1e-5, atol=1e-5)
    assert jaxlimit.loss_statistics(callable_, {"w": W}, cut()).mean == pytest.approx(LOSS, rel=1e-5)


@pytest.mark.parametrize(
    ("prunable", "message"),
    [
        ({"w": np.ones((3, 2), bool)}, r"one bool for \['w'\], got a mask of shape \(3, 2\).*`scores`"),
        (lambda path, leaf: jnp.abs(leaf) > 0.1, r"got a mask of shape \(3, 2\)"),
        ({"w": 1}, r"prunable must hold bools, got 1 in \['w'\]"),
        ({"w": "yes"}, "prunable must hold bools, got 'yes'"),
        (True, "prunable does not match params"),
        ({"v": True}, "prunable does not match params"),
    ],
)
def test_prunable_chooses_whole_arrays(prunable, message):
    with pytest.raises(ValueError, match=message):
        jaxlimit.hessian(loss, {"w": W}, cut(), prunable=prunable)


@pytest.mark.parametrize("keep", [np.bool_(True), jnp.array(True), np.array(True)])
def test_prunable_may_hold_bools_of_any_library(keep):
    assert jaxlimit.hessian(loss, {"w": W}, cut(), prunable={"w": keep}).dim == 6


@pytest.mark.parametrize("more", [lambda z: jnp.argmax(z, -1), lambda z: z > 0, lambda z: jax.random.key(0)])
def test_outputs_without_derivatives_stand_beside_others(more):
    def predict(params, batch):
        outputs = batch[0] @ params["w"]
        return {"outputs": outputs, "more": more(outputs)}

    def output_loss(found, batch):
        return jnp.mean(jnp.sum((found["outputs"] - batch[1]) ** 2, -1))

    curvature = jaxlimit.gauss_newton(predict, output_loss, {"w": W}, cut())
    np.testing.assert_allclose(curvature.dense(), HESSIAN, rtol=1e-5, atol=1e-5)


def test_outputs_that_are_classes_have_no_curvature():
    def right(classes, batch):
        return jnp.mean(classes == 0)

    with pytest.raises(ValueError, match="predict_fn returns no floating-point array: return logits"):
        jaxlimit.gauss_newton(lambda p, b: jnp.argmax(b[0] @ p["w"], -1), right, {"w": W}, cut()).dense()
