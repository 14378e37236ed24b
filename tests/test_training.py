"""Training against stochastic gradient descent written out in NumPy, and against closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.special import log_softmax, softmax

from jaxlimit.core.trees import flatten
from jaxlimit.models import FullyConnected, from_nnx
from jaxlimit.training import (
    classification_loss,
    classification_metrics,
    cross_entropy,
    l1_norm,
    steps_per_epoch,
    train,
    train_model,
)
from jaxlimit.training.group_lasso import group_lasso_of


def linear(params, inputs):
    return inputs @ params["kernel"] + params["bias"]


def problem(num_examples: int = 11, dtype=np.float32):
    """A linear softmax model on random data: params, (inputs, labels)."""
    random = np.random.default_rng(0)
    params = {"kernel": random.normal(size=(4, 3)).astype(dtype), "bias": np.array([0, 0.5, -1], dtype)}
    inputs = random.normal(size=(num_examples, 4)).astype(dtype)
    return params, (inputs, random.integers(0, 3, size=num_examples))


def sgd_in_numpy(params, arrays, orders, *, batch_size, rates, momentum, l1, weight_decay=0.0, keep=True):
    """The update rule in float64, with the gradient of softmax regression by hand; also the epoch means."""
    kernel, bias = np.where(keep, np.float64(params["kernel"]), 0), np.float64(params["bias"])
    kernel_momentum, bias_momentum = np.zeros_like(kernel), np.zeros_like(bias)
    step, epoch_means = 0, []
    for order in orders:
        total = 0.0
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            inputs, labels = np.float64(arrays[0][chosen]), arrays[1][chosen]
            logits = inputs @ kernel + bias
            loss = -log_softmax(logits, axis=1)[np.arange(len(chosen)), labels].mean()
            total += len(chosen) * (loss + l1 * (np.abs(kernel).sum() + np.abs(bias).sum()))
            slope = (softmax(logits, axis=1) - np.eye(3)[labels]) / len(chosen)
            kernel_slope = inputs.T @ slope + l1 * np.sign(kernel) + weight_decay * kernel
            bias_slope = slope.sum(0) + l1 * np.sign(bias) + weight_decay * bias
            kernel_momentum = momentum * kernel_momentum + kernel_slope
            bias_momentum = momentum * bias_momentum + bias_slope
            kernel = np.where(keep, kernel - rates(step) * kernel_momentum, 0)
            bias = bias - rates(step) * bias_momentum
            step += 1
        epoch_means.append(total / len(order))
    return {"kernel": kernel, "bias": bias}, epoch_means


def halved_after_two(step):
    """A learning rate over updates that any precision represents exactly."""
    return jnp.where(step < 2, 0.125, 0.0625)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("batch_size", "momentum", "l1", "rate"),
    [
        (11, 0.0, 0.0, 0.1),
        (11, 0.9, 0.05, 0.1),
        (4, 0.9, 0.0, 0.1),
        (4, 0.9, 0.05, halved_after_two),
        (1, 0.5, 0.05, 0.1),
        (100, 0.9, 0.05, halved_after_two),
    ],
)
def test_training_equals_sgd_written_in_numpy(dtype, batch_size, momentum, l1, rate):
    with jax.enable_x64(dtype is np.float64):
        params, arrays = problem(dtype=dtype)
        key, epochs = jax.random.key(5), 3
        orders = [np.asarray(jax.random.permutation(jax.random.fold_in(key, e), 11)) for e in range(epochs)]
        means = []
        trained = train(
            classification_loss(linear),
            params,
            arrays,
            key,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=rate,
            momentum=momentum,
            l1=l1,
            on_epoch=lambda epoch, mean: means.append((epoch, mean)),
        )
        expected, expected_means = sgd_in_numpy(
            params,
            arrays,
            orders,
            batch_size=batch_size,
            rates=lambda step: float(rate(step)) if callable(rate) else rate,
            momentum=momentum,
            l1=l1,
        )
        tolerance = 200 * np.finfo(dtype).eps
        for name, leaf in trained.items():
            assert leaf.dtype == dtype
            np.testing.assert_allclose(leaf, expected[name], rtol=tolerance, atol=tolerance)
        assert [epoch for epoch, _ in means] == [0, 1, 2]
        np.testing.assert_allclose([mean for _, mean in means], expected_means, rtol=tolerance)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weight_decay_and_a_mask_equal_sgd_written_in_numpy(dtype):
    """In NumPy the mask is put on again after each update, whatever that did to the weights."""
    with jax.enable_x64(dtype is np.float64):
        params, arrays = problem(dtype=dtype)
        keep = np.random.default_rng(1).random((4, 3)) < 0.5
        settings = {"batch_size": 4, "momentum": 0.9, "l1": 0.01, "weight_decay": 0.1}
        key, epochs = jax.random.key(5), 3
        mask = {"kernel": keep, "bias": None}
        loss = classification_loss(linear)
        trained = train(loss, params, arrays, key, epochs=epochs, learning_rate=0.1, mask=mask, **settings)
        orders = [np.asarray(jax.random.permutation(jax.random.fold_in(key, e), 11)) for e in range(epochs)]
        expected, _ = sgd_in_numpy(params, arrays, orders, rates=lambda step: 0.1, keep=keep, **settings)
        tolerance = 200 * np.finfo(dtype).eps
        for name, leaf in trained.items():
            np.testing.assert_allclose(leaf, expected[name], rtol=tolerance, atol=tolerance)
        assert not np.asarray(trained["kernel"])[~keep].any()


def test_every_example_is_seen_once_an_epoch_the_uneven_last_batch_included():
    """The loss <w, mean of one-hot rows> has gradient 1/b for the b examples of a batch, whatever w is."""

    def pick(weights, one_hot):
        return jnp.mean(one_hot @ weights)

    def weights_after(epochs):
        return train(
            pick,
            jnp.zeros(11),
            jnp.eye(11),
            jax.random.key(0),
            epochs=epochs,
            batch_size=4,
            learning_rate=1.0,
            momentum=0.0,
        )

    first, both = weights_after(1), weights_after(2)
    np.testing.assert_allclose(np.sort(-first), [1 / 4] * 8 + [1 / 3] * 3, rtol=1e-6)
    np.testing.assert_allclose(np.sort(first - both), [1 / 4] * 8 + [1 / 3] * 3, rtol=1e-6)
    assert not np.allclose(first, both - first)  # the second epoch has another order


@pytest.mark.parametrize(("num_examples", "traces"), [(12, 1), (11, 2), (3, 1)])
def test_later_epochs_do_not_trace_the_loss_again(num_examples, traces):
    """One trace for the full batches and one for a remainder, weakly typed parameters or not."""
    params, arrays = problem(num_examples)
    loss, count, counts = classification_loss(linear), 0, []

    def counting(params, batch):
        nonlocal count
        count += 1
        return loss(params, batch)

    params["kernel"] = jnp.broadcast_to(jnp.asarray(0.5), (4, 3))
    assert params["kernel"].weak_type
    train(
        counting,
        params,
        arrays,
        jax.random.key(0),
        epochs=4,
        batch_size=4,
        learning_rate=optax.constant_schedule(0.1),
        on_epoch=lambda *_: counts.append(count),
    )
    assert counts == [traces] * 4


def test_same_key_same_bits_other_key_others():
    params, arrays = problem()

    def run(seed):
        return train(
            classification_loss(linear),
            params,
            arrays,
            jax.random.key(seed),
            epochs=2,
            batch_size=4,
            learning_rate=0.1,
        )

    first, again, other = run(0), run(0), run(1)
    for name in params:
        np.testing.assert_array_equal(first[name], again[name])
        assert (first[name] != other[name]).any()


def test_the_start_is_left_as_it_is():
    """The epochs donate their state; the caller's arrays must survive, also one array under two names."""
    shared = jnp.ones(3)
    params = {"kernel": jnp.ones((4, 3)), "bias": shared, "unused": shared}
    _, arrays = problem()
    trained = train(
        classification_loss(linear), params, arrays, jax.random.key(0), epochs=2, learning_rate=0.1
    )
    np.testing.assert_array_equal(shared, np.ones(3))
    np.testing.assert_array_equal(params["kernel"], np.ones((4, 3)))
    np.testing.assert_array_equal(trained["unused"], np.ones(3))


def test_l1_term_reaches_the_soft_threshold():
    """The minimum of mean (w - x)^2 / 2 + l1 |w| is sign(m) max(|m| - l1, 0), m the mean of x.

    Around the kink of |w| the iterates step by no more than learning_rate * l1 * 10 with momentum .9.
    """
    means = np.array([2.0, -1.5, 0.2, -0.1])
    data = means + np.random.default_rng(0).normal(size=(20, 4))
    data += means - data.mean(0)
    trained = train(
        lambda weights, batch: jnp.mean(jnp.sum((weights - batch) ** 2, -1)) / 2,
        jnp.ones(4),
        data,
        jax.random.key(0),
        epochs=3000,
        batch_size=20,
        learning_rate=1e-3,
        l1=0.5,
    )
    expected = np.sign(means) * np.maximum(np.abs(means) - 0.5, 0)
    np.testing.assert_allclose(trained[:2], expected[:2], atol=1e-4)
    np.testing.assert_allclose(trained[2:], expected[2:], atol=1e-3 * 0.5 * 10)


def test_l1_training_of_a_network_lowers_its_norm_and_still_fits():
    predict, params = from_nnx(FullyConnected([4, 16, 3], rngs=nnx.Rngs(0)))
    inputs = jax.random.normal(jax.random.key(1), (200, 4))
    arrays = (inputs, (inputs[:, 0] > 0).astype(int) + (inputs[:, 1] > 0))
    dense, sparse = (
        train(
            classification_loss(predict),
            params,
            arrays,
            jax.random.key(2),
            epochs=40,
            batch_size=64,
            learning_rate=0.1,
            l1=l1,
        )
        for l1 in (0.0, 5e-3)
    )
    assert l1_norm(sparse) < 0.7 * l1_norm(dense)
    metrics = jax.jit(classification_metrics(predict))
    assert metrics(params, arrays)["accuracy"] < 0.6
    assert metrics(dense, arrays)["accuracy"] > 0.9
    assert metrics(sparse, arrays)["accuracy"] > 0.9


def test_group_lasso_reaches_the_soft_thresholded_groups():
    """Of |w - a|^2 / 2 the minimum is a_g max(0, 1 - lambda sqrt(n_g) / ||a_g||), group by group."""
    means = {"a": jnp.array([[3.0, 0.2], [4.0, -0.1]]), "b": jnp.array([[1.0, 2.0, 0.1]])}
    labels = {"a": jnp.array([[7, 3], [7, 3]]), "b": jnp.array([[3, 9, 9]])}
    found = train(
        lambda w, _: sum(jnp.sum((w[name] - means[name]) ** 2) for name in means) / 2,
        means,
        jnp.zeros(1),
        jax.random.key(0),
        epochs=400,
        batch_size=1,
        learning_rate=0.01,
        group_lasso=0.6,
        groups=labels,
    )
    flat, numbers = flatten(means), flatten(labels)
    for label in (3, 7, 9):
        of_group = flat[numbers == label]
        expected = of_group * max(0, 1 - 0.6 * np.sqrt(len(of_group)) / np.linalg.norm(of_group))
        # A group that goes to zero swings around it by a step of the descent.
        at = 1e-3 if expected.any() else 0.1
        np.testing.assert_allclose(flatten(found)[numbers == label], expected, atol=at)
    whole = 0.6 * sum(
        np.sqrt(np.sum(numbers == label)) * np.linalg.norm(flat[numbers == label]) for label in (3, 7, 9)
    )
    term = group_lasso_of(means, 0.6, labels)
    assert term is not None
    assert float(term(means)) == pytest.approx(whole, rel=1e-6)
    assert not flatten(jax.grad(term)(jax.tree.map(jnp.zeros_like, means))).any()


def test_group_lasso_of_a_model_is_that_of_its_function():
    model = FullyConnected([4, 6, 3], rngs=nnx.Rngs(0))
    predict, params = from_nnx(model)
    arrays = jax.random.normal(jax.random.key(1), (40, 4)), jnp.arange(40) % 3
    keywords = {"epochs": 1, "batch_size": 40, "learning_rate": 0.1, "group_lasso": 1e-2}
    keywords |= {"groups": "input_channels"}
    by_function = train(classification_loss(predict), params, arrays, jax.random.key(2), **keywords)
    by_model = from_nnx(train_model(model, arrays, jax.random.key(2), **keywords))[1]
    np.testing.assert_array_equal(flatten(by_function), flatten(by_model))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"group_lasso": 0.1}, "has no groups to act on: give groups"),
        ({"group_lasso": -1.0, "groups": "output_channels"}, "group_lasso"),
        ({"group_lasso": 0.1, "groups": "channels"}, "groups must be"),
    ],
)
def test_a_group_lasso_without_groups_is_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        train(
            lambda w, _: jnp.sum(w),
            jnp.ones((2, 2)),
            jnp.zeros(1),
            jax.random.key(0),
            epochs=1,
            learning_rate=1.0,
            **keywords,
        )


def test_a_checkpoint_knows_its_loss(tmp_path):
    """Two losses of the same arrays: the weights of one are not those of the other."""
    call = partial(
        train,
        params=jnp.ones(3),
        arrays=jnp.ones((4, 3)),
        key=jax.random.key(0),
        epochs=1,
        learning_rate=0.1,
        checkpoint=tmp_path,
    )
    first = call(lambda w, x: jnp.mean((x @ w) ** 2))
    with pytest.raises(ValueError, match="of another problem: loss differ"):
        call(lambda w, x: jnp.mean((x @ w - 1) ** 2))
    np.testing.assert_array_equal(call(lambda w, x: jnp.mean((x @ w) ** 2)), first)


def test_a_checkpoint_knows_its_group_lasso(tmp_path):
    def trained(strength):
        keywords = {"epochs": 1, "learning_rate": 0.1, "groups": "output_channels", "checkpoint": tmp_path}
        loss, start = lambda w, _: jnp.sum(w**2), jnp.full((2, 2), 100.0)
        train(loss, start, jnp.zeros(1), jax.random.key(0), group_lasso=strength, **keywords)

    trained(1e-6)
    with pytest.raises(ValueError, match="group_lasso"):
        trained(2e-6)


def test_l1_norm_counts_every_parameter_and_keeps_its_dtype():
    tree = {
        "kernel": jnp.array([[1.0, -2.0], [0.0, 3.0]]),
        "scale": jnp.array([-1.0]),
        "shift": jnp.array(-0.5),
    }
    assert float(l1_norm(tree)) == 7.5
    with jax.enable_x64(True):
        assert l1_norm(tree).dtype == np.float32
    gradient = jax.grad(l1_norm)(tree)
    np.testing.assert_array_equal(gradient["kernel"], [[1, -1], [0, 1]])
    np.testing.assert_array_equal(gradient["scale"], [-1])


def test_loss_and_metrics_equal_numpy():
    params, (inputs, labels) = problem(50)
    logits = inputs @ params["kernel"] + params["bias"]
    loss = -log_softmax(logits, axis=1)[np.arange(50), labels].mean()
    accuracy = np.mean(logits.argmax(1) == labels)
    batch = (jnp.asarray(inputs), jnp.asarray(labels))
    metrics = classification_metrics(linear)(params, batch)
    assert metrics.keys() == {"loss", "accuracy"}
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], accuracy, rtol=1e-6)
    np.testing.assert_allclose(classification_loss(linear)(params, batch), loss, rtol=1e-5)
    np.testing.assert_allclose(cross_entropy(jnp.asarray(logits), batch[1]), loss, rtol=1e-5)


@pytest.mark.parametrize(
    "labels", [jnp.zeros(3), jnp.zeros((3, 1), int), jnp.zeros(4, int)], ids=["floating", "column", "length"]
)
def test_bad_labels_are_refused(labels):
    with pytest.raises(
        ValueError, match=r"labels must be integers of shape \(3,\) for logits of shape \(3, 2\), got"
    ):
        cross_entropy(jnp.zeros((3, 2)), labels)


@pytest.mark.parametrize(
    ("num_examples", "batch_size", "steps"), [(1438, 128, 12), (128, 128, 1), (129, 128, 2), (5, 128, 1)]
)
def test_steps_per_epoch(num_examples, batch_size, steps):
    assert steps_per_epoch(num_examples, batch_size) == steps


@pytest.mark.parametrize(
    ("num_examples", "batch_size", "name"), [(0, 1, "num_examples"), (5, 0, "batch_size")]
)
def test_steps_per_epoch_refuses_zero(num_examples, batch_size, name):
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
        steps_per_epoch(num_examples, batch_size)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epochs": 0}, r"epochs must be an integer of at least 1, got 0"),
        ({"epochs": 1.5}, r"epochs must be an integer of at least 1, got 1\.5"),
        ({"batch_size": 0}, r"batch_size must be an integer of at least 1, got 0"),
        (
            {"learning_rate": 0.0},
            r"learning_rate must be finite and above 0, or an optax schedule .*, got 0\.0",
        ),
        ({"learning_rate": np.nan}, r"learning_rate must be finite and above 0, .*, got nan"),
        ({"momentum": 1.0}, r"momentum must be at least 0 and below 1, got 1\.0"),
        ({"momentum": -0.1}, r"momentum must be at least 0 and below 1, got -0\.1"),
        ({"l1": -1e-4}, r"l1 must be finite and at least 0, got -0\.0001"),
        ({"l1": np.inf}, r"l1 must be finite and at least 0, got inf"),
        ({"weight_decay": -0.1}, r"weight_decay must be finite and at least 0, got -0\.1"),
        (
            {"mask": {"kernel": np.ones(3, bool), "bias": None}},
            r"mask has a leaf of shape \(3,\) where params",
        ),
        ({"arrays": ()}, r"arrays must hold at least one array, got \(\)"),
        (
            {"arrays": (np.ones((0, 4)), np.ones(0, int))},
            r"leading axis of 1 or more examples, got arrays\[0\] of",
        ),
        ({"arrays": (np.ones((5, 4)), np.ones(6, int))}, r"\(5, 4\), arrays\[1\] of shape \(6,\)"),
        ({"arrays": (np.ones((5, 4)), 1.0)}, r"arrays\[1\] of shape \(\)"),
        (
            {"arrays": (np.full((5, 4), np.inf), np.ones(5, int))},
            r"arrays must be finite, got .* in arrays\[0\]",
        ),
        ({"params": {}}, r"params must hold at least one array, got \{\}"),
        ({"params": {"bias": np.array([np.nan])}}, r"params must be finite, got .* in params\['bias'\]"),
        (
            {"params": {"bias": np.arange(3)}},
            r"params must be floating arrays, got int32 in params\['bias'\]",
        ),
    ],
)
def test_bad_input_is_refused_before_any_tracing(changed, message):
    params, arrays = problem()
    arguments = {"params": params, "arrays": arrays, "epochs": 1, "learning_rate": 0.1, **changed}

    def never(params, batch):
        raise AssertionError("the loss was traced")

    with pytest.raises(ValueError, match=message):
        train(never, key=jax.random.key(0), **arguments)


@pytest.mark.parametrize("epoch", [0, 2])
def test_divergence_names_the_epoch_and_a_remedy(epoch):
    """A schedule that is infinite from one update on makes the parameters infinite in just that epoch."""
    params, arrays = problem()
    with pytest.raises(
        FloatingPointError, match=rf"diverged in epoch {epoch} .*infinite or NaN; lower learning_rate"
    ):
        train(
            classification_loss(linear),
            params,
            arrays,
            jax.random.key(0),
            epochs=4,
            batch_size=11,
            learning_rate=lambda step: jnp.where(step < epoch, 0.1, jnp.inf),
        )


def test_divergence_of_the_loss_alone_is_found():
    """The loss log |w| is infinite at 0; its gradient is stopped, so that the parameter stays finite."""
    with pytest.raises(FloatingPointError, match=r"mean loss -inf, parameters finite"):
        train(
            lambda weight, batch: jnp.log(jnp.abs(jax.lax.stop_gradient(weight))) + jnp.sum(batch) * weight,
            jnp.array(0.0),
            jnp.ones(3),
            jax.random.key(0),
            epochs=1,
            learning_rate=0.1,
        )


def test_arrays_with_other_columns_are_another_training(tmp_path):
    """Where the start gives the same loss to both, as zeros do."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((40, 3)).astype(np.float32)
    labels = (inputs[:, 0] > 0).astype(np.float32)

    def run(inputs):
        return train(
            lambda w, batch: jnp.mean(jnp.logaddexp(0, batch[0] @ w) - batch[1] * (batch[0] @ w)),
            jnp.zeros(3),
            (inputs, labels),
            jax.random.key(0),
            epochs=2,
            batch_size=8,
            learning_rate=0.5,
            checkpoint=tmp_path / "work",
        )

    run(inputs)
    with pytest.raises(ValueError, match="another"):
        run(inputs[:, ::-1].copy())


def test_an_epoch_of_half_precision_is_summed_in_float32():
    """40,000 losses of 3 are beyond float16."""
    seen = []
    train(
        lambda w, batch: (jnp.sum(w * 0) + 3).astype(jnp.float16) + 0 * jnp.mean(batch),
        jnp.ones(2, jnp.float16),
        np.ones((40_000, 1), np.float16),
        jax.random.key(0),
        epochs=1,
        batch_size=10_000,
        learning_rate=0.1,
        on_epoch=lambda epoch, loss: seen.append(loss),
    )
    assert seen == [3]


@pytest.mark.parametrize(
    ("loss", "message"), [(lambda w, x: x @ w, "scalar"), (lambda w, x: (0.0, x), "scalar")]
)
def test_a_loss_that_is_no_scalar_is_refused(loss, message):
    with pytest.raises(ValueError, match=message):
        train(
            loss,
            jnp.ones(2),
            np.ones((8, 2), np.float32),
            jax.random.key(0),
            epochs=1,
            batch_size=4,
            learning_rate=0.1,
        )
