"""The networks and data on which products and spectra are timed, on the JAX side.

Seven networks from 4,464 to 14.7 million kernel weights, real data, and weights at their random start (seed
0): the time of a product does not depend on training. Batch norm is in evaluation mode, with the statistics
of the first batch. MNIST and CIFAR-10 are read from $JAXLIMIT_DATA.

The text of the language model is the language reference that comes with Python (`pydoc_data.topics`): its
printable ASCII characters, cut into sequences that do not overlap.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

import jaxlimit
from jaxlimit import data, models
from jaxlimit.core.trees import PyTree, combine
from jaxlimit.models.functional import Params, Predict
from jaxlimit.training.losses import cross_entropy

Arrays = tuple[NDArray, NDArray]
BATCH_SIZE = 128
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
CONTEXT = 128
ACCELERATED = 16


class Attention(nnx.Module):
    """Causal self-attention: softmax(q k^T / sqrt(width / heads)) v, head by head, with four dense layers."""

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (nnx.Linear(width, width, rngs=rngs) for _ in range(4))

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """(batch, positions, width) to the same shape."""
        batch, length, width = hidden.shape
        heads = (batch, length, self.num_heads, width // self.num_heads)
        query, key, value = (f(hidden).reshape(heads) for f in (self.query, self.key, self.value))
        scores = jnp.einsum("bihd,bjhd->bhij", query, key) / heads[-1] ** 0.5
        scores = jnp.where(np.tril(np.ones((length, length), bool)), scores, -jnp.inf)
        mixed = jnp.einsum("bhij,bjhd->bihd", nnx.softmax(scores), value)
        return self.out(mixed.reshape(hidden.shape))


class Layer(nnx.Module):
    """A pre-norm layer: x + attention(norm(x)), then x + down(gelu(up(norm(x))))."""

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.attention = Attention(width, num_heads, rngs=rngs)
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """(batch, positions, width) to the same shape."""
        hidden = hidden + self.attention(self.attention_norm(hidden))
        return hidden + self.down(nnx.gelu(self.up(self.norm(hidden)), approximate=True))


class Transformer(nnx.Module):
    """A decoder-only language model of characters, with learned positions and an untied head.

    4 layers of width 128 with 4 heads have 798,720 kernel weights: 4 x (4 x 128 x 128 + 2 x 128 x 512) in
    the layers, 128 x 96 in the head.
    """

    def __init__(
        self,
        width: int = 128,
        num_heads: int = 4,
        num_layers: int = 4,
        context: int = CONTEXT,
        *,
        rngs: nnx.Rngs,
    ):
        self.tokens = nnx.Embed(len(ALPHABET), width, rngs=rngs)
        self.positions = nnx.Embed(context, width, rngs=rngs)
        self.layers = nnx.List(Layer(width, num_heads, rngs=rngs) for _ in range(num_layers))
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(width, len(ALPHABET), rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits (batch, positions, characters) of tokens (batch, positions)."""
        hidden = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(self.norm(hidden))


def _digits() -> Arrays:
    digits = data.load_digits()
    return digits.train_images, digits.train_labels


def _mnist() -> Arrays:
    mnist = data.load_mnist()
    return data.flatten_channel_first(mnist.train_images), mnist.train_labels


def _cifar10() -> Arrays:
    cifar10 = data.load_cifar10()
    return cifar10.train_images, cifar10.train_labels


def text_sequences(context: int = CONTEXT) -> Arrays:
    """Tokens (sequences, context) of the text in order, and the characters that follow each of them."""
    from pydoc_data.topics import topics

    number = {character: i for i, character in enumerate(ALPHABET)}
    text = "\n\n".join(topics[name] for name in sorted(topics))
    tokens = np.array([number[character] for character in text if character in number], np.int32)
    sequences = tokens[: len(tokens) // (context + 1) * (context + 1)].reshape(-1, context + 1)
    return sequences[:, :-1], sequences[:, 1:]


@dataclass(frozen=True)
class Network:
    """A row of the table: `build(rngs=...)`, its data, and how many examples a product averages over.

    Off the CPU it is `ACCELERATED` times as many, where there are so many, to fill the device.
    """

    build: Callable[..., nnx.Module]
    load: Callable[[], Arrays]
    num_examples: int


NETWORKS = {
    "digits": Network(models.digits_net, _digits, 1438),
    "fc2": Network(partial(models.fc2, 784), _mnist, 2048),
    "fc5": Network(partial(models.fc5, 784), _mnist, 2048),
    "lenet": Network(models.LeNet, _cifar10, 512),
    "vgg16": Network(partial(models.VGG, 16), _cifar10, 64),
    "resnet18": Network(partial(models.ResNet, 18), _cifar10, 64),
    "transformer": Network(Transformer, text_sequences, 128),
}


def is_prunable(path: Sequence[Any], leaf: Any) -> bool:
    """The kernels of dense and convolution layers; not the embeddings, which are tables and not kernels.

    For all networks but the transformer this is jaxlimit's default.
    """
    return path[-1].key == "kernel"


@dataclass(frozen=True, eq=False)
class Problem:
    """A network with weights and data: all that defines a curvature.

    Attributes:
        name: of the network in `NETWORKS`.
        model: the NNX module, for its structure and its running statistics.
        predict: `predict(params, inputs) -> logits`.
        params: nested dictionaries of arrays.
        inputs: images (examples, height, width, channels), flattened for fully connected networks; or tokens.
        labels: (examples,), or (examples, positions) for tokens.
    """

    name: str
    model: nnx.Module
    predict: Predict
    params: Params
    inputs: jax.Array
    labels: jax.Array

    def loss(self, params: PyTree, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Mean cross entropy of a batch, over its examples or their tokens."""
        return cross_entropy(self.outputs(params, batch), batch[1])

    def outputs(self, params: PyTree, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Logits of a batch."""
        return self.predict(params, batch[0])

    def batches(self, batch_size: int = BATCH_SIZE) -> jaxlimit.Batches:
        """All examples in order; the last batch may be smaller."""
        return jaxlimit.batched((self.inputs, self.labels), batch_size)

    def curvature(
        self, operator: str, batch_size: int = BATCH_SIZE, *, precision: str = "highest"
    ) -> jaxlimit.Curvature:
        """The curvature on the prunable weights; operator: "hessian" or "gauss_newton"."""
        options: dict[str, Any] = {"prunable": is_prunable, "precision": precision}
        batches = self.batches(batch_size)
        if operator == "hessian":
            return jaxlimit.hessian(self.loss, self.params, batches, **options)
        if operator == "gauss_newton":
            return jaxlimit.gauss_newton(self.outputs, _output_loss, self.params, batches, **options)
        raise ValueError(f'operator must be "hessian" or "gauss_newton", got {operator!r}.')


def vectors_like(weights: PyTree, count: int) -> PyTree:
    """Gaussian vectors along a leading axis."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal((count, *x.shape), np.float32)), weights)


def counted_operations(problem: Problem, curvature: jaxlimit.Curvature) -> dict[str, float]:
    """Of the gradient, and of the product linearised anew and kept, for all examples."""
    product, weights, rest = curvature.product, curvature.weights, curvature.rest
    # Few examples stand for all: the count is proportional to them.
    share = min(len(problem.inputs), 32)
    batch = problem.inputs[:share], problem.labels[:share]
    one = vectors_like(weights, 1)
    linear = jax.jit(product.linearize)(weights, rest, batch)
    counts = {
        "gradient": common.operations(jax.grad(lambda w: product.loss(combine(w, rest), batch)), weights),
        "anew": common.operations(product, weights, rest, one, batch),
        "kept": common.operations(product.apply, linear, one),
    }
    return {name: count * len(problem.inputs) / share for name, count in counts.items()}


def _output_loss(logits: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    return cross_entropy(logits, batch[1])


def load_problem(name: str, num_examples: int | None = None, *, seed: int = 0) -> Problem:
    """A network of the table at its random start, with its first examples.

    Args:
        name: in `NETWORKS`.
        num_examples: default: that of the table.
        seed: of the random kernels.

    Raises:
        ValueError: another name, or a number of examples that the data do not have.
        FileNotFoundError: the data are not there.
    """
    if name not in NETWORKS:
        raise ValueError(f"name must be one of {', '.join(NETWORKS)}, got {name!r}.")
    network = NETWORKS[name]
    inputs, labels = network.load()
    usual = network.num_examples * (1 if common.on_cpu() else ACCELERATED)
    count = min(usual, len(inputs)) if num_examples is None else num_examples
    if not 1 <= count <= len(inputs):
        raise ValueError(f"num_examples must be between 1 and {len(inputs)} for {name}, got {count}.")
    inputs, labels = jnp.asarray(inputs[:count]), jnp.asarray(labels[:count])
    model = network.build(rngs=nnx.Rngs(seed))
    _normalize(model, inputs[:BATCH_SIZE])
    return Problem(name, model, *models.from_nnx(model), inputs, labels)


def _normalize(model: nnx.Module, inputs: jax.Array) -> None:
    """Makes the statistics of a batch the running statistics of batch norm."""
    norms = [module for _, module in nnx.iter_modules(model) if isinstance(module, nnx.BatchNorm)]
    if not norms:
        return
    for norm in norms:
        norm.momentum = 0.0
    model.train()
    model(inputs)  # pyright: ignore[reportCallIssue]
    model.eval()
