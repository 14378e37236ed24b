"""What holds for every method: exact counts, zeros that stay zero, and the same bits after a kill."""

import jax
import numpy as np
import pytest
from flax import nnx, traverse_util

from jaxlimit import models
from jaxlimit.baselines import (
    GReg,
    IterativePruning,
    RareGems,
    ReadjustedPruning,
    Recipe,
    SmartRatio,
    dense,
    greg,
    iterative_pruning,
    lomp,
    random_pruning,
    rare_gems,
    readjusted_pruning,
    smart_ratio,
)
from jaxlimit.baselines.network import bare

RECIPE = Recipe(epochs=2, batch_size=12, learning_rate=0.05)
METHODS = {
    "dense": (dense, RECIPE),
    "lomp": (lomp, Recipe(epochs=2, batch_size=12, learning_rate=0.05, l1=1e-3)),
    "random": (random_pruning, RECIPE),
    "smart-ratio": (smart_ratio, SmartRatio(fixed="last", recipe=RECIPE)),
    "hybrid": (smart_ratio, SmartRatio(fixed="last", hybrid=True, recipe=RECIPE)),
    "rare-gems": (rare_gems, RareGems(epochs=3, batch_size=12, drop_every=1, finetune=RECIPE)),
    "greg-2": (greg, GReg(False, RECIPE, 2, 1, 2, batch_size=12, finetune=RECIPE)),
    "prune": (readjusted_pruning, ReadjustedPruning(RECIPE, max_products=10)),
    "imp": (iterative_pruning, IterativePruning(0.5, rewind_steps=2, recipe=RECIPE)),
}
SPARSITIES = [0.75]
KEPT = [13]  # of 50


class NormalizedHidden(nnx.Module):
    """Batch norm between two dense layers: 4 * 5 + 5 * 6 = 50 weights."""

    def __init__(self, rngs):
        self.first = nnx.Linear(4, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.last = nnx.Linear(5, 6, rngs=rngs)

    def __call__(self, inputs):
        return self.last(nnx.relu(self.norm(self.first(inputs))))


def run(name, sparsities=None, **options):
    method, settings = METHODS[name]
    random = np.random.default_rng(0)
    arrays = random.normal(size=(24, 4)).astype(np.float32), random.integers(0, 6, 24)
    asked = sparsities or ([0.0] if name == "dense" else SPARSITIES)
    return method(NormalizedHidden(nnx.Rngs(0)), arrays, jax.random.key(0), asked, settings, **options)


@pytest.fixture(scope="module")
def finished():
    """Every method once, uninterrupted; and how many epochs it took."""
    found = {}
    for name in METHODS:
        epochs = []
        found[name] = run(name, on_epoch=lambda *seen, epochs=epochs: epochs.append(seen)), len(epochs)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_counts_are_exact_and_what_is_removed_is_zero(finished, name):
    networks, _ = finished[name]
    assert [network.num_kept for network in networks] == ([50] if name == "dense" else KEPT)
    for network in networks:
        weights, mask = (traverse_util.flatten_dict(tree, sep=".") for tree in (network.params, network.mask))
        assert {key for key, keep in mask.items() if keep is not None} == {"first.kernel", "last.kernel"}
        for key, keep in mask.items():
            if keep is not None:
                assert keep.shape == weights[key].shape
                assert not np.asarray(weights[key])[~np.asarray(keep)].any()
                assert np.asarray(weights[key])[np.asarray(keep)].all()
        assert network.rounds[0] == 50
        assert network.rounds[-1] == network.num_kept
        assert network.sparsity == pytest.approx(1 - network.num_kept / 50)
        assert {key: count for key, (count, _) in network.layers.items()} == {
            key: int(mask[key].sum()) for key in ("first.kernel", "last.kernel")
        }
        assert network.collapsed == []
        logits = network.predict(network.params, np.ones((2, 4), np.float32))
        assert np.isfinite(logits).all()


# The others are trained by the same calls.
@pytest.mark.parametrize("name", ["lomp", "random", "hybrid", "rare-gems", "greg-2", "prune", "imp"])
def test_a_killed_run_goes_on_to_the_same_bits(finished, name, tmp_path):
    """Killed in its second half."""
    networks, epochs = finished[name]
    seen = []

    def kill(epoch, mean_loss):
        seen.append(epoch)
        if len(seen) == epochs // 2 + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(name, checkpoint=tmp_path, on_epoch=kill)
    rest = []
    resumed = run(name, checkpoint=tmp_path, on_epoch=lambda *seen: rest.append(seen))
    assert len(rest) == epochs - len(seen)
    for network, again in zip(networks, resumed, strict=True):
        for tree, other in ((network.params, again.params), (network.mask, again.mask)):
            for leaf, found in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
                np.testing.assert_array_equal(leaf, found)
        assert network.rounds == again.rounds


@pytest.mark.parametrize("name", METHODS)
def test_bad_sparsities_are_refused_before_any_training(name):
    def never(*_):
        raise AssertionError("training has begun")

    for sparsities in ([1.0], [-0.5], [0.5, 2.0]):
        with pytest.raises(ValueError, match=r"sparsit(y|ies)"):
            run(name, sparsities, on_epoch=never)


def test_a_layer_that_keeps_nothing_is_reported():
    """One weight of 50 cannot be in both layers."""
    (network,) = run("random", [0.98])
    assert network.num_kept == 1
    assert len(network.collapsed) == 1
    assert network.layers[network.collapsed[0]][0] == 0


def test_networks_without_affine_parameters_are_normalised_all_the_same():
    model = NormalizedHidden(nnx.Rngs(0))
    names = traverse_util.flatten_dict(models.from_nnx(bare(model, biases=True))[1], sep=".").keys()
    assert names == {"first.kernel", "first.bias", "last.kernel", "last.bias"}
    stripped = bare(model, biases=False)
    assert models.from_nnx(stripped)[1].keys() == {"first", "last"}
    stripped.train()
    inputs = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    hidden = np.float64(inputs) @ np.float64(model.first.kernel[...])
    hidden = (hidden - hidden.mean(0)) / np.sqrt(hidden.var(0) + 1e-5)
    expected = np.maximum(hidden, 0) @ np.float64(model.last.kernel[...])
    np.testing.assert_allclose(stripped(inputs), expected, rtol=1e-3, atol=1e-4)
    assert model.norm.scale is not None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"schedule": "linear"}, "schedule must be one of constant, cosine, steps, got linear"),
        (
            {"milestones": (80, 120)},
            r"milestones must be one or more shares of the epochs, from 0 to 1, got \(80, 120\)",
        ),
        ({"warmup_epochs": 200}, "warmup_epochs must be at most epochs = 160, got 200"),
        ({"weight_decay": -1.0}, "weight_decay must be finite and at least 0, got -1.0"),
        ({"learning_rate": np.inf}, "learning_rate must be positive and finite, got inf"),
        ({"momentum": 1.0}, "momentum must be at least 0 and below 1, got 1.0"),
    ],
)
def test_recipes_outside_their_range_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**changed)


def test_a_training_of_one_epoch_has_its_whole_learning_rate():
    rate = Recipe(epochs=1).rate(1280)
    assert [float(rate(step)) for step in range(10)] == pytest.approx([0.1] * 10)
    from_the_start = Recipe(epochs=1, milestones=(0.0,)).rate(1280)
    assert float(from_the_start(1)) == pytest.approx(0.01)
