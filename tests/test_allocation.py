"""Allocations over layers. Oracles: all allocations, or all subsets, of tiny problems; dense matrices."""

from itertools import combinations, product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlimit
from jaxlimit.baselines.masks import layer_counts
from jaxlimit.core.trees import flatten
from jaxlimit.curvature.makers import gauss_newton, hessian
from jaxlimit.geometry.magnitude import magnitude_mask
from jaxlimit.limits.allocation import LayerCosts, allocated_mask, layer_costs, uniform_mask

NO_ERROR = {"a": 0.0, "b": 0.0, "c": 0.0}


def layers(seed, sizes=(3, 4, 5)):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 1 + i, n) for i, (name, n) in enumerate(zip("abc", sizes, strict=True))}


def random_costs(seed):
    rng = np.random.default_rng(seed + 100)
    slope, curvature = ({name: float(rng.exponential()) for name in "abc"} for _ in range(2))
    return LayerCosts(slope, curvature, NO_ERROR)


def cost(weights, costs, kept):
    """The formula of the module, layer by layer, from the removed weights."""
    removed = {name: np.abs(w[~np.asarray(kept[name])]) for name, w in weights.items()}
    return sum(
        costs.slope[name] * c.sum() + costs.curvature[name] * (c**2).sum() / 2 for name, c in removed.items()
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_removed", [1, 4, 7, 11])
def test_no_allocation_is_cheaper(seed, num_removed):
    weights, costs = layers(seed), random_costs(seed)
    mask = allocated_mask(weights, costs, num_removed / 12)
    assert sum(int(np.sum(~np.asarray(m))) for m in mask.values()) == num_removed

    def smallest_removed(counts):
        kept = {name: np.ones(w.size, bool) for name, w in weights.items()}
        for (name, w), n in zip(weights.items(), counts, strict=True):
            kept[name][np.argsort(np.abs(w))[:n]] = False
        return kept

    every = (c for c in product(*(range(w.size + 1) for w in weights.values())) if sum(c) == num_removed)
    cheapest = min(cost(weights, costs, smallest_removed(counts)) for counts in every)
    assert cost(weights, costs, mask) == pytest.approx(cheapest, rel=1e-12)


def quadratic(curvatures, slopes):
    """A loss whose Hessian is a multiple of the identity in every layer, and its params."""

    def loss(params, batch):
        terms = [
            curvatures[name] * jnp.sum((params[name] - params[f"{name}0"]) ** 2) / 2
            - slopes[name] * jnp.sum(jnp.sign(params[f"{name}0"]) * (params[name] - params[f"{name}0"]))
            for name in curvatures
        ]
        return sum(terms) + 0 * jnp.mean(batch)

    return loss


def test_no_subset_is_cheaper_for_the_loss_itself(x64):
    """Where the assumption holds exactly, the mask is the best of all subsets, not only of allocations."""
    weights = layers(7, (2, 3, 4))
    curvatures, slopes = {"a": 9.0, "b": 2.0, "c": 0.5}, {"a": 0.1, "b": 0.0, "c": 0.7}
    loss = quadratic(curvatures, slopes)
    params = {k: jnp.asarray(v) for k, v in weights.items()} | {f"{k}0": v for k, v in weights.items()}
    curvature = hessian(loss, params, [jnp.ones((2, 1))], prunable=lambda path, _: len(path[-1].key) == 1)
    costs = layer_costs(curvature, jax.random.key(0), num_probes=2)
    prunable = {name: curvature.weights[name] for name in "abc"}

    def rise(removed):
        flat = flatten(prunable)
        flat[list(removed)] = 0
        parts = np.split(flat, [2, 5])
        return float(loss(params | dict(zip("abc", parts, strict=True)), jnp.ones((2, 1))))

    for name in "abc":
        assert costs.curvature[name] == pytest.approx(curvatures[name])
        # The loss falls along the signs, so it rises towards zero by the slope for each unit removed.
        assert costs.slope[name] == pytest.approx(slopes[name])
    kept = allocated_mask(
        prunable,
        LayerCosts(
            *(
                {name: tree[name] for name in "abc"}
                for tree in (costs.slope, costs.curvature, costs.curvature_error)
            )
        ),
        4 / 9,
    )
    removed = np.flatnonzero(flatten(kept) == 0)
    assert rise(removed) == pytest.approx(min(map(rise, combinations(range(9), 4))), rel=1e-9)


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_costs_of_a_network(kind, x64):
    """Means over 400 probes within 4 standard errors of the dense matrix; the slope from its definition."""
    rng = np.random.default_rng(0)
    params = {
        "hidden": {"kernel": jnp.asarray(rng.normal(0, 1, (4, 6))), "bias": jnp.zeros(6)},
        "out": {"kernel": jnp.asarray(rng.normal(0, 1, (6, 3))), "bias": jnp.zeros(3)},
    }
    data = rng.normal(0, 1, (30, 4)), rng.normal(0, 0.1, (30, 3))

    def predict(p, batch):
        return jnp.tanh(batch[0] @ p["hidden"]["kernel"]) @ p["out"]["kernel"]

    def squares(outputs, batch):
        return jnp.mean(jnp.sum((outputs - batch[1]) ** 2, -1))

    batches = jaxlimit.batched(data, 30)
    if kind == "hessian":
        curvature = hessian(lambda p, b: squares(predict(p, b), b), params, batches)
    else:
        curvature = gauss_newton(predict, squares, params, batches)
    costs = layer_costs(curvature, jax.random.key(1), num_probes=400)
    diagonal = np.split(np.diag(curvature.dense()), [24])
    gradients = jax.grad(lambda p: squares(predict(p, data), data))(params)
    for name, entries in zip(("hidden", "out"), diagonal, strict=True):
        error = costs.curvature_error[name]["kernel"]
        assert abs(costs.curvature[name]["kernel"] - entries.mean()) <= 4 * error
        assert error <= 0.1 * entries.mean()
        g, w = gradients[name]["kernel"], params[name]["kernel"]
        whole = float(-jnp.sum(g * w))  # the first-order cost of removing all of the layer
        assert costs.slope[name]["kernel"] * float(jnp.sum(jnp.abs(w))) == pytest.approx(max(whole, 0))


@pytest.mark.parametrize("sparsity", [0, 0.3, 0.5, 0.99, 1])
def test_equal_layers_give_the_global_magnitude_cut(sparsity):
    weights = layers(3)
    equal = LayerCosts(*(dict.fromkeys("abc", value) for value in (0.3, 2.0, 0.0)))
    mask, expected = allocated_mask(weights, equal, sparsity), magnitude_mask(weights, sparsity)
    assert all(np.array_equal(mask[name], expected[name]) for name in weights)


def test_a_flat_layer_goes_first():
    weights, flat = layers(4), LayerCosts(NO_ERROR, {"a": 1.0, "b": 0.0, "c": 1.0}, NO_ERROR)
    assert layer_counts(allocated_mask(weights, flat, 4 / 12)) == {"a": (3, 3), "b": (0, 4), "c": (5, 5)}


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.5, 0.77, 1.0])
def test_uniform(sparsity):
    weights = layers(5, (30, 41, 52))
    mask = uniform_mask(weights, sparsity)
    counts = layer_counts(mask)
    assert sum(kept for kept, _ in counts.values()) == 123 - int(np.floor(sparsity * 123 + 1e-9))
    for name, (kept, size) in counts.items():
        assert abs(size - kept - sparsity * size) <= 1
        removed, left = np.abs(weights[name])[~mask[name]], np.abs(weights[name])[mask[name]]
        assert not removed.size or not left.size or removed.max() <= left.min()


def test_bad_input(x64):
    def loss(w, x):
        return jnp.mean(x @ jnp.cos(w))

    curvature = hessian(loss, jnp.zeros((2, 1)) + 0.1, [jnp.ones((3, 2))])
    with pytest.raises(ValueError, match=r"mean curvature of .* is -0.995"):
        layer_costs(curvature, jax.random.key(0))
    with pytest.raises(ValueError, match="num_probes must be an integer of at least 2"):
        layer_costs(curvature, jax.random.key(0), num_probes=1)
    with pytest.raises(ValueError, match="sparsity must lie"):
        uniform_mask(layers(0), 1.5)
    with pytest.raises(ValueError, match="sparsity must lie"):
        allocated_mask(layers(0), random_costs(0), -0.1)


def test_arrays_without_entries_have_no_cost_and_no_share():
    weights = {"e": np.zeros((0, 3), np.float32), "w": np.arange(1.0, 5, dtype=np.float32).reshape(4, 1)}

    def loss(params, x):
        return jnp.mean((x @ params["w"]) ** 2) + 0 * jnp.sum(params["e"])

    curvature = hessian(loss, weights, [jnp.ones((3, 4))])
    costs = layer_costs(curvature, jax.random.key(0))
    assert costs.curvature["e"] == 0
    for mask in (uniform_mask(weights, 0.5), allocated_mask(weights, costs, 0.5)):
        assert mask["e"].shape == (0, 3)
        assert mask["w"].ravel().tolist() == [False, False, True, True]
