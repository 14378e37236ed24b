"""Training of whole models: batch norm by hand, augmentation against all crops, and interruption."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlimit import data, magnitude_mask
from jaxlimit.core.trees import partition
from jaxlimit.models import FullyConnected, from_nnx
from jaxlimit.training import classification_loss, train, train_model
from jaxlimit.training.schedule import steps_per_epoch

SETTINGS = {"epochs": 4, "batch_size": 8, "learning_rate": 0.1, "l1": 1e-3}


class Normalized(nnx.Module):
    """Batch norm, dropout, and a dense layer."""

    def __init__(self, rngs):
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.25, rngs=rngs)
        self.dense = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, inputs):
        return self.dense(self.dropout(self.norm(inputs)))


def examples(count=24):
    rng = np.random.default_rng(0)
    inputs = rng.normal(3, 2, (count, 4)).astype(np.float32)
    return inputs, rng.integers(0, 3, count)


def noisy(key, inputs):
    return inputs + jax.random.normal(key, inputs.shape)


def leaves(model):
    return [np.asarray(x) for x in jax.tree.leaves(nnx.state(model, nnx.Not(nnx.RngKey)))]


def test_without_state_it_is_train_to_the_bit():
    model, arrays, key = FullyConnected([4, 8, 3], rngs=nnx.Rngs(0)), examples(), jax.random.key(1)
    predict, params = from_nnx(model)
    expected = train(classification_loss(predict), params, arrays, key, **SETTINGS)
    found = from_nnx(train_model(model, arrays, key, **SETTINGS))[1]
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_with_a_mask_it_is_train_with_that_mask_to_the_bit():
    model, arrays, key = FullyConnected([4, 8, 3], rngs=nnx.Rngs(0)), examples(), jax.random.key(1)
    predict, params = from_nnx(model)
    mask = magnitude_mask(partition(params)[0], 0.6)
    settings = SETTINGS | {"weight_decay": 0.01, "mask": mask}
    expected = train(classification_loss(predict), params, arrays, key, **settings)
    found = from_nnx(train_model(model, arrays, key, **settings))[1]
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert sum(int((leaf == 0).sum()) for leaf in jax.tree.leaves(partition(found)[0])) == int(0.6 * 56)


def test_batch_norm_follows_the_batches_and_the_model_is_left_alone():
    """One batch a step: running mean m_t = .9 m_{t-1} + .1 mean of the batch, whatever the weights."""
    model, (inputs, labels) = Normalized(nnx.Rngs(0)), examples()
    trained = train_model(
        model, (inputs, labels), jax.random.key(0), epochs=3, batch_size=24, learning_rate=0.1
    )
    share = 1 - 0.9**3
    np.testing.assert_allclose(trained.norm.mean.get_value(), share * inputs.mean(0), rtol=1e-5)
    np.testing.assert_allclose(trained.norm.var.get_value(), 0.9**3 + share * inputs.var(0), rtol=1e-4)
    assert not model.norm.mean.get_value().any()
    np.testing.assert_array_equal(model.norm.scale.get_value(), 1)
    # Prediction is in evaluation mode: with the running statistics, without dropout.
    predict, params = from_nnx(trained)
    np.testing.assert_array_equal(predict(params, inputs), predict(params, inputs))


def test_every_image_is_one_of_its_crops():
    images = np.random.default_rng(0).normal(size=(40, 6, 5, 2)).astype(np.float32)
    found = np.asarray(data.random_crop_and_flip(jax.random.key(0), jnp.asarray(images), padding=2))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    places = []
    for index, image in enumerate(found):
        crops = {
            (y, x, flip): padded[index, y : y + 6, x : x + 5][:, :: -1 if flip else 1]
            for y in range(5)
            for x in range(5)
            for flip in (False, True)
        }
        places.append([place for place, crop in crops.items() if np.array_equal(crop, image)])
    assert all(len(place) == 1 for place in places)
    rows, columns, flips = (set(values) for values in zip(*(place[0] for place in places), strict=True))
    assert rows == columns == set(range(5))
    assert flips == {False, True}
    unchanged = data.random_crop_and_flip(jax.random.key(1), jnp.asarray(images), padding=0)
    mirrored = np.array([not np.array_equal(a, b) for a, b in zip(unchanged, images, strict=True)])
    assert 8 < mirrored.sum() < 32


def test_augmentation_changes_every_epoch_and_repeats_with_the_key():
    seen = []

    def augment(key, inputs):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), jax.random.uniform(key))
        return inputs

    model, arrays = FullyConnected([4, 3], rngs=nnx.Rngs(0)), examples()
    train_model(model, arrays, jax.random.key(0), augment=augment, **SETTINGS)
    jax.effects_barrier()
    first, seen[:] = sorted(map(float, seen)), []
    assert len(set(first)) == len(first) == 4 * 3
    train_model(model, arrays, jax.random.key(0), augment=augment, **SETTINGS)
    jax.effects_barrier()
    assert sorted(map(float, seen)) == first


@pytest.mark.parametrize("epoch", [pytest.param(0, marks=pytest.mark.nightly), 2])
def test_interrupted_training_goes_on_to_the_same_bits(tmp_path, epoch):
    model, arrays, key = Normalized(nnx.Rngs(0)), examples(), jax.random.key(1)
    expected = leaves(train_model(model, arrays, key, **SETTINGS))

    def interrupt(now, loss):
        if now == epoch:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_model(model, arrays, key, checkpoint=tmp_path, on_epoch=interrupt, **SETTINGS)
    epochs = []
    trained = train_model(
        model, arrays, key, checkpoint=tmp_path, on_epoch=lambda now, _: epochs.append(now), **SETTINGS
    )
    assert epochs == list(range(epoch + 1, 4))
    for a, b in zip(leaves(trained), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    again = train_model(model, arrays, key, checkpoint=tmp_path, **SETTINGS)  # nothing is left to do
    np.testing.assert_array_equal(leaves(again)[0], expected[0])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"learning_rate": 0.2}, "learning_rate"),
        ({"augment": noisy}, "augment"),
        ({"epochs": 5}, "epochs"),
        ({"l1": 0.0}, "l1"),
        ({"key": jax.random.key(2)}, "key"),
        ({"arrays": (examples()[0] + 1, examples()[1])}, "arrays"),
        ({"arrays": (examples()[0], np.roll(examples()[1], 1))}, "arrays"),
        ({"model": FullyConnected([4, 3], rngs=nnx.Rngs(1))}, "start"),
    ],
)
def test_a_checkpoint_of_other_training_is_refused(tmp_path, change, name):
    model = FullyConnected([4, 3], rngs=nnx.Rngs(0))
    usual = {"model": model, "arrays": examples(), "key": jax.random.key(1), **SETTINGS, "epochs": 1}
    train_model(checkpoint=tmp_path / "usual", **usual)
    train_model(checkpoint=tmp_path / "changed", **(usual | change))
    with pytest.raises(ValueError, match=f"of another problem: .*{name}.* differ"):
        train_model(checkpoint=tmp_path / "usual", **(usual | change))
    with pytest.raises(ValueError, match=f"of another problem: .*{name}.* differ"):
        train_model(checkpoint=tmp_path / "changed", **usual)


def test_a_checkpoint_of_another_schedule_is_refused(tmp_path):
    """That differs from the first in its last update only."""
    train, rates = partial(train_model, FullyConnected([4, 3], rngs=nnx.Rngs(0))), []
    usual = {"arrays": examples(), "key": jax.random.key(1), **SETTINGS, "epochs": 2}
    updates = 2 * steps_per_epoch(len(usual["arrays"][1]), SETTINGS["batch_size"])
    for last in (updates, updates - 1):
        rates.append(optax.piecewise_constant_schedule(0.1, {last: 0.5}))
    train(checkpoint=tmp_path, **(usual | {"learning_rate": rates[0]}))
    train(checkpoint=tmp_path, **(usual | {"learning_rate": rates[0]}))
    with pytest.raises(ValueError, match="of another problem: learning_rate differ"):
        train(checkpoint=tmp_path, **(usual | {"learning_rate": rates[1]}))
