"""Magnitude pruning against a Python loop that sorts (|w|, index) pairs, and against `fractions`.

Tuples sort by magnitude first and by index among equals: the rule itself, without argsort, ranks or
cumulative sums.
"""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlimit.core.trees import flatten, unflatten
from jaxlimit.geometry.magnitude import apply_mask, magnitude_mask, magnitude_order, num_removed, removed_norm

# Few different magnitudes, of both signs: most of them are tied.
tied = st.lists(st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 2.0, 3.0]), min_size=1, max_size=40)
floats = st.lists(st.floats(-1e3, 1e3, width=32, allow_subnormal=False), min_size=1, max_size=40)
quick = settings(max_examples=40)


def removal_order(values):
    return [index for _, index in sorted((abs(x), i) for i, x in enumerate(values))]


@quick
@given(tied | floats)
def test_order_of_removal(values):
    order = magnitude_order({"w": np.array(values, np.float32)})
    assert order.dim == len(values)
    assert order.order.tolist() == removal_order(values)
    assert order.rank[order.order].tolist() == list(range(len(values)))


@quick
@given(tied | floats)
def test_removed_norm_at_every_count(values):
    weights = {"w": np.array(values, np.float32)}
    dim = len(values)
    order = magnitude_order(weights)
    removed = removal_order(values)
    norms = [math.sqrt(math.fsum(values[i] ** 2 for i in removed[:n])) for n in range(dim + 1)]
    np.testing.assert_allclose(np.sqrt(order.squared_norm), norms, rtol=1e-13)
    np.testing.assert_allclose(removed_norm(weights, np.arange(dim + 1) / dim), norms, rtol=1e-13)
    between = (np.arange(dim) + 0.5) / dim
    np.testing.assert_allclose(removed_norm(weights, between), norms[:-1], rtol=1e-13)


@settings(max_examples=15)
@given(tied)
def test_masks_at_every_count(values):
    """Exactly n weights go, whatever the ties, and each set contains the one before."""
    weights = np.array(values, np.float32)
    order, removed = magnitude_order(weights), removal_order(values)
    for n in range(len(values) + 1):
        expected = np.ones(len(values), bool)
        expected[removed[:n]] = False
        mask = order.mask(n)
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, expected)
        vector = order.removed_vector(n)
        assert vector.dtype == np.float32
        np.testing.assert_array_equal(vector, np.where(expected, 0, weights))
        np.testing.assert_allclose(
            np.sum(np.square(vector, dtype=np.float64)), order.squared_norm[n], rtol=1e-13
        )


def test_large_ties_are_cut_by_index():
    mask = magnitude_mask(jnp.full((30, 40), -0.25), 0.5)
    assert mask.shape == (30, 40)
    np.testing.assert_array_equal(mask.ravel(), np.arange(1200) >= 600)


def test_small_squares_are_not_lost():
    """In float32 the sum would stop growing at 2^24 times a square."""
    weights = np.full(2**20, 1e-3, np.float32)
    weights[-1] = 100.0
    small = float(np.float32(1e-3)) ** 2 * (2**20 - 1)
    assert removed_norm(weights, 1.0) == pytest.approx(math.sqrt(small + 1e4), rel=1e-10)
    assert removed_norm(weights, 1 - 2**-20) == pytest.approx(math.sqrt(small), rel=1e-10)


@quick
@given(tied)
def test_number_of_zeros(values):
    assert magnitude_order(np.array(values, np.float32)).num_zeros == sum(x == 0 for x in values)


# Counts.


@given(st.integers(1, 2000), st.data())
@settings(max_examples=200)
def test_decimal_fractions_remove_what_they_say(dim, data):
    """S written with three decimals, in exact arithmetic."""
    thousandths = data.draw(st.integers(0, 1000))
    expected = math.floor(Fraction(thousandths, 1000) * dim)
    assert int(num_removed(dim, thousandths / 1000)) == expected


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 100, 4464, 1_595_000])
def test_every_count_can_be_reached(dim):
    counts = np.unique(np.linspace(0, dim, min(dim + 1, 5001)).astype(int))
    np.testing.assert_array_equal(num_removed(dim, counts / dim), counts)
    inside = counts[:-1]
    np.testing.assert_array_equal(num_removed(dim, (inside + 0.99) / dim), inside)


def test_floor_with_allowance():
    assert 0.29 * 100 < 29
    assert int(num_removed(100, 0.29)) == 29
    assert int(num_removed(100, 0.29 - 1e-6)) == 28
    assert int(num_removed(100, 0.9999)) == 99
    assert num_removed(100, [0.0, 0.5, 1.0]).tolist() == [0, 50, 100]
    assert num_removed(100, [0.5]).dtype == np.int64


@pytest.mark.parametrize("sparsity", [-1e-6, 1.000001, np.nan, np.inf, [0.5, 2.0]])
def test_sparsities_outside_the_unit_interval(sparsity):
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\], got"):
        num_removed(10, sparsity)
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\], got"):
        removed_norm(np.ones(3), sparsity)
    with pytest.raises(ValueError, match=r"sparsity must (lie|be one number) in \[0, 1\], got"):
        magnitude_mask(np.ones(3), sparsity)


# Trees.

TREE = {
    "dense": {"kernel": np.array([[3.0, -1.0], [0.5, 2.0]], np.float32), "bias": None},
    "conv": [np.array([[[-4.0]], [[0.25]]], np.float32), None],
}


def test_magnitudes_are_compared_across_leaves():
    """Of the six weights the three smallest are .25, .5 and -1, in two leaves."""
    mask = magnitude_mask(TREE, 0.5)
    np.testing.assert_array_equal(mask["conv"][0], [[[True]], [[False]]])
    np.testing.assert_array_equal(mask["dense"]["kernel"], [[True, False], [False, True]])
    assert mask["dense"]["bias"] is None
    assert mask["conv"][1] is None
    assert float(removed_norm(TREE, 0.5)) == pytest.approx(math.sqrt(0.0625 + 0.25 + 1), rel=1e-15)


def test_flatten_and_back():
    flat = flatten(TREE)
    assert flat.dtype == np.float64
    assert flat.tolist() == [-4.0, 0.25, 3.0, -1.0, 0.5, 2.0]
    again = unflatten(flat, TREE)
    assert jax.tree.structure(again) == jax.tree.structure(TREE)
    for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(TREE), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
    assert flatten({}).shape == (0,)


def test_precision_of_the_weights_is_kept(dtype):
    weights = jnp.asarray([1.0, 1.0 + 2**-20, -1.0], dtype)
    vector = magnitude_order(weights).removed_vector(2)
    assert vector.dtype == dtype
    np.testing.assert_array_equal(vector, [1.0, 0.0, -1.0])


def test_half_precision():
    weights = jnp.asarray([0.1, -0.2, 0.3, 0.4], jnp.bfloat16)
    np.testing.assert_array_equal(magnitude_mask(weights, 0.5), [False, False, True, True])
    assert magnitude_order(weights).removed_vector(1).dtype == jnp.bfloat16


def test_double_precision_of_numpy_on_a_single_precision_device():
    vector = magnitude_order(np.array([1.0, 2.0])).removed_vector(1)
    np.testing.assert_array_equal(vector, [1.0, 0.0])


@pytest.mark.parametrize("empty", [{}, None, [], {"bias": None}, np.zeros((0, 3))])
def test_nothing_to_prune(empty):
    with pytest.raises(ValueError, match="nothing to prune"):
        magnitude_mask(empty, 0.5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(bad):
    with pytest.raises(ValueError, match="2 weights are not finite"):
        removed_norm({"a": np.array([1.0, bad]), "b": np.array([bad])}, 0.5)


@pytest.mark.parametrize("masked", ["weights", "scores", "sparsity"])
def test_masked_arrays_are_refused(masked):
    arrays = {"weights": np.ones(3), "scores": np.ones(3), "sparsity": np.array([0.2, 0.5])}
    arrays[masked] = np.ma.array(arrays[masked], mask=arrays[masked] < 0.5)
    with pytest.raises(ValueError, match="is masked, and its mask would be lost"):
        removed_norm(**arrays)


# Applying masks.


def test_apply_mask_to_parameters_with_other_leaves():
    params = {
        "dense": {"kernel": jnp.asarray(TREE["dense"]["kernel"]), "bias": jnp.ones(2)},
        "conv": [jnp.asarray(TREE["conv"][0]), {"scale": jnp.ones(3), "steps": 7}],
    }
    pruned = apply_mask(params, magnitude_mask(TREE, 0.5))
    np.testing.assert_array_equal(pruned["dense"]["kernel"], [[3, 0], [0, 2]])
    np.testing.assert_array_equal(pruned["conv"][0], [[[-4]], [[0]]])
    assert pruned["dense"]["bias"] is params["dense"]["bias"]
    assert pruned["conv"][1]["scale"] is params["conv"][1]["scale"]
    assert pruned["conv"][1]["steps"] == 7
    assert pruned["conv"][0].dtype == jnp.float32


@quick
@given(floats, st.floats(0, 1))
def test_pruned_weights_and_removed_vector_add_up(values, sparsity):
    weights = {"w": np.array(values, np.float32)}
    order = magnitude_order(weights)
    kept = apply_mask(weights, magnitude_mask(weights, sparsity))
    removed = order.removed_vector(int(num_removed(order.dim, sparsity)))
    np.testing.assert_array_equal(kept["w"] + removed["w"], weights["w"])
    assert np.linalg.norm(flatten(removed)) == pytest.approx(
        float(removed_norm(weights, sparsity)), rel=1e-12
    )


def test_a_pruned_weight_is_zero_even_if_it_was_not_a_number():
    pruned = apply_mask(jnp.array([jnp.nan, 1.0]), jnp.array([False, True]))
    np.testing.assert_array_equal(pruned, [0.0, 1.0])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"w": np.ones((2, 2), bool)}, "mask must be a pytree like params"),
        ({"w": np.ones((2, 2), bool), "b": None, "c": None}, "mask must be a pytree like params"),
        ([np.ones((2, 2), bool), None], "mask must be a pytree like params"),
        (
            {"w": np.ones((2, 3), bool), "b": None},
            r"mask has a leaf of shape \(2, 3\) where params has \(2, 2\)",
        ),
        ({"w": np.ones(2, bool), "b": None}, r"mask has a leaf of shape \(2,\)"),  # would broadcast
        ({"w": True, "b": None}, r"mask has a leaf of shape \(\)"),
        ({"w": np.full((2, 2), 0.5), "b": None}, "scores are no mask"),
        ({"w": np.array([[0, 1], [2, 1]]), "b": None}, "scores are no mask"),
        ({"w": np.array([[0, 1], [np.nan, 1]]), "b": None}, "scores are no mask"),
    ],
)
def test_masks_that_do_not_match(mask, message):
    with pytest.raises(ValueError, match=message):
        apply_mask({"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, mask)
