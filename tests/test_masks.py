"""Masks with exact counts, against a Python loop that sorts tuples, and against `fractions`."""

import math
from fractions import Fraction

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlimit.baselines.masks import keep_largest, kept_counts, layer_counts, random_mask

scores = st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0]), min_size=1, max_size=30)


@given(st.integers(1, 10**6), st.integers(0, 9999))
def test_the_number_kept_is_exact(dim, ten_thousandths):
    weights = {"kernel": jax.ShapeDtypeStruct((dim,), np.float32)}
    removed = math.floor(Fraction(ten_thousandths, 10_000) * dim)
    assert kept_counts(weights, [ten_thousandths / 10_000]) == [dim - removed]


@pytest.mark.parametrize("sparsities", [[], [1.0], [-0.1], [0.5, math.nan]])
def test_sparsities_outside_their_range_are_refused(sparsities):
    with pytest.raises(ValueError, match=r"sparsities must be one or more numbers from 0 to below 1"):
        kept_counts({"kernel": np.ones(3)}, sparsities)


@given(scores, st.data())
def test_the_largest_scores_of_those_alive_are_kept(values, data):
    alive = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    num_kept = data.draw(st.integers(0, sum(alive)))
    ranked = sorted((value, index) for index, value in enumerate(values) if alive[index])
    expected = {index for _, index in ranked[len(ranked) - num_kept :]}
    cut = len(values) // 2
    tree = [np.array(values[:cut]), np.array(values[cut:])]
    mask = keep_largest(tree, num_kept, alive=[np.array(alive[:cut], bool), np.array(alive[cut:], bool)])
    assert [leaf.dtype for leaf in mask] == [bool, bool]
    assert {*np.flatnonzero(np.concatenate(mask)).tolist()} == expected


def test_a_sparsity_that_leaves_nothing_is_refused():
    assert kept_counts({"kernel": np.ones(3)}, [0.99]) == [1]
    with pytest.raises(ValueError, match=r"must leave one of the 3 weights, got 0\.9999999999"):
        kept_counts({"kernel": np.ones(3)}, [0, 1 - 1e-10])


def test_more_than_are_alive_cannot_be_kept():
    with pytest.raises(ValueError, match="num_kept must lie between 0 and the 1 weights alive, got 2"):
        keep_largest(np.ones(3), 2, alive=np.array([False, True, False]))


def test_random_masks_have_the_count_and_every_weight_its_chance():
    """Each of 12 weights is kept in a share 5 / 12 of 400 draws: within 4 standard deviations."""
    weights = {"a": np.ones((2, 3)), "b": np.ones(6)}
    keys = jax.random.split(jax.random.key(0), 400)
    masks = [random_mask(key, weights, 5) for key in keys]
    flat = np.array([np.concatenate([mask["a"].ravel(), mask["b"]]) for mask in masks])
    assert (flat.sum(1) == 5).all()
    deviation = math.sqrt(5 / 12 * 7 / 12 / 400)
    assert np.abs(flat.mean(0) - 5 / 12).max() < 4 * deviation


def test_layers_are_counted_by_name():
    mask = {"a": {"kernel": np.array([[True, False], [False, False]]), "bias": None}, "b": np.zeros(3, bool)}
    assert layer_counts(mask) == {"a.kernel": (1, 4), "b": (0, 3)}
