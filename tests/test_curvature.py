"""Products with the Hessian and the Gauss-Newton matrix, against the matrices themselves.

The oracles differentiate the loss of all examples at once as a function of one flat vector, put together by
hand: they know no batches, no partition of the parameters and no matrix-free product. They always run in
float64. `jax.hessian` is forward over reverse too, but builds the whole matrix; the Gauss-Newton oracle
multiplies out an explicit Jacobian, and a second one writes the softmax Hessian in closed form.
"""

import re
from functools import cache, cached_property
from itertools import pairwise

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_mlp, output_loss, predict
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr

from jaxlimit.core.batches import batched
from jaxlimit.core.trees import combine, is_kernel, partition
from jaxlimit.curvature import linearizing
from jaxlimit.curvature.dense_matrix import dense_matrix
from jaxlimit.curvature.makers import gauss_newton, hessian
from jaxlimit.curvature.products import HessianProduct
from jaxlimit.limits.pruning_limit import pruning_limit
from jaxlimit.models import from_nnx

RTOL = {"float32": 1e-5, "float64": 1e-10}


def flat(tree):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


class Oracle:
    """The matrices of the network in conftest, over all examples at once, in float64."""

    def __init__(self, problem):
        self.params, self.arrays = problem.params, problem.arrays
        with jax.enable_x64(True):
            self.vector = jnp.concatenate(
                [self.params[layer]["kernel"].ravel() for layer in ("hidden", "out")]
            )

    def outputs(self, vector):
        return predict(
            {
                "hidden": {"kernel": vector[:20].reshape(4, 5), "bias": self.params["hidden"]["bias"]},
                "out": {"kernel": vector[20:].reshape(5, 3), "bias": self.params["out"]["bias"]},
            },
            self.arrays,
        )

    def loss(self, vector):
        return output_loss(self.outputs(vector), self.arrays)

    @cached_property
    def hessian(self):
        with jax.enable_x64(True):
            return np.asarray(jax.hessian(self.loss)(self.vector))

    @cached_property
    def gradient(self):
        with jax.enable_x64(True):
            return np.asarray(jax.grad(self.loss)(self.vector))

    @cached_property
    def gauss_newton(self):
        with jax.enable_x64(True):
            outputs = self.outputs(self.vector)
            jacobian = jax.jacrev(self.outputs)(self.vector).reshape(outputs.size, -1)
            of_outputs = jax.hessian(lambda z: output_loss(z.reshape(outputs.shape), self.arrays))(
                outputs.ravel()
            )
            return np.asarray(jacobian.T @ of_outputs @ jacobian)

    @cached_property
    def gauss_newton_of_softmax(self):
        """mean_n J_n^T (diag p_n - p_n p_n^T) J_n."""
        with jax.enable_x64(True):
            jacobian = np.asarray(jax.jacrev(self.outputs)(self.vector))
            outputs = np.asarray(self.outputs(self.vector))
        p = np.exp(outputs) / np.sum(np.exp(outputs), axis=1, keepdims=True)
        terms = [j.T @ (np.diag(q) - np.outer(q, q)) @ j for j, q in zip(jacobian, p, strict=True)]
        return np.mean(terms, axis=0)


@pytest.fixture(scope="session")
def oracle():
    return Oracle(make_mlp(np.float64))


def curvature_of(kind, problem, batches=None, **options):
    # A list is taken as it is: uneven batches stay uneven.
    batches = list(batched(problem.arrays, problem.batch_size)) if batches is None else batches
    if kind == "hessian":
        return hessian(problem.loss, problem.params, batches, **options)
    return gauss_newton(problem.predict, problem.output_loss, problem.params, batches, **options)


@cache
def standard(kind, dtype):
    """The curvature of the network as it is, compiled once for all tests of a precision."""
    return curvature_of(kind, make_mlp(dtype))


def assert_close(value, expected, dtype, factor=1.0):
    error = np.max(np.abs(value - expected))
    assert error <= factor * RTOL[np.dtype(dtype).name] * np.max(np.abs(expected))


def random_vectors(weights, count, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal((count, *x.shape)), x.dtype), weights)


in_float32 = pytest.mark.parametrize("dtype", ["float32"], indirect=True)
in_float64 = pytest.mark.parametrize("dtype", ["float64"], indirect=True)
kinds = pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
slowly_both = pytest.mark.parametrize(
    "kind", ["hessian", pytest.param("gauss_newton", marks=pytest.mark.nightly)]
)


@kinds
def test_matrix(kind, dtype, oracle):
    curvature = standard(kind, dtype)
    matrix = curvature.dense()
    assert matrix.shape == (35, 35)
    assert curvature.dim == 35
    assert curvature.num_examples == 17
    assert curvature.positive_semidefinite == (kind == "gauss_newton")
    assert_close(matrix, getattr(oracle, kind), dtype)


def test_gauss_newton_in_closed_form(dtype, oracle):
    np.testing.assert_allclose(oracle.gauss_newton_of_softmax, oracle.gauss_newton, atol=1e-13)
    assert_close(standard("gauss_newton", dtype).dense(), oracle.gauss_newton_of_softmax, dtype)


def test_the_two_matrices_differ_and_only_one_is_semidefinite(dtype):
    of_hessian = np.linalg.eigvalsh(standard("hessian", dtype).dense())
    of_gauss_newton = np.linalg.eigvalsh(standard("gauss_newton", dtype).dense())
    assert of_hessian[0] < -0.01 * of_hessian[-1]
    assert of_gauss_newton[0] > -10 * np.finfo(dtype).eps * of_gauss_newton[-1]


@kinds
def test_gradient(kind, dtype, oracle):
    curvature = standard(kind, dtype)
    assert jax.tree.structure(curvature.gradient) == jax.tree.structure(curvature.weights)
    assert_close(flat(curvature.gradient), oracle.gradient, dtype)


@kinds
def test_products(kind, dtype, oracle):
    curvature, matrix = standard(kind, dtype), getattr(oracle, kind)
    vectors = random_vectors(curvature.weights, 3)
    rows = jax.tree.map(lambda x: np.asarray(x, np.float64).reshape(3, -1), jax.tree.leaves(vectors))
    product = curvature.matmat(vectors)
    assert jax.tree.map(jnp.shape, product) == jax.tree.map(jnp.shape, vectors)
    assert all(x.dtype == dtype for x in jax.tree.leaves(product))
    found = np.concatenate(
        [np.asarray(x, np.float64).reshape(3, -1) for x in jax.tree.leaves(product)], axis=1
    )
    assert_close(found, np.concatenate(rows, axis=1) @ matrix, dtype)
    for i in range(3):
        row = curvature.matvec(jax.tree.map(lambda x, i=i: x[i], vectors))
        assert jax.tree.map(jnp.shape, row) == jax.tree.map(jnp.shape, curvature.weights)
        assert_close(flat(row), found[i], dtype)


@in_float32
@slowly_both
def test_a_block_is_multiplied_side_by_side_but_on_a_cpu(kind, mlp, dtype, oracle, monkeypatch):
    matrix = getattr(oracle, kind)
    vectors = random_vectors(curvature_of(kind, mlp).weights, 7)

    def loops():
        curvature = curvature_of(kind, mlp)  # which keeps what it traced
        curvature.matvec(curvature.weights)  # linearises
        found = subjaxprs(jax.make_jaxpr(curvature.matmat)(vectors).jaxpr)
        return sum(e.primitive.name == "scan" for e in found)

    one_by_one = loops()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert loops() < one_by_one
    product = curvature_of(kind, mlp).matmat(vectors)
    for i in range(7):
        row, found = (flat(jax.tree.map(lambda x, i=i: x[i], tree)) for tree in (vectors, product))
        assert_close(found, row @ matrix, dtype)


@kinds
def test_products_are_symmetric(kind, dtype):
    curvature = standard(kind, dtype)
    u, v = (random_vectors(curvature.weights, 1, seed) for seed in (1, 2))
    left = flat(u) @ flat(curvature.matmat(v))
    right = flat(v) @ flat(curvature.matmat(u))
    size = np.linalg.norm(flat(u)) * np.linalg.norm(flat(curvature.matmat(v)))
    assert abs(left - right) <= RTOL[dtype.name] * size


@in_float32
@kinds
def test_vectors_take_the_dtype_of_the_weights(kind, dtype, oracle):
    curvature = standard(kind, dtype)
    ones = jax.tree.map(lambda x: np.ones(x.shape, int), curvature.weights)
    product = curvature.matvec(ones)
    assert all(x.dtype == dtype for x in jax.tree.leaves(product))
    assert_close(flat(product), np.sum(getattr(oracle, kind), axis=0), dtype)


class Stream:
    """Batches that are cut anew in every pass; `change` may then do something to them."""

    def __init__(self, arrays, sizes, change=lambda passes, batches: batches):
        edges = np.cumsum([0, *sizes])
        self.batches = [{name: np.asarray(x[i:j]) for name, x in arrays.items()} for i, j in pairwise(edges)]
        self.change, self.passes = change, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.change(self.passes, self.batches))


@in_float64
@pytest.mark.parametrize(("kind", "batch_size"), [("hessian", 1), ("gauss_newton", 16)])
def test_the_cut_into_batches_does_not_matter(kind, batch_size, mlp, dtype, oracle):
    curvature = curvature_of(kind, mlp, list(batched(mlp.arrays, batch_size)))
    assert_close(curvature.dense(), getattr(oracle, kind), dtype)


@in_float32
@slowly_both
def test_arrays_in_memory_are_cut_to_suit_the_products(kind, mlp, dtype, oracle, monkeypatch):
    assert batch_sizes(curvature_of(kind, mlp, batched(mlp.arrays, 5))) == [17]
    # With room for 20 examples: 102 are cut evenly by 17, which is more than half of 20; 103 have no divisor.
    many = jax.tree.map(lambda x: jnp.tile(x, (6, 1)), mlp.arrays)
    per_example = bytes_per_example(curvature_of(kind, mlp))
    monkeypatch.setitem(linearizing.BATCH_BYTES, "cpu", 20 * per_example)
    curvature = curvature_of(kind, mlp, batched(many, 102))
    assert batch_sizes(curvature) == [17]
    assert_close(curvature.dense(), getattr(oracle, kind), dtype)
    one_more = jax.tree.map(lambda x: jnp.concatenate([x, x[:1]]), many)
    assert batch_sizes(curvature_of(kind, mlp, batched(one_more, 5))) == [20, 3]
    # However little fits, a batch may take five times the memory of the weights, which are read for it.
    monkeypatch.setitem(linearizing.BATCH_BYTES, "cpu", 1)
    curvature = curvature_of(kind, mlp, batched(many, 102))
    fits = max(5 * linearizing.num_bytes(curvature.weights) // per_example, 4)
    assert batch_sizes(curvature)[0] == next((size for size in (34, 17, 6) if size <= fits), fits)
    # Four are the fewest, though 51 can be divided by 3; elsewhere than on a CPU as many as fit.
    monkeypatch.setattr(linearizing, "WEIGHT_COPIES", 0)
    assert batch_sizes(curvature_of(kind, mlp, batched(jax.tree.map(lambda x: x[:51], many), 51))) == [4, 3]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert batch_sizes(curvature_of(kind, mlp, batched(many, 5))) == [102]


def batch_sizes(curvature):
    return [group["x"].shape[1] for group in curvature.groups]


def bytes_per_example(curvature):
    """Of the linearised batch of two examples, what grows with their number."""
    sizes = []
    for count in (2, 4):
        arrays = jax.tree.map(lambda x, n=count: x[:n], make_mlp(np.float32).arrays)
        linear = curvature.product.linearize(curvature.weights, curvature.rest, arrays)
        sizes.append(sum(x.nbytes for x in jax.tree.leaves(linear)))
    return (sizes[1] - sizes[0]) // 2


@in_float32
@pytest.mark.parametrize(("kind", "form"), [("hessian", "stream"), ("gauss_newton", "list")])
def test_lists_and_streams_are_as_good_as_arrays(kind, form, mlp, dtype, oracle):
    stream = Stream(mlp.arrays, [5, 5, 2, 5])
    curvature = curvature_of(kind, mlp, stream if form == "stream" else list(stream))
    assert curvature.num_examples == 17
    assert_close(curvature.dense(), getattr(oracle, kind), dtype)
    assert_close(flat(curvature.gradient), oracle.gradient, dtype)


@in_float32
def test_an_order_that_changes_is_harmless(mlp, dtype, oracle):
    """A sum over examples has no order; only what enters it must be the same."""
    rng = np.random.default_rng(0)
    stream = Stream(mlp.arrays, [5, 5, 5, 2], lambda _, batches: rng.permuted(np.array(batches, object)))
    assert_close(curvature_of("hessian", mlp, stream).dense(), oracle.hessian, dtype)


# Which leaves take part.


@in_float32
def test_biases_are_left_out_by_default(mlp, dtype):
    curvature = standard("hessian", dtype)
    assert jax.tree.map(jnp.shape, curvature.weights) == {
        "hidden": {"kernel": (4, 5), "bias": None},
        "out": {"kernel": (5, 3), "bias": None},
    }
    np.testing.assert_array_equal(curvature.weights["out"]["kernel"], mlp.params["out"]["kernel"])


@in_float64
def test_prunable_as_tree_and_as_function(mlp, dtype, oracle):
    full = oracle.hessian
    tree = {"hidden": {"kernel": False, "bias": False}, "out": {"kernel": True, "bias": False}}
    by_tree = curvature_of("hessian", mlp, prunable=tree)
    by_function = curvature_of(
        "hessian", mlp, prunable=lambda path, leaf: path[0].key == "out" and is_kernel(path, leaf)
    )
    assert by_tree.dim == by_function.dim == 15
    assert_close(by_tree.dense(), full[20:, 20:], dtype)
    np.testing.assert_array_equal(by_tree.dense(), by_function.dense())
    assert_close(flat(by_tree.gradient), oracle.gradient[20:], dtype)


@in_float64
@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_of_other_parameters(kind, mlp, dtype, oracle):
    """A block of the whole matrix, also after products of the whole have been linearised; and back."""
    whole = curvature_of(kind, mlp)
    matrix = whole.dense()
    assert_close(matrix, getattr(oracle, kind), dtype)
    part = whole.of(lambda path, leaf: path[0].key == "out" and is_kernel(path, leaf))
    assert part.dim == 15
    assert part.num_examples == whole.num_examples
    assert part.positive_semidefinite == whole.positive_semidefinite
    assert_close(part.dense(), getattr(oracle, kind)[20:, 20:], dtype)
    assert_close(flat(part.gradient), oracle.gradient[20:], dtype)
    np.testing.assert_array_equal(part.of(is_kernel).dense(), matrix)


@in_float64
def test_limit_of_a_chosen_layer(mlp, dtype, oracle):
    """The width limit of one layer alone, from its block of the matrix, by a scan over all n."""
    part = curvature_of("gauss_newton", mlp).of(lambda path, leaf: path[0].key == "hidden" and leaf.ndim == 2)
    limit = pruning_limit(part, jax.random.key(0), loss_tolerance=0.05, which=["width"])
    eigenvalues = np.linalg.eigvalsh(oracle.gauss_newton[:20, :20])
    squares = np.cumsum(np.sort(np.asarray(mlp.params["hidden"]["kernel"], np.float64).ravel() ** 2))
    shares = [np.mean(0.1 / (0.1 + eigenvalues * r2)) for r2 in [0.0, *squares]]
    largest = max(n for n in range(21) if shares[n] >= n / 20)
    assert largest / 20 <= limit.width.value <= (largest + 1) / 20
    assert limit.dim == 20


@in_float64
def test_every_leaf_may_be_prunable(mlp, dtype):
    """The last bias shifts the logits: its block of the Gauss-Newton matrix is that of softmax."""
    curvature = curvature_of("gauss_newton", mlp, prunable=lambda path, leaf: True)
    assert curvature.dim == 43
    outputs = np.asarray(mlp.predict(mlp.params, mlp.arrays), np.float64)
    p = np.exp(outputs) / np.sum(np.exp(outputs), axis=1, keepdims=True)
    block = np.diag(p.mean(axis=0)) - p.T @ p / 17
    assert_close(curvature.dense()[25:28, 25:28], block, dtype)


@in_float32
def test_partition_and_back(mlp):
    weights, rest = partition(mlp.params)
    assert weights["hidden"]["bias"] is None
    assert rest["hidden"]["kernel"] is None
    again = combine(weights, rest)
    assert jax.tree.structure(again) == jax.tree.structure(mlp.params)
    assert all(x is y for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(mlp.params), strict=True))


@pytest.mark.parametrize(
    ("leaf", "expected"),
    [
        (np.zeros((2, 2), np.float32), True),
        (jnp.zeros((2, 2, 3, 3), jnp.bfloat16), True),
        (np.zeros((2, 2), np.int32), False),
        (np.zeros((2, 2), bool), False),
        (np.zeros(3, np.float32), False),
        (np.float32(1.0), False),
        (1.0, False),
    ],
)
def test_default_of_prunable(leaf, expected):
    assert is_kernel((), leaf) == expected


# The dense matrix is put together from blocks.


@pytest.mark.parametrize("block_size", [1, 4, 5, 7, 10, 11, 128])
def test_dense_matrix_from_blocks(block_size, x64):
    """D = 10: a divisor, a number with a remainder, D itself and more; a matrix known beforehand."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((10, 10))
    matrix += matrix.T
    shapes = []

    def matmat(vectors):
        rows = np.concatenate(
            [np.asarray(v).reshape(len(v), -1) for v in (vectors["a"], vectors["b"])], axis=1
        )
        shapes.append(rows.shape)
        product = rows @ matrix
        return {"a": product[:, :6].reshape(-1, 2, 3), "b": product[:, 6:], "empty": vectors["empty"]}

    like = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4), "empty": jnp.zeros((0, 3))}
    np.testing.assert_allclose(dense_matrix(matmat, like, block_size), matrix, rtol=1e-14)
    assert set(shapes) == {(min(block_size, 10), 10)}  # one shape: one compilation


@pytest.mark.parametrize("width", [32, 33])
def test_dense_of_more_weights_than_a_block(width, x64):
    """D = 4 * 32 is a block, 4 * 33 is more; against the closed form X^T X / n of least squares."""
    x = np.random.default_rng(1).standard_normal((9, 4))

    def squares(params, batch):
        return jnp.mean(jnp.sum((batch @ params) ** 2, axis=1)) / 2

    curvature = hessian(squares, jnp.ones((4, width)), batched(x, 4))
    np.testing.assert_allclose(curvature.dense(), np.kron(x.T @ x / 9, np.eye(width)), atol=1e-14)


# Compilation.


def subjaxprs(jaxpr):
    """All equations, those inside scans, compiled functions and so on included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, (Jaxpr, ClosedJaxpr))
        ):
            if isinstance(value, ClosedJaxpr):
                yield from subjaxprs(value.jaxpr)
            elif isinstance(value, Jaxpr):
                yield from subjaxprs(value)


def assert_arguments(program, args, expected):
    """Arrays of these shapes are arguments of a program, and none is a constant in it."""
    lowered = program.lower(*args)
    shapes = {x.shape for x in jax.tree.leaves(lowered.in_avals)}
    assert expected <= shapes
    # A constant of one number is written as such, of several as a list or in hexadecimal.
    assert not re.search(r'dense<["\[]', lowered.as_text())
    return lowered.as_text()


@in_float32
@kinds
def test_data_and_parameters_are_arguments_of_the_compiled_function(kind, mlp):
    curvature = curvature_of(kind, mlp)
    args, vectors = (curvature.weights, curvature.rest), random_vectors(curvature.weights, 1)
    for group, data in zip(curvature.groups, [(3, 5, 4), (1, 2, 4)], strict=True):
        weights = {(4, 5), (5, 3), (5,), (3,)}
        program = curvature.product.sum.program(None)
        assert_arguments(program, ((*args, vectors), group), {data, *weights, (1, 4, 5), (1, 5, 3)})
        assert_arguments(curvature.product.gradient_sum.program(None), (args, group), {data, *weights})


@in_float32
@kinds
def test_linearised_batches_are_arguments_of_the_compiled_function(kind, mlp):
    curvature = curvature_of(kind, mlp)
    vectors = random_vectors(curvature.weights, 1)
    for group, inputs in zip(curvature.linear, [(3, 5, 4), (1, 2, 4)], strict=True):
        # Of the inputs the first layer's products are made.
        args = group, curvature.num_examples, vectors
        text = assert_arguments(curvature.product.group_mean, args, {inputs, (1, 4, 5), (1, 5, 3)})
        # The forward pass is not in it: neither the activation function nor the logarithm of the softmax.
        assert not re.search(r"stablehlo\.(tanh|log|exponential|logistic)\b", text)


@in_float64
@kinds
@pytest.mark.parametrize("count", [1, 3])
def test_products_are_the_same_with_and_without_linearised_batches(kind, count, mlp, dtype):
    curvatures = [curvature_of(kind, mlp, linear_bytes=size) for size in (0, 2**20)]
    vectors = random_vectors(curvatures[0].weights, count)
    anew, kept = (flat(curvature.matmat(vectors)) for curvature in curvatures)
    assert_close(kept, anew, dtype)


@in_float64
@kinds
def test_batches_that_take_much_memory_are_kept_apart(kind, mlp, dtype, oracle, monkeypatch):
    monkeypatch.setitem(linearizing.BATCH_BYTES, "cpu", 1)
    curvature = curvature_of(kind, mlp, list(batched(mlp.arrays, 3)))
    assert len(curvature.linear) == 6  # five batches of 3, and one of 2
    assert_close(curvature.dense(), getattr(oracle, kind), dtype)


@in_float32
@kinds
def test_another_compiled_function_holds_linearised_batches_that_are_there_and_small(kind, mlp, monkeypatch):
    curvature = curvature_of(kind, mlp)

    def is_kept():
        jaxpr = jax.make_jaxpr(lambda v: curvature.matvec(v))(curvature.weights).jaxpr  # traced each time
        return "tanh" not in {equation.primitive.name for equation in subjaxprs(jaxpr)}

    assert not is_kept()
    assert "linear" not in vars(curvature)
    curvature.matvec(curvature.weights)
    assert is_kept()
    monkeypatch.setattr("jaxlimit.curvature.operator.CONSTANT_BYTES", 1)
    assert not is_kept()


def kept_bytes(curvature):
    return sum(x.nbytes for x in jax.tree.leaves(curvature.linear))


@in_float32
@kinds
def test_linearised_batches_stay_within_their_budget(kind, mlp):
    kept = kept_bytes(curvature_of(kind, mlp))
    assert kept > 17 * 4 * (4 + 5 + 3)  # inputs, activations and probabilities of every example
    assert kept_bytes(curvature_of(kind, mlp, linear_bytes=kept)) == kept
    assert curvature_of(kind, mlp, linear_bytes=kept - 1).linear is None
    stream = Stream(mlp.arrays, [5, 5, 5, 2])
    assert curvature_of(kind, mlp, batches=stream).linear is None
    with pytest.raises(ValueError, match="linear_bytes must be an integer of at least 0, got -1"):
        curvature_of(kind, mlp, linear_bytes=-1)


@in_float32
@kinds
def test_first_products_may_be_inside_a_compiled_function(kind, mlp):
    curvature = curvature_of(kind, mlp)
    vector = jax.tree.map(lambda x: x[0], random_vectors(curvature.weights, 1))

    @jax.jit
    def compiled(vector):
        return curvature.matvec(vector), curvature.gradient

    inside = compiled(vector)
    # What they keep can be used outside.
    for found, expected in zip(inside, (curvature.matvec(vector), curvature.gradient), strict=True):
        np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-5, atol=1e-6)


@in_float32
@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("default", jax.lax.Precision.DEFAULT),
        (None, jax.lax.Precision.HIGHEST),
    ],
)
@kinds
def test_precision_reaches_every_matrix_product(kind, precision, expected, mlp):
    options = {} if precision is None else {"precision": precision}
    curvature = curvature_of(kind, mlp, **options)
    for vectors in (random_vectors(curvature.weights, 1), random_vectors(curvature.weights, 2)):
        jaxpr = jax.make_jaxpr(curvature.matmat)(vectors)
        found = [e.params["precision"] for e in subjaxprs(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
        assert len(found) >= 6  # forward and back through two layers, twice, less what needs no product
        assert {part for pair in found for part in (pair or (None, None))} == {expected}
    assert jax.config.jax_default_matmul_precision is None  # no global state


# Memory.


@in_float32
@slowly_both
def test_checkpointed_blocks_keep_less(kind, dtype):
    """Under jax.checkpoint a block computes its activations again in every product; they are not kept."""
    rng = np.random.default_rng(0)
    depth, width, size = 16, 32, 64
    params = [jnp.asarray(rng.standard_normal((width, width)) / 6, dtype) for _ in range(depth)]
    labels = np.eye(width, dtype=dtype)[np.zeros(size, int)]
    arrays = {"x": jnp.asarray(rng.standard_normal((size, width)), dtype), "y": labels}

    def block(kernels, hidden):
        for kernel in kernels:
            hidden = jnp.tanh(hidden @ kernel)
        return hidden

    def product_and_bytes(block):
        def predict(params, batch):
            hidden = batch["x"]
            for start in range(0, depth, 4):
                hidden = block(params[start : start + 4], hidden)
            return hidden

        def loss(params, batch):
            return output_loss(predict(params, batch), batch)

        if kind == "hessian":
            curvature = hessian(loss, params, [arrays])
        else:
            curvature = gauss_newton(predict, output_loss, params, [arrays])
        return flat(curvature.matmat(random_vectors(curvature.weights, 1))), kept_bytes(curvature)

    plain, plain_bytes = product_and_bytes(block)
    again, again_bytes = product_and_bytes(jax.checkpoint(block))
    assert_close(again, plain, dtype)
    assert again_bytes < 0.7 * plain_bytes


@pytest.mark.parametrize("count", [1, 3])
def test_a_product_of_checkpointed_layers_takes_little_more_memory_than_their_gradient(count):
    """Linearised anew, where nothing is kept between products; and it is the same product."""
    depth, width, size = 12, 64, 512
    kernels = jax.random.normal(jax.random.key(0), (depth, width, width)) / 8
    batch = jax.random.normal(jax.random.key(1), (size, width))
    vectors = jax.random.normal(jax.random.key(2), (count, *kernels.shape))

    def layer(hidden, kernel):
        return jax.nn.gelu(jax.nn.gelu(hidden @ kernel) @ kernel.T)

    def loss_of(block):
        def loss(kernels, batch):
            return jnp.mean(jax.lax.scan(lambda h, w: (block(h, w), None), batch, kernels)[0] ** 2)

        return loss

    def product_and_bytes(block):
        product = HessianProduct(loss_of(block), "highest")
        program = jax.jit(lambda w, v, b: product(w, None, v, b)).lower(kernels, vectors, batch).compile()
        return program(kernels, vectors, batch), program.memory_analysis().temp_size_in_bytes

    plain, plain_bytes = product_and_bytes(layer)
    again, again_bytes = product_and_bytes(jax.checkpoint(layer))
    gradient = jax.jit(jax.grad(loss_of(jax.checkpoint(layer)))).lower(kernels, batch).compile()
    np.testing.assert_allclose(again, plain, rtol=1e-4, atol=1e-5 * float(jnp.abs(plain).max()))
    assert again_bytes < 0.5 * plain_bytes
    assert again_bytes < 4 * gradient.memory_analysis().temp_size_in_bytes


def test_checkpointed_layers_with_a_rule_for_reverse_mode_alone():
    """Forward mode, which saves the memory, is refused there; the product is that without checkpoints."""

    @jax.custom_vjp
    def rounded(x):
        return jnp.round(x)

    rounded.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))
    weights, batch = jnp.linspace(-1, 1, 12).reshape(4, 3), jnp.linspace(0, 1, 20).reshape(5, 4)
    vectors = jax.random.normal(jax.random.key(0), (2, 4, 3))

    def product_of(wrap):
        layer = wrap(lambda w, x: rounded(4 * jnp.tanh(x @ w)) / 4)
        return HessianProduct(lambda w, x: jnp.mean(layer(w, x) ** 2), "highest")(
            weights, None, vectors, batch
        )

    np.testing.assert_allclose(product_of(jax.checkpoint), product_of(lambda f: f), rtol=1e-5)


# Models of the libraries people use.


def cross_entropy(outputs, batch):
    return -jnp.mean(jnp.sum(batch["y"] * jax.nn.log_softmax(outputs), axis=-1))


def check_model(predict_fn, params, arrays, kernels):
    """Product with ones in the kernels, against the derivative of the gradient by finite differences."""

    def loss(params, batch):
        return cross_entropy(predict_fn(params, batch), batch)

    curvature = hessian(loss, params, batched(arrays, 5))
    assert curvature.dim == kernels
    ones = jax.tree.map(jnp.ones_like, curvature.weights)
    step = 1e-5
    moved = [
        jax.grad(loss)(
            jax.tree.map(lambda x, sign=sign: x + sign * step if x.ndim >= 2 else x, params), arrays
        )
        for sign in (1, -1)
    ]
    expected = jax.tree.map(lambda plus, minus: (plus - minus) / (2 * step), *moved)
    expected = np.concatenate([np.ravel(x) for x in jax.tree.leaves(expected) if x.ndim >= 2])
    np.testing.assert_allclose(flat(curvature.matvec(ones)), expected, rtol=1e-6, atol=1e-8)


class Small(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 6, rngs=rngs, param_dtype=jnp.float64)
        self.norm = nnx.BatchNorm(6, rngs=rngs, param_dtype=jnp.float64)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(6, 3, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, x):
        return self.second(self.dropout(jnp.tanh(self.norm(self.first(x)))))


@in_float64
def test_nnx_model(mlp, dtype):
    model_predict, params = from_nnx(Small(nnx.Rngs(0)))
    check_model(lambda p, batch: model_predict(p, batch["x"]), params, mlp.arrays, kernels=42)


@in_float64
def test_nnx_state(mlp, dtype):
    model = Small(nnx.Rngs(0))
    model.eval()
    graphdef, state, rest = nnx.split(model, nnx.Param, ...)
    check_model(lambda p, batch: nnx.merge(graphdef, p, rest)(batch["x"]), state, mlp.arrays, kernels=42)


@in_float64
def test_linen_model(mlp, dtype):
    model = linen.Sequential(
        [linen.Dense(6, param_dtype=jnp.float64), jnp.tanh, linen.Dense(3, param_dtype=jnp.float64)]
    )
    variables = model.init(jax.random.key(0), mlp.arrays["x"])
    check_model(lambda p, batch: model.apply(p, batch["x"]), variables, mlp.arrays, kernels=42)


def test_a_bare_array_as_parameters():
    curvature = hessian(
        lambda w, x: jnp.mean((x @ w) ** 2) / 2, jnp.ones((2, 1)), batched(np.eye(2) * [1, 3], 2)
    )
    np.testing.assert_allclose(curvature.dense(), [[0.5, 0], [0, 4.5]])


# Bad input, all of it in float32.


@in_float32
@kinds
@pytest.mark.parametrize(
    ("prunable", "message"),
    [
        (lambda path, leaf: False, "no prunable leaf"),
        (
            {"hidden": {"kernel": False, "bias": False}, "out": {"kernel": False, "bias": False}},
            "no prunable leaf",
        ),
        ({"hidden": True, "out": False}, "prunable does not match params: expected the tree"),
        (True, "prunable does not match params"),
    ],
)
def test_unusable_choices_of_weights(kind, prunable, message, mlp):
    with pytest.raises(ValueError, match=message):
        curvature_of(kind, mlp, prunable=prunable)


def test_nothing_prunable_by_default():
    with pytest.raises(ValueError, match=r"no prunable leaf.*2 or more dimensions"):
        hessian(lambda w, x: jnp.mean(x * w), jnp.ones(3), batched(np.ones((4, 3)), 2))


@in_float32
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(value, mlp):
    mlp.params["out"]["kernel"] = mlp.params["out"]["kernel"].at[1, 2].set(value)
    with pytest.raises(ValueError, match=r"\['out'\]\['kernel'\] holds NaN or infinite"):
        curvature_of("hessian", mlp)


@in_float32
def test_integer_weights(mlp):
    mlp.params["table"] = jnp.ones((2, 2), int)
    assert curvature_of("hessian", mlp).dim == 35
    with pytest.raises(ValueError, match=r"\['table'\] has dtype int32: floating-point"):
        curvature_of("hessian", mlp, prunable=lambda path, leaf: leaf.ndim == 2)


@in_float32
@kinds
def test_weights_of_half_precision(kind, mlp):
    half = mlp.params["out"]["kernel"].astype(jnp.bfloat16)
    curvature = curvature_of(kind, mlp)
    mlp.params["out"]["kernel"] = half
    with pytest.raises(ValueError, match=r"\['out'\]\['kernel'\] has dtype bfloat16, too coarse .*astype"):
        curvature_of(kind, mlp)
    assert curvature_of(kind, mlp, prunable=lambda path, leaf: leaf.dtype == jnp.float32).dim < curvature.dim


@pytest.mark.parametrize("groups", ["batched", "stream"])
def test_other_weights_are_refused_where_the_loss_is_too_coarse_for_them(groups):
    """A float32 head over a bfloat16 body: the curvature of the head is taken, that of the body is not."""
    rng = np.random.default_rng(0)
    body, head, inputs = (rng.normal(size=shape).astype(np.float32) for shape in ((6, 5), (5, 2), (16, 6)))

    def loss(params, batch):
        hidden = batch.astype(jnp.bfloat16) @ params["body"].astype(jnp.bfloat16)
        return jnp.mean((jnp.tanh(hidden).astype(jnp.float32) @ params["head"]) ** 2)

    data = batched(inputs, 8)
    curvature = hessian(
        loss,
        {"body": jnp.asarray(body), "head": jnp.asarray(head)},
        data if groups == "batched" else lambda: iter(data),
        prunable=lambda path, _: path[0].key == "head",
    )
    assert curvature.of(lambda path, _: path[0].key == "head").dim == 10
    for wanted in ({"body"}, {"body", "head"}):
        with pytest.raises(ValueError, match="computes in bfloat16 on its way from the weights"):
            curvature.of(lambda path, _, wanted=wanted: path[0].key in wanted)


@in_float32
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: {"hidden": v["hidden"]}, "must be a tree like the weights"),
        (lambda v: jax.tree.leaves(v), "must be a tree like the weights"),
        (lambda v: {**v, "out": {"kernel": v["out"]["kernel"], "bias": jnp.ones(3)}}, "must be a tree like"),
        (
            lambda v: {**v, "out": {"kernel": v["out"]["kernel"].T, "bias": None}},
            r"\(3, 5\) stands where.*\(5, 3\)",
        ),
    ],
)
def test_vectors_unlike_the_weights(change, message, dtype):
    curvature = standard("hessian", dtype)
    with pytest.raises(ValueError, match=message):
        curvature.matvec(change(curvature.weights))
    with pytest.raises(ValueError, match="stands where weights has"):
        curvature.matmat(curvature.weights)  # no probe axis


@in_float32
@pytest.mark.parametrize(
    "wrong",
    [
        lambda p, b: -jnp.sum(b["y"] * jax.nn.log_softmax(predict(p, b)), axis=-1),
        lambda p, b: (jnp.mean(predict(p, b)), {"aux": 1.0}),
        lambda p, b: jnp.mean(predict(p, b), axis=0),
        lambda p, b: jnp.mean(predict(p, b))[None],
    ],
)
def test_loss_that_is_no_scalar(wrong, mlp):
    with pytest.raises(ValueError, match="loss_fn must return a scalar"):
        hessian(wrong, mlp.params, batched(mlp.arrays, 17))


@in_float32
def test_losses_of_examples_in_uneven_batches(mlp):
    def losses(params, batch):
        return -jnp.sum(batch["y"] * jax.nn.log_softmax(predict(params, batch)), axis=-1)

    with pytest.raises(ValueError, match="loss_fn must return a scalar"):
        hessian(losses, mlp.params, batched(mlp.arrays, 5))


@in_float32
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_loss_that_is_not_finite(value, mlp):
    mlp.arrays["y"] = mlp.arrays["y"].at[16, 0].set(value)
    with pytest.raises(ValueError, match=f"the mean loss is {value}"):
        curvature_of("gauss_newton", mlp)


@in_float32
@pytest.mark.parametrize("batch_size", [17, 2])
def test_sum_instead_of_mean(batch_size, mlp):
    def total(params, batch):
        return mlp.loss(params, batch) * len(batch["x"])

    with pytest.raises(ValueError, match=r"not a mean over the batch's examples.*a sum instead of a mean"):
        hessian(total, mlp.params, batched(mlp.arrays, batch_size))


@in_float32
def test_batch_norm_in_train_mode(mlp):
    def normalised(params, batch):
        x = (batch["x"] - batch["x"].mean(axis=0)) / (batch["x"].std(axis=0) + 1e-3)
        return mlp.loss(params, {**batch, "x": x})

    with pytest.raises(ValueError, match=r"not a mean over the batch's examples.*batch norm in train mode"):
        hessian(normalised, mlp.params, batched(mlp.arrays, 5))


@in_float32
def test_a_mean_with_a_penalty_is_a_mean(mlp, oracle):
    def penalised(params, batch):
        return mlp.loss(params, batch) + 0.05 * sum(jnp.sum(p**2) for p in jax.tree.leaves(params))

    curvature = hessian(penalised, mlp.params, batched(mlp.arrays, 5))
    assert_close(curvature.dense(), oracle.hessian + 0.1 * np.eye(35), np.float32)


def augmented(passes, batches):
    rng = np.random.default_rng(passes)
    return [{**b, "x": b["x"] + 0.1 * rng.standard_normal(b["x"].shape).astype(np.float32)} for b in batches]


def shuffled_and_cut(passes, batches):
    """A shuffling loader that drops the last batch."""
    x, y = (np.concatenate([b[name] for b in batches]) for name in "xy")
    order = np.random.default_rng(passes).permutation(len(x))[:15]
    return [{"x": x[part], "y": y[part]} for part in np.split(order, 3)]


@in_float32
@pytest.mark.parametrize(("kind", "change"), [("hessian", augmented), ("gauss_newton", shuffled_and_cut)])
def test_data_that_change_between_passes(kind, change, mlp):
    with pytest.raises(
        ValueError,
        match=r"data changed between two passes: 1[57] examples with the .*shuffling.*augmentation",
    ):
        curvature_of(kind, mlp, Stream(mlp.arrays, [5, 5, 5, 2], change))


@in_float32
@pytest.mark.parametrize("kind", ["hessian"])
def test_number_of_examples_that_changes_between_passes(kind, mlp):
    # The same loss in both passes, so that only the count can tell.
    arrays = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), mlp.arrays)
    stream = Stream(arrays, [5, 5, 5, 2], lambda passes, batches: batches[: passes + 1])
    with pytest.raises(
        ValueError, match="data changed between two passes: 10 examples in the first, 15 in the sec"
    ):
        curvature_of(kind, mlp, stream)


@in_float32
@pytest.mark.parametrize("kind", ["gauss_newton"])
def test_number_of_examples_that_changes_later(kind, mlp, oracle):
    stream = Stream(mlp.arrays, [5, 5, 5, 2])
    curvature = curvature_of(kind, mlp, stream)
    assert_close(flat(curvature.gradient), oracle.gradient, np.float32)
    stream.change = lambda _, batches: batches[:-1]
    with pytest.raises(
        ValueError, match="data changed between two passes: 17 examples in the first, 15 in the sec"
    ):
        curvature.matvec(curvature.weights)


@in_float32
@pytest.mark.parametrize("empty", [[], (), Stream({}, [])])
def test_no_data(empty, mlp):
    with pytest.raises(ValueError, match=r"batches (is empty|hold no examples)"):
        curvature_of("hessian", mlp, empty)


@in_float32
def test_a_generator(mlp):
    with pytest.raises(ValueError, match="iterable more than once, got generator"):
        curvature_of("hessian", mlp, (batch for batch in batched(mlp.arrays, 5)))


def test_complex_vectors_are_refused():
    """Their imaginary part would be lost."""
    curvature = hessian(
        lambda w, x: jnp.mean((x @ w) ** 2),
        jnp.ones(3),
        [np.ones((2, 3), np.float32)],
        prunable=lambda *_: True,
    )
    with pytest.raises(ValueError, match="vectors must be real"):
        curvature.matvec(1j * jnp.ones(3))
