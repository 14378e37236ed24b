"""Iterative magnitude pruning against its definition: survivors, rewound weights, and each round by hand."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from jaxlimit import models, training
from jaxlimit.baselines import IterativePruning, Recipe, iterative_pruning
from jaxlimit.baselines.iterative import rewound, rounds
from jaxlimit.baselines.network import bare, kernels
from jaxlimit.training.losses import classification_loss

RECIPE = Recipe(epochs=4, batch_size=8, learning_rate=0.1)  # of 24 examples: 3 updates an epoch


def network():
    return models.FullyConnected([4, 6, 3], rngs=nnx.Rngs(0))


def examples():
    random = np.random.default_rng(0)
    return random.normal(size=(24, 4)).astype(np.float32), random.integers(0, 3, 24)


def leaves(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(models.from_nnx(model)[1])]


@given(st.integers(1, 20_000), st.integers(0, 12))
def test_density_is_a_power_of_four_fifths(dim, number):
    """D - floor((1 - (4/5)^r) D) in whole numbers is the ceiling of D 4^r / 5^r."""
    count = -(-dim * 4**number // 5**number)
    way = rounds(dim, [count])
    alive = [before for before, _ in way] + [count]
    expected = list(dict.fromkeys(-(-dim * 4**r // 5**r) for r in range(number + 1)))
    assert alive == expected
    assert all(after == before for (_, after), (before, _) in pairwise(way))


@given(st.integers(2, 3000), st.lists(st.floats(0.001, 1), min_size=1, max_size=4))
def test_every_number_is_reached_from_the_last_round_above_it(dim, densities):
    kept = [max(1, round(density * dim)) for density in densities]
    way = rounds(dim, kept)
    reached = [after for _, after in way]
    assert len({*reached}) == len(reached)
    assert {*kept} <= {dim, *reached}
    assert all(before in (dim, *reached[:i]) for i, (before, _) in enumerate(way))
    assert all(0.8 * before - 1 < after < before for before, after in way)


def test_each_round_by_hand():
    """Survivors are the largest of those before, they start from w*, and what is removed stays at zero."""
    model, arrays, key = network(), examples(), jax.random.key(1)
    settings = IterativePruning(rewind_steps=3, recipe=RECIPE)
    dense, first, second = iterative_pruning(model, arrays, key, [0.0, 0.2, 0.36], settings)
    assert [n.rounds for n in (dense, first, second)] == [(42,), (42, 34), (42, 34, 27)]
    start = rewound(bare(model, biases=True), arrays, jax.random.fold_in(key, 0), settings)
    for number, before, after in ((1, dense, first), (2, first, second)):
        weights = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(kernels(before.model))]
        alive = np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(before.mask)])
        ranked = sorted((abs(w), i) for i, w in enumerate(np.concatenate(weights)) if alive[i])
        expected = {i for _, i in ranked[len(ranked) - after.num_kept :]}
        mask = np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(after.mask)])
        assert {*np.flatnonzero(mask).tolist()} == expected

        retrained = RECIPE.train(start, arrays, jax.random.fold_in(key, number), mask=after.mask)
        for leaf, found in zip(leaves(retrained), leaves(after.model), strict=True):
            np.testing.assert_array_equal(leaf, found)


def test_rewound_weights_are_those_of_the_first_training():
    """After whole epochs to the bit; after 4 updates, one into the second epoch, by optax step by step."""
    model, arrays, key = network(), examples(), jax.random.key(0)
    one_epoch = RECIPE.train(model, arrays, key, epochs=1)
    found = rewound(model, arrays, key, IterativePruning(rewind_steps=3, recipe=RECIPE))
    for leaf, other in zip(leaves(one_epoch), leaves(found), strict=True):
        np.testing.assert_array_equal(leaf, other)

    predict, params = models.from_nnx(model)
    gradient = jax.jit(jax.grad(classification_loss(predict)))
    optimizer = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9))
    state = optimizer.init(params)
    orders = [np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), 24)) for epoch in (0, 1)]
    for chosen in np.concatenate(orders).reshape(-1, 8)[:4]:
        batch = jnp.asarray(arrays[0][chosen]), jnp.asarray(arrays[1][chosen])
        changes, state = optimizer.update(gradient(params, batch), state, params)
        params = optax.apply_updates(params, changes)
    found = rewound(model, arrays, key, IterativePruning(rewind_steps=4, recipe=RECIPE))
    for leaf, other in zip(jax.tree.leaves(params), leaves(found), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-6)
    assert rewound(model, arrays, key, IterativePruning(rewind_steps=0, recipe=RECIPE)) is model


def test_settings_outside_their_range_are_refused():
    with pytest.raises(ValueError, match=r"removed_share must be between 0 and 1, got 1\.0"):
        IterativePruning(removed_share=1.0)
    settings = IterativePruning(rewind_steps=13, recipe=RECIPE)
    with pytest.raises(ValueError, match="rewind_steps must be at most the 12 updates of a training, got 13"):
        iterative_pruning(network(), examples(), jax.random.key(0), [0.5], settings)
    assert training.steps_per_epoch(24, 8) * RECIPE.epochs == RECIPE.updates(24) == 12
