"""GReg against its updates, written out in NumPy."""

import jax
import numpy as np
import pytest
from flax import nnx

from jaxlimit.baselines import GReg, Recipe, greg
from jaxlimit.baselines.growing_regularization import Growth, grown
from jaxlimit.models import FullyConnected, from_nnx

INPUTS = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
LABELS = np.array([0, 1, 1, 0, 1, 0])


def regularized_descent(kernel, bias, leaving, regs, kept, rate, momentum):
    """Softmax regression on all examples, an update for each reg."""
    velocity, velocity_of_bias = np.zeros(kernel.shape), np.zeros(bias.shape)
    for reg in regs:
        logits = INPUTS @ kernel + bias
        p = np.exp(logits - logits.max(1, keepdims=True))
        error = (p / p.sum(1, keepdims=True) - np.eye(2)[LABELS]) / len(INPUTS)
        gradient = INPUTS.T @ error + np.where(leaving, reg, kept) * kernel
        velocity = momentum * velocity + gradient
        velocity_of_bias = momentum * velocity_of_bias + error.sum(0)
        kernel, bias = kernel - rate * velocity, bias - rate * velocity_of_bias
    return kernel, bias


def test_the_term_grows_in_steps_on_what_is_to_go_and_stays_at_its_height():
    model = FullyConnected([3, 2], rngs=nnx.Rngs(0))
    params = from_nnx(model)[1]["layers"]["0"]
    leaving = np.array([[True, False], [False, False], [True, True]])
    tree = {"layers": {"0": {"kernel": leaving, "bias": None}}}
    settings = GReg(learning_rate=0.1, every=2, batch_size=6)
    growth = Growth(epochs=5, stay=2, start=0.1, height=0.7, kept=-0.05)
    found = grown(model, (INPUTS, LABELS), jax.random.key(0), tree, growth, settings)
    # Five updates are three steps of .2.
    regs = [0.3, 0.3, 0.5, 0.5, 0.7, 0.7, 0.7]
    start = np.asarray(params["kernel"], float), np.asarray(params["bias"], float)
    kernel, bias = regularized_descent(*start, leaving, regs, -0.05, 0.1, 0.9)
    after = from_nnx(found)[1]["layers"]["0"]
    np.testing.assert_allclose(after["kernel"], kernel, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(after["bias"], bias, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(from_nnx(model)[1]["layers"]["0"]["kernel"], params["kernel"])


@pytest.mark.parametrize("choose_first", [True, False])
def test_the_smallest_weights_are_chosen_before_or_after_the_term_has_grown_on_all(choose_first, monkeypatch):
    calls = []

    def recorded(model, arrays, key, leaving, growth, settings, **_):
        calls.append((leaving["layers"]["0"]["kernel"], growth))
        if not choose_first and len(calls) == 1:  # what the term makes of them
            model = nnx.clone(model)
            kernel = model.layers[0].kernel
            kernel[...] = kernel[...].at[0, 0].set(0.0)
        return model

    monkeypatch.setattr("jaxlimit.baselines.growing_regularization.grown", recorded)
    short = Recipe(epochs=1, learning_rate=1e-6)
    settings = GReg(choose_first, short, 3, 2, 4, finetune=short)
    model = FullyConnected([3, 2], rngs=nnx.Rngs(0))
    kernel = np.abs(np.array(model.layers[0].kernel[...]))
    (network,) = greg(model, (INPUTS, LABELS), jax.random.key(0), [0.5], settings)
    if not choose_first:
        everything, growth = calls[0]
        assert np.all(everything)
        assert growth == Growth(4, 0, 0.0, 0.01, 0.0)
        kernel[0, 0] = 0.0
    smallest = kernel <= np.sort(kernel.ravel())[2]
    np.testing.assert_array_equal(calls[-1][0], smallest)
    assert calls[-1][1] == (Growth(3, 2, 0.0, 1.0, 0.0) if choose_first else Growth(3, 2, 0.01, 1.0, -1e-4))
    np.testing.assert_array_equal(network.mask["layers"]["0"]["kernel"], ~smallest)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"grow_epochs": 0}, "grow_epochs must be an integer of at least 1, got 0"),
        ({"height": 0.0}, "height must be positive and finite"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1"),
        ({"kept": np.nan}, "kept must be finite"),
    ],
)
def test_settings_outside_their_range_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        GReg(**changed)
