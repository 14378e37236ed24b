"""Smart-Ratio's layers against numbers by hand and against the recipe in exact fractions."""

import math
from fractions import Fraction

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, given
from hypothesis import strategies as st

from jaxlimit.baselines.ratios import SmartRatio, forward_order, layer_masks, layer_sizes, ratio_counts
from jaxlimit.models import Convolution, ConvolutionalNetwork, FullyConnected


def recipe_counts(sizes, dense, num_kept, vgg):
    """The recipe, rounding every layer down, in fractions; None where it does not apply."""
    scores = []
    for layer in range(1, len(sizes) + 1):
        score = Fraction((len(sizes) - layer + 1) ** 2 + (len(sizes) - layer + 1))
        scores.append(score / layer**2 if vgg else score)
    in_dense = sum(size for size, is_dense in zip(sizes, dense, strict=True) if is_dense)
    budget = num_kept - math.floor(Fraction(3, 10) * in_dense)
    norm = sum(m * r for m, r, is_dense in zip(sizes, scores, dense, strict=True) if not is_dense)
    counts, surplus = [], Fraction(0)
    for size, score, is_dense in zip(sizes, scores, dense, strict=True):
        if is_dense:
            counts.append(math.floor(Fraction(3, 10) * size))
            continue
        wanted = Fraction(budget) * size * score / norm + surplus
        surplus = max(wanted - size, Fraction(0))
        counts.append(math.floor(min(wanted, Fraction(size))))
    return None if budget < 0 or surplus else counts


def test_a_small_network_by_hand():
    """Two 3x3 convolutions of 4 channels on one, dense 4: L = 3, m = 36, 144, 16 and r = 12, 6.

    Of 196 weights 40 stay at s = .8. The dense layer keeps floor(4.8) = 4, kappa = 36 / (36 * 12 + 144 * 6),
    so the first convolution gets 36 * 432 / 1296 = 12 and the second 24.
    """
    layers = [Convolution(4), Convolution(4)]
    model = ConvolutionalNetwork(layers, [], 4, image_shape=(5, 5, 1), rngs=nnx.Rngs(0))
    assert list(layer_sizes(model, 40, SmartRatio()).values()) == [12, 24, 4]
    # Divided by l^2 the second score is 1.5: 36 * 432 / 648 = 24 and 12.
    assert list(layer_sizes(model, 40, SmartRatio(vgg=True)).values()) == [24, 12, 4]


def test_the_surplus_is_carried_by_hand():
    """VGG-like, m = 10, 40, 100, 10 (dense): r = 20, 12 / 4 = 3, 6 / 9 = 2/3, their sum with m 386.67.

    For 63 weights 60 are left: the first layer wants 60 * 200 / 386.67 = 31.03 and keeps all of its 10, the
    second wants 18.62 and gets 21.03 more: 39.66, the third 10.34. Rounded down 10, 39, 10, 3; the one that
    is missing goes to the second, which lost most.
    """
    assert ratio_counts([10, 40, 100, 10], [False] * 3 + [True], 63, vgg=True) == [10, 40, 10, 3]


@given(
    st.lists(st.tuples(st.integers(1, 500), st.booleans()), min_size=1, max_size=8),
    st.floats(0, 1),
    st.booleans(),
)
def test_counts_are_those_of_the_recipe_and_the_total_is_exact(layers, density, vgg):
    sizes, dense = [size for size, _ in layers], [is_dense for _, is_dense in layers]
    num_kept = round(density * sum(sizes))
    assume(not all(dense))
    expected = recipe_counts(sizes, dense, num_kept, vgg)
    assume(expected is not None)
    found = ratio_counts(sizes, dense, num_kept, vgg=vgg)
    assert sum(found) == num_kept
    assert all(0 <= count <= size for count, size in zip(found, sizes, strict=True))
    assert all(count - least in (0, 1) for count, least in zip(found, expected, strict=True))


@pytest.mark.parametrize("num_kept", [29, 171])
def test_what_no_layer_sizes_can_give_is_refused(num_kept):
    """The dense layer keeps 30 of 100 whatever is asked for, so 30 to 130 are possible."""
    message = rf"cannot keep {num_kept} of 200 weights, only 30 to 130 with dense_density 0\.3"
    with pytest.raises(ValueError, match=message):
        ratio_counts([100, 100], [False, True], num_kept)


class Backwards(nnx.Module):
    """Layers whose names sort in the wrong order."""

    def __init__(self, rngs):
        self.stem = nnx.Linear(1, 2, rngs=rngs)
        self.blocks = nnx.List([FullyConnected([2, 1, 1], rngs=rngs)])
        self.a = nnx.Linear(1, 1, rngs=rngs)


def test_layers_come_in_the_order_of_their_definition():
    names = [".".join(name[:-1]) for name in forward_order(Backwards(nnx.Rngs(0)))]
    assert names == ["stem", "blocks.0.layers.0", "blocks.0.layers.1", "a"]


def test_only_the_last_dense_layer_is_fixed_where_asked_for():
    model = FullyConnected([10, 10, 10], rngs=nnx.Rngs(0))
    assert list(layer_sizes(model, 50, SmartRatio(fixed="last")).values()) == [20, 30]
    with pytest.raises(ValueError, match="only 60 to 60"):
        layer_sizes(model, 50, SmartRatio())


def test_random_tickets_are_random_and_hybrid_ones_the_largest():
    weights = {"a": np.arange(6.0) - 2.5, "b": np.array([3.0, -4.0, 1.0])}
    counts = {("a",): 2, ("b",): 1}
    largest = layer_masks(weights, counts, None)
    assert np.flatnonzero(largest["a"]).tolist() == [0, 5]
    assert np.flatnonzero(largest["b"]).tolist() == [1]
    drawn = [layer_masks(weights, counts, jax.random.key(seed)) for seed in range(8)]
    assert {int(mask["a"].sum()) for mask in drawn} == {2}
    assert {int(mask["b"].sum()) for mask in drawn} == {1}
    assert len({tuple(np.flatnonzero(mask["a"]).tolist()) for mask in drawn}) > 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dense_density": 1.5}, "dense_density must be from 0 to 1, got 1.5"),
        ({"fixed": "first"}, "fixed must be dense or last, got first"),
    ],
)
def test_settings_outside_their_range_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        SmartRatio(**changed)
