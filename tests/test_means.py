"""What a loss is a mean over: the right matrix, whatever the cut, or a refusal that says why.

The oracle is `jax.hessian` of the loss of all examples at once, written without batches, in float64; of
statistics and sweeps it is NumPy. Every loss here is one that people write.
"""

import json
import os
import subprocess
import sys
from itertools import pairwise

import jax
import jax.numpy as jnp
import masked_devices
import numpy as np
import pytest
from flax import nnx

from jaxlimit import batched, finetuned_sweep, gauss_newton, hessian, loss_statistics, sparsity_sweep
from jaxlimit.core.batches import grouped
from jaxlimit.core.sums import ExampleSum
from jaxlimit.core.widening import coarse_numbers, widened
from jaxlimit.curvature.dense_matrix import dense_matrix
from jaxlimit.curvature.loss_trace import trace_loss
from jaxlimit.curvature.rounding import measured_rounding
from jaxlimit.models import from_nnx

RNG = np.random.default_rng(0)
COUNT = 44
W = {"a": RNG.standard_normal((3, 4)).astype(np.float32), "b": RNG.standard_normal((4, 2)).astype(np.float32)}
X = RNG.standard_normal((COUNT, 3)).astype(np.float32)
Y = RNG.integers(0, 2, COUNT)
LENGTHS = np.sort(RNG.integers(1, 9, COUNT))  # as a bucketing loader sorts them
TOKENS = RNG.standard_normal((COUNT, 8, 3)).astype(np.float32) * (1 + np.arange(COUNT)[:, None, None] / 20)
MASK = (np.arange(8) < LENGTHS[:, None]).astype(np.float32)


def predict(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def losses(params, batch):
    logits = jax.nn.log_softmax(predict(params, batch["x"]))
    return -jnp.take_along_axis(logits, batch["y"][..., None], -1)[..., 0]


def mean_loss(params, batch):
    return jnp.mean(losses(params, batch))


def summed(params, batch):
    return jnp.sum(losses(params, batch))


def masked(params, batch):
    return jnp.sum(losses(params, batch) * batch["mask"]) / jnp.sum(batch["mask"])


def count_mask(batch):
    return jnp.sum(batch["mask"])


DATA = {"x": X, "y": Y}


def padded(size):
    """All examples, filled up with others that a mask leaves out."""
    extra = -COUNT % size
    arrays = jax.tree.map(lambda x: np.concatenate([x, 3 * x[:extra]]), DATA)
    return arrays | {"y": arrays["y"] % 2, "mask": np.repeat([1.0, 0.0], [COUNT, extra]).astype(np.float32)}


def tokens():
    return {"x": TOKENS, "y": np.broadcast_to(Y[:, None], (COUNT, 8)), "mask": MASK}


CLASS_WEIGHTS = np.array([1.0, 5.0], np.float32)


def balanced(params, batch):
    weights = jnp.asarray(CLASS_WEIGHTS)[batch["y"]]
    return jnp.sum(weights * losses(params, batch)) / jnp.sum(weights)


def class_weight(batch):
    return jnp.sum(jnp.asarray(CLASS_WEIGHTS)[batch["y"]])


def oracle(loss, arrays, of=W):
    """The dense Hessian and the loss of all examples at once, in float64."""
    with jax.enable_x64(True):
        leaves, structure = jax.tree.flatten(of)
        sizes = np.cumsum([x.size for x in leaves])[:-1]

        def of_vector(vector):
            parts = [p.reshape(x.shape) for p, x in zip(jnp.split(vector, sizes), leaves, strict=True)]
            return loss(structure.unflatten(parts), arrays)

        arrays = {k: np.asarray(x, np.float64) if x.dtype.kind == "f" else x for k, x in arrays.items()}
        vector = jnp.concatenate([np.asarray(x, np.float64).ravel() for x in leaves])
        return np.asarray(jax.hessian(of_vector)(vector)), float(of_vector(vector))


class Stream:
    def __init__(self, batches):
        self.batches = list(batches)

    def __iter__(self):
        return iter(self.batches)


CUTS = {
    "batched": lambda arrays, size: batched(arrays, size),
    "list": lambda arrays, size: list(batched(arrays, size)),
    "stream": lambda arrays, size: Stream(batched(arrays, size)),
}
cuts = pytest.mark.parametrize("cut", CUTS)

# A loss that is a mean over something, its data, and what it is a mean over.
WEIGHTED = {
    "padding": (masked, padded(16), count_mask),
    "tokens": (masked, tokens(), count_mask),
    "classes": (balanced, DATA, class_weight),
}
# Each kind in one cut, and each cut with one kind; all pairs are slow tests.
weighted_cuts = pytest.mark.parametrize(
    ("kind", "cut"),
    [
        pytest.param(kind, cut, marks=[] if cut == "batched" or kind == "tokens" else [pytest.mark.nightly])
        for kind in WEIGHTED
        for cut in CUTS
    ],
)


@weighted_cuts
def test_a_weight_makes_it_the_mean_of_all(kind, cut):
    loss, arrays, weight_fn = WEIGHTED[kind]
    expected, value = oracle(loss, arrays)
    batches = CUTS[cut](arrays, 16)
    curvature = hessian(loss, W, batches, weight_fn=weight_fn)
    assert curvature.num_examples == len(arrays["x"])
    assert curvature.total_weight == pytest.approx(float(weight_fn(arrays)))
    for found in (curvature.loss, curvature.mean_loss(W)):
        assert found == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(curvature.dense(), expected, atol=1e-5 * np.abs(expected).max())
    statistics = loss_statistics(loss, W, batches, weight_fn=weight_fn)
    assert statistics.mean == pytest.approx(value, rel=1e-5)
    assert statistics.num_examples == len(arrays["x"])
    sweep = sparsity_sweep(lambda p, b: {"l": loss(p, b)}, W, batches, [0, 0.5], weight_fn=weight_fn)
    assert sweep.metrics["l"][0] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    "kind", ["tokens", *(pytest.param(kind, marks=pytest.mark.nightly) for kind in ("padding", "classes"))]
)
def test_a_weight_in_products_that_are_linearised_anew_and_in_gauss_newton(kind):
    loss, arrays, weight_fn = WEIGHTED[kind]
    expected, _ = oracle(loss, arrays)
    options = {"weight_fn": weight_fn, "linear_bytes": 0}
    curvature = hessian(loss, W, batched(arrays, 16), **options)
    vector = jax.tree.map(jnp.ones_like, W)
    product = np.concatenate([np.ravel(x) for x in jax.tree.leaves(curvature.matvec(vector))])
    np.testing.assert_allclose(product, expected.sum(0), atol=1e-5 * np.abs(expected).max())
    # Of a network that is linear in its weights it is the Hessian.
    linear = {"a": W["a"][:, :2]}

    def of_outputs(outputs, batch):
        return loss({"a": jnp.eye(2), "b": jnp.eye(2)}, batch | {"x": jnp.arctanh(0.5 * jnp.tanh(outputs))})

    def of_linear(p, b):
        return of_outputs(b["x"] @ p["a"], b)

    curvature = gauss_newton(
        lambda p, b: b["x"] @ p["a"], of_outputs, linear, batched(arrays, 16), weight_fn=weight_fn
    )
    expected, _ = oracle(of_linear, arrays, linear)
    np.testing.assert_allclose(curvature.dense(), expected, atol=1e-5 * np.abs(expected).max())


def test_the_spread_of_batches_is_weighted():
    found = loss_statistics(masked, W, list(batched(tokens(), 16)), weight_fn=count_mask)
    parts = [float(masked(W, batch)) for batch in batched(tokens(), 16)]
    weights = [float(count_mask(batch)) for batch in batched(tokens(), 16)]
    mean = np.average(parts, weights=weights)
    assert found.mean == pytest.approx(mean, rel=1e-5)
    assert found.batch_std == pytest.approx(
        np.sqrt(np.average((parts - mean) ** 2, weights=weights)), rel=1e-4
    )


@weighted_cuts
def test_without_the_weight_it_is_refused_and_the_weight_is_named(kind, cut):
    loss, arrays, _ = WEIGHTED[kind]
    batches = CUTS[cut](arrays, 16)
    for use in (
        lambda: hessian(loss, W, batches),
        lambda: loss_statistics(loss, W, batches),
        lambda: sparsity_sweep(lambda p, b: {"loss": loss(p, b)}, W, batches, [0, 0.5]),
    ):
        with pytest.raises(ValueError, match=r"not a mean over the batch's examples.*weight_fn"):
            use()


def test_a_batch_of_padding_alone_counts_nothing():
    """Its mean is 0 / 0."""
    arrays = {k: np.concatenate([x, x[:20]]) for k, x in padded(1).items()}
    arrays["mask"][COUNT:] = 0
    expected, value = oracle(masked, arrays)
    for batches in (batched(arrays, 8), list(batched(arrays, 16))):
        curvature = hessian(masked, W, batches, weight_fn=count_mask)
        assert curvature.loss == pytest.approx(value, rel=1e-5)
        np.testing.assert_allclose(curvature.dense(), expected, atol=1e-5 * np.abs(expected).max())
        assert loss_statistics(masked, W, batches, weight_fn=count_mask).mean == pytest.approx(
            value, rel=1e-5
        )


# What is no mean at all.


def normalised(params, batch):
    x = batch["x"] @ params["a"]
    x = (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5)
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(x @ params["b"]), batch["y"][:, None], 1))


def contrastive(params, batch):
    z = predict(params, batch["x"])
    return -jnp.mean(jnp.diag(jax.nn.log_softmax(z @ z.T)))


def broadcast(params, batch):
    return jnp.mean((predict(params, batch["x"])[:, :1] - batch["y"]) ** 2)  # (N, 1) against (N,)


def drift(total):
    """How far the outputs are from those of the trained weights: 0 there, and so is the gradient."""
    return lambda params, batch: total((predict(params, batch["x"]) - predict(W, batch["x"])) ** 2)


def with_penalty(params, batch):
    return summed(params, batch) / COUNT + 1e-3 * sum(jnp.sum(jnp.abs(x)) for x in params.values())


NO_MEANS = {
    "sum": summed,
    "batch norm": normalised,
    "contrastive": contrastive,
    "broadcast": broadcast,
    "drift": drift(jnp.sum),
    "penalty": with_penalty,
}


def cut_by(sizes):
    edges = np.cumsum([0, *sizes])
    return [{k: x[i:j] for k, x in DATA.items()} for i, j in pairwise(edges)]


SIZES = {"one": [COUNT], "ones": [1] * COUNT, "one first": [1, 21, 22], "even": [11] * 4, "last": [40, 4]}


@pytest.mark.parametrize(
    ("loss", "sizes"),
    [
        ("sum", "one"),
        ("sum", "ones"),
        ("sum", "one first"),
        ("broadcast", "one"),
        ("broadcast", "ones"),
        ("contrastive", "even"),
        ("drift", "one first"),
        ("drift", "last"),
        ("batch norm", "even"),
    ],
)
def test_what_is_no_mean_is_refused_in_every_list(loss, sizes):
    with pytest.raises(ValueError, match=r"not a mean over the batch's examples.*a sum instead of a mean"):
        hessian(NO_MEANS[loss], W, cut_by(SIZES[sizes]))


@pytest.mark.parametrize(
    ("loss", "cut", "batch_size"),
    [
        ("sum", "batched", 1),
        ("sum", "batched", COUNT),
        ("drift", "batched", 16),
        ("drift", "stream", 16),
        ("broadcast", "stream", 1),
        ("contrastive", "batched", 16),
        ("batch norm", "stream", 16),
    ],
)
def test_what_is_no_mean_is_refused_however_it_is_batched(loss, cut, batch_size):
    with pytest.raises(ValueError, match=r"not a mean over the batch's examples.*batch norm in train mode"):
        hessian(NO_MEANS[loss], W, CUTS[cut](DATA, batch_size))


@pytest.mark.parametrize("size", [256, 4096])
def test_batch_norm_in_train_mode_at_any_size(size):
    rng = np.random.default_rng(1)
    arrays = {"x": rng.standard_normal((4096, 3)).astype(np.float32), "y": rng.integers(0, 2, 4096)}
    for batches in (batched(arrays, size), list(batched(arrays, size))):
        with pytest.raises(ValueError, match="batch norm in train mode"):
            hessian(normalised, W, batches)


@pytest.mark.parametrize(
    ("loss", "cut"), [("sum", "batched"), ("broadcast", "list"), ("batch norm", "stream")]
)
def test_statistics_and_sweeps_refuse_it_too(loss, cut):
    batches = CUTS[cut](DATA, 16)
    with pytest.raises(ValueError, match="loss_fn is not a mean over the batch's examples"):
        loss_statistics(NO_MEANS[loss], W, batches)

    def metrics(params, batch):
        return {"fine": mean_loss(params, batch), "wrong": NO_MEANS[loss](params, batch)}

    with pytest.raises(ValueError, match=r"metrics_fn\['wrong'\] is not a mean over the batch's examples"):
        sparsity_sweep(metrics, W, batches, [0, 0.5])


SWEEPS = {
    "statistics": lambda loss: loss_statistics(loss, W, batched(DATA, 16)),
    "sweep": lambda loss: sparsity_sweep(lambda *args: {"loss": loss(*args)}, W, batched(DATA, 16), [0, 0.5]),
    "fine-tuned": lambda loss: finetuned_sweep(loss, W, batched(DATA, 16), [0, 0.5], num_steps=1),
    "evaluated": lambda loss: finetuned_sweep(
        mean_loss, W, batched(DATA, 16), [0], num_steps=1, metrics_fn=lambda *args: {"loss": loss(*args)}
    ),
}


@pytest.mark.parametrize("measured", SWEEPS)
def test_a_sum_that_is_0_at_the_weights_is_refused_where_values_are_asked(measured):
    with pytest.raises(ValueError, match="not a mean over the batch's examples"):
        SWEEPS[measured](drift(jnp.sum))


def test_values_that_are_tiny_or_0_at_the_weights():
    with pytest.raises(ValueError, match="not a mean over the batch's examples"):
        SWEEPS["statistics"](lambda *args: 1e-9 * summed(*args))
    found = SWEEPS["sweep"](lambda *args: 1e-9 * drift(jnp.mean)(*args)).metrics["loss"]
    assert found[0] == 0 < found[1]


def test_a_metric_that_is_no_number_somewhere_is_compared_elsewhere():
    def metrics(params, batch):
        known = jnp.where(jnp.any(params["a"] != 0), 1.0, jnp.nan)
        mean = mean_loss(params, batch)
        mean = mean**2 if len(batch["y"]) > 8 else mean  # a few examples do not give it away
        return {"loss": 100 * known * mean}

    for call in (
        lambda: sparsity_sweep(metrics, W, batched(DATA, 16), [0, 1]),
        lambda: finetuned_sweep(lambda *args: metrics(*args)["loss"], W, batched(DATA, 16), [0], num_steps=1),
    ):
        with pytest.raises(ValueError, match="same examples are cut into other batches"):
            call()


def test_a_penalty_is_named_where_one_is_found():
    with pytest.raises(ValueError, match="leave L1 / L2 terms out of the loss"):
        hessian(with_penalty, W, batched(DATA, 16))
    with pytest.raises(ValueError, match=r"evaluation mode\)\.$"):
        hessian(summed, W, batched(DATA, 16))


def test_a_loss_of_0_that_is_a_mean():
    curvature = hessian(drift(jnp.mean), W, batched(DATA, 16))
    assert curvature.loss == 0
    expected, _ = oracle(drift(jnp.mean), DATA)
    np.testing.assert_allclose(curvature.dense(), expected, atol=1e-5 * np.abs(expected).max())


def test_a_network_whose_gradient_is_rounding_is_no_fault():
    """Probabilities are 1 to the last digit, so that gradients are what rounding makes of them."""
    large = {"a": 4 * W["a"], "b": 25 * W["b"]}
    labels = {"x": X, "y": np.argmax(predict(large, X), 1)}
    curvature = hessian(mean_loss, large, batched(labels, 16))
    assert curvature.loss == pytest.approx(float(mean_loss(large, labels)), rel=1e-4)


@pytest.mark.parametrize(
    ("weight_fn", "message"),
    [
        (
            lambda b: -jnp.sum(b["mask"]),
            "finite number of at least 0 for every batch; it does not for batch 0",
        ),
        (lambda b: jnp.sum(b["mask"]) / 0, "finite number of at least 0"),
        (lambda b: 0 * jnp.sum(b["mask"]), "weight_fn is 0 for every batch"),
        (lambda b: b["mask"], "weight_fn must return a scalar"),
        (lambda b: None, "weight_fn must return a scalar for a batch; got a NoneType"),
        (lambda b: jnp.mean(b["mask"]), "not a mean over what weight_fn counts.*weight"),
        (lambda b: len(b["mask"]), "not a mean over what weight_fn counts"),
    ],
)
def test_unusable_weights(weight_fn, message):
    arrays = padded(16)
    with pytest.raises(ValueError, match=message):
        hessian(masked, W, batched(arrays, 16), weight_fn=weight_fn)
    if "counts" not in message:
        with pytest.raises(ValueError, match=message):
            loss_statistics(masked, W, batched(arrays, 16), weight_fn=weight_fn)


@pytest.mark.parametrize(
    ("weight_fn", "message"),
    [(2.0, "got a float"), (np.ones(3), "got an array"), (lambda p, b: 1.0, r"the signature \(p, b\)")],
)
def test_what_is_no_function_of_a_batch_is_no_weight(weight_fn, message):
    batches, asked = batched(DATA, 16), "weight_fn must be a function of a batch.*" + message
    for call in (
        lambda: hessian(mean_loss, W, batches, weight_fn=weight_fn),
        lambda: loss_statistics(mean_loss, W, batches, weight_fn=weight_fn),
        lambda: sparsity_sweep(mean_loss, W, batches, [0], weight_fn=weight_fn),
        lambda: finetuned_sweep(mean_loss, W, batches, [0], weight_fn=weight_fn),
    ):
        with pytest.raises(ValueError, match=asked):
            call()


# Batches that must keep their size.

STATE = jnp.asarray(RNG.standard_normal((11, 4)), jnp.float32)


def of_one_size(params, batch):
    """An initial state of a fixed size, which is what an exported function has, too."""
    hidden = jnp.tanh(STATE * 0 + batch["x"] @ params["a"])
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(hidden @ params["b"]), batch["y"][:, None], 1))


def normalised_of_one_size(params, batch):
    return normalised(params, batch) + 0 * jnp.sum(STATE * (batch["x"] @ params["a"]))


@cuts
def test_batches_of_a_fixed_size_are_not_cut(cut):
    expected, value = oracle(mean_loss, DATA)
    curvature = hessian(of_one_size, W, CUTS[cut](DATA, 11))
    assert curvature.loss == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(curvature.dense(), expected, atol=1e-5 * np.abs(expected).max())
    assert loss_statistics(of_one_size, W, CUTS[cut](DATA, 11)).mean == pytest.approx(value, rel=1e-5)
    with pytest.raises(ValueError, match="not a mean over the batch's examples"):
        hessian(normalised_of_one_size, W, CUTS[cut](DATA, 11))


def of_even_size(params, batch):
    """A sum, whose batches must divide over as many devices, say."""
    return summed(params, jax.tree.map(lambda x: x.reshape(-1, 11, *x.shape[1:]), batch))


def certain_metrics(params, batch):
    return {"loss": of_even_size(params, batch)}


CERTAIN = {
    "hessian": lambda batches: hessian(of_even_size, W, batches),
    "statistics": lambda batches: loss_statistics(of_even_size, W, batches),
    "sweep": lambda batches: sparsity_sweep(certain_metrics, W, batches, [0]),
    "fine-tuned": lambda batches: finetuned_sweep(of_even_size, W, batches, [0], num_steps=1),
    "evaluated": lambda batches: finetuned_sweep(
        mean_loss, W, batches, [0], num_steps=1, metrics_fn=certain_metrics
    ),
}


@pytest.mark.parametrize("cut", ["list", "stream"])
@pytest.mark.parametrize("asked", CERTAIN)
def test_a_sum_over_batches_of_certain_sizes_is_refused(asked, cut):
    with pytest.raises(ValueError, match="not a mean over the batch's examples"):
        CERTAIN[asked](CUTS[cut](DATA, 22))


@cuts
def test_values_of_batches_of_a_fixed_size_are_not_refused(cut):
    expected = oracle(mean_loss, DATA)[1]
    sweep = sparsity_sweep(lambda *args: {"loss": of_one_size(*args)}, W, CUTS[cut](DATA, 11), [0])
    assert sweep.metrics["loss"][0] == pytest.approx(expected, rel=1e-5)
    tuned = finetuned_sweep(of_one_size, W, CUTS[cut](DATA, 11), [0], num_steps=1, learning_rate=1e-9)
    assert tuned.metrics["loss"][0] == pytest.approx(expected, rel=1e-5)


# Precision.


class Half(nnx.Module):
    def __init__(self, rngs, dtype):
        self.first = nnx.Linear(3, 4, rngs=rngs, dtype=dtype)
        self.second = nnx.Linear(4, 2, rngs=rngs, dtype=dtype)

    def __call__(self, x):
        return self.second(jax.nn.relu(self.first(x))).astype(jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_modules_that_compute_in_half_precision(dtype):
    def use(kind, dtype):
        network, params = from_nnx(Half(nnx.Rngs(0), dtype))

        def loss(outputs, batch):
            return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(outputs), batch["y"][:, None], 1))

        def of_batch(p, b):
            return network(p, b["x"])

        if kind == "hessian":
            return hessian(lambda p, b: loss(of_batch(p, b), b), params, batched(DATA, 16))
        return gauss_newton(of_batch, loss, params, batched(DATA, 16))

    for kind in ("hessian", "gauss_newton"):
        with pytest.raises(ValueError, match=rf"computes in {jnp.dtype(dtype).name}.*dtype=jnp.float32"):
            use(kind, dtype)
        assert use(kind, jnp.float32).dim == 20


LOW = jnp.bfloat16
PRECISE = {
    "loss": lambda p, b: mean_loss(p, b).astype(jnp.float16),
    "loss and back": lambda p, b: jax.jit(mean_loss)(p, b).astype(LOW).astype(jnp.float32),
    "data": lambda p, b: mean_loss(p, b | {"x": b["x"].astype(LOW).astype(jnp.float32)}),
    "stopped": lambda p, b: mean_loss(p, b) + 0 * jax.lax.stop_gradient(jnp.mean(p["a"].astype(LOW))),
    "unused": lambda p, b: (mean_loss(p, b), jnp.mean(p["a"].astype(LOW)))[0],
    "prediction": lambda p, b: mean_loss(p, b) + 0 * jnp.mean(jnp.argmax(predict(p, b["x"]).astype(LOW), 1)),
}
COARSE = {
    "weights": lambda p, b: mean_loss(jax.tree.map(lambda x: x.astype(LOW).astype(jnp.float32), p), b),
    "activations": lambda p, b: jnp.mean(predict(p, b["x"]).astype(LOW).astype(jnp.float32) ** 2),
    "losses": lambda p, b: jnp.mean(losses(p, b).astype(jnp.float16)),
    "scaled loss": lambda p, b: mean_loss(p, b).astype(LOW) * 2,
    "checkpoint": lambda p, b: jnp.mean(jax.checkpoint(lambda x: x.astype(LOW) ** 2)(predict(p, b["x"]))),
    "scan": lambda p, b: jnp.mean(
        jax.lax.scan(
            lambda c, _: (jnp.tanh(c.astype(LOW)).astype(jnp.float32), None), b["x"] @ p["a"], length=2
        )[0]
    ),
    "late in a loop": lambda p, b: jax.lax.fori_loop(
        0, 2, lambda _, c: (c[1], mean_loss(p, b) + c[0].astype(LOW).astype(jnp.float32)), (0.0, 0.0)
    )[0],
    "branch": lambda p, b: jax.lax.cond(
        jnp.sum(b["y"]) > 0, lambda x: jnp.mean(x.astype(LOW)).astype(jnp.float32), jnp.mean, b["x"] @ p["a"]
    ),
    "rounded": lambda p, b: mean_loss(jax.tree.map(lambda x: jax.lax.reduce_precision(x, 8, 10), p), b),
}


@pytest.mark.parametrize("where", [*PRECISE, *COARSE])
def test_low_precision_on_the_way_from_the_weights_is_found(where):
    assert bool(trace_loss((PRECISE | COARSE)[where], W, DATA).coarse) == (where in COARSE)


@pytest.mark.parametrize("where", [*PRECISE, *COARSE])
def test_what_is_computed_in_few_bits_is_computed_in_float32(where, monkeypatch):
    """The oracle is the same loss, written in float32."""
    loss = (PRECISE | COARSE)[where]
    traced = jax.make_jaxpr(loss)(W, DATA)
    wide = widened(traced)
    monkeypatch.setattr(sys.modules[__name__], "LOW", jnp.float32)
    expected = mean_loss(W, DATA) if where in ("loss", "losses", "rounded") else loss(W, DATA)
    assert coarse_numbers(traced.jaxpr)
    assert coarse_numbers(wide.jaxpr) == set()
    assert float(
        jax.core.eval_jaxpr(wide.jaxpr, wide.consts, *jax.tree.leaves((W, DATA)))[0]
    ) == pytest.approx(float(expected), rel=1e-6)


def test_what_reads_single_bits_stays_in_few_bits():
    def loss(x):
        bits = jax.lax.bitcast_convert_type(x.astype(LOW), jnp.uint16)
        return jnp.sum(jax.lax.bitcast_convert_type(bits, LOW) * 3)

    x = jnp.asarray([1.001, 2.0])
    wide = widened(jax.make_jaxpr(loss)(x))
    assert coarse_numbers(wide.jaxpr) == {"bfloat16"}
    assert float(jax.core.eval_jaxpr(wide.jaxpr, wide.consts, x)[0]) == 9  # 1.001 is 1 in bfloat16


@pytest.mark.parametrize("measured", ["statistics", "sweep", "fine-tuned", "evaluated"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_small_fault_of_form_is_not_taken_for_rounding(measured, dtype):
    """(N, 1) against (N,) with labels near 4: another mean by half a part in a hundred."""

    def low(params, batch):
        x = predict(jax.tree.map(lambda w: w.astype(dtype), params), batch["x"].astype(dtype))
        return x, 4 + batch["y"].astype(dtype)

    def wrong(params, batch):
        x, y = low(params, batch)
        return jnp.mean((x[:, :1] - y) ** 2)

    def right(params, batch):
        x, y = low(params, batch)
        return jnp.mean((x[:, 0] - y) ** 2)

    errors = (predict(W, X)[:, 0, None] - 4 - Y) ** 2
    apart = abs(float(np.mean(errors) / np.mean(np.diagonal(errors))) - 1)
    assert 1e-3 < apart < 0.02
    with pytest.raises(ValueError, match="not a mean over the batch's examples"):
        SWEEPS[measured](wrong)
    SWEEPS[measured](right)


@pytest.mark.parametrize("loss", ["loss", "loss and back"])
def test_a_loss_that_is_cast_at_the_end_has_its_derivatives(loss):
    curvature = hessian(PRECISE[loss], W, list(batched(DATA, 16)))
    expected, value = oracle(mean_loss, DATA)
    assert curvature.loss == pytest.approx(value, rel=0.01)
    np.testing.assert_allclose(curvature.dense(), expected, atol=1e-5 * np.abs(expected).max())


def test_data_of_low_precision_are_fine():
    curvature = hessian(PRECISE["data"], W, batched(DATA, 16))
    expected, _ = oracle(mean_loss, DATA | {"x": np.asarray(jnp.asarray(X, LOW), np.float32)})
    np.testing.assert_allclose(curvature.dense(), expected, atol=1e-5 * np.abs(expected).max())


def test_the_rounding_of_products_is_measured():
    """Of products whose vectors are rounded to 10 or 12 binary digits, as TF32 does, or not at all."""
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((50, 50)).astype(np.float32)
    matrix += matrix.T
    weights = jnp.ones((10, 5))

    def rounded(digits):
        def matvec(vector):
            vector = jax.lax.reduce_precision(jnp.ravel(vector), 8, digits)
            return jnp.reshape(matrix @ vector, (10, 5))

        return matvec

    assert measured_rounding(rounded(23), weights) < 1e-6
    for digits in (12, 14, 16):
        assert 2.0 ** -(digits + 4) < measured_rounding(rounded(digits), weights) < 2.0**-digits
    with pytest.raises(ValueError, match=r"not linear.*TF32 or bfloat16.*precision=\"default\""):
        measured_rounding(rounded(7), weights)
    with pytest.raises(ValueError, match=r"not symmetric.*custom gradient"):
        measured_rounding(lambda v: jnp.reshape(np.triu(matrix) @ jnp.ravel(v), (10, 5)), weights)


def test_products_that_are_not_symmetric_make_no_matrix():
    matrix = np.random.default_rng(0).standard_normal((64, 64))

    def matmat(vectors):
        return jnp.einsum("ij,bjk->bik", jnp.asarray(matrix, jnp.float32), vectors)

    with pytest.raises(ValueError, match=r"not those of one symmetric matrix.*changes from pass to pass"):
        dense_matrix(matmat, np.ones((64, 1), np.float32))


def test_a_gradient_that_is_none():
    @jax.custom_jvp
    def through(x):
        return jnp.sign(x)

    through.defjvps(lambda tangent, _, x: tangent * jnp.roll(x, 1, axis=0) ** 2)

    def loss(params, batch):
        return mean_loss({"a": through(params["a"]), "b": params["b"]}, batch)

    curvature = hessian(loss, W, batched(DATA, 16))
    with pytest.raises(ValueError, match=r"not symmetric.*straight-through"):
        curvature.rounding  # noqa: B018
    assert 1e-7 < hessian(mean_loss, W, batched(DATA, 16)).rounding < 1e-6


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_metrics_of_half_precision_are_summed_in_single(dtype):
    """20,000 examples in batches of 32; the sum of their losses is far beyond float16."""
    rng = np.random.default_rng(2)
    arrays = {"x": rng.standard_normal((20_000, 3)).astype(np.float32), "y": rng.integers(0, 2, 20_000)}
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), W)

    def metrics(params, batch):
        logits = predict(params, jnp.asarray(batch["x"], dtype))
        right = (jnp.argmax(logits, 1) == batch["y"]).astype(dtype)
        return {
            "accuracy": jnp.mean(right),
            "loss": mean_loss(params, batch | {"x": batch["x"].astype(dtype)}),
        }

    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x = np.asarray(jnp.asarray(arrays["x"], dtype), np.float64)
    logits = np.tanh(x @ exact["a"]) @ exact["b"]
    expected = np.mean(np.argmax(logits, 1) == arrays["y"])
    loss = np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(20_000), arrays["y"]])
    sweep = sparsity_sweep(metrics, params, batched(arrays, 32), [0.0])
    assert sweep.metrics["accuracy"][0] == pytest.approx(expected, abs=0.01)
    assert sweep.metrics["loss"][0] == pytest.approx(loss, rel=0.02)
    found = loss_statistics(lambda p, b: metrics(p, b)["loss"], params, batched(arrays, 32))
    assert found.mean == pytest.approx(loss, rel=0.02)


def test_sums_are_single_precision_at_least():
    groups = grouped(batched(np.ones(60_000, np.float16), 600))
    total, count = ExampleSum(jnp.mean)(groups)
    assert (total.dtype, float(total), count) == (jnp.float32, 60_000, 60_000)
    total, weight = ExampleSum(jnp.mean, weight_fn=lambda x: jnp.sum(x, dtype=jnp.float16) / 2)(groups)
    assert (total.dtype, float(total), weight) == (jnp.float32, 30_000, 30_000)


def test_padding_on_eight_devices():
    """Each device has its own mean and its own weight; the oracle is one device, and NumPy for the loss."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-W", "error", masked_devices.__file__],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    expected = found["one device"]
    for values in found.values():
        assert "padding" in values.pop("refusal")
        np.testing.assert_allclose(values.pop("anew"), expected["product"], rtol=1e-4)
        for name, value in values.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-5, err_msg=name)
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((3, 2)).astype(np.float32)
    x = (rng.standard_normal((48, 3)).astype(np.float32) * np.linspace(1, 3, 48)[:, None])[:39]
    assert expected["loss"] == pytest.approx(np.sum(np.tanh(x @ weights) ** 2) / 39, rel=1e-5)
