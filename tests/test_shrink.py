"""The smaller network against the pruned one, run as it is: outputs, and sizes by the units that are left."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlimit import apply_mask, batched, hessian, magnitude_mask, models, pruning_limit, shrink
from jaxlimit.baselines.network import bare
from jaxlimit.core.jaxprs import multiplications
from jaxlimit.core.trees import flatten, partition
from jaxlimit.geometry.magnitude import magnitude_order
from jaxlimit.models.convolutional import Convolution, ConvolutionalNetwork, Pool


def encoder(rngs):
    sizes = {"width": 12, "num_heads": 4, "num_layers": 2, "inner": 10}
    return models.SentenceEncoder(30, 6, **sizes, rngs=rngs)


def convolutional(normalize, padding, rngs):
    layers = [Convolution(6, padding=padding), Pool(), Convolution(8, padding=padding), Convolution(5, 1)]
    shape = {"image_shape": (12, 12, 2), "normalize": normalize}
    return ConvolutionalNetwork(layers, [7], 3, **shape, rngs=rngs)


def sequential(rngs):
    convolutions = nnx.Conv(2, 6, (3, 3), rngs=rngs), nnx.relu, nnx.Conv(6, 5, (3, 3), rngs=rngs), nnx.tanh
    return nnx.Sequential(*convolutions, nnx.Linear(5, 4, rngs=rngs), nnx.gelu, nnx.Linear(4, 2, rngs=rngs))


IMAGES = (5, 12, 12, 2)
NETWORKS = {
    "fully connected": (lambda rngs: models.FullyConnected([8, 9, 7, 3], rngs=rngs), (5, 8)),
    "convolutions": (lambda rngs: convolutional(False, 0, rngs), IMAGES),
    "padded": (lambda rngs: convolutional(False, 1, rngs), IMAGES),
    "batch norm": (lambda rngs: convolutional(True, 1, rngs), IMAGES),
    "resnet": (lambda rngs: models.ResNet(18, 3, width=4, image_shape=(8, 8, 2), rngs=rngs), (5, 8, 8, 2)),
    "vgg16": (lambda rngs: models.VGG(16, rngs=rngs), (1, 32, 32, 3)),
    "sequential": (sequential, IMAGES),
    "encoder": (encoder, None),
}


def made(name, seed):
    """The network with biases, shifts and running statistics that are no zeros and ones; and inputs."""
    make, shape = NETWORKS[name]
    model, rng = make(nnx.Rngs(seed)), np.random.default_rng(seed)
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.Param | nnx.BatchStat) and variable.get_value().ndim == 1:
            values = rng.normal(size=variable.get_value().shape)
            positive = isinstance(variable, nnx.BatchStat)
            variable.set_value(jnp.asarray(np.abs(values) + 0.3 if positive else values, jnp.float32))
    if shape is None:
        return model, jnp.asarray(rng.integers(1, 30, (5, 6)))
    return model, jnp.asarray(rng.normal(size=shape), jnp.float32)


def random_units(model, weights, share, rng):
    """A mask that takes out so many of the units of every label at random."""
    labels = models.unit_labels(model, weights)
    gone = rng.random(int(flatten(labels).max()) + 1) < share
    return jax.tree.map(lambda x: ~gone[x], labels)


LONG = ("resnet", "encoder", "convolutions", "vgg16")  # to compile, operation by operation
SMALL = ("encoder", 0.9)  # soon compiled, for little is left


def marks(name, share):
    """When a test of it runs."""
    return [pytest.mark.nightly] if (share > 0.5 or name in LONG) and (name, share) != SMALL else []


UNITS = [
    pytest.param(name, share, marks=marks(name, share))
    for name in NETWORKS
    if name != "sequential"
    for share in ((0.5,) if name == "vgg16" else (0.5, 0.9))
]


@pytest.mark.parametrize(("name", "share"), UNITS)
def test_outputs_stay_where_units_go(name, share):
    model, inputs = made(name, 0)
    predict, params = models.from_nnx(model)
    chosen = (lambda path, leaf: np.ndim(leaf) > 1 and path[0].key == "layers") if name == "encoder" else None
    weights, _ = partition(params, chosen) if chosen else partition(params)
    mask = random_units(model, weights, share, np.random.default_rng(1))
    pruned = apply_mask(params, mask)
    small = shrink(model, pruned)
    expected = predict(pruned, inputs)
    np.testing.assert_allclose(small.predict(small.params, inputs), expected, rtol=2e-4, atol=2e-5)
    assert small.num_params < 0.85 * small.dense_num_params
    assert small.num_params == flatten(small.params).size
    assert multiplications(small.predict, small.params, inputs) < multiplications(predict, params, inputs)
    again = shrink(small.model, small.params)
    assert again.num_params == small.num_params  # nothing is left to take out
    by_mask = shrink(model, params, mask)
    np.testing.assert_array_equal(flatten(by_mask.params), flatten(small.params))
    assert flatten(params).size == small.dense_num_params  # the model is as it was


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=marks(name, 0)) for name in NETWORKS if name != "vgg16"],
)
def test_outputs_stay_where_nothing_or_everything_goes(name):
    model, inputs = made(name, 2)
    predict, params = models.from_nnx(model)
    whole = shrink(model, params)
    assert whole.num_params == whole.dense_num_params
    np.testing.assert_array_equal(whole.predict(whole.params, inputs), predict(params, inputs))
    for sparsity in (0.8, 1.0):  # single weights; then none is left
        mask = magnitude_mask(partition(params)[0], sparsity)
        pruned, small = apply_mask(params, mask), shrink(model, params, mask)
        outputs = small.predict(small.params, inputs)
        if sparsity == 1 and name == "encoder":  # its embeddings have length 0 / 0 without tables
            continue
        np.testing.assert_allclose(outputs, predict(pruned, inputs), rtol=2e-4, atol=2e-5)
    assert small.num_params < whole.num_params


def test_widths_are_those_of_the_units_that_are_left():
    """Units 0 and 1 of nine are made by zeros, 2 is read by none; then 3 of the next layer has no input."""
    model, inputs = made("fully connected", 3)
    predict, params = models.from_nnx(model)
    layers = params["layers"]
    first, second = np.array(layers["0"]["kernel"]), np.array(layers["1"]["kernel"])
    first[:, :2] = 0
    second[2] = 0
    second[3:, 3] = 0  # what is left of it reads the constants
    pruned = {
        "layers": {**layers, "0": {**layers["0"], "kernel": first}, "1": {**layers["1"], "kernel": second}}
    }
    small = shrink(model, pruned)
    assert small.model.widths == (8, 6, 6, 3)
    np.testing.assert_allclose(
        small.predict(small.params, inputs), predict(pruned, inputs), rtol=1e-5, atol=1e-5
    )
    assert multiplications(small.predict, small.params, inputs[:1]) == 8 * 6 + 6 * 6 + 6 * 3


def test_of_the_branches_of_a_condition_one_is_done():
    weights, x = jnp.ones((3, 4)), jnp.ones((2, 3))
    found = multiplications(
        lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: (x @ w) @ w.T @ w), weights, x
    )
    assert found == 3 * 24


def test_one_channel_carries_all_constants_into_a_convolution_that_pads():
    model, inputs = made("padded", 4)
    predict, params = models.from_nnx(model)
    kernel = np.array(params["convolutions"]["0"]["kernel"])
    kernel[..., :4] = 0
    bias = jnp.asarray([1.0, 2.0, -1.0, 0.5, 0.1, 0.2])
    pruned = {**params, "convolutions": {**params["convolutions"], "0": {"kernel": kernel, "bias": bias}}}
    small = shrink(model, pruned)
    assert small.model.layers[0].channels == 3  # two that compute, and one of the three that are not 0
    np.testing.assert_allclose(
        small.predict(small.params, inputs), predict(pruned, inputs), rtol=1e-4, atol=1e-5
    )


def test_labels_are_one_for_each_unit():
    counts = {
        "fully connected": 9 + 7,
        "convolutions": 6 + 8 + 5 + 7,
        "resnet": (4 + 8 + 16 + 32) + 2 * (4 + 8 + 16 + 32),  # streams; two blocks of a stage
        "encoder": (30 + 6 + 2) + 2 * (4 + 10),
    }
    for name, count in counts.items():
        model, _ = made(name, 0)
        weights, _ = partition(models.from_nnx(model)[1])
        labels = models.unit_labels(model, weights)
        assert jax.tree.map(np.shape, labels) == jax.tree.map(np.shape, weights)
        assert magnitude_order(weights, groups=labels).num_removals == count
    stream = models.unit_labels(*_resnet())
    first = stream["stem"]["convolution"]["kernel"][0, 0, 0]
    for block in ("0", "1"):
        np.testing.assert_array_equal(
            stream["blocks"][block]["layers"]["1"]["convolution"]["kernel"][0, 0, 0], first
        )
    last = stream["blocks"]["7"]["layers"]["1"]["convolution"]["kernel"][0, 0, 0]
    np.testing.assert_array_equal(stream["dense"]["kernel"][:, 0], last)


def _resnet():
    model, _ = made("resnet", 0)
    return model, partition(models.from_nnx(model)[1])[0]


def test_other_networks_are_refused():
    rngs = nnx.Rngs(0)
    unknown = nnx.Sequential(nnx.Linear(2, 2, rngs=rngs), lambda x: x[:, ::-1], nnx.Linear(2, 2, rngs=rngs))
    for model in (unknown, nnx.Sequential(nnx.BatchNorm(2, rngs=rngs)), nnx.LayerNorm(2, rngs=rngs)):
        with pytest.raises(ValueError, match="not known well enough to be made smaller"):
            shrink(model, models.from_nnx(model)[1])
        with pytest.raises(ValueError, match=r"the units of a .* are not known"):
            models.unit_labels(model, {"kernel": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match="a Squared is not known well enough"):
        shrink(Squared([2, 3, 1], rngs=rngs), models.from_nnx(Squared([2, 3, 1], rngs=rngs))[1])
    with pytest.raises(ValueError, match="the units of a Squared are not known"):
        models.unit_labels(Squared([2, 3, 1], rngs=rngs), {"kernel": jnp.ones((2, 2))})
    model, _ = made("fully connected", 0)
    with pytest.raises(ValueError, match="params must have the shapes of the model's"):
        shrink(model, {"layers": {}})
    with pytest.raises(ValueError, match=r"\['other'\] is no kernel of FullyConnected"):
        models.unit_labels(model, {"other": jnp.ones((2, 2))})


class Squared(models.FullyConnected):
    """Another function of the same arrays."""

    def __call__(self, inputs):
        return super().__call__(inputs) ** 2


def test_layers_that_are_not_what_they_look_like_are_refused():
    def linear(**options):
        return nnx.Linear(2, 2, rngs=nnx.Rngs(0), **options)

    def conv(**options):
        return nnx.Conv(2, 2, (3, 3), rngs=nnx.Rngs(0), **options)

    shared, last = linear(), linear()
    own = "of its own kind, or with a function or a mask of its own"
    two_places = "are one and the same"
    for layers, message in [
        ([nnx.LoRALinear(2, 2, lora_rank=1, rngs=nnx.Rngs(0)), nnx.relu, last], f"a LoRALinear {own}"),
        ([conv(mask=jnp.ones((3, 3, 2, 2))), nnx.relu, last], f"a Conv {own}"),
        ([linear(dot_general=centred), nnx.relu, last], f"a Linear {own}"),
        ([linear(dot_general=partial(jax.lax.dot_general, precision="high")), nnx.relu, last], own),
        ([last, nnx.relu, conv(conv_general_dilated=standardized)], f"layers.2 is a Conv {own}"),
        ([shared, nnx.relu, shared, nnx.relu, last], r"layers\.0 and layers\.2 are one and the same"),
        ([shared, nnx.relu, last, nnx.relu, shared], two_places),
        ([shared, nnx.relu, with_arrays(linear(), kernel=shared.kernel)], two_places),
        ([shared, nnx.relu, with_arrays(linear(), bias=shared.bias)], two_places),
    ]:
        model = nnx.Sequential(*layers)
        with pytest.raises(ValueError, match=message):
            shrink(model, models.from_nnx(model)[1])


def centred(left, right, *args, **keywords):
    return jax.lax.dot_general(left, right - jnp.mean(right), *args, **keywords)


def standardized(images, kernel, *args, **keywords):
    return jax.lax.conv_general_dilated(images, kernel - jnp.mean(kernel), *args, **keywords)


def with_arrays(layer, **arrays):
    for name, array in arrays.items():
        setattr(layer, name, array)
    return layer


class Gated(nnx.BatchNorm):
    def __call__(self, inputs, **keywords):
        return super().__call__(inputs, **keywords) ** 2


@pytest.mark.parametrize("call", [shrink, models.unit_labels])
def test_parts_of_our_networks_that_compute_something_else_are_refused(call):
    """Whatever the part, also where the whole is one of our networks as it stands."""

    def network():
        layers = [Convolution(4), Pool()]
        return ConvolutionalNetwork(
            layers, [36, 5], 3, image_shape=(8, 8, 1), normalize=True, rngs=nnx.Rngs(0)
        )

    head, norm, tied = network(), network(), models.FullyConnected([4, 4, 4, 4], rngs=nnx.Rngs(0))
    head.dense = Squared(list(head.dense.widths), rngs=nnx.Rngs(0))
    norm.norms[0] = Gated(4, rngs=nnx.Rngs(0))
    tied.layers[2] = tied.layers[0]
    for model, message in [
        (head, "dense is a Squared of its own kind"),
        (norm, r"norms\.0 is a Gated of its own kind"),
        (tied, r"layers\.0 and layers\.2 are one and the same"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(model, models.from_nnx(model)[1])


def test_constants_stay_before_a_convolution_that_dilates_its_input():
    """Between the pixels it reads 0, as beyond a border."""
    rngs = nnx.Rngs(0)
    dilates = nnx.Conv(4, 3, (3, 3), padding=0, input_dilation=2, rngs=rngs)
    model = nnx.Sequential(nnx.Conv(2, 4, (3, 3), rngs=rngs), nnx.relu, dilates)
    predict, params = models.from_nnx(model)
    kernel, bias = params["layers"]["0"]["kernel"], params["layers"]["0"]["bias"]
    params["layers"]["0"] = {"kernel": kernel.at[..., 1:3].set(0), "bias": bias.at[1:3].set([2.0, 3.0])}
    small, images = shrink(model, params), jax.random.normal(jax.random.key(1), (2, 8, 8, 2))
    assert small.num_params < small.dense_num_params
    np.testing.assert_allclose(
        small.predict(small.params, images), predict(params, images), rtol=1e-5, atol=1e-5
    )


def test_a_network_pruned_by_units_is_smaller():
    """From labels to a limit, a mask and the smaller network."""
    model, inputs = made("fully connected", 5)
    predict, params = models.from_nnx(model)

    def loss(params, batch):
        return jnp.mean((predict(params, batch[0]) - batch[1]) ** 2)

    curvature = hessian(loss, params, batched((inputs, predict(params, inputs)), 5))
    labels = models.unit_labels(model, curvature.weights)
    limit = pruning_limit(curvature, jax.random.key(0), loss_tolerance=0.5, groups=labels)
    assert limit.num_groups == 16
    order = magnitude_order(curvature.weights, groups=labels)
    small = shrink(model, params, order.mask(4))
    assert sum(small.model.widths[1:-1]) == 12


@pytest.mark.parametrize("biases", [True, False])
def test_batch_norm_without_scale_or_bias(biases):
    """The networks of the baselines."""
    model = models.CNet(rngs=nnx.Rngs(0))
    model.norms[0].mean.set_value(model.norms[0].mean.get_value() - 0.3)  # so that units have a constant
    model = bare(model, biases=biases)
    predict, params = models.from_nnx(model)
    kernel = params["convolutions"]["0"]["kernel"]
    params["convolutions"]["0"]["kernel"] = kernel.at[..., :2].set(0)
    small = shrink(model, params)
    inputs = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    assert small.num_params < small.dense_num_params
    np.testing.assert_allclose(
        small.predict(small.params, inputs), predict(params, inputs), rtol=1e-4, atol=1e-4
    )
