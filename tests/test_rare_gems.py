"""Rare Gems against the recipe as loops in NumPy, and its gradient against differences of a surrogate."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax

from jaxlimit.baselines.gems import (
    RareGems,
    flagged_counts,
    recipe_l2,
    score_objective,
    search,
    signed_constants,
)
from jaxlimit.baselines.masks import keep_all, random_mask
from jaxlimit.baselines.network import bare, kernels
from jaxlimit.models import FullyConnected
from jaxlimit.training import pure_classifier


@given(st.integers(1, 5000), st.integers(1, 40), st.data())
def test_flags_drop_as_in_the_recipe_and_end_exactly(dim, num_drops, data):
    """The recipe's loop; it is left only where it would go below the target, and at the end."""
    num_kept = data.draw(st.integers(1, dim))
    found = flagged_counts(dim, num_kept, num_drops)
    share, alive = 1 - (num_kept / dim) ** (1 / num_drops), dim
    assert found[0] == dim
    assert found[-1] == num_kept
    assert len(found) == num_drops + 1
    for count in found[1:-1]:
        alive -= math.ceil(share * alive - 1e-9 * dim)
        assert count == max(alive, num_kept)


def test_without_drops_there_is_one_cut():
    assert RareGems(epochs=5).num_drops == 0
    assert flagged_counts(100, 7, 0) == [100, 7]
    assert RareGems().num_drops == 29  # after 5, 10, ..., 145 of 150 epochs


def test_l2_falls_with_the_density_between_the_values_of_the_recipe():
    values = [recipe_l2(density) for density in (0.001, 0.0144, 0.02, 0.0372, 0.2, 0.5, 1.0)]
    assert values == sorted(values, reverse=True)
    assert values[0] == pytest.approx(1e-4)
    assert values[-1] == pytest.approx(1e-8)


def examples(dtype=np.float32):
    random = np.random.default_rng(0)
    return random.normal(size=(11, 4)).astype(dtype), random.integers(0, 3, size=11)


def test_weights_are_signed_constants_in_a_network_without_biases():
    model = FullyConnected([4, 3], rngs=nnx.Rngs(0))
    weights = kernels(model)
    constant = signed_constants(weights)["layers"]["0"]["kernel"]
    np.testing.assert_allclose(
        constant, np.sign(weights["layers"]["0"]["kernel"]) * np.sqrt(2 / 4), rtol=1e-6
    )
    assert bare(model, biases=False).layers[0].bias is None
    assert model.layers[0].bias is not None


def test_the_gradient_passes_straight_through(x64):
    """Differences of the loss of w f (1[p_0 > 1/2] + p - p_0) and of l2 p^2 around p_0, in float64."""
    network = pure_classifier(bare(FullyConnected([4, 5, 3], rngs=nnx.Rngs(0)), biases=False))
    weights = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), signed_constants(network.params))
    inputs, labels = examples(np.float64)
    random = np.random.default_rng(1)
    scores = jax.tree.map(lambda w: random.uniform(size=w.shape), weights)
    flags = jax.tree.map(np.array, random_mask(jax.random.key(0), weights, 25))
    # A hidden unit without inputs would sit in the kink of ReLU.
    scores["layers"]["0"]["kernel"][0], flags["layers"]["0"]["kernel"][0] = 0.75, True
    objective = score_objective(network, l2=0.1)
    batch, key = (jnp.asarray(inputs), jnp.asarray(labels)), jax.random.key(0)
    state = (flags, weights, jax.tree.map(lambda w: None, weights), network.state)
    gradient = jax.grad(lambda p: objective(p, state, batch, key)[0])(scores)

    def surrogate(moved):
        parts = weights, flags, scores, moved
        gates = jax.tree.map(lambda w, f, p0, p: np.asarray(w * f * ((p0 > 0.5) + p - p0)), *parts)
        hidden = np.maximum(inputs @ gates["layers"]["0"]["kernel"], 0)
        logits = hidden @ gates["layers"]["1"]["kernel"]
        loss = -log_softmax(logits, axis=1)[np.arange(11), labels].mean()
        return loss + 0.1 * sum(np.sum(np.square(p)) for p in jax.tree.leaves(moved))

    for layer in ("0", "1"):
        shape = scores["layers"][layer]["kernel"].shape
        expected = np.zeros(shape)
        for index in np.ndindex(shape):
            ends = []
            for sign in (1, -1):
                moved = jax.tree.map(np.array, scores)
                moved["layers"][layer]["kernel"][index] += sign * 1e-6
                ends.append(surrogate(moved))
            expected[index] = (ends[0] - ends[1]) / 2e-6
        np.testing.assert_allclose(gradient["layers"][layer]["kernel"], expected, rtol=1e-5, atol=1e-8)


def test_the_search_is_the_recipe_in_numpy():
    """One layer, 7 epochs of 3 batches, drops after 2, 4 and 6 epochs; scores leave [0, 1] and come back."""
    model, (inputs, labels) = bare(FullyConnected([4, 3], rngs=nnx.Rngs(0)), biases=False), examples()
    settings = RareGems(epochs=7, batch_size=4, learning_rate=0.5, l2=0.01, drop_every=2)
    num_kept, key = 5, jax.random.key(3)
    found = search(model, (inputs, labels), key, num_kept, settings)[1]["layers"]["0"]["kernel"]

    score_key, order_key = jax.random.split(key)
    weights = np.float64(kernels(model)["layers"]["0"]["kernel"])
    (leaf_key,) = jax.random.split(score_key, 1)
    scores = np.float64(jax.random.uniform(leaf_key, (4, 3)))
    flags, momentum, step, left = np.ones((4, 3), bool), np.zeros((4, 3)), 0, False
    share = 1 - (num_kept / 12) ** (1 / 3)
    for epoch in range(7):
        if epoch > 0 and epoch % 2 == 0:
            drop = math.ceil(share * flags.sum()) if epoch < 6 else flags.sum() - num_kept
            for _, index in sorted((scores.flat[i], i) for i in np.flatnonzero(flags))[:drop]:
                flags.flat[index] = False
        order = np.asarray(jax.random.permutation(jax.random.fold_in(order_key, epoch), 11))
        for chosen in (order[:4], order[4:8], order[8:]):
            left |= bool(((scores < 0) | (scores > 1)).any())
            scores = np.clip(scores, 0, 1)
            logits = inputs[chosen] @ (weights * flags * (scores > 0.5))
            slope = (softmax(logits, axis=1) - np.eye(3)[labels[chosen]]) / len(chosen)
            momentum = 0.9 * momentum + weights * flags * (inputs[chosen].T @ slope) + 0.02 * scores
            scores = scores - 0.25 * (1 + math.cos(math.pi * step / 21)) * momentum
            step += 1
    assert left
    np.testing.assert_array_equal(found, flags)
    assert found.sum() == num_kept


class NormalizedOutputs(nnx.Module):
    """A dense layer and batch norm."""

    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 3, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(3, momentum=0.5, use_scale=False, use_bias=False, rngs=rngs)

    def __call__(self, inputs):
        return self.norm(self.dense(inputs))


def test_the_model_has_the_running_statistics_of_its_scores():
    """With scores that stay as they are, and one batch, these are its mean and variance."""
    (inputs, labels), model = examples(), NormalizedOutputs(nnx.Rngs(0))
    settings = RareGems(epochs=30, batch_size=11, learning_rate=1e-12, l2=0.0, drop_every=30)
    scores, _, found = search(model, (inputs, labels), jax.random.key(0), 6, settings)
    weights = np.asarray(kernels(model)["dense"]["kernel"])
    outputs = inputs @ (weights * (np.asarray(scores["dense"]["kernel"]) > 0.5))
    np.testing.assert_allclose(found.norm.mean, outputs.mean(0), atol=1e-5)
    np.testing.assert_allclose(found.norm.var, outputs.var(0), rtol=1e-4)
    np.testing.assert_array_equal(found.dense.kernel, weights)


def test_everything_is_kept_at_sparsity_zero():
    model = bare(FullyConnected([4, 3], rngs=nnx.Rngs(0)), biases=False)
    found = search(model, examples(), jax.random.key(0), 12, RareGems(epochs=3, drop_every=1))[1]
    assert jax.tree.all(jax.tree.map(np.array_equal, found, keep_all(kernels(model))))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
        ({"drop_every": 0}, "drop_every must be an integer of at least 1, got 0"),
        ({"l2": -1.0}, "l2 must be finite and at least 0, or None, got -1.0"),
        ({"learning_rate": 0.0}, "learning_rate must be finite and above 0, got 0.0"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
    ],
)
def test_settings_outside_their_range_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        RareGems(**changed)


@pytest.mark.parametrize(
    ("change", "num_kept", "name"),
    [({"l2": 1e-2}, 9, "l2"), ({"drop_every": 2}, 9, "drop_every"), ({}, 8, "num_kept")],
)
def test_a_checkpoint_of_another_search_is_refused(tmp_path, change, num_kept, name):
    model, settings = FullyConnected([4, 5, 3], rngs=nnx.Rngs(0)), RareGems(epochs=3, drop_every=1, l2=0.0)
    search(model, examples(), jax.random.key(0), 9, settings, checkpoint=tmp_path)
    other = replace(settings, **change)
    with pytest.raises(ValueError, match=f"of another problem: .*{name}.* differ"):
        search(model, examples(), jax.random.key(0), num_kept, other, checkpoint=tmp_path)
    model = FullyConnected([4, 5, 3], rngs=nnx.Rngs(1))  # the scores begin alike
    with pytest.raises(ValueError, match=r"of another problem: .*start.* differ"):
        search(model, examples(), jax.random.key(0), 9, settings, checkpoint=tmp_path)
