"""Pruned networks with readjusted weights.

Oracles: least squares and dense systems in NumPy for networks that are linear; the loss of the returned
parameters, written anew in NumPy, for all others.
"""

import itertools
import json
import math
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import linear, squared_error
from digits import trained
from flax import linen
from test_compilation import compilations

import jaxlimit
from jaxlimit import Attained, Pruned, Settings, attained_limit, batched, magnitude_mask, prune
from jaxlimit.limits.conjugate_gradients import iterates
from jaxlimit.models import from_linen
from jaxlimit.pruning.readjustable import Readjustable
from jaxlimit.pruning.result import Ending
from jaxlimit.pruning.windows import window

PAGE = (Path(__file__).parents[1] / "docs" / "prune.md").read_text()
ALL = Settings(curvature_share=1.0)


@pytest.fixture(scope="module")
def regression():
    """A linear network of 12 weights with noise, so that every weight that goes costs something."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((60, 12)).astype(np.float32)
    weights = rng.standard_normal((12, 1)).astype(np.float32)
    targets = inputs @ weights + 0.1 * rng.standard_normal((60, 1)).astype(np.float32)
    return weights, (inputs, targets.astype(np.float32))


def least_squares(arrays, kept):
    """Weights and loss of the best network on a support."""
    inputs, targets = (np.asarray(x, np.float64) for x in arrays)
    weights = np.zeros((inputs.shape[1], 1))
    weights[kept] = np.linalg.lstsq(inputs[:, kept], targets)[0]
    return weights, np.mean((inputs @ weights - targets) ** 2)


def test_conjugate_gradients_solve_the_damped_system_on_the_kept_coordinates(x64):
    rng = np.random.default_rng(1)
    root = rng.standard_normal((9, 9))
    matrix, gradient, kept = root @ root.T, rng.standard_normal(9), rng.random(9) < 0.6
    *_, found = itertools.islice(
        iterates(lambda v: jnp.asarray(matrix) @ v, jnp.asarray(-gradient), jnp.asarray(kept), 0.3), 30
    )
    damped = matrix[np.ix_(kept, kept)] + 0.3 * np.eye(kept.sum())
    expected = np.linalg.solve(damped, -gradient[kept])
    np.testing.assert_allclose(np.asarray(found.step)[kept], expected, rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(found.step)[~kept], 0)
    assert found.decrease == pytest.approx(-(gradient[kept] @ expected) / 2, rel=1e-9)


@pytest.mark.parametrize("batches", ["batched", "list", "stream", "function"])
def test_a_linear_network_becomes_the_least_squares_solution_on_its_support(regression, batches):
    weights, arrays = regression
    data = batched(arrays, 25)
    given = {"batched": data, "list": list(data), "stream": Stream(data), "function": lambda: iter(data)}
    network = prune(linear, squared_error, weights, given[batches], 0.5, settings=ALL)
    kept = np.asarray(network.mask).ravel()
    expected, loss = least_squares(arrays, kept)
    assert kept.sum() == 6
    assert network.sparsity == 0.5
    np.testing.assert_allclose(network.params, expected, atol=2e-3)
    assert network.loss == pytest.approx(loss, rel=1e-4)
    assert network.code is Ending.SETTLED


class Stream:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_float64(regression, x64):
    weights, arrays = (jax.tree.map(lambda x: np.asarray(x, np.float64), x) for x in regression)
    network = prune(linear, squared_error, weights, batched(arrays, 60), 0.75, settings=ALL)
    _, loss = least_squares(arrays, np.asarray(network.mask).ravel())
    assert network.params.dtype == np.float64
    assert network.loss == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("batches", ["list", "batched", "stream"])
def test_a_part_of_the_data_that_is_all_padding_is_passed_over(regression, batches):
    """Here the first quarter of the data: steps take a tenth each, so that the first had nothing to go by."""
    weights, (inputs, targets) = regression
    counts = np.ones(len(inputs), np.float32)
    padded = [np.concatenate([np.zeros_like(x[: len(x) // 3]), x]) for x in (inputs, targets, counts)]
    data = batched(tuple(padded), 2)
    given = {"batched": data, "list": list(data), "stream": Stream(data)}[batches]

    def loss(outputs, batch):
        squares = jnp.sum(batch[2] * jnp.sum((outputs - batch[1]) ** 2, axis=-1))
        return squares / jnp.maximum(jnp.sum(batch[2]), 1)

    network = prune(
        lambda params, batch: linear(params, batch[:2]),
        loss,
        weights,
        given,
        0.5,
        weight_fn=lambda batch: jnp.sum(batch[2]),
        max_products=60,
    )
    kept = np.asarray(network.mask).ravel()
    assert network.loss == pytest.approx(least_squares((inputs, targets), kept)[1], rel=0.05)


def test_a_mask_is_kept_to_the_letter(regression):
    weights, arrays = regression
    mask = np.tile([[True], [False], [False]], (4, 1))
    network = prune(linear, squared_error, weights, batched(arrays, 30), mask=mask)
    np.testing.assert_array_equal(np.asarray(network.params) != 0, mask)
    assert network.loss == pytest.approx(least_squares(arrays, mask.ravel())[1], rel=1e-3)


def test_scores_decide_which_weights_go(regression):
    weights, arrays = regression
    scores = np.arange(12.0, dtype=np.float32)[::-1].reshape(12, 1)
    network = prune(linear, squared_error, weights, batched(arrays, 30), 0.5, scores=scores)
    np.testing.assert_array_equal(np.asarray(network.mask).ravel(), np.arange(12) < 6)


def test_examples_count_as_much_as_weight_fn_says(regression):
    """Padded rows count for nothing: the solution is that of the rows that are none."""
    weights, (inputs, targets) = regression
    counts = np.ones((64, 1), np.float32)
    counts[60:] = 0
    padded = [np.concatenate([x, np.full((4, *x.shape[1:]), 7, np.float32)]) for x in (inputs, targets)]

    def loss(outputs, batch):
        return jnp.sum((outputs - batch[1]) ** 2 * batch[2]) / jnp.maximum(jnp.sum(batch[2]), 1)

    network = prune(
        linear, loss, weights, list(batched((*padded, counts), 32)), 0.5, weight_fn=lambda b: b[2].sum()
    )
    expected = least_squares((inputs, targets), np.asarray(network.mask).ravel())[1]
    assert network.loss == pytest.approx(expected, rel=1e-3)


def test_windows_follow_each_other_through_all_the_data(regression):
    weights, arrays = regression
    curvature = jaxlimit.gauss_newton(linear, squared_error, weights, list(batched(arrays, 5)))
    for share, size in ((0.25, 15), (0.5, 30)):
        parts = [window(curvature, share, number) for number in range(round(1 / share))]
        assert [part.num_examples for part in parts] == [size] * len(parts)
        seen = np.concatenate([np.concatenate(part.groups[0][0]) for part in parts])
        np.testing.assert_array_equal(seen, arrays[0])
        again = window(curvature, share, len(parts))
        np.testing.assert_array_equal(again.groups[0][0], parts[0].groups[0][0])
    stream = jaxlimit.gauss_newton(linear, squared_error, weights, Stream(batched(arrays, 5)))
    part = window(stream, 0.25, 1)
    assert (part.num_examples, part.total_weight) == (15, 15)
    np.testing.assert_array_equal(np.concatenate([g[0][0] for g in part.groups])[:5], arrays[0][5:10])
    assert window(stream, 1.0, 3) is stream


@pytest.mark.parametrize(
    ("share", "size", "parts"), [(0.1, 2048, 10), (0.25, 5120, 4), (0.4, 8192, 3), (0.01, 1024, 20)]
)
def test_a_share_of_one_large_batch_is_that_share(share, size, parts):
    inputs = np.arange(20_480, dtype=np.float32)[:, None] / 20_480
    weights = np.ones((1, 1), np.float32)
    curvature = jaxlimit.gauss_newton(linear, squared_error, weights, batched((inputs, 2 * inputs), 5))
    assert [len(batch) for batch, _ in curvature.groups] == [1]  # data in memory are cut anew
    found = [window(curvature, share, number) for number in range(parts)]
    assert [part.num_examples for part in found] == [size] * parts
    seen = np.unique(np.concatenate([part.groups[0][0][0] for part in found]))
    np.testing.assert_array_equal(seen, inputs[:, 0])
    np.testing.assert_array_equal(window(curvature, share, parts).groups[0][0], found[0].groups[0][0])


def predict(params, batch):
    hidden = jnp.tanh(batch[0] @ params["a"] + params["bias"])
    return hidden @ params["b"]


def cross_entropy(outputs, batch):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(outputs), batch[1][:, None], 1))


@pytest.fixture(scope="module")
def network():
    rng = np.random.default_rng(2)
    params = {
        "a": rng.standard_normal((6, 16)).astype(np.float32),
        "b": rng.standard_normal((16, 3)).astype(np.float32),
        "bias": np.zeros(16, np.float32),
    }
    inputs = rng.standard_normal((90, 6)).astype(np.float32)
    return params, (inputs, np.argmax(inputs[:, :3] * inputs[:, 3:], 1))


def loss_in_numpy(params, arrays):
    a, b, bias = (np.asarray(params[name], np.float64) for name in ("a", "b", "bias"))
    logits = np.tanh(arrays[0] @ a + bias) @ b
    logits -= logits.max(1, keepdims=True)
    chosen = logits[np.arange(len(logits)), arrays[1]]
    return np.mean(np.log(np.exp(logits).sum(1)) - chosen)


def test_the_loss_is_measured_and_lower_than_that_of_the_cut(network):
    params, arrays = network
    found = prune(predict, cross_entropy, params, batched(arrays, 30), 0.7)
    assert found.loss == pytest.approx(loss_in_numpy(found.params, arrays), rel=1e-5)
    assert found.dense_loss == pytest.approx(loss_in_numpy(params, arrays), rel=1e-5)
    weights = {"a": params["a"], "b": params["b"], "bias": None}
    cut = jaxlimit.apply_mask(params, magnitude_mask(weights, 0.7))
    assert found.loss < 0.8 * loss_in_numpy(cut, arrays)
    zeros = sum(int(np.sum(np.asarray(found.params[name]) == 0)) for name in "ab")
    assert zeros == int(0.7 * 144) == round(found.sparsity * 144)
    assert found.kept_share["['a']"] == np.mean(np.asarray(found.mask["a"]))


def test_other_parameters_move_only_if_they_are_trainable(network):
    params, arrays = network
    fixed = prune(predict, cross_entropy, params, batched(arrays, 30), 0.7)
    np.testing.assert_array_equal(fixed.params["bias"], params["bias"])
    moved = prune(predict, cross_entropy, params, batched(arrays, 30), 0.7, trainable=lambda *_: True)
    assert np.mean(np.asarray(moved.params["bias"]) != 0) > 0.5  # the others' units have no weights left
    assert moved.mask["bias"] is None
    assert moved.loss == pytest.approx(loss_in_numpy(moved.params, arrays), rel=1e-5)


def same_bits(one, other):
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in leaves)


class Stop(Exception):
    pass


def stopping_after(steps):
    counter = itertools.count(1)

    def progress(_):
        if next(counter) == steps:
            raise Stop

    return progress


@pytest.mark.parametrize("share", [1.0, 0.34])
def test_an_interrupted_path_goes_on_to_the_same_bits(network, tmp_path, share):
    params, arrays = network
    settings = Settings(curvature_share=0.34, gradient_share=share)
    call = (predict, cross_entropy, params, list(batched(arrays, 15)), 0.8)
    whole = prune(*call, settings=settings, max_products=60)
    told = []
    prune(*call, settings=settings, max_products=60, progress=told.append)
    assert len(told) > 6
    for steps in (2, len(told) - 1):
        folder = tmp_path / str(steps)
        with pytest.raises(Stop):
            prune(*call, settings=settings, checkpoint=folder, progress=stopping_after(steps))
        resumed = prune(*call, settings=settings, max_products=60, checkpoint=folder)
        assert same_bits(resumed.params, whole.params)
        assert resumed.to_json() == whole.to_json()


def test_steps_on_parts_of_the_data_cost_a_gradient_a_product_and_a_loss_of_their_part(network):
    params, arrays = network
    settings = Settings(step_products=1, curvature_share=0.2, gradient_share=0.5, damping=1.0)
    data, told = list(batched(arrays, len(arrays[0]) // 10)), []
    found = prune(predict, cross_entropy, params, data, 0.5, settings=settings, progress=told.append)
    costs = np.diff([0.5 + 0.2, *(x.num_products for x in told)])
    tries = (costs - 0.5 - 0.2) / (0.5 / 3)
    np.testing.assert_allclose(tries, np.round(tries), atol=1e-4)
    assert np.all(np.round(tries) >= 1)
    assert np.min(np.round(tries)) == 1
    assert found.loss < found.dense_loss * 2


def test_steps_on_parts_of_the_data_end_in_the_mean_of_the_last_ones(network, monkeypatch):
    params, arrays = network
    settings = Settings(curvature_share=0.34, gradient_share=0.34, stage_share=0.5)
    call = (predict, cross_entropy, params, list(batched(arrays, 15)), 0.3)
    told = []
    prune(*call, settings=settings, max_products=60, progress=told.append)
    after = [x.num_products for x in told[:3]]

    def weights(most):
        found = prune(*call, settings=settings, max_products=most - 1e-6).params
        return np.concatenate([np.ravel(found[name]) for name in ("a", "b")])

    averaged = weights(after[2])
    monkeypatch.setattr("jaxlimit.pruning.prune.AVERAGED", 1)
    last = [weights(most) for most in after]
    assert np.abs(last[2] - last[0]).max() > 1e-2
    np.testing.assert_allclose(averaged, np.mean(last, axis=0), rtol=1e-4, atol=1e-6)


def test_a_path_has_fewer_stages_where_each_keeps_less(network):
    params, arrays = network
    call = (predict, cross_entropy, params, list(batched(arrays, 30)), 0.9)

    def stages(share):
        told = []
        prune(*call, settings=Settings(stage_share=share), max_products=1, progress=told.append)
        return len(told)

    assert (stages(0.3), stages(0.8)) == (2, 11)


def test_loss_and_gradient_of_one_pass_are_those_of_two(network):
    params, arrays = network
    curvature = jaxlimit.gauss_newton(predict, cross_entropy, params, batched(arrays, 30))
    loss, gradient = curvature.loss_and_gradient
    np.testing.assert_allclose(loss, curvature.loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), gradient, curvature.gradient)


def test_a_checkpoint_of_another_problem_is_refused(network, tmp_path):
    params, arrays = network
    call = (predict, cross_entropy, params, batched(arrays, 30))
    prune(*call, 0.5, checkpoint=tmp_path, max_products=5)
    with pytest.raises(ValueError, match="num_removed differ"):
        prune(*call, 0.6, checkpoint=tmp_path, max_products=5)
    other = (predict, cross_entropy, params, batched((arrays[0] * 1.5, arrays[1]), 30))
    with pytest.raises(ValueError, match="of another problem"):
        prune(*other, 0.5, checkpoint=tmp_path, max_products=5)


@pytest.mark.parametrize(
    "call",
    [partial(prune, sparsity=0.5), partial(attained_limit, loss_tolerance=0.1)],
    ids=["prune", "attained"],
)
def test_a_checkpoint_of_other_prunable_or_moving_weights_is_refused(tmp_path, call):
    """Of the same shapes and numbers: only their names tell them apart."""

    def outputs(params, batch):
        return jnp.tanh(jnp.tanh(batch[0] @ params["a"]) @ params["b"] + params["c"] + params["d"])

    def distance(outputs, batch):
        return jnp.mean((outputs - batch[1]) ** 2)

    def only(name):
        return lambda path, _: path[0].key == name

    rng = np.random.default_rng(0)
    inputs, square = (rng.standard_normal(shape).astype(np.float32) for shape in ((20, 3), (3, 3)))
    params = {"a": square, "b": square, "c": np.zeros(3, np.float32), "d": np.zeros(3, np.float32)}
    call = partial(call, outputs, distance, params, batched((inputs, inputs), 10), max_products=5)
    call(prunable=only("a"), trainable=only("b"), checkpoint=tmp_path / "kernels")
    with pytest.raises(ValueError, match="prunable differ"):
        call(prunable=only("b"), trainable=only("a"), checkpoint=tmp_path / "kernels")
    call(prunable=only("a"), trainable=only("c"), checkpoint=tmp_path / "biases")
    with pytest.raises(ValueError, match="moving differ"):
        call(prunable=only("a"), trainable=only("d"), checkpoint=tmp_path / "biases")


def test_more_products_lower_the_loss_and_the_status_says_what_ended_it(network):
    params, arrays = network
    call = (predict, cross_entropy, params, batched(arrays, 30), 0.8)
    few, many = (prune(*call, max_products=most) for most in (60, 600))
    assert few.code is Ending.OUT_OF_PRODUCTS
    assert "max_products" in few.status
    assert many.loss < few.loss
    assert 60 <= few.num_products < 60 + 1 + 4 * (20 + 1)
    assert "sparsity 0.7986" in repr(few)


def test_steps_after_the_first_compile_nothing(network):
    params, arrays = network
    call = (predict, cross_entropy, params, batched(arrays, 90))
    prune(*call, 0.8, max_products=20, settings=ALL)
    with compilations() as found:
        prune(*call, 0.9, max_products=60, settings=ALL)
    assert found == [0]


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({}, "either a sparsity or a mask"),
        ({"sparsity": 0.5, "mask": {"a": 1}}, "either a sparsity or a mask"),
        ({"sparsity": 1.5}, r"sparsity must lie in \[0, 1\]"),
        ({"sparsity": [0.5, 0.6]}, "one number"),
        ({"sparsity": 0.5, "max_products": 0}, "max_products"),
        ({"mask": {"a": np.ones((6, 16)), "b": np.ones((16, 3)), "bias": None}}, "mask must hold bools"),
        ({"mask": {"a": np.ones((6, 2), bool), "b": np.ones((16, 3), bool)}}, "mask must hold bools"),
        ({"sparsity": 0.5, "scores": {"a": np.ones(3)}}, "scores must have the shapes"),
    ],
)
def test_what_cannot_be_meant_is_refused(network, keywords, words):
    params, arrays = network
    with pytest.raises(ValueError, match=words):
        prune(predict, cross_entropy, params, batched(arrays, 30), **keywords)


@pytest.mark.parametrize(
    "field", ["curvature_share", "gradient_share", "step_products", "stage_share", "damping"]
)
def test_settings_out_of_range_are_refused(field):
    with pytest.raises(ValueError, match=field):
        Settings(**{field: 0})


def test_a_summed_loss_is_refused(network):
    params, arrays = network
    with pytest.raises(ValueError, match="mean"):
        prune(predict, lambda o, b: 30 * cross_entropy(o, b) * len(o), params, batched(arrays, 30), 0.5)


def test_a_loss_that_is_not_finite_after_the_cut_is_told(regression):
    weights, arrays = regression

    def divided(outputs, batch):
        return jnp.mean((outputs / outputs - batch[1]) ** 2)

    network = prune(linear, divided, weights, batched(arrays, 30), 1.0)
    assert network.code is Ending.NOT_FINITE
    assert network.to_json()["loss"] is None


def test_a_linen_network_with_batch_norm(network):
    """Its statistics are held; the network is not ours."""

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.BatchNorm(use_running_average=True)(linen.Dense(16)(x))
            return linen.Dense(3)(jnp.tanh(x))

    _, arrays = network
    variables = Net().init(jax.random.key(0), arrays[0][:1])
    apply, params = from_linen(Net(), variables)
    found = prune(lambda p, b: apply(p, b[0]), cross_entropy, params, batched(arrays, 30), 0.5)
    assert found.loss < found.dense_loss  # it was never trained
    assert found.loss == pytest.approx(float(cross_entropy(apply(found.params, arrays[0]), arrays)), rel=1e-5)


def test_results_are_read_back_from_json():
    """Also where a loss was not finite; what is something else is refused."""
    numbers = {"dense_loss": 0.5, "num_products": 2.5, "status": "settled."}
    code, kept = Ending.SETTLED, {"w": 0.5}
    network = Pruned(None, None, 0.5, math.inf, num_steps=3, code=code, kept_share=kept, **numbers)
    tried = ((0.2, 0.6), (0.5, math.nan))
    found = Attained(0.5, network, tried, 0.1, 0.01, unpruned_loss=None, code=Ending.BRACKETED, **numbers)
    text = json.dumps(found.to_json(), allow_nan=False)
    again = Attained.from_json(json.loads(text))
    assert json.dumps(again.to_json()) == text
    assert (again.code, again.pruned.code, again.tried[0]) == (found.code, network.code, (0.2, 0.6))
    assert math.isnan(again.pruned.loss)
    for cls, values in ((Pruned, found), (Attained, network)):
        with pytest.raises(ValueError, match=f"these are not the values of {cls.__name__}: KeyError"):
            cls.from_json(values.to_json())
    with pytest.raises(ValueError, match="not the values of Pruned: ValueError: 'done' is not"):
        Pruned.from_json({**network.to_json(), "code": "done"})


@pytest.mark.slow
def test_the_example_of_the_documentation_runs(capsys):
    """After two epochs it prints the same words about other numbers."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL))
    assert "epochs=60" in code
    names = {}
    exec(compile(code.replace("epochs=60", "epochs=2"), "prune.md", "exec"), names)
    found = capsys.readouterr().out
    assert re.search(r"^Attained sparsity 0\.\d{4} for a loss increase of ", found)
    assert "Pruned network of sparsity 0.8999: loss" in found
    assert np.mean(names["model"].first.kernel[...] == 0) > 0.5
    assert not np.allclose(names["network"].params["norm"]["mean"], names["params"]["norm"]["mean"])


# The limit that is attained.


def attained(regression, **keywords):
    weights, arrays = regression
    scores = np.abs(weights)
    return attained_limit(
        linear, squared_error, weights, batched(arrays, 60), scores=scores, settings=ALL, **keywords
    )


@pytest.mark.parametrize("rise", [0.005, 0.3, 1.5, 100.0])
def test_the_sparsest_linear_network_within_the_tolerance(regression, rise):
    """In an order that is fixed the supports are nested: brute force over all of them knows the answer."""
    weights, arrays = regression
    order = np.argsort(np.abs(weights.ravel()))
    losses = [least_squares(arrays, np.sort(order[n:]))[1] for n in range(13)]
    dense = float(np.mean((arrays[0] @ weights - arrays[1]) ** 2))
    expected = max(n for n, loss in enumerate(losses) if loss <= dense + rise)
    found = attained(regression, loss_tolerance=rise)
    assert found.sparsity == expected / 12
    assert found.code is Ending.BRACKETED
    assert found.pruned.loss <= found.dense_loss + rise
    assert found.unpruned_loss == pytest.approx(losses[0], rel=1e-3)
    tried = {0.0: found.dense_loss, **dict(found.tried)}
    assert tried[found.sparsity] == pytest.approx(found.pruned.loss, rel=1e-5)
    assert expected == 12 or tried[(expected + 1) / 12] > dense + rise


def test_near_1_the_search_goes_on_until_a_network_fails():
    """One weight of 40 is needed: .975, however coarse the tolerance."""
    rng = np.random.default_rng(0)
    inputs, weights = rng.standard_normal((120, 40)), 1e-6 * rng.standard_normal((40, 1))
    weights[17] = 1.0
    arrays = inputs, inputs @ weights
    found = attained(
        (weights.astype(np.float32), tuple(x.astype(np.float32) for x in arrays)),
        loss_tolerance=0.1,
        tolerance=0.2,
        unpruned=False,
    )
    assert found.sparsity == 0.975
    assert found.tried[-1][1] > 0.1
    assert "at 1.0000 the loss did not come within" in found.status


def test_digits_are_pruned_further_than_the_cut_and_the_network_is_the_proof():
    net = trained("preset")

    def output_loss(outputs, batch):
        return cross_entropy(outputs, batch)

    found = attained_limit(
        lambda p, b: net.predict(p, b[0]),
        output_loss,
        net.params,
        net.batches,
        loss_tolerance=net.tolerance,
        unpruned=False,
    )
    # The cut alone is within the tolerance up to .85, 400 steps of Adam reach .915 (README).
    assert found.sparsity > 0.915
    arrays = net.batches.arrays
    loss = float(net.loss(found.pruned.params, arrays))
    assert loss <= float(net.loss(net.params, arrays)) + net.tolerance
    assert found.pruned.sparsity == found.sparsity
    assert max(s for s, loss in found.tried if loss <= found.dense_loss + net.tolerance) == found.sparsity


@pytest.mark.parametrize(("distrusted", "sparsity"), [(True, 1.0), (False, 0.0)])
def test_a_step_that_was_cut_short_ends_no_network(regression, monkeypatch, distrusted, sparsity):
    """The first step of a network gains nearly nothing, the second all.

    Where the first one was shortened because the quadratic model was wrong, the second one is made. Where the
    model was right, there is nothing more to gain.
    """

    def step(problem, point, mask):
        first = point.loss > 9
        damping = point.damping * (4 if distrusted and first else 1)
        loss = 9.0 if first else 0.0
        return point._replace(loss=loss, fall=point.loss - loss, damping=damping, number=point.number + 1)

    monkeypatch.setattr(Readjustable, "cut", lambda problem, point, mask: point._replace(loss=9.1, fall=0.0))
    monkeypatch.setattr(Readjustable, "step", step)
    weights, arrays = regression
    found = attained_limit(
        linear, squared_error, weights, [arrays], loss_tolerance=0.1, tolerance=0.1, unpruned=False
    )
    assert found.sparsity == sparsity


@pytest.mark.parametrize(
    ("labels", "most", "share", "first"),
    [(None, 1, 0.8, [2, 1, 2]), (np.arange(12)[:, None] // 2, 2, 0.8, [2]), (None, 4, 0.34, [7, 3, 7])],
    ids=["weights", "pairs", "large stages"],
)
def test_a_network_that_failed_is_tried_again_from_nearer_ones(
    regression, monkeypatch, labels, most, share, first
):
    """So many weights can be reached at once, and never more than 8 of 12."""
    weights, arrays = regression

    def cut(problem, point, mask):
        before, after = np.sum(point.weights == 0), np.sum(~np.asarray(mask))
        within = after - before <= most and after <= 8
        return point._replace(weights=point.weights * mask, loss=0.0 if within else 9.0, fall=0.0)

    def step(problem, point, mask):  # of no avail
        return point._replace(number=point.number + 1)

    monkeypatch.setattr(Readjustable, "cut", cut)
    monkeypatch.setattr(Readjustable, "step", step)
    keywords = {"loss_tolerance": 0.1, "tolerance": 0.01, "groups": labels, "unpruned": False}
    settings = Settings(stage_share=share)
    found = attained_limit(linear, squared_error, weights, [arrays], settings=settings, **keywords)
    assert [round(12 * sparsity) for sparsity, _ in found.tried][: len(first)] == first
    assert found.sparsity == 8 / 12
    assert found.code is Ending.BRACKETED
    beyond = 10 if labels is not None else 9
    assert found.tried[-1] == (beyond / 12, 9.0)
    assert f"at {beyond / 12:.4f} the loss did not come" in found.status


def test_an_interrupted_search_goes_on_to_the_same_bits(network, tmp_path):
    params, arrays = network
    call = (predict, cross_entropy, params, list(batched(arrays, 10)))
    told = []
    keywords = {"loss_tolerance": 0.05, "tolerance": 0.02, "max_products": 150}
    whole = attained_limit(*call, **keywords, progress=told.append)
    assert {x.stage for x in told} == {"search", "unpruned"}
    for steps in (2, len(told) - 1):
        folder = tmp_path / str(steps)
        with pytest.raises(Stop):
            attained_limit(*call, **keywords, checkpoint=folder, progress=stopping_after(steps))
        resumed = attained_limit(*call, **keywords, checkpoint=folder)
        assert resumed.to_json() == whole.to_json()
        assert same_bits(resumed.pruned.params, whole.pruned.params)


@pytest.mark.parametrize("search", [attained_limit, prune])
def test_a_first_step_that_was_far_too_long_ends_no_training(network, search):
    """Without damping the first steps of the network that is not pruned go where the model is wrong."""
    params, arrays = network
    far = jax.tree.map(lambda x: 8 * x, params)
    call = (predict, cross_entropy, far, batched(arrays, 30))
    settings = Settings(damping=1e-9)
    if search is prune:
        reached = prune(*call, 0.0, max_products=200, settings=settings).loss
    else:
        reached = attained_limit(
            *call, loss_tolerance=1e-3, max_products=200, settings=settings
        ).unpruned_loss
    dense = float(cross_entropy(predict(far, arrays), arrays))
    assert reached < 0.7 * dense


def test_a_budget_that_ends_the_search_is_told(network):
    params, arrays = network
    call = (predict, cross_entropy, params, batched(arrays, 30))
    found = attained_limit(*call, loss_tolerance=0.05, max_products=2, unpruned=False)
    assert found.code is Ending.OUT_OF_PRODUCTS
    assert "budget" in found.status
    assert found.unpruned_loss is None
    assert found.pruned.loss <= found.dense_loss + 0.05


@pytest.mark.parametrize("keywords", [{"loss_tolerance": 0.0}, {"loss_tolerance": 0.1, "tolerance": 0.0}])
def test_tolerances_that_cannot_be_meant_are_refused(network, keywords):
    params, arrays = network
    with pytest.raises(ValueError, match="tolerance"):
        attained_limit(predict, cross_entropy, params, batched(arrays, 30), **keywords)


@pytest.mark.parametrize(("num_batches", "share"), [(10, 0.6), (10, 0.3), (19, 0.1), (7, 0.25)])
def test_every_batch_is_in_a_window(num_batches, share):
    inputs = np.arange(num_batches, dtype=np.float32)[:, None]
    data = list(batched((inputs, inputs), 1))  # of arrays in memory the batches are cut anew
    curvature = jaxlimit.gauss_newton(linear, squared_error, np.ones((1, 1), np.float32), data)
    windows = [window(curvature, share, number).groups[0][0] for number in range(math.ceil(1 / share) + 1)]
    assert len({x.shape for x in windows}) == 1
    assert np.unique(np.concatenate([np.ravel(x) for x in windows])).tolist() == list(range(num_batches))


def test_batches_of_several_sizes_take_turns():
    """Padded texts come in a few lengths, each too seldom for a share of its own."""
    data = [(np.full((n, 1), n, np.float32), np.zeros((n, 1), np.float32)) for n in (40, 41, 42, 3)]
    curvature = jaxlimit.gauss_newton(linear, squared_error, np.ones((1, 1), np.float32), data)
    seen = {float(np.max(window(curvature, 0.1, number).groups[0][0])) for number in range(6)}
    assert seen == {40, 41, 42}  # three examples do not stand for all


def test_a_network_whose_loss_is_nan_is_not_attained():
    """Of all weights removed, the direction w / |w| is 0 / 0."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((32, 4)).astype(np.float32)
    weights = np.array([[1.0], [0.1], [0.2], [0.3]], np.float32)

    def predict(w, batch):
        return batch[0] @ (w / jnp.linalg.norm(w))

    data = batched((inputs, np.asarray(predict(weights, (inputs,)))), 32)
    found = attained_limit(predict, squared_error, weights, data, loss_tolerance=9.0)
    assert found.sparsity == 0.75
    assert np.isfinite(found.pruned.loss)


@pytest.mark.parametrize("seed", range(4))
def test_a_tolerance_of_few_bits_is_the_number_that_it_is(seed):
    """The sum with the loss was rounded to its bits: near 2 to steps of 1/64 in bfloat16."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((40, 1)).astype(np.float32)
    inputs = rng.standard_normal((200, 40)).astype(np.float32)
    data = batched((inputs, inputs @ weights + 1.5 * rng.standard_normal((200, 1)).astype(np.float32)), 200)
    limit = partial(attained_limit, linear, squared_error, weights, data, unpruned=False)
    coarse = limit(loss_tolerance=jnp.bfloat16(0.01))
    assert coarse.pruned.loss <= coarse.dense_loss + float(jnp.bfloat16(0.01))
    assert coarse.sparsity == limit(loss_tolerance=float(jnp.bfloat16(0.01))).sparsity


@pytest.mark.parametrize("call", ["prune", "attained_limit"])
def test_a_loss_that_differs_in_curvature_alone_is_another_problem(tmp_path, call):
    """A term that is 0 at the trained network, as of distillation."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((6, 2)).astype(np.float32)
    inputs = rng.standard_normal((64, 6)).astype(np.float32)
    dense = inputs @ weights
    data = batched((inputs, dense + 0.5 * rng.standard_normal(dense.shape).astype(np.float32), dense), 64)

    def run(share):
        def loss(outputs, batch):
            return squared_error(outputs, batch[:2]) + share * jnp.mean((outputs - batch[2]) ** 2)

        question = {"sparsity": 0.6} if call == "prune" else {"loss_tolerance": 0.5}
        return getattr(jaxlimit, call)(linear, loss, weights, data, checkpoint=tmp_path / "work", **question)

    run(0.0)
    with pytest.raises(ValueError, match="another problem"):
        run(100.0)


def test_a_loss_that_is_infinite_on_other_data_than_the_last_step_s_is_told():
    inputs, targets = np.ones((8192, 3), np.float32), np.zeros((8192, 1), np.float32)
    inputs[4096:, 0], inputs[:4096, 1:], targets[:4096] = (
        0,
        0,
        1,
    )  # the first half reads the first weight only
    data = [(inputs[:4096], targets[:4096]), (inputs[4096:], targets[4096:])]

    def loss(outputs, batch):
        return jnp.mean(jnp.where(batch[1] > 0, -jnp.log(jnp.abs(outputs)), outputs**2))

    weights = np.array([[0.1], [0.5], [0.6]], np.float32)
    settings = Settings(gradient_share=0.5, curvature_share=0.5)
    found = prune(linear, loss, weights, data, 1 / 3, settings=settings)
    assert found.loss == np.inf
    assert found.code is Ending.NOT_FINITE
    assert "the loss is inf" in found.status


def test_what_has_no_effect_is_refused(regression):
    weights, arrays = regression
    data, call = batched(arrays, 60), partial(prune, linear, squared_error)
    with pytest.raises(ValueError, match="takes scores and groups with a sparsity"):
        call(weights, data, mask=np.abs(weights) > 0.1, scores=weights)
    with pytest.raises(ValueError, match="trainable chooses nothing that can move"):
        call(weights, data, 0.5, trainable=lambda path, _: "bias" in str(path))
    with pytest.raises(ValueError, match="max_products must be a positive finite number, got inf"):
        call(weights, data, 0.5, max_products=math.inf)
