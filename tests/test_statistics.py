"""Running statistics of batch norm along a path of masks.

Oracle: mean and variance of the hidden units over all inputs, anew in NumPy from the returned weights.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlimit import assess, attained_limit, batched, prune
from jaxlimit.pruning.result import Ending


def predict(params, batch):
    hidden = (batch[0] @ params["a"] - params["mean"]) / jnp.sqrt(params["var"] + 1e-5)
    return jax.nn.relu(params["scale"] * hidden + params["shift"]) @ params["b"]


def cross_entropy(outputs, batch):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(outputs), batch[1][:, None], 1))


def in_numpy(params, inputs):
    """The statistics that batch norm has in training."""
    hidden = np.asarray(inputs, np.float64) @ np.asarray(params["a"], np.float64)
    return {"mean": hidden.mean(0), "var": hidden.var(0)}


@pytest.fixture(scope="module")
def network():
    """Inputs with a mean, so that every weight that goes shifts the hidden units."""
    rng = np.random.default_rng(0)
    inputs = (rng.standard_normal((90, 6)) + 3.0).astype(np.float32)
    labels = np.argmax((inputs[:, :3] - 3) * (inputs[:, 3:] - 3), 1)
    params = {
        "a": rng.standard_normal((6, 24)).astype(np.float32),
        "b": rng.standard_normal((24, 3)).astype(np.float32),
        "scale": np.ones(24, np.float32),
        "shift": np.zeros(24, np.float32),
    }
    params |= {name: x.astype(np.float32) for name, x in in_numpy(params, inputs).items()}
    return params, (inputs, labels)


@pytest.fixture(scope="module")
def anew(network):
    inputs = jnp.asarray(network[1][0])

    @jax.jit
    def statistics_fn(params):
        hidden = inputs @ params["a"]
        return params | {"mean": hidden.mean(0), "var": hidden.var(0)}

    return statistics_fn


def called(network):
    params, arrays = network
    return predict, cross_entropy, params, list(batched(arrays, 15))


def same_bits(one, other):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


def num_zeros(params):
    return sum(int(np.sum(np.asarray(params[name]) == 0)) for name in "ab")


@pytest.mark.parametrize("trainable", [(), ("scale", "shift")])
def test_the_statistics_are_those_of_the_network_after_its_last_cut(network, anew, trainable):
    params, (inputs, labels) = network
    seen, told = [], []

    def recorded(params):
        seen.append(params)
        return anew(params)

    found = prune(
        *called(network),
        0.8,
        statistics_fn=recorded,
        trainable=(lambda path, _: path[-1].key in trainable) if trainable else None,
        progress=told.append,
    )
    cuts = sorted({round(216 * x.sparsity) for x in told})
    assert [num_zeros(x) for x in seen] == [0, *cuts]
    for name, expected in in_numpy(seen[-1], inputs).items():
        np.testing.assert_allclose(found.params[name], expected, rtol=1e-4, atol=1e-4)
    assert not np.allclose(found.params["mean"], params["mean"], atol=0.1)
    for name in ("scale", "shift"):
        assert np.array_equal(found.params[name], params[name]) != (name in trainable)
    outputs = predict(found.params, (inputs, labels))
    assert found.loss == pytest.approx(float(cross_entropy(outputs, (inputs, labels))), rel=1e-5)


def test_without_the_function_they_are_held(network):
    held = prune(*called(network), 0.8, max_products=10)
    for name in ("mean", "var"):
        np.testing.assert_array_equal(held.params[name], network[0][name])


class Stop(Exception):
    pass


@pytest.mark.parametrize("search", [False, True])
def test_interrupted_work_goes_on_to_the_same_bits(network, anew, tmp_path, search):
    call = called(network)

    def work(**keywords):
        if search:
            keywords |= {"loss_tolerance": 0.3, "tolerance": 0.05}
            return attained_limit(*call, statistics_fn=anew, max_products=60, **keywords).pruned
        return prune(*call, 0.8, statistics_fn=anew, max_products=60, **keywords)

    told = []
    whole = work(progress=told.append)
    for steps in (3, len(told) - 1):
        counter = itertools.count(1)

        def stopping(_, counter=counter, steps=steps):
            if next(counter) == steps:
                raise Stop

        with pytest.raises(Stop):
            work(progress=stopping, checkpoint=tmp_path / str(steps))
        resumed = work(checkpoint=tmp_path / str(steps))
        assert same_bits(resumed.params, whole.params)


def test_what_is_attained_has_the_statistics_of_its_cut_and_its_loss_is_the_proof(network, anew):
    params, (inputs, labels) = network
    found = attained_limit(*called(network), loss_tolerance=0.3, statistics_fn=anew, unpruned=False)
    loss = float(cross_entropy(predict(found.pruned.params, (inputs, labels)), (inputs, labels)))
    assert found.code is Ending.BRACKETED
    assert found.pruned.loss == pytest.approx(loss, rel=1e-5)
    assert loss <= found.dense_loss + 0.3
    assert not np.allclose(found.pruned.params["mean"], params["mean"], atol=0.1)


def test_a_checkpoint_with_other_statistics_is_refused(network, anew, tmp_path):
    call = called(network)
    prune(*call, 0.5, max_products=3, statistics_fn=anew, checkpoint=tmp_path)
    for other in (None, lambda params: anew(params) | {"var": 2 * params["var"]}):
        with pytest.raises(ValueError, match="statistics differ"):
            prune(*call, 0.5, max_products=3, statistics_fn=other, checkpoint=tmp_path)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ({"mean": 0.0}, "statistics_fn must be a function"),
        (lambda params, batch: params, "signature"),
        (lambda params: {"mean": params["mean"]}, "all of them"),
        (lambda params: params | {"var": params["var"][:3]}, "float32\\[3\\]"),
        (lambda params: params | {"mean": params["mean"].astype(jnp.float16)}, "float16"),
        (lambda params: params | {"a": 2 * params["a"]}, r"changes \['a'\]"),
    ],
)
def test_functions_that_do_something_else_are_refused(network, function, words):
    with pytest.raises(ValueError, match=words):
        prune(*called(network), 0.5, statistics_fn=function)


def test_networks_are_certified_with_their_own_statistics(network, anew, tmp_path):
    """Each network on the way is tested as it was built, not with the dense one's statistics."""
    params, (inputs, labels) = network
    test = inputs[::-1][:40] + np.float32(0.1), labels[::-1][:40]

    def assessed(**given):
        return assess(
            predict,
            cross_entropy,
            params,
            batched((inputs, labels), 90),
            jax.random.key(0),
            loss_tolerance=0.05,
            test_batches=[test],
            error_rise=0.5,
            curvatures=["gauss_newton"],
            max_products=60,
            **given,
        )

    found = assessed(statistics_fn=anew, out=tmp_path / "anew")
    pruned, certificate = found.attained.pruned.params, found.certificate
    assert not np.allclose(pruned["mean"], params["mean"], atol=1e-3)
    wrong = [np.mean(np.argmax(predict(p, test), 1) != test[1]) for p in (pruned, params)]
    assert certificate.sparsities[-1] == found.attained.sparsity
    assert certificate.means[-1] == pytest.approx(wrong[0] - wrong[1])
    assert found.attained_error == pytest.approx(wrong[0])
    with pytest.raises(ValueError, match="statistics"):
        assessed(out=tmp_path / "anew")
