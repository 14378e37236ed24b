"""Shares of the layers against the rules' definitions, solved and enumerated."""

import itertools

import numpy as np
import pytest
from flax import nnx

from jaxlimit import magnitude_mask
from jaxlimit.baselines import share_counts, share_scores, uniform_plus
from jaxlimit.limits.allocation import uniform_mask
from jaxlimit.models.convolutional import Convolution, ConvolutionalNetwork

# A convolution, and three dense layers of which the last two are small.
SHAPES = {"a": (3, 3, 2, 4), "b": (6, 7), "c": (7, 3), "d": (3, 2)}


def network():
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape) for name, shape in SHAPES.items()}


def raw(rule, shape):
    if rule == "uniform":
        return 1.0
    axes = shape[-2:] if rule == "er" else shape
    return sum(axes) / np.prod(axes)


def quotas(rule, num_kept):
    """E r_l m_l, with layers that would be more than full fixed one after the other and e solved again."""
    full = set()
    while True:
        rest = num_kept - sum(np.prod(SHAPES[name]) for name in full)
        norm = sum(raw(rule, s) * np.prod(s) for name, s in SHAPES.items() if name not in full)
        found = {
            name: float(np.prod(s) if name in full else rest / norm * raw(rule, s) * np.prod(s))
            for name, s in SHAPES.items()
        }
        over = {name for name in SHAPES if name not in full and found[name] > np.prod(SHAPES[name])}
        if not over:
            return found
        full |= over


@pytest.mark.parametrize("rule", ["uniform", "er", "erk"])
def test_counts_are_the_integers_nearest_to_the_rule(rule):
    """Enumerated: no other counts of this sum are nearer to the quotas, layers that are full apart."""
    weights = network()
    for num_kept in (1, 7, 20, 45, 80, 120, 141):
        counts, quota = share_counts(weights, rule, num_kept), quotas(rule, num_kept)
        assert sum(counts.values()) == num_kept

        def distance(found, quota=quota):
            return sum((found[name] - quota[name]) ** 2 / quota[name] for name in SHAPES)

        ranges = [
            range(max(0, int(quota[n]) - 2), min(int(quota[n]) + 3, int(np.prod(s)) + 1))
            for n, s in SHAPES.items()
        ]
        nearest = min(
            distance(dict(zip(SHAPES, each, strict=True)))
            for each in itertools.product(*ranges)
            if sum(each) == num_kept
        )
        assert distance(counts) == pytest.approx(nearest, abs=1e-9)
    assert share_counts(weights, rule, 0) == dict.fromkeys(SHAPES, 0)


def test_one_order_has_the_counts_at_every_sparsity_and_the_largest_of_each_layer():
    weights = network()
    scores = share_scores(weights, "erk")
    before = None
    for num_kept in range(141, 0, -20):
        mask = magnitude_mask(weights, 1 - num_kept / 141, scores=scores)
        counts = {name: int(mask[name].sum()) for name in SHAPES}
        assert counts == share_counts(weights, "erk", num_kept)
        for name, keep in mask.items():
            kept, gone = np.abs(weights[name])[np.asarray(keep)], np.abs(weights[name])[~np.asarray(keep)]
            assert kept.min(initial=np.inf) >= gone.max(initial=0)
            assert before is None or not np.any(np.asarray(keep) & ~np.asarray(before[name]))
        before = mask


def test_the_order_within_a_layer_may_be_another():
    weights = {"a": np.array([[1.0, 2.0]]), "b": np.array([[3.0, 4.0]])}
    other = {"a": np.array([[2.0, 1.0]]), "b": np.array([[-5.0, 1.0]])}
    mask = magnitude_mask(weights, 0.5, scores=share_scores(weights, "uniform", scores=other))
    assert [keep.tolist() for keep in mask.values()] == [[[True, False]], [[True, False]]]


def test_uniform_is_what_the_allocation_calls_so():
    weights = network()
    for sparsity in (0.3, 0.5, 0.77):
        ours = magnitude_mask(weights, sparsity, scores=share_scores(weights, "uniform"))
        for name, keep in uniform_mask(weights, sparsity).items():
            assert abs(int(keep.sum()) - int(ours[name].sum())) <= 1


def test_uniform_plus_keeps_the_first_convolution_and_a_fifth_of_the_last_layer():
    model = ConvolutionalNetwork([Convolution(2)], [5], 3, image_shape=(4, 4, 1), rngs=nnx.Rngs(0))
    reserved = uniform_plus(model)
    assert reserved == {"convolutions.0.kernel": 1.0, "dense.layers.1.kernel": 0.2}
    weights = {"first": np.ones((3, 3, 1, 2)), "middle": np.ones((8, 5)), "last": np.ones((5, 3))}
    reserved = {"first": 1.0, "last": 0.2}
    for num_kept, middle, last in ((73, 40, 15), (45, 20, 7), (29, 8, 3), (24, 3, 3), (21, 0, 3)):
        counts = share_counts(weights, "uniform", num_kept, reserved=reserved)
        assert counts["first"] == 18
        assert abs(counts["middle"] - middle) <= 1
        assert counts["last"] == num_kept - 18 - counts["middle"]
        assert counts["last"] >= last - 1 >= 2
    assert sum(share_counts(weights, "uniform", 21, reserved=reserved).values()) == 21
    with pytest.raises(ValueError, match="between the 21 weights that are reserved and all 73, got 20"):
        share_counts(weights, "uniform", 20, reserved=reserved)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "ERK"}, "rule must be one of uniform, er, erk, got ERK"),
        ({"rule": "er", "reserved": {"e": 1.0}}, "reserved has e, which are no kernels"),
        ({"rule": "er", "reserved": {"a": 1.2}}, "reserved of a must be a share from 0 to 1"),
        ({"rule": "er", "scores": {"a": np.ones(2)}}, "scores must have the shapes of weights"),
    ],
)
def test_shares_that_are_none_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        share_scores(network(), **arguments)
