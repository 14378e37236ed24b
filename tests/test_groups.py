"""Limits of groups against brute force over every number of groups, from a dense Hessian of JAX in float64.

Brute force sorts (root mean square, first index) pairs, removes one group after the other, evaluates the four
functions everywhere and applies their definitions. It knows nothing of orders, counts, bisection or Lanczos.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import linear, make_mlp, squared_error
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from scipy.optimize import brentq

from jaxlimit import (
    PruningLimit,
    Settings,
    apply_mask,
    assess,
    attained_limit,
    batched,
    finetuned_sweep,
    gauss_newton,
    hessian,
    magnitude_mask,
    predicted_loss,
    prune,
    pruning_limit,
    removed_norm,
    sparsity_sweep,
)
from jaxlimit.core.trees import combine, flatten, partition
from jaxlimit.geometry.groups import axis_labels, group_labels, head_labels
from jaxlimit.geometry.magnitude import magnitude_order
from jaxlimit.limits.problem import Problem
from jaxlimit.limits.width import width_limit
from jaxlimit.spectrum.bracket import SpectralBracket
from jaxlimit.spectrum.measure import SpectralMeasure


def groups_in_order(ranking, labels):
    """Indices of the weights of each group, in the order in which groups go."""
    members = {}
    for index, label in enumerate(labels):
        members.setdefault(int(label), []).append(index)
    rms = {label: np.sqrt(np.mean(np.square(ranking[at]))) for label, at in members.items()}
    return [members[label] for label in sorted(members, key=lambda x: (rms[x], members[x][0]))]


class BruteForce:
    """The four functions after n groups, from H, g and w."""

    def __init__(self, matrix, gradient, weights, labels, scores=None):
        ranking = weights if scores is None else scores
        self.matrix, self.gradient, self.weights = matrix, gradient, weights
        values, vectors = np.linalg.eigh(matrix)
        self.values, self.absolute = np.abs(values), (vectors * np.abs(values)) @ vectors.T
        self.vectors, self.removed = vectors, [np.zeros(0, int)]
        for at in groups_in_order(ranking, labels):
            self.removed.append(np.concatenate([self.removed[-1], at]).astype(int))

    @property
    def sparsities(self):
        return [len(at) / len(self.weights) for at in self.removed]

    def c(self, n):
        removed = np.zeros_like(self.weights)
        removed[self.removed[n]] = self.weights[self.removed[n]]
        return removed

    def loss(self, n):
        c = self.c(n)
        return c @ self.matrix @ c / 2 - self.gradient @ c

    def minimum(self, n):
        c, kept = self.c(n), np.setdiff1d(np.arange(len(self.weights)), self.removed[n])
        x = np.zeros_like(c)
        x[kept] = np.linalg.lstsq(self.absolute[np.ix_(kept, kept)], (self.absolute @ c)[kept])[0]
        return (c - x) @ self.absolute @ (c - x) / 2

    def dimension(self, ridge):
        return np.mean(ridge / (ridge + self.values))

    def width(self, n, eps):
        squared = np.sum(self.c(n) ** 2)
        return 1.0 if squared == 0 else self.dimension(2 * eps / squared)

    def cone(self, n, eps):
        along = (self.vectors.T @ self.c(n)) ** 2
        if np.sum(along * self.values) <= 2 * eps:
            return 1.0

        def excess(log):
            a = np.exp(log)
            return np.sum(a * self.values / (self.values + a) * along) - 2 * eps

        return self.dimension(np.exp(brentq(excess, -60, 60, xtol=1e-12)))

    def limits(self, eps):
        s, every = self.sparsities, range(len(self.removed))
        beyond = [n for n in every if self.loss(n) > eps]
        return {
            "one_shot": s[beyond[0] - 1] if beyond else 1.0,
            "width": s[max(n for n in every if self.width(n, eps) >= s[n])],
            "cone": s[max(n for n in every if self.cone(n, eps) >= s[n])],
            "readjusted": s[max(n for n in every if self.minimum(n) <= eps)],
        }


LABELS = {
    "output_channels": "output_channels",
    "input_channels": "input_channels",
    "blocks": ("blocks", (2, 2)),
    "coupled": {  # a hidden unit: what leads into it, and what leads out of it
        "hidden": {"kernel": np.tile(np.arange(5), (4, 1)), "bias": None},
        "out": {"kernel": np.tile(np.arange(5)[:, None], (1, 3)), "bias": None},
    },
    "unequal": {
        "hidden": {"kernel": -np.minimum(np.arange(20), 9).reshape(4, 5), "bias": None},
        "out": {"kernel": 10**12 + np.arange(15, dtype=np.int64).reshape(5, 3) // 8, "bias": None},
    },
    "one": {
        "hidden": {"kernel": np.zeros((4, 5), int), "bias": None},
        "out": {"kernel": np.zeros((5, 3), int), "bias": None},
    },
}


@pytest.fixture(scope="module")
def network():
    """4-5-3 in float64 with its dense Hessian and Gauss-Newton matrix, of the full batch."""
    with jax.enable_x64(True):
        mlp = make_mlp(np.float64)
        weights, rest = partition(mlp.params)
        flat, unravel = ravel_pytree(weights)

        def loss(vector):
            return mlp.loss(combine(unravel(vector), rest), mlp.arrays)

        def outputs(vector):
            return mlp.predict(combine(unravel(vector), rest), mlp.arrays)

        jacobian = jax.jacobian(outputs)(flat)
        curved = jax.hessian(lambda z: mlp.output_loss(z, mlp.arrays))(outputs(flat))
        positive = jnp.einsum("abi,abcd,cdj->ij", jacobian, curved, jacobian)
        batches = batched(mlp.arrays, 5)
        curvatures = {
            "hessian": (hessian(mlp.loss, mlp.params, batches), np.asarray(jax.hessian(loss)(flat))),
            "gauss_newton": (
                gauss_newton(mlp.predict, mlp.output_loss, mlp.params, batches),
                np.asarray(positive),
            ),
        }
        return curvatures, np.asarray(jax.grad(loss)(flat)), np.asarray(flat), unravel


def brute_force(network, kind, groups, scores=None):
    curvatures, gradient, weights, unravel = network
    labels = group_labels(unravel(weights), groups)
    return BruteForce(curvatures[kind][1], gradient, weights, flatten(labels), scores)


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_all_limits_are_those_of_brute_force_over_groups(network, x64, kind, name):
    curvature, truth = network[0][kind][0], brute_force(network, kind, LABELS[name])
    reachable = np.array(truth.sparsities)
    for eps in (0.003, 0.05, 0.5):
        limit = pruning_limit(curvature, jax.random.key(0), loss_tolerance=eps, groups=LABELS[name])
        assert limit.method == "dense eigendecomposition"
        assert limit.num_groups == len(reachable) - 1
        expected = truth.limits(eps)
        assert {key: x.value for key, x in limit.estimates().items()} == expected
        for estimate in limit.estimates().values():
            assert estimate.lower in reachable
            assert estimate.upper in reachable
            assert estimate.lower <= estimate.value <= estimate.upper
        sensitivity = limit.sensitivity([eps])
        assert sensitivity.width[0] == expected["width"]
        assert sensitivity.cone[0] == expected["cone"]


def test_scores_decide_the_order_by_their_root_mean_square(network, x64):
    curvature, scores = network[0]["hessian"][0], np.random.default_rng(3).normal(size=35)
    truth = brute_force(network, "hessian", LABELS["unequal"], scores)
    keywords = {"scores": network[3](scores), "groups": LABELS["unequal"]}
    limit = pruning_limit(curvature, jax.random.key(0), loss_tolerance=0.1, **keywords)
    assert {key: x.value for key, x in limit.estimates().items()} == truth.limits(0.1)


def test_every_weight_in_a_group_of_its_own_is_no_group(network, x64):
    curvature = network[0]["hessian"][0]
    labels = {
        "hidden": {"kernel": np.arange(20).reshape(4, 5), "bias": None},
        "out": {"kernel": np.arange(20, 35).reshape(5, 3), "bias": None},
    }
    args = curvature, jax.random.key(0)
    assert pruning_limit(*args, loss_tolerance=0.1, groups=labels).to_json() == (
        pruning_limit(*args, loss_tolerance=0.1).to_json()
    )


@pytest.mark.parametrize("name", ["output_channels", "coupled", "unequal"])
def test_limits_from_products_are_those_of_brute_force(network, x64, name):
    """All Lanczos steps of each probe: what is left is the probes' error, which the interval contains."""
    curvature, truth = network[0]["gauss_newton"][0], brute_force(network, "gauss_newton", LABELS[name])
    for eps in (0.003, 0.05):
        keywords = {"num_probes": 40, "groups": LABELS[name]}
        limit = pruning_limit(curvature, jax.random.key(0), loss_tolerance=eps, **keywords)
        assert limit.method == "Lanczos"
        expected = truth.limits(eps)
        assert limit.one_shot.value == expected["one_shot"]
        assert limit.readjusted.value == expected["readjusted"]
        for key, estimate in limit.estimates().items():
            assert estimate.lower <= expected[key] <= estimate.upper, key
            assert {estimate.lower, estimate.value, estimate.upper} <= set(truth.sparsities)


def test_the_true_rises_and_the_curve_are_those_of_the_masks(network, x64):
    curvature = network[0]["hessian"][0]
    limit = pruning_limit(curvature, jax.random.key(0), loss_tolerance=0.05, groups="output_channels")
    order = magnitude_order(curvature.weights, groups="output_channels")
    for name, estimate in limit.estimates().items():
        mask = magnitude_mask(curvature.weights, estimate.value, groups="output_channels")
        np.testing.assert_array_equal(
            flatten(mask), flatten(order.mask(order.within(round(estimate.value * 35))))
        )
        assert np.mean(flatten(mask) == 0) == pytest.approx(estimate.value, abs=1e-15)
        assert limit.rises[name] == pytest.approx(predicted_loss(curvature, mask).rise, abs=1e-12)
    truth = brute_force(network, "hessian", "output_channels")
    norms = [np.linalg.norm(truth.c(n)) for n in range(len(truth.removed))]
    np.testing.assert_allclose(limit.curve(truth.sparsities).removed_norm, norms, rtol=1e-12)
    found = removed_norm(curvature.weights, truth.sparsities, groups="output_channels")
    np.testing.assert_allclose(found, norms, rtol=1e-12)
    assert limit.curve([3.9 / 35]).removed_norm.tolist() == [0.0]  # a whole group has four weights
    again = PruningLimit.from_json(limit.to_json())
    assert again.num_groups == limit.num_groups == 8
    assert "35 weights in 8 groups, 17 examples" in repr(again)


def test_bounds_within_one_group_leave_nothing_open():
    """Rounding moves the root of single weights, and that of groups within one of them: the limit is sure."""
    rng = np.random.default_rng(0)
    weights, eigenvalues = rng.normal(size=60), 10 ** rng.uniform(-3, 1, 60)
    bracket = SpectralBracket.exact(SpectralMeasure(eigenvalues, np.full(60, 1 / 60)), 1e-4)
    single = width_limit(bracket, Problem(magnitude_order(weights), 0.5))
    order = magnitude_order(weights, groups=np.arange(60) // 6)
    grouped = width_limit(bracket, Problem(order, 0.5))
    assert single.half_bracket > 0
    assert grouped.lower == grouped.value == grouped.upper
    assert grouped.half_bracket == 0
    assert grouped.value in [n / 10 for n in range(11)]


# Sweeps and pruned networks.


def test_sweeps_are_at_the_sparsities_that_groups_reach(network, x64):
    mlp, truth = make_mlp(np.float64), brute_force(network, "hessian", LABELS["unequal"])
    args, groups = (mlp.params, batched(mlp.arrays, 5)), LABELS["unequal"]

    def metrics(params, batch):
        return {"loss": mlp.loss(params, batch)}

    sweep = sparsity_sweep(metrics, *args, np.linspace(0, 1, 36), groups=groups)
    assert sweep.sparsities.tolist() == truth.sparsities
    _, rest = partition(mlp.params)
    for n, loss in enumerate(sweep.metrics["loss"]):
        pruned = combine(network[3](truth.weights - truth.c(n)), rest)
        assert loss == pytest.approx(float(mlp.loss(pruned, mlp.arrays)), rel=1e-12)
    reached = max(s for s in truth.sparsities if s <= 0.5)
    assert sparsity_sweep(metrics, *args, [0.5, 0.51], groups=groups).sparsities.tolist() == [reached]
    tuned = finetuned_sweep(mlp.loss, *args, [0.5, 1], num_steps=2, groups=groups)
    assert tuned.sparsities.tolist() == [reached, 1.0]
    assert tuned.metrics["loss"][1] == pytest.approx(sweep.metrics["loss"][-1])


@pytest.fixture(scope="module")
def regression():
    """12 weights in 5 groups of unequal sizes, and the least squares without the first 0, 1, ... of them."""
    rng = np.random.default_rng(0)
    inputs, weights = rng.normal(size=(60, 12)), rng.normal(size=(12, 1))
    targets = inputs @ weights + 0.1 * rng.normal(size=(60, 1))
    labels = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 4, 4])[:, None]
    arrays = inputs.astype(np.float32), targets.astype(np.float32)
    losses, gone = [], []
    for at in [[], *groups_in_order(weights.ravel(), labels.ravel())]:
        gone += at
        kept = np.setdiff1d(np.arange(12), gone)
        best = np.linalg.lstsq(inputs[:, kept], targets)[0] if len(kept) else np.zeros((0, 1))
        losses.append((len(gone) / 12, np.mean((inputs[:, kept] @ best - targets) ** 2)))
    return weights.astype(np.float32), arrays, labels, losses


@pytest.mark.parametrize("rise", [0.005, 0.3, 1.5, 6.0, 100.0])
def test_the_attained_limit_of_groups_is_that_of_least_squares(regression, rise):
    """In an order that is fixed the supports are nested: brute force over all of them knows the answer."""
    weights, arrays, labels, losses = regression
    keywords = {"tolerance": 1e-3, "settings": Settings(curvature_share=1.0), "unpruned": False}
    args = linear, squared_error, weights, batched(arrays, 60)
    found = attained_limit(*args, loss_tolerance=rise, scores=weights, groups=labels, **keywords)
    dense = float(squared_error(linear(weights, arrays), arrays))
    assert found.sparsity == max(s for s, loss in losses if loss <= dense + rise)
    assert {s for s, _ in found.tried} <= {s for s, _ in losses}
    kept = np.asarray(found.pruned.mask)
    assert np.mean(~kept) == found.sparsity == found.pruned.sparsity
    assert all(len(np.unique(kept[labels == label])) == 1 for label in range(5))


def test_a_pruned_network_has_whole_groups(regression, tmp_path):
    weights, arrays, labels, losses = regression
    args, told = (linear, squared_error, weights, batched(arrays, 60)), []
    reached = max(s for s, _ in losses if s <= 0.7)
    keywords = {"settings": Settings(curvature_share=1.0), "scores": weights, "checkpoint": tmp_path}
    network = prune(*args, 0.7, groups=labels, **keywords, progress=told.append)
    assert network.sparsity == reached == told[-1].sparsity
    assert network.loss == pytest.approx(dict(losses)[reached], rel=1e-4)
    kept = np.asarray(network.mask)
    assert all(len(np.unique(kept[labels == label])) == 1 for label in range(5))
    with pytest.raises(ValueError, match="groups"):
        prune(*args, 0.7, groups=labels // 2, **keywords)
    with pytest.raises(ValueError, match="prune takes scores and groups with a sparsity"):
        prune(*args, mask=network.mask, groups=labels)


# Labels.

values_and_labels = st.tuples(st.sampled_from([0.0, 1.0, -1.0, 2.0]), st.integers(-2, 3))


@settings(max_examples=60)
@given(st.lists(values_and_labels, min_size=1, max_size=30))
def test_groups_go_in_the_order_of_their_root_mean_square(pairs):
    values, labels = (np.array(x) for x in zip(*pairs, strict=True))
    order, expected = magnitude_order(values, groups=labels), groups_in_order(values, labels)
    assert order.num_removals == len(expected)
    gone = []
    for n, at in enumerate([[], *expected]):
        gone += at
        assert order.counts[n] == len(gone)
        assert sorted(np.flatnonzero(~np.asarray(order.mask(n)))) == sorted(gone)
        assert order.radius(n) == pytest.approx(np.linalg.norm(values[gone]))
        assert order.within(len(gone)) == n
    np.testing.assert_allclose(order.per_removal(order.sort(values)), [np.sum(values[at]) for at in expected])


def test_named_groups_of_a_convolution_and_a_dense_kernel():
    weights = {"conv": np.ones((3, 3, 2, 4)), "dense": np.ones((5, 3))}
    outputs = group_labels(weights, "output_channels")
    assert [np.unique(outputs["conv"][..., i]).tolist() for i in range(4)] == [[0], [1], [2], [3]]
    assert [np.unique(outputs["dense"][:, i]).tolist() for i in range(3)] == [[4], [5], [6]]
    inputs = group_labels(weights, "input_channels")
    assert [np.unique(inputs["conv"][:, :, i]).tolist() for i in range(2)] == [[0], [1]]
    assert [np.unique(inputs["dense"][i]).tolist() for i in range(5)] == [[2], [3], [4], [5], [6]]
    np.testing.assert_array_equal(axis_labels(weights, 0)["dense"][:, 0], np.arange(3, 8))
    blocks = group_labels(weights, ("blocks", (2, 3)))
    assert len(np.unique(blocks["conv"])) == 9 * 1 * 2
    np.testing.assert_array_equal(np.unique(blocks["dense"], return_counts=True)[1], [6, 6, 3])


def test_heads_of_attention_in_two_layouts():
    """One head after the other along an axis, or in an axis of their own; two attentions share no head."""
    flat = {name: np.ones((6, 6)) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    labels = head_labels({"a": flat, "b": flat}, 3)
    for name, leaf in labels["a"].items():
        across = leaf.T if name == "o_proj" else leaf
        np.testing.assert_array_equal(across, np.tile([0, 0, 1, 1, 2, 2], (6, 1)))
        np.testing.assert_array_equal(labels["b"][name], leaf + 3)
    attention = nnx.MultiHeadAttention(3, 6, decode=False, rngs=nnx.Rngs(0))
    found = head_labels(partition(nnx.to_pure_dict(nnx.state(attention, nnx.Param)))[0], 3)
    np.testing.assert_array_equal(found["query"]["kernel"][:, :, 1], np.tile(np.arange(3), (6, 1)))
    np.testing.assert_array_equal(found["query"]["bias"], np.tile(np.arange(3)[:, None], (1, 2)))
    np.testing.assert_array_equal(found["out"]["kernel"][:, 0, 0], np.arange(3))


def test_heads_of_equinox_stand_along_its_outputs():
    """Without the group of a head, its slices of query, key, value and of what goes into the output are 0."""
    attention = eqx.nn.MultiheadAttention(3, 6, key=jax.random.key(0))
    chosen = partition(eqx.filter(attention, eqx.is_array))[0]
    labels = head_labels(chosen, 3)
    without = apply_mask(eqx.filter(attention, eqx.is_array), jax.tree.map(lambda x: x != 1, labels))
    for kernel in (without.query_proj, without.key_proj, without.value_proj):
        heads = (kernel.weight @ jnp.arange(1.0, 7.0)).reshape(3, 2)
        np.testing.assert_array_equal(heads != 0, [[True] * 2, [False] * 2, [True] * 2])
    one = jnp.zeros((3, 2)).at[1].set(1.0).ravel()
    np.testing.assert_array_equal(without.output_proj.weight @ one, 0)
    assert np.all(np.asarray(without.output_proj.weight @ (1 - one)) != 0)


def like_the_weights(hidden, out):
    return {"hidden": {"kernel": hidden, "bias": None}, "out": {"kernel": out, "bias": None}}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("channels", "groups must be .* got 'channels'"),
        (("heads", 2), "belongs to no head of attention that is known by its name"),
        (("blocks", (1, 2, 2)), r"blocks of shape \(1, 2, 2\) do not fit \['hidden'\]\['kernel'\], of shape"),
        (("blocks", 4), "the shape of blocks must be integers"),
        (("blocks", (0, 4)), "a side of blocks must be an integer of at least 1"),
        (("rows", 4), "groups must be"),
        (np.zeros(35, int), "groups must be"),
        (like_the_weights(np.zeros((4, 5), int), None), "groups must be"),
        (
            like_the_weights(np.zeros((4, 5)), np.zeros((5, 3))),
            "labels of groups must be integers, got float",
        ),
    ],
)
def test_groups_that_do_not_match_are_refused(network, groups, message):
    curvature = network[0]["hessian"][0]
    with pytest.raises(ValueError, match=message):
        pruning_limit(curvature, jax.random.key(0), loss_tolerance=0.1, groups=groups)


def test_heads_that_do_not_fit_are_refused():
    kernels = {"query": np.ones((8, 8)), "key": np.ones((8, 4)), "out": np.ones((8, 8))}
    with pytest.raises(ValueError, match="heads share a key and a value"):
        head_labels(kernels, 4)
    with pytest.raises(ValueError, match=r"3 heads do not fit \['key'\], of shape \(8, 4\)"):
        head_labels(kernels, 3)
    with pytest.raises(ValueError, match="2 heads do not fit"):
        head_labels({"query": np.ones((8, 4, 2))}, 2)
    with pytest.raises(ValueError, match="belongs to no head"):
        head_labels({"query": np.ones((8, 8)), "out": {"bias": np.ones(8)}}, 2)
    with pytest.raises(ValueError, match=r"weights\['top'\] hold an output kernel without"):
        head_labels({"top": {"out": np.ones((8, 3))}, "below": {"query": np.ones((8, 8))}}, 2)


def test_one_call_assesses_groups(regression):
    """What is cut and what is attained are sparsities that whole groups reach."""
    weights, arrays, labels, losses = regression
    keywords = {
        "loss_tolerance": 1.5,
        "curvatures": ["gauss_newton"],
        "settings": Settings(curvature_share=1.0),
    }
    args = linear, squared_error, weights, batched(arrays, 60), jax.random.key(0)
    found = assess(*args, groups=labels, scores=weights, **keywords)
    reachable = [s for s, _ in losses]
    assert {found.cut.sparsity, found.cut.next, found.attained.sparsity, *found.cut.sparsities} <= {
        *reachable
    }
    within = [
        s
        for s in reachable
        if squared_error_without(regression, s) <= 1.5 + squared_error_without(regression, 0)
    ]
    assert found.cut.sparsity == max(within)
    dense = squared_error_without(regression, 0)
    assert found.attained.sparsity == max(s for s, loss in losses if loss <= dense + 1.5)


def squared_error_without(regression, sparsity):
    weights, arrays, labels, _ = regression
    order = magnitude_order(weights, groups=labels)
    pruned = np.where(order.mask(order.within(round(sparsity * 12))), weights, 0)
    return float(squared_error(linear(pruned, arrays), arrays))
